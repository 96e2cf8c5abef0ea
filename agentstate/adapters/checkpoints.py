"""LangGraph's checkpoints in SQL: the storage behind a saver, independent of LangGraph and of the values' types.

A write is one transaction of the size of the change. A read is at most four statements, however long the thread and
however many checkpoints it requests. Nothing here runs a model or takes a lease.

Writers of one thread never wait for each other. Deletions wait for writers: every row of a thread refers to its
session, whose row a writer locks against deletion, and `_lock` locks against writers. So a blob that a writer found
stored cannot be swept before the writer commits.

A thread whose session has expired can be neither read nor written. If a session is deleted during a run, the rest of
that run does not recreate it: `Checkpoints` remembers which session a thread was when it was last read.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import FunctionElement

from agentstate import ids
from agentstate.adapters.tables import checkpoint_blobs, checkpoint_channels, checkpoint_writes, checkpoints
from agentstate.errors import SessionExists, SessionExpired, SessionNotFound
from agentstate.sessions.rows import Rows
from agentstate.sql.database import Database, insert, now_us
from agentstate.sql.models import sessions

DIGEST_BYTES = 32
PAGE = 64
KNOWN = 10_000
_BATCH = 1000  # rows per statement: both databases limit its parameters
_TABLES = (checkpoint_writes, checkpoint_channels, checkpoint_blobs, checkpoints)

T = TypeVar("T")


@dataclass(frozen=True)
class Value:
    """An encoded value. Without an ``encoding`` its body is the digests of its blobs, in order.

    ``blobs`` are those blobs, by digest: all for a stored value, at least those not stored yet for a new one.
    """

    encoding: str | None
    body: bytes
    blobs: dict[bytes, bytes] = field(default_factory=dict)

    @property
    def digests(self) -> list[bytes]:
        if self.encoding is not None:
            return []
        return [self.body[at : at + DIGEST_BYTES] for at in range(0, len(self.body), DIGEST_BYTES)]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint without its channels' values; ``versions`` covers all channels, including empty ones."""

    thread_id: str
    namespace: str
    id: str
    parent_id: str | None
    run_id: str | None
    metadata: dict[str, Any]
    versions: dict[str, str | int | float]
    encoding: str
    body: bytes


@dataclass(frozen=True)
class Write:
    """A task's write to a channel. A later write replaces one at a negative position; others stay."""

    task_id: str
    position: int
    task_path: str
    channel: str
    value: Value


@dataclass(frozen=True)
class Loaded:
    """A checkpoint, its channels' values, and the writes made from it, in the order in which a run applies them."""

    checkpoint: Checkpoint
    channels: dict[str, Value]
    writes: list[Write]


