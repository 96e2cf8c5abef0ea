"""What has changed in the catalogue, and with it what is found in the shared store."""

from __future__ import annotations

import logging
import math
import weakref
from typing import NamedTuple

from agentstate.fleet import extents as catalogue
from agentstate.fleet import manifests
from agentstate.fleet.manifests import split_keys
from agentstate.fleet.shared_rows import SharedRows
from agentstate.pages import PageKeys
from agentstate.tiers.pages import Listed, SharedPages
from engine_patch.sharing.access import Access
from engine_patch.sharing.context import BATCH, FOLLOW_S, OVERLAP_US, Context
from engine_patch.sharing.evictions import Evictions

logger = logging.getLogger(__name__)

# How often the catalogue is read as a whole.
WHOLE_S = 600.0


class News(NamedTuple):
    """Whether all of the catalogue was read ``anew``, and whether something has ``left`` the store since the last
    time."""

    anew: bool
    left: bool


class Feed:
    """What `follow` has not got to because SQL did not answer the next one does."""

    def __init__(self, context: Context, access: Access, evictions: Evictions):
        self._context, self._access, self._evictions = context, access, evictions
        # Of which rows is told; until when of all; and, by what is known of a pool, until when of those that changed.
        self._rows: SharedRows | None = None
        self._whole_s = self._followed_s = -math.inf
        self._since_us = weakref.WeakKeyDictionary[SharedPages, int]()
        self._left = False
        # The ids of what was asked for and is not there, of which SQL has not been told.
        self._missing: set[int] = set()

    @property
    def due(self) -> bool:
        return self._context.clock() - self._followed_s >= FOLLOW_S

    def follow(self) -> News:
        """Enter what others have published, and leave what is doomed. Raises DatabaseError."""
        now_s = self._followed_s = self._context.clock()
        anew = self._rows is not self._access.rows or now_s - self._whole_s > WHOLE_S
        for store, pages in self._context.pools.shared_pages():
            if anew:
                pages.again()
            self._evictions.watch(store, pages)
            self._follow(store.fingerprint.hex(), pages, anew)
            # A mount that is not there is empty.
            if (missing := pages.take_missing()) and self._access.identified:
                logger.warning("agentstate: %d extent(s) are missing in the shared store", len(missing))
                self._missing.update(missing)
        if self._missing:
            self._left = True
            self._doom_missing()
        left, self._left = self._left, False
        if anew:
            self._rows, self._whole_s = self._access.rows, self._context.clock()
        return News(anew, left)

    def _follow(self, fingerprint: str, pages: SharedPages, anew: bool) -> None:
        known = pages.ids()
        since_us = 0 if anew else self._since_us.get(pages, 0)
        with self._context.database.read() as connection:
            store, shard = self._access.rows.store, self._context.shard
            changes = catalogue.changed(connection, store, fingerprint, shard, since_us)
            new = [change.id for change in changes if not change.doomed and change.id not in known]
            for first in range(0, len(new), BATCH):
                pages.enter(map(_listed, catalogue.load(connection, new[first : first + BATCH])))
        if used := pages.take_used():
            with self._context.database.write() as connection:
                catalogue.used(connection, used)
        gone = known & {change.id for change in changes if change.doomed}
        if anew:
            gone |= known - {change.id for change in changes}
        if gone:
            self._left = True
            if self._evictions.on:
                self._evictions.again(pages.keys_in(gone))
        pages.leave(gone)
        pages.followed = True
        newest = max((change.changed_us for change in changes), default=since_us)
        self._since_us[pages] = max(0, newest - OVERLAP_US)

    def miss(self, id: int) -> None:
        """The object of a row is not there. The row may be of before, and some session's KV promised in it. Raises
        DatabaseError; then SQL is told later."""
        self._missing.add(id)
        self._doom_missing()

    def _doom_missing(self) -> None:
        """Nobody looks for what is missing any more, and who has it publishes it again."""
        engine, rank = self._context.engine(), self._context.rank
        with self._context.database.write() as connection:
            catalogue.doom(connection, self._missing)
            keys = {key for lost in catalogue.load(connection, self._missing) for key in split_keys(lost.keys)}
            manifests.unshare_listing(connection, engine.fingerprint, rank, keys)
        for _, pages in self._context.pools.shared_pages():
            # One that is published again is found again.
            pages.leave(self._missing)
        self._missing.clear()
        self._evictions.again(keys)


def _listed(extent: catalogue.SharedExtent) -> Listed:
    return Listed(extent.id, extent.name, extent.nbytes, extent.owner, PageKeys(extent.keys))
