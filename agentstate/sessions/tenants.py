"""Tenants and their API keys: whose sessions a caller sees.

A key is a secret that is shown once, when it is made; SQL has its SHA-256. Until the first key is made the service
knows one tenant, ``default``, and asks nobody who they are. From then on every call needs a key, also when all keys
have been revoked.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate import ids
from agentstate.errors import KeyNotFound, SettingsError
from agentstate.sql.database import insert, now_us
from agentstate.sql.models import api_keys, tenants
from agentstate.sql.prepared import Prepared

PREFIX = "ags_"
EVERYBODY = "*"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class Tenant:
    """``expires_in_s`` is the expiry of sessions that are created without one (None: they never expire).
    ``requests_per_s`` limits the requests to one service (None: the service's setting holds). ``kv_group`` is whom its
    new sessions share KV with: None is nobody, `EVERYBODY` whoever reaches the engine, and any other name the tenants
    of that group.
    """

    id: str
    expires_in_s: float | None
    requests_per_s: float | None
    kv_group: str | None = None


class Role(StrEnum):
    """What a key may do with its tenant's sessions, each more than the one before."""

    VIEWER = "viewer"  # read
    OPERATOR = "operator"  # change and run them
    ADMIN = "admin"  # also see, in the console, which tenants and keys there are, and manage the keys

    @property
    def writes(self) -> bool:
        return self is not Role.VIEWER


@dataclass(frozen=True)
class ApiKey:
    id: str
    tenant: str
    note: str
    created_us: int
    revoked_us: int | None
    role: Role = Role.OPERATOR


@dataclass(frozen=True)
class Caller:
    """Whom a valid key belongs to, and what it may do. ``key_id`` is None for who needs no key."""

    tenant: Tenant
    role: Role
    key_id: str | None


@dataclass(frozen=True)
class NewKey:
    """A key that was just made, and the only time that its secret is known."""

    key: ApiKey
    secret: str = field(repr=False)


def check_name(name: str) -> None:
    """Raises SettingsError if no tenant can have this name."""
    if not NAME.fullmatch(name):
        raise SettingsError(f"{name!r} is no name of a tenant: letters, digits, '.', '_' and '-', at most 64")


def put(connection: Connection, tenant: Tenant) -> None:
    """Make a tenant, or change its limits. Raises SettingsError if its name cannot be one."""
    check_name(tenant.id)
    if tenant.kv_group not in (None, EVERYBODY) and not NAME.fullmatch(tenant.kv_group):
        raise SettingsError(f"{tenant.kv_group!r} is no name of a group: letters, digits, '.', '_' and '-', at most 64")
    limits = {
        "expires_in_s": tenant.expires_in_s,
        "requests_per_s": tenant.requests_per_s,
        "kv_group": tenant.kv_group,
    }
    connection.execute(
        insert(connection.dialect.name, tenants)
        .values(id=tenant.id, created_us=now_us(), **limits)
        .on_conflict_do_update(index_elements=["id"], set_=limits)
    )


def find(connection: Connection, tenant_id: str) -> Tenant:
    """A tenant's limits; the defaults if it was never put."""
    row = _FIND.first(connection, {"tenant": tenant_id})
    return Tenant(tenant_id, None, None) if row is None else _tenant(row)


def every(connection: Connection) -> list[Tenant]:
    """The tenants that have a key or limits, by their names."""
    return [_tenant(row) for row in connection.execute(sa.select(tenants).order_by(tenants.c.id))]


def sharing(tenant: Tenant) -> str:
    """Whom a tenant's new sessions share KV with, in a sentence."""
    if tenant.kv_group is None:
        return f"the KV of tenant {tenant.id} is its own"
    others = "everybody who reaches the engines" if tenant.kv_group == EVERYBODY else f"group {tenant.kv_group}"
    return f"the KV of tenant {tenant.id} is shared with {others}, who can tell by time what its prompts are"


def create_key(connection: Connection, tenant_id: str, note: str = "", role: Role = Role.OPERATOR) -> NewKey:
    """Make a key for a tenant, and the tenant if it does not exist. Raises SettingsError."""
    put(connection, find(connection, tenant_id))
    secret = PREFIX + secrets.token_urlsafe(32)
    row = connection.execute(
        sa.insert(api_keys)
        .values(
            id=ids.new("key"), tenant=tenant_id, note=note, secret_hash=_hash(secret), created_us=now_us(), role=role
        )
        .returning(api_keys)
    ).one()
    return NewKey(_key(row), secret)


def list_keys(connection: Connection) -> list[ApiKey]:
    """All keys, the oldest first, also revoked ones."""
    return [_key(row) for row in connection.execute(sa.select(api_keys).order_by(api_keys.c.created_us, api_keys.c.id))]


def find_key(connection: Connection, key_id: str) -> ApiKey:
    """Raises KeyNotFound."""
    row = connection.execute(sa.select(api_keys).where(api_keys.c.id == key_id)).one_or_none()
    if row is None:
        raise _no_key(key_id)
    return _key(row)


def revoke_key(connection: Connection, key_id: str) -> None:
    """From now on the key is not valid. Raises KeyNotFound; revoking twice changes nothing."""
    result = connection.execute(
        sa.update(api_keys)
        .where(api_keys.c.id == key_id)
        .values(revoked_us=sa.func.coalesce(api_keys.c.revoked_us, now_us()))
    )
    if result.rowcount == 0:
        raise _no_key(key_id)


def set_role(connection: Connection, key_id: str, role: Role) -> None:
    """From now on the key may do what the role may. Raises KeyNotFound."""
    if connection.execute(sa.update(api_keys).where(api_keys.c.id == key_id).values(role=role)).rowcount == 0:
        raise _no_key(key_id)


def _no_key(key_id: str) -> KeyNotFound:
    return KeyNotFound(f"there is no API key {key_id}: `agentstate keys list` shows them")


def any_key(connection: Connection) -> bool:
    """Whether a key was ever made."""
    return _ANY_KEY.scalar(connection, {}) is not None


def authenticate(connection: Connection, secret: str) -> Caller | None:
    """Whom a secret belongs to; None if it is no valid key's."""
    return _caller(connection, api_keys.c.secret_hash == _hash(secret))


def caller_of(connection: Connection, key_id: str) -> Caller | None:
    """Whom a key belongs to; None if it is not valid any more."""
    return _caller(connection, api_keys.c.id == key_id)


def _caller(connection: Connection, which: sa.ColumnElement[bool]) -> Caller | None:
    row = connection.execute(
        sa.select(tenants, api_keys.c.role, api_keys.c.id.label("key_id"))
        .join(api_keys)
        .where(which, api_keys.c.revoked_us.is_(None))
    ).one_or_none()
    return None if row is None else Caller(_tenant(row), role_of(row.role), row.key_id)


def role_of(stored: str) -> Role:
    """A role as SQL has it. One that this release does not know may do as little as any."""
    return Role(stored) if stored in set(Role) else Role.VIEWER


def _tenant(row: Any) -> Tenant:
    return Tenant(**{name: row._mapping[name] for name in Tenant.__dataclass_fields__})


def _hash(secret: str) -> bytes:
    # The secret has 256 random bits: there is nothing to guess that a slow hash would protect.
    return hashlib.sha256(secret.encode()).digest()


def _key(row: sa.Row[tuple[object, ...]]) -> ApiKey:
    stored = {name: row._mapping[name] for name in ApiKey.__dataclass_fields__}
    return ApiKey(**{**stored, "role": role_of(row._mapping["role"])})


_ANY_KEY = Prepared(sa.select(api_keys.c.id).limit(1))
_FIND = Prepared(sa.select(tenants).where(tenants.c.id == sa.bindparam("tenant")))
