"""What of the sessions is on the device, and what is asked of it from outside of the scheduler: to bring a session
back before its next request, to let go of it first, to store again what the store has lost."""

from __future__ import annotations

import logging
import queue
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from agentstate.errors import EngineError
from engine_patch.linker import AgentStateLinker
from engine_patch.sessions import Progress
from engine_patch.sglang_api import (
    CLIP_MAX_NEW_TOKENS,
    EvictParams,
    InsertParams,
    MatchPrefixParams,
    RadixKey,
    UnifiedRadixCache,
    UnifiedTreeCore,
    get_parallel,
    get_storage_hash_str,
)

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)

# Token ids that are remembered, of the sessions that were used last: 8 bytes each.
_REMEMBERED_TOKENS = 16_000_000
_REMEMBERED_PREFETCHES = 1000


@dataclass
class _Prefetch:
    key: RadixKey
    keys: list[bytes]
    progress: Progress = Progress.RUNNING


@dataclass
class _Arrival:
    """A session's pages on their way to the device: ``slots`` are theirs until the tree has them; ``node`` is where
    they will be attached, locked until then. Requests may wait for them ``until_s``, by the monotonic clock.
    ``asked_of`` is which requests begin with them, by rid."""

    prefetch: _Prefetch
    batch: int
    prefix: torch.Tensor
    slots: torch.Tensor
    node: Any
    lock: Any
    until_s: float
    asked_of: dict[str, bool] = field(default_factory=dict)

    def brings(self, req: Req) -> bool:
        """Whether the request begins with what is on its way."""
        if req.rid not in self.asked_of:
            key = self.prefetch.key
            own = RadixKey(req.origin_input_ids[: len(key)], req.extra_key, cache_salt=req.cache_salt)
            self.asked_of[req.rid] = (own.extra_key, own.cache_salt, list(own.token_ids)) == (
                key.extra_key,
                key.cache_salt,
                list(key.raw_token_ids()),
            )
        return self.asked_of[req.rid]


