from __future__ import annotations

import errno
import mmap
import os
import random
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contents import MARK, content, expected, keys, read, reader_for, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentstate.pages import (
    Geometry,
    PageStore,
    Pin,
    PosixBackend,
    RowMemory,
    RowReader,
    RowsRead,
    RowStream,
    handles,
    merge,
)
from agentstate.pages.extent import SECTOR_BYTES, ExtentHeader
from agentstate.pages.pins import StoredExtent
from agentstate.pages.rows import ARRIVED, UNREAD, WRONG
from agentstate.pages.sectors import ReadCost

LATENT = Geometry(layers=3, page_size=16, component_bytes=(16 * 656,))
KEYS_AND_VALUES = Geometry(layers=2, page_size=8, component_bytes=(8 * 512, 8 * 300))
SHORT = Geometry(layers=2, page_size=4, component_bytes=(4 * 24,))
LONG = Geometry(layers=2, page_size=2, component_bytes=(2 * 5000,))
GEOMETRIES = {"latent": LATENT, "keys and values": KEYS_AND_VALUES, "short": SHORT, "long": LONG}
POISON = 0xEE
PATIENCE_S = 120

pytestmark = pytest.mark.usefixtures("read_by")


@pytest.fixture(params=GEOMETRIES)
def geometry(request: pytest.FixtureRequest) -> Geometry:
    return GEOMETRIES[request.param]


def stored(directory: Path, geometry: Geometry, *sizes: int, rows: bool = True) -> PageStore:
    """A store with a chain of pages, in extents of so many each."""
    store = PageStore(directory, MARK, geometry, rows=rows)
    first = 0
    for size in sizes:
        write(store, keys(*range(first, first + size)))
        first += size
    return store


