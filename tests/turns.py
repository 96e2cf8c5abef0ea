"""Turns of sessions that no service has begun."""

from __future__ import annotations

import sqlalchemy as sa

from agentstate.fleet.turns import Turn
from agentstate.sql.database import Database
from agentstate.sql.models import leases, sessions


def turn(session_id: str = "s", epoch: int = 1) -> Turn:
    return Turn(session_id, epoch, "tenant default")


def begin(database: Database, *session_ids: str, epoch: int = 1, fence: int = 0) -> None:
    """Make sessions, of which each has such a lease."""
    with database.write() as connection:
        for session_id in session_ids:
            connection.execute(
                sa.insert(sessions).values(
                    id=session_id,
                    name=session_id,
                    model="m",
                    metadata={},
                    status="running",
                    next_seq=1,
                    revision=1,
                    created_us=0,
                    updated_us=0,
                )
            )
            lease = {"session_id": session_id, "epoch": epoch, "fence": fence, "expires_us": 0}
            connection.execute(sa.insert(leases).values(lease))
