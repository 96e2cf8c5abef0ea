"""Sessions that are brought back to the device before their next request, whoever asks for that."""

from __future__ import annotations

import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentstate.pages import PLANNED, Need
from engine_patch.deferrals import needed_by_running
from engine_patch.linker import AgentStateLinker
from engine_patch.preloads import Preload, Preloads
from engine_patch.sessions import Progress
from engine_patch.sglang_api import (
    MatchPrefixParams,
    RadixKey,
    UnifiedRadixCache,
    get_parallel,
    get_storage_hash_str,
)

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)

# How many token ids of the most recently used sessions are remembered, 8 bytes each.
_REMEMBERED_TOKENS = 16_000_000


@dataclass
class _Prefetch:
    session_id: str
    key: RadixKey
    keys: list[bytes]
    need: Need
    start: int = 0
    preload: Preload | None = None
    settled: Progress = Progress.RUNNING

    @property
    def progress(self) -> Progress:
        return self.settled if self.preload is None else self.preload.progress


class DeviceTier:
    """Work on the radix tree. Whoever asks for it, it is done on the scheduler's thread, between two batches.

    It ``moves`` sessions neither with tensor parallelism, where the trees of all ranks must change alike and control
    messages reach them at different times, nor for models with more than full attention. ``brought`` is told of each
    session that has been brought, with its key in the tree and the number of the first token that was not there before.
    """

    def __init__(
        self,
        cache: UnifiedRadixCache,
        linker: AgentStateLinker,
        preloads: Preloads,
        brought: Callable[[str, RadixKey, int], None] = lambda session_id, key, start: None,
    ):
        self._cache = cache
        self._brought = brought
        # Those that have begun.
        self._begun: list[_Prefetch] = []
        self._linker = linker
        self._preloads = preloads
        self._asked: queue.SimpleQueue[Callable[[Scheduler], None]] = queue.SimpleQueue()
        self._sessions: OrderedDict[str, RadixKey] = OrderedDict()
        self._tokens = 0
        self._prefetches: dict[str, _Prefetch] = {}
        self._prefetching = threading.Lock()
        self.moves = get_parallel().attn_tp_size == 1 and len(cache._components_tuple) == 1

    def run(self, scheduler: Scheduler) -> None:
        """Do what was asked for. Called before the scheduler makes its next batch, and before `land`."""
        for _ in range(self._asked.qsize()):
            try:
                self._asked.get_nowait()(scheduler)
            except Exception:
                logger.exception("agentstate: a request to the device tier failed")

    def land(self) -> None:
        """Tell what has been brought, once preloads have landed: before anyone else comes who finds it there."""
        over = [prefetch for prefetch in self._begun if prefetch.progress is not Progress.RUNNING]
        self._begun = [prefetch for prefetch in self._begun if prefetch.progress is Progress.RUNNING]
        for prefetch in over:
            if prefetch.progress is Progress.DONE:
                self._brought(prefetch.session_id, prefetch.key, prefetch.start)

    def remember(self, session_id: str, key: RadixKey) -> None:
        """A request of the session has ended with ``key`` in the tree."""
        self._tokens += len(key) - len(self._sessions.pop(session_id, ()))
        self._sessions[session_id] = key
        while self._tokens > _REMEMBERED_TOKENS and len(self._sessions) > 1:
            self._tokens -= len(self._sessions.popitem(last=False)[1])

    def tokens(self, session_id: str) -> int:
        """How many tokens the session's context has, 0 if none of its requests has ended here lately."""
        return len(self._sessions.get(session_id, ()))

    def prefetch(self, session_id: str, keys: list[bytes], need: Need = PLANNED) -> Callable[[], Progress] | None:
        """Bring the pages ``keys``, the session's stored chain, into the tree. They take memory that is free or
        evictable, and that no running request is going to need; if there is too little, none are brought. Returns what
        tells the progress. From any thread; a prefetch that is under way already continues, and what another one is
        bringing is waited for.

        Returns None if it cannot be done: the tree is keyed by token ids, which only a process that has served the
        session has, and the session's newest ones need not be those of ``keys``.
        """
        self.kept()  # forgets those that have ended, with their token ids
        prefetch = self._prefetches.get(session_id)
        if prefetch is None or prefetch.progress is not Progress.RUNNING or prefetch.keys != keys:
            if (key := self._tokens_of(session_id, keys)) is None:
                return None
            prefetch = _Prefetch(session_id, key, keys, need)
            with self._prefetching:
                self._prefetches[session_id] = prefetch
            self._asked.put(lambda scheduler: self._try(prefetch, scheduler))
        else:
            self._asked.put(lambda scheduler: self._hasten(prefetch, need))
        return lambda: prefetch.progress

    def kept(self) -> dict[str, int]:
        """What has been asked for and has not been done. From any thread."""
        with self._prefetching:
            self._prefetches = {
                session_id: prefetch
                for session_id, prefetch in self._prefetches.items()
                if prefetch.progress is Progress.RUNNING
            }
            return {"tree_tasks": self._asked.qsize(), "device_prefetches": len(self._prefetches)}

    def _tokens_of(self, session_id: str, keys: list[bytes]) -> RadixKey | None:
        """The tree's key of the pages ``keys``. A page's key covers all tokens before it, so comparing the last one is
        enough."""
        page_size = self._cache.page_size
        key = self._sessions.get(session_id) if self.moves else None
        if key is None or len(key) < len(keys) * page_size:
            return None
        key = key[: len(keys) * page_size]
        return key if get_storage_hash_str(key, page_size=page_size)[-1] == keys[-1].hex() else None

    def _hasten(self, prefetch: _Prefetch, need: Need) -> None:
        prefetch.need = min(prefetch.need, need)
        if prefetch.preload is not None:
            self._preloads.hasten(prefetch.preload, need)

    def _try(self, prefetch: _Prefetch, scheduler: Scheduler) -> None:
        page_size = self._cache.page_size
        shared = [preload for preload in self._preloads if preload.common(prefetch.keys, 0, page_size)]
        if shared:
            for preload in shared:
                self._preloads.hasten(preload, prefetch.need)
            self._asked.put(lambda scheduler: self._try(prefetch, scheduler))
            return
        try:
            prefetch.settled = self._begin(prefetch, needed_by_running(scheduler))
        except Exception:
            prefetch.settled = Progress.FAILED
            raise
        self._begun.append(prefetch)

    def _begin(self, prefetch: _Prefetch, reserved: int) -> Progress:
        """Begin a prefetch. It fails if there is too little memory besides the ``reserved`` tokens, or nothing can be
        restored."""
        found = self._cache.match_prefix(MatchPrefixParams(key=prefetch.key))
        prefetch.start = found.device_prefix_len
        missing = prefetch.keys[found.device_prefix_len // self._cache.page_size :]
        if not missing:
            return Progress.DONE
        if self._linker.restores:
            prefetch.preload = self._preloads.start("a prefetch", prefetch.key, found, missing, reserved, prefetch.need)
        return Progress.FAILED if prefetch.preload is None else Progress.RUNNING
