"""Erasing the pages of sessions that are gone, as SQL asks for it (`agentstate.fleet.erasures`)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from agentstate.errors import DatabaseError, PageStoreError
from agentstate.fleet import erasures, manifests
from agentstate.fleet.engines import Engine
from agentstate.fleet.erasures import Chain, Erasure, StoreName
from agentstate.fleet.manifests import split_keys
from agentstate.sql.database import Database
from engine_patch.catalog import Catalog

logger = logging.getLogger(__name__)

_POLL_S = 5.0
# Sessions' chains that are erased together, so that an extent which several of them share is written anew once.
_AT_ONCE = 64
_HEADS_AT_ONCE = 500
# How long `close` waits for what has begun.
_PATIENCE_S = 2.0


class Stores(Protocol):
    """What is asked of the stores of a rank."""

    def held(self, keys: Sequence[bytes]) -> list[bool]: ...

    def remove(self, keys: Collection[bytes]) -> None: ...

    def scrub(self, keys: Collection[bytes], stop: Callable[[], bool]) -> bool: ...

    def then(self, action: Callable[[], None]) -> None: ...


@dataclass
class ErasureStats:
    """``waiting`` are the chains of sessions that were to be erased when SQL was asked last; ``done`` counts those that
    have been since the engine started."""

    waiting: int = 0
    done: int = 0


class Eraser:
    """Asks SQL every ``poll_s`` what is to be erased in the stores of a rank, and erases it, on a thread of its own,
    since that takes as long as the drive.

    What is asked for stays in SQL until no file of the stores has it. So it is found by the next poll, or the next
    engine on the stores, whenever this one is interrupted. What a manifest in SQL lists stays, or one in the
    ``catalog`` that waits to be written, and the pages of requests that have ended and are ``unsettled``. Pages are
    removed from the stores on the thread that settles requests, in between two of them. At last, ``shared`` erases them
    in the store that engines share: not before, or they might be published there again.
    """

    def __init__(
        self,
        database: Database,
        engine: Engine,
        stores: Stores,
        catalog: Catalog,
        unsettled: Callable[[], Iterable[bytes]],
        *,
        shared: Callable[[Sequence[Chain]], None] = lambda chains: None,
        poll_s: float = _POLL_S,
    ):
        self.stats = ErasureStats()
        self._database = database
        self._store = StoreName(engine.fingerprint, engine.rank, engine.node)
        self._stores = stores
        self._catalog = catalog
        self._unsettled = unsettled
        self._shared = shared
        self._poll_s = poll_s
        self._closing = threading.Event()
        # Held while pages are removed or scrubbed.
        self._touching = threading.Lock()
        # The session up to which heads are renewed; None when all are.
        self._renewed_to: str | None = ""
        self._said: str | None = None
        self._thread = threading.Thread(target=self._run, name="agentstate-erase", daemon=True)
        self._thread.start()

    def close(self) -> bool:
        """Touch the stores no more; False where that does not end, since the drive does not answer. May be called
        again. A thread that waits for the database ends when that has answered."""
        self._closing.set()
        self._thread.join(_PATIENCE_S)
        if ended := self._touching.acquire(timeout=_PATIENCE_S):
            self._touching.release()
        return ended

    def _run(self) -> None:
        more = True
        while more or not self._closing.wait(self._poll_s):
            if self._closing.is_set():
                return
            try:
                more = self._erase_some()
                self._said = None
            except DatabaseError:
                more = False  # the catalog says so
            except (PageStoreError, OSError) as error:
                more = False
                if str(error) != self._said:
                    logger.warning("agentstate: pages could not be erased, which is tried again: %s", error)
                self._said = str(error)
            except Exception:
                more = False
                logger.exception("agentstate: pages could not be erased, which is tried again")

    def _erase_some(self) -> bool:
        """Erase what waits, at most so much at once; whether there may be more that could be."""
        with self._database.read() as connection:
            found = erasures.waiting(connection, self._store, _AT_ONCE)
            self.stats.waiting = erasures.count(connection, self._store) if found else 0
        if not found:
            return False
        if not self._renew_heads():
            return False
        erased, kept = self._remove(found)
        if erased is None or not self._scrub(erased):
            return False
        if any(self._stores.held(list(erased))):
            # Written again since: for a session, perhaps, which says so by the next time.
            return False
        self._shared([erasure.chain for erasure in found])
        # What waits in this process for SQL may be lost with it, and is asked for again.
        done = [erasure for erasure in found if kept.isdisjoint(split_keys(erasure.chain.keys))]
        with self._database.write() as connection:
            erasures.done(connection, [erasure.id for erasure in done])
        self.stats.done += len(done)
        self.stats.waiting -= len(done)
        if erased:
            logger.info("agentstate: %d pages of sessions that are gone were erased", len(erased))
        return len(found) == len(done) == _AT_ONCE

    def _renew_heads(self) -> bool:
        """Once, before anything is erased: no other engine has the stores any more, of whatever release. Whether it is
        done."""
        while self._renewed_to is not None:
            if self._closing.is_set():
                return False
            with self._database.write() as connection:
                self._renewed_to = manifests.renew_heads(connection, self._store, self._renewed_to, _HEADS_AT_ONCE)
        return True

    def _scrub(self, erased: set[bytes]) -> bool:
        with self._touching:
            return not self._closing.is_set() and self._stores.scrub(erased, self._closing.is_set)

    def _remove(self, found: Sequence[Erasure]) -> tuple[set[bytes] | None, set[bytes]]:
        """Take out of the stores what nothing needs: those pages, None where it was broken off; and those that only
        manifests need which SQL does not have yet."""
        with self._catalog.watching() as watched:
            wanted = set[bytes]()
            with self._database.read() as connection:
                for erasure in found:
                    needed = erasures.needed_pages(connection, self._store, erasure.chain)
                    wanted.update(split_keys(erasure.chain.keys)[needed:])
            outcome: list[set[bytes] | Exception] = []
            over = threading.Event()

            def remove() -> None:
                listed = wanted.intersection(key for manifest in list(watched) for key in manifest.page_keys())
                listed |= wanted.intersection(self._unsettled())
                with self._touching:
                    try:
                        if not self._closing.is_set():
                            self._stores.remove(wanted - listed)
                            outcome.append(listed)
                    except Exception as error:
                        outcome.append(error)
                over.set()

            self._stores.then(remove)
            while not over.wait(0.1):
                if self._closing.is_set():
                    return None, set()
        if not outcome:
            return None, set()
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return wanted - outcome[0], outcome[0]
