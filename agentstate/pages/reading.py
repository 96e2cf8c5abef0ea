"""Streaming stored pages back, layer by layer, ahead of whoever consumes them.

The unit of work is a `Chunk`: some consecutive pages of one request in one layer, at most ``chunk_bytes`` of them.
Chunks are read in the order of their layers by a few threads into a ring of reused, page-aligned buffers; the
consumer gets them in that order too. So memory is bounded whatever the context's length, and a forward can start
when its first layer has arrived.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from agentstate.errors import BadExtent
from agentstate.pages.extent import ALIGNMENT, ExtentHeader, Geometry, align, checksum, page_seed
from agentstate.pages.files import open_direct
from agentstate.pages.store import Hold, Segment, StoredExtent


class Part(NamedTuple):
    """What was read of one segment in one layer: one uint8 array of shape (pages, component bytes) a component, and
    the header of its extent, which says what they should be."""

    segment: Segment
    header: ExtentHeader
    arrays: list[np.ndarray]


@dataclass
class Chunk:
    """Pages ``[first, first + count)`` of request number ``request``, in layer ``layer``.

    The arrays of ``parts`` are views of a buffer that is reused: valid until the next chunk is asked for. ``unread``
    holds the segments that could not be read, with the reason; ``n_bytes`` is what came from the device.
    """

    request: int
    layer: int
    first: int
    count: int
    last_of_layer: bool
    parts: list[Part]
    unread: list[tuple[Segment, OSError | BadExtent]]
    n_bytes: int = 0


@dataclass(frozen=True)
class _Plan:
    request: int
    layer: int
    segments: tuple[Segment, ...]
    last_of_layer: bool


class LayerwiseReader:
    """Reads with ``threads`` threads into ``staging_bytes`` of memory, in chunks of at most ``chunk_bytes``.

    One stream at a time. The memory is taken from the operating system as it is first used, and kept.
    """

    def __init__(self, geometry: Geometry, *, staging_bytes: int, threads: int, chunk_bytes: int = 16 << 20):
        # Direct I/O reads whole blocks: up to two more a component than its bytes need.
        self._padding = 2 * ALIGNMENT * len(geometry.component_bytes)
        smallest = geometry.layer_bytes + self._padding
        self._layers = geometry.layers
        self._layer_bytes = geometry.layer_bytes
        self._chunk_bytes = align(max(smallest, min(chunk_bytes, staging_bytes // 2)))
        self._buffers = [mmap.mmap(-1, self._chunk_bytes) for _ in range(max(2, staging_bytes // self._chunk_bytes))]
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="agentstate-read")
        self._streaming = threading.Lock()

    def stream(self, requests: Sequence[Hold]) -> Iterator[Chunk]:
        """Every page of every request, layer 0 of all of them first. The iterator must be run to its end or closed,
        and the holds kept until then.

        Bytes are handed over as they came; `Verifier` tells which may be used. What cannot be opened or read is
        reported in its chunk, and everything else is read all the same.
        """
        with self._streaming:
            extents = {segment.extent for request in requests for segment in request.segments}
            opened = {extent: self._pool.submit(_OpenExtent, extent) for extent in extents}
            plans = self._plans(requests)
            free = list(self._buffers)
            ahead: deque[tuple[Future[Chunk], mmap.mmap]] = deque()
            try:
                while True:
                    while free and (plan := next(plans, None)) is not None:
                        buffer = free.pop()
                        ahead.append((self._pool.submit(self._read, plan, buffer, opened), buffer))
                    if not ahead:
                        return
                    future, buffer = ahead[0]
                    yield future.result()
                    ahead.popleft()
                    free.append(buffer)
            finally:
                # Also when the consumer stops early: no thread may read on when the files are closed.
                for reading, _ in ahead:
                    if not reading.cancel():
                        reading.exception()
                for opening in opened.values():
                    if not opening.cancel() and opening.exception() is None:
                        opening.result().close()

    def _plans(self, requests: Sequence[Hold]) -> Iterator[_Plan]:
        per_request = [list(self._chunked(request.segments)) for request in requests]
        for layer in range(self._layers):
            of_layer = [(number, run) for number, runs in enumerate(per_request) for run in runs]
            for position, (number, run) in enumerate(of_layer):
                yield _Plan(number, layer, run, position == len(of_layer) - 1)

    def _chunked(self, segments: Sequence[Segment]) -> Iterator[tuple[Segment, ...]]:
        """Group segments into runs whose reads fit one buffer, splitting those that do not."""
        run: list[Segment] = []
        room = self._chunk_bytes
        for segment in segments:
            while segment.pages:
                taken = min(segment.pages, max(0, (room - self._padding) // self._layer_bytes))
                if taken == 0:
                    yield tuple(run)
                    run, room = [], self._chunk_bytes
                    continue
                run.append(segment._replace(pages=taken))
                room -= self._padding + taken * self._layer_bytes
                segment = segment._replace(
                    slot=segment.slot + taken, pages=segment.pages - taken, first=segment.first + taken
                )
        if run:
            yield tuple(run)

    @staticmethod
    def _read(plan: _Plan, buffer: mmap.mmap, opened: dict[StoredExtent, Future[_OpenExtent]]) -> Chunk:
        first = plan.segments[0].first
        count = sum(segment.pages for segment in plan.segments)
        chunk = Chunk(plan.request, plan.layer, first, count, plan.last_of_layer, [], [])
        position = 0
        for segment in plan.segments:
            try:
                # The openings were queued before any reading, so whoever waits for one does not keep it from running.
                extent = opened[segment.extent].result()
                arrays, position, n_bytes = _read_segment(extent.fd, segment, plan.layer, buffer, position)
                chunk.parts.append(Part(segment, extent.header, arrays))
                chunk.n_bytes += n_bytes
            except (OSError, BadExtent) as error:
                chunk.unread.append((segment, error))
        return chunk

    def close(self) -> None:
        self._pool.shutdown()


class _OpenExtent:
    """An extent open for direct reading, and its header. Raises OSError, and BadExtent for a header that is damaged
    or not of this layout."""

    def __init__(self, extent: StoredExtent):
        self.fd = open_direct(extent.path, os.O_RDONLY)
        try:
            raw = mmap.mmap(-1, extent.layout.data_offset)
            os.preadv(self.fd, [raw], 0)
            self.header = ExtentHeader.decode(memoryview(raw), extent.path.name)
            if self.header.layout != extent.layout:
                raise BadExtent(f"{extent.path.name}: the header is of another extent")
        except BaseException:
            os.close(self.fd)
            raise

    def close(self) -> None:
        os.close(self.fd)


def _read_segment(
    fd: int, segment: Segment, layer: int, buffer: mmap.mmap, position: int
) -> tuple[list[np.ndarray], int, int]:
    """Read one layer of a segment into ``buffer`` from ``position`` on, which is block-aligned: an array a component,
    the next free position, and the bytes that were read. Raises OSError, also when the file is too short."""
    layout = segment.extent.layout
    components = range(len(layout.geometry.component_bytes))
    spans = [layout.component_range(layer, component, segment.slot, segment.pages) for component in components]
    view = memoryview(buffer)
    arrays, n_bytes = [], 0
    for start, end, members in _coalesced(spans):
        skew = start % ALIGNMENT
        wanted = align(skew + end - start)
        got = os.preadv(fd, [view[position : position + wanted]], start - skew)
        if got < skew + end - start:
            raise OSError(f"{segment.extent.path} ends in the middle of a page")
        n_bytes += got
        for offset, length in members:
            raw = np.frombuffer(buffer, dtype=np.uint8, count=length, offset=position + skew + offset - start)
            arrays.append(raw.reshape(segment.pages, -1))
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


class Verifier:
    """Checks the pages of one request against the sums in their extents' headers."""

    def __init__(self, request: Hold):
        self._keys = request.keys
        self._seeds = [page_seed(request.fingerprint, key) for key in request.keys]

    def wrong_pages(self, chunk: Chunk) -> list[int]:
        """The pages of ``chunk`` that must not be used: not read, or not as they were written."""
        wrong = [segment.first + i for segment, _ in chunk.unread for i in range(segment.pages)]
        for segment, header, arrays in chunk.parts:
            sums = header.checksums[chunk.layer, segment.slot : segment.slot + segment.pages].tolist()
            for i in range(segment.pages):
                page = segment.first + i
                # The slot is the index's word, which may be wrong, and lead behind the last page.
                if (
                    i >= len(sums)
                    or header.keys[segment.slot + i] != self._keys[page]
                    or checksum(self._seeds[page], chunk.layer, [array[i] for array in arrays]) != sums[i]
                ):
                    wrong.append(page)
        return wrong
