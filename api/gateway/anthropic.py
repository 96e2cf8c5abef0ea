"""Anthropic's Messages."""

from __future__ import annotations

from typing import Any

from agentstate.api.gateway import documents
from agentstate.api.gateway.heard import Message, call, hear, objects, text_or_none
from agentstate.api.gateway.recording import Answer, Stream, count, error_of

# What a delta of each type adds to, and under which key it has it. A call's input is JSON in pieces.
_DELTAS = {
    "text_delta": ("text", "text"),
    "input_json_delta": ("input", "partial_json"),
    "thinking_delta": ("thinking", "thinking"),
    "signature_delta": ("signature", "signature"),
}


def messages(body: dict[str, Any]) -> list[Message]:
    """The messages of a request, ``system`` first. Raises ValueError if it has none."""
    heard = []
    if system := body.get("system"):
        heard.append(hear("system", system, {"role": "system", "content": system}))
    for item in objects(body.get("messages"), "messages"):
        heard += _messages(item)
    return heard


def read(body: dict[str, Any]) -> Answer:
    """A whole answer."""
    content, finish, usage = body["content"], body.get("stop_reason"), body.get("usage")
    return Answer(
        messages=tuple(_messages({"role": "assistant", "content": content})) if finish else (),
        whole=True,
        finish=finish,
        usage=usage,
        cached_tokens=count(usage, "cache_read_input_tokens"),
    )


def _messages(item: dict[str, Any]) -> list[Message]:
    """A message of this API: each tool result in it is a message of its own, before what else the user says."""
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str):
        raise ValueError("a message must have a role")
    if not isinstance(content, list):
        return [hear(role, content, item)]
    blocks = objects(content, "content must be a text, or it")
    if role == "assistant":
        calls = [
            call(block.get("id"), block.get("name"), block.get("input"))
            for block in blocks
            if block.get("type") == "tool_use"
        ]
        others = [block for block in blocks if block.get("type") != "tool_use"]
        return [hear(role, others, item, calls=calls)]
    results = [block for block in blocks if block.get("type") == "tool_result"]
    if not results:
        return [hear(role, blocks, item)]
    heard = [
        hear(
            "tool",
            block.get("content"),
            {**item, "content": [block]},
            result_of=text_or_none(block.get("tool_use_id") or block.get("id"), "tool_use_id"),
            failed=block.get("is_error") is True,
        )
        for block in results
    ]
    if others := [block for block in blocks if block.get("type") != "tool_result"]:
        heard.append(hear(role, others, {**item, "content": others}))
    return heard


class MessagesStream(Stream):
    """A streamed answer."""

    def __init__(self) -> None:
        super().__init__()
        self._blocks: list[_Block] = []
        self._open: dict[Any, _Block] = {}
        self._finish: str | None = None
        self._usage: dict[str, Any] | None = None
        self._error: dict[str, Any] | None = None

    def hear(self, name: bytes, payload: bytes) -> None:
        event = documents.loads(payload)
        kind = event.get("type")
        if kind == "content_block_delta":
            self._open[event["index"]].add(event["delta"])
        elif kind == "content_block_start":
            block = _Block(event["content_block"])
            self._blocks.append(block)
            self._open[event["index"]] = block
        elif kind == "message_start":
            self._hear_usage(event["message"].get("usage"))
        elif kind == "message_delta":
            self._finish = event["delta"].get("stop_reason") or self._finish
            self._hear_usage(event.get("usage"))
        elif kind == "message_stop":
            self.done = True
        elif error := error_of(event):
            self._error = error

    def _hear_usage(self, usage: dict[str, Any] | None) -> None:
        """The beginning tells what was read, the end what was written."""
        if usage is not None:
            told = {key: value for key, value in usage.items() if value is not None}
            self._usage = {**(self._usage or {}), **told}

    def told(self) -> Answer:
        return Answer(
            whole=self.done,
            finish=self._finish,
            usage=self._usage,
            cached_tokens=count(self._usage, "cache_read_input_tokens"),
            error=self._error,
        )

    def said(self) -> tuple[Message, ...]:
        return tuple(_messages({"role": "assistant", "content": [block.whole() for block in self._blocks]}))


class _Block:
    """A content block that is being streamed."""

    def __init__(self, begun: dict[str, Any]) -> None:
        self._begun = begun
        self._pieces: dict[str, list[str]] = {}

    def add(self, delta: dict[str, Any]) -> None:
        if known := _DELTAS.get(delta["type"]):
            key, said = known
            self._pieces.setdefault(key, []).append(delta[said])

    def whole(self) -> dict[str, Any]:
        block = dict(self._begun)
        for key, pieces in self._pieces.items():
            said = "".join(pieces)
            if key != "input":
                block[key] = (block.get(key) or "") + said
                continue
            try:
                block[key] = documents.loads(said)
            except ValueError:
                # Whole answers have no arguments either where the model wrote none that can be read.
                block[key] = {}
        return block
