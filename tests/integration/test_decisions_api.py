"""What engines have decided, as the service tells it to tenants and to operators."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa
from documented import checked
from stage import MODEL, Service, register
from test_http_api import assert_problem, created
from test_tenants import create, key_for
from typer.testing import CliRunner

from agentstate.api import gate
from agentstate.cli.main import app
from agentstate.errors import EngineNotFound
from agentstate.fleet import decisions
from agentstate.sql.models import sessions

T_US = 1_767_605_472_512_000


@pytest.fixture(autouse=True)
def distrustful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "TRUST_S", 0.0)
    monkeypatch.setattr(decisions, "READ_S", 0.0)


def decided(number: int, session: str, outcome: str = "begun") -> dict[str, Any]:
    of = {"decision": "fetch", "outcome": outcome, "tokens": 128, "index": 0.5, "displaced": None}
    return {"id": T_US + number, "session": session, **of}


def engine(service: Service, start_peer: Any, made: list[dict[str, Any]]) -> Any:
    """An engine that has decided this, of which it tells two at a time."""

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        newer = [one for one in made if one["id"] > request["after"]]
        return {"ok": True, "decisions": newer[:2], "more": len(newer) > 2, "missed": False}

    return register(service.database, start_peer(answer).address)


def uid(service: Service, tenant: str, name: str) -> str:
    with service.database.read() as connection:
        query = sa.select(sessions.c.id).where(sessions.c.tenant == tenant, sessions.c.name == name)
        return str(connection.execute(query).scalar_one())


def test_a_tenant_sees_what_was_decided_about_its_own_sessions(service: Service, start_peer: Any) -> None:
    mine, theirs = key_for(service, "mine"), key_for(service, "theirs")
    for headers in (mine, theirs):
        assert create(service, headers, id="same").status_code == 201
    of_mine, of_theirs = (uid(service, tenant, "same") for tenant in ("mine", "theirs"))
    made = [
        decided(1, of_theirs),
        decided(2, of_mine),
        decided(3, "ses_of_nobody"),
        decided(4, of_mine, "there"),
        decided(5, of_theirs, "left"),
        decided(6, of_mine, "used"),
    ]
    path = f"/v1/engines/{engine(service, start_peer, made).id}/decisions"
    found = service.http.get(path, headers=mine).raise_for_status().json()
    assert [(one["session_id"], one["outcome"]) for one in found["data"]] == [
        ("same", "begun"),
        ("same", "there"),
        ("same", "used"),
    ]
    assert datetime.fromisoformat(found["data"][0]["at"]) == datetime.fromtimestamp((T_US + 2) / 1e6, UTC)
    assert (found["has_more"], found["silent"]) == (False, None)
    (first,) = service.http.get(path, headers=mine, params={"limit": 1}).json()["data"]
    rest = service.http.get(path, headers=mine, params={"after": first["id"], "limit": 1}).json()
    assert ([one["outcome"] for one in rest["data"]], rest["has_more"]) == (["there"], True)
    outcomes = [one["outcome"] for one in service.http.get(path, headers=theirs).json()["data"]]
    assert outcomes == ["begun", "left"]
    assert of_theirs not in service.http.get(path, headers=mine).text


def test_a_deleted_session_is_nobodys(service: Service, start_peer: Any) -> None:
    session_id = created(service)["id"]
    path = f"/v1/engines/{engine(service, start_peer, [decided(1, session_id)]).id}/decisions"
    assert len(service.http.get(path).json()["data"]) == 1
    service.client.delete(session_id, revision="*")
    assert service.http.get(path).json()["data"] == []


def test_an_engine_that_is_unknown_or_does_not_say(service: Service, start_peer: Any) -> None:
    assert_problem(service.http.get("/v1/engines/eng_none/decisions"), 404, "engine-not-found")
    with pytest.raises(EngineNotFound):
        service.client.decisions("eng_none")
    refuses = start_peer(lambda request: {"ok": False, "error": "unknown verb 'decisions'"})
    found = service.client.decisions(register(service.database, refuses.address).id)
    assert (found.data, found.silent is not None and "unknown verb" in found.silent) == ([], True)
    nonsense = start_peer(lambda request: {"ok": True, "decisions": [{"id": 1}]})
    found = service.client.decisions(register(service.database, nonsense.address, rank=1).id)
    assert found.silent is not None


def test_operators_see_all(service: Service, start_peer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = key_for(service, "mine"), key_for(service, "theirs")
    for headers, name in ((mine, "of-mine"), (theirs, "of-theirs")):
        service.http.post("/v1/sessions", json={"model": MODEL, "id": name}, headers=headers).raise_for_status()
    uids = [uid(service, tenant, f"of-{tenant}") for tenant in ("mine", "theirs")]
    engine(service, start_peer, [decided(1, uids[0]), decided(2, uids[1], "left"), decided(3, "ses_gone")])
    monkeypatch.setenv("AGENTSTATE_DATABASE_URL", service.app.state.service.settings.sqlalchemy_url)
    said = CliRunner().invoke(app, ["engines", "decisions", "--json"])
    assert said.exit_code == 0, said.output
    rows = checked("engines decisions", json.loads(said.output))
    assert [(row["tenant"], row["name"], row["outcome"]) for row in rows] == [
        ("mine", "of-mine", "begun"),
        ("theirs", "of-theirs", "left"),
        ("", "", "begun"),
    ]
    said = CliRunner().invoke(app, ["engines", "decisions", "--session", "of-theirs"], env={"COLUMNS": "200"})
    assert "left" in said.output and "begun" not in said.output
    said = CliRunner().invoke(app, ["engines", "decisions", "eng_none"])
    assert isinstance(said.exception, EngineNotFound)
