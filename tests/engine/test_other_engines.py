"""What a rank's pools find, restore and keep of what other engines of the machine have stored, which are other
processes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from contents import content, key, keys, write
from device import PAGE_SIZE, fill, kv_tensors, page_of
from owning import StoreOwner
from shares import PATIENCE_S, Share

from agentstate.fleet import engines, manifests
from agentstate.fleet.engines import Engine
from agentstate.fleet.manifests import Manifest
from agentstate.pages import PageStore, Replicas, fingerprint, stores_beside
from agentstate.pages.node import node_id
from agentstate.sessions.outcomes import SuspendReason
from agentstate.sessions.verbs import Sessions as Service
from agentstate.settings import Settings
from agentstate.sql.database import Database
from agentstate.tiers.pages import SharedPages
from engine_patch.pools import DevicePool
from engine_patch.sessions import Sessions
from engine_patch.sglang_api import PoolName, PoolTransfer
from engine_patch.stored_pools import Share as Sharing
from engine_patch.stored_pools import Store, StoredPools

FULL, SWA = PoolName.KV, PoolName.SWA
WINDOW = 2


class Stage:
    """A rank with full attention in layers 1, 3 and 5, and, if it is ``windowed``, a window of two pages in 0, 2 and 4;
    a share; and other engines."""

    def __init__(self, directory: Path, *, windowed: bool = False, **options: Any):
        self.directory = directory
        self.tensors = {FULL: kv_tensors(), SWA: kv_tensors(components=1)}
        for tensors in self.tensors.values():
            fill(tensors)
        self.weights = "first"
        self.known = [DevicePool(FULL, self.tensors[FULL], PAGE_SIZE, (1, 3, 5), ("float32",))]
        if windowed:
            self.known.append(DevicePool(SWA, self.tensors[SWA], PAGE_SIZE, (0, 2, 4), ("float32",), WINDOW))
        self.share = Share(directory / "share")
        self.others: list[StoreOwner] = []
        small = {"staging_bytes": 1 << 26, "spill_staging_bytes": 1 << 20, "host_bytes": 0}
        settings = Settings(**{**small, "read_threads": 1, "shared_reads": 2, **options})
        self.pools = StoredPools(
            self.known,
            self.open,
            settings,
            share=Sharing(self.share.guard, self.open_shared),
            open_replicas=self.open_replicas,
        )

    def mark(self, pool: DevicePool) -> bytes:
        return fingerprint(pool=pool.name, weights=self.weights)

    def store_in(self, root: str, pool: DevicePool) -> Path:
        return self.directory / root / self.mark(pool).hex()[:32] / "rank0"

    def open(self, pool: DevicePool) -> PageStore:
        return PageStore(self.store_in("ours", pool), self.mark(pool), pool.device_pages.geometry)

    def open_replicas(self, store: Store) -> Replicas:
        roots = f"{self.directory}/ours:{self.directory}/theirs-*"
        return Replicas(store, lambda: stores_beside(roots, self.directory / "ours", store.fingerprint, 0))

    def open_shared(self, pool: DevicePool, store: PageStore) -> SharedPages:
        return SharedPages(store.directory / "shared", self.share.extents, store.fingerprint, store.geometry)

    def other(self, name: str = "a", pool: int = 0) -> StoreOwner:
        """Another engine's store for one of the pools."""
        of = self.known[pool]
        self.others.append(StoreOwner(self.store_in(f"theirs-{name}", of), self.mark(of), of.device_pages.geometry))
        self.pools.look_for_replicas()
        return self.others[-1]

    def store(self, pool: int = 0) -> PageStore:
        return self.pools.shared_pages()[pool][0]

    def transfers(self, pages: Sequence[object]) -> list[PoolTransfer]:
        """A chain in the device pages from 3 on."""
        found = []
        for pool in self.known:
            needed = pages if pool.name is FULL else pages[-WINDOW:]
            first = 3 + len(pages) - len(needed)
            slots = torch.arange(first * PAGE_SIZE, (first + len(needed)) * PAGE_SIZE)
            found.append(PoolTransfer(name=pool.name, keys=[key(page).hex() for page in needed], device_indices=slots))
        return found

    def load(self, rid: str, pages: Sequence[object]) -> bool:
        """Restore a chain: whether all of it is right."""
        assert self.pools.load(rid, self.transfers(pages))
        failed = self.pools.finish(self.pools.start(())).failed
        self.pools.drain()
        return not failed and all(
            page_of(self.tensors[pool.name], 3 + at) == self.contents(pool, page)
            for pool in self.known
            for at, page in enumerate(pages)
            if pool.name is FULL or at >= len(pages) - WINDOW
        )

    def contents(self, pool: DevicePool, page: object) -> list[list[bytes]]:
        geometry = pool.device_pages.geometry
        components = range(len(geometry.component_bytes))
        return [[content(geometry, key(page), layer, part) for part in components] for layer in range(geometry.layers)]

    def offer(self, pages: Sequence[object], session_id: str | None = None) -> bool:
        """The tree offers a chain: whether it is stored."""
        assert self.pools.offer(self.transfers(pages), lambda: (), session_id, owner="tenant a")
        self.pools.drain()
        return self.pools.pop_result()

    def reads(self) -> list[dict[str, int]]:
        """The bytes that each pool has read, by how."""
        stat = self.pools.stat()
        return [stat["reads"], *(of_pool["reads"] for of_pool in stat["pools"].values())]

    def spilled(self) -> tuple[int, int, int]:
        spill = self.pools.stat()["spill"]
        return spill["pages_spilled"], spill["pages_linked"], spill["pages_known"]

    def close(self) -> None:
        self.pools.finish_spilling(PATIENCE_S)
        self.pools.close()
        self.share.close()
        for other in self.others:
            other.kill()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Stage]]:
    made: list[Stage] = []

    def make(**options: Any) -> Stage:
        made.append(Stage(tmp_path, **options))
        return made[-1]

    yield make
    for stage in made:
        stage.close()


