"""What a rank's pools find and restore of a shared store, and what is said of that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from contents import content, key, keys, write
from device import PAGE_SIZE, aligned_kv_tensors, fill, kv_tensors, page_of
from shares import PATIENCE_S, Share

from agentstate.errors import TierUnavailable
from agentstate.pages import ANYONE, PageKeys, PageStore, fingerprint
from agentstate.settings import Settings
from agentstate.tiers.pages import Listed, SharedPages
from engine_patch.break_even import BreakEven, Word
from engine_patch.linker import AgentStateLinker
from engine_patch.pools import DevicePool
from engine_patch.sglang_api import PoolName, PoolTransfer
from engine_patch.stored_pools import Share as Sharing
from engine_patch.stored_pools import StoredPools

FULL, SWA = PoolName.KV, PoolName.SWA
WINDOW = 2


class Stage:
    """A rank with full attention in layers 1, 3 and 5, and a window of two pages in 0, 2 and 4, and a share."""

    def __init__(self, directory: Path, *names: PoolName, failures_in_row: int = 1 << 30, addressable: bool = False):
        full = aligned_kv_tensors() if addressable else kv_tensors()
        self.tensors = {FULL: full, SWA: kv_tensors(components=1)}
        for tensors in self.tensors.values():
            fill(tensors)
        known = {
            FULL: DevicePool(FULL, self.tensors[FULL], PAGE_SIZE, (1, 3, 5), ("float32",)),
            SWA: DevicePool(SWA, self.tensors[SWA], PAGE_SIZE, (0, 2, 4), ("float32",), WINDOW),
        }
        self.directory = directory
        self.share = Share(directory / "share", failures_in_row)
        self.weights = "first"
        settings = Settings(staging_bytes=1 << 26, spill_staging_bytes=1 << 20, read_threads=1, shared_reads=2)
        self.pools = StoredPools(
            [known[name] for name in names], self.open, settings, share=Sharing(self.share.guard, self.open_shared)
        )
        self.linker = AgentStateLinker.__new__(AgentStateLinker)
        self.linker._pools = self.pools
        rank: Any = SimpleNamespace(off=None, break_even=BreakEven(), metrics=None, settings=settings)
        self.linker._rank, self.linker._cached, self.linker.page_size = rank, 0, PAGE_SIZE

    def open(self, pool: DevicePool) -> PageStore:
        mark = fingerprint(pool=pool.name, weights=self.weights)
        return PageStore(self.directory / self.weights / pool.name, mark, pool.device_pages.geometry)

    def open_shared(self, pool: DevicePool, store: PageStore) -> SharedPages:
        return SharedPages(store.directory / "shared", self.share.extents, store.fingerprint, store.geometry)

    def of(self, name: PoolName) -> tuple[PageStore, SharedPages]:
        found = dict(zip(self.pools.device_pages, self.pools.shared_pages(), strict=True))
        return found[name]

    def here(self, name: PoolName, *pages: object) -> None:
        write(self.of(name)[0], keys(*pages))

    def there(self, name: PoolName, *pages: object) -> None:
        self.share.publish(self.of(name)[1], keys(*pages))

    def load(self, rid: str, pages: Sequence[object], names: Sequence[PoolName]) -> bool:
        """Restore a chain to the device pages from 3 on: whether all of it is right."""
        transfers = []
        for name in names:
            needed = pages if name is FULL else pages[-WINDOW:]
            first = 3 + len(pages) - len(needed)
            transfers.append(transfer(name, needed, first))
        assert self.pools.load(rid, transfers)
        failed = self.pools.finish(self.pools.start(())).failed
        self.pools.drain()
        return not failed and all(
            page_of(self.tensors[name], 3 + at) == self.contents(name, page)
            for name in names
            for at, page in enumerate(pages)
            if name is FULL or at >= len(pages) - WINDOW
        )

    def contents(self, name: PoolName, page: object) -> list[list[bytes]]:
        geometry = self.pools.device_pages[name].geometry
        components = range(len(geometry.component_bytes))
        return [[content(geometry, key(page), layer, part) for part in components] for layer in range(geometry.layers)]

    def close(self) -> None:
        self.pools.finish_spilling(PATIENCE_S)
        self.pools.close()
        self.share.close()


def transfer(name: PoolName, pages: Sequence[object], first: int) -> PoolTransfer:
    slots = torch.arange(first * PAGE_SIZE, (first + len(pages)) * PAGE_SIZE)
    return PoolTransfer(name=name, keys=[key(page).hex() for page in pages], device_indices=slots)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path, FULL)
    yield stage
    stage.close()


@pytest.fixture
def windowed(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path, FULL, SWA)
    yield stage
    stage.close()


def test_a_prefix_goes_on_in_the_share_while_that_answers(tmp_path: Path) -> None:
    stage = Stage(tmp_path, FULL, failures_in_row=1)
    stage.here(FULL, 0, 1)
    stage.there(FULL, 2, 3)
    stage.here(FULL, 4)
    assert stage.pools.restorable(keys(*range(7))) == [1, 2, 3, 4, 5]
    assert stage.pools.on_node(keys(*range(7))) == 2 and stage.pools.reachable(keys(*range(7))) == 5
    assert stage.pools.here(keys(0, 1)) and not stage.pools.here(keys(0, 1, 2))
    assert stage.pools.published(keys(2, 3, 4)) == 2 and stage.pools.published(keys(0, 1, 2)) == 0
    stage.share.tier.error = TierUnavailable("down")
    assert not stage.load("a", [0, 1, 2], [FULL])
    assert not stage.share.guard.available
    assert stage.pools.restorable(keys(*range(7))) == [1, 2] and stage.pools.reachable(keys(*range(7))) == 2
    # What was published is, whether or not it can be had now.
    assert stage.pools.published(keys(2, 3, 4)) == 2 and stage.pools.durable(keys(*range(7))) == 5
    stage.close()


@pytest.mark.parametrize("addressable", [False, True])
def test_a_load_takes_from_both(tmp_path: Path, addressable: bool) -> None:
    stage = Stage(tmp_path, FULL, addressable=addressable)
    stage.here(FULL, 0, 1)
    stage.there(FULL, 2, 3)
    assert stage.load("a", range(4), [FULL])
    stats = stage.pools.stat()
    assert stats["restore"]["pages_shared"] == 2
    assert stats["shared"] == {"available": True, "extents": 1, "pages": 2, "extents_rejected": 0}
    assert not any(stage.pools.kept().values())
    stage.close()


def test_after_what_failed_was_of_the_share_less_is_found(stage: Stage) -> None:
    stage.here(FULL, 0)
    (listed,) = stage.share.publish(stage.of(FULL)[1], keys(1, 2))
    stage.share.path(listed).unlink()
    assert stage.pools.restorable_for("a", keys(0, 1, 2)) == [1, 2, 3]
    assert not stage.load("a", [0, 1, 2], [FULL])
    assert stage.pools.restorable_for("a", keys(0, 1, 2)) == [1]
    assert stage.pools.restorable_for("b", keys(0, 1, 2)) == [1]


def test_a_window_may_be_in_the_share(windowed: Stage) -> None:
    """Full attention on the drive and the window in the share, and the other way round."""
    windowed.here(FULL, *range(4))
    windowed.there(SWA, 2, 3)
    windowed.there(FULL, 4, 5)
    windowed.here(SWA, 4, 5)
    assert windowed.pools.restorable(keys(*range(8))) == [4, 5, 6]
    assert windowed.pools.durable(keys(*range(8))) == 6 and windowed.pools.on_node(keys(*range(8))) == 4
    for length in (4, 5, 6):
        assert windowed.load(f"r{length}", range(length), [FULL, SWA])
    assert windowed.pools.shared_takes_s(keys(*range(4))) is not None
    assert windowed.pools.stat()["pools"][SWA.value]["restore"]["pages_shared"] == 3
    assert not any(windowed.pools.kept().values())


def test_coded_pages_take_less_time(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read is reckoned with, as far as it is less than what the device has; and that is measured, too."""
    monkeypatch.setattr(stage.share.guard, "figures", lambda: (0.0, 1e6))
    stage.here(FULL, 0, 1)
    stage.there(FULL, 2, 3)
    store, pages = stage.of(FULL)
    page_bytes = store.geometry.page_bytes
    assert stage.pools.shared_takes_s(keys(0, 1, 2, 3)) == pytest.approx(2 * page_bytes / 1e6)
    assert stage.pools.read_bytes(2) == stage.pools.n_bytes(2) == 2 * page_bytes
    pages.leave(pages.ids())
    pages.enter([Listed(9, "a" * 64, page_bytes * 2 * 3 // 4, "", PageKeys.of(keys(2, 3)))])
    assert stage.pools.shared_takes_s(keys(0, 1, 2, 3)) == pytest.approx(2 * page_bytes * 3 // 4 / 1e6)
    store.stats.bytes = store.stats.pages * page_bytes * 3 // 4
    assert (stage.pools.read_bytes(2), stage.pools.n_bytes(2)) == (2 * page_bytes * 3 // 4, 2 * page_bytes)


def test_a_window_that_is_cut_short_in_the_share_ends_before_it(windowed: Stage) -> None:
    windowed.there(FULL, *range(6))
    windowed.there(SWA, 1, 2)
    windowed.there(SWA, 4)
    assert windowed.pools.restorable(keys(*range(6))) == [3]
    assert windowed.pools.published(keys(*range(6))) == 0 and windowed.pools.published(keys(*range(3))) == 3
    windowed.there(SWA, 5)
    assert windowed.pools.restorable(keys(*range(6))) == [3, 6]
    assert windowed.pools.published(keys(*range(6))) == 6


def test_a_wrong_page_of_a_window_fails_the_request_in_all_pools(windowed: Stage) -> None:
    windowed.here(FULL, *range(4))
    (listed,) = windowed.share.publish(windowed.of(SWA)[1], keys(2, 3))
    windowed.share.path(listed).write_bytes(bytes(listed.n_bytes))
    assert windowed.pools.restorable(keys(*range(4))) == [4]
    assert not windowed.load("a", range(4), [FULL, SWA])
    assert windowed.pools.restorable(keys(*range(4))) == [] and windowed.pools.durable(keys(*range(2))) == 0
    assert windowed.of(FULL)[0].prefix_length(keys(*range(4))) == 4


def test_chains_say_what_is_needed_of_each_pool(windowed: Stage) -> None:
    found = list(windowed.pools.chains(keys(*range(5))))
    assert [(store, pages) for store, pages, _ in found] == windowed.pools.shared_pages()
    assert [list(needed) for *_, needed in found] == [keys(*range(5)), keys(3, 4)]


def test_what_is_prefetched_of_the_share_is_in_memory(stage: Stage) -> None:
    stage.here(FULL, 0)
    stage.there(FULL, 1, 2)
    fraction = stage.pools.prefetch("s", keys(0, 1, 2), 60)
    while fraction() is None:
        pass
    assert fraction() == 1 and stage.pools.staged_for(keys(0, 1, 2))
    stage.share.tier.error = TierUnavailable("down")
    assert stage.load("a", range(3), [FULL])


def lookup(stage: Stage, rid: str, pages: int) -> tuple[list[int], Word]:
    stage.linker.matching(0)
    return stage.linker.lookup(rid, [transfer(FULL, range(pages), 0)]), stage.linker.word


def teach(stage: Stage, token_s: float) -> None:
    """Forty prefills, and reads of the share, each 50 ms and 1 ms for 1 kB."""
    for number in range(40):
        stage.linker.stepped([(64 * (number % 5), 10 + 37 * number)], 0.01 + token_s * (10 + 37 * number), None)


def test_the_word_says_where_the_pages_are(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.here(FULL, 0, 1)
    stage.there(FULL, 2, 3)
    assert lookup(stage, "a", 2) == ([1, 2], Word.RESTORE)
    assert lookup(stage, "b", 4) == ([1, 2, 3, 4], Word.SHARED)
    assert lookup(stage, "c", 3) == ([1, 2, 3], Word.SHARED)
    teach(stage, token_s=0.001)
    figures = SimpleNamespace(latency_s=0.05, bytes_per_s=1e6)
    monkeypatch.setattr(stage.share.guard, "figures", lambda: (figures.latency_s, figures.bytes_per_s))
    measured: list[int] = []
    monkeypatch.setattr(stage.share.guard, "measure", lambda: measured.append(1))
    # 16 tokens are computed in 16 ms.
    assert lookup(stage, "b", 4)[1] == Word.COMPUTE
    # Nobody reads the share because of that, and it may be faster by now.
    assert measured == [1]
    figures.latency_s, figures.bytes_per_s = 0.001, 1e9
    assert lookup(stage, "b", 4)[1] == Word.SHARED
    assert measured == [1]
    figures.bytes_per_s = 1e5
    assert lookup(stage, "b", 4)[1] == Word.COMPUTE
    # A store of which nothing is known is tried.
    figures.bytes_per_s = None  # type: ignore[assignment]
    assert lookup(stage, "b", 4)[1] == Word.SHARED
    stage.linker._rank.settings = Settings(break_even=False)
    figures.bytes_per_s = 1e5
    assert lookup(stage, "b", 4) == ([1, 2, 3, 4], Word.SHARED)
    assert lookup(stage, "a", 2) == ([1, 2], Word.RESTORE)


def test_what_is_on_its_way_from_the_share_costs_no_more_reading(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may still be on its way, so that no forward waits for it all the same."""
    stage.here(FULL, 0)
    stage.there(FULL, 1, 2)
    teach(stage, token_s=0.001)
    monkeypatch.setattr(stage.share.guard, "figures", lambda: (60.0, 1e9))
    assert lookup(stage, "a", 3)[1] == Word.COMPUTE
    stage.pools.read_ahead("a", keys(0, 1, 2))
    assert lookup(stage, "a", 3)[1] == Word.SHARED
    stage.pools.tidy(set)
    assert lookup(stage, "a", 3)[1] == Word.COMPUTE


def test_other_weights_find_their_own_pages_of_the_share(windowed: Stage) -> None:
    windowed.here(FULL, 0)
    windowed.there(FULL, 0, 1, 2)
    windowed.there(SWA, 1, 2)
    assert windowed.pools.reachable(keys(0, 1, 2)) == 3
    windowed.weights = "second"
    assert windowed.pools.move(windowed.open, PATIENCE_S)
    assert windowed.pools.reachable(keys(0, 1, 2)) == 0 and windowed.pools.published(keys(0, 1, 2)) == 0
    windowed.there(FULL, 0, 1)
    windowed.there(SWA, 0, 1)
    assert windowed.pools.reachable(keys(0, 1, 2)) == 2
    windowed.share.tier.read_from.clear()
    assert windowed.load("a", range(2), [FULL, SWA])
    marks = {store.fingerprint.hex() for store, _ in windowed.pools.shared_pages()}
    assert {name.partition("/")[0] for name in windowed.share.tier.read_from} == marks
    windowed.weights = "first"
    assert windowed.pools.move(windowed.open, PATIENCE_S)
    # What is there is told again.
    assert windowed.pools.reachable(keys(0, 1, 2)) == 0 and windowed.pools.durable(keys(0)) == 0
    assert not any(windowed.pools.kept().values())


def test_everything_may_have_been_lost_once_it_is_known_what_the_share_has(stage: Stage) -> None:
    assert not stage.pools.shared_known and stage.pools.take_losers() == set()
    for _, pages in stage.pools.shared_pages():
        pages.followed = True
    assert stage.pools.shared_known and stage.pools.take_losers() == {ANYONE}
    assert stage.pools.take_losers() == set()


def test_without_a_share_nothing_is_there(tmp_path: Path) -> None:
    pool = DevicePool(FULL, kv_tensors(), PAGE_SIZE, (0, 1, 2), ("float32",))
    settings = Settings(staging_bytes=1 << 20, spill_staging_bytes=1 << 20, read_threads=1)
    pools = StoredPools([pool], lambda of: PageStore(tmp_path, fingerprint(), of.device_pages.geometry), settings)
    assert pools.published(keys(1)) == 0 and pools.shared_pages() == [] and list(pools.chains(keys(1))) == []
    assert pools.shared_takes_s(keys(1)) is None
    assert pools.stat()["shared"] == {"available": False, "extents": 0, "pages": 0, "extents_rejected": 0}
    pools.finish_spilling(PATIENCE_S)
    pools.close()
