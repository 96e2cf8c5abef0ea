"""What the tests of clients run: a service in front of an engine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from agentstate.cli.local import LocalStack, Spawn, free_port

sys.path.insert(0, str(Path(__file__).parents[1] / "acceptance"))

from prompts import EXACT  # noqa: E402

HERE = Path(__file__).parent
ENGINE_KEY = "for-the-gateway-alone"
SERVED = (*EXACT, "--enable-cache-report", "--tool-call-parser", "hermes", "--api-key", ENGINE_KEY)


def make_model(*command: str | Path) -> None:
    """Run a program of the engine's environment that writes a checkpoint."""
    subprocess.run([os.environ["AGENTSTATE_ENGINE_PYTHON"], *command], check=True)


@contextmanager
def serving(home: Path, checkpoint: Path, fork: Spawn) -> Iterator[LocalStack]:
    """A service, and an engine with a model, both running."""
    ports = {"service_port": free_port(), "engine_port": free_port()}
    engine_python = Path(os.environ["AGENTSTATE_ENGINE_PYTHON"])
    with closing(
        LocalStack(home / "stack", checkpoint, engine_python=engine_python, spawn_engine=fork, **ports)
    ) as stack:
        stack.environment = {
            **stack.environment,
            "AGENTSTATE_ENGINE_API_KEY": ENGINE_KEY,
            # What an engine has it restores here, however long that takes. Nor does a lease lapse while it starts, nor
            # is one that is busy taken for dead.
            "AGENTSTATE_BREAK_EVEN": "off",
            "AGENTSTATE_LEASE_TTL_S": "3600",
            "AGENTSTATE_ENGINE_TIMEOUT_S": "120",
        }
        stack.start_service()
        stack.start_engine(*SERVED)
        yield stack
