from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contents import drop, key, keys, read, reader_for
from device import PAGES, Rank, fill

from agentstate.pages import PageKeys, Quota, files
from agentstate.pages.directory import Told, told
from agentstate.pages.files import open_direct
from engine_patch import spill
from engine_patch.spill import Spiller

Stored = list[list[list[bytes]]]


@pytest.fixture
def spiller(rank: Rank) -> Iterator[Spiller]:
    fill(rank.tensors)
    spiller = Spiller(rank.store, rank.pages, 1 << 20)
    yield spiller
    spiller.close()


class Gate:
    """What `ready` takes: an event that the device pages may be read after."""

    def __init__(self) -> None:
        self.waited_for = threading.Event()
        self.open = threading.Event()

    def synchronize(self) -> None:
        self.waited_for.set()
        assert self.open.wait(60)


class Clock:
    """The time of a spiller, which passes when a test lets it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        monkeypatch.setattr("engine_patch.spill.time", self)

    def monotonic(self) -> float:
        return self.now


def numbers(*pages: int) -> torch.Tensor:
    return torch.tensor(pages)


def stored(rank: Rank, pages: list[bytes]) -> Stored:
    """What the store holds of ``pages``: for each, for every layer, its components' bytes."""
    reader = reader_for(rank.store.geometry)
    found: dict[tuple[int, int, int], Any] = read(reader, [rank.store.pin(pages)])
    reader.close()
    return [[found[0, layer, page] for layer in range(rank.store.geometry.layers)] for page in range(len(pages))]


