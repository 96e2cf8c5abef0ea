"""The gateway between clients and a scripted engine: sessions, streams, errors."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from engines import DONE, Asked, ScriptedEngine, chunk, completion, scripted
from gateways import HELLO, Gateway
from stage import MODEL, PATIENCE_S, register

from agentstate.sessions.verbs import Sessions
from agentstate.sql.models import EntryKind


def says(*answers: str) -> Callable[[Asked], None]:
    """Whole answers, one after the other."""
    left = iter(answers)
    return lambda asked: asked.whole(completion(next(left)))


def test_a_request_is_a_turn_of_a_session_that_its_client_never_heard_of(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(says("hi"))
    answer = gateway.chat({"role": "user", "content": "hello"})
    assert (answer.status_code, answer.json()) == (200, completion("hi"))
    (asked,) = gateway.engine.asked
    assert asked.path == "/v1/chat/completions"
    assert asked.document == HELLO
    gateway.ended()
    session = gateway.service.client.read(answer.headers["x-agentstate-session"])
    assert session.status == "suspended"
    assert gateway.turn(asked) == session.id
    assert len(asked.headers["x-agentstate-request"]) == len("chatcmpl-") + 32
    (flush,) = gateway.peer.requests
    assert (flush["verb"], flush["session"]) == ("flush", session.id)


def test_messages_that_go_on_are_the_same_session_and_a_way_left_is_a_branch(
    make_gateway: Callable[..., Gateway],
) -> None:
    gateway = make_gateway(says("hi", "fine", "well", "else"))
    first = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    one = gateway.chat(*first).headers["x-agentstate-session"]
    gateway.ended()
    # A client echoes an answer with keys of its own.
    second = [
        *first,
        {"role": "assistant", "content": "hi", "refusal": None},
        {"role": "user", "content": "how are you"},
    ]
    two = gateway.chat(*second).headers["x-agentstate-session"]
    gateway.ended()
    third = [*second, {"role": "assistant", "content": "fine"}, {"role": "user", "content": "bye"}]
    assert two == one
    assert gateway.chat(*third).headers["x-agentstate-session"] == one
    gateway.ended()
    # Back to the second request: its session has gone on since.
    undone = gateway.chat(*second[:-1], {"role": "user", "content": "what else"}).headers["x-agentstate-session"]
    assert undone != one
    gateway.ended()
    assert len({one, undone}) == len(gateway.sessions())
    assert len({gateway.turn(asked) for asked in gateway.engine.asked}) == 2


def test_a_request_that_follows_at_once_is_the_same_session(
    make_gateway: Callable[..., Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = make_gateway(lambda asked: asked.whole(completion("hi")))
    may_end = threading.Semaphore(0)
    end = Sessions.end

    def late(*args: Any, **options: Any) -> Any:
        may_end.acquire()
        return end(*args, **options)

    monkeypatch.setattr(Sessions, "end", late)
    said = [{"role": "user", "content": "hello"}]
    going_on = [*said, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "on"}]
    one = gateway.chat(*said).headers["x-agentstate-session"]
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(gateway.chat(*going_on)))
    thread.start()
    limits = gateway.service.app.state.service.limits
    while not limits.running("default"):
        threading.Event().wait(0.005)
    may_end.release(2)
    thread.join()
    assert answers[0].headers["x-agentstate-session"] == one
    gateway.ended()


def test_a_first_message_alone_says_nothing(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(says("hi", "hi"))
    sessions = set()
    for _ in range(2):
        sessions.add(gateway.chat({"role": "user", "content": "hello"}).headers["x-agentstate-session"])
        gateway.ended()
    assert len(sessions) == 2


def test_a_client_names_its_session(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(says("hi", "ho"))
    by_header = gateway.chat({"role": "user", "content": "hello"}, X_AgentState_Session="mine")
    gateway.ended()
    by_body = gateway.post("/v1/chat/completions", {**HELLO, "session_id": "mine"})
    gateway.ended()
    assert [answer.headers["x-agentstate-session"] for answer in (by_header, by_body)] == ["mine", "mine"]
    assert len(gateway.sessions()) == 1
    assert "session_id" not in gateway.engine.asked[1].document


def test_a_named_session_that_is_run_is_busy_and_a_guessed_one_costs_nothing(
    make_gateway: Callable[..., Gateway],
) -> None:
    going, go_on = threading.Event(), threading.Event()

    def script(asked: Asked) -> None:
        if asked.document["messages"][-1]["content"] == "wait":
            going.set()
            go_on.wait()
        asked.whole(completion("hi"))

    gateway = make_gateway(script)
    first = [{"role": "user", "content": "hello"}]
    harness = {"X_Session_Id": "s1"}
    one = gateway.chat(*first, **harness).headers["x-agentstate-session"]
    gateway.ended()
    second = [*first, {"role": "assistant", "content": "hi"}]
    with httpx.Client(base_url=gateway.service.base_url, timeout=PATIENCE_S) as other:
        body = {"model": MODEL, "messages": [*second, {"role": "user", "content": "wait"}]}
        running = threading.Thread(
            target=lambda: other.post("/v1/chat/completions", json=body, headers={"X-Session-Id": "s1"})
        )
        running.start()
        going.wait()
        assert one == "opencode:s1"
        named = gateway.chat(*first, X_AgentState_Session=one)
        title = gateway.chat({"role": "system", "content": "a title"}, *first, **harness)
        branch = gateway.chat(*second, {"role": "user", "content": "go"}, **harness)
        go_on.set()
        running.join()
    assert named.status_code == 409
    assert named.json()["error"]["code"] == "session_busy"
    assert int(named.headers["retry-after"]) >= 1
    assert title.status_code == branch.status_code == 200
    assert "x-agentstate-session" not in title.headers
    assert branch.headers["x-agentstate-session"] not in (one, None)
    gateway.ended()


def test_a_session_that_is_run_can_be_waited_for(make_gateway: Callable[..., Gateway]) -> None:
    going, go_on = threading.Event(), threading.Event()

    def script(asked: Asked) -> None:
        if len(gateway.engine.asked) == 1:
            going.set()
            go_on.wait()
        asked.whole(completion("hi"))

    gateway = make_gateway(script, gateway_wait_s=PATIENCE_S)
    with httpx.Client(base_url=gateway.service.base_url, timeout=PATIENCE_S) as other:
        answers: list[httpx.Response] = []
        ask = lambda client: answers.append(  # noqa: E731
            client.post("/v1/chat/completions", json=HELLO, headers={"X-AgentState-Session": "mine"})
        )
        threads = [threading.Thread(target=ask, args=(client,)) for client in (other, gateway.service.http)]
        threads[0].start()
        going.wait()
        threads[1].start()
        go_on.set()
        for thread in threads:
            thread.join()
    assert [answer.status_code for answer in answers] == [200, 200]


def test_what_reaches_into_the_engine_is_taken_out(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(says("hi"))
    reserved = {
        "cache_salt": "theirs",
        "extra_key": "x",
        "rid": "r",
        "session_params": {"id": 1},
        "kv_hints": {},
        "bootstrap_host": "h",
        "routed_dp_rank": 3,
    }
    own = {"temperature": 0, "chat_template_kwargs": {"a": 1}, "unheard_of": [1]}
    headers = {
        "X_Override_Rid": "r",
        "X_Smg_Routing_Key": "k",
        "X_Data_Parallel_Rank": "1",
        "X_AgentState_Salt": "theirs",
        "X_AgentState_Turn": "ses.token",
        "Traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "Authorization": "Bearer k",
    }
    assert gateway.post("/v1/chat/completions", {**HELLO, **reserved, **own}, **headers).status_code == 200
    (asked,) = gateway.engine.asked
    assert asked.document == {**HELLO, **own}
    assert not {"x-override-rid", "x-smg-routing-key", "x-data-parallel-rank", "authorization"} & set(asked.headers)
    assert "x-agentstate-salt" not in asked.headers  # without API keys there is none
    assert gateway.turn(asked) is not None
    assert asked.headers["traceparent"] == headers["Traceparent"]


@pytest.mark.parametrize("strip", [True, False])
def test_a_billing_line_is_neither_sent_nor_counted(make_gateway: Callable[..., Gateway], strip: bool) -> None:
    gateway = make_gateway(lambda asked: asked.whole({"input_tokens": 1}), gateway_strip=strip)
    line = {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.177.01c; cch=36ee5;"}
    system = [{"type": "text", "text": "be brief"}]
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        gateway.post(path, {**HELLO, "system": [line, *system]})
        assert gateway.engine.asked[-1].document["system"] == (system if strip else [line, *system])


def test_a_key_reserved_twice_is_taken_out_both_times(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(says("hi"))
    raw = b'{"rid":"a","model":"m","messages":[{"role":"user","content":"hello"}],"rid":"b"}'
    answer = gateway.service.http.post(
        "/v1/chat/completions", content=raw, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 200
    assert b"rid" not in gateway.engine.asked[0].body


def test_a_body_that_needs_no_change_goes_on_byte_by_byte(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(says("hi"))
    raw = b'{ "model": "m",\n "messages": [{"role": "user", "content": "h\\u00e9llo \xe5\x8c\x97"}], "seed": 1.0 }'
    gateway.service.http.post("/v1/chat/completions", content=raw, headers={"content-type": "application/json"})
    assert gateway.engine.asked[0].body == raw


def stream(gateway: Gateway, **fields: Any) -> list[bytes]:
    body = {**HELLO, "stream": True, **fields}
    with gateway.service.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.headers["x-accel-buffering"] == "no"
        return list(answer.iter_raw())


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_a_stream_comes_as_the_engine_sends_it(make_gateway: Callable[..., Gateway], newline: bytes) -> None:
    events = [event.replace(b"\n", newline) for event in (chunk("北"), chunk("京"), chunk(finish="stop"), DONE)]
    goes_on = threading.Semaphore(0)

    def script(asked: Asked) -> None:
        if "stream" not in asked.document:
            asked.whole(completion("well"))
            return
        asked.start()
        half = events[0].index("北".encode()) + 1
        asked.send(events[0][:half])
        asked.send(events[0][half:])
        for event in events[1:]:
            goes_on.acquire()  # nothing more comes before the client has this
            asked.send(event)
        asked.end()

    gateway = make_gateway(script)
    with gateway.service.http.stream("POST", "/v1/chat/completions", json={**HELLO, "stream": True}) as answer:
        received = []
        for piece in answer.iter_raw():
            received.append(piece)
            goes_on.release()
    assert received == events
    gateway.ended()
    # And it was understood all the same.
    again = gateway.chat(*HELLO["messages"], {"role": "assistant", "content": "北京"}, {"role": "user", "content": "?"})
    assert again.headers["x-agentstate-session"] == answer.headers["x-agentstate-session"]


@pytest.mark.parametrize("how", ["cut", "end without a word", "cut in an event"])
def test_a_stream_that_breaks_never_ends_as_if_it_were_whole(make_gateway: Callable[..., Gateway], how: str) -> None:
    def script(asked: Asked) -> None:
        asked.start()
        asked.send(chunk("one"))
        if how == "end without a word":
            asked.end()
            return
        if how == "cut in an event":
            asked.send(b'data: {"id": "chatc')
        asked.cut()

    gateway = make_gateway(script)
    received = b"".join(stream(gateway))
    events = [event for event in received.split(b"\n\n") if event.startswith(b"data: ")]
    assert events[-1] == b"data: [DONE]"
    error = json.loads(events[-2][6:])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "server_error"
    gateway.ended()
    with (
        openai.OpenAI(base_url=f"{gateway.service.base_url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.APIError, match="engine"),
    ):
        list(client.chat.completions.create(model=MODEL, messages=HELLO["messages"], stream=True))  # type: ignore[call-overload]
    # The session stands where it stood: the same request again is its turn, and nobody holds it.
    gateway.ended()
    assert {session.status for session in gateway.sessions()} == {"suspended"}


def test_a_client_that_leaves_ends_its_turn_and_the_engines_work(make_gateway: Callable[..., Gateway]) -> None:
    def script(asked: Asked) -> None:
        asked.start()
        asked.send(chunk("one"))

    gateway = make_gateway(script)
    with gateway.service.http.stream("POST", "/v1/chat/completions", json={**HELLO, "stream": True}) as answer:
        next(answer.iter_raw())
    assert gateway.engine.asked[0].left.wait(PATIENCE_S)
    gateway.ended()
    session = gateway.service.client.read(answer.headers["x-agentstate-session"])
    assert session.status == "suspended"


def test_a_client_that_leaves_while_the_lease_is_taken_does_not_keep_it(
    make_gateway: Callable[..., Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = make_gateway(says("hi"))
    taking, left = threading.Event(), threading.Event()
    begin = Sessions.begin

    def slow(*args: Any, **options: Any) -> Any:
        taking.set()
        left.wait()
        return begin(*args, **options)

    monkeypatch.setattr(Sessions, "begin", slow)
    limits = gateway.service.app.state.service.limits
    gateway.leave(taking, **{"X-AgentState-Session": "mine"})
    while limits.running("default"):
        threading.Event().wait(0.005)
    left.set()
    monkeypatch.setattr(Sessions, "begin", begin)
    while not gateway.sessions() or gateway.sessions()[0].status != "suspended":
        threading.Event().wait(0.005)
    assert gateway.engine.asked == []


def test_a_client_that_leaves_a_whole_answer_has_it_aborted(make_gateway: Callable[..., Gateway]) -> None:
    asked_for, aborted = threading.Event(), threading.Event()

    def script(asked: Asked) -> None:
        asked_for.set()
        if asked.path == "/abort_request":
            aborted.set()
            asked.whole({})

    gateway = make_gateway(script)
    gateway.leave(asked_for)
    assert aborted.wait(PATIENCE_S)
    asked, abort = gateway.engine.asked
    assert abort.document == {"rid": asked.headers["x-agentstate-request"]}
    assert asked.left.wait(PATIENCE_S)


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (
            400,
            {"object": "error", "message": "too long", "type": "BadRequestError", "param": None, "code": 400},
            "too long",
        ),
        (429, {"error": {"message": "slow down", "type": "x", "code": "y", "param": "z"}}, "slow down"),
        (400, {"error": {"message": "no images", "type": "BadRequest", "code": 400, "param": None}}, "no images"),
        (500, b"Internal Server Error", "Internal Server Error"),
        (422, {"detail": [{"loc": ["body"], "msg": "m"}]}, "msg"),
        (503, {"error": "text"}, "text"),
    ],
)
def test_errors_of_the_engine_keep_their_status_and_get_their_form(
    make_gateway: Callable[..., Gateway], status: int, body: Any, message: str
) -> None:
    gateway = make_gateway(lambda asked: asked.whole(body, status, retry_after="7"))
    answer = gateway.chat({"role": "user", "content": "hello"})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["code"], str)
    assert answer.headers["retry-after"] == "7"
    assert answer.headers["x-should-retry"] == ("true" if status == 429 or status >= 500 else "false")
    anthropic = gateway.post("/v1/messages", {**HELLO, "max_tokens": 9})
    assert anthropic.status_code == status
    assert (anthropic.json()["type"], set(anthropic.json()["error"])) == ("error", {"type", "message"})
    assert message in anthropic.json()["error"]["message"]
    gateway.ended()
    assert {session.status for session in gateway.sessions()} == {"suspended"}


def test_an_engine_that_does_not_answer(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(lambda asked: asked.cut())
    answer = gateway.chat({"role": "user", "content": "hello"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "engine_unreachable")
    assert answer.headers["x-should-retry"] == "true"
    gateway.engine.close()
    answer = gateway.chat({"role": "user", "content": "hello"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "engine_unreachable")


def test_an_engine_that_says_nothing_for_too_long(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(lambda asked: None, gateway_silence_s=0.2)
    answer = gateway.chat({"role": "user", "content": "hello"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "engine_timeout")


def test_models_are_those_of_live_engines_and_an_unknown_one_says_which(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(says("hi"))
    register(gateway.service.database, gateway.peer.address, base_url="http://127.0.0.1:1/v1", model="org/name", rank=1)
    gateway.service.app.state.gateway.fleet.forget()
    with openai.OpenAI(base_url=f"{gateway.service.base_url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [MODEL, "org/name"]
        assert client.models.retrieve("org/name").id == "org/name"
        with pytest.raises(openai.NotFoundError, match="only 'm', 'org/name'"):
            client.chat.completions.create(model="gone", messages=HELLO["messages"])  # type: ignore[call-overload]
    assert gateway.service.http.get("/v1/models/org%2Fname").json()["id"] == "org/name"
    assert gateway.post("/v1/chat/completions", {"messages": []}).status_code == 400
    assert gateway.engine.asked == []


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"[]", 400, "invalid_json"),
        (b'{"model": 3, "messages": []}', 400, "invalid_model"),
        (b'{"model": "m", "messages": 3}', 400, "invalid_request"),
        (b'{"model": "m", "messages": [], "session_id": "\\u0000"}', 400, "invalid_id"),
        (b'{"model": "m", "messages": [], "session_id": 5}', 400, "invalid_request"),
        (b'{"model": "m", "pad": "' + b"x" * 2000 + b'"}', 413, "body_too_large"),
    ],
)
def test_bad_bodies(make_gateway: Callable[..., Gateway], body: bytes, status: int, code: str) -> None:
    gateway = make_gateway(says(), gateway_body_bytes=1000)
    answer = gateway.service.http.post(
        "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert gateway.engine.asked == []


def test_methods_and_paths_that_are_none(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(says("hi"))
    wrong = gateway.service.http.get("/v1/chat/completions")
    assert (wrong.status_code, wrong.headers["allow"], wrong.json()["error"]["code"]) == (
        405,
        "POST",
        "method_not_allowed",
    )
    assert gateway.service.http.get("/v1/chat/none").json()["error"]["code"] == "not_found"
    assert gateway.post("/v1/chat/completions/", HELLO).status_code == 200


def test_a_session_of_another_model(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(says("hi"))
    gateway.service.client.create_session("other", id="mine")
    answer = gateway.chat({"role": "user", "content": "hello"}, X_AgentState_Session="mine")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "model_mismatch")
    assert gateway.engine.asked == []


def test_what_an_adapter_says_is_a_session_of_its_own(make_gateway: Callable[..., Gateway]) -> None:
    """One conversation goes on with one adapter; an engine that has not loaded it says so itself."""

    def answer(asked: Asked) -> Any:
        if asked.document["model"] == f"{MODEL}:gone":
            return asked.whole({"message": "never been loaded: gone"}, status=400)
        return asked.whole(completion("hi"))

    gateway = make_gateway(answer)
    said = [{"role": "user", "content": "hello"}]
    sessions = {}
    for model in (MODEL, f"{MODEL}:one", f"{MODEL}:two"):
        first = gateway.post("/v1/chat/completions", {"model": model, "messages": said})
        gateway.ended()
        more = [*said, first.json()["choices"][0]["message"], {"role": "user", "content": "and then?"}]
        then = gateway.post("/v1/chat/completions", {"model": model, "messages": more})
        gateway.ended()
        assert then.headers["x-agentstate-session"] == first.headers["x-agentstate-session"]
        sessions[model] = first.headers["x-agentstate-session"]
    assert len(set(sessions.values())) == 3
    assert {session.id: session.model for session in gateway.sessions()} == {
        session: model for model, session in sessions.items()
    }
    assert [asked.document["model"] for asked in gateway.engine.asked] == [
        model for model in sessions for _ in range(2)
    ]
    refused = gateway.post("/v1/chat/completions", {"model": f"{MODEL}:gone", "messages": said})
    assert (refused.status_code, "never been loaded: gone" in refused.text) == (400, True)


CALL = {"id": "call_1", "type": "function", "function": {"name": "run", "arguments": '{"command": "ls -l /tmp"}'}}


@pytest.mark.parametrize("store", [False, True])
def test_tool_calls_are_claimed_at_an_answers_end_and_finished_by_the_next_request(
    make_gateway: Callable[..., Gateway], store: bool
) -> None:
    answers = iter([completion(None, tool_calls=[CALL]), completion("done")])
    gateway = make_gateway(lambda asked: asked.whole(next(answers)), gateway_store=store)
    first = [{"role": "user", "content": "list"}]
    session = gateway.chat(*first).headers["x-agentstate-session"]
    gateway.ended()
    assert gateway.tool_calls(session) == [("run", "claimed")]
    result = {"role": "tool", "tool_call_id": "call_1", "content": "secret"}
    again = gateway.chat(*first, {"role": "assistant", "content": None, "tool_calls": [CALL]}, result)
    assert again.headers["x-agentstate-session"] == session
    gateway.ended()
    assert gateway.tool_calls(session) == [("run", "done")]
    entries = [(entry.kind, entry.payload) for entry in gateway.service.client.entries(session).data]
    if store:
        assert entries == [
            (EntryKind.MESSAGE, first[0]),
            (EntryKind.MESSAGE, completion(None, tool_calls=[CALL])["choices"][0]["message"]),
            (EntryKind.TOOL_CALL, {"name": "run", "arguments": CALL["function"]["arguments"]}),
            (EntryKind.TOOL_RESULT, {"output": result}),
            (EntryKind.MESSAGE, completion("done")["choices"][0]["message"]),
        ]
    else:
        assert entries == [
            (EntryKind.TOOL_CALL, {"name": "run", "arguments": {"command": "ls -l /tmp"}}),
            (EntryKind.TOOL_RESULT, {"output": None}),
        ]


def test_the_example_of_an_agent_runs_its_tools(make_gateway: Callable[..., Gateway], tmp_path: Path) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "read", "arguments": '{"name": "pages.md"}'}}
    answers = [completion(None, tool_calls=[call]), completion("in files")]
    for answer in answers:
        answer["usage"]["prompt_tokens_details"] = {"cached_tokens": 4}
    gateway = make_gateway(lambda asked: asked.whole(answers.pop(0)))
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, root / "examples" / "openai_agent.py", tmp_path / "agent.json", "Where are pages?"],
        env={**os.environ, "OPENAI_BASE_URL": f"{gateway.service.base_url}/v1", "OPENAI_API_KEY": "none"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    told = "of 9 tokens 4 were not computed again"
    assert ran.stdout.splitlines() == [told, told, "in files"]
    result = gateway.engine.asked[1].document["messages"][-1]
    assert result == {"role": "tool", "tool_call_id": "call_1", "content": (root / "docs/pages.md").read_text()[:4000]}
    gateway.ended()
    (session,) = gateway.sessions()
    assert gateway.tool_calls(session.id) == [("read", "done")]


def test_the_end_of_a_stream_waits_until_its_transcript_is_kept(make_gateway: Callable[..., Gateway]) -> None:
    def script(asked: Asked) -> None:
        asked.start()
        asked.send(chunk("hi"), chunk(finish="stop") + DONE)
        asked.end()

    gateway = make_gateway(script, gateway_store=True)
    with gateway.service.http.stream("POST", "/v1/chat/completions", json={**HELLO, "stream": True}) as answer:
        received = b""
        for piece in answer.iter_raw():
            received += piece
            if DONE in received:
                session = gateway.service.client.read(answer.headers["x-agentstate-session"])
                assert session.status == "suspended"
                entries = gateway.service.client.entries(session.id).data
                assert [entry.payload["content"] for entry in entries] == ["hello", "hi"]
    assert received == chunk("hi") + chunk(finish="stop") + DONE


def test_other_routes_pass_through_without_a_session(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(lambda asked: asked.whole({"object": "list"}))
    assert gateway.post("/v1/embeddings", {"model": MODEL, "input": "a", "rid": "r"}).json() == {"object": "list"}
    (asked,) = gateway.engine.asked
    assert asked.document == {"model": MODEL, "input": "a"}
    assert "x-agentstate-turn" not in asked.headers
    assert gateway.sessions() == []


@pytest.fixture
def another_engine() -> Iterator[Callable[..., ScriptedEngine]]:
    """Starts a second engine that serves the same model."""
    with ExitStack() as ending:

        def start(gateway: Gateway, script: Callable[[Asked], None]) -> ScriptedEngine:
            engine = ending.enter_context(scripted(script))
            register(gateway.service.database, gateway.peer.address, base_url=engine.base_url, node="n2")
            gateway.service.app.state.gateway.fleet.forget()
            return engine

        yield start


def test_a_session_without_pages_goes_to_the_engine_with_the_fewest_requests(
    make_gateway: Callable[..., Gateway], another_engine: Callable[..., ScriptedEngine]
) -> None:
    arrived, go_on = threading.Semaphore(0), threading.Event()

    def script(asked: Asked) -> None:
        arrived.release()
        go_on.wait()
        asked.whole(completion("hi"))

    gateway = make_gateway(script)
    other = another_engine(gateway, script)
    with ExitStack() as ending:
        threads = []
        for _ in range(4):
            client = ending.enter_context(httpx.Client(base_url=gateway.service.base_url, timeout=PATIENCE_S))
            ask = lambda client=client: client.post("/v1/chat/completions", json=HELLO)  # noqa: E731
            threads.append(threading.Thread(target=ask))
            threads[-1].start()
            arrived.acquire()
        go_on.set()
        for thread in threads:
            thread.join()
    assert (len(gateway.engine.asked), len(other.asked)) == (2, 2)


def test_prompts_with_one_cache_key_go_to_one_engine(
    make_gateway: Callable[..., Gateway], another_engine: Callable[..., ScriptedEngine]
) -> None:
    gateway = make_gateway(lambda asked: asked.whole(completion("hi")))
    other = another_engine(gateway, lambda asked: asked.whole(completion("hi")))
    # Which of two engines a key goes to depends on their ports: sooner or later both have one.
    for key in range(64):
        if key > 2 and gateway.engine.asked and other.asked:
            break
        before = len(gateway.engine.asked), len(other.asked)
        for _ in range(3):
            gateway.post("/v1/chat/completions", {**HELLO, "prompt_cache_key": f"k{key}"})
        after = len(gateway.engine.asked), len(other.asked)
        assert sorted(now - then for now, then in zip(after, before, strict=True)) == [0, 3]
    assert gateway.engine.asked and other.asked


def test_an_engine_that_cannot_be_connected_to_has_seen_nothing_and_another_is_asked(
    make_gateway: Callable[..., Gateway], another_engine: Callable[..., ScriptedEngine]
) -> None:
    gateway = make_gateway(lambda asked: asked.whole(completion("hi")))
    other = another_engine(gateway, lambda asked: asked.whole(completion("ho")))
    gateway.engine.close()
    assert {gateway.post("/v1/chat/completions", HELLO).json()["choices"][0]["message"]["content"]} == {"ho"}
    # One that broke off may have begun.
    other.script = lambda asked: asked.cut()
    assert gateway.post("/v1/chat/completions", HELLO).status_code == 502
    assert len(other.asked) == 2


def test_a_transcript_is_kept_where_a_request_says_so(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(says("hi"))
    answer = gateway.post("/v1/chat/completions", {**HELLO, "store": True})
    entries = gateway.service.client.entries(answer.headers["x-agentstate-session"]).data
    assert [entry.payload["content"] for entry in entries] == ["hello", "hi"]


@pytest.mark.parametrize("name", ["ä ö/%41", "a b", "100%"])
def test_a_session_is_named_in_headers_as_it_was_answered(make_gateway: Callable[..., Gateway], name: str) -> None:
    gateway = make_gateway(says("hi", "ho"))
    told = gateway.post("/v1/chat/completions", {**HELLO, "session_id": name}).headers["x-agentstate-session"]
    gateway.ended()
    assert gateway.chat(*HELLO["messages"], X_AgentState_Session=told).headers["x-agentstate-session"] == told
    gateway.ended()
    assert [session.id for session in gateway.sessions()] == [name]


def test_of_an_ended_turn_nothing_is_left_but_that_its_session_waits(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(lambda asked: asked.whole(completion("hi")))
    state = gateway.service.app.state.service

    def objects(conversations: Iterable[int]) -> Counter[str]:
        """How many there are of the service's own types once so many more conversations have had two turns."""
        for number in conversations:
            said: list[dict[str, Any]] = [{"role": "system", "content": f"number {number}"}]
            for turn in ("one", "two"):
                said.append({"role": "user", "content": turn})
                gateway.chat(*said)
                gateway.ended()
                said.append({"role": "assistant", "content": "hi"})
        state.waits.settle()
        while state.operations.telling():
            threading.Event().wait(0.005)
        gc.collect()
        types = [type(one) for one in gc.get_objects()]
        own = [one.__name__ for one in types if str(one.__module__).partition(".")[0] == "agentstate"]
        return Counter(own)

    objects(range(10))
    more = objects(range(10, 20))
    grown = objects(range(20, 30))
    grown.subtract(more)
    assert {name: number for name, number in grown.items() if number >= 5} == {"_Session": 10, "_Waiting": 10}
