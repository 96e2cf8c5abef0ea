"""What routers are told of stored pages: the events of SGLang's own trees, over real stores."""

from __future__ import annotations

import itertools
import shutil
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from contents import drop
from device import LAYERS
from radix_tree import PAGE_SIZE, PAGES, TREES, Linker, Tree
from sglang.srt.disaggregation.kv_events import KVEventBatch
from turns import turn

from agentstate.fleet.turns import sign
from agentstate.pages import PageKeys, PageStore, fingerprint
from agentstate.pages.files import read_header
from agentstate.settings import Settings
from agentstate.tiers import Guard, SharedExtents
from agentstate.tiers.directory import DirectoryTier
from agentstate.tiers.pages import Listed, SharedPages
from engine_patch import kv_events
from engine_patch.linker import AgentStateLinker
from engine_patch.pools import DevicePool
from engine_patch.sglang_api import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EvictParams,
    PoolName,
    PoolTransfer,
    RadixKey,
    StorageMedium,
    get_storage_hash_str,
)
from engine_patch.stored_pools import Share, StoredPools
from engine_patch.weights import Weights

pytestmark = pytest.mark.usefixtures("parallel")
GPU, DISK, EXTERNAL = StorageMedium.GPU, StorageMedium.DISK, StorageMedium.EXTERNAL
MARK = fingerprint(pool="kv")


class Storing(Linker):
    """Stores what it is offered, beside what a linker is asked otherwise."""

    suspended = retired = False
    changes, places = AgentStateLinker.changes, AgentStateLinker.places

    def __init__(self, pools: StoredPools, clock: Callable[[], float]):
        super().__init__(clock)
        self._pools = pools

    def resume(self) -> None:
        self.suspended = False

    def retire(self, reason: str) -> None:
        self.suspended, self.retired = False, True

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        return self._pools.offer(transfers, tuple)

    def stored(self, transfers: Sequence[PoolTransfer]) -> bool:
        return self._pools.stored(transfers)

    def num_completed_offloads(self) -> int:
        return self._pools.results

    def pop_completed_offload(self) -> bool:
        return self._pools.pop_result()

    def reset(self) -> None:
        self._pools.reset()


class Stage:
    """An engine's tree over a store of its own and one that it shares. ``heard`` is what a router makes of the events:
    by medium, the blocks that it takes to be there, with all that was told of them."""

    def __init__(self, home: Path, backend: str, **parameters: Any):
        self.backend, self.home = backend, home
        self._started = ExitStack()
        (home / "share").mkdir(exist_ok=True)
        self.tier = self._started.enter_context(Guard(DirectoryTier(home / "share"), "the share"))
        self.extents = SharedExtents(self.tier)
        tensors = [tuple(torch.zeros(PAGES * PAGE_SIZE + 64, 2, 8) for _ in range(2)) for _ in range(LAYERS)]
        pool = DevicePool(PoolName.KV, tensors, PAGE_SIZE, tuple(range(LAYERS)), ("float32",))
        settings = Settings(
            staging_bytes=1 << 20, spill_staging_bytes=1 << 20, read_threads=1, drive_timeout_s=3600, shared_reads=1
        )
        self.pools = StoredPools([pool], self._open, settings, share=Share(self.tier, self._open_shared))
        self._started.callback(self.pools.close)
        self._started.callback(self.pools.finish_spilling, 60)
        self.tree = Tree(
            backend,
            linker=lambda clock: Storing(self.pools, clock),
            enable_kv_cache_events=True,
            **parameters,
        )
        self.heard: dict[str, dict[int, Any]] = {medium: {} for medium in (GPU, DISK, EXTERNAL)}
        self.events: list[Any] = []
        self._published = 0

    def _open(self, pool: DevicePool, directory: str = "pages") -> PageStore:
        self.store = PageStore(self.home / directory, MARK, pool.device_pages.geometry)
        return self.store

    def _open_shared(self, pool: DevicePool, store: PageStore) -> SharedPages:
        self.shared = SharedPages(store.directory / "shared", self.extents, MARK, pool.device_pages.geometry)
        return self.shared

    def stored(self) -> None:
        """What was offered is stored, and the tree knows."""
        done = threading.Event()
        self.pools.then(done.set)
        assert done.wait(60)
        self.tree.check_hicache_events()

    def step(self) -> list[Any]:
        """What SGLang publishes at the end of a step."""
        events = self.tree.take_events()
        for event in self.decoded(events):
            if isinstance(event, AllBlocksCleared):
                for blocks in self.heard.values():
                    blocks.clear()
            elif isinstance(event, BlockRemoved):
                for block in event.block_hashes:
                    del self.heard[event.medium][block]
            else:
                parent, size = event.parent_block_hash, event.block_size
                for at, block in enumerate(event.block_hashes):
                    assert block not in self.heard[event.medium]
                    tokens = tuple(event.token_ids[at * size : (at + 1) * size])
                    self.heard[event.medium][block] = parent, tokens, event.cache_salt, event.lora_name
                    parent = block
        self.events += events
        return events

    @staticmethod
    def decoded(events: list[Any]) -> list[Any]:
        payload = msgspec.msgpack.encode(KVEventBatch(ts=0.0, events=events))
        return list(msgspec.msgpack.decode(payload, type=KVEventBatch).events)

    def compute(self, *keys: RadixKey) -> None:
        for key in keys:
            self.tree.compute(key)
            self.stored()
        self.step()

    def publish(self) -> list[Listed]:
        """Publish all that is stored, and have it found."""
        listed = []
        for path in sorted((self.store.directory / "extents").iterdir()):
            published = self.extents.publish(path, "rank0").result(60)
            self._published += 1
            listed.append(
                Listed(self._published, published.name, published.n_bytes, "", PageKeys.of(read_header(path).keys))
            )
        self.shared.enter(listed)
        return listed

    def close(self) -> None:
        self._started.close()


