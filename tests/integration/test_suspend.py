"""Suspending against an engine that answers over ZeroMQ, does not answer, or is not there."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import sqlalchemy as sa
from stage import MODEL, PATIENCE_S, Answers, Service, register, stored

from agentstate.answers import Lease
from agentstate.errors import OperationNotFound
from agentstate.fleet import operations
from agentstate.fleet.manifests import KvState
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
    assert suspended.kv.model_dump() == {"state": "durable", "tokens": 18432, "pages": 288, "bytes": 18432000}
    (request,) = peer.requests
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
    assert operation.result == {"state": "durable", "tokens": 256, "pages": 4, "bytes": 256000}
    assert operation.finished_at is not None
    assert operation.finished_at >= operation.created_at


def test_no_engine_is_unknown_at_once(service: Service, running: tuple[str, Lease]) -> None:
    suspended = service.client.suspend(*running, durable_timeout_ms=60_000)
    assert suspended.kv.model_dump() == {"state": "unknown", "tokens": 0, "pages": 0, "bytes": 0}
    assert suspended.operation is None
    assert suspended.status is SessionStatus.SUSPENDED


@pytest.mark.parametrize(
    "answer",
    [
        None,
        {"ok": False, "error": "no store"},
        {"ok": True},
        {"ok": True, "state": "perhaps", "tokens": 1, "pages": 1, "bytes": 1},
    ],
    ids=["silent", "refuses", "says nothing", "says nonsense"],
)
def test_an_engine_without_a_usable_answer_is_unknown_and_the_session_is_suspended(
    service: Service, running: tuple[str, Lease], start_peer: Any, answer: Any
) -> None:
    register(service.database, start_peer(Answers(answer)).address)
    suspended = service.client.suspend(*running, durable_timeout_ms=0)
    assert suspended.kv.state is KvState.UNKNOWN
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
    assert kv.model_dump() == {"state": "partial", "tokens": 64, "pages": 5, "bytes": 320000}


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
    following.fail_abandoned()
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
