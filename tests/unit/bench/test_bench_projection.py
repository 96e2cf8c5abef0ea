from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentstate.benchmarks import projection
from agentstate.benchmarks.projection import PUBLISHED, Case, Hardware, Model, project
from agentstate.errors import SettingsError

SMALL = Model(
    name="small",
    parameters=1e9,
    weight_bytes=0.85e9,
    layers=10,
    query_heads=8,
    kv_heads=2,
    head_dim=100,
    kv_element_bytes=2,
)
HARDWARE = Hardware("by hand", prefill_tflops=1.0, memory_gb_per_s=1000.0, pcie_gb_per_s=2.0, drives_gb_per_s=0.8)


def test_a_projection_by_hand() -> None:
    assert SMALL.token_bytes == 2 * 10 * 2 * 100 * 2 == 8000
    # 2 × 10⁹ × 100,000 for the weights, and 2 × 800 × 10 × 100,000² for attention.
    assert SMALL.prefill_operations(100_000) == 2e14 + 1.6e14
    row = project(Case(SMALL, 100_000), HARDWARE)
    assert row["kv_bytes"] == 800_000_000
    new = projection.NEW_TOKENS
    forward_s = (2e9 * new + 16_000 * (200_000 * new + new**2)) / 1e12
    assert row["memory_hit_s"] == pytest.approx(0.03 + forward_s, abs=1e-3)
    # One second of reading, after which a tenth of the forward is left.
    assert row["restored_s"] == pytest.approx(0.03 + 1.0 + forward_s / 10, abs=1e-3)
    assert row["recomputed_s"] == pytest.approx(0.03 + 360 + forward_s, abs=1e-3)
    assert row["ratio"] == pytest.approx(row["recomputed_s"] / row["restored_s"], rel=1e-2)


def test_the_slower_of_drives_and_pcie_decides() -> None:
    slow = Hardware("x", 1.0, 1000.0, pcie_gb_per_s=0.4, drives_gb_per_s=100.0)
    row = project(Case(SMALL, 100_000), slow)
    assert row["restored_s"] == pytest.approx(2.0, abs=0.2)


def test_chunked_layers_attend_to_their_chunk_only() -> None:
    chunked = Model(**{**SMALL.__dict__, "chunked_layers": 9, "chunk_tokens": 1000})
    assert chunked.prefill_operations(100_000) == 2e14 + 1.6e13 + 2 * 800 * 9 * 100_000 * 1000
    assert chunked.token_bytes == SMALL.token_bytes


def test_the_published_recomputations_are_near_one_rate() -> None:
    """The assumption that the printed list states: three of four within 4 % of 570 TFLOP/s."""
    rates = [projection.published_tflops(case) for case in PUBLISHED]
    assert [round(rate, -1) for rate in rates if rate is not None] == [580, 550, 590, 330]


def test_a_measured_rate_gives_its_own_time_back() -> None:
    tflops = projection.measured_tflops(SMALL, 10_000, tokens_per_s=500.0)
    assert SMALL.prefill_operations(10_000) / tflops / 1e12 == pytest.approx(20.0)


def test_every_number_of_the_hardware_is_among_the_assumptions() -> None:
    text = " ".join(projection.assumptions(Hardware("mine", 123.0, 4567.0, 89.0, 98.7)))
    assert all(number in text for number in ("mine", "123", "4,567", "89", "98.7"))


def test_cases_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "cases.json"
    path.write_text(json.dumps([{**SMALL.__dict__, "tokens": 5}]))
    assert projection.load_cases(path) == [Case(SMALL, 5)]
    path.write_text(json.dumps([{"name": "x", "tokens": 5}]))
    with pytest.raises(SettingsError, match="cases.json.*kv_heads"):
        projection.load_cases(path)
