"""Garbage collection: what no session reaches any more is deleted, in short transactions.

An entry is reachable when it is in the history of a session that exists: its owner's, or through a fork's segments.
Only sessions that were marked are looked at (a deleted session, one that was rewound, what a deleted fork shared), so
a collection costs what there is to collect, plus one walk over the keys of the blobs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate.errors import DatabaseError
from agentstate.fleet import manifests
from agentstate.sessions import branches
from agentstate.sessions.history import History, Segment
from agentstate.sql.database import Database, now_us
from agentstate.sql.models import (
    CHECKPOINT_TABLES,
    api_keys,
    blobs,
    durations,
    entries,
    idempotency,
    kv_pins,
    operations,
    segments,
    sessions,
    tool_calls,
    tool_timings,
)

logger = logging.getLogger(__name__)

BATCH = 500
HOUR_S = 3600
IDEMPOTENCY_S = 24 * HOUR_S
OPERATIONS_S = 7 * 24 * HOUR_S
PINS_S = 0.0  # once it has ended
TIMINGS_S = 90 * 24 * HOUR_S
# What has expired is erased that soon, however seldom the rest is collected.
EXPIRY_S = 20.0
# A blob that an entry is about to refer to, in a transaction that has not ended yet, must not go.
BLOB_GRACE_S = 10 * 60


@dataclass(frozen=True)
class Collected:
    """How many rows went."""

    sessions: int = 0
    entries: int = 0
    blobs: int = 0
    records: int = 0  # of idempotency, operations and tool timings


def collect(database: Database, *, expired_after_s: float, blob_grace_s: float = BLOB_GRACE_S) -> Collected:
    """Delete sessions that expired ``expired_after_s`` ago or more, and everything that nothing reaches.

    The KV of sessions that have expired is erased (`release_expired`). Safe beside services that write, and beside
    other collections. Raises DatabaseError; then what was deleted so far stays deleted.
    """
    release_expired(database)
    _bury_expired(database, expired_after_s)
    gone_sessions = gone_entries = 0
    for session_id in _marked(database):
        removed, left = _collect_session(database, session_id)
        gone_entries += removed
        gone_sessions += not left
    return Collected(gone_sessions, gone_entries, _collect_blobs(database, blob_grace_s), _collect_records(database))


def release_expired(database: Database) -> None:
    """Have the KV of sessions that have expired erased, although it can still be told that they were. Raises
    DatabaseError."""
    while True:
        with database.write() as connection:
            released = manifests.release_expired(connection, BATCH)
        if released < BATCH:
            return


def remove_tenant(database: Database, tenant_id: str) -> int:
    """Delete all sessions of a tenant, also those that run, and what was learned of them, and revoke its keys: how many
    sessions. Raises DatabaseError; then what was deleted so far stays deleted."""
    with database.write() as connection:
        connection.execute(
            sa.update(api_keys)
            .where(api_keys.c.tenant == tenant_id, api_keys.c.revoked_us.is_(None))
            .values(revoked_us=now_us())
        )
    of_tenant = sa.and_(sessions.c.tenant == tenant_id, sessions.c.deleted_us.is_(None))
    buried = _bury(database, of_tenant)
    with database.write() as connection:
        connection.execute(sa.delete(durations).where(durations.c.tenant == tenant_id))
        connection.execute(sa.delete(tool_timings).where(tool_timings.c.tenant == tenant_id))
    return buried


class Collector:
    """Collects every ``interval_s`` on a thread of its own, until it is closed. The KV of what has expired is erased
    sooner."""

    def __init__(self, database: Database, interval_s: float, expired_after_s: float):
        self._database = database
        self._interval_s = interval_s
        self._expired_after_s = expired_after_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="agentstate-collector", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; waits for a collection that is under way."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        waits_s = min(self._interval_s, EXPIRY_S)
        collected_s = time.monotonic()
        while not self._closing.wait(waits_s):
            try:
                if time.monotonic() - collected_s + waits_s / 2 < self._interval_s:
                    release_expired(self._database)
                    continue
                collected_s = time.monotonic()
                collected = collect(self._database, expired_after_s=self._expired_after_s)
                if collected != Collected():
                    logger.info("collected %s", collected)
            except DatabaseError as error:
                logger.warning("the collection broke off and is tried again: %s", error)
            except Exception:
                logger.exception("the collection broke off and is tried again")


def _bury_expired(database: Database, expired_after_s: float) -> None:
    due = sa.and_(
        sessions.c.expires_us.is_not(None),
        sessions.c.deleted_us.is_(None),
        sessions.c.expires_us <= now_us() - round(expired_after_s * 1_000_000),
    )
    _bury(database, due)


def _bury(database: Database, due: sa.ColumnElement[bool]) -> int:
    buried = 0
    while True:
        with database.write() as connection:
            rows = connection.execute(
                sa.select(sessions).where(due).order_by(sessions.c.id).limit(BATCH).with_for_update(key_share=True)
            ).all()
            for row in rows:
                branches.bury(connection, row)
        buried += len(rows)
        if len(rows) < BATCH:
            return buried


def _marked(database: Database) -> Iterator[str]:
    after = ""
    while True:
        with database.read() as connection:
            found = (
                connection.execute(
                    sa.select(sessions.c.id)
                    .where(sessions.c.garbage, sessions.c.id > after)
                    .order_by(sessions.c.id)
                    .limit(BATCH)
                )
                .scalars()
                .all()
            )
        yield from found
        if len(found) < BATCH:
            return
        after = found[-1]


def _collect_session(database: Database, session_id: str) -> tuple[int, bool]:
    """Delete the entries of one session that no history has; gives back how many, and whether the session is left."""
    removed = 0
    # The mark goes first: whoever makes garbage from now on marks the session again.
    with database.write() as connection:
        connection.execute(sa.update(sessions).where(sessions.c.id == session_id).values(garbage=False))
    with database.read() as connection:
        row = connection.execute(sa.select(sessions).where(sessions.c.id == session_id)).one_or_none()
        if row is None:
            return 0, False
        unreached = _unreached(connection, row)
    try:
        for part in unreached:
            for first in range(part.first, part.last + 1, BATCH):
                last = min(part.last, first + BATCH - 1)
                with database.write() as connection:
                    removed += connection.execute(
                        sa.delete(entries).where(entries.c.session_id == session_id, entries.c.seq.between(first, last))
                    ).rowcount
                    connection.execute(
                        sa.delete(tool_calls).where(
                            tool_calls.c.session_id == session_id, tool_calls.c.call_seq.between(first, last)
                        )
                    )
        if row.deleted_us is None:
            return removed, True
        # Not left to the deletion of the session, which forks may put off for ever.
        for name in CHECKPOINT_TABLES:
            table = sa.table(name, sa.column("session_id"))
            with database.write() as connection:
                connection.execute(sa.delete(table).where(table.c.session_id == session_id))
        with database.write() as connection:
            shared = sa.exists().where(segments.c.owner_id == session_id)
            left = connection.execute(
                sa.delete(sessions).where(sessions.c.id == session_id, ~shared).returning(sessions.c.id)
            ).one_or_none()
            if left is None:
                # A fork may have been rewound to before what it shared.
                manifests.release(connection, [session_id])
            else:
                manifests.erase(connection, [session_id])
            return removed, left is None
    except BaseException:
        with database.write() as connection:
            branches.mark_garbage(connection, [session_id])
        raise


def _unreached(connection: Connection, row: sa.Row[tuple[object, ...]]) -> list[Segment]:
    """The runs of a session's own entries that are in no history."""
    oldest = connection.execute(
        sa.select(sa.func.min(entries.c.seq)).where(entries.c.session_id == row.id)
    ).scalar_one()
    if oldest is None:
        return []
    reached = [
        Segment(row.id, found.first_seq, found.last_seq)
        for found in connection.execute(sa.select(segments).where(segments.c.owner_id == row.id))
    ]
    if row.deleted_us is None:
        reached.append(Segment(row.id, row.own_seq, row.next_seq))
    gaps, at = [], oldest
    for part in sorted(reached, key=lambda part: part.first):
        gaps.append(Segment(row.id, at, part.first - 1))
        at = max(at, part.last + 1)
    gaps.append(Segment(row.id, at, row.next_seq - 1))
    return list(History.joined(gaps).segments)


