from __future__ import annotations

import json
from typing import Any

import pytest
import recorded_streams as recorded
from openai.types.responses import Response
from recorded_streams import record, response, responses_stream, typed

from agentstate.api.gateway.dialects import RESPONSES
from agentstate.api.gateway.heard import Call, Message


def request(*items: dict[str, Any], **body: Any) -> list[Message]:
    return RESPONSES.messages({"model": "m", "input": list(items), **body})


def only(item: dict[str, Any], *keys: str, **fields: Any) -> dict[str, Any]:
    return {key: item[key] for key in keys if key in item} | fields


def echoes() -> dict[str, list[dict[str, Any]]]:
    reasoning, message, *calls = recorded.RESPONSES_ITEMS
    parsed = Response.model_validate(response(parallel_tool_calls=True, tool_choice="auto", tools=[]))
    text = [{"type": "output_text", "text": recorded.TEXT}]
    return {
        "openai-python": [item.model_dump(mode="json") for item in parsed.output],
        "openai-python-exclude-unset": [item.model_dump(exclude_unset=True) for item in parsed.output],
        "openai-typescript": recorded.RESPONSES_ITEMS,
        "codex": [
            only(reasoning, "type", "summary", encrypted_content="b3BhcXVl"),
            only(message, "type", "role", content=text),
            *(only(each, "type", "name", "arguments", "call_id") for each in calls),
        ],
        "langchain": [
            only(message, "type", "role", "id", content=[{**text[0], "annotations": []}]),
            *({**each, "arguments": json.dumps(json.loads(each["arguments"])), "status": None} for each in calls),
        ],
        "vercel-ai-sdk": [
            {"role": "assistant", "id": "msg_1", "content": text},
            *({**each, "arguments": each["arguments"].replace("1.0", "1")} for each in calls),
        ],
        "easy": [{"role": "assistant", "content": recorded.TEXT.strip()}, *calls],
    }


@pytest.mark.parametrize("client", echoes())
@pytest.mark.parametrize("how", ["streamed", "whole"])
def test_an_answer_is_known_again_when_a_client_sends_it_back(client: str, how: str) -> None:
    if how == "streamed":
        answer = record(RESPONSES, recorded.RESPONSES_STREAM)
    else:
        answer = record(RESPONSES, json.dumps(response()).encode(), stream=False)
    assert len(answer.messages) == 3
    assert [each.digest for each in answer.messages] == [each.digest for each in request(*echoes()[client])]


def test_each_item_is_a_message() -> None:
    answer = record(RESPONSES, recorded.RESPONSES_STREAM)
    assert [each.item for each in answer.messages] == recorded.RESPONSES_ITEMS[1:]
    assert [each.calls for each in answer.messages] == [
        (),
        (Call("call_a", "weather", recorded.ARGUMENTS),),
        (Call("call_b", "time", "{}"),),
    ]
    assert answer.finish == "completed" and answer.cached_tokens == 0
    assert answer.response == response()


def test_a_terminal_event_without_output_or_usage_ends_an_answer_all_the_same() -> None:
    bare = {key: value for key, value in response().items() if key not in ("output", "usage")}
    answer = record(RESPONSES, responses_stream({"type": "response.completed", "response": bare}))
    assert answer.whole and answer.usage is None and answer.cached_tokens is None
    assert [each.digest for each in answer.messages] == [
        each.digest for each in record(RESPONSES, recorded.RESPONSES_STREAM).messages
    ]
    assert answer.response == {**bare, "output": recorded.RESPONSES_ITEMS}


def test_no_done_is_needed_and_one_does_no_harm() -> None:
    answer = record(RESPONSES, recorded.RESPONSES_STREAM)
    assert answer.whole
    assert record(RESPONSES, recorded.DONE, recorded.RESPONSES_STREAM, recorded.DONE) == answer
    items_only = recorded.RESPONSES_STREAM.partition(b"event: response.completed")[0]
    assert not record(RESPONSES, items_only, recorded.DONE).whole


def test_ids_of_items_that_change_on_the_way_do_not_matter() -> None:
    items = [{**item, "id": f"other_{at}"} for at, item in enumerate(recorded.RESPONSES_ITEMS)]
    stream = responses_stream({"type": "response.completed", "response": response()}, items=items)
    assert record(RESPONSES, stream) == record(RESPONSES, recorded.RESPONSES_STREAM)


def test_events_without_names_are_heard_by_their_types() -> None:
    lines = recorded.RESPONSES_STREAM.split(b"\n")
    unnamed = b"\n".join(line for line in lines if not line.startswith(b"event:"))
    assert record(RESPONSES, unnamed) == record(RESPONSES, recorded.RESPONSES_STREAM)


