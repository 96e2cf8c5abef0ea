"""On both of SGLang's trees: sessions that are let go of first, and pages offered again that the store has lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from prompts import PAGE, TINY, Generator, prompt
from stacks import MakeStack

from agentstate.cli.local import LocalStack
from agentstate.fleet.control import ControlClient

POOL_PAGES = 128
QUOTA_PAGES = 50
PAGE_BYTES = PAGE * 2_048  # of the tiny Llama


@pytest.fixture(scope="module", params=["python", "rust"])
def stack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_stack: MakeStack, checkpoints: Path
) -> Iterator[LocalStack]:
    with closing(make_stack(tmp_path_factory.mktemp(request.param), checkpoints / "llama")) as stack:
        stack.environment = {
            **stack.environment,
            "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": request.param,
            "AGENTSTATE_PAGES_QUOTA": str(QUOTA_PAGES * PAGE_BYTES),
        }
        stack.create_database()
        # A prompt is stored in one piece, as it is computed.
        stack.start_engine(*TINY, "--max-total-tokens", str(POOL_PAGES * PAGE), "--chunked-prefill-size", "8192")
        yield stack


@pytest.fixture
def rank(stack: LocalStack) -> ControlClient:
    return stack.control()


def flush(rank: ControlClient, session: str) -> tuple[str, int]:
    answer = rank.call("flush", 60, session=session, timeout_ms=60_000)
    return answer["state"], answer["pages"]


def test_a_demoted_session_is_evicted_before_an_older_one(
    stack: LocalStack, rank: ControlClient, generate: Generator
) -> None:
    older, newer = prompt(42, 8 * PAGE + 1), prompt(43, 8 * PAGE + 1)
    stack.flush_device()
    turn = stack.begin_turn()
    generate(older, max_new_tokens=1, session_id=stack.begin_turn().engine_session)
    generate(newer, max_new_tokens=1, session_id=turn.engine_session)
    assert flush(rank, turn.session.uid) == ("durable", 8)
    assert rank.call("demote", 60, session=turn.session.uid)["state"] == "demoted"
    # Fill the device up to a few pages, and ask for some more.
    generate(prompt(50, 108 * PAGE), max_new_tokens=1)
    generate(prompt(51, 8 * PAGE), max_new_tokens=1)
    hit = generate(older, max_new_tokens=1)
    assert (hit.cached, hit.restored) == (8 * PAGE, 0)
    evicted = generate(newer, max_new_tokens=1)
    assert evicted.cached == evicted.restored


def test_pages_that_the_store_has_lost_are_stored_again(
    stack: LocalStack, rank: ControlClient, generate: Generator
) -> None:
    stack.flush_device()
    text = prompt(60, 20 * PAGE + 1)
    lost, taker = stack.begin_turn(), stack.begin_turn()
    right = generate(text, session_id=lost.engine_session)
    assert flush(rank, lost.session.uid) == ("durable", 20)
    # Another session takes the room, though it is needed too: this one was used before it.
    # An extent that is being merged cannot be evicted: what finds no room for that is stored with the next request.
    for _ in range(20):
        generate(prompt(61, 40 * PAGE), max_new_tokens=1, session_id=taker.engine_session)
        if flush(rank, taker.session.uid) == ("durable", 40):
            break
    assert flush(rank, taker.session.uid) == ("durable", 40)
    assert flush(rank, lost.session.uid) == ("lost", 0)
    # Its pages are still on the device: a hit, after which they are on disk again.
    hit = generate(text, session_id=lost.engine_session)
    assert (hit.cached, hit.restored) == (20 * PAGE, 0)
    assert flush(rank, lost.session.uid) == ("durable", 20)
    stack.flush_device()
    restored = generate(text, session_id=lost.engine_session)
    assert restored.restored == 20 * PAGE
    assert restored.tokens == hit.tokens == right.tokens
