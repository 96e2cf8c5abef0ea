"""What spilling costs: the output throughput of an engine that stores its pages, and of SGLang as it is.

Two engines, of which one stands still while the other works. Both are sent the same requests, and each of them is
text that neither has seen, so that every page of it has to be computed, and has to be written where pages are stored.
What is left to be written when the last answer is in is written in the time of that engine's next requests.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from agentstate.errors import EngineError
from agentstate.ids import new
from agentstate.local import LocalStack
from agentstate.settings import Settings
from benchmarks import results
from benchmarks.engine import Engine
from benchmarks.replay import unseen
from benchmarks.stacks import SMOLLM2, console, running, steps
from benchmarks.ttft import paired_ratio


@dataclass(frozen=True)
class Load:
    """``requests`` at a time, all at once, of so many tokens each."""

    name: str
    requests: int
    prompt_tokens: int
    output_tokens: int


LOADS = (Load("decode-heavy", 4, 64, 128), Load("prefill-heavy", 2, 896, 16))


class Throughput:
    """Measures two stacks, ``plain`` of which does not store. ``say`` is told what is being done; ``step`` is called
    after every pair of rounds."""

    def __init__(self, storing: LocalStack, plain: LocalStack, say: Callable[[str], None], step: Callable[[], None]):
        self._storing = storing
        self._plain = plain
        self._control = storing.control()
        self._say = say
        self._step = step

    async def run(self, loads: Sequence[Load], rounds: int) -> list[dict[str, Any]]:
        """A row a load. Raises EngineError when not all pages of a load were stored: that would be no comparison."""
        stacks = (self._storing, self._plain)
        for stack in stacks:
            stack.freeze_engine()
        try:
            return [await self._load(load, rounds) for load in loads]
        finally:
            for stack in stacks:
                stack.thaw_engine()

    async def _load(self, load: Load, rounds: int) -> dict[str, Any]:
        self._say(load.name)
        before = self._spilled()
        storing: list[float] = []
        plain: list[float] = []
        # The first pair is not counted: memory is touched for the first time in it.
        for number in range(-1, rounds):
            prompts = [unseen(load.prompt_tokens) for _ in range(load.requests)]
            # Each is the first one every other time: what slows the machine more and more favours neither.
            order = [(self._storing, storing), (self._plain, plain)][:: 1 if number % 2 else -1]
            for stack, rates in order:
                tokens_per_s = await _round(stack, load, prompts)
                if number >= 0:
                    rates.append(tokens_per_s)
            self._step()
        after = self._spilled()
        if after["pages_spilled"] == before["pages_spilled"] or after["pages_skipped"] > before["pages_skipped"]:
            raise EngineError(f"not everything was stored: {before} before the load {load.name}, {after} after it")
        ratio, low, high = paired_ratio(storing, plain)
        return {
            "model": SMOLLM2,
            "load": load.name,
            "requests": load.requests,
            "prompt_tokens": load.prompt_tokens,
            "output_tokens": load.output_tokens,
            "storing_tokens_per_s": round(statistics.median(storing), 2),
            "plain_tokens_per_s": round(statistics.median(plain), 2),
            "storing_all_tokens_per_s": [round(rate, 2) for rate in storing],
            "plain_all_tokens_per_s": [round(rate, 2) for rate in plain],
            "ratio": round(ratio, 4),
            "ratio_95": [round(low, 4), round(high, 4)],
            "bytes_spilled": after["bytes_spilled"] - before["bytes_spilled"],
        }

    def _spilled(self) -> dict[str, int]:
        """The engine's count of what it has written, once nothing waits to be."""
        with _working(self._storing):
            while (spill := self._control.call("stat", 10)["spill"])["waiting"]:
                time.sleep(0.02)
            return dict(spill)


async def _round(stack: LocalStack, load: Load, prompts: list[list[int]]) -> float:
    """Output tokens a second."""
    with _working(stack):
        async with Engine(stack.engine_url) as engine:
            started_s = time.perf_counter()
            await asyncio.gather(*(engine.ask(prompt, load.output_tokens, new("ses")) for prompt in prompts))
            seconds = time.perf_counter() - started_s
    return load.requests * load.output_tokens / seconds


@contextmanager
def _working(stack: LocalStack) -> Iterator[None]:
    stack.thaw_engine()
    try:
        yield
    finally:
        stack.freeze_engine()


def throughput(settings: Settings, rounds: int, report: Path | None) -> None:
    """Print and keep what storing pages leaves of an engine's output throughput, a row a load."""
    arguments = ("--skip-tokenizer-init",)
    with ExitStack() as started:
        storing = started.enter_context(running(settings, SMOLLM2, arguments))
        storing.freeze_engine()
        plain = started.enter_context(running(settings, SMOLLM2, arguments, stores=False))
        storing.thaw_engine()
        bar = started.enter_context(steps(len(LOADS) * (rounds + 1)))
        rows = asyncio.run(Throughput(storing, plain, *bar).run(LOADS, rounds))
    numbers = ["storing, tok/s", "plain", "ratio", "95 %", "MB written"]
    table = Table("load", "requests", *(Column(name, justify="right") for name in numbers))
    for row in rows:
        table.add_row(
            row["load"],
            f"{row['requests']} × ({row['prompt_tokens']} + {row['output_tokens']})",
            f"{row['storing_tokens_per_s']:.1f}",
            f"{row['plain_tokens_per_s']:.1f}",
            f"{row['ratio']:.3f}",
            "–".join(f"{bound:.3f}" for bound in row["ratio_95"]),
            f"{row['bytes_spilled'] / 1e6:,.0f}",
        )
    console.print(table)
    if report is not None:
        results.write(report, results.record("throughput", {"model": SMOLLM2, "rounds": rounds}, rows))
        console.print(f"raw result written to {report}")