class Checkpoints:
    """The checkpoints of all threads of a tenant in one database. A thread is a session; `put` creates it with
    ``model``.

    Every method may raise DatabaseError; those that read or write one thread may raise SessionExpired. Thread-safe.
    """

    def __init__(self, database: Database, model: str, tenant: str):
        self._database = database
        self._model = model
        self._tenant = tenant
        self._known = _KnownSessions()

    def put(self, checkpoint: Checkpoint, channels: dict[str, Value]) -> None:
        """Store a checkpoint, replacing one of the same id, and the values of the channels that it changed.

        Raises SessionNotFound if the thread's session was deleted after the thread was last read.
        """
        with self._database.write() as connection:
            session_id = self._ensure_session(connection, checkpoint.thread_id)
            row = {**vars(checkpoint), "session_id": session_id}
            del row["thread_id"]
            key = ("session_id", "namespace", "id")
            connection.execute(
                insert(connection.dialect.name, checkpoints)
                .values(row)
                .on_conflict_do_update(
                    index_elements=key, set_={name: value for name, value in row.items() if name not in key}
                )
            )
            _add_blobs(connection, session_id, channels.values())
            if channels:
                connection.execute(
                    # A version of a channel is created once: the same version has the same value.
                    insert(connection.dialect.name, checkpoint_channels).on_conflict_do_nothing(),
                    [
                        {
                            "session_id": session_id,
                            "namespace": checkpoint.namespace,
                            "channel": channel,
                            "version": str(checkpoint.versions[channel]),
                            "encoding": value.encoding,
                            "body": value.body,
                        }
                        for channel, value in channels.items()
                    ],
                )
        self._known.remember(checkpoint.thread_id, session_id)

    def put_writes(self, thread_id: str, namespace: str, checkpoint_id: str, writes: Sequence[Write]) -> None:
        """Store the tasks' writes once: storing them again changes nothing, except at negative positions.

        Raises SessionNotFound as `put` does.
        """
        with self._database.write() as connection:
            session_id = self._ensure_session(connection, thread_id)
            statement = insert(connection.dialect.name, checkpoint_writes)
            replaced = ("task_path", "channel", "encoding", "body")
            replace = statement.on_conflict_do_update(
                index_elements=list(checkpoint_writes.primary_key),
                set_={name: statement.excluded[name] for name in replaced},
            )
            keep = statement.on_conflict_do_nothing()
            for special, upsert in ((True, replace), (False, keep)):
                rows = [
                    {
                        "session_id": session_id,
                        "namespace": namespace,
                        "checkpoint_id": checkpoint_id,
                        "task_id": write.task_id,
                        "position": write.position,
                        "task_path": write.task_path,
                        "channel": write.channel,
                        "encoding": write.value.encoding,
                        "body": write.value.body,
                    }
                    for write in writes
                    if (write.position < 0) is special
                ]
                if rows:
                    connection.execute(upsert, rows)
        self._known.remember(thread_id, session_id)

    def get(self, thread_id: str, namespace: str, checkpoint_id: str | None = None) -> Loaded | None:
        """One checkpoint, by default the newest."""
        query = _rows(self._tenant).where(thread_name == thread_id, checkpoints.c.namespace == namespace)
        if checkpoint_id is not None:
            query = query.where(checkpoints.c.id == checkpoint_id)
        with self._snapshot() as connection:
            rows = connection.execute(query.order_by(checkpoints.c.id.desc()).limit(1)).all()
            self._known.remember(thread_id, rows[0].session_id if rows else _find(connection, self._tenant, thread_id))
            return next(iter(_load(connection, rows)), None)

    def page(
        self,
        *,
        thread_id: str | None = None,
        namespace: str | None = None,
        checkpoint_id: str | None = None,
        before: str | None = None,
        metadata: dict[str, Any] | None = None,
        after: Checkpoint | None = None,
        limit: int = PAGE,
    ) -> tuple[list[Loaded], Checkpoint | None]:
        """The next matching checkpoints, newest first, and where to continue (``after``), None at the end.

        ``before`` excludes a checkpoint id and all newer ones. Examines up to ``limit`` checkpoints, so a page may be
        empty although there are more.
        """
        table = checkpoints.c
        query = _rows(self._tenant)
        if thread_id is not None:
            query = query.where(thread_name == thread_id)
        for column, value in ((table.namespace, namespace), (table.id, checkpoint_id)):
            if value is not None:
                query = query.where(column == value)
        if before is not None:
            query = query.where(table.id < before)
        for name, value in (metadata or {}).items():
            # The database searches for the pair's text and does not parse the JSON: one row that its JSON functions
            # refuse would fail the whole query. All rows are compared again below.
            if isinstance(value, str):
                query = query.where(_has(table.metadata, f"{json.dumps(name)}: {json.dumps(value)}"))
        order = (table.id, thread_name, table.namespace)
        if after is not None:
            query = query.where(sa.tuple_(*order) < sa.tuple_(after.id, after.thread_id, after.namespace))
        with self._snapshot() as connection:
            rows = connection.execute(query.order_by(*(column.desc() for column in order)).limit(limit)).all()
            fitting = [
                row
                for row in rows
                if all(row._mapping["metadata"].get(name) == value for name, value in (metadata or {}).items())
            ]
            found = _load(connection, fitting)
            if thread_id is not None and not rows:
                _find(connection, self._tenant, thread_id)
        return found, _checkpoint(rows[-1]) if len(rows) == limit else None

    def ancestors(self, checkpoint: Checkpoint, channels: Collection[str]) -> Iterator[Loaded]:
        """A checkpoint's ancestors, its parent first, with the values of some channels only."""
        while True:
            with self._snapshot() as connection:
                rows = _lineage(connection, self._tenant, checkpoint)
                found = _load(connection, rows, channels)
            yield from found
            if len(found) < PAGE:
                return
            checkpoint = found[-1].checkpoint

    def delete_thread(self, thread_id: str) -> None:
        """Delete all that was put for a thread. Its session stays, with its other data."""
        with self._database.write() as connection:
            session_id = _lock(connection, self._tenant, thread_id)
            if session_id is None:
                return
            for table in _TABLES:
                connection.execute(sa.delete(table).where(table.c.session_id == session_id))

    def delete_runs(self, run_ids: Sequence[str]) -> None:
        """Delete the checkpoints of some runs, and the writes made from those checkpoints."""
        for batch in _batches(run_ids):
            with self._database.read() as connection:
                of_runs = (
                    sa.select(thread_name)
                    .join(checkpoints)
                    .where(_exists(self._tenant), checkpoints.c.run_id.in_(batch))
                    .distinct()
                )
                threads = connection.execute(of_runs).scalars().all()
            for thread_id in threads:
                with self._database.write() as connection:
                    session_id = _lock(connection, self._tenant, thread_id)
                    if session_id is None:
                        continue
                    gone = connection.execute(
                        sa.delete(checkpoints)
                        .where(checkpoints.c.session_id == session_id, checkpoints.c.run_id.in_(batch))
                        .returning(checkpoints.c.namespace, checkpoints.c.id)
                    ).all()
                    _delete_rows(connection, session_id, checkpoint_writes, ("namespace", "checkpoint_id"), gone)
                    _sweep(connection, session_id)

    def prune(self, thread_id: str) -> None:
        """Delete all checkpoints of a thread except the newest of each namespace.

        Ancestors that the newest needs stay too: if a channel's value is stored only now and then, those that hold its
        writes, back to the one with its value.
        """
        with self._database.write() as connection:
            session_id = _lock(connection, self._tenant, thread_id)
            if session_id is None or _find(connection, self._tenant, thread_id) is None:
                return
            newest = (
                sa.select(checkpoints.c.namespace, sa.func.max(checkpoints.c.id))
                .where(checkpoints.c.session_id == session_id)
                .group_by(checkpoints.c.namespace)
            )
            keys = connection.execute(newest).all()
            kept = {tuple(key) for key in keys}
            for namespace, newest_id in keys:
                row = connection.execute(
                    _rows(self._tenant).where(
                        thread_name == thread_id, checkpoints.c.namespace == namespace, checkpoints.c.id == newest_id
                    )
                ).one()
                kept |= {(namespace, id) for id in _needed(connection, self._tenant, row)}
            all_of = sa.select(checkpoints.c.namespace, checkpoints.c.id).where(checkpoints.c.session_id == session_id)
            gone = [key for key in connection.execute(all_of) if tuple(key) not in kept]
            _delete_rows(connection, session_id, checkpoints, ("namespace", "id"), gone)
            _delete_rows(connection, session_id, checkpoint_writes, ("namespace", "checkpoint_id"), gone)
            _sweep(connection, session_id)

    def copy_thread(self, source_id: str, target_id: str) -> None:
        """Copy all that was put for a thread to another; existing rows of the target stay unchanged.

        If this creates the target's session, it has the source's model and KV namespace, so it also shares the source's
        pages. Without a source, this does nothing.
        """
        if source_id == target_id:
            return
        with self._database.write() as connection:
            source = connection.execute(
                sa.select(sessions).where(_is(self._tenant, source_id)).with_for_update(read=True, key_share=True)
            ).one_or_none()
            if source is None or _find(connection, self._tenant, source_id) is None:
                return
            session_id = _ensure(
                connection,
                self._tenant,
                target_id,
                None,
                model=source.model,
                cache_salt=source.cache_salt,
                extra_key=source.extra_key,
            )
            for table in (checkpoint_blobs, checkpoint_channels, checkpoint_writes, checkpoints):
                others = [column for column in table.c if column.name != "session_id"]
                rows = sa.select(sa.literal(session_id, sa.Text()), *others).where(table.c.session_id == source.id)
                connection.execute(
                    insert(connection.dialect.name, table)
                    .from_select(["session_id", *(column.name for column in others)], rows)
                    .on_conflict_do_nothing()
                )

    def _ensure_session(self, connection: Connection, thread_id: str) -> str:
        return _ensure(
            connection,
            self._tenant,
            thread_id,
            self._known.find(thread_id),
            model=self._model,
            cache_salt=None,
            extra_key=None,
        )

    @contextmanager
    def _snapshot(self) -> Iterator[Connection]:
        """A read transaction in which all statements see one snapshot, even beside a `prune`."""
        with self._database.read() as connection:
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            yield connection


