"""The engine's side, in the environment that has torch and SGLang: `pytest tests/engine`."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("torch") is None or find_spec("sglang") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from device import Rank

    @pytest.fixture
    def rank(tmp_path: Path) -> Iterator[Rank]:
        rank = Rank(tmp_path / "rank0")
        yield rank
        rank.close()
