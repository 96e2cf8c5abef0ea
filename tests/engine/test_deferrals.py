"""Which queued requests are deferred, what is preloaded for them, and what becomes of both, with stand-ins for the
scheduler, the tree and its memory."""

from __future__ import annotations

import time
from array import array
from typing import Any

import pytest
from tree import PAGE_SIZE, Stage, key_of, pages_of, request, running_request, scheduler

from agentstate.pages import DEMAND, PLANNED
from engine_patch.sessions import Progress
from engine_patch.sglang_api import ComponentType, PoolName, RadixKey

LONG = 40  # tokens of a restore that is long on these stages: ten pages


@pytest.fixture
def stage() -> Stage:
    """What is stored is ``LONG`` and longer contexts; four pages are long."""
    stage = Stage(preload_bytes=4)
    for seed in range(5):
        stage.store(key_of(LONG, seed))
    return stage


def long_request(rid: str = "long", seed: int = 0) -> Any:
    return request(key_of(LONG + 3, seed), rid)


def test_a_long_restore_is_preloaded_beside_running_requests(stage: Stage) -> None:
    req = long_request()
    engine = scheduler(running_request(), waiting=[req])
    assert stage.step(engine) == []
    assert engine.waiting_queue == [req]
    assert stage.linker.preload_stats.deferred == 1
    assert stage.linker.loads == [pages_of(key_of(LONG))]
    assert stage.step(engine) == []  # it is on its way, and nothing is begun again
    assert len(stage.linker.loads) == 1
    stage.linker.has_landed = True
    assert stage.step(engine) == ["long"]
    (inserted,) = stage.cache.inserted
    assert list(inserted.key.token_ids) == list(key_of(LONG).token_ids)
    # It says what is from storage, although it finds it on the device.
    assert (req.storage_hit_start, req.storage_hit_length) == (0, LONG)
    stats = stage.linker.preload_stats
    assert (stats.requests, stats.preloads, stats.pages, stats.failed, stats.under_way) == (1, 1, 10, 0, 0)
    assert stats.deferred == 0
    engine.waiting_queue = []
    stage.step(engine)
    assert stage.left == (0, 0, 0)


@pytest.mark.parametrize(
    ("preload_bytes", "runs", "stored", "beside"),
    [(4, False, LONG, ()), (4, True, 3 * PAGE_SIZE, ()), (0, True, LONG, ()), (4, True, LONG, (ComponentType.MAMBA,))],
    ids=["an idle engine", "a short restore", "turned off", "a state beside"],
)
def test_other_restores_are_admitted_at_once(
    preload_bytes: int, runs: bool, stored: int, beside: tuple[ComponentType, ...]
) -> None:
    stage = Stage()
    stage.cache.components.update(beside)
    stage.linker.preload_bytes = preload_bytes
    stage.deferrals = stage.new_deferrals()
    stage.store(key_of(stored))
    engine = scheduler(*([running_request()] if runs else []), waiting=[long_request()])
    assert stage.step(engine) == ["long"]
    assert stage.linker.loads == []


def test_a_request_is_matched_once(stage: Stage) -> None:
    """A match costs what its prompt is long."""
    engine = scheduler(running_request(), waiting=[request(key_of(9, seed=9), "short"), long_request()])
    for _ in range(3):
        stage.step(engine)
    assert stage.matched == ["short", "long"]
    # One that is matched when it is queued is not matched again.
    req = long_request("other", seed=1)
    assert stage.deferrals.matched(req, stage.match(req))
    engine.waiting_queue.append(req)
    assert stage.step(engine) == ["short"]
    assert stage.matched == ["short", "long", "other"]


def test_a_tree_that_has_changed_since_the_match_is_matched_again(stage: Stage) -> None:
    req = long_request()
    stage.deferrals.matched(req, stage.match(req))
    stage.cache.insert(type("Inserted", (), {"key": key_of(8)}))
    engine = scheduler(running_request(), waiting=[req])
    assert stage.step(engine) == []
    assert stage.linker.loads == [pages_of(key_of(LONG))[2:]]
    stage.linker.has_landed = True
    stage.step(engine)
    assert (req.storage_hit_start, req.storage_hit_length) == (8, LONG - 8)


