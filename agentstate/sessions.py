"""Sessions: the durable identity of an agent, its transcript, and who runs it.

Every verb is one short transaction with a constant number of indexed statements, whatever the length of the history.
Verbs that change a session lock its row first (SQLite locks the whole database), so the changes of one session follow
each other and ``seq`` has no gaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate import branches, engines, ids, leases, manifests, toolcalls, transcript
from agentstate.database import Database, insert, now_us
from agentstate.engines import Engine
from agentstate.errors import (
    EventsTrimmed,
    ModelMismatch,
    RevisionStale,
    SessionExists,
    SessionExpired,
    SessionNotFound,
    ToolCallClaimed,
    ToolCallFinal,
    ToolCallNotFound,
    ToolCallUnknown,
    ToolInFlight,
)
from agentstate.history import History
from agentstate.kv import KvOutlook, Server, Stored, choose, outlook
from agentstate.leases import Lease, LeaseKey
from agentstate.models import EntryKind, SessionStatus, ToolCallState
from agentstate.models import leases as leases_table
from agentstate.models import sessions as table
from agentstate.models import tenants as tenants_table
from agentstate.transcript import Entry, EntryPage, NewEntry

DEFAULT_TENANT = "default"


class SuspendReason(StrEnum):
    TOOL_WAIT = "tool_wait"
    USER_WAIT = "user_wait"
    DONE = "done"  # nothing is expected any more: refused while a tool call is claimed


class Order(StrEnum):
    ASCENDING = "asc"
    DESCENDING = "desc"


class Keep(StrEnum):
    """A value that is to stay as it is, where None means something else."""

    KEEP = "keep"


@dataclass(frozen=True)
class Session:
    """A session as of one moment. ``revision`` grows with every change; times are microseconds, UTC.

    ``id`` is what clients call it; ``uid`` is what engines know it by, and what no other session ever has.
    """

    id: str
    uid: str
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
class SessionPage:
    sessions: list[Session]
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
    engine: Server | None
    kv: KvOutlook


@dataclass(frozen=True)
class ToolCall:
    """A tool call; ``result`` is the payload of its result, once it is done or has failed.

    ``typical_s`` is the median of what the tool took before, in this tenant's sessions; None where nothing is known.
    """

    id: str
    name: str
    state: ToolCallState
    expected_s: float | None
    typical_s: float | None
    claimed_us: int
    finished_us: int | None
    result: dict[str, Any] | None
    revision: int


@dataclass(frozen=True)
class Claimed:
    """``fresh`` when the caller shall execute the call now; else it has a result already."""

    call: ToolCall
    fresh: bool


@dataclass(frozen=True)
class PagesOfSession:
    """Where the pages of a session can be brought back: the ranks, and of each the ordered keys that it stores."""

    session: Session
    ranks: Sequence[Engine]
    keys: Sequence[bytes]  # packed, one string a rank


class Sessions:
    """The verbs of one tenant's sessions on one database.

    An engine is live while its heartbeat is at most ``engine_timeout_s`` old. Every method raises DatabaseError, and
    those that name a session raise SessionNotFound, also for another tenant's, and SessionExpired. Where a method
    takes the ``revision`` that the caller has seen, it raises RevisionStale when there is a newer one.
    """

    def __init__(self, database: Database, engine_timeout_s: float, tenant: str = DEFAULT_TENANT):
        self._database = database
        self._engine_timeout_s = engine_timeout_s
        self._tenant = tenant

    def of(self, tenant: str) -> Self:
        """The sessions of another tenant."""
        return type(self)(self._database, self._engine_timeout_s, tenant)

    # --- sessions as a whole

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
        """A new session, under an id of the caller's if it brings one. Without ``expires_in_s`` it expires as the
        tenant's sessions do. Raises SessionExists, InvalidEntry."""
        transcript.check_metadata(metadata or {})
        uid = ids.new("ses")
        with self._database.write() as connection:
            return self._insert(
                connection,
                id=uid,
                name=session_id or uid,
                model=model,
                metadata=metadata or {},
                cache_salt=cache_salt,
                extra_key=extra_key,
                next_seq=1,
                expires_us=self._expiry(expires_in_s),
            )

    def read(self, session_id: str) -> Session:
        """A session as it is now; one whose lease has lapsed is not ``running`` any more."""
        with self._database.read() as connection:
            return _session(self._find(connection, session_id))

    def list(self, *, after: str | None = None, limit: int = 100, order: Order = Order.ASCENDING) -> SessionPage:
        """At most ``limit`` sessions by their id, those that follow ``after``, which need not exist any more.

        Ids that were not chosen by the caller sort by the time of their making. Expired sessions are left out.
        """
        name = table.c.name
        query = _current().where(
            table.c.tenant == self._tenant,
            table.c.deleted_us.is_(None),
            sa.or_(table.c.expires_us.is_(None), table.c.expires_us > now_us()),
        )
        if after is not None:
            query = query.where(name > after if order is Order.ASCENDING else name < after)
        query = query.order_by(name if order is Order.ASCENDING else name.desc()).limit(limit + 1)
        with self._database.read() as connection:
            found = [_session(row) for row in connection.execute(query)]
        return SessionPage(found[:limit], has_more=len(found) > limit)

    def update(
        self,
        session_id: str,
        revision: int | None,
        *,
        metadata: dict[str, Any] | None = None,
        expires_in_s: float | Keep | None = Keep.KEEP,
    ) -> Session:
        """Change the keys of ``metadata`` that are given, those with None go; and the expiry, None for never.

        Raises InvalidEntry.
        """
        with self._database.write() as connection:
            before = self._lock(connection, session_id, revision)
            changes: dict[str, Any] = {}
            if metadata is not None:
                merged = {**before._mapping["metadata"], **metadata}
                changes["metadata"] = {name: value for name, value in merged.items() if value is not None}
                transcript.check_metadata(changes["metadata"])
            if not isinstance(expires_in_s, Keep):
                changes["expires_us"] = _from_now(expires_in_s)
            return _change(connection, before.id, **changes)

    def delete(self, session_id: str, revision: int | None) -> None:
        """Delete a session; its id is free again at once. What forks share with it stays, the rest is collected later.

        Raises SessionBusy while somebody runs it.
        """
        with self._database.write() as connection:
            before = self._lock(connection, session_id, revision)
            leases.require_free(connection, before.id, before.revision)
            branches.bury(connection, before)

    # --- turns

    def resume(
        self,
        session_id: str,
        *,
        lease_ttl_s: float,
        tail: int,
        expect_model: str | None = None,
        revision: int | None = None,
        token: str | None = None,
    ) -> Resumed:
        """Take the session's lease and give back all that its next turn needs, in one transaction.

        The tail is the newest ``tail`` entries, and more where it would separate a tool result from its call; with
        ``tail`` 0 it is empty. When the lease is taken over from a runner that vanished, the tool calls that it had
        claimed become ``unknown``. ``token`` becomes the lease's secret. Raises SessionBusy while another lease is
        valid, and ModelMismatch when the session is not of ``expect_model``; then nothing has changed. Asks no
        engine.
        """
        with self._database.write() as connection:
            before = self._lock(connection, session_id, revision)
            if expect_model is not None and expect_model != before.model:
                raise ModelMismatch(
                    f"session {session_id} runs {before.model!r}, not {expect_model!r} as expected",
                    revision=before.revision,
                )
            lease = leases.take(connection, before.id, lease_ttl_s, before.revision, token=token)
            if before.status == SessionStatus.RUNNING:  # its lease was not released: it lapsed
                toolcalls.abandon(connection, before.id)
            session = _change(connection, before.id, status=SessionStatus.RUNNING)
            history = History.of(connection, before)
            stored = _stored(connection, before, history)
            live = engines.live(connection, self._engine_timeout_s)
            server = choose(session.model, stored, live)
            return Resumed(
                session=session,
                lease=lease,
                tail=transcript.tail(connection, before.name, history, tail),
                pending_tool_calls=toolcalls.pending(connection, before.id),
                engine=server,
                kv=outlook(session.model, stored, server, live),
            )

    def suspend(
        self,
        session_id: str,
        key: LeaseKey,
        reason: SuspendReason,
        *,
        expires_in_s: float | None = None,
        release_kv: bool = False,
    ) -> Suspended:
        """End a turn: release the lease and tell whom to ask for the durability of the KV.

        ``expires_in_s``, counted from now, replaces the session's expiry; ``release_kv`` forgets what is stored of
        its KV. Raises LeaseLost, and ToolInFlight when the reason is ``done`` while a tool call is claimed. Nothing
        of the KV is known to be durable by this alone.
        """
        with self._database.write() as connection:
            before = self._lock(connection, session_id)
            leases.release(connection, before.id, key, before.revision)
            running = toolcalls.in_flight(connection, before.id) if reason is SuspendReason.DONE else []
            if running:
                raise ToolInFlight(
                    f"session {session_id} waits for tool calls {', '.join(running)}: append their results first, "
                    "or suspend with reason tool_wait",
                    revision=before.revision,
                )
            expiry = {} if expires_in_s is None else {"expires_us": _from_now(expires_in_s)}
            session = _change(connection, before.id, status=SessionStatus.SUSPENDED, **expiry)
            live = engines.live(connection, self._engine_timeout_s)
            server = choose(session.model, _stored(connection, before, History.of(connection, before)), live)
            if release_kv:
                manifests.forget(connection, before.id)
            return Suspended(
                session=session,
                pending_tool_calls=toolcalls.pending(connection, before.id),
                ranks=list(server.ranks) if server else [],
            )

    def renew(self, session_id: str, key: LeaseKey, *, lease_ttl_s: float) -> Lease:
        """Keep a lease: it lapses ``lease_ttl_s`` from now. Raises LeaseLost."""
        with self._database.write() as connection:
            before = self._lock(connection, session_id)
            return leases.renew(connection, before.id, key, lease_ttl_s, before.revision)

    def pages(self, session_id: str) -> PagesOfSession:
        """The engine that the session would be resumed on, and which pages each of its ranks stores of it.

        Without an engine, or pages, there are none. Reads as many bytes as the manifests have.
        """
        with self._database.read() as connection:
            row = self._find(connection, session_id)
            stored = _stored(connection, row, History.of(connection, row))
            server = choose(row.model, stored, engines.live(connection, self._engine_timeout_s))
            ranks = server.ranks if server else ()
            keys = []
            for rank in ranks:
                of_rank = [
                    manifests.load(connection, found.session_id, found.fingerprint, found.rank, found.node)
                    for found in stored.coverage
                    if (found.fingerprint, found.node) == (rank.fingerprint, rank.node)
                ]
                keys.append(next((manifest.keys for manifest in of_rank if manifest), b""))
            return PagesOfSession(_session(row), ranks, keys)

    # --- the transcript

    def entries(
        self, session_id: str, *, after: str | None = None, limit: int = 100, order: Order = Order.ASCENDING
    ) -> EntryPage:
        """At most ``limit`` entries by ``seq``, those that follow the entry ``after`` in the given order.

        Raises EntryNotFound when ``after`` is no entry of the session.
        """
        with self._database.read() as connection:
            row = self._find(connection, session_id)
            rest = History.of(connection, row)
            if after is not None:
                at = transcript.find(connection, session_id, rest, after).seq
                rest = rest.between(at + 1, row.next_seq) if order is Order.ASCENDING else rest.between(1, at - 1)
            wanted = rest.oldest(limit) if order is Order.ASCENDING else rest.newest(limit)
            found = transcript.read(connection, session_id, wanted)
        if order is Order.DESCENDING:
            found.reverse()
        return EntryPage(found, has_more=rest.length > wanted.length)

    def since(self, session_id: str, seq: int, limit: int = 100) -> tuple[Session, EntryPage]:
        """The session, and the oldest entries of its history that come after ``seq``."""
        with self._database.read() as connection:
            row = self._find(connection, session_id)
            rest = History.of(connection, row).between(seq + 1, row.next_seq)
            wanted = rest.oldest(limit)
            found = transcript.read(connection, session_id, wanted)
            return _session(row), EntryPage(found, has_more=rest.length > wanted.length)

    def seen(self, session_id: str, seq: int) -> Session:
        """The session, for who has seen its entries up to ``seq``, 0 for none of them.

        Raises EventsTrimmed when that entry is not in its history, as after a rewind.
        """
        with self._database.read() as connection:
            row = self._find(connection, session_id)
            if seq and History.of(connection, row).owner_of(seq) is None:
                raise EventsTrimmed(f"entry {seq} is not in session {session_id}: read it again", revision=row.revision)
            return _session(row)

    def append(self, session_id: str, key: LeaseKey, new: Sequence[NewEntry]) -> Appended:
        """Append entries, all or none, and record the tool calls and results among them.

        Raises LeaseLost; InvalidEntry when ``new`` is empty or one of them does not fit the transcript.
        """
        branches.check(new)
        with self._database.write() as connection:
            before = self._lock(connection, session_id)
            time_us = leases.require(connection, before.id, key, before.revision)
            return self._append(connection, before, new, time_us)

    # --- branches

    def fork(
        self,
        session_id: str,
        revision: int | None,
        *,
        at: str | None = None,
        fork_id: str | None = None,
        metadata: dict[str, Any] | None = None,
        expires_in_s: float | None = None,
    ) -> Session:
        """A new session that has this one's history up to the entry ``at``, or all of it. Nothing is copied.

        It has the parent's model and namespace, and unless given its metadata. Raises EntryNotFound, SessionExists;
        NotABranchPoint where a tool call would be cut off from its result.
        """
        transcript.check_metadata(metadata or {})
        uid = ids.new("ses")
        with self._database.write() as connection:
            parent = self._lock(connection, session_id, revision)
            history = History.of(connection, parent)
            branch = branches.branch_at(connection, parent, history, at)
            session = self._insert(
                connection,
                id=uid,
                name=fork_id or uid,
                model=parent.model,
                metadata=parent._mapping["metadata"] if metadata is None else metadata,
                cache_salt=parent.cache_salt,
                extra_key=parent.extra_key,
                head_entry=branch.head_id,
                next_seq=branch.next_seq,
                own_seq=branch.next_seq,
                open_calls=branch.open_calls,
                branched_us=now_us(),
                expires_us=self._expiry(expires_in_s),
            )
            branch.history.close(connection, uid)
            if branch.open_calls:
                toolcalls.copy_open(connection, parent.id, uid)
            return session

    def rewind(self, session_id: str, revision: int | None, *, at: str, key: LeaseKey | None = None) -> Session:
        """Make the entry ``at`` the head again. The entries after it are taken back; their ``seq`` stay unused.

        Needs the lease while the session is being run. Raises SessionBusy, LeaseLost, EntryNotFound, NotABranchPoint;
        ToolInFlight while a tool call is claimed.
        """
        with self._database.write() as connection:
            before = self._lock(connection, session_id, revision)
            self._require_turn(connection, before, key)
            history = History.of(connection, before)
            branch = branches.branch_at(connection, before, history, at)
            if branch.head_id == before.head_entry:
                return _session(before)
            running = toolcalls.in_flight(connection, before.id)
            if running:
                raise ToolInFlight(
                    f"tool calls {', '.join(running)} are being executed: append their results first",
                    revision=before.revision,
                )
            toolcalls.take_back(connection, before.id)
            branches.mark_garbage(connection, history.owners())
            branch.history.close(connection, before.id)
            return _change(
                connection,
                before.id,
                head_entry=branch.head_id,
                own_seq=before.next_seq,
                open_calls=0,
                branched_us=now_us(),
            )

    # --- tool calls

    def claim(
        self,
        session_id: str,
        call_id: str,
        name: str,
        arguments: Any = None,
        *,
        expected_s: float | None = None,
        key: LeaseKey | None = None,
    ) -> Claimed:
        """Append a tool call before it is executed; of several claimants one is told to execute it.

        Needs the lease while the session is being run. Raises ToolCallClaimed, ToolCallUnknown, SessionBusy,
        LeaseLost, InvalidEntry.
        """
        payload = {"name": name, "arguments": arguments}
        if expected_s is not None:
            payload["expected_s"] = expected_s
        new = [NewEntry(EntryKind.TOOL_CALL, payload, call_id)]
        branches.check(new)
        with self._database.write() as connection:
            before = self._lock(connection, session_id)
            history = History.of(connection, before)
            found = toolcalls.known(connection, before.id, history, [call_id]).get(call_id)
            if found is not None and found.state is ToolCallState.CLAIMED:
                raise ToolCallClaimed(
                    f"tool call {call_id!r} is claimed: wait for its result", revision=before.revision
                )
            if found is not None and found.state is ToolCallState.UNKNOWN:
                raise ToolCallUnknown(
                    f"the claimant of tool call {call_id!r} vanished, it may have run or not: find out, and give it "
                    "a result",
                    revision=before.revision,
                )
            if found is not None:
                return Claimed(self._tool_call(connection, before, history, found), fresh=False)
            time_us = self._require_turn(connection, before, key)
            session = self._append(connection, before, new, time_us).session
            typical_s = toolcalls.typical_s(connection, self._tenant, name)
            call = ToolCall(
                call_id, name, ToolCallState.CLAIMED, expected_s, typical_s, time_us, None, None, session.revision
            )
            return Claimed(call, fresh=True)

    def finish(self, session_id: str, call_id: str, result: dict[str, Any], *, key: LeaseKey | None = None) -> ToolCall:
        """Append the result of a tool call: ``{"output": …}`` or ``{"error": …}``.

        Needs the lease while the session is being run, and none otherwise: a tool may end while its session is
        suspended. Raises ToolCallNotFound, ToolCallFinal, SessionBusy, LeaseLost, InvalidEntry.
        """
        new = [NewEntry(EntryKind.TOOL_RESULT, result, call_id)]
        branches.check(new)
        with self._database.write() as connection:
            before = self._lock(connection, session_id)
            time_us = self._require_turn(connection, before, key)
            history = History.of(connection, before)
            found = toolcalls.known(connection, before.id, history, [call_id]).get(call_id)
            if found is None:
                raise ToolCallNotFound(
                    f"session {session_id} has no tool call {call_id!r}: claim it first", revision=before.revision
                )
            if found.state not in toolcalls.OPEN:
                raise ToolCallFinal(f"tool call {call_id!r} has a result already", revision=before.revision)
            self._append(connection, before, new, time_us)
            after = self._lock(connection, session_id)
            history = History.of(connection, after)
            return self._tool_call(
                connection, after, history, toolcalls.known(connection, after.id, history, [call_id])[call_id]
            )

    # --- rows

    def _find(self, connection: Connection, session_id: str) -> Any:
        """A session's row, with the status that holds now."""
        return self._existing(
            connection.execute(
                _current().where(table.c.tenant == self._tenant, table.c.name == session_id)
            ).one_or_none(),
            session_id,
        )

    def _lock(self, connection: Connection, session_id: str, revision: int | None = None) -> Any:
        """A session's row as stored, which nobody else changes before this transaction ends."""
        row = self._existing(
            connection.execute(
                sa.select(table, now_us().label("time_us"))
                .where(table.c.tenant == self._tenant, table.c.name == session_id)
                .with_for_update(key_share=True)
            ).one_or_none(),
            session_id,
        )
        if revision is not None and revision != row.revision:
            raise RevisionStale(
                f"session {session_id} is at revision {row.revision}, not {revision}: reload it", revision=row.revision
            )
        return row

    def _existing(self, row: Any, session_id: str) -> Any:
        if row is None or row.deleted_us is not None:
            raise SessionNotFound(f"there is no session {session_id}")
        if row.expires_us is not None and row.expires_us <= row.time_us:
            raise SessionExpired(f"session {session_id} has expired", revision=row.revision)
        return row

    def _insert(self, connection: Connection, **values: Any) -> Session:
        statement = (
            insert(connection, table)
            .values(
                **values,
                tenant=self._tenant,
                status=SessionStatus.IDLE,
                revision=1,
                created_us=now_us(),
                updated_us=now_us(),
            )
            .on_conflict_do_nothing(index_elements=["tenant", "name"])
            .returning(*table.c)
        )
        row = connection.execute(statement).one_or_none()
        if row is None:
            # An id is free again once its session has expired, whether or not that was collected yet.
            expired = connection.execute(
                sa.select(table)
                .where(table.c.tenant == self._tenant, table.c.name == values["name"], table.c.expires_us <= now_us())
                .with_for_update(key_share=True)
            ).one_or_none()
            if expired is not None:
                branches.bury(connection, expired)
                row = connection.execute(statement).one_or_none()
        if row is None:
            raise SessionExists(f"the session id {values['name']} is taken: choose another, or resume that session")
        return _session(row)

    def _append(self, connection: Connection, before: Any, new: Sequence[NewEntry], time_us: int) -> Appended:
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
                    payload=entry.payload,
                    call_id=entry.call_id,
                    created_us=time_us,
                )
            )
            parent_id = appended[-1].id
        steps = [step for entry in appended if (step := transcript.step(entry))]
        if steps:
            history = History.of(connection, before)
            toolcalls.record(connection, self._tenant, before.id, history, steps, time_us)
        open_calls = transcript.write(connection, self._tenant, before.id, appended, before.open_calls)
        session = _change(
            connection, before.id, head_entry=parent_id, next_seq=appended[-1].seq + 1, open_calls=open_calls
        )
        return Appended(session, appended)

    def _tool_call(self, connection: Connection, row: Any, history: History, call: toolcalls.KnownCall) -> ToolCall:
        result = None
        if call.result_seq is not None:
            (entry,) = transcript.read(connection, row.name, history.between(call.result_seq, call.result_seq))
            result = entry.payload
        return ToolCall(
            id=call.call_id,
            name=call.name,
            state=call.state,
            expected_s=call.expected_s,
            typical_s=toolcalls.typical_s(connection, self._tenant, call.name),
            claimed_us=call.claimed_us,
            finished_us=call.finished_us,
            result=result,
            revision=row.revision,
        )

    def _require_turn(self, connection: Connection, row: Any, key: LeaseKey | None) -> int:
        """The database's time, if the caller may change the transcript: its lease is valid, or nobody has one."""
        if key is not None:
            return leases.require(connection, row.id, key, row.revision)
        leases.require_free(connection, row.id, row.revision)
        time_us: int = row.time_us
        return time_us

    def _expiry(self, expires_in_s: float | None) -> Any:
        if expires_in_s is not None:
            return _from_now(expires_in_s)
        default_s = sa.select(tenants_table.c.expires_in_s).where(tenants_table.c.id == self._tenant).scalar_subquery()
        return now_us() + sa.cast(default_s * 1_000_000, sa.BigInteger)