@pytest.fixture
def stage(make: Callable[..., Stage]) -> Stage:
    return make()


def test_what_another_engine_has_is_restored_and_counts_as_durable_once_it_is_our_own(stage: Stage) -> None:
    write(stage.store(), keys(0, 1))
    other = stage.other()
    other("write(store, keys(2, 3))")
    other("write(store, keys(4))")
    assert stage.pools.restorable(keys(*range(7))) == [1, 2, 3, 4, 5]
    assert stage.pools.reachable(keys(*range(7))) == 5
    assert stage.pools.durable(keys(*range(7))) == 2, "the other engine may evict it"
    assert stage.load("a", range(5))
    written = stage.store().stats.bytes_written
    assert not stage.pools.stored(stage.transfers(range(5))), "so it is offered"
    assert stage.offer(range(5), "s")
    assert stage.spilled() == (0, 3, 2)
    assert stage.store().stats.bytes_written == written
    assert stage.pools.durable(keys(*range(7))) == 5
    assert {session for needed in stage.store().needed(keys(2, 4)) for session in needed.sessions} == {"s"}
    other.kill()
    shutil.rmtree(stage.directory / "theirs-a")
    assert stage.load("b", range(5))
    assert not any(stage.pools.kept().values())


@pytest.fixture
def database(tmp_path: Path, migrated_file: Path) -> Iterator[Database]:
    shutil.copy(migrated_file, tmp_path / "agentstate.db")
    database = Database(f"sqlite:///{tmp_path / 'agentstate.db'}")
    yield database
    database.close()


@pytest.mark.parametrize("host_bytes", [0, 1 << 26], ids=["to staging", "beside a host tier"])
def test_a_session_that_only_another_engine_of_the_machine_has_served_is_resumed_and_prefetched_here(
    make: Callable[..., Stage], database: Database, host_bytes: int
) -> None:
    stage = make(windowed=True, staging_bytes=1 << 28, host_bytes=host_bytes)
    other, windows = stage.other(), stage.other(pool=1)
    other("write(store, keys(0, 1, 2, 3))")
    windows("write(store, keys(2, 3))")
    theirs, ours = node_id(stage.directory / "theirs-a", "theirs"), node_id(stage.directory / "ours", "ours")
    mark = stage.mark(stage.known[0]).hex()
    engine = Engine("eng_ours", ours, 0, "tcp://127.0.0.1:1", "http://ours/v1", "m", mark, "/ours", control_secret="-")
    far = replace(engine, id="eng_far", node="far", base_url="http://far/v1", pages_dir="/far", shared_store="s3://b")
    service = Service(database, 3600)
    session = service.create("m")
    chain = b"".join(keys(0, 1, 2, 3))
    found = Manifest(session.uid, mark, 0, theirs, "eng_theirs", PAGE_SIZE, 4 * PAGE_SIZE, chain, 1)
    with database.write() as connection:
        manifests.save(connection, replace(found, shared_tokens=4 * PAGE_SIZE))
        engines.register(connection, far)
    options = {"home": stage.directory, "heartbeat_interval_s": 0.05}
    sessions = Sessions(
        stage.pools,
        engine,
        database,
        Settings(**options),  # type: ignore[arg-type]
        page_size=PAGE_SIZE,
        stores=lambda: True,
        dead=list,
    )
    try:
        until(lambda: service.pages(session.id).ranks[0].id == "eng_ours")
        pages = service.pages(session.id)
        assert (pages.ranks[0].reads, pages.keys) == ({theirs}, [chain])
        resumed = service.resume(session.id, lease_ttl_s=60, tail=0)
        assert resumed.engine is not None and resumed.engine.base_url == "http://ours/v1"
        assert (resumed.kv.state, resumed.kv.tokens, resumed.kv.valid) == ("durable", 4 * PAGE_SIZE, True)

        for packed in (None, chain):
            ask = sessions.prefetch(session.uid, "host", packed, planned=packed is None)
            until(lambda ask=ask: ask()["state"] != "pending")
            answer = ask()
            assert (answer["state"], answer["pages"], answer["tokens"]) == ("warm", 4, 4 * PAGE_SIZE)
        reads = sum(sum(of_pool.values()) for of_pool in stage.reads())
        assert reads and stage.load("a", range(4))
        assert sum(sum(of_pool.values()) for of_pool in stage.reads()) == reads, "it was there"
        # What is not found any more is not promised.
        other.kill()
        shutil.rmtree(stage.directory / "theirs-a")
        until(lambda: service.whereabouts(session.id).ranks[0].base_url == "http://ours/v1")
        service.suspend(session.id, resumed.lease.key, reason=SuspendReason.USER_WAIT)
        until(lambda: service.whereabouts(session.id).ranks[0].id == "eng_far")
        assert sessions.prefetch(session.uid, "host", chain)()["state"] == "cold"
    finally:
        sessions.close()


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_what_both_have_computed_is_written_by_one_of_them(stage: Stage) -> None:
    other = stage.other()
    other("write(store, keys(0, 1, 2))")
    assert stage.offer(range(4))
    assert stage.spilled() == (1, 3, 0)
    assert stage.load("a", range(3))


