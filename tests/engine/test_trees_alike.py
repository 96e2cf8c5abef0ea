"""Ranks whose trees change alike, whatever each of them is asked for, foresees and fails to read."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from radix_tree import PAGE_SIZE, TREES, Tree, WindowTree, key_of
from tree import pages_of, scheduler

from agentstate.lookahead.forecast import Forecast
from engine_patch import device_tier
from engine_patch.sglang_api import EvictParams, RadixKey

RANKS, STEPS = 2, 80
KEYS = {str(number): key_of(4 + 3 * number, number % 3, shared=2) for number in range(6)}


class Meeting:
    """Where the ranks agree, each on a thread of its own, which is how they are told apart."""

    def __init__(self) -> None:
        self._all = threading.Barrier(RANKS, timeout=120)
        self._said = [torch.empty(0)] * RANKS
        self.mine = threading.local()

    def least(self, tensor: torch.Tensor) -> None:
        self._said[self.mine.number] = tensor.clone()
        self._all.wait()
        tensor.copy_(torch.stack(self._said).amin(dim=0))
        self._all.wait()

    def abort(self) -> None:
        """Let nobody wait any more."""
        self._all.abort()

    def parallel(self) -> SimpleNamespace:
        return SimpleNamespace(attn_tp_size=RANKS, attn_tp_rank=self.mine.number)


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> Meeting:
    meeting = Meeting()
    for module in ("lost_pages", "ranks"):
        monkeypatch.setattr(f"engine_patch.{module}.get_parallel", meeting.parallel)
    monkeypatch.setattr("engine_patch.radix_cache.model_group", lambda: None)
    return meeting


class Rank:
    """``same`` decides what happens on all ranks, ``own`` what does on this one."""

    def __init__(self, tree: Tree, same: random.Random, own: random.Random):
        self.tree, self.same, self.own = tree, same, own
        tree.store.demotes = True
        tree.device_tier._clock = lambda: tree.now_s
        self.told: list[Any] = []
        self.turns = 0

    def request(self) -> None:
        """Of a session, whose turn is proven to most ranks, and which goes on from elsewhere once in a while."""
        session = self.same.choice(list(KEYS))
        key: RadixKey = KEYS[session if self.same.random() < 0.7 else self.same.choice(list(KEYS))]
        proven = self.own.random() < 0.8
        missing = len(key) - self.tree.tree_core.match_full_device_prefix(key)[0]
        self.tree.evict(EvictParams(num_tokens=missing, swa_num_tokens=missing))
        chain = session, None, None
        self.tree.demotions.goes_on(chain)
        allocator = self.tree.token_to_kv_pool_allocator
        if allocator.available_size() < len(key):
            return  # others are under way
        self.turns += 1
        self.tree.compute(key, session, self.turns, proven=proven)
        self.tree.settle()
        if proven:
            self.tree.device_tier.remember(session, key)
        self.tree.demotions.ended(chain, key, session if proven else None)

    def ask(self) -> None:
        session = self.own.choice(list(KEYS))
        self.tree.device_tier.prefetch(session, pages_of(KEYS[session]))

    def foresee(self) -> None:
        seconds = self.own.choice([1.0, 100.0, 10_000.0])
        self.tree.store.waits.foresee(self.own.choice(list(KEYS)), Forecast.exactly(seconds), 0.0, "tool")

    def evict(self) -> None:
        tokens = self.same.randrange(1, 20) * PAGE_SIZE
        self.tree.evict(EvictParams(num_tokens=tokens, swa_num_tokens=tokens * self.same.randrange(2)))

    def step(self, *, last: bool = False) -> None:
        store = self.tree.store
        store.landed_batches = len(store.loads) - (0 if last else self.own.randrange(2))
        if self.own.random() < 0.2:
            store.failed_batches.add(len(store.loads))
        store.copied = len(self.tree.demotions) if last else self.own.randrange(len(self.tree.demotions) + 1)
        for _ in range(device_tier._STEPS):
            self.tree.device_tier.run(scheduler())
        self.tree.preloads.land()
        self.tree.device_tier.land()
        self.tree.demotions.land()
        self.tree.demotions.keep_ahead()
        self.tree.settle()
        self.tree.now_s += 1.0

    def play(self) -> list[Any]:
        for _ in range(STEPS):
            self.foresee()
            self.ask()
            self.same.choice([self.request, self.request, self.evict, self.step, self.step])()
            self.told.append(self.standing())
        self.tree.now_s += device_tier._PATIENCE_S
        for _ in range(device_tier._TRIES * len(KEYS)):
            self.step(last=True)
        return self.told

    def standing(self) -> list[Any]:
        there = [self.tree.tree_core.match_full_device_prefix(key)[0] for key in KEYS.values()]
        free = self.tree.token_to_kv_pool_allocator
        windows = (
            (free.swa_available_size(), self.tree.swa_evictable_size()) if isinstance(self.tree, WindowTree) else ()
        )
        return [there, self.tree.evictable_size(), self.tree.protected_size(), len(self.tree.preloads), windows]


@pytest.mark.parametrize("backend", TREES)
@pytest.mark.parametrize("make", [Tree, WindowTree], ids=["full attention", "windows"])
@pytest.mark.parametrize("seed", [0, 1, 5])
def test_trees_of_ranks_change_alike(backend: str, make: type[Tree], seed: int, meeting: Meeting) -> None:
    def play(number: int) -> tuple[Rank, list[Any]]:
        meeting.mine.number = number
        rank = Rank(make(backend, agree=meeting.least), random.Random(seed), random.Random(f"{seed} {number}"))
        try:
            return rank, rank.play()
        except BaseException:
            meeting.abort()
            raise

    with ThreadPoolExecutor(RANKS) as threads:
        (first, told), (other, also) = threads.map(play, range(RANKS))
    assert told == also
    assert first.tree.store.preload_stats.pages > 0
    for rank in (first, other):
        tree = rank.tree
        kept = {what: count for what, count in tree.kept().items() if count}
        assert (kept, tree.protected_size()) == ({}, 0)
        free = tree.token_to_kv_pool_allocator
        if isinstance(tree, WindowTree):
            assert tree.missing == (0, 0)
        else:
            assert free.available_size() + tree.evictable_size() == free.size
