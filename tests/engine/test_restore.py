from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from contents import content, drop, expected, key, keys, read, reader_for
from device import Rank, page_of

from agentstate.pages import DEMAND, PLANNED, Need, Stream, Urgency, handles
from agentstate.pages.files import open_direct
from engine_patch.feeds import Source
from engine_patch.restore import Restorer, RestoreStats


@pytest.fixture(params=[False, True], ids=["through staging", "straight"])
def rank(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rank]:
    rank = Rank(tmp_path / "rank0", addressable=request.param)
    yield rank
    rank.close()


@pytest.fixture(params=[1, 1 << 20], ids=["small chunks", "large chunks"])
def restorer(rank: Rank, request: pytest.FixtureRequest) -> Iterator[Restorer]:
    """Eight pages are stored, in three extents: 0 1 2 3, 4 5 and 6 7."""
    for extent in ([0, 1, 2, 3], [4, 5], [6, 7]):
        rank.write(keys(*extent))
    restorer = Restorer(rank.store, rank.pages, reader_for(rank.store.geometry, request.param))
    yield restorer
    restorer.close()


def is_restored(rank: Rank, page: bytes, number: int, version: int = 0) -> bool:
    geometry = rank.store.geometry
    return page_of(rank.tensors, number) == [
        [content(geometry, page, layer, component, version) for component in range(len(geometry.component_bytes))]
        for layer in range(geometry.layers)
    ]


def is_blank(rank: Rank, number: int) -> bool:
    return not any(any(part) for layer in page_of(rank.tensors, number) for part in layer)


def queue(restorer: Restorer, rid: str, pages: list[int], numbers: list[int]) -> None:
    restorer.queue(rid, keys(*pages), torch.tensor(numbers))


def run(restorer: Restorer) -> set[str]:
    """Start what is queued, wait for it: the rids that failed. Every layer must have been released."""
    index = restorer.start()
    layers = released(restorer, index)
    failed = restorer.finish(index).failed
    assert [future.exception(timeout=0) for future in layers] == [None] * len(layers)
    restorer.drain()
    return failed


def counted(restorer: Restorer) -> RestoreStats:
    """The counters once the thread that restores has made its entries, which it does after it released the forward."""
    restorer.reset()
    return restorer.stats


def released(restorer: Restorer, index: int) -> list[Future[None]]:
    layers = list(restorer.arrivals.futures[index])
    assert layers
    return layers


def is_read_once(rank: Rank, n_bytes: int, pages: int) -> bool:
    """Whether so many bytes are those of ``pages`` pages, and of whole blocks around them."""
    least = pages * rank.store.geometry.page_bytes
    blocks = 0 if rank.pages.addressable else 2 * 4096 * 2 * 3 * pages
    return least <= n_bytes <= least + blocks


FORKS = [["a", "b"], ["c"], [], ["d"], ["e"], ["f"]]


def fork(rank: Rank, restorer: Restorer) -> dict[str, tuple[list[Any], list[int]]]:
    """Queue six requests that begin with the same pages: the names of the pages of each, and its device pages."""
    for names in filter(None, FORKS):
        rank.write(keys(*names))
    forks: dict[str, tuple[list[Any], list[int]]] = {}
    free = iter([17, 18, 5, 6, 7, 20, 2, 3, *range(8, 17)])
    for number, names in enumerate(FORKS):
        pages = [*range(1 if number == 2 else 2), *names]
        forks[f"f{number}"] = pages, [next(free) for _ in pages]
        queue(restorer, f"f{number}", *forks[f"f{number}"])
    return forks


def are_restored(rank: Rank, pages: list[Any], numbers: list[int]) -> bool:
    return all(is_restored(rank, key(page), number) for page, number in zip(pages, numbers, strict=True))


