"""Runs tests on the product without one of its waits. torch is imported once, in a process that forks for every run.

`python -m late.mutation`, in tests/, is that process: it reads a `Run` a line, as JSON, and answers with the exit code
of pytest and the file that has its output.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import NamedTuple

from late.device import LateDevice
from late.streams import Policy
from late.waits import ROOT, Wait, all_waits, without

_IMPORTED_ONCE = (
    "alembic.command",
    "anyio.from_thread",
    "lmdb",
    "msgpack",
    "numpy",
    "pygments.lexers",
    "pydantic_settings",
)
_IMPORTED_ONCE += ("sqlalchemy.dialects.postgresql", "sqlalchemy.dialects.sqlite", "torch", "xxhash")


class Outcome(NamedTuple):
    """``exit_code`` is pytest's: 0 when all tests passed, 1 when some failed, others when it could not run them."""

    exit_code: int
    output: str


class Mutation:
    """The process that forks. A context manager."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "late.mutation"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, wait: Wait | None, tests: Sequence[str], *options: str) -> Outcome:
        """Run ``tests``, named from tests/ on, without ``wait``."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        nodes = [str(ROOT / "tests" / test) for test in tests]
        print(json.dumps([wait.name if wait else None, [*nodes, *options]]), file=stdin, flush=True)
        exit_code, output = json.loads(stdout.readline())
        return Outcome(exit_code, output)

    def __enter__(self) -> Mutation:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module as ``code``."""

    def __init__(self, name: str, path: Path, code: CodeType):
        self._name, self._path, self._code = name, path, code

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name != self._name:
            return None
        return importlib.util.spec_from_file_location(name, self._path, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        exec(self._code, module.__dict__)


def _serve() -> None:
    # What is imported here is not imported in every child; of the product nothing may be.
    for name in _IMPORTED_ONCE:
        importlib.import_module(name)
    import pytest
    import torch

    # The first device tensor makes torch import a part of itself that is large.
    with LateDevice(Policy("late")).installed():
        torch.zeros(4, device="cuda")[:2].clone().cpu()
    torch.set_num_threads(1)
    waits = all_waits()
    for line in sys.stdin:
        name, arguments = json.loads(line)
        with tempfile.TemporaryFile("w+") as output:
            child = os.fork()
            if child == 0:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                exit_code = 3
                try:
                    if name is not None:
                        wait = waits[name]
                        path = ROOT / wait.path
                        sys.meta_path.insert(0, _Finder(wait.module, path, compile(without(wait), path, "exec")))
                    exit_code = pytest.main(["-q", "-p", "no:cacheprovider", "--timeout", "60", *arguments])
                finally:
                    sys.stdout.flush()
                    os._exit(exit_code)
            _, status = os.waitpid(child, 0)
            output.seek(0)
            print(json.dumps([os.waitstatus_to_exitcode(status), output.read()]), flush=True)


if __name__ == "__main__":
    _serve()
