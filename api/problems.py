"""Errors over HTTP: all are ``application/problem+json`` (RFC 9457), including those that the framework raises.

The ``type`` of a problem is ``/problems/`` and the slug of its error (see `agentstate.errors`), or one of those
that are about requests: ``invalid-request``, ``not-found``, ``method-not-allowed``, ``body-too-large``,
``body-too-slow``, ``headers-too-large``, ``unsupported-encoding``, ``precondition-required`` and ``internal-error``.
"""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.routing import Match

from agentstate import errors

# The most derived class with an entry decides.
STATUS: dict[type[errors.AgentStateError], HTTPStatus] = {
    errors.SessionNotFound: HTTPStatus.NOT_FOUND,
    errors.EntryNotFound: HTTPStatus.NOT_FOUND,
    errors.ResponseNotFound: HTTPStatus.NOT_FOUND,
    errors.OperationNotFound: HTTPStatus.NOT_FOUND,
    errors.EngineNotFound: HTTPStatus.NOT_FOUND,
    errors.ToolCallNotFound: HTTPStatus.NOT_FOUND,
    errors.KeyNotFound: HTTPStatus.NOT_FOUND,
    errors.SessionExists: HTTPStatus.CONFLICT,
    errors.SessionBusy: HTTPStatus.CONFLICT,
    errors.LeaseLost: HTTPStatus.CONFLICT,
    errors.ToolInFlight: HTTPStatus.CONFLICT,
    errors.ToolCallClaimed: HTTPStatus.CONFLICT,
    errors.ToolCallUnknown: HTTPStatus.CONFLICT,
    errors.ToolCallFinal: HTTPStatus.CONFLICT,
    errors.ToolCallReused: HTTPStatus.CONFLICT,
    errors.IdempotencyKeyInUse: HTTPStatus.CONFLICT,
    errors.SessionExpired: HTTPStatus.GONE,
    errors.EventsTrimmed: HTTPStatus.GONE,
    errors.RevisionStale: HTTPStatus.PRECONDITION_FAILED,
    errors.ModelMismatch: HTTPStatus.PRECONDITION_FAILED,
    errors.InvalidEntry: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.NotABranchPoint: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.InvalidId: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.IdempotencyKeyReused: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.Unauthenticated: HTTPStatus.UNAUTHORIZED,
    errors.HostRefused: HTTPStatus.FORBIDDEN,
    errors.NotAllowed: HTTPStatus.FORBIDDEN,
    errors.RateLimited: HTTPStatus.TOO_MANY_REQUESTS,
    errors.TooManyOperations: HTTPStatus.TOO_MANY_REQUESTS,
    errors.TooManySessions: HTTPStatus.TOO_MANY_REQUESTS,
    errors.DatabaseError: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.AgentStateError: HTTPStatus.INTERNAL_SERVER_ERROR,
}


class Problem(BaseModel):
    """The body of an error. Conflicts also carry the session's ``revision``."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [
                {
                    "type": "/problems/lease-lost",
                    "title": "The lease is not valid any more: resume the session to get a new one.",
                    "status": 409,
                    "detail": "the lease of epoch 7 on session ses_… lapsed, was released or was taken over: …",
                    "retryable": False,
                    "revision": "12",
                }
            ]
        },
    )

    type: str
    title: str
    status: int
    detail: str
    retryable: bool


class PreconditionRequired(Exception):
    """A write without If-Match that could overwrite changes that the caller has not seen."""


def responses(**texts: str) -> dict[int | str, dict[str, Any]]:
    """A route's problems in OpenAPI: ``responses(_404="No such session")``."""
    return {int(status.removeprefix("_")): {"model": Problem, "description": text} for status, text in texts.items()}


# Any route may answer these.
COMMON = responses(
    _400="Not HTTP or JSON that can be read",
    _401="A valid API key is needed",
    _403="The API key only reads; or, without API keys, the service is for this machine only",
    _408="The body did not come in time",
    _413="The body is too large",
    _415="The body is compressed",
    _422="Malformed, or not fitting the session",
    _429="Too many requests or operations: see Retry-After; or too many sessions",
    _431="The headers are too large",
    _503="The database does not answer",
)


