"""What foresight is worth on a real engine: twelve agents whose KV is four times the device's pool, under each policy.

The agents call tools whose times are drawn from published ones, and come back when those have ended. The drive is
slowed down until a restore of a context takes about four forwards, since at its own speed a CPU's forwards hide it.
Engines with nothing but LRU, with what needs no prediction (requests with much to read are deferred, those with little
go first, pages that leave the device stay in host memory), and with that and announcements of how long each tool takes,
serve the same agents in turn, beside one whose pool holds everything. Every answer must be the same.
"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from agentstate.benchmarks import results
from agentstate.benchmarks.engine import Answer, Engine
from agentstate.benchmarks.replay import VOCABULARY, unseen
from agentstate.benchmarks.slow_drive import Drive
from agentstate.benchmarks.stacks import running, steps
from agentstate.benchmarks.study import quantile
from agentstate.benchmarks.terminal import console
from agentstate.benchmarks.traces import TOOL_S
from agentstate.benchmarks.ttft import interval, paired_ratio
from agentstate.cli.local import LocalStack
from agentstate.errors import EngineError
from agentstate.fleet.control import ControlClient
from agentstate.lookahead.forecast import Forecast
from agentstate.settings import Settings

# An announcement is wrong by a log-normal factor.
_SIGMA = 0.2


class Variant(StrEnum):
    """What an engine does."""

    FULL = "pool for all"
    LRU = "LRU"
    SIMPLE = "simple"
    SIGNALS = "signals"


@dataclass(frozen=True)
class Plan:
    """``agents`` take ``turns`` each, of ``context`` tokens at first and ``append`` more each turn, with answers of
    ``output`` tokens. A tool takes ``longest_s`` at most. The pool holds ``share`` of all contexts."""

    agents: int = 12
    turns: int = 9
    context: int = 640
    append: int = 16
    output: int = 4
    longest_s: float = 60.0
    share: float = 0.25

    @property
    def longest(self) -> int:
        """Tokens of the longest context."""
        return self.context + self.turns * (self.append + self.output)

    @property
    def working_set(self) -> int:
        return self.agents * (self.context + self.turns * (self.append + self.output) // 2)


@dataclass(frozen=True, slots=True)
class _Step:
    gap_s: float
    announced_s: float
    append: tuple[int, ...]


class Agents:
    """The agents of a round: equal numbers, equal agents; other numbers, other contexts."""

    def __init__(self, plan: Plan, number: int):
        source = random.Random(number)
        self.plan = plan
        self._contexts = [source.choices(VOCABULARY, k=plan.context) for _ in range(plan.agents)]
        self._steps = [[self._step(source) for _ in range(plan.turns)] for _ in range(plan.agents)]

    def _step(self, source: random.Random) -> _Step:
        gap_s = min(self.plan.longest_s, TOOL_S.sample(source))
        announced_s = gap_s * math.exp(_SIGMA * source.gauss(0, 1))
        return _Step(gap_s, announced_s, tuple(source.choices(VOCABULARY, k=self.plan.append)))

    async def play(self, stack: LocalStack, *, announce: bool) -> list[list[Answer]]:
        """Every answer, an agent a list. If they ``announce``, the engine is told how long each tool takes."""
        control = stack.control() if announce else None
        # A pool for all computes all contexts together, and a smaller one a few at a time: that is not compared.
        computed = asyncio.Barrier(self.plan.agents)
        async with Engine(stack.engine_url) as engine:
            return list(
                await asyncio.gather(
                    *(self._agent(stack, engine, control, computed, number) for number in range(self.plan.agents))
                )
            )

    async def _agent(
        self, stack: LocalStack, engine: Engine, control: ControlClient | None, computed: asyncio.Barrier, number: int
    ) -> list[Answer]:
        turn = await asyncio.to_thread(stack.begin_turn)
        tokens, answers = list(self._contexts[number]), []
        for turn_number, step in enumerate(self._steps[number]):
            tokens += step.append
            answer = await engine.ask(tokens, self.plan.output, turn.engine_session)
            tokens += answer.tokens
            answers.append(answer)
            if not turn_number:
                await computed.wait()
            ended_s = time.perf_counter()
            if control is not None:
                packed = Forecast.exactly(step.announced_s, _SIGMA).pack()
                await asyncio.to_thread(
                    control.call, "foresee", 10, session=turn.session.uid, forecast=packed, waited_ms=0, kind="tool"
                )
            await asyncio.sleep(max(0.0, step.gap_s - (time.perf_counter() - ended_s)))
        return answers


class Comparison:
    """Measures ``stacks`` with the drive that they have in common. ``say`` is told what is being done; ``step`` is
    called after every run."""

    def __init__(
        self,
        stacks: Mapping[Variant, LocalStack],
        drive: Drive,
        plan: Plan,
        say: Callable[[str], None],
        step: Callable[[], None],
    ):
        self._stacks = stacks
        self._drive = drive
        self._plan = plan
        self._say = say
        self._step = step

    async def run(self, rounds: int, forwards: float) -> dict[str, Any]:
        """Every time to a first token but the agents' first, by variant and round. The drive is slowed down until a
        restore takes so many ``forwards``; 0 leaves it as it is. Raises EngineError if an answer differs."""
        for stack in self._stacks.values():
            stack.freeze_engine()
        speed = 0.0
        found: dict[Variant, list[dict[str, Any]]] = {variant: [] for variant in self._stacks}
        try:
            if forwards:
                speed = await self._slow_down(forwards)
            for number in range(rounds):
                agents, answers = Agents(self._plan, number), {}
                # Forth and back, so that a machine that slows down more and more favours none.
                for variant in list(self._stacks)[:: 1 if number % 2 else -1]:
                    self._say(f"round {number + 1}: {variant}")
                    answers[variant], served = await self._round(variant, agents)
                    found[variant].append(_figures(answers[variant]) | served)
                    self._step()
                _compare(answers)
        finally:
            self._drive.answer()
            for stack in self._stacks.values():
                stack.thaw_engine()
        return {"drive_bytes_per_s": speed, "rounds": {variant.value: rows for variant, rows in found.items()}}

    async def _round(self, variant: Variant, agents: Agents) -> tuple[list[list[Answer]], dict[str, Any]]:
        stack = self._stacks[variant]
        stack.thaw_engine()
        try:
            stack.flush_device()
            before = stack.stat()["served"]
            answers = await agents.play(stack, announce=variant is Variant.SIGNALS)
            stack.settle()
            return answers, _served(before, stack.stat()["served"])
        finally:
            stack.freeze_engine()

    async def _slow_down(self, forwards: float) -> float:
        """Set the speed at which a context of average length is read in the time of so many forwards that hit it."""
        self._say("measuring a forward")
        stack = self._stacks[Variant.FULL]
        stack.thaw_engine()
        try:
            context = unseen(self._plan.context)
            async with Engine(stack.engine_url) as engine:
                await engine.ask(context, 1)
                hits = [(await engine.ask(context + unseen(self._plan.append), 1)).ttft_s for _ in range(9)]
                stack.settle()
                stack.flush_device()
                before = stack.stat()["restore"]["bytes_read"]
                await engine.ask(context + unseen(self._plan.append), 1)
            n_bytes = stack.stat()["restore"]["bytes_read"] - before
        finally:
            stack.freeze_engine()
        speed = n_bytes / (forwards * statistics.median(hits))
        # Reads alone: what is written is written at the drive's own speed.
        self._drive.set(speed, "extents")
        return speed


def _figures(answers: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    later = [answer for agent in answers for answer in agent[1:]]
    ttfts = sorted(answer.ttft_s for answer in later)
    return {
        "requests": len(later),
        "ttft_s": [round(ttft, 4) for ttft in ttfts],
        "device_tokens": sum(answer.device_tokens for answer in later),
        "restored_tokens": sum(answer.restored_tokens for answer in later),
    }


def _served(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Where the tokens of a round's prompts came from, and the seconds that its requests waited for each cause: of the
    agents' first turns too. The arguments are the engine's counters."""
    tiers: dict[str, int] = {}
    for gap, by_tier in after["hits"].items():
        for tier, of_tier in by_tier.items():
            tiers[tier] = tiers.get(tier, 0) + of_tier["tokens"] - before["hits"][gap][tier]["tokens"]
    waited = {
        cause: round(of["seconds"] - before["penalty"][cause]["seconds"], 3) for cause, of in after["penalty"].items()
    }
    return {"tokens_from": tiers, "waited_s": waited}


