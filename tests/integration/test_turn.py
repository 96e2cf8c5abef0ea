"""Turns: resume, work, suspend, whatever happens in between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import anyio
import httpx
import pytest
import sqlalchemy as sa
from stage import MODEL, PATIENCE_S, Service, register, stored, until

from agentstate.client import AsyncClient, AsyncTurn, Client, Turn, message, tool_call, tool_output
from agentstate.errors import EngineUnreachable, LeaseLost, SessionBusy, ToolInFlight
from agentstate.fleet import operations
from agentstate.sql.models import SessionStatus

HELLO = message({"role": "user", "content": "Hello"})


class Both:
    """A turn by either client, run to its end: what it does is an async function of it, in which `now` awaits."""

    def __init__(self, service: Service, is_async: bool):
        self._service, self.is_async = service, is_async

    def __call__(self, work: Callable[[Any], Any], **options: Any) -> Turn | AsyncTurn:
        if not self.is_async:
            with self._service.client.turn("s", **options) as turn:
                for step in work(turn):
                    step()
            return turn

        async def run() -> AsyncTurn:
            async with AsyncClient(self._service.base_url) as client, client.turn("s", **options) as turn:
                for step in work(turn):
                    result = step()
                    if asyncio.iscoroutine(result):
                        await result
                    else:
                        await asyncio.sleep(0)
                return turn

        return asyncio.run(run())


@pytest.fixture
def backend() -> str:
    """The client is the same whatever database the service has."""
    return "sqlite"


@pytest.fixture(params=[False, True], ids=["client", "async client"])
def run(request: pytest.FixtureRequest, service: Service) -> Both:
    service.client.create_session(MODEL, id="s")
    return Both(service, request.param)


def test_a_turn_ends_suspended_with_what_it_appended(service: Service, run: Both) -> None:
    def work(turn: Any) -> Any:
        assert (turn.entries, turn.pending_tool_calls, turn.session.status) == ([], [], SessionStatus.RUNNING)
        yield lambda: turn.append(HELLO, tool_call("c", "read"))
        yield lambda: turn.append(tool_output("c", "text"))
        turn.reason = "done"

    turn = run(work)
    assert turn.suspended is not None
    assert turn.suspended.kv.state == "unknown"
    assert service.client.read("s").status is SessionStatus.SUSPENDED
    assert [entry.kind for entry in service.client.entries("s").data] == ["message", "tool_call", "tool_result"]


def test_a_turn_whose_block_raises_ends_suspended_too(service: Service, run: Both) -> None:
    def work(turn: Any) -> Any:
        turn.reason = "done"
        yield lambda: turn.append(HELLO, tool_call("c", "read"))
        raise KeyError("the tool broke")

    with pytest.raises(KeyError, match="the tool broke") as raised:
        run(work)
    assert getattr(raised.value, "__notes__", []) == []
    assert service.client.read("s").status is SessionStatus.SUSPENDED
    with service.client.turn("s") as turn:
        assert turn.pending_tool_calls == ["c"]
        turn.append(tool_output("c", "known after all"))


def used(service: Service, in_turn: Both, **given: Any) -> list[Any]:
    """What `tool` gave."""
    found: list[Any] = []

    def work(turn: Any) -> Any:
        if not isinstance(turn, AsyncTurn):
            yield lambda: found.append(turn.tool("c", "read", {"path": "a"}, **given))
            return

        async def use() -> None:
            found.append(await turn.tool("c", "read", {"path": "a"}, **given))

        yield use

    in_turn(work)
    return found


def test_a_tool_is_run_once(service: Service, run: Both) -> None:
    ran: list[str] = []

    def read() -> Any:
        with service.database.read() as connection:
            ran.extend(connection.execute(sa.text("SELECT state FROM tool_calls")).scalars())
        return {"text": float("nan")}

    for _ in range(2):
        (call,) = used(service, run, run=read, expected_s=2.5)
        assert (call.state, call.expected_s, call.result) == ("done", 2.5, {"output": {"text": "NaN"}})
    assert ran == ["claimed"]


def test_a_tool_that_is_awaited(service: Service, run: Both) -> None:
    async def read() -> str:
        await asyncio.sleep(0)
        return "text"

    if run.is_async:
        assert used(service, run, run=read)[0].result == {"output": "text"}


def test_what_a_tool_raises_is_its_error(service: Service, run: Both) -> None:
    def read() -> Any:
        raise FileNotFoundError("no such file")

    with pytest.raises(FileNotFoundError) as raised:
        used(service, run, run=read)
    assert getattr(raised.value, "__notes__", []) == []
    (call,) = used(service, run, run=lambda: pytest.fail("it ran again"))
    assert (call.state, call.result) == ("failed", {"error": "FileNotFoundError: no such file"})


def test_what_a_tool_raises_comes_first(service: Service, run: Both) -> None:
    def read() -> Any:
        lapse(service)
        raise FileNotFoundError("no such file")

    with pytest.raises(FileNotFoundError) as raised:
        used(service, run, run=read)
    assert "could not be reported" in raised.value.__notes__[0]


def test_a_turn_that_is_done_too_early_says_so_and_is_suspended(service: Service, run: Both) -> None:
    with pytest.raises(ToolInFlight):
        run(lambda turn: [lambda: turn.append(tool_call("c", "read"))], reason="done")
    assert service.client.read("s").status is SessionStatus.SUSPENDED


def test_a_busy_session_is_not_entered(service: Service, run: Both) -> None:
    service.client.resume("s")
    with pytest.raises(SessionBusy):
        run(lambda turn: pytest.fail("the block ran"))


def lapse(service: Service) -> None:
    with service.database.write() as connection:
        connection.execute(sa.text("UPDATE leases SET expires_us = 1"))


def test_a_lost_lease_is_told_and_noted(service: Service, run: Both) -> None:
    seen: list[Any] = []

    def work(turn: Any) -> Any:
        seen.append(turn)
        lapse(service)
        yield lambda: turn.append(HELLO)

    with pytest.raises(LeaseLost) as lost:
        run(work)
    assert "could not be suspended" in lost.value.__notes__[0]
    assert seen[0].suspended is None
    with pytest.raises(LeaseLost):
        run(lambda turn: [lambda: lapse(service)])


def test_the_lease_is_kept_while_the_block_runs(service: Service, run: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentstate.client.turn.RENEWALS_PER_TTL", 1000)

    def expiry() -> int:
        with service.database.read() as connection:
            return connection.execute(sa.text("SELECT expires_us FROM leases")).scalar_one()

    def work(turn: Any) -> Any:
        first = expiry()
        while expiry() <= first:
            yield (lambda: asyncio.sleep(0.05)) if isinstance(turn, AsyncTurn) else (lambda: time.sleep(0.05))
        assert not turn.lease_lost

    assert run(work, lease_ttl_s=300.0).suspended is not None


def test_a_turn_learns_that_its_lease_is_lost(service: Service, run: Both) -> None:
    def work(turn: Any) -> Any:
        lapse(service)
        while not turn.lease_lost:
            yield (lambda: asyncio.sleep(0.02)) if isinstance(turn, AsyncTurn) else (lambda: time.sleep(0.02))

    with pytest.raises(LeaseLost):
        run(work, lease_ttl_s=0.3)


# --- turns that are cancelled


def ends_suspended(service: Service) -> None:
    until(lambda: service.client.read("s").status is SessionStatus.SUSPENDED)


def in_a_client(service: Service, work: Callable[[AsyncClient], Any]) -> Any:
    service.client.create_session(MODEL, id="s")

    async def run() -> Any:
        async with AsyncClient(service.base_url) as client:
            return await work(client)

    return asyncio.run(run())


def test_a_turn_in_a_scope_that_is_cancelled_ends(service: Service) -> None:
    async def work(client: AsyncClient) -> bool:
        with anyio.CancelScope() as scope:
            async with client.turn("s"):
                scope.cancel()
                await anyio.sleep_forever()
        return scope.cancelled_caught

    assert in_a_client(service, work)
    ends_suspended(service)


def test_a_cancellation_at_the_end_of_a_turn_is_not_swallowed(service: Service) -> None:
    async def work(client: AsyncClient) -> None:
        task = asyncio.current_task()
        assert task is not None
        async with client.turn("s"):
            await asyncio.sleep(0)  # whatever the turn has on the loop has begun
            task.cancel()
        await asyncio.sleep(0)
        pytest.fail("the cancellation was lost")

    with pytest.raises(asyncio.CancelledError):
        in_a_client(service, work)
    ends_suspended(service)


@pytest.mark.parametrize("path", ["resume", "suspend"])
def test_a_turn_that_is_cancelled_while_its_answer_comes_ends(service: Service, path: str) -> None:
    """The service has carried out what the client does not wait for any more."""

    async def work(client: AsyncClient) -> None:
        send, arrived = client._http.send, asyncio.Event()

        async def hold(request: Any, **options: Any) -> Any:
            answer = await send(request, **options)
            if request.url.path.endswith(path):
                arrived.set()
                await asyncio.Event().wait()
            return answer

        client._http.send = hold  # type: ignore[method-assign]

        async def turn() -> None:
            async with client.turn("s"):
                pass

        task = asyncio.create_task(turn())
        await arrived.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    in_a_client(service, work)
    ends_suspended(service)
    assert service.client.resume("s").lease.epoch == 2


def test_a_sync_turn_that_is_interrupted_as_it_begins_ends(service: Service) -> None:
    service.client.create_session(MODEL, id="s")
    with Client(service.base_url) as client:
        send = client._http.send

        def interrupt(request: Any, **options: Any) -> Any:
            send(request, **options)
            raise KeyboardInterrupt

        client._http.send = interrupt  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt), client.turn("s"):
            pytest.fail("the block ran")
    ends_suspended(service)


def test_a_turn_that_nobody_runs_any_more_ends(service: Service) -> None:
    """A coroutine that is closed in the block cannot await anything."""

    async def work(client: AsyncClient) -> None:
        turn = await client.turn("s").__aenter__()
        with pytest.raises(StopIteration):
            turn.__aexit__(GeneratorExit, GeneratorExit(), None).send(None)

    in_a_client(service, work)
    ends_suspended(service)


def test_a_tool_that_blocks_the_event_loop_keeps_its_lease(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentstate.client.turn.RENEWALS_PER_TTL", 1000)

    def expiry() -> int:
        with service.database.read() as connection:
            return connection.execute(sa.text("SELECT expires_us FROM leases")).scalar_one()

    async def work(client: AsyncClient) -> None:
        async with client.turn("s", lease_ttl_s=300.0) as turn:
            first = expiry()
            until(lambda: expiry() > first)
            assert not turn.lease_lost

    in_a_client(service, work)
    ends_suspended(service)


def test_who_left_while_waiting_for_a_session_does_not_get_it(service: Service) -> None:
    service.client.create_session(MODEL, id="s")
    held = service.client.resume("s")
    body = {"on_busy": "wait", "busy_timeout_ms": 30_000}
    with (
        httpx.Client(base_url=service.base_url, timeout=httpx.Timeout(PATIENCE_S, read=0.2)) as leaver,
        pytest.raises(httpx.ReadTimeout),
    ):
        leaver.post("/v1/sessions/s/resume", json=body)
    service.client.suspend("s", held.lease, durable_timeout_ms=0)
    # Nobody is before this one.
    for _ in range(20):
        assert service.client.read("s").status is SessionStatus.SUSPENDED
        time.sleep(0.02)


def test_how_long_to_wait_is_bounded_by_a_preference(service: Service) -> None:
    service.client.create_session(MODEL, id="s")
    held = service.client.resume("s")
    answer = service.http.post(
        "/v1/sessions/s/resume",
        json={"on_busy": "wait", "busy_timeout_ms": 30_000},
        headers={"Prefer": "respond-async, wait=0"},
    )
    assert answer.status_code == 409
    assert service.client.renew("s", held.lease).epoch == held.lease.epoch


def test_what_an_openai_client_needs(service: Service, run: Both) -> None:
    def without(turn: Any) -> Any:
        with pytest.raises(EngineUnreachable, match=f"'{MODEL}'"):
            _ = turn.extra_body
        yield lambda: None

    run(without)
    engine = register(service.database, "tcp://127.0.0.1:1")

    def with_engine(turn: Any) -> Any:
        assert turn.base_url == engine.base_url
        assert turn.extra_body["session_id"]
        yield lambda: None

    run(with_engine, durable_timeout_ms=0)


def test_waiting_until_it_is_durable(
    service: Service, start_peer: Any, monkeypatch: pytest.MonkeyPatch, run: Both
) -> None:
    monkeypatch.setattr(operations, "SLICE_MS", 50)
    answers = iter([stored("pending", 64), stored("pending", 64)])
    register(service.database, start_peer(lambda request: next(answers, stored("durable", 256))).address)
    turn = run(lambda turn: [], durable_timeout_ms=0)
    assert turn.suspended is not None
    assert turn.suspended.kv.state == "pending"
    if isinstance(turn, Turn):
        assert turn.wait_durable(timeout_s=300).model_dump()["tokens"] == 256
        assert service.client.turn("s").suspended is None


def test_an_async_turn_waits_until_it_is_durable(
    service: Service, start_peer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "SLICE_MS", 50)
    service.client.create_session(MODEL, id="s")
    answers = iter([stored("pending", 64), stored("pending", 64)])
    register(service.database, start_peer(lambda request: next(answers, stored("durable", 256))).address)

    async def work() -> Any:
        async with AsyncClient(service.base_url) as client:
            async with client.turn("s", durable_timeout_ms=0) as turn:
                pass
            return await turn.wait_durable(timeout_s=300)

    assert asyncio.run(work()).tokens == 256


def test_a_turn_that_has_not_begun_or_ended_says_so(service: Service) -> None:
    turn = service.client.turn("s")
    with pytest.raises(RuntimeError, match="has not begun"):
        _ = turn.session
    with pytest.raises(RuntimeError, match="has not ended"):
        turn.wait_durable()
