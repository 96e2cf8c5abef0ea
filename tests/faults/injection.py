"""Runs with ``faults.c`` preloaded: makes an operation of the page store fail, or end the process, at each of its
system calls in turn, and looks at what is left.

    injection.py DIRECTORY SCENARIO MODE KINDS ERRNO     prints one JSON object: see `Outcome`

Every run starts from a copy of one store and in a process of its own.
"""

from __future__ import annotations

import ctypes
import json
import logging
import mmap
import os
import shutil
import signal
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from agentstate.errors import PageStoreFull, PageStoreUnwritable
from agentstate.pages import Geometry, PageKeys, PageStore, Quota, inventory, merge
from agentstate.pages.files import read_header
from agentstate.pages.space import UNLIMITED
from agentstate.pages.testing.pages import MARK, content, drop, key, keys, read, reader_for, traces, write

MODES = {"count": 1, "kill": 2, "kill half-way": 3, "fail once": 4, "fail from then on": 5}
KINDS = {"changes": 1, "reads": 2}
GEOMETRY = Geometry(layers=2, page_size=4, component_bytes=(1000, 300))
EXTENTS = [(1, 2), (3,), (4, 5, 6)]
BEFORE = {1, 2, 3, 4, 5, 6}
ERASED = {2, 3, 5}
# How the store writes its pages.
CODEC: Any = os.environ.get("CODEC", "raw")
# A store with these extents holds no more than them.
FULL = Quota(max_bytes=3 * 12288 if CODEC == "raw" else 12288 + 2 * 8192)

shim = ctypes.CDLL(None)
shim.faults_arm.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_int]
shim.faults_disarm.restype = ctypes.c_long
shim.faults_last.restype = ctypes.c_char_p


@dataclass(frozen=True)
class Scenario:
    """``act`` is what is disturbed. ``writes`` are the pages that are all there afterwards, as version 1, or none of
    them is; ``may_lose`` those that need not be there. ``prepare`` changes the files before the store is opened, and
    ``opening`` says that opening it is part of what is disturbed. Of the pages that it ``erases`` nothing may be left
    when that is asked for again by the next process."""

    act: Callable[[PageStore], object] = lambda store: None
    writes: Collection[int] = ()
    may_lose: Collection[int] = ()
    quota: Quota = UNLIMITED
    before: Callable[[PageStore], object] = lambda store: None
    prepare: Callable[[Path], object] = lambda directory: None
    opening: bool = False
    stored: Collection[int] = frozenset(BEFORE)
    erases: Collection[int] = ()


@dataclass
class Outcome:
    """What came of disturbing one operation at each of its calls: how many faults were injected and at which calls, how
    many pages were lost that should be there, were served wrong, and what else was not as it should be."""

    injected: int = 0
    lost: int = 0
    wrong: int = 0
    at: dict[str, int] = field(default_factory=dict)
    raised: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def merged(store: PageStore) -> None:
    reader = reader_for(GEOMETRY)
    try:
        merge(store, reader, keys(1, 2, 3, 4, 5, 6), mmap.mmap(-1, 1 << 16), 6 * GEOMETRY.layer_bytes)
    finally:
        reader.close()


def read_all(store: PageStore) -> None:
    reader = reader_for(GEOMETRY)
    with store.pin(keys(*sorted(BEFORE))) as pin:
        read(reader, [pin])
    reader.close()


def held(store: PageStore) -> None:
    """A hold keeps an extent that is superseded."""
    store.kept = store.pin(keys(3))  # type: ignore[attr-defined]
    write(store, keys(3), version=1)


def break_page_5(directory: Path) -> None:
    path = directory / "extents" / f"{3:016x}.ext"
    offset, _ = read_header(path).layout.component_range(1, 0, 1, 1)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"broken")


def repair(store: PageStore) -> None:
    inventory.repair(store.directory, list(inventory.check(store.directory)))


def older_index(directory: Path) -> None:
    """The index knows an extent that is gone and none of the others; and a crash left something behind."""
    saved = directory.with_name("saved")
    shutil.copytree(directory / "index", saved)
    store = PageStore(directory, MARK, GEOMETRY)
    write(store, keys(3), version=0)
    write(store, keys(7, 8), version=1)
    store.close()
    shutil.rmtree(directory / "index")
    saved.rename(directory / "index")
    (directory / "partial" / "leftover.ext").write_bytes(b"half of something")


def beside(directory: Path) -> None:
    """Another store has pages 7 and 8."""
    store = PageStore(directory.with_name("beside"), MARK, GEOMETRY, codec=CODEC)
    write(store, keys(7, 8), version=1)
    store.close()


def adopt(store: PageStore) -> None:
    store.adopt(store.directory.with_name("beside") / "extents" / f"{1:016x}.ext", PageKeys.of(keys(7, 8)))