def _collect_blobs(database: Database, grace_s: float) -> int:
    old = blobs.c.used_us <= now_us() - round(grace_s * 1_000_000)
    unused = sa.and_(old, ~sa.exists().where(entries.c.blob == blobs.c.key))
    return _delete_in_batches(database, blobs.c.key, unused)


def _collect_records(database: Database) -> int:
    def older_than(column: sa.Column[int], seconds: float) -> sa.ColumnElement[bool]:
        return column <= now_us() - round(seconds * 1_000_000)

    return (
        _delete_in_batches(database, idempotency.c.key, older_than(idempotency.c.created_us, IDEMPOTENCY_S))
        + _delete_in_batches(
            database,
            operations.c.id,
            sa.and_(operations.c.finished_us.is_not(None), older_than(operations.c.created_us, OPERATIONS_S)),
        )
        + _delete_in_batches(database, kv_pins.c.session_id, older_than(kv_pins.c.until_us, PINS_S))
        + _delete_in_batches(database, tool_timings.c.id, older_than(tool_timings.c.finished_us, TIMINGS_S))
    )


def _delete_in_batches(database: Database, key: sa.Column, condition: sa.ColumnElement[bool]) -> int:  # type: ignore[type-arg]
    removed = 0
    while True:
        with database.write() as connection:
            some = sa.select(key).where(condition).limit(BATCH)
            # The condition again: a row may have changed since it was found.
            count = connection.execute(sa.delete(key.table).where(key.in_(some), condition)).rowcount
        removed += count
        if count < BATCH:
            return removed
