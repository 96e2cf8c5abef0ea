"""The rows of one tenant's sessions: how they are found, locked, made and changed.

What `agentstate.sessions.verbs` builds its verbs from; each of these is a part of a verb's transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate import ids
from agentstate.errors import (
    RevisionStale,
    SessionExists,
    SessionExpired,
    SessionNotFound,
    ToolCallReused,
    TooManySessions,
)
from agentstate.fleet import manifests
from agentstate.fleet.placement import Stored
from agentstate.fleet.waits import Took
from agentstate.sessions import branches, leases, salts, toolcalls, transcript
from agentstate.sessions.history import History
from agentstate.sessions.leases import LeaseKey
from agentstate.sessions.outcomes import Appended, Session, ToolCall
from agentstate.sessions.transcript import Entry, NewEntry
from agentstate.sql.database import insert, now_us
from agentstate.sql.models import SessionStatus, session_turns
from agentstate.sql.models import leases as leases_table
from agentstate.sql.models import quotas as quotas_table
from agentstate.sql.models import sessions as table
from agentstate.sql.models import tenants as tenants_table
from agentstate.sql.prepared import Prepared

# Statements that every request runs are built once: building one takes longer than running it.
_named = sa.and_(table.c.tenant == sa.bindparam("of_tenant"), table.c.name == sa.bindparam("called"))
_LOCK = Prepared(sa.select(table, now_us().label("time_us")).where(_named).with_for_update(key_share=True))
_CHANGE = (
    sa.update(table)
    .where(table.c.id == sa.bindparam("uid"))
    .values(revision=table.c.revision + 1, updated_us=now_us())
    .returning(*table.c)
)
_LIMIT = sa.select(quotas_table.c.sessions).where(quotas_table.c.account == sa.bindparam("account"))
# Whether there is one too many: of rows, which the index tells alone, and of sessions, which it does not.
_ROW_BEYOND = (
    sa.select(sa.literal(1))
    .where(table.c.tenant == sa.bindparam("of_tenant"))
    .limit(1)
    .offset(sa.bindparam("most", type_=sa.BigInteger()))
)
_SESSION_BEYOND = _ROW_BEYOND.where(
    table.c.deleted_us.is_(None), sa.or_(table.c.expires_us.is_(None), table.c.expires_us > now_us())
)


@cache
def _making(dialect: str, names: frozenset[str], expires: bool, branched: bool) -> Prepared:
    """Makes a session of values of these ``names``."""
    default_s = (
        sa.select(tenants_table.c.expires_in_s).where(tenants_table.c.id == sa.bindparam("of_tenant")).scalar_subquery()
    )
    after_us = (
        sa.bindparam("ttl_us", type_=sa.BigInteger()) if expires else sa.cast(default_s * 1_000_000, sa.BigInteger)
    )
    return Prepared(
        insert(dialect, table)
        .values(
            status=SessionStatus.IDLE.value,
            revision=1,
            created_us=now_us(),
            updated_us=now_us(),
            expires_us=now_us() + after_us,
            **({"branched_us": now_us()} if branched else {}),
        )
        .on_conflict_do_nothing(index_elements=["tenant", "name"])
        .returning(*table.c, _LIMIT.scalar_subquery().label("most"))
    )


# The revision that a caller has seen, several of which any will do, or None for any at all.
Seen = int | Collection[int] | None


class Rows:
    """The rows of ``tenant``'s sessions. ``took`` is told, in the transaction, how long tool calls took that are given
    their results."""

    def __init__(self, tenant: str, took: Callable[[Sequence[Took]], None] | None = None):
        self.tenant = tenant
        self._took = took

    def find(self, connection: Connection, session_id: str) -> Any:
        """A session's row, with the status that holds now."""
        return self._existing(_FIND.first(connection, {"of_tenant": self.tenant, "called": session_id}), session_id)

    def lock(self, connection: Connection, session_id: str, revision: Seen = None) -> Any:
        """A session's row as stored, which nobody else changes before this transaction ends."""
        row = self._existing(_LOCK.first(connection, {"of_tenant": self.tenant, "called": session_id}), session_id)
        seen = {revision} if isinstance(revision, int) else revision
        if seen is not None and row.revision not in seen:
            shown = " or ".join(map(str, sorted(seen)))
            raise RevisionStale(
                f"session {session_id} is at revision {row.revision}, not {shown}: reload it", revision=row.revision
            )
        return row

    def _existing(self, row: Any, session_id: str) -> Any:
        if row is None or row.deleted_us is not None:
            raise SessionNotFound(f"there is no session {session_id}")
        if row.expires_us is not None and row.expires_us <= row.time_us:
            raise SessionExpired(f"session {session_id} has expired", revision=row.revision)
        return row

    def make(
        self, connection: Connection, *, expires_in_s: float | None, branched: bool = False, **values: Any
    ) -> Session:
        """Make a session, in the scope of KV that the tenant's sessions have now (`salts`). Without ``expires_in_s`` it
        expires as the tenant's do. Raises SessionExists, TooManySessions."""
        values["tenant"] = self.tenant
        values["account"] = salts.scope_of_tenant(self.tenant)
        values["kv_scope"] = salts.scope_of(connection, self.tenant)
        if expires_in_s is None:
            values["of_tenant"] = self.tenant
        else:
            values["ttl_us"] = round(expires_in_s * 1_000_000)
        making = _making(connection.dialect.name, frozenset(values), expires_in_s is not None, branched)
        row = making.first(connection, values)
        if row is None:
            # An id is free again once its session has expired, whether or not that was collected yet.
            expired = connection.execute(
                sa.select(table)
                .where(table.c.tenant == self.tenant, table.c.name == values["name"], table.c.expires_us <= now_us())
                .with_for_update(key_share=True)
            ).one_or_none()
            if expired is not None:
                branches.bury(connection, expired)
                row = making.first(connection, values)
        if row is None:
            raise SessionExists(f"the session id {values['name']} is taken: choose another, or resume that session")
        if row.most is not None:
            self._require_room(connection, values["account"])
        note_turn(connection, self.tenant, row.id)
        return session_of(row)

    def _require_room(self, connection: Connection, account: str) -> None:
        """Raises TooManySessions if the tenant has more sessions than it may."""
        # Others that are being made wait, or each of them would miss the others.
        most = connection.execute(_LIMIT.with_for_update(), {"account": account}).scalar()
        if most is None:
            return
        values = {"of_tenant": self.tenant, "most": most}
        if all(connection.execute(beyond, values).scalar() for beyond in (_ROW_BEYOND, _SESSION_BEYOND)):
            raise TooManySessions(
                f"tenant {self.tenant} may have {most:,} session(s): delete some, or wait until some expire"
            )

    def append(self, connection: Connection, before: Any, new: Sequence[NewEntry], time_us: int) -> Appended:
        appended: list[Entry] = []
        parent_id = before.head_entry
        for seq, entry in enumerate(new, before.next_seq):
            appended.append(
                Entry(
                    id=ids.new("ent"),
                    session_id=before.name,
                    parent_id=parent_id,
                    seq=seq,
                    kind=entry.kind,
                    content=entry.content,
                    call_id=entry.call_id,
                    created_us=time_us,
                )
            )
            parent_id = appended[-1].id
        steps = [step for entry in appended if (step := transcript.step(entry))]
        if steps:
            history = History.of(connection, before)
            took = toolcalls.record(connection, self.tenant, before.id, history, steps, time_us)
            if took and self._took is not None:
                self._took(took)
        open_calls = transcript.write(connection, self.tenant, before.id, appended, before.open_calls)
        session = change(
            connection, before.id, head_entry=parent_id, next_seq=appended[-1].seq + 1, open_calls=open_calls
        )
        return Appended(session, appended, open_calls)

    def tool_call(self, connection: Connection, row: Any, history: History, call: toolcalls.KnownCall) -> ToolCall:
        result = None
        if call.result_seq is not None:
            (entry,) = transcript.read(connection, row.name, history.between(call.result_seq, call.result_seq))
            result = entry.payload
        return ToolCall(
            id=call.call_id,
            name=call.name,
            state=call.state,
            expected_s=call.expected_s,
            typical_s=toolcalls.typical_s(connection, self.tenant, call.name),
            claimed_us=call.claimed_us,
            finished_us=call.finished_us,
            result=result,
            revision=row.revision,
        )

    def require_same_call(
        self, connection: Connection, row: Any, history: History, call: toolcalls.KnownCall, payload: dict[str, Any]
    ) -> None:
        """Raises ToolCallReused unless ``payload`` is that of ``call``, apart from its expected duration."""
        (entry,) = transcript.read(connection, row.name, history.between(call.call_seq, call.call_seq))
        if not all(transcript.alike(entry.payload.get(what), payload.get(what)) for what in ("name", "arguments")):
            raise ToolCallReused(
                f"the id {call.call_id!r} is that of a call of {call.name!r}, with other arguments or not of "
                f"{payload['name']!r}: give every call of a session an id of its own",
                revision=row.revision,
            )

    def require_turn(self, connection: Connection, row: Any, key: LeaseKey | None) -> int:
        """The database's time, if the caller may change the transcript: its lease is valid, or nobody has one."""
        if key is not None:
            return leases.require(connection, row.id, key, row.revision)
        leases.require_free(connection, row.id, row.revision)
        time_us: int = row.time_us
        return time_us


