"""The benchmark reads the same ranges in both ways, compares every byte, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentstate.benchmarks import tiers
from agentstate.errors import SettingsError
from agentstate.tiers import DirectoryTier
from agentstate.tiers.testing.conformance import names


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "EXTENT_BYTES", 1 << 20)
    monkeypatch.setattr(tiers, "READ_BYTES", 256 << 10)
    monkeypatch.setattr(tiers, "MIB", 1 << 14)


@pytest.fixture
def url(tmp_path: Path) -> str:
    (tmp_path / "share").mkdir()
    return f"file://{tmp_path / 'share'}"


@pytest.mark.parametrize("pattern", ["large", "layers"])
def test_every_byte_is_read_once_but_what_lies_between_layers(pattern: str) -> None:
    found = tiers.reads(["a", "b"], pattern)
    ranges = [(read.name, offset, n_bytes) for read in found for offset, n_bytes in read.ranges]
    assert len(found) == 8 and len(set(ranges)) == (8 if pattern == "large" else 64)
    gaps = 0 if pattern == "large" else 64 * tiers.APART_BYTES
    assert sum(n_bytes for *_, n_bytes in ranges) == 2 * tiers.EXTENT_BYTES - gaps
    assert [read.at for read in found] == [
        sum(n_bytes for read in found[:number] for _, n_bytes in read.ranges) for number in range(8)
    ]


def test_a_store_is_measured_and_left_as_it_was(tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    rows = tiers.run(url, None, mib=128, at_once=2, rounds=2, report=report)
    assert [(row["store"], row["pattern"], row["bytes"]) for row in rows] == [
        ("the store", "large", 2 << 20),
        ("the store", "layers", (2 << 20) - 64 * tiers.APART_BYTES),
    ]
    for row in rows:
        assert row["tier_gb_s"] > 0 and row["raw_gb_s"] > 0
        assert row["tier_to_raw_95"][0] <= row["tier_to_raw"] <= row["tier_to_raw_95"][1]
    result = json.loads(report.read_text())
    assert result["kind"] == "tiers" and result["settings"]["extents"] == 2
    assert "the store" in capsys.readouterr().out
    with DirectoryTier(tmp_path / "share") as tier:
        assert names(tier) == []


def test_wrong_bytes_end_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "through_tier", lambda *_: None)
    with pytest.raises(RuntimeError, match="not those that were published"):
        tiers.run(url, None, mib=64, at_once=2, rounds=2, report=None)


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no directory"):
        tiers.run("", tmp_path / "gone", mib=64, at_once=2, rounds=2, report=None)
