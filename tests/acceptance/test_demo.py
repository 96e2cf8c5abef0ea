"""The demo of two nodes, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from agentstate.settings import Settings

PAGE = 64


def test_an_agent_goes_on_at_another_node_once_its_own_died(tmp_path: Path, engine_python: Path, smollm2: Path) -> None:
    report = tmp_path / "figures.json"
    own = {
        "AGENTSTATE_ENGINE_PYTHON": str(engine_python),
        "AGENTSTATE_CACHE_DIR": str(Settings().cache_dir),
        "AGENTSTATE_HOME": str(tmp_path),
        "AGENTSTATE_BREAK_EVEN": "off",
        "COLUMNS": "80",
    }
    command = [sys.executable, "-m", "agentstate.cli", "demo", "--nodes", "2", "--json", str(report)]
    ran = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    figures = json.loads(report.read_text())
    assert figures["identical"] and figures["covered"]
    assert figures["pages_shared"] * PAGE == figures["tokens_restored"] == figures["tokens_shared"] > 0
    # Of the table: what precedes it is the agents' own.
    table = ran.stdout[ran.stdout.index("Turn 2 on node B") :].splitlines()
    assert max(map(len, table)) <= 80
    assert not (tmp_path / "demo-nodes/node-a/pages").exists() or not (tmp_path / "demo-nodes/node-b/pages").exists()
