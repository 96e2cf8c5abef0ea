from __future__ import annotations

import threading
from contextlib import closing
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from agentstate import ids
from agentstate.errors import DatabaseError, DatabaseUnreachable, SettingsError
from agentstate.sql import database as sql_database
from agentstate.sql.database import Database, instant, now_us
from agentstate.sql.models import operations


def insert_operation(connection: sa.Connection) -> None:
    connection.execute(
        sa.insert(operations).values(
            id=ids.new("op"), kind="flush", session_id="s", state="done", owner="test", created_us=now_us()
        )
    )


def count(database: Database) -> int:
    with database.read() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(operations)).scalar_one()


def test_a_write_is_there_once_its_block_has_ended(database: Database) -> None:
    with database.write() as connection:
        insert_operation(connection)
    assert count(database) == 1


def test_a_block_that_raises_leaves_nothing_behind(database: Database) -> None:
    with pytest.raises(RuntimeError, match="broken"), database.write() as connection:
        insert_operation(connection)
        raise RuntimeError("broken")
    assert count(database) == 0


def test_what_is_to_be_done_once_it_is_committed_is_done_then_and_only_then(database: Database) -> None:
    done: list[int] = []
    with database.write() as connection:
        with database.write():
            database.once_committed(lambda: done.append(count(database)))
        insert_operation(connection)
        assert done == []
    assert done == [1]
    with pytest.raises(RuntimeError, match="broken"), database.write() as connection:
        database.once_committed(lambda: done.append(2))
        raise RuntimeError("broken")
    with database.write():
        pass
    assert done == [1]


def test_what_is_submitted_runs_in_the_callers_context_and_raises_there(database: Database) -> None:
    asked = ContextVar("asked", default="")

    def write() -> str:
        with database.write() as connection:
            insert_operation(connection)
        return asked.get()

    asked.set("me")
    assert database.submit(write).result(60) == "me"
    assert count(database) == 1

    def broken() -> None:
        with database.write() as connection:
            insert_operation(connection)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        database.submit(broken).result(60)
    assert count(database) == 1
    last = database.submit(write)
    database.close()
    assert last.done() and count(database) == 2, "what was submitted is done before it is closed"
    assert database.submit(write).result(60) == "me", "it opens again"


def test_what_waits_for_too_long_to_write_is_not_written(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    threads = 1 if database.is_sqlite else 2 * sql_database.POOL_SIZE
    begun = threading.Barrier(threads + 1)

    def busy() -> bool:
        begun.wait(60)
        return gate.wait(60)

    before = [database.submit(busy) for _ in range(threads)]
    begun.wait(60)
    monkeypatch.setattr(sql_database, "BUSY_TIMEOUT_S", -1)
    late = database.submit(lambda: pytest.fail("it ran"))
    gate.set()
    with pytest.raises(DatabaseError, match="try again"):
        late.result(60)
    assert all(one.result(60) for one in before)


def test_the_clock_is_the_databases_in_whole_microseconds(database: Database) -> None:
    with database.read() as connection:
        first = connection.execute(sa.select(now_us())).scalar_one()
        second = connection.execute(sa.select(now_us())).scalar_one()
    assert isinstance(first, int)
    assert first <= second
    assert instant(first).year >= 2025
    assert instant(first).utcoffset() is not None


def test_writers_of_many_processes_wait_for_each_other(database_url: str) -> None:
    """Each thread has a `Database` of its own, as separate processes have."""
    start = threading.Barrier(6)
    failures: list[BaseException] = []

    def write() -> None:
        own = Database(database_url)
        try:
            start.wait()
            for _ in range(15):
                with own.write() as connection:
                    count = connection.execute(sa.select(sa.func.count()).select_from(operations)).scalar_one()
                    assert count >= 0
                    insert_operation(connection)
        except BaseException as error:
            failures.append(error)
        finally:
            own.close()

    threads = [threading.Thread(target=write) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    database = Database(database_url)
    assert count(database) == 6 * 15
    database.close()


def test_threads_of_one_process_write_and_read_at_once(database: Database) -> None:
    def work() -> None:
        for _ in range(10):
            with database.write() as connection:
                insert_operation(connection)
            assert count(database) > 0

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count(database) == 80


def test_a_reader_sees_one_state_while_others_write(database: Database) -> None:
    query = sa.select(sa.func.count()).select_from(operations)
    with database.read() as reader:
        assert reader.execute(query).scalar_one() == 0
        with database.write() as writer:
            insert_operation(writer)
        assert reader.execute(query).scalar_one() == 0
    assert count(database) == 1


def test_a_reader_cannot_write(database: Database) -> None:
    with pytest.raises(DatabaseError, match="read-?only"), database.read() as connection:
        insert_operation(connection)
    with database.write() as connection:
        insert_operation(connection)


def test_sqlite_keeps_its_promises(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'new' / 'a.db'}")
    with database.write() as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "foreign_keys", "synchronous", "busy_timeout")
        }
    assert found == {"journal_mode": "wal", "foreign_keys": 1, "synchronous": 1, "busy_timeout": 10_000}


