"""What is worth least leaves the device first, in both of SGLang's own trees."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from radix_tree import PAGE_SIZE, PAGES, TREES, Tree, key_of

from agentstate.fleet.quotas import NOBODY, Quota
from agentstate.lookahead.forecast import Forecast
from engine_patch.sglang_api import EvictParams, MatchPrefixParams, RadixKey

SESSIONS = ("a", "b", "c", "d")
SOON, LATE = Forecast.exactly(5.0), Forecast.exactly(20_000.0)


pytestmark = pytest.mark.usefixtures("parallel")


@pytest.fixture(params=TREES)
def make_tree(request: pytest.FixtureRequest) -> Callable[..., Tree]:
    return lambda *arguments: Tree(request.param, *arguments)


def filled(tree: Tree, shared: int = 2) -> dict[str, RadixKey]:
    """Four sessions of eight pages, computed a second apart, with the first pages in common."""
    keys = {}
    for seed, session in enumerate(SESSIONS):
        keys[session] = key_of(8, seed, shared=shared)
        tree.compute(keys[session], session)
        tree.settle()
        tree.now_s += 1.0
    return keys


def there(tree: Tree, keys: dict[str, RadixKey]) -> dict[str, int]:
    """How many pages of each are on the device. Touches nothing."""
    return {name: tree.tree_core.match_full_device_prefix(key)[0] // PAGE_SIZE for name, key in keys.items()}


def evict(tree: Tree, pages: int) -> int:
    return int(tree.evict(EvictParams(num_tokens=pages * PAGE_SIZE)).num_tokens_evicted) // PAGE_SIZE


def test_who_is_back_late_goes_before_who_is_back_soon(make_tree: Callable[..., Tree]) -> None:
    tree = make_tree()
    keys = filled(tree)
    assert tree.store.waits.foresee("c", LATE, 0.0, "person")
    assert tree.store.waits.foresee("a", SOON, 0.0, "tool")
    assert evict(tree, 6) == 6
    assert there(tree, keys) == {"a": 8, "b": 8, "c": 2, "d": 8}
    # Of those without a forecast the one that was used least recently.
    assert evict(tree, 6) == 6
    assert there(tree, keys) == {"a": 8, "b": 2, "c": 2, "d": 8}


def test_an_eviction_of_who_is_waited_for_is_kept_once(make_tree: Callable[..., Tree]) -> None:
    tree = make_tree()
    filled(tree)
    for session in SESSIONS:
        assert tree.store.waits.foresee(session, LATE if session == "c" else SOON, 0.0, "tool")
    tree.store.waits.release("a")
    assert evict(tree, 12) == 12
    (made,) = tree.store.decisions.after(0)["decisions"]
    assert (made["session"], made["outcome"], made["tokens"]) == ("c", "waited_for", 6 * PAGE_SIZE)
    # The next one takes from another session.
    assert evict(tree, 6) == 6
    assert [made["session"] for made in tree.store.decisions.after(made["id"])["decisions"]] == ["b"]
    assert tree.eviction.taken() == {}


def test_where_nothing_is_foreseen_the_least_recently_used_go(make_tree: Callable[..., Tree]) -> None:
    tree = make_tree()
    keys = filled(tree)
    tree.match_prefix(MatchPrefixParams(key=keys["a"]))
    assert list(tree.eviction.rounds(100)) == []
    assert evict(tree, 12) == 12
    assert there(tree, keys) == {"a": 8, "b": 2, "c": 2, "d": 8}


def test_an_eviction_is_as_large_as_it_must_be_whatever_is_foreseen(make_tree: Callable[..., Tree]) -> None:
    tree = make_tree()
    keys = filled(tree)
    for session in SESSIONS:
        assert tree.store.waits.foresee(session, SOON, 0.0, "tool")
    assert evict(tree, PAGES) == 26
    assert there(tree, keys) == dict.fromkeys(SESSIONS, 0)
    assert (len(tree.eviction), tree.evictable_size()) == (0, 0)


def test_a_prefix_that_is_shared_stays_for_who_is_back_soon(make_tree: Callable[..., Tree]) -> None:
    tree = make_tree()
    keys = filled(tree, shared=6)
    for session in SESSIONS:
        assert tree.store.waits.foresee(session, SOON if session == "b" else LATE, 0.0, "tool")
    assert evict(tree, 6) == 6
    assert there(tree, keys) == {"a": 6, "b": 8, "c": 6, "d": 6}


def test_who_is_being_served_or_was_released(make_tree: Callable[..., Tree]) -> None:
    tree = make_tree()
    keys = filled(tree)
    waits = tree.store.waits
    assert waits.release("d")
    waits.over("a")
    # It is queued: neither what is foreseen of it, nor that it is released, means anything now.
    assert not waits.foresee("a", LATE, 0.0, "person")
    assert not waits.release("a")
    assert evict(tree, 6) == 6
    assert there(tree, keys) == {"a": 8, "b": 8, "c": 8, "d": 2}
    assert evict(tree, 12) == 12
    assert there(tree, keys) == {"a": 8, "b": 2, "c": 2, "d": 2}


def test_who_is_not_known_or_does_not_wait_has_no_forecast(make_tree: Callable[..., Tree]) -> None:
    tree = make_tree()
    filled(tree)
    waits = tree.store.waits
    assert not waits.foresee("nobody", LATE, 0.0, "person")
    assert not waits.foresee("a", LATE, float("nan"), "person")
    waits.over("b")
    assert not waits.foresee("b", LATE, 0.0, "person")
    assert waits.foreseen == 0
    assert waits.foresee("a", LATE, 0.5, "person")
    assert waits.foresee("a", None, 0.5, "person")
    assert waits.foreseen == 0


def test_a_tool_may_have_run_for_longer_than_its_session_has_waited(make_tree: Callable[..., Tree]) -> None:
    tree = make_tree()
    filled(tree)
    waits, minute = tree.store.waits, Forecast.exactly(60.0)
    assert waits.foresee("a", minute, 0.0, "tool")
    assert waits.foresee("b", minute, 50.0, "tool")
    assert waits.index("b") > 2 * waits.index("a")


def test_a_context_that_is_evicted_from_its_end_is_known_to_where_it_is_left(make_tree: Callable[..., Tree]) -> None:
    """A session's turns are nodes one after another; the last of them go, and what is before them has its worth."""
    tree = make_tree()
    first, second = key_of(8), key_of(12)
    other = key_of(8, 1)
    for key in (first, second):
        tree.compute(key, "a")
        tree.settle()
    tree.compute(other, "b")
    tree.settle()
    tree.now_s = 60.0
    assert tree.store.waits.foresee("a", LATE, 60.0, "person")
    assert evict(tree, 4) == 4
    assert tree.eviction.tokens("a") == len(first)
    assert tree.store.waits.foresee("a", Forecast.exactly(65.0), 60.0, "tool")
    assert evict(tree, 4) == 8
    assert there(tree, {"a": first, "b": other}) == {"a": 8, "b": 0}


