"""Sparse attention with an index (DeepSeek-V3.2, GLM-5) on a CPU, which SGLang has for GPUs.

Each token has a small key beside its KV, and each query chooses the tokens that it attends to by these keys alone. Keys
are rotated, quantized and laid out as SGLang's kernels do it, so that an engine on a GPU would find what it expects.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

from engine_patch.arrivals import LayerGate

_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_SCALE_BYTES = 4


def rotate(x: torch.Tensor) -> torch.Tensor:
    """The Walsh–Hadamard transform of the last dimension, a power of two, scaled to keep lengths: it spreads outliers
    before they are quantized."""
    return x @ _hadamard(x.shape[-1])


@cache
def _hadamard(size: int) -> torch.Tensor:
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) * 0.5**0.5
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, pair)
    return matrix


def quantize(x: torch.Tensor, powers_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors of shape (..., size) in FP8, and the float32 scale of each, of shape (..., 1)."""
    scales = x.abs().amax(-1, keepdim=True).clamp(min=1e-4) / _LARGEST
    if powers_of_two:
        scales = scales.log2().ceil().exp2()
    return (x / scales).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn), scales


def store(buffer: torch.Tensor, page_size: int, slots: torch.Tensor, keys: torch.Tensor, scales: torch.Tensor) -> None:
    """Enter the ``keys`` (tokens, size) in FP8 and the ``scales`` (tokens, 1) of the tokens in ``slots`` into
    ``buffer``, of shape (pages, bytes): each page has the keys of its tokens, and behind them their scales."""
    page, place = slots.long() // page_size, slots.long() % page_size
    of_keys, of_scales = _parts(buffer, page_size)
    of_keys[page, place] = keys.view(torch.uint8)
    of_scales[page, place] = scales.contiguous().view(torch.uint8)


def load(buffer: torch.Tensor, page_size: int, slots: torch.Tensor) -> torch.Tensor:
    """The keys of the tokens in ``slots``, as `store` entered them: float32 of shape (tokens, size)."""
    page, place = slots.long() // page_size, slots.long() % page_size
    of_keys, of_scales = _parts(buffer, page_size)
    keys = of_keys[page, place].view(torch.float8_e4m3fn).float()
    return keys * of_scales[page, place].view(torch.float32)


