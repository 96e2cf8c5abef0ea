"""What keys may do, on every route."""

from __future__ import annotations

import json
from typing import Any

import pytest
from stage import MODEL, Service
from test_http_api import assert_problem
from typer.testing import CliRunner

from agentstate.api import gate
from agentstate.cli.main import app
from agentstate.errors import KeyNotFound, SettingsError
from agentstate.sessions import tenants
from agentstate.sessions.tenants import Role


@pytest.fixture(autouse=True)
def distrustful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "TRUST_S", 0.0)


def key_of(service: Service, role: Role, tenant: str = "acme") -> dict[str, str]:
    with service.database.write() as connection:
        return {"Authorization": f"Bearer {tenants.create_key(connection, tenant, role=role).secret}"}


def test_a_viewer_reads_on_every_route_and_writes_on_none(service: Service) -> None:
    viewer, operator = key_of(service, Role.VIEWER), key_of(service, Role.OPERATOR)
    service.http.post("/v1/sessions", json={"id": "s", "model": MODEL}, headers=operator).raise_for_status()
    tried: dict[str, list[str]] = {"GET": [], "other": []}
    for path, operations in service.http.get("/openapi.json").json()["paths"].items():
        if not path.startswith("/v1") and path != "/tokenize" or path.endswith("/events"):
            continue
        for method in operations:
            where = path.replace("{session_id}", "s").replace("{", "").replace("}", "")
            answer = service.http.request(method.upper(), where, headers={**viewer, "If-Match": "*"}, json={})
            if method == "get":
                assert answer.status_code not in (401, 403), path
                tried["GET"].append(path)
            else:
                assert answer.status_code == 403, (method, path)
                assert "not-allowed" in answer.text or "not_allowed" in answer.text or "viewer" in answer.text
                tried["other"].append(path)
    assert len(tried["GET"]) > 8 and len(tried["other"]) > 20
    assert service.http.get("/v1/sessions/s", headers=viewer).json()["revision"] == "1"
    assert_problem(service.http.delete("/v1/sessions/s", headers=viewer), 403, "not-allowed")
    assert service.http.delete("/v1/sessions/s", headers={**operator, "If-Match": "*"}).status_code == 204


@pytest.mark.parametrize("role", [Role.OPERATOR, Role.ADMIN])
def test_the_other_roles_write(service: Service, role: Role) -> None:
    headers = key_of(service, role)
    assert service.http.post("/v1/sessions", json={"model": MODEL}, headers=headers).status_code == 201


def test_a_role_that_changes_holds_at_once(service: Service) -> None:
    headers = key_of(service, Role.OPERATOR)
    with service.database.write() as connection:
        (key,) = tenants.list_keys(connection)
        tenants.set_role(connection, key.id, Role.VIEWER)
    assert service.http.post("/v1/sessions", json={"model": MODEL}, headers=headers).status_code == 403
    with service.database.write() as connection, pytest.raises(KeyNotFound):
        tenants.set_role(connection, "key_none", Role.VIEWER)


def test_a_role_of_a_later_release_reads(service: Service) -> None:
    headers = key_of(service, Role.OPERATOR)
    with service.database.write() as connection:
        connection.exec_driver_sql("UPDATE api_keys SET role = 'auditor'")
    assert service.http.get("/v1/sessions", headers=headers).status_code == 200
    assert service.http.post("/v1/sessions", json={"model": MODEL}, headers=headers).status_code == 403


def test_the_command_line_gives_and_changes_roles(monkeypatch: pytest.MonkeyPatch, database_url: str) -> None:
    monkeypatch.setenv("AGENTSTATE_DATABASE_URL", database_url)

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["keys", *arguments])

    assert run("create", "--tenant", "a").exit_code == 0
    assert run("create", "--tenant", "b", "--role", "viewer").exit_code == 0
    rows = json.loads(run("list", "--json").stdout)
    assert [row["role"] for row in rows] == ["operator", "viewer"]
    assert run("role", rows[0]["id"], "admin").exit_code == 0
    assert json.loads(run("list", "--json").stdout)[0]["role"] == "admin"
    wrong = run("create", "--role", "root")
    assert isinstance(wrong.exception, SettingsError) and "viewer, operator, admin" in str(wrong.exception)
