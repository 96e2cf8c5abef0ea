from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentstate.fleet.engines import Engine, Phase
from agentstate.fleet.manifests import Coverage, Durability, KvState
from agentstate.fleet.placement import (
    KvOutlook,
    Server,
    Stored,
    beside,
    best,
    choose,
    decoders,
    durable_on,
    named,
    outlook,
    restorable,
    servers,
    source,
    spread,
)
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


def on_node(state: KvState, tokens: int, *rest: Any, **more: Any) -> KvOutlook:
    return KvOutlook(state, tokens, *rest, **more, durable_on=Durability.NODE)


def shared(state: KvState, tokens: int, *rest: Any) -> KvOutlook:
    return KvOutlook(state, tokens, *rest, durable_on=Durability.SHARED)


def test_the_engine_that_has_the_pages_is_preferred_among_those_of_the_model() -> None:
    other_weights = replace(ENGINE, id="eng_3", fingerprint="f2", base_url="http://n3/v1")
    assert chosen("m", STORED, [ELSEWHERE, other_weights, ENGINE]) == ENGINE.base_url
    assert chosen("m", STORED, [ELSEWHERE, other_weights]) == ELSEWHERE.base_url


def test_a_session_goes_back_to_the_node_that_has_most_of_it() -> None:
    older = replace(COVERAGE, node="n2", tokens=128, updated_us=4)
    stored = Stored([COVERAGE, older])
    assert chosen("m", stored, [ELSEWHERE, ENGINE]) == ENGINE.base_url
    assert look("m", stored, [ELSEWHERE, ENGINE]) == on_node(KvState.DURABLE, 640, True)
    assert look("m", stored, [ELSEWHERE]) == on_node(KvState.PARTIAL, 128, True)


def test_the_model_counts_more_than_the_pages() -> None:
    renamed = replace(ENGINE, model="other")
    assert chosen("m", STORED, [renamed, ELSEWHERE]) == ELSEWHERE.base_url
    assert chosen("m", STORED, [renamed]) == renamed.base_url
    assert chosen("m", Stored(), [renamed]) is None


def test_a_session_with_an_adapter_goes_to_an_engine_of_its_model() -> None:
    assert chosen("m:adapter", STORED, [ELSEWHERE, ENGINE]) == ENGINE.base_url
    assert look("m:adapter", STORED, [ENGINE]) == on_node(KvState.DURABLE, 640, True)
    assert chosen("m:an:adapter", Stored(), [ENGINE]) == ENGINE.base_url
    # A name that has a colon is not taken for an adapter where there is an engine of that name.
    tagged = replace(ELSEWHERE, model="m:latest")
    assert chosen("m:latest", STORED, [ENGINE, tagged]) == tagged.base_url
    assert chosen("m:latest:adapter", Stored(), [replace(ENGINE, model="x"), tagged]) == tagged.base_url
    for other in ("mm:adapter", "m-adapter", ":m", "adapter"):
        assert chosen(other, Stored(), [ENGINE]) is None
    renamed = replace(ENGINE, model="other")
    assert "created for 'm:adapter'" in str(look("m:adapter", STORED, [renamed]).invalid_reason)


def test_a_restarted_engine_on_the_same_node_has_the_pages() -> None:
    assert look("m", STORED, [replace(ENGINE, id="eng_9")]) == on_node(KvState.DURABLE, 640, True)


def test_of_a_rank_that_was_restarted_with_other_weights_the_new_self_counts() -> None:
    new, old = replace(ENGINE, id="eng_2", fingerprint="f2"), ENGINE
    (server,) = servers([new, old])
    assert server.ranks == (new,)


def test_a_page_counts_only_where_all_ranks_have_it() -> None:
    second = replace(ENGINE, id="eng_2", rank=1, fingerprint="f1-1")
    more = replace(COVERAGE, rank=1, fingerprint="f1-1", tokens=256, updated_us=6)
    assert look("m", Stored([more, COVERAGE]), [ENGINE, second]) == on_node(KvState.DURABLE, 256, True)
    missing = look("m", STORED, [ENGINE, second])
    assert (missing.state, missing.tokens, missing.valid) == (KvState.LOST, 0, False)
    assert missing.invalid_reason == "rank 1 of the engine has stored no pages"


