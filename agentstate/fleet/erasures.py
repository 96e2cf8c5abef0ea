"""Erasures: pages of sessions that are gone, to be erased by the engines that have them.

A row is written in the transaction that forgets a manifest, and stays until the engine rank whose store it is has
erased the pages, in its files, for good. So a crash on either side loses none. What else needs the pages is decided
when they are erased, in SQL, by `needed_pages`.

A page's key covers everything before it. So of two chains it is the beginning that they have in common, and of all
manifests it is one that shares most with a chain which decides what of the chain is needed. Sorted by their heads, that
is a neighbour of the chain: two look-ups in an index, however many manifests there are. Where whole heads are alike, as
those of long forks, the manifests that share them are asked for the key at one place, a few times.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate.sql.database import now_us
from agentstate.sql.models import erasures, manifest_heads, manifests

KEY_BYTES = 32  # SHA-256
# A head has the first digits of the keys of so many pages. Of two keys, they are alike by chance once in 2**32.
HEAD_PAGES = 128
DIGITS = 4
# An index entry of PostgreSQL has at most 2,700 bytes.
_HEAD_BYTES = HEAD_PAGES * DIGITS


@dataclass(frozen=True)
class StoreName:
    """The page store of an engine rank: the one of full attention, by which the others of the rank go."""

    fingerprint: str
    rank: int
    node: str


@dataclass(frozen=True)
class Chain:
    """The pages of a session's chain from its page ``first`` on. ``keys`` packs one 32-byte key a page; ``head`` is of
    the whole chain (`head_of`)."""

    first: int
    head: bytes
    keys: bytes

    @classmethod
    def whole(cls, keys: bytes) -> Chain:
        """A chain of packed ``keys`` from its first page on."""
        return cls(0, head_of(keys), keys)

    def __len__(self) -> int:
        """How many pages."""
        return len(self.keys) // KEY_BYTES

    def key(self, page: int) -> bytes:
        """The key of a page, counted from the beginning of the whole chain."""
        at = (page - self.first) * KEY_BYTES
        return self.keys[at : at + KEY_BYTES]

    def common(self, keys: bytes) -> int:
        """How many of its pages a whole chain of packed ``keys`` has."""
        low, high = 0, min(len(self), max(0, len(keys) // KEY_BYTES - self.first))
        # Where one key is alike, so are all before it.
        while low < high:
            middle = (low + high + 1) // 2
            at = (self.first + middle - 1) * KEY_BYTES
            if keys[at : at + KEY_BYTES] == self.key(self.first + middle - 1):
                low = middle
            else:
                high = middle - 1
        return low


@dataclass(frozen=True)
class Erasure:
    """What is to be erased of a session, unless another needs it."""

    id: int
    session_id: str
    chain: Chain


def head_of(keys: bytes) -> bytes:
    """What a whole chain is sorted by."""
    end = min(len(keys), HEAD_PAGES * KEY_BYTES)
    return b"".join(keys[at : at + DIGITS] for at in range(0, end, KEY_BYTES))


def add(connection: Connection, session_id: str, store: StoreName, chain: Chain) -> None:
    """Have pages erased."""
    if chain.keys:
        connection.execute(
            sa.insert(erasures).values(
                session_id=session_id,
                **vars(store),
                first_page=chain.first,
                head=chain.head,
                keys=chain.keys,
                created_us=now_us(),
            )
        )


def waiting(connection: Connection, store: StoreName, limit: int) -> list[Erasure]:
    """What is to be erased in a store, the oldest first."""
    rows = connection.execute(sa.select(erasures).where(*_of(store, erasures)).order_by(erasures.c.id).limit(limit))
    return [Erasure(row.id, row.session_id, _chain(row)) for row in rows]


def _chain(row: sa.Row[Any]) -> Chain:
    keys = bytes(row._mapping["keys"])
    # That of a manifest, which an engine of an earlier release may have saved without one.
    return Chain(row.first_page, bytes(row.head) if row.first_page else head_of(keys), keys)


class Told(NamedTuple):
    """That something is to be erased, and when that was said, by the database's clock."""

    id: int
    created_us: int


