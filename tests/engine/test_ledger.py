from __future__ import annotations

import tracemalloc
from dataclasses import replace

import pytest
from contents import keys
from turns import turn

from agentstate.fleet.manifests import Manifest
from engine_patch import ledger as module
from engine_patch.ledger import Ledger

PAGE_SIZE, PAGE_BYTES = 64, 1000


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(PAGE_SIZE, lambda pages: pages * PAGE_BYTES, stored=len)


def manifest(session: str, pages: list[bytes]) -> Manifest:
    tokens = len(pages) * PAGE_SIZE
    return Manifest(session, "f", 0, "n", "eng_1", PAGE_SIZE, tokens, b"".join(pages), len(pages) * PAGE_BYTES)


def answer(state: str, pages: int) -> dict[str, object]:
    return {"state": state, "tokens": pages * PAGE_SIZE, "pages": pages, "bytes": pages * PAGE_BYTES}


def test_a_session_that_was_not_served_is_not_known(ledger: Ledger) -> None:
    assert ledger.standing("s") is None
    ledger.saved(manifest("s", keys(1)))
    assert ledger.standing("s") is None
    assert ledger.epoch("s") == 0
    ledger.finished(turn(epoch=3))
    assert ledger.epoch("s") == 3


def test_a_session_is_pending_until_its_pages_are_stored_and_its_manifest_is_saved(ledger: Ledger) -> None:
    number = ledger.finished(turn())
    assert ledger.standing("s") == answer("pending", 0)
    ledger.settled("s", number, keys(1, 2, 3), durable=3)
    assert ledger.standing("s") == answer("pending", 3)
    ledger.saved(manifest("s", keys(1, 2, 3)))
    assert ledger.standing("s") == answer("durable", 3)
    number = ledger.finished(turn())
    assert ledger.standing("s") == answer("pending", 3)
    ledger.settled("s", number, keys(1, 2, 3, 4), durable=4)
    ledger.saved(manifest("s", keys(1, 2, 3, 4)))
    assert ledger.standing("s") == answer("durable", 4)


@pytest.mark.parametrize(("durable", "state"), [(0, "lost"), (1, "partial"), (2, "partial"), (3, "durable")], ids=str)
def test_what_is_stored_from_the_head_is_what_counts(ledger: Ledger, durable: int, state: str) -> None:
    number = ledger.finished(turn())
    ledger.settled("s", number, keys(1, 2, 3), durable)
    ledger.saved(manifest("s", keys(1, 2, 3)[:durable]))
    assert ledger.standing("s") == answer(state, durable)


def test_a_session_shorter_than_a_page_is_durable(ledger: Ledger) -> None:
    ledger.settled("s", ledger.finished(turn()), [], 0)
    ledger.saved(manifest("s", []))
    assert ledger.standing("s") == answer("durable", 0)


def test_the_manifest_of_an_earlier_request_does_not_make_a_later_one_durable(ledger: Ledger) -> None:
    """SQL was slow: the first manifest is committed after the second request has settled."""
    first, second = ledger.finished(turn()), ledger.finished(turn())
    ledger.settled("s", first, keys(1), 1)
    ledger.settled("s", second, keys(1, 2), 2)
    ledger.saved(manifest("s", keys(1)))
    assert ledger.standing("s") == answer("pending", 2)
    ledger.saved(manifest("s", keys(1, 2)))
    assert ledger.standing("s") == answer("durable", 2)


def test_a_request_that_has_not_settled_keeps_the_session_pending(ledger: Ledger) -> None:
    first = ledger.finished(turn())
    ledger.finished(turn())
    ledger.settled("s", first, keys(1), 1)
    ledger.saved(manifest("s", keys(1)))
    assert ledger.standing("s") == answer("pending", 1)


def test_a_request_that_adds_no_page_is_durable_with_the_manifest_it_has(ledger: Ledger) -> None:
    ledger.settled("s", ledger.finished(turn()), keys(1), 1)
    ledger.saved(manifest("s", keys(1)))
    ledger.settled("s", ledger.finished(turn()), keys(1), 1)
    assert ledger.standing("s") == answer("pending", 1)
    ledger.saved(manifest("s", keys(1)))
    assert ledger.standing("s") == answer("durable", 1)


def test_a_session_may_become_shorter(ledger: Ledger) -> None:
    ledger.settled("s", ledger.finished(turn()), keys(1, 2, 3), 3)
    ledger.saved(manifest("s", keys(1, 2, 3)))
    ledger.settled("s", ledger.finished(turn()), keys(1, 9), 2)
    ledger.saved(manifest("s", keys(1, 2, 3)))
    assert ledger.standing("s") == answer("pending", 2)
    ledger.saved(manifest("s", keys(1, 9)))
    assert ledger.standing("s") == answer("durable", 2)


def test_what_was_lost_before_counts_too(ledger: Ledger) -> None:
    assert ledger.remembered(2, 2) == answer("durable", 2)
    assert ledger.remembered(2, 5) == answer("partial", 2)
    assert ledger.remembered(0, 5) == answer("lost", 0)


