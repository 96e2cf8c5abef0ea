"""The quick start, as a reader types it: its commands, with ports and directories of the test's own, in the checkout
and with the wheel, installed elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
from commands import ROOT, commands
from installed import installed, outside, published
from stacks import PATIENCE_S, until

from agentstate.cli.local import ChildProcess, free_port
from agentstate.client import Client
from agentstate.settings import Settings

PAGE = 64
COMMANDS = commands("quick-start.md")


class Reader:
    """Types commands into terminals, in the directory ``where``. ``changes`` says what of them is named otherwise."""

    def __init__(self, home: Path, where: Path, changes: Mapping[str, str]):
        self.home = home
        self._where = where
        self._service, self._engine = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self._service}"
        self.engine_url = f"http://127.0.0.1:{self._engine}"
        self._changes = {
            "http://127.0.0.1:8700": self.url,
            "~/.cache/agentstate/": f"{Settings().cache_dir}/",
            "agent.json": str(home / "agent.json"),
            **changes,
        }
        # Whether an engine restores what it has is for this test to know, and not for its stopwatch to decide.
        own = {"AGENTSTATE_HOME": str(home / "data"), "AGENTSTATE_PORT": str(self._service)}
        self.environment = outside(**own, AGENTSTATE_BREAK_EVEN="off", HF_HUB_OFFLINE="1")

    def typed(self, name: str) -> str:
        command = COMMANDS[name]
        for theirs, ours in self._changes.items():
            command = command.replace(theirs, ours)
        return command.strip() + (f" --port {self._engine}" if name == "engine" else "")

    def runs(self, script: str) -> str:
        """What commands print that end."""
        shell = ["bash", "-euo", "pipefail", "-c", script]
        ran = subprocess.run(shell, cwd=self._where, env=self.environment, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    def starts(self, name: str, url: str) -> ChildProcess:
        """A command that goes on, once it answers."""
        shell = ["bash", "-c", f"exec {self.typed(name)}"]
        # Commands of a checkout are relative to it, and no other may find it in its directory.
        process = ChildProcess(["env", "-C", str(self._where), *shell], self.environment, self.home / f"{name}.log")
        process.await_answer(url, PATIENCE_S)
        return process


@pytest.fixture(params=["checkout", "wheel"])
def reader(request: pytest.FixtureRequest, tmp_path: Path, engine_python: Path) -> Reader:
    if request.param == "checkout":
        return Reader(tmp_path, ROOT, {".venv/engine/bin/agentstate": str(engine_python.parent / "agentstate")})
    wheel = published(tmp_path)
    service = installed(wheel, tmp_path / "service", like=Path(sys.executable))
    engine = installed(wheel, tmp_path / "engine", like=engine_python)
    changes = {".venv/service/bin": str(service), ".venv/engine/bin": str(engine), "examples/": f"{ROOT}/examples/"}
    return Reader(tmp_path, tmp_path, changes)


@pytest.fixture
def ending() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def computed(printed: str) -> tuple[int, int]:
    """Tokens of the first prompt, and how many of these were computed before."""
    found = re.search(r"of (\d+) tokens (\d+) were not computed again", printed)
    assert found is not None, printed
    return int(found[1]), int(found[2])


def test_the_quick_start(reader: Reader, ending: ExitStack, smollm2: Path) -> None:
    assert list(COMMANDS) == ["install", "service", "engine", "agent", "agent again", "look"]
    subprocess.run(["make", "--dry-run", *COMMANDS["install"].split()[1:]], cwd=ROOT, check=True, capture_output=True)
    ending.callback(reader.starts("service", f"{reader.url}/healthz").kill)
    engine = reader.starts("engine", f"{reader.engine_url}/health")
    ending.callback(engine.kill)
    *exports, _ = reader.typed("agent").splitlines()
    with Client(reader.url, timeout_s=PATIENCE_S) as client:
        # A reader who types the next command has waited for this: an engine answers before the service knows it.
        until(lambda: any(engine.live for engine in client.engines().data))
        first, _ = computed(reader.runs(reader.typed("agent")))
        (session,) = client.list_sessions().data
        # And for this.
        until(lambda: client.kv(session.id).tiers["disk"].tokens >= first // PAGE * PAGE)
    engine.kill()
    ending.callback(reader.starts("engine", f"{reader.engine_url}/health").kill)
    _, restored = computed(reader.runs("\n".join([*exports, reader.typed("agent again")])))
    assert restored >= first // PAGE * PAGE
    looked = reader.runs(reader.typed("look"))
    assert session.id in looked
    assert "rank0" in looked


def test_flags_are_checked_before_a_model_is_loaded(engine_python: Path, tmp_path: Path) -> None:
    command = commands("troubleshooting.md")["check flags"].replace(
        "agentstate", str(engine_python.parent / "agentstate"), 1
    )
    environment = {**os.environ, "AGENTSTATE_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert "--pp-size" in ran.stdout + ran.stderr
    assert "refused" in ran.stdout + ran.stderr