@pytest.mark.parametrize("ahead", [False, True])
def test_what_forks_have_in_common_is_read_once(rank: Rank, restorer: Restorer, ahead: bool) -> None:
    if ahead:
        restorer.prefetches.for_request("f3", keys(0))
        restorer.prefetches.for_session("another", keys(6, 7), 60)
    forks = fork(rank, restorer)
    restored = restorer.finish(restorer.start()).restored
    assert restored is not None
    assert all(are_restored(rank, *pages) for pages in forks.values())
    used = {number for _, numbers in forks.values() for number in numbers}
    assert all(is_blank(rank, number) for number in range(24) if number not in used)
    assert {rid: of.pages for rid, of in restored.requests.items()} == {rid: len(of[0]) for rid, of in forks.items()}
    stats = counted(restorer)
    assert is_read_once(rank, stats.bytes_read, 2 + 6)
    assert restored.n_bytes == stats.bytes_read, "counted for one of them"
    # The shortest one is fed by the same.
    assert restored.requests["f2"].n_bytes == 0
    assert restored.requests["f2"].sources == {Source.STAGING if ahead else Source.COLD}
    assert restored.requests["f0"].sources == ({Source.COLD, Source.STAGING} if ahead else {Source.COLD})


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_damaged_page_fails_those_that_need_it(rank: Rank, restorer: Restorer, layer: int) -> None:
    """One that all have in common but the shortest, and one that is a fork's own."""
    flip(rank, 1, layer)
    forks = fork(rank, restorer)
    found = restorer.finish(restorer.start())
    assert found.failed == {"f0", "f1", "f3", "f4", "f5"}
    assert found.unusable == dict.fromkeys(found.failed, frozenset(keys(1)))
    assert are_restored(rank, *forks["f2"])
    restorer.drain()
    assert [page for page in range(8) if key(page) not in rank.store] == [1]
    rank.write(keys(1))
    flip(rank, "d", layer)  # type: ignore[arg-type]
    for rid, pages in forks.items():
        queue(restorer, rid, *pages)
    assert run(restorer) == {"f3"}
    assert all(are_restored(rank, *pages) for rid, pages in forks.items() if rid != "f3")
    assert key("d") not in rank.store and key(1) in rank.store
    stats = counted(restorer)
    assert (stats.pages_failed, stats.requests_failed) == (2, 6)


def test_a_fork_that_is_cancelled_does_not_take_from_the_others(rank: Rank, restorer: Restorer) -> None:
    """Also the one whose pages the others joined."""
    forks = fork(rank, restorer)
    for rid in ("f0", "f4"):
        assert restorer.cancel(rid)
    assert run(restorer) == set()
    for rid, pages in forks.items():
        if rid in ("f0", "f4"):
            assert all(is_blank(rank, number) for number in pages[1])
        else:
            assert are_restored(rank, *pages)
    for rid, pages in forks.items():
        queue(restorer, rid, *pages)
    for rid in forks:
        assert restorer.cancel(rid)
    assert restorer.start() == -1
    assert eventually(lambda: restorer._reader.staged_bytes == 0)


def test_a_page_that_one_fork_lacks_fails_it_alone(rank: Rank, restorer: Restorer) -> None:
    queue(restorer, "a", [0, 1, 2, 99], [10, 11, 12, 13])
    queue(restorer, "b", [0, 1, 2, 3], [20, 21, 22, 23])
    found = restorer.finish(restorer.start())
    assert (found.failed, found.unusable) == ({"a"}, {"a": frozenset(keys(99))})
    assert are_restored(rank, [0, 1, 2, 3], [20, 21, 22, 23])


def restorer_of_a_drive_that_hangs(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> tuple[Restorer, threading.Event]:
    """Reads of pages wait until the event is set."""
    answers, real = threading.Event(), os.preadv

    def hangs(fd: int, buffers: list[object], offset: int) -> int:
        if offset:  # headers are read
            assert answers.wait(60)
        return real(fd, buffers, offset)

    restorer = Restorer(rank.store, rank.pages, reader_for(rank.store.geometry, 1), timeout_s=0.05)
    monkeypatch.setattr(os, "preadv", hangs)
    return restorer, answers


def test_forks_that_are_abandoned_are_not_written_to_any_more(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    rank.write(keys(0, 1, 2, 3))
    restorer, answers = restorer_of_a_drive_that_hangs(rank, monkeypatch)
    queue(restorer, "a", [0, 1, 2], [10, 11, 12])
    queue(restorer, "b", [0, 1, 2, 3], [20, 21, 22, 23])
    found = restorer.finish(restorer.start())
    assert (found.failed, found.restored, found.unusable) == ({"a", "b"}, None, {})
    assert found.writing is rank.pages.addressable
    answers.set()
    assert eventually(lambda: not restorer.arrivals.stuck)
    restorer.drain()
    assert all(is_blank(rank, number) for number in (20, 21, 22)), "what goes there passes a copy"
    assert rank.store.prefix_length(keys(0, 1, 2, 3)) == 4
    restorer.close()


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return True


def extent_of(rank: Rank, page: int) -> Path:
    return rank.store.pin(keys(page)).segments[0].extent.path


def flip(rank: Rank, page: int, layer: int, component: int = 1) -> None:
    (segment,) = rank.store.pin(keys(page)).segments
    offset = segment.extent.layout.component_range(layer, component, segment.slot, 1)[0] + 5
    with segment.extent.path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x20]))