class _KnownSessions:
    """The session of each thread as of its last read, for the `KNOWN` most recently used threads."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, thread_id: str) -> str | None:
        with self._lock:
            return self._sessions.get(thread_id)

    def remember(self, thread_id: str, session_id: str | None) -> None:
        with self._lock:
            self._sessions.pop(thread_id, None)
            if session_id is not None:
                self._sessions[thread_id] = session_id
                if len(self._sessions) > KNOWN:
                    self._sessions.popitem(last=False)


# A thread's name: the id that clients give its session.
thread_name = sessions.c.name


def _is(tenant: str, thread_id: str) -> sa.ColumnElement[bool]:
    return sa.and_(sessions.c.tenant == tenant, thread_name == thread_id)


def _rows(tenant: str) -> sa.Select[Any]:
    """The checkpoints of all threads that have not expired."""
    return sa.select(checkpoints, thread_name.label("thread_id")).join(sessions).where(_exists(tenant), ~_EXPIRED)


_EXPIRED = sa.and_(sessions.c.expires_us.is_not(None), sessions.c.expires_us <= now_us())


def _exists(tenant: str) -> sa.ColumnElement[bool]:
    # The row of a deleted session stays for as long as forks share its entries.
    return sa.and_(sessions.c.tenant == tenant, sessions.c.deleted_us.is_(None))


def _find(connection: Connection, tenant: str, thread_id: str, *, hold: bool = False) -> str | None:
    """The id of a thread's session, None without one. With ``hold``, locks it against deletion until the transaction
    ends.

    Raises SessionExpired.
    """
    query = sa.select(sessions.c.id, _EXPIRED.label("expired")).where(_is(tenant, thread_id), _exists(tenant))
    if hold:
        query = query.with_for_update(read=True, key_share=True)
    row = connection.execute(query).one_or_none()
    if row is None:
        return None
    if row.expired:
        raise SessionExpired(f"thread {thread_id} is a session that has expired")
    found: str = row.id
    return found


class _has(FunctionElement[bool]):
    """SQL expression: whether a JSON column's text contains another text verbatim."""

    type = sa.Boolean()
    inherit_cache = True

    def __init__(self, column: sa.ColumnElement[Any], text: str):
        super().__init__(sa.cast(column, sa.Text()), sa.literal(text, sa.Text()))


