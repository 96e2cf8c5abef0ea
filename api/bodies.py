"""The bounds on request bodies: in size, and in time."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentstate.api.problems import problem

MAX_BODY_BYTES = 8 * 1024 * 1024
# How much of an oversized body to read and discard: a client that is cut off while it sends sees a broken connection
# instead of the answer.
MAX_DRAINED_BYTES = 64 * 1024 * 1024
# How long a whole body may take to arrive. It is held in memory meanwhile.
BODY_TIMEOUT_S = 60.0


class BodyLimit:
    """ASGI middleware: answers 413 to a body of more than ``MAX_BODY_BYTES``, announced or not, and 408 to one that
    takes longer than ``BODY_TIMEOUT_S``.

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
        deadline_s = asyncio.get_running_loop().time() + BODY_TIMEOUT_S
        while True:
            try:
                async with asyncio.timeout_at(deadline_s):
                    message = await receive()
            except TimeoutError:
                held.clear()
                slow = problem(
                    HTTPStatus.REQUEST_TIMEOUT,
                    "body-too-slow",
                    "The body did not arrive in time.",
                    f"a body must arrive within {BODY_TIMEOUT_S:g} s",
                    retryable=True,
                    headers={"Connection": "close"},
                )
                await slow(scope, receive, send)
                return
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
