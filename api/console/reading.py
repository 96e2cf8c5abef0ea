"""What pages ask of SQL. Each question is a constant number of statements, which go through an index and end after a
bounded number of rows: nothing here reads a whole table, nor takes a lock.

Sessions are ordered by when their newest turn ended, or by their ids. What would have to be added up for each of them
first, such as their bytes, orders nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate import documents
from agentstate.sessions import transcript
from agentstate.sessions.history import History
from agentstate.sessions.rows import Rows
from agentstate.sql.database import now_us
from agentstate.sql.models import (
    SessionStatus,
    api_keys,
    blobs,
    entries,
    leases,
    manifests,
    segments,
    session_turns,
    sessions,
    shared_extents,
    shared_stores,
    tenants,
    tool_calls,
)

PAGE = 50
# Counting ends here: "10,000+".
COUNTED = 10_000
# Turns whose client vanished may never be taken over: they are looked up one by one.
COUNTED_LAPSED = 1_000
# How many ids are looked through for those that begin as asked.
SEARCHED = 2_000
ENTRIES = 100
PREVIEW = 4096
RELATED = 50


class State(StrEnum):
    """What a session does, as people see it."""

    RUNNING = "running"  # a turn runs
    LAPSED = "lapsed"  # a turn ran until its lease lapsed, and nobody has resumed since
    SUSPENDED = "suspended"  # it waits for a tool, a person or something else
    IDLE = "idle"  # no turn has ended or run yet


class Sort(StrEnum):
    NEWEST = "newest"  # the newest turn first
    OLDEST = "oldest"  # what has waited longest
    ID = "id"
    ID_DOWN = "-id"


@dataclass(frozen=True)
class Listed:
    """A session in a list. ``turned_us`` is when its newest turn ended, or it was made; ``lease_us`` how long the lease
    of a turn that runs holds still, or since when it does not."""

    uid: str
    id: str
    model: str
    state: State
    turned_us: int
    waits_for: str | None
    lease_us: int | None
    open_calls: int
    expires_us: int | None
    tokens: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class ListPage:
    """``next`` continues the list, None at its end."""

    sessions: list[Listed]
    next: str | None


@dataclass(frozen=True)
class Counts:
    """A tenant's sessions; each count ends at its cap."""

    all: int
    running: int
    lapsed: int


_BIG = sa.BigInteger()
_NEVER_US = 2**62
_here = (sessions.c.tenant == sa.bindparam("tenant"), sessions.c.deleted_us.is_(None))


def counts(connection: Connection, tenant: str) -> Counts:
    row = connection.execute(_COUNTS, {"tenant": tenant}).one()
    return Counts(*row)


def _capped(rows: sa.Select[Any], cap: int) -> Any:
    return sa.select(sa.func.count()).select_from(rows.limit(cap + 1).subquery()).scalar_subquery()


def _leased(lapsed: bool) -> sa.Select[Any]:
    of_tenant = sa.select(sa.literal(1)).select_from(leases.join(sessions))
    return of_tenant.where(_held(lapsed), *_here, sessions.c.status == SessionStatus.RUNNING)


def _held(lapsed: bool) -> sa.ColumnElement[bool]:
    """Whether a lease holds still, or has lapsed; neither if it was released."""
    # PostgreSQL goes through an index for a time that is computed once, and not for a clock that it would have to look
    # at for each row. Of a range whose ends it does not know, it expects few rows.
    now = sa.select(now_us()).scalar_subquery()
    least, most = (sa.literal(0, _BIG), now) if lapsed else (now, sa.literal(_NEVER_US, _BIG))
    return sa.and_(leases.c.expires_us > least, leases.c.expires_us <= most)


_COUNTS = sa.select(
    _capped(sa.select(sa.literal(1)).where(session_turns.c.tenant == sa.bindparam("tenant")), COUNTED),
    _capped(_leased(lapsed=False), COUNTED),
    _capped(_leased(lapsed=True), COUNTED_LAPSED),
)

