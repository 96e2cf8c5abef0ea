"""The session service, used by the real ADK against a real service of AgentState."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from google.adk.agents import Agent
from google.adk.errors import StaleSessionError
from google.adk.errors.already_exists_error import AlreadyExistsError
from google.adk.errors.session_not_found_error import SessionNotFoundError
from google.adk.events.event import Event
from google.adk.events.event_actions import EventActions
from google.adk.models.base_llm import BaseLlm
from google.adk.models.llm_request import LlmRequest
from google.adk.models.llm_response import LlmResponse
from google.adk.runners import Runner
from google.adk.sessions import Session
from google.adk.sessions.base_session_service import GetSessionConfig
from google.adk.tools.long_running_tool import LongRunningFunctionTool
from google.adk.tools.tool_confirmation import ToolConfirmation
from google.genai import types
from stage import MODEL, Service, serving

from agentstate.adapters.google_adk import AgentStateSessionService
from agentstate.client import AsyncClient, message, note
from agentstate.errors import InvalidEntry, ServiceUnreachable, SessionBusy, SessionNotFound
from agentstate.sessions import tenants
from agentstate.sessions.tenants import Tenant
from agentstate.settings import DEFAULT_TENANT, Settings
from agentstate.sql.models import EntryKind, SessionStatus

Work = Callable[[AgentStateSessionService], Awaitable[Any]]
NOBODY: dict[str, Any] = {"app_name": "shop", "user_id": "nobody"}
ANN: dict[str, Any] = {"app_name": "shop", "user_id": "ann"}
BOB: dict[str, Any] = {"app_name": "shop", "user_id": "bob"}


@pytest.fixture
def run(service: Service) -> Callable[[Work], Any]:
    """Runs an async function of a session service to its end."""
    return lambda work: running(service.base_url, work)


def running(base_url: str, work: Work) -> Any:
    async def with_sessions() -> Any:
        async with AsyncClient(base_url, timeout_s=60) as client:
            return await work(AgentStateSessionService(client, model=MODEL, busy_timeout_s=20))

    return asyncio.run(with_sessions())


def said(text: str, *, time: float | None = None, **state: Any) -> Event:
    """An event of the user; ``state`` is what it changes, with ``app__x`` for ``app:x``."""
    changes = {name.replace("__", ":"): value for name, value in state.items()}
    content = types.Content(role="user", parts=[types.Part(text=text)])
    event = Event(author="user", invocation_id="i", content=content, actions=EventActions(state_delta=changes))
    if time is not None:
        event.timestamp = time
    return event


def texts(session: Session | None) -> list[str]:
    assert session is not None
    return [event.content.parts[0].text for event in session.events]  # type: ignore


async def again(sessions: AgentStateSessionService, session: Session, **config: Any) -> Session:
    """The session as it is stored now."""
    found = await sessions.get_session(
        app_name=session.app_name,
        user_id=session.user_id,
        session_id=session.id,
        config=GetSessionConfig(**config) if config else None,
    )
    assert found is not None
    return found


# What the database has to do with is tested on both; the rest is the service's concern, and its tests'.
sqlite_only = pytest.mark.parametrize("backend", ["sqlite"])


# --- sessions


@sqlite_only
def test_a_session_is_found_as_it_was_created(run: Any) -> None:
    async def work(sessions: AgentStateSessionService) -> None:
        assert await sessions.get_session(**ANN, session_id="s") is None
        session = await sessions.create_session(**ANN, session_id="s", state={"a": 1, "b": {"c": None}})
        assert (session.app_name, session.user_id, session.id) == ("shop", "ann", "s")
        assert session.state == {"a": 1, "b": {"c": None}}
        assert session.last_update_time > 0
        assert await again(sessions, session) == session
        made = [await sessions.create_session(**ANN, session_id=blank) for blank in (None, "", " \n")]
        assert len({each.id for each in made}) == 3
        assert all(each.id.strip() for each in made)

    run(work)


@sqlite_only
def test_ids_are_those_of_a_user(run: Any) -> None:
    async def work(sessions: AgentStateSessionService) -> None:
        for owner in (ANN, BOB, {"app_name": "bank", "user_id": "ann"}):
            session = await sessions.create_session(**owner, session_id="a/b ü", state={"owner": owner})
            assert (await again(sessions, session)).state == {"owner": owner}
        with pytest.raises(AlreadyExistsError):
            await sessions.create_session(**ANN, session_id="  a/b ü\t", state={"owner": "stolen", "app:x": 1})
        found = await sessions.get_session(**ANN, session_id=" a/b ü")
        assert found is not None
        assert found.state == {"owner": ANN}
        await sessions.delete_session(**ANN, session_id="a/b ü\n")
        assert await sessions.get_session(**ANN, session_id="a/b ü") is None
        assert await sessions.get_session(**BOB, session_id="a/b ü") is not None

    run(work)


@sqlite_only
def test_deleting(run: Any, service: Service) -> None:
    async def work(sessions: AgentStateSessionService) -> None:
        session = await sessions.create_session(**ANN, session_id="s", state={"own": 1, "user:kept": 2})
        await sessions.append_event(session, said("hello"))
        for _ in range(2):  # also one that is not there
            await sessions.delete_session(**ANN, session_id="s")
        assert await sessions.get_session(**ANN, session_id="s") is None
        with pytest.raises(SessionNotFoundError):
            await sessions.append_event(session, said("too late"))
        with pytest.raises(SessionNotFound):
            service.client.read(sessions.session_id(**ANN, session_id="s"))
        # The id is free again, and what is the user's stays.
        anew = await sessions.create_session(**ANN, session_id="s")
        assert (anew.events, anew.state) == ([], {"user:kept": 2})

    run(work)


@sqlite_only
def test_deleting_waits_for_a_turn(run: Any, service: Service) -> None:
    async def work(sessions: AgentStateSessionService) -> None:
        await sessions.create_session(**ANN, session_id="s")
        name = sessions.session_id(**ANN, session_id="s")
        lease = service.client.resume(name).lease
        hurried = AgentStateSessionService(sessions._client, model=MODEL, busy_timeout_s=0.1)
        with pytest.raises(SessionBusy):
            await hurried.delete_session(**ANN, session_id="s")
        deleting = asyncio.create_task(sessions.delete_session(**ANN, session_id="s"))
        await asyncio.to_thread(service.client.suspend, name, lease)
        await deleting
        assert await sessions.get_session(**ANN, session_id="s") is None

    run(work)


def test_listing(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By user and of all users, sorted by their last events, without those; more than a page of them, too."""
    monkeypatch.setattr("agentstate.adapters.google_adk.PAGE", 2)

    async def work(sessions: AgentStateSessionService) -> None:
        assert (await sessions.list_sessions(**ANN)).sessions == []
        for number, id in enumerate(["b", "a", "B", "_", "c"]):
            session = await sessions.create_session(**ANN, session_id=id, state={"user:color": "red"})
            await sessions.append_event(session, said("x", time=100.0 - number, number=number))
        other = await sessions.create_session(**BOB, session_id="b", state={"app:open": True, "user:color": "blue"})
        await sessions.append_event(other, said("y", time=97.5))
        await sessions.create_session(app_name="shopping", user_id="ann", session_id="b")
        await sessions._client.create_session(MODEL, id="b", metadata={"none": "of ADK's"})

        listed = (await sessions.list_sessions(**ANN)).sessions
        assert [each.id for each in listed] == ["c", "_", "B", "a", "b"]
        assert [each.last_update_time for each in listed] == [96.0, 97.0, 98.0, 99.0, 100.0]
        assert [each.state for each in listed] == [
            {"number": number, "user:color": "red", "app:open": True} for number in (4, 3, 2, 1, 0)
        ]
        assert not any(each.events for each in listed)
        everybody = (await sessions.list_sessions(app_name="shop")).sessions
        assert [(each.user_id, each.id) for each in everybody] == [
            *[("ann", "c"), ("ann", "_"), ("bob", "b"), ("ann", "B"), ("ann", "a"), ("ann", "b")]
        ]
        assert everybody[2].state == {"user:color": "blue", "app:open": True}
        assert (await sessions.list_sessions(**NOBODY)).sessions == []

    run(work)


