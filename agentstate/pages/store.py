"""The page store of one rank: extent files, and the index that says which page lies in which of them.

::

    ROOT/FINGERPRINT/RANK/lock                 held by the one writer
    ROOT/FINGERPRINT/RANK/extents/NUMBER.ext   published extents, immutable
    ROOT/FINGERPRINT/RANK/partial/NUMBER.ext   being written; whatever a writer finds here at open is a crash's

The extents are the truth. The index is a dictionary in memory that is rebuilt from their headers at open, so it can
never disagree with them after a crash; where two extents hold the same page, the later number wins.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from agentstate.errors import BadExtent, FingerprintMismatch, PageStoreFull, PageStoreLocked, PageStoreUnwritable
from agentstate.pages.extent import KEY_BYTES, PREFIX, ExtentDraft, ExtentHeader, Geometry

logger = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NAME = re.compile(r"[0-9a-f]{16}\.ext")


class Extent(NamedTuple):
    path: Path
    header: ExtentHeader


class Segment(NamedTuple):
    """``pages`` pages of a request, from its page ``first`` on, side by side in ``extent`` from ``slot`` on."""

    extent: Extent
    slot: int
    pages: int
    first: int


@dataclass
class StoreStats:
    """Counters since open, but for ``pages``, ``extents`` and ``bytes``, which are what is stored now."""

    pages: int = 0
    extents: int = 0
    bytes: int = 0
    pages_written: int = 0
    bytes_written: int = 0
    pages_dropped: int = 0
    bad_extents: int = 0


def open_direct(path: Path, flags: int) -> int:
    """Open for direct I/O, or buffered where the file system refuses that."""
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags | os.O_CLOEXEC, 0o644)


def read_header(path: Path) -> ExtentHeader:
    """The header of an extent file that is at least as long as its header says. Raises BadExtent or OSError."""
    with path.open("rb") as file:
        prefix = file.read(PREFIX.size)
        if len(prefix) < PREFIX.size:
            raise BadExtent(f"{path.name}: shorter than an extent's prefix")
        length = PREFIX.unpack(prefix)[2]
        size = os.fstat(file.fileno()).st_size
        header = ExtentHeader.decode(prefix + file.read(min(length, size)), path.name)
    if size < header.file_bytes:
        raise BadExtent(f"{path.name}: truncated to {size} of {header.file_bytes} bytes")
    return header


class PageStore:
    """Pages by key. Reads and look-ups may come from any thread; `draft` and `publish` from one at a time.

    Raises PageStoreLocked when another process writes to the same directory, PageStoreUnwritable when the directory
    cannot be made or written, and FingerprintMismatch when ``directory`` holds another fingerprint's extents.
    """

    def __init__(self, directory: Path, fingerprint: bytes, geometry: Geometry, *, writable: bool = True):
        self.directory = directory
        self.fingerprint = fingerprint
        self.geometry = geometry
        self.stats = StoreStats()
        self._extents: dict[int, Extent] = {}
        self._index: dict[bytes, tuple[int, int]] = {}
        self._next = 1
        self._mutex = threading.Lock()
        self._lock_fd = self._acquire() if writable else None
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    @property
    def _extents_dir(self) -> Path:
        return self.directory / "extents"

    @property
    def _partial_dir(self) -> Path:
        return self.directory / "partial"

    def _acquire(self) -> int:
        try:
            for directory in (self._extents_dir, self._partial_dir):
                directory.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            if error.errno in _FULL:
                raise PageStoreFull(
                    f"the disk of the page directory {self.directory} is full: make room, or point "
                    "AGENTSTATE_PAGES_DIR at another disk"
                ) from error
            raise PageStoreUnwritable(
                f"the page directory {self.directory} cannot be written ({error.strerror}): "
                "make it writable, or point AGENTSTATE_PAGES_DIR at another directory"
            ) from error
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
        if not self._extents_dir.is_dir():
            return
        for path in sorted(self._extents_dir.glob("*.ext")):
            if _NAME.fullmatch(path.name) is None:
                logger.warning("page store: ignoring %s, which is no name of an extent", path)
                continue
            # A file that cannot be read keeps its number: it may be a later release's.
            self._next = max(self._next, int(path.stem, 16) + 1)
            try:
                extent = Extent(path, read_header(path))
            except (BadExtent, OSError) as error:
                self.stats.bad_extents += 1
                logger.warning("page store: ignoring %s: %s", path, error)
                continue
            header = extent.header
            if header.fingerprint != self.fingerprint or header.geometry != self.geometry:
                raise FingerprintMismatch(f"{path} was written for another model or layout than this store's")
            self._add(int(path.stem, 16), extent)

    def _add(self, number: int, extent: Extent) -> None:
        with self._mutex:
            self._extents[number] = extent
            for slot, key in enumerate(extent.header.keys):
                self._index[key] = (number, slot)
            self.stats.extents = len(self._extents)
            self.stats.pages = len(self._index)
            self.stats.bytes += extent.header.file_bytes

    def __contains__(self, key: bytes) -> bool:
        return key in self._index

    def prefix_length(self, keys: Sequence[bytes]) -> int:
        """How many of ``keys``, from the first on, are stored. From memory; never touches the disk."""
        index = self._index
        for length, key in enumerate(keys):
            if key not in index:
                return length
        return len(keys)

    def segments(self, keys: Sequence[bytes]) -> list[Segment]:
        """Where ``keys`` lie, in their order. Raises KeyError, with the key, where one is not stored (any more)."""
        found: list[Segment] = []
        with self._mutex:
            last: int | None = None
            for page, key in enumerate(keys):
                number, slot = self._index[key]
                if number == last and found[-1].slot + found[-1].pages == slot:
                    found[-1] = found[-1]._replace(pages=found[-1].pages + 1)
                else:
                    found.append(Segment(self._extents[number], slot, 1, page))
                last = number
        return found

    def pages_within(self, budget_bytes: int) -> int:
        """The most pages whose draft fits ``budget_bytes``; 1 at the least."""
        per_page = self.geometry.page_bytes + 8 * self.geometry.layers + KEY_BYTES
        pages = max(1, budget_bytes // per_page)
        while pages > 1 and self.draft_bytes(pages) > budget_bytes:
            pages -= 1
        return pages

    def draft_bytes(self, pages: int) -> int:
        return ExtentHeader.encoded_bytes(self.geometry, pages) + self.geometry.layers * self.geometry.slab_bytes(pages)

    def draft(self, keys: list[bytes], buffer: mmap.mmap) -> ExtentDraft:
        """An extent of ``keys`` to fill, in ``buffer``, which must hold `draft_bytes` of them. Raises ValueError
        for keys of another length than 32 bytes."""
        return ExtentDraft(self.fingerprint, self.geometry, keys, buffer)

    def publish(self, draft: ExtentDraft) -> None:
        """Make the draft's pages durable and findable: written, `fdatasync`, renamed, directory synced, indexed.

        A reader, and a store opened after a crash, sees all of the extent or nothing. Raises PageStoreFull when the
        disk is full, OSError when it fails and ValueError when the store was opened for reading; then nothing of the
        draft is stored.
        """
        if self._lock_fd is None:
            raise ValueError(f"{self.directory} is not open for writing")
        number, self._next = self._next, self._next + 1
        name = f"{number:016x}.ext"
        partial, final = self._partial_dir / name, self._extents_dir / name
        header, data = draft.seal()
        try:
            fd = open_direct(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            try:
                with _unless_unsupported():
                    os.posix_fallocate(fd, 0, len(data))
                _write_all(fd, data)
                os.fdatasync(fd)
            finally:
                os.close(fd)
            os.rename(partial, final)
            _sync_directory(self._extents_dir)
        except OSError as error:
            partial.unlink(missing_ok=True)
            final.unlink(missing_ok=True)
            if error.errno in _FULL:
                raise PageStoreFull(f"no room for {len(data):,} bytes of KV pages in {self.directory}") from error
            raise
        self._add(number, Extent(final, header))
        self.stats.pages_written += len(draft.keys)
        self.stats.bytes_written += len(data)

    def drop(self, key: bytes) -> None:
        """Stop serving a page, because its bytes turned out wrong. Its extent stays as it is: when the page has been
        computed again it is written anew, and the later extent wins."""
        with self._mutex:
            if self._index.pop(key, None) is not None:
                self.stats.pages = len(self._index)
                self.stats.pages_dropped += 1

    def close(self) -> None:
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None


@contextmanager
def _unless_unsupported() -> Iterator[None]:
    """Preallocation is a help, and some file systems cannot do it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise


def _write_all(fd: int, data: memoryview) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(fd, data[written:], written)


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
