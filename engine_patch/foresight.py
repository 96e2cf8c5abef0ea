"""Sessions that wait are brought back to the device before their next request, if their bytes are worth more there than
what they displace; and whoever asks is told where a session is, and why."""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from agentstate.fleet.hints import Hints
from agentstate.lookahead.planner import MARGIN, worth_fetching
from engine_patch.decisions import Decisions
from engine_patch.eviction import EvictionOrder
from engine_patch.waits import Waits

logger = logging.getLogger(__name__)

# How often waits are looked at, and how many of them at most: those that are back soonest.
_EVERY_S = 0.1
_LOOKED_AT = 256
# Fetches that are under way at once: each reads as fast as the drive does.
_AT_ONCE = 2
_REMEMBERED = 1024
# How many decisions about a session are told of it.
_TOLD = 20


@dataclass
class ForesightStats:
    """Counters since the engine started: forecasts that were taken, and that were not; contexts that were fetched, and
    of these those that their next request found on the device (``used``), and those that left it before (``wasted``).
    Of the latter, ``left`` went although they were waited for, and of ``wrong`` nine in ten would have been back by
    then, or nobody was expected any more. Fetches that their request was too early for are ``late``, those that came to
    nothing ``cancelled``. Bytes are those that were brought."""

    foreseen: int = 0
    ignored: int = 0
    fetched: int = 0
    fetched_bytes: int = 0
    used: int = 0
    used_bytes: int = 0
    wasted: int = 0
    wasted_bytes: int = 0
    left: int = 0
    left_bytes: int = 0
    wrong: int = 0
    wrong_bytes: int = 0
    late: int = 0
    cancelled: int = 0


@dataclass(frozen=True)
class Fetch:
    """A context was fetched at ``at_s`` by the monotonic clock: a byte of it was worth ``index``, and at most
    ``displaced`` of what had to go. Of its ``tokens`` those are brought that were ``missing``, for a request that nine
    in ten would have sent by ``due_s``. Its ``outcome`` is ``under way``, ``there``, ``used``, ``late`` or ``wasted``,
    for the ``reason`` ``left``, ``wrong`` or ``cancelled``."""

    at_s: float
    index: float
    displaced: float
    tokens: int
    missing: int = 0
    due_s: float = math.inf
    outcome: str = "under way"
    reason: str = ""


class Foresight:
    """For the scheduler's thread, but for `explain`, which is for any.

    ``length`` tells how many tokens of a session's context could be on the device, 0 where that is not known, and
    ``room`` how many tokens are free. ``bring`` begins a prefetch, from any thread, and returns what tells how that
    stands; without it nothing is fetched. ``n_bytes`` of so many tokens are brought. ``pin`` pins a session to the
    device for so many seconds, and may take as long as SQL does.
    """

    def __init__(
        self,
        waits: Waits,
        order: EvictionOrder,
        stats: ForesightStats,
        decisions: Decisions,
        *,
        length: Callable[[str], int],
        room: Callable[[], int],
        bring: Callable[[str], Callable[[], dict[str, Any]]] | None,
        n_bytes: Callable[[int], int],
        pin: Callable[[str, float], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._waits = waits
        self._order = order
        self._stats = stats
        self._length = length
        self._room = room
        self._bring = bring
        self._n_bytes = n_bytes
        self._decisions = decisions
        self._pin = pin
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
            taken = self._waits.release(owner)
            self._decisions.add(owner, "release", "accepted" if taken else "ignored", self._order.tokens(owner))
        elif hints.forecast is not None:
            self._waits.foresee(owner, hints.forecast, 0.0, "other")
        # Who has proven no turn has no session that could be pinned.
        if hints.pin_s is not None and isinstance(owner, str):
            self._fetching.submit(self._begin_pin, owner, hints.pin_s)

    def _begin_pin(self, session_id: str, for_s: float) -> None:
        try:
            self._pin(session_id, for_s)
        except Exception:
            logger.exception("agentstate: session %s could not be pinned", session_id)

    def back(self, session_id: str) -> None:
        """A request of the session is queued."""
        if (fetch := self._fetches.get(session_id)) is not None and fetch.outcome in ("under way", "there"):
            if self._is_there(session_id, fetch.tokens):
                self._conclude(session_id, "used")
            elif fetch.outcome == "under way":
                self._conclude(session_id, "late")
            else:
                self._waste(session_id)
        self._waits.over(session_id)

    def cleared(self) -> None:
        """The device was emptied: whoever did that wants it empty. What is foreseen from now on is fetched again."""
        self._cleared_s = self._clock()
        for session, fetch in self._fetches.items():
            if fetch.outcome == "there":
                self._conclude(session, "wasted", "cancelled")

    def evicted(self, before: Mapping[Hashable, int]) -> None:
        """An eviction has taken from these contexts, which had so many tokens on the device."""
        for owner, tokens in before.items():
            wait = self._waits.get(owner)
            if wait is None or wait.over or wait.released or wait.forecast is None:
                continue
            if math.isfinite(wait.forecast.rest(self._clock() - wait.origin_s, 0.5)):
                lost = tokens - self._order.tokens(owner)
                self._decisions.add(owner, "evict", "waited_for", lost, self._waits.index(owner))

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
            there = self._order.tokens(session)
            if not self._order.room_of(session, tokens - there):
                continue
            # Without its window all of it is brought, for a while beside what is there.
            missing = tokens - there if self._order.has_window(session) else tokens
            displaced = self._order.displaced(missing - self._room())
            if not worth_fetching(index, displaced):
                # Others are worth less.
                return
            self._keep(session, Fetch(self._clock(), index, displaced, tokens, missing, self._due_s(session)))
            self._decisions.add(session, "fetch", "begun", missing, index, displaced)
            self._under_way[session] = None
            self._fetching.submit(self._begin, session)

    def _misses(self, session_id: str) -> bool:
        """Whether to think of fetching it: once a forecast, and once a pin."""
        wait, fetch, pin = self._waits.get(session_id), self._fetches.get(session_id), self._waits.pinned(session_id)
        tried_s = self._cleared_s if fetch is None else max(fetch.at_s, self._cleared_s)
        asked_s = [*([wait.foreseen_s] if wait is not None else []), *([pin.since_s] if pin is not None else [])]
        if tried_s >= max(asked_s, default=-math.inf):
            return False
        return not self._is_there(session_id, self._length(session_id))

    def _is_there(self, session_id: str, tokens: int) -> bool:
        """Whether so many tokens of a context are on the device, and can be gone on from."""
        return self._order.tokens(session_id) >= tokens and self._order.has_window(session_id)

    def _due_s(self, session_id: str) -> float:
        """When nine in ten that wait like this one would be back."""
        wait, now_s = self._waits.get(session_id), self._clock()
        if wait is None or wait.forecast is None:
            return math.inf
        return now_s + wait.forecast.rest(now_s - wait.origin_s, 0.9)

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
                if found == "warm":
                    self._conclude(session, "there")
                else:
                    self._conclude(session, "wasted", "cancelled")
        for session, fetch in self._fetches.items():
            if fetch.outcome == "there" and not self._is_there(session, fetch.tokens):
                self._waste(session)

    def _waste(self, session_id: str) -> None:
        """What was fetched is not on the device any more, and no request has used it."""
        wait, fetch = self._waits.get(session_id), self._fetches[session_id]
        unexpected = wait is None or wait.released or self._clock() > fetch.due_s
        self._conclude(session_id, "wasted", "wrong" if unexpected else "left")

    def _conclude(self, session_id: str, outcome: str, reason: str = "") -> None:
        fetch = self._fetches[session_id] = replace(self._fetches[session_id], outcome=outcome, reason=reason)
        n_bytes, stats = self._n_bytes(fetch.missing), self._stats
        if outcome == "there":
            stats.fetched, stats.fetched_bytes = stats.fetched + 1, stats.fetched_bytes + n_bytes
        elif outcome == "used":
            stats.used, stats.used_bytes = stats.used + 1, stats.used_bytes + n_bytes
        elif outcome == "late":
            stats.late += 1
        elif reason == "cancelled":
            stats.cancelled += 1
        else:
            stats.wasted, stats.wasted_bytes = stats.wasted + 1, stats.wasted_bytes + n_bytes
            if reason == "left":
                stats.left, stats.left_bytes = stats.left + 1, stats.left_bytes + n_bytes
            else:
                stats.wrong, stats.wrong_bytes = stats.wrong + 1, stats.wrong_bytes + n_bytes
        self._decisions.add(session_id, "fetch", reason or outcome, fetch.missing, fetch.index, fetch.displaced)
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
        said["decisions"] = self._decisions.of(session_id, _TOLD)
        if fetch is not None:
            said["fetch"] = {**asdict(fetch), "due_s": _finite(fetch.due_s - now_s), "ago_s": now_s - fetch.at_s}
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
