"""What is about to leave the device is copied first, with both of SGLang's own trees."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from radix_tree import PAGE_SIZE, PAGES, TREES, Tree, key_of

from agentstate.fleet.quotas import Quota
from agentstate.lookahead.forecast import Forecast
from engine_patch import demotions
from engine_patch.demotions import chain_of, together
from engine_patch.sglang_api import EvictParams, MatchPrefixParams, PoolName, PoolTransfer, RadixKey
from engine_patch.sglang_api import get_storage_hash_str as hashes
from engine_patch.turns import RequestSession

Make = Callable[..., Tree]


pytestmark = pytest.mark.usefixtures("parallel")


@pytest.fixture(params=TREES)
def make_tree(request: pytest.FixtureRequest) -> Make:
    def make(*arguments: object) -> Tree:
        tree = Tree(request.param, *arguments)  # type: ignore[arg-type]
        tree.store.demotes = True
        return tree

    return make


def run(tree: Tree, key: RadixKey, session: str) -> None:
    """A request of the session needs the device for ``key``, and ends."""
    missing = len(key) - tree.match_prefix(MatchPrefixParams(key=key)).device_prefix_len
    free = tree.token_to_kv_pool_allocator.available_size()
    if free < missing:
        tree.evict(EvictParams(num_tokens=missing - free))
    tree.demotions.goes_on(name(session))
    tree.compute(key, session)
    tree.settle()
    tree.demotions.ended(name(session), key, session)


def name(session: str) -> demotions.Chain:
    return session, None, None


def step(tree: Tree) -> None:
    tree.store.copied = len(tree.demotions)
    tree.demotions.land()
    tree.demotions.keep_ahead()


def sessions(tree: Tree) -> list[str | None]:
    return [session for *_, session in tree.store.demoted]


def pages_of(key: RadixKey) -> list[str]:
    return list(hashes(key, page_size=PAGE_SIZE))


def test_a_chain_is_locked_until_it_is_copied(make_tree: Make) -> None:
    tree, key = make_tree(), key_of(6)
    run(tree, key, "a")
    slots = tree.tree_core.collect_full_device_indices(
        tree.match_prefix(MatchPrefixParams(key=key)).last_device_node, tree.root_node_handle()
    )
    tokens = tree.demotions.demote(name("a"), key, "a")
    assert tokens == len(key) and tree.store.demoted == [(pages_of(key), slots.tolist(), "a")]
    assert tree.protected_size() == len(key) and tree.kept()["locked_demotions"] == 1
    tree.demotions.land()
    assert tree.protected_size() == len(key), "the copy is not over"
    tree.store.copied = 1
    tree.linker.unlocked = False
    tree.demotions.land()
    assert tree.protected_size() == 0 and len(tree.demotions) == 0 and tree.linker.unlocked


def test_a_chain_of_several_nodes_is_one_copy_without_what_others_share(make_tree: Make) -> None:
    tree, first, longer, other = make_tree(), key_of(6, shared=2), key_of(9, shared=2), key_of(5, seed=1, shared=2)
    for key, session in ((first, "a"), (longer, "a"), (other, "b")):
        run(tree, key, session)
    assert tree.demotions.demote(name("a"), longer, "a") == 7 * PAGE_SIZE
    assert [keys for keys, *_ in tree.store.demoted] == [pages_of(longer)[2:]]
    assert tree.demotions.demote(name("c"), key_of(2, shared=2)) == 0, "others go on from it"
    assert tree.demotions.demote(name("c"), key_of(3, seed=7)) == 0, "it is not there"
    # What is locked is the whole chain.
    assert tree.protected_size() == len(longer)


@pytest.mark.parametrize("copied", [True, False])
def test_a_demotion_and_its_outcome_are_kept(make_tree: Make, copied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = make_tree()
    monkeypatch.setattr(tree.store, "pop_demoted", lambda: copied)
    run(tree, key_of(6), "a")
    tree.demotions.demote(name("a"), key_of(6), "a")
    step(tree)
    made = tree.store.decisions.of("a", 9)
    assert [(one["decision"], one["outcome"], one["tokens"]) for one in made] == [
        ("demote", "begun", 6 * PAGE_SIZE),
        ("demote", "copied" if copied else "failed", 6 * PAGE_SIZE),
    ]


def test_without_a_host_tier_nothing_is_locked(make_tree: Make) -> None:
    tree = make_tree()
    run(tree, key_of(6), "a")
    tree.store.demotes = False
    assert tree.demotions.demote(name("a"), key_of(6)) == 0
    tree.store.demotes, tree.store.refuses = True, True
    assert tree.demotions.demote(name("a"), key_of(6)) == 0
    assert tree.protected_size() == 0 and len(tree.demotions) == 0


def test_a_look_at_a_chain_does_not_make_it_the_newest(make_tree: Make) -> None:
    tree = make_tree()
    run(tree, key_of(20, seed=1), "a")
    run(tree, key_of(20, seed=2), "b")
    tree.demotions.demote(name("a"), key_of(20, seed=1))
    step(tree)
    tree.evict(EvictParams(num_tokens=20 * PAGE_SIZE))
    there = [tree.match_prefix(MatchPrefixParams(key=key_of(20, seed=seed))).device_prefix_len for seed in (1, 2)]
    assert there == [0, 20 * PAGE_SIZE]


def test_a_quarter_of_the_device_is_free_or_copied_the_oldest_first(make_tree: Make) -> None:
    """Of 64 pages: 16."""
    tree = make_tree()
    for session, seed in (("a", 1), ("b", 2), ("c", 3), ("d", 4)):
        run(tree, key_of(10, seed=seed), session)
        step(tree)
    assert sessions(tree) == [], "24 are free"
    run(tree, key_of(10, seed=5), "e")
    step(tree)
    step(tree)
    assert sessions(tree) == ["a"], "14 are free, and 10 copied"
    run(tree, key_of(12, seed=6), "f")
    for _ in range(3):
        step(tree)
    assert sessions(tree) == ["a", "b"], "2 and 20"
    run(tree, key_of(12, seed=7), "g")
    for _ in range(3):
        step(tree)
    assert sessions(tree) == ["a", "b", "c"], "a has been evicted, and 2 more"
    # One that goes on is not evicted next.
    run(tree, key_of(11, seed=3), "c")
    for _ in range(3):
        step(tree)
    assert sessions(tree)[3] == "d"
    assert tree.protected_size() == 0


def test_one_chain_is_copied_at_a_time(make_tree: Make) -> None:
    tree = make_tree()
    for session, seed in (("a", 1), ("b", 2), ("c", 3)):
        run(tree, key_of(20, seed=seed), session)
    tree.demotions.keep_ahead()
    tree.demotions.keep_ahead()
    assert sessions(tree) == ["a"] and tree.protected_size() == 20 * PAGE_SIZE


def test_who_would_drive_out_what_is_not_copied_waits_for_the_copy(make_tree: Make) -> None:
    tree = make_tree()
    for session, seed in (("a", 1), ("b", 2), ("c", 3)):
        run(tree, key_of(20, seed=seed), session)
    assert not tree.demotions.holds_up(4 * PAGE_SIZE), "4 are free"
    assert tree.demotions.holds_up(30 * PAGE_SIZE)
    tree.demotions.keep_ahead()
    assert tree.demotions.holds_up(30 * PAGE_SIZE) and sessions(tree) == ["a"]
    step(tree)
    assert sessions(tree) == ["a", "b"], "more than a quarter, because it is waited for"
    assert tree.demotions.holds_up(30 * PAGE_SIZE) and not tree.demotions.holds_up(24 * PAGE_SIZE)
    step(tree)
    assert not tree.demotions.holds_up(30 * PAGE_SIZE)
    step(tree)
    assert sessions(tree) == ["a", "b"], "nobody waits for more"
    for _ in range(2):
        assert tree.demotions.holds_up(65 * PAGE_SIZE)
        step(tree)
    assert not tree.demotions.holds_up(65 * PAGE_SIZE), "there is nothing to copy any more"


def test_what_is_not_stored_yet_is_copied_later_and_waited_for_then(make_tree: Make) -> None:
    tree = make_tree()
    tree.compute(key_of(50, seed=1), "a")
    tree.demotions.ended(name("a"), key_of(50, seed=1), "a")
    assert tree.demotions.holds_up(20 * PAGE_SIZE)
    tree.demotions.keep_ahead()
    assert sessions(tree) == [] and not tree.demotions.holds_up(20 * PAGE_SIZE), "a drive may take any time"
    tree.settle()
    assert tree.demotions.holds_up(20 * PAGE_SIZE)
    tree.demotions.keep_ahead()
    assert sessions(tree) == ["a"]


def test_nobody_waits_where_nothing_is_copied(make_tree: Make) -> None:
    tree = make_tree()
    run(tree, key_of(60), "a")
    tree.store.demotes = False
    assert not tree.demotions.holds_up(20 * PAGE_SIZE)


@pytest.mark.parametrize(
    ("ranks", "number", "copied"), [(1, 0, "c"), (2, 0, "c"), (2, 1, "b")], ids=["alone", "the first", "another"]
)
def test_what_is_worth_least_to_the_first_rank_is_copied_first(
    make_tree: Make, parallel: SimpleNamespace, ranks: int, number: int, copied: str
) -> None:
    parallel.attn_tp_size, parallel.attn_tp_rank = ranks, number

    def least(said: torch.Tensor) -> None:
        """The first rank, if it is another one, says that the second chain is to go."""
        said.clamp_(max=1 if number else None, min=0)

    tree = make_tree(least)
    for session, seed in (("a", 1), ("b", 2), ("c", 3)):
        run(tree, key_of(20, seed=seed), session)
    assert tree.store.waits.foresee("c", Forecast.exactly(50_000.0), 0.0, "person")
    tree.demotions.keep_ahead()
    assert sessions(tree) == [copied]


def test_who_has_more_than_its_quota_is_copied_first(make_tree: Make) -> None:
    tree = make_tree()
    tree.store.accounts.note("b", "large")
    for session, seed in (("a", 1), ("b", 2), ("c", 3)):
        run(tree, key_of(20, seed=seed), session)
    tree.store.accounts.take({"large": Quota(device_bytes=10)})
    tree.demotions.keep_ahead()
    assert sessions(tree) == ["b"]


def test_a_chain_that_goes_on_while_it_is_copied_is_not_evicted_next(make_tree: Make) -> None:
    tree = make_tree()
    for session, seed in (("a", 1), ("b", 2), ("c", 3)):
        run(tree, key_of(20, seed=seed), session)
    tree.demotions.keep_ahead()
    run(tree, key_of(20, seed=1), "a")
    step(tree)
    assert sessions(tree) == ["a", "b"]


def test_what_was_evicted_long_ago_is_passed_over(make_tree: Make) -> None:
    tree = make_tree()
    run(tree, key_of(10, seed=1), "a")
    run(tree, key_of(50, seed=2), "b")
    tree.evict(EvictParams(num_tokens=10 * PAGE_SIZE))
    run(tree, key_of(10, seed=3), "c")
    tree.demotions.keep_ahead()
    assert sessions(tree) == ["b"]


def test_a_rank_whose_copies_are_slower_holds_up_all(make_tree: Make, parallel: SimpleNamespace) -> None:
    parallel.attn_tp_size = 2
    others = [False]

    def agree(said: torch.Tensor) -> None:
        said &= torch.tensor([others[0]] * len(said), dtype=said.dtype)

    tree = make_tree(agree)
    others[0] = True
    run(tree, key_of(6), "a")
    tree.demotions.demote(name("a"), key_of(6))
    others[0] = False
    tree.store.copied = 1
    tree.demotions.land()
    assert tree.protected_size() == 6 * PAGE_SIZE and tree.store.copied == 1
    others[0] = True
    tree.demotions.land()
    assert tree.protected_size() == 0 and tree.store.copied == 0


def test_ranks_do_not_ask_each_other_while_nothing_is_copied(make_tree: Make) -> None:
    asked: list[Sequence[int]] = []
    tree = make_tree(lambda said: asked.append(said.tolist()))
    run(tree, key_of(6), "a")
    asked.clear()
    tree.demotions.land()
    assert asked == []


def test_a_flush_forgets_everything(make_tree: Make) -> None:
    tree = make_tree()
    for session, seed in (("a", 1), ("b", 2), ("c", 3)):
        run(tree, key_of(20, seed=seed), session)
    tree.demotions.keep_ahead()
    tree.reset()
    tree.token_to_kv_pool_allocator.clear()
    assert len(tree.demotions) == 0
    run(tree, key_of(PAGES, seed=4), "d")
    tree.store.demoted.clear()
    step(tree)
    assert sessions(tree) == ["d"]


def test_as_many_chains_are_remembered_as_there_is_memory_for(make_tree: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = make_tree()
    monkeypatch.setattr(demotions, "_REMEMBERED_TOKENS", 10 * PAGE_SIZE)
    for session in "abc":
        tree.demotions.ended(name(session), key_of(4))
    tree.demotions.ended(name("b"), key_of(5))
    assert [chain for chain, *_ in tree.demotions._ended] == ["c", "b"]
    tree.demotions.ended(name("long"), key_of(50))
    assert [chain for chain, *_ in tree.demotions._ended] == ["long"]
    assert tree.demotions._tokens == 50 * PAGE_SIZE


def test_nobody_elses_request_is_taken_for_a_sessions_own() -> None:
    """A session has another token every turn, and another tenant another salt."""

    def chain(token: str, **namespace: str) -> demotions.Chain:
        session = RequestSession("s")
        session.token = token
        return chain_of(
            SimpleNamespace(**{"session_id": session, "extra_key": None, "cache_salt": "acme", **namespace})
        )

    assert chain("one") == chain("another")
    assert len({chain("one"), chain("one", cache_salt="other"), chain("one", extra_key="lora")}) == 3


def test_the_nodes_of_a_chain_are_one_transfer_a_pool() -> None:
    def transfer(name: PoolName, keys: str, slots: list[int]) -> PoolTransfer:
        return PoolTransfer(name=name, keys=list(keys), device_indices=torch.tensor(slots))

    nodes = [
        [transfer(PoolName.KV, "ab", [4, 5, 2, 3]), transfer(PoolName.MAMBA, "b", [9])],
        [transfer(PoolName.KV, "c", [7, 8]), transfer(PoolName.SWA, "c", [1, 2]), transfer(PoolName.MAMBA, "c", [4])],
    ]
    found = {one.name: (one.keys, one.device_indices.tolist()) for one in together(nodes)}
    assert found == {
        PoolName.KV: (["a", "b", "c"], [4, 5, 2, 3, 7, 8]),
        PoolName.MAMBA: (["b", "c"], [9, 4]),
        PoolName.SWA: (["c"], [1, 2]),
    }


def test_a_chain_is_read_with_whole_pages(make_tree: Make) -> None:
    tree, key = make_tree(), key_of(6)
    run(tree, key, "a")
    longer = RadixKey(array("q", [*key.raw_token_ids(), 1, 2]))
    assert tree.demotions.demote(name("a"), longer) == len(key)
