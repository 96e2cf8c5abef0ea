from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.distributed import parallel_state
from sglang.srt.layers import dp_attention
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.model_executor import forward_batch_info

from engine_patch.cpu import data_parallel
from engine_patch.cpu.attention import CpuAttention, DraftSteps, attend, attend_tree, attend_window

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = list(TOLERANCE)
HEADS, SIZE = 6, 32
SCALE = 0.17


def attended(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """`attend` over a sequence that lies in one piece."""
    prefix = len(keys) - len(queries)
    return attend(queries, (keys[:prefix], values[:prefix]), (keys[prefix:], values[prefix:]), scale)


def reference(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """Causal attention as it is written down, in float64."""
    new, heads, _ = queries.shape
    total, kv_heads, _ = keys.shape
    q = queries.double().transpose(0, 1)
    k = keys.double().repeat_interleave(heads // kv_heads, 1).transpose(0, 1)
    v = values.double().repeat_interleave(heads // kv_heads, 1).transpose(0, 1)
    scores = q @ k.transpose(1, 2) * SCALE
    ahead = torch.arange(total)[None, :] - torch.arange(total - new, total)[:, None]
    unseen = (ahead > 0) | (-ahead > (total if window is None else window))
    return (scores.masked_fill(unseen, -torch.inf).softmax(-1) @ v).transpose(0, 1)


def tensors(prefix: int, new: int, kv_heads: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(new, HEADS, SIZE), (prefix + new, kv_heads, SIZE), (prefix + new, kv_heads, SIZE)]
    queries, keys, values = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return queries * 2, keys * 2, values


def close(found: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert found.shape == right.shape
    torch.testing.assert_close(found.double(), right, atol=TOLERANCE[dtype] * 2, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("kv_heads", [1, 2, HEADS])
@pytest.mark.parametrize(
    ("prefix", "new"), [(0, 1), (0, 5), (1, 1), (1, 7), (64, 1), (63, 5), (200, 70), (0, 130), (700, 3)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_is_what_the_formula_says(dtype: torch.dtype, prefix: int, new: int, kv_heads: int) -> None:
    queries, keys, values = tensors(prefix, new, kv_heads, dtype)
    close(attended(queries, keys, values, SCALE), reference(queries, keys, values), dtype)


def test_what_is_cached_and_what_is_new_makes_no_difference_to_the_last_token() -> None:
    queries, keys, values = tensors(0, 90, 2, torch.float32)
    whole = attended(queries, keys, values, SCALE)
    for new in (1, 2, 45, 89):
        part = attended(queries[-new:], keys, values, SCALE)
        torch.testing.assert_close(part, whole[-new:], atol=4e-6, rtol=4e-6)


def test_a_token_does_not_see_those_after_it() -> None:
    queries, keys, values = tensors(10, 6, 2, torch.float32)
    before = attended(queries, keys, values, SCALE)
    keys[13:], values[13:] = 50, -50
    after = attended(queries, keys, values, SCALE)
    assert torch.equal(before[:3], after[:3])
    assert not torch.isclose(before[3:], after[3:]).all(-1).any()


@pytest.mark.parametrize("window", [0, 1, 7, 63, 500])
@pytest.mark.parametrize(("prefix", "new"), [(0, 1), (0, 90), (1, 7), (64, 1), (200, 70)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_window_hides_what_lies_before_it(dtype: torch.dtype, prefix: int, new: int, window: int) -> None:
    queries, keys, values = tensors(prefix, new, 2, dtype)
    right = reference(queries, keys, values, window)
    kept = prefix - min(prefix, window)
    for start in (0, kept):
        seen = [tensor[start:] for tensor in (keys, values)]
        before, own = (tuple(t[part] for t in seen) for part in (slice(prefix - start), slice(prefix - start, None)))
        close(attend_window(queries, before, own, SCALE, window), right, dtype)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_scores_neither_overflow_nor_lose_a_part(size: float) -> None:
    """One part of the context outweighs the other beyond what float32 can express."""
    queries, keys, values = tensors(5, 3, 2, torch.float32)
    queries[:], keys[:5], keys[5:] = 1, size / SIZE, 0
    found = attended(queries, keys, values, SCALE)
    close(found, reference(queries, keys, values), torch.float32)
    assert found.isfinite().all()


class Pool:
    """A KV pool of one layer."""

    def __init__(self, slots: int, kv_heads: int, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(9)
        self.keys = torch.randn(slots, kv_heads, SIZE, generator=generator).to(dtype)
        self.values = torch.randn(slots, kv_heads, SIZE, generator=generator).to(dtype)

    def set_kv_buffer(self, layer: Any, loc_info: Any, cache_k: torch.Tensor, cache_v: torch.Tensor) -> None:
        self.keys[loc_info.loc] = cache_k.to(self.keys.dtype)
        self.values[loc_info.loc] = cache_v.to(self.values.dtype)

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.keys

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        return self.values


def layer(kv_heads: int) -> Any:
    return SimpleNamespace(
        layer_id=0,
        tp_q_head_num=HEADS,
        tp_k_head_num=kv_heads,
        qk_head_dim=SIZE,
        v_head_dim=SIZE,
        scaling=SCALE,
        sliding_window_size=-1,
        is_cross_attention=False,
        attn_type=AttentionType.DECODER,
    )


def mode(name: str) -> Any:
    return SimpleNamespace(
        is_decode=lambda: name == "decode",
        is_idle=lambda: name == "idle",
        is_target_verify=lambda: name == "verify",
    )


def forward(
    slots: list[torch.Tensor],
    prefixes: list[int],
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    drafts: Any = None,
    step: int | None = None,
    fill: int = 0,
) -> Any:
    """Run a batch whose requests lie in ``slots``: its output, and what the formula says. Its new tokens are ``drafts``
    that are verified, or the one that is drafted in a ``step``. So many tokens ``fill`` it up."""
    kv_heads, decode = 2, all(len(s) - p == 1 for s, p in zip(slots, prefixes, strict=True))
    table = torch.zeros(len(slots) + 2, max(map(len, slots)), dtype=torch.int32)
    pool = Pool(600, kv_heads, kv_dtype)
    batch: list[torch.Tensor] = []
    right = []
    for row, (where, prefix) in enumerate(zip(slots, prefixes, strict=True)):
        queries, keys, values = tensors(prefix, len(where) - prefix, kv_heads, dtype, seed=row)
        keys, values = keys.to(kv_dtype).to(dtype), values.to(kv_dtype).to(dtype)
        table[row + 1, : len(where)] = where
        pool.keys[where[:prefix].long()] = keys[:prefix].to(kv_dtype)
        pool.values[where[:prefix].long()] = values[:prefix].to(kv_dtype)
        batch.append((queries, keys[prefix:], values[prefix:]))
        right.append(reference(queries, keys, values))
    batch.append(tensors(0, fill, kv_heads, dtype))
    q, k, v = (torch.cat(parts) for parts in zip(*batch, strict=True))
    runner = SimpleNamespace(device="cpu", req_to_token_pool=SimpleNamespace(req_to_token=table), token_to_kv_pool=pool)
    backend = CpuAttention(runner) if step is None else DraftSteps(runner, step + 2).attn_backends[step]
    totals = torch.tensor([len(where) for where in slots])
    if drafts is not None:
        totals = torch.tensor(prefixes)
    elif step is not None:
        # SGLang counts what was there before the draft.
        totals -= step + 1
    forward_batch: Any = SimpleNamespace(
        seq_lens=totals,
        forward_mode=mode("verify" if drafts is not None else "decode" if decode else "extend"),
        extend_prefix_lens=None if decode or drafts is not None else torch.tensor(prefixes),
        spec_info=drafts,
        req_pool_indices=torch.arange(1, len(slots) + 1),
        out_cache_loc=torch.cat(
            [*(where[prefix:] for where, prefix in zip(slots, prefixes, strict=True)), torch.zeros(fill)]
        ).long(),
    )
    backend.init_forward_metadata(forward_batch)
    run = backend.forward_decode if decode else backend.forward_extend
    out = run(q.reshape(len(q), -1), k, v, layer(kv_heads), forward_batch)
    return out.view(-1, HEADS, SIZE), torch.cat(right)


def consecutive(start: int, count: int) -> torch.Tensor:
    return torch.arange(start, start + count, dtype=torch.int32)


def scattered(start: int, count: int) -> torch.Tensor:
    """Pages of 4 in another order, below 300."""
    pages = (start + torch.randperm(-(-count // 4), generator=torch.Generator().manual_seed(start))) * 4
    return (pages[:, None] + torch.arange(4)).flatten()[:count].to(torch.int32)


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float8_e5m2),
    ],
    ids=str,
)
@pytest.mark.parametrize("prefixes", [[0, 40, 17], [60, 49, 32]], ids=["extend", "decode"])
def test_a_batch_gives_what_the_formula_says_wherever_it_lies(
    dtype: torch.dtype, kv_dtype: torch.dtype, prefixes: list[int]
) -> None:
    lengths = [61, 50, 33]
    together = [consecutive(7, 61), consecutive(100, 50), consecutive(200, 33)]
    apart = [scattered(1, 61), scattered(30, 50), scattered(60, 33)]
    assert [len(where) for where in apart] == lengths
    outputs = []
    for slots in (together, apart, [together[0], apart[1], together[2]]):
        found, right = forward(slots, prefixes, dtype, kv_dtype)
        close(found, right, dtype)
        outputs.append(found)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("prefixes", [[0, 40], [60, 49]], ids=["extend", "decode"])
def test_what_fills_up_a_batch_changes_nothing_and_is_zero(prefixes: list[int]) -> None:
    """DP ranks that compute together have batches of one length."""
    slots = [consecutive(7, 61), scattered(30, 50)]
    alone, _ = forward(slots, prefixes, torch.float32, torch.float32)
    filled, _ = forward(slots, prefixes, torch.float32, torch.float32, fill=5)
    assert torch.equal(filled[:-5], alone)
    assert not filled[-5:].any()


def test_a_rank_without_requests_takes_part_in_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = SimpleNamespace(device="cpu", req_to_token_pool=SimpleNamespace(req_to_token=None), token_to_kv_pool=None)
    backend = CpuAttention(runner)
    none = torch.zeros(0, dtype=torch.int64)
    backend.init_forward_metadata(
        SimpleNamespace(seq_lens=none, forward_mode=mode("idle"), extend_prefix_lens=None, req_pool_indices=none)
    )
    assert backend._spans == []
    assert backend.get_cpu_graph_seq_len_fill_value() == 1
    modules = (parallel_state, forward_batch_info)
    for of, name in (
        (RotaryEmbedding, "forward_native"),
        (dp_attention, "memcpy_func"),
        *((module, "_is_cpu") for module in modules),
    ):
        monkeypatch.setattr(of, name, getattr(of, name))  # as it was, when the test is over
    data_parallel.install()
    rotary = RotaryEmbedding(SIZE, SIZE, 128, 10000, True, torch.float32)
    some = torch.randn(3, 2 * SIZE)
    for count in (0, 3):
        q, k = rotary.forward_native(torch.arange(count), some[:count], some[:count].clone())
        assert q.shape == k.shape == (count, 2 * SIZE)
    gathered = torch.zeros(4, 2)
    dp_attention.memcpy(gathered, torch.ones(2, 2), 0, 1, 2, False)
    assert gathered.sum(1).tolist() == [0, 2, 2, 0]
    assert all(module._is_cpu for module in modules)


@pytest.mark.parametrize("shift", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_alignment_of_the_slots_in_memory_does_not_matter(dtype: torch.dtype, shift: int) -> None:
    first, _ = forward([consecutive(0, 90)], [64], dtype, dtype)
    other, _ = forward([consecutive(shift, 90)], [64], dtype, dtype)
    assert torch.equal(first, other)


@pytest.mark.parametrize("topk", [1, -1])
def test_a_chain_of_drafts_is_verified_like_tokens_that_extend_a_request(topk: int) -> None:
    slots, prefixes = [consecutive(7, 61), scattered(30, 50)], [57, 46]
    chains = torch.ones(4, 4).tril().bool().repeat(2, 1, 1)
    drafts = SimpleNamespace(draft_token_num=4, tree_topk=topk, custom_mask=chains.flatten())
    found, right = forward(slots, prefixes, torch.float32, torch.float32, drafts)
    close(found, right, torch.float32)
    if topk == 1:
        # Bit for bit: what is verified is what would be decoded.
        assert torch.equal(found, forward(slots, prefixes, torch.float32, torch.float32)[0])


def test_a_draft_sees_its_ancestors_alone() -> None:
    slots, prefix = consecutive(7, 64), 60
    # Node 0 has the children 1 and 2, and 3 follows 1.
    seen = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]).bool()
    drafts = SimpleNamespace(draft_token_num=4, tree_topk=2, custom_mask=seen.flatten())
    found, _ = forward([slots], [prefix], torch.float32, torch.float32, drafts)
    queries, keys, values = tensors(prefix, 4, 2, torch.float32)
    for node, path in enumerate(([0], [0, 1], [0, 2], [0, 1, 3])):
        of_path = [*range(prefix), *(prefix + ancestor for ancestor in path)]
        right = reference(queries[node : node + 1], keys[of_path], values[of_path])
        close(found[node : node + 1], right, torch.float32)


@pytest.mark.parametrize("window", [1, 2, 30, 500])
def test_a_draft_sees_no_further_back_than_its_window(window: int) -> None:
    queries, keys, values = tensors(60, 4, 2, torch.float32)
    seen = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]).bool()
    start = max(0, 60 - window)
    before, own = (tuple(t[part] for t in (keys, values)) for part in (slice(start, 60), slice(60, None)))
    found = attend_tree(queries, before, own, SCALE, seen, window)
    for node, path in enumerate(([0], [0, 1], [0, 2], [0, 1, 3])):
        of_path = [*range(60), *(60 + ancestor for ancestor in path)]
        right = reference(queries[node : node + 1], keys[of_path], values[of_path], window)
        close(found[node : node + 1], right, torch.float32)


@pytest.mark.parametrize("step", [0, 2])
def test_a_step_of_a_draft_sees_what_was_drafted_before_it(step: int) -> None:
    slots, prefixes = [consecutive(7, 61), scattered(30, 50)], [60, 49]
    found, right = forward(slots, prefixes, torch.float32, torch.float32, step=step)
    close(found, right, torch.float32)


def test_a_request_does_not_depend_on_those_beside_it() -> None:
    alone, _ = forward([consecutive(7, 61)], [20], torch.bfloat16, torch.bfloat16)
    beside, _ = forward([consecutive(7, 61), scattered(30, 50)], [20, 4], torch.bfloat16, torch.bfloat16)
    assert torch.equal(alone, beside[:41])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("is_cross_attention", True),
        ("attn_type", AttentionType.ENCODER_ONLY),
        ("v_head_dim", 2 * SIZE),
    ],
)
def test_what_is_not_plain_is_left_to_the_stock_backend(name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CpuAttention(SimpleNamespace(device="cpu", req_to_token_pool=None, token_to_kv_pool=None))
    stock = CpuAttention.__mro__[1]
    for method in ("forward_extend", "forward_decode"):
        monkeypatch.setattr(stock, method, lambda self, *args, called=method, **kwargs: called)
        monkeypatch.setattr(CpuAttention, "_forward", lambda self, *args: "ours")
        run = getattr(backend, method)
        batch: Any = SimpleNamespace(forward_mode=mode("extend"))
        assert run(None, None, None, layer(2), batch) == "ours"
        other = layer(2)
        setattr(other, name, value)
        assert run(None, None, None, other, batch) == method


def test_the_stock_backend_verifies_a_chain_as_tokens_that_extend_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CpuAttention(SimpleNamespace(device="cpu", req_to_token_pool=None, token_to_kv_pool=None))
    found: list[Any] = []
    stock = CpuAttention.__mro__[1]
    monkeypatch.setattr(
        stock, "forward_extend", lambda self, q, k, v, layer, batch, *args, **kwargs: found.append(batch)
    )
    other = layer(2)
    other.v_head_dim = 2 * SIZE
    batch: Any = SimpleNamespace(
        forward_mode=mode("verify"), seq_lens=torch.tensor([7, 9]), spec_info=SimpleNamespace(draft_token_num=4)
    )
    backend.forward_extend(None, None, None, other, batch)
    assert [t.tolist() for t in (found[0].extend_prefix_lens, found[0].extend_seq_lens)] == [[7, 9], [4, 4]]
    assert found[0].seq_lens.tolist() == [11, 13]
    assert batch.seq_lens.tolist() == [7, 9]
