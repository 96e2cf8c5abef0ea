"""Read backends, which read ranges of an extent into staging memory: POSIX into host memory, or KvikIO into a GPU's.

Neither reads an extent's header: it is small, and needed on the host before anything else.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from agentstate.errors import SettingsError

# A one-dimensional array of uint8: NumPy's, or one in device memory that slices and reshapes alike.
Buffer = Any


_HUGE_PAGE = 2 << 20


def staging_memory(n_bytes: int) -> np.ndarray:
    """Host memory for direct I/O: uint8, of shape (n_bytes,), and zero.

    In huge pages if the kernel has them: it then hands a disk a few long ranges instead of every 4 KiB, which made
    reading and writing 1.3 times as fast. Page faults cost as much as reading: they are taken here, once.
    """
    # Less than a huge page would in fact take a whole one.
    alignment = _HUGE_PAGE if n_bytes >= _HUGE_PAGE else mmap.PAGESIZE
    mapped = mmap.mmap(-1, n_bytes + alignment, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if alignment == _HUGE_PAGE:
        # EINVAL: a kernel that is built without them.
        with suppress(OSError):
            mapped.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(mapped, dtype=np.uint8)
    skew = -memory.ctypes.data % alignment
    memory = memory[skew : skew + n_bytes]
    memory[:: mmap.PAGESIZE] = 0
    return memory


class OpenFile(ABC):
    """A file that a backend reads. ``fd`` is the descriptor that `preadv` reads the same bytes from, into the same
    memory; None if that would be another way than the backend's."""

    fd: int | None = None

    @abstractmethod
    def read(self, into: Buffer, offset: int) -> int:
        """Fill ``into`` from ``offset`` on. Returns how many bytes were read, fewer only at the file's end.

        ``offset``, the length of ``into`` and its place in what `ReadBackend.allocate` gave are multiples of 4 KiB.
        The bytes are there when it returns, also for other threads and CUDA streams. Raises OSError. Nothing
        is promised of what ``into`` holds after that, or beyond what was read.
        """

    @abstractmethod
    def close(self) -> None: ...


class ReadBackend(ABC):
    """Every method may be called from any thread, also at once for the same file."""

    @abstractmethod
    def allocate(self, n_bytes: int) -> Buffer:
        """Staging memory that this backend reads into best; it starts at a page of 4 KiB."""

    @abstractmethod
    def on_host(self, arrays: Sequence[Buffer]) -> Sequence[np.ndarray]:
        """``arrays``, views of what was allocated, where the processor can read them; valid until the calling
        thread asks for others."""

    @abstractmethod
    def open(self, fd: int, path: Path) -> OpenFile:
        """``fd`` is ``path``, open for reading, with direct I/O if the file system has that. The caller keeps it, and
        closes it after the file. Raises OSError."""


class PosixBackend(ReadBackend):
    """`preadv` with direct I/O into host memory: no driver, no thread of its own, the default."""

    def allocate(self, n_bytes: int) -> Buffer:
        return staging_memory(n_bytes)

    def on_host(self, arrays: Sequence[Buffer]) -> Sequence[np.ndarray]:
        return arrays

    def open(self, fd: int, path: Path) -> OpenFile:
        return _PosixFile(fd)


class _PosixFile(OpenFile):
    def __init__(self, fd: int):
        self.fd: int = fd

    def read(self, into: Buffer, offset: int) -> int:
        return os.preadv(self.fd, [into], offset)

    def close(self) -> None:
        pass


class KvikioBackend(ReadBackend):
    """KvikIO, which reads from the drive into device memory by GPUDirect Storage or, if that is not set up (its
    compatibility mode), through pinned bounce buffers of its own.

    ``allocate`` gives the memory to read into: device memory with ``__cuda_array_interface__``, or a NumPy array.
    ``on_host`` copies views of it back, each thread its own, to be verified: so verifying covers what the device has,
    the way from the drive included. Files are opened for reading only. Raises SettingsError if KvikIO is not
    installed or no CUDA driver works: without one every read fails. ``KVIKIO_*`` variables that are set are respected.
    """

    def __init__(self, allocate: Callable[[int], Buffer], on_host: Callable[[Sequence[Buffer]], Sequence[np.ndarray]]):
        _require_driver()
        self._kvikio = _import_kvikio()
        self._allocate = allocate
        self._on_host = on_host

    def allocate(self, n_bytes: int) -> Buffer:
        return self._allocate(n_bytes)

    def on_host(self, arrays: Sequence[Buffer]) -> Sequence[np.ndarray]:
        return self._on_host(arrays)

    def open(self, fd: int, path: Path) -> OpenFile:
        return _KvikioFile(self._kvikio, fd, path)


class _KvikioFile(OpenFile):
    def __init__(self, kvikio: Any, fd: int, path: Path):
        self._fd = fd
        self._path = path
        try:
            self._file = kvikio.CuFile(path, "r")
        except RuntimeError as error:
            raise OSError(f"KvikIO cannot open {path}: {error}") from error

    def read(self, into: Buffer, offset: int) -> int:
        # Where POSIX returns fewer bytes, KvikIO raises.
        n_bytes = min(len(into), os.fstat(self._fd).st_size - offset)
        if n_bytes <= 0:
            return 0
        try:
            return int(self._file.pread(into[:n_bytes], n_bytes, offset).get())
        except RuntimeError as error:
            raise OSError(f"KvikIO cannot read {self._path}: {error}") from error

    def close(self) -> None:
        self._file.close()


def _require_driver() -> None:
    advice = "set AGENTSTATE_READ_BACKEND=posix, or install the driver"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise SettingsError(f"KvikIO needs a CUDA driver, and there is none ({error}): {advice}") from None
    if code := driver.cuInit(0):
        raise SettingsError(f"KvikIO needs a CUDA driver, and the one here fails with error {code}: {advice}")


def _import_kvikio() -> Any:
    if not Path("/proc/modules").exists():
        # cuFile looks there for its kernel module, and for ever.
        os.environ["KVIKIO_COMPAT_MODE"] = "ON"
    # Read once, at the import. One read is several tasks, and in compatibility mode each of them waits for its copy.
    os.environ.setdefault("KVIKIO_NTHREADS", "8")
    os.environ.setdefault("KVIKIO_TASK_SIZE", str(1 << 20))
    os.environ.setdefault("KVIKIO_AUTO_DIRECT_IO_READ", "ON")
    # Otherwise it appears in whatever directory the engine was started in.
    log = Path(tempfile.gettempdir()) / f"cufile-{os.getuid()}-{os.getpid()}.log"
    os.environ.setdefault("CUFILE_LOGFILE_PATH", str(log))
    try:
        import kvikio
    except (ImportError, OSError, RuntimeError) as error:
        # Not installed, or without a library of CUDA's that it needs.
        raise SettingsError(
            f"AGENTSTATE_READ_BACKEND=kvikio needs KvikIO ({error}): pip install 'agentstate[kvikio]'"
        ) from None
    return kvikio
