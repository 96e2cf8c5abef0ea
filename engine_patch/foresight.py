"""Sessions that wait are brought back to the device before their next request, if their bytes are worth more there than
what they displace; and whoever asks is told where a session is, and why."""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from agentstate.fleet.hints import Hints
from agentstate.lookahead.planner import MARGIN, worth_fetching
from engine_patch.eviction import EvictionOrder
from engine_patch.waits import Waits

logger = logging.getLogger(__name__)

# How often waits are looked at, and how many of them at most: those that are back soonest.
_EVERY_S = 0.1
_LOOKED_AT = 256
# Fetches that are under way at once: each reads as fast as the drive does.
_AT_ONCE = 2
_REMEMBERED = 1024


@dataclass
class ForesightStats:
    """Counters since the engine started: forecasts that were taken, and that were not; contexts that were fetched, and
    of these those that their next request found on the device, and those that left it before."""

    foreseen: int = 0
    ignored: int = 0
    fetched: int = 0
    used: int = 0
    wasted: int = 0


@dataclass(frozen=True)
class Fetch:
    """A context was fetched at ``at_s`` by the monotonic clock: a byte of it was worth ``index``, and at most
    ``displaced`` of what had to go. Its ``outcome`` is ``under way``, ``there``, ``used``, ``late`` or ``wasted``."""

    at_s: float
    index: float
    displaced: float
    tokens: int
    outcome: str = "under way"


