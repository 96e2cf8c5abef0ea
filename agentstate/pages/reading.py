"""Streaming stored pages back, layer by layer, ahead of whoever consumes them.

The unit of work is a `Chunk`: some consecutive pages of one request in one layer, at most ``chunk_bytes`` of them; the
first layer is shared out among all threads. A few threads read chunks into reused, page-aligned buffers, which all
streams share, and verify them there; every stream is read in layer order, as far ahead as there are buffers.
So memory is bounded whatever the context's length, a forward can start when its first layer has arrived, and a request
that still waits can have its first layers in memory already.

Who gets a buffer: the streams that are being consumed (`Stream.hurry`), of these the one that is behind, or hurried
first, since of several that are consumed together that one is consumed first; then the others, the oldest first, but
for a few buffers that are kept back for the former. What is consumed frees its buffer, so streams that are consumed
always advance, and those that wait never keep them from it.

A stream whose consumer names a `Destination` needs no buffers: what it has not read yet is read to where it is needed,
and verified there.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

from agentstate.errors import BadExtent
from agentstate.pages.backends import Buffer, OpenFile, PosixBackend, ReadBackend
from agentstate.pages.extent import ALIGNMENT, ExtentHeader, Geometry, align
from agentstate.pages.files import open_direct
from agentstate.pages.keys import PageKeys
from agentstate.pages.pins import Pin, Segment, StoredExtent

# Below about 1 MiB a direct read reaches less of a drive than its bandwidth.
RANGE_BYTES = 1 << 20
# What keeps a drive busy while some of it is verified.
READ_THREADS = 4
# What one call reads into, at the most.
_MOST_ARRAYS = os.sysconf("SC_IOV_MAX")

_Free = deque[tuple[Buffer, Callable[[], None] | None]]


class Part(NamedTuple):
    """What was read of one segment in one layer: one uint8 array of shape (pages, component bytes) a component, in
    the memory that the backend reads into, and the header of its extent, which says what they should be."""

    segment: Segment
    header: ExtentHeader
    arrays: list[Buffer]


class Destination(NamedTuple):
    """Host memory that direct I/O can read ``pages`` of a stream into: ``rows(layer, pages)`` are, of each component,
    arrays of shape (pages, component bytes) that follow each other, at addresses that are multiples of 4 KiB. So are
    the components' sizes. Other pages of the stream are not read."""

    pages: range
    rows: Callable[[int, range], list[list[Buffer]]]


@dataclass
class Chunk:
    """Pages ``[first, first + count)`` of a stream, in layer ``layer``.

    ``parts`` has what was read to staging; what was read to a `Destination` is there. The arrays of ``parts`` are views
    of a buffer that is reused: valid until the next chunk is asked for, and if the consumer sets ``keep_until`` by
    then, until that has returned. It is called by the thread that is about to overwrite them. ``wrong`` are the pages
    that must not be used: not read, or not as they were written, wherever the index took them from. ``unread`` holds
    the segments that could not be read, with the reason; ``n_bytes`` is what came from the device.
    """

    layer: int
    first: int
    count: int
    parts: list[Part]
    unread: list[tuple[Segment, OSError | BadExtent]]
    wrong: list[int] = field(default_factory=list)
    n_bytes: int = 0
    keep_until: Callable[[], None] | None = None


