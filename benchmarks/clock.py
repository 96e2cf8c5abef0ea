"""Simulated time: what is to happen, in order."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0

    def at(self, at_s: float, act: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._events, (at_s, self._sequence, act))

    @property
    def next_s(self) -> float | None:
        """When the next thing happens; None if nothing does any more."""
        return self._events[0][0] if self._events else None

    def step(self) -> None:
        """Go to the next thing, and let it happen."""
        self.now_s, _, act = heapq.heappop(self._events)
        act()
