"""What stands between the store and the system, and the count of what it did."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from compiler import c_compiler
from tools import in_memory

HERE = Path(__file__).parent

totals: Counter[str] = Counter()

Inject = Callable[[str, str, str, int], dict[str, Any]]


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`faults.c`, built."""
    if sys.platform != "linux":
        pytest.skip("no Linux: faults in system calls cannot be injected")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run([c_compiler(), "-shared", "-fPIC", "-O1", "-o", library, HERE / "faults.c", "-ldl"], check=True)
    return library


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir=in_memory()))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def inject(shim: Path, directory: Path) -> Inject:
    """Disturb a scenario at every call: see `injection.py`."""

    def run(scenario: str, mode: str, kinds: str, number: int) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, HERE / "injection.py", directory, scenario, mode, kinds, str(number)],
            env={**os.environ, "LD_PRELOAD": str(shim)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        outcome: dict[str, Any] = json.loads(done.stdout)
        totals[f"{mode}, {kinds}"] += outcome["injected"]
        # What could not be read when a store was opened concerns those pages, until it is opened again.
        totals["pages lost" if kinds == "changes" else "pages unread"] += outcome["lost"]
        totals["wrong pages"] += outcome["wrong"]
        return outcome

    return run


@pytest.fixture
def counted() -> Counter[str]:
    """The totals, for faults that are made otherwise."""
    return totals


def pytest_sessionfinish(session: pytest.Session) -> None:
    # One of several processes: the first one sums up.
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["faults"] = dict(totals)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    totals.update(getattr(node, "workeroutput", {}).get("faults", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if totals:
        lost, unread, wrong = (totals.pop(name, 0) for name in ("pages lost", "pages unread", "wrong pages"))
        terminalreporter.section("faults of the page store")
        for name, number in sorted(totals.items()):
            terminalreporter.line(f"{number:6,} {name}")
        terminalreporter.line(
            f"{sum(totals.values()):6,} injected; {wrong} pages served wrong, {lost} lost that no fault concerned, "
            f"{unread} not found until the next opening because their header could not be read"
        )
