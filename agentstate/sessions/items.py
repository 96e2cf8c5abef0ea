"""Items, of which a conversation consists in OpenAI's API: each is one entry of its session.

A message is the payload of a ``message``. The call of a function or a custom tool is a ``tool_call``, its output a
``tool_result``; these have the item beside what every tool call has. All others are notes that have the item, and so
are calls and outputs that do not fit the session's tool calls: a call that it has already, an output without its call.

Clients know an item by its own id, not by its entry's. A deleted item stays where it is, because forks share it and
what follows was said after it; an entry behind it says that it is gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate import documents, ids
from agentstate.errors import EntryNotFound, InvalidId
from agentstate.sessions import toolcalls, transcript
from agentstate.sessions.history import History
from agentstate.sessions.outcomes import Order
from agentstate.sessions.rows import Rows
from agentstate.sessions.transcript import Entry, NewEntry
from agentstate.sql.database import now_us
from agentstate.sql.models import EntryKind, entries, segments, sessions
from agentstate.sql.models import items as table

Item = dict[str, Any]

_ARGUMENTS = {"function_call": "arguments", "custom_tool_call": "input"}  # where a call has them
_OUTPUTS = frozenset({"function_call_output", "custom_tool_call_output"})
_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
    "reasoning": "rs",
}
MAX_ID_CHARACTERS = 200


@dataclass(frozen=True)
class ItemPage:
    """A run of items; ``has_more`` says whether there are others after it, in the order that was asked for."""

    items: list[Item]
    has_more: bool


def kind_of(item: Item) -> str:
    """The type of an item; that of a message may be left out."""
    kind = item.get("type")
    return kind if isinstance(kind, str) and kind else "message"


def shown(item: Item) -> Item:
    """An item as it is answered: with everything that OpenAI's types require."""
    kind = kind_of(item)
    if kind == "message":
        content = item.get("content")
        if content is None or isinstance(content, str):
            said = {"type": "output_text", "text": content or "", "annotations": []}
            if item.get("role") != "assistant":
                said = {"type": "input_text", "text": content or ""}
            content = [said]
        return {**item, "content": content, "status": item.get("status") or "completed"}
    if kind in _ARGUMENTS or kind in _OUTPUTS:
        return {**item, "status": item.get("status") or "completed"}
    if kind == "reasoning":
        return {**item, "summary": item.get("summary") or []}
    return item


def item_of(entry: Entry) -> Item | None:
    """The item that an entry is, if it is one."""
    item = entry.payload if entry.kind is EntryKind.MESSAGE else entry.payload.get("item")
    is_item = isinstance(item, dict) and isinstance(item.get("id"), str) and isinstance(item.get("type"), str)
    return item if is_item else None


def append(
    connection: Connection, rows: Rows, before: Any, given: Sequence[Item], time_us: int
) -> tuple[list[Item], Any]:
    """Append items to the session whose locked row is ``before``; gives them back with their ids, and the row as it is
    then. An item keeps its id unless the session has another of that id. Raises InvalidEntry."""
    if not given:
        return [], before
    history = History.of(connection, before)
    named = _named(connection, history, given)
    new = _fitting(connection, before, history, named)
    transcript.check(new)
    appended = rows.append(connection, before, new, time_us).entries
    connection.execute(
        sa.insert(table),
        [
            {"entry_id": entry.id, "session_id": before.id, "item_id": item["id"]}
            for entry, item in zip(appended, named, strict=True)
        ],
    )
    return named, rows.lock(connection, before.name)


def delete(connection: Connection, rows: Rows, before: Any, item_id: str) -> None:
    """Take an item away from the session whose locked row is ``before``. Raises EntryNotFound."""
    find(connection, before.name, History.of(connection, before), item_id)
    new = [NewEntry(EntryKind.NOTE, {"deleted_item": item_id})]
    (entry,) = rows.append(connection, before, new, before.time_us).entries
    connection.execute(sa.insert(table).values(entry_id=entry.id, session_id=before.id, item_id=item_id, deletes=True))


def find(connection: Connection, name: str, history: History, item_id: str) -> Item:
    """An item of the session called ``name``. Raises EntryNotFound."""
    places = _places(connection, history, table.c.item_id == item_id) if _is_id(item_id) else []
    if places and not places[-1].deletes:
        item = item_of(transcript.by_id(connection, name, [places[-1].entry_id])[places[-1].entry_id])
        if item is not None:
            return item
    raise EntryNotFound(f"conversation {name} has no item {item_id}")


