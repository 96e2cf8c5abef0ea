"""`agentstate sessions` and `engines`, beside a real service."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from documented import checked
from stage import MODEL, PATIENCE_S, Service, register
from typer.testing import CliRunner, Result

from agentstate.answers import Entry, Rewound, Session
from agentstate.cli import copies, output, sessions
from agentstate.cli.main import app
from agentstate.client import message, note, tool_call, tool_output
from agentstate.errors import RevisionStale, SessionExists, SessionNotFound, SettingsError
from agentstate.fleet.engines import Phase

HOSTILE = "\x1b[2J\u202eevil"
ENTRIES = [
    message({"role": "user", "content": f"What is in it? {HOSTILE} 日本 \U0001f600"}),
    tool_call("call_1", "read_file", {"path": "a", "b": [1, 2.5, 1e300, None, True, 2**53]}, expected_s=0.5),
    tool_output("call_1", {"z": "last", "a": "first", "nested": {"y": 1, "x": "\u2028"}}),
    note({"": "empty name", "big": "x" * 300_000}),
]
Run = Callable[..., Result]


@pytest.fixture
def run(service: Service, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("AGENTSTATE_URL", service.base_url)
    monkeypatch.setenv("AGENTSTATE_DATABASE_URL", service.app.state.service.settings.sqlalchemy_url)

    def call(*arguments: str, input: str | None = None, exit_code: int = 0) -> Result:
        done = CliRunner().invoke(app, list(arguments), input=input)
        assert done.exit_code == exit_code, (done.output, done.exception)
        return done

    return call


def written(service: Service, id: str, entries: list[dict[str, Any]] = ENTRIES, **more: Any) -> str:
    session = service.client.create_session(MODEL, id=id, **more)
    lease = service.client.resume(session.id).lease
    if entries:
        service.client.append(session.id, lease, entries)
    service.client.suspend(session.id, lease, reason="other", durable_timeout_ms=0)
    return session.id


def printed(run: Run, *arguments: str) -> Any:
    return checked(" ".join(arguments[:2]), json.loads(run(*arguments, "--json").stdout))


def test_sessions_are_listed_and_shown(service: Service, run: Run) -> None:
    ids = [f"agent-{number}-" + "x" * 60 for number in range(3)]
    for id in ids[:2]:
        service.client.create_session(MODEL, id=id, metadata={"note": HOSTILE})
    written(service, ids[2], [], expires_in_s=3600)
    assert [row["id"] for row in printed(run, "sessions", "ls")] == ids[::-1]
    assert [row["id"] for row in printed(run, "sessions", "ls", "--oldest", "--limit", "2")] == ids[:2]
    assert [row["id"] for row in printed(run, "sessions", "ls", "--status", "suspended")] == ids[2:]
    assert json.loads(run("sessions", "ls", "--model", "other", "--json").stdout) == []
    run("sessions", "ls", "--status", "asleep", exit_code=2)
    shown = run("sessions", "ls", "--wide").stdout
    assert all(id in shown for id in ids) and "\\u001b[2J\\u202eevil" in shown
    assert printed(run, "sessions", "show", ids[2])["status"] == "suspended"
    shown += run("sessions", "show", ids[0]).stdout
    assert "\x1b" not in shown and "\u202e" not in shown


def test_a_page_of_sessions_is_not_the_end(service: Service, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_PAGE", 2)
    for number in range(5):
        service.client.create_session(MODEL, id=f"a-{number}")
    assert len(printed(run, "sessions", "ls")) == 5


def test_an_export_comes_back_as_the_same_bytes(
    service: Service, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "_MOST_CHARACTERS", 1000)
    monkeypatch.setattr(sessions, "_MOST_ENTRIES", 2)
    written(service, "agent", metadata={"z": 1, "a": {"y": HOSTILE}}, cache_salt="s", extra_key="k")
    first, second = tmp_path / "first", tmp_path / "second"
    run("sessions", "export", "agent", "-o", str(first))
    assert first.stat().st_mode & 0o077 == 0
    assert first.read_bytes().isascii() and len(first.read_text().splitlines()) == 1 + len(ENTRIES)
    assert run("sessions", "export", "agent").stdout == first.read_text()
    assert isinstance(run("sessions", "export", "agent", "-o", str(first), exit_code=1).exception, SettingsError)
    assert isinstance(run("sessions", "import", str(first), exit_code=1).exception, SessionExists)
    assert run("sessions", "import", str(first), "--id", "other").stdout == "other\n"
    run("sessions", "rm", "agent", "--yes")
    assert run("sessions", "import", "-", input=first.read_text()).stdout == "agent\n"
    run("sessions", "export", "agent", "-o", str(second))
    assert second.read_bytes() == first.read_bytes()
    assert service.client.read("agent").status == "suspended"
    assert run("sessions", "export", "other").stdout.replace('"id": "other"', '"id": "agent"') == first.read_text()


def test_an_empty_session_too(service: Service, run: Run) -> None:
    service.client.create_session(MODEL, id="empty")
    said = run("sessions", "export", "empty").stdout
    run("sessions", "rm", "empty", "--yes")
    run("sessions", "import", "-", input=said)
    assert run("sessions", "export", "empty").stdout == said


def test_what_cannot_be_imported_leaves_nothing(service: Service, run: Run) -> None:
    about = {"agentstate": 1, "id": "a", "model": "m", "metadata": {}, "cache_salt": None, "extra_key": None}
    good, newer = json.dumps(about), json.dumps({**about, "agentstate": 2})
    answer = json.dumps({"kind": "tool_result", "call_id": "call_none", "payload": {"output": 1}})
    for text in ("", "no json", "{}", newer, f"{good}\n[]", f"{good}\n{{}}"):
        failed = run("sessions", "import", "-", input=text, exit_code=1).exception
        assert isinstance(failed, SettingsError) and "no export" in str(failed)
    run("sessions", "import", "-", input=f"{good}\n{answer}", exit_code=1)
    with pytest.raises(SessionNotFound):
        service.client.read("a")


def test_an_export_of_a_session_that_is_rewound_meanwhile_fails(
    service: Service, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(service, "agent", ENTRIES[:1])
    real = sessions._entries

    def meanwhile(client: Any, session_id: str) -> Any:
        service.client.rewind("agent", None, revision="*")
        return real(client, session_id)

    monkeypatch.setattr(sessions, "_entries", meanwhile)
    failed = run("sessions", "export", "agent", "-o", str(tmp_path / "file"), exit_code=1).exception
    assert isinstance(failed, RevisionStale) and not (tmp_path / "file").exists()


def test_what_is_removed_is_listed_and_asked_for(service: Service, run: Run) -> None:
    written(service, "a")
    written(service, "b", [])
    rows = printed(run, "sessions", "rm", "a", "b", "--dry-run")["sessions"]
    assert [(row["id"], row["last_seq"]) for row in rows] == [("a", 4), ("b", 0)]
    assert "--yes" in run("sessions", "rm", "a", "b", exit_code=2).output
    assert isinstance(run("sessions", "rm", "a", "none", "--yes", exit_code=1).exception, SessionNotFound)
    service.client.read("a")
    run("sessions", "rm", "a", "b", "--yes")
    assert service.client.list_sessions().data == []


def test_what_has_changed_since_it_was_listed_stays(
    service: Service, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(service, "a")

    def change(question: str, *, yes: bool) -> None:
        service.client.update("a", revision="*", metadata={"x": 1})

    monkeypatch.setattr(sessions, "confirm", change)
    assert isinstance(run("sessions", "rm", "a", exit_code=1).exception, RevisionStale)
    service.client.read("a")


def test_forks_and_rewinds(service: Service, run: Run) -> None:
    written(service, "a")
    entries = service.client.entries("a").data
    fork = run("sessions", "fork", "a", "--at", entries[0].id, "--id", "branch").stdout.strip()
    assert [one.seq for one in service.client.entries(fork).data] == [1]
    assert run("sessions", "fork", "a").stdout.startswith("ses_")
    listed = printed(run, "sessions", "rewind", "a", "--to", entries[2].id, "--dry-run")
    assert [row["id"] for row in listed["entries"]] == [entries[3].id]
    run("sessions", "rewind", "a", "--to", entries[2].id, exit_code=2)
    assert service.client.read("a").head_id == entries[3].id
    run("sessions", "rewind", "a", "--to", entries[2].id, "--yes")
    assert service.client.read("a").head_id == entries[2].id
    assert "nothing comes after" in run("sessions", "rewind", "a", "--to", entries[2].id).stdout
    run("sessions", "rewind", "a", "--to", "start", "--yes")
    assert service.client.read("a").head_id is None


def test_a_session_is_followed_until_it_ends(service: Service, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    written(service, "a")
    shown = run("sessions", "tail", "a", "--no-follow").stdout
    assert len(shown.splitlines()) == 4 and "\x1b" not in shown and "more characters" in shown
    assert len(run("sessions", "tail", "a", "-n", "2", "--no-follow").stdout.splitlines()) == 2
    seen: list[Any] = []
    told = threading.Condition()

    def take(event: Any, as_json: bool) -> None:
        with told:
            seen.append(event)
            told.notify()

    def came(kind: type, number: int) -> bool:
        return sum(type(event) is kind for event in seen) >= number

    def await_event(kind: type, number: int) -> None:
        with told:
            assert told.wait_for(lambda: came(kind, number), PATIENCE_S)

    monkeypatch.setattr(sessions, "_print_event", take)
    thread = threading.Thread(target=run, args=("sessions", "tail", "a", "-n", "1"))
    thread.start()
    # From the entry that it begins with it misses nothing.
    await_event(Entry, 1)
    lease = service.client.resume("a").lease
    service.client.append("a", lease, [message({"role": "user", "content": "more"})])
    await_event(Entry, 2)
    service.client.suspend("a", lease, reason="other", durable_timeout_ms=0)
    service.client.rewind("a", service.client.entries("a").data[0].id, revision="*")
    await_event(Rewound, 1)
    service.client.delete("a", revision="*")
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert [event.seq for event in seen if isinstance(event, Entry)] == [4, 5]
    assert came(Session, 1)


def test_events_are_lines_of_json(service: Service, run: Run) -> None:
    written(service, "a")
    lines = [json.loads(line) for line in run("sessions", "tail", "a", "--no-follow", "--json").stdout.splitlines()]
    assert [line["event"] for line in lines] == ["entry"] * 4 and lines[0]["seq"] == 1


def test_engines_are_listed_and_shown(service: Service, run: Run, start_peer: Any) -> None:
    given = [{"flag": f"--chat-template {HOSTILE}", "class": "tested", "why": "no effect on KV"}]
    stat = {"ok": True, "off": HOSTILE, "flags": given, "wear": {"bytes_day": 5}}
    engine = register(service.database, start_peer(lambda request: stat).address, model="m\x1b")
    (row,) = printed(run, "engines", "ls", "--live")
    assert row["id"] == engine.id and "control_secret" not in row
    found = printed(run, "engines", "show", engine.id)
    assert found["stat"]["off"] == HOSTILE and found["silent"] is None
    shown = run("engines", "show", engine.id).stdout + run("engines", "ls").stdout
    assert engine.id in shown and "wear.bytes_day" in shown and "\x1b" not in shown
    assert found["stat"]["flags"] == given and "--chat-template \\x1b" in shown
    assert str(engine.control_secret) not in shown


def test_engines_say_whether_they_prefill_or_decode(service: Service, run: Run, start_peer: Any) -> None:
    address = start_peer(lambda request: {"ok": True, "off": None}).address
    for phase in Phase:
        register(service.database, address, id=f"eng_{phase}", node=f"n_{phase}", phase=phase)
    assert {row["id"]: row["phase"] for row in printed(run, "engines", "ls")} == {
        f"eng_{phase}": phase for phase in Phase
    }
    head, *rows = [line.split() for line in run("engines", "ls").stdout.splitlines()]
    assert sorted(row[head.index("phase")] for row in rows) == ["both", "decode", "prefill"]
    assert printed(run, "engines", "show", "eng_prefill")["phase"] == "prefill"
    assert "prefill" in run("engines", "show", "eng_prefill").stdout


def test_an_engine_that_does_not_answer_is_shown_as_it_is_registered(
    service: Service, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentstate.cli.engines._TIMEOUT_S", 0.2)
    engine = register(service.database, "tcp://127.0.0.1:1")
    assert engine.id in run("engines", "show", engine.id, exit_code=output.UNREACHABLE).stdout
    found = printed(run, "engines", "show", engine.id)
    assert found["stat"] is None and found["silent"]


def test_no_restore_under_a_running_service(service: Service, run: Run, tmp_path: Path) -> None:
    url = service.app.state.service.settings.sqlalchemy_url
    with pytest.raises(SettingsError, match="stop services"):
        copies.refuse_while_served(url, service.base_url)
    copies.refuse_while_served(f"sqlite:///{tmp_path}/another.db", service.base_url)
    copies.refuse_while_served(url, "http://127.0.0.1:1")
