"""One budget for several stores, and what other engines left below the same root."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from contents import MHA, MLA, expected, key, keys, read, reader_for, write

from agentstate.errors import PageStoreFull, PageStoreLocked
from agentstate.pages import Geometry, PageStore, Quota, Space, fingerprint
from agentstate.pages.directory import StoreDirectory

Open = Callable[..., PageStore]
HOUR_S = 3600.0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "pages"


@pytest.fixture
def opened(root: Path) -> Iterator[Open]:
    """Opens the store of a model below ``root``."""
    stores: list[PageStore] = []

    def open(model: object, space: Space | None = None, geometry: Geometry = MLA, rank: int = 0) -> PageStore:
        mark = fingerprint(model=str(model))
        store = PageStore(root / mark.hex()[:32] / f"rank{rank}", mark, geometry, space=space)
        stores.append(store)
        return store

    yield open
    for store in stores:
        store.close()


def left(store: PageStore, last: int = 9) -> list[int]:
    return [number for number in range(last + 1) if key(number) in store]


def files(store: PageStore) -> int:
    return len(list((store.directory / "extents").glob("*.ext")))


def leave(opened: Open, model: object, *numbers: int, used_s: int = 1_000, rank: int = 0) -> PageStore:
    """A store that an engine has written and closed."""
    store = opened(model, rank=rank)
    for number in numbers:
        write(store, keys(number))
        with store.pin(keys(number)) as pin:
            os.utime(pin.segments[0].extent.path, (used_s + number, used_s + number))
    store.close()
    for path in (store.directory / "lock", store.directory / "index" / "data.mdb"):
        os.utime(path, (used_s, used_s))
    return store


def assert_right(store: PageStore, *numbers: int) -> None:
    reader = reader_for(store.geometry)
    with store.pin(keys(*numbers)) as pin:
        assert read(reader, [pin]) == expected(store.geometry, [pin])
    reader.close()


class TestStoresOfOneRank:
    def test_one_of_them_may_take_all_of_the_budget(self, opened: Open) -> None:
        """However small a page of it is beside a page of the other: a token's KV beside a recurrent state."""
        space = Space()
        kv, state = opened("kv", space), opened("state", space, MHA)
        space.quota = Quota(12 * kv.draft_bytes(1))
        for number in range(10):
            write(kv, keys(number))
        assert left(kv) == list(range(10))
        write(state, keys(0))
        assert left(kv) == list(range(10)) and left(state) == [0]

    def test_the_least_recently_used_of_all_goes_first(self, opened: Open) -> None:
        space = Space()
        one, two = opened(1, space), opened(2, space)
        for number in range(3):
            write(one, keys(number))
            write(two, keys(number))
        assert one.prefix_length(keys(0)) == two.prefix_length(keys(1)) == 1
        space.quota = Quota(6 * one.draft_bytes(1))
        seen = []
        for number in range(3, 7):
            write(two, keys(number))
            seen.append((left(one), left(two)))
        assert seen == [
            ([0, 1, 2], [1, 2, 3]),
            ([0, 2], [1, 2, 3, 4]),
            ([0], [1, 2, 3, 4, 5]),
            ([0], [1, 3, 4, 5, 6]),
        ]
        assert (one.stats.pages_evicted, two.stats.pages_evicted) == (2, 2)
        assert one.stats.bytes + two.stats.bytes == space.quota.max_bytes

    def test_the_order_of_uses_outlives_the_process(self, opened: Open) -> None:
        space = Space()
        one, two = opened(1, space), opened(2, space)
        for number in range(3):
            write(one, keys(number))
        for number in range(3):
            write(two, keys(number))
        one.prefix_length(keys(0))
        for store in (one, two):
            store.close()
        space = Space()
        two, one = opened(2, space), opened(1, space)
        two.prefix_length(keys(1))
        space.quota = Quota(4 * one.draft_bytes(1))
        one.make_room(0)
        assert (left(one), left(two)) == ([0], [0, 1, 2])
        one.make_room(2 * one.draft_bytes(1))
        assert (left(one), left(two)) == ([0], [1])

    def test_what_is_needed_or_pinned_in_either_of_them_stays(self, opened: Open) -> None:
        space = Space()
        one, two = opened(1, space), opened(2, space)
        for number in range(3):
            write(one, keys(number))
            write(two, keys(number))
        one.need(keys(0))
        two.retain(keys(0), time.monotonic() + HOUR_S)
        pin = two.pin(keys(1))
        space.quota = Quota(6 * one.draft_bytes(1))
        with pytest.raises(PageStoreFull):
            one.make_room(5 * one.draft_bytes(1))
        with pytest.raises(PageStoreFull):
            one.require_room(5 * one.draft_bytes(1))
        assert (left(one), left(two)) == ([0, 1, 2], [0, 1, 2])
        one.require_room(4 * one.draft_bytes(1))
        two.make_room(3 * one.draft_bytes(1))
        assert (left(one), left(two)) == ([0], [0, 1])
        pin.close()

    def test_a_store_that_is_closed_counts_no_more(self, opened: Open) -> None:
        space = Space()
        one, two = opened(1, space), opened(2, space)
        for number in range(3):
            write(one, keys(number))
            write(two, keys(number))
        one.close()
        space.quota = Quota(3 * two.draft_bytes(1))
        write(two, keys(3))
        assert left(two) == [1, 2, 3]
        one = opened(1, space)
        assert left(one) == [0, 1, 2]
        one.make_room(0)
        assert len(left(one) + left(two)) == 3


