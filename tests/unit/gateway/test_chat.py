from __future__ import annotations

import json
from typing import Any

import pytest
import recorded_streams as recorded
from openai.types.chat import ChatCompletion
from recorded_streams import DONE, called, chunk, event, record, usage

from agentstate.api.gateway.dialects import CHAT
from agentstate.api.gateway.heard import Call, Message


def said(*chunks: bytes) -> tuple[Message, ...]:
    return record(CHAT, *chunks, chunk(finish="stop"), DONE).messages


def request(*messages: dict[str, Any]) -> list[Message]:
    return CHAT.messages({"model": "m", "messages": list(messages)})


def sdk(**how: Any) -> dict[str, Any]:
    """As OpenAI's Python SDK has the message."""
    answer = ChatCompletion.model_validate(recorded.chat_answer(recorded.CHAT_MESSAGE))
    return answer.choices[0].message.model_dump(**how)


def with_arguments(write: Any, **fields: Any) -> dict[str, Any]:
    calls = [
        {
            "type": "function",
            "id": each["id"],
            "function": {
                "name": each["function"]["name"],
                "arguments": write(json.loads(each["function"]["arguments"])),
            },
        }
        for each in recorded.CHAT_MESSAGE["tool_calls"]
    ]
    return {"role": "assistant", "content": recorded.TEXT, "tool_calls": calls, **fields}


def javascript(arguments: dict[str, Any]) -> str:
    return json.dumps(
        {key: int(value) if value == 1.0 else value for key, value in arguments.items()},
        ensure_ascii=False,
        separators=(",", ":"),
    )


ECHOES = {
    "openai-python": sdk(),
    "openai-python-exclude-none": sdk(exclude_none=True),
    "openai-typescript": {**recorded.CHAT_MESSAGE, "refusal": None, "annotations": []},
    "langchain": with_arguments(json.dumps),
    "langchain-blocks": with_arguments(json.dumps, content=[{"type": "text", "text": recorded.TEXT, "index": 0}]),
    "litellm": with_arguments(
        json.dumps, function_call=None, provider_specific_fields={"refusal": None}, images=[], thinking_blocks=None
    ),
    "vercel-ai-sdk": with_arguments(javascript, reasoning_content="I need the weather."),
    "pydantic-ai": with_arguments(json.dumps, name=None, content=recorded.TEXT.strip()),
}


@pytest.mark.parametrize("client", ECHOES)
@pytest.mark.parametrize("how", ["streamed", "whole"])
def test_an_answer_is_known_again_when_a_client_sends_it_back(client: str, how: str) -> None:
    if how == "streamed":
        answer = record(CHAT, recorded.CHAT_STREAM)
    else:
        answer = record(CHAT, json.dumps(recorded.chat_answer(recorded.CHAT_MESSAGE)).encode(), stream=False)
    assert [each.digest for each in answer.messages] == [each.digest for each in request(ECHOES[client])]


def test_a_streamed_message_is_kept_as_the_model_said_it() -> None:
    answer = record(CHAT, recorded.CHAT_STREAM)
    whole = {**recorded.CHAT_MESSAGE}
    whole["tool_calls"] = [{key: each[key] for key in ("id", "type", "function")} for each in whole["tool_calls"]]
    assert [each.item for each in answer.messages] == [whole]
    assert answer.messages[0].calls == (Call("call_a", "weather", recorded.ARGUMENTS), Call("call_b", "time", "{}"))
    assert answer.finish == "tool_calls"


def test_a_conversation_goes_on_with_the_same_digests() -> None:
    """Compared by their keys, stored messages and those that come back are never alike."""
    first = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "?"}]},
    ]
    heard = [*request(*first), *record(CHAT, recorded.CHAT_STREAM).messages]
    again = request(
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": "?", "name": "ada"},
        ECHOES["vercel-ai-sdk"],
        {"role": "tool", "tool_call_id": "call_a", "content": "rain"},
    )
    assert [each.digest for each in again[:3]] == [each.digest for each in heard]
    assert [each.role for each in again] == ["system", "user", "assistant", "tool"]
    assert again[3].result_of == "call_a"


def test_calls_of_an_answer_that_all_have_index_0_are_told_apart_by_their_ids() -> None:
    [message] = said(
        called(0, '{"a"', "call_a", "f"), called(0, ": 1}"), called(0, '{"b": ', "call_b", "g"), called(0, "2}")
    )
    assert message.calls == (Call("call_a", "f", '{"a": 1}'), Call("call_b", "g", '{"b": 2}'))


