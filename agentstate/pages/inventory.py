"""What lies in a page directory, and whether it is still what was written: for `agentstate pages`.

Works on the files alone and beside a running engine: nothing here opens a store for writing but `repair` and
`collect`. The index belongs to the engine, so which extent serves a page is told as a store tells it that opens
without one: the one with the highest number. A page that an engine has dropped counts as live until then.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from agentstate.errors import BadExtent, UnknownFormat
from agentstate.pages.extent import ExtentHeader
from agentstate.pages.files import header_of, opened
from agentstate.pages.node import dp_roots, is_of_dp_rank
from agentstate.pages.rewriting import copy_pages, read_pages
from agentstate.pages.store import PageStore

# The least digits of a page's key that `holding` takes for one.
KEY_DIGITS = 8


@dataclass(frozen=True)
class ExtentReport:
    """One extent file. ``header`` is None, and ``damage`` says why, when it cannot be read; ``broken`` are the slots
    whose bytes are not those that were written. A ``foreign`` one is of a format that another release reads."""

    path: Path
    n_bytes: int
    header: ExtentHeader | None
    damage: str | None = None
    broken: tuple[int, ...] = ()
    foreign: bool = False

    @property
    def good(self) -> bool:
        return self.header is not None and not self.broken


def store_directories(root: Path) -> list[Path]:
    """The directories of the stores below ``root``, one a fingerprint and rank, of all DP ranks."""
    return sorted(path.parent for of in dp_roots(root).values() for path in of.glob("*/*/extents"))


def rank_of(store: Path) -> str:
    """What a store's rank is called, with its DP rank unless that is the first."""
    root = store.parents[1]
    return f"{root.name}/{store.name}" if is_of_dp_rank(root) else store.name


def extents(store: Path) -> Iterator[ExtentReport]:
    """Every extent of a store by its header alone, in the order of their numbers."""
    yield from _reports(_paths(store), lambda file, header: ())


def check(store: Path) -> Iterator[ExtentReport]:
    """Every extent of a store, every byte of it read and verified."""
    yield from _reports(_paths(store), broken_pages)


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
                yield ExtentReport(path, n_bytes, None, str(error), foreign=isinstance(error, UnknownFormat))


def total_bytes(stores: Iterable[Path]) -> int:
    """Bytes of all extents of some stores."""
    return sum(sum(_sizes(store)) for store in stores)


def holding(root: Path, name: str) -> Iterator[tuple[ExtentReport, int | None]]:
    """The extents below ``root`` that ``name`` means, each with the slot of the page if it names one.

    ``name`` is the path of an extent, its number in hexadecimal, or the first 8 digits or more of a page's key.
    """
    path = Path(name).resolve()
    number = name.removesuffix(".ext").rjust(16, "0")
    for store in store_directories(root):
        for report in extents(store):
            if report.path.stem == number or report.path.resolve() == path:
                yield report, None
            elif report.header is not None and len(name) >= KEY_DIGITS:
                yield from ((report, slot) for slot, key in enumerate(report.header.keys) if key.hex().startswith(name))


@dataclass(frozen=True)
class Usage:
    """The bytes of one store: those of pages that are found (``live``), of pages that a later extent has too
    (``superseded``), of extents that cannot be read, of files being written or left by a crash (``partial``), of the
    index, and ``overhead``, the headers and padding of the extents that can be read."""

    live: int
    superseded: int
    unreadable: int
    partial: int
    index: int
    overhead: int

    @property
    def total(self) -> int:
        return self.live + self.superseded + self.unreadable + self.partial + self.index + self.overhead


def usage(store: Path) -> Usage:
    reports = list(extents(store))
    live_slots = Counter(place.path for place in _places(reports).values())
    live = superseded = unreadable = overhead = 0
    for report in reports:
        if report.header is None:
            unreadable += report.n_bytes
            continue
        pages = len(report.header.keys)
        page_bytes = report.header.page_bytes
        live += live_slots[report.path] * page_bytes
        superseded += (pages - live_slots[report.path]) * page_bytes
        overhead += report.n_bytes - pages * page_bytes
    return Usage(live, superseded, unreadable, _file_bytes(store / "partial"), _file_bytes(store / "index"), overhead)


@dataclass(frozen=True)
class Collection:
    """What `collect` freed, or would free: extents, their pages and their bytes; and the bytes that are left."""

    extents: int
    pages: int
    freed_bytes: int
    left_bytes: int


def identity(store: Path) -> tuple[str, int] | None:
    """The fingerprint, in hexadecimal, and the rank of a store, as SQL knows them; None where no extent can be read
    or the directory is not named after a rank."""
    header = next((report.header for report in extents(store) if report.header is not None), None)
    rank = store.name.removeprefix("rank")
    return (header.fingerprint.hex(), int(rank)) if header is not None and rank.isdecimal() else None


