"""A rank that reads what another one writes, in another process: the pages of `contents`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contents import content, key, keys
from device import PAGE_SIZE, as_bytes, fill, kv_tensors, page_of
from owning import StoreOwner

from agentstate.pages import Need, StoreView, Urgency, fingerprint
from agentstate.settings import Settings
from engine_patch import following
from engine_patch.following import FollowingSpiller
from engine_patch.pools import DevicePool
from engine_patch.sglang_api import PoolName, PoolTransfer
from engine_patch.stored_pools import StoredPools

FULL = PoolName.KV
MARK = fingerprint(rank="that writes")


class Reader:
    """A rank with full attention that reads the store of another one, ``writer``."""

    def __init__(self, directory: Path, **settings: Any):
        self.tensors = kv_tensors()
        fill(self.tensors)
        pool = DevicePool(FULL, self.tensors, PAGE_SIZE, (0, 1, 2), ("uint8",))
        self.geometry = pool.device_pages.geometry
        self.writer = StoreOwner(directory, MARK, self.geometry)
        given = {"staging_bytes": 1 << 20, "spill_staging_bytes": 1 << 20, "read_threads": 1, **settings}
        self.view = StoreView(directory, MARK, self.geometry)
        self.pools = StoredPools([pool], lambda pool: self.view, Settings(**given))

    def compute(self, *pages: object, noise: int = 0) -> None:
        """The device's pages from 1 on are what the other rank stores as ``pages``, but for some noise."""
        for at, page in enumerate(pages):
            rows = slice((1 + at) * PAGE_SIZE, (2 + at) * PAGE_SIZE)
            for layer, tensors in enumerate(self.tensors):
                for component, tensor in enumerate(tensors):
                    raw = np.frombuffer(content(self.geometry, key(page), layer, component), dtype=np.uint8)
                    as_bytes(tensor[rows]).copy_(torch.from_numpy(raw | noise).view(as_bytes(tensor[rows]).shape))

    def offer(self, *pages: object) -> None:
        assert self.pools.offer([transfer(pages, 1)], tuple)

    def restore(self, pages: Sequence[object], first: int = 10) -> set[str]:
        """Restore pages to the device's, from page ``first`` on: the requests that failed."""
        assert self.pools.load("r", [transfer(pages, first)])
        failed = self.pools.finish(self.pools.start(())).failed
        self.pools.drain()
        return failed

    def holds(self, pages: Sequence[object], first: int = 10) -> bool:
        components = range(len(self.geometry.component_bytes))
        return all(
            page_of(self.tensors, first + at)
            == [[content(self.geometry, key(page), layer, c) for c in components] for layer in range(3)]
            for at, page in enumerate(pages)
        )

    def close(self) -> None:
        self.pools.finish_spilling(0.0)
        self.pools.close()
        self.writer.kill()


def transfer(pages: Sequence[object], first: int) -> PoolTransfer:
    indices = torch.arange(first * PAGE_SIZE, (first + len(pages)) * PAGE_SIZE)
    return PoolTransfer(name=FULL, keys=[key(page).hex() for page in pages], device_indices=indices)


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    reader = Reader(tmp_path / "rank0")
    yield reader
    reader.close()


def results(pools: StoredPools, count: int) -> list[bool]:
    deadline = time.monotonic() + 60
    while pools.results < count:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return [pools.pop_result() for _ in range(count)]


def test_what_the_other_rank_has_stored_comes_back(reader: Reader) -> None:
    reader.writer("write(store, keys(1, 2, 3))")
    assert reader.pools.restorable(keys(1, 2, 3, 4)) == [1, 2, 3]
    assert reader.pools.here(keys(1, 2, 3)), "it is on this node"
    assert reader.restore([1, 2, 3]) == set()
    assert reader.holds([1, 2, 3])
    assert set(reader.pools.kept().values()) == {0}


def test_an_offer_is_answered_when_the_other_rank_has_concluded_it_and_nothing_is_copied(reader: Reader) -> None:
    pools, over = reader.pools, threading.Event()
    reader.offer(1, 2)
    reader.offer(3)
    pools.then(over.set)
    assert pools.results == 0 and pools.stat()["spill"]["waiting"] == 3
    reader.writer("write(store, keys(1, 2))")
    reader.writer("store.conclude(1)")
    assert results(pools, 1) == [True]
    assert pools.results == 0 and not over.is_set()
    # The other one could not store it.
    reader.writer("store.conclude(2)")
    assert results(pools, 1) == [False]
    assert over.wait(60)
    pools.drain()
    spill = pools.stat()["spill"]
    assert (spill["pages_known"], spill["pages_skipped"], spill["bytes_spilled"], spill["waiting"]) == (2, 1, 0, 0)
    assert pools.stat()["store"]["bytes"] == 0


def test_what_is_offered_while_spilling_is_off_is_not_stored(reader: Reader) -> None:
    reader.writer("write(store, keys(1))")
    reader.pools.spill(False)
    reader.offer(1)
    reader.writer("store.conclude(1)")
    assert results(reader.pools, 1) == [False]


def test_a_flush_of_the_device_waits_for_what_the_other_rank_stores(reader: Reader) -> None:
    reader.offer(1)
    reset = threading.Thread(target=reader.pools.reset)
    reset.start()
    reset.join(0.2)
    assert reset.is_alive()
    reader.writer("store.conclude(1)")
    reset.join(60)
    assert not reset.is_alive() and reader.pools.results == 0


