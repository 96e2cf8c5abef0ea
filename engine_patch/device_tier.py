"""What of the sessions is on the device, and what is asked of it from outside of the scheduler: to bring a session
back before its next request, to let go of it first, to store again what the store has lost."""

from __future__ import annotations

import logging
import queue
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

import torch

from agentstate.errors import EngineError
from engine_patch.sglang_api import (
    EvictParams,
    InsertParams,
    MatchPrefixParams,
    RadixKey,
    UnifiedTreeCore,
    get_parallel,
)

if TYPE_CHECKING:
    from engine_patch.radix_cache import AgentStateRadixCache

logger = logging.getLogger(__name__)

# Token ids that are remembered, of the sessions that were used last: 8 bytes each.
_REMEMBERED_TOKENS = 16_000_000
_REMEMBERED_PREFETCHES = 1000
_POLL_S = 0.001


class Progress(Enum):
    """How far a prefetch is. It fails when a page cannot be used, or when there is not enough device memory."""

    RUNNING = auto()
    DONE = auto()
    FAILED = auto()


@dataclass
class _Prefetch:
    keys: list[bytes]
    progress: Progress = Progress.RUNNING


@dataclass
class _Arrival:
    """A session's pages on their way to the device: ``slots`` are theirs until the tree has them; ``node`` is where
    they will be attached, locked until then."""

    prefetch: _Prefetch
    key: RadixKey
    batch: int
    prefix: torch.Tensor
    slots: torch.Tensor
    node: Any
    lock: Any


class DeviceTier:
    """Work on the radix tree, which is done on the scheduler's thread, between two batches, whoever asks for it.

    Sessions are moved neither with tensor parallelism, where the trees of all ranks must change alike and control
    messages reach them at different times, nor for models with more than full attention.
    """

    def __init__(self, cache: AgentStateRadixCache):
        self._cache = cache
        self._linker = cache.linker.cache_linker
        self._asked: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._sessions: OrderedDict[str, RadixKey] = OrderedDict()
        self._tokens = 0
        self._arrivals: list[_Arrival] = []
        self._prefetches: OrderedDict[str, _Prefetch] = OrderedDict()
        # Its Rust tree, SGLang's default, lets nobody look at single nodes.
        self._sees_nodes = isinstance(cache.tree_core, UnifiedTreeCore)
        self._moves = get_parallel().tp_size == 1 and len(cache._components_tuple) == 1

    def run(self) -> None:
        """Do what was asked for. Called before the scheduler makes its next batch."""
        while not self._asked.empty():
            try:
                self._asked.get_nowait()()
            except Exception:
                logger.exception("agentstate: a request to the device tier failed")
        if self._arrivals:
            self._land()

    def settle(self) -> None:
        """Wait for what is on its way. Called when there is no next batch: an idle SGLang counts its memory, and ends
        when some is neither free nor in the tree."""
        while self._arrivals:
            self._land()
            time.sleep(_POLL_S)

    def remember(self, session_id: str, key: RadixKey) -> None:
        """A request of the session has ended with ``key`` in the tree."""
        self._tokens += len(key) - len(self._sessions.pop(session_id, ()))
        self._sessions[session_id] = key
        while self._tokens > _REMEMBERED_TOKENS and len(self._sessions) > 1:
            self._tokens -= len(self._sessions.popitem(last=False)[1])

    def knows(self, session_id: str) -> bool:
        """Whether `prefetch` can do anything for a session: the tree is keyed by token ids, which only a process that
        has served the session has."""
        return self._moves and session_id in self._sessions

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
        self._asked.put(lambda: self._demote(self._sessions.get(session_id)))

    def _demote(self, key: RadixKey | None) -> None:
        for node in self._path(key) if key is not None else ():
            if len(node.children) > 1:
                break
            node.last_access_time = 0

    def prefetch(self, session_id: str, keys: list[bytes]) -> Callable[[], Progress]:
        """Bring the pages ``keys``, the session's stored chain, into the tree: into memory that is free or that the
        tree may evict, and not at all when that is too little. Tells how far that is. From any thread; one that is
        under way already is gone on with."""
        prefetch = self._prefetches.get(session_id)
        if prefetch is None or prefetch.progress is not Progress.RUNNING or prefetch.keys != keys:
            prefetch = self._prefetches[session_id] = _Prefetch(keys)
            self._asked.put(lambda: self._begin(prefetch, self._sessions.get(session_id)))
            while len(self._prefetches) > _REMEMBERED_PREFETCHES:
                self._prefetches.popitem(last=False)
        return lambda: prefetch.progress

    def _begin(self, prefetch: _Prefetch, key: RadixKey | None) -> None:
        keys = prefetch.keys
        cache, page_size = self._cache, self._cache.page_size
        if key is None:
            prefetch.progress = Progress.FAILED
            return
        whole = key[: len(keys) * page_size]
        found = cache.match_prefix(MatchPrefixParams(key=whole))
        missing = keys[found.device_prefix_len // page_size :]
        if not missing:
            prefetch.progress = Progress.DONE
            return
        need = len(missing) * page_size
        lock = cache.inc_lock_ref(found.last_device_node).to_dec_params()
        allocator = cache.token_to_kv_pool_allocator
        if (short := need - allocator.available_size()) > 0:
            cache.evict(EvictParams(num_tokens=short))
        slots = allocator.alloc(need) if allocator.available_size() >= need else None
        if slots is None:
            cache.dec_lock_ref(found.last_device_node, lock)
            prefetch.progress = Progress.FAILED
            return
        batch = self._linker.load_ahead("a prefetch", missing, slots)
        root = cache.root_node_handle(whole.extra_key)
        prefix = cache.tree_core.collect_full_device_indices(found.last_device_node, root)[: found.device_prefix_len]
        self._arrivals.append(_Arrival(prefetch, whole, batch, prefix, slots, found.last_device_node, lock))

    def offer_again(self, key: RadixKey) -> None:
        """Offer those nodes along ``key`` to the store whose pages it had and has lost: evicted or found damaged. In
        SGLang's Python tree only; elsewhere they are offered again once they have left the device and come back."""
        lost = []
        for node in self._path(key) if self._sees_nodes else ():
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
                        key=arrival.key,
                        value=torch.cat([arrival.prefix.to(arrival.slots.dtype), arrival.slots]).to(torch.int64),
                        prev_prefix_len=len(arrival.prefix),
                    )
                )
                arrival.prefetch.progress = Progress.DONE
            self._cache.dec_lock_ref(arrival.node, arrival.lock)
