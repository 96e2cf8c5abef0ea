"""The engine's side, in the environment that has torch and SGLang: `pytest tests/engine`."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

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

    @pytest.fixture
    def parallel(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
        """What SGLang says of ranks to those that work on its tree: there is one."""
        parallel = SimpleNamespace(attn_tp_size=1, attn_tp_rank=0)
        for module in ("lost_pages", "ranks"):
            monkeypatch.setattr(f"engine_patch.{module}.get_parallel", lambda: parallel)
        monkeypatch.setattr("engine_patch.radix_cache.model_group", lambda: None)
        return parallel
