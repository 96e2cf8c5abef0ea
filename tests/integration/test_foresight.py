"""What engines are told of sessions that wait: by the API, by hints, and by the gateway without a call."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from engines import Asked, completion
from gateways import Gateway
from stage import PATIENCE_S, Peer, Service, register, serving, stored
from test_http_api import assert_problem, created, proof, resumed

from agentstate.api import gate
from agentstate.fleet import engines, manifests, notices, pins
from agentstate.fleet.manifests import Manifest
from agentstate.lookahead.durations import PERSON, Durations
from agentstate.lookahead.forecast import Forecast
from agentstate.settings import Settings
from agentstate.sql.models import durations


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is slow to answer has not vanished."""
    monkeypatch.setattr(notices, "ANSWER_S", PATIENCE_S)


@pytest.fixture
def peer(service: Service, start_peer: Any) -> Peer:
    peer: Peer = start_peer(lambda request: stored("durable"))
    register(service.database, peer.address)
    return peer


def told(service: Service, peer: Peer) -> list[dict[str, Any]]:
    """What the engine was told since this was asked last."""
    state = service.app.state.service
    state.waits.settle()
    while state.operations.telling():
        threading.Event().wait(0.005)
    found, peer.told[:] = list(peer.told), []
    return found


def forecast_of(notice: dict[str, Any]) -> Forecast:
    return Forecast.unpack(notice["forecast"])


def median_s(notice: dict[str, Any]) -> float:
    return forecast_of(notice).rest(0, 0.5)


def claim(service: Service, session: str, call: str, turn: Any = None, **body: Any) -> httpx.Response:
    lease = {} if turn is None else {"lease": proof(turn)}
    return service.http.put(f"/v1/sessions/{session}/tool-calls/{call}", json={"name": "search", **lease, **body})


def finish(service: Service, session: str, call: str, turn: Any = None) -> httpx.Response:
    lease = {} if turn is None else {"lease": proof(turn)}
    return service.http.put(f"/v1/sessions/{session}/tool-calls/{call}/result", json={"output": 1, **lease})


