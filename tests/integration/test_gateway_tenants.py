"""Who may ask the gateway, and what tenants learn of each other; and a database that does not answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from engines import Asked, completion, scripted
from gateways import HELLO, Gateway
from postgres import server
from prometheus_client import generate_latest
from stage import MODEL, PATIENCE_S, Peer, register, serving, stored

from agentstate.api import gate
from agentstate.api.gateway import turns
from agentstate.errors import SessionBusy
from agentstate.fleet import quotas
from agentstate.fleet.quotas import Quota
from agentstate.sessions.verbs import Sessions
from agentstate.settings import Settings
from agentstate.sql.database import Database


def says_hi(asked: Asked) -> None:
    asked.whole(completion("hi"))


def authorized(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_a_key_is_needed_once_there_is_one(
    make_gateway: Callable[..., Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "TRUST_S", 0.0)
    gateway = make_gateway(says_hi)
    key = gateway.key("acme")
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize"):
        for wrong in ({}, authorized("ags_none"), {"x_api_key": "ags_none"}):
            refused = gateway.post(path, HELLO, **wrong)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "unauthenticated"), path
            assert refused.headers["www-authenticate"] == "Bearer"
    refused = gateway.post("/v1/messages", HELLO)
    assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
    assert gateway.service.http.get("/v1/models").status_code == 401
    assert gateway.engine.asked == []
    assert gateway.post("/v1/chat/completions", HELLO, **authorized(key)).status_code == 200
    # Anthropic's clients send it so.
    assert gateway.post("/v1/chat/completions", HELLO, x_api_key=key).status_code == 200
    for asked in gateway.engine.asked:
        assert key not in str(asked.headers)


def test_without_keys_the_gateway_is_for_this_machine(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(says_hi)
    for header in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}):
        refused = gateway.post("/v1/chat/completions", HELLO, **header)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "host_refused")
    assert gateway.engine.asked == []


def test_tenants_have_sessions_and_salts_of_their_own(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(lambda asked: asked.whole(completion("hi") if "messages" in asked.document else {}))
    keys = {tenant: gateway.key(tenant) for tenant in ("one", "two")}
    said = [{"role": "user", "content": "hello"}]
    answers: dict[tuple[str, int], str] = {}
    for tenant, key in keys.items():
        for turn in range(2):
            sent = said if turn == 0 else [*said, {"role": "assistant", "content": "hi"}, *said]
            answer = gateway.chat(*sent, X_Session_Id="same", **authorized(key))
            answers[tenant, turn] = answer.headers["x-agentstate-session"]
            gateway.ended()
        gateway.post("/v1/embeddings", {"model": MODEL, "input": "a"}, **authorized(key))
    assert set(answers.values()) == {"opencode:same"}  # ids are a tenant's own
    sessions = [gateway.turn(asked) for asked in gateway.engine.asked]
    assert sessions[0] == sessions[1] != sessions[3] == sessions[4]
    salts = [asked.headers["x-agentstate-salt"] for asked in gateway.engine.asked]
    assert len(set(salts[:3])) == len(set(salts[3:])) == 1
    assert salts[0] != salts[3]


def test_a_session_too_many_is_refused_to_who_names_it_and_others_are_served_without(
    make_gateway: Callable[..., Gateway],
) -> None:
    gateway = make_gateway(says_hi)
    key = gateway.key("acme")
    with gateway.service.database.write() as connection:
        quotas.put(connection, "tenant acme", Quota(sessions=0))
    refused = gateway.chat({"role": "user", "content": "hi"}, X_AgentState_Session="mine", **authorized(key))
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["type"]) == (429, "too_many_sessions", "rate_limit_error")
    assert refused.headers["x-should-retry"] == "false"
    refused = gateway.post("/v1/responses", {"model": MODEL, "input": "hi", "store": True}, **authorized(key))
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_sessions")
    assert gateway.engine.asked == []
    served = gateway.chat({"role": "user", "content": "hello"}, **authorized(key))
    assert (served.status_code, served.headers.get("x-agentstate-session")) == (200, None)
    assert gateway.engine.asked[0].headers["x-agentstate-salt"], "it has its tenant's salt all the same"
    assert gateway.service.http.get("/v1/sessions", headers=authorized(key)).json()["data"] == []


def test_a_tenant_cannot_go_on_with_anothers_conversation(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(says_hi)
    mine, theirs = gateway.key("mine"), gateway.key("theirs")
    said = [{"role": "user", "content": "hello"}]
    session = gateway.chat(*said, **authorized(mine)).headers["x-agentstate-session"]
    gateway.ended()
    going_on = [*said, {"role": "assistant", "content": "hi"}, *said]
    assert gateway.chat(*going_on, **authorized(theirs)).headers["x-agentstate-session"] != session
    gateway.ended()
    named = gateway.chat(*going_on, X_AgentState_Session=session, **authorized(theirs))
    assert named.headers["x-agentstate-session"] == session  # a session of their own, of that name
    gateway.ended()
    assert len({gateway.turn(asked) for asked in gateway.engine.asked}) == 3
    assert gateway.chat(*going_on, **authorized(mine)).headers["x-agentstate-session"] == session
    gateway.ended()


def test_the_streams_of_a_tenant_are_capped(make_gateway: Callable[..., Gateway]) -> None:
    going, go_on = threading.Event(), threading.Event()

    def script(asked: Asked) -> None:
        if not going.is_set():
            going.set()
            go_on.wait()
        says_hi(asked)

    gateway = make_gateway(script, gateway_streams=1)
    one, two = gateway.key("one"), gateway.key("two")
    with httpx.Client(base_url=gateway.service.base_url, timeout=PATIENCE_S) as other:
        thread = threading.Thread(
            target=lambda: other.post("/v1/chat/completions", json=HELLO, headers=authorized(one))
        )
        thread.start()
        going.wait()
        refused = gateway.post("/v1/chat/completions", HELLO, **authorized(one))
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_streams")
        assert refused.headers["retry-after"]
        assert gateway.post("/v1/chat/completions", HELLO, **authorized(two)).status_code == 200
        go_on.set()
        thread.join()
    assert gateway.post("/v1/chat/completions", HELLO, **authorized(one)).status_code == 200


@pytest.fixture
def beside_a_server(
    tmp_path: Path, start_peer: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[Gateway, Any]]]:
    """A gateway whose PostgreSQL can be stopped, and that trusts what it knows of keys and salts for no time."""
    monkeypatch.setattr(gate, "TRUST_S", 0.0)
    monkeypatch.setattr(turns, "SALT_S", 0.0)
    with ExitStack() as ending:

        def make(**settings: Any) -> tuple[Gateway, Any]:
            database = ending.enter_context(closing(server()))
            url = f"postgresql+psycopg://postgres@/postgres?host={database.directory}"
            migrated = Database(url)
            migrated.upgrade()
            migrated.close()
            engine = ending.enter_context(scripted(says_hi))
            peer = start_peer(lambda request: stored("durable"))
            own = {"home": tmp_path, "database_url": url, "engine_timeout_s": 3600, **settings}
            service = ending.enter_context(serving(Settings(**own)))
            register(service.database, peer.address, base_url=engine.base_url)
            return Gateway(service, engine, peer), database

        yield make


def test_the_gateway_goes_on_without_its_database(beside_a_server: Callable[..., tuple[Gateway, Any]]) -> None:
    gateway, database = beside_a_server()
    known, unknown = gateway.key("known"), gateway.key("unknown")
    before = gateway.post("/v1/chat/completions", HELLO, **authorized(known))
    assert before.headers["x-agentstate-session"]
    gateway.ended()
    database.stop()
    during = gateway.post("/v1/chat/completions", HELLO, **authorized(known))
    assert (during.status_code, during.json()) == (200, completion("hi"))
    assert during.headers["x-agentstate-degraded"] == "database"
    assert "x-agentstate-session" not in during.headers
    salts = {asked.headers["x-agentstate-salt"] for asked in gateway.engine.asked}
    assert len(salts) == 1
    assert "x-agentstate-turn" not in gateway.engine.asked[-1].headers
    refused = gateway.post("/v1/chat/completions", HELLO, **authorized(unknown))
    assert (refused.status_code, refused.headers["x-should-retry"]) == (503, "true")
    assert refused.json()["error"]["code"] == "database_unreachable"
    exposed = generate_latest(gateway.service.app.state.service.metrics.registry)
    assert b'agentstate_gateway_requests_total{api="chat",session="degraded"} 1.0' in exposed
    database.start()
    after = gateway.post("/v1/chat/completions", HELLO, **authorized(known))
    assert after.headers["x-agentstate-session"]
    gateway.ended()


def test_a_gateway_that_is_not_to_go_on_refuses(beside_a_server: Callable[..., tuple[Gateway, Any]]) -> None:
    gateway, database = beside_a_server(gateway_fail_open=False)
    key = gateway.key("known")
    assert gateway.post("/v1/chat/completions", HELLO, **authorized(key)).status_code == 200
    gateway.ended()
    database.stop()
    refused = gateway.post("/v1/chat/completions", HELLO, **authorized(key))
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "database_unreachable")
    database.start()


@pytest.mark.parametrize("fail_open", [True, False])
def test_a_salt_that_was_just_read_does_not_hide_that_the_database_is_gone(
    beside_a_server: Callable[..., tuple[Gateway, Any]], monkeypatch: pytest.MonkeyPatch, fail_open: bool
) -> None:
    gateway, database = beside_a_server(gateway_fail_open=fail_open)
    monkeypatch.setattr(gate, "TRUST_S", 3600.0)
    monkeypatch.setattr(turns, "SALT_S", 3600.0)
    key = gateway.key("known")
    assert gateway.post("/v1/chat/completions", HELLO, **authorized(key)).status_code == 200
    gateway.ended()
    database.stop()
    during = gateway.post("/v1/chat/completions", HELLO, **authorized(key))
    if fail_open:
        assert (during.status_code, during.headers.get("x-agentstate-degraded")) == (200, "database")
    else:
        assert (during.status_code, during.json()["error"]["code"]) == (503, "database_unreachable")
    database.start()


def test_who_came_before_the_first_key_is_a_stranger_after_it(
    beside_a_server: Callable[..., tuple[Gateway, Any]],
) -> None:
    gateway, database = beside_a_server()
    assert gateway.post("/v1/chat/completions", HELLO).status_code == 200
    key = gateway.key("known")
    assert gateway.post("/v1/chat/completions", HELLO, **authorized(key)).status_code == 200
    gateway.ended()
    database.stop()
    assert gateway.post("/v1/chat/completions", HELLO).status_code == 503
    assert gateway.post("/v1/chat/completions", HELLO, **authorized(key)).status_code == 200
    database.start()


def test_wrong_keys_do_not_make_right_ones_be_forgotten(
    beside_a_server: Callable[..., tuple[Gateway, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "MAX_REMEMBERED", 3)
    gateway, database = beside_a_server()
    key = gateway.key("known")
    assert gateway.post("/v1/chat/completions", HELLO, **authorized(key)).status_code == 200
    for number in range(4):
        assert gateway.post("/v1/chat/completions", HELLO, **authorized(f"ags_{number}")).status_code == 401
    gateway.ended()
    database.stop()
    assert gateway.post("/v1/chat/completions", HELLO, **authorized(key)).status_code == 200
    database.start()


def test_a_turn_that_cannot_be_ended_is_ended_later(beside_a_server: Callable[..., tuple[Gateway, Any]]) -> None:
    gateway, database = beside_a_server()
    going, go_on = threading.Event(), threading.Event()

    def script(asked: Asked) -> None:
        going.set()
        go_on.wait()
        says_hi(asked)

    gateway.engine.script = script
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(gateway.post("/v1/chat/completions", HELLO)))
    thread.start()
    going.wait()
    database.stop()
    go_on.set()
    thread.join()
    assert answers[0].status_code == 200
    database.start()
    gateway.ended()
    (session,) = gateway.sessions()
    assert (session.id, session.status) == (answers[0].headers["x-agentstate-session"], "suspended")


def test_any_gateway_serves_any_session(
    tmp_path: Path, start_peer: Callable[..., Peer], database_url: str, make_gateway: Callable[..., Gateway]
) -> None:
    first = make_gateway(says_hi)
    settings = Settings(home=tmp_path, database_url=database_url, engine_timeout_s=3600)
    with serving(settings) as service:
        second = Gateway(service, first.engine, first.peer)
        said: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
        sessions = set()
        for gateway in (first, second, first, second):
            sessions.add(gateway.chat(*said).headers["x-agentstate-session"])
            gateway.ended()
            said += [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "on"}]
    assert len(sessions) == 1
    assert len({first.turn(asked) for asked in first.engine.asked}) == 1


@pytest.mark.parametrize("harness", [{}, {"X_Session_Id": "s1"}])
def test_a_guessed_session_whose_turn_another_gateway_is_ending_is_waited_for(
    tmp_path: Path,
    database_url: str,
    make_gateway: Callable[..., Gateway],
    monkeypatch: pytest.MonkeyPatch,
    harness: dict[str, str],
) -> None:
    first = make_gateway(says_hi)
    hold, may_end = threading.Event(), threading.Event()
    begin, end = Sessions.begin, turns.Turns.end

    def begun(*args: Any, **options: Any) -> Any:
        found = begin(*args, **options)
        may_end.set()  # the second gateway has met the first one's lease
        return found

    async def ended(*args: Any) -> None:
        if hold.is_set():
            await asyncio.to_thread(may_end.wait, PATIENCE_S)
        await end(*args)

    monkeypatch.setattr(turns, "ENDING_S", PATIENCE_S)
    with serving(Settings(home=tmp_path, database_url=database_url, engine_timeout_s=3600)) as service:
        second = Gateway(service, first.engine, first.peer)
        said: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
        on = [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "on"}]
        answers = [first.chat(*said, **harness)]
        first.ended()
        monkeypatch.setattr(turns.Turns, "end", ended)
        hold.set()
        answers.append(first.chat(*said, *on, **harness))
        monkeypatch.setattr(Sessions, "begin", begun)
        answers.append(second.chat(*said, *on, *on, **harness))
        first.ended()
        second.ended()
    assert len({answer.headers["x-agentstate-session"] for answer in answers}) == 1
    assert len({first.turn(asked) for asked in first.engine.asked}) == 1


@pytest.mark.parametrize("harness", [{}, {"X_Session_Id": "s1"}])
def test_a_request_beside_the_turn_of_another_gateway_waits_for_nothing(
    tmp_path: Path,
    database_url: str,
    make_gateway: Callable[..., Gateway],
    monkeypatch: pytest.MonkeyPatch,
    harness: dict[str, str],
) -> None:
    """A retry, or one of several samples."""
    going, go_on = threading.Event(), threading.Event()

    def script(asked: Asked) -> None:
        if len(first.engine.asked) == 2:
            going.set()
            go_on.wait()
        says_hi(asked)

    first = make_gateway(script)
    monkeypatch.setattr(turns, "ENDING_S", 10 * PATIENCE_S)  # longer than the client's patience
    with serving(Settings(home=tmp_path, database_url=database_url, engine_timeout_s=3600)) as service:
        second = Gateway(service, first.engine, first.peer)
        said: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
        one = first.chat(*said, **harness).headers["x-agentstate-session"]
        first.ended()
        said += [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "on"}]
        running = threading.Thread(target=lambda: first.chat(*said, **harness))
        running.start()
        going.wait()
        beside = second.chat(*said, **harness)
        go_on.set()
        running.join()
        first.ended()
        second.ended()
    assert (beside.status_code, beside.headers["x-agentstate-session"] != one) == (200, True)


def test_a_named_session_whose_turn_another_gateway_is_ending_is_waited_for(
    tmp_path: Path,
    database_url: str,
    make_gateway: Callable[..., Gateway],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = make_gateway(says_hi)
    may_end = threading.Event()
    begin, end = Sessions.begin, turns.Turns.end

    def begun(*args: Any, **options: Any) -> Any:
        try:
            return begin(*args, **options)
        except SessionBusy:
            may_end.set()  # the second gateway has met the first one's lease
            raise

    async def ended(*args: Any) -> None:
        await asyncio.to_thread(may_end.wait, PATIENCE_S)
        await end(*args)

    monkeypatch.setattr(turns, "ENDING_S", PATIENCE_S)
    monkeypatch.setattr(Sessions, "begin", begun)
    monkeypatch.setattr(turns.Turns, "end", ended)
    with serving(Settings(home=tmp_path, database_url=database_url, engine_timeout_s=3600)) as service:
        second = Gateway(service, first.engine, first.peer)
        answers = [gateway.chat(*HELLO["messages"], X_AgentState_Session="s") for gateway in (first, second)]
        first.ended()
        second.ended()
    assert [answer.status_code for answer in answers] == [200, 200]
