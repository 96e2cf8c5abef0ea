"""What the tests on a GPU have in common. They need torch and no SGLang; without a GPU they run on the late device."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="no torch: the tests on a GPU run where there is one with CUDA")

ON_A_GPU = torch.cuda.is_available()
needs_kvikio = pytest.mark.skipif(
    find_spec("kvikio") is None or not ON_A_GPU,
    reason="no KvikIO (pip install 'agentstate[kvikio]'), or no CUDA device",
)

DEVICE = torch.device("cuda", 0)
BACKENDS = ["posix", pytest.param("kvikio", marks=needs_kvikio)]
DTYPES = [torch.bfloat16, torch.float8_e4m3fn]
if ON_A_GPU:  # for the late device bytes are bytes
    DTYPES += [torch.float16, torch.float8_e5m2, torch.float32]
# Layers, page size, bytes a token and component in elements: GQA, MLA, one odd enough for every alignment.
GEOMETRIES = {"gqa": (4, 64, (512, 512)), "mla": (3, 64, (576,)), "odd": (2, 4, (37, 5))}

# A square matrix of so many rows keeps a device busy for a while: a GPU, or the CPU that the late device runs on.
BUSY = 4096 if ON_A_GPU else 64

Tensors = list[tuple[torch.Tensor, ...]]


def kv_tensors(geometry: str, dtype: torch.dtype, pages: int, seed: int | None = None) -> Tensors:
    """KV tensors of ``pages`` pages and a few rows more: random bits, or zeros without a seed."""
    layers, page_size, sizes = GEOMETRIES[geometry]
    shapes = [(pages * page_size + 3, 1, size) for size in sizes]
    tensors = [tuple(torch.zeros(shape, dtype=dtype, device=DEVICE) for shape in shapes) for _ in range(layers)]
    if seed is not None:
        generator = np.random.default_rng(seed)
        for tensor in (tensor for layer in tensors for tensor in layer):
            bits = tensor.view(torch.uint8)
            bits.copy_(torch.from_numpy(generator.integers(0, 256, bits.shape, dtype=np.uint8)))
    return tensors


def page_of(tensors: Sequence[Sequence[torch.Tensor]], page_size: int, number: int) -> list[list[bytes]]:
    """The bytes of a device page: for every layer, its components'."""
    rows = slice(number * page_size, (number + 1) * page_size)
    return [[tensor.view(torch.uint8)[rows].cpu().numpy().tobytes() for tensor in layer] for layer in tensors]
