"""What `agentstate bench service` measures on: rows as the service's own, and what it says where peers are missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from stage import Service, register

from agentstate.benchmarks import conversations
from agentstate.benchmarks.databases import SERVERS
from agentstate.fleet.manifests import KvState
from agentstate.sql.models import entries, leases


def test_sessions_that_are_filled_in_bulk_are_the_services_own(service: Service) -> None:
    engine = register(service.database, "tcp://127.0.0.1:1", model=conversations.MODEL)
    written: list[int] = []
    conversations.fill(service.database, {10: 3, 70: 2}, engine, written.append)
    assert sum(written) == 170
    for length in (10, 70):
        conversations.check(service.database, service.client, length, engine)
    resumed = service.client.resume("bench-70-1", tail=5)
    assert [entry.payload for entry in resumed.entries.data] == [conversations.message(n) for n in range(65, 70)]
    assert (resumed.kv.state, resumed.kv.tokens, resumed.kv.valid) == (KvState.DURABLE, 70 * 64, True)


@pytest.mark.parametrize("change", [sa.update(entries).values(payload={}), sa.delete(leases)], ids=["payload", "lease"])
def test_rows_that_the_service_would_not_write_are_found(service: Service, change: sa.Executable) -> None:
    engine = register(service.database, "tcp://127.0.0.1:1", model=conversations.MODEL)
    conversations.fill(service.database, {10: 1}, engine, lambda written: None)
    with service.database.write() as connection:
        connection.execute(change)
    with pytest.raises(RuntimeError, match="not the service's"):
        conversations.check(service.database, service.client, 10, engine)


def test_what_a_service_serves_at_once_is_printed_and_kept(tmp_path: Path) -> None:
    report = tmp_path / "service.json"
    command = [sys.executable, "-m", "agentstate.cli", "bench", "service", "--json", str(report), "--rounds", "1"]
    command += ["--sessions", "3x10,12", "--concurrency", "2", "--databases", "sqlite", "--load", "1"]
    run = subprocess.run(
        [*command, "--minutes", "0.05"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    assert run.returncode == 0, run.stderr
    rows = [row for row in json.loads(report.read_text())["rows"] if "part" in row]
    assert [(row["part"], row["workers"]) for row in rows] == [("load", 1), ("load", 2), ("crowd", 2)]
    assert all(row["requests"] > 0 and row["cpu_ms"] > 0 for row in rows[:2])
    assert (rows[2]["sessions"], rows[2]["errors"], len(rows[2]["memory_mb"])) == (12, 0, 3)
    assert "Load: requests a second" in run.stdout and "Crowd: requests a second" in run.stdout


def test_peers_that_are_not_installed_are_named(tmp_path: Path) -> None:
    if subprocess.run([sys.executable, "-c", "import agents"], capture_output=True).returncode == 0:
        pytest.skip("they are installed here: tests/adapters has the run with them")
    report = tmp_path / "service.json"
    command = [sys.executable, "-m", "agentstate.cli", "bench", "service", "--json", str(report), "--rounds", "1"]
    command += ["--sessions", "3x10", "--concurrency", "1", "--databases", "sqlite", "--load", "0"]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert run.returncode == 0, run.stderr
    result = json.loads(report.read_text())
    assert {row["system"] for row in result["rows"]} == {"agentstate"}
    assert set(result["settings"]["left_out"]) == {"SQLAlchemySession on sqlite", "AsyncSqliteSaver on sqlite"}
    assert "pip install 'agentstate[service-peers]'" in run.stdout


@pytest.mark.parametrize(
    "arguments",
    [["--databases", "oracle"], ["--sessions", "many"], ["--concurrency", "one"], ["--sessions", "31x10,40x20"]],
    ids=str,
)
def test_what_cannot_be_measured_is_refused_in_one_line(arguments: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "agentstate.cli", "bench", "service", *arguments], capture_output=True, text=True
    )
    assert run.returncode == 1
    assert len(run.stderr.strip().splitlines()) == 1
    assert any(name in run.stderr for name in (*SERVERS, "COUNTxENTRIES", "--load 0"))
