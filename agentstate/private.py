"""Files and directories that nobody but their user may read: what agents said, and the KV that reveals it."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

FILE_MODE = 0o600
DIRECTORY_MODE = 0o700


def make_directory(directory: Path) -> None:
    """Make a directory that only this user may enter, and those above it that are missing. One that is there stays as
    it is: an operator may share it on purpose. Raises OSError."""
    missing = []
    above = directory
    while not above.exists():
        missing.append(above)
        above = above.parent
    for path in reversed(missing):
        path.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
    if not directory.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))


def close_to_others(path: Path) -> None:
    """Take what others may do with a file or directory of this user from them. Raises OSError."""
    status = path.stat()
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid == os.geteuid() and mode & 0o077:
        path.chmod(mode & 0o700)


def private(path: str, flags: int) -> int:
    """An ``opener`` for `open`: what it makes is this user's alone."""
    return os.open(path, flags, FILE_MODE)


def make_file(path: Path) -> None:
    """Make an empty file that only this user may read, or close one that is there to others. Raises OSError."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, FILE_MODE))
    close_to_others(path)
