"""Pins of sessions' KV: what the service asks of the engine, and what holds where that does not answer."""

from __future__ import annotations

import threading
from datetime import datetime
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from stage import Peer, Service, register
from test_http_api import assert_problem, created, resumed
from typer.testing import CliRunner

from agentstate.api import pins as routes
from agentstate.cli.main import app
from agentstate.fleet import pins
from agentstate.sessions import tenants
from agentstate.sessions.collection import collect
from agentstate.sql.models import kv_pins

URL = "http://127.0.0.1:30000/v1"
ACCEPTED = {"ok": True, "state": "accepted", "tier": "device", "tokens": 128, "pages": 2, "bytes": 2000}


def engine(service: Service, start_peer: Any, answer: Any = ACCEPTED) -> Peer:
    peer: Peer = start_peer(answer if callable(answer) else lambda request: answer)
    register(service.database, peer.address, base_url=URL)
    return peer


def pin(service: Service, session: str, **body: Any) -> httpx.Response:
    return service.http.post(f"/v1/sessions/{session}/kv/pin", json={"ttl_s": 60, **body})


def pinned(service: Service) -> dict[str, tuple[str, float]]:
    """What an engine reads."""
    with service.database.read() as connection:
        return pins.of_engine(connection, URL, 0)


def session_on_engine(service: Service) -> str:
    session = str(created(service)["id"])
    resumed(service, session)
    return session


def test_a_pin_is_carried_out_at_once_and_read_by_the_engine_all_the_same(service: Service, start_peer: Any) -> None:
    peer = engine(service, start_peer)
    session = session_on_engine(service)
    answer = pin(service, session, tier="device", ttl_s=7200)
    assert answer.status_code == 200, answer.text
    said = answer.json()
    assert {name: said[name] for name in ("session_id", "state", "tier", "tokens", "bytes")} == {
        "session_id": session,
        "state": "accepted",
        "tier": "device",
        "tokens": 128,
        "bytes": 2000,
    }
    (asked,) = [request for request in peer.requests if request["verb"] == "pin"]
    assert (asked["session"], asked["tier"], asked["ttl_ms"]) == (session, "device", 7_200_000)
    ((tier, for_s),) = pinned(service).values()
    assert tier == "device" and 7000 < for_s <= 7200
    assert pin(service, session, tier="nvme", ttl_s=60).status_code == 200
    ((tier, for_s),) = pinned(service).values()
    assert tier == "nvme" and for_s <= 60, "a pin takes the place of the one before"
    assert service.http.delete(f"/v1/sessions/{session}/kv/pin").status_code == 204
    assert peer.requests[-1]["ttl_ms"] == 0
    assert pinned(service) == {}
    assert service.http.delete(f"/v1/sessions/{session}/kv/pin").status_code == 204


def test_what_is_cut_is_said(service: Service, start_peer: Any) -> None:
    engine(service, start_peer)
    session = session_on_engine(service)
    said = pin(service, session, ttl_s=30 * 86400).json()
    assert said["state"] == "clipped"
    left_s = datetime.fromisoformat(said["expires_at"]).timestamp() - datetime.now().timestamp()
    assert 86_000 < left_s <= 86_400


@pytest.mark.parametrize(
    ("answer", "state", "tier"),
    [
        ({**ACCEPTED, "state": "clipped", "tier": "host"}, "clipped", "host"),
        ({**ACCEPTED, "state": "ignored", "tokens": 0, "bytes": 0}, "ignored", "device"),
        ({"ok": False, "error": "unknown verb 'pin'"}, "ignored", "device"),
        ({"ok": True, "state": "sung"}, "pending", "device"),
        ({"ok": True, **ACCEPTED, "tier": "moon"}, "pending", "device"),
    ],
    ids=["a lower tier", "too much is pinned", "an earlier release", "nonsense", "no tier"],
)
def test_the_engine_has_the_last_word(
    service: Service, start_peer: Any, answer: dict[str, Any], state: str, tier: str
) -> None:
    engine(service, start_peer, answer)
    said = pin(service, session_on_engine(service), tier="device").json()
    assert (said["state"], said["tier"]) == (state, tier)


