"""What spilling costs: the output throughput of an engine that spills, of the same one that does not, and of SGLang as
it is.

Every request is text that nobody has seen, so every page of it has to be computed, and written if it is spilled. The
measured requests follow others of their kind: what those leave to be written is written in the measured time, and what
the measured ones leave is not, as in an engine that is always busy.

Spilling is turned off and on in one process, since two processes, even of the same program, differ by some percent for
as long as they live. SGLang as it is runs in a process of its own and is subject to that. Engines that are not measured
stand still. With a shared store, what is spilled is published too, in a directory.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from agentstate.benchmarks import results
from agentstate.benchmarks.engine import Engine
from agentstate.benchmarks.replay import unseen
from agentstate.benchmarks.stacks import running, steps
from agentstate.benchmarks.terminal import console
from agentstate.benchmarks.ttft import interval, paired_ratio
from agentstate.cli.local import LocalStack
from agentstate.errors import EngineError
from agentstate.settings import Settings


@dataclass(frozen=True)
class Load:
    """``requests`` at a time, all at once, of so many tokens each."""

    name: str
    requests: int
    prompt_tokens: int
    output_tokens: int


# Both end some tokens after a page does, and so write all that they compute, except those.
LOADS = (Load("decode-heavy", 4, 96, 36), Load("prefill-heavy", 2, 640, 4))


class Variant(StrEnum):
    """What is measured in turn."""

    SPILLING = "spilling"
    OFF = "off"
    PLAIN = "plain"


class Throughput:
    """Measures two stacks, ``plain`` of which does not store. ``say`` is told what is being done; ``step`` is called
    after every round."""

    def __init__(self, storing: LocalStack, plain: LocalStack, say: Callable[[str], None], step: Callable[[], None]):
        self._storing = storing
        self._plain = plain
        self._control = storing.control()
        self._say = say
        self._step = step

    async def run(self, loads: Sequence[Load], rounds: int) -> list[dict[str, Any]]:
        """A row a load. Raises EngineError if not all pages of a load were spilled: that would be no comparison."""
        stacks = (self._storing, self._plain)
        for stack in stacks:
            stack.freeze_engine()
        try:
            return [await self._load(load, rounds) for load in loads]
        finally:
            for stack in stacks:
                stack.thaw_engine()
            self._control.call("spill", 10, on=True)

    async def _load(self, load: Load, rounds: int) -> dict[str, Any]:
        self._say(load.name)
        rates: dict[Variant, list[float]] = {variant: [] for variant in Variant}
        n_bytes = 0
        for number in range(rounds):
            # Forth and back, so that a machine that slows down more and more favours none.
            for variant in list(Variant)[:: 1 if number % 2 else -1]:
                tokens_per_s, spilled_bytes = await self._round(variant, load)
                rates[variant].append(tokens_per_s)
                n_bytes += spilled_bytes
            self._step()
        row: dict[str, Any] = {
            "load": load.name,
            "requests": load.requests,
            "prompt_tokens": load.prompt_tokens,
            "output_tokens": load.output_tokens,
            "bytes_spilled": n_bytes,
        }
        for variant, found in rates.items():
            row[f"{variant}_tokens_per_s"] = round(statistics.median(found), 2)
            row[f"{variant}_all_tokens_per_s"] = [round(rate, 2) for rate in found]
        for variant in (Variant.OFF, Variant.PLAIN):
            ratio, low, high = paired_ratio(rates[Variant.SPILLING], rates[variant])
            row[f"ratio_to_{variant}"] = round(ratio, 4)
            row[f"ratio_to_{variant}_95"] = [round(low, 4), round(high, 4)]
        return row

    async def _round(self, variant: Variant, load: Load) -> tuple[float, int]:
        """Output tokens a second, and how many bytes were spilled."""
        if variant is Variant.PLAIN:
            with _working(self._plain):
                return await _send(self._plain, load, sessions=False), 0
        with _working(self._storing):
            self._control.call("spill", 10, on=variant is Variant.SPILLING)
            before = self._spilled()
            tokens_per_s = await _send(self._storing, load, sessions=variant is Variant.SPILLING)
            after = self._spilled()
        if variant is Variant.OFF:
            return tokens_per_s, 0
        left_out = sum(after[name] - before[name] for name in ("pages_refused", "pages_skipped"))
        if after["pages_spilled"] == before["pages_spilled"] or left_out:
            raise EngineError(f"not everything was spilled: {before} before the load {load.name}, {after} after it")
        return tokens_per_s, after["bytes_spilled"] - before["bytes_spilled"]

    def _spilled(self) -> dict[str, int]:
        """The engine's count of what it has written, once nothing waits to be written."""
        while (stat := self._control.call("stat", 10))["spill"]["waiting"] or _unpublished(stat):
            time.sleep(0.02)
        return dict(stat["spill"])


