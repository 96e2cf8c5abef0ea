"""What the bytes of a page mean, proven for the installed SGLang: what engines of this layout have stored, it may read.

If one of these fails after an upgrade, its version needs a layout of its own in `engine_patch.versions`. If all of them
pass, and `python .ci/canary.py --restore` does, it may be listed there with the layout that they prove.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateShape

from engine_patch import versions
from engine_patch.pools import DevicePool, device_pools
from engine_patch.sglang_api import (
    ComponentType,
    HybridLinearKVPool,
    HybridReqToTokenPool,
    MHATokenToKVPool,
    MLATokenToKVPool,
    PoolName,
    RadixKey,
    SWAKVPool,
    get_parallel,
    get_storage_hash_str,
)

PAGE, HEADS, SIZE, ROPE = 4, 2, 8, 4
POOL: dict[str, Any] = {"size": 32, "page_size": PAGE, "device": "cpu", "enable_memory_saver": False}
MHA = POOL | {"head_num": HEADS, "head_dim": SIZE}
DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)
# The page of tokens that is written and read.
TOKENS = torch.arange(2 * PAGE, 3 * PAGE)

LAYOUTS: dict[str, dict[str, str]] = {
    "0.5.23": {
        "full_attention torch.float32 kv": "bcdfee19fae9c9b3",
        "full_attention torch.bfloat16 kv": "f7cd3f1517fd6535",
        "full_attention torch.float8_e4m3fn kv": "a7bce649e2aceb7c",
        "latent_attention torch.float32 kv": "1b56e4943bcb7ce7",
        "latent_attention torch.bfloat16 kv": "19fd293e1b4acc88",
        "latent_attention torch.float8_e4m3fn kv": "0a12fa6ac0f3d52a",
        "sliding_window torch.float32 kv": "170d45e483782f4b",
        "sliding_window torch.float32 swa": "db91729033832a9d",
        "sliding_window torch.bfloat16 kv": "e3d4ff9433729c0a",
        "sliding_window torch.bfloat16 swa": "4ab0272f3afc3374",
        "sliding_window torch.float8_e4m3fn kv": "f63c8f0cee045a2a",
        "sliding_window torch.float8_e4m3fn swa": "5b56eaee0246e66a",
        "recurrent_state torch.float32 kv": "ce4d886fc55d8302",
        "recurrent_state torch.float32 mamba": "65428a82cf8cb4c6",
        "recurrent_state torch.bfloat16 kv": "8b11ab8bc7f6385d",
        "recurrent_state torch.bfloat16 mamba": "65428a82cf8cb4c6",
        "recurrent_state torch.float8_e4m3fn kv": "04d64c9552cdb444",
        "recurrent_state torch.float8_e4m3fn mamba": "65428a82cf8cb4c6",
    },
}
"""Of each layout: a digest of the bytes of a page, by model, KV dtype and pool."""

KEYS = [
    "3463a607af629d149bf150de54d8178f5042b7ffd150bf6b8bf776b0fb46c300",
    "9153fd8c029cbf4050ba988c0715bfee9e29febe4477853f6f96aad1a53e832c",
]
"""Of the tokens 1 to 8 in a namespace, two pages: a store's names for them."""


def values(*shape: int, start: int = 0) -> torch.Tensor:
    """Numbers of which neighbours differ along every axis: where one of them lies, no other one does."""
    return torch.arange(start, start + torch.Size(shape).numel()).remainder(240).reshape(shape).float() - 120


def full_attention(dtype: torch.dtype) -> tuple[Any, Any, set[ComponentType]]:
    pool = MHATokenToKVPool(dtype=dtype, layer_num=2, **MHA)
    for layer in range(2):
        keys, entries = values(PAGE, HEADS, SIZE, start=layer), values(PAGE, HEADS, SIZE, start=64 + layer)
        pool.set_kv_buffer(SimpleNamespace(layer_id=layer), TOKENS, keys.to(dtype), entries.to(dtype))
    return pool, None, {ComponentType.FULL}


def latent_attention(dtype: torch.dtype) -> tuple[Any, Any, set[ComponentType]]:
    pool = MLATokenToKVPool(dtype=dtype, layer_num=2, kv_lora_rank=SIZE, qk_rope_head_dim=ROPE, **POOL)
    for layer in range(2):
        # A latent, and after it the part of a key that is rotated.
        latents = values(PAGE, 1, SIZE + ROPE, start=layer)
        with get_parallel().override(dcp_enabled=False):
            pool.set_kv_buffer(
                SimpleNamespace(layer_id=layer), TOKENS, latents.to(dtype), latents[..., :SIZE].to(dtype)
            )
    return pool, None, {ComponentType.FULL}


