from __future__ import annotations

import contextlib
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from contents import drop, key, keys, write
from device import PAGE_SIZE, PAGES, aligned_kv_tensors, as_bytes, fill, kv_tensors, page_of

from agentstate.errors import PageStoreLocked
from agentstate.pages import ANYONE, DEMAND, PLANNED, Need, PageStore, Quota, Urgency, fingerprint
from agentstate.pages.testing.pages import traces
from agentstate.settings import Settings
from engine_patch.arrivals import LayerGate
from engine_patch.pools import DevicePool
from engine_patch.restore import Source
from engine_patch.sglang_api import PagedTokenToKVPoolAllocator, PoolName, PoolTransfer
from engine_patch.stored_pools import OfferBudget, StoredPools, _parts

WINDOW = 2


class Stage:
    """A rank with full attention in layers 1, 3 and 5, a window of two pages in 0, 2 and 4, and a state in 6, 7 and
    8. What drafts for it has one layer. ``stores`` are what the pools write to."""

    def __init__(self, directory: Path):
        self.full, self.window = kv_tensors(), kv_tensors(components=1)
        self.state = [(torch.zeros(33, 3, 5),) for _ in range(3)]
        self.draft = kv_tensors()[:1]
        for tensors in (self.full, self.window, self.state, self.draft):
            fill(tensors)
        self.tensors = {PoolName.KV: self.full, PoolName.SWA: self.window}
        self.stores: dict[PoolName, PageStore] = {}
        self.drive_timeout_s = 60.0
        self.spill_queue_bytes = 1 << 30
        self.host_bytes = 0
        self.allocators: dict[PoolName, Any] = {
            PoolName.KV: PagedTokenToKVPoolAllocator(PAGES * PAGE_SIZE, PAGE_SIZE, torch.float32, "cpu", None, False),
            PoolName.SWA: PagedTokenToKVPoolAllocator(PAGES * PAGE_SIZE, PAGE_SIZE, torch.float32, "cpu", None, False),
        }
        self.read_priorities = True
        self._directory = directory

    def open(self, *names: PoolName) -> StoredPools:
        f32 = ("float32",)
        known = {
            PoolName.KV: DevicePool(PoolName.KV, self.full, PAGE_SIZE, (1, 3, 5), f32),
            PoolName.SWA: DevicePool(PoolName.SWA, self.window, PAGE_SIZE, (0, 2, 4), f32, WINDOW),
            PoolName.MAMBA: DevicePool(PoolName.MAMBA, self.state, 1, (6, 7, 8), f32, 1),
            PoolName.DRAFT: DevicePool(PoolName.DRAFT, self.draft, PAGE_SIZE, (5,), f32, follows=PoolName.KV),
        }
        known = {
            name: replace(pool, allocator=self.allocators.get(pool.follows or name)) for name, pool in known.items()
        }
        settings = Settings(
            staging_bytes=1 << 20,
            spill_staging_bytes=1 << 20,
            read_threads=1,
            drive_timeout_s=self.drive_timeout_s,
            spill_queue_bytes=self.spill_queue_bytes,
            host_bytes=self.host_bytes,
            read_priorities=self.read_priorities,
        )
        return StoredPools([known[name] for name in names], self._open_store, settings)

    def _open_store(self, pool: DevicePool) -> PageStore:
        store = PageStore(self._directory / pool.name, fingerprint(pool=pool.name), pool.device_pages.geometry)
        self.stores[pool.name] = store
        return store


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


@pytest.fixture
def opened(stage: Stage) -> Iterator[Callable[..., StoredPools]]:
    pools: list[StoredPools] = []

    def open(*names: PoolName) -> StoredPools:
        pools.append(stage.open(*names))
        return pools[-1]

    yield open
    for one in pools:
        one.finish_spilling(60)
        one.close()


def slots(*numbers: int, size: int = PAGE_SIZE) -> torch.Tensor:
    return torch.cat([torch.arange(number * size, (number + 1) * size) for number in numbers])


def transfer(name: PoolName, pages: Sequence[object], indices: torch.Tensor) -> PoolTransfer:
    return PoolTransfer(name=name, keys=[key(page).hex() for page in pages], device_indices=indices)


def offered(pools: StoredPools, *transfers: PoolTransfer) -> bool:
    """Offer a node, wait for it: its result."""
    assert pools.offer(transfers, tuple)
    done = threading.Event()
    pools.then(done.set)
    assert done.wait(60)
    return pools.pop_result()


def test_full_attention_goes_on_from_any_page(stage: Stage, opened: Callable[..., StoredPools]) -> None:
    pools = opened(PoolName.KV)
    assert pools.restorable(keys(1, 2, 3)) == []
    assert pools.durable(keys(1, 2, 3)) == 0
    write(stage.stores[PoolName.KV], keys(1, 2, 4))
    assert pools.restorable(keys(1, 2, 3, 4)) == [1, 2]
    assert pools.durable(keys(1, 2, 3, 4)) == 2
    assert pools.restorable([]) == []


def test_a_window_goes_on_from_where_all_of_it_is_stored(stage: Stage, opened: Callable[..., StoredPools]) -> None:
    pools = opened(PoolName.KV, PoolName.SWA)
    write(stage.stores[PoolName.KV], keys(*range(8)))
    assert pools.restorable(keys(*range(8))) == []
    write(stage.stores[PoolName.SWA], keys(0, 3, 4, 5, 7))
    # Before the first page there is nothing that a window could miss, or it is on the device.
    assert pools.restorable(keys(*range(8))) == [1, 5, 6]
    assert pools.restorable(keys(*range(4, 8))) == [1, 2]


def test_a_state_goes_on_from_its_own_page_only(stage: Stage, opened: Callable[..., StoredPools]) -> None:
    pools = opened(PoolName.KV, PoolName.MAMBA)
    write(stage.stores[PoolName.KV], keys(*range(6)))
    write(stage.stores[PoolName.MAMBA], keys(2, 5, 9))
    assert pools.restorable(keys(*range(10))) == [3, 6]
    assert pools.durable(keys(*range(5))) == 3


def test_what_a_window_needs_counts_as_used(stage: Stage, opened: Callable[..., StoredPools]) -> None:
    pools = opened(PoolName.KV, PoolName.SWA)
    window = stage.stores[PoolName.SWA]
    for number in range(6):
        write(stage.stores[PoolName.KV], keys(number))
        write(window, keys(number))
    each = window.stats.bytes // 6
    assert pools.restorable(keys(0, 1, 2, 3)) == [1, 2, 3, 4]
    assert pools.durable(keys(0, 1)) == 2
    window.quota = Quota(max_bytes=2 * each)
    window.make_room(0)
    # Of the chain that was looked for, its window, and neither what lies before that nor what came later.
    assert held_by(window) == keys(2, 3)


