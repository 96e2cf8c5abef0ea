from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentstate.errors import BadExtent, PageStoreLocked
from agentstate.pages import Geometry, PageStore, inventory, rewriting
from agentstate.pages.files import read_header

MARK = bytes(range(32))
GEOMETRY = Geometry(layers=3, page_size=4, component_bytes=(1000, 600))


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two extents, of the pages 0 to 4 and 5 to 7, below ``tmp_path``."""
    directory = tmp_path / MARK.hex()[:32] / "rank0"
    with_pages = PageStore(directory, MARK, GEOMETRY)
    for numbers in (range(5), range(5, 8)):
        keys = [key(number) for number in numbers]
        draft = with_pages.draft(keys, mmap.mmap(-1, with_pages.draft_bytes(len(keys))))
        for layer in range(GEOMETRY.layers):
            for component in range(2):
                shape = draft.component(layer, component).shape
                draft.component(layer, component)[:] = np.random.default_rng(layer).integers(0, 256, shape)
        with_pages.publish(draft)
    with_pages.close()
    return directory


def flip(path: Path, layer: int, slot: int) -> None:
    offset, _ = read_header(path).layout.component_range(layer, 1, slot, 1)
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


def test_a_good_store_is_good(store: Path, tmp_path: Path) -> None:
    assert inventory.store_directories(tmp_path) == [store]
    assert [report.good for report in inventory.check(store)] == [True, True]


def test_check_names_exactly_the_broken_pages(store: Path) -> None:
    first, second = sorted((store / "extents").iterdir())
    flip(first, 2, 1)
    flip(first, 0, 3)
    reports = list(inventory.check(store))
    assert [(report.path, report.broken) for report in reports] == [(first, (1, 3)), (second, ())]


def test_repair_drops_exactly_the_broken_pages(store: Path) -> None:
    first, _ = sorted((store / "extents").iterdir())
    flip(first, 1, 2)
    assert inventory.repair(store, [report for report in inventory.check(store) if not report.good]) == 1
    assert all(report.good for report in inventory.check(store))
    again = PageStore(store, MARK, GEOMETRY)
    assert [number for number in range(8) if key(number) in again] == [0, 1, 3, 4, 5, 6, 7]
    again.close()


def test_repair_deletes_what_cannot_be_read(store: Path) -> None:
    first, second = sorted((store / "extents").iterdir())
    second.write_bytes(second.read_bytes()[:5000])
    inventory.repair(store, [report for report in inventory.check(store) if not report.good])
    assert list((store / "extents").iterdir()) == [first]


def test_repair_leaves_what_another_release_reads(store: Path) -> None:
    first, second = sorted((store / "extents").iterdir())
    newer = bytearray(second.read_bytes())
    newer[8] = 6
    second.write_bytes(newer)
    (bad,) = [report for report in inventory.check(store) if not report.good]
    assert bad.foreign and bad.damage == f"{second.name}: format version 6; this release reads 2 to 5"
    inventory.repair(store, [bad])
    assert second.read_bytes() == newer and first.exists()


def test_repair_waits_for_no_running_engine(store: Path) -> None:
    first, _ = sorted((store / "extents").iterdir())
    flip(first, 0, 0)
    engine = PageStore(store, MARK, GEOMETRY)
    with pytest.raises(PageStoreLocked):
        inventory.repair(store, [report for report in inventory.check(store) if not report.good])
    engine.close()


def test_a_block_that_cannot_be_read_costs_its_own_page_only(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = sorted((store / "extents").iterdir())
    bad, _ = read_header(first).layout.component_range(1, 0, 2, 1)
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset <= bad < offset + sum(len(buffer) for buffer in buffers):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    reports = list(inventory.check(store))
    # The second extent has something else at that offset, and the disk is bad there too.
    assert reports[0].broken == (2,)
    assert inventory.repair(store, reports[:1]) == 1
    monkeypatch.undo()
    assert [len(report.header.keys) for report in inventory.extents(store) if report.header] == [3, 4]


def test_an_extent_is_found_by_its_number_its_path_and_a_key(store: Path, tmp_path: Path) -> None:
    first, second = sorted((store / "extents").iterdir())
    for name in ("2", "0000000000000002", "0000000000000002.ext", str(second)):
        assert [(report.path, slot) for report, slot in inventory.holding(tmp_path, name)] == [(second, None)]
    found = inventory.holding(tmp_path, key(6).hex())
    assert [(report.path, slot) for report, slot in found] == [(second, 1)]
    prefixed = list(inventory.holding(tmp_path, key(0).hex()[:20]))
    assert [(report.path, slot) for report, slot in prefixed] == [
        *((first, slot) for slot in range(5)),
        *((second, slot) for slot in range(3)),
    ]
    assert list(inventory.holding(tmp_path, "ffffffffff")) == []


def test_usage_accounts_for_every_byte_of_an_extent(store: Path) -> None:
    first, second = sorted((store / "extents").iterdir())
    usage = inventory.usage(store)
    assert (usage.live, usage.superseded, usage.unreadable, usage.partial) == (8 * GEOMETRY.page_bytes, 0, 0, 0)
    assert usage.live + usage.overhead == first.stat().st_size + second.stat().st_size
    # The pages of the second extent once more, in a third one.
    second.with_name(f"{9:016x}.ext").write_bytes(second.read_bytes())
    (store / "partial" / "left.ext").write_bytes(bytes(5000))
    first.write_bytes(first.read_bytes()[:-1])
    usage = inventory.usage(store)
    assert (usage.live, usage.superseded) == (3 * GEOMETRY.page_bytes, 3 * GEOMETRY.page_bytes)
    assert usage.unreadable == first.stat().st_size
    assert usage.partial >= 5000


@given(st.sets(st.integers(0, 7)))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_a_chain_needs_is_kept_and_a_dry_run_says_the_same(store: Path, needed: set[int]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "rank0"
        shutil.copytree(store, copy)
        chains = [[key(number)] for number in needed]
        planned = inventory.collectable(copy, chains)
        before = sum(report.n_bytes for report in inventory.extents(copy))
        assert inventory.collect(copy, lambda: chains) == planned
        left = {bytes(page) for report in inventory.extents(copy) if report.header for page in report.header.keys}
        kept = [numbers for numbers in (set(range(5)), set(range(5, 8))) if numbers & needed]
        assert left == {key(number) for numbers in kept for number in numbers}
        assert planned.freed_bytes + planned.left_bytes == before
        assert planned.left_bytes == sum(report.n_bytes for report in inventory.extents(copy))


def test_collecting_asks_for_the_chains_once_no_engine_can_write(store: Path) -> None:
    def needed() -> list[list[bytes]]:
        with pytest.raises(PageStoreLocked):
            PageStore(store, MARK, GEOMETRY)
        return []

    assert inventory.collect(store, needed).left_bytes == 0


def test_a_store_is_known_by_its_extents_and_its_directory(store: Path, tmp_path: Path) -> None:
    assert inventory.identity(store) == (MARK.hex(), 0)
    for extent in (store / "extents").iterdir():
        extent.write_bytes(b"")
    assert inventory.identity(store) is None
    with pytest.raises(BadExtent, match="check --repair"):
        inventory.collect(store, list)


def test_repair_seals_nothing_that_it_read_wrong(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that gives back something else at the second time: it would count as right for good."""
    first, _ = sorted((store / "extents").iterdir())
    flip(first, 2, 1)
    reports = list(inventory.check(store))
    real, reads = rewriting.read_at, list[int]()

    def wrong(file: BinaryIO, into: memoryview, offset: int) -> None:
        real(file, into, offset)
        into[-1] ^= 1
        reads.append(offset)

    monkeypatch.setattr(rewriting, "read_at", wrong)
    before = first.read_bytes()
    with pytest.raises(OSError, match="read"):
        inventory.repair(store, reports)
    monkeypatch.undo()
    assert reads and first.read_bytes() == before
    assert inventory.repair(store, list(inventory.check(store))) == 1
    assert all(report.good for report in inventory.check(store))