def test_an_engine_that_does_not_answer_takes_note_later(
    service: Service, start_peer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "TIMEOUT_S", 0.05)
    asked = threading.Event()
    engine(service, start_peer, lambda request: asked.wait() and ACCEPTED)
    session = session_on_engine(service)
    assert pin(service, session).json()["state"] == "pending"
    assert len(pinned(service)) == 1
    assert service.http.delete(f"/v1/sessions/{session}/kv/pin").status_code == 204
    assert pinned(service) == {}
    asked.set()


def test_without_an_engine_a_pin_waits_for_one(service: Service) -> None:
    session = str(created(service)["id"])
    assert pin(service, session).json()["state"] == "pending"
    assert pinned(service) == {}
    with service.database.read() as connection:
        assert connection.execute(sa.select(kv_pins.c.tier)).scalars().all() == ["device"]


@pytest.mark.parametrize(
    "body", [{"ttl_s": 0}, {"ttl_s": -1}, {"ttl_s": "1"}, {"ttl_s": None}, {"tier": "moon"}], ids=str
)
def test_a_pin_that_is_none_is_refused(service: Service, body: dict[str, Any]) -> None:
    session = str(created(service)["id"])
    assert_problem(pin(service, session, **body), 422, "invalid-request")


def test_another_tenants_session_cannot_be_pinned(service: Service) -> None:
    with service.database.write() as connection:
        mine, theirs = (
            {"Authorization": f"Bearer {tenants.create_key(connection, name).secret}"} for name in ("mine", "theirs")
        )
    session = service.http.post("/v1/sessions", json={"model": "m"}, headers=mine).json()["id"]
    path = f"/v1/sessions/{session}/kv/pin"
    assert_problem(service.http.post(path, json={"ttl_s": 60}, headers=theirs), 404, "session-not-found")
    assert_problem(service.http.delete(path, headers=theirs), 404, "session-not-found")
    with service.database.read() as connection:
        assert connection.execute(sa.select(kv_pins)).all() == []
    assert service.http.post(path, json={"ttl_s": 60}, headers=mine).status_code == 200


def test_a_pin_ends_with_its_session_its_time_or_a_release(service: Service, start_peer: Any) -> None:
    engine(service, start_peer)
    sessions = [session_on_engine(service) for _ in range(2)]
    turn = resumed(service, last := str(created(service)["id"]))
    for session in (*sessions, last):
        pin(service, session)
    assert pinned(service).keys() == {*sessions, last}
    lease = {name: turn["lease"][name] for name in ("token", "epoch")}
    body = {"lease": lease, "reason": "done", "kv": "release"}
    service.http.post(f"/v1/sessions/{last}/suspend", json=body).raise_for_status()
    with service.database.write() as connection:
        connection.execute(sa.update(kv_pins).where(kv_pins.c.session_id == sessions[0]).values(until_us=1))
    assert pinned(service).keys() == {sessions[1]}
    collect(service.database, expired_after_s=3600)
    with service.database.read() as connection:
        assert connection.execute(sa.select(kv_pins.c.session_id)).scalars().all() == [sessions[1]]


def test_the_command_line_pins(service: Service, start_peer: Any) -> None:
    engine(service, start_peer)
    session = session_on_engine(service)
    run = CliRunner()
    said = run.invoke(app, ["sessions", "pin", session, "--for", "2h", "--url", service.base_url])
    assert said.stdout.startswith("accepted: 128 tokens, 0.0 MB on device until 2")
    assert 7000 < pinned(service)[session][1] <= 7200
    assert run.invoke(app, ["sessions", "unpin", session, "--url", service.base_url]).exit_code == 0
    assert pinned(service) == {}
    assert "is no time" in str(run.invoke(app, ["sessions", "pin", session, "--for", "long"]).exception)
