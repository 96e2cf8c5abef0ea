"""The HTTP API as a client of any language sees it, over a real server."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from stage import MODEL, NOTHING, PATIENCE_S, Service, register, serving

from agentstate.api.gateway import described
from agentstate.fleet import manifests, turns
from agentstate.fleet.manifests import Manifest
from agentstate.fleet.turns import Turn
from agentstate.sessions.verbs import Sessions
from agentstate.settings import Settings
from agentstate.sql import secret


def created(service: Service, **body: Any) -> dict[str, Any]:
    response = service.http.post("/v1/sessions", json={"model": MODEL, **body})
    assert response.status_code == 201, response.text
    return dict(response.json())


def resumed(service: Service, session_id: str, **body: Any) -> dict[str, Any]:
    response = service.http.post(f"/v1/sessions/{session_id}/resume", json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def proof(turn: dict[str, Any]) -> dict[str, Any]:
    return {"token": turn["lease"]["token"], "epoch": turn["lease"]["epoch"]}


def note(text: str = "hello") -> dict[str, Any]:
    return {"kind": "note", "payload": {"text": text}}


def assert_problem(response: httpx.Response, status: int, slug: str, *, retryable: bool = False) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = dict(response.json())
    assert problem["type"] == f"/problems/{slug}"
    assert problem["status"] == status
    assert problem["retryable"] is retryable
    assert problem["title"]
    assert problem["detail"]
    return problem


# --- a session's life


def test_create_and_read(service: Service) -> None:
    response = service.http.post(
        "/v1/sessions", json={"model": MODEL, "metadata": {"user": "u_17"}, "expires_in_s": 3600, "cache_salt": "s"}
    )
    session = response.json()
    assert response.status_code == 201
    assert response.headers["location"] == f"/v1/sessions/{session['id']}"
    assert session["status"] == "idle"
    assert session["created_at"].endswith("Z")
    assert session["expires_at"] > session["created_at"]
    assert service.http.get(response.headers["location"]).json() == session


def test_a_turn(service: Service) -> None:
    session = created(service, id="my-agent", cache_salt="salt")
    turn = resumed(service, "my-agent", lease_ttl_s=30, tail=10, on_busy="reject", expect={"model": MODEL})
    assert turn["session"]["status"] == "running"
    assert turn["lease"]["epoch"] == 1
    assert turn["entries"] == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    assert turn["engine"] is None
    assert turn["kv"] == {
        "state": "unknown",
        "tokens": 0,
        "valid": False,
        "invalid_reason": "no live engine serves 'm'",
        "upper_bound": False,
        "durable_on": None,
        "prefetch": None,
    }

    appended = service.http.post(
        "/v1/sessions/my-agent/entries",
        json={
            "lease": proof(turn),
            "entries": [
                {"kind": "message", "payload": {"role": "user", "content": "What is in it?"}},
                {"kind": "tool_call", "call_id": "call_1", "payload": {"name": "read", "arguments": {"path": "a"}}},
            ],
        },
    )
    assert appended.status_code == 201
    entries = appended.json()
    assert [entry["seq"] for entry in entries["data"]] == [1, 2]
    assert (entries["first_id"], entries["last_id"]) == (entries["data"][0]["id"], entries["data"][1]["id"])
    assert int(entries["revision"]) > int(session["revision"])

    renewed = service.http.post("/v1/sessions/my-agent/lease/renew", json={"lease": proof(turn), "lease_ttl_s": 90})
    assert renewed.status_code == 200
    assert renewed.json()["epoch"] == 1
    assert renewed.json()["expires_at"] > turn["lease"]["expires_at"]

    suspended = service.http.post(
        "/v1/sessions/my-agent/suspend",
        json={"lease": proof(turn), "reason": "tool_wait", "kv": "retain", "durable_timeout_ms": 0},
    ).json()
    assert suspended == {
        "id": "my-agent",
        "status": "suspended",
        "revision": suspended["revision"],
        "head_id": entries["last_id"],
        "pending_tool_calls": ["call_1"],
        "operation": None,
        "kv": NOTHING,
    }
    again = service.http.post("/v1/sessions/my-agent/resume")
    assert again.status_code == 200, "a body is not needed"
    assert again.json()["lease"]["epoch"] == 2
    assert again.json()["pending_tool_calls"] == ["call_1"]
    assert again.json()["entries"]["data"] == entries["data"]


def test_resume_gives_an_openai_client_what_it_needs(service: Service) -> None:
    register(service.database, "tcp://127.0.0.1:1")
    session_id = created(service, cache_salt="salt", extra_key="key")["id"]
    with service.database.write() as connection:
        manifests.save(connection, Manifest(session_id, "f1", 0, "n1", "eng_1", 64, 128, b"k" * 64, 1000))
    turn = resumed(service, session_id)
    assert turn["engine"]["base_url"] == "http://127.0.0.1:30000/v1"
    sent = turn["engine"]["extra_body"]
    assert {**sent, "session_id": None} == {"session_id": None, "cache_salt": "salt", "extra_key": "key"}
    assert proven(service, sent["session_id"]) == Turn(session_id, 1, "tenant default")
    assert (turn["kv"]["state"], turn["kv"]["tokens"], turn["kv"]["valid"]) == ("durable", 128, True)
    assert (turn["kv"]["invalid_reason"], turn["kv"]["upper_bound"]) == (None, False)
    assert turn["kv"]["durable_on"] == "node"


def test_a_session_whose_node_is_gone_is_restored_from_the_shared_store(service: Service) -> None:
    register(service.database, "tcp://127.0.0.1:1", node="n2", shared_store="s3://bucket/agents")
    session_id = created(service)["id"]
    with service.database.write() as connection:
        manifests.save(
            connection, Manifest(session_id, "f1", 0, "n1", "eng_1", 64, 128, b"k" * 64, 1000, shared_tokens=128)
        )
    turn = resumed(service, session_id)
    assert (turn["kv"]["state"], turn["kv"]["tokens"], turn["kv"]["valid"]) == ("durable", 128, True)
    assert turn["kv"]["durable_on"] == "shared"
    (engine,) = service.http.get("/v1/engines").json()["data"]
    assert engine["shared_store"] == "s3://bucket/agents"


def proven(service: Service, sent: str) -> Turn | None:
    """The turn that an engine takes a request for."""
    session_id, token = turns.split(sent)
    assert token is not None
    with service.database.write() as connection:
        return turns.verify(turns.signing_key(secret.read(connection)), session_id, token)


def test_every_turn_has_a_token_of_its_own(service: Service) -> None:
    register(service.database, "tcp://127.0.0.1:1")
    session_id, seen = created(service)["id"], set()
    for epoch in (1, 2):
        turn = resumed(service, session_id)
        seen.add(sent := turn["engine"]["extra_body"]["session_id"])
        assert proven(service, sent) == Turn(session_id, epoch, "tenant default")
        service.http.post(f"/v1/sessions/{session_id}/suspend", json={"lease": proof(turn), "reason": "user_wait"})
    assert len(seen) == 2


def test_an_engine_of_an_earlier_release_gets_the_id_alone(service: Service) -> None:
    register(service.database, "tcp://127.0.0.1:1", control_secret=None)
    session_id = created(service)["id"]
    assert resumed(service, session_id)["engine"]["extra_body"] == {"session_id": session_id}


def test_engines_know_a_session_by_a_name_that_no_other_ever_had(service: Service) -> None:
    """An id of the caller's own is free again once its session is deleted; what engines have stored of it is not."""
    register(service.database, "tcp://127.0.0.1:1")
    known = []
    for _ in range(2):
        created(service, id="my-agent")
        turn = resumed(service, "my-agent")
        assert set(turn["engine"]["extra_body"]) == {"session_id"}
        known.append(turns.split(turn["engine"]["extra_body"]["session_id"])[0])
        service.http.post("/v1/sessions/my-agent/suspend", json={"lease": proof(turn), "reason": "done"})
        assert service.http.delete("/v1/sessions/my-agent", headers={"If-Match": "*"}).status_code == 204
    assert known[0] != known[1]
    assert "my-agent" not in known