class Foresight:
    """For the scheduler's thread, but for `explain`, which is for any.

    ``length`` tells how many tokens of a session's context could be on the device, 0 where that is not known, and
    ``room`` how many tokens are free. ``bring`` begins a prefetch, from any thread, and returns what tells how that
    stands; without it nothing is fetched.
    """

    def __init__(
        self,
        waits: Waits,
        order: EvictionOrder,
        stats: ForesightStats,
        *,
        length: Callable[[str], int],
        room: Callable[[], int],
        bring: Callable[[str], Callable[[], dict[str, Any]]] | None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._waits = waits
        self._order = order
        self._stats = stats
        self._length = length
        self._room = room
        self._bring = bring
        self._clock = clock
        self._next_s = 0.0
        self._cleared_s = 0.0
        # The newest fetch of each session, and what tells how those stand that are under way.
        self._fetches: OrderedDict[str, Fetch] = OrderedDict()
        self._under_way: dict[str, Callable[[], dict[str, Any]] | None] = {}
        self._fetching = ThreadPoolExecutor(1, "agentstate-fetch")

    def hinted(self, owner: Hashable, hints: Hints) -> None:
        """A request of the owner, which has ended, has said what to expect."""
        if hints.release:
            self._waits.release(owner)
        elif hints.forecast is not None:
            self._waits.foresee(owner, hints.forecast, 0.0, "other")

    def back(self, session_id: str) -> None:
        """A request of the session is queued."""
        if (fetch := self._fetches.get(session_id)) is not None and fetch.outcome in ("under way", "there"):
            there = self._order.tokens(session_id) >= fetch.tokens
            self._conclude(session_id, "used" if there else "late")
            if there:
                self._stats.used += 1
        self._waits.over(session_id)

    def cleared(self) -> None:
        """The device was emptied: whoever did that wants it empty. What is foreseen from now on is fetched again."""
        self._cleared_s = self._clock()

    def step(self) -> None:
        """Fetch what is worth it. Between two batches, as often as one likes."""
        if self._bring is None or self._clock() < self._next_s:
            return
        self._next_s = self._clock() + _EVERY_S
        self._settle()
        if not self._waits.foreseen:
            return
        away = [session for session in self._waits.soonest(_LOOKED_AT) if self._misses(session)]
        for session in away:
            if len(self._under_way) >= _AT_ONCE:
                return
            index, tokens = self._waits.index(session), self._length(session)
            missing = tokens - self._order.tokens(session)
            if not self._order.room_of(session, missing):
                continue
            displaced = self._order.displaced(missing - self._room())
            if not worth_fetching(index, displaced):
                # Others are worth less.
                return
            self._keep(session, Fetch(self._clock(), index, displaced, tokens))
            self._under_way[session] = None
            self._fetching.submit(self._begin, session)

    def _misses(self, session_id: str) -> bool:
        """Whether to think of fetching it: once a forecast, and once a pin."""
        wait, fetch, pin = self._waits.get(session_id), self._fetches.get(session_id), self._waits.pinned(session_id)
        tried_s = self._cleared_s if fetch is None else max(fetch.at_s, self._cleared_s)
        asked_s = [*([wait.foreseen_s] if wait is not None else []), *([pin.since_s] if pin is not None else [])]
        if tried_s >= max(asked_s, default=-math.inf):
            return False
        return self._order.tokens(session_id) < self._length(session_id)

    def _begin(self, session_id: str) -> None:
        assert self._bring is not None
        try:
            self._under_way[session_id] = self._bring(session_id)
        except Exception:
            logger.exception("agentstate: session %s could not be fetched", session_id)
            self._under_way[session_id] = lambda: {"state": "cold"}

    def _settle(self) -> None:
        for session, state in list(self._under_way.items()):
            if state is None or (found := state()["state"]) == "pending":
                continue
            del self._under_way[session]
            # Of very many fetches the oldest are forgotten, this one perhaps.
            if (fetch := self._fetches.get(session)) is not None and fetch.outcome == "under way":
                self._stats.fetched += found == "warm"
                self._conclude(session, "there" if found == "warm" else "wasted")
        for session, fetch in self._fetches.items():
            if fetch.outcome == "there" and self._order.tokens(session) < fetch.tokens:
                self._stats.wasted += 1
                self._conclude(session, "wasted")

    def _conclude(self, session_id: str, outcome: str) -> None:
        fetch = self._fetches[session_id] = replace(self._fetches[session_id], outcome=outcome)
        logger.debug("agentstate: session %s was fetched: %s", session_id, fetch)

    def _keep(self, session_id: str, fetch: Fetch) -> None:
        self._fetches.pop(session_id, None)
        self._fetches[session_id] = fetch
        while len(self._fetches) > _REMEMBERED:
            self._fetches.popitem(last=False)

    def explain(self, session_id: str) -> dict[str, Any]:
        """What is known of the session's wait, and what a byte of it is worth among the others'; what would move it."""
        now_s, wait, fetch = self._clock(), self._waits.get(session_id), self._fetches.get(session_id)
        there, pin = self._order.tokens(session_id), self._waits.pinned(session_id)
        said: dict[str, Any] = {"device_tokens": there, "wait": None, "index": None, "place": None, "fetch": None}
        if fetch is not None:
            said["fetch"] = {**asdict(fetch), "ago_s": now_s - fetch.at_s}
        if pin is not None:
            said["pin"] = {"tier": pin.tier, "rest_s": pin.until_s - now_s}
        if wait is None:
            return said
        if wait.over:
            return said | {"wait": {"state": "served", "waited_s": now_s - wait.since_s}}
        forecast, gone_s = wait.forecast, now_s - wait.origin_s
        said["wait"] = {
            "state": "released" if wait.released else "waits",
            "kind": wait.kind,
            "waited_s": now_s - wait.since_s,
            "rest_p50_s": None if forecast is None else _finite(forecast.rest(gone_s, 0.5)),
            "rest_p90_s": None if forecast is None else _finite(forecast.rest(gone_s, 0.9)),
        }
        standing = self._order.standing()
        own = said["index"] = self._waits.index(session_id)
        said["place"] = 1 + sum(index > own for _, index, _ in standing)
        if there:
            # What is worth less goes before it. Contexts that share pages count those each.
            said["leaves_after_tokens"] = sum(tokens for _, index, tokens in standing if index < own)
        else:
            least = min((index for _, index, _ in standing), default=0.0)
            said["fetched_from_index"] = MARGIN * least
        return said

    @property
    def kept(self) -> int:
        """How many fetches are under way."""
        return len(self._under_way)


def _finite(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None
