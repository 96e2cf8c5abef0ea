"""A real service in front of a real engine, for clients that know a base URL and a key."""

from __future__ import annotations

import fcntl
import hashlib
import json
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
from models import VOCABULARY, with_words
from tools import missing, tool

from agentstate.cli.local import LocalStack, free_port
from agentstate.settings import Settings

sys.path.insert(0, str(Path(__file__).parents[1] / "acceptance"))

from prompts import EXACT  # noqa: E402
from zygote import Zygotes  # noqa: E402

HERE = Path(__file__).parent
ENDS = list(range(2, VOCABULARY, 16))
ENGINE_KEY = "for-the-gateway-alone"
SERVED = (*EXACT, "--enable-cache-report", "--tool-call-parser", "hermes", "--api-key", ENGINE_KEY)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whoever waits for an engine is stopped when it hangs, not when the machine is slow."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """A service, and an engine with a tiny model, both running."""
    home = tmp_path_factory.mktemp("clients")
    engine_python = Path(os.environ["AGENTSTATE_ENGINE_PYTHON"])
    models = Path(__file__).parents[1] / "models.py"
    subprocess.run([engine_python, models, home / "models", "llama"], check=True)
    checkpoint = with_words(home / "models" / "llama", home / "llama")
    # Programs that set no limit to an answer need one that ends.
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDS}))
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
def node(node_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of ``node`` that has its packages."""
    packages = installed("node", node_cache)
    home = tmp_path_factory.mktemp("node")
    for script in (HERE / "node").iterdir():
        shutil.copy(script, home)
    (home / "node_modules").symlink_to(packages)
    return home


@pytest.fixture(scope="module")
def programs(node_cache: Path) -> Path:
    """A directory with the programs of ``programs``."""
    return installed("programs", node_cache) / ".bin"


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
