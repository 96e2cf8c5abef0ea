"""What the tests of clients run: a service in front of an engine, and packages of npm."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from tools import missing, tool

from agentstate.cli.local import LocalStack, free_port

sys.path.insert(0, str(Path(__file__).parents[1] / "acceptance"))

from prompts import EXACT  # noqa: E402
from zygote import Zygotes  # noqa: E402

HERE = Path(__file__).parent
ENGINE_KEY = "for-the-gateway-alone"
SERVED = (*EXACT, "--enable-cache-report", "--tool-call-parser", "hermes", "--api-key", ENGINE_KEY)


def make_model(*command: str | Path) -> None:
    """Run a program of the engine's environment that writes a checkpoint."""
    subprocess.run([os.environ["AGENTSTATE_ENGINE_PYTHON"], *command], check=True)


@contextmanager
def serving(home: Path, checkpoint: Path) -> Iterator[LocalStack]:
    """A service, and an engine with a model, both running."""
    with (
        closing(Zygotes(home / "zygote.log")) as zygotes,
        closing(
            LocalStack(
                home / "stack",
                checkpoint,
                engine_python=Path(os.environ["AGENTSTATE_ENGINE_PYTHON"]),
                spawn_engine=zygotes.spawn,
                service_port=free_port(),
                engine_port=free_port(),
            )
        ) as stack,
    ):
        stack.environment = {
            **stack.environment,
            "AGENTSTATE_ENGINE_API_KEY": ENGINE_KEY,
            # What an engine has it restores here, however long that takes. Nor does a lease lapse while it starts.
            "AGENTSTATE_BREAK_EVEN": "off",
            "AGENTSTATE_LEASE_TTL_S": "3600",
        }
        stack.start_service()
        stack.start_engine(*SERVED)
        yield stack


def installed(name: str, cache: Path) -> Path:
    """The packages of a directory beside this file. They lie in the cache, named by their lock."""
    tool("node")
    lock = (HERE / name / "package-lock.json").read_bytes()
    packages = cache / f"{name}-{hashlib.sha256(lock).hexdigest()[:12]}"
    cache.mkdir(parents=True, exist_ok=True)
    with Path(f"{packages}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # another process may be installing the same packages
        if not (packages / "complete").exists():
            shutil.rmtree(packages, ignore_errors=True)
            packages.mkdir()
            for file in ("package.json", "package-lock.json"):
                shutil.copy(HERE / name / file, packages)
            # Not `npm ci`, which wants every platform's programs in the lock, and registries lack some.
            install = [tool("npm"), "install", "--no-save", "--no-audit", "--no-fund"]
            ran = subprocess.run(install, cwd=packages, capture_output=True, text=True, check=False)
            if ran.returncode:
                missing(f"npm cannot install tests/clients/{name}: {ran.stderr.strip()[-500:]}")
            (packages / "complete").touch()
    return packages / "node_modules"
