"""Manifests: which pages, in which order, hold the KV of a session up to a token length.

An engine rank publishes one when a request of a session's turn has finished and its pages are stored, so what a
manifest lists was durable when it was written. The service reads them to tell how much of a session can be restored.

Whatever stops to list a page sees to it that it is erased, once nothing else needs it (`agentstate.fleet.erasures`): at
once where the session is gone or its pages are out of reach, and with the session where that has gone on another way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate.fleet import erasures
from agentstate.fleet.erasures import Chain, StoreName, head_of
from agentstate.sql.database import insert, now_us
from agentstate.sql.models import abandoned_pages, leases, manifest_heads, manifests, segments, sessions
from agentstate.sql.models import erasures as erasures_table
from agentstate.sql.prepared import Prepared

KEY_BYTES = erasures.KEY_BYTES
# Of one session in one store. What was abandoned before is erased at once.
MOST_ABANDONED = 64


class KvState(StrEnum):
    """What is known of a session's KV outside of device memory."""

    DURABLE = "durable"  # all of it, from the head, is stored
    PENDING = "pending"  # being stored
    PARTIAL = "partial"  # only a prefix is stored and no more will be: the rest is recomputed
    LOST = "lost"  # nothing is stored and nothing will be: everything is recomputed
    UNKNOWN = "unknown"  # nobody could be asked


class Durability(StrEnum):
    """Where a session's KV survives, or is asked to."""

    NODE = "node"  # on the drive of a node: it ends with that
    SHARED = "shared"  # in the shared store, all of it: every engine that uses the store can restore it


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
    shared_tokens: int = 0


@dataclass(frozen=True)
class Manifest:
    """The ordered page keys of a session on one engine rank.

    ``keys`` packs one 32-byte key a page; ``tokens`` is what they cover, whole pages only, on the node or in the shared
    store; ``nbytes`` is the KV of those pages on this rank, uncompressed. ``lost_tokens`` are those after them, whole
    pages too, that the session had and that are not stored: never written, or evicted. ``epoch`` and ``account`` are
    those of the turn that published it (`fleet.turns`). ``shared_tokens`` are those from the head that are in the
    shared store: whole pages, and no more than ``tokens``. Raises ValueError when the first three do not agree.
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
    shared_tokens: int = 0

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
    has not published since, on whatever node. False where the turn's lease lapsed and was taken over, or a later turn
    has published: then what it lists is erased with the session; and where the session is gone: then it is erased
    now."""
    if _is_gone(connection, manifest.session_id):
        erasures.add(connection, manifest.session_id, _store_of(manifest), Chain.whole(manifest.keys))
        return False
    key = {name: getattr(manifest, name) for name in _KEY}
    # A node that was cut off may come late, with a turn that went on otherwise elsewhere.
    of_rank = {name: key[name] for name in _KEY if name != "node"}
    published = sa.select(sa.func.max(manifests.c.epoch)).where(*_same(manifests, of_rank)).scalar_subquery()
    turn = sa.select(leases.c.epoch).where(
        leases.c.session_id == manifest.session_id,
        sa.literal(manifest.epoch).between(leases.c.fence, leases.c.epoch),
        sa.func.coalesce(published, 0) <= manifest.epoch,
    )
    if connection.execute(turn).one_or_none() is None:
        _abandon(connection, key, Chain.whole(manifest.keys))
        return False
    save(connection, manifest)
    return True


