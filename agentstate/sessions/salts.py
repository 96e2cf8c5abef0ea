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

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate.fleet import manifests
from agentstate.sessions import tenants
from agentstate.sql import secret
from agentstate.sql.models import leases, sessions


def scope_of(connection: Connection, tenant_id: str) -> str | None:
    """The scope of the sessions that a tenant makes now."""
    if not tenants.any_key(connection):
        return None
    group = tenants.find(connection, tenant_id).kv_group
    if group == tenants.EVERYBODY:
        return None
    return scope_of_tenant(tenant_id) if group is None else scope_of_group(group)


def scope_of_tenant(tenant_id: str) -> str:
    """A tenant's own scope."""
    return f"tenant {tenant_id}"


def scope_of_group(group: str) -> str:
    """The scope of the tenants of a group."""
    return f"group {group}"


def salt(secret: bytes, scope: str | None, own: str | None) -> str | None:
    """The salt of a session in a scope, from the installation's secret. ``own`` is what the client chose."""
    if scope is None:
        return own
    text = f"{scope}\0{own or ''}".encode()
    return base64.urlsafe_b64encode(hmac.digest(secret, text, hashlib.sha256)).decode().rstrip("=")


def rotate(connection: Connection) -> int:
    """Take a new secret. The KV of all sessions that have a scope is out of reach from then on and is erased, and their
    manifests go: how many. Turns that are running publish no more manifests."""
    secret.renew(connection)
    scoped = sa.select(sessions.c.id).where(sessions.c.kv_scope.is_not(None))
    # Engines that are about to publish wait, and find their turns fenced off.
    connection.execute(scoped.order_by(sessions.c.id).with_for_update(key_share=True))
    connection.execute(sa.update(leases).where(leases.c.session_id.in_(scoped)).values(fence=leases.c.epoch + 1))
    return manifests.erase(connection, scoped)
