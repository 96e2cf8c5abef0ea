"""Commands of the documentation that need no engine, run as they stand there."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from commands import DOCUMENTS, commands
from stage import MODEL, Service

from agentstate.settings import Settings
from agentstate.sql.database import Database

ELSEWHERE = {"quick-start.md": "tests/acceptance", "check flags": "tests/acceptance"}


@pytest.fixture
def backend() -> str:
    return "sqlite"


def shell(script: str, home: Path, **environment: str) -> str:
    """What a script prints that is run by a user who has installed AgentState, and set nothing."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AGENTSTATE_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{inherited['PATH']}"
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=home,
        env={**inherited, "HOME": str(home), "PATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_every_command_is_run_here_or_by_an_acceptance_test() -> None:
    ours = {"migrate", "back up", "ask", "ready", "check pages"}
    named = {name for document in DOCUMENTS if document not in ELSEWHERE for name in commands(document)}
    assert named - ELSEWHERE.keys() == ours


def test_the_database_is_migrated_and_backed_up(tmp_path: Path) -> None:
    told = commands("operations.md")
    shell(told["migrate"], tmp_path)
    original = tmp_path / ".local/share/agentstate/agentstate.db"
    database = Database(Settings(home=original.parent).sqlalchemy_url)
    try:
        with database.write() as connection:
            connection.exec_driver_sql("CREATE TABLE marked (n INTEGER)")
            connection.exec_driver_sql("INSERT INTO marked VALUES (17)")
        # Beside processes that have it open, and whose newest writes are in its log.
        shell(told["back up"], tmp_path)
    finally:
        database.close()
    with sqlite3.connect(tmp_path / "agentstate-backup.db") as copy:
        assert copy.execute("SELECT n FROM marked").fetchall() == [(17,)]
        assert copy.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_a_service_is_asked(service: Service, tmp_path: Path) -> None:
    told = commands("troubleshooting.md")
    service.client.create_session(MODEL, id="agent-17")
    assert "no pages are stored" in shell(told["ask"], tmp_path, AGENTSTATE_URL=service.base_url)
    assert "http://127.0.0.1:8700/" in told["ready"]
    ready = json.loads(shell(told["ready"].replace("http://127.0.0.1:8700", service.base_url), tmp_path))
    assert ready["status"] == "ready"


def test_pages_are_checked(tmp_path: Path) -> None:
    assert "0 broken" in shell(commands("troubleshooting.md")["check pages"], tmp_path)
