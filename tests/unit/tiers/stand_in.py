"""An S3 server that does what a test tells it: enough of the API for a tier, and every fault."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

Fault = Callable[["Handler"], bool]
"""Whether it has dealt with the request, in its own way."""


class StandIn:
    def __init__(self, port: int = 0) -> None:
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.fault: Fault = lambda handler: False
        self._mutex = threading.Lock()
        handler = type("Bound", (Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
        }

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextmanager
def stand_in() -> Iterator[StandIn]:
    server = StandIn()
    try:
        yield server
    finally:
        server.close()


class Handler(BaseHTTPRequestHandler):
    owner: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    @property
    def key(self) -> str:
        return unquote(urlsplit(self.path).path).lstrip("/")

    def handle_any(self) -> None:
        with self.owner._mutex:
            self.owner.requests.append((self.command, self.headers.get("Range", "")))
        with suppress(BrokenPipeError, ConnectionResetError):
            if not self.owner.fault(self):
                self.serve()

    do_GET = do_HEAD = do_PUT = do_DELETE = handle_any

    def serve(self) -> None:
        objects, key = self.owner.objects, self.key
        query = parse_qs(urlsplit(self.path).query)
        if self.command == "PUT":
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with self.owner._mutex:
                taken = key in objects and self.headers.get("If-None-Match") == "*"
                if not taken:
                    objects[key] = body
            self.answer(412 if taken else 200, b"", ETag='"x"')
        elif self.command == "DELETE":
            objects.pop(key, None)
            self.answer(204)
        elif "list-type" in query:
            self.list(query)
        elif key not in objects:
            self.error(404, "NoSuchKey")
        else:
            self.get(objects[key])

    def get(self, data: bytes) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        named = {"ETag": '"x"', "Last-Modified": "Mon, 30 Nov 2026 00:00:00 GMT"}
        if found is None:
            self.answer(200, data, **named)
            return
        start, end = int(found[1]), min(int(found[2]) + 1, len(data))
        if start >= len(data):
            self.error(416, "InvalidRange")
            return
        self.answer(206, data[start:end], **named, **{"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})

    def list(self, query: dict[str, list[str]]) -> None:
        bucket = self.key.split("/")[0]
        prefix = query.get("prefix", [""])[0]
        start = query.get("start-after", [""])[0]
        keys = sorted(key.partition("/")[2] for key in self.owner.objects if key.startswith(f"{bucket}/"))
        keys = [key for key in keys if key.startswith(prefix) and key > start]
        contents = "".join(
            f"<Contents><Key>{key}</Key><Size>{len(self.owner.objects[f'{bucket}/{key}'])}</Size>"
            "<LastModified>2026-11-30T00:00:00.000Z</LastModified><ETag>x</ETag></Contents>"
            for key in keys
        )
        body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"
        self.answer(200, body.encode())

    def error(self, status: int, code: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>of a test</Message></Error>".encode()
        self.answer(status, b"" if self.command == "HEAD" else body)

    def drain(self) -> None:
        """Read what the client sends, so that it reads the answer."""
        self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status: int, body: bytes = b"", *, claim: int | None = None, **headers: str) -> None:
        """``claim`` is the length that is announced, when it is not the body's."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        length = len(body) if claim is None else claim
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        if claim is not None:
            self.hang_up()

    def hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
