"""The service as a process: how it starts, what it refuses, and what a crash leaves."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from stage import MODEL, register, stored

from agentstate.api import server
from agentstate.api.server import run
from agentstate.cli.local import free_port
from agentstate.client import Client
from agentstate.errors import DatabaseUnreachable, ServiceUnreachable, SettingsError
from agentstate.settings import Settings
from agentstate.sql.database import Database
from agentstate.sql.models import OperationState

ROOT = Path(__file__).parents[2]
PROGRAM = "from agentstate.settings import Settings; from agentstate.api.server import run; run(Settings())"
START_S = 300


@contextmanager
def process(log: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A service of its own process, ready to serve; ended hard if it still runs."""
    with log.open("ab") as output:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
        started = subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + START_S
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{variables['AGENTSTATE_PORT']}/readyz").raise_for_status()
                break
            except httpx.HTTPError:
                assert started.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
        yield started
    finally:
        started.kill()
        started.wait()


def workers_of(service: subprocess.Popen[bytes]) -> list[int]:
    """The processes of a service's workers, the oldest first."""
    return [int(pid) for pid in Path(f"/proc/{service.pid}/task/{service.pid}/children").read_text().split()]


def last_workers_of(service: subprocess.Popen[bytes]) -> list[int]:
    """The same, and the service is stopped first: it starts no others until it goes on, or is killed."""
    service.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + START_S
    while state_of(service.pid) != "T":
        assert time.monotonic() < deadline, "the service goes on"
        time.sleep(0.001)
    return workers_of(service)


def await_end(pid: int) -> None:
    """Wait until a process that is not this one's child has ended."""
    deadline = time.monotonic() + START_S
    while state_of(pid) not in ("Z", None):
        assert time.monotonic() < deadline, f"process {pid} goes on"
        time.sleep(0.02)


def state_of(pid: int) -> str | None:
    """What a process does, as Linux says it: ``Z``, it has ended; ``T``, it was stopped. None: there is none."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return None


def test_a_service_starts_from_nothing_says_where_it_is_and_stops_when_told(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    home = tmp_path / "new" / "home"
    with process(log, AGENTSTATE_HOME=str(home), AGENTSTATE_PORT=str(port)) as service:
        service.terminate()
        assert service.wait(START_S) in (0, -15)
    (line,) = log.read_text().splitlines()
    for part in (
        f"AgentState listens on http://127.0.0.1:{port}",
        f"sqlite:///{home}/agentstate.db",
        f"pages in {home}/pages",
        "loopback only, because there is no API key",
    ):
        assert part in line


@pytest.mark.parametrize("of_query", [False, True], ids=["before the host", "query parameter"])
def test_a_password_is_masked(tmp_path: Path, postgresql: Any, of_query: bool) -> None:
    port, log = free_port(), tmp_path / "log"
    url = postgresql.create_database(postgresql.template)
    url = f"{url}&password=hunter2" if of_query else url.replace("postgres:@", "postgres:hunter2@")
    assert "hunter2" in url
    with process(log, AGENTSTATE_DATABASE_URL=url, AGENTSTATE_PORT=str(port)):
        pass
    assert "AgentState listens" in log.read_text()
    assert "hunter2" not in log.read_text()


def test_an_operation_of_a_killed_service_has_failed_when_it_is_back(tmp_path: Path, start_peer: Any) -> None:
    port, log = free_port(), tmp_path / "log"
    variables = {"AGENTSTATE_HOME": str(tmp_path), "AGENTSTATE_PORT": str(port)}
    base_url = f"http://127.0.0.1:{port}"
    with process(log, **variables) as service, Client(base_url) as client:
        database = Database(Settings(home=tmp_path).sqlalchemy_url)
        register(database, start_peer(lambda request: stored("pending")).address)
        database.close()
        session = client.create_session(MODEL)
        turn = client.resume(session.id)
        operation_id = client.suspend(session.id, turn.lease, durable_timeout_ms=0).operation
        assert operation_id is not None
        assert client.operation(operation_id).state in (OperationState.PENDING, OperationState.RUNNING)
        service.kill()
        service.wait()
        with pytest.raises(ServiceUnreachable, match=str(port)):
            client.operation(operation_id)
    with process(log, **variables), Client(base_url) as client:
        operation = client.operation(operation_id)
        assert operation.state is OperationState.FAILED
        assert operation.result is not None
        assert "the service ended" in operation.result["error"]
        assert client.resume(session.id).lease.epoch == turn.lease.epoch + 1


def test_a_full_collection_passes_over_what_a_service_is_started_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the garbage collector looks through all objects, no request goes on."""
    left: list[int] = []
    monkeypatch.setattr(server.Server, "run", lambda *_, **__: left.append(len(gc.get_objects())))
    before = len(gc.get_objects())
    monkeypatch.setattr(server, "configure_logging", lambda settings: None)
    try:
        run(Settings(home=tmp_path / "home", port=0))
    finally:
        gc.unfreeze()
    assert left[0] < before / 10


def test_a_port_in_use_is_named_with_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"port {port} .*AGENTSTATE_PORT"):
            run(Settings(home=tmp_path / "home", port=port))
    assert not (tmp_path / "home").exists(), "nothing is made for a service that does not start"


def test_a_host_that_is_not_this_machine_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"192\.0\.2\.1"):
        run(Settings(home=tmp_path, host="192.0.2.1", port=0))
    with pytest.raises(SettingsError, match="no.such.host"):
        run(Settings(home=tmp_path, host="no.such.host.invalid", port=0))


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DatabaseUnreachable, match="AGENTSTATE_HOME"):
        run(Settings(home=tmp_path / "file" / "home", port=0))


def test_a_database_server_that_is_down_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatabaseUnreachable, match="127.0.0.1:1/agents"):
        run(Settings(home=tmp_path, database_url="postgresql://ada:hunter2@127.0.0.1:1/agents", port=0))


def test_streams_are_closed_and_requests_are_finished_when_a_service_is_told_to_stop(
    tmp_path: Path, start_peer: Any
) -> None:
    port, log = free_port(), tmp_path / "log"
    variables = {"AGENTSTATE_HOME": str(tmp_path), "AGENTSTATE_PORT": str(port), "AGENTSTATE_LOG_FORMAT": "json"}
    base_url = f"http://127.0.0.1:{port}"
    with process(log, **variables) as service, Client(base_url) as client:
        client.create_session(MODEL, id="mine")
        got: list[str] = []
        with httpx.stream("GET", f"{base_url}/v1/sessions/mine/events", timeout=START_S) as stream:
            for line in stream.iter_lines():
                got.append(line)
                if line.startswith("event: session"):
                    service.terminate()
        assert "event: session" in got
        assert service.wait(START_S) in (0, -15)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    watched = next(line for line in lines if line.get("route") == "/v1/sessions/{session_id}/events")
    assert (watched["status"], watched["session_id"], watched["level"]) == (200, "mine", "info")
    assert watched["request_id"].startswith("req_")


def test_traces_go_to_the_collector_that_is_configured(tmp_path: Path) -> None:
    received: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    port = free_port()
    variables = {
        "AGENTSTATE_HOME": str(tmp_path),
        "AGENTSTATE_PORT": str(port),
        "AGENTSTATE_OTLP_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
    }
    try:
        with process(tmp_path / "log", **variables) as service, Client(f"http://127.0.0.1:{port}") as client:
            client.create_session(MODEL, id="mine")
            client.read("mine")
            service.terminate()
            service.wait(START_S)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert b"GET /v1/sessions/{session_id}" in b"".join(received)
