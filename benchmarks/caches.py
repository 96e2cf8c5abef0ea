"""A cache of tree segments, evicted like a radix cache: leaf first, the least recently used first."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence

ROOT = -1
_FIRST = -1.0  # used before anything


class SegmentCache:
    """Which segments of a tree one tier of one engine holds, in pages.

    A use of a segment is a use of everything before it. Only the deepest segment is marked, so that a use costs the
    same however long the path is. When the segment is evicted, its mark goes to the one before it; until then that one
    is no leaf, and its own mark decides nothing. For the same reason a lock on a segment holds everything before it.

    ``reserved`` pages are taken by running requests that have not put their segments in yet.

    With a ``value`` of segments the least valuable leaf leaves first instead, and with it those before it that nothing
    else needs; what is of infinite value stays. ``dropped`` is told of each segment that leaves.
    """

    def __init__(
        self,
        parents: Sequence[int],
        pages: Sequence[int],
        capacity_pages: int,
        value: Callable[[int], float] | None = None,
        dropped: Callable[[int], None] = lambda segment: None,
    ):
        self._value, self._dropped = value, dropped
        self._parents = parents
        self._pages = pages
        self.capacity_pages = capacity_pages
        self.resident_pages = 0
        self.reserved = 0
        self._used: dict[int, float] = {}
        self._children: dict[int, int] = {}
        self._locks: dict[int, int] = {}
        self._leaves: list[tuple[float, int]] = []  # may hold what is no leaf any more, or was used since
        self._tips: set[int] = set()  # every leaf, if there are values

    def __contains__(self, segment: int) -> bool:
        return segment in self._used

    def covered(self, segment: int) -> int:
        """The deepest segment on the path to ``segment`` that is here, or `ROOT`."""
        while segment != ROOT and segment not in self._used:
            segment = self._parents[segment]
        return segment

    def use(self, segment: int, now_s: float) -> None:
        """Mark a cached segment, and all before it, as used."""
        if segment != ROOT:
            self._used[segment] = max(self._used[segment], now_s)

    def lock(self, segment: int) -> None:
        """Keep a cached segment, and all before it, until `unlock`."""
        if segment != ROOT:
            self._locks[segment] = self._locks.get(segment, 0) + 1

    def unlock(self, segment: int) -> None:
        if segment != ROOT:
            left = self._locks[segment] - 1
            if left:
                self._locks[segment] = left
            else:
                del self._locks[segment]
                self._offer(segment)

    def make_room(self, pages: int, below: float = math.inf) -> bool:
        """Evict until ``pages`` more fit, with values only what is worth less than ``below``. Returns whether they do;
        what was evicted on the way stays so if not."""
        over = self.resident_pages + self.reserved + pages - self.capacity_pages
        if self._value is not None:
            return over <= 0 or self._make_room_by(self._value, over, below)
        while over > 0:
            leaf = self._oldest_leaf()
            if leaf is None:
                return False
            over -= self._evict(leaf, over)
        return True

    def could_make_room(self, pages: int, below: float) -> bool:
        """Whether `make_room` would. Only with values."""
        assert self._value is not None
        over = self.resident_pages + self.reserved + pages - self.capacity_pages
        if over <= 0:
            return True
        for tip in self._tips:
            if tip not in self._locks and self._value(tip) < below:
                segment = tip
                while over > 0:
                    over -= self._pages[segment]
                    segment = self._parents[segment]
                    if segment not in self._used or self._children[segment] > 1 or segment in self._locks:
                        break
                if over <= 0:
                    return True
        return False

    def insert(self, segments: Sequence[int], now_s: float) -> None:
        """Insert segments of one path, in its order, that are not cached and for which there is room."""
        for segment in segments:
            self._used[segment] = now_s
            parent = self._parents[segment]
            self._children[parent] = self._children.get(parent, 0) + 1
            self.resident_pages += self._pages[segment]
            if self._value is not None:
                self._tips.discard(parent)
                if not self._children.get(segment):
                    self._tips.add(segment)
        if segments:
            self._offer(segments[-1])

    def take(self, segment: int) -> None:
        """Remove a segment that is here, whatever is after it."""
        del self._used[segment]
        self.resident_pages -= self._pages[segment]
        self._tips.discard(segment)
        parent = self._parents[segment]
        self._children[parent] -= 1
        if parent in self._used:
            if self._value is not None and not self._children[parent]:
                self._tips.add(parent)
            self._offer(parent)

    def demote(self, segment: int) -> None:
        """Make a cached segment, and all before it that nothing else shares or holds, the first to be evicted."""
        if self._children.get(segment) or segment in self._locks:
            return
        self._used[segment] = _FIRST
        self._offer(segment)
        parent = self._parents[segment]
        while parent in self._used and self._children[parent] == 1 and parent not in self._locks:
            self._used[parent] = _FIRST
            parent = self._parents[parent]

    def _make_room_by(self, value: Callable[[int], float], over: int, below: float) -> bool:
        while over > 0:
            tips = sorted((value(tip), tip) for tip in self._tips if tip not in self._locks)
            before = over
            for worth, tip in tips:
                if worth >= below:
                    break
                segment = tip
                while over > 0:
                    over -= self._pages[segment]
                    parent = self._parents[segment]
                    self.take(segment)
                    self._dropped(segment)
                    segment = parent
                    # What others share is weighed when it is a leaf.
                    if segment not in self._tips or segment in self._locks or value(segment) > worth:
                        break
                if over <= 0:
                    return True
            if over == before:
                return False
        return True

    def _offer(self, segment: int) -> None:
        if self._value is not None:
            return
        if not self._children.get(segment) and segment not in self._locks:
            heapq.heappush(self._leaves, (self._used[segment], segment))

    def _oldest_leaf(self) -> int | None:
        while self._leaves:
            used_s, segment = heapq.heappop(self._leaves)
            now_used_s = self._used.get(segment)
            if now_used_s is None or self._children.get(segment) or segment in self._locks:
                continue
            if now_used_s == used_s:
                return segment
            heapq.heappush(self._leaves, (now_used_s, segment))
        return None

    def _evict(self, segment: int, enough: int) -> int:
        """Evict a leaf, and those before it that become the oldest leaf with it, to free ``enough``. Returns the pages
        freed."""
        freed, used_s = 0, self._used[segment]
        while True:
            del self._used[segment]
            freed += self._pages[segment]
            segment = self._parents[segment]
            self._children[segment] -= 1
            if segment not in self._used:
                break
            older = self._used[segment] <= used_s
            if older:
                self._used[segment] = used_s
            if not older or freed >= enough or self._children[segment] or segment in self._locks:
                self._offer(segment)
                break
        self.resident_pages -= freed
        return freed