def test_many_processes_open_a_new_file_at_once(tmp_path: Path) -> None:
    """Turning WAL on is a statement for which SQLite does not wait by itself."""
    for attempt in range(20):
        url = f"sqlite:///{tmp_path / f'{attempt}.db'}"
        start = threading.Barrier(4)
        failures: list[BaseException] = []

        def write(url: str, start: threading.Barrier, failures: list[BaseException]) -> None:
            database = Database(url)
            start.wait()
            try:
                with database.write() as connection:
                    connection.execute(sa.text("CREATE TABLE IF NOT EXISTS t (x INTEGER)"))
            except BaseException as error:
                failures.append(error)
            database.close()

        threads = [threading.Thread(target=write, args=(url, start, failures)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []


def test_a_directory_that_cannot_be_made_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    database = Database(f"sqlite:///{tmp_path / 'file' / 'agentstate.db'}")
    with pytest.raises(DatabaseUnreachable, match="AGENTSTATE_HOME") as error:
        database.upgrade()
    assert str(tmp_path / "file") in str(error.value)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.db").write_bytes(b"this is not a database" * 100)
    database = Database(f"sqlite:///{tmp_path / 'a.db'}")
    with pytest.raises(DatabaseError, match="not a database"):
        database.check_schema()


def test_a_server_that_does_not_answer_is_named_without_its_password() -> None:
    database = Database("postgresql+psycopg://ada:hunter2@127.0.0.1:1/agents")
    with pytest.raises(DatabaseUnreachable, match="AGENTSTATE_DATABASE_URL") as error:
        database.check_schema()
    assert "127.0.0.1:1/agents" in str(error.value)
    assert "hunter2" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "url", ["agents", "mysql://db/agents", "postgresql+asyncpg://db/agents", "sqlite://", "sqlite:///:memory:"]
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="AGENTSTATE_DATABASE_URL"):
        Database(url)


def test_a_block_within_another_is_part_of_its_transaction(database: Database) -> None:
    with pytest.raises(RuntimeError, match="broken"), database.write() as outer:
        with database.write() as inner:
            assert inner is outer
            insert_operation(inner)
        raise RuntimeError("broken")
    assert count(database) == 0
    with database.write() as connection:
        insert_operation(connection)
    assert count(database) == 1


def test_a_statement_of_postgresql_that_waits_for_a_lock_gives_up(postgresql: Any) -> None:
    database = Database(postgresql.create_database(postgresql.template))
    with database.read() as connection:
        found = {
            name: connection.exec_driver_sql(f"SHOW {name}").scalar()
            for name in ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
        }
    assert found == {
        "statement_timeout": "15s",
        "lock_timeout": "10s",
        "idle_in_transaction_session_timeout": "1min",
    }
    database.close()


@pytest.mark.parametrize("unasked_s", [0.0, 3600.0])
def test_a_connection_that_broke_while_it_was_idle_is_replaced(
    postgresql: Any, monkeypatch: pytest.MonkeyPatch, unasked_s: float
) -> None:
    monkeypatch.setattr("agentstate.sql.database.UNASKED_S", unasked_s)
    with closing(Database(postgresql.create_database(postgresql.template))) as database:
        for attempt in (database.read, database.write):
            with attempt() as connection:
                pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
            postgresql.execute(f"SELECT pg_terminate_backend({pid}, 60000)")
            with attempt() as connection:
                assert connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one() != pid


def test_a_connection_that_was_used_a_moment_ago_is_not_asked(postgresql: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentstate.sql.database.UNASKED_S", 3600.0)
    with closing(Database(postgresql.create_database(postgresql.template))) as database:
        pings: list[Any] = []
        monkeypatch.setattr(database._writer.dialect, "do_ping", pings.append)
        for _ in range(3):
            with database.write() as connection:
                insert_operation(connection)
        assert pings == []
        assert count(database) == 3
