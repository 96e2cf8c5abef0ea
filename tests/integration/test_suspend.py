"""Suspending against an engine that answers over ZeroMQ, does not answer, or is not there."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import sqlalchemy as sa
from stage import MODEL, NOTHING, PATIENCE_S, Answers, Service, register, stored

from agentstate.answers import Lease
from agentstate.errors import OperationNotFound
from agentstate.fleet import manifests, operations
from agentstate.fleet.engines import Phase
from agentstate.fleet.manifests import Durability, KvState, Manifest
from agentstate.sql.models import OperationState, SessionStatus

WAIT_S = PATIENCE_S


@pytest.fixture(autouse=True)
def short_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "SLICE_MS", 100)


@pytest.fixture
def running(service: Service) -> tuple[str, Lease]:
    session = service.client.create_session(MODEL)
    return session.id, service.client.resume(session.id).lease


def test_durable_at_once(service: Service, running: tuple[str, Lease], start_peer: Any) -> None:
    peer = start_peer(lambda request: stored("durable", 18432))
    register(service.database, peer.address)
    suspended = service.client.suspend(*running, durable_timeout_ms=700)
    assert suspended.status is SessionStatus.SUSPENDED
    assert suspended.operation is None
    stored_kv = {"state": "durable", "tokens": 18432, "pages": 288, "bytes": 18432000}
    assert suspended.kv.model_dump() == {**stored_kv, "durable_on": "node", "reason": None}
    (request,) = peer.requests
    # Whoever wants what an engine of an earlier release does too asks it as before.
    assert set(request) == {"verb", "session", "timeout_ms"}
    assert request["verb"] == "flush"
    assert request["session"] == running[0]
    assert 0 < request["timeout_ms"] <= 700


def test_the_wait_for_the_engine_is_told_apart(service: Service, start_peer: Any) -> None:
    def slowly(request: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.1)
        return stored("durable")

    register(service.database, start_peer(slowly).address)
    session = service.client.create_session(MODEL)
    lease = service.client.resume(session.id).lease
    body = {"lease": {"token": lease.token, "epoch": lease.epoch}, "reason": "user_wait"}
    for _ in range(2):
        response = service.http.post(
            f"/v1/sessions/{session.id}/suspend", json=body, headers={"Idempotency-Key": "k"}
        ).raise_for_status()
        timing = dict(part.strip().split(";dur=") for part in response.headers["Server-Timing"].split(","))
        if "Idempotency-Replayed" in response.headers:
            assert list(timing) == ["total"]  # this time nobody was waited for
        else:
            assert 100 <= float(timing["engine"]) < float(timing["total"])


def test_pending_is_followed_until_it_is_durable(service: Service, running: tuple[str, Lease], start_peer: Any) -> None:
    settled = threading.Event()
    peer = start_peer(lambda request: stored("durable", 256) if settled.is_set() else stored("pending", 64))
    register(service.database, peer.address)
    suspended = service.client.suspend(*running, durable_timeout_ms=0)
    assert (suspended.kv.state, suspended.kv.tokens) == (KvState.PENDING, 64)
    assert suspended.operation is not None
    operation = service.client.operation(suspended.operation)
    assert operation.state in (OperationState.PENDING, OperationState.RUNNING)
    assert (operation.kind, operation.session_id, operation.result) == ("flush", running[0], None)
    with pytest.raises(TimeoutError, match=suspended.operation):
        service.client.wait_operation(suspended.operation, timeout_s=0)
    settled.set()
    operation = service.client.wait_operation(suspended.operation, timeout_s=WAIT_S)
    assert operation.state is OperationState.DONE
    assert operation.result == {
        "state": "durable",
        "tokens": 256,
        "pages": 4,
        "bytes": 256000,
        "durable_on": "node",
    }
    assert operation.finished_at is not None
    assert operation.finished_at >= operation.created_at


def test_no_engine_is_unknown_at_once(service: Service, running: tuple[str, Lease]) -> None:
    suspended = service.client.suspend(*running, durable_timeout_ms=60_000)
    assert suspended.kv.model_dump() == NOTHING
    assert suspended.operation is None
    assert suspended.status is SessionStatus.SUSPENDED


@pytest.mark.parametrize(
    "answer",
    [
        None,
        {"ok": False, "error": "no store"},
        {"ok": True},
        {"ok": True, "state": "perhaps", "tokens": 1, "pages": 1, "bytes": 1},
        stored("durable", shared_tokens=None),
    ],
    ids=["silent", "refuses", "says nothing", "says nonsense", "says no number"],
)
def test_an_engine_without_a_usable_answer_is_unknown_and_the_session_is_suspended(
    service: Service, running: tuple[str, Lease], start_peer: Any, answer: Any
) -> None:
    register(service.database, start_peer(Answers(answer)).address)
    suspended = service.client.suspend(*running, durable_timeout_ms=0)
    assert (suspended.kv.state, suspended.kv.reason) == (KvState.UNKNOWN, None)
    assert suspended.operation is None
    assert service.client.resume(running[0]).lease.epoch == running[1].epoch + 1


def test_an_engine_that_is_gone_is_unknown(
    service: Service, running: tuple[str, Lease], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "GRACE_S", 0.5)
    register(service.database, "tcp://127.0.0.1:1")
    assert service.client.suspend(*running, durable_timeout_ms=0).kv.state is KvState.UNKNOWN


@pytest.mark.parametrize("state", ["partial", "lost", "unknown"])
def test_a_final_answer_that_is_not_durable_is_passed_on(
    service: Service, running: tuple[str, Lease], start_peer: Any, state: str
) -> None:
    register(service.database, start_peer(lambda request: stored(state)).address)
    suspended = service.client.suspend(*running)
    assert (suspended.kv.state, suspended.operation) == (state, None)


def test_all_ranks_must_be_durable(service: Service, running: tuple[str, Lease], start_peer: Any) -> None:
    first = start_peer(lambda request: stored("durable", 256))
    second = start_peer(lambda request: stored("partial", 64))
    register(service.database, first.address, rank=0)
    register(service.database, second.address, rank=1)
    kv = service.client.suspend(*running).kv
    assert (kv.state, kv.tokens, kv.pages, kv.bytes) == (KvState.PARTIAL, 64, 5, 320000)


@pytest.mark.parametrize(("epoch", "tokens", "asked"), [(1, 128, 0), (0, 640, 1)])
def test_a_dp_rank_that_served_no_request_of_the_turn_does_not_speak_for_it(
    service: Service, start_peer: Any, epoch: int, tokens: int, asked: int
) -> None:
    """The client sent it to the other one."""
    here = start_peer(lambda request: stored("durable", 128, epoch=epoch))
    there = start_peer(lambda request: stored("durable", 640, epoch=1))
    silent = start_peer(lambda request: {"ok": False, "error": "no such session"})
    for dp_rank, peer in enumerate((here, there, silent)):
        register(service.database, peer.address, node=f"n{dp_rank}", dp_rank=dp_rank, dp_size=3)
    session = service.client.create_session(MODEL)
    with service.database.write() as connection:
        manifests.save(connection, Manifest(session.id, "f1", 0, "n0", "eng", 64, 64, b"k" * 32, 1000))
    resumed = service.client.resume(session.id)
    assert resumed.engine is not None
    assert resumed.engine.dp_rank == 0
    kv = service.client.suspend(session.id, resumed.lease).kv
    assert (kv.state, kv.tokens) == (KvState.DURABLE, tokens)
    assert [len(here.requests), len(there.requests), len(silent.requests)] == [1, asked, asked]


@pytest.mark.parametrize(
    ("decoded", "state", "tokens"),
    [
        (stored("durable", 640, epoch=1), KvState.DURABLE, 640),
        (stored("pending", 0, epoch=1), KvState.PENDING, 0),
        (stored("durable", 640, epoch=0), KvState.DURABLE, 128),  # of another turn
        ({"ok": False, "error": "no such session"}, KvState.DURABLE, 128),
    ],
)
def test_an_engine_that_has_decoded_in_the_turn_speaks_for_it(
    service: Service, start_peer: Any, decoded: dict[str, Any], state: KvState, tokens: int
) -> None:
    prefills = start_peer(lambda request: stored("durable", 128, epoch=1))
    decodes = start_peer(lambda request: decoded)
    register(service.database, prefills.address, phase=Phase.PREFILL)
    elsewhere = {"node": "n2", "base_url": "http://127.0.0.1:31000/v1"}
    register(service.database, decodes.address, **elsewhere, phase=Phase.DECODE)
    session = service.client.create_session(MODEL)
    resumed = service.client.resume(session.id)
    assert resumed.engine is not None
    kv = service.client.suspend(session.id, resumed.lease, durable_timeout_ms=0).kv
    assert (kv.state, kv.tokens) == (state, tokens)
    assert prefills.requests and decodes.requests


def test_a_turn_that_several_engines_have_decoded_in_is_not_durable_before_all_have_stored_that(
    service: Service, start_peer: Any
) -> None:
    """Also if one has stored more than the other has so far: the other's request may be the newest."""
    prefills = start_peer(lambda request: stored("durable", 128, epoch=1))
    register(service.database, prefills.address, phase=Phase.PREFILL)
    for number, answer in enumerate((stored("durable", 640, epoch=1), stored("pending", 64, epoch=1))):
        peer = start_peer(lambda request, answer=answer: answer)
        elsewhere = {"node": f"n{number + 2}", "base_url": f"http://127.0.0.1:{31000 + number}/v1"}
        register(service.database, peer.address, **elsewhere, phase=Phase.DECODE)
    session = service.client.create_session(MODEL)
    kv = service.client.suspend(session.id, service.client.resume(session.id).lease, durable_timeout_ms=0).kv
    assert (kv.state, kv.tokens) == (KvState.PENDING, 64)


