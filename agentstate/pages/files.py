"""Extent files: written so that a reader finds all of one or nothing, and opened for direct I/O."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import lmdb

from agentstate.errors import BadExtent
from agentstate.pages.extent import PREFIX, ExtentHeader
from agentstate.private import FILE_MODE

_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_full(error: OSError | lmdb.Error) -> bool:
    """Whether it says that there is no room, which is no fault of the disk."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return isinstance(error, lmdb.MapFullError) or error.code in _FULL


def open_direct(path: Path, flags: int) -> int:
    """Open for direct I/O, or buffered if the file system refuses that."""
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC, FILE_MODE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags | os.O_CLOEXEC, FILE_MODE)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a published extent. No writer overwrites its space until the context ends.

    Raises FileNotFoundError also if a writer has just taken it out of the store.
    """
    with path.open("rb") as file:
        hold(file.fileno(), path)
        yield file


def hold(fd: int, path: Path) -> None:
    """Keep writers from overwriting the space of the published extent at ``path``, open as ``fd``, until that is
    closed. Raises like `opened`."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FileNotFoundError(errno.ENOENT, "no longer stored", str(path)) from None
    if os.fstat(fd).st_ino != path.stat().st_ino:
        raise FileNotFoundError(errno.ENOENT, "no longer stored", str(path))


def header_of(file: BinaryIO, name: str) -> ExtentHeader:
    """The header of an extent that is at least as long as its header says. Raises BadExtent or OSError."""
    prefix = file.read(PREFIX.size)
    if len(prefix) < PREFIX.size:
        raise BadExtent(f"{name}: shorter than an extent's prefix")
    length = PREFIX.unpack(prefix)[2]
    size = os.fstat(file.fileno()).st_size
    header = ExtentHeader.decode(prefix + file.read(min(length, size)), name)
    if size < header.file_bytes:
        raise BadExtent(f"{name}: truncated to {size} of {header.file_bytes} bytes")
    return header


def read_header(path: Path) -> ExtentHeader:
    """`header_of` the extent at ``path``."""
    with opened(path) as file:
        return header_of(file, path.name)


def publish(partial: Path, final: Path, data: memoryview, spare: Path | None) -> int:
    """Write ``data`` to ``partial``, over the blocks of ``spare`` if there is one, make it durable and rename it to
    ``final``. Returns the file's modification time, in nanoseconds. After an OSError none of the three files is
    left."""
    try:
        fd = _over(spare, partial) if spare is not None else None
        if fd is None:
            fd = _new(partial)
        try:
            with _unless_unsupported():
                os.posix_fallocate(fd, 0, len(data))
            written = 0
            while written < len(data):
                written += os.pwrite(fd, data[written:], written)
            if os.fstat(fd).st_size > len(data):
                os.ftruncate(fd, len(data))
            os.fdatasync(fd)
            mtime_ns = os.fstat(fd).st_mtime_ns
        finally:
            os.close(fd)
        os.rename(partial, final)
        sync_directory(final.parent)
    except OSError:
        for path in (partial, final, spare):
            if path is not None:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
        raise
    return mtime_ns


def link(path: Path, partial: Path) -> tuple[ExtentHeader, int]:
    """Give the published extent at ``path`` a second name, ``partial``, for `publish_link`: its header, and the file's
    modification time, in nanoseconds.

    From then on no writer changes the file, whichever of its names it goes by: it is not written over, and its space is
    free when its last name is gone. Raises FileNotFoundError, like `opened`, BadExtent, and OSError where the file
    system refuses. Then there is no ``partial``.
    """
    with opened(path) as file:
        header = header_of(file, path.name)
        os.link(path, partial)
        status = os.lstat(partial)
        # Its store may have been made anew, and have another extent of that name by now.
        if not os.path.samestat(status, os.fstat(file.fileno())):
            partial.unlink()
            raise FileNotFoundError(errno.ENOENT, "no longer stored", str(path))
    return header, status.st_mtime_ns


def publish_link(partial: Path, final: Path) -> None:
    """Rename what `link` has made to ``final``, durably. After an OSError neither of the two is left."""
    try:
        os.rename(partial, final)
        sync_directory(final.parent)
    except OSError:
        for path in (partial, final):
            with suppress(OSError):
                path.unlink(missing_ok=True)
        raise


def sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _new(partial: Path) -> int:
    """An empty file, open for writing. What has the name already is not emptied: it may be another store's extent too
    (`link`)."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        return open_direct(partial, flags)
    except FileExistsError:
        partial.unlink()
        return open_direct(partial, flags)


def _over(spare: Path, partial: Path) -> int | None:
    """The spare file under its new name, open for writing; None if it is gone, another store has it too (`link`), or a
    reader of another process still has it open."""
    try:
        fd = open_direct(spare, os.O_WRONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # In this order: who links it holds the lock until it has.
        alone = os.fstat(fd).st_nlink == 1
        if alone:
            os.rename(spare, partial)
    except OSError as error:
        os.close(fd)
        if isinstance(error, BlockingIOError):
            spare.unlink()
            return None
        raise
    if not alone:
        os.close(fd)
        spare.unlink()
        return None
    return fd


@contextmanager
def _unless_unsupported() -> Iterator[None]:
    """Let preallocation fail on file systems that cannot do it: it only helps."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
