"""What each request found, and what it waited for.

The tokens of a prompt come from the device, from there because they were *fetched* before the request, from the host
tier, from NVMe, or are recomputed; they are counted by what the session had waited for before. Seconds are counted
that a request waited for reads (deferred, or in a forward that waits for pages) and for device memory (queued, while
SGLang found too little of it). The two never overlap, and a request that waits for neither adds nothing.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agentstate.fleet.control import CAUSES, GAPS, TIERS
from engine_patch.restores import Restores

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from engine_patch.restore import Restored

# Sessions of which is known what was fetched for them.
_REMEMBERED = 1024
# Every so many steps, what is kept of requests that were aborted is dropped.
_STEPS = 32


@dataclass(eq=False, slots=True)
class _Request:
    """A request that is queued or has no first token yet. What it waits for is told apart from ``since_s`` on: from
    when it was queued, or its last deferral ended. While it is ``deferred``, that is when its deferral began. Its
    ``fetched`` tokens, from one to another, had been brought to the device before it came. Of what was preloaded for
    it, ``host_tokens`` came from the host tier; ``late_tokens`` are on the device for SGLang, but it waited for them.
    """

    gap: str
    session_id: str | None
    since_s: float
    fetched: tuple[int, int] = (0, 0)
    deferred: bool = False
    counted: bool = False
    host_tokens: int = 0
    late_tokens: int = 0
    reads_s: float = 0.0
    memory_s: float = 0.0


def _hits() -> dict[str, dict[str, dict[str, int]]]:
    return {gap: {tier: {"tokens": 0, "requests": 0} for tier in TIERS} for gap in GAPS}


def _penalties() -> dict[str, dict[str, float]]:
    return {cause: {"seconds": 0.0, "requests": 0} for cause in CAUSES}


@dataclass
class ServedStats:
    """Counters since the engine started. ``hits``: by what was waited for before a request, and by tier, the tokens of
    prompts that came from there, and the requests that took some from there. The last token of a prompt is always
    recomputed, so that ``recomputed`` has every request. ``penalty``: by cause, the seconds that requests waited, and
    those that did."""

    hits: dict[str, dict[str, dict[str, int]]] = field(default_factory=_hits)
    penalty: dict[str, dict[str, float]] = field(default_factory=_penalties)


class Served:
    """For the scheduler's thread; `stats` is read from any. Clocks of ranks differ, and nothing is decided here.

    ``observed`` is told of each request's wait, by its cause. ``restores`` are the newest, of requests that prove a
    session.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.stats = ServedStats()
        self.restores = Restores()
        self.observed: Callable[[str, float], None] = lambda cause, seconds: None
        self._clock = clock
        self._open: dict[str, _Request] = {}
        self._fetched: OrderedDict[str, tuple[int, int]] = OrderedDict()
        # Since when SGLang has found too little memory for whom it tried.
        self._short_s: float | None = None
        self._tried = self._short = False
        self._steps = 0

    def queued(self, rid: str, gap: str, session_id: str | None) -> None:
        """A request is queued, of a session that had waited for ``gap``. One that is queued again, because its restore
        failed, is the same request still."""
        if rid in self._open:
            return
        there = (0, 0) if session_id is None else self._fetched.pop(session_id, (0, 0))
        self._open[rid] = _Request(gap, session_id, self._clock(), there)

    def fetched(self, session_id: str, start: int, end: int) -> None:
        """The tokens from ``start`` to ``end`` of a session's context have been brought to the device."""
        self._fetched.pop(session_id, None)
        self._fetched[session_id] = start, end
        if len(self._fetched) > _REMEMBERED:
            self._fetched.popitem(last=False)

    def deferred(self, rid: str) -> None:
        """The scheduler does not see the request from now on, because pages are on their way that it needs."""
        if (request := self._open.get(rid)) is not None and not request.deferred:
            now_s = self._clock()
            self._end_shortage(request, now_s)
            request.deferred, request.since_s = True, now_s

    def back(self, rid: str, *, host_tokens: int = 0, late_tokens: int = 0) -> None:
        """It sees the request again, for which so many tokens have come from the host tier, and so many by a fetch that
        had begun before it came."""
        if (request := self._open.get(rid)) is not None:
            request.host_tokens += host_tokens
            request.late_tokens += late_tokens
            if request.deferred:
                self._end_deferral(request, self._clock())

    def preloaded(self, rid: str, restored: Restored | None, name: str, page_size: int) -> None:
        """A preload called ``name`` has restored what the request, which has waited for it, begins with."""
        if restored is not None and (request := self._open.get(rid)) is not None:
            self.restores.add(request.session_id, "queued", restored, name, page_size)

    @staticmethod
    def _end_deferral(request: _Request, now_s: float) -> None:
        request.reads_s += now_s - request.since_s
        request.deferred, request.since_s = False, now_s

    def _end_shortage(self, request: _Request, now_s: float) -> None:
        if self._short_s is not None:
            request.memory_s += now_s - max(request.since_s, self._short_s)

    def tried(self, rid: str, *, admitted: bool, short: bool) -> None:
        """SGLang has tried to admit a request; it is ``short`` of memory for this one, or for those after it."""
        self._tried = True
        self._short = self._short or short
        if admitted and (request := self._open.get(rid)) is not None:
            if request.deferred:
                self._end_deferral(request, self._clock())
            elif self._short_s is not None:
                self._end_shortage(request, self._clock())

    def step(self, full: bool) -> None:
        """SGLang has made a batch; while that is ``full``, it tries nobody before one has ended that runs."""
        if self._tried:
            if not self._short:
                self._short_s = None
            elif self._short_s is None:
                self._short_s = self._clock()
            self._tried = self._short = False
        elif not full:
            self._short_s = None

    def stepped(
        self, reqs: Sequence[Req], parts: Sequence[tuple[int, int]], landed: Sequence[Restored], page_size: int
    ) -> None:
        """A forward with prompts is over. Of each request it had so many tokens and computed so many; the forward
        restored ``landed``, for which all of its requests waited."""
        if not self._open:
            return
        waited_s = landed[0].waited_s if landed else 0.0
        for req, (before, new) in zip(reqs, parts, strict=False):
            request = self._open.get(req.rid)
            if request is None or req.discard_output_reason is not None:
                # It runs already, or is recomputed.
                continue
            request.reads_s += waited_s
            if not request.counted:
                request.counted = True
                of_request = landed[0].requests.get(req.rid) if landed else None
                if landed:
                    self.restores.add(request.session_id, "request", landed[0], req.rid, page_size)
                host = 0 if of_request is None else of_request.host_pages * page_size
                self._count(req, request, request.host_tokens + host)
            if before + new >= len(req.origin_input_ids):
                self._conclude(self._open.pop(req.rid))

    def _count(self, req: Any, request: _Request, host: int) -> None:
        if request.session_id is not None:
            # What has come since was too late for this one, and is nothing new to the next.
            self._fetched.pop(request.session_id, None)
        late = min(request.late_tokens, req.cached_tokens_device)
        device = req.cached_tokens_device - late
        stored = req.cached_tokens_host + req.cached_tokens_storage + late
        start, end = request.fetched
        fetched, host = max(0, min(end, device) - start), min(host, stored)
        tokens = {
            "device": device - fetched,
            "fetched": fetched,
            "host": host,
            "nvme": stored - host,
            "recomputed": max(0, len(req.origin_input_ids) - device - stored),
        }
        hits = self.stats.hits[request.gap]
        for tier, count in tokens.items():
            hits[tier]["tokens"] += count
            hits[tier]["requests"] += count > 0

    def _conclude(self, request: _Request) -> None:
        for cause, seconds in (("reads", request.reads_s), ("memory", request.memory_s)):
            if seconds > 0:
                self.stats.penalty[cause]["seconds"] += seconds
                self.stats.penalty[cause]["requests"] += 1
                self.observed(cause, seconds)

    def tidy(self, alive: Callable[[], Collection[str]]) -> None:
        """Drop, every few steps, what is kept of requests that are not ``alive`` any more."""
        self._steps += 1
        if self._open and self._steps % _STEPS == 0:
            rids = alive()
            self._open = {rid: request for rid, request in self._open.items() if rid in rids}

    @property
    def kept(self) -> int:
        """How many requests are looked at."""
        return len(self._open)
