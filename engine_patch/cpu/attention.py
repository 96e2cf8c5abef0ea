"""Attention on a CPU whose cost follows the new tokens.

SGLang's `torch_native` backend attends again for every cached token of a request that is extended, and copies the whole
cache of every layer for every decoded token. Here only new queries are computed, and where a request's slots are
consecutive, which paged allocation and restores mostly make them, K and V are read where they lie.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

_QUERY_BLOCK = 2048  # bounds the mask of a long extend: block × context


class CpuAttention(TorchNativeAttnBackend):
    """Causal self-attention over the paged KV pool; everything else (cross-attention, encoders, sliding windows) is
    left to the stock backend, which is slower and right.

    The result depends on a request's tokens and lengths alone, not on which slots they lie in, so that a restored
    context gives bit for bit what the context that was never evicted gives.
    """

    def __init__(self, model_runner: Any):
        super().__init__(model_runner)
        self._slots: list[slice | torch.Tensor] = []
        self._lengths: list[tuple[int, int]] = []

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        totals = forward_batch.seq_lens.tolist()
        if forward_batch.forward_mode.is_decode():
            prefixes = [total - 1 for total in totals]
        else:
            prefixes = forward_batch.extend_prefix_lens.tolist()
        self._lengths = list(zip(prefixes, totals, strict=True))
        table = self.req_to_token_pool.req_to_token
        rows = forward_batch.req_pool_indices.tolist()
        self._slots = [_slots(table[row, :total]) for row, total in zip(rows, totals, strict=True)]

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        if not self._is_plain(layer):
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        if not self._is_plain(layer):
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache)

    def _is_plain(self, layer: RadixAttention) -> bool:
        window = layer.sliding_window_size
        return (
            not layer.is_cross_attention
            and layer.attn_type != AttentionType.ENCODER_ONLY
            and not self.use_sliding_window_kv_pool
            and (window is None or window < 0)
        )

    def _forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
    ) -> torch.Tensor:
        pool = self.token_to_kv_pool
        if save_kv_cache and k is not None and v is not None:
            pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = queries.new_empty(queries.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        start = 0
        for slots, (prefix, total) in zip(self._slots, self._lengths, strict=True):
            end = start + total - prefix
            out[start:end] = attend(
                queries[start:end], keys[slots].to(q.dtype), values[slots].to(q.dtype), layer.scaling
            )
            start = end
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)


def _slots(indices: torch.Tensor) -> slice | torch.Tensor:
    first, count = int(indices[0]), len(indices)
    if torch.equal(indices, torch.arange(first, first + count, dtype=indices.dtype)):
        return slice(first, first + count)
    return indices.to(torch.int64)


def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of a sequence's last queries over all of it.

    ``queries`` (new tokens, heads, size), ``keys`` and ``values`` (all tokens, KV heads, size), the new tokens last:
    (new tokens, heads, value size). Heads share KV heads in groups, as in GQA.
    """
    new, total = len(queries), len(keys)
    keys, values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
    if new == 1:
        # One query sees everything, so the heads of a group can be rows of one query matrix, and K and V need not be
        # repeated for each of them.
        grouped = queries.view(1, keys.shape[1], -1, queries.shape[-1])
        return scaled_dot_product_attention(grouped, keys, values, scale=scale).reshape(1, queries.shape[1], -1)
    blocks = []
    for start in range(0, new, _QUERY_BLOCK):
        block = queries[start : start + _QUERY_BLOCK].transpose(0, 1)[None]
        seen = total - new + start + block.shape[2]
        mask = None
        if seen != block.shape[2]:
            mask = torch.ones(block.shape[2], seen, dtype=torch.bool).tril(seen - block.shape[2])
        attended = scaled_dot_product_attention(
            block,
            keys[:, :, :seen],
            values[:, :, :seen],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=block.shape[1] != keys.shape[1],
        )
        blocks.append(attended[0].transpose(0, 1))
    return torch.cat(blocks)
