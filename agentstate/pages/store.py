"""The page store of one rank: extent files within a quota, and the index that says which page lies in which of them.

::

    ROOT/FINGERPRINT/RANK/lock                 held by the process that has the store open
    ROOT/FINGERPRINT/RANK/extents/NUMBER.ext   published extents, immutable
    ROOT/FINGERPRINT/RANK/partial/NUMBER.ext   being written; whatever a store finds here at open is a crash's
    ROOT/FINGERPRINT/RANK/index/               see `agentstate.pages.index`

The extents are the truth: at open the index is made to agree with them. Where two extents hold the same page, the
later number wins, and an extent none of whose pages is found through the index any more is deleted.

Pages are erased in two steps. `PageStore.remove` takes them out of the index: from then on they are missing to whoever
asks. `PageStore.scrub` then writes what is left of their extents anew and deletes the old files, so that no file of the
store has a byte of them. Keys, which are hashes, may stay in what LMDB has freed. What a file system keeps of deleted
files is not this store's: blocks that were freed, snapshots, and the cells that a drive has levelled.
"""

from __future__ import annotations

import functools
import logging
import mmap
import os
import re
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import lmdb

from agentstate.errors import (
    BadExtent,
    FingerprintMismatch,
    PageStoreError,
    PageStoreFull,
    PageStoreUnwritable,
    UnknownFormat,
)
from agentstate.pages import files, recoding, rewriting
from agentstate.pages.changes import Changes
from agentstate.pages.codec import Codec
from agentstate.pages.directory import StoreDirectory
from agentstate.pages.eviction import ANYONE, Extent
from agentstate.pages.extent import ExtentDraft, ExtentHeader, ExtentLayout, Geometry, Memory
from agentstate.pages.index import DAMAGE, ExtentRecord, IndexChange, PageIndex, Run
from agentstate.pages.keys import KEY_BYTES, PageKeys
from agentstate.pages.pins import NeededExtent, Pin, Segment, StoredExtent
from agentstate.pages.space import MAKE_ROOM, UNLIMITED, Quota, Space, StoreStats
from agentstate.pages.wear import Wear

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[0-9a-f]{16}\.ext")
# What is made free, where there is nothing, before a store is opened.
_TO_OPEN_BYTES = 1 << 20
# Pairs of an extent and a session that needs it that are remembered: some 50 MiB.
_MOST_TOLD = 1 << 19
# How long `scrub` waits for files that are being written over what was evicted.
_WRITING_OVER_S = 1.0


