from __future__ import annotations

import json
import mmap
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from agentstate.cli import app
from agentstate.errors import PageStoreLocked
from agentstate.pages import Geometry, PageStore, inventory
from agentstate.pages.files import read_header

MARK = bytes(range(32))
GEOMETRY = Geometry(layers=3, page_size=4, component_bytes=(1000, 600))


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two extents, of the pages 0 to 4 and 5 to 7, below ``tmp_path``."""
    directory = tmp_path / "fingerprint" / "rank0"
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


def test_repair_waits_for_no_running_engine(store: Path) -> None:
    first, _ = sorted((store / "extents").iterdir())
    flip(first, 0, 0)
    engine = PageStore(store, MARK, GEOMETRY)
    with pytest.raises(PageStoreLocked):
        inventory.repair(store, [report for report in inventory.check(store) if not report.good])
    engine.close()


def test_the_commands(store: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    listed = json.loads(runner.invoke(app, ["pages", "ls", "--json", "--dir", str(tmp_path)]).stdout)
    assert [(row["extents"], row["pages"], row["tokens"]) for row in listed] == [(2, 8, 32)]
    first, _ = sorted((store / "extents").iterdir())
    flip(first, 0, 4)
    broken = runner.invoke(app, ["pages", "check", "--json", "--dir", str(tmp_path)])
    assert broken.exit_code == 1
    assert json.loads(broken.stdout)["broken"] == [
        {"extent": str(first), "damage": None, "broken_pages": [key(4).hex()]}
    ]
    repaired = runner.invoke(app, ["pages", "check", "--repair", "--json", "--dir", str(tmp_path)])
    assert (repaired.exit_code, json.loads(repaired.stdout)["pages_dropped"]) == (0, 1)
    assert runner.invoke(app, ["pages", "check", "--dir", str(tmp_path)]).exit_code == 0
