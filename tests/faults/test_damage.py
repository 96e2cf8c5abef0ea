"""Files that are not as they were left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from agentstate.errors import FingerprintMismatch
from agentstate.pages import Geometry, PageStore, Quota, fingerprint
from agentstate.pages.extent import PREFIX
from agentstate.pages.testing.pages import MARK, expected, key, keys, read, reader_for, write

HERE = Path(__file__).parent
GEOMETRY = Geometry(layers=2, page_size=4, component_bytes=(600, 500))
DAMAGED, OTHERS = keys(1, 2, 3), keys(4, 5)


@pytest.fixture
def store(directory: Path) -> PageStore:
    store = PageStore(directory / "rank0", MARK, GEOMETRY)
    write(store, DAMAGED)
    write(store, OTHERS)
    return store


def readable(store: PageStore) -> set[bytes]:
    """The pages that are found and verified; every one of them is as it was written."""
    found = [page for page in (*DAMAGED, *OTHERS) if page in store]
    reader = reader_for(GEOMETRY)
    with store.pin(found) as pin:
        got, right = read(reader, [pin]), expected(GEOMETRY, [pin])
    reader.close()
    refused = set()
    for place, components in got.items():
        if components is None:
            refused.add(found[place[2]])
        else:
            assert components == right[place], "a wrong page was served"
    return set(found) - refused


def test_a_flipped_bit_costs_the_pages_that_it_concerns(store: PageStore, counted: Counter[str]) -> None:
    with store.pin(DAMAGED) as pin:
        (segment,) = pin.segments
    path, layout = segment.extent.path, segment.extent.layout
    raw = path.read_bytes()
    header = PREFIX.size + PREFIX.unpack_from(raw)[2]
    of_slab: dict[int, bytes | None] = {at: None for at in range(header, len(raw))}
    for layer in range(GEOMETRY.layers):
        for component in range(2):
            for slot, page in enumerate(DAMAGED):
                start, length = layout.component_range(layer, component, slot, 1)
                of_slab |= dict.fromkeys(range(start, start + length), page)
    # Every bit of the prefix, every byte of the header (its keys and sums too), and many of the slabs and the padding.
    places = [(at, bit) for at in range(PREFIX.size) for bit in range(8)]
    places += [(at, at % 8) for at in range(PREFIX.size, header)] + [(at, 3) for at in range(header, len(raw), 97)]
    with path.open("r+b", buffering=0) as file:
        for at, bit in places:
            os.pwrite(file.fileno(), bytes([raw[at] ^ 1 << bit]), at)
            lost = {*DAMAGED, *OTHERS} - readable(store)
            if at < header:
                assert lost == set(DAMAGED), at
            else:
                page = of_slab[at]
                assert lost == (set() if page is None else {page}), at
            os.pwrite(file.fileno(), raw[at : at + 1], at)
    assert readable(store) == {*DAMAGED, *OTHERS}
    counted["flipped bits"] += len(places)
    store.close()


@pytest.mark.parametrize("reopened", [False, True], ids=["open", "opened again"])
def test_a_truncated_extent_costs_its_own_pages(directory: Path, reopened: bool, counted: Counter[str]) -> None:
    store = PageStore(directory / "base", MARK, GEOMETRY)
    write(store, DAMAGED)
    write(store, OTHERS)
    store.close()
    (first, _) = sorted((store.directory / "extents").iterdir())
    size = first.stat().st_size
    for length in [0, 1, 23, 24, 100, 4095, 4096, 5000, size - 4096, size - 1]:
        copy = directory / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(store.directory, copy)
        again = PageStore(copy, MARK, GEOMETRY)
        if reopened:
            again.close()
        os.truncate(copy / "extents" / first.name, length)
        if reopened:
            again = PageStore(copy, MARK, GEOMETRY)
            assert again.stats.bad_extents == 1
        # The padding at the end of the last slab belongs to no page.
        if reopened or length < size - 4096:
            assert readable(again) == set(OTHERS)
        else:
            assert readable(again) >= set(OTHERS)
        write(again, DAMAGED)
        assert readable(again) == {*DAMAGED, *OTHERS}
        again.close()
        counted["truncated extents"] += 1


def test_a_spoiled_index_does_not_end_one_process_after_the_other(directory: Path, counted: Counter[str]) -> None:
    trials = int(os.environ.get("INDEX_TRIALS", "20"))
    run = subprocess.run(
        [sys.executable, HERE / "garbage.py", directory, "1", str(trials)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    outcome = json.loads(run.stdout.splitlines()[-1])
    assert outcome["failed"] == [], run.stdout
    assert set(outcome["processes"]) <= {"1", "2", "3"}
    counted["spoiled indexes"] += trials


def test_a_clock_that_jumps_changes_neither_the_order_of_eviction_nor_a_pin(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PageStore(directory / "rank0", MARK, GEOMETRY)
    for number, now_s in enumerate([2e9, 1e9, 3e9, 0.0]):
        monkeypatch.setattr(time, "time", lambda now_s=now_s: now_s)
        monkeypatch.setattr(time, "time_ns", lambda now_s=now_s: int(now_s * 1e9))
        write(store, keys(number))
        # The times of files follow the clock too.
        (path,) = {segment.extent.path for segment in store.pin(keys(number)).segments}
        os.utime(path, (now_s, now_s))
    store.close()
    store = PageStore(directory / "rank0", MARK, GEOMETRY)
    one = store.draft_bytes(1)
    assert store.prefix_length(keys(0)) == 1
    store.retain(keys(1), time.monotonic() + 3600.0)
    monkeypatch.setattr(time, "time", lambda: 9e9)
    left = []
    for pages in (3, 2, 1):
        store.quota = Quota(max_bytes=pages * one)
        store.make_room(0)
        left.append([number for number in range(4) if key(number) in store])
    store.close()
    # 2 and 3 were not used since, 0 was, and 1 is pinned.
    assert left == [[0, 1, 3], [0, 1], [1]]


def test_pages_of_another_fingerprint_are_never_seen(store: PageStore, directory: Path) -> None:
    other = fingerprint(model="another")
    beside = PageStore(directory / "rank1", other, GEOMETRY)
    assert [page for page in DAMAGED if page in beside] == []
    beside.close()
    # Also where a file was moved by hand, or the whole directory was.
    (stray, _) = sorted((store.directory / "extents").iterdir())
    shutil.copy(stray, directory / "rank1" / "extents" / stray.name)
    with pytest.raises(FingerprintMismatch):
        PageStore(directory / "rank1", other, GEOMETRY)
    store.close()
    with pytest.raises(FingerprintMismatch):
        PageStore(store.directory, other, GEOMETRY)
    store = PageStore(store.directory, MARK, GEOMETRY)
    assert readable(store) == {*DAMAGED, *OTHERS}
    store.close()
