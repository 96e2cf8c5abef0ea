from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from agentstate.benchmarks import report, results
from agentstate.benchmarks.fleet import Fleet, Outcome, Served
from agentstate.benchmarks.study import quantile, summary
from agentstate.benchmarks.traces import Gap
from agentstate.benchmarks.ttft import quotient
from agentstate.errors import SettingsError


def ttft_rows(model: str = "Small Model/1B") -> list[dict[str, Any]]:
    # The pairs of the restore and the hit: 1.6, 1.5 and 0.9; of the medians it is 1.2. Of the recomputation and the
    # restore: 10, 20 and 15; of the medians it is 13.3.
    figures = {
        "recompute": ([8.0, 12.0, 8.1], 0, None),
        "memory_hit": ([0.5, 0.4, 0.6], 0, None),
        "restore_cold": ([0.8, 0.6, 0.54], 2_000_000, 0.9),
    }
    return [
        {
            "model": model,
            "tokens": tokens,
            "variant": variant,
            "ttft_s": statistics.median(seconds) * tokens / 1000,
            "ttft_all_s": [each * tokens / 1000 for each in seconds],
            "before_match_s": 0.00412,
            "tokens_per_s": 20.0,
            "bytes_read": n_bytes,
            "device_share": share,
            "identical": True,
            **({"overlap": 1.25} if share else {}),
        }
        for tokens in (1000, 4000)
        for variant, (seconds, n_bytes, share) in figures.items()
    ]


def written(directory: Path, kind: str, rows: list[dict[str, Any]], settings: dict[str, Any], name: str = "") -> None:
    results.write(directory / f"{name or kind}.json", results.record(kind, settings, rows))


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "agentstate.cli", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, "COLUMNS": "200"})


def test_a_page_has_every_figure_and_where_it_comes_from(tmp_path: Path) -> None:
    peer = {"model": "Small Model/1B", "tokens": 4000, "variant": "a peer", "ttft_s": None, "reason": "needs a GPU"}
    written(tmp_path / "raw", "ttft", [*ttft_rows(), peer], {})
    report.write(tmp_path / "raw", tmp_path / "docs" / "performance.md")
    page = (tmp_path / "docs" / "performance.md").read_text()
    ratios = "15.0× | 10.0–20.0 | 1.500 | 0.900–1.600"
    assert f"| 1,000 | restored, cold | 0.600 | 0.0041 | {ratios} | 20.0 | 2,000,000 | 90% | 1.25 | yes |" in page
    assert "| 4,000 | a peer | needs a GPU |" in page
    record = json.loads((tmp_path / "raw" / "ttft.json").read_text())
    assert f"commit {record['commit']}" in page
    assert record["machine"]["cpu"] in page
    assert socket.gethostname() not in page
    assert str(tmp_path) not in page


def test_every_picture_of_the_page_is_there_for_light_and_dark(tmp_path: Path) -> None:
    written(tmp_path / "raw", "ttft", ttft_rows(), {})
    report.write(tmp_path / "raw", tmp_path / "performance.md")
    page = (tmp_path / "performance.md").read_text()
    for name in ("ttft-small-model-1b", "ratio-small-model-1b", "bandwidth-small-model-1b"):
        for theme in ("light", "dark"):
            path = f"performance/{name}-{theme}.svg"
            assert path in page
            assert ElementTree.parse(tmp_path / path).getroot().tag.endswith("svg")
            assert (tmp_path / path).with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_equal_results_give_equal_pages(tmp_path: Path) -> None:
    written(tmp_path / "raw", "ttft", ttft_rows(), {})
    for copy in ("one", "two"):
        report.write(tmp_path / "raw", tmp_path / copy / "performance.md")
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert len(files) == 13
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), path


def test_the_newest_of_two_results_counts(tmp_path: Path) -> None:
    written(tmp_path / "raw", "ttft", ttft_rows(), {}, "a-first")
    later = results.record("ttft", {}, [{**row, "ttft_s": 0.123} for row in ttft_rows()])
    results.write(tmp_path / "raw" / "b.json", {**later, "measured_at": "2999-01-01T00:00:00+00:00"})
    report.write(tmp_path / "raw", tmp_path / "performance.md")
    page = (tmp_path / "performance.md").read_text()
    assert "0.123" in page
    assert "0.600" not in page


