"""A service on a free port, served by uvicorn, and an engine's control endpoint that speaks ZeroMQ: both for real."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ending
import httpx
import msgpack
import zmq

from agentstate import ids
from agentstate.api.app import create_app
from agentstate.api.server import Server, listen
from agentstate.client import Client
from agentstate.fleet import engines, operations
from agentstate.fleet.control import new_secret, protect
from agentstate.fleet.engines import Engine
from agentstate.settings import Settings
from agentstate.sql.database import Database

MODEL = "m"
PATIENCE_S = 300
"""How long an answer of the service may take before something is taken to hang."""


def until(held: Callable[[], Any]) -> None:
    """Wait until what comes a moment later is so."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not held():
        assert time.monotonic() < deadline_s, "it never came"
        time.sleep(0.02)


@dataclass
class Service:
    base_url: str
    database: Database
    app: Any
    client: Client
    http: httpx.Client


@contextmanager
def serving(settings: Settings, port: int = 0) -> Iterator[Service]:
    listener = listen("127.0.0.1", port)
    port = listener.getsockname()[1]
    app = create_app(settings.model_copy(update={"port": port}))
    server = Server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    base_url = f"http://127.0.0.1:{port}"
    database = Database(settings.sqlalchemy_url)
    try:
        # The socket listens already: the first request waits until the service is there.
        with (
            Client(base_url, timeout_s=PATIENCE_S) as client,
            httpx.Client(base_url=base_url, timeout=PATIENCE_S) as http,
        ):
            http.get("/healthz").raise_for_status()
            yield Service(base_url, database, app, client, http)
    except BaseException:
        ending.failed = True
        raise
    finally:
        if ending.failed:
            server.config.timeout_graceful_shutdown = 0  # streams that the test has left open end first
        server.should_exit = True
        try:
            ending.join(thread, "a service")
        finally:
            listener.close()
            database.close()


SECRET = new_secret()
"""Of all peers."""


@dataclass
class Peer:
    """The control endpoint of an engine rank. ``answer`` makes the reply to each request; None leaves it unanswered.
    Notices, which nobody waits for, have a reply and a list of their own."""

    answer: Callable[[dict[str, Any]], Any]
    requests: list[dict[str, Any]] = field(default_factory=list)
    notice: Any = field(default_factory=lambda: {"ok": True, "state": "accepted"})
    told: list[dict[str, Any]] = field(default_factory=list)
    address: str = ""

    def __post_init__(self) -> None:
        self._socket = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        protect(self._socket, SECRET, server=True)
        self._socket.bind("tcp://127.0.0.1:*")
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closing.is_set():
            if not self._socket.poll(20):
                continue
            *peer, raw = self._socket.recv_multipart()
            request = msgpack.unpackb(raw)
            if request["verb"] in ("foresee", "release"):
                self.told.append(request)
                answer = self.notice
            else:
                self.requests.append(request)
                answer = self.answer(request)
            if answer is not None:
                self._socket.send_multipart([*peer, msgpack.packb(answer)])

    def close(self) -> None:
        self._closing.set()
        ending.join(self._thread, "an engine's control endpoint")
        if not self._thread.is_alive():  # whose socket it is
            self._socket.close()


class Answers:
    """Of a peer, one after the other and the last one again and again. The service is given all the time it needs to
    receive one; for one that is None, which never comes, it waits as long as `SILENT_S`.

    The fixture `start_peer` sets `operations.GRACE_S` back.
    """

    SILENT_S = 0.5

    def __init__(self, *answers: Any):
        self._answers = list(answers)
        self._give_time()

    def _give_time(self) -> None:
        operations.GRACE_S = self.SILENT_S if self._answers[0] is None else PATIENCE_S

    def __call__(self, request: dict[str, Any]) -> Any:
        answer = self._answers[0]
        if len(self._answers) > 1:
            del self._answers[0]
        self._give_time()
        return answer


NOTHING = {"state": "unknown", "tokens": 0, "pages": 0, "bytes": 0, "durable_on": None, "reason": None}
"""What a suspend says where no engine could be asked."""


def stored(state: str, tokens: int = 128, **more: Any) -> dict[str, Any]:
    return {"ok": True, "state": state, "tokens": tokens, "pages": tokens // 64, "bytes": tokens * 1000, **more}


def register(database: Database, control_address: str, **changes: Any) -> Engine:
    values = {
        "id": ids.new("eng"),
        "node": "n1",
        "rank": 0,
        "control_address": control_address,
        "control_secret": SECRET,
        "base_url": "http://127.0.0.1:30000/v1",
        "model": MODEL,
        "fingerprint": "f1",
        "pages_dir": "/pages",
    }
    engine = Engine(**{**values, **changes})
    with database.write() as connection:
        engines.register(connection, engine)
    return engine
