"""What `agentstate bench ttft` and `soak` run: progress, tables and raw results."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from agentstate.benchmarks import results
from agentstate.benchmarks.models import GEOMETRIES
from agentstate.benchmarks.peers.comparison import PeerTurns, compare
from agentstate.benchmarks.peers.servers import SERVERS, LMCache
from agentstate.benchmarks.soak import MODES, Soak
from agentstate.benchmarks.stacks import checkpoint_of, running, steps
from agentstate.benchmarks.terminal import console
from agentstate.benchmarks.ttft import HITS_AFTER_RESTART, VARIANTS, Prompts, Turn2, compared, floor_of
from agentstate.cli import launcher
from agentstate.errors import EngineError, SettingsError
from agentstate.settings import Settings

PEERS = {server.name.replace("_", "-"): server for server in SERVERS}
"""The peers by their names on the command line."""
_FIRST_AND_HITS = 1 + HITS_AFTER_RESTART


def ttft(
    settings: Settings,
    model: str,
    lengths: Sequence[int],
    *,
    rounds: int,
    recomputes: int,
    restarts: int,
    report: Path | None,
) -> None:
    """Print and keep the times to the first token of turn 2, a row a variant and length. The longest context is
    restored after ``restarts`` of the engine too. The rows measured so far are kept after every length and restart."""
    asked = {"model": model, "rounds": rounds, "restarts": restarts}
    total = len(lengths) * (rounds * len(VARIANTS) + min(rounds, recomputes)) + restarts * _FIRST_AND_HITS
    with running(settings, model, _arguments(model, lengths)) as stack, steps(total) as (say, step):
        turns = [Turn2(stack, model, Prompts.of(length), step, recomputes) for length in lengths]

        def rows() -> list[dict[str, Any]]:
            return [row for turn in turns for row in turn.rows()]

        asyncio.run(_measure(turns, rounds, restarts, lambda: _keep_ttft(settings, asked, rows(), report), say))
    _print_ttft(rows())
    _say_where(report)


def ttft_with_peers(
    settings: Settings,
    model: str,
    lengths: Sequence[int],
    names: Sequence[str],
    lmcache_python: Path,
    *,
    visits: int,
    rounds: int,
    recomputes: int,
    report: Path | None,
) -> None:
    """Like `ttft`, with other ways to keep KV beside it: every engine is started ``visits`` times, in turn, with
    ``rounds`` of every variant each time. Raises SettingsError for a name that is none of `PEERS`."""
    if unknown := [name for name in names if name not in PEERS]:
        raise SettingsError(f"there is no peer {unknown[0]}: choose {', '.join(PEERS)}")
    chosen = [PEERS[name] for name in names]
    a_visit = rounds * len(VARIANTS) + sum(rounds * (3 if peer.stores else 0) + 1 for peer in chosen)
    total = len(lengths) * (visits * a_visit + (visits - 1) * _FIRST_AND_HITS + min(visits * rounds, recomputes))
    arguments = _arguments(model, lengths)
    rows, flags = [], {}
    with running(settings, model, arguments, start=False) as stack, steps(total) as (say, step):
        for length in lengths:
            prompts = Prompts.of(length)
            ours = Turn2(stack, model, prompts, step, recomputes)
            servers = []
            for kind in chosen:
                python = lmcache_python if kind is LMCache else Path(launcher.engine_python(settings))
                home = stack.home / f"{kind.name}-{length}"
                servers.append(kind(home, checkpoint_of(settings, model), python, arguments))
            peers = [PeerTurns(server, model, prompts, step) for server in servers]
            rows += asyncio.run(compare([ours, *peers], visits, rounds, say))
            for peer in peers:
                if peer.trouble:
                    console.print(f"{peer.name}: {peer.trouble}", highlight=False, markup=False)
            flags |= {server.name: server.options for server in servers}
            for server in servers:
                server.delete()
    _print_ttft(rows)
    asked = {"model": model, "visits": visits, "rounds": rounds, "peers": flags}
    _keep_ttft(settings, asked, rows, report, lmcache_python)
    _say_where(report)


def soak(settings: Settings, modes: Sequence[str], turns: int, restarts: int, seed: int, report: Path | None) -> None:
    """Run conversations twice, ``turns`` of them and ``restarts`` shared out among the ``modes``, and compare every
    token. Raises SettingsError for a mode that is none of `soak.MODES` or has no turn, and EngineError if a token
    differs."""
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise SettingsError(f"there is no mode {unknown[0]}: choose {', '.join(MODES)}")
    if turns < len(modes):
        raise SettingsError(f"{turns} turns are too few for {len(modes)} modes")
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(modes):
        mode = MODES[name]
        of_turns, of_restarts = (_share(count, len(modes), number) for count in (turns, restarts))
        arguments = mode.arguments(settings)
        with running(settings, mode.model, arguments) as stack, steps(2 * of_turns) as (say, step):
            say(f"{name}: never suspended, and suspended before every turn")
            soaking = Soak(
                stack, mode, turns=of_turns, restarts=of_restarts, seed=seed, longest=mode.longest, step=step
            )
            found = asyncio.run(soaking.run())
        happened = ", ".join(f"{count} × {event}" for event, count in found.points.most_common())
        total = sum(found.points.values())
        console.print(f"{name}: {total} turns ({happened}); {found.restored_tokens:,} tokens restored")
        rows.append(
            {
                "mode": name,
                "points": dict(found.points),
                "restored_tokens": found.restored_tokens,
                "different": found.different,
            }
        )
        if report is not None:
            asked = {"modes": list(modes), "turns": turns, "restarts": restarts, "seed": seed}
            results.write(report, results.record("soak", asked, rows, [Path(launcher.engine_python(settings))]))
    different = [{"mode": row["mode"], **one} for row in rows for one in row["different"]]
    if different:
        raise EngineError(f"{len(different)} turns differ, the first: {different[0]}")
    console.print("every token is that of the agent that was never suspended")


def _share(count: int, parts: int, number: int) -> int:
    """How many of ``count`` things the part with this number gets."""
    return count // parts + (number < count % parts)


async def _measure(
    turns: Sequence[Turn2], rounds: int, restarts: int, keep: Callable[[], object], say: Callable[[str], None]
) -> None:
    """Measure all contexts on one running engine, and the longest one after restarts of it."""
    for turn in turns:
        say(f"{turn.tokens:,} tokens")
        await turn.ingest()
        for number in range(rounds):
            await turn.round(number)
        keep()
    longest = max(turns, key=lambda turn: turn.tokens)
    for number in range(restarts):
        say("starting the engine again")
        longest.stop()
        longest.start()
        await longest.first_after_restart(number)
        keep()


def _arguments(model: str, lengths: Sequence[int]) -> list[str]:
    """SGLang's arguments, whoever keeps its KV."""
    # Room for a context, what is recomputed beside it, and what other ways to keep KV need on top.
    room = 3 * max(lengths) + 8192
    arguments = ["--max-total-tokens", str(room), "--context-length", str(max(lengths) + 256)]
    arguments += ["--enable-metrics"]  # answers then tell when their request had arrived
    return arguments + (["--skip-tokenizer-init"] if model in GEOMETRIES else [])


