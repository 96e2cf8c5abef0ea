"""API keys, tenants and their limits."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from stage import MODEL, Service
from test_http_api import assert_problem

from agentstate.api import gate
from agentstate.api.server import run
from agentstate.errors import SettingsError
from agentstate.fleet import quotas
from agentstate.fleet.quotas import Quota
from agentstate.sessions import tenants
from agentstate.sessions.tenants import Tenant
from agentstate.settings import Settings


@pytest.fixture(autouse=True)
def distrustful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "TRUST_S", 0.0)


def key_for(service: Service, tenant: str) -> dict[str, str]:
    with service.database.write() as connection:
        return {"Authorization": f"Bearer {tenants.create_key(connection, tenant).secret}"}


def create(service: Service, headers: dict[str, str], **body: Any) -> httpx.Response:
    return service.http.post("/v1/sessions", json={"model": MODEL, **body}, headers=headers)


def test_once_there_is_a_key_every_call_needs_one(service: Service) -> None:
    assert create(service, {}).status_code == 201
    headers = key_for(service, "acme")
    for wrong in (
        {},
        {"Authorization": "Bearer ags_none"},
        {"Authorization": "Basic abc"},
        {"Authorization": "Bearer"},
    ):
        response = create(service, wrong)
        assert_problem(response, 401, "unauthenticated")
        assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/sessions", "/v1/sessions/s", "/v1/sessions/s/entries", "/v1/operations/o", "/v1/engines"):
        assert service.http.get(path).status_code == 401, path
    assert create(service, headers).status_code == 201
    for path in ("/healthz", "/readyz", "/metrics"):
        assert service.http.get(path).status_code == 200


def test_a_revoked_key_opens_nothing_and_revoking_the_last_does_not_open_everything(service: Service) -> None:
    headers = key_for(service, "acme")
    assert create(service, headers).status_code == 201
    with service.database.write() as connection:
        (key,) = tenants.list_keys(connection)
        tenants.revoke_key(connection, key.id)
        tenants.revoke_key(connection, key.id)
    assert create(service, headers).status_code == 401
    assert create(service, {}).status_code == 401


def test_a_tenant_sees_nothing_of_another(service: Service) -> None:
    mine, theirs = key_for(service, "mine"), key_for(service, "theirs")
    assert create(service, mine, id="same").status_code == 201
    assert create(service, theirs, id="same", metadata={"a": 1}).status_code == 201, "ids are a tenant's own"
    secret = create(service, mine).json()["id"]
    path = f"/v1/sessions/{secret}"
    any_view = {**theirs, "If-Match": "*"}
    attempts = [
        service.http.get(path, headers=theirs),
        service.http.get(f"{path}/entries", headers=theirs),
        service.http.get(f"{path}/events", headers=theirs),
        service.http.post(f"{path}/resume", headers=theirs),
        service.http.post(f"{path}/prefetch", headers=theirs, json={}),
        service.http.patch(path, headers=any_view, json={}),
        service.http.delete(path, headers=any_view),
        service.http.post(f"{path}/forks", headers=any_view, json={}),
        service.http.put(f"{path}/tool-calls/c", headers=theirs, json={"name": "t"}),
    ]
    for response in attempts:
        assert_problem(response, 404, "session-not-found")
    listed = service.http.get("/v1/sessions", headers=theirs).json()["data"]
    assert [(session["id"], session["metadata"]) for session in listed] == [("same", {"a": 1})]
    operation = service.http.post(f"{path}/prefetch", headers=mine, json={}).json()["id"]
    assert service.http.get(f"/v1/operations/{operation}", headers=mine).status_code == 200
    response = service.http.get(f"/v1/operations/{operation}", headers=theirs)
    assert_problem(response, 404, "operation-not-found")
    for headers in (mine, theirs):
        repeated = {**headers, "Idempotency-Key": "one"}
        assert create(service, repeated).headers.get("idempotency-replayed") is None, "keys are a tenant's own"


def test_the_sessions_of_a_tenant_expire_as_it_says(service: Service) -> None:
    headers = key_for(service, "acme")
    assert create(service, headers).json()["expires_at"] is None
    with service.database.write() as connection:
        tenants.put(connection, Tenant("acme", expires_in_s=3600.5, requests_per_s=None))
    session = create(service, headers).json()
    assert session["expires_at"] > session["created_at"]
    own = create(service, headers, expires_in_s=60).json()
    assert own["expires_at"] < session["expires_at"]


def test_a_tenant_that_sends_too_much_is_told_when_to_come_back(service: Service) -> None:
    headers, others = key_for(service, "acme"), key_for(service, "other")
    with service.database.write() as connection:
        tenants.put(connection, Tenant("acme", None, requests_per_s=0.01))
    assert create(service, headers).status_code == 201
    response = create(service, headers)
    problem = assert_problem(response, 429, "rate-limited", retryable=True)
    assert 1 <= int(response.headers["retry-after"]) <= 100
    assert 0 < problem["retry_after_s"] <= 100
    assert create(service, others).status_code == 201


def test_a_session_too_many_is_refused_and_nothing_else(service: Service) -> None:
    headers, others = key_for(service, "acme"), key_for(service, "other")
    first = create(service, headers).json()["id"]
    with service.database.write() as connection:
        quotas.put(connection, "tenant acme", Quota(sessions=1))
    problem = assert_problem(create(service, headers), 429, "too-many-sessions")
    assert "tenant acme may have 1 session" in problem["detail"]
    fork = service.http.post(f"/v1/sessions/{first}/forks", headers={**headers, "If-Match": "*"}, json={})
    assert_problem(fork, 429, "too-many-sessions")
    assert service.http.post(f"/v1/sessions/{first}/resume", headers=headers, json={}).status_code == 200
    assert create(service, others).status_code == 201


def test_secrets_are_not_kept(service: Service) -> None:
    with service.database.write() as connection:
        made = tenants.create_key(connection, "acme", "ci")
        stored = connection.exec_driver_sql("SELECT secret_hash FROM api_keys").scalar_one()
    assert made.secret.encode() not in bytes(stored)
    assert made.secret not in repr(made)
    assert made.secret.startswith("ags_")


def test_without_a_key_only_loopback_is_listened_on(tmp_path: Any) -> None:
    with pytest.raises(SettingsError, match="agentstate keys create"):
        run(Settings(home=tmp_path, host="0.0.0.0", port=0))


@pytest.mark.parametrize("name", ["", "a b", "../x", "é", "x" * 65])
def test_names_of_tenants_are_plain(service: Service, name: str) -> None:
    with pytest.raises(SettingsError), service.database.write() as connection:
        tenants.create_key(connection, name)
