from __future__ import annotations

import json
from typing import Any

import pytest
import recorded_streams as recorded
from recorded_streams import record, typed

from agentstate.api.gateway.dialects import MESSAGES
from agentstate.api.gateway.heard import Call, Message


def request(*messages: dict[str, Any], **body: Any) -> list[Message]:
    return MESSAGES.messages({"model": "m", "max_tokens": 9, "messages": list(messages), **body})


def echoes() -> dict[str, Any]:
    blocks = recorded.MESSAGES_BLOCKS
    cached = [*blocks[:-1], {**blocks[-1], "cache_control": {"type": "ephemeral"}}]
    return {
        "sdk": blocks,
        "claude-code": cached,
        "without-thinking": blocks[1:],
        "with-a-signature": [{**blocks[0], "signature": "c2ln"}, *blocks[1:]],
        "citations": [{**blocks[1], "citations": None}, *blocks[2:]],
    }


@pytest.mark.parametrize("client", echoes())
@pytest.mark.parametrize("how", ["streamed", "whole"])
def test_an_answer_is_known_again_when_a_client_sends_it_back(client: str, how: str) -> None:
    if how == "streamed":
        answer = record(MESSAGES, recorded.MESSAGES_STREAM)
    else:
        answer = record(MESSAGES, json.dumps(recorded.MESSAGES_ANSWER).encode(), stream=False)
    again = request({"role": "assistant", "content": echoes()[client]})
    assert [each.digest for each in answer.messages] == [each.digest for each in again]


def test_a_streamed_message_is_kept_as_the_model_said_it() -> None:
    answer = record(MESSAGES, recorded.MESSAGES_STREAM)
    assert [each.item for each in answer.messages] == [{"role": "assistant", "content": recorded.MESSAGES_BLOCKS}]
    assert [call.id for call in answer.messages[0].calls] == ["call_a", "call_b"]
    assert json.loads(answer.messages[0].calls[0].arguments) == json.loads(recorded.ARGUMENTS)
    assert answer.finish == "tool_use"
    assert answer.usage == {"input_tokens": 12, "output_tokens": 10, "cache_read_input_tokens": 64}
    assert answer.cached_tokens == 64


def test_usage_that_the_end_does_not_tell_is_that_of_the_beginning() -> None:
    told = b'"usage":{"input_tokens":null,"output_tokens":10}'
    stream = recorded.MESSAGES_STREAM.replace(b'"usage":{"output_tokens":10}', told)
    assert told in stream
    assert record(MESSAGES, stream).usage == record(MESSAGES, recorded.MESSAGES_STREAM).usage


def test_no_cached_tokens_are_zero_and_not_unknown() -> None:
    usage = {"input_tokens": 1, "output_tokens": 1, "cache_read_input_tokens": 0}
    whole = json.dumps({**recorded.MESSAGES_ANSWER, "usage": usage}).encode()
    assert record(MESSAGES, whole, stream=False).cached_tokens == 0


def test_each_tool_result_is_a_message_before_what_the_user_says() -> None:
    results = [
        {"type": "tool_result", "tool_use_id": "call_a", "content": [{"type": "text", "text": "rain"}]},
        {"type": "text", "text": "Hurry."},
        {"type": "tool_result", "tool_use_id": "call_b", "content": "no clock", "is_error": True},
    ]
    heard = request({"role": "user", "content": results})
    assert [(each.role, each.result_of, each.failed) for each in heard] == [
        ("tool", "call_a", False),
        ("tool", "call_b", True),
        ("user", None, False),
    ]
    assert [each.item for each in heard] == [
        {"role": "user", "content": [results[0]]},
        {"role": "user", "content": [results[2]]},
        {"role": "user", "content": [results[1]]},
    ]
    plain = {"type": "tool_result", "tool_use_id": "call_a", "content": "rain", "cache_control": {"type": "ephemeral"}}
    assert request({"role": "user", "content": [plain]})[0].digest == heard[0].digest
    assert request({"role": "user", "content": "Hurry."})[0].digest == heard[2].digest


@pytest.mark.parametrize("system", ["Be brief.", [{"type": "text", "text": "Be brief.", "cache_control": {}}]])
def test_the_system_prompt_comes_first(system: Any) -> None:
    heard = request({"role": "user", "content": "?"}, system=system)
    assert [each.role for each in heard] == ["system", "user"]
    assert heard[0].digest == request(system="Be brief.")[0].digest


def test_an_error_in_a_stream_is_told_although_the_stream_ends_properly() -> None:
    start, _, rest = recorded.MESSAGES_STREAM.partition(b"event: content_block_stop")
    error = typed({"type": "error", "error": {"type": "api_error", "message": "Internal server error"}})
    answer = record(MESSAGES, start, error, typed({"type": "message_stop"}))
    assert rest and answer.whole and answer.messages == ()
    assert answer.error == {"type": "api_error", "message": "Internal server error"}


def test_an_error_instead_of_an_answer_is_told() -> None:
    body = {"type": "error", "error": {"type": "not_found_error", "message": "no such model"}}
    answer = record(MESSAGES, json.dumps(body).encode(), stream=False)
    assert answer.whole and answer.error == body["error"]


def test_arguments_that_are_no_json_leave_a_call_without_any() -> None:
    """As in whole answers: the client has the same call either way."""
    begin = {"type": "tool_use", "id": "call_a", "name": "weather", "input": {}}
    [message] = record(
        MESSAGES,
        typed({"type": "content_block_start", "index": 0, "content_block": begin}),
        typed(
            {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": '{"cit'}}
        ),
        typed({"type": "message_delta", "delta": {"stop_reason": "tool_use"}}),
        typed({"type": "message_stop"}),
    ).messages
    assert message.calls == (Call("call_a", "weather", "{}"),)


def test_a_ping_is_no_event_of_the_message() -> None:
    ping = typed({"type": "ping"})
    data = recorded.MESSAGES_STREAM.replace(b"event: ", ping + b"event: ")
    assert record(MESSAGES, data) == record(MESSAGES, recorded.MESSAGES_STREAM)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": {}},
        {"messages": [{"role": "user", "content": ["a"]}]},
        {"messages": [{"content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": 5}]}]},
        {"messages": [], "system": 5},
    ],
)
def test_a_body_that_is_no_conversation_is_refused_in_a_sentence(body: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must "):
        MESSAGES.messages(body)
