"""A service of two workers, as processes: whatever worker a request comes to, it sees what the other one has done."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from stage import MODEL, PATIENCE_S, Peer, register, stored, until
from test_server import ROOT, START_S, await_end, process, state_of, workers_of

from agentstate.cli.local import free_port
from agentstate.fleet.engines import Engine
from agentstate.lookahead.forecast import Forecast
from agentstate.sessions import tenants
from agentstate.sessions.tenants import Role
from agentstate.sql.database import Database

ON_ONE_DATABASE = pytest.mark.parametrize("backend", ["sqlite"])
STAT = {"ok": True, "off": None, "store": {"pages": 4}}


class Two:
    """The service, and clients of which each has a connection to one of its workers."""

    def __init__(self, service: subprocess.Popen[bytes], base_url: str, database: Database):
        self.process = service
        self.base_url = base_url
        self.database = database

    @property
    def workers(self) -> list[int]:
        return workers_of(self.process)

    @contextmanager
    def at(self, worker: int) -> Iterator[httpx.Client]:
        """A client with one connection, which this worker has accepted because the others could not."""
        one = httpx.Limits(max_connections=1, keepalive_expiry=None)
        with httpx.Client(base_url=self.base_url, timeout=PATIENCE_S, limits=one) as client:
            others = [other for other in self.workers if other != worker]
            for other in others:
                os.kill(other, signal.SIGSTOP)
            try:
                until(lambda: all(state_of(other) == "T" for other in others))
                client.get("/healthz").raise_for_status()
            finally:
                for other in others:
                    os.kill(other, signal.SIGCONT)
            yield client

    @contextmanager
    def each(self) -> Iterator[list[httpx.Client]]:
        with ExitStack() as stack:
            yield [stack.enter_context(self.at(worker)) for worker in self.workers]

    def kill(self, worker: int) -> None:
        """Kill a worker, and wait until its successor is there."""
        os.kill(worker, signal.SIGKILL)
        until(lambda: worker not in self.workers and len(self.workers) == 2)

    def counted(self, name: str, **labels: str) -> float:
        text = httpx.get(f"{self.base_url}/metrics", timeout=PATIENCE_S).raise_for_status().text
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return sum(
            sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items()
        )


@contextmanager
def serving_two(tmp_path: Path, database_url: str, **variables: str) -> Iterator[Two]:
    port, database = free_port(), Database(database_url)
    settings = {
        "AGENTSTATE_HOME": str(tmp_path),
        "AGENTSTATE_DATABASE_URL": database_url,
        "AGENTSTATE_PORT": str(port),
        "AGENTSTATE_WORKERS": "2",
        "AGENTSTATE_ENGINE_TIMEOUT_S": "3600",
        **variables,
    }
    try:
        with process(tmp_path / "log", **settings) as service:
            two = Two(service, f"http://127.0.0.1:{port}", database)
            left = two.workers
            try:
                yield two
            finally:
                left = [*left, *two.workers] if service.poll() is None else left
                service.terminate()
                service.wait(START_S)
                for worker in left:
                    await_end(worker)
    finally:
        database.close()


@pytest.fixture
def two(tmp_path: Path, database_url: str) -> Iterator[Two]:
    with serving_two(tmp_path, database_url) as two:
        yield two


def post(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.is_success, response.text
    return dict(response.json())


def resume(client: httpx.Client, session: str) -> dict[str, Any]:
    return proof(post(client, f"/v1/sessions/{session}/resume"))


def proof(turn: dict[str, Any]) -> dict[str, Any]:
    return {"token": turn["lease"]["token"], "epoch": turn["lease"]["epoch"]}


def engine_of(two: Two, start_peer: Any, answer: Callable[[dict[str, Any]], Any]) -> tuple[Peer, Engine]:
    peer: Peer = start_peer(answer)
    return peer, register(two.database, peer.address)


def answering(request: dict[str, Any]) -> dict[str, Any]:
    return STAT if request["verb"] == "stat" else stored("durable")


# --- turns


def test_a_turn_may_go_on_at_the_other_worker(two: Two) -> None:
    with two.each() as (one, other):
        post(one, "/v1/sessions", model=MODEL, id="s")
        lease = resume(other, "s")
        assert one.post("/v1/sessions/s/resume", json={}).status_code == 409
        post(one, "/v1/sessions/s/entries", lease=lease, entries=[{"kind": "note", "payload": {"text": "a"}}])
        assert [entry["seq"] for entry in other.get("/v1/sessions/s/entries").json()["data"]] == [1]
        waiting: list[dict[str, Any]] = []
        waiter = threading.Thread(
            target=lambda: waiting.append(post(one, "/v1/sessions/s/resume", on_busy="wait", busy_timeout_ms=30_000))
        )
        waiter.start()
        post(other, "/v1/sessions/s/suspend", lease=lease, reason="user_wait")
        waiter.join(PATIENCE_S)
        assert waiting[0]["lease"]["epoch"] == lease["epoch"] + 1
        key = {"Idempotency-Key": "k"}
        first, again = (
            client.post("/v1/sessions", json={"model": MODEL}, headers=key).json()["id"] for client in (one, other)
        )
        assert first == again
        with other.stream("GET", "/v1/sessions/s/events") as stream:
            lines = stream.iter_lines()
            assert next(line for line in lines if line.startswith("event: session"))
            post(one, "/v1/sessions/s/suspend", lease=proof(waiting[0]), reason="user_wait")
            assert next(line for line in lines if line.startswith("event: session")), "the other one did it"


# --- death and end


def test_a_worker_that_dies_is_started_again_and_nothing_else_ends(two: Two, tmp_path: Path) -> None:
    first, second = two.workers
    with two.at(first) as one, two.at(second) as other:
        post(one, "/v1/sessions", model=MODEL, id="s")
        answered = two.counted("agentstate_request_seconds_count", route="/v1/sessions")
        two.kill(first)
        assert other.get("/v1/sessions/s").status_code == 200, "the other one's connection is there still"
        assert two.counted("agentstate_request_seconds_count", route="/v1/sessions") >= answered
    (successor,) = set(two.workers) - {second}
    with two.at(successor) as one:
        assert one.get("/v1/sessions/s").status_code == 200
    log = next(line for line in (tmp_path / "log").read_text().splitlines() if "started again" in line)
    assert "worker 1 " in log and "SIGKILL" in log


@ON_ONE_DATABASE
def test_told_to_stop_both_finish_their_requests(two: Two) -> None:
    got: dict[int, list[str]] = {}

    def watch(number: int, client: httpx.Client, watching: threading.Event) -> None:
        with client.stream("GET", "/v1/sessions/s/events") as stream:
            for line in stream.iter_lines():
                got.setdefault(number, []).append(line)
                if line.startswith("event: session"):
                    watching.set()

    with two.each() as clients:
        post(clients[0], "/v1/sessions", model=MODEL, id="s")
        watching = [threading.Event() for _ in clients]
        watchers = [
            threading.Thread(target=watch, args=(number, client, watching[number]))
            for number, client in enumerate(clients)
        ]
        for watcher in watchers:
            watcher.start()
        assert all(event.wait(PATIENCE_S) for event in watching)
        two.process.terminate()
        for watcher in watchers:
            watcher.join(PATIENCE_S)
        assert two.process.wait(START_S) == 0
        assert set(got) == {0, 1}, "each stream ended, and none broke"


@ON_ONE_DATABASE
def test_workers_end_with_a_process_that_is_killed(tmp_path: Path, database_url: str) -> None:
    (temporary := tmp_path / "temporary").mkdir()
    with serving_two(tmp_path, database_url, TMPDIR=str(temporary)) as two:
        assert two.counted("agentstate_leases") == 0 and list(temporary.iterdir())
        left = two.workers
        two.process.kill()
        for worker in left:
            await_end(worker)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{two.base_url}/healthz")
        assert not list(temporary.iterdir()), "nothing of it is left behind"


def test_a_service_whose_workers_cannot_start_ends_and_says_so() -> None:
    program = """
