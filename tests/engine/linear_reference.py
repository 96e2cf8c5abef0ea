"""What SGLang's own kernels of linear attention give, by Triton's interpreter: `python linear_reference.py FILE` adds
to each case of a file of `torch.save` what the kernel returns, and what it makes of its arguments.

A program of its own, because Triton decides when it is imported whether it interprets."""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from sglang.kernels.ops.attention.linear.fused_gdn_gating import fused_gdn_gating  # noqa: E402
from sglang.kernels.ops.attention.linear.fused_sigmoid_gating_recurrent import (  # noqa: E402
    fused_sigmoid_gating_delta_rule_update,
)
from sglang.kernels.ops.attention.triton_gdn_fused_proj import fused_qkvzba_split_reshape_cat  # noqa: E402
from sglang.kernels.ops.mamba.causal_conv1d_triton import causal_conv1d_update  # noqa: E402

KERNELS = {
    "gates": fused_gdn_gating,
    "attend_next": fused_sigmoid_gating_delta_rule_update,
    "convolve_next": causal_conv1d_update,
    "split": fused_qkvzba_split_reshape_cat,
}

if __name__ == "__main__":
    cases = torch.load(sys.argv[1])
    made = [(KERNELS[name](*arguments.pop("given", ()), **arguments), arguments) for name, arguments in cases]
    torch.save(made, sys.argv[1])
