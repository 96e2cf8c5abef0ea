from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from contents import content, keys
from device import LAYERS, Rank, page_of

from agentstate.pages import DEMAND, PLANNED, LayerwiseReader, Need, Urgency
from engine_patch.feeds import Reading
from engine_patch.prefetch import Prefetches
from engine_patch.restore import Restorer


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def reader(rank: Rank) -> Iterator[LayerwiseReader]:
    reader = LayerwiseReader(rank.store.geometry, staging_bytes=4 << 20, threads=2, chunk_bytes=64 << 10)
    yield reader
    reader.close()


@pytest.fixture
def ahead(rank: Rank, reader: LayerwiseReader) -> Iterator[Prefetches]:
    rank.write(keys(*range(8)))
    ahead = Prefetches(rank.store, reader, Clock())
    yield ahead
    ahead.clear()


def restored(rank: Rank, restorer: Restorer, names: list[int]) -> set[str]:
    """Restore the pages ``names`` to the device pages 3, 4, …; the rids that failed."""
    restorer.queue("r", keys(*names), torch.arange(3, 3 + len(names)))
    index = restorer.start()
    failed = restorer.finish(index).failed
    restorer.drain()
    if not failed:
        for number, name in enumerate(names, 3):
            right = [
                [content(rank.store.geometry, keys(name)[0], layer, c) for c in range(2)] for layer in range(LAYERS)
            ]
            assert page_of(rank.tensors, number) == right
    return failed


