"""The stores in which other engines of this machine keep the same pages: those of the same weights.

Each engine writes to a page directory of its own and reads those of the others (`StoreView`). What it has used of
theirs becomes its own without being written again: the extent's file gets a second name in its own store
(`PageStore.adopt`). So each store is complete by itself. Its manifests are true, its quota and evictions are its own,
and it goes on when the other engine ends and its directory is deleted.

An extent is adopted if all of its pages were asked for here, or are stored here already. Of any other, what has been
used is written here: it has pages of sessions that this engine has never served, which nobody would tell it to erase.
"""

from __future__ import annotations

import glob
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

from agentstate.errors import PageStoreFull
from agentstate.pages.backends import ReadBackend
from agentstate.pages.extent import ExtentHeader
from agentstate.pages.handles import FileHandle, Handle
from agentstate.pages.keys import PageKeys
from agentstate.pages.node import dp_roots, known_id
from agentstate.pages.pins import Pin, Segment, StoredExtent
from agentstate.pages.store import PageStore
from agentstate.pages.view import StoreView

logger = logging.getLogger(__name__)

# The numbers of other stores' extents: none of the store's own, nor of one that engines share. Each has so many.
_OTHERS, _EACH = 1 << 62, 1 << 40


def stores_beside(patterns: str, root: Path, mark: bytes, rank: int, engine: Path | None = None) -> list[Path]:
    """The stores of a fingerprint and rank in the page directories that ``patterns`` match, separated as in PATH, and
    in that of the own ``engine``, DP rank by DP rank, but for the one in ``root``."""
    paths = [] if engine is None else [engine]
    for pattern in patterns.split(os.pathsep) if patterns else ():
        paths += map(Path, sorted(glob.glob(os.path.expanduser(pattern))))
    own, found = _identity(root), dict[tuple[int, int], Path]()
    for path in paths:
        for of_dp_rank in dp_roots(path).values() if os.access(path, os.R_OK) else ():
            # An index is opened once in a process, whatever the names of its directory are.
            if (identity := _identity(of_dp_rank)) not in (own, None):
                found.setdefault(identity, of_dp_rank)
    stores = (os.path.join(os.path.realpath(path), mark.hex()[:32], f"rank{rank}") for path in found.values())
    # Not `Path.is_dir`, which raises where another user's directory is closed.
    return [Path(store) for store in stores if os.path.isdir(store)]