def sliding_window(dtype: torch.dtype) -> tuple[Any, Any, set[ComponentType]]:
    layers = {"swa_attention_layer_ids": [2, 0], "full_attention_layer_ids": [1]}
    pool = SWAKVPool(size_swa=32, dtype=dtype, **layers, **MHA)
    for layer in range(3):
        keys, entries = values(PAGE, HEADS, SIZE, start=layer), values(PAGE, HEADS, SIZE, start=64 + layer)
        part = pool.swa_kv_pool if layer != 1 else pool.full_kv_pool
        place = {"layer_id_override": pool.layers_mapping[layer][0]}
        part.set_kv_buffer(None, TOKENS, keys.to(dtype), entries.to(dtype), **place)
    return pool, None, {ComponentType.FULL, ComponentType.SWA}


def recurrent_state(dtype: torch.dtype) -> tuple[Any, Any, set[ComponentType]]:
    shape = {"intermediate_size": 24, "n_groups": 1, "num_heads": 2, "head_dim": 12, "state_size": 4, "conv_kernel": 5}
    state = Mamba2CacheParams(shape=Mamba2StateShape.create(tp_world_size=1, **shape), layers=[0, 2])
    requests = HybridReqToTokenPool(
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
    pool = HybridLinearKVPool(dtype=dtype, full_attention_layer_ids=[1, 3], mamba_pool=requests.mamba_pool, **MHA)
    for layer in (1, 3):
        keys, entries = values(PAGE, HEADS, SIZE, start=layer), values(PAGE, HEADS, SIZE, start=64 + layer)
        pool.set_kv_buffer(SimpleNamespace(layer_id=layer), TOKENS, keys.to(dtype), entries.to(dtype))
    for number, tensor in enumerate((requests.mamba_pool.mamba_cache.temporal, *requests.mamba_pool.mamba_cache.conv)):
        tensor.copy_(values(*tensor.shape, start=number))
    return pool, requests, {ComponentType.FULL, ComponentType.MAMBA}


def digests(make: Callable[[torch.dtype], tuple[Any, Any, set[ComponentType]]], dtype: torch.dtype) -> dict[str, str]:
    """Of each pool that is stored: a digest of how it is laid out, and of the bytes of `TOKENS`."""
    return {pool.name.value: digest(pool) for pool in pools(*make(dtype))}


def pools(kvcache: Any, requests: Any, components: Iterable[ComponentType]) -> list[DevicePool]:
    parts = {name: SimpleNamespace(page_size=PAGE) for name in ("full_attn_allocator", "swa_attn_allocator")}
    params = SimpleNamespace(
        page_size=PAGE,
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: kvcache, page_size=PAGE, **parts),
        req_to_token_pool=requests,
        swa_gates_prefix_match=True,
        swa_retain_window=PAGE,
        mtp_draft_device_pools=(),
        mtp_draft_mamba_pools=(),
    )
    return device_pools(params, components)


def digest(pool: DevicePool) -> str:
    found = hashlib.sha256(repr(pool.layout()).encode())
    rows = TOKENS if pool.name is not PoolName.MAMBA else torch.tensor([3])
    for layer in pool.tensors:
        for tensor in layer:
            found.update(tensor[rows].contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


MAKERS = [full_attention, latent_attention, sliding_window, recurrent_state]


def proven() -> str:
    """The layout that the installed version is to have: of one that is not listed, the newest."""
    (name,) = versions.LAYOUTS.get(versions.installed(), [next(reversed(LAYOUTS))])
    return name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_a_page_has_the_bytes_that_its_layout_says(make: Any, dtype: torch.dtype) -> None:
    expected = LAYOUTS[proven()]
    found = {f"{make.__name__} {dtype} {name}": value for name, value in digests(make, dtype).items()}
    assert found == {name: expected[name] for name in found}


def test_a_page_has_the_key_that_it_had() -> None:
    key = RadixKey(array("q", range(1, 2 * PAGE + 1)), "e", cache_salt="s")
    assert get_storage_hash_str(key, page_size=PAGE) == KEYS


def test_heads_in_another_order_are_another_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would share its pages with engines that read them in another way fails the tests above."""
    before = digests(full_attention, torch.bfloat16)
    write = MHATokenToKVPool.set_kv_buffer
    monkeypatch.setattr(
        MHATokenToKVPool,
        "set_kv_buffer",
        lambda self, layer, loc, keys, entries: write(self, layer, loc, keys.flip(1), entries.flip(1)),
    )
    assert digests(full_attention, torch.bfloat16) != before


def test_no_two_layouts_are_the_same() -> None:
    assert {name for of in versions.LAYOUTS.values() for name in of} == set(LAYOUTS)
    assert len({str(layout) for layout in LAYOUTS.values()}) == len(LAYOUTS)
