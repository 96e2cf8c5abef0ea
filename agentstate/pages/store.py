"""The page store of one rank: extent files within a quota, and the index that says which page lies in which of them.

::

    ROOT/FINGERPRINT/RANK/lock                 held by the process that has the store open
    ROOT/FINGERPRINT/RANK/extents/NUMBER.ext   published extents, immutable
    ROOT/FINGERPRINT/RANK/partial/NUMBER.ext   being written; whatever a store finds here at open is a crash's
    ROOT/FINGERPRINT/RANK/index/               see `agentstate.pages.index`

The extents are the truth: at open the index is made to agree with them. Where two extents hold the same page, the
later number wins, and an extent none of whose pages is found through the index any more is deleted.
"""

from __future__ import annotations

import fcntl
import functools
import itertools
import logging
import os
import re
import struct
import threading
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import lmdb

from agentstate.errors import BadExtent, FingerprintMismatch, PageStoreFull, PageStoreLocked, PageStoreUnwritable
from agentstate.pages import files
from agentstate.pages.extent import KEY_BYTES, ExtentDraft, ExtentHeader, ExtentLayout, Geometry, Memory
from agentstate.pages.index import ExtentRecord, IndexChange, PageIndex

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[0-9a-f]{16}\.ext")
# The clock of uses leaves room to order the extents of one use among each other.
_WITHIN = 1 << 20


class Quota(NamedTuple):
    """How much a store may hold: ``max_bytes`` of extents (None: no limit of its own), and never so much that less
    than ``free_fraction`` (0 to 1) of the file system is free."""

    max_bytes: int | None = None
    free_fraction: float = 0.0


UNLIMITED = Quota()


class StoredExtent(NamedTuple):
    """An extent of a store, by its ``number``, which no other extent of an open store ever gets."""

    path: Path
    layout: ExtentLayout
    number: int


class Segment(NamedTuple):
    """``pages`` pages of a request, from its page ``first`` on, side by side in ``extent`` from ``slot`` on."""

    extent: StoredExtent
    slot: int
    pages: int
    first: int


@dataclass
class StoreStats:
    """Counters since open, but for ``pages``, ``extents`` and ``bytes``, which are what is stored now.

    ``pages_evicted_needed`` are those of ``pages_evicted`` that a live manifest needed.
    """

    pages: int = 0
    extents: int = 0
    bytes: int = 0
    pages_written: int = 0
    bytes_written: int = 0
    pages_dropped: int = 0
    pages_evicted: int = 0
    pages_evicted_needed: int = 0
    bad_extents: int = 0


@dataclass(slots=True)
class _Extent:
    """An extent as the store works with it. Its file is deleted when it has no live page and no pin."""

    number: int
    pages: int
    live: int
    file_bytes: int
    mtime_ns: int
    used: int = 0
    pins: int = 0
    pinned_until_s: float = 0.0
    needed: bool = False

    def record(self) -> ExtentRecord:
        return ExtentRecord(self.pages, self.live, self.file_bytes, self.mtime_ns, self.used)


