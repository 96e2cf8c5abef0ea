from __future__ import annotations

import errno
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from contents import MARK, MHA, MLA, WIDE, drop, expected, key, keys, read, reader_for, write

from agentstate.errors import FingerprintMismatch, PageStoreFull, PageStoreLocked, PageStoreUnwritable
from agentstate.pages import Geometry, PageStore, fingerprint
from agentstate.pages.index import PageIndex
from agentstate.pages.space import StoreStats

ROOT = Path(__file__).parents[3]


@pytest.fixture
def store(tmp_path: Path) -> Any:
    store = PageStore(tmp_path / "rank0", MARK, MLA)
    yield store
    store.close()


def reopened(store: PageStore) -> PageStore:
    store.close()
    return PageStore(store.directory, MARK, store.geometry)


def holds(store: PageStore, pages: list[bytes], version: int = 0) -> bool:
    """Whether ``pages`` come back as they were written."""
    reader = reader_for(store.geometry)
    requests = [store.pin(pages)]
    try:
        return read(reader, requests) == expected(store.geometry, requests, version)
    finally:
        reader.close()


def files(store: PageStore) -> list[str]:
    return sorted(str(path.relative_to(store.directory)) for path in store.directory.rglob("*.ext"))


def failing(number: int) -> Callable[..., Any]:
    def fail(*args: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("geometry", [MHA, MLA, WIDE, Geometry(5, 1, (4096, 100))], ids=str)
def test_pages_come_back_as_they_were_written_also_to_a_store_opened_later(tmp_path: Path, geometry: Geometry) -> None:
    store = PageStore(tmp_path, MARK, geometry)
    write(store, keys(1))
    write(store, keys(2, 3, 4, 5, 6, 7, 8))
    for order in (keys(1, 2, 3, 4, 5, 6, 7, 8), keys(8, 1, 3, 2, 5)):
        assert holds(store, order)
    stats = store.stats
    store = reopened(store)
    assert holds(store, keys(4, 5, 1))
    assert (store.stats.pages, store.stats.extents, store.stats.bytes) == (8, 2, stats.bytes_written)
    assert (stats.pages_written, stats.pages, stats.extents) == (8, 8, 2)
    assert stats.bytes_written == sum(path.stat().st_size for path in tmp_path.rglob("*.ext"))
    store.close()


def test_a_prefix_ends_before_the_first_page_that_is_missing(store: PageStore) -> None:
    write(store, keys(1, 2, 4))
    assert store.prefix_length(keys(1, 2, 3, 4)) == 2
    assert store.prefix_length(keys(1, 2)) == 2
    assert store.prefix_length(keys(3, 1)) == 0
    assert store.prefix_length([]) == 0
    assert key(4) in store and key(3) not in store


def test_neighbours_are_one_segment(store: PageStore) -> None:
    write(store, keys(1, 2, 3))
    write(store, keys(4, 5))
    found = [(segment.slot, segment.pages, segment.first) for segment in store.pin(keys(2, 3, 4, 5, 1)).segments]
    assert found == [(1, 2, 0), (0, 2, 2), (0, 1, 4)]
    with pytest.raises(KeyError) as error:
        store.pin(keys(1, 9))
    assert error.value.args == (key(9),)


def test_the_later_extent_of_a_page_wins_also_after_opening_again(store: PageStore) -> None:
    write(store, keys(1, 2))
    write(store, keys(2), version=1)
    assert holds(store, keys(2), version=1) and holds(store, keys(1))
    store = reopened(store)
    assert holds(store, keys(2), version=1) and holds(store, keys(1))
    assert (store.stats.pages, store.stats.extents) == (2, 2)
    write(store, keys(2), version=2)
    assert holds(store, keys(2), version=2)
    store.close()


def test_a_dropped_page_is_gone_until_it_is_written_again(store: PageStore) -> None:
    write(store, keys(1, 2, 3))
    assert drop(store, key(2)) == 1
    assert drop(store, key(2)) == drop(store, key(9)) == 0
    assert store.prefix_length(keys(1, 2, 3)) == 1
    assert holds(store, keys(1, 3))
    assert (store.stats.pages, store.stats.pages_dropped) == (2, 1)
    with pytest.raises(KeyError):
        store.pin(keys(1, 2))
    write(store, keys(2), version=1)
    assert holds(store, keys(2), version=1)
    assert (store.stats.pages, store.stats.extents) == (3, 2)


@pytest.mark.parametrize("budget_pages", [1, 2, 7, 40])
@pytest.mark.parametrize("geometry", [MHA, MLA, WIDE], ids=["MHA", "MLA", "WIDE"])
def test_as_many_pages_are_drafted_as_fit_the_budget(tmp_path: Path, geometry: Geometry, budget_pages: int) -> None:
    store = PageStore(tmp_path, MARK, geometry)
    budget = store.draft_bytes(budget_pages)
    pages = store.pages_within(budget)
    assert pages >= budget_pages
    assert store.draft_bytes(pages) <= budget < store.draft_bytes(pages + 1)
    assert store.pages_within(1) == 1
    write_buffer = mmap.mmap(-1, budget)
    assert store.draft(keys(*range(pages)), write_buffer).n_bytes == store.draft_bytes(pages)


@pytest.mark.parametrize("how", ["truncated", "empty", "torn", "foreign", "header"])
def test_a_damaged_file_is_passed_over_and_the_others_are_served(store: PageStore, how: str) -> None:
    write(store, keys(1, 2))
    write(store, keys(3))
    damaged = store.directory / "extents" / "0000000000000001.ext"
    raw = damaged.read_bytes()
    damaged.write_bytes(
        {
            "truncated": raw[:-1],
            "empty": b"",
            "torn": bytes(4096) + raw[4096:],
            "foreign": b"not an extent, but longer than its prefix",
            "header": raw[:100],
        }[how]
    )
    store = reopened(store)
    assert store.stats.bad_extents == 1
    assert store.prefix_length(keys(1)) == 0
    assert holds(store, keys(3))
    write(store, keys(1, 2), version=1)
    assert holds(store, keys(1, 2), version=1)
    store.close()


def test_slabs_that_never_reached_the_disk_are_found_when_they_are_read(store: PageStore) -> None:
    write(store, keys(1, 2))
    (path,) = (store.directory / "extents").iterdir()
    raw = path.read_bytes()
    path.write_bytes(raw[:4096] + bytes(len(raw) - 4096))
    store = reopened(store)
    reader = reader_for(store.geometry)
    found = read(reader, [store.pin(keys(1, 2))])
    reader.close()
    assert found and all(page is None for page in found.values())
    store.close()


@pytest.mark.parametrize("pages", [3, 65], ids=["beside the header", "shifted"])
def test_a_store_whose_index_is_lost_knows_owners_by_the_extents(store: PageStore, pages: int) -> None:
    owner = "tenant " + "b" * 1000
    assert (store.draft_bytes(pages, owner) > store.draft_bytes(pages)) == (pages > 3)
    write(store, keys(*range(pages)), owner=owner)
    write(store, keys("others"))
    store.close()
    shutil.rmtree(store.directory / "index")
    store = PageStore(store.directory, MARK, store.geometry)
    for _ in range(2):
        with store.pin(keys(*range(pages), "others")) as pin:
            assert [segment.extent.owner for segment in pin.segments] == [owner, ""]
        assert holds(store, keys(*range(pages), "others"))
        store = reopened(store)
    store.close()


def test_a_page_stays_good_where_the_index_does_not_know_its_owner(store: PageStore) -> None:
    """As after an engine of an earlier release has entered the extent."""
    write(store, keys(1, 2), owner="tenant a")
    with store._index.change() as change:
        (extent,) = store._extents.values()
        change.forget(extent.number)
        change.record(extent.number, extent.record())
    store = reopened(store)
    assert holds(store, keys(1, 2))
    store.close()


def test_a_note_of_an_owner_counts_for_no_other_extent_of_its_number(store: PageStore) -> None:
    write(store, keys(1))
    with store._index.change() as change:
        (extent,) = store._extents.values()
        change.own(extent.number, extent.mtime_ns - 1, "tenant a")
    store = reopened(store)
    with store.pin(keys(1)) as pin:
        assert pin.segments[0].extent.owner == ""
    store.close()


def test_an_extent_of_a_newer_version_is_not_overwritten(store: PageStore) -> None:
    write(store, keys(1))
    (path,) = (store.directory / "extents").iterdir()
    newer = bytearray(path.read_bytes())
    newer[8] = 5
    path.write_bytes(newer)
    store = reopened(store)
    write(store, keys(2))
    store.close()
    assert path.read_bytes() == newer


def test_a_copy_with_a_name_of_its_own_does_not_keep_the_store_from_opening(store: PageStore) -> None:
    write(store, keys(1))
    (path,) = (store.directory / "extents").iterdir()
    path.with_name("saved.ext").write_bytes(path.read_bytes())
    store = reopened(store)
    assert holds(store, keys(1))
    store.close()


def test_what_a_crash_left_in_partial_is_removed(store: PageStore) -> None:
    write(store, keys(1))
    leftover = store.directory / "partial" / "0000000000000002.ext"
    leftover.write_bytes(b"half")
    store = reopened(store)
    assert not leftover.exists()
    assert holds(store, keys(1))
    store.close()


def test_pages_of_another_model_or_layout_are_refused(store: PageStore) -> None:
    write(store, keys(1))
    store.close()
    for mark, geometry in [(fingerprint(model="other"), MLA), (MARK, MHA)]:
        with pytest.raises(FingerprintMismatch, match="was written for another model or layout.*AGENTSTATE_PAGES_DIR"):
            PageStore(store.directory, mark, geometry)
    # The refusal left no lock behind.
    assert holds(reopened(store), keys(1))


def test_there_is_one_writer_and_any_number_of_readers(store: PageStore) -> None:
    write(store, keys(1))
    program = (
        "import sys; from pathlib import Path; from contents import MARK, MLA\n"
        "from agentstate.pages import PageStore, inventory\n"
        "print('reads', sum(len(report.header.keys) for report in inventory.check(Path(sys.argv[1])) if report.good))\n"
        "PageStore(Path(sys.argv[1]), MARK, MLA)\n"
    )
    run = child(program, store.directory)
    assert run.stdout == "reads 1\n"
    assert "PageStoreLocked: another engine writes to" in run.stderr
    with pytest.raises(PageStoreLocked, match="AGENTSTATE_PAGES_DIR"):
        PageStore(store.directory, MARK, MLA)
    store.close()
    run = child(program, store.directory)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("where", ["rank0", "rank0/extents", "rank0/partial", ""])
def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path, where: str) -> None:
    obstacle = tmp_path / "root" / where
    obstacle.parent.mkdir(parents=True, exist_ok=True)
    obstacle.write_text("a file")
    directory = tmp_path / "root" / "rank0"
    with pytest.raises(PageStoreUnwritable, match=f"{directory} cannot be written") as error:
        PageStore(directory, MARK, MLA)
    assert "\n" not in str(error.value)


