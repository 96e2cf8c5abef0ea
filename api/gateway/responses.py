"""OpenAI's Responses: items instead of messages, of which an assistant's turn is several."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from agentstate.api.gateway import documents
from agentstate.api.gateway.heard import DECORATIONS, Message, call, hear, objects, text_or_none
from agentstate.api.gateway.recording import Answer, Stream, count, error_of

TERMINAL = frozenset({"response.completed", "response.incomplete", "response.failed", "response.cancelled"})
# All others, such as deltas, say nothing that one of these does not say again.
_HEARD = frozenset({b"", b"error", b"response.output_item.done", *(name.encode() for name in TERMINAL)})
_ROLES = {"developer": "system"}
_ELSEWHERE = ("conversation", "previous_response_id", "prompt")  # where a request without input has it


def messages(body: dict[str, Any]) -> list[Message]:
    """The messages of a request, ``instructions`` first. Raises ValueError if it has none."""
    heard = []
    if instructions := text_or_none(body.get("instructions"), "instructions"):
        heard.append(hear("system", instructions, {"type": "message", "role": "system", "content": instructions}))
    given = body.get("input")
    if isinstance(given, str):
        given = [{"type": "message", "role": "user", "content": given}]
    elif given is None and any(body.get(name) for name in _ELSEWHERE):
        given = []
    return heard + _messages(objects(given, "input must be a text, or it"))


def read(body: dict[str, Any]) -> Answer:
    """A whole answer, which is a response object."""
    status, details = body["status"], body.get("incomplete_details")
    said = status in ("completed", "incomplete")
    return Answer(
        messages=tuple(_messages(objects(body.get("output"), "output"))) if said else (),
        whole=True,
        finish=(details or {}).get("reason") or status,
        usage=body.get("usage"),
        cached_tokens=count(body.get("usage"), "input_tokens_details", "cached_tokens"),
        error=error_of(body),
        response=body,
    )


def _messages(items: list[dict[str, Any]]) -> list[Message]:
    return [_message(item) for item in items if item.get("type") != "reasoning"]


def _message(item: dict[str, Any]) -> Message:
    kind = item.get("type") or "message"
    if not isinstance(kind, str):
        raise ValueError("the type of an item must be a text")
    call_id = text_or_none(item.get("call_id"), "call_id")
    if kind == "message":
        role = item.get("role")
        if not isinstance(role, str):
            raise ValueError("a message must have a role")
        return hear(_ROLES.get(role, role), item.get("content"), item)
    if kind.endswith("_output"):
        return hear("tool", item.get("output"), item, result_of=call_id)
    if kind.endswith("_call") and call_id is not None:
        name = item.get("name") or kind.removesuffix("_call")
        # A function has arguments, a custom tool an input, a built-in tool an action.
        arguments = next((item[key] for key in ("arguments", "input", "action") if item.get(key) is not None), None)
        return hear("assistant", None, item, calls=[call(call_id, name, arguments)])
    # One that says all it says by other keys. An id is content where the item has nothing else.
    said = item if kind == "item_reference" else {key: item[key] for key in item if key not in DECORATIONS}
    return hear("assistant", [{"type": "item", "item": said}], item)


class ResponsesStream(Stream):
    """A streamed answer."""

    def __init__(self) -> None:
        super().__init__()
        self._items: list[dict[str, Any]] = []
        self._answer = Answer()
        self._error: dict[str, Any] | None = None

    def hear(self, name: bytes, payload: bytes) -> None:
        if name not in _HEARD or payload == b"[DONE]":
            return
        event = documents.loads(payload)
        kind = event.get("type")
        if kind == "response.output_item.done":
            self._items.append(event["item"])
        elif kind in TERMINAL:
            self.done = True
            response = event["response"]
            # Some end without their output, whose items have come before.
            self._answer = read({**response, "output": response.get("output") or self._items})
        elif kind == "error":
            self._error = error_of(event) or {key: event[key] for key in event if key != "type"}

    def told(self) -> Answer:
        return replace(self._answer, messages=(), whole=self.done, error=self._answer.error or self._error)

    def said(self) -> tuple[Message, ...]:
        return self._answer.messages
