"""Waits: how long sessions pause between two requests. The service learns it, and tells engines what it expects.

A wait begins when a turn ends, or when a tool call is claimed in one, and ends with the session's next request. `Waits`
hears of both from the verbs, once they are committed. What they tell is only noted, so no request waits for it; one
thread learns, forecasts, and hands a message a wait to `fleet.operations`.

What is learned of a tenant (`lookahead.durations`: names of tools and heads of commands, never arguments or contents)
is in SQL, and survives a restart. Every few seconds what was learned here is added to it, so several services learn
together.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import Any, Protocol

import sqlalchemy as sa

from agentstate.errors import DatabaseError
from agentstate.fleet import engines
from agentstate.fleet.engines import Engine
from agentstate.fleet.operations import Operations
from agentstate.fleet.placement import named
from agentstate.lookahead.calibration import Calibration
from agentstate.lookahead.durations import OTHER, PERSON, Durations
from agentstate.lookahead.forecast import EDGES, LONGEST_S, Forecast
from agentstate.sql.database import Database, insert, now_us
from agentstate.sql.models import durations as table
from agentstate.sql.models import leases

logger = logging.getLogger(__name__)

SAVE_S = 5.0
# How long what others have learned may go unread.
REFRESH_S = 60.0
# How long notes are gathered.
PAUSE_S = 0.02
MAX_NOTES = 10_000
MAX_TENANTS = 1_000
MAX_FORECASTS = 256  # of a tenant
# Sessions whose engine, or whose wait, is remembered: half a kilobyte each.
MAX_SESSIONS = 50_000
MAX_ENGINES = 1_000
LOOKED_UP = 500
HOUR_S = 3600.0
TRIES = 5


class Activity(StrEnum):
    """What a person does before going on with a session."""

    TYPING = "typing"
    OPENED = "opened"  # the session, to read in it


FORECASTS = {
    Activity.TYPING: Forecast.exactly(5.0, sigma=1.0),
    Activity.OPENED: Forecast.exactly(20.0, sigma=1.5),
}
NOW = Forecast.exactly(0.5, sigma=1.0)
"""What was waited for is there."""
NEVER = Forecast.exactly(float("inf"))


@dataclass(frozen=True)
class Took:
    """A wait that is over: how long it took by the database's clock, which may have been set back, and how long it was
    announced to take. ``tool`` is a tool's name, `PERSON` or `OTHER`."""

    tool: str
    head: str
    seconds: float
    announced_s: float | None = None


@dataclass(frozen=True, slots=True)
class Awaited:
    """Something that a session waits for, since ``age_s``."""

    tool: str
    head: str = ""
    announced_s: float | None = None
    age_s: float = 0.0


class Hearing(Protocol):
    """Whoever is told what happens to sessions: ``session`` is the uid, ``rank`` the engine's rank 0 if it is known.
    Nobody waits for what becomes of it, and nothing is raised."""

    def begun(self, tenant: str, session: str, awaited: Sequence[Awaited], rank: Engine | None = None) -> None:
        """The session waits until all of ``awaited`` are there; for its next request alone if that is empty."""

    def expected(self, tenant: str, session: str, forecast: Forecast, kind: str, rank: Engine | None = None) -> None:
        """The session's next request is expected like this, whatever has been learned."""

    def released(self, tenant: str, session: str, rank: Engine | None = None) -> None:
        """Nobody comes back to the session."""

    def over(self, session: str, rank: Engine | None) -> None:
        """The session's next request has come, and goes to this engine."""

    def took(self, tenant: str, waits: Sequence[Took]) -> None:
        """Learn from waits that are over."""