_LISTED = (
    sessions.c.id.label("uid"),
    sessions.c.name,
    sessions.c.model,
    sessions.c.status,
    sessions.c.open_calls,
    sessions.c.expires_us,
    session_turns.c.turned_us,
    leases.c.waits_for,
    leases.c.expires_us.label("lease_us"),
    leases.c.released_us,
    now_us().label("time_us"),
)


def listed(
    connection: Connection, tenant: str, *, state: State | None, sort: Sort, search: str, cursor: str | None
) -> ListPage:
    """``PAGE`` sessions of a tenant. Those of a ``search`` have ids that begin with it, and are ordered by them."""
    if search:
        rows, following = _searched(connection, tenant, search, cursor)
    elif state in (State.RUNNING, State.LAPSED):
        rows, following = _by_lease(connection, tenant, state, cursor)
    elif sort in (Sort.ID, Sort.ID_DOWN):
        rows, following = _by_id(connection, tenant, sort is Sort.ID_DOWN, cursor)
    else:
        rows, following = _by_turn(connection, tenant, sort is Sort.NEWEST, cursor)
    found = [_listed(row) for row in rows]
    if state is not None:
        found = [one for one in found if one.state is state]
    return ListPage(_with_kv(connection, found), following)


def _listed(row: Any) -> Listed:
    status, lease_us = SessionStatus(row.status), row.lease_us
    state = State(status.value)
    if status is SessionStatus.RUNNING and (lease_us or 0) <= row.time_us:
        state = State.LAPSED
    running = state in (State.RUNNING, State.LAPSED)
    return Listed(
        uid=row.uid,
        id=row.name,
        model=row.model,
        state=state,
        turned_us=row.turned_us,
        waits_for=row.waits_for if state is State.SUSPENDED else None,
        lease_us=lease_us if running else None,
        open_calls=row.open_calls,
        expires_us=row.expires_us,
    )


def _with_kv(connection: Connection, found: Sequence[Listed]) -> list[Listed]:
    if not found:
        return []
    columns = (manifests.c.session_id, manifests.c.node, manifests.c.rank, manifests.c.tokens, manifests.c.nbytes)
    uids = [one.uid for one in found]
    tokens: dict[str, int] = {}
    nbytes: dict[str, int] = {}
    for row in connection.execute(sa.select(*columns).where(manifests.c.session_id.in_(uids))):
        tokens[row.session_id] = max(tokens.get(row.session_id, 0), row.tokens)
        nbytes[row.session_id] = nbytes.get(row.session_id, 0) + row.nbytes
    return [
        Listed(**{**vars(one), "tokens": tokens.get(one.uid, 0), "nbytes": nbytes.get(one.uid, 0)}) for one in found
    ]


def _cursor(*parts: Any) -> str:
    return json.dumps(parts, ensure_ascii=False, separators=(",", ":"))


def _parts(cursor: str | None, *kinds: type) -> list[Any] | None:
    """What a cursor was made of; None without one, or if it is none."""
    try:
        parts = json.loads(cursor or "")
    except (ValueError, RecursionError):
        return None
    if not isinstance(parts, list) or [type(part) for part in parts] != list(kinds):
        return None
    if not all(documents.is_text(part) if isinstance(part, str) else 0 <= part < 2**63 for part in parts):
        return None
    return parts


def _by_turn(connection: Connection, tenant: str, newest: bool, cursor: str | None) -> tuple[Sequence[Any], str | None]:
    key = (session_turns.c.turned_us, session_turns.c.session_id)
    order = [column.desc() if newest else column for column in key]
    query = sa.select(session_turns).where(session_turns.c.tenant == tenant)
    if (after := _parts(cursor, int, str)) is not None:
        query = query.where(_beyond(key, after, newest))
    # First the rows by the index alone, and then what belongs to them.
    some = query.order_by(*order).limit(PAGE + 1).subquery()
    place = (some.c.turned_us, some.c.session_id)
    rows = connection.execute(
        sa.select(
            *(column for column in _LISTED if column.name != "turned_us"),
            some.c.turned_us,
            some.c.session_id.label("place"),
            sessions.c.deleted_us,
        )
        .select_from(some.join(sessions, sessions.c.id == some.c.session_id).outerjoin(leases))
        .order_by(*(column.desc() if newest else column for column in place))
    ).all()
    following = _cursor(rows[PAGE - 1].turned_us, rows[PAGE - 1].place) if len(rows) > PAGE else None
    return [row for row in rows[:PAGE] if row.deleted_us is None], following


