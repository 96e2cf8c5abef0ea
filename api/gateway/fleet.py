"""The engines that requests can go to, without asking SQL for each request."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from starlette.concurrency import run_in_threadpool

from agentstate.api.gateway.errors import Refusal
from agentstate.errors import DatabaseError
from agentstate.fleet import engines
from agentstate.fleet.placement import Server, servers, serves
from agentstate.sql.database import Database

FRESH_S = 1.0
# What is older is not used while SQL answers.
STALE_S = 5.0
# How long what was known is used while SQL does not answer.
REMEMBERED_S = 3600.0
# So many requests more than an idle engine's are no reason to leave the engine that has a prompt's beginning.
MORE = 4


class Fleet:
    """Used on one event loop. An engine is live while its heartbeat is at most ``engine_timeout_s`` old. Engines of an
    earlier release, which do not know a gateway's headers, are left out."""

    def __init__(self, database: Database, engine_timeout_s: float):
        self._database = database
        self._engine_timeout_s = engine_timeout_s
        self._known: list[Server] = []
        self._read_s = self._tried_s = float("-inf")
        self._reading = asyncio.Lock()
        self._refreshing: asyncio.Task[None] | None = None
        self._running: Counter[str] = Counter()

    async def live(self) -> list[Server]:
        """Raises DatabaseError if SQL has not answered for an hour."""
        await self._refresh()
        return self._known

    async def serving(self, model: str | None, prefix: str | None = None) -> list[Server]:
        """The engines that serve ``model``: without one, whatever all of them serve. The one to ask comes first: that
        with the fewest requests of this gateway, but for requests with the same ``prefix`` the same as long as it has
        not many more. Raises Refusal, DatabaseError."""
        if not self._known or self._age_s > STALE_S:
            await self._refresh()
        elif self._age_s > FRESH_S and (self._refreshing is None or self._refreshing.done()):
            self._refreshing = asyncio.create_task(self._refresh_unasked())
        try:
            return self._choose(model, prefix)
        except Refusal:
            # An engine may have come since.
            await self._refresh()
            return self._choose(model, prefix)

    def _choose(self, model: str | None, prefix: str | None) -> list[Server]:
        models = sorted({server.model for server in self._known})
        if not self._known:
            raise Refusal(503, "no_engine", "no engine is live: start one, or try again", retryable=True)
        if model is None:
            if len(models) > 1:
                raise Refusal(400, "model_missing", f"name a model: {', '.join(models)}", "model")
            model = models[0]
        found = [server for server in self._known if server.model == model]
        found = found or [server for server in self._known if serves(server, model)]
        if not found:
            raise Refusal(
                404, "model_not_found", f"no live engine serves {model!r}, only {', '.join(map(repr, models))}", "model"
            )
        found.sort(key=lambda server: self._running[server.base_url])
        if prefix is not None:
            home = max(found, key=lambda server: hashlib.sha256(f"{server.base_url}\0{prefix}".encode()).digest())
            if self._running[home.base_url] <= 2 * self._running[found[0].base_url] + MORE:
                found.sort(key=lambda server: server is not home)
        return found

    def forget(self) -> None:
        """Ask SQL again with the next request."""
        self._tried_s = float("-inf")

    @contextmanager
    def counted(self, base_url: str) -> Iterator[None]:
        """Counts a request at an engine."""
        self._running[base_url] += 1
        try:
            yield
        finally:
            self._running[base_url] -= 1
            if not self._running[base_url]:
                del self._running[base_url]

    async def close(self) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)

    @property
    def _age_s(self) -> float:
        return time.monotonic() - self._tried_s

    async def _refresh(self) -> None:
        """Ask SQL, unless that was done a moment ago."""
        if self._age_s > FRESH_S:
            async with self._reading:
                if self._age_s > FRESH_S:
                    await self._read()

    async def _refresh_unasked(self) -> None:
        with suppress(DatabaseError):  # who needs the answer asks again
            await self._refresh()

    async def _read(self) -> None:
        try:
            found = await run_in_threadpool(self._look_up)
        except DatabaseError:
            if time.monotonic() - self._read_s > REMEMBERED_S:
                raise
            self._tried_s = time.monotonic()
            return
        self._known = [server for server in found if server.takes_tokens]
        self._read_s = self._tried_s = time.monotonic()

    def _look_up(self) -> list[Server]:
        with self._database.read() as connection:
            found = servers(engines.live(connection, self._engine_timeout_s))
        # One of an engine's DP ranks stands for it: a turn's token names the right one.
        first: dict[str, Server] = {}
        for server in found:
            first.setdefault(server.base_url, server)
        return list(first.values())