def test_pages_that_do_not_fit_the_engine_are_told_and_the_session_resumes(service: Service) -> None:
    register(service.database, "tcp://127.0.0.1:1", fingerprint="f2")
    session_id = created(service)["id"]
    with service.database.write() as connection:
        manifests.save(connection, Manifest(session_id, "f1", 0, "n1", "eng_1", 64, 128, b"k" * 64, 1000))
    turn = resumed(service, session_id)
    assert turn["engine"] is not None
    assert (turn["kv"]["tokens"], turn["kv"]["valid"]) == (128, False)
    assert "fingerprint" in turn["kv"]["invalid_reason"]


def test_entries_are_paged(service: Service) -> None:
    session_id = created(service)["id"]
    turn = resumed(service, session_id)
    path = f"/v1/sessions/{session_id}/entries"
    service.http.post(path, json={"lease": proof(turn), "entries": [note(str(number)) for number in range(5)]})
    first = service.http.get(path, params={"limit": 2}).json()
    assert ([entry["seq"] for entry in first["data"]], first["has_more"]) == ([1, 2], True)
    rest = service.http.get(path, params={"limit": 3, "after": first["last_id"]}).json()
    assert ([entry["seq"] for entry in rest["data"]], rest["has_more"]) == ([3, 4, 5], False)
    newest = service.http.get(path, params={"limit": 1, "order": "desc"}).json()
    assert ([entry["seq"] for entry in newest["data"]], newest["has_more"]) == ([5], True)