def _beyond(key: Sequence[Any], after: Sequence[Any], down: bool) -> sa.ColumnElement[bool]:
    """After a place in the order of two columns, in a form that goes through their index."""
    (first, second), (at, rest) = key, after
    begins = first <= at if down else first >= at
    return sa.and_(begins, sa.or_(first != at, second < rest if down else second > rest))


def _by_id(connection: Connection, tenant: str, down: bool, cursor: str | None) -> tuple[Sequence[Any], str | None]:
    name = sessions.c.name
    query = sa.select(*_LISTED).select_from(_ALL).where(*_here)
    if (after := _parts(cursor, str)) is not None:
        query = query.where(name < after[0] if down else name > after[0])
    query = query.order_by(name.desc() if down else name).limit(PAGE + 1)
    rows = connection.execute(query, {"tenant": tenant}).all()
    return rows[:PAGE], _cursor(rows[PAGE - 1].name) if len(rows) > PAGE else None


_ALL = sessions.outerjoin(session_turns).outerjoin(leases, leases.c.session_id == sessions.c.id)


def _by_lease(
    connection: Connection, tenant: str, state: State, cursor: str | None
) -> tuple[Sequence[Any], str | None]:
    """Those first whose leases lapse first, or lapsed last."""
    lapsed = state is State.LAPSED
    key = (leases.c.expires_us, leases.c.session_id)
    query = sa.select(*key).select_from(leases.join(sessions))
    query = query.where(_held(lapsed), *_here, sessions.c.status == SessionStatus.RUNNING)
    if (after := _parts(cursor, int, str)) is not None:
        query = query.where(_beyond(key, after, lapsed))
    # First the rows by the index alone, and then what belongs to them.
    some = query.order_by(*(column.desc() if lapsed else column for column in key)).limit(PAGE + 1).subquery()
    place = (some.c.expires_us, some.c.session_id)
    of_them = some.join(sessions, sessions.c.id == some.c.session_id)
    of_them = of_them.join(leases, leases.c.session_id == sessions.c.id).outerjoin(
        session_turns, session_turns.c.session_id == sessions.c.id
    )
    ordered = sa.select(*_LISTED).select_from(of_them).order_by(*(one.desc() if lapsed else one for one in place))
    rows = connection.execute(ordered, {"tenant": tenant}).all()
    return rows[:PAGE], _cursor(rows[PAGE - 1].lease_us, rows[PAGE - 1].uid) if len(rows) > PAGE else None


def _searched(connection: Connection, tenant: str, search: str, cursor: str | None) -> tuple[Sequence[Any], str | None]:
    """Sessions whose ids begin with ``search``, and the one that engines know by it. Databases order texts in ways of
    their own, in which those are beside each other, but for a few: so some are looked through, in place of a range."""
    after = _parts(cursor, str)
    name = sessions.c.name
    first = name >= search if after is None else name > after[0]
    some = sa.select(name, sessions.c.id).where(*_here, first).order_by(name).limit(SEARCHED).subquery()
    begins = sa.func.substr(some.c.name, 1, len(search)) == search
    query = sa.select(some.c.id, some.c.name).where(begins).order_by(some.c.name).limit(PAGE + 1)
    found = connection.execute(query, {"tenant": tenant}).all()
    uids = [row.id for row in found[:PAGE]]
    if after is None and search not in uids:
        known = sa.select(sessions.c.id).where(*_here, sessions.c.id == search)
        uids += connection.execute(known, {"tenant": tenant}).scalars()
    if not uids:
        return [], None
    rows = connection.execute(sa.select(*_LISTED).select_from(_ALL).where(sessions.c.id.in_(uids))).all()
    following = _cursor(found[PAGE - 1].name) if len(found) > PAGE else None
    return sorted(rows, key=lambda row: uids.index(row.uid)), following


