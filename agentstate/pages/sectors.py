"""Reading scattered sectors of files, with many reads under way, and copying the rows that lie in them once they are
verified: by `native.read_rows`, or by threads and NumPy where that is not there."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any

import numpy as np
import xxhash

from agentstate.pages import native
from agentstate.pages.backends import staging_memory
from agentstate.pages.extent import SECTOR_BYTES

RIGHT, NOT_RIGHT, NOT_READ = 1, 2, 3
"""What becomes of a row. It has been copied; its bytes, or those beside it, are not what the sums say; it has not been
read."""
THREADS_DEEP = 8
"""How many reads are under way at a time where threads make them."""
# The same where the kernel does. Drives reach what they can with some tens.
_DEPTH = 128
# Beyond this, a busy processor that makes reads look dear would make a choice read nearly everything.
_MOST_GAP_BYTES = 16 << 10


class ReadCost:
    """What reads cost on a drive: so many seconds each, and so many a byte, fitted to what was measured, of which the
    latest counts most. Not thread-safe."""

    _FADING = 0.995

    def __init__(self, read_s: float = 10e-6, byte_s: float = 0.5e-9):
        # Weighted sums of the squares and products of reads, bytes and seconds: a few calls of what a common drive
        # does, which never fade, and those that were measured. The first decide what the others leave open.
        n_bytes = 1e6
        self._assumed = (64.0, 0.0, n_bytes**2, 64 * read_s, n_bytes**2 * byte_s)
        self._measured: tuple[float, ...] = (0.0,) * 5

    def note(self, reads: int, n_bytes: int, seconds: float) -> None:
        """So many reads of so many bytes in all took so long, as many at a time as there may be."""
        # Large calls say hardly more than small ones.
        weight = 1 / reads
        values = (reads * reads, reads * n_bytes, n_bytes * n_bytes, reads * seconds, n_bytes * seconds)
        self._measured = tuple(
            self._FADING * old + weight * new for old, new in zip(self._measured, values, strict=True)
        )

    @property
    def gap_bytes(self) -> int:
        """The longest gap that is read sooner than another read begins, at most 16 KiB."""
        rr, rb, bb, rs, bs = map(sum, zip(self._assumed, self._measured, strict=True))
        read_s, byte_s = rs * bb - bs * rb, bs * rr - rs * rb
        if read_s <= 0:
            return 0
        return round(min(read_s / max(byte_s, 1e-300), _MOST_GAP_BYTES))


class Lane:
    """What one call at a time reads with: memory, and a queue of the kernel's where there is one."""

    def __init__(self, n_bytes: int):
        self.sectors = n_bytes // SECTOR_BYTES
        self._memory: np.ndarray | None = None
        self._queue: Any = None
        self._queue_of: Any = None

    @property
    def memory(self) -> np.ndarray:
        if self._memory is None:
            self._memory = staging_memory(self.sectors * SECTOR_BYTES)
        return self._memory

    def queue(self) -> Any:
        """What several reads of one call are under way in; None where threads make them."""
        if native.replaced_preadv() is not None:
            return None
        if self._queue_of is not native.library:
            self._queue, self._queue_of = native.new_queue(_DEPTH), native.library
        return self._queue

    def read(self, reads: np.ndarray, threads: Workers) -> np.ndarray:
        """Carry out reads, each (descriptor, offset, bytes, sector of the memory): how many bytes each has brought, or
        the number of an error, negative."""
        none = np.empty(0, dtype=np.uint64)
        return self.read_rows(reads, none, none, np.empty((0, 0), np.int64), none, (), (), threads)[1]

    def read_rows(
        self,
        reads: np.ndarray,
        sums: np.ndarray,
        seeds: np.ndarray,
        from_: np.ndarray,
        to: np.ndarray,
        row_bytes: Sequence[int],
        into: Sequence[np.ndarray],
        threads: Workers,
    ) -> tuple[np.ndarray, np.ndarray]:
        """What `native.read_rows` does, and what it says of each row and each read."""
        memory = self.memory[: int(reads[:, 2].sum())]
        outcome, got = np.zeros(len(to), dtype=np.uint8), np.zeros(len(reads), dtype=np.int64)
        queue = self.queue()
        if queue is None:
            got[:] = threads.map(partial(_read_now, memory), reads.tolist())
        if native.library is None:
            if len(sums):
                _copy_right(reads, got, memory, sums, seeds, from_, to, row_bytes, into, outcome)
            return outcome, got
        native.library.read_rows(
            queue,
            np.ascontiguousarray(reads),
            got,
            memory,
            sums,
            seeds,
            from_,
            np.ascontiguousarray(np.broadcast_to(to.astype(np.int64, copy=False), from_.shape)),
            np.array(row_bytes, dtype=np.int64),
            into,
            outcome,
        )
        return outcome, got


def _read_now(memory: np.ndarray, read: Sequence[int]) -> int:
    fd, offset, n_bytes, sector = read
    try:
        return os.preadv(fd, [memory[sector * SECTOR_BYTES : sector * SECTOR_BYTES + n_bytes].data], offset)
    except OSError as error:
        return -(error.errno or errno.EIO)


def _copy_right(
    reads: np.ndarray,
    got: np.ndarray,
    memory: np.ndarray,
    sums: np.ndarray,
    seeds: np.ndarray,
    from_: np.ndarray,
    to: np.ndarray,
    row_bytes: Sequence[int],
    into: Sequence[np.ndarray],
    outcome: np.ndarray,
) -> None:
    """What `native.read_rows` does with what has been read."""
    sectors = memory.reshape(-1, SECTOR_BYTES)
    state = np.full(len(sectors), NOT_READ, dtype=np.uint8)
    for (_, _, _, first), n_bytes in zip(reads.tolist(), got.tolist(), strict=True):
        for i in range(first, first + max(0, n_bytes) // SECTOR_BYTES):
            right = xxhash.xxh3_64_intdigest(sectors[i].data, seed=int(seeds[i])) == int(sums[i])
            state[i] = RIGHT if right else NOT_RIGHT
    for begin, size in zip(from_, row_bytes, strict=True):
        first, last = begin // SECTOR_BYTES, (begin + size - 1) // SECTOR_BYTES
        for i in range(int((last - first).max(initial=0)) + 1):
            np.maximum(outcome, state[np.minimum(first + i, last)], out=outcome)
    good = outcome == RIGHT
    for begin, size, array in zip(from_, row_bytes, into, strict=True):
        array[to[good]] = memory[begin[good][:, None] + np.arange(size)]


def expanded(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """For each start so many numbers that follow each other, all in one array."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    steps = np.arange(total, dtype=starts.dtype) - np.repeat((ends - counts).astype(starts.dtype), counts)
    numbers: np.ndarray = np.repeat(starts, counts) + steps
    return numbers


class Workers:
    """Threads that do one thing after the other. They do not keep the process from ending, as a drive that hangs would
    otherwise."""

    def __init__(self, threads: int, name: str):
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)

    def map(self, work: Callable[[Any], int], items: Iterable[Any]) -> list[int]:
        """What ``work`` makes of each of some items, of several at a time."""
        promises = []
        for item in items:
            promise: Future[int] = Future()
            promises.append(promise)
            self.submit(partial(_fulfil, promise, work, item))
        return [promise.result() for promise in promises]

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def close(self) -> None:
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()


def _fulfil(promise: Future[int], work: Callable[[Any], int], item: Any) -> None:
    try:
        promise.set_result(work(item))
    except BaseException as error:
        promise.set_exception(error)
