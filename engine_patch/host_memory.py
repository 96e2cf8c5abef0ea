"""The host tier's memory: bounded, taken from the machine as it is needed, pinned where copies want that. Imports torch
and not sglang."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from agentstate.errors import SettingsError
from agentstate.pages import staging_memory
from agentstate.pages.extent import align
from engine_patch.staging import PinnedMemory

logger = logging.getLogger(__name__)

# What is taken from the machine at a time: pinning has a price a call.
_BLOCK_BYTES = 256 << 20
# The share of the machine's memory that all of its ranks take by default, where there is an accelerator.
_SHARE = 8
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


class Piece(NamedTuple):
    """``memory``, uint8, which begins at a page of 4 KiB, and where it is."""

    memory: np.ndarray
    block: int
    start: int


class HostMemory:
    """At most ``n_bytes`` of host memory, in pieces. What was taken from the machine is kept until `close`, and
    registered for copies to ``device``. When the machine gives no more, it is left at what it has given. Thread-safe;
    `give` never waits for the machine.
    """

    def __init__(self, n_bytes: int, device: torch.device):
        self.n_bytes = n_bytes
        self._device = device
        self._mutex = threading.Lock()
        self._growing = threading.Lock()
        self._blocks: list[tuple[np.ndarray, PinnedMemory]] = []
        # Of each block, the ranges that are free, in order.
        self._free: list[list[tuple[int, int]]] = []
        self._used = 0

    @property
    def used(self) -> int:
        """How many bytes have been given out."""
        return self._used

    @property
    def held(self) -> int:
        """How many bytes have been taken from the machine."""
        return sum(len(memory) for memory, _ in self._blocks)

    def take(self, n_bytes: int) -> Piece | None:
        """A piece of at least ``n_bytes``; None when no free range is as long and the bound allows no more."""
        n_bytes = align(n_bytes)
        if (piece := self._fit(n_bytes)) is None:
            with self._growing:
                if (piece := self._fit(n_bytes)) is None and self._grow(n_bytes):
                    piece = self._fit(n_bytes)
        return piece

    def give(self, piece: Piece) -> None:
        """Take a piece back. Nobody may use it any more."""
        with self._mutex:
            self._used -= len(piece.memory)
            ranges = sorted([*self._free[piece.block], (piece.start, piece.start + len(piece.memory))])
            joined = [ranges[0]]
            for start, end in ranges[1:]:
                if start == joined[-1][1]:
                    joined[-1] = joined[-1][0], end
                else:
                    joined.append((start, end))
            self._free[piece.block] = joined

    def close(self) -> None:
        """Give everything back to the machine. No copy may run."""
        with self._growing, self._mutex:
            for _, pinned in self._blocks:
                pinned.close()
            self._blocks, self._free, self.n_bytes = [], [], 0

    def _fit(self, n_bytes: int) -> Piece | None:
        with self._mutex:
            for block, ranges in enumerate(self._free):
                for number, (start, end) in enumerate(ranges):
                    if end - start >= n_bytes:
                        rest = (start + n_bytes, end)
                        ranges[number : number + 1] = [rest] if rest[0] < end else []
                        self._used += n_bytes
                        return Piece(self._blocks[block][0][start : start + n_bytes], block, start)
        return None

    def _grow(self, n_bytes: int) -> bool:
        """Take one more block that has room for ``n_bytes``, unless the bound or the machine forbids it."""
        left = self.n_bytes - self.held
        size = min(left, max(n_bytes, _BLOCK_BYTES)) // 4096 * 4096
        if size < n_bytes:
            return False
        try:
            memory = staging_memory(size)
            pinned = PinnedMemory(memory, self._device)
        except (OSError, MemoryError, SettingsError) as error:
            self.n_bytes = self.held
            logger.warning(
                "agentstate: the host tier stays at %d bytes: the machine gives no more (%s)", self.n_bytes, error
            )
            return False
        with self._mutex:
            self._blocks.append((memory, pinned))
            self._free.append([(0, size)])
        return True


def bound(wanted: int | None, device: torch.device, ranks: int, machine_bytes: int | None = None) -> int:
    """The bound of one rank's host tier, of ``ranks`` on this machine, for the setting ``wanted``: without one, none on
    a CPU, and beside an accelerator a share of the machine's memory. Raises SettingsError for more than the machine
    has."""
    if wanted == 0 or (wanted is None and device.type == "cpu"):
        return 0
    machine_bytes = machine_bytes or machine_memory()
    if wanted is None:
        return machine_bytes // _SHARE // ranks
    if wanted * ranks > machine_bytes:
        raise SettingsError(
            f"AGENTSTATE_HOST_BYTES={wanted}, for each of {ranks} rank(s) on this machine, is more than its memory of "
            f"{machine_bytes:,} bytes: lower it, or set 0 to have no host tier"
        )
    return wanted


def machine_memory(limits: Iterable[Path] = _LIMITS, meminfo: Path = Path("/proc/meminfo")) -> int:
    """The bytes of memory that this process may have: the machine's, or fewer where its control group allows fewer."""
    (total,) = (line.split()[1] for line in meminfo.read_text().splitlines() if line.startswith("MemTotal:"))
    found = [int(total) * 1024]
    for path in limits:
        try:
            found.append(int(path.read_text()))
        except (OSError, ValueError):
            continue  # there is no such group, or it has no limit
    return min(found)
