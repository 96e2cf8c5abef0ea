"""The memory between device and disk: pinned where it is the host's, copied back for verification where it is the
device's. Imports torch and not sglang."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence

import numpy as np
import torch

from agentstate.errors import SettingsError
from agentstate.pages import KvikioBackend, PosixBackend, ReadBackend
from engine_patch.transfer import CopyLane

_ALIGNMENT = 4096


def read_backend(name: str, device: torch.device) -> ReadBackend:
    """The backend of the setting ``read_backend`` for pages that go to ``device``. Raises SettingsError if it
    cannot work."""
    if name == "posix":
        return PosixBackend()
    if device.type != "cuda":
        raise SettingsError(
            f"AGENTSTATE_READ_BACKEND=kvikio reads into GPU memory, and this engine's KV is on the {device.type}: "
            "set AGENTSTATE_READ_BACKEND=posix"
        )
    return KvikioBackend(lambda n_bytes: device_memory(n_bytes, device), HostCopies(device).of)


def device_memory(n_bytes: int, device: torch.device) -> torch.Tensor:
    """Bytes of device memory, aligned to 4 KiB, as GPUDirect Storage wants them."""
    memory = torch.empty(n_bytes + _ALIGNMENT, dtype=torch.uint8, device=device)
    skew = -memory.data_ptr() % _ALIGNMENT
    return memory[skew : skew + n_bytes]


class PinnedMemory:
    """Keeps ``memory`` registered with CUDA (or ROCm, which torch calls CUDA) until `close`: copies between it and
    ``device`` are asynchronous then, and as fast as the bus. Does nothing for a CPU, for the device's own memory, or
    for any other accelerator: torch has no call there that registers existing memory, and copies are correct without
    it, only slower.

    Raises SettingsError if so much memory cannot be registered.
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
    """Views of device memory where the CPU can verify them: each calling thread copies them to pinned memory of its
    own, on a stream of its own. The bus carries both directions at once, so verifying takes no bandwidth from the pages
    that arrive."""

    def __init__(self, device: torch.device):
        self._device = device
        self._own = threading.local()

    def of(self, arrays: Sequence[torch.Tensor]) -> list[np.ndarray]:
        """``arrays`` in host memory, valid until the thread asks for others."""
        n_bytes = sum(array.numel() for array in arrays)
        memory: torch.Tensor | None = getattr(self._own, "memory", None)
        if memory is None:
            self._own.lane = CopyLane(self._device)
        if memory is None or len(memory) < n_bytes:
            memory = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
            self._own.memory = memory
        copies, taken = [], 0
        with self._own.lane.queueing():
            for array in arrays:
                copy = memory[taken : taken + array.numel()].view(array.shape)
                copy.copy_(array, non_blocking=True)
                copies.append(copy.numpy())
                taken += array.numel()
        self._own.lane.finish()
        return copies