def test_all_pools_agree_whatever_each_of_them_has(stage: Stage, opened: Callable[..., StoredPools]) -> None:
    names = (PoolName.KV, PoolName.SWA, PoolName.MAMBA)
    windows = {PoolName.KV: 7, PoolName.SWA: WINDOW, PoolName.MAMBA: 1}
    pools = opened(*names)
    chance = random.Random(1)
    for _ in range(40):
        held = {name: [n for n in range(7) if chance.random() < 0.7] for name in names}
        for name, numbers in held.items():
            store = stage.stores[name]
            drop(store, *keys(*range(7)))
            if numbers:
                write(store, keys(*numbers))
        right = [
            length
            for length in range(1, 8)
            if all(set(range(max(0, length - windows[name]), length)) <= set(held[name]) for name in names)
        ]
        assert pools.restorable(keys(*range(7))) == right


def test_a_request_is_not_restored_again_from_what_failed_it(
    stage: Stage, opened: Callable[..., StoredPools], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not before it has been computed; others find out for themselves."""
    pools = opened(PoolName.KV)
    store = stage.stores[PoolName.KV]
    write(store, keys(*range(6)))
    (segment,) = store.pin(keys(4)).segments
    with segment.extent.path.open("r+b") as file:
        file.seek(segment.extent.layout.component_range(1, 0, segment.slot, 1)[0])
        file.write(b"wrong")
    # The store serves the page for as long as its index takes.
    monkeypatch.setattr(store, "drop", lambda copies: 0)
    assert pools.load("a", [transfer(PoolName.KV, range(6), slots(*range(6)))])
    assert pools.finish(pools.start([])).failed == {"a"}
    assert pools.restorable_for("a", keys(*range(6))) == [1, 2, 3, 4]
    assert pools.restorable_for("b", keys(*range(6))) == [1, 2, 3, 4, 5, 6]
    pools.tidy(lambda: {"a"})
    assert pools.restorable_for("a", keys(3, 4, 5)) == [1]

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("of this test")

    monkeypatch.setattr(pools._pools[0].device_pages.inbound, "after", fail)
    assert pools.load("a", [transfer(PoolName.KV, range(3), slots(0, 1, 2))])
    assert pools.finish(pools.start([])).failed == {"a"}
    assert pools.restorable_for("a", keys(*range(6))) == []
    pools.tidy(lambda: {"b"})
    assert pools.restorable_for("a", keys(*range(6))) == [1, 2, 3, 4, 5, 6]


def test_what_a_node_has_in_each_pool_is_stored_and_comes_back(
    stage: Stage, opened: Callable[..., StoredPools]
) -> None:
    pools = opened(PoolName.KV, PoolName.SWA, PoolName.MAMBA)
    right = [page_of(stage.full, n) for n in (4, 5, 6)]
    window = [page_of(stage.window, n) for n in (9, 2)]
    state = [[tensor[3].clone() for tensor in layer] for layer in stage.state]
    assert offered(
        pools,
        transfer(PoolName.KV, [1, 2, 3], slots(4, 5, 6)),
        # The first page has left the window.
        transfer(PoolName.SWA, [1, 2, 3], torch.cat([torch.zeros(PAGE_SIZE, dtype=torch.int64), slots(9, 2)])),
        transfer(PoolName.MAMBA, [3], torch.tensor([3])),
    )
    assert [len(store) for store in map(held_by, stage.stores.values())] == [3, 2, 1]
    assert pools.restorable(keys(1, 2, 3)) == [3]
    assert pools.n_bytes(3) == sum(
        count * store.geometry.page_bytes for count, store in zip((3, 2, 1), stage.stores.values(), strict=True)
    )
    for tensors in (stage.full, stage.window, stage.state):
        for layer in tensors:
            layer[0].zero_()
    assert pools.load(
        "r",
        [
            transfer(PoolName.KV, [1, 2, 3], slots(10, 11, 12)),
            transfer(PoolName.SWA, [2, 3], slots(1, 2)),
            transfer(PoolName.MAMBA, [3], torch.tensor([7])),
        ],
    )
    index = pools.start(())
    pools.gate.set_consumer(index)
    for layer in range(12):
        pools.gate.wait_until(layer)
    found = pools.finish(index)
    restored = found.restored
    assert (found.failed, found.writing) == (set(), False)
    assert [numbers().tolist() for numbers in found.numbers] == [[10, 11, 12], [1, 2], [7]]
    # Of all pools, once; its pages are those of full attention.
    assert restored is not None
    assert {rid: share.pages for rid, share in restored.requests.items()} == {"r": 3}
    assert restored.n_bytes >= pools.n_bytes(3)
    assert 0 < restored.waited_s <= pools.gate.waited_s
    assert [page_of(stage.full, n)[layer] for n in (10, 11, 12) for layer in range(3)] == [
        page[layer] for page in right for layer in range(3)
    ]
    assert [page_of(stage.window, n) for n in (1, 2)] == window
    assert all(
        torch.equal(as_bytes(tensor[7]), as_bytes(kept))
        for layer, kept_layer in zip(stage.state, state, strict=True)
        for tensor, kept in zip(layer, kept_layer, strict=True)
    )


def held_by(store: PageStore) -> list[bytes]:
    return [page for page in keys(*range(10)) if page in store]


def test_a_node_without_a_window_is_stored_without_it(stage: Stage, opened: Callable[..., StoredPools]) -> None:
    pools = opened(PoolName.KV, PoolName.SWA)
    assert offered(pools, transfer(PoolName.KV, [1, 2], slots(1, 2)))
    assert held_by(stage.stores[PoolName.KV]) == keys(1, 2)
    assert not held_by(stage.stores[PoolName.SWA])
    assert pools.results == 0


def test_a_node_is_stored_only_when_every_pool_has_stored_it(
    stage: Stage, opened: Callable[..., StoredPools], monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = opened(PoolName.KV, PoolName.SWA)

    def full(draft: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(stage.stores[PoolName.SWA], "publish", full)
    node = [transfer(PoolName.KV, [1], slots(1)), transfer(PoolName.SWA, [1], slots(4))]
    assert not offered(pools, *node)
    assert pools.restorable(keys(1)) == []
    monkeypatch.undo()
    assert offered(pools, *node)
    assert pools.restorable(keys(1)) == [1]


def test_one_bad_page_in_one_pool_fails_its_request(stage: Stage, opened: Callable[..., StoredPools]) -> None:
    pools = opened(PoolName.KV, PoolName.SWA)
    for page in (1, 2):
        assert offered(pools, transfer(PoolName.KV, [page], slots(page)), transfer(PoolName.SWA, [page], slots(page)))
    (segment,) = stage.stores[PoolName.SWA].pin(keys(2)).segments
    offset, _ = segment.extent.layout.component_range(1, 0, 0, 1)
    with segment.extent.path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    for page in (1, 2):
        assert pools.load(
            f"r{page}", [transfer(name, [page], slots(10 + page)) for name in (PoolName.KV, PoolName.SWA)]
        )
    found = pools.finish(pools.start(()))
    assert found.failed == {"r2"}
    assert found.restored is not None and list(found.restored.requests) == ["r1"]
    pools.drain()
    assert pools.restorable(keys(2)) == []
    assert pools.restorable(keys(1)) == [1]
    stat = pools.stat()
    assert stat["restore"]["pages_failed"] == 0
    assert stat["pools"]["swa"]["restore"]["pages_failed"] == 1


def spoil(store: PageStore, page: int) -> None:
    (segment,) = store.pin(keys(page)).segments
    offset, _ = segment.extent.layout.component_range(store.geometry.layers - 1, 0, segment.slot, 1)
    with segment.extent.path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_a_page_without_its_drafts_is_no_page(stage: Stage, opened: Callable[..., StoredPools]) -> None:
    pools = opened(PoolName.KV, PoolName.SWA, PoolName.DRAFT)
    write(stage.stores[PoolName.KV], keys(*range(6)))
    write(stage.stores[PoolName.SWA], keys(*range(6)))
    assert pools.restorable(keys(*range(6))) == []
    write(stage.stores[PoolName.DRAFT], keys(0, 1, 2, 4))
    assert pools.restorable(keys(*range(6))) == [1, 2, 3]
    assert pools.durable(keys(*range(6))) == 3
    assert not pools.here(keys(*range(6)))
    assert not pools.stored([transfer(PoolName.KV, range(6), slots(*range(6)))])


def test_what_a_draft_keeps_of_a_page_goes_and_comes_with_it(stage: Stage, opened: Callable[..., StoredPools]) -> None:
    """SGLang says where the target's pages are, and nothing of the draft's."""
    pools = opened(PoolName.KV, PoolName.DRAFT)
    right = [[page_of(tensors, n) for n in (4, 6)] for tensors in (stage.full, stage.draft)]
    assert offered(pools, transfer(PoolName.KV, [1, 2], slots(4, 6)))
    assert [held_by(store) for store in stage.stores.values()] == [keys(1, 2)] * 2
    assert pools.n_bytes(2) == 2 * sum(store.geometry.page_bytes for store in stage.stores.values())
    assert pools.load("r", [transfer(PoolName.KV, [1, 2], slots(10, 12))])
    found = pools.finish(pools.start(()))
    assert found.failed == set()
    assert [[page_of(tensors, n) for n in (10, 12)] for tensors in (stage.full, stage.draft)] == right


def hang_draft(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The drive does not give the draft's part of page 1 before the event is set."""
    inode = stage.stores[PoolName.DRAFT].pin(keys(1)).segments[0].extent.path.stat().st_ino
    answers, real = threading.Event(), os.preadv

    def hangs(fd: int, buffers: list[object], offset: int) -> int:
        if offset and os.fstat(fd).st_ino == inode:
            assert answers.wait(60)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", hangs)
    return answers


def test_who_waits_for_the_last_layer_waits_for_the_draft(
    stage: Stage, opened: Callable[..., StoredPools], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It drafts once the forward is over, and nothing in it waits."""
    pools = opened(PoolName.KV, PoolName.DRAFT)
    assert offered(pools, transfer(PoolName.KV, [1], slots(4)))
    answers = hang_draft(stage, monkeypatch)
    right = page_of(stage.draft, 4)
    assert pools.load("r", [transfer(PoolName.KV, [1], slots(9))])
    index = pools.start(())
    pools.gate.set_consumer(index)
    for layer in (1, 3):
        pools.gate.wait_until(layer)
    waiting = threading.Thread(target=pools.gate.wait_until, args=(5,))
    waiting.start()
    pools._pools[0].restorer.drain()
    assert waiting.is_alive()
    answers.set()
    waiting.join(60)
    assert page_of(stage.draft, 9) == right
    assert pools.finish(index).failed == set()


def test_a_damaged_page_of_a_draft_fails_its_request_and_is_stored_again(
    stage: Stage, opened: Callable[..., StoredPools]
) -> None:
    pools = opened(PoolName.KV, PoolName.DRAFT)
    node = transfer(PoolName.KV, [1, 2, 3], slots(4, 5, 6))
    assert offered(pools, node)
    spoil(stage.stores[PoolName.DRAFT], 2)
    assert pools.load("r", [transfer(PoolName.KV, [1, 2, 3], slots(9, 10, 11))])
    assert pools.finish(pools.start(())).failed == {"r"}
    pools.drain()
    assert pools.restorable(keys(1, 2, 3)) == [1]
    stat = pools.stat()
    assert (stat["restore"]["pages_failed"], stat["pools"]["draft"]["restore"]["pages_failed"]) == (0, 1)
    assert pools.lost == 1 and not pools.stored([node])
    assert offered(pools, node)
    assert pools.restorable(keys(1, 2, 3)) == [1, 2, 3]


def test_a_draft_is_preloaded_with_its_pages(
    stage: Stage, opened: Callable[..., StoredPools], monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = opened(PoolName.KV, PoolName.DRAFT)
    right = [page_of(tensors, 4) for tensors in (stage.full, stage.draft)]
    assert offered(pools, transfer(PoolName.KV, [1], slots(4)))
    index = pools.preload("a prefetch", keys(1), {PoolName.KV: slots(9)}, ())
    found = pools.finish(index)
    assert (found.failed, pools.landed(index)) == (set(), True)
    assert [page_of(tensors, 9) for tensors in (stage.full, stage.draft)] == right

    def fail(*_: object, **__: object) -> None:
        raise OSError("of this test")

    # What cannot even begin in one pool fails, and the pools stay in step.
    monkeypatch.setattr(pools._pools[1].restorer, "_load", fail)
    assert pools.finish(pools.preload("a prefetch", keys(1), {PoolName.KV: slots(11)}, ())).failed == {"a prefetch"}
    monkeypatch.undo()
    assert pools.finish(pools.preload("a prefetch", keys(1), {PoolName.KV: slots(11)}, ())).failed == set()
    assert [page_of(tensors, 11) for tensors in (stage.full, stage.draft)] == right
    stage.stores[PoolName.DRAFT].drop([*stage.stores[PoolName.DRAFT].pin(keys(1)).copies([0])])
    assert pools.finish(pools.preload("a prefetch", keys(1), {PoolName.KV: slots(12)}, ())).failed == {"a prefetch"}


def test_of_a_window_what_is_needed_is_preloaded(stage: Stage, opened: Callable[..., StoredPools]) -> None:
    pools = opened(PoolName.KV, PoolName.SWA)
    assert pools.window_pages == WINDOW
    node = [transfer(PoolName.KV, [1, 2, 3], slots(4, 5, 6)), transfer(PoolName.SWA, [2, 3], slots(7, 8))]
    right = [page_of(stage.full, number) for number in (4, 5, 6)], [page_of(stage.window, number) for number in (7, 8)]
    assert offered(pools, *node)
    to = {PoolName.KV: slots(14, 15, 16), PoolName.SWA: slots(12, 11)}
    index = pools.preload("a prefetch", keys(1, 2, 3), to, ())
    assert pools.finish(index).failed == set() and pools.landed(index)
    found = [page_of(stage.full, number) for number in (14, 15, 16)], [page_of(stage.window, n) for n in (12, 11)]
    assert found == right
    # A request's batch is the next one in all pools.
    assert pools.load(
        "r", [transfer(PoolName.KV, [1, 2, 3], slots(17, 18, 19)), transfer(PoolName.SWA, [2, 3], slots(1, 2))]
    )
    assert pools.finish(pools.start(())).failed == set()
    # A wrong page of the window fails all of it.
    spoil(stage.stores[PoolName.SWA], 3)
    assert pools.finish(pools.preload("a prefetch", keys(1, 2, 3), to, ())).failed == {"a prefetch"}
    # Slots of both are withheld.
    pools.quarantine_slots(to)
    assert pools.kept()["quarantined_pages"] == 5
    pools.release_quarantine()


def test_pages_that_a_draft_follows_are_withheld_once(
    stage: Stage, opened: Callable[..., StoredPools], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages that were given back twice would be given out twice."""
    stage.drive_timeout_s = 0.5
    stage.full, stage.draft = aligned_kv_tensors(), aligned_kv_tensors()[:1]
    pools = opened(PoolName.KV, PoolName.DRAFT)
    for store in stage.stores.values():
        write(store, keys(1))
    answers = hang_draft(stage, monkeypatch)
    allocator = stage.allocators[PoolName.KV]
    free, device = allocator.available_size(), allocator.alloc(PAGE_SIZE)
    assert pools.load("r", [transfer(PoolName.KV, [1], device)])
    index = pools.start(())
    pools.gate.set_consumer(index)
    pools.gate.wait_until(5)
    found = pools.finish(index)
    assert found.writing
    pools.quarantine(found.numbers)
    allocator.free(device)
    assert allocator.available_size() == free - PAGE_SIZE
    answers.set()
    while pools.stuck:
        time.sleep(0.001)
    pools.release_quarantine()
    assert allocator.available_size() == free
    numbers = allocator.alloc(free)
    assert numbers is not None and len(set(numbers.tolist())) == free
    allocator.free(numbers)
    # Of a preload the same pages are withheld.
    pools.quarantine_slots({PoolName.KV: slots(3)})
    assert pools.quarantines
    pools.release_quarantine()


@pytest.mark.parametrize("straight", [False, True], ids=["through staging", "straight"])
@pytest.mark.parametrize("hanging", [PoolName.KV, PoolName.SWA, PoolName.MAMBA])
def test_what_one_pool_waits_for_in_vain_is_given_up_in_all(
    stage: Stage,
    opened: Callable[..., StoredPools],
    monkeypatch: pytest.MonkeyPatch,
    hanging: PoolName,
    straight: bool,
) -> None:
    stage.drive_timeout_s = 0.5
    if straight:
        stage.full, stage.window = aligned_kv_tensors(), aligned_kv_tensors()
    pools = opened(PoolName.KV, PoolName.SWA, PoolName.MAMBA)
    assert [pages.addressable for pages in pools.device_pages.values()] == [straight, straight, False]
    for name, pages in ((PoolName.KV, keys(1, 2)), (PoolName.SWA, keys(1, 2)), (PoolName.MAMBA, keys(2))):
        write(stage.stores[name], pages)
    inode = stage.stores[hanging].pin(keys(2)).segments[0].extent.path.stat().st_ino
    answers = threading.Event()
    real = os.preadv

    def hangs(fd: int, buffers: list[object], offset: int) -> int:
        if offset and os.fstat(fd).st_ino == inode:  # headers are read
            assert answers.wait(60)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", hangs)
    attention = {name: stage.allocators[name] for name in (PoolName.KV, PoolName.SWA)}
    free = {name: allocator.available_size() for name, allocator in attention.items()}
    device = {name: allocator.alloc(2 * PAGE_SIZE) for name, allocator in attention.items()}
    loads = [transfer(name, [1, 2], device[name]) for name in attention]
    assert pools.load("r", [*loads, transfer(PoolName.MAMBA, [2], torch.tensor([3]))])
    index = pools.start(())
    for pool in pools._pools:
        while pool.name != hanging and not pool.restorer.landed(index):
            time.sleep(0.001)
    pools.gate.set_consumer(index)
    for layer in range(9):
        pools.gate.wait_until(layer)
    found = pools.finish(index)
    written = straight and hanging is not PoolName.MAMBA
    assert (found.failed, found.restored, found.writing) == ({"r"}, None, written)
    assert pools.stuck
    if written:
        pools.quarantine(found.numbers)
    assert pools.quarantines is written
    for name, allocator in attention.items():
        allocator.free(device[name])
        assert allocator.available_size() == free[name] - (2 * PAGE_SIZE if written else 0)
    tensors = [tensor for layers in (stage.full, stage.window, stage.state) for layer in layers for tensor in layer]
    before = [as_bytes(tensor).clone() for tensor in tensors]
    answers.set()
    while pools.stuck:
        time.sleep(0.001)
    # What nobody waits for any more is written nowhere, but where the drive itself had been told to write it.
    changed = [not torch.equal(as_bytes(tensor), kept) for tensor, kept in zip(tensors, before, strict=True)]
    assert any(changed) is written
    pools.release_quarantine()
    assert not pools.quarantines
    assert {name: allocator.available_size() for name, allocator in attention.items()} == free


def test_files_are_read_straight_only_to_pages_that_can_be_held() -> None:
    pools = [
        DevicePool(PoolName.KV, aligned_kv_tensors(), PAGE_SIZE, (0, 1, 2), ("float32",), None, allocator)
        for allocator in (Stage(Path()).allocators[PoolName.KV], None)
    ]
    assert [pool.device_pages.addressable for pool in pools] == [True, False]


def test_a_batch_that_is_over_is_waited_for_no_more(stage: Stage, opened: Callable[..., StoredPools]) -> None:
    """SGLang goes on naming it to later forwards."""
    pools = opened(PoolName.KV)
    write(stage.stores[PoolName.KV], keys(1))
    assert pools.load("r", [transfer(PoolName.KV, [1], slots(3))])
    index = pools.start(())
    pools.gate.set_consumer(index)
    pools.gate.wait_until(1)
    restored = pools.finish(index).restored
    assert restored is not None and len(restored.layer_waits_s) == 1
    pools.gate.wait_until(1)
    assert pools.gate.waited_for(index) == ()


@pytest.mark.parametrize("abandoned", [False, True])
def test_pages_are_preloaded_into_slots_of_their_own(
    stage: Stage, opened: Callable[..., StoredPools], abandoned: bool
) -> None:
    pools = opened(PoolName.KV)
    write(stage.stores[PoolName.KV], keys(1, 2))
    index = pools.preload("r", [key(1), key(2)], {PoolName.KV: slots(3, 7)}, ())
    if abandoned:
        pools.abandon(index)
        assert pools.finish(index).failed == {"r"}
        return
    pools.gate.set_consumer(index)
    for layer in (1, 3, 5):
        pools.gate.wait_until(layer)
    assert (pools.layers_landed(index), pools.landed(index)) == (3, True)
    failed, restored, *_ = pools.finish(index)
    assert restored is not None
    assert (failed, restored.sources) == (set(), {Source.DEVICE})


@pytest.mark.parametrize("name", [PoolName.KV, PoolName.SWA, PoolName.MAMBA])
def test_what_is_offered_while_too_much_waits_is_refused_at_once(
    stage: Stage, opened: Callable[..., StoredPools], monkeypatch: pytest.MonkeyPatch, name: PoolName
) -> None:
    """A drive that takes nothing locks half of the device memory at the most, and a quarter of the states."""
    pools = opened(PoolName.KV, PoolName.SWA, PoolName.MAMBA)
    goes_on = threading.Event()
    publish = stage.stores[name].publish
    monkeypatch.setattr(stage.stores[name], "publish", lambda draft: (goes_on.wait(60), publish(draft)))
    most = (len(stage.state[0][0]) // 4) if name is PoolName.MAMBA else PAGES // 2
    taken, page = 0, 0
    size = 1 if name is PoolName.MAMBA else PAGE_SIZE
    while pools.offer([transfer(name, [page], slots(1 + page % 7, size=size))], tuple):
        taken, page = taken + 1, page + 1
        assert taken < 100
    assert taken == most
    # Nor is another one taken, which there would be room for: it may come after the one that was refused.
    assert not pools.offer([transfer(PoolName.KV, [98], slots(1))], tuple)
    assert pools.stat()["spill"]["pages_refused"] == (2 if name is PoolName.KV else 1)
    goes_on.set()
    deadline = time.monotonic() + 30
    while pools.results < taken:
        assert time.monotonic() < deadline
    # As soon as the tree has taken a result, there is room.
    assert pools.pop_result()
    assert offered(pools, transfer(PoolName.KV, [99], slots(1)))


class Looked(list[int]):
    """Numbers that are ``looked`` at so often, all of them together."""

    looked = 0

    def __getitem__(self, index: Any) -> Any:
        Looked.looked += 1
        return super().__getitem__(index)

    def __iter__(self) -> Iterator[int]:
        Looked.looked += 1
        return super().__iter__()


def test_what_waits_is_not_added_up_again_for_every_offer() -> None:
    budget = OfferBudget([10_000, 10_000])
    for _ in range(1000):
        assert budget.take(Looked([1, 2]))
    for _ in range(1000):
        budget.answered()
    assert budget.kept == 0
    assert 1000 <= Looked.looked <= 5 * 1000


def test_after_a_reset_nothing_waits(stage: Stage, opened: Callable[..., StoredPools]) -> None:
    stage.spill_queue_bytes = 1
    pools = opened(PoolName.KV)
    assert pools.offer([transfer(PoolName.KV, [1], slots(1))], tuple)
    assert not pools.offer([transfer(PoolName.KV, [2], slots(2))], tuple)
    pools.reset()
    assert pools.results == 0
    assert offered(pools, transfer(PoolName.KV, [2], slots(2)))


def test_an_offer_that_is_larger_than_all_that_may_wait_is_taken_when_nothing_does(
    stage: Stage, opened: Callable[..., StoredPools]
) -> None:
    stage.spill_queue_bytes = 1
    pools = opened(PoolName.KV)
    assert offered(pools, transfer(PoolName.KV, [1, 2, 3], slots(1, 2, 3)))
    assert held_by(stage.stores[PoolName.KV]) == keys(1, 2, 3)


def test_a_load_that_misses_a_pool_is_refused(stage: Stage, opened: Callable[..., StoredPools]) -> None:
    pools = opened(PoolName.KV, PoolName.SWA)
    assert not pools.load("r", [transfer(PoolName.KV, [1], slots(1))])
    assert pools.start(()) == -1
    assert not pools.cancel("r")


def test_a_cancelled_load_is_made_in_no_pool(stage: Stage, opened: Callable[..., StoredPools]) -> None:
    pools = opened(PoolName.KV, PoolName.SWA)
    assert offered(pools, transfer(PoolName.KV, [1], slots(1)), transfer(PoolName.SWA, [1], slots(1)))
    assert pools.load("r", [transfer(name, [1], slots(PAGES - 1)) for name in (PoolName.KV, PoolName.SWA)])
    assert pools.cancel("r")
    assert pools.start(()) == -1


def test_an_action_follows_what_was_offered_to_every_pool(stage: Stage, opened: Callable[..., StoredPools]) -> None:
    pools = opened(PoolName.KV, PoolName.SWA, PoolName.MAMBA)
    seen: list[list[int]] = []
    for page in range(1, 6):
        pools.offer(
            [
                transfer(PoolName.KV, [page], slots(page)),
                transfer(PoolName.SWA, [page], slots(page)),
                transfer(PoolName.MAMBA, [page], torch.tensor([page])),
            ],
            tuple,
        )
        pools.then(lambda page=page: seen.append(pools.restorable(keys(*range(1, page + 1)))))
    pools.reset()
    assert seen == [list(range(1, page + 1)) for page in range(1, 6)]


def test_without_pools_nothing_is_stored_and_nothing_is_found(opened: Callable[..., StoredPools]) -> None:
    pools = opened()
    pages = transfer(PoolName.KV, [1], slots(1))
    assert not pools.offer([pages], tuple)
    assert not pools.load("r", [pages])
    assert pools.restorable(keys(1)) == []
    assert pools.start(()) == -1
    assert pools.finish(-1).failed == set()
    assert pools.results == 0
    assert pools.stat()["spill"]["waiting"] == 0
    pools.gate.set_consumer(-1)
    pools.gate.wait_until(3)
    pools.reset()


def test_a_layer_of_no_pool_is_not_waited_for() -> None:
    LayerGate({}).wait_until(0)


def test_all_pools_retain_and_release_what_a_chain_needs(stage: Stage, opened: Callable[..., StoredPools]) -> None:
    pools = opened(PoolName.KV, PoolName.SWA)
    full, window = stage.stores[PoolName.KV], stage.stores[PoolName.SWA]
    for number in range(6):
        write(full, keys(number))
        write(window, keys(number))
    assert pools.retain(keys(3, 4, 5), time.monotonic() + 3600) == 3
    full.collect()
    window.collect()
    assert (held_by(full), held_by(window)) == (keys(3, 4, 5), keys(4, 5))
    assert pools.retain(keys(3, 4, 5), 0) == 3
    pools.need("ses_a", keys(3, 4, 5))
    pools.supersede(keys(4), "ses_b")
    pools.supersede(keys(5), "ses_a")
    for store in (full, window):
        store.quota = Quota(store.stats.bytes)
        store.make_room(1)
    assert (held_by(full), held_by(window)) == (keys(3, 4), keys(4)), "ses_a needs what ses_b has released"
    assert StoredPools([], stage._open_store, Settings()).retain(keys(1), 1.0) == 0


def test_all_pools_are_told_what_a_session_needs_and_tell_whose_pages_they_lost(
    stage: Stage, opened: Callable[..., StoredPools]
) -> None:
    pools = opened(PoolName.KV, PoolName.SWA)
    full, window = stage.stores[PoolName.KV], stage.stores[PoolName.SWA]
    for number in range(6):
        write(full, keys(number))
        write(window, keys(number))
    pools.need("ses_gone", keys(4, 5))
    pools.need_only((session, chain) for session, chain in [("ses_a", keys(0, 1, 2)), ("ses_b", keys(0, 1, 3))])
    full.collect()
    window.collect()
    assert held_by(full) == keys(0, 1, 2, 3)
    assert held_by(window) == keys(1, 2, 3)
    assert pools.take_losers() == set()
    drop(window, key(2))
    assert pools.take_losers() == {"ses_a"}
    drop(full, key(0))
    assert pools.take_losers() == {"ses_a", "ses_b"}


def test_pages_that_others_deleted_count_as_lost(stage: Stage, opened: Callable[..., StoredPools]) -> None:
    pools = opened(PoolName.KV)
    store = stage.stores[PoolName.KV]
    write(store, keys(1, 2))
    before = pools.lost
    shutil.rmtree(store.directory)
    store.attend()
    assert pools.lost == before + 2
    assert pools.take_losers() == {ANYONE}


def test_after_a_move_pages_of_the_same_keys_are_those_of_the_other_store(stage: Stage, tmp_path: Path) -> None:
    pools = stage.open(PoolName.KV, PoolName.SWA)

    def store_of(weights: str) -> Callable[[DevicePool], PageStore]:
        def open_store(pool: DevicePool) -> PageStore:
            mark = fingerprint(pool=pool.name, weights=weights)
            directory = tmp_path / weights / pool.name
            stage.stores[pool.name] = PageStore(directory, mark, pool.device_pages.geometry)
            return stage.stores[pool.name]

        return open_store

    def both(numbers: Sequence[int]) -> list[PoolTransfer]:
        return [transfer(name, range(1, 4), slots(*numbers)) for name in (PoolName.KV, PoolName.SWA)]

    old = {name: [page_of(tensors, n) for n in (4, 5, 6)] for name, tensors in stage.tensors.items()}
    assert offered(pools, *both([4, 5, 6]))
    before = dict(stage.stores)
    fraction = pools.prefetch("ses", keys(1, 2, 3), 60)
    while fraction() is None:
        pass
    assert pools.staged_for(keys(1, 2, 3))

    assert pools.move(store_of("new"), 60)
    assert pools.durable(keys(1, 2, 3)) == 0
    # What was read from the store before has the same keys, and is not that of these weights.
    assert not pools.staged_for(keys(1, 2, 3))
    assert pools.prefetch("ses", keys(1, 2, 3), 60)() == 0.0
    for tensors in stage.tensors.values():
        for layer in tensors:
            for tensor in layer:
                tensor.add_(1)
    new = {name: [page_of(tensors, n) for n in (4, 5, 6)] for name, tensors in stage.tensors.items()}
    assert new != old
    assert offered(pools, *both([4, 5, 6]))

    def restored() -> dict[PoolName, list[Any]]:
        transfers = both([10, 11, 12])
        assert pools.load("r", [transfers[0], transfer(PoolName.SWA, [2, 3], slots(11, 12))])
        assert pools.finish(pools.start(())).failed == set()
        return {name: [page_of(tensors, n) for n in (11, 12)] for name, tensors in stage.tensors.items()}

    assert restored() == {name: pages[1:] for name, pages in new.items()}
    # And back, where the pages of before still are.
    assert pools.move(store_of_directory(before, stage), 60)
    assert pools.durable(keys(1, 2, 3)) == 3
    assert restored() == {name: pages[1:] for name, pages in old.items()}
    pools.finish_spilling(60)
    pools.close()


def store_of_directory(before: dict[PoolName, PageStore], stage: Stage) -> Callable[[DevicePool], PageStore]:
    """Opens the stores again that were open ``before``."""

    def open_store(pool: DevicePool) -> PageStore:
        was = before[pool.name]
        return PageStore(was.directory, was.fingerprint, was.geometry)

    return open_store


def test_a_store_that_cannot_be_opened_leaves_all_as_they_are(stage: Stage, tmp_path: Path) -> None:
    pools = stage.open(PoolName.KV, PoolName.SWA)
    transfers = [transfer(name, [1], slots(4)) for name in (PoolName.KV, PoolName.SWA)]
    opened: list[PageStore] = []

    def open_store(pool: DevicePool) -> PageStore:
        if opened:
            raise PageStoreLocked("another engine has it")
        opened.append(PageStore(tmp_path / "new", fingerprint(weights="new"), pool.device_pages.geometry))
        return opened[-1]

    with pytest.raises(PageStoreLocked):
        pools.move(open_store, 60)
    PageStore(tmp_path / "new", fingerprint(weights="new"), opened[0].geometry).close()  # its lock is free
    assert offered(pools, *transfers)
    assert pools.durable(keys(1)) == 1
    pools.finish_spilling(60)
    pools.close()


def damage(store: PageStore, page: object) -> None:
    """Flip one bit of a stored page."""
    with store.pin(keys(page)) as pin:
        (segment,) = pin.segments
    offset, _ = segment.extent.layout.component_range(1, 0, segment.slot, 1)
    with segment.extent.path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def open_extents() -> list[str]:
    """The extents that this process has open."""
    paths = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            paths.append(os.readlink(descriptor))
    return [path for path in paths if path.endswith(".ext")]


@pytest.mark.parametrize("host_bytes", [0, 64 << 10], ids=["without a host tier", "with one"])
@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_left_of_a_storm(
    stage: Stage, opened: Callable[..., StoredPools], seed: int, host_bytes: int
) -> None:
    names = (PoolName.KV, PoolName.SWA)
    stage.host_bytes = host_bytes
    pools, dice = opened(*names), random.Random(seed)
    fresh = pools.kept()
    assert fresh and not any(fresh.values())
    pages = list(range(12))
    running: list[int] = []
    seen: set[str] = set()

    def transfers(first: int, count: int) -> list[PoolTransfer]:
        some = pages[first : first + count]
        return [transfer(name, some, slots(*(1 + page for page in some))) for name in names]

    def look() -> None:
        seen.update(name for name, count in pools.kept().items() if count)

    def offer() -> None:
        pools.offer(transfers(dice.randrange(8), dice.randint(1, 4)), tuple)

    def take() -> None:
        while pools.results:
            pools.pop_result()
        while pools.demoted:
            pools.pop_demoted()

    def demote() -> None:
        assert pools.demote(transfers(dice.randrange(8), dice.randint(1, 4)), tuple) is bool(host_bytes)

    def spoil() -> None:
        some = [run for run, _ in pools.host_tier._runs.values()] if pools.host_tier is not None else []
        if some:
            dice.choice(some).rows(dice.randrange(3))[0][0, 0] ^= 1

    def load() -> None:
        for _ in range(dice.randint(1, 3)):
            pools.load(f"r{dice.random()}", transfers(dice.randrange(8), dice.randint(1, 4)))
        look()
        if dice.random() < 0.3:
            assert pools.load("gone", transfers(0, 1))
            assert pools.cancel("gone")
        running.append(pools.start(()))

    def finish() -> None:
        if running:
            index = running.pop(dice.randrange(len(running)))
            if dice.random() < 0.3:
                pools.gate.abandon(index)
            pools.gate.set_consumer(index)
            pools.gate.wait_until(dice.randrange(6))
            pools.finish(index)

    def ahead() -> None:
        pools.read_ahead(f"q{dice.random()}", keys(*pages[: dice.randint(1, 8)]))
        pools.prefetch(f"s{dice.randrange(3)}", keys(*pages[: dice.randint(1, 8)]), ttl_s=0)

    def break_one() -> None:
        with contextlib.suppress(KeyError):
            damage(stage.stores[dice.choice(names)], dice.choice(pages))

    def lose() -> None:
        drop(stage.stores[dice.choice(names)], *keys(dice.choice(pages)))

    def settle() -> None:
        chain = keys(*pages[: dice.randint(1, 12)])
        pools.then(lambda: pools.merge(chain))

    def reset() -> None:
        running.clear()
        pools.reset()

    for name in names:
        write(stage.stores[name], keys(*pages))
    load()
    storm = [offer, offer, offer, take, load, load, finish, ahead, break_one, lose, settle, demote, demote, spoil]
    for _ in range(150):
        dice.choice(storm)()
        look()
        if dice.random() < 0.02:
            reset()
    while running:
        finish()
    # Enough of it was there to be left.
    assert seen >= {"streams", "pinned_extents", "queued_loads", "batches", "awaited_batches", "budgeted_offers"}
    assert not host_bytes or seen >= {"demotions", "host_streams"}
    deadline = time.monotonic() + 60
    while (kept := pools.kept()) != fresh:
        assert time.monotonic() < deadline, {name: count for name, count in kept.items() if count}
        take()
        pools.tidy(set)
    assert open_extents() == []


def test_pages_are_erased_in_every_pool(stage: Stage, opened: Callable[..., StoredPools]) -> None:
    pools = opened(PoolName.KV, PoolName.SWA)
    write(stage.stores[PoolName.KV], keys(1, 2, 3))
    write(stage.stores[PoolName.SWA], keys(2, 3, 4))
    assert pools.held(keys(1, 2, 3, 4, 5)) == [True, True, True, True, False]
    before = pools.lost
    pools.prefetch("s", keys(2, 3), 60)
    pools.remove(keys(2, 4))
    assert pools.held(keys(1, 2, 3, 4)) == [True, False, True, False]
    assert pools.lost == before + 3
    for _ in range(600):
        if pools.scrub(keys(2, 4), lambda: False):
            break
        time.sleep(0.1)
    for store in stage.stores.values():
        assert traces(store.directory, store.geometry, keys(2, 4)) == set()
        assert traces(store.directory, store.geometry, keys(3)) == set(keys(3))


def test_nothing_is_held_where_nothing_is_stored(opened: Callable[..., StoredPools]) -> None:
    assert opened().held(keys(1, 2)) == [False, False]
    assert opened().scrub(keys(1), lambda: False)


NODE = [PoolName.KV, PoolName.SWA, PoolName.MAMBA]


def node(stage: Stage) -> list[PoolTransfer]:
    """A node of the pages 1, 2 and 3. The first has left the window, and the last has a state."""
    return [
        transfer(PoolName.KV, [1, 2, 3], slots(4, 5, 6)),
        transfer(PoolName.SWA, [1, 2, 3], torch.cat([torch.zeros(PAGE_SIZE, dtype=torch.int64), slots(9, 2)])),
        transfer(PoolName.MAMBA, [3], torch.tensor([3])),
    ]


def elsewhere() -> list[PoolTransfer]:
    return [
        transfer(PoolName.KV, [1, 2, 3], slots(10, 11, 12)),
        transfer(PoolName.SWA, [2, 3], slots(1, 7)),
        transfer(PoolName.MAMBA, [3], torch.tensor([7])),
    ]


def has_come(stage: Stage) -> bool:
    full = all(page_of(stage.full, new) == page_of(stage.full, old) for new, old in ((10, 4), (11, 5), (12, 6)))
    window = all(page_of(stage.window, new) == page_of(stage.window, old) for new, old in ((1, 9), (7, 2)))
    return full and window and all(torch.equal(as_bytes(rows[7]), as_bytes(rows[3])) for (rows,) in stage.state)


def demoted(pools: StoredPools, transfers: Sequence[PoolTransfer]) -> bool:
    assert pools.demote(transfers, tuple)
    assert pools.host_tier is not None
    pools.host_tier.drain()
    return pools.pop_demoted()


def test_what_a_node_has_in_each_pool_is_demoted_and_comes_back(
    stage: Stage, opened: Callable[..., StoredPools]
) -> None:
    stage.host_bytes = 1 << 20
    pools = opened(*NODE)
    assert offered(pools, *node(stage)) and demoted(pools, node(stage))
    assert pools.in_host_memory(keys(0, 1, 2, 3)) == [False, True, True, True] and pools.staged_for(keys(1, 2, 3))
    assert pools.load("r", elsewhere())
    found = pools.finish(pools.start(()))
    assert found.failed == set() and found.restored is not None and found.restored.sources == {Source.HOST}
    assert has_come(stage)
    stat = pools.stat()
    assert [pool["host"]["pages"] for pool in (stat, *stat["pools"].values())] == [3, 2, 1]
    assert stat["host"]["bound"] == 1 << 20 and stat["restore"]["bytes_read"] == 0


@pytest.mark.parametrize("pool", NODE, ids=str)
def test_a_page_that_is_wrong_in_one_pool_is_read_from_the_drive(
    stage: Stage, opened: Callable[..., StoredPools], pool: PoolName
) -> None:
    stage.host_bytes = 1 << 20
    pools = opened(*NODE)
    assert offered(pools, *node(stage)) and demoted(pools, node(stage))
    (run,) = [
        run for run, of_pool in pools.host_tier._runs.values() if of_pool.fingerprint == stage.stores[pool].fingerprint
    ]
    run.rows(1)[0][-1, 5] ^= 1
    assert pools.load("r", elsewhere())
    assert pools.finish(pools.start(())).failed == {"r"}
    assert pools.restorable_for("r", keys(1, 2, 3)) == [3], "all of it is stored"
    assert pools.load("r", elsewhere())
    found = pools.finish(pools.start(()))
    assert found.failed == set() and found.restored is not None
    assert found.restored.sources == {Source.HOST, Source.COLD} and has_come(stage)


def test_erased_pages_leave_the_host_tier(stage: Stage, opened: Callable[..., StoredPools]) -> None:
    stage.host_bytes = 1 << 20
    pools = opened(*NODE)
    assert offered(pools, *node(stage)) and demoted(pools, node(stage))
    pools.remove(keys(3))
    stat = pools.stat()
    assert [pool["host"]["pages"] for pool in (stat, *stat["pools"].values())] == [0, 0, 0]
    assert stat["host"]["used"] == 0


def test_what_was_copied_with_other_weights_is_forgotten(stage: Stage, tmp_path: Path) -> None:
    stage.host_bytes = 1 << 20
    pools = stage.open(*NODE)
    assert offered(pools, *node(stage)) and demoted(pools, node(stage))

    def other(pool: DevicePool) -> PageStore:
        mark = fingerprint(pool=pool.name, weights="new")
        return PageStore(tmp_path / "new" / pool.name, mark, pool.device_pages.geometry)

    assert pools.move(other, 60)
    assert pools.in_host_memory(keys(1, 2, 3)) == [False] * 3 and pools.stat()["host"]["used"] == 0
    assert not demoted(pools, node(stage)), "it is not stored"
    assert offered(pools, *node(stage)) and demoted(pools, node(stage))
    assert pools.load("r", elsewhere())
    assert pools.finish(pools.start(())).failed == set() and has_come(stage)
    pools.finish_spilling(60)
    pools.close()


def test_a_prefetch_reads_into_the_host_tier(stage: Stage, opened: Callable[..., StoredPools]) -> None:
    stage.host_bytes = 1 << 20
    pools = opened(PoolName.KV, PoolName.SWA)
    for name in (PoolName.KV, PoolName.SWA):
        write(stage.stores[name], keys(*range(6)))
    fraction = pools.prefetch("s", keys(*range(6)), 60)
    while fraction() is None:
        pass
    assert fraction() == 1.0 and pools.in_host_memory(keys(*range(6))) == [True] * 6
    stat = pools.stat()
    assert [pool["host"]["pages_fetched"] for pool in (stat, *stat["pools"].values())] == [6, WINDOW]
    assert stat["prefetch"]["issued"] == 0 and not any(pools.kept().values())


@pytest.mark.parametrize("waits", ["drain", "reset"])
def test_the_device_is_not_changed_before_copies_of_it_are_over(
    stage: Stage, opened: Callable[..., StoredPools], waits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.host_bytes = 1 << 20
    pools = opened(*NODE)
    assert offered(pools, *node(stage))
    begun, goes_on, order = threading.Event(), threading.Event(), list[str]()
    device = pools.device_pages[PoolName.KV]
    gather = device.gather

    def slowly(*arguments: Any) -> None:
        begun.set()
        assert goes_on.wait(60)
        gather(*arguments)
        order.append("copied")

    monkeypatch.setattr(device, "gather", slowly)
    assert pools.demote(node(stage), tuple) and begun.wait(60)

    def quiesce() -> None:
        getattr(pools, waits)()
        order.append(waits)

    waiting = threading.Thread(target=quiesce)
    waiting.start()
    waiting.join(0.1)  # time enough to be wrong
    goes_on.set()
    waiting.join(60)
    assert order == ["copied"] * 3 + [waits]
    assert pools.demoted == (1 if waits == "drain" else 0)


def test_without_a_host_tier_nothing_is_demoted(stage: Stage, opened: Callable[..., StoredPools]) -> None:
    pools = opened(PoolName.KV)
    assert not pools.demote([transfer(PoolName.KV, [1], slots(4))], tuple)
    assert (pools.demoted, pools.in_host_memory(keys(1))) == (0, [False])
    assert pools.stat()["host"]["bound"] == 0
    assert opened().stat()["host"]["bound"] == 0


@pytest.mark.parametrize("priorities", [True, False])
def test_what_is_needed_first_is_read_first_in_every_pool(
    stage: Stage, opened: Callable[..., StoredPools], priorities: bool
) -> None:
    """Turned off, it is read in the order in which it was asked for."""
    stage.read_priorities = priorities
    names = (PoolName.KV, PoolName.SWA, PoolName.MAMBA)
    pools = opened(*names)
    for store in stage.stores.values():
        write(store, keys(*range(4)))
    need = Need(Urgency.DUE, 5.0)
    pools.prefetch("s", keys(*range(4)), 60, need)
    streams = [reading.stream for pool in pools._pools for reading in pool.restorer.prefetches._readings]
    assert [stream.needed for stream in streams] == [need if priorities else PLANNED] * len(names)
    to = {PoolName.KV: slots(1), PoolName.SWA: slots(2), PoolName.MAMBA: torch.tensor([1])}
    index = pools.preload("r", keys(0), to, (), DEMAND)
    assert streams[0].needed == (DEMAND if priorities else PLANNED)
    assert pools.finish(index).failed == set()
    reads = pools.stat()["reads"]
    assert sum(reads.values()) > 0
    assert set(reads) == {"awaited", "demand", "due", "planned"}


def test_what_follows_a_pool_has_of_its_memory_what_it_has_of_its_bytes() -> None:
    def pool(name: PoolName, n_bytes: int, follows: PoolName | None = None) -> Any:
        geometry = SimpleNamespace(page_bytes=n_bytes)
        return SimpleNamespace(name=name, follows=follows, device_pages=SimpleNamespace(geometry=geometry))

    pools = [pool(PoolName.KV, 800), pool(PoolName.MAMBA, 5), pool(PoolName.INDEXER, 150, PoolName.KV)]
    pools.append(pool(PoolName.DRAFT, 50, PoolName.KV))
    assert _parts(pools) == [Fraction(2, 5), Fraction(1, 2), Fraction(3, 40), Fraction(1, 40)]
    assert _parts(pools[:1]) == [1]
