"""`agentstate bench console`: what the console costs beside agents that work, on both databases.

A database has many sessions, of two tenants and in every state. A service process answers agents that append at a fixed
rate: each resumes a session, appends to it, suspends it, and goes on to the next, but for one, whose session grows. A
process stands in for the engine.

- *Requests*: the agents' requests while somebody looks at the console (`agentstate.benchmarks.viewers`), and while
  nobody does, in turn.
- *Statements*: what each page sends to the database, and one round of the stream, while the agents go on. Each is then
  sent again and again by a process that does nothing else.
- *First paint* of each page, while the agents pause.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import random
import statistics
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import sqlalchemy as sa
from rich.console import Console as Terminal
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from agentstate.api.app import create_app
from agentstate.api.console.room import Console
from agentstate.api.server import Server, listen
from agentstate.benchmarks import conversations, databases, results, stand_in, viewers
from agentstate.benchmarks.study import quantile
from agentstate.benchmarks.terminal import console
from agentstate.benchmarks.viewers import Viewer
from agentstate.cli.local import LocalService, free_port
from agentstate.client import AsyncClient
from agentstate.client import message as message_entry
from agentstate.fleet.engines import Engine
from agentstate.settings import Settings
from agentstate.sql.database import Database

ENTRIES = 4
"""Of each session at the start."""
APPENDED, APPENDS = 20, 4
"""An append has so many entries, and a turn so many appends."""
AGENTS = 10
OTHER_TENANT = "other"
# States, by how a session's name ends: of the other tenant's sessions, a hundredth has each, too.
_OTHERS = "7"
_RUNNING, _LAPSED = ("23", "17"), ("13", "27")
_SETTLE_S = 1.0
_TIMEOUT_S = 60.0
_RESAMPLES = 1000
QUERY_GOAL_MS, PAINT_GOAL_MS, RATIO_GOAL = 20.0, 300.0, 1.2
STREAM = "the stream, one round"
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """So many ``sessions`` are there, and ``entries_per_s`` are appended. In each of ``rounds``, the console is looked
    at for ``seconds``, and for as long it is not. Each statement is sent ``repeats`` times, and each page painted as
    often. The ``viewer`` is one of `viewers.KINDS`; empty: the best that is there."""

    sessions: int
    entries_per_s: float
    rounds: int
    seconds: float
    repeats: int
    viewer: str = ""


# --- what is there


def fill(database: Database, count: int, engine: Engine, advance: Callable[[int], None]) -> list[str]:
    """Write ``count`` sessions, a tenth of them another tenant's. A hundredth of each tenant's have turns that run, a
    hundredth turns that lapsed. Returns the names of the default tenant's others, which agents may run."""
    conversations.fill(database, {ENTRIES: count}, engine, advance)
    minute_us = 60 * 1_000_000

    def which(endings: Sequence[str]) -> str:
        named = " OR ".join(f"name LIKE '%{ending}'" for ending in endings)
        return f"IN (SELECT id FROM sessions WHERE {named})"

    with database.write() as connection:

        def run(statement: str) -> Any:
            return connection.execute(sa.text(statement))

        newest_us = run("SELECT max(turned_us) FROM session_turns").scalar_one()
        run(f"UPDATE sessions SET tenant = '{OTHER_TENANT}' WHERE id {which([_OTHERS])}")
        run(f"UPDATE session_turns SET tenant = '{OTHER_TENANT}' WHERE session_id {which([_OTHERS])}")
        run(f"UPDATE sessions SET status = 'running' WHERE id {which(_RUNNING + _LAPSED)}")
        for endings, until_us in ((_RUNNING, newest_us + 1440 * minute_us), (_LAPSED, newest_us - minute_us)):
            run(
                f"UPDATE leases SET expires_us = {until_us}, released_us = NULL, waits_for = NULL "
                f"WHERE session_id {which(endings)}"
            )
    taken = (_OTHERS, *_RUNNING, *_LAPSED)
    return [name for name in conversations.names(ENTRIES, count) if not name.endswith(taken)]


# --- agents that work