def _unpublished(stat: dict[str, Any]) -> bool:
    return bool(stat["shared"]["available"] and stat["shared"]["pages"] < stat["store"]["pages"])


async def _send(stack: LocalStack, load: Load, *, sessions: bool) -> float:
    """Output tokens a second, measured in the second of two runs. Only requests of ``sessions`` have manifests."""
    async with Engine(stack.engine_url) as engine:
        for _ in range(2):
            turns = [stack.begin_turn().engine_session if sessions else None for _ in range(load.requests)]
            started_s = time.perf_counter()
            await asyncio.gather(*(engine.ask(unseen(load.prompt_tokens), load.output_tokens, turn) for turn in turns))
        return load.requests * load.output_tokens / (time.perf_counter() - started_s)


@contextmanager
def _working(stack: LocalStack) -> Iterator[None]:
    stack.thaw_engine()
    try:
        yield
    finally:
        stack.freeze_engine()


def throughput(
    settings: Settings, models: Sequence[str], rounds: int, report: Path | None, *, through: bool = False
) -> None:
    """Print and keep how much of an engine's output throughput spilling leaves, a row a model and load; with
    ``through``, publishing what is spilled too."""
    rows = [row for model in models for row in _measured(settings, model, rounds, through)]
    numbers = ["spilling, tok/s", "off", "plain", "÷ off", "95 %", "÷ plain", "95 %", "MB spilled"]
    table = Table("model", "load", "requests", *(Column(name, justify="right") for name in numbers))
    for row in rows:
        table.add_row(
            row["model"],
            row["load"],
            f"{row['requests']} × ({row['prompt_tokens']} + {row['output_tokens']})",
            *(f"{row[f'{variant}_tokens_per_s']:.1f}" for variant in Variant),
            f"{row['ratio_to_off']:.3f}",
            interval(row["ratio_to_off_95"]),
            f"{row['ratio_to_plain']:.3f}",
            interval(row["ratio_to_plain_95"]),
            f"{row['bytes_spilled'] / 1e6:,.0f}",
        )
    console.print(table)
    if report is not None:
        asked = {"models": list(models), "rounds": rounds, "through": through}
        results.write(report, results.record("throughput", asked, rows))
        console.print(f"raw result written to {report}")


def _measured(settings: Settings, model: str, rounds: int, through: bool) -> list[dict[str, Any]]:
    arguments = ("--skip-tokenizer-init",)
    with ExitStack() as started:
        own = {}
        if through:
            share = started.enter_context(tempfile.TemporaryDirectory(dir=settings.cache_dir, prefix="bench-share-"))
            own = {"AGENTSTATE_SHARED_STORE": f"file://{share}", "AGENTSTATE_SHARE": "through"}
        storing = started.enter_context(running(settings, model, arguments, **own))
        storing.freeze_engine()
        plain = started.enter_context(running(settings, model, arguments, stores=False))
        storing.thaw_engine()
        bar = started.enter_context(steps(len(LOADS) * rounds))
        return [{"model": model, **row} for row in asyncio.run(Throughput(storing, plain, *bar).run(LOADS, rounds))]
