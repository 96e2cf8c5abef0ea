"""A proxy before an S3 server that spoils what passes through it: the server itself stays as it is."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

_CHUNK_BYTES = 64 << 10


class Fault(StrEnum):
    """What becomes of requests."""

    NONE = "none"
    REFUSED = "refused"
    """Nobody listens, and connections are cut."""
    UNAVAILABLE = "unavailable"
    """Each is answered 503, and none reaches the server."""
    WRONG = "wrong"
    """A byte is another in every 64 KiB of an object. What requests of that size or less get, such as a header, is
    right."""
    SHORT = "short"
    """Objects end in their middle."""


@dataclass(frozen=True)
class _Head:
    """A request's or an answer's first line and its headers, with lower-case names."""

    first: str
    headers: dict[str, str]

    @classmethod
    def parse(cls, raw: bytes) -> _Head:
        first, *lines = raw.decode("latin-1").strip().split("\r\n")
        pairs = (line.partition(":") for line in lines)
        return cls(first, {name.strip().lower(): value.strip() for name, _, value in pairs})

    def with_headers(self, **headers: str) -> _Head:
        return _Head(self.first, self.headers | {name.replace("_", "-"): value for name, value in headers.items()})

    def encode(self) -> bytes:
        lines = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        return f"{self.first}\r\n{lines}\r\n".encode("latin-1")


class Proxy:
    """Listens on a port of its own for the server at ``upstream``. Its ``fault`` may be set at any time, and counts for
    answers that begin after that. Clients sign their requests for ``endpoint``."""

    def __init__(self, upstream: str):
        self.fault = Fault.NONE
        self._upstream = urlsplit(upstream)
        self._loop = asyncio.new_event_loop()
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._held = _bound(0)
        self._port = int(self._held.getsockname()[1])
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty-proxy", daemon=True)
        self._thread.start()
        self._run(self._listen())

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def set(self, fault: Fault) -> None:
        """When this returns, new requests meet ``fault``."""
        self.fault = fault
        self._run(self._hang_up() if fault is Fault.REFUSED else self._listen())

    def close(self) -> None:
        self._run(self._hang_up())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._held.close()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _listen(self) -> None:
        if self._server is None:
            self._held.close()
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)

    async def _hang_up(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
            # The port stays ours: who connects to it meanwhile is refused.
            self._held = _bound(self._port)
        connections = list(self._connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        there: asyncio.StreamWriter | None = None
        try:
            with suppress(OSError, EOFError, asyncio.LimitOverrunError):
                answers, there = await asyncio.open_connection(self._upstream.hostname, self._upstream.port)
                while await self._pass(reader, writer, answers, there):
                    pass
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self._connections.discard(task)
            for end in (writer, there):
                if end is not None:
                    end.close()

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        answers: asyncio.StreamReader,
        there: asyncio.StreamWriter,
    ) -> bool:
        """One request and its answer. Returns whether another may follow."""
        request = _Head.parse(await reader.readuntil(b"\r\n\r\n"))
        method, target, _ = request.first.split(" ", 2)
        reaches = self.fault is not Fault.UNAVAILABLE
        if reaches:
            there.write(request.encode())
        async for chunk in _body(reader, request):
            if reaches:
                there.write(chunk)
                await there.drain()
        if not reaches:
            await _error(writer, method, "503 Service Unavailable", "ServiceUnavailable")
            return True
        answer = _Head.parse(await answers.readuntil(b"\r\n\r\n"))
        has_body = method != "HEAD" and answer.first.split(" ")[1] not in ("204", "304")
        body = _body(answers, answer, until_end=True) if has_body else _nothing()
        of_object = method in ("GET", "HEAD") and answer.first.split(" ")[1] in ("200", "206") and "?" not in target
        if of_object and self.fault is Fault.SHORT:
            await _shortened(writer, method, answer, body)
        else:
            large = int(answer.headers.get("content-length", 0)) > _CHUNK_BYTES
            writer.write(answer.encode())
            await _send(writer, body, wrong=of_object and large and self.fault is Fault.WRONG)
        return "close" not in answer.headers.get("connection", "") and (
            not has_body or "content-length" in answer.headers or "transfer-encoding" in answer.headers
        )


@contextmanager
def proxy(upstream: str) -> Iterator[Proxy]:
    server = Proxy(upstream)
    try:
        yield server
    finally:
        server.close()


def _bound(port: int) -> socket.socket:
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", port))
    return held


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield b""


async def _body(reader: asyncio.StreamReader, head: _Head, *, until_end: bool = False) -> AsyncIterator[bytes]:
    """As it is sent, chunks with their lengths. An answer without a length goes on ``until_end`` of the connection."""
    if head.headers.get("transfer-encoding", "").lower() == "chunked":
        while True:
            size = await reader.readuntil(b"\r\n")
            yield size + await reader.readexactly(int(size.split(b";")[0], 16) + 2)
            if int(size.split(b";")[0], 16) == 0:
                return
    if "content-length" not in head.headers:
        while until_end and (chunk := await reader.read(_CHUNK_BYTES)):
            yield chunk
        return
    left = int(head.headers["content-length"])
    while left:
        chunk = await reader.readexactly(min(left, _CHUNK_BYTES))
        left -= len(chunk)
        yield chunk


async def _send(writer: asyncio.StreamWriter, body: AsyncIterator[bytes], *, wrong: bool) -> None:
    async for chunk in body:
        if wrong:
            spoiled = bytearray(chunk)
            spoiled[len(chunk) // 2] ^= 1
            chunk = bytes(spoiled)
        writer.write(chunk)
        await writer.drain()


async def _shortened(writer: asyncio.StreamWriter, method: str, answer: _Head, body: AsyncIterator[bytes]) -> None:
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("content-range", ""))
    data = b"".join([chunk async for chunk in body])
    total = int(found[3]) if found else int(answer.headers.get("content-length", 0))
    start, end = (int(found[1]), int(found[2]) + 1) if found else (0, total)
    if start >= total // 2:
        await _error(writer, method, "416 Range Not Satisfiable", "InvalidRange")
        return
    end = min(end, total // 2)
    answer = answer.with_headers(content_length=str(end - start))
    if found:
        answer = answer.with_headers(content_range=f"bytes {start}-{end - 1}/{total // 2}")
    writer.write(answer.encode() + data[: end - start])
    await writer.drain()


async def _error(writer: asyncio.StreamWriter, method: str, status: str, code: str) -> None:
    body = f"<Error><Code>{code}</Code><Message>of a test</Message></Error>".encode()
    head = _Head(f"HTTP/1.1 {status}", {"content-type": "application/xml", "content-length": str(len(body))})
    writer.write(head.encode() + (b"" if method == "HEAD" else body))
    await writer.drain()
