"""Statements that every request runs, on the database's driver itself.

SQLAlchemy's way from a statement to its rows serves any statement, and takes several times as long as SQLite itself:
most of all on a core that has done something else meanwhile, as between two requests, so that little of it is cached. A
`Prepared` is written like any statement, and compiled once.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.sql.base import Executable

from agentstate.sql import pipelined

_Process = Callable[[Any], Any]
FLOAT8 = 701  # PostgreSQL's number of what a Float is stored as


class Prepared:
    """Runs ``statement`` in the transaction of a connection, with values for its parameters: always the same ones. It
    must have no parameter that expands to a list. Rows have the columns' names as attributes, and ``_mapping``. Raises
    what SQLAlchemy raises. PostgreSQL keeps it, parsed, as long as each connection lives, unless ``kept`` is False.
    """

    def __init__(self, statement: Executable, *, kept: bool = True):
        self._statement: Any = statement
        self._kept = kept
        self._compiled: dict[str, _Compiled] = {}

    def send(self, connection: Connection, values: Mapping[str, Any]) -> Sent:
        """Run it now or, where that saves a round trip, with the next statement or the commit, which then raises what
        this one would."""
        return self._compiled_for(connection, values).send(connection, values)

    def send_each(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send it once for each of the ``rows`` of values. What it returns is not read."""
        if rows:
            self._compiled_for(connection, rows[0]).send_each(connection, rows)

    def all(self, connection: Connection, values: Mapping[str, Any]) -> list[Any]:
        return self._compiled_for(connection, values).send(connection, values).all()

    def first(self, connection: Connection, values: Mapping[str, Any]) -> Any:
        """The first row; None if there is none."""
        return self.send(connection, values).first()

    def scalar(self, connection: Connection, values: Mapping[str, Any]) -> Any:
        """The first column of the first row; None if there is none."""
        row = self.first(connection, values)
        return None if row is None else row[0]

    def _compiled_for(self, connection: Connection, values: Mapping[str, Any]) -> _Compiled:
        compiled = self._compiled.get(connection.dialect.name)
        if compiled is None:
            compiled = _Compiled(self._statement, connection.dialect, list(values), self._kept)
            self._compiled[connection.dialect.name] = compiled
        return compiled


class Sent:
    """The rows of a statement that was sent. Whoever asks for them waits."""

    def __init__(self, read: Callable[[], list[Any]]):
        self._read = read

    def all(self) -> list[Any]:
        return self._read()

    def first(self) -> Any:
        """The first row; None if there is none."""
        rows = self._read()
        return rows[0] if rows else None


