"""Copies between the KV tensors of one rank and staging. Imports torch and not sglang, so that it can be tested on a
GPU machine that has no SGLang. Streams, events and the device context are those of torch's device module: CUDA's, or
that of any other accelerator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from itertools import repeat
from typing import Any, NamedTuple

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

    @property
    def immediate(self) -> bool:
        """Whether a copy is over when the method that makes it returns."""
        return self._stream is None

    def after(self, events: Iterable[torch.Event]) -> None:
        """What is queued from now on begins after these events."""
        for event in events:
            if self._stream is None:
                event.synchronize()
            else:
                self._stream.wait_event(event)

    def so_far(self) -> tuple[torch.Event, ...]:
        """Events for `after`: everything that the calling thread has queued until now, on its own stream."""
        if self._stream is None:
            return ()
        event = self._module.Event()
        event.record()
        return (event,)

    def queueing(self) -> AbstractContextManager[object]:
        """Within it, torch queues on this lane."""
        return nullcontext() if self._stream is None else self._module.stream(self._stream)

    def fence(self) -> Callable[[], None] | None:
        """A function that returns, in any thread, once everything queued so far is over; None if it is already."""
        if self._stream is None:
            return None
        # Sleep while waiting: the core is the forward's. XPU's events offer no choice.
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


class Place(NamedTuple):
    """Some pages of a device in the form that its copies take: ``run`` for consecutive pages, otherwise ``index``,
    their numbers in the memory that looks them up. `DevicePages.place` makes it once, for every layer, on one lane."""

    run: slice | None
    index: np.ndarray | torch.Tensor | None = None


class PageNumbers:
    """The page numbers in ``slots`` of a device, found by the first `__getitem__` (`DevicePages.numbers_in`), which
    raises ValueError if the slots are not whole pages."""

    def __init__(self, device: DevicePages, slots: torch.Tensor, lane: CopyLane):
        # The caller may reuse their memory before they are looked at.
        self._device, self._slots, self._lane = device, slots.detach().clone(), lane
        self._given = lane.so_far()

    @cached_property
    def _found(self) -> torch.Tensor:
        self._lane.after(self._given)
        with self._lane.queueing():
            return self._device.page_numbers(self._slots)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._found[index]


class DevicePages:
    """The pages in one rank's KV tensors.

    ``layers[i]`` are the tensors of layer ``i``, one a component (K and V, or the one latent of MLA), each of shape
    (slots, ...) with a token a row. Pages are aligned in them: page ``p`` is the rows
    ``[p * page_size, (p + 1) * page_size)``. Copies out of them are queued on the lane ``outbound``, copies into them
    on ``inbound``, or on ``background`` where no forward waits for them; a GPU works on all lanes at once. On a CPU
    NumPy makes the copies: unlike torch, it starts no thread pool beside the forward's. ``addressable`` says whether a
    file can be read straight to the pages (`memory`); without ``straight`` it never can. If ``of_pages[i]``, page ``p``
    of component ``i`` is its row ``p``.
    Raises ValueError for tensors that are not laid out so.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[torch.Tensor]],
        page_size: int,
        *,
        straight: bool = True,
        of_pages: Sequence[bool] = (),
    ):
        rows = [1 if of_page else page_size for of_page in of_pages] or repeat(page_size)
        self._rows = [[_page_rows(*part) for part in zip(layer, rows, strict=False)] for layer in layers]
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
        on_host = self.device.type == "cpu"
        self._arrays = [[rows.numpy() for rows in layer] for layer in self._rows] if on_host else None

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

    def numbers_in(self, slots: torch.Tensor, lane: CopyLane) -> PageNumbers:
        """The result of `page_numbers`, found at the first access by the thread that asks. That thread waits for a copy
        on ``lane``, which the scheduler must not."""
        return PageNumbers(self, slots, lane)

    def held_pages(self, slots: torch.Tensor) -> list[tuple[int, int]]:
        """The position and the number of each page of ``slots`` that is still held. A page that is not has no slots of
        its own, but those of the pool's first page, which SGLang never gives out. Raises ValueError unless ``slots``
        are a whole number of pages."""
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

    def place(self, numbers: torch.Tensor, lane: CopyLane) -> Place:
        """Where the pages ``numbers`` are, for copies on ``lane``, out of any layer or into it. Raises ValueError for a
        page number that the device does not have."""
        found = self._existing(numbers).numpy()
        if (np.diff(found) == 1).all():
            # One copy instead of one a page.
            first = int(found[0]) if len(found) else 0
            return Place(slice(first, first + len(found)))
        if self._arrays is not None:
            return Place(None, found)
        with lane.queueing():
            return Place(None, self._on_device(numbers))

    def gather(
        self,
        layer: int,
        pages: torch.Tensor | Place,
        out: Sequence[np.ndarray],
        lane: CopyLane | None = None,
    ) -> None:
        """Device → host, queued on ``lane``, which is ``outbound`` by default: ``pages``, by their numbers or their
        `place`, of ``layer`` into ``out``, a uint8 array of shape (pages, component bytes) a component. Raises
        ValueError for a page number that the device does not have."""
        lane = lane or self.outbound
        if self._arrays is not None:
            place = pages if isinstance(pages, Place) else self.place(pages, lane)
            for source, array in zip(self._arrays[layer], out, strict=True):
                if place.run is None:
                    np.take(source, place.index, axis=0, out=array, mode="clip")
                else:
                    np.copyto(array, source[place.run])
            return
        with lane.queueing():
            place = pages if isinstance(pages, Place) else self.place(pages, lane)
            for rows, array in zip(self._rows[layer], out, strict=True):
                target = torch.from_numpy(array)
                if place.run is not None:
                    target.copy_(rows[place.run], non_blocking=True)
                else:
                    rows, target = _words(rows, target)
                    target.copy_(rows.index_select(0, place.index), non_blocking=True)

    def scatter(
        self,
        layer: int,
        pages: torch.Tensor | Place,
        source: Sequence[np.ndarray | torch.Tensor],
        lane: CopyLane | None = None,
    ) -> None:
        """Staging → device, queued on ``lane``, which is ``inbound`` by default: the inverse of `gather`. ``source``
        is in host memory, or in that of the device: then nothing crosses the bus."""
        lane = lane or self.inbound
        place = pages if isinstance(pages, Place) else self.place(pages, lane)
        if self._arrays is not None:
            for target, array in zip(self._arrays[layer], source, strict=True):
                target[place.index if place.run is None else place.run] = array
            return
        with lane.queueing():
            for rows, array in zip(self._rows[layer], source, strict=True):
                given = array if isinstance(array, torch.Tensor) else torch.from_numpy(array)
                if place.run is not None:
                    rows[place.run].copy_(given, non_blocking=True)
                else:
                    rows, given = _words(rows, given)
                    rows.index_copy_(0, place.index, given.to(self.device, non_blocking=True))

    def runs(self, numbers: torch.Tensor) -> list[slice]:
        """The pages ``numbers`` as runs of consecutive ones. Raises ValueError for a page that the device lacks."""
        found = self._existing(numbers).numpy()
        runs = np.split(found, np.flatnonzero(np.diff(found) != 1) + 1)
        return [slice(int(run[0]), int(run[-1]) + 1) for run in runs if len(run)]

    def memory(self, layer: int, runs: Sequence[slice]) -> list[list[np.ndarray]]:
        """The memory of the pages of ``runs`` in ``layer``: for each component, one uint8 array of shape (pages,
        component bytes) a run. Only if they are `addressable`."""
        assert self._arrays is not None
        return [[rows[run] for run in runs] for rows in self._arrays[layer]]

    def rows(self, layer: int) -> list[np.ndarray]:
        """The memory of a layer: for each component a uint8 array of shape (rows, bytes a row), where row ``r`` is that
        of slot ``r``. Only on a CPU, and only for components with a token a row."""
        assert self._arrays is not None
        size = self.geometry.page_size
        return [pages.reshape(len(pages) * size, -1) for pages in self._arrays[layer]]

    def _on_device(self, numbers: torch.Tensor) -> torch.Tensor:
        # From pageable memory the copy would wait for everything that is queued.
        return numbers.pin_memory().to(self.device, non_blocking=True)


def _page_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """A view with a page, which has so many ``rows``, a row: uint8, shape (whole pages, bytes a page)."""
    if not tensor.is_contiguous():
        raise ValueError("KV tensors must be contiguous")
    whole = tensor.shape[0] // rows
    return tensor[: whole * rows].view(torch.uint8).reshape(whole, -1)


def _words(*rows: torch.Tensor) -> Sequence[torch.Tensor]:
    """The same rows of bytes, eight bytes a number if all of them can be read so: an operation that picks single rows
    moves one number at a time."""
    if all(part.shape[1] % 8 == part.storage_offset() % 8 == part.data_ptr() % 8 == 0 for part in rows):
        return [part.view(torch.int64) for part in rows]
    return rows
