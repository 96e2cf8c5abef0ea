"""Many agents resume at once: how long the last of them waits, beside what the drive and the model need for all.

The bound is the fastest possible without overlapping: the bytes of all sessions at the drive's own rate, and then the
forwards of all of them, each as a memory hit by itself. Reading and computing overlap, so a restore may well be below
it.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from agentstate.benchmarks import device, results
from agentstate.benchmarks.engine import Answer, Engine
from agentstate.benchmarks.models import GEOMETRIES
from agentstate.benchmarks.replay import unseen
from agentstate.benchmarks.stacks import extents_of, running, steps
from agentstate.benchmarks.terminal import console
from agentstate.benchmarks.ttft import TAIL, interval, paired_ratio
from agentstate.cli.local import LocalStack
from agentstate.errors import EngineError
from agentstate.settings import Settings

_OUTPUT = 4


class Burst:
    """Measures one stack with ``sessions`` of so many ``tokens``. ``say`` is told what is being done; ``step`` is
    called after every context and every round."""

    def __init__(
        self,
        stack: LocalStack,
        sessions: int,
        tokens: int,
        say: Callable[[str], None],
        step: Callable[[], None],
    ):
        self._stack = stack
        self._contexts = [unseen(tokens) for _ in range(sessions)]
        self._sessions = [stack.begin_turn().engine_session for _ in range(sessions)]
        self._say = say
        self._step = step

    async def run(self, rounds: int) -> dict[str, Any]:
        """Medians and ratios over the rounds. Each round asks all sessions at once after their KV has left the device,
        all at once while it is there, and one after the other. Raises EngineError for what was not restored."""
        async with Engine(self._stack.engine_url) as engine:
            self._say("computing the contexts")
            for context, session in zip(self._contexts, self._sessions, strict=True):
                await engine.ask(context, 1, session)
                self._step()
            self._say("resuming all of them at once")
            measured = []
            for _ in range(rounds):
                measured.append(await self._round(engine))
                self._step()
        restored, hit, alone, limit, n_bytes = ([figure[i] for figure in measured] for i in range(5))
        bound = [read / rate + sum(own) for read, rate, own in zip(n_bytes, limit, alone, strict=True)]
        ratio, low, high = paired_ratio(restored, bound)
        return {
            "tokens": len(self._contexts[0]),
            "sessions": len(self._contexts),
            "last_ttft_s": round(statistics.median(restored), 4),
            "last_ttft_all_s": [round(seconds, 4) for seconds in restored],
            "bound_s": round(statistics.median(bound), 4),
            "bound_all_s": [round(seconds, 4) for seconds in bound],
            "ratio": round(ratio, 4),
            "ratio_95": [round(low, 4), round(high, 4)],
            "memory_hit_last_ttft_s": round(statistics.median(hit), 4),
            "memory_hits_one_by_one_s": round(statistics.median(sum(own) for own in alone), 4),
            "bytes_read": int(statistics.median(n_bytes)),
            "device_gb_per_s": round(statistics.median(limit) / 1e9, 3),
        }

    async def _round(self, engine: Engine) -> tuple[float, float, list[float], float, int]:
        self._stack.settle()
        self._stack.flush_device()
        limit = device.read_limit(extents_of(self._stack), repeats=1)
        tails = [unseen(TAIL) for _ in self._contexts]
        before = self._stack.stat()["restore"]["bytes_read"]
        restored = await self._all(engine, tails)
        n_bytes = self._stack.stat()["restore"]["bytes_read"] - before
        if any(answer.device_tokens for answer in restored) or not all(answer.restored_tokens for answer in restored):
            raise EngineError(f"restored were {[answer.restored_tokens for answer in restored]} tokens")
        hit = await self._all(engine, tails)
        if any(answer.restored_tokens for answer in hit):
            raise EngineError("the device is too small for all sessions at once")
        alone = [(await self._ask(engine, session, unseen(TAIL))).ttft_s for session in range(len(self._contexts))]
        return max(a.ttft_s for a in restored), max(a.ttft_s for a in hit), alone, limit, n_bytes

    async def _all(self, engine: Engine, tails: Sequence[list[int]]) -> list[Answer]:
        return await asyncio.gather(*(self._ask(engine, session, tail) for session, tail in enumerate(tails)))

    async def _ask(self, engine: Engine, session: int, tail: list[int]) -> Answer:
        return await engine.ask(self._contexts[session] + tail, _OUTPUT, self._sessions[session])


def burst(
    settings: Settings, models: Sequence[str], sessions: int, tokens: int, rounds: int, report: Path | None
) -> None:
    """Print and keep the wait of the last of several sessions that are resumed at once, a row a model."""
    rows = []
    for model in models:
        arguments = ["--max-total-tokens", str((sessions + 1) * (tokens + 256)), "--context-length", str(tokens + 256)]
        arguments += ["--skip-tokenizer-init"] if model in GEOMETRIES else []
        with running(settings, model, arguments) as stack, steps(sessions + rounds) as bar:
            rows.append({"model": model, **asyncio.run(Burst(stack, sessions, tokens, *bar).run(rounds))})
    numbers = ["last TTFT, s", "bound, s", "ratio", "95 %", "all as memory hits, s", "MB read", "drive, GB/s"]
    table = Table("model", "sessions", *(Column(name, justify="right") for name in numbers))
    for row in rows:
        table.add_row(
            row["model"],
            f"{row['sessions']} × {row['tokens']:,} tokens",
            f"{row['last_ttft_s']:.3f}",
            f"{row['bound_s']:.3f}",
            f"{row['ratio']:.3f}",
            interval(row["ratio_95"]),
            f"{row['memory_hit_last_ttft_s']:.3f}",
            f"{row['bytes_read'] / 1e6:,.0f}",
            f"{row['device_gb_per_s']:.2f}",
        )
    console.print(table)
    if report is not None:
        results.write(report, results.record("burst", {"models": list(models), "rounds": rounds}, rows))
        console.print(f"raw result written to {report}")