def save(connection: Connection, manifest: Manifest) -> None:
    """Store ``manifest``, replacing the one of the same session, fingerprint, rank and node, whatever that says. Where
    it goes on with that one's history, as much as before is in the shared store: what is listed stays there."""
    keys = manifest.keys
    key = {name: getattr(manifest, name) for name in _KEY}
    before = _end(connection, key)
    content = {
        "engine_id": manifest.engine_id,
        "page_size": manifest.page_size,
        "tokens": manifest.tokens,
        "keys": keys,
        "nbytes": manifest.nbytes,
        "lost_tokens": manifest.lost_tokens,
        "epoch": manifest.epoch,
        "account": manifest.account,
        "shared_tokens": manifest.shared_tokens,
        "updated_us": now_us(),
    }
    n_bytes, last_key = before or (0, b"")
    goes_on = keys[max(0, n_bytes - KEY_BYTES) : n_bytes] == last_key
    if not goes_on:
        was = bytes(connection.execute(sa.select(manifests.c["keys"]).where(*_same(manifests, key))).scalar_one())
        common = Chain(0, b"", was).common(keys)
        _abandon(connection, key, Chain(common, head_of(was), was[common * KEY_BYTES :]))
    shared = sa.case(
        (manifests.c.shared_tokens > manifest.shared_tokens, manifests.c.shared_tokens), else_=manifest.shared_tokens
    )
    connection.execute(
        insert(connection.dialect.name, manifests)
        .values(**key, **content)
        .on_conflict_do_update(
            index_elements=list(key), set_={**content, "shared_tokens": shared} if goes_on else content
        )
    )
    if n_bytes < erasures.HEAD_PAGES * KEY_BYTES or not goes_on:
        _save_head(connection, key, keys)
    if keys and not n_bytes:
        # A fork that has pages of its own keeps its ancestors' no longer.
        ancestors = sa.select(segments.c.owner_id).where(
            segments.c.session_id == manifest.session_id, segments.c.owner_id != manifest.session_id
        )
        release(connection, connection.execute(ancestors.distinct()).scalars().all())


def abandon(connection: Connection, session_id: str, store: StoreName, chain: Chain) -> None:
    """Pages are stored of a session that its manifest does not list: they are erased with the session."""
    if _is_gone(connection, session_id):
        erasures.add(connection, session_id, store, chain)
    else:
        _abandon(connection, {"session_id": session_id, **vars(store)}, chain)


def _is_gone(connection: Connection, session_id: str) -> bool:
    """Whether a session was deleted or has expired. Otherwise it is there until the end of the transaction."""
    found = sa.select(_over(sessions)).where(sessions.c.id == session_id).with_for_update(read=True)
    gone: bool | None = connection.execute(found).scalar()
    return gone is None or bool(gone)


def _store_of(manifest: Manifest) -> StoreName:
    return StoreName(manifest.fingerprint, manifest.rank, manifest.node)


def _over(table: sa.FromClause) -> sa.ColumnElement[bool]:
    return sa.or_(
        table.c.deleted_us.is_not(None), sa.and_(table.c.expires_us.is_not(None), table.c.expires_us <= now_us())
    )


def _same(table: sa.Table, key: Mapping[str, object]) -> Iterator[sa.ColumnElement[bool]]:
    return (table.c[name] == value for name, value in key.items())


def _end(connection: Connection, key: Mapping[str, object]) -> tuple[int, bytes] | None:
    """How many bytes of keys a manifest has, and the last key; None where there is no manifest."""
    n_bytes = sa.func.length(manifests.c["keys"])
    last = sa.func.substr(manifests.c["keys"], n_bytes - KEY_BYTES + 1, KEY_BYTES, type_=sa.LargeBinary)
    row = connection.execute(sa.select(n_bytes, last).where(*_same(manifests, key))).one_or_none()
    return None if row is None else (row[0], bytes(row[1]) if row[0] else b"")


def _save_head(connection: Connection, key: Mapping[str, object], keys: bytes) -> None:
    head = {"head": head_of(keys)}
    connection.execute(
        insert(connection.dialect.name, manifest_heads)
        .values(**key, **head)
        .on_conflict_do_update(index_elements=list(key), set_=head)
    )


def renew_heads(connection: Connection, store: StoreName, after: str, limit: int) -> str | None:
    """Make the heads of up to ``limit`` manifests of a store anew, of the sessions that follow ``after``: an engine of
    an earlier release replaced manifests without them. The last of these sessions, or None when there are no more."""
    beginning = sa.func.substr(manifests.c["keys"], 1, erasures.HEAD_PAGES * KEY_BYTES, type_=sa.LargeBinary)
    rows = connection.execute(
        sa.select(manifests.c.session_id, beginning.label("beginning"))
        .where(*_same(manifests, vars(store)), manifests.c.session_id > after)
        .order_by(manifests.c.session_id)
        .limit(limit)
        .with_for_update()
    ).all()
    for row in rows:
        # To SQLite, the beginning of nothing is null.
        _save_head(connection, {"session_id": row.session_id, **vars(store)}, bytes(row.beginning or b""))
    return rows[-1].session_id if len(rows) == limit else None


