"""Which extents are published, in which order."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator

from agentstate.pages.pins import StoredExtent
from agentstate.tiers.pages import SharedPages
from engine_patch.sharing.access import Access
from engine_patch.sharing.context import Context
from engine_patch.sharing.evictions import Evictions
from engine_patch.sharing.feed import News
from engine_patch.sharing.promises import Promises
from engine_patch.sharing.uploads import Uploads

# What was stored before is published for as long as this, an extent at a time, and then nothing of it for as long as
# that took.
BEHIND_S = 1.0


class Publisher:
    """It publishes what is wanted of sessions, what is about to be evicted, and, with ``through``, all that is stored.
    What was stored before comes last. ``meanwhile`` is called while much has to be published; ``news`` says that there
    is more to do than what was stored before."""

    def __init__(
        self,
        context: Context,
        access: Access,
        uploads: Uploads,
        promises: Promises,
        evictions: Evictions,
        *,
        through: bool,
        news: threading.Event,
        meanwhile: Callable[[], None],
    ):
        self._context, self._access, self._uploads = context, access, uploads
        self._promises, self._evictions = promises, evictions
        self._through, self._news, self._meanwhile = through, news, meanwhile
        self._rest_until_s = -math.inf
        # By pool: what has been seen of its store, and what was there before and is to be seen still.
        self._seen: dict[bytes, int] = {}
        self._before: dict[bytes, list[StoredExtent]] = {}

    def take(self, news: News) -> None:
        """What the catalogue says has changed: publish again what may be gone."""
        if news.anew:
            self._uploads.start_over()
        if (news.anew or news.left) and self._context.writes:
            self._evictions.start_over()
            if not self._evictions.on:
                # Otherwise it is published in its own time.
                self._promises.look_behind()

    def publish(self) -> None:
        """Raises `Closing` and DatabaseError."""
        self._uploads.enlist()
        if self._access.paused:
            return
        try:
            for pages, extent in self._candidates():
                self._uploads.send(pages, extent)
                while self._uploads.full:
                    self._uploads.wait()
                    self._meanwhile()
                if self._stops:
                    return
        finally:
            self._uploads.finish()
        self._promises.note_grown(self._evictions.grown)

    @property
    def _stops(self) -> bool:
        return self._access.closing or self._access.paused

    def _candidates(self) -> Iterator[tuple[SharedPages, StoredExtent]]:
        """A session's chain comes from its head on. What is not taken comes again."""
        for keys in self._promises.wanted():
            yield from self._context.unpublished(keys)
        yield from self._evictions.extents()
        if not self._through:
            return
        for store, pages in self._context.pools.shared_pages():
            mark = store.fingerprint
            if mark not in self._seen:
                self._before[mark] = store.extents()
                self._seen[mark] = max((extent.number for extent in self._before[mark]), default=0)
            if (again := self._uploads.take_again(mark)) is not None:
                self._seen[mark] = min(self._seen[mark], again - 1)
            for extent in store.extents(self._seen[mark]):
                yield pages, extent
                self._seen[mark] = extent.number

    def publish_behind(self) -> None:
        """Publish of what was stored before: what a process before this one has not published, or has had no reason to,
        what found no room among those that wait, and what went with something that was erased. It may be all that a big
        drive has: nothing new waits for more than one extent of it, and it takes half of the time of one upload at the
        most. Raises `Closing` and DatabaseError."""
        began_s = self._context.clock()
        if began_s < self._rest_until_s or self._access.paused:
            return
        for pages, extent in self._stored_before():
            self._uploads.send(pages, extent)
            self._uploads.finish()
            if self._news.is_set() or self._stops or self._context.clock() - began_s >= BEHIND_S:
                break
        self._rest_until_s = 2 * self._context.clock() - began_s

    def _stored_before(self) -> Iterator[tuple[SharedPages, StoredExtent]]:
        for keys in self._promises.behind():
            yield from self._context.unpublished(keys)
        for store, pages in self._context.pools.shared_pages():
            before = self._before.get(store.fingerprint, [])
            while before:
                yield pages, before[-1]
                before.pop()
