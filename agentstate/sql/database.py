"""The database: SQLite by default, PostgreSQL when its URL is set. Both hold the same schema.

**SQLite** runs in WAL mode. Reads never wait for writes. A process has one writing connection, and every write starts
with ``BEGIN IMMEDIATE``, so two writers wait for each other instead of failing half-way. What is submitted shares
transactions: each write in a savepoint of its own, and nobody is told of his before the commit that holds it. With
``synchronous = NORMAL`` a committed transaction survives a crash of the process; after a power loss the newest
transactions may be missing, but the database is never corrupt.

**PostgreSQL** writes at READ COMMITTED: statements after the lock of a row see all that was committed before it. Reads
run at REPEATABLE READ, read-only, so that several statements see one snapshot. There are limits on how long a statement
runs, waits for a lock, or idles in a transaction. A committed transaction is as durable as the server's
``synchronous_commit`` makes it.

Connections go only to a server that can be written to, unless the URL sets ``target_session_attrs``. After a failover
the pool drops its connections to a server that has become read-only, and finds the new primary among several hosts.
Before a connection is used again, its server is asked whether it is still there, unless the connection was used less
than ``UNASKED_S`` ago and the server has said nothing since: it would say that it ends, or what it has become.
Behind a PgBouncer in transaction mode (``pgbouncer=true`` in the URL) no statement is prepared, and the limits are set
in each transaction.

Transactions are short by design: never hold one while waiting for an engine or for a client.
"""

from __future__ import annotations

import logging
import select
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import copy_context
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, ExceptionContext
from sqlalchemy.exc import (
    DBAPIError,
    DisconnectionError,
    InterfaceError,
    InvalidatePoolError,
    InvalidRequestError,
    OperationalError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.pool import NullPool
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import FunctionElement

from agentstate import migrations
from agentstate.errors import (
    DatabaseError,
    DatabaseFull,
    DatabaseUnreachable,
    SchemaNewer,
    SchemaOutdated,
    SettingsError,
)
from agentstate.private import close_to_others, make_directory, make_file
from agentstate.sql import address, pipelined, prepared
from agentstate.sql.batches import Batcher, Job, Turnstile

T = TypeVar("T")

logger = logging.getLogger(__name__)

BUSY_TIMEOUT_S = 10
CONNECT_TIMEOUT_S = 5
POOL_SIZE = 10
UNASKED_S = 0.25
MOST_TOGETHER = 64  # writes in one transaction
TOGETHER_S = 0.25  # other processes wait for it: large entries on a slow drive take as long as that
POSTGRESQL_LIMITS = {
    "statement_timeout": "15s",
    "lock_timeout": "10s",
    "idle_in_transaction_session_timeout": "60s",
}
# What PostgreSQL (14 and later) reports of itself, unasked, with every answer.
READ_ONLY_SIGNS = (b"in_hot_standby", b"default_transaction_read_only")
SNAPSHOT = "agentstate_snapshot"  # execution option of a connection that reads
READ_ONLY = "25006"  # SQLSTATE of a write in a read-only transaction
FULL = "53100"  # SQLSTATE of a disk that is full
MIGRATION_LOCK = 0x6167656E74737461  # "agentsta": the advisory lock that lets one process migrate at a time


# Where Alembic keeps the revision.
_VERSIONS = sa.table("alembic_version", sa.column("version_num"))


class now_us(FunctionElement[int]):
    """SQL expression: the database's clock, in microseconds since the Unix epoch, UTC.

    Every time that is stored or compared comes from it, so that the clocks of clients, services and engines do not
    matter. It is the clock of the moment, not of the transaction's start: a transaction that waited for a lock must not
    judge a lease by the time before it waited. SQLite's resolution is one millisecond.
    """

    type = sa.BigInteger()
    inherit_cache = True


@compiles(now_us, "sqlite")
def _now_sqlite(element: now_us, compiler: SQLCompiler, **kw: Any) -> str:
    return "(CAST(ROUND((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER) * 1000)"


@compiles(now_us, "postgresql")
def _now_postgresql(element: now_us, compiler: SQLCompiler, **kw: Any) -> str:
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS BIGINT)"


