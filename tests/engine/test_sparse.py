"""Sparse attention on a CPU, by its definition, and its index as SGLang's kernels lay it out."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine_patch.cpu import sparse

PAGE, SIZE, HEADS, TOKENS = 64, 128, 4, 150


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def buffer(pages: int = 5) -> torch.Tensor:
    return torch.zeros(pages, PAGE * (SIZE + 4), dtype=torch.uint8)


def test_a_rotation_keeps_lengths_and_angles() -> None:
    x, y = random(7, SIZE), random(7, SIZE, seed=1)
    torch.testing.assert_close((sparse.rotate(x) * sparse.rotate(y)).sum(-1), (x * y).sum(-1), rtol=1e-4, atol=1e-4)
    # Its definition: by how many ones two numbers have in common in binary.
    matrix = sparse.rotate(torch.eye(SIZE))
    signs = [[(-1) ** (row & column).bit_count() for column in range(SIZE)] for row in range(SIZE)]
    torch.testing.assert_close(matrix, torch.tensor(signs) * SIZE**-0.5)


@pytest.mark.parametrize("powers_of_two", [False, True])
def test_quantized_keys_are_close_to_the_keys(powers_of_two: bool) -> None:
    keys = random(9, SIZE) * 30
    values, scales = sparse.quantize(keys, powers_of_two)
    assert values.dtype == torch.float8_e4m3fn and scales.shape == (9, 1)
    assert (values.float().abs().amax(-1) > 448 / 2 - 1).all()
    if powers_of_two:
        assert all(math.frexp(scale)[0] == 0.5 for scale in scales.flatten().tolist())
    torch.testing.assert_close(values.float() * scales, keys, rtol=2**-4, atol=float(scales.max()) * 2**-9)


def test_a_page_has_its_keys_and_behind_them_their_scales() -> None:
    slots = torch.tensor([2 * PAGE + 3, 2 * PAGE + 4, 4 * PAGE])
    values, scales = sparse.quantize(random(3, SIZE), True)
    of_all = buffer()
    sparse.store(of_all, PAGE, slots, values, scales)
    page = of_all[2]
    assert page[3 * SIZE : 5 * SIZE].tolist() == values[:2].view(torch.uint8).flatten().tolist()
    behind = page[PAGE * SIZE :].view(torch.float32)
    assert behind[3:5].tolist() == scales[:2].flatten().tolist()
    assert not behind[:3].any() and not of_all[[0, 1, 3]].any()
    torch.testing.assert_close(sparse.load(of_all, PAGE, slots), values.float() * scales, rtol=0, atol=0)


@pytest.mark.parametrize("prefix", [0, 100, TOKENS - 1])
@pytest.mark.parametrize("most", [16, 200])
def test_a_query_chooses_those_tokens_up_to_its_own_that_its_heads_agree_on_most(prefix: int, most: int) -> None:
    new = TOKENS - prefix
    queries, keys, weights = random(new, HEADS, SIZE), random(TOKENS, SIZE), random(new, HEADS, seed=2)
    chosen = sparse.best(queries, keys, weights, prefix, most)
    assert chosen.shape == (new, most) and chosen.dtype == torch.int32
    for i in range(new):
        seen = prefix + i + 1
        scores = ((queries[i] @ keys[:seen].T).relu() * weights[i][:, None]).sum(0)
        of_query = chosen[i][chosen[i] >= 0].tolist()
        assert len(of_query) == len(set(of_query)) == min(most, seen)
        others = sorted(set(range(seen)) - set(of_query))
        assert not others or scores[of_query].min() >= scores[others].max() - 1e-4


def test_attention_to_all_tokens_is_attention() -> None:
    queries, keys = random(5, HEADS, 48), random(20, 48)
    chosen = torch.full((5, 32), -1, dtype=torch.int32)
    for i in range(5):
        chosen[i, : 16 + i] = torch.arange(16 + i)
    union = sparse.union_of(chosen)
    assert union.tolist() == list(range(20))
    out = sparse.attend(queries, keys, 32, chosen, union, 0.2)
    mask = torch.arange(20) <= torch.arange(15, 20)[:, None]
    right = torch.nn.functional.scaled_dot_product_attention(
        queries.transpose(0, 1), keys.expand(HEADS, -1, -1), keys[:, :32].expand(HEADS, -1, -1), mask, scale=0.2
    )
    torch.testing.assert_close(out, right.transpose(0, 1), rtol=1e-4, atol=1e-5)


def test_attention_is_to_what_was_chosen_alone() -> None:
    queries, keys = random(3, HEADS, 48), random(20, 48)
    chosen = torch.tensor([[4, 9, -1], [0, 2, 19], [7, -1, -1]], dtype=torch.int32)
    union = sparse.union_of(chosen)
    assert union.tolist() == [0, 2, 4, 7, 9, 19] and union.dtype == torch.int64
    out = sparse.attend(queries, keys[union], 32, chosen, union, 0.2)
    # Of those that are read, what another query chose changes nothing.
    others = keys.clone()
    others[[0, 2, 19]] = 1e3
    again = sparse.attend(queries, others[union], 32, chosen, union, 0.2)
    torch.testing.assert_close(again[[0, 2]], out[[0, 2]], rtol=0, atol=0)
    torch.testing.assert_close(out[2], keys[7, :32].expand(HEADS, -1))


def test_an_indexer_stores_the_new_keys_and_chooses_among_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two requests, one with a prefix, whose slots are not in order."""
    from sglang.srt.layers.attention.dsa import dsa_indexer

    index = buffer()
    pool = SimpleNamespace(page_size=PAGE, get_index_k_with_scale_buffer=lambda layer_id: {1: index}[layer_id])
    slots = [torch.cat([torch.arange(PAGE) + 3 * PAGE, torch.arange(10) + PAGE]), torch.arange(5) + 2 * PAGE]
    sequences = [(slots[0], PAGE + 4), (slots[1], 0)]
    monkeypatch.setattr(dsa_indexer, "get_token_to_kv_pool", lambda: pool)
    monkeypatch.setattr(dsa_indexer, "get_attn_backend", lambda: SimpleNamespace(sequences=lambda: iter(sequences)))
    new = torch.cat([slots[0][PAGE + 4 :], slots[1]])

    def linear(size: int, seed: int) -> Any:
        weight = random(size, 32, seed=seed)
        return SimpleNamespace(weight=weight, apply=lambda x: (x @ weight.T, None))

    wq, wk, gate = linear(HEADS * SIZE, 1), linear(SIZE, 2), linear(HEADS, 3)
    indexer: Any = SimpleNamespace(
        wq_b=wq.apply,
        wk=wk.apply,
        k_norm=lambda x: x,
        weights_proj=gate,
        rotary_emb=lambda positions, q, k: (q + positions[:, None, None], k + positions[:, None, None]),
        n_heads=HEADS,
        head_dim=SIZE,
        rope_head_dim=8,
        index_topk=16,
        softmax_scale=SIZE**-0.5,
        scale_fmt="ue8m0",
    )
    x, positions = random(len(new), 32), torch.cat([torch.arange(PAGE + 4, PAGE + 10), torch.arange(5)]).float()
    before = random(PAGE + 4, SIZE, seed=4)
    sparse.store(index, PAGE, slots[0][: PAGE + 4], *sparse.quantize(before, True))
    batch = SimpleNamespace(out_cache_loc=new)
    chosen = sparse.choose(indexer, x, x, positions, batch, 1)
    assert chosen is not None and chosen.shape == (11, 16)
    keys = x @ wk.weight.T
    keys[:, :8] += positions[:, None]
    values, scales = sparse.quantize(sparse.rotate(keys), True)
    torch.testing.assert_close(sparse.load(index, PAGE, new), values.float() * scales, rtol=0, atol=0)
    queries = (x @ wq.weight.T).view(-1, HEADS, SIZE)
    queries[..., :8] += positions[:, None, None]
    values, scales = sparse.quantize(sparse.rotate(queries), True)
    weights = (x @ gate.weight.T) * scales[..., 0]
    for of_request, (places, prefix) in zip([slice(0, 6), slice(6, 11)], sequences, strict=True):
        found = sparse.load(index, PAGE, places)
        right = sparse.best(values[of_request].float(), found, weights[of_request], prefix, 16)
        assert [set(row) for row in chosen[of_request].tolist()] == [set(row) for row in right.tolist()]
    assert sparse.choose(indexer, x, x, positions, batch, 1, return_indices=False) is None
