"""Device pages that must not be given out: a read that nobody waits for any more may still write to them.

Only reads straight into the KV pool do so, and only with allocators of attention are they made: a pool of recurrent
states has just enough of them for the requests that it admits, so that none can be held.
"""

from __future__ import annotations

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
        # What is held, and what has come back of it.
        self._held: torch.Tensor | None = None
        self._returned: list[torch.Tensor] = []

    @staticmethod
    def works(allocator: Any) -> bool:
        """Whether all pages come back to ``allocator`` by one way."""
        return type(allocator) in _WAY_BACK

    def __bool__(self) -> bool:
        """Whether any pages are held."""
        return self._held is not None

    def hold(self, pages: torch.Tensor) -> None:
        """Hold these page numbers, which are in use now, until they are all let go."""
        pages = pages.to(self._allocator.device)
        self._held = pages if self._held is None else torch.cat([self._held, pages])
        setattr(self._allocator, self._way_back, self._release)

    def let_go(self) -> None:
        """Give back what is held, now or when it comes back."""
        if self._held is None:
            return
        delattr(self._allocator, self._way_back)
        returned, self._returned, self._held = self._returned, [], None
        if returned:
            getattr(self._allocator, self._way_back)(torch.cat(returned))

    def _release(self, *page_ids: torch.Tensor) -> None:
        for ids in page_ids:
            held = torch.isin(ids, self._held.to(ids.dtype))
            if held.any():
                self._returned.append(ids[held])
                ids = ids[~held]
            getattr(type(self._allocator), self._way_back)(self._allocator, ids)
