from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, suppress
from typing import Any

import pytest
import sqlalchemy as sa

from agentstate.errors import DatabaseError, DatabaseUnreachable
from agentstate.sessions.verbs import Sessions
from agentstate.sql import pipelined
from agentstate.sql.database import Database, now_us
from agentstate.sql.models import sessions, settings
from agentstate.sql.prepared import Prepared

NAMED = Prepared(sa.select(sessions).where(sessions.c.name == sa.bindparam("called")))
PUT = Prepared(sa.insert(settings).values(updated_us=now_us()))
LONGER = Prepared(
    sa.update(settings)
    .where(settings.c.name == sa.bindparam("called"))
    .values(updated_us=settings.c.updated_us + 5)
    .returning(settings.c.value, settings.c.updated_us)
)
COUNT = Prepared(sa.select(sa.func.count().label("settings")).select_from(settings))


@pytest.fixture
def made(database: Database) -> Database:
    Sessions(database, 30.0).create("m", session_id="a", metadata={"of": ["two", 2]}, cache_salt="é")
    return database


def test_rows_are_what_sqlalchemy_makes_of_them(made: Database) -> None:
    with made.read() as connection:
        (found,) = NAMED.all(connection, {"called": "a"})
        row = connection.execute(sa.select(sessions)).one()
        assert found._mapping == dict(row._mapping)
        assert tuple(found) == tuple(row)
        assert {name: type(value) for name, value in found._mapping.items()} == {
            name: type(value) for name, value in row._mapping.items()
        }
        assert (found.cache_salt, found._mapping["metadata"]) == ("é", {"of": ["two", 2]})


def test_nothing_found_is_none(made: Database) -> None:
    with made.read() as connection:
        assert NAMED.all(connection, {"called": "b"}) == []
        assert NAMED.first(connection, {"called": "b"}) is None
        assert NAMED.scalar(connection, {"called": "b"}) is None


def test_it_writes_in_the_connections_transaction(database: Database) -> None:
    with pytest.raises(RuntimeError, match="broken"), database.write() as connection:
        assert PUT.all(connection, {"name": "x", "value": b"\0"}) == []
        assert COUNT.scalar(connection, {}) == 1
        raise RuntimeError("broken")
    with database.write() as connection:
        assert COUNT.scalar(connection, {}) == 0
        PUT.all(connection, {"name": "x", "value": b"\0"})
        before = connection.execute(sa.select(settings.c.updated_us)).scalar_one()
        assert LONGER.first(connection, {"called": "x"}) == (b"\0", before + 5)
    with database.read() as connection:
        assert COUNT.scalar(connection, {}) == 1


def test_its_errors_are_sqlalchemys_and_the_databases(database: Database) -> None:
    with pytest.raises(sa.exc.IntegrityError), database.write() as connection:
        PUT.all(connection, {"name": "x", "value": b"\0"})
        PUT.all(connection, {"name": "x", "value": b"\0"})
    # A reader cannot write, which is an error of the database's; the connection is good for the next.
    with pytest.raises(DatabaseError), database.read() as connection:
        PUT.all(connection, {"name": "x", "value": b"\0"})
    with database.write() as connection:
        assert COUNT.scalar(connection, {}) == 0


def test_a_broken_connection_is_not_used_again(postgresql: Any) -> None:
    with closing(Database(postgresql.create_database(postgresql.template))) as database:
        with pytest.raises(DatabaseUnreachable), database.write() as connection:
            pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
            postgresql.execute(f"SELECT pg_terminate_backend({pid}, 60000)")
            COUNT.scalar(connection, {})
        with database.write() as connection:
            assert COUNT.scalar(connection, {}) == 0


def test_who_watches_statements_sees_it(database: Database) -> None:
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)

    with database.write() as connection:
        COUNT.all(connection, {})
        sa.event.listen(sa.Engine, "before_cursor_execute", note)
        try:
            assert COUNT.scalar(connection, {}) == 0
            PUT.all(connection, {"name": "x", "value": b"\0"})
            assert LONGER.first(connection, {"called": "x"}).value == b"\0"
        finally:
            sa.event.remove(sa.Engine, "before_cursor_execute", note)
        assert [statement.split()[0] for statement in seen] == ["SELECT", "INSERT", "UPDATE"]


def test_what_is_sent_is_there_for_all_that_follows_it(database: Database) -> None:
    with database.write() as connection:
        PUT.send_each(connection, [{"name": name, "value": b"\0\xff"} for name in ("x", "y")])
        counted = COUNT.send(connection, {})
        PUT.send(connection, {"name": "z", "value": b""})
        longer = LONGER.send(connection, {"called": "z"})
        # What SQLAlchemy executes comes after it, too.
        assert connection.execute(sa.select(sa.func.count()).select_from(settings)).scalar_one() == 3
        assert counted.first().settings == 2
        assert longer.first().value == b"" and longer.first() == longer.all()[0]
        PUT.send(connection, {"name": "last", "value": b"1"})
    with database.read() as connection:
        assert COUNT.scalar(connection, {}) == 4


