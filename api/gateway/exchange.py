"""One request of a client and its answer, on ASGI itself: nothing is between a chunk and the socket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from agentstate.api.bodies import BODY_TIMEOUT_S
from agentstate.api.gateway import documents
from agentstate.api.gateway.errors import Refusal
from agentstate.sessions.tenants import Tenant

T = TypeVar("T")
JSON = (b"content-type", b"application/json")
_DRAINED = 8  # times the limit: a client that is cut off while it sends sees a broken connection instead of the answer


# Longer bodies are read on a thread.
LONG_BYTES = 256 << 10


class Gone(Exception):
    """The client has left."""


class Exchange:
    """``headers`` has each name, in lower case, once. ``anthropic`` says in whose form the client reads errors.
    ``before_end`` is called before the client can know that it has all of its answer, and may send the next request."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, tenant: Tenant, *, anthropic: bool = False):
        self.scope = scope
        self.tenant = tenant
        self.anthropic = anthropic
        self.headers: Mapping[bytes, bytes] = dict(reversed(scope["headers"]))
        self.begun = False
        self.before_end: Callable[[], None] = lambda: None
        self._receive = receive
        self._send = send

    async def body(self, most_bytes: int) -> bytes:
        """All of the request's body. Raises Refusal, 413 or 408, and Gone."""
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    size += len(message.get("body", b""))
                    if size <= most_bytes:
                        parts.append(message.get("body", b""))
                    if not message.get("more_body", False) or size > _DRAINED * most_bytes:
                        break
        except TimeoutError:
            raise Refusal(408, "body_too_slow", f"a body must arrive within {BODY_TIMEOUT_S:g} s") from None
        if size > most_bytes:
            raise Refusal(
                413,
                "body_too_large",
                f"a body may have {most_bytes} bytes, this one has more: see AGENTSTATE_GATEWAY_BODY_BYTES",
            )
        return b"".join(parts)

    async def document(self, most_bytes: int, *, or_none: bool = False) -> tuple[bytes, dict[str, Any]]:
        """The body, and the JSON object that it is: an empty one if there may be ``or_none``, and is none. Raises
        Refusal, Gone."""
        raw = await self.body(most_bytes)
        if or_none and not raw.strip(b" \t\r\n"):
            return raw, {}
        # A long one takes longer than the next chunks of other streams may wait.
        return raw, await run_in_threadpool(_object, raw) if len(raw) > LONG_BYTES else _object(raw)

    async def start(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self.begun = True
        await self._send({"type": "http.response.start", "status": status, "headers": list(headers)})

    async def send(self, chunk: bytes, *, last: bool = False) -> None:
        """Returns once the socket takes more: a client that does not read holds its engine up, and fills no memory."""
        if last:
            self.before_end()
        await self._send({"type": "http.response.body", "body": chunk, "more_body": not last})

    async def answer(self, status: int, body: bytes, headers: Iterable[tuple[bytes, bytes]] = (JSON,)) -> None:
        """A whole answer."""
        await self.start(status, [*headers, (b"content-length", str(len(body)).encode())])
        await self.send(body, last=True)

    async def answer_document(self, document: Any, status: int = 200) -> None:
        await self.answer(status, documents.dumps(document))

    async def refuse(self, refused: Refusal) -> None:
        await self.answer(refused.status, documents.dumps(refused.body(self.anthropic)), [JSON, *refused.told()])

    async def while_there(self, work: Coroutine[Any, Any, T]) -> T:
        """``work``, which is cancelled when the client leaves. The whole body must have been read. Raises Gone."""
        working = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(self._left())
        try:
            await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            raise Gone
        finally:
            leaving.cancel()
            if not working.done():
                working.cancel()
                await asyncio.gather(working, return_exceptions=True)

    async def _left(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


def _object(raw: bytes) -> dict[str, Any]:
    """The JSON object that a body is. Raises Refusal."""
    if not documents.has_most(raw):
        raise Refusal(
            413, "body_too_large", f"the body has more than {documents.MOST_VALUES:,} values: lists, objects, numbers"
        )
    try:
        document = documents.loads(raw)
    except ValueError as error:
        raise Refusal(400, "invalid_json", f"the body is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise Refusal(400, "invalid_json", "the body is not a JSON object")
    return document
