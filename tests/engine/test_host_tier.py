from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from contents import MARK, MHA, content, drop, key, keys, reader_for, write
from device import Rank, page_of

from agentstate.fleet.quotas import Quota
from agentstate.pages import PageKeys, PageStore, fingerprint
from engine_patch.accounts import Accounts
from engine_patch.failures import NO_STORED_PAGE, Failures
from engine_patch.feeds import Source
from engine_patch.host_memory import Piece
from engine_patch.host_reading import HostRun
from engine_patch.host_tier import HostPool, HostTier
from engine_patch.restore import Finished, Restorer


class Stage:
    """A rank with a host tier of room for so many pages, at most ``a_run`` in a run. Device page ``n`` is given what
    page ``n`` of the store has; they are stored in extents of two."""

    def __init__(self, directory: Path, pages: int, addressable: bool = False, stored: int = 12, a_run: int = 4):
        self.rank = Rank(directory, addressable)
        geometry = self.rank.store.geometry
        # Of whole pages of memory, so that what fits can be counted.
        self.a_page = -(-geometry.page_bytes // 4096) * 4096
        self.accounts = Accounts()
        self.tier = HostTier(pages * self.a_page, torch.device("cpu"), accounts=self.accounts)
        self.reader = reader_for(geometry)
        self.host = HostPool(self.tier, self.rank.store, self.rank.pages, self.reader, lambda arrays: arrays)
        self.host._pages_a_run = a_run
        self.restorer = Restorer(self.rank.store, self.rank.pages, self.reader, host=self.host)
        for first in range(0, stored, 2):
            self.rank.write(keys(first, first + 1))
        for number in range(24):
            self.compute(number, number)

    def compute(self, number: int, name: object, version: int = 0) -> None:
        for layer, parts in enumerate(self.rank.pages._arrays or ()):
            for component, rows in enumerate(parts):
                data = content(self.rank.store.geometry, key(name), layer, component, version)
                rows[number] = np.frombuffer(data, dtype=np.uint8)

    def demote(self, *numbers: int, session: str | None = None) -> bool:
        self.host.demote(keys(*numbers), torch.tensor(numbers), session_id=session)
        self.tier.drain()
        return self.host.results.popleft()

    def here(self, *names: object) -> list[object]:
        return [name for name, here in zip(names, self.host.has(keys(*names)), strict=True) if here]

    def restore(self, pages: Sequence[object], numbers: Sequence[int], rid: str = "r") -> Finished:
        for number in numbers:
            self.compute(number, "something else")
        self.restorer.queue(rid, keys(*pages), torch.tensor(numbers))
        found = self.restorer.finish(self.restorer.start())
        self.restorer.drain()
        return found

    def has_on_device(self, pages: Sequence[object], numbers: Sequence[int]) -> bool:
        geometry = self.rank.store.geometry
        return all(
            page_of(self.rank.tensors, number)
            == [
                [content(geometry, key(page), layer, component) for component in range(len(geometry.component_bytes))]
                for layer in range(geometry.layers)
            ]
            for page, number in zip(pages, numbers, strict=True)
        )

    def run_of(self, name: object) -> HostRun:
        return self.host._pages[key(name)][0]

    def close(self) -> None:
        self.host.stop()
        self.tier.end()
        self.restorer.close()
        self.tier.close()
        self.rank.close()


Opening = Callable[..., Stage]


@pytest.fixture
def opening(tmp_path: Path) -> Iterator[Opening]:
    stages: list[Stage] = []

    def open_stage(pages: int = 24, **options: int) -> Stage:
        stages.append(Stage(tmp_path / f"rank{len(stages)}", pages, **options))
        return stages[-1]

    yield open_stage
    for stage in stages:
        stage.close()


@pytest.mark.parametrize("addressable", [False, True], ids=["through staging", "straight"])
@pytest.mark.parametrize("numbers", [[20, 7, 15, 3], [10, 11, 12, 13]], ids=["scattered", "in a run"])
def test_what_was_demoted_comes_back_without_the_drive(opening: Opening, addressable: bool, numbers: list[int]) -> None:
    stage = opening(addressable=addressable)
    assert stage.demote(0, 1, 2, 3)
    found = stage.restore(range(4), numbers)
    assert found.failed == set() and stage.has_on_device(range(4), numbers)
    assert found.restored is not None and found.restored.sources == {Source.HOST}
    n_bytes = 4 * stage.rank.store.geometry.page_bytes
    assert found.restored.n_bytes == n_bytes
    stats = stage.restorer.stats
    assert (stats.bytes_read, stats.bytes_host, stats.pages_host, stats.pages_restored) == (0, n_bytes, 4, 4)
    assert (stage.host.stats.pages_demoted, stage.host.stats.pages_used) == (4, 4)


@pytest.mark.parametrize("addressable", [False, True], ids=["through staging", "straight"])
def test_the_rest_comes_from_the_drive_in_the_same_batch(opening: Opening, addressable: bool) -> None:
    stage = opening(addressable=addressable)
    assert stage.demote(2, 3) and stage.demote(7)
    pages, numbers = [1, 2, 3, 4, 5, 6, 7, 8], [20, 12, 13, 9, 4, 22, 2, 15]
    found = stage.restore(pages, numbers)
    assert found.failed == set() and stage.has_on_device(pages, numbers)
    assert found.restored is not None and found.restored.sources == {Source.HOST, Source.COLD}
    assert stage.restorer.stats.pages_host == 3


def test_what_forks_need_of_it_is_copied_to_all_of_them(opening: Opening) -> None:
    stage = opening()
    stage.demote(0, 1, 2, 3)
    for number in range(12, 22):
        stage.compute(number, "something else")
    stage.restorer.queue("a", keys(0, 1, 2, 3), torch.tensor([12, 13, 14, 15]))
    stage.restorer.queue("b", keys(0, 1), torch.tensor([16, 17]))
    stage.restorer.queue("c", keys(0, 1, 2, 8), torch.tensor([18, 19, 20, 21]))
    stage.restorer.queue("cancelled", keys(2, 3), torch.tensor([10, 11]))
    assert stage.restorer.cancel("cancelled")
    found = stage.restorer.finish(stage.restorer.start())
    assert found.failed == set()
    assert stage.has_on_device([0, 1, 2, 3, 0, 1, 0, 1, 2, 8], range(12, 22))


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("addressable", [False, True], ids=["through staging", "straight"])
def test_a_page_that_has_changed_is_not_served_and_read_from_the_drive_instead(
    opening: Opening, layer: int, addressable: bool
) -> None:
    stage = opening(addressable=addressable)
    stage.demote(0, 1, 2, 3)
    stage.demote(4, 5)
    stage.run_of(1).rows(layer)[1][1, 7] ^= 1
    found = stage.restore(range(6), range(10, 16))
    assert found.failed == {"r"} and found.restored is None
    assert found.unusable == {"r": frozenset([NO_STORED_PAGE])}
    failures = Failures()
    failures.add(found.unusable)
    assert failures.usable("r", keys(*range(6))) == 6, "all of it is still stored"
    assert stage.here(*range(6)) == [4, 5]
    found = stage.restore(range(6), range(10, 16))
    assert found.failed == set() and stage.has_on_device(range(6), range(10, 16))
    assert found.restored is not None and found.restored.sources == {Source.HOST, Source.COLD}
    assert stage.host.stats.pages_wrong == 1
    assert all(stage.rank.store.stored(keys(*range(6)))), "no stored page is blamed"


def test_memory_in_which_a_page_has_changed_is_not_used_again(opening: Opening) -> None:
    stage = opening(pages=2)
    stage.demote(0, 1)
    run = stage.run_of(0)
    run.rows(0)[0][0, 0] ^= 1
    stage.restore([0, 1], [10, 11])
    # It takes a run for each: the one that is left is given up for the other.
    for page in (2, 3, 4):
        stage.demote(page)
    left = [stage.run_of(page) for page in range(5) if stage.here(page)]
    assert left and all(other.piece.start != run.piece.start for other in left)


def test_the_other_requests_of_a_batch_are_served(opening: Opening) -> None:
    stage = opening()
    stage.demote(0)
    stage.demote(1)
    stage.run_of(1).rows(2)[0][0, 3] ^= 1
    stage.restorer.queue("a", keys(0, 1), torch.tensor([12, 13]))
    stage.restorer.queue("b", keys(0, 2), torch.tensor([14, 15]))
    found = stage.restorer.finish(stage.restorer.start())
    assert found.failed == {"a"}
    assert stage.has_on_device([0, 2], [14, 15])


def test_only_stored_pages_are_copied_and_each_of_them_once(opening: Opening) -> None:
    stage = opening()
    assert not stage.demote(11, 12, 13), "of these only the first is stored"
    assert stage.here(11, 12, 13) == [11]
    assert stage.demote(10, 11)
    assert (stage.host.stats.pages_demoted, stage.host.stats.pages_known) == (2, 1)


def test_what_is_erased_leaves_the_tier(opening: Opening) -> None:
    stage = opening()
    stage.demote(0, 1)
    stage.demote(2, 3)
    stage.rank.store.remove(keys(1))
    stage.host.forget(keys(1, 9))
    assert stage.here(0, 1, 2, 3) == [2, 3], "what lies in a run with it is forgotten too"
    assert stage.tier.memory.used == stage.run_of(2).piece.memory.nbytes


def test_what_is_erased_while_it_is_copied_does_not_come_in(opening: Opening, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = opening()
    sum_up = HostRun.sum_up

    def erased_meanwhile(run: HostRun) -> None:
        sum_up(run)
        stage.rank.store.remove(keys(1))
        stage.host.forget(keys(1))

    monkeypatch.setattr(HostRun, "sum_up", erased_meanwhile)
    assert not stage.demote(0, 1)
    assert stage.here(0, 1) == [0]
    stage.host.fetch("s", keys(2, 1, 3))
    stage.tier.drain()
    assert stage.here(1, 2, 3) == [2, 3]


def test_pages_of_other_weights_are_forgotten(opening: Opening, tmp_path: Path) -> None:
    stage = opening()
    stage.demote(0, 1)
    other = PageStore(tmp_path / "other", fingerprint(model="other weights"), stage.rank.store.geometry)
    stage.host.move(other)
    assert stage.here(0, 1) == [] and stage.tier.memory.used == 0
    other.close()


def test_a_page_of_other_weights_that_was_being_copied_does_not_come_in(
    opening: Opening, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stage = opening()
    other = PageStore(tmp_path / "other", fingerprint(model="other weights"), stage.rank.store.geometry)
    write(other, keys(0, 1))
    sum_up = HostRun.sum_up

    def moved_meanwhile(run: HostRun) -> None:
        sum_up(run)
        stage.host._store = other

    monkeypatch.setattr(HostRun, "sum_up", moved_meanwhile)
    assert not stage.demote(0, 1)
    assert stage.here(0, 1) == [] and stage.tier.memory.used == 0
    other.close()


def test_a_page_in_the_place_of_another_is_not_served(opening: Opening) -> None:
    """Intact bytes, whose index went wrong."""
    stage = opening()
    stage.demote(0, 1)
    run, _ = stage.host._pages[key(0)]
    stage.host._pages[key(0)] = run, 1
    stage.host._pages[key(7)] = run, 0
    assert stage.restore([0, 7], [10, 11]).failed == {"r"}


def test_the_oldest_leaves_first_and_before_it_what_is_back_on_the_device(opening: Opening) -> None:
    stage = opening(pages=4)
    for page in (0, 1, 2, 3):
        assert stage.demote(page)
    assert stage.demote(4) and stage.here(*range(5)) == [1, 2, 3, 4]
    stage.restore([3], [10])
    assert stage.here(*range(5)) == [1, 2, 3, 4], "it leaves when its memory is needed"
    assert stage.demote(5) and stage.here(*range(6)) == [1, 2, 4, 5]
    stage.restore([4], [10])
    assert stage.demote(4), "it leaves the device again"
    assert stage.demote(6) and stage.here(*range(7)) == [2, 4, 5, 6]
    assert stage.host.stats.pages_demoted == 7 and stage.host.stats.pages_evicted == 3
    assert stage.tier.memory.used == stage.tier.memory.held == 4 * stage.a_page


def test_a_read_ahead_uses_what_it_finds_there(opening: Opening) -> None:
    stage = opening(pages=4)
    for page in (0, 1, 2):
        stage.demote(page)
    stage.restorer.prefetches.for_request("a", keys(0))
    stage.restorer.prefetches.tidy([])
    assert stage.demote(3) and stage.demote(4)
    assert stage.here(*range(5)) == [0, 2, 3, 4], "what was asked for lately is the newest"


def test_a_run_that_is_read_does_not_leave(opening: Opening) -> None:
    stage = opening(pages=2)
    stage.demote(0)
    stage.demote(1)
    prefetches = stage.restorer.prefetches
    prefetches.for_request("a", keys(0, 1))
    assert stage.restorer.kept()["streams_read_ahead"] == 1 and stage.host.kept()["host_streams"] == 1
    assert not stage.demote(2) and stage.here(0, 1, 2) == [0, 1]
    stage.host.forget(keys(0))
    assert not stage.demote(2), "its memory is being read"
    found = stage.restore([0, 1], [10, 11], "a")
    assert found.failed == set() and stage.has_on_device([0, 1], [10, 11])
    assert stage.demote(2) and stage.host.kept()["host_streams"] == 0


def test_what_is_worth_least_leaves_and_nothing_comes_for_what_is_worth_more(opening: Opening) -> None:
    stage = opening(pages=3)
    worth = {"a": 3.0, "b": 1.0, "c": 2.0, "d": 1.5, "e": 1.4, "f": 9.0}
    stage.tier.value = lambda session, pages: worth[session or ""] / len(pages)
    for page, session in enumerate("abc"):
        assert stage.demote(page, session=session)
    assert stage.demote(3, session="d") and stage.here(*range(4)) == [0, 2, 3]
    assert not stage.demote(4, session="e"), "it is worth less than d"
    assert stage.host.stats.pages_refused == 1
    worth["d"] = 0.0
    assert stage.demote(4, session="e") and stage.here(*range(5)) == [0, 2, 4]
    stage.restore([0], [10])
    assert stage.demote(5, session="d"), "instead of what is on the device"
    assert stage.here(*range(6)) == [2, 4, 5]


def test_what_is_larger_than_the_tier_does_not_drive_itself_out(opening: Opening) -> None:
    stage = opening(pages=4, a_run=1)
    assert not stage.demote(*range(10))
    assert stage.here(*range(10)) == [0, 1, 2, 3]


def test_pages_are_fetched_from_the_drive(opening: Opening) -> None:
    stage = opening()
    stage.demote(2)
    progress = stage.host.fetch("s", keys(*range(8)))
    stage.tier.drain()
    assert progress() == 1.0 and stage.here(*range(8)) == [*range(8)]
    assert (stage.host.stats.pages_fetched, stage.host.stats.pages_known) == (7, 1)
    found = stage.restore(range(8), range(10, 18))
    assert found.restored is not None and found.restored.sources == {Source.HOST}
    assert stage.has_on_device(range(8), range(10, 18))


def test_as_much_is_fetched_as_there_is_room_for(opening: Opening) -> None:
    stage = opening(pages=4, a_run=1)
    progress = stage.host.fetch("s", keys(*range(8)))
    stage.tier.drain()
    assert progress() == 0.5 and stage.here(*range(8)) == [0, 1, 2, 3]
    assert stage.host.fetch("t", [])() in (None, 0.0)


def test_a_page_that_is_wrong_on_the_drive_is_not_fetched(opening: Opening) -> None:
    stage = opening()
    with stage.rank.store.pin(keys(2)) as pin:
        path = pin.segments[0].extent.path
    data = bytearray(path.read_bytes())
    data[data.index(content(stage.rank.store.geometry, key(2), 1, 0))] ^= 1
    path.write_bytes(data)
    progress = stage.host.fetch("s", keys(*range(6)))
    stage.tier.drain()
    assert progress() == 2 / 6 and stage.here(*range(6)) == [4, 5], "nor what was read with it"
    assert key(2) in stage.rank.store, "the restore that needs it says so"
    assert stage.tier.memory.used == stage.a_page


def test_a_fetch_whose_pages_are_restored_meanwhile_reads_no_more(
    opening: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = opening(a_run=1)
    begun, goes_on = threading.Event(), threading.Event()
    sum_up = HostRun.sum_up

    def waits(run: HostRun) -> None:
        begun.set()
        assert goes_on.wait(60)
        sum_up(run)

    monkeypatch.setattr(HostRun, "sum_up", waits)
    progress = stage.host.fetch("s", keys(*range(8)))
    other = stage.host.fetch("t", keys(10, 11))
    assert begun.wait(60) and progress() is None
    assert stage.host.fetch("s", keys(*range(8)))() is None and stage.host.kept()["fetches"] == 2
    assert stage.restore(range(2, 8), range(12, 18)).failed == set()
    goes_on.set()
    stage.tier.drain()
    assert stage.here(*range(8)) == [0], "one run had been read"
    assert progress() == 1 / 8 and other() == 1.0
    assert stage.host.kept()["fetches"] == 0


def test_what_a_queued_request_needs_is_kept_and_not_read(opening: Opening) -> None:
    stage = opening()
    stage.demote(0, 1, 4)
    prefetches = stage.restorer.prefetches
    prefetches.for_request("a", keys(0, 1, 2, 3, 4))
    assert prefetches.stats.issued == 1
    assert prefetches.covers(keys(0, 1, 2, 3, 4)) and not prefetches.covers(keys(0, 1, 2, 3, 4, 5))
    found = stage.restore([0, 1, 2, 3, 4], range(10, 15), "a")
    assert found.restored is not None and found.restored.sources == {Source.HOST, Source.STAGING}
    assert stage.has_on_device([0, 1, 2, 3, 4], range(10, 15))
    assert prefetches.stats.used == 1 and stage.restorer.stats.pages_host == 3
    assert set(stage.host.kept().values()) == {0}


def test_of_what_was_kept_for_a_request_no_more_is_copied_than_it_needs(opening: Opening) -> None:
    """When it is admitted, some of it has come to the device with another one."""
    stage = opening()
    stage.demote(0, 1, 2, 3)
    stage.demote(4, 5)
    stage.restorer.prefetches.for_request("a", keys(*range(6)))
    found = stage.restore([2, 3, 4], [10, 12, 14], "a")
    assert found.failed == set() and stage.has_on_device([2, 3, 4], [10, 12, 14])
    assert stage.restorer.stats.bytes_host == 3 * stage.rank.store.geometry.page_bytes
    assert stage.host.stats.pages_used == 3
    assert set(stage.host.kept().values()) == {0}


def test_what_no_request_takes_is_let_go(opening: Opening) -> None:
    stage = opening()
    stage.demote(0, 1)
    stage.restorer.prefetches.for_request("a", keys(0, 1, 99))
    assert stage.host.kept()["host_streams"] == 0, "it cannot be restored"
    stage.restorer.prefetches.for_request("a", keys(0, 1))
    assert stage.host.kept()["host_streams"] == 1
    stage.restorer.prefetches.tidy([])
    assert stage.host.kept()["host_streams"] == 0
    assert stage.restorer.prefetches.stats.wasted == 0


def test_pages_here_are_covered_without_a_claim(opening: Opening) -> None:
    stage = opening()
    stage.demote(0, 1)
    assert stage.restorer.prefetches.covers(keys(0, 1)) and not stage.restorer.prefetches.covers(keys(0, 1, 2))


def test_pages_that_the_drive_has_lost_are_still_restored(opening: Opening) -> None:
    stage = opening()
    stage.demote(0, 1)
    drop(stage.rank.store, *keys(0, 1))
    assert stage.restore([0, 1], [10, 11]).failed == set()
    assert stage.has_on_device([0, 1], [10, 11])


def test_a_demotion_that_fails_is_answered_and_keeps_no_memory(
    opening: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = opening()

    def fails(run: HostRun) -> None:
        raise MemoryError("of this test")

    with monkeypatch.context() as patch:
        patch.setattr(HostRun, "sum_up", fails)
        assert not stage.demote(0, 1)
    with pytest.raises(ValueError, match="are not all on a device"):
        stage.rank.pages.place(torch.tensor([99]), stage.host.lane)
    stage.host.demote(keys(0), torch.tensor([99]))
    stage.tier.drain()
    assert not stage.host.results.popleft()
    assert stage.tier.memory.used == 0
    assert stage.demote(0, 1)


def test_a_batch_that_is_abandoned_leaves_the_tier_as_it_was(opening: Opening) -> None:
    stage = opening(pages=2)
    stage.demote(0)
    stage.demote(1)
    hangs, goes_on = threading.Event(), threading.Event()
    restorer, layers = stage.restorer, Future[None]()

    def complete(batch: int, layer: int) -> None:
        hangs.set()
        assert goes_on.wait(60)

    restorer.arrivals.complete = complete  # type: ignore[method-assign]
    restorer.queue("a", keys(0, 1), torch.tensor([10, 11]))
    index = restorer.start()
    assert hangs.wait(60)
    restorer.arrivals.abandon(index)
    assert restorer.finish(index).failed == {"a"}
    goes_on.set()
    restorer.drain()
    layers.cancel()
    assert stage.host.kept()["host_streams"] == 0
    assert stage.run_of(0).returned == set()
    assert stage.demote(2)


def test_the_layout_is_an_extents() -> None:
    rng = np.random.default_rng(1)
    memory = rng.integers(0, 256, 3 * 5 * 2000, np.uint8)
    run = HostRun(MARK, MHA, PageKeys.of(keys(*range(5))), Piece(memory, 0, 0), None)
    run.sum_up()
    for layer in range(3):
        first, second = run.rows(layer)
        start = layer * 5 * 2000
        assert (first.reshape(-1) == memory[start : start + 5000]).all()
        assert (second.reshape(-1) == memory[start + 5000 : start + 10_000]).all()
        assert run.wrong_slots(layer, 0, 5) == [] and run.wrong_slots(layer, 2, 2) == []
    run.rows(1, 3, 1)[1][0, 999] ^= 128
    assert run.wrong_slots(1, 0, 5) == [3] and run.wrong_slots(1, 4, 1) == [] and run.wrong_slots(0, 0, 5) == []


def allow(stage: Stage, account: str, pages: int, *sessions: str) -> None:
    """The sessions are charged to an account that may have so many pages."""
    for session in sessions:
        stage.accounts.note(session, account)
    limits = {name: Quota(host_bytes=limit) for name, limit in stage.accounts.limits("host").items()}
    stage.accounts.take({**limits, account: Quota(host_bytes=pages * stage.a_page)})


def test_who_has_more_than_its_quota_gives_first_whatever_its_pages_are_worth(opening: Opening) -> None:
    stage = opening(pages=6, a_run=1)
    worth = {"large": 9.0, "small": 1.0, "new": 2.0}
    stage.tier.value = lambda session, keys: worth[session]
    allow(stage, "one", 2, "large")
    stage.demote(0, 1, session="small")
    assert stage.demote(2, 3, session="large") and stage.demote(4, 5, session="large"), "while there is room"
    assert stage.tier.held["one"] == 4 * stage.a_page
    assert stage.demote(6, 7, session="new")
    assert stage.here(*range(8)) == [0, 1, 4, 5, 6, 7]
    # It has no more than it may: from now on the order is everybody's.
    assert stage.demote(8, 9, session="new")
    assert stage.here(*range(10)) == [4, 5, 6, 7, 8, 9]


def test_what_comes_in_above_a_quota_displaces_nothing_of_others(opening: Opening) -> None:
    stage = opening(pages=4, a_run=1)
    worth = {"old": 1.0, "new": 2.0, "other": 0.5, "least": 0.1}
    stage.tier.value = lambda session, keys: worth[session]
    allow(stage, "one", 2, "old", "new", "least")
    stage.demote(0, 1, session="other")
    stage.demote(2, 3, session="old")
    assert not stage.demote(4, 5, session="least")
    assert stage.demote(6, 7, session="new")
    assert stage.here(*range(8)) == [0, 1, 6, 7]
    # Nor what is on the device anyway, which costs nothing but a copy.
    assert stage.restore([0, 1], [20, 21]).failed == set()
    assert not stage.demote(4, 5, session="least")
    assert stage.here(0, 1) == [0, 1]
    allow(stage, "one", 4)
    assert stage.demote(4, 5, session="least")
    assert stage.here(0, 1) == []


def test_what_leaves_the_tier_is_not_charged_any_more(opening: Opening) -> None:
    stage = opening(pages=8, a_run=1)
    stage.accounts.note("a", "one")
    stage.demote(0, 1, 2, session="a")
    stage.demote(3, session=None)
    assert dict(stage.tier.held) == {"one": 3 * stage.a_page, "": stage.a_page}
    stage.host.forget(keys(0))
    assert stage.tier.held["one"] == 2 * stage.a_page
    stage.host.move(stage.rank.store)
    assert not any(stage.tier.held.values())


@pytest.mark.parametrize("valued", [True, False], ids=["by worth", "by use"])
def test_what_a_session_has_left_leaves_first_unless_it_is_used_again(opening: Opening, valued: bool) -> None:
    stage = opening(pages=4, a_run=1)
    if valued:
        stage.tier.value = lambda session, keys: {"s": 9.0, "other": 5.0, "new": 5.0}[session]
    stage.demote(0, 1, session="other")
    stage.demote(2, 3, session="s")
    stage.host.release(keys(0, 2, 3), "s")
    assert stage.demote(4, 5, session="new")
    assert stage.here(*range(6)) == [0, 1, 4, 5], "but what another session has asked for stays"
    stage.host.release(keys(0, 1), "other")
    stage.demote(0, 1, session="other")
    stage.host.release(keys(4, 5), "new")
    assert stage.demote(6, 7, session="new")
    assert stage.here(*range(8)) == [0, 1, 6, 7]


def test_what_a_session_has_left_and_restores_is_as_before(opening: Opening) -> None:
    stage = opening(pages=4, a_run=2)
    stage.demote(0, 1, session="s")
    stage.host.release(keys(0, 1), "s")
    assert stage.run_of(0).released == {0, 1}
    stage.restore([0, 1], [20, 21])
    assert stage.run_of(0).released == set()