def test_of_many_clients_that_resume_at_once_one_runs_the_session(service: Service) -> None:
    session_id = created(service)["id"]
    start = threading.Barrier(8)
    answers: list[httpx.Response] = []

    def race() -> None:
        start.wait()
        answers.append(httpx.post(f"{service.base_url}/v1/sessions/{session_id}/resume", json={}, timeout=PATIENCE_S))

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 7


# --- problems


def test_conflicts_over_a_lease(service: Service) -> None:
    session_id = created(service)["id"]
    turn = resumed(service, session_id)
    path = f"/v1/sessions/{session_id}"

    busy = service.http.post(f"{path}/resume", json={})
    problem = assert_problem(busy, 409, "session-busy", retryable=True)
    assert 1 <= int(busy.headers["retry-after"]) <= 60
    assert 0 < problem["retry_after_s"] <= 60
    assert problem["revision"] == turn["session"]["revision"]

    with service.database.write() as connection:
        connection.execute(sa.text("UPDATE leases SET expires_us = 1"))
    newer = resumed(service, session_id)
    for verb, body in (
        ("entries", {"entries": [note()]}),
        ("suspend", {"reason": "done"}),
        ("lease/renew", {}),
    ):
        response = service.http.post(f"{path}/{verb}", json={"lease": proof(turn), **body})
        assert assert_problem(response, 409, "lease-lost")["revision"] == newer["session"]["revision"]


def test_conflicts_over_tools_and_ids(service: Service) -> None:
    session_id = created(service)["id"]
    turn = resumed(service, session_id)
    call = {"kind": "tool_call", "call_id": "c", "payload": {"name": "read"}}
    path = f"/v1/sessions/{session_id}"
    service.http.post(f"{path}/entries", json={"lease": proof(turn), "entries": [call]})
    response = service.http.post(f"{path}/suspend", json={"lease": proof(turn), "reason": "done"})
    assert_problem(response, 409, "tool-in-flight")
    response = service.http.post("/v1/sessions", json={"model": MODEL, "id": session_id})
    assert_problem(response, 409, "session-exists")
    unknown = {"kind": "tool_result", "call_id": "none", "payload": {"output": 1}}
    response = service.http.post(f"{path}/entries", json={"lease": proof(turn), "entries": [unknown]})
    assert_problem(response, 422, "invalid-entry")


def test_what_is_not_there_or_not_any_more(service: Service) -> None:
    session_id = created(service)["id"]
    assert_problem(service.http.get("/v1/sessions/ses_none"), 404, "session-not-found")
    assert_problem(service.http.get("/v1/operations/op_none"), 404, "operation-not-found")
    response = service.http.get(f"/v1/sessions/{session_id}/entries", params={"after": "ent_none"})
    assert_problem(response, 404, "entry-not-found")
    with service.database.write() as connection:
        connection.execute(sa.text("UPDATE sessions SET expires_us = 1"))
    assert_problem(service.http.get(f"/v1/sessions/{session_id}"), 410, "session-expired")
    assert_problem(service.http.post(f"/v1/sessions/{session_id}/resume"), 410, "session-expired")


def test_another_model_than_expected(service: Service) -> None:
    session_id = created(service)["id"]
    response = service.http.post(f"/v1/sessions/{session_id}/resume", json={"expect": {"model": "other"}})
    assert_problem(response, 412, "model-mismatch")
    assert service.http.get(f"/v1/sessions/{session_id}").json()["status"] == "idle"


