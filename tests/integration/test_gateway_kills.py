"""The client, the gateway, the engine and the database killed in the middle of streams, at moments that a seed picks.

A stream's next token waits until the client has the one before, so the moment is a number of tokens, not of seconds.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from engines import DONE, Asked, ScriptedEngine, chunk, scripted
from postgres import Server, server
from stage import MODEL, PATIENCE_S, Peer, register, stored
from test_server import process

from agentstate.cli.local import free_port
from agentstate.sql.database import Database

MOMENTS = int(os.environ.get("AGENTSTATE_TEST_KILLS", "4"))
TOKENS = [f" token{number}" for number in range(8)]
LEASE_TTL_S = 2.0


@dataclass
class Seen:
    """What a client saw of one answer."""

    session: str | None = None
    tokens: list[str] = field(default_factory=list)
    error: bool = False
    whole: bool = False
    """It had its proper end."""


class Stage:
    """An engine that waits for its client after every token, a PostgreSQL, and a gateway that is a process."""

    def __init__(self, home: Path, engine: ScriptedEngine, database: Server, start: Callable[[], Any]):
        self.engine = engine
        self.database = database
        self._start = start
        self.process: Any = None
        self.base_url = ""
        self.next_token = threading.Semaphore(0)
        self.start_gateway()

    def start_gateway(self) -> None:
        self.process, self.base_url = self._start()

    def script(self, asked: Asked) -> None:
        asked.start()
        for token in TOKENS:
            self.next_token.acquire()
            asked.send(chunk(token))
        asked.send(chunk(finish="stop") + DONE)
        asked.end()

    def ask(self, said: list[dict[str, Any]], session: str, act: Callable[[int], bool]) -> Seen:
        """Ask for a stream; ``act`` is called before each of its tokens, and tells whether the client leaves."""
        seen = Seen()
        self.next_token = threading.Semaphore(0)
        body = {"model": MODEL, "messages": said, "stream": True}
        headers = {"X-AgentState-Session": session}
        buffer = b""
        with suppress(httpx.TransportError), httpx.Client(base_url=self.base_url, timeout=PATIENCE_S) as client:
            self._go_on(act, seen)
            with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
                if answer.status_code != 200:
                    seen.error = True
                    return seen
                seen.session = answer.headers.get("x-agentstate-session")
                for piece in answer.iter_raw():
                    buffer += piece
                    *events, buffer = buffer.split(b"\n\n")
                    for event in events:
                        self._hear(seen, event)
                        if self._go_on(act, seen):
                            return seen
        return seen

    def _go_on(self, act: Callable[[int], bool], seen: Seen) -> bool:
        leaves = act(len(seen.tokens))
        self.next_token.release()
        return leaves

    def _hear(self, seen: Seen, event: bytes) -> None:
        if event == b"data: [DONE]":
            seen.whole = not seen.error
            return
        document = json.loads(event.removeprefix(b"data: "))
        if "error" in document:
            seen.error = True
        elif content := document["choices"][0]["delta"].get("content"):
            seen.tokens.append(content)

    def entries(self, session: str) -> list[Any]:
        while True:
            with suppress(httpx.TransportError):
                answer = httpx.get(f"{self.base_url}/v1/sessions/{session}/entries", timeout=PATIENCE_S)
                if answer.status_code in (200, 404):
                    return [entry["payload"]["content"] for entry in answer.json().get("data", [])]
            time.sleep(0.05)


@pytest.fixture
def stage(tmp_path: Path, start_peer: Callable[..., Peer]) -> Iterator[Stage]:
    with ExitStack() as ending:
        postgres = ending.enter_context(closing(server()))
        url = f"postgresql+psycopg://postgres@/postgres?host={postgres.directory}"
        database = Database(url)
        database.upgrade()
        engine = ending.enter_context(scripted(lambda asked: stage.script(asked)))
        peer = start_peer(lambda request: stored("durable"))
        register(database, peer.address, base_url=engine.base_url)
        database.close()

        def start() -> tuple[Any, str]:
            port = str(free_port())
            settings = {
                "HOME": str(tmp_path),
                "DATABASE_URL": url,
                "PORT": port,
                "ENGINE_TIMEOUT_S": "3600",
                "GATEWAY_STORE": "on",
                "GATEWAY_WAIT_S": str(PATIENCE_S),
                "LEASE_TTL_S": str(LEASE_TTL_S),
            }
            variables = {f"AGENTSTATE_{name}": value for name, value in settings.items()}
            started = ending.enter_context(process(tmp_path / "log", **variables))
            return started, f"http://127.0.0.1:{port}"

        stage = Stage(tmp_path, engine, postgres, start)
        yield stage


def kills(stage: Stage, kill: Callable[[], bool], restore: Callable[[], None], seed: int) -> None:
    """Kill at some moments of as many streams. The same request is then asked again, undisturbed."""
    moments = random.Random(seed)
    for number in range(MOMENTS):
        session, said = f"s{number}", [{"role": "user", "content": f"question {number}"}]
        moment = moments.randrange(len(TOKENS))
        killed: list[bool] = []

        def act(tokens: int, moment: int = moment, killed: list[bool] = killed) -> bool:
            if tokens == moment and not killed:
                killed.append(True)
                return kill()
            return False

        seen = stage.ask(said, session, act)
        assert killed
        assert seen.tokens == TOKENS[: len(seen.tokens)]
        restore()
        kept = stage.entries(session)
        if seen.whole and seen.session is not None:  # without the database there is none
            assert kept == [said[0]["content"], "".join(TOKENS)]
        else:
            assert kept in ([], [said[0]["content"], "".join(TOKENS)])
        # Whoever held the session, it is free when its lease has lapsed.
        again = stage.ask(said, session, lambda tokens: False)
        assert (again.tokens, again.whole, again.session) == (TOKENS, True, session)
        assert stage.entries(session)[-2:] == [said[0]["content"], "".join(TOKENS)]


@pytest.mark.timeout(900)
def test_the_client_is_killed(stage: Stage) -> None:
    kills(stage, lambda: True, lambda: None, seed=1)


@pytest.mark.timeout(900)
def test_the_gateway_is_killed(stage: Stage) -> None:
    def kill() -> bool:
        stage.process.kill()
        stage.process.wait()
        return False

    kills(stage, kill, stage.start_gateway, seed=2)


@pytest.mark.timeout(900)
def test_the_engine_is_killed(stage: Stage) -> None:
    def kill() -> bool:
        for asked in stage.engine.asked[-1:]:
            asked.cut()
        return False

    kills(stage, kill, lambda: None, seed=3)


@pytest.mark.timeout(900)
def test_the_database_is_killed(stage: Stage) -> None:
    def kill() -> bool:
        stage.database.stop()
        return False

    kills(stage, kill, stage.database.start, seed=4)
