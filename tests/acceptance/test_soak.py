"""Short runs of `agentstate bench soak`, without restarts: every token as if nothing had happened."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path

import pytest
from stacks import MakeStack

from agentstate.benchmarks.soak import MODES, Event, Mode, Outcome, Soak
from agentstate.benchmarks.stacks import TINY
from agentstate.cli.local import LocalStack
from agentstate.settings import Settings


def soak(stack: LocalStack, mode: Mode, turns: int, seed: int) -> Outcome:
    soaking = Soak(stack, mode, turns=turns, restarts=0, seed=seed, longest=1500, step=lambda: None)
    outcome = asyncio.run(soaking.run())
    assert outcome.different == []
    assert sum(outcome.points.values()) == turns
    assert outcome.restored_tokens > 0
    return outcome


def test_suspended_agents_say_what_they_would_have_said(stack: LocalStack) -> None:
    outcome = soak(stack, MODES["plain"], 20, seed=11)
    assert set(outcome.points) >= {Event.FLUSH, Event.HOST, Event.DEVICE, Event.CANCEL}


@pytest.mark.parametrize("name", ["eagle", "dp"])
def test_they_do_so_with_drafts_and_on_any_dp_rank(
    name: str, tmp_path: Path, checkpoints: Path, make_stack: MakeStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SGLANG_CPU_OMP_THREADS_BIND", raising=False)  # the launcher shares out the cores
    mode, cache = MODES[name], tmp_path / "cache"
    cache.mkdir()
    for tiny, kind in TINY.items():
        (cache / tiny).symlink_to(checkpoints / kind)
    with closing(make_stack(tmp_path / "stack", cache / mode.model)) as stack:
        stack.create_database()
        stack.start_engine(*mode.arguments(Settings(cache_dir=cache)))
        outcome = soak(stack, mode, 16, seed=3)
    assert (outcome.points[Event.MOVE] > 0) == (mode.dp_size > 1)
