"""The gateway among clients that race, send what no client sends, and engines that answer what no engine answers."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from engines import Asked, chunk, completion, responds, said, scripted
from gateways import HELLO, Gateway
from stage import MODEL, PATIENCE_S, register

from agentstate.api import heads
from agentstate.api.gateway import documents, relay, upstream
from agentstate.api.gateway.fleet import Fleet
from agentstate.fleet import manifests
from agentstate.fleet.manifests import Manifest
from agentstate.sessions.rows import Rows
from agentstate.sessions.verbs import Sessions


def says_hi(asked: Asked) -> None:
    asked.whole(completion("hi"))


@pytest.mark.parametrize(("header", "late_status"), [("X-Session-Id", 200), ("X-AgentState-Session", 409)])
def test_two_first_requests_of_a_session_at_once(
    make_gateway: Callable[..., Gateway], monkeypatch: pytest.MonkeyPatch, header: str, late_status: int
) -> None:
    """Both see that there is no such session, and one of them makes it."""
    both = threading.Barrier(2)
    left = threading.Semaphore(2)  # the first two that make a session
    make = Rows.make

    def at_once(self: Rows, connection: Any, **values: Any) -> Any:
        # SQLite lets one write after the other: there is nobody to wait for.
        if connection.dialect.name == "postgresql" and left.acquire(blocking=False):
            both.wait()
        return make(self, connection, **values)

    monkeypatch.setattr(Rows, "make", at_once)
    answered = threading.Event()

    def script(asked: Asked) -> None:
        answered.wait()
        says_hi(asked)

    gateway = make_gateway(script)
    answers: list[httpx.Response] = []

    def ask() -> None:
        with httpx.Client(base_url=gateway.service.base_url, timeout=PATIENCE_S) as client:
            answers.append(client.post("/v1/chat/completions", json=HELLO, headers={header: "s1"}))
            answered.set()

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    if late_status == 200:
        while len(gateway.engine.asked) < 2 and not answers:
            threading.Event().wait(0.005)
        answered.set()
    for thread in threads:
        thread.join()
    gateway.ended()
    assert sorted(answer.status_code for answer in answers) == [200, late_status]
    if late_status == 409:
        (busy,) = [answer for answer in answers if answer.status_code == 409]
        assert busy.json()["error"]["code"] == "session_busy"
    assert len(gateway.sessions()) == 1


def test_an_engine_of_an_earlier_release_gets_nothing_though_it_has_the_pages(
    make_gateway: Callable[..., Gateway],
) -> None:
    """It would take no salt from the gateway's headers."""
    gateway = make_gateway(says_hi)
    gateway.chat({"role": "user", "content": "hello"}, X_AgentState_Session="mine")
    gateway.ended()
    uid = gateway.turn(gateway.engine.asked[0])
    assert uid is not None
    with scripted(says_hi) as earlier:
        old = {"control_secret": None, "base_url": earlier.base_url, "fingerprint": "f0"}
        register(gateway.service.database, gateway.peer.address, **old)
        with gateway.service.database.write() as connection:
            manifests.save(connection, Manifest(uid, "f0", 0, "n1", "eng_1", 64, 128, b"k" * 64, 1000))
        answer = gateway.chat({"role": "user", "content": "hello"}, X_AgentState_Session="mine")
        assert earlier.asked == []
    assert answer.status_code == 200
    gateway.ended()
    assert gateway.turn(gateway.engine.asked[-1]) == uid


def call(call_id: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "look", "arguments": "{}"}}


@pytest.mark.parametrize("calls", [["c", "c"], ["~c"], ["", "c"]])
def test_calls_that_fit_no_transcript_do_not_hold_the_session(
    make_gateway: Callable[..., Gateway], calls: list[str]
) -> None:
    gateway = make_gateway(lambda asked: asked.whole(completion(None, tool_calls=[call(each) for each in calls])))
    first = {"role": "user", "content": "hello"}
    one = gateway.chat(first).headers["x-agentstate-session"]
    gateway.ended()
    assert gateway.service.client.read(one).status == "suspended"
    answer = {"role": "assistant", "content": None, "tool_calls": [call(each) for each in calls]}
    assert gateway.chat(first, answer, first).headers["x-agentstate-session"] == one
    gateway.ended()


