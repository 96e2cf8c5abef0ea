"""Restores by choice: the rows that are named are there before a forward reads them, and nobody reads others."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from contents import MARK, content, key, keys, reader_for, write
from device import LAYERS, PAGE_SIZE, PAGES, Rank, kv_tensors, page_of
from sglang.srt.runtime_context import get_parallel

from agentstate.pages import PageStore, fingerprint, staging_memory
from agentstate.pages import native as native_pages
from agentstate.pages.rows import RowReader, RowStream
from agentstate.settings import Settings
from engine_patch import choice, flags, versions
from engine_patch.arrivals import Arrivals, LayerGate
from engine_patch.choice import ChoiceRestorer
from engine_patch.cpu.attention import CpuAttention
from engine_patch.feeds import Source
from engine_patch.pools import DevicePool
from engine_patch.sglang_api import DSATokenToKVPool, PagedTokenToKVPoolAllocator, PoolName, PoolTransfer
from engine_patch.stored_pools import StoredPools
from engine_patch.transfer import DevicePages

POISON = b"\xff"
EXTENTS = ([0, 1, 2, 3], [4, 5], [6, 7])
PATIENCE_S = 60.0
Make = Callable[..., ChoiceRestorer]


@pytest.fixture(params=[False, True], ids=["unaligned", "aligned"])
def rank(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rank]:
    """Eight pages are stored, in three extents, and every row of the device is poisoned."""
    rank = Rank(tmp_path / "rank0", addressable=request.param)
    rank.store.close()
    rank.store = PageStore(tmp_path / "rows", MARK, rank.pages.geometry, rows=True)
    for extent in EXTENTS:
        rank.write(keys(*extent))
    poison(rank)
    yield rank
    rank.close()


@pytest.fixture
def make(rank: Rank) -> Iterator[Make]:
    made: list[ChoiceRestorer] = []

    def make(timeout_s: float = PATIENCE_S) -> ChoiceRestorer:
        reader, rows = reader_for(rank.store.geometry), RowReader(rank.store.geometry)
        made.append(ChoiceRestorer(rank.store, rank.pages, reader, rows, timeout_s))
        return made[-1]

    yield make
    for restorer in made:
        restorer.close()


@pytest.fixture
def restorer(make: Make) -> ChoiceRestorer:
    return make()


def poison(rank: Rank) -> None:
    for layer in rank.tensors:
        for tensor in layer:
            tensor.view(torch.uint8).fill_(POISON[0])


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return True


def queue(restorer: ChoiceRestorer, rid: str, pages: Sequence[int], numbers: Sequence[int]) -> None:
    restorer.queue(rid, keys(*pages), torch.tensor(numbers))


def slots_of(*numbers: int) -> torch.Tensor:
    """All rows of device pages."""
    return torch.cat([torch.arange(number * PAGE_SIZE, (number + 1) * PAGE_SIZE) for number in numbers])


def row(rank: Rank, layer: int, slot: int) -> list[bytes]:
    return [part[slot].contiguous().view(torch.uint8).numpy().tobytes() for part in rank.tensors[layer]]


def written(rank: Rank, page: int, layer: int, offset: int) -> list[bytes]:
    """What was stored of a row."""
    geometry = rank.store.geometry
    found = []
    for component, n_bytes in enumerate(geometry.component_bytes):
        size = n_bytes // PAGE_SIZE
        found.append(content(geometry, key(page), layer, component)[offset * size : (offset + 1) * size])
    return found


def is_restored(rank: Rank, page: int, number: int) -> bool:
    geometry = rank.store.geometry
    return page_of(rank.tensors, number) == [
        [content(geometry, key(page), layer, component) for component in range(len(geometry.component_bytes))]
        for layer in range(geometry.layers)
    ]


def is_poisoned(rank: Rank, number: int, layer: int) -> bool:
    return all(set(part) == set(POISON) for part in page_of(rank.tensors, number)[layer])


def flip(rank: Rank, page: int, layer: int) -> None:
    with rank.store.pin(keys(page)) as pin:
        (segment,) = pin.segments
    offset = segment.extent.layout.component_range(layer, 1, segment.slot, 1)[0] + 5
    with segment.extent.path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x20]))


def hang(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Reads of pages wait until the event is set."""
    answers, real = threading.Event(), os.preadv

    def hangs(fd: int, buffers: list[object], offset: int) -> int:
        if offset:  # headers are read
            assert answers.wait(PATIENCE_S)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", hangs)
    return answers


