"""`docs/performance.md` and its plots, from raw results and nothing else."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from agentstate.benchmarks import foresight_tables, plots, results
from agentstate.benchmarks.ttft import compared, floor_of, interval

Result = dict[str, Any]
_CONTENTS = {
    "ttft": "Turn 2: time to first token",
    "burst": "Many agents at once",
    "throughput": "What spilling costs",
    "soak": "The same tokens",
    "pages": "The page store",
    "foresight": "Foresight, simulated",
    "replay": "Agent workloads",
    "service": "The session service",
    "projection": "Other hardware, on paper",
}


def write(directory: Path, output: Path) -> None:
    """Write ``output`` from the results in ``directory``, with its plots in ``performance/`` beside it.

    Of results of one kind that measured the same thing, the newest counts. Raises SettingsError if there is no result
    or one that cannot be read.
    """
    found = results.load(directory)
    pictures = output.parent / "performance"
    lines = [
        "# Performance",
        "",
        f"Written by `agentstate bench report {_quoted(directory)}` from raw results; each names its machine and",
        "commit. Nothing here is typed by hand.",
    ]
    for kind, section in _SECTIONS.items():
        chosen = [result for result in found if result["kind"] == kind]
        if chosen:
            lines += ["", f"## {_CONTENTS[kind]}", ""]
            lines += section(chosen, pictures)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(lines) + "\n")


def _ttft(found: Sequence[Result], pictures: Path) -> list[str]:
    # If something was measured twice, the result with more samples counts, then the newer one.
    best: dict[tuple[str, int, str], tuple[dict[str, Any], Result]] = {}
    for result in found:
        for row in result["rows"]:
            name = row["model"], row["tokens"], row["variant"]
            if name not in best or _samples(row) >= _samples(best[name][0]):
                best[name] = row, result
    lines = [
        "Each run alternates the variants: recomputed, as a memory hit (the floor: nothing is brought back), and",
        "restored. A variant is divided by the memory hit and the recomputation of its own run, if that has them, and",
        "by the memory hit of its own engine. If both were measured in alternation, the quotient is the median of the",
        "pairs', with its 95 % interval (bootstrap); otherwise it is the quotient of the medians.",
        "*Before the match* is the time until SGLang had the request and looked for a prefix.",
        "*Share* is of the device's direct-read limit, measured in the same run. *Overlap* is the time over the best",
        "possible one: the longer of a memory hit and of reading the bytes at that limit. *Same* says whether the next",
        "tokens equal those after a memory hit (in bfloat16 a prefill in other chunks, such as a recomputation, may",
        "round to others).",
    ]
    for model in dict.fromkeys(model for model, _, _ in best):
        chosen = [(row, result) for (name, _, _), (row, result) in best.items() if name == model]
        chosen.sort(key=lambda pair: pair[0]["tokens"])
        rows = [row for row, _ in chosen]
        timed = _timed(rows, model)
        lines += ["", f"### {model}", ""]
        sources = {str(result["measured_at"]): result for _, result in chosen}
        lines += [_provenance(result) for result in sources.values()]
        table = []
        for row, result in chosen:
            tokens, own_s = row["tokens"], row.get("ttft_s")
            if own_s is None:  # a peer that could not run here
                table.append([f"{tokens:,}", plots.label(row["variant"]), row.get("reason", "not run"), *[""] * 10])
                continue
            beside = {**timed, **_timed(result["rows"], model)}
            table.append(
                [
                    f"{tokens:,}",
                    plots.label(row["variant"]),
                    f"{own_s:.3f}",
                    _maybe(row.get("before_match_s"), "{:.4f}"),
                    *compared(beside.get((tokens, "recompute")), row, 1, "×"),
                    *compared(row, beside.get((tokens, floor_of(row["variant"]))), 3),
                    _maybe(row.get("tokens_per_s"), "{:.1f}"),
                    _maybe(row.get("bytes_read"), "{:,}"),
                    _maybe(row.get("device_share"), "{:.0%}"),
                    _maybe(row.get("overlap"), "{:.2f}"),
                    {True: "yes", False: "**no**", None: ""}[row.get("identical")],
                ]
            )
        header = ["context", "variant", "TTFT, s", "before the match", "sooner than recomputed", "95 %", "÷ memory hit"]
        lines += ["", *_table([*header, "95 %", "tokens/s", "bytes read", "share", "overlap", "same"], table, left=2)]
        # Of peers, only what is comparable with a cold restore: otherwise there are too many lines.
        shown_of_peers = tuple(f"{peer}_cold" for peer in plots.PEERS)
        measured = [
            row
            for row in rows
            if row.get("ttft_s") is not None and (row["variant"] in plots.LABELS or row["variant"] in shown_of_peers)
        ]
        for draw, shown in ((plots.ttft, "ttft"), (plots.ratio, "ratio"), (plots.bandwidth, "bandwidth")):
            if not measured:
                break
            if shown == "bandwidth" and not any(row.get("device_share") is not None for row in measured):
                continue
            if shown == "ratio" and not any(variant == "recompute" for _, variant in timed):
                continue
            name = f"{shown}-{_slug(model)}"
            draw(measured, model, pictures, name)
            lines += ["", *_picture(pictures, name, f"{model}: {shown}")]
    return lines


def _replay(found: Sequence[Result], pictures: Path) -> list[str]:
    newest = {(result["settings"]["workload"], _kind(result)): result for result in found}
    lines = [
        "Hit rates are shares of all prompt tokens. *Saved* is the prefill time that the engines did not spend.",
        "*Drive writes a day* are of the whole page quota. *Restorable* counts the live sessions whose whole context",
        "was available without computing it, at the best sample.",
    ]
    for number, ((workload, kind), result) in enumerate(newest.items(), start=1):
        rows, settings = result["rows"], result["settings"]
        lines += ["", f"### {kind}: {workload}", "", _provenance(result)]
        if "fleet" in settings:
            fleet, cost = settings["fleet"], settings["calibration"]
            lines += [
                "",
                f"{fleet['engines']} engines, each with a KV pool of {fleet['device_tokens']:,} tokens, "
                f"{fleet['staging_bytes'] / 1e9:g} GB of staging, {fleet['host_bytes'] / 1e9:g} GB for prefetched "
                f"pages and {fleet['quota_bytes'] / 1e9:,g} GB on its drive. Costs: {cost['name']} ({cost['source']}).",
            ]
        table = [
            [
                row["variant"],
                *(f"{row[f'ttft_{share}_s']:,.3f}" for share in ("p50", "p90", "p99")),
                *(f"{row[f'hit_{tier}']:.1%}" for tier in ("device", "host", "nvme")),
                *_inside(row),
            ]
            for row in rows
        ]
        header = ["variant", "TTFT p50, s", "p90", "p99", "device hits", "host", "drive", "saved, h", "read, TB"]
        lines += ["", *_table([*header, "written, TB", "drive writes a day", "busy", "restorable"], table)]
        if "validation" in settings:
            lines += ["", "The simulator against the engine, simulated ÷ measured:", ""]
            lines += [
                f"- {figure}: {of['simulated']:,} ÷ {of['measured']:,} = {of['ratio']}"
                for figure, of in settings["validation"].items()
            ]
        name = f"replay-{number}"
        plots.distribution(rows, f"{kind}, {settings['requests']:,} requests", pictures, name)
        lines += ["", *_picture(pictures, name, f"{kind}: distribution of the time to first token")]
    return lines


def _foresight(found: Sequence[Result], pictures: Path) -> list[str]:
    result = found[-1]
    rows, settings = result["rows"], result["settings"]
    lines = [
        "One engine, and agents that have one conversation after another, simulated. W is the working set: the",
        "contexts of all agents. Figures are medians over seeds, with the least and the most. Every policy serves the",
        "same requests of a seed. *At a hit* is the share of turns that take at most 1.5 times their prefill alone.",
        "*Way* is how much of the distance from LRU to the oracle is gone; the oracle knows when everybody comes back,",
        "and fetches in time. *Read wait* and *memory wait* are how long requests waited for reads and for device",
        "memory, on average. *Ahead* is what was fetched before a request asked for it.",
        "[What is simulated](benchmarks.md#foresight-simulated).",
        "",
        f"`{settings['command']}`, seeds {', '.join(map(str, settings['seeds']))}.",
        "",
        _provenance(result),
    ]
    for table in foresight_tables.tables(rows):
        lines += ["", f"### {table.title}", "", *_table(table.header, table.rows, table.left)]
    for number, (title, chosen) in enumerate(_by_pool(rows).items(), start=1):
        name = f"foresight-{number}"
        plots.distribution(chosen, title, pictures, name)
        lines += ["", *_picture(pictures, name, f"{title}: distribution of the time to first token")]
    return lines


def _by_pool(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """For each pool and drive a row a policy, with the medians of its quantiles over seeds."""
    shown = ("infinite pool", "LRU", "LRU + hold", "simple", "learned", "signals", "oracle")
    found: dict[str, dict[str, list[list[float]]]] = {}
    for row in rows:
        if row["section"] == "pools" and row["variant"] in shown:
            title = f"{row['agents']} agents, pool W/{row['pool']:g}, drive {row['drive_gb_per_s']:g} GB/s"
            found.setdefault(title, {}).setdefault(row["variant"], []).append(row["ttft_quantiles_s"])
    return {
        title: [
            {"variant": variant, "ttft_quantiles_s": [median(at) for at in zip(*seeds, strict=True)]}
            for variant, seeds in variants.items()
        ]
        for title, variants in found.items()
    }


def _inside(row: dict[str, Any]) -> list[str]:
    """The cells that only a simulation can fill."""
    if row["prefill_saved_s"] is None:
        return [""] * 6
    return [
        f"{row['prefill_saved_s'] / 3600:,.1f}",
        f"{row['bytes_read'] / 1e12:,.2f}",
        f"{row['bytes_written'] / 1e12:,.2f}",
        f"{row['drive_writes_per_day']:.2f}",
        f"{row['engine_busy']:.0%}",
        f"{row['sessions_restorable_peak']:,} of {row['sessions_alive_peak']:,}",
    ]


def _service(found: Sequence[Result], pictures: Path) -> list[str]:
    result = next((one for one in reversed(found) if one["settings"]["sessions"]), found[-1])
    settings = result["settings"]
    rows = [row for row in result["rows"] if "part" not in row]
    at_once = []
    for part in ("load", "crowd"):
        of_part = ([row for row in one["rows"] if row.get("part") == part] for one in reversed(found))
        at_once += next(filter(None, of_part), [])
    sessions = ", ".join(f"{count:,} sessions of {int(length):,}" for length, count in settings["sessions"].items())
    lines = [
        f"{sessions} entries, all in one database. Milliseconds, p50 / p99, by the length of a session's history; at",
        "the server until the answer was complete, at the client including the round trip. The peers are libraries",
        f"in the client's process. The engine is {settings['engine']}.",
        "",
        _provenance(result),
        "",
    ]
    for database, systems in settings["durability"].items():
        for system, durability in systems.items():
            lines.append(
                f"- {database}, {system}: {', '.join(f'{name} {value}' for name, value in durability.items())}"
            )
    lines += [f"- not measured: {name}: {reason}" for name, reason in settings["left_out"].items()]
    for database, concurrency in dict.fromkeys((row["database"], row["concurrency"]) for row in rows):
        shown = [row for row in rows if (row["database"], row["concurrency"]) == (database, concurrency)]
        lengths = sorted({row["history"] for row in shown})
        table = []
        for case in dict.fromkeys((row["system"], row["operation"], row["side"]) for row in shown):
            of = {row["history"]: row for row in shown if (row["system"], row["operation"], row["side"]) == case}
            figures = (of.get(length) for length in lengths)
            table.append(
                [*case, *("" if row is None else f"{row['p50_ms']:,.2f} / {row['p99_ms']:,.2f}" for row in figures)]
            )
        header = ["system", "operation", "at the", *(f"{length:,}" for length in lengths)]
        lines += ["", f"### {database}, {concurrency} at once", "", *_table(header, table, left=3)]
    return lines + _at_once(at_once)


def _at_once(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How much a service serves at once: rows of `agentstate.benchmarks.crowds`."""
    lines = []
    loads = [
        [
            row["database"],
            str(row["workers"]),
            str(row["agents"]),
            f"{row['per_s']:,.0f}",
            f"{row['p50_ms']:.1f} / {row['p99_ms']:.1f}",
            f"{row['cpu_ms']:.2f}",
            _maybe(row.get("cpu_ratio"), "{:.2f}"),
            _maybe(row.get("speed_ratio"), "{:.2f}"),
        ]
        for row in rows
        if row["part"] == "load"
    ]
    if loads:
        header = ["database", "workers", "at once", "requests/s", "p50 / p99, ms", "CPU, ms", "CPU ÷ 1", "speed ÷ 1"]
        lines += ["", "### Load", "", *_table(header, loads)]
    crowds = [
        [
            row["database"],
            f"{row['sessions']:,}",
            f"{row['seconds'] / 60:g}",
            f"{row['offered_per_s']:,.0f}",
            f"{row['per_s']:,.0f}",
            f"{_maybe(row['p50_ms'], '{:.1f}')} / {_maybe(row['p99_ms'], '{:.1f}')}",
            str(row["errors"]),
            " → ".join(f"{mb:.0f}" for mb in row["memory_mb"]),
        ]
        for row in rows
        if row["part"] == "crowd"
    ]
    if crowds:
        header = ["database", "sessions", "minutes", "offered/s", "served/s", "p50 / p99, ms", "errors", "MB"]
        lines += ["", "### Sessions that wait and have turns as agents do", "", *_table(header, crowds)]
    return lines


