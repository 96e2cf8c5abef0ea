"""Streaming stored pages back, layer by layer, ahead of whoever consumes them.

The unit of work is a `Chunk`: some consecutive pages of one request in one layer, at most ``chunk_bytes`` of them; the
first layer is shared out among all threads. A few threads read chunks into reused, page-aligned buffers, which all
streams share, and verify them there; every stream is read in layer order, as far ahead as there are buffers.
So memory is bounded whatever the context's length, a forward can start when its first layer has arrived, and a request
that still waits can have its first layers in memory already.

There is one queue of reads. `Need` decides which stream is next, chunk by chunk: what a forward waits for, then what a
queued request needs, what is due at some time, and what is read in case. A less urgent stream yields as soon as its
running chunk has been read. Of several streams that are consumed, the one that is furthest behind comes first, then the
one that was hurried first, since streams consumed together are consumed in that order. Of the others, the oldest comes
first. The less urgent a stream, the more buffers it leaves to others, and at least one thread reads what is more
urgent. Consuming frees buffers, so streams that wait never hold up those that are consumed. These have device memory,
too, and must get on whatever comes before them: one chunk in `_PASSES` is theirs.

A stream whose consumer names a `Destination` needs no buffers: what it has not read yet is read to where it is needed,
and verified there.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

from agentstate.errors import BadExtent
from agentstate.pages.backends import Buffer, PosixBackend, ReadBackend
from agentstate.pages.extent import ALIGNMENT, ExtentHeader, Geometry, align
from agentstate.pages.handles import FileHandle, Found, Handles, OpenExtent, most_open, patiently
from agentstate.pages.keys import PageKeys
from agentstate.pages.pins import Pin, Segment

# Below about 1 MiB a direct read reaches less of a drive than its bandwidth.
RANGE_BYTES = 1 << 20
# What keeps a drive busy while some of it is verified.
READ_THREADS = 4
# How many chunks are read before a stream that is consumed gets one whatever comes before it.
_PASSES = 32

_Free = deque[tuple[Buffer, Callable[[], None] | None]]


class Urgency(IntEnum):
    """Who waits for a stream. Smaller is read first."""

    AWAITED = 0
    """A forward, which consumes it."""
    DEMAND = 1
    """A request that is queued."""
    DUE = 2
    """Nobody yet: somebody has said when it will be needed."""
    PLANNED = 3
    """Nobody yet: it is read in case it is asked for."""


class Need(NamedTuple):
    """Who needs a stream before it is consumed, and by when on the monotonic clock. The smaller one is read first."""

    urgency: Urgency
    due_s: float = math.inf


AWAITED = Need(Urgency.AWAITED)
DEMAND = Need(Urgency.DEMAND)
PLANNED = Need(Urgency.PLANNED)


class Part(NamedTuple):
    """What was read of one segment in one layer: one uint8 array of shape (pages, component bytes) a component, in
    the memory that the backend reads into."""

    segment: Segment
    arrays: list[Buffer]


class Destination(NamedTuple):
    """Host memory that direct I/O can read ``pages`` of a stream into: ``rows(layer, pages)`` are, for each
    component, consecutive arrays of shape (pages, component bytes). Their addresses and the components' sizes are
    multiples of 4 KiB. Other pages of the stream are not read."""

    pages: range
    rows: Callable[[int, range], list[list[Buffer]]]


@dataclass
class Chunk:
    """Pages ``[first, first + count)`` of a stream, in layer ``layer``.

    ``parts`` has what was read to staging; what is ``straight`` was read to a `Destination`. The arrays of ``parts``
    are views of a buffer that is reused. They are valid until the next chunk is asked for or, if the consumer sets
    ``keep_until`` by then, until that has returned; the thread that is about to overwrite them calls it. ``n_bytes``
    is what came from the drive.

    Two kinds of pages must not be used. ``wrong`` pages are lost for good, with the reason: their bytes are not what
    was written, or their extent is gone, cut off or no extent. ``unread`` segments could not be read this time, with
    the reason: nothing is known of their pages.

    What is in host memory already is streamed in chunks too: ``n_bytes_in_memory`` of it.
    """

    layer: int
    first: int
    count: int
    parts: list[Part] = field(default_factory=list)
    wrong: dict[int, str] = field(default_factory=dict)
    unread: list[tuple[Segment, OSError]] = field(default_factory=list)
    n_bytes: int = 0
    n_bytes_in_memory: int = 0
    keep_until: Callable[[], None] | None = None
    straight: bool = False

    def unread_pages(self) -> Iterator[int]:
        """The pages of the segments that were not read."""
        for segment, _ in self.unread:
            yield from range(segment.first, segment.first + segment.pages)

    def unusable(self) -> set[int]:
        """The pages that must not be used."""
        return {*self.wrong, *self.unread_pages()}


class LayerwiseReader:
    """Reads with ``threads`` threads into ``staging_bytes`` of memory, in chunks of at most ``chunk_bytes``.

    Any number of streams at a time, from any threads. The memory, ``staging``, is taken at once and kept; ``backend``
    decides where it is and reads into it. A chunk of 2 MiB is long enough for a disk, and is still in the processor's
    cache when it is verified. ``open_extent`` opens extents that are no files of this machine's.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        staging_bytes: int,
        threads: int,
        chunk_bytes: int = 2 << 20,
        backend: ReadBackend | None = None,
        open_extent: OpenExtent | None = None,
    ):
        self.geometry = geometry
        self._backend = backend or PosixBackend()
        self._handles = Handles(open_extent or partial(FileHandle, self._backend), most_open())
        # Direct I/O reads whole blocks: of a segment whose pages do not end where blocks do, up to two more a component
        # than its bytes need.
        whole = not any(n_bytes % ALIGNMENT for n_bytes in geometry.component_bytes)
        self._padding = 0 if whole else 2 * ALIGNMENT * len(geometry.component_bytes)
        smallest = geometry.layer_bytes + self._padding
        self.chunk_bytes = align(max(smallest, min(chunk_bytes + self._padding, staging_bytes // 2)))
        count = max(2, staging_bytes // self.chunk_bytes)
        self.staging = self._backend.allocate(count * self.chunk_bytes)
        # Each with what has to return before it is overwritten.
        self._free: _Free = deque(
            (self.staging[i * self.chunk_bytes : (i + 1) * self.chunk_bytes], None) for i in range(count)
        )
        self._buffers = count
        # How many buffers streams leave to more urgent ones. One is enough for some progress. What is consumed in the
        # background leaves fewer than what waits: it gives them back.
        kept = max(1, count // 8)
        self._left = {
            Urgency.DEMAND: kept,
            Urgency.DUE: min(2 * kept, count - 1),
            Urgency.PLANNED: min(3 * kept, count - 1),
        }
        self._left_by_consumed = kept // 2
        self._most_in_background = max(1, threads - 1)
        self._in_background = 0
        # By the urgency of streams that are consumed, how many chunks were read while they had to wait.
        self._passed: Counter[Urgency] = Counter()
        self._read_bytes: Counter[Urgency] = Counter()
        self._streams: list[Stream] = []
        self._open_streams = 0
        self._closer = ThreadPoolExecutor(1, thread_name_prefix="agentstate-close")
        self._lock = threading.Lock()
        # Signals that there may be work. A buffer that comes back wakes one thread: waking all costs as much as a read.
        self._work_to_do = threading.Condition(self._lock)
        self._closing = False
        self._threads = [
            threading.Thread(target=self._work, name="agentstate-read", daemon=True) for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def open(self, pin: Pin, need: Need = DEMAND, *, background: bool = False) -> Stream:
        """Begin to read the pages of ``pin``. ``background`` streams are going to be consumed without a forward that
        waits for them. Closing the stream closes the pin."""
        pages = -(-len(pin.keys) // len(self._threads))
        a_thread = max(RANGE_BYTES, pages * self.geometry.layer_bytes) + len(pin.segments) * self._padding
        # The first layer of a short context is waited for in any case: blocks may be cut.
        block_pages = self.geometry.block_pages if a_thread >= self.chunk_bytes else 1
        first = self._runs(pin.segments, min(a_thread, self.chunk_bytes), block_pages)
        others = self._runs(pin.segments, self.chunk_bytes, self.geometry.block_pages)
        stream = Stream(self, pin, list(first), list(others), need, background)
        with self._lock:
            self._streams.append(stream)
            self._open_streams += 1
            self._work_to_do.notify_all()
        return stream

    def kept(self) -> dict[str, int]:
        """What is not free at the moment: streams, until the last read of them has ended, the extents that they read,
        and buffers of staging."""
        with self._lock:
            buffers = self._buffers - len(self._free)
            return {"streams": self._open_streams, "extents": self._handles.kept, "staging_buffers": buffers}

    def read_bytes(self) -> dict[str, int]:
        """How much has been read since the start, by the urgency that it had then."""
        with self._lock:
            return {urgency.name.lower(): self._read_bytes[urgency] for urgency in Urgency}

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
        """The next job for a free thread."""
        streams = sorted(self._streams, key=_turn)
        late = {urgency for urgency, passed in self._passed.items() if passed >= _PASSES}
        if late:
            streams.sort(key=lambda stream: not (stream.consumed_in_background and stream.urgency in late))
        for stream in streams:
            if stream.waits_for_nobody and self._in_background >= self._most_in_background:
                continue
            urgency = stream.urgency
            if job := stream.job(self._free if len(self._free) > self._left_by(stream) else None):
                passed = {
                    other.urgency for other in streams if other.consumed_in_background and other.wants is not None
                }
                self._passed = Counter({other: self._passed[other] + 1 for other in passed if other != urgency})
                return self._background(job) if stream.waits_for_nobody else job
        return None

    def _left_by(self, stream: Stream) -> int:
        """How many buffers a stream leaves to others."""
        if stream.hurried:
            return self._left_by_consumed if stream.background else 0
        return self._left[stream.urgency]

    def _background(self, job: Callable[[], None]) -> Callable[[], None]:
        self._in_background += 1

        def work() -> None:
            job()
            with self._lock:
                self._in_background -= 1
                # Others may have been passed over.
                self._work_to_do.notify_all()

        return work

    def _release(self, buffer: Buffer | None, keep_until: Callable[[], None] | None) -> None:
        """Take a buffer back, if there is one. The caller holds the lock."""
        if buffer is None:
            return
        if keep_until is None:
            self._free.append((buffer, None))
        else:
            # At the end of the line: by its turn, there is hardly anything left to wait for.
            self._free.appendleft((buffer, keep_until))
        self._work_to_do.notify()

    def _runs(self, segments: Sequence[Segment], n_bytes: int, block_pages: int) -> Iterator[tuple[Segment, ...]]:
        """Group segments into runs whose reads of one layer take at most ``n_bytes``, or are of one page. Longer
        segments are split, at the end of an extent's block if a whole block fits."""
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
        """End the threads. Close or discard every stream first."""
        self._closer.shutdown()
        with self._lock:
            self._closing = True
            self._work_to_do.notify_all()
        for thread in self._threads:
            thread.join()


class Stream:
    """The pages of one pin, on their way. `LayerwiseReader.open` makes it.

    Pages that cannot be opened or read, or are not what was written, are reported in their chunk; everything else is
    read all the same.
    """

    def __init__(
        self,
        reader: LayerwiseReader,
        pin: Pin,
        first: list[tuple[Segment, ...]],
        others: list[tuple[Segment, ...]],
        need: Need,
        background: bool,
    ):
        self.pin = pin
        self.hurried = False
        self.background = background
        self._need = need
        # Chunks that are read or being read, in order, each with its buffer, if it has one.
        self.ahead: deque[tuple[Future[Chunk], Buffer | None]] = deque()
        self._reader = reader
        # The runs to read, of the first layer and of every other. The first layer comes before any other: a forward
        # waits for it with nothing else to do.
        self._first, self._others = first, others
        self._first_missing = len(first)
        self._closed = False
        self._destinations: Sequence[Destination] = ()
        # The pages that the consumer wants; None for all.
        self._wanted: Sequence[range] | None = None
        self._reading_begun = threading.Condition(reader._lock)
        self._extents = list({segment.extent.path: segment.extent for segment in pin.segments}.values())
        reader._handles.enter(self._extents)
        # By a run's first page and number of pages, the header in which it was found.
        self._looked_up: dict[tuple[int, int], ExtentHeader] = {}
        self._taken = 0
        self._total = len(first) + len(others) * (reader.geometry.layers - 1)

    @property
    def needed(self) -> Need:
        return AWAITED if self.hurried and not self.background else self._need

    @property
    def urgency(self) -> Urgency:
        return self.needed.urgency

    @property
    def consumed_in_background(self) -> bool:
        return self.hurried and self.background

    @property
    def waits_for_nobody(self) -> bool:
        """Whether one thread is to be left to others."""
        return self.background or self.urgency >= Urgency.DUE

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
        """The fraction of its chunks that has been read, once nothing is being read for it: everything has been read,
        or all the memory that it may have is full. None until then."""
        with self._reader._lock:
            more = self.wants is not None and len(self._reader._free) > self._reader._left_by(self)
            if more or not all(reading.done() for reading, _ in self.ahead):
                return None
            return self._taken / self._total

    def job(self, free: _Free | None) -> Callable[[], None] | None:
        """The next thing to do for this stream, if there is one; reading takes a buffer from ``free``. The caller has
        the reader's lock, and runs the job without it."""
        if self._taken == self._total or (self._first_missing and self._taken >= len(self._first)):
            return None
        layer, run = self._next()
        chunk = Chunk(layer, run[0].first, sum(segment.pages for segment in run))
        buffer: Buffer | None = None
        if self._destinations:
            chunk.straight = True
            read = partial(self._read_to, self._destinations, chunk, run)
        elif free:
            buffer, free_after = free.pop()
            read = partial(self._read, buffer, free_after, chunk, run)
        else:
            return None
        self._taken += 1
        reading: Future[Chunk] = Future()
        self.ahead.append((reading, buffer))
        self._reading_begun.notify_all()
        counted = partial(self._counted, self.urgency, read)
        return lambda: _fulfil(reading, counted if layer else lambda: self._first_layer(counted))

    def _counted(self, urgency: Urgency, read: Callable[[], Chunk]) -> Chunk:
        chunk = read()
        with self._reader._lock:
            self._reader._read_bytes[urgency] += chunk.n_bytes
        return chunk

    def _first_layer(self, read: Callable[[], Chunk]) -> Chunk:
        try:
            return read()
        finally:
            # Before the chunk can be consumed: otherwise its buffer might go to streams that are consumed later.
            with self._reader._lock:
                self._first_missing -= 1
                if not self._first_missing:
                    self._reader._work_to_do.notify_all()

    def _read(
        self, buffer: Buffer, free_after: Callable[[], None] | None, chunk: Chunk, run: tuple[Segment, ...]
    ) -> Chunk:
        if free_after is not None:
            free_after()
        position, handles = 0, self._reader._handles
        for segment in run if self._wanted is None else _within(run, self._wanted):
            try:
                with handles.reading(segment.extent) as handle:
                    read = partial(handle.read, segment, chunk.layer, buffer, position)
                    found, position = patiently(read)
                    chunk.n_bytes += found.n_bytes
                    arrays = [array for (array,) in found.components]
                    if found.wrong is None:
                        on_host = self._reader._backend.on_host(arrays)
                        found = found._replace(components=[[array] for array in on_host])
                    self._verify(chunk, segment, handle.header, found)
                    chunk.parts.append(Part(segment, arrays))
            except (BadExtent, OSError) as error:
                _report(chunk, segment, error)
        return chunk

    def _read_to(self, destinations: Sequence[Destination], chunk: Chunk, run: tuple[Segment, ...]) -> Chunk:
        handles = self._reader._handles
        for destination in destinations:
            for segment in _within(run, [destination.pages]):
                rows = destination.rows(chunk.layer, range(segment.first, segment.first + segment.pages))
                try:
                    with handles.reading(segment.extent) as handle:
                        found = patiently(partial(handle.read_to, rows, segment, chunk.layer))
                        chunk.n_bytes += found.n_bytes
                        self._verify(chunk, segment, handle.header, found)
                except (BadExtent, OSError) as error:
                    _report(chunk, segment, error)
        return chunk

    def _verify(self, chunk: Chunk, segment: Segment, header: ExtentHeader, found: Found) -> None:
        """Enter in ``chunk`` the pages of ``segment`` whose bytes are not those that were written for them."""
        slots = found.wrong
        if slots is None:
            slots = header.wrong_slots(chunk.layer, segment.slot, found.components)
        wrong = {segment.first + slot - segment.slot for slot in slots}
        if not self._has(segment, header):
            # The index says where they lie, and may be wrong.
            written = header.keys[segment.slot : segment.slot + segment.pages]
            if header.fingerprint != self.pin.fingerprint:
                written = PageKeys()
            for i, key in enumerate(self.pin.keys[segment.first : segment.first + segment.pages]):
                if i >= len(written) or written[i] != key:
                    wrong.add(segment.first + i)
        if wrong:
            chunk.wrong |= dict.fromkeys(sorted(wrong), "its bytes are not those that were written")

    def _has(self, segment: Segment, header: ExtentHeader) -> bool:
        """Whether an extent has the pages of ``segment`` where it should. Looked up once for all layers."""
        extent, slot, pages, first = segment
        if self._looked_up.get((first, pages)) is not header:
            if header.fingerprint != self.pin.fingerprint:
                return False
            if header.keys[slot : slot + pages] != self.pin.keys[first : first + pages]:
                return False
            self._looked_up[first, pages] = header
        return True

    def hurry(
        self,
        destinations: Sequence[Destination] = (),
        *,
        wanted: Sequence[range] | None = None,
        background: bool = False,
    ) -> None:
        """The stream is going to be consumed now, in the ``background`` if nobody waits for that.

        Pages not read yet are read to ``destinations``, if there are any. These have no page in common, and are left
        alone once every layer has been consumed, or the stream is closed. Of the other pages, only ``wanted`` ones are
        read.
        """
        with self._reader._lock:
            self.hurried, self.background = True, background
            self._destinations, self._wanted = destinations, wanted
            if not self._closed:
                self._reader._streams.remove(self)
                self._reader._streams.append(self)
            self._reader._work_to_do.notify_all()

    def need(self, need: Need = DEMAND) -> None:
        """Read it as early as ``need`` says. It is never read later than it was to be."""
        with self._reader._lock:
            self._need = min(self._need, need)
            self._reader._work_to_do.notify_all()

    def __iter__(self) -> Iterator[Chunk]:
        """Every chunk, layer by layer."""
        if not self.hurried:
            self.hurry(background=self.background)
        for layer in range(self._reader.geometry.layers):
            yield from self.layer(layer)

    def layer(self, layer: int) -> Iterator[Chunk]:
        """The chunks of one layer, each as soon as it has arrived. Call it for every layer, in order, of a stream that
        hurries, and run it to the end."""
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
        """Stop reading and release everything, the pin too. May be called at any time, also twice."""
        if self._stop():
            self._let_go()

    def discard(self) -> None:
        """Close, without waiting for what is being read just now."""
        if self._stop():
            self._reader._closer.submit(self._let_go)

    def _stop(self) -> bool:
        """Begin no more reads; False if that has been said before."""
        with self._reader._lock:
            if self._closed:
                return False
            self._closed = True
            self._reader._streams.remove(self)
            self._taken = self._total
            self._reading_begun.notify_all()
            return True

    def _let_go(self) -> None:
        # No thread may read on when the files are closed.
        for reading, _ in self.ahead:
            reading.exception()
        self._reader._handles.leave(self._extents)
        self.pin.close()
        with self._reader._lock:
            for reading, buffer in self.ahead:
                self._reader._release(buffer, reading.result().keep_until if reading.exception() is None else None)
            self.ahead.clear()
            self._destinations = ()
            self._reader._open_streams -= 1

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _report(chunk: Chunk, segment: Segment, error: BadExtent | OSError) -> None:
    """Enter in ``chunk`` that a segment could not be read."""
    if isinstance(error, OSError):
        chunk.unread.append((segment, error))
    else:
        chunk.wrong |= dict.fromkeys(range(segment.first, segment.first + segment.pages), str(error))


def _within(run: Sequence[Segment], ranges: Sequence[range]) -> Iterator[Segment]:
    """The parts of a run's segments that are in any of ``ranges``, in the order of the run, and no page twice."""
    ordered = sorted(ranges, key=lambda pages: pages.start)
    for segment in run:
        at, end = segment.first, segment.first + segment.pages
        for pages in ordered:
            first, last = max(at, pages.start), min(end, pages.stop)
            if last - first == segment.pages:
                yield segment
                break
            if first < last:
                yield segment._replace(slot=segment.slot + first - segment.first, pages=last - first, first=first)
                at = last


def _turn(stream: Stream) -> tuple[Need, bool, int]:
    """Smaller comes first: among equally urgent streams those that are consumed, since they have device memory."""
    return stream.needed, not stream.hurried, (stream.wants or 0) if stream.hurried else 0


def _fulfil(promise: Future[Any], work: Callable[[], Any]) -> None:
    try:
        promise.set_result(work())
    except BaseException as error:
        promise.set_exception(error)