@dataclass
class _Learned:
    """What is known of a tenant's waits: as of ``version`` in SQL, and what came since."""

    durations: Durations
    version: int
    read_s: float
    changed: bool = False
    # Forecasts are made anew once something was learned; that of a name is asked for many times in between.
    forecasts: dict[tuple[str, str, float | None], Forecast] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A session waits for all of ``awaited`` since ``since_s``, when it was forecast; ``waited_s`` of that had passed
    then. The forecast is ``packed``, as engines get it: unpacked it takes fifty times as much memory."""

    tenant: str
    awaited: Sequence[Awaited]
    kind: str
    packed: bytes
    waited_s: float
    since_s: float

    @property
    def forecast(self) -> Forecast:
        return Forecast.unpack(self.packed)

    def took(self, now_s: float) -> float:
        """How long the wait has lasted, that began before it was forecast."""
        return self.waited_s + max(0.0, now_s - self.since_s)


@dataclass(slots=True)
class _Session:
    """``rank`` is that of the last request, ``waiting`` what has not come yet; None if not known here."""

    rank: Engine | None = None
    waiting: _Waiting | None = None


class Waits:
    """The waits of all sessions, as one service sees them: a `Hearing`. Thread-safe; no method waits for SQL or an
    engine, and none raises. An engine is live while its heartbeat is at most ``engine_timeout_s`` old. Close it to end
    its thread; what was learned is in SQL then.
    """

    def __init__(
        self,
        database: Database,
        operations: Operations,
        engine_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        calibration: Calibration | None = None,
    ):
        self._database = database
        self._operations = operations
        self._engine_timeout_s = engine_timeout_s
        self._clock = clock
        self._notes: deque[Callable[[], None]] = deque()
        self._noted = threading.Event()
        self._closing = threading.Event()
        self._learned: OrderedDict[str, _Learned] = OrderedDict()
        # Who waits here stays for a day: those that are not back by then teach that, too.
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self._engines: OrderedDict[str, Engine] = OrderedDict()  # each rank once, by its id
        # How true forecasts came: of all tenants together, so that none learns of another's.
        self.calibration = Calibration() if calibration is None else calibration
        self._saved_s = self._swept_s = clock()
        self._thread = threading.Thread(target=self._run, name="agentstate-waits", daemon=True)
        self._thread.start()

    # --- what happens to sessions (`Hearing`)

    def begun(self, tenant: str, session: str, awaited: Sequence[Awaited], rank: Engine | None = None) -> None:
        since_s = self._clock()
        self._note(lambda: self._begin(tenant, session, awaited, rank, since_s))

    def expected(self, tenant: str, session: str, forecast: Forecast, kind: str, rank: Engine | None = None) -> None:
        since_s = self._clock()
        self._note(lambda: self._foresee(tenant, session, forecast, 0.0, kind, rank, since_s))

    def released(self, tenant: str, session: str, rank: Engine | None = None) -> None:
        self._note(lambda: self._release(tenant, session, rank))

    def over(self, session: str, rank: Engine | None) -> None:
        ended_s = self._clock()
        self._note(lambda: self._end(session, rank, ended_s))

    def took(self, tenant: str, waits: Sequence[Took]) -> None:
        self._note(lambda: self._learn(tenant, waits))

    def settle(self) -> None:
        """Wait until all that was said before is learned, in SQL if that answers, and on its way to the engines."""
        done = threading.Event()

        def settled() -> None:
            try:
                self._sweep_if_due()
                self._save()
            finally:
                done.set()

        self._notes.append(settled)
        self._noted.set()
        done.wait()

    def close(self) -> None:
        self._closing.set()
        self._noted.set()
        self._thread.join()

    def _note(self, note: Callable[[], None]) -> None:
        # Who cannot keep up forgets: waits are guesses.
        if len(self._notes) < MAX_NOTES:
            self._notes.append(note)
            if not self._noted.is_set():
                self._noted.set()

    # --- on the thread

    def _run(self) -> None:
        while not self._closing.is_set():
            if self._noted.wait(SAVE_S):
                # Whoever notes something is to go on: waking up for every note would take the interpreter from it.
                self._closing.wait(PAUSE_S)
                self._noted.clear()
            while self._notes:
                self._guarded(self._notes.popleft())
            self._guarded(self._sweep_if_due)
            if self._clock() - self._saved_s >= SAVE_S:
                self._guarded(self._save)
        while self._notes:
            self._guarded(self._notes.popleft())
        self._guarded(self._save)

    @staticmethod
    def _guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except DatabaseError as error:
            logger.warning("what is known of waits is not told or kept for now: %s", error)
        except Exception:
            logger.exception("a wait is not followed")

    def _begin(
        self, tenant: str, session: str, awaited: Sequence[Awaited], rank: Engine | None, since_s: float
    ) -> None:
        forecast, waited_s = self._forecast(tenant, awaited)
        kind = _kind({one.tool for one in awaited})
        waiting = _Waiting(tenant, tuple(awaited), kind, forecast.pack(), waited_s, since_s)
        self._session(session).waiting = waiting
        self._foresee(tenant, session, forecast, waited_s, kind, rank, since_s)

    def _forecast(self, tenant: str, awaited: Sequence[Awaited]) -> tuple[Forecast, float]:
        """What to expect, and how much of that has passed."""
        if not awaited:
            return NOW, 0.0
        known = self._known(tenant)
        forecasts = []
        for one in awaited:
            key = one.tool, one.head, one.announced_s
            if key not in known.forecasts:
                if len(known.forecasts) >= MAX_FORECASTS:
                    known.forecasts.clear()
                known.forecasts[key] = known.durations.forecast(*key)
            forecasts.append(known.forecasts[key])
        ages_s = [max(0.0, one.age_s) for one in awaited]
        if len(forecasts) == 1:
            return forecasts[0], ages_s[0]
        if max(ages_s) > min(ages_s):
            forecasts = [_rest(forecast, age_s) for forecast, age_s in zip(forecasts, ages_s, strict=True)]
            ages_s = [0.0]
        return Forecast.after_all(forecasts), ages_s[0]

    def _foresee(
        self,
        tenant: str,
        session: str,
        forecast: Forecast,
        waited_s: float,
        kind: str,
        rank: Engine | None,
        since_s: float,
    ) -> None:
        packed = forecast.pack()

        def arguments() -> dict[str, Any]:
            waited_ms = max(0.0, waited_s + self._clock() - since_s) * 1000
            return {"session": session, "forecast": packed, "waited_ms": round(waited_ms), "kind": kind}

        if (rank := self._rank_of(session, rank)) is not None:
            self._operations.tell(tenant, session, rank, "foresee", arguments)

    def _release(self, tenant: str, session: str, rank: Engine | None) -> None:
        if (known := self._sessions.get(session)) is not None:
            known.waiting = None
        if (rank := self._rank_of(session, rank)) is not None:
            self._operations.tell(tenant, session, rank, "release", lambda: {"session": session})

    def _end(self, session: str, rank: Engine | None, ended_s: float) -> None:
        known = self._sessions.pop(session, None)
        wait = None if known is None else known.waiting
        if wait is not None and wait.awaited:
            self.calibration.ended(wait.kind, wait.forecast, wait.took(ended_s), wait.waited_s)
        self._operations.untell(session)
        if rank is not None:
            self._remember_rank(session, rank)

    def _learn(self, tenant: str, waits: Sequence[Took]) -> None:
        known = self._known(tenant)
        for one in waits:
            scores = known.durations.observe(one.tool, one.head, one.seconds, one.announced_s)
            if scores is not None:
                self.calibration.scored(_kind({one.tool}), *scores)
        known.changed = True

    def _rank_of(self, session: str, rank: Engine | None) -> Engine | None:
        """The rank to tell. One that is not known here had its turn at another service."""
        if rank is None and (known := self._sessions.get(session)) is not None:
            rank = known.rank
        if rank is None:
            with self._database.read() as connection:
                row = connection.execute(
                    sa.select(leases.c.engine, leases.c.dp_rank).where(leases.c.session_id == session)
                ).one_or_none()
                server = None
                if row is not None and row.engine:
                    server = named(row.engine, row.dp_rank, engines.live(connection, self._engine_timeout_s))
            rank = server.ranks[0] if server else None
        if rank is not None:
            self._remember_rank(session, rank)
        return rank

    def _remember_rank(self, session: str, rank: Engine) -> None:
        # Each look-up in SQL makes another object of the same rank: all sessions share the first.
        shared = self._engines.setdefault(rank.id, rank)
        self._engines.move_to_end(rank.id)
        if len(self._engines) > MAX_ENGINES:
            self._engines.popitem(last=False)
        self._session(session).rank = shared

    def _session(self, session: str) -> _Session:
        """What is remembered of a session, from now on."""
        known = self._sessions.setdefault(session, _Session())
        self._sessions.move_to_end(session)
        if len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)
        return known

    def _sweep_if_due(self) -> None:
        """Learn from those who have not been back for a day, here or at another service."""
        now_s = self._clock()
        if now_s - self._swept_s < HOUR_S:
            return
        self._swept_s = now_s
        waiting = ((session, known.waiting) for session, known in self._sessions.items() if known.waiting is not None)
        late = [(session, wait) for session, wait in waiting if now_s - wait.since_s > LONGEST_S]
        for first in range(0, len(late), LOOKED_UP):
            some = dict(late[first : first + LOOKED_UP])
            with self._database.read() as connection:
                back = connection.execute(
                    sa.select(leases.c.session_id).where(
                        leases.c.session_id.in_(list(some)),
                        sa.or_(
                            leases.c.token_hash.is_not(None),
                            leases.c.released_us > now_us() - round(LONGEST_S * 1_000_000),
                        ),
                    )
                )
                here = set(back.scalars())
            for session, wait in some.items():
                del self._sessions[session]
                if session not in here and wait.awaited:
                    self.calibration.ended(wait.kind, wait.forecast, None, wait.waited_s)
                    known = self._known(wait.tenant)
                    known.changed = True
                    for one in wait.awaited:
                        known.durations.observe(one.tool, one.head, None, one.announced_s)

    # --- what is known, in memory and in SQL

    def _known(self, tenant: str) -> _Learned:
        known = self._learned.get(tenant)
        if known is None:
            known = self._learned[tenant] = _Learned(Durations(), 0, float("-inf"))
            while len(self._learned) > MAX_TENANTS:
                oldest, gone = self._learned.popitem(last=False)
                with suppress(DatabaseError):
                    self._save_tenant(oldest, gone)
        self._learned.move_to_end(tenant)
        if not known.changed and self._clock() - known.read_s > REFRESH_S:
            known.read_s = self._clock()
            # If SQL does not answer, what is known will do.
            with suppress(DatabaseError):
                self._read(tenant, known)
        return known

    def _read(self, tenant: str, known: _Learned) -> None:
        """Know what SQL has."""
        with self._database.read() as connection:
            row = connection.execute(_READ, {"of_tenant": tenant, "known": known.version}).one_or_none()
        if row is not None:
            known.version = row.version
            known.forecasts.clear()
            _load(known.durations, tenant, row.learned)

    def _save(self) -> None:
        self._saved_s = self._clock()
        for tenant, known in self._learned.items():
            if known.changed:
                self._save_tenant(tenant, known)

    def _save_tenant(self, tenant: str, known: _Learned) -> None:
        """Add what was learned here to what SQL has. That is written if nobody else wrote meanwhile, so nothing is
        locked while it is being worked out."""
        for _ in range(TRIES):
            changes = known.durations.changes()
            if changes is None:
                known.changed = False
                return
            dumped = known.durations.dump()
            if self._write(tenant, known.version, dumped):
                known.version += 1
                known.durations.load(dumped)
                known.forecasts.clear()
                known.changed = False
                return
            # Others have learned as well: theirs, and what was learned here since.
            with self._database.read() as connection:
                row = connection.execute(_READ, {"of_tenant": tenant, "known": -1}).one_or_none()
            together = Durations()
            if row is not None:
                _load(together, tenant, row.learned)
            together.merge(changes)
            dumped = together.dump()
            version = 0 if row is None else row.version
            if self._write(tenant, version, dumped):
                known.version = version + 1
                known.durations.load(dumped)
                known.forecasts.clear()
                known.changed = False
                return

    def _write(self, tenant: str, version: int, dumped: bytes) -> bool:
        """Whether it was written: SQL had ``version``, 0 for none."""
        values = {"of_tenant": tenant, "known": version, "dumped": dumped}
        with self._database.write() as connection:
            if version:
                return connection.execute(_UPDATE, values).rowcount == 1
            first = insert(connection.dialect.name, table).values(
                tenant=tenant, learned=dumped, version=1, updated_us=now_us()
            )
            made = connection.execute(first.on_conflict_do_nothing().returning(table.c.version))
            return made.one_or_none() is not None


def _kind(tools: Collection[str]) -> str:
    """What is waited for, of `control.KINDS`."""
    return "person" if tools == {PERSON} else "other" if tools == {OTHER} else "tool"


def _load(durations: Durations, tenant: str, learned: bytes) -> None:
    try:
        durations.load(bytes(learned))
    except ValueError as error:
        logger.warning("what was learned of tenant %s's waits cannot be read, and is learned anew: %s", tenant, error)


def _rest(forecast: Forecast, age_s: float) -> Forecast:
    """What remains of a wait that has lasted ``age_s``; all of it if it has lasted longer than was possible."""
    if age_s <= 0:
        return forecast
    below = [*(forecast.by(age_s + edge) for edge in EDGES), 1.0]
    mass = [max(0.0, upper - lower) for lower, upper in pairwise(below)]
    return Forecast.from_mass(mass) if sum(mass) > 1e-9 else forecast


_of_tenant = table.c.tenant == sa.bindparam("of_tenant")
_READ = sa.select(table.c.learned, table.c.version).where(_of_tenant, table.c.version != sa.bindparam("known"))
_UPDATE = (
    sa.update(table)
    .where(_of_tenant, table.c.version == sa.bindparam("known"))
    .values(learned=sa.bindparam("dumped"), version=table.c.version + 1, updated_us=now_us())
)
