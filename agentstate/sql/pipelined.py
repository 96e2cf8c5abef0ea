"""Statements on their way to PostgreSQL: those that need not be answered at once wait for the next one, and go with it.

A round trip costs more than what most statements do, most of all where many threads write: each of them wakes up for
every answer. A transaction's ``BEGIN`` goes with its first statement, and its ``COMMIT`` with what is still to be sent.

Used below SQLAlchemy, by `agentstate.sql.prepared`, on connections that begin no transactions by themselves (in
autocommit mode): `follow` makes an engine's connections so. Whatever else is executed on one goes after what waits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from itertools import count
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

_KEY = "agentstate_pipeline"
_numbers = count(1)


class Statement:
    """A statement as the server takes it, with ``$1`` for its first parameter."""

    def __init__(self, text: str, *, prepared: bool = True):
        self.text = text
        self.command = text.encode()
        self.name = b"agentstate_%d" % next(_numbers) if prepared else b""


class Waiting:
    """A statement with its values and their formats, and then its rows: None until it was sent."""

    def __init__(self, statement: Statement, values: Sequence[bytes | None] = (), formats: Sequence[int] = ()):
        self.statement = statement
        self.values = values
        self.formats = formats
        self.rows: Sequence[Any] | None = None


_COMMIT = Statement("COMMIT", prepared=False)
_ROLLBACK = Statement("ROLLBACK", prepared=False)
_OPEN, _FAILED = 2, 3  # libpq's statuses of a transaction
NOT_KEPT = "26000"  # SQLSTATE of a name that no statement has


class Pipeline:
    """What waits to be sent over one connection of psycopg's. If it ``prepares``, the server keeps the statements."""

    def __init__(self, driver: Any, prepares: bool):
        from psycopg import generators
        from psycopg.adapt import Transformer

        self._driver = driver
        self._prepares = prepares
        self._encoding = driver.info.encoding
        self._generators = generators
        self._loader = Transformer(driver)
        self._kept: set[bytes] = set()
        self._waiting: list[Waiting] = []
        self._begun = True

    def begin(self, statement: Statement) -> None:
        """Begin a transaction with the next statement."""
        self._waiting = [Waiting(statement)]
        self._begun = False

    def add(self, statement: Statement, parameters: Sequence[Any]) -> Waiting:
        """Have a statement wait. Raises psycopg's DataError, UnicodeEncodeError, TypeError for what cannot be sent."""
        self._waiting.append(found := Waiting(statement, *self._packed(parameters)))
        return found

    def commit(self) -> None:
        """Commit with what still waits. Without any, it is the driver's to commit. If that fails, roll back: after a
        commit SQLAlchemy does not, and psycopg would have the server forget all statements that it keeps."""
        if self._begun and self._driver.info.transaction_status == _FAILED:
            from psycopg.errors import InFailedSqlTransaction

            self.rollback()
            # The server would roll back, and call it no error.
            raise InFailedSqlTransaction("a statement of the transaction has failed: it cannot be committed")
        if len(self._waiting) == (0 if self._begun else 1):
            self._waiting = []  # nothing has begun
            return
        self._waiting.append(Waiting(_COMMIT))
        try:
            self.flush()
        except BaseException:
            self.rollback()
            raise

    def rollback(self) -> None:
        """Roll back, if something has begun."""
        self._waiting = []
        if self._begun and self._driver.info.transaction_status in (_OPEN, _FAILED):
            self._waiting = [Waiting(_ROLLBACK)]
            self.flush()

    def flush(self) -> None:
        """Send what waits, and read all answers. Raises psycopg's error for the first statement that fails; the server
        ignores those after it."""
        sent, self._waiting, self._begun = self._waiting, [], True
        if not sent:
            return
        driver, pgconn = self._driver, self._driver.pgconn
        with driver.lock:
            pgconn.enter_pipeline_mode()
            try:
                answers = driver.wait(self._exchange(pgconn, sent))
                pgconn.exit_pipeline_mode()
            except BaseException:
                driver.close()  # nobody knows which answers are still to come
                raise
        error = self._read(answers)
        if error is not None:
            raise error

    def _exchange(self, pgconn: Any, sent: Sequence[Waiting]) -> Generator[Any, Any, list[tuple[Any, Any]]]:
        """Answers, each with what it is to: a `Waiting`, or the name of a statement that is now kept."""
        asked: list[Any] = []
        for one in sent:
            statement, values, formats = one.statement, one.values, one.formats
            if not (self._prepares and statement.name):
                pgconn.send_query_params(statement.command, values, param_formats=formats)
            else:
                if statement.name not in self._kept and statement.name not in asked:
                    pgconn.send_prepare(statement.name, statement.command)
                    asked.append(statement.name)
                pgconn.send_query_prepared(statement.name, values, param_formats=formats)
            asked.append(one)
        pgconn.pipeline_sync()
        asked.append(None)
        yield from self._generators.send(pgconn)
        answers = []
        for what in asked:
            results = yield from self._generators.fetch_many(pgconn)
            answers.append((what, results[-1]))
        return answers

    def _read(self, answers: Sequence[tuple[Any, Any]]) -> Exception | None:
        """Keeps what the answers say, and gives back the first error among them."""
        from psycopg import errors, pq

        error: errors.Error | None = None
        for what, result in answers:
            if result.status == pq.ExecStatus.FATAL_ERROR:
                error = error or errors.error_from_result(result, self._encoding)
                if error.sqlstate == NOT_KEPT:
                    self._kept.clear()
            elif result.status == pq.ExecStatus.TUPLES_OK:
                self._loader.set_pgresult(result)
                what.rows = self._loader.load_rows(0, result.ntuples, tuple)
            elif result.status == pq.ExecStatus.COMMAND_OK:
                if isinstance(what, bytes):
                    self._kept.add(what)
                else:
                    what.rows = ()
        self._loader.set_pgresult(None)  # it would keep the last one
        return error

    def _packed(self, parameters: Sequence[Any]) -> tuple[list[bytes | None], list[int]]:
        """Values and their formats: 0 for text, 1 for bytes as they are."""
        from psycopg import Binary, DataError
        from psycopg.types.json import Json

        values: list[bytes | None] = []
        formats: list[int] = []
        for value in parameters:
            form = 0
            packed: bytes | None
            if isinstance(value, Binary):
                value = value.obj
            if value is None:
                packed = None
            elif isinstance(value, str):
                packed = value.encode(self._encoding)
                if 0 in packed:
                    raise DataError("PostgreSQL text fields cannot contain NUL (0x00) bytes")
            elif isinstance(value, bool):
                packed = b"t" if value else b"f"
            elif isinstance(value, int):
                packed = b"%d" % value
            elif isinstance(value, float):
                packed = repr(value).encode()
            elif isinstance(value, bytes | bytearray | memoryview):
                packed, form = bytes(value), 1
            elif isinstance(value, Json):
                packed = json.dumps(value.obj).encode()
            else:
                raise TypeError(f"a prepared statement cannot have a {type(value).__name__} as a parameter")
            values.append(packed)
            formats.append(form)
        return values, formats