def instant(time_us: int) -> datetime:
    """A stored time as a timezone-aware UTC datetime."""
    return datetime.fromtimestamp(time_us / 1_000_000, UTC)


def insert(dialect: str, table: sa.Table) -> Any:
    """The dialect's INSERT, for its ``on_conflict_do_update`` and ``on_conflict_do_nothing``, spelt alike in both."""
    return postgresql.insert(table) if dialect == "postgresql" else sqlite.insert(table)


class Database:
    """Gives out connections to one database. Thread-safe; opens nothing until it is used.

    ``url`` is a SQLAlchemy URL for a SQLite file or for PostgreSQL (``Settings.sqlalchemy_url``). Raises SettingsError
    when it is neither.
    """

    def __init__(self, url: str):
        self._address = address.parse(url)
        self._url = self._address.url
        self.is_sqlite = self._address.is_sqlite
        self._thread = threading.local()  # what the thread has begun: a block of `write`, and a transaction of several
        self._threads: ThreadPoolExecutor | Batcher | None = None
        self._starting = threading.Lock()
        self._turns = Turnstile()
        self.url = self._address.shown  # safe to log
        if self.is_sqlite:
            if self._url.database in (None, "", ":memory:"):
                raise SettingsError("AGENTSTATE_DATABASE_URL must name a file: an in-memory SQLite cannot be shared")
            # This process's writers wait for each other's turn to use it (`_transaction`).
            self._writer = sa.create_engine(
                self._url,
                pool_size=1,
                max_overflow=0,
                pool_timeout=BUSY_TIMEOUT_S,
                connect_args={"timeout": BUSY_TIMEOUT_S},
                hide_parameters=True,
            )
            self._reader = sa.create_engine(
                self._url,
                pool_size=POOL_SIZE,
                max_overflow=POOL_SIZE,
                pool_timeout=BUSY_TIMEOUT_S,
                connect_args={"timeout": BUSY_TIMEOUT_S},
                hide_parameters=True,
            )
            sa.event.listen(self._writer, "do_connect", lambda *_: self._make_parent())
            _configure_sqlite(self._writer, begin="BEGIN IMMEDIATE", read_only=False)
            _configure_sqlite(self._reader, begin="BEGIN", read_only=True)
        else:
            self._writer = sa.create_engine(
                self._url,
                pool_size=POOL_SIZE,
                max_overflow=POOL_SIZE,
                pool_timeout=CONNECT_TIMEOUT_S,
                connect_args=self._connect_args(limits=not self._address.pooled),
                hide_parameters=True,
            )
            _configure_postgresql(self._writer, self._address)
            self._reader = self._writer.execution_options(**{SNAPSHOT: True})  # the same pool

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One transaction for reading, which cannot write: all of its statements see the same snapshot.

        Raises DatabaseUnreachable if no connection can be made, DatabaseError if a statement fails for a reason of the
        database's (a lock not acquired in time, a full disk).
        """
        with self._errors(), self._reader.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction for writing: committed when the block ends, rolled back when it raises.

        Waits up to ``BUSY_TIMEOUT_S`` for SQLite's other writers. Raises like :meth:`read`; then nothing was written.
        A block within another of the same thread and database joins that one's transaction.
        """
        outer: Connection | None = getattr(self._thread, "connection", None)
        if outer is not None:
            yield outer
            return
        shared: Connection | None = getattr(self._thread, "shared", None)
        with self._errors(), self._transaction() if shared is None else self._part_of(shared) as connection:
            self._thread.connection, self._thread.then = connection, []
            try:
                yield connection
            finally:
                self._thread.connection, then = None, self._thread.then
        if shared is not None:
            self._thread.shared_then += then
            return
        for act in then:
            act()

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        if self.is_sqlite and not self._turns.acquire(BUSY_TIMEOUT_S):
            raise DatabaseError(f"{self.url}: no connection became free in time; try again")
        try:
            with self._writer.begin() as connection:
                yield connection
        finally:
            if self.is_sqlite:
                self._turns.release()

    @contextmanager
    def _part_of(self, shared: Connection) -> Iterator[Connection]:
        """A part of a transaction that is rolled back alone if the block raises."""
        self._require_transaction(shared)
        prepared.say(shared, "SAVEPOINT part")
        try:
            yield shared
            prepared.say(shared, "RELEASE part")
        except BaseException:
            driver = _driver_of(shared)
            # Some errors make SQLite roll back the whole of it: a full disk, for example.
            if driver.in_transaction:
                try:
                    driver.execute("ROLLBACK TO part")
                    driver.execute("RELEASE part")
                except BaseException:
                    driver.rollback()  # all of it, rather than half of this
            raise

    def _require_transaction(self, shared: Connection) -> None:
        if not _driver_of(shared).in_transaction:
            raise DatabaseError(f"{self.url}: a write that shared this one's transaction has ended it; try again")

    def _together(self, jobs: Sequence[Job]) -> None:
        """Carry out what was submitted, in one transaction, or in several where one would take long; each learns its
        outcome once that has committed."""
        while jobs:
            jobs = jobs[self._as_many(jobs) :]

    def _as_many(self, jobs: Sequence[Job]) -> int:
        """Carry out in one transaction as many of the jobs as begin within ``TOGETHER_S``: how many were told."""
        thread, failed = self._thread, None
        then: list[Callable[[], None]] = []
        try:
            with self._errors(), self._transaction() as connection:
                thread.shared, thread.shared_then = connection, then
                began_s = time.monotonic()
                try:
                    for number, job in enumerate(jobs):
                        if number and time.monotonic() - began_s > TOGETHER_S:
                            jobs = jobs[:number]
                            break
                        job.run()
                        self._require_transaction(connection)
                finally:
                    thread.shared = None
        except BaseException as error:
            failed = error
        else:
            for act in then:
                try:
                    act()
                except BaseException:  # it must not; whoever waits for the commit is told all the same
                    logger.exception("what was to be done after a commit failed")
        for job in jobs:
            job.tell(failed)
        return len(jobs)

    def submit(self, act: Callable[[], T]) -> Future[T]:
        """Have ``act``, which writes, run on a thread for that, in the caller's context. On SQLite there is one, on
        which writes that wait for each other share a transaction: what ``act`` writes is there, for itself too, when
        the future is done, and not before. The future raises what ``act`` raises, DatabaseError if its turn has not
        come within ``BUSY_TIMEOUT_S``, and what `write` raises if the transaction cannot be committed; then nothing
        was written."""
        submitted_s = time.monotonic()

        def run() -> T:
            if time.monotonic() - submitted_s > BUSY_TIMEOUT_S:
                raise DatabaseError(f"{self.url}: no connection became free in time; try again")
            return act()

        with self._starting:  # or closing
            if self._threads is None and self.is_sqlite:
                self._threads = Batcher(self._together, MOST_TOGETHER, "agentstate-write")
            elif self._threads is None:
                self._threads = ThreadPoolExecutor(2 * POOL_SIZE, thread_name_prefix="agentstate-write")
            if isinstance(self._threads, Batcher):
                return self._threads.submit(run)
            return self._threads.submit(copy_context().run, run)

    def once_committed(self, act: Callable[[], None]) -> None:
        """In a block of `write`: call ``act`` on this thread once the transaction has committed, if it does. It must
        not raise, since what was written stays."""
        self._thread.then.append(act)

    def upgrade(self) -> None:
        """Bring the schema to this version's. Safe to call from many processes at once; nothing is left half-done."""
        if self.is_sqlite:
            with self.write() as connection:
                _migrate(connection)
            # An earlier release left it readable by everybody.
            with suppress(OSError):
                close_to_others(Path(self._url.database or ""))
            return
        # A migration may run for longer than any statement of the service is allowed to.
        engine = sa.create_engine(self._url, poolclass=NullPool, connect_args=self._connect_args(limits=False))
        with self._errors(), engine.begin() as connection:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(MIGRATION_LOCK)))
            _migrate(connection)

    def check_schema(self) -> None:
        """Raises SchemaOutdated or SchemaNewer unless the schema is this version's."""
        head = migrations.HEAD
        found = self._revision()
        if found == head:
            return
        if found is None or found in _revisions():
            raise SchemaOutdated(
                f"the schema of {self.url} is at revision {found or 'none'}, this version of AgentState needs {head}: "
                "run `agentstate db upgrade`"
            )
        raise SchemaNewer(
            f"the schema of {self.url} is at revision {found}, which this version of AgentState (at {head}) does not "
            "know: upgrade AgentState, or point AGENTSTATE_DATABASE_URL at another database"
        )

    def check_writable(self) -> None:
        """Raises DatabaseUnreachable unless the database can be written to now. Writes nothing."""
        with self.write() as connection:
            if not self.is_sqlite and connection.exec_driver_sql("SHOW transaction_read_only").scalar() == "on":
                connection.invalidate()
                raise DatabaseUnreachable(self._read_only())

    def _read_only(self) -> str:
        return (
            f"{self.url} is read-only for now, as a standby or during a failover: try again, and name all hosts in "
            "AGENTSTATE_DATABASE_URL"
        )

    def _connect_args(self, *, limits: bool) -> dict[str, Any]:
        """What the driver is told besides the URL; with ``limits``, the limits of every statement too."""
        told: dict[str, Any] = {"connect_timeout": CONNECT_TIMEOUT_S, **self._address.connect_args}
        if limits:
            # Options of the URL come last, and win.
            own = dict(self._url.query).get("options", "")
            told["options"] = " ".join([*(f"-c {name}={value}" for name, value in POSTGRESQL_LIMITS.items()), str(own)])
        if self._address.pooled:
            told["prepare_threshold"] = None
        return told

    def _revision(self) -> str | None:
        """The revision of the schema; None when there is none yet."""
        # Before the first migration SQLite has no file, which a reader must not create.
        if self.is_sqlite and not Path(self._url.database or "").exists():
            return None
        with self.read() as connection:
            if not sa.inspect(connection).has_table(_VERSIONS.name):
                return None
            return connection.execute(sa.select(_VERSIONS.c.version_num)).scalar()

    def close(self) -> None:
        """Close the idle connections, after what was submitted. The object opens new ones if it is used again."""
        with self._starting:
            threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown()
        self._writer.dispose()
        self._reader.dispose()

    def _make_parent(self) -> None:
        file = Path(self._url.database or "").absolute()
        if file.exists() or file.name == ":memory:":
            return
        try:
            make_directory(file.parent)
        except OSError as error:
            raise DatabaseUnreachable(
                f"the directory {file.parent} of the SQLite database cannot be created: {error.strerror}; "
                "set AGENTSTATE_HOME or AGENTSTATE_DATABASE_URL"
            ) from error
        # SQLite gives the files beside it the same mode. If nothing can be made, it says what is wrong.
        with suppress(OSError):
            make_file(file)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what the driver raises into this package's errors, with one line that says what to do."""
        try:
            yield
        except PoolTimeout as error:
            raise DatabaseError(f"{self.url}: no connection became free in time; try again") from error
        except (OperationalError, InterfaceError) as error:
            reason = self._address.masked(" ".join(str(error.orig).split()))
            if _is_full(error.orig):
                raise DatabaseFull(f"{self.url}: {reason}; make room on its disk") from error
            # Without a statement the driver failed to connect; a locked file was reached all the same.
            unreached = error.statement is None and "locked" not in reason
            if unreached or error.connection_invalidated or "unable to open" in reason:
                hint = (
                    "check that its directory exists and is writable"
                    if self.is_sqlite
                    else "check that the server runs and that AGENTSTATE_DATABASE_URL is right"
                )
                raise DatabaseUnreachable(f"{self.url} cannot be reached: {reason}; {hint}") from error
            raise DatabaseError(f"{self.url}: {reason}") from error
        except DBAPIError as error:
            if error.connection_invalidated and _sqlstate(error.orig) == READ_ONLY:
                raise DatabaseUnreachable(self._read_only()) from error
            if error.connection_invalidated:
                reason = self._address.masked(str(error.orig))
                raise DatabaseUnreachable(f"{self.url}: the connection broke: {reason}") from error
            # SQLite raises the bare class for a file that is damaged or not a database.
            if type(error) is sa.exc.DatabaseError or _sqlstate(error.orig) == READ_ONLY:
                raise DatabaseError(f"{self.url}: {self._address.masked(str(error.orig))}") from error
            raise
        except InvalidRequestError as error:
            # The pool has connected anew, more than once, and found read-only servers only.
            if isinstance(error.__cause__ or error.__context__, DisconnectionError):
                raise DatabaseUnreachable(self._read_only()) from error
            raise


