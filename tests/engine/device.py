"""One rank without an engine: KV tensors on the CPU, and the page store beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from contents import MARK, write

from agentstate.pages import PageStore, staging_memory
from engine_patch.transfer import DevicePages

LAYERS, PAGE_SIZE, HEADS, SIZE = 3, 4, 2, 10
PAGES = 24


def kv_tensors(dtype: torch.dtype = torch.float32, components: int = 2) -> list[tuple[torch.Tensor, ...]]:
    """KV tensors of `PAGES` pages and a few rows that are no whole page, all zero."""
    shape = (PAGES * PAGE_SIZE + 3, HEADS, SIZE)
    return [tuple(torch.zeros(shape, dtype=dtype) for _ in range(components)) for _ in range(LAYERS)]


def aligned_kv_tensors() -> list[tuple[torch.Tensor, ...]]:
    """KV tensors whose pages files can be read to: each component of one is a page of memory."""
    size = 4096 // (PAGE_SIZE * HEADS * 4)
    memory = torch.from_numpy(staging_memory(LAYERS * 2 * PAGES * 4096)).view(torch.float32)
    layers = memory.view(LAYERS, 2, PAGES * PAGE_SIZE, HEADS, size)
    return [(keys, values) for keys, values in layers]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


def fill(tensors: Sequence[Sequence[torch.Tensor]], seed: int = 0) -> None:
    """Random bits: also those that are no number."""
    generator = torch.Generator().manual_seed(seed)
    for layer in tensors:
        for tensor in layer:
            bits = as_bytes(tensor)
            bits.copy_(torch.randint(0, 256, bits.shape, dtype=torch.uint8, generator=generator))


def page_of(tensors: Sequence[Sequence[torch.Tensor]], number: int) -> list[list[bytes]]:
    """The bytes of a device page: for every layer, its components'."""
    rows = slice(number * PAGE_SIZE, (number + 1) * PAGE_SIZE)
    return [[as_bytes(tensor[rows].contiguous()).numpy().tobytes() for tensor in layer] for layer in tensors]


class Rank:
    def __init__(self, directory: Path, addressable: bool = False):
        self.tensors = aligned_kv_tensors() if addressable else kv_tensors()
        self.pages = DevicePages(self.tensors, PAGE_SIZE)
        assert self.pages.addressable is addressable
        self.store = PageStore(directory, MARK, self.pages.geometry)

    def device_pages(self, numbers: Sequence[int]) -> list[list[list[bytes]]]:
        return [page_of(self.tensors, number) for number in numbers]

    def write(self, keys: Sequence[bytes], version: int = 0) -> None:
        write(self.store, keys, version)

    def close(self) -> None:
        self.store.close()