def settled(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def taken(ahead: Prefetches, *names: int) -> list[tuple[Reading | None, range, int]]:
    return [(piece.reading, piece.pages, piece.at) for piece in ahead.take(keys(*names))]


def close(*readings: Reading | None) -> None:
    for reading in readings:
        assert reading is not None
        reading.stream.close()


def test_a_stream_is_taken_by_whoever_needs_its_pages(ahead: Prefetches) -> None:
    ahead.for_request("a", keys(*range(8)))
    ((reading, *found),) = taken(ahead, 3, 4, 5)
    assert reading is not None
    assert found == [range(3), 3]
    assert taken(ahead, 3, 4, 5) == [(None, range(3), 0)], "it has been taken"
    assert (ahead.stats.issued, ahead.stats.used, ahead.stats.wasted) == (1, 1, 0)
    close(reading)


def test_a_stream_is_taken_for_the_part_that_it_has(ahead: Prefetches) -> None:
    ahead.for_request("a", keys(2, 3))
    ahead.for_request("b", keys(6, 7))
    first, between, second, after = taken(ahead, 2, 3, 5, 6, 8)
    assert [first[1:], between, second[1:], after] == [
        (range(2), 0),
        (None, range(2, 3), 0),
        (range(3, 4), 0),
        (None, range(4, 5), 0),
    ]
    assert (len(ahead), ahead.stats.used) == (0, 2)
    close(first[0], second[0])


def test_what_is_being_read_is_not_read_twice(ahead: Prefetches) -> None:
    ahead.for_session("ses", keys(*range(8)), 10)
    ahead.for_request("a", keys(2, 3))
    ahead.for_request("b", keys(*range(8)))
    ahead.for_request("c", keys(7, 3))
    assert ahead.stats.issued == 1


def test_a_chain_that_begins_like_another_is_read_from_where_they_part(
    rank: Rank, ahead: Prefetches, reader: LayerwiseReader
) -> None:
    rank.write(keys("a", "b", "c"))
    ahead.for_request("1", keys(0, 1, 2, 3))
    ahead.for_request("2", keys(0, 1, 2, 3, "a"))
    whole = ahead.for_session("3", keys(0, 1, "b", "c"), 10)
    settled(lambda: whole() == 1)
    assert ahead.stats.issued == 3
    assert ahead.covers(keys(0, 1, "b", "c"))
    assert not ahead.covers(keys(0, 1, "b", "x"))
    # Of the first one, the others need a part still.
    ahead.tidy({"2"})
    assert ahead.stats.wasted == 0
    found = taken(ahead, 0, 1, 2, 3, "a")  # type: ignore[arg-type]
    assert [piece[1:] for piece in found] == [(range(4), 0), (range(4, 5), 0)]
    assert whole() == 1, "a request has the rest"
    ahead._clock.now = 10
    ahead.tidy(())
    assert (len(ahead), ahead.stats.used, ahead.stats.wasted) == (0, 2, 1)
    close(*(piece[0] for piece in found))
    settled(lambda: reader.staged_bytes == 0)
    assert not ahead._requests and not ahead._sessions


def test_what_a_queued_request_needs_is_no_background_work(ahead: Prefetches) -> None:
    ahead.for_session("ses", keys(*range(4)), 10)
    ahead.for_session("other", keys(5, 6), 10)
    ahead.for_request("a", keys(0, 1))
    ahead.for_request("b", keys(7))
    assert needs(ahead, [0, 1, 2, 3], [5, 6], [7]) == [DEMAND, PLANNED, DEMAND]


def needs(ahead: Prefetches, *names: list[int]) -> list[Need]:
    """By when what is read of these pages is needed."""
    found = []
    for some in names:
        ((reading, *_),) = taken(ahead, *some)
        assert reading is not None
        found.append(reading.stream.needed)
        close(reading)
    return found


def test_what_several_need_is_read_when_the_first_needs_it(ahead: Prefetches) -> None:
    soon, later = Need(Urgency.DUE, 10.0), Need(Urgency.DUE, 20.0)
    ahead.for_session("in case", keys(0, 1), 60)
    ahead.for_session("later", keys(0, 1), 60, later)
    ahead.for_session("the same again", keys(2, 3), 60, later)
    ahead.for_session("the same again", keys(2, 3), 60, soon)
    ahead.for_session("soon", keys(4, 5), 60, soon)
    ahead.for_session("in case, too", keys(4, 5), 60)
    assert needs(ahead, [0, 1], [2, 3], [4, 5]) == [later, soon, soon]


def test_what_is_not_stored_is_not_begun(ahead: Prefetches) -> None:
    assert ahead.for_session("ses", keys(1, 99), 10)() == 0
    ahead.for_request("a", keys(99))
    assert ahead.stats.issued == 0


def test_a_request_that_leaves_the_queue_frees_its_memory(ahead: Prefetches, reader: LayerwiseReader) -> None:
    ahead.for_request("a", keys(0, 1))
    ahead.for_request("b", keys(2, 3))
    settled(lambda: reader.staged_bytes > 0)
    ahead.tidy({"b"})
    assert (len(ahead), ahead.stats.wasted) == (1, 1)
    ahead.tidy(set())
    assert len(ahead) == 0
    settled(lambda: reader.staged_bytes == 0)


def test_a_prefetch_of_a_session_expires(ahead: Prefetches, reader: LayerwiseReader) -> None:
    clock = Clock()
    ahead._clock = clock
    first = ahead.for_session("ses", keys(0, 1), 10)
    ahead.for_session("ses", keys(0, 1), 10)
    assert ahead.stats.issued == 1, "the same again goes on"
    second = ahead.for_session("ses", keys(0, 1, 2), 10)
    settled(lambda: second() == 1)
    assert first() == 1, "what both have in common is read once"
    assert ahead.stats.issued == 2
    clock.now = 9
    ahead.tidy(())
    assert reader.staged_bytes > 0
    clock.now = 10
    ahead.tidy(())
    settled(lambda: reader.staged_bytes == 0)
    assert ahead.stats.wasted == 2
    assert (first(), second()) == (0, 0)


def test_a_prefetch_tells_how_much_of_it_the_memory_holds(rank: Rank) -> None:
    rank.write(keys(*range(8)))
    # Two buffers, one of them kept back, for a layer each.
    rank.write(keys("other"))
    reader = LayerwiseReader(rank.store.geometry, staging_bytes=2 * 40_960, threads=1)
    ahead = Prefetches(rank.store, reader, Clock())
    share = ahead.for_session("ses", keys(*range(8)), 10)
    settled(lambda: share() is not None)
    assert share() == 1 / LAYERS
    # There is nothing left for another one.
    assert ahead.for_session("other", keys("other"), 10)() in (0, None)
    ((reading, *_),) = taken(ahead, *range(8))
    assert share() == 1, "a request has it"
    close(reading)
    ahead.clear()
    reader.close()


def test_giving_up_does_not_wait_for_a_drive(
    ahead: Prefetches, reader: LayerwiseReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, answers = threading.Event(), threading.Event()
    real = os.preadv

    def hangs(fd: int, buffers: list[object], offset: int) -> int:
        reading.set()
        assert answers.wait(60)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", hangs)
    ahead.for_request("a", keys(0, 1))
    assert reading.wait(60)
    ahead.tidy(set())
    assert (len(ahead), ahead.stats.wasted) == (0, 1)
    assert not answers.is_set()
    answers.set()
    settled(lambda: reader.staged_bytes == 0)


def test_a_restore_joins_what_was_read_ahead_also_in_its_middle(rank: Rank, reader: LayerwiseReader) -> None:
    rank.write(keys(*range(8)))
    restorer = Restorer(rank.store, rank.pages, reader)
    for names in ([0, 1, 2, 3, 4, 5, 6, 7], [2, 3, 4], [7]):
        share = restorer.prefetches.for_session("ses", keys(*range(8)), 10)
        settled(lambda share=share: share() == 1)
        before = restorer.prefetches.stats.used
        assert restored(rank, restorer, names) == set()
        assert restorer.prefetches.stats.used == before + 1
    assert restored(rank, restorer, [6, 5]) == set(), "nothing is left to join"
    assert restorer.prefetches.stats.used == 3
    restorer.close()


def test_a_page_outside_of_the_request_that_joined_does_not_fail_it(rank: Rank, reader: LayerwiseReader) -> None:
    rank.write(keys(*range(8)))
    restorer = Restorer(rank.store, rank.pages, reader)
    (segment,) = rank.store.pin(keys(1)).segments
    offset, _ = segment.extent.layout.component_range(1, 0, segment.slot, 1)
    with segment.extent.path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 8)
    restorer.prefetches.for_session("ses", keys(*range(8)), 10)
    assert restored(rank, restorer, [2, 3, 4]) == set()
    assert keys(1)[0] in rank.store, "whoever needs it finds out"
    restorer.prefetches.for_session("ses", keys(*range(8)), 10)
    assert restored(rank, restorer, [0, 1]) == {"r"}
    assert keys(1)[0] not in rank.store
    restorer.close()


def test_what_is_read_of_pages_that_are_erased_is_abandoned(ahead: Prefetches, rank: Rank) -> None:
    fractions = [ahead.for_session(session, keys(*pages), 60) for session, pages in (("a", (0, 1, 2)), ("b", (4, 5)))]
    ahead.for_request("r", keys(1, 2))
    ahead.forget(set(keys(2, 7)))
    settled(lambda: fractions[1]() == 1)
    assert fractions[0]() == 0
    assert ahead.kept() == {"request_read_aheads": 0, "session_read_aheads": 1, "streams_read_ahead": 1}
    settled(lambda: rank.store.pinned == 1)
