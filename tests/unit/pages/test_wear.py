"""How much is written in a day, by a clock that the tests set."""

from __future__ import annotations

import json
import mmap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from contents import MARK, MLA, keys, reader_for, write

from agentstate.pages import PageStore, Space, merge, wear
from agentstate.pages.wear import Wear

NOW = 2_000_000_000.0
PATIENCE_S = 60.0


class Clock:
    now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "pages" / "writes-rank0.json"


def test_what_was_written_a_day_ago_does_not_count(clock: Clock) -> None:
    counted = Wear(clock=clock)
    counted.wrote(5)
    clock.now += 12 * 3600
    counted.wrote(7)
    assert counted.bytes_written == 12
    clock.now += 12 * 3600 + 1200
    assert counted.bytes_written == 7
    clock.now += 12 * 3600
    assert counted.bytes_written == 0


def test_the_budget_is_spent_until_enough_of_it_was_a_day_ago(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    counted = Wear(budget=100, clock=clock)
    counted.wrote(60)
    clock.now += 3600
    assert counted.until_s() is None and not counted.spent()
    counted.wrote(60)
    until_s = counted.until_s()
    assert until_s is not None and NOW + 24 * 3600 < until_s <= NOW + 24 * 3600 + 1200
    assert counted.spent() and counted.spent()
    assert len(caplog.records) == 1 and "120 bytes" in caplog.text
    clock.now = until_s - 1
    assert counted.spent()
    clock.now = until_s
    assert not counted.spent()
    counted.wrote(60)
    assert counted.spent()
    assert len(caplog.records) == 2


def test_the_count_survives_and_several_add_to_it(clock: Clock, file: Path) -> None:
    first, second = Wear(file, clock=clock), Wear(file, clock=clock)
    first.wrote(5)
    second.wrote(7)
    first.save()
    second.save()
    assert second.bytes_written == 12
    first.wrote(1)
    first.save()
    assert (first.bytes_written, Wear(file, clock=clock).bytes_written) == (13, 13)
    assert file.stat().st_mode & 0o077 == 0


def test_a_running_store_notes_what_it_writes_each_minute(
    clock: Clock, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Wear(file, clock=clock)
    counted.wrote(5)
    assert not file.exists()
    monkeypatch.setattr(wear, "_SAVED_EVERY_S", 0.0)
    counted.wrote(5)
    assert Wear(file, clock=clock).bytes_written == 10


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\xff\x00",
        b"[]",
        b"7",
        b"[" * 50_000,
        b'{"step_s": 600}',
        b'{"step_s": 600, "written": {"a": 1}}',
        b'{"step_s": 600, "written": {"3333333": "1"}}',
        b'{"step_s": 600, "written": {"3333333": -5}}',
        b'{"step_s": 600, "written": {"3333333": 1e300}}',
        b'{"step_s": 600, "written": {"3333399": 9}}',
    ],
)
def test_a_damaged_count_is_made_anew(clock: Clock, file: Path, damage: bytes) -> None:
    file.parent.mkdir()
    file.write_bytes(damage)
    counted = Wear(file, clock=clock)
    assert counted.bytes_written == 0
    counted.wrote(5)
    counted.save()
    assert Wear(file, clock=clock).bytes_written == 5
    assert json.loads(file.read_bytes())["written"] == {"3333333": 5}


def test_a_count_that_cannot_be_written_keeps_nobody_from_writing(clock: Clock, file: Path) -> None:
    file.parent.write_text("no directory")
    counted = Wear(file, clock=clock)
    counted.wrote(5)
    counted.save()
    assert counted.bytes_written == 5


def test_a_count_that_is_deleted_is_noted_again(clock: Clock, file: Path) -> None:
    counted = Wear(file, clock=clock)
    counted.wrote(5)
    counted.save()
    file.unlink()
    counted.wrote(7)
    counted.save()
    assert Wear(file, clock=clock).bytes_written == 12


def test_a_drive_that_hangs_holds_up_nobody_who_asks(clock: Clock, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs, answers = threading.Event(), threading.Event()

    def hang(directory: Path) -> None:
        hangs.set()
        assert answers.wait(PATIENCE_S)
        directory.mkdir(exist_ok=True)

    monkeypatch.setattr(wear, "make_directory", hang)
    counted = Wear(file, budget=10, clock=clock)
    counted.wrote(5)
    with ThreadPoolExecutor(2) as threads:
        saving = threads.submit(counted.save)
        assert hangs.wait(PATIENCE_S)
        try:
            assert threads.submit(counted.spent).result(PATIENCE_S) is False
            threads.submit(counted.wrote, 7).result(PATIENCE_S)
        finally:
            answers.set()
        saving.result()
    assert (counted.bytes_written, Wear(file, clock=clock).bytes_written) == (12, 5)
    counted.save()
    assert (counted.bytes_written, Wear(file, clock=clock).bytes_written) == (12, 12)


def test_all_that_a_store_writes_counts(tmp_path: Path) -> None:
    space = Space(root=tmp_path)
    store = PageStore(tmp_path / MARK.hex()[:32] / "rank0", MARK, MLA, space=space)
    for number in range(4):
        write(store, keys(number))
    written = 4 * store.draft_bytes(1)
    assert space.wear.bytes_written == written
    reader = reader_for(MLA)
    assert merge(store, reader, keys(0, 1, 2, 3), mmap.mmap(-1, store.draft_bytes(4)), 4 * MLA.layer_bytes) == 4
    reader.close()
    written += store.draft_bytes(4)
    assert space.wear.bytes_written == written
    assert store.erase(keys(2))
    written += store.draft_bytes(3)
    assert space.wear.bytes_written == written
    store.close()
    assert Space(root=tmp_path).wear.bytes_written == written
