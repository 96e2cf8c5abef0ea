"""Extents that are in a shared store: which there are, who needs them, and which are to go.

A row is written once the object is there, and goes after it: a row says that the object exists. Engines follow the rows
of their own fingerprint and shard (`changed`).

An extent leaves in two steps, so that nobody reads what is gone. It is *doomed*: engines stop using it. After a grace
that is longer than any read, a collector takes it (`take`), deletes the object, and then the row (`forget`). Until it
is taken, whoever needs the extent may have it back (`add`). From then on nobody may: `add` raises TierDeleting.

A collector may die, or hang, with what it has taken. After `RETAKE_S` somebody else takes it: not before, since a
deletion that arrives once the row is forgotten deletes what was published again. For the same reason a collector
forgets only what nobody has taken since.

`add` alone does not keep an object: a collector may have taken it, deleted it and forgotten it between the publication
and `add`. So whoever has published an extent lets it have a row first (`adopt`), then looks whether the object is
there, and then calls `add`. If that gives the same row, nobody has taken the extent since, and nobody will.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate.errors import TierDeleting
from agentstate.fleet.erasures import KEY_BYTES
from agentstate.sql.database import insert, now_us
from agentstate.sql.models import manifests, shared_extents

# Of one statement: SQLite takes 32,766 parameters.
_BATCH = 500
# How many bytes of keys `unneeded` looks for at a time, in memory.
_WANTED_BYTES = 8 << 20
# A collector deletes what it has taken within less than this, or leaves it to the next (`SharedRows.delete_doomed`).
RETAKE_S = 120.0
# ``doomed_us`` of what a collector has taken is the time of that with a minus, or this in rows of before.
_TAKEN = 0

_Key = TypeVar("_Key", int, str)


@dataclass(frozen=True)
class SharedExtent:
    """``name`` is ``FINGERPRINT/SHARD/hh/DIGEST.ext``, ``nbytes`` the object's size, ``owner`` the account that it is
    charged to, empty for nobody's. ``keys`` packs one 32-byte key a page, in the order of the slots."""

    id: int
    name: str
    nbytes: int
    owner: str
    keys: bytes
    fingerprint: str
    shard: str


class Change(NamedTuple):
    """``changed_us`` is when the extent was added, doomed or wanted again, by the database's clock."""

    id: int
    changed_us: int
    doomed: bool


def add(connection: Connection, store: str, *, name: str, nbytes: int, owner: str, writer: str, keys: bytes) -> int:
    """Say that an extent is in ``store``, written by the node ``writer``: the id of its row. One that is there already
    counts as used now, and one that was doomed is wanted again.

    Raises TierDeleting if its object is being deleted: publish it once that is done. Raises ValueError for a name that
    no extent has, and for keys that are no whole keys.
    """
    if len(keys) % KEY_BYTES:
        raise ValueError(f"{len(keys)} bytes of keys are no whole keys of {KEY_BYTES}")
    content = {"nbytes": nbytes, "owner": owner, "writer": writer, "keys": keys}
    _insert(connection, store, name, {**content, "doomed_us": None})
    found = sa.and_(shared_extents.c.store == store, shared_extents.c.name == name)
    is_doomed = sa.and_(found, shared_extents.c.doomed_us > _TAKEN)
    wanted_again = {**content, "doomed_us": None, "changed_us": now_us()}
    connection.execute(sa.update(shared_extents).where(is_doomed).values(wanted_again))
    is_wanted = sa.and_(found, shared_extents.c.doomed_us.is_(None))
    connection.execute(sa.update(shared_extents).where(is_wanted).values(used_us=now_us()))
    row = connection.execute(sa.select(shared_extents.c.id, shared_extents.c.doomed_us).where(found)).one()
    if row.doomed_us is not None:
        raise TierDeleting(f"{name} is being deleted from {store}: publish it again later")
    added: int = row.id
    return added


def adopt(connection: Connection, store: str, objects: Mapping[str, int]) -> dict[str, int]:
    """Doom objects, given with their sizes, that have no row: their writers died before `add`, or are about to call it.
    They go as others do, unless somebody adds them meanwhile. The ids of all by their names. Raises ValueError for a
    name that no extent has."""
    content = {"owner": "", "writer": "", "keys": b"", "doomed_us": now_us()}
    for name, nbytes in objects.items():
        _insert(connection, store, name, {**content, "nbytes": nbytes})
    columns = (shared_extents.c.name, shared_extents.c.id)
    return {
        row.name: row.id
        for some in _batches(objects.keys())
        for row in connection.execute(
            sa.select(*columns).where(shared_extents.c.store == store, shared_extents.c.name.in_(some))
        )
    }