def _projection(found: Sequence[Result], pictures: Path) -> list[str]:
    result = found[-1]
    table = [
        [
            row["model"],
            f"{row['tokens']:,}",
            f"{row['recomputed_s']:.1f}",
            f"{row['restored_s']:.3f}",
            f"{row['memory_hit_s']:.3f}",
            f"{row['ratio']:.0f}×",
            _maybe(row["published_recomputed_s"], "{:g}"),
            _maybe(row["published_restored_s"], "{:g}"),
        ]
        for row in result["rows"]
    ]
    header = ["model", "context", "recomputed, s", "restored, s", "memory hit, s", "ratio"]
    lines = [
        "Computed, not measured (`agentstate bench project`). The last two columns are the published figures.",
        "",
        *_table([*header, "published recomputed, s", "published restored, s"], table),
        "",
        "Assumptions:",
        "",
    ]
    return lines + [f"- {sentence}" for sentence in result["settings"]["assumptions"]]


def _burst(found: Sequence[Result], pictures: Path) -> list[str]:
    lines = [
        "All sessions send a request at once after their KV was evicted from the device. The bound is the time to read",
        "all their bytes at the drive's own rate, and then to run all their forwards, each as a memory hit by itself.",
        "The ratio is the last session's time to first token over the bound, with its 95 % interval.",
    ]
    for result in _newest(found, "models"):
        table = [
            [
                row["model"],
                f"{row['sessions']} × {row['tokens']:,}",
                f"{row['last_ttft_s']:.3f}",
                f"{row['bound_s']:.3f}",
                f"{row['ratio']:.3f}",
                interval(row["ratio_95"]),
                f"{row['memory_hit_last_ttft_s']:.3f}",
                f"{row['device_gb_per_s']:.2f}",
            ]
            for row in result["rows"]
        ]
        header = [
            "model",
            "sessions × tokens",
            "last TTFT, s",
            "bound, s",
            "ratio",
            "95 %",
            "all as hits, s",
            "drive, GB/s",
        ]
        lines += ["", _provenance(result), "", *_table(header, table, left=2)]
    return lines


