"""Stores that other engines left below a root of pages, of other weights, another layout or another SGLang, and that
nobody has open.

The store that was opened or closed longest ago is evicted from first, and in it the extents that were written longest
ago. File times tell this, since the uses that two stores count cannot be compared. Only files and directories named
like those of a store are deleted, and no symbolic link is followed.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import math
import os
import re
import stat
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from agentstate.private import FILE_MODE

logger = logging.getLogger(__name__)

_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
_RANK = re.compile(r"rank([0-9]{1,9})")
_EXTENT = re.compile(r"[0-9a-f]{16}\.ext")
# The last of these are indexes of what is in a store that engines share, one a rank.
_PART = re.compile(r"extents|partial|index|shared[0-9]{0,9}")
_REST = re.compile(r"[0-9a-f]{16}\.(ext|spare)|data\.mdb|lock\.mdb|unfinished")


class Lacking(NamedTuple):
    """How many bytes are too many, by the quota and for the file system."""

    by_quota: float
    on_disk: float

    def without(self, by_quota: int, on_disk: int) -> Lacking:
        return Lacking(self.by_quota - by_quota, self.on_disk - on_disk)


class Siblings:
    """The stores below ``root``, except ``kin``, and those below ``left``, roots that no engine has any more. Those
    whose rank, modulo ``ranks``, is ``rank`` count against this rank's quota; if the file system is full, any of them
    is evicted from. Not thread-safe."""

    def __init__(self, root: Path, kin: Collection[Path], rank: int, ranks: int, left: Collection[Path] = ()):
        self._root = root
        self._roots = [root, *left]
        self._passed_over = set(kin)
        self._rank, self._ranks = rank, ranks
        # The one to be evicted next is the last.
        self._stores: list[_Sibling] = []
        self._scanned = False
        self._dead: list[tuple[str, int]] = []

    @property
    def n_bytes(self) -> int:
        """The bytes that count against this rank's quota, as of the last `look`."""
        if not self._scanned:
            self._scan()
        return sum(store.n_bytes for store in self._stores if self._counts(store))

    @property
    def all_bytes(self) -> int:
        return sum(store.n_bytes for store in self._stores)

    def look(self, lacking: Lacking) -> bool:
        """Scan for stores, since engines may have ended, unless a known one would help. Returns whether any would."""
        if not self._helps(lacking):
            self._scan()
        return self._helps(lacking)

    def _helps(self, lacking: Lacking) -> bool:
        return any(lacking.on_disk > 0 or (lacking.by_quota > 0 and self._counts(store)) for store in self._stores)

    def evict(self, lacking: Lacking) -> Lacking:
        """Evict what is lacking, as far as there is so much. Returns what is still lacking."""
        for store in reversed(list(self._stores)):
            if max(lacking) <= 0:
                break
            counts = self._counts(store)
            wanted = max(lacking.on_disk, lacking.by_quota if counts else 0)
            if wanted <= 0:
                continue
            before = store.n_bytes
            freed = store.evict(wanted)
            if not store.n_bytes:
                self._stores.remove(store)
                if store.gone:
                    # The manifests of another root are another node's, which nobody is sent to.
                    if store.path.parent.parent == self._root:
                        self._dead.append((store.fingerprint, store.rank))
                elif store.refuses:
                    self._passed_over.add(store.path)
            # A store that was opened in the meantime no longer counts.
            lacking = lacking.without(before - store.n_bytes if counts else 0, freed)
        return lacking

    def discard(self, path: Path) -> None:
        """Delete the store in a directory, if there is one and nobody has it open: its pages are elsewhere too."""
        store = _Sibling(path, said=True)
        if path.is_dir():
            logger.info("page store: %s is deleted: another rank has the same pages", path)
            store.evict(math.inf)
        if store.gone or not path.exists():
            self._dead.append((store.fingerprint, store.rank))

    def take_dead(self) -> list[tuple[str, int]]:
        dead, self._dead = self._dead, []
        return dead

    def _counts(self, store: _Sibling) -> bool:
        return store.rank % self._ranks == self._rank

    def _scan(self) -> None:
        self._scanned = True
        known = {store.path: store for store in self._stores}
        found = []
        for fingerprint in itertools.chain(*(_directories(root, _FINGERPRINT) for root in self._roots)):
            for path in _directories(fingerprint, _RANK):
                if path not in self._passed_over:
                    sibling = known.get(path) or _Sibling(path)
                    with suppress(OSError), sibling.locked():
                        sibling.measure()
                        found.append(sibling)
        self._stores = sorted((store for store in found if store.n_bytes), key=lambda store: -store.used_ns)


