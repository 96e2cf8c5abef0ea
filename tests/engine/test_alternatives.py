"""What the benchmark compares the store with is used as it is meant to be: the same bytes come back."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentstate.benchmarks.contenders import DeviceMemory, alternatives
from agentstate.pages import Geometry

GEOMETRY = Geometry(layers=3, page_size=4, component_bytes=(4096, 4096))


@pytest.mark.parametrize("threads", [1, 2])
def test_every_alternative_brings_back_what_it_wrote(tmp_path: Path, threads: int) -> None:
    found, missing = alternatives(tmp_path, GEOMETRY, threads)
    assert missing == []
    assert [other.name for other in found] == ["torch.save", "safetensors", "HiCacheFile"]
    for other in found:
        source, target = DeviceMemory(GEOMETRY, 5), DeviceMemory(GEOMETRY, 5)
        for version in range(2):
            source.fill(seed=version)
            other.write(source, 5, version)
            other.forget()
            target.clear()
            other.read(target)
            assert target.same(source), other.name
            assert len(other.files()) == 5
            other.delete()
            assert other.files() == []
