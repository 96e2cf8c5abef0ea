"""SGLang's Responses stream with tools on offer: as it is generated, and otherwise as SGLang has it."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.entrypoints.openai import serving_responses
from sglang.srt.entrypoints.openai.protocol import RequestResponseMetadata, ResponsesRequest, ResponsesResponse
from sglang.srt.entrypoints.openai.serving_responses import OpenAIServingResponses

from engine_patch import plugin, responses
from engine_patch.flags import BACKEND

TOOL = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "it"}}\n</tool_call>'
STOP, LENGTH, ABORT = {"type": "stop", "matched": None}, {"type": "length", "length": 9}, {"type": "abort"}


class Serving(OpenAIServingResponses):
    """SGLang's own, of an engine that is not there."""

    def __init__(self, backend: str | None = BACKEND) -> None:
        self.tokenizer_manager = SimpleNamespace(
            tokenizer=None, server_args=SimpleNamespace(radix_cache_backend=backend)
        )
        self.template_manager = SimpleNamespace(force_reasoning=False)
        self.tool_call_parser, self.reasoning_parser = "hermes", "qwen3"
        self.enable_prompt_tokens_details = self.enable_response_store = False
        self.default_sampling_params = {"top_p": 0.9}
        self._encoding_adapter = None


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_responses, "get_serving", lambda: SimpleNamespace(incremental_streaming_output=True))


def asked(**fields: Any) -> ResponsesRequest:
    return ResponsesRequest(**{"model": "m", "input": "x", "stream": True, "tools": [TOOL], **fields})


async def chunks(texts: list[str], end: dict[str, Any] | Exception) -> AsyncIterator[dict[str, Any]]:
    """What an engine generates, and how it ends."""
    for text in texts:
        yield {"text": text, "meta_info": {"prompt_tokens": 3, "completion_tokens": 1}}
    if isinstance(end, Exception):
        raise end
    yield {"text": "", "meta_info": {"finish_reason": end, "prompt_tokens": 3, "completion_tokens": 1}}