class _Compiled:
    """A statement as a dialect's driver takes it."""

    def __init__(self, statement: Any, dialect: Dialect, names: Sequence[str], kept: bool):
        compiled: Any = statement.compile(dialect=dialect, column_keys=list(names))
        self._text = str(compiled)
        self._positions: list[str] | None = compiled.positiontup
        binds = {compiled.bind_names[bind]: bind for bind in compiled.binds.values()}
        if any(bind.expanding for bind in binds.values()):
            raise ValueError("a prepared statement cannot have a list as a parameter")
        processes = {name: bind.type.dialect_impl(dialect).bind_processor(dialect) for name, bind in binds.items()}
        self._bound: list[tuple[str, _Process]] = [(name, act) for name, act in processes.items() if act is not None]
        self._constants = {name: value for name, value in compiled.params.items() if name not in names}
        for name, act in self._bound:
            if name in self._constants:
                self._constants[name] = act(self._constants[name])
        self._bound = [(name, act) for name, act in self._bound if name not in self._constants]
        columns = statement.exported_columns if statement.is_select or statement.is_dml else ()
        self._row: Any = _row_type([column.key for column in columns]) if len(columns) else None
        results = (
            column.type.dialect_impl(dialect).result_processor(
                dialect, FLOAT8 if isinstance(column.type, sa.Float) else None
            )
            for column in columns
        )
        self._read: list[tuple[int, _Process]] = [(at, act) for at, act in enumerate(results) if act is not None]
        if dialect.name == "postgresql":
            # As the server takes it, not the driver.
            kind: Any = type(dialect)
            numbered: Any = statement.compile(dialect=kind(paramstyle="numeric_dollar"), column_keys=list(names))
            self._numbered = pipelined.Statement(str(numbered), prepared=kept)
            self._order: list[str] = numbered.positiontup or []

    def send(self, connection: Connection, values: Mapping[str, Any]) -> Sent:
        given = self._given(values)
        if connection.dispatch.before_cursor_execute:  # somebody watches statements
            result = connection.exec_driver_sql(self._text, self._parameters(given))
            rows = self._rows(result.fetchall() if result.returns_rows else ())
            return Sent(lambda: rows)
        pipeline = pipelined.of(connection)
        if pipeline is None:
            rows = self._rows(self._on_driver(connection, self._parameters(given)))
            return Sent(lambda: rows)
        waiting = self._add(connection, pipeline, given)

        def read() -> list[Any]:
            if waiting.rows is None:
                pipelined.flush(connection, pipeline, self._numbered)
            if waiting.rows is None:  # the transaction has ended, or has failed before
                raise sa.exc.InvalidRequestError("this statement was not carried out")
            return self._rows(waiting.rows)

        return Sent(read)

    def send_each(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        pipeline = pipelined.of(connection)
        if connection.dispatch.before_cursor_execute:
            connection.exec_driver_sql(self._text, [self._parameters(self._given(values)) for values in rows])
        elif pipeline is not None:
            for values in rows:
                self._add(connection, pipeline, self._given(values))
        else:
            self._on_driver(connection, [self._parameters(self._given(values)) for values in rows], many=True)

    def _given(self, values: Mapping[str, Any]) -> dict[str, Any]:
        given = {**self._constants, **values}
        for name, act in self._bound:
            given[name] = act(given[name])
        return given

    def _parameters(self, given: dict[str, Any]) -> Any:
        return given if self._positions is None else tuple([given[name] for name in self._positions])

    def _add(self, connection: Connection, pipeline: pipelined.Pipeline, given: Mapping[str, Any]) -> pipelined.Waiting:
        try:
            return pipeline.add(self._numbered, [given[name] for name in self._order])
        except BaseException as error:
            connection._handle_dbapi_exception(error, self._text, (), None, None)

    def _rows(self, raw: Sequence[Any]) -> list[Any]:
        if self._row is None:
            return []
        if not self._read:
            return [self._row(*row) for row in raw]
        rows = []
        for row in raw:
            read = list(row)
            for at, act in self._read:
                read[at] = act(read[at])
            rows.append(self._row(*read))
        return rows

    def _on_driver(self, connection: Connection, parameters: Any, *, many: bool = False) -> Sequence[Any]:
        cursor = connection.connection.cursor()
        try:
            if many:
                cursor.executemany(self._text, parameters)
            else:
                cursor.execute(self._text, parameters)
            raw: Sequence[Any] = cursor.fetchall() if self._row is not None else ()
        except BaseException as error:
            # It also sees to the pool, if the connection has broken, and closes the cursor.
            connection._handle_dbapi_exception(error, self._text, parameters, cursor, None)
        cursor.close()
        return raw


def _row_type(names: Sequence[str]) -> Any:
    class Row(namedtuple("Row", names)):  # type: ignore[misc]  # noqa: PYI024 - its fields are the statement's
        __slots__ = ()

        @property
        def _mapping(self) -> dict[str, Any]:
            mapping: dict[str, Any] = self._asdict()
            return mapping

    return Row


def say(connection: Connection, statement: str) -> None:
    """Run a statement that controls the transaction, such as ``BEGIN``: SQLAlchemy is not told of it."""
    try:
        connection.connection.cursor().execute(statement).close()
    except BaseException as error:
        connection._handle_dbapi_exception(error, statement, (), None, None)
