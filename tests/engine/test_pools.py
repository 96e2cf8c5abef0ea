"""Which of SGLang's own device pools are stored, and that every other one is refused by name."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateShape
from sglang.srt.mem_cache import memory_pool
from sglang.srt.runtime_context import get_parallel

from agentstate.errors import EngineError
from engine_patch import pools as known
from engine_patch.pools import DevicePool, device_pools
from engine_patch.sglang_api import (
    ComponentType,
    DSATokenToKVPool,
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
        "mtp_draft_device_pools": (),
        "mtp_draft_mamba_pools": (),
        "sidecar_draft_device_pools": (),
    }
    drafts = params.pop("drafts", False)
    return device_pools(SimpleNamespace(**given | params), set(components), drafts)


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


def scaled(name: str = "a recipe", **buffers: Any) -> Any:
    """KV in a block-scaled format."""
    return changed(mha(torch.uint8), quant_method=SimpleNamespace(name=name), **buffers)


def test_scales_are_stored_with_what_they_scale() -> None:
    """Those of a token in its row, and those that a kernel wants in the order of its own in the row of a page."""
    of_tokens, of_pages = ([torch.rand(rows, HEADS, 2) for _ in range(3)] for rows in (68, 17))
    buffers = {"k_scale_buffer": of_tokens, "v_scale_buffer": of_tokens}
    (pool,) = found(scaled(**buffers, native_k_scale_buffer=of_pages, native_v_scale_buffer=of_pages), [FULL])
    assert pool.of_pages == (False, False, False, False, True, True)
    n_bytes = pool.device_pages.geometry.component_bytes
    assert n_bytes[2:4] == (PAGE_SIZE * HEADS * 2 * 4,) * 2 and n_bytes[4:] == (HEADS * 2 * 4,) * 2
    out = [np.zeros((1, n), dtype=np.uint8) for n in n_bytes]
    pool.device_pages.gather(1, torch.tensor([3]), out)
    assert out[2].tobytes() == of_tokens[1][3 * PAGE_SIZE : 4 * PAGE_SIZE].numpy().tobytes()
    assert out[5].tobytes() == of_pages[1][3].numpy().tobytes()
    (without,) = found(scaled(**buffers), [FULL])
    (other,) = found(scaled("another", **buffers), [FULL])
    assert len({str(one.layout()) for one in (pool, without, other)}) == 3


def sparse(pages: int = 3, layers: int = 3, **fields: Any) -> Any:
    with get_parallel().override(attn_dcp_size=1, dcp_enabled=False):
        return DSATokenToKVPool(
            size=64 * pages,
            page_size=64,
            kv_lora_rank=16,
            dtype=torch.bfloat16,
            qk_rope_head_dim=4,
            layer_num=layers,
            device="cpu",
            index_head_dim=128,
            enable_memory_saver=False,
            kv_cache_dim=20,
            **fields,
        )


def sparse_pools(kvcache: Any, **params: Any) -> list[DevicePool]:
    allocator = SimpleNamespace(get_kvcache=lambda: kvcache, page_size=64)
    return found(kvcache, [FULL], page_size=64, token_to_kv_pool_allocator=allocator, **params)


@pytest.fixture
def all_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "_without_index", frozenset())


@pytest.mark.usefixtures("all_choose")
def test_the_keys_of_sparse_attention_are_a_pool_that_follows_its_kv() -> None:
    kvcache = sparse()
    full, index = sparse_pools(kvcache)
    assert (index.name, index.follows, index.model_layers) == (PoolName.INDEXER, PoolName.KV, (0, 1, 2))
    assert (index.replicas, index.window_pages, index.page_size) == (full.replicas, None, 64)
    assert len(index.device_pages) == len(full.device_pages) == 4
    assert index.device_pages.geometry.component_bytes == (64 * (128 + 4),)
    out = [np.zeros((1, 64 * 132), dtype=np.uint8)]
    kvcache.index_k_with_scale_buffer[1][2] = torch.arange(64 * 132) % 251
    index.device_pages.gather(1, index.device_pages.page_numbers(torch.arange(128, 192)), out)
    assert out[0].tolist() == [(torch.arange(64 * 132) % 251).tolist()]


@pytest.mark.usefixtures("all_choose")
def test_layers_that_go_by_the_choice_of_another_one_have_no_keys() -> None:
    (_, index) = sparse_pools(sparse(skip_topk_layers=[False, True, False]))
    assert index.model_layers == (0, 2)
    # With a linker SGLang has room for them, which is never written.
    attention = [
        SimpleNamespace(use_dsa=True, layer_id=layer, indexer=None if layer else object()) for layer in range(2)
    ]
    known.look_at(SimpleNamespace(modules=lambda: iter([SimpleNamespace(use_dsa=True), *attention])))
    (_, index) = sparse_pools(sparse())
    assert index.model_layers == (0, 2)
    # A draft model's layers have their own numbers.
    *_, draft, of_draft = sparse_pools(sparse(), **draft_of(sparse(layers=2), packed=True))
    assert (draft.name, of_draft.name) == (PoolName.DRAFT, PoolName.DRAFT_INDEXER)
    assert (of_draft.follows, of_draft.model_layers) == (PoolName.KV, (2, 2))


@pytest.mark.parametrize(("field", "value"), [("index_kpool", 2)])
def test_an_index_that_is_not_known_is_refused(field: str, value: Any) -> None:
    with pytest.raises(EngineError, match="index of groups"):
        sparse_pools(changed(sparse(), **{field: value}))


def test_keys_in_tiles_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = sparse_pools(sparse())[1].layout()
    monkeypatch.setattr(known, "index_keys_in_tiles", lambda: True)
    assert sparse_pools(sparse())[1].layout() != plain


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


def test_states_of_drafts_that_are_verified_are_not_stored() -> None:
    pools = requests()
    cache = pools.mamba_pool.mamba_cache
    scratch = {"intermediate_ssm": torch.zeros(2, 4, 3, 8), "intermediate_conv_window": [torch.zeros(2, 4, 3, 8)]}
    pools.mamba_pool.mamba_cache = memory_pool.MambaPool.SpeculativeState(
        conv=cache.conv, temporal=cache.temporal, **scratch
    )
    _, state = found(hybrid(pools), [FULL, MAMBA], pools)
    assert [tensor.data_ptr() for tensor in state.tensors[1]] == [
        tensor[1].data_ptr() for tensor in (cache.temporal, *cache.conv)
    ]


def test_state_that_is_empty_is_left_out() -> None:
    pools = requests()
    cache = pools.mamba_pool.mamba_cache
    pools.mamba_pool.mamba_cache = type(cache)(conv=cache.conv, temporal=cache.temporal[..., :0])
    _, state = found(hybrid(pools), [FULL, MAMBA], pools)
    assert [len(layer) for layer in state.tensors] == [1, 1]


def draft_of(*kvcaches: Any, packed: bool = False, **params: Any) -> dict[str, Any]:
    """What SGLang tells of draft models."""
    return {("mtp" if packed else "sidecar") + "_draft_device_pools": kvcaches, "drafts": True, **params}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("make", [mha, mla])
def test_what_a_draft_keeps_is_a_pool_that_follows_full_attention(make: Any, packed: bool) -> None:
    target, draft = mha(), make(torch.bfloat16)
    allocator = allocator_of(target)
    full, drafts = found(target, [FULL], token_to_kv_pool_allocator=allocator, **draft_of(draft, packed=packed))
    assert (drafts.name, drafts.follows, full.follows) == (PoolName.DRAFT, PoolName.KV, None)
    assert (drafts.allocator, drafts.window_pages, drafts.page_size) == (allocator, None, PAGE_SIZE)
    # All of it is waited for with the target's last layer.
    assert drafts.model_layers == (2, 2, 2)
    assert drafts.dtypes == ("torch.bfloat16",)
    assert len(drafts.device_pages) == len(full.device_pages)
    assert drafts.layout() != full.layout()


def test_a_draft_of_attention_beside_a_target_with_states_is_known() -> None:
    pools = requests()
    full, state, drafts = found(hybrid(pools), [FULL, MAMBA], pools, **draft_of(hybrid(pools), packed=True))
    assert [pool.name for pool in (full, state, drafts)] == [PoolName.KV, PoolName.MAMBA, PoolName.DRAFT]
    assert drafts.model_layers == (3, 3)


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"drafts": True}, "where its draft model keeps KV"),
        ({"sidecar_draft_device_pools": (object(),)}, "where its draft model keeps KV"),
        (draft_of(object()), "KV of a object is not known"),
        (lambda: draft_of(sliding()), "KV of a SWAKVPool is not known"),
        (lambda: draft_of(scaled(k_scale_buffer=[torch.zeros(1)] * 3)), "no 68 tokens"),
        (lambda: draft_of(MHATokenToKVPool(dtype=torch.float32, layer_num=1, **MHA | {"size": 32})), "no 68 tokens"),
        (lambda: draft_of(mha(), packed=True, mtp_draft_mamba_pools=(object(),)), "recurrent state of its own"),
    ],
)
def test_a_draft_that_is_not_known_is_refused(params: Any, reason: str) -> None:
    with pytest.raises(EngineError, match=reason):
        found(mha(), [FULL], **(params() if callable(params) else params))


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
        (lambda: scaled(k_scale_buffer=[torch.zeros(1)] * 3), [FULL], "no 68 tokens"),
        (lambda: scaled(k_scale_buffer=[torch.zeros(68), torch.zeros(17), torch.zeros(68)]), [FULL], "no 68 tokens"),
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