# --- one session


@dataclass(frozen=True)
class Preview:
    """An entry, of whose payload the beginning was read. ``size`` is that of all of it, in bytes of JSON."""

    id: str
    seq: int
    kind: str
    call_id: str | None
    created_us: int
    text: str
    size: int

    @property
    def whole(self) -> bool:
        return len(self.text.encode("utf-8", "surrogatepass")) >= self.size

    @property
    def role(self) -> str:
        """Who said it, or the tool's name, where the payload is one of those that the gateway writes."""
        payload = self._payload
        found = payload.get("role", payload.get("name", ""))
        return found if isinstance(found, str) else ""

    @property
    def said(self) -> str:
        """Its text, or its JSON: images and other data by their types and sizes."""
        if not self.whole:
            return _without_data(self.text)
        content = self._payload.get("content")
        if set(self._payload) <= {"role", "content"} and isinstance(content, str):
            return _without_data(content)
        return _without_data(json.dumps(self._payload, indent=2, ensure_ascii=False))

    @property
    def _payload(self) -> dict[str, Any]:
        try:
            found = json.loads(self.text) if self.whole else {}
        except (ValueError, RecursionError):
            found = {}
        return found if isinstance(found, dict) else {}


_DATA = re.compile(r"data:([a-z0-9.+-]{1,40}/[a-z0-9.+-]{1,80});base64,([A-Za-z0-9+/=_-]{64,})")


def _without_data(text: str) -> str:
    return _DATA.sub(lambda found: f"[{found[1]}, {len(found[2]) * 3 // 4:,} bytes]", text)


@dataclass(frozen=True)
class Call:
    """A tool call. ``expected_s`` is what its claimant said."""

    call_id: str
    name: str
    state: str
    expected_s: float | None
    claimed_us: int
    finished_us: int | None
    call_seq: int

    @property
    def took_s(self) -> float | None:
        return None if self.finished_us is None else (self.finished_us - self.claimed_us) / 1_000_000


@dataclass(frozen=True)
class Pause:
    """Nothing was appended for so long, before the entry ``seq``."""

    seq: int
    began_us: int
    seconds: float


@dataclass(frozen=True)
class Stored:
    """A manifest, without its keys."""

    node: str
    rank: int
    fingerprint: str
    tokens: int
    nbytes: int
    shared_tokens: int
    lost_tokens: int
    updated_us: int


@dataclass(frozen=True)
class Told:
    """What SQL tells of a session. ``ancestors`` and ``forks`` are other sessions' ids, the nearest first."""

    row: Any
    listed: Listed
    released_us: int | None
    lease_engine: str | None
    time_us: int
    previews: list[Preview]
    earlier: bool
    later: bool
    calls: list[Call]
    stored: list[Stored]
    ancestors: list[str]
    forks: list[str]
    more_forks: bool
    pauses: list[Pause] = field(default_factory=list)


def told(connection: Connection, tenant: str, session_id: str, before: int | None) -> Told:
    """A session, with the entries before ``before`` or the newest. Raises SessionNotFound, SessionExpired."""
    row = Rows(tenant).find(connection, session_id)
    listed_row = connection.execute(sa.select(*_LISTED).select_from(_ALL).where(sessions.c.id == row.id)).one()
    history = History.of(connection, row)
    part = history if before is None else history.between(1, before - 1)
    wanted = part.newest(ENTRIES)
    previews = _previews(connection, wanted)
    found = sa.select(*(manifests.c[name] for name in Stored.__dataclass_fields__)).where(
        manifests.c.session_id == row.id
    )
    ancestors, forks, more_forks = _family(connection, tenant, row.id, history)
    return Told(
        row=row,
        listed=_with_kv(connection, [_listed(listed_row)])[0],
        released_us=listed_row.released_us,
        lease_engine=row.engine,
        time_us=row.time_us,
        previews=previews,
        earlier=part.length > len(previews),
        later=before is not None and history.length > part.length,
        calls=_calls(connection, row.id, history, wanted),
        stored=[
            Stored(*one) for one in connection.execute(found.order_by(manifests.c.updated_us.desc()).limit(RELATED))
        ],
        ancestors=ancestors,
        forks=forks,
        more_forks=more_forks,
        pauses=_pauses(previews),
    )