def _insert(connection: Connection, store: str, name: str, content: Mapping[str, Any]) -> None:
    """Insert a row unless there is one, which then stays as it is until the end of the transaction."""
    parts = name.split("/")
    if len(parts) != 4:
        raise ValueError(f"{name!r} is no name of an extent")
    fingerprint, shard, *_ = parts
    times = dict.fromkeys(("created_us", "changed_us", "used_us"), now_us())
    connection.execute(
        insert(connection.dialect.name, shared_extents)
        .values(store=store, name=name, fingerprint=fingerprint, shard=shard, **times, **content)
        # An update that changes nothing locks the row, where PostgreSQL would otherwise let others doom it meanwhile.
        .on_conflict_do_update(index_elements=["store", "name"], set_={"store": store})
    )


def changed(connection: Connection, store: str, fingerprint: str, shard: str, since_us: int) -> list[Change]:
    """What was added, doomed or wanted again at or after ``since_us``, the oldest first. Rows that are forgotten are
    missing: they were doomed before.

    A transaction becomes visible later than the times that it wrote. So ask again from before the newest change that
    was seen, by more than a transaction takes.
    """
    doomed = shared_extents.c.doomed_us.is_not(None)
    rows = connection.execute(
        sa.select(shared_extents.c.id, shared_extents.c.changed_us, doomed)
        .where(
            shared_extents.c.store == store,
            shared_extents.c.fingerprint == fingerprint,
            shared_extents.c.shard == shard,
            shared_extents.c.changed_us >= since_us,
        )
        .order_by(shared_extents.c.changed_us, shared_extents.c.id)
    )
    return [Change(row[0], row[1], bool(row[2])) for row in rows]


def _batches(found: Collection[_Key]) -> Iterator[list[_Key]]:
    ordered = sorted(set(found))
    return (ordered[at : at + _BATCH] for at in range(0, len(ordered), _BATCH))


def load(connection: Connection, ids: Collection[int]) -> list[SharedExtent]:
    """The extents with these ids, doomed ones too, in the order of their ids. Those that are forgotten are missing."""
    return [
        _extent(row)
        for some in _batches(ids)
        for row in connection.execute(_SELECT.where(shared_extents.c.id.in_(some)).order_by(shared_extents.c.id))
    ]


_SELECT = sa.select(*(shared_extents.c[name] for name in SharedExtent.__dataclass_fields__))


def _extent(row: sa.Row[Any]) -> SharedExtent:
    return SharedExtent(**{**row._mapping, "keys": bytes(row._mapping["keys"])})


def used(connection: Connection, ids: Collection[int]) -> set[int]:
    """Note that extents are used now: which of them are there and not doomed. Only these may be promised to stay: in
    the transaction that promises it."""
    return set(_update(connection, ids, shared_extents.c.doomed_us.is_(None), used_us=now_us()))


def doom(connection: Connection, ids: Collection[int], idle_s: float = 0.0) -> set[int]:
    """Doom extents, and say which. With ``idle_s`` only those that are idle for so long still: between `unneeded` and
    this, somebody may have begun to need one."""
    which = sa.and_(shared_extents.c.doomed_us.is_(None), _idle(idle_s) if idle_s else sa.true())
    return set(_update(connection, ids, which, doomed_us=now_us(), changed_us=now_us()))


def _update(
    connection: Connection, ids: Collection[int], which: sa.ColumnElement[bool], **values: Any
) -> Iterator[int]:
    for some in _batches(ids):
        if connection.dialect.name == "postgresql":
            # In one order, so that nobody waits for somebody who waits for them.
            locked = sa.select(shared_extents.c.id).where(shared_extents.c.id.in_(some)).order_by(shared_extents.c.id)
            connection.execute(locked.with_for_update(key_share=True)).all()
        changed = sa.update(shared_extents).where(shared_extents.c.id.in_(some), which).values(values)
        yield from connection.execute(changed.returning(shared_extents.c.id)).scalars().all()