def test_a_disk_without_room_for_the_directory_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "mkdir", failing(errno.ENOSPC))
    with pytest.raises(PageStoreFull, match="AGENTSTATE_PAGES_DIR"):
        PageStore(tmp_path / "rank0", MARK, MLA)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT], ids=["ENOSPC", "EDQUOT"])
@pytest.mark.parametrize("call", ["open", "posix_fallocate", "pwrite", "fdatasync", "rename"])
def test_a_full_disk_leaves_nothing_behind_and_the_store_goes_on(store: PageStore, call: str, number: int) -> None:
    write(store, keys(1))
    before, stats = files(store), StoreStats(**vars(store.stats))
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, failing(number))
        with pytest.raises(PageStoreFull, match="no room for .*; make room on its disk"):
            write(store, keys(2, 3))
    assert (files(store), store.stats) == (before, stats)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert store.prefix_length(keys(2)) == 0
    write(store, keys(2, 3))
    assert holds(store, keys(1, 2, 3))


def test_a_disk_that_fills_up_half_way_through_leaves_nothing_behind(store: PageStore) -> None:
    real, calls = os.pwrite, []

    def half(fd: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[:4096], offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", half)
        with pytest.raises(PageStoreFull):
            write(store, keys(1))
    assert calls == [0, 4096]
    assert files(store) == []


def test_short_writes_are_carried_on(store: PageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:4096], offset))
    write(store, keys(1, 2))
    assert holds(store, keys(1, 2))


