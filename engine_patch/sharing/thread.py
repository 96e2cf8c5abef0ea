"""The thread that shares a rank's pages, and the order in which it does what the other parts can do."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from agentstate.errors import DatabaseError
from agentstate.fleet.engines import Engine
from agentstate.fleet.erasures import Chain
from agentstate.sql.database import Database
from agentstate.tiers import SharedExtents
from engine_patch.sharing.access import Access, Closing
from engine_patch.sharing.allowance import Allowance
from engine_patch.sharing.context import FOLLOW_S, Context, Pools
from engine_patch.sharing.deletions import Deletions
from engine_patch.sharing.evictions import Evictions
from engine_patch.sharing.feed import Feed
from engine_patch.sharing.promises import Promises, Publication
from engine_patch.sharing.publisher import Publisher
from engine_patch.sharing.uploads import Uploads

logger = logging.getLogger(__name__)


class Sharing:
    """One thread a rank, from `start` to `close`. It publishes what it is asked for, and of what is stored everything
    (``through``), or what is about to be evicted (``evict``), or what SQL does not list of the sessions' KV. ``limits``
    gives the accounts that may have only so many bytes in the store. ``writer`` is the rank whose pages these are, if
    it is another than the engine's: that one publishes and deletes, and this one only follows what is published of that
    one's pages.
    """

    def __init__(
        self,
        extents: SharedExtents,
        url: str,
        database: Database,
        pools: Pools,
        engine: Callable[[], Engine],
        *,
        through: bool,
        keep_s: float,
        evict: bool = False,
        limits: Callable[[], Mapping[str, int]] = dict,
        clock: Callable[[], float] = time.monotonic,
        writer: int | None = None,
    ):
        self._context = context = Context(database, pools, engine, clock, writer)
        self.stats = context.stats
        # That there is something to do before the next round is due.
        self._news = threading.Event()
        self._access = Access(extents, url, context)
        self._evictions = Evictions(context, on=evict)
        self._feed = Feed(context, self._access, self._evictions)
        allowance = Allowance(context, self._access, limits)
        self._uploads = Uploads(context, self._access, self._evictions, self._feed, allowance)
        self._promises = Promises(context, self._uploads, self._news)
        self._publisher = Publisher(
            context,
            self._access,
            self._uploads,
            self._promises,
            self._evictions,
            through=through,
            news=self._news,
            meanwhile=self._keep_up,
        )
        self._deletions = Deletions(context, self._access, self._evictions, keep_s, limits)
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="agentstate-share", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End, whether or not the store answers. What is not published yet the next engine publishes that is asked for
        it."""
        self._access.close()
        self._news.set()
        if self._thread.is_alive():
            self._thread.join()

    def publish(self, session_id: str, keys: Sequence[bytes]) -> Publication:
        """Publish a session's stored chain, unless it is, and have SQL say so: what tells how far that is."""
        return self._promises.publish(session_id, keys)

    def note(self, session_id: str, keys: Sequence[bytes]) -> None:
        """Have SQL say of a session's stored chain that it is published, which it seems to be."""
        self._promises.note(session_id, keys)

    def refused(self, publication: Publication) -> str | None:
        """Why a chain is not published for now, if that is not for the store to end."""
        return self._access.refusal or publication.refused

    def erase(self, chains: Sequence[Chain]) -> None:
        """Delete the extents that have pages of these chains which no session's KV needs, on whatever node. Of sessions
        that need other pages in them, SQL says no more that they are here: they are published again from where they are
        stored."""
        self._deletions.erase(chains)

    def round(self) -> None:
        """What the thread does again and again. Raises DatabaseError; the next one goes on."""
        self._news.clear()
        erased = self._deletions.erased()
        self._access.identify()
        if self._access.rows is None:
            return
        self._follow()
        if not self._context.writes:
            return
        if not self._access.identified:
            # What is erased SQL is told, though the store does not answer.
            self._deletions.erase_of_others()
            return
        self._publisher.publish()
        self._publisher.publish_behind()
        if self._uploads.over:
            self._deletions.erase_again(erased)
        self._promises.tell()
        self._deletions.erase_of_others()
        self._deletions.delete_erased()
        self._deletions.collect()

    def _follow(self) -> None:
        self._publisher.take(self._feed.follow())

    def _keep_up(self) -> None:
        """Much may have to be published. Meanwhile others' pages are found, and what is there is promised."""
        if self._feed.due:
            self._uploads.enlist()
            self._follow()
            self._promises.tell()

    def _run(self) -> None:
        while not self._access.closing:
            try:
                self.round()
                if self._failing:
                    logger.info("agentstate: the database answers again; the shared store is followed")
                self._failing = False
            except Closing:
                return
            except Exception as error:
                if not isinstance(error, DatabaseError):
                    logger.exception("agentstate: the shared store could not be followed")
                elif not self._failing:
                    logger.warning("agentstate: what is in the shared store is not followed for now: %s", error)
                self._failing = True
            if not self._access.closing:
                self._news.wait(FOLLOW_S)
