"""Room for pages: one budget for all stores of a rank, and what other engines have left below the same root."""

from __future__ import annotations

import itertools
import logging
import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from agentstate.errors import OwnerFull, PageStoreFull
from agentstate.pages.eviction import WITHIN, EvictionOrder, Extent
from agentstate.pages.node import node_id
from agentstate.pages.siblings import Lacking, Siblings
from agentstate.pages.wear import Wear, file_of

logger = logging.getLogger(__name__)

MAKE_ROOM = "make room on its disk, or raise AGENTSTATE_PAGES_QUOTA"
# What is charged to nobody is said to be of this owner.
NOBODY = "none"
# How many owners are told of by their names.
_MOST_OWNERS = 64
# At most such a part of the room is looked ahead, and so many extents: nothing is written meanwhile.
_PART, _MOST_AHEAD = 8, 1024
# How many bytes each owner may hold, by its name; None: as many as there is room for.
Limits = Callable[[str], int | None]


class Quota(NamedTuple):
    """How much may be held: ``max_bytes`` of extents (None: no limit of its own), and never so much that less than
    ``free_fraction`` (0 to 1) of the file system is free."""

    max_bytes: int | None = None
    free_fraction: float = 0.0


UNLIMITED = Quota()


@dataclass
class StoreStats:
    """Counters since open, but for ``pages``, ``extents`` and ``bytes``, which are what is stored now.

    ``pages_evicted_needed`` are those of ``pages_evicted`` that a live manifest needed; ``pages_vanished`` were lost
    because their files were deleted or replaced by somebody else; ``pages_erased`` were removed to be erased.
    ``pages_linked`` were not written here: their extents are another store's too.
    """

    pages: int = 0
    extents: int = 0
    bytes: int = 0
    pages_written: int = 0
    bytes_written: int = 0
    pages_linked: int = 0
    bytes_linked: int = 0
    pages_dropped: int = 0
    pages_evicted: int = 0
    pages_evicted_needed: int = 0
    pages_vanished: int = 0
    pages_erased: int = 0
    bad_extents: int = 0


@dataclass(frozen=True)
class Owners:
    """The bytes of the owners that have most, by their names, and what all ``others`` have together."""

    owners: dict[str, int]
    others: int
    others_bytes: int


def largest(held: Mapping[str, int]) -> Owners:
    """The owners that have most of what is ``held``, 64 at most."""
    ranked = sorted(
        ((n_bytes, name) for name, n_bytes in held.items() if n_bytes > 0), key=lambda one: (-one[0], one[1])
    )
    shown, rest = ranked[:_MOST_OWNERS], ranked[_MOST_OWNERS:]
    return Owners({name or NOBODY: n_bytes for n_bytes, name in shown}, len(rest), sum(n_bytes for n_bytes, _ in rest))


class Store(Protocol):
    """What a space needs of the stores that share it; `PageStore` says more of each."""

    directory: Path
    stats: StoreStats

    def evictable(self, extent: Extent) -> bool: ...

    def evictable_bytes(self) -> int: ...

    def pinned_bytes(self, owner: str) -> int: ...

    def retained_bytes(self, owner: str | None) -> int: ...

    def take(self, extent: Extent) -> bool: ...

    def put_back(self, extent: Extent) -> None: ...

    def evict(self, victims: list[Extent], *, recycle: bool = False) -> Path | None: ...