def elsewhere(connection: Connection, store: StoreName, after: int) -> list[Told]:
    """What is to be erased in the stores of other nodes that have the fingerprint and rank of ``store``, in the order
    of its ids, from the one after ``after`` on.

    A transaction becomes visible later than the ids and times that it wrote. So ask again from before what was written
    last, by more than a transaction takes.
    """
    rows = connection.execute(
        sa.select(erasures.c.id, erasures.c.created_us)
        .where(
            erasures.c.fingerprint == store.fingerprint,
            erasures.c.rank == store.rank,
            erasures.c.node != store.node,
            erasures.c.id > after,
        )
        .order_by(erasures.c.id)
    )
    return [Told(*row) for row in rows]


def load(connection: Connection, ids: Collection[int]) -> list[Erasure]:
    """Those of these that are still to be done, in the order of their ids."""
    rows = connection.execute(sa.select(erasures).where(erasures.c.id.in_(ids)).order_by(erasures.c.id))
    return [Erasure(row.id, row.session_id, _chain(row)) for row in rows]


def count(connection: Connection, store: StoreName) -> int:
    """How many sessions' chains are to be erased in a store."""
    found: int = connection.execute(
        sa.select(sa.func.count()).select_from(erasures).where(*_of(store, erasures))
    ).scalar_one()
    return found


def done(connection: Connection, ids: Collection[int]) -> None:
    """These have been erased."""
    connection.execute(sa.delete(erasures).where(erasures.c.id.in_(ids)))


def needed_pages(connection: Connection, store: StoreName, chain: Chain) -> int:
    """How many of a chain's pages, from its first one on, some manifest of the store lists."""
    needed, alike = 0, False
    upwards, downwards = manifest_heads.c.head >= chain.head, manifest_heads.c.head <= chain.head
    for beside, order in ((upwards, manifest_heads.c.head), (downwards, manifest_heads.c.head.desc())):
        neighbour = connection.execute(
            sa.select(manifest_heads.c.session_id, manifest_heads.c.head)
            .join(manifests, _of_one())
            .where(*_of(store, manifest_heads), beside)
            .order_by(order)
            .limit(1)
        ).one_or_none()
        if neighbour is None:
            continue
        keys = connection.execute(
            sa.select(manifests.c["keys"]).where(*_of(store, manifests), manifests.c.session_id == neighbour.session_id)
        ).scalar()
        needed = max(needed, chain.common(bytes(keys or b"")))
        alike = alike or bytes(neighbour.head) == chain.head
    while alike and len(chain.head) == _HEAD_BYTES and needed < len(chain):
        keys = _having(connection, store, chain, chain.first + needed)
        if keys is None:
            break
        needed = max(needed + 1, chain.common(keys))
    return needed


def needed_anywhere(connection: Connection, store: StoreName, chain: Chain) -> int:
    """How many of a chain's pages, from its first one on, some manifest of the fingerprint and rank of ``store`` lists,
    on whatever node."""
    nodes = sa.select(manifest_heads.c.node).where(
        manifest_heads.c.fingerprint == store.fingerprint, manifest_heads.c.rank == store.rank
    )
    return max(
        (
            needed_pages(connection, StoreName(store.fingerprint, store.rank, node), chain)
            for node in connection.execute(nodes.distinct()).scalars().all()
        ),
        default=0,
    )


def _having(connection: Connection, store: StoreName, chain: Chain, page: int) -> bytes | None:
    """The keys of some manifest with the head of a chain that has one of its pages, by its number."""
    key = sa.func.substr(manifests.c["keys"], page * KEY_BYTES + 1, KEY_BYTES, type_=sa.LargeBinary)
    found = connection.execute(
        sa.select(manifests.c["keys"])
        .join(manifest_heads, _of_one())
        .where(*_of(store, manifest_heads), manifest_heads.c.head == chain.head, key == chain.key(page))
        .limit(1)
    ).scalar()
    return None if found is None else bytes(found)


def _of_one() -> sa.ColumnElement[bool]:
    """A head and its manifest."""
    names = ("session_id", "fingerprint", "rank", "node")
    return sa.and_(*(manifest_heads.c[name] == manifests.c[name] for name in names))


def _of(store: StoreName, table: sa.Table) -> Iterator[sa.ColumnElement[bool]]:
    return (table.c[name] == value for name, value in vars(store).items())
