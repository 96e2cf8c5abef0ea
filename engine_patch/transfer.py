"""Copies between the KV tensors of one rank and staging. Imports torch and not sglang, so that it can be tested on a
GPU machine that has no SGLang. Streams, events and the device context are those of torch's device module: CUDA's, or
that of any other accelerator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from agentstate.pages import Geometry
from agentstate.pages.extent import ALIGNMENT


class CopyLane:
    """Copies that follow each other, in one direction.

    On an accelerator they are queued on a stream of their own and run beside the forward's; their memory must be left
    alone until a `fence` after them has returned. On a CPU a copy is over when the method that makes it returns.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._module = torch.get_device_module(device)
        self._stream = None if device.type == "cpu" else self._module.Stream(device)

    def after(self, events: Iterable[torch.Event]) -> None:
        """What is queued from now on begins after these events."""
        for event in events:
            if self._stream is None:
                event.synchronize()
            else:
                self._stream.wait_event(event)

    def queueing(self) -> AbstractContextManager[object]:
        """Within it, torch queues on this lane."""
        return nullcontext() if self._stream is None else self._module.stream(self._stream)

    def fence(self) -> Callable[[], None] | None:
        """What returns, in any thread, once everything queued so far is over; None when it is."""
        if self._stream is None:
            return None
        # One that sleeps while it waits: the core is the forward's. XPU's events offer no choice.
        event = self._module.Event() if self._device.type == "xpu" else self._module.Event(blocking=True)
        event.record(self._stream)

        def wait() -> None:
            # A thread that has used no device yet would open a context on the first one.
            with self._module.device(self._device):
                event.synchronize()

        return wait

    def finish(self) -> None:
        """Wait until everything queued so far is over."""
        if (wait := self.fence()) is not None:
            wait()


