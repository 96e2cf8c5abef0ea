"""LoRA on a CPU: SGLang's torch backend for it pins small tensors."""

from __future__ import annotations

import torch

from engine_patch.cpu.unpinned import Unpinned


def install() -> None:
    """Let SGLang's adapted layers and its torch backend do without pinned memory."""
    from sglang.srt.lora import layers
    from sglang.srt.lora.backend import torch_backend

    layers.torch = torch_backend.torch = Unpinned()
    torch.Tensor.pin_memory = lambda self, device=None: self
