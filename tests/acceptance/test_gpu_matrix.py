"""`benchmarks/gpu_matrix.py` on a CPU, with some of its cases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentstate.benchmarks import gpu_matrix
from agentstate.benchmarks.gpu_matrix import CASES, Case
from agentstate.cli.local import Spawn

Run = Callable[[Case], dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, checkpoints: Path, fork: Spawn, engine_python: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("AGENTSTATE_ENGINE_PYTHON", str(engine_python))
    monkeypatch.setenv("AGENTSTATE_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    for kind in checkpoints.iterdir():
        (tmp_path / "cache" / f"tiny-{kind.name}").symlink_to(kind)
    return lambda case: gpu_matrix.run(case, tmp_path / "home", checkpoints, on_gpu=False, spawn_engine=fork)


def test_a_case_goes_on_with_what_it_restored(run: Run) -> None:
    row = run(CASES["eagle"])
    assert (row["found"], row["reason"]) == ("same", None)
    assert row["restored_tokens"] == row["whole_tokens"] > 0


def test_a_case_that_cannot_start_says_why(run: Run) -> None:
    row = run(Case("llama", ("--pp-size", "2")))
    assert row["found"] == "did not run"
    assert "--pp-size" in row["reason"]
