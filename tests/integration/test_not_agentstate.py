"""What is said where something else answers at the service's address: one line, by clients, commands and doctor."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agentstate.cli import doctor_parts, output
from agentstate.cli.findings import exit_status
from agentstate.cli.main import app
from agentstate.client import AsyncClient, Client
from agentstate.errors import NotAgentState, RequestRefused
from agentstate.settings import Settings


@dataclass(frozen=True)
class Said:
    """What a server answers to everything."""

    status: int
    media_type: str
    content: str
    location: str = ""


PAGE = "<!doctype html>\n<html>\n<p>Welcome to nginx!</p>\n</html>\n"
OTHERS = {
    "a page": Said(200, "text/html; charset=utf-8", PAGE),
    "other JSON": Said(200, "application/json", '{"version": "11.3.0", "database": "ok"}'),
    "JSON of another kind": Said(200, "application/json", "[1]"),
    "nothing": Said(204, "", ""),
    "a redirect": Said(302, "text/html", "", location="/login"),
    "no such page": Said(404, "text/html", PAGE),
    "no such route": Said(404, "application/json", '{"detail": "Not Found"}'),
    "another method": Said(405, "text/plain", "no"),
}
Serve = Callable[[Said], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server that is no AgentState; returns its base URL."""
    running: list[tuple[ThreadingHTTPServer, threading.Thread]] = []

    def start(said: Said) -> str:
        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(said.status)
                if said.media_type:
                    self.send_header("Content-Type", said.media_type)
                if said.location:
                    self.send_header("Location", said.location)
                self.send_header("Content-Length", str(len(said.content)))
                self.end_headers()
                self.wfile.write(said.content.encode())

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

            def log_message(self, *args: object) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


CALLS: dict[str, Callable[[Any], Any]] = {
    "read": lambda client: client.read("s"),
    "create": lambda client: client.create_session("m"),
    "overview": lambda client: client.overview(),
    "delete": lambda client: client.delete("s", revision="*"),
}


# What a service answers to a delete is no other's.
PAIRS = [(call, other) for call in CALLS for other in OTHERS if (call, other) != ("delete", "nothing")]


@pytest.mark.parametrize(("call", "other"), PAIRS)
def test_both_clients_say_in_one_line_who_answers_and_how(serve: Serve, call: str, other: str) -> None:
    url = serve(OTHERS[other])
    with Client(url) as client, pytest.raises(NotAgentState) as told:
        CALLS[call](client)

    async def awaited() -> None:
        async with AsyncClient(url) as client:
            await CALLS[call](client)

    with pytest.raises(NotAgentState) as told_too:
        asyncio.run(awaited())
    assert str(told.value) == str(told_too.value)
    said = str(told.value)
    assert url in said and "no AgentState" in said and str(OTHERS[other].status) in said and "\n" not in said
    assert not told.value.retryable
    if OTHERS[other].location:
        assert "/login" in said


@pytest.mark.parametrize("other", OTHERS)
def test_whoever_follows_a_session_is_told_too(serve: Serve, other: str) -> None:
    url = serve(OTHERS[other])
    with Client(url) as client, pytest.raises(NotAgentState, match="events"):
        next(client.events("s"))

    async def follow() -> None:
        async with AsyncClient(url) as client:
            async for _ in client.events("s"):
                pass

    with pytest.raises(NotAgentState, match="events"):
        asyncio.run(follow())


def test_a_refusal_that_a_proxy_may_have_given_is_a_refusal_in_one_line(serve: Serve) -> None:
    with Client(serve(Said(403, "text/html", PAGE)), retries=0) as client, pytest.raises(RequestRefused) as told:
        client.read("s")
    assert str(told.value) == "HTTP 403: <!doctype html> <html> <p>Welcome to nginx!</p> </html>"


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("command", ["top --once", "top --json", "sessions ls", "sessions kv s", "sessions rm s --yes"])
def test_a_command_fails_with_one_line_and_says_that_nothing_was_reached(
    serve: Serve, other: str, command: str
) -> None:
    failed = CliRunner().invoke(app, command.split(), env={"AGENTSTATE_URL": serve(OTHERS[other])}).exception
    assert isinstance(failed, NotAgentState), failed
    assert "\n" not in str(failed) and output.status_of(failed) == output.UNREACHABLE
    if command.startswith("top"):
        assert "AGENTSTATE_URL" in str(failed) and "agentstate serve" not in str(failed)


@pytest.mark.parametrize("other", OTHERS)
def test_doctor_does_not_take_it_for_a_service(
    serve: Serve, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_parts, "_ANSWER_S", 300.0)
    url = serve(OTHERS[other])
    (found,) = doctor_parts.service(Settings(home=tmp_path), url, None)
    assert "no AgentState" in found.what or "cannot be reached" in found.what
    assert url in found.what and exit_status([found], strict=False) == output.UNREACHABLE
