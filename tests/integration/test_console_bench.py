"""What `agentstate bench console` measures on, and that it measures what it says."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from stage import PATIENCE_S, Peer, Service, register, serving
from tools import missing, tool

from agentstate.api import gate
from agentstate.api.console import reading, snapshot
from agentstate.benchmarks import console, conversations, viewers
from agentstate.benchmarks.console import ENTRIES, OTHER_TENANT, STREAM, Load
from agentstate.errors import SettingsError
from agentstate.fleet.engines import Engine
from agentstate.settings import Settings

COMMAND = [sys.executable, "-m", "agentstate.cli", "bench", "console"]
SESSIONS = 1000


def answering(request: dict[str, Any]) -> dict[str, Any]:
    tiers = {name: {"tokens": 64, "bytes": 1024} for name in ("device", "host", "disk")}
    said: dict[str, dict[str, Any]] = {
        "stat": {"off": None},
        "explain": {"tiers": tiers, "wait": None},
        "decisions": {"decisions": [], "more": False},
    }
    return {"ok": True, **said.get(request["verb"], {"state": "durable", "tokens": 64, "pages": 1, "bytes": 1024})}


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "ASK_S", PATIENCE_S)
    monkeypatch.setattr(console, "_TIMEOUT_S", float(PATIENCE_S))


@pytest.fixture
def service(peers: list[Peer], database_url: str, tmp_path: Path) -> Iterator[Service]:
    """One that sends nothing to the database but what it is asked for."""
    settings = Settings(
        home=tmp_path, database_url=database_url, engine_timeout_s=3600, foresight=False, collect_interval_s=0
    )
    with serving(settings) as running:
        yield running


@pytest.fixture
def engine(service: Service, start_peer: Callable[..., Peer]) -> Engine:
    return register(service.database, start_peer(answering).address, model=conversations.MODEL)


@pytest.fixture
def names(service: Service, engine: Engine) -> list[str]:
    return console.fill(service.database, SESSIONS, engine, lambda written: None)


def test_there_are_sessions_of_two_tenants_in_every_state(service: Service, names: list[str]) -> None:
    with service.database.read() as connection:
        mine, theirs = (reading.counts(connection, tenant) for tenant in ("default", OTHER_TENANT))
    assert (mine.all, mine.running, mine.lapsed) == (900, 10, 10)
    assert (theirs.all, theirs.running, theirs.lapsed) == (100, 10, 10)
    assert len(names) == 880
    listed = service.http.get("/v1/overview/sessions").json()["data"]
    turned = [one["turned_at"] for one in listed]
    assert turned == sorted(turned, reverse=True) and len(set(turned)) == len(turned)


def test_agents_append_at_the_rate_that_is_asked_of_them(service: Service, names: list[str]) -> None:
    async def work() -> list[float]:
        load, ms, appended = Load(service.base_url, 10_000, names), list[float](), 0
        async with load.running():
            while appended < 400 or len(service.client.entries(load.watched).data) == ENTRIES:
                more, rate = await load.measured(0.2)
                ms += more
                appended += load.appended
                assert load.appended % console.APPENDED == 0 and (rate > 0) == (load.appended > 0)
        return ms

    ms = asyncio.run(work())
    # Turns begin and end as well, but nobody waits for an append in fewer than one request.
    assert len(ms) > 0 and min(ms) > 0


def test_what_ends_an_agent_ends_the_measurement(service: Service) -> None:
    async def work() -> None:
        load = Load(service.base_url, 10_000, ["none", "nor this"])
        async with load.running():
            await load.measured(PATIENCE_S)

    with pytest.raises(Exception, match="no session none|no session nor this"):
        asyncio.run(work())


def test_pages_and_the_stream_send_as_many_statements_whatever_there_is(
    service: Service, engine: Engine, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Who asks is looked up by the first page only, and no page is overtaken by a second snapshot.
    monkeypatch.setattr(gate, "TRUST_S", 3600.0)
    monkeypatch.setattr(snapshot, "PERIOD_S", 3600.0)
    paths = console.pages(names[0], engine)
    url = service.app.state.service.settings.sqlalchemy_url
    few, ms = console.statements(url, tmp_path / "few", paths)
    assert set(few) == {*paths, STREAM} and set(ms) == set(paths)
    conversations.fill(service.database, {5: 2 * SESSIONS}, engine, lambda written: None)
    many, _ = console.statements(url, tmp_path / "many", paths)
    assert {page: len(found) for page, found in many.items()} == {page: len(found) for page, found in few.items()}
    # The first page also finds out that nobody needs a key.
    assert min(map(len, many.values())) > 0 and max(map(len, many.values())) <= 20
    # What pages have sent is what is timed: nothing of it writes.
    wanted = [one for of_page in many.values() for one in of_page]
    times = console.times_ms(url, wanted, repeats=2)
    assert [len(of) for of in times] == [2] * len(wanted) and min(map(min, times)) > 0


def test_a_client_asks_for_what_tabs_would(service: Service, names: list[str]) -> None:
    urls = [f"{service.base_url}{path}" for path in ("/", f"/sessions/{names[0]}")]

    async def look() -> int:
        async with viewers.viewer("client") as looking:
            await looking.open(urls)
            assert service.app.state.console.snapshots.watching == 1
            while looking.fetched < 4:
                await asyncio.sleep(0.02)
            await looking.close()
            assert await looking.first_paint_ms(urls[0]) is None
            return looking.fetched

    assert asyncio.run(look()) >= 4

    async def look_at_nothing() -> None:
        async with viewers.viewer("client") as looking:
            await looking.open([f"{service.base_url}/sessions/none"])

    with pytest.raises(httpx.HTTPStatusError, match="404"):
        asyncio.run(look_at_nothing())


def test_a_browser_paints_and_follows(service: Service, names: list[str]) -> None:
    tool("chromium", "chromium-browser", "google-chrome")
    try:
        import playwright  # noqa: F401
    except ImportError:
        missing("no Playwright: install playwright")
    urls = [f"{service.base_url}{path}" for path in ("/", "/sessions")]

    async def look() -> float | None:
        async with viewers.viewer() as looking:
            assert looking.kind == "chromium"
            await looking.open(urls)
            while looking.fetched < 5:
                await asyncio.sleep(0.02)
            assert service.app.state.console.snapshots.watching == 1
            await looking.close()
            return await looking.first_paint_ms(urls[0])

    assert (asyncio.run(look()) or 0) > 0


def test_what_was_measured_is_printed_and_kept(tmp_path: Path) -> None:
    report = tmp_path / "console.json"
    arguments = ["--databases", "sqlite", "--sessions", str(SESSIONS), "--entries", "200", "--rounds", "2"]
    arguments += ["--seconds", "1", "--repeats", "2", "--viewer", "client", "--json", str(report)]
    run = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert run.returncode == 0, run.stderr
    result = json.loads(report.read_text())
    assert result["kind"] == "console" and result["settings"]["left_out"] == {}
    without, beside, *shown = result["rows"]
    assert (without["part"], without["viewer"], beside["viewer"]) == ("requests", None, "client")
    assert without["requests"] > 0 and beside["requests"] > 0 and beside["fetched"] >= 0
    low, high = beside["p99_ratio_95"]
    assert 0 < low <= high
    assert [row["page"] for row in shown] == [*console.pages("s", Engine("e", "n", 0, "", "", "", "", "")), STREAM]
    assert all(row["statements"] for row in shown)
    for said in ("The agents' requests", "seen by client", "Pages", "an engine", STREAM):
        assert said in run.stdout, said


@pytest.mark.parametrize(
    ("arguments", "named"), [(["--databases", "oracle"], "oracle"), (["--viewer", "lynx"], "lynx")], ids=str
)
def test_what_cannot_be_measured_is_refused_in_one_line(arguments: list[str], named: str) -> None:
    run = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True)
    assert run.returncode == 1
    assert len(run.stderr.strip().splitlines()) == 1 and named in run.stderr


def test_there_is_no_other_viewer() -> None:
    async def look() -> None:
        async with viewers.viewer("lynx"):
            pass

    with pytest.raises(SettingsError, match="lynx"):
        asyncio.run(look())
