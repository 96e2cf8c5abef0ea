"""How much a tenant may do, counted for all workers of a service together: its requests and its hints a second, and
the turns that it runs at once.

The counts are in memory that the workers inherit. Each change is made under a lock of the system's, which it takes back
from a process that dies: no worker is left waiting for another one.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import struct
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

BURST_S = 2.0  # a tenant that was quiet may do this many seconds' worth at once

# A tenant's row is one of those of its group: a group is locked as a whole.
_GROUPS = 256
_ROWS = 16
_KEY = struct.Struct("=8s")
_BUCKET = struct.Struct("=dd")  # tokens, and when they were counted
_RUNNING = struct.Struct("=I")
_NOBODY = bytes(_KEY.size)


class Rate(IntEnum):
    """What is limited in how often it is done."""

    REQUESTS = 0
    HINTS = 1


class Limits:
    """Made before the workers start; each then calls `join`. Used on one event loop of each. A tenant that was quiet
    for longest is forgotten if there are thousands of them: it may do a whole burst again."""

    def __init__(self, workers: int = 1):
        self._workers = workers
        self._column = 0
        self._of_buckets = _KEY.size
        self._of_running = _KEY.size + len(Rate) * _BUCKET.size
        self._row_bytes = -(-(self._of_running + workers * _RUNNING.size) // 8) * 8
        self._memory = mmap.mmap(-1, _GROUPS * _ROWS * self._row_bytes)
        self._lock = tempfile.TemporaryFile() if workers > 1 else None  # noqa: SIM115 - open as long as the memory

    def join(self, number: int) -> None:
        """This process is worker ``number``, from 1 on. What the one before it ran has ended with it."""
        self._column = number - 1
        for group in range(_GROUPS):
            with self._locked(group):
                for row in self._rows(group):
                    self._set_running(row, 0)

    def take(self, tenant: str, what: Rate, per_s: float) -> float:
        """Count one, of ``per_s`` a second. Returns 0.0, or in how many seconds there is one to take."""
        now_s, burst = time.monotonic(), max(1.0, per_s * BURST_S)
        key = _key(tenant)
        with self._locked(key[0]):
            at = self._row_of(key) + self._of_buckets + what * _BUCKET.size
            tokens, counted_s = _BUCKET.unpack_from(self._memory, at)
            # One that was never counted is full.
            tokens = min(burst, tokens + (now_s - counted_s) * per_s) if counted_s else burst
            short = tokens < 1
            _BUCKET.pack_into(self._memory, at, tokens if short else tokens - 1, now_s)
        return (1 - tokens) / per_s if short else 0.0

    def begin(self, tenant: str, most: int) -> int | None:
        """Count a turn that runs, for `end`; None, and nothing is counted, where ``most`` run already. 0: any number
        may."""
        key = _key(tenant)
        with self._locked(key[0]):
            row = self._row_of(key)
            if most and self._all_running(row) >= most:
                return None
            self._set_running(row, self._running(row) + 1)
            return row

    def end(self, begun: int) -> None:
        with self._locked(begun // self._row_bytes // _ROWS):
            self._set_running(begun, max(0, self._running(begun) - 1))

    def running(self, tenant: str) -> int:
        """How many turns of a tenant run, at all workers."""
        key = _key(tenant)
        with self._locked(key[0]):
            return sum(self._all_running(row) for row in self._rows(key[0]) if self._key_of(row) == key)

    # --- rows, by where they begin

    def _rows(self, group: int) -> range:
        first = group * _ROWS * self._row_bytes
        return range(first, first + _ROWS * self._row_bytes, self._row_bytes)

    def _row_of(self, key: bytes) -> int:
        free = []
        for row in self._rows(key[0]):
            if (found := self._key_of(row)) == key:
                return row
            if not self._all_running(row):
                free.append((0.0 if found == _NOBODY else self._counted_s(row), row))
        if not free:
            # All of them run something: two tenants share what they may do.
            return self._rows(key[0])[0]
        _, row = min(free)
        self._memory[row : row + self._row_bytes] = bytes(self._row_bytes)
        _KEY.pack_into(self._memory, row, key)
        return row

    def _key_of(self, row: int) -> bytes:
        key: bytes = _KEY.unpack_from(self._memory, row)[0]
        return key

    def _counted_s(self, row: int) -> float:
        at = row + self._of_buckets
        return max(float(_BUCKET.unpack_from(self._memory, at + what * _BUCKET.size)[1]) for what in Rate)

    def _all_running(self, row: int) -> int:
        return sum(struct.unpack_from(f"={self._workers}I", self._memory, row + self._of_running))

    def _running(self, row: int) -> int:
        running: int = _RUNNING.unpack_from(self._memory, row + self._of_running + self._column * _RUNNING.size)[0]
        return running

    def _set_running(self, row: int, number: int) -> None:
        _RUNNING.pack_into(self._memory, row + self._of_running + self._column * _RUNNING.size, number)

    @contextmanager
    def _locked(self, group: int) -> Iterator[None]:
        if self._lock is None:
            yield
            return
        fcntl.lockf(self._lock, fcntl.LOCK_EX, 1, group)
        try:
            yield
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, group)


def _key(tenant: str) -> bytes:
    key = hashlib.blake2b(tenant.encode(), digest_size=_KEY.size).digest()
    return key if key != _NOBODY else b"\1" * _KEY.size