@dataclass
class Load:
    """`AGENTS` agents together append ``entries_per_s``, in appends that are due one after the other. While it is
    ``counting``, ``ms`` gets the time of each request, and ``appended`` the entries."""

    base_url: str
    entries_per_s: float
    names: Sequence[str]
    ms: list[float] = field(default_factory=list)
    appended: int = 0
    counting: bool = False
    _agents: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def watched(self) -> str:
        """The session that grows."""
        return self.names[0]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        others = itertools.cycle(self.names[1:])
        self._agents = [
            asyncio.create_task(self._agent(number, itertools.repeat(self.watched) if number == 0 else others))
            for number in range(AGENTS)
        ]
        try:
            yield
        finally:
            for agent in self._agents:
                agent.cancel()
            await asyncio.gather(*self._agents, return_exceptions=True)

    async def measured(self, seconds: float) -> tuple[list[float], float]:
        """Milliseconds of the requests of so many seconds, or of as many more as the first one takes, and entries
        appended a second. Raises what ends an agent."""
        self.ms, self.appended, self.counting = [], 0, True
        began_s = time.perf_counter()
        ended: set[asyncio.Task[None]] = set()
        while not (ended or self.ms):
            ended, _ = await asyncio.wait(self._agents, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        self.counting = False
        for agent in ended:
            agent.result()
        return self.ms, self.appended / (time.perf_counter() - began_s)

    async def _agent(self, number: int, names: Iterator[str]) -> None:
        period_s = APPENDED * AGENTS / self.entries_per_s
        loop = asyncio.get_running_loop()
        due_s = loop.time() + period_s * number / AGENTS
        places = itertools.count()
        async with AsyncClient(self.base_url, timeout_s=_TIMEOUT_S, retries=0) as client:
            for name in names:
                resumed = await self._timed(client.resume(name))
                for _ in range(APPENDS):
                    await asyncio.sleep(due_s - loop.time())
                    # Who is late does not hurry: the rate that was reached tells.
                    due_s = max(due_s + period_s, loop.time())
                    said = [message_entry(conversations.message(next(places))) for _ in range(APPENDED)]
                    await self._timed(client.append(name, resumed.lease, said))
                    self.appended += APPENDED
                await self._timed(client.suspend(name, resumed.lease))

    async def _timed(self, request: Awaitable[T]) -> T:
        began_s, counts = time.perf_counter(), self.counting
        answer = await request
        if counts and self.counting:
            self.ms.append((time.perf_counter() - began_s) * 1000)
        return answer


@dataclass
class Requests:
    """A list for each round: milliseconds of the agents' requests. ``fetched`` pages were answered to the viewer."""

    without: list[list[float]] = field(default_factory=list)
    beside: list[list[float]] = field(default_factory=list)
    entries_per_s: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    fetched: int = 0

    def rows(self, database: str, viewer: str) -> Iterator[dict[str, Any]]:
        for looked, rounds in ((False, self.without), (True, self.beside)):
            ms = sorted(itertools.chain.from_iterable(rounds))
            row: dict[str, Any] = {"part": "requests", "database": database, "viewer": viewer if looked else None}
            row |= {"requests": len(ms), "entries_per_s": round(statistics.mean(self.entries_per_s[looked]), 1)}
            for name, share in _SHARES.items():
                row[f"{name}_ms"] = round(quantile(ms, share), 3)
                if looked:
                    row[f"{name}_ratio"], row[f"{name}_ratio_95"] = ratio(self.without, self.beside, share)
            if looked:
                row["fetched"] = self.fetched
            yield row


_SHARES = {"p50": 0.5, "p99": 0.99}
# Of the times of a statement. What else the machine does is in all but the best.
_TIMES = ("best", "p50", "worst")


def ratio(
    without: Sequence[Sequence[float]], beside: Sequence[Sequence[float]], share: float, seed: int = 0
) -> tuple[float, list[float]]:
    """A quantile of all of ``beside`` over that of all of ``without``, and its 95 % interval, by drawing rounds."""
    draw, count = random.Random(seed), len(without)

    def of(rounds: Sequence[int]) -> float:
        ours, theirs = (
            quantile(sorted(itertools.chain.from_iterable(some[number] for number in rounds)), share)
            for some in (beside, without)
        )
        return ours / theirs

    found = sorted(of(draw.choices(range(count), k=count)) for _ in range(_RESAMPLES if count > 1 else 1))
    return round(of(range(count)), 3), [round(quantile(found, edge), 3) for edge in (0.025, 0.975)]


async def compare(
    load: Load, looking: Viewer, urls: Sequence[str], plan: Plan, step: Callable[[str], None]
) -> Requests:
    """The agents' requests while ``looking`` and without, in turn, each first in every other round."""
    found = Requests()
    for number in range(plan.rounds):
        for looked in (bool(number % 2), not number % 2):
            step(f"round {number + 1} of {plan.rounds}, {'a' if looked else 'no'} console open")
            if looked:
                await looking.open(urls)
                found.fetched -= looking.fetched
            try:
                await asyncio.sleep(min(_SETTLE_S, plan.seconds))
                ms, entries_per_s = await load.measured(plan.seconds)
            finally:
                if looked:
                    await looking.close()
            (found.beside if looked else found.without).append(ms)
            found.entries_per_s[looked].append(entries_per_s)
            found.fetched += looking.fetched if looked else 0
    return found


# --- what pages send to the database


Statement = tuple[str, Any]


@contextmanager
def sent() -> Iterator[list[Statement]]:
    """What this process sends to databases, with parameters, but for the beginnings of transactions."""
    found: list[Statement] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if not statement.startswith("BEGIN"):
            values = dict(parameters) if isinstance(parameters, dict) else dict(enumerate(parameters))
            plain = {name: _plain(value) for name, value in values.items()}
            found.append((statement, plain if isinstance(parameters, dict) else tuple(plain.values())))

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)


