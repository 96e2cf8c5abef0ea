"""Agent workloads from three sources, as one shape: sessions of turns over a tree of token segments.

Two contexts share a prefix exactly where they share segments, so that a cache can be simulated without tokens, and a
real engine can be sent tokens that are shared in the same places. A turn arrives when its gap has passed since the
answer before it; the sources say which gaps are tools and which are people.
"""

from __future__ import annotations

import enum
import json
import lzma
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from importlib import resources
from statistics import NormalDist
from typing import Any

DATA = resources.files("agentstate.benchmarks") / "data"
BLOCK_TOKENS = 512  # of a Mooncake hash id
ROOT = -1


class Gap(enum.Enum):
    """What a session waited for before a turn, in an engine's words (`agentstate.fleet.control.GAPS`)."""

    FIRST = "first"
    TOOL = "tool"
    PERSON = "person"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Turn:
    """One request. ``prompt`` and ``answer`` are segments: the prompt is every token from the root to the end of
    ``prompt``, and ``answer`` is its child. The turn arrives ``gap_s`` after the end of the session's turn before, and
    not before ``not_before_s`` of the workload's clock. ``tool`` ran in the gap, and ``head`` is what its command is
    known by. A ``fresh`` turn begins another conversation: nobody comes back to the one before."""

    gap: Gap
    gap_s: float
    not_before_s: float
    prompt: int
    answer: int
    tool: str = ""
    head: str = ""
    fresh: bool = False


@dataclass(frozen=True)
class Announcements:
    """What agents say of how long a tool will take: the truth, wrong by a log-normal factor of ``sigma``, and by
    ``factor``. As ``noise`` they say anything from a tenth of a second to ten minutes."""

    sigma: float = 0.2
    factor: float = 1.0
    noise: bool = False

    def say(self, seconds: float, error: float) -> float:
        """An announcement; ``error`` is a sample of the normal distribution."""
        if self.noise:
            return math.exp(math.log(0.1) + math.log(6000.0) * _NORMAL.cdf(error))
        return max(1e-3, seconds) * self.factor * math.exp(self.sigma * error)


@dataclass
class Workload:
    """Sessions, each a list of turns, over one tree of segments.

    ``parents[i]`` is the segment before segment *i* (`ROOT` for a first one; always less than *i*), ``ends[i]`` how
    many tokens there are from the root to its end. ``source`` says where it comes from and how it was scaled.
    ``stored`` segments are on every drive before anything happens.
    """

    source: str
    sessions: list[list[Turn]] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)
    announced: Announcements = Announcements()

    def add(self, parent: int, tokens: int) -> int:
        """Add a segment of ``tokens`` after ``parent``, and return its number."""
        self.parents.append(parent)
        self.ends.append(self.end(parent) + tokens)
        return len(self.ends) - 1

    def end(self, segment: int) -> int:
        return 0 if segment == ROOT else self.ends[segment]

    def path(self, segment: int) -> list[int]:
        """Every segment from the root to this one."""
        found = []
        while segment != ROOT:
            found.append(segment)
            segment = self.parents[segment]
        return found[::-1]

    def input_tokens(self, turn: Turn) -> int:
        return self.ends[turn.prompt]

    def output_tokens(self, turn: Turn) -> int:
        return self.ends[turn.answer] - self.ends[turn.prompt]

    def turns(self) -> Iterator[Turn]:
        for session in self.sessions:
            yield from session

    def scaled(self, tokens: float = 1.0, time: float = 1.0) -> Workload:
        """The same sessions with every context ``tokens`` times as long and every time ``time`` times as long.
        No prompt and no answer becomes shorter than one token."""
        if tokens == time == 1.0:
            return self
        scaled = Workload(f"{self.source}; tokens × {tokens:g}, times × {time:g}", parents=list(self.parents))
        for parent, end in zip(self.parents, self.ends, strict=True):
            scaled.ends.append(max(scaled.end(parent) + 1, round(end * tokens)))
        for session in self.sessions:
            scaled.sessions.append(
                [replace(t, gap_s=t.gap_s * time, not_before_s=t.not_before_s * time) for t in session]
            )
        return scaled

    def first(self, sessions: int) -> Workload:
        """The same workload with its first sessions only."""
        return replace(
            self, source=f"{self.source}; the first {sessions:,} sessions", sessions=self.sessions[:sessions]
        )


