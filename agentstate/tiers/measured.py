"""How fast a store answers, as its recent requests tell."""

from __future__ import annotations

import threading
from collections import deque
from typing import NamedTuple

_SAMPLES = 256
_ENOUGH = 8
# What latency is told from: the newest, as far as they are this old.
_RECENT_S = 60.0
# Smaller requests take their latency, and say nothing of the rate.
_LARGE_BYTES = 256 << 10
# The time in which half of what was measured of the rate is forgotten, in seconds with large requests in flight, and
# in seconds without. A fast store is asked for a short time only: the latter lets it outweigh that it was slow before.
_HALF_LIFE_S = 10.0
_IDLE_HALF_LIFE_S = 1.0
_LEAST_KEPT = 1e-3


class Figures(NamedTuple):
    """``latency_s`` is what a small request takes; ``bytes_per_s`` what all large requests in flight carry together,
    only while there are any. None where too little has been measured."""

    latency_s: float | None
    bytes_per_s: float | None


class Measured:
    """Requests for so many bytes that ended well: `began`, then `ended` or `failed`. Thread-safe. Times are by the
    caller's clock."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        # Bytes, seconds, and when it ended.
        self._samples: deque[tuple[int, float, float]] = deque(maxlen=_SAMPLES)
        self._in_flight = 0
        self._since_s = 0.0
        self._busy_s = 0.0
        self._n_bytes = 0.0

    def began(self, now_s: float, n_bytes: int) -> None:
        with self._mutex:
            self._pass(now_s, n_bytes, 1)

    def ended(self, began_s: float, now_s: float, n_bytes: int) -> None:
        with self._mutex:
            self._pass(now_s, n_bytes, -1)
            if n_bytes >= _LARGE_BYTES:
                self._n_bytes += n_bytes
            self._samples.append((n_bytes, now_s - began_s, now_s))

    def failed(self, now_s: float, n_bytes: int) -> None:
        with self._mutex:
            self._pass(now_s, n_bytes, -1)

    def forget(self) -> None:
        """What was measured before says nothing any more."""
        with self._mutex:
            self._samples.clear()
            self._busy_s = self._n_bytes = 0.0

    def _pass(self, now_s: float, n_bytes: int, more: int) -> None:
        if n_bytes < _LARGE_BYTES:
            return
        passed_s = max(0.0, now_s - self._since_s)
        if self._in_flight:
            kept = 0.5 ** (passed_s / _HALF_LIFE_S)
            self._busy_s = self._busy_s * kept + passed_s
        else:
            kept = max(_LEAST_KEPT, 0.5 ** (passed_s / _IDLE_HALF_LIFE_S))
            self._busy_s *= kept
        self._n_bytes *= kept
        self._since_s = now_s
        self._in_flight += more

    def figures(self) -> Figures:
        with self._mutex:
            if len(self._samples) < _ENOUGH:
                return Figures(None, None)
            since_s = max(ended_s for *_, ended_s in self._samples) - _RECENT_S
            newest = list(self._samples)
            recent = [sample for sample in newest if sample[2] >= since_s]
            samples = sorted(recent if len(recent) >= _ENOUGH else newest[-_ENOUGH:])
            # The smallest quarter: it carries the fewest bytes, and there is always one.
            small = sorted(seconds for _, seconds, _ in samples[: max(1, len(samples) // 4)])
            rate = self._n_bytes / self._busy_s if self._busy_s > 0 and self._n_bytes else None
        return Figures(small[len(small) // 2], rate)

    def straggles_after_s(self, n_bytes: int, quantile: float) -> float | None:
        """When a request of so many bytes is later than this share of the recent ones; None if too few were
        measured. Those that were at least half as large and at most twice are what it is compared with, or, where there
        are too few of them, all that were smaller, which were faster, scaled to its size."""
        with self._mutex:
            samples = [(size, seconds) for size, seconds, _ in self._samples]
        near = sorted(seconds for size, seconds in samples if n_bytes <= 2 * size and size <= 2 * n_bytes)
        if len(near) < _ENOUGH:
            near = sorted(seconds * max(1.0, n_bytes / max(1, size)) for size, seconds in samples)
        if len(near) < _ENOUGH:
            return None
        return near[min(len(near) - 1, int(quantile * len(near)))]