def _throughput(found: Sequence[Result], pictures: Path) -> list[str]:
    lines = [
        "Output tokens per second under loads of new text, whose pages are all spilled: against the same engine with",
        "spilling off, and against SGLang without AgentState, with 95 % intervals.",
    ]
    for result in _newest(found, "models"):
        table = [
            [
                row["model"],
                row["load"],
                f"{row['requests']} × ({row['prompt_tokens']} + {row['output_tokens']})",
                *(f"{row[f'{variant}_tokens_per_s']:.1f}" for variant in ("spilling", "off", "plain")),
                f"{row['ratio_to_off']:.3f}",
                interval(row["ratio_to_off_95"]),
                f"{row['ratio_to_plain']:.3f}",
                interval(row["ratio_to_plain_95"]),
            ]
            for row in result["rows"]
        ]
        header = ["model", "load", "requests × (prompt + answer)", "spilling, tok/s", "off", "SGLang"]
        header += ["÷ off", "95 %", "÷ SGLang", "95 %"]
        lines += ["", _provenance(result), "", *_table(header, table, left=3)]
    return lines


def _soak(found: Sequence[Result], pictures: Path) -> list[str]:
    lines = ["Every greedy token of agents that are suspended and resumed, against those of agents that never were."]
    for result in found[-1:]:
        for row in result["rows"]:
            points = ", ".join(f"{count} {name}" for name, count in row["points"].items())
            mode = f"{row['mode']}: " if "mode" in row else ""
            lines += [
                "",
                _provenance(result),
                "",
                f"{mode}{sum(row['points'].values())} turns ({points}), {row['restored_tokens']:,} tokens restored: "
                f"{len(row['different'])} answers differ.",
            ]
    return lines


