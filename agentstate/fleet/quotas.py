"""Quotas: what an account may have on each tier of an engine and in the shared store, and how many sessions a tenant
may have.

The *account* is whom KV is charged to (`fleet.turns`): ``tenant NAME``, or ``group NAME`` for the sessions of tenants
that share KV in a group, or `NOBODY` for requests that prove no turn. Bytes count all ranks of an engine, which share
them evenly; in the shared store, those of all engines. A number of sessions is a tenant's own, whatever group its KV
belongs to, and stands at ``tenant NAME``.

A quota refuses nobody service: an account above it is the first whose pages leave, as soon as others need the room, and
nothing more of it is published. Only a session too many is not made.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate.sql.database import insert
from agentstate.sql.models import quotas

NOBODY = ""


@dataclass(frozen=True)
class Quota:
    """Limits; None for none."""

    device_bytes: int | None = None
    host_bytes: int | None = None
    nvme_bytes: int | None = None
    shared_bytes: int | None = None
    sessions: int | None = None


UNLIMITED = Quota()


def shown(account: str) -> str:
    """An account as people read it."""
    return account or "none"


def put(connection: Connection, account: str, quota: Quota) -> None:
    """Set all limits of an account. Engines learn of them with their next heartbeat."""
    if quota == UNLIMITED:
        connection.execute(sa.delete(quotas).where(quotas.c.account == account))
        return
    limits = vars(quota)
    connection.execute(
        insert(connection.dialect.name, quotas)
        .values(account=account, **limits)
        .on_conflict_do_update(index_elements=["account"], set_=limits)
    )


def find(connection: Connection, account: str) -> Quota:
    row = connection.execute(sa.select(*_LIMITS).where(quotas.c.account == account)).one_or_none()
    return UNLIMITED if row is None else Quota(*row)


def read(connection: Connection) -> dict[str, Quota]:
    """The quotas of all accounts that have one."""
    return {account: Quota(*limits) for account, *limits in connection.execute(_READ)}


_LIMITS = [quotas.c[name] for name in Quota.__dataclass_fields__]
_READ = sa.select(quotas.c.account, *_LIMITS).order_by(quotas.c.account)