def collectable(store: Path, needed: Iterable[Iterable[bytes]]) -> Collection:
    """What `collect` would free of a store that no engine has open. Changes nothing."""
    reports = list(extents(store))
    places = _places(reports)
    kept = {places[key].path for keys in needed for key in keys if key in places}
    gone = [report for report in reports if report.header is not None and report.path not in kept]
    freed = sum(report.n_bytes for report in gone)
    pages = sum(place.path not in kept for place in places.values())
    return Collection(len(gone), pages, freed, sum(report.n_bytes for report in reports) - freed)


def collect(store: Path, needed: Callable[[], Iterable[Iterable[bytes]]]) -> Collection:
    """Delete the extents that hold no page of ``needed``, the chains of the live manifests, which is asked for once
    no engine can write to the store any more. Extents that cannot be read are left to `repair`.

    Raises PageStoreLocked while an engine has the store open; then nothing was deleted. Raises BadExtent when no
    extent of it can be read.
    """
    header = next((report.header for report in extents(store) if report.header is not None), None)
    if header is None:
        raise BadExtent(f"no extent in {store} can be read: `agentstate pages check --repair` deletes what is damaged")
    before = _count(store)
    writer = PageStore(store, header.fingerprint, header.geometry)
    try:
        for keys in needed():
            writer.need(keys)
        pages = writer.stats.pages
        writer.collect()
        pages -= writer.stats.pages
    finally:
        writer.close()
    after = _count(store)
    return Collection(before[0] - after[0], pages, before[1] - after[1], after[1])


def _count(store: Path) -> tuple[int, int]:
    sizes = list(_sizes(store))
    return len(sizes), sum(sizes)


def _sizes(store: Path) -> Iterator[int]:
    for path in (store / "extents").glob("*.ext"):
        with suppress(FileNotFoundError):
            yield path.stat().st_size


def _places(reports: Iterable[ExtentReport]) -> dict[bytes, ExtentReport]:
    """The extent that serves each page: of several, in the order of their numbers, the last."""
    return {key: report for report in reports if report.header is not None for key in report.header.keys}


def _file_bytes(directory: Path) -> int:
    total = 0
    for path in directory.glob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_blocks * 512
    return total


def repair(store: Path, reports: list[ExtentReport]) -> int:
    """Drop what `check` found broken, and nothing else: extents that cannot be read are deleted, and of the others the
    good pages are written anew. How many pages were dropped from extents that could be read. An extent
    that could be read only once, by the check or now, is left alone, and so is one of a format that another release
    reads.

    Raises PageStoreLocked while an engine writes to the store, PageStoreFull when the good pages do not fit beside
    the old extent, and OSError when they cannot be read again; then the store is as it was but for what had been
    repaired before.
    """
    reports = [
        again
        for report in reports
        for again in _reports([report.path] * (not report.good), broken_pages)
        if report.header is None or again.header is not None
    ]
    headers = [report.header for report in reports if report.header is not None]
    if headers:
        rows = any(header.rows for header in headers)
        writer = PageStore(store, headers[0].fingerprint, headers[0].geometry, rows=rows)
        try:
            for report in reports:
                if report.header is not None and report.broken:
                    # The store deletes at open what it does not need any more.
                    with suppress(FileNotFoundError), opened(report.path) as file:
                        _rewrite(writer, file, report.header, report.broken)
        finally:
            writer.close()
    for report in reports:
        if not report.good and not report.foreign:
            report.path.unlink(missing_ok=True)
    return sum(len(report.broken) for report in reports)


def broken_pages(file: BinaryIO, header: ExtentHeader) -> tuple[int, ...]:
    """The slots of an extent whose bytes are not those that were written, or cannot be read."""
    broken = set[int]()
    parts = [np.empty((len(header.keys), size), dtype=np.uint8) for size in header.geometry.component_bytes]
    for layer in range(header.geometry.layers):
        try:
            read_pages(file, header, layer, 0, parts)
        except OSError:
            # Of a slab with a bad block only the pages on that block are lost.
            broken.update(_unreadable(file, header, layer))
            continue
        broken.update(header.wrong_slots(layer, 0, [[part] for part in parts]))
    return tuple(sorted(broken))


def _unreadable(file: BinaryIO, header: ExtentHeader, layer: int) -> Iterator[int]:
    """The slots of a layer that cannot be read, or are not what was written."""
    parts = [np.empty((1, size), dtype=np.uint8) for size in header.geometry.component_bytes]
    for slot in range(len(header.keys)):
        try:
            read_pages(file, header, layer, slot, parts)
        except OSError:
            yield slot
            continue
        yield from header.wrong_slots(layer, slot, [[part] for part in parts])


def _rewrite(writer: PageStore, file: BinaryIO, header: ExtentHeader, broken: tuple[int, ...]) -> None:
    keep = [slot for slot in range(len(header.keys)) if slot not in broken]
    if not keep:
        return
    memory = mmap.mmap(-1, writer.draft_bytes(len(keep), header.owner))
    draft = writer.draft([header.keys[slot] for slot in keep], memory, header.owner)
    # A disk that has given back something wrong may do so again, and what is sealed now counts as right.
    for slot in sorted(copy_pages(file, header, keep, draft)):
        raise OSError(f"{file.name}: page {header.keys[slot].hex()} was read as it was written, and then not")
    writer.publish(draft)
