"""The secret of an installation: kept in SQL, made up by whoever needs it first, the same for all services and engines.

Salts (`sessions.salts`) and turn tokens (`fleet.turns`) are derived from it, each in a way of its own, so that none of
them says anything of another.
"""

from __future__ import annotations

import secrets

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate.sql.database import insert, now_us
from agentstate.sql.models import settings

_NAME = "kv_secret"
_STORED = sa.select(settings.c.value).where(settings.c.name == _NAME)


def read(connection: Connection) -> bytes:
    """The secret, 32 bytes. Writes where there is none yet."""
    if (value := connection.execute(_STORED).scalar()) is None:
        # Whoever is first decides, for all services and engines.
        connection.execute(
            insert(connection.dialect.name, settings)
            .values(name=_NAME, value=_new(), updated_us=now_us())
            .on_conflict_do_nothing(index_elements=["name"])
        )
        value = connection.execute(_STORED).scalar_one()
    return bytes(value)


def renew(connection: Connection) -> None:
    """Take a new secret, where there is one."""
    connection.execute(sa.update(settings).where(settings.c.name == _NAME).values(value=_new(), updated_us=now_us()))


def _new() -> bytes:
    return secrets.token_bytes(32)
