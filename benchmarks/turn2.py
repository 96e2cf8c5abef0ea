"""What `agentstate bench ttft` and `soak` run: the stack, the model, progress, tables and raw results."""

from __future__ import annotations

import asyncio
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from agentstate import launcher
from agentstate.errors import EngineError, SettingsError
from agentstate.local import LocalStack, free_port
from agentstate.settings import Settings
from benchmarks import results
from benchmarks.models import GEOMETRIES
from benchmarks.soak import Soak
from benchmarks.ttft import VARIANTS, Turn2, paired_ratio

console = Console()
SMOLLM2 = "smollm2-135m-instruct"


def ttft(
    settings: Settings, model: str, lengths: Sequence[int], rounds: int, recomputes: int, report: Path | None
) -> None:
    """Print and keep the times to the first token of turn 2, a row a variant and length."""
    # Chunks as long as a prompt: nothing of a restore waits for a second batch.
    arguments = ["--max-total-tokens", str(max(32_768, 3 * max(lengths))), "--context-length", str(max(lengths) + 256)]
    arguments += ["--skip-tokenizer-init"] if model in GEOMETRIES else []
    steps = len(lengths) * (rounds * len(VARIANTS) + recomputes)
    with _running(settings, model, arguments) as stack, _bar(steps) as bar:
        turn2 = Turn2(stack, model, *bar)
        rows = asyncio.run(turn2.run(lengths, rounds, recomputes))
        rows += asyncio.run(turn2.first_after_restart(max(lengths)))
    _print_ttft(rows)
    if report is not None:
        results.write(report, results.record("ttft", {"model": model, "rounds": rounds}, rows))
        console.print(f"raw result written to {report}")


def soak(settings: Settings, turns: int, restarts: int, seed: int, report: Path | None) -> None:
    """Run conversations twice and compare every token. Raises EngineError when one differs."""
    with _running(settings, SMOLLM2, ("--chunked-prefill-size", "512")) as stack, _bar(2 * turns) as (say, step):
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


@contextmanager
def _running(settings: Settings, model: str, arguments: Sequence[str]) -> Iterator[LocalStack]:
    checkpoint = _checkpoint(settings, model)
    with tempfile.TemporaryDirectory(dir=settings.cache_dir, prefix="bench-") as home:
        stack = LocalStack(
            Path(home),
            checkpoint,
            engine_python=settings.engine_python,
            service_port=free_port(),
            engine_port=free_port(),
        )
        with closing(stack):
            with Progress(SpinnerColumn(), TextColumn("starting the engine"), TimeElapsedColumn()) as progress:
                progress.add_task("", total=None)
                stack.start_service()
                stack.start_engine(*arguments)
            yield stack


def _checkpoint(settings: Settings, model: str) -> Path:
    checkpoint = settings.cache_dir / model
    if (checkpoint / "config.json").exists():
        return checkpoint
    python = launcher.engine_python(settings)
    if model == SMOLLM2:
        command = [python, "-m", "engine_patch.cpu.smollm2", str(checkpoint)]
    elif model in GEOMETRIES:
        command = [python, "-m", "benchmarks.models", model, str(checkpoint)]
    else:
        raise SettingsError(f"there is no model {model}: choose {', '.join([SMOLLM2, *GEOMETRIES])}")
    console.print(f"preparing {model} (once)")
    if subprocess.run(command, check=False).returncode:
        raise EngineError("the model could not be prepared; the lines above say why")
    return checkpoint


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


@contextmanager
def _bar(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """What names the step that is being done, and what says that one is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        yield lambda text: progress.update(task, description=text), lambda: progress.advance(task)
