"""A service whose PostgreSQL fails over to its standby, turns read-only for a while, or is behind a PgBouncer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import psycopg
import pytest
from postgres import PgBouncer, Server, server
from stage import MODEL, PATIENCE_S, Service, serving, until

from agentstate.errors import DatabaseError, DatabaseUnreachable
from agentstate.sessions.outcomes import SuspendReason
from agentstate.sessions.transcript import NewEntry
from agentstate.sessions.verbs import Sessions
from agentstate.settings import Settings
from agentstate.sql.database import Database
from agentstate.sql.models import EntryKind


@pytest.fixture
def primary() -> Iterator[Server]:
    started = server()
    yield started
    started.close()


@pytest.fixture
def standby(primary: Server) -> Iterator[Server]:
    started = primary.standby()
    yield started
    started.close()


def url(*hosts: Path, more: str = "") -> str:
    return f"postgresql+psycopg://postgres@/postgres?host={','.join(map(str, hosts))}{more}"


def migrated(database_url: str) -> None:
    database = Database(database_url)
    database.upgrade()
    database.close()


def ready(service: Service) -> bool:
    return service.http.get("/readyz").status_code == 200


class Writer(threading.Thread):
    """Appends numbered entries to a session, each until it is acknowledged; ``refusals`` are the answers before."""

    def __init__(self, service: Service):
        super().__init__()
        self._http = httpx.Client(base_url=service.base_url, timeout=PATIENCE_S)
        self.session_id = service.client.create_session(MODEL).id
        lease = service.client.resume(self.session_id, lease_ttl_s=3600).lease
        self._lease = {"token": lease.token, "epoch": lease.epoch}
        self.acknowledged = 0
        self.refusals: list[httpx.Response] = []
        self.wanted = 1_000_000

    def run(self) -> None:
        while self.acknowledged < self.wanted:
            entries = [{"kind": "message", "payload": {"number": self.acknowledged}}]
            answer = self._http.post(
                f"/v1/sessions/{self.session_id}/entries",
                json={"lease": self._lease, "entries": entries},
                headers={"Idempotency-Key": f"{self.session_id}-{self.acknowledged}"},
            )
            if answer.status_code == 201:
                self.acknowledged += 1
            else:
                self.refusals.append(answer)
                time.sleep(0.02)
        self._http.close()

    def wait_for(self, number: int) -> None:
        until(lambda: self.acknowledged >= number or not self.is_alive())
        assert self.acknowledged >= number


def test_a_failover_to_a_standby_loses_nothing_that_was_acknowledged(
    primary: Server, standby: Server, tmp_path: Path
) -> None:
    both = url(standby.directory, primary.directory)
    migrated(both)
    with serving(Settings(home=tmp_path, database_url=both)) as service:
        assert ready(service)
        writers = [Writer(service) for _ in range(3)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.wait_for(5)
        primary.stop()
        until(lambda: not ready(service))
        # While there is only a standby, nobody is told that it was written.
        for writer in writers:
            refused = len(writer.refusals)
            until(lambda writer=writer, refused=refused: len(writer.refusals) > refused)  # type: ignore[misc]
        standby.promote()
        standby.configure({"synchronous_standby_names": ""})
        until(lambda: ready(service))
        for writer in writers:
            writer.wanted = writer.acknowledged + 5
        for writer in writers:
            writer.join(PATIENCE_S)
            assert not writer.is_alive()
        for writer in writers:
            found = service.client.entries(writer.session_id, limit=1000).data
            assert [entry.payload["number"] for entry in found] == list(range(writer.acknowledged))
            for answer in writer.refusals:
                assert (answer.status_code, answer.json()["retryable"]) == (503, True), answer.text


def test_a_server_that_turns_read_only_is_left_and_found_again(primary: Server, tmp_path: Path) -> None:
    migrated(url(primary.directory))
    with serving(Settings(home=tmp_path, database_url=url(primary.directory))) as service:
        session_id = service.client.create_session(MODEL).id
        primary.configure({"default_transaction_read_only": "on"})
        until(lambda: not ready(service))
        for method, path, body in (
            ("POST", "/v1/sessions", {"model": MODEL}),
            ("POST", f"/v1/sessions/{session_id}/resume", {}),
        ):
            answer = service.http.request(method, path, json=body)
            assert (answer.status_code, answer.json()["retryable"]) == (503, True), answer.text
            assert answer.json()["type"] == "/problems/database-unreachable"
            assert "read-only" in answer.json()["detail"]
        primary.configure({"default_transaction_read_only": "off"})
        until(lambda: ready(service))
        assert service.client.resume(session_id).lease.epoch == 1


def test_nothing_is_read_from_a_server_that_has_become_read_only(primary: Server) -> None:
    """A standby may be behind, and never say so."""
    database = Database(url(primary.directory))

    def reads() -> bool:
        try:
            with database.read() as connection:
                return bool(connection.exec_driver_sql("SELECT true").scalar())
        except DatabaseUnreachable:
            return False

    try:
        assert reads()
        primary.configure({"default_transaction_read_only": "on"})
        until(lambda: not reads())
        primary.configure({"default_transaction_read_only": "off"})
        until(reads)
    finally:
        database.close()


def test_a_server_of_any_kind_is_ready_when_it_can_be_written_to(primary: Server, tmp_path: Path) -> None:
    """Where the URL says that the service connects to whatever there is."""
    migrated(url(primary.directory))
    any_server = url(primary.directory, more="&target_session_attrs=any")
    with serving(Settings(home=tmp_path, database_url=any_server)) as service:
        session_id = service.client.create_session(MODEL).id
        primary.configure({"default_transaction_read_only": "on"})
        until(lambda: not ready(service))
        assert service.client.read(session_id).id == session_id
        primary.configure({"default_transaction_read_only": "off"})
        until(lambda: ready(service))


def test_a_server_that_turns_read_only_under_a_transaction_is_unreachable(primary: Server) -> None:
    """Without the server's own word, as behind a proxy."""
    migrated(url(primary.directory))
    database = Database(url(primary.directory))
    try:
        with pytest.raises(DatabaseUnreachable, match="read-only"), database.write() as connection:
            first = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
            connection.exec_driver_sql("SET TRANSACTION READ ONLY")
            connection.exec_driver_sql("CREATE TABLE t (x int)")
        with database.write() as connection:
            assert connection.exec_driver_sql("SELECT pg_backend_pid()").scalar() != first
        with pytest.raises(DatabaseUnreachable, match="read-only"), database.write() as connection:
            connection.exec_driver_sql("SET TRANSACTION READ ONLY")
            database.check_writable()
        # A read that writes is a fault of ours, and nothing of the server's.
        with pytest.raises(DatabaseError) as error, database.read() as connection:
            connection.exec_driver_sql("CREATE TABLE t (x int)")
        assert not isinstance(error.value, DatabaseUnreachable)
    finally:
        database.close()


