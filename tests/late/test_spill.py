"""Storing pages beside forwards that write late, and that reuse pages as soon as they are freed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from contents import keys

from agentstate.pages.directory import Told
from engine_patch import versions
from engine_patch.following import FollowingSpiller
from engine_patch.spill import Spiller
from late.device import LateDevice
from late.rank import PAGES, Forward, Rank

STAGING_BYTES = 1 << 20


@pytest.fixture
def spiller(rank: Rank) -> Iterator[Spiller]:
    spiller = Spiller(rank.store, rank.pages, STAGING_BYTES)
    yield spiller
    spiller.close()


def offer(spiller: Spiller, pages: dict[int, object], *ready: torch.Event) -> None:
    spiller.offer(keys(*pages.values()), torch.tensor(list(pages)), ready)


@pytest.mark.parametrize("numbers", [[2, 3, 4], [9, 1, 6]], ids=["in a run", "scattered"])
def test_what_a_forward_still_writes_is_stored(
    rank: Rank, forward: Forward, spiller: Spiller, numbers: list[int]
) -> None:
    pages = {number: f"computed {number}" for number in numbers}
    for _ in range(2):  # what is stored is not written again
        offer(spiller, pages, forward.write(pages))
    spiller.drain()
    assert list(spiller.results) == [True, True]
    assert rank.stored(*pages.values()) == [rank.expected(name) for name in pages.values()]


def test_what_was_in_pages_when_they_were_offered_is_stored(rank: Rank, forward: Forward, spiller: Spiller) -> None:
    """When the result is in, the tree frees the pages, and the next forward writes to them."""
    for turn in range(3):
        pages = {number: f"turn {turn} page {number}" for number in (9, 1, 6, 7)}
        offer(spiller, pages, forward.write(pages))
        spiller.drain()
        assert spiller.results.popleft()
        forward.write(dict.fromkeys(pages, "of another request"))
        forward.finish()
        assert rank.stored(*pages.values()) == [rank.expected(name) for name in pages.values()]


def test_an_offer_of_several_extents_is_stored_as_it_was(rank: Rank, forward: Forward) -> None:
    """There are two buffers for the extents; each is sealed, and used again, when the copies to it are over."""
    spiller = Spiller(rank.store, rank.pages, rank.store.draft_bytes(3))
    pages = {number: f"computed {number}" for number in range(PAGES)}
    offer(spiller, pages, forward.write(pages))
    spiller.drain()
    assert list(spiller.results) == [True]
    assert rank.store.stats.extents > 2
    assert rank.stored(*pages.values()) == [rank.expected(name) for name in pages.values()]
    spiller.close()


def test_pages_that_are_restored_again_were_stored_right(rank: Rank, forward: Forward, spiller: Spiller) -> None:
    """A session's turn: computed, stored, evicted, overwritten, restored into other slots."""
    pages = {number: f"computed {number}" for number in (9, 1, 6, 7)}
    offer(spiller, pages, forward.write(pages))
    spiller.drain()
    reused = forward.write(dict.fromkeys(pages, "of another request"))
    restorer = rank.restorer()
    slots = dict(zip([7, 20, 9, 3], pages.values(), strict=True))
    restorer.queue("a", keys(*slots.values()), torch.tensor(list(slots)))
    batch = restorer.start([reused])
    forward.run(restorer.arrivals, batch, list(slots))
    assert restorer.finish(batch).failed == set()
    assert all(forward.seen(number) == rank.expected(name) for number, name in slots.items())
    assert rank.on_device(1) == rank.on_device(6) == rank.expected("of another request")
    restorer.close()


def test_an_offer_that_is_abandoned_is_not_stored_with_what_its_pages_become(
    rank: Rank, forward: Forward, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both buffers are full and the drive takes nothing: the third offer is answered, and its pages are reused."""
    spiller = Spiller(rank.store, rank.pages, STAGING_BYTES, timeout_s=0.01)
    takes, asked = threading.Event(), threading.Event()
    publish = rank.store.publish

    def hangs(draft: object) -> None:
        asked.set()
        assert takes.wait(60)
        publish(draft)

    monkeypatch.setattr(rank.store, "publish", hangs)
    pages = {number: f"computed {number}" for number in (9, 1, 6)}
    written = forward.write(pages)
    offer(spiller, {9: pages[9]}, written)
    assert asked.wait(60)
    offer(spiller, {1: pages[1]}, written)
    offer(spiller, {6: pages[6]}, written)
    while spiller.answered() < 3:
        pass
    assert list(spiller.results) == [False] * 3
    forward.write(dict.fromkeys(pages, "of another request"))
    forward.finish()
    takes.set()
    spiller.drain()
    # What had been copied is written all the same, and the rest is not made up of what is there now.
    for name in pages.values():
        assert not rank.all_stored(name) or rank.stored(name) == [rank.expected(name)]
    assert rank.all_stored(pages[9]) and not rank.all_stored(pages[6])
    spiller.close()


def test_what_a_forward_still_writes_is_stored_with_the_events_of_an_older_sglang(
    rank: Rank, forward: Forward, spiller: Spiller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: forward.module)
    linker = versions.linker_base(object)()
    linker.forward_stream = forward.stream
    pages = {number: f"computed {number}" for number in (9, 1, 6)}
    forward.write(pages)
    offer(spiller, pages, *linker.record_offload_ready())
    spiller.drain()
    assert rank.stored(*pages.values()) == [rank.expected(name) for name in pages.values()]


def test_a_rank_that_stores_nothing_compares_what_the_forward_wrote(
    rank: Rank, forward: Forward, spiller: Spiller, tmp_path: Path
) -> None:
    pages = {number: f"computed {number}" for number in (9, 1, 6)}
    offer(spiller, pages, forward.write(pages))
    spiller.drain()
    forward.write(dict.fromkeys(pages, "of another request"))
    forward.finish()
    view: Any = SimpleNamespace(
        told=lambda: Told(True, 1), stored=rank.store.stored, pin=rank.store.pin, look_again=list, directory=tmp_path
    )
    following = FollowingSpiller(view, rank.pages, "uint8")
    following.offer(keys(*pages.values()), torch.tensor(list(pages)), (forward.write(pages),))
    # Its result is in when nothing reads its pages any more.
    while not following.answered():
        pass
    forward.write(dict.fromkeys(pages, "of another request"))
    forward.finish()
    following.drain()
    assert list(following.results) == [True]
    assert following._compared == 3 and not following.unlike
    following.close()


def test_no_copy_goes_through_pageable_memory(
    device: LateDevice, rank: Rank, forward: Forward, spiller: Spiller
) -> None:
    pages = {number: f"computed {number}" for number in (9, 1, 6)}
    written = forward.write(pages)
    before = device.pageable_copies
    offer(spiller, pages, written)
    spiller.drain()
    assert device.pageable_copies == before
