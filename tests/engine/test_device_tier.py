"""What is done to the tree for sessions, with stand-ins for the tree and its memory. That it is right with SGLang's own
is for the acceptance tests."""

from __future__ import annotations

import time
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine_patch.device_tier import DeviceTier, Progress
from engine_patch.sglang_api import CLIP_MAX_NEW_TOKENS, RadixKey, get_storage_hash_str

PAGE_SIZE = 4


class Allocator:
    def __init__(self, free: int):
        self.free_slots = free

    def available_size(self) -> int:
        return self.free_slots

    def alloc(self, count: int) -> torch.Tensor | None:
        if count > self.free_slots:
            return None
        self.free_slots -= count
        return torch.arange(count)

    def free(self, slots: torch.Tensor) -> None:
        self.free_slots += len(slots)


class Cache:
    """A tree that has nothing on the device of any session, and ``evictable`` tokens of others."""

    page_size = PAGE_SIZE

    def __init__(self, free: int, evictable: int):
        self.token_to_kv_pool_allocator = Allocator(free)
        self.evictable = evictable
        self.locks = 0
        self.unlocked = False
        self.inserted: list[Any] = []
        self.tree_core = SimpleNamespace(collect_full_device_indices=lambda node, root: torch.empty(0))

    def match_prefix(self, params: Any) -> Any:
        return SimpleNamespace(device_prefix_len=0, last_device_node=0)

    def evictable_size(self) -> int:
        return self.evictable

    def evict(self, params: Any) -> None:
        self.evictable -= params.num_tokens
        self.token_to_kv_pool_allocator.free_slots += params.num_tokens

    def inc_lock_ref(self, node: Any) -> Any:
        self.locks += 1
        return SimpleNamespace(to_dec_params=lambda: "a lock")

    def dec_lock_ref(self, node: Any, lock: str) -> None:
        self.locks -= 1

    def root_node_handle(self, extra_key: Any) -> int:
        return 0

    def note_unlocked(self) -> None:
        self.unlocked = True

    def insert(self, params: Any) -> None:
        self.inserted.append(params)


class Linker:
    drive_timeout_s = 60.0
    restores = True

    def __init__(self) -> None:
        self.loads: list[list[bytes]] = []
        self.has_landed = False
        self.breaks = False

    def preload(self, rid: str, keys: list[bytes], slots: torch.Tensor) -> int:
        if self.breaks:
            raise OSError("of this test")
        self.loads.append(keys)
        return len(self.loads)

    def landed(self, batch: int) -> bool:
        return self.has_landed

    def finish(self, batch: int) -> Any:
        return SimpleNamespace(failed=set())


def tier_of(cache: Cache) -> DeviceTier:
    tier = DeviceTier.__new__(DeviceTier)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine_patch.device_tier.get_parallel", lambda: SimpleNamespace(tp_size=1))
        cache._components_tuple = (0,)
        cache.linker = Linker()
        tier.__init__(cache, cache.linker, cache.note_unlocked)
    return tier


def key_of(tokens: int, seed: int = 0, **fields: Any) -> RadixKey:
    return RadixKey(array("q", [seed * 1000 + i for i in range(tokens)]), **fields)


def pages_of(key: RadixKey) -> list[bytes]:
    return [bytes.fromhex(text) for text in get_storage_hash_str(key, page_size=PAGE_SIZE)]


def scheduler(*running: Any, waiting: list[Any] | None = None) -> Any:
    return SimpleNamespace(
        running_batch=SimpleNamespace(reqs=list(running)) if running else None,
        last_batch=None,
        chunked_req=None,
        waiting_queue=waiting or [],
        page_size=PAGE_SIZE,
    )


def request(key: RadixKey, rid: str = "r", **fields: Any) -> Any:
    defaults = {"rid": rid, "origin_input_ids": key.token_ids, "extra_key": key.extra_key, "cache_salt": key.cache_salt}
    return SimpleNamespace(**{**defaults, **fields})


def running_request(prompt: int, answered: int, most: int) -> Any:
    return SimpleNamespace(
        finished=lambda: False,
        origin_input_ids=[0] * prompt,
        output_ids=[0] * answered,
        sampling_params=SimpleNamespace(max_new_tokens=most),
        kv=SimpleNamespace(kv_allocated_len=prompt + answered),
    )


def test_a_session_is_brought_back_into_the_tree() -> None:
    cache = Cache(free=32, evictable=0)
    tier, key = tier_of(cache), key_of(16)
    tier.remember("s", key)
    progress = tier.prefetch("s", pages_of(key))
    assert progress is not None
    tier.run(scheduler())
    assert (progress(), tier.busy, cache.locks) == (Progress.RUNNING, True, 1)
    tier._linker.has_landed = True
    tier.run(scheduler())
    assert (progress(), tier.busy, cache.locks) == (Progress.DONE, False, 0)
    # Requests that found no room are tried again.
    assert cache.unlocked
    (inserted,) = cache.inserted
    assert inserted.key.token_ids == key.token_ids


