"""Tests that any page store with `PageStore`'s surface passes.

Derive from `PageStoreTests` in a module that pytest collects, and say how a store is opened::

    class TestMyStore(PageStoreTests):
        def open(self, directory, geometry, quota=UNLIMITED): ...
"""

from __future__ import annotations

import mmap
import time
from pathlib import Path

import pytest

from agentstate.errors import PageStoreFull, PageStoreLocked
from agentstate.pages import Geometry, PageStore, Quota, merge
from agentstate.pages.space import UNLIMITED
from agentstate.pages.testing.pages import (
    MARK,
    MHA,
    MLA,
    WIDE,
    drop,
    expected,
    key,
    keys,
    read,
    reader_for,
    traces,
    write,
)

HOUR_S = 3600.0


class PageStoreTests:
    """A store is opened on a directory that is new, or that a store of the same kind was closed on."""

    def open(self, directory: Path, geometry: Geometry, quota: Quota = UNLIMITED) -> PageStore:
        return PageStore(directory, MARK, geometry, quota)

    def assert_right(self, store: PageStore, pages: list[bytes], version: int = 0) -> None:
        reader = reader_for(store.geometry)
        try:
            with store.pin(pages) as pin:
                assert read(reader, [pin]) == expected(store.geometry, [pin], version)
        finally:
            reader.close()

    @pytest.mark.parametrize("geometry", [MHA, MLA, WIDE], ids=["MHA", "MLA", "WIDE"])
    def test_pages_come_back_in_any_order_and_from_a_store_opened_later(
        self, tmp_path: Path, geometry: Geometry
    ) -> None:
        store = self.open(tmp_path, geometry)
        write(store, keys(1, 2, 3))
        write(store, keys(4))
        self.assert_right(store, keys(4, 2, 3, 1, 1))
        store.close()
        store = self.open(tmp_path, geometry)
        self.assert_right(store, keys(1, 2, 3, 4))
        assert (store.stats.pages, store.stats.pages_written) == (4, 0)
        store.close()

    def test_a_prefix_ends_before_the_first_page_that_is_missing(self, tmp_path: Path) -> None:
        store = self.open(tmp_path, MLA)
        assert (store.prefix_length([]), store.prefix_length(keys(1))) == (0, 0)
        write(store, keys(1, 2, 4))
        assert store.prefix_length(keys(1, 2, 3, 4)) == 2
        assert key(4) in store and key(3) not in store
        assert store.stored(keys(3, 4, 9, 1)) == [False, True, False, True]
        with pytest.raises(KeyError) as error:
            store.pin(keys(1, 3, 9))
        assert error.value.args == (key(3),)
        store.close()

    def test_what_is_written_later_is_what_is_found(self, tmp_path: Path) -> None:
        store = self.open(tmp_path, MLA)
        write(store, keys(1, 2))
        write(store, keys(2, 3), version=1)
        self.assert_right(store, keys(1))
        self.assert_right(store, keys(2, 3), version=1)
        store.close()
        store = self.open(tmp_path, MLA)
        self.assert_right(store, keys(2, 3), version=1)
        assert store.stats.pages == 3
        store.close()

    def test_a_dropped_page_is_gone_until_it_is_written_again(self, tmp_path: Path) -> None:
        store = self.open(tmp_path, MLA)
        write(store, keys(1, 2, 3))
        assert drop(store, *keys(2, 2, 9)) == 1
        assert (store.prefix_length(keys(1, 2, 3)), store.stats.pages_dropped) == (1, 1)
        store.close()
        store = self.open(tmp_path, MLA)
        assert key(2) not in store
        assert store.stored(keys(1, 2, 3)) == [True, False, True]
        self.assert_right(store, keys(1, 3))
        write(store, keys(2), version=1)
        self.assert_right(store, keys(2), version=1)
        store.close()

    def test_only_the_copy_that_was_wrong_is_dropped(self, tmp_path: Path) -> None:
        store = self.open(tmp_path, MLA)
        write(store, keys(1, 2, 3))
        with store.pin(keys(1, 2, 3)) as pin:
            copies = pin.copies(range(3))
            write(store, keys(2), version=1)
            assert store.drop(copies[1:2]) == 0
            self.assert_right(store, keys(2), version=1)
            assert store.drop([*copies, *copies, (key(9), copies[0][1])]) == 2
        assert store.stored(keys(1, 2, 3)) == [False, True, False]
        self.assert_right(store, keys(2), version=1)
        assert store.stats.pages_dropped == 2
        store.close()

    def test_what_is_held_stays_readable_whatever_becomes_of_it(self, tmp_path: Path) -> None:
        store = self.open(tmp_path, MLA)
        write(store, keys(1, 2))
        reader = reader_for(MLA)
        with store.pin(keys(1, 2)) as pin:
            write(store, keys(1, 2), version=1)
            drop(store, key(1))
            store.collect()
            assert read(reader, [pin]) == expected(MLA, [pin])
        pin.close()
        reader.close()
        assert store.stats.pages == store.prefix_length(keys(2)) == 0
        store.close()

    def test_the_quota_is_kept_by_evicting_what_was_used_longest_ago(self, tmp_path: Path) -> None:
        store = self.open(tmp_path, MLA)
        for number in range(4):
            write(store, keys(number))
        each = store.stats.bytes // 4
        store.prefix_length(keys(0))
        store.quota = Quota(max_bytes=3 * each)
        write(store, keys(4))
        assert [number for number in range(5) if key(number) in store] == [0, 3, 4]
        assert store.stats.bytes <= 3 * each and store.stats.pages_evicted == 2
        self.assert_right(store, keys(0, 3, 4))
        store.close()

    def test_what_is_needed_goes_last_and_what_is_pinned_or_held_does_not_go(self, tmp_path: Path) -> None:
        store = self.open(tmp_path, MLA)
        for number in range(4):
            write(store, keys(number))
        with store.needing_only():
            store.need(keys(0))
        assert store.retain(keys(1), time.monotonic() + HOUR_S) == 1
        pin = store.pin(keys(2))
        store.quota = Quota(max_bytes=store.stats.bytes)
        store.make_room(1)
        assert key(3) not in store
        assert store.collect() == 0
        store.make_room(store.quota.max_bytes // 2)  # type: ignore[operator]
        assert [number for number in range(4) if key(number) in store] == [1, 2]
        assert store.stats.pages_evicted_needed == 1
        with pytest.raises(PageStoreFull):
            store.make_room(store.quota.max_bytes)  # type: ignore[arg-type]
        assert store.prefix_length(keys(1, 2)) == 2
        pin.close()
        store.retain(keys(1), 0)
        store.make_room(store.quota.max_bytes)  # type: ignore[arg-type]
        assert store.stats.pages == store.stats.bytes == 0
        store.close()

    def test_at_most_half_of_the_room_is_retained(self, tmp_path: Path) -> None:
        store = self.open(tmp_path, MLA)
        for number in range(4):
            write(store, keys(number))
        each = store.stats.bytes // 4
        store.quota = Quota(max_bytes=5 * each)
        until_s = time.monotonic() + HOUR_S
        assert store.retain(keys(3, 9, 1, 2, 0), until_s) == 3
        assert store.retain(keys(1, 3), until_s + 1) == 2
        assert store.retain(keys(0), until_s) == 0
        store.make_room(3 * each)
        assert [number for number in range(4) if key(number) in store] == [1, 3]
        store.retain(keys(3), 0)
        assert store.retain(keys(9), until_s) == 1
        store.make_room(4 * each)
        assert [number for number in range(4) if key(number) in store] == [1]
        store.close()

    def test_what_is_released_goes_first_unless_it_is_used_or_needed_again(self, tmp_path: Path) -> None:
        store = self.open(tmp_path, MLA)
        for number in range(6):
            write(store, keys((number, 1), (number, 2)))
        write(store, keys(6))
        each = store.stats.bytes // 7
        store.need(keys((5, 1), (5, 2)), "session")
        store.need(keys((4, 1)), "session")
        store.need(keys((4, 1)), "another")
        pages = [page for number in (1, 2, 4, 5) for page in keys((number, 1), (number, 2))]
        store.release([*pages, *keys((3, 1), 9)], "session")
        store.prefix_length(keys((2, 1)))
        store.quota = Quota(max_bytes=7 * each)
        gone: list[int] = []
        for _ in range(7):
            store.make_room(each * (len(gone) + 1))
            gone += [n for n in range(6) if n not in gone and key((n, 1)) not in store]
            gone += [6] * (6 not in gone and key(6) not in store)
        assert gone == [1, 5, 0, 3, 6, 2, 4], "a page of 3 was not released, and another session needs 4"
        assert store.stats.pages_evicted_needed == 2
        store.close()

    def test_what_is_released_and_then_needed_goes_in_its_turn(self, tmp_path: Path) -> None:
        store = self.open(tmp_path, MLA)
        for number in range(3):
            write(store, keys(number))
        store.release(keys(1, 2))
        store.need(keys(1), "session")
        store.quota = Quota(max_bytes=store.stats.bytes)
        store.make_room(1)
        assert store.stored(keys(0, 1, 2)) == [True, True, False]
        store.make_room(store.stats.bytes)
        assert store.stored(keys(0, 1, 2)) == [False, True, False]
        store.close()

    def test_merging_keeps_what_is_retained_and_what_is_released(self, tmp_path: Path) -> None:
        store = self.open(tmp_path, MLA)
        for number in range(9):
            write(store, keys(number))
        each = store.stats.bytes // 9
        store.release(keys(3, 4, 5))
        store.retain(keys(0, 1, 2), time.monotonic() + HOUR_S)
        reader = reader_for(MLA)
        for chain in (keys(0, 1, 2), keys(3, 4, 5)):
            assert merge(store, reader, chain, mmap.mmap(-1, store.draft_bytes(3)), 3 * MLA.layer_bytes) == 3
        reader.close()
        store.quota = Quota(max_bytes=store.stats.bytes)
        store.make_room(1)
        assert [number for number in range(9) if key(number) in store] == [0, 1, 2, 6, 7, 8]
        kept = store.stats.bytes - 3 * each
        store.make_room(store.quota.max_bytes - kept)  # type: ignore[operator]
        assert [number for number in range(9) if key(number) in store] == [0, 1, 2]
        with pytest.raises(PageStoreFull):
            store.make_room(store.quota.max_bytes)  # type: ignore[arg-type]
        store.close()

    def test_merging_changes_where_pages_lie_and_nothing_else(self, tmp_path: Path) -> None:
        store = self.open(tmp_path, MLA)
        for number in range(6):
            write(store, keys(number))
        reader = reader_for(MLA)
        chain = keys(*range(6))
        assert merge(store, reader, chain, mmap.mmap(-1, store.draft_bytes(6)), 6 * MLA.layer_bytes) == 6
        reader.close()
        assert (store.stats.pages, store.stats.extents) == (6, 1)
        with store.pin(chain) as pin:
            assert len(pin.segments) == 1
        self.assert_right(store, chain)
        store.close()

    def test_an_extent_has_one_owner_whatever_becomes_of_its_pages(self, tmp_path: Path) -> None:
        store = self.open(tmp_path, MLA)
        owners = ["a", "a", "b", "", "", "b", "b"]
        for number, owner in enumerate(owners):
            write(store, keys((number, 1), (number, 2)), owner=owner)
        reader = reader_for(MLA)
        chain = keys(*((number, page) for number in range(7) for page in (1, 2)))
        assert merge(store, reader, chain, mmap.mmap(-1, store.draft_bytes(14)), 3 * MLA.layer_bytes) == 6
        assert store.erase(keys((0, 2), (2, 1)))
        rest = [page for page in chain if page not in keys((0, 2), (2, 1))]
        of_rest = [(number, page) for number in range(7) for page in (1, 2) if (number, page) not in ((0, 2), (2, 1))]
        for _ in range(3):
            with store.pin(rest) as pin:
                found = [segment.extent.owner for segment in pin.segments for _ in range(segment.pages)]
                assert found == [owners[number] for number, _ in of_rest]
            self.assert_right(store, rest)
            store.close()
            store = self.open(tmp_path, MLA)
        reader.close()
        store.close()

    def test_an_owner_whose_name_moves_the_pages_is_served_as_well(self, tmp_path: Path) -> None:
        store = self.open(tmp_path, MLA)
        pages, owner = keys(*range(65)), "tenant " + "b" * 1000
        assert store.draft_bytes(65, owner) > store.draft_bytes(65)
        write(store, pages, owner=owner)
        self.assert_right(store, pages)
        write(store, keys(65, 66), owner=owner)
        assert store.erase(keys(3))
        store.close()
        store = self.open(tmp_path, MLA)
        self.assert_right(store, [*pages[:3], *pages[4:], *keys(65, 66)])
        store.close()

    def test_what_is_erased_is_in_no_file_and_what_lies_beside_it_is_kept(self, tmp_path: Path) -> None:
        store = self.open(tmp_path, MLA)
        write(store, keys(1, 2, 3, 4))
        write(store, keys(5))
        write(store, keys(6, 7))
        assert traces(tmp_path, MLA, keys(*range(9))) == set(keys(1, 2, 3, 4, 5, 6, 7))
        assert store.erase(keys(2, 5, 6, 9))
        assert traces(tmp_path, MLA, keys(*range(9))) == set(keys(1, 3, 4, 7))
        assert store.stored(keys(1, 2, 3, 4, 5, 6, 7)) == [True, False, True, True, False, False, True]
        assert (store.stats.pages, store.stats.pages_erased) == (4, 3)
        self.assert_right(store, keys(1, 3, 4, 7))
        assert store.erase(keys(2, 5, 6, 9))
        store.close()
        store = self.open(tmp_path, MLA)
        assert store.prefix_length(keys(2)) == store.prefix_length(keys(5)) == 0
        self.assert_right(store, keys(1, 3, 4, 7))
        write(store, keys(2), version=1)
        self.assert_right(store, keys(2), version=1)
        store.close()

    def test_copies_that_are_served_no_more_are_erased_too(self, tmp_path: Path) -> None:
        store = self.open(tmp_path, MLA)
        write(store, keys(1, 2, 3))
        write(store, keys(2), version=1)
        write(store, keys(4, 5))
        drop(store, key(4))
        assert store.erase(keys(2, 4))
        assert traces(tmp_path, MLA, keys(2, 4), versions=(0, 1)) == set()
        self.assert_right(store, keys(1, 3, 5))
        store.close()

    def test_what_is_pinned_is_erased_when_it_is_let_go(self, tmp_path: Path) -> None:
        store = self.open(tmp_path, MLA)
        write(store, keys(1, 2))
        reader = reader_for(MLA)
        with store.pin(keys(1, 2)) as pin:
            assert not store.erase(keys(1))
            with pytest.raises(KeyError):
                store.pin(keys(1))
            assert read(reader, [pin]) == expected(MLA, [pin])
            self.assert_right(store, keys(2))
        assert store.erase(keys(1))
        assert traces(tmp_path, MLA, keys(1, 2)) == set(keys(2))
        reader.close()
        store.close()

    def test_there_is_one_writer(self, tmp_path: Path) -> None:
        store = self.open(tmp_path, MLA)
        with pytest.raises(PageStoreLocked):
            self.open(tmp_path, MLA)
        store.close()
        store.close()
        self.open(tmp_path, MLA).close()
