"""Notices: what engines are told and nobody waits for.

The newest notice about a session replaces one that has not been sent. Tenants take turns, and each has a bounded number
of notices that wait, so a flood of one delays no other. An engine that does not know the verb, being of an earlier
release, is not told it again; one that does not answer is left alone for a while.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from agentstate.errors import EngineRefused, EngineUnreachable
from agentstate.fleet.engines import Engine

logger = logging.getLogger(__name__)

# How long an engine may take to answer, and how long it is then told nothing.
ANSWER_S = 1.0
QUIET_S = 10.0
SENDERS = 4
MAX_OF_TENANT = 1_000
MAX_ENGINES = 1_000

Call = Callable[[str, str | None, str, float, dict[str, Any]], Awaitable[dict[str, Any]]]


@dataclass(frozen=True)
class Notice:
    """What one rank is told. ``arguments`` are made when it is sent."""

    rank: Engine
    verb: str
    arguments: Callable[[], dict[str, Any]]


class Notices:
    """Sends with ``call``: address, secret, verb, timeout in seconds, arguments. Used on one event loop. ``told``
    counts what became of notices: the state that an engine answered with, ``unknown`` (it does not know the verb),
    ``refused``, ``unreachable``, or ``dropped`` (too many waited); ``on_told`` is called with each of these."""

    def __init__(self, call: Call, on_told: Callable[[str], None] = lambda state: None):
        self.told: Counter[str] = Counter()
        self._call = call
        self._on_told = on_told
        self._waiting: OrderedDict[str, OrderedDict[str, Notice]] = OrderedDict()
        self._tenant_of: dict[str, str] = {}
        self._senders: set[asyncio.Task[None]] = set()
        self._quiet_until_s: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._closed = False

    def add(self, tenant: str, session: str, notice: Notice) -> None:
        self.remove(session)
        if self._closed:
            return
        of_tenant = self._waiting.setdefault(tenant, OrderedDict())
        if len(of_tenant) >= MAX_OF_TENANT:
            dropped, _ = of_tenant.popitem(last=False)
            del self._tenant_of[dropped]
            self._count("dropped")
        of_tenant[session] = notice
        self._tenant_of[session] = tenant
        if len(self._senders) < SENDERS:
            sender = asyncio.create_task(self._send())
            self._senders.add(sender)
            sender.add_done_callback(self._senders.discard)

    def remove(self, session: str) -> None:
        """Do not send what has not been sent about a session."""
        tenant = self._tenant_of.pop(session, None)
        if tenant is not None:
            of_tenant = self._waiting[tenant]
            del of_tenant[session]
            if not of_tenant:
                del self._waiting[tenant]

    def close(self) -> None:
        """Send no more."""
        self._closed = True
        self._waiting.clear()
        self._tenant_of.clear()

    @property
    def waiting(self) -> int:
        """How many notices have not been answered."""
        return len(self._tenant_of) + len(self._senders)

    def _count(self, state: str) -> None:
        self.told[state] += 1
        self._on_told(state)

    async def _send(self) -> None:
        while self._waiting:
            tenant, of_tenant = next(iter(self._waiting.items()))
            session, notice = next(iter(of_tenant.items()))
            self.remove(session)
            if tenant in self._waiting:
                self._waiting.move_to_end(tenant)
            try:
                self._count(await self._tell(notice))
            except Exception:
                logger.exception("an engine is not told of a session")

    async def _tell(self, notice: Notice) -> str:
        rank, verb = notice.rank, notice.verb
        for quiet in ((rank.id, verb), (rank.id, "")):
            if self._quiet_until_s.get(quiet, 0.0) > time.monotonic():
                return "unreachable" if quiet[1] == "" else "unknown"
        try:
            answer = await self._call(rank.control_address, rank.control_secret, verb, ANSWER_S, notice.arguments())
        except EngineUnreachable as error:
            logger.info("engine %s is told nothing for %g s: %s", rank.id, QUIET_S, error)
            self._quiet(rank.id, "", time.monotonic() + QUIET_S)
            return "unreachable"
        except EngineRefused as error:
            if "unknown verb" not in str(error):
                logger.warning("engine %s: %s", rank.id, error)
                return "refused"
            self._quiet(rank.id, verb, float("inf"))
            return "unknown"
        return str(answer.get("state"))

    def _quiet(self, engine: str, verb: str, until_s: float) -> None:
        self._quiet_until_s[engine, verb] = until_s
        if len(self._quiet_until_s) > MAX_ENGINES:
            self._quiet_until_s.popitem(last=False)
