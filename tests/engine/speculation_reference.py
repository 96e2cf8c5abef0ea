"""What SGLang's own kernels around speculative decoding give, by Triton's interpreter: `python
speculation_reference.py FILE` adds to each case of a file of `torch.save` what the kernel makes of its arguments.

A program of its own, because Triton decides when it is imported whether it interprets."""

from __future__ import annotations

import os
import sys
from types import ModuleType

os.environ["TRITON_INTERPRET"] = "1"
# Of a build that is not published.
STUB = ModuleType("sgl_kernel.speculative")
STUB.reconstruct_indices_from_tree_mask = None  # type: ignore[attr-defined]
sys.modules.update({"sgl_kernel": ModuleType("sgl_kernel"), "sgl_kernel.speculative": STUB})

import torch  # noqa: E402
from sglang.kernels.ops.speculative import cache_locs, eagle, reconstruct_tree, spec_tree  # noqa: E402
from sglang.srt.mem_cache import allocation  # noqa: E402


def extend_slots(rows, table, starts, ends, out, pool_len):  # type: ignore[no-untyped-def]
    cache_locs.assign_extend_cache_locs[(len(rows),)](rows, table, starts, ends, out, pool_len, len(rows))


def assign_slots(rows, table, starts, ends, slots, pool_len):  # type: ignore[no-untyped-def]
    allocation.assign_req_to_token_pool[(len(rows),)](rows, table, starts, ends, slots, pool_len, len(rows))


def draft_slots(rows, table, seq_lens, out, pool_len, topk, steps):  # type: ignore[no-untyped-def]
    cache_locs.assign_draft_cache_locs_contiguous_func(rows, table, seq_lens, out, topk, steps)


def bonus_tokens(accepted, lens, out, stride):  # type: ignore[no-untyped-def]
    eagle.fill_bonus_tokens_func(accepted, lens, out, stride, len(lens))


def accepted_slots(accepted, slots, out):  # type: ignore[no-untyped-def]
    eagle.fill_accept_out_cache_loc_func(accepted, slots, out, accepted.numel())


KERNELS = {
    "extend_slots": extend_slots,
    "assign_slots": assign_slots,
    "draft_slots": draft_slots,
    "bonus_tokens": bonus_tokens,
    "accepted_slots": accepted_slots,
    "build_tree": spec_tree.sgl_build_tree_kernel_triton,
    "tree_of_mask": reconstruct_tree.reconstruct_indices_from_tree_mask_triton,
    "verify_greedily": spec_tree.verify_tree_greedy_triton,
}

if __name__ == "__main__":
    cases = torch.load(sys.argv[1])
    for name, arguments in cases:
        KERNELS[name](*arguments)
    torch.save(cases, sys.argv[1])
