"""Sessions that are brought back to the device before their next request, whoever asks for that."""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from agentstate.pages import PLANNED, Need
from engine_patch.deferrals import needed_by_running
from engine_patch.linker import AgentStateLinker
from engine_patch.preloads import Preload, Preloads
from engine_patch.ranks import Ranks
from engine_patch.restores import Restores
from engine_patch.sessions import Progress
from engine_patch.sglang_api import (
    MatchPrefixParams,
    RadixKey,
    UnifiedRadixCache,
    get_storage_hash_str,
)

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)

# How many token ids of the most recently used sessions are remembered, 8 bytes each.
_REMEMBERED_TOKENS = 16_000_000
# Several ranks agree on prefetches once in so many steps: until then, who begins one is not heard by the others.
_STEPS = 8
# How often the first rank says what it begins before it gives up: another one may store its pages a little later.
_TRIES = 32
# How long another rank waits for the first one to begin what it has been asked for itself.
_PATIENCE_S = 30.0


@dataclass(eq=False)
class _Prefetch:
    session_id: str
    key: RadixKey
    keys: list[bytes]
    need: Need
    asked_s: float = 0.0
    tries: int = 0
    start: int = 0
    preload: Preload | None = None
    settled: Progress = Progress.RUNNING

    @property
    def progress(self) -> Progress:
        return self.settled if self.preload is None else self.preload.progress


class _Proposal(NamedTuple):
    """What the first rank would begin, in numbers that all ranks understand: so many ``pages`` of a session, of which
    the last one is known by the beginning of its key. Without pages it is nothing."""

    session: int = 0
    pages: int = 0
    last: int = 0

    @classmethod
    def of(cls, prefetch: _Prefetch) -> _Proposal:
        return cls(_number(hashlib.sha256(prefetch.session_id.encode()).digest()), len(prefetch.keys), _last(prefetch))


