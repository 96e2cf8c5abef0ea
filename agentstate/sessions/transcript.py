"""Entries, which a transcript consists of: what they may be, and how they are kept.

A payload of ``BLOB_BYTES`` or more lies in ``blobs``, once a tenant however many entries have that content, and the
entry refers to it. Readers of entries do not see the difference.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate import documents, ids
from agentstate.errors import EntryNotFound, InvalidEntry, InvalidId
from agentstate.sessions import toolcalls
from agentstate.sessions.history import History
from agentstate.sql.database import insert, now_us
from agentstate.sql.models import EntryKind, blobs
from agentstate.sql.models import entries as table
from agentstate.sql.prepared import Prepared

BLOB_BYTES = 256 * 1024
# Bound of the payloads of one page: more than the body of a request may have, so that any entry fits.
MAX_PAGE_BYTES = 16 * 1024 * 1024
# So many entries fit a page without adding up their sizes: what is no blob has less than ``BLOB_BYTES``.
MAX_UNMEASURED = MAX_PAGE_BYTES // BLOB_BYTES
MAX_METADATA_BYTES = 64 * 1024  # it is read whenever its session is
# Histories of more segments are rare, and PostgreSQL would keep a long statement for each number of them.
MOST_KEPT_PARTS = 8
MAX_JSON_DEPTH = 64  # well within what every JSON reader and writer takes


@dataclass(frozen=True)
class NewEntry:
    """An entry to append.

    The payload is a JSON object. That of a tool call holds ``name`` and may hold ``arguments`` and ``expected_s``;
    that of a tool result holds either ``output`` or ``error``; both have a ``call_id``. Others are the caller's own.
    """

    kind: EntryKind
    payload: dict[str, Any]
    call_id: str | None = None

    @cached_property
    def content(self) -> str:
        """The payload as JSON, as it is stored. Raises InvalidEntry if it has no such form."""
        content = check_json(self.payload, f"the payload of a {self.kind}")
        if content.isascii() or len(content) >= BLOB_BYTES:
            return content.decode()
        return json.dumps(self.payload, separators=(",", ":"))


@dataclass(frozen=True)
class Entry:
    """An appended entry. ``seq`` numbers the entries of a history, without gaps if nothing was taken back;
    ``session_id`` is the session whose history it was read from. ``content`` is its payload as JSON: most entries are
    passed on without a look at it."""

    id: str
    session_id: str
    parent_id: str | None
    seq: int
    kind: EntryKind
    content: str
    call_id: str | None
    created_us: int

    @cached_property
    def payload(self) -> dict[str, Any]:
        payload: dict[str, Any] = json.loads(self.content)
        return payload


@dataclass(frozen=True)
class EntryPage:
    """A run of entries; ``has_more`` says whether the history goes on beyond its end, for a tail before its start.

    It has fewer entries than were asked for if their payloads exceed ``MAX_PAGE_BYTES``.
    """

    entries: list[Entry]
    has_more: bool


@dataclass(frozen=True)
class Place:
    """Where an entry stands in a history; ``open_calls`` tool calls have no result after it."""

    seq: int
    open_calls: int


def check(new: Sequence[NewEntry]) -> None:
    """Raises InvalidEntry unless ``new`` is one entry or more that could be part of some transcript."""
    if not new:
        raise InvalidEntry("there is nothing to append: give one entry or more")
    for entry in new:
        _check_entry(entry)


def check_metadata(metadata: dict[str, Any]) -> None:
    """Raises InvalidEntry if it is no JSON of Unicode, or has more than ``MAX_METADATA_BYTES``."""
    size_bytes = len(check_json(metadata, "metadata"))
    try:
        json.dumps(metadata, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InvalidEntry(f"metadata is not Unicode: {error}") from None
    if size_bytes > MAX_METADATA_BYTES:
        raise InvalidEntry(f"metadata has {size_bytes} bytes, {MAX_METADATA_BYTES} are allowed: append a note instead")


def _check_entry(entry: NewEntry) -> None:
    _ = entry.content  # it has one
    if entry.kind not in (EntryKind.TOOL_CALL, EntryKind.TOOL_RESULT):
        if entry.call_id is not None:
            raise InvalidEntry(f"a {entry.kind} has no call_id, {entry.call_id!r} was given")
        return
    if not entry.call_id:
        raise InvalidEntry(f"a {entry.kind} needs a call_id")
    try:
        ids.check(entry.call_id)
    except InvalidId as error:
        raise InvalidEntry(f"the call_id of a {entry.kind}: {error}") from None
    if entry.kind is EntryKind.TOOL_RESULT:
        if ("output" in entry.payload) == ("error" in entry.payload):
            raise InvalidEntry(f"the result of tool call {entry.call_id!r} needs either output or error in its payload")
        return
    name, expected_s = entry.payload.get("name"), entry.payload.get("expected_s")
    if not isinstance(name, str) or not name or not documents.is_text(name):
        raise InvalidEntry(f"tool call {entry.call_id!r} needs the tool's name in its payload")
    if expected_s is not None and (
        isinstance(expected_s, bool)
        or not isinstance(expected_s, int | float)
        # An integer of any length is a number to Python, but none that a database can store.
        or not 0 <= expected_s <= sys.float_info.max
    ):
        shown = "a very long integer" if isinstance(expected_s, int) else repr(expected_s)
        raise InvalidEntry(f"tool call {entry.call_id!r}: expected_s is not a number of seconds: {shown}")


def check_json(value: dict[str, Any], what: str) -> bytes:
    """``value`` as JSON. Raises InvalidEntry if it cannot be: NaN, which Python's JSON accepts, cannot."""
    try:
        content = documents.encode(value)
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
            return content
    raise InvalidEntry(f"{what} is nested deeper than {MAX_JSON_DEPTH} levels")


