"""Space: the quota, eviction, pins, needs, merging, and what threads do to each other there."""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from contents import MARK, MLA, drop, expected, key, keys, read, reader_for, write

from agentstate.errors import OwnerFull, PageStoreFull
from agentstate.pages import ANYONE, PageStore, Quota, merge
from agentstate.pages import store as module
from agentstate.pages.eviction import Extent

HOUR_S = 3600.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PageStore]:
    store = PageStore(tmp_path, MARK, MLA)
    yield store
    store.close()


def left(store: PageStore, last: int = 9) -> list[int]:
    return [number for number in range(last + 1) if key(number) in store]


def room_for(store: PageStore, extents: int) -> Quota:
    """A quota of so many extents of one page each."""
    return Quota(max_bytes=extents * store.draft_bytes(1))


def merged(store: PageStore, chain: list[bytes], range_bytes: int) -> int:
    reader = reader_for(MLA)
    try:
        return merge(store, reader, chain, mmap.mmap(-1, 1 << 17), range_bytes)
    finally:
        reader.close()


def test_the_least_recently_used_goes_first_and_a_chain_from_its_end(store: PageStore) -> None:
    for number in range(5):
        write(store, keys(number))
    store.prefix_length(keys(1, 2, 0))
    store.quota = room_for(store, 5)
    seen = []
    for number in range(5, 9):
        write(store, keys(number))
        seen.append(left(store))
    assert seen == [[0, 1, 2, 4, 5], [0, 1, 2, 5, 6], [1, 2, 5, 6, 7], [1, 5, 6, 7, 8]]
    assert store.stats.pages_evicted == 4


def test_asking_what_is_stored_is_not_always_using_it(store: PageStore) -> None:
    for number in range(3):
        write(store, keys(number))
    assert store.prefix_length(keys(0), use=False) == 1
    assert store.prefix_length(keys(1)) == 1
    store.quota = room_for(store, 1)
    store.make_room(0)
    assert left(store) == [1]


def test_what_no_manifest_needs_goes_first_and_what_one_does_is_counted(store: PageStore) -> None:
    for number in range(4):
        write(store, keys(number))
    store.need(keys(0, 2))
    store.quota = room_for(store, 2)
    store.make_room(0)
    assert (left(store), store.stats.pages_evicted_needed) == ([0, 2], 0)
    store.quota = room_for(store, 1)
    store.make_room(0)
    assert (left(store), store.stats.pages_evicted_needed) == ([2], 1)
    with store.needing_only():
        pass
    assert store.collect() == store.draft_bytes(1)
    assert left(store) == []


def test_no_room_evicts_nothing(store: PageStore) -> None:
    for number in range(3):
        write(store, keys(number))
    store.retain(keys(0), time.monotonic() + HOUR_S)
    pin = store.pin(keys(1))
    store.quota = room_for(store, 3)
    with pytest.raises(PageStoreFull, match="cannot be evicted; make room on its disk"):
        store.make_room(2 * store.draft_bytes(1))
    assert left(store) == [0, 1, 2]
    store.make_room(store.draft_bytes(1))
    assert left(store) == [0, 1]
    pin.close()
    store.make_room(2 * store.draft_bytes(1))
    assert left(store) == [0]


def test_room_that_could_be_made_is_not_made_before_it_is_needed(store: PageStore) -> None:
    for number in range(2):
        write(store, keys(number))
    store.quota = room_for(store, 2)
    pin = store.pin(keys(1))
    store.require_room(store.draft_bytes(1))
    with pytest.raises(PageStoreFull, match="cannot be evicted; make room on its disk"):
        store.require_room(2 * store.draft_bytes(1))
    pin.close()
    store.require_room(2 * store.draft_bytes(1))
    assert left(store) == [0, 1]


def test_a_share_of_the_disk_stays_free(store: PageStore) -> None:
    write(store, keys(1))
    store.quota = Quota(free_fraction=1.0)
    with pytest.raises(PageStoreFull):
        write(store, keys(2))
    assert left(store) == [1]
    store.quota = Quota(free_fraction=0.0)
    write(store, keys(2))


def test_an_owner_whose_limit_is_below_one_extent_stores_nothing_and_is_told_once(
    store: PageStore, caplog: pytest.LogCaptureFixture
) -> None:
    write(store, keys(0), owner="tenant a")
    limits = {"tenant a": store.draft_bytes(1) - 1}
    store._space.limits = limits.get
    for number in range(1, 3):
        with pytest.raises(OwnerFull):
            store.require_room(store.draft_bytes(1, "tenant a"), "tenant a")
        with pytest.raises(OwnerFull):
            write(store, keys(number), owner="tenant a")
    write(store, keys(3), owner="tenant b")
    assert left(store) == [0, 3], "nothing goes for what is not stored"
    (said,) = [record.getMessage() for record in caplog.records if "tenant a" in record.getMessage()]
    assert f"it may hold {limits['tenant a']:,} bytes" in said
    store._space.limits = dict(limits).get
    with pytest.raises(OwnerFull):
        write(store, keys(1), owner="tenant a")
    assert len([record for record in caplog.records if "tenant a" in record.getMessage()]) == 2