def test_ranks_that_read_what_another_one_writes_have_what_its_manifest_lists() -> None:
    reader = replace(ENGINE, id="eng_2", rank=1)
    (server,) = servers([ENGINE, reader])
    assert restorable(server, STORED) == 640
    assert look("m", STORED, [ENGINE, reader]) == on_node(KvState.DURABLE, 640, True)
    assert source(reader, STORED) == (COVERAGE, 640)
    everywhere = Stored([replace(COVERAGE, shared_tokens=640)])
    others = [replace(rank, node="n2", shared_store="s3://b") for rank in (ENGINE, reader)]
    assert look("m", everywhere, others) == shared(KvState.DURABLE, 640, True)


DP_RANKS = [
    replace(ENGINE, id=f"eng_{number}{rank}", node=f"n{number}", rank=rank, dp_rank=number, dp_size=2)
    for number in (0, 1)
    for rank in (0, 1)
]


def test_a_dp_rank_has_its_own_pages_and_its_own_ranks() -> None:
    first, second = servers(DP_RANKS)
    assert [first.ranks, second.ranks] == [tuple(DP_RANKS[:2]), tuple(DP_RANKS[2:])]
    assert (first.dp_rank, second.dp_rank) == (0, 1)
    assert servers([ENGINE])[0].dp_rank is None
    assert beside(first, [*DP_RANKS, ELSEWHERE]) == [second]
    assert beside(servers([ENGINE])[0], [ENGINE, ELSEWHERE]) == []
    # The session is on the second one: nothing of it is lost, wherever it began.
    older = replace(COVERAGE, node="n0", tokens=128, updated_us=4)
    for stored in (STORED, Stored([COVERAGE, older])):
        assert choose("m", stored, DP_RANKS) == second
        assert look("m", stored, DP_RANKS) == on_node(KvState.DURABLE, 640, True)
    assert look("m", Stored([COVERAGE, older]), DP_RANKS[:2]) == on_node(KvState.PARTIAL, 128, True)


def test_a_dp_rank_is_named_with_its_engine() -> None:
    first, second = servers(DP_RANKS)
    assert named(ENGINE.base_url, 1, DP_RANKS) == second
    assert named(ENGINE.base_url, 0, DP_RANKS) == first
    assert named(ENGINE.base_url, 2, DP_RANKS) is None
    assert named(ENGINE.base_url, None, [ENGINE]) == Server((ENGINE,))
    # It was restarted without data parallelism.
    assert named(ENGINE.base_url, 1, [ENGINE]) == Server((ENGINE,))


def test_of_a_server_that_was_restarted_with_another_number_of_dp_ranks_the_new_self_counts() -> None:
    assert servers([ENGINE, *DP_RANKS]) == [Server((ENGINE,))]
    assert [server.dp_rank for server in servers([*DP_RANKS, ENGINE])] == [0, 1]


def test_a_session_goes_to_an_engine_that_prefills() -> None:
    """The one that decodes has most of it, and restores nothing."""
    prefills = replace(ENGINE, phase=Phase.PREFILL)
    decodes = replace(ELSEWHERE, phase=Phase.DECODE)
    other_weights = replace(decodes, id="eng_3", node="n3", base_url="http://n3/v1", fingerprint="f2")
    stored = Stored([replace(COVERAGE, node="n2", tokens=1280), COVERAGE])
    live = [decodes, other_weights, prefills]
    assert servers(live) == [Server((prefills,))]
    assert chosen("m", stored, live) == prefills.base_url
    assert named(decodes.base_url, None, live) is None
    assert chosen("m", stored, [decodes]) is None
    assert decoders(Server((prefills,)), live) == [Server((decodes,))]
    assert decoders(Server((ENGINE,)), live) == decoders(None, live) == []


def test_of_a_session_whose_answers_are_in_the_shared_store_all_is_restored_where_prompts_are() -> None:
    prefills = replace(ENGINE, phase=Phase.PREFILL, shared_store="s3://b")
    decodes = replace(ELSEWHERE, phase=Phase.DECODE, shared_store="s3://b")
    answered = replace(COVERAGE, node="n2", tokens=1280, shared_tokens=1280, updated_us=6)
    assert look("m", Stored([answered, COVERAGE]), [decodes, prefills]) == shared(KvState.DURABLE, 1280, True)


