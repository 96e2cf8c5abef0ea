"""How much a service does at once: parts of `agentstate bench service`.

- *Load*: agents that never pause take the same turns, at a service of one process and at one of two, in alternating
  rounds on one database. The CPU time of a request is that of the service's processes, without the database's.
- *Crowd*: thousands of sessions wait as recorded agents do (`agents.paces`), and now and then have a turn: resume,
  append, the model's time, append, suspend. It begins as it would be found at any moment: who waits is amid a wait, who
  has a turn amid that. A service of two processes serves them.

What asks is to be cheap: no client library, one process.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import aiohttp
import orjson
from rich.table import Column, Table

from agentstate.benchmarks import conversations, groups
from agentstate.benchmarks.agents import paces
from agentstate.benchmarks.session_peers import ADDED
from agentstate.benchmarks.study import quantile
from agentstate.errors import EngineError

WORKERS = (1, 2)  # of the services that are compared
# Requests a second of one process, with 32 agents.
GOAL_AGENTS = 32
GOALS_PER_S = {"sqlite": 1200, "postgresql": 900}
P99_GOAL_MS, CPU_GOAL, SPEED_GOAL = 80, 1.1, 1.7
CORES_FOR_SPEED = 6
WARM_UP_S = 1.0
TAIL, SHORT_TAIL = 50, 10

REQUESTS_A_TURN = 4  # of the crowd
CONNECTIONS = 256
AT_ONCE = 32  # turns that are begun before the start
CROWD_TTL_S = 6 * 3600.0
TIMEOUT_S = 60.0
_JSON = {"Content-Type": "application/json"}
_ANY = {"If-Match": "*", **_JSON}


class Asking:
    """Sends requests to a service, and notes how long each took: ``ms``."""

    def __init__(self, http: aiohttp.ClientSession, service_url: str):
        self._http = http
        self._url = f"{service_url}/v1/sessions"
        self.ms: list[float] = []

    async def post(
        self, session: str, what: str, body: Mapping[str, Any], headers: Mapping[str, str] = _JSON
    ) -> dict[str, Any]:
        """Raises EngineError, and OSError, aiohttp.ClientError and TimeoutError if nothing was answered."""
        started_s = time.perf_counter()
        async with self._http.post(
            f"{self._url}/{session}/{what}", data=orjson.dumps(body), headers=headers
        ) as response:
            content = await response.read()
        self.ms.append((time.perf_counter() - started_s) * 1000)
        if response.status >= 300:
            raise EngineError(f"{what} of {session}: {response.status} {content[:200].decode(errors='replace')}")
        answer: dict[str, Any] = orjson.loads(content)
        return answer

    async def resume(self, session: str, tail: int, **more: Any) -> dict[str, Any]:
        lease = (await self.post(session, "resume", {"tail": tail, **more}))["lease"]
        return {"token": lease["token"], "epoch": lease["epoch"]}

    async def append(self, session: str, lease: Mapping[str, Any], count: int) -> None:
        said = [{"kind": "message", "payload": conversations.message(number)} for number in range(count)]
        await self.post(session, "entries", {"lease": lease, "entries": said})

    async def suspend(self, session: str, lease: Mapping[str, Any]) -> None:
        await self.post(session, "suspend", {"lease": lease, "reason": "user_wait"})

    async def turn(self, session: str) -> None:
        """What `service.Agent.turn` does."""
        lease = await self.resume(session, TAIL)
        await self.append(session, lease, ADDED)
        await self.suspend(session, lease)
        await self.post(session, "forks", {}, _ANY)
        await self.suspend(session, await self.resume(session, SHORT_TAIL))


@asynccontextmanager
async def asking(service_url: str, connections: int) -> AsyncIterator[Asking]:
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections), timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)
    ) as http:
        yield Asking(http, service_url)


# --- load


@dataclass
class Round:
    """What agents got from one service in one round."""

    ms: list[float]
    seconds: float
    cpu_s: float

    @property
    def per_s(self) -> float:
        return len(self.ms) / self.seconds

    @property
    def cpu_ms(self) -> float:
        """Of a request."""
        return self.cpu_s / len(self.ms) * 1000


async def load(
    services: Mapping[int, tuple[str, int]],
    sessions: Sequence[str],
    agents: int,
    rounds: int,
    seconds: float,
    step: Callable[[], None],
) -> dict[int, list[Round]]:
    """What ``agents`` agents get in ``rounds`` of ``seconds`` each from ``services``: by the number of workers, the URL
    and the process group. Each agent has ``sessions`` of its own. Raises EngineError."""
    found: dict[int, list[Round]] = {workers: [] for workers in services}
    own = [sessions[number::agents] for number in range(agents)]
    async with AsyncExitStack() as closing:
        asked = {
            workers: [await closing.enter_async_context(asking(url, 1)) for _ in range(agents)]
            for workers, (url, _) in services.items()
        }
        for number in range(-1, rounds):  # the first one warms up
            order = list(services)[:: 1 if number % 2 else -1]
            for workers in order:
                done = await _round(asked[workers], own, services[workers][1], seconds if number >= 0 else WARM_UP_S)
                if number >= 0:
                    found[workers].append(done)
                    step()
    return found


async def _round(asked: Sequence[Asking], own: Sequence[Sequence[str]], group: int, seconds: float) -> Round:
    for one in asked:
        one.ms.clear()
    before_s, started_s = groups.cpu_s(group), time.perf_counter()

    async def live(one: Asking, sessions: Sequence[str]) -> None:
        number = 0
        while time.perf_counter() < started_s + seconds:
            await one.turn(sessions[number % len(sessions)])
            number += 1

    await asyncio.gather(*(live(one, sessions) for one, sessions in zip(asked, own, strict=True)))
    taken_s = time.perf_counter() - started_s
    return Round([ms for one in asked for ms in one.ms], taken_s, groups.cpu_s(group) - before_s)


def load_rows(database: str, agents: int, found: Mapping[int, Sequence[Round]]) -> Iterator[dict[str, Any]]:
    """A row a service: medians over the rounds, and of those of several workers how they compare, round by round."""
    for workers, rounds in found.items():
        ms = sorted(ms for one in rounds for ms in one.ms)
        row = {
            "part": "load",
            "database": database,
            "workers": workers,
            "agents": agents,
            "requests": len(ms),
            "per_s": round(statistics.median(one.per_s for one in rounds), 1),
            "p50_ms": round(quantile(ms, 0.5), 3),
            "p99_ms": round(quantile(ms, 0.99), 3),
            "cpu_ms": round(statistics.median(one.cpu_ms for one in rounds), 3),
        }
        if workers > 1 and 1 in found:
            pairs = list(zip(rounds, found[1], strict=True))
            row["cpu_ratio"] = round(statistics.median(ours.cpu_ms / one.cpu_ms for ours, one in pairs), 3)
            row["speed_ratio"] = round(statistics.median(ours.per_s / one.per_s for ours, one in pairs), 3)
        yield row


# --- crowd


@dataclass(frozen=True)
class Place:
    """Where a session is at the start: amid the wait before turn ``turn`` of a conversation, or amid that turn, of
    which so much is left."""

    conversation: int
    turn: int
    has_turn: bool
    left_s: float


class Paces:
    """How sessions wait and have turns: conversations, each a list of (wait, model's time) in seconds."""

    def __init__(self, recorded: Sequence[Sequence[tuple[float, float]]]):
        self.recorded = recorded
        self._lasting = list(accumulate(sum(wait_s + model_s for wait_s, model_s in turns) for turns in recorded))

    @property
    def turns_per_s(self) -> float:
        """Of one session, if answers take no time."""
        return sum(map(len, self.recorded)) / self._lasting[-1]

    def at_any_moment(self, source: random.Random) -> Place:
        """A place drawn by how long sessions are in each."""
        (conversation,) = source.choices(range(len(self.recorded)), cum_weights=self._lasting)
        turns = self.recorded[conversation]
        at_s = source.uniform(0, sum(wait_s + model_s for wait_s, model_s in turns))
        for number, (wait_s, model_s) in enumerate(turns):
            if at_s < wait_s:
                return Place(conversation, number, False, wait_s - at_s)
            at_s -= wait_s
            if at_s < model_s:
                return Place(conversation, number, True, model_s - at_s)
            at_s -= model_s
        return Place(conversation, len(turns) - 1, True, 0.0)

    def after(self, place: Place, source: random.Random) -> tuple[int, int]:
        """The conversation and turn that follow: of another conversation, after the last one."""
        if place.turn + 1 < len(self.recorded[place.conversation]):
            return place.conversation, place.turn + 1
        # As often as each is begun, which does not depend on how long it lasts.
        return source.randrange(len(self.recorded)), 0


@dataclass
class Crowd:
    """What has become of a crowd's requests. ``memory_mb`` is that of the service at the start, in the middle and at
    the end."""

    sessions: int
    seconds: float
    offered_per_s: float
    ms: list[float] = field(default_factory=list)
    turns: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    memory_mb: list[float] = field(default_factory=list)

    def row(self, database: str, workers: int) -> dict[str, Any]:
        ms = sorted(self.ms)
        return {
            "part": "crowd",
            "database": database,
            "workers": workers,
            "sessions": self.sessions,
            "seconds": round(self.seconds, 1),
            "offered_per_s": round(self.offered_per_s, 1),
            "per_s": round(len(ms) / self.seconds, 1),
            "requests": len(ms),
            "turns": self.turns,
            "p50_ms": round(quantile(ms, 0.5), 3) if ms else None,
            "p99_ms": round(quantile(ms, 0.99), 3) if ms else None,
            "errors": self.errors.total(),
            "first_errors": [f"{count} × {what}" for what, count in self.errors.most_common(5)],
            "memory_mb": self.memory_mb,
        }


async def crowd(
    service_url: str,
    group: int,
    sessions: Sequence[str],
    seconds: float,
    step: Callable[[str], None],
    known: Paces | None = None,
    seed: int = 0,
) -> Crowd:
    """Let ``sessions`` wait and have turns for ``seconds``."""
    known = known or Paces(paces())
    found = Crowd(len(sessions), seconds, len(sessions) * known.turns_per_s * REQUESTS_A_TURN)
    async with asking(service_url, CONNECTIONS) as asked:
        sources = [random.Random(f"{seed} {number}") for number in range(len(sessions))]
        places = [known.at_any_moment(source) for source in sources]
        gate = asyncio.Semaphore(AT_ONCE)

        async def begun(session: str, place: Place) -> dict[str, Any] | None:
            if not place.has_turn:
                return None
            async with gate:
                return await asked.resume(session, TAIL, lease_ttl_s=CROWD_TTL_S)

        step(f"{len(sessions):,} sessions: beginning the turns that they are amid")
        leases = await asyncio.gather(*map(begun, sessions, places))
        asked.ms = found.ms
        until_s = asyncio.get_running_loop().time() + seconds
        living = [
            asyncio.create_task(_live(asked, session, place, lease, known, source, until_s, found))
            for session, place, lease, source in zip(sessions, places, leases, sources, strict=True)
        ]
        try:
            for part in range(3):
                found.memory_mb.append(round(groups.pss_bytes(group) / 1e6, 1))
                if part == 2:
                    break
                for _ in range(10):
                    await asyncio.sleep(seconds / 20)
                    step(f"{found.turns:,} turns, {len(found.ms):,} requests, {found.errors.total():,} errors")
        finally:
            for task in living:
                task.cancel()
            ended = await asyncio.gather(*living, return_exceptions=True)
        for error in ended:
            if isinstance(error, Exception):
                raise error
    return found


async def _live(
    asked: Asking,
    session: str,
    place: Place,
    lease: dict[str, Any] | None,
    known: Paces,
    source: random.Random,
    until_s: float,
    found: Crowd,
) -> None:
    now_s = asyncio.get_running_loop().time
    wait_s, model_s = place.left_s, known.recorded[place.conversation][place.turn][1]
    if lease is not None:
        wait_s, model_s = 0.0, place.left_s
    while True:
        if now_s() + wait_s >= until_s:
            return
        await asyncio.sleep(wait_s)
        try:
            if lease is None:
                lease = await asked.resume(session, TAIL, lease_ttl_s=CROWD_TTL_S)
                await asked.append(session, lease, 1)
            if now_s() + model_s >= until_s:
                return
            await asyncio.sleep(model_s)
            await asked.append(session, lease, 1)
            await asked.suspend(session, lease)
            found.turns += 1
        except (EngineError, aiohttp.ClientError, OSError, TimeoutError) as error:
            found.errors[f"{type(error).__name__}: {str(error).replace(session, 'SESSION')}"[:200]] += 1
        lease = None
        conversation, turn = known.after(place, source)
        wait_s, model_s = known.recorded[conversation][turn]
        place = Place(conversation, turn, False, wait_s)


# --- what is printed


def tables(rows: Sequence[dict[str, Any]]) -> Iterator[Table]:
    loads = Table(
        *("database", "workers", "at once"),
        *(Column(name, justify="right") for name in ("requests/s", "goal", "p50", "p99", "CPU", "÷ 1", "speed ÷ 1")),
        title="Load: requests a second; ms of a request",
        padding=(0, 0),
    )
    crowds = Table(
        *("database", "sessions"),
        *(Column(name, justify="right") for name in ("offered/s", "served/s", "p50", "p99", "errors", "MB")),
        title="Crowd: requests a second; ms of a request",
        padding=(0, 0),
    )
    for row in rows:
        times = (f"{row['p50_ms'] or 0:.1f}", f"{row['p99_ms'] or 0:.1f}")
        if row["part"] == "load":
            goal = GOALS_PER_S[row["database"]] if (row["workers"], row["agents"]) == (1, GOAL_AGENTS) else ""
            loads.add_row(
                *(row["database"], str(row["workers"]), str(row["agents"]), f"{row['per_s']:,.0f}", str(goal), *times),
                *(f"{row['cpu_ms']:.2f}", *(f"{row[name]:.2f}" if name in row else "" for name in _RATIOS)),
            )
        else:
            memory = " → ".join(f"{mb:.0f}" for mb in row["memory_mb"])
            crowds.add_row(
                *(row["database"], f"{row['sessions']:,}", f"{row['offered_per_s']:,.0f}", f"{row['per_s']:,.0f}"),
                *(*times, str(row["errors"]), memory),
            )
    yield from (table for table in (loads, crowds) if table.row_count)


_RATIOS = ("cpu_ratio", "speed_ratio")


def remarks(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    if any(row["part"] == "load" for row in rows):
        yield (
            f"goals: p99 {P99_GOAL_MS} ms at {GOAL_AGENTS} agents; of two workers, CPU ÷ one's {CPU_GOAL} at most, and "
            f"no fewer requests a second"
        )
        cores = os.cpu_count() or 1
        if cores < CORES_FOR_SPEED:
            yield f"not compared: two workers at {SPEED_GOAL} times one's speed, which takes {CORES_FOR_SPEED} cores"
    for row in rows:
        yield from (f"{row['database']}, crowd: {error}" for error in row.get("first_errors", ()))
