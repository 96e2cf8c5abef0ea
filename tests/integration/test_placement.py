"""Where a session's KV is and why, as the service tells it from what its engine says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from documented import checked
from stage import Answers, Service, register
from test_http_api import assert_problem, created
from typer.testing import CliRunner

from agentstate.cli.main import app
from agentstate.fleet import manifests
from agentstate.fleet.manifests import Manifest

TIERS = {
    "device": {"tokens": 0, "bytes": 0},
    "host": {"tokens": 64, "bytes": 1000},
    "disk": {"tokens": 128, "bytes": 2000},
}
WAIT = {"state": "waits", "kind": "tool", "waited_s": 4.0, "rest_p50_s": 3.0, "rest_p90_s": None}
SAID: dict[str, Any] = {"tiers": TIERS, "wait": WAIT, "index": 0.25, "place": 2, "fetched_from_index": 0.5}


def explained(service: Service, start_peer: Any, said: Answers | dict[str, Any]) -> dict[str, Any]:
    peer = start_peer(said if callable(said) else lambda request: {"ok": True, **said})
    register(service.database, peer.address)
    session_id = created(service)["id"]
    found: dict[str, Any] = service.http.get(f"/v1/sessions/{session_id}/kv").raise_for_status().json()
    assert [(request["verb"], request["session"]) for request in peer.requests] == [("explain", session_id)]
    return found


def test_the_engine_says_where_the_pages_are_and_what_would_move_them(service: Service, start_peer: Any) -> None:
    found = explained(service, start_peer, SAID)
    assert found["tiers"] == TIERS
    assert (found["engine"][:4], found["index"], found["place"]) == ("eng_", 0.25, 2)
    assert (found["wait"]["kind"], found["wait"]["rest_p50_s"], found["wait"]["rest_p90_s"]) == ("tool", 3.0, None)
    assert found["next"] == "it is fetched once its index reaches 0.5, or with its next request"
    assert found["decisions"] == []


def test_what_was_decided_about_it_is_told(service: Service, start_peer: Any) -> None:
    made = {"session": "the engine's name", "decision": "evict", "outcome": "waited_for", "tokens": 64}
    made |= {"id": 1_767_605_472_512_000, "index": 0.5, "displaced": None}
    found = explained(service, start_peer, {**SAID, "decisions": [made]})
    (told,) = found["decisions"]
    assert (told["session_id"], told["decision"], told["outcome"]) == (found["session_id"], "evict", "waited_for")
    assert told["at"] == "2026-01-05T09:31:12.512000Z"
    assert (found["restores"], found["page_map"], found["more_tokens"]) == ([], [], 0), "from an earlier release"


def test_what_was_restored_of_it_and_where_its_pages_are_is_told(service: Service, start_peer: Any) -> None:
    restore = {"id": 1_767_605_472_512_000, "session": "the engine's name", "why": "request", "tokens": {"nvme": 128}}
    restore |= {"bytes": 2000, "seconds": 0.5, "waited_s": 0.25}
    part = {"first": 0, "tokens": 128, "device": True, "host": False, "extent": "0a.ext", "shared_extent": None}
    more = {"restores": [restore], "page_map": [part], "more_tokens": 64}
    found = explained(service, start_peer, {**SAID, **more})
    assert (found["page_map"], found["more_tokens"]) == ([part], 64)
    (told,) = found["restores"]
    assert told.pop("at") == "2026-01-05T09:31:12.512000Z"
    assert told == {name: restore[name] for name in ("why", "tokens", "bytes", "seconds", "waited_s")}


@pytest.mark.parametrize(
    ("more", "following"),
    [
        ({"leaves_after_tokens": 61440}, "it leaves the device after 61,440 tokens of others"),
        ({"wait": {"state": "served", "waited_s": 1.0}}, "it stays on the device until its request has ended"),
        (
            {"leaves_after_tokens": 61440, "pin": {"tier": "device", "rest_s": 7200.0}},
            "it stays on the device for 7,200 s, unless a request needs all of the room",
        ),
        ({"wait": None, "index": None, "place": None}, "its next request brings it to the device"),
        ({"wait": {**WAIT, "state": "released"}}, "its next request brings it to the device"),
    ],
    ids=["on the device", "served", "pinned", "unknown", "released"],
)
def test_what_would_move_it_is_told_in_words(
    service: Service, start_peer: Any, more: dict[str, Any], following: str
) -> None:
    assert explained(service, start_peer, {**SAID, **more})["next"] == following


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda request: {"ok": False, "error": "unknown verb 'explain'"}, "unknown verb 'explain'"),
        (lambda request: {"ok": True, "tiers": {"device": "warm"}}, "the engine does not say"),
        (lambda request: {"ok": True, **SAID, "wait": {"state": "sleeps", "waited_s": 0}}, "the engine does not say"),
        (lambda request: {"ok": True, **SAID, "decisions": [{"id": 1}]}, "does not say"),
        (
            lambda request: {"ok": True, **SAID, "tiers": {**TIERS, "disk": {"tokens": None, "bytes": 0}}},
            "does not say",
        ),
    ],
    ids=["earlier release", "nonsense", "unknown state", "no decision", "no number"],
)
def test_an_engine_that_does_not_say_is_no_error(
    service: Service, start_peer: Any, answer: Answers, reason: str
) -> None:
    found = explained(service, start_peer, answer)
    assert found["tiers"] == {}
    assert reason in found["next"]


def test_without_an_engine_nothing_is_known(service: Service) -> None:
    found = service.http.get(f"/v1/sessions/{created(service)['id']}/kv").json()
    assert (found["engine"], found["tiers"], found["next"]) == (None, {}, "no live engine has served it")


@pytest.mark.parametrize(("shared_tokens", "on"), [(64, "node"), (128, "shared")])
def test_where_it_is_durable_is_told_with_an_engine_and_without(
    service: Service, start_peer: Any, shared_tokens: int, on: str
) -> None:
    session_id = created(service)["id"]
    with service.database.write() as connection:
        manifests.save(
            connection,
            Manifest(session_id, "f1", 0, "n1", "eng_1", 64, 128, b"k" * 64, 1000, shared_tokens=shared_tokens),
        )
    found = service.http.get(f"/v1/sessions/{session_id}/kv").json()
    assert (found["engine"], found["durable_on"]) == (None, on)
    register(service.database, start_peer(lambda request: {"ok": False, "error": "busy"}).address)
    assert service.http.get(f"/v1/sessions/{session_id}/kv").json()["durable_on"] == on
    register(service.database, start_peer(lambda request: {"ok": True, **SAID}).address)
    assert service.http.get(f"/v1/sessions/{session_id}/kv").json()["durable_on"] == on
    shown = CliRunner().invoke(app, ["sessions", "kv", session_id, "--url", service.base_url]).stdout
    assert {"node": "durable on the drive of its node", "shared": "durable in the shared store"}[on] in shown


def test_of_a_session_that_nobody_has_there_is_nothing_to_tell(service: Service) -> None:
    assert_problem(service.http.get("/v1/sessions/ses_none/kv"), 404, "session-not-found")


def test_the_command_line_shows_it(service: Service, start_peer: Any) -> None:
    fetch = {"ago_s": 9.0, "index": 0.5, "displaced": 0.1, "tokens": 128, "outcome": "wasted", "reason": "left"}
    register(service.database, start_peer(lambda request: {"ok": True, **SAID, "fetch": fetch}).address)
    session_id = created(service)["id"]
    shown = CliRunner().invoke(app, ["sessions", "kv", session_id, "--url", service.base_url])
    assert shown.exit_code == 0, shown.output
    for part in (
        "engine: eng_",
        "waits for a tool since 4.0 s; is back in 3.0 s (one in two), later (nine in ten)",
        "worth 0.25 a byte and second on the device: place 2",
        "fetched 9.0 s ago, 128 tokens: wasted, left",
        "it is fetched once its index reaches 0.5",
    ):
        assert part in shown.output
    as_json = CliRunner().invoke(app, ["sessions", "kv", session_id, "--url", service.base_url, "--json"])
    assert checked("sessions kv", json.loads(as_json.output))["place"] == 2


def test_whom_it_is_charged_to_what_was_left_and_until_when_it_is_pinned_are_told(
    service: Service, start_peer: Any
) -> None:
    account = {
        "name": "tenant default",
        "tiers": {
            "device": {"bytes": 3_000_000, "limit": 5_000_000},
            "host": {"bytes": 1_000_000, "limit": None},
            "nvme": {"bytes": None, "limit": None},
        },
    }
    pin = {"tier": "host", "rest_s": 60.0}
    found = explained(service, start_peer, {**SAID, "account": account, "pin": pin, "left_tokens": 128})
    assert (found["account"], found["pin"], found["left_tokens"]) == (account, pin, 128)
    said = CliRunner().invoke(app, ["sessions", "kv", found["session_id"], "--url", service.base_url]).stdout
    assert "pinned to host for 60 s more" in said
    assert "128 tokens on the device that it has left" in said
    assert "charged to tenant default: 3.0 of 5.0 MB on device, 1.0 MB on host" in said
