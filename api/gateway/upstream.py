"""Requests to engines: bytes go there and come back as they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress

import aiohttp

from agentstate.api.gateway.errors import Refusal

# Below the time after which SGLang closes an idle connection, 5 s: a request must not meet one that is being closed.
KEEP_ALIVE_S = 4.0
CONNECT_S = 5.0
# The longest answer that is held until it is whole.
ANSWER_BYTES = 64 << 20
# Of a connection, and of the proxy that this is.
HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)


class Unreachable(Refusal):
    """No connection to an engine: it has seen nothing of the request."""


class Answer:
    """What an engine answers to one request. ``chunks`` raises Refusal if it breaks off."""

    def __init__(self, response: aiohttp.ClientResponse, base_url: str):
        self._response = response
        self._base_url = base_url
        self.status = response.status
        self.content_type = response.headers.get("Content-Type", "application/json")

    @property
    def streams(self) -> bool:
        return self.content_type.startswith("text/event-stream")

    @property
    def length(self) -> str | None:
        """How many bytes it has, if the engine says so."""
        return self._response.headers.get("Content-Length")

    @property
    def retry_after(self) -> str | None:
        return self._response.headers.get("Retry-After")

    async def chunks(self) -> AsyncIterator[bytes]:
        """What comes, as soon as it comes."""
        content = self._response.content
        try:
            while chunk := await content.readany():
                yield chunk
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise _broken(self._base_url, error) from error

    async def body(self, most_bytes: int = ANSWER_BYTES) -> bytes:
        """All of it. Raises Refusal if that is more than ``most_bytes``."""
        chunks, size = [], 0
        async for chunk in self.chunks():
            size += len(chunk)
            if size > most_bytes:
                raise Refusal(
                    502, "answer_too_large", f"the engine's answer has more than {most_bytes} bytes: ask for a stream"
                )
            chunks.append(chunk)
        return b"".join(chunks)


class Upstream:
    """The connections to all engines, of one event loop. ``api_key`` is sent to them; one that sends nothing for
    ``silence_s`` is given up."""

    def __init__(self, api_key: str, silence_s: float):
        self._authorization = f"Bearer {api_key}" if api_key else None
        self._timeout = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=CONNECT_S, sock_read=silence_s)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
            timeout=self._timeout,
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Content-Type"),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    @asynccontextmanager
    async def ask(
        self, base_url: str, path: str, body: bytes, headers: Iterable[tuple[bytes, bytes]], *, method: str = "POST"
    ) -> AsyncIterator[Answer]:
        """The engine's answer. Leaving the context before its end closes the connection, which ends the request there.
        Raises Refusal, 502 or 504, if there is none; Unreachable if there was no connection."""
        sent = [(name.decode("latin-1"), _text(value)) for name, value in headers]
        sent.append(("Accept-Encoding", "identity"))
        if self._authorization is not None:
            sent.append(("Authorization", self._authorization))
        try:
            response = await self._session.request(
                method, _root(base_url) + path, data=body, headers=sent, allow_redirects=False
            )
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise _broken(base_url, error) from error
        try:
            yield Answer(response, base_url)
        finally:
            # Back to the pool if it was read to its end.
            response.release() if response.content.at_eof() else response.close()

    async def abort(self, base_url: str, request_id: str) -> None:
        """End a request whose connection does not: SGLang looks seconds later whether the client of a whole answer is
        still there. Ids are of one length, so none is the beginning of another."""
        with suppress(Refusal, TimeoutError):
            async with asyncio.timeout(CONNECT_S):
                body = b'{"rid": "' + request_id.encode() + b'"}'
                async with self.ask(
                    base_url, "/abort_request", body, [(b"content-type", b"application/json")]
                ) as answer:
                    await answer.body()

    async def close(self) -> None:
        await self._session.close()


def _text(value: bytes) -> str:
    """A header's value as text that aiohttp, which writes UTF-8, makes the same bytes of where it can."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _root(base_url: str) -> str:
    """An engine registers the URL of its OpenAI routes, which end in ``/v1``."""
    return base_url.rstrip("/").removesuffix("/v1")


def _broken(base_url: str, error: BaseException) -> Refusal:
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return Unreachable(502, "engine_unreachable", f"the engine at {base_url} cannot be reached", retryable=True)
    if isinstance(error, TimeoutError):
        return Refusal(504, "engine_timeout", f"the engine at {base_url} sent nothing for too long", retryable=True)
    reason = str(error) or type(error).__name__
    return Refusal(502, "engine_unreachable", f"the engine at {base_url} broke off: {reason}", retryable=True)