def stream(
    hook: bool, generated: AsyncIterator[dict[str, Any]], request: ResponsesRequest, serving: Serving | None = None
) -> AsyncIterator[str]:
    """The events of an answer, as SGLang sends them by itself or with the plug-in."""
    serving = serving or Serving()
    given: Any = (request, {}, generated, "m", None, RequestResponseMetadata(request_id=request.request_id), 1)
    original = OpenAIServingResponses.responses_stream_generator_non_harmony
    if not hook:
        return original(serving, *given, require_reasoning=False)
    return plugin._around_response_stream(original, serving, *given, require_reasoning=False)


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Of one answer, the events as SGLang sends them, and ours."""

    async def collect(hook: bool, texts: list[str], end: Any, request: ResponsesRequest) -> list[dict[str, Any]]:
        ids = itertools.count(10**8)
        monkeypatch.setattr(serving_responses, "random_uuid", lambda: str(next(ids)))
        return [payload(event) async for event in stream(hook, chunks(texts, end), request)]

    def run(texts: list[str], end: Any = STOP, **fields: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        request = asked(**fields)
        stock, ours = (asyncio.run(collect(hook, texts, end, request)) for hook in (False, True))
        return stock, ours

    return run


def payload(event: str) -> dict[str, Any]:
    name, data, *rest = event.split("\n")
    assert rest == ["", ""]
    found = json.loads(data.removeprefix("data: "))
    assert name == f"event: {found['type']}"
    return dict(found)


def message(event: dict[str, Any]) -> bool:
    return event.get("item", {}).get("type") == "message"


ANSWERS: dict[str, list[str]] = {
    "text": ["Hel", "lo ", "w\u00f6rld"],
    "nothing": [],
    "call": [CALL],
    "text, call": ["Let me ", "look.", "\n", CALL],
    "text, calls": ["Let me look. ", CALL, "\n" + CALL],
    "text, call, text": ["Look: ", CALL, " and so.", " It is."],
    "text, call, text, call": ["Look: ", CALL, " And: ", CALL],
    "reasoning, text": ["<think>", "Hm.", "</think>", "Hello ", "world"],
    "reasoning, text, call": ["<think>", "Hm.", "</think>", "I look. ", CALL],
}


@pytest.mark.parametrize("end", [STOP, LENGTH, ABORT, RuntimeError("of this test")], ids=str)
@pytest.mark.parametrize("answer", ANSWERS)
def test_it_is_sglangs_stream_but_for_the_phase_of_a_message_that_begins(both: Any, answer: str, end: Any) -> None:
    stock, ours = both(ANSWERS[answer], end)
    assert len(stock) == len(ours)
    for theirs, event in zip(stock, ours, strict=True):
        if theirs["type"] == "response.output_item.added" and message(theirs):
            assert theirs["item"].pop("phase") in ("commentary", "final_answer")
            assert "phase" not in event["item"]
        assert event == theirs
    assert [event["sequence_number"] for event in ours] == list(range(len(ours)))


def test_phases_are_what_the_end_says(both: Any) -> None:
    """Not only what SGLang says: were its stream to change, both would."""
    _, ours = both(ANSWERS["text, call, text"])
    done = [event["item"]["phase"] for event in ours if event["type"] == "response.output_item.done" and message(event)]
    assert done == ["commentary", "final_answer"]
    items = [item for item in ours[-1]["response"]["output"] if item["type"] == "message"]
    assert [item["phase"] for item in items] == done


async def arrived(request: ResponsesRequest, texts: list[str], hook: bool = True) -> list[str]:
    """The types of the events that are there before the engine generates more than these texts."""
    more = asyncio.Event()

    async def generated() -> AsyncIterator[dict[str, Any]]:
        async for chunk in chunks(texts, STOP):
            if "finish_reason" in chunk["meta_info"]:
                waiting.set()
                await more.wait()
            yield chunk

    waiting = asyncio.Event()
    found: list[str] = []

    async def read() -> None:
        async for event in stream(hook, generated(), request):
            found.append(payload(event)["type"].removeprefix("response."))

    reading = asyncio.create_task(read())
    await waiting.wait()
    before = list(found)
    more.set()
    await reading
    assert found[-1] == "completed"
    return before


def test_text_is_there_before_the_answer_ends() -> None:
    texts = ANSWERS["text"]
    opened = ["created", "in_progress", "output_item.added", "content_part.added"]
    assert asyncio.run(arrived(asked(), texts)) == opened + ["output_text.delta"] * 3
    assert asyncio.run(arrived(asked(), texts, hook=False)) == ["created", "in_progress"]


def test_a_message_ends_with_the_call_that_follows() -> None:
    found = asyncio.run(arrived(asked(), ANSWERS["text, call"]))
    at = found.index("output_text.done")
    assert found[at:][:4] == ["output_text.done", "content_part.done", "output_item.done", "output_item.added"]


def test_what_begins_after_a_message_waits_for_its_phase() -> None:
    """No parser of this test's makes reasoning after text: the events are given."""

    def event(kind: str, **item: Any) -> str:
        fields = {"type": f"response.{kind}", **({"item": item} if item else {})}
        return f"event: {fields['type']}\ndata: {json.dumps(fields)}\n\n"

    sent = [
        event("output_item.added", type="message", phase="final_answer"),
        event("output_text.delta"),
        "",
        event("output_item.done", type="message", phase="final_answer"),
        event("output_item.added", type="reasoning"),
        event("output_item.done", type="reasoning"),
        event("output_item.added", type="message", phase="final_answer"),
        event("output_item.done", type="message", phase="final_answer"),
    ]

    def released(last: list[str]) -> list[tuple[int, str | None]]:
        """How many events had been sent when each was released, and the phase that each has."""
        count = itertools.count(1)
        so_far = 0

        async def source() -> AsyncIterator[str]:
            nonlocal so_far
            for one in sent + last:
                so_far = next(count)
                yield one

        async def collect() -> list[tuple[int, str | None]]:
            items = [(so_far, payload(one).get("item", {})) async for one in responses.as_generated(source())]
            return [(after, item.get("phase")) for after, item in items]

        return asyncio.run(collect())

    for last, phase in [
        ([event("output_item.added", type="custom_tool_call")], "commentary"),
        ([event("output_item.added", type="shell_call")], "commentary"),
        ([event("incomplete")], "final_answer"),
        ([], "final_answer"),
    ]:
        end = len(sent + last)
        held = [phase, None, None, None, phase, *([None] if last else [])]
        assert released(last) == [(1, None), (2, None), *((end, one) for one in held)]


