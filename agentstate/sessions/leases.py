"""Leases: who may run a session now.

A lease is a secret token and an epoch. The epoch of a session only grows, also across released leases, so that
whoever acts for an agent can tell a newer runner from an older one. A lease that lapsed is lost for good, even if
nobody has taken it over: its holder resumes the session and gets the next epoch.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate.errors import LeaseLost, SessionBusy
from agentstate.sql import secret
from agentstate.sql.database import insert, now_us
from agentstate.sql.models import leases
from agentstate.sql.prepared import Prepared


@dataclass(frozen=True)
class LeaseKey:
    """What the holder of a lease shows with every call. The token is a secret: SQL has only its hash."""

    token: str = field(repr=False)
    epoch: int

    @property
    def token_hash(self) -> bytes:
        return hashlib.sha256(self.token.encode()).digest()


@dataclass(frozen=True)
class Lease:
    """A lease that was just given or renewed. ``released_us`` is when the one before it was released, if any was, and
    ``waited_for`` the reason that was given. Times are by the database's clock. ``installation`` is the secret that one
    that was given is proved by (`fleet.turns`): None if nobody has needed any yet."""

    key: LeaseKey
    expires_us: int
    released_us: int | None = None
    waited_for: str | None = None
    installation: bytes | None = field(default=None, repr=False)


def take_later(
    connection: Connection,
    session_id: str,
    ttl_s: float,
    revision: int,
    *,
    token: str,
    engine: str | None,
    dp_rank: int | None,
) -> Callable[[], Lease]:
    """Take a session's lease, or take it over when it has lapsed, with the next epoch: now, answered later. What is
    sent meanwhile is carried out whatever the answer.

    ``token`` is the secret of the new lease. ``engine`` is the base URL of the engine that is to serve the turn, and
    ``dp_rank`` which of its DP ranks, where it has several. One statement decides, so only one of several callers gets
    the lease. Raises SessionBusy, with ``revision``, while another lease is valid.
    """
    sent = _taking(connection.dialect.name).send(
        connection,
        {
            "session": session_id,
            "hash": LeaseKey(token, 0).token_hash,
            "ttl_us": _microseconds(ttl_s),
            "engine": engine,
            "dp_rank": dp_rank,
        },
    )

    def answer() -> Lease:
        row = sent.first()
        if row is None:
            raise _busy(remaining_s(connection, session_id), revision)
        installation = None if row.installation is None else bytes(row.installation)
        return Lease(LeaseKey(token, row.epoch), row.expires_us, row.released_us, row.waits_for, installation)

    return answer


def new_token() -> str:
    """The secret of a new lease."""
    return secrets.token_urlsafe(32)


def is_held(session_id: sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
    """SQL: whether the token whose hash is the parameter ``hash`` is that of a session's lease."""
    return sa.exists().where(leases.c.session_id == session_id, leases.c.token_hash == sa.bindparam("hash"))


def remaining_s(connection: Connection, session_id: str) -> float:
    """How long the session's lease is still valid; 0 when nobody holds one."""
    left_us = _LEFT.scalar(connection, {"session": session_id})
    return max(0.0, (left_us or 0) / 1_000_000)


def require_free(connection: Connection, session_id: str, revision: int) -> None:
    """Raises SessionBusy, with ``revision``, while somebody holds a valid lease."""
    left_s = remaining_s(connection, session_id)
    if left_s > 0:
        raise _busy(left_s, revision)


def require(connection: Connection, session_id: str, key: LeaseKey, revision: int) -> int:
    """The database's time, if ``key`` is the session's valid lease. Raises LeaseLost, with ``revision``, if it is not.

    Holds until the transaction ends only if the caller has locked the session: taking a lease locks it too.
    """
    time_us: int | None = _REQUIRE.scalar(connection, _shown(session_id, key))
    if time_us is None:
        raise _lost(key, revision)
    return time_us


def renew(connection: Connection, session_id: str, key: LeaseKey, ttl_s: float, revision: int) -> Lease:
    """Make a valid lease lapse ``ttl_s`` from now. Raises LeaseLost."""
    shown = {**_shown(session_id, key), "ttl_us": _microseconds(ttl_s)}
    expires_us: int | None = _RENEW.scalar(connection, shown)
    if expires_us is None:
        raise _lost(key, revision)
    return Lease(key, expires_us)


