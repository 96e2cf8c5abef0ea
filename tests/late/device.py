"""The device: its memory, its faults, and how it takes the place of an accelerator in torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from late.memory import DeviceTensor, PinnedMemories, destination, to_device
from late.streams import LateEvent, LateStream, Policy, Timeline

# Factories that may be asked for a tensor on the device.
_FACTORIES = ("empty", "zeros", "ones", "full", "arange", "randn", "randint", "tensor")


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. (The late device was told so.)")


def illegal_access() -> Exception:
    return torch.AcceleratorError("CUDA error: an illegal memory access was encountered (the late device was told so)")


@dataclass
class _Fault:
    what: str
    after: int
    times: float
    error: Callable[[], Exception]
    sticky: bool


class LateDevice:
    """One accelerator of the ``kind`` of torch that has that name, whose work is done by ``policy``.

    `installed` puts it in the place of the real one. Device tensors say that they are on it, cannot be looked at by
    NumPy, and are overwritten, by the stream they were allocated on, when they are freed. A copy to or from host memory
    that is not pinned ends before the call returns, as on CUDA; ``pageable_copies`` counts them.
    """

    def __init__(self, policy: Policy, kind: str = "cuda"):
        self.policy = policy
        self.torch_device = torch.device(kind, 0)
        self.timeline = Timeline(policy)
        self.pinned = PinnedMemories()
        self.pageable_copies = 0
        self.faults = 0
        # Called in the thread that asks, with what is asked for, before it is done.
        self.watch: Callable[[str], None] = lambda what: None
        self._faults: list[_Fault] = []
        self._broken: _Fault | None = None
        self._own = threading.local()
        self._default_stream = LateStream(self)

    @property
    def current_stream(self) -> LateStream:
        return getattr(self._own, "stream", None) or self._default_stream

    def fail(
        self,
        what: str,
        *,
        after: int = 0,
        times: float = 1,
        error: Callable[[], Exception] = out_of_memory,
        sticky: bool = False,
    ) -> None:
        """Raise, ``times`` times, where the device is asked for ``what`` once more than ``after`` times: "allocate",
        "stream", "record", "wait", "synchronize", "pin", or the name of an operator of torch's, of which a copy is
        "copy in", "copy out" or "copy within". After one that is ``sticky`` every call raises, whatever it asks for,
        and no work is done any more."""
        self._faults.append(_Fault(what, after, times, error, sticky))

    def require(self, what: str) -> None:
        """Raise what `fail` asked for."""
        self.watch(what)
        with self.timeline.lock:
            if self._broken is not None:
                raise self._broken.error()
            for fault in self._faults:
                if fault.what == what:
                    fault.after -= 1
                    if fault.after < 0 and fault.times > 0:
                        fault.times -= 1
                        self.faults += 1
                        if fault.sticky:
                            self._broken = fault
                            for stream in self.timeline.streams:
                                stream.queued.clear()
                        raise fault.error()

    def queue(self, what: str, work: Callable[[], object]) -> None:
        """Queue work on the current stream."""
        self.require(what)
        self.timeline.put(self.current_stream, work)

    def synchronize(self) -> None:
        self.require("synchronize")
        for stream in self.timeline.streams:
            self.timeline.drain(stream)

    @contextmanager
    def on(self, stream: LateStream | None) -> Iterator[None]:
        """Stands for `torch.cuda.stream`."""
        before = getattr(self._own, "stream", None)
        self._own.stream = stream or before
        try:
            yield
        finally:
            self._own.stream = before

    @contextmanager
    def installed(self) -> Iterator[LateDevice]:
        """Within it, torch's device module, factories and copies are this device's. Afterwards everything in torch is
        what it was; device tensors that are left keep working among themselves."""
        with pytest.MonkeyPatch.context() as patch:
            self._install_module(patch)
            self._install_tensors(patch)
            yield self

    def _install_module(self, patch: pytest.MonkeyPatch) -> None:
        module = getattr(torch, self.torch_device.type)
        offered: dict[str, Any] = {
            "Stream": partial(LateStream, self),
            "Event": partial(LateEvent, self),
            "stream": self.on,
            "current_stream": lambda device=None: self.current_stream,
            "default_stream": lambda device=None: self._default_stream,
            "synchronize": lambda device=None: self.synchronize(),
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "device": lambda device: nullcontext(),
        }
        if self.torch_device.type == "cuda":
            offered["cudart"] = lambda: SimpleNamespace(
                cudaError=SimpleNamespace(success=0),
                cudaHostRegister=self._register,
                cudaHostUnregister=self.pinned.remove,
            )
        for name, value in offered.items():
            patch.setattr(module, name, value, raising=False)

    def _register(self, address: int, n_bytes: int, flags: int) -> int:
        try:
            self.require("pin")
        except torch.OutOfMemoryError:
            return 2
        self.pinned.add(address, n_bytes)
        return 0

    def _install_tensors(self, patch: pytest.MonkeyPatch) -> None:
        kind = self.torch_device.type
        real_to, real_empty = torch.Tensor.to, torch.empty

        def to(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            device, dtype, non_blocking = destination(args, options)
            if isinstance(tensor, DeviceTensor) or device is None or device.type != kind:
                return real_to(tensor, *args, **options)
            return to_device(self, tensor if dtype is None else real_to(tensor, dtype), non_blocking)

        def pin_memory(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
            return self._pinned(tensor.clone())

        def factory(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            def make(*args: Any, device: Any = None, pin_memory: bool = False, **options: Any) -> torch.Tensor:
                if device is None or torch.device(device).type != kind:
                    made = real(*args, **options) if device is None else real(*args, device=device, **options)
                    return self._pinned(made) if pin_memory else made
                made = real(*args, **options)
                return DeviceTensor.allocate(self, made, written=real is not real_empty)

            return make

        patch.setattr(torch.Tensor, "to", to)
        patch.setattr(torch.Tensor, "pin_memory", pin_memory)
        patch.setattr(torch.Tensor, "is_pinned", lambda tensor, device=None: self.is_pinned(tensor))
        for name in _FACTORIES:
            patch.setattr(torch, name, factory(getattr(torch, name)))

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        self.require("pin")
        # It stays, so that no other memory is taken for pinned.
        self.pinned.add(tensor.data_ptr(), tensor.nbytes, keep=tensor)
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return not isinstance(tensor, DeviceTensor) and self.pinned.covers(tensor.data_ptr(), tensor.nbytes)