import socket
from agentstate.errors import SettingsError
from agentstate.api.workers import Supervisor
def serve(worker): raise SettingsError("there is no such place")
Supervisor(2, serve, socket.socket()).run()
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert ended.returncode != 0
    assert "there is no such place" in ended.stderr and "no worker of the service could start" in ended.stderr


def test_a_worker_that_goes_on_dying_is_started_again_and_again(tmp_path: Path) -> None:
    """Its third life has the service stopped."""
    program = """
import os, signal, socket, sys, time
from pathlib import Path
from agentstate.api.workers import Supervisor
lives = Path(sys.argv[1])
def serve(worker):
    worker.started()
    if not worker.is_first:
        time.sleep(3600)  # until it is told to stop
    with lives.open("a") as written:
        written.write(f"{worker.number}\\n")
    if len(lives.read_text().split()) == 3:
        os.kill(os.getppid(), signal.SIGTERM)
    os._exit(7)
Supervisor(2, serve, socket.socket()).run()
"""
    lives = tmp_path / "lives"
    ended = subprocess.run(
        [sys.executable, "-c", program, str(lives)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert lives.read_text().split()[:3] == ["1"] * 3
    assert "ended with status 7 and is started again" in ended.stderr


def test_a_successor_that_there_is_no_memory_for_comes_later(tmp_path: Path) -> None:
    """And the other worker goes on meanwhile."""
    program = """
import errno, os, signal, socket, sys, time
from pathlib import Path
from agentstate.api.workers import Supervisor
lives, forked, failures = Path(sys.argv[1]), os.fork, [errno.ENOMEM, errno.EAGAIN]
def fork():
    if lives.exists() and failures:
        raise OSError(failures[0], os.strerror(failures.pop(0)))
    return forked()
os.fork = fork
def serve(worker):
    worker.started()
    if worker.is_first:
        time.sleep(3600)  # until it is told to stop
    with lives.open("a") as written:
        written.write(f"{os.getppid()}\\n")
    if len(lives.read_text().split()) == 2:
        os.kill(os.getppid(), signal.SIGTERM)
    os._exit(7)
Supervisor(2, serve, socket.socket()).run()
"""
    lives = tmp_path / "lives"
    ended = subprocess.run(
        [sys.executable, "-c", program, str(lives)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert len(lives.read_text().split()) >= 2
    assert ended.stderr.count("worker 2 is not started for now") == 2
    assert "worker 1" not in ended.stderr


def test_what_a_dead_worker_followed_has_failed_and_what_others_follow_has_not(two: Two, start_peer: Any) -> None:
    engine_of(two, start_peer, lambda request: stored("pending"))
    first, second = two.workers
    with two.at(first) as one, two.at(second) as other:
        operations = []
        for name, client in (("a", one), ("b", other)):
            post(client, "/v1/sessions", model=MODEL, id=name)
            lease = resume(client, name)
            ended = post(client, f"/v1/sessions/{name}/suspend", lease=lease, reason="user_wait", durable_timeout_ms=0)
            operations.append(ended["operation"])
        two.kill(first)
        until(lambda: other.get(f"/v1/operations/{operations[0]}").json()["state"] == "failed")
        assert other.get(f"/v1/operations/{operations[1]}").json()["state"] in ("pending", "running")


# --- what is counted and limited


def test_metrics_are_of_both_whichever_answers(two: Two) -> None:
    with two.each() as clients:
        post(clients[0], "/v1/sessions", model=MODEL, id="s")
        for client in clients:
            for _ in range(3):
                assert client.get("/v1/sessions/s").status_code == 200
        for client in clients:
            # A request is counted once it is answered.
            until(lambda client=client: requests_counted(client) == [6.0])
            assert 'agentstate_sessions{status="idle"} 1.0' in client.get("/metrics").text


def requests_counted(client: httpx.Client) -> list[float]:
    """How many requests about one session there were, by method and status."""
    return [
        float(line.rpartition(" ")[2])
        for line in client.get("/metrics").text.splitlines()
        if line.startswith("agentstate_request_seconds_count") and '"/v1/sessions/{session_id}"' in line
    ]


@ON_ONE_DATABASE
def test_a_tenants_rate_is_one_of_both(tmp_path: Path, database_url: str) -> None:
    with (
        serving_two(tmp_path, database_url, AGENTSTATE_REQUESTS_PER_S="0.001") as two,
        two.each() as (one, other),
    ):
        assert one.get("/v1/sessions").status_code == 200
        assert other.get("/v1/sessions").status_code == 429


# --- who may do what


def test_a_key_ends_at_both_and_its_role_holds_at_both(two: Two) -> None:
    with two.database.write() as connection:
        secret = tenants.create_key(connection, "mine", role=Role.VIEWER).secret
        (key,) = tenants.list_keys(connection)
    headers = {"Authorization": f"Bearer {secret}"}

    def writes(client: httpx.Client) -> int:
        return client.post("/v1/sessions", json={"model": MODEL}, headers=headers).status_code

    with two.each() as clients:
        for client in clients:
            assert client.get("/v1/sessions", headers=headers).status_code == 200
            assert writes(client) == 403
        with two.database.write() as connection:
            tenants.set_role(connection, key.id, Role.OPERATOR)
        for client in clients:
            until(lambda client=client: writes(client) == 201)
        with two.database.write() as connection:
            tenants.revoke_key(connection, key.id)
        for client in clients:
            until(lambda client=client: writes(client) == 401)
            assert client.get("/v1/sessions").status_code == 401, "nor is anybody admitted without one"


def test_the_console_is_one(two: Two, start_peer: Any) -> None:
    _, engine = engine_of(two, start_peer, answering)
    with two.database.write() as connection:
        made = tenants.create_key(connection, "mine", role=Role.ADMIN)
    same = {"Sec-Fetch-Site": "same-origin"}
    with two.each() as (one, other):
        form = one.get("/sign-in")
        (token,) = re.findall(r'name="csrf" value="([0-9a-f]+)"', form.text)
        other.cookies = form.cookies
        done = other.post("/sign-in", data={"key": made.secret, "csrf": token}, headers=same)
        assert done.status_code == 303, "the form of one is taken by the other"
        one.cookies = other.cookies = done.cookies
        for client in (one, other):
            page = client.get("/")
            assert page.status_code == 200 and engine.base_url.split("/")[2] in page.text
        with other.stream("GET", "/console/stream") as stream:
            lines = stream.iter_lines()
            assert next(line for line in lines if line.startswith("event: news"))
            (token,) = set(re.findall(r'name="csrf" value="([0-9a-f]+)"', one.get("/").text))
            assert one.post("/sign-out", data={"csrf": token}, headers=same).status_code == 303
            assert next(line for line in lines if line.startswith("event: signed-out"))


# --- what engines are told


def test_engines_are_told_in_order_whichever_worker_hears_of_it(two: Two, start_peer: Any) -> None:
    peer, engine = engine_of(two, start_peer, answering)
    with two.each() as (one, other):
        for client in (one, other):
            assert [found["id"] for found in client.get("/v1/engines").json()["data"]] == [engine.id]
            assert client.get("/readyz").json()["engine"] == {"ok": True, "detail": "1 live"}
        post(one, "/v1/sessions", model=MODEL, id="s")
        for first, second in ((one, other), (other, one)):
            lease = resume(first, "s")
            post(second, "/v1/sessions/s/suspend", lease=lease, reason="user_wait")
            until(lambda: len(peer.told) == 1)
            (notice,) = peer.told
            assert (notice["verb"], notice["kind"]) == ("foresee", "person")
            assert Forecast.unpack(notice["forecast"]).by(86_000) > 0.5
            peer.told.clear()
        # The turn that ended one wait began at the other worker than the one in which the wait had begun.
        until(lambda: two.counted("agentstate_forecast_waits_total", kind="person") == 1)
        until(lambda: two.counted("agentstate_notices_total", state="accepted") == 2)


def test_engines_are_told_after_the_worker_that_tells_them_died(two: Two, start_peer: Any) -> None:
    peer, _ = engine_of(two, start_peer, answering)
    first, second = two.workers
    with two.at(second) as other:
        post(other, "/v1/sessions", model=MODEL, id="s")
        lease = resume(other, "s")
        os.kill(first, signal.SIGKILL)
        post(other, "/v1/sessions/s/suspend", lease=lease, reason="user_wait")
        until(lambda: [notice["verb"] for notice in peer.told] == ["foresee"])
