"""Speculative decoding on a CPU, for chains of drafts (top-k 1) and the trees of NGRAM.

SGLang has the small kernels around a draft for GPUs, and for a CPU in the build that is not published. These are torch
versions; arguments are those of the kernels that they replace. They work on a handful of draft tokens a request, so
that loops over requests cost nothing beside a forward.

In a tree of drafts, node 0 is the token that the target chose last, and parents come before their children.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from engine_patch.flags import CPU_ATTENTION

ALGORITHMS = frozenset({"EAGLE", "EAGLE3", "STANDALONE", "NGRAM"})


def draft_slots(
    rows: torch.Tensor,
    table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    pool_len: int,
    topk: int,
    steps: int,
) -> None:
    """The slots that a draft writes: of each request the next ``topk * steps`` after its tokens, into ``out``."""
    places = seq_lens.long()[:, None] + torch.arange(topk * steps)
    out.copy_(table[rows.long()[:, None], places].flatten())


def extend_slots(
    rows: torch.Tensor, table: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor, out: torch.Tensor, pool_len: int
) -> None:
    """The slots of each request's tokens from ``starts`` to ``ends``, one request after the other, into ``out``."""
    spans = zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True)
    found = torch.cat([table[row, start:end] for row, start, end in spans])
    out[: len(found)].copy_(found)


def assign_slots(
    rows: torch.Tensor,
    table: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    slots: torch.Tensor,
    pool_len: int,
) -> None:
    """The inverse of `extend_slots`: enter ``slots`` into the table."""
    first = 0
    for row, start, end in zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True):
        table[row, start:end] = slots[first : first + end - start].to(table.dtype)
        first += end - start


def bonus_tokens(accepted: torch.Tensor, lens: torch.Tensor, out: torch.Tensor, stride: int) -> None:
    """The last accepted token of each request, which has ``lens[i]`` of its ``stride`` places in ``accepted``."""
    last = torch.arange(len(lens)) * stride + lens.long() - 1
    out.copy_(accepted.flatten()[last])


