"""What stands in for an engine where its computing is not what is measured: the control endpoint, which answers every
flush with ``durable`` at once, accepts every forecast, and tells who asks about it or its sessions; and the HTTP side,
which replays a stream. Each is a process of its own."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection as Pipe
from typing import Any, cast

import zmq

from agentstate import ids
from agentstate.fleet.control import new_secret, pack, protect, unpack
from agentstate.fleet.engines import Engine

# Of a model whose answer comes as fast as it can be sent.
AT_ONCE_S = 0.0
WORDS = 100
_CHUNKS = re.compile(rb'"max_(?:completion_)?tokens":\s*(\d+)')
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
# What SGLang's router asks for. A path of no directory spares it looking for a tokenizer elsewhere.
_ANYTHING = json.dumps({"status": "ok", "model_path": "/none", "served_model_name": "bench"}).encode()


def engine(control_address: str, control_secret: str, base_url: str, model: str, rank_of: str = "bench") -> Engine:
    """An engine of one rank, to be registered; each of a service's has another ``rank_of``, its node."""
    return Engine(
        id=ids.new("eng"),
        node=rank_of,
        rank=0,
        control_address=control_address,
        control_secret=control_secret,
        base_url=base_url,
        model=model,
        fingerprint="0" * 64,
        pages_dir="/pages",
    )


@contextmanager
def control() -> Iterator[tuple[str, str]]:
    """A control endpoint: its address and its secret."""
    with _process(_answer) as told:
        yield told


@contextmanager
def replaying(intervals_s: Sequence[float]) -> Iterator[list[str]]:
    """A base URL for each of ``intervals_s``: the time between two chunks of an answer."""
    with _process(_replay, intervals_s) as told:
        yield told


def answer(chunks: int) -> str:
    """The text of an answer of so many chunks that are sent at once."""
    return "".join(_word(number) for number in range(chunks))


@contextmanager
def _process(work: Callable[..., None], *arguments: Any) -> Iterator[Any]:
    """Run ``work`` in a process, and wait for what it tells."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


_TIERS = {name: {"tokens": 64, "bytes": 1024} for name in ("device", "host", "disk")}
_SAID: dict[str, dict[str, Any]] = {
    "flush": {"state": "durable", "tokens": 64, "pages": 1, "bytes": 1024},
    "foresee": {"state": "accepted"},
    "stat": {"off": None, "store": {"pages": 1, "extents": 1, "bytes": 1024}, "restore": {"restores": 0}},
    "explain": {"tiers": _TIERS, "wait": None},
    "decisions": {"decisions": [], "more": False},
}


def _answer(pipe: Pipe) -> None:
    socket, secret = zmq.Context.instance().socket(zmq.ROUTER), new_secret()
    protect(socket, secret, server=True)
    socket.bind("tcp://127.0.0.1:*")
    pipe.send((socket.getsockopt_string(zmq.LAST_ENDPOINT), secret))
    while True:
        *sender, raw = socket.recv_multipart()
        socket.send_multipart([*sender, pack({"ok": True, **_SAID[unpack(raw)["verb"]]})])


def _replay(pipe: Pipe, intervals_s: Sequence[float]) -> None:
    async def serve() -> None:
        loop = asyncio.get_running_loop()
        servers = [
            await loop.create_server(lambda interval_s=interval_s: _Connection(interval_s), "127.0.0.1", 0)
            for interval_s in intervals_s
        ]
        pipe.send([f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1" for server in servers])
        await asyncio.Event().wait()

    # As fast as it can be: an engine is to be waited for as little as possible.
    import uvloop

    uvloop.run(serve())


def _word(number: int) -> str:
    return f"word{number % WORDS:02} "


def _frame(content: str | None, **told: Any) -> bytes:
    """A chunk of an answer as SGLang 0.5.23 sends it, in a chunk of HTTP."""
    delta = {"role": None, "content": content, "reasoning_content": None, "tool_calls": None}
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, "matched_stop": None, **told}
    document = {
        "id": "chatcmpl-0123456789abcdef0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": 1764400000,
        "model": "bench",
        "choices": [choice],
        "usage": None,
    }
    return _framed(b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n")


def _framed(event: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(event), event)


_WORDS = [_frame(_word(number)) for number in range(WORDS)]
# Of the same length for years: nanoseconds since the machine started have at most 17 digits.
_DUE = b"0" * 17
_TIMED = _frame(f"{_DUE.decode()} ").split(_DUE)
_END = _frame(None, finish_reason="stop", matched_stop=2) + _framed(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class _Connection(asyncio.Protocol):
    """Answers one request after the other. A paced answer's chunks say when they are due, in nanoseconds of the
    machine's monotonic clock: the first when the request is there."""

    def __init__(self, interval_s: float):
        self._interval_s = interval_s
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._buffer[:end]).lower()
        length = re.search(rb"content-length:\s*(\d+)", head)
        whole = end + 4 + (int(length[1]) if length else 0)
        if len(self._buffer) < whole:
            return
        body = bytes(self._buffer[end + 4 : whole])
        del self._buffer[:whole]
        asked = _CHUNKS.search(body) if b"/chat/completions" in head.split(b"\r\n", 1)[0] else None
        if asked is None:
            self._transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(_ANYTHING)
                + _ANYTHING
            )
        elif self._interval_s:
            self._transport.write(_HEAD)
            self._send(time.monotonic_ns(), self._loop.time(), 0, int(asked[1]))
        else:
            # The first token by itself, as it comes from a prefill.
            self._transport.write(_HEAD + _WORDS[0])
            rest = [_WORDS[number % WORDS] for number in range(1, int(asked[1]))]
            self._loop.call_soon(self._transport.write, b"".join([*rest, _END]))

    def _send(self, begun_ns: int, begun_s: float, number: int, count: int) -> None:
        due_ns = begun_ns + round(number * self._interval_s * 1e9)
        self._transport.write((b"%017d" % due_ns).join(_TIMED))
        if number + 1 == count:
            self._transport.write(_END)
            return
        self._timer = self._loop.call_at(
            begun_s + (number + 1) * self._interval_s, self._send, begun_ns, begun_s, number + 1, count
        )
