"""Conversations through clients that people use, each as its own documentation says: they know a base URL and a key."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

TOKENS = 8  # of each answer


@dataclass(frozen=True)
class Server:
    """Where a client is pointed: ``url`` is the server's root."""

    url: str
    key: str
    model: str


@dataclass(frozen=True)
class Reply:
    """``cached`` is how many tokens of the prompt were not computed, as the client tells it; None if it does not."""

    text: str
    cached: int | None


class Conversation(Protocol):
    """One conversation of one client."""

    def say(self, text: str) -> Reply:
        """The model's answer to the user's next message."""


class OpenAIChat:
    def __init__(self, server: Server):
        from openai import OpenAI

        self._client = OpenAI(base_url=f"{server.url}/v1", api_key=server.key)
        self._request: dict[str, Any] = {"model": server.model, "temperature": 0, "max_tokens": TOKENS}
        self._messages: list[Any] = []

    def say(self, text: str) -> Reply:
        self._messages.append({"role": "user", "content": text})
        reply = self._ask()
        self._messages.append({"role": "assistant", "content": reply.text})
        return reply

    def _ask(self) -> Reply:
        answer = self._client.chat.completions.create(messages=self._messages, **self._request)
        return Reply(answer.choices[0].message.content, answer.usage.prompt_tokens_details.cached_tokens)


class OpenAIChatStream(OpenAIChat):
    def _ask(self) -> Reply:
        chunks = self._client.chat.completions.create(
            messages=self._messages, stream=True, stream_options={"include_usage": True}, **self._request
        )
        text, usage = "", None
        for chunk in chunks:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            usage = chunk.usage or usage
        return Reply(text, usage.prompt_tokens_details.cached_tokens)


class LangChain:
    def __init__(self, server: Server):
        from langchain_openai import ChatOpenAI

        self._model = ChatOpenAI(
            base_url=f"{server.url}/v1", api_key=server.key, model=server.model, temperature=0, max_tokens=TOKENS
        )
        self._messages: list[Any] = []

    def say(self, text: str) -> Reply:
        from langchain_core.messages import HumanMessage

        self._messages.append(HumanMessage(text))
        answer = self._model.invoke(self._messages)
        self._messages.append(answer)
        return Reply(answer.text, answer.usage_metadata["input_token_details"]["cache_read"])


class LiteLLM:
    def __init__(self, server: Server):
        os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it asks GitHub for prices when it is imported
        self._server = server
        self._messages: list[Any] = []

    def say(self, text: str) -> Reply:
        import litellm

        self._messages.append({"role": "user", "content": text})
        answer = litellm.completion(
            model=f"openai/{self._server.model}",
            api_base=f"{self._server.url}/v1",
            api_key=self._server.key,
            messages=self._messages,
            temperature=0,
            max_tokens=TOKENS,
        )
        self._messages.append(answer.choices[0].message)
        return Reply(answer.choices[0].message.content, answer.usage.prompt_tokens_details.cached_tokens)


class PydanticAI:
    def __init__(self, server: Server):
        from pydantic_ai import Agent
        from pydantic_ai.models.openai import OpenAIChatModel
        from pydantic_ai.providers.openai import OpenAIProvider

        provider = OpenAIProvider(base_url=f"{server.url}/v1", api_key=server.key)
        model = OpenAIChatModel(server.model, provider=provider)
        self._agent = Agent(model, model_settings={"temperature": 0, "max_tokens": TOKENS})
        self._messages: list[Any] = []

    def say(self, text: str) -> Reply:
        run = self._agent.run_sync(text, message_history=self._messages)
        self._messages = run.all_messages()
        return Reply(run.output, run.usage.cache_read_tokens)


class AnthropicMessages:
    def __init__(self, server: Server):
        from anthropic import Anthropic

        self._client = Anthropic(base_url=server.url, api_key=server.key)
        # The SDK knows no temperature any more; the API does.
        self._request: dict[str, Any] = {
            "model": server.model,
            "max_tokens": TOKENS,
            "extra_body": {"temperature": 0},
        }
        self._messages: list[Any] = []

    def say(self, text: str) -> Reply:
        self._messages.append({"role": "user", "content": text})
        answer = self._client.messages.create(messages=self._messages, **self._request)
        self._messages.append({"role": "assistant", "content": answer.content})
        return Reply("".join(block.text for block in answer.content), answer.usage.cache_read_input_tokens)


class Node:
    """A script in JavaScript below ``directory``, where its packages are, which answers a line with a line."""

    def __init__(self, server: Server, directory: Path, script: str, *arguments: str):
        command = ["node", script, f"{server.url}/v1", server.key, server.model, str(TOKENS), *arguments]
        self._process = subprocess.Popen(
            command, cwd=directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def say(self, text: str) -> Reply:
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._process.stdin.write(json.dumps(text) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(self._process.stderr.read())
        return Reply(**json.loads(answer))

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
