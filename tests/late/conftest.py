"""Tests that take ``device`` run once for every policy of ``--late-policies``, with the late device in the place of an
accelerator."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from late.device import LateDevice
    from late.rank import Forward, Rank
    from late.streams import Policy

    @pytest.fixture
    def device(request: pytest.FixtureRequest) -> Iterator[LateDevice]:
        with LateDevice(Policy.parse(request.param)).installed() as device:
            yield device

    @pytest.fixture
    def rank(device: LateDevice, tmp_path: Path) -> Iterator[Rank]:
        rank = Rank(device, tmp_path / "rank0")
        yield rank
        rank.close()

    @pytest.fixture
    def forward(rank: Rank) -> Forward:
        return Forward(rank)

    def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
        if "device" in metafunc.fixturenames:
            policies = metafunc.config.getoption("--late-policies").split(",")
            metafunc.parametrize("device", policies, indirect=True)
