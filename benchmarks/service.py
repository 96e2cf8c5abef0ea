"""`agentstate bench service`: how long the session service takes for its verbs, and beside it what people use today.

A service process answers over HTTP on loopback, to the package's own client, on a database that holds all the sessions
at once. In each round every history and every peer has its turn, so that what disturbs one disturbs all. An agent is a
client with a connection of its own. Server-side times are those that the service reports in ``Server-Timing``.

A process stands in for the engine and answers every flush with ``durable`` at once: ``suspend with engine`` includes
the barrier's way there and back, but not the time an engine takes to write pages; ``suspend`` is without the barrier.

How many requests a second it serves, and with how many processes, is `agentstate.benchmarks.crowds`.
"""

from __future__ import annotations

import asyncio
import gc
import sqlite3
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from agentstate.benchmarks import conversations, crowds, databases, results, stand_in
from agentstate.benchmarks.databases import Server
from agentstate.benchmarks.session_peers import ADDED, Peer, alternatives
from agentstate.benchmarks.study import quantile
from agentstate.benchmarks.terminal import console
from agentstate.cli.local import LocalService, free_port
from agentstate.client import AsyncClient, Client
from agentstate.client import message as message_entry
from agentstate.errors import SettingsError
from agentstate.fleet.manifests import KvState
from agentstate.settings import Settings
from agentstate.sql.database import Database

SESSIONS = {10: 10_000, 1_000: 100, 5_000: 32, 100_000: 3}
OURS = "agentstate"
SIDES = ("client", "server")
PEERS_UP_TO = 5_000
TAIL = 50
SHORT_TAIL = 10  # as many entries as the shortest history has: the same work at every length
PEER_ROUNDS = 5  # peers take part in one round of so many: theirs are longer
WARM_UP = 3
BLOCKS = 5
T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """What a figure is about; ``history`` is how many entries the session had at the start."""

    system: str
    operation: str
    history: int
    concurrency: int
    side: str  # client, or server: until the service's answer was complete


@dataclass
class Samples:
    """Milliseconds of every case. Measurements made while it is not ``counting`` only warm up."""

    ms: defaultdict[Case, list[float]] = field(default_factory=lambda: defaultdict(list))
    counting: bool = False

    def add(self, case: Case, ms: float) -> None:
        if self.counting:
            self.ms[case].append(ms)

    def rows(self, database: str) -> list[dict[str, Any]]:
        return [
            {
                "database": database,
                **vars(case),
                "samples": len(found),
                "p50_ms": round(quantile(sorted(found), 0.5), 3),
                "p99_ms": round(quantile(sorted(found), 0.99), 3),
            }
            for case, found in self.ms.items()
        ]


class Agent:
    """One of ``concurrency`` agents that work at once."""

    def __init__(self, base_url: str, concurrency: int, samples: Samples):
        self.client = AsyncClient(base_url, timeout_s=60)
        self._concurrency = concurrency
        self._samples = samples
        self._server_ms: dict[str, float] = {}
        # The client's typed answers have no headers.
        self.client._http.event_hooks["response"].append(self._note)

    async def turn(self, session: str, history: int) -> None:
        """A turn as an agent takes it, then a fork, then a turn in which nothing is appended."""
        client = self.client
        resumed = await self._timed("resume", history, client.resume(session, tail=TAIL))
        if (shown := len(resumed.entries.data)) < min(TAIL, history) or not resumed.kv.valid:
            raise RuntimeError(f"{session} came back with {shown} entries, its KV {resumed.kv}")
        said = [message_entry(conversations.message(number)) for number in range(ADDED)]
        await self._timed("append", history, client.append(session, resumed.lease, said))
        suspended = await self._timed("suspend", history, client.suspend(session, resumed.lease))
        if suspended.kv.state is not KvState.DURABLE:
            raise RuntimeError(f"{session} was suspended, and its KV is {suspended.kv.state}")
        await self._timed("fork", history, client.fork(session, revision="*"))
        resumed = await self._timed(f"resume(tail={SHORT_TAIL})", history, client.resume(session, tail=SHORT_TAIL))
        await self._timed("suspend", history, client.suspend(session, resumed.lease))

    async def _timed(self, operation: str, history: int, request: Awaitable[T]) -> T:
        started_s = time.perf_counter()
        answer = await request
        times_ms = {"client": (time.perf_counter() - started_s) * 1000, "server": self._server_ms["total"]}
        engine_ms = self._server_ms.get("engine")
        for side, ms in times_ms.items():
            if engine_ms is None:
                self._samples.add(Case(OURS, operation, history, self._concurrency, side), ms)
            else:
                for name, without_ms in ((operation, engine_ms), (f"{operation} with engine", 0.0)):
                    case = Case(OURS, name, history, self._concurrency, side)
                    self._samples.add(case, ms - without_ms)
        return answer

    async def _note(self, response: httpx.Response) -> None:
        named = (part.strip().split(";dur=") for part in response.headers["Server-Timing"].split(","))
        self._server_ms = {name: float(ms) for name, ms in named}


