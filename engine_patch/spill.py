"""Write-behind of pages, device → staging → extent, in the order in which the tree offered them."""

from __future__ import annotations

import logging
import mmap
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from agentstate.errors import PageStoreFull
from agentstate.pages import PageStore
from engine_patch.transfer import DevicePages

logger = logging.getLogger(__name__)


@dataclass
class SpillStats:
    """Counters since the engine started. ``pages_known`` were offered again and not written again."""

    pages_spilled: int = 0
    bytes_spilled: int = 0
    pages_known: int = 0
    pages_failed: int = 0


@dataclass
class _Offer:
    keys: list[bytes]
    numbers: torch.Tensor
    ready: Sequence[torch.cuda.Event]


class Spiller:
    """One thread that stores what `offer` queues. A page is written once: keys already stored are skipped, when their
    turn comes, so that an earlier offer of the same page counts.

    Every offer gets one entry in ``results``, in the order of the offers, never earlier: the tree takes a result for
    its oldest offer, and unlocks that one's device pages. The copy out of the device is bounded by ``staging_bytes``.
    """

    def __init__(self, store: PageStore, pages: DevicePages, staging_bytes: int):
        self.stats = SpillStats()
        self.results: deque[bool] = deque()
        self._store = store
        self._pages = pages
        self._pages_a_draft = store.pages_within(staging_bytes)
        self._buffer = mmap.mmap(-1, store.draft_bytes(self._pages_a_draft))
        self._queue: queue.Queue[_Offer | Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="agentstate-spill", daemon=True)
        self._thread.start()

    def offer(self, keys: list[bytes], numbers: torch.Tensor, ready: Sequence[torch.cuda.Event] = ()) -> None:
        """Queue pages for writing: ``numbers`` are their page numbers on the device, which the caller keeps unchanged
        until the result is in. ``ready`` are the events after which the device pages may be read."""
        self._queue.put(_Offer(keys, numbers, ready))

    def then(self, action: Callable[[], None]) -> None:
        """Run ``action`` on the spilling thread once everything offered so far is stored or has failed."""
        self._queue.put(action)

    @property
    def waiting(self) -> int:
        """Offers and actions that are queued or being worked on."""
        return self._queue.unfinished_tasks

    def drain(self) -> None:
        """Wait until everything queued so far is done."""
        self._queue.join()

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                if isinstance(item, _Offer):
                    self.results.append(self._store_offer(item))
                else:
                    item()
            except Exception as error:
                if isinstance(error, PageStoreFull):
                    logger.warning("agentstate: %s; they are recomputed when they are needed", error)
                else:
                    logger.exception("agentstate: spilling failed; the pages are recomputed when they are needed")
                if isinstance(item, _Offer):
                    self.results.append(False)
            finally:
                self._queue.task_done()
        self._queue.task_done()

    def _store_offer(self, offer: _Offer) -> bool:
        new = [i for i, key in enumerate(offer.keys) if key not in self._store]
        self.stats.pages_known += len(offer.keys) - len(new)
        if not new:
            return True
        for event in offer.ready:
            event.synchronize()
        try:
            while new:
                run, rest = new[: self._pages_a_draft], new[self._pages_a_draft :]
                draft = self._store.draft([offer.keys[i] for i in run], self._buffer)
                numbers = offer.numbers[run]
                for layer in range(draft.geometry.layers):
                    components = range(len(draft.geometry.component_bytes))
                    self._pages.gather(layer, numbers, [draft.component(layer, c) for c in components])
                self._store.publish(draft)
                self.stats.pages_spilled += len(run)
                self.stats.bytes_spilled += len(run) * draft.geometry.page_bytes
                new = rest
        finally:
            self.stats.pages_failed += len(new)
        return True
