"""The OpenAI Agents SDK on the gateway, with the sessions and the models that it has for OpenAI's own API."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from agents import Agent, OpenAIConversationsSession, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from engines import Asked, ScriptedEngine, called, response, response_events, said, scripted
from openai import AsyncOpenAI, NotFoundError
from stage import MODEL, Service, register, serving

from agentstate.settings import Settings

pytestmark = pytest.mark.parametrize("backend", ["sqlite"])
set_tracing_disabled(True)


@dataclass
class Stage:
    service: Service
    engine: ScriptedEngine

    def run(self, work: Callable[[AsyncOpenAI], Awaitable[Any]]) -> Any:
        """Runs an async function of a client to its end."""

        async def with_client() -> Any:
            async with AsyncOpenAI(base_url=f"{self.service.base_url}/v1", api_key="none", max_retries=0) as client:
                return await work(client)

        return asyncio.run(with_client())

    def agent(self, client: AsyncOpenAI) -> Agent[Any]:
        @function_tool
        def add(a: int, b: int) -> int:
            """The sum."""
            return a + b

        model = OpenAIResponsesModel(model=MODEL, openai_client=client)
        return Agent(name="adder", instructions="add", model=model, tools=[add])


@pytest.fixture
def stage(database_url: str, tmp_path: Path) -> Iterator[Stage]:
    """An engine that calls the tool once after what a user says, and then tells its result."""
    numbers = iter(range(1000))

    def script(asked: Asked) -> None:
        last, number = asked.document["input"][-1], next(numbers)
        if last.get("type") == "function_call_output":
            output = [said(f"it is {last['output']}", f"msg_{number}")]
        else:
            output = [called("add", '{"a": 1, "b": 2}', f"call_{number}", f"fc_{number}")]
        if asked.document.get("stream"):
            asked.start()
            asked.send(*response_events(asked, output))
            asked.end()
        else:
            asked.whole(response(asked, output))

    settings = Settings(home=tmp_path, database_url=database_url, engine_timeout_s=3600)
    with scripted(script) as engine, serving(settings) as service:
        register(service.database, "tcp://127.0.0.1:1", base_url=engine.base_url)
        yield Stage(service, engine)


def texts(items: list[Any]) -> list[str]:
    return [item["content"][0]["text"] for item in items if item.get("type") == "message"]


def kinds(items: list[Any]) -> list[str]:
    return [item.get("type", "message") for item in items]


ROUND = ["message", "function_call", "function_call_output", "message"]


def test_items_of_a_session_of_the_sdk(stage: Stage) -> None:
    async def work(client: AsyncOpenAI) -> None:
        session = OpenAIConversationsSession(openai_client=client)
        assert await session.get_items() == []
        await session.add_items([{"role": "user", "content": str(number)} for number in range(45)])
        assert texts(await session.get_items()) == [str(number) for number in range(45)]
        assert texts(await session.get_items(limit=30)) == [str(number) for number in range(15, 45)]
        popped = [await session.pop_item() for _ in range(2)]
        assert texts(popped) == ["44", "43"]
        await session.add_items(popped[:1])  # type: ignore[arg-type]
        assert texts(await session.get_items(limit=2)) == ["42", "44"]
        again = OpenAIConversationsSession(conversation_id=session.session_id, openai_client=client)
        assert await again.get_items() == await session.get_items()
        await session.clear_session()
        with pytest.raises(NotFoundError):
            await again.get_items()
        assert await session.get_items() == []
        assert await session.pop_item() is None

    stage.run(work)


@pytest.mark.parametrize("streamed", [False, True])
def test_an_agent_with_a_session_of_the_sdk(stage: Stage, streamed: bool) -> None:
    async def work(client: AsyncOpenAI) -> None:
        session = OpenAIConversationsSession(openai_client=client)
        for number in range(3):
            agent = stage.agent(client)
            if streamed:
                result: Any = Runner.run_streamed(agent, f"question {number}", session=session)
                async for _ in result.stream_events():
                    pass
            else:
                result = await Runner.run(agent, f"question {number}", session=session)
            assert result.final_output == "it is 3"
        assert kinds(await session.get_items()) == ROUND * 3
        # What the last request had is the conversation but for its answer.
        assert kinds(stage.engine.asked[-1].document["input"]) == (ROUND * 3)[:-1]

    stage.run(work)


def test_an_agent_in_a_conversation(stage: Stage) -> None:
    async def work(client: AsyncOpenAI) -> None:
        made = await client.conversations.create()
        for number in range(2):
            result = await Runner.run(stage.agent(client), f"question {number}", conversation_id=made.id)
            assert result.final_output == "it is 3"
        items = [item.model_dump() async for item in client.conversations.items.list(made.id, order="asc")]
        assert kinds(items) == ROUND * 2
        assert kinds(stage.engine.asked[-1].document["input"]) == (ROUND * 2)[:-1]

    stage.run(work)
    (session,) = stage.service.client.list_sessions().data
    assert session.id.startswith("conv_")


def test_an_agent_that_chains_its_responses(stage: Stage) -> None:
    async def work(client: AsyncOpenAI) -> None:
        previous = None
        for number in range(2):
            result: Any = await Runner.run(
                stage.agent(client), f"question {number}", previous_response_id=previous, auto_previous_response_id=True
            )
            previous = result.last_response_id
            assert result.final_output == "it is 3"
        assert kinds(stage.engine.asked[-1].document["input"]) == (ROUND * 2)[:-1]
        assert (await client.responses.retrieve(previous)).output_text == "it is 3"  # type: ignore[arg-type]

    stage.run(work)
    assert len(stage.service.client.list_sessions().data) == 1