def accepted_slots(accepted: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
    """The slots of the accepted nodes, without the places that hold -1, to the front of ``out``."""
    nodes = accepted.flatten()
    found = slots[nodes[nodes > -1].long()]
    out[: len(found)].copy_(found)


def build_tree(
    parents: torch.Tensor,
    selected: torch.Tensor,
    seq_lens: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    index: torch.Tensor,
    first_child: torch.Tensor,
    next_sibling: torch.Tensor,
    topk: int,
    depth: int,
    width: int,
    mode: int,
) -> None:
    """The trees of a batch from what SGLang keeps of how they were drafted: ``selected[b]`` are the candidates that
    became nodes, by number; candidate ``c`` was drafted after candidate ``parents[b, c // topk]``, or after node 0.

    Fills ``mask`` (who sees whom among a request's nodes, flat), ``positions`` and `_links`.
    """
    for b, candidates in enumerate(selected.tolist()):
        node_of = {candidate: node for node, candidate in enumerate(candidates, start=1)}
        seen = torch.eye(width, dtype=torch.bool)
        for node, candidate in enumerate(candidates, start=1):
            row = candidate // topk
            parent = node_of[int(parents[b, row])] if row else 0
            seen[node] |= seen[parent]
        mask[b * width * width : (b + 1) * width * width] = seen.flatten()
        _links(b, seen, int(seq_lens[b]), positions, index, first_child, next_sibling)


def tree_of_mask(
    mask: torch.Tensor,
    seq_lens: torch.Tensor,
    positions: torch.Tensor,
    index: torch.Tensor,
    first_child: torch.Tensor,
    next_sibling: torch.Tensor,
    batch: int,
    width: int,
) -> None:
    """The `_links` of the trees of a batch, whose nodes see what ``mask`` says."""
    for b, seen in enumerate(mask.reshape(batch, width, width).bool()):
        _links(b, seen, int(seq_lens[b]), positions, index, first_child, next_sibling)


def _links(
    b: int,
    seen: torch.Tensor,
    seq_len: int,
    positions: torch.Tensor,
    index: torch.Tensor,
    first_child: torch.Tensor,
    next_sibling: torch.Tensor,
) -> None:
    """The positions of the nodes of request ``b``, their numbers in the batch (``index``), and who follows whom: the
    first child of each node and its next sibling, -1 for none. Siblings are in the order of their numbers, as
    ``build_tree`` and ``tree_of_mask`` alike list them."""
    width = len(seen)
    before = torch.tril(seen, -1)
    positions.view(-1, width)[b] = before.sum(1) + seq_len
    index.view(-1, width)[b] = torch.arange(b * width, (b + 1) * width)
    child, sibling = [-1] * width, [-1] * width
    for node in range(width - 1, 0, -1):
        ancestors = before[node].nonzero().flatten().tolist()
        if ancestors:
            sibling[node], child[ancestors[-1]] = child[ancestors[-1]], node
    first_child.view(-1, width)[b] = torch.tensor(child)
    next_sibling.view(-1, width)[b] = torch.tensor(sibling)


def verify_greedily(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
) -> None:
    """Follow each request's tree as long as the target agrees: at each node to the child that is the token which
    ``target_predict`` has for that node.

    ``accept_index`` gets the accepted nodes, ``accept_token_num`` how many of them were drafts, and ``predicts`` the
    target's token after each accepted node.
    """
    targets = target_predict.flatten().tolist()
    trees = zip(retrive_index, retrive_next_token, retrive_next_sibling, candidates, strict=True)
    for b, tree in enumerate(trees):
        number, child, sibling, tokens = (part.tolist() for part in tree)
        accepted, node = [number[0]], 0
        while len(accepted) < accept_index.shape[1]:
            node = child[node]
            while node != -1 and tokens[node] != targets[accepted[-1]]:
                node = sibling[node]
            if node == -1:
                break
            accepted.append(number[node])
        accept_index[b, : len(accepted)] = torch.tensor(accepted)
        accept_token_num[b] = len(accepted) - 1
        predicts[accepted] = target_predict.flatten()[accepted].to(predicts.dtype)


_SPECULATIVE = "sglang.kernels.ops.speculative"
KERNELS: dict[str, dict[str, Callable[..., None]]] = {
    f"{_SPECULATIVE}.cache_locs": {
        "assign_draft_cache_locs_contiguous_cpu": draft_slots,
        "assign_extend_cache_locs_cpu": extend_slots,
    },
    f"{_SPECULATIVE}.eagle": {"fill_bonus_tokens_cpu": bonus_tokens, "fill_accept_out_cache_loc_cpu": accepted_slots},
    f"{_SPECULATIVE}.spec_tree": {
        "sgl_build_tree_kernel_efficient_cpu": build_tree,
        "sgl_verify_tree_greedy_cpu": verify_greedily,
    },
    "sglang.srt.mem_cache.allocation": {"assign_req_to_token_pool_cpu": assign_slots},
    "sglang.srt.speculative.eagle_utils": {},
    "sglang.srt.speculative.eagle_worker_common": {},
    "sglang.srt.speculative.ngram_worker": {},
}
"""SGLang's modules that ask whether they are on a CPU, and what each of them calls then."""


def install() -> None:
    """Have SGLang call these."""
    # SGLang imports one name from the unpublished build here, whichever device there is.
    stubs = {name: ModuleType(name) for name in ("sgl_kernel", "sgl_kernel.speculative")}
    stubs["sgl_kernel.speculative"].reconstruct_indices_from_tree_mask = tree_of_mask  # type: ignore[attr-defined]
    before = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    try:
        import_module(f"{_SPECULATIVE}.reconstruct_tree")
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module
    for name, functions in KERNELS.items():
        vars(import_module(name)).update({"_is_cpu": True, **functions})
    from sglang.srt.mem_cache import allocation, memory_pool
    from sglang.srt.speculative import draft_utils

    allocation.get_last_loc_triton = allocation.get_last_loc_torch
    # Accepted nodes of a tree move to where the next tokens go; the kernel for that is Triton's.
    memory_pool.MHATokenToKVPool._init_kv_copy_and_warmup = _move_natively
    stock = draft_utils.DraftBackendFactory._create_backend
    draft_utils.DraftBackendFactory._create_backend = lambda factory, *args, **kwargs: _with_ours(
        stock, factory, *args, **kwargs
    )


def _move_natively(pool: Any) -> None:
    pool.use_native_move_kv_cache = True


def _with_ours(
    stock: Callable[..., Any], factory: Any, name: str, backends: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """SGLang knows which attention a draft has by name, ours not among them."""
    from engine_patch.cpu.attention import CpuAttention, DraftSteps

    def make() -> tuple[str, Any]:
        runner = factory.draft_model_runner
        drafts = kwargs.get("stamps_children", False)
        return CPU_ATTENTION, DraftSteps(runner, factory.speculative_num_steps) if drafts else CpuAttention(runner)

    return stock(factory, name, {**backends, CPU_ATTENTION: make}, *args, **kwargs)
