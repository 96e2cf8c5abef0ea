"""Device pages that must not be given out: a read that nobody waits for any more may still write to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from engine_patch.sglang_api import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator

# The one method through which all pages come back, by their numbers; with pages of one token those are its slots.
_WAY_BACK = {PagedTokenToKVPoolAllocator: "_release_page_ids", TokenToKVPoolAllocator: "free"}


class Quarantine:
    """Stands between an ``allocator`` and the pages that it gets back, while there are pages to be held.

    A read cannot be called off: it writes, whenever the drive answers, to where it was told to. All methods are for the
    scheduler's thread.
    """

    def __init__(self, allocator: Any):
        self._allocator = allocator
        self._way_back = _WAY_BACK.get(type(allocator), "")
        # What is held, each with what tells whether that may end; and what has come back of it.
        self._held: list[tuple[torch.Tensor, Callable[[], bool]]] = []
        self._returned: list[torch.Tensor] = []

    @staticmethod
    def works(allocator: Any) -> bool:
        """Whether all pages come back to ``allocator`` by one way."""
        return type(allocator) in _WAY_BACK

    def __bool__(self) -> bool:
        """Whether any pages are held."""
        return bool(self._held)

    def hold(self, pages: torch.Tensor, over: Callable[[], bool]) -> None:
        """Hold these page numbers, which are in use now, until ``over`` says true."""
        self._held.append((pages.to(self._allocator.device), over))
        setattr(self._allocator, self._way_back, self._release)

    def tidy(self) -> bool:
        """Give back what need not be held any more: whether there was any."""
        if not any(over() for _, over in self._held):
            return False
        self._held = [(pages, over) for pages, over in self._held if not over()]
        returned, self._returned = self._returned, []
        self._release(*returned)
        if not self._held:
            delattr(self._allocator, self._way_back)
        return True

    def _release(self, *page_ids: torch.Tensor) -> None:
        for ids in page_ids:
            held = torch.zeros_like(ids, dtype=torch.bool)
            for pages, _ in self._held:
                held |= torch.isin(ids, pages.to(ids.dtype))
            self._returned.append(ids[held])
            getattr(type(self._allocator), self._way_back)(self._allocator, ids[~held])