def _pages(found: Sequence[Result], pictures: Path) -> list[str]:
    lines = [
        "The store against the drive's own direct reads and writes, and against the fastest alternative, in one run",
        "and cold ([how](pages.md#how-fast-it-is)).",
    ]
    for result in found[-1:]:
        reads, writes = [], []
        for row in result["rows"]:
            case = [row["case"], row["geometry"], f"{row['tokens']:,}"]
            best = row["best_alternative"]
            reads.append(
                [
                    *case,
                    f"{row['read_gb_s']:.2f}",
                    f"{row['read_share_of_device']:.0%}",
                    f"{row['cpu_s_per_gb']:.2f}",
                    best or "",
                    _maybe(row["ratio_to_best_alternative"], "{:.2f}"),
                    _maybe(row["best_alternative_cpu_s_per_gb"], "{:.2f}"),
                ]
            )
            writes.append(
                [
                    *case,
                    f"{row['write_gb_s']:.2f}",
                    f"{row['write_share_of_device']:.0%}",
                    f"{row['write_cpu_s_per_gb']:.2f}",
                ]
            )
        header = ["case", "geometry", "tokens", "GB/s", "of the drive", "CPU s/GB"]
        lines += ["", _provenance(result), "", "Restores:", ""]
        lines += _table([*header, "best alternative", "times as fast", "its CPU s/GB"], reads, left=2)
        lines += ["", "Durable writes:", "", *_table(header, writes, left=2)]
    return lines