def current() -> sa.Select[Any]:
    """Sessions as they are now: the status of one whose lease has lapsed is ``idle``."""
    lapsed = sa.and_(
        table.c.status == SessionStatus.RUNNING, sa.func.coalesce(leases_table.c.expires_us, 0) <= now_us()
    )
    status = sa.case((lapsed, SessionStatus.IDLE.value), else_=table.c.status)
    others = [column for column in table.c if column.name != "status"]
    return sa.select(
        *others, status.label("status"), now_us().label("time_us"), leases_table.c.engine, leases_table.c.dp_rank
    ).select_from(table.outerjoin(leases_table))


_RUN = Prepared(_CHANGE.values(status=SessionStatus.RUNNING.value).where(leases.is_held(table.c.id)))
_FIND = Prepared(current().where(_named))
_SCOPE = Prepared(sa.select(table.c.id, table.c.kv_scope).where(table.c.id == sa.bindparam("uid")))


def stored(connection: Connection, row: Any, history: History) -> Stored:
    """What is stored of a session: its own pages or, until there are some, those from before its last branch."""
    return stored_later(connection, row, history)()


def stored_later(connection: Connection, row: Any, history: History) -> Callable[[], Stored]:
    """`stored`, asked now and answered later."""
    ancestors = [owner for owner in history.owners() if owner != row.id]
    if not ancestors:
        coverage = manifests.coverage_later(connection, row.id)
        return lambda: _stored(row, [row.id], coverage())
    owners = [row.id, *_in_scope(connection, row, ancestors)]
    found = manifests.coverage(connection, owners)
    return lambda: _stored(row, owners, found)


