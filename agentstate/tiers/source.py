"""What is published: a file, and what comes behind it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import BinaryIO

# How much of an object's beginning and end is compared with what is to be published: the header, or most of it.
_END_BYTES = 64 << 10


class Source:
    """All of ``file`` as it is now, and ``trailer``. It has a descriptor of its own: whoever reads it late, after the
    file was closed, must not read another file that got its number. Of what is read, ``file_bytes`` come from ``fd``.
    Raises OSError, marked as the file's own."""

    def __init__(self, file: BinaryIO, trailer: bytes):
        self.fd = os.dup(file.fileno())
        self.file_bytes = os.fstat(self.fd).st_size
        self._trailer = trailer

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        # Of a call that was never begun.
        self.close()

    @property
    def n_bytes(self) -> int:
        return self.file_bytes + len(self._trailer)

    def ends(self) -> Iterator[tuple[int, memoryview]]:
        """What is compared, with its offset: the beginning and the end."""
        length = min(_END_BYTES, self.n_bytes)
        yield 0, self.piece(0, length)
        if self.n_bytes > length:
            yield self.n_bytes - length, self.piece(self.n_bytes - length, length)

    def piece(self, offset: int, n_bytes: int) -> memoryview:
        memory = memoryview(bytearray(n_bytes))
        of_file = max(0, min(n_bytes, self.file_bytes - offset))
        done = 0
        while done < of_file:
            try:
                got = os.preadv(self.fd, [memory[done:of_file]], offset + done)
            except OSError as error:
                raise _of_source(error) from None
            if not got:
                raise _of_source(OSError(errno.EIO, "the extent that is to be published became shorter"))
            done += got
        skipped = max(0, offset - self.file_bytes)
        memory[of_file:] = self._trailer[skipped : skipped + n_bytes - of_file]
        return memory


def _of_source(error: OSError) -> OSError:
    error.of_source = True  # type: ignore[attr-defined]
    return error


def is_of_source(error: BaseException) -> bool:
    """Whether the file that was to be published could not be read, which is no fault of a tier's."""
    return getattr(error, "of_source", False)
