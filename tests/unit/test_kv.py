from __future__ import annotations

from dataclasses import replace

from agentstate.engines import Engine
from agentstate.kv import KvOutlook, choose_engine, outlook
from agentstate.manifests import Coverage, KvState

COVERAGE = Coverage("ses_1", "f1", 0, "n1", "eng_1", page_size=64, tokens=640, nbytes=10_000)
ENGINE = Engine("eng_1", "n1", 0, "tcp://127.0.0.1:5000", "http://127.0.0.1:30000/v1", "m", "f1", "/pages")


def look(model: str, coverage: Coverage | None, live: list[Engine]) -> KvOutlook:
    return outlook(model, coverage, choose_engine(model, coverage, live), live)


def test_the_engine_that_has_the_pages_is_preferred_among_those_of_the_model() -> None:
    elsewhere = replace(ENGINE, id="eng_2", node="n2")
    other_weights = replace(ENGINE, id="eng_3", fingerprint="f2")
    assert choose_engine("m", COVERAGE, [elsewhere, other_weights, ENGINE]) == ENGINE
    assert choose_engine("m", COVERAGE, [elsewhere, other_weights]) == elsewhere


def test_the_model_counts_more_than_the_pages() -> None:
    renamed = replace(ENGINE, model="other")
    empty = replace(ENGINE, id="eng_2", node="n2")
    assert choose_engine("m", COVERAGE, [renamed, empty]) == empty
    assert choose_engine("m", COVERAGE, [renamed]) == renamed
    assert choose_engine("m", None, [renamed]) is None


def test_a_restarted_engine_on_the_same_node_has_the_pages() -> None:
    restarted = replace(ENGINE, id="eng_9")
    assert look("m", COVERAGE, [restarted]) == KvOutlook(KvState.DURABLE, 640, True)


def test_without_an_engine_nothing_is_known_of_the_pages() -> None:
    assert look("m", COVERAGE, []) == KvOutlook(KvState.UNKNOWN, 640, False, "no live engine serves 'm'")
    found = look("m", None, [replace(ENGINE, model="b"), replace(ENGINE, model="a")])
    assert found == KvOutlook(KvState.UNKNOWN, 0, False, "no live engine serves 'm', only 'a', 'b'")


def test_a_session_without_pages_has_none_to_restore() -> None:
    found = look("m", None, [ENGINE])
    assert (found.state, found.tokens, found.valid) == (KvState.UNKNOWN, 0, False)


def test_every_reason_why_pages_cannot_be_used_is_named() -> None:
    found = look("m", COVERAGE, [replace(ENGINE, fingerprint="f2")])
    assert (found.state, found.valid) == (KvState.DURABLE, False)
    assert found.invalid_reason == "fingerprint: the pages are of f1, the engine is f2"
    found = look("m", COVERAGE, [replace(ENGINE, node="n2")])
    assert found.invalid_reason == "the pages are on node n1, the engine is on n2"
    found = look("m", COVERAGE, [replace(ENGINE, model="other")])
    assert not found.valid
    assert found.invalid_reason == "the session was created for 'm', the engine serves 'other'"
