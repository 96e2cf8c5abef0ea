"""Where histories branch: what a fork or a rewind keeps, and what a deleted session leaves behind.

Nothing is copied and nothing is deleted here, so the cost does not depend on the length of a history. What no history
reaches any more is only marked; `agentstate.sessions.collection` takes it away. Only a session that is rewound again
and again has entries numbered anew, now and then: see `compact`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate.errors import NotABranchPoint
from agentstate.fleet import manifests
from agentstate.sessions import transcript
from agentstate.sessions.history import MAX_SEGMENTS, History, Segment
from agentstate.sql.database import now_us
from agentstate.sql.models import conversation_tips, entries, kv_pins, leases, responses, segments, sessions, tool_calls

COMPACT_AT = 64


@dataclass(frozen=True)
class Branch:
    """The history that goes on from ``head_id``, whose next entry is ``next_seq``."""

    history: History
    head_id: str | None
    next_seq: int
    open_calls: int


START = Branch(History(), None, 1, 0)
"""Where nothing has been appended yet."""


def branch_at(connection: Connection, row: Any, history: History, entry_id: str | None) -> Branch:
    """The part of a session's history up to an entry, the head if it is None.

    Tool calls may be open at the head only. Raises EntryNotFound, NotABranchPoint.
    """
    if entry_id is None or entry_id == row.head_entry:
        return _bounded(Branch(history, row.head_entry, row.next_seq, row.open_calls), row)
    place = transcript.find(connection, row.name, history, entry_id)
    if place.open_calls:
        raise NotABranchPoint(
            f"entry {entry_id} of session {row.name} stands between a tool call and its result: choose one before "
            "the call or after the result",
            revision=row.revision,
        )
    return _bounded(Branch(history.between(1, place.seq), entry_id, place.seq + 1, 0), row)


def compact(connection: Connection, row: Any, history: History) -> bool:
    """Make one segment of the newest ones of a history that has ``COMPACT_AT`` or more, each left by a rewind.

    Their entries keep their ids and get new ``seq``, which follow all that were ever given. Only entries of the session
    itself are, and none that a fork shares. Gives back whether the history changed: then its row did, whose lock the
    caller holds, but for its revision.
    """
    if len(history.segments) < COMPACT_AT:
        return False
    shared_to = connection.execute(
        sa.select(sa.func.max(segments.c.last_seq)).where(
            segments.c.owner_id == row.id, segments.c.session_id != row.id
        )
    ).scalar()
    newest: list[Segment] = []
    for part in history.segments[: -COMPACT_AT // 2 - 1 : -1]:
        if part.owner_id != row.id or part.first <= (shared_to or 0):
            break
        newest.insert(0, part)
    if len(newest) < 2:
        return False
    moves, next_seq = [], row.next_seq
    for part in newest:
        moves.append({"uid": row.id, "first": part.first, "last": part.last, "by": next_seq - part.first})
        next_seq += part.length
    for column in (entries.c.seq, tool_calls.c.call_seq, tool_calls.c.result_seq):
        connection.execute(
            sa.update(column.table)
            .where(
                column.table.c.session_id == sa.bindparam("uid"),
                column.between(sa.bindparam("first"), sa.bindparam("last")),
            )
            .values({column.name: column + sa.bindparam("by")}),
            moves,
        )
    History(history.segments[: -len(newest)]).close(connection, row.id)
    connection.execute(
        sa.update(sessions).where(sessions.c.id == row.id).values(own_seq=row.next_seq, next_seq=next_seq)
    )
    return True


def bury(connection: Connection, row: Any) -> None:
    """Delete a session whose row is locked: its id is free, its row stays until nothing shares its entries. Its pages
    are erased, unless a fork is going to begin with them, and so are those of its ancestors that only it was to."""
    family = [row.id, *History.of(connection, row).owners()]
    mark_garbage(connection, family)
    connection.execute(sa.delete(segments).where(segments.c.session_id == row.id))
    connection.execute(sa.delete(leases).where(leases.c.session_id == row.id))
    for table in (responses, conversation_tips, kv_pins):
        connection.execute(sa.delete(table).where(table.c.session_id == row.id))
    connection.execute(
        sa.update(sessions)
        .where(sessions.c.id == row.id)
        # No id of a session that can be read has this sign.
        .values(name="~" + row.id, deleted_us=now_us(), revision=sessions.c.revision + 1)
    )
    manifests.release(connection, family)


def mark_garbage(connection: Connection, owner_ids: Collection[str]) -> None:
    """These sessions may own entries that no history reaches any more."""
    # Locked in order, so that two sessions with the same ancestors do not wait for each other in a circle.
    clean = sa.select(sessions.c.id).where(sessions.c.id.in_(owner_ids), sa.not_(sessions.c.garbage))
    found = connection.execute(clean.order_by(sessions.c.id).with_for_update(key_share=True)).scalars().all()
    if found:
        connection.execute(sa.update(sessions).where(sessions.c.id.in_(found)).values(garbage=True))


def _bounded(branch: Branch, row: Any) -> Branch:
    # One more than now, for what the branch appends itself.
    if len(branch.history.segments) >= MAX_SEGMENTS:
        raise NotABranchPoint(
            f"the history of session {row.name} was forked {MAX_SEGMENTS} times up to there: start a new session "
            "from what is worth keeping of it",
            revision=row.revision,
        )
    return branch
