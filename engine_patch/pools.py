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
from engine_patch import replicas
from engine_patch.quarantine import Quarantine
from engine_patch.sglang_api import (
    ComponentType,
    DSATokenToKVPool,
    HybridLinearKVPool,
    HybridReqToTokenPool,
    MambaPool,
    MHATokenToKVPool,
    MHATokenToKVPoolMXFP8,
    MLATokenToKVPool,
    PoolName,
    SWAKVPool,
    index_keys_in_tiles,
)
from engine_patch.transfer import DevicePages

Layers = list[tuple[torch.Tensor, ...]]
_without_index: frozenset[int] = frozenset()


def look_at(model: Any) -> None:
    """Note which layers of the model that this process serves have no keys to choose by: they go by the choice of
    another layer. SGLang has room for keys of theirs all the same, where nothing is ever written."""
    global _without_index
    modules = (module for module in model.modules() if getattr(module, "use_dsa", False))
    _without_index = frozenset(module.layer_id for module in modules if getattr(module, "indexer", module) is None)


@dataclass(frozen=True)
class DevicePool:
    """One pool of one rank.

    Its layer ``i`` is the model's layer ``model_layers[i]``. ``window_pages`` is how many pages before the end of a
    prefix are needed to resume there; None means all of them, as full attention needs. ``dtypes`` are the KV dtypes as
    the engine reads the bytes, which the tensors may hold as another type. ``allocator`` is SGLang's, which hands out
    the pages; None for recurrent states, which cannot be quarantined (`Quarantine`). So many neighbouring ranks hold
    the same pages, itself included: ``replicas``, 0 where all ranks do. A pool that ``follows`` another has its pages
    in the same places under the same keys, and the tree does not know of it. A row of a layer's tensor ``i`` is a
    token's, or a page's if ``of_pages[i]``.
    """

    name: PoolName
    tensors: Layers
    page_size: int
    model_layers: tuple[int, ...]
    dtypes: tuple[str, ...]
    window_pages: int | None = None
    allocator: Any = None
    replicas: int = 1
    follows: PoolName | None = None
    of_pages: tuple[bool, ...] = ()

    @cached_property
    def device_pages(self) -> DevicePages:
        straight = Quarantine.works(self.allocator)
        return DevicePages(self.tensors, self.page_size, straight=straight, of_pages=self.of_pages)

    def layout(self) -> list[Any]:
        """What decides how its bytes are laid out and read, as JSON values."""
        rows = [list(tensor.shape[1:]) for tensor in self.tensors[0]]
        return [self.name.value, self.page_size, list(self.model_layers), list(self.dtypes), rows, self.window_pages]


def device_pools(params: Any, components: Iterable[ComponentType], draft_model: bool = False) -> list[DevicePool]:
    """The pools that together hold a page of this model, full attention first, with what a ``draft_model`` keeps of it
    last.

    ``params`` and ``components`` are what SGLang constructs a linker with. Raises EngineError, with the reason, if
    a model keeps anything that is not known here.
    """
    pools = _pools_of_target(params, components)
    # SGLang 0.5.22 has none of the latter.
    kept = (*params.mtp_draft_device_pools, *getattr(params, "sidecar_draft_device_pools", ()))
    if draft_model != bool(kept):
        raise EngineError("where its draft model keeps KV is not known")
    if params.mtp_draft_mamba_pools:
        raise EngineError("a draft model with recurrent state of its own is not known")
    return [*pools, *_draft(kept, pools[0])] if kept else pools


def _draft(kvcaches: Sequence[Any], full: DevicePool) -> list[DevicePool]:
    """The draft model's KV, in slots of the same numbers as the target's.

    The draft model runs once the target's forward is over, so whoever waits for the target's last layer waits for all
    of this. If it were missing, answers would be right and hardly any draft accepted: nothing else would tell.
    """
    pools = [kvcache.full_kv_pool if type(kvcache) is HybridLinearKVPool else kvcache for kvcache in kvcaches]
    parts = [_attention(PoolName.DRAFT, pool, full.allocator, None) for pool in pools]
    tensors = [layer for part in parts for layer in part.tensors]
    of_pages = _rows(tensors, len(full.tensors[0][0]), full.page_size, "draft's pool")
    last = (full.model_layers[-1],) * len(tensors)
    dtypes = tuple(dtype for part in parts for dtype in part.dtypes)
    # Which heads of a draft model a rank has was not looked at.
    alike = 1 if any(part.replicas for part in parts) else 0
    draft = DevicePool(
        PoolName.DRAFT,
        tensors,
        full.page_size,
        last,
        dtypes,
        None,
        full.allocator,
        replicas=alike,
        follows=full.name,
        of_pages=of_pages,
    )
    return [draft, *_index(draft, pools)]


