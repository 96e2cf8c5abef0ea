"""A linker as one would write it in a day: a file a page with `torch.save`, no dependency but SGLang's public contract.

Loaded by SGLang: ``--unified-cache-external-linker-backend dynamic`` with this module and ``{"directory": …}``.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import LayerWiseLoadCounter, UnifiedCacheLinker
from sglang.srt.runtime_context import get_parallel

logger = logging.getLogger(__name__)


class FileLinker(UnifiedCacheLinker):
    """Keeps pages of plain multi-head and grouped-query attention. Raises ValueError for any other pool.

    A page's file is a tensor of shape (2 × layers, page size, heads, head size): K of all layers, then V. So no layer
    arrives before all of them have.
    """

    def __init__(
        self, server_args: Any, params: Any, *, components: Any, extra_config: Any, forward_stream: Any = None
    ):
        pool = params.token_to_kv_pool_allocator.get_kvcache()
        if type(pool) is not MHATokenToKVPool:
            raise ValueError(f"the file linker knows MHATokenToKVPool only, and this model has {type(pool).__name__}")
        self.forward_stream = forward_stream
        self.pools = {PoolName.KV: pool}
        self.layer_done_counter = LayerWiseLoadCounter(len(pool.k_buffer))
        self._buffers: list[torch.Tensor] = [*pool.k_buffer, *pool.v_buffer]
        self._page_size: int = params.page_size
        self._directory = Path(extra_config["directory"]) / f"rank{get_parallel().tp_rank}"
        self._directory.mkdir(parents=True, exist_ok=True)
        self._stored = {path.stem for path in self._directory.glob("*.pt")}
        self._queued: dict[str, PoolTransfer] = {}
        self._offloaded: deque[bool] = deque()
        self._loader = ThreadPoolExecutor(1, "file-linker-load")
        self._saver = ThreadPoolExecutor(1, "file-linker-save")

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        lengths = []
        for count, key in enumerate(_kv(transfers).keys, start=1):
            if key not in self._stored:
                break
            lengths.append(count)
        return lengths

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        self._queued[rid] = _kv(transfers)
        return True

    def cancel_queued_load(self, rid: str) -> bool:
        return self._queued.pop(rid, None) is not None

    def start_layer_wise_loading(self) -> int:
        if not self._queued:
            return -1
        index = self.layer_done_counter.update_producer()
        self._loader.submit(self._load, index, list(self._queued.values()), self.record_offload_ready())
        self._queued.clear()
        return index

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        return self.layer_done_counter.finish(counter_index)

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        self._saver.submit(self._save, _kv(transfers), self.record_offload_ready())
        return True

    def num_completed_offloads(self) -> int:
        return len(self._offloaded)

    def pop_completed_offload(self) -> bool:
        return self._offloaded.popleft()

    def reset(self) -> None:
        self._wait()
        self._queued.clear()
        self._offloaded.clear()
        self.layer_done_counter.reset()

    def close(self) -> None:
        self._loader.shutdown()
        self._saver.shutdown()

    def _load(self, index: int, transfers: Sequence[PoolTransfer], ready: Sequence[Any]) -> None:
        try:
            for event in ready:
                event.synchronize()
            for transfer in transfers:
                for key, slots in self._pages(transfer):
                    page = torch.load(self._file(key), weights_only=True)
                    for buffer, part in zip(self._buffers, page, strict=True):
                        buffer[slots] = part.to(buffer.device)
            self._synchronize()
            for layer in range(self.layer_done_counter.num_layers):
                self.layer_done_counter.complete(index, layer)
        except Exception as error:
            logger.exception("the file linker could not load a page")
            self.layer_done_counter.fail(index, error)

    def _save(self, transfer: PoolTransfer, ready: Sequence[Any]) -> None:
        try:
            for event in ready:
                event.synchronize()
            for key, slots in self._pages(transfer):
                if key in self._stored:
                    continue
                partial = self._file(key).with_suffix(".partial")
                torch.save(torch.stack([buffer[slots] for buffer in self._buffers]).cpu(), partial)
                partial.rename(self._file(key))
                self._stored.add(key)
            self._offloaded.append(True)
        except Exception:
            logger.exception("the file linker could not store a page")
            self._offloaded.append(False)

    def _pages(self, transfer: PoolTransfer) -> list[tuple[str, torch.Tensor]]:
        return list(zip(transfer.keys, transfer.device_indices.view(-1, self._page_size), strict=True))

    def _file(self, key: str) -> Path:
        return self._directory / f"{key}.pt"

    def _synchronize(self) -> None:
        if self._buffers[0].is_cuda:
            torch.cuda.synchronize()

    def _wait(self) -> None:
        for thread in (self._loader, self._saver):
            thread.submit(lambda: None).result()


def _kv(transfers: Sequence[PoolTransfer]) -> PoolTransfer:
    return next(transfer for transfer in transfers if transfer.name == PoolName.KV)
