"""The drive of a simulated engine: one read at a time, the most urgent first, and a less urgent one yields to it."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

from agentstate.benchmarks.clock import Clock


class Urgency(enum.IntEnum):
    """Who waits for a read."""

    FORWARD = 0
    REQUEST = 1  # one that is queued
    DUE = 2  # nobody yet, but it was said when
    PLANNED = 3


def _first_come(now_s: float) -> float:
    return 0.0


@dataclass(slots=True, eq=False)
class Read:
    """``left_s`` seconds of reading. Of equally urgent reads the one with the least ``rank`` (of the time) is next, of
    those the oldest. It is over at ``done_s``."""

    left_s: float
    urgency: Urgency
    done: Callable[[], None]
    rank: Callable[[float], float] = _first_come
    number: int = 0
    start_s: float | None = None
    done_s: float = math.inf


class ReadQueue:
    def __init__(self, clock: Clock):
        self._clock = clock
        self._waiting: list[Read] = []
        self._current: Read | None = None
        self._since_s = 0.0
        self._turn = 0  # ends of earlier turns are void
        self._count = 0

    def submit(self, read: Read) -> None:
        self._count += 1
        read.number = self._count
        self._waiting.append(read)
        self._next()

    def promote(self, read: Read, urgency: Urgency) -> None:
        """Make a read at least this urgent, and the last of those that are."""
        if read.done_s < math.inf or read.urgency <= urgency:
            return
        read.urgency = urgency
        self._count += 1
        read.number = self._count
        self._next()

    def span_s(self, read: Read) -> tuple[float, float]:
        """When a read began and ended, or will if nothing more urgent comes."""
        if read.done_s < math.inf:
            assert read.start_s is not None
            return read.start_s, read.done_s
        now_s = self._clock.now_s
        end_s = now_s
        if self._current is not None:
            end_s = self._since_s + self._current.left_s
        if read is not self._current:
            for other in sorted(self._waiting, key=self._key):
                end_s += other.left_s
                if other is read:
                    break
        return (end_s - read.left_s if read.start_s is None else read.start_s), end_s

    def running(self, read: Read) -> bool:
        return read is self._current

    def backlog_s(self) -> float:
        """How long all the reads take that somebody waits for."""
        own_s = 0.0
        if self._current is not None and self._current.urgency <= Urgency.REQUEST:
            own_s = self._since_s + self._current.left_s - self._clock.now_s
        return own_s + sum(read.left_s for read in self._waiting if read.urgency <= Urgency.REQUEST)

    def _key(self, read: Read) -> tuple[int, float, int]:
        return read.urgency, read.rank(self._clock.now_s), read.number

    def _next(self) -> None:
        if not self._waiting:
            return
        current, now_s = self._current, self._clock.now_s
        best = min(self._waiting, key=self._key)
        if current is not None:
            if best.urgency >= current.urgency:
                return
            current.left_s = max(0.0, current.left_s - (now_s - self._since_s))
            self._waiting.append(current)
        self._waiting.remove(best)
        self._current, self._since_s = best, now_s
        if best.start_s is None:
            best.start_s = now_s
        self._turn += 1
        turn = self._turn
        self._clock.at(now_s + best.left_s, lambda: self._over(best) if turn == self._turn else None)

    def _over(self, read: Read) -> None:
        self._current = None
        read.left_s, read.done_s = 0.0, self._clock.now_s
        self._next()
        read.done()
