"""Before the next request: pages that are brought back to host or device memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from prompts import PAGE, Generator, prompt
from stacks import stat_at_rest

from agentstate.cli.local import LocalStack
from agentstate.client import Client
from agentstate.fleet.control import ControlClient


@pytest.fixture
def rank(stack: LocalStack) -> ControlClient:
    return stack.control()


def durable(rank: ControlClient, session: str) -> int:
    answer = rank.call("flush", 60, session=session, timeout_ms=60_000)
    assert answer["state"] == "durable"
    return int(answer["tokens"])


def prefetch(rank: ControlClient, session: str, tier: str) -> dict[str, Any]:
    return rank.call("prefetch", 60, session=session, tier=tier, timeout_ms=60_000)


def test_a_request_joins_what_was_prefetched_to_host_memory(
    stack: LocalStack, rank: ControlClient, generate: Generator
) -> None:
    text = prompt(40, 15 * PAGE + 9)
    turn = stack.begin_turn()
    right = generate(text, session_id=turn.engine_session)
    tokens = durable(rank, turn.session.uid)
    stack.flush_device()
    before = stack.stat()["prefetch"]
    answer = prefetch(rank, turn.session.uid, "host")
    assert (answer["state"], answer["tier"], answer["tokens"]) == ("warm", "host", tokens)
    assert stack.stat()["staged_bytes"] > 0
    restored = generate(text, session_id=turn.engine_session)
    assert restored.restored == 15 * PAGE
    assert restored.tokens == right.tokens
    after = stat_at_rest(stack)
    issued, used = (after["prefetch"][name] - before[name] for name in ("issued", "used"))
    assert (issued, used, after["staged_bytes"]) == (1, 1, 0)


def test_pages_that_were_prefetched_to_the_device_are_a_hit(
    stack: LocalStack, rank: ControlClient, generate: Generator
) -> None:
    text = prompt(41, 11 * PAGE + 9)
    turn = stack.begin_turn()
    right = generate(text, session_id=turn.engine_session)
    durable(rank, turn.session.uid)
    stack.flush_device()
    answer = prefetch(rank, turn.session.uid, "device")
    assert (answer["state"], answer["tier"]) == ("warm", "device")
    before = stack.stat()["restore"]["restores"]
    hit = generate(text, session_id=turn.engine_session)
    assert (hit.cached, hit.restored) == (11 * PAGE, 0)
    assert hit.tokens == right.tokens
    assert stack.stat()["restore"]["restores"] == before
    # What is there already needs nothing.
    assert prefetch(rank, turn.session.uid, "device")["state"] == "warm"
    assert stack.stat()["restore"]["restores"] == before


def test_a_session_that_nobody_knows_is_missing(rank: ControlClient) -> None:
    for tier in ("host", "device"):
        assert prefetch(rank, "ses_unheard_of", tier)["state"] == "cold"


@contextmanager
def decoding(stack: LocalStack) -> Iterator[None]:
    """Within it the engine decodes for a request that is not at its end before it is aborted."""
    sampling = {"max_new_tokens": 6000, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": prompt(70, PAGE), "sampling_params": sampling, "stream": True, "rid": "endless"}
    with httpx.stream("POST", f"{stack.engine_url}/generate", json=body, timeout=600) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: {")
        yield
        httpx.post(f"{stack.engine_url}/abort_request", json={"rid": "endless"}, timeout=600).raise_for_status()
        for _ in lines:
            pass


def test_a_request_that_waits_is_read_for_already(stack: LocalStack, rank: ControlClient, generate: Generator) -> None:
    texts = [prompt(60 + i, 6 * PAGE + 3) for i in range(3)]
    right = [generate(text, max_new_tokens=4).tokens for text in texts]
    stack.settle()
    stack.flush_device()
    before = stack.stat()["prefetch"]
    with decoding(stack), ThreadPoolExecutor() as asking:
        found = list(asking.map(lambda text: generate(text, max_new_tokens=4), texts))
    assert [answer.tokens for answer in found] == right
    assert [answer.restored for answer in found] == [6 * PAGE] * 3
    after = stat_at_rest(stack)
    assert after["prefetch"]["used"] - before["used"] == 3
    assert after["staged_bytes"] == 0


def test_the_service_still_suspends_and_resumes_beside_all_that(stack: LocalStack, generate: Generator) -> None:
    with Client(stack.service_url, timeout_s=300) as client:
        session = client.create_session(stack.model)
        resumed = client.resume(session.id)
        assert resumed.engine is not None
        generate(prompt(80, 5 * PAGE), **resumed.engine.extra_body)
        suspended = client.suspend(session.id, resumed.lease, durable_timeout_ms=60_000)
        assert (suspended.kv.state, suspended.kv.tokens) == ("durable", 5 * PAGE)