@sqlite_only
def test_listed_sessions_share_nothing(run: Any) -> None:
    async def work(sessions: AgentStateSessionService) -> None:
        for id in ("a", "b"):
            await sessions.create_session(**ANN, session_id=id, state={"app:list": [], "user:list": []})
        first, second = (await sessions.list_sessions(**ANN)).sessions
        for name in ("app:list", "user:list"):
            first.state[name].append("mine")
        assert second.state == {"app:list": [], "user:list": []}

    run(work)


# --- events


@sqlite_only
def test_an_event_comes_back_as_it_was(run: Any) -> None:
    call = types.FunctionCall(id="c", name="look", args={"at": None, "deep": {"x": [1, 0.1, "é 漢"]}})
    picture = types.Part.from_bytes(data=b"\x00\xff\xfe", mime_type="image/png")
    event = Event(
        author="agent",
        invocation_id="i",
        content=types.Content(role="model", parts=[picture, types.Part(function_call=call)]),
        partial=False,
        turn_complete=True,
        interrupted=True,
        error_code="code",
        error_message="message",
        branch="a.b",
        long_running_tool_ids={"c", "d"},
        custom_metadata={"key": ["value", None]},
        timestamp=1700000000.123456,
        usage_metadata=types.GenerateContentResponseUsageMetadata(prompt_token_count=1, total_token_count=2),
        grounding_metadata=types.GroundingMetadata(
            search_entry_point=types.SearchEntryPoint(sdk_blob=b"\xde\xad"), web_search_queries=["q"]
        ),
        actions=EventActions(
            artifact_delta={"file": 0},
            transfer_to_agent="other",
            escalate=True,
            requested_tool_confirmations={"c": ToolConfirmation(hint="sure?", payload={"amount": 1})},
        ),
    )

    async def work(sessions: AgentStateSessionService) -> None:
        session = await sessions.create_session(**ANN)
        assert await sessions.append_event(session, event) is event
        assert session.events == [event]
        assert session.last_update_time == event.timestamp
        found = await again(sessions, session)
        assert found == session
        assert found.events[0].content == event.content
        assert found.events[0].grounding_metadata == event.grounding_metadata

    run(work)