def test_what_the_framework_refuses_is_a_problem_too(service: Service) -> None:
    assert_problem(service.http.get("/v1/nothing"), 404, "not-found")
    response = service.http.put("/v1/sessions")
    assert_problem(response, 405, "method-not-allowed")
    response = service.http.post("/v1/sessions", content=b"{", headers={"content-type": "application/json"})
    assert_problem(response, 422, "invalid-request")
    response = service.http.post(
        "/v1/sessions", content=b'{"model": "\xff"}', headers={"content-type": "application/json"}
    )
    assert_problem(response, 400, "invalid-request")


MALFORMED: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/sessions", {}, "body.model"),
    ("/v1/sessions", {"model": ""}, "body.model"),
    ("/v1/sessions", {"model": "a\0b"}, "body.model"),
    ("/v1/sessions", {"model": "m", "colour": "red"}, "body.colour"),
    ("/v1/sessions", {"model": "m", "id": "~a/b"}, "body.id"),
    ("/v1/sessions", {"model": "m", "id": ""}, "body.id"),
    ("/v1/sessions", {"model": "m", "expires_in_s": 0}, "body.expires_in_s"),
    ("/v1/sessions/s/resume", {"prefetch": "moon"}, "body.prefetch"),
    ("/v1/sessions/s/resume", {"on_busy": "wait for ever"}, "body.on_busy"),
    ("/v1/sessions/s/resume", {"tail": 1001}, "body.tail"),
    ("/v1/sessions/s/resume", {"lease_ttl_s": 0}, "body.lease_ttl_s"),
    ("/v1/sessions/s/suspend", {"reason": "done"}, "body.lease"),
    ("/v1/sessions/s/suspend", {"lease": {"token": "t", "epoch": 1}, "reason": "bored"}, "body.reason"),
    ("/v1/sessions/s/suspend", {"lease": {"token": "t", "epoch": 1}, "reason": "done", "kv": "shred"}, "body.kv"),
    ("/v1/sessions/s/entries", {"lease": {"token": "t", "epoch": 1}, "entries": []}, "body.entries"),
    ("/v1/sessions/s/entries", {"lease": {"token": "t", "epoch": 2**63}, "entries": [note()]}, "body.lease.epoch"),
    ("/v1/sessions/s%00/resume", {}, "path.session_id"),
]


def test_a_body_that_does_not_fit_is_refused_by_name(service: Service) -> None:
    for path, body, where in MALFORMED:
        problem = assert_problem(service.http.post(path, json=body), 422, "invalid-request")
        assert where in [error["where"] for error in problem["errors"]]
        assert where in problem["detail"]


@pytest.mark.parametrize("announced", [True, False], ids=["content-length", "chunked"])
def test_a_body_that_is_too_large(service: Service, announced: bool) -> None:
    body = json.dumps({"model": MODEL, "metadata": {"x": "y" * 9 * 2**20}}).encode()
    content: Any = body if announced else iter([body[:100], body[100:]])
    response = service.http.post("/v1/sessions", content=content, headers={"content-type": "application/json"})
    assert_problem(response, 413, "body-too-large")
    session_id = created(service)["id"]
    large = {"kind": "note", "payload": {"x": "y" * 7 * 2**20}}
    entries = {"lease": proof(resumed(service, session_id)), "entries": [large]}
    assert service.http.post(f"/v1/sessions/{session_id}/entries", json=entries).status_code == 201
    tail = service.http.get(f"/v1/sessions/{session_id}/entries").json()
    assert tail["data"][0]["payload"] == large["payload"]


