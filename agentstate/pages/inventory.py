"""What lies in a page directory, and whether it is still what was written: for `agentstate pages`.

Works on the files alone and beside a running engine: nothing here opens a store for writing but `repair`.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from agentstate.errors import BadExtent
from agentstate.pages.extent import ExtentHeader, checksum, page_seed
from agentstate.pages.files import header_of, opened
from agentstate.pages.store import PageStore


@dataclass(frozen=True)
class ExtentReport:
    """One extent file. ``header`` is None, and ``damage`` says why, when it cannot be read; ``broken`` are the slots
    whose bytes are not those that were written."""

    path: Path
    n_bytes: int
    header: ExtentHeader | None
    damage: str | None = None
    broken: tuple[int, ...] = ()

    @property
    def good(self) -> bool:
        return self.header is not None and not self.broken


def store_directories(root: Path) -> list[Path]:
    """The directories of the stores below ``root``, one a fingerprint and rank."""
    return sorted(path.parent for path in root.glob("*/*/extents"))


def extents(store: Path) -> Iterator[ExtentReport]:
    """Every extent of a store by its header alone, in the order of their numbers."""
    yield from _reports(_paths(store), lambda file, header: ())


def check(store: Path) -> Iterator[ExtentReport]:
    """Every extent of a store, every byte of it read and verified."""
    yield from _reports(_paths(store), _broken)


def _paths(store: Path) -> list[Path]:
    return sorted((store / "extents").glob("*.ext"))


def _reports(paths: list[Path], examine: Callable[[BinaryIO, ExtentHeader], tuple[int, ...]]) -> Iterator[ExtentReport]:
    for path in paths:
        # A running engine may evict an extent at any time; then there is nothing to report.
        with suppress(FileNotFoundError), opened(path) as file:
            n_bytes = path.stat().st_size
            try:
                header = header_of(file, path.name)
                yield ExtentReport(path, n_bytes, header, broken=examine(file, header))
            except (BadExtent, OSError) as error:
                yield ExtentReport(path, n_bytes, None, str(error))


def repair(store: Path, reports: list[ExtentReport]) -> int:
    """Drop what `check` found broken, and nothing else: extents that cannot be read are deleted, and of the others the
    good pages are written anew. How many pages were dropped from extents that could be read. An extent
    that could be read only once, by the check or now, is left alone.

    Raises PageStoreLocked while an engine writes to the store, PageStoreFull when the good pages do not fit beside
    the old extent; then the store is as it was but for what had been repaired before.
    """
    reports = [
        again
        for report in reports
        for again in _reports([report.path] * (not report.good), _broken)
        if report.header is None or again.header is not None
    ]
    headers = [report.header for report in reports if report.header is not None]
    if headers:
        writer = PageStore(store, headers[0].fingerprint, headers[0].geometry)
        try:
            for report in reports:
                if report.header is not None and report.broken:
                    # The store deletes at open what it does not need any more.
                    with suppress(FileNotFoundError), opened(report.path) as file:
                        _rewrite(writer, file, report.header, report.broken)
        finally:
            writer.close()
    for report in reports:
        if not report.good:
            report.path.unlink(missing_ok=True)
    return sum(len(report.broken) for report in reports)


def _broken(file: BinaryIO, header: ExtentHeader) -> tuple[int, ...]:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        content.madvise(mmap.MADV_SEQUENTIAL)
        seeds = [page_seed(header.fingerprint, key) for key in header.keys]
        return tuple(
            slot
            for slot, seed in enumerate(seeds)
            if any(
                checksum(seed, layer, _components(content, header, layer, slot)) != int(header.checksums[layer, slot])
                for layer in range(header.geometry.layers)
            )
        )


def _components(content: mmap.mmap, header: ExtentHeader, layer: int, slot: int) -> list[bytes]:
    spans = (header.layout.component_range(layer, c, slot, 1) for c in range(len(header.geometry.component_bytes)))
    return [content[offset : offset + length] for offset, length in spans]


def _rewrite(writer: PageStore, file: BinaryIO, header: ExtentHeader, broken: tuple[int, ...]) -> None:
    keep = [slot for slot in range(len(header.keys)) if slot not in broken]
    if not keep:
        return
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        draft = writer.draft([header.keys[slot] for slot in keep], mmap.mmap(-1, writer.draft_bytes(len(keep))))
        for layer in range(header.geometry.layers):
            for row, slot in enumerate(keep):
                for component, data in enumerate(_components(content, header, layer, slot)):
                    draft.component(layer, component)[row] = np.frombuffer(data, dtype=np.uint8)
        writer.publish(draft)
