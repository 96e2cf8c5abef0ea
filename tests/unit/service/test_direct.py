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
from agentstate.api.direct import DirectRoute
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
    router = APIRouter(route_class=route_class)

    @router.post("/whole/{name}")
    async def whole(
        name: Annotated[str, Path(min_length=2, max_length=5)],
        body: Body,
        seen: Annotated[str, Depends(_seen)],
        shared: Annotated[dict[str, int], Depends(_shared)],
        request: Request,
        prefer: Annotated[str | None, Header(max_length=3)] = None,
    ) -> Response:
        said = [name, body.model_dump(), seen, prefer, request.method]
        return Response(repr(said), status_code=201)

    @router.post("/in-a-thread/{name}")
    def in_a_thread(name: str, body: Body | None = None) -> Response:
        return Response(repr([name, body]))

    app = FastAPI()
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
        {"json": {"number": 1}, "path": "/whole/x"},
        {"json": {"number": 1}, "path": "/whole/a%2Fb"},
        {"json": {"number": 1}, "path": "/whole/abcdef"},
        {"json": {"number": 1}, "seen": None},
        {"json": {"number": 1}, "path": "/in-a-thread/x"},
        {"content": b"", "path": "/in-a-thread/x"},
        {"content": b"null", "headers": JSON, "path": "/in-a-thread/x"},
        {"json": {"number": 0}, "path": "/in-a-thread/x"},
    ],
    ids=lambda asked: repr(asked)[:60],
)
def test_every_request_is_answered_as_on_fastapis_own_way(asked: dict[str, Any]) -> None:
    asked = dict(asked)
    path, seen = asked.pop("path", "/whole/name"), asked.pop("seen", "1")
    headers = {**asked.pop("headers", {}), **({} if seen is None else {"If-Match": seen})}
    usual, direct = (made(kind).post(path, headers=headers, **asked) for kind in (APIRoute, DirectRoute))
    assert (direct.status_code, direct.text) == (usual.status_code, usual.text)


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
        "path": "/in-a-thread/x",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "app": None,
    }
    asyncio.run(made(kind).app(scope, receive, send))  # type: ignore[arg-type]
    assert said == [400]


def test_what_several_depend_on_is_asked_for_once() -> None:
    client = made(DirectRoute)
    assert client.post("/whole/name", json={"number": 1}, headers={"If-Match": "1"}).status_code == 201
    assert client.app.state.calls == {"shared": 1}  # type: ignore[attr-defined]


def test_the_routes_of_a_turn_are_direct(tmp_path: Any) -> None:
    found = {}
    for router in (branches.router, entries.router, turns.router):
        found |= {route.operation_id: route.is_direct for route in router.routes if isinstance(route, DirectRoute)}
    assert all(found[name] for name in HOT)
    document = create_app(Settings(home=tmp_path)).openapi()
    named = {operation["operationId"] for path in document["paths"].values() for operation in path.values()}
    assert set(HOT) <= named