def test_an_answer_that_ran_out_of_tokens_is_incomplete_and_was_said() -> None:
    for details, finish in ((None, "incomplete"), ({"reason": "max_output_tokens"}, "max_output_tokens")):
        ended = response("incomplete", incomplete_details=details)
        answer = record(RESPONSES, responses_stream({"type": "response.incomplete", "response": ended}))
        assert answer.whole and answer.finish == finish and len(answer.messages) == 3


def test_an_answer_that_failed_tells_its_error_and_said_nothing() -> None:
    error = {"code": "server_error", "message": "Generation aborted"}
    failed = response("failed", output=[], usage=None, error=error)
    answer = record(RESPONSES, responses_stream({"type": "response.failed", "response": failed}))
    assert answer.whole and answer.error == error and answer.finish == "failed" and answer.messages == ()
    whole = record(RESPONSES, json.dumps(failed).encode(), stream=False)
    assert whole.error == error and whole.messages == ()


@pytest.mark.parametrize(
    "error",
    [
        {"type": "error", "code": "server_error", "message": "gone", "param": None, "sequence_number": 3},
        {"type": "error", "error": {"message": "gone"}},
    ],
    ids=["flat", "object"],
)
def test_an_error_event_is_no_proper_end(error: dict[str, Any]) -> None:
    answer = record(RESPONSES, typed(error))
    assert answer.error is not None and answer.error["message"] == "gone" and not answer.whole


def test_an_error_instead_of_an_answer_is_told() -> None:
    body = {"object": "error", "message": "no such model", "type": "BadRequestError", "param": None, "code": 400}
    answer = record(RESPONSES, json.dumps(body).encode(), stream=False)
    assert answer.whole and answer.error == body and answer.messages == () and answer.response is None


@pytest.mark.parametrize("status", ["queued", "in_progress", "cancelled", "failed"])
def test_a_response_that_did_not_get_to_its_end_said_nothing(status: str) -> None:
    answer = record(RESPONSES, json.dumps(response(status)).encode(), stream=False)
    assert answer.whole and answer.messages == () and answer.finish == status


def test_a_text_is_what_the_user_says_and_instructions_come_first() -> None:
    heard = RESPONSES.messages({"input": "Hello", "instructions": "Be brief."})
    assert [(each.role, each.size) for each in heard] == [("system", 9), ("user", 5)]
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]}
    developer = {"role": "developer", "content": "Be brief."}
    assert [each.digest for each in request(developer, item)] == [each.digest for each in heard]


def test_outputs_of_tools_are_results_of_their_calls() -> None:
    parts = [{"type": "input_text", "text": "rain"}]
    heard = request(
        {"type": "function_call_output", "call_id": "call_a", "output": "rain"},
        {"type": "function_call_output", "call_id": "call_a", "output": parts, "id": "fco_1", "status": "completed"},
        {"type": "custom_tool_call_output", "call_id": "call_b", "output": "done"},
    )
    assert [(each.role, each.result_of) for each in heard] == [
        ("tool", "call_a"),
        ("tool", "call_a"),
        ("tool", "call_b"),
    ]
    assert heard[0].digest == heard[1].digest


def test_calls_of_tools_of_every_kind_are_calls() -> None:
    action = {"type": "exec", "command": ["ls"]}
    heard = request(
        {"type": "custom_tool_call", "call_id": "c1", "name": "apply_patch", "input": "*** Begin"},
        {"type": "local_shell_call", "call_id": "c2", "action": action, "id": "lsh_1", "status": "completed"},
        {"type": "local_shell_call_output", "call_id": "c2", "output": "README"},
    )
    assert heard[0].calls == (Call("c1", "apply_patch", "*** Begin"),)
    [shell] = heard[1].calls
    assert (shell.id, shell.name, json.loads(shell.arguments)) == ("c2", "local_shell", action)
    assert heard[2].result_of == "c2"


def test_items_of_other_kinds_are_told_apart_by_what_they_say() -> None:
    items = [
        {"type": "item_reference", "id": "msg_1"},
        {"type": "item_reference", "id": "msg_2"},
        {"type": "web_search_call", "id": "ws_1", "action": {"query": "rain"}},
        {"type": "web_search_call", "id": "ws_1", "action": {"query": "sun"}},
    ]
    assert len({each.digest for each in request(*items)}) == 4
    assert request({**items[2], "id": "ws_2", "status": "completed"})[0].digest == request(items[2])[0].digest


@pytest.mark.parametrize("where", ["conversation", "previous_response_id"])
def test_input_may_be_elsewhere(where: str) -> None:
    assert RESPONSES.messages({"model": "m", where: "x_1"}) == []


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input": 5},
        {"input": ["a"]},
        {"input": [{"type": 5}]},
        {"input": [{"type": "message", "content": "a"}]},
        {"input": [{"type": "function_call", "call_id": 5, "name": "f"}]},
        {"input": "a", "instructions": 5},
    ],
)
def test_a_body_that_is_no_conversation_is_refused_in_a_sentence(body: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must "):
        RESPONSES.messages(body)
