"""Real services and real engines. An engine's process is a fork of one that has imported SGLang (see zygote.py) unless
its start is what a test is about."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import scheduling
from prompts import EXACT, Generator
from stacks import MakeStack

from agentstate.benchmarks.slow_drive import Drive
from agentstate.cli.local import LocalService, LocalStack, Spawn, free_port
from agentstate.settings import Settings


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    scheduling.order(items, Path(__file__).parent)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return scheduling.scheduler(config, log)


@pytest.fixture(scope="session")
def engine_python() -> Path:
    """The engine's own environment. Of the session: a test sees no settings from outside."""
    return Path(os.environ["AGENTSTATE_ENGINE_PYTHON"])


@pytest.fixture(scope="session")
def make_stack(engine_python: Path, fork: Spawn) -> MakeStack:
    """A stack, not started yet, that keeps everything below the first path and serves the checkpoint at the second."""

    def make(home: Path, checkpoint: Path, beside: LocalService | None = None) -> LocalStack:
        ports = {"service_port": free_port(), "engine_port": free_port()}
        stack = LocalStack(home, checkpoint, engine_python=engine_python, spawn_engine=fork, beside=beside, **ports)
        # Whether an engine restores what it has is for these tests to know, and not for its stopwatch to decide; nor
        # for what it has learned of its sessions, which it would fetch ahead. Nor is a lease to lapse while it starts,
        # nor is one that is busy to be taken for dead.
        own = {
            "AGENTSTATE_BREAK_EVEN": "off",
            "AGENTSTATE_FORESIGHT": "off",
            "AGENTSTATE_LEASE_TTL_S": "3600",
            "AGENTSTATE_ENGINE_TIMEOUT_S": "120",
        }
        stack.environment = {**stack.environment, **own}
        return stack

    return make


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, engine_python: Path) -> Path:
    """A directory with a tiny model of every kind: see models.py."""
    directory = tmp_path_factory.mktemp("models")
    subprocess.run([engine_python, Path(__file__).parents[1] / "models.py", directory], check=True)
    return directory


@pytest.fixture(scope="session")
def one_drive(tmp_path_factory: pytest.TempPathFactory) -> Drive:
    return Drive(tmp_path_factory.mktemp("slow"))


@pytest.fixture(scope="session")
def slow_drive(one_drive: Drive) -> dict[str, str]:
    """An environment in which an engine's drive is as slow as `Drive` says."""
    return one_drive.environment


@pytest.fixture
def drive(one_drive: Drive) -> Iterator[Drive]:
    one_drive.answer()
    yield one_drive
    one_drive.answer()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    checkpoint = Settings().cache_dir / "smollm2-135m-instruct"
    if not (checkpoint / "config.json").exists():
        pytest.fail(f"no model in {checkpoint}: run `make test`, which prepares it")
    return checkpoint


class SharedStack:
    """The stack of all tests that take ``stack``, started for the first of them."""

    def __init__(self, make: Callable[[], LocalStack]):
        self._make = make
        self._running: LocalStack | None = None

    def get(self) -> LocalStack:
        if self._running is None:
            self._running = self._make()
            self._running.start_service()
            # Chunks are small, so that restores also meet chunked prefills.
            self._running.start_engine(*EXACT, "--chunked-prefill-size", "512", "--enable-metrics")
        return self._running

    def close(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None


SHARED = pytest.StashKey[SharedStack]()


@pytest.fixture(scope="session")
def shared_stack(
    tmp_path_factory: pytest.TempPathFactory, make_stack: MakeStack, request: pytest.FixtureRequest
) -> Iterator[SharedStack]:
    def make() -> LocalStack:
        return make_stack(tmp_path_factory.mktemp("stack"), request.getfixturevalue("smollm2"))

    with closing(SharedStack(make)) as shared:
        request.config.stash[SHARED] = shared
        yield shared


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """End it before another test starts an engine, also in a fixture of a module."""
    shared = item.config.stash.get(SHARED, None)
    if shared is not None and "shared_stack" not in getattr(item, "fixturenames", ()):
        shared.close()


@pytest.fixture
def stack(shared_stack: SharedStack) -> LocalStack:
    return shared_stack.get()


@pytest.fixture
def generate(stack: LocalStack) -> Generator:
    return Generator(stack.engine_url)
