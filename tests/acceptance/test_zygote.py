"""A fork of a zygote is a process like one that was executed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from zygote import Fork, Zygotes

from agentstate.cli.local import ChildProcess

IMPORTED = "colorsys"
PROGRAM = f"""
import json, multiprocessing, os, sys, time

def tell():
    found = dict(pid=os.getpid(), parent=os.getppid(), group=os.getpgrp(), session=os.getsid(0), directory=os.getcwd())
    found.update(argv=sys.argv[1:], told=os.environ.get("TOLD_IT"), imported={IMPORTED!r} in sys.modules)
    print(json.dumps(found), flush=True)

if __name__ == "__main__":
    tell()
    if "stay" in sys.argv:
        multiprocessing.get_context("spawn").Process(target=lambda: (tell(), time.sleep(600))).start()
        time.sleep(600)
    sys.exit(3)
"""
OWNER = """
import os, sys, time
from pathlib import Path
from zygote import Zygotes
zygotes = Zygotes(Path(sys.argv[1]), ["colorsys"])
child = zygotes.spawn([sys.executable, "-m", "program", "stay"], os.environ, Path(sys.argv[2]))
print(child.pid, zygotes._zygotes.popitem()[1]._process.pid, flush=True)
time.sleep(600)
"""

Start = Callable[..., Fork]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "program.py").write_text(PROGRAM)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parent)])}


@pytest.fixture
def start(tmp_path: Path, environment: dict[str, str], log: Path) -> Iterator[Start]:
    with closing(Zygotes(tmp_path / "zygote.log", [IMPORTED])) as zygotes:

        def start(*arguments: str, **variables: str) -> Fork:
            return zygotes.spawn([sys.executable, "-m", "program", *arguments], {**environment, **variables}, log)

        yield start


def told(log: Path, lines: int) -> list[dict[str, Any]]:
    """What the programs have printed, once there are so many lines of it."""
    while not log.exists() or log.read_text().count("\n") < lines:
        time.sleep(0.01)
    return [json.loads(line) for line in log.read_text().splitlines()]


def ends(pid: int) -> bool:
    """Waits for it: a process that is nobody's child here is gone, or a zombie that nobody has reaped yet."""
    while True:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)


def test_a_module_runs_with_its_arguments_environment_log_and_session(start: Start, log: Path) -> None:
    child = start("an argument", TOLD_IT="yes")
    assert child.wait() == child.wait() == child.poll() == 3
    (found,) = told(log, 1)
    assert found == {
        "pid": child.pid,
        "parent": found["parent"],
        "group": child.pid,
        "session": child.pid,
        "directory": os.getcwd(),
        "argv": ["an argument"],
        "told": "yes",
        "imported": True,
    }
    assert start().wait() == 3
    assert len(told(log, 2)) == 2, "a log is appended to"


def test_it_is_signalled_and_waited_for(start: Start, log: Path) -> None:
    child = start("stay")
    told(log, 2)
    assert child.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.01)
    child.terminate()
    assert child.wait(600) == -signal.SIGTERM
    child.kill()  # does nothing to what has ended


def test_it_is_killed_with_all_that_it_has_started(start: Start, log: Path) -> None:
    child = ChildProcess([], {}, log, lambda *_: start("stay"))
    (first, second) = told(log, 2)
    assert (second["parent"], second["group"], second["imported"]) == (first["pid"], first["pid"], True)
    child.kill()
    assert ends(first["pid"]) and ends(second["pid"])


def test_commands_share_a_zygote_unless_imports_may_depend_on_what_they_differ_in(start: Start, log: Path) -> None:
    for variables in ({"AGENTSTATE_HOME": "a"}, {"AGENTSTATE_HOME": "b", "TOLD_IT": "yes"}, {"OMP_NUM_THREADS": "7"}):
        start(**variables).wait()
    first, second, third = (one["parent"] for one in told(log, 3))
    assert first == second != third


def test_nothing_is_left_of_a_zygote_whose_owner_is_killed(
    tmp_path: Path, environment: dict[str, str], log: Path
) -> None:
    command = [sys.executable, "-c", OWNER, str(tmp_path / "zygote.log"), str(log)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        child, zygote = map(int, owner.stdout.readline().split())
        told(log, 1)
        owner.kill()
    assert ends(zygote) and ends(child)
