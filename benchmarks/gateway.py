"""`agentstate bench gateway`: what the gateway adds to a request and to each chunk of its answer.

A process stands in for the engine (`agentstate.benchmarks.stand_in`). The same requests go there directly, through the
gateway, and through what else only forwards (`agentstate.benchmarks.forwarders`), in turn, over connections that are
kept. Times to the first token are also measured with SGLang itself.

- *Time to first token*: agents with a conversation each, of which every turn sends all. All agents ask one target at
  the same time, then the next one. What a target adds is the difference to the engine asked directly, turn by turn.
- *Chunks*: streams that are paced, without a pause between one and the next. A chunk says when it was due.
- *Memory*: many short requests.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from agentstate.benchmarks import databases, forwarders, groups, results, stacks, stand_in
from agentstate.benchmarks.conversations import message
from agentstate.benchmarks.forwarders import Forwarder
from agentstate.benchmarks.streams import Answer, Connection
from agentstate.benchmarks.study import quantile
from agentstate.benchmarks.terminal import console
from agentstate.cli.local import LocalService, free_port
from agentstate.errors import EngineError
from agentstate.fleet import engines
from agentstate.settings import Settings
from agentstate.sql.database import Database

DIRECT, OURS = "engine", "gateway"
AT_ONCE, PACED = "bench", "bench-paced"
INTERVAL_S = 0.02
GOALS_MS = {"sqlite": {"p50": 3, "p99": 15}, "postgresql": {"p50": 6, "p99": 20}}
LATE_GOAL_MS = 20
CPU_GOAL_S = 0.3

# A turn's messages: 20 of 2,000 characters in the middle of a conversation.
FIRST_MESSAGES, TURNS, CHARACTERS = 12, 9, 2000
ANSWER_CHUNKS = 50
# An agent does something between two requests. Meanwhile the turn ends, which is no part of the next one's time.
PAUSE_S = 0.03
# With SGLang on a CPU: shorter messages and answers.
REAL_CHARACTERS, REAL_CHUNKS = 120, 4
STREAM_CHUNKS = 250
RAMP_S = 1.0
SHORT_CHUNKS = 4
SHORT_TURNS = 10
SHORT_AT_ONCE = 8
RESAMPLES = 1000


@dataclass(frozen=True)
class Plan:
    """``turns`` are measured for every number of ``agents``. ``rounds`` of ``seconds`` each are measured with
    ``streams`` streams at once. ``requests`` are those whose memory is measured. ``real`` turns are measured with
    SGLang."""

    agents: Sequence[int]
    turns: int
    streams: int
    rounds: int
    seconds: float
    requests: int
    real: int = 0


@dataclass(frozen=True)
class Target:
    """Where requests are sent to. ``group`` is the group of its processes; the engine's costs do not matter."""

    name: str
    urls: Mapping[str, str]  # by model
    group: int | None = None


class Agent:
    """An agent with a conversation at each target: the same but for its first words, so that no target finds another
    one's KV. ``model`` is SGLang's, if that answers."""

    def __init__(self, targets: Sequence[Target], seed: int, model: str | None = None):
        self._connections = {
            target.name: Connection(target.urls[model or AT_ONCE], hears=model is not None) for target in targets
        }
        self._model = model
        self._characters = CHARACTERS if model is None else REAL_CHARACTERS
        self._random = random.Random(seed)
        self.begin()

    def begin(self) -> None:
        """Begin other conversations."""
        texts = [self._text() for _ in range(FIRST_MESSAGES)]
        roles = ["system", *("user" if number % 2 else "assistant" for number in range(1, FIRST_MESSAGES))]
        said = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        self._messages = {
            name: [{**said[0], "content": f"{name}: {said[0]['content']}"}, *said[1:]] for name in self._connections
        }
        self._session: str | None = None

    def go_on(self) -> None:
        asked = self._text()
        for messages in self._messages.values():
            if self._model is None:
                messages.append({"role": "assistant", "content": stand_in.answer(ANSWER_CHUNKS)})
            messages.append({"role": "user", "content": asked})

    def body(self, target: Target) -> bytes:
        messages = self._messages[target.name]
        if self._model is None:
            return _body(AT_ONCE, messages, ANSWER_CHUNKS)
        return _body(self._model, messages, REAL_CHUNKS, temperature=0)

    async def ask(self, target: Target, body: bytes) -> Answer:
        answer = await self._connections[target.name].ask(body)
        if self._model is not None:
            self._messages[target.name].append({"role": "assistant", "content": answer.said})
        return answer

    def followed(self, answer: Answer) -> bool:
        """Whether the gateway took a request for a turn of the conversation's session."""
        session, self._session = self._session, answer.headers.get("x-agentstate-session")
        return session is None or session == self._session

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()

    def _text(self) -> str:
        number = self._random.getrandbits(40)
        texts = (message(number + each)["content"] for each in range(self._characters))
        text = ""
        while len(text) < self._characters:
            text += next(texts)
        return text[: self._characters]


