"""Responses of OpenAI's API that are kept: what was answered, and where in its session's history it stands.

What a response was given, and its output, are entries of its session: those after its base up to its head. The base is
the beginning of the session, unless the client once sent a whole conversation that the session had not kept in full:
then it was appended anew.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate.errors import ResponseNotFound
from agentstate.sessions import items
from agentstate.sessions.conversations import Conversation, Tip
from agentstate.sessions.items import Item
from agentstate.sessions.rows import Rows
from agentstate.sql.database import now_us
from agentstate.sql.models import conversation_tips, sessions
from agentstate.sql.models import responses as table

_ID = re.compile(r"resp_[0-9a-f]{32}")


@dataclass(frozen=True)
class NewResponse:
    """A response to keep: its ``document`` as answered, the items that it was given since ``base``, as far as the
    session has not kept them, and those of its output. ``received_us`` is when the former came. ``whole``: they are all
    that it was given, and ``base`` is where the session stands."""

    id: str
    document: dict[str, Any]
    received: Sequence[Item]
    output: Sequence[Item]
    received_us: int
    base: str | None = None
    whole: bool = False


@dataclass(frozen=True)
class Kept:
    """A kept response. ``session`` is its session's name; ``base``, ``input`` and ``head`` are ids of entries."""

    document: dict[str, Any]
    session: str
    base: str | None
    input: str | None
    head: str | None


def keep(
    connection: Connection, rows: Rows, before: Any, new: NewResponse, conversation: Conversation, time_us: int
) -> Any:
    """Append what a response was given and said, and note it. ``before`` is the locked row of its session; gives back
    the row as it is then. Raises InvalidEntry."""
    base = before.head_entry if new.whole else new.base
    _, received = items.append(connection, rows, before, new.received, new.received_us)
    _, after = items.append(connection, rows, received, new.output, time_us)
    connection.execute(
        sa.insert(table).values(
            id=new.id,
            tenant=rows.tenant,
            session_id=before.id,
            base_entry=base,
            input_entry=received.head_entry,
            head_entry=after.head_entry,
            digest=conversation.whole(),
            created_us=now_us(),
            document=new.document,
        )
    )
    return after


def find(connection: Connection, tenant: str, response_id: str) -> Kept:
    """Raises ResponseNotFound, also if its session is gone."""
    if not _ID.fullmatch(response_id):
        raise ResponseNotFound(f"there is no response {response_id[:80]!r}")
    row = connection.execute(
        sa.select(table, sessions.c.name)
        .join(sessions, sessions.c.id == table.c.session_id)
        .where(
            table.c.id == response_id,
            table.c.tenant == tenant,
            sessions.c.deleted_us.is_(None),
            sa.or_(sessions.c.expires_us.is_(None), sessions.c.expires_us > now_us()),
        )
    ).one_or_none()
    if row is None:
        raise ResponseNotFound(f"there is no response {response_id}")
    return Kept(row.document, row.name, row.base_entry, row.input_entry, row.head_entry)


def forget(connection: Connection, tenant: str, response_id: str) -> None:
    """Raises ResponseNotFound."""
    find(connection, tenant, response_id)
    connection.execute(sa.delete(table).where(table.c.id == response_id))


def covering(connection: Connection, tip: Tip) -> Any:
    """The row of a response that stands where ``tip`` does, and was given and said the messages of it: then the session
    has kept them all. None if there is none."""
    return connection.execute(
        sa.select(table.c.base_entry)
        .join(
            conversation_tips,
            sa.and_(
                conversation_tips.c.session_id == table.c.session_id,
                conversation_tips.c.head_entry == table.c.head_entry,
                conversation_tips.c.digest == table.c.digest,
            ),
        )
        .where(conversation_tips.c.id == tip.id)
        .limit(1)
    ).one_or_none()
