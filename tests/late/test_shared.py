"""Restores from a store that engines share, beside forwards that read and write late."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from contents import MARK, keys
from shares import Share

from agentstate.tiers.pages import SharedPages
from engine_patch import shared_pool
from engine_patch.feeds import Source
from engine_patch.restore import Restorer
from engine_patch.shared_pool import SharedPool
from late.device import LateDevice
from late.rank import Forward, Rank, on_return

# Where the pages 0 to 7 are restored to: scattered, so that they are copied with indices, and in one run.
SCATTERED = dict(zip([9, 4, 20, 21, 3, 11, 15, 13], range(8), strict=True))
IN_A_RUN = dict(zip(range(10, 18), range(8), strict=True))


class Stage:
    """Pages 0 to 7 are in the share, two an extent: a layer of them is four chunks, for which there are two buffers."""

    def __init__(self, rank: Rank, directory: Path, timeout_s: float | None = None):
        self.rank = rank
        self.share = Share(directory / "share")
        geometry = rank.pages.geometry
        self.pages = SharedPages(directory / "shared", self.share.extents, MARK, geometry)
        settings: Any = SimpleNamespace(shared_reads=2)
        device = rank.device.torch_device
        self.pool = SharedPool(self.pages, rank.store, self.share.guard, geometry, device, settings, 2)
        self.restorer = Restorer(rank.store, rank.pages, rank.reader(), timeout_s, None, self.pool)
        self.listed = self.share.publish(self.pages, *(keys(first, first + 1) for first in range(0, 8, 2)))

    def queue(self, pages: dict[int, int]) -> None:
        """``pages`` are the names of what is restored, by device page."""
        self.restorer.queue("a", keys(*pages.values()), torch.tensor(list(pages)))

    def close(self) -> None:
        self.restorer.close()
        self.pool.close()
        self.share.close()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_pool, "_CHUNK_BYTES", 1)


@pytest.fixture
def stage(rank: Rank, tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(rank, tmp_path)
    yield stage
    stage.close()


@pytest.mark.parametrize("pages", [SCATTERED, IN_A_RUN], ids=["scattered", "in a run"])
def test_a_forward_reads_what_was_published(stage: Stage, forward: Forward, pages: dict[int, int]) -> None:
    for _ in range(2):  # staging is used again
        stage.queue(pages)
        batch = stage.restorer.start([forward.write({23: "before"})])
        forward.run(stage.restorer.arrivals, batch, list(pages))
        found = stage.restorer.finish(batch)
        assert found.failed == set() and found.restored is not None
        assert found.restored.sources == {Source.SHARED}
        assert all(forward.seen(number) == stage.rank.expected(name) for number, name in pages.items())
    assert stage.rank.on_device(23) == stage.rank.expected("before")


def test_a_layer_is_there_when_it_is_said_to_be(stage: Stage, forward: Forward) -> None:
    forward.run_at_once(stage.restorer, list(SCATTERED))
    stage.queue(SCATTERED)
    assert stage.restorer.finish(stage.restorer.start()).failed == set()
    assert all(forward.seen(number) == stage.rank.expected(name) for number, name in SCATTERED.items())


def test_what_an_earlier_forward_still_writes_does_not_overwrite_what_is_restored(
    stage: Stage, forward: Forward
) -> None:
    still_writing = forward.write({number: "of another request" for number in SCATTERED})
    stage.queue(SCATTERED)
    assert stage.restorer.finish(stage.restorer.start([still_writing])).failed == set()
    forward.finish()
    assert all(stage.rank.on_device(number) == stage.rank.expected(name) for number, name in SCATTERED.items())


def test_staging_is_not_read_into_before_it_is_copied(stage: Stage) -> None:
    for pages in (SCATTERED, IN_A_RUN):
        stage.queue(pages)
        assert stage.restorer.finish(stage.restorer.start()).failed == set()
        assert all(stage.rank.on_device(number) == stage.rank.expected(name) for number, name in pages.items())


def test_what_is_preloaded_is_there_when_it_has_landed(stage: Stage, forward: Forward) -> None:
    """As what the shared store has is, beside a restore from the drive."""
    stage.rank.write("on the drive")
    still_writing = forward.write(dict.fromkeys([*SCATTERED, 22], "of another request"))
    preload = stage.restorer.preload("a", keys(*SCATTERED.values()), torch.tensor(list(SCATTERED)), [still_writing])
    stage.restorer.queue("b", keys("on the drive"), torch.tensor([22]))
    batch = stage.restorer.start([still_writing])
    forward.run(stage.restorer.arrivals, batch, [22])
    assert stage.restorer.finish(batch).failed == stage.restorer.finish(preload).failed == set()
    assert forward.seen(22) == stage.rank.expected("on the drive")
    assert all(stage.rank.on_device(number) == stage.rank.expected(name) for number, name in SCATTERED.items())


def test_no_copy_goes_through_pageable_memory(device: LateDevice, stage: Stage) -> None:
    before = device.pageable_copies
    stage.queue(SCATTERED)
    assert stage.restorer.finish(stage.restorer.start()).failed == set()
    assert device.pageable_copies == before


def test_nothing_comes_to_the_pages_of_a_batch_that_was_abandoned(rank: Rank, forward: Forward, tmp_path: Path) -> None:
    """The first pages are queued to the device when the share stops answering. The requests are recomputed."""
    stage = Stage(rank, tmp_path, timeout_s=0.01)
    answers, hangs, copied = threading.Event(), threading.Event(), threading.Event()
    read, pages = stage.share.tier.read, dict(list(SCATTERED.items())[:4])

    def read_late(name: str, ranges: Any) -> Any:
        if name == stage.listed[1].name:
            hangs.set()
            assert answers.wait(60)
        return read(name, ranges)

    stage.share.tier.read = read_late  # type: ignore[method-assign]
    with on_return(rank.pages, "scatter", copied.set):
        stage.queue(pages)
        batch = stage.restorer.start()
        assert copied.wait(60) and hangs.wait(60)
        found = stage.restorer.finish(batch)
    assert (found.failed, found.restored) == ({"a"}, None)
    forward.write(dict.fromkeys(pages, "computed"))
    forward.finish()
    answers.set()
    stage.restorer.drain()
    assert all(rank.on_device(number) == rank.expected("computed") for number in pages)
    assert all(stage.pages.stored(keys(*range(8))))
    # What it had of staging is free again, and what is restored next is right.
    stage.queue(pages)
    batch = stage.restorer.start()
    stage.restorer.drain()
    assert stage.restorer.finish(batch).failed == set()
    assert all(rank.on_device(number) == rank.expected(name) for number, name in pages.items())
    stage.close()


@pytest.mark.parametrize("operation", ["copy in", "record", "wait", "synchronize"])
def test_an_error_of_the_device_costs_the_restore_alone(device: LateDevice, stage: Stage, operation: str) -> None:
    device.fail(operation)
    stage.queue(SCATTERED)
    stage.restorer.finish(stage.restorer.start())
    stage.restorer.drain()
    assert all(stage.pages.stored(keys(*range(8))))
    for _ in range(2):
        stage.queue(SCATTERED)
        found = stage.restorer.finish(stage.restorer.start())
        stage.restorer.drain()
    assert found.failed == set()
    assert all(stage.rank.on_device(number) == stage.rank.expected(name) for number, name in SCATTERED.items())
