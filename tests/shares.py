"""A directory that engines share, with what another node has published in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO

from contents import write

from agentstate.pages import PageKeys, PageStore
from agentstate.pages.codec import Codec
from agentstate.tiers import DirectoryTier, Guard, Page, Policy, Range, Reading, SharedExtents, StoreKeys, Tier
from agentstate.tiers.interface import settle
from agentstate.tiers.pages import Listed, SharedPages

PATIENCE_S = 60


class Fragile(Tier):
    """``tier``, whose reads fail with ``error`` while there is one. ``read_from`` are the names that were read."""

    def __init__(self, tier: Tier):
        self._tier = tier
        self.error: Exception | None = None
        self.read_from: list[str] = []

    def mark(self, proposed: str | None = None) -> Future[str | None]:
        return self._tier.mark(proposed)

    def publish(self, name: str, file: BinaryIO, trailer: bytes = b"") -> Future[bool]:
        return self._tier.publish(name, file, trailer)

    def read(self, name: str, ranges: Sequence[Range]) -> Reading:
        self.read_from.append(name)
        if self.error is None:
            return self._tier.read(name, ranges)
        failed = Reading()
        settle(failed, None, self.error)
        return failed

    def drop(self, name: str) -> Future[None]:
        return self._tier.drop(name)

    def list(self, prefix: str = "", after: str | None = None, limit: int = 1000) -> Future[Page]:
        return self._tier.list(prefix, after, limit)

    def sweep(self, older_than_s: float) -> Future[int]:
        return self._tier.sweep(older_than_s)

    def close(self) -> None:
        self._tier.close()


class Share:
    """``guard`` is what engines ask. It asks once for each, and gives up after ``failures_in_row``."""

    def __init__(self, root: Path, failures_in_row: int = 1 << 30, codec: Codec = "raw"):
        self.root = root
        root.mkdir(exist_ok=True)
        self.tier = Fragile(DirectoryTier(root))
        policy = Policy(attempts=1, failures_in_row=failures_in_row, failure_share=2.0, refusals_in_row=1 << 30)
        self.guard = Guard(self.tier, "the share", policy)
        self.extents = SharedExtents(self.guard, StoreKeys("k" * 32), codec)
        self._others = 0
        self._ids = 0

    def publish(self, pages: SharedPages, *extents: Sequence[bytes], version: int = 0) -> list[Listed]:
        """Another node publishes extents of these pages, and this one learns of them."""
        return self.publish_from(pages, lambda store, keys: write(store, keys, version), *extents)

    def publish_from(
        self, pages: SharedPages, stored: Callable[[PageStore, Sequence[bytes]], Any], *extents: Sequence[bytes]
    ) -> list[Listed]:
        """The same of pages that ``stored`` stores."""
        self._others += 1
        store = PageStore(self.root.with_name(f"another node {self._others}"), pages.fingerprint, pages.geometry)
        listed = []
        for keys in extents:
            before = {extent.number for extent in store.extents()}
            stored(store, keys)
            (extent,) = [extent for extent in store.extents() if extent.number not in before]
            of = self.extents.publish(extent.path, "rank0").result(PATIENCE_S)
            self._ids += 1
            listed.append(Listed(self._ids, of.name, of.n_bytes, "", PageKeys.of(keys)))
        store.close()
        pages.enter(listed)
        return listed

    def path(self, listed: Listed) -> Path:
        return self.root / listed.name

    def close(self) -> None:
        self.guard.close()