def release_later(
    connection: Connection, session_id: str, key: LeaseKey, revision: int, reason: str
) -> Callable[[], tuple[str | None, int | None]]:
    """End a valid lease, so that the session can be resumed at once, and remember the reason. Answers, later, with the
    engine and the DP rank that it was taken for, or raises LeaseLost: what is sent meanwhile is to be rolled back."""
    sent = _RELEASE.send(connection, {**_shown(session_id, key), "reason": reason})

    def answer() -> tuple[str | None, int | None]:
        released = sent.first()
        if released is None:
            raise _lost(key, revision)
        return released.engine, released.dp_rank

    return answer


def running(connection: Connection, engine: str) -> dict[int, int]:
    """How many turns run on each DP rank of an engine, given its base URL."""
    rows = connection.execute(_RUNNING, {"engine": engine})
    return {dp_rank: count for dp_rank, count in rows}


# Built once: every request runs some of them.
_ttl_us = sa.bindparam("ttl_us", type_=sa.BigInteger())
_held = sa.and_(
    leases.c.session_id == sa.bindparam("session"),
    leases.c.token_hash == sa.bindparam("hash"),
    leases.c.epoch == sa.bindparam("shown_epoch"),
    leases.c.expires_us > now_us(),
)
_LEFT = Prepared(
    sa.select((leases.c.expires_us - now_us()).label("left_us")).where(leases.c.session_id == sa.bindparam("session"))
)
_REQUIRE = Prepared(sa.select(now_us().label("time_us")).select_from(leases).where(_held))
_RENEW = Prepared(sa.update(leases).where(_held).values(expires_us=now_us() + _ttl_us).returning(leases.c.expires_us))
_RELEASE = Prepared(
    sa.update(leases)
    .where(_held)
    .values(token_hash=None, expires_us=0, released_us=now_us(), waits_for=sa.bindparam("reason"))
    .returning(leases.c.engine, leases.c.dp_rank)
)
# Leases that are over have lapsed or are of time 0: those that run are few.
_RUNNING = (
    sa.select(leases.c.dp_rank, sa.func.count())
    .where(leases.c.expires_us > now_us(), leases.c.engine == sa.bindparam("engine"), leases.c.dp_rank.is_not(None))
    .group_by(leases.c.dp_rank)
)


@cache
def _taking(dialect: str) -> Prepared:
    new = {
        "token_hash": sa.bindparam("hash"),
        "expires_us": now_us() + _ttl_us,
        "engine": sa.bindparam("engine", type_=sa.Text()),
        "dp_rank": sa.bindparam("dp_rank", type_=sa.Integer()),
    }
    return Prepared(
        insert(dialect, leases)
        .values(session_id=sa.bindparam("session"), epoch=1, **new)
        .on_conflict_do_update(
            index_elements=["session_id"],
            set_={
                **new,
                "epoch": leases.c.epoch + 1,
                # Whoever let it lapse may still be computing.
                "fence": sa.case((leases.c.token_hash.is_(None), leases.c.fence), else_=leases.c.epoch + 1),
            },
            where=leases.c.expires_us <= now_us(),
        )
        .returning(
            leases.c.epoch,
            leases.c.expires_us,
            leases.c.released_us,
            leases.c.waits_for,
            # Not read before the session was locked: whoever takes a new one locks the sessions too.
            secret.STORED.scalar_subquery().label("installation"),
        )
    )


def _shown(session_id: str, key: LeaseKey) -> dict[str, Any]:
    return {"session": session_id, "hash": key.token_hash, "shown_epoch": key.epoch}


def _busy(left_s: float, revision: int) -> SessionBusy:
    return SessionBusy(
        f"the session is being run: its lease lapses in {left_s:.1f} s unless it is renewed",
        retry_after_s=left_s,
        revision=revision,
    )


def _lost(key: LeaseKey, revision: int) -> LeaseLost:
    return LeaseLost(
        f"the lease of epoch {key.epoch} lapsed, was released or was taken over: resume the session",
        revision=revision,
    )


def _microseconds(ttl_s: float) -> int:
    return round(ttl_s * 1_000_000)
