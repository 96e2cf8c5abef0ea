"""The device pools of an engine that can be stored: which tensors hold a page, and which of a prefix's pages it needs.

This module lists what is known, not what is unknown: a pool with a scale, a sidecar or rows of another meaning would be
stored without them, and every checksum would still match.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from agentstate.errors import EngineError
from engine_patch.quarantine import Quarantine
from engine_patch.sglang_api import (
    ComponentType,
    HybridLinearKVPool,
    HybridReqToTokenPool,
    MambaPool,
    MHATokenToKVPool,
    MLATokenToKVPool,
    PoolName,
    SWAKVPool,
)
from engine_patch.transfer import DevicePages

Layers = list[tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class DevicePool:
    """One pool of one rank.

    Its layer ``i`` is the model's layer ``model_layers[i]``. ``window_pages`` is how many pages before the end of a
    prefix are needed to resume there; None means all of them, as full attention needs. ``dtypes`` are the KV dtypes as
    the engine reads the bytes, which the tensors may hold as another type. ``allocator`` is SGLang's, which hands out
    the pages; None for recurrent states, which cannot be quarantined (`Quarantine`).
    """

    name: PoolName
    tensors: Layers
    page_size: int
    model_layers: tuple[int, ...]
    dtypes: tuple[str, ...]
    window_pages: int | None = None
    allocator: Any = None

    @cached_property
    def device_pages(self) -> DevicePages:
        return DevicePages(self.tensors, self.page_size, straight=Quarantine.works(self.allocator))

    def layout(self) -> list[Any]:
        """What decides how its bytes are laid out and read, as JSON values."""
        rows = [list(tensor.shape[1:]) for tensor in self.tensors[0]]
        return [self.name.value, self.page_size, list(self.model_layers), list(self.dtypes), rows, self.window_pages]


def device_pools(params: Any, components: Iterable[ComponentType]) -> list[DevicePool]:
    """The pools that together hold a page of this model, full attention first.

    ``params`` and ``components`` are what SGLang constructs a linker with. Raises EngineError, with the reason, if
    the model keeps anything that is not known here.
    """
    allocator = params.token_to_kv_pool_allocator
    kvcache = allocator.get_kvcache()
    requests = params.req_to_token_pool
    kinds = set(components)
    if type(kvcache) is SWAKVPool and kinds == {ComponentType.FULL, ComponentType.SWA}:
        if not params.swa_gates_prefix_match or not params.swa_retain_window:
            raise EngineError("its sliding-window state belongs to requests and not to pages")
        window_pages = -(-params.swa_retain_window // params.page_size)
        full, sliding = (_layers_of(kvcache, is_sliding) for is_sliding in (False, True))
        return [
            _attention(PoolName.KV, kvcache.full_kv_pool, allocator.full_attn_allocator, full),
            _attention(PoolName.SWA, kvcache.swa_kv_pool, allocator.swa_attn_allocator, sliding, window_pages),
        ]
    if type(kvcache) is HybridLinearKVPool and kinds == {ComponentType.FULL, ComponentType.MAMBA}:
        full = tuple(kvcache.full_attention_layer_id_mapping)
        return [
            _attention(PoolName.KV, kvcache.full_kv_pool, allocator, full),
            _state(requests),
        ]
    if kinds == {ComponentType.FULL}:
        return [_attention(PoolName.KV, kvcache, allocator, None)]
    names = " and ".join(sorted(kind.name for kind in kinds))
    raise EngineError(f"a {type(kvcache).__name__} with {names} state is not known")


def _layers_of(kvcache: Any, is_sliding: bool) -> tuple[int, ...]:
    """The model's layers in one of the two pools of a `SWAKVPool`, in that pool's order."""
    places = sorted((place, layer) for layer, (place, slides) in kvcache.layers_mapping.items() if slides is is_sliding)
    return tuple(layer for _, layer in places)


def _attention(
    name: PoolName, pool: Any, allocator: Any, layers: tuple[int, ...] | None, window_pages: int | None = None
) -> DevicePool:
    tensors: Layers = []
    if type(pool) is MHATokenToKVPool:
        if pool.kv_cache_layout != "nhd":
            raise EngineError(f"KV in the layout {pool.kv_cache_layout!r} is not known, only 'nhd'")
        if pool.k_scale_buffer is not None or pool.native_k_scale_buffer is not None:
            raise EngineError("KV with scales beside it is not known")
        tensors = list(zip(pool.k_buffer, pool.v_buffer, strict=True))
    elif type(pool) is MLATokenToKVPool:
        tensors = [(tensor,) for tensor in pool.kv_buffer]
    else:
        raise EngineError(f"the KV of a {type(pool).__name__} is not known")
    _require_rows(tensors, pool.size + pool.page_size, type(pool).__name__)
    numbered = layers if layers is not None else tuple(range(len(tensors)))
    if len(numbered) != len(tensors):
        raise EngineError(f"a {type(pool).__name__} has {len(tensors)} layers for {len(numbered)} of the model's")
    return DevicePool(name, tensors, allocator.page_size, numbered, (str(pool.dtype),), window_pages, allocator)


def _state(requests: Any) -> DevicePool:
    """The recurrent state of linear-attention, Mamba and short-convolution layers: one row a state, not a token."""
    if type(requests) is not HybridReqToTokenPool or type(requests.mamba_pool) is not MambaPool:
        raise EngineError(f"the state of a {type(requests.mamba_pool).__name__} is not known")
    pool = requests.mamba_pool
    cache = pool.mamba_cache
    if type(cache) is not MambaPool.State or any(
        getattr(cache, name) is not None
        for name in ("replayssm_d", "replayssm_k", "replayssm_g", "replayssm_rawv", "replayssm_rawk", "replayssm_beta")
    ):
        raise EngineError("recurrent state with records to replay is not known")
    if (
        requests.mamba_ckpt_pool is not None
        or requests.short_conv_pool.enabled
        or requests.ngram_pool.enabled
        or pool._slot_siblings
    ):
        raise EngineError("recurrent state with further state beside it is not known")
    states = [state for state in (cache.temporal, *cache.conv) if state.numel()]
    tensors: Layers = [tuple(state[layer] for state in states) for layer in range(len(pool.mamba_layer_ids))]
    _require_rows(tensors, pool.size + 1, type(pool).__name__)
    dtypes = tuple(str(state.dtype) for state in states)
    layers = tuple(pool.mamba_layer_ids)
    return DevicePool(PoolName.MAMBA, tensors, 1, layers, dtypes, window_pages=1)


def _require_rows(tensors: Sequence[tuple[torch.Tensor, ...]], rows: int, pool: str) -> None:
    if not tensors or any(tensor.shape[0] != rows for layer in tensors for tensor in layer):
        raise EngineError(f"the rows of a {pool} are no {rows} tokens or states")
