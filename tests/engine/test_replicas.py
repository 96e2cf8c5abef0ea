"""Which ranks hold the same pages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from test_pools import FULL, allocator_of, mha, mla

from engine_patch import identity, plugin, replicas, sglang_api
from engine_patch.pools import device_pools


class Projection(SimpleNamespace):
    pass


class Other(Projection):
    pass


class Attention(SimpleNamespace):
    pass


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "attention_modules", lambda: (Projection, Attention))
    monkeypatch.setattr(replicas, "_of_heads", 1)


def model(heads: int, tp_size: int, layers: int = 2, of: type = Projection, **fields: Any) -> Any:
    """As SGLang shares out the heads of each layer."""
    replicated = max(1, tp_size // heads)
    found: list[Any] = [SimpleNamespace()]
    for _ in range(layers):
        found.append(of(num_kv_head_replicas=replicated, total_num_kv_heads=heads))
        on_rank = max(1, heads // tp_size)
        found.append(Attention(**{"tp_k_head_num": on_rank, "tp_v_head_num": on_rank, **fields}))
    return SimpleNamespace(modules=lambda: iter(found))


@pytest.mark.parametrize(("heads", "tp_size", "right"), [(8, 8, 1), (8, 4, 1), (4, 8, 2), (1, 8, 8), (2, 16, 8)])
def test_ranks_have_the_same_heads_where_there_are_fewer_heads_than_ranks(heads: int, tp_size: int, right: int) -> None:
    assert replicas.head_replicas(model(heads, tp_size), tp_size) == right


@pytest.mark.parametrize(
    "unknown",
    [
        model(2, 8, of=Other),
        model(2, 8, layers=0),
        model(2, 8, tp_k_head_num=2),
        model(2, 8, tp_v_head_num=2),
        # Shared out among fewer ranks than there are.
        model(2, 4),
    ],
)
def test_a_model_that_computes_its_keys_in_another_way_has_no_ranks_that_are_alike(unknown: Any) -> None:
    assert replicas.head_replicas(unknown, 8) == 1


def test_a_model_whose_layers_differ_has_no_ranks_that_are_alike() -> None:
    some = [*model(2, 8).modules(), *model(4, 8).modules()]
    assert replicas.head_replicas(SimpleNamespace(modules=lambda: iter(some)), 8) == 1
    more = [*model(2, 8).modules(), Attention(tp_k_head_num=1, tp_v_head_num=1)]
    assert replicas.head_replicas(SimpleNamespace(modules=lambda: iter(more)), 8) == 1


def pools(*of: int) -> list[Any]:
    return [SimpleNamespace(replicas=one) for one in of]


@pytest.mark.parametrize(
    ("of", "ranks", "right"),
    [
        ((0,), 8, 8),
        ((0,), 1, 1),
        ((2,), 8, 2),
        ((4, 2), 8, 2),
        ((0, 4), 8, 4),
        ((8,), 2, 2),
        # A recurrent state is another one on every rank.
        ((0, 1), 8, 1),
        ((), 8, 1),
    ],
)
def test_a_group_holds_the_same_in_all_pools(of: tuple[int, ...], ranks: int, right: int) -> None:
    assert replicas.group(pools(*of), ranks) == right


@pytest.mark.parametrize(
    ("tp_size", "attention", "nodes", "right"), [(16, 16, 2, 8), (8, 8, 1, 8), (8, 4, 1, 4), (8, 4, 4, 2), (8, 1, 1, 1)]
)
def test_a_group_is_of_one_dp_rank_and_on_one_machine(
    monkeypatch: pytest.MonkeyPatch, tp_size: int, attention: int, nodes: int, right: int
) -> None:
    parallel = SimpleNamespace(tp_size=tp_size, attn_tp_size=attention, attn_tp_rank=attention - 1)
    monkeypatch.setattr(identity, "get_parallel", lambda: parallel)
    group = identity.group(SimpleNamespace(nnodes=nodes), pools(0))
    assert (group.size, group.rank, group.ranks) == (right, attention - 1, attention)


def test_a_pool_says_which_ranks_hold_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(kvcache: Any) -> int:
        params = SimpleNamespace(
            page_size=4,
            token_to_kv_pool_allocator=allocator_of(kvcache),
            req_to_token_pool=None,
            mtp_draft_device_pools=(),
            mtp_draft_mamba_pools=(),
        )
        (pool,) = device_pools(params, {FULL})
        return pool.replicas

    assert (of(mla()), of(mha())) == (0, 1)
    runner = SimpleNamespace(
        model=model(2, 8),
        server_args=SimpleNamespace(radix_cache_backend="agentstate"),
        is_draft_worker=False,
    )
    loaded: list[Any] = []
    monkeypatch.setattr(sglang_api, "get_parallel", lambda: SimpleNamespace(attn_tp_size=8))
    plugin._around_model_load(loaded.append, runner)
    assert loaded == [runner]
    assert (of(mla()), of(mha())) == (0, 4)