def test_what_lies_beside_another_session_s_pages_is_written_here(stage: Stage) -> None:
    other = stage.other()
    other("write(store, keys(0, 1, 'of another session'))")
    assert stage.load("a", range(2))
    assert stage.offer(range(2))
    assert stage.spilled() == (2, 0, 0)
    assert stage.store().stored(keys(0, 1, "of another session")) == [True, True, False]
    named = stage.store().extent_names(keys(0, 1, "of another session"))
    assert [name is not None for name in named] == [True, True, False]


def test_what_has_left_the_other_engine_meanwhile_is_computed_and_written_here(stage: Stage) -> None:
    other = stage.other()
    other("write(store, keys(0, 1))")
    assert stage.pools.load("a", stage.transfers(range(2)))
    other("store.collect()")
    finished = stage.pools.finish(stage.pools.start(()))
    stage.pools.drain()
    assert finished.failed in (set(), {"a"}), "it may have been read already"
    assert stage.pools.restorable_for("a", keys(0, 1)) == []
    assert stage.offer(range(2))
    assert stage.spilled() == (2, 0, 0)


def test_what_this_machine_has_is_not_asked_of_the_share(stage: Stage) -> None:
    write(stage.store(), keys(0))
    _, pages = stage.pools.shared_pages()[0]
    stage.share.publish(pages, keys(1, 2))
    stage.share.publish(pages, keys(3))
    stage.other()("write(store, keys(1, 2))")
    stage.other("b")("write(store, keys(4))")
    assert stage.pools.restorable(keys(*range(7))) == [1, 2, 3, 4, 5]
    assert stage.pools.durable(keys(*range(7))) == 4, "of the share and here"
    assert stage.pools.shared_takes_s(keys(0, 1, 2)) is None
    assert stage.pools.shared_takes_s(keys(0, 1, 2, 3)) is not None
    assert stage.load("a", range(3))
    assert stage.share.tier.read_from == []
    assert stage.load("b", range(5))
    assert stage.pools.stat()["restore"]["pages_shared"] == 1


def test_it_is_read_ahead_for_requests_and_sessions(stage: Stage) -> None:
    write(stage.store(), keys(0))
    stage.other()("write(store, keys(1, 2))")
    stage.pools.read_ahead("a", keys(0, 1, 2))
    assert stage.pools.staged_for(keys(0, 1, 2))
    assert stage.load("a", range(3))
    stage.pools.prefetch("s", keys(0, 1, 2), 60)
    assert stage.pools.staged_for(keys(0, 1, 2))
    assert stage.load("b", range(3))
    assert not any(stage.pools.kept().values())


def test_all_pools_have_to_agree(make: Callable[..., Stage]) -> None:
    stage = make(windowed=True)
    full, window = stage.other(), stage.other(pool=1)
    full("write(store, keys(*range(4)))")
    assert stage.pools.restorable(keys(*range(4))) == []
    window("write(store, keys(2, 3))")
    assert stage.pools.restorable(keys(*range(4))) == [4]
    assert stage.load("a", range(4))
    assert stage.offer(range(4))
    stats = stage.pools.stat()
    assert (stats["spill"]["pages_linked"], stats["pools"][SWA.value]["spill"]["pages_linked"]) == (4, 2)
    assert stage.pools.durable(keys(*range(4))) == 4


def test_other_weights_have_other_replicas(stage: Stage) -> None:
    stage.other()("write(store, keys(0))")
    assert stage.pools.restorable(keys(0, 1)) == [1]
    stage.weights = "second"
    assert stage.pools.move(stage.open, PATIENCE_S)
    assert stage.pools.restorable(keys(0, 1)) == []
    stage.other("b")("write(store, keys(0, 1))")
    assert stage.pools.restorable(keys(0, 1)) == [1, 2]
    assert stage.load("a", range(2)) and stage.offer(range(2))
    assert stage.spilled() == (0, 2, 0)
