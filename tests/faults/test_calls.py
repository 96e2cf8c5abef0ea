"""Every operation of the page store with a fault at each of its system calls, one after the other.

``FAULTS=all pytest tests/faults`` runs every error at every call of every operation.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tools import tool

ALL = os.environ.get("FAULTS") == "all"
HERE = Path(__file__).parent

OPERATIONS = [
    "publish",
    "publish what supersedes",
    "publish over a spare",
    "adopt",
    "adopt for what is evicted",
    "merge",
    "make room",
    "collect",
    "drop",
    "drop several",
    "drop the last of an extent",
    "erase",
    "erase what was broken off",
    "release",
    "close",
    "open",
    "open without an index",
    "open with an older index",
    "open for the first time",
    "attend without a directory",
    "attend without an index",
    "repair",
]
# A full disk stays full, one that was remounted stays read-only; a failing block may be read at the next attempt.
ERRORS = [("fail from then on", "ENOSPC"), ("fail once", "EIO")]
ALL_ERRORS = [
    (mode, name)
    for mode in ("fail once", "fail from then on")
    for name in ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES")
]
READING = [
    "merge",
    "erase",
    "publish over a spare",
    "open without an index",
    "open with an older index",
    "open",
    "repair",
    "read",
]

Inject = Callable[[str, str, str, int], dict[str, Any]]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_kill_at_any_call_leaves_all_or_nothing(operation: str, inject: Inject) -> None:
    outcome = inject(operation, "kill half-way", "changes", 0)
    assert outcome["problems"] == []
    assert (outcome["lost"], outcome["wrong"]) == (0, 0)
    assert outcome["at"] == {"SIGKILL": outcome["injected"]} and outcome["injected"] > 5


@pytest.mark.parametrize("mode, name", ALL_ERRORS if ALL else ERRORS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_store_goes_on_after_a_call_that_failed(operation: str, mode: str, name: str, inject: Inject) -> None:
    outcome = inject(operation, mode, "changes", getattr(errno, name))
    assert outcome["problems"] == []
    assert (outcome["lost"], outcome["wrong"]) == (0, 0)
    assert outcome["injected"] > 3


@pytest.mark.parametrize("mode, name", [("fail once", "EDQUOT"), ("fail from then on", "EROFS")])
def test_publishing_tells_a_full_disk_from_one_that_cannot_be_written(mode: str, name: str, inject: Inject) -> None:
    outcome = inject("publish", mode, "changes", getattr(errno, name))
    assert outcome["problems"] == []
    assert set(outcome["raised"]) == ({"PageStoreFull"} if name == "EDQUOT" else {"OSError"})


@pytest.mark.parametrize("operation, native", [*((name, "on") for name in READING), ("merge", "off"), ("read", "off")])
def test_what_the_disk_does_not_give_back_now_is_not_lost(
    operation: str, native: str, inject: Inject, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What reads pages does so by the native extension, where there is one, or by Python.
    monkeypatch.setenv("AGENTSTATE_NATIVE", native)
    outcome = inject(operation, "fail once", "reads", errno.EIO)
    assert outcome["wrong"] == 0
    # A header that could not be read when a store was opened is read when it is opened next.
    assert [problem for problem in outcome["problems"] if "the store that went on lost" not in problem] == []
    assert outcome["injected"] > 1


@pytest.mark.parametrize(
    "operation, kinds",
    [
        *((name, "changes") for name in ("publish", "publish over a spare", "adopt", "merge", "erase")),
        *((name, "reads") for name in ("merge", "erase", "open without an index", "read")),
    ],
)
def test_coded_pages_are_all_there_or_none_and_none_is_wrong(
    operation: str, kinds: str, inject: Inject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODEC", "lossless")
    ways = [("kill half-way", 0), ("fail from then on", errno.ENOSPC)] if kinds == "changes" else []
    for mode, error in [*ways, ("fail once", errno.EIO)]:
        outcome = inject(operation, mode, kinds, error)
        assert outcome["wrong"] == 0
        # A header that could not be read when a store was opened is read when it is opened next.
        later = ["the store that went on lost"] if kinds == "reads" else []
        assert [problem for problem in outcome["problems"] if not any(text in problem for text in later)] == []
        assert outcome["injected"] > 0


# Builds what `injection.py` builds, and does one of its operations between two calls that are easily found.
TRACED = """
import os, sys
sys.path.insert(0, sys.argv[1])
import injection
from pathlib import Path
directory = Path(sys.argv[2])
store = injection.PageStore(directory, injection.MARK, injection.GEOMETRY)
for extent in injection.EXTENTS:
    injection.write(store, injection.keys(*extent))
store.close()
scenario = injection.SCENARIOS[sys.argv[3]]
store = injection.PageStore(directory, injection.MARK, injection.GEOMETRY, scenario.quota)
os.access("/begin", 0)
scenario.act(store)
os.access("/end", 0)
"""


@pytest.mark.parametrize("operation", ["publish what supersedes", "publish over a spare", "merge", "drop", "erase"])
def test_no_call_that_changes_anything_goes_unnoticed(
    operation: str, inject: Inject, shim: Path, directory: Path
) -> None:
    """The system's own account has the same calls that the faults were injected at."""
    strace = tool("strace")
    trace = directory / "trace"
    opening, writing = (
        "open,openat,openat2,creat",
        "write,writev,pwrite64,pwritev,pwritev2,ftruncate,truncate,fallocate",
    )
    naming = "rename,renameat,renameat2,unlink,unlinkat,link,linkat,symlink,symlinkat,mkdir,mkdirat,rmdir,mknod,mknodat"
    others = "copy_file_range,sendfile,splice,msync,chmod,fchmod,utimensat,setxattr,io_uring_enter,io_submit"
    run = subprocess.run(
        [
            strace,
            "-f",
            "-o",
            trace,
            "-E",
            f"LD_PRELOAD={shim}",
            "-e",
            f"trace=access,{opening},{writing},{naming},{others}",
        ]
        + [sys.executable, "-c", TRACED, HERE, directory / "traced", operation],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HERE)},
    )
    if "ptrace" in run.stderr.lower():
        pytest.skip("strace may not trace here")
    assert run.returncode == 0, run.stderr
    account = trace.read_text().partition('"/begin"')[2].partition('"/end"')[0]
    calls = re.findall(r"^\d+ +(\w+)\((.*)", account, re.MULTILINE)
    # What only reads is disturbed elsewhere; the last one is the mark itself.
    seen = Counter(SAME.get(name, name) for name, rest in calls if "O_RDONLY" not in rest and name != "access")
    injected: Counter[str] = Counter()
    for name, number in inject(operation, "fail once", "changes", errno.EIO)["at"].items():
        injected[name.removesuffix("64")] += number
    # Synchronising is injected at, and never reaches the system.
    assert injected.pop("fsync", 0) + injected.pop("fdatasync") > 0
    assert seen == injected


SAME = {"openat": "open", "fallocate": "posix_fallocate", "pwrite64": "pwrite"}
