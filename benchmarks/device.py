"""What the drive gives, measured beside whatever is compared with it."""

from __future__ import annotations

import mmap
import os
import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from agentstate.pages.files import open_direct

_BLOCK = 4 << 20


def read_limit(paths: Sequence[Path], threads: int, repeats: int = 3, at_most: int = 1 << 30) -> float:
    """Bytes a second of direct reads of these files, in blocks of 4 MiB by so many threads: the median of repeats.

    Nothing is done with what is read. Files are taken in their order, until they are ``at_most`` bytes.
    """
    ranges: list[tuple[Path, int]] = []
    for path in paths:
        ranges += [(path, offset) for offset in range(0, path.stat().st_size, _BLOCK)]
    ranges = ranges[: max(1, at_most // _BLOCK)]
    return statistics.median(_read(ranges, threads) for _ in range(repeats))


def drop_from_page_cache(paths: Sequence[Path]) -> None:
    """Leave these files on the drive alone. Those that are gone are no matter."""
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
    """What the processes of a group that still run have read from drives."""
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


def _read(ranges: Sequence[tuple[Path, int]], threads: int) -> float:
    files = {path: open_direct(path, os.O_RDONLY) for path, _ in ranges}
    total, waiting, mutex = [0], iter(ranges), threading.Lock()

    def work() -> None:
        buffer = mmap.mmap(-1, _BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
        ready.wait()
        while True:
            with mutex:
                item = next(waiting, None)
            if item is None:
                return
            count = os.preadv(files[item[0]], [buffer], item[1])
            with mutex:
                total[0] += count

    ready = threading.Barrier(threads + 1)
    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    ready.wait()
    started_s = time.perf_counter()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - started_s
    for fd in files.values():
        os.close(fd)
    return total[0] / seconds