class DeviceTier:
    """Work on the radix tree, which is done on the scheduler's thread, between two batches, whoever asks for it.

    Sessions are moved neither with tensor parallelism, where the trees of all ranks must change alike and control
    messages reach them at different times, nor for models with more than full attention. ``unlocked`` is called
    whenever device pages have become free or evictable.
    """

    def __init__(self, cache: UnifiedRadixCache, linker: AgentStateLinker, unlocked: Callable[[], None]):
        self._cache = cache
        self._linker = linker
        self._unlocked = unlocked
        self._asked: queue.SimpleQueue[Callable[[Scheduler], None]] = queue.SimpleQueue()
        self._sessions: OrderedDict[str, RadixKey] = OrderedDict()
        self._tokens = 0
        self._arrivals: list[_Arrival] = []
        self._prefetches: OrderedDict[str, _Prefetch] = OrderedDict()
        # Its Rust tree, SGLang's default, lets nobody look at single nodes.
        self._sees_nodes = isinstance(cache.tree_core, UnifiedTreeCore)
        self._alone = get_parallel().tp_size == 1
        self._moves = self._alone and len(cache._components_tuple) == 1

    def run(self, scheduler: Scheduler) -> None:
        """Do what was asked for. Called before the scheduler makes its next batch."""
        while not self._asked.empty():
            try:
                self._asked.get_nowait()(scheduler)
            except Exception:
                logger.exception("agentstate: a request to the device tier failed")
        if self._arrivals:
            self._land()

    @property
    def busy(self) -> bool:
        """Whether pages are on their way to slots that the tree does not have yet."""
        return bool(self._arrivals)

    def brings(self, req: Req) -> bool:
        """Whether what a request begins with is on its way to the device, and may be waited for."""
        now = time.monotonic()
        return any(now < arrival.until_s and arrival.brings(req) for arrival in self._arrivals)

    @contextmanager
    def deferring(self, scheduler: Scheduler) -> Iterator[None]:
        """Within it the scheduler does not see those waiting requests whose pages are on their way: they join what
        brings them, instead of reading the same again."""
        before = scheduler.waiting_queue
        deferred = [req for req in before if self.brings(req)] if self._arrivals else []
        if not deferred:
            yield
            return
        place = {id(req): position for position, req in enumerate(before)}
        deferred_ids = {id(req) for req in deferred}
        scheduler.waiting_queue = [req for req in before if id(req) not in deferred_ids]
        try:
            yield
        finally:
            # What has been queued meanwhile comes last, as it would have.
            queued = [*deferred, *scheduler.waiting_queue]
            scheduler.waiting_queue = sorted(queued, key=lambda req: place.get(id(req), len(before)))

    def remember(self, session_id: str, key: RadixKey) -> None:
        """A request of the session has ended with ``key`` in the tree."""
        self._tokens += len(key) - len(self._sessions.pop(session_id, ()))
        self._sessions[session_id] = key
        while self._tokens > _REMEMBERED_TOKENS and len(self._sessions) > 1:
            self._tokens -= len(self._sessions.popitem(last=False)[1])

    def demote(self, session_id: str) -> None:
        """Make the session's pages the first to be evicted, but for those that another one shares. From any thread.
        Raises EngineError where that cannot be done."""
        if not self._sees_nodes:
            raise EngineError(
                "sessions are demoted in SGLang's Python tree only: start the engine with "
                "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND=python"
            )
        if not self._moves:
            raise EngineError("sessions cannot be demoted with tensor parallelism, or with this model's attention")
        self._asked.put(lambda scheduler: self._demote(self._sessions.get(session_id)))

    def _demote(self, key: RadixKey | None) -> None:
        for node in self._path(key) if key is not None else ():
            if len(node.children) > 1:
                break
            node.last_access_time = 0

    def prefetch(self, session_id: str, keys: list[bytes]) -> Callable[[], Progress] | None:
        """Bring the pages ``keys``, the session's stored chain, into the tree: into memory that is free or that the
        tree may evict and that no running request is going to need, and not at all when that is too little. Tells how
        far that is. From any thread; one that is under way already is gone on with.

        None when it cannot be done: the tree is keyed by token ids, which only a process that has served the session
        has, and the session's newest ones need not be those of ``keys``.
        """
        prefetch = self._prefetches.get(session_id)
        if prefetch is None or prefetch.progress is not Progress.RUNNING or prefetch.keys != keys:
            if (key := self._tokens_of(session_id, keys)) is None:
                return None
            prefetch = self._prefetches[session_id] = _Prefetch(key, keys)
            self._asked.put(lambda scheduler: self._try(prefetch, scheduler))
            while len(self._prefetches) > _REMEMBERED_PREFETCHES:
                self._prefetches.popitem(last=False)
        return lambda: prefetch.progress

    def _tokens_of(self, session_id: str, keys: list[bytes]) -> RadixKey | None:
        """What the tree calls the pages ``keys``. A page's key covers all tokens before it, so that the last one
        tells."""
        page_size = self._cache.page_size
        key = self._sessions.get(session_id) if self._moves else None
        if key is None or len(key) < len(keys) * page_size:
            return None
        key = key[: len(keys) * page_size]
        return key if get_storage_hash_str(key, page_size=page_size)[-1] == keys[-1].hex() else None

    def _try(self, prefetch: _Prefetch, scheduler: Scheduler) -> None:
        try:
            if not self._begin(prefetch, _may_be_needed(scheduler)):
                prefetch.progress = Progress.FAILED
        except Exception:
            prefetch.progress = Progress.FAILED
            raise

    def _begin(self, prefetch: _Prefetch, reserved: int) -> bool:
        """False when there is too little memory without the ``reserved`` tokens of it, or nothing can be restored."""
        cache, page_size = self._cache, self._cache.page_size
        found = cache.match_prefix(MatchPrefixParams(key=prefetch.key))
        missing = prefetch.keys[found.device_prefix_len // page_size :]
        if not missing:
            prefetch.progress = Progress.DONE
            return True
        need = len(missing) * page_size
        allocator = cache.token_to_kv_pool_allocator
        lock = cache.inc_lock_ref(found.last_device_node).to_dec_params()
        slots = None
        try:
            free = allocator.available_size()
            if self._linker.restores and free + cache.evictable_size() >= need + reserved:
                if free < need:
                    cache.evict(EvictParams(num_tokens=need - free))
                slots = allocator.alloc(need)
            if slots is None:
                return False
            root = cache.root_node_handle(prefetch.key.extra_key)
            indices = cache.tree_core.collect_full_device_indices(found.last_device_node, root)
            prefix = indices[: found.device_prefix_len]
            batch = self._linker.preload("a prefetch", missing, slots)
            until_s = time.monotonic() + self._linker.drive_timeout_s
            self._arrivals.append(_Arrival(prefetch, batch, prefix, slots, found.last_device_node, lock, until_s))
            lock = slots = None
        finally:
            if slots is not None:
                allocator.free(slots)
            if lock is not None:
                cache.dec_lock_ref(found.last_device_node, lock)
        return True

    def offer_again(self, key: RadixKey) -> None:
        """Offer those nodes along ``key`` to the store whose pages it had and has lost: evicted or found damaged. In
        SGLang's Python tree only, and without tensor parallelism, where one rank may have lost what others have and
        all must offer alike; elsewhere they are offered again once they have left the device and come back."""
        lost = []
        for node in self._path(key) if self._sees_nodes and self._alone else ():
            if node.external_cache_stored and not self._linker.stored(node.hash_value or ()):
                node.external_cache_stored = False
                lost.append(node.id)
        self._cache.linker.offload_nodes(lost[::-1])

    def _path(self, key: RadixKey) -> Iterator[Any]:
        """The nodes along ``key`` that are on the device, from its end to the root."""
        core = self._cache.tree_core
        found = self._cache.match_prefix(MatchPrefixParams(key=key.page_aligned(self._cache.page_size)))
        node = core.node_by_id(found.last_device_node)
        while node is not core.root_node:
            yield node
            node = node.parent

    def drop_arrivals(self) -> None:
        """Before the device memory is cleared."""
        for arrival in self._arrivals:
            self._linker.finish(arrival.batch)
            arrival.prefetch.progress = Progress.FAILED
        self._arrivals.clear()

    def _land(self) -> None:
        for arrival in [arrival for arrival in self._arrivals if self._linker.landed(arrival.batch)]:
            self._arrivals.remove(arrival)
            if self._linker.finish(arrival.batch).failed:
                self._cache.token_to_kv_pool_allocator.free(arrival.slots)
                arrival.prefetch.progress = Progress.FAILED
            else:
                # The tree frees the slots of what it got from elsewhere in the meantime.
                self._cache.insert(
                    InsertParams(
                        key=arrival.prefetch.key,
                        value=torch.cat([arrival.prefix.to(arrival.slots.dtype), arrival.slots]).to(torch.int64),
                        prev_prefix_len=len(arrival.prefix),
                    )
                )
                arrival.prefetch.progress = Progress.DONE
            self._cache.dec_lock_ref(arrival.node, arrival.lock)
            self._unlocked()


def _may_be_needed(scheduler: Scheduler) -> int:
    """How many more tokens of KV the requests that run may need, of each as much of its answer as SGLang reckons with
    when it admits one."""
    running = {id(req): req for batch in (scheduler.running_batch, scheduler.last_batch) if batch for req in batch.reqs}
    if scheduler.chunked_req is not None:
        running[id(scheduler.chunked_req)] = scheduler.chunked_req
    needed = 0
    for req in running.values():
        if not req.finished():
            answer = len(req.output_ids) + CLIP_MAX_NEW_TOKENS
            whole = len(req.origin_input_ids) + min(req.sampling_params.max_new_tokens, answer)
            needed += max(0, whole - req.kv.kv_allocated_len) + scheduler.page_size
    return needed
