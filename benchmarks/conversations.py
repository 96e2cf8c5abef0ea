"""Sessions to measure on: conversations of given lengths, written into the tables in bulk, as the service writes them.

`check` verifies that: it writes one through the API and compares the rows.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from agentstate import ids
from agentstate.client import Client
from agentstate.client import message as message_entry
from agentstate.fleet import engines, manifests
from agentstate.fleet.engines import Engine
from agentstate.fleet.manifests import Manifest
from agentstate.sessions.outcomes import SuspendReason
from agentstate.settings import DEFAULT_TENANT
from agentstate.sql.database import Database, now_us
from agentstate.sql.models import EntryKind, SessionStatus
from agentstate.sql.models import entries as entries_table
from agentstate.sql.models import leases as leases_table
from agentstate.sql.models import manifests as manifests_table
from agentstate.sql.models import session_turns as turns_table
from agentstate.sql.models import sessions as sessions_table

MODEL = "bench"
PAGE_SIZE = 64
BATCH = 20_000
_TEXTS = 97

_words = random.Random(0)
_texts = ["".join(_words.choices("abcdefghij klmnop qrst uvw xyz", k=_words.randint(60, 400))) for _ in range(_TEXTS)]


def message(number: int) -> dict[str, str]:
    """The message at a place of a conversation: 60 to 400 characters of text, a user's and an assistant's in turn."""
    return {"role": "assistant" if number % 2 else "user", "content": f"{number} {_texts[number % _TEXTS]}"}


def names(length: int, count: int) -> list[str]:
    """The names of the sessions with so many entries; every peer names its own alike."""
    return [f"bench-{length}-{number}" for number in range(count)]


def fill(database: Database, counts: Mapping[int, int], engine: Engine, advance: Callable[[int], None]) -> None:
    """Write ``counts[length]`` suspended sessions of ``length`` entries each, with the manifest that ``engine`` would
    have saved of a page an entry. Their turns ended a second apart, the first session's last. ``advance`` is told how
    many entries are written."""
    with database.write() as connection:
        engines.register(connection, engine)
        time_us = connection.execute(sa.select(now_us())).scalar_one()
    rows: dict[sa.Table, list[dict[str, Any]]] = {}
    for length, count in counts.items():
        for number, name in enumerate(names(length, count)):
            for table, found in _session(name, length, engine, time_us - number * 1_000_000).items():
                rows.setdefault(table, []).extend(found)
            if len(rows[entries_table]) >= BATCH:
                advance(_write(database, rows))
    advance(_write(database, rows))


def check(database: Database, client: Client, length: int, engine: Engine) -> None:
    """Raises RuntimeError unless a session of `fill` has the same rows as one whose entries were appended through the
    API and whose manifest was saved by the library."""
    (filled,) = names(length, 1)
    session = client.create_session(MODEL)
    lease = client.resume(session.id).lease
    client.append(session.id, lease, [message_entry(message(number)) for number in range(length)])
    client.suspend(session.id, lease, durable_timeout_ms=0)
    with database.write() as connection:
        manifests.save(connection, Manifest(**_manifest(session.id, length, engine)))
        written, expected = (_rows(connection, name) for name in (filled, session.id))
    if written != expected:
        different = [name for name in expected if written[name] != expected[name]]
        raise RuntimeError(f"the rows of a session that was written in bulk are not the service's: {different}")


def _session(name: str, length: int, engine: Engine, time_us: int) -> dict[sa.Table, list[dict[str, Any]]]:
    uid = ids.new("ses")
    entry_ids: list[str | None] = [None, *(ids.new("ent") for _ in range(length))]
    entries = [
        {
            "id": entry_ids[seq],
            "session_id": uid,
            "parent_id": entry_ids[seq - 1],
            "seq": seq,
            "kind": EntryKind.MESSAGE,
            "payload": message(seq - 1),
            "open_calls": 0,
            "created_us": time_us,
        }
        for seq in range(1, length + 1)
    ]
    session = {
        "id": uid,
        "tenant": DEFAULT_TENANT,
        "name": name,
        "model": MODEL,
        "metadata": {},
        "status": SessionStatus.SUSPENDED,
        "head_entry": entry_ids[-1],
        "next_seq": length + 1,
        "revision": 4,  # made, resumed, appended to, suspended
        "created_us": time_us,
        "updated_us": time_us,
    }
    lease = {
        "session_id": uid,
        "token_hash": None,
        "epoch": 1,
        "expires_us": 0,
        "engine": engine.base_url,
        "released_us": time_us,
        "waits_for": SuspendReason.USER_WAIT,
    }
    manifest = {**_manifest(uid, length, engine), "updated_us": time_us}
    turn = {"session_id": uid, "tenant": DEFAULT_TENANT, "turned_us": time_us}
    return {
        sessions_table: [session],
        entries_table: entries,
        leases_table: [lease],
        turns_table: [turn],
        manifests_table: [manifest],
    }


def _manifest(uid: str, pages: int, engine: Engine) -> dict[str, Any]:
    return {
        "session_id": uid,
        "fingerprint": engine.fingerprint,
        "rank": engine.rank,
        "node": engine.node,
        "engine_id": engine.id,
        "page_size": PAGE_SIZE,
        "tokens": PAGE_SIZE * pages,
        "keys": b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(pages)),
        "nbytes": pages * 1024,
    }


def _write(database: Database, rows: dict[sa.Table, list[dict[str, Any]]]) -> int:
    written = len(rows.get(entries_table, ()))
    with database.write() as connection:
        for table in (sessions_table, entries_table, leases_table, turns_table, manifests_table):
            if rows.get(table):
                connection.execute(sa.insert(table), rows[table])
    rows.clear()
    return written


def _rows(connection: sa.Connection, name: str) -> dict[str, Any]:
    """All rows of a session, without what must differ: times, and ids, of which only the references count."""
    (session,) = connection.execute(sa.select(sessions_table).where(sessions_table.c.name == name)).mappings()
    entries = _of(connection, entries_table, session["id"], entries_table.c.seq)
    found: dict[str, Any] = {
        "sessions": [_comparable(session)],
        "head": session["head_entry"] == entries[-1]["id"],
        "parents": [entry["parent_id"] for entry in entries] == [None, *(entry["id"] for entry in entries[:-1])],
        "entries": [_comparable(entry) for entry in entries],
    }
    for table in (leases_table, turns_table, manifests_table):
        found[table.name] = [_comparable(row) for row in _of(connection, table, session["id"], table.c.session_id)]
    return found


def _of(connection: sa.Connection, table: sa.Table, uid: str, ordered: Any) -> Sequence[sa.RowMapping]:
    query = sa.select(table).where(table.c.session_id == uid).order_by(ordered)
    return connection.execute(query).mappings().all()


def _comparable(row: sa.RowMapping) -> dict[str, Any]:
    unlike = ("id", "name", "session_id", "head_entry", "parent_id")
    unlike += ("created_us", "updated_us", "released_us", "turned_us")
    return {column: value for column, value in row.items() if column not in unlike}
