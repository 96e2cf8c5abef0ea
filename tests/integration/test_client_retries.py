"""What the client repeats when its requests, or the answers to them, are lost on the way."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from stage import MODEL, Service

from agentstate.client import AsyncClient, Client, note, routes, transport
from agentstate.client.routes import Call, Repeat
from agentstate.errors import AgentStateError, DatabaseError, RequestRefused, ServiceUnreachable, SessionBusy


class Gateway(ThreadingHTTPServer):
    """Stands before a service and treats each request as `plan` says: ``pass``, ``lose`` its answer, or a status."""

    def __init__(self, upstream: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = httpx.Client(base_url=upstream)
        self.plan: deque[str | int | httpx.Response] = deque()
        self.seen: list[tuple[str, str | None]] = []
        self.base_url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Gateway
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.command, self.headers.get("Idempotency-Key")))
        fate = self.server.plan.popleft() if self.server.plan else "pass"
        if isinstance(fate, httpx.Response):
            self._answer(fate)
            return
        if isinstance(fate, int):
            self._answer(httpx.Response(fate, text="<html>Bad gateway</html>"))
            return
        kept = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
        answer = self.server.upstream.request(self.command, self.path, content=body, headers=kept)
        if fate == "lose":
            self.close_connection = True
            return
        self._answer(answer)

    do_GET = do_POST = do_PATCH = do_DELETE = _handle

    def _answer(self, answer: httpx.Response) -> None:
        self.send_response(answer.status_code)
        for name in ("content-type", "retry-after"):
            if name in answer.headers:
                self.send_header(name, answer.headers[name])
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def backend() -> str:
    """The client is the same whatever database the service has."""
    return "sqlite"


@pytest.fixture
def gateway(service: Service) -> Iterator[Gateway]:
    server = Gateway(service.base_url)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
    server.upstream.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "FIRST_WAIT_S", 0.001)


@pytest.fixture(params=["client", "async client"])
def send(request: pytest.FixtureRequest, gateway: Gateway) -> Any:
    """Carries out one call over the gateway, by either client."""
    if request.param == "client":

        def now(call: Call[Any], **options: Any) -> Any:
            with Client(gateway.base_url, **options) as client:
                return client._send(call)

        return now

    async def awaited(call: Call[Any], **options: Any) -> Any:
        async with AsyncClient(gateway.base_url, **options) as client:
            return await client._send(call)

    return lambda call, **options: asyncio.run(awaited(call, **options))


def problem(slug: str, status: int, retryable: bool = True, **headers: str) -> httpx.Response:
    body = {"type": f"/problems/{slug}", "title": "t", "status": status, "detail": "d", "retryable": retryable}
    return httpx.Response(status, json=body, headers={"content-type": "application/problem+json", **headers})


def test_a_read_is_repeated(service: Service, gateway: Gateway, send: Any) -> None:
    session = service.client.create_session(MODEL)
    gateway.plan.extend(["lose", 502])
    assert send(routes.read(session.id)) == session
    assert gateway.seen == [("GET", None)] * 3


def test_a_write_is_repeated_with_the_same_key(service: Service, gateway: Gateway, send: Any) -> None:
    gateway.plan.extend([503, problem("database-error", 503), "pass", "pass"])
    send(routes.create_session(MODEL))
    send(routes.create_session(MODEL))
    keys = [key for _, key in gateway.seen]
    assert None not in keys
    assert keys[0] == keys[1] == keys[2] != keys[3]


def test_a_write_whose_answer_was_lost_is_sent_again_with_its_key(gateway: Gateway, send: Any) -> None:
    gateway.plan.append("lose")
    send(routes.create_session(MODEL))
    assert len(gateway.seen) == 2
    assert len({key for _, key in gateway.seen}) == 1


def test_an_append_whose_answer_was_lost_is_carried_out_once(service: Service, gateway: Gateway, send: Any) -> None:
    resumed = service.client.resume(service.client.create_session(MODEL, id="s").id)
    gateway.plan.append("lose")
    appended = send(routes.append("s", resumed.lease, [note({"text": "once"})]))
    assert len(gateway.seen) == 2
    assert service.client.entries("s").data == appended.data


def test_what_may_not_be_repeated_is_not(service: Service, gateway: Gateway, send: Any) -> None:
    session = service.client.create_session(MODEL)
    once = Call(lambda response: response, "PATCH", f"/v1/sessions/{session.id}", Repeat.NEVER, body={})
    for fate, error in (("lose", ServiceUnreachable), (503, RequestRefused)):
        gateway.plan.append(fate)
        with pytest.raises(error):
            send(once)
    assert gateway.seen == [("PATCH", None)] * 2


def test_a_request_that_was_refused_unread_is_always_repeated(gateway: Gateway, send: Any) -> None:
    once = Call(lambda response: response.status_code, "PATCH", "/healthz", Repeat.NEVER)
    gateway.plan.extend([429, 429])
    with pytest.raises(RequestRefused, match="method-not-allowed"):
        send(once)
    assert len(gateway.seen) == 3


def test_it_gives_up(gateway: Gateway, send: Any) -> None:
    gateway.plan.extend(["lose"] * 9)
    with pytest.raises(ServiceUnreachable, match=gateway.base_url):
        send(routes.read("s"), retries=1)
    assert len(gateway.seen) == 2
    gateway.plan.clear()
    gateway.plan.extend([problem("database-error", 503)] * 9)
    with pytest.raises(DatabaseError, match="d"):
        send(routes.read("s"))
    assert len(gateway.seen) == 2 + 3


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (problem("session-busy", 409), SessionBusy),
        (problem("lease-lost", 409, retryable=False), AgentStateError),
        (problem("database-error", 503, **{"Retry-After": "60"}), DatabaseError),
    ],
    ids=["busy", "final", "much later"],
)
def test_what_is_for_the_caller_is_raised_at_once(
    gateway: Gateway, send: Any, answer: httpx.Response, error: type[AgentStateError]
) -> None:
    gateway.plan.append(answer)
    with pytest.raises(error):
        send(routes.resume("s"))
    assert len(gateway.seen) == 1


def test_nothing_listens(send: Any) -> None:
    once = Call(lambda response: response, "PATCH", "http://127.0.0.1:1/", Repeat.NEVER)
    with pytest.raises(ServiceUnreachable):
        send(once)


def test_the_api_key_is_sent(gateway: Gateway) -> None:
    with Client(gateway.base_url, api_key="secret") as client:
        assert client._http.headers["Authorization"] == "Bearer secret"


def test_both_clients_have_the_same_methods() -> None:
    own = {"__enter__", "__exit__", "__aenter__", "__aexit__"}
    methods = [{name for name in vars(kind) if callable(getattr(kind, name))} - own for kind in (Client, AsyncClient)]
    assert methods[0] == methods[1]


def test_an_async_agents_life(service: Service) -> None:
    async def live() -> None:
        async with AsyncClient(service.base_url) as client:
            session = await client.ensure_session("s", MODEL, metadata={"user": "u_17"})
            assert await client.ensure_session("s", "other") == session
            resumed = await client.resume("s")
            await client.append("s", resumed.lease, [note({"text": "hello"})])
            assert (await client.renew("s", resumed.lease)).epoch == 1
            assert (await client.suspend("s", resumed.lease, durable_timeout_ms=0)).status == "suspended"
            assert [entry.payload for entry in (await client.entries("s")).data] == [{"text": "hello"}]
            assert (await client.engines()).data == []

    asyncio.run(live())