def test_behind_a_pgbouncer_in_transaction_mode_many_sessions_run_on_few_connections(primary: Server) -> None:
    with closing(PgBouncer(primary, connections=2)) as pooler:
        pooled = url(pooler.directory, more="&pgbouncer=true")
        migrated(pooled)
        database = Database(pooled)
        failures: list[BaseException] = []
        start = threading.Barrier(6)

        def work() -> None:
            sessions = Sessions(database, 10)
            start.wait()
            try:
                name = sessions.create(MODEL).id
                for number in range(8):
                    key = sessions.resume(name, lease_ttl_s=60, tail=5).lease.key
                    sessions.append(name, key, [NewEntry(EntryKind.MESSAGE, {"number": number})])
                    sessions.suspend(name, key, SuspendReason.USER_WAIT)
                    assert len(sessions.entries(name).entries) == number + 1
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        database.check_writable()
        for transaction in (database.read, database.write):
            with transaction() as connection:
                limits = [
                    connection.exec_driver_sql(f"SHOW {name}").scalar()
                    for name in ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
                ]
                assert limits == ["15s", "10s", "1min"]
        database.close()
        # A server's connection keeps none of it for whoever has it next.
        with psycopg.connect(
            host=str(pooler.directory), user="postgres", dbname="postgres", prepare_threshold=None
        ) as other:
            assert other.execute("SHOW statement_timeout").fetchone() == ("0",)
