"""`agentstate up`, with a real service and something that looks like SGLang from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import agentstate
from agentstate.cli.local import free_port
from agentstate.cli.up import _print

SRC = Path(agentstate.__file__).parent.parent
ENGINE = """
import http.server, signal, sys, threading

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Health)
signal.signal(signal.SIGTERM, lambda *_: (threading.Thread(target=server.shutdown).start()))
print("loading 1%\\rloading 100%\\x1b[2J", flush=True)
if "--fail" in sys.argv:
    sys.exit(3)
server.serve_forever()
print("stored", flush=True)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    package = tmp_path / "site" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text(ENGINE)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/site exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AGENTSTATE_")}
    own = {"AGENTSTATE_HOME": str(tmp_path / "home"), "AGENTSTATE_ENGINE_PYTHON": str(python)}
    return {**inherited, **own, "AGENTSTATE_PORT": str(free_port()), "PYTHONPATH": str(SRC)}


@pytest.fixture
def up(environment: dict[str, str], tmp_path: Path) -> Iterator[object]:
    started: list[subprocess.Popen[str]] = []

    def start(*more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "agentstate.cli", "up", "--model-path", str(tmp_path)]
        command += ["--port", str(free_port()), *more]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        # Once for its parts to end, and again at once.
        for _ in range(2):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        process.wait()


def test_both_start_and_end_in_order(up, environment: dict[str, str]) -> None:  # type: ignore[no-untyped-def]
    process = up()
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if line.startswith("up      | ready"):
            process.send_signal(signal.SIGINT)
    assert process.wait() == 0, lines
    assert f"http://127.0.0.1:{environment['AGENTSTATE_PORT']}/v1" in "\n".join(lines)
    assert "engine  | loading 100%\\x1b[2J" in lines
    order = ["starting the service", "starting the engine", "ready", "ending the service", "the service has ended"]
    order += ["ending the engine", "stored", "the engine has ended"]
    found = [next(number for number, line in enumerate(lines) if text in line) for text in order]
    assert found == sorted(found)
    assert any(line.startswith("service | ") for line in lines)


def test_when_one_ends_the_other_is_ended_too(up) -> None:  # type: ignore[no-untyped-def]
    process = up("--fail")
    said = process.stdout.read()
    assert process.wait() == 1
    assert "the engine ended by itself, with status 3" in said and "the service has ended" in said


def test_what_cannot_start_starts_nothing(environment: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "agentstate.cli", "up", "--model-path", "/no/such/model"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "/no/such/model" in done.stderr and done.stdout == ""
    assert not (tmp_path / "home").exists()


def test_a_line_is_written_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of several threads do not run into each other, also where nothing is buffered."""
    written: list[str] = []
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=written.append, flush=lambda: None))
    _print("engine", "one\x1b")
    assert written == ["engine  | one\\x1b\n"]
