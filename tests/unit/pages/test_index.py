from __future__ import annotations

from pathlib import Path

import pytest
from contents import MARK, MLA, expected, key, keys, read, reader_for, write

from agentstate.pages import PageStore, fingerprint
from agentstate.pages.index import ExtentRecord, PageIndex, Run
from agentstate.pages.keys import PageKeys

BOTH = Run(number=5, slot=0, pages=2, first=0)
RECORD = ExtentRecord(pages=3, live=2, file_bytes=4096, mtime_ns=1 << 60, used=7)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An index with two pages of one extent."""
    index = PageIndex(tmp_path / "index", MARK, MLA)
    with index.change() as change:
        change.put(5, {page: slot for slot, page in enumerate(keys(1, 2))})
        change.record(5, RECORD)
    index.close()
    return tmp_path / "index"


def runs(index: PageIndex, *names: int) -> list[Run]:
    return index.runs(PageKeys.of(keys(*names)))


def pages(directory: Path, mark: bytes = MARK) -> list[Run]:
    index = PageIndex(directory, mark, MLA)
    found = runs(index, 1, 2, 3)
    index.close()
    return found


def test_what_was_changed_is_found_again(directory: Path) -> None:
    assert pages(directory) == [BOTH]
    index = PageIndex(directory, MARK, MLA)
    assert index.records() == {5: RECORD}
    assert index.numbers(keys(9, 2)) == {5}
    assert runs(index, 9, 2) == []
    assert index.places(keys(9, 2, 1)) == [None, (5, 1), (5, 0)]
    with index.change() as change:
        assert change.place(key(2)) == (5, 1)
        change.delete_pages_of({5})
        change.forget(5)
    assert (runs(index, 1), index.records()) == ([], {})
    index.close()


def test_a_change_that_fails_changes_nothing(directory: Path) -> None:
    index = PageIndex(directory, MARK, MLA)
    with pytest.raises(ZeroDivisionError), index.change() as change:
        change.delete(key(1))
        raise ZeroDivisionError
    assert runs(index, 1, 2) == [BOTH]
    index.close()
    assert pages(directory) == [BOTH]


def test_an_index_of_another_fingerprint_is_made_anew(directory: Path) -> None:
    assert pages(directory, fingerprint(model="another")) == []
    assert pages(directory) == []


@pytest.mark.parametrize("length", [0, 1, 4096, 8192, 8193, 12288])
def test_a_truncated_index_is_made_anew(directory: Path, length: int) -> None:
    raw = (directory / "data.mdb").read_bytes()
    assert len(raw) > 12288
    (directory / "data.mdb").write_bytes(raw[:length])
    assert pages(directory) == []


@pytest.mark.parametrize("marks, kept", [(b"", True), (b".", True), (b"..", False)])
def test_an_index_that_outlived_two_changes_or_one_opening_is_made_anew(
    directory: Path, marks: bytes, kept: bool
) -> None:
    (directory / "unfinished").write_bytes(marks)
    assert bool(pages(directory)) is kept


def test_the_marks_of_processes_that_ended_stay_until_a_change_succeeds(directory: Path) -> None:
    unfinished = directory / "unfinished"
    unfinished.write_bytes(b".")
    index = PageIndex(directory, MARK, MLA)
    assert unfinished.read_bytes() == b"."
    with index.change():
        assert unfinished.read_bytes() == b".."
    assert not unfinished.exists()
    index.close()


@pytest.mark.parametrize("number, slot", [(1, 2), (1, 7), (2, 0), (3, 0)], ids=["slot", "far", "extent", "nowhere"])
def test_an_index_that_errs_never_makes_a_wrong_page_right(tmp_path: Path, number: int, slot: int) -> None:
    """LMDB has no checksums: a bit that flips in a place is seen when the page is read, or found to be nowhere."""
    store = PageStore(tmp_path, MARK, MLA)
    write(store, keys(1, 2))
    write(store, keys(3, 4))
    store.close()
    index = PageIndex(tmp_path / "index", MARK, MLA)
    with index.change() as change:
        change.put(number, {key(1): slot})
    index.close()
    store = PageStore(tmp_path, MARK, MLA)
    if number == 3:
        assert key(1) not in store and store.prefix_length(keys(1)) == 0
        with pytest.raises(KeyError):
            store.pin(keys(1))
    else:
        reader = reader_for(MLA)
        with store.pin(keys(1, 2)) as pin:
            found, right = read(reader, [pin]), expected(MLA, [pin])
        reader.close()
        assert all(components is None for (_, _, page), components in found.items() if page == 0)
        assert all(found[place] == right[place] for place in right if place[2] == 1)
    store.close()


@pytest.mark.parametrize("garbage", [{"pages": 1 << 31}, {"pages": 1}, {"live": 3}, {"used": (1 << 64) - 1}], ids=str)
def test_a_record_that_cannot_be_is_replaced_by_what_the_extent_says(tmp_path: Path, garbage: dict[str, int]) -> None:
    store = PageStore(tmp_path, MARK, MLA)
    write(store, keys(1, 2))
    store.close()
    index = PageIndex(tmp_path / "index", MARK, MLA)
    with index.change() as change:
        change.record(1, index.records()[1]._replace(**garbage))
    index.close()
    store = PageStore(tmp_path, MARK, MLA)
    assert store.prefix_length(keys(1, 2)) == 2
    assert (store.stats.pages, store.stats.extents) == (2, 1)
    write(store, keys(3))
    store.close()
    assert pages_of(tmp_path) == 3


def pages_of(directory: Path) -> int:
    store = PageStore(directory, MARK, MLA)
    store.close()
    return store.stats.pages


def test_a_store_whose_index_cannot_be_read_finds_nothing(tmp_path: Path) -> None:
    store = PageStore(tmp_path, MARK, MLA)
    write(store, keys(1))
    # LMDB refuses an environment that is closed as it does one that is broken.
    store._index.close()
    assert store.prefix_length(keys(1)) == 0
    assert key(1) not in store
    with pytest.raises(KeyError):
        store.pin(keys(1))
    assert store.drop([(key(1), 1)]) == 0
    store.close()
    assert pages_of(tmp_path) == 1
