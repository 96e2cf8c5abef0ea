"""The Session protocol, used by the real SDK against a real service."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from agents import Agent, Runner, SessionSettings, function_tool
from agents.memory import Session
from stage import MODEL, Service

from agentstate.adapters.openai_agents import AgentStateSession
from agentstate.client import AsyncClient, message, note
from agentstate.errors import LeaseLost, RequestRefused, SessionBusy
from agentstate.fleet import turns
from agentstate.sql.models import SessionStatus


def item(text: str) -> Any:
    return {"role": "user", "content": text}


def texts(items: list[Any]) -> list[str]:
    return [each["content"] for each in items]


@pytest.fixture
def run(service: Service) -> Callable[[Callable[[AsyncClient], Awaitable[Any]]], Any]:
    """Runs an async function of a client to its end."""

    def to_the_end(work: Callable[[AsyncClient], Awaitable[Any]]) -> Any:
        async def with_client() -> Any:
            async with AsyncClient(service.base_url) as client:
                return await work(client)

        return asyncio.run(with_client())

    return to_the_end


# The database is the service's concern, and its tests': here SQLite is enough but for the writers at once.
sqlite_only = pytest.mark.parametrize("backend", ["sqlite"])


@sqlite_only
def test_it_is_a_session_of_the_sdk(run: Any) -> None:
    async def work(client: AsyncClient) -> None:
        assert isinstance(AgentStateSession("s", client, model=MODEL), Session)

    run(work)


@sqlite_only
def test_items_come_back_in_order_and_unchanged(run: Any) -> None:
    items: list[Any] = [
        item("question"),
        {"type": "function_call", "call_id": "c1", "name": "read", "arguments": '{"path": "a"}', "id": "x"},
        {"type": "function_call_output", "call_id": "c1", "output": "text é 漢"},
        {
            "type": "message",
            "role": "assistant",
            "id": "m",
            "status": "completed",
            "content": [{"type": "output_text"}],
        },
    ]

    async def work(client: AsyncClient) -> None:
        session = AgentStateSession("s", client, model=MODEL)
        await session.add_items([])
        assert await session.get_items() == []
        await session.add_items(items[:2])
        await session.add_items(items[2:])
        assert await AgentStateSession("s", client, model=MODEL).get_items() == items

    run(work)


@sqlite_only
def test_limits(run: Any) -> None:
    async def work(client: AsyncClient) -> None:
        session = AgentStateSession("s", client, model=MODEL, session_settings=SessionSettings(limit=3))
        await session.add_items([item(str(number)) for number in range(5)])
        assert texts(await session.get_items()) == ["2", "3", "4"]
        assert texts(await session.get_items(limit=2)) == ["3", "4"]
        assert texts(await session.get_items(limit=9)) == ["0", "1", "2", "3", "4"]
        assert await session.get_items(limit=0) == []

    run(work)


@sqlite_only
def test_a_conversation_of_more_than_a_page(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentstate.adapters.openai_agents.PAGE", 7)
    numbers = [str(number) for number in range(20)]

    async def work(client: AsyncClient) -> None:
        session = AgentStateSession("s", client, model=MODEL)
        await session.add_items([item(number) for number in numbers])
        assert texts(await session.get_items()) == numbers
        assert texts(await session.get_items(limit=16)) == numbers[4:]

    run(work)


@sqlite_only
def test_clearing_starts_over(run: Any) -> None:
    async def work(client: AsyncClient) -> None:
        session = AgentStateSession("s", client, model=MODEL)
        await session.clear_session()
        await session.add_items([item("old")])
        await session.clear_session()
        assert await session.get_items() == []
        assert await session.pop_item() is None
        await session.add_items([item("new"), item("newer")])
        assert texts(await session.get_items()) == ["new", "newer"]
        assert texts(await session.get_items(limit=5)) == ["new", "newer"]

    run(work)


@sqlite_only
def test_popping_the_only_item(run: Any) -> None:
    async def work(client: AsyncClient) -> None:
        session = AgentStateSession("s", client, model=MODEL)
        assert await session.pop_item() is None
        await session.add_items([item("only")])
        assert await session.pop_item() == item("only")
        assert await session.get_items() == []
        assert (await client.entries("s")).data == []

    run(work)


@sqlite_only
def test_popping_takes_back_the_newest_item(run: Any) -> None:
    async def work(client: AsyncClient) -> None:
        session = AgentStateSession("s", client, model=MODEL)
        await session.add_items([item("a"), item("b"), item("c")])
        assert await session.pop_item() == item("c")
        async with session:
            assert session.turn is not None
            await session.turn.append(note({"seen": True}))
            assert await session.pop_item() == item("b")
            await session.add_items([item("d")])
        assert texts(await session.get_items()) == ["a", "d"]
        assert [entry.payload for entry in (await client.entries("s")).data] == [item("a"), item("d")]

    run(work)


def test_two_writers_at_once(run: Any, service: Service) -> None:
    """Nothing is lost, nothing is doubled, and what one writer added at once stays together."""

    async def write(name: str) -> None:
        async with AsyncClient(service.base_url) as client:
            session = AgentStateSession("s", client, model=MODEL, busy_timeout_s=30)
            for number in range(10):
                await session.add_items([item(f"{name}{number} {part}") for part in ("question", "answer")])

    async def work(client: AsyncClient) -> list[str]:
        await asyncio.gather(write("a"), write("b"))
        return texts(await AgentStateSession("s", client, model=MODEL).get_items())

    found = run(work)
    assert sorted(found) == sorted(
        f"{name}{number} {part}" for name in "ab" for number in range(10) for part in ("question", "answer")
    )
    for question, answer in zip(found[::2], found[1::2], strict=True):
        assert (question.partition(" ")[0], question.partition(" ")[2]) == (answer.partition(" ")[0], "question")
    for name in "ab":
        own = [text for text in found if text.startswith(name)]
        assert own == sorted(own, key=lambda text: (int(text[1:].partition(" ")[0]), "answer" in text))


def test_two_poppers_never_get_the_same_item(run: Any, service: Service) -> None:
    async def pop() -> list[str]:
        async with AsyncClient(service.base_url) as client:
            session = AgentStateSession("s", client, model=MODEL, busy_timeout_s=30)
            found = []
            while popped := await session.pop_item():
                found.append(popped["content"])
            return found

    async def work(client: AsyncClient) -> tuple[list[str], list[str]]:
        await AgentStateSession("s", client, model=MODEL).add_items([item(str(number)) for number in range(12)])
        return await asyncio.gather(pop(), pop())

    first, second = run(work)
    assert sorted(first + second, key=int) == [str(number) for number in range(12)]


@sqlite_only
def test_a_block_keeps_others_out(run: Any) -> None:
    async def work(client: AsyncClient) -> None:
        other = AgentStateSession("s", client, model=MODEL, busy_timeout_s=0.1)
        async with AgentStateSession("s", client, model=MODEL) as session:
            await session.add_items([item("mine")])
            with pytest.raises(SessionBusy):
                await other.add_items([item("not now")])
            with pytest.raises(SessionBusy):
                await AgentStateSession("s", client, model=MODEL).__aenter__()
            assert texts(await other.get_items()) == ["mine"]
        await other.add_items([item("now")])
        assert texts(await session.get_items()) == ["mine", "now"]

    run(work)


@sqlite_only
def test_messages_of_others_are_part_of_the_conversation(run: Any) -> None:
    async def work(client: AsyncClient) -> None:
        await client.create_session("other", id="s")
        async with client.turn("s") as turn:
            await turn.append(message(item("from elsewhere")), note({"not": "an item"}))
        session = AgentStateSession("s", client, model=MODEL)
        assert texts(await session.get_items(limit=1)) == ["from elsewhere"]
        async with session:
            assert session.turn is not None
            assert session.turn.session.model == "other"

    run(work)


@sqlite_only
def test_popping_for_ever(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as a history may have segments, and then forked."""
    monkeypatch.setattr("agentstate.sessions.branches.MAX_SEGMENTS", 12)
    monkeypatch.setattr("agentstate.sessions.branches.COMPACT_AT", 8)

    async def work(client: AsyncClient) -> None:
        session = AgentStateSession("s", client, model=MODEL)
        async with session:
            for number in range(30):
                await session.add_items([item(str(number)), item("wrong")])
                assert await session.pop_item() == item("wrong")
        assert texts(await session.get_items()) == [str(number) for number in range(30)]
        fork = await client.fork("s", revision="*")
        assert texts(await AgentStateSession(fork.id, client, model=MODEL).get_items(limit=2)) == ["28", "29"]

    run(work)