def test_a_rank_whose_writer_does_not_get_on_answers_in_time_and_goes_on_with_it(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(following.time, "monotonic", lambda: now[0])
    spiller = FollowingSpiller(reader.view, reader.pools.device_pages[FULL], "uint8", timeout_s=5)
    over = threading.Event()
    for _ in range(2):
        spiller.offer(keys(1), torch.tensor([1]))
    spiller.then(over.set)
    now[0] = 4.0
    assert spiller.answered() == 0
    now[0] = 6.0
    assert spiller.answered() == 2
    assert [spiller.results.popleft() for _ in range(2)] == [False, False]
    assert not over.is_set(), "it is not over there"
    # Nor does a new offer wait; what is to happen after it does.
    spiller.offer(keys(1), torch.tensor([1]))
    assert spiller.answered() == 1 and not spiller.results.popleft()
    after = threading.Event()
    spiller.then(after.set)
    reader.writer("write(store, keys(1))")
    reader.writer("store.conclude(2)")
    assert over.wait(60) and not after.is_set()
    reader.writer("store.conclude(3)")
    assert after.wait(60)
    assert spiller.answered() == 0, "an offer is answered once"
    spiller.offer(keys(1), torch.tensor([1]))
    reader.writer("store.conclude(4)")
    spiller.drain()
    assert spiller.results.popleft()
    assert spiller.close()


def test_a_rank_whose_writer_is_gone_does_not_wait_for_it(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_GONE_S", 0.0)
    reader.offer(1)
    reader.writer.kill()
    reader.pools.drain()
    assert results(reader.pools, 1) == [False]


def test_what_was_wrong_here_is_tried_again_once_the_other_rank_was_asked_for_it(reader: Reader) -> None:
    reader.writer("write(store, keys(1, 2))")
    (segment,) = reader.view.pin(keys(2)).segments
    path, offset = segment.extent.path, segment.extent.layout.component_range(1, 0, segment.slot, 1)[0]
    with path.open("r+b") as file:
        file.seek(offset)
        right = file.read(5)
        file.seek(offset)
        file.write(b"wrong")
    before = reader.pools.lost
    assert reader.restore([1, 2]) == {"r"}
    assert reader.pools.restorable(keys(1, 2)) == [1]
    assert reader.pools.lost == before + 1, "all ranks look at what this one lacks"
    assert not reader.pools.stored([transfer([1, 2], 1)])
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(right)
    reader.compute(1, 2)
    reader.offer(1, 2)
    reader.writer("store.conclude(1)")
    assert results(reader.pools, 1) == [True]
    assert reader.restore([1, 2]) == set() and reader.holds([1, 2])


def test_pages_that_are_evicted_before_they_are_read_are_recomputed(reader: Reader) -> None:
    reader.writer("write(store, keys(1, 2))")
    pools = reader.pools
    assert pools.restorable(keys(1, 2)) == [1, 2]
    reader.writer("store.collect()")
    assert reader.restore([1, 2]) == {"r"}
    assert pools.restorable(keys(1, 2)) == []
    reader.writer("write(store, keys(1, 2))")
    assert reader.restore([1, 2]) == set() and reader.holds([1, 2])


def test_what_the_other_rank_has_erased_leaves_host_memory(tmp_path: Path) -> None:
    reader = Reader(tmp_path / "rank0", host_bytes=1 << 22)
    try:
        reader.writer("write(store, keys(1, 2))")
        reader.writer("write(store, keys(3))")
        pools = reader.pools
        for session, chain in (("s", keys(1, 2)), ("t", keys(3))):
            fraction = pools.prefetch(session, chain, 60, Need(Urgency.DUE))
            while fraction() is None:
                time.sleep(0.001)
        assert pools.in_host_memory(keys(1, 2, 3)) == [True, True, True]
        pools.forget_erased()
        reader.writer("store.erase(keys(2))")
        pools.forget_erased()
        # What lies in a run with it goes along.
        assert pools.in_host_memory(keys(1, 2, 3)) == [False, False, True]
        assert pools.restorable(keys(1, 2)) == [1]
    finally:
        reader.close()


@pytest.mark.parametrize(("computed", "noise", "unlike"), [((1, 2), 0, False), ((1, 2), 1, False), ((3, 4), 0, True)])
def test_nothing_is_restored_by_a_rank_that_computes_other_pages_than_its_writer(
    reader: Reader, caplog: pytest.LogCaptureFixture, computed: tuple[int, int], noise: int, unlike: bool
) -> None:
    reader.writer("write(store, keys(1, 2))")
    reader.compute(*computed, noise=noise)
    for number in range(6):
        reader.offer(1, 2)
        reader.writer(f"store.conclude({number + 1})")
    assert results(reader.pools, 6) == [True] * 6
    reader.pools.drain()
    assert reader.pools.restorable(keys(1, 2)) == ([] if unlike else [1, 2])
    assert reader.pools._pools[0].spiller._compared == 8
    assert ["other KV" in record.getMessage() for record in caplog.records].count(True) == unlike
    # The next process knows.
    spiller = FollowingSpiller(reader.view, reader.pools.device_pages[FULL], "uint8")
    assert spiller.unlike is unlike
    spiller.close()
