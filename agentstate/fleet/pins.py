"""Pins: which sessions' KV is to stay on a tier of their engine, and until when.

A pin lives here, so that it holds after a restart of the engine, and on the engine that a session moves to: engines
read those of their sessions with every heartbeat.
"""

from __future__ import annotations

from enum import StrEnum

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate.sql.database import insert, now_us
from agentstate.sql.models import kv_pins, leases

# Of one engine: those that end last.
MOST = 10_000


class PinTier(StrEnum):
    DEVICE = "device"
    HOST = "host"
    NVME = "nvme"


def put(connection: Connection, session_id: str, tier: PinTier, for_s: float) -> int:
    """Pin a session for so many seconds, in place of its pin before: until when, in microseconds."""
    values = {"tier": tier, "until_us": now_us() + round(for_s * 1_000_000)}
    statement = (
        insert(connection.dialect.name, kv_pins)
        .values(session_id=session_id, **values)
        .on_conflict_do_update(index_elements=["session_id"], set_=values)
        .returning(kv_pins.c.until_us)
    )
    until_us: int = connection.execute(statement).scalar_one()
    return until_us


def remove(connection: Connection, session_id: str) -> bool:
    """End a session's pin. False if it has none."""
    return connection.execute(sa.delete(kv_pins).where(kv_pins.c.session_id == session_id)).rowcount > 0


def of_engine(connection: Connection, base_url: str, dp_rank: int) -> dict[str, tuple[str, float]]:
    """The pins that hold now of the sessions whose newest turn was given to this engine, to this one of its DP ranks:
    their tiers, and for how many seconds they hold."""
    rows = connection.execute(_OF_ENGINE, {"base_url": base_url, "dp_rank": dp_rank})
    return {session_id: (tier, rest_us / 1_000_000) for session_id, tier, rest_us in rows}


_OF_ENGINE = (
    sa.select(kv_pins.c.session_id, kv_pins.c.tier, kv_pins.c.until_us - now_us())
    .join(leases, leases.c.session_id == kv_pins.c.session_id)
    .where(
        kv_pins.c.until_us > now_us(),
        leases.c.engine == sa.bindparam("base_url"),
        sa.func.coalesce(leases.c.dp_rank, sa.bindparam("dp_rank")) == sa.bindparam("dp_rank"),
    )
    .order_by(kv_pins.c.until_us.desc())
    .limit(MOST)
)