class PageStore:
    """Pages by key. Every method may be called from any thread.

    With ``rows``, rows of the pages that it writes can be read alone (`rows.RowReader`); such pages are not coded.

    Raises PageStoreLocked when another process has the store open, PageStoreUnwritable when the directory cannot be
    made or written, PageStoreFull when its disk has no room at all, and FingerprintMismatch when ``directory`` holds
    another fingerprint's extents. What is published is coded by ``codec`` where that makes it smaller; what was by
    another is read all the same.
    """

    def __init__(
        self,
        directory: Path,
        fingerprint: bytes,
        geometry: Geometry,
        quota: Quota = UNLIMITED,
        *,
        space: Space | None = None,
        codec: Codec = "raw",
        rows: bool = False,
    ):
        self.directory = directory
        self.fingerprint = fingerprint
        self.geometry = geometry
        self._rows = rows
        self.stats = StoreStats()
        # Is told which pages leave the store, where somebody wants to know.
        self.changes: Changes | None = None
        # Is told of each extent that is evicted, by the pages that were found in it. It must not call the store.
        self.evicted: Callable[[Extent, Sequence[bytes]], None] | None = None
        self._codec = codec
        self._directory = StoreDirectory(directory)
        self._space = Space(quota) if space is None else space
        # `_writing` is held while the index changes, which may take as long as the disk does, and by one store of a
        # space at a time; `_mutex` never for longer than a few memory accesses, and it is the inner one.
        self._writing = self._space.lock
        self._mutex = threading.Lock()
        self._extents: dict[int, Extent] = {}
        # The bytes of each owner, with files that could not be deleted.
        self._held: Counter[str] = Counter()
        self._pinned: set[Extent] = set()
        self._retained: set[Extent] = set()
        # How often it was told what is needed, and how much of that is remembered.
        self._telling = self._told = 0
        self._losers: set[str] = set()
        self._used_since: set[int] = set()
        # Pages that the index finds still, because it could not be written when they were dropped.
        self._dropped: dict[bytes, Extent] = {}
        # Extents with a page that was wrong are looked up page by page, whatever is counted as live in them.
        self._doubted: set[int] = set()
        # What `scrub` looks after beside extents: files that could not be deleted or that are damaged, by their
        # numbers, what is being written, and of that what is written over the blocks of an evicted extent.
        self._undeleted: set[int] = set()
        self._being_written: set[int] = set()
        self._written_over: set[int] = set()
        self._write_ended = threading.Condition(self._mutex)
        self._scrubbing = threading.Lock()
        self._next = 1
        self._closed = False
        with self._writing:
            try:
                try:
                    self._open()
                except (OSError, lmdb.Error) as error:
                    if not files.is_full(error):
                        raise
                    # Of other engines' pages, perhaps.
                    self._space.evict_siblings(self, _TO_OPEN_BYTES)
                    self._open()
                self._space.join(self)
                self._space.evict_siblings(self)
            except (OSError, lmdb.Error) as error:
                raise self._unusable(error) from error

    def _unusable(self, error: OSError | lmdb.Error) -> PageStoreFull | PageStoreUnwritable:
        if files.is_full(error):
            return PageStoreFull(
                f"the disk of the page directory {self.directory} is full: make room, or point "
                "AGENTSTATE_PAGES_DIR at another disk"
            )
        return PageStoreUnwritable(
            f"the page directory {self.directory} cannot be written ({getattr(error, 'strerror', error)}): "
            "make it writable, or point AGENTSTATE_PAGES_DIR at another directory"
        )

    @property
    def quota(self) -> Quota:
        """How much it may hold, with all that share its room."""
        return self._space.quota

    @quota.setter
    def quota(self, quota: Quota) -> None:
        self._space.quota = quota

    @property
    def wear(self) -> Wear:
        """How much is written to its drive."""
        return self._space.wear

    def _open(self) -> None:
        self._directory.acquire()
        try:
            self._index = PageIndex(self._directory.index, self.fingerprint, self.geometry)
            try:
                before, self._extents = self._extents, {}
                self._load(before)
            except BaseException:
                self._index.close()
                raise
        except BaseException:
            self._directory.release()
            raise
        self._directory.touch()
        self._directory.opened()

    def attend(self) -> None:
        """Look whether the directory is still the one that was opened, with a few system calls. Where it was deleted or
        replaced, or its index turned out damaged, open it anew: what is not there any more is lost, and storing goes
        on.

        Raises PageStoreError where it cannot be opened; then nothing is found in it until it can.
        """
        with self._writing:
            self._attend()

    def _attend(self) -> None:
        if self._closed:
            return
        try:
            if self._directory.intact():
                return
        except OSError as error:
            raise self._unusable(error) from error
        pages, why = self.stats.pages, "was deleted or replaced while it was in use"
        why = why if self._directory.known else "could not be used for a while"
        self._directory.condemn()
        self._index.close()
        self._leave_order()
        try:
            self._open()
        except (OSError, lmdb.Error, PageStoreError) as error:
            self._extents, self.stats.pages, self.stats.bytes = {}, 0, 0
            self._count()
            raise self._unusable(error) if isinstance(error, OSError | lmdb.Error) else error from None
        finally:
            with self._mutex:
                self._losers.add(ANYONE)
            self._note(None)
            self.stats.pages_vanished += max(0, pages - self.stats.pages)
        self._space.keep_node()
        left = self.stats.pages
        logger.error("page store: %s %s: opened anew, with %d of %d pages", self.directory, why, left, pages)

    def _note(self, gone: Collection[bytes] | None) -> None:
        """These pages are not found any more; None: any may not be."""
        if self.changes is None:
            return
        if gone is None:
            self.changes.note_any()
        else:
            self.changes.note(gone)

    def _leave_order(self) -> None:
        for extent in self._extents.values():
            self._space.remove(extent)
        for owner, n_bytes in list(self._held.items()):
            self._hold(owner, -n_bytes)
        self._told = 0

    def _hold(self, owner: str, n_bytes: int) -> None:
        self._held[owner] += n_bytes
        self._space.hold(owner, n_bytes)

    def _load(self, before: Mapping[int, Extent]) -> None:
        """Make the index agree with the files. Those of ``before`` that are there still stay the extents that they
        were, with their pins."""
        records = self._index.records()
        owners = self._index.owners(records)
        numbers, unknown, gone = [0], [], set(records)
        self._undeleted.clear()
        sizes_of = functools.cache(self._sizes_of)
        with os.scandir(self._directory.extents) as entries:
            for entry in entries:
                if _NAME.fullmatch(entry.name) is None:
                    logger.warning("page store: ignoring %s, which is no name of an extent", entry.path)
                    continue
                # A file that cannot be read keeps its number: it may be a later release's.
                number, status = int(entry.name[:16], 16), entry.stat()
                numbers.append(number)
                record, owner = records.get(number), owners.get(number, "")
                if record and _is_of(record, Path(entry.path), status, owner, sizes_of):
                    known = Extent(number, *record, owner=owner)
                    self._extents[number] = _recognized(before.get(number), known)
                    gone.discard(number)
                else:
                    unknown.append(number)
        self._next = max(self._next, *(number + 1 for number in numbers))
        self._space.not_before(max((known.used for known in self._extents.values()), default=0))
        if gone:
            with self._index.change() as change:
                change.delete_pages_of(gone)
                for number in gone:
                    change.forget(number)
        if unknown:
            logger.info("page store: reading the headers of %d extents that the index does not know", len(unknown))
            with self._index.change() as change:
                for number in sorted(unknown):
                    self._adopt(change, number, before)
        self.stats.bytes = sum(extent.file_bytes for extent in self._extents.values())
        self.stats.pages = sum(extent.live for extent in self._extents.values())
        for extent in self._extents.values():
            self._hold(extent.owner, extent.file_bytes)
        self._delete(list(self._extents.values()))
        for extent in self._extents.values():
            self._told += len(extent.needed_by)
            self._space.add(self, extent)
        self._drop_again()

    def _drop_again(self) -> None:
        dropped, self._dropped = self._dropped, {}
        for (key, extent), place in zip(dropped.items(), self._index.places(dropped), strict=True):
            if place is not None and place[0] == extent.number and self._has(extent):
                self._dropped[key] = extent
                extent.live -= 1
                self.stats.pages -= 1

    def _adopt(self, change: IndexChange, number: int, before: Mapping[int, Extent]) -> None:
        """Put an extent that is on the disk into the index."""
        path = self._directory.extent(number)
        try:
            header, status = files.read_header(path), path.stat()
        except (BadExtent, OSError) as error:
            self.stats.bad_extents += 1
            logger.warning("page store: ignoring %s: %s", path, error)
            if isinstance(error, BadExtent) and not isinstance(error, UnknownFormat):
                self._undeleted.add(number)
            return
        if header.fingerprint != self.fingerprint or header.geometry != self.geometry:
            raise FingerprintMismatch(
                f"{path} was written for another model or layout than this store's: delete it or move it away, or "
                "point AGENTSTATE_PAGES_DIR at another directory"
            )
        found = Extent(number, len(header.keys), 0, status.st_size, status.st_mtime_ns, owner=header.owner)
        self._extents[number] = _recognized(before.get(number), found)
        change.own(number, found.mtime_ns, found.owner)
        for other, pages in self._take_over(change, number, header.keys).items():
            self._extents[other].live += pages

    def _take_over(self, change: IndexChange, number: int, keys: Sequence[bytes]) -> Counter[int]:
        """Let the index find ``keys``, in slot order, in extent ``number``, but for those that a later one has: by how
        much this changes the number of live pages of which extent, once the change is made."""
        slots = {key: slot for slot, key in enumerate(keys)}
        gained: Counter[int] = Counter()
        known = 0
        for key, (other, _) in change.places(slots).items():
            if other > number:
                del slots[key]
            elif other == number:
                known += 1
            elif other in self._extents:
                gained[other] -= 1
        change.put(number, slots)
        change.list_keys(number, PageKeys.of(keys))
        if len(slots) > known:
            gained[number] = len(slots) - known
        for other, pages in gained.items():
            record = self._extents[other].record()
            change.record(other, record._replace(live=record.live + pages))
        return gained

    def _delete(self, extents: Iterable[Extent]) -> None:
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

    def _take(self, extents: Iterable[Extent]) -> list[Extent]:
        """Make the store forget those of ``extents`` that nothing pins; the caller deletes them."""
        return [extent for extent in extents if self.take(extent)]

    def _unlink(self, extents: list[Extent], *, recycle: bool = False) -> tuple[Path | None, OSError | None]:
        """Delete the files of extents that the store has forgotten, but for the largest if it is to be recycled: where
        it is now, and why others are there still, if they are."""
        # Overwriting blocks that the file system has given out already is faster than asking for new ones.
        largest = max(extents, key=lambda extent: extent.file_bytes) if recycle else None
        spare = failure = None
        for extent in extents:
            path = self._directory.extent(extent.number)
            try:
                if extent is largest:
                    spare = self._recycle(extent)
                else:
                    path.unlink()
            except FileNotFoundError:
                pass
            except OSError as error:
                if failure is None:
                    logger.warning("page store: %s could not be deleted: %s", path, error)
                failure = error
                self._undeleted.add(extent.number)
                continue
            self.stats.bytes -= extent.file_bytes
            self._hold(extent.owner, -extent.file_bytes)
        return spare, failure

    def _recycle(self, extent: Extent) -> Path | None:
        spare = self._directory.spare(extent.number)
        self._directory.extent(extent.number).rename(spare)
        try:
            # Or a power failure might bring the old name back over new content.
            files.sync_directory(self._directory.extents)
        except OSError:
            spare.unlink()
            return None
        return spare

    def _count(self) -> None:
        self.stats.extents = len(self._extents)

    def __contains__(self, key: bytes) -> bool:
        return any(run.number in self._extents for run in self._runs(PageKeys.of([key])))

    def _runs(self, keys: PageKeys, *, gaps: bool = False) -> list[Run]:
        """Where the index says that ``keys`` lie, up to the first that is not stored, or with ``gaps`` all that are."""
        try:
            return self._index.runs(keys, whole=self._is_whole, hidden=self._dropped, gaps=gaps)
        except (lmdb.Error, struct.error) as error:
            self._unreadable(error)
            return []

    def _is_whole(self, number: int) -> bool:
        # What was written again, merged or dropped is not live, and an extent never gains such a page back.
        extent = self._extents.get(number)
        return extent is not None and extent.live == extent.pages and number not in self._doubted

    def _unreadable(self, error: Exception) -> None:
        if self._directory.known and not self._closed:
            logger.error("page store: the index of %s cannot be read, nothing is restored: %s", self.directory, error)
            # `attend` makes it anew.
            if isinstance(error, (*DAMAGE, struct.error)):
                self._index.condemn()
            self._directory.condemn()

    def _unwritable(self, error: lmdb.Error) -> None:
        logger.warning("page store: the index of %s could not be written: %s", self.directory, error)
        if isinstance(error, DAMAGE):
            self._index.condemn()
            self._directory.condemn()

    def prefix_length(self, keys: Sequence[bytes], *, use: bool = True) -> int:
        """How many of ``keys``, from the first on, are stored; they count as used, unless ``use`` is false. From
        memory, a few microseconds an extent; never waits for the disk or for a writer."""
        runs = self._runs(PageKeys.of(keys))
        now = self._space.now()
        # The head of a chain is worth more than its end: without it the rest is useless.
        for depth, number in enumerate(dict.fromkeys(run.number for run in runs)):
            if (extent := self._extents.get(number)) is None:
                # Being evicted just now.
                return next(run.first for run in runs if run.number == number)
            if use:
                extent.used = now - 1 - depth
                self._used_since.add(number)
        return runs[-1].first + runs[-1].pages if runs else 0

    def stored(self, keys: Sequence[bytes]) -> list[bool]:
        """Of each of ``keys`` whether it is stored, as of one moment. It does not count as used. From memory, about a
        microsecond a key; never waits for the disk or for a writer."""
        stored = [False] * len(keys)
        for run in self._runs(PageKeys.of(keys), gaps=True):
            if run.number in self._extents:
                stored[run.first : run.first + run.pages] = [True] * run.pages
        return stored

    def extent_names(self, keys: Sequence[bytes]) -> list[str | None]:
        """Of each of ``keys`` the name of the extent file that it is read from; None where it is not stored. Like
        `stored`."""
        names: list[str | None] = [None] * len(keys)
        for run in self._runs(PageKeys.of(keys), gaps=True):
            if run.number in self._extents:
                names[run.first : run.first + run.pages] = [self._directory.extent(run.number).name] * run.pages
        return names

    def pin(self, keys: Sequence[bytes]) -> Pin:
        """Find ``keys`` and keep them where they are. Raises KeyError, with the key, where one is not stored (any
        more)."""
        keys = PageKeys.of(keys)
        runs = self._runs(keys)
        while (found := runs[-1].first + runs[-1].pages if runs else 0) == len(keys):
            numbers = {run.number for run in runs}
            with self._mutex:
                missing = {number for number in numbers if number not in self._extents}
                if not missing:
                    extents = [self._extents[number] for number in numbers]
                    for extent in extents:
                        extent.pins += 1
                    self._pinned.update(extents)
                    return Pin(self.fingerprint, keys, self._segments(runs), functools.partial(self._release, extents))
            # Something was merged or evicted since the look-up.
            before, runs = runs, self._runs(keys)
            if runs == before:
                found = next(run.first for run in runs if run.number in missing)
                break
        raise KeyError(keys[found])

    def extents(self, after: int = 0) -> list[StoredExtent]:
        """What is stored, in the order of being written, but for extents up to number ``after``. From memory."""
        with self._mutex:
            numbers = sorted(number for number in self._extents if number > after)
            return [self._stored_extent(self._extents[number]) for number in numbers]

    def _stored_extent(self, extent: Extent) -> StoredExtent:
        layout = ExtentLayout.of_file(self.geometry, extent.pages, extent.owner, extent.file_bytes)
        return StoredExtent(self._directory.extent(extent.number), layout, extent.number)

    @property
    def pinned(self) -> int:
        """How many extents a pin keeps where they are."""
        return len(self._pinned)

    def _segments(self, runs: list[Run]) -> list[Segment]:
        extents: dict[int, StoredExtent] = {}
        for number in dict.fromkeys(run.number for run in runs):
            extents[number] = self._stored_extent(self._extents[number])
        return [Segment(extents[run.number], run.slot, run.pages, run.first) for run in runs]

    def _release(self, extents: list[Extent]) -> None:
        with self._mutex:
            for extent in extents:
                extent.pins -= 1
                if not extent.pins:
                    self._pinned.discard(extent)
            dead = [extent for extent in extents if not extent.live]
        if dead:
            with self._writing:
                if not self._closed:
                    self._delete(dead)

    def retain(self, keys: Sequence[bytes], until_s: float) -> int:
        """Do not evict those of ``keys`` that are stored before ``until_s`` of `time.monotonic`; a time in the past
        ends that. Of how many keys, from the first on, this was done: at most half of the room is retained, and at most
        half of what an owner with a limit may have; what exceeds that is not.

        Not persisted. What is retained may be erased, and is dropped when it is wrong.
        """
        now = time.monotonic()
        with self._writing:
            places = self._places(keys)
            left: dict[str | None, float] = {}
            for position, place in enumerate(places):
                extent = self._extents.get(place[0]) if place is not None else None
                if extent is None or extent.retained_until_s == until_s:
                    continue
                if extent.retained_until_s <= now < until_s:
                    for owner in (None, extent.owner):
                        if owner not in left:
                            left[owner] = self._space.retainable(self, owner)
                    if extent.file_bytes > min(left[None], left[extent.owner]):
                        return position
                    left[None] -= extent.file_bytes
                    left[extent.owner] -= extent.file_bytes
                with self._mutex:
                    extent.retained_until_s = until_s
                    self._retained.add(extent)
            return len(places)

    def release(self, keys: Sequence[bytes], session: str | None = None) -> None:
        """Nobody goes on from those of ``keys`` that are stored: an extent that consists of such pages is evicted
        before any other. One that another ``session`` needs (None: that several need) stays as it is, and one that is
        used again gets its turn back. Not persisted."""
        with self._writing:
            now = self._space.now()
            for key, place in zip(keys, self._places(keys), strict=False):
                extent = self._extents.get(place[0]) if place is not None else None
                if extent is None or key in self._dropped:
                    continue
                others = extent.needed_by.keys() - {session}
                if ANYONE in others or len(others) > (session is None):
                    continue
                extent.release(key, now)
                if extent.released:
                    self._space.hasten(extent)

    def _places(self, keys: Iterable[bytes]) -> list[tuple[int, int] | None]:
        try:
            return self._index.places(keys)
        except (lmdb.Error, struct.error) as error:
            self._unreadable(error)
            return []

    def need(self, keys: Iterable[bytes], session: str = ANYONE) -> None:
        """Declare that the live manifest of a session needs ``keys``: what nothing needs is evicted first. Not
        persisted."""
        with self._writing:
            for extent in self._extents_of(keys):
                extent.let_go.clear()
                self._remember(extent, [session])

    @contextmanager
    def needing_only(self) -> Iterator[None]:
        """What `need` does not say while this is open, nor before in another `needing_only` that is open, is needed no
        more at the end; unless that is an exception. To be open once at a time."""
        with self._writing:
            self._telling += 1
        yield
        with self._writing:
            for extent in self._extents.values():
                before = [session for session, told in extent.needed_by.items() if told < self._telling]
                for session in before:
                    del extent.needed_by[session]
                self._told -= len(before)
                if before:
                    self._space.hasten(extent)

    def take_losers(self) -> set[str]:
        """The sessions whose manifests may have lost pages since this was asked last, because they were evicted or
        dropped; with `ANYONE` in it, it may be any other. Never waits for the disk."""
        with self._mutex:
            losers, self._losers = self._losers, set()
        return losers

    def _extents_of(self, keys: Iterable[bytes]) -> list[Extent]:
        """The extents that hold those of ``keys`` that are stored."""
        try:
            numbers = self._index.numbers(keys)
        except (lmdb.Error, struct.error) as error:
            self._unreadable(error)
            return []
        return [self._extents[number] for number in numbers if number in self._extents]

    def _remember(self, extent: Extent, sessions: Iterable[str]) -> None:
        before = len(extent.needed_by)
        extent.needed_by.update(dict.fromkeys(sessions, self._telling))
        self._told += len(extent.needed_by) - before
        if self._told > _MOST_TOLD and len(extent.needed_by) > 1:
            self._told -= len(extent.needed_by) - 1
            extent.needed_by = {ANYONE: self._telling}

    def collect(self) -> int:
        """Evict everything that no live manifest needs and that is not pinned: how many bytes it was."""
        with self._writing:
            before = self.stats.bytes
            unneeded = [extent for extent in self._extents.values() if not extent.needed_by and self.evictable(extent)]
            self.evict(self._take(unneeded))
            return before - self.stats.bytes

    def make_room(self, n_bytes: int) -> None:
        """Evict until ``n_bytes`` more fit the quota: what owners have beyond their limits first, then what no live
        manifest needs before what one does, then the least recently used, of all stores that share the room. Raises
        PageStoreFull, and evicts nothing, when all that may be evicted would not be enough."""
        with self._writing:
            self._space.make(self, n_bytes)

    def require_room(self, n_bytes: int, owner: str | None = None) -> None:
        """Raise PageStoreFull when there could be no room for ``n_bytes`` more, whatever was evicted for them, and
        OwnerFull when the limit of their ``owner`` forbids them. Evicts nothing: who publishes them does, and writes
        over what was evicted."""
        with self._writing:
            self._attend()
            self._space.require(self, n_bytes, owner)

    def next_evicted(self, n_bytes: int) -> list[NeededExtent]:
        """Which extents would be evicted if ``n_bytes`` more came to the stores that share the room, in that order; of
        these, what somebody may come back for: a live manifest needs it, or it was used again after it was written.
        Looks ahead over an eighth of the room at most."""
        with self._writing:
            if self._closed:
                return []
            next_ = self._space.next_evicted(self, n_bytes)
            return [self._needed_extent(extent) for store, extent in next_ if store is self and extent.worth_keeping]

    def needed(self, keys: Iterable[bytes]) -> list[NeededExtent]:
        """The extents that hold those of ``keys`` that are stored, and that somebody may come back for."""
        with self._writing:
            found = [] if self._closed else self._extents_of(keys)
            return [self._needed_extent(extent) for extent in found if extent.worth_keeping]

    def _needed_extent(self, extent: Extent) -> NeededExtent:
        return NeededExtent(self._stored_extent(extent), frozenset(extent.needed_by))

    # What `Space` asks for; it holds the lock.

    def evictable(self, extent: Extent) -> bool:
        return not extent.pins and extent.retained_until_s <= time.monotonic()

    def evictable_bytes(self) -> int:
        """Bytes of what is not pinned. It takes no longer than there are pins."""
        now = time.monotonic()
        with self._mutex:
            self._retained = {
                extent for extent in self._retained if extent.retained_until_s > now and self._has(extent)
            }
            return self.stats.bytes - sum(extent.file_bytes for extent in self._pinned | self._retained)

    def retained_bytes(self, owner: str | None) -> int:
        """Bytes of an owner, or of all, that are retained."""
        now = time.monotonic()
        with self._mutex:
            retained = [extent for extent in self._retained if extent.retained_until_s > now and self._has(extent)]
        return sum(extent.file_bytes for extent in retained if owner is None or extent.owner == owner)

    def pinned_bytes(self, owner: str) -> int:
        """Bytes of an owner that are pinned. It takes no longer than there are pins."""
        with self._mutex:
            pinned = [extent for extent in self._pinned | self._retained if extent.owner == owner]
        return sum(extent.file_bytes for extent in pinned if self._has(extent) and not self.evictable(extent))

    def _has(self, extent: Extent) -> bool:
        return self._extents.get(extent.number) is extent

    def take(self, extent: Extent) -> bool:
        """Forget an extent, which the caller deletes; False where it is pinned or is none any more."""
        with self._mutex:
            if extent.pins or not self._has(extent):
                return False
            del self._extents[extent.number]
        self._told -= len(extent.needed_by)
        self._space.remove(extent)
        return True

    def put_back(self, extent: Extent) -> None:
        """An extent that was taken is not deleted."""
        with self._mutex:
            self._extents[extent.number] = extent
        self._told += len(extent.needed_by)
        self._space.add(self, extent)

    def evict(self, victims: list[Extent], *, recycle: bool = False) -> Path | None:
        """Delete extents that were taken, but for one if it is to be recycled: where it is now. Raises OSError, or
        PageStoreFull, and leaves all of them, where the file system takes nothing any more."""
        if not victims:
            return None
        try:
            gone, known = self._forget_pages_of(victims)
            forgotten = True
        except lmdb.Error as error:
            # No room for the index to say so. Look-ups pass over what is not in `_extents`.
            self._unwritable(error)
            gone, known, forgotten = {}, False, False
        spare, failure = self._unlink(victims, recycle=recycle)
        if failure is not None and not forgotten:
            # A file system that takes nothing any more: what is there stays good.
            for extent in victims:
                self.put_back(extent)
            if files.is_full(failure):
                raise PageStoreFull(f"no room in {self.directory}, not even to evict; {MAKE_ROOM}") from failure
            raise failure
        for extent in victims:
            self.stats.pages -= extent.live
            self.stats.pages_evicted += extent.live
            self.stats.pages_evicted_needed += extent.live if extent.needed_by and not extent.released else 0
        with self._mutex:
            self._losers.update(*(extent.needed_by for extent in victims))
        self._note([key for keys in gone.values() for key in keys] if known else None)
        if self.evicted is not None:
            for extent, keys in gone.items():
                self.evicted(extent, keys)
        self._count()
        return spare

    def _forget_pages_of(self, extents: Iterable[Extent]) -> tuple[dict[Extent, list[bytes]], bool]:
        """Take what the index finds in ``extents`` out of it: the keys of that, and whether these are all. They are not
        where a header does not tell."""
        unreadable, gone = set(), dict[Extent, list[bytes]]()
        with self._index.change() as change:
            for extent in extents:
                change.forget(extent.number)
                try:
                    keys = files.read_header(self._directory.extent(extent.number)).keys
                except (BadExtent, OSError):
                    unreadable.add(extent.number)
                    continue
                for key in keys:
                    place = change.place(key)
                    if place is not None and place[0] == extent.number:
                        change.delete(key)
                        gone.setdefault(extent, []).append(key)
            if unreadable:
                change.delete_pages_of(unreadable)
        return gone, not unreadable

    def pages_within(self, budget_bytes: int) -> int:
        """The most pages whose draft fits ``budget_bytes`` without an owner; 1 at the least."""
        per_page = self.geometry.page_bytes + 8 * self.geometry.layers + KEY_BYTES
        pages = max(1, budget_bytes // per_page)
        while pages > 1 and self.draft_bytes(pages) > budget_bytes:
            pages -= 1
        return pages

    def draft_bytes(self, pages: int, owner: str = "") -> int:
        return ExtentLayout(self.geometry, pages, owner, self._rows).file_bytes

    def _sizes_of(self, pages: int, owner: str) -> set[int]:
        """Which sizes an extent may have."""
        return {ExtentLayout(self.geometry, pages, owner, rows).file_bytes for rows in (False, True)}

    def draft(self, keys: list[bytes], buffer: Memory, owner: str = "") -> ExtentDraft:
        """An extent of ``keys`` to fill, in ``buffer``, which must hold `draft_bytes` of them. Its bytes are charged to
        ``owner``. Raises ValueError for keys of another length than 32 bytes, and for an owner whose name is longer
        than `MOST_OWNER_BYTES`."""
        return ExtentDraft(self.fingerprint, self.geometry, keys, buffer, owner, rows=self._rows)

    def publish(self, draft: ExtentDraft, *, again: bool = False) -> None:
        """Make the draft's pages durable and findable: written, `fdatasync`, renamed, directory synced, indexed.

        A reader, and a store opened after a crash, sees all of the extent or nothing. An owner at its limit gives of
        its own for it, but not for pages that are written ``again``: they replace copies of what is stored. Raises
        PageStoreFull when there is no room and OSError when the disk fails; and KeyError where a page that is written
        again is not stored any more. Then nothing of the draft is stored.
        """
        self._publish(draft, again, evict=True)

    def _publish(self, draft: ExtentDraft, again: bool, evict: bool) -> None:
        header, data = draft.seal()
        if self._codec == "lossless" and not self._rows:
            header, data = _coded(draft)
        charged = None if again else header.owner
        with self._writing:
            self._attend()
            spare = self._space.make(self, len(data), charged, recycle=True) if evict else None
            number = self._begin()
            self._space.expect(len(data), charged)
            if spare is not None:
                self._written_over.add(number)

        def write(partial: Path, final: Path) -> int:
            mtime_ns = files.publish(partial, final, data, spare)
            self.wear.wrote(len(data))
            return mtime_ns

        self._put(number, header, len(data), charged, write, again=again)

    def adopt(self, path: Path, keys: PageKeys) -> bool:
        """Let the extent of ``keys`` that another store has published at ``path`` be one of this store's too: its file
        gets a second name, and none of its bytes is written. Its pages are then durable and findable, as after
        `publish`. It counts against the quota and its owner's limit by its size. What either store evicts, merges or
        erases of it changes nothing for the other: a file that has two names is never changed.

        False, and nothing is changed, where the other store does not have it any more, its header is damaged or of
        other pages, or it can have no second name: it lies on another file system, is another user's, or has too many
        already. Raises like `publish`.
        """
        with self._writing:
            self._attend()
            if self._closed:
                return False
            number = self._begin()
        partial = self._partial(number)
        try:
            header, mtime_ns = files.link(path, partial)
            if (header.fingerprint, header.geometry, header.keys) != (self.fingerprint, self.geometry, keys):
                raise BadExtent(f"{path.name} is another extent")
            n_bytes = header.file_bytes
            with self._writing:
                self._space.make(self, n_bytes, header.owner)
                self._space.expect(n_bytes, header.owner)
        except BaseException as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            with self._writing:
                self._end(number)
            if not isinstance(error, OSError | BadExtent):
                raise
            if isinstance(error, OSError) and files.is_full(error):
                raise PageStoreFull(f"no room for a name in {self.directory}; {MAKE_ROOM}") from error
            return False

        def name(partial: Path, final: Path) -> int:
            files.publish_link(partial, final)
            return mtime_ns

        self._put(number, header, n_bytes, header.owner, name, linked=True)
        return True

    def _partial(self, number: int) -> Path:
        return self._directory.partial / self._directory.extent(number).name

    def _begin(self) -> int:
        """The number of an extent that begins to be put into the store. The caller holds ``_writing``."""
        number, self._next = self._next, self._next + 1
        self._being_written.add(number)
        return number

    def _end(self, number: int) -> None:
        """An extent is in the store, or comes to nothing. The caller holds ``_writing``."""
        with self._write_ended:
            self._being_written.discard(number)
            self._written_over.discard(number)
            self._write_ended.notify_all()

    def _put(
        self,
        number: int,
        header: ExtentHeader,
        n_bytes: int,
        charged: str | None,
        write: Callable[[Path, Path], int],
        *,
        again: bool = False,
        linked: bool = False,
    ) -> None:
        """Have an extent that has begun, and is expected, put into its place by ``write``, by way of its partial file,
        and enter it. ``write`` returns the file's modification time; after an OSError of it neither file is left."""
        final = self._directory.extent(number)
        try:
            try:
                mtime_ns = write(self._partial(number), final)
            finally:
                self._writing.acquire()
                self._space.expect(-n_bytes, charged)
                self._end(number)
            try:
                self._enter(number, header, n_bytes, mtime_ns, again)
            except DAMAGE as error:
                self._unwritable(error)
                # Made anew, it has what has just been written.
                self._attend()
                if number not in self._extents:
                    raise
            if linked:
                self.stats.pages_linked += len(header.keys)
                self.stats.bytes_linked += n_bytes
            else:
                self.stats.pages_written += len(header.keys)
                self.stats.bytes_written += n_bytes
        except (KeyError, OSError, lmdb.Error) as error:
            try:
                final.unlink(missing_ok=True)
            except OSError:
                self._undeleted.add(number)
            if isinstance(error, KeyError):
                raise
            if files.is_full(error):
                what = f"no room for {n_bytes:,} bytes of KV pages in {self.directory}"
                raise PageStoreFull(f"{what}; {MAKE_ROOM}") from error
            if isinstance(error, lmdb.Error):
                raise OSError(f"the index of {self.directory} could not be written: {error}") from error
            raise
        finally:
            self._writing.release()

    def _enter(self, number: int, header: ExtentHeader, file_bytes: int, mtime_ns: int, again: bool) -> None:
        entered = Extent(number, len(header.keys), 0, file_bytes, mtime_ns, used=self._space.now(), owner=header.owner)
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
                if again:
                    places = change.places(header.keys)
                    for key in header.keys:
                        if key not in places or places[key][0] not in self._extents:
                            raise KeyError(key)
                gained = self._take_over(change, number, header.keys)
                change.own(number, mtime_ns, header.owner)
                recent, self._used_since = self._used_since, set()
                for other in (recent - gained.keys()) & self._extents.keys():
                    change.record(other, self._extents[other].record())
        except BaseException:
            del self._extents[number]
            raise
        self._dropped.clear()
        if again and any(self._extents[other].used_again for other in gained):
            entered.used -= 1
            self._used_since.add(number)
        for other, pages in gained.items():
            extent = self._extents[other]
            extent.live += pages
            # Whoever needs or pinned a page does so wherever it lies.
            self._remember(entered, extent.needed_by)
            entered.retained_until_s = max(entered.retained_until_s, extent.retained_until_s)
            if extent is not entered:
                extent.hand_over(header.keys, entered if again else None)
        if entered.retained_until_s:
            with self._mutex:
                self._retained.add(entered)
        self._space.add(self, entered)
        self._hold(entered.owner, file_bytes)
        self.stats.bytes += file_bytes
        self.stats.pages += gained.total()
        # Of what was entered too: a later extent may have been entered before, and have all of its pages.
        self._delete([entered, *(self._extents[other] for other in gained if other != number)])
        self._count()

    def conclude(self, offers: int) -> None:
        """Tell whoever reads this store (`StoreView`) that so many offers of pages are over since it was opened: what
        they brought is findable."""
        with self._mutex:
            self._directory.tell(self._directory.told._replace(offers=offers))

    def drop(self, wrong: Iterable[tuple[bytes, int]]) -> int:
        """Stop serving copies of pages whose bytes turned out wrong, each named by its key and the number of the extent
        that it lies in: how many pages are not stored any more.

        In one transaction. A page that a later extent serves by now stays: that copy is another. A page that was
        dropped is written anew when it has been computed again.
        """
        with self._writing:
            copies = [copy for copy in dict.fromkeys(wrong) if copy[0] not in self._dropped]
            self._doubted.update(number for _, number in copies)
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
            self.stats.pages_dropped += len(found)
            with self._mutex:
                self._losers.update(*(extent.needed_by or {ANYONE: 0} for extent in found.values()))
            self._stop_serving(found)
            return len(found)

    def _stop_serving(self, found: Mapping[bytes, Extent]) -> None:
        """Take pages out of the index, each of which it finds in an extent. The caller holds ``_writing``."""
        if not found:
            return
        gone = Counter(extent.number for extent in found.values())
        try:
            with self._index.change() as change:
                for key in found:
                    change.delete(key)
                for number, pages in gone.items():
                    record = self._extents[number].record()
                    change.record(number, record._replace(live=record.live - pages))
        except lmdb.Error as error:
            self._unwritable(error)
            self._dropped.update(found)
        for key, extent in found.items():
            extent.live -= 1
            extent.let_go.discard(key)
        self.stats.pages -= len(found)
        self._note(found)
        self._delete([self._extents[number] for number in gone])

    def erase(self, keys: Iterable[bytes]) -> bool:
        """`remove` pages and `scrub` what they leave: whether nothing of them is left. Raises like these."""
        keys = list(keys)
        self.remove(keys)
        # A directory that had to be opened anew in between may have found them again.
        return self.scrub(keys) and not any(self.stored(keys))

    def remove(self, keys: Iterable[bytes]) -> int:
        """Stop serving pages, to erase them: how many were served. From now on a look-up does not find them. What is
        pinned stays readable; files have their bytes until `scrub` says that they have not.

        One that is written later is a new page. Raises PageStoreError where the directory cannot be opened anew, and
        OSError when the index cannot be read; then all may be served still.
        """
        keys = list(dict.fromkeys(keys))
        with self._writing:
            self._attend()
            if self._closed:
                return 0
            try:
                places = self._index.places(keys)
            except (lmdb.Error, struct.error) as error:
                self._unreadable(error)
                raise OSError(f"the index of {self.directory} could not be read: {error}") from error
            found = {
                key: self._extents[place[0]]
                for key, place in zip(keys, places, strict=True)
                if place is not None and place[0] in self._extents and key not in self._dropped
            }
            self._stop_serving(found)
            self.stats.pages_erased += len(found)
            with self._mutex:
                told = self._directory.told
                self._directory.tell(told._replace(erasures=told.erasures + 1))
            return len(found)

    def scrub(self, keys: Iterable[bytes], stop: Callable[[], bool] = lambda: False) -> bool:
        """Make the files hold no copy of ``keys`` but one that is served: removed, superseded, dropped or evicted
        copies go. Whether that is so by now, and stays so after a power failure; if not, because something is pinned
        or a file is being written over, it is to be asked again.

        An extent with such a copy is written anew without it, every page verified, and its file is deleted; one whose
        pages are all such copies is deleted. Pages beside it are lost where their bytes turn out wrong, where the drive
        does not give them back, or where there is no room to write them anew. Extents whose headers are damaged, which
        may hold anything, are deleted; those of a format that another release reads are not.

        A copy-on-write file system, a snapshot and a drive's spare cells may keep what was deleted.

        Takes as long as the drive, an extent after the other, and ends, with False, when ``stop`` says so in between.
        May be called beside everything else. Raises OSError where a file cannot be read or
        deleted, and PageStoreError; what was done so far is done, and asking again goes on.
        """
        wanted = set(keys)
        with self._scrubbing:
            with self._writing:
                self._attend()
                if self._closed:
                    return False
                extents = [extent for extent in self._extents.values() if extent.live < extent.pages]
            with self._mutex:
                written_over = set(self._written_over)
            suspects = self._with_dead_copies(extents, wanted)
            for extent in suspects:
                if stop():
                    return False
                self._write_anew(extent)
            with self._write_ended:
                ended = self._write_ended.wait_for(lambda: not written_over & self._written_over, _WRITING_OVER_S)
            with self._writing:
                if self._closed:
                    return False
                self._attend()
                try:
                    self._delete_leftovers()
                    files.sync_directory(self._directory.extents)
                except OSError as error:
                    if files.is_full(error):
                        raise PageStoreFull(f"no room in {self.directory}: deletions could not be synced") from error
                    raise
                return ended and not any(self._has(extent) for extent in suspects)

    def _with_dead_copies(self, extents: Iterable[Extent], wanted: set[bytes]) -> list[Extent]:
        """Those of ``extents`` with a copy of ``wanted`` that is not served, and those whose keys cannot be read."""
        found = []
        for extent in extents:
            try:
                keys = self._keys_of(extent)
                shared = wanted.intersection(keys) if keys is not None else ()
                if keys is None or any(extent is not self._serving(key) for key in shared):
                    found.append(extent)
            except (lmdb.Error, struct.error) as error:
                with self._writing:
                    self._unreadable(error)
                raise OSError(f"the index of {self.directory} could not be read: {error}") from error
        return found

    def _keys_of(self, extent: Extent) -> PageKeys | None:
        """What an extent holds, in slot order; None where that cannot be told (any more)."""
        listed = self._index.listed([extent.number]).get(extent.number)
        if listed is not None and len(listed) == extent.pages:
            return listed
        try:
            return files.read_header(self._directory.extent(extent.number)).keys
        except BadExtent:
            return None
        except FileNotFoundError:
            return PageKeys()

    def _serving(self, key: bytes) -> Extent | None:
        """The extent whose copy of a page is served."""
        (place,) = self._index.places([key])
        return None if place is None or key in self._dropped else self._extents.get(place[0])

    def _write_anew(self, extent: Extent) -> None:
        """Publish the pages that an extent serves in another one, after which nothing is served from it, and nothing
        but a pin keeps it."""
        while True:
            with self._mutex:
                if not self._has(extent):
                    return
                extent.pins += 1
                self._pinned.add(extent)
            try:
                draft, wrong = self._draft_of(extent)
            except BadExtent:
                draft, wrong = None, []
            finally:
                self._release([extent])
            self.drop((key, extent.number) for key in wrong)
            try:
                if draft is not None:
                    # Without making room: what it replaces takes more, but for as long as that is pinned.
                    self._publish(draft, again=True, evict=False)
                elif extent.live:
                    self._evict_one(extent)
            except PageStoreFull:
                self._evict_one(extent)
            except KeyError:
                # Another of its pages was dropped or removed just now.
                continue
            return

    def _evict_one(self, extent: Extent) -> None:
        with self._writing:
            if self.take(extent):
                self.evict([extent])

    def _draft_of(self, extent: Extent) -> tuple[ExtentDraft | None, list[bytes]]:
        """The pages that an extent serves, verified, ready to be published; and those that it cannot serve. Raises
        BadExtent where it can serve none."""
        if not extent.live:
            return None, []
        path = self._directory.extent(extent.number)
        try:
            with path.open("rb") as file:
                header = files.header_of(file, path.name)
                places = self._index.places(header.keys)
                served = [
                    slot
                    for slot, (key, place) in enumerate(zip(header.keys, places, strict=True))
                    if place == (extent.number, slot) and key not in self._dropped
                ]
                wrong: set[int] = set()
                while good := [slot for slot in served if slot not in wrong]:
                    keys = [header.keys[slot] for slot in good]
                    draft = self.draft(keys, mmap.mmap(-1, self.draft_bytes(len(keys), header.owner)), header.owner)
                    failed = rewriting.copy_pages(file, header, good, draft)
                    if not failed:
                        return draft, [header.keys[slot] for slot in sorted(wrong)]
                    wrong |= failed
                return None, [header.keys[slot] for slot in served]
        except FileNotFoundError as error:
            raise BadExtent(f"{path.name} is gone") from error

    def _delete_leftovers(self) -> None:
        """Delete the files that nothing refers to. The caller holds ``_writing``."""
        for number in [number for number in self._undeleted if number not in self._extents]:
            self._directory.extent(number).unlink(missing_ok=True)
            self._undeleted.discard(number)
        if self._written_over:
            return
        written = {self._partial(number).name for number in self._being_written}
        for path in self._directory.partial.iterdir():
            if path.name not in written:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the store; what is pinned stays readable through the files that are open. May be called again."""
        with self._writing:
            if self._closed:
                return
            self._closed = True
            with suppress(lmdb.Error), self._index.change() as change:
                for number in self._used_since & self._extents.keys():
                    change.record(number, self._extents[number].record())
            self._index.close()
            self._space.leave(self)
            self._leave_order()
            self._directory.touch()
            self._directory.release()


def _coded(draft: ExtentDraft) -> tuple[ExtentHeader, memoryview]:
    """A sealed draft with its pages coded, if that makes it smaller: what `ExtentDraft.seal` returns of it."""
    header, data = draft.seal()
    memory = mmap.mmap(-1, recoding.most_bytes(header))
    coded = recoding.recode(header, draft.component, memory)
    return (header, data) if coded is None else (coded, memoryview(memory)[: coded.file_bytes])


def _recognized(before: Extent | None, found: Extent) -> Extent:
    """The extent that it was before, when its file is the same."""
    if before is None or (before.file_bytes, before.mtime_ns) != (found.file_bytes, found.mtime_ns):
        return found
    before.live, before.used = found.live, max(before.used, found.used)
    return before


def _is_of(
    record: ExtentRecord, path: Path, status: os.stat_result, owner: str, sizes_of: Callable[[int, str], set[int]]
) -> bool:
    """Whether a record tells of the file that is there, and is not garbage."""
    return (
        (record.file_bytes, record.mtime_ns) == (status.st_size, status.st_mtime_ns)
        and record.live <= record.pages < record.file_bytes
        and record.used < 1 << 62
        and (record.file_bytes in sizes_of(record.pages, owner) or _coded_pages(path) == record.pages)
    )


def _coded_pages(path: Path) -> int | None:
    """How many pages an extent has, if they are coded: its size does not tell."""
    try:
        header = files.read_header(path)
    except (BadExtent, OSError):
        return None
    return None if header.coding is None else len(header.keys)
