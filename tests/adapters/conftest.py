"""A service to talk to, and a server in an engine's place that answers chat completions."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from agentstate.settings import Settings

sys.path.insert(0, str(Path(__file__).parent.parent / "integration"))

# Google's ADK has an environment of its own.
HAS_ADK = find_spec("google") is not None and find_spec("google.adk") is not None
collect_ignore = [
    path.name for path in Path(__file__).parent.glob("test_*.py") if (path.name == "test_google_adk.py") != HAS_ADK
]

from stage import Service, register, serving  # noqa: E402


@pytest.fixture
def service(database_url: str, tmp_path: Path) -> Iterator[Service]:
    with serving(Settings(home=tmp_path, database_url=database_url, engine_timeout_s=3600)) as service:
        yield service


class ChatServer(ThreadingHTTPServer):
    """Speaks the OpenAI chat completions API. ``reply`` makes the assistant's message from the request."""

    def __init__(self, reply: Callable[[dict[str, Any]], dict[str, Any]]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply = reply
        self.requests: list[dict[str, Any]] = []
        self.base_url = f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        said = self.server.reply(request)
        answer = {
            "id": "chat",
            "object": "chat.completion",
            "created": 0,
            "model": request["model"],
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": None, **said},
                    "finish_reason": "tool_calls" if "tool_calls" in said else "stop",
                }
            ],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def chat(service: Service) -> Iterator[Callable[[Callable[[dict[str, Any]], dict[str, Any]]], ChatServer]]:
    """Starts a chat server and registers it as an engine of the service."""
    started: list[tuple[ChatServer, threading.Thread]] = []

    def start(reply: Callable[[dict[str, Any]], dict[str, Any]]) -> ChatServer:
        server = ChatServer(reply)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        started.append((server, thread))
        register(service.database, "tcp://127.0.0.1:1", base_url=server.base_url)
        return server

    yield start
    for server, thread in started:
        server.shutdown()
        thread.join()
        server.server_close()