@compiles(_has, "sqlite")
def _has_sqlite(element: _has, compiler: SQLCompiler, **kw: Any) -> str:
    return f"instr({compiler.process(element.clauses, **kw)}) > 0"


@compiles(_has, "postgresql")
def _has_postgresql(element: _has, compiler: SQLCompiler, **kw: Any) -> str:
    return f"strpos({compiler.process(element.clauses, **kw)}) > 0"


def _ensure(connection: Connection, tenant: str, thread_id: str, known: str | None, **values: Any) -> str:
    """The id of a thread's session, locked against deletion; created with ``values`` if there is none.

    Raises SessionNotFound if it is not the ``known`` one, SessionExpired.
    """
    found = _find(connection, tenant, thread_id, hold=True)
    if known is not None and found != known:
        raise SessionNotFound(f"the session of thread {thread_id} was deleted while the thread was run")
    if found is None:
        uid = ids.new("ses")
        try:
            made = Rows(tenant).make(
                connection,
                id=uid,
                name=thread_id,
                metadata={},
                next_seq=1,
                expires_in_s=None,
                **values,
            )
            return made.uid
        except SessionExists:  # another writer made it meanwhile
            found = _find(connection, tenant, thread_id, hold=True)
        if found is None:
            raise SessionNotFound(f"the session of thread {thread_id} was deleted while the thread was run")
    return found


