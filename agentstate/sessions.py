"""Sessions: the durable identity of an agent, its transcript, and who runs it.

Every verb is one short transaction with a constant number of indexed statements, whatever the length of the history.
Verbs that change a session lock its row first (SQLite locks the whole database), so the changes of one session follow
each other and ``seq`` has no gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate import engines, ids, leases, manifests, toolcalls
from agentstate.database import Database, insert, now_us
from agentstate.engines import Engine
from agentstate.errors import (
    EntryNotFound,
    InvalidEntry,
    ModelMismatch,
    SessionExists,
    SessionExpired,
    SessionNotFound,
    ToolInFlight,
)
from agentstate.kv import KvOutlook, choose_engine, outlook
from agentstate.leases import Lease, LeaseKey
from agentstate.models import EntryKind, SessionStatus
from agentstate.models import entries as entries_table
from agentstate.models import leases as leases_table
from agentstate.models import sessions as sessions_table

MAX_JSON_DEPTH = 64  # well within what every JSON reader and writer takes


class SuspendReason(StrEnum):
    TOOL_WAIT = "tool_wait"
    USER_WAIT = "user_wait"
    DONE = "done"  # nothing is expected any more: refused while a tool call is claimed


class Order(StrEnum):
    ASCENDING = "asc"
    DESCENDING = "desc"


@dataclass(frozen=True)
class Session:
    """A session as of one moment. ``revision`` grows with every change; times are microseconds, UTC."""

    id: str
    model: str
    metadata: dict[str, Any]
    cache_salt: str | None
    extra_key: str | None
    status: SessionStatus
    head_id: str | None
    revision: int
    created_us: int
    updated_us: int
    expires_us: int | None


@dataclass(frozen=True)
class NewEntry:
    """An entry to append.

    The payload is a JSON object. That of a tool call holds ``name`` and may hold ``arguments`` and ``expected_s``;
    that of a tool result holds either ``output`` or ``error``; both have a ``call_id``. Others are the caller's own.
    """

    kind: EntryKind
    payload: dict[str, Any]
    call_id: str | None = None


@dataclass(frozen=True)
class Entry:
    """An appended entry. ``seq`` numbers the entries of its session from 1 without gaps."""

    id: str
    session_id: str
    parent_id: str | None
    seq: int
    kind: EntryKind
    payload: dict[str, Any]
    call_id: str | None
    created_us: int


@dataclass(frozen=True)
class EntryPage:
    """A run of entries; ``has_more`` says whether the history goes on beyond its end, for a tail before its start."""

    entries: list[Entry]
    has_more: bool


@dataclass(frozen=True)
class Appended:
    session: Session
    entries: list[Entry]


@dataclass(frozen=True)
class Suspended:
    """``ranks`` are the live ranks of the engine that has the session's KV: who to ask whether it is durable."""

    session: Session
    pending_tool_calls: list[str]
    ranks: list[Engine]


@dataclass(frozen=True)
class Resumed:
    """All that the next turn needs; ``engine`` is None when no live engine serves the session's model."""

    session: Session
    lease: Lease
    tail: EntryPage
    pending_tool_calls: list[str]
    engine: Engine | None
    kv: KvOutlook


