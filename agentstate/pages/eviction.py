"""Which extents are evicted next, over all stores that share the room: first those that were released, then those that
no live manifest needs, then the others; the least recently used first."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from agentstate.pages.index import ExtentRecord

# The clock of uses goes in such steps, which leave room to order the extents of one use among each other. An extent is
# written at a step, and used before one.
WITHIN = 1 << 20
# Stands for whoever needs an extent, when nobody remembers who it is.
ANYONE = ""


@dataclass(slots=True, eq=False)
class Extent:
    """An extent as its store works with it. Its file is deleted when it has no live page and no pin.

    ``needed_by`` are the sessions whose live manifests need pages of it, each with the number of the latest telling
    that said so. Of its live pages, ``let_go`` were released, by keys; at the latest at ``let_go_at`` of the clock of
    uses.
    """

    number: int
    pages: int
    live: int
    file_bytes: int
    mtime_ns: int
    used: int = 0
    pins: int = 0
    retained_until_s: float = 0.0
    needed_by: dict[str, int] = field(default_factory=dict)
    owner: str = ""
    let_go: set[bytes] = field(default_factory=set)
    let_go_at: int = 0

    def record(self) -> ExtentRecord:
        return ExtentRecord(self.pages, self.live, self.file_bytes, self.mtime_ns, self.used)

    def turn(self) -> tuple[int, int]:
        """Its place in the order: it is evicted before all extents whose turn is larger."""
        return 0 if self.released else 2 if self.needed_by else 1, self.used

    @property
    def used_again(self) -> bool:
        """Whether it was looked up since it was written: a use is never at a whole step of the clock."""
        return self.used % WITHIN != 0

    @property
    def released(self) -> bool:
        """Whether all of its pages were released, and none was used since."""
        return bool(self.let_go) and len(self.let_go) >= self.live and self.used <= self.let_go_at

    @property
    def worth_keeping(self) -> bool:
        """Whether somebody may come back for it."""
        return not self.released and (bool(self.needed_by) or self.used_again)

    def release(self, key: bytes, now: int) -> None:
        """One of its live pages is released."""
        if self.used > self.let_go_at:
            self.let_go.clear()
        self.let_go.add(key)
        self.let_go_at = now

    def hand_over(self, keys: Iterable[bytes], other: Extent | None) -> None:
        """Those of its pages that have ``keys`` are ``other``'s now; None: they have been computed anew."""
        if not self.let_go:
            return
        moved = self.let_go.intersection(keys)
        if other is not None and moved and self.used <= self.let_go_at:
            other.let_go |= moved
            other.let_go_at = other.used
        self.let_go -= moved


class _Entry(NamedTuple):
    """An extent's place in the order, as of when it was put there."""

    turn: tuple[int, int]
    serial: int
    owner: Any
    extent: Extent


class EvictionOrder:
    """Extents of several owners, by their turns. Not thread-safe; only `Extent.used` may be changed beside it.

    A heap of places that may be out of date. An extent that was used, or is needed, is found at its old place and then
    moved to its new one. So a use costs nothing here, and a choice costs the logarithm of the number of extents,
    amortised over all uses and choices.
    """

    def __init__(self) -> None:
        self._heap: list[_Entry] = []
        self._serials = itertools.count()
        self._entries: dict[Extent, _Entry] = {}

    def add(self, owner: Any, extent: Extent) -> None:
        entry = self._entries[extent] = _Entry(extent.turn(), next(self._serials), owner, extent)
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)

    def of(self, chosen: Callable[[Extent], bool]) -> EvictionOrder:
        """Another order, of those of the extents that are ``chosen``."""
        order = EvictionOrder()
        for extent, entry in self._entries.items():
            if chosen(extent):
                order.add(entry.owner, extent)
        return order

    def remove(self, extent: Extent) -> None:
        self._entries.pop(extent, None)

    def hasten(self, extent: Extent) -> None:
        """An extent is not needed any more: its turn comes earlier than it did."""
        entry = self._entries.get(extent)
        if entry is not None and extent.turn() < entry.turn:
            self.add(entry.owner, extent)

    def choose(
        self, n_bytes: float, may_go: Callable[[Any, Extent], bool], most: float = math.inf
    ) -> list[tuple[Any, Extent]]:
        """Take the next extents that ``may_go`` out of the order, until they have ``n_bytes`` or are as many as
        ``most``, and return them with their owners. They have less than that if there are no more."""
        chosen: list[tuple[Any, Extent]] = []
        staying: list[_Entry] = []
        while n_bytes > 0 and self._heap and len(chosen) < most:
            entry = heapq.heappop(self._heap)
            extent = entry.extent
            if entry is not self._entries.get(extent):
                continue
            if extent.turn() != entry.turn:
                self.add(entry.owner, extent)
            elif not may_go(entry.owner, extent):
                staying.append(entry)
            else:
                self.remove(extent)
                chosen.append((entry.owner, extent))
                n_bytes -= extent.file_bytes
        for entry in staying:
            heapq.heappush(self._heap, entry)
        return chosen

    def first(self, n_bytes: float, may_go: Callable[[Any, Extent], bool], most: int) -> list[tuple[Any, Extent]]:
        """What `choose` would take, which stays."""
        chosen = self.choose(n_bytes, may_go, most)
        self.put_back(chosen)
        return chosen

    def __len__(self) -> int:
        return len(self._entries)

    def put_back(self, chosen: Iterable[tuple[Any, Extent]]) -> None:
        for owner, extent in chosen:
            self.add(owner, extent)
