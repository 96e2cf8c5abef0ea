"""Which streams feed the pages of a load: what several loads need is read once, and goes to all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache, cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch

from agentstate.pages import DEMAND, Chunk, Destination, Need, PageKeys
from engine_patch.transfer import CopyLane, DevicePages, PageNumbers, Place


class Source(StrEnum):
    """Where pages are restored from: ``cold`` is the disk; ``staging`` is memory which they are in or on their way to
    because they were read ahead or prefetched; ``host`` is the host tier; ``shared`` the store that engines share;
    ``device`` is the disk too, preloaded: for a prefetch to the device, or for a request that does not run yet."""

    COLD = "cold"
    STAGING = "staging"
    HOST = "host"
    SHARED = "shared"
    DEVICE = "device"


class Pinned(Protocol):
    """The pages that a stream keeps, like a `Pin`."""

    @property
    def keys(self) -> PageKeys: ...

    def copies(self, pages: Iterable[int]) -> list[tuple[bytes, int]]: ...


class Streaming(Protocol):
    """What is needed of a stream, whether it is of a drive (`Stream`) or of the host tier (`HostStream`)."""

    @property
    def pin(self) -> Pinned: ...

    @property
    def staged(self) -> float | None: ...

    def need(self, need: Need = DEMAND) -> None: ...

    def hurry(
        self,
        destinations: Sequence[Destination] = (),
        *,
        wanted: Sequence[range] | None = None,
        background: bool = False,
    ) -> None: ...

    def layer(self, layer: int) -> Iterator[Chunk]: ...

    def close(self) -> None: ...

    def discard(self) -> None: ...


class Reading:
    """A stream, the keys of the pages that it reads, in order, and where they come from."""

    def __init__(self, stream: Streaming, source: Source = Source.COLD):
        self.stream = stream
        self.source = source
        self.keys = stream.pin.keys

    @cached_property
    def position(self) -> dict[bytes, int]:
        return {key: page for page, key in enumerate(self.keys)}

    def common(self, keys: Sequence[bytes], first: int) -> tuple[int, int]:
        """How many pages from ``keys[first]`` on it reads in the same order, and the position of the first of them."""
        if (at := self.position.get(keys[first])) is None:
            return 0, 0
        low, high = 1, min(len(keys) - first, len(self.keys) - at) + 1
        # Bisect: what is equal up to some length is equal up to every smaller one. Mostly the greatest fits.
        middle = high - 1
        while high - low > 1:
            if keys[first : first + middle] == self.keys[at : at + middle]:
                low = middle
            else:
                high = middle
            middle = (low + high) // 2
        return low, at


class Piece(NamedTuple):
    """Consecutive ``pages`` of a chain, which ``reading`` reads from its page ``at`` on; None when nobody does."""

    pages: range
    reading: Reading | None = None
    at: int = 0


def pieces(keys: Sequence[bytes], readings: Sequence[Reading]) -> list[Piece]:
    """Split the chain ``keys``, in order, into pieces that are being read and pieces that are not."""
    found: list[Piece] = []
    where: dict[bytes, int] | None = None
    first = 0
    while first < len(keys):
        count, at, reading = max(
            ((*reading.common(keys, first), reading) for reading in readings),
            key=lambda common: common[0],
            default=(0, 0, None),
        )
        if count:
            found.append(Piece(range(first, first + count), reading, at))
            first += count
            continue
        if where is None:
            where = {key: page for page, key in enumerate(keys)} if readings else {}
        # Chains that meet do so at the first page of one of them.
        begins = (where.get(reading.keys[0], 0) for reading in readings)
        last = min((page for page in begins if page > first), default=len(keys))
        found.append(Piece(range(first, last)))
        first = last
    return found


def refined(
    keys: Sequence[bytes], split: Iterable[Piece], further: Callable[[Sequence[bytes]], Sequence[Piece]]
) -> Iterator[Piece]:
    """The pieces ``split`` of the chain ``keys``; instead of one that nobody reads, what ``further`` makes of its
    keys."""
    for piece in split:
        if piece.reading is not None:
            yield piece
            continue
        first = piece.pages.start
        for part in further(keys[first : piece.pages.stop]):
            yield part._replace(pages=range(first + part.pages.start, first + part.pages.stop))


@dataclass(eq=False)
class Load:
    """One request's restore of ``keys`` to the device pages ``numbers``. ``missing`` are the keys that were no longer
    stored when it was queued. ``n_bytes`` have been read for it; what several loads share counts for the first."""

    rid: str
    keys: Sequence[bytes]
    numbers: torch.Tensor | PageNumbers
    missing: tuple[bytes, ...] = ()
    sources: set[Source] = field(default_factory=set)
    n_bytes: int = 0
    # By first page and number of pages: every layer asks for the same.
    places: dict[tuple[int, int], Place] = field(default_factory=dict)


class Portion(NamedTuple):
    """The ``pages`` of a feed's stream that a load needs; in the load they begin at page ``first``."""

    load: Load
    pages: range
    first: int

    def numbers(self, pages: range) -> torch.Tensor:
        """The device pages of some of ``pages``."""
        skipped = self.first - self.pages.start
        return self.load.numbers[pages.start + skipped : pages.stop + skipped]

    def place(self, device: DevicePages, lane: CopyLane, pages: range) -> Place:
        """Where some of ``pages`` are on the device, for copies on ``lane``, which is the same at every call."""
        asked, places = (self.first + pages.start - self.pages.start, len(pages)), self.load.places
        if (place := places.get(asked)) is None:
            place = places[asked] = device.place(self.numbers(pages), lane)
        return place


