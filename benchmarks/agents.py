"""A fixed number of agents on one engine, each with one conversation after another: what `benchmarks/foresight.py`
replays. At the start every agent is amid a conversation, and its context is on the drive."""

from __future__ import annotations

import json
import lzma
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

from agentstate.benchmarks.traces import (
    APPEND_TOKENS,
    DATA,
    HUMAN_S,
    HUMAN_SHARE,
    LENGTH_SIGMA,
    OUTPUT_TOKENS,
    ROOT,
    TOOL_S,
    TOOL_STEPS,
    Gap,
    Turn,
    Workload,
)

APPS, APP_TOKENS, OWN_TOKENS = 2, 12_000, 6_000
CONTEXT_LIMIT, SUMMARY_TOKENS = 90_000, 8_000
MAX_GAP_S = 1800.0
CONTEXT_MOST, SYSTEM_TOKENS = 200_000, 12_000  # of recorded conversations
_STARTING_S = 240.0
_SERVICE_S = 2.0  # what a turn takes at the least, to know how many are needed
_TOOLS = 24
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Drift:
    """From ``at_s`` of the workload's clock on, tools take ``factor`` times as long. The clock is that of an agent that
    never waits for the engine."""

    at_s: float
    factor: float


def tools(predictable: float, seed: int = 7) -> list[tuple[str, str, float, float]]:
    """Tools as (tool, head of its command, how often it is called, where its median lies on the normal scale of all
    calls' durations). ``predictable`` is the share of the variance that the tool explains, on that scale: 0.63 gives
    the 0.72 bits a call that names and heads were found to tell of real ones; the distribution of all is the published
    one whatever it is."""
    source = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(_TOOLS)]
    source.shuffle(weights)
    total, below, found = sum(weights), 0.0, []
    for rank, weight in enumerate(weights):
        z = _NORMAL.inv_cdf((below + weight / 2) / total)
        below += weight
        shell = rank % 3 != 0
        name = ("shell", f"command-{rank}") if shell else (f"tool-{rank}", "")
        found.append((*name, weight, math.sqrt(predictable) * z))
    return found


def generated(
    agents: int,
    horizon_s: float,
    seed: int,
    *,
    predictable: float = 0.63,
    drift: Drift | None = None,
    wave_s: float = 0.0,
) -> Workload:
    """Coding agents by the published distributions, with tools of their own durations. Each has turns for
    ``horizon_s``. With ``wave_s`` a wait ends when a wave comes that is so long after the one before, as where all wait
    for one resource. Equal arguments give equal workloads."""
    workload = Workload(f"{agents} generated agents, seed {seed}")
    known = tools(predictable)
    spread = math.sqrt(1 - predictable)
    shared = random.Random(f"apps {seed}")
    apps = [workload.add(ROOT, _length(shared, APP_TOKENS, 0.25)) for _ in range(APPS)]
    for agent in range(agents):
        source = random.Random(f"{seed} {agent}")
        start_s = clock_s = source.uniform(0, _STARTING_S)
        turns: list[Turn] = []
        while clock_s < horizon_s:
            app = source.choice(apps)
            steps = round(TOOL_STEPS.sample(source))
            prompt = workload.add(app, _length(source, OWN_TOKENS, 0.25))
            if not turns:
                prompt = workload.add(prompt, round(source.uniform(0, CONTEXT_LIMIT - 20_000)))
                workload.stored.append(prompt)
                steps = max(steps, 10)
                prompt = workload.add(prompt, _length(source, APPEND_TOKENS, LENGTH_SIGMA))
            for step in range(steps):
                gap, gap_s, tool, head = Gap.FIRST, 0.0, "", ""
                if turns:
                    human = step == 0 or source.random() < HUMAN_SHARE
                    gap = Gap.PERSON if human else Gap.TOOL
                    if human:
                        gap_s = HUMAN_S.sample(source)
                    else:
                        tool, head, _, z = source.choices(known, [t[2] for t in known])[0]
                        share = _NORMAL.cdf(z + spread * source.gauss(0, 1))
                        gap_s = TOOL_S.at(min(max(share, 1e-9), 1 - 1e-9))
                        if drift is not None and clock_s >= drift.at_s:
                            gap_s *= drift.factor
                    if wave_s:
                        gap_s = max(gap_s, wave_s - (clock_s + gap_s) % wave_s)
                    gap_s = min(MAX_GAP_S, gap_s)
                if turns and step:
                    before = turns[-1].answer
                    if workload.end(before) > CONTEXT_LIMIT:
                        before = workload.add(app, SUMMARY_TOKENS)
                    prompt = workload.add(before, _length(source, APPEND_TOKENS, LENGTH_SIGMA))
                answer = workload.add(prompt, _length(source, OUTPUT_TOKENS, LENGTH_SIGMA))
                turns.append(Turn(gap, gap_s, start_s, prompt, answer, tool, head, fresh=bool(turns) and step == 0))
                clock_s += gap_s + _SERVICE_S
                if clock_s >= horizon_s:
                    break
        workload.sessions.append(turns)
    workload.stored = [*apps, *_paths(workload, workload.stored)]
    return workload