class Pin:
    """The pages of one request, in order, and where they lie: ``segments``. Until `close` they stay there, whatever is
    evicted or merged. A context manager."""

    def __init__(self, store: PageStore, keys: Sequence[bytes], segments: list[Segment], numbers: set[int]):
        self.keys = keys
        self.segments = segments
        self.fingerprint = store.fingerprint
        self._store = store
        self._numbers = numbers

    def copies(self, pages: Iterable[int]) -> list[tuple[bytes, int]]:
        """The copies that are pinned of some of its ``pages``, as `PageStore.drop` takes them."""
        firsts = [segment.first for segment in self.segments]
        return [(self.keys[page], self.segments[bisect_right(firsts, page) - 1].extent.number) for page in pages]

    def close(self) -> None:
        numbers, self._numbers = self._numbers, set()
        self._store._release(numbers)

    def __enter__(self) -> Pin:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class PageStore:
    """Pages by key. Every method may be called from any thread.

    Raises PageStoreLocked when another process has the store open, PageStoreUnwritable when the directory cannot be
    made or written, PageStoreFull when its disk has no room at all, and FingerprintMismatch when ``directory`` holds
    another fingerprint's extents.
    """

    def __init__(self, directory: Path, fingerprint: bytes, geometry: Geometry, quota: Quota = UNLIMITED):
        self.directory = directory
        self.fingerprint = fingerprint
        self.geometry = geometry
        self.quota = quota
        self.stats = StoreStats()
        self._extents_dir = directory / "extents"
        self._partial_dir = directory / "partial"
        # `_writing` is held while the index changes, which may take as long as the disk does; `_mutex` never for
        # longer than a few memory accesses, and it is the inner one.
        self._writing = threading.Lock()
        self._mutex = threading.Lock()
        self._extents: dict[int, _Extent] = {}
        self._used_since: set[int] = set()
        # Pages that the index finds still, because it could not be written when they were dropped.
        self._dropped: dict[bytes, _Extent] = {}
        self._being_written = 0
        self._lock_fd: int | None = None
        try:
            self._open()
        except (OSError, lmdb.Error) as error:
            if files.is_full(error):
                raise PageStoreFull(
                    f"the disk of the page directory {self.directory} is full: make room, or point "
                    "AGENTSTATE_PAGES_DIR at another disk"
                ) from error
            raise PageStoreUnwritable(
                f"the page directory {self.directory} cannot be written ({getattr(error, 'strerror', error)}): "
                "make it writable, or point AGENTSTATE_PAGES_DIR at another directory"
            ) from error

    def _open(self) -> None:
        lock = self._acquire()
        try:
            self._index = PageIndex(self.directory / "index", self.fingerprint, self.geometry)
            try:
                self._load()
            except BaseException:
                self._index.close()
                raise
        except BaseException:
            os.close(lock)
            raise
        self._lock_fd = lock

    def _acquire(self) -> int:
        for directory in (self._extents_dir, self._partial_dir):
            directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for leftover in self._partial_dir.iterdir():
                leftover.unlink()
        except BlockingIOError as error:
            os.close(lock)
            raise PageStoreLocked(
                f"another engine writes to {self.directory}: stop it, or give this one a directory of its own "
                "with AGENTSTATE_PAGES_DIR"
            ) from error
        except BaseException:
            os.close(lock)
            raise
        return lock

    def _load(self) -> None:
        """Make the index agree with the files."""
        records = self._index.records()
        numbers, unknown, gone = [0], [], set(records)
        size_of = functools.cache(self.draft_bytes)
        with os.scandir(self._extents_dir) as entries:
            for entry in entries:
                if _NAME.fullmatch(entry.name) is None:
                    logger.warning("page store: ignoring %s, which is no name of an extent", entry.path)
                    continue
                # A file that cannot be read keeps its number: it may be a later release's.
                number, status = int(entry.name[:16], 16), entry.stat()
                numbers.append(number)
                record = records.get(number)
                if record and _is_of(record, status, size_of):
                    self._extents[number] = _Extent(number, *record)
                    gone.discard(number)
                else:
                    unknown.append(number)
        self._next = max(numbers) + 1
        self._clock = itertools.count(1 + max((known.used for known in self._extents.values()), default=0) // _WITHIN)
        if gone:
            with self._index.change() as change:
                change.delete_pages_of(gone)
                for number in gone:
                    change.forget(number)
        if unknown:
            logger.info("page store: reading the headers of %d extents that the index does not know", len(unknown))
            with self._index.change() as change:
                for number in sorted(unknown):
                    self._adopt(change, number)
        self.stats.bytes = sum(extent.file_bytes for extent in self._extents.values())
        self.stats.pages = sum(extent.live for extent in self._extents.values())
        self._delete(list(self._extents.values()))

    def _adopt(self, change: IndexChange, number: int) -> None:
        """Put an extent that is on the disk into the index."""
        path = self._path(number)
        try:
            header, status = files.read_header(path), path.stat()
        except (BadExtent, OSError) as error:
            self.stats.bad_extents += 1
            logger.warning("page store: ignoring %s: %s", path, error)
            return
        if header.fingerprint != self.fingerprint or header.geometry != self.geometry:
            raise FingerprintMismatch(f"{path} was written for another model or layout than this store's")
        self._extents[number] = _Extent(number, len(header.keys), 0, status.st_size, status.st_mtime_ns)
        for other, pages in self._take_over(change, number, header.keys).items():
            self._extents[other].live += pages

    def _take_over(self, change: IndexChange, number: int, keys: Sequence[bytes]) -> Counter[int]:
        """Let the index find ``keys``, in slot order, in extent ``number``, but for those that a later one has: by how
        much this changes the number of live pages of which extent, once the change is made."""
        gained: Counter[int] = Counter()
        for slot, key in enumerate(keys):
            place = change.place(key)
            if place is not None and place[0] > number:
                continue
            change.put(key, number, slot)
            if place is None or place[0] != number:
                gained[number] += 1
                if place is not None and place[0] in self._extents:
                    gained[place[0]] -= 1
        for other, pages in gained.items():
            record = self._extents[other].record()
            change.record(other, record._replace(live=record.live + pages))
        return gained

    def _delete(self, extents: Iterable[_Extent]) -> None:
        """Delete those of ``extents`` that have no live page, but for those that are pinned: `_release` deletes them.
        The caller holds ``_writing``."""
        free = self._take([extent for extent in extents if not extent.live])
        if free:
            # What the index still knows of a file that is gone is put right at the next open.
            with suppress(lmdb.Error), self._index.change() as change:
                for extent in free:
                    change.forget(extent.number)
            self._unlink(free)
        self._count()

    def _take(self, extents: Iterable[_Extent]) -> list[_Extent]:
        """Make the store forget those of ``extents`` that nothing pins; the caller deletes them."""
        with self._mutex:
            taken = [extent for extent in extents if not extent.pins and extent.number in self._extents]
            for extent in taken:
                del self._extents[extent.number]
        return taken

    def _unlink(self, extents: list[_Extent], *, recycle: bool = False) -> Path | None:
        """Delete the files of extents that the store has forgotten, but for the largest if it is to be recycled: where
        it is now."""
        # Overwriting blocks that the file system has given out already is faster than asking for new ones.
        largest = max(extents, key=lambda extent: extent.file_bytes) if recycle else None
        spare = None
        for extent in extents:
            try:
                if extent is largest:
                    spare = self._recycle(extent)
                else:
                    self._path(extent.number).unlink()
            except FileNotFoundError:
                pass
            except OSError as error:
                logger.warning("page store: %s could not be deleted: %s", self._path(extent.number), error)
                continue
            self.stats.bytes -= extent.file_bytes
        return spare

    def _recycle(self, extent: _Extent) -> Path | None:
        spare = self._partial_dir / f"{extent.number:016x}.spare"
        self._path(extent.number).rename(spare)
        try:
            # Or a power failure might bring the old name back over new content.
            files.sync_directory(self._extents_dir)
        except OSError:
            spare.unlink()
            return None
        return spare

    def _path(self, number: int) -> Path:
        return self._extents_dir / f"{number:016x}.ext"

    def _count(self) -> None:
        self.stats.extents = len(self._extents)

    def __contains__(self, key: bytes) -> bool:
        return any(number in self._extents for number, _ in self._places([key]))

    def _places(self, keys: Sequence[bytes]) -> list[tuple[int, int]]:
        """Where the index says that ``keys`` lie, up to the first that is not stored."""
        try:
            places = self._index.prefix(keys)
        except (lmdb.Error, struct.error) as error:
            self._unreadable(error)
            return []
        if self._dropped:
            return [
                place for place, _ in zip(places, takewhile(lambda key: key not in self._dropped, keys), strict=False)
            ]
        return places

    def _unreadable(self, error: Exception) -> None:
        logger.error("page store: the index of %s cannot be read, nothing is restored: %s", self.directory, error)

    def prefix_length(self, keys: Sequence[bytes], *, use: bool = True) -> int:
        """How many of ``keys``, from the first on, are stored; they count as used, unless ``use`` is false. From
        memory, about a microsecond a key; never waits for the disk or for a writer."""
        places = self._places(keys)
        now = next(self._clock) * _WITHIN
        # The head of a chain is worth more than its end: without it the rest is useless.
        for depth, number in enumerate(dict.fromkeys(number for number, _ in places)):
            if (extent := self._extents.get(number)) is None:
                # Being evicted just now.
                return next(page for page, place in enumerate(places) if place[0] == number)
            if use:
                extent.used = now - depth
                self._used_since.add(number)
        return len(places)

    def stored(self, keys: Sequence[bytes]) -> list[bool]:
        """Of each of ``keys`` whether it is stored, as of one moment. It does not count as used. From memory, about a
        microsecond a key; never waits for the disk or for a writer."""
        try:
            places = self._index.places(keys)
        except (lmdb.Error, struct.error) as error:
            self._unreadable(error)
            return [False] * len(keys)
        return [
            place is not None and place[0] in self._extents and key not in self._dropped
            for key, place in zip(keys, places, strict=True)
        ]

    def pin(self, keys: Sequence[bytes]) -> Pin:
        """Find ``keys`` and keep them where they are. Raises KeyError, with the key, where one is not stored (any
        more)."""
        places = self._places(keys)
        while len(places) == len(keys):
            numbers = {number for number, _ in places}
            with self._mutex:
                missing = {number for number in numbers if number not in self._extents}
                if not missing:
                    for number in numbers:
                        self._extents[number].pins += 1
                    return Pin(self, keys, self._segments(places), numbers)
            # Something was merged or evicted since the look-up.
            before, places = places, self._places(keys)
            if places == before:
                del places[next(page for page, place in enumerate(places) if place[0] in missing) :]
        raise KeyError(keys[len(places)])

    def _segments(self, places: list[tuple[int, int]]) -> list[Segment]:
        found: list[Segment] = []
        last = None
        for page, (number, slot) in enumerate(places):
            if number == last and found[-1].slot + found[-1].pages == slot:
                found[-1] = found[-1]._replace(pages=found[-1].pages + 1)
            else:
                layout = ExtentLayout(self.geometry, self._extents[number].pages)
                found.append(Segment(StoredExtent(self._path(number), layout, number), slot, 1, page))
            last = number
        return found

    def _release(self, numbers: set[int]) -> None:
        with self._mutex:
            pinned = [self._extents[number] for number in numbers]
            for extent in pinned:
                extent.pins -= 1
            dead = [extent for extent in pinned if not extent.live]
        if dead:
            with self._writing:
                if self._lock_fd is not None:
                    self._delete(dead)

    def pin_for(self, keys: Iterable[bytes], seconds: float) -> None:
        """Do not evict those of ``keys`` that are stored for that long, unless the process ends before: a pin is not
        persisted, and follows no clock that can be set. ``seconds`` of zero end a pin."""
        until = time.monotonic() + seconds
        with self._writing:
            for number in self._index.numbers(keys) & self._extents.keys():
                self._extents[number].pinned_until_s = until

    def need(self, keys: Iterable[bytes], *, only: bool = False) -> None:
        """Declare that a live manifest needs ``keys``: what nothing needs is evicted first. ``only``: nothing else
        is needed any more. Not persisted."""
        with self._writing:
            numbers = self._index.numbers(keys)
            for number in list(self._extents) if only else numbers & self._extents.keys():
                self._extents[number].needed = number in numbers

    def collect(self) -> int:
        """Evict everything that no live manifest needs and that is not pinned: how many bytes it was."""
        with self._writing:
            before = self.stats.bytes
            self._evict(self._take([extent for extent in self._evictable() if not extent.needed]))
            return before - self.stats.bytes

    def make_room(self, n_bytes: int) -> None:
        """Evict until ``n_bytes`` more fit the quota: what no live manifest needs before what one does, then the least
        recently used. Raises PageStoreFull, and evicts nothing, when all that may be evicted would not be enough."""
        with self._writing:
            self._make_room(n_bytes)

    def require_room(self, n_bytes: int) -> None:
        """Raise PageStoreFull when there could be no room for ``n_bytes`` more, whatever was evicted for them. Evicts
        nothing: who publishes them does, and writes over what was evicted."""
        with self._writing:
            lacking = self._excess(n_bytes)
            if lacking > 0 and lacking > sum(extent.file_bytes for extent in self._evictable()):
                raise self._full(n_bytes)

    def _excess(self, n_bytes: int) -> float:
        """How far ``n_bytes`` more would exceed the quota."""
        status = os.statvfs(self.directory)
        free = status.f_bavail * status.f_frsize - self.quota.free_fraction * status.f_blocks * status.f_frsize
        excess = n_bytes + self._being_written - free
        if self.quota.max_bytes is not None:
            excess = max(excess, self.stats.bytes + n_bytes + self._being_written - self.quota.max_bytes)
        return excess

    def _full(self, n_bytes: int) -> PageStoreFull:
        return PageStoreFull(
            f"no room for {n_bytes:,} bytes of KV pages in {self.directory}: {self.stats.bytes:,} are stored, "
            "and what is left of them cannot be evicted"
        )

    def _make_room(self, n_bytes: int, *, recycle: bool = False) -> Path | None:
        excess = self._excess(n_bytes)
        victims: list[_Extent] = []
        # More than once only where something was pinned in the meantime.
        while (lacking := excess - sum(victim.file_bytes for victim in victims)) > 0:
            chosen: list[_Extent] = []
            for extent in sorted(self._evictable(), key=lambda extent: (extent.needed, extent.used)):
                if lacking <= 0:
                    break
                chosen.append(extent)
                lacking -= extent.file_bytes
            if lacking > 0:
                with self._mutex:
                    self._extents.update({victim.number: victim for victim in victims})
                raise self._full(n_bytes)
            victims += self._take(chosen)
        return self._evict(victims, recycle=recycle)

    def _evictable(self) -> list[_Extent]:
        now = time.monotonic()
        with self._mutex:
            return [extent for extent in self._extents.values() if not extent.pins and extent.pinned_until_s <= now]

    def _evict(self, victims: list[_Extent], *, recycle: bool = False) -> Path | None:
        """Delete extents that `_take` took, but for one if it is to be recycled: where it is now."""
        if not victims:
            return None
        try:
            self._forget_pages_of(victims)
        except lmdb.Error as error:
            # No room for the index to say so. Look-ups pass over what is not in `_extents`.
            logger.warning("page store: the index of %s could not be written: %s", self.directory, error)
        for extent in victims:
            self.stats.pages -= extent.live
            self.stats.pages_evicted += extent.live
            self.stats.pages_evicted_needed += extent.live if extent.needed else 0
        spare = self._unlink(victims, recycle=recycle)
        self._count()
        return spare

    def _forget_pages_of(self, extents: Iterable[_Extent]) -> None:
        unreadable = set()
        with self._index.change() as change:
            for extent in extents:
                change.forget(extent.number)
                try:
                    keys = files.read_header(self._path(extent.number)).keys
                except (BadExtent, OSError):
                    unreadable.add(extent.number)
                    continue
                for key in keys:
                    place = change.place(key)
                    if place is not None and place[0] == extent.number:
                        change.delete(key)
            if unreadable:
                change.delete_pages_of(unreadable)

    def pages_within(self, budget_bytes: int) -> int:
        """The most pages whose draft fits ``budget_bytes``; 1 at the least."""
        per_page = self.geometry.page_bytes + 8 * self.geometry.layers + KEY_BYTES
        pages = max(1, budget_bytes // per_page)
        while pages > 1 and self.draft_bytes(pages) > budget_bytes:
            pages -= 1
        return pages

    def draft_bytes(self, pages: int) -> int:
        return ExtentLayout(self.geometry, pages).file_bytes

    def draft(self, keys: list[bytes], buffer: Memory) -> ExtentDraft:
        """An extent of ``keys`` to fill, in ``buffer``, which must hold `draft_bytes` of them. Raises ValueError
        for keys of another length than 32 bytes."""
        return ExtentDraft(self.fingerprint, self.geometry, keys, buffer)

    def publish(self, draft: ExtentDraft) -> None:
        """Make the draft's pages durable and findable: written, `fdatasync`, renamed, directory synced, indexed.

        A reader, and a store opened after a crash, sees all of the extent or nothing. Raises PageStoreFull when there
        is no room and OSError when the disk fails; then nothing of the draft is stored.
        """
        header, data = draft.seal()
        with self._writing:
            spare = self._make_room(len(data), recycle=True)
            number, self._next = self._next, self._next + 1
            self._being_written += len(data)
        final = self._path(number)
        try:
            try:
                mtime_ns = files.publish(self._partial_dir / final.name, final, data, spare)
            finally:
                self._writing.acquire()
                self._being_written -= len(data)
            self._enter(number, header, len(data), mtime_ns)
        except (OSError, lmdb.Error) as error:
            with suppress(OSError):
                final.unlink(missing_ok=True)
            if files.is_full(error):
                raise PageStoreFull(f"no room for {len(data):,} bytes of KV pages in {self.directory}") from error
            if isinstance(error, lmdb.Error):
                raise OSError(f"the index of {self.directory} could not be written: {error}") from error
            raise
        finally:
            self._writing.release()

    def _enter(self, number: int, header: ExtentHeader, file_bytes: int, mtime_ns: int) -> None:
        entered = _Extent(number, len(header.keys), 0, file_bytes, mtime_ns, used=next(self._clock) * _WITHIN)
        # First, or a look-up might find a page whose extent is not known yet.
        self._extents[number] = entered
        try:
            with self._index.change() as change:
                for key, extent in self._dropped.items():
                    change.delete(key)
                    if extent.number in self._extents:
                        change.record(extent.number, extent.record())
                    else:
                        change.forget(extent.number)
                gained = self._take_over(change, number, header.keys)
                recent, self._used_since = self._used_since, set()
                for other in (recent - gained.keys()) & self._extents.keys():
                    change.record(other, self._extents[other].record())
        except BaseException:
            del self._extents[number]
            raise
        self._dropped.clear()
        for other, pages in gained.items():
            extent = self._extents[other]
            extent.live += pages
            # Whoever needs or pinned a page does so wherever it lies.
            entered.needed |= extent.needed
            entered.pinned_until_s = max(entered.pinned_until_s, extent.pinned_until_s)
        self.stats.bytes += file_bytes
        self.stats.pages += gained.total()
        self.stats.pages_written += len(header.keys)
        self.stats.bytes_written += file_bytes
        # Of what was entered too: a later extent may have been entered before, and have all of its pages.
        self._delete([entered, *(self._extents[other] for other in gained if other != number)])
        self._count()

    def drop(self, wrong: Iterable[tuple[bytes, int]]) -> int:
        """Stop serving copies of pages whose bytes turned out wrong, each named by its key and the number of the extent
        that it lies in: how many pages are not stored any more.

        In one transaction. A page that a later extent serves by now stays: that copy is another. A page that was
        dropped is written anew when it has been computed again.
        """
        with self._writing:
            copies = [copy for copy in dict.fromkeys(wrong) if copy[0] not in self._dropped]
            try:
                places = self._index.places(key for key, _ in copies)
            except (lmdb.Error, struct.error) as error:
                self._unreadable(error)
                return 0
            found = {
                key: self._extents[number]
                for (key, number), place in zip(copies, places, strict=True)
                if place is not None and place[0] == number and number in self._extents
            }
            if not found:
                return 0
            gone = Counter(extent.number for extent in found.values())
            try:
                with self._index.change() as change:
                    for key in found:
                        change.delete(key)
                    for number, pages in gone.items():
                        record = self._extents[number].record()
                        change.record(number, record._replace(live=record.live - pages))
            except lmdb.Error as error:
                logger.warning("page store: the index of %s could not be written: %s", self.directory, error)
                self._dropped.update(found)
            for number, pages in gone.items():
                self._extents[number].live -= pages
            self.stats.pages -= len(found)
            self.stats.pages_dropped += len(found)
            self._delete([self._extents[number] for number in gone])
            return len(found)

    def close(self) -> None:
        """Close the store; what is pinned stays readable through the files that are open. May be called again."""
        with self._writing:
            if self._lock_fd is None:
                return
            with suppress(lmdb.Error), self._index.change() as change:
                for number in self._used_since & self._extents.keys():
                    change.record(number, self._extents[number].record())
            self._index.close()
            lock, self._lock_fd = self._lock_fd, None
            os.close(lock)


def _is_of(record: ExtentRecord, status: os.stat_result, size_of: Callable[[int], int]) -> bool:
    """Whether a record tells of the file that is there, and is not garbage."""
    return (
        (record.file_bytes, record.mtime_ns) == (status.st_size, status.st_mtime_ns)
        and record.live <= record.pages < record.file_bytes
        and size_of(record.pages) == record.file_bytes
        and record.used < 1 << 62
    )