def key_of(pages: int, seed: int = 0, shared: int = 0, **namespace: Any) -> RadixKey:
    own = [1000 + seed * 1000 + i for i in range((pages - shared) * PAGE_SIZE)]
    return RadixKey(array("q", [*range(shared * PAGE_SIZE), *own]), **namespace)


def of(event: Any, medium: StorageMedium) -> bool:
    return isinstance(event, BlockStored | BlockRemoved) and event.medium == medium


def pages_of(key: RadixKey) -> list[bytes]:
    return [bytes.fromhex(text) for text in get_storage_hash_str(key, page_size=PAGE_SIZE)]


@pytest.fixture(params=TREES)
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Stage]]:
    with ExitStack() as started:
        yield lambda **parameters: started.enter_context(closing(Stage(tmp_path, request.param, **parameters)))


@pytest.fixture
def stage(start: Callable[..., Stage]) -> Stage:
    return start()


NAMESPACES: list[dict[str, Any]] = [{}, {"cache_salt": "s"}, {"extra_key": "e"}, {"extra_key": "e", "cache_salt": "s"}]


@pytest.mark.parametrize("dynamo", [False, True], ids=["default", "dynamo"])
@pytest.mark.parametrize("namespace", NAMESPACES, ids=["plain", "salt", "extra", "both"])
def test_a_block_is_told_of_the_drive_as_of_the_device(
    start: Callable[..., Stage], namespace: dict[str, Any], dynamo: bool
) -> None:
    stage = start(dynamo_kv_event_format=dynamo)
    first, second = key_of(6, shared=3, **namespace), key_of(7, seed=1, shared=3, **namespace)
    third = RadixKey(array("q", [*second.token_ids, *range(8)]), **namespace)
    stage.compute(first, second, third)
    assert len(stage.heard[DISK]) == 3 + 3 + 4 + 2
    assert stage.heard[DISK] == stage.heard[GPU]
    stage.publish()
    stage.step()
    assert stage.heard[EXTERNAL] == stage.heard[GPU]
    # A chain is one event, not one a page.
    assert len([event for event in stage.events if of(event, DISK)]) <= 4


