"""Answers in the form in which SGLang 0.5.23 sends them, streamed and whole, and what is recorded of them."""

from __future__ import annotations

import json
from typing import Any

from agentstate.api.gateway.dialects import Answer, Dialect

DONE = b"data: [DONE]\n\n"
ARGUMENTS = '{"city": "Zürich", "days": 1.0, "units": null}'
TEXT = "\n\nLet me look at 北京 and Zürich 🌦."
USAGE = {
    "prompt_tokens": 20,
    "total_tokens": 30,
    "completion_tokens": 10,
    "prompt_tokens_details": {"cached_tokens": 0},
    "reasoning_tokens": 0,
    "completion_tokens_details": None,
}


def record(dialect: Dialect, *parts: bytes, stream: bool = True) -> Answer:
    recorder = dialect.recorder(stream)
    for part in parts:
        recorder.feed(part)
    return recorder.end()


def event(document: Any, name: str | None = None) -> bytes:
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(document, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def typed(document: dict[str, Any]) -> bytes:
    return event(document, document["type"])


def chunk(index: int = 0, finish: str | None = None, **delta: Any) -> bytes:
    choice = {
        "index": index,
        "delta": {"role": None, "content": None, "reasoning_content": None, **delta},
        "logprobs": None,
        "finish_reason": finish,
        "matched_stop": None,
    }
    return event(
        {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    )


def called(index: int | None, arguments: str, call_id: str | None = None, name: str | None = None) -> bytes:
    function = {"name": name, "arguments": arguments}
    return chunk(tool_calls=[{"id": call_id, "index": index, "type": "function", "function": function}])


def usage(told: Any = USAGE) -> bytes:
    return event(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "m",
            "choices": [],
            "usage": told,
        }
    )


def pieces(text: str, size: int = 5) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


CHAT_STREAM = b"".join(
    [
        chunk(role="assistant", content=""),
        chunk(reasoning_content="I need the "),
        chunk(reasoning_content="weather."),
        *(chunk(content=piece) for piece in pieces(TEXT)),
        called(0, "", "call_a", "weather"),
        *(called(0, piece) for piece in pieces(ARGUMENTS)),
        called(1, "", "call_b", "time"),
        called(1, "{}"),
        chunk(finish="tool_calls"),
        usage(),
        DONE,
    ]
)
CHAT_MESSAGE: dict[str, Any] = {
    "role": "assistant",
    "content": TEXT,
    "reasoning_content": "I need the weather.",
    "tool_calls": [
        {
            "id": "call_a",
            "index": 0,
            "type": "function",
            "function": {"name": "weather", "arguments": ARGUMENTS},
        },
        {"id": "call_b", "index": 1, "type": "function", "function": {"name": "time", "arguments": "{}"}},
    ],
}


def chat_answer(*messages: dict[str, Any], finish: str = "tool_calls") -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [
            {"index": index, "message": message, "logprobs": None, "finish_reason": finish, "matched_stop": None}
            for index, message in enumerate(messages)
        ],
        "usage": USAGE,
        "metadata": {"weight_version": "default"},
    }


COMPLETION_STREAM = b"".join(
    [
        *(
            event(
                {
                    "id": "cmpl-1",
                    "object": "text_completion",
                    "created": 1,
                    "model": "m",
                    "choices": [
                        {"index": 0, "text": text, "logprobs": None, "finish_reason": finish, "matched_stop": None}
                    ],
                    "usage": None,
                }
            )
            for text, finish in [("Once ", None), ("upon", "length")]
        ),
        event(
            {
                "id": "cmpl-1",
                "object": "text_completion",
                "created": 1,
                "model": "m",
                "choices": [],
                "usage": USAGE,
            }
        ),
        DONE,
    ]
)

