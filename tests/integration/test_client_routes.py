"""Every route by its client method; what they do is the business of the service's own tests."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stage import MODEL, Service, serving

from agentstate.answers import Entry, Rewound, Session
from agentstate.client import AsyncClient, message, note, tool_call, tool_error, tool_output
from agentstate.errors import (
    AgentStateError,
    DatabaseUnreachable,
    InvalidEntry,
    RequestRefused,
    SessionNotFound,
    ToolCallReused,
)
from agentstate.sessions.verbs import Sessions
from agentstate.settings import Settings


@pytest.fixture
def backend() -> str:
    """The client is the same whatever database the service has."""
    return "sqlite"


@pytest.fixture
def service(database_url: str, tmp_path: Path) -> Iterator[Service]:
    with serving(Settings(home=tmp_path, database_url=database_url)) as service:
        yield service


@pytest.fixture
def session(service: Service) -> Session:
    """A suspended session of three messages."""
    service.client.create_session(MODEL, id="s", metadata={"user": "u_17", "draft": 1})
    with service.client.turn("s") as turn:
        turn.append(*(message({"text": text}) for text in "abc"))
    return service.client.read("s")


def texts(service: Service, session_id: str) -> list[str]:
    return [entry.payload["text"] for entry in service.client.entries(session_id).data]


def test_list_update_delete(service: Service, session: Session) -> None:
    client = service.client
    for number in range(3):
        client.create_session(MODEL, id=f"t{number}")
    page = client.list_sessions(limit=2)
    assert ([each.id for each in page.data], page.has_more) == (["s", "t0"], True)
    assert [each.id for each in client.list_sessions(after=page.last_id, order="asc").data] == ["t1", "t2"]
    changed = client.update("s", revision=session.revision, metadata={"draft": None}, expires_in_s=60)
    assert (changed.metadata, changed.expires_at is None) == ({"user": "u_17"}, False)
    with pytest.raises(AgentStateError, match="reload it"):
        client.delete("s", revision=session.revision)
    assert client.update("s", revision="*").expires_at == changed.expires_at
    assert client.update("s", revision="*", expires_in_s="never").expires_at is None
    client.delete("s", revision="*")
    with pytest.raises(SessionNotFound):
        client.read("s")


def test_fork_and_rewind(service: Service, session: Session) -> None:
    client = service.client
    second = client.entries("s").data[1].id
    fork = client.fork("s", revision=session.revision, at=second, id="fork", metadata={"branch": "b"})
    assert (fork.id, fork.metadata, texts(service, "fork")) == ("fork", {"branch": "b"}, ["a", "b"])
    assert client.fork("s", revision=session.revision).metadata == session.metadata
    assert client.rewind("s", second, revision=session.revision).head_id == second
    assert texts(service, "s") == ["a", "b"]
    with client.turn("s") as turn:
        turn.append(message({"text": "d"}))
        client.rewind("s", second, revision=client.read("s").revision, lease=turn.lease)
    assert texts(service, "s") == ["a", "b"]
    assert client.rewind("s", None, revision="*").head_id is None
    assert texts(service, "s") == []
    assert texts(service, "fork") == ["a", "b"]


def test_resume_of_a_revision_and_waiting_for_it(service: Service, session: Session) -> None:
    client = service.client
    with pytest.raises(AgentStateError, match="reload it"):
        client.resume("s", revision="1")
    first = client.resume("s", revision=session.revision, lease_ttl_s=0.5)
    assert client.resume("s", busy_timeout_s=30, prefetch="host").lease.epoch == first.lease.epoch + 1


def test_tool_calls(service: Service, session: Session) -> None:
    client = service.client
    with client.turn("s", reason="tool_wait", kv="demote") as turn:
        claimed = client.claim_tool_call("s", "c1", "read", {"path": "a"}, expected_s=2, lease=turn.lease)
        assert (claimed.state, claimed.name, claimed.expected_s) == ("claimed", "read", 2)
        with pytest.raises(AgentStateError, match="is claimed"):
            client.claim_tool_call("s", "c1", "read", {"path": "a"}, lease=turn.lease)
    done = client.finish_tool_call("s", "c1", output=["text"])
    assert done.state == "done"
    assert client.claim_tool_call("s", "c1", "read", {"path": "a"}).result == {"output": ["text"]}
    with pytest.raises(ToolCallReused):
        client.claim_tool_call("s", "c1", "read", {"path": "b"})
    client.claim_tool_call("s", "c2", "read")
    assert client.finish_tool_call("s", "c2", error="no such file").state == "failed"


def test_hints(service: Service, session: Session) -> None:
    client = service.client
    assert (client.activity("s", "typing").session_id, client.activity("s", "opened").state) == ("s", "ignored")
    with pytest.raises(RequestRefused, match="dancing|typing"):
        client.activity("s", "dancing")
    operation = client.prefetch("s", tier="device", due_s=0.5, deadline_s=2)
    assert operation.result == {"error": "no live engine serves the session"}
    with pytest.raises(RequestRefused, match="after the deadline"):
        client.prefetch("s", due_s=3, deadline_s=2)


ODD_IDS = ["user@example.com", "a/b", "a/entries", "ü", "漢字 50%", "%2F", "a?b#c", "x" * 129, "é" * 475]


@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_a_session_may_be_called_what_frameworks_call_it(service: Service) -> None:
    client = service.client
    for odd in ODD_IDS:
        session = client.create_session(MODEL, id=odd)
        assert session.id == odd
        assert client.ensure_session(odd, MODEL) == client.read(odd) == session
        with client.turn(odd) as turn:
            assert client.claim_tool_call(odd, odd, "read", lease=turn.lease).id == odd
            assert client.finish_tool_call(odd, odd, output=odd, lease=turn.lease).state == "done"
            turn.append(tool_call(f"{odd}2", "read"), tool_output(f"{odd}2", 1))
        assert [entry.call_id for entry in client.entries(odd).data] == [odd, odd, f"{odd}2", f"{odd}2"]
        assert client.fork(odd, revision="*", id=f"fork of {odd}").id == f"fork of {odd}"
        assert client.update(odd, revision="*", metadata={"a": 1}).metadata == {"a": 1}
        assert isinstance(next(client.events(odd)), Entry)
        assert service.http.post("/v1/sessions", json={"model": MODEL, "id": f"{odd}3"}).headers["Location"].isascii()
    names = [session.id for session in client.list_sessions(limit=1000).data]
    assert set(ODD_IDS) < set(names)
    assert [session.id for session in client.list_sessions(after=names[3], limit=1).data] == [names[4]]
    for odd in ODD_IDS:
        client.delete(odd, revision="*")


@pytest.mark.parametrize("odd", ["a\nb", "~a", "x" * 1025, "\0"])
def test_every_door_refuses_the_same_ids(service: Service, session: Session, odd: str) -> None:
    client = service.client
    for attempt in (
        lambda: client.create_session(MODEL, id=odd),
        lambda: client.fork("s", revision="*", id=odd),
        lambda: client.read(odd),
        lambda: client.claim_tool_call("s", odd, "read"),
        lambda: client.finish_tool_call("s", odd, output=1),
        lambda: client.append("s", client.resume("s").lease, [tool_call(odd, "read")]),
    ):
        with pytest.raises(RequestRefused, match="invalid-request|not-found"):
            attempt()


@pytest.mark.parametrize("call_id", ["a/b", "/", "a//b/", "result/x", "a/result", "ä ?#%2F"])
def test_a_tool_calls_id_is_whatever_the_model_made_up(service: Service, session: Session, call_id: str) -> None:
    assert service.client.claim_tool_call("s", call_id, "read").id == call_id
    assert service.client.finish_tool_call("s", call_id, output=1).id == call_id
    assert service.client.claim_tool_call("s", call_id, "read").result == {"output": 1}
    route = 'route="/v1/sessions/{session_id}/tool-calls/{call_id}/result"'
    assert route in service.http.get("/metrics").text


@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_what_a_tool_gave_is_never_lost(service: Service, session: Session) -> None:
    """It ran: its output is accepted, kept, and given back wherever it is read."""
    client, output = service.client, {"files": ["\udcff.txt", "\ud800"], "text": "é"}
    with client.turn("s") as turn:
        assert client.claim_tool_call("s", "c", "list", lease=turn.lease).state == "claimed"
        client.finish_tool_call("s", "c", output=output, lease=turn.lease)
        assert client.claim_tool_call("s", "c", "list", lease=turn.lease).result == {"output": output}
        appended = turn.append(tool_call("d", "mean"), tool_output("d", output), note({"mean": "\udcff"}))
        numbers = [math.nan, {"most": math.inf, "least": (-math.inf, 1.5)}]
        client.claim_tool_call("s", "e", "mean", lease=turn.lease)
        client.finish_tool_call("s", "e", output=numbers, lease=turn.lease)
    named = {"output": ["NaN", {"most": "Infinity", "least": ["-Infinity", 1.5]}]}
    assert client.claim_tool_call("s", "e", "mean").result == named
    assert tool_error("c", math.nan)["payload"] == {"error": "NaN"}
    entries = client.entries("s").data
    assert appended.data == entries[5:8]
    assert [entry.payload for entry in entries[4:]] == [
        {"output": output},
        {"name": "mean", "arguments": None},
        {"output": output},
        {"mean": "\udcff"},
        {"name": "mean", "arguments": None},
        named,
    ]
    assert client.resume("s").entries.data == entries
    events = client.events("s")
    assert [next(events) for _ in entries] == entries


def test_what_is_no_json_is_refused_before_anything_runs(service: Service, session: Session) -> None:
    client, before = service.client, service.client.read("s")
    for attempt in (
        lambda: client.claim_tool_call("s", "c", "read", {"x": math.nan}),
        lambda: client.claim_tool_call("s", "c", "read", {"x": {1, 2}}),
        lambda: client.update("s", revision="*", metadata={"x": math.inf}),
        lambda: client.create_session(MODEL, metadata={"x": "\ud800"}),
    ):
        with pytest.raises(InvalidEntry, match="JSON|Unicode"):
            attempt()
    assert client.read("s") == before
    assert len(client.list_sessions().data) == 1


def test_a_prefetch_without_an_engine(service: Service, session: Session) -> None:
    operation = service.client.prefetch("s", tier="device", deadline_s=2)
    ended = service.client.wait_operation(operation.id, timeout_s=300)
    assert (ended.kind, ended.state) == ("prefetch", "failed")


def test_events(service: Service, session: Session) -> None:
    client = service.client
    seen: list[Entry | Session] = []
    for event in client.events("s", after=1):
        seen.append(event)
        if isinstance(event, Session):
            if event.status == "suspended" and len(seen) < 4:
                with client.turn("s") as turn:
                    turn.append(note({"text": "new"}))
            elif len([each for each in seen if isinstance(each, Entry)]) == 3:
                client.delete("s", revision="*")
                break
    entries = [event for event in seen if isinstance(event, Entry)]
    assert [(entry.seq, entry.payload["text"]) for entry in entries] == [(2, "b"), (3, "c"), (4, "new")]
    with pytest.raises(SessionNotFound):
        next(client.events("s"))


def test_async_events_end_with_the_session(service: Service, session: Session) -> None:
    async def follow() -> list[str]:
        seen = []
        async with AsyncClient(service.base_url) as client:
            async for event in client.events("s"):
                seen.append(type(event).__name__)
                if isinstance(event, Session):
                    await client.delete("s", revision="*")
        return seen

    assert asyncio.run(follow()) == ["Entry", "Entry", "Entry", "Session"]


def follow(
    service: Service, is_async: bool, enough: Callable[[list[Any]], bool], between: Callable[[int], None] | None = None
) -> list[Any]:
    """The first events of session ``s`` by either client; ``between`` is called after each, with their number."""
    between = between or (lambda seen: None)

    async def work() -> list[Any]:
        seen: list[Any] = []
        async with AsyncClient(service.base_url) as client:
            async for event in client.events("s"):
                seen.append(event)
                await asyncio.to_thread(between, len(seen))
                if enough(seen):
                    break
        return seen

    if is_async:
        return asyncio.run(work())
    seen: list[Any] = []
    for event in service.client.events("s"):
        seen.append(event)
        between(len(seen))
        if enough(seen):
            break
    return seen


either = pytest.mark.parametrize("is_async", [False, True], ids=["client", "async client"])


@either
def test_a_text_may_hold_any_character(service: Service, is_async: bool) -> None:
    texts = ["one\u2028two\u2029three\u0085four", "\x0b\x0c\x1c\r\n", "after"]
    service.client.create_session(MODEL, id="s")
    with service.client.turn("s") as turn:
        turn.append(*(note({"text": text}) for text in texts))
    assert [event.payload["text"] for event in follow(service, is_async, lambda seen: len(seen) == 3)] == texts


@either
def test_a_follower_is_told_what_was_taken_back(service: Service, session: Session, is_async: bool) -> None:
    first = service.client.entries("s").data[0]

    def rewind(seen: int) -> None:
        if seen == 4:  # the entries, and how the session stands
            service.client.rewind("s", first.id, revision="*")
            with service.client.turn("s") as turn:
                turn.append(note({"text": "instead"}))

    seen = follow(service, is_async, lambda seen: isinstance(seen[-1], Entry) and seen[-1].seq == 4, rewind)
    events = [event for event in seen if not isinstance(event, Session)]
    assert [event.seq for event in events] == [1, 2, 3, 1, 4]
    assert [type(event) for event in events] == [Entry, Entry, Entry, Rewound, Entry]


@either
def test_a_follower_outlasts_an_outage(
    service: Service, session: Session, is_async: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the database is away while it is connected, then the connection breaks while it is away."""
    since, seen = Sessions.since, Sessions.seen
    left: dict[str, list[Exception]] = {"since": [], "seen": []}

    def failing(name: str, verb: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if left[name]:
                raise left[name].pop()
            return verb(*args, **kwargs)

        return call

    monkeypatch.setattr(Sessions, "since", failing("since", since))
    monkeypatch.setattr(Sessions, "seen", failing("seen", seen))
    monkeypatch.setattr("agentstate.api.events.RETRY_S", 0.01)

    def outage(count: int) -> None:
        if count == 4:
            left["since"] = [DatabaseUnreachable()] * 3
        elif count == 5:
            left["seen"] = [DatabaseUnreachable()] * 5
            left["since"] = [RuntimeError("the connection breaks")]
        if count in (4, 5):
            with service.client.turn("s") as turn:
                turn.append(note({"text": str(count)}))

    # The fourth event is the session after its three entries.
    events = follow(service, is_async, lambda seen: isinstance(seen[-1], Entry) and seen[-1].seq == 5, outage)
    assert left == {"since": [], "seen": []}
    assert [event.seq for event in events if isinstance(event, Entry)] == [1, 2, 3, 4, 5]


def test_followers_leave_the_connections_of_requests_alone(service: Service, session: Session) -> None:
    async def work() -> str:
        async with AsyncClient(service.base_url, timeout_s=60, retries=0) as client:
            followers = [client.events("s") for _ in range(101)]
            for follower in followers:
                assert isinstance(await anext(follower), Entry)
            status = (await client.read("s")).status
            for follower in followers:
                await follower.aclose()  # type: ignore[attr-defined]
            return status

    assert asyncio.run(work()) == "suspended"


def test_errors_of_this_version_are_its_own_classes(service: Service, session: Session) -> None:
    with service.client.turn("s") as turn:
        turn.append(tool_call("c", "read"))
    first = service.client.entries("s").data[0].id
    assert service.client.fork("s", revision="*", at=first).head_id == first
    for attempt in (
        lambda: service.client.update("s", revision="1"),
        lambda: service.client.finish_tool_call("s", "none", output=1),
        lambda: service.client.rewind("s", first, revision="1"),
    ):
        with pytest.raises(AgentStateError) as raised:
            attempt()
        assert not isinstance(raised.value, RequestRefused)