def test_what_is_brought_back_is_known_to_be_there(make_tree: Callable[..., Tree]) -> None:
    tree = make_tree()
    keys = filled(tree)
    assert evict(tree, PAGES) == 26
    assert tree.eviction.tokens("a") == 0
    tree.compute(keys["a"], "nobody")
    tree._brought("a", keys["a"])
    assert tree.eviction.tokens("a") == len(keys["a"])
    # That it is back says nothing of its wait.
    assert tree.store.waits.foresee("a", SOON, 4.0, "tool")


def test_requests_without_a_session_are_ordered_with_the_others(make_tree: Callable[..., Tree]) -> None:
    tree = make_tree()
    nobody, early, late = key_of(8, 9), key_of(8, 1), key_of(8, 2)
    for key, session in ((early, "early"), (nobody, ""), (late, "late")):
        tree.compute(key, session)
        tree.settle()
        tree.now_s += 1.0
    assert tree.store.waits.foresee("early", SOON, 3.0, "tool")
    assert evict(tree, 8) == 8
    assert there(tree, {"early": early, "nobody": nobody, "late": late}) == {"early": 8, "nobody": 0, "late": 8}


def test_a_flush_forgets_what_is_on_the_device(make_tree: Callable[..., Tree]) -> None:
    tree = make_tree()
    filled(tree)
    tree.store.waits.foresee("a", SOON, 0.0, "tool")
    tree.reset()
    assert len(tree.eviction) == 0
    assert evict(tree, 1) == 0


