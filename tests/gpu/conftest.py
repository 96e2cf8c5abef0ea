"""The tests run on a GPU where there is one, and elsewhere once for every policy of ``--late-policies`` on the device
that `late` simulates."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

if find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from gpu import ON_A_GPU
    from late.device import LateDevice
    from late.streams import Policy

    @pytest.fixture(autouse=True)
    def device(request: pytest.FixtureRequest) -> Iterator[None]:
        if ON_A_GPU:
            yield
        else:
            with LateDevice(Policy.parse(request.param)).installed():
                yield

    def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
        policies = ["cuda"] if ON_A_GPU else metafunc.config.getoption("--late-policies").split(",")
        metafunc.parametrize("device", policies, indirect=True)