SCENARIOS = {
    "publish": Scenario(lambda store: write(store, keys(7, 8), 1), writes={7, 8}),
    "publish what supersedes": Scenario(lambda store: write(store, keys(3, 4, 7), 1), writes={3, 4, 7}),
    "publish over a spare": Scenario(
        lambda store: write(store, keys(7, 8), 1), writes={7, 8}, may_lose={1, 2}, quota=FULL
    ),
    "adopt": Scenario(adopt, writes={7, 8}, prepare=beside),
    "adopt for what is evicted": Scenario(adopt, writes={7, 8}, may_lose={1, 2}, quota=FULL, prepare=beside),
    "merge": Scenario(merged),
    "make room": Scenario(lambda store: store.make_room(20_000), may_lose={1, 2, 3}, quota=FULL),
    "collect": Scenario(
        lambda store: store.collect(), may_lose={1, 2, 3}, before=lambda store: store.need(keys(4, 5, 6))
    ),
    "drop": Scenario(lambda store: drop(store, key(5)), may_lose={5}),
    "drop several": Scenario(lambda store: drop(store, *keys(2, 3, 5)), may_lose={2, 3, 5}),
    "drop the last of an extent": Scenario(lambda store: drop(store, key(3)), may_lose={3}),
    "erase": Scenario(lambda store: store.erase(keys(*ERASED)), may_lose=ERASED, erases=ERASED),
    "erase what was broken off": Scenario(
        lambda store: store.erase(keys(*ERASED)),
        before=lambda store: store.remove(keys(2, 5)),
        may_lose=ERASED,
        erases=ERASED,
    ),
    "release": Scenario(lambda store: store.kept.close(), before=held),  # type: ignore[attr-defined]
    "close": Scenario(lambda store: store.close(), before=lambda store: store.prefix_length(keys(1, 2, 3))),
    "open": Scenario(opening=True),
    "open without an index": Scenario(prepare=lambda directory: shutil.rmtree(directory / "index"), opening=True),
    "open with an older index": Scenario(prepare=older_index, opening=True, stored=BEFORE | {7, 8}),
    "open for the first time": Scenario(prepare=lambda directory: shutil.rmtree(directory), opening=True, stored=()),
    "attend without a directory": Scenario(
        lambda store: store.attend(), before=lambda store: shutil.rmtree(store.directory), may_lose=BEFORE
    ),
    "attend without an index": Scenario(
        lambda store: store.attend(), before=lambda store: shutil.rmtree(store.directory / "index")
    ),
    "repair": Scenario(lambda store: (store.close(), repair(store)), may_lose={5}, prepare=break_page_5),
    "read": Scenario(read_all),
}


class Run:
    """One operation with one fault."""

    def __init__(self, name: str, directory: Path, outcome: Outcome):
        self.scenario = SCENARIOS[name]
        self.directory = directory
        self.outcome = outcome

    def problem(self, text: str) -> None:
        self.outcome.problems.append(text)

    def open(self, quota: Quota = UNLIMITED) -> PageStore:
        return PageStore(self.directory, MARK, GEOMETRY, quota, codec=CODEC)

    def act(self, arm: Callable[[], None]) -> str | None:
        """Do it with the fault armed: the name of the error that it ended with, and look at the store it left."""
        store = None if self.scenario.opening else self.open(self.scenario.quota)
        if store is not None:
            self.scenario.before(store)
        # Python opens some files of its own when it does something for the first time.
        with suppress(OSError), open("/proc/self/fd/-1"):
            pass
        descriptors = self.descriptors()
        raised: Exception | None = None
        arm()
        try:
            if store is None:
                store = self.open()
            else:
                self.scenario.act(store)
        except Exception as error:
            raised = error
        shim.faults_disarm()
        if raised is not None:
            self.judge(raised)
        if store is None:
            store = self.open()
        elif not self.scenario.opening and len(self.descriptors()) > len(descriptors):
            self.problem(f"left open: {set(self.descriptors()) - set(descriptors)}")
        raised_name = None if raised is None else type(raised).__name__
        del raised
        if not store._closed:
            store.quota = UNLIMITED
            # As whoever offers pages does.
            store.attend()
            self.look_at(store, "the store that went on")
            self.write_again(store)
            store.close()
        return raised_name

    def judge(self, raised: Exception) -> None:
        """Every error is one that the caller can tell from the others by what is documented."""
        full = error_number in (28, 122)
        expected = (PageStoreFull,) if full else (PageStoreUnwritable, OSError)
        call = shim.faults_last().decode()
        if kinds == KINDS["changes"] and call != "unlink" and not isinstance(raised, expected):
            self.problem(f"{call} raised {raised!r}")

    @staticmethod
    def descriptors() -> list[str]:
        found = []
        for fd in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                found.append(os.readlink(f"/proc/self/fd/{fd}"))
        return found

    def look_at(self, store: PageStore, whose: str) -> None:
        scenario = self.scenario
        pages = sorted({*scenario.stored, *scenario.writes})
        there = [page for page in pages if key(page) in store]
        written = [page for page in scenario.writes if page in there]
        lost = set(scenario.stored) - set(there) - set(scenario.may_lose)
        if lost:
            self.outcome.lost += len(lost)
            self.problem(f"{whose} lost {sorted(lost)}")
        reader = reader_for(GEOMETRY)
        with store.pin([key(page) for page in there]) as pin:
            got = read(reader, [pin])
        reader.close()
        versions: dict[int, int | None] = {}
        for at, page in enumerate(there):
            rows = [got[0, layer, at] for layer in range(GEOMETRY.layers)]
            versions[page] = next((v for v in (0, 1) if rows == [components(page, layer, v) for layer in (0, 1)]), None)
            if versions[page] is None and None not in rows:
                self.outcome.wrong += 1
                self.problem(f"{whose} served a wrong page {page}")
            elif versions[page] is None and page not in scenario.may_lose:
                self.outcome.lost += 1
                self.problem(f"{whose} cannot read page {page}")
        if {versions.get(page) for page in scenario.writes} - {None} not in (set(), {0}, {1}):
            self.problem(f"{whose} has part of what was written: {versions}")
        if any(versions[page] == 1 for page in written) and len(written) < len(scenario.writes):
            self.problem(f"{whose} has {written} of {scenario.writes}")
        if store.stats.pages != len(there):
            self.problem(f"{whose} says it has {store.stats.pages} pages, and has {len(there)}")

    def write_again(self, store: PageStore) -> None:
        try:
            write(store, keys("again"))
        except Exception as error:
            self.problem(f"after {shim.faults_last().decode()} nothing can be written: {error!r}")
            return
        reader = reader_for(GEOMETRY)
        with store.pin(keys("again")) as pin:
            if None in read(reader, [pin]).values():
                self.problem("what is written afterwards cannot be read")
        reader.close()
        drop(store, key("again"))

    def look_again(self) -> None:
        """As the next process finds it, twice."""
        for whose in ("the store opened afterwards", "the store opened after that"):
            store = self.open()
            self.look_at(store, whose)
            sizes = [path.stat().st_size for path in (self.directory / "extents").iterdir()]
            if (store.stats.extents, store.stats.bytes) != (len(sizes), sum(sizes)):
                self.problem(f"{whose} says {store.stats}, and has {sizes}")
            if list((self.directory / "partial").iterdir()):
                self.problem(f"{whose} left something in partial")
            if store.stats.bad_extents:
                self.problem(f"{whose} found bad extents")
            erased = keys(*self.scenario.erases)
            if not store.erase(erased) or traces(self.directory, GEOMETRY, erased):
                self.problem(f"{whose} has not erased what it was told to")
            self.write_again(store)
            store.close()


