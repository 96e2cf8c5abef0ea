"""Reading single rows of stored pages, verified without their pages: what a model with an index attends to first, and
the rest behind it.

A *row* is what one token has in one layer: its bytes in every component. Extents that were written by a store with
``rows`` have a checksum a sector of 4 KiB. So a row is read by the one or two sectors that hold it, which is verified,
and copied to where it belongs.

`RowStream.read` is a choice: rows that somebody waits for. Sectors that lie close together are one read: reading a gap
costs its bytes, another read costs what a read costs, and which is less is measured while reading. Whatever other rows
lie whole in the sectors that are read is delivered with them, and a row that has arrived is not read again. Of a row
that goes on in the next sector nothing is kept until all of it is read: so a sector may be read twice for its ends.
`RowStream.rest` brings what is still missing of a layer, in pieces. Each waits until no choice is being read.

A row whose sectors do not have the sums that they were written with is looked at once more in its whole page, which has
a sum of its own: a row is `WRONG` only where its page is. Rows of extents that have no sums a sector are read by pages
as well.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import xxhash

from agentstate.errors import BadExtent
from agentstate.pages.backends import PosixBackend, staging_memory
from agentstate.pages.extent import ALIGNMENT, SECTOR_BYTES, ExtentHeader, Geometry, align
from agentstate.pages.handles import FileHandle, Handle, Handles, OpenExtent, most_open, patiently
from agentstate.pages.pins import Pin
from agentstate.pages.sectors import NOT_READ, RIGHT, THREADS_DEEP, Lane, ReadCost, Workers, expanded

UNREAD, ARRIVED, WRONG = range(3)
"""What is known of a row: nothing, or not yet; it is where it belongs; its bytes are not those that were written."""
# Some call is reading it.
_UNDER_WAY = 3

# A piece of what is read behind: a choice waits for no more than one.
PIECE_BYTES = 1 << 20
# Sums of several layers are read together up to this size, so that small extents do not cost a read a layer.
_SUMS_BYTES = 64 << 10
_WRITTEN = "its bytes are not those that were written"


class RowMemory(NamedTuple):
    """Host memory that rows go to: for each component an array of uint8, of shape (any, row bytes), the bytes of a row
    next to each other.

    ``first`` has for each page of the pin the index in the arrays of its first row; the others follow. It is negative
    for a page that has no place: no row of it may be asked for. Without ``first`` rows are put one after the other, and
    `RowsRead.rows` says which they are.
    """

    arrays: Sequence[np.ndarray]
    first: np.ndarray | None = None


@dataclass
class RowsRead:
    """What a call has brought.

    ``rows`` were delivered: those that were asked for and were not there, and what lay whole in the same sectors; no
    other memory holds anything to rely on. Where the memory has no ``first``, ``rows[i]`` lies at ``i``; -1 is none.
    ``states`` says of each row that was asked for, or for `RowStream.rest` of each of the layer, whether it is
    `ARRIVED`, by whichever call, `WRONG` or `UNREAD`. Of ``wrong`` pages some row is lost for good; of ``unread`` ones
    some could not be read this time, and may be asked for again.

    ``named_bytes`` are those of the sectors that held what was asked for and missing. ``read_bytes`` were read, sums of
    sectors included, by so many ``reads``.
    """

    rows: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    states: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint8))
    wrong: dict[int, str] = field(default_factory=dict)
    unread: dict[int, OSError] = field(default_factory=dict)
    named_bytes: int = 0
    read_bytes: int = 0
    reads: int = 0


class RowReader:
    """Reads rows of the pages of ``geometry``, beside a `LayerwiseReader` of the same.

    ``threads`` choices are read at a time, and one rest, each through ``memory_bytes`` of memory, which is taken when
    it is first needed. Sectors that are ``gap_bytes`` or less apart are read at once; None: what is measured decides.
    ``open_extent`` opens extents that are no files of this machine's. Raises ValueError for pages that do not consist
    of rows of equal size.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        threads: int = 2,
        gap_bytes: int | None = None,
        memory_bytes: int = 16 << 20,
        open_extent: OpenExtent | None = None,
    ):
        if any(size % geometry.page_size for size in geometry.component_bytes):
            raise ValueError(f"pages of {geometry.component_bytes} bytes are not {geometry.page_size} rows")
        self.geometry = geometry
        self.row_bytes = tuple(size // geometry.page_size for size in geometry.component_bytes)
        self._gap_bytes = gap_bytes
        self._cost = ReadCost()
        # All extents of a call are open at the same time.
        self._most_open = 2 * most_open()
        self._handles = Handles(open_extent or partial(FileHandle, PosixBackend()), self._most_open)
        a_row = sum(align(size) + SECTOR_BYTES for size in self.row_bytes)
        self._memory_bytes = align(max(memory_bytes, a_row * len(self.row_bytes), _SUMS_BYTES + 2 * ALIGNMENT))
        self._lock = threading.Lock()
        # Rows have been read, a choice has ended, or a stream is closed.
        self._changed = threading.Condition(self._lock)
        self._choices_left = 0
        self._open_streams = 0
        self._lanes: SimpleQueue[Lane] = SimpleQueue()
        for _ in range(threads + 1):
            self._lanes.put(Lane(self._memory_bytes))
        self._in_flight = Workers(THREADS_DEEP, "agentstate-rows-io")
        self._choices = Workers(threads, "agentstate-rows")
        self._behind = Workers(1, "agentstate-rows-rest")

    def open(self, pin: Pin) -> RowStream:
        """Rows of the pages of ``pin``. Closing the stream closes the pin."""
        with self._lock:
            self._open_streams += 1
        return RowStream(self, pin)

    @property
    def gap_bytes(self) -> int:
        """How far apart sectors may be that are read at once."""
        with self._lock:
            return self._cost.gap_bytes if self._gap_bytes is None else self._gap_bytes

    def kept(self) -> dict[str, int]:
        """What is not free at the moment: streams, until the last read of them has ended, and their extents."""
        with self._lock:
            return {"streams": self._open_streams, "extents": self._handles.kept}

    def close(self) -> None:
        """End the threads. Close or discard every stream first."""
        self._choices.close()
        self._behind.close()
        self._in_flight.close()

    @contextmanager
    def _lane(self) -> Iterator[Lane]:
        lane = self._lanes.get()
        try:
            yield lane
        finally:
            self._lanes.put(lane)

    def _measured(self, reads: int, n_bytes: int, seconds: float) -> None:
        with self._lock:
            self._cost.note(reads, n_bytes, seconds)


class RowStream:
    """Rows of the pages of one pin. `RowReader.open` makes it. Every method may be called from any thread.

    Row ``page * page_size + offset`` is that of a token of a page of the pin. Memory that a call is given is to be left
    alone until its future is done; or, if the stream is closed before, until it is `idle`. Where a drive hangs, futures
    are not done: wait for them with a time-out, and `discard` the stream.
    """

    def __init__(self, reader: RowReader, pin: Pin):
        self.pin = pin
        self._reader = reader
        geometry = reader.geometry
        self._page_size = geometry.page_size
        self._rows = len(pin.keys) * geometry.page_size
        # What of the segments says where rows are. Of each, rows follow each other in every component.
        segments = pin.segments
        self._first = np.array([segment.first * self._page_size for segment in segments], dtype=np.int64)
        self._count = np.array([segment.pages * self._page_size for segment in segments], dtype=np.int64)
        layouts = [segment.extent.layout for segment in segments]
        self._data = np.array([layout.data_offset for layout in layouts], dtype=np.int64)
        self._slab = np.array([layout.slab_bytes for layout in layouts], dtype=np.int64)
        before = [sum(geometry.component_bytes[:c]) for c in range(len(geometry.component_bytes))]
        # In a slab, where each segment begins in each component: (components, segments).
        self._in_slab = np.array(
            [
                [segment.extent.layout.pages * skipped + segment.slot * size for segment in segments]
                for skipped, size in zip(before, geometry.component_bytes, strict=True)
            ],
            dtype=np.int64,
        )
        self._extents = list({segment.extent.path: segment.extent for segment in segments}.values())
        numbers = {extent.path: number for number, extent in enumerate(self._extents)}
        self._extent_of = np.array([numbers[segment.extent.path] for segment in segments], dtype=np.int64)
        sectors = [extent.layout.sectors for extent in self._extents]
        # Where the sums of each extent begin in an array of those of all.
        self._sums_at = np.concatenate([[0], np.cumsum(sectors, dtype=np.int64)]).astype(np.int64)
        self._seeds = np.zeros(len(self._extents), dtype=np.uint64)
        self._sums: dict[int, np.ndarray] = {}
        self._has_sums: dict[int, np.ndarray] = {}
        # By segment, the header whose keys are those of the pin.
        self._looked_up: dict[int, ExtentHeader] = {}
        self._states: dict[int, np.ndarray] = {}
        # By layer and page, why a row of it is wrong.
        self._wrong: dict[tuple[int, int], str] = {}
        self._running = self._choices_left = 0
        self._closed = self._letting_go = self._let_go_of = False
        reader._handles.enter(self._extents)

    @property
    def by_rows(self) -> bool:
        """Whether every extent of it has sums a sector. Rows of others are read by whole pages."""
        return all(extent.layout.rows for extent in self._extents)

    def states(self, layer: int) -> np.ndarray:
        """Of each row of a layer, whether it is `ARRIVED`, `WRONG` or `UNREAD`: uint8, a copy."""
        with self._reader._lock:
            return self._public(self._of(layer))

    def missing(self, layer: int) -> int:
        """How many rows of a layer have not arrived."""
        with self._reader._lock:
            return self._rows - int(np.count_nonzero(self._of(layer) == ARRIVED))

    def prepare(self, layer: int) -> Future[None]:
        """Open the extents and read the sums of a layer, so that a choice does not wait for that."""
        return self._submit(self._reader._choices, partial(self._prepare, layer), chosen=True)

    def read(self, layer: int, rows: np.ndarray, to: RowMemory) -> Future[RowsRead]:
        """Read ``rows`` of a layer, int64 in any order, before anything else: those that have not arrived. What another
        call is reading is waited for; it is then in that call's memory.

        Raises ValueError for a row that the pin does not have or the memory has no place for.
        """
        rows = np.ascontiguousarray(rows, dtype=np.int64).ravel()
        if len(rows) and (rows.min() < 0 or rows.max() >= self._rows):
            raise ValueError(f"rows are from 0 to {self._rows - 1}")
        wanted = np.unique(rows)
        self._require_room(to, wanted)
        return self._submit(self._reader._choices, partial(self._choose, layer, rows, wanted, to), chosen=True)

    def rest(self, layer: int, to: RowMemory) -> Future[RowsRead]:
        """Read all rows of a layer that have not arrived, in pieces, each of which waits until no choice is being read.
        Where the memory has no ``first``, as many as it has room for."""
        self._require_room(to, np.empty(0, dtype=np.int64))
        return self._submit(self._reader._behind, partial(self._bring_rest, layer, to), chosen=False)

    @property
    def idle(self) -> bool:
        """Whether nothing is being read, so that nobody's memory is written to."""
        return not self._running

    def close(self) -> None:
        """Stop reading and release everything, the pin too; wait for what is being read. May be called again. Futures
        of what has not been read raise ValueError."""
        self.discard()
        with self._reader._changed:
            self._reader._changed.wait_for(lambda: self._let_go_of)

    def discard(self) -> None:
        """Close, without waiting for what is being read just now."""
        with self._reader._changed:
            if not self._closed:
                self._closed = True
                # Others do not wait for what a drive that hangs does not bring.
                self._reader._choices_left -= self._choices_left
            self._reader._changed.notify_all()
            running = self._running
        if not running:
            self._let_go()

    def _let_go(self) -> None:
        reader = self._reader
        with reader._lock:
            if self._letting_go:
                return
            self._letting_go = True
        try:
            reader._handles.leave(self._extents)
        finally:
            # Or whoever closes it would wait for ever.
            self.pin.close()
            with reader._changed:
                reader._open_streams -= 1
                self._let_go_of = True
                reader._changed.notify_all()

    def __enter__(self) -> RowStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # ---- calls ----

    def _submit(self, workers: Workers, work: Callable[[Lane], Any], *, chosen: bool) -> Future[Any]:
        reader = self._reader
        with reader._lock:
            self._require_open()
            reader._choices_left += chosen
            self._choices_left += chosen
        future: Future[Any] = Future()

        def run() -> None:
            try:
                with reader._lock:
                    self._require_open()
                    self._running += 1
                try:
                    with reader._lane() as lane:
                        future.set_result(work(lane))
                finally:
                    with reader._changed:
                        self._running -= 1
                        ended = self._closed and not self._running
                        reader._changed.notify_all()
                    if ended:
                        self._let_go()
            except BaseException as error:
                # What has been read, or nobody waits for any more, stays as it is.
                if not future.done():
                    future.set_exception(error)
            finally:
                with reader._changed:
                    # Nothing waits for those of a stream that is closed.
                    ended_now = chosen and not self._closed
                    reader._choices_left -= ended_now
                    self._choices_left -= ended_now
                    reader._changed.notify_all()

        workers.submit(run)
        return future

    def _require_open(self) -> None:
        if self._closed:
            raise ValueError("the stream is closed")

    def _require_room(self, to: RowMemory, wanted: np.ndarray) -> None:
        if len(to.arrays) != len(self._reader.row_bytes):
            raise ValueError(f"{len(to.arrays)} arrays for {len(self._reader.row_bytes)} components")
        for array, n_bytes in zip(to.arrays, self._reader.row_bytes, strict=True):
            if not array.flags.writeable:
                raise ValueError("an array that cannot be written")
            if array.dtype != np.uint8 or array.shape[1:] != (n_bytes,) or (n_bytes > 1 and array.strides[1] != 1):
                raise ValueError(f"an array of {array.dtype} of shape {array.shape} for rows of {n_bytes} bytes")
        room = min(len(array) for array in to.arrays)
        if to.first is None:
            if len(wanted) > room:
                raise ValueError(f"{len(wanted)} rows do not fit in memory for {room}")
            return
        if len(to.first) * self._page_size != self._rows or (self._rows and to.first.max() + self._page_size > room):
            raise ValueError(f"not a place for each page in memory for {room} rows")
        if len(wanted) and to.first[wanted // self._page_size].min() < 0:
            raise ValueError("a row of a page that has no place")

    def _of(self, layer: int) -> np.ndarray:
        """The states of a layer's rows. The caller holds the lock."""
        if not 0 <= layer < self._reader.geometry.layers:
            raise ValueError(f"there is no layer {layer}")
        if layer not in self._states:
            self._states[layer] = np.zeros(self._rows, dtype=np.uint8)
        return self._states[layer]

    @staticmethod
    def _public(states: np.ndarray) -> np.ndarray:
        public: np.ndarray = states.copy()
        public[public == _UNDER_WAY] = UNREAD
        return public

    def _choose(self, layer: int, rows: np.ndarray, wanted: np.ndarray, to: RowMemory, lane: Lane) -> RowsRead:
        call = _Call(self, layer, to, lane, left=len(wanted))
        call.bring(self._claim(layer, wanted))
        with self._reader._changed:
            states = self._of(layer)
            self._reader._changed.wait_for(lambda: self._closed or not np.any(states[wanted] == _UNDER_WAY))
            return call.found(rows)

    def _claim(self, layer: int, rows: np.ndarray) -> np.ndarray:
        """Those of ``rows`` that nobody has read or is reading: the caller is going to."""
        with self._reader._lock:
            states = self._of(layer)
            mine: np.ndarray = rows[states[rows] == UNREAD]
            states[mine] = _UNDER_WAY
            return mine

    def _bring_rest(self, layer: int, to: RowMemory, lane: Lane) -> RowsRead:
        call, reader = _Call(self, layer, to, lane, left=0), self._reader
        a_piece = max(1, PIECE_BYTES // sum(reader.row_bytes))
        placed = None if to.first is None else np.repeat(to.first >= 0, self._page_size)
        at = 0
        while at < self._rows and call.room:
            with reader._changed:
                reader._changed.wait_for(lambda: self._closed or not reader._choices_left)
                self._require_open()
                window = self._of(layer)[at : at + a_piece] == UNREAD
            if placed is not None:
                window &= placed[at : at + a_piece]
            missing = at + np.flatnonzero(window)
            if len(missing) > call.room:
                missing = missing[: call.room]
            call.bring(self._claim(layer, missing))
            at += a_piece
        with reader._changed:
            states = self._of(layer)
            reader._changed.wait_for(lambda: self._closed or not np.any(states == _UNDER_WAY))
            if np.all(states == ARRIVED):
                # Nobody reads the layer again.
                self._sums.pop(layer, None)
                self._has_sums.pop(layer, None)
            return call.found(np.arange(self._rows))

    def _prepare(self, layer: int, lane: Lane) -> None:
        with self._reader._lock:
            self._of(layer)
        call = _Call(self, layer, RowMemory([]), lane, left=0)
        every = np.arange(len(self.pin.segments))
        for first in range(0, len(every), self._reader._most_open):
            with call.opened(every[first : first + self._reader._most_open]) as handles:
                call.require_sums(handles)

    def _has(self, number: int, header: ExtentHeader) -> bool:
        """Whether an extent has the pages of a segment where it should. Looked up once for all layers."""
        if self._looked_up.get(number) is not header:
            _, slot, pages, first = self.pin.segments[number]
            if header.fingerprint != self.pin.fingerprint:
                return False
            if header.keys[slot : slot + pages] != self.pin.keys[first : first + pages]:
                return False
            self._looked_up[number] = header
        return True


class _Batch(NamedTuple):
    """Some rows and how they are read. Of each component: what is read, from the scratch's sector ``base`` on."""

    rows: np.ndarray
    parts: list[_Part]
    sectors: int
    named_bytes: int


class _Part(NamedTuple):
    """The reads of one component. Arrays with an item each: the segment, the first sector of the file, how many there
    are, the first sector of the scratch, and the first row that lies whole in it; and all rows that do."""

    segments: np.ndarray
    sectors: np.ndarray
    counts: np.ndarray
    base: np.ndarray
    first_rows: np.ndarray
    covered: np.ndarray


class _Call:
    """One call of a stream: it brings rows of ``layer`` to ``to``. At most ``left`` more rows are going to be asked
    for: for these there is always room."""

    def __init__(self, stream: RowStream, layer: int, to: RowMemory, lane: Lane, left: int):
        self._stream, self._reader, self._layer, self._to, self._lane = stream, stream._reader, layer, to, lane
        self._left = left
        # What this call has claimed and not settled.
        self._under_way = np.zeros(stream._rows, dtype=bool)
        self._delivered: list[np.ndarray] = []
        self._placed = 0
        self._failures: dict[int, BadExtent | OSError] = {}
        self._last_page: dict[int, list[np.ndarray]] = {}
        self._result = RowsRead()

    @property
    def room(self) -> int:
        """How many rows fit beside those that are going to be asked for."""
        if self._to.first is not None:
            return self._stream._rows
        return min(len(array) for array in self._to.arrays) - self._placed - self._left

    def found(self, rows: np.ndarray) -> RowsRead:
        """The answer to whoever asked for ``rows``. The caller holds the lock."""
        result, stream = self._result, self._stream
        result.states = stream._public(stream._of(self._layer)[rows])
        for page in np.unique(rows[result.states == WRONG] // stream._page_size).tolist():
            result.wrong[page] = stream._wrong[self._layer, page]
        if self._delivered:
            result.rows = np.concatenate(self._delivered)
        if self._to.first is not None:
            result.rows = np.sort(result.rows[result.rows >= 0])
        return result

    def bring(self, rows: np.ndarray) -> None:
        """Read ``rows``, ascending, which the caller has claimed."""
        stream = self._stream
        self._left = len(rows)
        self._under_way[rows] = True
        segments = np.searchsorted(stream._first, rows, side="right") - 1
        needed = np.unique(segments)
        try:
            for first in range(0, len(needed), self._reader._most_open):
                group = needed[first : first + self._reader._most_open]
                start, end = np.searchsorted(segments, [group[0], group[-1] + 1])
                with self.opened(group) as handles:
                    self._bring_of(rows[start:end], segments[start:end], handles)
        except BaseException:
            self._settle(np.flatnonzero(self._under_way), UNREAD)
            raise

    def _bring_of(self, rows: np.ndarray, segments: np.ndarray, handles: dict[int, Handle]) -> None:
        by_rows = np.zeros(len(self._stream.pin.segments), dtype=bool)
        by_rows[self.require_sums(handles)] = True
        fds = np.full(len(by_rows), -1, dtype=np.int64)
        for number in np.flatnonzero(by_rows).tolist():
            fds[number] = _fd(handles[number])
        alone = by_rows[segments]
        at, quick, quick_segments = 0, rows[alone], segments[alone]
        while at < len(quick):
            self._stream._require_open()
            batch = self._plan(quick[at:], quick_segments[at:])
            self._read(batch, fds, handles)
            at += len(batch.rows)
        others = rows[~alone]
        for of_page in np.split(others, np.flatnonzero(np.diff(others // self._stream._page_size)) + 1):
            if len(of_page):
                self._stream._require_open()
                self._bring_page(of_page, handles)

    @contextmanager
    def opened(self, numbers: np.ndarray) -> Iterator[dict[int, Handle]]:
        """The handles of those of some segments whose extents can be opened. What of the others was asked for is wrong,
        or could not be read this time."""
        stream, handles = self._stream, dict[int, Handle]()
        with ExitStack() as stack:
            for number in map(int, numbers):
                segment = stream.pin.segments[number]
                try:
                    handles[number] = stack.enter_context(self._reader._handles.reading(segment.extent))
                except (BadExtent, OSError) as error:
                    for page in range(segment.first, segment.first + segment.pages):
                        self._failures[page] = error
            yield handles

    # ---- sums ----

    def require_sums(self, handles: dict[int, Handle]) -> list[int]:
        """Those segments of which rows can be read alone: there are sums of their sectors, which are in memory now."""
        stream, layer = self._stream, self._layer
        able = {
            number: handle
            for number, handle in handles.items()
            if handle.fd is not None and handle.header.rows and stream._has(number, handle.header)
        }
        missing: dict[int, Handle] = {}
        with self._reader._lock:
            has = self._sums_of(layer)[1]
            for number, handle in able.items():
                extent = int(stream._extent_of[number])
                if not has[extent]:
                    missing[extent] = handle
        while missing:
            room, taken = self._lane.sectors, list[tuple[int, Handle, int, int, int]]()
            for extent, handle in missing.items():
                layout = handle.header.layout
                layers = min(self._reader.geometry.layers - layer, max(1, _SUMS_BYTES // (8 * layout.sectors)))
                start, length = layout.sector_sums(layer, layers)
                first = start // SECTOR_BYTES
                count = -(-(start + length) // SECTOR_BYTES) - first
                if count > room:
                    break
                room -= count
                taken.append((extent, handle, layers, first, count))
            if not taken:
                break
            self._read_sums(taken)
            for extent, *_ in taken:
                del missing[extent]
        with self._reader._lock:
            has = self._sums_of(layer)[1]
            return [number for number in able if has[stream._extent_of[number]]]

    def _sums_of(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """A layer's sums, and of which extents they are there. The caller holds the lock."""
        stream = self._stream
        if layer not in stream._sums:
            stream._sums[layer] = np.zeros(stream._sums_at[-1], dtype="<u8")
            stream._has_sums[layer] = np.zeros(len(stream._extents), dtype=bool)
        return stream._sums[layer], stream._has_sums[layer]

    def _read_sums(self, taken: list[tuple[int, Handle, int, int, int]]) -> None:
        """Read the sums of extents: each with its handle, of how many layers, and from which sector of its file on how
        many hold them. Nothing says that they are right: a sector is wrong if its sum is."""
        stream = self._stream
        base = np.cumsum([0, *(count for *_, count in taken)])
        reads = np.array(
            [
                (_fd(handle), first * SECTOR_BYTES, count * SECTOR_BYTES, at)
                for (_, handle, _, first, count), at in zip(taken, base[:-1], strict=True)
            ],
            dtype=np.int64,
        )
        got = self._lane.read(reads, self._reader._in_flight)
        self._count(reads, got)
        with self._reader._lock:
            # Nobody reads these any more.
            whole = {layer for layer, states in stream._states.items() if np.all(states == ARRIVED)}
            for (extent, handle, layers, first, _), at, n_bytes in zip(taken, base[:-1], got, strict=True):
                header = handle.header
                stream._seeds[extent] = header.sector_seed(0)
                start, length = header.layout.sector_sums(self._layer, layers)
                skew = start - first * SECTOR_BYTES
                if n_bytes < skew + length:
                    continue
                begin = at * SECTOR_BYTES + skew
                found = self._lane.memory[begin : begin + length].view("<u8").reshape(layers, -1)
                for layer, sums in enumerate(found, self._layer):
                    if layer in whole:
                        continue
                    all_sums, has = self._sums_of(layer)
                    all_sums[stream._sums_at[extent] : stream._sums_at[extent + 1]] = sums
                    has[extent] = True

    # ---- by sectors ----

    def _plan(self, rows: np.ndarray, segments: np.ndarray) -> _Batch:
        """How as many of the first of ``rows`` as there is memory for are read."""
        reader = self._reader
        gap = reader.gap_bytes // SECTOR_BYTES
        other = np.ones(len(rows), dtype=bool)
        other[1:] = segments[1:] != segments[:-1]
        taken, spans, named = len(rows), [], np.zeros(len(rows), dtype=np.int64)
        for component, row_bytes in enumerate(reader.row_bytes):
            at = self._places(rows, segments, component)
            low, high = at // SECTOR_BYTES, (at + row_bytes - 1) // SECTOR_BYTES
            before = np.empty_like(high)
            before[:1], before[1:] = -1, high[:-1]
            begins = other | (low > before + 1 + gap)
            sectors = high - np.where(begins, low - 1, before)
            named += high - np.where(other, low - 1, np.maximum(before, low - 1))
            fits = int(np.searchsorted(np.cumsum(sectors), self._lane.sectors // len(reader.row_bytes), side="right"))
            taken = min(taken, max(1, fits))
            spans.append((low, high, begins))
        parts, base = [], 0
        for component, (low, high, begins) in enumerate(spans):
            starts = np.flatnonzero(begins[:taken])
            ends = np.append(starts[1:], taken) - 1
            part = self._part(component, segments[starts], low[starts], high[ends] - low[starts] + 1, base)
            parts.append(part)
            base += int(part.counts.sum())
        return _Batch(rows[:taken], parts, base, SECTOR_BYTES * int(named[:taken].sum()))

    def _places(self, rows: np.ndarray, segments: np.ndarray, component: int) -> np.ndarray:
        """Where in their files rows begin."""
        stream = self._stream
        begin = stream._data + self._layer * stream._slab + stream._in_slab[component]
        places: np.ndarray = begin[segments] + (rows - stream._first[segments]) * self._reader.row_bytes[component]
        return places

    def _part(self, component: int, segments: np.ndarray, sectors: np.ndarray, counts: np.ndarray, base: int) -> _Part:
        stream, row_bytes = self._stream, self._reader.row_bytes[component]
        begin = self._places(stream._first[segments], segments, component)
        first = np.maximum(0, -((begin - sectors * SECTOR_BYTES) // row_bytes))
        last = np.minimum(stream._count[segments], ((sectors + counts) * SECTOR_BYTES - begin) // row_bytes)
        first_rows = stream._first[segments] + first
        return _Part(
            segments,
            sectors,
            counts,
            base + np.cumsum(counts) - counts,
            first_rows,
            expanded(first_rows, last - first),
        )

    def _read(self, batch: _Batch, fds: np.ndarray, handles: dict[int, Handle]) -> None:
        stream, reader, layer = self._stream, self._reader, self._layer
        self._left -= len(batch.rows)
        parts, lane = batch.parts, self._lane
        covered = parts[0].covered
        for part in parts[1:]:
            covered = np.intersect1d(covered, part.covered, assume_unique=True)
        rows = self._with_others(batch.rows, covered)
        segments = np.concatenate([part.segments for part in parts])
        sectors, counts = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
        base = np.concatenate([part.base for part in parts])
        reads = np.stack([fds[segments], sectors * SECTOR_BYTES, counts * SECTOR_BYTES, base], axis=1)
        extents = stream._extent_of[segments]
        in_slab = sectors - (stream._data + layer * stream._slab)[segments] // SECTOR_BYTES
        with reader._lock:
            sums = self._sums_of(layer)[0]
        of_sectors = sums[expanded(stream._sums_at[extents] + in_slab, counts)]
        number = (layer * stream._slab[segments] // SECTOR_BYTES + in_slab).astype(np.uint64)
        seeds = expanded(stream._seeds[extents] + number, counts)
        from_ = np.empty((len(parts), len(rows)), dtype=np.int64)
        of_rows = np.searchsorted(stream._first, rows, side="right") - 1
        for component, part in enumerate(parts):
            read = np.searchsorted(part.first_rows, rows, side="right") - 1
            at = self._places(rows, of_rows, component) - part.sectors[read] * SECTOR_BYTES
            from_[component] = part.base[read] * SECTOR_BYTES + at
        to = self._place(rows)
        began = time.perf_counter()
        outcome, got = lane.read_rows(
            reads, of_sectors, seeds, from_, to, reader.row_bytes, self._to.arrays, reader._in_flight
        )
        seconds = time.perf_counter() - began
        self._count(reads, got)
        self._result.named_bytes += batch.named_bytes
        reader._measured(len(reads), int(reads[:, 2].sum()), seconds)
        right = outcome == RIGHT
        self._settle(rows[right], ARRIVED)
        delivered = np.where(right, rows, -1)
        if not np.all(right):
            asked = np.isin(rows, batch.rows)
            # What nobody asked for may be asked for later.
            self._settle(rows[~right & ~asked], UNREAD)
            for i in np.flatnonzero(~right & asked):
                if self._once_more(int(rows[i]), int(to[i]), bool(outcome[i] == NOT_READ), handles):
                    delivered[i] = rows[i]
        self._delivered.append(delivered)

    def _with_others(self, rows: np.ndarray, covered: np.ndarray) -> np.ndarray:
        """``rows``, and those of ``covered`` that nobody has read or is reading, and for which there is a place. They
        are claimed."""
        if self._to.first is not None:
            covered = covered[self._to.first[covered // self._stream._page_size] >= 0]
        with self._reader._lock:
            states = self._stream._of(self._layer)
            others = covered[states[covered] == UNREAD][: max(0, self.room - len(rows))]
            states[others] = _UNDER_WAY
        self._under_way[others] = True
        return np.sort(np.concatenate([rows, others]))

    def _place(self, rows: np.ndarray) -> np.ndarray:
        """The indices of rows in the arrays that they go to."""
        first, page_size = self._to.first, self._stream._page_size
        if first is None:
            self._placed += len(rows)
            return np.arange(self._placed - len(rows), self._placed, dtype=np.int64)
        places: np.ndarray = first.astype(np.int64, copy=False)[rows // page_size] + rows % page_size
        return places

    def _count(self, reads: np.ndarray, got: np.ndarray) -> None:
        self._result.reads += len(reads)
        self._result.read_bytes += int(np.maximum(got, 0).sum())

    def _settle(self, rows: np.ndarray, state: int) -> None:
        """Say what is known of rows that this call has claimed."""
        if len(rows):
            self._under_way[rows] = False
            with self._reader._changed:
                self._stream._of(self._layer)[rows] = state
                self._reader._changed.notify_all()

    # ---- one by one, where something is wrong ----

    def _once_more(self, row: int, to: int, unread: bool, handles: dict[int, Handle]) -> bool:
        """Read one row that could not be read with others, or was not what its sectors' sums say: whether it is now at
        ``to`` of the memory."""
        page = row // self._stream._page_size
        try:
            if unread and (parts := patiently(partial(self._alone, row, handles))) is not None:
                self._deliver(row, to, parts)
                return True
            whole = self._in_page(page, handles)
            self._deliver(row, to, [part[row % self._stream._page_size] for part in whole])
        except (BadExtent, OSError) as error:
            self._failed(np.array([row]), page, error)
            return False
        return True

    def _bring_page(self, rows: np.ndarray, handles: dict[int, Handle]) -> None:
        """Bring rows of one page by reading it whole."""
        page_size = self._stream._page_size
        page = int(rows[0]) // page_size
        self._left -= len(rows)
        self._result.named_bytes += self._reader.geometry.layer_bytes
        try:
            parts = self._in_page(page, handles)
        except (BadExtent, OSError) as error:
            self._failed(rows, page, error)
            return
        rows = self._with_others(rows, np.arange(page * page_size, (page + 1) * page_size))
        to = self._place(rows)
        for array, part in zip(self._to.arrays, parts, strict=True):
            array[to] = part[rows % page_size]
        self._settle(rows, ARRIVED)
        self._delivered.append(rows)

    def _deliver(self, row: int, to: int, parts: Sequence[np.ndarray]) -> None:
        for array, part in zip(self._to.arrays, parts, strict=True):
            array[to] = part
        self._settle(np.array([row]), ARRIVED)

    def _failed(self, rows: np.ndarray, page: int, error: BadExtent | OSError) -> None:
        if isinstance(error, OSError):
            self._result.unread[page] = error
        else:
            self._stream._wrong[self._layer, page] = str(error)
        self._settle(rows, UNREAD if isinstance(error, OSError) else WRONG)

    def _alone(self, row: int, handles: dict[int, Handle]) -> list[np.ndarray] | None:
        """A row's components, read by their sectors alone; None if a sum says that they are wrong."""
        stream, parts = self._stream, []
        number = int(np.searchsorted(stream._first, row, side="right") - 1)
        handle, extent = handles[number], int(stream._extent_of[number])
        with self._reader._lock:
            sums = self._sums_of(self._layer)[0][stream._sums_at[extent] : stream._sums_at[extent + 1]].copy()
        seed = handle.header.sector_seed(self._layer)
        slab = handle.header.layout.layer_offset(self._layer)
        for component, row_bytes in enumerate(self._reader.row_bytes):
            at = int(self._places(np.array([row]), np.array([number]), component)[0])
            start = at // SECTOR_BYTES * SECTOR_BYTES
            memory = staging_memory(align(at + row_bytes - start))
            got = os.preadv(_fd(handle), [memory.data], start)
            self._result.reads += 1
            self._result.read_bytes += got
            if got < len(memory):
                if os.fstat(_fd(handle)).st_size < start + len(memory):
                    raise BadExtent(f"{stream.pin.segments[number].extent.path.name} ends in the middle of a page")
                raise OSError(errno.EIO, f"{got:,} of {len(memory):,} bytes were read")
            first = (start - slab) // SECTOR_BYTES
            for i, sector in enumerate(memory.reshape(-1, SECTOR_BYTES), first):
                if xxhash.xxh3_64_intdigest(sector.data, seed=(seed + i) % (1 << 64)) != int(sums[i]):
                    return None
            parts.append(memory[at - start : at - start + row_bytes])
        return parts

    def _in_page(self, page: int, handles: dict[int, Handle]) -> list[np.ndarray]:
        """The components of a page, which has been verified whole, each of shape (rows, row bytes). Raises BadExtent if
        it is wrong, and OSError; what has been found of a page is told again."""
        if page in self._failures:
            raise self._failures[page]
        if page not in self._last_page:
            try:
                self._last_page = {page: self._page(page, handles)}
            except (BadExtent, OSError) as error:
                self._failures[page] = error
                raise
        return self._last_page[page]

    def _page(self, page: int, handles: dict[int, Handle]) -> list[np.ndarray]:
        stream, layer, geometry = self._stream, self._layer, self._reader.geometry
        number = int(np.searchsorted(stream._first, page * stream._page_size, side="right") - 1)
        segment, handle = stream.pin.segments[number], handles[number]
        slot = segment.slot + page - segment.first
        header = handle.header
        keys = header.keys[slot : slot + 1]
        if header.fingerprint != stream.pin.fingerprint or keys != stream.pin.keys[page : page + 1]:
            raise BadExtent(_WRITTEN)
        room = sum(align(size) + ALIGNMENT for size in geometry.component_bytes)
        memory = staging_memory(room)
        one = segment._replace(slot=slot, pages=1, first=page)
        found, _ = patiently(lambda: handle.read(one, layer, memory, 0))
        self._result.reads += 1
        self._result.read_bytes += found.n_bytes
        wrong = header.wrong_slots(layer, slot, found.components) if found.wrong is None else found.wrong
        if wrong:
            raise BadExtent(_WRITTEN)
        return [array.reshape(stream._page_size, -1) for (array,) in found.components]


def _fd(handle: Handle) -> int:
    assert handle.fd is not None, "of a file"
    return handle.fd
