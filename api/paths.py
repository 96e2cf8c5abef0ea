"""Ids in paths: one with a slash in it is one segment, which its client sends as ``%2F``."""

from __future__ import annotations

from urllib.parse import unquote

from starlette.types import ASGIApp, Receive, Scope, Send


class EncodedSlashes:
    """ASGI middleware: routes are found as if ``%2F`` were no slash. `decoded` gives back what a segment stands for."""

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
    """A parameter of a path, as its client meant it."""
    return segment.replace("%2F", "/").replace("%25", "%")
