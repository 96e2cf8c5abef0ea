"""A clock that a test moves."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable

from agentstate.tiers.clock import Clock, Timer


class ManualClock(Clock):
    """Time passes by `advance` alone, which does on its own thread what becomes due."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._now_s = 0.0
        self._due: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()

    def now(self) -> float:
        return self._now_s

    def after(self, seconds: float, do: Callable[[], None]) -> Timer:
        timer = Timer(do)
        with self._mutex:
            heapq.heappush(self._due, (self._now_s + seconds, next(self._numbers), timer))
        return timer

    def advance(self, seconds: float) -> None:
        until_s = self._now_s + seconds
        while True:
            with self._mutex:
                if not self._due or self._due[0][0] > until_s:
                    self._now_s = until_s
                    return
                due_s, _, timer = heapq.heappop(self._due)
                self._now_s = max(self._now_s, due_s)
            timer.fire()

    def waiting(self) -> int:
        """How many timers have not been cancelled and are not due."""
        with self._mutex:
            return sum(not timer.cancelled for _, _, timer in self._due)

    def close(self) -> None:
        with self._mutex:
            self._due.clear()
