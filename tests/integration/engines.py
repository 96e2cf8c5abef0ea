"""An engine's HTTP side that a test scripts: what it sends, when, and how it ends. It answers nothing on its own."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Asked:
    """A request as it came, and the connection for its answer."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    _socket: socket.socket
    left: threading.Event = field(default_factory=threading.Event)
    """Set when the peer has closed the connection."""

    @property
    def document(self) -> dict[str, Any]:
        return dict(json.loads(self.body))

    def whole(self, document: Any, status: int = 200, **headers: str) -> None:
        raw = document if isinstance(document, bytes) else json.dumps(document).encode()
        lines = [f"HTTP/1.1 {status} X", "content-type: application/json", f"content-length: {len(raw)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self._socket.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + raw)

    def start(self) -> None:
        """Begin a stream."""
        self._socket.sendall(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
        )

    def send(self, *chunks: bytes) -> None:
        for chunk in chunks:
            self._socket.sendall(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")

    def end(self) -> None:
        self._socket.sendall(b"0\r\n\r\n")

    def cut(self) -> None:
        """Close the connection in the middle of whatever it is."""
        self._socket.shutdown(socket.SHUT_RDWR)


class ScriptedEngine:
    """Each request is answered by ``script``, on a thread of its own."""

    def __init__(self, script: Callable[[Asked], None]):
        self.script = script
        self.asked: list[Asked] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.base_url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"
        self._sockets: list[socket.socket] = []
        self._start(self._accept)

    def close(self) -> None:
        for connection in [self._listener, *self._sockets]:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _start(self, work: Callable[[], None]) -> None:
        # A script may wait for what a test that failed never does.
        threading.Thread(target=work, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(connection)
            self._start(lambda connection=connection: self._serve(connection))  # type: ignore[misc]

    def _serve(self, connection: socket.socket) -> None:
        buffer = bytearray()
        asked = None
        with connection:
            while True:
                try:
                    data = connection.recv(65536)
                except OSError:
                    data = b""
                if not data:
                    if asked is not None:
                        asked.left.set()
                    return
                buffer += data
                while (end := buffer.find(b"\r\n\r\n")) >= 0:
                    lines = buffer[:end].decode("latin-1").split("\r\n")
                    headers = {
                        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])
                    }
                    length = int(headers.get("content-length", 0))
                    begin = end + 4
                    if len(buffer) < begin + length:
                        break
                    method, path, _ = lines[0].split(" ")
                    asked = Asked(method, path, headers, bytes(buffer[begin : begin + length]), connection)
                    del buffer[: begin + length]
                    self.asked.append(asked)
                    self._start(lambda asked=asked: self._answer(asked))  # type: ignore[misc]

    def _answer(self, asked: Asked) -> None:
        with suppress(OSError):  # the peer has left
            self.script(asked)


@contextmanager
def scripted(script: Callable[[Asked], None]) -> Iterator[ScriptedEngine]:
    engine = ScriptedEngine(script)
    try:
        yield engine
    finally:
        engine.close()


def chunk(content: str | None = None, *, finish: str | None = None, **delta: Any) -> bytes:
    """A chunk of a chat completion, as SGLang sends it."""
    said = {"role": "assistant", "content": content, **delta} if content is not None or delta else {}
    choice = {"index": 0, "delta": said, "logprobs": None, "finish_reason": finish, "matched_stop": None}
    document = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps(document, ensure_ascii=False).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def completion(content: str | None, **message: Any) -> dict[str, Any]:
    """A whole chat completion."""
    said = {"role": "assistant", "content": content, "reasoning_content": None, "tool_calls": None, **message}
    finish = "tool_calls" if message.get("tool_calls") else "stop"
    usage = {"prompt_tokens": 9, "total_tokens": 12, "completion_tokens": 3, "prompt_tokens_details": None}
    choice = {"index": 0, "message": said, "logprobs": None, "finish_reason": finish, "matched_stop": None}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [choice],
        "usage": usage,
    }


def said(text: str, item_id: str = "msg_1") -> dict[str, Any]:
    """A message of a response's output."""
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    return {"id": item_id, "type": "message", "role": "assistant", "content": content, "status": "completed"}


def called(name: str, arguments: str, call_id: str = "call_1", item_id: str = "fc_1") -> dict[str, Any]:
    """A function's call in a response's output."""
    call = {"call_id": call_id, "name": name, "arguments": arguments, "status": "completed"}
    return {"id": item_id, "type": "function_call", **call}


def response(asked: Asked, output: list[dict[str, Any]], status: str = "completed", **fields: Any) -> dict[str, Any]:
    """A response as SGLang answers a request: it echoes what it was told."""
    body = asked.document
    usage = {
        "input_tokens": 20,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 10,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 30,
    }
    return {
        "id": body.get("request_id", "resp_of_the_engine"),
        "object": "response",
        "created_at": 1,
        "model": body["model"],
        "output": output,
        "status": status,
        "usage": None if status == "in_progress" else usage,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": body.get("tools", []),
        "error": None,
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "previous_response_id": body.get("previous_response_id"),
        "store": body.get("store"),
        "metadata": body.get("metadata") or {},
        **fields,
    }


def response_events(asked: Asked, output: list[dict[str, Any]], **end: Any) -> list[bytes]:
    """A streamed response, an event each."""
    begun = response(asked, [], "in_progress")
    events: list[dict[str, Any]] = [
        {"type": f"response.{kind}", "response": begun} for kind in ("created", "in_progress")
    ]
    for index, item in enumerate(output):
        at = {"output_index": index, "item_id": item["id"]}
        events.append(
            {"type": "response.output_item.added", "output_index": index, "item": {**item, "status": "in_progress"}}
        )
        if item["type"] == "message":
            (part,) = item["content"]
            delta = {"content_index": 0, "delta": part["text"], "logprobs": []}
            events.append({"type": "response.output_text.delta", **at, **delta})
        elif item["type"] == "function_call":
            events.append({"type": "response.function_call_arguments.delta", **at, "delta": item["arguments"]})
        events.append({"type": "response.output_item.done", "output_index": index, "item": item})
    ended = response(asked, output, **end)
    events.append({"type": f"response.{ended['status']}", "response": ended})
    return [
        f"event: {event['type']}\ndata: {json.dumps({**event, 'sequence_number': number})}\n\n".encode()
        for number, event in enumerate(events)
    ]


def responds(*outputs: list[dict[str, Any]]) -> Callable[[Asked], None]:
    """Responses with these outputs, one after the other, streamed where that is asked for."""
    left = iter(outputs)

    def script(asked: Asked) -> None:
        output = next(left)
        if not asked.document.get("stream"):
            asked.whole(response(asked, output))
            return
        asked.start()
        asked.send(*response_events(asked, output), DONE)
        asked.end()

    return script
