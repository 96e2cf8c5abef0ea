from __future__ import annotations

import os

import pytest
import torch

from engine_patch import plugin


@pytest.mark.skipif(torch.cuda.is_available(), reason="the platform is the GPU's")
def test_the_cpu_platform_has_torch_align_the_kv_pool_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    assert plugin.platform() == "engine_patch.cpu.platform.CpuPlatform"
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    plugin.platform()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