def _idle(idle_s: float) -> sa.ColumnElement[bool]:
    """Neither used nor created nor changed for so long."""
    since_us = now_us() - round(idle_s * 1_000_000)
    times = (shared_extents.c.used_us, shared_extents.c.created_us, shared_extents.c.changed_us)
    return sa.and_(*(time_us <= since_us for time_us in times))


class Taken(NamedTuple):
    """The names by id of the extents that a collector took at ``at_us``, by the database's clock."""

    names: dict[int, str]
    at_us: int


def take(connection: Connection, store: str, older_than_s: float, limit: int) -> Taken:
    """Take up to ``limit`` extents that have been doomed for so long, and those that were taken `RETAKE_S` ago and not
    forgotten; the longest doomed first. To be committed before their objects are deleted: from then on they cannot be
    had back."""
    at_us: int = connection.execute(sa.select(now_us())).scalar_one()
    doomed_us = shared_extents.c.doomed_us
    which = sa.or_(
        doomed_us.between(_TAKEN + 1, at_us - round(older_than_s * 1_000_000)),
        doomed_us.between(round(RETAKE_S * 1_000_000) - at_us, _TAKEN),
    )
    rows = connection.execute(
        sa.select(shared_extents.c.id, shared_extents.c.name)
        .where(shared_extents.c.store == store, which)
        .order_by(shared_extents.c.doomed_us, shared_extents.c.id)
        .limit(limit)
    ).all()
    names = {row.id: row.name for row in rows}
    taken = set(_update(connection, names, which, doomed_us=-at_us))
    return Taken({id: name for id, name in names.items() if id in taken}, at_us)


def forget(connection: Connection, ids: Collection[int], taken_us: int) -> None:
    """Delete rows whose objects are gone, but for what somebody else has taken since ``taken_us``: another deletion may
    be on its way to the store."""
    for some in _batches(ids):
        which = sa.and_(shared_extents.c.id.in_(some), shared_extents.c.doomed_us == -taken_us)
        connection.execute(sa.delete(shared_extents).where(which))


def listing(connection: Connection, store: str, after: int = 0) -> list[SharedExtent]:
    """The extents with the next ids after ``after`` that are not doomed, in the order of their ids: none at the end."""
    ids, _ = _some(connection, sa.and_(shared_extents.c.store == store, shared_extents.c.doomed_us.is_(None)), after)
    return load(connection, ids)


@dataclass(frozen=True)
class Usage:
    """What one owner has of one shard in a store: extents that are there to be used, their pages and bytes, and the
    extents and bytes that are doomed."""

    fingerprint: str
    shard: str
    owner: str
    extents: int
    pages: int
    nbytes: int
    doomed: int
    doomed_nbytes: int


