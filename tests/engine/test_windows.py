"""Sessions of models with sliding windows, brought to the device, kept there and copied to host memory, in both of
SGLang's own trees."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from radix_tree import PAGE_SIZE, PAGES, TREES, Linker, WindowTree, key_of

from agentstate.lookahead.forecast import Forecast
from agentstate.pages import Need, PageStore, fingerprint
from agentstate.settings import Settings
from engine_patch.pools import DevicePool, device_pools
from engine_patch.preloads import Preload
from engine_patch.restore import Finished
from engine_patch.sessions import Progress
from engine_patch.sglang_api import (
    EvictParams,
    MatchPrefixParams,
    PoolName,
    PoolTransfer,
    RadixKey,
    get_storage_hash_str,
)
from engine_patch.stored_pools import StoredPools

pytestmark = pytest.mark.usefixtures("parallel")

WINDOW = 2
IDLE: Any = SimpleNamespace(running_batch=None, last_batch=None, chunked_req=None, page_size=PAGE_SIZE)
SOON, LATE = Forecast.exactly(5.0), Forecast.exactly(20_000.0)
Make = Callable[..., WindowTree]


@pytest.fixture(params=TREES)
def make_tree(request: pytest.FixtureRequest) -> Make:
    return lambda **room: WindowTree(request.param, WINDOW, **room)


def pages_of(key: RadixKey) -> list[bytes]:
    return [bytes.fromhex(page) for page in get_storage_hash_str(key, page_size=PAGE_SIZE)]


def run(tree: WindowTree, key: RadixKey, session: str = "s") -> None:
    tree.compute(key, session)
    tree.settle()
    tree.device_tier.remember(session, key)


def empty(tree: WindowTree) -> None:
    tree.evict(EvictParams(num_tokens=PAGES * PAGE_SIZE, swa_num_tokens=PAGES * PAGE_SIZE))


def step(tree: WindowTree) -> None:
    tree.device_tier.run(IDLE)
    tree.preloads.land()
    tree.device_tier.land()


def there(tree: WindowTree, key: RadixKey) -> int:
    """How many pages a request finds."""
    return int(tree.match_prefix(MatchPrefixParams(key=key)).device_prefix_len) // PAGE_SIZE


def begin(tree: WindowTree, key: RadixKey, session: str = "s") -> Callable[[], Progress]:
    progress = tree.device_tier.prefetch(session, pages_of(key))
    assert progress is not None
    step(tree)
    return progress


def land(tree: WindowTree, *failed: int) -> None:
    tree.store.failed_batches.update(failed)
    tree.store.landed_batches = len(tree.store.loads)
    step(tree)
    tree.settle()  # what is brought is offered, and stored
    assert tree.missing == (0, 0) and tree.full_protected_size() == tree.swa_protected_size() == 0
    assert not any(tree.kept().values())


def loaded(tree: WindowTree) -> list[tuple[int, dict[PoolName, int]]]:
    """How many pages were loaded each time, and to how many pages of each pool."""
    return [
        (len(keys), {name: len(own) // PAGE_SIZE for name, own in slots.items()}) for keys, slots in tree.store.loads
    ]


def test_a_session_is_brought_back_with_its_window(make_tree: Make) -> None:
    tree, key = make_tree(), key_of(10)
    run(tree, key)
    empty(tree)
    assert there(tree, key) == 0
    progress = begin(tree, key)
    assert progress() is Progress.RUNNING and tree.missing == (10 * PAGE_SIZE, WINDOW * PAGE_SIZE)
    land(tree)
    assert (progress(), there(tree, key)) == (Progress.DONE, 10)
    assert loaded(tree) == [(10, {PoolName.KV: 10, PoolName.SWA: WINDOW})]
    # A request reads the window where it was loaded to.
    (_, slots), *_ = tree.store.loads
    found = tree.tree_core.collect_full_device_indices(
        tree.match_prefix(MatchPrefixParams(key=key)).last_device_node, tree.root_node_handle()
    )
    windows = tree.token_to_kv_pool_allocator.translate_loc_from_full_to_swa(found)
    assert found.tolist() == slots[PoolName.KV].tolist()
    assert windows[-WINDOW * PAGE_SIZE :].tolist() == slots[PoolName.SWA].tolist()
    assert not windows[: -WINDOW * PAGE_SIZE].any()
    # It leaves like any other.
    empty(tree)
    assert tree.missing == (0, 0) and there(tree, key) == 0


@pytest.mark.parametrize("more", [1, 2, 5])
def test_what_follows_is_brought_after_what_is_there(make_tree: Make, more: int) -> None:
    """Of one page more the window begins in what is there."""
    tree, key = make_tree(), key_of(6 + more)
    run(tree, key)
    empty(tree)
    run(tree, key[: 6 * PAGE_SIZE], "other")
    progress = begin(tree, key)
    land(tree)
    assert (progress(), there(tree, key)) == (Progress.DONE, 6 + more)
    assert loaded(tree) == [(more, {PoolName.KV: more, PoolName.SWA: min(more, WINDOW)})]


def test_what_does_not_come_leaves_nothing(make_tree: Make) -> None:
    tree, key = make_tree(), key_of(10)
    run(tree, key)
    empty(tree)
    progress = begin(tree, key)
    land(tree, 0)
    assert (progress(), there(tree, key)) == (Progress.FAILED, 0)
    assert tree.token_to_kv_pool_allocator.available_size() == PAGES * PAGE_SIZE


@pytest.mark.parametrize("without_window", [False, True])
def test_what_others_have_computed_meanwhile_is_kept_once(make_tree: Make, without_window: bool) -> None:
    tree, key = make_tree(), key_of(10)
    run(tree, key)
    empty(tree)
    progress = begin(tree, key)
    run(tree, key_of(12), "other")
    if without_window:
        tree.evict(EvictParams(swa_num_tokens=7 * PAGE_SIZE))
    land(tree)
    assert (progress(), there(tree, key)) == (Progress.DONE, 10)
    empty(tree)
    assert tree.missing == (0, 0)


@pytest.mark.parametrize(("room", "begins"), [(3, True), (1, False)])
def test_nothing_is_taken_where_one_pool_has_too_little(make_tree: Make, room: int, begins: bool) -> None:
    tree, key = make_tree(window_room=20), key_of(10)
    run(tree, key)
    empty(tree)
    held = tree.token_to_kv_pool_allocator.swa_attn_allocator.alloc((20 - room) * PAGE_SIZE)
    progress = begin(tree, key)
    assert progress() is (Progress.RUNNING if begins else Progress.FAILED)
    tree.token_to_kv_pool_allocator.swa_attn_allocator.free(held)
    land(tree)


def test_windows_of_who_waits_are_evicted_for_a_preload(make_tree: Make) -> None:
    tree, key = make_tree(window_room=12), key_of(10)
    run(tree, key)
    empty(tree)
    run(tree, key_of(12, seed=5), "other")
    progress = begin(tree, key)
    land(tree)
    assert (progress(), there(tree, key)) == (Progress.DONE, 10)


class Storing(Linker):
    """One over real stores, once they are ``opened``."""

    opened: StoredPools

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        return self.opened.offer(transfers, list)

    def num_completed_offloads(self) -> int:
        return self.opened.results

    def pop_completed_offload(self) -> bool:
        return self.opened.pop_result()

    def demote(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        return self.opened.demote(transfers, list, session_id)

    def num_demoted(self) -> int:
        return self.opened.demoted

    def pop_demoted(self) -> bool:
        return self.opened.pop_demoted()

    def preload(self, rid: str, keys: list[bytes], slots: Mapping[PoolName, torch.Tensor], need: Need) -> int:
        return self.opened.preload(rid, keys, slots, (), need)

    def landed(self, batch: int) -> bool:
        return self.opened.landed(batch)

    def finish(self, batch: int) -> Finished:
        return self.opened.finish(batch)


def until(reached: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.001)


def buffers(tree: WindowTree) -> list[list[torch.Tensor]]:
    """Those of full attention, and those of windows."""
    kv = tree.token_to_kv_pool_allocator.get_kvcache()
    return [[*pool.k_buffer, *pool.v_buffer] for pool in (kv.full_kv_pool, kv.swa_kv_pool)]


def content(tree: WindowTree, key: RadixKey) -> list[torch.Tensor]:
    """What a request that goes on from the end of ``key`` reads."""
    found = tree.match_prefix(MatchPrefixParams(key=key))
    assert found.device_prefix_len == len(key)
    full = tree.tree_core.collect_full_device_indices(found.last_device_node, tree.root_node_handle())
    window = tree.token_to_kv_pool_allocator.translate_loc_from_full_to_swa(full[-WINDOW * PAGE_SIZE :])
    return [part[slots].clone() for slots, own in zip((full, window), buffers(tree), strict=True) for part in own]


@pytest.mark.parametrize("there", [0, 6], ids=["all of it", "the end of it"])
@pytest.mark.parametrize("host_bytes", [0, 8 << 20], ids=["from the drive", "from host memory"])
@pytest.mark.parametrize("backend", TREES)
def test_what_is_brought_is_what_was_computed(backend: str, host_bytes: int, there: int, tmp_path: Path) -> None:
    tree, key = WindowTree(backend, WINDOW, kind=Storing), key_of(10)
    for of_pool in buffers(tree):
        for part in of_pool:
            part.copy_(torch.rand(part.shape, generator=torch.Generator().manual_seed(len(part))))
    pools = device_pools(tree._params, set(tree.components))

    def open_store(pool: DevicePool) -> PageStore:
        mark = fingerprint(pool=pool.name.value)
        return PageStore(tmp_path / pool.name.value, mark, pool.device_pages.geometry)

    settings = Settings(staging_bytes=1 << 20, spill_staging_bytes=1 << 20, read_threads=1, host_bytes=host_bytes)
    tree.store.opened = opened = StoredPools(pools, open_store, settings)
    assert opened.window_pages == WINDOW
    tree.compute(key, "s")

    def stored() -> bool:
        tree.check_hicache_events()
        return not tree.linker.pending_offloads

    until(stored)
    tree.device_tier.remember("s", key)
    right = content(tree, key)
    tree.store.demotes = host_bytes > 0
    if tree.store.demotes:
        tree.demotions.demote(("s", None, None), key, "s")
        until(lambda: opened.demoted)
        tree.demotions.land()
    empty(tree)
    if there:
        tree.compute(key[: there * PAGE_SIZE], "other")
        until(stored)
        before = tree.tree_core.match_full_device_prefix(key)[1]
        held = tree.tree_core.collect_full_device_indices(before, tree.root_node_handle())
        full, _ = buffers(tree)
        for part, value in zip(full, right, strict=False):
            part[held] = value[: len(held)]
    progress = begin(tree, key)

    def landed() -> bool:
        step(tree)
        return progress() is not Progress.RUNNING

    until(landed)
    until(stored)
    assert progress() is Progress.DONE
    assert [part.tolist() for part in content(tree, key)] == [part.tolist() for part in right]
    stat = opened.stat()
    read = [stat["restore"]["bytes_read"], *(pool["restore"]["bytes_read"] for pool in stat["pools"].values())]
    assert all(read) is not tree.store.demotes
    assert tree.missing == (0, 0) and tree.full_protected_size() == 0
    opened.finish_spilling(60)
    opened.close()


def test_a_flush_drops_what_is_under_way(make_tree: Make) -> None:
    tree, key = make_tree(), key_of(10)
    run(tree, key)
    empty(tree)
    progress = begin(tree, key)
    tree.token_to_kv_pool_allocator.clear()
    tree.reset()
    assert progress() is Progress.FAILED and tree.missing == (0, 0)


@pytest.mark.parametrize(("foreseen", "left"), [("a", {"b"}), ("b", {"a"}), ("c", {"a", "b"})])
def test_a_window_leaves_when_its_context_is_worth_least(make_tree: Make, foreseen: str, left: set[str]) -> None:
    """Contexts of several nodes, each of them shorter than a window: if one part of a window is gone, all of the
    context has to be computed."""
    tree = make_tree()
    keys = {session: key_of(9, seed=seed) for seed, session in enumerate("abc")}
    for session, key in keys.items():
        for pages in range(1, 10):
            run(tree, key[: pages * PAGE_SIZE], session)
        tree.now_s += 1.0
    for session in keys:
        assert tree.store.waits.foresee(session, SOON if session == foreseen else LATE, 0.0, "tool")
    assert tree.evict(EvictParams(swa_num_tokens=17 * PAGE_SIZE)).swa_num_tokens_evicted >= 17 * PAGE_SIZE
    found = {session: there(tree, key) for session, key in keys.items()}
    assert found == {session: 0 if session in left else 9 for session in keys}
    assert {session for session in keys if not tree.eviction.has_window(session)} == left
    assert tree.missing == (0, 0) and tree.full_protected_size() == tree.swa_protected_size() == 0


def test_a_session_whose_window_has_left_is_fetched(make_tree: Make) -> None:
    """Its other pages are still on the device."""
    tree, key = make_tree(), key_of(9)
    run(tree, key)
    tree.compute(key_of(12), "longer")
    tree.settle()
    tree.evict(EvictParams(swa_num_tokens=9 * PAGE_SIZE))
    assert tree.eviction.tokens("s") == 9 * PAGE_SIZE and there(tree, key) == 0
    tree.now_s += 1.0
    assert tree.store.waits.foresee("s", SOON, 0.0, "tool")
    assert tree.foresight._misses("s")
    progress = begin(tree, key)
    land(tree)
    assert (progress(), there(tree, key)) == (Progress.DONE, 9)
    assert tree.eviction.has_window("s")


def test_where_nothing_is_foreseen_windows_leave_in_the_order_of_use(make_tree: Make) -> None:
    tree = make_tree()
    keys = {session: key_of(9, seed=seed) for seed, session in enumerate("abc")}
    for session, key in keys.items():
        run(tree, key, session)
    tree.match_prefix(MatchPrefixParams(key=keys["a"]))
    tree.evict(EvictParams(swa_num_tokens=16 * PAGE_SIZE))
    assert there(tree, keys["a"]) == 9


def test_a_window_is_copied_with_its_context(make_tree: Make) -> None:
    tree, key = make_tree(), key_of(10)
    run(tree, key)
    tree.store.demotes = True
    copied: list[dict[PoolName, list[str]]] = []

    def demote(transfers: Any, session_id: str | None) -> bool:
        copied.append({transfer.name: list(transfer.keys) for transfer in transfers})
        return True

    tree.store.demote = demote  # type: ignore[method-assign]
    assert tree.demotions.demote(("s", None, None), key, "s") == 10 * PAGE_SIZE
    (of_pools,) = copied
    pages = [page.hex() for page in pages_of(key)]
    assert of_pools[PoolName.KV] == pages and of_pools[PoolName.SWA][-WINDOW:] == pages[-WINDOW:]
    assert tree.swa_protected_size() == WINDOW * PAGE_SIZE
    tree.store.copied = 1
    tree.demotions.land()
    assert tree.full_protected_size() == tree.swa_protected_size() == 0


def test_a_preload_is_known_to_requests_by_its_tokens(make_tree: Make) -> None:
    tree, key = make_tree(), key_of(10)
    run(tree, key)
    empty(tree)
    begin(tree, key)
    (preload,) = tree.preloads
    assert isinstance(preload, Preload) and preload.common(pages_of(key_of(12)), 0, PAGE_SIZE) == 10
    land(tree)