@sqlite_only
def test_partial_events_are_not_stored(run: Any) -> None:
    async def work(sessions: AgentStateSessionService) -> None:
        session = await sessions.create_session(**ANN)
        await sessions.append_event(session, Event(author="agent", partial=True))
        assert session.events == []
        assert (await again(sessions, session)).events == []

    run(work)


@sqlite_only
def test_some_of_the_events(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentstate.adapters.google_adk.PAGE", 2)
    monkeypatch.setattr("agentstate.adapters.google_adk.FEW", 0)

    async def work(sessions: AgentStateSessionService) -> None:
        session = await sessions.create_session(**ANN, state={"first": True})
        for number in range(1, 6):
            # The last two at the same time; their order is that of their making.
            await sessions.append_event(session, said(str(number), time=float(min(number, 4)), last=number))
        for config, expected in [
            ({}, "12345"),
            ({"num_recent_events": 0}, ""),
            ({"num_recent_events": 2}, "45"),
            ({"num_recent_events": 9}, "12345"),
            ({"after_timestamp": 3.0}, "345"),
            ({"after_timestamp": 99.0}, ""),
            ({"after_timestamp": 3.0, "num_recent_events": 2}, "45"),
            ({"after_timestamp": 4.0, "num_recent_events": 4}, "45"),
        ]:
            found = await again(sessions, session, **config)
            assert texts(found) == list(expected), config
            assert found.state == {"first": True, "last": 5}
            assert found.last_update_time == 4.0
        # Whatever was read of it, it is up to date.
        for config in ({"num_recent_events": 0}, {"after_timestamp": 99.0}, {"num_recent_events": 1}):
            await sessions.append_event(await again(sessions, session, **config), said(str(config)))

    run(work)


@sqlite_only
def test_events_after_a_time_are_those_after_the_last_that_is_older(run: Any) -> None:
    async def work(sessions: AgentStateSessionService) -> None:
        session = await sessions.create_session(**ANN)
        for time in (5.0, 1.0, 6.0, 4.0):
            await sessions.append_event(session, said(str(time), time=time))
        assert texts(await again(sessions, session, after_timestamp=3.0)) == ["6.0", "4.0"]

    run(work)


@sqlite_only
def test_no_entries_are_read_for_state_alone(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(sessions: AgentStateSessionService) -> None:
        session = await sessions.create_session(**ANN, state={"a": 1, "user:u": 1})
        for event in (said("one", a=2, app__a=3), calling("c"), answering("c"), said("two", time=5.0, user__u=2)):
            await sessions.append_event(session, event)

        async def none(*_: Any, **__: Any) -> Any:
            raise AssertionError("entries were read")

        monkeypatch.setattr(sessions._client, "entries", none)
        state = {"a": 2, "app:a": 3, "user:u": 2}
        found = await again(sessions, session, num_recent_events=0)
        assert (found.state, found.last_update_time) == (state, 5.0)
        assert [each.state for each in (await sessions.list_sessions(**ANN)).sessions] == [state]
        await sessions.append_event(session, calling("d"))
        await sessions.append_event(session, said("three"))

    run(work)


@sqlite_only
def test_an_event_that_is_too_large(run: Any) -> None:
    async def work(sessions: AgentStateSessionService) -> None:
        session = await sessions.create_session(**ANN)
        with pytest.raises(Exception, match="body-too-large"):
            await sessions.append_event(session, said("x" * 9_000_000))
        assert session.events == []
        await sessions.append_event(session, said("short"))
        assert texts(await again(sessions, session)) == ["short"]

    run(work)


# --- writers


def test_a_session_that_others_changed_is_stale(run: Any) -> None:
    async def work(sessions: AgentStateSessionService) -> None:
        session = await sessions.create_session(**ANN)
        await sessions.append_event(session, said("one", a=1))
        other = await again(sessions, session)
        await sessions.append_event(other, said("two", b=2))
        with pytest.raises(StaleSessionError, match="modified in storage"):
            await sessions.append_event(session, said("three", c=3, app__c=3))
        assert texts(session) == ["one"]
        found = await again(sessions, session)
        assert texts(found) == ["one", "two"]
        assert found.state == {"a": 1, "b": 2}
        await sessions.append_event(found, said("three"))

    run(work)


def test_of_writers_at_once_one_wins(run: Any) -> None:
    async def work(sessions: AgentStateSessionService) -> None:
        session = await sessions.create_session(**ANN)
        for number in range(4):
            copies = [await again(sessions, session) for _ in range(3)]
            outcomes = await asyncio.gather(
                *(sessions.append_event(each, said(f"{number} {place}")) for place, each in enumerate(copies)),
                return_exceptions=True,
            )
            assert sum(isinstance(outcome, StaleSessionError) for outcome in outcomes) == 2
            assert sum(isinstance(outcome, Event) for outcome in outcomes) == 1
        assert [text[0] for text in texts(await again(sessions, session))] == list("0123")

    run(work)


@sqlite_only
def test_a_session_may_append_several_events_at_once(run: Any) -> None:
    """As the branches of one invocation do, which share the object."""

    async def work(sessions: AgentStateSessionService) -> None:
        session = await sessions.create_session(**ANN)
        await asyncio.gather(*(sessions.append_event(session, said(str(number))) for number in range(8)))
        assert sorted(texts(session)) == list("01234567")
        assert texts(await again(sessions, session)) == texts(session)

    run(work)


@sqlite_only
def test_a_session_that_was_not_read_here_tells_by_its_events(run: Any) -> None:
    async def work(sessions: AgentStateSessionService) -> None:
        session = await sessions.create_session(**ANN)
        empty = Session(**session.model_dump())
        await sessions.append_event(session, said("one"))
        rebuilt = Session(**session.model_dump())
        with pytest.raises(StaleSessionError):
            await sessions.append_event(empty, said("not here"))
        await sessions.append_event(rebuilt, said("two"))
        assert texts(await again(sessions, session)) == ["one", "two"]

    run(work)


@sqlite_only
def test_others_entries_do_not_make_a_session_stale(run: Any, service: Service) -> None:
    async def work(sessions: AgentStateSessionService) -> None:
        session = await sessions.create_session(**ANN, state={"a": 0})
        await sessions.append_event(session, said("one", a=1))
        with service.client.turn(sessions.session_id(**ANN, session_id=session.id)) as turn:
            turn.append(message({"role": "user", "content": "from elsewhere"}), note({"seen": True}))
        assert texts(await again(sessions, session)) == ["one"]
        assert (await again(sessions, session, num_recent_events=0)).state == {"a": 1}
        assert [each.state for each in (await sessions.list_sessions(**ANN)).sessions] == [{"a": 1}]
        await sessions.append_event(session, said("two"))
        assert texts(await again(sessions, session)) == ["one", "two"]

    run(work)


@sqlite_only
def test_an_event_that_is_appended_during_a_read(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is read with what it changed."""

    async def work(sessions: AgentStateSessionService) -> None:
        session = await sessions.create_session(**ANN)
        await sessions.append_event(session, said("one", a=1))
        entries = sessions._client.entries

        async def late(*args: Any, **options: Any) -> Any:
            monkeypatch.undo()
            await sessions.append_event(session, said("two", a=2, b=2))
            return await entries(*args, **options)

        monkeypatch.setattr(sessions._client, "entries", late)
        found = await again(sessions, session, num_recent_events=5)
        assert texts(found) == ["one", "two"]
        assert found.state == {"a": 2, "b": 2}
        await sessions.append_event(found, said("three"))

    run(work)


@sqlite_only
def test_an_event_is_stored_once(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is appended, even where the answer to the first time was lost."""

    async def work(sessions: AgentStateSessionService) -> None:
        session = await sessions.create_session(**ANN)
        event = said("one", count=1)
        for again_ in (event, event, event.model_copy(deep=True)):
            await sessions.append_event(session, again_)
        # Of the same id, but another one.
        await sessions.append_event(session, Event(id=event.id, author="agent", content=event.content))

        append = AgentStateSessionService._append

        async def lost(*args: Any) -> Any:
            monkeypatch.undo()
            await append(sessions, *args)
            raise ServiceUnreachable("after it was stored")

        monkeypatch.setattr(sessions, "_append", lost)
        with pytest.raises(ServiceUnreachable):
            await sessions.append_event(session, late := said("two", count=2))
        assert texts(session) == ["one", "one"]
        await sessions.append_event(session, late)
        await sessions.append_event(session, said("three"))
        found = await again(sessions, session)
        assert texts(found) == texts(session) == ["one", "one", "two", "three"]
        assert found.state == session.state == {"count": 2}

    run(work)


# --- state


def test_whose_state_it_is(run: Any) -> None:
    async def work(sessions: AgentStateSessionService) -> None:
        first = await sessions.create_session(**ANN, state={"app:a": 1, "user:u": 1, "s": 1, "temp:t": 1})
        assert first.state == {"app:a": 1, "user:u": 1, "s": 1}
        await sessions.append_event(first, said("x", app__a=2, app__b={"c": 1}, user__u=None, s=2, temp__t=2))
        assert first.state["temp:t"] == 2  # for the rest of the invocation
        assert "temp:t" not in first.events[0].actions.state_delta
        expected = {"app:a": 2, "app:b": {"c": 1}, "user:u": None}
        assert (await again(sessions, first)).state == {**expected, "s": 2}
        assert "temp:t" not in (await again(sessions, first)).events[0].actions.state_delta
        assert (await sessions.create_session(**ANN, state={"s": 3})).state == {**expected, "s": 3}
        stranger = await sessions.create_session(**BOB)
        assert stranger.state == {"app:a": 2, "app:b": {"c": 1}}
        assert (await sessions.create_session(app_name="bank", user_id="ann")).state == {}
        assert await sessions.get_user_state(**ANN) == {"u": None}
        assert await sessions.get_user_state(**NOBODY) == {}
        assert await sessions.get_user_state(app_name="bank", user_id="ann") == {}

    run(work)


@sqlite_only
def test_a_change_replaces_a_value(run: Any) -> None:
    async def work(sessions: AgentStateSessionService) -> None:
        session = await sessions.create_session(
            **ANN,
            state={"who": {"name": "ann", "role": "admin"}, "yes": True, "no": False, "app:cfg": {"x": 1, "y": 2}},
        )
        await sessions.append_event(session, said("x", who={"name": "bob"}, yes=None, app__cfg={"x": 3}))
        found = await again(sessions, session)
        assert found.state == session.state == {"who": {"name": "bob"}, "yes": None, "no": False, "app:cfg": {"x": 3}}
        assert found.state["no"] is False

    run(work)


@sqlite_only
def test_values_that_json_has_no_form_of_are_kept_as_text(run: Any) -> None:
    async def work(sessions: AgentStateSessionService) -> None:
        session = await sessions.create_session(**ANN, state={"call": print, "app:call": print, "nan": float("nan")})
        await sessions.append_event(session, said("x", later=print, user__later=print, fine=1, odd="\udcff"))
        state = (await again(sessions, session)).state
        assert {name for name, value in state.items() if isinstance(value, str)} == {
            *("call", "app:call", "nan", "later", "user:later", "odd")
        }
        assert (state["fine"], state["odd"]) == (1, "\udcff")

    run(work)


def test_changes_of_an_app_at_once(run: Any) -> None:
    """None is lost, the first ones included, which make the place for them."""

    async def work(sessions: AgentStateSessionService) -> None:
        async def write(number: int) -> None:
            owner = {"app_name": "shop", "user_id": f"u{number % 2}"}
            session = await sessions.create_session(**owner, state={f"app:{number}": 1})
            await sessions.append_event(session, said("x", **{f"user__{number}": 1, f"app__later{number}": 1}))

        await asyncio.gather(*(write(number) for number in range(6)))
        last = await sessions.create_session(app_name="shop", user_id="u1")
        assert last.state == {
            **{f"app:{number}": 1 for number in range(6)},
            **{f"app:later{number}": 1 for number in range(6)},
            **{f"user:{number}": 1 for number in (1, 3, 5)},
        }

    run(work)


@sqlite_only
def test_state_that_is_too_large_for_metadata(run: Any) -> None:
    large = "x" * 70_000

    async def work(sessions: AgentStateSessionService) -> None:
        session = await sessions.create_session(**ANN, session_id="s", state={"a": large, "b": 1, "app:a": large})
        assert session.state == {"a": large, "b": 1, "app:a": large}
        await sessions.append_event(session, said("one", b=2))
        await sessions.append_event(session, said("two", app__b=large))
        expected = {"a": large, "b": 2, "app:a": large, "app:b": large}
        assert (await again(sessions, session)).state == expected
        assert (await again(sessions, session, num_recent_events=1)).state == expected
        assert [each.state for each in (await sessions.list_sessions(**ANN)).sessions] == [expected]
        await sessions.append_event(session, said("three", a="small", app__a=None, app__b=None))
        found = await again(sessions, session)
        assert found.state == {"a": "small", "b": 2, "app:a": None, "app:b": None}
        assert texts(found) == ["one", "two", "three"]

    run(work)


@sqlite_only
def test_a_checkpoint_that_was_not_written(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer vanished before it: everything is in the entries."""

    async def work(sessions: AgentStateSessionService) -> None:
        session = await sessions.create_session(**ANN, state={"a": 0, "b": 0})
        await sessions.append_event(session, said("one", a=1, app__a=1, time=10.0))

        async def nothing(*_: Any) -> None: ...

        with monkeypatch.context() as patch:
            patch.setattr(sessions, "_checkpoint", nothing)
            await sessions.append_event(session, said("two", a=2, app__a=2, time=20.0))
        for config in ({}, {"num_recent_events": 0}):
            found = await again(sessions, session, **config)
            assert found.state == {"a": 2, "b": 0, "app:a": 2}
            assert found.last_update_time == 20.0
        assert [each.last_update_time for each in (await sessions.list_sessions(**ANN)).sessions] == [20.0]
        await sessions.append_event(session, said("three", b=3))
        assert (await again(sessions, session)).state == {"a": 2, "b": 3, "app:a": 2}

    run(work)


@sqlite_only
def test_a_session_that_was_rewound_or_forked(run: Any, service: Service) -> None:
    async def work(sessions: AgentStateSessionService) -> None:
        session = await sessions.create_session(**ANN, session_id="s", state={"a": 0})
        for number in (1, 2, 3):
            await sessions.append_event(session, said(str(number), a=number, **{f"seen{number}": True}))
        name = sessions.session_id(**ANN, session_id="s")
        second = service.client.entries(name).data[1]
        service.client.fork(name, at=second.id, id=sessions.session_id(**ANN, session_id="fork"), revision="*")
        service.client.rewind(name, service.client.entries(name).data[0].id, revision="*")
        with pytest.raises(StaleSessionError):
            await sessions.append_event(session, said("4"))
        for id, expected in (("s", 1), ("fork", 2)):
            found = await sessions.get_session(**ANN, session_id=id)
            assert found is not None
            seen = {f"seen{number}": True for number in range(1, expected + 1)}
            assert (len(found.events), found.state) == (expected, {"a": expected, **seen})
            await sessions.append_event(found, said("x", a=9))
            assert (await again(sessions, found, num_recent_events=0)).state == {"a": 9, **seen}
        assert {each.id for each in (await sessions.list_sessions(**ANN)).sessions} == {"s", "fork"}

    run(work)


@sqlite_only
def test_what_cannot_be_created_leaves_nothing(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(sessions: AgentStateSessionService) -> None:
        deep: Any = {}
        for _ in range(100):
            deep = {"in": deep}
        with pytest.raises(InvalidEntry):
            await sessions.create_session(**ANN, session_id="s", state={"deep": deep})
        with pytest.raises(InvalidEntry):
            await sessions.create_session(**ANN, session_id="s", state={"app:deep": deep})
        assert await sessions.get_session(**ANN, session_id="s") is None

    run(work)


@sqlite_only
def test_state_of_apps_and_users_does_not_expire(run: Any, service: Service) -> None:
    async def work(sessions: AgentStateSessionService) -> None:
        with service.database.write() as connection:
            tenants.put(connection, Tenant(DEFAULT_TENANT, expires_in_s=60, requests_per_s=None))
        session = await sessions.create_session(**ANN, session_id="s", state={"app:a": 1, "user:u": 2})
        assert service.client.read(sessions.session_id(**ANN, session_id="s")).expires_at is not None
        with service.database.write() as connection:
            connection.exec_driver_sql("UPDATE sessions SET expires_us = 1 WHERE expires_us IS NOT NULL")
        assert await sessions.get_session(**ANN, session_id="s") is None
        with pytest.raises(SessionNotFoundError):
            await sessions.append_event(session, said("too late"))
        assert (await sessions.create_session(**ANN)).state == {"app:a": 1, "user:u": 2}

    run(work)


# --- tool calls


def calling(*ids: str, long: bool = False) -> Event:
    calls = [types.Part(function_call=types.FunctionCall(id=id, name="look", args={"at": id})) for id in ids]
    return Event(
        author="agent",
        content=types.Content(role="model", parts=calls),
        long_running_tool_ids=set(ids) if long else None,
    )


def answering(*ids: str, author: str = "agent") -> Event:
    answers = [
        types.Part(function_response=types.FunctionResponse(id=id, name="look", response={"seen": id})) for id in ids
    ]
    return Event(author=author, content=types.Content(role="user", parts=answers))


@pytest.fixture
def pending(service: Service) -> Callable[[AgentStateSessionService, Session], list[str]]:
    """The calls that a session is paused for."""

    def look(sessions: AgentStateSessionService, session: Session) -> list[str]:
        name = sessions.session_id(session.app_name, session.user_id, session.id)
        assert service.client.read(name).status is SessionStatus.SUSPENDED
        with service.client.turn(name, tail=0) as turn:
            return turn.pending_tool_calls

    return look


@sqlite_only
def test_a_pause_for_tools_is_known(run: Any, pending: Any, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons: list[str] = []

    async def work(sessions: AgentStateSessionService) -> None:
        session = await sessions.create_session(**ANN)
        send = sessions._client._send

        async def watched(call: Any, **options: Any) -> Any:
            if call.path.endswith("/suspend"):
                reasons.append(call.body["reason"])
            return await send(call, **options)

        monkeypatch.setattr(sessions._client, "_send", watched)
        await sessions.append_event(session, calling("a", "b"))
        assert pending(sessions, session) == ["a", "b"]
        await sessions.append_event(session, answering("b", "of no call"))
        assert pending(sessions, session) == ["a"]
        await sessions.append_event(session, answering("a"))
        await sessions.append_event(session, answering("a"))
        assert pending(sessions, session) == []
        entries = service.client.entries(sessions.session_id(**ANN, session_id=session.id)).data
        assert [(entry.kind, entry.call_id) for entry in entries] == [
            (EntryKind.MESSAGE, None),
            *[(EntryKind.TOOL_CALL, "a"), (EntryKind.TOOL_CALL, "b")],
            *[(EntryKind.MESSAGE, None), (EntryKind.TOOL_RESULT, "b")],
            *[(EntryKind.MESSAGE, None), (EntryKind.TOOL_RESULT, "a")],
            (EntryKind.MESSAGE, None),
        ]
        assert entries[1].payload["name"] == "look"
        assert reasons == ["tool_wait", "tool_wait", "user_wait", "user_wait"]
        assert (await again(sessions, session)).events == session.events

    run(work)


@sqlite_only
def test_a_tool_that_runs_for_long_is_waited_for_until_the_user_answers(run: Any, pending: Any) -> None:
    async def work(sessions: AgentStateSessionService) -> None:
        session = await sessions.create_session(**ANN)
        await sessions.append_event(session, calling("a", long=True))
        await sessions.append_event(session, answering("a"))
        assert pending(sessions, session) == ["a"]
        await sessions.append_event(session, answering("a", author="user"))
        assert pending(sessions, session) == []

    run(work)


@sqlite_only
def test_calls_whose_ids_say_nothing(run: Any, pending: Any) -> None:
    """Of models that number their calls anew in every answer, or not at all."""

    async def work(sessions: AgentStateSessionService) -> None:
        session = await sessions.create_session(**ANN)
        for event in (calling("1", "1"), answering("1"), calling("1", "2"), answering("1"), calling(""), calling("\n")):
            await sessions.append_event(session, event)
        assert pending(sessions, session) == []
        assert (await again(sessions, session)).events == session.events
        # The gateway has claimed this call when it saw the model's answer.
        name = sessions.session_id(**ANN, session_id=session.id)
        await sessions._client.claim_tool_call(name, "seen", "look")
        await sessions.append_event(session, calling("seen", "new"))
        assert pending(sessions, session) == ["seen", "new"]
        await sessions.append_event(session, answering("seen", "new"))
        assert pending(sessions, session) == []

    run(work)


# --- agents


class Script(BaseLlm):
    """A model that calls the tool when the user speaks, and then tells what it answered."""

    seen: list[list[str]] = []

    async def generate_content_async(
        self, llm_request: LlmRequest, stream: bool = False
    ) -> AsyncGenerator[LlmResponse, None]:
        parts = [part for content in llm_request.contents for part in content.parts or []]
        self.seen.append([part.text or (part.function_call and "call") or "result" for part in parts])
        answer = parts[-1].function_response
        if answer is None:
            call = types.FunctionCall(name="ask", args={"what": parts[-1].text})
            said = types.Part(function_call=call)
        else:
            said = types.Part(text=f"They say {answer.response}")
        yield LlmResponse(content=types.Content(role="model", parts=[said]))


def test_an_agent_goes_on_after_its_service_was_restarted(database_url: str, tmp_path: Path) -> None:
    """While it waits for a person."""

    def ask(what: str) -> None:
        """Asks a person."""

    model = Script(model="scripted")
    agent = Agent(
        name="clerk", model=model, instruction="Ask.", tools=[LongRunningFunctionTool(ask)], output_key="last"
    )
    owner: dict[str, Any] = {"user_id": "ann", "session_id": "s"}

    async def say(sessions: AgentStateSessionService, part: types.Part) -> list[Event]:
        runner = Runner(app_name="shop", agent=agent, session_service=sessions)
        said = types.Content(role="user", parts=[part])
        return [event async for event in runner.run_async(**owner, new_message=said)]

    async def begin(sessions: AgentStateSessionService) -> str:
        await sessions.create_session(app_name="shop", **owner, state={"user:name": "Ann"})
        events = await say(sessions, types.Part(text="May I?"))
        return str(events[-1].get_function_calls()[0].id)

    async def go_on(sessions: AgentStateSessionService) -> Session:
        answer = types.FunctionResponse(id=call_id, name="ask", response={"answer": "yes"})
        await say(sessions, types.Part(function_response=answer))
        found = await sessions.get_session(app_name="shop", **owner)
        assert found is not None
        return found

    settings = Settings(home=tmp_path, database_url=database_url)
    with serving(settings) as service:
        call_id = running(service.base_url, begin)
    with serving(settings) as service:
        name = AgentStateSessionService(AsyncClient(service.base_url), model=MODEL).session_id("shop", "ann", "s")
        assert service.client.read(name).status is SessionStatus.SUSPENDED
        session = running(service.base_url, go_on)
        resumed = service.client.resume(name)
    assert resumed.pending_tool_calls == []
    assert model.seen == [["May I?"], ["May I?", "call", "result"]]
    assert session.state == {"user:name": "Ann", "last": "They say {'answer': 'yes'}"}
    assert [event.author for event in session.events] == ["user", "clerk", "user", "clerk"]


@sqlite_only
def test_the_gateway_serves_the_session(run: Any, service: Service, chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent whose model is behind the gateway has one session, and not another one there."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it asks the network for prices
    from google.adk.models.lite_llm import LiteLlm

    def look(at: str) -> str:
        """Looks at something."""
        return f"a {at}"

    def reply(request: dict[str, Any]) -> dict[str, Any]:
        last = request["messages"][-1]
        if last["role"] == "tool":
            return {"content": f"I see {last['content']}."}
        call = {"name": "look", "arguments": '{"at": "cat"}'}
        return {"tool_calls": [{"id": f"call_{len(request['messages'])}", "type": "function", "function": call}]}

    engine = chat(reply)

    async def work(sessions: AgentStateSessionService) -> None:
        model = LiteLlm(model=f"openai/{MODEL}", base_url=f"{service.base_url}/v1", api_key="none")
        agent = Agent(name="eye", model=model, tools=[look], before_model_callback=sessions.name_session)
        runner = Runner(app_name="shop", agent=agent, session_service=sessions)
        for id in ("a b/ü", "other"):
            await sessions.create_session(**ANN, session_id=id)
            for question in ("What is this?", "And this?"):
                said = types.Content(role="user", parts=[types.Part(text=question)])
                async for _ in runner.run_async(user_id="ann", session_id=id, new_message=said):
                    pass
            found = await sessions.get_session(**ANN, session_id=id)
            assert found is not None
            assert len(found.events) == 8
            kinds = [entry.kind for entry in service.client.entries(sessions.session_id(**ANN, session_id=id)).data]
            assert [kinds.count(kind) for kind in (EntryKind.TOOL_CALL, EntryKind.TOOL_RESULT)] == [2, 2]

    run(work)
    names = {session.id.rpartition("_")[2] for session in service.client.list_sessions().data}
    assert names == {"a b/ü", "other"}
    assert len(engine.requests) == 8


# --- what ADK asks of a session service


def test_adks_own_tests() -> None:
    """They need a checkout of ADK, because it does not install them."""
    checkout = os.environ.get("ADK_CHECKOUT")
    if not checkout:
        pytest.skip("no ADK_CHECKOUT: clone https://github.com/google/adk-python (2.0 or newer), and name it")
    here = Path(__file__).parent
    places = [here.parent, here, here.parent / "integration"]
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-c", os.devnull, f"--rootdir={checkout}"),
            *("--noconftest", "-p", "conftest", "-p", "adk_upstream", "-p", "no:asyncio", "-p", "no:cacheprovider"),
            *("-o", "markers=asyncio", f"{checkout}/tests/unittests/sessions/test_session_service.py"),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
