"""The APIs that the gateway speaks: what a request of each says, and what an answer to it said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agentstate.api.gateway import anthropic, chat, completions, responses
from agentstate.api.gateway.heard import Message
from agentstate.api.gateway.recording import Answer, Recorder, Stream, Whole

__all__ = ["CHAT", "COMPLETIONS", "DIALECTS", "MESSAGES", "RESPONSES", "Answer", "Dialect", "Recorder"]


@dataclass(frozen=True)
class Dialect:
    """One API, whose answers have ids that begin with ``id_prefix``. ``messages`` reads the conversation out of a
    request's body, in order; it raises ValueError, with a sentence for the client, if there is none. Clients wait for
    ``end_of_stream`` also after an error."""

    name: str
    path: str
    messages: Callable[[dict[str, Any]], list[Message]]
    read: Callable[[dict[str, Any]], Answer]
    stream: Callable[[], Stream]
    id_prefix: str
    end_of_stream: bytes = b""

    def recorder(self, stream: bool) -> Recorder:
        """A recorder of one answer, which is streamed or whole."""
        return self.stream() if stream else Whole(self.read)


_DONE = b"data: [DONE]\n\n"
CHAT = Dialect("chat", "/v1/chat/completions", chat.messages, chat.read, chat.ChatStream, "chatcmpl-", _DONE)
COMPLETIONS = Dialect(
    "completions",
    "/v1/completions",
    completions.messages,
    completions.read,
    completions.CompletionStream,
    "cmpl-",
    _DONE,
)
MESSAGES = Dialect("messages", "/v1/messages", anthropic.messages, anthropic.read, anthropic.MessagesStream, "msg_")
RESPONSES = Dialect(
    "responses", "/v1/responses", responses.messages, responses.read, responses.ResponsesStream, "resp_"
)
DIALECTS = {dialect.path: dialect for dialect in (CHAT, COMPLETIONS, MESSAGES, RESPONSES)}