@dataclass
class Turns:
    """Milliseconds to the first token by target, and the gateway's own of its `begin`. ``cpu_s`` are those that the
    target's processes used for all of it, the end of the turn included. ``strayed`` requests were not taken for a turn
    of their conversation's session."""

    ttft_ms: dict[str, list[float]] = field(default_factory=dict)
    begin_ms: list[float] = field(default_factory=list)
    cpu_s: dict[str, float] = field(default_factory=dict)
    strayed: int = 0

    def rows(self, database: str, agents: int) -> Iterator[dict[str, Any]]:
        direct = self.ttft_ms[DIRECT]
        for name, ttft_ms in self.ttft_ms.items():
            row: dict[str, Any] = {"part": "ttft", "database": database, "agents": agents, "target": name}
            row |= {"samples": len(ttft_ms)}
            row |= {f"ttft_{share}_ms": round(_at(ttft_ms, share), 3) for share in SHARES}
            if name != DIRECT:
                added_ms = [ours - theirs for ours, theirs in zip(ttft_ms, direct, strict=True)]
                for share in SHARES:
                    row[f"added_{share}_ms"] = round(_at(added_ms, share), 3)
                    row[f"added_{share}_95"] = bounds(added_ms, share)
                row["cpu_ms"] = round(self.cpu_s.get(name, 0.0) / len(ttft_ms) * 1000, 2)
            if name == OURS:
                row |= {f"begin_{share}_ms": round(_at(self.begin_ms, share), 3) for share in SHARES}
                row["strayed"] = self.strayed
            yield row


SHARES = {"p50": 0.5, "p99": 0.99}


def _at(values: Sequence[float], share: str) -> float:
    return quantile(sorted(values), SHARES[share])


def bounds(values: Sequence[float], share: str, seed: int = 0) -> list[float]:
    """The 95 % interval of a quantile, by bootstrap."""
    draw = random.Random(seed)
    found = sorted(_at(draw.choices(values, k=len(values)), share) for _ in range(RESAMPLES))
    return [round(quantile(found, edge), 3) for edge in (0.025, 0.975)]


async def measure_turns(
    targets: Sequence[Target], agents: int, turns: int, step: Callable[[str], None], model: str | None = None
) -> Turns:
    """At least ``turns`` turns of ``agents`` agents together, with SGLang's ``model`` if that is given. The first turn
    of a conversation is not counted."""
    found = Turns({target.name: [] for target in targets})
    async with _closing([Agent(targets, seed, model) for seed in range(agents)]) as asking:
        number = 0
        while len(found.ttft_ms[DIRECT]) < turns:
            place = number % TURNS
            for agent in asking:
                agent.begin() if place == 0 else agent.go_on()
            first = number % len(targets)
            for target in (*targets[first:], *targets[:first]):
                bodies = [agent.body(target) for agent in asking]
                before_s = _cpu_s(target)
                answers = await asyncio.gather(
                    *(agent.ask(target, body) for agent, body in zip(asking, bodies, strict=True))
                )
                if target.name == OURS:
                    followed = [agent.followed(answer) for agent, answer in zip(asking, answers, strict=True)]
                    found.strayed += followed.count(False)
                if place and number >= TURNS:  # everything has been used before
                    found.ttft_ms[target.name] += [answer.ttft_ms for answer in answers]
                    if target.name == OURS:
                        found.begin_ms += [answer.server_ms["begin"] for answer in answers]
                await asyncio.sleep(PAUSE_S)
                if place and number >= TURNS and before_s is not None and (after_s := _cpu_s(target)) is not None:
                    found.cpu_s[target.name] = found.cpu_s.get(target.name, 0.0) + after_s - before_s
            number += 1
            step(f"{agents} at once, turn {len(found.ttft_ms[DIRECT]):,} of {turns:,}")
    return found


@dataclass
class Paced:
    """What came in one round from one target."""

    late_ms: list[float]
    cpu_s: float | None
    answers: int


