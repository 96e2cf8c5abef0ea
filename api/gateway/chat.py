"""OpenAI's chat completions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from agentstate.api.gateway import completions
from agentstate.api.gateway.completions import CompletionStream
from agentstate.api.gateway.heard import Call, Message, call, hear, objects, text_or_none
from agentstate.api.gateway.recording import Answer

_ROLES = {"developer": "system", "function": "tool"}


def messages(body: dict[str, Any]) -> list[Message]:
    """The messages of a request. Raises ValueError if it has none."""
    return [_message(item) for item in objects(body.get("messages"), "messages")]


def read(body: dict[str, Any]) -> Answer:
    """A whole answer."""
    choices = body["choices"]
    answer = completions.read(body)
    if len(choices) != 1 or not answer.finish:
        return answer
    return replace(answer, messages=(_message({**choices[0]["message"], "role": "assistant"}),))


def _message(item: dict[str, Any]) -> Message:
    role = item.get("role")
    if not isinstance(role, str):
        raise ValueError("a message must have a role")
    role = _ROLES.get(role, role)
    content = item.get("content")
    calls: tuple[Call, ...] = ()
    result_of = None
    if role == "assistant":
        calls = tuple(_call(each) for each in objects(item.get("tool_calls") or [], "tool_calls"))
        if refusal := text_or_none(item.get("refusal"), "refusal"):
            texts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
            content = [*texts, {"type": "refusal", "refusal": refusal}]
    elif role == "tool":
        result_of = text_or_none(item.get("tool_call_id"), "tool_call_id")
    return hear(role, content, item, calls=calls, result_of=result_of)


def _call(item: dict[str, Any]) -> Call:
    custom = item.get("type") == "custom"
    tool = item.get("custom" if custom else "function")
    if not isinstance(tool, dict):
        raise ValueError("a tool call must say which function it calls")
    return call(item.get("id"), tool.get("name"), tool.get("input" if custom else "arguments"))


@dataclass
class _Call:
    """A tool call that is being streamed."""

    index: int
    id: str
    name: str = ""
    arguments: list[str] = field(default_factory=list)


class ChatStream(CompletionStream):
    """A streamed answer."""

    def __init__(self) -> None:
        super().__init__()
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[_Call] = []
        self._by_id: dict[tuple[int | None, str], _Call] = {}
        self._current: dict[int | None, _Call] = {}

    def hear_choice(self, choice: dict[str, Any]) -> None:
        delta = choice.get("delta") or {}
        if content := delta.get("content"):
            self._content.append(content)
        if reasoning := delta.get("reasoning_content"):
            self._reasoning.append(reasoning)
        for part in delta.get("tool_calls") or ():
            self._hear_call(part)

    def _hear_call(self, part: dict[str, Any]) -> None:
        index, call_id = part.get("index"), part.get("id")
        known = self._current.get(index)
        if call_id and known is not None and not known.id:
            known.id = call_id
        elif call_id:
            # Some servers number all calls 0, or none: another id is another call.
            known = self._by_id.get((index, call_id))
        if known is None:
            known = _Call(index or 0, call_id or "")
            self._calls.append(known)
        if call_id:
            self._by_id[index, call_id] = known
        self._current[index] = known
        function = part.get("function") or {}
        known.name = known.name or function.get("name") or ""
        if arguments := function.get("arguments"):
            known.arguments.append(arguments)

    def said(self) -> tuple[Message, ...]:
        if self.several:
            return ()
        item: dict[str, Any] = {"role": "assistant", "content": "".join(self._content) or None}
        if self._reasoning:
            item["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            item["tool_calls"] = [
                {
                    "id": each.id,
                    "type": "function",
                    "function": {"name": each.name, "arguments": "".join(each.arguments)},
                }
                for each in sorted(self._calls, key=lambda each: each.index)
            ]
        return (_message(item),)