def test_the_order_of_the_queue_is_kept(stage: Stage) -> None:
    first, second, third = (request(key_of(9, seed=seed), str(seed)) for seed in (7, 8, 9))
    deferred = long_request()
    engine = scheduler(running_request(), waiting=[first, deferred, second, third])
    stage.step(engine)
    with stage.deferrals.deferring(engine):
        assert engine.waiting_queue == [first, second, third]
        new = request(key_of(8), "new")
        engine.waiting_queue = [second, new, third]  # one was admitted, one came, two were sorted
    assert engine.waiting_queue == [deferred, second, third, new]


def test_requests_that_begin_alike_share_a_preload(stage: Stage) -> None:
    longer = key_of(LONG + 5 * PAGE_SIZE)
    stage.store(longer)
    fork = RadixKey(key_of(LONG).token_ids + array("q", range(7000, 7000 + 6 * PAGE_SIZE)))
    stage.store(fork)
    reqs = [
        request(key_of(len(longer) + 3), "first"),
        request(key_of(len(longer) + 2), "same"),
        request(RadixKey(fork.token_ids + array("q", [1])), "fork"),
    ]
    # Of what these share with it, less is long by itself.
    reqs += [request(RadixKey(key_of(3 * PAGE_SIZE).token_ids + array("q", [1] * 9)), "system prompt alone")]
    engine = scheduler(running_request(), waiting=reqs)
    assert stage.step(engine) == ["system prompt alone"]
    assert stage.linker.loads == [pages_of(longer)]
    stage.linker.landed_batches = {1}
    # What the fork still misses is long, too.
    assert stage.step(engine) == ["first", "same", "system prompt alone"]
    assert stage.linker.loads == [pages_of(longer), pages_of(fork)[10:]]
    stage.linker.landed_batches = {1, 2}
    assert stage.step(engine) == ["first", "same", "fork", "system prompt alone"]
    assert (reqs[2].storage_hit_start, reqs[2].storage_hit_length) == (0, len(fork))
    assert stage.linker.preload_stats.requests == 4


def test_with_windows_no_preload_is_joined_that_ends_elsewhere(stage: Stage) -> None:
    stage.linker.window_pages = 2
    longer = key_of(LONG + 5 * PAGE_SIZE)
    fork = RadixKey(key_of(LONG).token_ids + array("q", range(7000, 7000 + 6 * PAGE_SIZE)))
    for key in (longer, fork):
        stage.store(key)
    reqs = [
        request(key_of(len(longer) + 3), "first"),
        request(key_of(len(longer) + 2), "same"),
        request(RadixKey(fork.token_ids + array("q", [1])), "fork"),
    ]
    assert stage.step(scheduler(running_request(), waiting=reqs)) == []
    assert stage.linker.loads == [pages_of(longer), pages_of(fork)]


@pytest.mark.parametrize("preload_bytes", [0, 4])
def test_what_another_request_has_just_restored_is_not_read_again(preload_bytes: int) -> None:
    """A batch is made before the pages of the one before are in the tree."""
    stage = Stage(preload_bytes=preload_bytes)
    little = RadixKey(key_of(12).token_ids + array("q", range(7000, 7040)))
    for key in (key_of(LONG), little):
        stage.store(key)
    hit = stage.match(long_request("first"))
    assert hit is not None
    fork = request(RadixKey(key_of(LONG).token_ids + array("q", [7000] * 9)), "fork")
    others = [request(key_of(9, 8), "other")]
    if not preload_bytes:
        # Most of this one is its own.
        others.append(request(RadixKey(little.token_ids + array("q", [1])), "little"))
    seen = [req.rid for req in others]
    engine = scheduler(running_request(), waiting=[fork, *others])
    assert stage.step(engine, hit) == seen
    stage.cache.insert(type("Inserted", (), {"key": key_of(LONG)}))
    assert stage.step(engine) == ["fork", *seen]
    assert stage.linker.loads == []
    assert (stage.linker.preload_stats.followed, stage.linker.preload_stats.deferred) == (1, 0)