def test_pages_come_back_into_other_slots_bit_for_bit(rank: Rank, restorer: Restorer) -> None:
    queue(restorer, "a", [0, 1, 2, 3, 4], [10, 11, 12, 13, 14])
    queue(restorer, "b", [6, 0, 7], [20, 3, 8])
    assert run(restorer) == set()
    for page, number in zip([0, 1, 2, 3, 4, 6, 0, 7], [10, 11, 12, 13, 14, 20, 3, 8], strict=True):
        assert is_restored(rank, key(page), number)
    assert all(is_blank(rank, number) for number in set(range(24)) - {10, 11, 12, 13, 14, 20, 3, 8})
    stats = counted(restorer)
    assert (stats.restores, stats.pages_restored, stats.pages_failed, stats.requests_failed) == (1, 8, 0, 0)
    assert is_read_once(rank, stats.bytes_read, 7)
    assert (stats.bytes_straight > 0) is rank.pages.addressable


def test_a_layer_is_released_once_all_its_pages_are_there_and_not_after_all_of_the_next_ones(
    rank: Rank, restorer: Restorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, list[bool]]] = []
    real = restorer.arrivals.complete
    rows = slice(10 * 4, 14 * 4)

    def complete(index: int, layer: int) -> None:
        seen.append((layer, [bool(part[rows].view(torch.uint8).any()) for part, _ in rank.tensors]))
        real(index, layer)

    monkeypatch.setattr(restorer.arrivals, "complete", complete)
    queue(restorer, "a", [0, 1, 2, 3], [10, 11, 12, 13])
    assert run(restorer) == set()
    assert [layer for layer, _ in seen] == [0, 1, 2]
    assert all(all(there[: layer + 1]) for layer, there in seen)
    if not rank.pages.addressable:
        assert [sum(there) for _, there in seen] == [1, 2, 3]


def test_a_batch_tells_what_it_brought_back_and_from_where(rank: Rank, restorer: Restorer) -> None:
    restorer.prefetches.for_request("b", keys(4, 5))
    queue(restorer, "a", [0, 1, 2], [10, 11, 12])
    queue(restorer, "b", [4, 5], [14, 15])
    restored = restorer.finish(restorer.start()).restored
    assert restored is not None
    assert {rid: (share.pages, share.sources) for rid, share in restored.requests.items()} == {
        "a": (3, {Source.COLD}),
        "b": (2, {Source.STAGING}),
    }
    assert all(share.n_bytes >= share.pages * rank.store.geometry.page_bytes for share in restored.requests.values())
    assert restored.n_bytes == sum(share.n_bytes for share in restored.requests.values())
    assert restored.sources == {Source.COLD, Source.STAGING}
    restored = restorer.finish(restorer.preload("a prefetch", keys(6), torch.tensor([3]))).restored
    assert restored is not None and restored.sources == {Source.DEVICE}


def test_what_failed_is_not_told_as_restored(rank: Rank, restorer: Restorer) -> None:
    flip(rank, 1, layer=2)
    queue(restorer, "a", [0, 1], [10, 11])
    queue(restorer, "b", [4, 5, 6], [14, 15, 16])
    found = restorer.finish(restorer.start())
    assert found.failed == {"a"}
    assert found.restored is not None
    assert {rid: share.pages for rid, share in found.restored.requests.items()} == {"b": 3}
    queue(restorer, "a", [0, 1], [10, 11])
    found = restorer.finish(restorer.start())
    assert (found.failed, found.restored, found.writing) == ({"a"}, None, False)


def test_nothing_queued_is_nothing_started(restorer: Restorer) -> None:
    assert restorer.start() == -1
    assert restorer.finish(-1).failed == set()
    assert counted(restorer).restores == 0


def test_batches_follow_each_other(rank: Rank, restorer: Restorer) -> None:
    queue(restorer, "a", [0, 1], [10, 11])
    first = restorer.start()
    queue(restorer, "b", [4, 5], [14, 15])
    second = restorer.start()
    assert first != second
    assert restorer.finish(second).failed == set()
    assert restorer.finish(first).failed == set()
    assert all(is_restored(rank, key(page), page + 10) for page in (0, 1, 4, 5))
    assert restorer.finish(first).failed == set()


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_flipped_byte_fails_its_own_request_and_drops_its_own_page(
    rank: Rank, restorer: Restorer, layer: int
) -> None:
    flip(rank, 2, layer)
    queue(restorer, "good", [4, 5], [4, 5])
    queue(restorer, "bad", [0, 1, 2, 3], [10, 11, 12, 13])
    queue(restorer, "also good", [0, 1, 3, 6], [20, 21, 23, 16])
    assert run(restorer) == {"bad"}
    for page, number in [(4, 4), (5, 5), (0, 20), (1, 21), (3, 23), (6, 16)]:
        assert is_restored(rank, key(page), number)
    assert [page for page in range(8) if key(page) not in rank.store] == [2]
    assert rank.store.prefix_length(keys(0, 1, 2, 3)) == 2
    stats = counted(restorer)
    assert (stats.pages_failed, stats.requests_failed, stats.pages_restored) == (1, 1, 6)


