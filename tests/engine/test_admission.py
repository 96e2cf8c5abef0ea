"""Room that a waiting request lacks because pages are locked until they are stored: it is looked for again when they
are. With stand-ins for the scheduler and the tree."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from engine_patch.radix_cache import AgentStateRadixCache, _LinkerWrapper


@pytest.fixture
def cache() -> AgentStateRadixCache:
    cache = AgentStateRadixCache.__new__(AgentStateRadixCache)
    cache._recomputing = []
    cache.device_tier = SimpleNamespace(run=lambda scheduler: None)
    tree: Any = SimpleNamespace(
        tree_core=SimpleNamespace(finish_external_linker_offload=lambda *args: None),
        dec_lock_ref=lambda *args: None,
        _all_reduce_attn_groups=lambda *args: None,
    )
    cache.linker = _LinkerWrapper.__new__(_LinkerWrapper)
    cache.linker.cache, cache.linker.unlocked = tree, False
    cache.agentstate = cache.linker.cache_linker = SimpleNamespace(tidy=lambda queued: None, quarantines_pages=False)
    offload = SimpleNamespace(publish_node_ids=[1], lock_node_id=1, lock_params=None)
    cache.linker.pending_offloads = [offload, offload]
    return cache


@pytest.mark.parametrize("stored", [True, False])
def test_a_request_that_found_no_room_is_tried_again_when_pages_are_unlocked(
    cache: AgentStateRadixCache, stored: bool
) -> None:
    batch = SimpleNamespace(batch_is_full=True)
    scheduler: Any = SimpleNamespace(running_batch=batch, waiting_queue=[], is_generation=True)
    cache.linker.commit_completed_offloads([])
    cache.before_next_batch(scheduler)
    assert scheduler.running_batch.batch_is_full
    cache.linker.commit_completed_offloads([stored])
    cache.before_next_batch(scheduler)
    assert not scheduler.running_batch.batch_is_full
    # Once: what is still too large for the room does not hold up every step.
    scheduler.running_batch.batch_is_full = True
    cache.before_next_batch(scheduler)
    assert scheduler.running_batch.batch_is_full


@pytest.mark.parametrize("reads_ahead", [False, True])
def test_a_request_that_is_queued_behind_others_is_matched_to_be_read_ahead(
    cache: AgentStateRadixCache, reads_ahead: bool
) -> None:
    matched: list[Any] = []
    linker: Any = cache.agentstate
    linker.reads_ahead = reads_ahead
    cache.device_tier.brings = lambda req: False
    cache.linker.hit_markers = {}
    req: Any = SimpleNamespace(rid="r", init_next_round_input=lambda tree, cow_mamba: matched.append(tree))
    cache.read_ahead(SimpleNamespace(waiting_queue=["another"], chunked_req=None), req)
    assert matched == ([cache] if reads_ahead else [])


def test_it_is_tried_again_when_pages_that_were_quarantined_come_back(cache: AgentStateRadixCache) -> None:
    scheduler: Any = SimpleNamespace(
        running_batch=SimpleNamespace(batch_is_full=True), waiting_queue=[], is_generation=True
    )
    linker: Any = cache.agentstate
    linker.quarantines_pages, linker.stuck = True, False
    linker.release_quarantine = lambda: setattr(linker, "quarantines_pages", False)
    cache.before_next_batch(scheduler)
    cache.before_next_batch(scheduler)
    assert not scheduler.running_batch.batch_is_full