class LayerwiseReader:
    """Reads with ``threads`` threads into ``staging_bytes`` of memory, in chunks of at most ``chunk_bytes``.

    Any number of streams at a time, from any threads. The memory, ``staging``, is taken at once and kept; ``backend``
    decides where it is and reads into it. A chunk of 2 MiB is long enough for a disk, and is still in the processor's
    cache when it is verified.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        staging_bytes: int,
        threads: int,
        chunk_bytes: int = 2 << 20,
        backend: ReadBackend | None = None,
    ):
        self.geometry = geometry
        self._backend = backend or PosixBackend()
        # Direct I/O reads whole blocks: of a segment whose pages do not end where blocks do, up to two more a component
        # than its bytes need.
        whole = not any(n_bytes % ALIGNMENT for n_bytes in geometry.component_bytes)
        self._padding = 0 if whole else 2 * ALIGNMENT * len(geometry.component_bytes)
        smallest = geometry.layer_bytes + self._padding
        self.chunk_bytes = align(max(smallest, min(chunk_bytes + self._padding, staging_bytes // 2)))
        count = max(2, staging_bytes // self.chunk_bytes)
        self.staging = self._backend.allocate(count * self.chunk_bytes)
        # With each, what has to return before it is overwritten.
        self._free: _Free = deque(
            (self.staging[i * self.chunk_bytes : (i + 1) * self.chunk_bytes], None) for i in range(count)
        )
        self._kept_back = max(1, count // 8)
        self._streams: list[Stream] = []
        self._closer = ThreadPoolExecutor(1, thread_name_prefix="agentstate-close")
        self._lock = threading.Lock()
        # There may be something to do. A buffer that comes back wakes one thread: waking all costs as much as a read.
        self._work_to_do = threading.Condition(self._lock)
        self._closing = False
        self._threads = [
            threading.Thread(target=self._work, name="agentstate-read", daemon=True) for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def open(self, pin: Pin) -> Stream:
        """Begin to read the pages of ``pin``, which the stream closes when it is closed."""
        pages = -(-len(pin.keys) // len(self._threads))
        a_thread = max(RANGE_BYTES, pages * self.geometry.layer_bytes) + len(pin.segments) * self._padding
        # The first layer of a short context is waited for in any case: blocks may be cut.
        block_pages = self.geometry.block_pages if a_thread >= self.chunk_bytes else 1
        first = self._runs(pin.segments, min(a_thread, self.chunk_bytes), block_pages)
        others = self._runs(pin.segments, self.chunk_bytes, self.geometry.block_pages)
        stream = Stream(self, pin, list(first), list(others))
        with self._lock:
            self._streams.append(stream)
            self._work_to_do.notify_all()
        return stream

    @property
    def staged_bytes(self) -> int:
        """How much memory the streams have at the moment."""
        with self._lock:
            staged = (buffer is not None for stream in self._streams for _, buffer in stream.ahead)
            return sum(staged) * self.chunk_bytes

    def _work(self) -> None:
        while True:
            with self._lock:
                while (job := self._job()) is None and not self._closing:
                    self._work_to_do.wait()
            if job is None:
                return
            job()

    def _job(self) -> Callable[[], None] | None:
        """What a thread that is free now should do."""
        hurried = [stream for stream in self._streams if stream.hurried and stream.wants is not None]
        for stream in sorted(hurried, key=lambda stream: stream.wants or 0) + self._streams:
            if job := stream.job(None if len(self._free) <= (0 if stream.hurried else self._kept_back) else self._free):
                return job
        return None

    def _release(self, buffer: Buffer | None, keep_until: Callable[[], None] | None) -> None:
        """Take a buffer back, if there is one. The caller holds the lock."""
        if buffer is None:
            return
        if keep_until is None:
            self._free.append((buffer, None))
        else:
            # At the end of the line, where by its turn there is hardly anything left to wait for.
            self._free.appendleft((buffer, keep_until))
        self._work_to_do.notify()

    def _runs(self, segments: Sequence[Segment], n_bytes: int, block_pages: int) -> Iterator[tuple[Segment, ...]]:
        """Group segments into runs whose reads of one layer take at most ``n_bytes``, or are of one page, splitting
        those that do not, where blocks of an extent end if a whole one fits."""
        n_bytes = max(n_bytes, self.geometry.layer_bytes + self._padding)
        run: list[Segment] = []
        room = n_bytes
        for segment in segments:
            while segment.pages:
                taken = min(segment.pages, max(0, (room - self._padding) // self.geometry.layer_bytes))
                beyond = (segment.slot + taken) % block_pages if taken < segment.pages else 0
                # A block that is read in two parts is verified page by page.
                if (taken > beyond or run) and beyond:
                    taken -= min(taken, beyond)
                if taken == 0:
                    yield tuple(run)
                    run, room = [], n_bytes
                    continue
                room -= self._padding + taken * self.geometry.layer_bytes
                run.append(segment._replace(pages=taken))
                segment = segment._replace(
                    slot=segment.slot + taken, pages=segment.pages - taken, first=segment.first + taken
                )
        if run:
            yield tuple(run)

    def close(self) -> None:
        """End the threads. Every stream is closed before, or discarded."""
        self._closer.shutdown()
        with self._lock:
            self._closing = True
            self._work_to_do.notify_all()
        for thread in self._threads:
            thread.join()


class Stream:
    """The pages of one pin, on their way. `LayerwiseReader.open` makes it.

    What cannot be opened or read, or is not what was written, is reported in its chunk, and everything else is read all
    the same.
    """

    def __init__(
        self,
        reader: LayerwiseReader,
        pin: Pin,
        first: list[tuple[Segment, ...]],
        others: list[tuple[Segment, ...]],
    ):
        self.pin = pin
        self.hurried = False
        # Chunks that are read or being read, in order, each with its buffer, if it has one.
        self.ahead: deque[tuple[Future[Chunk], Buffer | None]] = deque()
        self._reader = reader
        # What is read at a time: of the first layer, which a forward waits for with nothing else to do and which
        # therefore comes before any other, and of those.
        self._first, self._others = first, others
        self._first_missing = len(first)
        self._closed = False
        self._destination: Destination | None = None
        self._reading_begun = threading.Condition(reader._lock)
        self._opened: dict[StoredExtent, Future[_OpenExtent]] = {}
        self._to_open = deque(dict.fromkeys(segment.extent for segment in pin.segments))
        self._taken = 0
        self._total = len(first) + len(others) * (reader.geometry.layers - 1)

    @property
    def wants(self) -> int | None:
        """The layer that is to be read next; None when everything is read or being read."""
        return self._next()[0] if self._taken < self._total else None

    def _next(self) -> tuple[int, tuple[Segment, ...]]:
        """Which layer and which run of it is to be read next."""
        if self._taken < len(self._first):
            return 0, self._first[self._taken]
        layer, run = divmod(self._taken - len(self._first), len(self._others))
        return layer + 1, self._others[run]

    @property
    def staged(self) -> float | None:
        """Which fraction of it, by chunks, has been read once nothing is being read for it: everything has been, or all
        the memory that it may have is full. None until then."""
        with self._reader._lock:
            more = self.wants is not None and len(self._reader._free) > self._reader._kept_back
            if more or self._to_open or not all(reading.done() for reading, _ in self.ahead):
                return None
            return self._taken / self._total

    def job(self, free: _Free | None) -> Callable[[], None] | None:
        """The next thing to do for this stream, if there is one; reading takes a buffer from ``free``. The caller has
        the reader's lock, and runs the job without it."""
        if self._to_open:
            extent = self._to_open.popleft()
            opening = self._opened[extent] = Future()
            return lambda: _fulfil(opening, lambda: _OpenExtent(extent, self._reader._backend))
        if self._taken == self._total or (self._first_missing and self._taken >= len(self._first)):
            return None
        layer, run = self._next()
        chunk = Chunk(layer, run[0].first, sum(segment.pages for segment in run), [], [])
        buffer: Buffer | None = None
        if self._destination is not None:
            read = partial(self._read_to, self._destination, chunk, run)
        elif free:
            buffer, free_after = free.pop()
            read = partial(self._read, buffer, free_after, chunk, run)
        else:
            return None
        self._taken += 1
        reading: Future[Chunk] = Future()
        self.ahead.append((reading, buffer))
        self._reading_begun.notify_all()

        return lambda: _fulfil(reading, read if layer else lambda: self._first_layer(read))

    def _first_layer(self, read: Callable[[], Chunk]) -> Chunk:
        try:
            return read()
        finally:
            # Before the chunk is there to be consumed, or its buffer might go to streams that are consumed later.
            with self._reader._lock:
                self._first_missing -= 1
                if not self._first_missing:
                    self._reader._work_to_do.notify_all()

    def _read(
        self, buffer: Buffer, free_after: Callable[[], None] | None, chunk: Chunk, run: tuple[Segment, ...]
    ) -> Chunk:
        if free_after is not None:
            free_after()
        position = 0
        for segment in run:
            with self._reported(chunk, segment):
                extent = self._extent(segment)
                arrays, position, n_bytes = _read_segment(extent.file, segment, chunk.layer, buffer, position)
                chunk.parts.append(Part(segment, extent.header, arrays))
                chunk.n_bytes += n_bytes
                on_host = self._reader._backend.on_host(arrays)
                chunk.wrong += self._wrong_pages(chunk.layer, segment, extent.header, [[array] for array in on_host])
        return chunk

    def _read_to(self, destination: Destination, chunk: Chunk, run: tuple[Segment, ...]) -> Chunk:
        for segment in run:
            first = max(segment.first, destination.pages.start)
            pages = min(segment.first + segment.pages, destination.pages.stop) - first
            if pages <= 0:
                continue
            own = segment._replace(slot=segment.slot + first - segment.first, pages=pages, first=first)
            with self._reported(chunk, own):
                extent = self._extent(own)
                rows = destination.rows(chunk.layer, range(first, first + pages))
                chunk.n_bytes += extent.read_to(rows, own, chunk.layer)
                chunk.wrong += self._wrong_pages(chunk.layer, own, extent.header, rows)
        return chunk

    def _extent(self, segment: Segment) -> _OpenExtent:
        # Every opening was taken up before any reading: it is done, or another thread is at it.
        return self._opened[segment.extent].result()

    @contextmanager
    def _reported(self, chunk: Chunk, segment: Segment) -> Iterator[None]:
        """What goes wrong with a segment is said in its chunk."""
        try:
            yield
        except (OSError, BadExtent) as error:
            chunk.unread.append((segment, error))
            chunk.wrong += range(segment.first, segment.first + segment.pages)

    def _wrong_pages(
        self, layer: int, segment: Segment, header: ExtentHeader, components: Sequence[Sequence[Buffer]]
    ) -> Iterator[int]:
        """The pages of a segment whose bytes in ``layer`` are not those that were written for them."""
        wanted = self.pin.keys[segment.first : segment.first + segment.pages]
        # Where they lie is the index's word, which may be wrong.
        written = header.keys[segment.slot : segment.slot + segment.pages]
        if header.fingerprint != self.pin.fingerprint:
            written = PageKeys()
        wrong = set(header.wrong_slots(layer, segment.slot, components))
        if wrong or wanted != written:
            for i, key in enumerate(wanted):
                if segment.slot + i in wrong or i >= len(written) or written[i] != key:
                    yield segment.first + i

    def hurry(self, destination: Destination | None = None) -> None:
        """It is going to be consumed now. What has not been read yet is read to ``destination``, if there is one, which
        is left alone once every layer has been consumed, or the stream is closed."""
        with self._reader._lock:
            self.hurried = True
            self._destination = destination
            if not self._closed:
                self._reader._streams.remove(self)
                self._reader._streams.append(self)
            self._reader._work_to_do.notify_all()

    def __iter__(self) -> Iterator[Chunk]:
        """Every chunk, layer by layer."""
        if not self.hurried:
            self.hurry()
        for layer in range(self._reader.geometry.layers):
            yield from self.layer(layer)

    def layer(self, layer: int) -> Iterator[Chunk]:
        """The chunks of one layer, each as soon as it has arrived. To be called for every layer, in order, of a stream
        that hurries, and run to the end."""
        for _ in self._others if layer else self._first:
            with self._reader._lock:
                self._reading_begun.wait_for(lambda: self.ahead or self._closed)
                if self._closed:
                    raise ValueError("the stream is closed")
                reading, buffer = self.ahead[0]
            chunk = reading.result()
            if chunk.layer != layer:
                raise ValueError(f"layer {layer} was asked for and {chunk.layer} is the next")
            yield chunk
            with self._reader._lock:
                if not self._closed:
                    self.ahead.popleft()
                    self._reader._release(buffer, chunk.keep_until)

    def close(self) -> None:
        """Stop reading and let go of everything, the pin too. At any time, also twice."""
        if self._stop():
            self._let_go()

    def discard(self) -> None:
        """Close, without waiting for what is being read just now."""
        if self._stop():
            self._reader._closer.submit(self._let_go)

    def _stop(self) -> bool:
        """Take up nothing more; False when that has been said before."""
        with self._reader._lock:
            if self._closed:
                return False
            self._closed = True
            self._reader._streams.remove(self)
            self._to_open.clear()
            self._taken = self._total
            self._reading_begun.notify_all()
            return True

    def _let_go(self) -> None:
        # No thread may read on when the files are closed.
        for reading, _ in self.ahead:
            reading.exception()
        for opening in self._opened.values():
            if opening.exception() is None:
                opening.result().close()
        self.pin.close()
        with self._reader._lock:
            for reading, buffer in self.ahead:
                self._reader._release(buffer, reading.result().keep_until if reading.exception() is None else None)
            self.ahead.clear()
            self._destination = None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _fulfil(promise: Future[Any], work: Callable[[], Any]) -> None:
    try:
        promise.set_result(work())
    except BaseException as error:
        promise.set_exception(error)


