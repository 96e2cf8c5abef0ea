"""What all viewers see of the fleet at a time: taken once for all of them, and only while somebody looks.

A page takes the newest snapshot; while streams are open, one is taken every ``PERIOD_S``. An engine is asked once a
snapshot, whoever looks and however many pages are open.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from starlette.concurrency import run_in_threadpool

from agentstate.api.console import reading
from agentstate.api.console.reading import Counts, SharedStore
from agentstate.api.service import Service
from agentstate.errors import DatabaseError, EngineError
from agentstate.fleet import engines
from agentstate.fleet.engines import Engine
from agentstate.sql.database import instant, now_us

logger = logging.getLogger(__name__)

PERIOD_S = 2.0
# Of one that is older, a page waits for the next. With several workers, of one that is older than ``PERIOD_S``: the
# page before may have been another worker's.
STALE_S = 10.0
# An engine that is overloaded is not waited for.
ASK_S = 1.0
# A busy engine may miss a question: it is said to be silent after this.
SILENT_S = 10.0
MOST_ENGINES = 64


@dataclass(frozen=True)
class Rank:
    """A registered rank. ``stat`` is what it said of itself last, empty if it has not said anything; ``silent`` is why
    it says nothing more."""

    engine: Engine
    live: bool
    stat: Mapping[str, Any] = field(default_factory=dict)
    silent: str | None = None

    def get(self, *path: str) -> Any:
        """A value of the stat; None where there is none: engines of other releases say more or less."""
        found: Any = self.stat
        for name in path:
            found = found.get(name) if isinstance(found, Mapping) else None
        return found

    def number(self, *path: str) -> float:
        found = self.get(*path)
        return found if isinstance(found, int | float) and not isinstance(found, bool) else 0

    @property
    def off(self) -> str | None:
        """Why it stores nothing."""
        found = self.get("off")
        return str(found) if found else None


@dataclass(frozen=True)
class Server:
    """The ranks that answer under one base URL, the first one first. Rates are those since the snapshot before."""

    ranks: tuple[Rank, ...]
    restores_per_s: float | None = None
    bytes_per_s: float | None = None

    @property
    def first(self) -> Rank:
        return self.ranks[0]

    @property
    def live(self) -> bool:
        return all(rank.live for rank in self.ranks)

    @property
    def off(self) -> str | None:
        return next((rank.off for rank in self.ranks if rank.off), None)

    @property
    def silent(self) -> str | None:
        return next((rank.silent for rank in self.ranks if rank.silent), None)

    def total(self, *path: str) -> float:
        return sum(rank.number(*path) for rank in self.ranks)


@dataclass(frozen=True)
class Snapshot:
    """Everything is as of ``taken``, by the database's clock. ``more`` engines are registered than are shown."""

    number: int
    taken: datetime
    servers: Sequence[Server]
    more: int
    stores: Sequence[SharedStore]

    def seen_by(self, account: str) -> Snapshot:
        """What a tenant sees: of what engines say of themselves, whether they store and what is its own account's.
        Counters are of all tenants, and tell one what the others do."""

        def of_rank(rank: Rank) -> Rank:
            own = {account: of} if (of := rank.get("accounts", account)) is not None else {}
            return replace(rank, stat={"off": rank.off, "accounts": own} if rank.stat else {})

        servers = [Server(tuple(of_rank(rank) for rank in server.ranks)) for server in self.servers]
        return replace(self, servers=servers)

    def server_of(self, engine_id: str) -> Server | None:
        return next((one for one in self.servers if any(rank.engine.id == engine_id for rank in one.ranks)), None)

    def hits(self) -> dict[str, int]:
        """Tokens of prompts by where they came from, since the engines started."""
        found: dict[str, int] = {}
        for server in self.servers:
            hits = server.first.get("served", "hits")
            for of_gap in hits.values() if isinstance(hits, Mapping) else ():
                for tier, counted in of_gap.items() if isinstance(of_gap, Mapping) else ():
                    if isinstance(counted, Mapping) and isinstance(counted.get("tokens"), int):
                        found[str(tier)] = found.get(str(tier), 0) + counted["tokens"]
        return found