@sqlite_only
def test_items_that_are_too_many_for_one_request(run: Any, service: Service) -> None:
    many = [item(str(number)) for number in range(2500)]
    large = [item(f"{number} {'é' * 1_000_000}") for number in range(6)]

    async def work(client: AsyncClient) -> None:
        session = AgentStateSession("s", client, model=MODEL)
        await session.add_items(many)
        await session.add_items(large)
        assert await session.get_items(limit=6) == large
        with pytest.raises(RequestRefused, match="body-too-large"):
            await session.add_items([*many, item("x" * 9_000_000)])
        assert await session.get_items() == [*many, *large]

    run(work)


@sqlite_only
def test_changes_of_one_session_at_once(run: Any) -> None:
    """Of one object, in a block and without one."""

    async def work(client: AsyncClient) -> None:
        session = AgentStateSession("s", client, model=MODEL)
        for block in (contextlib.nullcontext(), session):
            await session.add_items([item(str(number)) for number in range(8)])
            async with block:
                popped = await asyncio.gather(*(session.pop_item() for _ in range(10)))
            assert sorted(texts([each for each in popped if each is not None])) == list("01234567")
            assert popped.count(None) == 2

    run(work)


@sqlite_only
def test_a_pop_takes_what_is_the_newest(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where something was appended, in the same turn, between reading it and taking it back."""

    async def work(client: AsyncClient) -> None:
        async with AgentStateSession("s", client, model=MODEL) as session:
            await session.add_items([item("old")])
            rewind, turn = client.rewind, session.turn
            assert turn is not None

            async def late(*args: Any, **kwargs: Any) -> Any:
                monkeypatch.undo()
                await turn.append(message(item("new")))
                return await rewind(*args, **kwargs)

            monkeypatch.setattr(client, "rewind", late)
            assert await session.pop_item() == item("new")
            assert texts(await session.get_items()) == ["old"]

    run(work)


# --- agents


@function_tool
def add(a: int, b: int) -> int:
    """The sum of two numbers."""
    return a + b


def calculating(request: dict[str, Any]) -> dict[str, Any]:
    """Asks for the tool when the user speaks, and tells its result."""
    last = request["messages"][-1]
    if last["role"] == "tool":
        return {"content": f"It is {last['content']}."}
    call = {"name": "add", "arguments": json.dumps({"a": 2, "b": 40})}
    return {"tool_calls": [{"id": f"call_{len(request['messages'])}", "type": "function", "function": call}]}


@sqlite_only
def test_an_agent_goes_on_in_another_process(run: Any, service: Service, chat: Any) -> None:
    engine = chat(calculating)
    service.client.create_session(MODEL, id="s", cache_salt="salt")

    async def ask(client: AsyncClient) -> str:
        agent = Agent(name="calculator", instructions="You add numbers.", tools=[add])
        async with AgentStateSession("s", client, model=MODEL) as session:
            result = await Runner.run(agent, "2 + 40?", session=session, run_config=session.run_config())
        assert session.turn is not None
        assert session.turn.suspended is not None
        return str(result.final_output)

    assert [run(ask), run(ask)] == ["It is 42.", "It is 42."]
    # The engine was told whose KV it is, and saw the whole conversation both times.
    resumed = service.client.resume("s")
    assert resumed.engine is not None
    (session_id, _), salt = (
        turns.split(resumed.engine.extra_body["session_id"]),
        resumed.engine.extra_body["cache_salt"],
    )
    assert {request["cache_salt"] for request in engine.requests} == {salt}
    sent = [turns.split(request["session_id"]) for request in engine.requests]
    assert {one for one, _ in sent} == {session_id}
    # Each turn has proved itself.
    first, second = sent[0][1], sent[2][1]
    assert first != second
    assert [token for _, token in sent] == [first, first, second, second]
    assert [len(request["messages"]) for request in engine.requests] == [2, 4, 6, 8]
    assert [message["role"] for message in engine.requests[-1]["messages"]] == [
        "system",
        *["user", "assistant", "tool", "assistant"],
        *["user", "assistant", "tool"],
    ]


@sqlite_only
def test_an_agent_that_fails_is_suspended_with_what_it_had(run: Any, service: Service, chat: Any) -> None:
    chat(calculating)

    @function_tool(failure_error_function=None)
    def add(a: int, b: int) -> int:
        """The sum of two numbers."""
        raise ZeroDivisionError("broken")

    async def ask(client: AsyncClient) -> None:
        agent = Agent(name="calculator", tools=[add])
        async with AgentStateSession("s", client, model=MODEL) as session:
            await Runner.run(agent, "2 + 40?", session=session, run_config=session.run_config())

    with pytest.raises(Exception, match="broken"):
        run(ask)
    assert service.client.read("s").status is SessionStatus.SUSPENDED
    assert service.client.entries("s").data[0].payload["content"] == "2 + 40?"


def calls(service: Service) -> list[tuple[str, str, float | None]]:
    with service.database.read() as connection:
        found = connection.exec_driver_sql("SELECT name, state, expected_s FROM tool_calls ORDER BY call_seq")
        return [(row.name, row.state, row.expected_s) for row in found]


@sqlite_only
def test_its_hooks_tell_when_tools_begin_and_end(run: Any, service: Service, chat: Any) -> None:
    chat(calculating)
    states: list[Any] = []

    @function_tool
    def add(a: int, b: int) -> int:
        """The sum of two numbers."""
        states.append(calls(service)[-1])
        return a + b

    async def ask(client: AsyncClient) -> str:
        agent = Agent(name="calculator", tools=[add])
        async with AgentStateSession("s", client, model=MODEL) as session:
            hooks, config = session.hooks({"add": 2.5}), session.run_config()
            return str(
                (await Runner.run(agent, "2 + 40?", session=session, run_config=config, hooks=hooks)).final_output
            )

    assert [run(ask), run(ask)] == ["It is 42.", "It is 42."]
    assert states == [("add", "claimed", 2.5)] * 2
    assert calls(service) == [("add", "done", 2.5)] * 2
    # The items are what they were without hooks.
    items = run(lambda client: AgentStateSession("s", client, model=MODEL).get_items())
    assert [each.get("type", "message") for each in items][:4] == [
        "message",
        "function_call",
        "function_call_output",
        "message",
    ]
    assert len(items) == 8


@sqlite_only
def test_a_tool_that_raises_is_not_waited_for(run: Any, service: Service, chat: Any) -> None:
    chat(calculating)

    @function_tool(failure_error_function=None)
    def add(a: int, b: int) -> int:
        """The sum of two numbers."""
        raise ZeroDivisionError("broken")

    async def ask(client: AsyncClient) -> None:
        agent = Agent(name="calculator", tools=[add])
        async with AgentStateSession("s", client, model=MODEL) as session:
            config, hooks = session.run_config(), session.hooks()
            await Runner.run(agent, "2 + 40?", session=session, run_config=config, hooks=hooks)

    with pytest.raises(Exception, match="broken"):
        run(ask)
    assert calls(service) == [("add", "failed", None)]
    assert service.client.read("s").status is SessionStatus.SUSPENDED


@sqlite_only
def test_a_call_that_cannot_be_claimed_is_run_all_the_same(run: Any, service: Service, chat: Any) -> None:
    chat(calculating)
    service.client.create_session(MODEL, id="s")
    service.client.claim_tool_call("s", "call_1", "add")

    async def ask(client: AsyncClient) -> str:
        agent = Agent(name="calculator", tools=[add])
        session = AgentStateSession("s", client, model=MODEL)
        hooks = session.hooks()
        async with session:
            config = session.run_config()
            return str(
                (await Runner.run(agent, "2 + 40?", session=session, run_config=config, hooks=hooks)).final_output
            )

    assert run(ask) == "It is 42."
    assert calls(service) == [("add", "claimed", None)]


@sqlite_only
def test_an_agent_whose_lease_is_lost_writes_no_more(run: Any, service: Service, chat: Any) -> None:
    def reply(request: dict[str, Any]) -> dict[str, Any]:
        # Meanwhile somebody else takes the session over.
        with service.database.write() as connection:
            connection.exec_driver_sql("UPDATE leases SET expires_us = 1")
        service.client.resume("s")
        return {"content": "too late"}

    chat(reply)

    async def ask(client: AsyncClient) -> None:
        async with AgentStateSession("s", client, model=MODEL) as session:
            await Runner.run(Agent(name="a"), "Hello", session=session, run_config=session.run_config())

    with pytest.raises(LeaseLost):
        run(ask)
    assert [entry.payload["content"] for entry in service.client.entries("s").data] == ["Hello"]


@sqlite_only
def test_run_config_needs_a_turn(run: Any) -> None:
    async def work(client: AsyncClient) -> None:
        with pytest.raises(RuntimeError, match="not being run"):
            AgentStateSession("s", client, model=MODEL).run_config()

    run(work)
