"""Pages that the store has lost while they are on the device are stored again, with both of SGLang's own trees."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from radix_tree import PAGE_SIZE, TREES, Tree, key_of
from turns import turn

from agentstate.fleet.turns import Turn
from engine_patch import lost_pages
from engine_patch import sglang_api as sgl
from engine_patch.radix_cache import AgentStateRadixCache
from engine_patch.sglang_api import MatchPrefixParams, get_storage_hash_str

pytestmark = pytest.mark.usefixtures("parallel")


@pytest.fixture(params=TREES)
def make_tree(request: pytest.FixtureRequest) -> Callable[..., Tree]:
    return lambda *arguments: Tree(request.param, *arguments)


def pages_of(key: object) -> list[str]:
    return list(get_storage_hash_str(key, page_size=PAGE_SIZE))


def test_what_was_evicted_from_disk_is_stored_again_at_the_sessions_next_turn(make_tree: Callable[..., Tree]) -> None:
    tree, first, longer = make_tree(), key_of(6), key_of(8)
    tree.compute(first)
    tree.settle()
    tree.store.lose(*pages_of(first))
    tree.compute(longer)
    offered = [page for offer in tree.store.offers for page in offer]
    assert sorted(offered) == sorted(pages_of(longer))
    assert tree.protected_size() == len(longer)
    tree.settle()
    assert tree.store.stores >= set(pages_of(longer))
    assert (tree.protected_size(), tree.linker.pending_offloads) == (0, [])
    tree.compute(longer)
    assert tree.store.offers == []


def test_a_damaged_page_in_the_middle_is_stored_again(make_tree: Callable[..., Tree]) -> None:
    tree = make_tree()
    tree.compute(key_of(4, shared=4))
    tree.compute(key_of(8, shared=4))
    tree.settle()
    tree.store.lose(pages_of(key_of(8, shared=4))[2])
    tree.compute(key_of(8, shared=4))
    # The node of the tree that has it, and no other.
    assert tree.store.offers == [pages_of(key_of(4, shared=4))]


def test_every_session_that_has_lost_pages_stores_them_again(make_tree: Callable[..., Tree]) -> None:
    tree, one, other = make_tree(), key_of(4, seed=1), key_of(4, seed=2)
    tree.compute(one, "one")
    tree.compute(other, "other")
    tree.settle()
    tree.store.lose(*pages_of(one), *pages_of(other))
    tree.compute(one, "one")
    tree.settle()
    tree.compute(other, "other")
    assert tree.store.offers == [pages_of(other)]


def test_nothing_is_looked_at_before_anything_is_lost_and_once_a_loss_then(
    make_tree: Callable[..., Tree], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, looked = make_tree(), []
    monkeypatch.setattr(tree.store, "stored", lambda transfers: looked.append(transfers) or True)
    tree.compute(key_of(4))
    tree.settle()
    assert looked == []
    tree.store.lose("of another session")
    tree.compute(key_of(4))
    tree.compute(key_of(4))
    assert len(looked) == 1
    monkeypatch.setattr(lost_pages, "_MOST_SESSIONS", 1)
    tree.compute(key_of(4, seed=1), "another")
    tree.settle()
    tree.compute(key_of(4))
    assert len(tree.linker.lost_pages._looked_at) == 1


def test_what_is_on_its_way_is_not_offered_twice(make_tree: Callable[..., Tree]) -> None:
    tree = make_tree()
    tree.store.lose("something")
    tree.compute(key_of(4))
    assert tree.store.offers == [pages_of(key_of(4))]
    tree.store.lose("something")
    tree.compute(key_of(4))
    assert len(tree.store.offers) == 1
    tree.settle()
    tree.store.lose(*pages_of(key_of(4)))
    tree.compute(key_of(4))
    tree.store.lose("something")
    tree.compute(key_of(4))
    assert len(tree.store.offers) == 1


def test_what_is_refused_is_unlocked_and_nothing_after_it_is_offered(make_tree: Callable[..., Tree]) -> None:
    tree = make_tree()
    tree.compute(key_of(4, shared=4))
    tree.compute(key_of(8, shared=4))
    tree.settle()
    tree.store.lose(*pages_of(key_of(8, shared=4)))
    tree.store.refuses = True
    tree.compute(key_of(8, shared=4))
    assert (tree.store.offers, tree.protected_size(), tree.linker.pending_offloads) == ([], 0, [])
    tree.store.refuses = False
    tree.compute(key_of(8, shared=4))
    assert sum(len(offer) for offer in tree.store.offers) == 8


def test_what_could_not_be_stored_again_is_offered_once_more(make_tree: Callable[..., Tree]) -> None:
    tree = make_tree()
    tree.compute(key_of(4))
    tree.settle()
    tree.store.lose(*pages_of(key_of(4)))
    tree.compute(key_of(4))
    tree.settle(stored=False)
    assert tree.protected_size() == 0
    tree.compute(key_of(4))
    assert tree.store.offers == [pages_of(key_of(4))]


def test_a_node_that_is_split_while_it_is_offered_twice_is_marked_as_stored(make_tree: Callable[..., Tree]) -> None:
    """The tree's own offer and ours lock the same node, which a fork then splits. Only the tree's has nodes to mark."""
    tree = make_tree()
    tree.compute(key_of(8, shared=4))
    tree.settle()
    tree.store.lose(*pages_of(key_of(8, shared=4)))
    tree.compute(key_of(8, shared=4))
    tree.compute(key_of(8, seed=1, shared=4), "a fork")
    tree.settle()
    assert tree.protected_size() == 0
    for seed in (0, 1):
        assert tree.store.stores >= set(pages_of(key_of(8, seed=seed, shared=4)))
    tree.compute(key_of(8, shared=4), "again")
    assert tree.store.offers == []


def test_a_split_goes_to_the_offer_that_has_nodes_to_mark(make_tree: Callable[..., Tree]) -> None:
    tree, key = make_tree(), key_of(8, shared=4)
    tree.compute(key)
    node = tree.match_prefix(MatchPrefixParams(key=key)).last_device_node
    # Ours first, as if the tree had offered the node again after it.
    (own,) = tree.linker.pending_offloads
    lock = tree.inc_lock_ref(node).to_dec_params()
    tree.linker.pending_offloads.insert(0, own._replace(lock_params=lock, publish_node_ids=[]))
    tree.store.offers.append([])
    tree.compute(key_of(8, seed=1, shared=4), "a fork")
    tree.settle()
    assert (tree.protected_size(), tree.linker.pending_offloads) == (0, [])


def test_a_flush_ends_what_is_on_offer(make_tree: Callable[..., Tree]) -> None:
    tree = make_tree()
    tree.compute(key_of(4))
    tree.settle()
    tree.store.lose(*pages_of(key_of(4)))
    tree.compute(key_of(4))
    assert tree.protected_size() == 4 * PAGE_SIZE
    tree.reset()
    assert (tree.protected_size(), tree.linker.pending_offloads) == (0, [])
    assert tree.linker.kept() == make_tree().linker.kept()


def test_ranks_offer_alike_what_one_of_them_has_lost(make_tree: Callable[..., Tree], parallel: SimpleNamespace) -> None:
    """A rank that has lost nothing hears of the other one's loss with the next results, and offers with it."""
    parallel.attn_tp_size = 2
    other: list[list[int]] = []

    def agree(said: torch.Tensor) -> None:
        if other:
            said.copy_(torch.minimum(said, torch.tensor(other.pop(0), dtype=said.dtype)))

    tree = make_tree(agree)
    tree.compute(key_of(4))
    tree.settle()
    tree.compute(key_of(4, seed=1), "another")
    # What the other rank says: a result is in, it is good, but pages have been lost for it.
    other[:] = [[1], [1, 0]]
    tree.settle()
    other[:] = [[0]]
    tree.compute(key_of(4))
    assert other == []
    assert tree.store.offers == [pages_of(key_of(4))]
    tree.settle()
    assert tree.protected_size() == 0