def _identity(path: Path | str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


class Replicas:
    """What ``store`` has, and, where it has nothing, what other stores have. ``directories`` tells these whenever it is
    asked (`look`). Every method may be called from any thread.

    Pages of other stores may leave at any time (`StoreView`). ``store`` may be a view itself: then nothing is adopted.
    """

    def __init__(self, store: PageStore | StoreView, directories: Callable[[], Iterable[Path]]):
        self._store = store
        self._directories = directories
        self._views: dict[int, StoreView] = {}
        self._indices = count()
        self._copied: set[Path] = set()
        self._closed = False
        self.look()

    def look(self) -> None:
        """Find the stores that have appeared since, and forget those that are gone. To be called by one thread at a
        time."""
        there = set(self._directories())
        views = {index: view for index, view in self._views.items() if view.directory in there}
        new = there - {view.directory for view in views.values()}
        gone = [view for index, view in self._views.items() if index not in views]
        for directory in sorted(new):
            views[next(self._indices)] = StoreView(directory, self._store.fingerprint, self._store.geometry)
            logger.info("page store: what another engine has in %s is read from there", directory)
        self._views = {} if self._closed else views
        for view in [*gone, *(views.values() if self._closed else ())]:
            view.close()

    def nodes(self) -> frozenset[str]:
        """The ids of the page directories of the other stores that can be read now (`agentstate.pages.node`)."""
        found = set[str]()
        for view in self._views.values():
            if view.readable:
                with suppress(OSError):
                    found.add(known_id(view.directory.parents[1]) or "")
        return frozenset(found - {""})

    def prefix_length(self, keys: Sequence[bytes], *, use: bool = True) -> int:
        """How many of ``keys``, from the first on, are stored here or there. From memory, like
        `PageStore.prefix_length`."""
        found = self._store.prefix_length(keys, use=use)
        while found < len(keys):
            rest = keys[found:]
            there = max((view.prefix_length(rest) for view in self._views.values()), default=0)
            if not there:
                break
            found += there
            found += self._store.prefix_length(keys[found:], use=use)
        return found

    def stored(self, keys: Sequence[bytes]) -> list[bool]:
        """Of each of ``keys`` whether it is stored here or there."""
        stored = self._store.stored(keys)
        for view in self._views.values():
            missing = [at for at, is_stored in enumerate(stored) if not is_stored]
            if not missing:
                break
            for at, is_stored in zip(missing, view.stored([keys[at] for at in missing]), strict=True):
                stored[at] = is_stored
        return stored

    def pin(self, keys: Sequence[bytes]) -> Pin:
        """Find ``keys``, and keep those where they are that the store has. Raises KeyError, with the key, where one is
        stored nowhere (any more)."""
        keys = PageKeys.of(keys)
        segments: list[Segment] = []
        pins: list[Pin] = []

        def release() -> None:
            for pin in pins:
                pin.close()

        try:
            at = 0
            while at < len(keys):
                pins.append(pin := self._pinned(keys[at:]))
                segments += [segment._replace(first=at + segment.first) for segment in pin.segments]
                at += len(pin.keys)
        except BaseException:
            release()
            raise
        return Pin(self._store.fingerprint, keys, segments, release)

    def _pinned(self, keys: PageKeys) -> Pin:
        """A pin of as many of ``keys``, from the first on, as one store has."""
        if pages := self._store.prefix_length(keys, use=False):
            return self._store.pin(keys[:pages])
        lengths = [(view.prefix_length(keys), index, view) for index, view in self._views.items()]
        pages, index, view = max(lengths, key=lambda one: one[0], default=(0, 0, None))
        if not pages or view is None:
            raise KeyError(keys[0])
        pin = view.pin(keys[:pages])
        pin.segments = [segment._replace(extent=_renumbered(segment.extent, index)) for segment in pin.segments]
        return pin

    def drop(self, wrong: Iterable[tuple[bytes, int]]) -> int:
        """`PageStore.drop`; copies that lie in another store are only not found here any more. How many pages the store
        has dropped."""
        of_views = defaultdict[int, list[tuple[bytes, int]]](list)
        own = []
        for key, number in wrong:
            if _OTHERS <= number < 2 * _OTHERS:
                index, number = divmod(number - _OTHERS, _EACH)
                of_views[index].append((key, number))
            else:
                own.append((key, number))
        for index, copies in of_views.items():
            if (view := self._views.get(index)) is not None:
                view.drop(copies)
        return self._store.drop(own)

    def opening(self, backend: ReadBackend) -> Callable[[StoredExtent, ExtentHeader | None], Handle]:
        """What opens the extents of a `pin`, for a reader that reads with ``backend``."""
        if isinstance(self._store, StoreView):
            return self._store.opening(backend)
        return lambda extent, header: FileHandle(backend, extent, header, held=extent.number >= _OTHERS)

    def adopt(self, keys: Sequence[bytes]) -> set[bytes]:
        """Make those of ``keys`` the store's own that it lacks and that lie in extents of other stores which may be
        adopted: which ones it has now because of that. Takes as long as the drive. Raises like `PageStore.adopt`, but
        for want of room."""
        if not isinstance(self._store, PageStore):
            return set()
        asked = set(keys)
        missing = [key for key, stored in zip(keys, self._store.stored(keys), strict=True) if not stored]
        adopted = set[bytes]()
        for view in self._views.values():
            missing = [key for key in missing if key not in adopted]
            if not missing or not self._may_link(view.directory):
                continue
            for path, of_extent in view.whole_extents(missing):
                beside = [key for key in of_extent if key not in asked]
                try:
                    if all(self._store.stored(beside)) and self._store.adopt(path, of_extent):
                        adopted.update(of_extent)
                except PageStoreFull:
                    return adopted & asked
        return adopted & asked

    def _may_link(self, directory: Path) -> bool:
        """Whether the file system could link files from there."""
        try:
            links = os.stat(directory).st_dev == os.stat(self._store.directory).st_dev
        except OSError:
            return False
        if not links and directory not in self._copied:
            self._copied.add(directory)
            logger.info("page store: %s lies on another file system: what is used of it is written here", directory)
        return links

    def close(self) -> None:
        """Find nothing of other stores any more. What is being read stays readable."""
        self._closed = True
        views, self._views = self._views, {}
        for view in views.values():
            view.close()


def _renumbered(extent: StoredExtent, index: int) -> StoredExtent:
    return extent._replace(number=_OTHERS + index * _EACH + extent.number)