def test_a_damaged_page_that_two_requests_need_fails_both(rank: Rank, restorer: Restorer) -> None:
    flip(rank, 5, 1, component=0)
    queue(restorer, "a", [4, 5], [4, 5])
    queue(restorer, "b", [4, 5], [14, 15])
    queue(restorer, "c", [4], [20])
    assert run(restorer) == {"a", "b"}
    assert is_restored(rank, key(4), 20)
    assert key(5) not in rank.store and key(4) in rank.store


def test_what_failed_is_restored_once_it_was_written_again(rank: Rank, restorer: Restorer) -> None:
    flip(rank, 2, 0)
    queue(restorer, "a", [0, 1, 2, 3], [10, 11, 12, 13])
    assert run(restorer) == {"a"}
    rank.write(keys(2), version=1)
    queue(restorer, "a", [0, 1, 2, 3], [10, 11, 12, 13])
    assert run(restorer) == set()
    assert is_restored(rank, key(2), 12, version=1)
    assert is_restored(rank, key(3), 13)


def test_every_page_of_a_request_may_be_damaged(rank: Rank, restorer: Restorer) -> None:
    for page in range(4):
        flip(rank, page, page % 3)
    queue(restorer, "bad", [0, 1, 2, 3], [10, 11, 12, 13])
    queue(restorer, "good", [6, 7], [6, 7])
    assert run(restorer) == {"bad"}
    assert is_restored(rank, key(6), 6) and is_restored(rank, key(7), 7)


def test_a_cancelled_load_is_not_made(rank: Rank, restorer: Restorer) -> None:
    queue(restorer, "a", [0, 1], [10, 11])
    queue(restorer, "b", [4], [14])
    assert restorer.cancel("a")
    assert not restorer.cancel("a")
    assert run(restorer) == set()
    assert is_blank(rank, 10) and is_blank(rank, 11)
    assert is_restored(rank, key(4), 14)
    assert not restorer.cancel("b"), "it has been started"
    queue(restorer, "c", [0], [20])
    assert restorer.cancel("c")
    assert restorer.start() == -1


def test_a_page_that_is_missing_when_it_is_queued_fails_its_request_only(rank: Rank, restorer: Restorer) -> None:
    drop(rank.store, key(1))
    queue(restorer, "a", [0, 1, 2], [10, 11, 12])
    queue(restorer, "b", [4, 5], [14, 15])
    found = restorer.finish(restorer.start())
    assert (found.failed, found.unusable) == ({"a"}, {"a": frozenset(keys(1))})
    assert is_restored(rank, key(4), 14) and is_restored(rank, key(5), 15)
    assert all(is_blank(rank, number) for number in (10, 11, 12))
    assert counted(restorer).pages_failed == 0


def test_the_layers_are_released_also_when_no_request_can_be_read(rank: Rank, restorer: Restorer) -> None:
    drop(rank.store, key(1))
    queue(restorer, "a", [0, 1, 2], [10, 11, 12])
    assert run(restorer) == {"a"}


def test_a_page_that_is_dropped_between_queue_and_start_is_verified_all_the_same(
    rank: Rank, restorer: Restorer
) -> None:
    """Its bytes are still in the extent: right ones are restored, wrong ones are not."""
    queue(restorer, "a", [0, 1], [10, 11])
    drop(rank.store, key(1))
    assert run(restorer) == set()
    assert is_restored(rank, key(1), 11)
    flip(rank, 5, 2)
    queue(restorer, "b", [4, 5], [14, 15])
    drop(rank.store, key(5))
    assert run(restorer) == {"b"}
    assert rank.store.stats.pages_dropped == 2


def test_an_extent_that_is_cut_off_fails_the_requests_that_need_it(rank: Rank, restorer: Restorer) -> None:
    os.truncate(extent_of(rank, 4), 4096)
    queue(restorer, "a", [4, 5], [14, 15])
    queue(restorer, "b", [0, 1], [10, 11])
    assert run(restorer) == {"a"}
    assert is_restored(rank, key(0), 10) and is_restored(rank, key(1), 11)
    assert rank.store.prefix_length(keys(4, 5)) == 0