def test_only_the_engine_of_the_session_is_asked(service: Service, running: tuple[str, Lease], start_peer: Any) -> None:
    mine, other = start_peer(lambda request: stored("durable")), start_peer(lambda request: stored("lost"))
    register(service.database, mine.address)
    register(service.database, other.address, model="other", base_url="http://127.0.0.1:31000/v1", pages_dir="/p2")
    assert service.client.suspend(*running).kv.state is KvState.DURABLE
    assert other.requests == []


def test_an_engine_that_vanishes_fails_the_operation_with_the_reason(
    service: Service, running: tuple[str, Lease], start_peer: Any
) -> None:
    register(service.database, start_peer(Answers(stored("pending"), None)).address)
    suspended = service.client.suspend(*running, durable_timeout_ms=0)
    assert suspended.operation is not None
    operation = service.client.wait_operation(suspended.operation, timeout_s=WAIT_S)
    assert operation.state is OperationState.FAILED
    assert operation.result is not None
    assert "did not answer" in operation.result["error"]


def test_a_missed_answer_does_not_fail_the_operation(
    service: Service, running: tuple[str, Lease], start_peer: Any
) -> None:
    answers = Answers(stored("pending"), None, None, stored("pending"), None, stored("durable"))
    register(service.database, start_peer(answers).address)
    suspended = service.client.suspend(*running, durable_timeout_ms=0)
    assert suspended.operation is not None
    assert service.client.wait_operation(suspended.operation, timeout_s=WAIT_S).state is OperationState.DONE


