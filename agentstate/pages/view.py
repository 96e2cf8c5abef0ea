"""A store that another process has open, read from here: its pages are found through its own index, as of its newest
change, and read from its own files.

Nothing is written there, and nothing keeps the other process from evicting, merging or erasing. So a page that was
found may be gone when it is read. Then its extent cannot be opened, or the space has other bytes by now, which shows in
the header or in the checksums: the page is wrong, like every page that cannot be used. An extent that is open stays as
it is until it is closed (`files.hold`).
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import lmdb

from agentstate.errors import FingerprintMismatch
from agentstate.pages.backends import ReadBackend
from agentstate.pages.changes import Changes
from agentstate.pages.directory import StoreDirectory, Told, told
from agentstate.pages.extent import ExtentHeader, ExtentLayout, Geometry
from agentstate.pages.handles import FileHandle, Handle
from agentstate.pages.index import IndexView, Run
from agentstate.pages.keys import PageKeys
from agentstate.pages.pins import Pin, Segment, StoredExtent
from agentstate.pages.space import StoreStats

logger = logging.getLogger(__name__)

# How long what cannot be opened is left alone.
_RETRY_S = 1.0


class StoreView:
    """What `PageStore` says of pages, of a store that another process of this machine has open or is going to open.
    Every method may be called from any thread.

    ``directory`` need not be there yet; nothing is found until it is, and while it cannot be used, which is said once.
    What somebody needs, uses or lets go of is for that other process to know: here it changes nothing. `drop` hides
    copies of pages from who asks here.
    """

    def __init__(self, directory: Path, fingerprint: bytes, geometry: Geometry):
        self.directory = directory
        self.fingerprint = fingerprint
        self.geometry = geometry
        self.stats = StoreStats()
        self.changes: Changes | None = None
        self._files = StoreDirectory(directory)
        self._data = self._files.index / "data.mdb"
        self._opening = threading.Lock()
        self._index: IndexView | None = None
        self._opened_as: tuple[int, int] | None = None
        self._retry_s = 0.0
        # Copies of pages that are not used: the extents in which they lie.
        self._hidden: dict[bytes, int] = {}
        self._said: str | None = None
        self._closed = False

    def _current(self) -> IndexView | None:
        """The index that is there now, if it can be used."""
        try:
            status = os.stat(self._data)
        except OSError as error:
            # Not there yet, unless it was.
            if self._opened_as is not None:
                self._complain(error.strerror or str(error))
            return None
        identity = (status.st_dev, status.st_ino)
        return self._index if identity == self._opened_as else self._open(identity)

    def _open(self, identity: tuple[int, int]) -> IndexView | None:
        with self._opening:
            if identity == self._opened_as or self._closed or time.monotonic() < self._retry_s:
                return self._index
            self._close_index()
            # Its process looks over the index when it opens it: LMDB trusts what it is given.
            if not self.told().is_open:
                return None
            try:
                self._index = IndexView(self._files.index, self.fingerprint, self.geometry)
            except (lmdb.Error, FingerprintMismatch, OSError) as error:
                self._complain(str(error))
                self._retry_s = time.monotonic() + _RETRY_S
                return None
            self._opened_as = identity
            if self._said is not None:
                logger.info("page store: %s is read again", self.directory)
            self._said = None
            return self._index

    def _close_index(self) -> None:
        if self._index is not None:
            self._index.close()
        self._index = self._opened_as = None

    def _complain(self, why: str) -> None:
        if why != self._said:
            logger.warning("page store: nothing is read from %s, which another process has: %s", self.directory, why)
        self._said = why

    def _unreadable(self, error: Exception) -> None:
        """Whoever looks next opens it anew."""
        with self._opening:
            if not self._closed:
                self._complain(str(error))
                self._close_index()

    def _runs(self, index: IndexView, keys: PageKeys, *, gaps: bool = False) -> list[Run]:
        hidden, doubted = set[bytes](), set[int]()
        if self._hidden:
            hidden = self._still_hidden(index, keys)
            doubted = set(self._hidden.values())

        @cache
        def whole(number: int) -> bool:
            described = index.described([number]).get(number)
            return described is not None and described[0].live == described[0].pages and number not in doubted

        return index.runs(keys, whole=whole, hidden=hidden, gaps=gaps)

    def _still_hidden(self, index: IndexView, keys: PageKeys) -> set[bytes]:
        """Those of ``keys`` whose copy is hidden: one that lies elsewhere by now is another copy."""
        asked = [key for key in keys if key in self._hidden]
        still = set[bytes]()
        for key, place in zip(asked, index.places(asked), strict=True):
            if place is not None and place[0] == self._hidden.get(key):
                still.add(key)
            else:
                self._hidden.pop(key, None)
        return still

    def _found(self, keys: Sequence[bytes], *, gaps: bool = False) -> list[Run]:
        index = self._current()
        if index is None:
            return []
        try:
            return self._runs(index, PageKeys.of(keys), gaps=gaps)
        except (lmdb.Error, struct.error) as error:
            self._unreadable(error)
            return []

    def __contains__(self, key: bytes) -> bool:
        return bool(self._found([key]))

    @property
    def readable(self) -> bool:
        """Whether anything can be found now. A store that is opened here stays readable when its process ends, as long
        as its files stay."""
        return self._current() is not None

    def prefix_length(self, keys: Sequence[bytes], *, use: bool = True) -> int:
        """How many of ``keys``, from the first on, are stored. From memory, like `PageStore.prefix_length`."""
        runs = self._found(keys)
        return runs[-1].first + runs[-1].pages if runs else 0

    def stored(self, keys: Sequence[bytes]) -> list[bool]:
        """Of each of ``keys`` whether it is stored, as of one moment."""
        stored = [False] * len(keys)
        for run in self._found(keys, gaps=True):
            stored[run.first : run.first + run.pages] = [True] * run.pages
        return stored

    def extent_names(self, keys: Sequence[bytes]) -> list[str | None]:
        """Of each of ``keys`` the name of the extent file that it is read from; None where it is not stored."""
        names: list[str | None] = [None] * len(keys)
        for run in self._found(keys, gaps=True):
            names[run.first : run.first + run.pages] = [self._files.extent(run.number).name] * run.pages
        return names

    def pin(self, keys: Sequence[bytes]) -> Pin:
        """Find ``keys``. They may leave all the same. Raises KeyError, with the key, where one is not stored."""
        keys = PageKeys.of(keys)
        runs = self._found(keys)
        found = runs[-1].first + runs[-1].pages if runs else 0
        if found < len(keys):
            raise KeyError(keys[found])
        extents: dict[int, StoredExtent] = {}
        index = self._index
        with suppress(lmdb.Error, struct.error):
            described = {} if index is None else index.described(dict.fromkeys(run.number for run in runs))
            for number, (record, owner) in described.items():
                layout = ExtentLayout.of_file(self.geometry, record.pages, owner, record.file_bytes)
                extents[number] = StoredExtent(self._files.extent(number), layout, number)
        for run in runs:
            if run.number not in extents:
                raise KeyError(keys[run.first])
        segments = [Segment(extents[run.number], run.slot, run.pages, run.first) for run in runs]
        return Pin(self.fingerprint, keys, segments, lambda: None)

    def whole_extents(self, keys: Sequence[bytes]) -> list[tuple[Path, PageKeys]]:
        """The extents that hold those of ``keys`` that are stored, with the keys of all of their pages. Only those of
        which every page is served."""
        index = self._current()
        if index is None:
            return []
        try:
            places = index.places(keys)
            numbers = dict.fromkeys(place[0] for place in places if place is not None)
            described, listed = index.described(numbers), index.listed(numbers)
        except (lmdb.Error, struct.error) as error:
            self._unreadable(error)
            return []
        doubted = set(self._hidden.values())
        return [
            (self._files.extent(number), listed[number])
            for number in numbers
            if number in described
            and number not in doubted
            and described[number][0].live == described[number][0].pages == len(listed.get(number, ()))
        ]

    def opening(self, backend: ReadBackend) -> Callable[[StoredExtent, ExtentHeader | None], Handle]:
        """What opens the extents of a `pin`, for a reader that reads with ``backend``."""
        return lambda extent, header: FileHandle(backend, extent, header, held=True)

    def drop(self, wrong: Iterable[tuple[bytes, int]]) -> int:
        """Do not find these copies of pages here any more, as `PageStore.drop`, until `look_again`: how many."""
        copies = [copy for copy in dict.fromkeys(wrong) if self._hidden.get(copy[0]) != copy[1]]
        self._hidden.update(copies)
        self.stats.pages_dropped += len(copies)
        return len(copies)

    def look_again(self, keys: Iterable[bytes]) -> None:
        """The other process has been asked to store these pages, and has what it has: find its copies again."""
        for key in keys if self._hidden else ():
            self._hidden.pop(key, None)

    def told(self) -> Told:
        """What the other process tells."""
        try:
            return told(self.directory)
        except OSError as error:
            self._complain(error.strerror or str(error))
            return Told()

    # What a rank says of its sessions to all of its stores.

    @property
    def pinned(self) -> int:
        return 0

    def need(self, keys: Iterable[bytes], session: str = "") -> None: ...

    def release(self, keys: Sequence[bytes], session: str | None = None) -> None: ...

    def retain(self, keys: Sequence[bytes], until_s: float) -> int:
        """Of how many of ``keys``, from the first on, the other process can be asked for that."""
        return self.prefix_length(keys)

    @contextmanager
    def needing_only(self) -> Iterator[None]:
        yield

    def take_losers(self) -> set[str]:
        return set()

    def close(self) -> None:
        """Find nothing any more. What is being read stays readable. May be called again."""
        with self._opening:
            self._closed = True
            self._close_index()