class DevicePages:
    """The pages in one rank's KV tensors.

    ``layers[i]`` are the tensors of layer ``i``, one a component (K and V, or the one latent of MLA), each of shape
    (slots, ...) with a token a row. Pages are aligned in them: page ``p`` is the rows
    ``[p * page_size, (p + 1) * page_size)``. Copies out of them are queued on the lane ``outbound``, copies into them
    on ``inbound``, or on ``background`` where no forward waits for them; a GPU makes them all at once. On a CPU NumPy
    makes them, which unlike torch starts no thread pool beside the forward's. ``addressable`` says whether a file can
    be read straight to them (`memory`), which is never so without ``straight``.
    Raises ValueError for tensors that are not laid out so.
    """

    def __init__(self, layers: Sequence[Sequence[torch.Tensor]], page_size: int, *, straight: bool = True):
        self._rows = [[_page_rows(tensor, page_size) for tensor in layer] for layer in layers]
        shapes = {tuple(rows.shape[1] for rows in layer) for layer in self._rows}
        if len(shapes) != 1:
            raise ValueError(f"layers of different page sizes, in bytes: {sorted(shapes)}")
        self.geometry = Geometry(len(layers), page_size, next(iter(shapes)))
        self.device = layers[0][0].device
        aligned = not any(
            rows.data_ptr() % ALIGNMENT or rows.shape[1] % ALIGNMENT for layer in self._rows for rows in layer
        )
        self.addressable = straight and aligned and self.device.type == "cpu"
        self.outbound, self.inbound, self.background = (CopyLane(self.device) for _ in range(3))

    def __len__(self) -> int:
        return len(self._rows[0][0])

    def page_numbers(self, slots: torch.Tensor) -> torch.Tensor:
        """The page numbers, int64 on the host, of ``slots``, a whole number of pages of row indices.
        Raises ValueError unless every page is aligned and in order."""
        size = self.geometry.page_size
        slots = slots.detach().to("cpu", torch.int64).flatten()
        numbers = slots[::size] // size
        if not torch.equal(slots, ((numbers * size)[:, None] + torch.arange(size)).flatten()):
            raise ValueError("KV slots that are not whole, aligned pages cannot be stored or restored")
        return self._existing(numbers)

    def held_pages(self, slots: torch.Tensor) -> list[tuple[int, int]]:
        """Of ``slots``, which are pages of which some may be no longer held: the position and the number of each page
        that is. What is not held has no slots of a page of its own, but those of the pool's first page, which SGLang
        never gives out. Raises ValueError unless ``slots`` are a whole number of pages."""
        size = self.geometry.page_size
        pages = slots.detach().to("cpu", torch.int64).reshape(-1, size)
        numbers = pages[:, 0] // size
        whole = (pages == (numbers * size)[:, None] + torch.arange(size)).all(dim=1) & (numbers > 0)
        positions = whole.nonzero().flatten()
        return list(zip(positions.tolist(), self._existing(numbers[positions]).tolist(), strict=True))

    def _existing(self, numbers: torch.Tensor) -> torch.Tensor:
        if len(numbers) and not (int(numbers.min()) >= 0 and int(numbers.max()) < len(self)):
            raise ValueError(f"page numbers {numbers.tolist()} are not all on a device of {len(self)} pages")
        return numbers

    def gather(self, layer: int, numbers: torch.Tensor, out: Sequence[np.ndarray]) -> None:
        """Device → host, queued on ``outbound``: the pages ``numbers`` of ``layer`` into ``out``, a uint8 array of
        shape (pages, component bytes) a component. Raises ValueError for a page number that the device has not."""
        run = _as_slice(self._existing(numbers))
        if self.device.type == "cpu":
            for rows, array in zip(self._rows[layer], out, strict=True):
                source = rows.numpy()
                if run is None:
                    np.take(source, numbers.numpy(), axis=0, out=array, mode="clip")
                else:
                    np.copyto(array, source[run])
            return
        with self.outbound.queueing():
            at = self._on_device(numbers) if run is None else None
            for rows, array in zip(self._rows[layer], out, strict=True):
                picked = rows[run] if at is None else rows.index_select(0, at)
                torch.from_numpy(array).copy_(picked, non_blocking=True)

    def scatter(
        self,
        layer: int,
        numbers: torch.Tensor,
        pages: Sequence[np.ndarray | torch.Tensor],
        lane: CopyLane | None = None,
    ) -> None:
        """Staging → device, queued on ``lane``, which is ``inbound`` by default: the inverse of `gather`. ``pages``
        are in host memory, or in that of the device: then nothing crosses the bus."""
        run = _as_slice(self._existing(numbers))
        if self.device.type == "cpu":
            for rows, array in zip(self._rows[layer], pages, strict=True):
                rows.numpy()[run if run is not None else numbers.numpy()] = array
            return
        with (lane or self.inbound).queueing():
            at = self._on_device(numbers) if run is None else None
            for rows, array in zip(self._rows[layer], pages, strict=True):
                source = array if isinstance(array, torch.Tensor) else torch.from_numpy(array)
                if at is None:
                    rows[run].copy_(source, non_blocking=True)
                else:
                    rows.index_copy_(0, at, source.to(self.device, non_blocking=True))

    def runs(self, numbers: torch.Tensor) -> list[slice]:
        """The pages ``numbers`` as runs of consecutive ones. Raises ValueError for a page that the device has not."""
        found = self._existing(numbers).numpy()
        runs = np.split(found, np.flatnonzero(np.diff(found) != 1) + 1)
        return [slice(int(run[0]), int(run[-1]) + 1) for run in runs if len(run)]

    def memory(self, layer: int, runs: Sequence[slice]) -> list[list[np.ndarray]]:
        """Where the pages of ``runs`` are in ``layer``: of each component a uint8 array of shape (pages, component
        bytes) a run. Only where they are `addressable`."""
        return [[rows[run].numpy() for run in runs] for rows in self._rows[layer]]

    def _on_device(self, numbers: torch.Tensor) -> torch.Tensor:
        # From pageable memory the copy would wait for everything that is queued.
        return numbers.pin_memory().to(self.device, non_blocking=True)


def _page_rows(tensor: torch.Tensor, page_size: int) -> torch.Tensor:
    """A view with a page a row: uint8, shape (whole pages, bytes a page)."""
    if not tensor.is_contiguous():
        raise ValueError("KV tensors must be contiguous")
    whole = tensor.shape[0] // page_size
    return tensor[: whole * page_size].view(torch.uint8).reshape(whole, -1)


def _as_slice(numbers: torch.Tensor) -> slice | None:
    """Consecutive page numbers as a slice: one copy instead of one a page."""
    first, count = int(numbers[0]), len(numbers)
    if int(numbers[-1]) - first == count - 1 and torch.equal(numbers, torch.arange(first, first + count)):
        return slice(first, first + count)
    return None
