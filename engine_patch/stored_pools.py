"""The stores of one rank, one a device pool, behind the few questions that the linker asks.

Full attention needs every page of a prefix; a sliding window and a recurrent state need only what lies before its
end, and such pages exist only where the tree kept them. So a prefix can be restored up to some lengths and not up to
others, and all pools have to agree on one.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from fractions import Fraction
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch

from agentstate.pages import (
    ANYONE,
    DEMAND,
    PLANNED,
    READ_THREADS,
    Changes,
    LayerwiseReader,
    Need,
    PageKeys,
    PageStore,
    Replicas,
    StoreView,
)
from agentstate.pages.rows import RowReader
from agentstate.pages.space import StoreStats
from agentstate.settings import Settings
from agentstate.tiers import Guard
from agentstate.tiers.pages import SharedPages
from engine_patch.accounts import Accounts
from engine_patch.arrivals import Arrivals, LayerGate
from engine_patch.choice import ChoiceRestorer
from engine_patch.failures import Failures, together
from engine_patch.following import FollowingSpiller
from engine_patch.host_memory import bound
from engine_patch.host_tier import HostPool, HostStats, HostTier
from engine_patch.pools import DevicePool
from engine_patch.quarantine import Quarantine
from engine_patch.restore import Finished, Restored, RestoredRequest, Restorer, RestoreStats
from engine_patch.sglang_api import PoolName, PoolTransfer
from engine_patch.shared_pool import SharedPool, SharedStats
from engine_patch.spill import Spiller, SpillStats
from engine_patch.staging import read_backend
from engine_patch.transfer import CopyLane, PageNumbers

# Of a pool, the store that this rank writes, or a view of the one that another rank writes for it.
Store = PageStore | StoreView
OpenStore = Callable[[DevicePool], Store]
# What other engines of this machine have of the pages that a store is for.
OpenReplicas = Callable[[Store], Replicas]
# More than a reader takes by itself: beside a forward, threads that hand over less often disturb it less. An
# accelerator takes 8 MiB in less than a millisecond, so that more at a time keeps nobody waiting. That size was chosen
# by arithmetic (`bench path`) and has not been measured on one.
_CHUNK_BYTES, _CHUNK_BYTES_ACCELERATOR = 8 << 20, 32 << 20
# So do fewer of them.
_READ_THREADS_BESIDE = 2


class Share(NamedTuple):
    """A store that engines share: what answers for it, and what opens the pages in it that a pool's store is for."""

    tier: Guard
    open: Callable[[DevicePool, Store], SharedPages]


class OfferBudget:
    """Bounds the pages of each pool that the tree has offered and has no answer for yet. They are locked on the device,
    with what is before them on their chains, so no more than ``most`` may be offered unless a single offer is larger: a
    slow drive then costs what is not stored, not the engine's memory.

    It counts what the tree does, which is the same on all ranks, and not how far a rank's drive is.
    """

    def __init__(self, most: Sequence[int]):
        self.full = False
        self._most = most
        self._offers: deque[Sequence[int]] = deque()
        self._pages = [0] * len(most)

    def take(self, pages: Sequence[int]) -> bool:
        """Count an offer, unless it is too large for what waits already. After one that is, all others are too, and
        ``full`` says so, until an answer has been taken: a chain is to have no holes, and of a long one not every node
        is to be tried."""
        if self._offers and not self.full:
            bounds = zip(pages, self._pages, self._most, strict=True)
            self.full = any(new and old + new > most for new, old, most in bounds)
        if not self.full:
            self._offers.append(pages)
            self._pages = [old + new for old, new in zip(self._pages, pages, strict=True)]
        return not self.full

    def answered(self) -> None:
        """The tree has taken the answer for its oldest offer."""
        answered = self._offers.popleft()
        self._pages = [old - gone for old, gone in zip(self._pages, answered, strict=True)]
        self.full = False

    def clear(self) -> None:
        """The tree expects no answers any more."""
        self._offers.clear()
        self._pages = [0] * len(self._most)
        self.full = False

    @property
    def kept(self) -> int:
        """How many offers the tree has taken no answer for."""
        return len(self._offers)


def _parts(pools: Sequence[DevicePool]) -> list[Fraction]:
    """Which part of what they share each pool gets: those of the tree as much as each other, and what follows one of
    them has of that one's part what it has of a token's bytes."""
    n_bytes = {pool.name: pool.device_pages.geometry.page_bytes for pool in pools}
    together: Counter[PoolName] = Counter()
    for pool in pools:
        together[pool.follows or pool.name] += n_bytes[pool.name]
    return [Fraction(n_bytes[pool.name], together[pool.follows or pool.name] * len(together)) for pool in pools]