def mooncake() -> Workload:
    """6,015 requests in 31 minutes of a chat service (`data/README.md`), their prefixes shared as their hash ids say.

    The trace names no sessions. A request counts as the next turn of an earlier one if it holds all of that one's whole
    blocks, two or more; it then arrives at the trace's time, or when the answer before it has ended if that is later.
    An answer is never part of a later prompt here, because the trace does not say where it is.
    """
    with (DATA / "mooncake_conversation.jsonl.xz").open("rb") as packed, lzma.open(packed, "rt") as lines:
        return _mooncake(json.loads(line) for line in lines)


def _mooncake(requests: Iterable[dict[str, Any]]) -> Workload:
    workload = Workload("Mooncake conversation trace")
    nodes: dict[tuple[int, int], int] = {}  # (parent segment, hash id) -> segment
    last_of: dict[int, int] = {}  # the segment where a request's whole blocks end -> the session it is the newest of
    for request in requests:
        segment, path, left = ROOT, [], request["input_length"]
        for hash_id in request["hash_ids"]:
            tokens = min(BLOCK_TOKENS, left)
            left -= tokens
            # The last block of a prompt is seldom whole; its id is that of its own few tokens.
            if (segment, hash_id) not in nodes:
                nodes[segment, hash_id] = workload.add(segment, tokens)
            segment = nodes[segment, hash_id]
            if tokens == BLOCK_TOKENS:
                path.append(segment)
        known = [index for index in range(len(path) - 1, 0, -1) if path[index] in last_of]
        session = last_of.pop(path[known[0]]) if known else len(workload.sessions)
        if not known:
            workload.sessions.append([])
        if len(path) > 1:
            last_of[path[-1]] = session
        turn = Turn(
            gap=Gap.OTHER if known else Gap.FIRST,
            gap_s=0.0,
            not_before_s=request["timestamp"] / 1000,
            prompt=segment,
            answer=workload.add(segment, max(1, request["output_length"])),
        )
        workload.sessions[session].append(turn)
    return workload


def tracelab(copies: int = 1, every_s: float = 30.0) -> Workload:
    """Two conversations of coding agents (`data/README.md`), repeated ``copies`` times, one each ``every_s``.

    Copies share the part of the first prompt that the provider had cached from earlier conversations (system prompt
    and tools) and nothing else. A prompt continues the one before it with its answer if it is long enough to hold
    both. If it is shorter, something was left out of the context, and it shares the whole prompts that the provider
    found cached.
    """
    rounds: dict[str, list[dict[str, Any]]] = {}
    for line in (DATA / "tracelab_example.jsonl").read_text().splitlines():
        record = json.loads(line)
        rounds.setdefault(record["session_id"], []).append(record)
    workload = Workload(f"TraceLab example, {copies} × two conversations, one each {every_s:g} s")
    shared = {session: workload.add(ROOT, records[0]["prefix_tokens"]) for session, records in rounds.items()}
    for copy in range(copies):
        for number, (session, records) in enumerate(rounds.items()):
            start_s = (copy * len(rounds) + number) * every_s
            workload.sessions.append(_tracelab_session(workload, shared[session], records, start_s))
    return workload


def _tracelab_session(workload: Workload, shared: int, records: list[dict[str, Any]], start_s: float) -> list[Turn]:
    turns: list[Turn] = []
    ended_s = 0.0
    for record in records:
        total = record["input_tokens_total"]
        base = shared
        if turns:
            base = turns[-1].answer
            if workload.end(base) >= total:
                base = _cut(workload, turns[-1].prompt, min(record["prefix_tokens"], total - 1))
        prompt = workload.add(base, total - workload.end(base))
        events = [(event["event_type"], _seconds(event["timestamp"])) for event in record["timing_events"]]
        asked_s = max(at for kind, at in events if kind in ("user_message", "tool_result"))
        kind = Gap.PERSON if record["first_input_event_type"] == "user_message" else Gap.TOOL
        turns.append(
            Turn(
                gap=kind if turns else Gap.FIRST,
                gap_s=max(0.0, asked_s - ended_s) if turns else 0.0,
                not_before_s=start_s,
                prompt=prompt,
                answer=workload.add(prompt, max(1, record["output_tokens"])),
            )
        )
        ended_s = max(at for _, at in events)
    return turns


def _cut(workload: Workload, segment: int, tokens: int) -> int:
    """The deepest segment on the path to ``segment`` that ends at ``tokens`` or before: all up to it is surely
    shared."""
    while workload.end(segment) > tokens:
        segment = workload.parents[segment]
    return segment


