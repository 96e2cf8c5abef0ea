"""Errors over HTTP: every one is ``application/problem+json`` (RFC 9457), also those that the framework raises.

The ``type`` of a problem is ``/problems/`` and the slug of its error (see `agentstate.errors`), or one of the five
that are about requests: ``invalid-request``, ``not-found``, ``method-not-allowed``, ``body-too-large`` and
``internal-error``.
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

from agentstate import errors

# The nearest class on an error's branch of the tree decides.
STATUS: dict[type[errors.AgentStateError], HTTPStatus] = {
    errors.SessionNotFound: HTTPStatus.NOT_FOUND,
    errors.EntryNotFound: HTTPStatus.NOT_FOUND,
    errors.OperationNotFound: HTTPStatus.NOT_FOUND,
    errors.SessionExists: HTTPStatus.CONFLICT,
    errors.SessionBusy: HTTPStatus.CONFLICT,
    errors.LeaseLost: HTTPStatus.CONFLICT,
    errors.ToolInFlight: HTTPStatus.CONFLICT,
    errors.SessionExpired: HTTPStatus.GONE,
    errors.ModelMismatch: HTTPStatus.PRECONDITION_FAILED,
    errors.InvalidEntry: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.DatabaseError: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.AgentStateError: HTTPStatus.INTERNAL_SERVER_ERROR,
}


class Problem(BaseModel):
    """What an error looks like. Conflicts also tell the session's ``revision``."""

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
    """A response that tells of one problem."""
    body = Problem(type=f"/problems/{slug}", title=title, status=status, detail=detail, retryable=retryable, **more)
    return JSONResponse(body.model_dump(), status_code=status, media_type="application/problem+json", headers=headers)


def install(app: FastAPI) -> None:
    """Let ``app`` answer every error with a problem."""
    app.add_exception_handler(errors.AgentStateError, _own)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _framework)
    app.add_exception_handler(Exception, _unexpected)


def _own(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, errors.AgentStateError)
    status = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
    more: dict[str, Any] = {}
    headers: dict[str, str] = {}
    if isinstance(error, errors.SessionError) and error.revision is not None:
        more["revision"] = str(error.revision)
    if isinstance(error, errors.SessionBusy):
        more["retry_after_s"] = error.retry_after_s
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    title = (type(error).__doc__ or "").partition("\n")[0]
    return problem(status, error.slug(), title, str(error), retryable=error.retryable, headers=headers, **more)


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
    return problem(error.status_code, slug, title, detail, headers=dict(error.headers or {}))


def _unexpected(request: Request, error: Exception) -> JSONResponse:
    # The server's log has the traceback; the caller gets nothing of the inside.
    return problem(
        HTTPStatus.INTERNAL_SERVER_ERROR,
        "internal-error",
        "The service failed.",
        "an unexpected error; the log of the service tells more",
    )
