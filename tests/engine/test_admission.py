"""Room that a waiting request lacks because pages are locked until they are stored: it is looked for again when they
are. With stand-ins for the scheduler and the tree."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest

from engine_patch import plugin
from engine_patch.radix_cache import AgentStateRadixCache, _LinkerWrapper
from engine_patch.served import Served
from engine_patch.sglang_api import AddReqResult


@pytest.fixture
def cache() -> AgentStateRadixCache:
    cache = AgentStateRadixCache.__new__(AgentStateRadixCache)
    cache._recomputing = []
    cache.device_tier = SimpleNamespace(run=lambda scheduler: None, land=lambda: None)
    cache.foresight = SimpleNamespace(step=lambda: None)
    cache.demotions = SimpleNamespace(land=lambda: None, keep_ahead=lambda: None)
    cache.preloads = SimpleNamespace(land=lambda: None)
    begun: list[Any] = []
    cache.deferrals = SimpleNamespace(
        begun=begun,
        on=False,
        shares=False,
        begin=lambda scheduler, entering: begun.append(list(entering)),
        brings=lambda req: False,
        queueing=lambda req: None,
        matched=lambda req, hit: False,
    )
    order: Any = SimpleNamespace(
        on=False,
        queueing=lambda req: None,
        step=lambda queue, policy: None,
        matched=lambda req, device_tokens, restorable: None,
    )
    cache.order = order
    tree: Any = SimpleNamespace(
        tree_core=SimpleNamespace(finish_external_linker_offload=lambda *args: None),
        dec_lock_ref=lambda *args: None,
        _all_reduce_attn_groups=lambda *args: None,
    )
    cache.linker = _LinkerWrapper.__new__(_LinkerWrapper)
    cache.linker.cache, cache.linker.unlocked, cache.linker.entering = tree, False, {}
    cache.linker.shared = False
    cache.agentstate = cache.linker.cache_linker = SimpleNamespace(tidy=lambda queued: None, quarantines_pages=False)
    offload = SimpleNamespace(publish_node_ids=[1], lock_node_id=1, lock_params=None)
    cache.linker.pending_offloads = [offload, offload]
    cache.linker.lost_pages = SimpleNamespace(lost_on=lambda some_rank: None)
    cache.protected_size = lambda: 0
    cache.served = Served()
    return cache


@pytest.mark.parametrize("stored", [True, False])
def test_a_request_that_found_no_room_is_tried_again_when_pages_are_unlocked(
    cache: AgentStateRadixCache, stored: bool
) -> None:
    batch = SimpleNamespace(batch_is_full=True)
    scheduler: Any = SimpleNamespace(
        running_batch=batch, waiting_queue=[], policy=None, is_generation=True, beam_coordinator=None
    )
    cache.before_next_batch(scheduler)
    assert scheduler.running_batch.batch_is_full
    # The last one is that no rank has lost pages.
    cache.linker.commit_completed_offloads([stored, True])
    cache.before_next_batch(scheduler)
    assert not scheduler.running_batch.batch_is_full
    # Once: what is still too large for the room does not hold up every step.
    scheduler.running_batch.batch_is_full = True
    cache.before_next_batch(scheduler)
    assert scheduler.running_batch.batch_is_full


class _Queued(SimpleNamespace):
    """A request with three stored pages after one on the device, each time that it is matched."""

    def __init__(self, cache: Any):
        super().__init__(rid="r", full_untruncated_fill_ids=array("q", range(18)), extra_key=None, cache_salt="salt")
        self.prefix_len = 4
        self.matches = 0
        self._cache = cache

    def init_next_round_input(self, tree: Any, cow_mamba: bool) -> None:
        self.matches += 1
        tail = [bytes([number] * 32).hex() for number in range(3)]
        tree.linker.hit_markers[self.rid] = SimpleNamespace(tail_hashes=tail, device_hit_len=4)


@pytest.fixture
def queued(cache: AgentStateRadixCache) -> _Queued:
    cache.tree_core = SimpleNamespace(page_size=4, is_eagle=False)
    cache.linker.hit_markers = {}
    linker: Any = cache.agentstate
    linker.reads_ahead, linker.read = True, []
    linker.read_ahead = lambda rid, keys: linker.read.append((rid, keys))
    return _Queued(cache)


def queue(*waiting: str, runs: bool = False) -> Any:
    return SimpleNamespace(
        waiting_queue=list(waiting), chunked_req=None, running_batch=SimpleNamespace(is_empty=lambda: not runs)
    )


@pytest.mark.parametrize(
    ("reads_ahead", "preloads", "orders"),
    [(False, False, False), (True, False, False), (False, True, False), (True, True, False), (False, False, True)],
)
def test_a_request_that_is_queued_behind_others_is_matched_once(
    cache: AgentStateRadixCache, queued: _Queued, reads_ahead: bool, preloads: bool, orders: bool
) -> None:
    linker: Any = cache.agentstate
    linker.reads_ahead = reads_ahead
    hits: list[Any] = []
    cache.deferrals.on, cache.order.on = preloads, orders  # type: ignore[misc]
    looked: list[Any] = []
    cache.order.matched = lambda *found: looked.append(found)  # type: ignore[method-assign]
    cache.deferrals.matched = lambda req, hit: hits.append(hit)
    cache.read_ahead(queue(), queued)
    assert queued.matches == 0  # there is nobody before it
    cache.read_ahead(queue("another"), queued)
    assert queued.matches == (reads_ahead or preloads or orders)
    assert looked == [(queued, 4, 3)] * queued.matches
    pages = [bytes([number] * 32) for number in range(3)]
    assert linker.read == ([("r", pages)] if reads_ahead else [])
    # Nothing of it stays.
    assert cache.linker.hit_markers == {}
    for hit in hits:
        assert (list(hit.key.token_ids), hit.key.cache_salt) == (list(range(16)), "salt")
        assert (hit.device_tokens, hit.keys) == (4, pages)


@pytest.mark.parametrize(("long", "runs", "read"), [(True, True, 0), (True, False, 1), (False, True, 1)])
def test_what_is_going_to_be_preloaded_is_not_read_ahead(
    cache: AgentStateRadixCache, queued: _Queued, long: bool, runs: bool, read: int
) -> None:
    linker: Any = cache.agentstate
    cache.deferrals.on, cache.deferrals.matched = True, lambda req, hit: long
    cache.read_ahead(queue("another", runs=runs), queued)
    assert len(linker.read) == read


def test_what_is_on_its_way_to_the_device_is_not_read_ahead(cache: AgentStateRadixCache, queued: _Queued) -> None:
    forgotten: list[Any] = []
    cache.deferrals.brings, cache.deferrals.queueing = lambda req: True, forgotten.append
    cache.read_ahead(queue("another"), queued)
    assert (queued.matches, forgotten) == (0, [queued])


def test_it_is_tried_again_when_pages_that_were_quarantined_come_back(cache: AgentStateRadixCache) -> None:
    scheduler: Any = SimpleNamespace(
        running_batch=SimpleNamespace(batch_is_full=True),
        waiting_queue=[],
        policy=None,
        is_generation=True,
        beam_coordinator=None,
    )
    linker: Any = cache.agentstate
    linker.quarantines_pages, linker.stuck = True, False
    linker.release_quarantine = lambda: setattr(linker, "quarantines_pages", False)
    cache.before_next_batch(scheduler)
    cache.before_next_batch(scheduler)
    assert not scheduler.running_batch.batch_is_full


def test_what_has_just_been_restored_is_told_once(cache: AgentStateRadixCache) -> None:
    scheduler: Any = SimpleNamespace(
        running_batch=SimpleNamespace(batch_is_full=True),
        waiting_queue=[],
        policy=None,
        is_generation=True,
        beam_coordinator=None,
    )
    hit: Any = object()
    cache.linker.entering = {"r": hit}
    cache.before_next_batch(scheduler)
    cache.before_next_batch(scheduler)
    assert cache.deferrals.begun == [[hit], []]  # type: ignore[attr-defined]


@pytest.mark.parametrize("held", [True, False])
def test_a_request_is_admitted_once_what_it_would_drive_out_is_copied(cache: AgentStateRadixCache, held: bool) -> None:
    cache.tree_core = SimpleNamespace(page_size=4)
    asked: list[int] = []
    cache.demotions = SimpleNamespace(holds_up=lambda tokens: asked.append(tokens) or held)
    req: Any = SimpleNamespace(rid="r", full_untruncated_fill_ids=range(100), prefix_len=40)
    adder: Any = SimpleNamespace(tree_cache=cache, can_run_list=[SimpleNamespace(extend_len=30)])

    def original(adder: Any, req: Any) -> Any:
        adder.can_run_list.append(req)
        return AddReqResult.CONTINUE

    found = plugin._around_admission(original, adder, req)
    assert found is (AddReqResult.OTHER if held else AddReqResult.CONTINUE)
    assert (req in adder.can_run_list) is not held
    assert asked == [60 + 30 + 2 * 4], "with those admitted before, each in whole pages"
