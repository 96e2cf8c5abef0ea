"""What is published because the drive is about to evict it, and somebody may come back for it."""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from agentstate.pages import PageStore
from agentstate.pages.eviction import Extent
from agentstate.pages.pins import StoredExtent
from agentstate.tiers.pages import SharedPages
from engine_patch.sharing.context import Context

logger = logging.getLogger(__name__)

# How far ahead what is about to be evicted is published: as much as comes in in so many minutes like the busiest of the
# last ones, or this. In a simulation of bursts that the store takes at 0.6 of their rate, one minute ahead lost 5 % of
# the pages, five 0.4 %.
_AHEAD_MINUTES, _LEAST_AHEAD_BYTES = 5, 256 << 20
_MINUTE_S, _MINUTES = 60.0, 10
# How often it is said that pages are lost.
_SAY_S = 600.0


class Evictions:
    """Does nothing unless it is ``on``. `grown` are the sessions that need what has been published. `again` may be
    called from any thread."""

    def __init__(self, context: Context, *, on: bool):
        self.on = on
        self.grown: set[str] = set()
        self._context = context
        self._inflow = _Inflow(context.clock)
        # By pool: the extents that are published and still to be evicted.
        self._saved: dict[bytes, set[int]] = {}
        self._mutex = threading.Lock()
        # Pages that went from the shared store and may be here.
        self._gone: set[bytes] = set()
        self._evicted_s = -math.inf

    def watch(self, store: PageStore, pages: SharedPages) -> None:
        """Count what the store evicts and ``pages`` do not have."""
        if self.on:
            store.evicted = partial(self._evicted, pages)

    def again(self, keys: Iterable[bytes]) -> None:
        """These are not in the shared store any more. What of them is here is published again, where nobody else would
        see to that."""
        if self.on:
            with self._mutex:
                self._gone.update(keys)

    def forget(self, mark: bytes, number: int) -> None:
        """An extent of a pool's store was not published after all."""
        self._saved.get(mark, set()).discard(number)

    def start_over(self) -> None:
        """What was published may be gone."""
        self._saved.clear()

    def extents(self) -> Iterator[tuple[SharedPages, StoredExtent]]:
        """What is to be published, the next one to be evicted first. Ends early where the caller has paused: what is
        left comes the next time."""
        if not self.on:
            return
        stores = self._context.pools.shared_pages()
        ahead = self._inflow.expected(sum(store.stats.bytes_written + store.stats.bytes_linked for store, _ in stores))
        with self._mutex:
            gone, self._gone = self._gone, set()
        complete = False
        try:
            for store, pages in stores:
                next_ = store.next_evicted(ahead)
                saved = self._saved.setdefault(store.fingerprint, set())
                saved &= {extent.number for extent, _ in next_}
                new = (one for one in next_ if one.extent.number not in saved)
                for extent, sessions in (*store.needed(gone), *new):
                    self.grown |= sessions
                    yield pages, extent
                    saved.add(extent.number)
            complete = True
        finally:
            if not complete:
                self.again(gone)

    def _evicted(self, pages: SharedPages, extent: Extent, keys: Sequence[bytes]) -> None:
        """An extent has been evicted, whether or not it was published: nothing waits for that."""
        lost = pages.stored(keys).count(False) if extent.worth_keeping else 0
        if not lost:
            return
        self._context.stats.evicted += lost
        now_s, before_s = self._context.clock(), self._evicted_s
        self._evicted_s = now_s
        if now_s - before_s > _SAY_S:
            logger.warning(
                "agentstate: pages are evicted before they are published (AGENTSTATE_SHARE=evict): they come in faster "
                "than the shared store takes them, or it does not answer"
            )


class _Inflow:
    """How many bytes may come in before what is published now is there."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._written = 0
        self._minutes = Counter[int]()

    def expected(self, written: int) -> int:
        """``written`` have been in all, as of now."""
        now = int(self._clock() / _MINUTE_S)
        self._minutes[now] += max(0, written - self._written)
        self._written = written
        self._minutes = Counter({at: n_bytes for at, n_bytes in self._minutes.items() if at > now - _MINUTES})
        return max(_LEAST_AHEAD_BYTES, _AHEAD_MINUTES * max(self._minutes.values()))
