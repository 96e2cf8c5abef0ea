"""`/v1/overview`: what there is and what is wrong, for each role and tenant."""

from __future__ import annotations

from typing import Any

import pytest
from stage import MODEL, Service, register
from test_console import STAT, answering, append, key, make, message, suspend
from test_http_api import assert_problem

from agentstate.api import gate
from agentstate.api.console import reading, snapshot
from agentstate.fleet import quotas
from agentstate.fleet.quotas import Quota
from agentstate.sessions.tenants import Role


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "TRUST_S", 0.0)
    monkeypatch.setattr(snapshot, "ASK_S", 300)
    monkeypatch.setattr(snapshot, "PERIOD_S", 0.0)
    monkeypatch.setattr(snapshot, "STALE_S", 0.0)


def bearer(service: Service, tenant: str, role: Role) -> dict[str, str]:
    return {"Authorization": f"Bearer {key(service, tenant, role)}"}


def overview(service: Service, headers: dict[str, str]) -> Any:
    return service.http.get("/v1/overview", headers=headers).raise_for_status().json()


def test_each_role_sees_what_is_its_own(service: Service, start_peer: Any) -> None:
    engine = register(service.database, start_peer(answering).address)
    admin = bearer(service, "mine", Role.ADMIN)
    with service.database.write() as connection:
        quotas.put(connection, "tenant mine", Quota(device_bytes=20, sessions=9))
    make(service, admin, "s")
    append(service, admin, "s", message("hello"))
    make(service, admin, "t")
    found = overview(service, admin)
    assert (found["tenant"], found["sessions"]) == ("mine", {"all": 2, "running": 1, "lapsed": 0})
    assert found["tiers"]["device"] == {"bytes": 11_000_000, "limit": 20}
    assert found["tiers"]["host"] == {"bytes": None, "limit": None}
    (one,) = found["engines"]
    assert (one["id"], one["live"], one["ranks"], one["silent"]) == (engine.id, True, 1, None)
    assert one["stored_bytes"] == STAT["store"]["bytes"]
    assert found["prompt_tokens"] == {"device": 300, "recomputed": 100}
    (mine,) = (tenant for tenant in found["tenants"] if tenant["id"] == "mine")
    assert (mine["sessions"], mine["session_limit"], mine["tiers"]["device"]["limit"]) == (2, 9, 20)
    for role in (Role.VIEWER, Role.OPERATOR):
        seen = overview(service, bearer(service, "theirs", role))
        assert (seen["tenant"], seen["sessions"]["all"], seen["tenants"]) == ("theirs", 0, None)
        assert seen["tiers"]["device"] == {"bytes": 22_000_000, "limit": None}
        assert seen["prompt_tokens"] is None and seen["engines"][0]["stored_bytes"] is None
        assert "mine" not in str(seen) and service.http.get("/v1/overview/sessions").status_code == 401
        assert service.http.get("/v1/overview/sessions", headers=bearer(service, "theirs", role)).json()["data"] == []


def test_what_is_wrong_is_said(service: Service, start_peer: Any) -> None:
    assert "No engine is live" in overview(service, {})["alarms"][0]
    off = "the drive is full"
    register(service.database, start_peer(lambda request: {**STAT, "off": off}).address)
    found = overview(service, {})
    assert found["engines"][0]["off"] == off and any(off in alarm for alarm in found["alarms"])


def test_sessions_go_on_from_list_to_list(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PAGE", 2)
    for name in ("a-1", "a-2", "b-1", "a-3", "c"):
        make(service, {}, name)
    lease = append(service, {}, "b-1", message("hello"))
    suspend(service, {}, "b-1", lease)
    append(service, {}, "c", message("hello"))

    def all_of(**choice: str) -> list[str]:
        found: list[str] = []
        after = None
        while True:
            page = service.client.session_overviews(**choice, after=after)
            assert len(page.data) <= 2
            found += [one.id for one in page.data]
            if (after := page.next) is None:
                return found

    assert all_of() == ["b-1", "c", "a-3", "a-2", "a-1"]
    assert all_of(sort="oldest") == ["a-1", "a-2", "a-3", "c", "b-1"]
    assert all_of(sort="id") == ["a-1", "a-2", "a-3", "b-1", "c"]
    assert all_of(search="a-") == ["a-1", "a-2", "a-3"]
    assert all_of(state="running") == ["c"] and all_of(state="suspended") == ["b-1"]
    (waiting,) = service.client.session_overviews(search="b").data
    assert (waiting.state, waiting.waits_for, waiting.model) == ("suspended", "user_wait", MODEL)


def test_what_is_asked_wrongly_is_refused(service: Service) -> None:
    for wrong in ({"state": "asleep"}, {"sort": "bytes"}, {"search": "a\0b"}):
        assert_problem(service.http.get("/v1/overview/sessions", params=wrong), 422, "invalid-request")
    # What is no place begins at the beginning.
    for place in ("[no", r'["\ud800"]', r'["\u0000"]', "[1]", "[" * 2000):
        params = {"after": place, "sort": "id"}
        assert service.http.get("/v1/overview/sessions", params=params).status_code == 200, place
