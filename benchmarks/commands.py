"""What `agentstate bench` runs: workloads chosen, progress shown, tables printed, raw results written."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from agentstate.benchmarks import foresight, foresight_tables, projection, results, traces
from agentstate.benchmarks.calibration import Calibration
from agentstate.benchmarks.fleet import Fleet
from agentstate.benchmarks.probe import probe
from agentstate.benchmarks.replay import replay as replay_against
from agentstate.benchmarks.replay import validation
from agentstate.benchmarks.simulator import Simulation
from agentstate.benchmarks.study import POLICIES, study, summary
from agentstate.benchmarks.terminal import console
from agentstate.benchmarks.traces import Workload
from agentstate.cli import launcher
from agentstate.errors import EngineError, EngineUnreachable, SettingsError
from agentstate.fleet import engines
from agentstate.fleet.control import ControlClient
from agentstate.settings import Settings
from agentstate.sql.database import Database

STORE = POLICIES[3]
"""The policy that is like an engine with AgentState today, with which `replay` compares an engine."""


def workload(
    source: str, *, sessions: int, within_s: float, max_gap_s: float, tokens: float, time: float, seed: int
) -> Workload:
    """The workload that the command line describes. Raises SettingsError for an unknown source."""
    if source == "generated":
        chosen = traces.generated(sessions, within_s, seed, max_gap_s)
    elif source == "mooncake":
        chosen = traces.mooncake().first(sessions)
    elif source == "tracelab":
        chosen = traces.tracelab(copies=-(-sessions // 2)).first(sessions)
    else:
        raise SettingsError(f"there is no source {source}: choose generated, mooncake or tracelab")
    return chosen.scaled(tokens, time)


def replay(
    chosen: Workload,
    calibration_name: str,
    fleet_settings: dict[str, Any],
    *,
    simulate: bool,
    engine_url: str | None,
    seed: int,
    report: Path | None,
) -> None:
    """Replay against an engine, simulate a fleet, or both: then the engine is compared with its simulation."""
    if not simulate and engine_url is None:
        raise SettingsError("choose --simulate, --engine URL, or both")
    fleet = Fleet(**fleet_settings)
    requests = sum(1 for _ in chosen.turns())
    rows: list[dict[str, Any]] = []
    settings: dict[str, Any] = {"workload": chosen.source, "requests": requests, "seed": seed}
    measured = None
    if engine_url is not None:
        with _bar() as advance:
            measured = asyncio.run(
                replay_against(chosen, engine_url, progress=lambda served: advance("the engine", served, requests))
            )
        rows.append(summary("measured", measured, None))
    if simulate:
        calibration = Calibration.load(calibration_name)
        settings |= {"calibration": asdict(calibration), "fleet": asdict(fleet)}
        with _bar() as advance:
            if measured is None:
                rows += study(
                    chosen,
                    calibration,
                    fleet,
                    seed=seed,
                    advance=lambda policy, served: advance(policy.name, served, requests),
                )
            else:
                simulated = Simulation(chosen, calibration, fleet, STORE, seed=seed).run()
                rows.append(summary("simulated", simulated, fleet))
                settings["validation"] = validation(simulated, measured)
    _print_replay(chosen, rows, settings.get("validation"))
    _keep(report, "replay", settings, rows)


def look_ahead(seeds: Sequence[int], *, full: bool, report: Path | None) -> None:
    """Simulate one engine under every policy that looks ahead, and print what each is worth."""
    with _bar() as advance:
        rows = foresight.study(seeds, full=full, advance=advance)
    command = f"agentstate bench replay --simulate{' --full' if full else ''} --seed {seeds[0]} --seeds {len(seeds)}"
    _keep(report, "foresight", {"command": command, "seeds": list(seeds)}, rows)
    for shown in foresight_tables.tables(rows):
        numbers = [Column(name, justify="right") for name in shown.header[shown.left :]]
        table = Table(*shown.header[: shown.left], *numbers, title=shown.title, padding=(0, 0))
        for cells in shown.rows:
            table.add_row(*cells)
        console.print(table)


def calibrate(
    engine_url: str, control: ControlClient, output: Path, name: str, layers: int, token_bytes: int, longest: int
) -> None:
    """Write a running engine's calibration record. ``control`` asks its first rank."""
    machine = results.machine()
    versions = ", ".join(f"{package} {version}" for package, version in results.versions().items())
    source = f"measured by `agentstate bench calibrate` on {machine['cores']} cores of {machine['cpu']}; {versions}"
    record = asyncio.run(
        probe(
            engine_url,
            partial(control.call, "stat", 5),
            name=name,
            source=source,
            layers=layers,
            token_bytes=token_bytes,
            lengths=[longest * step // 6 for step in (1, 2, 4, 6)],
            say=console.print,
        )
    )
    calibration = Calibration.fit(record)
    results.write(output, record)
    for point in record["prefill"]:
        fitted_s = calibration.request_s + calibration.prefill_s(point["cached"], point["new"])
        console.print(
            f"{point['cached']:>7,} cached + {point['new']:>6,} new: {point['seconds']:.3f} s, fitted {fitted_s:.3f} s"
        )
    console.print(f"{output} is written; a restore runs at {record['restore_gb_per_s']} GB/s")


def control_of(database: Database, engine_url: str, timeout_s: float) -> ControlClient:
    """A client of the first rank of the engine at ``engine_url``. Raises EngineUnreachable if that has not registered
    itself, or not been heard of for ``timeout_s``."""
    with database.read() as connection:
        live = engines.live(connection, timeout_s)
    for engine in live:
        if engine.base_url == f"{engine_url.rstrip('/')}/v1" and engine.rank == 0:
            return ControlClient(engine.control_address, engine.control_secret)
    known = ", ".join(sorted({engine.base_url for engine in live})) or "none"
    raise EngineUnreachable(f"no engine at {engine_url} has registered itself; those that have: {known}")


def project(
    hardware_settings: dict[str, float], measured: tuple[float, int] | None, cases: Path | None, report: Path | None
) -> None:
    """Print the published table as it would be on given hardware, with what that rests on."""
    if measured is not None:
        tokens_per_s, tokens = measured
        hardware_settings["prefill_tflops"] = round(
            projection.measured_tflops(projection.QWEN_7B, tokens, tokens_per_s), 1
        )
    hardware = projection.Hardware(name="as given on the command line", **hardware_settings)
    chosen = projection.PUBLISHED if cases is None else projection.load_cases(cases)
    rows = [projection.project(case, hardware) for case in chosen]
    numbers = ["tokens", "recomputed, s", "restored, s", "memory hit, s", "ratio", "tok/s", "published, s", "ratio"]
    table = Table("model", *(Column(name, justify="right") for name in numbers), title="Turn 2, on paper")
    for row in rows:
        there, back = row["published_recomputed_s"], row["published_restored_s"]
        table.add_row(
            row["model"],
            f"{row['tokens']:,}",
            f"{row['recomputed_s']:.1f}",
            f"{row['restored_s']:.3f}",
            f"{row['memory_hit_s']:.3f}",
            f"{row['ratio']:.0f}×",
            f"{row['tokens_per_s_recomputed']:.1f} → {row['tokens_per_s_restored']:.1f}",
            f"{there:g} → {back:g}" if there else "",
            f"{there / back:.0f}×" if there else "",
        )
    console.print(table)
    assumed = projection.assumptions(hardware)
    for line in assumed:
        console.print(f"· {line}", highlight=False)
    _keep(report, "projection", {**asdict(hardware), "assumptions": assumed}, rows)


def path(settings: Settings, tokens: str, page_sizes: str, report: Path | None) -> None:
    """Measure the interpreter's part of a match, a restore and a spill, where SGLang is, and print it."""
    python = launcher.engine_python(settings)
    program = [python, "-W", "ignore", "-m", "agentstate.benchmarks.path"]
    command = [*program, "--tokens", tokens, "--page-sizes", page_sizes]
    rows: list[dict[str, Any]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as measuring:
        assert measuring.stdout is not None
        for line in measuring.stdout:
            rows.append(row := json.loads(line))
            console.print(f"{row['tokens']:,} tokens, pages of {row['page_size']}, {row['part']}", highlight=False)
    if measuring.returncode:
        raise EngineError("the measurement ended early; the lines above say why")
    table = Table("tokens", "page", "part", *(Column(name, justify="right") for name in ("interpreter, s", "calls/GB")))
    for row in rows:
        shown = [f"{row['tokens']:,}", f"{row['page_size']}", row["part"], f"{row['interpreter_s']:.3f}"]
        # The raw result says of what kind they are.
        table.add_row(*shown, f"{row['calls_per_gb']:,.0f}")
    console.print(table)
    settings_of = {"model": "qwen2.5-7b", "tokens": tokens, "page_sizes": page_sizes}
    _keep(report, "path", settings_of, rows, [Path(python)])


def _print_replay(chosen: Workload, rows: list[dict[str, Any]], validated: dict[str, Any] | None) -> None:
    figures: tuple[dict[str, Callable[[dict[str, Any]], str]], ...] = (
        {
            "TTFT p50": lambda row: f"{row['ttft_p50_s']:,.3f}",
            "p90": lambda row: f"{row['ttft_p90_s']:,.3f}",
            "p99, s": lambda row: f"{row['ttft_p99_s']:,.2f}",
            "device": lambda row: f"{row['hit_device']:.1%}",
            "host": lambda row: f"{row['hit_host']:.1%}",
            "drive hits": lambda row: f"{row['hit_nvme']:.1%}",
        },
        {
            "prefill": lambda row: f"{row['prefill_s'] / 3600:,.1f}",
            "saved, h": lambda row: f"{row['prefill_saved_s'] / 3600:,.1f}",
            "read": lambda row: f"{row['bytes_read'] / 1e12:,.2f}",
            "written, TB": lambda row: f"{row['bytes_written'] / 1e12:,.2f}",
            "drive/day": lambda row: f"{row['drive_writes_per_day']:.2f}",
            "busy": lambda row: f"{row['engine_busy']:.0%}",
            "can resume": lambda row: f"{row['sessions_restorable_peak']:,}/{row['sessions_alive_peak']:,}",
        },
    )
    console.print(f"[bold]{chosen.source}[/]: {rows[0]['requests']:,} requests", highlight=False)
    inside = [row for row in rows if row["prefill_s"] is not None]
    for columns, shown_rows in zip(figures, (rows, inside), strict=True):
        if not shown_rows:
            continue
        table = Table(
            Column("variant", no_wrap=True), *(Column(name, justify="right") for name in columns), padding=(0, 0)
        )
        for row in shown_rows:
            table.add_row(row["variant"], *(shown(row) for shown in columns.values()))
        console.print(table)
    for name, of in (validated or {}).items():
        console.print(f"{name}: simulated {of['simulated']:,}, measured {of['measured']:,}, ratio {of['ratio']}")


def _keep(
    report: Path | None,
    kind: str,
    settings: dict[str, Any],
    rows: list[dict[str, Any]],
    pythons: Sequence[Path] = (),
) -> None:
    if report is not None:
        results.write(report, results.record(kind, settings, rows, pythons))
        console.print(f"raw result written to {report}")


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each named thing: call it with the name, how much is done, and of how much."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        tasks: dict[str, Any] = {}

        def advance(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=total)
            if total < 200 or done % 200 == 0 or done == total:
                progress.update(tasks[name], completed=done)

        yield advance
