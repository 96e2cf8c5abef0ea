"""The sessions whose agents are away: since when, what is foreseen of their return, and what a byte of theirs is worth
until then; and the sessions that are pinned."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

from agentstate.lookahead.forecast import Forecast
from agentstate.lookahead.policies import Policy, Wait

# How many waits are remembered. The oldest are forgotten first: they are worth least, unless something is foreseen.
_MOST = 16_384
# After so long a request counts as gone that never ended: one that was aborted in the queue.
_LONGEST_TURN_S = 600.0


# Pins to which tiers hold what is on a tier.
_HELD_BY = {"device": ("device",), "host": ("device", "host")}
# What a byte of a pinned context is worth: more than any other, but for those that are served.
PINNED = sys.float_info.max


@dataclass(frozen=True)
class Pin:
    """A session's context stays on a ``tier``, and with it on those below, until ``until_s`` of the monotonic clock. It
    was pinned at ``since_s``."""

    tier: str
    until_s: float
    since_s: float


@dataclass(frozen=True)
class Known:
    """What is known of a wait, by the monotonic clock: since when, what is forecast, and its ``kind`` if that was said.
    The forecast was made at ``foreseen_s``, and is of a time that began at ``origin_s``: a tool may have run
    for longer than its session has waited. The wait is ``over`` once a request of the session is queued, and
    ``released`` if nobody comes back."""

    since_s: float
    forecast: Forecast | None = None
    origin_s: float = 0.0
    foreseen_s: float = 0.0
    kind: str = ""
    over: bool = False
    released: bool = False


class Waits:
    """Waits by their owner: a session's id or, for a request without one, whatever names it. Thread-safe.

    ``policy`` gives the index of a wait that is not over.
    """

    def __init__(self, policy: Policy, clock: Callable[[], float] = time.monotonic, most: int = _MOST):
        self._policy = policy
        self._clock = clock
        self._most = most
        self._mutex = threading.Lock()
        self._waits: OrderedDict[Hashable, Known] = OrderedDict()
        self._foreseen: set[Hashable] = set()
        self._pins: dict[Hashable, Pin] = {}
        # When the first of the pins ends.
        self._unpin_s = math.inf

    def pin(self, owner: Hashable, tier: str, for_s: float) -> bool:
        """Pin the owner's context to a tier, whether or not it is known here. False if too many are pinned."""
        with self._mutex:
            now_s = self._clock()
            if owner not in self._pins and len(self._pins) >= self._most:
                return False
            self._pins[owner] = Pin(tier, now_s + for_s, now_s)
            self._unpin_s = min(self._unpin_s, now_s + for_s)
            return True

    def unpin(self, owner: Hashable) -> None:
        with self._mutex:
            self._pins.pop(owner, None)

    def pinned(self, owner: Hashable) -> Pin | None:
        """The pin of the owner's context, if it has not ended."""
        pin = self._pins.get(owner)
        return None if pin is None or pin.until_s <= self._clock() else pin

    def pins(self) -> dict[Hashable, Pin]:
        """Those that have not ended, by their owners."""
        with self._mutex:
            now_s = self._clock()
            if self._unpin_s <= now_s:
                self._pins = {owner: pin for owner, pin in self._pins.items() if pin.until_s > now_s}
                self._unpin_s = min((pin.until_s for pin in self._pins.values()), default=math.inf)
            return dict(self._pins)

    def began(self, owner: Hashable) -> None:
        """A request of the owner has ended."""
        with self._mutex:
            self._put(owner, Known(self._clock()))
            while len(self._waits) > self._most:
                self._foreseen.discard(self._waits.popitem(last=False)[0])

    def over(self, owner: Hashable) -> None:
        """A request of the owner is queued."""
        with self._mutex:
            if owner in self._waits:
                self._put(owner, Known(self._clock(), over=True))

    def foresee(self, owner: Hashable, forecast: Forecast | None, waited_s: float, kind: str) -> bool:
        """Take a forecast of what began ``waited_s`` ago; None takes the last one back. False if the owner is not known
        here, or does not wait."""
        with self._mutex:
            wait = self._waits.get(owner)
            if wait is None or wait.over or not math.isfinite(waited_s):
                return False
            now_s = self._clock()
            known = replace(wait, forecast=forecast, origin_s=now_s - max(0.0, waited_s), foreseen_s=now_s, kind=kind)
            self._put(owner, known, last=False)
            return True

    def release(self, owner: Hashable) -> bool:
        """Nobody comes back to the owner's context, as far as anyone knows. False if the owner is not known here, or a
        request of it is queued."""
        with self._mutex:
            wait = self._waits.get(owner)
            if wait is None or wait.over:
                return False
            self._put(owner, replace(wait, released=True), last=False)
            return True

    def forget(self, owner: Hashable) -> None:
        """The owner has nothing here any more, and never will."""
        with self._mutex:
            self._waits.pop(owner, None)
            self._foreseen.discard(owner)

    def get(self, owner: Hashable) -> Known | None:
        with self._mutex:
            return self._waits.get(owner)

    def gap(self, owner: Hashable) -> str:
        """What the owner waits for before the request that is being queued, one of `control.GAPS`."""
        wait = self.get(owner)
        return "first" if wait is None else wait.kind or "other"

    def index(self, owner: Hashable, tier: str = "device") -> float:
        """What a byte of the owner's is worth on the device, or on the ``host``, a second: infinite once its wait is
        over, `PINNED` if it is pinned there, 0 if it is released or not known."""
        wait = self.get(owner)
        now_s = self._clock()
        if wait is not None and wait.over and now_s - wait.since_s < _LONGEST_TURN_S:
            return math.inf
        if self._pins and (pin := self.pinned(owner)) is not None and pin.tier in _HELD_BY[tier]:
            return PINNED
        if wait is None or wait.released:
            return 0.0
        waited_s = now_s - (wait.since_s if wait.forecast is None else wait.origin_s)
        # A byte costs as much to bring back as any other.
        return self._policy(Wait(wait.forecast, waited_s, cost_s=1.0, n_bytes=1))

    def soonest(self, most: int) -> list[Any]:
        """The owners that something is foreseen of and that are worth something, who is worth most first."""
        pins = self.pins() if self._pins else {}
        with self._mutex:
            owners = [*self._foreseen, *(owner for owner in pins if owner not in self._foreseen)]
        found = [(index, owner) for owner in owners if 0 < (index := self.index(owner)) < math.inf]
        return [owner for _, owner in sorted(found, key=itemgetter(0), reverse=True)[:most]]

    @property
    def foreseen(self) -> int:
        """Of how many waits something else is known than since when."""
        return len(self._foreseen) + (len(self.pins()) if self._pins else 0)

    def _put(self, owner: Hashable, wait: Known, *, last: bool = True) -> None:
        self._waits[owner] = wait
        if last:
            self._waits.move_to_end(owner)
        if wait.forecast is not None or wait.released:
            self._foreseen.add(owner)
        else:
            self._foreseen.discard(owner)
