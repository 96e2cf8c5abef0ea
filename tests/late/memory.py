"""Device memory and what can be done with it: the operators that copies and the tests' forwards use, and no others."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from late.device import LateDevice
    from late.streams import LateStream

# What freed and new device memory holds.
POISON = 0xA5

_VIEWS = {
    "alias",
    "as_strided",
    "detach",
    "expand",
    "select",
    "slice",
    "squeeze",
    "t",
    "transpose",
    "unsqueeze",
    "view",
    "_reshape_alias",
    "_unsafe_view",
}
_IN_PLACE = {"fill_", "zero_", "index_copy_"}
# What makes a new tensor, of its first operand's type, and the shape of that.
_NEW: dict[str, Callable[..., Sequence[int]]] = {
    "clone": lambda tensor: tensor.shape,
    "tanh": lambda tensor: tensor.shape,
    "mm": lambda left, right: (left.shape[0], right.shape[1]),
    "index_select": lambda tensor, dim, index: (*tensor.shape[:dim], len(index), *tensor.shape[dim + 1 :]),
}
# The host has to have their result.
_ANSWERED = {"equal", "_local_scalar_dense"}


class PinnedMemories:
    """Which ranges of host memory are pinned. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ranges: dict[int, tuple[int, object]] = {}

    def add(self, address: int, n_bytes: int, keep: object = None) -> None:
        with self._lock:
            self._ranges[address] = n_bytes, keep

    def remove(self, address: int) -> None:
        with self._lock:
            self._ranges.pop(address, None)

    def covers(self, address: int, n_bytes: int) -> bool:
        with self._lock:
            return any(
                first <= address and address + n_bytes <= first + size for first, (size, _) in self._ranges.items()
            )


class Allocation:
    """Device memory. When nobody has it any more, the stream that it was allocated on writes something else there."""

    def __init__(self, host: torch.Tensor, stream: LateStream):
        self.stream = stream
        if host.numel():
            weakref.finalize(self, _free, host.reshape(-1).view(torch.uint8), stream)


def _free(data: torch.Tensor, stream: LateStream) -> None:
    # It may run in any thread, at any time: nothing is done here, also if the policy would.
    stream.queued.append(lambda: data.fill_(POISON))


class DeviceTensor(torch.Tensor):
    """A tensor on the late device. For torch's C++ it is on the CPU, since there is no accelerator to ask."""

    host: torch.Tensor
    memory: Allocation
    late_device: LateDevice

    @staticmethod
    def __new__(cls, late_device: LateDevice, host: torch.Tensor, memory: Allocation) -> DeviceTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device="cpu",
        )

    def __init__(self, late_device: LateDevice, host: torch.Tensor, memory: Allocation):
        self.late_device, self.host, self.memory = late_device, host, memory

    @classmethod
    def allocate(cls, late_device: LateDevice, like: torch.Tensor, *, written: bool) -> DeviceTensor:
        """New device memory of the shape and type of ``like``, into which the current stream writes it if it is to be
        ``written``."""
        late_device.require("allocate")
        host = torch.empty_like(like, memory_format=torch.contiguous_format)
        if host.numel():
            host.reshape(-1).view(torch.uint8).fill_(POISON)
        made = cls(late_device, host, Allocation(host, late_device.current_stream))
        if written:
            late_device.queue("fill_", lambda: host.copy_(like))
        return made

    @property
    def device(self) -> torch.device:
        return self.late_device.torch_device

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def numpy(self, **options: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def cpu(self) -> torch.Tensor:
        return _copy(torch.empty(self.shape, dtype=self.dtype), self, non_blocking=False)

    def to(self, *args: Any, **options: Any) -> torch.Tensor:
        device, dtype, _ = destination(args, options)
        if dtype not in (None, self.dtype):
            raise NotImplementedError("the late device changes no types")
        return self if device is None or device.type == self.device.type else self.cpu()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype}, {self.device})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        late_device = _device_of(args)
        hosts = tuple(map(_host, args))
        if name == "copy_":
            return _copy(args[0], args[1], bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False)))
        if name in _ANSWERED:
            late_device.current_stream.synchronize()
            return func(*hosts, **kwargs)
        if name in _VIEWS:
            return cls(late_device, func(*hosts, **kwargs), args[0].memory)
        _require_one_device(name, args)
        # Queued work has its operands' bytes, and not their `Allocation`: who lets go of memory that another stream
        # still works on loses it here as well.
        if name in _IN_PLACE:
            late_device.queue(name, lambda: func(*hosts, **kwargs))
            return args[0]
        if name in _NEW:
            late_device.require(name)
            shape = _NEW[name](*args)
            out = cls.allocate(late_device, torch.empty(shape, dtype=args[0].dtype), written=False)
            target = out.host
            late_device.timeline.put(late_device.current_stream, lambda: target.copy_(func(*hosts, **kwargs)))
            return out
        raise NotImplementedError(f"the late device has no {func}")


def to_device(late_device: LateDevice, tensor: torch.Tensor, non_blocking: bool) -> DeviceTensor:
    out = DeviceTensor.allocate(late_device, tensor, written=False)
    _copy(out, tensor, non_blocking)
    return out


def _copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> torch.Tensor:
    late_device = _device_of((target, source))
    to, what = _host(target), _host(source)
    if isinstance(target, DeviceTensor) and isinstance(source, DeviceTensor):
        late_device.queue("copy within", lambda: to.copy_(what))
        return target
    into = isinstance(target, DeviceTensor)
    pinned = late_device.is_pinned(source if into else target)
    if not pinned:
        late_device.pageable_copies += 1
        if into:
            # CUDA stages it before the call returns.
            what = what.clone()
    late_device.queue("copy in" if into else "copy out", lambda: to.copy_(what))
    if not non_blocking or not (pinned or into):
        late_device.current_stream.synchronize()
    return target


def destination(args: tuple[Any, ...], options: dict[str, Any]) -> tuple[torch.device | None, Any, bool]:
    """Where `Tensor.to` is asked to copy to: device, dtype, and whether it may return before that is done."""
    device, dtype, non_blocking = options.get("device"), options.get("dtype"), options.get("non_blocking", False)
    for value in args:
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, bool):
            non_blocking = value
        elif isinstance(value, torch.Tensor):
            device, dtype = value.device, value.dtype
        elif isinstance(value, (str, torch.device)):
            device = value
    return (None if device is None else torch.device(device)), dtype, non_blocking


def _host(value: Any) -> Any:
    return value.host if isinstance(value, DeviceTensor) else value


def _device_of(args: Any) -> LateDevice:
    for value in args:
        if isinstance(value, DeviceTensor):
            return value.late_device
    raise NotImplementedError("no tensor on the late device among the arguments")


def _require_one_device(name: str, args: Any) -> None:
    for value in args:
        if isinstance(value, torch.Tensor) and not isinstance(value, DeviceTensor) and value.dim():
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found at least two")