def test_sessions_without_pages_are_shared_out_among_dp_ranks() -> None:
    equal = best("m", Stored(), [*DP_RANKS, ELSEWHERE])
    assert [server.dp_rank for server in equal] == [0, 1]
    assert best("m", STORED, DP_RANKS) == equal[1:]
    assert spread(equal, "ses_1", {0: 1, 1: 3}) == equal[0]
    assert spread(equal, "ses_1", {0: 2}) == equal[1]
    alike = [spread(equal, f"ses_{number}", {}) for number in range(100)]
    assert alike == [spread(equal[::-1], f"ses_{number}", {}) for number in range(100)]
    assert 30 < alike.count(equal[0]) < 70
    assert spread([], "ses_1", {}) is None


def test_pages_from_before_a_branch_are_an_upper_bound() -> None:
    assert look("m", Stored([COVERAGE], inherited=True), [ENGINE]) == on_node(
        KvState.PARTIAL, 640, True, upper_bound=True
    )


def test_without_an_engine_nothing_is_known_of_the_pages() -> None:
    assert look("m", STORED, []) == on_node(KvState.UNKNOWN, 640, False, "no live engine serves 'm'")
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
    assert look("m", cut, [ENGINE]) == on_node(KvState.PARTIAL, 128, True)
    gone = Stored([replace(COVERAGE, tokens=0, lost_tokens=640)])
    assert look("m", gone, [ENGINE]) == KvOutlook(KvState.LOST, 0, True)


def test_a_container_that_is_restarted_under_another_host_name_has_its_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "pod-7f")
    stored = Stored([replace(COVERAGE, node=node_id(tmp_path))])
    monkeypatch.setattr(socket, "gethostname", lambda: "pod-8a")
    restarted = replace(ENGINE, id="eng_2", node=node_id(tmp_path))
    assert look("m", stored, [restarted]) == on_node(KvState.DURABLE, 640, True)
    # And another directory of the same machine has not.
    beside = replace(ENGINE, id="eng_3", node=node_id(tmp_path / "other"), base_url="http://n3/v1")
    assert not look("m", stored, [beside]).valid
    assert chosen("m", stored, [beside, restarted]) == restarted.base_url


STORE = "s3://bucket/agents"
SHARING, SHARING_ELSEWHERE = replace(ENGINE, shared_store=STORE), replace(ELSEWHERE, shared_store=STORE)
SHARED = replace(COVERAGE, shared_tokens=640)


def server(*ranks: Engine) -> Server:
    return Server(ranks)


def test_what_is_in_the_shared_store_is_restored_by_every_engine_that_uses_it() -> None:
    """As if the node that stored it had died."""
    stored = Stored([SHARED])
    assert look("m", stored, [SHARING_ELSEWHERE]) == shared(KvState.DURABLE, 640, True)
    assert look("m", stored, [SHARING_ELSEWHERE, SHARING]) == shared(KvState.DURABLE, 640, True)
    assert look("m", Stored([SHARED], inherited=True), [SHARING_ELSEWHERE]) == KvOutlook(
        KvState.PARTIAL, 640, True, None, True, Durability.SHARED
    )


def test_an_engine_that_does_not_use_the_shared_store_has_nothing_of_it() -> None:
    found = look("m", Stored([SHARED]), [ELSEWHERE])
    assert (found.state, found.tokens, found.valid, found.durable_on) == (KvState.LOST, 0, False, None)
    assert found.invalid_reason == (
        "the pages are on node n1 and in a shared store that the engine does not use, the engine is on n2"
    )


def test_what_is_not_in_the_shared_store_is_on_its_node_alone() -> None:
    found = look("m", STORED, [SHARING_ELSEWHERE])
    assert (found.state, found.tokens, found.valid, found.durable_on) == (KvState.LOST, 0, False, None)
    assert found.invalid_reason == "the pages are on node n1 and not in the shared store, the engine is on n2"


def test_of_a_session_that_is_shared_in_part_so_much_is_restored_elsewhere() -> None:
    stored = Stored([replace(COVERAGE, shared_tokens=256)])
    assert look("m", stored, [SHARING_ELSEWHERE]) == shared(KvState.PARTIAL, 256, True)
    assert look("m", stored, [SHARING_ELSEWHERE, SHARING]) == on_node(KvState.DURABLE, 640, True)


