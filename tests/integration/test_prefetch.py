"""Bringing pages back and giving them up: what the service asks of an engine, and what becomes of the answers."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from stage import NOTHING, PATIENCE_S, Answers, Service, register, stored
from test_http_api import assert_problem, created, proof, resumed

from agentstate.fleet import manifests, operations
from agentstate.fleet.manifests import Manifest

WAIT_S = PATIENCE_S


@pytest.fixture(autouse=True)
def short_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "SLICE_MS", 100)


def with_pages(service: Service) -> str:
    session_id: str = created(service)["id"]
    with service.database.write() as connection:
        manifests.save(connection, Manifest(session_id, "f1", 0, "n1", "eng_1", 64, 128, b"k" * 64, 1000))
    return session_id


def prefetch(service: Service, session_id: str, **body: Any) -> httpx.Response:
    return service.http.post(f"/v1/sessions/{session_id}/prefetch", json=body)


def test_pages_that_are_there_are_told_at_once(service: Service, start_peer: Any) -> None:
    peer = start_peer(lambda request: stored("warm"))
    register(service.database, peer.address)
    session_id = with_pages(service)
    response = prefetch(service, session_id, tier="device")
    assert response.status_code == 200
    operation = response.json()
    assert (operation["kind"], operation["state"], operation["session_id"]) == ("prefetch", "done", session_id)
    assert operation["result"] == {"state": "warm", "tokens": 128, "pages": 2, "bytes": 128000}
    assert operation["seconds"] >= 0
    (request,) = peer.requests
    assert {name: request[name] for name in ("verb", "session", "tier", "keys")} == {
        "verb": "prefetch",
        "session": session_id,
        "tier": "device",
        "keys": b"k" * 64,
    }


def test_pages_in_the_shared_store_are_brought_to_another_node(service: Service, start_peer: Any) -> None:
    peer = start_peer(lambda request: stored("warm"))
    register(service.database, peer.address, node="n2", shared_store="s3://bucket/agents")
    session_id: str = created(service)["id"]
    found = Manifest(session_id, "f1", 0, "n1", "eng_1", 64, 128, b"k" * 32 + b"l" * 32, 1000)
    for shared_tokens, keys in ((64, b"k" * 32), (128, found.keys)):
        with service.database.write() as connection:
            manifests.save(connection, replace(found, shared_tokens=shared_tokens))
        assert prefetch(service, session_id).status_code == 200
        assert peer.requests[-1]["keys"] == keys
    # Where its own node has as much, that is what is meant: it lies nearer.
    with service.database.write() as connection:
        manifests.save(connection, replace(found, node="n2", keys=b"m" * 64))
    assert prefetch(service, session_id).status_code == 200
    assert peer.requests[-1]["keys"] == b"m" * 64


def test_pages_that_another_node_of_its_machine_has_are_brought(service: Service, start_peer: Any) -> None:
    peer = start_peer(lambda request: stored("warm"))
    session_id = with_pages(service)
    register(service.database, peer.address, node="n2")
    assert prefetch(service, session_id).json()["state"] == "failed" and not peer.requests
    register(service.database, peer.address, node="n2", reads=frozenset({"n1"}))
    assert prefetch(service, session_id).json()["result"]["tokens"] == 128
    assert peer.requests[-1]["keys"] == b"k" * 64
    assert [engine["reads"] for engine in service.http.get("/v1/engines").json()["data"]] == [["n1"]]
    resumed_there = service.client.resume(session_id)
    assert (resumed_there.kv.valid, resumed_there.kv.tokens) == (True, 128)


def test_pages_that_come_are_followed(service: Service, start_peer: Any) -> None:
    answers = iter([stored("pending", 0), stored("pending", 64)])
    register(service.database, start_peer(lambda request: next(answers, stored("warm"))).address)
    response = prefetch(service, with_pages(service))
    assert response.status_code == 202
    assert response.json()["state"] in ("pending", "running", "done")
    operation = service.client.wait_operation(response.json()["id"], timeout_s=WAIT_S)
    assert operation.result == {"state": "warm", "tokens": 128, "pages": 2, "bytes": 128000}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"ok": False, "error": "unknown verb 'prefetch'"}, "unknown verb 'prefetch'"),
        (None, "did not answer"),
        ({"ok": True, "state": "hot"}, "none to a prefetch"),
    ],
    ids=["unknown verb", "silent", "nonsense"],
)
def test_an_engine_that_cannot_fails_the_operation_and_not_the_session(
    service: Service, start_peer: Any, answer: Any, reason: str
) -> None:
    register(service.database, start_peer(Answers(answer)).address)
    session_id = with_pages(service)
    response = prefetch(service, session_id)
    assert response.status_code == 202
    operation = service.client.wait_operation(response.json()["id"], timeout_s=WAIT_S)
    assert operation.state == "failed"
    assert operation.result is not None
    assert reason in operation.result["error"]
    turn = resumed(service, session_id, prefetch="host")
    assert turn["kv"]["valid"]
    operation = service.client.wait_operation(turn["kv"]["prefetch"], timeout_s=WAIT_S)
    assert operation.result is not None
    assert reason in operation.result["error"]


def test_without_an_engine_or_pages_there_is_nothing_to_bring_back(service: Service, start_peer: Any) -> None:
    session_id = with_pages(service)
    operation = prefetch(service, session_id).json()
    assert operation["result"] == {"error": "no live engine serves the session"}
    assert resumed(service, session_id, prefetch="host")["kv"]["prefetch"] is None
    register(service.database, start_peer(lambda request: stored("warm")).address)
    operation = prefetch(service, created(service)["id"]).json()
    assert operation["result"] == {"error": "the engine has stored no pages of the session"}
    assert_problem(prefetch(service, "ses_none"), 404, "session-not-found")


def test_a_prefetch_that_comes_too_late_fails(service: Service, start_peer: Any) -> None:
    register(service.database, start_peer(lambda request: stored("pending", 0)).address)
    response = prefetch(service, with_pages(service), deadline_ms=200)
    operation = service.client.wait_operation(response.json()["id"], timeout_s=WAIT_S)
    assert operation.result == {"error": "the prefetch did not end within 0.2 s"}


def test_too_many_prefetches(service: Service, start_peer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "MAX_FOLLOWED", 0)
    register(service.database, start_peer(lambda request: stored("durable")).address)
    session_id = with_pages(service)
    response = prefetch(service, session_id)
    assert_problem(response, 429, "too-many-operations", retryable=True)
    assert response.headers["retry-after"] == "1"
    turn = resumed(service, session_id, prefetch="host")
    assert turn["kv"]["prefetch"] is None
    body = {"lease": proof(turn), "reason": "done", "kv": "demote"}
    assert service.http.post(f"/v1/sessions/{session_id}/suspend", json=body).json()["kv"]["state"] == "durable"


# --- what a suspend does with the KV


def test_a_resume_starts_the_prefetch_and_does_not_wait_for_it(service: Service, start_peer: Any) -> None:
    peer = start_peer(lambda request: stored("warm"))
    register(service.database, peer.address)
    turn = resumed(service, with_pages(service), prefetch="host")
    operation = service.client.wait_operation(turn["kv"]["prefetch"], timeout_s=WAIT_S)
    assert (operation.kind, operation.state) == ("prefetch", "done")
    assert peer.requests[0]["tier"] == "host"


def test_demoting_follows_the_flush(service: Service, start_peer: Any) -> None:
    answers = {"flush": iter([stored("pending", 0)]), "demote": iter([stored("pending", 0)])}
    final = {"flush": stored("durable"), "demote": stored("demoted")}
    peer = start_peer(lambda request: next(answers[request["verb"]], final[request["verb"]]))
    register(service.database, peer.address)
    session_id = with_pages(service)
    body = {
        "lease": proof(resumed(service, session_id)),
        "reason": "tool_wait",
        "kv": "demote",
        "durable_timeout_ms": 0,
    }
    suspended = service.http.post(f"/v1/sessions/{session_id}/suspend", json=body).json()
    assert suspended["kv"]["state"] == "pending"
    operation = service.client.wait_operation(suspended["operation"], timeout_s=WAIT_S)
    assert (operation.kind, operation.state) == ("demote", "done")
    assert operation.result == {"state": "demoted", "tokens": 128, "pages": 2, "bytes": 128000}
    assert [request["verb"] for request in peer.requests] == ["flush", "flush", "demote", "demote"]


def test_what_is_not_durable_is_not_demoted(service: Service, start_peer: Any) -> None:
    peer = start_peer(lambda request: stored("partial"))
    register(service.database, peer.address)
    session_id = with_pages(service)
    body = {"lease": proof(resumed(service, session_id)), "reason": "tool_wait", "kv": "demote"}
    suspended = service.http.post(f"/v1/sessions/{session_id}/suspend", json=body).json()
    operation = service.client.wait_operation(suspended["operation"], timeout_s=WAIT_S)
    assert operation.result == {"error": "the KV is partial, not durable"}
    assert {request["verb"] for request in peer.requests} == {"flush"}


def test_what_is_released_is_neither_waited_for_nor_kept(service: Service, start_peer: Any) -> None:
    peer = start_peer(lambda request: stored("demoted"))
    register(service.database, peer.address)
    session_id = with_pages(service)
    body = {"lease": proof(resumed(service, session_id)), "reason": "done", "kv": "release"}
    suspended = service.http.post(f"/v1/sessions/{session_id}/suspend", json=body).json()
    assert suspended["kv"] == {**NOTHING, "state": "lost"}
    operation = service.client.wait_operation(suspended["operation"], timeout_s=WAIT_S)
    assert operation.state == "done"
    assert [request["verb"] for request in peer.requests] == ["demote"]
    assert resumed(service, session_id)["kv"]["tokens"] == 0


def test_a_hundred_suspends_that_wait_leave_the_service_free(service: Service, start_peer: Any) -> None:
    """More than the server has threads: all wait at the barrier, and others are answered meanwhile."""
    asked, settled = threading.Event(), threading.Event()

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        asked.set()
        settled.wait(WAIT_S)
        return stored("durable")

    register(service.database, start_peer(answer).address)
    with service.database.write() as connection:  # a hundred turns take a while: the engine stays live meanwhile
        connection.execute(sa.text("UPDATE engines SET heartbeat_us = heartbeat_us + 3600000000"))

    async def act() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=service.base_url, timeout=60, limits=limits) as client:
            ids = [(await client.post("/v1/sessions", json={"model": "m"})).json()["id"] for _ in range(100)]
            turns = [(await client.post(f"/v1/sessions/{one}/resume")).json() for one in ids]
            bodies = [{"lease": proof(turn), "reason": "done", "durable_timeout_ms": 30_000} for turn in turns]
            suspends = [
                asyncio.create_task(client.post(f"/v1/sessions/{one}/suspend", json=body))
                for one, body in zip(ids, bodies, strict=True)
            ]
            while not asked.is_set() or (await client.get(f"/v1/sessions/{ids[-1]}")).json()["status"] != "suspended":
                await asyncio.sleep(0.01)
            assert not any(suspend.done() for suspend in suspends)
            settled.set()
            return list(await asyncio.gather(*suspends))

    assert {answer.json()["kv"]["state"] for answer in asyncio.run(act())} == {"durable"}
