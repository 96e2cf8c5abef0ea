"""Which of SGLang's own device pools are stored, and that every other one is refused by name."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateShape
from sglang.srt.mem_cache import memory_pool

from agentstate.errors import EngineError
from engine_patch.pools import DevicePool, device_pools
from engine_patch.sglang_api import (
    ComponentType,
    HybridLinearKVPool,
    HybridReqToTokenPool,
    MHATokenToKVPool,
    MLATokenToKVPool,
    PoolName,
    SWAKVPool,
)

FULL, SWA, MAMBA = ComponentType.FULL, ComponentType.SWA, ComponentType.MAMBA
PAGE_SIZE, HEADS, SIZE = 4, 2, 8
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
COMMON: dict[str, Any] = {"size": 64, "page_size": PAGE_SIZE, "device": "cpu"}
MHA = COMMON | {"head_num": HEADS, "head_dim": SIZE, "enable_memory_saver": False}


def mha(dtype: torch.dtype = torch.float32) -> Any:
    return MHATokenToKVPool(dtype=dtype, layer_num=3, **MHA)


def mla(dtype: torch.dtype = torch.float32) -> Any:
    latent = {"kv_lora_rank": 16, "qk_rope_head_dim": 4, "enable_memory_saver": False}
    return MLATokenToKVPool(dtype=dtype, layer_num=3, **latent, **COMMON)


def sliding(dtype: torch.dtype = torch.float32) -> Any:
    layers = {"swa_attention_layer_ids": [3, 0, 2], "full_attention_layer_ids": [1, 4]}
    return SWAKVPool(size_swa=32, dtype=dtype, **layers, **MHA)


def requests() -> Any:
    shape = {"intermediate_size": 16, "n_groups": 1, "num_heads": 2, "head_dim": 8, "state_size": 4, "conv_kernel": 4}
    state = Mamba2CacheParams(shape=Mamba2StateShape.create(tp_world_size=1, **shape), layers=[0, 2])
    return HybridReqToTokenPool(
        size=4,
        mamba_size=6,
        mamba_spec_state_size=4,
        max_context_len=64,
        device="cpu",
        enable_memory_saver=False,
        cache_params=state,
        mamba_layer_ids=[0, 2],
        enable_mamba_extra_buffer=False,
    )


def hybrid(requests: Any, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    layers = {"full_attention_layer_ids": [1, 3], "mamba_pool": requests.mamba_pool}
    return HybridLinearKVPool(dtype=dtype, **MHA | layers | fields)


def allocator_of(kvcache: Any) -> Any:
    parts = {name: SimpleNamespace(page_size=PAGE_SIZE) for name in ("full_attn_allocator", "swa_attn_allocator")}
    return SimpleNamespace(get_kvcache=lambda: kvcache, page_size=PAGE_SIZE, **parts)


def found(kvcache: Any, components: Iterable[ComponentType], requests: Any = None, **params: Any) -> list[DevicePool]:
    given = {
        "page_size": PAGE_SIZE,
        "token_to_kv_pool_allocator": allocator_of(kvcache),
        "req_to_token_pool": requests,
        "swa_gates_prefix_match": True,
        "swa_retain_window": None,
    }
    return device_pools(SimpleNamespace(**given | params), set(components))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_full_attention_is_one_pool_of_keys_and_values(dtype: torch.dtype) -> None:
    kvcache = mha(dtype)
    (pool,) = found(kvcache, [FULL])
    assert (pool.name, pool.model_layers, pool.window_pages) == (PoolName.KV, (0, 1, 2), None)
    assert all(k is kvcache.k_buffer[i] and v is kvcache.v_buffer[i] for i, (k, v) in enumerate(pool.tensors))
    n_bytes = PAGE_SIZE * HEADS * SIZE * dtype.itemsize
    assert pool.device_pages.geometry.component_bytes == (n_bytes, n_bytes)
    assert pool.dtypes == (str(dtype),)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_latent_attention_is_one_pool_of_latents(dtype: torch.dtype) -> None:
    kvcache = mla(dtype)
    allocator = allocator_of(kvcache)
    (pool,) = found(kvcache, [FULL], token_to_kv_pool_allocator=allocator)
    assert pool.allocator is allocator
    assert pool.device_pages.geometry.component_bytes == (PAGE_SIZE * 20 * dtype.itemsize,)


def test_dtypes_of_the_same_size_have_different_layouts() -> None:
    layouts = [str(found(mha(dtype), [FULL])[0].layout()) for dtype in DTYPES]
    assert len(set(layouts)) == len(DTYPES)


@pytest.mark.parametrize(("window", "pages"), [(1, 1), (4, 1), (5, 2), (127, 32)])
def test_a_sliding_window_has_a_pool_of_its_own(window: int, pages: int) -> None:
    kvcache = sliding()
    allocator = allocator_of(kvcache)
    full, windowed = found(kvcache, [FULL, SWA], swa_retain_window=window, token_to_kv_pool_allocator=allocator)
    assert full.allocator is allocator.full_attn_allocator
    assert windowed.allocator is allocator.swa_attn_allocator
    assert (full.name, full.model_layers, full.window_pages) == (PoolName.KV, (1, 4), None)
    assert (windowed.name, windowed.model_layers, windowed.window_pages) == (PoolName.SWA, (3, 0, 2), pages)
    assert full.tensors[1][0] is kvcache.full_kv_pool.k_buffer[1]
    assert windowed.tensors[2][1] is kvcache.swa_kv_pool.v_buffer[2]
    assert full.layout() != windowed.layout()


def test_recurrent_state_is_a_pool_of_rows_that_are_states() -> None:
    pools = requests()
    full, state = found(hybrid(pools), [FULL, MAMBA], pools)
    assert (full.name, full.model_layers) == (PoolName.KV, (1, 3))
    assert (state.name, state.model_layers, state.window_pages) == (PoolName.MAMBA, (0, 2), 1)
    assert state.allocator is None
    cache = pools.mamba_pool.mamba_cache
    cache.temporal[1, 5], cache.conv[0][1, 5] = 3.0, 4.0
    temporal, convolution = (tensor[5] for tensor in state.tensors[1])
    assert (temporal == 3).all() and (convolution == 4).all()
    geometry = state.device_pages.geometry
    assert (geometry.layers, geometry.page_size) == (2, 1)
    assert geometry.component_bytes == tuple(t[0].nbytes for t in state.tensors[0])


def test_state_that_is_empty_is_left_out() -> None:
    pools = requests()
    cache = pools.mamba_pool.mamba_cache
    pools.mamba_pool.mamba_cache = type(cache)(conv=cache.conv, temporal=cache.temporal[..., :0])
    _, state = found(hybrid(pools), [FULL, MAMBA], pools)
    assert [len(layer) for layer in state.tensors] == [1, 1]


class AnotherPool(MHATokenToKVPool):
    pass


def changed(pool: Any, **attributes: Any) -> Any:
    for name, value in attributes.items():
        setattr(pool, name, value)
    return pool


def without_layers(pool: Any) -> Any:
    return changed(pool, k_buffer=[], v_buffer=[])


@pytest.mark.parametrize(
    ("kvcache", "components", "reason"),
    [
        (lambda: AnotherPool(dtype=torch.float32, layer_num=1, **MHA), [FULL], "AnotherPool is not known"),
        (lambda: changed(mha(), kv_cache_layout="hnd"), [FULL], "layout 'hnd'"),
        (lambda: changed(mha(), k_scale_buffer=[torch.zeros(1)]), [FULL], "scales"),
        (lambda: changed(mha(), native_k_scale_buffer=[torch.zeros(1)]), [FULL], "scales"),
        (lambda: changed(mha(), size=65), [FULL], "no 69 tokens"),
        (lambda: without_layers(mha()), [FULL], "rows"),
        (sliding, [FULL], "SWAKVPool is not known"),
        (mha, [FULL, SWA], "MHATokenToKVPool with FULL and SWA"),
        (mha, [FULL, MAMBA], "MHATokenToKVPool with FULL and MAMBA"),
        (sliding, [FULL, SWA, MAMBA], "FULL and MAMBA and SWA"),
    ],
)
def test_what_is_not_known_is_refused(kvcache: Any, components: list[ComponentType], reason: str) -> None:
    with pytest.raises(EngineError, match=reason):
        found(kvcache(), components)


def test_windows_that_belong_to_requests_are_refused() -> None:
    for params in ({"swa_gates_prefix_match": False, "swa_retain_window": 8}, {"swa_retain_window": None}):
        with pytest.raises(EngineError, match="belongs to requests"):
            found(sliding(), [FULL, SWA], **params)


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"mamba_ckpt_pool": object()}, "further state beside it"),
        ({"short_conv_pool": SimpleNamespace(enabled=True)}, "further state beside it"),
        ({"ngram_pool": SimpleNamespace(enabled=True)}, "further state beside it"),
    ],
)
def test_state_with_more_beside_it_is_refused(attributes: dict[str, Any], reason: str) -> None:
    pools = changed(requests(), **attributes)
    with pytest.raises(EngineError, match=reason):
        found(hybrid(pools), [FULL, MAMBA], pools)


def test_state_with_siblings_or_records_is_refused() -> None:
    pools = requests()
    pools.mamba_pool._slot_siblings = [object()]
    with pytest.raises(EngineError, match="further state beside it"):
        found(hybrid(pools), [FULL, MAMBA], pools)
    pools = requests()
    cache = pools.mamba_pool.mamba_cache
    pools.mamba_pool.mamba_cache = type(cache)(conv=cache.conv, temporal=cache.temporal, replayssm_g=torch.zeros(1))
    with pytest.raises(EngineError, match="records to replay"):
        found(hybrid(pools), [FULL, MAMBA], pools)


def test_a_state_pool_of_another_type_is_refused() -> None:
    pools = requests()
    pools.mamba_pool = SimpleNamespace()
    with pytest.raises(EngineError, match="state of a SimpleNamespace"):
        found(hybrid(requests()), [FULL, MAMBA], pools)


def test_the_state_has_no_field_that_is_not_known() -> None:
    """A new field of SGLang's state would be left behind in silence."""
    known = {"conv", "temporal", *(f"replayssm_{part}" for part in ("d", "k", "g", "rawv", "rawk", "beta"))}
    assert set(memory_pool.MambaPool.State.__dataclass_fields__) == known
