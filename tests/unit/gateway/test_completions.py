from __future__ import annotations

import json

import recorded_streams as recorded
from recorded_streams import record

from agentstate.api.gateway.dialects import COMPLETIONS


def test_a_completion_has_no_messages_and_tells_how_it_ended() -> None:
    assert COMPLETIONS.messages({"prompt": "Once "}) == []
    answer = record(COMPLETIONS, recorded.COMPLETION_STREAM)
    assert answer.whole and answer.finish == "length" and answer.messages == ()
    assert answer.usage == recorded.USAGE and answer.cached_tokens == 0


def test_a_whole_completion_tells_the_same() -> None:
    body = {"choices": [{"index": 0, "text": "Once upon", "finish_reason": "length"}], "usage": recorded.USAGE}
    answer = record(COMPLETIONS, json.dumps(body).encode(), stream=False)
    assert answer == record(COMPLETIONS, recorded.COMPLETION_STREAM)


def test_an_error_in_a_stream_is_told() -> None:
    error = {"object": "error", "message": "timed out", "type": "GATEWAY_TIMEOUT", "param": None, "code": 504}
    answer = record(COMPLETIONS, recorded.event({"error": error}), recorded.DONE)
    assert answer.error == error and answer.whole
