"""A real service and a real engine with a real model, started once for the whole directory."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from prompts import Generator

from agentstate.local import LocalStack
from agentstate.settings import Settings


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def make_stack(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LocalStack]:
    """A stack below a directory of that name, on free ports, with nothing started yet."""

    def make(name: str) -> LocalStack:
        checkpoint = Settings().cache_dir / "smollm2-135m-instruct"
        if not (checkpoint / "config.json").exists():
            pytest.fail(f"no model in {checkpoint}: run `make test`, which prepares it")
        return LocalStack(
            tmp_path_factory.mktemp(name),
            checkpoint,
            # The engine's own environment.
            engine_python=Path(os.environ["AGENTSTATE_ENGINE_PYTHON"]),
            service_port=free_port(),
            engine_port=free_port(),
        )

    return make


@pytest.fixture(scope="session")
def stack(make_stack: Callable[[str], LocalStack]) -> Iterator[LocalStack]:
    with closing(make_stack("stack")) as stack:
        stack.start_service()
        # Chunks are small, so that restores also meet chunked prefills.
        stack.start_engine("--chunked-prefill-size", "512")
        yield stack


@pytest.fixture
def generate(stack: LocalStack) -> Generator:
    return Generator(stack.engine_url)
