"""What ranks agree on when a batch of loads is over, with a stand-in for the other rank."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine_patch.radix_cache import _LinkerWrapper
from engine_patch.restore import Finished


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
        self.wrapper.cache = SimpleNamespace(_all_reduce_attn_groups=self._agree)
        self.wrapper.cache_linker = self.linker
        self.wrapper.inflight_load_rids, self.wrapper.inflight_load_index = ["a", "b"], 5
        self.wrapper.private_load_indices, self.wrapper.landed, self.wrapper.unlocked = {}, {}, False

    def _agree(self, tensor: torch.Tensor, op: Any) -> None:
        assert op == torch.distributed.ReduceOp.MIN
        self.agreements += 1
        tensor.copy_(torch.minimum(tensor, torch.tensor(self.other, dtype=tensor.dtype)))


NUMBERS = (torch.tensor([1, 2]),)


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
