"""Full attention with what a draft keeps beside it, a sliding window and a recurrent state together, as the linker
drives them, beside a late forward."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from contents import keys

from agentstate.pages import DEMAND, PLANNED, Need, PageStore, Urgency, fingerprint
from agentstate.settings import Settings
from engine_patch.pools import DevicePool
from engine_patch.sglang_api import PoolName, PoolTransfer
from engine_patch.stored_pools import StoredPools
from late.device import LateDevice

PAGE_SIZE, PAGES, WINDOW = 4, 24, 2
# Of each pool: the model's layers, the shape of a row, how many of them are a page, how many components.
POOLS = {
    PoolName.KV: ((1, 3, 5), (2, 10), PAGE_SIZE, 2),
    PoolName.SWA: ((0, 2, 4), (2, 10), PAGE_SIZE, 1),
    PoolName.MAMBA: ((6, 7, 8), (3, 5), 1, 1),
    # A draft begins after the forward: its pages are waited for with the last layer of full attention.
    PoolName.DRAFT: ((5,), (2, 10), PAGE_SIZE, 2),
}
FOLLOWS = {PoolName.DRAFT: PoolName.KV}
NODE = ["a", "b", "c"]
# Which pages of the node each pool has, and where; and where they are restored to.
FROM = {PoolName.KV: [2, 9, 4], PoolName.SWA: [6, 3], PoolName.MAMBA: [5], PoolName.DRAFT: [2, 9, 4]}
TO = {PoolName.KV: [20, 11, 15], PoolName.SWA: [8, 1], PoolName.MAMBA: [7], PoolName.DRAFT: [20, 11, 15]}


class Stage:
    def __init__(self, device: LateDevice, directory: Path):
        self.device = device
        self.stores: dict[PoolName, PageStore] = {}
        self.tensors = {
            name: [
                tuple(torch.zeros((PAGES * rows + 1, *shape), device="cuda") for _ in range(components)) for _ in layers
            ]
            for name, (layers, shape, rows, components) in POOLS.items()
        }
        device.synchronize()
        self.stream = torch.cuda.Stream()
        self._directory = directory
        self._kept: list[torch.Tensor] = []

    def open(self) -> StoredPools:
        pools = [
            DevicePool(name, self.tensors[name], rows, layers, ("float32",), window, follows=FOLLOWS.get(name))
            for (name, (layers, _, rows, _)), window in zip(POOLS.items(), (None, WINDOW, 1, None), strict=True)
        ]
        settings = Settings(staging_bytes=1 << 20, spill_staging_bytes=1 << 20, read_threads=1)
        return StoredPools(pools, self._open_store, settings)

    def _open_store(self, pool: DevicePool) -> PageStore:
        store = PageStore(self._directory / pool.name, fingerprint(pool=pool.name), pool.device_pages.geometry)
        self.stores[pool.name] = store
        return store

    def rows(self, name: PoolName, layer: int, component: int, page: int) -> torch.Tensor:
        size = POOLS[name][2]
        return self.tensors[name][layer][component][page * size : (page + 1) * size].view(torch.uint8).reshape(-1)

    def parts(self, name: PoolName) -> list[tuple[int, int]]:
        layers, _, _, components = POOLS[name]
        return [(layer, component) for layer in range(len(layers)) for component in range(components)]

    def compute(self, places: dict[PoolName, list[int]], seed: int) -> list[torch.cuda.Event]:
        """Queue a forward that writes random bytes to these pages: the events after it."""
        random = np.random.default_rng(seed)
        for name, pages in places.items():
            for page in pages:
                for layer, component in self.parts(name):
                    target = self.rows(name, layer, component, page)
                    self._kept.append(torch.from_numpy(random.integers(0, 256, len(target), np.uint8)).to("cuda"))
                    with torch.cuda.stream(self.stream):
                        target.copy_(self._kept[-1])
        event = torch.cuda.Event()
        event.record(self.stream)
        return [event]

    def written(self, name: PoolName, pages: Sequence[int]) -> list[list[int]]:
        self.device.synchronize()
        return [self.rows(name, *part, page).tolist() for page in pages for part in self.parts(name)]

    def run(self, pools: StoredPools, index: int) -> dict[tuple[PoolName, int, int, int], torch.Tensor]:
        """A forward that reads every layer of the model once its gate is open: what it reads, late."""
        pools.gate.set_consumer(index)
        read = {}
        for model_layer in range(9):
            pools.gate.wait_until(model_layer)
            for name, (layers, *_) in POOLS.items():
                if model_layer in layers:
                    with torch.cuda.stream(self.stream):
                        for page in TO[name]:
                            for layer, component in self.parts(name):
                                if layer == layers.index(model_layer):
                                    rows = self.rows(name, layer, component, page)
                                    read[name, page, layer, component] = rows.clone()
        return read


@pytest.fixture
def stage(device: LateDevice, tmp_path: Path) -> Stage:
    return Stage(device, tmp_path)


@pytest.fixture
def pools(stage: Stage) -> Iterator[StoredPools]:
    pools = stage.open()
    yield pools
    pools.finish_spilling(60)
    pools.close()


def transfers(places: dict[PoolName, list[int]]) -> list[PoolTransfer]:
    """As SGLang gives them: its slots are on the device; what has left the window has those of the empty first page. It
    gives none for what follows another pool."""
    made = []
    for name, pages in places.items():
        if name in FOLLOWS:
            continue
        size = POOLS[name][2]
        names = NODE[-len(pages) :]
        slots = torch.cat([torch.arange(page * size, (page + 1) * size) for page in pages])
        made.append(PoolTransfer(name=name, keys=[key.hex() for key in keys(*names)], device_indices=slots.to("cuda")))
    return made


def offer(pools: StoredPools, places: dict[PoolName, list[int]], ready: Callable[[], Sequence[torch.Event]]) -> bool:
    assert pools.offer(transfers(places), ready)
    done = threading.Event()
    pools.then(done.set)
    assert done.wait(60)
    return pools.pop_result()


def test_a_node_comes_back_in_all_pools_to_a_forward_that_is_late(stage: Stage, pools: StoredPools) -> None:
    written = stage.compute(FROM, seed=1)
    assert offer(pools, FROM, lambda: written)
    right = {name: stage.written(name, pages) for name, pages in FROM.items()}
    # Its pages are freed; those that it is restored to were another request's until now.
    stage.compute(FROM, seed=2)
    before = stage.compute(TO, seed=3)
    assert pools.load("r", transfers(TO))
    index = pools.start(before)
    read = stage.run(pools, index)
    assert pools.finish(index).failed == set()
    with torch.cuda.stream(stage.stream):
        for name, pages in TO.items():
            seen = [read[name, page, *part].tolist() for page in pages for part in stage.parts(name)]
            assert seen == right[name]


def needed(pages: list[int]) -> dict[PoolName, list[int]]:
    """Which of the pages that the node is preloaded to each pool needs, all of them at the same places."""
    return {name: pages[-len(FROM[name]) :] for name in POOLS}


def slots(pages: dict[PoolName, list[int]]) -> dict[PoolName, torch.Tensor]:
    """The same as slots, of the pools of the tree."""

    def of_pool(name: PoolName) -> torch.Tensor:
        size = POOLS[name][2]
        return torch.cat([torch.arange(page * size, (page + 1) * size) for page in pages[name]]).to("cuda")

    return {name: of_pool(name) for name in POOLS if name not in FOLLOWS}


def test_what_is_preloaded_is_there_when_it_has_landed(stage: Stage, pools: StoredPools) -> None:
    """A session is brought to the device, into slots that were another's, beside a request that is restored."""
    written = stage.compute(FROM, seed=1)
    assert offer(pools, FROM, lambda: written)
    right = {name: stage.written(name, FROM[name]) for name in POOLS}
    ahead_pages = needed([22, 12, 18])
    before = stage.compute({name: [*TO[name], *ahead_pages[name]] for name in POOLS}, seed=2)
    ahead = pools.preload("a prefetch", keys(*NODE), slots(ahead_pages), before)
    assert pools.finish(ahead).failed == set()
    assert pools.landed(ahead)
    assert {name: stage.written(name, ahead_pages[name]) for name in POOLS} == right