class TestWhatOthersLeft:
    def test_it_goes_first_the_store_that_was_used_longest_ago_before_the_others(
        self, opened: Open, root: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        older = leave(opened, "older", 1, 2, 3, used_s=1_000)
        newer = leave(opened, "newer", 4, 5, used_s=2_000)
        caplog.set_level(logging.INFO)
        space = Space(root=root)
        own = opened("own", space)
        one = own.draft_bytes(1)
        for number in range(3):
            write(own, keys(number))
        space.quota = Quota(8 * one)
        write(own, keys(3))
        assert left(own) == [0, 1, 2, 3]
        assert not (older.directory / "extents" / f"{1:016x}.ext").exists()
        assert (files(older), files(newer)) == (2, 2)
        assert "last used 1970-01-01" in caplog.text and str(older.directory) in caplog.text
        for number in range(4, 8):
            write(own, keys(number))
        assert left(own) == list(range(8))
        assert not older.directory.exists() and not newer.directory.exists()
        assert own.stats.pages_evicted == 0
        write(own, keys(8))
        assert left(own) == list(range(1, 9))
        assert sum("are evicted" in message for message in caplog.messages) == 2
        assert space.take_dead() == [(store.directory.parent.name, 0) for store in (older, newer)]
        assert space.take_dead() == []

    def test_a_store_of_which_a_part_was_evicted_can_be_opened(self, opened: Open, root: Path) -> None:
        leave(opened, "other", 1, 2, 3)
        own = opened("own", Space(Quota(2 * PageStore.draft_bytes(opened("size"), 1)), root))
        assert left(own) == []
        own.close()
        other = opened("other")
        assert left(other) == [2, 3]
        assert_right(other, 2, 3)

    def test_the_quota_is_kept_from_the_opening_on(self, opened: Open, root: Path) -> None:
        """An upgrade does not double what is used of the disk."""
        other = leave(opened, "other", 1, 2, 3)
        one = opened("size").draft_bytes(1)
        opened("own", Space(Quota(one), root))
        assert files(other) == 1

    def test_a_disk_that_is_full_of_it_is_no_reason_to_store_nothing(
        self, opened: Open, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = leave(opened, "other", *range(6))
        one = opened("size").draft_bytes(1)
        own = opened("own", Space(root=root))
        disk(monkeypatch, root, 6 * one)
        for number in range(6):
            write(own, keys(number))
        assert left(own) == list(range(6)) and not other.directory.exists()
        write(own, keys(6))
        assert left(own) == list(range(1, 7))

    def test_a_disk_that_is_full_of_it_is_no_reason_not_to_open(
        self, opened: Open, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = leave(opened, "other", *range(6))
        disk(monkeypatch, root, 6 * opened("size").draft_bytes(1))
        acquire = StoreDirectory.acquire

        def refused(directory: StoreDirectory) -> None:
            if other.directory.exists():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            acquire(directory)

        monkeypatch.setattr(StoreDirectory, "acquire", refused)
        with pytest.raises(PageStoreFull):
            opened("alone", Space())
        own = opened("own", Space(root=root))
        write(own, keys(1))
        assert left(own) == [1]

    def test_what_another_engine_has_open_stays_and_is_not_counted(self, opened: Open, root: Path) -> None:
        live = opened("live")
        for number in range(3):
            write(live, keys(number))
        own = opened("own", Space(Quota(2 * live.draft_bytes(1)), root))
        for number in range(3):
            write(own, keys(number))
        assert (left(live), left(own)) == ([0, 1, 2], [1, 2])
        # Once that engine has ended, its store is one of those that go first.
        live.close()
        write(own, keys(3))
        assert (left(own), files(live)) == ([2, 3], 0)

    def test_stores_of_the_same_engine_that_are_not_open_yet_stay(self, opened: Open, root: Path) -> None:
        pool, rank = leave(opened, "pool", 1, 2), leave(opened, "rank", 1, 2, rank=1)
        space = Space(Quota(opened("size").draft_bytes(1)), root, kin=[pool.directory, rank.directory])
        own = opened("own", space)
        for number in range(3):
            write(own, keys(number))
        assert (files(pool), files(rank)) == (2, 2)

    def test_ranks_share_what_others_left(self, opened: Open, root: Path) -> None:
        stores = [leave(opened, "other", 1, 2, used_s=1_000 + rank, rank=rank) for rank in range(4)]
        one = opened("size").draft_bytes(1)
        opened("own", Space(Quota(2 * one), root, rank=1, ranks=2), rank=1)
        assert [files(store) for store in stores] == [2, 0, 2, 2]

    def test_nothing_else_is_deleted_and_no_link_is_followed(self, opened: Open, root: Path, tmp_path: Path) -> None:
        other = leave(opened, "other", 1)
        elsewhere = tmp_path / "elsewhere"
        far = PageStore(elsewhere / "rank0", fingerprint(model="far"), MLA)
        write(far, keys(1))
        far.close()
        (root / ("a" * 32)).symlink_to(elsewhere)
        (root / ("b" * 32)).mkdir()
        (root / ("b" * 32) / "rank0").symlink_to(elsewhere / "rank0")
        inside = root / ("c" * 32) / "rank0"
        inside.mkdir(parents=True)
        (inside / "extents").symlink_to(elsewhere / "rank0" / "extents")
        mine = root / "backup" / "rank0" / "extents" / f"{1:016x}.ext"
        mine.parent.mkdir(parents=True)
        mine.write_bytes(b"mine")
        (other.directory / "extents" / "notes.txt").write_text("mine")
        (other.directory / "extents" / f"{9:016x}.ext").symlink_to(mine)
        own = opened("own", Space(Quota(1), root))
        with pytest.raises(PageStoreFull):
            write(own, keys(1))
        assert mine.read_bytes() == b"mine"
        assert files(far) == 1
        assert [path.name for path in (other.directory / "extents").iterdir()] == ["notes.txt"]
        assert not (other.directory / "index").exists()

    def test_an_engine_that_starts_waits_for_whoever_evicts_from_its_store(self, opened: Open, root: Path) -> None:
        """And nobody evicts from a store that is open."""
        other = leave(opened, "other", 1, 2)
        space = Space(root=root)
        own = opened("own", space)
        write(own, keys(1))
        space.quota = Quota(3 * own.draft_bytes(1))
        own.make_room(0)
        again = opened("other")
        space.quota = Quota(own.draft_bytes(1))
        write(own, keys(2))
        assert (left(own), left(again)) == ([2], [1, 2])
        assert other.directory == again.directory
        with pytest.raises(PageStoreLocked):
            opened("other")


def disk(patch: pytest.MonkeyPatch, root: Path, n_bytes: int) -> None:
    """Let the file system of ``root`` have room for so many bytes of extents."""
    real = os.statvfs

    def statvfs(path: Path) -> os.statvfs_result:
        held = sum(file.stat().st_size for file in root.rglob("*.ext"))
        values = list(real(path))
        values[1], values[2], values[4] = 1, n_bytes, max(0, n_bytes - held)
        return os.statvfs_result(values)

    patch.setattr(os, "statvfs", statvfs)