class _StoredPool:
    def __init__(
        self,
        pool: DevicePool,
        open_store: OpenStore,
        settings: Settings,
        part: Fraction,
        tier: HostTier | None = None,
        share: Share | None = None,
        open_replicas: OpenReplicas | None = None,
        by_choice: bool = False,
    ):
        self.name = pool.name
        # The pool of the tree that says where the pages of this one are.
        self.source = pool.follows or pool.name
        self.model_layers = pool.model_layers
        self.window_pages = pool.window_pages
        self.device_pages = pool.device_pages
        self.pool = pool
        self.store = open_store(pool)
        self._open_replicas = open_replicas
        self.replicas = open_replicas(self.store) if open_replicas is not None else None
        self.page_bytes = self.device_pages.geometry.page_bytes
        self._staging_bytes, self._timeout_s = int(settings.spill_staging_bytes * part), settings.drive_timeout_s
        self._one_shots = settings.one_shots
        self._promotes_late = share is not None and settings.promote == "second"
        self.spiller = self._new_spiller()
        queue_pages = int(settings.spill_queue_bytes * part) // self.page_bytes
        # Of recurrent states SGLang has hardly more than its requests need, and ends when there is none.
        most = len(self.device_pages) // (4 if pool.name is PoolName.MAMBA else 2)
        self.most_offered = max(1, min(queue_pages, most))
        backend = read_backend(settings.read_backend, self.device_pages.device)
        staging_bytes = int(settings.staging_bytes * part)
        open_extent = self.local.opening(backend) if not isinstance(self.local, PageStore) else None
        self.reader = LayerwiseReader(
            self.device_pages.geometry,
            staging_bytes=staging_bytes,
            threads=settings.read_threads or (_READ_THREADS_BESIDE if self.device_pages.addressable else READ_THREADS),
            chunk_bytes=chunk_bytes(self.device_pages.device),
            backend=backend,
            open_extent=open_extent,
        )
        self.host = (
            HostPool(tier, self.store, self.device_pages, self.reader, backend.on_host) if tier is not None else None
        )
        self._share = share
        self.shared = (
            SharedPool(
                share.open(pool, self.store),
                self.store,
                share.tier,
                self.device_pages.geometry,
                self.device_pages.device,
                settings,
                staging_bytes,
                self.replicas,
            )
            if share is not None
            else None
        )
        self.choice: ChoiceRestorer | None = None
        if by_choice:
            rows = RowReader(self.device_pages.geometry, open_extent=open_extent)
            self.choice = ChoiceRestorer(
                self.local, self.device_pages, self.reader, rows, self._timeout_s, self.host, self.shared
            )
        self.restorer = self.choice or Restorer(
            self.local, self.device_pages, self.reader, self._timeout_s, self.host, self.shared
        )
        # Whether nothing is spilled any more.
        self.ended = False
        # What follows another pool is withheld with that one's pages.
        works = pool.follows is None and Quarantine.works(pool.allocator)
        self.quarantine = Quarantine(pool.allocator) if works else None
        self._erasures = 0

    @property
    def local(self) -> Store | Replicas:
        """What this machine has: the store, and those of other engines."""
        return self.replicas or self.store

    @property
    def drive_page_bytes(self) -> float:
        """What a page takes on the drive, as far as is known: coded ones have fewer bytes."""
        pages = self.store.stats.pages
        return min(self.page_bytes, self.store.stats.bytes / pages) if pages else self.page_bytes

    @property
    def shared_page_bytes(self) -> float:
        """The same in the shared store."""
        there = 0.0 if self.shared is None else self.shared.pages.page_bytes
        return min(self.page_bytes, there) if there else self.page_bytes

    def _new_spiller(self) -> Spiller | FollowingSpiller:
        if isinstance(self.store, StoreView):
            return FollowingSpiller(self.store, self.device_pages, self.pool.dtypes[0], self._timeout_s)
        return Spiller(
            self.store,
            self.device_pages,
            self._staging_bytes,
            self._timeout_s,
            one_shots=self._one_shots,
            shared=self._in_shared if self._promotes_late else None,
            adopt=self.replicas.adopt if self.replicas is not None else None,
        )

    def _in_shared(self, keys: Sequence[bytes]) -> list[bool]:
        return [False] * len(keys) if self.shared is None else self.shared.stored(keys, answering=True)

    @property
    def unlike(self) -> bool:
        """Whether the rank that writes the store turned out to compute other pages than this one."""
        return isinstance(self.spiller, FollowingSpiller) and self.spiller.unlike

    def forget_erased(self) -> None:
        """Forget what the host tier has of pages that the rank which writes the store has erased."""
        if isinstance(self.store, StoreView) and self.host is not None:
            before, self._erasures = self._erasures, self.store.told().erasures
            if before != self._erasures:
                self.host.forget_unstored()

    def move(self, store: Store, within_s: float) -> bool:
        """Store to and restore from ``store`` from now on. False, and nothing is stored any more, when the drive does
        not take what waits for the store before within so many seconds."""
        self.ended = self.spiller.close(within_s)
        if not self.ended:
            return False
        stats, on = self.spiller.stats, self.spiller.on
        store.changes = self.store.changes
        before, self.replicas = self.replicas, self._open_replicas(store) if self._open_replicas is not None else None
        self.restorer.move(self.replicas or store)
        if self.host is not None:
            self.host.move(store)
        if self.shared is not None and self._share is not None:
            self.shared.move(self._share.open(self.pool, store), store, self.replicas)
            self.shared.pages.changes = store.changes
        if before is not None:
            before.close()
        self.store.close()
        self.store = store
        self.spiller = self._new_spiller()
        self.spiller.stats, self.spiller.on, self.ended = stats, on, False
        return True

    def prefix_length(self, keys: Sequence[bytes], *, use: bool, answering: bool) -> int:
        """How many of ``keys``, from the first on, are in the store or the shared one (`SharedPool`); also in those of
        other engines of this machine, if they have to be ``answering`` now."""
        local = self.local if answering else self.store
        found = local.prefix_length(keys, use=use)
        while self.shared is not None and found < len(keys):
            more = self.shared.prefix_length(keys[found:], answering=answering)
            if not more:
                break
            found += more
            found += local.prefix_length(keys[found:], use=use)
        return found

    def stored(self, keys: Sequence[bytes], *, answering: bool) -> list[bool]:
        """Which of ``keys`` are in the store or the shared one; see `prefix_length`."""
        stored = (self.local if answering else self.store).stored(keys)
        if self.shared is not None and not all(stored):
            shared = self.shared.stored(keys, answering=answering)
            stored = [one or other for one, other in zip(stored, shared, strict=True)]
        return stored

    def needed(self, keys: Sequence[bytes]) -> Sequence[bytes]:
        """Those of a chain without which it cannot be gone on from its end."""
        return keys if self.window_pages is None else keys[-self.window_pages :]

    def kept(self) -> Counter[str]:
        quarantined = 0 if self.quarantine is None else self.quarantine.kept
        kept = Counter({"pinned_extents": self.store.pinned, "quarantined_pages": quarantined})
        kept.update(self.restorer.kept())
        kept.update(self.spiller.kept())
        if self.host is not None:
            kept.update(self.host.kept())
        return kept

    def stat(self) -> dict[str, Any]:
        prefetches = self.restorer.prefetches
        return {
            "store": dataclasses.asdict(self.store.stats),
            "spill": {**dataclasses.asdict(self.spiller.stats), "waiting": self.spiller.waiting},
            "restore": dataclasses.asdict(self.restorer.stats),
            "prefetch": dataclasses.asdict(prefetches.stats),
            "reads": self.reader.read_bytes(),
            "host": dataclasses.asdict(self.host.stats if self.host is not None else HostStats()),
            "shared": dataclasses.asdict(self.shared.stat() if self.shared is not None else SharedStats()),
            "staged_bytes": self.reader.staged_bytes,
        }