class DeviceTier:
    """Work on the radix tree. Whoever asks for it, it is done on the scheduler's thread, between two batches.

    It ``moves`` sessions unless the model keeps what cannot be preloaded. ``brought`` is told of each session that has
    been brought, with its key in the tree and the number of the first token that was not there before; ``restores``
    notes what that took.

    Messages reach ranks at different times, and their trees must change alike. So the first rank says once in a while
    what it would begin, in the order in which it was asked, and all begin it, or none: each has to know the session's
    tokens and to have its pages stored.
    """

    def __init__(
        self,
        cache: UnifiedRadixCache,
        linker: AgentStateLinker,
        preloads: Preloads,
        ranks: Ranks,
        brought: Callable[[str, RadixKey, int], None] = lambda session_id, key, start: None,
        restores: Restores | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._cache = cache
        self._brought = brought
        self._restores = restores or Restores()
        # Those that have begun.
        self._begun: list[_Prefetch] = []
        self._linker = linker
        self._preloads = preloads
        self._ranks = ranks
        self._clock = clock
        self._steps = 0
        # With several ranks: on the first one what it has been asked for and has not begun, on the others all of that.
        self._waiting: list[_Prefetch] = []
        self._asked: queue.SimpleQueue[Callable[[Scheduler], None]] = queue.SimpleQueue()
        self._sessions: OrderedDict[str, RadixKey] = OrderedDict()
        self._tokens = 0
        self._prefetches: dict[str, _Prefetch] = {}
        self._prefetching = threading.Lock()
        self.moves = preloads.possible

    def run(self, scheduler: Scheduler) -> None:
        """Do what was asked for. Called at every step, before the scheduler makes its next batch, and before `land`."""
        for _ in range(self._asked.qsize()):
            self._do(self._asked.get_nowait(), scheduler)
        self._steps += 1
        if not self._ranks.alone and self.moves and self._steps % _STEPS == 0:
            self._begin_together(scheduler)

    def _do(self, act: Callable[[Scheduler], None], scheduler: Scheduler) -> None:
        try:
            act(scheduler)
        except Exception:
            logger.exception("agentstate: a request to the device tier failed")

    def land(self) -> None:
        """Tell what has been brought, once preloads have landed: before anyone else comes who finds it there."""
        over = [prefetch for prefetch in self._begun if prefetch.progress is not Progress.RUNNING]
        self._begun = [prefetch for prefetch in self._begun if prefetch.progress is Progress.RUNNING]
        for prefetch in over:
            if prefetch.progress is Progress.DONE:
                if (preload := prefetch.preload) is not None and preload.restored is not None:
                    self._restores.add(
                        prefetch.session_id, "prefetch", preload.restored, preload.name, self._cache.page_size
                    )
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
            prefetch = _Prefetch(session_id, key, keys, need, self._clock())
            with self._prefetching:
                self._prefetches[session_id] = prefetch
            begin = self._try if self._ranks.alone else self._wait
            self._asked.put(lambda scheduler: begin(prefetch, scheduler))
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
        key = self._key_of(session_id, len(keys)) if self.moves else None
        if key is None:
            return None
        return key if get_storage_hash_str(key, page_size=page_size)[-1] == keys[-1].hex() else None

    def _key_of(self, session_id: str, pages: int) -> RadixKey | None:
        """The first ``pages`` of the session's newest tokens; None if there are fewer."""
        key, tokens = self._sessions.get(session_id), pages * self._cache.page_size
        return None if key is None or len(key) < tokens else key[:tokens]

    def _hasten(self, prefetch: _Prefetch, need: Need) -> None:
        prefetch.need = min(prefetch.need, need)
        if prefetch.preload is not None:
            self._preloads.hasten(prefetch.preload, need)

    def _try(self, prefetch: _Prefetch, scheduler: Scheduler) -> None:
        if self._waits_for_others(prefetch):
            self._asked.put(lambda scheduler: self._try(prefetch, scheduler))
        else:
            self._start(prefetch, scheduler)

    def _waits_for_others(self, prefetch: _Prefetch) -> bool:
        """Whether others bring part of its pages, which are as urgent as it is then."""
        shared = [one for one in self._preloads if one.common(prefetch.keys, 0, self._cache.page_size)]
        for preload in shared:
            self._preloads.hasten(preload, prefetch.need)
        return bool(shared)

    def _start(self, prefetch: _Prefetch, scheduler: Scheduler) -> None:
        try:
            prefetch.settled = self._begin(prefetch, needed_by_running(scheduler))
        except Exception:
            prefetch.settled = Progress.FAILED
            raise
        self._begun.append(prefetch)

    def _wait(self, prefetch: _Prefetch, scheduler: Scheduler) -> None:
        if prefetch.progress is Progress.RUNNING and prefetch.preload is None:
            self._waiting.append(prefetch)

    def _begin_together(self, scheduler: Scheduler) -> None:
        """Begin what the first rank is to begin next, on all ranks or on none."""
        if not self._ranks.decides:
            self._settle_waiting()
        mine = next((one for one in self._waiting if not self._waits_for_others(one)), None)
        proposal = _Proposal() if mine is None or not self._ranks.decides else _Proposal.of(mine)
        proposal = _Proposal(*self._ranks.of_first(proposal, len(proposal)))
        if not proposal.pages:
            return
        prefetch = mine if self._ranks.decides else self._proposed(proposal)
        (together,) = self._ranks.on_all([prefetch is not None and self._is_stored(prefetch)])
        if prefetch is None:
            return
        if together:
            if prefetch in self._waiting:
                self._waiting.remove(prefetch)
            else:
                # Who is asked for it from now on goes on with it.
                with self._prefetching:
                    self._prefetches[prefetch.session_id] = prefetch
            self._do(partial(self._start, prefetch), scheduler)
        elif self._ranks.decides:
            # Others are tried before it is tried again.
            self._waiting.remove(prefetch)
            prefetch.tries += 1
            if prefetch.tries < _TRIES:
                self._waiting.append(prefetch)
            else:
                prefetch.settled = Progress.FAILED

    def _settle_waiting(self) -> None:
        """Conclude what this rank has been asked for: it is there once the first one has been asked for it as well."""
        for prefetch in list(self._waiting):
            there, _, _ = self._cache.tree_core.match_full_device_prefix(prefetch.key)
            if there >= len(prefetch.key) and not self._waits_for_others(prefetch):
                prefetch.settled = Progress.DONE
            elif self._clock() >= prefetch.asked_s + _PATIENCE_S:
                prefetch.settled = Progress.FAILED
            else:
                continue
            self._waiting.remove(prefetch)

    def _proposed(self, proposal: _Proposal) -> _Prefetch | None:
        """What the first rank would begin; None where this one does not know its tokens."""
        for prefetch in self._waiting:
            if _Proposal.of(prefetch) == proposal:
                return prefetch
        names = (name for name in self._sessions if _number(hashlib.sha256(name.encode()).digest()) == proposal.session)
        if (session_id := next(names, None)) is None or (key := self._key_of(session_id, proposal.pages)) is None:
            return None
        keys = [bytes.fromhex(one) for one in get_storage_hash_str(key, page_size=self._cache.page_size)]
        prefetch = _Prefetch(session_id, key, keys, PLANNED)
        return prefetch if _last(prefetch) == proposal.last else None

    def _is_stored(self, prefetch: _Prefetch) -> bool:
        """Whether this rank can restore what it misses. It looks without a trace: not all ranks do."""
        there, _, _ = self._cache.tree_core.match_full_device_prefix(prefetch.key)
        missing = prefetch.keys[there // self._cache.page_size :]
        return not missing or (self._linker.restores and self._linker.can_restore(missing))

    def _begin(self, prefetch: _Prefetch, reserved: int) -> Progress:
        """Begin a prefetch. It fails if there is too little memory besides the ``reserved`` tokens, or nothing can be
        restored."""
        found = self._cache.match_prefix(MatchPrefixParams(key=prefetch.key))
        prefetch.start = found.device_prefix_len
        missing = prefetch.keys[found.device_prefix_len // self._cache.page_size :]
        if not missing:
            return Progress.DONE
        # What several ranks have agreed on all of them begin: one whose drive does not answer by now fails it for all.
        if self._linker.restores or not self._ranks.alone:
            prefetch.preload = self._preloads.start("a prefetch", prefetch.key, found, missing, reserved, prefetch.need)
        return Progress.FAILED if prefetch.preload is None else Progress.RUNNING


def _number(digest: bytes) -> int:
    """The beginning of a digest, as a number that all ranks can tell each other."""
    return int.from_bytes(digest[:7], "big")


def _last(prefetch: _Prefetch) -> int:
    return _number(prefetch.keys[-1])
