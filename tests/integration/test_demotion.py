"""A session's KV leaves the device first because somebody asks for it."""

from __future__ import annotations

from collections.abc import Callable

from stage import PATIENCE_S, Peer, Service, register, stored
from test_http_api import assert_problem, created
from typer.testing import CliRunner

from agentstate.cli.main import app


def test_a_demotion_is_asked_of_the_engine_and_followed(service: Service, start_peer: Callable[..., Peer]) -> None:
    peer = start_peer(lambda request: stored("demoted"))
    register(service.database, peer.address)
    session_id = created(service)["id"]
    path = f"/v1/sessions/{session_id}/kv/demote"
    answer = service.http.post(path, headers={"Idempotency-Key": "once"})
    assert (answer.status_code, answer.json()["kind"], answer.json()["state"]) == (202, "demote", "pending")
    again = service.http.post(path, headers={"Idempotency-Key": "once"})
    assert (again.json()["id"], again.headers["idempotency-replayed"]) == (answer.json()["id"], "true")
    ended = service.client.wait_operation(answer.json()["id"], timeout_s=PATIENCE_S)
    assert (ended.state, ended.result) == ("done", {"state": "demoted", "tokens": 128, "pages": 2, "bytes": 128_000})
    assert [request["verb"] for request in peer.requests] == ["demote"]


def test_without_an_engine_it_fails_and_says_why(service: Service) -> None:
    ended = service.client.wait_operation(service.client.demote(created(service)["id"]).id, timeout_s=PATIENCE_S)
    assert (ended.state, ended.result) == ("failed", {"error": "no live engine serves the session"})
    assert_problem(service.http.post("/v1/sessions/none/kv/demote"), 404, "session-not-found")


def test_the_command_line_demotes_and_prefetches(service: Service) -> None:
    session_id = created(service)["id"]
    for command in (["demote", session_id], ["prefetch", session_id, "--tier", "device"]):
        run = CliRunner().invoke(app, ["sessions", *command, "--url", service.base_url])
        assert run.exit_code == 0 and run.stdout.startswith("operation op_"), run.output
