"""Causal depthwise convolution with a state a request, which SGLang has only for GPUs.

The state of a request is the last inputs of its window; both functions read it and leave the newest ones in it.
Arguments are those of the kernels that they replace.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    conv_states: torch.Tensor,
    query_start_loc: torch.Tensor,
    cache_indices: torch.Tensor,
    has_initial_state: torch.Tensor,
    activation: str | None,
    **_: Any,
) -> torch.Tensor:
    """Several sequences side by side: ``x`` is (channels, tokens), request ``i`` has the tokens from
    ``query_start_loc[i]`` on, and its state (channels, width - 1) is ``conv_states[cache_indices[i]]``."""
    channels, width = weight.shape
    out = torch.empty_like(x)
    starts = query_start_loc.tolist()
    rows = zip(cache_indices.tolist(), has_initial_state.tolist(), strict=True)
    for (start, end), (slot, resumes) in zip(zip(starts, starts[1:], strict=False), rows, strict=True):
        if start == end or slot < 0:
            continue
        state = conv_states[slot, :, 1 - width :]
        before = state.to(x.dtype) if resumes else x.new_zeros(channels, width - 1)
        inputs = torch.cat([before, x[:, start:end]], dim=1)
        convolved = F.conv1d(inputs[None], weight.to(x.dtype)[:, None], bias, groups=channels)[0]
        out[:, start:end] = _activated(convolved, activation)
        state.copy_(inputs[:, 1 - width :])
    return out


def convolve_next(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    conv_state_indices: torch.Tensor,
    intermediate_conv_window: torch.Tensor | None = None,
    intermediate_state_indices: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """One token of each of several requests: ``x`` is (requests, channels). Of drafts that are verified, (requests,
    channels, drafts), the states go to ``intermediate_conv_window[intermediate_state_indices[i], t]`` after each draft
    ``t``, and nowhere else."""
    slots = conv_state_indices.long()
    width = weight.shape[1]
    if intermediate_conv_window is not None and intermediate_state_indices is not None:
        inputs = torch.cat([conv_state[slots, :, 1 - width :].to(x.dtype), x], dim=2)
        windows = inputs[:, :, 1:].unfold(2, width - 1, 1).transpose(1, 2)
        intermediate_conv_window[intermediate_state_indices.long()] = windows.to(intermediate_conv_window.dtype)
        convolved = F.conv1d(inputs, weight.to(x.dtype)[:, None], bias, groups=x.shape[1])
        # Laid out like ``x``: SGLang takes a view of it.
        return torch.empty_like(x).copy_(_activated(convolved, activation))
    inputs = torch.cat([conv_state[slots, :, 1 - width :].to(x.dtype), x[..., None]], dim=2)
    out = (inputs * weight.to(x.dtype)).sum(dim=2)
    if bias is not None:
        out = out + bias
    conv_state[slots, :, 1 - width :] = inputs[:, :, 1:].to(conv_state.dtype)
    return _activated(out, activation)


def _activated(x: torch.Tensor, activation: str | None) -> torch.Tensor:
    return F.silu(x) if activation in ("silu", "swish") else x
