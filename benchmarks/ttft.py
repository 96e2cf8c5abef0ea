"""Turn 2: the time to the first token of a context that is on the device, has to be restored, or is recomputed.

One engine, one context a length, all variants in turn within a round, so that what disturbs one disturbs all. Every
request is the context and a tail that is shorter than a page, so the tail is never found. Every measured answer has to
continue as the engine did when it had computed the context itself.
"""

from __future__ import annotations

import random
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentstate.answers import Resumed
from agentstate.benchmarks import device
from agentstate.benchmarks.engine import Answer, Engine
from agentstate.benchmarks.replay import unseen
from agentstate.benchmarks.stacks import extents_of
from agentstate.cli.local import LocalStack
from agentstate.client import Client
from agentstate.errors import EngineError

OUTPUT = 33  # the first comes from the prefill: 32 are decoded
HITS_AFTER_RESTART = 5
VARIANTS = ("memory_hit", "restore_cold", "restore_host_prefetch", "restore_device_prefetch", "api_resume")
TAIL = 24
_TAILS = 3
_WAIT_MS = 120_000


@dataclass
class Samples:
    """The measurements of one variant: seconds to the first token, and the rate of those that follow; how many tokens
    of the prompt were restored; ``bytes_read`` and ``restore_s`` of restores, as the engine counts them;
    ``before_match_s``, the part of the time to the first token that no cache can change (`Answer`)."""

    ttft_s: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    restored_tokens: list[int] = field(default_factory=list)
    bytes_read: list[int] = field(default_factory=list)
    restore_s: list[float] = field(default_factory=list)
    before_match_s: list[float] = field(default_factory=list)
    identical: bool = True

    def add(self, answer: Answer, expected: Sequence[int]) -> None:
        """``expected`` are the tokens that it should consist of."""
        self.ttft_s.append(answer.ttft_s)
        self.tokens_per_s.append((OUTPUT - 1) / (answer.total_s - answer.ttft_s))
        self.restored_tokens.append(answer.restored_tokens)
        if answer.before_match_s is not None:
            self.before_match_s.append(answer.before_match_s)
        self.identical &= answer.tokens == tuple(expected)

    def row(self, model: str, tokens: int, variant: str) -> dict[str, Any]:
        """Medians, as a row of the result."""
        return {
            "model": model,
            "tokens": tokens,
            "variant": variant,
            "ttft_s": round(statistics.median(self.ttft_s), 5),
            "ttft_all_s": [round(seconds, 5) for seconds in self.ttft_s],
            "before_match_s": round(statistics.median(self.before_match_s), 5) if self.before_match_s else None,
            "tokens_per_s": round(statistics.median(self.tokens_per_s), 2),
            "restored_tokens": min(self.restored_tokens),
            "bytes_read": int(statistics.median(self.bytes_read)) if self.bytes_read else None,
            "device_share": None,
            "identical": self.identical,
        }


@dataclass(frozen=True)
class Prompts:
    """A context, and the tails, one of which is asked after it at a time."""

    context: list[int]
    tails: list[list[int]]

    @classmethod
    def of(cls, length: int) -> Prompts:
        """Token ids that no other prompt shares a page with."""
        return cls(unseen(length), [unseen(TAIL) for _ in range(_TAILS)])

    def number(self, number: int) -> tuple[list[int], int]:
        """The prompt of a round, and which of the tails ends it."""
        tail = number % len(self.tails)
        return self.context + self.tails[tail], tail

    async def compute(self, engine: Engine, session: str | None = None) -> tuple[Answer, list[Sequence[int]]]:
        """Have the context computed. Returns the answer to that request, and for each tail the tokens that follow it.
        Those are of hits, since a prefill of all the tokens may round differently from one of the tail alone."""
        first = await engine.ask(self.number(0)[0], OUTPUT, session)
        hits = [await engine.ask(self.number(tail)[0], OUTPUT, session) for tail in range(len(self.tails))]
        return first, [hit.tokens for hit in hits]


