"""SGLang's Responses: its stream with the text as it is generated, and what it leaves unsaid.

Once a request offers tools, SGLang holds back everything from an answer's first message on. It writes into a message's
events which ``phase`` of the answer the message is: ``commentary`` if a tool call follows, else ``final_answer``. Only
a tool call, or the end, tells. Here the events of a message go out as they come, the first of them without a phase, and
what is held back is the one that ends the message.

SGLang answers null for ``temperature`` and ``top_p`` unless the request has them, and for the ``logprobs`` of a text
unless they are asked for. OpenAI's specification has no null there.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

_ITEM_ADDED, _ITEM_DONE = "event: response.output_item.added\n", "event: response.output_item.done\n"
_CALLS = ("function_call", "custom_tool_call", "shell_call")
# No text contains this: its quotes would be escaped.
_NO_LOGPROBS = '"type":"output_text","logprobs":null'
_SAMPLED_WITH = ("temperature", "top_p")


def say_sampling(serving: Any, request: Any) -> None:
    """Write into a request what SGLang samples it with, where it leaves that to SGLang: an answer echoes it."""
    for name in _SAMPLED_WITH:
        if getattr(request, name) is None:
            default = request._DEFAULT_SAMPLING_PARAMS[name]
            setattr(request, name, serving.default_sampling_params.get(name, default))


def without_null_logprobs(answer: Any) -> Any:
    """What `create_responses` answers, with an empty list where a text has no ``logprobs``: a response, or events."""
    if isinstance(answer, AsyncGenerator):
        return _events_without_null_logprobs(answer)
    for item in getattr(answer, "output", ()):
        for part in getattr(item, "content", None) or ():
            if getattr(part, "logprobs", ()) is None:
                part.logprobs = []
    return answer


async def _events_without_null_logprobs(events: AsyncGenerator[str]) -> AsyncIterator[str]:
    async with aclosing(events):
        async for event in events:
            yield event.replace(_NO_LOGPROBS, _NO_LOGPROBS.replace("null", "[]"))


def may_call_tools(serving: Any, request: Any) -> bool:
    """Whether SGLang holds the request's text back."""
    return bool(serving._response_tools_to_chat_tools(request)) and request.effective_tool_choice() != "none"


async def as_generated(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """The server-sent events of an answer, in their order. A message's last event waits until a tool call follows or
    the answer ends. What comes between the two waits with it: reasoning, and the messages after that."""
    held: list[str] = []
    async for event in events:
        if not event:  # one that SGLang's tool adapter suppressed
            continue
        item_type = _item_type(event)
        if item_type == "message" and event.startswith(_ITEM_ADDED):
            event = _in_phase(event, None)
        if held or (item_type == "message" and event.startswith(_ITEM_DONE)):
            held.append(event)
        else:
            yield event
        if item_type in _CALLS:
            for one in _release(held, "commentary"):
                yield one
    for one in _release(held, "final_answer"):
        yield one


def _release(held: list[str], phase: str) -> Iterator[str]:
    """Empty ``held``."""
    for event in held:
        done = event.startswith(_ITEM_DONE) and _item_type(event) == "message"
        yield _in_phase(event, phase) if done else event
    held.clear()


def _item_type(event: str) -> str | None:
    """The type of the output item that begins or ends with this event; None for other events."""
    if not event.startswith((_ITEM_ADDED, _ITEM_DONE)):
        return None
    item_type: str = _payload(event)["item"]["type"]
    return item_type


def _in_phase(event: str, phase: str | None) -> str:
    payload = _payload(event)
    payload["item"].pop("phase", None)
    if phase is not None:
        payload["item"]["phase"] = phase
    return f"event: {payload['type']}\ndata: {json.dumps(payload, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _payload(event: str) -> dict[str, Any]:
    payload: dict[str, Any] = json.loads(event.partition("data: ")[2])
    return payload
