"""A client of streamed answers that takes as little time as it can, so that what it measures is what is in between."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

from agentstate.errors import EngineRefused, EngineUnreachable

_DUE = re.compile(rb'"content":\s*"(\d{17}) "')
_TIMING = re.compile(r"\b(\w+);dur=([0-9.]+)")
_EVENT = b"data:"
_ERROR = b'data: {"error"'
# A chunk of HTTP that ends with an event ends with an empty line of it, so this is the end of the answer.
_END = b"0\r\n\r\n"


@dataclass
class Answer:
    """An answer as it came. ``headers`` have names in lower case; of several of one name, all, with commas."""

    headers: dict[str, str] = field(default_factory=dict)
    ttft_ms: float = 0.0
    said: str = ""
    """Its text, if that was to be heard."""
    late_ms: list[float] = field(default_factory=list)
    """How late each paced chunk was, against the schedule of `agentstate.benchmarks.stand_in`."""

    @property
    def server_ms(self) -> dict[str, float]:
        """What the service says of its time."""
        return {name: float(ms) for name, ms in _TIMING.findall(self.headers.get("server-timing", ""))}


class Connection(asyncio.Protocol):
    """A connection to ``base_url`` that is kept, and made again where the server has closed it. One request at a time.
    ``arrived`` is told, if given, of each chunk that says when it was due: how late it is, in milliseconds. Only one
    that ``hears`` keeps the text of an answer."""

    def __init__(self, base_url: str, arrived: Callable[[float], None] | None = None, *, hears: bool = False):
        url = urlsplit(base_url)
        self._host, self._port = url.hostname, url.port
        self._head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {url.netloc}\r\ncontent-type: application/json\r\n"
        self._arrived = arrived
        self._hears = hears
        self._heard = b""
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[Answer] | None = None

    async def ask(self, body: bytes) -> Answer:
        """The answer, once it is whole. Raises EngineUnreachable, or EngineRefused unless it is a whole stream."""
        loop = asyncio.get_running_loop()
        if self._transport is None:
            try:
                await loop.create_connection(lambda: self, self._host, self._port)
            except OSError as error:
                raise EngineUnreachable(f"nothing answers at {self._host}:{self._port}: {error}") from error
        assert self._transport is not None
        self._done = loop.create_future()
        self._answer, self._buffer, self._in_body, self._heard = Answer(), b"", False, b""
        request = f"{self._head}content-length: {len(body)}\r\n\r\n".encode() + body
        self._asked_ns = time.monotonic_ns()
        self._transport.write(request)
        return await self._done

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._fail(EngineRefused(f"the connection was closed in an answer, after {self._last!r}"))

    def data_received(self, data: bytes) -> None:
        now_ns = time.monotonic_ns()
        self._buffer += data
        if self._hears:
            self._heard += data
        if not self._in_body and not self._read_head():
            return
        if not self._answer.ttft_ms and _EVENT in self._buffer:
            self._answer.ttft_ms = (now_ns - self._asked_ns) / 1e6
        read = 0
        for due in _DUE.finditer(self._buffer):
            late_ms = (now_ns - int(due[1])) / 1e6
            self._answer.late_ms.append(late_ms)
            if self._arrived is not None:
                self._arrived(late_ms)
            read = due.end()
        if _ERROR in self._buffer:
            self._fail(EngineRefused(f"a stream ended with an error: {self._last!r}"))
        ended = self._buffer.endswith(_END)
        # What is left may be the first part of an event.
        self._buffer = self._buffer[max(read, self._buffer.rfind(b"\n\n")) :]
        if ended and self._done is not None and not self._done.done():
            self._answer.said = "".join(_contents(self._heard))
            self._done.set_result(self._answer)

    @property
    def _last(self) -> bytes:
        return getattr(self, "_buffer", b"")[-300:]

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        status, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        if status.split(" ")[1] != "200":
            self._fail(EngineRefused(f"{status}: {self._buffer[end + 4 :][:300]!r}"))
            self.close()
            return False
        for line in lines:
            name, _, value = line.partition(":")
            known = self._answer.headers.get(name.lower())
            self._answer.headers[name.lower()] = value.strip() if known is None else f"{known}, {value.strip()}"
        self._buffer = self._buffer[end + 4 :]
        if "chunked" not in self._answer.headers.get("transfer-encoding", ""):
            self._fail(EngineRefused(f"the answer is not a stream: {self._buffer[:300]!r}"))
            self.close()
            return False
        self._in_body = True
        return True

    def _fail(self, error: Exception) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)


def _contents(stream: bytes) -> Iterator[str]:
    for line in stream.splitlines():
        if line.startswith(b"data: {") and (choices := json.loads(line[6:])["choices"]):
            yield choices[0]["delta"].get("content") or ""