def referred(
    connection: Connection, tenant: str, history: History, wanted: Mapping[str, int], most_bytes: int
) -> dict[str, Item] | None:
    """Items by their ids: those of ``history``, or else the newest that a session of the tenant has now. Those that no
    session has are missing. None if their entries, each as often as ``wanted``, have more than ``most_bytes``."""
    asked = [item_id for item_id in wanted if _is_id(item_id)]
    near = {place.item_id: place for place in _places(connection, history, table.c.item_id.in_(asked))}
    last = {place.item_id: place for place in _everywhere(connection, tenant, [*set(asked).difference(near)])} | near
    there = {place.entry_id: item_id for item_id, place in last.items() if not place.deletes}
    sizes = transcript.sizes(connection, list(there))
    if sum(size * wanted[there[entry_id]] for entry_id, size in sizes.items()) > most_bytes:
        return None
    found = transcript.by_id(connection, "", list(there))
    return {there[entry.id]: item for entry in found.values() if (item := item_of(entry)) is not None}


def read(connection: Connection, name: str, part: History) -> list[Item]:
    """All items in a part of the history of the session called ``name`` that were not deleted within it."""
    found: dict[str, Item] = {}
    for entry in transcript.read(connection, name, part):
        deleted = entry.payload.get("deleted_item") if entry.kind is EntryKind.NOTE else None
        if isinstance(deleted, str):
            found.pop(deleted, None)
        elif (item := item_of(entry)) is not None:
            found[item["id"]] = item
    return list(found.values())


def page(connection: Connection, name: str, rest: History, *, after: str | None, limit: int, order: Order) -> ItemPage:
    """At most ``limit`` items of ``rest``, those that follow the item ``after`` in the given order; fewer where they
    are large (`transcript.EntryPage`). Raises EntryNotFound when ``after`` is none of them."""
    gone = _deleted(connection, rest)
    newest = order is Order.DESCENDING
    if after is not None:
        places = _places(connection, rest, table.c.item_id == after) if _is_id(after) else []
        items = [place.seq for place in places if not place.deletes]
        if not items:
            raise EntryNotFound(f"conversation {name} has no item {after}")
        rest = _beyond(rest, items[-1], newest)
    found: list[Item] = []
    while rest.segments:
        part = transcript.page(connection, name, rest, limit + 1, newest=newest)
        for entry in reversed(part.entries) if newest else part.entries:
            if entry.id not in gone and (item := item_of(entry)) is not None:
                found.append(item)
        if len(found) > limit:
            return ItemPage(found[:limit], has_more=True)
        rest = _beyond(rest, part.entries[0 if newest else -1].seq, newest)
        if len(part.entries) <= limit and rest.segments and found:
            return ItemPage(found, has_more=True)
    return ItemPage(found, has_more=False)


def _is_there(sessions: sa.FromClause) -> sa.ColumnElement[bool]:
    """SQL: whether a session has neither been deleted nor expired."""
    expires_us = sessions.c.expires_us
    return sa.and_(sessions.c.deleted_us.is_(None), sa.or_(expires_us.is_(None), expires_us > now_us()))


def _beyond(history: History, seq: int, newest: bool) -> History:
    """What comes after an entry, if one goes up or down."""
    if not history.segments:
        return history
    return history.between(1, seq - 1) if newest else history.between(seq + 1, history.segments[-1].last)


def _places(connection: Connection, history: History, wanted: sa.ColumnElement[bool]) -> list[Any]:
    """Where a history has these items and their deletions, in its order."""
    found = connection.execute(
        sa.select(table, entries.c.seq)
        .join(entries, entries.c.id == table.c.entry_id)
        .where(table.c.session_id.in_(history.owners()), wanted)
    )
    return sorted((row for row in found if history.owner_of(row.seq) == row.session_id), key=lambda row: row.seq)


