"""Device pages that must not be given out: a read that was abandoned may still write to them.

Only reads straight into the KV pool do so, and only attention pools get such reads: a pool of recurrent states has just
enough of them for the requests that it admits, so none can be withheld.
"""

from __future__ import annotations

from typing import Any

import torch

from engine_patch.sglang_api import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator

# The allocator method that every free ends in. It takes page ids; with pages of one token those are slots.
_WAY_BACK = {PagedTokenToKVPoolAllocator: "_release_page_ids", TokenToKVPoolAllocator: "free"}


class Quarantine:
    """Keeps freed pages from their ``allocator`` while they are in quarantine.

    A read cannot be cancelled: whenever the drive answers, it writes where it was told to. All methods are for the
    scheduler's thread.
    """

    def __init__(self, allocator: Any):
        self._allocator = allocator
        self._way_back = _WAY_BACK.get(type(allocator), "")
        # The pages in quarantine, and those of them that were freed since.
        self._quarantined: torch.Tensor | None = None
        self._returned: list[torch.Tensor] = []

    @staticmethod
    def works(allocator: Any) -> bool:
        """Whether every free of ``allocator`` ends in one method that is known."""
        return type(allocator) in _WAY_BACK

    def __bool__(self) -> bool:
        """Whether any pages are in quarantine."""
        return self._quarantined is not None

    @property
    def kept(self) -> int:
        """How many pages are in quarantine."""
        return 0 if self._quarantined is None else len(self._quarantined)

    def add(self, pages: torch.Tensor) -> None:
        """Quarantine these page numbers, which are in use now, until `release`."""
        pages = pages.to(self._allocator.device)
        self._quarantined = pages if self._quarantined is None else torch.cat([self._quarantined, pages])
        setattr(self._allocator, self._way_back, self._release)

    def release(self) -> None:
        """End the quarantine: free the pages that have come back; later ones are freed as usual."""
        if self._quarantined is None:
            return
        delattr(self._allocator, self._way_back)
        returned, self._returned, self._quarantined = self._returned, [], None
        if returned:
            getattr(self._allocator, self._way_back)(torch.cat(returned))

    def _release(self, *page_ids: torch.Tensor) -> None:
        for ids in page_ids:
            inside = torch.isin(ids, self._quarantined.to(ids.dtype))
            if inside.any():
                self._returned.append(ids[inside])
                ids = ids[~inside]
            getattr(type(self._allocator), self._way_back)(self._allocator, ids)