def test_what_goes_wrong_inside_is_not_shown(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(sessions: Sessions, session_id: str) -> None:
        raise RuntimeError("hunter2")

    monkeypatch.setattr(Sessions, "read", fail)
    response = service.http.get("/v1/sessions/s")
    assert_problem(response, 500, "internal-error")
    assert "hunter2" not in response.text


# --- engines, health, documentation


def test_engines_are_listed_live_or_not(service: Service) -> None:
    assert service.http.get("/v1/engines").json()["data"] == []
    old = register(service.database, "tcp://127.0.0.1:1")
    with service.database.write() as connection:
        connection.execute(sa.text("UPDATE engines SET heartbeat_us = heartbeat_us - 3600000000"))
    new = register(service.database, "tcp://127.0.0.1:2", rank=1)
    listed = service.http.get("/v1/engines").json()
    assert [(engine["id"], engine["live"]) for engine in listed["data"]] == [(old.id, False), (new.id, True)]
    assert (listed["first_id"], listed["last_id"], listed["has_more"]) == (old.id, new.id, False)
    assert "control_address" not in listed["data"][0]


def test_health_and_readiness(service: Service) -> None:
    assert service.http.get("/healthz").json() == {"status": "ok"}
    ready = service.http.get("/readyz")
    assert ready.status_code == 200
    assert ready.json()["status"] == "ready"
    assert ready.json()["database"]["ok"]
    assert not ready.json()["engine"]["ok"], "it works without one, and says so"
    register(service.database, "tcp://127.0.0.1:1")
    assert service.http.get("/readyz").json()["engine"] == {"ok": True, "detail": "1 live"}


def test_a_schema_that_is_not_this_versions_is_not_ready(service: Service) -> None:
    with service.database.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    response = service.http.get("/readyz")
    assert response.status_code == 503
    assert response.json()["database"]["ok"]
    assert not response.json()["migrations"]["ok"]
    assert "9999" in response.json()["migrations"]["detail"]


def test_a_database_that_goes_away_is_told_and_comes_back(postgresql: Any, tmp_path: Path) -> None:
    url = postgresql.create_database(postgresql.template)
    name = sa.make_url(url).database
    with serving(Settings(home=tmp_path, database_url=url)) as service:
        session_id = created(service)["id"]
        postgresql.execute(f"ALTER DATABASE {name} WITH ALLOW_CONNECTIONS false")
        postgresql.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        response = service.http.get(f"/v1/sessions/{session_id}")
        assert_problem(response, 503, "database-unreachable", retryable=True)
        response = service.http.get("/readyz")
        assert response.status_code == 503
        assert not response.json()["database"]["ok"]
        assert service.http.get("/healthz").status_code == 200
        postgresql.execute(f"ALTER DATABASE {name} WITH ALLOW_CONNECTIONS true")
        assert service.http.get(f"/v1/sessions/{session_id}").status_code == 200


def _is_gateways(operations: dict[str, Any]) -> bool:
    return all(operation["tags"] == ["gateway"] for operation in operations.values())


def test_the_documentation_has_every_route_and_an_example_of_every_body(service: Service) -> None:
    document = service.http.get("/openapi.json").json()
    gateway = {path for path, operations in document["paths"].items() if _is_gateways(operations)}
    assert gateway == set(described.PATHS)
    assert set(document["paths"]) - gateway == {
        "/v1/sessions",
        "/v1/sessions/{session_id}",
        "/v1/sessions/{session_id}/entries",
        "/v1/sessions/{session_id}/suspend",
        "/v1/sessions/{session_id}/resume",
        "/v1/sessions/{session_id}/lease/renew",
        "/v1/sessions/{session_id}/forks",
        "/v1/sessions/{session_id}/rewind",
        "/v1/sessions/{session_id}/prefetch",
        "/v1/sessions/{session_id}/activity",
        "/v1/sessions/{session_id}/kv",
        "/v1/sessions/{session_id}/kv/pin",
        "/v1/sessions/{session_id}/kv/demote",
        "/v1/sessions/{session_id}/tool-calls/{call_id}",
        "/v1/sessions/{session_id}/tool-calls/{call_id}/result",
        "/v1/sessions/{session_id}/events",
        "/v1/operations/{operation_id}",
        "/v1/engines",
        "/v1/engines/{engine_id}/decisions",
        "/v1/overview",
        "/v1/overview/sessions",
        "/healthz",
        "/readyz",
        "/metrics",
    }
    schemas = document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for operation in () if path in gateway else operations.values():
            for status, response in operation["responses"].items():
                assert int(status) < 400 or "application/json" not in response.get("content", {}) or status == "503"
    bodies = [name for name, schema in schemas.items() if schema.get("additionalProperties") is False]
    assert len(bodies) >= 10
    for name in set(bodies) - {"LeaseProof", "NewEntry", "Expectation"}:
        for example in schemas[name]["examples"]:
            assert set(example) <= set(schemas[name]["properties"])
