"""Attention on a CPU whose cost follows the new tokens.

SGLang's `torch_native` backend attends again for every cached token of a request that is extended, and copies the whole
cache of every layer for every decoded token. Here only new queries are computed. If a request's slots are
consecutive, as paged allocation and restores mostly make them, K and V are read where they lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from engine_patch.cpu import sparse

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class CpuAttention(TorchNativeAttnBackend):
    """Causal self-attention over the paged KV pool, also in a sliding window, and MLA to tokens that an index chose;
    everything else (cross-attention, encoders, other MLA) is left to the stock backend, which is slower but correct.

    The result depends on a request's tokens and lengths alone, not on which slots they lie in, so that a restored
    context gives bit for bit what the context that was never evicted gives.

    Drafts that are verified are like tokens that extend a request, but that each sees its own ancestors only.
    """

    def __init__(self, model_runner: Any):
        super().__init__(model_runner)
        # How many tokens of each request SGLang does not count.
        self._ahead = 0
        # Which of its request's drafts each one sees, a request each; None where they are a chain.
        self._seen: torch.Tensor | None = None
        self._contexts: list[_Context] = []
        self._windowed: dict[tuple[int | None, bool], list[_Context]] = {}
        self._spans: list[tuple[int, int, int]] = []

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        self._seen = None
        mode = forward_batch.forward_mode
        totals = (forward_batch.seq_lens + self._ahead).tolist()
        if mode.is_decode() or mode.is_idle():
            prefixes = [total - 1 for total in totals]
        elif mode.is_target_verify():
            drafts = forward_batch.spec_info
            prefixes, totals = totals, [total + drafts.draft_token_num for total in totals]
            if drafts.tree_topk != 1:
                self._seen = drafts.custom_mask.view(len(totals), drafts.draft_token_num, -1).bool()
        else:
            prefixes = forward_batch.extend_prefix_lens.tolist()
        rows = forward_batch.req_pool_indices.tolist()
        self._spans = list(zip(rows, prefixes, totals, strict=True))
        self._contexts = self._located(None, False)
        self._windowed = {}

    def get_cpu_graph_seq_len_fill_value(self) -> int:
        """The length of what fills up a batch."""
        return 1

    def _located(self, window: int | None, in_window_pool: bool) -> list[_Context]:
        """Where each request's tokens lie, the last ``window`` ones of its prefix, in the pool of full attention or
        in the pool of windows, which has slots of its own."""
        table = self.req_to_token_pool.req_to_token
        contexts = []
        for row, prefix, total in self._spans:
            first = 0 if window is None else max(0, prefix - window)
            slots = table[row, first:total]
            if in_window_pool:
                slots = self.token_to_kv_pool.translate_loc_from_full_to_swa(slots)
            contexts.append(_Context(_slots(slots[: prefix - first]), _slots(slots[prefix - first :]), total - prefix))
        return contexts

    def _contexts_for(self, layer: RadixAttention, window: int | None) -> list[_Context]:
        in_window_pool = self.use_sliding_window_kv_pool and self.token_to_kv_pool.layers_mapping[layer.layer_id][1]
        if window is None and not in_window_pool:
            return self._contexts
        key = (window, in_window_pool)
        if key not in self._windowed:
            self._windowed[key] = self._located(window, in_window_pool)
        return self._windowed[key]

    def sequences(self) -> Iterator[tuple[torch.Tensor, int]]:
        """The slots of each request's tokens, and how many of these came before the batch."""
        table = self.req_to_token_pool.req_to_token
        return ((table[row, :total], prefix) for row, prefix, total in self._spans)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        topk_indices: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if topk_indices is not None:
            return self._attend_chosen(q, k, v, layer, forward_batch, topk_indices)
        if not self._is_plain(layer, kwargs):
            if forward_batch.forward_mode.is_target_verify():
                forward_batch = self._extending(forward_batch)
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
        topk_indices: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if topk_indices is not None:
            return self._attend_chosen(q, k, v, layer, forward_batch, topk_indices)
        if not self._is_plain(layer, kwargs):
            if self._ahead:
                forward_batch = copy(forward_batch)
                forward_batch.seq_lens = forward_batch.seq_lens + self._ahead
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache)

    def _extending(self, forward_batch: ForwardBatch) -> ForwardBatch:
        """A batch of chains of drafts to verify as the stock backend knows one: as tokens that extend requests."""
        if self._seen is not None:
            raise NotImplementedError("this attention verifies no trees of drafts on a CPU")
        width = forward_batch.spec_info.draft_token_num
        batch = copy(forward_batch)
        batch.extend_prefix_lens = forward_batch.seq_lens
        batch.extend_seq_lens = torch.full_like(forward_batch.seq_lens, width)
        batch.seq_lens = forward_batch.seq_lens + width
        return batch

    def _is_plain(self, layer: RadixAttention, arguments: dict[str, Any]) -> bool:
        return (
            # Attention sinks: the stock backend knows none either, and says so.
            arguments.get("sinks") is None
            and not layer.is_cross_attention
            and layer.attn_type != AttentionType.ENCODER_ONLY
            and layer.qk_head_dim == layer.v_head_dim
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
            pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc), k, v)
        queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = queries.new_empty(queries.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        window = layer.sliding_window_size
        window = window if window is not None and window >= 0 else None
        start = 0
        for number, context in enumerate(self._contexts_for(layer, window)):
            end = start + context.new_tokens
            prefix, own = (
                (keys[slots].to(q.dtype), values[slots].to(q.dtype)) for slots in (context.prefix, context.own)
            )
            if self._seen is not None:
                out[start:end] = attend_tree(queries[start:end], prefix, own, layer.scaling, self._seen[number], window)
            elif window is None:
                out[start:end] = attend(queries[start:end], prefix, own, layer.scaling)
            else:
                out[start:end] = attend_window(queries[start:end], prefix, own, layer.scaling, window)
            start = end
        # DP ranks that compute together have batches of one length: what fills this one up is of no request.
        out[start:] = 0
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    def _attend_chosen(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        chosen: torch.Tensor,
    ) -> torch.Tensor:
        if self._seen is not None:
            raise NotImplementedError("this attention verifies no trees of drafts on a CPU")
        pool = self.token_to_kv_pool
        pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc), k, v)
        queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = queries.new_empty(queries.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        first = 0
        for slots, prefix in self.sequences():
            of_new = slice(first, first + len(slots) - prefix)
            union = sparse.union_of(chosen[of_new])
            keys = sparse.latents(pool, layer.layer_id, slots[union].long()).to(q.dtype)
            out[of_new] = sparse.attend(queries[of_new], keys, layer.v_head_dim, chosen[of_new], union, layer.scaling)
            first = of_new.stop
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)


