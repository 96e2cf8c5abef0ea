"""Write-behind of pages: while one extent goes to the disk, the next is filled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue

import numpy as np

from agentstate.pages.backends import staging_memory
from agentstate.pages.extent import ALIGNMENT, ExtentDraft, align
from agentstate.pages.store import PageStore

# One being filled and one being written keep both the processor and the disk busy.
_DRAFTS = 2


class Writer:
    """Extents of at most ``pages_an_extent`` pages, published by a thread in the order in which they were filled.

    ``staging_bytes`` of memory, ``staging``, are taken at once and kept; an extent is as large as half of them allow.
    Every method may be called from any thread except that of `after`.
    """

    def __init__(self, store: PageStore, staging_bytes: int):
        self._store = store
        pages, block = store.pages_within(staging_bytes // _DRAFTS), store.geometry.block_pages
        # Whole blocks, if one fits: a short last one costs as much to verify as a whole one.
        self.pages_an_extent = pages - pages % block if pages > block else pages
        # An owner's name may shift the pages of an extent.
        size = align(store.draft_bytes(self.pages_an_extent)) + ALIGNMENT
        self.staging = staging_memory(_DRAFTS * size)
        self._free: SimpleQueue[np.ndarray] = SimpleQueue()
        for start in range(0, len(self.staging), size):
            self._free.put(self.staging[start : start + size])
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="agentstate-publish")

    @contextmanager
    def memory(self) -> Iterator[np.ndarray]:
        """Borrow the memory of one extent; waits until there is some."""
        memory = self._free.get()
        try:
            yield memory
        finally:
            self._free.put(memory)

    def write(self, keys: Sequence[bytes], fill: Callable[[ExtentDraft], None], owner: str = "") -> Future[None]:
        """Let ``fill`` fill an extent of ``keys``, at most ``pages_an_extent`` of them, whose bytes are charged to
        ``owner``, and begin to publish it. The future is done when `PageStore.publish` is.

        Raises what ``fill`` raises, and PageStoreFull, before ``fill`` is called, if there is no room for the extent.
        """
        memory = self._free.get()
        try:
            self._store.require_room(self._store.draft_bytes(len(keys), owner), owner)
            draft = self._store.draft(list(keys), memory, owner)
            fill(draft)
            draft.seal()
        except BaseException:
            self._free.put(memory)
            raise

        def publish() -> None:
            try:
                self._store.publish(draft)
            finally:
                self._free.put(memory)

        return self._publisher.submit(publish)

    def after(self, action: Callable[[], None]) -> Future[None]:
        """Run ``action`` once everything written so far is published, or has failed."""
        return self._publisher.submit(action)

    @property
    def in_use(self) -> int:
        """How many extents are being filled, or have been and are not published yet."""
        return _DRAFTS - self._free.qsize()

    def close(self) -> None:
        """Publish what was written."""
        self._publisher.shutdown()
