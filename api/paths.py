"""Ids in paths: an id with a slash is one segment, whose slash the client sends as ``%2F``."""

from __future__ import annotations

from urllib.parse import unquote

from starlette.types import ASGIApp, Receive, Scope, Send


class EncodedSlashes:
    """ASGI middleware: routing treats ``%2F`` as no slash. `decoded` returns the original segment."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw: bytes = scope.get("raw_path") or b""
        if scope["type"] == "http" and (b"%2f" in raw.lower() or b"%25" in raw):
            segments = raw.decode("latin-1").split("/")
            scope["path"] = "/".join(_encoded(unquote(segment)) for segment in segments)
        await self._app(scope, receive, send)


def _encoded(segment: str) -> str:
    return segment.replace("%", "%25").replace("/", "%2F")


def decoded(segment: str) -> str:
    """A path parameter as the client meant it."""
    return segment.replace("%2F", "/").replace("%25", "%")
