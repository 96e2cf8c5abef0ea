"""Data parallel attention on a CPU: what SGLang has for its unpublished CPU build, and batches of no tokens, with which
a DP rank without requests takes part in the forwards of the others."""

from __future__ import annotations

from typing import Any

from sglang.srt.distributed import parallel_state
from sglang.srt.layers import dp_attention
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.model_executor import forward_batch_info


def install() -> None:
    # All were chosen when they were imported, by whether that build is there.
    dp_attention.memcpy_func = dp_attention.memcpy_cpu
    parallel_state._is_cpu = forward_batch_info._is_cpu = True
    rotate = RotaryEmbedding.forward_native

    def rotate_if_any(self: Any, positions: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        return rotate(self, positions, query, key, *args, **kwargs) if positions.numel() else (query, key)

    RotaryEmbedding.forward_native = rotate_if_any
