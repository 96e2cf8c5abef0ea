"""An engine with the last release's plug-in, then one with this one's, under a service that is upgraded meanwhile."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

from last_release_path import last_release
from prompts import PAGE, TINY, Generator, prompt
from stacks import MakeStack

from agentstate import Client
from agentstate.answers import Resumed
from agentstate.cli import launcher
from agentstate.cli.local import ChildProcess
from agentstate.settings import Settings

FLAGS = (*TINY, "--page-size", str(PAGE))
PAGES = 9
PATIENCE_S = 1200


def test_what_an_engine_of_the_last_release_has_stored_is_restored_by_this_one(
    tmp_path: Path, make_stack: MakeStack, checkpoints: Path, engine_python: Path
) -> None:
    release, text = last_release(tmp_path / "release"), prompt(9900, PAGES * PAGE + 9)
    stack = make_stack(tmp_path / "home", checkpoints / "llama")
    old = {**stack.environment, "PYTHONPATH": str(release)}
    subprocess.run([sys.executable, "-P", "-m", "agentstate.cli", "db", "upgrade"], env=old, check=True)
    settings = Settings(home=stack.home, engine_python=engine_python, database_url="", pages_dir=None)
    port = stack.engine_url.rpartition(":")[2]
    given = ["--model-path", str(checkpoints / "llama"), "--served-model-name", stack.model, "--port", port, *FLAGS]
    command, environment = launcher.engine_command(settings, given, old)
    engine = ChildProcess(command, environment, tmp_path / "old_engine.log")
    with closing(stack):
        try:
            engine.await_answer(f"{stack.engine_url}/health", PATIENCE_S)
            # The schema is migrated below an engine that runs, which goes on.
            stack.start_service()
            with Client(stack.service_url, timeout_s=PATIENCE_S) as client:
                session_id = client.create_session(stack.model).id
                turn = resumed_on_an_engine(client, session_id)
                assert turn.engine is not None
                right = Generator(stack.engine_url)(text, **turn.engine.extra_body)
                suspended = client.suspend(session_id, turn.lease, durable_timeout_ms=60_000)
            assert (suspended.kv.state, suspended.kv.tokens) == ("durable", PAGES * PAGE)
            assert engine.terminate(PATIENCE_S)
        finally:
            engine.kill()
        assert "agentstate: rank 0" in (tmp_path / "old_engine.log").read_text()
        stack.start_engine(*FLAGS)
        with Client(stack.service_url, timeout_s=PATIENCE_S) as client:
            turn = client.resume(session_id)
            assert (turn.kv.state, turn.kv.tokens, turn.kv.valid) == ("durable", PAGES * PAGE, True)
            assert turn.engine is not None
            restored = Generator(stack.engine_url)(text, **turn.engine.extra_body)
        assert (restored.tokens, restored.restored) == (right.tokens, PAGES * PAGE)


def resumed_on_an_engine(client: Client, session_id: str) -> Resumed:
    """Once the engine has sent a heartbeat."""
    deadline = time.monotonic() + PATIENCE_S
    while not client.engines().data:
        assert time.monotonic() < deadline, "the engine of the last release is not live"
        time.sleep(0.2)
    return client.resume(session_id)