class StoredPools:
    """``pools``, full attention first, each with a store that ``open_store`` opens. Memory for staging is shared out
    (`_parts`); that of the host tier goes to what is worth most, within the quotas of ``accounts``. ``ranks`` share the
    machine. With ``by_choice`` the KV of full attention is restored by choice (`ChoiceRestorer`). Without pools it is a
    place where nothing is stored and nothing is found.

    Every request loads from every pool, so that all pools count their batches alike: one index serves them all.
    """

    def __init__(
        self,
        pools: Sequence[DevicePool],
        open_store: OpenStore,
        settings: Settings,
        ranks: int = 1,
        accounts: Accounts | None = None,
        share: Share | None = None,
        open_replicas: OpenReplicas | None = None,
        by_choice: bool = False,
    ):
        device = pools[0].device_pages.device if pools else torch.device("cpu")
        host_bytes = bound(settings.host_bytes, device, ranks)
        threads = settings.read_threads or READ_THREADS
        self.share = share
        self.page_size = pools[0].device_pages.geometry.page_size if pools else 1
        self.host_tier = HostTier(host_bytes, device, threads, accounts) if host_bytes else None
        self._pools = [
            _StoredPool(
                pool,
                open_store,
                settings,
                part,
                self.host_tier,
                share,
                open_replicas,
                by_choice and pool.name is PoolName.KV,
            )
            for pool, part in zip(pools, _parts(pools), strict=True)
        ]
        self._choice = next((pool.choice for pool in self._pools if pool.choice is not None), None)
        routes: dict[int, list[tuple[Arrivals, int]]] = {}
        for pool in self._pools:
            for position, layer in enumerate(pool.model_layers):
                routes.setdefault(layer, []).append((pool.restorer.arrivals, position))
        self.gate = LayerGate(routes, self._choice)
        self.device_pages = {pool.name: pool.device_pages for pool in self._pools}
        self._budget = OfferBudget([pool.most_offered for pool in self._pools])
        self._pages_refused = 0
        # When losers were taken last: how many pages had left the shared store, and whether it was known what it has.
        self._left = 0
        self._known = self.shared_known
        self._failures = Failures()
        self._scrubbing = False
        self._priorities = settings.read_priorities

    @property
    def device(self) -> torch.device:
        return self._pools[0].device_pages.device if self._pools else torch.device("cpu")

    def restorable(self, keys: Sequence[bytes], *, use: bool = True, answering: bool = True) -> list[int]:
        """Every length, in pages and in order, up to which a prefix of ``keys`` is stored with all that is needed to go
        on from there: on this node, or in the shared store, which has to be ``answering`` now. Pages before ``keys``
        are taken to be on the device. From memory; never touches the disk. The pages that the longest length needs
        count as used, unless ``use`` is false."""
        if not self._pools or any(pool.unlike for pool in self._pools):
            return []
        full, *windowed = self._pools
        found = full.prefix_length(keys, use=use, answering=answering)
        lengths = np.arange(1, found + 1)
        usable = np.ones(found, dtype=bool)
        for pool in windowed:
            stored = np.array(pool.stored(keys[:found], answering=answering), dtype=bool)
            run = lengths - np.maximum.accumulate(np.where(stored, 0, lengths))
            usable &= run >= np.minimum(pool.window_pages or found, lengths)
        restorable: list[int] = lengths[usable].tolist()
        if use and restorable:
            for pool in windowed:
                pool.store.prefix_length(pool.needed(keys[: restorable[-1]]))
        return restorable

    def restorable_for(self, rid: str, keys: Sequence[bytes]) -> list[int]:
        """The `restorable` lengths for a request that is going to load: after a restore of it has failed, those before
        the pages that failed."""
        return self.restorable(keys[: self._failures.usable(rid, keys)])

    def durable(self, keys: Sequence[bytes], *, use: bool = False) -> int:
        """The longest of the `restorable` lengths, or 0, whether or not the shared store answers now. Keeping account
        of what is stored is not using it."""
        return (self.restorable(keys, use=use, answering=False) or [0])[-1]

    def reachable(self, keys: Sequence[bytes]) -> int:
        """The longest of the `restorable` lengths, or 0."""
        return (self.restorable(keys) or [0])[-1]

    def on_node(self, keys: Sequence[bytes]) -> int:
        """How many of ``keys``, from the first on, are on this node's drive."""
        return self._pools[0].store.prefix_length(keys, use=False) if self._pools else 0

    def here(self, keys: Sequence[bytes]) -> bool:
        """Whether all that a prefix of ``keys`` needs is on this node."""
        return all(all(pool.store.stored(pool.needed(keys))) for pool in self._pools)

    def shared_takes_s(self, keys: Sequence[bytes]) -> float | None:
        """How long the shared store takes to give what a prefix of ``keys`` needs and this node does not have, as far
        as that was measured; None where this node has all of it."""
        missing = [(pool, pool.local.stored(pool.needed(keys)).count(False)) for pool in self._pools]
        n_bytes = sum(pages * pool.shared_page_bytes for pool, pages in missing)
        if not n_bytes or self.share is None:
            return None
        latency_s, bytes_per_s = self.share.tier.figures()
        return 0.0 if latency_s is None or not bytes_per_s else latency_s + n_bytes / bytes_per_s

    def measure_shared(self) -> None:
        """What the shared store is known to take keeps requests from it: find out whether it still does."""
        if self.share is not None:
            self.share.tier.measure()

    def chains(self, keys: Sequence[bytes]) -> Iterator[tuple[Store, SharedPages, PageKeys]]:
        """Of each pool, what it needs of a chain, and where that is and may be."""
        for pool in self._pools:
            if pool.shared is not None:
                yield pool.store, pool.shared.pages, PageKeys.of(pool.needed(keys))

    def shared_pages(self) -> list[tuple[Store, SharedPages]]:
        """Of each pool, the store and what is known of the shared one."""
        return [(pool.store, pool.shared.pages) for pool in self._pools if pool.shared is not None]

    @property
    def shared_known(self) -> bool:
        """Whether it is known what the shared store has, if there is one."""
        return all(pool.shared is None or pool.shared.pages.followed for pool in self._pools)

    def published(self, keys: Sequence[bytes]) -> int:
        """How many of ``keys``, from the first on, are in the shared store with all that is needed to go on from there,
        whether or not that answers."""
        found = len(keys) if self._pools else 0
        for pool in sorted(self._pools, key=lambda pool: pool.window_pages is not None):
            if pool.shared is None:
                return 0
            if pool.window_pages is None:
                found = pool.shared.pages.prefix_length(keys[:found])
            # Of a window, the last length is looked at: who resumes needs that, and nothing before it.
            elif not all(pool.shared.pages.stored(pool.needed(keys[:found]))):
                return 0
        return found

    def changes(self) -> Changes:
        """What is told from now on which pages of full attention leave this rank's store, and which come to the shared
        one or leave it; not which ones are stored here."""
        changes = Changes()
        for pool in self._pools[:1]:
            pool.store.changes = changes
            if pool.shared is not None:
                pool.shared.pages.changes = changes
        return changes

    def places(self, keys: Sequence[bytes]) -> list[tuple[bool, bool]]:
        """Of each of ``keys`` whether full attention has it in this rank's store, and in the shared one, whether or not
        that answers."""
        if not self._pools:
            return [(False, False)] * len(keys)
        full = self._pools[0]
        here = full.store.stored(keys)
        if not all(here):
            # One that was being merged may have been missed; it is not on the way from one place to another twice.
            here = [one or again for one, again in zip(here, full.store.stored(keys), strict=True)]
        there = [False] * len(keys) if full.shared is None else full.shared.pages.stored(keys)
        return list(zip(here, there, strict=True))

    def extent_names(self, keys: Sequence[bytes]) -> list[tuple[str | None, str | None]]:
        """Of each of ``keys`` the extents from which full attention reads it, in this rank's store and in the shared
        one; None where it has none."""
        if not self._pools:
            return [(None, None)] * len(keys)
        full = self._pools[0]
        there = [None] * len(keys) if full.shared is None else full.shared.pages.extent_names(keys)
        return list(zip(full.store.extent_names(keys), there, strict=True))

    def n_bytes(self, pages: int) -> int:
        """What a prefix of so many pages takes on the device: the same on every rank."""
        return sum(min(pages, pool.window_pages or pages) * pool.page_bytes for pool in self._pools)

    def read_bytes(self, pages: int) -> int:
        """What restoring a prefix of so many pages reads from this rank's drive, about."""
        return round(sum(min(pages, pool.window_pages or pages) * pool.drive_page_bytes for pool in self._pools))

    def read_ahead(self, rid: str, keys: Sequence[bytes]) -> None:
        """Begin to read what a waiting request will load."""
        for pool in self._pools:
            pool.restorer.read_ahead(rid, pool.needed(keys))

    def prefetch(
        self, session_id: str, keys: Sequence[bytes], ttl_s: float, need: Need = PLANNED
    ) -> Callable[[], float | None]:
        """Begin to read a session's stored chain to host memory: to the host tier, in whose order it stays there, or
        else to staging, where it is kept for so long. Returns what tells the fraction of it that is there, of the pool
        that has least, once there will not be more; None until then."""
        need = self._ranked(need)
        of_pools = [
            pool.restorer.prefetches.for_session(session_id, pool.needed(keys), ttl_s, need)
            if pool.host is None or not all(pool.store.stored(pool.needed(keys)))
            else pool.host.fetch(session_id, pool.needed(keys), need)
            for pool in self._pools
        ]

        def fraction() -> float | None:
            fractions = [of_pool() for of_pool in of_pools]
            return None if None in fractions else min(fractions, default=0.0)

        return fraction

    def tidy(self, queued: Callable[[], Collection[str]]) -> None:
        """Abandon what was read for requests that are not queued any more, and what has expired. ``queued`` are also
        those that are about to be queued again."""
        self._failures.tidy(queued)
        for pool in self._pools:
            pool.restorer.arrivals.tidy()
            if pool.restorer.prefetches:
                pool.restorer.prefetches.tidy(queued())

    def need(self, session_id: str, keys: Sequence[bytes]) -> None:
        """Declare that a session's live manifest needs this chain."""
        for pool in self._pools:
            pool.store.need(pool.needed(keys), session_id)

    def retain(self, keys: Sequence[bytes], until_s: float) -> int:
        """Do not evict a stored chain before ``until_s`` of `time.monotonic`; a time in the past ends that. How many of
        its pages, from the first on, are retained: at most half of the room is (`PageStore.retain`)."""
        if not self._pools:
            return 0
        full, *windowed = self._pools
        retained = full.store.retain(keys, until_s)
        for pool in windowed:
            pool.store.retain(pool.needed(keys[:retained]), until_s)
        return retained

    def supersede(self, keys: Sequence[bytes], session_id: str) -> None:
        """A session has left these pages, from a place in its chain on: unless others need them, they are the first to
        leave host memory and the drive."""
        for pool in self._pools:
            if pool.host is not None:
                pool.host.release(keys, session_id)
            pool.store.release(keys, session_id)

    def need_only(self, chains: Iterable[tuple[str, Sequence[bytes]]]) -> None:
        """Declare which chains live manifests need, by their sessions, and that they need nothing else."""
        with ExitStack() as telling:
            for pool in self._pools:
                telling.enter_context(pool.store.needing_only())
            for session_id, keys in chains:
                self.need(session_id, keys)

    def take_losers(self) -> set[str]:
        """The sessions whose manifests may have lost pages in any pool since this was asked last (`ANYONE`: or any
        other)."""
        losers = set().union(*(pool.store.take_losers() for pool in self._pools))
        before = self._left, self._known
        self._left, self._known = self._left_shared(), self.shared_known
        return losers | {ANYONE} if before != (self._left, self._known) else losers

    def _left_shared(self) -> int:
        return sum(pool.shared.pages.left for pool in self._pools if pool.shared is not None)

    def held(self, keys: Sequence[bytes]) -> list[bool]:
        """Of each of ``keys`` whether any pool has it stored, whether or not anything can be restored from it."""
        of_pools = [pool.store.stored(keys) for pool in self._pools]
        return [any(of_page) for of_page in zip(*of_pools, strict=True)] if of_pools else [False] * len(keys)

    def remove(self, keys: Collection[bytes]) -> None:
        """Stop serving pages, in all pools, to erase them (`PageStore.remove`). What is read ahead of them is
        abandoned, so that it pins them no longer, and what the host tier has of them is forgotten."""
        for pool in self._pools:
            pool.store.remove(keys)
            pool.restorer.prefetches.forget(set(keys))
            if pool.host is not None:
                pool.host.forget(keys)

    def scrub(self, keys: Collection[bytes], stop: Callable[[], bool]) -> bool:
        """Whether no file of any pool has a copy of these pages that is not served (`PageStore.scrub`)."""
        self._scrubbing = True
        try:
            return all([pool.store.scrub(keys, stop) for pool in self._pools])
        finally:
            self._scrubbing = False

    def forget_erased(self) -> None:
        """Where another rank writes the stores: keep nothing in host memory that it has erased. Asked once in a
        while."""
        for pool in self._pools:
            pool.forget_erased()

    def look_for_replicas(self) -> None:
        """Find the stores of other engines that have appeared. Asked once in a while, by one thread."""
        for pool in self._pools:
            if pool.replicas is not None:
                pool.replicas.look()

    def reads(self) -> frozenset[str]:
        """The ids of the other page directories that all pools can read from now."""
        of_pools = [pool.replicas.nodes() for pool in self._pools if pool.replicas is not None]
        return frozenset.intersection(*of_pools) if of_pools else frozenset()

    def merge(self, keys: Sequence[bytes]) -> None:
        """Merge the small extents of a stored chain when there is nothing else to do. A window's pages stay as they
        were written: they are read few at a time."""
        for pool in self._pools:
            if pool.window_pages is None and keys:
                pool.spiller.merge(keys)

    @property
    def lost(self) -> int:
        """How many pages that were stored have been lost: evicted, dropped, erased, or deleted by others. It only
        grows."""
        of_pools = [pool.store.stats for pool in self._pools]
        return (
            sum(
                stats.pages_evicted + stats.pages_dropped + stats.pages_vanished + stats.pages_erased
                for stats in of_pools
            )
            + self._left_shared()
        )

    def preload(
        self,
        rid: str,
        keys: Sequence[bytes],
        slots: Mapping[PoolName, torch.Tensor],
        ready: Sequence[torch.Event],
        need: Need = DEMAND,
    ) -> int:
        """Load what is needed of a chain for no request that runs, into slots that the caller owns, of each pool of
        the tree: the number of a batch of its own."""
        indices = {
            pool.restorer.preload(
                rid,
                pool.needed(keys),
                pool.device_pages.numbers_in(slots[pool.source], pool.device_pages.background),
                ready,
                self._ranked(need),
            )
            for pool in self._pools
        }
        return _in_step(indices)

    def hasten(self, index: int, need: Need) -> None:
        """Let a preload be as urgent as ``need``, if it is less so."""
        for pool in self._pools:
            pool.restorer.hasten(index, self._ranked(need))

    def _ranked(self, need: Need) -> Need:
        return need if self._priorities else PLANNED

    def is_queued(self, index: int) -> bool:
        """Whether a preload has not begun, because others before it have not ended."""
        return any(pool.restorer.is_queued(index) for pool in self._pools)

    def landed(self, index: int) -> bool:
        """Whether a preload has stopped writing to the device."""
        return all(pool.restorer.landed(index) for pool in self._pools)

    def layers_landed(self, index: int) -> int:
        """How many layers of a preload have stopped writing to the device."""
        return sum(pool.restorer.arrivals.layers_landed(index) for pool in self._pools)

    def abandon(self, index: int) -> None:
        """Nobody waits for a preload any more."""
        for pool in self._pools:
            pool.restorer.arrivals.abandon(index)

    @property
    def window_pages(self) -> int:
        """How many pages before its end a prefix needs of sliding windows, 0 where there are none."""
        return next((pool.window_pages or 0 for pool in self._pools if pool.name is PoolName.SWA), 0)

    @property
    def stuck(self) -> bool:
        """Whether a drive has not answered in time, and does not yet."""
        return any(pool.restorer.arrivals.stuck for pool in self._pools)

    def quarantine(self, numbers: Sequence[Callable[[], torch.Tensor]]) -> None:
        """Quarantine those device pages, a tensor a pool, for which that works."""
        for pool, of_pool in zip(self._pools, numbers, strict=True):
            if pool.quarantine is not None:
                pool.quarantine.add(of_pool())

    def quarantine_slots(self, slots: Mapping[PoolName, torch.Tensor]) -> None:
        """Quarantine the device pages that these slots are, for which that works."""
        for pool in self._pools:
            if pool.quarantine is not None:
                pool.quarantine.add(pool.device_pages.page_numbers(slots[pool.source]))

    def release_quarantine(self) -> None:
        """End the quarantine of device pages."""
        for pool in self._pools:
            if pool.quarantine is not None:
                pool.quarantine.release()

    @property
    def quarantines(self) -> bool:
        """Whether device pages are in quarantine."""
        return any(pool.quarantine for pool in self._pools)

    def load(self, rid: str, transfers: Sequence[PoolTransfer]) -> bool:
        """Queue a request's pages in every pool; False, and nothing queued, unless all pools are given."""
        given = {transfer.name: transfer for transfer in transfers}
        if not self._pools or given.keys() != {pool.source for pool in self._pools}:
            return False
        for pool in self._pools:
            transfer = given[pool.source]
            device = pool.device_pages
            numbers = device.numbers_in(transfer.device_indices, device.inbound)
            pool.restorer.queue(rid, keys_of(transfer), numbers)
        return True

    def cancel(self, rid: str) -> bool:
        return any([pool.restorer.cancel(rid) for pool in self._pools])

    def start(self, ready: Sequence[torch.Event]) -> int:
        return _in_step({pool.restorer.start(ready) for pool in self._pools} or {-1})

    @property
    def by_choice(self) -> bool:
        """Whether anything is restored by choice, so that batches may `trail`."""
        return self._choice is not None

    def trail(self, index: int) -> bool:
        """After a batch's forward: whether what it has not read of its pages may come behind it, as it does from now
        on. All that it has read is good then. `finish` is still to come, and waits for the rest."""
        if self._choice is None or not self._choice.trails(index):
            return False
        others = [pool.restorer for pool in self._pools if pool.restorer is not self._choice]
        if not all([restorer.arrived(index) for restorer in others]):
            return False
        self._choice.go_on(index)
        return True

    def failing(self, index: int) -> bool:
        """Whether a batch that trails has met something that must not be used, or is abandoned."""
        return self._choice is not None and self._choice.failing(index)

    def finish(self, index: int) -> Finished:
        """Wait for the batch: the requests that must not be used, because of whichever pool, and what was restored in
        all of them together; its pages are those of full attention."""
        finished = []
        for pool in self._pools:
            finished.append(pool.restorer.finish(index))
            if pool.restorer.arrivals.abandoned(index):
                self.gate.abandon(index)
        failed = set().union(*(of_pool.failed for of_pool in finished))
        of_pools = [of_pool.restored for of_pool in finished if of_pool.restored is not None]
        waits_s = self.gate.waited_for(index)
        requests = {
            rid: _together([restored.requests[rid] for restored in of_pools])
            for rid in (of_pools[0].requests if of_pools else ())
            if rid not in failed
        }
        unusable = together((of_pool.failed, of_pool.unusable) for of_pool in finished)
        self._failures.add(unusable)
        return Finished(
            failed,
            Restored(requests, max(restored.seconds for restored in of_pools), sum(waits_s), waits_s)
            if requests
            else None,
            tuple(chain.from_iterable(of_pool.numbers for of_pool in finished)),
            any(of_pool.writing for of_pool in finished),
            unusable,
        )

    def stored(self, transfers: Sequence[PoolTransfer]) -> bool:
        """Whether all that `offer` would store of these is stored."""
        given = {transfer.name: transfer for transfer in transfers}
        for pool in self._pools:
            if (transfer := given.get(pool.source)) is not None:
                keys = keys_of(transfer) if pool.window_pages is None else _offered(pool, transfer)[0]
                if not all(pool.store.stored(keys)):
                    return False
        return True

    def staged_for(self, keys: Sequence[bytes]) -> bool:
        """Whether these pages are in host memory, or on their way there."""
        return any(pool.restorer.prefetches.covers(pool.needed(keys)) for pool in self._pools)

    def spill(self, on: bool) -> None:
        """Whether what is offered from now on is stored."""
        for pool in self._pools:
            pool.spiller.on = on

    def offer(
        self,
        transfers: Sequence[PoolTransfer],
        ready: Callable[[], Sequence[torch.Event]],
        session_id: str | None = None,
        owner: str = "",
        rid: str = "",
    ) -> bool:
        """Queue a tree node's pages for writing, those of each pool that it has; ``ready`` tells the events after which
        they may be read, ``owner`` is whom they are charged to, ``rid`` the request that they are of. One result
        follows for all. False, and nothing queued, when too much waits already, which it does on all ranks or on none
        (`OfferBudget`)."""
        if not self._pools:
            return False
        given = {transfer.name: transfer for transfer in transfers}
        offered = [] if self._budget.full else [_offered(pool, given.get(pool.source)) for pool in self._pools]
        if not offered or not self._budget.take([len(keys) for keys, _ in offered]):
            full = given.get(self._pools[0].name)
            self._pages_refused += len(full.keys) if full is not None else 0
            return False
        events = ready()
        for pool, (keys, numbers) in zip(self._pools, offered, strict=True):
            pool.spiller.offer(keys, numbers, events, session_id, owner, rid)
        return True

    @property
    def results(self) -> int:
        """Offers whose result is in, in every pool; to be asked often (`Spiller.answered`)."""
        return min((pool.spiller.answered() for pool in self._pools), default=0)

    def pop_result(self) -> bool:
        self._budget.answered()
        return all([pool.spiller.results.popleft() for pool in self._pools])

    def then(self, action: Callable[[], None]) -> None:
        """Run ``action``, on a spilling thread, once everything offered so far is stored in every pool or has
        failed."""
        for pool in self._pools[1:]:
            action = _after(pool.spiller, action)
        if self._pools:
            self._pools[0].spiller.then(action)

    def demote(
        self,
        transfers: Sequence[PoolTransfer],
        ready: Callable[[], Sequence[torch.Event]],
        session_id: str | None = None,
    ) -> bool:
        """Copy a tree node's pages, which are about to leave the device, to the host tier. The caller keeps them as
        they are until the result is in; one follows for all pools. ``ready`` tells the events after which they may be
        read. False, and nothing asked for, without a host tier."""
        if self.host_tier is None or not self._pools:
            return False
        given = {transfer.name: transfer for transfer in transfers}
        events = ready()
        for pool in self._pools:
            assert pool.host is not None
            keys, numbers = _offered(pool, given.get(pool.source), pool.host.lane)
            pool.host.demote(keys, numbers, events, session_id)
        return True

    @property
    def demoted(self) -> int:
        """Demotions whose result is in, in every pool."""
        return min((len(pool.host.results) for pool in self._pools if pool.host is not None), default=0)

    def pop_demoted(self) -> bool:
        """Take the oldest result: whether all of the node's pages are in the host tier."""
        return all([pool.host.results.popleft() for pool in self._pools if pool.host is not None])

    def in_host_memory(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of ``keys`` the host tier has of full attention."""
        host = self._pools[0].host if self._pools else None
        return [False] * len(keys) if host is None else host.has(keys)

    def drain(self) -> None:
        """Wait until nothing reads or writes device memory, as long as a drive takes for that."""
        for pool in self._pools:
            pool.restorer.drain()
            pool.spiller.drain()
        if self.host_tier is not None:
            self.host_tier.drain_copies()

    def reset(self) -> None:
        self.gate.reset()
        self._failures.clear()
        for pool in self._pools:
            pool.restorer.reset()
            pool.spiller.drain()
        # Only now: an action may have gone from one pool's queue to another's.
        for pool in self._pools:
            pool.spiller.drain()
            pool.spiller.results.clear()
        self._budget.clear()
        if self.host_tier is not None:
            self.host_tier.drain_copies()
        for pool in self._pools:
            if pool.host is not None:
                pool.host.results.clear()

    def move(self, open_store: OpenStore, within_s: float) -> bool:
        """Store to and restore from other stores from now on, when nothing is offered and nothing loaded. False when a
        drive that does not answer keeps one from being closed: nothing may be stored any more then. Raises
        PageStoreError, and changes nothing, where one cannot be opened."""
        opened: list[Store] = []
        try:
            for pool in self._pools:
                opened.append(open_store(pool.pool))
        except BaseException:
            for store in opened:
                store.close()
            raise
        moved = [pool.move(store, within_s) for pool, store in zip(self._pools, opened, strict=True)]
        for store, has_moved in zip(opened, moved, strict=True):
            if not has_moved:
                store.close()
        return all(moved)

    def finish_spilling(self, within_s: float) -> None:
        """Store what is queued, as far as that can be done in so many seconds, and nothing more from then on."""
        until = time.monotonic() + within_s
        for pool in self._pools:
            pool.ended = pool.spiller.close(max(0.0, until - time.monotonic()))

    def close(self) -> None:
        """After `finish_spilling`. A store that a drive still writes to is left as it is."""
        for pool in self._pools:
            if pool.host is not None:
                pool.host.stop()
        if self.host_tier is not None:
            self.host_tier.end()
        for pool in self._pools:
            pool.restorer.close()
            if pool.shared is not None:
                pool.shared.close()
            if pool.replicas is not None:
                pool.replicas.close()
            if pool.ended and not self._scrubbing:
                pool.store.close()
        if self.host_tier is not None:
            self.host_tier.close()

    def describe(self) -> str:
        """For the log: what a page of each pool takes, and how many are stored."""
        return ", ".join(
            f"{pool.name.value} {pool.page_bytes:,} bytes ({pool.store.stats.pages} stored)" for pool in self._pools
        )

    def kept(self) -> dict[str, int]:
        """What is kept for requests, offers and prefetches at the moment, of all pools together: nothing when nothing
        runs."""
        kept = Counter(
            {"budgeted_offers": self._budget.kept, "gate_waits": self.gate.kept, "failed_restores": self._failures.kept}
        )
        for pool in self._pools:
            kept.update(pool.kept())
        return dict(kept)

    def stat(self) -> dict[str, Any]:
        """The counters of full attention, and below ``pools`` those of the others by name; what waits is everyone's."""
        if not self._pools:
            return {
                "store": dataclasses.asdict(StoreStats()),
                "spill": {**dataclasses.asdict(SpillStats()), "pages_refused": 0, "waiting": 0},
                "restore": dataclasses.asdict(RestoreStats()),
                "host": {**dataclasses.asdict(HostStats()), "bound": 0, "used": 0},
                "shared": dataclasses.asdict(SharedStats()),
                "pools": {},
            }
        full, *windowed = self._pools
        stat = full.stat()
        stat["restore"]["forward_wait_s"] = self.gate.waited_s
        stat["spill"]["pages_refused"] = self._pages_refused
        stat["spill"]["waiting"] = sum(pool.spiller.waiting for pool in self._pools)
        tier = self.host_tier
        stat["host"] |= {"bound": tier.memory.n_bytes, "used": tier.memory.used} if tier else {"bound": 0, "used": 0}
        return {**stat, "pools": {pool.name.value: pool.stat() for pool in windowed}}


def chunk_bytes(device: torch.device) -> int:
    """How much is read at a time for pages on ``device``."""
    return _CHUNK_BYTES if device.type == "cpu" else _CHUNK_BYTES_ACCELERATOR


def keys_of(transfer: PoolTransfer) -> PageKeys:
    return PageKeys.from_hex(transfer.keys)


def _offered(
    pool: _StoredPool, transfer: PoolTransfer | None, lane: CopyLane | None = None
) -> tuple[PageKeys, torch.Tensor | PageNumbers]:
    """What of a transfer is to be copied out of the device, on ``lane``."""
    if transfer is None:
        return PageKeys(), torch.empty(0, dtype=torch.int64)
    keys = keys_of(transfer)
    if pool.window_pages is None:
        return keys, pool.device_pages.numbers_in(transfer.device_indices, lane or pool.device_pages.outbound)
    # What has left the window may have left the pool: its slots are those of the pool's empty first page.
    held = pool.device_pages.held_pages(transfer.device_indices)
    own = PageKeys.of(keys[position] for position, _ in held)
    return own, torch.tensor([number for _, number in held], dtype=torch.int64)


def _in_step(indices: set[int]) -> int:
    """The number that a batch has in every pool."""
    if len(indices) > 1:
        raise RuntimeError(f"the pools' batches are out of step: {sorted(indices)}")
    return indices.pop()


def _together(of_pools: Sequence[RestoredRequest]) -> RestoredRequest:
    """What a request got back from each pool, full attention first, whose pages count."""
    sources = frozenset().union(*(of_pool.sources for of_pool in of_pools))
    n_bytes, full = sum(of_pool.n_bytes for of_pool in of_pools), of_pools[0]
    return RestoredRequest(full.pages, n_bytes, sources, full.host_pages, full.shared_pages)


def _after(spiller: Spiller, action: Callable[[], None]) -> Callable[[], None]:
    return lambda: spiller.then(action)