def _current() -> sa.Select[Any]:
    """Sessions as they are now: the status of one whose lease has lapsed is ``idle``."""
    lapsed = sa.and_(
        table.c.status == SessionStatus.RUNNING, sa.func.coalesce(leases_table.c.expires_us, 0) <= now_us()
    )
    status = sa.case((lapsed, SessionStatus.IDLE.value), else_=table.c.status)
    others = [column for column in table.c if column.name != "status"]
    return sa.select(*others, status.label("status"), now_us().label("time_us")).select_from(
        table.outerjoin(leases_table)
    )


def _stored(connection: Connection, row: Any, history: History) -> Stored:
    """What is stored of a session: its own pages, or until there are some those from before its last branch."""
    owners = [row.id, *(owner for owner in history.owners() if owner != row.id)]
    found = manifests.coverage(connection, owners)
    own = [coverage for coverage in found if coverage.session_id == row.id and coverage.updated_us > row.branched_us]
    if own:
        return Stored(own)
    for owner in owners:
        of_owner = [coverage for coverage in found if coverage.session_id == owner]
        if of_owner:
            return Stored(of_owner, inherited=True)
    return Stored()


def _change(connection: Connection, uid: str, **values: Any) -> Session:
    row = connection.execute(
        sa.update(table)
        .where(table.c.id == uid)
        .values(**values, revision=table.c.revision + 1, updated_us=now_us())
        .returning(*table.c)
    ).one()
    return _session(row)


def _session(row: Any) -> Session:
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


def _from_now(seconds: float | None) -> Any:
    return None if seconds is None else now_us() + round(seconds * 1_000_000)