def _index(attention: DevicePool, kvcaches: Sequence[Any]) -> list[DevicePool]:
    """The keys by which sparse attention chooses what it attends to (DeepSeek Sparse Attention), or nothing.

    They are in FP8, a page a row: the keys of its tokens, then a scale of each.
    """
    if not any(type(kvcache) is DSATokenToKVPool for kvcache in kvcaches):
        return []
    if any(type(kvcache) is not DSATokenToKVPool or kvcache.index_kpool != 1 for kvcache in kvcaches):
        raise EngineError("an index of groups of tokens is not known")
    buffers = [buffer for kvcache in kvcaches for buffer in kvcache.index_k_with_scale_buffer]
    of_draft = attention.name is PoolName.DRAFT
    without = frozenset() if of_draft else _without_index
    layers = zip(attention.model_layers, buffers, strict=True)
    kept = [(layer, buffer) for layer, buffer in layers if len(buffer) and layer not in without]
    tensors: Layers = [(buffer,) for _, buffer in kept]
    of_pages = _rows(tensors, len(attention.tensors[0][0]), attention.page_size, "index")
    return [
        DevicePool(
            PoolName.DRAFT_INDEXER if of_draft else PoolName.INDEXER,
            tensors,
            attention.page_size,
            tuple(layer for layer, _ in kept),
            (f"{torch.float8_e4m3fn} with {torch.float32}{', in tiles' if index_keys_in_tiles() else ''}",),
            None,
            attention.allocator,
            attention.replicas,
            follows=attention.follows or attention.name,
            of_pages=of_pages,
        )
    ]


def _pools_of_target(params: Any, components: Iterable[ComponentType]) -> list[DevicePool]:
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
        attention = _attention(PoolName.KV, kvcache.full_kv_pool, allocator, full)
        return [attention, _state(requests), *_index(attention, [kvcache.full_kv_pool])]
    if kinds == {ComponentType.FULL}:
        attention = _attention(PoolName.KV, kvcache, allocator, None)
        return [attention, *_index(attention, [kvcache])]
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
    recipe: tuple[str, ...] = ()
    if type(pool) in (MHATokenToKVPool, MHATokenToKVPoolMXFP8):
        if pool.kv_cache_layout != "nhd":
            raise EngineError(f"KV in the layout {pool.kv_cache_layout!r} is not known, only 'nhd'")
        scales = [buffers for buffers in _scales(pool) if buffers is not None]
        if scales:
            # Recipes of quantization may differ in nothing else.
            recipe = (type(pool).__name__, pool.quant_method.name)
        tensors, alike = list(zip(pool.k_buffer, pool.v_buffer, *scales, strict=True)), replicas.of_heads()
    elif type(pool) in (MLATokenToKVPool, DSATokenToKVPool):
        tensors, alike = [(tensor,) for tensor in pool.kv_buffer], 0
    else:
        raise EngineError(f"the KV of a {type(pool).__name__} is not known")
    of_pages = _rows(tensors, pool.size + pool.page_size, allocator.page_size, type(pool).__name__)
    numbered = layers if layers is not None else tuple(range(len(tensors)))
    if len(numbered) != len(tensors):
        raise EngineError(f"a {type(pool).__name__} has {len(tensors)} layers for {len(numbered)} of the model's")
    dtypes = (str(pool.dtype), *recipe)
    return DevicePool(
        name, tensors, allocator.page_size, numbered, dtypes, window_pages, allocator, alike, of_pages=of_pages
    )


def _scales(pool: Any) -> tuple[Any, ...]:
    """What KV in a block-scaled format is multiplied with, a list of layers for keys and one for values, once in the
    order of tokens and once as some kernels want it; None for what there is not."""
    return (pool.k_scale_buffer, pool.v_scale_buffer, pool.native_k_scale_buffer, pool.native_v_scale_buffer)


def _state(requests: Any) -> DevicePool:
    """The recurrent state of linear-attention, Mamba and short-convolution layers: one row a state, not a token."""
    if type(requests) is not HybridReqToTokenPool or type(requests.mamba_pool) is not MambaPool:
        raise EngineError(f"the state of a {type(requests.mamba_pool).__name__} is not known")
    pool = requests.mamba_pool
    cache = pool.mamba_cache
    # The states after each draft that is verified are scratch: the accepted one is copied to the request's own.
    if type(cache) not in (MambaPool.State, MambaPool.SpeculativeState) or any(
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
    _rows(tensors, pool.size + 1, 1, type(pool).__name__)
    dtypes = tuple(str(state.dtype) for state in states)
    layers = tuple(pool.mamba_layer_ids)
    return DevicePool(PoolName.MAMBA, tensors, 1, layers, dtypes, window_pages=1)


def _rows(tensors: Layers, rows: int, page_size: int, pool: str) -> tuple[bool, ...]:
    """Which of the tensors that every layer has are of a row a page, where the others have one a token or state: so
    many ``rows``. Empty if none is. Raises EngineError for a tensor of any other length."""
    lengths = {tuple(len(tensor) for tensor in layer) for layer in tensors}
    (of_layer,) = lengths if len(lengths) == 1 else [()]
    of_pages = tuple(length != rows for length in of_layer)
    if not of_layer or any(length not in (rows, rows / page_size) for length in of_layer):
        raise EngineError(f"the rows of a {pool} are no {rows} tokens or states")
    return of_pages if any(of_pages) else ()
