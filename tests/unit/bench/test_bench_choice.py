from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from agentstate.benchmarks import choice
from agentstate.benchmarks.choice import CLUSTERED, MODELS, Model, drawn
from agentstate.errors import SettingsError

SMALL = Model(6, (656,), 132, chosen=128)


def sectors_a_row(rows: np.ndarray, row_bytes: int) -> float:
    first, last = rows * row_bytes // 4096, (rows * row_bytes + row_bytes - 1) // 4096
    return len(np.union1d(first, last)) / len(rows)


def test_clustered_choices_take_as_many_sectors_as_was_measured() -> None:
    random = np.random.default_rng(0)
    model = MODELS["deepseek-v3.2"]
    for union in (1, 5):
        rows = drawn(1_010_000, union * model.chosen, model, CLUSTERED, random)
        assert len(np.unique(rows)) == len(rows) == union * model.chosen
        assert sectors_a_row(rows, 656) == pytest.approx(CLUSTERED, abs=0.04)
        scattered = drawn(1_010_000, union * model.chosen, model, None, random)
        assert len(np.unique(scattered)) == union * model.chosen
        assert sectors_a_row(scattered, 656) > 1


def test_where_blocks_are_chosen_they_are_whole() -> None:
    model = MODELS["minimax-m3"]
    for sectors in (CLUSTERED, None):
        rows = drawn(131_072, 2048, model, sectors, np.random.default_rng(0))
        assert np.array_equal(rows, (rows[::128, None] + np.arange(128)).ravel()) and len(rows) == 2048
        assert not np.any(rows[::128] % 128)


def test_what_is_measured_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "small", SMALL)
    report = tmp_path / "report.json"
    rows = choice.run(tmp_path, ["small"], [8192], [1, 5], layers=2, rounds=1, report=report)
    assert json.loads(report.read_text())["rows"] == rows
    whole, *choices = rows
    assert (whole["mode"], whole["measured"]) == ("whole", False)
    assert whole["before_first_token_bytes"] == whole["total_bytes"] == 8192 * 6 * 788
    assert [(row["clustered"], row["union"]) for row in choices[::2]] == [(True, 1), (True, 5), (False, 1), (False, 5)]
    index_bytes = 8192 * 6 * 132
    for row in choices:
        assert row["mode"] == "choice" and row["measured"]
        assert index_bytes < row["before_first_token_bytes"] and row["total_bytes"] == whole["total_bytes"]
        if not row["gap_measured"]:
            assert row["read_bytes"] == row["named_bytes"] and row["gap_bytes"] == 0
        assert row["seconds"] > 0 and row["limit_seconds"] > 0
    # Nothing is left.
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    with pytest.raises(SettingsError, match="no geometry unknown"):
        choice.run(tmp_path, ["unknown"], [8192], [1], layers=2, rounds=1, report=None)
