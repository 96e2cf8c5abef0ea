"""Who shares KV with whom: the salt that goes into every page key of a session.

Without one, whoever sends a prompt to an engine learns by the time of the answer, and by ``cached_tokens``, whether
somebody else's prompt began alike. A session therefore belongs to a *scope*, given when it is made: its tenant's own, a
group of tenants that an operator lets share, or none, which is everybody who reaches the engine. Its salt follows from
the scope and a secret of this installation, kept in SQL. Nobody derives another scope's salt without the secret.

Until the first API key is made there is one tenant and nobody to keep apart: its sessions have no scope.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate.fleet import manifests
from agentstate.sessions import tenants
from agentstate.sql.database import insert, now_us
from agentstate.sql.models import sessions, settings

_NAME = "kv_secret"


def scope_of(connection: Connection, tenant_id: str) -> str | None:
    """The scope of the sessions that a tenant makes now."""
    if not tenants.any_key(connection):
        return None
    group = tenants.find(connection, tenant_id).kv_group
    if group == tenants.EVERYBODY:
        return None
    return f"tenant {tenant_id}" if group is None else f"group {group}"


def salt(connection: Connection, scope: str | None, own: str | None) -> str | None:
    """The salt of a session in a scope, ``own`` being the one that its client chose."""
    if scope is None:
        return own
    text = f"{scope}\0{own or ''}".encode()
    return base64.urlsafe_b64encode(hmac.digest(_secret(connection), text, hashlib.sha256)).decode().rstrip("=")


def rotate(connection: Connection) -> int:
    """Take a new secret. The KV of all sessions that have a scope is out of reach from then on and is erased, and their
    manifests go: how many."""
    connection.execute(sa.update(settings).where(settings.c.name == _NAME).values(value=_new(), updated_us=now_us()))
    scoped = sa.select(sessions.c.id).where(sessions.c.kv_scope.is_not(None))
    return manifests.erase(connection, scoped)


def _secret(connection: Connection) -> bytes:
    stored = sa.select(settings.c.value).where(settings.c.name == _NAME)
    if (value := connection.execute(stored).scalar()) is None:
        # Whoever is first decides, for all services.
        connection.execute(
            insert(connection.dialect.name, settings)
            .values(name=_NAME, value=_new(), updated_us=now_us())
            .on_conflict_do_nothing(index_elements=["name"])
        )
        value = connection.execute(stored).scalar_one()
    return bytes(value)


def _new() -> bytes:
    return secrets.token_bytes(32)