def alike(one: Any, other: Any) -> bool:
    """Whether two values are the same JSON, whatever the order of their keys. Unlike in Python, true is not 1."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def step(entry: Entry) -> toolcalls.Claim | toolcalls.Finish | None:
    """What an entry means for the tool calls of its session."""
    if entry.call_id is None:
        return None
    if entry.kind is EntryKind.TOOL_CALL:
        payload = entry.payload
        head = toolcalls.head(payload.get("arguments"))
        return toolcalls.Claim(entry.call_id, payload["name"], head, payload.get("expected_s"), entry.seq)
    return toolcalls.Finish(entry.call_id, "error" in entry.payload, entry.seq)


def write(connection: Connection, tenant: str, owner_id: str, new: Sequence[Entry], open_calls: int) -> int:
    """Store entries, which follow the owner's newest one, and return how many tool calls are open after them.

    ``open_calls`` is how many were open before them.
    """
    rows: list[dict[str, Any]] = []
    large: dict[bytes, bytes] = {}
    for entry in new:
        open_calls += {EntryKind.TOOL_CALL: 1, EntryKind.TOOL_RESULT: -1}.get(entry.kind, 0)
        stored, blob = entry.content, None
        # Of ASCII, if it is no blob: as many bytes as characters.
        if len(stored) >= BLOB_BYTES or not stored.isascii():
            content = stored.encode()
            blob = hashlib.sha256(tenant.encode() + b"\0" + content).digest()
            large[blob] = content
            stored = "{}"
        rows.append(
            {
                "id": entry.id,
                "session_id": owner_id,
                "parent_id": entry.parent_id,
                "seq": entry.seq,
                "kind": entry.kind.value,
                "stored": stored,
                "call_id": entry.call_id,
                "open_calls": open_calls,
                "created_us": entry.created_us,
                "blob": blob,
            }
        )
    # In the order of their keys: two transactions with the same blobs must not wait for each other in a circle.
    for key, content in sorted(large.items()):
        connection.execute(
            insert(connection.dialect.name, blobs)
            .values(key=key, content=content, used_us=now_us())
            .on_conflict_do_update(index_elements=["key"], set_={"used_us": now_us()})
        )
    _writing(connection.dialect.name).send_each(connection, rows)
    return open_calls


def read(connection: Connection, name: str, history: History) -> list[Entry]:
    """All entries of ``history``, a part of the history of the session called ``name``."""
    if not history.segments:
        return []
    found = _reading(len(history.segments)).all(connection, history.as_parameters())
    return _complete(connection, name, found)


def page(connection: Connection, name: str, rest: History, limit: int, *, newest: bool = False) -> EntryPage:
    """The oldest ``limit`` entries of ``rest``, or the newest; ordered by ``seq`` in any case. At least one entry."""
    wanted = rest.newest(limit) if newest else rest.oldest(limit)
    found = _read_bounded(connection, name, wanted, newest=newest)
    return EntryPage(found, has_more=rest.length > len(found))


def _read_bounded(connection: Connection, name: str, wanted: History, *, newest: bool) -> list[Entry]:
    """Like `read`, but only as many of the oldest entries, or the newest, as fit into ``MAX_PAGE_BYTES``."""
    return _read_bounded_later(connection, name, wanted, newest=newest)()


def _read_bounded_later(
    connection: Connection, name: str, wanted: History, *, newest: bool
) -> Callable[[], list[Entry]]:
    if not wanted.segments:
        return list
    if wanted.length > MAX_UNMEASURED:
        wanted = _within_bytes(connection, wanted, newest=newest)
    sent = _reading(len(wanted.segments)).send(connection, wanted.as_parameters())

    def answer() -> list[Entry]:
        rows = sent.all()
        if any(row.blob is not None for row in rows):
            fitting = _within_bytes(connection, wanted, newest=newest)
            rows = [row for row in rows if fitting.owner_of(row.seq) is not None]
        return _complete(connection, name, rows)

    return answer


def _within_bytes(connection: Connection, wanted: History, *, newest: bool) -> History:
    """The oldest entries of ``wanted``, or the newest, as many as fit into ``MAX_PAGE_BYTES``; at least one."""
    beyond = _beyond(connection.dialect.name, len(wanted.segments), newest)
    cut: int | None = connection.execute(beyond, {**wanted.as_parameters(), "most": MAX_PAGE_BYTES}).scalar_one()
    if cut is None:
        return wanted
    return wanted.between(cut + 1, wanted.segments[-1].last) if newest else wanted.between(1, cut - 1)


def fits(connection: Connection, part: History, most_bytes: int) -> bool:
    """Whether the payloads of a part of a history have ``most_bytes`` or fewer; one alone always does."""
    if part.length <= 1:
        return True
    beyond = _beyond(connection.dialect.name, len(part.segments), False)
    return connection.execute(beyond, {**part.as_parameters(), "most": most_bytes}).scalar_one() is None


@cache
def _beyond(dialect: str, parts: int, newest: bool) -> Any:
    """The ``seq`` of the first entry that does not fit. No payload is read for it, only how long it is."""
    order = table.c.seq.desc() if newest else table.c.seq
    until = sa.func.sum(_size(dialect)).over(order_by=order)
    number = sa.func.row_number().over(order_by=order)
    sized = (
        sa.select(table.c.seq, until.label("until"), number.label("number")).where(History.entries(parts)).subquery()
    )
    first = sa.func.max(sized.c.seq) if newest else sa.func.min(sized.c.seq)
    return sa.select(first).where(sized.c.until > sa.bindparam("most"), sized.c.number > 1)


def sizes(connection: Connection, wanted: Sequence[str]) -> dict[str, int]:
    """How many bytes the payloads of these entries have. None is read for it."""
    found = connection.execute(sa.select(table.c.id, _size(connection.dialect.name)).where(table.c.id.in_(wanted)))
    return {entry_id: size for entry_id, size in found}


def _size(dialect: str) -> sa.ColumnElement[int]:
    """SQL: how many bytes an entry's payload has."""
    if dialect == "postgresql":
        inline = sa.func.octet_length(sa.cast(table.c.payload, sa.Text))
    else:
        inline = sa.func.length(table.c.payload)
    stored = sa.select(sa.func.length(blobs.c.content)).where(blobs.c.key == table.c.blob).scalar_subquery()
    return inline + sa.func.coalesce(stored, 0)