def of(connection: Connection) -> Pipeline | None:
    """The pipeline of a connection; None if its statements are sent one by one."""
    try:
        found: Pipeline | None = connection.info.get(_KEY)
    except NotImplementedError:  # SQLAlchemy asks the server what it is
        return None
    return found


def flush(connection: Connection, pipeline: Pipeline, statement: Statement) -> None:
    """Send what waits, to the last ``statement``. Raises what SQLAlchemy raises."""
    _reported(connection, pipeline.flush, statement)


def follow(
    engine: sa.Engine, begin: Mapping[bool, str], is_reader: Callable[[Connection], bool], *, prepares: bool
) -> None:
    """Have an engine's connections begin transactions with a statement of ``begin``, by whether ``is_reader`` says that
    they read, together with what comes next."""
    statements = {reads: Statement(text, prepared=False) for reads, text in begin.items()}

    @sa.event.listens_for(engine, "connect")
    def on_connect(driver: Any, record: Any) -> None:
        driver.autocommit = True
        record.info[_KEY] = Pipeline(driver, prepares)

    @sa.event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        if (pipeline := of(connection)) is not None:
            pipeline.begin(statements[is_reader(connection)])

    @sa.event.listens_for(engine, "commit")
    def on_commit(connection: Connection) -> None:
        if (pipeline := of(connection)) is not None:
            _reported(connection, pipeline.commit, _COMMIT)

    @sa.event.listens_for(engine, "rollback")
    def on_rollback(connection: Connection) -> None:
        if not connection.invalidated and not connection.closed and (pipeline := of(connection)) is not None:
            _reported(connection, pipeline.rollback, _ROLLBACK)

    def first(cursor: Any, statement: Any, parameters: Any, context: Any) -> None:
        connection = context.root_connection
        if (pipeline := of(connection)) is not None:
            pipeline.flush()

    for name in ("do_execute", "do_executemany"):
        sa.event.listen(engine, name, first)
    sa.event.listen(
        engine, "do_execute_no_params", lambda cursor, statement, context: first(cursor, statement, None, context)
    )


def _reported(connection: Connection, act: Callable[[], None], statement: Statement) -> None:
    try:
        act()
    except BaseException as error:
        # It also sees to the pool, if the connection has broken.
        connection._handle_dbapi_exception(error, statement.text, (), None, None)