def test_a_rank_tells_the_others_what_it_has_lost(make_tree: Callable[..., Tree], parallel: SimpleNamespace) -> None:
    parallel.attn_tp_size = 2
    said: list[list[int]] = []
    tree = make_tree(lambda tensor: said.append(tensor.tolist()))
    tree.compute(key_of(4))
    tree.settle()
    tree.store.lose(*pages_of(key_of(4))[2:])
    tree.compute(key_of(4))
    assert tree.store.offers == []  # the others do not know yet
    tree.compute(key_of(4, seed=1), "another")
    said.clear()
    tree.settle()
    assert said == [[1], [1, 0]]
    tree.compute(key_of(4))
    assert said[2:] == [[0]]
    assert tree.store.offers == [pages_of(key_of(4))]


def test_what_was_lost_is_offered_before_the_manifest_that_lists_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, str, int]] = []
    proven: Turn | None = turn("ses")

    def telling(what: str) -> Any:
        return lambda session, key, *proven: told.append((what, getattr(session, "session_id", session), len(key)))

    monkeypatch.setattr(sgl.UnifiedRadixCache, "checkpoint_into_tree", lambda tree, req, up_to: None)
    tree = AgentStateRadixCache.__new__(AgentStateRadixCache)
    tree.disable = False
    entering = {"r": "what it has restored", "other": "what another one has"}
    tree.linker = SimpleNamespace(lost_pages=SimpleNamespace(finished=telling("offered")), entering=entering)
    tree.device_tier = SimpleNamespace(remember=telling("remembered"))
    tree.eviction = SimpleNamespace(ended=lambda owner, node, epoch: owner)
    tree.demotions = SimpleNamespace(ended=lambda *of_the_chain: None)
    tree.tree_core = SimpleNamespace(is_eagle=False)
    tree.agentstate = SimpleNamespace(
        turn=lambda session: proven, request_finished=telling("manifest"), inserting=lambda rid: None
    )
    fields = {
        "full_untruncated_fill_ids": [1, 2, 3, 4],
        "kv": SimpleNamespace(cache_inserted_len=3),
        "last_node": 7,
        "rid": "r",
        "kv_hints": None,
    }
    request = SimpleNamespace(session_id="ses", extra_key=None, cache_salt=None, finished=lambda: True, **fields)
    tree.checkpoint_into_tree(request, up_to=4)
    assert list(entering) == ["other"], "it is in the tree now"
    assert told == [("offered", "ses", 3), ("remembered", "ses", 3), ("manifest", "ses", 3)]
    told.clear()
    for more in ({"finished": lambda: False}, {"session_id": None}):
        tree.checkpoint_into_tree(SimpleNamespace(**{**vars(request), **more}), up_to=4)
    assert told == []
    # Who does not prove the turn has the pages stored and says nothing of the session.
    proven = None
    tree.checkpoint_into_tree(request, up_to=4)
    assert told == [("offered", "ses", 3)]
