"""A shorter way to the endpoints that agents call all the time.

FastAPI works out anew for each request what its endpoint wants. A `DirectRoute` has worked that out once. It serves
requests that are as they should be; every other one goes FastAPI's way, which says what is wrong with it. What a route
is in the API's description, and what it answers, stays the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from inspect import iscoroutinefunction
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

_JSON = ("application/json", "application/json; charset=utf-8")
_ABSENT = object()


class DirectRoute(APIRoute):
    """For an endpoint that returns a `Response`, and takes no queries, cookies or forms: `is_direct` says whether it
    is one. What it depends on is asynchronous, and changes nothing."""

    is_direct = False

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        usual = super().get_route_handler()
        endpoint: Any = self.dependant.call
        if endpoint.__annotations__.get("return") not in ("Response", Response):
            return usual
        try:
            values_of = _values(self.dependant)
        except _Unusual:
            return usual
        self.is_direct = True
        asynchronous = iscoroutinefunction(endpoint)

        async def handle(request: Request) -> Response:
            try:
                values = await values_of(request, await _sent(request), {})
            except _Unusual:
                return await usual(request)
            answer: Response
            if asynchronous:
                answer = await endpoint(**values)
            else:
                answer = await run_in_threadpool(endpoint, **values)
            return answer

        return handle


class _Unusual(Exception):
    """FastAPI sees to it."""


async def _sent(request: Request) -> Any:
    """The body's JSON."""
    try:
        body = await request.body()
    except ClientDisconnect as error:
        raise _Unusual from error
    if not body:
        return _ABSENT
    if request.headers.get("content-type") not in _JSON:
        raise _Unusual
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _Unusual from error


def _values(dependant: Any) -> Callable[[Request, Any, dict[Any, Any]], Coroutine[Any, Any, dict[str, Any]]]:
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
    path = [(field.name, field.alias, field) for field in dependant.path_params]
    headers = [(field.name, field.alias, field) for field in dependant.header_params]
    body = dependant.body_params[0] if dependant.body_params else None
    wants_request = dependant.request_param_name

    async def values(request: Request, sent: Any, known: dict[Any, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, call, of_call in needed:
            if call not in known:
                known[call] = await call(**await of_call(request, sent, known))
            found[name] = known[call]
        for name, alias, field in path:
            found[name] = _valid(field, request.path_params.get(alias, _ABSENT), "path")
        for name, alias, field in headers:
            found[name] = _valid(field, request.headers.get(alias, _ABSENT), "header")
        if body is not None:
            found[body.name] = _valid(body, _ABSENT if sent is None else sent, "body")
        if wants_request is not None:
            found[wants_request] = request
        return found

    return values


def _valid(field: Any, given: Any, where: str) -> Any:
    if given is _ABSENT:
        default = field.default
        if field.field_info.is_required() or not (default is None or isinstance(default, int | str)):
            raise _Unusual
        return default
    value, errors = field.validate(given, {}, loc=(where, field.alias))
    if errors:
        raise _Unusual
    return value
