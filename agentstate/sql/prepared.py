"""Statements that every request runs, on the database's driver itself.

SQLAlchemy's way from a statement to its rows serves any statement, and takes several times as long as SQLite itself:
most of all on a core that has done something else meanwhile, as between two requests, so that little of it is cached. A
`Prepared` is written like any statement, and compiled once.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.sql.base import Executable

_Process = Callable[[Any], Any]


class Prepared:
    """Runs ``statement`` in the transaction of a connection, with values for its parameters: always the same ones. It
    must have no parameter that expands to a list. Rows have the columns' names as attributes, and ``_mapping``. Raises
    what SQLAlchemy raises.
    """

    def __init__(self, statement: Executable):
        self._statement: Any = statement
        self._compiled: dict[str, _Compiled] = {}

    def all(self, connection: Connection, values: Mapping[str, Any]) -> list[Any]:
        compiled = self._compiled.get(connection.dialect.name)
        if compiled is None:
            compiled = _Compiled(self._statement, connection.dialect, list(values))
            self._compiled[connection.dialect.name] = compiled
        return compiled.run(connection, values)

    def first(self, connection: Connection, values: Mapping[str, Any]) -> Any:
        """The first row; None if there is none."""
        rows = self.all(connection, values)
        return rows[0] if rows else None

    def scalar(self, connection: Connection, values: Mapping[str, Any]) -> Any:
        """The first column of the first row; None if there is none."""
        rows = self.all(connection, values)
        return rows[0][0] if rows else None


class _Compiled:
    """A statement as a dialect's driver takes it."""

    def __init__(self, statement: Any, dialect: Dialect, names: Sequence[str]):
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
        results = (column.type.dialect_impl(dialect).result_processor(dialect, None) for column in columns)
        self._read: list[tuple[int, _Process]] = [(at, act) for at, act in enumerate(results) if act is not None]

    def run(self, connection: Connection, values: Mapping[str, Any]) -> list[Any]:
        given = {**self._constants, **values}
        for name, act in self._bound:
            given[name] = act(given[name])
        parameters: Any = given if self._positions is None else tuple([given[name] for name in self._positions])
        if connection.dispatch.before_cursor_execute:  # somebody watches statements
            result = connection.exec_driver_sql(self._text, parameters)
            raw: Sequence[Any] = result.fetchall() if result.returns_rows else ()
        else:
            raw = self._on_driver(connection, parameters)
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

    def _on_driver(self, connection: Connection, parameters: Any) -> Sequence[Any]:
        cursor = connection.connection.cursor()
        try:
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


def begin(connection: Connection, statement: str) -> None:
    """Begin a transaction with a statement of its own, in an event listener."""
    try:
        connection.connection.cursor().execute(statement).close()
    except BaseException as error:
        connection._handle_dbapi_exception(error, statement, (), None, None)
