"""Extents that two stores have: one file with a name in each of them, which nobody changes."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from contents import MARK, MLA, expected, key, keys, read, reader_for, write

from agentstate.errors import OwnerFull, PageStoreFull
from agentstate.pages import PageKeys, PageStore, Quota, Space, merge
from agentstate.pages import files as files_module
from agentstate.pages.testing.pages import traces


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[PageStore]:
    store = PageStore(tmp_path / "ours", MARK, MLA)
    yield store
    store.close()


@pytest.fixture
def theirs(tmp_path: Path) -> Iterator[PageStore]:
    store = PageStore(tmp_path / "theirs", MARK, MLA)
    yield store
    store.close()


def path_of(store: PageStore, page: object) -> Path:
    with store.pin(keys(page)) as pin:
        return pin.segments[0].extent.path


def inode(store: PageStore, page: object) -> int:
    return path_of(store, page).stat().st_ino


def adopt(store: PageStore, other: PageStore, *pages: object) -> bool:
    return store.adopt(path_of(other, pages[0]), PageKeys.of(keys(*pages)))


def serves(store: PageStore, *pages: object) -> bool:
    reader = reader_for(MLA)
    try:
        with store.pin(keys(*pages)) as pin:
            return read(reader, [pin]) == expected(MLA, [pin])
    finally:
        reader.close()


def files_of(store: PageStore) -> list[Path]:
    return sorted(path for part in ("extents", "partial") for path in (store.directory / part).iterdir())


def test_what_is_adopted_is_there_for_good_and_none_of_it_is_written(ours: PageStore, theirs: PageStore) -> None:
    write(ours, keys(8))
    write(theirs, keys(1, 2), owner="tenant a")
    before = ours.stats.bytes_written
    assert adopt(ours, theirs, 1, 2)
    assert serves(ours, 1, 2, 8) and inode(ours, 1) == inode(theirs, 1)
    assert (ours.stats.bytes_written, ours.stats.pages_written, ours.stats.pages_linked) == (before, 1, 2)
    assert ours.stats.bytes_linked == path_of(ours, 1).stat().st_size
    assert ours.stats.bytes == sum(path.stat().st_size for path in files_of(ours)), "it counts by its size"
    assert ours.extents()[-1].owner == "tenant a"
    shutil.rmtree(theirs.directory)
    ours.close()
    again = PageStore(ours.directory, MARK, MLA)
    assert serves(again, 1, 2, 8)
    again.close()
    shutil.rmtree(ours.directory / "index")
    again = PageStore(ours.directory, MARK, MLA)
    assert serves(again, 1, 2, 8), "the extents say so, too"
    again.close()


@pytest.mark.parametrize("recycles", ["theirs", "ours"])
def test_the_space_of_a_file_with_two_names_is_not_written_over(
    ours: PageStore, theirs: PageStore, recycles: str
) -> None:
    write(theirs, keys(1))
    assert adopt(ours, theirs, 1)
    writer, other = (theirs, ours) if recycles == "theirs" else (ours, theirs)
    writer.quota = Quota(max_bytes=writer.stats.bytes)
    before = inode(other, 1)
    write(writer, keys(2))
    assert inode(writer, 2) != before
    assert serves(other, 1) and serves(writer, 2) and key(1) not in writer
    # Once it has one name, it is.
    other.quota = Quota(max_bytes=other.stats.bytes)
    write(other, keys(3))
    assert inode(other, 3) == before


def test_a_file_that_is_linked_while_it_is_about_to_be_written_over_is_not(
    ours: PageStore, theirs: PageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its eviction and the write."""
    write(theirs, keys(1))
    theirs.quota = Quota(max_bytes=theirs.stats.bytes)
    path, publish = path_of(theirs, 1), files_module.publish
    outcomes = []

    def late(partial: Path, final: Path, data: memoryview, spare: Path | None) -> int:
        assert spare is not None
        outcomes.append(ours.adopt(path, PageKeys.of(keys(1))))
        os.link(spare, ours.directory / "kept")
        return publish(partial, final, data, spare)

    monkeypatch.setattr(files_module, "publish", late)
    write(theirs, keys(2))
    assert outcomes == [False], "it has left that store"
    assert traces(ours.directory, MLA, keys(1, 2)) == set(keys(1))
    assert not list((theirs.directory / "partial").iterdir())


