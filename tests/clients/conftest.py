"""A real service in front of a real engine, for clients that know a base URL and a key."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from models import with_words
from tools import missing, tool

from agentstate.cli.local import LocalStack, free_port
from agentstate.settings import Settings

sys.path.insert(0, str(Path(__file__).parent.parent / "acceptance"))

from prompts import EXACT  # noqa: E402
from zygote import Zygotes  # noqa: E402

NODE = Path(__file__).parent / "node"
ENGINE_KEY = "for-the-gateway-alone"
SERVED = (*EXACT, "--enable-cache-report", "--tool-call-parser", "hermes", "--api-key", ENGINE_KEY)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whoever waits for an engine is stopped when it hangs, not when the machine is slow."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """A service, and an engine with a tiny model, both running."""
    home = tmp_path_factory.mktemp("clients")
    engine_python = Path(os.environ["AGENTSTATE_ENGINE_PYTHON"])
    models = Path(__file__).parents[1] / "models.py"
    subprocess.run([engine_python, models, home / "models", "llama"], check=True)
    checkpoint = with_words(home / "models" / "llama", home / "llama")
    with (
        closing(Zygotes(home / "zygote.log")) as zygotes,
        closing(
            LocalStack(
                home / "stack",
                checkpoint,
                engine_python=engine_python,
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


@pytest.fixture
def flush(stack: LocalStack) -> Callable[[], None]:
    """Waits until all that was offered is stored, and empties the device."""

    def flush() -> None:
        stack.settle()
        authorized = {"Authorization": f"Bearer {ENGINE_KEY}"}
        # While a request winds up it is refused.
        while not httpx.post(f"{stack.engine_url}/flush_cache", headers=authorized, timeout=60).is_success:
            time.sleep(0.1)

    return flush


@pytest.fixture(scope="session")
def node_cache() -> Path:
    """Of the session: a test sees no settings from outside."""
    return Settings().cache_dir / "environments"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, node_cache: Path) -> Path:
    """A copy of `NODE` that has its packages. They lie in the cache, named by their lock."""
    tool("node")
    lock = (NODE / "package-lock.json").read_bytes()
    packages = node_cache / f"node-{hashlib.sha256(lock).hexdigest()[:12]}"
    node_cache.mkdir(parents=True, exist_ok=True)
    with Path(f"{packages}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # another process may be installing the same packages
        if not (packages / "complete").exists():
            shutil.rmtree(packages, ignore_errors=True)
            packages.mkdir()
            for name in ("package.json", "package-lock.json"):
                shutil.copy(NODE / name, packages)
            # Not `npm ci`, which wants every platform's programs in the lock, and registries lack some.
            install = [tool("npm"), "install", "--no-save", "--no-audit", "--no-fund"]
            ran = subprocess.run(install, cwd=packages, capture_output=True, text=True, check=False)
            if ran.returncode:
                missing(f"npm cannot install tests/clients/node: {ran.stderr.strip()[-500:]}")
            (packages / "complete").touch()
    home = tmp_path_factory.mktemp("node")
    for script in NODE.iterdir():
        shutil.copy(script, home)
    (home / "node_modules").symlink_to(packages / "node_modules")
    return home