def _plain(value: Any) -> Any:
    """Without what a driver wraps bytes in, which cannot be passed to another process."""
    return bytes(getattr(value, "obj", value)) if isinstance(value, memoryview) or hasattr(value, "obj") else value


def pages(watched: str, engine: Engine) -> dict[str, str]:
    """The console's pages, by what they are."""
    one = f"/sessions/{watched}"
    return {
        "overview": "/",
        "sessions": "/sessions",
        "sessions, the longest wait first": "/sessions?sort=oldest",
        "sessions by id": "/sessions?sort=id",
        "sessions, found": "/sessions?search=bench-4-9",
        "sessions, running": "/sessions?state=running",
        "sessions, lapsed": "/sessions?state=lapsed",
        "a session": one,
        "a session, to be deleted": f"{one}/do/delete",
        "engines": "/engines",
        "an engine": f"/engines/{engine.id}",
        "stores": "/stores",
        "tenants": "/tenants",
    }


def statements(
    database_url: str, home: Path, paths: Mapping[str, str]
) -> tuple[dict[str, list[Statement]], dict[str, float]]:
    """What each page sends to the database, asked of a service in this process that has seen nothing before; what the
    stream sends until it says that there is something new (`STREAM`); and the milliseconds that each page takes."""
    settings = Settings(
        home=home, database_url=database_url, engine_timeout_s=86_400, foresight=False, collect_interval_s=0
    )
    found: dict[str, list[Statement]] = {}
    ms: dict[str, float] = {}
    with _served(settings) as (app, base_url), httpx.Client(base_url=base_url, timeout=_TIMEOUT_S) as http:
        http.get("/healthz").raise_for_status()  # it has started
        for name, path in paths.items():
            app.state.console = Console(app.state.service)
            with sent() as of_page:
                began_s = time.perf_counter()
                http.get(path).raise_for_status()
                ms[name] = (time.perf_counter() - began_s) * 1000
            found[name] = list(of_page)
        app.state.console = Console(app.state.service)
        with sent() as of_stream, http.stream("GET", "/console/stream") as stream:
            kinds = (line for line in stream.iter_lines() if line.startswith("event:"))
            while next(kinds) != "event: news":
                pass
            found[STREAM] = list(of_stream)
        app.state.console.close()
    return found, ms


