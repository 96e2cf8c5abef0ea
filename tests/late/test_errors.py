"""A device that runs out of memory, or breaks. Requests are recomputed, offers are not stored, and no stored page is
lost: nothing was found wrong with any."""

from __future__ import annotations

import pytest
import torch
from contents import keys

from engine_patch.restore import Restorer
from engine_patch.spill import Spiller
from late.device import LateDevice, illegal_access
from late.rank import Forward, Rank, on_return

# Every chunk of it, of two pages, is copied with indices.
SCATTERED = dict(zip([9, 4, 20, 17, 3, 11, 15, 13], range(8), strict=True))
NAMES = list(SCATTERED.values())


@pytest.fixture
def restorer(rank: Rank) -> Restorer:
    for first in range(0, 8, 2):
        rank.write(first, first + 1)
    return rank.restorer()


def restore(restorer: Restorer, forward: Forward, *ready: torch.Event) -> set[str]:
    """Restore two requests, with the forward beside that needs them: the rids that failed."""
    halves = list(SCATTERED.items())[:4], list(SCATTERED.items())[4:]
    for rid, pages in zip("ab", map(dict, halves), strict=True):
        restorer.queue(rid, keys(*pages.values()), torch.tensor(list(pages)))
    batch = restorer.start(ready)
    forward.run(restorer.arrivals, batch, [])
    return restorer.finish(batch).failed


ASKED_FOR = ["allocate", "pin", "index_copy_", "copy in", "record"]


@pytest.mark.parametrize("after", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("what", ASKED_FOR)
def test_a_restore_that_finds_no_memory_is_recomputed(
    device: LateDevice, rank: Rank, forward: Forward, restorer: Restorer, what: str, after: int
) -> None:
    device.fail(what, after=after)
    assert restore(restorer, forward) == {"a", "b"}
    assert device.faults == 1
    forward.write(dict.fromkeys(SCATTERED, "recomputed"))
    forward.finish()
    assert all(rank.on_device(number) == rank.expected("recomputed") for number in SCATTERED)
    restorer.close()


@pytest.mark.parametrize("what", ASKED_FOR)
def test_a_restore_that_finds_no_memory_loses_no_page(
    device: LateDevice, rank: Rank, forward: Forward, restorer: Restorer, what: str
) -> None:
    device.fail(what, after=3)
    assert restore(restorer, forward) == {"a", "b"}
    restorer.drain()
    assert rank.all_stored(*NAMES)
    # The memory is there again, and so is everything else.
    assert restore(restorer, forward) == set()
    assert all(rank.on_device(number) == rank.expected(name) for number, name in SCATTERED.items())
    restorer.close()


def test_what_was_queued_before_an_error_does_not_come_after_what_is_recomputed(
    device: LateDevice, rank: Rank, forward: Forward
) -> None:
    """A part of a chunk is on its way to the device when there is no memory for the next one, and no other chunk needs
    the buffer, so that nothing else waits for it."""
    for first in range(0, 8, 2):
        rank.write(first, first + 1)
    restorer = rank.restorer(small=False)
    with on_return(rank.pages, "scatter", lambda: device.fail("allocate")):
        assert restore(restorer, forward) == {"a", "b"}
    forward.write(dict.fromkeys(SCATTERED, "recomputed"))
    forward.finish()
    assert all(rank.on_device(number) == rank.expected("recomputed") for number in SCATTERED)
    restorer.close()


def test_a_restore_on_a_device_that_breaks_loses_nothing(
    device: LateDevice, rank: Rank, forward: Forward, restorer: Restorer
) -> None:
    device.fail("index_copy_", after=3, error=illegal_access, sticky=True)
    assert restore(restorer, forward) == {"a", "b"}
    assert restore(restorer, forward) == {"a", "b"}
    assert rank.all_stored(*NAMES)
    restorer.close()
    # The next engine.
    assert rank.stored(*NAMES) == [rank.expected(name) for name in NAMES]


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("what", ["allocate", "pin", "index_select", "copy out", "record"])
def test_an_offer_that_finds_no_memory_is_not_stored_and_the_next_one_is(
    device: LateDevice, rank: Rank, forward: Forward, what: str, after: int
) -> None:
    # Three extents, of pages that are in no run.
    spiller = Spiller(rank.store, rank.pages, 2 * rank.store.draft_bytes(6))
    pages = {number: f"computed {number}" for number in (*range(1, 19, 2), *range(0, 18, 2))}
    written = forward.write(pages)
    device.fail(what, after=after)
    spiller.offer(keys(*pages.values()), torch.tensor(list(pages)), [written])
    spiller.drain()
    assert device.faults == 1
    assert list(spiller.results) == [False]
    stored = [name for name in pages.values() if rank.all_stored(name)]
    assert not stored or rank.stored(*stored) == [rank.expected(name) for name in stored]
    spiller.offer(keys(*pages.values()), torch.tensor(list(pages)), [written])
    spiller.drain()
    assert list(spiller.results) == [False, True]
    assert rank.stored(*pages.values()) == [rank.expected(name) for name in pages.values()]
    spiller.close()


def test_offers_to_a_device_that_breaks_are_answered(device: LateDevice, rank: Rank, forward: Forward) -> None:
    rank.write(*NAMES)
    spiller = Spiller(rank.store, rank.pages, 1 << 20)
    written = forward.write({9: "computed", 4: "as well"})
    device.fail("copy out", after=1, error=illegal_access, sticky=True)
    for number, name in ((9, "computed"), (4, "as well")):
        spiller.offer(keys(name), torch.tensor([number]), [written])
    spiller.drain()
    assert list(spiller.results) == [False, False]
    assert not rank.all_stored("computed") and not rank.all_stored("as well")
    assert rank.all_stored(*NAMES)
    assert spiller.close(within_s=60)