# Alembic is imported late: only migrations need it, and it takes as long as everything else here together.


def _migrate(connection: Connection) -> None:
    """Bring the schema to this version's, in the connection's transaction."""
    import alembic.command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_scripts_dir()))
    config.attributes["connection"] = connection
    alembic.command.upgrade(config, migrations.HEAD)


def _revisions() -> set[str]:
    """Every revision that this version knows."""
    from alembic.script import ScriptDirectory

    return {script.revision for script in ScriptDirectory(str(_scripts_dir())).walk_revisions()}


def _scripts_dir() -> Path:
    return Path(migrations.__file__).parent


def _sqlstate(error: BaseException | None) -> str | None:
    return getattr(error, "sqlstate", None)


def _is_full(error: BaseException | None) -> bool:
    # The low byte is the primary code.
    sqlite_code: int = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return sqlite_code == sqlite3.SQLITE_FULL or _sqlstate(error) == FULL


def _driver_of(connection: Connection) -> sqlite3.Connection:
    driver: sqlite3.Connection = connection.connection.driver_connection  # type: ignore[assignment]
    return driver


def _reads(connection: Connection) -> bool:
    return bool(connection.get_execution_options().get(SNAPSHOT))


def _configure_postgresql(engine: sa.Engine, where: address.Address) -> None:
    from psycopg import OperationalError as OperationalDriverError

    @sa.event.listens_for(engine, "handle_error")
    def on_error(context: ExceptionContext) -> None:
        # Not if the transaction itself is one for reading.
        reads = context.connection is not None and _reads(context.connection)
        if _sqlstate(context.original_exception) == READ_ONLY and not reads:
            context.is_disconnect = True  # with this connection goes the whole pool

    begin = {False: "BEGIN", True: "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"}
    pipelined.follow(engine, begin, _reads, prepares=not where.pooled)

    def has_spoken(connection: Any) -> bool:
        poll = select.poll()
        try:
            poll.register(connection.pgconn.socket, select.POLLIN)
        except OperationalDriverError:  # it has none any more
            return True
        return bool(poll.poll(0))

    @sa.event.listens_for(engine, "checkout")
    def on_checkout(connection: Any, record: Any, proxy: Any) -> None:
        # A new one has not been checked in yet.
        used_s = record.info.get("checked_in_s")
        if used_s is not None and (time.monotonic() - used_s > UNASKED_S or has_spoken(connection)):
            try:
                engine.dialect.do_ping(connection)
            except OperationalDriverError as error:
                raise InvalidatePoolError from error
        # With each answer, the server tells what it has become.
        if where.writable and any(connection.pgconn.parameter_status(sign) == b"on" for sign in READ_ONLY_SIGNS):
            raise InvalidatePoolError

    @sa.event.listens_for(engine, "checkin")
    def on_checkin(connection: Any, record: Any) -> None:
        record.info["checked_in_s"] = time.monotonic()

    if where.pooled:
        # Settings outlive the transaction there, and would apply to somebody else.
        setting = sa.select(*(sa.func.set_config(name, value, True) for name, value in POSTGRESQL_LIMITS.items()))

        @sa.event.listens_for(engine, "begin")
        def limit(connection: Connection) -> None:
            connection.execute(setting)


def _configure_sqlite(engine: sa.Engine, *, begin: str, read_only: bool) -> None:
    @sa.event.listens_for(engine, "connect")
    def on_connect(connection: Any, record: Any) -> None:
        # The driver must not start transactions by itself: it would begin them deferred, and a deferred transaction
        # that turns into a write fails at once where an immediate one waits.
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = NORMAL")
        if read_only:
            connection.execute("PRAGMA query_only = ON")
        else:
            _enter_wal(connection)

    @sa.event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        prepared.say(connection, begin)


def _enter_wal(connection: sqlite3.Connection) -> None:
    """Put the file into WAL mode, in which it then stays.

    Of several processes that open a new file at once some find it locked, and for this statement SQLite does not wait
    as ``busy_timeout`` says: where waiting could deadlock it answers busy at once, see
    https://www.sqlite.org/c3ref/busy_handler.html.
    """
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            # The low byte is the primary code; the others say which kind of busy.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
