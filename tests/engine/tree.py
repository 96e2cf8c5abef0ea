"""Stand-ins for the radix tree, its memory, the linker and the scheduler, for tests of what is done to the tree."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from agentstate.pages import Need
from engine_patch.deferrals import Deferrals, StoredHit
from engine_patch.device_tier import DeviceTier
from engine_patch.order import Order, OrderStats
from engine_patch.preloads import Preloads
from engine_patch.ranks import Ranks
from engine_patch.restore import Finished, PreloadStats, Restored
from engine_patch.served import Served
from engine_patch.sglang_api import CacheAgnosticPolicy, ComponentType, PoolName, RadixKey, get_storage_hash_str

PAGE_SIZE = 4
FCFS = SimpleNamespace(policy=CacheAgnosticPolicy.FCFS, enable_priority_scheduling=False, priority_sign=-1)


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
    """A tree that has what was inserted, and ``evictable`` tokens of others."""

    page_size = PAGE_SIZE

    def __init__(self, free: int, evictable: int):
        self.token_to_kv_pool_allocator = Allocator(free)
        self.evictable = evictable
        self.locks = 0
        self.unlocked = False
        self.inserted: list[Any] = []
        self.tree_core = SimpleNamespace(
            collect_full_device_indices=lambda node, root: torch.empty(0),
            match_full_device_prefix=lambda key: (self.has(key), 0, None),
        )
        self.components: set[ComponentType] = {ComponentType.FULL}

    def has(self, key: RadixKey) -> int:
        """How many tokens of ``key`` are on the device."""
        own = (key.extra_key, key.cache_salt)
        trees = [item.key for item in self.inserted if (item.key.extra_key, item.key.cache_salt) == own]
        common = [0]
        for tree in trees:
            same = [one == other for one, other in zip(tree.raw_token_ids(), key.raw_token_ids(), strict=False)]
            common.append(same.index(False) if False in same else len(same))
        return max(common) // PAGE_SIZE * PAGE_SIZE

    def match_prefix(self, params: Any) -> Any:
        return SimpleNamespace(device_prefix_len=self.has(params.key), last_device_node=0)

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
    """Every page is a byte. A batch lands when it is told to, or when everything has (``has_landed``)."""

    drive_timeout_s = 60.0
    restores = True
    reads_ahead = True
    retired = False
    shares = False
    window_pages = 0

    def __init__(self, preload_bytes: int = 0) -> None:
        self.preload_bytes = preload_bytes
        self.preload_stats = PreloadStats()
        self.loads: list[list[bytes]] = []
        self.needs: list[Need] = []
        self.read: list[str] = []
        self.has_landed = False
        self.landed_batches: set[int] = set()
        self.failed_batches: set[int] = set()
        self.waiting: set[int] = set()
        self.abandoned: list[int] = []
        self.quarantined: list[Mapping[PoolName, torch.Tensor]] = []
        self.writing = False
        self.layers = 0
        self.breaks = False
        self.restored: Restored | None = None
        # What cannot be restored on this rank.
        self.missing: set[bytes] = set()

    def can_restore(self, keys: Sequence[bytes]) -> bool:
        return self.missing.isdisjoint(keys)

    def n_bytes(self, pages: int) -> int:
        return pages

    def read_ahead(self, rid: str, keys: list[bytes]) -> None:
        self.read.append(rid)

    def hasten(self, batch: int, need: Need) -> None:
        self.needs[batch - 1] = min(self.needs[batch - 1], need)

    def preload(self, rid: str, keys: list[bytes], slots: Mapping[PoolName, torch.Tensor], need: Need) -> int:
        if self.breaks:
            raise OSError("of this test")
        assert {name: len(own) for name, own in slots.items()} == {PoolName.KV: len(keys) * PAGE_SIZE}
        self.loads.append(keys)
        self.needs.append(need)
        return len(self.loads)

    def is_queued(self, batch: int) -> bool:
        return batch in self.waiting

    def landed(self, batch: int) -> bool:
        return self.has_landed or batch in self.landed_batches

    def layers_landed(self, batch: int) -> int:
        return self.layers

    def abandon(self, batch: int) -> None:
        self.abandoned.append(batch)

    def finish(self, batch: int) -> Finished:
        failed = batch in self.failed_batches or batch in self.abandoned
        return Finished({"r"} if failed else set(), None if failed else self.restored, writing=self.writing)

    def quarantine_slots(self, slots: Mapping[PoolName, torch.Tensor]) -> None:
        self.quarantined.append(slots)


def one_rank() -> Ranks:
    return _ranks(1, 0, lambda tensor: None)


def _ranks(count: int, number: int, least: Callable[[torch.Tensor], None]) -> Ranks:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "engine_patch.ranks.get_parallel", lambda: SimpleNamespace(attn_tp_size=count, attn_tp_rank=number)
        )
        return Ranks(least)


def meeting_ranks(count: int) -> list[Ranks]:
    """Ranks that meet in all that they agree on, each on a thread of its own."""
    meeting, said = threading.Barrier(count, timeout=60), [torch.empty(0)] * count

    def of_rank(number: int) -> Ranks:
        def least(tensor: torch.Tensor) -> None:
            said[number] = tensor.clone()
            meeting.wait()
            tensor.copy_(torch.stack(said).amin(dim=0))
            meeting.wait()

        return _ranks(count, number, least)

    return [of_rank(number) for number in range(count)]


class Stage:
    """One rank without an engine. ``stored`` are the page keys that can be restored, of which those that are ``shared``
    are in the shared store alone; ``other`` makes of what this rank says what all ranks agree on."""

    def __init__(
        self,
        free: int = 1000,
        evictable: int = 0,
        preload_bytes: int = 0,
        aging_s: float = 0,
        ranks: Ranks | None = None,
        beside: ComponentType = ComponentType.FULL,
    ):
        self.cache = Cache(free, evictable)
        self.cache.components.add(beside)
        self.linker = Linker(preload_bytes)
        self.stored: set[bytes] = set()
        self.shared: set[bytes] = set()
        self.matched: list[str] = []
        self.other: Callable[[Sequence[bool]], Sequence[bool]] = lambda own: own
        self.agreements = 0
        self.preloads = Preloads(self.cache, self.linker, self.agree, self.cache.note_unlocked)
        self.order_stats = OrderStats()
        self.now_s = 0.0
        self.order = Order(aging_s, self.order_stats, self.match, self.agree, lambda: self.now_s)
        self.served = Served(lambda: self.now_s)
        self.held_up = False
        self.deferrals = self.new_deferrals()
        self.brought: list[tuple[str, int]] = []
        self.tier = DeviceTier(
            self.cache,
            self.linker,
            self.preloads,
            ranks or one_rank(),
            lambda session, key, start: self.brought.append((session, start)),
            self.served.restores,
            lambda: self.now_s,
        )

    def new_deferrals(self) -> Deferrals:
        return Deferrals(
            self.cache, self.linker, self.preloads, self.match, self.order, self.served, lambda tokens: self.held_up
        )

    def agree(self, own: Sequence[bool]) -> list[bool]:
        self.agreements += 1
        return [one and other for one, other in zip(own, self.other(own), strict=True)]

    def match(self, req: Any) -> StoredHit | None:
        """As `AgentStateRadixCache` does: at least one token is left to compute."""
        self.matched.append(req.rid)
        tokens = (req.origin_input_ids + req.output_ids)[:-1]
        key = RadixKey(tokens, req.extra_key, cache_salt=req.cache_salt).page_aligned(PAGE_SIZE)
        first = self.cache.has(key)
        keys = pages_of(key)[first // PAGE_SIZE :]
        hit = next((place for place, one in enumerate(keys) if one not in self.stored), len(keys))
        self.order.matched(req, first, hit)
        shared = not self.shared.isdisjoint(keys[:hit])
        return StoredHit(key[: first + hit * PAGE_SIZE], first, keys[:hit], shared) if hit else None

    def store(self, key: RadixKey) -> None:
        self.stored.update(pages_of(key))

    def step(self, engine: Any, *entering: StoredHit) -> list[str]:
        """Everything between two batches, the last of which has restored what is ``entering`` the tree: the requests
        that the scheduler sees then."""
        self.tier.run(engine)
        self.preloads.land()
        self.tier.land()
        self.order.step(engine.waiting_queue, engine.policy)
        self.deferrals.begin(engine, entering)
        with self.deferrals.deferring(engine):
            seen = list(engine.waiting_queue)
            self.order.sort(seen, engine.policy)
            return [req.rid for req in seen]

    @property
    def left(self) -> tuple[int, int, int]:
        """Preloads, locks and what is known of requests."""
        return len(self.preloads), self.cache.locks, len(self.deferrals._queued)


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
        policy=FCFS,
    )


def request(key: RadixKey, rid: str = "r", **fields: Any) -> Any:
    defaults = {
        "rid": rid,
        "origin_input_ids": key.token_ids,
        "output_ids": array("q"),
        "extra_key": key.extra_key,
        "cache_salt": key.cache_salt,
        "sampling_params": SimpleNamespace(max_new_tokens=8),
        "storage_hit_start": None,
        "storage_hit_length": 0,
    }
    return SimpleNamespace(**{**defaults, **fields})


def running_request(prompt: int = 20, answered: int = 5, most: int = 15) -> Any:
    return SimpleNamespace(
        finished=lambda: False,
        origin_input_ids=[0] * prompt,
        output_ids=[0] * answered,
        sampling_params=SimpleNamespace(max_new_tokens=most),
        kv=SimpleNamespace(kv_allocated_len=prompt + answered),
    )
