"""What only the Python client does; the other tests here use it throughout."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import sqlalchemy as sa
from stage import MODEL, Service

from agentstate.client import Client, message, tool_call, tool_error, tool_output
from agentstate.errors import (
    EntryNotFound,
    InvalidEntry,
    LeaseLost,
    ModelMismatch,
    RequestRefused,
    ServiceUnreachable,
    SessionBusy,
    SessionExists,
    SessionExpired,
    SessionNotFound,
    ToolInFlight,
)


def test_an_agents_life(service: Service) -> None:
    client = service.client
    session = client.create_session(MODEL, id="my agent".replace(" ", "-"), metadata={"user": "u_17"}, expires_in_s=60)
    turn = client.resume(session.id, lease_ttl_s=30, expect_model=MODEL)
    appended = client.append(
        session.id,
        turn.lease,
        [
            message({"role": "user", "content": "What is in it?"}),
            tool_call("call_1", "read", {"path": "a"}, expected_s=0.5),
            tool_call("call_2", "read", {"path": "b"}),
            tool_output("call_1", "Sales grew."),
            tool_error("call_2", "no such file"),
        ],
    )
    assert [entry.seq for entry in appended.data] == [1, 2, 3, 4, 5]
    assert client.renew(session.id, turn.lease).epoch == turn.lease.epoch
    suspended = client.suspend(session.id, turn.lease, reason="done", expires_in_s=3600)
    assert suspended.pending_tool_calls == []
    assert client.read(session.id).head_id == appended.last_id
    assert client.entries(session.id).data == appended.data
    assert client.entries(session.id, after=appended.first_id, limit=1).data == appended.data[1:2]
    assert [entry.seq for entry in client.entries(session.id, order="desc").data] == [5, 4, 3, 2, 1]
    assert [entry.seq for entry in client.resume(session.id, tail=2).entries.data] == [2, 3, 4, 5]


def test_problems_are_this_packages_errors_again(service: Service) -> None:
    client = service.client
    session = client.create_session(MODEL)
    with pytest.raises(ModelMismatch):
        client.resume(session.id, expect_model="other")
    turn = client.resume(session.id)
    with pytest.raises(SessionBusy) as busy:
        client.resume(session.id)
    assert busy.value.retryable
    assert 0 < busy.value.retry_after_s <= 60
    assert str(busy.value.revision) == turn.session.revision
    with pytest.raises(InvalidEntry, match="append the call first"):
        client.append(session.id, turn.lease, [tool_output("c", 1)])
    with pytest.raises(EntryNotFound):
        client.entries(session.id, after="ent_none")
    client.append(session.id, turn.lease, [tool_call("c", "read")])
    with pytest.raises(ToolInFlight, match="c"):
        client.suspend(session.id, turn.lease, reason="done")
    client.suspend(session.id, turn.lease, reason="tool_wait")
    with pytest.raises(LeaseLost):
        client.renew(session.id, turn.lease)
    with pytest.raises(SessionExists):
        client.create_session(MODEL, id=session.id)
    with pytest.raises(SessionNotFound, match="ses_none"):
        client.read("ses_none")
    with service.database.write() as connection:
        connection.execute(sa.text("UPDATE sessions SET expires_us = 1"))
    with pytest.raises(SessionExpired):
        client.read(session.id)
    with pytest.raises(RequestRefused, match="body.model") as refused:
        client.create_session("")
    assert refused.value.status == 422


def test_a_service_that_is_not_there() -> None:
    with Client("http://127.0.0.1:1") as client, pytest.raises(ServiceUnreachable, match="127.0.0.1:1") as error:
        client.read("s")
    assert error.value.retryable


def test_another_server_in_its_place() -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(502)
            self.end_headers()
            self.wfile.write(b"<html>Bad gateway</html>")

        def log_message(self, *args: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Other)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with (
            Client(f"http://127.0.0.1:{server.server_port}") as client,
            pytest.raises(RequestRefused, match="502.*Bad gateway") as error,
        ):
            client.read("s")
        assert error.value.status == 502
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