class _Sibling:
    """A store that nobody had open when it was measured."""

    def __init__(self, path: Path, *, said: bool = False):
        self.path = path
        self.fingerprint = path.parent.name
        self.rank = int(path.name.removeprefix("rank"))
        self.used_ns = 0
        self.n_bytes = 0
        self._measured_as: tuple[int, int] | None = None
        # Whether nothing is left of it, and whether what is left cannot be deleted.
        self.gone = self.refuses = False
        # The next one to be evicted is the last; None before they are needed.
        self._extents: list[tuple[int, str, int]] | None = None
        self._said = said

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep engines from opening it. Raises OSError if one has it open, and for what is no directory."""
        for part in (self.path, self.path / "extents"):
            if not stat.S_ISDIR(part.lstat().st_mode):
                raise NotADirectoryError(part)
        lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        finally:
            os.close(lock)

    def measure(self) -> None:
        """Add up what it holds, unless it has not changed since."""
        self.used_ns = self._stamp()
        now = (self.used_ns, (self.path / "extents").stat().st_mtime_ns)
        if now != self._measured_as:
            self.n_bytes, self._extents = sum(size for _, _, size in self._listed()), None
            self._measured_as = now

    def _stamp(self) -> int:
        """When it was last opened, closed or written to."""
        times = [0]
        for name in ("lock", "index/data.mdb"):
            with suppress(OSError):
                times.append((self.path / name).lstat().st_mtime_ns)
        return max(times)

    def _listed(self) -> list[tuple[int, str, int]]:
        found = []
        with os.scandir(self.path / "extents") as entries:
            for entry in entries:
                if _EXTENT.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    status = entry.stat(follow_symlinks=False)
                    found.append((status.st_mtime_ns, entry.name, status.st_size))
        return sorted(found, reverse=True)

    def evict(self, wanted: float) -> int:
        """Delete ``wanted`` bytes of extents, or all there are, but none of a store that has been opened. Returns how
        many bytes were deleted."""
        freed = 0
        try:
            with self.locked():
                if self._extents is None or self._stamp() != self.used_ns:
                    self._extents, self.used_ns = self._listed(), self._stamp()
                    self.n_bytes = sum(size for _, _, size in self._extents)
                self._say()
                while self._extents and freed < wanted:
                    _, name, size = self._extents.pop()
                    (self.path / "extents" / name).unlink(missing_ok=True)
                    freed += size
                    self.n_bytes -= size
                if not self._extents:
                    self._delete_rest()
        except OSError as error:
            self.refuses = not isinstance(error, BlockingIOError)
            if self.refuses:
                logger.warning("page store: %s cannot be evicted from: %s", self.path, error)
            self.n_bytes, self._extents = 0, None
        return freed

    def _say(self) -> None:
        if not self._said:
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.used_ns / 1e9))
            logger.info(
                "page store: making room: pages of other weights or another layout, in %s, last used %s, are evicted",
                self.path,
                used,
            )
        self._said = True

    def _delete_rest(self) -> None:
        """Delete what an empty store consists of, the lock last."""
        for directory in [path for path in self.path.iterdir() if _PART.fullmatch(path.name)]:
            if not directory.is_symlink() and directory.is_dir():
                for path in directory.iterdir():
                    if _REST.fullmatch(path.name) and not path.is_dir():
                        path.unlink()
                with suppress(OSError):
                    directory.rmdir()
        (self.path / "unlike").unlink(missing_ok=True)
        if sorted(path.name for path in self.path.iterdir()) == ["lock"]:
            (self.path / "lock").unlink()
            self.path.rmdir()
            with suppress(OSError):
                self.path.parent.rmdir()
        self.gone = True
        logger.info("page store: nothing is left of %s", self.path)


def _directories(parent: Path, name: re.Pattern[str]) -> list[Path]:
    try:
        with os.scandir(parent) as entries:
            return [
                Path(entry.path)
                for entry in entries
                if name.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
            ]
    except OSError:
        return []
