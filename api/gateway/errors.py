"""Errors as the clients of each API expect them: OpenAI's ``{"error": {…}}``, or Anthropic's for Messages.

SDKs retry 408, 409, 429 and 5xx on their own; the header ``x-should-retry`` says where that is of use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from agentstate import errors
from agentstate.api.gateway import documents
from agentstate.api.problems import STATUS

_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {**_OPENAI_TYPES, 413: "request_too_large", 503: "overloaded_error", 529: "overloaded_error"}
# What differs from the session API: a lost precondition there is a wrong request here.
_STATUSES: dict[type[errors.AgentStateError], int] = {
    errors.ModelMismatch: HTTPStatus.BAD_REQUEST,
    errors.InvalidEntry: HTTPStatus.BAD_REQUEST,
    errors.InvalidId: HTTPStatus.BAD_REQUEST,
    errors.EngineUnreachable: HTTPStatus.BAD_GATEWAY,
    errors.EngineRefused: HTTPStatus.BAD_GATEWAY,
}


@dataclass(eq=False)
class Refusal(Exception):
    """An answer that is an error. ``code`` is for programs, ``param`` names the wrong field; ``retryable`` says whether
    the same request may succeed later."""

    status: int
    code: str
    message: str
    param: str | None = None
    retryable: bool = False
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)

    def body(self, anthropic: bool) -> dict[str, Any]:
        types, other = (_ANTHROPIC_TYPES, "api_error") if anthropic else (_OPENAI_TYPES, "server_error")
        kind = types.get(self.status, "invalid_request_error" if self.status < 500 else other)
        if anthropic:
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def told(self) -> list[tuple[bytes, bytes]]:
        """Its headers beside those of the body."""
        return [*self.headers, (b"x-should-retry", b"true" if self.retryable else b"false")]

    def event(self, anthropic: bool) -> bytes:
        """What a stream that has begun ends with."""
        data = documents.dumps(self.body(anthropic))
        return b"event: error\ndata: " + data + b"\n\n" if anthropic else b"data: " + data + b"\n\n"


def refusal(error: errors.AgentStateError) -> Refusal:
    """An AgentStateError as an answer."""
    kinds = type(error).__mro__
    status = next(_STATUSES.get(kind) or STATUS[kind] for kind in kinds if kind in _STATUSES or kind in STATUS)
    headers = []
    if isinstance(error, errors.SessionBusy | errors.RateLimited):
        headers.append((b"retry-after", str(max(1, math.ceil(error.retry_after_s))).encode()))
    elif isinstance(error, errors.Unauthenticated):
        headers.append((b"www-authenticate", b"Bearer"))
    return Refusal(int(status), error.slug().replace("-", "_"), str(error), None, error.retryable, headers)


def reshaped(status: int, body: bytes, anthropic: bool) -> bytes:
    """An engine's error as clients expect it. SGLang's are flat, those of its framework have a ``detail``."""
    try:
        said = documents.loads(body)
    except ValueError:
        said = {}
    if not isinstance(said, dict):
        said = {}
    nested = isinstance(said.get("error"), dict)
    inner = said["error"] if nested else said
    if nested and anthropic == (said.get("type") == "error") and isinstance(inner.get("code"), str | None):
        return body
    message = inner.get("message") or said.get("detail") or said.get("error")
    if not isinstance(message, str):
        shown = body.decode("utf-8", "replace").strip()[:1000] if message is None else documents.dumps(message).decode()
        message = shown or f"the engine answered {status} without a reason"
    code, param = inner.get("code"), inner.get("param")
    refused = Refusal(status, code if isinstance(code, str) else _slug(status), message, param)
    return documents.dumps(refused.body(anthropic))


def _slug(status: int) -> str:
    try:
        return HTTPStatus(status).name.lower()
    except ValueError:
        return "engine_error"
