"""The memory between device and disk: pinned where it is the host's, copied back for verification where it is the
device's. Imports torch and not sglang."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from agentstate.errors import SettingsError
from agentstate.pages import Chunk, KvikioBackend, PosixBackend, ReadBackend
from engine_patch.transfer import CopyLane

_ALIGNMENT = 4096


def read_backend(name: str, device: torch.device) -> ReadBackend:
    """The backend of the setting ``read_backend`` for pages that go to ``device``. Raises SettingsError where it
    cannot work."""
    if name == "posix":
        return PosixBackend()
    if device.type != "cuda":
        raise SettingsError(
            f"AGENTSTATE_READ_BACKEND=kvikio reads into GPU memory, and this engine's KV is on the {device.type}: "
            "set AGENTSTATE_READ_BACKEND=posix"
        )
    return KvikioBackend(lambda n_bytes: device_memory(n_bytes, device))


def device_memory(n_bytes: int, device: torch.device) -> torch.Tensor:
    """Bytes of device memory, from a page of 4 KiB on, as GPUDirect Storage wants them."""
    memory = torch.empty(n_bytes + _ALIGNMENT, dtype=torch.uint8, device=device)
    skew = -memory.data_ptr() % _ALIGNMENT
    return memory[skew : skew + n_bytes]


class PinnedMemory:
    """Keeps ``memory`` registered with CUDA until `close`: copies between it and ``device`` are asynchronous then, and
    as fast as the bus. Does nothing for a CPU, nor for memory that is the device's own.

    Raises SettingsError when so much memory cannot be registered.
    """

    def __init__(self, memory: mmap.mmap | np.ndarray | torch.Tensor, device: torch.device):
        self._device = device
        self._registered: np.ndarray | None = None
        if device.type != "cuda" or isinstance(memory, torch.Tensor):
            return
        array = np.frombuffer(memory, dtype=np.uint8)
        cuda = torch.cuda.cudart()
        with torch.cuda.device(device):
            result = cuda.cudaHostRegister(array.ctypes.data, array.nbytes, 0)
        if result != cuda.cudaError.success:
            raise SettingsError(
                f"{array.nbytes:,} bytes of staging cannot be pinned ({result}): lower AGENTSTATE_STAGING_BYTES and "
                "AGENTSTATE_SPILL_STAGING_BYTES, or raise the limit on locked memory"
            )
        self._registered = array

    def close(self) -> None:
        """Give the memory back to the host alone. No copy may run; may be called again."""
        array, self._registered = self._registered, None
        if array is not None:
            with torch.cuda.device(self._device):
                torch.cuda.cudart().cudaHostUnregister(array.ctypes.data)


class HostCopies:
    """Chunks where the CPU can verify them.

    A chunk in host memory is there already. One in device memory is copied back, to pinned memory of ``chunk_bytes``,
    on a stream of its own: the bus carries both directions at once, so that verifying takes none of the bandwidth
    that pages arrive with. What is verified is what the device has, the way from the drive included.
    """

    def __init__(self, staging: np.ndarray | torch.Tensor, chunk_bytes: int):
        self._memory: torch.Tensor | None = None
        if isinstance(staging, torch.Tensor):
            self._memory = torch.empty(chunk_bytes, dtype=torch.uint8, pin_memory=staging.is_cuda)
            self._lane = CopyLane(staging.device)

    def of(self, chunk: Chunk) -> Chunk:
        """``chunk`` with its arrays in host memory, valid until the next one is asked for."""
        if self._memory is None:
            return chunk
        parts, taken = [], 0
        with self._lane.queueing():
            for part in chunk.parts:
                arrays, taken = self._copied(self._memory[taken:], part.arrays), taken + _n_bytes(part.arrays)
                parts.append(part._replace(arrays=arrays))
        self._lane.finish()
        return replace(chunk, parts=parts)

    def _copied(self, memory: torch.Tensor, arrays: Sequence[torch.Tensor]) -> list[np.ndarray]:
        copies, taken = [], 0
        for array in arrays:
            copy = memory[taken : taken + array.numel()].view(array.shape)
            copy.copy_(array, non_blocking=True)
            copies.append(copy.numpy())
            taken += array.numel()
        return copies


def _n_bytes(arrays: Sequence[torch.Tensor]) -> int:
    return sum(array.numel() for array in arrays)
