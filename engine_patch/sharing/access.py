"""The shared store as a rank reaches it: whose it is, what it answers, and when it is asked again after a failure."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from concurrent import futures
from concurrent.futures import Future
from typing import Any

from agentstate.errors import TierError, TierForeign
from agentstate.fleet import stores
from agentstate.fleet.shared_rows import SharedRows
from agentstate.tiers import SharedExtents
from engine_patch.sharing.context import Context

logger = logging.getLogger(__name__)

# How long nothing is published after something could not be.
PAUSE_S = 5.0
# How often a store is asked again that is not this installation's.
_REFUSED_S = 60.0


class Closing(Exception):
    """Nobody waits for the store any more."""


class Access:
    """``url`` says where the store is.

    `rows` is None while nobody knows which store it is: nothing of it is used. It is another object whenever that has
    become known anew. Until it is `identified`, the store has not said who it is, and may not be there; SQL may know
    all the same. `refusal` says why the store is not used, if it is another installation's. After `close`, from any
    thread, whatever waits for the store raises `Closing`.
    """

    def __init__(self, extents: SharedExtents, url: str, context: Context):
        self.extents = extents
        self.rows: SharedRows | None = None
        self.identified = False
        self.refusal: str | None = None
        self.closing = False
        self._url = url
        self._context = context
        self._identify_s = -math.inf
        self._paused_until_s = 0.0
        self._closed: Future[None] = Future()

    @property
    def available(self) -> bool:
        return self.extents.tier.available

    @property
    def paused(self) -> bool:
        """Whether the store has failed a moment ago."""
        return self._context.clock() < self._paused_until_s

    def identify(self) -> None:
        """Ask the store who it is, until it has said so. Raises DatabaseError."""
        clock, database = self._context.clock, self._context.database
        if self.identified or clock() < self._identify_s:
            return
        try:
            store = stores.identify(database, self.extents.tier, self._url, self.result)
        except TierForeign as error:
            if self.refusal is None:
                logger.error("agentstate: the shared store is not used: %s", error)
            self.refusal = str(error)
            self.rows, self._identify_s = None, clock() + _REFUSED_S
            for _, pages in self._context.pools.shared_pages():
                pages.leave(pages.ids())
            return
        except TierError as error:
            self.failed(error)
            self._identify_s = self._paused_until_s
            if self.refusal is not None:
                return
            with database.read() as connection:
                known = stores.known(connection, self._url)
            if known is None:
                return
            store = known
        else:
            if self.refusal is not None:
                logger.info("agentstate: the shared store is this installation's now")
            self.identified, self.refusal = True, None
        if self.rows is None or self.rows.store != store:
            self.rows = SharedRows(self.extents, store, database, self.result)

    def failed(self, error: Exception) -> None:
        """Count it, and pause. The guard has said what is wrong with the store, once."""
        self._context.stats.failed += 1
        self._paused_until_s = self._context.clock() + PAUSE_S
        logger.debug("agentstate: an extent could not be published: %s", error)

    def result(self, future: Future[Any]) -> Any:
        """What the store answers. Raises what it raises."""
        self.first_of([future])
        return future.result()

    def first_of(self, pending: Collection[Future[Any]]) -> set[Future[Any]]:
        """Wait until some of these are done: which are."""
        done, _ = futures.wait([*pending, self._closed], return_when=futures.FIRST_COMPLETED)
        if self.closing:
            for future in pending:
                future.cancel()
            raise Closing
        return done

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            self._closed.set_result(None)
