"""Which ranks hold the same KV: one of a group of them writes it, and the others read what it has written.

With tensor parallelism every rank has the whole latent of MLA. Of grouped-query attention with fewer KV heads than
ranks, neighbouring ranks have the same head. SGLang's own projection of queries, keys and values says which; a model
that computes keys and values in another way has no ranks that are known to be alike, and each of them writes its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from engine_patch.sglang_api import attention_modules


class HasReplicas(Protocol):
    """A device pool, of which so many neighbouring ranks hold the same; 0 where all do."""

    @property
    def replicas(self) -> int: ...


def group(pools: Sequence[HasReplicas], ranks: int) -> int:
    """How many neighbouring ranks hold the same pages in all ``pools``, of ``ranks`` that share out the heads and are
    on one machine: 1 where none do. They are groups of that size, from the first one on."""
    return math.gcd(ranks, *(pool.replicas for pool in pools)) if pools else 1


def head_replicas(model: Any, tp_size: int) -> int:
    """How many neighbouring ranks hold each KV head of a model that was loaded; 1 where that is not known."""
    of_projection, of_attention = attention_modules()
    modules = list(model.modules())
    projections = [module for module in modules if type(module) is of_projection]
    attention = [module for module in modules if type(module) is of_attention]
    replicas = {projection.num_kv_head_replicas for projection in projections}
    # Every layer's keys and values come from such a projection, which shares out the heads among all ranks.
    if (
        len(replicas) != 1
        or len(projections) != len(attention)
        or any(layer.tp_k_head_num != 1 or layer.tp_v_head_num != 1 for layer in attention)
        or any(one.num_kv_head_replicas * one.total_num_kv_heads != tp_size for one in projections)
    ):
        return 1
    return int(replicas.pop())


_of_heads = 1


def look_at(model: Any, tp_size: int) -> None:
    """Note `head_replicas` of the model that this process serves."""
    global _of_heads
    _of_heads = head_replicas(model, tp_size)


def of_heads() -> int:
    """`head_replicas` of the model that this process serves."""
    return _of_heads
