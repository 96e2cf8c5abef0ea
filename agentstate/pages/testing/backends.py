"""The conformance of a `ReadBackend`."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentstate.pages.backends import Buffer, OpenFile, ReadBackend
from agentstate.pages.files import open_direct

BLOCK = 4096
FILE_BYTES = 40 * BLOCK
_FILL = 0xA5


class ReadBackendTests:
    """Derive from it and override the fixture `backend`, and for memory that is not the host's the two methods."""

    @pytest.fixture
    def backend(self) -> ReadBackend:
        raise NotImplementedError

    def to_host(self, buffer: Buffer) -> bytes:
        return bytes(buffer.tobytes())

    def address(self, buffer: Buffer) -> int:
        return int(buffer.ctypes.data)

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "ranges"
        path.write_bytes(os.urandom(FILE_BYTES))
        return path

    @pytest.fixture
    def file(self, backend: ReadBackend, path: Path) -> Iterator[OpenFile]:
        fd = open_direct(path, os.O_RDONLY)
        file = backend.open(fd, path)
        yield file
        file.close()
        os.close(fd)

    def filled(self, backend: ReadBackend, n_bytes: int) -> Buffer:
        buffer = backend.allocate(n_bytes)
        buffer[:] = _FILL
        return buffer

    def test_memory_is_what_was_asked_for_and_aligned(self, backend: ReadBackend) -> None:
        for n_bytes in (BLOCK, 3 * BLOCK, 1 << 20):
            buffer = backend.allocate(n_bytes)
            assert len(buffer) == n_bytes
            assert self.address(buffer) % BLOCK == 0
            assert len(buffer[BLOCK // 2 : BLOCK].reshape(4, -1)) == 4

    @pytest.mark.parametrize("blocks", [(0, 1), (0, 40), (7, 20), (39, 1)], ids=str)
    def test_a_range_arrives_and_nothing_around_it_changes(
        self, backend: ReadBackend, file: OpenFile, path: Path, blocks: tuple[int, int]
    ) -> None:
        offset, n_bytes = blocks[0] * BLOCK, blocks[1] * BLOCK
        buffer = self.filled(backend, n_bytes + 4 * BLOCK)
        assert file.read(buffer[2 * BLOCK : 2 * BLOCK + n_bytes], offset) == n_bytes
        around = bytes([_FILL]) * (2 * BLOCK)
        assert self.to_host(buffer) == around + path.read_bytes()[offset : offset + n_bytes] + around

    def test_a_buffer_is_used_again(self, backend: ReadBackend, file: OpenFile, path: Path) -> None:
        buffer = self.filled(backend, 4 * BLOCK)
        for block in (3, 0, 36):
            assert file.read(buffer, block * BLOCK) == len(buffer)
            assert self.to_host(buffer) == path.read_bytes()[block * BLOCK : (block + 4) * BLOCK]

    def test_at_the_end_of_the_file_there_is_less_and_beyond_it_nothing(
        self, backend: ReadBackend, file: OpenFile, path: Path
    ) -> None:
        buffer = self.filled(backend, 4 * BLOCK)
        assert file.read(buffer, FILE_BYTES - BLOCK) == BLOCK
        assert self.to_host(buffer[:BLOCK]) == path.read_bytes()[-BLOCK:]
        assert file.read(buffer, FILE_BYTES) == 0
        assert file.read(buffer, FILE_BYTES + BLOCK) == 0

    def test_a_file_that_is_truncated_while_it_is_open_has_less(
        self, backend: ReadBackend, file: OpenFile, path: Path
    ) -> None:
        right = path.read_bytes()
        os.truncate(path, 2 * BLOCK + 100)
        buffer = self.filled(backend, 4 * BLOCK)
        assert file.read(buffer, BLOCK) == BLOCK + 100
        assert self.to_host(buffer[: BLOCK + 100]) == right[BLOCK : 2 * BLOCK + 100]

    def test_reading_leaves_the_file_as_it_is(self, backend: ReadBackend, path: Path) -> None:
        before, right = path.stat(), path.read_bytes()
        path.chmod(0o444)
        fd = open_direct(path, os.O_RDONLY)
        file = backend.open(fd, path)
        assert file.read(backend.allocate(FILE_BYTES), 0) == FILE_BYTES
        file.close()
        os.close(fd)
        assert (path.stat().st_mtime_ns, path.read_bytes()) == (before.st_mtime_ns, right)

    def test_threads_read_one_file_at_once(self, backend: ReadBackend, file: OpenFile, path: Path) -> None:
        right, wrong = path.read_bytes(), list[int]()

        def work(first: int) -> None:
            buffer = self.filled(backend, 2 * BLOCK)
            for block in range(first, 38, 4):
                file.read(buffer, block * BLOCK)
                if self.to_host(buffer) != right[block * BLOCK : (block + 2) * BLOCK]:
                    wrong.append(block)

        threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_open_files_are_closed(self, backend: ReadBackend, path: Path) -> None:
        def descriptors() -> int:
            return sum(os.path.realpath(f"/proc/self/fd/{fd}") == str(path) for fd in os.listdir("/proc/self/fd"))

        fd = open_direct(path, os.O_RDONLY)
        file = backend.open(fd, path)
        file.close()
        assert descriptors() == 1
        os.close(fd)