@dataclass(eq=False)
class Feed:
    """A stream of a batch, and the loads that it feeds."""

    reading: Reading
    portions: list[Portion] = field(default_factory=list)
    # Where pages are read straight to, and for which portion. Pages that several portions need go to the first.
    homes: list[tuple[Portion, Destination]] = field(default_factory=list)

    @property
    def stream(self) -> Streaming:
        return self.reading.stream

    @property
    def source(self) -> Source:
        return self.reading.source

    def join(self, load: Load, piece: Piece) -> None:
        """Feed a load with one of its pieces."""
        load.sources.add(self.source)
        self.portions.append(Portion(load, range(piece.at, piece.at + len(piece.pages)), piece.pages.start))

    def leave(self, load: Load) -> bool:
        """Stop feeding a load, and return whether another one is still fed."""
        self.portions = [portion for portion in self.portions if portion.load is not load]
        return bool(self.portions)

    def hurry(self, device: DevicePages, *, background: bool) -> None:
        """Read what the loads need, straight to the device where possible."""
        if device.addressable:
            taken: list[range] = []
            for portion in self.portions:
                for pages in _without(portion.pages, taken):
                    self.homes.append((portion, _destination(device, portion, pages)))
                taken.append(portion.pages)
        wanted = [portion.pages for portion in self.portions]
        self.stream.hurry([home for _, home in self.homes], wanted=wanted, background=background)

    def fed_by(self, chunk: Chunk) -> Load | None:
        """The first load that needs pages of a chunk."""
        pages = range(chunk.first, chunk.first + chunk.count)
        return next((portion.load for portion in self.portions if intersection(portion.pages, pages)), None)

    def rows(self, portion: Portion, chunk: Chunk) -> Iterator[tuple[range, list[np.ndarray | torch.Tensor]]]:
        """The parts of a chunk to copy for a portion: pages of the stream, and their rows of each component."""
        for segment, arrays in chunk.parts:
            pages = intersection(portion.pages, range(segment.first, segment.first + segment.pages))
            if pages:
                own = slice(pages.start - segment.first, pages.stop - segment.first)
                yield pages, [array[own] for array in arrays]
        if not chunk.straight:
            return
        for other, home in self.homes:
            pages = intersection(portion.pages, home.pages)
            pages = intersection(pages, range(chunk.first, chunk.first + chunk.count))
            if other is not portion and pages:
                at = pages.start
                for parts in zip(*home.rows(chunk.layer, pages), strict=True):
                    yield range(at, at + len(parts[0])), list(parts)
                    at += len(parts[0])


def intersection(some: range, others: range) -> range:
    return range(max(some.start, others.start), max(some.start, others.start, min(some.stop, others.stop)))


def _without(pages: range, taken: Sequence[range]) -> list[range]:
    """``pages`` without those ``taken``."""
    left = [pages] if pages else []
    for other in taken:
        left = [
            part
            for before in left
            for part in (
                range(before.start, min(before.stop, max(before.start, other.start))),
                range(max(before.start, min(before.stop, other.stop)), before.stop),
            )
            if part
        ]
    return left


def _destination(device: DevicePages, portion: Portion, pages: range) -> Destination:
    @cache
    def runs(some: range) -> list[slice]:
        return device.runs(portion.numbers(some))

    def rows(layer: int, some: range) -> list[list[np.ndarray]]:
        return device.memory(layer, runs(some))

    return Destination(pages, rows)
