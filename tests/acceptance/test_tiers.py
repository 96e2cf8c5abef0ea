"""Before the next request: pages that are brought back to host or device memory, and such as are let go of first."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from prompts import PAGE, Generator, prompt

from agentstate.client import Client
from agentstate.control import ControlClient
from agentstate.errors import EngineRefused
from agentstate.local import LocalStack


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
    right = generate(text, session_id="ses_host")
    tokens = durable(rank, "ses_host")
    stack.flush_device()
    before = stack.stat()["prefetch"]
    answer = prefetch(rank, "ses_host", "host")
    assert (answer["state"], answer["tier"], answer["tokens"]) == ("warm", "host", tokens)
    assert stack.stat()["staged_bytes"] > 0
    restored = generate(text, session_id="ses_host")
    assert restored.restored == 15 * PAGE
    assert restored.tokens == right.tokens
    after = stack.stat()["prefetch"]
    assert (after["issued"], after["used"]) == (before["issued"] + 1, before["used"] + 1)
    assert stack.stat()["staged_bytes"] == 0


def test_pages_that_were_prefetched_to_the_device_are_a_hit(
    stack: LocalStack, rank: ControlClient, generate: Generator
) -> None:
    text = prompt(41, 11 * PAGE + 9)
    right = generate(text, session_id="ses_device")
    durable(rank, "ses_device")
    stack.flush_device()
    answer = prefetch(rank, "ses_device", "device")
    assert (answer["state"], answer["tier"]) == ("warm", "device")
    before = stack.stat()["restore"]["restores"]
    hit = generate(text, session_id="ses_device")
    assert (hit.cached, hit.restored) == (11 * PAGE, 0)
    assert hit.tokens == right.tokens
    assert stack.stat()["restore"]["restores"] == before
    # What is there already needs nothing.
    assert prefetch(rank, "ses_device", "device")["state"] == "warm"
    assert stack.stat()["restore"]["restores"] == before


def test_a_session_that_nobody_knows_is_missing(rank: ControlClient) -> None:
    for tier in ("host", "device"):
        assert prefetch(rank, "ses_unheard_of", tier)["state"] == "cold"


def test_demotion_is_refused_where_the_tree_cannot_do_it(rank: ControlClient) -> None:
    with pytest.raises(EngineRefused, match="SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND=python"):
        rank.call("demote", 60, session="ses_any")


def test_a_request_that_waits_is_read_for_already(stack: LocalStack, rank: ControlClient, generate: Generator) -> None:
    texts = [prompt(60 + i, 6 * PAGE + 3) for i in range(3)]
    right = [generate(text, max_new_tokens=4).tokens for text in texts]
    stack.settle()
    stack.flush_device()
    before = stack.stat()["prefetch"]
    found: dict[int, Any] = {}
    # A long prefill keeps the engine busy while the others arrive.
    busy = threading.Thread(target=generate, args=(prompt(70, 4_000),), kwargs={"max_new_tokens": 1})
    busy.start()
    time.sleep(1.0)
    asking = [
        threading.Thread(target=lambda i=i: found.update({i: generate(texts[i], max_new_tokens=4)})) for i in range(3)
    ]
    for thread in asking:
        thread.start()
    for thread in [*asking, busy]:
        thread.join()
    assert [found[i].tokens for i in range(3)] == right
    assert [found[i].restored for i in range(3)] == [6 * PAGE] * 3
    after = stack.stat()["prefetch"]
    assert after["used"] - before["used"] == 3
    assert stack.stat()["staged_bytes"] == 0


def test_the_service_still_suspends_and_resumes_beside_all_that(stack: LocalStack, generate: Generator) -> None:
    with Client(stack.service_url) as client:
        session = client.create_session(stack.model)
        resumed = client.resume(session.id)
        assert resumed.engine is not None
        generate(prompt(80, 5 * PAGE), **resumed.engine.extra_body)
        suspended = client.suspend(session.id, resumed.lease, durable_timeout_ms=60_000)
        assert (suspended.kv.state, suspended.kv.tokens) == ("durable", 5 * PAGE)
