"""The parts of a GPU that SGLang's HiCache needs, on a CPU: a plug-in for SGLang that only the benchmark installs.

Copies between its host pool and the device are a kernel on a GPU; here they are index copies of whole pages. Streams of
a CPU have nothing to wait for, and its host memory needs no pinning.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Any

import torch


def register() -> None:
    """Entry point `sglang.srt.plugins`."""
    from sglang.srt.mem_cache.pool_host import mha

    torch.cpu.Stream.synchronize = lambda stream: None
    torch.cpu.Stream.query = lambda stream: True
    mha.transfer_kv_direct = transfer_kv_direct
    construct = mha.MHATokenToKVPoolHost.__init__

    @wraps(construct)
    def unpinned(pool: Any, *args: Any, **kwargs: Any) -> None:
        construct(pool, *args, **{**kwargs, "pin_memory": False})

    mha.MHATokenToKVPoolHost.__init__ = unpinned


def transfer_kv_direct(
    src_layers: Sequence[torch.Tensor],
    dst_layers: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Copy the tokens at ``src_indices`` of every source to ``dst_indices`` of its destination. Indices come as whole
    pages, aligned."""
    source_pages, target_pages = src_indices[::page_size] // page_size, dst_indices[::page_size] // page_size
    for source, target in zip(src_layers, dst_layers, strict=True):
        pages = _pages(source, page_size).index_select(0, source_pages)
        _pages(target, page_size).index_copy_(0, target_pages, pages)


def _pages(tokens: torch.Tensor, page_size: int) -> torch.Tensor:
    """A view of shape (pages, page size, …)."""
    return tokens[: len(tokens) // page_size * page_size].unflatten(0, (-1, page_size))
