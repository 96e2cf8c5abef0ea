"""Many processes that want one session: some lose their lease, some are killed, and the transcript stays whole.

``AGENTSTATE_TEST_CONCURRENCY_S`` is how long they go on, on each database.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import pytest
from postgres import PgBouncer, server
from stage import MODEL, PATIENCE_S, Service
from test_server import process

from agentstate.cli.local import free_port
from agentstate.client import Client
from agentstate.sql.database import Database

SECONDS = float(os.environ.get("AGENTSTATE_TEST_CONCURRENCY_S", "6"))
WRITERS = 16
WORKER = Path(__file__).with_name("worker.py")


def records_of(logs: list[Path]) -> list[dict[str, Any]]:
    """What the writers have said; the last line of one that was killed may lack its end."""
    return [json.loads(line) for log in logs for line in log.read_text().splitlines(keepends=True) if line[-1] == "\n"]


def seen_enough(logs: list[Path]) -> bool:
    records = records_of(logs)
    appended = [record for record in records if "appended" in record]
    return len(appended) >= 20 and len(records) > len(appended) and len({one["epoch"] for one in appended}) >= 3


class Writers:
    """Processes that all want to run one session, over the services at ``ports``."""

    def __init__(self, directory: Path, ports: Sequence[int], session_id: str):
        self.logs = [directory / f"{number}.log" for number in range(WRITERS)]
        self.killed = 0
        self._end = directory / "end"
        self._ports = ",".join(map(str, ports))
        self._session_id = session_id
        self._dice = random.Random(7)
        self._processes = [self._start(number) for number in range(WRITERS)]
        while not all(log.exists() for log in self.logs):
            time.sleep(0.05)

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        # -S -E: nothing is needed but the standard library, and sixteen interpreters start at once.
        command = [sys.executable, "-S", "-E", str(WORKER), self._ports, self._session_id]
        return subprocess.Popen([*command, str(self.logs[number]), str(self._end)], stderr=subprocess.PIPE)

    def kill_one(self) -> None:
        victim = self._dice.randrange(WRITERS)
        self._processes[victim].kill()
        self._processes[victim].wait()
        self.killed += 1
        self._processes[victim] = self._start(victim)

    def appended(self) -> int:
        return sum("appended" in record for record in records_of(self.logs))

    def end(self) -> None:
        self._end.touch()
        for writer in self._processes:
            _, errors = writer.communicate()
            assert writer.returncode == 0, errors.decode()


def assert_whole(client: Client, session_id: str, records: list[dict[str, Any]]) -> None:
    """Nothing that was acknowledged is lost or there twice, one process at a time held the lease, and no tool ran
    twice."""
    acknowledged = [tag for record in records for tag in record.get("appended", ())]
    executed = Counter(record["executed"] for record in records if "executed" in record)
    entries = []
    after = None
    while True:
        page = client.entries(session_id, after=after, limit=1000)
        entries += page.data
        after = page.last_id
        if not page.has_more:
            break
    stored = [entry.payload["tag"] for entry in entries if entry.kind == "note"]
    assert len(acknowledged) >= 20, "they did get to write"
    assert len(set(acknowledged)) == len(acknowledged)
    assert set(acknowledged) <= set(stored), "nothing that was acknowledged is lost"
    assert len(set(stored)) == len(stored), "nothing is there twice"
    assert [entry.seq for entry in entries] == list(range(1, len(entries) + 1)), "no gaps"
    assert [entry.parent_id for entry in entries[1:]] == [entry.id for entry in entries[:-1]]
    # One holder at a time: the epochs of what was appended only grow, and each belongs to one process.
    epochs = [entry.payload["epoch"] for entry in entries if entry.kind == "note"]
    assert epochs == sorted(epochs)
    holders: dict[int, set[str]] = {}
    for entry in entries:
        if entry.kind == "note":
            holders.setdefault(entry.payload["epoch"], set()).add(entry.payload["tag"].partition(".")[0])
    assert all(len(processes) == 1 for processes in holders.values())
    assert len(holders) >= 3, "the lease was taken over"
    # Both entries of one append, next to each other.
    tags = [entry.payload["tag"] for entry in entries if entry.kind == "note"]
    assert all(first[:-1] == second[:-1] for first, second in zip(tags[::2], tags[1::2], strict=True))
    # Tool calls: each executed at most once, whatever became of who claimed it.
    assert executed, "tools were executed"
    assert max(executed.values()) == 1
    calls = Counter(entry.call_id for entry in entries if entry.kind == "tool_call")
    assert max(calls.values()) == 1
    assert set(executed) <= set(calls)


@pytest.mark.timeout(SECONDS + 1800)
def test_sixteen_writers_of_one_session(service: Service, tmp_path: Path) -> None:
    session = service.client.create_session(MODEL)
    port = int(service.base_url.rpartition(":")[2])
    writers = Writers(tmp_path, [port], session.id)
    until_s = time.monotonic() + SECONDS
    # However busy the machine, it goes on until there is something to look at.
    while time.monotonic() < until_s or writers.killed < 5 or not seen_enough(writers.logs):
        time.sleep(SECONDS / 12)
        writers.kill_one()
    writers.end()
    assert_whole(service.client, session.id, records_of(writers.logs))


@pytest.mark.timeout(1800)
def test_sixteen_writers_through_two_services_a_pgbouncer_and_a_failover(tmp_path: Path) -> None:
    """One service is killed and comes back, the server fails over to its standby, and writers are killed all along."""
    ports = [free_port(), free_port()]
    with (
        closing(server()) as primary,
        closing(primary.standby()) as standby,
        closing(PgBouncer(primary, 4)) as pooler,
    ):
        url = f"postgresql+psycopg://postgres@/postgres?host={pooler.directory}&pgbouncer=true"
        variables = {"AGENTSTATE_HOME": str(tmp_path), "AGENTSTATE_DATABASE_URL": url}
        database = Database(url)
        database.upgrade()
        database.close()

        def service(port: int) -> AbstractContextManager[subprocess.Popen[bytes]]:
            return process(tmp_path / f"{port}.service.log", AGENTSTATE_PORT=str(port), **variables)

        with service(ports[0]), Client(f"http://127.0.0.1:{ports[0]}", timeout_s=PATIENCE_S) as client:
            session = client.create_session(MODEL)

            def go_on() -> None:
                """Until so much more has been written."""
                enough = writers.appended() + 15
                while writers.appended() < enough:
                    time.sleep(0.2)
                    writers.kill_one()

            with service(ports[1]) as second:
                writers = Writers(tmp_path, ports, session.id)
                go_on()
                second.kill()
                second.wait()
            go_on()
            with service(ports[1]):
                go_on()
                primary.stop()
                standby.promote()
                standby.configure({"synchronous_standby_names": ""})
                pooler.point_to(standby)
                until_s = time.monotonic() + SECONDS
                while time.monotonic() < until_s or not seen_enough(writers.logs):
                    go_on()
                writers.end()
                assert_whole(client, session.id, records_of(writers.logs))
