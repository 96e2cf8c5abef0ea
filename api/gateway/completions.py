"""OpenAI's completions: a prompt and its continuation, without messages."""

from __future__ import annotations

from typing import Any

from agentstate.api.gateway import documents
from agentstate.api.gateway.heard import Message
from agentstate.api.gateway.recording import Answer, Stream, count, error_of


def messages(body: dict[str, Any]) -> list[Message]:
    """None: a prompt is no conversation."""
    return []


def read(body: dict[str, Any]) -> Answer:
    """A whole answer."""
    choices = body["choices"]
    usage = body.get("usage")
    return Answer(
        whole=True,
        finish=choices[0].get("finish_reason") if choices else None,
        usage=usage,
        cached_tokens=count(usage, "prompt_tokens_details", "cached_tokens"),
    )


class CompletionStream(Stream):
    """A stream of chunks with choices, ended by ``[DONE]``. Chat has them as well."""

    def __init__(self) -> None:
        super().__init__()
        self._finish: str | None = None
        self._usage: dict[str, Any] | None = None
        self._error: dict[str, Any] | None = None
        self.several = False  # choices

    def hear(self, name: bytes, payload: bytes) -> None:
        if payload == b"[DONE]":
            self.done = True
            return
        chunk = documents.loads(payload)
        if error := error_of(chunk):
            self._error = error
            return
        # The last one counts: a stream may tell its usage so far with every chunk.
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk.get("choices") or ():
            if choice.get("index"):
                self.several = True
                continue
            self.hear_choice(choice)
            self._finish = choice.get("finish_reason") or self._finish

    def hear_choice(self, choice: dict[str, Any]) -> None:
        """A chunk of the first choice."""

    def told(self) -> Answer:
        return Answer(
            whole=self.done,
            finish=self._finish,
            usage=self._usage,
            cached_tokens=count(self._usage, "prompt_tokens_details", "cached_tokens"),
            error=self._error,
        )

    def said(self) -> tuple[Message, ...]:
        return ()