@pytest.mark.parametrize("call", ["open", "posix_fallocate", "pwrite", "fdatasync", "rename"])
def test_a_failing_disk_is_no_full_disk_and_leaves_nothing_behind_either(store: PageStore, call: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, failing(errno.EIO))
        with pytest.raises(OSError, match="Input/output error"):
            write(store, keys(1))
    assert files(store) == []
    write(store, keys(1))
    assert holds(store, keys(1))


def test_nothing_is_stored_when_the_directory_cannot_be_synced(store: PageStore) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", failing(errno.EIO))
        with pytest.raises(OSError, match="Input/output error"):
            write(store, keys(1))
    assert store.prefix_length(keys(1)) == 0
    assert files(store) == []


def test_a_directory_that_cannot_be_synced_for_lack_of_room_is_a_full_disk(store: PageStore) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", failing(errno.ENOSPC))
        with pytest.raises(PageStoreFull):
            write(store, keys(1))


def test_direct_io_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def no_direct(path: Any, flags: int, *mode: int, **kwargs: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *mode, **kwargs)

    monkeypatch.setattr(os, "open", no_direct)
    store = PageStore(tmp_path, MARK, MHA)
    write(store, keys(1, 2))
    assert holds(store, keys(2, 1))
    store.close()


KILLED = """
import os, signal, sys
from pathlib import Path
from contents import MARK, MLA, keys, write
from agentstate.pages import PageStore

calls = 0

def trapped(name, limit):
    real = getattr(os, name)
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == limit:
            if name == "pwrite":  # torn: half of it reaches the file
                fd, data, offset = args
                real(fd, data[:4096], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call

limit = 0
while True:
    limit += 1
    child = os.fork()
    if not child:
        store = PageStore(Path(sys.argv[1]) / f"{limit:02d}", MARK, MLA)
        write(store, keys(1))
        for name in ("open", "posix_fallocate", "pwrite", "fdatasync", "close", "rename", "fsync"):
            setattr(os, name, trapped(name, limit))
        write(store, keys(2, 3))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        continue
    sys.exit(status)
"""


