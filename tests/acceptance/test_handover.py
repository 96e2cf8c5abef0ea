"""On every route of a real engine, a request belongs to the turn that its headers name, whatever its body says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from models import with_words, words
from prompts import EXACT, PAGE, prompt
from stacks import MakeStack

from agentstate import ids
from agentstate.cli.local import LocalStack
from agentstate.fleet.handover import Handover

PAGES = 3
MANY = 4000
"""More tokens than anybody waits for."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, make_stack: MakeStack, checkpoints: Path) -> Iterator[LocalStack]:
    home = tmp_path_factory.mktemp("handover")
    with closing(make_stack(home / "stack", with_words(checkpoints / "llama", home / "llama"))) as stack:
        stack.create_database()
        served = ("--max-total-tokens", "8192", "--chunked-prefill-size", "1024", "--enable-cache-report")
        logged = ("--log-requests", "--log-requests-level", "3")
        stack.start_engine(*EXACT, *served, *logged, "--tool-call-parser", "hermes")
        yield stack


@dataclass(frozen=True)
class Route:
    """``text`` names the body's field for the prompt, ``limit`` that for the number of tokens, ``request_id`` that for
    the id, and ``cached`` where the answer's usage says what was cached."""

    path: str
    text: str
    limit: str
    request_id: str
    cached: tuple[str, ...]

    def body(self, text: str, tokens: int = 4) -> dict[str, Any]:
        said: Any = [{"role": "user", "content": text}] if self.text == "messages" else text
        return {"model": LocalStack.model, self.text: said, self.limit: tokens, "temperature": 0}

    def cached_tokens(self, answer: dict[str, Any]) -> int:
        found: Any = answer["usage"]
        for name in self.cached:
            found = (found or {}).get(name)
        return found or 0


OPENAI = ("prompt_tokens_details", "cached_tokens")
ROUTES = [
    Route("/v1/chat/completions", "messages", "max_tokens", "rid", OPENAI),
    Route("/v1/completions", "prompt", "max_tokens", "rid", OPENAI),
    Route("/v1/responses", "input", "max_output_tokens", "request_id", ("input_tokens_details", "cached_tokens")),
    Route("/v1/messages", "messages", "max_tokens", "rid", ("cache_read_input_tokens",)),
]
every_route = pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)


def named(route: Route) -> str:
    """An id as the route's answers have them."""
    return ids.new("resp" if route.path == "/v1/responses" else "req")


def post(engine: LocalStack, route: Route, body: dict[str, Any], handover: Handover | None) -> dict[str, Any]:
    headers = handover.headers() if handover else []
    answer = httpx.post(f"{engine.engine_url}{route.path}", json=body, headers=headers, timeout=300)
    return dict(answer.raise_for_status().json())


def stored(engine: LocalStack, session: str) -> dict[str, Any]:
    return engine.control().call("flush", 60, session=session, timeout_ms=60_000)


@every_route
def test_a_request_is_of_the_turn_that_its_headers_name(engine: LocalStack, route: Route) -> None:
    turn, other = engine.begin_turn(), engine.begin_turn()
    text = words(prompt(9600 + ROUTES.index(route), PAGES * PAGE + 20))
    body = route.body(text)
    theirs = {"session_id": other.engine_session, "cache_salt": "theirs", "extra_key": "theirs"}
    mine = Handover(turn.engine_session, f"salt of {turn.session.id}", "\u00e9", named(route))
    answer = post(engine, route, body | theirs | {route.request_id: "resp_theirs"}, mine)
    assert route.cached_tokens(answer) == 0
    if route.path != "/v1/messages":  # whose answers have ids of their own
        assert answer["id"] == mine.request_id
    kept = stored(engine, turn.session.uid)
    assert (kept["state"], kept["tokens"]) == ("durable", PAGES * PAGE)
    assert stored(engine, other.session.uid)["state"] == "unknown"
    # The salt and the key that were handed over find it, and no others do.
    for handover, found in [
        (Handover(salt=mine.salt, extra_key=mine.extra_key), PAGES * PAGE),
        (Handover(salt="salt of another tenant", extra_key=mine.extra_key), 0),
        (Handover(salt=mine.salt), 0),
    ]:
        assert route.cached_tokens(post(engine, route, body | theirs, handover)) == found
    if route.path != "/v1/messages":  # which drops these fields
        alone = {name: theirs[name] for name in ("cache_salt", "extra_key")}
        assert [route.cached_tokens(post(engine, route, body | alone, None)) for _ in range(2)] == [0, PAGES * PAGE]
    assert route.cached_tokens(post(engine, route, body | theirs, Handover(request_id=named(route)))) == 0