@pytest.mark.parametrize(
    "newest",
    [key_of(16, seed=1), key_of(12), key_of(16, extra_key="another"), None],
    ids=["other tokens", "fewer", "another name", "none"],
)
def test_pages_are_not_brought_under_tokens_that_are_not_theirs(newest: RadixKey | None) -> None:
    """The pages are those of a manifest; the session's newest request may have gone another way since."""
    tier = tier_of(Cache(free=64, evictable=0))
    if newest is not None:
        tier.remember("s", newest)
    assert tier.prefetch("s", pages_of(key_of(16))) is None
    tier.run(scheduler())
    assert tier._linker.loads == []


def test_pages_of_a_session_that_has_gone_on_are_brought() -> None:
    tier = tier_of(Cache(free=64, evictable=0))
    tier.remember("s", key_of(30))
    assert tier.prefetch("s", pages_of(key_of(16))) is not None
    tier.run(scheduler())
    assert tier._linker.loads == [pages_of(key_of(16))]


@pytest.mark.parametrize(
    ("free", "evictable", "restores"),
    # Too little memory; a drive that does not answer, or weights that have been replaced since it was asked.
    [(4, 8, True), (0, 32, False)],
)
def test_nothing_is_evicted_for_what_cannot_be_brought(free: int, evictable: int, restores: bool) -> None:
    cache = Cache(free=free, evictable=evictable)
    tier, key = tier_of(cache), key_of(16)
    tier._linker.restores = restores
    tier.remember("s", key)
    progress = tier.prefetch("s", pages_of(key))
    tier.run(scheduler())
    assert progress() is Progress.FAILED
    assert (cache.evictable, cache.locks, tier.busy) == (evictable, 0, False)


@pytest.mark.parametrize(
    ("most", "may_need"),
    # Of an answer without end as much is reserved as SGLang reckons with.
    [(15, 10), (1 << 30, CLIP_MAX_NEW_TOKENS)],
)
@pytest.mark.parametrize(("short", "progress"), [(0, Progress.RUNNING), (1, Progress.FAILED)])
def test_what_running_requests_may_need_is_left_to_them(
    most: int, may_need: int, short: int, progress: Progress
) -> None:
    cache, key = Cache(free=16 + may_need + PAGE_SIZE - short - 8, evictable=8), key_of(16)
    tier = tier_of(cache)
    tier.remember("s", key)
    told = tier.prefetch("s", pages_of(key))
    tier.run(scheduler(running_request(prompt=20, answered=5, most=most)))
    assert told() is progress
    assert cache.locks == (progress is Progress.RUNNING)


def test_a_prefetch_that_breaks_down_gives_everything_back() -> None:
    cache = Cache(free=32, evictable=0)
    tier, key = tier_of(cache), key_of(16)
    tier._linker.breaks = True
    tier.remember("s", key)
    progress = tier.prefetch("s", pages_of(key))
    tier.run(scheduler())
    assert progress() is Progress.FAILED
    assert (cache.locks, cache.token_to_kv_pool_allocator.free_slots, tier.busy) == (0, 32, False)


def test_a_request_waits_for_what_brings_its_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    tier, key = tier_of(Cache(free=64, evictable=0)), key_of(16)
    tier.remember("s", key)
    tier.prefetch("s", pages_of(key))
    tier.run(scheduler())
    own, longer = request(key_of(21), "own"), request(key_of(40), "longer")
    strangers = [
        request(key_of(21, seed=1), "other tokens"),
        request(key_of(12), "shorter"),
        request(key_of(21), "another's", cache_salt="another"),
    ]
    waiting = [own, *strangers, longer]
    engine = scheduler(waiting=waiting)
    with tier.deferring(engine):
        assert engine.waiting_queue == strangers
        new = request(key_of(8), "new")
        engine.waiting_queue = [*strangers[1:], new]  # one was admitted, one came
    assert engine.waiting_queue == [own, *strangers[1:], longer, new]
    # It does not wait for ever.
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    with tier.deferring(engine):
        assert own in engine.waiting_queue


def test_nobody_waits_when_nothing_is_on_its_way() -> None:
    tier, req = tier_of(Cache(free=64, evictable=0)), request(key_of(21))
    engine = scheduler(waiting=[req])
    with tier.deferring(engine):
        assert engine.waiting_queue == [req]


def test_with_tensor_parallelism_nothing_is_moved_and_nothing_offered_again() -> None:
    tier, key = tier_of(Cache(free=64, evictable=0)), key_of(16)
    tier._alone = tier._moves = False
    tier._sees_nodes = True
    tier.remember("s", key)
    assert tier.prefetch("s", pages_of(key)) is None
    offered: list[Any] = []
    tier._cache.linker.offload_nodes = offered.append
    tier.offer_again(key)
    assert offered == [[]]
