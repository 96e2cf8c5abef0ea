"""Streaming stored pages back, layer by layer, ahead of whoever consumes them.

The unit of work is a `Chunk`: some consecutive pages of one request in one layer, at most ``chunk_bytes`` of them. A
few threads read chunks into reused, page-aligned buffers, which all streams share, and verify them there; every stream
is read in the order of its layers, as far ahead as there are buffers. So memory is bounded whatever the context's
length, a forward can start when its first layer has arrived, and a request that still waits can have its first layers
in memory already.

Who gets a buffer: the streams that are being consumed (`Stream.hurry`), of these the one that is behind; then the
others, the oldest first, but for a few buffers that are kept back for the former. What is consumed frees its buffer,
so streams that are consumed always advance, and those that wait never keep them from it.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import Any, NamedTuple

from agentstate.errors import BadExtent
from agentstate.pages.backends import Buffer, OpenFile, PosixBackend, ReadBackend
from agentstate.pages.extent import ALIGNMENT, ExtentHeader, Geometry, align, checksum, page_seed
from agentstate.pages.files import open_direct
from agentstate.pages.store import Hold, Segment, StoredExtent

_Free = deque[tuple[Buffer, Callable[[], None] | None]]


class Part(NamedTuple):
    """What was read of one segment in one layer: one uint8 array of shape (pages, component bytes) a component, in
    the memory that the backend reads into, and the header of its extent, which says what they should be."""

    segment: Segment
    header: ExtentHeader
    arrays: list[Buffer]


@dataclass
class Chunk:
    """Pages ``[first, first + count)`` of a stream, in layer ``layer``.

    The arrays of ``parts`` are views of a buffer that is reused: valid until the next chunk is asked for, and if the
    consumer sets ``keep_until`` by then, until that has returned. It is called by the thread that is about to
    overwrite them. ``wrong`` are the pages that must not be used: not read, or not as they were written, wherever the
    index took them from. ``unread`` holds the segments that could not be read, with the reason; ``n_bytes`` is what
    came from the device.
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
        # Direct I/O reads whole blocks: up to two more a component than its bytes need.
        self._padding = 2 * ALIGNMENT * len(geometry.component_bytes)
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
        self._lock = threading.Lock()
        # There may be something to do. A buffer that comes back wakes one thread: waking all costs as much as a read.
        self._work_to_do = threading.Condition(self._lock)
        self._closing = False
        self._threads = [
            threading.Thread(target=self._work, name="agentstate-read", daemon=True) for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def open(self, hold: Hold) -> Stream:
        """Begin to read what ``hold`` holds, which the stream closes when it is closed."""
        stream = Stream(self, hold, list(self._runs(hold.segments)))
        with self._lock:
            self._streams.append(stream)
            self._work_to_do.notify_all()
        return stream

    @property
    def staged_bytes(self) -> int:
        """How much memory the streams have at the moment."""
        with self._lock:
            return sum(len(stream.ahead) for stream in self._streams) * self.chunk_bytes

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

    def _release(self, buffer: Buffer, keep_until: Callable[[], None] | None) -> None:
        """Take a buffer back. The caller holds the lock."""
        if keep_until is None:
            self._free.append((buffer, None))
        else:
            # At the end of the line, where by its turn there is hardly anything left to wait for.
            self._free.appendleft((buffer, keep_until))
        self._work_to_do.notify()

    def _runs(self, segments: Sequence[Segment]) -> Iterator[tuple[Segment, ...]]:
        """Group segments into runs whose reads of one layer fit one buffer, splitting those that do not."""
        run: list[Segment] = []
        room = self.chunk_bytes
        for segment in segments:
            while segment.pages:
                taken = min(segment.pages, max(0, (room - self._padding) // self.geometry.layer_bytes))
                if taken == 0:
                    yield tuple(run)
                    run, room = [], self.chunk_bytes
                    continue
                run.append(segment._replace(pages=taken))
                room -= self._padding + taken * self.geometry.layer_bytes
                segment = segment._replace(
                    slot=segment.slot + taken, pages=segment.pages - taken, first=segment.first + taken
                )
        if run:
            yield tuple(run)

    def close(self) -> None:
        """End the threads. Every stream is closed before."""
        with self._lock:
            self._closing = True
            self._work_to_do.notify_all()
        for thread in self._threads:
            thread.join()


class Stream:
    """The pages of one hold, on their way. `LayerwiseReader.open` makes it.

    What cannot be opened or read, or is not what was written, is reported in its chunk, and everything else is read all
    the same.
    """

    def __init__(self, reader: LayerwiseReader, hold: Hold, runs: list[tuple[Segment, ...]]):
        self.hold = hold
        self.hurried = False
        # Chunks that are read or being read, in order, each with its buffer.
        self.ahead: deque[tuple[Future[Chunk], Buffer]] = deque()
        self._reader = reader
        self._runs = runs
        self._closed = False
        self._reading_begun = threading.Condition(reader._lock)
        self._opened: dict[StoredExtent, Future[_OpenExtent]] = {}
        self._to_open = deque(dict.fromkeys(segment.extent for segment in hold.segments))
        self._taken = 0
        self._total = len(runs) * reader.geometry.layers

    @property
    def wants(self) -> int | None:
        """The layer that is to be read next; None when everything is read or being read."""
        return self._taken // len(self._runs) if self._taken < self._total else None

    @property
    def idle(self) -> bool:
        """Whether nothing is being read for it: everything has been, or all the memory it may have is full."""
        with self._reader._lock:
            more = self.wants is not None and len(self._reader._free) > self._reader._kept_back
            return not (more or self._to_open) and all(reading.done() for reading, _ in self.ahead)

    def job(self, free: _Free | None) -> Callable[[], None] | None:
        """The next thing to do for this stream, if there is one; reading takes a buffer from ``free``. The caller has
        the reader's lock, and runs the job without it."""
        if self._to_open:
            extent = self._to_open.popleft()
            opening = self._opened[extent] = Future()
            return lambda: _fulfil(opening, lambda: _OpenExtent(extent, self._reader._backend))
        if (layer := self.wants) is None or not free:
            return None
        (buffer, free_after), run = free.pop(), self._runs[self._taken % len(self._runs)]
        self._taken += 1
        reading: Future[Chunk] = Future()
        self.ahead.append((reading, buffer))
        self._reading_begun.notify_all()
        return lambda: _fulfil(reading, lambda: self._read(layer, run, buffer, free_after))

    def _read(
        self, layer: int, run: tuple[Segment, ...], buffer: Buffer, free_after: Callable[[], None] | None
    ) -> Chunk:
        if free_after is not None:
            free_after()
        chunk = Chunk(layer, run[0].first, sum(segment.pages for segment in run), [], [])
        position = 0
        for segment in run:
            try:
                # Every opening was taken up before any reading: it is done, or another thread is at it.
                extent = self._opened[segment.extent].result()
                arrays, position, n_bytes = _read_segment(extent.file, segment, layer, buffer, position)
                chunk.parts.append(Part(segment, extent.header, arrays))
                chunk.n_bytes += n_bytes
                chunk.wrong += self._wrong_pages(layer, segment, extent.header, arrays)
            except (OSError, BadExtent) as error:
                chunk.unread.append((segment, error))
                chunk.wrong += range(segment.first, segment.first + segment.pages)
        return chunk

    @cached_property
    def _seeds(self) -> list[int]:
        return [page_seed(self.hold.fingerprint, key) for key in self.hold.keys]

    def _wrong_pages(
        self, layer: int, segment: Segment, header: ExtentHeader, arrays: Sequence[Buffer]
    ) -> Iterator[int]:
        """The pages of a segment whose bytes in ``layer`` are not those that were written for them."""
        sums = header.checksums[layer, segment.slot : segment.slot + segment.pages].tolist()
        on_host = self._reader._backend.on_host(arrays)
        for i in range(segment.pages):
            page = segment.first + i
            # The slot is the index's word, which may be wrong, and lead behind the last page.
            if (
                i >= len(sums)
                or header.keys[segment.slot + i] != self.hold.keys[page]
                or checksum(self._seeds[page], layer, [array[i] for array in on_host]) != sums[i]
            ):
                yield page

    def hurry(self) -> None:
        """It is going to be consumed now."""
        with self._reader._lock:
            self.hurried = True
            self._reader._work_to_do.notify_all()

    def __iter__(self) -> Iterator[Chunk]:
        """Every chunk, layer by layer."""
        self.hurry()
        for layer in range(self._reader.geometry.layers):
            yield from self.layer(layer)

    def layer(self, layer: int) -> Iterator[Chunk]:
        """The chunks of one layer, each as soon as it has arrived. To be called for every layer, in order, of a stream
        that hurries, and run to the end."""
        for _ in self._runs:
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
        """Stop reading and let go of everything, the hold too. At any time, also twice."""
        with self._reader._lock:
            if self._closed:
                return
            self._closed = True
            self._reader._streams.remove(self)
            self._to_open.clear()
            self._taken = self._total
            self._reading_begun.notify_all()
        # No thread may read on when the files are closed.
        for reading, _ in self.ahead:
            reading.exception()
        for opening in self._opened.values():
            if opening.exception() is None:
                opening.result().close()
        self.hold.close()
        with self._reader._lock:
            for reading, buffer in self.ahead:
                self._reader._release(buffer, reading.result().keep_until if reading.exception() is None else None)
            self.ahead.clear()

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

    def close(self) -> None:
        self.file.close()
        os.close(self._fd)


def _read_segment(
    file: OpenFile, segment: Segment, layer: int, buffer: Buffer, position: int
) -> tuple[list[Buffer], int, int]:
    """Read one layer of a segment into ``buffer`` from ``position`` on, which is block-aligned: an array a component,
    the next free position, and the bytes that were read. Raises OSError, also when the file is too short."""
    layout = segment.extent.layout
    components = range(len(layout.geometry.component_bytes))
    spans = [layout.component_range(layer, component, segment.slot, segment.pages) for component in components]
    arrays, n_bytes = [], 0
    for start, end, members in _coalesced(spans):
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


def _coalesced(spans: list[tuple[int, int]]) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Adjacent (offset, length) spans as one range each: start, end, and the spans in it."""
    members: list[tuple[int, int]] = []
    for offset, length in spans:
        if members and sum(members[-1]) != offset:
            yield members[0][0], sum(members[-1]), members
            members = []
        members.append((offset, length))
    yield members[0][0], sum(members[-1]), members