def _parts(buffer: torch.Tensor, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    behind = page_size * _SCALE_BYTES
    return (
        buffer[:, :-behind].view(len(buffer), page_size, -1),
        buffer[:, -behind:].view(len(buffer), page_size, _SCALE_BYTES),
    )


def best(queries: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, prefix: int, most: int) -> torch.Tensor:
    """Which tokens each of a sequence's last queries attends to: int32 of shape (queries, ``most``), padded with -1.

    ``queries`` are (queries, heads, size), ``keys`` (tokens, size) and ``weights`` (queries, heads). The first query is
    that of token ``prefix``; none sees a later token.
    """
    agreement = torch.einsum("qhd,td->qht", queries, keys).relu()
    scores = torch.einsum("qht,qh->qt", agreement, weights)
    tokens = torch.arange(len(keys))
    scores.masked_fill_(tokens > tokens[prefix : prefix + len(queries), None], -torch.inf)
    found = scores.topk(min(most, len(keys)), dim=-1)
    chosen = torch.full((len(queries), most), -1, dtype=torch.int32)
    chosen[:, : found.indices.shape[1]] = found.indices.int().masked_fill(found.values == -torch.inf, -1)
    return chosen


def attend(
    queries: torch.Tensor, keys: torch.Tensor, size: int, chosen: torch.Tensor, union: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of ``queries`` (queries, heads, latent) to those of a sequence's tokens that `best` chose for each.
    ``keys`` (tokens of the ``union``, latent) are those of the tokens in `union_of`, and their first ``size`` numbers
    are the values."""
    tokens = len(union)
    place = torch.searchsorted(union, chosen.long().clamp(min=0))
    seen = torch.zeros(len(queries), tokens + 1, dtype=torch.bool)
    seen.scatter_(1, place.masked_fill(chosen < 0, tokens), True)
    scores = torch.einsum("qhd,td->qht", queries, keys) * scale
    scores.masked_fill_(~seen[:, None, :tokens], -torch.inf)
    return torch.einsum("qht,td->qhd", scores.softmax(-1), keys[:, :size])


def union_of(chosen: torch.Tensor) -> torch.Tensor:
    """The tokens that any query chose, in order, as int64: nothing else of a sequence is read."""
    return torch.unique(chosen[chosen >= 0]).long()


def latents(pool: Any, layer_id: int, slots: torch.Tensor) -> torch.Tensor:
    """The rows ``slots`` of a layer's KV, shape (slots, latent). Others of the layer may not be there yet."""
    if (gate := _gate(pool)) is not None:
        gate.wait_rows(layer_id - pool.start_layer, slots)
    with _naming(pool):
        rows: torch.Tensor = pool.get_key_buffer(layer_id)[slots][:, 0]
    return rows


def _naming(pool: Any) -> AbstractContextManager[None]:
    """Within it, SGLang's ``pool`` does not wait until all KV of a layer is there."""
    gate = _gate(pool)
    return nullcontext() if gate is None else gate.naming()


def _gate(pool: Any) -> LayerGate | None:
    gate = getattr(pool, "layer_transfer_counter", None)
    return gate if isinstance(gate, LayerGate) else None


def choose(
    indexer: Any,
    x: torch.Tensor,
    q_lora: torch.Tensor,
    positions: torch.Tensor,
    forward_batch: Any,
    layer_id: int,
    return_indices: bool = True,
) -> torch.Tensor | None:
    """`Indexer.forward`: store the new tokens' keys, and choose for each what it attends to."""
    from sglang.srt.layers.attention.dsa.dsa_indexer import get_attn_backend, get_token_to_kv_pool

    pool, backend, rope = get_token_to_kv_pool(), get_attn_backend(), indexer.rope_head_dim
    queries = indexer.wq_b(q_lora)[0].view(-1, indexer.n_heads, indexer.head_dim)
    keys = indexer.k_norm(indexer.wk(x)[0])
    turned = indexer.rotary_emb(positions, queries[..., :rope].clone(), keys[:, None, :rope].clone())
    queries = rotate(torch.cat([turned[0].view_as(queries[..., :rope]), queries[..., rope:]], -1).float())
    keys = rotate(torch.cat([turned[1].view_as(keys[..., :rope]), keys[..., rope:]], -1).float())
    # Waits until what is restored of the layer's index is there.
    with _naming(pool):
        buffer = pool.get_index_k_with_scale_buffer(layer_id)
    powers_of_two = indexer.scale_fmt is not None
    store(buffer, pool.page_size, forward_batch.out_cache_loc, *quantize(keys, powers_of_two))
    if not return_indices:
        return None
    values, scales = quantize(queries, powers_of_two)
    gate = torch.nn.functional.linear(x.float(), indexer.weights_proj.weight.float())
    weights = gate * scales[..., 0] * indexer.n_heads**-0.5 * indexer.softmax_scale
    chosen, first = [], 0
    for slots, prefix in backend.sequences():
        new = len(slots) - prefix
        of_new = slice(first, first + new)
        found = load(buffer, pool.page_size, slots)
        chosen.append(best(values[of_new].float(), found, weights[of_new], prefix, indexer.index_topk))
        first += new
    return torch.cat(chosen) if chosen else torch.empty(0, indexer.index_topk, dtype=torch.int32)


def install() -> None:
    from sglang.srt.layers.attention.dsa import dsa_indexer

    dsa_indexer.Indexer.forward_native = choose
    # SGLang asks CUDA which kernels such a model can have, whichever device there is.
    torch.cuda.get_device_capability = lambda device=None: (0, 0)