def problem(
    status: int,
    slug: str,
    title: str,
    detail: str,
    *,
    retryable: bool = False,
    headers: dict[str, str] | None = None,
    **more: Any,
) -> JSONResponse:
    """A response with one problem."""
    body = Problem(type=f"/problems/{slug}", title=title, status=status, detail=detail, retryable=retryable, **more)
    return JSONResponse(body.model_dump(), status_code=status, media_type="application/problem+json", headers=headers)


def install(app: FastAPI) -> None:
    """Make ``app`` answer every error with a problem, and document that in its OpenAPI document."""
    app.add_exception_handler(PreconditionRequired, _unconditional)
    app.add_exception_handler(errors.AgentStateError, _own)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _framework)
    app.add_exception_handler(Exception, _unexpected)
    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        for path in document["paths"].values():
            for operation in path.values():
                if "428" in operation["responses"]:
                    for parameter in operation.get("parameters", []):
                        parameter["required"] = parameter["required"] or parameter["name"] == "if-match"
                for status, response in operation["responses"].items():
                    if int(status) >= 400 and "application/json" in response.get("content", {}):
                        schema = response["content"]["application/json"]
                        if schema.get("schema", {}).get("$ref") == "#/components/schemas/Problem":
                            response["content"] = {"application/problem+json": schema}
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _own(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, errors.AgentStateError)
    return answer_to(error)


def answer_to(error: errors.AgentStateError) -> JSONResponse:
    """The problem response for an AgentStateError."""
    status = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
    more: dict[str, Any] = {}
    headers: dict[str, str] = {}
    if isinstance(error, errors.SessionError) and error.revision is not None:
        more["revision"] = str(error.revision)
    if isinstance(error, errors.SessionBusy | errors.RateLimited):
        more["retry_after_s"] = error.retry_after_s
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif isinstance(error, errors.TooManyOperations | errors.IdempotencyKeyInUse):
        headers["Retry-After"] = "1"
    elif isinstance(error, errors.Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    title = (type(error).__doc__ or "").partition("\n")[0]
    return problem(status, error.slug(), title, str(error), retryable=error.retryable, headers=headers, **more)


def _unconditional(request: Request, error: Exception) -> JSONResponse:
    return problem(
        HTTPStatus.PRECONDITION_REQUIRED,
        "precondition-required",
        "This write needs an If-Match header.",
        f"{request.method} {request.url.path} needs If-Match with the session's ETag, or * to write in any case",
    )


def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    wrong = [{"where": ".".join(str(part) for part in item["loc"]), "what": item["msg"]} for item in error.errors()]
    return problem(
        HTTPStatus.UNPROCESSABLE_ENTITY,
        "invalid-request",
        "The request is malformed.",
        "; ".join(f"{item['where']}: {item['what']}" for item in wrong),
        errors=wrong,
    )


def _framework(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    slugs = {404: "not-found", 405: "method-not-allowed"}
    slug = slugs.get(error.status_code, "invalid-request")
    title = HTTPStatus(error.status_code).phrase
    detail = f"{request.method} {request.url.path}: {error.detail}"
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(sorted(_allowed(request)))
    return problem(error.status_code, slug, title, detail, headers=headers)


def _allowed(request: Request) -> set[str]:
    """All methods of the path: the framework names those of one of its routes only."""
    methods: set[str] = set()
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
        scope = {**request.scope, "method": method}
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.router.routes):
            methods.add(method)
    return methods | ({"HEAD"} if "GET" in methods else set())


def _unexpected(request: Request, error: Exception) -> JSONResponse:
    # The server's log has the traceback; the caller learns no internals.
    return problem(
        HTTPStatus.INTERNAL_SERVER_ERROR,
        "internal-error",
        "The service failed.",
        "an unexpected error; the log of the service tells more",
    )