class Sessions:
    """The verbs of sessions on one database.

    An engine is live while its heartbeat is at most ``engine_timeout_s`` old. Every method raises DatabaseError, and
    those that name a session raise SessionNotFound and SessionExpired.
    """

    def __init__(self, database: Database, engine_timeout_s: float):
        self._database = database
        self._engine_timeout_s = engine_timeout_s

    def create(
        self,
        model: str,
        *,
        session_id: str | None = None,
        metadata: dict[str, Any] | None = None,
        cache_salt: str | None = None,
        extra_key: str | None = None,
        expires_in_s: float | None = None,
    ) -> Session:
        """A new session, under an id of the caller's if it brings one. Raises SessionExists, InvalidEntry."""
        _check_json(metadata or {}, "metadata")
        session_id = session_id or ids.new("ses")
        with self._database.write() as connection:
            row = connection.execute(
                insert(connection, sessions_table)
                .values(
                    id=session_id,
                    model=model,
                    metadata=metadata or {},
                    cache_salt=cache_salt,
                    extra_key=extra_key,
                    status=SessionStatus.IDLE,
                    next_seq=1,
                    revision=1,
                    created_us=now_us(),
                    updated_us=now_us(),
                    expires_us=_from_now(expires_in_s),
                )
                .on_conflict_do_nothing(index_elements=["id"])
                .returning(*sessions_table.c)
            ).one_or_none()
        if row is None:
            raise SessionExists(f"the session id {session_id} is taken: choose another, or resume that session")
        return _session(row)

    def read(self, session_id: str) -> Session:
        """A session as it is now; one whose lease has lapsed is not ``running`` any more."""
        with self._database.read() as connection:
            return _session(_find(connection, session_id))

    def entries(
        self, session_id: str, *, after: str | None = None, limit: int = 100, order: Order = Order.ASCENDING
    ) -> EntryPage:
        """At most ``limit`` entries by ``seq``, those that follow the entry ``after`` in the given order.

        Raises EntryNotFound when ``after`` is no entry of the session.
        """
        seq = entries_table.c.seq
        query = sa.select(entries_table).where(entries_table.c.session_id == session_id)
        with self._database.read() as connection:
            _find(connection, session_id)
            if after is not None:
                at = connection.execute(
                    sa.select(seq).where(entries_table.c.id == after, entries_table.c.session_id == session_id)
                ).scalar()
                if at is None:
                    raise EntryNotFound(f"session {session_id} has no entry {after}")
                query = query.where(seq > at if order is Order.ASCENDING else seq < at)
            query = query.order_by(seq if order is Order.ASCENDING else seq.desc()).limit(limit + 1)
            found = [_entry(row) for row in connection.execute(query)]
        return EntryPage(found[:limit], has_more=len(found) > limit)

    def append(self, session_id: str, key: LeaseKey, new: Sequence[NewEntry]) -> Appended:
        """Append entries, all or none, and record the tool calls and results among them.

        Raises LeaseLost; InvalidEntry when ``new`` is empty or one of them does not fit the transcript.
        """
        if not new:
            raise InvalidEntry("there is nothing to append: give one entry or more")
        for entry in new:
            _check_entry(entry)
        with self._database.write() as connection:
            before = _lock(connection, session_id)
            time_us = leases.require(connection, session_id, key, before.revision)
            appended: list[Entry] = []
            parent_id = before.head_entry
            for seq, entry in enumerate(new, before.next_seq):
                appended.append(
                    Entry(
                        id=ids.new("ent"),
                        session_id=session_id,
                        parent_id=parent_id,
                        seq=seq,
                        kind=entry.kind,
                        payload=entry.payload,
                        call_id=entry.call_id,
                        created_us=time_us,
                    )
                )
                parent_id = appended[-1].id
            toolcalls.record(connection, session_id, [step for entry in appended if (step := _step(entry))])
            connection.execute(sa.insert(entries_table), [vars(entry) for entry in appended])
            session = _change(connection, session_id, head_entry=parent_id, next_seq=appended[-1].seq + 1)
        return Appended(session, appended)

    def resume(self, session_id: str, *, lease_ttl_s: float, tail: int, expect_model: str | None = None) -> Resumed:
        """Take the session's lease and give back all that its next turn needs, in one transaction.

        The tail is the newest ``tail`` entries, and more where it would separate a tool result from its call; with
        ``tail`` 0 it is empty. When the lease is taken over from a runner that vanished, the tool calls that it had
        claimed become ``unknown``. Raises SessionBusy while another lease is valid, and ModelMismatch when the
        session is not of ``expect_model``; then nothing has changed. Asks no engine.
        """
        with self._database.write() as connection:
            before = _lock(connection, session_id)
            if expect_model is not None and expect_model != before.model:
                raise ModelMismatch(
                    f"session {session_id} runs {before.model!r}, not {expect_model!r} as expected",
                    revision=before.revision,
                )
            lease = leases.take(connection, session_id, lease_ttl_s, before.revision)
            if before.status == SessionStatus.RUNNING:  # its lease was not released: it lapsed
                toolcalls.abandon(connection, session_id)
            session = _change(connection, session_id, status=SessionStatus.RUNNING)
            coverage = manifests.latest(connection, session_id)
            live = engines.live(connection, self._engine_timeout_s)
            engine = choose_engine(session.model, coverage, live)
            return Resumed(
                session=session,
                lease=lease,
                tail=_tail(connection, session_id, before.next_seq, tail),
                pending_tool_calls=toolcalls.pending(connection, session_id),
                engine=engine,
                kv=outlook(session.model, coverage, engine, live),
            )

    def suspend(
        self, session_id: str, key: LeaseKey, reason: SuspendReason, *, expires_in_s: float | None = None
    ) -> Suspended:
        """End a turn: release the lease and tell whom to ask for the durability of the KV.

        ``expires_in_s``, counted from now, replaces the session's expiry. Raises LeaseLost, and ToolInFlight when the
        reason is ``done`` while a tool call is claimed. Nothing of the KV is known to be durable by this alone.
        """
        with self._database.write() as connection:
            before = _lock(connection, session_id)
            leases.release(connection, session_id, key, before.revision)
            running = toolcalls.in_flight(connection, session_id) if reason is SuspendReason.DONE else []
            if running:
                raise ToolInFlight(
                    f"session {session_id} waits for tool calls {', '.join(running)}: append their results first, "
                    "or suspend with reason tool_wait",
                    revision=before.revision,
                )
            expiry = {} if expires_in_s is None else {"expires_us": _from_now(expires_in_s)}
            session = _change(connection, session_id, status=SessionStatus.SUSPENDED, **expiry)
            live = engines.live(connection, self._engine_timeout_s)
            engine = choose_engine(session.model, manifests.latest(connection, session_id), live)
            return Suspended(
                session=session,
                pending_tool_calls=toolcalls.pending(connection, session_id),
                ranks=[rank for rank in live if engine is not None and rank.base_url == engine.base_url],
            )

    def renew(self, session_id: str, key: LeaseKey, *, lease_ttl_s: float) -> Lease:
        """Keep a lease: it lapses ``lease_ttl_s`` from now. Raises LeaseLost."""
        with self._database.write() as connection:
            before = _lock(connection, session_id)
            return leases.renew(connection, session_id, key, lease_ttl_s, before.revision)