def test_what_is_forgotten_is_not_known(ledger: Ledger) -> None:
    ledger.settled("s", ledger.finished(turn()), keys(1), 1)
    ledger.forget("s")
    assert ledger.standing("s") is None
    assert ledger.chain("s") is None
    ledger.forget("never heard of")


def test_sessions_do_not_mix(ledger: Ledger) -> None:
    ledger.settled("a", ledger.finished(turn("a")), keys(1), 1)
    assert ledger.finished(turn("b")) == 1
    ledger.saved(manifest("a", keys(1)))
    ledger.saved(manifest("b", keys(1)))
    assert ledger.standing("a") == answer("durable", 1)
    assert ledger.standing("b") == answer("pending", 0)


def test_the_sessions_that_were_used_last_are_remembered_in_so_many_bytes(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STANDING_BYTES", 0)
    monkeypatch.setattr(module, "_REMEMBERED_BYTES", 32 * 8)
    for session in ("a", "b", "c", "a", "d"):
        ledger.settled(session, ledger.finished(turn(session)), keys(1, session), 2)
        ledger.saved(manifest(session, keys(1, session)))
    assert [ledger.standing(session) is not None for session in "abcd"] == [True] * 4
    ledger.settled("e", ledger.finished(turn("e")), keys(1, 2, "e"), 1)
    # It is at three quarters now, without those that were used longest ago.
    assert [ledger.standing(session) is not None for session in "abcde"] == [True, False, False, True, True]
    assert ledger.standing("a") == ledger.standing("d") == answer("durable", 2)


def test_a_session_with_little_takes_its_part_too(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REMEMBERED_BYTES", 20 * module._STANDING_BYTES)
    for session in range(1_000):
        ledger.settled(str(session), ledger.finished(turn(str(session))), [], 0)
        ledger.saved(manifest(str(session), []))
    assert sum(ledger.standing(str(session)) is not None for session in range(1_000)) <= 20
    assert ledger.standing("999") == answer("durable", 0)


def test_what_sql_does_not_know_is_remembered_whatever_it_takes(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a session would be said to be durable with what SQL knew before."""
    monkeypatch.setattr(module, "_REMEMBERED_BYTES", 1)
    for session in range(100):
        ledger.settled(str(session), ledger.finished(turn(str(session))), keys(session), 1)
    assert all(ledger.standing(str(session)) == answer("pending", 1) for session in range(100))
    for session in range(100):
        ledger.saved(manifest(str(session), keys(session)))
    assert [session for session in range(100) if ledger.standing(str(session)) is not None] == []


def test_a_session_takes_no_more_than_its_keys(ledger: Ledger) -> None:
    """10,000 sessions of 128k tokens are not to take 1.5 GB: a page's key has 32 bytes."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for session in range(20):
            ledger.settled(str(session), ledger.finished(turn(str(session))), keys(*range(2_000)), 2_000)
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert taken < 20 * (2_000 * 32 + 2_000)


@pytest.mark.parametrize(("stored", "state"), [(0, "lost"), (1, "partial"), (2, "durable")], ids=str)
def test_a_session_of_an_earlier_process_is_as_durable_as_its_pages(ledger: Ledger, stored: int, state: str) -> None:
    assert ledger.remembered(stored, 2) == answer(state, stored)


def test_what_has_been_evicted_since_is_not_durable() -> None:
    evicted = Ledger(PAGE_SIZE, lambda pages: pages * PAGE_BYTES, stored=lambda chain: min(1, len(chain)))
    evicted.settled("s", evicted.finished(turn()), keys(1, 2), 2)
    evicted.saved(manifest("s", keys(1, 2)))
    assert evicted.standing("s") == answer("partial", 1)


def test_the_chain_of_a_session_is_what_was_stored_of_its_newest_request(ledger: Ledger) -> None:
    assert ledger.chain("s") is None
    number = ledger.finished(turn())
    assert ledger.chain("s") is None
    ledger.settled("s", number, keys(1, 2, 3), 2)
    assert ledger.chain("s") == keys(1, 2)


def test_a_request_of_an_earlier_turn_says_nothing_of_the_session(ledger: Ledger) -> None:
    number = ledger.finished(turn(epoch=2))
    assert number is not None
    ledger.settled("s", number, keys(1, 2), durable=2)
    assert ledger.finished(turn(epoch=1)) is None
    ledger.saved(manifest("s", keys(1, 2)))
    assert ledger.standing("s") == answer("durable", 2)
    assert ledger.finished(turn(epoch=2)) == 2
    assert ledger.finished(turn(epoch=3)) == 3


def test_of_a_session_whose_manifest_is_refused_sql_knows_better(ledger: Ledger) -> None:
    number = ledger.finished(turn(epoch=2))
    assert number is not None
    ledger.settled("s", number, keys(1), durable=1)
    ledger.refused(replace(manifest("s", keys(1)), epoch=1))
    assert ledger.standing("s") == answer("pending", 1)
    ledger.refused(replace(manifest("s", keys(1)), epoch=2))
    assert ledger.standing("s") is None