def test_what_is_sent_and_fails_fails_the_transaction(database: Database) -> None:
    with pytest.raises(sa.exc.IntegrityError), database.write() as connection:
        PUT.send_each(connection, [{"name": "x", "value": b""}, {"name": "x", "value": b""}])
    with pytest.raises(sa.exc.IntegrityError), database.write() as connection:
        PUT.send(connection, {"name": "y", "value": b""})
        PUT.send(connection, {"name": "y", "value": b""})
        COUNT.scalar(connection, {})
    with pytest.raises(RuntimeError, match="broken"), database.write() as connection:
        PUT.send(connection, {"name": "z", "value": b""})
        raise RuntimeError("broken")
    with database.write() as connection:
        assert COUNT.scalar(connection, {}) == 0
        PUT.all(connection, {"name": "x", "value": b"1"})
        assert LONGER.first(connection, {"called": "x"}).value == b"1", "what the server kept is prepared anew"


def test_a_commit_that_fails_costs_nobody_else_what_the_server_keeps(postgresql: Any) -> None:
    with closing(Database(postgresql.create_database(postgresql.template))) as database:
        with database.write() as connection:
            before = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
            assert COUNT.scalar(connection, {}) == 0
            for _ in range(8):  # so that psycopg has something kept, too
                connection.execute(sa.select(sa.func.count()).select_from(settings)).scalar_one()
        with pytest.raises(sa.exc.IntegrityError), database.write() as connection:
            PUT.send_each(connection, [{"name": "x", "value": b""}, {"name": "x", "value": b""}])
        with database.write() as connection:
            assert COUNT.scalar(connection, {}) == 0
            assert connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one() == before


def put_again(connection: sa.Connection) -> None:
    PUT.all(connection, {"name": "x", "value": b""})


def divide_by_zero(connection: sa.Connection) -> None:
    connection.exec_driver_sql("SELECT 1 / 0")


@pytest.mark.parametrize("fail", [put_again, divide_by_zero])
def test_what_has_failed_is_not_committed_whoever_passes_over_the_error(
    postgresql: Any, fail: Callable[[sa.Connection], None]
) -> None:
    with closing(Database(postgresql.create_database(postgresql.template))) as database:
        with pytest.raises(sa.exc.InternalError, match="cannot be committed"), database.write() as connection:
            PUT.all(connection, {"name": "x", "value": b""})
            with suppress(sa.exc.DBAPIError):
                fail(connection)
        with database.write() as connection:
            assert COUNT.scalar(connection, {}) == 0


def test_what_was_not_carried_out_has_no_rows(postgresql: Any) -> None:
    with closing(Database(postgresql.create_database(postgresql.template))) as database:
        with pytest.raises(RuntimeError, match="broken"), database.write() as connection:
            unsent = COUNT.send(connection, {})
            raise RuntimeError("broken")
        with pytest.raises(sa.exc.IntegrityError), database.write() as connection:
            PUT.send_each(connection, [{"name": "x", "value": b""}, {"name": "x", "value": b""}])
            skipped = COUNT.send(connection, {})
        for sent in (unsent, skipped):
            with pytest.raises(sa.exc.InvalidRequestError, match="not carried out"):
                sent.first()


@pytest.mark.parametrize("name", ["nul\0", "half\ud800"], ids=["nul", "surrogate"])
def test_what_cannot_be_stored_is_refused_and_the_connection_stays(postgresql: Any, name: str) -> None:
    with closing(Database(postgresql.create_database(postgresql.template))) as database:
        with database.write() as connection:
            before = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        with pytest.raises((sa.exc.DataError, sa.exc.StatementError)), database.write() as connection:
            PUT.send(connection, {"name": name, "value": b""})
        with database.write() as connection:
            assert COUNT.scalar(connection, {}) == 0
            assert connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one() == before


def test_statements_that_wait_travel_together(postgresql: Any) -> None:
    with closing(Database(postgresql.create_database(postgresql.template))) as database:
        with database.write() as connection:
            pipeline = pipelined.of(connection)
            assert pipeline is not None
            assert COUNT.scalar(connection, {}) == 0
            trips: list[int] = []
            exchange = pipeline._exchange

            def counted(pgconn: Any, sent: Any) -> Any:
                trips.append(len(sent))
                return exchange(pgconn, sent)

            pipeline._exchange = counted  # type: ignore[method-assign]
            PUT.send(connection, {"name": "x", "value": b""})
            first, second = LONGER.send(connection, {"called": "x"}), COUNT.send(connection, {})
            assert (first.first().value, second.first().settings) == (b"", 1)
            assert trips == [3]
            PUT.send(connection, {"name": "y", "value": b""})
        assert trips == [3, 2], "what waits goes with the commit"


def test_a_list_is_refused(database: Database) -> None:
    several = Prepared(sa.select(settings).where(settings.c.name.in_(sa.bindparam("names", expanding=True))))
    with database.read() as connection, pytest.raises(ValueError, match="list"):
        several.all(connection, {"names": ["x"]})


def test_a_statement_that_is_not_kept_is_sent_whole(postgresql: Any) -> None:
    once = Prepared(sa.select(sa.func.count().label("settings")).select_from(settings), kept=False)
    kept = "SELECT count(*) FROM pg_prepared_statements WHERE NOT from_sql"
    url = postgresql.create_database(postgresql.template)
    with closing(Database(url)) as database, database.write() as connection:
        before = connection.exec_driver_sql(kept).scalar_one()
        assert once.scalar(connection, {}) == 0
        assert connection.exec_driver_sql(kept).scalar_one() == before
        assert COUNT.scalar(connection, {}) == 0
        assert connection.exec_driver_sql(kept).scalar_one() == before + 1