def test_what_is_never_durable_fails_in_the_end(
    service: Service, running: tuple[str, Lease], start_peer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "FLUSH_LIMIT_S", 0.3)
    register(service.database, start_peer(lambda request: stored("pending")).address)
    suspended = service.client.suspend(*running, durable_timeout_ms=0)
    assert suspended.operation is not None
    operation = service.client.wait_operation(suspended.operation, timeout_s=WAIT_S)
    assert operation.state is OperationState.FAILED
    assert operation.result == {"error": "the flush did not end within 0.3 s"}


STORE = "s3://bucket/agents"


@pytest.mark.parametrize(
    ("tokens", "shared", "on"), [(128, 128, "shared"), (128, 192, "shared"), (128, 64, "node"), (0, 0, None)]
)
def test_it_is_told_where_all_of_it_is_durable(
    service: Service, running: tuple[str, Lease], start_peer: Any, tokens: int, shared: int, on: str | None
) -> None:
    """Also where nobody has asked for it."""
    register(service.database, start_peer(lambda request: stored("durable", tokens, shared_tokens=shared)).address)
    kv = service.client.suspend(*running).kv
    assert (kv.state, kv.durable_on, kv.reason) == (KvState.DURABLE, on, None)


@pytest.mark.parametrize(("of_second", "on"), [(192, Durability.SHARED), (64, Durability.NODE)])
def test_of_several_ranks_each_has_all_of_it_in_the_shared_store(
    service: Service, running: tuple[str, Lease], start_peer: Any, of_second: int, on: Durability
) -> None:
    for rank, (tokens, shared) in enumerate([(128, 128), (256, of_second)]):
        answer = stored("durable", tokens, shared_tokens=shared)
        register(service.database, start_peer(lambda request, answer=answer: answer).address, rank=rank)
    assert service.client.suspend(*running).kv.durable_on is on


def test_a_suspend_waits_for_the_shared_store_if_it_is_to(
    service: Service, running: tuple[str, Lease], start_peer: Any
) -> None:
    peer = start_peer(lambda request: stored("durable", shared_tokens=128))
    register(service.database, peer.address, shared_store=STORE)
    suspended = service.client.suspend(*running, durability="shared")
    assert (suspended.kv.state, suspended.kv.durable_on) == (KvState.DURABLE, Durability.SHARED)
    assert (suspended.kv.reason, suspended.operation) == (None, None)
    assert [request["durability"] for request in peer.requests] == ["shared"]


