"""A real service in front of a real engine, for clients that know a base URL and a key."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import scheduling
from models import VOCABULARY, with_words
from npm import installed
from served import ENGINE_KEY, HERE, make_model, serving

from agentstate.cli.local import LocalStack, Spawn
from agentstate.settings import Settings

ENDS = list(range(2, VOCABULARY, 16))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    scheduling.order(items, HERE)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, fork: Spawn) -> Iterator[LocalStack]:
    """A service, and an engine with a tiny model, both running."""
    home = tmp_path_factory.mktemp("clients")
    make_model(HERE.parent / "models.py", home / "models", "llama")
    checkpoint = with_words(home / "models" / "llama", home / "llama")
    # Programs that set no limit to an answer need one that ends.
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDS}))
    with serving(home, checkpoint, fork) as stack:
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
    packages = installed(HERE / "node", node_cache)
    home = tmp_path_factory.mktemp("node")
    for script in (HERE / "node").iterdir():
        shutil.copy(script, home)
    (home / "node_modules").symlink_to(packages)
    return home


@pytest.fixture(scope="module")
def programs(node_cache: Path) -> Path:
    """A directory with the programs of ``programs``."""
    return installed(HERE / "programs", node_cache) / ".bin"
