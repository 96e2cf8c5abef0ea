"""The benchmark measures what it says: the same bytes come back, and the cases are what they are called."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from contents import WIDE

from agentstate.benchmarks.contenders import AgentStateStore, Device, DeviceMemory
from agentstate.benchmarks.pages import GEOMETRIES, main, suite
from agentstate.pages import Geometry, LayerwiseReader, Quota

SPILL_BYTES = 4 << 20


@pytest.fixture
def reader() -> Iterator[LayerwiseReader]:
    reader = LayerwiseReader(WIDE, staging_bytes=1 << 20, threads=2)
    yield reader
    reader.close()


def filled(rows: int) -> DeviceMemory:
    memory = DeviceMemory(WIDE, rows)
    memory.fill(seed=1)
    return memory


@pytest.mark.parametrize(("rows", "pages"), [(7, 7), (3, 11), (40, 25)])
def test_what_the_store_wrote_comes_back(tmp_path: Path, reader: LayerwiseReader, rows: int, pages: int) -> None:
    store = AgentStateStore(tmp_path / "s", WIDE, reader, spill_staging_bytes=SPILL_BYTES, pages_an_extent=4)
    source, target = filled(rows), DeviceMemory(WIDE, rows)
    store.write(source, pages, version=0)
    store.forget()
    assert not target.same(source)
    store.read(target)
    present = min(rows, pages)
    assert (target.bytes[:, :, :present] == source.bytes[:, :, :present]).all()
    assert sorted(path.stat().st_size for path in store.files()) == sorted(store.sizes(pages))
    store.delete()
    assert store.files() == []
    store.close()
    assert not (tmp_path / "s").exists()


def test_merging_leaves_fewer_files(tmp_path: Path, reader: LayerwiseReader) -> None:
    store = AgentStateStore(
        tmp_path / "s", WIDE, reader, spill_staging_bytes=SPILL_BYTES, pages_an_extent=2, merged=True
    )
    source, target = filled(32), DeviceMemory(WIDE, 32)
    store.write(source, 32, version=0)
    assert len(store.files()) < len(store.sizes(32))
    store.read(target)
    assert target.same(source)
    store.close()


def test_a_store_at_its_quota_takes_the_space_of_what_it_had(tmp_path: Path, reader: LayerwiseReader) -> None:
    store = AgentStateStore(tmp_path / "s", WIDE, reader, spill_staging_bytes=SPILL_BYTES, pages_an_extent=4)
    source, target = filled(16), DeviceMemory(WIDE, 16)
    store.limit(Quota(sum(store.sizes(16))))
    for version in range(3):
        store.write(source, 16, version)
        assert sum(path.stat().st_size for path in store.files()) == sum(store.sizes(16))
        target.clear()
        store.read(target)
        assert target.same(source)
    store.close()


def test_the_device_writes_and_reads_files_of_the_given_sizes(tmp_path: Path) -> None:
    sizes = [3 * 4096, 40 * 4096, 4096]
    device = Device(tmp_path / "d", readers=2, largest_bytes=max(sizes))
    for _ in range(2):
        device.write(sizes)
        files = [tmp_path / "d" / str(number) for number in range(3)]
        assert [path.stat().st_size for path in files] == sizes
        device.read(files)
        device.copy_cached(files)
    device.delete()
    assert not (tmp_path / "d").exists()


def test_a_device_memory_has_components_of_one_size() -> None:
    with pytest.raises(ValueError, match="components"):
        DeviceMemory(Geometry(1, 4, (8, 4)), 3)


def test_the_geometries_are_those_of_the_models() -> None:
    assert GEOMETRIES["qwen2.5-7b"].page_bytes == 3_670_016
    assert GEOMETRIES["smollm2-fp32"].page_bytes == 64 * 46_080 == 2 * GEOMETRIES["smollm2"].page_bytes


def test_the_suite_measures_every_length_once_and_the_rest_at_a_typical_one() -> None:
    cases = suite(("idle", "busy", "turns"), ("qwen2.5-7b", "smollm2"), (4096, 16384, 65536))
    assert [(case.name, case.geometry, case.pages) for case in cases] == [
        ("idle", "qwen2.5-7b", 64),
        ("idle", "qwen2.5-7b", 256),
        ("idle", "qwen2.5-7b", 1024),
        ("idle", "smollm2", 256),
        ("busy", "qwen2.5-7b", 256),
        ("turns", "smollm2", 1300),
    ]


def test_a_run_writes_its_rows_and_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTSTATE_SPILL_STAGING_BYTES", "8MiB")
    monkeypatch.setenv("AGENTSTATE_STAGING_BYTES", "8MiB")
    report = tmp_path / "report.json"
    arguments = ["--geometry", "smollm2", "--tokens", "256", "--rounds", "2", "--case", "idle,staged,busy,recycled"]
    assert main([*arguments, "--dir", str(tmp_path / "disk"), "--json", str(report)]) == 0
    rows = json.loads(report.read_text())["rows"]
    assert [(row["case"], row["geometry"], row["tokens"]) for row in rows] == [
        (name, "smollm2", 256) for name in ("idle", "staged", "busy", "recycled")
    ]
    for row in rows:
        for field in ("read_share_of_device", "write_share_of_device", "read_gb_s", "staging_bytes"):
            assert row[field] > 0
        assert row["cpu_s_per_gb"] >= 0
        alternatives = bool(row["alternatives"])
        for field in ("ratio_to_best_alternative", "best_alternative_cpu_s_per_gb"):
            assert (row[field] is not None) == alternatives
    assert list((tmp_path / "disk").iterdir()) == []
    assert "cold restores" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--geometry", "gpt"], ["--case", "x"], ["--tokens", "63"], ["--rounds", "0"]])
def test_arguments_that_mean_nothing_are_refused(tmp_path: Path, wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--dir", str(tmp_path), *wrong])
    assert end.value.code == 2


def test_the_command_hands_its_arguments_on() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "agentstate.cli", "pages", "bench", "--help"], capture_output=True, text=True, check=True
    )
    assert "--rounds" in shown.stdout