def _previews(connection: Connection, wanted: History) -> list[Preview]:
    if not wanted.segments:
        return []
    if connection.dialect.name == "postgresql":
        inline = sa.func.left(sa.cast(entries.c.payload, sa.Text), PREVIEW)
        length = sa.func.octet_length(sa.cast(entries.c.payload, sa.Text))
        large = sa.func.substring(blobs.c.content, 1, PREVIEW)
    else:
        inline = sa.func.substr(sa.cast(entries.c.payload, sa.Text), 1, PREVIEW)
        length = sa.func.length(sa.cast(entries.c.payload, sa.LargeBinary))
        large = sa.func.substr(blobs.c.content, 1, PREVIEW)
    query = (
        sa.select(
            entries.c.id,
            entries.c.seq,
            entries.c.kind,
            entries.c.call_id,
            entries.c.created_us,
            sa.type_coerce(inline, sa.Text).label("inline"),
            length.label("length"),
            sa.type_coerce(large, sa.LargeBinary).label("large"),
            sa.func.length(blobs.c.content).label("large_length"),
        )
        .select_from(entries.outerjoin(blobs, blobs.c.key == entries.c.blob))
        .where(History.entries(len(wanted.segments)))
        .order_by(entries.c.seq)
    )
    found = []
    for row in connection.execute(query, wanted.as_parameters()):
        text, length_of = row.inline, row.length
        if row.large is not None:
            text, length_of = bytes(row.large).decode("utf-8", "ignore"), row.large_length
        found.append(Preview(row.id, row.seq, row.kind, row.call_id, row.created_us, text, length_of))
    return found


def _calls(connection: Connection, uid: str, history: History, wanted: History) -> list[Call]:
    """The tool calls whose entries are shown."""
    parts = [
        sa.and_(tool_calls.c.session_id == part.owner_id, tool_calls.c.call_seq.between(part.first, part.last))
        for part in wanted.segments
    ]
    # A fork has rows of its own for calls that were open where it branched.
    own = sa.and_(
        tool_calls.c.session_id == uid,
        tool_calls.c.call_seq.between(wanted.first, wanted.segments[-1].last if wanted.segments else 0),
    )
    columns = [tool_calls.c[name] for name in Call.__dataclass_fields__]
    rows = connection.execute(
        sa.select(*columns, tool_calls.c.session_id)
        .where(sa.or_(own, *parts))
        .order_by(tool_calls.c.call_seq)
        .limit(2 * ENTRIES)
    )
    found: dict[int, Call] = {}
    for row in rows:
        if row.call_seq not in found or row.session_id == uid:
            found[row.call_seq] = Call(*row[:-1])
    return [call for seq, call in sorted(found.items()) if history.owner_of(seq) is not None]


_PAUSE_S = 10.0


def _pauses(previews: Sequence[Preview]) -> list[Pause]:
    found = []
    for earlier, later in zip(previews, previews[1:], strict=False):
        seconds = (later.created_us - earlier.created_us) / 1_000_000
        if seconds >= _PAUSE_S:
            found.append(Pause(later.seq, earlier.created_us, seconds))
    return found


def _family(connection: Connection, tenant: str, uid: str, history: History) -> tuple[list[str], list[str], bool]:
    """Whose entries a session shares, the nearest first, and which sessions share its own."""
    owners = [owner for owner in history.owners() if owner != uid][:RELATED]
    sharing = (
        sa.select(segments.c.session_id)
        .where(segments.c.owner_id == uid, segments.c.session_id != uid)
        .distinct()
        .limit(RELATED + 1)
    )
    related = [*owners, *(forks := list(connection.execute(sharing).scalars()))]
    if not related:
        return [], [], False
    names = dict(
        connection.execute(
            sa.select(sessions.c.id, sessions.c.name).where(
                sessions.c.id.in_(related), sessions.c.tenant == tenant, sessions.c.deleted_us.is_(None)
            )
        ).all()
    )
    found = sorted(names[fork] for fork in forks[:RELATED] if fork in names)
    return [names[owner] for owner in owners if owner in names], found, len(forks) > RELATED