def memory(geometry: Geometry, pages: int, seed: int = 0) -> RowMemory:
    """Room for each page somewhere, and for one that nobody names before and behind."""
    first = np.random.default_rng(seed).permutation(pages).astype(np.int64) * geometry.page_size + geometry.page_size
    rows = (pages + 2) * geometry.page_size
    # Rows are not side by side, as in a pool that has more than one component.
    arrays = [np.full((rows, size // geometry.page_size + 8), POISON, np.uint8) for size in geometry.component_bytes]
    return RowMemory([array[:, :-8] for array in arrays], first)


def row_of(geometry: Geometry, page: bytes, layer: int, component: int, offset: int) -> bytes:
    size = geometry.component_bytes[component] // geometry.page_size
    return content(geometry, page, layer, component)[offset * size : (offset + 1) * size]


def right(geometry: Geometry, pin: Pin, layer: int) -> list[np.ndarray]:
    """All rows of a layer, by component."""
    pages = [[content(geometry, key, layer, c) for key in pin.keys] for c in range(len(geometry.component_bytes))]
    return [
        np.frombuffer(b"".join(found), dtype=np.uint8).reshape(-1, size // geometry.page_size)
        for found, size in zip(pages, geometry.component_bytes, strict=True)
    ]


def places(to: RowMemory, rows: np.ndarray, page_size: int) -> np.ndarray:
    assert to.first is not None
    found: np.ndarray = to.first[rows // page_size] + rows % page_size
    return found


def require_right(geometry: Geometry, stream: RowStream, layer: int, found: RowsRead, to: RowMemory) -> None:
    """Every row that was delivered is what was written."""
    if to.first is None:
        at, rows = np.flatnonzero(found.rows >= 0), found.rows[found.rows >= 0]
    else:
        at, rows = places(to, found.rows, geometry.page_size), found.rows
    assert len(np.unique(rows)) == len(rows)
    for array, wanted in zip(to.arrays, right(geometry, stream.pin, layer), strict=True):
        assert np.array_equal(array[at], wanted[rows])


def done(future: Future[RowsRead]) -> RowsRead:
    return future.result(PATIENCE_S)


# ---- what is read ----


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_rows_in_any_order_are_those_that_were_written(
    geometry: Geometry, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    with_rows = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    directory, first = tmp_path_factory.mktemp("store"), 0
    for size, rows in zip(sizes, with_rows, strict=True):
        store = PageStore(directory, MARK, geometry, rows=rows)
        write(store, keys(*range(first, first + size)))
        store.close()
        first += size
    store = PageStore(directory, MARK, geometry)
    # Pages in the middle of extents, too.
    begin = data.draw(st.integers(0, first - 1))
    chain = keys(*range(begin, data.draw(st.integers(begin + 1, first))))
    gap = data.draw(st.sampled_from([0, 4096, 100_000]))
    reader = RowReader(geometry, gap_bytes=gap, memory_bytes=data.draw(st.sampled_from([1, 1 << 20])))
    to, n_rows = memory(geometry, len(chain)), len(chain) * geometry.page_size
    arrived = [set[int]() for _ in range(geometry.layers)]
    with reader.open(store.pin(chain)) as stream:
        for _ in range(data.draw(st.integers(1, 5))):
            layer = data.draw(st.integers(0, geometry.layers - 1))
            for array in to.arrays:
                array[:] = POISON
            if data.draw(st.integers(0, 4)) == 0:
                found = done(stream.rest(layer, to))
                asked = np.arange(n_rows)
            else:
                asked = np.array(data.draw(st.lists(st.integers(0, n_rows - 1), max_size=20)), dtype=np.int64)
                found = done(stream.read(layer, asked, to))
            assert found.states.tolist() == [ARRIVED] * len(asked) and not found.wrong and not found.unread
            require_right(geometry, stream, layer, found, to)
            # A row arrives once, and nothing else is written to.
            assert not arrived[layer].intersection(found.rows.tolist())
            arrived[layer].update(found.rows.tolist())
            assert arrived[layer].issuperset(asked.tolist())
            untouched = np.setdiff1d(np.arange(len(to.arrays[0])), places(to, found.rows, geometry.page_size))
            assert all(np.all(array[untouched] == POISON) for array in to.arrays)
            assert stream.missing(layer) == n_rows - len(arrived[layer])
            assert set(np.flatnonzero(stream.states(layer) == ARRIVED)) == arrived[layer]
    reader.close()
    assert store.pinned == 0
    store.close()


def test_a_choice_reads_the_sectors_that_hold_it_and_nothing_else(tmp_path: Path) -> None:
    store = stored(tmp_path, LATENT, 9, 4)
    reader = RowReader(LATENT, gap_bytes=0)
    to = memory(LATENT, 13)
    with reader.open(store.pin(keys(*range(13)))) as stream:
        assert stream.by_rows
        stream.prepare(1).result(PATIENCE_S)
        asked = np.array([3, 40, 41, 100, 150, 207])
        found = done(stream.read(1, asked, to))
        # 656 bytes from the beginning of each extent's slab on: of 9 pages of 16 rows, and of 4.
        begin = [656 * (row if row < 144 else row - 144) for row in asked.tolist()]
        sectors = {
            (row >= 144, sector)
            for row, at in zip(asked.tolist(), begin, strict=True)
            for sector in range(at // 4096, (at + 655) // 4096 + 1)
        }
        assert found.named_bytes == found.read_bytes == 4096 * len(sectors)
        assert set(asked.tolist()) <= set(found.rows.tolist())
        again = done(stream.read(1, found.rows[::-1], to))
        assert (again.read_bytes, again.reads, len(again.rows)) == (0, 0, 0)
        assert again.states.tolist() == [ARRIVED] * len(found.rows)
        # What is read behind has all the rest and no more.
        rest = done(stream.rest(1, to))
        assert len(rest.rows) + len(found.rows) == 13 * 16
        assert stream.missing(1) == 0 and stream.missing(0) == 13 * 16
    reader.close()
    store.close()


def test_what_lies_whole_in_the_sectors_that_are_read_comes_with_it(tmp_path: Path) -> None:
    store = stored(tmp_path, LATENT, 4)
    reader = RowReader(LATENT, gap_bytes=0)
    to = memory(LATENT, 4)
    with reader.open(store.pin(keys(*range(4)))) as stream:
        found = done(stream.read(0, np.array([2]), to))
        # Of 4,096 bytes, rows 0 to 5 take 3,936; row 6 goes on in the next sector.
        assert found.rows.tolist() == list(range(6))
        require_right(LATENT, stream, 0, found, to)
    reader.close()
    store.close()


@pytest.mark.parametrize("gap, reads", [(0, 3), (2 * 4096 - 1, 3), (2 * 4096, 2), (3 * 4096, 1)])
def test_what_is_closer_together_than_the_gap_is_one_read(gap: int, reads: int, tmp_path: Path) -> None:
    store = stored(tmp_path, SHORT, 400)
    reader = RowReader(SHORT, gap_bytes=gap)
    to = memory(SHORT, 400)
    with reader.open(store.pin(keys(*range(400)))) as stream:
        stream.prepare(0).result(PATIENCE_S)
        # 24 bytes a row: in the middles of sectors 0, 3 and 7.
        asked = np.array([(4096 * sector + 2048) // 24 for sector in (0, 3, 7)])
        found = done(stream.read(0, asked, to))
        assert (found.reads, found.named_bytes) == (reads, 3 * 4096)
        assert found.read_bytes == 4096 * {3: 3, 2: 5, 1: 8}[reads]
        require_right(SHORT, stream, 0, found, to)
    reader.close()
    store.close()


def test_rows_are_put_one_after_the_other_where_they_have_no_places(geometry: Geometry, tmp_path: Path) -> None:
    store = stored(tmp_path, geometry, 5, 6)
    reader = RowReader(geometry, gap_bytes=0)
    n_rows = 11 * geometry.page_size
    for room in (4, n_rows // 2, n_rows):
        to = RowMemory([np.full((room, size), POISON, np.uint8) for size in reader.row_bytes])
        with reader.open(store.pin(keys(*range(11)))) as stream:
            asked = np.array([n_rows - 1, 0, 5, 5])
            found = done(stream.read(0, asked, to))
            assert {0, 5, n_rows - 1} <= set(found.rows.tolist()) and len(found.rows) <= room
            require_right(geometry, stream, 0, found, to)
            with pytest.raises(ValueError, match="do not fit"):
                stream.read(0, np.arange(room + 1), to) if room < n_rows else stream.read(
                    0, np.arange(n_rows), RowMemory([array[:-1] for array in to.arrays])
                )
            seen = set(found.rows.tolist())
            while stream.missing(0):
                found = done(stream.rest(0, to))
                require_right(geometry, stream, 0, found, to)
                assert len(found.rows) and not seen.intersection(found.rows.tolist())
                seen.update(found.rows.tolist())
            assert seen == set(range(n_rows))
    reader.close()
    store.close()


def test_pages_that_have_no_place_are_left_out(tmp_path: Path) -> None:
    store = stored(tmp_path, LATENT, 6)
    reader = RowReader(LATENT, gap_bytes=100_000)
    to = memory(LATENT, 6)
    assert to.first is not None
    to.first[2] = -1
    with reader.open(store.pin(keys(*range(6)))) as stream:
        found = done(stream.read(0, np.array([16, 95]), to))
        assert not any(row // 16 == 2 for row in found.rows.tolist())
        rest = done(stream.rest(0, to))
        assert stream.missing(0) == 16 and np.all(rest.states[32:48] == UNREAD)
        with pytest.raises(ValueError, match="no place"):
            stream.read(0, np.array([32]), to)
    reader.close()
    store.close()


def test_what_is_asked_wrongly_is_refused(tmp_path: Path) -> None:
    store = stored(tmp_path, LATENT, 3)
    reader = RowReader(LATENT)
    to = memory(LATENT, 3)
    stream = reader.open(store.pin(keys(*range(3))))
    for rows in ([-1], [48]):
        with pytest.raises(ValueError, match="rows are from 0 to 47"):
            stream.read(0, np.array(rows), to)
    for wrong in (
        RowMemory([]),
        RowMemory([np.zeros((80, 655), np.uint8)], to.first),
        RowMemory([np.zeros((80, 656), np.int8)], to.first),
        RowMemory(to.arrays, np.zeros(2, np.int64)),
        RowMemory([to.arrays[0][:60]], to.first),
    ):
        with pytest.raises(ValueError):
            stream.read(0, np.array([1]), wrong)
    with pytest.raises(ValueError, match="no layer 3"):
        done(stream.read(3, np.array([1]), to))
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        stream.read(0, np.array([1]), to)
    stream.close()
    reader.close()
    store.close()
    with pytest.raises(ValueError, match="not 3 rows"):
        RowReader(Geometry(1, 3, (100,)))


# ---- stores ----


def test_extents_of_both_kinds_are_restored_whole_and_found_again(geometry: Geometry, tmp_path: Path) -> None:
    for rows, pages in ((False, range(5)), (True, range(5, 12)), (False, range(12, 14))):
        store = PageStore(tmp_path, MARK, geometry, rows=rows)
        write(store, keys(*pages), owner="somebody" if rows else "")
        store.close()
    for again in ("the index", "the files"):
        if again == "the files":
            for path in (tmp_path / "index").iterdir():
                path.unlink()
        store = PageStore(tmp_path, MARK, geometry)
        assert store.stats.bad_extents == 0
        reader, whole = RowReader(geometry), reader_for(geometry)
        with store.pin(keys(*range(14))) as pin:
            assert read(whole, [pin]) == expected(geometry, [pin])
            assert [segment.extent.layout.rows for segment in pin.segments] == [False, True, False]
        to = memory(geometry, 14)
        with reader.open(store.pin(keys(*range(14)))) as stream:
            assert not stream.by_rows
            found = done(stream.rest(1, to))
            assert len(found.rows) == 14 * geometry.page_size
            require_right(geometry, stream, 1, found, to)
        whole.close()
        reader.close()
        store.close()


def test_what_is_merged_has_sums_of_sectors_where_the_store_wants_them(tmp_path: Path) -> None:
    store = stored(tmp_path, LATENT, 1, 1, 1, rows=False)
    store.close()
    store = PageStore(tmp_path, MARK, LATENT, rows=True)
    whole, chain = reader_for(LATENT), keys(*range(3))
    assert merge(store, whole, chain, mmap.mmap(-1, store.draft_bytes(3)), 3 * LATENT.layer_bytes) == 3
    reader, to = RowReader(LATENT), memory(LATENT, 3)
    with reader.open(store.pin(chain)) as stream:
        assert stream.by_rows
        found = done(stream.read(2, np.arange(48), to))
        assert len(found.rows) == 48
        require_right(LATENT, stream, 2, found, to)
    whole.close()
    reader.close()
    store.close()


def test_rows_are_read_of_extents_that_another_process_may_evict(tmp_path: Path) -> None:
    """Opened as a view of a store opens them."""
    store = stored(tmp_path, LATENT, 5, 3)
    reader, to = (
        RowReader(LATENT, open_extent=partial(handles.FileHandle, PosixBackend(), held=True)),
        memory(LATENT, 8),
    )
    with reader.open(store.pin(keys(*range(8)))) as stream:
        found = done(stream.read(1, np.arange(0, 128, 5), to))
        assert np.all(found.states == ARRIVED)
        require_right(LATENT, stream, 1, found, to)
    reader.close()
    store.close()


def test_rows_of_what_is_no_file_are_read_by_pages(tmp_path: Path) -> None:
    store = stored(tmp_path, LATENT, 5, 3)

    def opened(extent: StoredExtent, header: ExtentHeader | None) -> handles.Handle:
        handle = handles.FileHandle(PosixBackend(), extent, header)
        handle.fd = None
        return handle

    reader, to = RowReader(LATENT, open_extent=opened), memory(LATENT, 8)
    with reader.open(store.pin(keys(*range(8)))) as stream:
        found = done(stream.read(1, np.array([3, 17, 100]), to))
        assert found.rows.tolist() == [*range(32), *range(96, 112)]
        assert found.named_bytes == 3 * LATENT.layer_bytes
        require_right(LATENT, stream, 1, found, to)
        require_right(LATENT, stream, 1, done(stream.rest(1, to)), to)
        assert stream.missing(1) == 0
    reader.close()
    store.close()


# ---- several calls at a time, and drives that hang ----


class Gate:
    """In place of `os.preadv`: reads are noted, by their offsets, and wait until they are let through."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self._real = os.preadv
        self.reached, self.open = threading.Event(), threading.Event()
        self.offsets: list[int] = []
        patch.setattr(os, "preadv", self._read)

    def _read(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        self.offsets.append(offset)
        self.reached.set()
        assert self.open.wait(PATIENCE_S)
        return self._real(fd, buffers, offset)


def test_what_is_read_behind_waits_for_what_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = stored(tmp_path, LATENT, 12)
    reader, to = RowReader(LATENT, gap_bytes=0), memory(LATENT, 12)
    with reader.open(store.pin(keys(*range(12)))) as stream:
        layout = stream.pin.segments[0].extent.layout
        stream.prepare(0).result(PATIENCE_S)
        stream.prepare(1).result(PATIENCE_S)
        gate = Gate(monkeypatch)
        choice = stream.read(0, np.array([30, 100]), to)
        assert gate.reached.wait(PATIENCE_S)
        rest = stream.rest(1, to)
        second = stream.read(0, np.array([150]), to)
        gate.open.set()
        assert done(choice).states.tolist() == [ARRIVED] * 2
        assert done(second).states.tolist() == [ARRIVED]
        assert len(done(rest).rows) == 12 * 16
        layers = [int(offset >= layout.layer_offset(1)) for offset in gate.offsets]
        assert layers == sorted(layers) and set(layers) == {0, 1}
    reader.close()
    store.close()


def test_a_row_that_is_being_read_is_waited_for_and_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stored(tmp_path, LATENT, 12)
    reader, to = RowReader(LATENT, gap_bytes=0), memory(LATENT, 12)
    with reader.open(store.pin(keys(*range(12)))) as stream:
        stream.prepare(0).result(PATIENCE_S)
        gate = Gate(monkeypatch)
        rest = stream.rest(0, to)
        assert gate.reached.wait(PATIENCE_S)
        choice = stream.read(0, np.array([3, 100]), to)
        assert not stream.idle
        gate.open.set()
        found = done(choice)
        assert found.states.tolist() == [ARRIVED] * 2
        assert (found.reads, len(found.rows)) == (0, 0)
        assert len(done(rest).rows) == 12 * 16
        require_right(LATENT, stream, 0, done(rest), to)
    reader.close()
    store.close()


@pytest.mark.parametrize("seed", range(3))
def test_calls_from_many_threads_deliver_every_row_once(seed: int, geometry: Geometry, tmp_path: Path) -> None:
    store = stored(tmp_path, geometry, 7, 2, 11)
    reader, n_rows = RowReader(geometry, threads=3, memory_bytes=64 << 10), 20 * geometry.page_size
    to = [memory(geometry, 20, seed) for _ in range(geometry.layers)]
    delivered: list[list[RowsRead]] = [[] for _ in range(geometry.layers)]
    with reader.open(store.pin(keys(*range(20)))) as stream:

        def ask(number: int) -> None:
            chance = np.random.default_rng([seed, number])
            for _ in range(20):
                layer = int(chance.integers(geometry.layers))
                asked = chance.integers(0, n_rows, 12)
                call = stream.rest(layer, to[layer]) if chance.random() < 0.1 else stream.read(layer, asked, to[layer])
                found = done(call)
                assert np.all(found.states == ARRIVED)
                delivered[layer].append(found)

        threads = ThreadPoolExecutor(4)
        assert list(threads.map(ask, range(4))) == [None] * 4
        threads.shutdown()
        for layer, answers in enumerate(delivered):
            answers.append(done(stream.rest(layer, to[layer])))
            rows = np.concatenate([answer.rows for answer in answers])
            assert np.array_equal(np.sort(rows), np.arange(n_rows))
            require_right(geometry, stream, layer, RowsRead(rows=rows), to[layer])
    assert reader.kept() == {"streams": 0, "extents": 0}
    reader.close()
    store.close()


def test_a_stream_of_a_drive_that_hangs_is_let_go_when_the_drive_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stored(tmp_path, LATENT, 3)
    reader, to = RowReader(LATENT), memory(LATENT, 3)
    stream = reader.open(store.pin(keys(*range(3))))
    gate = Gate(monkeypatch)
    choices = [stream.read(0, np.array([row]), to) for row in (0, 20, 40, 47)]
    assert gate.reached.wait(PATIENCE_S)
    stream.discard()
    stream.discard()
    assert not stream.idle and store.pinned == 1 and reader.kept()["streams"] == 1
    gate.open.set()
    for choice in choices:
        error = choice.exception(PATIENCE_S)
        assert error is None or "closed" in str(error)
    stream.close()
    assert stream.idle and store.pinned == 0 and reader.kept() == {"streams": 0, "extents": 0}
    reader.close()
    store.close()


def test_a_file_that_cannot_be_closed_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a call that somebody has cancelled: its thread goes on to the next."""
    store = stored(tmp_path, LATENT, 3)
    reader, to = RowReader(LATENT, threads=1), memory(LATENT, 3)
    real = handles.FileHandle.close

    def failing(handle: handles.FileHandle) -> None:
        real(handle)
        raise OSError(errno.EIO, "of this test")

    gate = Gate(monkeypatch)
    stream = reader.open(store.pin(keys(*range(3))))
    calls = [stream.read(0, np.array([row]), to) for row in (3, 20, 40)]
    assert gate.reached.wait(PATIENCE_S)
    assert calls[1].cancel()
    monkeypatch.setattr(handles.FileHandle, "close", failing)
    gate.open.set()
    assert done(calls[2]).states.tolist() == [ARRIVED]
    # Whoever of both lets go of it meets the error.
    with suppress(OSError):
        stream.close()
    assert store.pinned == 0 and reader.kept() == {"streams": 0, "extents": 0}
    stream.close()
    reader.close()
    store.close()


def test_what_is_read_behind_does_not_wait_for_choices_of_a_stream_that_was_discarded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stored(tmp_path, LATENT, 3)
    reader, to = RowReader(LATENT), memory(LATENT, 3)
    other = reader.open(store.pin(keys(*range(3))))
    other.prepare(0).result(PATIENCE_S)
    stream = reader.open(store.pin(keys(*range(3))))
    stream.prepare(0).result(PATIENCE_S)
    real, reached, held = os.preadv, threading.Event(), threading.Event()

    def first_hangs(fd: int, buffers: Sequence[Any], offset: int) -> int:
        if not reached.is_set():
            reached.set()
            assert held.wait(PATIENCE_S)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", first_hangs)
    choice = stream.read(0, np.array([3]), memory(LATENT, 3))
    assert reached.wait(PATIENCE_S)
    rest = other.rest(0, to)
    stream.discard()
    assert len(done(rest).rows) == 48 and not choice.done()
    held.set()
    assert done(choice).states.tolist() in ([ARRIVED], [UNREAD])
    stream.close()
    other.close()
    reader.close()
    assert store.pinned == 0
    store.close()


# ---- damage ----


@pytest.fixture
def buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The damage lies in the page cache, from where it is read: no disk has to be waited for."""
    monkeypatch.setattr(handles, "open_direct", lambda path, flags: os.open(path, flags))


class Files:
    """The extents of a store, to be damaged and made whole again."""

    def __init__(self, store: PageStore, pin: Pin):
        self.paths = list(dict.fromkeys(segment.extent.path for segment in pin.segments))
        self.original = [path.read_bytes() for path in self.paths]
        self.headers = [
            ExtentHeader.decode(data, path.name) for data, path in zip(self.original, self.paths, strict=True)
        ]
        self.pages = [(number, slot) for number, header in enumerate(self.headers) for slot in range(len(header.keys))]

    def damage(self, chance: random.Random) -> list[bytes | None]:
        """What the files are now; None is gone."""
        now: list[bytes | None] = list(self.original)
        for _ in range(chance.choice([1, 1, 2, 5])):
            number = chance.randrange(len(now))
            data, header = bytearray(now[number] or b""), self.headers[number]
            begin, end = header.layout.data_offset, len(self.original[number])
            kind = chance.randrange(12)
            if kind == 0:
                now[number] = None
                continue
            if kind == 1:
                del data[chance.randrange(end) :]
            elif kind < 7 and len(data) == end:
                # Anywhere behind the header, or seldom in it.
                at = chance.randrange(0 if kind == 2 and chance.random() < 0.2 else begin, end)
                length = chance.choice([1, 1, 8, 700])
                data[at : at + length] = bytes(byte ^ chance.randrange(1, 256) for byte in data[at : at + length])
            elif kind < 10 and len(data) == end:
                first, second = (4096 * chance.randrange(begin // 4096, end // 4096) for _ in range(2))
                a, b = bytes(data[first : first + 4096]), bytes(data[second : second + 4096])
                data[first : first + 4096], data[second : second + 4096] = b, a
            elif len(data) == end:
                other = self.original[chance.randrange(len(now))]
                at = 4096 * chance.randrange(begin // 4096, min(end, len(other)) // 4096)
                data[at : at + 4096] = other[at : at + 4096]
            now[number] = bytes(data)
        return now

    def put(self, now: Sequence[bytes | None]) -> None:
        for path, before, data in zip(self.paths, self.original, now, strict=True):
            if data is None:
                path.unlink()
            elif data is not before:
                with path.open("r+b") as file:
                    file.write(data)
                    file.truncate(len(data))

    def restore(self, now: Sequence[bytes | None]) -> None:
        for path, before, data in zip(self.paths, self.original, now, strict=True):
            if data is not before:
                path.write_bytes(before)

    def good(self, now: Sequence[bytes | None], page: int, layer: int) -> bool:
        """Whether a page's bytes in a layer are there, and its extent's header."""
        number, slot = self.pages[page]
        data, before, header = now[number], self.original[number], self.headers[number]
        if data is None or data[: header.layout.data_offset] != before[: header.layout.data_offset]:
            return False
        ranges = [header.layout.component_range(layer, c, slot, 1) for c in range(len(header.geometry.component_bytes))]
        return all(data[at : at + length] == before[at : at + length] for at, length in ranges)


class FailingReads:
    """In place of `os.preadv`: some reads fail, or are short, by a seed."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self._patch, self._real, self._lock = patch, os.preadv, threading.Lock()
        self.failed = 0
        self._left = 0.0
        self._chance = random.Random()

    def arm(self, seed: int, share: float) -> None:
        self._chance, self._left, self.failed = random.Random(seed), share, 0
        self._patch.setattr(os, "preadv", self._read)

    def disarm(self) -> None:
        self._patch.setattr(os, "preadv", self._real)

    def _read(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        with self._lock:
            failing, short = self._chance.random() < self._left, self._chance.random() < 0.5
            self.failed += failing
        if not failing:
            return self._real(fd, buffers, offset)
        if short:
            length = len(memoryview(buffers[0]).cast("B"))
            part = memoryview(buffers[0]).cast("B")[: length // 2 // 512 * 512]
            return self._real(fd, [part], offset) if len(part) else 0
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("name, cases", [("latent", 2000), ("keys and values", 2000), ("short", 500), ("long", 500)])
@pytest.mark.usefixtures("buffered")
def test_no_damage_yields_a_wrong_row_or_loses_a_good_one(
    name: str, cases: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten thousand cases with both ways to read: bits flipped, sectors exchanged, foreign ones, files cut off and
    deleted, reads that fail and that are short."""
    geometry = GEOMETRIES[name]
    store = stored(tmp_path, geometry, 3, 5)
    chain = keys(*range(8))
    reader, n_rows = RowReader(geometry, gap_bytes=0), 8 * geometry.page_size
    failing = FailingReads(monkeypatch)
    seen = {"arrived": 0, "wrong": 0, "unread": 0}
    with store.pin(chain) as pin:
        files = Files(store, pin)
        wanted = [right(geometry, pin, layer) for layer in range(geometry.layers)]
        for seed in range(cases):
            chance = random.Random(seed)
            now = files.damage(chance) if chance.random() < 0.8 else list[bytes | None](files.original)
            files.put(now)
            if chance.random() < 0.3:
                failing.arm(seed, chance.choice([0.05, 0.5]))
            layer, to = chance.randrange(geometry.layers), memory(geometry, 8, seed)
            asked = np.array([chance.randrange(n_rows) for _ in range(chance.choice([1, 10, 40]))])
            with reader.open(Pin(pin.fingerprint, pin.keys, pin.segments, lambda: None)) as stream:
                found = [(asked, done(stream.read(layer, asked, to)))]
                if chance.random() < 0.3:
                    found.append((np.arange(n_rows), done(stream.rest(layer, to))))
                states = stream.states(layer)
            failing.disarm()
            # Rows that count as arrived are where they belong, by whichever call, and are what was written.
            rows = np.flatnonzero(states == ARRIVED)
            at = places(to, rows, geometry.page_size)
            for array, all_rows in zip(to.arrays, wanted[layer], strict=True):
                assert np.array_equal(array[at], all_rows[rows]), seed
            delivered = np.concatenate([answer.rows for _, answer in found])
            assert np.array_equal(np.sort(delivered), rows), seed
            for which, answer in found:
                for row, state in zip(which.tolist(), answer.states.tolist(), strict=True):
                    page = row // geometry.page_size
                    if state == WRONG:
                        assert not files.good(now, page, layer) and page in answer.wrong, seed
                    elif state == UNREAD:
                        assert failing.failed and page in answer.unread, seed
            seen["arrived"] += int(np.count_nonzero(found[0][1].states == ARRIVED))
            seen["wrong"] += int(np.count_nonzero(found[0][1].states == WRONG))
            seen["unread"] += int(np.count_nonzero(found[0][1].states == UNREAD))
            failing.failed = 0
            files.restore(now)
    assert all(seen.values()), seen
    reader.close()
    store.close()


@pytest.mark.usefixtures("buffered")
def test_damaged_sums_of_sectors_lose_no_row(tmp_path: Path) -> None:
    store = stored(tmp_path, LATENT, 4)
    (path,) = (tmp_path / "extents").iterdir()
    layout = ExtentHeader.decode(path.read_bytes(), "x").layout
    at, length = layout.sector_sums(0, LATENT.layers)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes(length))
    reader, to = RowReader(LATENT), memory(LATENT, 4)
    with reader.open(store.pin(keys(*range(4)))) as stream:
        found = done(stream.read(1, np.arange(64), to))
        assert len(found.rows) == 64 and not found.wrong
        require_right(LATENT, stream, 1, found, to)
    reader.close()
    store.close()


@pytest.mark.usefixtures("buffered")
def test_a_row_is_lost_with_its_page_and_no_other(tmp_path: Path) -> None:
    store = stored(tmp_path, LATENT, 4)
    (path,) = (tmp_path / "extents").iterdir()
    layout = ExtentHeader.decode(path.read_bytes(), "x").layout
    # The last byte of page 1, whose sector page 2 begins in.
    at = layout.component_range(2, 0, 1, 1)[0] + LATENT.component_bytes[0] - 1
    assert at // SECTOR_BYTES == (at + 1) // SECTOR_BYTES
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    reader, to = RowReader(LATENT), memory(LATENT, 4)
    with reader.open(store.pin(keys(*range(4)))) as stream:
        found = done(stream.read(2, np.array([31, 32, 16]), to))
        assert found.states.tolist() == [WRONG, ARRIVED, ARRIVED]
        assert list(found.wrong) == [1] and not found.unread
        assert done(stream.read(2, np.array([31]), to)).states.tolist() == [WRONG]
        rest = done(stream.rest(2, to))
        assert np.flatnonzero(rest.states != ARRIVED).tolist() == [31]
        assert store.drop(stream.pin.copies(found.wrong)) == 1
    reader.close()
    store.close()


def test_a_read_that_failed_is_made_again_when_it_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stored(tmp_path, LATENT, 4)
    reader, to = RowReader(LATENT), memory(LATENT, 4)
    with reader.open(store.pin(keys(*range(4)))) as stream:
        stream.prepare(0).result(PATIENCE_S)
        failing = FailingReads(monkeypatch)
        failing.arm(0, 1.0)
        found = done(stream.read(0, np.array([5, 40]), to))
        assert found.states.tolist() == [UNREAD] * 2 and set(found.unread) == {0, 2}
        failing.disarm()
        found = done(stream.read(0, np.array([5, 40]), to))
        assert found.states.tolist() == [ARRIVED] * 2
        require_right(LATENT, stream, 0, found, to)
    reader.close()
    store.close()


# ---- the rule ----


@pytest.mark.parametrize("read_s, byte_s, gap", [(10e-6, 1e-9, 10_000), (1e-6, 1e-9, 1000), (5e-3, 1e-9, 16 << 10)])
def test_a_gap_is_read_where_it_costs_less_than_another_read(read_s: float, byte_s: float, gap: int) -> None:
    cost = ReadCost()
    for i in range(1000):
        for reads, n_bytes in ((1000, 4_096_000 + 1000 * i), (20, 20 << 20)):
            cost.note(reads, n_bytes, reads * read_s + n_bytes * byte_s)
    assert cost.gap_bytes == pytest.approx(gap, rel=0.1)


def test_a_drive_of_which_nothing_is_known_is_a_common_one() -> None:
    assert ReadCost(10e-6, 1e-9).gap_bytes == pytest.approx(10_000, rel=1e-6)
    cost = ReadCost(10e-6, 1e-9)
    for _ in range(100):
        # Nothing tells reads from bytes here.
        cost.note(1000, 4_096_000, 4_096_000 * 1e-9 + 1000 * 10e-6)
    assert cost.gap_bytes == pytest.approx(10_000, rel=0.01)


def test_what_is_read_says_what_reads_cost(tmp_path: Path) -> None:
    store = stored(tmp_path, LATENT, 12)
    reader, to = RowReader(LATENT), memory(LATENT, 12)
    with reader.open(store.pin(keys(*range(12)))) as stream:
        done(stream.rest(0, to))
    assert 0 <= reader.gap_bytes <= 16 << 10
    reader.close()
    store.close()
