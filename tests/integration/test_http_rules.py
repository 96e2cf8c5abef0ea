"""What HTTP asks of every route: HEAD, Allow, lists in If-Match, encodings, who may ask, slow bodies."""

from __future__ import annotations

import gzip
import json
import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from stage import MODEL, PATIENCE_S, Service, serving

from agentstate.api import bodies, server
from agentstate.client import AsyncClient, Client, transport
from agentstate.sessions import tenants
from agentstate.settings import Settings


def created(service: Service) -> httpx.Response:
    return service.http.post("/v1/sessions", json={"model": MODEL}).raise_for_status()


def assert_problem(response: httpx.Response, status: int, slug: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["type"] == f"/problems/{slug}"


# --- methods


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/v1/sessions", "/v1/engines", "/openapi.json"])
def test_head_is_get_without_a_body(service: Service, path: str) -> None:
    got, head = service.http.get(path), service.http.head(path)
    assert (head.status_code, head.headers["content-type"]) == (200, got.headers["content-type"])
    assert head.content == b"" and "content-length" in head.headers


def test_head_of_a_session_tells_its_etag_and_that_of_a_stream_ends(service: Service) -> None:
    session = created(service)
    head = service.http.head(session.headers["location"])
    assert (head.status_code, head.headers["etag"]) == (200, session.headers["etag"])
    assert service.http.head("/v1/sessions/none").status_code == 404
    stream = service.http.head(session.headers["location"] + "/events")
    assert (stream.status_code, stream.content) == (200, b"")
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert stream.headers["x-accel-buffering"] == "no"
    assert service.http.get(session.headers["location"]).status_code == 200


@pytest.mark.parametrize(
    "method, path, allowed",
    [
        ("PUT", "/v1/sessions", "GET, HEAD, POST"),
        ("POST", "/v1/sessions/s", "DELETE, GET, HEAD, PATCH"),
        ("GET", "/v1/sessions/s/resume", "POST"),
        ("HEAD", "/v1/sessions/s/resume", "POST"),
        ("DELETE", "/v1/sessions/s/tool-calls/c", "PUT"),
        ("DELETE", "/healthz", "GET, HEAD"),
    ],
)
def test_what_a_path_takes_is_named(service: Service, method: str, path: str, allowed: str) -> None:
    response = service.http.request(method, path)
    assert (response.status_code, response.headers["allow"]) == (405, allowed)


# --- conditions and numbers


def test_one_of_a_list_of_etags_is_enough(service: Service) -> None:
    session = created(service)
    path, etag = session.headers["location"], session.headers["etag"]
    for tags in ('"7-idle", "9-idle"', "7,9", ""):
        assert_problem(service.http.patch(path, json={}, headers={"If-Match": tags}), 412, "revision-stale")
    for tags in ('"7-idle", {}', '{},"9-idle"'):
        answer = service.http.patch(path, json={}, headers={"If-Match": tags.format(etag)})
        assert answer.status_code == 200
        etag = answer.headers["etag"]
    answer = service.http.post(f"{path}/resume", json={}, headers={"If-Match": f'"1-idle", {etag}'})
    assert answer.status_code == 200


@pytest.mark.parametrize("digits", [400, 5000])
def test_a_number_of_many_digits_is_refused(service: Service, digits: int) -> None:
    path = created(service).headers["location"]
    lease = service.http.post(f"{path}/resume").json()["lease"]
    proof = json.dumps({"token": lease["token"], "epoch": lease["epoch"]})
    number = "9" * digits
    call = f'{{"name": "t", "expected_s": {number}, "lease": {proof}}}'
    entry = f'{{"kind": "tool_call", "call_id": "c", "payload": {{"name": "t", "expected_s": {number}}}}}'
    bodies = {
        f"{path}/tool-calls/c": ("PUT", call),
        f"{path}/entries": ("POST", f'{{"lease": {proof}, "entries": [{entry}]}}'),
        f"{path}/lease/renew": ("POST", f'{{"lease": {proof}, "lease_ttl_s": {number}}}'),
    }
    for where, (method, body) in bodies.items():
        answer = service.http.request(method, where, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 422), answer.text
        assert answer.headers["content-type"] == "application/problem+json"
    assert service.http.get(f"{path}/entries").json()["data"] == []


# --- bodies


def test_a_compressed_body_is_refused(service: Service) -> None:
    body = gzip.compress(json.dumps({"model": MODEL}).encode())
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    answer = service.http.post("/v1/sessions", content=body, headers=headers)
    assert_problem(answer, 415, "unsupported-encoding")
    assert answer.headers["accept-encoding"] == "identity"
    headers["Content-Encoding"] = "identity"
    assert service.http.post("/v1/sessions", content=json.dumps({"model": MODEL}), headers=headers).status_code == 201


class Raw:
    """A connection on which a request is sent in parts."""

    def __init__(self, service: Service, *headers: str, length: int = 1000):
        url = httpx.URL(service.base_url)
        self._socket = socket.create_connection((url.host, url.port), timeout=PATIENCE_S)
        lines = ["POST /v1/sessions HTTP/1.1", f"Host: {url.host}:{url.port}", f"Content-Length: {length}", *headers]
        self._socket.sendall("\r\n".join([*lines, "Content-Type: application/json", "", ""]).encode())

    def send(self, part: bytes) -> None:
        self._socket.sendall(part)

    def status(self) -> int:
        with self._socket.makefile("rb") as answer:
            return int(answer.readline().split()[1])

    def close(self) -> None:
        self._socket.close()


def test_a_body_that_does_not_arrive_is_not_waited_for(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_TIMEOUT_S", 0.3)
    slow = Raw(service)
    slow.send(b'{"model"')
    assert slow.status() == 408
    slow.close()


def test_who_has_no_key_is_answered_before_the_body(service: Service) -> None:
    with service.database.write() as connection:
        secret = tenants.create_key(connection, "acme").secret
    for headers in ((), ("Authorization: Bearer ags_wrong",)):
        stranger = Raw(service, *headers)
        assert stranger.status() == 401  # nothing of its body has been sent
        stranger.close()
    friend = Raw(service, f"Authorization: Bearer {secret}", length=14)
    friend.send(b'{"model": "m"}')
    assert friend.status() == 201
    friend.close()


# --- under which name


@pytest.mark.parametrize("header", ["Host", "Origin"])
def test_a_service_without_keys_answers_under_names_of_its_machine_only(service: Service, header: str) -> None:
    port = httpx.URL(service.base_url).port
    scheme = "http://" if header == "Origin" else ""
    path = created(service).headers["location"]
    for name in ("rebound.example", f"rebound.example:{port}", "127.0.0.1.example", "192.168.1.7", "10.0.0.1:80"):
        for method in ("GET", "DELETE"):
            headers = {header: scheme + name, "If-Match": "*"}
            assert_problem(service.http.request(method, path, headers=headers), 403, "host-refused")
    for name in ("localhost", f"localhost:{port}", "127.0.0.1", "127.8.8.8:1", "[::1]:80", "agent.localhost"):
        assert service.http.get(path, headers={header: scheme + name}).status_code == 200
    assert service.http.get("/healthz", headers={header: scheme + "pod.example"}).status_code == 200


def test_with_a_key_the_name_does_not_matter(service: Service) -> None:
    with service.database.write() as connection:
        secret = tenants.create_key(connection, "acme").secret
    headers = {"Authorization": f"Bearer {secret}", "Host": "agents.example", "Origin": "https://ui.example"}
    assert service.http.get("/v1/sessions", headers=headers).status_code == 200


# --- connections


def test_a_client_lets_go_of_a_connection_before_the_service_does(service: Service) -> None:
    expiry_s = transport.LIMITS.keepalive_expiry
    assert expiry_s is not None
    assert 2 * expiry_s <= server.Server(service.app).config.timeout_keep_alive


def test_a_proxy_is_not_asked_for_what_is_on_this_machine(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with Client(service.base_url, retries=0) as client:
        assert client.create_session(MODEL).model == MODEL
    assert transport.settings_of("http://agents.example")["trust_env"] is True
    assert transport.settings_of("http://localhost:8700")["trust_env"] is False
    assert isinstance(AsyncClient(service.base_url), AsyncClient)


# --- a full disk


def test_a_full_disk_is_told_as_such_and_nothing_is_written(tmp_path: Path) -> None:
    full = threading.Event()

    def limit(connection: Any, record: Any) -> None:
        if full.is_set():
            pages = connection.execute("PRAGMA page_count").fetchone()[0]
            connection.execute(f"PRAGMA max_page_count = {pages}")

    database_url = f"sqlite:///{tmp_path / 'agentstate.db'}"
    settings = Settings(home=tmp_path, database_url=database_url)
    server.migrate(settings)
    with serving(settings) as service:
        session = created(service)
        full.set()
        sa.event.listen(sa.pool.Pool, "connect", limit)
        try:
            service.app.state.service.database.close()
            large = {"text": "x" * 1_000_000}
            lease = service.http.post(f"{session.headers['location']}/resume").json()["lease"]
            body = {
                "lease": {"token": lease["token"], "epoch": lease["epoch"]},
                "entries": [{"kind": "note", "payload": large}],
            }
            answer = service.http.post(f"{session.headers['location']}/entries", json=body)
            assert_problem(answer, 503, "database-full")
            assert answer.json()["retryable"] is True
            assert "cannot be reached" not in answer.text and "make room" in answer.text
        finally:
            sa.event.remove(sa.pool.Pool, "connect", limit)
        service.app.state.service.database.close()
        assert service.http.get(f"{session.headers['location']}/entries").json()["data"] == []
        assert service.http.post(f"{session.headers['location']}/entries", json=body).status_code == 201


# --- the reference


def test_the_reference_page_needs_no_internet_and_names_every_route(service: Service) -> None:
    page = service.http.get("/docs")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    for outside in ("http:", "https:", "//", "<script", "<link", "<img", "@import"):
        assert outside not in page.text.replace("http://127.0.0.1:30000/v1", "")
    document = service.http.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method in operations:
            assert f"<span class=method>{method.upper()}</span><code>{path}</code>" in page.text
    for name in document["components"]["schemas"]:
        assert f'id="{name}"' in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