def test_preloads_of_every_urgency_are_there_when_they_have_landed(stage: Stage, pools: StoredPools) -> None:
    """They run at once, and share a lane."""
    written = stage.compute(FROM, seed=1)
    assert offer(pools, FROM, lambda: written)
    right = {name: stage.written(name, FROM[name]) for name in POOLS}
    places = {DEMAND: [22, 12, 18], Need(Urgency.DUE, 1.0): [14, 20, 16], PLANNED: [8, 23, 11]}
    ahead_pages = {need: needed(pages) for need, pages in places.items()}
    before = stage.compute({name: [page for of in ahead_pages.values() for page in of[name]] for name in POOLS}, seed=2)
    begun = {}
    for need, pages in ahead_pages.items():
        begun[need] = pools.preload("a prefetch", keys(*NODE), slots(pages), before, need)
    pools.hasten(begun[PLANNED], DEMAND)
    for need, ahead in begun.items():
        assert pools.finish(ahead).failed == set()
        assert {name: stage.written(name, ahead_pages[need][name]) for name in POOLS} == right


def test_an_aborted_request_is_aborted_in_all_pools(stage: Stage, pools: StoredPools) -> None:
    written = stage.compute(FROM, seed=1)
    assert offer(pools, FROM, lambda: written)
    assert pools.load("aborted", transfers(TO))
    assert pools.cancel("aborted")
    assert pools.start(()) == -1
    stage.compute(TO, seed=2)
    computed = {name: stage.written(name, pages) for name, pages in TO.items()}
    pools.drain()
    assert {name: stage.written(name, pages) for name, pages in TO.items()} == computed


@pytest.mark.parametrize("pool", list(POOLS), ids=lambda pool: pool.name)
def test_memory_that_one_pool_does_not_get_fails_the_request_in_all(
    stage: Stage, pools: StoredPools, pool: PoolName, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = stage.compute(FROM, seed=1)
    assert offer(pools, FROM, lambda: written)

    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("of this test")

    monkeypatch.setattr(pools.device_pages[pool], "scatter", no_memory)
    assert pools.load("r", transfers(TO))
    index = pools.start(())
    stage.run(pools, index)
    found = pools.finish(index)
    assert (found.failed, found.restored) == ({"r"}, None)
    stage.compute(TO, seed=2)
    stage.stream.synchronize()
    recomputed = {name: stage.written(name, pages) for name, pages in TO.items()}
    pools.drain()
    assert {name: stage.written(name, pages) for name, pages in TO.items()} == recomputed