@pytest.mark.parametrize("fields", [{"tools": []}, {"tool_choice": "none"}], ids=str)
def test_a_request_that_offers_no_tools_is_left_to_sglang(both: Any, fields: dict[str, Any]) -> None:
    stock, ours = both(ANSWERS["text"], **fields)
    assert ours == stock
    assert any(message(event) and event["item"]["phase"] == "final_answer" for event in ours)


def test_an_engine_without_the_flag_is_left_to_sglang() -> None:
    async def types(serving: Serving) -> list[dict[str, Any]]:
        events = stream(True, chunks(ANSWERS["text"], STOP), asked(), serving)
        return [payload(event) async for event in events]

    (added,) = (event for event in asyncio.run(types(Serving(None))) if event["type"] == "response.output_item.added")
    assert added["item"]["phase"] == "final_answer"


def test_a_client_that_leaves_ends_the_generation() -> None:
    ended: list[bool] = []

    async def generated() -> AsyncIterator[dict[str, Any]]:
        try:
            while True:
                yield {"text": "x ", "meta_info": {}}
                await asyncio.sleep(0)
        finally:
            ended.append(True)

    async def read() -> None:
        source = generated()
        async for event in stream(True, source, asked()):
            if "output_text.delta" in event:
                asyncio.current_task().cancel()  # type: ignore[union-attr]

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(read())
    assert ended == [True]


# --- what SGLang answers null for


QUOTED = '"type":"output_text","logprobs":null'


def answered(request: ResponsesRequest, serving: Serving) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The responses and the parts of text in an answer of SGLang's with the plug-in: a whole one, or a stream."""

    async def original(serving: Serving, request: ResponsesRequest, raw_request: Any) -> Any:
        if request.stream:
            return stream(False, chunks([QUOTED], STOP), request, serving)
        output = serving._make_response_output_items(request, QUOTED, None, require_reasoning=False)
        given: dict[str, Any] = {"model_name": "m", "created_time": 1, "status": "completed", "usage": None}
        return ResponsesResponse.from_request(request, {}, output=output, **given)

    async def run() -> list[dict[str, Any]]:
        answer = await plugin._as_response_requested(original, serving, request)
        if isinstance(answer, ResponsesResponse):
            return [{"response": answer.model_dump()}]
        return [payload(event) async for event in answer]

    documents = asyncio.run(run())
    told = [document["response"] for document in documents if "response" in document]
    items = [*(document.get("item", {}) for document in documents), *(item for one in told for item in one["output"])]
    parts = [document["part"] for document in documents if "part" in document]
    return told, [*parts, *(part for item in items for part in item.get("content", []))]


@pytest.mark.parametrize("streams", [True, False])
def test_a_text_without_logprobs_has_a_list_of_none(streams: bool) -> None:
    _, parts = answered(asked(stream=streams, tools=[]), Serving())
    assert {part["text"] for part in parts} - {""} == {QUOTED}
    assert [part["logprobs"] for part in parts] == [[]] * (4 if streams else 1)


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("fields", [{}, {"temperature": 0.0, "top_p": 0.5}], ids=["unsaid", "said"])
def test_an_answer_says_what_it_was_sampled_with(streams: bool, fields: dict[str, Any]) -> None:
    request, serving = asked(stream=streams, tools=[], **fields), Serving()
    sampled = request.to_sampling_params(default_params=serving.default_sampling_params)
    told, _ = answered(request, serving)
    assert told
    for response in told:
        assert (response["temperature"], response["top_p"]) == (sampled["temperature"], sampled["top_p"])
    again = request.to_sampling_params(default_params=serving.default_sampling_params)
    assert again == sampled


def test_nulls_of_an_engine_without_the_flag_are_left() -> None:
    told, parts = answered(asked(tools=[]), Serving(None))
    assert {part["logprobs"] for part in parts} == {None}
    assert {response["temperature"] for response in told} == {None}