def test_calls_without_an_index_are_told_apart_by_their_ids() -> None:
    parts = [("call_a", "f", '{"a"'), (None, None, ": 1}"), ("call_b", "g", "{}")]
    deltas = [
        chunk(tool_calls=[{"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}])
        for call_id, name, arguments in parts
    ]
    [message] = said(*deltas)
    assert message.calls == (Call("call_a", "f", '{"a": 1}'), Call("call_b", "g", "{}"))


def test_a_call_that_repeats_its_id_and_name_is_one() -> None:
    [message] = said(called(0, "{", "call_a", "f"), called(1, "[", "call_b", "g"), called(0, "}", "call_a", "f"))
    assert message.calls == (Call("call_a", "f", "{}"), Call("call_b", "g", "["))


def test_calls_are_in_the_order_of_their_indices() -> None:
    [message] = said(called(1, "{", "call_b", "g"), called(0, "[", "call_a", "f"), called(1, "}"), called(0, "]"))
    assert message.calls == (Call("call_a", "f", "[]"), Call("call_b", "g", "{}"))


def test_an_id_that_comes_late_is_that_of_the_call() -> None:
    [message] = said(called(0, "{", None, "f"), called(0, "}", "call_a"))
    assert message.calls == (Call("call_a", "f", "{}"),)


def test_several_choices_are_no_message() -> None:
    answer = record(
        CHAT,
        chunk(0, content="Azure."),
        chunk(1, content="Blue."),
        chunk(0, finish="length"),
        chunk(1, finish="stop"),
        DONE,
    )
    assert answer.whole and answer.messages == () and answer.finish == "length"
    choice = {"role": "assistant", "content": "Azure."}
    both = record(CHAT, json.dumps(recorded.chat_answer(choice, choice)).encode(), stream=False)
    assert both.whole and both.messages == ()


def test_usage_comes_on_a_chunk_without_choices() -> None:
    answer = record(CHAT, chunk(content="a"), chunk(finish="stop"), usage({"prompt_tokens": 3}), DONE)
    assert answer.usage == {"prompt_tokens": 3} and answer.cached_tokens is None
    assert [each.item["content"] for each in answer.messages] == ["a"]


def test_usage_may_come_with_every_chunk_and_the_last_one_counts() -> None:
    counts = [{"completion_tokens": n, "prompt_tokens_details": {"cached_tokens": 64}} for n in (1, 2)]
    chunks = [event({"choices": [{"index": 0, "delta": {"content": "a"}}], "usage": told}) for told in counts]
    answer = record(CHAT, *chunks, chunk(finish="stop"), DONE)
    assert answer.usage == counts[1] and answer.cached_tokens == 64


def test_no_cached_tokens_are_zero_and_not_unknown() -> None:
    assert record(CHAT, recorded.CHAT_STREAM).cached_tokens == 0


@pytest.mark.parametrize(
    "error",
    [{"message": "out of memory", "type": "INTERNAL", "code": 500}, "out of memory"],
    ids=["object", "text"],
)
def test_an_error_in_a_stream_is_told_as_an_object_and_nothing_was_said(error: Any) -> None:
    answer = record(CHAT, chunk(content="a"), event({"error": error}), chunk(finish="abort"), DONE)
    assert answer.error is not None and answer.error["message"] == "out of memory"
    assert answer.whole and answer.messages == ()


@pytest.mark.parametrize(
    "body",
    [
        {"object": "error", "message": "no such model", "type": "BadRequestError", "param": None, "code": 400},
        {"error": {"message": "no such model"}},
        {"error": "no such model"},
    ],
    ids=["flat", "object", "text"],
)
def test_an_error_instead_of_an_answer_is_told_as_an_object(body: dict[str, Any]) -> None:
    answer = record(CHAT, json.dumps(body).encode(), stream=False)
    assert answer.error is not None and answer.error["message"] == "no such model" and answer.whole


def test_an_answer_that_was_cut_at_40_of_60_tokens_is_not_taken_for_a_whole_one() -> None:
    answer = record(CHAT, *(chunk(content="token ") for _ in range(40)))
    assert not answer.whole and answer.messages == () and answer.finish is None


def test_an_end_without_a_reason_to_end_says_nothing() -> None:
    """Something between the engine and us may have closed a stream that broke."""
    answer = record(CHAT, *(chunk(content="token ") for _ in range(40)), DONE)
    assert answer.messages == ()


def test_a_character_whose_bytes_come_apart_is_whole() -> None:
    data = chunk(content="北")
    middle = data.index("北".encode()) + 1
    answer = record(CHAT, data[:middle], data[middle:], chunk(finish="stop"), DONE)
    assert answer.messages[0].item["content"] == "北"


def test_a_chunk_that_cannot_be_read_leaves_nothing_said() -> None:
    answer = record(CHAT, chunk(content="a"), b"data: {oops\n\n", chunk(finish="stop"), DONE)
    assert answer.whole and answer.messages == ()


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": "hello"},
        {"messages": ["hello"]},
        {"messages": [{"content": "hello"}]},
        {"messages": [{"role": "user", "content": 7}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"id": 1, "function": {"name": "f"}}]}]},
        {"messages": [{"role": "assistant", "refusal": 1}]},
        {"messages": [{"role": "tool", "tool_call_id": 1}]},
    ],
)
def test_a_body_that_is_no_conversation_is_refused_in_a_sentence(body: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\w+ .* must|must "):
        CHAT.messages(body)


def test_a_custom_tool_call_has_its_input_as_it_is() -> None:
    call = {"id": "c", "type": "custom", "custom": {"name": "patch", "input": "*** Begin"}}
    [message] = request({"role": "assistant", "content": None, "tool_calls": [call]})
    assert message.calls == (Call("c", "patch", "*** Begin"),)


def test_a_refusal_is_said_and_none_is_not() -> None:
    digests = {
        request({"role": "assistant", "content": content, "refusal": refusal})[0].digest
        for content, refusal in [("", None), ("", "no"), ("a", None), ("a", "no"), ("a", "never")]
    }
    assert len(digests) == 5
    assert request({"role": "assistant", "content": ""})[0].digest in digests