def test_a_rank_restores_from_its_node_or_from_the_shared_store_whichever_has_more() -> None:
    own = replace(COVERAGE, node="n2", tokens=128, updated_us=4)
    for mine, theirs, right in ((128, 64, 128), (128, 256, 256), (0, 256, 256)):
        stored = Stored([replace(COVERAGE, shared_tokens=theirs), replace(own, tokens=mine)])
        assert restorable(server(SHARING_ELSEWHERE), stored) == right
        assert restorable(server(ELSEWHERE), stored) == mine
        found = source(SHARING_ELSEWHERE, stored)
        assert found is not None
        assert (found[0].node, found[1]) == ("n2" if mine >= theirs else "n1", right)
    assert source(ELSEWHERE, Stored([COVERAGE])) is None
    assert source(SHARING_ELSEWHERE, Stored([COVERAGE])) is None
    assert source(ELSEWHERE, Stored([replace(own, tokens=0)])) is None


def test_of_several_nodes_the_one_that_has_shared_most_counts() -> None:
    less, most = replace(COVERAGE, shared_tokens=64), replace(COVERAGE, node="n3", shared_tokens=576, updated_us=3)
    stored = Stored([less, most])
    assert restorable(server(SHARING_ELSEWHERE), stored) == 576
    found = source(SHARING_ELSEWHERE, stored)
    assert found is not None
    assert found == (most, 576)
    # Yet it may be of another history than the newest: not all of that is known to be there.
    assert look("m", stored, [SHARING_ELSEWHERE]) == on_node(KvState.PARTIAL, 576, True)


def test_another_fingerprint_has_shared_nothing_for_an_engine() -> None:
    found = look("m", Stored([SHARED]), [replace(SHARING_ELSEWHERE, fingerprint="f2")])
    assert (found.tokens, found.valid, found.durable_on) == (640, False, Durability.SHARED)
    assert found.invalid_reason == "fingerprint: the pages are of f1, the engine is f2"
    assert restorable(server(replace(SHARING_ELSEWHERE, fingerprint="f2")), Stored([SHARED])) == 0


def test_where_all_can_restore_as_much_the_engine_whose_node_has_it_is_preferred() -> None:
    stored = Stored([SHARED])
    for live in ([SHARING, SHARING_ELSEWHERE], [SHARING_ELSEWHERE, SHARING]):
        assert choose("m", stored, live, SHARING_ELSEWHERE.base_url) == server(SHARING)
    # Where no node has it, the one that was asked for, else the first.
    others = [SHARING_ELSEWHERE, replace(SHARING, node="n3")]
    assert choose("m", stored, others) == server(others[0])
    assert choose("m", stored, others, others[1].base_url) == server(others[1])
    without = replace(ELSEWHERE, base_url="http://n3/v1")
    assert choose("m", stored, [without, SHARING_ELSEWHERE]) == server(SHARING_ELSEWHERE)


BESIDE = replace(ELSEWHERE, reads=frozenset({"n1"}))
SHARING_BESIDE = replace(BESIDE, shared_store=STORE)


def test_what_another_node_of_its_machine_has_is_restored_by_an_engine_that_reads_it() -> None:
    assert look("m", STORED, [BESIDE]) == on_node(KvState.DURABLE, 640, True)
    assert look("m", STORED, [replace(BESIDE, reads=frozenset({"n3"}))]).state is KvState.LOST
    assert look("m", STORED, [replace(BESIDE, fingerprint="f2")]).tokens == 640
    assert restorable(server(replace(BESIDE, fingerprint="f2")), STORED) == 0
    assert source(BESIDE, STORED) == (COVERAGE, 640)
    older = replace(COVERAGE, node="n3", tokens=128, updated_us=4)
    found = look("m", Stored([COVERAGE, older]), [replace(ELSEWHERE, reads=frozenset({"n3"}))])
    assert found == on_node(KvState.PARTIAL, 128, True)


def test_all_ranks_must_read_it() -> None:
    second = replace(BESIDE, id="eng_3", rank=1, fingerprint="f1-1")
    of_second = replace(COVERAGE, rank=1, fingerprint="f1-1", tokens=256)
    assert look("m", Stored([COVERAGE, of_second]), [BESIDE, second]) == on_node(KvState.DURABLE, 256, True)
    found = look("m", Stored([COVERAGE, of_second]), [BESIDE, replace(second, reads=frozenset())])
    assert (found.state, found.tokens, found.valid) == (KvState.LOST, 0, False)


