"""Every kind of KV pool, on tiny random models: what left the device comes back, or the request is recomputed, and the
tokens are those of an agent that was never suspended."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from conftest import free_port
from prompts import Generated, Generator

from agentstate import engines
from agentstate.control import ControlClient
from agentstate.database import Database
from agentstate.local import LocalStack
from agentstate.pages.inventory import store_directories
from agentstate.pages.store import read_header
from agentstate.settings import Settings

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import VOCABULARY  # noqa: E402

PAGE = 64
FLAGS = ("--skip-tokenizer-init", "--dtype", "float32", "--max-total-tokens", "8192", "--chunked-prefill-size", "1024")

Start = Callable[..., LocalStack]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, engine_python: Path) -> Path:
    directory = tmp_path_factory.mktemp("models")
    subprocess.run([engine_python, Path(__file__).parents[1] / "models.py", directory], check=True)
    return directory


@pytest.fixture
def start(tmp_path: Path, checkpoints: Path, engine_python: Path) -> Iterator[Start]:
    """Starts an engine with a model of a kind, and a service beside it; both end with the test."""
    with ExitStack() as running:

        def start(kind: str, *flags: str) -> LocalStack:
            ports = {"service_port": free_port(), "engine_port": free_port()}
            stack = LocalStack(tmp_path / "stack", checkpoints / kind, engine_python=engine_python, **ports)
            running.enter_context(closing(stack))
            stack.start_service()
            stack.start_engine(*FLAGS, *flags)
            return stack

        yield start


def tokens(seed: int, count: int) -> list[int]:
    numbers = random.Random(seed)
    return [numbers.randrange(2, VOCABULARY) for _ in range(count)]


def rank_stats(stack: LocalStack) -> list[dict[str, Any]]:
    """What each rank of the engine says of itself."""
    settings = Settings(home=stack.home, database_url="")
    database = Database(settings.sqlalchemy_url)
    try:
        with database.read() as connection:
            found = engines.live(connection, settings.engine_timeout_s, stack.model)
    finally:
        database.close()
    stats = [ControlClient(engine.control_address).call("stat", 5) for engine in found]
    return sorted(stats, key=lambda stat: stat["rank"])


def settle(stack: LocalStack) -> None:
    """Wait until everything that was offered is stored, on every rank."""
    while any(stat["spill"]["waiting"] for stat in rank_stats(stack)):
        time.sleep(0.05)


def suspend(stack: LocalStack) -> None:
    settle(stack)
    stack.flush_device()


class Agent:
    """Two turns, the second of which has all of the first before it."""

    def __init__(self, generate: Generator, seed: int, length: int = 7 * PAGE + 20, **fields: Any):
        self._generate = generate
        self._fields = fields
        self._question = tokens(seed, length)
        self._next = tokens(seed + 1, 30)

    def first(self) -> Generated:
        self._answer = self._generate(self._question, max_new_tokens=2 * PAGE, **self._fields)
        return self._answer

    def second(self) -> Generated:
        return self._generate([*self._question, *self._answer.tokens, *self._next], 24, **self._fields)

    @property
    def length(self) -> int:
        """Tokens after the first turn whose KV exists: the last one was never an input."""
        return len(self._question) + len(self._answer.tokens) - 1


def resumes_like_never_suspended(stack: LocalStack, seed: int) -> Generated:
    generate = Generator(stack.engine_url)
    never = Agent(generate, seed, cache_salt="never")
    never.first()
    wanted = never.second()
    assert (wanted.restored, wanted.cached) == (0, wanted.cached) and wanted.cached > 0
    agent = Agent(generate, seed)
    agent.first()
    suspend(stack)
    resumed = agent.second()
    assert (resumed.tokens, resumed.cached, resumed.restored) == (wanted.tokens, wanted.cached, wanted.cached)
    other = Agent(generate, seed + 100)
    other.first()
    assert other.second().tokens != wanted.tokens
    return resumed


def flip(stack: LocalStack, pool: int) -> None:
    """Flip a bit in the newest extent of the store with so many bytes a page."""
    stores = [d for d in store_directories(stack.home / "pages")]
    paths = [max((store / "extents").glob("*.ext")) for store in stores]
    (path,) = (path for path in paths if read_header(path).geometry.page_bytes == pool)
    header = read_header(path)
    offset, _ = header.component_range(1, 0, header.pages - 1, 1)
    with path.open("r+b") as file:
        file.seek(offset + 10)
        byte = file.read(1)[0]
        file.seek(offset + 10)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("dtype", ["fp8_e4m3"])
def test_fp8(start: Start, dtype: str) -> None:
    stack = start("llama", "--kv-cache-dtype", dtype)
    resumes_like_never_suspended(stack, 1)


def test_mla(start: Start) -> None:
    stack = start("mla")
    resumes_like_never_suspended(stack, 1)


def test_sliding_window(start: Start) -> None:
    stack = start("sliding")
    resumes_like_never_suspended(stack, 1)
    print(stack.stat())


def test_state(start: Start) -> None:
    stack = start("conv", "--page-size", "1")
    resumes_like_never_suspended(stack, 1)
    print(stack.stat())