def test_a_file_that_is_being_written_over_is_not_linked(
    ours: PageStore, theirs: PageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(theirs, keys(1))
    theirs.quota = Quota(max_bytes=theirs.stats.bytes)
    fdatasync, outcomes = os.fdatasync, []

    def late(fd: int) -> None:
        (partial,) = (theirs.directory / "partial").iterdir()
        outcomes.append(ours.adopt(partial, PageKeys.of(keys(2))))
        fdatasync(fd)

    monkeypatch.setattr(os, "fdatasync", late)
    write(theirs, keys(2))
    assert outcomes == [False]
    assert not files_of(ours)


@pytest.mark.parametrize("how", ["merge", "evict", "supersede", "close"])
@pytest.mark.parametrize("which", ["theirs", "ours"])
def test_what_becomes_of_it_in_one_store_changes_nothing_in_the_other(
    ours: PageStore, theirs: PageStore, how: str, which: str
) -> None:
    write(theirs, keys(1, 2))
    write(theirs, keys(3, 4))
    assert adopt(ours, theirs, 1, 2) and adopt(ours, theirs, 3, 4)
    one, other = (theirs, ours) if which == "theirs" else (ours, theirs)
    before = {path: path.read_bytes() for path in files_of(other)}
    if how == "merge":
        reader = reader_for(MLA)
        assert merge(one, reader, keys(1, 2, 3, 4), mmap.mmap(-1, 1 << 17), 4 * MLA.layer_bytes) == 2
        reader.close()
    elif how == "evict":
        assert one.collect()
    elif how == "supersede":
        write(one, keys(1, 2, 3, 4), version=1)
    else:
        one.close()
        shutil.rmtree(one.directory)
    assert {path: path.read_bytes() for path in files_of(other)} == before
    assert serves(other, 1, 2, 3, 4)


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_a_page_is_erased_in_each_store_that_has_it_and_gone_when_both_have(
    ours: PageStore, theirs: PageStore, first: str, tmp_path: Path
) -> None:
    write(theirs, keys(1, 2))
    assert adopt(ours, theirs, 1, 2)
    one, other = (theirs, ours) if first == "theirs" else (ours, theirs)
    assert one.erase(keys(1))
    assert traces(one.directory, MLA, keys(1, 2)) == set(keys(2))
    assert serves(one, 2) and serves(other, 1, 2), "who needs it there keeps it"
    assert other.erase(keys(1))
    assert traces(tmp_path, MLA, keys(1, 2)) == set(keys(2))
    assert serves(one, 2) and serves(other, 2)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP, errno.EIO])
def test_where_no_second_name_is_allowed_nothing_is_changed(
    ours: PageStore, theirs: PageStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    write(ours, keys(8))
    write(theirs, keys(1))
    ours.quota = Quota(max_bytes=ours.stats.bytes)

    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refused)
    assert not adopt(ours, theirs, 1)
    assert key(1) not in ours and serves(ours, 8), "nor is anything evicted for it"
    assert len(files_of(ours)) == 1
    assert ours.stats.pages_linked == 0
    assert ours.erase(keys(8))


def gone(theirs: PageStore) -> None:
    theirs.collect()


def damaged(theirs: PageStore) -> None:
    data = bytearray(path_of(theirs, 1).read_bytes())
    data[9] ^= 4
    path_of(theirs, 1).write_bytes(data)


def cut(theirs: PageStore) -> None:
    os.truncate(path_of(theirs, 1), 5000)


def another(theirs: PageStore) -> None:
    """Of a store that was made anew."""
    path = path_of(theirs, 1)
    write(theirs, keys(3, 4))
    os.rename(path_of(theirs, 3), path)


@pytest.mark.parametrize("what", [gone, damaged, cut, another])
def test_what_is_not_the_extent_that_was_found_is_not_adopted(
    ours: PageStore, theirs: PageStore, what: Callable[[PageStore], None]
) -> None:
    write(theirs, keys(1, 2))
    path = path_of(theirs, 1)
    what(theirs)
    assert not ours.adopt(path, PageKeys.of(keys(1, 2)))
    assert not files_of(ours) and ours.stats.pages == 0


def test_an_extent_whose_name_is_given_to_another_one_meanwhile_is_not_adopted(
    ours: PageStore, theirs: PageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(theirs, keys(1, 2))
    write(theirs, keys(3, 4))
    path, link = path_of(theirs, 1), os.link

    def late(source: Path, target: Path) -> None:
        os.rename(path_of(theirs, 3), path)
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    assert not ours.adopt(path, PageKeys.of(keys(1, 2)))
    assert not files_of(ours)


def test_room_is_made_for_it_and_where_there_cannot_be_nothing_is_left(ours: PageStore, theirs: PageStore) -> None:
    write(theirs, keys(1, 2))
    write(ours, keys(7))
    write(ours, keys(8))
    ours.quota = Quota(max_bytes=ours.stats.bytes)
    with ours.pin(keys(7)):
        with ours.pin(keys(8)), pytest.raises(PageStoreFull):
            adopt(ours, theirs, 1, 2)
        assert len(files_of(ours)) == 2 and serves(ours, 7, 8)
        assert adopt(ours, theirs, 1, 2)
    assert serves(ours, 1, 2, 7) and key(8) not in ours
    assert ours.stats.bytes <= (ours.quota.max_bytes or 0)


def test_it_is_charged_to_who_wrote_it(tmp_path: Path, theirs: PageStore) -> None:
    write(theirs, keys(1, 2), owner="tenant a")
    size = path_of(theirs, 1).stat().st_size
    ours = PageStore(tmp_path / "ours", MARK, MLA, space=Space(limits={"tenant a": size - 1}.get))
    with pytest.raises(OwnerFull):
        adopt(ours, theirs, 1, 2)
    assert not files_of(ours)
    ours.close()


def test_a_full_disk_is_told_apart(ours: PageStore, theirs: PageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write(theirs, keys(1))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(PageStoreFull):
        adopt(ours, theirs, 1)
    monkeypatch.undo()
    monkeypatch.setattr(files_module, "sync_directory", full)
    with pytest.raises(PageStoreFull):
        adopt(ours, theirs, 1)
    assert not files_of(ours) and key(1) not in ours
    monkeypatch.undo()
    assert adopt(ours, theirs, 1) and serves(ours, 1)


def test_what_has_the_name_of_a_file_that_is_to_be_written_is_not_emptied(ours: PageStore, theirs: PageStore) -> None:
    write(theirs, keys(1))
    os.link(path_of(theirs, 1), ours.directory / "partial" / f"{1:016x}.ext")
    write(ours, keys(2))
    assert serves(theirs, 1) and serves(ours, 2)
    assert inode(ours, 2) != inode(theirs, 1)
