"""Speculative decoding: what is restored gives the tokens of an agent that was never suspended in as many steps of
verification, so that as many drafts are accepted. Without the draft's KV the tokens would be right, and hardly any
draft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
from prompts import TINY, Generated, Generator
from stacks import MakeStack, ask_ranks, stat_at_rest, suspend
from test_models import QUESTION, damage, tokens

from agentstate.cli.local import LocalStack

ANSWER = 64
CHAIN = ("--speculative-num-steps", "3", "--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4")
STATES = ("--page-size", "1", "--mamba-radix-cache-strategy", "no_buffer", "--disable-overlap-schedule")
# As many states as SGLang would have fill most of a machine's memory.
STATES += ("--max-running-requests", "4", "--max-mamba-cache-size", "24")
# Chunks are small, so that prompts are computed in several.
SETTINGS = (*TINY, "--chunked-prefill-size", "256")


@dataclass(frozen=True)
class Kind:
    """``algorithm``, with a ``draft`` model's checkpoint beside the ``target``'s or none, whose KV has so many
    ``layers``."""

    algorithm: str
    target: str = "target"
    draft: str | None = None
    layers: int = 4
    flags: tuple[str, ...] = CHAIN
    most_steps: float = 0.5  # a token, as far as drafts are accepted

    @property
    def keeps_drafts(self) -> bool:
        return self.algorithm != "NGRAM"


KINDS = {
    "standalone": Kind("STANDALONE", draft="draft"),
    "eagle": Kind("EAGLE", draft="eagle"),
    "eagle3": Kind("EAGLE3", draft="eagle3"),
    # Trees of drafts, in pages of one token.
    "ngram": Kind("NGRAM", flags=("--speculative-num-draft-tokens", "4")),
    "mtp": Kind("EAGLE", target="mtp", layers=3),
    "sparse": Kind("EAGLE", target="sparse"),
    "linear": Kind("NEXTN", target="linear", layers=2, flags=(*CHAIN, *STATES), most_steps=0.9),
}


@dataclass
class Engine:
    kind: Kind
    stack: LocalStack
    arguments: tuple[str, ...]

    @property
    def generate(self) -> Generator:
        return Generator(self.stack.engine_url)

    def start(self) -> None:
        self.stack.start_engine(*self.arguments)


def made(home: Path, kind: Kind, checkpoints: Path, make_stack: MakeStack) -> Engine:
    """An engine, not started yet, on a database without a service."""
    arguments = [*SETTINGS, "--speculative-algorithm", kind.algorithm, *kind.flags]
    if kind.draft is not None:
        arguments += ["--speculative-draft-model-path", str(checkpoints / kind.draft)]
    stack = make_stack(home, checkpoints / kind.target)
    stack.create_database()
    return Engine(kind, stack, tuple(arguments))


@pytest.fixture(scope="module", params=KINDS)
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, checkpoints: Path, make_stack: MakeStack
) -> Iterator[Engine]:
    engine = made(tmp_path_factory.mktemp(request.param), KINDS[request.param], checkpoints, make_stack)
    with closing(engine.stack):
        engine.start()
        yield engine


@pytest.fixture
def whole(engine: Engine, request: pytest.FixtureRequest) -> Engine:
    """Some of the engines, unless all are asked for: what they have in common is tested with each of its kinds."""
    if engine.kind not in (KINDS["eagle"], KINDS["linear"]) and not request.config.getoption("speculation_thorough"):
        pytest.skip("needs --speculation-thorough")
    return engine


class Agent:
    """Two turns, the second of which has all of the first before it."""

    def __init__(self, engine: Engine, seed: int, **fields: str):
        self._generate, self._fields = engine.generate, fields
        self._question, self._next = tokens(seed, QUESTION), tokens(seed + 1, 30)
        self._answer = self._generate(self._question, ANSWER, **fields)

    @property
    def prompt(self) -> list[int]:
        return [*self._question, *self._answer.tokens, *self._next]

    def second_turn(self) -> Generated:
        return self._generate(self.prompt, 48, **self._fields)


names = count()


def never_suspended(engine: Engine, seed: int) -> Generated:
    """The second turn of an agent that is never suspended. To be asked after another one is suspended: NGRAM drafts
    from what the engine has said since its device was flushed, which here is the same for both."""
    found = None
    for _ in range(1 if engine.kind.keeps_drafts else 2):
        found = Agent(engine, seed, cache_salt=f"never suspended {next(names)}").second_turn()
        assert found.cached and not found.restored
    assert found is not None and found.steps is not None
    assert found.steps < engine.kind.most_steps * len(found.tokens)
    return found


def is_restored(found: Generated, wanted: Generated) -> None:
    assert (found.tokens, found.steps) == (wanted.tokens, wanted.steps)
    assert (found.cached, found.restored) == (wanted.cached, wanted.cached)


def test_a_turn_takes_as_many_steps_as_if_it_had_never_been_suspended(engine: Engine) -> None:
    turn = engine.stack.begin_turn()
    agent = Agent(engine, 1, session_id=turn.engine_session)
    (said,) = ask_ranks(engine.stack, "flush", session=turn.session.uid, timeout_ms=30_000)
    suspend(engine.stack)
    wanted = never_suspended(engine, 1)
    assert (said["state"], said["tokens"]) == ("durable", wanted.cached)
    assert never_suspended(engine, 2).tokens != wanted.tokens
    is_restored(agent.second_turn(), wanted)
    assert ("draft" in engine.stack.stat()["pools"]) == engine.kind.keeps_drafts


def test_agents_that_are_restored_together_take_as_many_steps(whole: Engine) -> None:
    engine = whole
    seeds = range(10, 13)
    agents = [Agent(engine, seed) for seed in seeds]
    suspend(engine.stack)
    wanted = [never_suspended(engine, seed) for seed in seeds]
    found = engine.generate.batch([agent.prompt for agent in agents], 48)
    for one, other in zip(found, wanted, strict=True):
        is_restored(one, other)


@pytest.mark.parametrize("of_draft", [False, True], ids=["target", "draft"])
def test_a_damaged_page_is_recomputed(whole: Engine, of_draft: bool) -> None:
    engine = whole
    if of_draft and not engine.kind.keeps_drafts:
        pytest.skip("nothing is kept of its drafts")
    seed = 21 + of_draft
    # The extents of the sessions before are merged: this one's are newer.
    stat_at_rest(engine.stack)
    agent = Agent(engine, seed)
    suspend(engine.stack)
    before = failed(engine.stack, of_draft)
    damage(engine.stack, "rank0", 1 if of_draft else engine.kind.layers, 2)
    wanted = never_suspended(engine, seed)
    found = agent.second_turn()
    assert (found.tokens, found.steps) == (wanted.tokens, wanted.steps)
    assert found.cached < wanted.cached
    assert failed(engine.stack, of_draft) == before + 1
    # What was lost is stored again.
    suspend(engine.stack)
    wanted = never_suspended(engine, seed)
    found = agent.second_turn()
    assert (found.tokens, found.steps) == (wanted.tokens, wanted.steps)
    assert found.restored == found.cached >= wanted.cached


def failed(stack: LocalStack, of_draft: bool) -> int:
    stat = stat_at_rest(stack)
    return int((stat["pools"]["draft"] if of_draft else stat)["restore"]["pages_failed"])


def test_a_turn_takes_as_many_steps_after_the_engine_was_killed(whole: Engine) -> None:
    engine = whole
    agent = Agent(engine, 31)
    engine.stack.settle()
    engine.stack.kill_engine()
    engine.start()
    wanted = never_suspended(engine, 31)
    is_restored(agent.second_turn(), wanted)
