"""Kill -9 of the service in the middle of every kind of write: what was acknowledged is there when it is back, and
nothing is there half."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from postgres import PgBouncer, server
from stage import MODEL, PATIENCE_S
from test_server import await_end, last_workers_of, process, workers_of

from agentstate.cli.local import free_port
from agentstate.settings import Settings
from agentstate.sql.database import Database

ROUNDS = 4
CLIENTS = 4


class Agent:
    """Does every kind of write, one after the other, and notes what was acknowledged."""

    def __init__(self, base_url: str, name: str):
        self.name = name
        self.http = httpx.Client(base_url=base_url, timeout=PATIENCE_S)
        self.number = 0
        self.notes: dict[str, list[str]] = {}  # session -> tags of acknowledged appends, two by two
        self.finished: set[tuple[str, str]] = set()
        self.forks: dict[str, tuple[str, int]] = {}
        self.deleted: set[str] = set()
        self.doubtful: set[str] = set()  # a write to it was not answered
        self.session = ""

    def send(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        self.doubtful.add(self.session)
        response = self.http.request(method, path, **request)
        self.doubtful.discard(self.session)
        assert response.status_code < 500, response.text
        response.raise_for_status()
        return dict(response.json()) if response.content else {}

    def live(self) -> None:
        while True:
            self.number += 1
            self.session = f"{self.name}-{self.number}"
            path = f"/v1/sessions/{self.session}"
            any_view = {"If-Match": "*"}
            self.send("POST", "/v1/sessions", json={"model": MODEL, "id": self.session})
            self.notes[self.session] = []
            turn = self.send("POST", f"{path}/resume", json={}, headers={"Idempotency-Key": f"r-{self.session}"})
            lease = {"token": turn["lease"]["token"], "epoch": turn["lease"]["epoch"]}
            first = ""
            for step in range(3):
                tags = [f"{step}.a", f"{step}.b"]
                entries = [{"kind": "note", "payload": {"tag": tag}} for tag in tags]
                appended = self.send("POST", f"{path}/entries", json={"lease": lease, "entries": entries})
                first = first or appended["last_id"]
                self.notes[self.session] += tags
            self.send("PUT", f"{path}/tool-calls/c", json={"lease": lease, "name": "t"})
            self.send("PUT", f"{path}/tool-calls/c/result", json={"lease": lease, "output": 1})
            self.finished.add((self.session, "c"))
            self.send("POST", f"{path}/lease/renew", json={"lease": lease})
            self.send("POST", f"{path}/suspend", json={"lease": lease, "reason": "done"})
            self.send("POST", f"{path}/forks", json={"at": first, "id": f"{self.session}-fork"}, headers=any_view)
            self.forks[f"{self.session}-fork"] = (self.session, 2)
            self.send("PATCH", path, json={"metadata": {"done": True}}, headers=any_view)
            if self.number % 3 == 0:
                self.send("DELETE", path, headers=any_view)
                self.deleted.add(self.session)

    def run(self) -> None:
        with suppress(httpx.TransportError):  # the service was killed
            self.live()


@pytest.mark.timeout(1200)
def test_nothing_acknowledged_is_lost_and_nothing_is_half_there(database_url: str, tmp_path: Path) -> None:
    killed_again_and_again(database_url, tmp_path, [free_port()], lambda round_number: None)


@pytest.mark.timeout(1200)
def test_nor_where_one_of_two_workers_is_killed(database_url: str, tmp_path: Path) -> None:
    killed_again_and_again(database_url, tmp_path, [free_port()], lambda round_number: None, workers=2)


@pytest.mark.timeout(1200)
def test_nor_with_two_services_behind_a_pgbouncer_over_a_failover(tmp_path: Path) -> None:
    with (
        closing(server()) as primary,
        closing(primary.standby()) as standby,
        closing(PgBouncer(primary, 6)) as pooler,
    ):

        def fail_over(round_number: int) -> None:
            """After the services were killed, with whatever they had begun."""
            if round_number == ROUNDS // 2:
                primary.stop()
                standby.promote()
                standby.configure({"synchronous_standby_names": ""})
                pooler.point_to(standby)

        url = f"postgresql+psycopg://postgres@/postgres?host={pooler.directory}&pgbouncer=true"
        database = Database(url)
        database.upgrade()
        database.close()
        killed_again_and_again(url, tmp_path, [free_port(), free_port()], fail_over)


def killed_again_and_again(
    database_url: str, tmp_path: Path, ports: Sequence[int], then: Callable[[int], None], workers: int = 1
) -> None:
    """In each round services at ``ports`` are killed in the middle of what agents do; ``then`` something happens. Of
    several ``workers`` of a service one is killed before: what the others acknowledge is there as well."""
    log = tmp_path / "log"
    variables = {
        "AGENTSTATE_HOME": str(tmp_path),
        "AGENTSTATE_DATABASE_URL": database_url,
        "AGENTSTATE_COLLECT_INTERVAL_S": "0.2",
        "AGENTSTATE_WORKERS": str(workers),
        "TMPDIR": str(tmp_path),  # who is killed leaves something there
    }
    agents: list[Agent] = []
    dice = random.Random(11)
    for round_number in range(ROUNDS):
        with ExitStack() as running:
            services = [running.enter_context(process(log, AGENTSTATE_PORT=str(port), **variables)) for port in ports]
            crew = [
                Agent(f"http://127.0.0.1:{ports[number % len(ports)]}", f"r{round_number}a{number}")
                for number in range(CLIENTS)
            ]
            threads = [threading.Thread(target=agent.run) for agent in crew]
            for thread in threads:
                thread.start()
            while any(len(agent.notes) < 2 for agent in crew):
                assert all(thread.is_alive() for thread in threads)
                time.sleep(0.01)
            time.sleep(dice.random())
            killed = [dice.choice(workers_of(service)) for service in services] if workers > 1 else []
            for worker in killed:
                os.kill(worker, signal.SIGKILL)
            if killed:
                late = Agent(f"http://127.0.0.1:{ports[0]}", f"r{round_number}late")
                threads.append(threading.Thread(target=late.run))
                threads[-1].start()
                crew.append(late)
                while len(late.notes) < 2:
                    assert threads[-1].is_alive(), "a worker that lives, or the successor, goes on"
                    time.sleep(0.01)
            left = [worker for service in services for worker in last_workers_of(service)] if workers > 1 else []
            for service in services:
                service.kill()
            for worker in left:
                with suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
            for service in services:
                service.wait()
            for worker in left:
                await_end(worker)
            for thread in threads:
                thread.join()
            agents += crew
        then(round_number)
    assert sum(len(agent.notes) for agent in agents) >= 3 * ROUNDS, "there was something to lose"
    port = ports[0]
    with (
        process(log, AGENTSTATE_PORT=str(port), **variables),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as http,
    ):
        for agent in agents:
            for session, tags in agent.notes.items():
                read = http.get(f"/v1/sessions/{session}")
                if session in agent.deleted:
                    assert read.status_code == 404
                    continue
                if read.status_code == 404:
                    assert session in agent.doubtful, "it was not deleted, and is gone"
                    continue
                entries = http.get(f"/v1/sessions/{session}/entries", params={"limit": 1000}).json()["data"]
                stored = [entry["payload"]["tag"] for entry in entries if entry["kind"] == "note"]
                assert stored[: len(tags)] == tags
                extra = stored[len(tags) :]
                assert len(extra) in ((0, 2) if session in agent.doubtful else (0,)), "an append is whole or not there"
                assert [entry["seq"] for entry in entries] == list(range(1, len(entries) + 1))
                assert read.json()["head_id"] == (entries[-1]["id"] if entries else None)
                calls = [entry["kind"] for entry in entries if entry["kind"] != "note"]
                assert calls in ([], ["tool_call"], ["tool_call", "tool_result"])
                if (session, "c") in agent.finished:
                    assert calls == ["tool_call", "tool_result"]
            for fork, (_, length) in agent.forks.items():
                entries = http.get(f"/v1/sessions/{fork}/entries").json()["data"]
                assert [entry["seq"] for entry in entries] == list(range(1, length + 1))
    database = Database(Settings(home=tmp_path, database_url=database_url).sqlalchemy_url)
    try:
        if database.is_sqlite:
            with database.read() as connection:
                assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
                assert connection.exec_driver_sql("PRAGMA foreign_key_check").all() == []
    finally:
        database.close()
