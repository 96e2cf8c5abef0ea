"""What a store that engines share has of one pool, beside the rank's own store: looked up together, and streamed from
where it lies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from agentstate.pages import DEMAND, Geometry, LayerwiseReader, Need, PageStore, PosixBackend, Replicas
from agentstate.settings import Settings
from agentstate.tiers import Guard
from agentstate.tiers.pages import SharedPages
from engine_patch.feeds import Piece, Reading, Source
from engine_patch.staging import PinnedMemory

# A request of this size keeps an object store busy; more of them are in flight, not larger ones.
_CHUNK_BYTES = 8 << 20


@dataclass
class SharedStats:
    """Whether the shared store is ``available``; the ``extents`` that are known of it now, and their ``pages``;
    ``extents_rejected`` since the start because a page in them was wrong."""

    available: bool = False
    extents: int = 0
    pages: int = 0
    extents_rejected: int = 0


class SharedPool:
    """The pages of ``store``'s fingerprint that ``pages`` knows and ``store`` does not have. ``tier`` tells whether
    they can be had. What this machine has, as far as ``nearer`` than the shared store, is read from there. The reader
    is its own: a store that is slow keeps no thread from the drive. Thread-safe."""

    def __init__(
        self,
        pages: SharedPages,
        store: PageStore,
        tier: Guard,
        geometry: Geometry,
        device: torch.device,
        settings: Settings,
        staging_bytes: int,
        nearer: Replicas | None = None,
    ):
        self.stats = SharedStats()
        self._pages = pages
        self._store = store
        self._nearer = nearer or store
        self._tier = tier
        self.reader = LayerwiseReader(
            geometry,
            staging_bytes=staging_bytes,
            threads=settings.shared_reads,
            chunk_bytes=_CHUNK_BYTES,
            backend=PosixBackend(),
            open_extent=lambda extent, header: self._pages.open(extent, header),
        )
        self._pinned = PinnedMemory(self.reader.staging, device)

    @property
    def pages(self) -> SharedPages:
        return self._pages

    @property
    def available(self) -> bool:
        """Whether anything is found here: not while the store does not answer."""
        return bool(self._pages.extents) and self._tier.available

    def prefix_length(self, keys: Sequence[bytes], *, answering: bool) -> int:
        """How many of ``keys``, from the first on, are here or in the rank's own store, as far as they begin here: none
        while the store has to be ``answering`` and does not."""
        found = 0
        while found < len(keys) and (self.available or not answering):
            more = self._pages.prefix_length(keys[found:])
            if not more:
                break
            found += more
            found += self._store.prefix_length(keys[found:])
        return found

    def stored(self, keys: Sequence[bytes], *, answering: bool) -> list[bool]:
        """Which of ``keys`` are here: none while the store has to be ``answering`` and does not."""
        return self._pages.stored(keys) if self.available or not answering else [False] * len(keys)

    def pieces(self, keys: Sequence[bytes], need: Need = DEMAND, *, background: bool = False) -> list[Piece]:
        """Split the chain ``keys``, in order, into pieces that only the shared store has, each with a stream, and
        others."""
        if not self.available or self._nearer.prefix_length(keys, use=False) == len(keys):
            return [Piece(range(len(keys)))]
        own, shared = self._nearer.stored(keys), self._pages.stored(keys)
        found: list[Piece] = []
        first = 0
        while first < len(keys):
            here = shared[first] and not own[first]
            end = first + 1
            while end < len(keys) and here is (shared[end] and not own[end]):
                end += 1
            found.append(self._piece(keys, range(first, end), need, background) if here else Piece(range(first, end)))
            first = end
        return found

    def _piece(self, keys: Sequence[bytes], pages: range, need: Need, background: bool) -> Piece:
        try:
            pin = self._pages.pin(keys[pages.start : pages.stop])
        except KeyError:
            # Gone just now: whoever wants it finds that it is nowhere.
            return Piece(pages)
        return Piece(pages, Reading(self.reader.open(pin, need, background=background), Source.SHARED))

    def stat(self) -> SharedStats:
        self.stats.available = self._tier.available
        self.stats.extents, self.stats.pages = self._pages.extents, self._pages.pages
        return self.stats

    def drop(self, wrong: Iterable[tuple[bytes, int]]) -> None:
        """`SharedPages.drop`."""
        self.stats.extents_rejected += self._pages.drop(wrong)

    def move(self, pages: SharedPages, store: PageStore, nearer: Replicas | None = None) -> None:
        """Those of other weights from now on. Nothing may be streamed."""
        self._pages.close()
        self._pages, self._store, self._nearer = pages, store, nearer or store

    def close(self) -> None:
        """End the reader. Close or discard every stream first."""
        self.reader.close()
        self._pinned.close()
        self._pages.close()
