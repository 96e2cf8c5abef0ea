"""Admission, before any of a body is read; and HTTP's requirements on every route.

A request under ``/v1``, or to the gateway, is authenticated by its headers alone. A service without API keys serves
this machine only, and only under this machine's names: otherwise a web page whose name resolves to a loopback address
could read and delete sessions.
"""

from __future__ import annotations

from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentstate.api.gateway import app as gateway
from agentstate.api.gateway.errors import Refusal
from agentstate.api.heads import MAX_HEAD_BYTES
from agentstate.api.problems import answer_to, problem
from agentstate.errors import AgentStateError, HostRefused, NotAllowed
from agentstate.loopback import is_loopback

READING = ("GET", "HEAD", "OPTIONS")


class Guard:
    """ASGI middleware. Stores the tenant in the scope's state, answers HEAD as GET without a body, and answers 415 to
    compressed bodies."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        to_gateway = gateway.serves(scope["path"])
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEAD_BYTES:
            detail = f"the headers of a request may have {MAX_HEAD_BYTES} bytes, these have more"
            if to_gateway:
                refused = gateway.answer_to(Refusal(431, "headers_too_large", detail), scope["path"])
            else:
                refused = problem(
                    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                    "headers-too-large",
                    "The headers are too large.",
                    detail,
                )
            await refused(scope, receive, send)
            return
        given = {name: value.decode("latin-1") for name, value in scope["headers"]}
        asked_for_head = scope["method"] == "HEAD"
        if asked_for_head:
            send = without_body(send)
        if to_gateway or scope["path"] == "/v1" or scope["path"].startswith("/v1/"):
            state = scope["app"].state
            try:
                if to_gateway:
                    caller, open_to_all = await state.gateway.admit(given)
                else:
                    caller, open_to_all = await state.service.gate.admit(given.get(b"authorization"))
                if open_to_all:
                    require_local(given.get(b"host"), given.get(b"origin"))
                if not caller.role.writes and scope["method"] not in READING:
                    raise NotAllowed(f"this API key is a viewer's: it may not {scope['method']} {scope['path'][:200]}")
            except AgentStateError as error:
                refused = gateway.answer_to(error, scope["path"]) if to_gateway else answer_to(error)
                await refused(scope, receive, send)
                return
            scope.setdefault("state", {}).update(tenant=caller.tenant, role=caller.role)
        encoding = given.get(b"content-encoding", "").strip().lower()
        if encoding not in ("", "identity"):
            detail = f"a body with Content-Encoding {encoding[:40]!r} is not read: send it as it is"
            if to_gateway:
                headers = [(b"accept-encoding", b"identity")]
                unread = Refusal(415, "unsupported_encoding", detail, headers=headers)
                refused = gateway.answer_to(unread, scope["path"])
            else:
                refused = problem(
                    HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                    "unsupported-encoding",
                    "The body has an encoding that the service does not read.",
                    detail,
                    headers={"Accept-Encoding": "identity"},
                )
            await refused(scope, receive, send)
            return
        if not asked_for_head:
            await self._app(scope, receive, send)
            return
        # The server keeps the original scope: it must know that no body follows.
        inner = {**scope, "method": "GET"}
        try:
            await self._app(inner, receive, send)
        finally:
            scope.update({name: inner[name] for name in ("route", "path_params") if name in inner})


def without_body(send: Send) -> Send:
    """``send`` for an answer that ends with its headers, even if the body would be an endless stream."""

    async def headers_only(message: Message) -> None:
        if message["type"] == "http.response.start":
            await send(message)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    return headers_only


def require_local(host: str | None, origin: str | None) -> None:
    """Raises HostRefused unless both, if given, are names of this machine."""
    for name, value, url in (("Host", host, f"//{host}"), ("Origin", origin, origin or "")):
        if value and not is_loopback(url):
            raise HostRefused(
                f"{name} {value[:100]!r} is no name of this machine, and the service has no API key: make one with "
                "`agentstate keys create`, or ask under 127.0.0.1 or localhost"
            )
