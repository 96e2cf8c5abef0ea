"""Copies to host memory and back beside forwards that read and write late."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from contents import keys

from agentstate.pages import PosixBackend
from engine_patch.feeds import Source
from engine_patch.host_tier import HostPool, HostTier
from engine_patch.restore import Restorer
from late.device import LateDevice
from late.rank import PAGES, Forward, Rank

# Where the pages 0 to 7, all of which are stored, are on the device: scattered, so that they are copied with indices,
# and in one run. And where they are restored to.
SCATTERED = dict(zip([9, 1, 6, 7, 20, 21, 3, 14], range(8), strict=True))
IN_A_RUN = dict(zip(range(2, 10), range(8), strict=True))
ELSEWHERE = dict(zip([4, 23, 0, 11, 8, 22, 10, 13], range(8), strict=True))


class Stage:
    def __init__(self, rank: Rank, pages: int = PAGES):
        for first in range(0, 8, 2):
            rank.write(first, first + 1)
        self.rank = rank
        self.reader = rank.reader(small=False)
        # A page takes less than one of memory.
        self.tier = HostTier(pages * 4096, rank.device.torch_device, verify_threads=1)
        self.host = HostPool(self.tier, rank.store, rank.pages, self.reader, PosixBackend().on_host)
        self.restorer = Restorer(rank.store, rank.pages, self.reader, host=self.host)

    def demote(self, pages: dict[int, object], *ready: torch.Event) -> bool:
        self.host.demote(keys(*pages.values()), torch.tensor(list(pages)), ready)
        self.tier.drain()
        return self.host.results.popleft()

    def close(self) -> None:
        self.tier.end()
        self.restorer.close()
        self.tier.close()


@pytest.fixture
def stage(rank: Rank) -> Iterator[Stage]:
    stage = Stage(rank)
    yield stage
    stage.close()


def restored(stage: Stage, forward: Forward, *ready: torch.Event) -> set[Source]:
    """Restore pages 0 to 7, which a forward must see as they were stored; where they came from."""
    stage.restorer.queue("a", keys(*ELSEWHERE.values()), torch.tensor(list(ELSEWHERE)))
    batch = stage.restorer.start(ready)
    forward.run(stage.restorer.arrivals, batch, list(ELSEWHERE))
    found = stage.restorer.finish(batch)
    assert found.failed == set() and found.restored is not None
    assert all(forward.seen(number) == stage.rank.expected(name) for number, name in ELSEWHERE.items())
    return set(found.restored.sources)


@pytest.mark.parametrize("pages", [SCATTERED, IN_A_RUN], ids=["scattered", "in a run"])
def test_what_a_forward_still_writes_is_copied(stage: Stage, forward: Forward, pages: dict[int, object]) -> None:
    assert stage.demote(pages, forward.write(pages))
    assert restored(stage, forward) == {Source.HOST}


def test_what_was_in_pages_when_they_were_demoted_is_restored(stage: Stage, forward: Forward) -> None:
    """When the result is in, the tree drops the pages, and the next forward writes to them."""
    assert stage.demote(SCATTERED, forward.write(SCATTERED))
    still_writing = forward.write(dict.fromkeys([*SCATTERED, *ELSEWHERE], "of another request"))
    assert restored(stage, forward, still_writing) == {Source.HOST}


def test_a_copy_is_whole_before_it_is_summed_up(stage: Stage, forward: Forward) -> None:
    """Otherwise it is not what was summed up, or what was there before."""
    written = forward.write(SCATTERED)
    for number, name in SCATTERED.items():
        assert stage.demote({number: name}, written)
    assert restored(stage, forward) == {Source.HOST}
    assert stage.host.stats.pages_wrong == 0


def test_a_layer_is_there_when_it_is_said_to_be(stage: Stage, forward: Forward) -> None:
    stage.demote(IN_A_RUN, forward.write(IN_A_RUN))
    forward.run_at_once(stage.restorer, list(ELSEWHERE))
    stage.restorer.queue("a", keys(*ELSEWHERE.values()), torch.tensor(list(ELSEWHERE)))
    assert stage.restorer.finish(stage.restorer.start()).failed == set()
    assert all(forward.seen(number) == stage.rank.expected(name) for number, name in ELSEWHERE.items())


def test_memory_is_not_another_runs_before_it_is_copied_from(rank: Rank, forward: Forward) -> None:
    """Room for one page, that of a stream which is closed while a copy of it is queued."""
    stage = Stage(rank, 1)
    written = forward.write({9: 0, 1: 5})
    assert stage.demote({9: 0}, written)
    (piece,) = stage.host.pieces(keys(0))
    assert piece.reading is not None
    stream = piece.reading.stream
    stream.hurry()
    chunk = next(chunks := stream.layer(0))
    rank.pages.scatter(0, torch.tensor([17]), chunk.parts[0].arrays)
    chunk.keep_until = rank.pages.inbound.fence()
    assert next(chunks, None) is None
    stream.close()
    assert stage.demote({1: 5}, written) and stage.host.has(keys(0, 5)) == [False, True]
    assert rank.on_device(17)[0] == rank.expected(0)[0]
    stage.close()


def test_memory_of_a_stream_that_is_discarded_is_kept_until_its_copies_are_over(rank: Rank, forward: Forward) -> None:
    stage = Stage(rank, 1)
    written = forward.write({9: 0, 1: 5})
    assert stage.demote({9: 0}, written)
    (piece,) = stage.host.pieces(keys(0))
    assert piece.reading is not None
    piece.reading.stream.hurry()
    for chunk in piece.reading.stream.layer(0):
        rank.pages.scatter(0, torch.tensor([17]), chunk.parts[0].arrays)
        chunk.keep_until = rank.pages.inbound.fence()
    piece.reading.stream.discard()
    assert stage.demote({1: 5}, written)
    assert rank.on_device(17)[0] == rank.expected(0)[0]
    assert stage.host.kept()["host_streams"] == 0
    stage.close()


def test_a_batch_comes_from_host_memory_and_the_drive(stage: Stage, forward: Forward) -> None:
    pages = {9: 2, 4: 3, 20: 6}
    assert stage.demote(pages, forward.write(pages))
    assert restored(stage, forward) == {Source.HOST, Source.COLD}


def test_fetched_pages_are_restored(stage: Stage, forward: Forward) -> None:
    progress = stage.host.fetch("s", keys(*range(8)))
    stage.tier.drain()
    assert progress() == 1
    assert restored(stage, forward) == {Source.HOST}


def test_no_copy_goes_through_pageable_memory(device: LateDevice, stage: Stage, forward: Forward) -> None:
    written = forward.write(IN_A_RUN)
    before = device.pageable_copies
    stage.demote(IN_A_RUN, written)
    stage.restorer.queue("a", keys(*ELSEWHERE.values()), torch.tensor(list(ELSEWHERE)))
    assert stage.restorer.finish(stage.restorer.start()).failed == set()
    assert device.pageable_copies == before


@pytest.mark.parametrize("operation", ["copy out", "record", "wait", "synchronize", "pin"])
def test_an_error_of_the_device_costs_the_copies_alone(
    device: LateDevice, stage: Stage, forward: Forward, operation: str
) -> None:
    written = forward.write(IN_A_RUN)
    device.fail(operation)
    stage.demote(IN_A_RUN, written)
    restored(stage, forward, written)
    assert stage.host.stats.pages_wrong == 0