def by_id(connection: Connection, name: str, wanted: Sequence[str]) -> dict[str, Entry]:
    """Entries by their ids, for whoever knows that they are the session's."""
    found = connection.execute(_SELECT.where(table.c.id.in_(wanted)))
    return {entry.id: entry for entry in _complete(connection, name, found.all())}


def find(connection: Connection, name: str, history: History, entry_id: str) -> Place:
    """Where an entry stands. Raises EntryNotFound if it is none of ``history``."""
    row = connection.execute(
        sa.select(table.c.session_id, table.c.seq, table.c.open_calls).where(table.c.id == entry_id)
    ).one_or_none()
    if row is None or history.owner_of(row.seq) != row.session_id:
        raise EntryNotFound(f"session {name} has no entry {entry_id}")
    return Place(row.seq, row.open_calls)


def tail_later(connection: Connection, name: str, history: History, length: int) -> Callable[[], EntryPage]:
    """The newest ``length`` entries, or more to keep a tool result with its call: asked now, answered later.

    If that is more than ``MAX_PAGE_BYTES``, fewer: the tail then begins after the results whose calls do not fit.
    """
    if length == 0 or not history.segments:
        return lambda: EntryPage([], has_more=bool(history.segments))
    wanted = history.newest(length)
    read = _read_bounded_later(connection, name, wanted, newest=True)
    return lambda: _tail(connection, name, history, wanted, read())


