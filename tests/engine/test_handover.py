"""What a gateway hands over in headers, on its way into SGLang's own requests."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.entrypoints.anthropic.serving import AnthropicServing
from sglang.srt.entrypoints.openai.protocol import ResponsesRequest
from sglang.srt.entrypoints.openai.serving_responses import OpenAIServingResponses
from sglang.srt.managers import tokenizer_manager_score_mixin
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput, TokenizedEmbeddingReqInput
from sglang.srt.managers.tokenizer_manager_score_mixin import TokenizerManagerScoreMixin
from starlette.datastructures import Headers
from turns import turn

from agentstate.fleet import turns
from agentstate.fleet.handover import Handover
from engine_patch import plugin

SENT = turns.sign(turns.signing_key(b"k" * 32), turn("ses_1"))


def http(handover: Handover | None = None, **headers: str) -> Any:
    """An HTTP request that has these headers."""
    sent = handover.headers() if handover else []
    sent += [(f"X-AgentState-{name}".lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    return SimpleNamespace(headers=Headers(raw=sent))


def requested(obj: Any, request: Any) -> Any:
    """The request as SGLang gets it, and normalizes it."""
    found = plugin._as_requested(lambda manager, obj, request: (obj, request), None, obj, request)
    assert found == (obj, request)
    obj.normalize_batch_and_arguments()
    return obj


def own(obj: Any) -> tuple[Any, ...]:
    return obj.session_id, obj.cache_salt, obj.extra_key


def test_what_is_handed_over_is_the_requests() -> None:
    obj = requested(GenerateReqInput(text="x"), http(Handover(SENT, "salt", "a key\u00e9", "chatcmpl-1")))
    assert own(obj) == ("ses_1", "salt", "a key\u00e9")
    assert obj.rid == "chatcmpl-1"
    assert obj.session_id.sent == SENT


@pytest.mark.parametrize("handover", [Handover(session=SENT), Handover(salt="s"), Handover(request_id="r")], ids=ascii)
def test_nothing_of_what_the_body_says_of_it_counts(handover: Handover) -> None:
    said = GenerateReqInput(text="x", session_id="ses_2", cache_salt="theirs", extra_key="theirs", rid="theirs")
    obj = requested(said, http(handover))
    assert own(obj) == ("ses_1" if handover.session else None, handover.salt, handover.extra_key)
    assert obj.rid == (handover.request_id or "theirs")


def test_a_request_that_no_gateway_forwards_is_left_as_it_is() -> None:
    for request in (None, http(), http(Session="mine"), SimpleNamespace()):
        said = GenerateReqInput(text="x", session_id=SENT, cache_salt="salt", extra_key="key", rid="r")
        obj = requested(said, request)
        assert (*own(obj), obj.rid) == ("ses_1", "salt", "key", "r")


@pytest.mark.parametrize("said", ["theirs", ["a", "b"]], ids=ascii)
def test_every_prompt_of_a_batch_is_of_the_turn(said: Any) -> None:
    lists = {"cache_salt": said, "extra_key": said, "rid": said}
    obj = requested(GenerateReqInput(text=["x", "y"], **lists), http(Handover(SENT, "salt", request_id="r")))
    assert [(*own(obj[i]), obj[i].rid) for i in range(2)] == [("ses_1", "salt", None, f"r_{i}") for i in range(2)]


def test_every_sample_is_of_the_turn() -> None:
    said = GenerateReqInput(text="x", sampling_params={"n": 2}, cache_salt=["theirs"], rid=["theirs"])
    obj = requested(said, http(Handover(SENT, "salt", "key", "r")))
    assert obj.parallel_sample_num == 2
    assert [own(obj[i]) for i in range(2)] == [("ses_1", "salt", "key")] * 2
    assert [obj[i].rid for i in range(2)] == ["r_0", "r_1"]


def test_the_next_round_of_a_request_is_of_the_turn() -> None:
    """Between rounds of built-in tools SGLang makes a new request, with the HTTP request of the first."""
    request = http(Handover(SENT, "salt", request_id="resp_1"))
    first = requested(GenerateReqInput(text="x"), request)
    again = GenerateReqInput(
        input_ids=[1], rid="resp_1", session_id=first.session_id, extra_key=first.extra_key, cache_salt=first.cache_salt
    )
    assert own(requested(again, request)) == ("ses_1", "salt", None)
    assert again.session_id.sent == SENT


def test_embeddings_have_no_turn() -> None:
    obj = requested(EmbeddingReqInput(text="x", rid="mine"), http(Handover(SENT, "salt", "key", "r")))
    assert obj.rid == "mine"
    assert not {"session_id", "cache_salt", "extra_key"} & set(vars(obj))


def test_what_a_generating_model_ranks_is_of_the_tenant(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang makes a request to generate of each document, with the HTTP request that asked for the ranks."""
    asked = []

    class Manager(TokenizerManagerScoreMixin):
        is_generation, tokenizer = True, None

        async def generate_request(self, obj: Any, request: Any = None) -> Any:
            asked.append(requested(obj, request))
            raise StopAsyncIteration
            yield

    one_by_one = SimpleNamespace(features=SimpleNamespace(enable_mis=False))
    monkeypatch.setattr(tokenizer_manager_score_mixin, "get_exec", lambda: one_by_one)
    ranking = Manager().score_prompts(["a", "b"], [1, 2], request=http(Handover(None, "salt")))
    with pytest.raises(RuntimeError, match="StopAsyncIteration"):
        asyncio.run(ranking)
    (obj,) = asked
    assert [obj[number].cache_salt for number in range(2)] == ["salt", "salt"]


