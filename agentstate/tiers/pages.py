"""The pages of one fingerprint that lie in a shared store, as this engine has been told of them: looked up in memory,
and streamed like those of a drive."""

from __future__ import annotations

import errno
import logging
import shutil
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from agentstate.errors import BadExtent, TierError, TierMissing, TierShort
from agentstate.pages.changes import Changes
from agentstate.pages.extent import ExtentHeader, ExtentLayout, Geometry
from agentstate.pages.handles import Extract, Found, Handle, scratch
from agentstate.pages.index import ExtentRecord, PageIndex, Run
from agentstate.pages.keys import PageKeys
from agentstate.pages.pins import Pin, Segment, StoredExtent
from agentstate.tiers.extents import SharedExtents
from agentstate.tiers.interface import Range

logger = logging.getLogger(__name__)

# Added to an extent's id, so that its number is none of a local store's.
_SHARED = 1 << 63


class Listed(NamedTuple):
    """An extent that somebody has published: its ``id`` in the catalogue, the object's name and size, whose it is, and
    the keys of its pages, in slot order."""

    id: int
    name: str
    n_bytes: int
    owner: str
    keys: PageKeys


class _Shared(NamedTuple):
    name: str
    n_bytes: int
    owner: str
    pages: int


class SharedPages:
    """Pages by key, of the extents that were entered. Thread-safe; look-ups never wait for the store or a writer.

    ``directory`` is for the index, which begins empty: SQL says what there is. Nothing that an extent says is believed
    before its header was read and checked, and no page before its bytes were; that is when a stream reads it.
    """

    def __init__(self, directory: Path, extents: SharedExtents, fingerprint: bytes, geometry: Geometry):
        self.fingerprint = fingerprint
        self.geometry = geometry
        # Is told which pages come and go, where somebody wants to know.
        self.changes: Changes | None = None
        self._extents = extents
        shutil.rmtree(directory, ignore_errors=True)
        self._index = PageIndex(directory, fingerprint, geometry)
        # Held while the index changes.
        self._writing = threading.Lock()
        self._shared: dict[int, _Shared] = {}
        # Of all of them together.
        self._pages = self._n_bytes = 0
        # How many pages of each are found in it, where that is not all of them: others have them too.
        self._partly: dict[int, int] = {}
        self._rejected: set[int] = set()
        self._missing: set[int] = set()
        self._used: set[int] = set()
        self._closed = False
        self.followed = False
        """Whether all that the catalogue lists has been entered once."""
        self.left = 0
        """How many pages were found here and are not any more, since the start."""

    @property
    def extents(self) -> int:
        """How many extents are known."""
        return len(self._shared)

    @property
    def pages(self) -> int:
        """How many pages they have; one that several have counts for each."""
        return self._pages

    @property
    def page_bytes(self) -> float:
        """How many bytes of an object a page takes, on average: coded ones fewer than on a device. 0 while none is
        known."""
        pages = self._pages
        return self._n_bytes / pages if pages else 0.0

    def ids(self) -> set[int]:
        """Those that were entered and have not left, rejected ones included."""
        return {number - _SHARED for number in self._shared.keys() | self._rejected}

    def enter(self, extents: Iterable[Listed]) -> None:
        """Find the pages of ``extents`` from now on. One that was entered before changes nothing."""
        with self._writing:
            new = {
                _SHARED + listed.id: listed
                for listed in extents
                if _SHARED + listed.id not in self._shared.keys() | self._rejected
            }
            if not new or self._closed:
                return
            # First, or a look-up might find a page whose extent is not known yet.
            self._partly.update(dict.fromkeys(new, 0))
            self._shared.update(
                (number, _Shared(listed.name, listed.n_bytes, listed.owner, len(listed.keys)))
                for number, listed in new.items()
            )
            self._pages += sum(len(listed.keys) for listed in new.values())
            self._n_bytes += sum(listed.n_bytes for listed in new.values())
            live = {}
            with self._index.change() as change:
                for number, listed in new.items():
                    known = change.places(listed.keys)
                    slots = {key: slot for slot, key in enumerate(listed.keys) if key not in known}
                    change.put(number, slots)
                    change.list_keys(number, listed.keys)
                    change.record(number, ExtentRecord(len(listed.keys), len(slots), listed.n_bytes, 0, 0))
                    live[number] = len(slots)
            for number, pages in live.items():
                self._count(number, pages)
            if self.changes is not None:
                for listed in new.values():
                    self.changes.note(listed.keys)

    def leave(self, ids: Iterable[int]) -> None:
        """Do not find pages in these extents any more: they are about to be deleted, or are."""
        numbers = {_SHARED + of for of in ids}
        with self._writing:
            self._rejected -= numbers
            self._missing -= numbers
            self._take_out(numbers)

    def _take_out(self, numbers: Iterable[int]) -> None:
        gone = [number for number in numbers if number in self._shared]
        if not gone or self._closed:
            return
        lists = self._index.listed(gone)
        for number in gone:
            shared = self._shared.pop(number)
            self.left += shared.pages
            self._pages -= shared.pages
            self._n_bytes -= shared.n_bytes
            self._partly.pop(number, None)
        others = self._index.listed(self._partly)
        live = {}
        freed = set[bytes]()
        with self._index.change() as change:
            for number in gone:
                for key, place in change.places(lists.get(number, PageKeys())).items():
                    if place[0] == number:
                        change.delete(key)
                        freed.add(key)
                change.forget(number)
            own = list(freed)
            # Who else has one of them is where it is found now.
            for number, keys in others.items():
                slots = {key: slot for slot, key in enumerate(keys) if key in freed}
                if slots:
                    freed -= slots.keys()
                    change.put(number, slots)
                    live[number] = self._partly[number] + len(slots)
        for number, pages in live.items():
            self._count(number, pages)
        if self.changes is not None:
            self.changes.note(own)

    def _count(self, number: int, live: int) -> None:
        if live == self._shared[number].pages:
            self._partly.pop(number, None)
        else:
            self._partly[number] = live

    def prefix_length(self, keys: Sequence[bytes]) -> int:
        """How many of ``keys``, from the first on, are there. A few microseconds an extent."""
        runs = self._runs(PageKeys.of(keys))
        for run in runs:
            if run.number not in self._shared:
                return run.first
        return runs[-1].first + runs[-1].pages if runs else 0

    def stored(self, keys: Sequence[bytes]) -> list[bool]:
        """Of each of ``keys`` whether it is there."""
        stored = [False] * len(keys)
        for run in self._runs(PageKeys.of(keys), gaps=True):
            if run.number in self._shared:
                stored[run.first : run.first + run.pages] = [True] * run.pages
        return stored

    def extent_names(self, keys: Sequence[bytes]) -> list[str | None]:
        """Of each of ``keys`` the name of the extent that it is read from; None where it is not there."""
        names: list[str | None] = [None] * len(keys)
        for run in self._runs(PageKeys.of(keys), gaps=True):
            if (shared := self._shared.get(run.number)) is not None:
                names[run.first : run.first + run.pages] = [shared.name] * run.pages
        return names

    def _runs(self, keys: PageKeys, *, gaps: bool = False) -> list[Run]:
        if not self._shared or self._closed:
            return []
        return self._index.runs(keys, whole=self._is_whole, gaps=gaps)

    def _is_whole(self, number: int) -> bool:
        return number in self._shared and number not in self._partly

    def pin(self, keys: Sequence[bytes]) -> Pin:
        """Where ``keys`` lie. Nobody is kept from deleting them: what is about to be is said an hour before, and one
        that is gone all the same is wrong. Raises KeyError, with the key, where one is not there."""
        keys = PageKeys.of(keys)
        runs = self._runs(keys)
        extents: dict[int, StoredExtent] = {}
        for run in runs:
            if (shared := self._shared.get(run.number)) is None:
                raise KeyError(keys[run.first])
            layout = ExtentLayout.of_file(self.geometry, shared.pages, shared.owner, shared.n_bytes)
            extents.setdefault(run.number, StoredExtent(Path(shared.name), layout, run.number))
        found = runs[-1].first + runs[-1].pages if runs else 0
        if found < len(keys):
            raise KeyError(keys[found])
        self._used.update(extents)
        segments = [Segment(extents[run.number], run.slot, run.pages, run.first) for run in runs]
        return Pin(self.fingerprint, keys, segments, lambda: None)

    def open(self, extent: StoredExtent, header: ExtentHeader | None) -> Handle:
        """An extent of a `pin`, to be read (`OpenExtent`)."""
        shared = self._shared.get(extent.number)
        if shared is None:
            raise BadExtent(f"{extent.path.name} is about to be deleted")
        return _SharedHandle(self, self._extents, extent, shared.n_bytes, header)

    def drop(self, wrong: Iterable[tuple[bytes, int]]) -> int:
        """Use none of the extents, until they are to be used `again`, that have these copies of pages, which turned out
        wrong (`Pin.copies`): how many extents. What is at fault may be the way here: others go on."""
        with self._writing:
            numbers = {number for _, number in wrong if number in self._shared}
            self._rejected |= numbers
            self._take_out(numbers)
        if numbers:
            logger.error("agentstate: %d extent(s) of the shared store had wrong pages and are not used", len(numbers))
        return len(numbers)

    def again(self) -> None:
        """Let extents that had wrong pages be entered once more: what was at fault may have been the way here."""
        with self._writing:
            self._rejected.clear()

    def missed(self, number: int) -> None:
        """The store has no such extent. For handles."""
        self._missing.add(number)

    def take_missing(self) -> list[int]:
        """The ids of extents that were asked for and are not in the store: nothing is found in them any more."""
        with self._writing:
            missing, self._missing = self._missing, set()
            self._rejected |= missing & self._shared.keys()
            self._take_out(missing)
        return [number - _SHARED for number in missing]

    def ids_of(self, keys: Sequence[bytes]) -> set[int]:
        """The extents in which ``keys`` are found, as far as they are."""
        return {run.number - _SHARED for run in self._runs(PageKeys.of(keys), gaps=True) if run.number in self._shared}

    def take_used(self) -> list[int]:
        """The ids of extents that were pinned since this was asked last."""
        used, self._used = self._used, set()
        return [number - _SHARED for number in used if number in self._shared]

    def holding(self, keys: Iterable[bytes]) -> dict[int, PageKeys]:
        """The extents that have any of ``keys``, wherever they are found, by id: the keys of all of their pages."""
        wanted = set(keys)
        with self._writing:
            lists = {} if self._closed else self._index.listed(self._shared)
        return {number - _SHARED: of for number, of in lists.items() if not wanted.isdisjoint(of)}

    def keys_in(self, ids: Iterable[int]) -> set[bytes]:
        """The keys of all pages of these extents, as far as they were entered and have not left."""
        numbers = [_SHARED + of for of in ids]
        with self._writing:
            lists = {} if self._closed else self._index.listed(number for number in numbers if number in self._shared)
        return {key for keys in lists.values() for key in keys}

    def close(self) -> None:
        with self._writing:
            if not self._closed:
                self._closed = True
                self._index.close()


