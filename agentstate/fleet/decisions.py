"""What engines have decided about sessions, as one service has read it.

An engine keeps its newest decisions in memory, a bounded number. A service reads what is new of them at most every
`READ_S`, whoever asks and how often, and each caller sees those about its own sessions.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate.errors import EngineError, EngineRefused
from agentstate.fleet.engines import Engine
from agentstate.sql.models import sessions

READ_S = 0.5
MOST = 4096  # of an engine
MAX_ENGINES = 100
LOOKED_UP = 500
LATEST_US = 2**53

Ask = Callable[[Engine, int], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Decision:
    """``id`` is the time in microseconds since the epoch, larger than of every decision before; ``session`` the uid.
    What was decided, and its outcomes, are `control.DECISIONS`."""

    id: int
    session: str
    decision: str
    outcome: str
    tokens: int
    index: float | None
    displaced: float | None


def decision(said: dict[str, Any]) -> Decision:
    """One as an engine says it. Raises EngineRefused if that is none."""
    try:
        index, displaced = (None if said[name] is None else float(said[name]) for name in ("index", "displaced"))
        session, decided, outcome = (str(said[name]) for name in ("session", "decision", "outcome"))
        if not 0 <= said["id"] <= LATEST_US:
            raise ValueError(f"{said['id']} is no time")
        return Decision(int(said["id"]), session, decided, outcome, int(said["tokens"]), index, displaced)
    except (KeyError, TypeError, ValueError) as error:
        raise EngineRefused(f"the engine says a decision that is none: {error!r}") from error


@dataclass
class _Read:
    """What has been read of one engine, the newest last, up to the decision with the id ``last``; if the last reading
    failed, why (``silent``)."""

    mutex: threading.Lock = field(default_factory=threading.Lock)
    kept: deque[Decision] = field(default_factory=lambda: deque(maxlen=MOST))
    last: int = 0
    read_s: float = float("-inf")
    silent: str | None = None


class Decisions:
    """Thread-safe. ``ask`` asks a rank for its decisions after an id, and raises EngineError."""

    def __init__(self, ask: Ask, clock: Callable[[], float] = time.monotonic):
        self._ask = ask
        self._clock = clock
        self._mutex = threading.Lock()
        self._engines: OrderedDict[str, _Read] = OrderedDict()

    def of(self, rank: Engine) -> tuple[list[Decision], str | None]:
        """The known decisions of a rank, the oldest first, and why it did not say more when it was last asked."""
        with self._mutex:
            read = self._engines.setdefault(rank.id, _Read())
            self._engines.move_to_end(rank.id)
            while len(self._engines) > MAX_ENGINES:
                self._engines.popitem(last=False)
        with read.mutex:
            if self._clock() - read.read_s >= READ_S:
                # Whoever does not answer is not asked again at once either.
                read.read_s, read.silent = self._clock(), None
                try:
                    self._read(rank, read)
                except EngineError as error:
                    read.silent = str(error)
            return list(read.kept), read.silent

    def _read(self, rank: Engine, read: _Read) -> None:
        more = True
        while more:
            said = self._ask(rank, read.last)
            found = said.get("decisions")
            if not isinstance(found, list):
                raise EngineRefused("the engine does not say its decisions")
            newer = [one for one in map(decision, found) if one.id > read.last]
            read.kept.extend(newer)
            read.last = max((one.id for one in newer), default=read.last)
            more = bool(said.get("more")) and bool(newer)


def names(connection: Connection, tenant: str, uids: Iterable[str]) -> dict[str, str]:
    """Of these sessions, by their uids, how the tenant calls those that are its own."""
    return {uid: of["name"] for uid, of in named(connection, uids).items() if of["tenant"] == tenant}


def named(connection: Connection, uids: Iterable[str]) -> dict[str, dict[str, str]]:
    """Of these sessions, by their uids, the ``tenant`` and its ``name`` of each that is not deleted. For operators."""
    asked = sorted(set(uids))
    found: dict[str, dict[str, str]] = {}
    for first in range(0, len(asked), LOOKED_UP):
        some = sa.select(sessions.c.id, sessions.c.tenant, sessions.c.name).where(
            sessions.c.id.in_(asked[first : first + LOOKED_UP]), sessions.c.deleted_us.is_(None)
        )
        found.update((row.id, {"tenant": row.tenant, "name": row.name}) for row in connection.execute(some))
    return found
