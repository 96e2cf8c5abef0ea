"""What a session has left, since its next turn did not go on from there, leaves before all others: both of SGLang's
trees."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from radix_tree import TREES, Tree, key_of
from test_eviction import SOON, allow, evict, there

from engine_patch.sglang_api import RadixKey

pytestmark = pytest.mark.usefixtures("parallel")


@pytest.fixture(params=TREES)
def make_tree(request: pytest.FixtureRequest) -> Callable[[], Tree]:
    return lambda: Tree(request.param)


def branch(pages: int, seed: int, shared: int = 4) -> RadixKey:
    return key_of(pages, seed, shared=shared)


OLD, NEW, OTHER = branch(8, 1), branch(10, 2), key_of(8, 3)
KEYS = {"old": OLD, "new": NEW, "other": OTHER}


def turns(tree: Tree, *turns: tuple[RadixKey, str, int]) -> None:
    for key, session, epoch in turns:
        tree.compute(key, session, epoch)
        tree.settle()
        tree.now_s += 1.0


def test_what_a_session_has_left_leaves_first(make_tree: Callable[[], Tree]) -> None:
    tree = make_tree()
    turns(tree, (OTHER, "other", 1), (OLD, "s", 1), (NEW, "s", 2))
    assert tree.eviction.superseded("s") == 16
    assert evict(tree, 1) == 4
    assert there(tree, KEYS) == {"old": 4, "new": 10, "other": 8}
    # Nothing of it is remembered once it is gone, and the order is everybody's.
    assert (tree.eviction.superseded("s"), tree.store.waits.foreseen, len(tree.eviction)) == (0, 0, 2)
    assert evict(tree, 1) == 8
    assert there(tree, KEYS) == {"old": 4, "new": 10, "other": 0}


@pytest.mark.parametrize(
    ("before", "after", "epoch"),
    [(OLD, RadixKey(OLD.token_ids + key_of(2, 7).token_ids), 2), (OLD, NEW, 1), (OLD, OLD, 2)],
    ids=["it goes on", "in one turn", "the same again"],
)
def test_what_a_session_has_not_left_is_ordered_as_ever(
    make_tree: Callable[[], Tree], before: RadixKey, after: RadixKey, epoch: int
) -> None:
    tree = make_tree()
    turns(tree, (OTHER, "other", 1), (before, "s", 1), (after, "s", epoch))
    assert (tree.eviction.superseded("s"), tree.store.waits.foreseen) == (0, 0)
    assert evict(tree, 1) == 8
    assert there(tree, {"other": OTHER}) == {"other": 0}


def test_a_rewind_leaves_the_end(make_tree: Callable[[], Tree]) -> None:
    tree = make_tree()
    turns(tree, (OTHER, "other", 1), (key_of(4), "s", 1), (key_of(12), "s", 2), (key_of(4), "s", 3))
    assert tree.eviction.superseded("s") == 32
    assert evict(tree, 1) == 8
    assert there(tree, {"s": key_of(12), "other": OTHER}) == {"s": 4, "other": 8}


@pytest.mark.parametrize("longer", [0, 2], ids=["ends there", "goes on from there"])
def test_what_another_session_shares_is_not_left(make_tree: Callable[[], Tree], longer: int) -> None:
    tree = make_tree()
    shared = RadixKey(OLD.token_ids + key_of(longer, 7).token_ids) if longer else OLD
    turns(tree, (OTHER, "other", 1), (OLD, "s", 1), (shared, "fork", 1), (NEW, "s", 2))
    assert tree.eviction.superseded("s") == 0
    assert evict(tree, 1) == 8
    assert there(tree, KEYS) == {"old": 8, "new": 10, "other": 0}


@pytest.mark.parametrize("who", ["s", "fork"])
def test_what_is_gone_on_from_after_all_is_not_left_any_more(make_tree: Callable[[], Tree], who: str) -> None:
    tree = make_tree()
    turns(tree, (OTHER, "other", 1), (OLD, "s", 1), (NEW, "s", 2))
    turns(tree, (RadixKey(OLD.token_ids + key_of(2, 7).token_ids), who, 3))
    assert tree.eviction.superseded("s") == (6 * 4 if who == "s" else 0), "it has left the other end now, if it was it"
    assert evict(tree, 1) == (6 if who == "s" else 8)
    assert there(tree, KEYS)["old"] == 8


def test_it_leaves_before_what_is_above_a_quota_or_foreseen(make_tree: Callable[[], Tree]) -> None:
    tree = make_tree()
    allow(tree, "one", 100, "s")
    turns(tree, (OLD, "s", 1), (NEW, "s", 2), (OTHER, "other", 1))
    for session in ("s", "other"):
        assert tree.store.waits.foresee(session, SOON, 0.0, "tool")
    assert tree.eviction.held("one") == 14
    assert evict(tree, 1) == 4
    assert there(tree, KEYS) == {"old": 4, "new": 10, "other": 8}
    assert tree.eviction.held("one") == 10
    tree.reset()
    assert (tree.eviction.held("one"), len(tree.eviction)) == (0, 0)


def test_a_flush_forgets_what_was_left(make_tree: Callable[[], Tree]) -> None:
    tree = make_tree()
    turns(tree, (OLD, "s", 1), (NEW, "s", 2))
    tree.reset()
    assert (tree.store.waits.foreseen, tree.eviction.superseded("s")) == (0, 0)
