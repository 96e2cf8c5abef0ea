"""Data parallelism: DP ranks that serve requests of their own from pages of their own. A session stays with the rank
that has its KV, or moves to another one with it; tokens are those of an agent that was never suspended."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prompts import PAGE, TINY, Generated, _generated
from stacks import MakeStack
from test_models import QUESTION, tokens

from agentstate import Client
from agentstate.answers import Suspended
from agentstate.cli.local import LocalStack
from agentstate.client.turn import Turn
from agentstate.fleet.control import ControlClient
from agentstate.fleet.engines import Engine

# Of each mode, the model and the flags: SGLang's Llama does not gather what DP ranks of one model compute together.
MODES = {
    "replicas": ("llama", "--dp-size", "2"),
    "attention": ("mla", "--tp-size", "2", "--dp-size", "2", "--enable-dp-attention"),
}


@dataclass(frozen=True)
class Answered:
    """What a request was answered with, and the DP rank that served it."""

    generated: Generated
    dp_rank: int

    @property
    def tokens(self) -> list[int]:
        return list(self.generated.tokens)


@dataclass
class Agent:
    """A session that is gone on with turn by turn: each has all that came before it."""

    stack: LocalStack
    service: Client
    session_id: str
    context: list[int]
    seed: int
    suspended: Suspended | None = None
    dp_rank: int | None = None

    def turn(self) -> Turn:
        return self.service.turn(self.session_id, durable_timeout_ms=60_000)

    def ask(self, turn: Turn, **fields: Any) -> Answered:
        """A request of the turn: the next question, and its answer."""
        return self.answered(ask(self.stack, self.context, **turn.extra_body, **fields))

    def answered(self, answer: Answered) -> Answered:
        self.seed += 100
        self.context = [*self.context, *answer.tokens, *tokens(self.seed, 30)]
        return answer

    def next(self, **fields: Any) -> Answered:
        with self.turn() as turn:
            self.dp_rank = turn.resumed.engine.dp_rank if turn.resumed.engine else None
            answer = self.ask(turn, **fields)
        self.suspended = turn.suspended
        return answer

    def durable(self) -> int:
        """How many tokens the newest suspend has said to be durable."""
        assert self.suspended is not None
        assert self.suspended.kv.state == "durable", self.suspended.kv
        return self.suspended.kv.tokens


def ask(stack: LocalStack, context: list[int], **fields: Any) -> Answered:
    sampling = {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": context, "sampling_params": sampling, **fields}
    found = httpx.post(f"{stack.engine_url}/generate", json=body, timeout=300).raise_for_status().json()
    return Answered(_generated(found), found["meta_info"]["dp_rank"])


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return MODES[request.param]


@pytest.fixture
def stack(
    tmp_path: Path, checkpoints: Path, make_stack: MakeStack, mode: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> Iterator[LocalStack]:
    monkeypatch.delenv("SGLANG_CPU_OMP_THREADS_BIND", raising=False)  # the launcher shares out the cores
    with closing(make_stack(tmp_path / "stack", checkpoints / mode[0])) as stack:
        stack.start_service()
        yield stack


@pytest.fixture
def service(stack: LocalStack) -> Iterator[Client]:
    with Client(stack.service_url, timeout_s=300) as service:
        yield service


def dp_ranks(stack: LocalStack) -> list[Engine]:
    """Both, once both are there."""
    while len(found := stack.ranks()) < 2:
        time.sleep(0.05)
    return sorted(found, key=lambda engine: engine.dp_rank)


def stats(stack: LocalStack) -> list[dict[str, Any]]:
    return [ControlClient(one.control_address, one.control_secret).call("stat", 60) for one in dp_ranks(stack)]


def never_evicted(stack: LocalStack, agent: Agent, dp_rank: int) -> Answered:
    """The agent's next answer where its whole context was computed a moment ago and is on the device."""
    fields = {"cache_salt": f"never evicted {agent.seed}", "routed_dp_rank": dp_rank}
    ask(stack, agent.context[:-30], **fields)
    return ask(stack, agent.context, **fields)


def test_a_session_stays_with_its_dp_rank_or_moves_to_another_one(
    stack: LocalStack, service: Client, mode: tuple[str, ...]
) -> None:
    stack.start_engine(*TINY, *mode[1:])
    first, second = dp_ranks(stack)
    assert [(one.dp_rank, one.dp_size, one.rank) for one in (first, second)] == [(0, 2, 0), (1, 2, 0)]
    assert first.fingerprint == second.fingerprint
    assert first.node != second.node
    assert (first.pages_dir, second.pages_dir) == (str(stack.home / "pages"), str(stack.home / "pages/dp1"))
    agents = [
        Agent(stack, service, service.ensure_session(f"agent {number}", stack.model).id, tokens(seed, QUESTION), seed)
        for number, seed in enumerate((1, 2))
    ]
    # Turns that run at once are shared out among the ranks, and requests go where their turn's token says.
    with ExitStack() as running:
        turns = [running.enter_context(agent.turn()) for agent in agents]
        named = [turn.resumed.engine.dp_rank for turn in turns if turn.resumed.engine]
        assert sorted(named) == [0, 1]
        assert [agent.ask(turn).dp_rank for agent, turn in zip(agents, turns, strict=True)] == named
    for agent, turn in zip(agents, turns, strict=True):
        agent.suspended = turn.suspended
        assert agent.durable() == QUESTION // PAGE * PAGE
    # Restored on the same rank.
    stack.flush_device()
    for agent, dp_rank in zip(agents, named, strict=True):
        wanted = never_evicted(stack, agent, dp_rank)
        durable = agent.durable()
        resumed = agent.next()
        assert (resumed.tokens, resumed.dp_rank, agent.dp_rank) == (wanted.tokens, dp_rank, dp_rank)
        assert (resumed.generated.cached, resumed.generated.restored) == (durable, durable)
        assert agent.durable() > durable
    # On the other rank it is restored from what the first one has stored, and kept there, so that it stays there.
    moved, stayed = agents
    other = 1 - named[0]
    stack.flush_device()
    wanted = never_evicted(stack, moved, other)
    durable = moved.durable()
    elsewhere = moved.next(routed_dp_rank=other)
    assert (elsewhere.tokens, elsewhere.dp_rank, moved.dp_rank) == (wanted.tokens, other, named[0])
    assert elsewhere.generated.restored == durable
    assert moved.durable() > durable
    stack.flush_device()
    wanted, durable = never_evicted(stack, moved, other), moved.durable()
    resumed = moved.next()
    assert (resumed.tokens, resumed.dp_rank, moved.dp_rank) == (wanted.tokens, other, other)
    assert resumed.generated.restored == durable
    # What both have stored is there after a crash.
    wanted = [never_evicted(stack, agent, named[1]) for agent in agents]
    durable = [agent.durable() for agent in agents]
    stack.kill_engine()
    stack.start_engine(*TINY, *mode[1:])
    dp_ranks(stack)
    resumed = [agent.next() for agent in agents]
    assert [one.tokens for one in resumed] == [one.tokens for one in wanted]
    assert [one.generated.restored for one in resumed] == durable
    assert {one.dp_rank for one in resumed} == {named[1]}
    for agent in agents:
        agent.durable()
