"""What all parts of sharing know of the rank whose pages they share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from agentstate.fleet.engines import Engine
from agentstate.fleet.erasures import StoreName
from agentstate.pages import PageKeys, PageStore
from agentstate.pages.pins import StoredExtent
from agentstate.sql.database import Database
from agentstate.tiers.pages import SharedPages

# How often it is asked what has changed.
FOLLOW_S = 1.0
# Rows that change appear in SQL later than their time says, by as long as a transaction takes.
OVERLAP_US = 60_000_000
# How many rows are read at a time.
BATCH = 256


class Pools(Protocol):
    """What is asked of the stores of a rank (`StoredPools`)."""

    @property
    def page_size(self) -> int: ...

    def shared_pages(self) -> list[tuple[PageStore, SharedPages]]: ...

    def chains(self, keys: Sequence[bytes]) -> Iterator[tuple[PageStore, SharedPages, PageKeys]]: ...

    def durable(self, keys: Sequence[bytes]) -> int: ...

    def published(self, keys: Sequence[bytes]) -> int: ...


@dataclass
class SharingStats:
    """Counters since the engine started: extents that were ``published``, of them ``new`` ones, and their ``bytes``;
    those that ``failed``, and those that were ``over_quota``; those that were ``deleted``. ``waiting`` are sessions
    whose KV is being published now. ``evicted`` are pages that somebody might have come back for, and that were evicted
    before they were published, where that is what they are published for."""

    published: int = 0
    new: int = 0
    bytes: int = 0
    failed: int = 0
    waiting: int = 0
    deleted: int = 0
    evicted: int = 0
    over_quota: int = 0


@dataclass(frozen=True)
class Context:
    """``engine`` is the rank as SQL knows it now. ``writer`` is the rank whose pages these are, if it is another."""

    database: Database
    pools: Pools
    engine: Callable[[], Engine]
    clock: Callable[[], float] = time.monotonic
    writer: int | None = None
    stats: SharingStats = field(default_factory=SharingStats)

    @property
    def rank(self) -> int:
        """Whose pages these are."""
        return self.engine().rank if self.writer is None else self.writer

    @property
    def writes(self) -> bool:
        """Whether these are the engine's own, which it publishes and deletes."""
        return self.rank == self.engine().rank

    @property
    def shard(self) -> str:
        return f"rank{self.rank}"

    @property
    def store(self) -> StoreName:
        engine = self.engine()
        return StoreName(engine.fingerprint, engine.rank, engine.node)

    def unpublished(self, keys: PageKeys) -> Iterator[tuple[SharedPages, StoredExtent]]:
        """The extents of this node that have pages of a chain which the shared store has not, from its head on."""
        for store, pages, needed in self.pools.chains(keys):
            where = zip(needed, store.stored(needed), pages.stored(needed), strict=True)
            missing = [key for key, here, there in where if here and not there]
            if not missing:
                continue
            try:
                pin = store.pin(missing)
            except KeyError:
                continue  # evicted just now
            with pin:
                for extent in dict.fromkeys(segment.extent for segment in pin.segments):
                    yield pages, extent