def allow(tree: Tree, account: str, pages: int, *sessions: str) -> None:
    """The sessions are charged to an account that may have so many pages; a page is a byte."""
    for session in sessions:
        tree.store.accounts.note(session, account)
    limits = {name: Quota(device_bytes=limit) for name, limit in tree.store.accounts.limits("device").items()}
    tree.store.accounts.take({**limits, account: Quota(device_bytes=pages)})


def test_who_has_more_than_its_quota_gives_first_down_to_it(make_tree: Callable[..., Tree]) -> None:
    tree = make_tree()
    allow(tree, "large", 10, "b", "c", "d")
    keys = filled(tree)
    assert tree.eviction.held("large") == 18, "what was there before is charged to who brought it"
    # It has 18 pages, and gives 8. Of its contexts those go first that are worth least.
    assert evict(tree, 6) == 6
    assert there(tree, keys) == {"a": 8, "b": 2, "c": 8, "d": 8}
    assert tree.eviction.held("large") == 12
    assert evict(tree, 2) == 6, "a leaf goes as a whole"
    assert there(tree, keys) == {"a": 8, "b": 2, "c": 2, "d": 8}
    assert tree.eviction.held("large") == 6
    assert evict(tree, 6) == 6, "and from then on the order is everybody's"
    assert there(tree, keys) == {"a": 2, "b": 2, "c": 2, "d": 8}


def test_what_is_foreseen_orders_the_contexts_of_an_account_and_does_not_spare_it(
    make_tree: Callable[..., Tree],
) -> None:
    tree = make_tree()
    allow(tree, "large", 0, "c", "d")
    keys = filled(tree)
    for session, forecast in {"a": LATE, "b": LATE, "c": SOON, "d": LATE}.items():
        assert tree.store.waits.foresee(session, forecast, 0.0, "tool")
    assert tree.eviction.displaced(12 * PAGE_SIZE) == 0.0
    assert tree.eviction.displaced(13 * PAGE_SIZE) > 0.0
    assert evict(tree, 6) == 6
    assert there(tree, keys) == {"a": 8, "b": 8, "c": 8, "d": 2}
    assert evict(tree, 6) == 6
    assert there(tree, keys) == {"a": 8, "b": 8, "c": 2, "d": 2}


def test_a_quota_refuses_nobody_that_is_served(make_tree: Callable[..., Tree]) -> None:
    tree = make_tree()
    allow(tree, "large", 0, "a", "b")
    keys = filled(tree)
    for session in ("a", "b"):
        tree.store.waits.over(session)
    assert tree.eviction.giving() == []
    assert evict(tree, 6) == 6
    assert there(tree, keys) == {"a": 2, "b": 8, "c": 8, "d": 8}, "the order is everybody's"
    assert evict(tree, PAGES) == 20, "and a request that needs all of the room gets it"


def test_requests_that_prove_nothing_have_a_quota_together(make_tree: Callable[..., Tree]) -> None:
    tree = make_tree()
    allow(tree, NOBODY, 8)
    tree.store.accounts.note("a", "tenant a")
    keys = {"a": key_of(8, 1), "": key_of(8, 2), "nobody": key_of(8, 3)}
    for name, key in keys.items():
        tree.compute(key, name)
        tree.settle()
        tree.now_s += 1.0
    assert tree.eviction.held(NOBODY) == 16
    assert evict(tree, 1) == 8
    assert there(tree, keys) == {"a": 8, "": 0, "nobody": 8}