def nothing_is_kept(restorer: ChoiceRestorer, rank: Rank) -> bool:
    return not any(restorer.kept().values()) and not rank.store.pinned


def test_what_is_named_is_there_and_nothing_else_is_read(rank: Rank, restorer: ChoiceRestorer) -> None:
    queue(restorer, "a", [0, 1, 2, 3, 4], [10, 11, 12, 13, 14])
    index = restorer.start()
    assert restorer.open
    restorer.require(1, torch.tensor([11 * PAGE_SIZE + 2, 14 * PAGE_SIZE, 3]))
    for page, number, offset in ((1, 11, 2), (4, 14, 0)):
        assert row(rank, 1, number * PAGE_SIZE + offset) == written(rank, page, 1, offset)
    assert all(is_poisoned(rank, number, layer) for number in range(10, 15) for layer in range(LAYERS) if layer != 1)
    # What lies in the same sectors comes as well.
    for slot in range(10 * PAGE_SIZE, 15 * PAGE_SIZE):
        page, offset = divmod(slot - 10 * PAGE_SIZE, PAGE_SIZE)
        assert row(rank, 1, slot) == written(rank, page, 1, offset) or set(b"".join(row(rank, 1, slot))) == set(POISON)
    if rank.pages.addressable:
        assert all(is_poisoned(rank, number, 1) for number in (10, 12, 13))
    assert restorer.trails(index) and not restorer.landed(index)
    found = restorer.finish(index)
    assert (found.failed, found.writing, found.unusable) == (set(), False, {})
    assert found.restored is not None
    of_request = found.restored.requests["a"]
    assert (of_request.pages, of_request.sources) == (5, {Source.COLD})
    assert of_request.n_bytes >= 5 * rank.store.geometry.page_bytes
    assert all(is_restored(rank, page, 10 + page) for page in range(5))
    assert eventually(lambda: nothing_is_kept(restorer, rank))
    assert not restorer.open