@pytest.mark.parametrize("kv", ["retain", "demote"])
@pytest.mark.parametrize("state", ["pending", "durable"])
def test_what_is_not_in_the_shared_store_yet_is_followed_until_it_is(
    service: Service, running: tuple[str, Lease], start_peer: Any, state: str, kv: str
) -> None:
    """Whether or not the engine calls that durable."""
    shared = threading.Event()

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if request["verb"] == "demote":
            return stored("demoted")
        return stored("durable", shared_tokens=128) if shared.is_set() else stored(state, shared_tokens=64)

    peer = start_peer(answer)
    register(service.database, peer.address, shared_store=STORE)
    suspended = service.client.suspend(*running, durability="shared", durable_timeout_ms=0, kv=kv)
    assert (suspended.kv.state, suspended.kv.durable_on) == (KvState.PENDING, Durability.NODE)
    assert suspended.operation is not None
    shared.set()
    operation = service.client.wait_operation(suspended.operation, timeout_s=WAIT_S)
    assert operation.state is OperationState.DONE
    assert operation.result is not None
    last = ("durable", "shared") if kv == "retain" else ("demoted", None)
    assert (operation.result["state"], operation.result.get("durable_on")) == last
    flushes = [request for request in peer.requests if request["verb"] == "flush"]
    assert len(flushes) > 1
    assert {request["durability"] for request in flushes} == {"shared"}


@pytest.mark.parametrize("registered", ["", STORE], ids=["SQL says so", "the engine says so"])
def test_an_engine_without_a_shared_store_makes_it_durable_on_its_node_and_says_why(
    service: Service, running: tuple[str, Lease], start_peer: Any, registered: str
) -> None:
    stays = threading.Event()

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if request.get("durability") == "shared":
            return {"ok": False, "error": "this engine has no shared store: set AGENTSTATE_SHARED_STORE"}
        return stored("durable" if stays.is_set() else "pending")

    peer = start_peer(answer)
    register(service.database, peer.address, shared_store=registered)
    with service.client.turn(
        service.client.create_session(MODEL).id, durability="shared", durable_timeout_ms=0
    ) as turn:
        pass
    suspended = turn.suspended
    assert suspended is not None
    assert (suspended.kv.state, suspended.kv.durable_on) == (KvState.PENDING, Durability.NODE)
    assert suspended.kv.reason is not None
    assert suspended.kv.reason.endswith("has no shared store: set AGENTSTATE_SHARED_STORE")
    stays.set()
    # What follows asks for no more either.
    kv = turn.wait_durable(timeout_s=WAIT_S)
    assert (kv.state, kv.durable_on, kv.reason) == (KvState.DURABLE, Durability.NODE, suspended.kv.reason)
    assert ["durability" in request for request in peer.requests].count(True) == (1 if registered else 0)


def test_no_other_durability_is_known(service: Service, running: tuple[str, Lease]) -> None:
    session, lease = running
    body = {"lease": {"token": lease.token, "epoch": lease.epoch}, "reason": "user_wait", "durability": "moon"}
    assert service.http.post(f"/v1/sessions/{session}/suspend", json=body).status_code == 422


def test_stopping_the_service_fails_what_it_followed(
    service: Service, running: tuple[str, Lease], start_peer: Any
) -> None:
    register(service.database, start_peer(lambda request: stored("pending")).address)
    suspended = service.client.suspend(*running, durable_timeout_ms=0)
    assert suspended.operation is not None
    service.app.state.service.operations.close()
    operation = service.client.operation(suspended.operation)
    assert operation.state is OperationState.FAILED
    assert operation.result == {"error": "the service was stopped before the flush ended"}


def test_a_service_that_starts_fails_what_its_former_self_left(service: Service) -> None:
    following = service.app.state.service.operations
    with service.database.write() as connection:
        for name, owner, age_s, state in (
            ("op_mine", following.owner, 1, "running"),
            ("op_queued", following.owner, 1, "pending"),
            ("op_other", "elsewhere:8700", 1, "running"),
            ("op_ancient", "elsewhere:8700", 1000, "running"),
            ("op_done", following.owner, 1, "done"),
        ):
            connection.execute(
                sa.insert(operations.operations).values(
                    id=name,
                    kind="flush",
                    session_id="s",
                    state=state,
                    owner=owner,
                    created_us=operations.now_us() - age_s * 1_000_000,
                )
            )
    operations.fail_abandoned(service.database, following.owner)
    states = {
        name: service.client.operation(f"op_{name}").state for name in ("mine", "queued", "other", "ancient", "done")
    }
    assert states == {"mine": "failed", "queued": "failed", "other": "running", "ancient": "failed", "done": "done"}
    result = service.client.operation("op_mine").result
    assert result is not None
    assert "the service ended" in result["error"]


def test_an_operation_that_is_not_there(service: Service) -> None:
    with pytest.raises(OperationNotFound, match="op_none"):
        service.client.operation("op_none")