def usage(connection: Connection, store: str) -> list[Usage]:
    """What a store has, by fingerprint, shard and owner."""
    by = (shared_extents.c.fingerprint, shared_extents.c.shard, shared_extents.c.owner)
    here, going = shared_extents.c.doomed_us.is_(None), shared_extents.c.doomed_us.is_not(None)

    def of(which: sa.ColumnElement[bool], what: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        return sa.func.sum(sa.case((which, what), else_=0))

    one, n_bytes, packed = sa.literal(1), shared_extents.c.nbytes, sa.func.length(shared_extents.c["keys"])
    rows = connection.execute(
        sa.select(*by, of(here, one), of(here, packed), of(here, n_bytes), of(going, one), of(going, n_bytes))
        .where(shared_extents.c.store == store)
        .group_by(*by)
        .order_by(*by)
    )
    return [Usage(*row[:3], int(row[3]), int(row[4]) // KEY_BYTES, *map(int, row[5:])) for row in rows]


def known(connection: Connection, store: str | None, names: Collection[str]) -> set[str]:
    """Which of these names have a row, doomed ones too: in this store, or under any URL."""
    where = sa.true() if store is None else shared_extents.c.store == store
    return {
        name
        for some in _batches(names)
        for name in connection.execute(
            sa.select(shared_extents.c.name).where(where, shared_extents.c.name.in_(some))
        ).scalars()
    }


def unneeded(
    connection: Connection, store: str, idle_s: float, limit: int, owner: str | None = None
) -> list[SharedExtent]:
    """Up to ``limit`` extents, of one ``owner`` or of all, that nobody has needed for ``idle_s``, and of which no
    manifest lists a page.

    The manifests that count are those of the extent's fingerprint and rank on all nodes. A pool beside full attention
    has a fingerprint that no manifest has: then those of all fingerprints do, since a page has the same key in all
    pools. An extent whose shard is of no rank is needed if any rank needs it.
    """
    idle = sa.and_(shared_extents.c.store == store, shared_extents.c.doomed_us.is_(None), _idle(idle_s))
    if owner is not None:
        idle = sa.and_(idle, shared_extents.c.owner == owner)
    parts = (shared_extents.c.fingerprint, shared_extents.c.shard)
    found: list[SharedExtent] = []
    for fingerprint, shard in connection.execute(sa.select(*parts).where(idle).distinct().order_by(*parts)).all():
        of_part = sa.and_(idle, shared_extents.c.fingerprint == fingerprint, shared_extents.c.shard == shard)
        after: int | None = 0
        while after is not None and len(found) < limit:
            ids, after = _some(connection, of_part, after)
            candidates = load(connection, ids)
            needed = _listed(connection, fingerprint, shard, candidates)
            found += (one for one in candidates if one.id not in needed)
    return found[:limit]


def _some(connection: Connection, which: sa.ColumnElement[bool], after: int) -> tuple[list[int], int | None]:
    """The ids of the next extents, as many as have `_WANTED_BYTES` of keys, and the one to go on after."""
    rows = connection.execute(
        sa.select(shared_extents.c.id, sa.func.length(shared_extents.c["keys"]))
        .where(which, shared_extents.c.id > after)
        .order_by(shared_extents.c.id)
        .limit(_BATCH)
    ).all()
    ids: list[int] = []
    n_bytes = 0
    for id, length in rows:
        n_bytes += length
        if ids and n_bytes > _WANTED_BYTES:
            return ids, ids[-1]
        ids.append(id)
    return ids, ids[-1] if len(ids) == _BATCH else None


def _listed(connection: Connection, fingerprint: str, shard: str, candidates: Collection[SharedExtent]) -> set[int]:
    """The ids of those of some extents of which a manifest lists a page."""
    extents_of: dict[bytes, set[int]] = {}
    for one in candidates:
        for at in range(0, len(one.keys), KEY_BYTES):
            extents_of.setdefault(one.keys[at : at + KEY_BYTES], set()).add(one.id)
    rank = shard.removeprefix("rank")
    of_rank = manifests.c.rank == int(rank) if rank != shard and rank.isdecimal() else sa.true()
    its_own = manifests.c.fingerprint == fingerprint
    if connection.execute(sa.select(sa.literal(1)).where(sa.exists().where(its_own))).scalar():
        of_rank = sa.and_(of_rank, its_own)
    needed: set[int] = set()
    listed = sa.select(manifests.c["keys"]).where(of_rank)
    with connection.execute(listed, execution_options={"yield_per": 20}) as rows:
        for keys in rows.scalars():
            if len(needed) == len(candidates):
                break
            for at in range(0, len(keys), KEY_BYTES):
                needed |= extents_of.get(keys[at : at + KEY_BYTES], _NONE)
    return needed


_NONE: frozenset[int] = frozenset()


def owned(connection: Connection, store: str) -> dict[str, int]:
    """How many bytes of a store are charged to each account, but for what is doomed."""
    rows = connection.execute(
        sa.select(shared_extents.c.owner, sa.func.sum(shared_extents.c.nbytes))
        .where(shared_extents.c.store == store, shared_extents.c.doomed_us.is_(None))
        .group_by(shared_extents.c.owner)
    )
    return {owner: int(n_bytes) for owner, n_bytes in rows}


def n_bytes_of(connection: Connection, store: str, owner: str) -> int:
    """How many bytes of a store are charged to an account, but for what is doomed."""
    here = sa.and_(shared_extents.c.store == store, shared_extents.c.doomed_us.is_(None))
    total = sa.select(sa.func.sum(shared_extents.c.nbytes)).where(here, shared_extents.c.owner == owner)
    return int(connection.execute(total).scalar() or 0)


def least_recently_used(connection: Connection, ids: Collection[int]) -> list[int]:
    """These extents, those first that were used longest ago."""
    times = [
        (used_us, id)
        for some in _batches(ids)
        for used_us, id in connection.execute(
            sa.select(shared_extents.c.used_us, shared_extents.c.id).where(shared_extents.c.id.in_(some))
        )
    ]
    return [id for _, id in sorted(times)]
