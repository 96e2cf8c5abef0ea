"""The shorter way to an endpoint answers like FastAPI's own."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, Header, Path, Request, Response
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from pydantic import BaseModel, Field

from agentstate.api import branches, entries, problems, turns
from agentstate.api.app import create_app
from agentstate.api.direct import DirectRoute, Shortcut
from agentstate.errors import SessionBusy
from agentstate.settings import Settings

HOT = (
    "resume_session",
    "suspend_session",
    "append_entries",
    "fork_session",
    "rewind_session",
)


class Body(BaseModel):
    number: int = Field(ge=1)
    name: str | None = None


async def _shared(request: Request) -> dict[str, int]:
    calls: dict[str, int] = request.app.state.calls
    calls["shared"] = calls.get("shared", 0) + 1
    return calls


async def _seen(calls: Annotated[dict[str, int], Depends(_shared)], if_match: Annotated[str, Header()]) -> str:
    return if_match


def made(route_class: type[APIRoute]) -> TestClient:
    router = APIRouter(prefix="/v1/sessions/{session_id}", route_class=route_class)

    @router.post("/whole")
    async def whole(
        session_id: Annotated[str, Path(min_length=2, max_length=5)],
        body: Body,
        seen: Annotated[str, Depends(_seen)],
        shared: Annotated[dict[str, int], Depends(_shared)],
        request: Request,
        prefer: Annotated[str | None, Header(max_length=3)] = None,
    ) -> Response:
        said = [session_id, body.model_dump(), seen, prefer, request.method]
        if body.name == "busy":
            raise SessionBusy("it is being run", retry_after_s=1.5, revision=7)
        return Response(repr(said), status_code=201)

    @router.post("/in/a/thread")
    def in_a_thread(session_id: str, body: Body | None = None) -> Response:
        return Response(repr([session_id, body]))

    app = FastAPI()

    @app.middleware("http")
    async def count(request: Request, call_next: Any) -> Response:
        request.app.state.calls["routed"] = request.app.state.calls.get("routed", 0) + 1
        answer: Response = await call_next(request)
        return answer

    app.add_middleware(Shortcut, routes=router.routes)
    app.state.calls = {}
    app.include_router(router)
    problems.install(app)
    return TestClient(app)


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    "asked",
    [
        {"json": {"number": 1, "name": "é"}},
        {"json": {"number": "7"}},
        {"json": {"number": 0}},
        {"json": {"name": 1}},
        {"json": []},
        {"json": None},
        {"content": b""},
        {"content": b"{", "headers": JSON},
        {"content": b'{"number": 1}', "headers": {"Content-Type": "text/plain"}},
        {"content": b'{"number": 1}', "headers": {"Content-Type": "application/problem+json"}},
        {"content": b'{"number": 1}'},
        {"content": b'{"number": 1, "name": "\\ud800"}', "headers": JSON},
        {"content": b'{"number": NaN}', "headers": JSON},
        {"content": b"\xff", "headers": JSON},
        {"content": b"[" * 100_000, "headers": JSON},
        {"content": b"null", "headers": JSON},
        {"json": {"number": 1}, "headers": {"Prefer": "abc"}},
        {"json": {"number": 1}, "headers": {"Prefer": "abcd"}},
        {"json": {"number": 1}, "path": "x/whole"},
        {"json": {"number": 1}, "path": "/whole"},
        {"json": {"number": 1}, "path": "a%2Fb/whole"},
        {"json": {"number": 1}, "path": "abcdef/whole"},
        {"json": {"number": 1}, "path": "abc/whole/"},
        {"json": {"number": 1}, "path": "abc/hole"},
        {"json": {"number": 1}, "seen": None},
        {"json": {"number": 1, "name": "busy"}},
        {"content": b'{"number": ' + b"9" * 5000 + b"}", "headers": JSON},
        {"json": {"number": 1}, "path": "x/in/a/thread"},
        {"content": b"", "path": "x/in/a/thread"},
        {"content": b"null", "headers": JSON, "path": "x/in/a/thread"},
        {"content": b" null ", "headers": JSON, "path": "x/in/a/thread"},
        {"json": {"number": 0}, "path": "x/in/a/thread"},
    ],
    ids=lambda asked: repr(asked)[:60],
)
def test_every_request_is_answered_as_on_fastapis_own_way(asked: dict[str, Any]) -> None:
    asked = dict(asked)
    path, seen = f"/v1/sessions/{asked.pop('path', 'name/whole')}", asked.pop("seen", "1")
    headers = {**asked.pop("headers", {}), **({} if seen is None else {"If-Match": seen})}
    usual, direct = (made(kind).post(path, headers=headers, **asked) for kind in (APIRoute, DirectRoute))
    assert (direct.status_code, direct.text) == (usual.status_code, usual.text)
    assert direct.headers == usual.headers


def test_what_is_as_it_should_be_does_not_go_fastapis_way() -> None:
    client = made(DirectRoute)
    calls = client.app.state.calls  # type: ignore[attr-defined]
    for path, body in (("name/whole", 1), ("x/in/a/thread", 1), ("name/whole", 0)):
        asked = client.post(f"/v1/sessions/{path}", json={"number": body}, headers={"If-Match": "1"})
        assert asked.status_code == (422 if body == 0 else asked.status_code)
        assert calls.get("routed", 0) == (body == 0)


@pytest.mark.parametrize("kind", [APIRoute, DirectRoute])
def test_a_client_that_has_left_is_no_fault_of_the_service(kind: type[APIRoute]) -> None:
    said: list[int] = []

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            said.append(message["status"])

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/sessions/x/in/a/thread",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "app": None,
    }
    asyncio.run(made(kind).app(scope, receive, send))  # type: ignore[arg-type]
    assert said == [400]


def test_what_several_depend_on_is_asked_for_once() -> None:
    client = made(DirectRoute)
    assert client.post("/v1/sessions/name/whole", json={"number": 1}, headers={"If-Match": "1"}).status_code == 201
    assert client.app.state.calls["shared"] == 1  # type: ignore[attr-defined]


def test_the_routes_of_a_turn_are_direct(tmp_path: Any) -> None:
    found = {}
    for router in (branches.router, entries.router, turns.router):
        found |= {route.operation_id: route.is_direct for route in router.routes if isinstance(route, DirectRoute)}
    assert all(found[name] for name in HOT)
    document = create_app(Settings(home=tmp_path)).openapi()
    named = {operation["operationId"] for path in document["paths"].values() for operation in path.values()}
    assert set(HOT) <= named