def _tail(connection: Connection, name: str, history: History, wanted: History, found: list[Entry]) -> EntryPage:
    newest = history.between(found[0].seq, wanted.segments[-1].last)
    called = {entry.call_id for entry in found if entry.kind is EntryKind.TOOL_CALL}
    cut = newest.first
    if any(entry.kind is EntryKind.TOOL_RESULT and entry.call_id not in called for entry in found):
        cut = toolcalls.whole_from(connection, history, cut)
        found = _read_bounded(connection, name, history.between(cut, newest.segments[-1].last), newest=True)
        if found[0].seq > cut:
            found = _whole(found)
    return EntryPage(found, has_more=not found or found[0].seq > history.first)


def _whole(found: list[Entry]) -> list[Entry]:
    """The newest of ``found`` that have no result without its call."""
    while True:
        called = {entry.call_id for entry in found if entry.kind is EntryKind.TOOL_CALL}
        alone = [
            number
            for number, entry in enumerate(found)
            if entry.kind is EntryKind.TOOL_RESULT and entry.call_id not in called
        ]
        if not alone:
            return found
        found = found[alone[-1] + 1 :]


_KINDS = {kind.value: kind for kind in EntryKind}
# A payload's text: neither the driver nor SQLAlchemy is to parse it.
_SELECT = sa.select(
    table.c.id,
    table.c.parent_id,
    table.c.seq,
    table.c.kind,
    sa.cast(table.c.payload, sa.Text).label("content"),
    table.c.call_id,
    table.c.created_us,
    table.c.blob,
)


@cache
def _reading(parts: int) -> Prepared:
    return Prepared(_SELECT.where(History.entries(parts)).order_by(table.c.seq), kept=parts <= MOST_KEPT_PARTS)


@cache
def _writing(dialect: str) -> Prepared:
    stored: sa.ColumnElement[Any] = sa.bindparam("stored", type_=sa.Text())
    if dialect == "postgresql":
        stored = sa.cast(stored, sa.JSON)
    return Prepared(sa.insert(table).values(payload=stored))


def _complete(connection: Connection, name: str, rows: Sequence[Any]) -> list[Entry]:
    wanted = {row.blob for row in rows if row.blob is not None}
    contents = {}
    if wanted:
        found = connection.execute(sa.select(blobs.c.key, blobs.c.content).where(blobs.c.key.in_(wanted)))
        contents = {bytes(blob.key): bytes(blob.content).decode() for blob in found}
    return [
        Entry(
            entry_id,
            name,
            parent_id,
            seq,
            _KINDS[kind],
            content if blob is None else contents[bytes(blob)],
            call_id,
            created_us,
        )
        for entry_id, parent_id, seq, kind, content, call_id, created_us, blob in rows
    ]