def test_a_request_is_served_again_after_its_unreadable_pages_were_computed_again(rank: Rank, tmp_path: Path) -> None:
    """What the engine does: restore, and where that fails compute, and offer, from the page that was dropped on."""
    for extent in ([0, 1, 2, 3], [4, 5]):
        rank.write(keys(*extent))
    restorer = Restorer(rank.store, rank.pages, reader_for(rank.store.geometry, 1 << 20))
    os.truncate(extent_of(rank, 4), 4096)
    for _ in range(8):
        queue(restorer, "a", [0, 1, 2, 3, 4, 5], [10, 11, 12, 13, 14, 15])
        if not run(restorer):
            break
        computed = keys(0, 1, 2, 3, 4, 5)[rank.store.prefix_length(keys(0, 1, 2, 3, 4, 5)) :]
        rank.write([page for page in computed if page not in rank.store])
    restorer.close()
    assert [is_restored(rank, key(page), page + 10) for page in range(6)] == [True] * 6


def test_pages_whose_extent_is_gone_are_not_offered_again(rank: Rank, restorer: Restorer) -> None:
    extent_of(rank, 4).unlink()
    queue(restorer, "a", [4, 5], [14, 15])
    assert run(restorer) == {"a"}
    assert rank.store.prefix_length(keys(4, 5)) == 0


def test_an_extent_that_is_gone_fails_the_requests_that_need_it(rank: Rank, restorer: Restorer) -> None:
    extent_of(rank, 4).unlink()
    queue(restorer, "a", [4, 5], [14, 15])
    queue(restorer, "b", [0, 1], [10, 11])
    assert restorer.finish(restorer.start()).failed == {"a"}


def test_an_extent_that_is_gone_releases_the_forward_and_is_not_the_end(rank: Rank, restorer: Restorer) -> None:
    path = extent_of(rank, 4)
    raw = path.read_bytes()
    path.unlink()
    queue(restorer, "a", [4, 5], [14, 15])
    index = restorer.start()
    layers = released(restorer, index)
    assert restorer.finish(index).failed == {"a"}
    assert all(future.done() for future in layers)
    assert counted(restorer).requests_failed == 1
    path.write_bytes(raw)
    queue(restorer, "b", [0, 1], [10, 11])
    assert run(restorer) == set()
    assert is_restored(rank, key(0), 10)


def test_a_reset_forgets_what_is_queued_and_waits_for_what_runs(rank: Rank, restorer: Restorer) -> None:
    queue(restorer, "a", [0, 1], [10, 11])
    index = restorer.start()
    queue(restorer, "b", [4], [14])
    restorer.reset()
    assert is_restored(rank, key(0), 10) and is_restored(rank, key(1), 11)
    assert is_blank(rank, 14)
    assert restorer.start() == -1
    assert restorer.finish(index).failed == set()
    queue(restorer, "c", [6], [16])
    assert run(restorer) == set()
    assert is_restored(rank, key(6), 16)


def test_restoring_leaves_the_store_as_it_was(rank: Rank, restorer: Restorer) -> None:
    queue(restorer, "a", [0, 1, 2, 3], [10, 11, 12, 13])
    assert run(restorer) == set()
    reader = reader_for(rank.store.geometry)
    requests = [rank.store.pin(keys(*range(8)))]
    assert read(reader, requests) == expected(rank.store.geometry, requests)
    reader.close()


def test_what_was_read_ahead_is_copied_and_the_rest_goes_straight(rank: Rank, restorer: Restorer) -> None:
    """A stream that covers more than the load wants: none of its other pages is written."""
    restorer.prefetches.for_request("a", keys(0, 1, 2, 3, 4, 5, 6))
    queue(restorer, "a", [2, 3, 4, 5], [9, 4, 20, 21])
    assert run(restorer) == set()
    assert all(is_restored(rank, key(page), number) for page, number in zip([2, 3, 4, 5], [9, 4, 20, 21], strict=True))
    assert all(is_blank(rank, number) for number in set(range(24)) - {9, 4, 20, 21})


