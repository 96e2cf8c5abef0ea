"""Clients that know a base URL and a key, and nothing of AgentState: their engine is killed between two turns, and they
go on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from conversations import (
    AnthropicMessages,
    Conversation,
    LangChain,
    LiteLLM,
    Node,
    OpenAIChat,
    OpenAIChatStream,
    PydanticAI,
    Reply,
    Server,
)
from harnesses import SYSTEM, ClaudeCode, Codex, OpenCode
from models import words
from prompts import PAGE, prompt
from sessions import Session, Tenant

from agentstate.cli.local import LocalStack

PAGES = 3
QUESTIONS = [words(prompt(9700, PAGES * PAGE + 20)), words(prompt(9701, 30))]


def in_node(script: str, *arguments: str) -> Callable[[Server, Callable[[], Path]], Conversation]:
    return lambda server, node: Node(server, node(), script, *arguments)


def in_python(kind: Callable[[Server], Conversation]) -> Callable[[Server, Callable[[], Path]], Conversation]:
    return lambda server, node: kind(server)


CLIENTS = {
    "openai": in_python(OpenAIChat),
    "openai-stream": in_python(OpenAIChatStream),
    "langchain": in_python(LangChain),
    "litellm": in_python(LiteLLM),
    "pydantic-ai": in_python(PydanticAI),
    "anthropic": in_python(AnthropicMessages),
    "claude-code": in_python(ClaudeCode),
    "node-openai": in_node("openai.js"),
    "node-openai-stream": in_node("openai.js", "stream"),
    "node-vercel-ai": in_node("vercel.js"),
}


@dataclass(frozen=True)
class Begun:
    """A conversation after its first turn, and a reference: both turns by the same client for another tenant, whose
    engine nobody killed in between."""

    tenant: Tenant
    conversation: Conversation
    reply: Reply
    sessions: list[Session]
    reference: list[Reply]


@pytest.fixture(scope="module")
def begun(stack: LocalStack, request: pytest.FixtureRequest) -> Iterator[dict[str, Begun | BaseException]]:
    """Conversations whose engine was killed after their first turn, and started anew; or why there is none."""
    with ExitStack() as ending:

        def begin(client: str, tenant: Tenant) -> Conversation:
            server = Server(stack.service_url, tenant.key, stack.model)
            conversation = CLIENTS[client](server, lambda: request.getfixturevalue("node"))
            if isinstance(conversation, Node):
                ending.callback(conversation.close)
            return conversation

        def converse(client: str) -> Begun:
            reference = begin(client, Tenant(stack, f"{client}.uninterrupted"))
            replies = [reference.say(question) for question in QUESTIONS]
            tenant = Tenant(stack, client)
            conversation = begin(client, tenant)
            reply = conversation.say(QUESTIONS[0])
            return Begun(tenant, conversation, reply, tenant.await_durable(PAGES * PAGE), replies)

        found: dict[str, Begun | BaseException] = {}
        for client in CLIENTS:
            try:
                found[client] = converse(client)
            except (Exception, pytest.skip.Exception, pytest.fail.Exception) as error:
                found[client] = error
        stack.kill_engine()
        stack.start_engine(*stack.engine_arguments)
        yield found


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_goes_on_after_its_engine_was_killed(begun: dict[str, Begun | BaseException], client: str) -> None:
    before = begun[client]
    if isinstance(before, BaseException):
        raise before
    assert before.reply == before.reference[0]
    assert not before.reply.cached  # Anthropic's says nothing instead of 0
    (session,) = before.sessions
    assert session.turns == 1
    again = before.conversation.say(QUESTIONS[1])
    assert again == before.reference[1]
    assert again.cached is not None
    assert again.cached >= PAGES * PAGE
    # Its answer is there; the turn ends in the background.
    (after,) = before.tenant.await_turns(2)
    assert (after.name, after.turns) == (session.name, 2)


def test_an_engine_with_a_key_serves_the_gateway_alone(stack: LocalStack) -> None:
    tenant = Tenant(stack, "past-the-gateway")
    with pytest.raises(openai.AuthenticationError):
        OpenAIChat(Server(stack.engine_url, tenant.key, stack.model)).say(QUESTIONS[0])
    assert OpenAIChat(Server(stack.service_url, tenant.key, stack.model)).say(QUESTIONS[0]).text


def test_claude_code_has_a_session_for_each_of_its_agents(stack: LocalStack) -> None:
    tenant = Tenant(stack, "claude-code.agents")
    main = ClaudeCode(Server(stack.service_url, tenant.key, stack.model))
    agent = main.beside("agent-1")
    # What is counted is what would be sent: without the line that every request has anew.
    assert main.count_tokens(QUESTIONS[0]) == len(f"{SYSTEM} {QUESTIONS[0]}".split())
    main.say(QUESTIONS[0])
    agent.say(QUESTIONS[0])
    # Their turns end in the background: before that, nobody knows what else is asked beside them.
    tenant.await_turns(1)
    # A title, say: another prompt under the session's id. It is answered, and is no turn.
    assert main.beside(system="title").say(QUESTIONS[0]).text
    agent.say(QUESTIONS[1])
    assert [(each.name, each.turns) for each in tenant.await_turns(2)] == [
        (f"claude-code:{main.session}", 1),
        (f"claude-code:{main.session}:agent-1", 2),
    ]


def go_on(conversation: OpenCode | Codex, flush: Callable[[], None]) -> int:
    """Three turns, from disk: before each but the first, nothing of the conversation is on the device. Returns how many
    were answered: what Codex gets is drawn at random, and may be nothing, which is no place to go on from."""
    replies = [conversation.say(QUESTIONS[0])]
    for _ in range(2):
        before = conversation.prompt_tokens // PAGE * PAGE
        assert before > PAGES * PAGE
        flush()
        # More, where a page ends in an answer: it was stored, and is in the next prompt.
        replies.append(conversation.say(QUESTIONS[1]))
        assert before <= (replies[-1].cached or 0) <= conversation.prompt_tokens
    return sum(reply.text != "" for reply in replies)


def test_opencode_goes_on_from_disk(
    stack: LocalStack, flush: Callable[[], None], programs: Path, tmp_path: Path
) -> None:
    tenant = Tenant(stack, "opencode")
    conversation = OpenCode(Server(stack.service_url, tenant.key, stack.model), programs, tmp_path)
    go_on(conversation, flush)
    # It asks for a title under the same id, mostly first: the conversation has a session all the same.
    turns = max(tenant.await_turns(2, PAGES * PAGE), key=lambda session: session.turns)
    assert turns.name.startswith(f"opencode:{conversation.session}")
    assert turns.durable >= PAGES * PAGE


def test_codex_goes_on_from_disk(stack: LocalStack, flush: Callable[[], None], programs: Path, tmp_path: Path) -> None:
    tenant = Tenant(stack, "codex")
    conversation = Codex(Server(stack.service_url, tenant.key, stack.model), programs, tmp_path)
    answered = go_on(conversation, flush)
    (session,) = tenant.await_turns(answered, PAGES * PAGE)
    assert session.name == f"codex:{conversation.session}"
    assert session.durable >= PAGES * PAGE