@contextmanager
def _served(settings: Settings) -> Iterator[tuple[Any, str]]:
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    app = create_app(settings.model_copy(update={"port": port}))
    server = Server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield app, f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def times_ms(database_url: str, wanted: Sequence[Statement], repeats: int) -> list[list[float]]:
    """How long each statement takes until all of its rows are there, ``repeats`` times."""
    found: list[list[float]] = []
    with closing(Database(database_url)) as database, database.read() as connection:
        for statement, parameters in wanted:
            of_statement = []
            for _ in range(repeats):
                began_s = time.perf_counter()
                connection.exec_driver_sql(statement, parameters).fetchall()
                of_statement.append((time.perf_counter() - began_s) * 1000)
            found.append(of_statement)
    return found


def page_rows(
    database: str,
    found: Mapping[str, Sequence[Statement]],
    ms: Mapping[str, Sequence[Sequence[float]]],
    answered_ms: Mapping[str, float],
    painted_ms: Mapping[str, Sequence[float]],
) -> Iterator[dict[str, Any]]:
    """A row a page: its statements with their times, how long it took to be answered, and to be painted."""
    for name, wanted in found.items():
        timed = [
            {
                "sql": " ".join(sql.split()),
                "best_ms": round(min(of), 3),
                "p50_ms": round(statistics.median(of), 3),
                "worst_ms": round(max(of), 3),
            }
            for (sql, _), of in zip(wanted, ms[name], strict=True)
        ]
        row: dict[str, Any] = {"part": "pages", "database": database, "page": name, "statements": timed}
        if name in answered_ms:
            row["answered_ms"] = round(answered_ms[name], 2)
        if painted := painted_ms.get(name):
            row |= {"paint_p50_ms": round(statistics.median(painted), 1), "paint_worst_ms": round(max(painted), 1)}
        yield row


# --- the run


def run(plan: Plan, chosen: Sequence[str], report: Path | None) -> None:
    """Measure on each of the ``chosen`` databases, print tables, and keep the raw result. Raises SettingsError for an
    unknown database or viewer."""
    databases.require(chosen)
    viewers.require(plan.viewer)
    rows: list[dict[str, Any]] = []
    settings: dict[str, Any] = {
        "plan": vars(plan),
        "engine": "a stand-in that answers at once",
        "filesystem": databases.filesystem(tempfile.gettempdir()),
        "left_out": {},
    }
    for name in chosen:
        with ExitStack() as stack:
            if (server := databases.entered(name, stack, settings["left_out"])) is None:
                continue
            rows += asyncio.run(_on(name, plan, server, stack.enter_context(_progress(name))))
    for table in tables(rows):
        console.print(table)
    for line in [*remarks(rows, plan), *(f"left out: {name}: {why}" for name, why in settings["left_out"].items())]:
        console.print(line, highlight=False, markup=False)
    if report is not None:
        results.write(report, results.record("console", settings, rows))
        console.print(f"raw result written to {report}")


async def _on(name: str, plan: Plan, server: databases.Server, step: Callable[[str], None]) -> list[dict[str, Any]]:
    async with AsyncExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        endpoint = stack.enter_context(stand_in.control())
        looking = await stack.enter_async_context(viewers.viewer(plan.viewer))
        url = server.create("agentstate").render_as_string(hide_password=False)
        engine = stand_in.engine(*endpoint, "http://127.0.0.1:30000/v1", conversations.MODEL)
        with closing(Database(url)) as database:
            database.upgrade()
            done = 0

            def advance(entries: int) -> None:
                nonlocal done
                done += entries
                step(f"filling: {done // ENTRIES:,} of {plan.sessions:,} sessions")

            names = fill(database, plan.sessions, engine, advance)
        server.settle()
        # The stand-in sends no heartbeats.
        own = {"AGENTSTATE_DATABASE_URL": url, "AGENTSTATE_ENGINE_TIMEOUT_S": "86400"}
        service = stack.enter_context(closing(LocalService(home / "service", service_port=free_port(), settings=own)))
        service.start_service()
        load = Load(service.service_url, plan.entries_per_s, names)
        paths = pages(load.watched, engine)
        tabs = [f"{service.service_url}{paths[page]}" for page in ("overview", "sessions", "a session")]
        async with load.running():
            requests = await compare(load, looking, tabs, plan, step)
            step("statements")
            found, answered_ms = await asyncio.to_thread(statements, url, home / "beside", paths)
            wanted = [one for of_page in found.values() for one in of_page]
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as apart:
                timed = iter(await asyncio.wrap_future(apart.submit(times_ms, url, wanted, plan.repeats)))
        ms = {page: list(itertools.islice(timed, len(of_page))) for page, of_page in found.items()}
        painted: dict[str, list[float]] = {}
        for page, path in paths.items():
            step(f"first paint of {page}")
            for _ in range(plan.repeats):
                if (paint_ms := await looking.first_paint_ms(f"{service.service_url}{path}")) is not None:
                    painted.setdefault(page, []).append(paint_ms)
        return [*requests.rows(name, looking.kind), *page_rows(name, found, ms, answered_ms, painted)]


