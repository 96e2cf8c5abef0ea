"""Sessions: the durable identity of an agent, its transcript, and who runs it.

Every verb is one short transaction with a constant number of indexed statements, whatever the length of the history.
Verbs that change a session lock its row first (SQLite locks the whole database), so the changes of one session follow
each other and ``seq`` has no gaps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate import ids
from agentstate.errors import (
    EntryNotFound,
    EventsTrimmed,
    ModelMismatch,
    NotABranchPoint,
    SessionBusy,
    SessionExists,
    ToolCallClaimed,
    ToolCallFinal,
    ToolCallNotFound,
    ToolCallUnknown,
    ToolInFlight,
    TooManySessions,
)
from agentstate.fleet import engines, manifests, pins, turns
from agentstate.fleet.engines import Engine
from agentstate.fleet.pins import PinTier
from agentstate.fleet.placement import (
    Server,
    beside,
    best,
    choose,
    decoders,
    durable_on,
    named,
    outlook,
    source,
    spread,
)
from agentstate.fleet.turns import Turn
from agentstate.fleet.waits import NEVER, Awaited, Hearing, Took
from agentstate.lookahead.durations import OTHER, PERSON
from agentstate.lookahead.forecast import Forecast
from agentstate.sessions import (
    belonging,
    branches,
    conversations,
    leases,
    responses,
    rows,
    salts,
    toolcalls,
    transcript,
)
from agentstate.sessions.belonging import Begun, Found, Origin, Wanted
from agentstate.sessions.branches import Branch
from agentstate.sessions.conversations import Conversation
from agentstate.sessions.history import History
from agentstate.sessions.leases import Lease, LeaseKey
from agentstate.sessions.outcomes import (
    Appended,
    Claimed,
    Keep,
    Order,
    PagesOfSession,
    Pinned,
    Resumed,
    Session,
    SessionPage,
    Since,
    Suspended,
    SuspendReason,
    ToolCall,
)
from agentstate.sessions.responses import NewResponse
from agentstate.sessions.rows import Rows, Seen
from agentstate.sessions.toolcalls import OpenCall
from agentstate.sessions.transcript import EntryPage, NewEntry
from agentstate.settings import DEFAULT_TENANT
from agentstate.sql import secret
from agentstate.sql.database import Database, now_us
from agentstate.sql.models import EntryKind, SessionStatus, ToolCallState
from agentstate.sql.models import sessions as table

# Waits that are learned from when they end, by the reasons of suspends. Tool calls are timed one by one.
_WAITS = {SuspendReason.USER_WAIT.value: PERSON, SuspendReason.OTHER.value: OTHER}
_AWAITED = {tool: (Awaited(tool),) for tool in (PERSON, OTHER)}  # one for all sessions that wait


class Sessions:
    """The verbs of one tenant's sessions on one database.

    An engine is live while its heartbeat is at most ``engine_timeout_s`` old. ``waits`` is told when sessions begin and
    cease to wait. Every method raises DatabaseError, and those that name a session raise SessionNotFound, also for
    another tenant's, and SessionExpired. Where a method takes the ``revision`` that the caller has seen, it raises
    RevisionStale when there is a newer one.
    """

    def __init__(
        self,
        database: Database,
        engine_timeout_s: float,
        tenant: str = DEFAULT_TENANT,
        waits: Hearing | None = None,
    ):
        self._database = database
        self._engine_timeout_s = engine_timeout_s
        self._tenant = tenant
        self._waits = waits
        self._rows = Rows(tenant, self._took)

    def of(self, tenant: str) -> Self:
        """The sessions of another tenant."""
        return type(self)(self._database, self._engine_timeout_s, tenant, self._waits)

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
        tenant's sessions do. Raises SessionExists, TooManySessions, InvalidEntry, InvalidId."""
        transcript.check_metadata(metadata or {})
        uid = ids.new("ses")
        with self._database.write() as connection:
            return self._rows.make(
                connection,
                id=uid,
                name=uid if session_id is None else ids.check(session_id),
                model=model,
                metadata=metadata or {},
                cache_salt=cache_salt,
                extra_key=extra_key,
                next_seq=1,
                expires_in_s=expires_in_s,
            )

    def read(self, session_id: str) -> Session:
        """A session as it is now; one whose lease has lapsed is not ``running`` any more."""
        with self._database.read() as connection:
            return rows.session_of(self._rows.find(connection, session_id))

    def list(self, *, after: str | None = None, limit: int = 100, order: Order = Order.ASCENDING) -> SessionPage:
        """At most ``limit`` sessions by their id, those that follow ``after``, which need not exist any more.

        Ids that were not chosen by the caller sort by the time of their making. Expired sessions are left out.
        """
        name = table.c.name
        query = rows.current().where(
            table.c.tenant == self._tenant,
            table.c.deleted_us.is_(None),
            sa.or_(table.c.expires_us.is_(None), table.c.expires_us > now_us()),
        )
        if after is not None:
            query = query.where(name > after if order is Order.ASCENDING else name < after)
        query = query.order_by(name if order is Order.ASCENDING else name.desc()).limit(limit + 1)
        with self._database.read() as connection:
            found = [rows.session_of(row) for row in connection.execute(query)]
        return SessionPage(found[:limit], has_more=len(found) > limit)

    def update(
        self,
        session_id: str,
        revision: Seen,
        *,
        metadata: dict[str, Any] | None = None,
        expires_in_s: float | Keep | None = Keep.KEEP,
    ) -> Session:
        """Change the keys of ``metadata`` that are given, those with None go; and the expiry, None for never.

        Raises InvalidEntry.
        """
        with self._database.write() as connection:
            before = self._rows.lock(connection, session_id, revision)
            changes: dict[str, Any] = {}
            if metadata is not None:
                merged = {**before._mapping["metadata"], **metadata}
                changes["metadata"] = {name: value for name, value in merged.items() if value is not None}
                transcript.check_metadata(changes["metadata"])
            if not isinstance(expires_in_s, Keep):
                changes["expires_us"] = rows.from_now(expires_in_s)
            return rows.change(connection, before.id, **changes)

    def delete(self, session_id: str, revision: Seen) -> None:
        """Delete a session; its id is free again at once. What forks share with it stays, the rest is collected later,
        and its KV erased by the engines that have it.

        Raises SessionBusy while somebody runs it.
        """
        with self._database.write() as connection:
            before = self._rows.lock(connection, session_id, revision)
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
        revision: Seen = None,
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
            before = self._rows.lock(connection, session_id, revision)
            if expect_model is not None and expect_model != before.model:
                raise ModelMismatch(
                    f"session {session_id} runs {before.model!r}, not {expect_model!r} as expected",
                    revision=before.revision,
                )
            return self._take(connection, before, lease_ttl_s, tail, token)

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

        ``expires_in_s``, counted from now, replaces the session's expiry; ``release_kv`` has what is stored of its KV
        erased. ``ranks`` are those of the engine that the resume named, none if it is not live any more; if the resume
        named none, those of the engine that would be chosen now. This alone makes nothing of the KV durable.

        Raises LeaseLost, and ToolInFlight when the reason is ``done`` while a tool call is claimed.
        """
        with self._database.write() as connection:
            before = self._rows.lock(connection, session_id)
            return self._release(connection, before, key, reason, expires_in_s, release_kv)

    def signal(self, session_id: str, forecast: Forecast) -> bool:
        """Tell the session's engine when a person is going to go on with it. False, and nothing is told, while the
        session is being run, and where no live engine has had it."""
        with self._database.read() as connection:
            row = self._rows.find(connection, session_id)
            server = self._server_of(connection, row)
        if row.status == SessionStatus.RUNNING or server is None or self._waits is None:
            return False
        self._waits.expected(self._tenant, row.id, forecast, "person", server.ranks[0])
        return True

    def pin(self, session_id: str, tier: PinTier, for_s: float) -> Pinned:
        """Let the session's KV stay on a tier for so many seconds, in place of its pin before. ``ranks`` are those of
        the engine of its newest turn, none if that is not live; engines read pins, whether or not they are told."""
        with self._database.write() as connection:
            row = self._rows.lock(connection, session_id)
            until_us = pins.put(connection, row.id, tier, for_s)
            return Pinned(row.id, until_us, self._ranks_of(connection, session_id))

    def unpin(self, session_id: str) -> Pinned:
        """End the session's pin, if it has one."""
        with self._database.write() as connection:
            row = self._rows.lock(connection, session_id)
            pins.remove(connection, row.id)
            return Pinned(row.id, None, self._ranks_of(connection, session_id))

    def _ranks_of(self, connection: Connection, session_id: str) -> Sequence[Engine]:
        server = self._server_of(connection, self._rows.find(connection, session_id))
        return server.ranks if server else ()

    def _server_of(self, connection: Connection, row: Any) -> Server | None:
        """The engine of a session's newest turn, if it is live."""
        if row.engine is None:
            return None
        return named(row.engine, row.dp_rank, engines.live(connection, self._engine_timeout_s))

    def renew(self, session_id: str, key: LeaseKey, *, lease_ttl_s: float) -> Lease:
        """Keep a lease: it lapses ``lease_ttl_s`` from now. Raises LeaseLost."""
        with self._database.write() as connection:
            before = self._rows.lock(connection, session_id)
            return leases.renew(connection, before.id, key, lease_ttl_s, before.revision)

    def begin(self, wanted: Wanted, *, lease_ttl_s: float, expires_in_s: float | None, patient: bool = False) -> Begun:
        """Begin the turn of a gateway's request, in one transaction, in the session that the request belongs to.

        A session is made on first sight; one that no client named expires ``expires_in_s`` after its last turn. Where
        a harness or a guess says the session and that is being run, the request is a branch of it, or has no session;
        if it is ``patient``, and the turn seems to be about to end, nothing has begun (``Begun.ending``).
        Of a session or a conversation that the client named, raises SessionBusy, SessionExpired, InvalidId, and
        ModelMismatch or SessionNotFound; of what it goes on from, ResponseNotFound and SessionExists. Raises
        TooManySessions where one of these has to be made; a request whose session is a guess has none then.
        """
        try:
            try:
                return self._begin_once(wanted, lease_ttl_s, expires_in_s, patient)
            except SessionExists:
                # Another request may have made the session since this one looked for it.
                return self._begin_once(wanted, lease_ttl_s, expires_in_s, patient)
        except TooManySessions:
            if wanted.session is not None or wanted.state is not None:
                raise
            return Begun(None, Origin.NONE)

    def _begin_once(self, wanted: Wanted, lease_ttl_s: float, expires_in_s: float | None, patient: bool) -> Begun:
        with self._database.write() as connection:
            found = belonging.find(connection, self._rows, wanted)
            if found.origin is Origin.NONE:
                return Begun(None, Origin.NONE)
            before = found.row
            if before is not None and found.origin is not Origin.BRANCH:
                try:
                    return self._begin(connection, before, found, wanted, lease_ttl_s)
                except SessionBusy:
                    if wanted.named is not None:
                        raise
                    if patient and found.answers_ahead(wanted):
                        return Begun(None, Origin.NONE, ending=before.name)
                    if found.context is None and (found.tip is None or found.tip.compacted):
                        if wanted.state is None:
                            return Begun(None, Origin.NONE)
                        before, found = None, Found(Origin.NEW)
            expires_in_s = None if wanted.session is not None else expires_in_s
            if before is None:
                self._rows.make(
                    connection,
                    id=(uid := ids.new("ses")),
                    name=found.name or uid,
                    model=wanted.model,
                    metadata=wanted.metadata,
                    cache_salt=None,
                    extra_key=None,
                    next_seq=1,
                    expires_in_s=expires_in_s,
                )
                name = found.name or uid
            else:
                parent, history = self._to_branch(connection, before.name, None)
                # Where its transcript cannot be shared, its pages are: they are found by their content.
                branch = branches.START
                if found.head is not None:
                    try:
                        branch = branches.branch_at(connection, parent, history, found.head)
                    except (EntryNotFound, NotABranchPoint):
                        found = replace(found, tip=None)  # the branch knows nothing of the request yet
                name = self._fork(connection, parent, branch, found.name, expires_in_s=expires_in_s).id
                found = replace(found, origin=Origin.BRANCH)
            return self._begin(connection, self._rows.lock(connection, name), found, wanted, lease_ttl_s)

    def _begin(self, connection: Connection, before: Any, found: Found, wanted: Wanted, lease_ttl_s: float) -> Begun:
        if before.model != wanted.model:
            rows.change(connection, before.id, model=wanted.model)
            before = self._rows.lock(connection, before.name)
        resumed = self._take(connection, before, lease_ttl_s, 0, preferred=wanted.engine, by_gateway=True)
        if wanted.results and before.open_calls:
            pending = {call.call_id for call in toolcalls.pending(connection, before.id)}
            new = []
            for result in wanted.results:
                if result.call_id in pending:
                    pending.remove(result.call_id)  # a client may bring one result twice
                    new.append(result)
            if new:
                self._rows.append(connection, before, new, before.time_us)
        begun = Begun(resumed, found.origin, found.messages, context=found.context, time_us=before.time_us)
        stands = found.head is not None and before.head_entry == found.head
        if found.context is not None:
            # All that a conversation has, or what a response was given.
            if stands or found.context.head is None:
                return replace(begun, base=found.context.base, whole=False)
        elif wanted.state is not None and found.tip is not None and stands and not found.tip.compacted:
            covered = responses.covering(connection, found.tip)
            if covered is not None:
                return replace(begun, base=covered.base_entry, whole=False)
        return begun

    def end(
        self,
        session_id: str,
        key: LeaseKey,
        conversation: Conversation | None,
        new: Sequence[NewEntry],
        *,
        response: NewResponse | None = None,
        expires_in_s: float | None,
    ) -> Suspended:
        """End the turn of a gateway's request: append ``new``, without tool calls that are known already, keep the
        ``response``, note where its conversation stands, and release the lease. A session that does not expire goes on
        not to. Raises LeaseLost, InvalidEntry."""
        if new:
            transcript.check(new)
        with self._database.write() as connection:
            before = self._rows.lock(connection, session_id)
            if new:
                time_us = leases.require(connection, before.id, key, before.revision)
                calls = {entry.call_id for entry in new if entry.kind is EntryKind.TOOL_CALL and entry.call_id}
                known = toolcalls.known(connection, before.id, History.of(connection, before), calls) if calls else {}
                fresh = [entry for entry in new if entry.kind is not EntryKind.TOOL_CALL or entry.call_id not in known]
                if fresh:
                    self._rows.append(connection, before, fresh, time_us)
                    before = self._rows.lock(connection, session_id)
            if response is not None and conversation is not None:
                time_us = leases.require(connection, before.id, key, before.revision)
                before = responses.keep(connection, self._rows, before, response, conversation, time_us)
            reason = SuspendReason.TOOL_WAIT if before.open_calls else SuspendReason.USER_WAIT
            expires_in_s = None if before.expires_us is None else expires_in_s
            suspended = self._release(connection, before, key, reason, expires_in_s)
            if conversation is not None:
                conversations.remember(connection, self._tenant, before.id, conversation, before.head_entry)
            return suspended

    def salt(self) -> str | None:
        """The salt of requests of this tenant that belong to no session."""
        with self._database.write() as connection:  # the first to ask makes the secret
            return salts.salt(secret.read(connection), salts.scope_of(connection, self._tenant), None)

    def _take(
        self,
        connection: Connection,
        before: Any,
        lease_ttl_s: float,
        tail: int,
        token: str | None = None,
        preferred: str | None = None,
        by_gateway: bool = False,
    ) -> Resumed:
        """Begin a turn of the session whose locked row is ``before``. Raises SessionBusy, having changed nothing."""
        history = History.of(connection, before)
        stored_later = rows.stored_later(connection, before, history)
        live_later = engines.live_later(connection, self._engine_timeout_s)
        tail_later = transcript.tail_later(connection, before.name, history, tail)
        stored, live = stored_later(), live_later()
        if by_gateway:
            # Engines of an earlier release do not know its headers: they would compute without the tenant's salt.
            live = [rank for rank in live if rank.control_secret is not None]
        equal = best(before.model, stored, live, preferred)
        running = leases.running(connection, equal[0].base_url) if len(equal) > 1 else {}
        server = spread(equal, before.id, running)
        token = token or leases.new_token()
        lease_later = leases.take_later(
            connection,
            before.id,
            lease_ttl_s,
            before.revision,
            token=token,
            engine=server.base_url if server else None,
            dp_rank=server.dp_rank if server else None,
        )
        session_later = rows.run_later(connection, before.id, token)
        lease = lease_later()
        if before.status == SessionStatus.RUNNING:  # its lease was not released: it lapsed
            toolcalls.abandon(connection, before.id)
        elif before.status == SessionStatus.SUSPENDED and lease.released_us is not None:
            tool = _WAITS.get(lease.waited_for or "")
            if tool is not None:
                self._took([Took(tool, "", (before.time_us - lease.released_us) / 1_000_000)])
        self._tell(lambda waits: waits.over(before.id, server.ranks[0] if server else None))
        session = session_later()
        installation = lease.installation or secret.read(connection)
        engine_session = before.id
        if server is None or server.takes_tokens:
            account = before.kv_scope or salts.scope_of_tenant(before.tenant)
            turn = Turn(before.id, lease.key.epoch, account, server.dp_rank if server else None)
            engine_session = turns.sign(turns.signing_key(installation), turn)
        return Resumed(
            session=session,
            lease=lease,
            tail=tail_later(),
            pending_tool_calls=(
                [call.call_id for call in toolcalls.pending(connection, before.id)] if before.open_calls else []
            ),
            engine=server,
            kv=outlook(session.model, stored, server, live),
            cache_salt=salts.salt(installation, before.kv_scope, session.cache_salt),
            engine_session=engine_session,
        )

    def _release(
        self,
        connection: Connection,
        before: Any,
        key: LeaseKey,
        reason: SuspendReason,
        expires_in_s: float | None,
        release_kv: bool = False,
    ) -> Suspended:
        """End the turn of the session whose locked row is ``before``."""
        released_later = leases.release_later(connection, before.id, key, before.revision, reason)
        session_later = rows.change_later(
            connection, before.id, status=SessionStatus.SUSPENDED.value, expires_in_s=expires_in_s
        )
        rows.note_turn(connection, before.tenant, before.id)
        live_later = engines.live_later(connection, self._engine_timeout_s)
        engine, dp_rank = released_later()
        running = toolcalls.in_flight(connection, before.id) if reason is SuspendReason.DONE else []
        if running:
            raise ToolInFlight(
                f"session {before.name} waits for tool calls {', '.join(running)}: append their results first, "
                "or suspend with reason tool_wait",
                revision=before.revision,
            )
        session, live = session_later(), live_later()
        if engine is not None:
            server = named(engine, dp_rank, live)
        else:
            server = choose(session.model, rows.stored(connection, before, History.of(connection, before)), live)
        if release_kv:
            manifests.give_up(connection, before.id)
            pins.remove(connection, before.id)
        pending = toolcalls.pending(connection, before.id) if before.open_calls else []
        if server is not None:
            self._tell_of_suspend(before, reason, release_kv, pending, server.ranks[0])
        return Suspended(
            session=session,
            pending_tool_calls=[call.call_id for call in pending],
            ranks=list(server.ranks) if server else [],
            beside=[other.ranks for other in beside(server, live)] if server else [],
            decoding=[other.ranks for other in decoders(server, live)],
            epoch=key.epoch,
        )

    def _tell_of_suspend(
        self, before: Any, reason: SuspendReason, release_kv: bool, pending: Sequence[OpenCall], rank: Engine
    ) -> None:
        tenant, uid = self._tenant, before.id
        if release_kv:
            self._tell(lambda waits: waits.released(tenant, uid, rank))
        elif reason is SuspendReason.DONE:
            self._tell(lambda waits: waits.expected(tenant, uid, NEVER, "other", rank))
        elif reason is SuspendReason.TOOL_WAIT and pending:
            self._tell(lambda waits: waits.begun(tenant, uid, _awaited(pending, before.time_us), rank))
        else:
            tool = PERSON if reason is SuspendReason.USER_WAIT else OTHER
            self._tell(lambda waits: waits.begun(tenant, uid, _AWAITED[tool], rank))

    def _tell_of_calls(
        self, connection: Connection, uid: str, new: Sequence[NewEntry], open_calls: int, time_us: int
    ) -> None:
        """Tell what the session waits for, if tool calls were claimed or finished."""
        calls = [entry for entry in new if entry.call_id is not None]
        if self._waits is None or not calls:
            return
        if all(call.kind is EntryKind.TOOL_CALL for call in calls) and open_calls == len(calls):
            awaited = [_claimed(call.payload) for call in calls]
        else:
            awaited = _awaited(toolcalls.pending(connection, uid), time_us) if open_calls else []
        self._tell(lambda waits: waits.begun(self._tenant, uid, awaited))

    def _took(self, waits_over: Sequence[Took]) -> None:
        self._tell(lambda waits: waits.took(self._tenant, waits_over))

    def _tell(self, act: Callable[[Hearing], None]) -> None:
        """Tell who follows waits, once it is committed."""
        if (waits := self._waits) is not None:
            self._database.once_committed(lambda: act(waits))

    def pages(self, session_id: str) -> PagesOfSession:
        """The engine that runs the session, or that it would be resumed on, and the pages that each rank can restore.

        Without an engine, or pages, there are none. Reads as many bytes as the manifests have.
        """
        return self._pages(session_id, with_keys=True)

    def whereabouts(self, session_id: str) -> PagesOfSession:
        """The same without the pages' keys: what it reads does not grow with the session."""
        return self._pages(session_id, with_keys=False)

    def _pages(self, session_id: str, with_keys: bool) -> PagesOfSession:
        with self._database.read() as connection:
            row = self._rows.find(connection, session_id)
            stored = rows.stored(connection, row, History.of(connection, row))
            live = engines.live(connection, self._engine_timeout_s)
            running = row.status == SessionStatus.RUNNING and row.engine is not None
            server = named(row.engine, row.dp_rank, live) if running else None
            server = server or choose(row.model, stored, live)
            ranks = server.ranks if server else ()
            keys = []
            for rank in ranks if with_keys else ():
                found = source(rank, stored)
                keys.append(b"" if found is None else manifests.keys_of(connection, *found))
            return PagesOfSession(rows.session_of(row), ranks, keys, durable_on(server, stored))

    # --- the transcript

    def entries(
        self, session_id: str, *, after: str | None = None, limit: int = 100, order: Order = Order.ASCENDING
    ) -> EntryPage:
        """At most ``limit`` entries by ``seq``, those that follow the entry ``after`` in the given order; fewer where
        they are large (`EntryPage`).

        Raises EntryNotFound when ``after`` is no entry of the session.
        """
        with self._database.read() as connection:
            row = self._rows.find(connection, session_id)
            rest = History.of(connection, row)
            if after is not None:
                at = transcript.find(connection, session_id, rest, after).seq
                rest = rest.between(at + 1, row.next_seq) if order is Order.ASCENDING else rest.between(1, at - 1)
            found = transcript.page(connection, session_id, rest, limit, newest=order is Order.DESCENDING)
        if order is Order.DESCENDING:
            found.entries.reverse()
        return found

    def since(self, session_id: str, seq: int, limit: int = 100) -> Since:
        """What there is for who has seen the entries of a session up to ``seq``."""
        with self._database.read() as connection:
            row = self._rows.find(connection, session_id)
            history = History.of(connection, row)
            rest = history.between(seq + 1, row.next_seq)
            page = transcript.page(connection, session_id, rest, limit)
            return Since(rows.session_of(row), history.newest_to(seq), page)

    def seen(self, session_id: str, seq: int) -> Session:
        """The session, for who has seen its entries up to ``seq``, 0 for none of them.

        Raises EventsTrimmed when it never had such an entry. One that a rewind took back since is none.
        """
        with self._database.read() as connection:
            row = self._rows.find(connection, session_id)
            if seq >= row.next_seq:
                raise EventsTrimmed(f"session {session_id} never had an entry {seq}: read it", revision=row.revision)
            return rows.session_of(row)

    def append(self, session_id: str, key: LeaseKey, new: Sequence[NewEntry]) -> Appended:
        """Append entries, all or none, and record the tool calls and results among them.

        Raises LeaseLost; InvalidEntry when ``new`` is empty or one of them does not fit the transcript.
        """
        transcript.check(new)
        with self._database.write() as connection:
            before = self._rows.lock(connection, session_id)
            time_us = leases.require(connection, before.id, key, before.revision)
            appended = self._rows.append(connection, before, new, time_us)
            self._tell_of_calls(connection, before.id, new, appended.open_calls, time_us)
            return appended

    # --- branches

    def fork(
        self,
        session_id: str,
        revision: Seen,
        *,
        at: str | None = None,
        fork_id: str | None = None,
        metadata: dict[str, Any] | None = None,
        expires_in_s: float | None = None,
    ) -> Session:
        """A new session that has this one's history up to the entry ``at``, or all of it. Nothing is copied.

        It has the parent's model and namespace, the scope of KV that the tenant's new sessions have (`salts`), and
        unless given its metadata. Raises EntryNotFound, SessionExists, TooManySessions,
        InvalidId; NotABranchPoint where a tool call would be cut off from its result.
        """
        transcript.check_metadata(metadata or {})
        with self._database.write() as connection:
            parent, history = self._to_branch(connection, session_id, revision)
            branch = branches.branch_at(connection, parent, history, at)
            return self._fork(connection, parent, branch, fork_id, metadata, expires_in_s)

    def _fork(
        self,
        connection: Connection,
        parent: Any,
        branch: Branch,
        fork_id: str | None = None,
        metadata: dict[str, Any] | None = None,
        expires_in_s: float | None = None,
    ) -> Session:
        uid = ids.new("ses")
        session = self._rows.make(
            connection,
            id=uid,
            name=uid if fork_id is None else ids.check(fork_id),
            model=parent.model,
            metadata=parent._mapping["metadata"] if metadata is None else metadata,
            cache_salt=parent.cache_salt,
            extra_key=parent.extra_key,
            head_entry=branch.head_id,
            next_seq=branch.next_seq,
            own_seq=branch.next_seq,
            open_calls=branch.open_calls,
            branched=True,
            expires_in_s=expires_in_s,
        )
        branch.history.store(connection, uid)
        if branch.open_calls:
            toolcalls.copy_open(connection, parent.id, uid)
        return session

    def rewind(self, session_id: str, revision: Seen, *, at: str | None, key: LeaseKey | None = None) -> Session:
        """Make the entry ``at`` the head again, or with None go back to before the first entry. The entries after it
        are taken back; their ``seq`` stay unused.

        Needs the lease while the session is being run. Raises SessionBusy, LeaseLost, EntryNotFound, NotABranchPoint;
        ToolInFlight while a tool call is claimed.
        """
        with self._database.write() as connection:
            before, history = self._to_branch(connection, session_id, revision)
            self._rows.require_turn(connection, before, key)
            branch = branches.START if at is None else branches.branch_at(connection, before, history, at)
            if branch.head_id == before.head_entry:
                return rows.session_of(before)
            running = toolcalls.in_flight(connection, before.id)
            if running:
                raise ToolInFlight(
                    f"tool calls {', '.join(running)} are being executed: append their results first",
                    revision=before.revision,
                )
            toolcalls.take_back(connection, before.id)
            branches.mark_garbage(connection, history.owners())
            branch.history.close(connection, before.id)
            return rows.change(
                connection,
                before.id,
                head_entry=branch.head_id,
                own_seq=before.next_seq,
                open_calls=0,
                branched_us=now_us(),
            )

    def _to_branch(self, connection: Connection, session_id: str, revision: Seen) -> tuple[Any, History]:
        row = self._rows.lock(connection, session_id, revision)
        history = History.of(connection, row)
        if branches.compact(connection, row, history):
            row = self._rows.lock(connection, session_id)
            history = History.of(connection, row)
        return row, history

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

        The same call is one of the same id, tool and arguments; ``expected_s`` may differ. Needs the lease while the
        session is being run. Raises ToolCallReused, ToolCallClaimed, ToolCallUnknown, SessionBusy, LeaseLost,
        InvalidEntry.
        """
        payload = {"name": name, "arguments": arguments}
        if expected_s is not None:
            payload["expected_s"] = expected_s
        new = [NewEntry(EntryKind.TOOL_CALL, payload, call_id)]
        transcript.check(new)
        with self._database.write() as connection:
            before = self._rows.lock(connection, session_id)
            history = History.of(connection, before)
            found = toolcalls.known(connection, before.id, history, [call_id]).get(call_id)
            if found is not None:
                self._rows.require_same_call(connection, before, history, found, payload)
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
                return Claimed(self._rows.tool_call(connection, before, history, found), fresh=False)
            time_us = self._rows.require_turn(connection, before, key)
            appended = self._rows.append(connection, before, new, time_us)
            self._tell_of_calls(connection, before.id, new, appended.open_calls, time_us)
            typical_s = toolcalls.typical_s(connection, self._tenant, name)
            revision = appended.session.revision
            call = ToolCall(call_id, name, ToolCallState.CLAIMED, expected_s, typical_s, time_us, None, None, revision)
            return Claimed(call, fresh=True)

    def finish(self, session_id: str, call_id: str, result: dict[str, Any], *, key: LeaseKey | None = None) -> ToolCall:
        """Append the result of a tool call: ``{"output": …}`` or ``{"error": …}``.

        Needs the lease while the session is being run, and none otherwise: a tool may end while its session is
        suspended. Raises ToolCallNotFound, ToolCallFinal, SessionBusy, LeaseLost, InvalidEntry.
        """
        new = [NewEntry(EntryKind.TOOL_RESULT, result, call_id)]
        transcript.check(new)
        with self._database.write() as connection:
            before = self._rows.lock(connection, session_id)
            time_us = self._rows.require_turn(connection, before, key)
            history = History.of(connection, before)
            found = toolcalls.known(connection, before.id, history, [call_id]).get(call_id)
            if found is None:
                raise ToolCallNotFound(
                    f"session {session_id} has no tool call {call_id!r}: claim it first", revision=before.revision
                )
            if found.state not in toolcalls.OPEN:
                raise ToolCallFinal(f"tool call {call_id!r} has a result already", revision=before.revision)
            appended = self._rows.append(connection, before, new, time_us)
            self._tell_of_calls(connection, before.id, new, appended.open_calls, time_us)
            after = self._rows.lock(connection, session_id)
            history = History.of(connection, after)
            return self._rows.tool_call(
                connection, after, history, toolcalls.known(connection, after.id, history, [call_id])[call_id]
            )


def _claimed(payload: dict[str, Any]) -> Awaited:
    # JSON may have it as an integer of any length.
    announced_s = None if (said := payload.get("expected_s")) is None else float(said)
    return Awaited(payload["name"], toolcalls.head(payload.get("arguments")), announced_s)


def _awaited(calls: Sequence[OpenCall], time_us: int) -> list[Awaited]:
    return [
        Awaited(call.name, call.head or "", call.expected_s, (time_us - call.claimed_us) / 1_000_000) for call in calls
    ]