def test_what_contexts_share_is_charged_once(make_tree: Callable[..., Tree]) -> None:
    tree = make_tree()
    allow(tree, "one", 0, "a", "b", "c")
    long, branch = key_of(12), RadixKey(key_of(8).token_ids + key_of(4, 1).token_ids)
    charged = []
    for session, key in (("a", key_of(8)), ("b", key_of(8)), ("a", long), ("c", branch), ("b", long)):
        tree.compute(key, session)
        tree.settle()
        charged.append(tree.eviction.held("one"))
    assert charged == [8, 8, 12, 16, 16]
    assert evict(tree, PAGES) == 16
    assert tree.eviction.held("one") == 0
    tree.compute(long, "a")
    tree.reset()
    assert tree.eviction.held("one") == 0


def test_without_a_quota_nothing_is_asked_of_accounts(make_tree: Callable[..., Tree]) -> None:
    tree = make_tree()
    filled(tree)
    tree.store.accounts.take({"another": Quota(device_bytes=0, host_bytes=0), "tenant a": Quota(sessions=3)})
    assert tree.eviction.giving() == []
    assert list(tree.eviction.rounds(100)) == []


@pytest.fixture
def on_two_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """What two ranks, which meet in all that they agree on, make of a tree, each with arguments of its own."""
    meeting, slots = threading.Barrier(2), {}
    ranks = threading.local()

    def least(said: torch.Tensor) -> None:
        slots[ranks.number] = said.clone()
        meeting.wait(60)
        said.copy_(torch.minimum(slots[0], slots[1]))
        meeting.wait(60)

    monkeypatch.setattr(
        "engine_patch.ranks.get_parallel", lambda: SimpleNamespace(attn_tp_size=2, attn_tp_rank=ranks.number)
    )

    def run(backend: str, make: Callable[..., Any], *arguments: Any) -> list[Any]:
        def of_rank(number: int) -> Any:
            ranks.number = number
            return make(Tree(backend, least), arguments[number])

        with ThreadPoolExecutor(2) as pool:
            return [found.result(120) for found in [pool.submit(of_rank, number) for number in range(2)]]

    return run


@pytest.mark.parametrize("backend", TREES)
def test_ranks_evict_what_the_first_of_them_would(backend: str, on_two_ranks: Callable[..., list[Any]]) -> None:
    """Only the second rank has heard of a forecast, or has heard of another one: both do as the first one says."""

    def run(tree: Tree, foreseen: list[dict[str, Any]]) -> list[dict[str, int]]:
        keys = filled(tree)
        found = []
        for forecasts in foreseen:
            for session, forecast in forecasts.items():
                tree.store.waits.foresee(session, forecast, 3.0, "tool")
            assert evict(tree, 6) == 6
            found.append(there(tree, keys))
        return found

    of_first, of_second = on_two_ranks(backend, run, [{}, {"b": SOON}], [{"a": SOON}, {"c": SOON}])
    assert of_first == of_second
    assert of_first == [{"a": 2, "b": 8, "c": 8, "d": 8}, {"a": 2, "b": 8, "c": 2, "d": 8}]


@pytest.mark.parametrize("backend", TREES)
def test_the_quotas_that_the_first_rank_knows_hold_on_all(backend: str, on_two_ranks: Callable[..., list[Any]]) -> None:
    def run(tree: Tree, above: list[str]) -> list[dict[str, int]]:
        for session in above:
            allow(tree, session, 0, session)
        keys = filled(tree)
        found = []
        for _ in range(2):
            assert evict(tree, 6) == 6
            found.append(there(tree, keys))
        return found

    of_first, of_second = on_two_ranks(backend, run, ["d"], ["b", "c"])
    assert of_first == of_second
    assert of_first == [{"a": 8, "b": 8, "c": 8, "d": 2}, {"a": 2, "b": 8, "c": 8, "d": 2}]