def test_a_result_that_is_brought_twice_costs_nothing(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(lambda asked: asked.whole(completion(None, tool_calls=[call("c")])))
    first = {"role": "user", "content": "hello"}
    one = gateway.chat(first).headers["x-agentstate-session"]
    gateway.ended()
    result = {"role": "tool", "tool_call_id": "c", "content": "found"}
    answer = {"role": "assistant", "content": None, "tool_calls": [call("c")]}
    two = gateway.chat(first, answer, result, result)
    gateway.ended()
    assert (two.status_code, two.headers["x-agentstate-session"]) == (200, one)
    assert [state for _, state in gateway.tool_calls(one)] == ["done"]


def test_a_branch_that_shares_nothing_keeps_all_of_its_request(make_gateway: Callable[..., Gateway]) -> None:
    """A transcript is not parted between a call and its result."""
    answers = iter([completion(None, tool_calls=[call("c")]), completion("one"), completion("two")])
    gateway = make_gateway(lambda asked: asked.whole(next(answers)), gateway_store=True)
    first = {"role": "user", "content": "hello"}
    called = {"role": "assistant", "content": None, "tool_calls": [call("c")]}
    results = [{"role": "tool", "tool_call_id": "c", "content": found} for found in ("this", "that")]
    one = gateway.chat(first).headers["x-agentstate-session"]
    gateway.ended()
    assert gateway.chat(first, called, results[0]).headers["x-agentstate-session"] == one
    gateway.ended()
    branch = gateway.chat(first, called, results[1]).headers["x-agentstate-session"]
    gateway.ended()
    assert branch != one
    kept = [entry.payload.get("content") for entry in gateway.service.client.entries(branch).data]
    assert kept[0] == "hello"
    assert kept[-1] == "two"


def test_a_body_too_deep_to_be_sent_on_is_the_clients_fault(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(says_hi)
    for path, body in (
        ("/v1/chat/completions", {**HELLO, "rid": "r"}),
        ("/v1/embeddings", {"model": MODEL, "input": "a", "rid": "r"}),
        ("/v1/responses", {"model": MODEL, "input": "hello"}),
    ):
        raw = json.dumps({**body, "metadata": 0}).replace('"metadata": 0', f'"metadata": {"[" * 1000}{"]" * 1000}')
        refused = gateway.service.http.post(path, content=raw, headers={"content-type": "application/json"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_json"), path
    assert gateway.engine.asked == []
    gateway.ended()
    assert all(session.status != "running" for session in gateway.sessions())


def test_a_limit_of_any_length_is_refused(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(says_hi)
    conversation = gateway.post("/v1/conversations", {}).json()["id"]
    refused = gateway.service.http.get(f"/v1/conversations/{conversation}/items", params={"limit": "1" * 5000})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_limit")


def test_an_event_without_end_is_given_up(
    make_gateway: Callable[..., Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "EVENT_BYTES", 1000)

    def script(asked: Asked) -> None:
        asked.start()
        asked.send(chunk("hi"))
        while not asked.left.is_set():
            asked.send(b"data: " + b"x" * 500)

    gateway = make_gateway(script)
    answer = gateway.post("/v1/chat/completions", {**HELLO, "stream": True})
    events = answer.content.split(b"\n\n")
    assert events[0] + b"\n\n" == chunk("hi")
    assert json.loads(events[1].removeprefix(b"data: "))["error"]["code"] == "engine_broke_off"
    assert gateway.engine.asked[0].left.wait(PATIENCE_S)
    gateway.ended()
    (session,) = gateway.sessions()
    assert session.status == "suspended"


@pytest.mark.parametrize("status", [401, 403])
def test_an_engine_that_refuses_the_gateway_says_nothing_of_the_clients_key(
    make_gateway: Callable[..., Gateway], status: int
) -> None:
    gateway = make_gateway(lambda asked: asked.whole({"error": "Unauthorized"}, status=status))
    for path in ("/v1/chat/completions", "/v1/embeddings"):
        refused = gateway.post(path, {**HELLO, "input": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (502, "engine_refused")


def test_what_nobody_thought_of_has_the_clients_form(
    make_gateway: Callable[..., Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = make_gateway(says_hi)

    def broken(*args: Any) -> Any:
        raise RuntimeError("secret")

    monkeypatch.setattr(Fleet, "serving", broken)
    refused = gateway.post("/v1/chat/completions", HELLO)
    assert (refused.status_code, refused.json()["error"]["type"]) == (500, "server_error")
    assert "secret" not in refused.text
    assert gateway.post("/v1/messages", {**HELLO, "max_tokens": 1}).json()["type"] == "error"


def test_a_conversation_that_outgrew_a_body_is_not_read(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(responds([said("hi")], [said("ho")]), gateway_body_bytes=20_000)
    conversation = gateway.post("/v1/conversations", {}).json()["id"]
    body = {"model": MODEL, "input": "go on", "conversation": conversation}
    item = {"type": "message", "role": "user", "content": "x" * 11_000}
    path = f"/v1/conversations/{conversation}/items"
    assert gateway.post(path, {"items": [item]}).status_code == 200
    assert gateway.post("/v1/responses", body).status_code == 200
    gateway.ended()
    assert gateway.post(path, {"items": [item]}).status_code == 200
    refused = gateway.post("/v1/responses", body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "context_too_large")
    assert len(gateway.engine.asked) == 1
    gateway.ended()
    assert gateway.post(path, {"items": [item]}).status_code == 200  # it is not locked


def test_a_small_body_that_refers_to_much_is_refused(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(responds([said("hi")], [said("ho")]), gateway_body_bytes=20_000)
    item = {"type": "message", "role": "user", "content": "x" * 11_000, "id": "msg_1"}
    assert gateway.post("/v1/conversations", {"items": [item]}).status_code == 200
    for times, status, code in ((1, 200, None), (2, 413, "context_too_large"), (600, 413, "context_too_large")):
        body = {"model": MODEL, "input": [{"id": "msg_1"}] * times, "store": False}
        answer = gateway.post("/v1/responses", body)
        assert (answer.status_code, (answer.json().get("error") or {}).get("code")) == (status, code), times
        gateway.ended()
    many = {"model": MODEL, "input": [{"id": f"msg_{number}"} for number in range(600)], "store": False}
    refused = gateway.post("/v1/responses", many)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "too_many_items")
    assert len(gateway.engine.asked) == 1


def test_a_session_that_goes_while_it_is_waited_for_is_made_anew(
    make_gateway: Callable[..., Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    going, go_on = threading.Event(), threading.Event()
    read = Sessions.read

    def late(self: Sessions, session_id: str) -> Any:
        monkeypatch.setattr(Sessions, "read", read)
        go_on.set()
        thread.join()
        gateway.ended()
        self.delete(session_id, None)
        return read(self, session_id)

    def script(asked: Asked) -> None:
        if not going.is_set():
            going.set()
            go_on.wait()
        says_hi(asked)

    gateway = make_gateway(script, gateway_wait_s=PATIENCE_S)
    with httpx.Client(base_url=gateway.service.base_url, timeout=PATIENCE_S) as other:
        named = {"X-AgentState-Session": "mine"}
        thread = threading.Thread(target=lambda: other.post("/v1/chat/completions", json=HELLO, headers=named))
        thread.start()
        going.wait()
        monkeypatch.setattr(Sessions, "read", late)
        answer = gateway.post("/v1/chat/completions", HELLO, **named)
    gateway.ended()
    assert (answer.status_code, answer.headers["x-agentstate-session"]) == (200, "mine")
    assert len({gateway.turn(asked) for asked in gateway.engine.asked}) == 2


def test_headers_beyond_ascii_go_on_as_they_are(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(says_hi)
    gateway.service.http.post("/v1/chat/completions", json=HELLO, headers=[(b"x-title", "北京".encode())])
    assert gateway.engine.asked[0].headers["x-title"].encode("latin-1") == "北京".encode()


def test_a_body_of_too_many_values_is_refused_before_any_is_read(
    make_gateway: Callable[..., Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = make_gateway(says_hi)
    headers = {"content-type": "application/json"}
    raw = json.dumps({**HELLO, "metadata": 0}).replace('"metadata": 0', f'"metadata": [{"[],{}," * 600_000}0]')

    def loads(data: bytes) -> Any:
        assert data != raw.encode()
        return json.loads(data)

    monkeypatch.setattr(documents, "loads", loads)
    for path in ("/v1/chat/completions", "/v1/embeddings", "/v1/conversations"):
        refused = gateway.service.http.post(path, content=raw, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large"), path
    assert gateway.engine.asked == []
    text = {"role": "user", "content": '[],{},\\"' * 400_000}  # a text is one value, whatever it says
    assert gateway.chat(text).status_code == 200
    assert gateway.engine.asked[-1].document["messages"] == [text]
    gateway.ended()


def test_a_whole_answer_of_any_length_is_not_held(
    make_gateway: Callable[..., Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody reads here is passed on as it comes; what has to be read is given up."""
    monkeypatch.setattr(upstream.Answer.body, "__defaults__", (10_000,))
    sent = threading.Event()

    def script(asked: Asked) -> None:
        if asked.path != "/v1/embeddings":
            asked.whole(completion("x" * 20_000))
            return
        asked._socket.sendall(
            b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 20002\r\n\r\n"' + b"x" * 15_000
        )
        sent.wait(PATIENCE_S)
        asked._socket.sendall(b"x" * 5_000 + b'"')

    gateway = make_gateway(script)
    with gateway.service.http.stream("POST", "/v1/embeddings", json={"model": MODEL, "input": "a"}) as answer:
        pieces = answer.iter_raw()
        first = next(pieces)  # the engine has not sent all of it
        sent.set()
        assert answer.headers["content-length"] == "20002"
        assert first + b"".join(pieces) == b'"' + b"x" * 20_000 + b'"'
    refused = gateway.chat({"role": "user", "content": "hello"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (502, "answer_too_large")
    gateway.ended()
    assert [session.status for session in gateway.sessions()] == ["suspended"]


@pytest.mark.parametrize("length", [b"content-length: 1000", b"transfer-encoding: chunked"])
def test_an_answer_that_breaks_off_while_it_is_passed_on_is_not_whole(
    make_gateway: Callable[..., Gateway], length: bytes
) -> None:
    def script(asked: Asked) -> None:
        asked._socket.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n" + length + b"\r\n\r\n")
        asked._socket.sendall(b'5\r\n"half\r\n' if b"chunked" in length else b'"half')
        asked.cut()

    gateway = make_gateway(script)
    with pytest.raises(httpx.RemoteProtocolError):
        gateway.post("/v1/embeddings", {"model": MODEL, "input": "a"})


def test_headers_have_a_limit_before_anybody_shows_a_key(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(says_hi)
    key = gateway.key("acme")
    large = {"X-Large": "x" * heads.MAX_HEAD_BYTES}
    for path in ("/v1/chat/completions", "/v1/sessions", "/healthz"):
        refused = gateway.service.http.post(path, json=HELLO, headers=large)
        assert refused.status_code == 431, path
    fits = {"X-Large": "x" * (heads.MAX_HEAD_BYTES - 2000), "Authorization": f"Bearer {key}"}
    assert gateway.service.http.post("/v1/chat/completions", json=HELLO, headers=fits).status_code == 200
    gateway.ended()


def test_headers_without_end_fill_no_memory(make_gateway: Callable[..., Gateway]) -> None:
    """Neither one that does not end, nor many."""
    gateway = make_gateway(says_hi)
    url = httpx.URL(gateway.service.base_url)
    for part in (b"x" * 1000, b"x-large: x\r\n" * 100):
        with socket.create_connection((url.host, url.port), timeout=PATIENCE_S) as client:
            client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nx-large: ")
            for _ in range(2 * heads.MAX_HEAD_BYTES // 1000):
                client.sendall(part)
            with client.makefile("rb") as answer:
                assert answer.readline() == b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
                assert answer.read().endswith(b"bytes.")  # and the connection is closed
    assert gateway.engine.asked == []