@contextmanager
def streamed(
    engine: LocalStack, route: Route, body: dict[str, Any], handover: Handover
) -> Iterator[Iterator[dict[str, Any]]]:
    """The events of an answer, as they arrive."""

    def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])

    request = {"json": body | {"stream": True}, "headers": handover.headers(), "timeout": 600}
    with httpx.stream("POST", f"{engine.engine_url}{route.path}", **request) as response:
        response.raise_for_status()
        yield events(response)


def abort(engine: LocalStack, request_id: str | None) -> None:
    httpx.post(f"{engine.engine_url}/abort_request", json={"rid": request_id}, timeout=60).raise_for_status()


@every_route
def test_a_request_is_aborted_by_the_id_that_was_handed_over(engine: LocalStack, route: Route) -> None:
    handover = Handover(salt="salt", request_id=named(route))
    body = route.body(words(prompt(9610, PAGE)), MANY) | {route.request_id: "resp_theirs"}
    with streamed(engine, route, body, handover) as events:
        seen = [next(events)]
        while not says(seen[-1]):
            seen.append(next(events))
        abort(engine, handover.request_id)
        rest = list(events)
    assert len(seen) + len(rest) < MANY
    if route.path == "/v1/responses":
        assert seen[0]["response"]["id"] == handover.request_id
        assert rest[-1]["type"] == "response.failed"
    elif route.path != "/v1/messages":
        assert {event["id"] for event in seen + rest} == {handover.request_id}


def says(event: dict[str, Any]) -> str:
    """The text that an event adds."""
    if (choices := event.get("choices")) is not None:
        return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)
    delta = event.get("delta")
    return delta if isinstance(delta, str) else (delta or {}).get("text") or ""


def test_text_arrives_as_it_is_generated_when_tools_are_on_offer(engine: LocalStack) -> None:
    route = next(route for route in ROUTES if route.path == "/v1/responses")
    handover = Handover(request_id=named(route))
    tool = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}}
    body = route.body(words(prompt(9620, PAGE)), MANY) | {"tools": [tool]}
    with streamed(engine, route, body, handover) as events:
        seen = [next(events)]
        while seen[-1]["type"] != "response.output_text.delta":
            seen.append(next(events))
        # It runs: what has ended cannot be aborted.
        abort(engine, handover.request_id)
        seen += events
    assert seen[-1]["type"] == "response.failed"
    assert [event["sequence_number"] for event in seen] == list(range(len(seen)))
    (done,) = (event for event in seen if event["type"] == "response.output_item.done")
    assert done["item"]["phase"] == "final_answer"
    assert done["item"] == seen[-1]["response"]["output"][0]


@every_route
@pytest.mark.parametrize("stream", [False, True])
def test_headers_that_nobody_encoded_are_refused(engine: LocalStack, route: Route, stream: bool) -> None:
    answer = httpx.post(
        f"{engine.engine_url}{route.path}",
        json=route.body(words([100])) | {"stream": stream},
        headers={"X-AgentState-Salt": "a b"},
        timeout=300,
    )
    assert answer.status_code == 400
    assert "the header x-agentstate-salt is not percent-encoded UTF-8" in answer.text


def test_no_token_is_logged(engine: LocalStack) -> None:
    turn = engine.begin_turn()
    for route in ROUTES:
        post(engine, route, route.body(words([100])), Handover(turn.engine_session))
    log = (engine.home / "engine.log").read_text()
    uid, token = turn.engine_session.rsplit(".", 1)
    assert uid in log
    assert token not in log
