"""Overwrites parts of an index and opens the store in one process after the other, until one gets along with it.

garbage.py DIRECTORY SEED TRIALS     prints one JSON object: how many trials needed how many processes, and what was
                                     lost, wrong or without an end
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from agentstate.pages import Geometry, PageStore
from agentstate.pages.testing.pages import MARK, drop, expected, keys, read, reader_for, write

GEOMETRY = Geometry(layers=1, page_size=1, component_bytes=(64,))
PAGES = 1500
NAMES = keys(*range(PAGES))
DROPPED = set(NAMES[::7])
BLOCK = 4096


def build(directory: Path) -> None:
    store = PageStore(directory, MARK, GEOMETRY)
    for first in range(0, PAGES, 30):
        write(store, NAMES[first : first + 30])
    drop(store, *sorted(DROPPED))
    store.close()


def work(directory: Path) -> None:
    """What an engine does with a store."""
    store = PageStore(directory, MARK, GEOMETRY)
    found = [name for name in NAMES if name in store]
    assert {*NAMES} - {*found} <= DROPPED, "lost"
    reader = reader_for(GEOMETRY)
    with store.pin(found) as pin:
        assert read(reader, [pin]) == expected(GEOMETRY, [pin]), "wrong"
    reader.close()
    write(store, keys("new"))
    drop(store, NAMES[9])
    store.close()


def spoil(index: Path, chance: random.Random) -> str:
    raw = bytearray(index.read_bytes())
    how = chance.choice(
        ["a block of garbage", "a block of zeros", "flipped bits", "garbage all over", "garbage from here"]
    )
    start = chance.randrange(len(raw) // BLOCK) * BLOCK
    if how == "a block of garbage":
        raw[start : start + BLOCK] = chance.randbytes(BLOCK)
    elif how == "a block of zeros":
        raw[start : start + BLOCK] = bytes(BLOCK)
    elif how == "flipped bits":
        for _ in range(20):
            raw[start + chance.randrange(40)] ^= 1 << chance.randrange(8)
    elif how == "garbage all over":
        raw[:] = chance.randbytes(len(raw))
    else:
        raw[start:] = chance.randbytes(len(raw) - start)
    index.write_bytes(raw)
    return how


def status_of(act: Callable[[], None]) -> int:
    child = os.fork()
    if not child:
        # LMDB's last words, and Python's.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            act()
        except BaseException as error:
            os.write(1, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


if __name__ == "__main__":
    logging.disable()
    root, chance = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    build(root / "base")
    processes: Counter[int] = Counter()
    failed = []
    for trial in range(int(sys.argv[3])):
        directory = root / str(trial)
        shutil.copytree(root / "base", directory)
        how = spoil(directory / "index" / "data.mdb", chance)
        ends = []
        for _ in range(4):
            ends.append(status_of(partial(work, directory)))
            if not ends[-1] or not os.WIFSIGNALED(ends[-1]):
                break
        processes[len(ends)] += 1
        if ends[-1]:
            failed.append(f"{trial}, {how}: {ends}")
        shutil.rmtree(directory)
    print(json.dumps({"processes": processes, "failed": failed}))
