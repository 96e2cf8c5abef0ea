"""Long restores beside running requests. A forward that restores layer by layer takes as long as the drive does, and
every request of the engine waits for it. A request with much to restore is therefore deferred while others run: the
scheduler does not see it until its pages have been preloaded, and then finds them on the device. An engine with nothing
else to do restores layer by layer, at once. What a shared store has is preloaded even then: another machine's answer
may take any time, and no forward is to wait for one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentstate.pages import DEMAND
from engine_patch.linker import AgentStateLinker
from engine_patch.order import Order
from engine_patch.preloads import Preload, Preloads, common_pages
from engine_patch.served import Served
from engine_patch.sessions import Progress
from engine_patch.sglang_api import CLIP_MAX_NEW_TOKENS, MatchPrefixParams, RadixKey, UnifiedRadixCache

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler

# How often a request is deferred before it is admitted as it is: once for what another one brings, once for what it
# then still misses.
_MOST = 2


@dataclass(frozen=True)
class StoredHit:
    """What a request can restore: the pages ``keys``, after ``device_tokens`` that are on the device. ``key`` covers
    both. Some of them only the ``shared`` store has. The same on all ranks."""

    key: RadixKey
    device_tokens: int
    keys: Sequence[bytes]
    shared: bool = False


@dataclass(eq=False)
class _Queued:
    """What is known of a queued request: once it is ``matched``, what it can restore (``hit``), also if that is
    ``long``; the preload that it is ``deferred`` for, and how often it has been; whether it ``follows`` a request whose
    pages are about to enter the tree; whether it found too little memory (``short``)."""

    matched: bool = False
    hit: StoredHit | None = None
    long: StoredHit | None = None
    deferred: Preload | None = None
    follows: bool = False
    times: int = 0
    short: bool = False


class Deferrals:
    """Decides which queued requests the scheduler does not see. All ranks decide from the same: the queue, the tree,
    its memory, and what `Preloads` has agreed on.

    ``match`` tells what a request can restore, and ``held_up`` whether so many tokens of the device cannot be had yet.
    With ``preload_bytes`` 0, and for a model with recurrent states, nothing is preloaded for requests, be it of a
    shared store; they join what is under way for others all the same.
    """

    def __init__(
        self,
        cache: UnifiedRadixCache,
        linker: AgentStateLinker,
        preloads: Preloads,
        match: Callable[[Req], StoredHit | None],
        order: Order,
        served: Served,
        held_up: Callable[[int], bool],
    ):
        self._cache = cache
        self._held_up = held_up
        self._served = served
        self._linker = linker
        self._preloads = preloads
        self._match = match
        self._order = order
        self._least_bytes = linker.preload_bytes if preloads.possible else 0
        self._queued: dict[str, _Queued] = {}

    @property
    def shares(self) -> bool:
        """Whether requests are deferred for what a shared store has, also while none runs."""
        return self.on and self._linker.shares

    @property
    def on(self) -> bool:
        """Whether requests are deferred for long restores of their own."""
        return self._least_bytes > 0

    def brings(self, req: Req) -> bool:
        """Whether the request begins with everything that some preload brings."""
        return any(preload.brings(req) for preload in self._preloads)

    def queueing(self, req: Req) -> None:
        """A request is being queued, perhaps again: forget what was known of it."""
        self._queued.pop(req.rid, None)

    def matched(self, req: Req, hit: StoredHit | None) -> bool:
        """A request that is being queued can restore ``hit``. Returns whether that is long."""
        self._queued[req.rid] = known = _Queued(True, hit, self._if_long(hit))
        return known.long is not None

    def begin(self, scheduler: Scheduler, entering: Collection[StoredHit] = ()) -> None:
        """Defer the requests that join a preload, and those for which one can begin because there is memory that
        nothing before them in the `Order` needs: behind a request that finds too little, no other gets any. The last
        batch has restored what is ``entering`` the tree."""
        queue = scheduler.waiting_queue
        self._queued = {req.rid: known for req in queue if (known := self._queued.get(req.rid)) is not None}
        for req in queue:
            if (known := self._queued.get(req.rid)) is not None and known.deferred is not None:
                self._go_on(req, known)
        if not queue:
            return
        self._follow(queue, entering)
        runs = any(True for _ in running(scheduler))
        starts = self.on and (runs or self.shares)
        if not starts and not self._preloads:
            return
        reserved = needed_by_running(scheduler)
        for req in self._order.ranked(queue, scheduler.policy):
            known = self._queued.setdefault(req.rid, _Queued())
            if known.deferred is None and not known.follows and known.times < _MOST:
                if starts and not known.matched:
                    self._look(req, known)
                known.deferred = self._joined(req, known.long)
                if starts and known.deferred is None and known.long is not None and (runs or known.long.shared):
                    starts = self._start(req, known, known.long, reserved)
                if known.deferred is not None:
                    self._served.deferred(req.rid)
            reserved += max(0, _whole(req) - (0 if known.deferred is None else len(known.deferred.key)))

    def _look(self, req: Req, known: _Queued) -> None:
        known.matched, known.hit = True, self._match(req)
        known.long = self._if_long(known.hit)

    def _follow(self, queue: Sequence[Req], entering: Collection[StoredHit]) -> None:
        """Defer, for this step, the requests that would restore for the most part what others have just restored:
        SGLang makes a batch before the tree has the pages of the one before."""
        for req in queue:
            if (known := self._queued.get(req.rid)) is not None and known.follows:
                known.follows, known.matched, known.hit, known.long = False, False, None, None
                self._order.forget(req)
                self._served.back(req.rid)
        for other in entering:
            for req in queue:
                known = self._queued.setdefault(req.rid, _Queued())
                if known.deferred is None and not known.matched:
                    self._look(req, known)
                if known.deferred is None and not known.follows and (hit := known.hit) is not None:
                    first, others_first = (one.device_tokens // self._cache.page_size for one in (hit, other))
                    if 2 * common_pages(hit.keys, first, other.keys, others_first) >= len(hit.keys):
                        known.follows = True
                        self._served.deferred(req.rid)
                        self._linker.preload_stats.followed += 1

    def _go_on(self, req: Req, known: _Queued) -> None:
        """If the preload that a request is deferred for is over, have the request matched again."""
        preload = known.deferred
        if preload is None or preload.progress is Progress.RUNNING:
            return
        known.deferred, known.matched, known.hit, known.long, known.short = None, False, None, None, False
        self._order.forget(req)
        known.times += 1
        done, page_size = preload.progress is Progress.DONE, self._cache.page_size
        late = len(preload.keys) * page_size if done and not preload.restores else 0
        if done:
            self._served.preloaded(req.rid, preload.restored, preload.name, page_size)
        self._served.back(req.rid, host_tokens=preload.host_pages * page_size if done else 0, late_tokens=late)
        if done and preload.restores:
            self._linker.preload_stats.requests += 1
            # For its report of cached tokens: these are from storage, although it finds them on the device.
            start = len(preload.key) - len(preload.keys) * page_size
            if req.storage_hit_start is None or start < req.storage_hit_start:
                req.storage_hit_start = start
            req.storage_hit_length = len(preload.key) - req.storage_hit_start

    def _joined(self, req: Req, hit: StoredHit | None) -> Preload | None:
        """The preload that a request joins: one whose pages the request all begins with, or one that brings a part of
        what it misses that is long by itself. Of windows those before its end are brought alone: with these, who goes
        on from elsewhere finds nothing of it."""
        page_size = self._cache.page_size
        for preload in self._preloads:
            common = 0
            if hit is not None and not self._linker.window_pages:
                common = preload.common(hit.keys, hit.device_tokens // page_size, page_size)
            if preload.brings(req) or (common and self._linker.n_bytes(common) >= self._least_bytes):
                self._preloads.hasten(preload, DEMAND)
                return preload
        return None

    def _start(self, req: Req, known: _Queued, hit: StoredHit, reserved: int) -> bool:
        """Begin to preload what a request misses; False if there is too little memory for that yet."""
        if self._held_up(len(hit.keys) * self._cache.page_size):
            return False
        rest = _whole(req) - len(hit.key)
        if self._preloads.fits(len(hit.keys), reserved + rest):
            found = self._cache.match_prefix(MatchPrefixParams(key=hit.key))
            if found.device_prefix_len != hit.device_tokens:
                # The tree has changed since then.
                self._look(req, known)
                if (anew := known.long) is None:
                    return True
                hit = anew
                rest = _whole(req) - len(hit.key)
                found = self._cache.match_prefix(MatchPrefixParams(key=hit.key))
            known.deferred = self._preloads.start(req.rid, hit.key, found, hit.keys, reserved + rest, restores=True)
        if known.deferred is None and not known.short:
            known.short = True
            if self._linker.reads_ahead:
                self._linker.read_ahead(req.rid, hit.keys)
        return known.deferred is not None

    def _if_long(self, hit: StoredHit | None) -> StoredHit | None:
        if hit is None or not self.on:
            return None
        return hit if hit.shared or self._linker.n_bytes(len(hit.keys)) >= self._least_bytes else None

    @contextmanager
    def deferring(self, scheduler: Scheduler) -> Iterator[None]:
        """A context within which the scheduler does not see the deferred requests."""
        before = scheduler.waiting_queue
        known = [self._queued.get(req.rid, _Queued()) for req in before]
        deferred = [req for req, of in zip(before, known, strict=True) if of.deferred is not None or of.follows]
        self._linker.preload_stats.deferred = sum(of.deferred is not None for of in known)
        if not deferred:
            yield
            return
        place = {id(req): position for position, req in enumerate(before)}
        deferred_ids = {id(req) for req in deferred}
        scheduler.waiting_queue = [req for req in before if id(req) not in deferred_ids]
        try:
            yield
        finally:
            # Requests queued meanwhile come last, as they would have.
            queued = [*deferred, *scheduler.waiting_queue]
            scheduler.waiting_queue = sorted(queued, key=lambda req: place.get(id(req), len(before)))

    @property
    def kept(self) -> int:
        """How many queued requests something is known of."""
        return len(self._queued)

    def forget(self) -> None:
        """Forget everything that was known: the device memory is cleared."""
        self._queued.clear()


def running(scheduler: Scheduler) -> Iterator[Req]:
    """The requests that run and have not ended, each once."""
    batches = (scheduler.running_batch, scheduler.last_batch)
    reqs = {id(req): req for batch in batches if batch for req in batch.reqs}
    if scheduler.chunked_req is not None:
        reqs[id(scheduler.chunked_req)] = scheduler.chunked_req
    return (req for req in reqs.values() if not req.finished())


def needed_by_running(scheduler: Scheduler) -> int:
    """How many more tokens of KV the running requests may need, counting as much of each answer as SGLang counts when
    it admits a request."""
    return sum(max(0, _whole(req) - req.kv.kv_allocated_len) + scheduler.page_size for req in running(scheduler))


def _whole(req: Req) -> int:
    """How many tokens of KV a request may have in the end, counting as much of its answer as SGLang counts."""
    answer = len(req.output_ids) + CLIP_MAX_NEW_TOKENS
    return len(req.origin_input_ids) + min(req.sampling_params.max_new_tokens, answer)
