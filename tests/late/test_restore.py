"""Restores beside forwards that read and write late. The right bytes are what is asserted."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from contents import keys

from engine_patch.feeds import Source
from engine_patch.restore import Restorer
from late.device import LateDevice
from late.rank import Forward, HangingDrive, Rank, on_return


@pytest.fixture
def restorer(rank: Rank) -> Iterator[Restorer]:
    """Pages 0 to 7 are stored, two an extent: a layer of them is four chunks, for which there are two buffers."""
    for first in range(0, 8, 2):
        rank.write(first, first + 1)
    restorer = rank.restorer()
    yield restorer
    restorer.close()


def queue(restorer: Restorer, rid: str, pages: dict[int, object]) -> None:
    """``pages`` are the names of what is restored, by device page."""
    restorer.queue(rid, keys(*pages.values()), torch.tensor(list(pages)))


# Scattered, so that they are copied with indices; and in one run.
SCATTERED = dict(zip([9, 4, 20, 21, 3, 11, 15, 13], range(8), strict=True))
IN_A_RUN = dict(zip(range(10, 18), range(8), strict=True))


@pytest.mark.parametrize("pages", [SCATTERED, IN_A_RUN], ids=["scattered", "in a run"])
def test_a_forward_reads_what_was_stored(
    rank: Rank, forward: Forward, restorer: Restorer, pages: dict[int, object]
) -> None:
    for _ in range(2):  # staging is used again
        queue(restorer, "a", pages)
        batch = restorer.start([forward.write({23: "before"})])
        forward.run(restorer.arrivals, batch, list(pages))
        assert restorer.finish(batch).failed == set()
        assert all(forward.seen(number) == rank.expected(name) for number, name in pages.items())
    assert rank.on_device(23) == rank.expected("before")


def test_a_layer_is_there_when_it_is_said_to_be(rank: Rank, forward: Forward, restorer: Restorer) -> None:
    forward.run_at_once(restorer, list(SCATTERED))
    queue(restorer, "a", SCATTERED)
    assert restorer.finish(restorer.start()).failed == set()
    assert all(forward.seen(number) == rank.expected(name) for number, name in SCATTERED.items())


def test_what_an_earlier_forward_still_writes_does_not_overwrite_what_is_restored(
    rank: Rank, forward: Forward, restorer: Restorer
) -> None:
    """Its pages were freed when its result was in, and given to a request that is restored, before it was over."""
    still_writing = forward.write({number: "of another request" for number in SCATTERED})
    queue(restorer, "a", SCATTERED)
    assert restorer.finish(restorer.start([still_writing])).failed == set()
    forward.finish()
    assert all(rank.on_device(number) == rank.expected(name) for number, name in SCATTERED.items())


def test_staging_is_not_read_into_before_it_is_copied(rank: Rank, restorer: Restorer) -> None:
    for pages in (SCATTERED, IN_A_RUN):
        queue(restorer, "a", pages)
        assert restorer.finish(restorer.start()).failed == set()
        assert all(rank.on_device(number) == rank.expected(name) for number, name in pages.items())


def test_pages_that_are_freed_are_another_requests(rank: Rank, forward: Forward, restorer: Restorer) -> None:
    """One request's pages become those of the next, computed or restored, and nothing of the former comes later."""
    queue(restorer, "a", {4: 0, 9: 1, 6: 2})
    assert restorer.finish(restorer.start()).failed == set()
    computed = forward.write({4: "computed"})
    queue(restorer, "b", {9: 5, 6: 7})
    batch = restorer.start([computed])
    forward.run(restorer.arrivals, batch, [9, 6])
    assert restorer.finish(batch).failed == set()
    assert (forward.seen(9), forward.seen(6)) == (rank.expected(5), rank.expected(7))
    assert rank.on_device(4) == rank.expected("computed")


def test_what_was_read_ahead_is_what_a_forward_sees(rank: Rank, forward: Forward, restorer: Restorer) -> None:
    restorer.prefetches.for_request("a", keys(*range(8)))
    restorer.prefetches.for_session("s", keys(2, 3), 60)
    queue(restorer, "a", SCATTERED)
    batch = restorer.start()
    forward.run(restorer.arrivals, batch, list(SCATTERED))
    found = restorer.finish(batch)
    assert found.restored is not None and found.restored.sources == {Source.STAGING}
    assert all(forward.seen(number) == rank.expected(name) for number, name in SCATTERED.items())