def _everywhere(connection: Connection, tenant: str, item_ids: Sequence[str]) -> list[Any]:
    """Where the histories of a tenant's sessions have these items, the newest last; before them the deletions of those
    that a session has no longer."""
    if not item_ids:
        return []
    owners, sharers = sessions.alias("owners"), sessions.alias("sharers")
    own = sa.and_(_is_there(owners), entries.c.seq >= owners.c.own_seq)
    shared = (
        sa.select(segments.c.session_id)
        .join(sharers, sharers.c.id == segments.c.session_id)
        .where(
            segments.c.owner_id == table.c.session_id,
            entries.c.seq.between(segments.c.first_seq, segments.c.last_seq),
            _is_there(sharers),
        )
        .exists()
    )
    # The column alone would have SQLite begin with all sessions of the tenant, as soon as there are ten ids.
    of_tenant = sa.func.coalesce(owners.c.tenant, "") == tenant
    found = connection.execute(
        sa.select(table, entries.c.seq)
        .join(entries, entries.c.id == table.c.entry_id)
        .join(owners, owners.c.id == table.c.session_id)
        .where(of_tenant, table.c.item_id.in_(item_ids), sa.or_(own, shared))
        .order_by(entries.c.created_us, entries.c.seq)
    )
    last: dict[tuple[str, str], Any] = {}
    for place in found:
        last.pop((place.session_id, place.item_id), None)
        last[place.session_id, place.item_id] = place
    return sorted(last.values(), key=lambda place: not place.deletes)


def _deleted(connection: Connection, history: History) -> set[str]:
    """The ids of the entries whose items were deleted."""
    deletions = table.alias("deletions")
    owners = history.owners()
    ids_of = sa.select(deletions.c.item_id).where(deletions.c.session_id.in_(owners), deletions.c.deletes)
    gone: set[str] = set()
    before: dict[str, list[str]] = {}
    for place in _places(connection, history, table.c.item_id.in_(ids_of)):
        if place.deletes:
            gone.update(before.pop(place.item_id, ()))
        else:
            before.setdefault(place.item_id, []).append(place.entry_id)
    return gone


def _named(connection: Connection, history: History, given: Sequence[Item]) -> list[Item]:
    """Items with their ids and types."""
    asked = [item["id"] for item in given if _is_id(item.get("id"))]
    places = _places(connection, history, table.c.item_id.in_(asked)) if asked else []
    last = {place.item_id: place for place in places}
    taken = {item_id for item_id, place in last.items() if not place.deletes}
    named = []
    for item in given:
        kind, item_id = kind_of(item), item.get("id")
        if not _is_id(item_id) or item_id in taken:
            item_id = ids.new(_PREFIXES.get(kind, "item"))
        taken.add(item_id)
        named.append({**item, "type": kind, "id": item_id})
    return named


def _is_id(value: Any) -> bool:
    if not isinstance(value, str) or len(value) > MAX_ID_CHARACTERS:
        return False
    try:
        ids.check(value)
    except InvalidId:
        return False
    return True


def _fitting(connection: Connection, before: Any, history: History, named: Sequence[Item]) -> list[NewEntry]:
    """The entries that items become in this session."""
    calls = {item["call_id"] for item in named if _is_call(item) or _is_output(item)}
    known = toolcalls.known(connection, before.id, history, calls) if calls else {}
    open_calls = {call_id: call.state in toolcalls.OPEN for call_id, call in known.items()}
    new = []
    for item in named:
        kind = kind_of(item)
        if kind == "message":
            new.append(NewEntry(EntryKind.MESSAGE, item))
        elif _is_call(item) and item["call_id"] not in open_calls:
            open_calls[item["call_id"]] = True
            payload = {"name": item["name"], "arguments": item.get(_ARGUMENTS[kind]), "item": item}
            new.append(NewEntry(EntryKind.TOOL_CALL, payload, item["call_id"]))
        elif _is_output(item) and open_calls.get(item["call_id"]):
            open_calls[item["call_id"]] = False
            new.append(NewEntry(EntryKind.TOOL_RESULT, {"output": item.get("output"), "item": item}, item["call_id"]))
        else:
            new.append(NewEntry(EntryKind.NOTE, {"item": item}))
    return new


def _is_call(item: Item) -> bool:
    name = item.get("name")
    is_named = isinstance(name, str) and bool(name) and documents.is_text(name)
    return kind_of(item) in _ARGUMENTS and is_named and _is_id(item.get("call_id"))


def _is_output(item: Item) -> bool:
    return kind_of(item) in _OUTPUTS and _is_id(item.get("call_id"))
