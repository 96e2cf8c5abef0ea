"""A small run of `agentstate bench service` with every peer: it has all the figures that it says."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

OURS = ("resume", "resume(tail=10)", "append", "suspend", "suspend with engine", "fork")
PEERS = {
    "sqlite": {"SQLAlchemySession": ("get_items", "get_items(limit=50)", "add_items")},
    "postgresql": {"SQLAlchemySession": ("get_items", "get_items(limit=50)", "add_items")},
}
PEERS["sqlite"]["AsyncSqliteSaver"] = PEERS["postgresql"]["AsyncPostgresSaver"] = ("get_tuple", "put")


def test_every_figure_of_every_system_is_there(tmp_path: Path) -> None:
    report = tmp_path / "service.json"
    command = [sys.executable, "-m", "agentstate.cli", "bench", "service", "--json", str(report), "--rounds", "2"]
    command += ["--load", "0"]
    command += ["--sessions", "5x10,2x60", "--concurrency", "1,3"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads(report.read_text())
    keys = ("database", "system", "operation", "history", "concurrency", "side")
    found = [tuple(row[key] for key in keys) for row in result["rows"]]
    expected = {
        (database, system, *case)
        for database, peers in PEERS.items()
        for system, operations in [("agentstate", OURS), *peers.items()]
        for case in product(
            operations, (10, 60), (1, 3), ("client", "server") if system == "agentstate" else ("client",)
        )
    }
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert all(0 < row["p50_ms"] <= row["p99_ms"] for row in result["rows"])
    assert all(row["samples"] >= 1 for row in result["rows"])

    settings = result["settings"]
    assert settings["left_out"] == {}
    assert settings["durability"]["sqlite"]["agentstate"] == {"journal_mode": "wal", "synchronous": "normal"}
    assert {name: set(systems) for name, systems in settings["durability"].items()} == {
        name: {"agentstate", *peers} for name, peers in PEERS.items()
    }
    for system, durability in settings["durability"]["postgresql"].items():
        assert durability == {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"}, system
    assert {"sqlite", "postgresql", "openai-agents", "langgraph"} <= set(settings["versions"])
    assert "synchronous_commit = on" in run.stdout
