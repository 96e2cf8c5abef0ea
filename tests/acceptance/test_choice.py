"""Restores by choice, of a tiny model with an index on a real engine: the tokens are those of one that never evicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from prompts import TINY, Generated, Generator, Stream, tokens
from stacks import MakeStack, ask_ranks, stat_at_rest, suspend, until

from agentstate.benchmarks.slow_drive import Drive
from agentstate.cli.local import LocalStack
from agentstate.pages.extent import ExtentHeader
from agentstate.pages.files import read_header

PAGE = 64
# So long that a turn of a few tokens chooses a small part of it: each token 64.
QUESTION = 30 * PAGE
ANSWER = 24
LAYERS = 4
Start = Callable[..., LocalStack]


@pytest.fixture
def start(
    tmp_path: Path, checkpoints: Path, make_stack: MakeStack, slow_drive: dict[str, str], drive: Drive
) -> Iterator[Start]:
    """Starts an engine that restores by choice; it ends with the test."""
    with ExitStack() as running:

        def start(*flags: str, **environment: str) -> LocalStack:
            stack = running.enter_context(closing(make_stack(tmp_path / "stack", checkpoints / "sparse")))
            stack.environment = {**stack.environment, **slow_drive, "AGENTSTATE_CHOICE": "on", **environment}
            stack.create_database()
            stack.start_engine(*TINY, *flags)
            return stack

        yield start


class Agent:
    """Turns that have all of a first one before them."""

    def __init__(self, stack: LocalStack, seed: int, **fields: Any):
        self._stack, self._fields = stack, fields
        question = tokens(seed, QUESTION)
        answer = Generator(stack.engine_url)(question, max_new_tokens=PAGE, **fields)
        self._history = [*question, *answer.tokens]

    def prompt(self, new: int = 3, seed: int = 0) -> list[int]:
        return [*self._history, *tokens(1000 + seed, new)]

    def turn(self, new: int = 3, seed: int = 0) -> Generated:
        return Generator(self._stack.engine_url)(self.prompt(new, seed), ANSWER, **self._fields)

    def forks(self, count: int = 3) -> list[Generated]:
        """At once, as one batch."""
        prompts = [self.prompt(seed=seed) for seed in range(count)]
        return Generator(self._stack.engine_url).batch(prompts, ANSWER, **self._fields)


def suspend_and_overwrite(stack: LocalStack) -> None:
    """`suspend`, with other KV in the slots that a resumed agent gets: what was not restored is not what it should
    be."""
    suspend(stack)
    Generator(stack.engine_url)(tokens(99, QUESTION + 5 * PAGE), 1)
    suspend(stack)


def chosen(stack: LocalStack) -> int:
    """How many batches the engine has restored by choice."""
    return (stack.home / "engine.log").read_text().count("agentstate: by choice: ")


def latents(stack: LocalStack) -> dict[Path, ExtentHeader]:
    """The extents of latents."""
    found = {path: read_header(path) for path in (stack.home / "pages").glob("*/rank0/extents/*.ext")}
    return {path: header for path, header in found.items() if header.geometry.layers == LAYERS}


def test_tokens_are_those_of_an_engine_that_never_evicted(start: Start, drive: Drive) -> None:
    """A turn, forks, a turn of several chunks; so slowly that later steps wait for rows as well; killed in between."""
    stack = start()
    never = Agent(stack, 1, cache_salt="never suspended")
    wanted, long = never.turn(), never.turn(new=1100, seed=5)
    forks = never.forks()
    assert wanted.cached and not wanted.restored and wanted.tokens != forks[1].tokens
    agent = Agent(stack, 1)
    for speed in (1e12, 30e6):
        drive.set(speed, "rank0")
        suspend_and_overwrite(stack)
        resumed = agent.turn()
        # A turn completes the page that the one before it has left.
        assert resumed.tokens == wanted.tokens and resumed.restored >= wanted.cached
        # Now on the device, and whole.
        again = agent.turn()
        assert (again.tokens, again.restored) == (wanted.tokens, 0)
        suspend_and_overwrite(stack)
        assert [fork.tokens for fork in agent.forks()] == [fork.tokens for fork in forks]
        suspend(stack)
        assert agent.turn(new=1100, seed=5).tokens == long.tokens
    assert chosen(stack)
    suspend(stack)
    stack.kill_engine()
    stack.start_engine(*TINY)
    resumed = agent.turn()
    assert resumed.tokens == wanted.tokens and resumed.restored > wanted.cached
    assert stat_at_rest(stack)["restore"]["requests_failed"] == 0


def test_what_was_stored_before_is_restored_whole_and_waited_for(start: Start, drive: Drive) -> None:
    stack = start(AGENTSTATE_CHOICE="off")
    wanted = Agent(stack, 9, cache_salt="never suspended").turn()
    agent = Agent(stack, 9)
    suspend(stack)
    stack.kill_engine()
    stack.environment = {**stack.environment, "AGENTSTATE_CHOICE": "on"}
    stack.start_engine(*TINY)
    for speed in (1e12, 30e6):
        suspend_and_overwrite(stack)
        drive.set(speed, "rank0")
        before = chosen(stack)
        resumed = agent.turn()
        assert resumed.tokens == wanted.tokens and resumed.restored >= wanted.cached
        assert chosen(stack) == before
        drive.answer()


def test_a_drive_that_hangs(start: Start, drive: Drive) -> None:
    stack = start(AGENTSTATE_DRIVE_TIMEOUT_S="5")
    wanted = Agent(stack, 5, cache_salt="never suspended").turn()
    agent = Agent(stack, 5)
    suspend(stack)
    (hanging,) = {path.parents[1] for path in latents(stack)}
    drive.hang(str(hanging))
    recomputed = agent.turn()
    assert (recomputed.tokens, recomputed.cached) == (wanted.tokens, 0)
    assert stack.stat()["restore"]["timed_out"] == 1
    drive.answer()

    def restores_again() -> bool:
        suspend(stack)
        restored = agent.turn()
        assert restored.tokens == wanted.tokens
        return restored.restored >= wanted.cached

    # A drive that was late once may be again.
    until(restores_again)
    assert stat_at_rest(stack)["restore"]["pages_failed"] == 0


def test_what_a_client_leaves_is_given_back(start: Start, drive: Drive) -> None:
    """In the middle of its answer, while rows of it still arrive."""
    stack = start()
    wanted = Agent(stack, 7, cache_salt="never suspended").turn()
    agent = Agent(stack, 7)
    for _ in range(2):
        suspend(stack)
        drive.set(20e6, "rank0")
        stream = Stream(stack.engine_url, agent.prompt(), 500)
        stream.wait(2)
        stream.close()
        drive.answer()
        # Nothing is kept, and other requests take its place.
        stat_at_rest(stack)
        assert Agent(stack, 8).turn().tokens != wanted.tokens
        assert agent.turn().tokens == wanted.tokens
    assert all(stat["restore"]["requests_failed"] == 0 for stat in ask_ranks(stack, "stat"))