def test_what_another_request_has_restored_is_waited_for_one_step(stage: Stage) -> None:
    """It may have left without its pages."""
    hit = stage.match(long_request("first"))
    engine = scheduler(running_request(), waiting=[long_request("fork")])
    assert hit is not None
    assert stage.step(engine, hit) == []
    assert stage.linker.loads == []
    assert stage.step(engine) == []
    assert stage.linker.loads == [pages_of(key_of(LONG))]


@pytest.mark.parametrize(
    ("other", "joins"),
    [
        ({"cache_salt": "another"}, False),
        ({"extra_key": "another"}, False),
        ({}, True),
    ],
)
def test_what_a_request_joins_is_its_own(stage: Stage, other: dict[str, str], joins: bool) -> None:
    stage.tier.remember("s", key_of(16))
    stage.tier.prefetch("s", pages_of(key_of(16)))
    engine = scheduler(waiting=[request(key_of(21, **other), "like it"), request(key_of(12), "shorter")])
    assert stage.step(engine) == (["shorter"] if joins else ["like it", "shorter"])
    # A request that waits for it makes it urgent.
    assert stage.linker.needs == [DEMAND if joins else PLANNED]
    # What a session was prefetched for is on the device for its request.
    stage.linker.has_landed = True
    stage.step(engine)
    assert engine.waiting_queue[0].storage_hit_length == 0
    assert stage.linker.preload_stats.requests == 0


def test_a_retracted_request_is_deferred_for_what_it_has_answered_too(stage: Stage) -> None:
    req = request(key_of(LONG - 8), "retracted", output_ids=key_of(LONG + 3).token_ids[LONG - 8 :])
    joining = request(key_of(LONG + 2), "joining")
    engine = scheduler(running_request(), waiting=[req])
    assert stage.step(engine) == []
    assert stage.linker.loads == [pages_of(key_of(LONG))]
    engine.waiting_queue.append(joining)
    assert stage.step(engine) == []
    # Queued again meanwhile, it is looked at anew, and joins what was begun for it.
    stage.deferrals.queueing(req)
    assert stage.step(engine) == []
    assert len(stage.linker.loads) == 1


def test_an_aborted_request_leaves_its_pages_to_others(stage: Stage) -> None:
    engine = scheduler(running_request(), waiting=[long_request()])
    stage.step(engine)
    engine.waiting_queue = []
    stage.step(engine)
    assert stage.left == (1, 1, 0)
    engine.waiting_queue = [long_request("again")]
    assert stage.step(engine) == []
    assert len(stage.linker.loads) == 1
    stage.linker.has_landed = True
    assert stage.step(engine) == ["again"]
    engine.waiting_queue = []
    stage.step(engine)
    assert stage.left == (0, 0, 0)


def test_a_request_whose_preloads_fail_is_admitted_as_it_is(stage: Stage) -> None:
    free = stage.cache.token_to_kv_pool_allocator.free_slots
    req = long_request()
    engine = scheduler(running_request(), waiting=[req])
    stage.linker.failed_batches = {1, 2}
    stage.linker.landed_batches = {1, 2}
    # After a page of it has failed, what is before it may still be long; but it is not deferred for ever.
    assert stage.step(engine) == []
    assert stage.step(engine) == []
    assert stage.step(engine) == ["long"]
    assert len(stage.linker.loads) == 2
    assert stage.cache.token_to_kv_pool_allocator.free_slots == free
    assert stage.cache.inserted == []
    assert req.storage_hit_length == 0
    assert (stage.linker.preload_stats.failed, stage.linker.preload_stats.requests) == (2, 0)
    assert stage.cache.locks == 0


def test_a_rank_that_cannot_begin_says_so_when_the_ranks_agree(stage: Stage) -> None:
    free = stage.cache.token_to_kv_pool_allocator.free_slots
    stage.linker.breaks = True
    engine = scheduler(running_request(), waiting=[long_request()])
    assert stage.step(engine) == []
    assert stage.step(engine) == []
    assert stage.step(engine) == ["long"]
    assert (stage.cache.token_to_kv_pool_allocator.free_slots, stage.cache.locks) == (free, 0)


