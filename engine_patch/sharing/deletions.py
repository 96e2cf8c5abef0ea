"""What leaves the shared store: what is erased, at once, and what nobody needs, in its time."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence

from sqlalchemy.engine import Connection

from agentstate.errors import TierError
from agentstate.fleet import erasures, manifests
from agentstate.fleet import extents as catalogue
from agentstate.fleet.erasures import Chain
from agentstate.fleet.manifests import split_keys
from agentstate.fleet.shared_rows import GRACE_S
from agentstate.pages import PageKeys
from engine_patch.sharing.access import Access
from engine_patch.sharing.context import BATCH, OVERLAP_US, Context
from engine_patch.sharing.evictions import Evictions

_COLLECT_S = 600.0
# What is erased goes as soon as all engines have been told, whoever reads it.
ERASE_S, MARGIN_S = 5.0, 1.0


class Deletions:
    """`erase` may be called from any thread. ``keep_s`` is how long stays what nobody needs, and ``limits`` gives the
    accounts that may have only so many bytes."""

    def __init__(
        self,
        context: Context,
        access: Access,
        evictions: Evictions,
        keep_s: float,
        limits: Callable[[], Mapping[str, int]],
    ):
        self._context, self._access, self._evictions = context, access, evictions
        self._keep_s, self._limits = keep_s, limits
        self._mutex = threading.Lock()
        # What has been erased while more of it may have been on its way to the store; when the latest was, and when
        # something of that is to be deleted.
        self._erased: list[Chain] = []
        self._erased_s, self._erase_s = -math.inf, math.inf
        # When what could not be deleted may be taken again.
        self._retake_s = math.inf
        # Of what others are to erase: up to which id all was, and what was of those after it.
        self._erased_to = 0
        self._erased_lately: set[int] = set()
        self._collected_s = context.clock()

    def erase(self, chains: Sequence[Chain]) -> None:
        """Doom the extents that have pages of these chains which no session's KV needs, on whatever node. Of sessions
        that need other pages in them, SQL says no more that they are here: they are published again from where they are
        stored. Raises DatabaseError."""
        if self._access.refusal is not None:
            return  # nothing of theirs is there
        with self._mutex:
            self._erased += chains
        self._erase(chains)

    def erased(self) -> list[Chain]:
        """What has been erased and is to be `erase_again`."""
        with self._mutex:
            return list(self._erased)

    def erase_again(self, chains: Sequence[Chain]) -> None:
        """Erase what was on its way to the store when these were `erased`, once that is in SQL. Raises
        DatabaseError."""
        if chains:
            self._erase(chains)
            with self._mutex:
                del self._erased[: len(chains)]

    def _erase(self, chains: Sequence[Chain]) -> None:
        keys = {key for chain in chains for key in split_keys(chain.keys)}
        for _, pages in self._context.pools.shared_pages():
            if held := pages.holding(keys):
                with self._context.database.write() as connection:
                    # Whoever promises meanwhile that one of them stays has done so before, or waits and is refused.
                    there = catalogue.used(connection, held)
                    doomed = set[int]()
                    for chain in chains:
                        doomed |= self._erased_with(connection, chain, {id: held[id] for id in there})
                    catalogue.doom(connection, doomed)
                pages.leave(doomed | (held.keys() - there))
                self._evictions.again(key for id in doomed for key in held[id])
                if doomed:
                    with self._mutex:
                        self._erased_s = self._context.clock()
                        self._erase_s = min(self._erase_s, self._erased_s + ERASE_S)

    def _erased_with(self, connection: Connection, chain: Chain, held: Mapping[int, PageKeys]) -> set[int]:
        """Which extents go with a chain."""
        store, own = self._context.store, split_keys(chain.keys)
        needed = erasures.needed_anywhere(connection, store, chain)
        page_of = {key: chain.first + page for page, key in enumerate(own)}
        erased = set(own[needed:])
        going = set[int]()
        first: int | None = None
        for id, keys in held.items():
            if erased.isdisjoint(keys):
                continue
            going.add(id)
            # Its pages are of one chain, in order. Those that are needed come before those that are not.
            slot, page = next((slot, page_of[key]) for slot, key in enumerate(keys) if key in page_of)
            if slot or page < chain.first + needed:
                first = min(page - slot, page if first is None else first)
        if first is not None:
            manifests.unshare(connection, store.fingerprint, store.rank, chain, max(0, first))
        return going

    def erase_of_others(self) -> None:
        """Erase what other nodes are to erase. They do so themselves, but for one that is gone for good. Raises
        DatabaseError."""
        database = self._context.database
        with database.read() as connection:
            told = erasures.elsewhere(connection, self._context.store, self._erased_to)
        new = [one.id for one in told if one.id not in self._erased_lately]
        for first in range(0, len(new), BATCH):
            if self._access.closing:
                return
            some = new[first : first + BATCH]
            with database.read() as connection:
                found = erasures.load(connection, some)
            self.erase([erasure.chain for erasure in found])
            self._erased_lately.update(some)
        since_us = max((one.created_us for one in told), default=0) - OVERLAP_US
        self._erased_to = max((one.id for one in told if one.created_us < since_us), default=self._erased_to)
        self._erased_lately = {id for id in self._erased_lately if id > self._erased_to}

    def delete_erased(self) -> None:
        """All that is doomed goes: of what was not erased, whoever reads it recomputes it. Raises `Closing` and
        DatabaseError."""
        now_s = self._context.clock()
        # By the database's clock, it may have been doomed a moment later.
        if now_s < min(self._erase_s, self._retake_s) + MARGIN_S or not self._access.available:
            return
        retake_s, self._retake_s = self._retake_s, math.inf
        if not self._delete(ERASE_S):
            self._retake_s = now_s + catalogue.RETAKE_S
        elif now_s < retake_s + MARGIN_S:
            self._retake_s = retake_s
        with self._mutex:
            next_s = self._erased_s + ERASE_S
            self._erase_s = next_s if next_s + MARGIN_S > now_s else math.inf

    def collect(self) -> None:
        """Now and then, delete what nobody needs. Several ranks may do so at once. Raises `Closing` and
        DatabaseError."""
        now_s, rows = self._context.clock(), self._access.rows
        if now_s - self._collected_s < _COLLECT_S or not self._access.available:
            return
        self._collected_s = now_s
        rows.doom_unneeded(self._keep_s)
        for owner, limit in self._limits().items():
            rows.make_room(owner, 0, limit)
        try:
            self._delete(GRACE_S)
            for store, _ in self._context.pools.shared_pages():
                for _ in rows.doom_unlisted(f"{store.fingerprint.hex()}/{self._context.shard}", GRACE_S):
                    pass
            rows.sweep(GRACE_S)
        except TierError as error:
            self._access.failed(error)

    def _delete(self, after_s: float) -> bool:
        """Delete what has been doomed for so long: whether all of it is deleted."""
        try:
            for _ in self._access.rows.delete_doomed(after_s):
                self._context.stats.deleted += 1
        except TierError as error:
            self._access.failed(error)
            return False
        return True
