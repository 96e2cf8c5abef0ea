"""Copies between the KV tensors of one rank and slabs in host memory. Imports torch and not sglang, so that it can be
tested on a GPU machine that has no SGLang."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from agentstate.pages import Geometry


class DevicePages:
    """The pages in one rank's KV tensors.

    ``layers[i]`` are the tensors of layer ``i``, one a component (K and V, or the one latent of MLA), each of shape
    (slots, ...) with a token a row. Pages are aligned in them: page ``p`` is the rows
    ``[p * page_size, (p + 1) * page_size)``. Copies are finished when a method returns: on a GPU they run on a stream
    of their own, on a CPU in NumPy, which unlike torch starts no thread pool beside the forward's. Raises ValueError
    for tensors that are not laid out so.
    """

    def __init__(self, layers: Sequence[Sequence[torch.Tensor]], page_size: int):
        self._rows = [[_page_rows(tensor, page_size) for tensor in layer] for layer in layers]
        shapes = {tuple(rows.shape[1] for rows in layer) for layer in self._rows}
        if len(shapes) != 1:
            raise ValueError(f"layers of different page sizes, in bytes: {sorted(shapes)}")
        self.geometry = Geometry(len(layers), page_size, next(iter(shapes)))
        self.device = layers[0][0].device
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

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
        pages = len(self._rows[0][0])
        if len(numbers) and not (int(numbers.min()) >= 0 and int(numbers.max()) < pages):
            raise ValueError(f"page numbers {numbers.tolist()} are not all on a device of {pages} pages")
        return numbers

    def gather(self, layer: int, numbers: torch.Tensor, out: Sequence[np.ndarray]) -> None:
        """Device → host: the pages ``numbers`` of ``layer`` into ``out``, a uint8 array of shape (pages, component
        bytes) a component. Raises ValueError for a page number that the device has not."""
        run = _as_slice(self._existing(numbers))
        for rows, array in zip(self._rows[layer], out, strict=True):
            if self._stream is None:
                source = rows.numpy()
                if run is None:
                    np.take(source, numbers.numpy(), axis=0, out=array, mode="clip")
                else:
                    np.copyto(array, source[run])
            else:
                with torch.cuda.stream(self._stream):
                    picked = rows[run] if run is not None else rows[numbers.to(self.device)]
                    torch.from_numpy(array).copy_(picked)
        self._finish()

    def scatter(self, layer: int, numbers: torch.Tensor, pages: Sequence[np.ndarray]) -> None:
        """Host → device, the inverse of `gather`."""
        run = _as_slice(self._existing(numbers))
        for rows, array in zip(self._rows[layer], pages, strict=True):
            if self._stream is None:
                rows.numpy()[run if run is not None else numbers.numpy()] = array
            else:
                with torch.cuda.stream(self._stream):
                    host = torch.from_numpy(array).to(self.device, non_blocking=True)
                    if run is not None:
                        rows[run].copy_(host)
                    else:
                        rows.index_copy_(0, numbers.to(self.device), host)
        self._finish()

    def _finish(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


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