@pytest.mark.parametrize("late", ["here", "elsewhere"])
def test_a_drive_that_does_not_answer_is_waited_for_by_nobody(
    stage: Stage, late: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = scheduler(running_request(), waiting=[long_request()])
    stage.step(engine)
    now = time.monotonic()
    # A layer arrives now and then: that is a slow drive.
    for layer in range(1, 4):
        monkeypatch.setattr(time, "monotonic", lambda at=now + 50 * layer: at)
        stage.linker.layers = layer
        assert stage.step(engine) == []
    stage.linker.writing = late == "here"
    if late == "here":
        monkeypatch.setattr(time, "monotonic", lambda: now + 211)
    else:
        stage.other = lambda own: [False] * len(own)
    stage.stored.clear()  # what is stored is not found any more while the drive does not answer
    assert stage.step(engine) == ["long"]
    assert stage.linker.abandoned == [1]
    # Some rank's drive may still write to its pages: all ranks keep theirs from others.
    assert [len(slots[PoolName.KV]) for slots in stage.linker.quarantined] == [LONG]
    assert stage.cache.inserted == []
    assert stage.cache.locks == 0


def test_a_preload_that_waits_for_others_is_not_abandoned(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long these take: the drive answers."""
    engine = scheduler(running_request(), waiting=[long_request()])
    stage.step(engine)
    now = time.monotonic()
    stage.linker.waiting = {1}
    for later in range(50, 201, 50):
        monkeypatch.setattr(time, "monotonic", lambda at=now + later: at)
        assert stage.step(engine) == []
    # Its own time begins when it does.
    stage.linker.waiting = set()
    monkeypatch.setattr(time, "monotonic", lambda: now + 200 + 59)
    assert stage.step(engine) == []
    assert stage.linker.abandoned == []
    monkeypatch.setattr(time, "monotonic", lambda: now + 200 + 61)
    stage.stored.clear()
    assert stage.step(engine) == ["long"]
    assert stage.linker.abandoned == [1]


def test_a_preload_is_used_once_it_has_arrived_on_all_ranks(stage: Stage) -> None:
    engine = scheduler(running_request(), waiting=[long_request()])
    stage.step(engine)
    assert stage.agreements == 0  # nothing is under way: nothing to agree on
    stage.linker.has_landed = True
    stage.other = lambda own: [False, True]
    assert stage.step(engine) == []
    assert (stage.cache.inserted, stage.linker.abandoned) == ([], [])
    stage.other = lambda own: [True, True]
    assert stage.step(engine) == ["long"]
    assert len(stage.cache.inserted) == 1


def test_a_rank_whose_pages_are_there_waits_for_the_others(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = scheduler(running_request(), waiting=[long_request()])
    stage.step(engine)
    stage.linker.has_landed = True
    stage.other = lambda own: [False, True]
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 1000)
    assert stage.step(engine) == []
    assert stage.linker.abandoned == []


def test_a_preload_that_failed_on_another_rank_is_used_on_none(stage: Stage) -> None:
    free = stage.cache.token_to_kv_pool_allocator.free_slots
    engine = scheduler(running_request(), waiting=[long_request()])
    stage.step(engine)
    stage.linker.landed_batches = {1}
    answers = iter([[True, True], [False, True]])
    stage.other = lambda own: next(answers)
    stage.step(engine)
    assert stage.cache.inserted == []
    assert stage.cache.token_to_kv_pool_allocator.free_slots == free - LONG  # the second attempt's
    assert stage.linker.quarantined == []


def test_what_arrives_after_the_weights_were_replaced_is_not_used(stage: Stage) -> None:
    engine = scheduler(running_request(), waiting=[long_request()])
    stage.step(engine)
    stage.linker.has_landed = stage.linker.retired = True
    stage.stored.clear()
    assert stage.step(engine) == ["long"]
    assert stage.cache.inserted == []


@pytest.mark.parametrize(
    ("free", "evictable", "left"),
    # Running requests may need 14 tokens, the request 43 and 8 more. ``left`` may be evicted afterwards.
    [(65, 0, 0), (25, 40, 25), (64, 0, None), (25, 39, None)],
)
def test_memory_is_left_to_those_that_run_and_to_the_request(free: int, evictable: int, left: int | None) -> None:
    begins = left is not None
    stage = Stage(free, evictable, preload_bytes=4)
    stage.store(key_of(LONG))
    engine = scheduler(running_request(), waiting=[long_request()])
    for _ in range(2):
        assert stage.step(engine) == ([] if begins else ["long"])
    assert len(stage.linker.loads) == begins
    # What finds no memory is read ahead as ever, which is begun once.
    assert stage.linker.read == ([] if begins else ["long"])
    assert (stage.cache.evictable, stage.cache.locks) == (left if begins else evictable, begins)


def test_memory_that_cannot_be_had_yet_is_waited_for_and_nothing_is_read_meanwhile(stage: Stage) -> None:
    stage.store(key_of(LONG))
    engine = scheduler(running_request(), waiting=[long_request()])
    stage.held_up = True
    assert stage.step(engine) == ["long"] and stage.linker.loads == stage.linker.read == []
    stage.held_up = False
    assert stage.step(engine) == [] and len(stage.linker.loads) == 1


def test_memory_is_left_to_those_that_came_before(stage: Stage) -> None:
    first = request(key_of(400, seed=9), "first")
    engine = scheduler(running_request(), waiting=[first, long_request()])
    allocator = stage.cache.token_to_kv_pool_allocator
    allocator.free_slots = 14 + 408 + LONG + 11 - 1
    assert stage.step(engine) == ["first", "long"]
    allocator.free_slots += 1
    assert stage.step(engine) == ["first"]
    # Behind one that finds no memory nobody gets any, though it be enough for him.
    second, third = request(key_of(200, seed=8), "second"), long_request("third", seed=1)
    stage.store(key_of(196, seed=8))
    engine.waiting_queue += [second, third]
    allocator.free_slots = 14 + 408 + 11 + 200
    assert stage.step(engine) == ["first", "second", "third"]


def test_a_cleared_device_ends_all_preloads(stage: Stage) -> None:
    stage.tier.remember("s", key_of(16, seed=1))
    progress = stage.tier.prefetch("s", pages_of(key_of(16, seed=1)))
    req = long_request()
    engine = scheduler(running_request(), waiting=[req])
    stage.step(engine)
    assert progress is not None
    assert (len(stage.preloads), progress()) == (2, Progress.RUNNING)
    stage.preloads.drop()
    stage.deferrals.forget()
    assert (len(stage.preloads), progress(), stage.linker.preload_stats.under_way) == (0, Progress.FAILED, 0)
    with stage.deferrals.deferring(engine):
        assert engine.waiting_queue == [req]


def test_a_request_that_has_been_deferred_goes_on_when_nothing_runs_any_more(stage: Stage) -> None:
    """What was begun is gone on with; what has not been begun is restored layer by layer."""
    engine = scheduler(running_request(), waiting=[long_request()])
    stage.step(engine)
    engine.running_batch = None
    engine.waiting_queue.append(long_request("later", seed=1))
    assert stage.step(engine) == ["later"]
    stage.linker.has_landed = True
    assert stage.step(engine) == ["long", "later"]


@pytest.mark.parametrize("place", ["running_batch", "last_batch", "chunked_req"])
@pytest.mark.parametrize("ended", [False, True])
def test_what_runs(stage: Stage, place: str, ended: bool) -> None:
    run: Any = running_request()
    run.finished = lambda: ended
    engine = scheduler(waiting=[long_request()])
    setattr(engine, place, run if place == "chunked_req" else type("Batch", (), {"reqs": [run]}))
    assert stage.step(engine) == (["long"] if ended else [])


# What only a shared store has


@pytest.fixture
def sharing(stage: Stage) -> Stage:
    """Three pages, which are not long, and as many as of a long restore are in the shared store."""
    stage.linker.shares = True
    for key in (key_of(3 * PAGE_SIZE, seed=7), key_of(LONG, seed=8)):
        stage.store(key)
        stage.shared.update(pages_of(key))
    return stage


@pytest.mark.parametrize(("tokens", "seed"), [(3 * PAGE_SIZE, 7), (LONG, 8)], ids=["short", "long"])
@pytest.mark.parametrize("runs", [False, True])
def test_what_the_shared_store_has_is_preloaded_whatever_runs(
    sharing: Stage, tokens: int, seed: int, runs: bool
) -> None:
    req = request(key_of(tokens + 3, seed), "shared")
    engine = scheduler(*([running_request()] if runs else []), waiting=[req])
    assert sharing.step(engine) == []
    assert sharing.linker.loads == [pages_of(key_of(tokens, seed))]
    assert sharing.step(engine) == []
    sharing.linker.has_landed = True
    assert sharing.step(engine) == ["shared"]
    assert (req.storage_hit_start, req.storage_hit_length) == (0, tokens)
    engine.waiting_queue = []
    sharing.step(engine)
    assert sharing.left == (0, 0, 0)


def test_others_are_not_deferred_on_an_idle_engine_that_shares(sharing: Stage) -> None:
    engine = scheduler(waiting=[long_request(), request(key_of(LONG + 3, seed=8), "shared")])
    assert sharing.step(engine) == ["long"]
    assert len(sharing.linker.loads) == 1
    # Once something runs, they are.
    engine = scheduler(running_request(), waiting=[long_request("another", seed=1)])
    assert sharing.step(engine) == []


def test_what_is_partly_in_the_shared_store_is_deferred(sharing: Stage) -> None:
    whole = key_of(LONG, seed=3)
    sharing.shared.add(pages_of(whole)[-1])
    engine = scheduler(waiting=[long_request("partly", seed=3)])
    assert sharing.step(engine) == []
    assert sharing.linker.loads == [pages_of(whole)]


def test_two_requests_share_a_preload_of_the_shared_store(sharing: Stage) -> None:
    reqs = [request(key_of(LONG + more, seed=8), rid) for more, rid in ((3, "first"), (2, "second"))]
    engine = scheduler(waiting=reqs)
    assert sharing.step(engine) == [] and len(sharing.linker.loads) == 1
    sharing.linker.has_landed = True
    assert sharing.step(engine) == ["first", "second"]


def test_a_preload_of_the_shared_store_that_fails_is_tried_again_and_then_admitted(sharing: Stage) -> None:
    """What the failed one needed is not found any more, as a rule; here it is."""
    engine = scheduler(waiting=[request(key_of(LONG + 3, seed=8), "shared")])
    sharing.linker.has_landed, sharing.linker.failed_batches = True, {1, 2, 3}
    seen = [sharing.step(engine) for _ in range(4)]
    assert seen[0] == [] and seen[-1] == ["shared"]
    assert len(sharing.linker.loads) == 2
    engine.waiting_queue = []
    sharing.step(engine)
    assert sharing.left == (0, 0, 0)


def test_what_the_shared_store_has_is_read_ahead_where_there_is_no_memory(sharing: Stage) -> None:
    sharing.cache.token_to_kv_pool_allocator.free_slots = 2 * PAGE_SIZE
    engine = scheduler(waiting=[request(key_of(LONG + 3, seed=8), "shared")])
    # SGLang decides what is to be done with it.
    assert sharing.step(engine) == ["shared"]
    assert sharing.linker.loads == [] and sharing.linker.read == ["shared"]


def test_with_preloads_turned_off_nothing_is_deferred_for_the_shared_store(sharing: Stage) -> None:
    sharing.linker.preload_bytes = 0
    sharing.deferrals = sharing.new_deferrals()
    assert not sharing.deferrals.shares
    assert sharing.step(scheduler(waiting=[request(key_of(LONG + 3, seed=8), "shared")])) == ["shared"]