def test_rows_of_other_pages_are_not_waited_for(rank: Rank, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were on the device before, or are computed."""
    restorer = make()
    answers = hang(monkeypatch)
    queue(restorer, "a", [0, 1], [10, 11])
    index = restorer.start()
    restorer.require(0, slots_of(3, 12))
    answers.set()
    assert restorer.finish(index).failed == set()


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_named_in_whatever_order(rank: Rank, restorer: ChoiceRestorer, seed: int) -> None:
    """Several batches, each forward of which names rows of any of them, while others come behind."""
    chance = random.Random(seed)
    loads = {"a": ([0, 1, 2, 3], [10, 11, 12, 13]), "b": ([4, 5, 0], [5, 20, 7]), "c": ([6, 7, 2, 1], [2, 3, 16, 17])}
    where: dict[int, int] = {}
    begun: list[int] = []
    steps = [*loads, *["forward"] * 8, *["go on"] * 2]
    chance.shuffle(steps)
    for step in steps:
        if step in loads:
            queue(restorer, step, *loads[step])
            begun.append(restorer.start())
            where |= dict(zip(*reversed(loads[step]), strict=True))
        elif step == "go on" and begun:
            restorer.go_on(chance.choice(begun))
        elif step == "forward" and where:
            for layer in range(LAYERS):
                named = chance.choices([n * PAGE_SIZE + o for n in where for o in range(PAGE_SIZE)], k=5)
                restorer.require(layer, torch.tensor(named))
                for slot in named:
                    page, offset = where[slot // PAGE_SIZE], slot % PAGE_SIZE
                    assert row(rank, layer, slot) == written(rank, page, layer, offset)
    chance.shuffle(begun)
    for index in begun:
        assert restorer.finish(index).failed == set()
    assert all(is_restored(rank, page, number) for number, page in where.items())
    assert eventually(lambda: nothing_is_kept(restorer, rank))


@pytest.mark.parametrize("native", [True, False], ids=["native", "python"])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_bad_page_that_nobody_names_is_found_behind(
    rank: Rank, restorer: ChoiceRestorer, layer: int, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(native_pages, "library", None)
    flip(rank, 2, layer)
    queue(restorer, "a", [0, 1, 2, 3], [10, 11, 12, 13])
    queue(restorer, "b", [4, 5], [5, 6])
    index = restorer.start()
    for each in range(LAYERS):
        restorer.require(each, slots_of(10, 11, 5))
    assert restorer.trails(index)
    restorer.go_on(index)
    assert eventually(lambda: restorer.failing(index))
    assert not restorer.trails(index)
    found = restorer.finish(index)
    assert (found.failed, found.unusable) == ({"a"}, {"a": frozenset(keys(2))})
    assert found.restored is not None and set(found.restored.requests) == {"b"}
    assert is_restored(rank, 4, 5) and is_restored(rank, 5, 6)
    restorer.drain()
    assert [page for page in range(8) if key(page) not in rank.store] == [2]
    assert (restorer.stats.pages_failed, restorer.stats.requests_failed) == (1, 1)


def test_a_bad_row_that_is_named_is_known_when_the_forward_goes_on(rank: Rank, restorer: ChoiceRestorer) -> None:
    flip(rank, 1, 0)
    queue(restorer, "a", [0, 1], [10, 11])
    index = restorer.start()
    restorer.require(0, torch.tensor([10 * PAGE_SIZE]))
    assert restorer.trails(index)
    restorer.require(0, torch.tensor([11 * PAGE_SIZE + 3]))
    assert restorer.failing(index) and not restorer.trails(index)
    # It is lost anyway.
    restorer.require(1, slots_of(10, 11))
    assert is_poisoned(rank, 10, 1)
    assert restorer.finish(index).failed == {"a"}


def test_a_page_that_the_drive_fails_to_read_is_dropped_the_second_time(
    rank: Rank, restorer: ChoiceRestorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def fails(fd: int, buffers: list[object], offset: int) -> int:
        if offset:
            raise OSError(errno.EIO, "of the drive")
        return real(fd, buffers, offset)

    for pages_dropped in (0, 2):
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", fails)
            queue(restorer, "a", [4, 5], [10, 11])
            index = restorer.start()
            restorer.require(0, slots_of(10, 11))
            found = restorer.finish(index)
        assert (found.failed, found.unusable) == ({"a"}, {"a": frozenset(keys(4, 5))})
        restorer.drain()
        assert restorer.stats.pages_failed == pages_dropped
    assert key(4) not in rank.store and key(0) in rank.store


def test_a_drive_that_hangs_is_given_up(rank: Rank, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    restorer = make(timeout_s=0.05)
    answers = hang(monkeypatch)
    queue(restorer, "a", [0, 1, 2], [10, 11, 12])
    index = restorer.start()
    restorer.require(0, slots_of(11))
    assert restorer.arrivals.abandoned(index) and restorer.failing(index)
    restorer.require(1, slots_of(12))
    found = restorer.finish(index)
    assert (found.failed, found.restored, found.unusable, found.writing) == ({"a"}, None, {}, True)
    assert torch.cat([of_pool() for of_pool in found.numbers]).tolist() == [10, 11, 12]
    assert restorer.arrivals.stuck and restorer.stats.timed_out == 1
    answers.set()
    assert eventually(lambda: not restorer.arrivals.stuck)
    restorer.arrivals.tidy()
    assert eventually(lambda: nothing_is_kept(restorer, rank))
    # The pages are somebody else's now.
    poison(rank)
    restorer.drain()
    assert all(is_poisoned(rank, number, layer) for number in (10, 11, 12) for layer in range(LAYERS))


def test_a_forward_does_not_fail_where_rows_cannot_even_be_asked_for(
    rank: Rank, restorer: ChoiceRestorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise MemoryError("of this test")

    queue(restorer, "a", [0, 1], [10, 11])
    index = restorer.start()
    with monkeypatch.context() as patch:
        patch.setattr(RowStream, "_claim", fails)
        restorer.require(0, slots_of(10))
    assert restorer.failing(index)
    found = restorer.finish(index)
    assert (found.failed, found.unusable, found.writing) == ({"a"}, {"a": frozenset()}, False)
    restorer.drain()
    assert all(key(page) in rank.store for page in (0, 1))
    assert eventually(lambda: nothing_is_kept(restorer, rank))


def test_what_is_cancelled_is_read_no_more(rank: Rank, restorer: ChoiceRestorer) -> None:
    queue(restorer, "a", [0, 1], [10, 11])
    queue(restorer, "b", [2], [12])
    assert restorer.cancel("a") and not restorer.cancel("a")
    index = restorer.start()
    restorer.require(0, slots_of(10, 11, 12))
    assert restorer.finish(index).failed == set()
    assert all(is_poisoned(rank, number, layer) for number in (10, 11) for layer in range(LAYERS))
    assert is_restored(rank, 2, 12)
    assert eventually(lambda: nothing_is_kept(restorer, rank))


@pytest.mark.parametrize("prepare", ["staged", "missing"])
def test_a_batch_with_something_that_is_not_on_the_drive_alone_is_restored_whole(
    rank: Rank, restorer: ChoiceRestorer, prepare: str
) -> None:
    queue(restorer, "a", [0, 1], [10, 11])
    if prepare == "staged":
        restorer.prefetches.for_session("s", keys(6, 7), PATIENCE_S)
    queue(restorer, "b", [6, 7 if prepare == "staged" else 99], [5, 6])
    index = restorer.start()
    assert not restorer.open and not restorer.trails(index)
    assert restorer.finish(index).failed == (set() if prepare == "staged" else {"b"})
    assert is_restored(rank, 0, 10) and is_restored(rank, 1, 11)
    assert is_restored(rank, 6, 5) is (prepare == "staged")


def test_a_reset_leaves_nothing(rank: Rank, restorer: ChoiceRestorer) -> None:
    queue(restorer, "a", [0, 1], [10, 11])
    restorer.start()
    queue(restorer, "b", [2], [12])
    restorer.reset()
    assert nothing_is_kept(restorer, rank) and not restorer.open
    poison(rank)
    restorer.require(0, slots_of(10, 11, 12))
    assert is_poisoned(rank, 10, 0)


def gate_of(restorer: ChoiceRestorer) -> tuple[LayerGate, Arrivals]:
    """A gate for that pool and for an index beside it, whose arrivals are told by hand."""
    index = Arrivals(LAYERS, PATIENCE_S)
    return LayerGate({layer: [(restorer.arrivals, layer), (index, layer)] for layer in range(LAYERS)}, restorer), index


def test_a_reader_that_names_no_rows_waits_for_the_whole_layer(rank: Rank, restorer: ChoiceRestorer) -> None:
    gate, index = gate_of(restorer)
    queue(restorer, "a", [0, 1, 2, 3], [10, 11, 12, 13])
    batch = restorer.start()
    assert index.begin() == batch
    for layer in range(LAYERS):
        index.complete(batch, layer)
    gate.set_consumer(batch)
    gate.wait_until(0)
    assert not any(is_poisoned(rank, number, 0) for number in range(10, 14))
    # So does one of a later batch, which loads nothing.
    queue(restorer, "b", [4, 5], [5, 6])
    restorer.start()
    gate.set_consumer(-1)
    gate.wait_until(1)
    assert not any(is_poisoned(rank, number, 1) for number in (5, 6, *range(10, 14)))
    gate.wait_until(LAYERS - 1)
    assert all(is_restored(rank, page, number) for page, number in ((4, 5), (5, 6), (0, 10), (3, 13)))


def test_a_reader_that_names_rows_waits_for_these_and_for_the_index(
    rank: Rank, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    restorer = make()
    gate, index = gate_of(restorer)
    queue(restorer, "a", [0, 1], [10, 11])
    batch = restorer.start()
    index.begin()
    gate.set_consumer(batch)
    went_on = threading.Event()

    def forward() -> None:
        with gate.naming():
            gate.wait_until(0)
        went_on.set()

    thread = threading.Thread(target=forward)
    thread.start()
    assert not went_on.wait(0.05)
    index.complete(batch, 0)
    assert went_on.wait(PATIENCE_S)
    thread.join()
    assert is_poisoned(rank, 10, 0) and is_poisoned(rank, 11, 0)
    gate.wait_rows(0, torch.tensor([10 * PAGE_SIZE + 1]))
    assert row(rank, 0, 10 * PAGE_SIZE + 1) == written(rank, 0, 0, 1)
    # All pages of the other rank are in one sector.
    assert is_poisoned(rank, 11, 0) is rank.pages.addressable
    # Outside of it, the default again.
    gate.wait_until(0)
    assert not is_poisoned(rank, 11, 0)
    for layer in range(1, LAYERS):
        index.complete(batch, layer)
    assert gate.waited_s >= sum(gate.waited_for(batch)) > 0
    gate.set_consumer(-1)
    gate.wait_rows(1, torch.tensor([10 * PAGE_SIZE]))
    assert gate.kept == 0, "nobody asks for the waits of no batch"
    restorer.finish(batch)


@pytest.mark.parametrize("trailing", [False, True], ids=["alone", "beside one that trails"])
def test_a_reader_that_names_rows_waits_for_a_batch_that_is_restored_whole(
    rank: Rank, restorer: ChoiceRestorer, trailing: bool
) -> None:
    """Nothing else would wait for its rows."""
    gate, index = gate_of(restorer)
    if trailing:
        queue(restorer, "before", [0, 1], [10, 11])
        restorer.start()
        index.begin()
    restorer.prefetches.for_session("s", keys(4, 5), PATIENCE_S)
    queue(restorer, "a", [4, 5], [5, 6])
    may_begin = Begins()
    batch = restorer.start([may_begin])
    assert index.begin() == batch and not restorer.trails(batch)
    index.complete(batch, 0)
    gate.set_consumer(batch)
    went_on, read = threading.Event(), list[list[bytes]]()

    def forward() -> None:
        gate.wait_rows(0, slots_of(5))
        with gate.naming():
            gate.wait_until(0)
        read.append(row(rank, 0, 5 * PAGE_SIZE))
        went_on.set()

    thread = threading.Thread(target=forward)
    thread.start()
    assert may_begin.asked.wait(PATIENCE_S)
    went_on.wait(0.05)
    may_begin.now.set()
    assert went_on.wait(PATIENCE_S)
    thread.join()
    assert read == [written(rank, 4, 0, 0)]
    assert restorer.finish(batch).failed == set()


class Begins:
    """An event after which a batch may write to the device."""

    def __init__(self) -> None:
        self.asked, self.now = threading.Event(), threading.Event()

    def synchronize(self) -> None:
        self.asked.set()
        assert self.now.wait(PATIENCE_S)


def test_what_has_hung_in_one_pool_is_waited_for_in_no_other(
    rank: Rank, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    restorer = make(timeout_s=0.05)
    gate, index = gate_of(restorer)
    answers = hang(monkeypatch)
    queue(restorer, "a", [0], [10])
    batch = restorer.start()
    index.begin()
    gate.set_consumer(batch)
    gate.wait_rows(0, slots_of(10))
    assert index.abandoned(batch)
    with gate.naming():
        gate.wait_until(1)
    answers.set()
    restorer.finish(batch)


# Beside an index.


class Stage:
    """A rank whose KV is restored by choice, and an index that follows it."""

    def __init__(self, directory: Path):
        self.stores: dict[PoolName, PageStore] = {}
        self._directory = directory
        allocator = PagedTokenToKVPoolAllocator(PAGES * PAGE_SIZE, PAGE_SIZE, torch.float32, "cpu", None, False)
        kv, index = (
            DevicePool(name, kv_tensors(components=1), PAGE_SIZE, (0, 1, 2), ("float32",), None, allocator, follows=of)
            for name, of in ((PoolName.KV, None), (PoolName.INDEXER, PoolName.KV))
        )
        settings = Settings(staging_bytes=1 << 20, spill_staging_bytes=1 << 20, read_threads=1)
        self.pools = StoredPools([kv, index], self._open_store, settings, by_choice=True)
        for store in self.stores.values():
            write(store, keys(0, 1, 2, 3))

    def _open_store(self, pool: DevicePool) -> PageStore:
        mark, geometry = fingerprint(pool=pool.name), pool.device_pages.geometry
        store = PageStore(self._directory / pool.name, mark, geometry, rows=pool.name is PoolName.KV)
        self.stores[pool.name] = store
        return store

    def begin(self, rid: str, numbers: Sequence[int]) -> int:
        """The batch of loads of a request for the first pages."""
        names = [key(page).hex() for page in range(len(numbers))]
        transfer = PoolTransfer(name=PoolName.KV, keys=names, device_indices=slots_of(*numbers))
        assert self.pools.load(rid, [transfer])
        return self.pools.start(())

    def damage(self, name: PoolName, page: int) -> None:
        with self.stores[name].pin(keys(page)) as pin:
            (segment,) = pin.segments
        offset = segment.extent.layout.component_range(LAYERS - 1, 0, segment.slot, 1)[0] + 5
        with segment.extent.path.open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 0x20]))


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    stage.pools.finish_spilling(PATIENCE_S)
    stage.pools.close()


def test_a_batch_trails_and_is_finished_when_all_of_it_is_there(stage: Stage) -> None:
    assert stage.pools.by_choice
    batch = stage.begin("r", [10, 11, 12])
    stage.pools.gate.set_consumer(batch)
    with stage.pools.gate.naming():
        stage.pools.gate.wait_until(0)
    stage.pools.gate.wait_rows(0, slots_of(11))
    assert stage.pools.trail(batch)
    assert eventually(lambda: stage.pools.landed(batch)) and not stage.pools.failing(batch)
    found = stage.pools.finish(batch)
    assert found.restored is not None and found.restored.requests["r"].pages == 3
    stat = stage.pools.stat()["restore"]
    assert 0 < stat["bytes_chosen"] <= stat["bytes_before_token"] <= stat["bytes_read"]
    # What is over trails no more; and what has no choice never does.
    assert not stage.pools.trail(batch)
    ahead = stage.pools.preload("p", keys(0, 1), {PoolName.KV: slots_of(5, 6)}, ())
    assert not stage.pools.trail(ahead)
    stage.pools.finish(ahead)


@pytest.mark.parametrize("name", [PoolName.KV, PoolName.INDEXER])
def test_a_bad_page_of_the_index_is_known_at_once_and_one_of_the_rest_late(stage: Stage, name: PoolName) -> None:
    stage.damage(name, 1)
    batch = stage.begin("r", [10, 11, 12])
    stage.pools.gate.wait_rows(0, slots_of(10))
    assert stage.pools.trail(batch) is (name is PoolName.KV)
    if name is PoolName.KV:
        assert eventually(lambda: stage.pools.failing(batch))
    found = stage.pools.finish(batch)
    assert (found.failed, found.unusable) == ({"r"}, {"r": frozenset(keys(1))})
    assert stage.pools.restorable_for("r", keys(0, 1, 2)) == [1]


def test_reading_ahead_reads_the_index_alone(stage: Stage) -> None:
    stage.pools.read_ahead("r", keys(0, 1))
    kv, index = stage.pools._pools
    assert not kv.restorer.prefetches and index.restorer.prefetches
    batch = stage.begin("r", [10, 11])
    assert stage.pools.trail(batch)
    assert stage.pools.finish(batch).failed == set()


def test_old_extents_are_restored_whole(stage: Stage) -> None:
    """They have no checksums of rows."""
    old = PageStore(stage._directory / "old", fingerprint(pool=PoolName.KV), stage.stores[PoolName.KV].geometry)
    write(old, keys(0, 1))
    choosing = stage.pools._choice
    assert choosing is not None
    choosing.move(old)
    batch = stage.begin("r", [10, 11])
    assert not choosing.open and not stage.pools.trail(batch)
    assert stage.pools.finish(batch).failed == set()
    choosing.move(stage.stores[PoolName.KV])
    old.close()


# Attention, with SGLang's own pool.

TOKENS, SIZE, LATENT = 64, 16, 20


@pytest.fixture
def kvcache() -> Iterator[Any]:
    with get_parallel().override(attn_dcp_size=1, dcp_enabled=False):
        yield DSATokenToKVPool(
            size=6 * TOKENS,
            page_size=TOKENS,
            kv_lora_rank=SIZE,
            dtype=torch.float32,
            qk_rope_head_dim=LATENT - SIZE,
            layer_num=2,
            device="cpu",
            index_head_dim=128,
            enable_memory_saver=False,
            kv_cache_dim=LATENT,
        )


def test_attention_reads_the_rows_that_it_waits_for_alone(kvcache: Any, tmp_path: Path) -> None:
    """With NaN in all other rows: any of them would spoil what it gives."""
    pages = DevicePages([(layer,) for layer in kvcache.kv_buffer], TOKENS)
    with closing(PageStore(tmp_path, MARK, pages.geometry, rows=True)) as store:
        latents = [torch.randn(2 * TOKENS, LATENT, generator=torch.Generator().manual_seed(layer)) for layer in (0, 1)]
        draft = store.draft(keys(0, 1), staging_memory(store.draft_bytes(2, "")))
        for layer, rows in enumerate(latents):
            draft.component(layer, 0)[:] = rows.view(torch.uint8).view(2, -1).numpy()
        store.publish(draft)
        for layer in kvcache.kv_buffer:
            layer.fill_(torch.nan)
        restorer = ChoiceRestorer(store, pages, reader_for(pages.geometry), RowReader(pages.geometry), PATIENCE_S)
        gate = LayerGate({layer: [(restorer.arrivals, layer)] for layer in (0, 1)}, restorer)
        kvcache.register_layer_transfer_counter(gate)
        restorer.queue("a", keys(0, 1), torch.tensor([4, 2]))
        batch = restorer.start()
        gate.set_consumer(batch)
        slots = torch.cat([torch.arange(4 * TOKENS, 5 * TOKENS), torch.arange(2 * TOKENS, 3 * TOKENS)])
        own = torch.arange(5 * TOKENS, 5 * TOKENS + 2)
        backend = CpuAttention.__new__(CpuAttention)
        backend._seen, backend._spans = None, [(0, 2 * TOKENS, 2 * TOKENS + 2)]
        backend.token_to_kv_pool, backend.swa_out_cache_loc = kvcache, None
        backend.req_to_token_pool = SimpleNamespace(req_to_token=torch.cat([slots, own])[None].int())
        chosen = torch.tensor([[70, 3, 128, -1], [90, 70, 129, 128]], dtype=torch.int32)
        for layer in (0, 1):
            attention: Any = SimpleNamespace(
                layer_id=layer, tp_q_head_num=2, qk_head_dim=LATENT, v_head_dim=SIZE, scaling=0.3
            )
            new = torch.randn(2, 1, LATENT, generator=torch.Generator().manual_seed(5))
            queries = torch.randn(2, 2, LATENT, generator=torch.Generator().manual_seed(6))
            given: Any = SimpleNamespace(out_cache_loc=own)
            out = backend._attend_chosen(queries, new, new[..., :SIZE], attention, given, chosen).view(2, 2, SIZE)
            keys_of = torch.cat([latents[layer], new[:, 0]])
            for query in (0, 1):
                seen = keys_of[chosen[query][chosen[query] >= 0].long()]
                weights = (queries[query] @ seen.T * 0.3).softmax(-1)
                torch.testing.assert_close(out[query], weights @ seen[:, :SIZE], rtol=1e-4, atol=1e-5)
        assert restorer.trails(batch)
        assert restorer.finish(batch).failed == set()
        restorer.close()


# Where it is possible.


def args(**fields: Any) -> Any:
    given = {
        "tp_size": 1,
        "dp_size": 1,
        "pp_size": 1,
        "nnodes": 1,
        "disaggregation_mode": "null",
        "speculative_algorithm": None,
        "enable_torch_compile": False,
    }
    return SimpleNamespace(**given | fields)


def pools(*names: PoolName, device: str = "cpu", layers: Sequence[int] = (0, 1)) -> list[Any]:
    allocator = PagedTokenToKVPoolAllocator(64, 4, torch.float32, "cpu", None, False)
    pages = SimpleNamespace(device=torch.device(device))
    return [
        SimpleNamespace(name=name, device_pages=pages, allocator=allocator, model_layers=tuple(layers))
        for name in names or (PoolName.KV, PoolName.INDEXER)
    ]


@pytest.fixture(autouse=True)
def our_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "attention_backends", lambda: {flags.CPU_ATTENTION})


def test_a_model_with_an_index_on_our_attention_is_restored_by_choice() -> None:
    assert choice.hindrance(args(), pools()) is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tp_size": 2}, "several ranks"),
        ({"dp_size": 2}, "several ranks"),
        ({"disaggregation_mode": "prefill"}, "are apart"),
        ({"speculative_algorithm": "EAGLE"}, "--speculative-algorithm"),
        ({"enable_torch_compile": True}, "--enable-torch-compile"),
    ],
    ids=str,
)
def test_an_engine_that_might_read_more_is_not(fields: dict[str, Any], reason: str) -> None:
    assert reason in (choice.hindrance(args(**fields), pools()) or "")


def test_nor_are_other_pools_devices_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    for names in ((PoolName.KV,), (PoolName.KV, PoolName.MAMBA, PoolName.INDEXER)):
        assert "by an index" in (choice.hindrance(args(), pools(*names)) or "")
    assert "one pool" in (choice.hindrance(args(), pools(layers=(1, 3))) or "")
    assert "tells which rows" in (choice.hindrance(args(), pools(device="cuda")) or "")
    for names in ({"dsa"}, {flags.CPU_ATTENTION, "torch_native"}, set()):
        with monkeypatch.context() as patch:
            patch.setattr(choice, "attention_backends", lambda names=names: names)
            assert "tells which rows" in (choice.hindrance(args(), pools()) or "")
    others = pools()
    others[0].allocator = object()
    assert "quarantined" in (choice.hindrance(args(), others) or "")
    monkeypatch.setattr(versions, "installed", lambda: "0.5.22")
    assert "0.5.22" in (choice.hindrance(args(), pools()) or "")