class Turn2:
    """Measures one context on one stack. The context is recomputed in the first ``recomputes`` rounds; ``step`` is
    called after every request that counts."""

    name = "agentstate"
    visits: int | None = None

    def __init__(self, stack: LocalStack, model: str, prompts: Prompts, step: Callable[[], None], recomputes: int):
        self._stack = stack
        self._model = model
        self._prompts = prompts
        self._step = step
        self._recomputes = recomputes
        self._session_id = ""
        # The session id that its newest turn sends to the engine.
        self._sent = ""
        self._expected: list[Sequence[int]] = []
        self._limit = 0.0
        self._samples = {variant: Samples() for variant in ("recompute", *VARIANTS)}
        self._restarted = {
            variant: Samples() for variant in ("restore_first_after_restart", "memory_hit_after_restart")
        }

    @property
    def tokens(self) -> int:
        """The length of the context."""
        return len(self._prompts.context)

    def start(self) -> None:
        self._stack.start_engine(*self._stack.engine_arguments)

    def stop(self) -> None:
        self._stack.kill_engine()

    async def ingest(self) -> None:
        """Have the context computed and stored: the first turn."""
        with Client(self._stack.service_url) as client:
            self._session_id = client.create_session(self._stack.model).id
            resumed = client.resume(self._session_id)
            self._sent = _sent(resumed)
            client.suspend(self._session_id, resumed.lease, durable_timeout_ms=0)
        async with Engine(self._stack.engine_url) as engine:
            await engine.ask(unseen(64), 2)
            _, self._expected = await self._prompts.compute(engine, self._sent)
        self._flushed()
        self._limit = device.read_limit(extents_of(self._stack))

    async def round(self, number: int) -> None:
        """Every variant once, in turn."""
        async with Engine(self._stack.engine_url) as engine:
            for variant in VARIANTS:
                await self._prepare(engine, variant)
                if variant == "api_resume":
                    await self._resume(engine, number)
                else:
                    await self._measure(engine, variant, number, self._samples[variant])
            if len(self._samples["recompute"].ttft_s) < self._recomputes:
                await self._recompute(engine, number)

    async def first_after_restart(self, number: int, cold: bool = True) -> None:
        """The first request of an engine that has just been restarted, and hits right after it. A restore is always
        cold, since direct reads leave nothing in the page cache."""
        async with Engine(self._stack.engine_url) as engine:
            first, hits = self._restarted.values()
            await self._measure(engine, "restore_cold", number, first)
            for hit in range(HITS_AFTER_RESTART):
                await self._measure(engine, "memory_hit", number + hit, hits)

    def rows(self) -> list[dict[str, Any]]:
        """A row a variant that was measured."""
        found = {variant: samples for variant, samples in self._samples.items() if samples.ttft_s}
        rows = [self._row(variant, samples) for variant, samples in found.items()]
        if (cold := found.get("restore_cold")) is not None:
            row = next(row for row in rows if row["variant"] == "restore_cold")
            floor, n_bytes = statistics.median(found["memory_hit"].ttft_s), row["bytes_read"]
            row["device_share"] = round(n_bytes / statistics.median(cold.restore_s) / self._limit, 3)
            row["overlap"] = round(row["ttft_s"] / max(floor, n_bytes / self._limit), 3)
            row["device_gb_per_s"] = round(self._limit / 1e9, 3)
        return rows + [self._row(variant, samples) for variant, samples in self._restarted.items() if samples.ttft_s]

    async def _recompute(self, engine: Engine, number: int) -> None:
        prompt, tail = self._prompts.number(number)
        # A salt of its own: nothing of it is stored or on the device, and its tokens are the same. It is spilled like
        # any first turn, which must be over before anything else is measured; and it must not leave a device whose
        # free slots are not in one piece, on which the next context would lie in pieces, and be slower to attend to.
        fresh = await engine.ask(prompt, OUTPUT, None, cache_salt=uuid.uuid4().hex)
        if fresh.restored_tokens or fresh.device_tokens:
            raise EngineError(f"recompute: {fresh.restored_tokens + fresh.device_tokens} tokens were not computed")
        self._samples["recompute"].add(fresh, self._expected[tail])
        self._flushed()
        self._stack.flush_device()
        self._step()

    async def _prepare(self, engine: Engine, variant: str) -> None:
        if variant == "memory_hit":
            await engine.ask(self._prompts.context + unseen(TAIL), 2, self._sent)
            return
        self._flushed()
        self._stack.flush_device()
        if variant.endswith("_prefetch"):
            tier = variant.split("_")[1]
            answer = self._stack.control().call(
                "prefetch", 130, session=self._session_id, tier=tier, timeout_ms=_WAIT_MS
            )
            # Only a part of a context larger than staging is there.
            if answer["state"] not in ("warm", "partial") or answer["tier"] != tier:
                raise EngineError(f"the prefetch to {tier} memory ended as {answer}")

    async def _measure(self, engine: Engine, variant: str, number: int, samples: Samples) -> None:
        prompt, tail = self._prompts.number(number)
        before = self._stack.stat()["restore"]
        answer = await engine.ask(prompt, OUTPUT, self._sent)
        after = self._stack.stat()["restore"]
        restored = answer.restored_tokens > 0
        if restored is not (variant in ("restore_cold", "restore_host_prefetch", "api_resume")):
            raise EngineError(f"{variant}: {answer.restored_tokens} tokens were restored, {answer.device_tokens} hit")
        samples.add(answer, self._expected[tail])
        if restored:
            samples.bytes_read.append(after["bytes_read"] - before["bytes_read"])
            samples.restore_s.append(after["seconds"] - before["seconds"])
        self._step()

    async def _resume(self, engine: Engine, number: int) -> None:
        """From `POST …/resume` to the first token."""
        samples = self._samples["api_resume"]
        with Client(self._stack.service_url) as client:
            client.read(self._session_id)  # a connection, as an agent's client has one
            started_s = time.perf_counter()
            resumed = client.resume(self._session_id)
            resume_s = time.perf_counter() - started_s
            self._sent = _sent(resumed)
            await self._measure(engine, "api_resume", number, samples)
            samples.ttft_s[-1] += resume_s
            client.suspend(self._session_id, resumed.lease, durable_timeout_ms=_WAIT_MS // 2)

    def _row(self, variant: str, samples: Samples) -> dict[str, Any]:
        return samples.row(self._model, self.tokens, variant)

    def _flushed(self) -> None:
        """Wait until everything of the session is durable and nothing is being written or merged."""
        answer = self._stack.control().call("flush", 130, session=self._session_id, timeout_ms=_WAIT_MS)
        if answer["state"] != "durable":
            raise EngineError(f"the session's KV is {answer['state']}, not durable")
        self._stack.settle()


def _sent(resumed: Resumed) -> str:
    """The session id that a turn sends to the engine. A peer's engine knows no sessions."""
    return resumed.session.id if resumed.engine is None else resumed.engine.extra_body["session_id"]


def floor_of(variant: str) -> str:
    """The variant that a restore is measured against: the memory hit of the same engine."""
    if variant in ("recompute", *VARIANTS):
        return "memory_hit"
    if variant.endswith("_after_restart"):
        return "memory_hit_after_restart"
    for ending in ("_restart_cold", "_restart", "_recompute", "_memory_hit", "_warm", "_cold", "_flush"):
        if variant.endswith(ending):
            return variant.removesuffix(ending) + "_memory_hit"
    return "memory_hit"


def quotient(row: dict[str, Any], other: dict[str, Any]) -> tuple[float, tuple[float, float] | None]:
    """A row's time to first token over another's. If both were measured in turn (after a restart, the first request and
    the median of the hits that followed it), the quotient of pairs, with the 95 % interval; if not, or of a row over
    itself, that of medians, without an interval."""
    own, under = row["ttft_all_s"], other["ttft_all_s"]
    if (row["variant"], other["variant"]) == ("restore_first_after_restart", "memory_hit_after_restart"):
        groups = range(0, len(under), HITS_AFTER_RESTART)
        under = [statistics.median(under[first : first + HITS_AFTER_RESTART]) for first in groups]
    in_turn = floor_of(row["variant"]) == floor_of(other["variant"]) and len(own) == len(under)
    if row is other or not in_turn:
        return row["ttft_s"] / other["ttft_s"], None
    middle, low, high = paired_ratio(own, under)
    return middle, (low, high) if len(own) > 1 else None


def compared(row: dict[str, Any] | None, other: dict[str, Any] | None, digits: int, unit: str = "") -> tuple[str, str]:
    """The cells of a `quotient`, in ``unit``, and of its interval; empty if one of the two was not measured, or there
    is no interval."""
    if row is None or other is None or row["ttft_s"] is None or other["ttft_s"] is None:
        return "", ""
    middle, bounds = quotient(row, other)
    return f"{middle:.{digits}f}{unit}", interval(bounds or (), digits)


def paired_ratio(over: Sequence[float], under: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """The median of the ratios of pairs, and its 95 % interval by bootstrap."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), medians[50], medians[1949]


def interval(bounds: Sequence[float], digits: int = 3) -> str:
    """The cell of an interval in a table."""
    return "–".join(f"{bound:.{digits}f}" for bound in bounds)