def test_a_kill_before_any_system_call_of_publishing_leaves_all_or_nothing(tmp_path: Path) -> None:
    run = child(KILLED, tmp_path)
    assert run.returncode == 0, run.stderr
    stored = []
    for directory in sorted(tmp_path.iterdir()):
        store = PageStore(directory, MARK, MLA)
        assert holds(store, keys(1))
        stored.append(store.prefix_length(keys(2, 3)))
        assert stored[-1] in (0, 2)
        assert not list((directory / "partial").iterdir())
        assert store.stats.bad_extents == 0
        if stored[-1]:
            assert holds(store, keys(2, 3))
        write(store, keys(2, 3, 4), version=1)
        assert holds(store, keys(2, 3, 4), version=1) and holds(store, keys(1))
        store.close()
    # open, fallocate, write, sync, close and rename come before it is there; the directory's sync, and the mark of what
    # is under way in the index, after; the last child was not killed.
    assert stored == [0] * 6 + [2] * 5


def child(program: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )


def test_any_number_of_pages_is_dropped_in_one_transaction(store: PageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store, keys(*range(40)))
    write(store, keys(*range(40, 80)))
    commits = []
    change = PageIndex.change
    monkeypatch.setattr(PageIndex, "change", lambda index: (commits.append(1), change(index))[1])
    with store.pin(keys(*range(80))) as pin:
        copies = pin.copies(range(0, 80, 2))
    assert store.drop(copies) == 40
    assert len(commits) == 1
    assert [page for page in range(80) if key(page) in store] == list(range(1, 80, 2))