class Space:
    """The room that the stores of one rank share: one quota and one order of eviction for all of them.

    With ``root``, whose id is ``node``, the stores that other engines left below it, and below the roots ``left``, are
    evicted before anything of these stores (`Siblings`). Rank ``rank`` of ``ranks`` counts its part of them. Never
    evicted are ``kin``, the directories of this engine's own stores, of all ranks and pools: they may not be open yet.

    ``limits`` are those of owners. An owner gives of its own before more of it is stored than its limit, and where room
    is lacking, what owners have beyond their limits goes before anything else. They may be replaced at any time, by a
    function that answers the same every time. ``writes_per_day`` is the budget of `wear`.
    """

    def __init__(
        self,
        quota: Quota = UNLIMITED,
        root: Path | None = None,
        *,
        kin: Collection[Path] = (),
        left: Collection[Path] = (),
        rank: int = 0,
        ranks: int = 1,
        limits: Limits | None = None,
        writes_per_day: int | None = None,
    ):
        self.quota = quota
        self.wear = Wear(None if root is None else file_of(root, rank), writes_per_day)
        self.limits = limits
        self._root = root
        self.node = "" if root is None else node_id(root)
        # Held while an index changes or room is made, in whichever store: that may take as long as the disk does.
        self.lock = threading.Lock()
        self._order = EvictionOrder()
        self._stores: list[Store] = []
        self._held: Counter[str] = Counter()
        # What follows is kept up to date with the limits of which it was made. Of owners with a limit: their extents,
        # from when they have to give first. Who has more than its limit, and of whom that was said.
        self._limits: Limits | None = None
        self._orders: dict[str, EvictionOrder] = {}
        self._above: set[str] = set()
        self._refused: set[str] = set()
        self._siblings = None if root is None else Siblings(root, kin, rank, ranks, left)
        self._being_written = 0
        self._written_for: Counter[str] = Counter()
        self._clock = itertools.count(1)

    def now(self) -> int:
        """The time by the clock of uses, which all stores share."""
        return next(self._clock) * WITHIN

    def not_before(self, used: int) -> None:
        """Let the clock go on from a use that was recorded."""
        self._clock = itertools.count(max(next(self._clock), 1 + used // WITHIN))

    def take_dead(self) -> list[tuple[str, int]]:
        """The stores that have been evicted as a whole since this was asked last: the first digits of their
        fingerprints, and their ranks."""
        return [] if self._siblings is None else self._siblings.take_dead()

    def discard(self, directories: Iterable[Path]) -> None:
        """Delete stores that nobody has open and nobody will open any more, as far as they are there."""
        if self._siblings is not None:
            for directory in directories:
                self._siblings.discard(directory)

    def keep_node(self) -> None:
        """Make the root's id again, if it was deleted with everything else."""
        if self._root is not None:
            node_id(self._root, self.node)

    # The rest is for stores, which hold the lock.

    def join(self, store: Store) -> None:
        self._stores.append(store)

    def leave(self, store: Store) -> None:
        self._stores.remove(store)
        self.wear.save()

    def expect(self, n_bytes: int, owner: str | None = None) -> None:
        """So many bytes (or so many fewer) are being written and are no extent yet; ``owner`` will be charged."""
        self._being_written += n_bytes
        if owner is not None:
            _add(self._written_for, owner, n_bytes)

    def hold(self, owner: str, n_bytes: int) -> None:
        """An owner has so many bytes (or so many fewer) more in extents."""
        _add(self._held, owner, n_bytes)
        if self._limits is not None:
            self._compare(owner)

    def add(self, store: Store, extent: Extent) -> None:
        """An extent may be evicted."""
        for order in self._orders_of(extent):
            order.add(store, extent)

    def remove(self, extent: Extent) -> None:
        """An extent is none any more."""
        for order in self._orders_of(extent):
            order.remove(extent)

    def hasten(self, extent: Extent) -> None:
        """The turn of an extent comes earlier than it did."""
        for order in self._orders_of(extent):
            order.hasten(extent)

    def _orders_of(self, extent: Extent) -> Iterable[EvictionOrder]:
        own = self._orders.get(extent.owner)
        return (self._order,) if own is None else (self._order, own)

    def _limit(self, owner: str) -> int | None:
        if self._limits is not self.limits:
            self._limits = self.limits
            self._orders, self._refused, self._above = {}, set(), set()
            for name in self._held:
                self._compare(name)
        return None if self._limits is None else self._limits(owner)

    def _compare(self, owner: str) -> None:
        limit = None if self._limits is None else self._limits(owner)
        if limit is not None and self._held[owner] > limit:
            self._above.add(owner)
        else:
            self._above.discard(owner)

    def _order_of(self, owner: str) -> EvictionOrder:
        """The extents of one owner. To be asked for an owner with a limit."""
        if (order := self._orders.get(owner)) is None:
            order = self._orders[owner] = self._order.of(lambda extent: extent.owner == owner)
        return order

    def lacking(self, store: Store, n_bytes: int) -> Lacking:
        """What ``n_bytes`` more of a store would exceed."""
        status = os.statvfs(next(path for path in (store.directory, *store.directory.parents) if path.exists()))
        free = status.f_bavail * status.f_frsize - self.quota.free_fraction * status.f_blocks * status.f_frsize
        more = n_bytes + self._being_written
        held = self._bytes() + (self._siblings.n_bytes if self._siblings else 0)
        return Lacking(0 if self.quota.max_bytes is None else held + more - self.quota.max_bytes, more - free)

    def require(self, store: Store, n_bytes: int, owner: str | None = None) -> None:
        """Raise PageStoreFull when there could be no room for ``n_bytes`` more, whatever was evicted for them, and
        OwnerFull when the limit of ``owner`` leaves none."""
        if (over := self._over(owner, n_bytes)) > 0:
            assert owner is not None
            pinned = sum(store.pinned_bytes(owner) for store in self._stores)
            if over > self._held[owner] - pinned:
                raise self._owner_full(owner, n_bytes)
        lacking = self.lacking(store, n_bytes)
        if max(lacking) > 0 and self._siblings and self._siblings.look(lacking):
            lacking = self.lacking(store, n_bytes).without(self._siblings.n_bytes, self._siblings.all_bytes)
        if max(lacking) > 0 and max(lacking) > self._evictable_bytes():
            raise self._full(store, n_bytes)

    def _over(self, owner: str | None, n_bytes: int) -> int:
        """By how much ``n_bytes`` more would exceed an owner's limit."""
        limit = self._limit(owner) if owner is not None else None
        if owner is None or limit is None:
            return 0
        return self._held[owner] + self._written_for[owner] + n_bytes - limit

    def retainable(self, store: Store, owner: str | None) -> float:
        """How many bytes more may be retained of an owner, or of all: half of what may be stored, at most."""
        limit: float | None = self._limit(owner) if owner is not None else self.quota.max_bytes
        if owner is None:
            room = self._bytes() - self.lacking(store, 0).on_disk
            limit = room if limit is None else min(room, limit)
        elif limit is None:
            return math.inf
        return limit / 2 - sum(store.retained_bytes(owner) for store in self._stores)

    def evict_siblings(self, store: Store, n_bytes: int = 0) -> Lacking:
        """Evict of what others left as much as ``n_bytes`` more ask for: what they lack then."""
        lacking = self.lacking(store, n_bytes)
        while max(lacking) > 0 and self._siblings and self._siblings.look(lacking):
            # With what it has just found, perhaps.
            before = self.lacking(store, n_bytes)
            lacking = self._siblings.evict(before)
            if lacking == before:
                break
        return lacking

    def make(self, store: Store, n_bytes: int, owner: str | None = None, *, recycle: bool = False) -> Path | None:
        """Evict until there is room for ``n_bytes`` more of ``store``, charged to ``owner``: the file of an evicted
        extent of it, if that is to be recycled and there is one. Raises PageStoreFull, and evicts nothing of these
        stores, when all that may be evicted would not be enough; OwnerFull, when that is because of the owner's
        limit."""
        victims: list[tuple[Store, Extent]] = []
        try:
            if (over := self._over(owner, n_bytes)) > 0:
                assert owner is not None
                if self._take(self._order_of(owner), over, victims) > 0:
                    raise self._owner_full(owner, n_bytes)
            missing = max(self.evict_siblings(store, n_bytes - _bytes_of(victims)))
            if missing > 0:
                missing = self._take_above(missing, victims)
            if missing > 0 and (
                missing > self._evictable_bytes() - _bytes_of(victims) or self._take(self._order, missing, victims) > 0
            ):
                raise self._full(store, n_bytes)
        except PageStoreFull:
            for of, extent in victims:
                of.put_back(extent)
            raise
        spare = None
        while victims:
            of_store = victims[0][0]
            own = [extent for of, extent in victims if of is of_store]
            victims = [(of, extent) for of, extent in victims if of is not of_store]
            try:
                spare = of_store.evict(own, recycle=recycle and of_store is store) or spare
            except (OSError, PageStoreFull):
                for of, extent in victims:
                    of.put_back(extent)
                raise
        return spare

    def _take_above(self, missing: float, victims: list[tuple[Store, Extent]]) -> float:
        """Take what owners have beyond their limits, of who has most beyond it first. Returns what is lacking still."""
        self._limit("")
        above = []
        for owner in self._above:
            taken = sum(extent.file_bytes for _, extent in victims if extent.owner == owner)
            above.append((self._held[owner] - taken - (self._limit(owner) or 0), owner))
        for over, owner in sorted(above, key=lambda one: (-one[0], one[1])):
            if missing <= 0:
                break
            before = _bytes_of(victims)
            self._take(self._order_of(owner), min(over, missing), victims)
            missing -= _bytes_of(victims) - before
        return missing

    def _take(self, order: EvictionOrder, missing: float, victims: list[tuple[Store, Extent]]) -> float:
        """Take the next extents of an order, until they have ``missing`` bytes. Returns what is lacking still."""
        while missing > 0 and (chosen := order.choose(missing, _may_go)):
            for store, extent in chosen:
                if store.take(extent):
                    victims.append((store, extent))
                    missing -= extent.file_bytes
                else:
                    # Pinned in the meantime.
                    self.add(store, extent)
        return missing

    def next_evicted(self, store: Store, n_bytes: int) -> list[tuple[Store, Extent]]:
        """What `make` would evict, in that order, if ``n_bytes`` more came, or as many more of an owner that has a
        limit; but for no more than an eighth of the room, or of the limit. Nothing is evicted."""
        victims: dict[Extent, Store] = {}

        def others(of: Store, extent: Extent) -> bool:
            return extent not in victims and of.evictable(extent)

        for owner, held in list(self._held.items()):
            if (limit := self._limit(owner)) is not None:
                over = held + self._written_for[owner] + min(n_bytes, limit // _PART) - limit
                victims |= {extent: of for of, extent in self._order_of(owner).first(over, others, _MOST_AHEAD)}
        lacking = self.lacking(store, 0)
        room, above = self._bytes() - lacking.on_disk, lacking.on_disk
        if self._siblings is not None:
            # They are evicted before anything of these stores.
            lacking = lacking.without(self._siblings.n_bytes, self._siblings.all_bytes)
            above = lacking.on_disk
        if self.quota.max_bytes is not None:
            room, above = min(room, self.quota.max_bytes), max(lacking)
        missing = above + min(n_bytes, room / _PART) - sum(extent.file_bytes for extent in victims)
        victims |= {extent: of for of, extent in self._order.first(missing, others, _MOST_AHEAD)}
        return [(of, extent) for extent, of in victims.items()]

    def owners(self) -> dict[str, int]:
        """The bytes that each owner has in extents. From any thread."""
        return dict(self._held)

    def _bytes(self) -> int:
        return sum(store.stats.bytes for store in self._stores)

    def _evictable_bytes(self) -> int:
        return sum(store.evictable_bytes() for store in self._stores)

    def _owner_full(self, owner: str, n_bytes: int) -> OwnerFull:
        limit, name = self._limit(owner), owner or NOBODY
        reason = (
            f"{n_bytes:,} bytes of KV pages of {name} are not stored: it may hold {limit:,} bytes here, and has "
            f"{self._held[owner]:,} that cannot be evicted"
        )
        if owner not in self._refused:
            self._refused.add(owner)
            logger.warning("page store: %s; said once for this limit", reason)
        return OwnerFull(reason)

    def _full(self, store: Store, n_bytes: int) -> PageStoreFull:
        return PageStoreFull(
            f"no room for {n_bytes:,} bytes of KV pages in {store.directory}: {self._bytes():,} are stored, "
            f"and what is left of them cannot be evicted; {MAKE_ROOM}"
        )


def _may_go(store: Store, extent: Extent) -> bool:
    return store.evictable(extent)


def _bytes_of(victims: Iterable[tuple[Store, Extent]]) -> int:
    return sum(extent.file_bytes for _, extent in victims)


def _add(counter: Counter[str], name: str, n_bytes: int) -> None:
    counter[name] += n_bytes
    if not counter[name]:
        del counter[name]