class Snapshots:
    """Used on one event loop."""

    def __init__(self, service: Service):
        self._service = service
        self._alone = service.settings.workers == 1
        self._newest: Snapshot | None = None
        self._taken_s = float("-inf")
        self._taking: asyncio.Task[Snapshot] | None = None
        self._loop_task: asyncio.Task[None] | None = None
        self._waiters: set[asyncio.Event] = set()
        self._counts: dict[str, tuple[float, Counts]] = {}
        self._said: dict[str, tuple[float, Mapping[str, Any]]] = {}
        self.closing = False

    async def newest(self) -> Snapshot:
        """A snapshot that is at most ``STALE_S`` old, or ``PERIOD_S`` beside other workers. Raises DatabaseError."""
        age_s = asyncio.get_running_loop().time() - self._taken_s
        if self._newest is not None and age_s < PERIOD_S:
            return self._newest
        taking = self._take()
        if self._newest is not None and age_s < (STALE_S if self._alone else PERIOD_S):
            return self._newest
        return await asyncio.shield(taking)

    async def counts(self, tenant: str) -> Counts:
        """A tenant's sessions, counted at most every ``PERIOD_S``. Raises DatabaseError."""
        now_s = asyncio.get_running_loop().time()
        at_s, found = self._counts.get(tenant, (float("-inf"), None))
        if found is None or now_s - at_s >= PERIOD_S:
            found = await run_in_threadpool(self._count, tenant)
            if len(self._counts) > 1000:
                self._counts.clear()
            self._counts[tenant] = (now_s, found)
        return found

    @contextmanager
    def watch(self) -> Iterator[asyncio.Event]:
        """An event that is set with each snapshot, and when the service ends."""
        changed = asyncio.Event()
        self._waiters.add(changed)
        if self._loop_task is None:
            self._loop_task = asyncio.create_task(self._run())
        try:
            yield changed
        finally:
            self._waiters.discard(changed)

    @property
    def watching(self) -> int:
        return len(self._waiters)

    def close(self) -> None:
        """End the streams."""
        self.closing = True
        for waiter in self._waiters:
            waiter.set()

    async def _run(self) -> None:
        try:
            while self._waiters and not self.closing:
                try:
                    await asyncio.shield(self._take())
                except DatabaseError as error:
                    logger.warning("the console sees nothing new for now: %s", error)
                else:
                    for waiter in self._waiters:
                        waiter.set()
                await asyncio.sleep(PERIOD_S)
        finally:
            self._loop_task = None

    def _take(self) -> asyncio.Task[Snapshot]:
        if self._taking is None:
            self._taking = asyncio.create_task(self._taken())
            self._taking.add_done_callback(self._over)
        return self._taking

    def _over(self, task: asyncio.Task[Snapshot]) -> None:
        self._taking = None
        if not task.cancelled():
            task.exception()  # whoever waits for it has it

    async def _taken(self) -> Snapshot:
        taken_us, registered, live, stores = await run_in_threadpool(self._read)
        shown = registered[:MOST_ENGINES]
        ranks = await asyncio.gather(*(self._rank(rank, rank.id in live) for rank in shown))
        self._said = {rank.engine.id: said for rank in ranks if (said := self._said.get(rank.engine.id)) is not None}
        by_url: dict[str, list[Rank]] = {}
        for rank in ranks:
            by_url.setdefault(rank.engine.base_url, []).append(rank)
        now_s = asyncio.get_running_loop().time()
        servers = [
            self._with_rates(tuple(sorted(of_url, key=lambda rank: rank.engine.rank)), now_s)
            for of_url in by_url.values()
        ]
        number = 1 if self._newest is None else self._newest.number + 1
        self._newest = Snapshot(number, instant(taken_us), servers, len(registered) - len(shown), stores)
        self._taken_s = now_s
        return self._newest

    def _with_rates(self, ranks: tuple[Rank, ...], now_s: float) -> Server:
        server = Server(ranks)
        before = None if self._newest is None else self._newest.server_of(ranks[0].engine.id)
        seconds = now_s - self._taken_s
        if before is None or not 0 < seconds < STALE_S or server.silent or before.silent:
            return server
        restores = server.total("restore", "restores") - before.total("restore", "restores")
        read = sum(
            server.total("restore", name) - before.total("restore", name) for name in ("bytes_read", "bytes_host")
        )
        return Server(ranks, max(0.0, restores) / seconds, max(0.0, read) / seconds)

    async def _rank(self, engine: Engine, live: bool) -> Rank:
        if not live:
            return Rank(engine, live)
        try:
            said = await asyncio.wrap_future(self._service.operations.stat(engine, ASK_S))
        except (EngineError, RuntimeError) as error:
            said_s, known = self._said.get(engine.id, (float("-inf"), {}))
            silent = asyncio.get_running_loop().time() - said_s >= SILENT_S
            return Rank(engine, live, known, str(error) if silent else None)
        self._said[engine.id] = (asyncio.get_running_loop().time(), said)
        return Rank(engine, live, said)

    def _read(self) -> tuple[int, list[Engine], set[str], list[SharedStore]]:
        with self._service.database.read() as connection:
            taken_us: int = connection.execute(sa.select(now_us())).scalar_one()
            registered = engines.registered(connection)
            live = engines.live(connection, self._service.settings.engine_timeout_s)
            return taken_us, registered, {rank.id for rank in live}, reading.stores(connection)

    def _count(self, tenant: str) -> Counts:
        with self._service.database.read() as connection:
            return reading.counts(connection, tenant)