def test_a_block_of_pairs_is_told_of_the_drive_as_of_the_device(
    start: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a draft model SGLang's tokens are pairs, which its own type of an event does not decode."""
    monkeypatch.setattr(Stage, "decoded", staticmethod(list))
    stage = start(is_eagle=True)
    tokens = array("q", range(6 * PAGE_SIZE + 1))
    stage.compute(RadixKey(tokens[: 4 * PAGE_SIZE + 1], is_bigram=True), RadixKey(tokens, is_bigram=True))
    assert len(stage.heard[DISK]) == 6
    assert stage.heard[DISK] == stage.heard[GPU]
    pairs = [pair for _, told, _, _ in stage.heard[DISK].values() for pair in told]
    assert pairs == list(itertools.pairwise(tokens))


def test_a_hash_that_is_not_remembered_is_computed_from_the_chains_beginning(
    start: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_events, "_MOST_DIGESTS", 0)
    stage, namespace = start(), {"cache_salt": "s", "extra_key": "e"}
    first = key_of(6, **namespace)
    stage.compute(first, RadixKey(array("q", [*first.token_ids, *range(12)]), **namespace))
    assert len(stage.heard[DISK]) == 9
    assert stage.heard[DISK] == stage.heard[GPU]


def test_nothing_is_told_before_it_is_stored(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, publish = threading.Event(), stage.store.publish

    def later(*arguments: Any, **named: Any) -> None:
        assert gate.wait(60)
        publish(*arguments, **named)

    monkeypatch.setattr(stage.store, "publish", later)
    stage.tree.compute(key_of(4))
    stage.tree.check_hicache_events()
    stage.step()
    assert (len(stage.heard[GPU]), stage.heard[DISK]) == (4, {})
    gate.set()
    stage.stored()
    stage.step()
    assert stage.heard[DISK] == stage.heard[GPU]


def test_what_could_not_be_stored_is_not_told_and_not_remembered(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **named: Any) -> None:
        raise OSError("of this test")

    with monkeypatch.context() as patch:
        patch.setattr(stage.store, "publish", full)
        stage.compute(key_of(4))
    assert (len(stage.heard[GPU]), stage.heard[DISK]) == (4, {})
    assert not stage.tree.linker.kv_events._pages


def test_what_is_evicted_from_the_drive_is_taken_back(stage: Stage) -> None:
    stage.compute(key_of(4), key_of(5, seed=1))
    stage.store.need(pages_of(key_of(5, seed=1)))
    assert stage.store.collect()
    (removed,) = stage.step()
    assert (removed.medium, len(removed.block_hashes)) == (DISK, 4)
    assert {tokens for _, tokens, _, _ in stage.heard[DISK].values()} == {
        tuple(key_of(5, seed=1).token_ids[at : at + PAGE_SIZE]) for at in range(0, 5 * PAGE_SIZE, PAGE_SIZE)
    }
    assert len(stage.heard[GPU]) == 9


def test_what_the_device_evicts_stays_told_of_the_drive(stage: Stage) -> None:
    stage.compute(key_of(4))
    told = dict(stage.heard[DISK])
    stage.tree.evict(EvictParams(num_tokens=4 * PAGE_SIZE))
    stage.step()
    assert (stage.heard[GPU], stage.heard[DISK]) == ({}, told)


def test_what_is_erased_or_wrong_is_taken_back(stage: Stage) -> None:
    key = key_of(6)
    stage.compute(key)
    stage.pools.remove(pages_of(key)[4:])
    stage.step()
    assert len(stage.heard[DISK]) == 4
    assert drop(stage.store, pages_of(key)[3]) == 1
    stage.step()
    assert len(stage.heard[DISK]) == 3


def test_pages_are_taken_back_when_their_directory_vanishes(stage: Stage) -> None:
    stage.compute(key_of(4))
    shutil.rmtree(stage.home / "pages")
    stage.store.attend()
    stage.step()
    assert (len(stage.heard[GPU]), stage.heard[DISK]) == (4, {})


def test_lost_pages_are_told_again_once_they_are_stored_again(stage: Stage) -> None:
    stage.compute(key_of(4))
    stage.pools.remove(pages_of(key_of(4))[2:])
    stage.tree.store.lost += 2
    stage.step()
    assert len(stage.heard[DISK]) == 2
    stage.compute(key_of(4))
    assert stage.heard[DISK] == stage.heard[GPU]


def test_what_a_process_before_has_stored_is_told_when_it_is_used(start: Callable[..., Stage], tmp_path: Path) -> None:
    before = start()
    before.compute(key_of(4), key_of(4, seed=1))
    before.close()
    stage = start()
    stage.step()
    assert stage.heard[DISK] == {}
    stage.compute(key_of(4))
    assert stage.heard[DISK] == stage.heard[GPU] != {}


def test_a_flush_of_the_device_leaves_what_is_stored_told(stage: Stage) -> None:
    stage.compute(key_of(4), key_of(4, seed=1))
    stage.publish()
    stage.step()
    before = {medium: dict(stage.heard[medium]) for medium in (DISK, EXTERNAL)}
    # Not answered yet.
    stage.tree.compute(key_of(4, seed=2))
    stage.tree.reset()
    assert isinstance(next(event for event in stage.step() if not isinstance(event, BlockStored)), AllBlocksCleared)
    assert stage.heard[GPU] == {}
    assert stage.heard[DISK].items() > before[DISK].items()
    assert stage.heard[EXTERNAL] == before[EXTERNAL]
    # The next answer is that of the next offer.
    stage.compute(key_of(4, seed=3))
    assert stage.heard[DISK].items() > stage.heard[GPU].items()


def test_the_shared_store_is_told_of_separately(stage: Stage) -> None:
    key = key_of(4)
    stage.compute(key)
    (listed,) = stage.publish()
    stage.step()
    told = dict(stage.heard[GPU])
    assert (stage.heard[DISK], stage.heard[EXTERNAL]) == (told, told)
    # It has left the drive.
    stage.pools.remove(pages_of(key))
    stage.step()
    assert (stage.heard[DISK], stage.heard[EXTERNAL]) == ({}, told)
    # Another extent has the same pages.
    stage.shared.enter([listed._replace(id=listed.id + 1)])
    stage.shared.leave([listed.id])
    stage.step()
    assert stage.heard[EXTERNAL] == told
    stage.shared.leave([listed.id + 1])
    stage.step()
    assert stage.heard[EXTERNAL] == {}
    assert not stage.tree.linker.kv_events._pages


def test_pages_that_nobody_has_used_here_are_not_told(stage: Stage) -> None:
    stage.compute(key_of(4))
    listed = stage.publish()
    stage.shared.leave([of.id for of in listed])
    stage.step()
    unknown = listed[0]._replace(id=99, keys=PageKeys.of(pages_of(key_of(4, seed=9))))
    stage.shared.enter([unknown])
    assert stage.step() == []
    # Once a request has, they are.
    stage.compute(key_of(4, seed=9))
    assert len(stage.heard[EXTERNAL]) == 4


def test_who_has_too_much_to_remember_takes_the_oldest_back(
    start: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_events, "_MOST_BYTES", 6 * (400 + 4 * PAGE_SIZE))
    stage = start()
    stage.compute(key_of(4))
    stage.compute(key_of(4, seed=1))
    assert len(stage.heard[DISK]) == 6
    assert {tokens[0] for _, tokens, _, _ in stage.heard[DISK].values()} == {1008, 1012, 2000, 2004, 2008, 2012}


def test_a_step_looks_at_a_bounded_number_of_pages(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.compute(key_of(10))
    looks: list[int] = []
    places = stage.tree.store.places
    monkeypatch.setattr(stage.tree.store, "places", lambda keys: (looks.append(len(keys)), places(keys))[1])
    monkeypatch.setattr(kv_events, "_MOST_LOOKS", 4)
    stage.tree.linker.kv_events.look_again()
    stage.pools.remove(pages_of(key_of(10)))
    for _ in range(5):
        stage.step()
    assert stage.heard[DISK] == {}
    assert looks and max(looks) == 4


def test_nothing_is_told_while_weights_are_updated(stage: Stage) -> None:
    stage.compute(key_of(4))
    stage.tree.store.suspended = True
    stage.pools.remove(pages_of(key_of(4))[:2])
    assert stage.step() == []
    stage.tree.linker.weights_updated(Weights.SAME)
    stage.step()
    assert len(stage.heard[DISK]) == 2
    # Nothing of what is stored is used any more.
    stage.tree.store.suspended = True
    stage.tree.linker.weights_updated(Weights.IN_DOUBT)
    stage.step()
    assert stage.heard[DISK] == {}


def test_other_weights_have_other_stores(stage: Stage) -> None:
    key = key_of(4)
    stage.compute(key, key_of(4, seed=1))
    stage.publish()
    stage.step()
    stage.tree.reset()
    assert stage.pools.move(lambda pool: stage._open(pool, "of other weights"), 60)
    stage.tree.linker.weights_updated(Weights.SAME)
    stage.step()
    assert stage.heard == {GPU: {}, DISK: {}, EXTERNAL: {}}
    stage.compute(key)
    stage.publish()
    stage.step()
    assert stage.heard[DISK] == stage.heard[EXTERNAL] == stage.heard[GPU] != {}
    stage.pools.remove(pages_of(key))
    stage.step()
    assert stage.heard[DISK] == {}


def test_a_page_that_is_just_being_merged_is_not_taken_back(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.compute(key_of(4))
    stored, asked = stage.store.stored, []

    def between(keys: Sequence[bytes]) -> list[bool]:
        asked.append(keys)
        return [False] * len(keys) if len(asked) == 1 else stored(keys)

    monkeypatch.setattr(stage.store, "stored", between)
    stage.tree.linker.kv_events.look_again()
    assert stage.step() == []
    assert len(stage.heard[DISK]) == 4


def test_sessions_are_told_by_their_ids_alone(stage: Stage) -> None:
    stage.tree.compute(key_of(4), session_id=sign(b"k" * 32, turn("s")))
    stage.stored()
    events = [event for event in stage.step() if of(event, GPU)]
    assert {event.session_id for event in events} == {"s"}
    assert {type(event.session_id) for event in events} == {str}


def test_nothing_is_kept_unless_events_are_on(tmp_path: Path) -> None:
    tree = Tree("python")
    tree.compute(key_of(4))
    tree.settle()
    assert tree.linker.kv_events is None
    assert tree.take_events() == []
