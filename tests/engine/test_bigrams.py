"""Keys of pairs of tokens, which SGLang's tree has where the KV of a draft model depends on the token that follows."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from radix_tree import PAGE_SIZE, PAGES, TREES, Tree
from tree import scheduler
from turns import turn

from engine_patch import sglang_api as sgl
from engine_patch.preloads import Preload
from engine_patch.radix_cache import AgentStateRadixCache, stored_hit
from engine_patch.sessions import Progress, _goes_on
from engine_patch.sglang_api import EvictParams, MatchPrefixParams, PoolName, RadixKey, get_storage_hash_str

pytestmark = pytest.mark.usefixtures("parallel")

TOKENS = array("q", range(100, 100 + 8 * PAGE_SIZE))


def pages_of(key: RadixKey) -> list[str]:
    return list(get_storage_hash_str(key, page_size=PAGE_SIZE))


def of_pages(pages: int, tokens: array[int] = TOKENS) -> RadixKey:
    return RadixKey(tokens[: pages * PAGE_SIZE + 1], is_bigram=True)


def request(tokens: array[int] = TOKENS, **fields: Any) -> Any:
    return SimpleNamespace(
        full_untruncated_fill_ids=tokens,
        origin_input_ids=tokens,
        output_ids=array("q"),
        rid="r",
        extra_key=None,
        cache_salt=None,
        **fields,
    )


def another_last(tokens: array[int]) -> array[int]:
    return array("q", [*tokens[:-1], 7])


@pytest.mark.parametrize("backend", TREES)
def test_a_page_of_pairs_is_offered_under_the_key_that_finds_it(backend: str) -> None:
    tree = Tree(backend, is_eagle=True)
    tree.compute(of_pages(3))
    tree.settle()
    assert tree.store.stores == set(pages_of(of_pages(3)))
    # SGLang asks with tokens.
    assert tree.match_prefix(MatchPrefixParams(key=RadixKey(TOKENS))).device_prefix_len == 3 * PAGE_SIZE
    # The pair at a page's end has the token after it.
    other = another_last(TOKENS[: 3 * PAGE_SIZE + 1])
    assert tree.match_prefix(MatchPrefixParams(key=RadixKey(other))).device_prefix_len == 2 * PAGE_SIZE
    assert pages_of(of_pages(3, other))[:2] == pages_of(of_pages(2))


@pytest.mark.parametrize("bigrams", [False, True])
def test_what_can_be_restored_is_keyed_like_the_tree(bigrams: bool) -> None:
    cache: Any = SimpleNamespace(page_size=PAGE_SIZE, tree_core=SimpleNamespace(is_eagle=bigrams))
    whole = RadixKey(TOKENS[: 5 * PAGE_SIZE + bigrams], is_bigram=bigrams)
    found = SimpleNamespace(device_hit_len=2 * PAGE_SIZE, tail_hashes=pages_of(whole)[2:])
    hit = stored_hit(request(), found, cache)
    assert (len(hit.key), len(hit.key.raw_token_ids())) == (5 * PAGE_SIZE, 5 * PAGE_SIZE + bigrams)
    assert pages_of(hit.key)[2:] == [page.hex() for page in hit.keys]


@pytest.mark.parametrize("bigrams", [False, True])
def test_a_manifest_lists_the_pages_that_the_tree_has(bigrams: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[RadixKey] = []
    monkeypatch.setattr(sgl.UnifiedRadixCache, "checkpoint_into_tree", lambda tree, req, up_to: None)
    tree: Any = AgentStateRadixCache.__new__(AgentStateRadixCache)
    proven = turn("s")
    tree.agentstate = SimpleNamespace(
        turn=lambda session: proven,
        request_finished=lambda turn, key: told.append(key),
        inserting=lambda rid: None,
        foresees=False,
    )
    nothing = SimpleNamespace(finished=lambda *args: None, ended=lambda *args: None, remember=lambda *args: None)
    tree.linker = SimpleNamespace(entering={}, lost_pages=nothing)
    tree.demotions = tree.device_tier = tree.eviction = nothing
    tree.tree_core, tree.disable = SimpleNamespace(is_eagle=bigrams), False
    kv = SimpleNamespace(cache_inserted_len=3 * PAGE_SIZE)
    more = {"kv": kv, "finished": lambda: True, "session_id": "s", "last_node": 1, "kv_hints": None}
    tree.checkpoint_into_tree(request(**more), up_to=4)
    right = of_pages(3) if bigrams else RadixKey(TOKENS[: 3 * PAGE_SIZE])
    assert [pages_of(key) for key in told] == [pages_of(right)]


def test_a_preload_of_pairs_is_for_who_has_all_of_their_tokens() -> None:
    empty = torch.empty(0)
    for tokens, brings in (
        (TOKENS, True),
        (TOKENS[: 3 * PAGE_SIZE + 1], True),
        (TOKENS[: 3 * PAGE_SIZE], False),
        (another_last(TOKENS[: 3 * PAGE_SIZE + 1]), False),
    ):
        preload = Preload(of_pages(3), [], None, empty, empty, None, None, 0.0, True)
        assert preload.brings(request(tokens)) is brings
    # An answer counts as well.
    preload = Preload(of_pages(3), [], None, empty, empty, None, None, 0.0, True)
    begun = request(TOKENS[: 3 * PAGE_SIZE])
    begun.output_ids = TOKENS[3 * PAGE_SIZE :]
    assert preload.brings(begun)


def test_a_session_goes_on_from_pairs_that_its_next_request_has() -> None:
    assert _goes_on(of_pages(2), of_pages(3))
    other = another_last(TOKENS[: 2 * PAGE_SIZE + 1])
    assert not _goes_on(of_pages(2, other), of_pages(3))


@pytest.mark.parametrize("backend", TREES)
def test_a_session_of_pairs_is_copied_to_host_memory_and_brought_back(backend: str) -> None:
    """The draft's pages follow the target's."""
    tree, idle = Tree(backend, is_eagle=True), scheduler()
    key = of_pages(6)
    tree.compute(key)
    tree.settle()
    tree.device_tier.remember("s", key)
    tree.store.demotes = True
    assert tree.demotions.demote(("s", None, None), key, "s") == 6 * PAGE_SIZE
    ((copied, _, _),) = tree.store.demoted
    assert copied == pages_of(key)
    tree.store.copied = 1
    tree.demotions.land()
    tree.evict(EvictParams(num_tokens=PAGES * PAGE_SIZE))
    # Of what is asked for the last pair has the token after it.
    keys = [bytes.fromhex(page) for page in pages_of(key)[:5]]
    progress = tree.device_tier.prefetch("s", keys)
    assert progress is not None
    tree.device_tier.run(idle)
    (preload,) = tree.preloads
    other = request(another_last(TOKENS[: 5 * PAGE_SIZE + 1]))
    other.rid = "other"
    assert preload.brings(request()) and not preload.brings(other)
    ((loaded, slots),) = tree.store.loads
    assert loaded == keys and len(slots[PoolName.KV]) == 5 * PAGE_SIZE
    tree.store.landed_batches = 1
    tree.preloads.land()
    tree.device_tier.land()
    tree.settle()
    assert progress() is Progress.DONE
    assert tree.match_prefix(MatchPrefixParams(key=RadixKey(TOKENS))).device_prefix_len == 5 * PAGE_SIZE
    assert tree.protected_size() == 0 and not any(tree.kept().values())
    free = tree.token_to_kv_pool_allocator.available_size()
    assert free + tree.evictable_size() == PAGES * PAGE_SIZE
