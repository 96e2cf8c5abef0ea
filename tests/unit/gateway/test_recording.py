"""What an answer said does not depend on how it came."""

from __future__ import annotations

import json
from typing import Any

import pytest
import recorded_streams as recorded
from hypothesis import given
from hypothesis import strategies as st
from recorded_streams import record

from agentstate.api.gateway.dialects import CHAT, COMPLETIONS, DIALECTS, MESSAGES, RESPONSES, Answer, Dialect
from agentstate.api.gateway.recording import Events

STREAMS = {
    "chat": (CHAT, recorded.CHAT_STREAM),
    "completions": (COMPLETIONS, recorded.COMPLETION_STREAM),
    "messages": (MESSAGES, recorded.MESSAGES_STREAM),
    "responses": (RESPONSES, recorded.RESPONSES_STREAM),
}
WHOLE: dict[str, tuple[Dialect, dict[str, Any]]] = {
    "chat": (CHAT, recorded.chat_answer(recorded.CHAT_MESSAGE)),
    "messages": (MESSAGES, recorded.MESSAGES_ANSWER),
    "responses": (RESPONSES, recorded.response()),
}


def cut(data: bytes, places: set[int]) -> list[bytes]:
    ends = [*sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("name", STREAMS)
@given(places=st.sets(st.integers(0, 20_000), max_size=60))
def test_a_stream_may_be_cut_anywhere(name: str, places: set[int]) -> None:
    dialect, data = STREAMS[name]
    assert record(dialect, *cut(data, places)) == record(dialect, data)


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_may_come_byte_by_byte(name: str) -> None:
    dialect, data = STREAMS[name]
    answer = record(dialect, *(data[at : at + 1] for at in range(len(data))))
    assert answer == record(dialect, data) and answer.whole


@pytest.mark.parametrize("name", STREAMS)
@given(
    places=st.sets(st.integers(0, 20_000), max_size=60),
    line_end=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    space=st.sampled_from([b" ", b""]),
    before=st.sampled_from([b"", b": ping\n", b": ping\n\n", b"\n", b"id: 7\nretry: 5\n", b"event: ping\n\n"]),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
)
def test_a_stream_may_be_written_in_any_way_that_the_standard_allows(
    name: str, places: set[int], line_end: bytes, space: bytes, before: bytes, mark: bytes
) -> None:
    dialect, data = STREAMS[name]
    events = [before + part + b"\n\n" for part in data.split(b"\n\n") if part]
    written = mark + b"".join(events).replace(b"\ndata: ", b"\ndata:" + space)
    assert record(dialect, *cut(written.replace(b"\n", line_end), places)) == record(dialect, data)


EVENTS = [(b"", b"{\n}"), (b"delta", b" {}"), (b"", b"[DONE]"), (b"", b"")]


@pytest.mark.parametrize(
    "body",
    [
        b"data: {\ndata: }\n\nevent: delta\ndata:  {}\n\ndata: [DONE]\n\ndata\n\n",
        b"data:{\r\ndata:}\r\n\r\nevent:delta\r\ndata:  {}\r\n\r\ndata:[DONE]\r\n\r\ndata:\r\n\r\n",
        b"\rdata: {\rdata: }\r\r:\r\revent: delta\rdata:  {}\r\rdata: [DONE]\r\rdata: \r\r",
        b"\xef\xbb\xbfdata: {\rdata: }\n\nevent: delta\r\ndata:  {}\n\r\ndata: [DONE]\r\n\ndata: \r\r",
        b": a\n\n\n\ndata: {\nid: 1\ndata: }\n\nid\ndata:  {}\nevent: delta\n\n\ndata: [DONE]\n\ndata\n\ndata: cut\n",
    ],
    ids=["newlines", "crlf", "cr", "mixed-with-mark", "comments"],
)  # fmt: skip
def test_events_are_the_same_wherever_the_body_is_cut(body: bytes) -> None:
    for at in range(len(body)):
        for until in range(at, len(body)):
            events = Events()
            parts = (body[:at], b"", body[at:until], body[until:])
            assert [event for part in parts for event in events.feed(part)] == EVENTS


@pytest.mark.parametrize("name", STREAMS)
def test_a_keep_alive_of_one_line_is_no_event(name: str) -> None:
    """And one in the middle of an event is no part of it."""
    dialect, data = STREAMS[name]
    parted = data.replace(b"\ndata: ", b"\n: ping\ndata: ").replace(b"\n\n", b"\n: ping\n\n")
    assert record(dialect, parted) == record(dialect, data)


@pytest.mark.parametrize("name", STREAMS)
def test_an_event_may_have_several_lines_of_data(name: str) -> None:
    dialect, data = STREAMS[name]
    assert record(dialect, data.replace(b'{"', b'{\ndata:  "')) == record(dialect, data)


@pytest.mark.parametrize("name", WHOLE)
@given(places=st.sets(st.integers(0, 20_000), max_size=10))
def test_a_whole_answer_may_be_cut_anywhere(name: str, places: set[int]) -> None:
    dialect, document = WHOLE[name]
    data = json.dumps(document, ensure_ascii=False).encode()
    assert record(dialect, *cut(data, places), stream=False) == record(dialect, data, stream=False)


@pytest.mark.parametrize("name", WHOLE)
def test_a_streamed_answer_says_what_a_whole_one_says(name: str) -> None:
    dialect, document = WHOLE[name]
    whole = record(dialect, json.dumps(document).encode(), stream=False)
    streamed = record(*STREAMS[name])
    assert whole.messages and whole.whole and streamed.whole
    assert [each.digest for each in streamed.messages] == [each.digest for each in whole.messages]
    assert [each.calls for each in streamed.messages] == [each.calls for each in whole.messages]
    assert streamed.finish == whole.finish
    assert streamed.usage == whole.usage
    assert streamed.cached_tokens == whole.cached_tokens is not None


@pytest.mark.parametrize("name", STREAMS)
@given(place=st.integers(0, 20_000))
def test_a_stream_that_breaks_off_is_not_whole_and_says_nothing(name: str, place: int) -> None:
    dialect, data = STREAMS[name]
    answer = record(dialect, data[: place % len(data)])
    assert not answer.whole and not answer.messages


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_answer_that_breaks_off_is_not_whole(name: str) -> None:
    dialect, document = WHOLE[name]
    assert record(dialect, json.dumps(document).encode()[:-1], stream=False) == Answer()


@pytest.mark.parametrize("name", STREAMS)
def test_nothing_is_heard_after_the_end(name: str) -> None:
    dialect, data = STREAMS[name]
    assert record(dialect, data + data) == record(dialect, data)


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=lambda dialect: dialect.name)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@given(
    document=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "type", "choices", "delta", "message", "content", "index", "finish_reason", "tool_calls",
                        "function", "usage", "error", "item", "response", "output", "status", "content_block", "text",
                    ]
                ),
                inner | st.sampled_from(["message_delta", "content_block_start", "response.completed", "completed"]),
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)  # fmt: skip
def test_a_recorder_never_raises(dialect: Dialect, stream: bool, document: Any) -> None:
    data = json.dumps(document).encode()
    parts = [b"data: " + data + b"\n\n", b"data: \xff{\n\n", STREAMS[dialect.name][1]] if stream else [data]
    answer = record(dialect, *parts, stream=stream)
    if stream:
        # What cannot be read may have said anything.
        assert not answer.messages and answer.whole
