"""The directory of one store, and the lock that says whose it is."""

from __future__ import annotations

import fcntl
import os
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from agentstate.errors import PageStoreLocked
from agentstate.private import FILE_MODE, close_to_others, make_directory

# Whoever evicts from a store that nobody has open holds its lock for a moment.
_PATIENCE_S = 1.0
_POLL_S = 0.02
_TOLD = struct.Struct("<?xxxxxxxQQ")


class Told(NamedTuple):
    """What the process that has a store open tells others, in the lock: whether the store ``is_open``, and can be read;
    how many ``offers`` of pages to store are over, stored or not, and how often pages were removed to be erased
    (``erasures``), both since the process began."""

    is_open: bool = False
    offers: int = 0
    erasures: int = 0


def told(directory: Path) -> Told:
    """What is told in a store's directory; nothing unless some process has it open. Raises OSError."""
    try:
        fd = os.open(directory / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return Told()
    try:
        raw = os.pread(fd, _TOLD.size, 0)
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return Told(*_TOLD.unpack(raw)) if len(raw) == _TOLD.size else Told()
    finally:
        os.close(fd)
    # Of a process that has ended.
    return Told()


class StoreDirectory:
    """``path`` with what a store keeps there; see `agentstate.pages.store`. Not thread-safe."""

    def __init__(self, path: Path):
        self.path = path
        self.extents, self.partial, self.index = path / "extents", path / "partial", path / "index"
        self.told = Told()
        self._fds: list[int] = []
        self._opened_as: tuple[tuple[int, int] | None, ...] | None = None

    def extent(self, number: int) -> Path:
        return self.extents / f"{number:016x}.ext"

    def spare(self, number: int) -> Path:
        return self.partial / f"{number:016x}.spare"

    def acquire(self) -> None:
        """Make what is missing, take the lock, and delete what a crash left in ``partial``.

        Raises PageStoreLocked if another process has it open, and OSError.
        """
        self.release()
        until_s = time.monotonic() + _PATIENCE_S
        while not self._lock(last=time.monotonic() >= until_s):
            time.sleep(_POLL_S)
        try:
            for leftover in self.partial.iterdir():
                leftover.unlink()
        except BaseException:
            self.release()
            raise

    def _lock(self, *, last: bool) -> bool:
        """Try to take the lock; False if that may work soon, unless it was the ``last`` attempt."""
        try:
            for directory in (self.extents, self.partial):
                make_directory(directory)
            # The directory of an earlier release may be open to everybody.
            close_to_others(self.path)
            self._fds.append(os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE))
            # While it is open, nothing else gets its inode number.
            self._fds.append(os.open(self.extents, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            fcntl.flock(self._fds[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _identity(self.path / "lock") == _identity(self._fds[0]):
                # What another process has told may be there. Raises where there is no room for it.
                self.told = self.told._replace(is_open=False)
                os.pwrite(self._fds[0], _TOLD.pack(*self.told), 0)
                return True
            self.release()
        except (BlockingIOError, FileNotFoundError) as error:
            self.release()
            if last and isinstance(error, BlockingIOError):
                raise PageStoreLocked(
                    f"another engine writes to {self.path}: stop it, or give this one a directory of its own "
                    "with AGENTSTATE_PAGES_DIR, and the other's with AGENTSTATE_PAGES_SIBLINGS to restore from it"
                ) from error
            if last:
                raise
        except BaseException:
            self.release()
            raise
        return False

    def tell(self, told: Told) -> None:
        """Tell other processes, as long as it is locked (`told`)."""
        self.told = told
        if self._fds:
            with suppress(OSError):
                os.pwrite(self._fds[0], _TOLD.pack(*told), 0)

    def opened(self) -> None:
        """The index is open as well: from now on `intact` compares with all files as they are now."""
        self._opened_as = self._identities()
        self.tell(self.told._replace(is_open=True))

    @property
    def known(self) -> bool:
        """Whether it was opened, and not condemned since."""
        return self._opened_as is not None

    def intact(self) -> bool:
        """Whether it is still what was opened, not deleted or replaced. Takes a few system calls. Raises OSError if
        that cannot be told."""
        if self._opened_as is None or self._identities() != self._opened_as:
            return False
        if not self.partial.is_dir():
            make_directory(self.partial)
        return True

    def condemn(self) -> None:
        """Have it opened anew."""
        self._opened_as = None

    def _identities(self) -> tuple[tuple[int, int] | None, ...]:
        return tuple(_identity(path) for path in (self.path / "lock", self.extents, self.index / "data.mdb"))

    @property
    def locked(self) -> bool:
        return bool(self._fds)

    def release(self) -> None:
        fds, self._fds = self._fds, []
        for fd in reversed(fds):
            os.close(fd)

    def touch(self) -> None:
        """Mark it as used: engines of other fingerprints evict the least recently used store first."""
        with suppress(OSError):
            os.utime(self.path / "lock")


def _identity(path: Path | int) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino
