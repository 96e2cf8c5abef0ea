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
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agentstate.pages.extent import ALIGNMENT, Geometry, align, checksum, page_seed
from agentstate.pages.store import Segment, open_direct


@dataclass(frozen=True)
class ReadRequest:
    """Pages to bring back for one request: ``keys`` in order, and the segments where they lie."""

    keys: Sequence[bytes]
    segments: Sequence[Segment]


@dataclass
class Chunk:
    """Pages ``[first, first + count)`` of request number ``request``, in layer ``layer``.

    ``parts`` holds, for every segment that could be read, its first page and one uint8 array of shape (pages,
    component bytes) a component. They are views of a buffer that is reused: valid until the next chunk is asked for.
    ``unread`` holds the segments that could not, with the reason; ``n_bytes`` is what came from the device.
    """

    request: int
    layer: int
    first: int
    count: int
    last_of_layer: bool
    parts: list[tuple[int, list[np.ndarray]]]
    unread: list[tuple[Segment, OSError]]
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

    def stream(self, requests: Sequence[ReadRequest]) -> Iterator[Chunk]:
        """Every page of every request, layer 0 of all of them first. The iterator must be run to its end or closed.

        Bytes are handed over as they came; `Verifier` tells which may be used. What cannot be opened or read is
        reported in its chunk, and everything else is read all the same.
        """
        with self._streaming, ExitStack() as stack:
            files: dict[Path, int | OSError] = {}
            for path in {segment.extent.path for request in requests for segment in request.segments}:
                try:
                    fd = open_direct(path, os.O_RDONLY)
                except OSError as error:
                    files[path] = error
                else:
                    stack.callback(os.close, fd)
                    files[path] = fd
            plans = self._plans(requests)
            free = list(self._buffers)
            ahead: deque[tuple[Future[Chunk], mmap.mmap]] = deque()
            try:
                while True:
                    while free and (plan := next(plans, None)) is not None:
                        buffer = free.pop()
                        ahead.append((self._pool.submit(self._read, plan, buffer, files), buffer))
                    if not ahead:
                        return
                    future, buffer = ahead[0]
                    yield future.result()
                    ahead.popleft()
                    free.append(buffer)
            finally:
                # Also when the consumer stops early: no thread may read on when the files are closed.
                for future, _ in ahead:
                    if not future.cancel():
                        future.exception()

    def _plans(self, requests: Sequence[ReadRequest]) -> Iterator[_Plan]:
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
    def _read(plan: _Plan, buffer: mmap.mmap, files: dict[Path, int | OSError]) -> Chunk:
        first = plan.segments[0].first
        count = sum(segment.pages for segment in plan.segments)
        chunk = Chunk(plan.request, plan.layer, first, count, plan.last_of_layer, [], [])
        position = 0
        for segment in plan.segments:
            file = files[segment.extent.path]
            try:
                if isinstance(file, OSError):
                    raise file
                arrays, position, n_bytes = _read_segment(file, segment, plan.layer, buffer, position)
                chunk.parts.append((segment.first, arrays))
                chunk.n_bytes += n_bytes
            except OSError as error:
                chunk.unread.append((segment, error))
        return chunk

    def close(self) -> None:
        self._pool.shutdown()


def _read_segment(
    fd: int, segment: Segment, layer: int, buffer: mmap.mmap, position: int
) -> tuple[list[np.ndarray], int, int]:
    """Read one layer of a segment into ``buffer`` from ``position`` on, which is block-aligned: an array a component,
    the next free position, and the bytes that were read. Raises OSError, also when the file is too short."""
    header = segment.extent.header
    components = range(len(header.geometry.component_bytes))
    spans = [header.component_range(layer, component, segment.slot, segment.pages) for component in components]
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

    def __init__(self, request: ReadRequest, fingerprint: bytes):
        self._request = request
        self._seeds = [page_seed(fingerprint, key) for key in request.keys]
        self._home = [(s.extent.header, s.slot + i) for s in request.segments for i in range(s.pages)]

    def wrong_pages(self, chunk: Chunk) -> list[int]:
        """The pages of ``chunk`` that must not be used: not read, or not as they were written."""
        wrong = [segment.first + i for segment, _ in chunk.unread for i in range(segment.pages)]
        for first, arrays in chunk.parts:
            for i in range(len(arrays[0])):
                header, slot = self._home[first + i]
                right = header.keys[slot] == self._request.keys[first + i] and int(
                    header.checksums[chunk.layer, slot]
                ) == checksum(self._seeds[first + i], chunk.layer, [array[i] for array in arrays])
                if not right:
                    wrong.append(first + i)
        return wrong