def weka(agents: int, horizon_s: float, seed: int) -> Workload:
    """The recorded conversations of coding agents (`data/README.md`), dealt to the agents at random, each begun
    anywhere. What of a prompt was cached is taken for what it shares with the prompt before; the trace names no tools.
    """
    recorded = _recordings()
    workload = Workload(f"{agents} recorded agents, seed {seed}")
    system = workload.add(ROOT, SYSTEM_TOKENS)
    for agent in range(agents):
        source = random.Random(f"{seed} {agent}")
        start_s = clock_s = source.uniform(0, _STARTING_S)
        turns: list[Turn] = []
        while clock_s < horizon_s:
            rows = source.choice(recorded)
            first = source.randrange(len(rows) // 2) if not turns else 0
            for number, row in enumerate(rows[first:]):
                turn = _recorded(workload, system, turns, number, row, start_s)
                if turn is None:
                    continue
                turns.append(turn)
                clock_s += turn.gap_s + _SERVICE_S
                if clock_s >= horizon_s:
                    break
        workload.sessions.append(turns)
    workload.stored = [system, *_paths(workload, workload.stored)]
    return workload


def paces() -> list[list[tuple[float, float]]]:
    """For each recorded conversation its turns: the seconds that it waited for the turn, and that the model took."""
    return [[(_gap_s(number, row), float(row[5] or 0.0)) for number, row in enumerate(rows)] for rows in _recordings()]


def _recordings() -> list[list[Any]]:
    with (DATA / "weka_conversations.json.xz").open("rb") as packed, lzma.open(packed, "rt") as text:
        everything = [[row for row in c["rows"] if row[0] != "sub"] for c in json.load(text)]
    return [rows for rows in everything if len(rows) >= 5 and max(row[2] for row in rows) < CONTEXT_MOST]


def _gap_s(number: int, row: list[Any]) -> float:
    """The wait before a turn. Before a conversation's first one a person has thought of it."""
    return min(MAX_GAP_S, max(row[6] or 0.0, 60.0 if number == 0 else 0.0))


def _recorded(
    workload: Workload, system: int, turns: list[Turn], number: int, row: list[Any], start_s: float
) -> Turn | None:
    who, _, input_tokens, output_tokens, prefix_tokens, *_ = row
    gap = Gap.PERSON if who == "human" or (turns and number == 0) else Gap.TOOL
    gap_s = _gap_s(number, row)
    base = system
    if number and turns and prefix_tokens >= workload.ends[turns[-1].prompt] // 2:
        base = turns[-1].answer if workload.end(turns[-1].answer) < input_tokens else turns[-1].prompt
    if workload.end(base) >= input_tokens:
        base = system
    if workload.end(base) >= input_tokens:
        return None
    prompt = base
    if not turns and input_tokens - 500 > workload.end(base):
        prompt = workload.add(base, input_tokens - 500 - workload.end(base))
        workload.stored.append(prompt)
    prompt = workload.add(prompt, input_tokens - workload.end(prompt))
    answer = workload.add(prompt, max(1, output_tokens))
    if not turns:
        gap, gap_s = Gap.FIRST, 0.0
    return Turn(gap, gap_s, start_s, prompt, answer, "tool" if gap is Gap.TOOL else "", "", bool(turns) and number == 0)


def _paths(workload: Workload, segments: list[int]) -> Iterator[int]:
    """The segments, each after those before it that are not on another's path."""
    seen = {parent for parent in range(len(workload.parents)) if workload.parents[parent] == ROOT}
    for segment in segments:
        for part in workload.path(segment):
            if part not in seen:
                seen.add(part)
                yield part


def _length(source: random.Random, median: float, sigma: float) -> int:
    return min(40_000, max(1, round(median * math.exp(sigma * source.gauss(0, 1)))))


Make = Callable[[int, float, int], Workload]
"""A workload of so many agents, for so many seconds, of a seed."""


def telling(make: Make, **announcements: Any) -> Make:
    """The same workload with agents that announce otherwise."""

    def made(agents: int, horizon_s: float, seed: int) -> Workload:
        workload = make(agents, horizon_s, seed)
        return replace(workload, announced=replace(workload.announced, **announcements))

    return made
