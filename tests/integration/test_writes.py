"""Idempotent and conditional writes, lists, forks, tool calls and streams, as a client of any language sees them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from stage import MODEL, PATIENCE_S, Service
from test_http_api import assert_problem, created, note, proof, resumed

from agentstate.sessions.collection import collect
from agentstate.sessions.transcript import BLOB_BYTES


def post(service: Service, path: str, key: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    return service.http.post(path, json=body, headers={"Idempotency-Key": key, **headers})


def rows(service: Service, table: str) -> int:
    with service.database.read() as connection:
        return connection.execute(sa.text(f"SELECT count(*) FROM {table}")).scalar_one()


# --- Idempotency-Key


def test_a_write_that_comes_twice_is_carried_out_once(service: Service) -> None:
    first = post(service, "/v1/sessions", "k1", {"model": MODEL})
    again = post(service, "/v1/sessions", "k1", {"model": MODEL})
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json() == first.json()
    assert again.headers["location"] == first.headers["location"]
    assert again.headers["etag"] == first.headers["etag"]
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert rows(service, "sessions") == 1
    assert_problem(post(service, "/v1/sessions", "k1", {"model": "other"}), 422, "idempotency-key-reused")
    assert post(service, "/v1/sessions", "k2", {"model": MODEL}).json()["id"] != first.json()["id"]


def test_a_turn_that_is_repeated_call_by_call(service: Service) -> None:
    path = f"/v1/sessions/{created(service)['id']}"
    large = {"kind": "note", "payload": {"text": "x" * BLOB_BYTES}}
    call = {"kind": "tool_call", "call_id": "c", "payload": {"name": "read"}}

    def twice(verb: str, key: str, body: dict[str, Any], **headers: str) -> dict[str, Any]:
        first = post(service, f"{path}/{verb}", key, body, **headers)
        again = post(service, f"{path}/{verb}", key, body, **headers)
        assert first.is_success, first.text
        assert (again.status_code, again.json()) == (first.status_code, first.json())
        assert again.headers["idempotency-replayed"] == "true"
        return dict(first.json())

    lease = {"lease": proof(twice("resume", "r1", {}))}
    appended = twice("entries", "e1", {**lease, "entries": [note(), large]})
    assert [entry["seq"] for entry in appended["data"]] == [1, 2]
    twice("entries", "e2", {**lease, "entries": [call]})
    twice("suspend", "s1", {**lease, "reason": "tool_wait"})
    turn = twice("resume", "r2", {"tail": 2})
    assert [entry["seq"] for entry in turn["entries"]["data"]] == [2, 3]
    assert turn["entries"]["data"][0]["payload"] == large["payload"]
    assert proof(turn)["epoch"] == 2
    renewed = service.http.post(f"{path}/lease/renew", json={"lease": proof(turn)})
    assert renewed.status_code == 200, "the lease of a repeated answer is the one that was given"
    fork = twice("forks", "f1", {}, **{"If-Match": "*"})
    assert fork["head_id"] == turn["session"]["head_id"]
    with service.database.read() as connection:
        stored = connection.execute(sa.text("SELECT answer FROM idempotency")).scalars().all()
    assert lease["lease"]["token"] not in json.dumps([str(answer) for answer in stored])
    assert "x" * 1000 not in json.dumps([str(answer) for answer in stored])


def test_what_failed_is_tried_again(service: Service) -> None:
    session_id = created(service)["id"]
    turn = resumed(service, session_id)
    assert_problem(post(service, f"/v1/sessions/{session_id}/resume", "r", {}), 409, "session-busy", retryable=True)
    service.http.post(f"/v1/sessions/{session_id}/suspend", json={"lease": proof(turn), "reason": "done"})
    assert post(service, f"/v1/sessions/{session_id}/resume", "r", {}).status_code == 200


def test_of_many_that_send_one_key_at_once_one_writes(service: Service) -> None:
    start = threading.Barrier(6)
    answers: list[httpx.Response] = []

    def send() -> None:
        start.wait()
        headers = {"Idempotency-Key": "same"}
        answers.append(
            httpx.post(f"{service.base_url}/v1/sessions", json={"model": MODEL}, headers=headers, timeout=PATIENCE_S)
        )

    threads = [threading.Thread(target=send) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} <= {201, 409}
    assert len({answer.json()["id"] for answer in answers if answer.status_code == 201}) == 1
    for refused in (answer for answer in answers if answer.status_code == 409):
        assert_problem(refused, 409, "idempotency-key-in-use", retryable=True)
    assert rows(service, "sessions") == 1


def test_a_key_that_is_no_key(service: Service) -> None:
    for key in ("", "a b", "x" * 256):
        assert_problem(post(service, "/v1/sessions", key, {"model": MODEL}), 422, "invalid-request")


# --- ETag, If-Match, lists


def test_conditional_reads_and_writes(service: Service) -> None:
    created(service, id="mine", metadata={"a": 1, "b": 2})
    tag = service.http.get("/v1/sessions/mine").headers["etag"]
    unchanged = service.http.get("/v1/sessions/mine", headers={"If-None-Match": tag})
    assert (unchanged.status_code, unchanged.content, unchanged.headers["etag"]) == (304, b"", tag)
    assert_problem(service.http.patch("/v1/sessions/mine", json={}), 428, "precondition-required")
    patched = service.http.patch(
        "/v1/sessions/mine", json={"metadata": {"a": None, "c": 3}, "expires_in_s": 60}, headers={"If-Match": tag}
    )
    assert (patched.status_code, patched.json()["metadata"]) == (200, {"b": 2, "c": 3})
    assert patched.json()["expires_at"] is not None
    for method, path in (("PATCH", ""), ("DELETE", ""), ("POST", "/forks")):
        stale = service.http.request(
            method,
            f"/v1/sessions/mine{path}",
            headers={"If-Match": tag},
            **({} if method == "DELETE" else {"json": {}}),
        )
        assert assert_problem(stale, 412, "revision-stale")["revision"] == patched.json()["revision"]
    assert_problem(service.http.post("/v1/sessions/mine/resume", headers={"If-Match": tag}), 412, "revision-stale")
    assert service.http.get("/v1/sessions/mine", headers={"If-None-Match": tag}).status_code == 200
    forever = service.http.patch(
        "/v1/sessions/mine", json={"expires_in_s": None}, headers={"If-Match": f'"{patched.json()["revision"]}"'}
    )
    assert (forever.json()["expires_at"], forever.json()["metadata"]) == (None, {"b": 2, "c": 3})
    turn = resumed(service, "mine")
    busy = service.http.delete("/v1/sessions/mine", headers={"If-Match": "*"})
    assert_problem(busy, 409, "session-busy", retryable=True)
    service.http.post("/v1/sessions/mine/suspend", json={"lease": proof(turn), "reason": "done"})
    assert service.http.delete("/v1/sessions/mine", headers={"If-Match": "*"}).status_code == 204
    assert_problem(service.http.get("/v1/sessions/mine"), 404, "session-not-found")


def test_a_lease_that_lapses_changes_the_etag(service: Service) -> None:
    created(service, id="mine")
    resumed(service, "mine")
    tag = service.http.get("/v1/sessions/mine").headers["etag"]
    with service.database.write() as connection:
        connection.execute(sa.text("UPDATE leases SET expires_us = 1"))
    answer = service.http.get("/v1/sessions/mine", headers={"If-None-Match": tag})
    assert (answer.status_code, answer.json()["status"]) == (200, "idle")


def test_sessions_are_listed_page_by_page(service: Service) -> None:
    ids = sorted(created(service)["id"] for _ in range(5))
    first = service.http.get("/v1/sessions", params={"limit": 2}).json()
    assert ([session["id"] for session in first["data"]], first["has_more"]) == (ids[:2], True)
    service.http.delete(f"/v1/sessions/{first['last_id']}", headers={"If-Match": "*"})
    rest = service.http.get("/v1/sessions", params={"after": first["last_id"]}).json()
    assert ([session["id"] for session in rest["data"]], rest["has_more"]) == (ids[2:], False)
    newest = service.http.get("/v1/sessions", params={"limit": 1, "order": "desc"}).json()
    assert (newest["first_id"], newest["has_more"]) == (ids[-1], True)


# --- branches


def test_fork_and_rewind(service: Service) -> None:
    created(service, id="mine")
    turn = resumed(service, "mine")
    call = {"kind": "tool_call", "call_id": "c", "payload": {"name": "read"}}
    result = {"kind": "tool_result", "call_id": "c", "payload": {"output": 1}}
    appended = service.http.post(
        "/v1/sessions/mine/entries", json={"lease": proof(turn), "entries": [note("a"), call, result]}
    ).json()["data"]
    service.http.post("/v1/sessions/mine/suspend", json={"lease": proof(turn), "reason": "done"})
    any_view = {"If-Match": "*"}
    fork = service.http.post("/v1/sessions/mine/forks", json={"at": appended[0]["id"], "id": "b"}, headers=any_view)
    assert (fork.status_code, fork.headers["location"], fork.json()["status"]) == (201, "/v1/sessions/b", "idle")
    assert [entry["session_id"] for entry in service.http.get("/v1/sessions/b/entries").json()["data"]] == ["b"]
    for verb in ("forks", "rewind"):
        refused = service.http.post(f"/v1/sessions/mine/{verb}", json={"at": appended[1]["id"]}, headers=any_view)
        assert_problem(refused, 422, "not-a-branch-point")
        assert_problem(service.http.post(f"/v1/sessions/mine/{verb}", json={"at": "x"}), 428, "precondition-required")
    taken = service.http.post("/v1/sessions/mine/forks", json={"id": "b"}, headers=any_view)
    assert_problem(taken, 409, "session-exists")
    rewound = service.http.post("/v1/sessions/mine/rewind", json={"at": appended[0]["id"]}, headers=any_view)
    assert (rewound.status_code, rewound.json()["head_id"]) == (200, appended[0]["id"])


# --- tool calls


def test_a_tool_call_is_claimed_once_and_its_result_is_kept(service: Service) -> None:
    created(service, id="mine")
    turn = resumed(service, "mine")
    path, lease = "/v1/sessions/mine/tool-calls/c1", {"lease": proof(turn)}
    claim = {**lease, "name": "search", "arguments": {"q": 1}, "expected_s": 2}
    assert_problem(service.http.put(path, json={"name": "search"}), 409, "session-busy", retryable=True)
    claimed = service.http.put(path, json=claim)
    assert (claimed.status_code, claimed.json()["state"], claimed.json()["typical_s"]) == (201, "claimed", None)
    assert_problem(service.http.put(path, json=claim), 409, "tool-call-claimed")
    assert_problem(service.http.put(f"{path}/result", json={**lease}), 422, "invalid-entry")
    finished = service.http.put(f"{path}/result", json={**lease, "output": {"hits": 3}})
    assert (finished.status_code, finished.json()["state"]) == (200, "done")
    assert_problem(service.http.put(f"{path}/result", json={**lease, "error": "x"}), 409, "tool-call-final")
    again = service.http.put(path, json=claim)
    assert (again.status_code, again.json()["result"]) == (200, {"output": {"hits": 3}})
    for other in ({"name": "delete"}, {"arguments": {"q": 2}}):
        assert_problem(service.http.put(path, json={**claim, **other}), 409, "tool-call-reused")
    unknown = service.http.put("/v1/sessions/mine/tool-calls/none/result", json={**lease, "output": 1})
    assert_problem(unknown, 404, "tool-call-not-found")
    second = service.http.put("/v1/sessions/mine/tool-calls/c2", json={**lease, "name": "search"})
    assert second.json()["typical_s"] >= 0, "how long the tool took before is known now"
    kinds = [entry["kind"] for entry in service.http.get("/v1/sessions/mine/entries").json()["data"]]
    assert kinds == ["tool_call", "tool_result", "tool_call"]


def test_a_tool_may_end_while_its_session_is_suspended(service: Service) -> None:
    created(service, id="mine")
    turn = resumed(service, "mine")
    path = "/v1/sessions/mine/tool-calls/c1"
    service.http.put(path, json={"lease": proof(turn), "name": "search"})
    service.http.post("/v1/sessions/mine/suspend", json={"lease": proof(turn), "reason": "tool_wait"})
    assert service.http.put(f"{path}/result", json={"error": None}).json()["state"] == "failed"
    turn = resumed(service, "mine")
    assert (turn["pending_tool_calls"], len(turn["entries"]["data"])) == ([], 2)


def test_a_call_of_a_runner_that_vanished_is_not_executed_again(service: Service) -> None:
    created(service, id="mine")
    old = resumed(service, "mine")
    path = "/v1/sessions/mine/tool-calls/c1"
    service.http.put(path, json={"lease": proof(old), "name": "search"})
    with service.database.write() as connection:
        connection.execute(sa.text("UPDATE leases SET expires_us = 1"))
    lease = {"lease": proof(resumed(service, "mine"))}
    assert_problem(service.http.put(path, json={**lease, "name": "search"}), 409, "tool-call-unknown")
    late = service.http.put(f"{path}/result", json={"lease": proof(old), "output": 1})
    assert_problem(late, 409, "lease-lost")
    assert service.http.put(f"{path}/result", json={**lease, "error": "nobody knows"}).json()["state"] == "failed"


# --- waiting and watching


def test_who_waits_for_a_busy_session_gets_it_when_it_is_free(service: Service) -> None:
    created(service, id="mine")
    turn = resumed(service, "mine")
    got: list[httpx.Response] = []

    def wait() -> None:
        got.append(
            httpx.post(
                f"{service.base_url}/v1/sessions/mine/resume",
                json={"on_busy": "wait", "busy_timeout_ms": 30_000},
                timeout=60,
            )
        )

    thread = threading.Thread(target=wait)
    thread.start()
    service.http.post("/v1/sessions/mine/suspend", json={"lease": proof(turn), "reason": "user_wait"})
    thread.join()
    assert (got[0].status_code, got[0].json()["lease"]["epoch"]) == (200, 2)
    late = service.http.post("/v1/sessions/mine/resume", json={"on_busy": "wait", "busy_timeout_ms": 50})
    assert_problem(late, 409, "session-busy", retryable=True)


def events(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    event: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(": ")
            event[name] = value
        elif "event" in event:
            yield event
            event = {}


def test_a_session_is_watched_from_where_the_client_was(service: Service) -> None:
    created(service, id="mine")
    turn = resumed(service, "mine")
    path = "/v1/sessions/mine"
    append = {"lease": proof(turn), "entries": [note("a"), note("b")]}
    service.http.post(f"{path}/entries", json=append)
    with service.http.stream("GET", f"{path}/events", headers={"Last-Event-ID": "1"}) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        found = events(stream.iter_lines())
        event = next(found)
        assert (event["event"], event["id"], json.loads(event["data"])["payload"]) == ("entry", "2", {"text": "b"})
        event = next(found)
        assert (event["event"], json.loads(event["data"])["status"], "id" in event) == ("session", "running", False)
        httpx.post(f"{service.base_url}{path}/entries", json={"lease": proof(turn), "entries": [note("c")]})
        assert next(found)["id"] == "3"
        assert next(found)["event"] == "session"
        httpx.post(f"{service.base_url}{path}/suspend", json={"lease": proof(turn), "reason": "done"})
        assert json.loads(next(found)["data"])["status"] == "suspended"
        httpx.delete(f"{service.base_url}{path}", headers={"If-Match": "*"})
        assert next(found) == {"event": "end", "data": '{"reason": "session-not-found"}'}
    assert_problem(service.http.get(f"{path}/events"), 404, "session-not-found")


def test_who_has_seen_what_was_taken_back_is_told_so(service: Service) -> None:
    created(service, id="mine")
    turn = resumed(service, "mine")
    entries = {"lease": proof(turn), "entries": [note("a"), note("b")]}
    first = service.http.post("/v1/sessions/mine/entries", json=entries).json()["first_id"]
    rewind = {"at": first, "lease": proof(turn)}
    assert service.http.post("/v1/sessions/mine/rewind", json=rewind, headers={"If-Match": "*"}).status_code == 200
    append = {"lease": proof(turn), "entries": [note("c")]}
    assert service.http.post("/v1/sessions/mine/entries", json=append).status_code == 201
    with service.http.stream("GET", "/v1/sessions/mine/events", headers={"Last-Event-ID": "2"}) as stream:
        found = events(stream.iter_lines())
        event = next(found)
        assert (event["event"], event["id"]) == ("rewind", "1")
        assert json.loads(event["data"]) == {"session_id": "mine", "seq": 1}
        assert [(event["event"], event["id"]) for event in [next(found)]] == [("entry", "3")]
        assert next(found)["event"] == "session"
        # And while it is connected.
        rewind = {"at": None, "lease": proof(turn)}
        httpx.post(f"{service.base_url}/v1/sessions/mine/rewind", json=rewind, headers={"If-Match": "*"})
        event = next(found)
        assert (event["event"], event["id"]) == ("rewind", "0")
    response = service.http.get("/v1/sessions/mine/events", headers={"Last-Event-ID": "4"})
    assert_problem(response, 410, "events-trimmed")
    assert_problem(service.http.get("/v1/sessions/mine/events", params={"after": -1}), 422, "invalid-request")


# --- what is seen of the service


def test_metrics_and_request_ids(service: Service) -> None:
    created(service, id="mine")
    turn = resumed(service, "mine")
    service.http.post("/v1/sessions/mine/suspend", json={"lease": proof(turn), "reason": "done"})
    resumed(service, "mine")
    text = service.http.get("/metrics").text
    for line in (
        'agentstate_request_seconds_count{method="POST",route="/v1/sessions/{session_id}/resume",status="200"} 2.0',
        'agentstate_sessions{status="running"} 1.0',
        "agentstate_leases 1.0",
        'agentstate_suspends_total{kv_state="unknown"} 1.0',
        'agentstate_resumes_total{kv_state="unknown",valid="false"} 2.0',
    ):
        assert line in text.splitlines()
    assert service.http.get("/healthz", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = service.http.get("/healthz", headers={"X-Request-Id": "not an id"}).headers["x-request-id"]
    assert made.startswith("req_")


def test_an_answer_says_how_long_the_service_took(service: Service) -> None:
    for path, status in (("/healthz", 200), ("/v1/sessions/none", 404)):
        response = service.http.get(path)
        assert response.status_code == status
        name, _, ms = response.headers["Server-Timing"].partition(";dur=")
        assert (name, 0 < float(ms) < response.elapsed.total_seconds() * 1000) == ("total", True)


def test_records_of_yesterday_are_collected(service: Service) -> None:
    post(service, "/v1/sessions", "k1", {"model": MODEL})
    assert collect(service.database, expired_after_s=0).records == 0
    with service.database.write() as connection:
        connection.execute(sa.text("UPDATE idempotency SET created_us = created_us - 90000000000"))
    assert collect(service.database, expired_after_s=0).records == 1
    assert post(service, "/v1/sessions", "k1", {"model": "other"}).status_code == 201


@pytest.mark.parametrize("size", [64 * 1024, 63 * 1024])
def test_metadata_is_bounded(service: Service, size: int) -> None:
    response = service.http.post("/v1/sessions", json={"model": MODEL, "metadata": {"x": "y" * size}})
    assert response.status_code == (422 if size == 64 * 1024 else 201)
