"""`agentstate top` beside a real service: its screens, driven by Textual's pilot, and what it prints once.

With ``AGENTSTATE_TEST_PICTURES=DIRECTORY`` the pictures of the documentation are taken anew.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from documented import checked
from stage import MODEL, PATIENCE_S, Service, register, serving, stored
from textual.pilot import Pilot
from textual.widgets import DataTable, Static
from typer.testing import CliRunner

from agentstate.api import gate
from agentstate.api.console import snapshot
from agentstate.cli import top, top_rows
from agentstate.cli.local import free_port
from agentstate.cli.main import app
from agentstate.cli.top_app import Confirm, Lists, Top
from agentstate.cli.top_rows import Choice
from agentstate.client import AsyncClient, message
from agentstate.errors import RequestRefused, ServiceUnreachable, SettingsError, Unauthenticated
from agentstate.fleet import manifests
from agentstate.fleet.manifests import Manifest
from agentstate.sessions import tenants
from agentstate.sessions.tenants import Role
from agentstate.settings import Settings

PICTURES = os.environ.get("AGENTSTATE_TEST_PICTURES")
HOSTILE = "\x1b[2J\u202e[bold]evil[/bold]"
NAMES = ("agent-docs", "agent-research", "ci-review-0412", "ci-review-0413")
STAT = {
    "ok": True,
    "off": None,
    "store": {"pages": 900, "extents": 41, "bytes": 8_589_934_592},
    "restore": {"restores": 7, "bytes_read": 9000, "pages_failed": 0},
    "accounts": {
        "tenant default": {
            "device": {"bytes": 424_673_280, "limit": None},
            "host": {"bytes": 141_557_760, "limit": None},
            "nvme": {"bytes": 8_589_934_592, "limit": None},
        }
    },
}
STATES = {"demote": "demoted", "prefetch": "warm", "flush": "durable"}
EXPLAINED = {
    "ok": True,
    "tiers": {name: {"tokens": 18432, "bytes": 424_673_280} for name in ("device", "host", "disk")},
    "wait": {"state": "waits", "kind": "tool", "waited_s": 4.0, "rest_p50_s": 3.0, "rest_p90_s": None},
    "index": 0.25,
    "place": 2,
}


@pytest.fixture
def backend() -> str:
    """It is the same whatever database the service has."""
    return "sqlite"


@pytest.fixture(autouse=True)
def distrustful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "TRUST_S", 0.0)
    monkeypatch.setattr(snapshot, "ASK_S", PATIENCE_S)


def answering(request: dict[str, Any]) -> dict[str, Any]:
    said = {"stat": STAT, "explain": EXPLAINED, "decisions": {"ok": True, "decisions": [], "more": False}}
    pinned = {"ok": True, "state": "accepted", "tier": "device", "tokens": 64, "pages": 1, "bytes": 1000}
    said["pin"] = pinned
    verb = request["verb"]
    return said[verb] if verb in said else stored(STATES[verb])


@pytest.fixture
def fleet(service: Service, start_peer: Any) -> Service:
    """Four sessions, and an engine that has the KV of each."""
    engine = register(service.database, start_peer(answering).address)
    for number, name in enumerate(NAMES):
        service.client.create_session(MODEL, id=name)
        with service.client.turn(name) as turn:
            turn.append(message({"role": "user", "content": "Review it." if number else f"What is a page? {HOSTILE}"}))
        keys, tokens = bytes(32 * 9 * (number + 1)), 64 * 9 * (number + 1)
        with service.database.write() as connection:
            uid = connection.exec_driver_sql("SELECT id FROM sessions WHERE name = ?", (name,)).scalar_one()
            manifests.save(
                connection,
                Manifest(uid, engine.fingerprint, 0, engine.node, engine.id, 64, tokens, keys, tokens * 23040),
            )
    return service


Script = Callable[[Top, Pilot[None]], Awaitable[None]]


def play(
    where: str, script: Script, *, choice: Choice | None = None, size: tuple[int, int] = (80, 24), **more: Any
) -> None:
    """Run the screens without a terminal, as ``script`` says."""
    key, read_only = more.get("api_key"), more.get("read_only", False)

    async def played() -> None:
        screens = Top(
            lambda: AsyncClient(where, api_key=key, retries=0, timeout_s=PATIENCE_S),
            where,
            choice or Choice(),
            0.2,
            read_only=read_only,
        )
        async with screens.run_test(size=size) as pilot:
            await script(screens, pilot)

    asyncio.run(played())


async def until(pilot: Pilot[None], so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not so():
        assert time.monotonic() < deadline_s, drawn(pilot.app)
        await pilot.pause(0.05)


def text(screens: Any, of: str) -> str:
    found = screens.screen.query(of)
    return str(found.first(Static).render()) if found else ""


def rows(screens: Any) -> list[list[str]]:
    table = screens.screen.query_one("#table", DataTable)
    return [[str(cell) for cell in table.get_row_at(number)] for number in range(table.row_count)]


def ids(screens: Any) -> list[str]:
    return [row[top_rows.SESSION_COLUMNS.index("id")] for row in rows(screens)]


def drawn(screens: Any) -> str:
    """What the terminal shows."""
    return "\n".join("".join(segment.text for segment in strip) for strip in screens.screen._compositor.render_strips())


async def picture(screens: Top, pilot: Pilot[None], name: str) -> None:
    if PICTURES:
        await until(pilot, lambda: "Copy id" in drawn(screens) or isinstance(screens.screen, Confirm))
        # Without the fonts that it would load from elsewhere.
        drawing = re.sub(r"@font-face\s*\{.*?\}|<!--.*?-->", "", screens.export_screenshot(), flags=re.DOTALL)
        assert "url(http" not in drawing and "src:" not in drawing
        Path(PICTURES).mkdir(parents=True, exist_ok=True)
        Path(PICTURES, f"{name}.svg").write_text(drawing)


# --- the screens


def test_sessions_are_listed_ordered_and_filtered(fleet: Service) -> None:
    async def script(screens: Top, pilot: Pilot[None]) -> None:
        await until(pilot, lambda: ids(screens) == [*reversed(NAMES)])
        assert "4 sessions" in text(screens, "#title") and "device 424.7 MB" in text(screens, "#title")
        assert rows(screens)[0][:1] == ["suspended"] and "user_wait" in rows(screens)[0]
        await pilot.press("s")
        await until(pilot, lambda: ids(screens) == [*NAMES])
        assert "the longest wait first" in text(screens, "#head")
        await pilot.press("down", "down")
        await until(pilot, lambda: screens.screen.row == NAMES[2])
        fleet.client.create_session(MODEL, id="zebra")
        await until(pilot, lambda: len(ids(screens)) == 5)
        assert screens.screen.row == NAMES[2], "the cursor stays on what it is on"
        await pilot.press("slash", *"ci-", "enter")
        await until(pilot, lambda: ids(screens) == [*NAMES[2:]])
        await pilot.press("escape")
        await until(pilot, lambda: len(ids(screens)) == 5)
        await pilot.press("t")
        await until(pilot, lambda: ids(screens) == [])
        assert "running only" in text(screens, "#head")

    play(fleet.base_url, script)


def test_lists_go_on(fleet: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentstate.api.console import reading

    monkeypatch.setattr(reading, "PAGE", 3)

    async def script(screens: Top, pilot: Pilot[None]) -> None:
        await until(pilot, lambda: ids(screens) == [*NAMES[:3]])
        assert "n: more" in text(screens, "#head")
        await pilot.press("n")
        await until(pilot, lambda: ids(screens) == [NAMES[3]])
        assert "part 2" in text(screens, "#head")
        await pilot.press("n", "b")
        await until(pilot, lambda: ids(screens) == [*NAMES[:3]])

    play(fleet.base_url, script, choice=Choice(sort="id"))


def test_engines_tiers_and_tenants(fleet: Service) -> None:
    async def script(screens: Top, pilot: Pilot[None]) -> None:
        await pilot.press("2")
        await until(pilot, lambda: bool(rows(screens)) and rows(screens)[0][0] == "live")
        assert "8.6 GB" in rows(screens)[0]
        await pilot.press("enter")
        await until(pilot, lambda: "stored_bytes: 8589934592" in text(screens, "#told"))
        assert screens.active_bindings.get("p") is None or not screens.active_bindings["p"].enabled
        await pilot.press("escape", "3")
        await until(pilot, lambda: [row[0] for row in rows(screens)] == ["device", "host", "nvme"])
        await pilot.press("s", "s")
        await until(pilot, lambda: [row[0] for row in rows(screens)] == ["nvme", "device", "host"])
        await pilot.press("slash", *"host", "enter")
        await until(pilot, lambda: [row[0] for row in rows(screens)] == ["host"])
        await pilot.press("4")
        await until(pilot, lambda: "the first key makes one" in text(screens, "#head"))
        await pilot.press("1")
        await until(pilot, lambda: len(ids(screens)) == 4)

    play(fleet.base_url, script, size=(120, 24))


def test_an_administrator_sees_tenants(fleet: Service) -> None:
    with fleet.database.write() as connection:
        admin = tenants.create_key(connection, "default", role=Role.ADMIN).secret

    async def script(screens: Top, pilot: Pilot[None]) -> None:
        await pilot.press("4")
        await until(pilot, lambda: [row[:2] for row in rows(screens)] == [["default", "4"]])

    play(fleet.base_url, script, api_key=admin)


def test_a_session_is_shown_and_its_text_steers_nothing(fleet: Service) -> None:
    async def script(screens: Top, pilot: Pilot[None]) -> None:
        await until(pilot, lambda: len(ids(screens)) == 4)
        await picture(screens, pilot, "top-sessions")
        await pilot.press("enter")
        await until(pilot, lambda: "Review it." in text(screens, "#told"))
        await until(pilot, lambda: "p Prefetch" in drawn(screens))
        await picture(screens, pilot, "top-session")
        await pilot.press("c")
        await until(pilot, lambda: screens.clipboard == NAMES[3])
        await pilot.press("escape", "down", "down", "down", "enter")
        await until(pilot, lambda: "What is a page?" in text(screens, "#told"))
        told = text(screens, "#told")
        assert "\\x1b[2J\\u202e[bold]evil[/bold]" in told and "\x1b" not in drawn(screens)
        assert "18,432 tokens" in told and "waits for a tool" in told
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(screens.screen, Lists))

    play(fleet.base_url, script, size=(100, 20))


@pytest.mark.parametrize(
    ("key", "command", "said"),
    [
        ("p", f"sessions prefetch {NAMES[0]} --tier host", "prefetch: operation op_"),
        ("d", f"sessions demote {NAMES[0]}", "demote: operation op_"),
        ("i", f"sessions pin {NAMES[0]} --tier device --for 2h", "pin: accepted, 64 tokens on device"),
        ("u", f"sessions unpin {NAMES[0]}", "the pin was ended"),
        ("k", f"sessions fork {NAMES[0]}", "the fork is ses_"),
    ],
)
def test_actions_are_done_once_they_are_meant(fleet: Service, key: str, command: str, said: str) -> None:
    async def script(screens: Top, pilot: Pilot[None]) -> None:
        await until(pilot, lambda: len(ids(screens)) >= 4)
        await pilot.press(key)
        await until(pilot, lambda: isinstance(screens.screen, Confirm))
        asked = " ".join(str(screens.screen.query_one(Static).render()).split())
        assert f"agentstate {command}" in asked and "576 tokens stored" in asked
        if key == "p":
            await picture(screens, pilot, "top-confirm")
        await pilot.press("n")
        await until(pilot, lambda: isinstance(screens.screen, Lists))
        assert text(screens, "#note") == ""
        await pilot.press(key)
        await until(pilot, lambda: isinstance(screens.screen, Confirm))
        await pilot.press("y")
        await until(pilot, lambda: said in text(screens, "#note"))

    play(fleet.base_url, script, choice=Choice(sort="id"))
    # What a key does is what its command does.
    assert CliRunner().invoke(app, [*command.split(), "--url", fleet.base_url]).exit_code == 0
    assert len(fleet.client.list_sessions().data) == (6 if key == "k" else 4)


def test_a_viewer_and_the_read_only_change_nothing(fleet: Service) -> None:
    with fleet.database.write() as connection:
        viewer = tenants.create_key(connection, "default", role=Role.VIEWER).secret

    async def tried(screens: Top, pilot: Pilot[None]) -> None:
        await until(pilot, lambda: len(ids(screens)) == 4)
        await pilot.press("k")
        await until(pilot, lambda: isinstance(screens.screen, Confirm) or text(screens, "#note") != "")
        if isinstance(screens.screen, Confirm):
            await pilot.press("y")
        await until(pilot, lambda: text(screens, "#note") != "")
        note = text(screens, "#note")
        assert "--read-only" in note or ("not done" in note and "viewer" in note)
        await pilot.press("4")
        await until(pilot, lambda: "role admin" in text(screens, "#head"))

    play(fleet.base_url, tried, api_key=viewer)
    play(fleet.base_url, tried, api_key=viewer, read_only=True)
    with fleet.database.read() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM sessions").scalar_one() == 4


def test_what_is_out_of_date_says_so_and_is_left_alone(database_url: str, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, database_url=database_url)
    with ExitStack() as running:
        port = free_port()  # nobody takes it while the service is away
        service = running.enter_context(serving(settings, port))
        service.client.create_session(MODEL, id="s")

        async def script(screens: Top, pilot: Pilot[None]) -> None:
            await until(pilot, lambda: ids(screens) == ["s"])
            await asyncio.to_thread(running.close)
            await until(pilot, lambda: "OUT OF DATE" in text(screens, "#head"))
            assert "agentstate serve" in text(screens, "#head") and ids(screens) == ["s"]
            await pilot.press("k")
            await until(pilot, lambda: "out of date" in text(screens, "#note"))
            assert isinstance(screens.screen, Lists)
            await asyncio.to_thread(running.enter_context, serving(settings, port))
            await until(pilot, lambda: "OUT OF DATE" not in text(screens, "#head"))

        play(service.base_url, script)


def test_what_is_wrong_is_on_top(service: Service) -> None:
    async def script(screens: Top, pilot: Pilot[None]) -> None:
        await until(pilot, lambda: "! No engine is live" in text(screens, "#alarms"))

    play(service.base_url, script)


@pytest.mark.parametrize("colours", [True, False])
def test_a_terminal_gets_its_own_colours_and_nothing_of_users(fleet: Service, colours: bool) -> None:
    fleet.client.create_session(HOSTILE, id="hostile")
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    environment |= {"TERM": "xterm-256color", **({} if colours else {"NO_COLOR": "1"})}
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, "-m", "agentstate.cli", "top", "--url", fleet.base_url]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as running:
        os.close(theirs)
        said, asked, until_s = b"", False, time.monotonic() + PATIENCE_S
        with suppress(OSError):  # once it has ended
            while time.monotonic() < until_s:
                # A key that comes before the screen takes keys is lost.
                if asked or (b"hostile" in said and b"[bold]evil" in said):
                    asked = bool(os.write(ours, b"q"))
                if select.select([ours], [], [], 1.0)[0]:
                    said += os.read(ours, 1 << 16)
        if running.poll() is None and time.monotonic() >= until_s:
            running.kill()
        assert running.wait() == 0, said[-4096:]
    os.close(ours)
    assert asked and b"\\x1b[2J\\u202e" in said and "\u202e".encode() not in said
    assert b"\x1b[?1000h" not in said, "the mouse is the terminal's"
    codes = {int(code) for found in re.findall(rb"\x1b\[([0-9;]*)m", said) for code in found.split(b";") if code}
    assert not codes & {38, 48}, "only what the terminal calls its colours"
    painted = {code for code in codes if 30 <= code <= 47 or 90 <= code <= 107} - {39}
    assert bool(painted) == colours


# --- once, for scripts


def once(service: Service | str, *arguments: str, exit_code: int = 0) -> Any:
    url = service if isinstance(service, str) else service.base_url
    done = CliRunner().invoke(app, ["top", "--url", url, *arguments])
    assert done.exit_code == exit_code, (done.output, done.exception)
    return done


def test_once_prints_tables(fleet: Service) -> None:
    said = once(fleet, "--once").stdout
    assert "4 sessions, 0 running, 0 lapsed" in said and "tenant default" in said
    assert [line.split()[-2] for line in said.splitlines() if line.startswith("suspended")] == [*reversed(NAMES)]
    assert "424.7 MB" in said and "http://127.0.0.1:30000/v1" in said
    said = once(fleet, "--once", "--search", "ci-", "--sort", "id").stdout
    assert [line.split()[-2] for line in said.splitlines() if line.startswith("suspended")] == [*NAMES[2:]]
    assert "no session is as asked" in once(fleet, "--once", "--state", "running").stderr


def test_json_is_as_documented(fleet: Service) -> None:
    fleet.client.create_session(HOSTILE, id="hostile")
    printed = once(fleet, "--json").stdout
    assert "\x1b" not in printed and "\u202e" not in printed
    found = checked("top", json.loads(printed))
    assert found["overview"]["tenant"] == "default" and len(found["sessions"]) == 5
    assert "\x1b" not in once(fleet, "--once").stdout


def test_what_is_asked_wrongly_is_said(service: Service) -> None:
    once(service, "--once", "--state", "asleep", exit_code=2)
    once(service, "--once", "--sort", "bytes", exit_code=2)
    assert "--once" in once(service, exit_code=2).output, "there is no terminal"


def test_who_cannot_be_reached_is_named_with_what_to_do(service: Service) -> None:
    failed = once("http://127.0.0.1:1", "--once", exit_code=1).exception
    assert isinstance(failed, ServiceUnreachable) and "agentstate serve" in str(failed)
    with service.database.write() as connection:
        tenants.create_key(connection, "default")
    failed = once(service, "--once", exit_code=1).exception
    assert isinstance(failed, Unauthenticated) and "--api-key" in str(failed)
    assert "upgrade" in top_rows.remedy(RequestRefused("not-found", status=404))


def test_without_textual_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delitem(sys.modules, "agentstate.cli.top_app")
    monkeypatch.setitem(sys.modules, "textual.app", None)
    with pytest.raises(SettingsError, match=r"agentstate\[top\].*--once"):
        top.run("http://127.0.0.1:1", None, Choice(), once=False, as_json=False, every_s=2.0, read_only=False)