def full(*args: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("pages", [[2, 3, 4], [9, 1, 6], [0]], ids=str)
def test_offered_pages_are_stored_bit_for_bit(rank: Rank, spiller: Spiller, pages: list[int]) -> None:
    spiller.offer(keys(*pages), torch.tensor(pages))
    spiller.drain()
    assert list(spiller.results) == [True]
    assert stored(rank, keys(*pages)) == rank.device_pages(pages)
    assert spiller.stats.pages_spilled == len(pages)
    assert spiller.stats.bytes_spilled == len(pages) * rank.store.geometry.page_bytes


def test_an_offer_that_exceeds_the_staging_becomes_several_extents(rank: Rank) -> None:
    fill(rank.tensors)
    staging = rank.store.draft_bytes(5)
    spiller = Spiller(rank.store, rank.pages, staging)
    everything = list(range(PAGES))
    spiller.offer(keys(*everything), torch.tensor(everything))
    spiller.close()
    assert list(spiller.results) == [True]
    assert stored(rank, keys(*everything)) == rank.device_pages(everything)
    assert rank.store.stats.extents == -(-PAGES // rank.store.pages_within(staging // 2)) > 1
    assert all(path.stat().st_size <= staging for path in rank.store.directory.rglob("*.ext"))


def test_no_result_comes_before_those_of_the_offers_before_it(rank: Rank, spiller: Spiller) -> None:
    """The second offer could be answered at once, for it is stored already; it waits for the first one."""
    spiller.offer(keys(1), numbers(1))
    spiller.drain()
    gate = Gate()
    spiller.offer(keys(2), numbers(2), ready=[gate])
    spiller.offer(keys(1), numbers(1))
    assert gate.waited_for.wait(60)
    assert list(spiller.results) == [True]
    gate.open.set()
    spiller.drain()
    assert list(spiller.results) == [True, True, True]


def test_results_are_those_of_the_offers_in_their_order(rank: Rank, spiller: Spiller) -> None:
    with pytest.MonkeyPatch.context() as patch:
        real = os.posix_fallocate
        calls: list[int] = []

        def every_second(fd: int, offset: int, length: int) -> None:
            calls.append(length)
            if len(calls) % 2 == 0:
                full()
            real(fd, offset, length)

        patch.setattr(os, "posix_fallocate", every_second)
        for page in range(5):
            spiller.offer(keys(page), numbers(page))
        spiller.drain()
    assert list(spiller.results) == [True, False, True, False, True]
    assert [key(page) in rank.store for page in range(5)] == [True, False, True, False, True]


def test_device_pages_are_not_read_before_they_are_ready(rank: Rank, spiller: Spiller) -> None:
    gate = Gate()
    spiller.offer(keys(1, 2), numbers(1, 2), ready=[gate])
    assert gate.waited_for.wait(60)
    fill(rank.tensors, seed=7)
    gate.open.set()
    spiller.drain()
    assert stored(rank, keys(1, 2)) == rank.device_pages([1, 2])


def test_what_is_stored_is_not_written_again(rank: Rank, spiller: Spiller) -> None:
    spiller.offer(keys(1, 2, 3), numbers(1, 2, 3))
    spiller.offer(keys(1, 2, 3), numbers(4, 5, 6))
    spiller.drain()
    assert rank.store.stats.extents == 1
    assert stored(rank, keys(1, 2, 3)) == rank.device_pages([1, 2, 3])
    spiller.offer(keys(1, 7, 2, 8), numbers(4, 10, 5, 11))
    spiller.drain()
    assert list(spiller.results) == [True, True, True]
    assert rank.store.stats.pages_written == 5
    assert stored(rank, keys(1, 7, 2, 8)) == rank.device_pages([1, 10, 2, 11])
    assert (spiller.stats.pages_spilled, spiller.stats.pages_known) == (5, 5)


def test_a_dropped_page_is_written_again(rank: Rank, spiller: Spiller) -> None:
    spiller.offer(keys(1, 2), numbers(1, 2))
    spiller.drain()
    drop(rank.store, key(2))
    spiller.offer(keys(1, 2), numbers(1, 5))
    spiller.drain()
    assert stored(rank, keys(1, 2)) == rank.device_pages([1, 5])


def test_a_full_disk_is_a_result_and_not_the_end(rank: Rank, spiller: Spiller) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        spiller.offer(keys(1, 2), numbers(1, 2))
        spiller.drain()
    assert list(spiller.results) == [False]
    assert (spiller.stats.pages_failed, spiller.stats.pages_spilled, spiller.stats.bytes_spilled) == (2, 0, 0)
    assert rank.store.prefix_length(keys(1)) == 0
    spiller.offer(keys(1, 2), numbers(1, 2))
    spiller.drain()
    assert list(spiller.results) == [False, True]
    assert stored(rank, keys(1, 2)) == rank.device_pages([1, 2])


@pytest.mark.parametrize(
    "number",
    [
        errno.ENOSPC,
        pytest.param(
            errno.EIO,
        ),
    ],
    ids=["ENOSPC", "EIO"],
)
def test_every_offered_page_is_counted_once(rank: Rank, number: int) -> None:
    spiller = Spiller(rank.store, rank.pages, rank.store.draft_bytes(1))
    spiller.offer(keys(0), numbers(0))
    spiller.drain()
    per_draft = rank.store.pages_within(rank.store.draft_bytes(1))
    offered = list(range(per_draft + 2))
    with pytest.MonkeyPatch.context() as patch:
        real = os.rename
        calls: list[object] = []

        def second_fails(source: Any, target: Any) -> None:
            calls.append(source)
            if len(calls) == 2:
                raise OSError(number, os.strerror(number))
            real(source, target)

        patch.setattr(os, "rename", second_fails)
        spiller.offer(keys(*offered), torch.tensor(offered))
        spiller.close()
    assert list(spiller.results) == [True, False]
    stats = spiller.stats
    assert (stats.pages_known, stats.pages_spilled, stats.pages_failed) == (1, 1 + per_draft, 1)


def test_an_unexpected_error_is_a_result_too(rank: Rank, spiller: Spiller) -> None:
    spiller.offer(keys(1), numbers(PAGES + 5))
    spiller.offer(keys(2), numbers(2))
    spiller.drain()
    assert list(spiller.results) == [False, True]
    assert key(1) not in rank.store
    assert stored(rank, keys(2)) == rank.device_pages([2])


def test_an_action_runs_after_what_was_offered_before_it(rank: Rank, spiller: Spiller) -> None:
    seen: list[tuple[int, int]] = []
    gate = Gate()
    spiller.offer(keys(1), numbers(1), ready=[gate])
    spiller.then(lambda: seen.append((rank.store.prefix_length(keys(1, 2)), len(spiller.results))))
    spiller.offer(keys(2), numbers(2))
    assert gate.waited_for.wait(60)
    assert seen == []
    gate.open.set()
    spiller.drain()
    assert seen == [(1, 1)]


def test_an_action_runs_also_after_an_offer_that_failed(rank: Rank, spiller: Spiller) -> None:
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        spiller.offer(keys(1), numbers(1))
        spiller.then(lambda: seen.append(rank.store.prefix_length(keys(1))))
        spiller.drain()
    assert seen == [0]


def test_an_action_that_fails_is_no_result_and_not_the_end(rank: Rank, spiller: Spiller) -> None:
    def action() -> None:
        raise RuntimeError("from the test")

    spiller.then(action)
    spiller.offer(keys(1), numbers(1))
    spiller.drain()
    assert list(spiller.results) == [True]
    assert spiller.stats.pages_failed == 0


def test_closing_stores_what_was_offered(rank: Rank) -> None:
    fill(rank.tensors)
    spiller = Spiller(rank.store, rank.pages, 1 << 20)
    for page in range(4):
        spiller.offer(keys(page), numbers(page))
    spiller.close()
    assert list(spiller.results) == [True] * 4
    assert stored(rank, keys(0, 1, 2, 3)) == rank.device_pages([0, 1, 2, 3])


def test_what_is_offered_while_spilling_is_off_is_stored_when_it_is_offered_again(rank: Rank, spiller: Spiller) -> None:
    spiller.on = False
    spiller.offer(keys(1, 2), numbers(1, 2))
    spiller.drain()
    assert spiller.results.popleft() is False
    assert (spiller.stats.pages_skipped, rank.store.stats.pages) == (2, 0)
    spiller.on = True
    spiller.offer(keys(1, 2), numbers(1, 2))
    spiller.drain()
    assert spiller.results.popleft() is True
    assert rank.store.stats.pages == 2


def test_pages_are_not_copied_when_there_is_no_room_for_them(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    rank.store.quota = Quota(max_bytes=1)
    spiller = Spiller(rank.store, rank.pages, 1 << 20)
    monkeypatch.setattr(rank.pages, "gather", None)
    spiller.offer(keys(0), numbers(0))
    spiller.close()
    assert list(spiller.results) == [False]
    assert spiller.stats.pages_failed == 1


def test_small_extents_of_a_chain_are_merged_when_nothing_waits(rank: Rank) -> None:
    fill(rank.tensors)
    spiller = Spiller(rank.store, rank.pages, 1 << 20)
    for page in range(9):
        spiller.offer(keys(page), numbers(page))
    spiller.merge(keys(*range(9)))
    deadline = time.monotonic() + 60
    while spiller.stats.extents_merged < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert spiller.stats.extents_merged >= 8
    assert rank.store.stats.extents <= 2
    assert stored(rank, keys(*range(9))) == rank.device_pages(list(range(9)))
    spiller.merge(keys(0, 77))  # one that is not stored
    spiller.offer(keys(10), numbers(10))
    spiller.close()
    assert list(spiller.results) == [True] * 10


def close_at_once(spiller: Spiller, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tell it to close while ``gate`` keeps it, and open the gate when its time is up."""
    assert gate.waited_for.wait(60)
    monkeypatch.setattr("engine_patch.spill._GRACE_S", 600)
    closing = threading.Thread(target=spiller.close, args=(0.0,))
    closing.start()
    while spiller._until_s > time.monotonic():
        time.sleep(0.001)
    gate.open.set()
    closing.join()


def test_closing_in_time_leaves_out_what_cannot_be_begun(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(rank.tensors)
    spiller = Spiller(rank.store, rank.pages, 1 << 20)
    gate = Gate()
    spiller.offer(keys(0), numbers(0), ready=[gate])
    spiller.offer(keys(1), numbers(1))
    close_at_once(spiller, gate, monkeypatch)
    assert list(spiller.results) == [True, False]
    assert spiller.stats.pages_skipped == 1


def test_closing_in_time_leaves_out_what_is_left_of_a_large_offer(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(rank.tensors)
    spiller = Spiller(rank.store, rank.pages, rank.store.draft_bytes(5))
    an_extent = spiller._writer.pages_an_extent
    real, gate = rank.pages.gather, Gate()
    monkeypatch.setattr(rank.pages, "gather", lambda *given: (gate.synchronize(), real(*given)))
    spiller.offer(keys(*range(PAGES)), torch.arange(PAGES))
    close_at_once(spiller, gate, monkeypatch)
    assert list(spiller.results) == [False]
    assert rank.store.prefix_length(keys(*range(PAGES))) == an_extent < PAGES
    stats = spiller.stats
    assert (stats.pages_spilled, stats.pages_skipped, stats.pages_failed) == (an_extent, PAGES - an_extent, 0)


class Hanging:
    """A store that takes nothing before it is told to."""

    def __init__(self, rank: Rank, monkeypatch: pytest.MonkeyPatch):
        self.called, self.goes_on = threading.Event(), threading.Event()
        publish = rank.store.publish

        def hang(draft: Any) -> None:
            self.called.set()
            assert self.goes_on.wait(60)
            publish(draft)

        monkeypatch.setattr(rank.store, "publish", hang)


def answered(spiller: Spiller, count: int) -> list[bool]:
    deadline = time.monotonic() + 60
    while spiller.answered() < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return list(spiller.results)


def test_a_drive_that_takes_nothing_locks_nothing(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(rank.tensors)
    right = rank.device_pages([1, 2])
    clock, hanging = Clock(monkeypatch), Hanging(rank, monkeypatch)
    spiller = Spiller(rank.store, rank.pages, 1 << 20, timeout_s=1)
    spiller.offer(keys(1, 2), numbers(1, 2))
    assert hanging.called.wait(60)
    # One draft is being published. Another one takes the next offer, and the others are not copied before one is over.
    for page in (3, 4, 5):
        spiller.offer(keys(page), numbers(page))
    clock.now += 1
    assert spiller.answered() == 0
    clock.now += 0.1
    assert answered(spiller, 4) == [False] * 4
    # While it hangs, it is known to.
    spiller.offer(keys(6), numbers(6))
    assert spiller.answered() == 5
    # All of these pages may be anything now.
    fill(rank.tensors, seed=7)
    hanging.goes_on.set()
    spiller.drain()
    assert list(spiller.results) == [False] * 5
    assert stored(rank, keys(1, 2)) == right
    assert [key(page) in rank.store for page in (4, 5, 6)] == [False, False, False]
    assert spiller.stats.pages_skipped >= 3
    # What had not been stored is, when it is offered again.
    spiller.offer(keys(*range(1, 7)), numbers(*range(1, 7)))
    spiller.drain()
    assert answered(spiller, 6)[-1]
    assert stored(rank, keys(5, 6)) == rank.device_pages([5, 6])
    assert stored(rank, keys(1, 2)) == right
    spiller.close()


def test_ranks_that_read_the_store_are_told_which_offers_are_over(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are not stored too; and those that were refused while the drive hung, once it goes on."""
    fill(rank.tensors)
    clock, hanging = Clock(monkeypatch), Hanging(rank, monkeypatch)
    spiller = Spiller(rank.store, rank.pages, 1 << 20, timeout_s=1)
    spiller.offer(keys(1), numbers(1))
    assert hanging.called.wait(60)
    clock.now += 2
    assert answered(spiller, 1) == [False]
    spiller.offer(keys(2), numbers(2))
    assert answered(spiller, 2) == [False] * 2
    assert told(rank.store.directory).offers == 0
    hanging.goes_on.set()
    spiller.drain()
    assert told(rank.store.directory) == Told(True, 2)
    over: list[int] = []
    for page in (1, 2, 3):
        spiller.offer(keys(page), numbers(page))
        spiller.then(lambda: over.append(told(rank.store.directory).offers))
    spiller.drain()
    assert over == [3, 4, 5] and all(rank.store.stored(keys(1, 2, 3)))
    spiller.close()


def test_a_slow_drive_is_waited_for(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it takes anything: it may take longer for all that waits than it may take for one."""
    fill(rank.tensors)
    clock, publish = Clock(monkeypatch), rank.store.publish

    def slow(draft: Any) -> None:
        clock.now += 1
        publish(draft)

    monkeypatch.setattr(rank.store, "publish", slow)
    # Of single pages, and one of several extents, which takes longer than that.
    spiller = Spiller(rank.store, rank.pages, 2 * rank.store.draft_bytes(1), timeout_s=1.5)
    assert 3 * spiller._writer.pages_an_extent < PAGES
    spiller.offer(keys(*range(PAGES)), numbers(*range(PAGES)))
    for page in range(PAGES, PAGES + 4):
        spiller.offer(keys(page), numbers(page - PAGES))
    assert answered(spiller, 5) == [True] * 5
    spiller.close()


def test_an_engine_ends_though_its_drive_hangs(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(rank.tensors)
    hanging = Hanging(rank, monkeypatch)
    monkeypatch.setattr("engine_patch.spill._GRACE_S", 0.1)
    spiller = Spiller(rank.store, rank.pages, 1 << 20)
    spiller.offer(keys(1), numbers(1))
    assert hanging.called.wait(60)
    assert not spiller.close(0.1)
    hanging.goes_on.set()
    spiller.drain()
    assert key(1) in rank.store


def test_pages_that_are_being_copied_stay_locked(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(rank.tensors)
    clock = Clock(monkeypatch)
    spiller = Spiller(rank.store, rank.pages, 1 << 20, timeout_s=0.05)
    copying, goes_on = threading.Event(), threading.Event()
    gather = rank.pages.gather

    def slow(*args: Any) -> None:
        copying.set()
        assert goes_on.wait(60)
        gather(*args)

    rank.pages.gather = slow  # type: ignore[method-assign]
    spiller.offer(keys(1), numbers(1))
    spiller.offer(keys(2), numbers(2))
    assert copying.wait(60)
    clock.now += 1
    assert spiller.answered() == 0
    goes_on.set()
    spiller.drain()
    assert answered(spiller, 2) == [True, True]
    spiller.close()


def test_time_without_offers_is_not_held_against_the_drive(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(rank.tensors)
    clock = Clock(monkeypatch)
    spiller = Spiller(rank.store, rank.pages, 1 << 20, timeout_s=0.5)
    goes_on = threading.Event()
    spiller.then(lambda: goes_on.wait(60))
    clock.now += 1
    spiller.offer(keys(1), numbers(1))
    assert spiller.answered() == 0
    goes_on.set()
    spiller.drain()
    assert answered(spiller, 1) == [True]
    spiller.close()


def test_an_offer_that_cannot_be_concluded_is_answered(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are told apart by their order alone."""
    fill(rank.tensors)
    spiller = Spiller(rank.store, rank.pages, 1 << 20)
    stored = rank.store.stored

    def breaks(pages: Any) -> Any:
        if threading.current_thread() is not spiller._thread:
            raise RuntimeError("from the test")
        return stored(pages)

    monkeypatch.setattr(rank.store, "stored", breaks)
    spiller.offer(keys(1), numbers(1))
    spiller.drain()
    monkeypatch.undo()
    spiller.offer(keys(2), numbers(2))
    spiller.drain()
    assert list(spiller.results) == [False, True]
    spiller.close()


@pytest.mark.parametrize("deleted", ["", "extents", "index"])
def test_storing_goes_on_after_the_page_directory_was_deleted(
    rank: Rank, spiller: Spiller, deleted: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also of pages that were stored before, and of which nothing new is written."""
    spiller.offer(keys(1, 2), numbers(1, 2))
    spiller.drain()
    shutil.rmtree(rank.store.directory / deleted)
    spiller.offer(keys(1, 2), numbers(1, 2))
    spiller.offer(keys(3), numbers(3))
    spiller.drain()
    assert list(spiller.results) == [True, True, True]
    assert stored(rank, keys(1, 2, 3)) == rank.device_pages([1, 2, 3])
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(told) == 1 and not told[0].exc_info
    assert (spiller.stats.pages_spilled, spiller.stats.pages_failed) == (3 if deleted == "index" else 5, 0)


def test_a_disk_that_takes_nothing_is_told_in_one_line_until_it_does(
    rank: Rank, spiller: Spiller, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(path: Path, flags: int) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def told() -> list[str]:
        assert not any(record.exc_info for record in caplog.records)
        return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]

    for rounds in (1, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "open_direct", refused)
            for page in range(3):
                spiller.offer(keys(page), numbers(page))
            spiller.drain()
        assert len(told()) == rounds and "Read-only file system" in told()[-1]
        spiller.offer(keys(f"good {rounds}"), numbers(5))
        spiller.drain()
    assert list(spiller.results) == [False, False, False, True] * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "open_direct", refused)
        spiller.offer(keys(0), numbers(0))
        spiller.drain()
        patch.setattr(os, "posix_fallocate", full)
        patch.setattr(files, "open_direct", open_direct)
        spiller.offer(keys(0), numbers(0))
        spiller.drain()
    # Another reason is said.
    assert len(told()) == 4 and "no room" in told()[-1]


def test_chains_to_be_merged_are_remembered_in_so_many_bytes(
    rank: Rank, spiller: Spiller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill, "_CHAINS_BYTES", 32 * 10)
    monkeypatch.setattr(spiller, "_merge_one", lambda: spiller._forget(next(iter(spiller._chains))))
    for chain in range(6):
        spiller._remember(PageKeys.of(keys(*((chain, page) for page in range(4)))))
    assert list(spiller._chains) == [keys((chain, 3))[0] for chain in (4, 5)]
    spiller._remember(PageKeys.of(keys(*((4, page) for page in range(4)))))
    assert list(spiller._chains) == [keys((chain, 3))[0] for chain in (5, 4)]
    assert spiller._chains_bytes == 32 * 8
    spiller._remember(PageKeys.of(keys(*range(11))))
    assert not spiller._chains and spiller._chains_bytes == 0


@pytest.mark.parametrize("session", ["new", None])
def test_pages_of_a_session_do_not_make_room_for_each_other(rank: Rank, session: str | None) -> None:
    """In a store that is full of what live manifests need, what its own manifest does not list yet would go first."""
    for number in range(8):
        before = keys((number, 1), (number, 2))
        rank.write(before)
        rank.store.need(before, f"session {number}")
    rank.store.quota = Quota(rank.store.stats.bytes + rank.store.stats.bytes // 16)
    fill(rank.tensors)
    spiller = Spiller(rank.store, rank.pages, rank.store.draft_bytes(5))
    pages = list(range(6))
    spiller.offer(keys(*pages), torch.tensor(pages), session_id=session)
    spiller.close()
    assert list(spiller.results) == [session is not None]
    assert rank.store.stats.pages_evicted_needed == (12 if session else 2)


def test_an_extent_is_charged_to_whose_request_offered_its_pages_first(rank: Rank, spiller: Spiller) -> None:
    spiller.offer(keys(1, 2), numbers(1, 2), owner="tenant a")
    spiller.offer(keys(1, 2, 3), numbers(1, 2, 3), owner="tenant b")
    spiller.offer(keys(4), numbers(4))
    spiller.drain()
    with rank.store.pin(keys(1, 2, 3, 4)) as pin:
        found = [(segment.extent.owner, segment.pages) for segment in pin.segments]
    assert found == [("tenant a", 2), ("tenant b", 1), ("", 1)]


def test_who_is_at_its_limit_is_not_complained_of_at_every_offer(
    rank: Rank, spiller: Spiller, caplog: pytest.LogCaptureFixture
) -> None:
    limits = {"tenant a": 1}
    rank.store._space.limits = limits.get
    for page in range(3):
        spiller.offer(keys((page, "a")), numbers(page), owner="tenant a")
        spiller.offer(keys(page), numbers(page), owner="tenant b")
    spiller.drain()
    assert list(spiller.results) == [False, True] * 3
    assert (spiller.stats.pages_failed, spiller.stats.pages_spilled) == (3, 3)
    (said,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "tenant a are not stored" in said


def test_with_one_shots_off_pages_of_nobody_are_written_once_a_second_request_uses_them(rank: Rank) -> None:
    fill(rank.tensors)
    spiller = Spiller(rank.store, rank.pages, 1 << 20, one_shots=False)
    spiller.offer(keys(1, 2, 3), numbers(1, 2, 3), rid="first")
    spiller.offer(keys(1, 2, 3), numbers(1, 2, 3), rid="first")
    spiller.drain()
    assert list(spiller.results) == [False, False]
    assert (rank.store.stats.pages, spiller.stats.pages_one_shot) == (0, 6)
    spiller.offer(keys(1, 2, 4), numbers(1, 2, 4), rid="second")
    spiller.offer(keys(5), numbers(5), owner="tenant a", rid="third")
    spiller.offer(keys(1, 2, 5), numbers(1, 2, 5), rid="fourth")
    spiller.close()
    assert list(spiller.results)[2:] == [False, True, True]
    assert rank.store.stored(keys(1, 2, 3, 4, 5)) == [True, True, False, False, True]
    named = rank.store.extent_names(keys(1, 2, 3, 4, 5))
    assert [name is not None for name in named] == [True, True, False, False, True]
    assert {name for name in named if name} <= {extent.path.name for extent in rank.store.extents()}
    stats = spiller.stats
    assert (stats.pages_spilled, stats.pages_one_shot, stats.pages_known, stats.pages_failed) == (3, 7, 3, 0)
    assert stored(rank, keys(1, 2, 5)) == rank.device_pages([1, 2, 5])


def test_what_the_shared_store_has_is_written_once_a_second_request_uses_it(rank: Rank) -> None:
    fill(rank.tensors)
    there = set(keys(1, 2))
    spiller = Spiller(rank.store, rank.pages, 1 << 20, shared=lambda asked: [key in there for key in asked])
    # The first two were restored, and the third was computed.
    spiller.offer(keys(1, 2, 3), numbers(1, 2, 3), rid="first")
    spiller.offer(keys(1, 2, 3), numbers(1, 2, 3), rid="first")
    spiller.drain()
    assert list(spiller.results) == [False, False]
    assert rank.store.stored(keys(1, 2, 3)) == [False, False, True]
    assert spiller.stats.pages_one_shot == 4
    spiller.offer(keys(1, 2, 3), numbers(1, 2, 3), rid="second")
    spiller.drain()
    assert spiller.results[2] and all(rank.store.stored(keys(1, 2, 3)))
    # A session has its own at once.
    there.update(keys(4))
    spiller.offer(keys(4), numbers(4), owner="tenant a", rid="third")
    spiller.close()
    assert spiller.results[3] and rank.store.stored(keys(4)) == [True]


def test_what_is_remembered_of_pages_that_were_seen_once_is_bounded(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill, "_MOST_SEEN", 4)
    spiller = Spiller(rank.store, rank.pages, 1 << 20, one_shots=False)
    for page in range(6):
        spiller.offer(keys(page), numbers(page), rid=f"of {page}")
    spiller.drain()
    assert len(spiller._seen._first) == 4
    for page in (0, 5):
        spiller.offer(keys(page), numbers(page), rid="later")
    spiller.close()
    assert rank.store.stored(keys(0, 5)) == [False, True]


def test_beyond_the_days_budget_only_what_sessions_computed_is_stored(
    rank: Rank, spiller: Spiller, caplog: pytest.LogCaptureFixture
) -> None:
    wear = rank.store.wear
    wear.budget = rank.store.draft_bytes(1)
    spiller.offer(keys(1), numbers(1))
    spiller.drain()
    for page in range(8):
        spiller.offer(keys((page, "none")), numbers(page))
        spiller.offer(keys((page, "a")), numbers(page), owner="tenant a")
        spiller.drain()
    assert list(spiller.results) == [True] + [False, True] * 8
    assert (spiller.stats.pages_over_budget, spiller.stats.pages_spilled) == (8, 9)
    (said,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "requests without a session" in said and "until 20" in said
    chain = keys(*((page, "a") for page in range(8)))
    spiller.merge(chain)
    spiller.drain()
    deadline = time.monotonic() + 60
    while spiller.kept()["chains_to_merge"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert spiller.stats.extents_merged == 0
    wear.budget = None
    spiller.offer(keys(2), numbers(2))
    spiller.drain()
    assert spiller.results[-1]
