"""What ranks agree on, with a stand-in for the other rank, or with several in one process."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device import PAGE_SIZE
from sglang.srt.mem_cache.base_prefix_cache import MatchResult

from engine_patch.break_even import BreakEven
from engine_patch.linker import AgentStateLinker
from engine_patch.radix_cache import _LinkerWrapper
from engine_patch.restore import Finished
from engine_patch.sglang_api import PoolName, PoolTransfer, RadixKey


class Linker(SimpleNamespace):
    """What of a linker is asked."""

    def __init__(self, found: Finished):
        super().__init__(found=found, held=[], stuck=found.writing, tidied=0)

    @property
    def quarantines_pages(self) -> bool:
        return bool(self.held)

    def finish(self, index: int) -> Finished:
        return self.found

    def quarantine(self, found: Finished) -> None:
        self.held.append(found.numbers)

    def release_quarantine(self) -> None:
        self.held.clear()

    def tidy(self, queued: Any) -> None:
        self.tidied += 1


class Rank:
    """A rank beside another one, of which ``other`` is what it brings to the next agreement."""

    def __init__(self, found: Finished):
        self.linker = Linker(found)
        self.other: list[int] = []
        self.agreements = 0
        self.wrapper = _LinkerWrapper.__new__(_LinkerWrapper)
        self.wrapper.shared = False
        self.wrapper.cache = SimpleNamespace(_all_reduce_attn_groups=self._agree)
        self.wrapper.cache_linker = self.linker
        self.wrapper.inflight_load_rids, self.wrapper.inflight_load_index = ["a", "b"], 5
        self.wrapper.private_load_indices, self.wrapper.landed, self.wrapper.unlocked = {}, {}, False
        self.wrapper.entering = dict.fromkeys("ab")  # type: ignore[assignment]

    def _agree(self, tensor: torch.Tensor, op: Any) -> None:
        assert op == torch.distributed.ReduceOp.MIN
        self.agreements += 1
        tensor.copy_(torch.minimum(tensor, torch.tensor(self.other, dtype=tensor.dtype)))


NUMBERS = (lambda: torch.tensor([1, 2]),)


@pytest.mark.parametrize(
    ("found", "other", "failed", "held"),
    [
        (Finished(set(), None, NUMBERS), [1, 1, 1], [], False),
        (Finished({"a"}, None, NUMBERS), [1, 1, 1], ["a"], False),
        (Finished(set(), None, NUMBERS), [1, 1, 0], ["b"], False),
        # The other rank's drive did not answer: this one's pages of the batch are not given out either.
        (Finished(set(), None, NUMBERS), [0, 0, 0], ["a", "b"], True),
        (Finished({"a", "b"}, None, NUMBERS, writing=True), [1, 1, 1], ["a", "b"], True),
    ],
)
def test_what_failed_or_was_given_up_on_one_rank_is_so_on_all(
    found: Finished, other: list[int], failed: list[str], held: bool
) -> None:
    rank = Rank(found)
    rank.other = other
    assert rank.wrapper.finish_loads() == failed
    assert sorted([*rank.wrapper.entering, *failed]) == ["a", "b"], "what has failed does not enter the tree"
    assert rank.linker.held == ([NUMBERS] if held else [])
    assert rank.agreements == 1


@pytest.mark.parametrize("own", [False, True])
def test_pages_are_held_until_no_rank_writes_to_its_own(own: bool) -> None:
    rank = Rank(Finished({"a", "b"}, None, NUMBERS, writing=True))
    rank.wrapper.tidy(set)
    assert (rank.agreements, rank.linker.tidied) == (0, 1)  # nothing is held: nothing to agree on
    rank.other = [0, 0, 0]
    rank.wrapper.finish_loads()
    # First one of them is over, then the other one.
    rank.linker.stuck, rank.other = own, [int(own)]
    rank.wrapper.tidy(set)
    assert rank.linker.held and not rank.wrapper.unlocked
    rank.linker.stuck, rank.other = False, [1]
    rank.wrapper.tidy(set)
    assert not rank.linker.held
    assert rank.wrapper.unlocked
    agreements = rank.agreements
    rank.wrapper.tidy(set)
    assert rank.agreements == agreements


def test_a_batch_that_only_decodes_finishes_no_load_that_waits_for_its_own_batch() -> None:
    rank = Rank(Finished({"a", "b"}, None, NUMBERS))
    rank.wrapper.inflight_load_index = -1
    assert rank.wrapper.finish_loads() == []
    assert (rank.wrapper.inflight_load_rids, rank.agreements) == (["a", "b"], 0)
    # Now it has started, and what fails is told.
    rank.wrapper.inflight_load_index, rank.other = 5, [1, 1, 1]
    assert rank.wrapper.finish_loads() == ["a", "b"]


class Together:
    """What the ranks of an engine say to each other, each on a thread of its own: the least of it."""

    def __init__(self, ranks: int):
        self._said: list[torch.Tensor] = []
        self._all = threading.Barrier(ranks, timeout=60)

    def agree(self, tensor: torch.Tensor, op: Any) -> None:
        assert op == torch.distributed.ReduceOp.MIN
        self._said.append(tensor.clone())
        self._all.wait()
        tensor.copy_(torch.stack(self._said).amin(dim=0))
        if self._all.wait() == 0:
            self._said.clear()
        self._all.wait()


class Stored:
    """Pools in which everything is stored, and nothing is in host memory."""

    stuck = False

    def restorable_for(self, rid: str, keys: Sequence[bytes]) -> list[int]:
        return list(range(1, len(keys) + 1))

    def staged_for(self, keys: list[bytes]) -> bool:
        return False

    def shared_takes_s(self, keys: list[bytes]) -> float | None:
        return None

    def read_bytes(self, pages: int) -> int:
        return 1000 * pages


class MeasuringRank:
    """A rank that decides about what its drive and its device took."""

    PAGES = 8

    def __init__(self, together: Together):
        linker = AgentStateLinker.__new__(AgentStateLinker)
        self.break_even = BreakEven()
        linker._rank = SimpleNamespace(off=None, break_even=self.break_even, settings=SimpleNamespace(break_even=True))
        linker._pools, linker._cached, linker.page_size = Stored(), 0, PAGE_SIZE
        self.wrapper = _LinkerWrapper.__new__(_LinkerWrapper)
        self.wrapper.shared = False
        self.wrapper.cache = SimpleNamespace(
            page_size=PAGE_SIZE,
            tree_core=SimpleNamespace(is_eagle=False),
            _all_reduce_attn_groups=together.agree,
        )
        self.wrapper.cache_linker, self.wrapper.hit_markers = linker, {}

        def build(phase: Any, node: Any, keys: list[str]) -> PoolTransfer:
            return PoolTransfer(name=PoolName.KV, keys=keys)

        self.wrapper._components = [SimpleNamespace(build_external_linker_transfer=build)]

    def measure(self, restore_s: float) -> None:
        """Forty prefills of 0.1 ms a token, and forty restores that took so long."""
        for number in range(40):
            self.break_even.stepped([(64 * (number % 5), 10 + number)], 0.01 + 0.0001 * (10 + number))
        for number in range(40):
            n_bytes = 1000 * (1 + number % 5)
            waited_s = restore_s * (1 + 1e-6 * n_bytes)
            self.break_even.restored([(256, 8)], 0.0108 + waited_s, n_bytes, waited_s)

    def restores(self, rid: str) -> bool:
        key = RadixKey(array("q", range(self.PAGES * PAGE_SIZE)))
        result = MatchResult(device_prefix_len=0, last_device_node=0, last_host_node=0, best_match_node=0)
        return self.wrapper.match(key, SimpleNamespace(rid=rid), result).host_hit_length > 0


@pytest.fixture
def ranks() -> Iterator[Callable[[str], list[bool]]]:
    """Two of them: what each restores of a request, asked at the same time."""
    together = Together(2)
    ranks = [MeasuringRank(together) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:

        def ask(rid: str) -> list[bool]:
            return list(threads.map(lambda rank: rank.restores(rid), ranks))

        ask.ranks = ranks
        yield ask


def test_ranks_that_were_sure_at_different_times_do_not_recompute_for_ever(ranks: Any) -> None:
    """One in so many is restored all the same, to be measured again: of the same requests on all ranks."""
    first, second = ranks.ranks
    first.measure(restore_s=0.02)
    for number in range(5):
        ranks(f"early {number}")
    second.measure(restore_s=0.02)
    answers = [ranks(f"r{number}") for number in range(128)]
    assert all(one == other for one, other in answers)
    assert sum(one for one, _ in answers) == 4
    # Drives and devices have changed: now what is measured says that restoring is faster.
    for rank in ranks.ranks:
        for _ in range(20):
            rank.measure(restore_s=0.0001)
    assert ranks("then") == [True, True]


def test_the_slowest_rank_decides(ranks: Any) -> None:
    first, second = ranks.ranks
    first.measure(restore_s=0.0001)
    second.measure(restore_s=0.02)
    assert ranks("r") == [False, False]
    assert [rank.break_even.stats.computed for rank in ranks.ranks] == [1, 1]


def test_ranks_restore_what_all_of_them_have_in_host_memory(ranks: Any) -> None:
    for rank in ranks.ranks:
        rank.measure(restore_s=0.02)
    first, second = (rank.wrapper.cache_linker._pools for rank in ranks.ranks)
    first.staged_for = lambda keys: True
    assert ranks("r") == [False, False]
    second.staged_for = lambda keys: True
    # Also when it has been decided otherwise before it was read.
    assert ranks("r") == [True, True]