def _abandon(connection: Connection, key: Mapping[str, object], chain: Chain) -> None:
    """Remember pages that a session's manifest does not list, or no more."""
    if not chain.keys:
        return
    last = {**key, "last_key": chain.keys[-KEY_BYTES:]}
    content = {"first_page": chain.first, "head": chain.head, "keys": chain.keys, "abandoned_us": now_us()}
    connection.execute(
        insert(connection.dialect.name, abandoned_pages)
        .values(**last, **content)
        .on_conflict_do_update(
            index_elements=list(last), set_=content, where=abandoned_pages.c.first_page > chain.first
        )
    )
    oldest = (
        sa.select(abandoned_pages.c.last_key)
        .where(*_same(abandoned_pages, key))
        .order_by(abandoned_pages.c.abandoned_us.desc(), abandoned_pages.c.last_key)
        .offset(MOST_ABANDONED)
    )
    for last_key in connection.execute(oldest).scalars().all():
        which = sa.and_(*_same(abandoned_pages, key), abandoned_pages.c.last_key == last_key)
        _erase_abandoned(connection, which)


def cut(connection: Connection, manifest: Manifest, beyond: Chain | None = None) -> None:
    """Make a manifest that is there say less, as ``manifest`` does: its pages are gone, but for some of ``beyond``,
    which are there still. It stays as old as it is, since nothing has been stored. What it says of the shared store
    stays too: no page is lost there because a node has lost its own."""
    key = {name: getattr(manifest, name) for name in _KEY}
    less = {name: getattr(manifest, name) for name in ("tokens", "keys", "nbytes", "lost_tokens")}
    if not connection.execute(sa.update(manifests).where(*_same(manifests, key)).values(less)).rowcount:
        return  # its session went meanwhile
    _save_head(connection, key, manifest.keys)
    if beyond is not None:
        _abandon(connection, key, beyond)


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