def test_of_what_a_rank_can_restore_that_of_its_own_node_is_meant_and_then_that_of_its_machine() -> None:
    for own, beside_it, in_store, node in (
        (640, 640, 640, "n2"),
        (576, 640, 640, "n1"),
        (576, 576, 640, "n3"),
        (0, 64, 64, "n1"),
    ):
        stored = Stored(
            [
                replace(COVERAGE, node="n3", shared_tokens=in_store),
                replace(COVERAGE, tokens=beside_it),
                replace(COVERAGE, node="n2", tokens=own),
            ]
        )
        found = source(SHARING_BESIDE, stored)
        assert found is not None
        assert (found[0].node, found[1]) == (node, max(own, beside_it, in_store))
        assert restorable(server(SHARING_BESIDE), stored) == max(own, beside_it, in_store)


def test_an_engine_whose_machine_has_it_is_preferred_to_one_that_must_read_the_shared_store() -> None:
    stored = Stored([SHARED])
    far = replace(SHARING_ELSEWHERE, node="n3", base_url="http://n3/v1")
    for live in ([SHARING_BESIDE, far], [far, SHARING_BESIDE]):
        assert choose("m", stored, live, far.base_url) == server(SHARING_BESIDE)
        assert choose("m", stored, [SHARING, *live], far.base_url) == server(SHARING), "it has it itself"
    # More of it counts more than nearer.
    less = Stored([replace(COVERAGE, node="n5", shared_tokens=640), replace(COVERAGE, tokens=576)])
    assert choose("m", less, [BESIDE, far]) == server(far)
    # Of nodes that have a part, the machine counts that has more.
    parts = Stored([SHARED, replace(COVERAGE, node="n3", tokens=576)])
    assert choose("m", parts, [far, SHARING_BESIDE]) == server(SHARING_BESIDE)


def test_all_ranks_must_have_it_shared_each_for_itself() -> None:
    second = replace(SHARING_ELSEWHERE, id="eng_3", rank=1, fingerprint="f1-1")
    of_second = replace(SHARED, rank=1, fingerprint="f1-1")
    live = [SHARING_ELSEWHERE, second]
    assert look("m", Stored([SHARED, of_second]), live) == shared(KvState.DURABLE, 640, True)
    assert look("m", Stored([SHARED, replace(of_second, shared_tokens=128)]), live) == shared(
        KvState.PARTIAL, 128, True
    )
    found = look("m", Stored([SHARED, replace(of_second, shared_tokens=0)]), live)
    assert (found.state, found.tokens, found.valid, found.durable_on) == (KvState.LOST, 0, False, None)
    assert found.invalid_reason == "the pages are on node n1 and not in the shared store, the engine is on n2"
    found = look("m", Stored([SHARED]), live)
    assert found.invalid_reason == "rank 1 of the engine has stored no pages"
    # A rank that does not use the store counts like any other.
    found = look("m", Stored([SHARED, of_second]), [SHARING_ELSEWHERE, replace(second, shared_store="")])
    assert (found.tokens, found.valid) == (0, False)


def test_what_was_lost_on_all_nodes_makes_a_session_partial_elsewhere_too() -> None:
    stored = Stored([replace(COVERAGE, tokens=256, lost_tokens=384, shared_tokens=256)])
    assert look("m", stored, [SHARING_ELSEWHERE]) == shared(KvState.PARTIAL, 256, True)


def test_a_session_that_went_on_with_other_weights_is_partial_with_the_former_ones() -> None:
    other = replace(COVERAGE, fingerprint="f2", node="n4", shared_tokens=640, updated_us=9)
    assert look("m", Stored([other, SHARED]), [SHARING_ELSEWHERE]) == shared(KvState.PARTIAL, 640, True)


@pytest.mark.parametrize(
    ("coverage", "on"),
    [
        ([], None),
        ([replace(COVERAGE, tokens=0)], None),
        ([COVERAGE], Durability.NODE),
        ([replace(COVERAGE, shared_tokens=576)], Durability.NODE),
        ([SHARED], Durability.SHARED),
        ([SHARED, replace(COVERAGE, rank=1, fingerprint="f1-1")], Durability.NODE),
        ([SHARED, replace(COVERAGE, node="n2", updated_us=4)], Durability.SHARED),
        ([COVERAGE, replace(SHARED, node="n2", updated_us=4)], Durability.NODE),
    ],
)
def test_without_an_engine_it_is_durable_where_it_was_stored_last(
    coverage: list[Coverage], on: Durability | None
) -> None:
    assert durable_on(None, Stored(coverage)) is on
    assert outlook("m", Stored(coverage), None, []).durable_on is on
