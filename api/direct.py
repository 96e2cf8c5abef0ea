"""A shorter way to the endpoints that agents call all the time.

For each request FastAPI looks for its route, and works out anew what the endpoint wants. A `DirectRoute` has worked
that out once, and `Shortcut` finds it by its path. Together they serve requests that are as they should be; every other
one goes FastAPI's way, which says what is wrong with it. What a route is in the API's description, and what it answers,
stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from inspect import iscoroutinefunction
from typing import Annotated, Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentstate.api.problems import PreconditionRequired, answer_to
from agentstate.errors import AgentStateError

_JSON = ("application/json", "application/json; charset=utf-8")
_ABSENT = object()
_PREFIX, _ID = ["", "v1", "sessions"], "{session_id}"


class DirectRoute(APIRoute):
    """For an endpoint that returns a `Response`, and takes no queries, cookies or forms: `is_direct` says whether it
    is one. What it depends on is asynchronous, and changes nothing."""

    direct: Callable[[Request, bytes], Coroutine[Any, Any, Response]] | None = None

    @property
    def is_direct(self) -> bool:
        return self.direct is not None

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint: Any = self.dependant.call
        if endpoint.__annotations__.get("return") in ("Response", Response):
            with suppress(_Unusual):
                self.direct = _direct(endpoint, _values(self.dependant))
        return super().get_route_handler()


class Shortcut:
    """ASGI middleware, the innermost: serves those of ``routes`` that are direct, of one session each."""

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute]):
        self._app = app
        self._routes = {
            (method, route.path_format): route
            for route in routes
            if isinstance(route, DirectRoute) and route.is_direct
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = None
        if scope["type"] == "http" and not scope.get("root_path"):
            parts = scope["path"].split("/")
            if len(parts) > 4 and parts[:3] == _PREFIX and parts[3]:
                session_id, parts[3] = parts[3], _ID
                route = self._routes.get((scope["method"], "/".join(parts)))
        if route is None or route.direct is None:
            await self._app(scope, receive, send)
            return
        scope["path_params"] = {"session_id": session_id}
        request = Request(scope, receive, send)
        try:
            content = await request.body()
        except ClientDisconnect:
            await self._app(scope, receive, send)
            return
        response: Response
        try:
            # Observed also while it waits.
            scope["route"], scope["endpoint"] = route, route.endpoint
            response = await route.direct(request, content)
        except _Unusual:
            await self._app(scope, _again(content, receive), send)
            return
        except AgentStateError as error:
            response = answer_to(error)
        await response(scope, receive, send)


class _Unusual(Exception):
    """FastAPI sees to it."""


def _again(content: bytes, receive: Receive) -> Receive:
    """Receives a body that was received already."""
    held: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]

    async def replay() -> Message:
        return held.pop() if held else await receive()

    return replay


def _direct(endpoint: Any, values_of: Any) -> Callable[[Request, bytes], Coroutine[Any, Any, Response]]:
    asynchronous = iscoroutinefunction(endpoint)

    async def direct(request: Request, content: bytes) -> Response:
        if content and request.headers.get("content-type") not in _JSON:
            raise _Unusual
        try:
            values = await values_of(request, content, {})
        except PreconditionRequired:
            raise _Unusual from None
        answer: Response
        if asynchronous:
            answer = await endpoint(**values)
        else:
            answer = await run_in_threadpool(endpoint, **values)
        return answer

    return direct


def _values(dependant: Any) -> Callable[[Request, bytes, dict[Any, Any]], Coroutine[Any, Any, dict[str, Any]]]:
    """What makes a call's arguments of a request, its body, and what others depended on before. Raises _Unusual if
    the call wants what is not known here."""
    if (
        dependant.query_params
        or dependant.cookie_params
        or len(dependant.body_params) > 1
        or dependant.response_param_name
        or dependant.background_tasks_param_name
        or dependant.security_scopes_param_name
        or dependant.http_connection_param_name
    ):
        raise _Unusual
    needed = []
    for one in dependant.dependencies:
        if not iscoroutinefunction(one.call) or not one.use_cache:
            raise _Unusual
        needed.append((one.name, one.call, _values(one)))
    path = [(field.name, field.alias, _Value(field)) for field in dependant.path_params]
    headers = [(field.name, field.alias, _Value(field)) for field in dependant.header_params]
    body = (dependant.body_params[0].name, _Value(dependant.body_params[0])) if dependant.body_params else None
    wants_request = dependant.request_param_name

    async def values(request: Request, content: bytes, known: dict[Any, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, call, of_call in needed:
            if call not in known:
                known[call] = await call(**await of_call(request, content, known))
            found[name] = known[call]
        for name, alias, value in path:
            found[name] = value.of(request.path_params.get(alias, _ABSENT))
        for name, alias, value in headers:
            found[name] = value.of(request.headers.get(alias, _ABSENT))
        if body is not None:
            found[body[0]] = body[1].of_json(content)
        if wants_request is not None:
            found[wants_request] = request
        return found

    return values


class _Value:
    """One argument, as FastAPI has it in ``field``. Raises _Unusual for what is not valid."""

    def __init__(self, field: Any):
        self._default = _ABSENT if field.field_info.is_required() else field.default
        if not (self._default is _ABSENT or self._default is None or isinstance(self._default, int | str)):
            raise _Unusual
        kind, rules = field.field_info.annotation, field.field_info.metadata
        self._kind: TypeAdapter[Any] = TypeAdapter(Annotated[(kind, *rules)] if rules else kind)

    def of(self, given: Any) -> Any:
        if given is _ABSENT:
            return self._absent()
        try:
            return self._kind.validate_python(given)
        except ValidationError as error:
            raise _Unusual from error

    def of_json(self, content: bytes) -> Any:
        if not content or content == b"null":
            return self._absent()
        try:
            return self._kind.validate_json(content)
        except ValidationError as error:
            raise _Unusual from error

    def _absent(self) -> Any:
        if self._default is _ABSENT:
            raise _Unusual
        return self._default