def _lock(connection: Connection, tenant: str, thread_id: str) -> str | None:
    """Lock a thread's session against writers until the transaction ends. Returns its id; None without one."""
    found: str | None = connection.execute(
        sa.select(sessions.c.id).where(_is(tenant, thread_id)).with_for_update()
    ).scalar()
    return found


def _add_blobs(connection: Connection, session_id: str, values: Iterable[Value]) -> None:
    new = {digest: body for value in values for digest, body in value.blobs.items()}
    for batch in _batches(list(new)):
        # Look them up first: most are stored already, and need not be sent again.
        known = connection.execute(
            sa.select(checkpoint_blobs.c.digest).where(
                checkpoint_blobs.c.session_id == session_id, checkpoint_blobs.c.digest.in_(batch)
            )
        ).scalars()
        for digest in known:
            del new[digest]
    if new:
        connection.execute(
            insert(connection.dialect.name, checkpoint_blobs).on_conflict_do_nothing(),
            [{"session_id": session_id, "digest": digest, "body": body} for digest, body in new.items()],
        )


def _load(connection: Connection, rows: Sequence[Any], only: Collection[str] | None = None) -> list[Loaded]:
    """The checkpoints of some rows, with their channels (``only`` those, if given) and writes."""
    names = {
        (row.session_id, row.namespace, channel, str(version))
        for row in rows
        for channel, version in row.versions.items()
        if only is None or channel in only
    }
    stored = {
        (row.session_id, row.namespace, row.channel, row.version): Value(row.encoding, row.body)
        for row in _named(connection, checkpoint_channels, ("session_id", "namespace", "channel", "version"), names)
    }
    wanted = {(session_id, digest) for (session_id, *_), value in stored.items() for digest in value.digests}
    blobs = {
        (row.session_id, bytes(row.digest)): row.body
        for row in _named(connection, checkpoint_blobs, ("session_id", "digest"), wanted)
    }
    writes: dict[tuple[str, str, str], list[Write]] = {}
    keys = {(row.session_id, row.namespace, row.id) for row in rows}
    for row in _named(connection, checkpoint_writes, ("session_id", "namespace", "checkpoint_id"), keys):
        writes.setdefault((row.session_id, row.namespace, row.checkpoint_id), []).append(
            Write(row.task_id, row.position, row.task_path, row.channel, Value(row.encoding, row.body))
        )
    loaded = []
    for row in rows:
        place = (row.session_id, row.namespace)
        values = {name: stored.get((*place, name, str(version))) for name, version in row.versions.items()}
        loaded.append(
            Loaded(
                _checkpoint(row),
                {
                    name: Value(value.encoding, value.body, {d: blobs[row.session_id, d] for d in value.digests})
                    for name, value in values.items()
                    if value is not None
                },
                sorted(
                    writes.get((*place, row.id), []),
                    key=lambda write: (write.task_path, write.task_id, write.position),
                ),
            )
        )
    return loaded


