"""What `agentstate bench ttft` and `soak` run: progress, tables and raw results."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from agentstate.errors import EngineError
from agentstate.settings import Settings
from benchmarks import results
from benchmarks.models import GEOMETRIES
from benchmarks.soak import Soak
from benchmarks.stacks import SMOLLM2, console, running, steps
from benchmarks.ttft import VARIANTS, Turn2, paired_ratio


def ttft(
    settings: Settings, model: str, lengths: Sequence[int], rounds: int, recomputes: int, report: Path | None
) -> None:
    """Print and keep the times to the first token of turn 2, a row a variant and length."""
    # Chunks as long as a prompt: nothing of a restore waits for a second batch.
    arguments = ["--max-total-tokens", str(max(32_768, 3 * max(lengths))), "--context-length", str(max(lengths) + 256)]
    arguments += ["--skip-tokenizer-init"] if model in GEOMETRIES else []
    requests = len(lengths) * (rounds * len(VARIANTS) + recomputes)
    with running(settings, model, arguments) as stack, steps(requests) as bar:
        turn2 = Turn2(stack, model, *bar)
        rows = asyncio.run(turn2.run(lengths, rounds, recomputes))
        rows += asyncio.run(turn2.first_after_restart(max(lengths)))
    _print_ttft(rows)
    if report is not None:
        results.write(report, results.record("ttft", {"model": model, "rounds": rounds}, rows))
        console.print(f"raw result written to {report}")


def soak(settings: Settings, turns: int, restarts: int, seed: int, report: Path | None) -> None:
    """Run conversations twice and compare every token. Raises EngineError when one differs."""
    with running(settings, SMOLLM2, ("--chunked-prefill-size", "512")) as stack, steps(2 * turns) as (say, step):
        say("conversations that are never suspended, and the same ones suspended before every turn")
        outcome = asyncio.run(Soak(stack, turns=turns, restarts=restarts, seed=seed, longest=3000, step=step).run())
    happened = ", ".join(f"{count} × {event}" for event, count in outcome.points.most_common())
    console.print(f"{sum(outcome.points.values())} turns ({happened}); {outcome.restored_tokens:,} tokens restored")
    row = {"points": dict(outcome.points), "restored_tokens": outcome.restored_tokens, "different": outcome.different}
    if report is not None:
        results.write(report, results.record("soak", {"turns": turns, "restarts": restarts, "seed": seed}, [row]))
    if outcome.different:
        raise EngineError(f"{len(outcome.different)} turns differ, the first: {outcome.different[0]}")
    console.print("every token is that of the agent that was never suspended")


def _print_ttft(rows: list[dict[str, Any]]) -> None:
    names = ["TTFT, s", "÷ memory hit", "95 %", "recomputed ÷", "tok/s", "MB read", "of the drive", "overlap", "same"]
    table = Table(Column("context", justify="right"), "variant", *(Column(name, justify="right") for name in names))
    for row in rows:
        floor = _of(rows, row, "memory_hit_after_restart" if "restart" in row["variant"] else "memory_hit")
        recomputed = _of(rows, row, "recompute")
        ratio, interval = "", ""
        if floor is not None and len(floor["ttft_all_s"]) == len(row["ttft_all_s"]):
            middle, low, high = paired_ratio(row["ttft_all_s"], floor["ttft_all_s"])
            ratio, interval = f"{middle:.3f}", f"{low:.3f}–{high:.3f}"
        elif floor is not None:
            ratio = f"{row['ttft_s'] / floor['ttft_s']:.3f}"
        table.add_row(
            f"{row['tokens']:,}",
            row["variant"],
            f"{row['ttft_s']:.3f}",
            ratio,
            interval,
            f"{recomputed['ttft_s'] / row['ttft_s']:.1f}×" if recomputed is not None else "",
            f"{row['tokens_per_s']:.1f}",
            f"{row['bytes_read'] / 1e6:.0f}" if row["bytes_read"] else "",
            f"{row['device_share']:.0%}" if row["device_share"] else "",
            f"{row['overlap']:.2f}" if "overlap" in row else "",
            "yes" if row["identical"] else "NO",
        )
    console.print(table)


def _of(rows: list[dict[str, Any]], row: dict[str, Any], variant: str) -> dict[str, Any] | None:
    return next((r for r in rows if (r["tokens"], r["variant"]) == (row["tokens"], variant)), None)
