"""A service in front of one scripted engine, and what tests ask of it."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any
from urllib.parse import unquote

import httpx
import sqlalchemy as sa
from engines import Asked, ScriptedEngine
from stage import MODEL, PATIENCE_S, Peer, Service

from agentstate.fleet import turns
from agentstate.sessions import tenants
from agentstate.sql import secret
from agentstate.sql.models import tool_calls

HELLO = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}


class Gateway:
    """``peer`` is the engine's control endpoint."""

    def __init__(self, service: Service, engine: ScriptedEngine, peer: Peer):
        self.service = service
        self.engine = engine
        self.peer = peer

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.service.http.post(path, json=body, headers=names)

    def chat(self, *messages: dict[str, Any], **headers: str) -> httpx.Response:
        return self.post("/v1/chat/completions", {"model": MODEL, "messages": list(messages)}, **headers)

    def leave(self, when: threading.Event, **headers: str) -> None:
        """Ask for a completion, and close the connection ``when`` that is set, without an answer."""
        url, body = httpx.URL(self.service.base_url), json.dumps(HELLO).encode()
        own = {"host": url.netloc.decode(), "content-type": "application/json", "content-length": str(len(body))}
        lines = ["POST /v1/chat/completions HTTP/1.1", *(f"{name}: {value}" for name, value in (own | headers).items())]
        with socket.create_connection((url.host, url.port)) as client:
            client.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
            assert when.wait(PATIENCE_S)

    def sessions(self) -> list[Any]:
        return list(self.service.client.list_sessions().data)

    def tool_calls(self, session: str) -> list[tuple[str, str]]:
        with self.service.database.read() as connection:
            rows = connection.execute(sa.select(tool_calls).where(tool_calls.c.session_id == session))
            return [(row.name, row.state) for row in rows]

    def key(self, tenant: str) -> str:
        """A new API key of a tenant."""
        with self.service.database.write() as connection:
            return tenants.create_key(connection, tenant).secret

    def ended(self) -> None:
        """Until no turn is ending."""
        while self.service.app.state.gateway.turns.ending:
            threading.Event().wait(0.005)

    def turn(self, asked: Asked) -> str | None:
        """The uid of the session whose turn a request proves."""
        sent = asked.headers.get("x-agentstate-turn")
        if sent is None:
            return None
        session, token = turns.split(unquote(sent))
        with self.service.database.read() as connection:
            key = turns.signing_key(secret.read(connection))
        assert token is not None
        assert turns.verify(key, session, token) is not None
        return session