class _OpenExtent:
    """An extent open for reading, and its header. Raises OSError, and BadExtent for a header that is damaged
    or not of this layout."""

    def __init__(self, extent: StoredExtent, backend: ReadBackend):
        self._fd = open_direct(extent.path, os.O_RDONLY)
        try:
            raw = mmap.mmap(-1, extent.layout.data_offset)
            os.preadv(self._fd, [raw], 0)
            self.header = ExtentHeader.decode(memoryview(raw), extent.path.name)
            if self.header.layout != extent.layout:
                raise BadExtent(f"{extent.path.name}: the header is of another extent")
            self.file = backend.open(self._fd, extent.path)
        except BaseException:
            os.close(self._fd)
            raise

    def read_to(self, components: Sequence[Sequence[Buffer]], segment: Segment, layer: int) -> int:
        """Read one layer of a segment to where its components are to be, in arrays that follow each other: the number
        of bytes. Raises OSError, also when the file is too short, and ValueError for arrays of another size."""
        n_bytes, arrays_of = 0, iter(components)
        for start, end, members in _coalesced(_spans(segment, layer)):
            into = [array for _ in members for array in next(arrays_of)]
            for i in range(0, len(into), _MOST_ARRAYS):
                some = into[i : i + _MOST_ARRAYS]
                if os.preadv(self._fd, some, start) < (wanted := sum(array.nbytes for array in some)):
                    raise OSError(f"{segment.extent.path} ends in the middle of a page")
                start += wanted
                n_bytes += wanted
            if start != end:
                raise ValueError(f"{start - end:+,} bytes of memory for pages of {segment.extent.path}")
        return n_bytes

    def close(self) -> None:
        self.file.close()
        os.close(self._fd)


