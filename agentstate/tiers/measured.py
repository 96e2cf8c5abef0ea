"""How fast a store answers, as its recent requests tell."""

from __future__ import annotations

import threading
from collections import deque
from typing import NamedTuple

_SAMPLES = 256
_ENOUGH = 8
# The time in which half of what was measured of the rate is forgotten, in seconds with requests in flight.
_HALF_LIFE_S = 10.0


class Figures(NamedTuple):
    """``latency_s`` is what a small request takes; ``bytes_per_s`` what all requests in flight carry together, only
    while there are any. None where too little has been measured."""

    latency_s: float | None
    bytes_per_s: float | None


class Measured:
    """Requests that ended well: `began`, then `ended` or `failed`. Thread-safe. Times are by the caller's clock."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._samples: deque[tuple[int, float]] = deque(maxlen=_SAMPLES)
        self._in_flight = 0
        self._since_s = 0.0
        self._busy_s = 0.0
        self._n_bytes = 0.0

    def began(self, now_s: float) -> None:
        with self._mutex:
            self._pass(now_s)
            self._in_flight += 1

    def ended(self, began_s: float, now_s: float, n_bytes: int) -> None:
        with self._mutex:
            self._pass(now_s)
            self._in_flight -= 1
            self._n_bytes += n_bytes
            self._samples.append((n_bytes, now_s - began_s))

    def failed(self, now_s: float) -> None:
        with self._mutex:
            self._pass(now_s)
            self._in_flight -= 1

    def _pass(self, now_s: float) -> None:
        if self._in_flight:
            passed_s = max(0.0, now_s - self._since_s)
            kept = 0.5 ** (passed_s / _HALF_LIFE_S)
            self._busy_s = self._busy_s * kept + passed_s
            self._n_bytes *= kept
        self._since_s = now_s

    def figures(self) -> Figures:
        with self._mutex:
            samples = sorted(self._samples)
            if len(samples) < _ENOUGH:
                return Figures(None, None)
            # The smallest quarter: it carries the fewest bytes, and there is always one.
            small = sorted(seconds for _, seconds in samples[: max(1, len(samples) // 4)])
            rate = self._n_bytes / self._busy_s if self._busy_s > 0 and self._n_bytes else None
        return Figures(small[len(small) // 2], rate)

    def straggles_after_s(self, n_bytes: int, quantile: float) -> float | None:
        """When a request of so many bytes is later than this share of the recent ones; None if too few were
        measured. Those that were at least half as large and at most twice are what it is compared with, or, where there
        are too few of them, all that were smaller, which were faster, scaled to its size."""
        with self._mutex:
            samples = list(self._samples)
        near = sorted(seconds for size, seconds in samples if n_bytes <= 2 * size and size <= 2 * n_bytes)
        if len(near) < _ENOUGH:
            near = sorted(seconds * max(1.0, n_bytes / max(1, size)) for size, seconds in samples)
        if len(near) < _ENOUGH:
            return None
        return near[min(len(near) - 1, int(quantile * len(near)))]