def components(page: int, layer: int, version: int) -> list[bytes]:
    return [content(GEOMETRY, key(page), layer, c, version) for c in range(len(GEOMETRY.component_bytes))]


def forked(act: Callable[[], Any]) -> tuple[int, Any]:
    """The exit status of a process that did this, and what it returned."""
    source, sink = os.pipe()
    child = os.fork()
    if not child:
        os.close(source)
        try:
            os.write(sink, json.dumps(act()).encode())
        except BaseException as error:
            os.write(sink, json.dumps({"problems": [f"{type(error).__name__}: {error}"]}).encode())
            os._exit(1)
        os._exit(0)
    os.close(sink)
    with open(source, "rb") as pipe:
        raw = pipe.read()
    return os.waitpid(child, 0)[1], json.loads(raw) if raw else None


def disturb(root: Path, name: str, mode: int) -> Outcome:
    outcome = Outcome()
    scenario = SCENARIOS[name]
    base, work = root / "base", root / "work"
    store = PageStore(base, MARK, GEOMETRY, codec=CODEC)
    for extent in EXTENTS:
        write(store, keys(*extent))
    store.close()
    scenario.prepare(base)

    for at in range(1, 10_000):
        shutil.rmtree(work, ignore_errors=True)
        if base.exists():
            shutil.copytree(base, work)

        def act(at: int = at) -> dict[str, Any]:
            run = Run(name, work, Outcome())
            raised = run.act(lambda: shim.faults_arm(mode, kinds, at, error_number))
            last = shim.faults_last().decode()
            return {**asdict(run.outcome), "call": last, "error": raised}

        status, result = forked(act)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if not killed and result is None:
            outcome.problems.append(f"{at}: ended with status {status}")
        if result is not None:
            outcome.lost += result.get("lost", 0)
            outcome.wrong += result.get("wrong", 0)
            outcome.problems += [f"{at}, {result.get('call')}: {problem}" for problem in result["problems"]]
        run = Run(name, work, outcome)
        before = len(outcome.problems)
        run.look_again()
        call = "SIGKILL" if killed else (result or {}).get("call")
        outcome.problems[before:] = [f"{at}, {call}: {problem}" for problem in outcome.problems[before:]]
        if not call:
            return outcome
        outcome.injected += 1
        outcome.at[call] = outcome.at.get(call, 0) + 1
        if not killed and result and result.get("error"):
            outcome.raised[result["error"]] = outcome.raised.get(result["error"], 0) + 1
    raise AssertionError("the operation has no end")


if __name__ == "__main__":
    logging.disable()
    kinds, error_number = KINDS[sys.argv[4]], int(sys.argv[5])
    print(json.dumps(asdict(disturb(Path(sys.argv[1]), sys.argv[2], MODES[sys.argv[3]]))))