@contextmanager
def _progress(name: str) -> Iterator[Callable[[str], None]]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Terminal(stderr=True), refresh_per_second=1) as progress:
        task = progress.add_task(name, total=None)
        yield lambda told: progress.update(task, description=f"{name}: {told}")


# --- what is printed


def tables(rows: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """One of the agents' requests, one of the pages."""
    requests = Table(
        *("database", "console"),
        *(Column(name, justify="right") for name in ("requests", "entries/s", "p50", "p99")),
        *(Column(name, justify="right") for name in ("p50 ÷ without (95 %)", "p99 ÷ without (95 %)", "goal")),
        title="The agents' requests, ms",
        padding=(0, 0),
    )
    shown = Table(
        *("database", "page"),
        *(Column(name, justify="right") for name in ("statements", "slowest best / p50 / worst", "goal", "answered")),
        *(Column(name, justify="right") for name in ("first paint p50 / worst", "goal")),
        title="Pages: what they send to the database, and how long it takes, ms",
        padding=(0, 0),
    )
    for row in rows:
        if row["part"] == "requests":
            cells = [row["database"], f"seen by {row['viewer']}" if row["viewer"] else "not open"]
            cells += [f"{row['requests']:,}", f"{row['entries_per_s']:,.0f}"]
            cells += [f"{row['p50_ms']:.2f}", f"{row['p99_ms']:.2f}"]
            if row["viewer"]:
                for name in _SHARES:
                    low, high = row[f"{name}_ratio_95"]
                    cells.append(f"{row[f'{name}_ratio']:.2f} ({low:.2f}–{high:.2f})")
                cells.append(f"{RATIO_GOAL}")
            requests.add_row(*cells)
            continue
        slowest = (max((one[f"{name}_ms"] for one in row["statements"]), default=0.0) for name in _TIMES)
        times = " / ".join(f"{ms:.1f}" for ms in slowest)
        cells = [row["database"], row["page"], str(len(row["statements"])), times]
        cells += [f"{QUERY_GOAL_MS:.0f}", f"{row['answered_ms']:.1f}" if "answered_ms" in row else ""]
        if "paint_p50_ms" in row:
            cells += [f"{row['paint_p50_ms']:.0f} / {row['paint_worst_ms']:.0f}", f"{PAINT_GOAL_MS:.0f}"]
        shown.add_row(*cells)
    yield from (table for table in (requests, shown) if table.row_count)


def remarks(rows: Sequence[dict[str, Any]], plan: Plan) -> Iterator[str]:
    """What misses a goal, and what makes a figure worth less than it looks."""
    for row in rows:
        if row["part"] == "requests":
            if row["entries_per_s"] < 0.95 * plan.entries_per_s:
                reached = f"{row['entries_per_s']:,.0f} entries a second were reached"
                yield f"{row['database']}: {reached}, not {plan.entries_per_s:,.0f}"
            if row["viewer"] and row["p99_ratio"] > RATIO_GOAL:
                yield f"{row['database']}: with a console open p99 is {row['p99_ratio']:.2f} times as long"
            continue
        for one in row["statements"]:
            if one["p50_ms"] > QUERY_GOAL_MS:
                yield f"{row['database']}, {row['page']}: {one['p50_ms']:.1f} ms for {one['sql'][:300]}"
        if row.get("paint_p50_ms", 0.0) > PAINT_GOAL_MS:
            yield f"{row['database']}, {row['page']}: painted after {row['paint_p50_ms']:.0f} ms"
