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
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileNotFoundError(errno.ENOENT, "no longer stored", str(path)) from None
        if os.fstat(file.fileno()).st_ino != path.stat().st_ino:
            raise FileNotFoundError(errno.ENOENT, "no longer stored", str(path))
        yield file


def header_of(file: BinaryIO, name: str) -> ExtentHeader:
    """The header of an extent that is at least as long as its header says. Raises BadExtent or OSError."""
    prefix = file.read(PREFIX.size)
    if len(prefix) < PREFIX.size:
        raise BadExtent(f"{name}: shorter than an extent's prefix")
    length = PREFIX.unpack(prefix)[2]
    size = os.fstat(file.fileno()).st_size
    header = ExtentHeader.decode(prefix + file.read(min(length, size)), name)
    if size < header.layout.file_bytes:
        raise BadExtent(f"{name}: truncated to {size} of {header.layout.file_bytes} bytes")
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
            fd = open_direct(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
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


def sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _over(spare: Path, partial: Path) -> int | None:
    """The spare file under its new name, open for writing; None if it is gone, or a reader of another process still
    has it open."""
    try:
        fd = open_direct(spare, os.O_WRONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(spare, partial)
    except OSError as error:
        os.close(fd)
        if isinstance(error, BlockingIOError):
            spare.unlink()
            return None
        raise
    return fd


@contextmanager
def _unless_unsupported() -> Iterator[None]:
    """Let preallocation fail on file systems that cannot do it: it only helps."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