def _lineage(connection: Connection, tenant: str, checkpoint: Checkpoint) -> Sequence[Any]:
    """Rows of the nearest ancestors of a checkpoint, at most `PAGE`, the parent first."""
    steps = sa.select(sa.literal(checkpoint.parent_id, sa.Text()).label("id"), sa.literal(0).label("depth")).cte(
        "steps", recursive=True
    )
    session_id = sa.select(sessions.c.id).where(_is(tenant, checkpoint.thread_id)).scalar_subquery()
    here = (checkpoints.c.session_id == session_id, checkpoints.c.namespace == checkpoint.namespace)
    steps = steps.union_all(
        sa.select(checkpoints.c.parent_id, steps.c.depth + 1)
        .select_from(steps.join(checkpoints, checkpoints.c.id == steps.c.id))
        .where(*here, steps.c.depth < PAGE - 1)
    )
    return connection.execute(
        _rows(tenant).join(steps, steps.c.id == checkpoints.c.id).where(*here).order_by(steps.c.depth)
    ).all()


def _needed(connection: Connection, tenant: str, row: Any) -> Iterator[str]:
    """Ids of the ancestors that are needed to rebuild a checkpoint."""
    # In the metadata LangGraph counts the steps since the value of such a channel was last stored.
    open_channels = set(_checkpoint(row).metadata.get("counters_since_delta_snapshot") or ())
    (loaded,) = _load(connection, [row], open_channels)
    open_channels -= loaded.channels.keys()
    checkpoint = loaded.checkpoint
    while open_channels:
        found = _load(connection, _lineage(connection, tenant, checkpoint), open_channels)
        for ancestor in found:
            yield ancestor.checkpoint.id
            open_channels -= ancestor.channels.keys()
            if not open_channels:
                return
        if len(found) < PAGE:
            return
        checkpoint = found[-1].checkpoint


def _sweep(connection: Connection, session_id: str) -> None:
    """Delete a thread's channel values that no checkpoint uses, and then the blobs that no value uses."""
    used = {
        (row.namespace, channel, str(version))
        for row in connection.execute(
            sa.select(checkpoints.c.namespace, checkpoints.c.versions).where(checkpoints.c.session_id == session_id)
        )
        for channel, version in row.versions.items()
    }
    table = checkpoint_channels.c
    unused, digests = [], set()
    for row in connection.execute(
        sa.select(table.namespace, table.channel, table.version, table.body, table.encoding).where(
            table.session_id == session_id
        )
    ):
        if (row.namespace, row.channel, row.version) in used:
            digests.update(Value(row.encoding, row.body).digests)
        else:
            unused.append((row.namespace, row.channel, row.version))
    _delete_rows(connection, session_id, checkpoint_channels, ("namespace", "channel", "version"), unused)
    blobs = sa.select(checkpoint_blobs.c.digest).where(checkpoint_blobs.c.session_id == session_id)
    gone = [(digest,) for digest in connection.execute(blobs).scalars() if bytes(digest) not in digests]
    _delete_rows(connection, session_id, checkpoint_blobs, ("digest",), gone)


def _delete_rows(
    connection: Connection, session_id: str, table: sa.Table, names: Sequence[str], keys: Sequence[Sequence[Any]]
) -> None:
    columns = sa.tuple_(*(table.c[name] for name in names))
    for batch in _batches(keys):
        connection.execute(
            sa.delete(table).where(table.c.session_id == session_id, columns.in_([tuple(key) for key in batch]))
        )


def _named(
    connection: Connection, table: sa.Table, names: Sequence[str], keys: Collection[tuple[Any, ...]]
) -> Iterator[Any]:
    """The rows of some keys. The join makes each one primary-key look-up on either database."""
    for batch in _batches(list(keys)):
        wanted = sa.values(*(sa.column(name, table.c[name].type) for name in names)).data(batch).cte("wanted")
        same = sa.and_(*(table.c[name] == wanted.c[name] for name in names))
        yield from connection.execute(sa.select(table).select_from(wanted.join(table, same)))


def _batches(items: Sequence[T]) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := list(islice(rest, _BATCH)):
        yield batch


def _checkpoint(row: Any) -> Checkpoint:
    return Checkpoint(**{name: row._mapping[name] for name in Checkpoint.__dataclass_fields__})
