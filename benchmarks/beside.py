"""A long restore beside requests that decode: how long they wait between two tokens.

Eight requests decode, and once all of them do, a ninth request with a long prefix arrives. From then on the benchmark
measures the times between two tokens of the eight: without the ninth, with its prefix on the device, and with its
prefix on disk, once on an engine that preloads it beside them and once on an engine that restores layer by layer. The
eight wait for the ninth's own prefill in any case, so the memory hit shows what a restore costs them.

As in the other benchmarks, the variants take turns within a round, and engines that are not measured stand still.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from agentstate.benchmarks import results
from agentstate.benchmarks.engine import Answer, Engine
from agentstate.benchmarks.replay import unseen
from agentstate.benchmarks.stacks import running, steps
from agentstate.benchmarks.terminal import console
from agentstate.benchmarks.ttft import TAIL, interval, paired_ratio
from agentstate.cli.local import LocalStack
from agentstate.errors import EngineError
from agentstate.settings import Settings

_PROMPT = 30  # shorter than a page: nothing of the eight is ever stored or found
_OUTPUT = 4


class Variant(StrEnum):
    """What the ninth request is."""

    NONE = "none"
    HIT = "hit"
    PRELOADED = "preloaded"
    LAYERS = "layers"


class Beside:
    """Measures ``stacks``, by the variants that they are for. ``say`` is told what is being done; ``step`` is called
    after every round.

    The decoding requests produce ``output`` tokens each, and more while the ninth is not there yet, up to ``most``.
    """

    def __init__(
        self,
        stacks: Mapping[Variant, LocalStack],
        tokens: int,
        requests: int,
        output: int,
        say: Callable[[str], None],
        step: Callable[[], None],
        most: int | None = None,
    ):
        self._stacks = stacks
        self._context = unseen(tokens)
        self._requests = requests
        self._output = output
        self._most = output if most is None else most
        self._say = say
        self._step = step

    async def run(self, rounds: int) -> dict[str, Any]:
        """Quantiles of the times between two tokens of the decoding requests, and their ratios over the rounds. Raises
        EngineError if the ninth request was not what its variant says, or was not beside the others."""
        own = list(dict.fromkeys(self._stacks.values()))
        for stack in own:
            stack.freeze_engine()
        try:
            for stack in own:
                self._say("computing the context")
                stack.thaw_engine()
                async with Engine(stack.engine_url) as engine:
                    await engine.ask(self._context, 1)
                stack.settle()
                stack.freeze_engine()
            measured: dict[Variant, list[tuple[list[float], Answer | None]]] = {variant: [] for variant in self._stacks}
            for number in range(rounds):
                self._say(f"round {number + 1}")
                # Forth and back, so that a machine that slows down more and more favours none.
                for variant in list(self._stacks)[:: -1 if number % 2 else 1]:
                    measured[variant].append(await self._measure(variant))
                self._step()
        finally:
            for stack in own:
                stack.thaw_engine()
        return self._row(measured)

    def _row(self, measured: Mapping[Variant, Sequence[tuple[list[float], Answer | None]]]) -> dict[str, Any]:
        row: dict[str, Any] = {
            "tokens": len(self._context),
            "requests": self._requests,
            "output_tokens": self._output,
        }
        p99: dict[Variant, list[float]] = {}
        for variant, found in measured.items():
            p99[variant] = [statistics.quantiles(gaps, n=100)[98] for gaps, _ in found]
            row[f"{variant}_p50_s"] = round(statistics.median(gap for gaps, _ in found for gap in gaps), 4)
            row[f"{variant}_p99_s"] = round(statistics.median(p99[variant]), 4)
            row[f"{variant}_p99_all_s"] = [round(seconds, 4) for seconds in p99[variant]]
            row[f"{variant}_longest_s"] = round(max(gap for gaps, _ in found for gap in gaps), 4)
            ninth = [answer.ttft_s for _, answer in found if answer is not None]
            row[f"{variant}_ninth_ttft_s"] = round(statistics.median(ninth), 4) if ninth else None
        for variant in {Variant.PRELOADED, Variant.LAYERS} & p99.keys():
            for other in (Variant.NONE, Variant.HIT):
                ratio, low, high = paired_ratio(p99[variant], p99[other])
                row[f"{variant}_to_{other}"] = round(ratio, 4)
                row[f"{variant}_to_{other}_95"] = [round(low, 4), round(high, 4)]
        return row

    async def _measure(self, variant: Variant) -> tuple[list[float], Answer | None]:
        """The times between two tokens of the decoding requests, from the ninth's arrival on, and its answer."""
        stack = self._stacks[variant]
        stack.thaw_engine()
        try:
            async with Engine(stack.engine_url) as engine:
                if variant is Variant.HIT:
                    await engine.ask(self._context + unseen(TAIL), 1)
                else:
                    stack.settle()
                    stack.flush_device()
                before = stack.stat()["preload"]["requests"]
                times: list[list[float]] = [[] for _ in range(self._requests)]
                decoding = [
                    asyncio.create_task(engine.ask(unseen(_PROMPT), self._most, times=of_request))
                    for of_request in times
                ]
                while not all(times):
                    await asyncio.sleep(0.005)
                sent_s = asyncio.get_running_loop().time()
                ninth = None
                if variant is not Variant.NONE:
                    ninth = await engine.ask(self._context + unseen(TAIL), _OUTPUT)
                    if any(task.done() for task in decoding):
                        raise EngineError("a decoding request ended before the ninth did: let them generate more")
                await asyncio.gather(*(self._enough(task, seen) for task, seen in zip(decoding, times, strict=True)))
                self._check(variant, ninth, stack.stat()["preload"]["requests"] - before)
        finally:
            stack.freeze_engine()
        gaps = [b - a for seen in times for a, b in zip(seen, seen[1:], strict=False) if b > sent_s]
        return gaps, ninth

    async def _enough(self, decoding: asyncio.Task[Answer], seen: list[float]) -> None:
        """End a decoding request once it has produced what is measured of it."""
        while not decoding.done() and len(seen) < self._output:
            await asyncio.sleep(0.005)
        decoding.cancel()
        with suppress(asyncio.CancelledError):
            await decoding

    def _check(self, variant: Variant, ninth: Answer | None, deferred: int) -> None:
        if ninth is None:
            return
        restored = 0 if variant is Variant.HIT else len(self._context)
        if (ninth.restored_tokens, deferred) != (restored, int(variant is Variant.PRELOADED)):
            raise EngineError(f"{variant}: {ninth.restored_tokens} tokens were restored, {deferred} of it preloaded")