def test_what_owners_have_beyond_their_limits_goes_first(store: PageStore) -> None:
    for number in range(9):
        write(store, keys(number), owner=("", "tenant a", "tenant b")[number // 3])
    one = store.draft_bytes(1)
    store.quota = room_for(store, 9)
    limits = {"tenant a": 2 * one, "tenant b": one}
    store._space.limits = limits.get
    assert left(store) == list(range(9)), "not before there is need"
    store.make_room(one)
    assert left(store) == [0, 1, 2, 3, 4, 5, 7, 8], "who has most beyond its limit is the first"
    store.make_room(3 * one)
    assert left(store) == [0, 1, 2, 4, 5, 8]
    store.make_room(4 * one)
    assert left(store) == [1, 2, 4, 5, 8]
    store._space.limits = None
    store.make_room(6 * one)
    assert left(store) == [4, 5, 8]


def test_merging_takes_no_extent_from_an_owner_at_its_limit(store: PageStore) -> None:
    for number in range(6):
        write(store, keys(number), owner="tenant a")
    limits = {"tenant a": store.stats.bytes}
    store._space.limits = limits.get
    assert merged(store, keys(2, 3, 4, 5), 4 * MLA.layer_bytes) == 4
    assert left(store) == [0, 1, 2, 3, 4, 5]
    assert store._space.owners() == {"tenant a": store.stats.bytes}


def test_an_owner_cannot_give_what_is_pinned(store: PageStore) -> None:
    for number in range(2):
        write(store, keys(number), owner="tenant a")
    limits = {"tenant a": store.stats.bytes}
    store._space.limits = limits.get
    one = store.draft_bytes(1)
    with store.pin(keys(0)):
        store.require_room(one, "tenant a")
        with pytest.raises(OwnerFull):
            store.require_room(2 * one, "tenant a")
        with pytest.raises(OwnerFull):
            write(store, keys(2, 3, 4, 5), owner="tenant a")
        assert left(store) == [0, 1]
        write(store, keys(2), owner="tenant a")
    assert left(store) == [0, 2]


@pytest.mark.parametrize("how", ["merged", "written anew"])
def test_needs_and_pins_follow_a_page_to_where_it_is_written_anew(store: PageStore, how: str) -> None:
    for number in range(6):
        write(store, keys(number))
    store.need(keys(0))
    store.retain(keys(2), time.monotonic() + HOUR_S)
    if how == "merged":
        assert merged(store, keys(0, 1), 2 * MLA.layer_bytes) == 2
        assert merged(store, keys(2, 3), 2 * MLA.layer_bytes) == 2
    else:
        write(store, keys(0, 1))
        write(store, keys(2, 3))
    store.collect()
    assert left(store) == [0, 1, 2, 3]


def test_a_page_that_is_held_somewhere_stays_there_when_it_is_merged_and_goes_when_it_is_released(
    store: PageStore,
) -> None:
    for number in range(3):
        write(store, keys(number))
    pin = store.pin(keys(1))
    assert merged(store, keys(0, 1, 2), 3 * MLA.layer_bytes) == 3
    (old,) = {segment.extent.path for segment in pin.segments}
    reader = reader_for(MLA)
    assert old.exists() and read(reader, [pin]) == expected(MLA, [pin])
    reader.close()
    pin.close()
    pin.close()
    assert not old.exists()
    assert (store.stats.extents, store.stats.pages) == (1, 3)
    assert store.stats.bytes == store.draft_bytes(3)


def test_what_the_disk_does_not_give_back_is_not_merged_and_not_dropped(store: PageStore) -> None:
    for number in range(3):
        write(store, keys(number))

    def failing(fd: int, buffers: object, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        assert merged(store, keys(0, 1, 2), 3 * MLA.layer_bytes) == 0
    assert left(store) == [0, 1, 2]
    assert merged(store, keys(0, 1, 2), 3 * MLA.layer_bytes) == 3


def test_a_wrong_page_is_dropped_by_merging_and_its_neighbours_stay(store: PageStore) -> None:
    for number in range(3):
        write(store, keys(number))
    with store.pin(keys(1)) as pin:
        (segment,) = pin.segments
    with segment.extent.path.open("r+b") as file:
        file.seek(segment.extent.layout.component_range(1, 0, 0, 1)[0])
        file.write(b"broken")
    assert merged(store, keys(0, 1, 2), 3 * MLA.layer_bytes) == 0
    assert left(store) == [0, 2]


def test_an_extent_whose_pages_a_later_one_has_already_is_deleted(store: PageStore) -> None:
    """Two writers of the same pages: the one that was given the earlier number ends last."""
    first = store.draft(keys(1), mmap.mmap(-1, store.draft_bytes(1)))
    for layer in range(MLA.layers):
        first.component(layer, 0)[:] = 0
    waiting, go_on = threading.Event(), threading.Event()
    rename = os.rename

    def late(source: Path, target: Path) -> None:
        if threading.current_thread() is writer:
            waiting.set()
            assert go_on.wait(60)
        rename(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", late)
        writer = threading.Thread(target=store.publish, args=(first,))
        writer.start()
        assert waiting.wait(60)
        write(store, keys(1))
        go_on.set()
        writer.join(60)
    reader = reader_for(MLA)
    with store.pin(keys(1)) as pin:
        assert read(reader, [pin]) == expected(MLA, [pin])
    reader.close()
    assert (store.stats.pages, store.stats.extents, store.stats.bytes) == (1, 1, store.draft_bytes(1))
    assert len(list((store.directory / "extents").iterdir())) == 1


def test_a_spare_that_is_gone_is_no_reason_to_fail(store: PageStore) -> None:
    for number in range(3):
        write(store, keys(number))
    store.quota = room_for(store, 3)
    real = os.open

    def gone(path: object, flags: int, *mode: int, **more: int) -> int:
        if str(path).endswith(".spare"):
            os.unlink(str(path))
        return real(path, flags, *mode, **more)  # type: ignore[call-overload, no-any-return]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", gone)
        write(store, keys(3))
    assert left(store) == [1, 2, 3]
    assert store.stats.bytes == sum(path.stat().st_size for path in store.directory.rglob("*.ext"))


def test_it_is_told_whose_pages_were_lost(store: PageStore) -> None:
    for number in range(5):
        write(store, keys(number))
    store.need(keys(0, 1), "ses_a")
    store.need(keys(1, 2), "ses_b")
    store.need(keys(2, 3), "ses_c")
    assert store.take_losers() == set()
    store.quota = room_for(store, 4)
    store.make_room(0)
    # Nobody needed what went.
    assert (left(store), store.take_losers()) == ([0, 1, 2, 3], set())
    store.quota = room_for(store, 2)
    store.make_room(0)
    assert (left(store), store.take_losers()) == ([2, 3], {"ses_a", "ses_b"})
    assert store.take_losers() == set()
    assert drop(store, key(3)) == 1
    assert store.take_losers() == {"ses_c"}
    write(store, keys(4))
    assert drop(store, key(4)) == 1
    # A manifest that was not told of, perhaps.
    assert store.take_losers() == {ANYONE}


@pytest.mark.parametrize("how", ["merged", "written anew"])
def test_whose_a_page_is_follows_it_to_where_it_is_written_anew(store: PageStore, how: str) -> None:
    for number in range(3):
        write(store, keys(number))
    store.need(keys(0), "ses_a")
    store.need(keys(1), "ses_b")
    if how == "merged":
        assert merged(store, keys(0, 1), 2 * MLA.layer_bytes) == 2
    else:
        write(store, keys(0, 1))
    assert store.take_losers() == set(), "nothing was lost"
    store.quota = room_for(store, 0)
    store.make_room(0)
    assert store.take_losers() == {"ses_a", "ses_b"}


def test_needs_end_when_all_are_told_anew_and_one_was_not_among_them(store: PageStore) -> None:
    for number in range(4):
        write(store, keys(number))
    store.need(keys(0, 1), "ses_gone")
    store.need(keys(2), "ses_a")
    with pytest.raises(RuntimeError), store.needing_only():
        raise RuntimeError("the database does not answer")
    with store.needing_only():
        store.need(keys(1), "ses_b")
        # By a request that ends just then.
        store.need(keys(2), "ses_new")
    store.quota = room_for(store, 2)
    store.make_room(0)
    assert (left(store), store.take_losers()) == ([1, 2], set())
    store.quota = room_for(store, 0)
    store.make_room(0)
    assert store.take_losers() == {"ses_b", "ses_new"}


def test_who_needs_an_extent_is_remembered_up_to_a_bound(store: PageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system prompt that 10,000 sessions share."""
    monkeypatch.setattr(module, "_MOST_TOLD", 50)
    for number in range(3):
        write(store, keys(number))
    store.need(keys(0), "ses_0")
    for session in range(300):
        store.need(keys(1), f"ses_{session}")
    assert sum(len(extent.needed_by) for extent in store._extents.values()) <= 51 + 1
    store.quota = room_for(store, 2)
    store.make_room(0)
    assert left(store) == [0, 1]
    store.quota = room_for(store, 0)
    store.make_room(0)
    assert store.take_losers() >= {"ses_0", ANYONE}
    assert store._told == 0


@pytest.mark.parametrize("extents", [20, 120])
def test_a_full_store_looks_at_few_extents_to_make_room(
    store: PageStore, extents: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(extents):
        write(store, keys(number))
    store.quota = room_for(store, extents)
    looked_at = []
    turn, evictable = Extent.turn, PageStore.evictable
    monkeypatch.setattr(Extent, "turn", lambda extent: (looked_at.append(extent), turn(extent))[1])
    monkeypatch.setattr(
        PageStore, "evictable", lambda store, extent: (looked_at.append(extent), evictable(store, extent))[1]
    )
    for number in range(10):
        store.require_room(store.draft_bytes(1))
        write(store, keys(f"new {number}"))
    assert left(store, extents) == list(range(10, extents))
    assert len(looked_at) <= 10 * 8


def next_(store: PageStore, extents: int) -> list[int]:
    """The numbers of what is evicted next for so many extents of one page, and needed."""
    return [one.extent.number for one in store.next_evicted(extents * store.draft_bytes(1))]


def test_what_is_evicted_next_is_what_is_evicted_then(store: PageStore) -> None:
    for number in range(16):
        write(store, keys(number))
        store.need(keys(number), f"session {number % 3}")
    store.quota = room_for(store, 18)
    store.prefix_length(keys(1))
    assert next_(store, 2) == [] and next_(store, 3) == [1], "an eighth of the room is looked ahead"
    store.quota = room_for(store, 16)
    store.retain(keys(2), time.monotonic() + HOUR_S)
    assert next_(store, 1) == [1] and next_(store, 2) == next_(store, 99) == [1, 4]
    assert store.next_evicted(store.draft_bytes(1))[0].sessions == {"session 0"}
    with store.pin(keys(0)):
        assert next_(store, 1) == [4]
    assert left(store, 15) == list(range(16)), "nothing is evicted"
    write(store, keys(16))
    store.need(keys(16))
    write(store, keys(17))
    assert left(store, 17) == [1, 2, *range(4, 18)]


def test_of_what_is_evicted_next_that_is_told_which_somebody_may_come_back_for(
    store: PageStore, tmp_path: Path
) -> None:
    for number in range(16):
        write(store, keys(number))
    store.quota = room_for(store, 16)
    store.need(keys(9))
    assert next_(store, 2) == []
    # It was used again, and so was what it is merged into, and it is after the store is opened again.
    store.prefix_length(keys(0))
    store.prefix_length(keys(1))
    for number in range(2, 16):
        store.need(keys(number))
    assert next_(store, 2) == [1, 2]
    store.release(keys(1))
    assert next_(store, 2) == [1], "nobody goes on from the other"
    assert [one.extent.number for one in store.needed(keys(0, 1, 2, 77))] == [1, 3]
    store.close()
    again = PageStore(tmp_path, MARK, MLA, store.quota)
    assert {one.extent.number for one in again.needed(keys(*range(16)))} == {1, 2}
    again.quota = Quota()
    assert merged(again, keys(0, 3, 5, 6), 4 * MLA.layer_bytes) == 4
    assert len(again.needed(keys(3, 5))) == 1 and again.needed(keys(4)) == []
    again.close()


def test_an_owner_at_its_limit_is_looked_ahead_of(store: PageStore) -> None:
    limits = {"a": 8 * store.draft_bytes(1, "a")}
    store._space.limits = limits.get
    for number in range(8):
        write(store, keys(number), owner="a")
        write(store, keys((number, "none")))
    store.need(keys(*range(8), *((number, "none") for number in range(8))))
    assert next_(store, 1) == [1]
    limits["a"] += store.draft_bytes(1, "a")
    store._space.limits = dict(limits).get
    assert next_(store, 1) == []


def test_whoever_wants_to_know_is_told_what_is_evicted(store: PageStore) -> None:
    told: list[tuple[list[bytes], bool]] = []
    write(store, keys(0, 1))
    write(store, keys(1, 2))
    store.need(keys(0))
    store.evicted = lambda extent, found: told.append((list(found), bool(extent.needed_by)))
    store.quota = room_for(store, 0)
    store.make_room(0)
    assert sorted(told) == sorted([(keys(0), True), (keys(1, 2), False)])
