"""Pins: the pages of one request, where they lie, kept there."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from agentstate.pages.extent import ExtentLayout
from agentstate.pages.keys import PageKeys


class StoredExtent(NamedTuple):
    """An extent of a store, by its ``number``, which no other extent of an open store ever gets."""

    path: Path
    layout: ExtentLayout
    number: int

    @property
    def owner(self) -> str:
        """Whom its bytes are charged to."""
        return self.layout.owner


class Segment(NamedTuple):
    """``pages`` pages of a request, from its page ``first`` on, side by side in ``extent`` from ``slot`` on."""

    extent: StoredExtent
    slot: int
    pages: int
    first: int


class NeededExtent(NamedTuple):
    """An extent, and the sessions whose manifests need it; with `ANYONE`, any other may be."""

    extent: StoredExtent
    sessions: frozenset[str]


class Pin:
    """The pages of one request, in order, and where they lie: ``segments``. Until `close` they stay there, whatever is
    evicted or merged. ``release`` ends that. A context manager."""

    def __init__(self, fingerprint: bytes, keys: PageKeys, segments: list[Segment], release: Callable[[], None]):
        self.fingerprint = fingerprint
        self.keys = keys
        self.segments = segments
        self._release: Callable[[], None] | None = release

    def copies(self, pages: Iterable[int]) -> list[tuple[bytes, int]]:
        """The pinned copies of some of its ``pages``, as `PageStore.drop` takes them."""
        firsts = [segment.first for segment in self.segments]
        return [(self.keys[page], self.segments[bisect_right(firsts, page) - 1].extent.number) for page in pages]

    def close(self) -> None:
        release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> Pin:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