def suspend(service: Service, session: str, turn: Any, **body: Any) -> dict[str, Any]:
    body = {"lease": proof(turn), "reason": "user_wait", **body}
    response = service.http.post(f"/v1/sessions/{session}/suspend", json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def learned(service: Service, tenant: str = "default") -> Durations:
    service.app.state.service.waits.settle()
    known = Durations()
    with service.database.read() as connection:
        row = connection.execute(sa.select(durations).where(durations.c.tenant == tenant)).one_or_none()
    if row is not None:
        known.load(row.learned)
    return known


@pytest.mark.parametrize(
    ("reason", "kind", "soon"),
    [("user_wait", "person", 0.5), ("tool_wait", "other", 0.5), ("other", "other", 0.5), ("done", "other", 0.0)],
)
def test_the_reason_of_a_suspend_is_what_is_waited_for(
    service: Service, peer: Peer, reason: str, kind: str, soon: float
) -> None:
    session = created(service)["id"]
    suspend(service, session, resumed(service, session), reason=reason)
    (notice,) = told(service, peer)
    assert (notice["verb"], notice["session"], notice["kind"]) == ("foresee", session, kind)
    assert (forecast_of(notice).by(3600) >= soon) is (soon > 0) or reason == "done"
    assert forecast_of(notice).by(86_000) == 0 if reason == "done" else forecast_of(notice).by(86_000) > 0.5


def test_a_released_session_is_told_as_one(service: Service, peer: Peer) -> None:
    session = created(service)["id"]
    suspend(service, session, resumed(service, session), reason="done", kv="release")
    assert told(service, peer) == [{"verb": "release", "session": session}]


def test_a_tool_call_is_waited_for_from_its_claim_to_its_result(service: Service, peer: Peer) -> None:
    session = created(service)["id"]
    turn = resumed(service, session)
    claim(service, session, "a", turn, arguments={"command": "cd /tmp && pytest -q secret"})
    (begun,) = told(service, peer)
    assert (begun["kind"], begun["waited_ms"] >= 0) == ("tool", True)
    finish(service, session, "a", turn)
    (back,) = told(service, peer)
    assert median_s(back) < median_s(begun) or median_s(back) < 1
    known = learned(service)
    # Nothing of the command but its head is in what was learned.
    assert b"pytest" in known.dump()
    assert b"secret" not in known.dump() and b"tmp" not in known.dump()


def test_calls_side_by_side_are_waited_for_until_the_last_one(service: Service, peer: Peer) -> None:
    session = created(service)["id"]
    turn = resumed(service, session)
    claim(service, session, "a", turn)
    (one,) = told(service, peer)
    claim(service, session, "b", turn)
    (both,) = told(service, peer)
    assert forecast_of(both).by(10) < forecast_of(one).by(10)
    finish(service, session, "a", turn)
    (rest,) = told(service, peer)
    assert forecast_of(rest).by(10) == pytest.approx(forecast_of(one).by(10), abs=0.05)
    suspend(service, session, turn, reason="tool_wait")
    (waiting,) = told(service, peer)
    assert waiting["kind"] == "tool"
    # Whoever runs the tool reports its result while the session is suspended.
    finish(service, session, "b")
    (back,) = told(service, peer)
    assert median_s(back) < 1


def test_entries_that_are_claims_and_results_say_the_same(service: Service, peer: Peer) -> None:
    session = created(service)["id"]
    turn = resumed(service, session)

    def append(*entries: dict[str, Any]) -> None:
        body = {"lease": proof(turn), "entries": list(entries)}
        assert service.http.post(f"/v1/sessions/{session}/entries", json=body).status_code == 201

    append({"kind": "message", "payload": {"role": "user", "content": "hello"}})
    assert told(service, peer) == []
    append(*({"kind": "tool_call", "call_id": call, "payload": {"name": "search"}} for call in "ab"))
    assert [notice["kind"] for notice in told(service, peer)] == ["tool"]
    append(*({"kind": "tool_result", "call_id": call, "payload": {"output": 1}} for call in "ab"))
    (back,) = told(service, peer)
    assert median_s(back) < 1


def test_a_request_that_comes_ends_the_wait(service: Service, peer: Peer) -> None:
    """And how long it took is learned, of people by the time from the end of the turn."""
    session = created(service)["id"]
    for _ in range(3):
        suspend(service, session, resumed(service, session))
    told(service, peer)
    blank = Durations().forecast(PERSON, "")
    assert learned(service).forecast(PERSON, "").by(30) > blank.by(30)


def test_a_clock_that_is_set_back_teaches_nothing(service: Service, peer: Peer) -> None:
    session = created(service)["id"]
    suspend(service, session, resumed(service, session))
    with service.database.write() as connection:
        connection.execute(sa.text("UPDATE leases SET released_us = released_us + 3600000000"))
    suspend(service, session, resumed(service, session))
    told(service, peer)
    assert learned(service).dump() == Durations().dump()


def test_what_was_learned_survives_a_restart_and_is_shared(database_url: str, tmp_path: Any, start_peer: Any) -> None:
    settings = Settings(home=tmp_path, database_url=database_url, engine_timeout_s=3600)
    peer = start_peer(lambda request: stored("durable"))
    with serving(settings) as one, serving(settings) as other:
        register(one.database, peer.address)
        for number, service in enumerate((one, other) * 4):
            session = created(service)["id"]
            turn = resumed(service, session)
            claim(service, session, f"call_{number}", turn, name="slow")
            with service.database.write() as connection:
                connection.execute(sa.text("UPDATE tool_calls SET claimed_us = claimed_us - 100000000"))
            finish(service, session, f"call_{number}", turn)
            if number % 3 == 0:
                learned(service)
        for service in (one, other):
            learned(service)
        alone = Durations()
        for _ in range(8):
            alone.observe("slow", "", 100.0)
        assert learned(one).forecast("slow", "").by(50) == pytest.approx(alone.forecast("slow", "").by(50), abs=1e-3)
    with serving(settings) as again:
        session = created(again)["id"]
        turn = resumed(again, session)
        told(again, peer)
        claim(again, session, "b", turn, name="slow")
        (notice,) = told(again, peer)
        assert 50 < median_s(notice) < 200


def test_an_announced_time_is_used_once_it_has_proved_true(service: Service, peer: Peer) -> None:
    session = created(service)["id"]
    turn = resumed(service, session)

    def run(call: str, seconds: float) -> dict[str, Any]:
        claim(service, session, call, turn, expected_s=seconds)
        (notice,) = told(service, peer)
        with service.database.write() as connection:
            connection.execute(
                sa.text("UPDATE tool_calls SET claimed_us = claimed_us - :us WHERE state = 'claimed'"),
                {"us": round(seconds * 1_000_000)},
            )
        finish(service, session, call, turn)
        told(service, peer)
        return notice

    first = run("first", 3.0)
    for number in range(20):
        run(f"call_{number}", (10.0, 30.0, 400.0)[number % 3])
    trusted = run("last", 60.0)
    assert forecast_of(first).by(60) - forecast_of(first).by(20) < 0.3
    assert forecast_of(trusted).by(120) - forecast_of(trusted).by(30) > 0.5


@pytest.mark.parametrize("expected_s", [0, 1e-300, 1e300, 86_400 * 400], ids=str)
def test_an_absurd_expectation_does_no_harm(service: Service, peer: Peer, expected_s: float) -> None:
    session = created(service)["id"]
    turn = resumed(service, session)
    assert claim(service, session, "a", turn, expected_s=expected_s).status_code == 201
    assert finish(service, session, "a", turn).status_code == 200
    assert [notice["verb"] for notice in told(service, peer)][-1] == "foresee"
    assert claim(service, session, "b", turn).status_code == 201
    assert len(told(service, peer)) == 1


@pytest.mark.parametrize("raw", ["-1", "1e999", "NaN", '"soon"', "true"])
def test_what_is_no_expectation_is_refused(service: Service, raw: str) -> None:
    session = created(service)["id"]
    body = f'{{"name": "search", "expected_s": {raw}}}'
    headers = {"Content-Type": "application/json"}
    answer = service.http.put(f"/v1/sessions/{session}/tool-calls/a", content=body, headers=headers)
    assert answer.status_code in (400, 422)


# --- hints


def signal(service: Service, session: str, kind: str = "typing", **headers: str) -> httpx.Response:
    return service.http.post(f"/v1/sessions/{session}/activity", json={"kind": kind}, headers=headers)


def test_a_person_at_work_is_expected_soon(service: Service, peer: Peer) -> None:
    session = created(service)["id"]
    suspend(service, session, resumed(service, session))
    told(service, peer)
    medians_s = []
    for kind in ("opened", "typing"):
        answer = signal(service, session, kind)
        assert (answer.status_code, answer.json()) == (202, {"session_id": session, "state": "accepted"})
        (notice,) = told(service, peer)
        assert (notice["verb"], notice["kind"]) == ("foresee", "person")
        medians_s.append(median_s(notice))
    assert 60 > medians_s[0] > medians_s[1]
    assert service.client.read(session).revision == service.client.read(session).revision


def test_hints_of_sessions_that_cannot_use_them(service: Service, peer: Peer) -> None:
    session = created(service)["id"]
    assert signal(service, session).json()["state"] == "ignored", "it has had no turn"
    turn = resumed(service, session)
    assert signal(service, session).json()["state"] == "ignored", "it is being run"
    suspend(service, session, turn)
    told(service, peer)
    assert_problem(signal(service, "ses_none"), 404, "session-not-found")
    assert_problem(signal(service, session, "dancing"), 422, "invalid-request")
    service.client.delete(session, revision="*")
    assert_problem(signal(service, session), 404, "session-not-found")
    assert told(service, peer) == []


def test_another_tenants_session_is_none(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(lambda asked: asked.whole(completion("hi")))
    ann, bob = ({"Authorization": f"Bearer {gateway.key(name)}"} for name in ("ann", "bob"))
    answer = gateway.chat({"role": "user", "content": "hello"}, X_AgentState_Session="mine", **ann)
    assert answer.status_code == 200
    gateway.ended()
    told(gateway.service, gateway.peer)
    for path, body in (("activity", {"kind": "typing"}), ("prefetch", {"due_ms": 100})):
        answer = gateway.service.http.post(f"/v1/sessions/mine/{path}", json=body, headers=bob)
        assert_problem(answer, 404, "session-not-found")
    assert told(gateway.service, gateway.peer) == []
    assert signal(gateway.service, "mine", **ann).json()["state"] == "accepted"


def test_a_flood_of_hints_is_one_tenants_own_trouble(
    make_gateway: Callable[..., Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "HINTS_PER_S", 1e-6)
    gateway = make_gateway(lambda asked: asked.whole(completion("hi")))
    ann, bob = ({"Authorization": f"Bearer {gateway.key(name)}"} for name in ("ann", "bob"))
    for tenant in (ann, bob):
        assert gateway.service.http.post("/v1/sessions", json={"model": "m", "id": "s"}, headers=tenant).is_success
    assert signal(gateway.service, "s", **ann).status_code == 202
    for path, body in (("activity", {"kind": "typing"}), ("prefetch", {"due_ms": 100})):
        answer = gateway.service.http.post(f"/v1/sessions/s/{path}", json=body, headers=ann)
        assert_problem(answer, 429, "rate-limited", retryable=True)
        assert int(answer.headers["retry-after"]) >= 1
    assert signal(gateway.service, "s", **bob).status_code == 202


def test_a_prefetch_says_when_its_pages_are_needed(service: Service, peer: Peer) -> None:
    answers = iter([stored("pending", 0), stored("pending", 64)])
    peer.answer = lambda request: next(answers, stored("warm"))
    session = created(service)["id"]
    with service.database.write() as connection:
        manifests.save(connection, Manifest(session, "f1", 0, "n1", "eng_1", 64, 128, b"k" * 64, 1000))
    answer = service.http.post(f"/v1/sessions/{session}/prefetch", json={"tier": "device", "due_ms": 60_000})
    operation = service.client.wait_operation(answer.json()["id"], timeout_s=PATIENCE_S)
    assert operation.result == {"state": "warm", "tokens": 128, "pages": 2, "bytes": 128000}
    due_ms = [request["due_ms"] for request in peer.requests]
    assert 60_000 >= due_ms[0] >= due_ms[1] >= due_ms[2] > 0
    (notice,) = told(service, peer)
    assert 55 < median_s(notice) < 65
    # Without it the pages are needed at once, and nothing is said.
    service.http.post(f"/v1/sessions/{session}/prefetch", json={})
    assert "due_ms" not in peer.requests[-1]
    assert told(service, peer) == []


@pytest.mark.parametrize(
    "body", [{"due_ms": -1}, {"due_ms": 1e12}, {"due_ms": True}, {"due_ms": 2000, "deadline_ms": 1000}], ids=str
)
def test_what_is_no_due_time_is_refused(service: Service, body: dict[str, Any]) -> None:
    session = created(service)["id"]
    assert_problem(service.http.post(f"/v1/sessions/{session}/prefetch", json=body), 422, "invalid-request")


# --- the gateway, without any call


def test_the_gateway_sees_what_a_session_waits_for(make_gateway: Callable[..., Gateway]) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "run", "arguments": '{"command": "git diff x"}'}}
    answers = iter([completion(None, tool_calls=[call]), completion("fine")])
    gateway = make_gateway(lambda asked: asked.whole(next(answers)))
    said = [{"role": "user", "content": "hello"}]
    session = gateway.chat(*said).headers["x-agentstate-session"]
    gateway.ended()
    (begun,) = told(gateway.service, gateway.peer)
    assert (begun["session"], begun["kind"]) == (gateway.service.client.read(session).id, "tool")
    said += [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "fine"},
    ]
    assert gateway.chat(*said).headers["x-agentstate-session"] == session
    gateway.ended()
    (person,) = told(gateway.service, gateway.peer)
    assert person["kind"] == "person"
    assert b"git diff" in learned(gateway.service).dump()


