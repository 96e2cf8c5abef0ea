"""Device slots that neither a request nor the tree owns: pages are loaded into them before they enter the tree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from engine_patch.sglang_api import (
    ComponentType,
    EvictParams,
    InsertParams,
    PoolName,
    RadixKey,
    UnifiedRadixCache,
)

KEPT = {ComponentType.FULL, ComponentType.SWA}
"""What a model may keep for pages to be loaded like this. Of recurrent states SGLang has hardly more than its requests
need, and ends when there is none."""


@dataclass(frozen=True)
class Slots:
    """``full`` are the slots of all tokens, ``window`` those in the pool of sliding windows, of the last tokens; None
    where a model has no windows."""

    full: torch.Tensor
    window: torch.Tensor | None = None

    @property
    def of_pools(self) -> Mapping[PoolName, torch.Tensor]:
        return {PoolName.KV: self.full} | ({} if self.window is None else {PoolName.SWA: self.window})


class PrivateSlots:
    """Takes slots from the device, and gives them to the tree or back. For the scheduler's thread, at the same step on
    every rank.

    Of a prefix's windows only what lies in the last ``window_pages`` is loaded: 0 for a model without windows.
    """

    def __init__(self, cache: UnifiedRadixCache, window_pages: int):
        self._cache = cache
        self._window_tokens = window_pages * cache.page_size

    def fits(self, tokens: int, reserved: int) -> bool:
        """Whether there is room for so many tokens that is free or evictable, besides ``reserved`` ones. Those are
        taken to need windows as well: who computes them does for a while."""
        cache, allocator = self._cache, self._cache.token_to_kv_pool_allocator
        if not self._window_tokens:
            return bool(allocator.available_size() + cache.evictable_size() >= tokens + reserved)
        full = allocator.full_available_size() + cache.full_evictable_size()
        window = allocator.swa_available_size() + cache.swa_evictable_size()
        return bool(full >= tokens + reserved and window >= min(tokens, self._window_tokens) + reserved)

    def take(self, tokens: int) -> Slots | None:
        """Slots for so many tokens, whole pages; what is worth least is evicted for them. None, and nothing is taken,
        if there are too few."""
        cache, allocator = self._cache, self._cache.token_to_kv_pool_allocator
        if not self._window_tokens:
            if (free := allocator.available_size()) < tokens:
                cache.evict(EvictParams(num_tokens=tokens - free))
            full = allocator.alloc(tokens)
            return None if full is None else Slots(full)
        in_window = min(tokens, self._window_tokens)
        missing = max(0, tokens - allocator.full_available_size())
        missing_window = max(0, in_window - allocator.swa_available_size())
        if missing or missing_window:
            cache.evict(EvictParams(num_tokens=missing, swa_num_tokens=missing_window))
        full = allocator.full_attn_allocator.alloc(tokens)
        window = allocator.swa_attn_allocator.alloc(in_window)
        if full is None or window is None:
            self._free(full, window)
            return None
        return Slots(full, window)

    def give(self, slots: Slots) -> None:
        """Give slots back to the device."""
        self._free(slots.full, slots.window)

    def _free(self, full: torch.Tensor | None, window: torch.Tensor | None) -> None:
        allocator = self._cache.token_to_kv_pool_allocator
        if not self._window_tokens:
            allocator.free(full)
            return
        # By pools: no token has been told yet where its window is.
        if full is not None:
            allocator.full_attn_allocator.free(full)
        if window is not None:
            allocator.swa_attn_allocator.free(window)

    def insert(self, key: RadixKey, prefix: torch.Tensor, slots: Slots) -> None:
        """Give slots, which are filled now, to the tree as the end of ``key``, after the slots ``prefix`` that it has.
        The tree frees those of pages that it got from elsewhere in the meantime."""
        params = InsertParams(
            key=key,
            value=torch.cat([prefix.to(slots.full.dtype), slots.full]).to(torch.int64),
            prev_prefix_len=len(prefix),
        )
        if slots.window is not None:
            allocator = self._cache.token_to_kv_pool_allocator
            allocator.set_full_to_swa_mapping(slots.full[-len(slots.window) :], slots.window)
            params.set_evicted_seqlen(ComponentType.SWA, max(0, len(key) - self._window_tokens))
        self._cache.insert(params)
