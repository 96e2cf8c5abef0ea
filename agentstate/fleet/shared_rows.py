"""A shared store and its rows in SQL, changed together: a row is written after its object, and deleted after it. So
whatever crashes in between, no row tells of what is not there for long, and no object stays of which none tells.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from agentstate.errors import TierDeleting, TierError, TierMissing, TierUnavailable
from agentstate.fleet import extents as catalogue
from agentstate.fleet.extents import SharedExtent
from agentstate.pages import PageKeys
from agentstate.sql.database import Database
from agentstate.tiers import Published, SharedExtents

# How long an object stays that is doomed, and one of which no row tells: longer than any restore, and any publication.
GRACE_S = 3600.0
_BATCH = 256
# For an account's quota nothing goes that was used just now: its manifest may be on its way.
_UNUSED_S = 60.0
_MOST_ROOM = 4096
_MOST_DROPS = 16
# A deletion is sent so soon after its extent was taken, or not at all. It is given up some seconds later
# (`Policy.timeout_s`). What is left of `catalogue.RETAKE_S` is for one that was given up and still arrives.
_SEND_S = 30.0


def _result(future: Future[Any]) -> Any:
    return future.result()


@dataclass(frozen=True)
class SharedRows:
    """The rows in ``database`` of the store with the id ``store`` (`agentstate.fleet.stores`), whose objects are
    ``extents``.

    ``answer`` waits for what the store answers, and gives it or raises it. It may raise something else to end a method
    that waits for a store which hangs: the method can be called again then, here or by others.
    """

    extents: SharedExtents
    store: str
    database: Database
    answer: Callable[[Future[Any]], Any] = _result
    clock: Callable[[], float] = time.monotonic

    def enlist(
        self,
        published: Published,
        keys: PageKeys,
        owner: str,
        writer: str,
        missing: Callable[[int], None] = lambda id: None,
    ) -> int | None:
        """Write the row of what was published: its id; None where the object was deleted meanwhile, or is about to be:
        publish it again later. If the object is not there, ``missing`` is told the id of its row, which may be of
        before. Raises BadExtent if another object has its name, and TierError if the store does not say."""
        with self.database.write() as connection:
            row = catalogue.adopt(connection, self.store, {published.name: published.n_bytes})[published.name]
        try:
            # From the row on, whoever deletes the object has it first; before, somebody may have deleted it.
            self.answer(self.extents.header(published.name, published.n_bytes))
        except TierMissing:
            missing(row)
            return None
        try:
            with self.database.write() as connection:
                listed = catalogue.add(
                    connection,
                    self.store,
                    name=published.name,
                    nbytes=published.n_bytes,
                    owner=owner,
                    writer=writer,
                    keys=keys.packed,
                )
                if listed != row:
                    raise TierDeleting(f"{published.name} was deleted meanwhile")
        except TierDeleting:
            return None
        return row

    def doom_unneeded(self, idle_s: float) -> list[SharedExtent]:
        """Doom some of what nobody has needed for so long; none once there is no more."""
        with self.database.write() as connection:
            unneeded = catalogue.unneeded(connection, self.store, idle_s, _BATCH)
            doomed = catalogue.doom(connection, [extent.id for extent in unneeded], idle_s)
        return [extent for extent in unneeded if extent.id in doomed]

    def make_room(self, owner: str, n_bytes: int, limit: int) -> int:
        """How many bytes an account has, after as many of its extents have been doomed as it takes to have ``n_bytes``
        more within its ``limit``: of those that no manifest lists, the least recently used."""
        with self.database.write() as connection:
            held = catalogue.n_bytes_of(connection, self.store, owner)
            if held + n_bytes <= limit:
                return held
            # A little more, so that it is not asked for with every extent.
            limit -= limit // 16
            unneeded = catalogue.unneeded(connection, self.store, _UNUSED_S, _MOST_ROOM, owner)
            sizes = {extent.id: extent.nbytes for extent in unneeded}
            going, left = [], held
            for id in catalogue.least_recently_used(connection, sizes):
                if left + n_bytes <= limit:
                    break
                going.append(id)
                left -= sizes[id]
            doomed = catalogue.doom(connection, going, _UNUSED_S)
            return held - sum(sizes[id] for id in doomed)

    def delete_doomed(self, doomed_for_s: float = GRACE_S) -> Iterator[str]:
        """Delete what has been doomed for so long, objects first: their names. Raises TierError; what could not be
        deleted is after `catalogue.RETAKE_S`."""
        while True:
            began_s = self.clock()
            with self.database.write() as connection:
                taken = catalogue.take(connection, self.store, doomed_for_s, _MOST_DROPS)
            if self.clock() - began_s > _SEND_S:
                raise TierUnavailable("the database took too long: what is to be deleted may be somebody else's by now")
            drops = {id: self.extents.tier.drop(name) for id, name in taken.names.items()}
            gone: list[int] = []
            failed: TierError | None = None
            for id, drop in drops.items():
                try:
                    self.answer(drop)
                    gone.append(id)
                except TierError as error:
                    failed = error
            with self.database.write() as connection:
                catalogue.forget(connection, gone, taken.at_us)
            yield from (taken.names[id] for id in gone)
            if failed is not None:
                raise failed
            if len(drops) < _MOST_DROPS:
                return

    def unlisted(self, prefix: str = "", older_than_s: float = GRACE_S) -> Iterator[dict[str, int]]:
        """Objects below ``prefix`` (as of `Tier.list`) of which no row tells, of this store or another one, with their
        sizes: their writers died before they wrote it. Raises TierError."""
        after = None
        while True:
            page = self.answer(self.extents.tier.list(prefix, after))
            old = {entry.name: entry.n_bytes for entry in page.entries if entry.age_s > older_than_s}
            with self.database.read() as connection:
                known = catalogue.known(connection, None, old)
            if unknown := {name: n_bytes for name, n_bytes in old.items() if name not in known}:
                yield unknown
            if (after := page.after) is None:
                return

    def doom_unlisted(self, prefix: str = "", older_than_s: float = GRACE_S) -> Iterator[dict[str, int]]:
        """Doom these objects: they go as others do, unless somebody enlists them meanwhile."""
        for objects in self.unlisted(prefix, older_than_s):
            with self.database.write() as connection:
                catalogue.adopt(connection, self.store, objects)
            yield objects

    def sweep(self, older_than_s: float = GRACE_S) -> int:
        """Delete what is half-written and that old: how many. Raises TierError."""
        swept: int = self.answer(self.extents.tier.sweep(older_than_s))
        return swept
