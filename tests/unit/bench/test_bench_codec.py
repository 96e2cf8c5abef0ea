"""The benchmark compares every byte, reads the same pages in both ways, and says how many bytes that was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from contents import MARK, WIDE, keys, write

from agentstate.benchmarks import codec
from agentstate.errors import SettingsError
from agentstate.pages import PageStore, native


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A page directory as an engine has it: two raw extents, and a coded one, which does not count."""
    root = tmp_path / "pages"
    for number, how in enumerate(("raw", "lossless")):
        store = PageStore(root / "store" / "rank0", MARK, WIDE, codec=how)  # type: ignore[arg-type]
        write(store, keys((number, 1), (number, 2)))
        if how == "raw":
            write(store, keys((number, 3)))
        store.close()
    return root


def test_what_is_measured_adds_up(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    codec.run(source, "pages", [8.0, 80.0], mib=1, rounds=2, report=report)
    result = json.loads(report.read_text())
    assert result["kind"] == "codec"
    ratios = [row for row in result["rows"] if row["part"] == "ratio"]
    assert [(row["layer"], row["component"]) for row in ratios] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(0.75 <= row["ratio"] < 0.8 for row in ratios)
    speeds = {row["way"]: row for row in result["rows"] if row["part"] == "speed"}
    assert set(speeds) == ({"native", "python"} if native.library is not None else {"python"})
    assert all(row["bytes"] == 3 * WIDE.page_bytes and row["decode_gb_s"] > 0 for row in speeds.values())
    links = [row for row in result["rows"] if row["part"] == "link"]
    assert [row["gigabits"] for row in links] == [8.0, 80.0]
    for row in links:
        # Again and again, as often as a MiB has room for it.
        assert row["raw_bytes"] == (1 << 20) // (3 * WIDE.page_bytes) * 3 * WIDE.page_bytes > 3 * WIDE.page_bytes
        assert row["coded_bytes"] == pytest.approx(row["raw_bytes"] * sum(r["ratio"] for r in ratios) / 4)
    assert "8 Gb/s" in capsys.readouterr().out


def test_a_wrong_page_ends_it(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = codec.Wire.publish

    def damaged(self: codec.Wire, name: str, *rest: object) -> object:
        done = publish(self, name, *rest)  # type: ignore[arg-type]
        self.objects[name] = self.objects[name][:-5000] + b"x" * 5000
        return done

    monkeypatch.setattr(codec.Wire, "publish", damaged)
    with pytest.raises(RuntimeError, match="not what was written"):
        codec.run(source, "pages", [80.0], mib=1, rounds=2, report=None)


def test_a_directory_without_pages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no raw extents"):
        codec.run(tmp_path, "pages", [1.0], mib=1, rounds=2, report=None)