def _stored(row: Any, owners: Sequence[str], found: Sequence[manifests.Coverage]) -> Stored:
    own = [coverage for coverage in found if coverage.session_id == row.id and coverage.updated_us > row.branched_us]
    if own:
        return Stored(own)
    for owner in owners:
        of_owner = [coverage for coverage in found if coverage.session_id == owner]
        if of_owner:
            return Stored(of_owner, inherited=True)
    return Stored()


def _in_scope(connection: Connection, row: Any, owners: Sequence[str]) -> list[str]:
    """The ancestors whose pages a session finds: the keys of the others have another salt."""
    scopes: Sequence[Any]
    if len(owners) == 1:
        scopes = _SCOPE.all(connection, {"uid": owners[0]})
    else:
        scopes = connection.execute(sa.select(table.c.id, table.c.kv_scope).where(table.c.id.in_(owners))).all()
    same = {uid for uid, scope in scopes if scope == row.kv_scope}
    return [owner for owner in owners if owner in same]


def change(connection: Connection, uid: str, *, expires_in_s: float | None = None, **values: Any) -> Session:
    """Change a session, its expiry too if ``expires_in_s`` from now is given."""
    if any(isinstance(value, sa.ColumnElement) for value in values.values()):
        return session_of(connection.execute(_CHANGE.values(values), {"uid": uid}).one())
    return change_later(connection, uid, expires_in_s=expires_in_s, **values)()


def change_later(
    connection: Connection, uid: str, *, expires_in_s: float | None = None, **values: Any
) -> Callable[[], Session]:
    """`change` to values that SQL does not compute, asked now and answered later."""
    expiry = {} if expires_in_s is None else {"expiry_us": round(expires_in_s * 1_000_000)}
    changing = _changing(frozenset(values), bool(expiry))
    sent = changing.send(connection, {"uid": uid, **values, **expiry})
    return lambda: session_of(sent.first())


def run_later(connection: Connection, uid: str, token: str) -> Callable[[], Session]:
    """Note that a session is being run, if its lease is that of ``token``: asked now, and answered later, if it is."""
    shown = {"uid": uid, "hash": LeaseKey(token, 0).token_hash}
    sent = _RUN.send(connection, shown)
    return lambda: session_of(sent.first())


@cache
def _changing(names: frozenset[str], expiry: bool) -> Prepared:
    """Changes the columns with these names, and the expiry."""
    new: dict[str, Any] = {name: sa.bindparam(name, type_=table.c[name].type) for name in names}
    if expiry:
        new["expires_us"] = now_us() + sa.bindparam("expiry_us", type_=sa.BigInteger())
    return Prepared(_CHANGE.values(new))


def note_turn(connection: Connection, tenant: str, uid: str) -> None:
    """Note that a session's turn ends now, or that it is made."""
    _turned(connection.dialect.name).send(connection, {"uid": uid, "of_tenant": tenant})


@cache
def _turned(dialect: str) -> Prepared:
    now = {"turned_us": now_us()}
    values = {"session_id": sa.bindparam("uid"), "tenant": sa.bindparam("of_tenant"), **now}
    statement = insert(dialect, session_turns).values(values)
    return Prepared(statement.on_conflict_do_update(index_elements=["session_id"], set_=now))


def session_of(row: Any) -> Session:
    return Session(
        id=row.name,
        uid=row.id,
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


def from_now(seconds: float | None) -> Any:
    return None if seconds is None else now_us() + round(seconds * 1_000_000)