def raw(connection: Connection, tenant: str, session_id: str, seq: int) -> transcript.Entry | None:
    """One entry, whole; None if the session has none of this number."""
    row = Rows(tenant).find(connection, session_id)
    found = transcript.read(connection, session_id, History.of(connection, row).between(seq, seq))
    return found[0] if found else None


# --- stores, tenants and keys


@dataclass(frozen=True)
class SharedStore:
    id: str
    url: str
    seen_us: int | None


def stores(connection: Connection) -> list[SharedStore]:
    found = sa.select(*(shared_stores.c[name] for name in SharedStore.__dataclass_fields__))
    return [SharedStore(*row) for row in connection.execute(found.order_by(shared_stores.c.id).limit(RELATED))]


@dataclass(frozen=True)
class Shared:
    """What an account has in a shared store, and how many of all extents there are about to be deleted: of as many
    extents as are counted."""

    extents: int
    nbytes: int
    doomed: int


def shared_of(connection: Connection, owner: str) -> dict[str, Shared]:
    """An account's part of each shared store, by the store's id."""
    own = sa.select(shared_extents.c.nbytes).where(
        shared_extents.c.store == shared_stores.c.id, shared_extents.c.owner == owner
    )
    of_owner = own.correlate(shared_stores).limit(COUNTED + 1)
    doomed = sa.select(sa.literal(1)).where(
        shared_extents.c.store == shared_stores.c.id, shared_extents.c.doomed_us.is_not(None)
    )
    some, going = of_owner.subquery(), doomed.correlate(shared_stores).limit(COUNTED + 1).subquery()
    query = sa.select(
        shared_stores.c.id,
        sa.select(sa.func.count()).select_from(some).scalar_subquery(),
        sa.select(sa.func.coalesce(sa.func.sum(some.c.nbytes), 0)).scalar_subquery(),
        sa.select(sa.func.count()).select_from(going).scalar_subquery(),
    ).limit(RELATED)
    return {row[0]: Shared(int(row[1]), int(row[2]), int(row[3])) for row in connection.execute(query)}


@dataclass(frozen=True)
class TenantRow:
    id: str
    expires_in_s: float | None
    requests_per_s: float | None
    kv_group: str | None
    created_us: int
    sessions: int


def all_tenants(connection: Connection, after: str | None) -> tuple[list[TenantRow], str | None]:
    """``PAGE`` tenants by their names, and how many sessions each has, up to a cap."""
    names = ("id", "expires_in_s", "requests_per_s", "kv_group", "created_us")
    count = _capped(
        sa.select(sa.literal(1)).where(session_turns.c.tenant == tenants.c.id).correlate(tenants), COUNTED_LAPSED
    )
    query = sa.select(*(tenants.c[name] for name in names), count).order_by(tenants.c.id).limit(PAGE + 1)
    if after is not None:
        query = query.where(tenants.c.id > after)
    found: Any = connection.execute(query)
    rows = [TenantRow(*row) for row in found]
    return rows[:PAGE], rows[PAGE - 1].id if len(rows) > PAGE else None


@dataclass(frozen=True)
class KeyRow:
    id: str
    tenant: str
    role: str
    note: str
    created_us: int
    revoked_us: int | None


def some_keys(connection: Connection, after: str | None) -> tuple[list[KeyRow], str | None]:
    """``PAGE`` keys, the newest first."""
    query = sa.select(*(api_keys.c[name] for name in KeyRow.__dataclass_fields__))
    query = query.order_by(api_keys.c.id.desc()).limit(PAGE + 1)
    if after is not None:
        query = query.where(api_keys.c.id < after)
    rows = [KeyRow(*row) for row in connection.execute(query)]
    return rows[:PAGE], rows[PAGE - 1].id if len(rows) > PAGE else None
