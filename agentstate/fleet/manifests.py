"""Manifests: which pages, in which order, hold the KV of a session up to a token length.

An engine rank publishes one when a request of a session's turn has finished and its pages are stored, so what a
manifest lists was durable when it was written. The service reads them to tell how much of a session can be restored.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate.sql.database import insert, now_us
from agentstate.sql.models import leases, manifests, sessions

KEY_BYTES = 32  # SHA-256


class KvState(StrEnum):
    """What is known of a session's KV outside of device memory."""

    DURABLE = "durable"  # all of it, from the head, is stored
    PENDING = "pending"  # being stored
    PARTIAL = "partial"  # only a prefix is stored and no more will be: the rest is recomputed
    LOST = "lost"  # nothing is stored and nothing will be: everything is recomputed
    UNKNOWN = "unknown"  # nobody could be asked


@dataclass(frozen=True)
class Coverage:
    """A manifest without its keys: its size does not grow with the session."""

    session_id: str
    fingerprint: str
    rank: int
    node: str
    engine_id: str
    page_size: int
    tokens: int
    nbytes: int
    lost_tokens: int
    updated_us: int


@dataclass(frozen=True)
class Manifest:
    """The ordered page keys of a session on one engine rank.

    ``keys`` packs one 32-byte key a page; ``tokens`` is what they cover, whole pages only; ``nbytes`` is the KV of
    those pages on this rank, uncompressed. ``lost_tokens`` are those after them, whole pages too, that the session had
    and that are not stored: never written, or evicted. ``epoch`` and ``account`` are those of the turn that published
    it (`fleet.turns`). Raises ValueError when the first three do not agree.
    """

    session_id: str
    fingerprint: str
    rank: int
    node: str
    engine_id: str
    page_size: int
    tokens: int
    keys: bytes
    nbytes: int
    lost_tokens: int = 0
    epoch: int = 0
    account: str = ""

    def __post_init__(self) -> None:
        if self.page_size <= 0 or self.tokens < 0 or self.tokens % self.page_size:
            raise ValueError(
                f"manifest of {self.session_id}: {self.tokens} tokens are not whole pages of {self.page_size}"
            )
        if len(self.keys) != KEY_BYTES * (self.tokens // self.page_size):
            raise ValueError(
                f"manifest of {self.session_id}: {len(self.keys)} bytes of keys do not fit "
                f"{self.tokens // self.page_size} pages of {KEY_BYTES} bytes"
            )

    def page_keys(self) -> list[bytes]:
        """The 32-byte keys, first page first."""
        return split_keys(self.keys)


def split_keys(keys: bytes) -> list[bytes]:
    """Packed page keys, one by one."""
    return [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]


# There is one manifest of each.
_KEY = ("session_id", "fingerprint", "rank", "node")


def publish(connection: Connection, manifest: Manifest) -> bool:
    """Save ``manifest`` if its turn is the session's newest, or one that was over before its successor began and that
    has not published since. False, and nothing is saved, where the session is deleted, where the turn's lease lapsed
    and was taken over, and where a later turn has published."""
    # Whoever deletes the session or takes its lease has locked its row.
    live = sa.select(sessions.c.id).where(sessions.c.id == manifest.session_id, sessions.c.deleted_us.is_(None))
    if connection.execute(live.with_for_update(read=True, of=sessions)).one_or_none() is None:
        return False
    published = sa.select(manifests.c.epoch).where(*(manifests.c[name] == getattr(manifest, name) for name in _KEY))
    oldest = sa.func.coalesce(published.scalar_subquery(), 0)
    turn = sa.select(leases.c.epoch).where(
        leases.c.session_id == manifest.session_id,
        sa.literal(manifest.epoch).between(leases.c.fence, leases.c.epoch),
        oldest <= manifest.epoch,
    )
    if connection.execute(turn).one_or_none() is None:
        return False
    save(connection, manifest)
    return True


def save(connection: Connection, manifest: Manifest) -> None:
    """Store ``manifest``, replacing the one of the same session, fingerprint, rank and node, whatever that says."""
    key = {name: getattr(manifest, name) for name in _KEY}
    content = {
        "engine_id": manifest.engine_id,
        "page_size": manifest.page_size,
        "tokens": manifest.tokens,
        "keys": manifest.keys,
        "nbytes": manifest.nbytes,
        "lost_tokens": manifest.lost_tokens,
        "epoch": manifest.epoch,
        "account": manifest.account,
        "updated_us": now_us(),
    }
    connection.execute(
        insert(connection.dialect.name, manifests)
        .values(**key, **content)
        .on_conflict_do_update(index_elements=list(key), set_=content)
    )


def cut(connection: Connection, manifest: Manifest) -> None:
    """Make a manifest that is there say less, as ``manifest`` does: its pages are gone. It stays as old as it is, since
    nothing has been stored."""
    same = (manifests.c[name] == getattr(manifest, name) for name in _KEY)
    less = {name: getattr(manifest, name) for name in ("tokens", "keys", "nbytes", "lost_tokens")}
    connection.execute(sa.update(manifests).where(*same).values(less))


def load(connection: Connection, session_id: str, fingerprint: str, rank: int, node: str) -> Manifest | None:
    """What a node has stored of a session for one fingerprint and rank, or None. Does not look at the pages."""
    row = connection.execute(
        sa.select(*(manifests.c[name] for name in Manifest.__dataclass_fields__)).where(
            manifests.c.session_id == session_id,
            manifests.c.fingerprint == fingerprint,
            manifests.c.rank == rank,
            manifests.c.node == node,
        )
    ).one_or_none()
    return None if row is None else Manifest(**row._mapping)


def chains(
    connection: Connection, fingerprint: str, rank: int, node: str | None = None
) -> Iterator[tuple[str, list[bytes]]]:
    """The session and the page keys of every manifest of a fingerprint and rank, a manifest at a time: those of a node,
    or of all nodes."""
    of_node = sa.true() if node is None else manifests.c.node == node
    rows = connection.execute(
        sa.select(manifests.c.session_id, manifests.c["keys"]).where(
            manifests.c.fingerprint == fingerprint, manifests.c.rank == rank, of_node
        ),
        execution_options={"yield_per": 100},
    )
    for session_id, keys in rows:
        yield session_id, split_keys(keys)


def of_rank(connection: Connection, fingerprint: str, rank: int, node: str) -> Iterator[Manifest]:
    """Every manifest of a rank on its node, one at a time."""
    rows = connection.execute(
        sa.select(*(manifests.c[name] for name in Manifest.__dataclass_fields__)).where(
            manifests.c.fingerprint == fingerprint, manifests.c.rank == rank, manifests.c.node == node
        ),
        execution_options={"yield_per": 100},
    )
    for row in rows:
        yield Manifest(**row._mapping)


def coverage(connection: Connection, session_ids: Collection[str]) -> list[Coverage]:
    """What is stored of these sessions, wherever it is, the newest first. Never reads the keys."""
    return [Coverage(*row) for row in connection.execute(_COVERAGE, {"of_sessions": list(session_ids)})]


_COVERAGE = (
    sa.select(*(manifests.c[name] for name in Coverage.__dataclass_fields__))
    .where(manifests.c.session_id.in_(sa.bindparam("of_sessions", expanding=True)))
    .order_by(manifests.c.updated_us.desc(), manifests.c.tokens.desc())
)


def stores(connection: Connection, node: str) -> dict[tuple[str, int], int]:
    """How many manifests a node has of each of its stores, by fingerprint and rank."""
    store = (manifests.c.fingerprint, manifests.c.rank)
    rows = connection.execute(sa.select(*store, sa.func.count()).where(manifests.c.node == node).group_by(*store))
    return {(fingerprint, rank): count for fingerprint, rank, count in rows}


def forget_store(connection: Connection, fingerprint: str, rank: int, node: str) -> None:
    """Drop every manifest of a store that is gone, given the first digits of its fingerprint."""
    connection.execute(
        sa.delete(manifests).where(
            manifests.c.fingerprint.startswith(fingerprint, autoescape=True),
            manifests.c.rank == rank,
            manifests.c.node == node,
        )
    )


def forget_all(connection: Connection, session_ids: sa.Select[tuple[str]]) -> int:
    """Drop every manifest of the selected sessions: how many."""
    return connection.execute(sa.delete(manifests).where(manifests.c.session_id.in_(session_ids))).rowcount


def forget(connection: Connection, session_id: str) -> None:
    """Drop every manifest of a session. The pages stay until their store needs the room."""
    connection.execute(sa.delete(manifests).where(manifests.c.session_id == session_id))