def hinted(gateway: Gateway, actions: list[Any], **headers: str) -> httpx.Response:
    hints = {"protocol_version": "0.1", "message_id": "m", "actions": actions}
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "kv_hints": hints}
    answer = gateway.post("/v1/chat/completions", body, **headers)
    gateway.ended()
    return answer


def action(kind: str, action_id: str = "a", **payload: Any) -> dict[str, Any]:
    return {"action_id": action_id, "action_type": kind, "action_version": "1.0", "payload": payload}


def test_hints_of_a_request_are_told_and_answered(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(lambda asked: asked.whole(completion("hi")))
    answer = hinted(gateway, [action("kv.retain", "turn 17", duration=60), action("sing", "b")])
    assert answer.headers["x-agentstate-kv-hints"] == "turn%2017=accepted, b=ignored"
    assert "kv_hints" not in gateway.engine.asked[0].document
    (notice,) = told(gateway.service, gateway.peer)[-1:]
    assert 25 < median_s(notice) < 35
    odd = hinted(gateway, [action("kv.deref", "\r\nx: y" + "z" * 1000)])
    assert odd.headers["x-agentstate-kv-hints"].startswith("%0D%0Ax%3A%20yzzz")
    assert len(odd.headers["x-agentstate-kv-hints"]) < 100
    assert told(gateway.service, gateway.peer)[-1]["verb"] == "release"
    assert "x-agentstate-kv-hints" not in gateway.chat({"role": "user", "content": "hello"}).headers


@pytest.mark.parametrize(("seconds", "answer"), [(60, "accepted"), (1e6, "clipped")])
def test_a_hint_pins_the_session_of_its_request(
    make_gateway: Callable[..., Gateway], seconds: float, answer: str
) -> None:
    gateway = make_gateway(lambda asked: asked.whole(completion("hi")), pin_max_s=600.0)
    said = hinted(gateway, [action("kv.pin", duration=seconds)])
    assert said.headers["x-agentstate-kv-hints"] == f"a={answer}"
    (asked,) = [request for request in gateway.peer.requests if request["verb"] == "pin"]
    assert (asked["tier"], asked["ttl_ms"]) == ("device", min(seconds, 600) * 1000)
    with gateway.service.database.read() as connection:
        pinned = pins.of_engine(connection, gateway.engine.base_url, 0)
    assert list(pinned) == [asked["session"]]


def test_a_hint_pins_a_session_whose_engine_has_ended(make_gateway: Callable[..., Gateway]) -> None:
    def engine_ends(asked: Asked) -> None:
        with gateway.service.database.write() as connection:
            for engine in engines.registered(connection):
                engines.unregister(connection, engine.id)
        asked.whole(completion("hi"))

    gateway = make_gateway(engine_ends)
    hinted(gateway, [action("kv.pin", duration=60)])
    assert gateway.peer.requests == []
    with gateway.service.database.read() as connection:
        assert len(pins.of_engine(connection, gateway.engine.base_url, 0)) == 1


def test_hints_of_a_request_without_a_session_are_ignored(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(lambda asked: asked.whole(completion("hi")), gateway_guess=False)
    answer = hinted(gateway, [action("kv.retain", duration=60)])
    assert answer.headers["x-agentstate-kv-hints"] == "a=ignored"
    assert told(gateway.service, gateway.peer) == []


def test_hints_are_about_the_requests_own_session(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(lambda asked: asked.whole(completion("hi")))
    ann, bob = ({"Authorization": f"Bearer {gateway.key(name)}"} for name in ("ann", "bob"))
    victim = hinted(gateway, [], X_AgentState_Session="mine", **ann)
    assert victim.headers["x-agentstate-session"] == "mine"
    told(gateway.service, gateway.peer)
    mine = {"session_id": "mine", "scope": "mine", "session": "mine"}
    hinted(gateway, [action("kv.deref", **mine)], X_AgentState_Session="his", **bob)
    sessions = {notice["session"] for notice in told(gateway.service, gateway.peer)}
    assert sessions == {gateway.turn(gateway.engine.asked[-1])}
    assert sessions != {gateway.turn(gateway.engine.asked[0])}


def test_hints_that_are_none_are_refused(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(lambda asked: asked.whole(completion("hi")))
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "kv_hints": {"actions": []}}
    answer = gateway.post("/v1/chat/completions", body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "kv_hints")
    assert gateway.engine.asked == []


# --- how true forecasts come


def test_how_true_forecasts_came_is_exported_without_telling_tenants_apart(service: Service, peer: Peer) -> None:
    session = created(service)["id"]
    turn = resumed(service, session)
    claim(service, session, "c", turn, expected_s=5.0)
    finish(service, session, "c", turn)
    suspend(service, session, turn)
    resumed(service, session)
    told(service, peer)
    samples = dict(
        line.rsplit(" ", 1) for line in service.http.get("/metrics").text.splitlines() if not line.startswith("#")
    )
    deciles = [float(samples[f'agentstate_forecast_waits_total{{decile="{n}",kind="person"}}']) for n in range(1, 11)]
    assert sum(deciles) == 1
    assert float(samples['agentstate_announced_waits_total{kind="tool"}']) == 1
    for by in ("announced", "learned"):
        assert float(samples[f'agentstate_forecast_log_loss_total{{by="{by}",kind="tool"}}']) > 0
    assert not any("tenant=" in name for name in samples)


# --- engines


def test_an_engine_that_does_not_know_the_verb_is_told_once(service: Service, peer: Peer) -> None:
    peer.notice = {"ok": False, "error": "unknown verb 'foresee'"}
    for number in range(3):
        session = created(service)["id"]
        assert suspend(service, session, resumed(service, session))["kv"]["state"] == "durable"
        assert len(told(service, peer)) == (not number)
    assert service.app.state.service.operations.told == {"unknown": 3}
    assert 'agentstate_notices_total{state="unknown"} 3.0' in service.http.get("/metrics").text


def test_an_engine_that_is_silent_is_left_alone(service: Service, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "ANSWER_S", 0.2)
    peer.notice = None
    for _ in range(3):
        session = created(service)["id"]
        assert suspend(service, session, resumed(service, session))["kv"]["state"] == "durable"
        told(service, peer)
    assert service.app.state.service.operations.told == {"unreachable": 3}


def test_without_foresight_nobody_is_told(database_url: str, tmp_path: Any, start_peer: Any) -> None:
    settings = Settings(home=tmp_path, database_url=database_url, engine_timeout_s=3600, foresight=False)
    peer = start_peer(lambda request: stored("durable"))
    with serving(settings) as service:
        register(service.database, peer.address)
        session = created(service)["id"]
        turn = resumed(service, session)
        claim(service, session, "a", turn)
        finish(service, session, "a", turn)
        suspend(service, session, turn)
        assert signal(service, session).json()["state"] == "ignored"
        assert service.app.state.service.operations.told == {}
    assert peer.told == []
