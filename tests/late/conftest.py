"""Tests that take ``device`` run once for every policy of ``--late-policies``, with the late device in torch's place."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

if find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from late.device import LateDevice
    from late.streams import Policy

    @pytest.fixture
    def device(request: pytest.FixtureRequest) -> Iterator[LateDevice]:
        with LateDevice(Policy.parse(request.param)).installed() as device:
            yield device

    def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
        if "device" in metafunc.fixturenames:
            policies = metafunc.config.getoption("--late-policies").split(",")
            metafunc.parametrize("device", policies, indirect=True)