def _seconds(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp).timestamp()


class Quantiles:
    """A distribution through published quantiles: log-normal between each two, with the outer pieces extended.

    ``points`` are (share below, value); samples stay within ``low`` and ``high``.
    """

    def __init__(self, points: Sequence[tuple[float, float]], *, low: float, high: float):
        self._points = [(_NORMAL.inv_cdf(share), math.log(value)) for share, value in points]
        self._low, self._high = low, high

    def at(self, share: float) -> float:
        z = _NORMAL.inv_cdf(share)
        index = 0
        while index < len(self._points) - 2 and z > self._points[index + 1][0]:
            index += 1
        (z0, v0), (z1, v1) = self._points[index], self._points[index + 1]
        return min(self._high, max(self._low, math.exp(v0 + (v1 - v0) * (z - z0) / (z1 - z0))))

    def sample(self, source: random.Random) -> float:
        return self.at(min(max(source.random(), 1e-9), 1 - 1e-9))


_NORMAL = NormalDist()

# Published for 4,265 conversations of coding agents by TraceLab; the bounds are ours.
TOOL_S = Quantiles([(0.5, 0.3), (0.9, 13.6), (0.99, 216.0)], low=0.005, high=3600.0)
HUMAN_S = Quantiles([(0.5, 86.0), (0.9, 21 * 60.0), (0.99, 14 * 3600.0)], low=2.0, high=24 * 3600.0)
TOOL_STEPS = Quantiles([(0.5, 15.0), (0.9, 135.0), (0.99, 1107.0)], low=1.0, high=2000.0)
APPEND_TOKENS, OUTPUT_TOKENS = 875, 214
# Not published, chosen: how lengths spread about their medians, how often a person comes between two steps (two of 17
# in the TraceLab example), and how long contexts begin and grow, such that the median prefix of a step is near 119,000.
LENGTH_SIGMA = 1.0
HUMAN_SHARE = 2 / 17
APPS, APP_TOKENS, OWN_TOKENS, SPREAD_SIGMA = 8, 44_000, 12_000, 0.25
CONTEXT_LIMIT, SUMMARY_TOKENS = 250_000, 8_000


def generated(sessions: int, within_s: float, seed: int = 0, max_gap_s: float = math.inf) -> Workload:
    """Coding agents by the published distributions: ``sessions`` of them, starting evenly at random ``within_s``.

    A session begins with the system prompt of one of eight applications, which its other sessions share. A context that
    reaches 250,000 tokens is compacted: it continues from the application's prompt and a summary. A gap longer than
    ``max_gap_s`` is cut to it. Equal arguments give equal workloads.
    """
    source = random.Random(seed)
    cut = "" if math.isinf(max_gap_s) else f", gaps up to {max_gap_s:,.0f} s"
    workload = Workload(f"generated agents, seed {seed}, {sessions:,} sessions starting within {within_s:,.0f} s{cut}")
    apps = [workload.add(ROOT, _length(source, APP_TOKENS, SPREAD_SIGMA)) for _ in range(APPS)]
    starts = sorted(source.uniform(0, within_s) for _ in range(sessions))
    for start_s in starts:
        app = source.choice(apps)
        prompt = workload.add(app, _length(source, OWN_TOKENS, SPREAD_SIGMA))
        turns: list[Turn] = []
        for _ in range(round(TOOL_STEPS.sample(source))):
            gap, gap_s = Gap.FIRST, 0.0
            if turns:
                human = source.random() < HUMAN_SHARE
                gap = Gap.PERSON if human else Gap.TOOL
                gap_s = min(max_gap_s, (HUMAN_S if human else TOOL_S).sample(source))
                before = turns[-1].answer
                if workload.end(before) > CONTEXT_LIMIT:
                    before = workload.add(app, SUMMARY_TOKENS)
                prompt = workload.add(before, _length(source, APPEND_TOKENS, LENGTH_SIGMA))
            answer = workload.add(prompt, _length(source, OUTPUT_TOKENS, LENGTH_SIGMA))
            turns.append(Turn(gap, gap_s, start_s, prompt, answer))
        workload.sessions.append(turns)
    return workload


def _length(source: random.Random, median: float, sigma: float) -> int:
    """A number of tokens, log-normal, at most 40,000: no single reply of a tool is longer."""
    return min(40_000, max(1, round(median * math.exp(sigma * source.gauss(0, 1)))))