async def measure_chunks(target: Target, streams: int, seconds: float) -> Paced:
    """``streams`` streams one after the other for ``seconds``, after all have begun. The first of each ends early, so
    that they do not all end, and begin again, at once."""
    late_ms: list[float] = []
    answers = 0
    connections = [Connection(target.urls[PACED], late_ms.append) for _ in range(streams)]

    async def stream(number: int, connection: Connection) -> None:
        nonlocal answers
        await asyncio.sleep(RAMP_S * number / streams)
        chunks = max(1, STREAM_CHUNKS * (number + 1) // streams)
        while True:
            # Each stream is a new conversation, of its own length.
            text = [{"role": "user", "content": f"{number} {answers} {message(number)['content']}"}]
            await connection.ask(_body(PACED, text, chunks))
            chunks = STREAM_CHUNKS
            answers += 1

    async with _closing(connections):
        running = asyncio.gather(*(stream(number, connection) for number, connection in enumerate(connections)))
        try:
            await _unless_failed(running, RAMP_S + 0.5)
            late_ms.clear()
            answers, before_s = 0, _cpu_s(target)
            await _unless_failed(running, seconds)
            after_s = _cpu_s(target)
            cpu_s = None if before_s is None or after_s is None else after_s - before_s
            return Paced(list(late_ms), cpu_s, answers)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


def chunk_rows(database: str, streams: int, found: Mapping[str, Sequence[Paced]]) -> Iterator[dict[str, Any]]:
    """A row a target, from its rounds: medians over the rounds, and the least and the most."""
    direct = [_at(paced.late_ms, "p99") for paced in found[DIRECT]]
    for name, rounds in found.items():
        row: dict[str, Any] = {"part": "chunks", "database": database, "streams": streams, "target": name}
        row |= {"rounds": len(rounds), "chunks": sum(len(paced.late_ms) for paced in rounds)}
        for share in SHARES:
            row[f"late_{share}_ms"] = round(statistics.median(_at(paced.late_ms, share) for paced in rounds), 2)
        if name != DIRECT:
            added = [_at(paced.late_ms, "p99") - base for paced, base in zip(rounds, direct, strict=True)]
            row["added_p99_ms"] = round(statistics.median(added), 2)
            row["added_p99_range_ms"] = [round(min(added), 2), round(max(added), 2)]
            cpu_s = [paced.cpu_s / len(paced.late_ms) * 1000 for paced in rounds if paced.cpu_s is not None]
            row["cpu_s_per_1000"] = round(statistics.median(cpu_s), 4)
            row["cpu_s_per_1000_range"] = [round(min(cpu_s), 4), round(max(cpu_s), 4)]
        yield row


async def measure_memory(target: Target, requests: int, step: Callable[[str], None]) -> list[dict[str, float]]:
    """The resident memory of a target before, during and after so many short requests, of conversations of
    `SHORT_TURNS` turns."""
    assert target.group is not None
    points: list[dict[str, float]] = []
    left = iter(range(requests))
    done = 0

    def note() -> None:
        points.append({"requests": done, "rss_mb": round(groups.rss_bytes(target.group) / 1e6, 1)})

    async def agent(number: int, connection: Connection) -> None:
        nonlocal done
        for request in left:
            if request % (SHORT_TURNS * SHORT_AT_ONCE) < SHORT_AT_ONCE or not messages[number]:
                messages[number] = [{"role": "user", "content": f"{number} {request} {message(request)['content']}"}]
            await connection.ask(_body(AT_ONCE, messages[number], SHORT_CHUNKS))
            messages[number] += [
                {"role": "assistant", "content": stand_in.answer(SHORT_CHUNKS)},
                {"role": "user", "content": message(request)["content"]},
            ]
            done += 1
            if done % max(1, requests // 10) == 0:
                note()
                step(f"memory, request {done:,} of {requests:,}")

    messages: list[list[dict[str, str]]] = [[] for _ in range(SHORT_AT_ONCE)]
    note()
    async with _closing([Connection(target.urls[AT_ONCE]) for _ in range(SHORT_AT_ONCE)]) as connections:
        await asyncio.gather(*(agent(number, connection) for number, connection in enumerate(connections)))
    return points


def run(plan: Plan, chosen: Sequence[str], executables: Mapping[Forwarder, str | None], report: Path | None) -> None:
    """Measure on each of the ``chosen`` databases, print tables, and keep the raw result. Forwarders take part in the
    first database's run. Raises SettingsError for an unknown database or an executable that is not there."""
    databases.require(chosen)
    found = {forwarder: forwarder.find(given) for forwarder, given in executables.items()}
    settings: dict[str, Any] = {
        "plan": vars(plan),
        "engine": "a stand-in that replays a stream",
        "filesystem": databases.filesystem(tempfile.gettempdir()),
        "left_out": {
            forwarder.name: f"{forwarder.executable} is not installed: pip install {forwarder.package}"
            for forwarder, path in found.items()
            if path is None
        },
    }
    there = {forwarder: path for forwarder, path in found.items() if path is not None}
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(chosen):
        with ExitStack() as stack:
            if (server := databases.entered(name, stack, settings["left_out"])) is None:
                continue
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
            step = stack.enter_context(_progress(name))
            url = server.create("agentstate").render_as_string(hide_password=False)
            if plan.real and name == "sqlite":
                rows += _with_sglang(plan, step)
            targets = stack.enter_context(running(url, home, there if number == 0 else {}, step))
            rows += uvloop.run(_on(name, plan, targets, step))
    for table in tables(rows):
        console.print(table)
    for line in [*remarks(rows), *(f"left out: {name}: {why}" for name, why in settings["left_out"].items())]:
        console.print(line, highlight=False, markup=False)
    if report is not None:
        results.write(report, results.record("gateway", settings, rows, forwarders.interpreters(list(there.values()))))
        console.print(f"raw result written to {report}")


def _with_sglang(plan: Plan, step: Callable[[str], None]) -> list[dict[str, Any]]:
    """Times to the first token with SmolLM2 on this machine, one engine, and the embedded database."""
    rows = []
    step("starting SGLang")
    with stacks.running(Settings(), stacks.SMOLLM2, ()) as stack:
        targets = [
            Target(DIRECT, {stack.model: stack.engine_url}),
            Target(OURS, {stack.model: stack.service_url}, stack.group),
        ]
        for agents in plan.agents:
            found = uvloop.run(measure_turns(targets, agents, plan.real, step, stack.model))
            rows += [{**row, "engine": "SGLang"} for row in found.rows("sqlite", agents)]
    return rows


@contextmanager
def running(
    database_url: str, home: Path, there: Mapping[Forwarder, Path], step: Callable[[str], None]
) -> Iterator[list[Target]]:
    """The engine's stand-in, the service on an empty database, and the forwarders that are ``there``."""
    with ExitStack() as stack:
        step("starting")
        urls = stack.enter_context(stand_in.replaying([stand_in.AT_ONCE_S, INTERVAL_S]))
        served = dict(zip((AT_ONCE, PACED), urls, strict=True))
        endpoint = stack.enter_context(stand_in.control())
        database = stack.enter_context(closing(Database(database_url)))
        database.upgrade()
        with database.write() as connection:
            for model, base_url in served.items():
                engines.register(connection, stand_in.engine(*endpoint, base_url, model, rank_of=model))
        # The stand-in sends no heartbeats.
        own = {"AGENTSTATE_DATABASE_URL": database_url, "AGENTSTATE_ENGINE_TIMEOUT_S": "86400"}
        service = stack.enter_context(closing(LocalService(home / "service", service_port=free_port(), settings=own)))
        service.start_service()
        targets = [
            Target(DIRECT, served),
            Target(OURS, dict.fromkeys(served, service.service_url), service.group),
        ]
        for forwarder, executable in there.items():
            step(f"starting {forwarder.name}")
            # One that knows one engine only is started once for each.
            groups = [{model: url} for model, url in served.items()] if forwarder.one_engine else [served]
            for engines_of in groups:
                url, group = stack.enter_context(forwarders.running(forwarder, executable, engines_of, home))
                targets.append(Target(forwarder.name, dict.fromkeys(engines_of, url), group))
        yield targets


async def _on(
    database: str, plan: Plan, targets: Sequence[Target], step: Callable[[str], None]
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for agents in plan.agents:
        asked = [target for target in targets if AT_ONCE in target.urls]
        rows += (await measure_turns(asked, agents, plan.turns, step)).rows(database, agents)
    asked = [target for target in targets if PACED in target.urls]
    found: dict[str, list[Paced]] = {target.name: [] for target in asked}
    for number in range(plan.rounds):
        for target in asked:
            step(f"{plan.streams} streams from {target.name}, round {number + 1} of {plan.rounds}")
            found[target.name].append(await measure_chunks(target, plan.streams, plan.seconds))
    if plan.rounds:
        rows += chunk_rows(database, plan.streams, found)
    if plan.requests:
        ours = next(target for target in targets if target.name == OURS)
        points = await measure_memory(ours, plan.requests, step)
        rows.append({"part": "memory", "database": database, "target": OURS, "points": points})
    return rows


# --- what is printed


def tables(rows: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """One of times to the first token, one of chunks, one of memory, of what was measured."""
    turns = Table(
        *("database", "at once", "through"),
        *(Column(name, justify="right") for name in ("TTFT p50", "added p50 (95 %)", "goal")),
        *(Column(name, justify="right") for name in ("added p99 (95 %)", "goal", "begin p50 / p99", "CPU")),
        title="Time to first token and CPU time of a request, ms",
        padding=(0, 0),
    )
    chunks = Table(
        *("database", "through"),
        *(Column(name, justify="right") for name in ("chunks", "late p50", "late p99", "added p99", "goal")),
        *(Column(name, justify="right") for name in ("CPU s / 1,000", "goal")),
        title="Chunks: lateness in ms (medians of the rounds, and the least and the most)",
        padding=(0, 0),
    )
    memory = Table(*("database", "requests", "resident, MB"), title="Memory of the gateway", padding=(0, 0))
    for row in rows:
        ours = row["target"] == OURS
        if row["part"] == "ttft":
            name = row["target"] + (" (SGLang)" if row.get("engine") else "")
            cells = [row["database"], str(row["agents"]), name, f"{row['ttft_p50_ms']:.2f}"]
            for share in SHARES:
                if row["target"] == DIRECT:
                    cells += ["", ""]
                    continue
                low, high = row[f"added_{share}_95"]
                cells.append(f"{row[f'added_{share}_ms']:.2f} ({low:.2f}–{high:.2f})")
                cells.append(f"{GOALS_MS[row['database']][share]}" if ours else "")
            cells.append(f"{row['begin_p50_ms']:.2f} / {row['begin_p99_ms']:.2f}" if ours else "")
            cells.append("" if row["target"] == DIRECT else f"{row['cpu_ms']:.1f}")
            turns.add_row(*cells)
        elif row["part"] == "chunks":
            cells = [row["database"], row["target"], f"{row['chunks']:,}"]
            cells += [f"{row['late_p50_ms']:.1f}", f"{row['late_p99_ms']:.1f}"]
            if row["target"] != DIRECT:
                low, high = row["added_p99_range_ms"]
                cells += [f"{row['added_p99_ms']:.1f} ({low:.1f}–{high:.1f})", f"{LATE_GOAL_MS}" if ours else ""]
                low, high = row["cpu_s_per_1000_range"]
                cells += [f"{row['cpu_s_per_1000']:.3f} ({low:.3f}–{high:.3f})", f"{CPU_GOAL_S}" if ours else ""]
            chunks.add_row(*cells)
        else:
            for point in row["points"]:
                memory.add_row(row["database"], f"{point['requests']:,}", f"{point['rss_mb']:.1f}")
    yield from (table for table in (turns, chunks, memory) if table.row_count)


def remarks(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What the figures do not show."""
    for row in rows:
        if row.get("strayed"):
            yield (
                f"{row['database']}, {row['agents']} at once: {row['strayed']} requests were not taken for a turn of "
                "their conversation's session"
            )
        if row["part"] == "memory":
            first, half, last = (row["points"][at] for at in (0, len(row["points"]) // 2, -1))
            yield (
                f"{row['database']}: from {first['rss_mb']} MB to {last['rss_mb']} MB in {last['requests']:,} "
                f"requests, {last['rss_mb'] - half['rss_mb']:+.1f} MB in the second half"
            )


# --- helpers


def _cpu_s(target: Target) -> float | None:
    return None if target.group is None else groups.cpu_s(target.group)


def _body(model: str, messages: Sequence[Mapping[str, str]], chunks: int, **more: Any) -> bytes:
    body = {"model": model, "stream": True, "max_tokens": chunks, "messages": messages, **more}
    return json.dumps(body).encode()


@asynccontextmanager
async def _closing(things: Sequence[Any]) -> AsyncIterator[Sequence[Any]]:
    try:
        yield things
    finally:
        for thing in things:
            thing.close()


async def _unless_failed(running: asyncio.Future[Any], seconds: float) -> None:
    """Wait, unless what is running has failed."""
    done, _ = await asyncio.wait([running], timeout=seconds)
    if done:
        running.result()
        raise EngineError("the streams have ended")


@contextmanager
def _progress(name: str) -> Iterator[Callable[[str], None]]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=1) as progress:
        task = progress.add_task(name, total=None)
        yield lambda told: progress.update(task, description=f"{name}: {told}")
