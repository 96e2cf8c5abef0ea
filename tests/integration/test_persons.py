"""Every route of the API as each person of the threat model (docs/security.md) that may send it a request."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from engines import responds, scripted
from engines import said as message
from stage import MODEL, Service, register

from agentstate.api import gate
from agentstate.sessions import tenants

NAMES = ("operation_id", "conversation_id", "item_id", "response_id")
NO_ENGINE = "eng_none"
"""All tenants see the same engines; what these tell of sessions is tested with them."""

OPEN = {"/healthz", "/readyz", "/metrics"}
"""What a client without a key may ask."""

BODIES: dict[str, Any] = {
    "POST /v1/sessions": {"model": MODEL},
    "PATCH /v1/sessions/{session_id}": {"metadata": {"a": 1}},
    "POST /v1/sessions/{session_id}/entries": {
        "lease": {"token": "t", "epoch": 1},
        "entries": [{"kind": "message", "payload": {"role": "user", "content": "x"}}],
    },
    "POST /v1/sessions/{session_id}/resume": {},
    "POST /v1/sessions/{session_id}/suspend": {"lease": {"token": "t", "epoch": 1}, "reason": "user_wait"},
    "POST /v1/sessions/{session_id}/lease/renew": {"lease": {"token": "t", "epoch": 1}},
    "POST /v1/sessions/{session_id}/forks": {},
    "POST /v1/sessions/{session_id}/rewind": {"at": None},
    "PUT /v1/sessions/{session_id}/tool-calls/{call_id}": {"name": "tool"},
    "PUT /v1/sessions/{session_id}/tool-calls/{call_id}/result": {"output": "x"},
    "POST /v1/sessions/{session_id}/prefetch": {},
    "POST /v1/sessions/{session_id}/activity": {"kind": "typing"},
    "POST /v1/sessions/{session_id}/kv/pin": {"ttl_s": 60},
    "POST /v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "x"}]},
    "POST /v1/completions": {"model": MODEL, "prompt": "x"},
    "POST /v1/messages": {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]},
    "POST /v1/messages/count_tokens": {"model": MODEL, "messages": [{"role": "user", "content": "x"}]},
    "POST /v1/responses": {"model": MODEL, "input": "x"},
    "POST /v1/conversations": {},
    "POST /v1/conversations/{conversation_id}": {"metadata": {"a": "1"}},
    "POST /v1/conversations/{conversation_id}/items": {"items": [{"role": "user", "content": "x"}]},
    "POST /v1/embeddings": {"model": MODEL, "input": "x"},
    "POST /v1/rerank": {"model": MODEL, "query": "x", "documents": ["x"]},
    "POST /tokenize": {"model": MODEL, "prompt": "x"},
}


@pytest.fixture(autouse=True)
def distrustful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "TRUST_S", 0.0)


def routes(service: Service) -> list[str]:
    found = service.app.openapi()["paths"]
    return [f"{method.upper()} {path}" for path, methods in found.items() for method in methods]


def ask(service: Service, route: str, headers: dict[str, str], **ids: str) -> httpx.Response:
    method, path = route.split()
    body = BODIES.get(route)
    return service.http.request(
        method, path.format(**ids), headers={"If-Match": "*", **headers}, json=body, timeout=60, follow_redirects=False
    )


def key_of(service: Service, tenant: str) -> dict[str, str]:
    with service.database.write() as connection:
        return {"Authorization": f"Bearer {tenants.create_key(connection, tenant).secret}"}


class Victim:
    """A tenant with a session of which every route finds something."""

    SAYS = "what nobody else may read"

    def __init__(self, service: Service):
        self.headers = key_of(service, "victim")
        register(service.database, "tcp://127.0.0.1:1")
        post = self._posting(service)
        self.session_id = post("/v1/sessions", {"model": MODEL, "metadata": {"says": self.SAYS}})["id"]
        path = f"/v1/sessions/{self.session_id}"
        turn = post(f"{path}/resume", {})
        self.lease = {"token": turn["lease"]["token"], "epoch": turn["lease"]["epoch"]}
        said = {"kind": "message", "payload": {"role": "user", "content": self.SAYS}}
        call = {"kind": "tool_call", "call_id": "call_1", "payload": {"name": "tool", "arguments": {"x": self.SAYS}}}
        post(f"{path}/entries", {"lease": self.lease, "entries": [said, call]})
        self.operation_id = post(f"{path}/prefetch", {})["id"]
        items = [{"type": "message", "role": "user", "content": self.SAYS}]
        self.conversation_id = post("/v1/conversations", {"items": items})["id"]
        listed = service.http.get(f"/v1/conversations/{self.conversation_id}/items", headers=self.headers).json()
        self.item_id = listed["data"][0]["id"]
        with scripted(responds([message(self.SAYS)])) as engine:
            register(service.database, "tcp://127.0.0.1:1", base_url=engine.base_url, model="other", rank=1)
            self.response_id = post("/v1/responses", {"model": "other", "input": self.SAYS})["id"]

    @property
    def ids(self) -> dict[str, str]:
        names = ("session_id", *NAMES)
        named = {"call_id": "call_1", "model": MODEL, "engine_id": NO_ENGINE}
        return {**{name: getattr(self, name) for name in names}, **named}

    def never(self) -> dict[str, str]:
        """Ids like these that nothing ever had."""
        ids = {name: value[:4] + "0" * (len(value) - 4) for name, value in self.ids.items()}
        return {**ids, "call_id": "call_1", "model": MODEL, "engine_id": NO_ENGINE}

    def _posting(self, service: Service) -> Any:
        def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
            answer = service.http.post(path, headers=self.headers, json=body).raise_for_status()
            return dict(answer.json())

        return post

    def state(self, service: Service) -> Any:
        """Everything that a stranger might change."""
        path = f"/v1/sessions/{self.session_id}"
        paths = [path, f"{path}/entries", f"/v1/responses/{self.response_id}"]
        paths += [f"/v1/conversations/{self.conversation_id}{part}" for part in ("", "/items")]
        found = [service.http.get(path, headers=self.headers).json() for path in paths]
        listed = service.http.get("/v1/sessions", headers=self.headers).json()
        return json.loads(json.dumps([*found, listed]))


def test_every_route_that_takes_a_body_is_sent_one(service: Service) -> None:
    takes = {
        f"{method.upper()} {path}"
        for path, methods in service.app.openapi()["paths"].items()
        for method, described in methods.items()
        if "requestBody" in described
    }
    assert takes == set(BODIES)


@pytest.mark.parametrize(
    "credentials",
    [{}, {"Authorization": "Bearer ags_wrong"}, {"Authorization": "Basic dXNlcjpwYXNz"}, {"Cookie": "session=1"}],
    ids=["none", "wrong", "basic", "cookie"],
)
def test_without_a_key_every_route_is_closed(service: Service, credentials: dict[str, str]) -> None:
    victim = Victim(service)
    before = victim.state(service)
    for route in routes(service):
        answer = ask(service, route, credentials, **victim.ids)
        if route.split()[1] in OPEN:
            assert answer.status_code == 200, route
        else:
            assert answer.status_code == 401, route
            refused = answer.json()
            if "error" in refused:  # as clients of OpenAI and Anthropic expect it
                assert refused["error"]["type"] == "authentication_error", route
            else:
                assert refused["type"] == "/problems/unauthenticated", route
        for said in (Victim.SAYS, victim.session_id, victim.operation_id, "victim"):
            assert said not in answer.text, route
    assert victim.state(service) == before


def test_another_tenant_cannot_tell_whether_a_session_is_there(service: Service) -> None:
    victim, stranger = Victim(service), key_of(service, "stranger")
    before = victim.state(service)
    there, never = victim.ids, victim.never()

    def shape(answer: httpx.Response, ids: dict[str, str]) -> Any:
        said = answer.text
        for name, value in ids.items():
            said = said.replace(value, name)
        kept = {name: value for name, value in answer.headers.items() if name not in ("date", "server-timing")}
        return answer.status_code, said, {**kept, "x-request-id": None, "traceparent": None}

    for route in routes(service):
        if "{" not in route or "{model}" in route:
            answer = ask(service, route, stranger, **there)
            # The engines of this service have gone.
            assert answer.status_code in (200, 201, 502), route
            for said in (Victim.SAYS, victim.session_id, victim.operation_id):
                assert said not in answer.text, route
            continue
        found, missing = ask(service, route, stranger, **there), ask(service, route, stranger, **never)
        assert found.status_code == 404, route
        assert shape(found, there) == shape(missing, never), route
    assert victim.state(service) == before


def test_a_lease_that_was_guessed_or_overheard_opens_nothing(service: Service) -> None:
    """Neither the lease's token in another tenant's hands, nor the own tenant's key without the token."""
    victim, stranger = Victim(service), key_of(service, "stranger")
    before, path = victim.state(service), f"/v1/sessions/{victim.session_id}"
    said = [{"kind": "message", "payload": {"role": "user", "content": "forged"}}]
    for part, body in (
        ("entries", {"entries": said}),
        ("suspend", {"reason": "user_wait"}),
        ("lease/renew", {}),
    ):
        overheard = service.http.post(f"{path}/{part}", headers=stranger, json={"lease": victim.lease, **body})
        assert overheard.status_code == 404, part
        guessed = {**victim.lease, "token": "guessed"}
        answer = service.http.post(f"{path}/{part}", headers=victim.headers, json={"lease": guessed, **body})
        assert (answer.status_code, answer.json()["type"]) == (409, "/problems/lease-lost"), part
    assert victim.state(service) == before


@pytest.mark.parametrize(
    "named", [{"Host": "evil.example"}, {"Origin": "https://evil.example"}], ids=["host", "origin"]
)
def test_a_web_page_reaches_nothing_while_there_is_no_key(service: Service, named: dict[str, str]) -> None:
    session_id = service.http.post("/v1/sessions", json={"model": MODEL}).raise_for_status().json()["id"]
    before = service.http.get(f"/v1/sessions/{session_id}").json()
    for route in routes(service):
        if route.split()[1] not in OPEN:
            ids = dict.fromkeys((*NAMES, "call_id", "model", "engine_id"), "x")
            answer = ask(service, route, named, session_id=session_id, **ids)
            assert answer.status_code in (403, 421), route
            assert session_id not in answer.text
    assert service.http.get(f"/v1/sessions/{session_id}").json() == before
