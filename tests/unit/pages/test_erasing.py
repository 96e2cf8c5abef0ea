"""Erasing pages where something stands in the way. What erasing does otherwise is told by the conformance tests, the
state machine and the faults at every call."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from contents import MARK, MLA, expected, keys, read, reader_for, write

from agentstate.errors import PageStoreFull
from agentstate.pages import PageStore, Quota, merge
from agentstate.pages import files as files_module
from agentstate.pages import store as store_module
from agentstate.pages.testing.pages import traces

WAIT_S = 60


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PageStore]:
    store = PageStore(tmp_path / "rank0", MARK, MLA)
    yield store
    store.close()


def holds(store: PageStore, *pages: object) -> bool:
    reader = reader_for(MLA)
    try:
        with store.pin(keys(*pages)) as pin:
            return read(reader, [pin]) == expected(MLA, [pin])
    finally:
        reader.close()


def left(store: PageStore, *pages: object) -> set[bytes]:
    return traces(store.directory, MLA, keys(*pages))


def extent(store: PageStore, page: object) -> Path:
    with store.pin(keys(page)) as pin:
        return pin.segments[0].extent.path


def test_a_merge_brings_nothing_back_that_is_removed_while_it_copies(
    store: PageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        write(store, keys(number))
    publish = store.publish

    def remove_first(draft: Any, **options: Any) -> None:
        store.remove(keys(2))
        publish(draft, **options)

    monkeypatch.setattr(store, "publish", remove_first)
    reader = reader_for(MLA)
    with pytest.raises(KeyError):
        merge(store, reader, keys(0, 1, 2, 3), mmap.mmap(-1, store.draft_bytes(4)), 4 * MLA.layer_bytes)
    reader.close()
    assert store.scrub(keys(2))
    assert left(store, 0, 1, 2, 3) == set(keys(0, 1, 3))
    assert holds(store, 0, 1, 3)


def test_where_there_is_no_room_to_keep_what_lies_beside_it_goes_too(
    store: PageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(store, keys(1, 2))
    write(store, keys(3))

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files_module, "publish", full)
    assert store.erase(keys(1))
    assert left(store, 1, 2, 3) == set(keys(3))
    assert store.stored(keys(1, 2, 3)) == [False, False, True]
    assert (store.stats.pages, store.stats.pages_erased, store.stats.pages_evicted) == (1, 1, 1)


def test_a_full_quota_is_no_reason_to_lose_anything(store: PageStore) -> None:
    write(store, keys(1, 2))
    write(store, keys(3))
    store.quota = Quota(max_bytes=store.stats.bytes)
    assert store.erase(keys(1))
    assert holds(store, 2, 3)
    assert store.stats.bytes <= store.quota.max_bytes  # type: ignore[operator]


def test_what_lies_beside_it_and_is_damaged_is_dropped_and_not_sealed_anew(store: PageStore) -> None:
    write(store, keys(1, 2, 3))
    with store.pin(keys(2)) as pin:
        (segment,) = pin.segments
        at, _ = segment.extent.layout.component_range(1, 0, segment.slot, 1)
    with segment.extent.path.open("r+b") as file:
        file.seek(at + 100)
        file.write(b"damage")
    assert store.erase(keys(1))
    assert store.stored(keys(1, 2, 3)) == [False, False, True]
    assert left(store, 1, 2, 3) == set(keys(3))
    assert (store.stats.pages_dropped, holds(store, 3)) == (1, True)


def test_a_file_that_may_hold_anything_is_deleted(store: PageStore) -> None:
    write(store, keys(1))
    write(store, keys(2))
    path = extent(store, 1)
    store.close()
    with path.open("r+b") as file:
        file.seek(30)
        file.write(b"damage")
    shutil.rmtree(store.directory / "index")
    again = PageStore(store.directory, MARK, MLA)
    assert left(again, 1) == set(keys(1))
    assert again.erase(keys(1))
    assert left(again, 1, 2) == set(keys(2))
    again.close()


def test_an_extent_whose_header_is_damaged_goes_as_a_whole(store: PageStore) -> None:
    write(store, keys(1, 2))
    with extent(store, 1).open("r+b") as file:
        file.seek(30)
        file.write(b"damage")
    assert store.erase(keys(1))
    assert (left(store, 1, 2), store.stored(keys(1, 2))) == (set(), [False, False])
    assert store.stats.pages == store.stats.bytes == 0


def test_a_file_that_cannot_be_deleted_is_tried_again(store: PageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store, keys(1))
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".ext":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError, match="Input/output"):
        store.erase(keys(1))
    assert store.stored(keys(1)) == [False]
    monkeypatch.undo()
    assert left(store, 1) == set(keys(1))
    assert store.erase(keys(1))
    assert left(store, 1) == set()


def test_a_file_that_is_being_written_over_what_was_evicted_is_waited_for(
    store: PageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(store, keys(1))
    store.quota = Quota(max_bytes=store.stats.bytes)
    begun, go = threading.Event(), threading.Event()
    publish = files_module.publish

    def late(partial: Path, final: Path, data: memoryview, spare: Path | None) -> int:
        begun.set()
        assert go.wait(WAIT_S)
        return publish(partial, final, data, spare)

    monkeypatch.setattr(files_module, "publish", late)
    monkeypatch.setattr(store_module, "_WRITING_OVER_S", 0.01)
    writing = threading.Thread(target=write, args=(store, keys(2)))
    writing.start()
    assert begun.wait(WAIT_S)
    assert left(store, 1) == set(keys(1))
    assert not store.erase(keys(1))
    go.set()
    writing.join()
    assert store.erase(keys(1))
    assert left(store, 1, 2) == set(keys(2))


def test_what_was_removed_when_the_process_ended_is_erased_by_the_next_one(store: PageStore) -> None:
    write(store, keys(1, 2))
    store.remove(keys(1))
    store.close()
    again = PageStore(store.directory, MARK, MLA)
    assert (again.stored(keys(1, 2)), left(again, 1)) == ([False, True], set(keys(1)))
    assert again.erase(keys(1))
    assert left(again, 1, 2) == set(keys(2))
    again.close()


def test_a_disk_that_is_full_while_deletions_are_synced_is_told_apart(
    store: PageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(store, keys(1))

    def full(directory: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files_module, "sync_directory", full)
    with pytest.raises(PageStoreFull):
        store.erase(keys(1))
