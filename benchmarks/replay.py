"""An agent workload against a running engine, and how near the simulator comes to it."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Callable
from typing import Any

from agentstate.benchmarks.engine import Engine
from agentstate.benchmarks.fleet import Outcome, Served
from agentstate.benchmarks.study import quantile
from agentstate.benchmarks.traces import Turn, Workload

VOCABULARY = range(1000, 40_000)
"""Token ids that are ordinary words in every model of today."""


def unseen(count: int) -> list[int]:
    """Token ids that no other prompt shares a page with."""
    return random.Random(uuid.uuid4().hex).choices(VOCABULARY, k=count)


async def replay(
    workload: Workload,
    engine_url: str,
    *,
    fresh: bool = True,
    progress: Callable[[int], None] = lambda served: None,
) -> Outcome:
    """Send a workload to an engine, each session when its clock says, and each turn when its answer and gap have
    passed. Returns what was served.

    Prompts share tokens exactly where the workload's contexts share segments. An answer's tokens are the engine's own,
    so that later prompts hold what the engine has cached. With ``fresh``, no run finds pages of another. Only the
    fields of `Served` that a client can see are measured: ``prefill_s`` and ``saved_s`` are 0, and what is not from
    the device counts as from the drive.

    Raises EngineUnreachable or EngineRefused at the first request that fails; the others are abandoned.
    """
    run = uuid.uuid4().hex if fresh else "replay"
    tokens = _Tokens(workload, run)
    outcome = Outcome()
    async with Engine(engine_url) as engine:
        started_s = time.perf_counter()

        async def play(number: int, turns: list[Turn]) -> None:
            for index, turn in enumerate(turns):
                elapsed_s = time.perf_counter() - started_s
                # The gap counts from the answer before it, which has just come.
                await asyncio.sleep(max(turn.gap_s if index else 0.0, turn.not_before_s - elapsed_s))
                arrived_s = time.perf_counter() - started_s
                prompt = tokens.prompt(turn.prompt)
                answer = await engine.ask(prompt, workload.output_tokens(turn), f"{run}-{number}")
                tokens.answered(turn.answer, answer.tokens)
                outcome.served.append(
                    Served(
                        session=number,
                        turn=index,
                        gap=turn.gap,
                        arrived_s=arrived_s,
                        ttft_s=answer.ttft_s,
                        input_tokens=len(prompt),
                        output_tokens=len(answer.tokens),
                        device_tokens=answer.device_tokens,
                        host_tokens=0,
                        nvme_tokens=answer.restored_tokens,
                        prefill_s=0.0,
                        saved_s=0.0,
                    )
                )
                progress(len(outcome.served))

        async with _first_failure(), asyncio.TaskGroup() as group:
            for number, turns in enumerate(workload.sessions):
                group.create_task(play(number, turns))
        outcome.duration_s = time.perf_counter() - started_s
    return outcome


class _first_failure:
    """Raise the first error of a task group by itself."""

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, BaseExceptionGroup):
            raise error.exceptions[0]


class _Tokens:
    """The token ids of a workload's segments: random ones for what goes in, the engine's own for its answers."""

    def __init__(self, workload: Workload, seed: str):
        self._workload, self._seed = workload, seed
        self._answers: dict[int, tuple[int, ...]] = {}

    def prompt(self, segment: int) -> list[int]:
        tokens: list[int] = []
        for part in self._workload.path(segment):
            answer = self._answers.get(part)
            if answer is not None:
                tokens.extend(answer)
            else:
                source = random.Random(f"{self._seed}-{part}")
                count = self._workload.ends[part] - self._workload.end(self._workload.parents[part])
                tokens.extend(source.choices(VOCABULARY, k=count))
        return tokens

    def answered(self, segment: int, tokens: tuple[int, ...]) -> None:
        self._answers[segment] = tokens


def validation(simulated: Outcome, measured: Outcome) -> dict[str, Any]:
    """How near a simulation came to the engine, as simulated ÷ measured: hit tokens, and TTFT at p50 and p90."""
    ours, theirs = _figures(simulated), _figures(measured)
    return {
        name: {
            "simulated": ours[name],
            "measured": theirs[name],
            "ratio": round(ours[name] / theirs[name], 4) if theirs[name] else None,
        }
        for name in ours
    }


def _figures(outcome: Outcome) -> dict[str, float]:
    ttfts = sorted(request.ttft_s for request in outcome.served)
    return {
        "hit_tokens": sum(request.cached_tokens for request in outcome.served),
        "ttft_p50_s": round(quantile(ttfts, 0.5), 4),
        "ttft_p90_s": round(quantile(ttfts, 0.9), 4),
    }
