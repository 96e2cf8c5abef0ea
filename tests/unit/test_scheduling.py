"""How the tests of engines are shared out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import scheduling

TESTS = Path(__file__).parents[1]
CONFTEST = """
from pathlib import Path

import pytest
import scheduling


def pytest_collection_modifyitems(items):
    scheduling.order(items, Path(__file__).parent)


def pytest_xdist_make_scheduler(config, log):
    return scheduling.scheduler(config, log)
"""
MODULE = """
import os


def test_it():
    with open("ran", "a") as ran:
        ran.write(f"{os.environ['PYTEST_XDIST_WORKER']} {__name__}\\n")
"""


def test_modules_of_a_group_are_run_by_one_process_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    for name in ("test_another", "test_bad_input", "test_replicas"):
        (tmp_path / f"{name}.py").write_text(MODULE)
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = [line.split() for line in (tmp_path / "ran").read_text().splitlines()]
    (another,) = (worker for worker, module in lines if module == "test_another")
    (first, *_), (second, *_) = of_group = [line for line in lines if line[1] != "test_another"]
    assert first == second != another
    assert [module for _, module in of_group] == ["test_replicas", "test_bad_input"]


def test_every_module_that_is_named_is_there_and_in_one_group() -> None:
    there = {path.name for directory in ("acceptance", "clients") for path in (TESTS / directory).glob("test_*.py")}
    grouped = [module for modules in scheduling.GROUPS.values() for module in modules]
    alone = [name for name in scheduling.FIRST if name not in scheduling.GROUPS]
    assert {*grouped, *alone} <= there
    assert len(set(grouped)) == len(grouped)
    assert not set(grouped) & set(alone)