def test_what_a_figure_is_divided_by_is_of_its_own_run(tmp_path: Path) -> None:
    written(tmp_path / "raw", "ttft", ttft_rows(), {}, "a-first")
    # Newer, and measured as often as what it would replace.
    again = [{**row, "ttft_s": 80.0} for row in ttft_rows() if (row["variant"], row["tokens"]) == ("recompute", 1000)]
    later = results.record("ttft", {}, again)
    results.write(tmp_path / "raw" / "b.json", {**later, "measured_at": "2999-01-01T00:00:00+00:00"})
    report.write(tmp_path / "raw", tmp_path / "performance.md")
    page = (tmp_path / "performance.md").read_text()
    assert "| 1,000 | recomputed | 80.000 | 0.0041 | 1.0× |" in page
    assert "| 1,000 | restored, cold | 0.600 | 0.0041 | 15.0× | 10.0–20.0 |" in page


def test_no_results_and_broken_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no results"):
        report.write(tmp_path, tmp_path / "performance.md")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(SettingsError, match="x.json is not a result"):
        report.write(tmp_path, tmp_path / "performance.md")


def test_the_commands_write_results_that_the_report_reads(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    fleet = ("--engines", "1", "--device-tokens", "400000", "--within-s", "60", "--max-gap-s", "60")
    simulated = run(
        "replay", "--simulate", "--fleet", "--sessions", "4", *fleet, "--json", str(raw / "fleet.json"), cwd=tmp_path
    )
    assert simulated.returncode == 0, simulated.stderr
    assert "+ device prefetch" in simulated.stdout
    projected = run("project", "--json", str(raw / "projection.json"), cwd=tmp_path)
    assert projected.returncode == 0, projected.stderr
    assert "550 TFLOP/s" in projected.stdout
    reported = run("report", str(raw), "--output", str(tmp_path / "performance.md"), cwd=tmp_path)
    assert reported.returncode == 0, reported.stderr
    page = (tmp_path / "performance.md").read_text()
    assert "A simulated fleet: generated agents, seed 0, 4 sessions" in page
    assert "DeepSeek-R1-Distill-Llama-70B FP8" in page
    assert (tmp_path / "performance" / "replay-1-dark.svg").exists()


def test_what_was_measured_from_outside_has_no_figures_of_the_inside(tmp_path: Path) -> None:
    served = Served(0, 0, Gap.FIRST, 0.0, 1.5, 100, 1, 40, 0, 20, 0.0, 0.0)
    outcome = Outcome(served=[served])
    rows = [summary("measured", outcome, None), summary("simulated", outcome, Fleet(1, 1000, 1e9, 1e9, 1e9))]
    figures = {"hit_tokens": {"simulated": 60, "measured": 60, "ratio": 1.0}}
    settings = {"workload": "by hand", "requests": 1, "validation": figures}
    written(tmp_path / "raw", "replay", rows, settings)
    report.write(tmp_path / "raw", tmp_path / "performance.md")
    page = (tmp_path / "performance.md").read_text()
    assert "| measured | 1.500 | 1.500 | 1.500 | 40.0% | 0.0% | 20.0% |  |  |  |  |  |  |" in page
    assert (
        "| simulated | 1.500 | 1.500 | 1.500 | 40.0% | 0.0% | 20.0% | 0.0 | 0.00 | 0.00 | 0.00 | 0% | 0 of 0 |" in page
    )
    assert "- hit_tokens: 60 ÷ 60 = 1.0" in page


def test_a_replay_of_nothing_says_what_to_choose(tmp_path: Path) -> None:
    neither = run("replay", "--sessions", "1", cwd=tmp_path)
    assert neither.returncode == 1
    assert "--simulate" in neither.stderr
    unknown = run("replay", "--simulate", "--fleet", "--source", "dreams", cwd=tmp_path)
    assert unknown.returncode == 1
    assert "dreams" in unknown.stderr
    assert "Traceback" not in neither.stderr + unknown.stderr
    without = run("replay", "--simulate", "--sessions", "4", "--source", "mooncake", cwd=tmp_path)
    assert without.returncode == 1
    assert "sessions, source: for a workload and a fleet of your choice add --fleet" in without.stderr


def test_quantiles_are_by_nearest_rank() -> None:
    assert [quantile([1.0, 2.0, 3.0, 4.0], share) for share in (0.0, 0.25, 0.5, 0.51, 1.0)] == [1.0, 1.0, 2.0, 3.0, 4.0]


def test_a_page_has_the_session_service_beside_its_peers(tmp_path: Path) -> None:
    case = {"database": "sqlite", "concurrency": 1, "samples": 9}
    rows = [
        {
            **case,
            "system": "agentstate",
            "operation": "resume",
            "history": n,
            "side": "server",
            "p50_ms": 2,
            "p99_ms": 4.5,
        }
        for n in (10, 100_000)
    ]
    peer = {"system": "Peer", "operation": "get_items", "history": 10, "side": "client", "p50_ms": 1500, "p99_ms": 2000}
    settings = {
        "sessions": {"10": 10_000, "100000": 3},
        "engine": "a stand-in",
        "durability": {"sqlite": {"agentstate": {"synchronous": "normal"}}},
        "left_out": {"Other on sqlite": "it is not installed"},
    }
    written(tmp_path / "raw", "service", [*rows, {**case, **peer}], settings)
    report.write(tmp_path / "raw", tmp_path / "performance.md")
    page = (tmp_path / "performance.md").read_text()
    assert "| agentstate | resume | server | 2.00 / 4.50 | 2.00 / 4.50 |" in page
    assert "| Peer | get_items | client | 1,500.00 / 2,000.00 |  |" in page
    assert "- sqlite, agentstate: synchronous normal" in page
    assert "- not measured: Other on sqlite: it is not installed" in page


def test_a_page_has_what_else_is_measured_on_an_engine_and_of_the_store(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    burst = {"model": "small", "sessions": 8, "tokens": 2048, "last_ttft_s": 1.5, "bound_s": 2.0, "ratio": 0.75}
    burst |= {"ratio_95": [0.7, 0.8], "memory_hit_last_ttft_s": 1.25, "device_gb_per_s": 2.5}
    written(raw, "burst", [burst], {"models": ["small"]})
    rates = {f"{variant}_tokens_per_s": 100.0 for variant in ("spilling", "off", "plain")}
    load = {"model": "small", "load": "decoding", "requests": 4, "prompt_tokens": 64, "output_tokens": 128, **rates}
    load |= {
        "ratio_to_off": 0.99,
        "ratio_to_off_95": [0.98, 1.0],
        "ratio_to_plain": 0.97,
        "ratio_to_plain_95": [0.96, 1],
    }
    written(raw, "throughput", [load], {"models": ["small"]})
    written(raw, "soak", [{"points": {"turns": 5, "forks": 2}, "restored_tokens": 1234, "different": []}], {"turns": 7})
    pages = {"case": "idle", "geometry": "small", "tokens": 4096, "read_gb_s": 2.0, "read_share_of_device": 0.95}
    pages |= {"cpu_s_per_gb": 0.25, "best_alternative": "safetensors", "ratio_to_best_alternative": 1.5}
    pages |= {"best_alternative_cpu_s_per_gb": 0.75, "write_gb_s": 1.0, "write_share_of_device": 0.8}
    written(raw, "pages", [{**pages, "write_cpu_s_per_gb": 0.5}], {"rounds": 3})
    report.write(raw, tmp_path / "performance.md")
    page = (tmp_path / "performance.md").read_text()
    assert "| small | 8 × 2,048 | 1.500 | 2.000 | 0.750 | 0.700–0.800 | 1.250 | 2.50 |" in page
    rates_and_ratios = "100.0 | 100.0 | 100.0 | 0.990 | 0.980–1.000 | 0.970 | 0.960–1.000"
    assert f"| small | decoding | 4 × (64 + 128) | {rates_and_ratios} |" in page
    assert "7 turns (5 turns, 2 forks), 1,234 tokens restored: 0 answers differ." in page
    assert "| idle | small | 4,096 | 2.00 | 95% | 0.25 | safetensors | 1.50 | 0.75 |" in page
    assert "| idle | small | 4,096 | 1.00 | 80% | 0.50 |" in page


def test_a_first_request_after_a_restart_is_paired_with_the_hits_that_followed_it() -> None:
    first = {"variant": "restore_first_after_restart", "ttft_s": 3.0, "ttft_all_s": [2.0, 4.0]}
    hits = {"variant": "memory_hit_after_restart", "ttft_s": 1.5, "ttft_all_s": [1, 9, 1, 1, 1, 2, 2, 0.1, 2, 2]}
    middle, bounds = quotient(first, hits)
    assert (middle, bounds) == (2.0, (2.0, 2.0))
    assert quotient(hits, hits) == (1.0, None)
    fewer = {**hits, "ttft_all_s": [1.0] * 5}
    assert quotient(first, fewer) == (2.0, None)


def test_a_recomputation_is_paired_with_what_was_measured_in_its_round_alone() -> None:
    recomputed = {"variant": "recompute", "ttft_s": 9.0, "ttft_all_s": [8.0, 9.0, 30.0]}
    restored = {"variant": "restore_cold", "ttft_s": 1.0, "ttft_all_s": [1.0, 1.0, 2.0]}
    assert quotient(recomputed, restored) == (9.0, (8.0, 15.0))
    # By chance as often, but not in turn with it.
    for variant in ("restore_first_after_restart", "lmcache_cold"):
        assert quotient(recomputed, {**restored, "variant": variant, "ttft_s": 2.0}) == (4.5, None)