def beside(
    settings: Settings, models: Sequence[str], tokens: int, requests: int, output: int, rounds: int, report: Path | None
) -> None:
    """Print and keep how long decoding requests wait between two tokens beside a long restore, a row a model."""
    rows = []
    for model in models:
        arguments = ["--skip-tokenizer-init", "--context-length", str(max(tokens, output) + 256)]
        arguments += ["--max-total-tokens", str(2 * tokens + 2 * requests * (output + 256))]
        with ExitStack() as started:
            preloads = started.enter_context(
                running(settings, model, arguments, AGENTSTATE_PRELOAD_BYTES="1", AGENTSTATE_BREAK_EVEN="off")
            )
            preloads.freeze_engine()
            layers = started.enter_context(
                running(settings, model, arguments, AGENTSTATE_PRELOAD_BYTES="0", AGENTSTATE_BREAK_EVEN="off")
            )
            stacks = {variant: layers if variant is Variant.LAYERS else preloads for variant in Variant}
            bar = started.enter_context(steps(rounds))
            preloads.thaw_engine()
            rows.append({"model": model, **asyncio.run(Beside(stacks, tokens, requests, output, *bar).run(rounds))})
    numbers = ["p50, ms", "p99, ms", "longest, ms", "÷ none", "95 %", "÷ hit", "95 %", "its TTFT, s"]
    table = Table("model", "the ninth", *(Column(name, justify="right") for name in numbers))
    for row in rows:
        for variant in Variant:
            ttft_s = row[f"{variant}_ninth_ttft_s"]
            cells = [f"{row[f'{variant}_{figure}_s'] * 1e3:,.1f}" for figure in ("p50", "p99", "longest")]
            for other in (Variant.NONE, Variant.HIT):
                ratio = row.get(f"{variant}_to_{other}")
                cells += ["", ""] if ratio is None else [f"{ratio:.2f}", interval(row[f"{variant}_to_{other}_95"], 2)]
            table.add_row(row["model"], variant, *cells, "" if ttft_s is None else f"{ttft_s:.2f}")
    console.print(table)
    if report is not None:
        asked = {"models": list(models), "tokens": tokens, "rounds": rounds}
        results.write(report, results.record("beside", asked, rows))
        console.print(f"raw result written to {report}")