def _compare(answers: Mapping[Variant, Sequence[Sequence[Answer]]]) -> None:
    first, *others = answers.items()
    for variant, of_variant in others:
        for number, (expected, found) in enumerate(zip(first[1], of_variant, strict=True)):
            for turn, (one, other) in enumerate(zip(expected, found, strict=True)):
                if one.tokens != other.tokens:
                    raise EngineError(f"agent {number} got other tokens in turn {turn} from {variant} than {first[0]}")


def policies(settings: Settings, model: str, rounds: int, forwards: float, plan: Plan, report: Path | None) -> None:
    """Print and keep the times to the first token under each policy."""
    with ExitStack() as started:
        drive = Drive(Path(started.enter_context(tempfile.TemporaryDirectory())))
        stacks = {}
        for variant, (share, environment) in _engines(plan, settings.queue_aging_s).items():
            pool = int(share * plan.working_set) + plan.longest
            # In bfloat16 a token in another batch may round to another answer.
            arguments = ["--dtype", "float32", "--max-total-tokens", str(pool), "--skip-tokenizer-init"]
            stack = started.enter_context(running(settings, model, arguments, **environment, **drive.environment))
            stack.freeze_engine()
            stacks[variant] = stack
        for stack in stacks.values():
            stack.thaw_engine()
        say, step = started.enter_context(steps(rounds * len(stacks)))
        found = asyncio.run(Comparison(stacks, drive, plan, say, step).run(rounds, forwards))
    rows = _rows(found["rounds"])
    _print(rows)
    if report is not None:
        asked = {"model": model, "rounds": rounds, "forwards": forwards, "plan": vars(plan)}
        asked |= {"drive_bytes_per_s": found["drive_bytes_per_s"], "queue_aging_s": settings.queue_aging_s}
        results.write(report, results.record("policies", asked, rows))
        console.print(f"raw result written to {report}")