@dataclass(frozen=True)
class Plan:
    """What is measured: ``sessions[length]`` sessions of each length, ``rounds`` turns at each length for every number
    of agents at once; then a load in ``load_rounds`` of ``load_s`` for every number of agents, on the shortest
    sessions. A ``crowd`` of so many sessions lives for ``crowd_s``, on a database of its own."""

    sessions: Mapping[int, int]
    concurrencies: Sequence[int]
    rounds: int
    load_rounds: int = 0
    load_s: float = 5.0
    crowd: int = 0
    crowd_s: float = 600.0

    @property
    def peer_sessions(self) -> dict[int, int]:
        return {length: count for length, count in self.sessions.items() if length <= PEERS_UP_TO}

    def rounds_of(self, agents: int) -> int:
        """Agents that work at once take several of their turns in one round."""
        return self.rounds if agents == 1 else min(BLOCKS, self.rounds)


class Measurement:
    """The service and its peers on one database, everything filled."""

    def __init__(self, plan: Plan, service_url: str, peers: Sequence[Peer], left_out: dict[str, str]):
        self.plan = plan
        self.samples = Samples()
        self.peers = list(peers)
        self._left_out = left_out
        self._service_url = service_url

    async def run(self, step: Callable[[], None]) -> None:
        for concurrency in self.plan.concurrencies:
            agents = [Agent(self._service_url, concurrency, self.samples) for _ in range(concurrency)]
            async with AsyncExitStack() as closing_all:
                for agent in agents:
                    await closing_all.enter_async_context(agent.client)
                await self._measure(agents, step)

    async def _measure(self, agents: Sequence[Agent], step: Callable[[], None]) -> None:
        own = {length: await self._shared_out(agents, length) for length in self.plan.sessions}
        rounds, peer_rounds = self.plan.rounds_of(len(agents)), PEER_ROUNDS if len(agents) == 1 else 2
        turns = max(1, self.plan.rounds // (rounds * len(agents)))
        for number in range(-min(WARM_UP, rounds), rounds):
            self.samples.counting = number >= 0
            for length in self.plan.sessions:
                await asyncio.gather(
                    *(
                        self._turns(agent, sessions, length, number * turns, turns)
                        for agent, sessions in zip(agents, own[length], strict=True)
                    )
                )
                if length in self.plan.peer_sessions and (number == -1 or number % peer_rounds == 0):
                    await self._peers(len(agents), length, number)
                if number >= 0:
                    step()

    async def _turns(self, agent: Agent, sessions: Sequence[str], length: int, first: int, count: int) -> None:
        for number in range(first, first + count):
            await agent.turn(sessions[number % len(sessions)], length)

    async def _shared_out(self, agents: Sequence[Agent], length: int) -> list[list[str]]:
        """Sessions of a length for each agent, since only one agent has a session's lease. If there are fewer sessions
        than agents, the agents take forks of them, whose history is as long."""
        found = conversations.names(length, self.plan.sessions[length])
        if len(found) < len(agents):
            found = [
                (await agent.client.fork(found[number % len(found)], revision="*")).id
                for number, agent in enumerate(agents)
            ]
        return [found[number :: len(agents)] for number in range(len(agents))]

    async def _peers(self, concurrency: int, length: int, number: int) -> None:
        called = conversations.names(length, self.plan.sessions[length])
        for peer in list(self.peers):
            operations = [*peer.reads, *peer.writes]
            first = number % len(operations)
            try:
                for operation in operations[first:] + operations[:first]:
                    case = Case(peer.name, operation, length, concurrency, "client")
                    await asyncio.gather(
                        *(
                            self._timed(peer, case, called[(number * concurrency + agent) % len(called)])
                            for agent in range(concurrency)
                        )
                    )
            except Exception as error:  # whatever another library raises: the others go on without it
                self.peers.remove(peer)
                self._left_out[peer.name] = f"{case.operation} at {length:,} entries, {concurrency} at once: {error!r}"

    async def _timed(self, peer: Peer, case: Case, conversation: str) -> None:
        started_s = time.perf_counter()
        await peer.run(case.operation, conversation, case.history)
        self.samples.add(case, (time.perf_counter() - started_s) * 1000)


def run(plan: Plan, chosen: Sequence[str], report: Path | None) -> None:
    """Measure on each of the ``chosen`` databases, print tables, and keep the raw result. Raises SettingsError for an
    unknown one, and where a load has fewer sessions than agents."""
    databases.require(chosen)
    if plan.sessions and plan.load_rounds and (most := max(plan.concurrencies)) > plan.sessions[min(plan.sessions)]:
        raise SettingsError(
            f"a load of {most} agents needs as many sessions of {min(plan.sessions)} entries: give more of them, "
            "or --load 0"
        )
    rows: list[dict[str, Any]] = []
    settings: dict[str, Any] = {
        "sessions": {str(length): count for length, count in plan.sessions.items()},
        "rounds": plan.rounds,
        "workers": Settings().workers,
        "load": {"rounds": plan.load_rounds, "seconds": plan.load_s},
        "crowd": {"sessions": plan.crowd, "seconds": plan.crowd_s},
        "engine": "a stand-in that answers every flush with durable at once",
        "filesystem": databases.filesystem(tempfile.gettempdir()),
        "durability": {},
        "versions": {"sqlite": sqlite3.sqlite_version},
        "left_out": {},
    }
    for name in chosen:
        with ExitStack() as stack:
            if (server := databases.entered(name, stack, settings["left_out"])) is None:
                continue
            progress = stack.enter_context(_progress())
            if plan.sessions:
                rows += asyncio.run(_on(name, plan, server, settings, progress))
            if plan.crowd:
                rows.append(_crowd(name, plan, server, progress))
    timed, at_once = ([row for row in rows if ("part" in row) == other] for other in (False, True))
    for table in [*tables(timed), *crowds.tables(at_once)]:
        console.print(table)
    for line in [*remarks(timed), *crowds.remarks(at_once), *_told(settings)]:
        console.print(line, highlight=False, markup=False)
    if report is not None:
        results.write(report, results.record("service", settings, rows))
        console.print(f"raw result written to {report}")


async def _on(
    name: str, plan: Plan, server: Server, settings: dict[str, Any], progress: Progress
) -> list[dict[str, Any]]:
    """The rows of one database. ``settings`` is told how durable each system's commits are there, of which versions
    they are, and who is left out."""
    durability: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    peers: list[Peer] = []
    entries = sum(length * count for length, count in plan.sessions.items())
    peers_entries = sum(length * count for length, count in plan.peer_sessions.items())
    async with AsyncExitStack() as stack:
        with tempfile.TemporaryDirectory(prefix="bench-") as home, stand_in.control() as endpoint:
            whole_url = server.create(OURS).render_as_string(hide_password=False)
            database = stack.enter_context(closing(Database(whole_url)))
            database.upgrade()
            engine = stand_in.engine(*endpoint, "http://127.0.0.1:30000/v1", conversations.MODEL)
            filling = progress.add_task(f"{name}: filling {OURS}", total=entries)
            conversations.fill(database, plan.sessions, engine, lambda count: progress.advance(filling, count))
            for peer in alternatives(name):
                filling = progress.add_task(f"{name}: filling {peer.name}", total=peers_entries)
                try:
                    peers.append(await stack.enter_async_context(peer))
                    await peer.open(server.create(peer.name.lower()))
                    await peer.fill(plan.peer_sessions, lambda count, task=filling: progress.advance(task, count))
                    durability[peer.name] = await server.durability(peer.scalar)
                    settings["versions"] |= peer.versions()
                except ImportError as error:
                    left_out[peer.name] = f"{error.name} is not installed: pip install 'agentstate[service-peers]'"
                    peers.remove(peer)
                    progress.remove_task(filling)
            server.settle()

            async def scalar(statement: str) -> Any:
                with database.write() as connection:
                    return connection.exec_driver_sql(statement).scalar_one()

            settings["durability"][name] = {OURS: await server.durability(scalar), **durability}
            settings["versions"] |= await server.versions(scalar)
            with _serving(whole_url, Path(home)) as service:
                with Client(service.service_url) as client:
                    conversations.check(database, client, min(plan.sessions), engine)
                measurement = Measurement(plan, service.service_url, peers, left_out)
                # Collecting garbage must not walk through what filling the databases left: an agent has none of it.
                gc.collect()
                gc.freeze()
                steps = sum(plan.rounds_of(agents) for agents in plan.concurrencies) * len(plan.sessions)
                measuring = progress.add_task(f"{name}: measuring", total=steps)
                await measurement.run(lambda: progress.advance(measuring))
            settings["left_out"] |= {f"{peer} on {name}": reason for peer, reason in left_out.items()}
            rows = measurement.samples.rows(name)
            if plan.load_rounds:
                rows += await _load(name, plan, whole_url, Path(home), progress)
            return rows


async def _load(name: str, plan: Plan, database_url: str, home: Path, progress: Progress) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    length = min(plan.sessions)
    sessions = conversations.names(length, plan.sessions[length])
    steps = len(plan.concurrencies) * plan.load_rounds * len(crowds.WORKERS)
    task = progress.add_task(f"{name}: load", total=steps)
    with ExitStack() as stack:
        services = {}
        for workers in crowds.WORKERS:
            service = stack.enter_context(_serving(database_url, home / f"workers-{workers}", workers))
            services[workers] = (service.service_url, service.group)
        for agents in plan.concurrencies:
            found = await crowds.load(
                services, sessions, agents, plan.load_rounds, plan.load_s, lambda: progress.advance(task)
            )
            rows += crowds.load_rows(name, agents, found)
    return rows


def _crowd(name: str, plan: Plan, server: Server, progress: Progress) -> dict[str, Any]:
    task = progress.add_task(f"{name}: filling", total=None)
    workers = max(crowds.WORKERS)
    with tempfile.TemporaryDirectory(prefix="bench-") as home, stand_in.control() as endpoint, ExitStack() as stack:
        url = server.create("crowd").render_as_string(hide_password=False)
        with closing(Database(url)) as database:
            database.upgrade()
            engine = stand_in.engine(*endpoint, "http://127.0.0.1:30000/v1", conversations.MODEL)
            conversations.fill(database, {SHORT_TAIL: plan.crowd}, engine, lambda count: None)
        server.settle()
        service = stack.enter_context(_serving(url, Path(home), workers))
        names = conversations.names(SHORT_TAIL, plan.crowd)
        found = uvloop.run(
            crowds.crowd(
                *(service.service_url, service.group, names, plan.crowd_s),
                lambda told: progress.update(task, description=f"{name}: {told}"),
            )
        )
    return found.row(name, workers)


@contextmanager
def _serving(database_url: str, home: Path, workers: int | None = None) -> Iterator[LocalService]:
    """A service with so many workers, or as many as the environment says."""
    # The stand-in sends no heartbeats.
    own = {"AGENTSTATE_DATABASE_URL": database_url, "AGENTSTATE_ENGINE_TIMEOUT_S": "86400"}
    if workers is not None:
        own["AGENTSTATE_WORKERS"] = str(workers)
    with closing(LocalService(home, service_port=free_port(), settings=own)) as service:
        service.start_service()
        yield service


# --- what is printed


def tables(rows: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """A table for each database and number of agents: p50 / p99 in milliseconds."""
    for database, concurrency in dict.fromkeys((row["database"], row["concurrency"]) for row in rows):
        shown = [row for row in rows if (row["database"], row["concurrency"]) == (database, concurrency)]
        lengths = sorted({row["history"] for row in shown})
        table = Table(
            "",
            *(Column(f"{length:,}", justify="right", no_wrap=True) for length in lengths),
            title=f"{database}, {concurrency} at once: p50 / p99 in ms by entries",
            padding=(0, 0),
        )
        for system, side in dict.fromkeys((row["system"], row["side"]) for row in shown):
            table.add_section()
            table.add_row(f"[bold]{system}[/], {side}")
            of = [row for row in shown if (row["system"], row["side"]) == (system, side)]
            for operation in dict.fromkeys(row["operation"] for row in of):
                figures = {row["history"]: row for row in of if row["operation"] == operation}
                table.add_row(operation, *(_figure(figures.get(length)) for length in lengths))
        yield table


def _figure(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    digits = 2 if row["p50_ms"] < 10 else 1 if row["p50_ms"] < 100 else 0
    return f"{row['p50_ms']:,.{digits}f} / {row['p99_ms']:,.{min(1, digits)}f}"


def remarks(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """How the figures of one agent compare: the longest history with the shortest, and a peer's whole reading."""
    p50_ms = {
        (row["database"], row["operation"], row["history"], row["side"]): row["p50_ms"]
        for row in rows
        if row["concurrency"] == 1
    }
    for database in dict.fromkeys(row["database"] for row in rows):
        for operation in ("resume", f"resume(tail={SHORT_TAIL})", "fork"):
            of = {key[2]: ms for key, ms in p50_ms.items() if key[:2] == (database, operation) and key[3] == "server"}
            if len(of) > 1:
                shortest, longest = min(of), max(of)
                yield (
                    f"{database}: {operation} at {longest:,} entries takes {of[longest] / of[shortest]:.2f} times what "
                    f"it takes at {shortest:,}"
                )
        whole = {key[2]: ms for key, ms in p50_ms.items() if key[:2] == (database, "get_items")}
        if whole:
            length = max(whole)
            at_client, at_server = (whole[length] / p50_ms[database, "resume", length, side] for side in SIDES)
            yield (
                f"{database}: get_items of {length:,} items takes {at_client:.1f} times what a resume takes at the "
                f"client, {at_server:.1f} times what it takes at the server"
            )


def _told(settings: Mapping[str, Any]) -> Iterator[str]:
    for database, systems in settings["durability"].items():
        for system, found in systems.items():
            shown = ", ".join(f"{name} = {value}" for name, value in found.items())
            yield f"{database}, {system}: {shown}, on {settings['filesystem']}"
    yield f"engine: {settings['engine']}"
    for name, reason in settings["left_out"].items():
        yield f"left out: {name}: {reason}"


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield progress
