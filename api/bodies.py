"""The bound on request bodies."""

from __future__ import annotations

from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import problem

MAX_BODY_BYTES = 8 * 1024 * 1024
# Of a body that is too large so much is still read, and thrown away: a client that is cut off while it sends sees a
# broken connection instead of the answer.
MAX_DRAINED_BYTES = 64 * 1024 * 1024


class BodyLimit:
    """ASGI middleware: answers 413 to a body of more than ``MAX_BODY_BYTES``, whether or not its length was announced.

    The body is held in memory until it is complete, as the endpoints would do.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        held: list[Message] = []
        size_bytes = 0
        while True:
            message = await receive()
            size_bytes += len(message.get("body", b""))
            if size_bytes <= MAX_BODY_BYTES:
                held.append(message)
            else:
                held.clear()
            if message["type"] != "http.request" or not message.get("more_body", False):
                break
            if size_bytes > MAX_DRAINED_BYTES:
                break
        if size_bytes > MAX_BODY_BYTES:
            response = problem(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                "body-too-large",
                "The body is too large.",
                f"a body may have {MAX_BODY_BYTES} bytes: append fewer entries at once",
            )
            await response(scope, receive, send)
            return

        async def replay() -> Message:
            return held.pop(0) if held else await receive()

        await self._app(scope, replay, send)