_SECTIONS: dict[str, Callable[[Sequence[Result], Path], list[str]]] = {
    "ttft": _ttft,
    "burst": _burst,
    "throughput": _throughput,
    "soak": _soak,
    "pages": _pages,
    "foresight": _foresight,
    "replay": _replay,
    "service": _service,
    "projection": _projection,
}


def _newest(found: Sequence[Result], setting: str) -> list[Result]:
    """The newest result of each value of a setting."""
    return list({str(result["settings"][setting]): result for result in found}.values())


def _kind(result: Result) -> str:
    variants = {row["variant"] for row in result["rows"]}
    if "measured" in variants:
        return "An engine and its simulation" if "simulated" in variants else "An engine"
    return "A simulated fleet"


def _provenance(result: Result) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    parts = [f"{machine['cores']} cores of {machine['cpu']}", f"{machine['memory_gib']} GiB", *_accelerators(machine)]
    return f"*{result['measured_at'][:10]}, commit {result['commit']}, {', '.join(parts)}; {versions}.*"


def _accelerators(machine: dict[str, Any]) -> list[str]:
    return [str(machine[part]) for part in ("gpu", "drive") if machine.get(part)]


def _picture(pictures: Path, name: str, text: str) -> list[str]:
    base = f"{pictures.name}/{name}"
    return [
        "<picture>",
        f'  <source media="(prefers-color-scheme: dark)" srcset="{base}-dark.svg">',
        f'  <img alt="{text}" src="{base}-light.svg">',
        "</picture>",
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    aligned = ["---"] * left + ["---:"] * (len(header) - left)
    return [f"| {' | '.join(cells)} |" for cells in (header, aligned, *rows)]


def _timed(rows: Sequence[dict[str, Any]], model: str) -> dict[tuple[int, str], dict[str, Any]]:
    """The measured ``rows`` of a model, by length and variant."""
    measured = (row for row in rows if row["model"] == model and row.get("ttft_s") is not None)
    return {(row["tokens"], row["variant"]): row for row in measured}


def _samples(row: dict[str, Any]) -> int:
    return len(row.get("ttft_all_s") or ())


def _maybe(value: float | None, shown: str) -> str:
    return "" if value is None else shown.format(value)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _quoted(directory: Path) -> str:
    """The directory as the reader would give it: never with what is above the checkout."""
    return shlex.quote(directory.name if directory.is_absolute() else str(directory))
