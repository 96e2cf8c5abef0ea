"""Turn 2: the time to the first token of a context that is on the device, has to be restored, or is computed again.

One engine, one context a length, all variants in turn within a round, so that what disturbs one disturbs all. Every
request is the context and a tail of its own that is shorter than a page, so nothing of it is ever found.
"""

from __future__ import annotations

import random
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentstate.client import Client
from agentstate.errors import EngineError
from agentstate.local import LocalStack
from benchmarks import device
from benchmarks.engine import Answer, Engine
from benchmarks.replay import VOCABULARY

TAIL = 24
OUTPUT = 33  # the first comes from the prefill: 32 are decoded
_WAIT_MS = 120_000
VARIANTS = ("memory_hit", "restore_cold", "restore_host_prefetch", "restore_device_prefetch", "api_resume")


@dataclass
class Samples:
    """What was measured of one variant: seconds to the first token, and the rate of those that follow. ``bytes_read``
    and ``restore_s`` are the engine's own count of a restore."""

    ttft_s: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    bytes_read: list[int] = field(default_factory=list)
    restore_s: list[float] = field(default_factory=list)
    identical: bool = True


class Turn2:
    """Measures one stack. ``say`` is told what is being done; ``step`` is called after every request."""

    def __init__(self, stack: LocalStack, model: str, say: Callable[[str], None], step: Callable[[], None]):
        self._stack = stack
        self._model = model
        self._say = say
        self._step = step

    async def run(self, lengths: Sequence[int], rounds: int, recomputes: int) -> list[dict[str, Any]]:
        """A row a variant and length: medians of ``rounds``, and of ``recomputes`` for what is computed anew."""
        rows = []
        async with Engine(self._stack.engine_url) as engine:
            await engine.ask(_tokens(64), 2)
            for length in lengths:
                rows += await self._length(engine, length, rounds, recomputes)
        return rows

    async def first_after_restart(self, length: int) -> list[dict[str, Any]]:
        """The first request of an engine that has just been started again, against a hit right after it."""
        session = f"ses_restart_{uuid.uuid4().hex[:8]}"
        context = _tokens(length)
        async with Engine(self._stack.engine_url) as engine:
            await engine.ask(context, 1, session)
        self._flushed(session)
        self._say("starting the engine again")
        self._stack.kill_engine()
        self._stack.start_engine(*self._stack.engine_arguments)
        async with Engine(self._stack.engine_url) as engine:
            first, hits = Samples(), Samples()
            await self._measure(engine, "restore_cold", context, session, first, _tokens(TAIL))
            for _ in range(5):
                await self._measure(engine, "memory_hit", context, session, hits, _tokens(TAIL))
        row = self._row(length, "restore_first_after_restart", first, None)
        return [row, self._row(length, "memory_hit_after_restart", hits, None)]

    async def _length(self, engine: Engine, length: int, rounds: int, recomputes: int) -> list[dict[str, Any]]:
        self._say(f"{length:,} tokens")
        context = _tokens(length)
        samples = {variant: Samples() for variant in ("recompute", *VARIANTS)}
        with Client(self._stack.service_url) as client:
            name = client.create_session(self._stack.model).id
            resumed = client.resume(name)
            # What engines know the session by.
            session = resumed.engine.extra_body["session_id"] if resumed.engine is not None else name
            client.suspend(name, resumed.lease, durable_timeout_ms=0)
            await engine.ask(context, 1, session)
            self._flushed(session)
            limit = device.read_limit(self._extents(), threads=2)
            for _ in range(rounds):
                tail, answers = _tokens(TAIL), []
                for variant in VARIANTS:
                    await self._prepare(engine, variant, context, session)
                    measured = samples[variant]
                    if variant == "api_resume":
                        answers.append(await self._resumed(engine, client, name, context, session, measured, tail))
                    else:
                        answers.append(await self._measure(engine, variant, context, session, measured, tail))
                    measured.identical &= answers[-1].tokens == answers[0].tokens
                    self._step()
            for _ in range(recomputes):
                tail = _tokens(TAIL)
                hit = await engine.ask(context + tail, OUTPUT, session)
                # A salt of its own: nothing of it is stored or on the device, and its tokens are the same.
                fresh = await engine.ask(context + tail, OUTPUT, None, cache_salt=uuid.uuid4().hex)
                self._add(samples["recompute"], fresh)
                samples["recompute"].identical &= fresh.tokens == hit.tokens
                self._step()
        floor = statistics.median(samples["memory_hit"].ttft_s)
        return [self._row(length, variant, found, limit, floor) for variant, found in samples.items() if found.ttft_s]

    async def _prepare(self, engine: Engine, variant: str, context: list[int], session: str) -> None:
        if variant == "memory_hit":
            await engine.ask(context + _tokens(TAIL), OUTPUT, session)
            return
        self._flushed(session)
        self._stack.flush_device()
        if variant.endswith("_prefetch"):
            tier = variant.split("_")[1]
            answer = self._stack.control().call("prefetch", 130, session=session, tier=tier, timeout_ms=_WAIT_MS)
            if (answer["state"], answer["tier"]) != ("warm", tier):
                raise EngineError(f"the prefetch to {tier} memory ended as {answer}")

    async def _measure(
        self, engine: Engine, variant: str, context: list[int], session: str, samples: Samples, tail: list[int]
    ) -> Answer:
        before = self._stack.stat()["restore"]
        answer = await engine.ask(context + tail, OUTPUT, session)
        after = self._stack.stat()["restore"]
        self._add(samples, answer)
        restored = answer.restored_tokens > 0
        if restored is not (variant in ("restore_cold", "restore_host_prefetch", "api_resume")):
            raise EngineError(f"{variant}: {answer.restored_tokens} tokens were restored, {answer.device_tokens} hit")
        if restored:
            samples.bytes_read.append(after["bytes_read"] - before["bytes_read"])
            samples.restore_s.append(after["seconds"] - before["seconds"])
        return answer

    async def _resumed(
        self,
        engine: Engine,
        client: Client,
        name: str,
        context: list[int],
        session: str,
        samples: Samples,
        tail: list[int],
    ) -> Answer:
        """From `POST …/resume` to the first token."""
        started_s = time.perf_counter()
        resumed = client.resume(name)
        resume_s = time.perf_counter() - started_s
        answer = await self._measure(engine, "api_resume", context, session, samples, tail)
        samples.ttft_s[-1] += resume_s
        client.suspend(name, resumed.lease, durable_timeout_ms=_WAIT_MS // 2)
        return answer

    @staticmethod
    def _add(samples: Samples, answer: Answer) -> None:
        samples.ttft_s.append(answer.ttft_s)
        samples.tokens_per_s.append((OUTPUT - 1) / (answer.total_s - answer.ttft_s))

    def _row(
        self, length: int, variant: str, samples: Samples, limit: float | None, floor: float | None = None
    ) -> dict[str, Any]:
        row: dict[str, Any] = {
            "model": self._model,
            "tokens": length,
            "variant": variant,
            "ttft_s": round(statistics.median(samples.ttft_s), 5),
            "ttft_all_s": [round(seconds, 5) for seconds in samples.ttft_s],
            "tokens_per_s": round(statistics.median(samples.tokens_per_s), 2),
            "bytes_read": None,
            "device_share": None,
            "identical": samples.identical,
        }
        if samples.bytes_read:
            n_bytes = statistics.median(samples.bytes_read)
            row["bytes_read"] = int(n_bytes)
            if limit is not None and variant == "restore_cold" and floor is not None:
                row["device_share"] = round(n_bytes / statistics.median(samples.restore_s) / limit, 3)
                row["overlap"] = round(row["ttft_s"] / max(floor, n_bytes / limit), 3)
                row["device_gb_per_s"] = round(limit / 1e9, 3)
        return row

    def _flushed(self, session: str) -> None:
        """Wait until everything of a session is durable and nothing is being written or merged."""
        answer = self._stack.control().call("flush", 130, session=session, timeout_ms=_WAIT_MS)
        if answer["state"] != "durable":
            raise EngineError(f"the session's KV is {answer['state']}, not durable")
        self._stack.settle()

    def _extents(self) -> list[Path]:
        return sorted(self._stack.home.glob("pages/*/rank0/extents/*.ext"))


def paired_ratio(over: Sequence[float], under: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """The median of the ratios of pairs, and its 95 % interval by bootstrap."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), medians[50], medians[1949]


def _tokens(count: int) -> list[int]:
    """Token ids that no other prompt shares a page with."""
    return random.Random(uuid.uuid4().hex).choices(VOCABULARY, k=count)