class _SharedHandle(Handle):
    """Raises like every handle: BadExtent where the store has no such extent or another one, OSError where it does not
    answer."""

    def __init__(
        self,
        pages: SharedPages,
        extents: SharedExtents,
        extent: StoredExtent,
        n_bytes: int,
        header: ExtentHeader | None,
    ):
        self._pages = pages
        self._tier = extents.tier
        self._name = str(extent.path)
        self._number = extent.number
        self.header = header or self._wait(extents.header(self._name, n_bytes))
        if not self.header.layout.agrees(extent.layout):
            raise BadExtent(f"{self._name}: the header is of another extent")

    def _read(self, extract: Extract, *, whole_blocks: bool) -> Found:
        for arrays, offset, wanted in extract.fills:
            ranges = []
            # No block has to be read whole.
            for array in [arrays[0][:wanted]] if whole_blocks else arrays:
                ranges.append(Range(offset, memoryview(array.reshape(-1))))
                offset += array.nbytes
            self._wait(self._tier.read(self._name, ranges))
        return Found(extract.components, sum(fill.wanted for fill in extract.fills), None)

    def _load(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        found = scratch([n_bytes for _, n_bytes in ranges])
        into = [Range(offset, memoryview(part.data)) for (offset, _), part in zip(ranges, found, strict=True)]
        self._wait(self._tier.read(self._name, into))
        return found

    def _wait(self, future: Future[Any]) -> Any:
        try:
            return future.result()
        except TierMissing as error:
            # One that is too short is wrong, as its bytes may be: on its way, and for this reader alone.
            if not isinstance(error, TierShort):
                self._pages.missed(self._number)
            raise BadExtent(f"{self._name}: {error}") from error
        except TierError as error:
            raise OSError(errno.EREMOTEIO, str(error), self._name) from error

    def close(self) -> None:
        pass