class _DraftStep(CpuAttention):
    """A step of a draft: so many tokens have been drafted before it that SGLang does not count."""

    def __init__(self, model_runner: Any, step: int):
        super().__init__(model_runner)
        self._ahead = step + 1


class DraftSteps:
    """What SGLang drafts several tokens with: a backend a step."""

    def __init__(self, model_runner: Any, steps: int):
        self.attn_backends = [_DraftStep(model_runner, step) for step in range(steps - 1)]

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata(forward_batch)


class _Context(NamedTuple):
    """Where a request's tokens lie in the pool. The prefix is listed apart: it was allocated apart from the new tokens,
    and is mostly in one piece when the two together are not."""

    prefix: slice | torch.Tensor
    own: slice | torch.Tensor
    new_tokens: int


def _slots(indices: torch.Tensor) -> slice | torch.Tensor:
    """Consecutive slots as a slice, which copies nothing."""
    if not len(indices):
        return slice(0, 0)
    first, count = int(indices[0]), len(indices)
    if torch.equal(indices, torch.arange(first, first + count, dtype=indices.dtype)):
        return slice(first, first + count)
    return indices.to(torch.int64)


Tensors = tuple[torch.Tensor, torch.Tensor]


def attend(queries: torch.Tensor, prefix: Tensors, own: Tensors, scale: float) -> torch.Tensor:
    """Causal attention of a sequence's last queries over all of it.

    ``queries`` (new tokens, heads, size), and keys and values of the ``prefix`` (tokens before, KV heads, size) and of
    the new tokens' ``own``: (new tokens, heads, size). Heads share KV heads in groups, as in GQA.

    Every query sees the whole prefix, so that part needs no mask; the new tokens see each other causally. Both parts
    come with the logarithm of their softmax's denominator, by which they are weighted into one.
    """
    new, heads, size = queries.shape
    kv_heads = own[0].shape[1]
    parts = []
    if len(prefix[0]):
        # Without a mask the heads of a group are just more queries: K and V need not be repeated for each of them.
        grouped = queries.view(new, kv_heads, -1, size).permute(1, 2, 0, 3).reshape(1, kv_heads, -1, size)
        out, weight = _flash(grouped, *map(_heads_first, prefix), False, scale)
        parts.append((out.reshape(heads, new, size), weight.reshape(heads, new, 1)))
    group = heads // kv_heads
    repeated = (_heads_first(tensor).repeat_interleave(group, 1) for tensor in own)
    out, weight = _flash(_heads_first(queries), *repeated, True, scale)
    parts.append((out[0], weight[0, :, :, None]))
    if len(parts) == 1:
        return parts[0][0].transpose(0, 1)
    (left, left_weight), (right, right_weight) = parts
    total = torch.logaddexp(left_weight, right_weight)
    merged = left.float() * (left_weight - total).exp() + right.float() * (right_weight - total).exp()
    return merged.to(queries.dtype).transpose(0, 1)


def attend_window(queries: torch.Tensor, prefix: Tensors, own: Tensors, scale: float, window: int) -> torch.Tensor:
    """Like `attend`, but a query sees only itself and the ``window`` tokens before it. ``prefix`` may begin where the
    first query's window does."""
    new, before = queries.shape[0], len(prefix[0])
    keys, values = (_heads_first(torch.cat(parts)) for parts in zip(prefix, own, strict=True))
    distance = torch.arange(before, before + new)[:, None] - torch.arange(before + new)
    seen = (distance >= 0) & (distance <= window)
    out = torch.nn.functional.scaled_dot_product_attention(
        _heads_first(queries), keys, values, attn_mask=seen, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def attend_tree(
    queries: torch.Tensor, prefix: Tensors, own: Tensors, scale: float, seen: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """Like `attend`, or `attend_window` with a ``window``, but the new tokens are the nodes of a tree: each sees itself
    and its ancestors, as ``seen``, (new tokens, new tokens), says."""
    before = len(prefix[0])
    keys, values = (_heads_first(torch.cat(parts)) for parts in zip(prefix, own, strict=True))
    mask = torch.cat([seen.new_ones(len(seen), before), seen], dim=1)
    if window is not None:
        places = torch.cat([torch.arange(before), before + seen.sum(1) - 1])
        mask &= places[before:, None] - places <= window
    out = torch.nn.functional.scaled_dot_product_attention(
        _heads_first(queries), keys, values, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def _heads_first(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(0, 1)[None]


def _flash(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`scaled_dot_product_attention`'s CPU kernel, called by name because it also returns the weight of its result:
    the output, and the log of its softmax's denominator, float32 of shape (1, heads, queries)."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, keys, values, is_causal=causal, scale=scale
    )