def _engines(plan: Plan, aging_s: float) -> dict[Variant, tuple[float, dict[str, str]]]:
    """The pool, as a share of all contexts, and the environment of each variant's engine. Requests that have waited for
    ``aging_s`` go first, where there is an order."""
    off = ("PRELOAD_BYTES", "QUEUE_AGING_S", "HOST_BYTES", "FORESIGHT")
    plain = _settings(STAGING_BYTES="128MiB", **dict.fromkeys(off, "0"))
    simple = plain | _settings(PRELOAD_BYTES="1MiB", QUEUE_AGING_S=str(aging_s), HOST_BYTES="256MiB")
    return {
        Variant.FULL: (1.2, plain),
        Variant.LRU: (plan.share, plain),
        Variant.SIMPLE: (plan.share, simple),
        Variant.SIGNALS: (plan.share, simple | _settings(FORESIGHT="1")),
    }


def _settings(**values: str) -> dict[str, str]:
    return {f"AGENTSTATE_{name}": value for name, value in values.items()}


def _rows(rounds: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    rows = []
    for variant, of_variant in rounds.items():
        row: dict[str, Any] = {"variant": variant, "requests": sum(one["requests"] for one in of_variant)}
        ttfts = sorted(ttft for one in of_variant for ttft in one["ttft_s"])
        for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
            row[f"ttft_{name}_s"] = round(quantile(ttfts, share), 4)
            own = [quantile(one["ttft_s"], share) for one in of_variant]
            for other in (Variant.LRU, Variant.FULL):
                theirs = [quantile(one["ttft_s"], share) for one in rounds[other]]
                ratio, low, high = paired_ratio(own, theirs)
                row[f"{name}_to_{other.name.lower()}"] = [round(value, 4) for value in (ratio, low, high)]
        cached = sum(one["device_tokens"] for one in of_variant)
        for name in ("tokens_from", "waited_s"):
            if all(name in one for one in of_variant):
                row[name] = {key: round(sum(one[name][key] for one in of_variant), 3) for key in of_variant[0][name]}
        row["device_share"] = round(cached / (cached + sum(one["restored_tokens"] for one in of_variant)), 4)
        rows.append(row)
    return rows


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    names = ["p50, s", "p90", "p99", "p90 ÷ LRU", "95 %", "÷ pool for all", "95 %", "on the device"]
    names += ["waited for reads, s", "for memory"]
    table = Table("policy", *(Column(name, justify="right") for name in names))
    for row in rows:
        (lru, *lru_95), (full, *full_95) = row["p90_to_lru"], row["p90_to_full"]
        table.add_row(
            row["variant"],
            *(f"{row[f'ttft_{name}_s']:.3f}" for name in ("p50", "p90", "p99")),
            f"{lru:.3f}",
            interval(lru_95),
            f"{full:.3f}",
            interval(full_95),
            f"{row['device_share']:.0%}",
            *(f"{row['waited_s'][cause]:.0f}" for cause in ("reads", "memory")),
        )
    console.print(table)
