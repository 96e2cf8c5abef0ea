"""Room for pages: one budget for all stores of a rank, and what other engines have left below the same root."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from agentstate.errors import PageStoreFull
from agentstate.pages.eviction import EvictionOrder, Extent
from agentstate.pages.node import node_id
from agentstate.pages.siblings import Lacking, Siblings

MAKE_ROOM = "make room on its disk, or raise AGENTSTATE_PAGES_QUOTA"
# What is charged to nobody is said to be of this owner.
NOBODY = "none"
# How many owners are told of by their names.
_MOST_OWNERS = 64
# The clock of uses leaves room to order the extents of one use among each other.
WITHIN = 1 << 20


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
    """

    pages: int = 0
    extents: int = 0
    bytes: int = 0
    pages_written: int = 0
    bytes_written: int = 0
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

    def take(self, extent: Extent) -> bool: ...

    def put_back(self, extent: Extent) -> None: ...

    def evict(self, victims: list[Extent], *, recycle: bool = False) -> Path | None: ...


class Space:
    """The room that the stores of one rank share: one quota and one order of eviction for all of them.

    With ``root``, whose id is ``node``, the stores that other engines left below it are evicted before anything of
    these stores (`Siblings`). Rank ``rank`` of ``ranks`` counts its part of them. Never evicted are ``kin``, the
    directories of this engine's own stores, of all ranks and pools: they may not be open yet.
    """

    def __init__(
        self,
        quota: Quota = UNLIMITED,
        root: Path | None = None,
        *,
        kin: Collection[Path] = (),
        rank: int = 0,
        ranks: int = 1,
    ):
        self.quota = quota
        self._root = root
        self.node = "" if root is None else node_id(root)
        # Held while an index changes or room is made, in whichever store: that may take as long as the disk does.
        self.lock = threading.Lock()
        self.order = EvictionOrder()
        self._stores: list[Store] = []
        self._siblings = None if root is None else Siblings(root, kin, rank, ranks)
        self._being_written = 0
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

    def keep_node(self) -> None:
        """Make the root's id again, if it was deleted with everything else."""
        if self._root is not None:
            node_id(self._root, self.node)

    # The rest is for stores, which hold the lock.

    def join(self, store: Store) -> None:
        self._stores.append(store)

    def leave(self, store: Store) -> None:
        self._stores.remove(store)

    def expect(self, n_bytes: int) -> None:
        """So many bytes (or so many fewer) are being written and are no extent yet."""
        self._being_written += n_bytes

    def lacking(self, store: Store, n_bytes: int) -> Lacking:
        """What ``n_bytes`` more of a store would exceed."""
        status = os.statvfs(next(path for path in (store.directory, *store.directory.parents) if path.exists()))
        free = status.f_bavail * status.f_frsize - self.quota.free_fraction * status.f_blocks * status.f_frsize
        more = n_bytes + self._being_written
        held = self._bytes() + (self._siblings.n_bytes if self._siblings else 0)
        return Lacking(0 if self.quota.max_bytes is None else held + more - self.quota.max_bytes, more - free)

    def require(self, store: Store, n_bytes: int) -> None:
        """Raise PageStoreFull when there could be no room for ``n_bytes`` more, whatever was evicted for them."""
        lacking = self.lacking(store, n_bytes)
        if max(lacking) > 0 and self._siblings and self._siblings.look(lacking):
            lacking = self.lacking(store, n_bytes).without(self._siblings.n_bytes, self._siblings.all_bytes)
        if max(lacking) > 0 and max(lacking) > self._evictable_bytes():
            raise self._full(store, n_bytes)

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

    def make(self, store: Store, n_bytes: int, *, recycle: bool = False) -> Path | None:
        """Evict until there is room for ``n_bytes`` more of ``store``: the file of an evicted extent of it, if that is
        to be recycled and there is one. Raises PageStoreFull, and evicts nothing of these stores, when all that may be
        evicted would not be enough."""
        excess = max(self.evict_siblings(store, n_bytes))
        victims: list[tuple[Store, Extent]] = []
        # More than once only where something was pinned in the meantime.
        while (missing := excess - sum(extent.file_bytes for _, extent in victims)) > 0:
            chosen = self._choose(missing) if missing <= self._evictable_bytes() else []
            if sum(extent.file_bytes for _, extent in chosen) < missing:
                self.order.put_back(chosen)
                for owner, extent in victims:
                    owner.put_back(extent)
                raise self._full(store, n_bytes)
            for owner, extent in chosen:
                if owner.take(extent):
                    victims.append((owner, extent))
                else:
                    self.order.add(owner, extent)
        spare = None
        while victims:
            owner = victims[0][0]
            own = [extent for of, extent in victims if of is owner]
            victims = [(of, extent) for of, extent in victims if of is not owner]
            try:
                spare = owner.evict(own, recycle=recycle and owner is store) or spare
            except (OSError, PageStoreFull):
                for of, extent in victims:
                    of.put_back(extent)
                raise
        return spare

    def _choose(self, n_bytes: float) -> list[tuple[Store, Extent]]:
        return self.order.choose(n_bytes, lambda store, extent: store.evictable(extent))

    def _bytes(self) -> int:
        return sum(store.stats.bytes for store in self._stores)

    def _evictable_bytes(self) -> int:
        return sum(store.evictable_bytes() for store in self._stores)

    def _full(self, store: Store, n_bytes: int) -> PageStoreFull:
        return PageStoreFull(
            f"no room for {n_bytes:,} bytes of KV pages in {store.directory}: {self._bytes():,} are stored, "
            f"and what is left of them cannot be evicted; {MAKE_ROOM}"
        )