def _keep_ttft(
    settings: Settings, asked: dict[str, Any], rows: list[dict[str, Any]], report: Path | None, *pythons: Path
) -> None:
    if report is not None:
        measured = [Path(launcher.engine_python(settings)), *pythons]
        results.write(report, results.record("ttft", asked, rows, measured))


def _say_where(report: Path | None) -> None:
    if report is not None:
        console.print(f"raw result written to {report}")


def _print_ttft(rows: list[dict[str, Any]]) -> None:
    names = [
        "TTFT, s",
        "before the match, ms",
        "÷ memory hit",
        "95 %",
        "recomputed ÷",
        "95 %",
        "tok/s",
        "MB read",
        "of the drive",
        "overlap",
        "same",
    ]
    widest = max(len(row["variant"]) for row in rows)
    first = Column("context", justify="right"), Column("variant", min_width=widest)
    table = Table(*first, *(Column(name, justify="right") for name in names))
    reasons = []
    for row in rows:
        if row["ttft_s"] is None:
            table.add_row(f"{row['tokens']:,}", row["variant"], "–", *[""] * 9, _same(row))
            reasons.append(f"{row['variant']}: {row['reason']}")
            continue
        table.add_row(
            f"{row['tokens']:,}",
            row["variant"],
            f"{row['ttft_s']:.3f}",
            f"{row['before_match_s'] * 1e3:.1f}" if row["before_match_s"] is not None else "",
            *compared(row, _of(rows, row, floor_of(row["variant"])), 3),
            *compared(_of(rows, row, "recompute"), row, 1, "×"),
            f"{row['tokens_per_s']:.1f}",
            f"{row['bytes_read'] / 1e6:.0f}" if row["bytes_read"] else "",
            f"{row['device_share']:.0%}" if row["device_share"] else "",
            f"{row['overlap']:.2f}" if "overlap" in row else "",
            _same(row),
        )
    console.print(table)
    for reason in reasons:
        console.print(f"not counted: {reason}", highlight=False)


def _same(row: dict[str, Any]) -> str:
    return {True: "yes", False: "NO", None: ""}[row["identical"]]


def _of(rows: list[dict[str, Any]], row: dict[str, Any], variant: str) -> dict[str, Any] | None:
    return next((r for r in rows if (r["tokens"], r["variant"]) == (row["tokens"], variant)), None)
