"""Which queued request is admitted next: the one that lacks the least KV on the device. That request occupies memory
and drive for the shortest time, so that the others wait least.

Requests that have waited long go first, or the largest ones would starve, and so do those whose pages are on the
device, all of them in order of arrival.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine_patch.sglang_api import CacheAgnosticPolicy

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.schedule_policy import SchedulePolicy

# The steps of the scheduler after which ranks agree again on who has waited long.
_STEPS = 16


@dataclass
class OrderStats:
    """Counters since the engine started: requests that later ones were put before (``delayed``), and those of them that
    went first in the end because they had waited long (``aged``)."""

    delayed: int = 0
    aged: int = 0


@dataclass(eq=False)
class _Waiting:
    """A queued request: since when by this rank's clock, and whether all ranks agree that that is long. It lacks
    ``missing`` tokens (None: not known); 0 if what there is of it is on the device. It was looked at in pass ``seen``.
    """

    since_s: float
    aged: bool = False
    missing: int | None = None
    seen: int = 0
    delayed: bool = False


class Order:
    """Orders requests that SGLang would admit in order of arrival, each priority's by themselves. Other policies of
    SGLang's are left alone, and so is everything with ``aging_s`` 0.

    For the scheduler's thread. Every rank orders alike: all see the same queue and the same tree, and they agree on who
    has waited for ``aging_s``, because their clocks differ. ``look`` matches a request anew and calls `matched`;
    ``agree`` tells which of some answers is yes on all ranks.
    """

    def __init__(
        self,
        aging_s: float,
        stats: OrderStats,
        look: Callable[[Req], object],
        agree: Callable[[Sequence[bool]], list[bool]],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._aging_s = aging_s
        self._stats = stats
        self._look = look
        self._agree = agree
        self._clock = clock
        self._waiting: dict[str, _Waiting] = {}
        self._steps = 0
        self._passes = 0

    @property
    def on(self) -> bool:
        return self._aging_s > 0

    def queueing(self, req: Req) -> None:
        """A request is being queued, perhaps again."""
        if self.on:
            self._waiting[req.rid] = _Waiting(self._clock())

    def matched(self, req: Req, device_tokens: int, restorable: int) -> None:
        """Of a request, so many tokens are on the device, and so many more pages can be restored."""
        if (waiting := self._waiting.get(req.rid)) is not None:
            missing = len(req.origin_input_ids) + len(req.output_ids) - device_tokens
            waiting.missing = missing if restorable or missing > device_tokens else 0
            waiting.seen = self._passes

    def forget(self, req: Req) -> None:
        """What is on the device of a request has changed."""
        if (waiting := self._waiting.get(req.rid)) is not None:
            waiting.missing = None

    def step(self, queue: Sequence[Req], policy: SchedulePolicy) -> None:
        """Between two batches: forget requests that have left the queue, and now and then agree on who has aged."""
        if not self._applies(policy):
            self._waiting.clear()
            return
        self._waiting = {req.rid: waiting for req in queue if (waiting := self._waiting.get(req.rid)) is not None}
        self._steps += 1
        if self._steps % _STEPS:
            return
        in_turn = sorted(queue, key=lambda req: _priority(req, policy))
        if not (delayed := self._delayed(in_turn, self.ranked(queue, policy))):
            return
        now_s = self._clock()
        aged = self._agree([now_s - self._of(req).since_s >= self._aging_s for req in delayed])
        for req, has_aged in zip(delayed, aged, strict=True):
            self._of(req).aged = has_aged
            self._stats.aged += has_aged

    def ranked(self, queue: Sequence[Req], policy: SchedulePolicy) -> list[Req]:
        """The queue in the order in which its requests are to be admitted, as far as they have been looked at."""
        if not self._applies(policy):
            return list(queue)

        def key(req: Req) -> tuple[int, int]:
            waiting = self._of(req)
            return _priority(req, policy), 0 if waiting.aged else waiting.missing or 0

        return sorted(queue, key=key)

    def sort(self, queue: list[Req], policy: SchedulePolicy) -> None:
        """Order what SGLang is going to admit from, after it has applied its own policy."""
        if not self._applies(policy) or len(queue) < 2:
            return
        self._passes += 1
        for req in queue:
            if self._of(req).missing is None:
                self._look(req)
        ranked = self.ranked(queue, policy)
        if delayed := self._delayed(queue, ranked):
            for req in delayed:
                self._stats.delayed += not self._of(req).delayed
                self._of(req).delayed = True
            # Others may have brought its pages since. One of them a pass: a match costs what its prompt is long.
            oldest = min(delayed, key=lambda req: self._of(req).seen)
            if self._of(oldest).seen < self._passes:
                self._look(oldest)
                ranked = self.ranked(queue, policy)
        queue[:] = ranked

    def _applies(self, policy: SchedulePolicy) -> bool:
        return self.on and policy.policy == CacheAgnosticPolicy.FCFS

    def _of(self, req: Req) -> _Waiting:
        if (waiting := self._waiting.get(req.rid)) is None:
            waiting = self._waiting[req.rid] = _Waiting(self._clock())
        return waiting

    def _delayed(self, queue: Sequence[Req], ranked: Sequence[Req]) -> list[Req]:
        """The requests that have not aged and that a later one comes before."""
        place = {id(req): position for position, req in enumerate(queue)}
        delayed, last = [], -1
        for req in ranked:
            if place[id(req)] < last and not self._of(req).aged:
                delayed.append(req)
            last = max(last, place[id(req)])
        return delayed

    @property
    def kept(self) -> int:
        """How many queued requests something is known of."""
        return len(self._waiting)

    def clear(self) -> None:
        """The device memory is cleared: look at every request again."""
        for waiting in self._waiting.values():
            waiting.missing = None


def _priority(req: Req, policy: SchedulePolicy) -> int:
    """What the user has asked for, the smallest first."""
    return int(req.priority * policy.priority_sign) if policy.enable_priority_scheduling else 0
