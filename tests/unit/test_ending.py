"""A test that fails does not keep others from running, whatever it holds."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import ending
import pytest

TESTS = Path(__file__).parents[1]
HOLDS_A_TURN = """
import threading

import ending
from engines import completion, scripted
from stage import MODEL, register, serving

from agentstate.sessions.verbs import Sessions
from agentstate.settings import Settings

ending.AFTER_FAILURE_S = 0.5


def test_that_fails(tmp_path, migrated_file, monkeypatch):
    held = threading.Event()

    def end(*_, **__):
        held.set()
        threading.Event().wait()

    monkeypatch.setattr(Sessions, "end", end)
    settings = Settings(home=tmp_path, database_url=f"sqlite:///{migrated_file}")
    with scripted(lambda asked: asked.whole(completion("hi"))) as engine, serving(settings) as service:
        register(service.database, "tcp://127.0.0.1:1", base_url=engine.base_url)
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
        service.http.post("/v1/chat/completions", json=body).raise_for_status()
        held.wait()
        raise AssertionError("of this test")
"""


@pytest.fixture
def thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], threading.Thread]]:
    """Starts one that goes on until the test is over. Nobody has patience."""
    monkeypatch.setattr(ending, "left_behind", [])
    for patience in ("PATIENCE_S", "AFTER_FAILURE_S"):
        monkeypatch.setattr(ending, patience, 0)
    over = threading.Event()

    def start() -> threading.Thread:
        thread = threading.Thread(target=over.wait, daemon=True)
        thread.start()
        return thread

    yield start
    over.set()


def test_what_does_not_end_fails_a_test(
    thread: Callable[[], threading.Thread], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError, match="a thing was told to end and goes on"):
        ending.join(thread(), "a thing")
    assert ending.left_behind == ["a thing"]
    assert "what all threads do" in capfd.readouterr().err


def test_what_does_not_end_hides_no_failure(
    thread: Callable[[], threading.Thread], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "failed", True)
    ending.join(thread(), "a thing")
    assert ending.left_behind == ["a thing"]
    assert "a thing was told to end and goes on" in capfd.readouterr().err


def test_a_run_ends_though_a_service_does_not(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(HOLDS_A_TURN)
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), str(TESTS / "integration")])
    ran = subprocess.run(
        [*command, "test_it.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "AssertionError: of this test" in ran.stdout
    assert "a service was told to end and goes on" in ran.stdout
    assert "in end" in ran.stdout, "where it hangs"
    assert "1 failed" in ran.stdout
