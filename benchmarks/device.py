"""The drive's own rate, measured beside whatever is compared with it."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from agentstate.pages import READ_THREADS, staging_memory
from agentstate.pages.files import open_direct
from agentstate.settings import Settings

# The most that `LayerwiseReader` reads at once.
BLOCK_BYTES = 2 << 20


def read_limit(paths: Sequence[Path], threads: int | None = None, repeats: int = 3, at_most: int = 1 << 30) -> float:
    """Bytes a second of direct reads of these files, in blocks of 2 MiB by so many threads, or as many as an
    engine has: the median of repeats.

    Nothing is done with what is read. Files are taken in order, up to ``at_most`` bytes.
    """
    blocks = [staging_memory(BLOCK_BYTES) for _ in range(threads or Settings().read_threads or READ_THREADS)]
    speeds = []
    for _ in range(repeats):
        started_s = time.perf_counter()
        n_bytes = read_files(paths, blocks, at_most)
        speeds.append(n_bytes / (time.perf_counter() - started_s))
    return statistics.median(speeds)


def read_files(paths: Sequence[Path], blocks: Sequence[np.ndarray], at_most: int | None = None) -> int:
    """Read files from end to end, directly, by one thread a block of memory. Returns the bytes that were read."""
    with _opened(paths) as files:
        places = [(fd, at) for fd in files for at in range(0, os.fstat(fd).st_size, BLOCK_BYTES)]
        waiting = iter(places if at_most is None else places[: max(1, at_most // BLOCK_BYTES)])
        taking = threading.Lock()

        def read(block: np.ndarray) -> int:
            n_bytes = 0
            while True:
                with taking:
                    place = next(waiting, None)
                if place is None:
                    return n_bytes
                n_bytes += os.preadv(place[0], [block], place[1])

        with ThreadPoolExecutor(len(blocks)) as pool:
            return sum(pool.map(read, blocks))


@contextmanager
def _opened(paths: Sequence[Path]) -> Iterator[list[int]]:
    files: list[int] = []
    try:
        for path in paths:
            files.append(open_direct(path, os.O_RDONLY))
        yield files
    finally:
        for fd in files:
            os.close(fd)


def drop_from_page_cache(paths: Sequence[Path]) -> None:
    """Leave these files on the drive only. Ignores files that are gone."""
    for path in paths:
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            os.fsync(fd)  # the kernel drops what is on the drive, and nothing else
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def bytes_read(group: int) -> int:
    """The bytes that a group's running processes have read from drives."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            # The command's name, in parentheses, may hold anything.
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                counters = dict(line.split(": ") for line in (process / "io").read_text().splitlines())
                total += int(counters["read_bytes"])
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has ended, or is not ours
    return total
