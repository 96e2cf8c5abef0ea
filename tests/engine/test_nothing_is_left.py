"""What SGLang's side keeps for requests, with both of its trees: nothing, once they are gone."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from radix_tree import PAGE_SIZE, TREES, Tree, key_of
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle

from engine_patch.restore import Restored, RestoredRequest, Source
from engine_patch.sglang_api import MatchPrefixParams, RadixKey, get_storage_hash_str


@pytest.fixture(autouse=True)
def context(monkeypatch: pytest.MonkeyPatch, parallel: SimpleNamespace) -> None:
    disagg = SimpleNamespace(disaggregation_mode="null")
    monkeypatch.setattr("sglang.srt.mem_cache.unified_radix_cache.get_disagg", lambda: disagg)


@pytest.fixture(params=TREES)
def make_tree(request: pytest.FixtureRequest) -> Callable[[], Tree]:
    return lambda: Tree(request.param)


class Forks:
    """Requests that begin with the same four pages, all of which are stored, and have a few tokens of their own."""

    def __init__(self, tree: Tree, count: int):
        self.common = key_of(4, shared=4)
        self._tree = tree
        self._tokens = {
            f"r{fork}": array("q", [*self.common.token_ids, *range(100 * fork + 9000, 100 * fork + 9006)])
            for fork in range(count)
        }
        tree.store.stores.update(get_storage_hash_str(self.common, page_size=PAGE_SIZE))

    def match(self, rid: str) -> Any:
        req = SimpleNamespace(rid=rid, session=None)
        return self._tree.match_prefix(MatchPrefixParams(key=RadixKey(self._tokens[rid]), req=req))


def test_forks_that_are_served_from_the_device_leave_no_markers(make_tree: Callable[[], Tree]) -> None:
    tree = make_tree()
    fresh, forks = tree.kept(), Forks(tree, 6)
    assert [forks.match(f"r{fork}").host_hit_length for fork in range(6)] == [4 * PAGE_SIZE] * 6
    assert tree.kept()["hit_markers"] == 6
    # One of them has been restored, and has put what they share in the tree.
    tree.linker.hit_markers.pop("r0")
    tree.compute(forks.common)
    tree.settle()
    for fork in range(1, 6):
        found = forks.match(f"r{fork}")
        assert (found.device_prefix_len, found.host_hit_length) == (4 * PAGE_SIZE, 0)
    assert tree.kept() == fresh


def test_what_is_lost_between_two_matches_leaves_no_marker(make_tree: Callable[[], Tree]) -> None:
    tree = make_tree()
    fresh, forks = tree.kept(), Forks(tree, 1)
    assert forks.match("r0").host_hit_length
    tree.store.stores.clear()
    assert not forks.match("r0").host_hit_length
    assert tree.kept() == fresh


@pytest.mark.parametrize("ends", ["aborted", "flushed"])
def test_a_request_that_leaves_the_queue_leaves_no_marker(make_tree: Callable[[], Tree], ends: str) -> None:
    tree = make_tree()
    fresh, forks = tree.kept(), Forks(tree, 1)
    forks.match("r0")
    if ends == "aborted":
        tree.release_aborted_request(CacheRequestHandle(rid="r0", attempt_id=0))
    else:
        tree.reset()
    assert tree.kept() == fresh


@pytest.mark.parametrize("seconds", [0.1, 0])
def test_a_batch_that_is_not_timed_leaves_nothing_of_what_it_restored(
    make_tree: Callable[[], Tree], seconds: float
) -> None:
    """SGLang tells the time of prefills, and of most of them."""
    tree, told = make_tree(), []
    fresh = tree.kept()
    tree.store.stepped = lambda *step: told.append(step)
    restored = Restored({"r": RestoredRequest(1, 1, frozenset({Source.COLD}))}, 1.0)
    tree.linker.landed["r"] = restored
    batch: Any = SimpleNamespace(reqs=[SimpleNamespace(rid="r")], prefix_lens=[4], extend_lens=[2])
    tree.stepped(batch, seconds)
    assert told == ([([(4, 2)], seconds, restored)] if seconds else [])
    assert tree.kept() == fresh


def test_what_is_locked_is_shown(make_tree: Callable[[], Tree]) -> None:
    tree = make_tree()
    scheduler: Any = SimpleNamespace(
        is_generation=True,
        beam_coordinator=None,
        waiting_queue=[],
        policy=SimpleNamespace(policy="another"),
        running_batch=SimpleNamespace(),
    )
    fresh = tree.kept()
    tree.compute(key_of(4))
    tree.before_next_batch(scheduler)
    assert tree.kept() == {**fresh, "locked_offers": 1, "locked_tokens": 4 * PAGE_SIZE}
    tree.settle()
    tree.before_next_batch(scheduler)
    assert tree.kept() == fresh