def _read_segment(
    file: OpenFile, segment: Segment, layer: int, buffer: Buffer, position: int
) -> tuple[list[Buffer], int, int]:
    """Read one layer of a segment into ``buffer`` from ``position`` on, which is block-aligned: an array a component,
    the next free position, and the bytes that were read. Raises OSError, also when the file is too short."""
    arrays, n_bytes = [], 0
    for start, end, members in _coalesced(_spans(segment, layer)):
        skew = start % ALIGNMENT
        wanted = align(skew + end - start)
        got = file.read(buffer[position : position + wanted], start - skew)
        if got < skew + end - start:
            raise OSError(f"{segment.extent.path} ends in the middle of a page")
        n_bytes += got
        for offset, length in members:
            first = position + skew + offset - start
            arrays.append(buffer[first : first + length].reshape(segment.pages, -1))
        position += wanted
    return arrays, position, n_bytes


def _spans(segment: Segment, layer: int) -> list[tuple[int, int]]:
    """Where the components of a segment are in one layer: offsets and lengths."""
    layout = segment.extent.layout
    components = range(len(layout.geometry.component_bytes))
    return [layout.component_range(layer, component, segment.slot, segment.pages) for component in components]


def _coalesced(spans: list[tuple[int, int]]) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Adjacent (offset, length) spans as one range each: start, end, and the spans in it."""
    members: list[tuple[int, int]] = []
    for offset, length in spans:
        if members and sum(members[-1]) != offset:
            yield members[0][0], sum(members[-1]), members
            members = []
        members.append((offset, length))
    yield members[0][0], sum(members[-1]), members
