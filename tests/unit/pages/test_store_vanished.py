"""What becomes of an open store whose directory is deleted, replaced or made read-only."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import lmdb
import pytest
from contents import MARK, MLA, drop, expected, key, keys, read, reader_for, write

from agentstate.errors import FingerprintMismatch, PageStoreError, PageStoreFull, PageStoreLocked, PageStoreUnwritable
from agentstate.pages import PageStore, Quota, fingerprint
from agentstate.pages.eviction import ANYONE
from agentstate.pages.index import PageIndex


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PageStore]:
    store = PageStore(tmp_path / "fingerprint" / "rank0", MARK, MLA)
    for number in range(3):
        write(store, keys(2 * number, 2 * number + 1))
    yield store
    store.close()


def left(store: PageStore) -> list[int]:
    return [number for number in range(12) if key(number) in store]


def assert_right(store: PageStore, *numbers: int, version: int = 0) -> None:
    reader = reader_for(MLA)
    with store.pin(keys(*numbers)) as pin:
        assert read(reader, [pin]) == expected(MLA, [pin], version)
    reader.close()


def assert_works(store: PageStore, *numbers: int) -> None:
    """What is left is ``numbers``, and storing goes on, also for a process that comes later."""
    assert left(store) == list(numbers)
    assert_right(store, *numbers)
    write(store, keys(10, 11))
    assert left(store) == [*numbers, 10, 11]
    store.close()
    again = PageStore(store.directory, MARK, MLA)
    assert left(again) == [*numbers, 10, 11]
    assert_right(again, *numbers, 10, 11)
    assert (again.stats.pages, again.stats.bad_extents) == (len(numbers) + 2, 0)
    again.close()


WAYS: dict[str, tuple[Callable[[Path], object], tuple[int, ...]]] = {
    "everything": (shutil.rmtree, ()),
    "everything above it": (lambda directory: shutil.rmtree(directory.parent), ()),
    "its extents": (lambda directory: shutil.rmtree(directory / "extents"), ()),
    "its index": (lambda directory: shutil.rmtree(directory / "index"), (0, 1, 2, 3, 4, 5)),
    "the file of its index": (lambda directory: (directory / "index" / "data.mdb").unlink(), (0, 1, 2, 3, 4, 5)),
    "its lock": (lambda directory: (directory / "lock").unlink(), (0, 1, 2, 3, 4, 5)),
    "what is inside": (lambda directory: [shutil.rmtree(directory / name) for name in ("extents", "index")], ()),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("noticed_by", ["attending", "writing", "asking for room"])
def test_what_was_deleted_is_made_again_and_storing_goes_on(
    store: PageStore, way: str, noticed_by: str, caplog: pytest.LogCaptureFixture
) -> None:
    delete, numbers = WAYS[way]
    delete(store.directory)
    caplog.set_level(logging.INFO)
    if noticed_by == "attending":
        store.attend()
    elif noticed_by == "asking for room":
        store.require_room(1)
    else:
        write(store, keys(8, 9))
        numbers = (*numbers, 8, 9)
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(errors) == 1 and str(store.directory) in errors[0] and "deleted or replaced" in errors[0]
    assert not any(record.exc_info for record in caplog.records)
    assert store.stats.pages == len(numbers)
    assert store.stats.pages_vanished == (0 if 0 in numbers else 6)
    assert ANYONE in store.take_losers()
    store.attend()
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == 1
    assert_works(store, *numbers)


def test_what_was_only_being_written_to_is_made_again_without_a_word(
    store: PageStore, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(store.directory / "partial")
    store.attend()
    assert not caplog.records
    assert_works(store, 0, 1, 2, 3, 4, 5)


def test_an_intact_directory_is_left_alone(store: PageStore, caplog: pytest.LogCaptureFixture) -> None:
    store.attend()
    drop(store, key(1))
    store.attend()
    assert not caplog.records
    assert_works(store, 0, 2, 3, 4, 5)


def test_a_store_that_took_its_place_is_opened(store: PageStore, tmp_path: Path) -> None:
    """What is served is what is there, whatever was there before."""
    other = PageStore(tmp_path / "other" / "rank0", MARK, MLA)
    write(other, keys(7))
    write(other, keys(3), version=1)
    other.close()
    pin = store.pin(keys(0, 1, 2))
    shutil.rmtree(store.directory)
    other.directory.rename(store.directory)
    store.attend()
    assert left(store) == [3, 7]
    assert_right(store, 3, version=1)
    pin.close()
    write(store, keys(3))
    assert_works(store, 3, 7)


def test_pages_of_another_model_that_took_its_place_are_never_served(store: PageStore, tmp_path: Path) -> None:
    other = PageStore(tmp_path / "other" / "rank0", fingerprint(model="another"), MLA)
    write(other, keys(1))
    other.close()
    shutil.rmtree(store.directory)
    shutil.copytree(other.directory, store.directory)
    with pytest.raises(FingerprintMismatch):
        store.attend()
    with pytest.raises(FingerprintMismatch):
        write(store, keys(8))
    assert left(store) == [] and store.stats.pages == 0
    shutil.rmtree(store.directory)
    assert store.stored(keys(1)) == [False]
    write(store, keys(8))
    assert_works(store, 8)


def test_another_process_may_have_taken_the_new_directory(store: PageStore, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(store.directory)
    store.directory.mkdir()
    with open(store.directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for _ in range(2):
            with pytest.raises(PageStoreLocked):
                write(store, keys(8))
            assert left(store) == []
            with pytest.raises(KeyError):
                store.pin(keys(1))
        assert not caplog.records
    write(store, keys(8))
    assert_works(store, 8)


def test_a_directory_that_cannot_be_made_again_may_come_back(store: PageStore, tmp_path: Path) -> None:
    away = tmp_path / "away"
    store.directory.parent.rename(away)
    store.directory.parent.write_text("a file")
    with pytest.raises(PageStoreUnwritable):
        store.attend()
    with pytest.raises(PageStoreUnwritable):
        write(store, keys(8))
    assert left(store) == []
    store.directory.parent.unlink()
    away.rename(store.directory.parent)
    store.attend()
    assert_works(store, 0, 1, 2, 3, 4, 5)


def test_pins_and_needs_hold_through_it(store: PageStore) -> None:
    pin = store.pin(keys(0, 1))
    store.need(keys(2))
    store.retain(keys(4), time.monotonic() + 3600.0)
    shutil.rmtree(store.directory / "index")
    store.attend()
    store.collect()
    assert left(store) == [0, 1, 2, 3, 4, 5]
    reader = reader_for(MLA)
    assert read(reader, [pin]) == expected(MLA, [pin])
    reader.close()
    pin.close()
    store.quota = Quota(max_bytes=0)
    with pytest.raises(PageStoreFull):
        store.make_room(0)
    assert store.collect() > 0
    assert left(store) == [2, 3, 4, 5]


def test_what_was_dropped_and_not_noted_stays_dropped(store: PageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(PageIndex, "change", full_index)
        assert drop(store, key(1)) == 1
    assert left(store) == [0, 2, 3, 4, 5]
    (store.directory / "lock").unlink()
    store.attend()
    assert left(store) == [0, 2, 3, 4, 5] and store.stats.pages == 5
    write(store, keys(8))
    assert_works(store, 0, 2, 3, 4, 5, 8)


def test_an_index_that_turns_out_damaged_while_it_is_written_is_made_anew(
    store: PageStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    change = PageIndex.change
    failing = iter([lmdb.CorruptedError("mdb_put: MDB_CORRUPTED: Located page was wrong type")])

    def damaged(index: PageIndex) -> object:
        for error in failing:
            raise error
        return change(index)

    monkeypatch.setattr(PageIndex, "change", damaged)
    write(store, keys(8, 9))
    assert not any(record.exc_info for record in caplog.records)
    assert store.stats.pages_written == 8
    assert_works(store, 0, 1, 2, 3, 4, 5, 8, 9)


def test_a_file_system_that_takes_nothing_any_more_costs_nothing_that_is_stored(
    store: PageStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store.quota = Quota(store.stats.bytes)
    with monkeypatch.context() as patch:
        patch.setattr(PageIndex, "change", full_index)
        patch.setattr(os, "open", read_only(os.open))
        for name in ("unlink", "rename", "mkdir"):
            patch.setattr(Path, name, refuse)
        for _ in range(2):
            with pytest.raises(OSError, match="Read-only"):
                write(store, keys(8))
            with pytest.raises(OSError, match="Read-only"):
                store.make_room(1)
        assert left(store) == [0, 1, 2, 3, 4, 5]
        assert_right(store, 0, 1, 2, 3, 4, 5)
        assert store.stats.pages_evicted == 0
    assert not any(record.exc_info for record in caplog.records)
    write(store, keys(8))
    store.quota = Quota()
    assert_works(store, 2, 3, 4, 5, 8)


def test_an_engine_that_starts_waits_for_whoever_evicts_from_its_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "rank0"
    directory.mkdir()
    lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    waits = []

    def evicted(seconds: float) -> None:
        """The other one deletes the empty store, and lets go of the lock that is none any more."""
        if not waits:
            shutil.rmtree(directory)
            os.close(lock)
        waits.append(seconds)

    monkeypatch.setattr(time, "sleep", evicted)
    store = PageStore(directory, MARK, MLA)
    assert len(waits) == 1
    write(store, keys(1))
    with pytest.raises(PageStoreLocked):
        PageStore(directory, MARK, MLA)
    store.close()


def test_every_error_is_one_of_the_page_store(store: PageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "stat", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(PageStoreError):
        store.attend()
    monkeypatch.undo()
    assert_works(store, 0, 1, 2, 3, 4, 5)


def full_index(index: PageIndex) -> object:
    raise lmdb.DiskError("mdb_txn_commit: Read-only file system")


def refuse(*_: object, **more: object) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def read_only(real: Callable[..., int]) -> Callable[..., int]:
    def open(path: object, flags: int, *mode: int, **more: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            refuse()
        return real(path, flags, *mode, **more)

    return open