MESSAGES_STREAM = b"".join(
    [
        typed(
            {
                "type": "message_start",
                "message": {
                    "id": "msg_1",
                    "type": "message",
                    "role": "assistant",
                    "content": [],
                    "model": "m",
                    "usage": {"input_tokens": 12, "output_tokens": 0, "cache_read_input_tokens": 64},
                },
            }
        ),
        typed({"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": ""}}),
        typed(
            {
                "type": "content_block_delta",
                "index": 0,
                "delta": {"type": "thinking_delta", "thinking": "I need the weather."},
            }
        ),
        typed({"type": "content_block_stop", "index": 0}),
        typed({"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}}),
        *(
            typed({"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": piece}})
            for piece in pieces(TEXT)
        ),
        typed({"type": "content_block_stop", "index": 1}),
        typed(
            {
                "type": "content_block_start",
                "index": 2,
                "content_block": {"type": "tool_use", "id": "call_a", "name": "weather", "input": {}},
            }
        ),
        *(
            typed(
                {
                    "type": "content_block_delta",
                    "index": 2,
                    "delta": {"type": "input_json_delta", "partial_json": piece},
                }
            )
            for piece in pieces(ARGUMENTS)
        ),
        typed({"type": "content_block_stop", "index": 2}),
        typed(
            {
                "type": "content_block_start",
                "index": 3,
                "content_block": {"type": "tool_use", "id": "call_b", "name": "time", "input": {}},
            }
        ),
        typed({"type": "content_block_stop", "index": 3}),
        typed({"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 10}}),
        typed({"type": "message_stop"}),
    ]
)
MESSAGES_BLOCKS: list[dict[str, Any]] = [
    {"type": "thinking", "thinking": "I need the weather."},
    {"type": "text", "text": TEXT},
    {"type": "tool_use", "id": "call_a", "name": "weather", "input": json.loads(ARGUMENTS)},
    {"type": "tool_use", "id": "call_b", "name": "time", "input": {}},
]
MESSAGES_ANSWER: dict[str, Any] = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "content": MESSAGES_BLOCKS,
    "model": "m",
    "stop_reason": "tool_use",
    "stop_sequence": None,
    "usage": {"input_tokens": 12, "output_tokens": 10, "cache_read_input_tokens": 64},
}

RESPONSES_ITEMS: list[dict[str, Any]] = [
    {
        "id": "rs_1",
        "type": "reasoning",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "I need the weather."}],
        "encrypted_content": None,
        "status": None,
    },
    {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": TEXT, "annotations": [], "logprobs": None}],
        "status": "completed",
        "phase": "commentary",
    },
    {
        "arguments": ARGUMENTS,
        "call_id": "call_a",
        "name": "weather",
        "type": "function_call",
        "id": "fc_1",
        "status": "completed",
    },
    {
        "arguments": "{}",
        "call_id": "call_b",
        "name": "time",
        "type": "function_call",
        "id": "fc_2",
        "status": "completed",
    },
]


def response(status: str = "completed", **fields: Any) -> dict[str, Any]:
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "model": "m",
        "output": RESPONSES_ITEMS,
        "status": status,
        "error": None,
        "incomplete_details": None,
        "usage": {
            "input_tokens": 20,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 10,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 30,
        },
        **fields,
    }


def responses_stream(*ends: dict[str, Any], items: list[dict[str, Any]] = RESPONSES_ITEMS) -> bytes:
    started = response("in_progress", output=[], usage=None)
    events = [{"type": f"response.{kind}", "response": started} for kind in ("created", "in_progress")]
    for at, item in enumerate(items):
        events.append({"type": "response.output_item.added", "output_index": at, "item": {**item, "status": None}})
        if item["type"] == "message":
            events += [
                {
                    "type": "response.output_text.delta",
                    "output_index": at,
                    "content_index": 0,
                    "item_id": item["id"],
                    "delta": piece,
                    "logprobs": [],
                }
                for piece in pieces(TEXT)
            ]
        events.append({"type": "response.output_item.done", "output_index": at, "item": item})
    numbered = [{**each, "sequence_number": number} for number, each in enumerate([*events, *ends])]
    return b"".join(typed(each) for each in numbered)


RESPONSES_STREAM = responses_stream({"type": "response.completed", "response": response()})
