"""Linear attention with a gated delta rule (Qwen3-Next) on a CPU, and what surrounds it, which SGLang has for GPUs.

Each head keeps a matrix, its state, of shape (value size, key size). Per token it decays, is corrected towards the
token's value at the token's key, and is read at the token's query. Arguments are those of the kernels that these
functions replace; states are in ``initial_state[slot]``, and a negative slot is padding.

While drafts are verified the state of a request stays as it is; the state after each draft goes to rows of its own, and
`keep_accepted` takes over the one after the last draft that was accepted.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F

from engine_patch.cpu import convolution


def gates(
    A_log: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dt_bias: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """By the logarithm of how much each head's state decays and by how much it is corrected, a token: float32 of shape
    (1, tokens, heads)."""
    decay = -A_log.float().exp() * F.softplus(a.float() + dt_bias.float())
    return decay[None], b.float().sigmoid()[None]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor,
    initial_state_indices: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    drafts: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None, None]:
    """Several sequences one after the other, request ``i`` from token ``cu_seqlens[i]`` on: ``q`` and ``k`` are (1,
    tokens, heads, key size), ``v`` is (1, tokens, value heads, value size). Of ``drafts`` the states go to
    ``drafts[rows[i], t]`` after each token ``t``, and nowhere else."""
    heads, of_heads = q.shape[2], v.shape[2]
    queries, keys = (
        F.normalize(x[0].float(), dim=-1, eps=1e-6).repeat_interleave(of_heads // heads, 1) for x in (q, k)
    )
    queries = queries * q.shape[-1] ** -0.5
    values, decay, strength = v[0].float(), g[0].float().exp(), beta[0].float()
    out = torch.zeros_like(values)
    starts = cu_seqlens.tolist()
    for i, slot in enumerate(initial_state_indices[: len(starts) - 1].tolist()):
        if slot < 0:
            continue
        state = initial_state[slot].float()
        for t in range(starts[i], starts[i + 1]):
            state = state * decay[t][:, None, None]
            error = values[t] - torch.einsum("hvk,hk->hv", state, keys[t])
            state = state + torch.einsum("hv,hk->hvk", error * strength[t][:, None], keys[t])
            out[t] = torch.einsum("hvk,hk->hv", state, queries[t])
            if drafts is not None and rows is not None:
                drafts[int(rows[i]), t - starts[i]] = state.to(drafts.dtype)
        if drafts is None:
            initial_state[slot] = state.to(initial_state.dtype)
    return out.to(v.dtype)[None], None, None


def attend_next(
    A_log: torch.Tensor,
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    b: torch.Tensor,
    initial_state_source: torch.Tensor,
    initial_state_indices: torch.Tensor,
    cu_seqlens: torch.Tensor,
    intermediate_states_buffer: torch.Tensor | None = None,
    intermediate_state_indices: torch.Tensor | None = None,
    retrieve_parent_token: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """A token of each request, or the drafts of each that are verified: a chain."""
    if retrieve_parent_token is not None:
        raise NotImplementedError("linear attention verifies no trees of drafts on a CPU")
    heads = A_log.numel()
    decay, strength = gates(A_log, a.reshape(-1, heads), b.reshape(-1, heads), dt_bias)
    out, _, _ = attend(
        q,
        k,
        v,
        decay,
        strength,
        initial_state_source,
        initial_state_indices,
        cu_seqlens,
        drafts=intermediate_states_buffer,
        rows=intermediate_state_indices,
    )
    return out


def keep_accepted(
    caches: Any,
    slots: torch.Tensor,
    steps: torch.Tensor,
    tracked_slots: torch.Tensor | None,
    tracked_steps: torch.Tensor | None,
    src_indices_raw: torch.Tensor | None = None,
) -> None:
    """Take over the states of all layers after draft ``steps[i]`` of request ``i`` into ``slots[i]``; a negative number
    is nothing. SGLang tracks none on a CPU."""
    pairs = zip(
        (caches.temporal, *caches.conv), (caches.intermediate_ssm, *caches.intermediate_conv_window), strict=True
    )
    found = [(states, drafts) for states, drafts in pairs if states.numel()]
    rows = range(len(slots)) if src_indices_raw is None else src_indices_raw.tolist()
    for row, slot, step in zip(rows, slots.tolist(), steps.tolist(), strict=True):
        if slot >= 0 and step >= 0:
            for states, drafts in found:
                states[:, slot] = drafts[:, row, step].to(states.dtype)


def norm_gated(self: Any, x: torch.Tensor, g: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """A method of SGLang's gated norm."""
    normed = F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps)
    gate = torch.sigmoid(g.float()) if self.activation == "sigmoid" else F.silu(g.float())
    return (normed * gate).to(x.dtype)


def gate_experts(
    hidden: torch.Tensor, weight: torch.Tensor, shared: torch.Tensor, out: torch.Tensor, *, do_add: bool
) -> None:
    """What the experts that all tokens share contribute, by a gate a token."""
    gated = torch.sigmoid(hidden.float() @ weight.float())[:, None] * shared.float()
    out.copy_(out.float() + gated if do_add else gated)


def split(
    qkvz: torch.Tensor, ba: torch.Tensor, heads: int, of_heads: int, key_size: int, value_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is projected for each head side by side, a row a token, taken apart: queries, keys and values in a row, the
    gates of the output (tokens, value heads, value size), and the two inputs of `gates` (tokens, value heads)."""
    rows, each = len(qkvz), of_heads // heads
    sizes = [key_size, key_size, each * value_size, each * value_size]
    *qkv, z = qkvz.view(rows, heads, -1).split(sizes, dim=-1)
    b, a = (part.reshape(rows, of_heads) for part in ba.view(rows, heads, -1).split(each, dim=-1))
    return torch.cat([part.flatten(1) for part in qkv], 1), z.reshape(rows, of_heads, value_size), b, a


def install() -> None:
    """Have SGLang call these. Its attention backends may or may not be imported: SGLang installs a platform while it
    imports what they need."""
    from sglang.kernels.ops.attention import triton_gdn_fused_proj
    from sglang.kernels.ops.attention.fla import fused_norm_gate
    from sglang.kernels.ops.attention.linear import fused_gdn_gating
    from sglang.kernels.ops.elementwise import elementwise
    from sglang.kernels.ops.mamba import causal_conv1d_triton, mamba_state_scatter_triton
    from sglang.srt.layers.attention.linear.kernels import gdn_triton

    fused_norm_gate.FusedRMSNormGated.forward = norm_gated
    gdn_triton.TritonGDNKernel.supports_packed_decode = False
    users = [module for name, module in list(sys.modules.items()) if name.startswith("sglang.")]
    for module, name, function in (
        (elementwise, "_launch_fused_gate_sigmoid_mul", gate_experts),
        (mamba_state_scatter_triton, "scatter_mamba_states_after_mtp_verify", keep_accepted),
        (causal_conv1d_triton, "causal_conv1d_fn", convolution.convolve),
        (causal_conv1d_triton, "causal_conv1d_update", convolution.convolve_next),
        (triton_gdn_fused_proj, "fused_qkvzba_split_reshape_cat", split),
        (fused_gdn_gating, "fused_gdn_gating", gates),
        (gdn_triton, "chunk_gated_delta_rule", attend),
        (gdn_triton, "fused_sigmoid_gating_delta_rule_update", attend_next),
    ):
        stock = getattr(module, name)
        for user in users:
            if vars(user).get(name) is stock:
                setattr(user, name, function)