def test_what_is_loaded_ahead_shares_the_device_with_a_restore(
    rank: Rank, forward: Forward, restorer: Restorer
) -> None:
    ahead_pages, pages = {9: 0, 4: 1, 20: 2}, {21: 1, 3: 5, 11: 0}
    still_writing = forward.write(dict.fromkeys([*ahead_pages, *pages], "of another request"))
    ahead = restorer.preload(
        "a prefetch", keys(*ahead_pages.values()), torch.tensor(list(ahead_pages)), [still_writing]
    )
    queue(restorer, "a", pages)
    batch = restorer.start([still_writing])
    forward.run(restorer.arrivals, batch, list(pages))
    assert restorer.finish(batch).failed == restorer.finish(ahead).failed == set()
    assert all(forward.seen(number) == rank.expected(name) for number, name in pages.items())
    assert all(rank.on_device(number) == rank.expected(name) for number, name in ahead_pages.items())


def test_what_two_requests_need_comes_to_both(rank: Rank, forward: Forward, restorer: Restorer) -> None:
    first, second = {9: 0, 4: 1, 20: 2}, {21: 0, 3: 1, 11: 2, 15: 5}
    queue(restorer, "a", first)
    queue(restorer, "b", second)
    batch = restorer.start()
    forward.run(restorer.arrivals, batch, [*first, *second])
    assert restorer.finish(batch).failed == set()
    assert all(forward.seen(number) == rank.expected(name) for number, name in {**first, **second}.items())


def test_an_aborted_request_leaves_its_pages_and_its_memory_to_others(
    rank: Rank, forward: Forward, restorer: Restorer
) -> None:
    queue(restorer, "aborted", {9: 0, 4: 1, 20: 2})
    queue(restorer, "a", {21: 4, 3: 6})
    assert restorer.cancel("aborted")
    forward.write({number: "computed" for number in (9, 4, 20)})
    batch = restorer.start()
    forward.run(restorer.arrivals, batch, [21, 3])
    assert restorer.finish(batch).failed == set()
    assert (forward.seen(21), forward.seen(3)) == (rank.expected(4), rank.expected(6))
    assert all(rank.on_device(number) == rank.expected("computed") for number in (9, 4, 20))


def test_two_requests_have_the_same_page_in_slots_of_their_own(
    rank: Rank, forward: Forward, restorer: Restorer
) -> None:
    """Private slots: each has a copy until the tree has one. That of one is freed while the other's forward reads."""
    queue(restorer, "a", {9: 0, 4: 1})
    queue(restorer, "b", {20: 0, 21: 1})
    batch = restorer.start()
    forward.run(restorer.arrivals, batch, [9, 4])
    assert restorer.finish(batch).failed == set()
    forward.write({20: "computed", 21: "computed"})
    assert (forward.seen(9), forward.seen(4)) == (rank.expected(0), rank.expected(1))
    assert rank.on_device(20) == rank.on_device(21) == rank.expected("computed")


def test_nothing_comes_to_the_pages_of_a_batch_that_was_abandoned(rank: Rank, forward: Forward) -> None:
    """The first pages are queued to the device when the drive stops answering. The requests are recomputed."""
    rank.write(0, 1)
    rank.write(2, 3)
    drive = HangingDrive(rank.extent_of(2))
    restorer = rank.restorer(drive, timeout_s=0.01)
    copied = threading.Event()
    pages = {9: 0, 4: 1, 20: 2, 21: 3}
    with on_return(rank.pages, "scatter", copied.set):
        queue(restorer, "a", pages)
        batch = restorer.start()
        # Or it would be abandoned before there is anything to be waited for.
        assert copied.wait(60) and drive.hangs.wait(60)
        found = restorer.finish(batch)
    assert (found.failed, found.restored) == ({"a"}, None)
    forward.write(dict.fromkeys(pages, "computed"))
    forward.finish()
    drive.answer()
    restorer.drain()
    assert all(rank.on_device(number) == rank.expected("computed") for number in pages)
    assert rank.all_stored(0, 1, 2, 3)
    # What it had of staging is free again, and what is restored next is right.
    queue(restorer, "a", pages)
    batch = restorer.start()
    restorer.drain()
    assert restorer.finish(batch).failed == set()
    assert all(rank.on_device(number) == rank.expected(name) for number, name in pages.items())
    restorer.close()


def test_a_reset_leaves_nothing_on_its_way_to_the_device(rank: Rank, forward: Forward, restorer: Restorer) -> None:
    queue(restorer, "a", SCATTERED)
    restorer.start()
    queue(restorer, "b", {22: 0})
    restorer.reset()
    forward.write(dict.fromkeys([*SCATTERED, 22], "computed"))
    forward.finish()
    assert all(rank.on_device(number) == rank.expected("computed") for number in [*SCATTERED, 22])


def test_no_copy_goes_through_pageable_memory(device: LateDevice, rank: Rank, restorer: Restorer) -> None:
    """Such a copy would wait for everything that is queued, the forward's work too."""
    before = device.pageable_copies
    queue(restorer, "a", SCATTERED)
    assert restorer.finish(restorer.start()).failed == set()
    assert device.pageable_copies == before
