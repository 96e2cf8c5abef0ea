"""The flags of `benchmarks/gpu_matrix.py`, as SGLang reads them: nobody has seen them on a GPU yet."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.server_args import ServerArgs

from agentstate.benchmarks import gpu_matrix
from agentstate.benchmarks.gpu_matrix import CASES, flags_of
from agentstate.benchmarks.stacks import TINY
from agentstate.settings import Settings
from engine_patch import flags
from engine_patch import sglang_api as sgl
from engine_patch.flags import Standing


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return parser


@pytest.mark.parametrize("on_gpu", [True, False], ids=["GPU", "CPU"])
@pytest.mark.parametrize("name", CASES)
def test_sglang_has_the_flags_of_each_case_and_none_is_refused(
    name: str, on_gpu: bool, parser: argparse.ArgumentParser, tmp_path: Path
) -> None:
    case = CASES[name]
    if not on_gpu and not case.on_cpu:
        pytest.skip("for a GPU alone")
    for model in TINY:  # they are there: none is made
        (tmp_path / model).mkdir()
        (tmp_path / model / "config.json").touch()
    words = flags_of(case, tmp_path, Settings(cache_dir=tmp_path), on_gpu)
    given = vars(parser.parse_args(["--model-path", "some/model", *words]))
    defaults = sgl.flag_defaults(ServerArgs)
    judged = [flags.judge(field, value) for field, value in given.items() if value != defaults.get(field, value)]
    assert judged
    assert [flag.field for flag in judged if flag.standing is Standing.REFUSED] == []


def test_what_it_runs_of_the_checkout_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[list[str], Path]] = []

    def run(command: list[Any], *, cwd: Path, **_: Any) -> SimpleNamespace:
        ran.append((list(map(str, command)), cwd))
        return SimpleNamespace(returncode=0, stdout="1 passed", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    gpu_matrix.make([CASES["GQA"]], tmp_path)
    assert gpu_matrix.below_sglang(1.0)["found"] == "passed"
    (making, of_models), (testing, of_tests) = ran
    assert (of_models / making[1]).is_file() and making[2:] == [str(tmp_path), "llama", "adapter-1"]
    assert (of_tests / testing[-1]).is_dir()