def _find(connection: Connection, session_id: str) -> Any:
    """A session's row, with the status that holds now."""
    lapsed = sa.and_(
        sessions_table.c.status == SessionStatus.RUNNING,
        sa.func.coalesce(leases_table.c.expires_us, 0) <= now_us(),
    )
    status = sa.case((lapsed, SessionStatus.IDLE.value), else_=sessions_table.c.status)
    others = [column for column in sessions_table.c if column.name != "status"]
    row = connection.execute(
        sa.select(*others, status.label("status"), now_us().label("time_us"))
        .select_from(sessions_table.outerjoin(leases_table))
        .where(sessions_table.c.id == session_id)
    ).one_or_none()
    return _existing(row, session_id)


def _lock(connection: Connection, session_id: str) -> Any:
    """A session's row as stored, which nobody else changes before this transaction ends."""
    row = connection.execute(
        sa.select(sessions_table, now_us().label("time_us")).where(sessions_table.c.id == session_id).with_for_update()
    ).one_or_none()
    return _existing(row, session_id)


def _existing(row: Any, session_id: str) -> Any:
    if row is None:
        raise SessionNotFound(f"there is no session {session_id}")
    if row.expires_us is not None and row.expires_us <= row.time_us:
        raise SessionExpired(f"session {session_id} has expired", revision=row.revision)
    return row


def _change(connection: Connection, session_id: str, **values: Any) -> Session:
    row = connection.execute(
        sa.update(sessions_table)
        .where(sessions_table.c.id == session_id)
        .values(**values, revision=sessions_table.c.revision + 1, updated_us=now_us())
        .returning(*sessions_table.c)
    ).one()
    return _session(row)


def _tail(connection: Connection, session_id: str, next_seq: int, length: int) -> EntryPage:
    if length == 0:
        return EntryPage([], has_more=next_seq > 1)
    rows = connection.execute(
        sa.select(entries_table)
        .where(
            entries_table.c.session_id == session_id,
            entries_table.c.seq >= toolcalls.whole_from(session_id, max(1, next_seq - length)),
        )
        .order_by(entries_table.c.seq)
    )
    found = [_entry(row) for row in rows]
    return EntryPage(found, has_more=bool(found) and found[0].seq > 1)


def _session(row: Any) -> Session:
    return Session(
        id=row.id,
        model=row.model,
        metadata=row._mapping["metadata"],
        cache_salt=row.cache_salt,
        extra_key=row.extra_key,
        status=SessionStatus(row.status),
        head_id=row.head_entry,
        revision=row.revision,
        created_us=row.created_us,
        updated_us=row.updated_us,
        expires_us=row.expires_us,
    )


def _entry(row: Any) -> Entry:
    return Entry(**{**row._mapping, "kind": EntryKind(row.kind)})


def _step(entry: Entry) -> toolcalls.Claim | toolcalls.Finish | None:
    if entry.call_id is None:
        return None
    if entry.kind is EntryKind.TOOL_CALL:
        name, expected_s = entry.payload["name"], entry.payload.get("expected_s")
        return toolcalls.Claim(entry.call_id, name, expected_s, entry.seq)
    return toolcalls.Finish(entry.call_id, "error" in entry.payload, entry.seq)


def _check_entry(entry: NewEntry) -> None:
    _check_json(entry.payload, f"the payload of a {entry.kind}")
    if entry.kind not in (EntryKind.TOOL_CALL, EntryKind.TOOL_RESULT):
        if entry.call_id is not None:
            raise InvalidEntry(f"a {entry.kind} has no call_id, {entry.call_id!r} was given")
        return
    if not entry.call_id:
        raise InvalidEntry(f"a {entry.kind} needs a call_id")
    if entry.kind is EntryKind.TOOL_RESULT:
        if ("output" in entry.payload) == ("error" in entry.payload):
            raise InvalidEntry(f"the result of tool call {entry.call_id!r} needs either output or error in its payload")
        return
    name, expected_s = entry.payload.get("name"), entry.payload.get("expected_s")
    if not isinstance(name, str) or not name or "\0" in name:
        raise InvalidEntry(f"tool call {entry.call_id!r} needs the tool's name in its payload")
    if expected_s is not None and (
        isinstance(expected_s, bool) or not isinstance(expected_s, int | float) or not 0 <= expected_s < math.inf
    ):
        raise InvalidEntry(f"tool call {entry.call_id!r}: expected_s is not a number of seconds: {expected_s!r}")


def _check_json(value: dict[str, Any], what: str) -> None:
    # Python's JSON takes two things in that no database and no client gives back: NaN and lone surrogates.
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidEntry(f"{what} is not JSON: {error}") from None
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise InvalidEntry(f"{what} is nested deeper than {MAX_JSON_DEPTH} levels")


def _from_now(seconds: float | None) -> Any:
    return None if seconds is None else now_us() + round(seconds * 1_000_000)
