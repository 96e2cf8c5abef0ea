"""Pages in host memory: runs of them, laid out like an extent's, and streams of them, verified like what is read from a
drive."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import NamedTuple

import numpy as np

from agentstate.fleet.quotas import NOBODY
from agentstate.pages import DEMAND, Chunk, Destination, ExtentHeader, Geometry, Need, PageKeys, Part
from engine_patch.feeds import intersection
from engine_patch.host_memory import Piece

# How many layers are verified ahead of the one that is asked for.
_AHEAD = 2
_REASON = "its copy in host memory is not what was copied there"


class HostRun:
    """A run of pages in ``piece``: layer by layer, in each of them component by component, like the slabs of an extent.
    ``header`` has the checksums that an extent of them would have, once `sum_up` has been called.

    It is charged to ``account``, for whom it came in. What follows is the tier's, under its mutex: ``session_id`` asked
    for it last, at ``tick``; ``readers`` streams read it; ``served`` of its pages are found here, of which those in
    ``returned`` slots are on the device, and those in ``released`` ones left by their session. It is ``gone`` when none
    is found any more. Memory that is ``spoilt`` is not used again.
    """

    def __init__(
        self,
        fingerprint: bytes,
        geometry: Geometry,
        keys: PageKeys,
        piece: Piece,
        session_id: str | None,
        account: str = NOBODY,
    ):
        self.account = account
        self.header = ExtentHeader.blank(fingerprint, geometry, keys)
        self.piece = piece
        self.session_id = session_id
        self.tick = 0
        self.readers = 0
        self.returned: set[int] = set()
        self.released: set[int] = set()
        self.served = 0
        self.gone = self.spoilt = False

    @property
    def keys(self) -> PageKeys:
        return self.header.keys

    def rows(self, layer: int, slot: int = 0, pages: int | None = None) -> list[np.ndarray]:
        """The memory of some pages in a layer: one array of shape (pages, component bytes) a component."""
        geometry, count = self.header.geometry, len(self.keys)
        rows, start = [], layer * count * geometry.layer_bytes
        for size in geometry.component_bytes:
            of_all = self.piece.memory[start : start + count * size].reshape(count, size)
            rows.append(of_all[slot : count if pages is None else slot + pages])
            start += count * size
        return rows

    def sum_up(self) -> None:
        """Compute the checksums of what the memory has. No copy to it may run."""
        for layer in range(self.header.geometry.layers):
            self.header.sum_up(layer, self.rows(layer))

    def wrong_slots(self, layer: int, slot: int, pages: int) -> list[int]:
        """The slots, of ``pages`` from ``slot`` on, whose bytes are not those that were summed up."""
        return self.header.wrong_slots(layer, slot, [[rows] for rows in self.rows(layer, slot, pages)])


class HostSegment(NamedTuple):
    """``pages`` pages of a stream, from its page ``first`` on, side by side in ``run`` from ``slot`` on: a `Segment` in
    memory."""

    run: HostRun
    slot: int
    pages: int
    first: int


class HostPin(NamedTuple):
    """The pages of a stream, none of which has a copy on the drive that could be blamed (`PageStore.drop`)."""

    keys: PageKeys

    def copies(self, pages: Iterable[int]) -> list[tuple[bytes, int]]:
        return []


class HostStream:
    """The pages of ``segments``, all of ``keys``, which stay where they are until it is closed. It is used like a
    `Stream`, and never waits for a drive. A page of another ``fingerprint`` is wrong.

    ``verify`` runs what compares a layer with its checksums, on threads of its own. ``wrong`` is told of the pages that
    are wrong, before their chunk is handed out, and ``leave`` at the end which parts have been consumed in every layer.
    ``later`` runs what must not keep the caller of `discard` waiting.
    """

    # All of it is there.
    staged = 1.0

    def __init__(
        self,
        fingerprint: bytes,
        keys: PageKeys,
        segments: Sequence[HostSegment],
        *,
        verify: Executor,
        wrong: Callable[[HostRun, Sequence[bytes]], None],
        leave: Callable[[Sequence[HostSegment], Sequence[HostSegment]], None],
        later: Callable[[Callable[[], None]], None],
    ):
        self.pin = HostPin(keys)
        self._segments = segments
        self._verify, self._wrong, self._leave, self._later = verify, wrong, leave, later
        self._layers = segments[0].run.header.geometry.layers
        # Who says where pages lie may be wrong.
        self._misplaced = {page for segment in segments for page in _misplaced(fingerprint, keys, segment)}
        # The parts of the segments that are wanted, and what is known of those of each layer.
        self._parts = list(segments)
        self._checks: list[list[Future[list[int]]]] = []
        # By the identity of a run: when the copies from its memory are over.
        self._kept: dict[int, Callable[[], None]] = {}
        self._through = False
        self._closing = threading.Lock()
        self._closed = False

    def need(self, need: Need = DEMAND) -> None:
        """Like `Stream.need`: nothing is read, so nothing is hurried."""

    def hurry(
        self,
        destinations: Sequence[Destination] = (),
        *,
        wanted: Sequence[range] | None = None,
        background: bool = False,
    ) -> None:
        """Like `Stream.hurry`. Nothing needs ``destinations``: copies are made from where the pages are."""
        if wanted is not None:
            self._parts = list(_within(self._segments, wanted))
        self._check(0)

    def _check(self, layer: int) -> None:
        """Begin to verify the layers up to this one."""
        while (next_one := len(self._checks)) <= min(layer, self._layers - 1):
            parts = ((part.run, part.slot, part.pages) for part in self._parts)
            self._checks.append(
                [self._verify.submit(run.wrong_slots, next_one, slot, pages) for run, slot, pages in parts]
            )

    def layer(self, layer: int) -> Iterator[Chunk]:
        """Like `Stream.layer`: the chunks of one layer, one a run."""
        self._check(layer + _AHEAD)
        for part, check in zip(self._parts, self._checks[layer], strict=True):
            wrong = [part.first + slot - part.slot for slot in check.result()]
            wrong += [page for page in range(part.first, part.first + part.pages) if page in self._misplaced]
            if wrong:
                self._wrong(part.run, [self.pin.keys[page] for page in wrong])
            if self._closed:
                raise ValueError("the stream is closed")
            arrays = part.run.rows(layer, part.slot, part.pages)
            chunk = Chunk(layer, part.first, part.pages, [Part(part, arrays)], dict.fromkeys(wrong, _REASON))
            chunk.n_bytes_in_memory = sum(array.nbytes for array in arrays)
            yield chunk
            if (keep_until := chunk.keep_until) is not None:
                self._kept[id(part.run)] = keep_until
        self._through = layer == self._layers - 1

    def close(self) -> None:
        """Leave the pages to others. May be called at any time, also twice."""
        if self._stop():
            self._let_go()

    def discard(self) -> None:
        """Close, without waiting for copies."""
        if self._stop():
            if self._kept:
                self._later(self._let_go)
            else:
                self._let_go()

    def _stop(self) -> bool:
        with self._closing:
            closed, self._closed = self._closed, True
            return not closed

    def _let_go(self) -> None:
        for wait in self._kept.values():
            wait()
        self._leave(self._segments, self._parts if self._through else ())


def _misplaced(fingerprint: bytes, keys: PageKeys, segment: HostSegment) -> Iterable[int]:
    """The pages of a segment that are not those of ``keys``."""
    run, slot, pages, first = segment
    own, asked = run.keys[slot : slot + pages], keys[first : first + pages]
    if run.header.fingerprint != fingerprint:
        return range(first, first + pages)
    if own == asked:
        return ()
    return [first + i for i, (one, other) in enumerate(zip(own, asked, strict=True)) if one != other]


def _within(segments: Sequence[HostSegment], ranges: Sequence[range]) -> Iterator[HostSegment]:
    """The parts of segments that are in any of ``ranges``, no page twice."""
    ordered = sorted(ranges, key=lambda pages: pages.start)
    for segment in segments:
        at, end = segment.first, segment.first + segment.pages
        for pages in ordered:
            if part := intersection(range(max(at, pages.start), max(at, pages.stop)), range(at, end)):
                slot = segment.slot + part.start - segment.first
                yield segment._replace(slot=slot, pages=len(part), first=part.start)
                at = part.stop
