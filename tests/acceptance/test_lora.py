"""LoRA adapters: their pages come back, under any name and after a restart, and no page of another adapter does."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prompts import TINY, Generated, Generator
from stacks import ask_ranks
from test_models import (  # noqa: F401
    PAGE,
    QUESTION,
    Agent,
    Start,
    recomputes_what_was_damaged,
    start,
    suspend,
    tokens,
)

from agentstate.cli.local import LocalStack

PROMPT_PAGES = QUESTION // PAGE * PAGE
WEIGHTS = "adapter_model.safetensors"
# One adapter fits on the device beside the base model: the others are read from memory again and again.
FLAGS = (
    *("--lora-backend", "torch_native", "--max-lora-rank", "8"),
    *("--lora-target-modules", "q_proj", "k_proj", "v_proj", "o_proj", "--lora-strict-loading"),
    *("--max-loras-per-batch", "2", "--max-loaded-loras", "3", "--lora-eviction-policy", "fifo"),
    *("--lora-drain-wait-threshold", "5"),
)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, engine_python: Path) -> Path:
    """A directory with the adapters ``adapter-1`` to ``adapter-3``."""
    directory = tmp_path_factory.mktemp("adapters")
    names = [f"adapter-{seed}" for seed in (1, 2, 3)]
    subprocess.run([engine_python, Path(__file__).parents[1] / "models.py", directory, *names], check=True)
    return directory


@pytest.fixture
def adapters(trained: Path, tmp_path: Path) -> Path:
    """The same, to be written to: ``one`` and ``two`` are the first two."""
    for name, kind in {"one": "adapter-1", "two": "adapter-2"}.items():
        shutil.copytree(trained / kind, tmp_path / "adapters" / name)
    return tmp_path / "adapters"


def given(adapters: Path) -> tuple[str, ...]:
    return (*FLAGS, "--lora-paths", *(f"{name}={adapters / name}" for name in ("one", "two")))


def load(stack: LocalStack, name: str, path: Path) -> None:
    body = {"lora_name": name, "lora_path": str(path)}
    assert httpx.post(f"{stack.engine_url}/load_lora_adapter", json=body, timeout=60).json()["success"]


def unload(stack: LocalStack, name: str) -> None:
    body = {"lora_name": name}
    assert httpx.post(f"{stack.engine_url}/unload_lora_adapter", json=body, timeout=60).json()["success"]


def second_turns(agents: Mapping[str | None, Agent]) -> dict[str | None, Generated]:
    """All at once."""
    with ThreadPoolExecutor() as asking:
        return dict(zip(agents, asking.map(Agent.second_turn, agents.values()), strict=True))


def comes_back(stack: LocalStack, names: tuple[str | None, ...], seed: int) -> None:
    """With these adapters; None is the base model alone."""
    never = {name: Agent(stack, seed, cache_salt="never suspended", lora_path=name) for name in names}
    wanted = {name: agent.second_turn() for name, agent in never.items()}
    assert len({found.tokens for found in wanted.values()}) == len(names)
    assert all(found.cached and not found.restored for found in wanted.values())
    agents = {name: Agent(stack, seed, lora_path=name) for name in names}
    suspend(stack)
    found = second_turns(agents)
    assert {name: (one.tokens, one.restored) for name, one in found.items()} == {
        name: (one.tokens, one.cached) for name, one in wanted.items()
    }


def test_turns_with_adapters_are_those_of_an_engine_that_never_evicted(start: Start, adapters: Path) -> None:  # noqa: F811
    stack = start("llama", *given(adapters))
    comes_back(stack, (None, "one", "two"), 1)
    turn = stack.begin_turn()
    agent = Agent(stack, 5, lora_path="one", session_id=turn.engine_session)
    wanted = Agent(stack, 5, lora_path="one", cache_salt="never suspended").second_turn()
    (flushed,) = ask_ranks(stack, "flush", session=turn.session.uid, timeout_ms=30_000)
    assert (flushed["state"], flushed["tokens"]) == ("durable", wanted.cached)
    suspend(stack)
    stack.kill_engine()
    stack.start_engine(*TINY, *given(adapters))
    resumed = agent.second_turn()
    assert (resumed.tokens, resumed.restored) == (wanted.tokens, wanted.cached)
    assert recomputes_what_was_damaged(stack, "rank0", 4, 2, lora_path="two").cached == 2 * PAGE


def test_pages_belong_to_what_an_adapter_is(start: Start, adapters: Path, trained: Path) -> None:  # noqa: F811
    """Neither to its name nor to its path."""
    stack = start("llama", *given(adapters))
    generate, prompt = Generator(stack.engine_url), tokens(3, QUESTION)

    def ask(name: str, **fields: str) -> Generated:
        return generate(prompt, 24, lora_path=name, **fields)

    wanted = {name: ask(name).tokens for name in ("one", "two")}
    suspend(stack)

    # Somebody writes over the files of an adapter that is loaded: it is what it was, also when it comes back to the
    # device.
    for part in (WEIGHTS, "adapter_config.json"):
        (adapters / "one" / part).write_bytes((trained / "adapter-3" / part).read_bytes())
    for name in ("two", "one"):
        found = ask(name)
        assert (found.tokens, found.restored) == (wanted[name], PROMPT_PAGES)
        assert ask(name, cache_salt="never suspended").tokens == wanted[name]

    # Loaded again it is another one, which finds nothing of the one before.
    unload(stack, "one")
    load(stack, "one", adapters / "one")
    retrained = ask("one")
    assert retrained.cached == 0
    assert retrained.tokens != wanted["one"]
    # What has the same weights has the same pages.
    load(stack, "three", trained / "adapter-3")
    assert ask("three", cache_salt="never suspended").tokens == retrained.tokens
    suspend(stack)
    found = ask("three")
    assert (found.tokens, found.restored) == (retrained.tokens, PROMPT_PAGES)
    # SGLang keeps three: it reads one that it has dropped again, from where it was.
    load(stack, "four", trained / "adapter-1")
    suspend(stack)
    for name, tokens_of in {"four": wanted["one"], "one": retrained.tokens, "two": wanted["two"]}.items():
        found = ask(name)
        assert (found.tokens, found.restored) == (tokens_of, PROMPT_PAGES)

    suspend(stack)
    stack.kill_engine()
    stack.start_engine(*TINY, *given(adapters))
    found = ask("one")
    assert (found.tokens, found.restored) == (retrained.tokens, PROMPT_PAGES)
