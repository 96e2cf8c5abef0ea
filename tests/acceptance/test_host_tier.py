"""Agents whose contexts do not fit the device together: what leaves it comes back from host memory, and the drive is
not read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from prompts import PAGE, TINY, Generated, Generator, prompt
from stacks import MakeStack, ask_ranks, stats_at_rest

from agentstate import Client
from agentstate.cli.local import LocalStack
from agentstate.errors import EngineError
from agentstate.sessions.outcomes import Resumed

# The device has 128 pages.
AGENTS = 6
CONTEXT = 30 * PAGE + 9
Start = Callable[..., LocalStack]


@pytest.fixture
def start(tmp_path: Path, checkpoints: Path, make_stack: MakeStack) -> Iterator[Start]:
    with ExitStack() as running:

        def start(kind: str, *flags: str, **environment: str) -> LocalStack:
            stack = running.enter_context(closing(make_stack(tmp_path / "stack", checkpoints / kind)))
            stack.environment = {**stack.environment, "AGENTSTATE_HOST_BYTES": "256MiB", **environment}
            stack.start_service()
            stack.start_engine(*TINY, *flags)
            return stack

        yield start


def ranks(stack: LocalStack) -> list[dict[str, Any]]:
    """What each rank says when nothing is being stored or copied."""
    while True:
        found = ask_ranks(stack, "stat")
        if not any(stat["spill"]["waiting"] or stat["kept"]["locked_demotions"] for stat in found):
            return found
        time.sleep(0.02)


def pools(stat: dict[str, Any]) -> list[dict[str, Any]]:
    return [stat, *stat["pools"].values()]


# As many as SGLang would have fill most of a machine's memory.
STATES = ("--max-mamba-cache-size", "64")


DRAFTS = ("--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3", "--speculative-eagle-topk", "1")
DRAFTS += ("--speculative-num-draft-tokens", "4")


def told(*answers: Generated) -> list[tuple[tuple[int, ...], int | None]]:
    """Their tokens, and in how many steps drafts of these were verified: without the draft's KV in more."""
    return [(answer.tokens, answer.steps) for answer in answers]


def play(stack: LocalStack, turns: list[Resumed] | None = None) -> tuple[list[Generated], list[Generated]]:
    """Each agent has a turn, one of ``turns`` if these are given, and then each has another one with the same
    tokens."""
    generate = Generator(stack.engine_url)
    turns = turns or [stack.begin_turn() for _ in range(AGENTS)]
    rounds: list[list[Generated]] = []
    for _ in range(2):
        rounds.append([])
        for number, turn in enumerate(turns):
            rounds[-1].append(generate(prompt(500 + number, CONTEXT), session_id=turn.engine_session))
            ranks(stack)
    return rounds[0], rounds[1]


@pytest.mark.parametrize(
    ("kind", "flags"),
    [("llama", ()), ("mla", ()), ("sliding", ()), ("conv", STATES), ("llama", ("--tp", "2")), ("target", DRAFTS)],
    ids=["llama", "mla", "sliding", "conv", "two ranks", "drafts"],
)
def test_what_left_the_device_comes_back(start: Start, checkpoints: Path, kind: str, flags: tuple[str, ...]) -> None:
    """From host memory when its agent goes on, and to the device before that, where it is asked for."""
    if flags == DRAFTS:
        flags = (*DRAFTS, "--speculative-draft-model-path", str(checkpoints / "eagle"))
    stack = start(kind, *flags)
    turns = [stack.begin_turn() for _ in range(AGENTS)]
    computed, restored = play(stack, turns)
    assert told(*restored) == told(*computed)
    # A recurrent state is kept where a chunk of 1,024 tokens ends.
    assert all(answer.restored >= 16 * PAGE for answer in restored)
    stats = stats_at_rest(stack)
    assert len(stats) == (2 if "--tp" in flags else 1)
    for stat in stats:
        for pool in pools(stat):
            assert pool["restore"]["bytes_read"] == 0
            assert pool["restore"]["pages_host"] == pool["restore"]["pages_restored"] > 0
            assert pool["host"]["pages_wrong"] == pool["host"]["pages_refused"] == 0
        assert 0 < stat["host"]["used"] <= stat["host"]["bound"] == 256 << 20
    brings_it_to_the_device(stack, turns[0], computed[0], "host" if kind == "conv" else "device")


def brings_it_to_the_device(stack: LocalStack, turn: Resumed, computed: Generated, tier: str) -> None:
    """The first agent's context is asked for before its next turn, from every rank. Recurrent states come as far as
    host memory."""
    stack.flush_device()
    answers = ask_ranks(stack, "prefetch", session=turn.session.uid, tier="device", timeout_ms=60_000)
    assert {(answer["state"], answer["tier"]) for answer in answers} == {("warm", tier)}
    preloads = [stat["preload"] for stat in stats_at_rest(stack)]
    assert [(one["preloads"], one["failed"]) for one in preloads] == [(int(tier == "device"), 0)] * len(preloads)
    hit = Generator(stack.engine_url)(prompt(500, CONTEXT), session_id=turn.engine_session)
    assert told(hit) == told(computed)
    if tier == "device":
        assert (hit.cached, hit.restored) == (30 * PAGE, 0)
    stats_at_rest(stack)


def test_a_tier_that_is_too_small_for_all_of_it_is_never_larger_than_its_bound(start: Start) -> None:
    stack = start("llama", AGENTSTATE_HOST_BYTES="1MiB")
    computed, restored = play(stack)
    assert [answer.tokens for answer in restored] == [answer.tokens for answer in computed]
    (stat,) = ranks(stack)
    assert stat["host"]["used"] <= 1 << 20 and stat["host"]["pages_evicted"] > 0
    assert stat["restore"]["bytes_read"] > 0


def test_a_deleted_session_leaves_host_memory(start: Start) -> None:
    stack = start("sliding")
    generate = Generator(stack.engine_url)
    with Client(stack.service_url, timeout_s=300) as client:
        sessions = [client.create_session(stack.model) for _ in range(AGENTS)]
        for number, session in enumerate(sessions):
            with client.turn(session.id, durable_timeout_ms=60_000) as turn:
                generate(prompt(500 + number, CONTEXT), **turn.extra_body)
            (stat,) = ranks(stack)
        assert all(pool["host"]["pages"] > 0 for pool in pools(stat))
        for session in sessions:
            client.delete(session.id, revision=client.read(session.id).revision)
        deadline = time.monotonic() + 600
        while any(pool["host"]["pages"] for pool in pools(stat)) and time.monotonic() < deadline:
            time.sleep(0.2)
            (stat,) = ranks(stack)
    assert [(pool["host"]["pages"], pool["host"]["bytes"]) for pool in pools(stat)] == [(0, 0), (0, 0)]
    assert stat["host"]["used"] == 0


def test_more_than_the_machine_has_is_refused(start: Start) -> None:
    with pytest.raises(EngineError, match=r"AGENTSTATE_HOST_BYTES=\d+.* is more than its memory"):
        start("llama", AGENTSTATE_HOST_BYTES="900TiB")
