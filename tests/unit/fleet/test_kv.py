from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from agentstate.fleet.engines import Engine
from agentstate.fleet.manifests import Coverage, KvState
from agentstate.fleet.placement import KvOutlook, Stored, choose, outlook, servers
from agentstate.pages.node import node_id

COVERAGE = Coverage(
    "ses_1", "f1", 0, "n1", "eng_1", page_size=64, tokens=640, nbytes=10_000, lost_tokens=0, updated_us=5
)
ENGINE = Engine("eng_1", "n1", 0, "tcp://127.0.0.1:5000", "http://n1/v1", "m", "f1", "/pages")
ELSEWHERE = replace(ENGINE, id="eng_2", node="n2", base_url="http://n2/v1")
STORED = Stored([COVERAGE])


def chosen(model: str, stored: Stored, live: list[Engine]) -> str | None:
    server = choose(model, stored, live)
    return None if server is None else server.base_url


def look(model: str, stored: Stored, live: list[Engine]) -> KvOutlook:
    return outlook(model, stored, choose(model, stored, live), live)


def test_the_engine_that_has_the_pages_is_preferred_among_those_of_the_model() -> None:
    other_weights = replace(ENGINE, id="eng_3", fingerprint="f2", base_url="http://n3/v1")
    assert chosen("m", STORED, [ELSEWHERE, other_weights, ENGINE]) == ENGINE.base_url
    assert chosen("m", STORED, [ELSEWHERE, other_weights]) == ELSEWHERE.base_url


def test_a_session_goes_back_to_the_node_that_has_most_of_it() -> None:
    older = replace(COVERAGE, node="n2", tokens=128, updated_us=4)
    stored = Stored([COVERAGE, older])
    assert chosen("m", stored, [ELSEWHERE, ENGINE]) == ENGINE.base_url
    assert look("m", stored, [ELSEWHERE, ENGINE]) == KvOutlook(KvState.DURABLE, 640, True)
    assert look("m", stored, [ELSEWHERE]) == KvOutlook(KvState.PARTIAL, 128, True)


def test_the_model_counts_more_than_the_pages() -> None:
    renamed = replace(ENGINE, model="other")
    assert chosen("m", STORED, [renamed, ELSEWHERE]) == ELSEWHERE.base_url
    assert chosen("m", STORED, [renamed]) == renamed.base_url
    assert chosen("m", Stored(), [renamed]) is None


def test_a_restarted_engine_on_the_same_node_has_the_pages() -> None:
    assert look("m", STORED, [replace(ENGINE, id="eng_9")]) == KvOutlook(KvState.DURABLE, 640, True)


def test_of_a_rank_that_was_restarted_with_other_weights_the_new_self_counts() -> None:
    new, old = replace(ENGINE, id="eng_2", fingerprint="f2"), ENGINE
    (server,) = servers([new, old])
    assert server.ranks == (new,)


def test_a_page_counts_only_where_all_ranks_have_it() -> None:
    second = replace(ENGINE, id="eng_2", rank=1, fingerprint="f1-1")
    more = replace(COVERAGE, rank=1, fingerprint="f1-1", tokens=256, updated_us=6)
    assert look("m", Stored([more, COVERAGE]), [ENGINE, second]) == KvOutlook(KvState.DURABLE, 256, True)
    missing = look("m", STORED, [ENGINE, second])
    assert (missing.state, missing.tokens, missing.valid) == (KvState.LOST, 0, False)
    assert missing.invalid_reason == "rank 1 of the engine has stored no pages"


def test_pages_from_before_a_branch_are_an_upper_bound() -> None:
    assert look("m", Stored([COVERAGE], inherited=True), [ENGINE]) == KvOutlook(
        KvState.PARTIAL, 640, True, upper_bound=True
    )


def test_without_an_engine_nothing_is_known_of_the_pages() -> None:
    assert look("m", STORED, []) == KvOutlook(KvState.UNKNOWN, 640, False, "no live engine serves 'm'")
    found = look("m", Stored(), [replace(ENGINE, model="b"), replace(ELSEWHERE, model="a")])
    assert found == KvOutlook(KvState.UNKNOWN, 0, False, "no live engine serves 'm', only 'a', 'b'")


def test_a_session_without_pages_has_none_to_restore() -> None:
    found = look("m", Stored(), [ENGINE])
    assert (found.state, found.tokens, found.valid) == (KvState.UNKNOWN, 0, False)
    empty = look("m", Stored([replace(COVERAGE, tokens=0)]), [ENGINE])
    assert (empty.state, empty.tokens) == (KvState.LOST, 0)


def test_every_reason_why_pages_cannot_be_used_is_named() -> None:
    found = look("m", STORED, [replace(ENGINE, fingerprint="f2")])
    assert (found.state, found.tokens, found.valid) == (KvState.DURABLE, 640, False)
    assert found.invalid_reason == "fingerprint: the pages are of f1, the engine is f2"
    found = look("m", STORED, [ELSEWHERE])
    assert (found.state, found.tokens, found.valid) == (KvState.LOST, 0, False)
    assert found.invalid_reason == "the pages are on node n1, the engine is on n2"
    found = look("m", STORED, [replace(ENGINE, model="other")])
    assert not found.valid
    assert found.invalid_reason == "the session was created for 'm', the engine serves 'other'"


def test_a_session_of_which_pages_were_lost_is_partial() -> None:
    cut = Stored([replace(COVERAGE, tokens=128, lost_tokens=512)])
    assert look("m", cut, [ENGINE]) == KvOutlook(KvState.PARTIAL, 128, True)
    gone = Stored([replace(COVERAGE, tokens=0, lost_tokens=640)])
    assert look("m", gone, [ENGINE]) == KvOutlook(KvState.LOST, 0, True)


def test_a_container_that_is_restarted_under_another_host_name_has_its_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "pod-7f")
    stored = Stored([replace(COVERAGE, node=node_id(tmp_path))])
    monkeypatch.setattr(socket, "gethostname", lambda: "pod-8a")
    restarted = replace(ENGINE, id="eng_2", node=node_id(tmp_path))
    assert look("m", stored, [restarted]) == KvOutlook(KvState.DURABLE, 640, True)
    # And another directory of the same machine has not.
    beside = replace(ENGINE, id="eng_3", node=node_id(tmp_path / "other"), base_url="http://n3/v1")
    assert not look("m", stored, [beside]).valid
    assert chosen("m", stored, [beside, restarted]) == restarted.base_url
