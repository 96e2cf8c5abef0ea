"""The examples, as a reader of them would run them: against a real service and a real engine, twice."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pytest
from stacks import MakeStack
from tools import missing

from agentstate import Client
from agentstate.cli.local import LocalStack

EXAMPLES = Path(__file__).parents[2] / "examples"
PAGE = 64

POOL_TOKENS = 8192  # less than the agents of many_agents.py have together


@pytest.fixture(scope="module")
def small_stack(tmp_path_factory: pytest.TempPathFactory, make_stack: MakeStack, smollm2: Path) -> Iterator[LocalStack]:
    with closing(make_stack(tmp_path_factory.mktemp("examples"), smollm2)) as stack:
        stack.start_service()
        stack.start_engine("--max-total-tokens", str(POOL_TOKENS))
        yield stack


def run(stack: LocalStack, example: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / example), *arguments, "--service", stack.service_url]
    ran = subprocess.run(command, env=dict(stack.environment), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def cached(output: str) -> list[tuple[int, int]]:
    """Of every model call: its prompt's tokens, and how many of them were not computed again."""
    return [(int(of), int(kept)) for of, kept in re.findall(r"of (\d+) tokens (\d+) were not", output)]


@pytest.mark.parametrize(
    ("example", "name", "package"),
    [("agents_sdk.py", "--session", "agents"), ("langgraph_agent.py", "--thread", "langgraph")],
)
def test_an_agent_goes_on_from_disk(small_stack: LocalStack, example: str, name: str, package: str) -> None:
    if find_spec(package) is None:
        missing(f"no {package}: these tests run in the environment of the adapters")
    first = run(small_stack, example, name, example, "What is a page?")
    assert "resumed with 0" in first
    assert re.search(r"suspended: \d+ tokens are durable", first)
    small_stack.flush_device()
    second = run(small_stack, example, name, example, "And what is an extent?")
    assert "resumed with 2" in second
    ((before, _),) = cached(first)
    ((after, restored),) = cached(second)
    # All whole pages of what the first call had; its answer is in the second call's prompt too.
    assert after > before
    assert restored >= before // PAGE * PAGE > 0


def test_an_agent_that_knows_only_a_base_url_goes_on_from_disk(small_stack: LocalStack, tmp_path: Path) -> None:
    environment = {**os.environ, "OPENAI_BASE_URL": f"{small_stack.service_url}/v1", "OPENAI_API_KEY": "none"}

    def ask(question: str) -> tuple[int, int]:
        command = [sys.executable, str(EXAMPLES / "openai_agent.py"), str(tmp_path / "agent.json"), question]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        (found,) = cached(ran.stdout)
        return found

    with Client(small_stack.service_url) as client:
        known = {session.id for session in client.list_sessions().data}
        before, _ = ask("What is a page?")
        small_stack.settle()
        small_stack.flush_device()
        after, restored = ask("And what is an extent?")
        assert after > before
        assert restored >= before // PAGE * PAGE > 0
        assert len({session.id for session in client.list_sessions().data} - known) == 1


def test_forks_share_what_was_read(small_stack: LocalStack) -> None:
    small_stack.flush_device()
    output = run(small_stack, "fork_explore.py", "--session", "explorer")
    (read, _), *forks = cached(output)
    assert len(forks) == 3
    for _, restored in forks:
        assert restored >= read // PAGE * PAGE > 0
    assert re.search(r"kept ses_\w+, the surest", output)


def test_more_agents_than_the_device_holds(small_stack: LocalStack) -> None:
    output = run(small_stack, "many_agents.py", "--agents", "12")
    rounds = cached(output)
    first, second = rounds[:12], rounds[12:]
    assert sum(told for told, _ in first) > POOL_TOKENS
    assert len(second) == 12
    for (before, _), (_, restored) in zip(first, second, strict=True):
        assert restored >= before // PAGE * PAGE > 0