def keys_of(connection: Connection, coverage: Coverage, tokens: int) -> bytes:
    """The packed keys of the first ``tokens`` of a manifest; fewer if it has fewer by now."""
    found = load(connection, coverage.session_id, coverage.fingerprint, coverage.rank, coverage.node)
    return b"" if found is None else found.keys[: tokens // found.page_size * KEY_BYTES]


def elsewhere(
    connection: Connection,
    session_id: str,
    fingerprint: str,
    rank: int,
    node: str,
    *,
    reads: Collection[str] = (),
    shared: bool,
) -> Manifest | None:
    """Of what other nodes have stored of a session for one fingerprint and rank, that of which most can be restored on
    ``node``: what ``reads`` have, which are other nodes of its machine, and, if it is ``shared``, what is in the shared
    store. Of equals, that of its machine, and then the newest; None where nothing can be."""
    here = manifests.c.node.in_(reads)
    of_store = manifests.c.shared_tokens if shared else sa.literal(0)
    tokens = sa.case((here, manifests.c.tokens), else_=of_store)
    row = connection.execute(
        sa.select(*(manifests.c[name] for name in Manifest.__dataclass_fields__))
        .where(
            manifests.c.session_id == session_id,
            manifests.c.fingerprint == fingerprint,
            manifests.c.rank == rank,
            manifests.c.node != node,
            tokens > 0,
        )
        .order_by(tokens.desc(), here.desc(), manifests.c.updated_us.desc(), manifests.c.node)
        .limit(1)
    ).one_or_none()
    return None if row is None else Manifest(**row._mapping)


def share(
    connection: Connection, session_id: str, fingerprint: str, rank: int, node: str, tokens: int, last_key: bytes
) -> bool:
    """Note that the first ``tokens`` of a manifest are in the shared store, whole pages, of which ``last_key`` is the
    last. False if the manifest does not list that page there any more: it says of another history, or of nothing. It
    never says less than before of the same history."""
    key = {"session_id": session_id, "fingerprint": fingerprint, "rank": rank, "node": node}
    # PostgreSQL has no such function of large integers.
    at = sa.cast((sa.literal(tokens, sa.BigInteger) // manifests.c.page_size - 1) * KEY_BYTES + 1, sa.Integer)
    last = sa.func.substr(manifests.c["keys"], at, KEY_BYTES, type_=sa.LargeBinary)
    lists = (manifests.c.tokens >= tokens, last == last_key)
    more = sa.case((manifests.c.shared_tokens < tokens, tokens), else_=manifests.c.shared_tokens)
    return (
        connection.execute(
            sa.update(manifests).where(*_same(manifests, key), *lists).values(shared_tokens=more)
        ).rowcount
        > 0
    )


def unshare(connection: Connection, fingerprint: str, rank: int, chain: Chain, page: int) -> None:
    """Say of no manifest that lists a chain's ``page``, by its number, that any of it is in the shared store: something
    of what they have in common is not any more. It is published anew, as what never was is."""
    # By the page's key, all pages before it are alike.
    low = chain.head[: (page + 1) * erasures.DIGITS]
    high = (int.from_bytes(low, "big") + 1).to_bytes(len(low) + 1, "big")
    alike = [manifest_heads.c.head >= low]
    if not high[0]:
        alike.append(manifest_heads.c.head < high[1:])
    lists = sa.exists().where(*(manifest_heads.c[name] == manifests.c[name] for name in _KEY), *alike)
    connection.execute(
        sa.update(manifests)
        .where(manifests.c.fingerprint == fingerprint, manifests.c.rank == rank, manifests.c.shared_tokens > 0, lists)
        .values(shared_tokens=0)
    )


def unshare_listing(connection: Connection, fingerprint: str, rank: int, pages: Collection[bytes]) -> None:
    """The same of manifests that list any of these pages, wherever. It reads the keys of all that are shared."""
    found = []
    columns = (*(manifests.c[name] for name in _KEY), manifests.c["keys"])
    shared = sa.select(*columns).where(
        manifests.c.fingerprint == fingerprint, manifests.c.rank == rank, manifests.c.shared_tokens > 0
    )
    with connection.execute(shared, execution_options={"yield_per": 20}) as rows:
        for row in rows:
            if any(key in pages for key in split_keys(bytes(row._mapping["keys"]))):
                found.append({name: row._mapping[name] for name in _KEY})
    for key in found:
        connection.execute(sa.update(manifests).where(*_same(manifests, key)).values(shared_tokens=0))


class Place(NamedTuple):
    """A manifest's place among those of a rank and node, by their age."""

    updated_us: int
    session_id: str


NEWEST = Place(1 << 62, "")


class Unshared(NamedTuple):
    """A session of which not all is in the shared store, and where to go on after it."""

    session_id: str
    keys: list[bytes]
    place: Place


def unshared(
    connection: Connection, fingerprint: str, rank: int, node: str, limit: int, after: Place = NEWEST
) -> list[Unshared]:
    """Up to ``limit`` manifests of a rank on its node that are not wholly in the shared store, the newest first, of
    those ``after`` a place."""
    age = (manifests.c.updated_us, manifests.c.session_id)
    older = sa.or_(age[0] < after.updated_us, sa.and_(age[0] == after.updated_us, age[1] < after.session_id))
    rows = connection.execute(
        sa.select(*age, manifests.c["keys"])
        .where(
            manifests.c.fingerprint == fingerprint,
            manifests.c.rank == rank,
            manifests.c.node == node,
            manifests.c.shared_tokens < manifests.c.tokens,
            older,
        )
        .order_by(*(column.desc() for column in age))
        .limit(limit)
    )
    return [
        Unshared(session_id, split_keys(bytes(keys)), Place(updated_us, session_id))
        for updated_us, session_id, keys in rows
    ]


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


def of_rank(connection: Connection, fingerprint: str, rank: int, node: str | None = None) -> Iterator[Manifest]:
    """Every manifest of a rank on its node, or on all nodes, one at a time."""
    of_node = sa.true() if node is None else manifests.c.node == node
    rows = connection.execute(
        sa.select(*(manifests.c[name] for name in Manifest.__dataclass_fields__)).where(
            manifests.c.fingerprint == fingerprint, manifests.c.rank == rank, of_node
        ),
        execution_options={"yield_per": 100},
    )
    for row in rows:
        yield Manifest(**row._mapping)


def keys_of_sessions(connection: Connection, *, session: str | None = None, model: str | None = None) -> set[bytes]:
    """The page keys that are stored of the sessions of this name or id, or of this model, on any node."""
    which = sa.true() if session is None else sa.or_(sessions.c.name == session, sessions.c.id == session)
    of_model = sa.true() if model is None else sessions.c.model == model
    rows = connection.execute(
        sa.select(manifests.c["keys"])
        .join(sessions, sessions.c.id == manifests.c.session_id)
        .where(which, of_model, sessions.c.deleted_us.is_(None)),
        execution_options={"yield_per": 100},
    )
    return {key for (keys,) in rows for key in split_keys(keys)}


def coverage(connection: Connection, session_ids: Collection[str]) -> list[Coverage]:
    """What is stored of these sessions, wherever it is, the newest first. Never reads the keys."""
    if len(session_ids) == 1:
        return coverage_later(connection, next(iter(session_ids)))()
    return [Coverage(*row) for row in connection.execute(_COVERAGE, {"of_sessions": list(session_ids)})]


def coverage_later(connection: Connection, session_id: str) -> Callable[[], list[Coverage]]:
    """`coverage` of one session, asked now and answered later."""
    sent = _COVERAGE_OF_ONE.send(connection, {"of_session": session_id})
    return lambda: [Coverage(*row) for row in sent.all()]


_STORED = sa.select(*(manifests.c[name] for name in Coverage.__dataclass_fields__)).order_by(
    manifests.c.updated_us.desc(), manifests.c.tokens.desc()
)
_COVERAGE = _STORED.where(manifests.c.session_id.in_(sa.bindparam("of_sessions", expanding=True)))
_COVERAGE_OF_ONE = Prepared(_STORED.where(manifests.c.session_id == sa.bindparam("of_session")))


def stores(connection: Connection, node: str) -> dict[tuple[str, int], int]:
    """How many manifests a node has of each of its stores, by fingerprint and rank."""
    store = (manifests.c.fingerprint, manifests.c.rank)
    rows = connection.execute(sa.select(*store, sa.func.count()).where(manifests.c.node == node).group_by(*store))
    return {(fingerprint, rank): count for fingerprint, rank, count in rows}


def forget_store(connection: Connection, fingerprint: str, rank: int, node: str) -> None:
    """Drop every manifest of a store that is gone, given the first digits of its fingerprint, and what was to be erased
    in it. A manifest of which something is in the shared store is cut to that: it is not gone."""

    def of(table: sa.Table) -> tuple[sa.ColumnElement[bool], ...]:
        return (
            table.c.fingerprint.startswith(fingerprint, autoescape=True),
            table.c.rank == rank,
            table.c.node == node,
        )

    tokens, shared = manifests.c.tokens, manifests.c.shared_tokens
    n_bytes = sa.cast(shared // manifests.c.page_size * KEY_BYTES, sa.Integer)
    cut_to_shared = {
        "tokens": shared,
        "keys": sa.func.substr(manifests.c["keys"], 1, n_bytes, type_=sa.LargeBinary),
        "nbytes": manifests.c.nbytes * shared // tokens,
        "lost_tokens": manifests.c.lost_tokens + tokens - shared,
    }
    connection.execute(sa.update(manifests).where(*of(manifests), shared > 0, shared < tokens).values(cut_to_shared))
    connection.execute(sa.delete(manifests).where(*of(manifests), shared == 0))
    kept = sa.exists().where(*(manifest_heads.c[name] == manifests.c[name] for name in _KEY))
    connection.execute(sa.delete(manifest_heads).where(*of(manifest_heads), ~kept))
    for table in (abandoned_pages, erasures_table):
        connection.execute(sa.delete(table).where(*of(table)))


def erase(connection: Connection, session_ids: sa.Select[tuple[str]] | Collection[str]) -> int:
    """Drop every manifest of some sessions, and have their pages erased, but for those that a manifest of another one
    lists: how many manifests."""
    which = manifests.c.session_id.in_(session_ids)
    if connection.dialect.name == "postgresql":
        # Or an engine might replace one between the next two statements.
        locked = sa.select(sa.literal(1)).select_from(manifests).where(which).with_for_update().subquery()
        connection.execute(sa.select(sa.func.count()).select_from(locked))
    # Whole chains: whoever reads them makes their heads.
    no_head = sa.literal(b"", sa.LargeBinary)
    taken = sa.select(
        *(manifests.c[name] for name in _KEY), sa.literal(0), no_head, now_us(), manifests.c["keys"]
    ).where(which, manifests.c.tokens > 0)
    connection.execute(sa.insert(erasures_table).from_select(_ERASURE, taken))
    _erase_abandoned(connection, abandoned_pages.c.session_id.in_(session_ids))
    connection.execute(sa.delete(manifest_heads).where(manifest_heads.c.session_id.in_(session_ids)))
    return connection.execute(sa.delete(manifests).where(which)).rowcount


_ERASURE = [*_KEY, "first_page", "head", "created_us", "keys"]


def _erase_abandoned(connection: Connection, which: sa.ColumnElement[bool]) -> None:
    columns = (now_us() if name == "created_us" else abandoned_pages.c[name] for name in _ERASURE)
    connection.execute(sa.insert(erasures_table).from_select(_ERASURE, sa.select(*columns).where(which)))
    connection.execute(sa.delete(abandoned_pages).where(which))


def release(connection: Connection, session_ids: Collection[str]) -> int:
    """`erase` what is stored of those of some sessions that are deleted or have expired, unless a fork that has no
    pages of its own yet is going to begin with theirs: how many manifests."""
    found = (
        connection.execute(_releasable().where(sessions.c.id.in_(session_ids))).scalars().all() if session_ids else []
    )
    return erase(connection, found) if found else 0


def give_up(connection: Connection, session_id: str) -> None:
    """`erase` what is stored of a session that stays, unless a fork is going to begin with it."""
    session = sa.select(sessions.c.id).where(sessions.c.id == session_id, ~_awaited())
    if connection.execute(session).one_or_none() is not None:
        erase(connection, [session_id])


def release_expired(connection: Connection, limit: int) -> int:
    """`release` up to ``limit`` of the sessions that have expired: how many."""
    expired = sa.and_(sessions.c.expires_us.is_not(None), sessions.c.deleted_us.is_(None))
    stored = sa.or_(*(sa.exists().where(of.c.session_id == sessions.c.id) for of in (manifests, abandoned_pages)))
    # An engine that is about to publish waits, and finds them over.
    query = _releasable().where(expired, stored).limit(limit).with_for_update(of=sessions, key_share=True)
    found = connection.execute(query).scalars().all()
    if found:
        erase(connection, found)
    return len(found)


def _releasable() -> sa.Select[Any]:
    return sa.select(sessions.c.id).where(_over(sessions), ~_awaited())


def _awaited() -> sa.ColumnElement[bool]:
    """Whether a fork that has no pages of its own yet is going to begin with those of the session."""
    fork = sessions.alias()
    return sa.exists().where(
        segments.c.owner_id == sessions.c.id,
        segments.c.session_id == fork.c.id,
        fork.c.id != sessions.c.id,
        sa.not_(_over(fork)),
        # With another salt it would not find them.
        fork.c.kv_scope.is_not_distinct_from(sessions.c.kv_scope),
        ~sa.exists().where(manifests.c.session_id == fork.c.id, manifests.c.tokens > 0),
    )
