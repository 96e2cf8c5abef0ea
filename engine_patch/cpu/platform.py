"""The CPU platform. SGLang's own CPU engine needs a kernel build that is not published; this one needs torch only."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from engine_patch.flags import CPU_ATTENTION
from engine_patch.resolution import FlagRefused


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
        if server_args.speculative_algorithm not in (None, "NGRAM"):
            _draft_chains(server_args)

    def get_default_attention_backend(self) -> str:
        return CPU_ATTENTION

    def get_dispatch_key_name(self) -> str:
        return "native"

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        from engine_patch.cpu.speculation import ALGORITHMS

        return algorithm in ALGORITHMS

    def init_backend(self) -> None:
        from sglang.srt.layers.attention.attention_registry import register_attention_backend
        from sglang.srt.layers.attention.mamba import causal_conv1d
        from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
        from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

        from engine_patch.cpu import adapters, convolution, data_parallel, disaggregation, linear, sparse, speculation
        from engine_patch.cpu.attention import CpuAttention

        register_attention_backend(CPU_ATTENTION)(CpuAttention)
        # The other methods of MLA need kernels of their own.
        AttentionBackendRegistry.register(CPU_ATTENTION, lambda attention, batch: AttnForwardMethod.MLA)
        # SGLang calls these two where no compiled kernel is there; Triton's need a GPU.
        causal_conv1d._causal_conv1d_fn_triton = convolution.convolve
        causal_conv1d._causal_conv1d_update_triton = convolution.convolve_next
        speculation.install()
        linear.install()
        sparse.install()
        adapters.install()
        data_parallel.install()
        disaggregation.install()
        # DeepSeek's and Qwen3-Next's models ask CUDA for these, whichever device there is.
        torch.cuda.synchronize = lambda device=None: None
        torch.cuda.current_device = torch.cpu.current_device


def _draft_chains(server_args: Any) -> None:
    """Of some models SGLang would draft trees by default, which our attention does not know. Raises FlagRefused where
    they are asked for."""
    if server_args.speculative_eagle_topk not in (None, 1):
        raise FlagRefused(
            f"--speculative-eagle-topk {server_args.speculative_eagle_topk}: on a CPU drafts are chains; use "
            "--speculative-eagle-topk 1."
        )
    server_args.speculative_eagle_topk = 1
    if server_args.speculative_num_steps is None:
        server_args.speculative_num_steps, server_args.speculative_num_draft_tokens = 3, 4