def test_nothing_writes_to_the_device_once_a_batch_is_over(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restore that breaks down in the middle lets go of its pages only when nobody reads into them any more."""
    rank.write(keys(0, 1, 2, 3))
    second = rank.store.pin(keys(0)).segments[0].extent.layout.component_range(1, 0, 0, 1)[0]
    reading, released = threading.Event(), threading.Event()
    real = os.preadv

    def slow(fd: int, buffers: list[object], offset: int) -> int:
        if offset >= second // 4096 * 4096:
            reading.set()
            assert released.wait(60)
        return real(fd, buffers, offset)

    restorer = Restorer(rank.store, rank.pages, reader_for(rank.store.geometry, 1))
    broken = threading.Event()

    def break_down(*_: object) -> None:
        assert reading.wait(60)
        broken.set()
        raise RuntimeError("of this test")

    monkeypatch.setattr(restorer, "_land", break_down)
    monkeypatch.setattr(os, "preadv", slow)
    queue(restorer, "a", [0, 1, 2, 3], [10, 11, 12, 13])
    index = restorer.start()
    assert broken.wait(60)
    # The first layer is there, the second being read, and the batch broken.
    time.sleep(0.05)
    assert not restorer.landed(index)
    released.set()
    found = restorer.finish(index)
    assert (found.failed, found.restored, found.unusable) == ({"a"}, None, {})
    restorer.drain()
    assert rank.store.prefix_length(keys(0, 1, 2, 3)) == 4, "it was no page's fault"
    restorer.close()


@pytest.mark.parametrize("what", ["scatter", "fence", "finish", "after"])
def test_a_failure_of_the_device_drops_no_page(
    rank: Rank, restorer: Restorer, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("of this test")

    if what == "scatter" and rank.pages.addressable:
        pytest.skip("nothing is copied")
    monkeypatch.setattr(rank.pages if what == "scatter" else rank.pages.inbound, what, fail)
    queue(restorer, "a", [0, 1, 2, 3], [10, 11, 12, 13])
    queue(restorer, "b", [4, 5], [14, 15])
    index = restorer.start()
    layers = released(restorer, index)
    found = restorer.finish(index)
    assert (found.failed, found.restored, found.unusable) == ({"a", "b"}, None, {})
    assert all(layer.done() for layer in layers)
    stats = counted(restorer)
    assert (stats.pages_failed, stats.requests_failed) == (0, 2)
    assert rank.store.stats.pages_dropped == 0
    monkeypatch.undo()
    queue(restorer, "a", [0, 1, 2, 3], [10, 11, 12, 13])
    assert run(restorer) == set()
    assert all(is_restored(rank, key(page), page + 10) for page in range(4))


def test_wrong_pages_are_dropped_at_once_after_the_batch_is_over(
    rank: Rank, restorer: Restorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, over, calls = rank.store.drop, threading.Event(), []

    def drop(wrong: Iterable[tuple[bytes, int]]) -> int:
        assert over.wait(60)
        calls.append(set(wrong))
        return real(wrong)

    monkeypatch.setattr(rank.store, "drop", drop)
    for page, layer in [(1, 0), (2, 1), (5, 2)]:
        flip(rank, page, layer)
    queue(restorer, "a", [0, 1, 2, 3], [10, 11, 12, 13])
    queue(restorer, "b", [4, 5], [14, 15])
    queue(restorer, "c", [6, 7], [16, 17])
    index = restorer.start()
    found = restorer.finish(index)
    assert found.failed == {"a", "b"}
    assert found.unusable == {"a": frozenset(keys(1, 2)), "b": frozenset(keys(5))}
    assert rank.store.stats.pages_dropped == 0
    over.set()
    assert counted(restorer).pages_failed == 3
    assert [{page for page, _ in copies} for copies in calls] == [set(keys(1, 2, 5))]
    assert [page for page in range(8) if key(page) not in rank.store] == [1, 2, 5]


def refuse(monkeypatch: pytest.MonkeyPatch, bad: Path, number: int) -> None:
    """Let an extent not be opened."""
    real = open_direct

    def refusing(path: Path, flags: int) -> int:
        if path == bad:
            raise OSError(number, "of this test")
        return real(path, flags)

    monkeypatch.setattr(handles, "open_direct", refusing)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.EACCES])
def test_what_could_not_be_opened_is_kept(
    rank: Rank, restorer: Restorer, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = extent_of(rank, 4)
    for _ in range(3):
        refuse(monkeypatch, bad, number)
        queue(restorer, "a", [0, 1, 4, 5], [10, 11, 14, 15])
        queue(restorer, "b", [6, 7], [6, 7])
        found = restorer.finish(restorer.start())
        assert (found.failed, found.unusable) == ({"a"}, {"a": frozenset()}), "it matches nothing for once"
        assert is_restored(rank, key(6), 6) and is_restored(rank, key(7), 7)
        restorer.drain()
        assert all(page in rank.store for page in keys(*range(8)))
    stats = counted(restorer)
    assert (stats.pages_failed, stats.requests_failed) == (0, 3)
    monkeypatch.undo()
    queue(restorer, "a", [0, 1, 4, 5], [10, 11, 14, 15])
    assert run(restorer) == set()
    assert is_restored(rank, key(4), 14)


def test_what_a_drive_does_not_give_back_is_dropped_the_second_time(
    rank: Rank, restorer: Restorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = extent_of(rank, 4)

    def restore() -> set[str]:
        queue(restorer, "a", [0, 4, 5], [10, 14, 15])
        found = restorer.finish(restorer.start())
        restorer.drain()
        assert found.unusable == ({"a": frozenset(keys(4, 5))} if found.failed else {})
        return found.failed

    refuse(monkeypatch, bad, errno.EIO)
    assert restore() == {"a"}
    assert rank.store.prefix_length(keys(0, 4, 5)) == 3
    monkeypatch.undo()
    assert restore() == set(), "this time it does"
    refuse(monkeypatch, bad, errno.EIO)
    assert restore() == {"a"}
    assert rank.store.prefix_length(keys(0, 4, 5)) == 3
    assert restore() == {"a"}
    assert rank.store.prefix_length(keys(0, 4, 5)) == 1
    stats = counted(restorer)
    assert (stats.pages_failed, stats.pages_unread) == (2, 4)


def test_a_drive_that_does_not_answer_is_not_waited_for(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    rank.write(keys(0, 1, 2, 3))
    restorer, answers = restorer_of_a_drive_that_hangs(rank, monkeypatch)
    queue(restorer, "a", [0, 1], [10, 11])
    queue(restorer, "b", [2, 3], [12, 13])
    index = restorer.start()
    found = restorer.finish(index)
    assert (found.failed, found.restored) == ({"a", "b"}, None)
    assert found.writing is rank.pages.addressable
    assert [pages().tolist() for pages in found.numbers] == [[10, 11, 12, 13]]
    assert restorer.arrivals.stuck
    assert not restorer.landed(index)
    assert (restorer.stats.timed_out, restorer.stats.requests_failed) == (1, 2)
    answers.set()
    deadline = time.monotonic() + 30
    while restorer.arrivals.stuck:
        assert time.monotonic() < deadline
    # Nothing is wrong with the pages, and what is restored next is right, however long it takes.
    monkeypatch.setattr(restorer.arrivals, "_timeout_s", None)
    assert rank.store.prefix_length(keys(0, 1, 2, 3)) == 4
    queue(restorer, "a", [0, 1], [10, 11])
    assert run(restorer) == set()
    assert is_restored(rank, key(1), 11)
    assert (restorer.stats.restores, restorer.stats.pages_failed) == (1, 0)
    restorer.close()


def test_what_is_loaded_ahead_is_in_no_requests_way(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    rank.write(keys(0))
    rank.write(keys(1))
    inode = rank.store.pin(keys(0)).segments[0].extent.path.stat().st_ino
    answers = threading.Event()
    real = os.preadv

    def hangs(fd: int, buffers: list[object], offset: int) -> int:
        if offset and os.fstat(fd).st_ino == inode:
            assert answers.wait(60)
        return real(fd, buffers, offset)

    restorer = Restorer(rank.store, rank.pages, reader_for(rank.store.geometry, 2))
    monkeypatch.setattr(os, "preadv", hangs)
    ahead = restorer.preload("a prefetch", keys(0), torch.tensor([10]))
    queue(restorer, "a", [1], [11])
    assert restorer.finish(restorer.start()).failed == set()
    assert is_restored(rank, key(1), 11)
    assert not restorer.landed(ahead)
    answers.set()
    assert restorer.finish(ahead).failed == set()
    assert is_restored(rank, key(0), 10)
    restorer.close()


def test_what_is_loaded_ahead_has_a_lane_of_its_own(
    rank: Rank, restorer: Restorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []

    def watch(name: str) -> None:
        lane = getattr(rank.pages, name)
        for method in ("after", "fence", "finish"):
            real = getattr(lane, method)
            monkeypatch.setattr(lane, method, lambda *of, real=real: (used.append(name), real(*of))[1])

    real_scatter = rank.pages.scatter

    def scatter(*of: Any) -> None:
        used.append("background" if of[-1] is rank.pages.background else "inbound")
        real_scatter(*of)

    watch("inbound")
    watch("background")
    monkeypatch.setattr(rank.pages, "scatter", scatter)
    assert restorer.finish(restorer.preload("a prefetch", keys(0, 1), torch.tensor([10, 11]))).failed == set()
    restorer.drain()
    assert set(used) == {"background"}
    used.clear()
    queue(restorer, "a", [4], [14])
    assert run(restorer) == set()
    assert set(used) == {"inbound"}


def test_what_is_loaded_ahead_is_read_below_what_is_awaited(
    rank: Rank, restorer: Restorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_stream, urgencies = restorer._reader.open, []

    def opened(*of: Any, **how: Any) -> Stream:
        stream = open_stream(*of, **how)
        hurry = stream.hurry

        def hurried(*of: Any, **how: Any) -> None:
            hurry(*of, **how)
            urgencies.append(stream.urgency)

        urgencies.append(stream.urgency)
        stream.hurry = hurried  # type: ignore[method-assign]
        return stream

    monkeypatch.setattr(restorer._reader, "open", opened)
    restorer.finish(restorer.preload("a prefetch", keys(0, 1), torch.tensor([10, 11]), need=PLANNED))
    assert urgencies == [Urgency.PLANNED, Urgency.PLANNED]
    urgencies.clear()
    queue(restorer, "a", [4], [14])
    assert run(restorer) == set()
    assert urgencies == [Urgency.DEMAND, Urgency.AWAITED]


class Held:
    """A device event that has not happened yet."""

    def __init__(self) -> None:
        self.waited_for = threading.Event()
        self.happened = threading.Event()

    def synchronize(self) -> None:
        self.waited_for.set()
        assert self.happened.wait(60)


def test_a_preload_waits_for_none_that_is_less_urgent(rank: Rank, restorer: Restorer) -> None:
    events = {need: Held() for need in (PLANNED, Need(Urgency.DUE, 10.0))}
    held = [
        restorer.preload("held", keys(page), torch.tensor([10 + page]), [event], need)
        for page, (need, event) in enumerate(events.items())
    ]
    for event in events.values():
        assert event.waited_for.wait(60)
    later = restorer.preload("later", keys(2), torch.tensor([12]), need=PLANNED)
    assert restorer.finish(restorer.preload("for a request", keys(3), torch.tensor([13]))).failed == set()
    assert is_restored(rank, key(3), 13)
    # A request joins the one that has not begun yet, behind another of its kind.
    assert not restorer.landed(later)
    assert [restorer.is_queued(index) for index in (*held, later)] == [False, False, True]
    restorer.hasten(later, DEMAND)
    assert restorer.finish(later).failed == set()
    assert not any(restorer.landed(index) for index in held)
    for event in events.values():
        event.happened.set()
    assert [restorer.finish(index).failed for index in held] == [set(), set()]
    assert are_restored(rank, [0, 1, 2], [10, 11, 12])


def test_of_preloads_that_are_due_the_first_one_is_next(rank: Rank, restorer: Restorer) -> None:
    event, order = Held(), list[int]()
    complete = restorer.arrivals.complete

    def completed(index: int, layer: int) -> None:
        order.append(index)
        complete(index, layer)

    restorer.arrivals.complete = completed  # type: ignore[method-assign]
    due = [
        restorer.preload("due", keys(page), torch.tensor([10 + page]), ready, Need(Urgency.DUE, due_s))
        for page, (ready, due_s) in enumerate([([event], 50.0), ([], 40.0), ([], 30.0), ([], 35.0)])
        if not page or event.waited_for.wait(60)
    ]
    restorer.hasten(due[3], Need(Urgency.DUE, 20.0))
    event.happened.set()
    assert not any(restorer.finish(index).failed for index in due)
    layers = rank.store.geometry.layers
    assert order[::layers] == [due[0], due[3], due[2], due[1]]


def test_what_a_preload_takes_over_is_as_urgent_as_it(rank: Rank, restorer: Restorer) -> None:
    restorer.prefetches.for_session("a", keys(0, 1), 60)
    (reading,) = restorer.prefetches._readings
    event = Held()
    index = restorer.preload("for a request", keys(0, 1), torch.tensor([10, 11]), [event])
    assert reading.stream.needed == DEMAND
    event.happened.set()
    assert restorer.finish(index).failed == set()


def test_no_device_page_is_written_before_the_forwards_that_were_launched_are_over(
    rank: Rank, restorer: Restorer
) -> None:
    queue(restorer, "a", [0, 1], [10, 11])
    event = Held()
    index = restorer.start([event])
    assert event.waited_for.wait(60)
    assert all(is_blank(rank, number) for number in (10, 11))
    event.happened.set()
    assert restorer.finish(index).failed == set()
    assert is_restored(rank, key(0), 10)