def test_embeddings_cannot_be_told_apart() -> None:
    """docs/security.md says what follows. If SGLang learns to keep them apart, a gateway's salt belongs there."""
    kept_apart = ("salt", "extra_key", "session")
    assert not [
        name for name in TokenizedEmbeddingReqInput.__struct_fields__ if any(part in name for part in kept_apart)
    ]


def test_names_that_sglang_gives_its_arguments_may_be_used() -> None:
    given = {"obj": GenerateReqInput(text="x"), "request": http(Handover(salt="salt"))}
    plugin._as_requested(lambda manager, obj, request: None, None, **given)
    assert given["obj"].cache_salt == "salt"


def test_headers_that_cannot_be_read_end_the_request() -> None:
    obj = GenerateReqInput(text="x")
    with pytest.raises(ValueError, match="the header x-agentstate-salt is not"):
        plugin._as_requested(lambda manager, obj, request: None, None, obj, http(Salt="\xe9"))


class Serving(OpenAIServingResponses):
    def __init__(self) -> None:
        self.tokenizer_manager = SimpleNamespace(server_args=SimpleNamespace(radix_cache_backend=None))


def response_requested(request: ResponsesRequest, raw_request: Any) -> Any:
    async def original(serving: Any, request: Any, raw_request: Any) -> Any:
        return request.request_id

    return asyncio.run(plugin._as_response_requested(original, Serving(), request, raw_request))


def test_a_response_has_the_id_that_is_handed_over() -> None:
    def asked() -> ResponsesRequest:
        return ResponsesRequest(model="m", input="x", request_id="resp_theirs")

    assert response_requested(asked(), http(Handover(request_id="resp_ours"))) == "resp_ours"
    assert response_requested(asked(), http(Handover(salt="salt"))) == "resp_theirs"
    assert response_requested(asked(), http()) == "resp_theirs"
    assert response_requested(asked(), None) == "resp_theirs"


def test_a_response_is_not_begun_with_headers_that_cannot_be_read() -> None:
    refused = response_requested(ResponsesRequest(model="m", input="x", stream=True), http(Turn="\xe9"))
    assert refused.status_code == 400
    assert b"the header x-agentstate-turn is not" in refused.body


@pytest.mark.parametrize(("raw", "status"), [(http(Turn="\xe9"), 400), (http(Handover(salt="s")), 200), (http(), 200)])
def test_a_message_is_not_begun_with_headers_that_cannot_be_read(raw: Any, status: int) -> None:
    async def original(serving: Any, request: Any, raw_request: Any) -> Any:
        return SimpleNamespace(status_code=200)

    serving = AnthropicServing.__new__(AnthropicServing)
    answer = asyncio.run(plugin._as_message_requested(original, serving, object(), raw))
    assert answer.status_code == status
    if status == 400:
        assert b"the header x-agentstate-turn is not" in answer.body
