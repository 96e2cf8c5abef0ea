"""Authenticate callers, and limit their request rates.

Until the first API key is created, every caller is the tenant ``default``; such a service listens on loopback only (see
`agentstate.api.server`). Each worker caches look-ups of keys for ``TRUST_S``, so a revoked key works that much longer,
whichever worker it comes to.
"""

from __future__ import annotations

import hashlib
import time

from starlette.concurrency import run_in_threadpool

from agentstate.api.limits import Limits, Rate
from agentstate.errors import DatabaseError, RateLimited, Unauthenticated
from agentstate.sessions import tenants
from agentstate.sessions.tenants import Caller, Role, Tenant
from agentstate.settings import DEFAULT_TENANT
from agentstate.sql.database import Database

TRUST_S = 5.0
MAX_REMEMBERED = 10_000
HINTS_PER_S = 200.0  # of a tenant: what its sessions are going to do


class Gate:
    """Admits requests. Used on one event loop."""

    def __init__(self, database: Database, limits: Limits, requests_per_s: float):
        self._database = database
        self._limits = limits
        self._requests_per_s = requests_per_s
        # By the digest of a key, so that nobody without one can fill the memory with what is none.
        self._known: dict[bytes | None, tuple[float, Caller | None, bool]] = {}
        self._keyed = False  # whether there is known to be a key

    async def admit(self, authorization: str | None, *, remembered_s: float = 0) -> tuple[Caller, bool]:
        """The caller of a request with this ``Authorization``, and whether everybody is admitted, for want of any
        API key. While SQL does not answer, a key is admitted that it knew ``remembered_s`` ago.

        Raises Unauthenticated, RateLimited, DatabaseError.
        """
        scheme, _, secret = (authorization or "").partition(" ")
        secret = secret.strip()
        key = secret if scheme.lower() == "bearer" and secret else None
        known_by = None if key is None else hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        until_s, caller, open_to_all = self._known.get(known_by, (0.0, None, False))
        if until_s < time.monotonic():
            try:
                caller, open_to_all = await run_in_threadpool(self._look_up, key)
            except DatabaseError:
                # Whoever was admitted for want of a key is a stranger once there is one.
                stranger = caller is None or (open_to_all and self._keyed)
                if stranger or until_s + remembered_s < time.monotonic():
                    raise
            else:
                self._keyed = not open_to_all
                if len(self._known) >= MAX_REMEMBERED:
                    # Wrong keys first: whoever sends many must not make the right ones be forgotten.
                    self._known = {by: known for by, known in self._known.items() if known[1] is not None}
                if len(self._known) >= MAX_REMEMBERED:
                    self._known.clear()
                self._known[known_by] = (time.monotonic() + TRUST_S, caller, open_to_all)
        if caller is None:
            raise Unauthenticated(
                "this API key is not valid"
                if key
                else "send an API key as Authorization: Bearer, see `agentstate keys create`"
            )
        tenant = caller.tenant
        per_s = self._requests_per_s if tenant.requests_per_s is None else tenant.requests_per_s
        if per_s > 0:
            self._take(tenant, Rate.REQUESTS, per_s)
        return caller, open_to_all

    def _look_up(self, key: str | None) -> tuple[Caller | None, bool]:
        with self._database.read() as connection:
            if key is not None and (caller := tenants.authenticate(connection, key)) is not None:
                return caller, False
            if tenants.any_key(connection):
                return None, False
            return Caller(tenants.find(connection, DEFAULT_TENANT), Role.ADMIN, None), True

    def take_hint(self, tenant: Tenant) -> None:
        """Admit a hint: a request that changes nothing of a session. Raises RateLimited."""
        self._take(tenant, Rate.HINTS, HINTS_PER_S)

    def _take(self, tenant: Tenant, what: Rate, per_s: float) -> None:
        if wait_s := self._limits.take(tenant.id, what, per_s):
            raise RateLimited(
                f"tenant {tenant.id} may send {per_s:g} {what.name.lower()} a second", retry_after_s=wait_s
            )
