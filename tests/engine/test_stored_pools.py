from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from contents import key, keys, write
from device import PAGE_SIZE, PAGES, fill, kv_tensors, page_of

from agentstate.pages import PageStore, Quota, fingerprint
from agentstate.settings import Settings
from engine_patch.pools import DevicePool
from engine_patch.sglang_api import PoolName, PoolTransfer
from engine_patch.stored_pools import LayerGate, StoredPools
from engine_patch.transfer import DevicePages

WINDOW = 2


class Stage:
    """A rank with full attention in layers 1, 3 and 5, a window of two pages in 0, 2 and 4, and a state in 6, 7 and
    8. ``stores`` are what the pools write to."""

    def __init__(self, directory: Path):
        self.full, self.window = kv_tensors(), kv_tensors(components=1)
        self.state = [(torch.zeros(9, 3, 5),) for _ in range(3)]
        for tensors in (self.full, self.window, self.state):
            fill(tensors)
        self.stores: dict[PoolName, PageStore] = {}
        self._directory = directory

    def open(self, *names: PoolName) -> StoredPools:
        known = {
            PoolName.KV: DevicePool(PoolName.KV, self.full, PAGE_SIZE, (1, 3, 5), ("float32",)),
            PoolName.SWA: DevicePool(PoolName.SWA, self.window, PAGE_SIZE, (0, 2, 4), ("float32",), WINDOW),
            PoolName.MAMBA: DevicePool(PoolName.MAMBA, self.state, 1, (6, 7, 8), ("float32",), 1),
        }
        settings = Settings(staging_bytes=1 << 20, spill_staging_bytes=1 << 20, read_threads=1)
        return StoredPools([known[name] for name in names], self._open_store, settings)

    def _open_store(self, pool: DevicePool, pages: DevicePages) -> PageStore:
        store = PageStore(self._directory / pool.name, fingerprint(pool=pool.name), pages.geometry)
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
    assert pools.offer(transfers, ())
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
            for number in range(7):
                store.drop(key(number))
            if numbers:
                write(store, keys(*numbers))
        right = [
            length
            for length in range(1, 8)
            if all(set(range(max(0, length - windows[name]), length)) <= set(held[name]) for name in names)
        ]
        assert pools.restorable(keys(*range(7))) == right


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
    failed, restored, _ = pools.finish(index)
    assert failed == set()
    # Of all pools, once; its pages are those of full attention.
    assert restored is not None and (restored.requests, restored.pages) == (1, 3)
    assert restored.n_bytes >= pools.n_bytes(3)
    assert 0 < restored.waited_s <= pools.gate.waited_s
    assert [page_of(stage.full, n)[layer] for n in (10, 11, 12) for layer in range(3)] == [
        page[layer] for page in right for layer in range(3)
    ]
    assert [page_of(stage.window, n) for n in (1, 2)] == window
    assert all(
        torch.equal(tensor[7], kept)
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
    (segment,) = stage.stores[PoolName.SWA].hold(keys(2)).segments
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
    assert pools.finish(pools.start(())).failed == {"r2"}
    assert pools.restorable(keys(2)) == []
    assert pools.restorable(keys(1)) == [1]
    stat = pools.stat()
    assert stat["restore"]["pages_failed"] == 0
    assert stat["pools"]["swa"]["restore"]["pages_failed"] == 1


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
            (),
        )
        pools.then(lambda page=page: seen.append(pools.restorable(keys(*range(1, page + 1)))))
    pools.reset()
    assert seen == [list(range(1, page + 1)) for page in range(1, 6)]


def test_without_pools_nothing_is_stored_and_nothing_is_found(opened: Callable[..., StoredPools]) -> None:
    pools = opened()
    pages = transfer(PoolName.KV, [1], slots(1))
    assert not pools.offer([pages], ())
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
