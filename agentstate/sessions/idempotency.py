"""Idempotency: a write that is repeated with the same key gets the answer of the first time.

The answer is stored in the transaction of the write, so there is never one without the other. A write that failed wrote
nothing and stored no answer: repeating it tries again.

SQL has only a hash of the client's key, so secrets in an answer can be derived from the key (`derived_secret`) and need
not be stored.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from dataclasses import dataclass
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate.errors import IdempotencyKeyInUse, IdempotencyKeyReused
from agentstate.sql.database import insert, now_us
from agentstate.sql.models import idempotency
from agentstate.sql.prepared import Prepared

# If an answer has waited for an engine for longer than any request does, its service is gone.
UNFINISHED_S = 300


@dataclass(frozen=True)
class Once:
    """One request: the tenant's key, and a hash of everything that distinguishes the request."""

    tenant: str
    key: str
    request_hash: bytes

    @property
    def row_key(self) -> bytes:
        return hashlib.sha256(self.tenant.encode() + b"\0" + self.key.encode()).digest()

    def derived_secret(self, purpose: str) -> str:
        """A secret that only those who know the key can derive again."""
        digest = hmac.digest(self.key.encode(), b"agentstate\0" + purpose.encode() + self.request_hash, "sha256")
        return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def begin(connection: Connection, once: Once) -> dict[str, Any] | None:
    """The answer that was given before; None when this request is the first, and its write may follow.

    Of several requests at once one is the first. The others wait for it on SQLite and raise IdempotencyKeyInUse on
    PostgreSQL. Raises IdempotencyKeyReused if the key came with another request.
    """
    if connection.dialect.name == "postgresql":
        # Try the lock, do not wait for it: an impatient client must not hold a connection.
        number = int.from_bytes(once.row_key[:8], "big", signed=True)
        if not _TRY.scalar(connection, {"number": number}):
            raise IdempotencyKeyInUse(f"the first request with Idempotency-Key {once.key!r} is still being answered")
    row = _FIND.first(connection, {"of_key": once.row_key})
    if row is None:
        return None
    if bytes(row.request_hash) != once.request_hash:
        raise IdempotencyKeyReused(
            f"Idempotency-Key {once.key!r} came with another request before: use a new key for a new request"
        )
    if not row.final and row.created_us > row.time_us - UNFINISHED_S * 1_000_000:
        raise IdempotencyKeyInUse(f"the first request with Idempotency-Key {once.key!r} is still being answered")
    answer: dict[str, Any] = row.answer
    return answer


def store(connection: Connection, once: Once, answer: dict[str, Any], *, final: bool = True) -> None:
    """Store the answer in the transaction of its write, or later in place of one that was not ``final``."""
    row = {"key": once.row_key, "request_hash": once.request_hash, "answer": answer, "final": final}
    _storing(connection.dialect.name).send(connection, row)


_TRY = Prepared(
    sa.select(sa.func.pg_try_advisory_xact_lock(sa.bindparam("number", type_=sa.BigInteger())).label("got"))
)
_FIND = Prepared(sa.select(idempotency, now_us().label("time_us")).where(idempotency.c.key == sa.bindparam("of_key")))


@cache
def _storing(dialect: str) -> Prepared:
    new = insert(dialect, idempotency).values(created_us=now_us())
    return Prepared(
        new.on_conflict_do_update(
            index_elements=["key"], set_={"answer": new.excluded.answer, "final": new.excluded.final}
        )
    )
