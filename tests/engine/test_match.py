"""The length of a match that all ranks agree on: as SGLang finds it, for any lengths."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine_patch.break_even import Word
from engine_patch.radix_cache import _LinkerWrapper
from engine_patch.sglang_api import UnifiedCacheLinkerWrapper


def agreed(wrapper: Any, lengths: list[int], others: list[int], num_pages: int, device_hit_pages: int) -> int:
    """``others`` are the lengths of another rank."""

    def reduce(mask: torch.Tensor, _: Any) -> None:
        theirs = torch.zeros_like(mask)
        theirs[[length for length in others if length <= num_pages]] = 1
        torch.minimum(mask, theirs, out=mask)

    linker = SimpleNamespace(word=Word.RESTORE, computes=lambda rid, pages, word: False)
    ranks = SimpleNamespace(cache=SimpleNamespace(_all_reduce_attn_groups=reduce), cache_linker=linker, _rid="r")
    found = wrapper._sync_restorable_prefix(ranks, lengths, num_pages=num_pages, device_hit_pages=device_hit_pages)
    assert isinstance(found, int)
    return found


@pytest.mark.parametrize("seed", range(50))
def test_ranks_agree_on_the_length_that_sglang_would_choose(seed: int) -> None:
    chance = random.Random(seed)
    lengths, others = (sorted(chance.sample(range(1, 20), chance.randrange(12))) for _ in range(2))
    num_pages, device_hit_pages = chance.randrange(20), chance.randrange(4)
    given = (lengths, others, num_pages, device_hit_pages)
    assert agreed(_LinkerWrapper, *given) == agreed(UnifiedCacheLinkerWrapper, *given)


def test_ranks_without_a_common_length_agree_on_none() -> None:
    assert agreed(_LinkerWrapper, [], [1, 2], 3, 0) == 0
    assert agreed(_LinkerWrapper, [1, 3], [2], 3, 0) == 0
    assert agreed(_LinkerWrapper, [1, 3], [1, 2], 3, 0) == 1
