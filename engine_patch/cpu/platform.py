"""The CPU platform. SGLang's own CPU engine needs a kernel build that is not published; this one needs torch only."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from engine_patch.flags import CPU_ATTENTION


class CpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Active where `engine_patch.plugin.platform` found no accelerator; every SGLang process then runs on the CPU."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def apply_server_args_defaults(self, server_args: Any) -> None:
        # SGLang's default for `--device cpu` is a backend of that kernel build; nobody can have meant it here.
        if server_args.attention_backend in (None, "intel_amx"):
            server_args.attention_backend = CPU_ATTENTION
        if server_args.dtype == "auto" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
            # Without AVX-512, torch multiplies bfloat16 matrices about nine times slower than float32 ones.
            server_args.dtype = "float32"
        server_args.disable_cuda_graph = True

    def get_default_attention_backend(self) -> str:
        return CPU_ATTENTION

    def get_dispatch_key_name(self) -> str:
        return "native"

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

    def init_backend(self) -> None:
        from sglang.srt.layers.attention.attention_registry import register_attention_backend
        from sglang.srt.layers.attention.mamba import causal_conv1d
        from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
        from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

        from engine_patch.cpu import convolution
        from engine_patch.cpu.attention import CpuAttention

        register_attention_backend(CPU_ATTENTION)(CpuAttention)
        # The other methods of MLA need kernels of their own.
        AttentionBackendRegistry.register(CPU_ATTENTION, lambda attention, batch: AttnForwardMethod.MLA)
        # SGLang calls these two where no compiled kernel is there; Triton's need a GPU.
        causal_conv1d._causal_conv1d_fn_triton = convolution.convolve
        causal_conv1d._causal_conv1d_update_triton = convolution.convolve_next
