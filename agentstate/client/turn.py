"""A turn: the period in which one process runs a session.

It begins with a resume and ends with a suspend, whatever happens in between. A thread renews the lease meanwhile, so a
model call or a tool may take any time.

An interrupted or cancelled turn ends too. Its resume and its suspend carry an Idempotency-Key. A thread repeats the
interrupted request: a lease that was taken meanwhile is given back, and the suspend arrives.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self, TypedDict, TypeVar, Unpack

from pydantic import ValidationError

from agentstate import documents
from agentstate.answers import (
    AppendedEntries,
    EngineLink,
    Entry,
    Lease,
    Operation,
    Outlook,
    Resumed,
    Session,
    StoredKv,
    Suspended,
    ToolCall,
)
from agentstate.client import routes
from agentstate.client.keeper import BlockingSender, Keeper, apart
from agentstate.client.routes import Call
from agentstate.errors import AgentStateError, EngineUnreachable, ToolInFlight
from agentstate.fleet.manifests import KvState
from agentstate.sql.models import ToolCallState

RENEWALS_PER_TTL = 3

A = TypeVar("A")


class _Connected(Protocol):
    def _blocking(self) -> BlockingSender:
        """The client that the threads of its turns share."""

    def _apart(self) -> BlockingSender:
        """A new client of the same service; the caller closes it."""


class Sender(_Connected, Protocol):
    """The part of a client that a turn needs."""

    def _send(self, call: Call[A]) -> A: ...

    def wait_operation(self, operation_id: str, *, timeout_s: float) -> Operation: ...


class AsyncSender(_Connected, Protocol):
    """The part of a client that an asynchronous turn needs."""

    async def _send(self, call: Call[A]) -> A: ...

    async def wait_operation(self, operation_id: str, *, timeout_s: float) -> Operation: ...


class TurnOptions(TypedDict, total=False):
    """How a turn begins and ends; the defaults are in `_Turn`."""

    lease_ttl_s: float
    tail: int
    expect_model: str | None
    busy_timeout_s: float
    prefetch: str
    reason: str
    kv: str
    durable_timeout_ms: int
    durability: str


class _Turn:
    """The state of a turn, however its requests are sent."""

    def __init__(
        self,
        connected: _Connected,
        session_id: str,
        *,
        lease_ttl_s: float = 60.0,
        tail: int = 50,
        expect_model: str | None = None,
        busy_timeout_s: float = 0.0,
        prefetch: str = "none",
        reason: str = "user_wait",
        kv: str = "retain",
        durable_timeout_ms: int = 500,
        durability: str = "node",
    ):
        self.session_id = session_id
        #: Why the turn ends: ``user_wait``, ``tool_wait``, ``other`` or ``done``. May be set in the block.
        self.reason = reason
        #: What the suspend at the end of the block answered; None before.
        self.suspended: Suspended | None = None
        #: Whether the lease is known to be lost: another process may run the session, and appends fail.
        self.lease_lost = False
        self._connected = connected
        self._lease_ttl_s = lease_ttl_s
        self._kv_after = kv
        self._durable_timeout_ms = durable_timeout_ms
        self._durability = durability
        self._resumption = routes.resume(
            session_id,
            lease_ttl_s=lease_ttl_s,
            tail=tail,
            expect_model=expect_model,
            busy_timeout_s=busy_timeout_s,
            prefetch=prefetch,
        )
        self._resumed: Resumed | None = None
        self._keeper: Keeper | None = None

    @property
    def resumed(self) -> Resumed:
        """All that the resume answered."""
        if self._resumed is None:
            raise RuntimeError(f"the turn of session {self.session_id} has not begun: use it in a with statement")
        return self._resumed

    @property
    def session(self) -> Session:
        return self.resumed.session

    @property
    def lease(self) -> Lease:
        return self.resumed.lease

    @property
    def entries(self) -> list[Entry]:
        """The newest entries as of the resume, the oldest first: as many as ``tail`` asked for."""
        return self.resumed.entries.data

    @property
    def pending_tool_calls(self) -> list[str]:
        """Calls without a result as of the resume: another process claimed them, and they may or may not have run."""
        return self.resumed.pending_tool_calls

    @property
    def kv(self) -> Outlook:
        """How much of the session's KV can be restored, as of the resume."""
        return self.resumed.kv

    @property
    def base_url(self) -> str:
        """The URL of the engine's OpenAI API. Raises EngineUnreachable if no live engine serves the model."""
        return self._engine.base_url

    @property
    def extra_body(self) -> dict[str, str]:
        """An OpenAI client's ``extra_body`` for every model call of the turn. Raises EngineUnreachable."""
        return self._engine.extra_body

    @property
    def _engine(self) -> EngineLink:
        if self.resumed.engine is None:
            raise EngineUnreachable(
                f"no live engine serves {self.session.model!r}, the model of session {self.session_id}: "
                "start one with `agentstate engine`, and resume the session again"
            )
        return self.resumed.engine

    def _begin(self, resumed: Resumed) -> None:
        self._resumed = resumed
        self._keeper = Keeper(
            self.session_id,
            routes.renew(self.session_id, resumed.lease, lease_ttl_s=self._lease_ttl_s),
            self._connected._blocking,
            self._lease_ttl_s / RENEWALS_PER_TTL,
            self._lose,
        )

    def _lose(self) -> None:
        self.lease_lost = True

    def _ending(self, error: BaseException | None) -> Call[Suspended]:
        """Stop renewing the lease. Returns the suspend to send."""
        if self._keeper is not None:
            self._keeper.stop()
        # A turn that failed is not done, whatever its reason says.
        return self._suspension(self.lease, self.reason if error is None else "user_wait")

    def _suspension(self, lease: Lease, reason: str) -> Call[Suspended]:
        return routes.once(
            routes.suspend(
                self.session_id,
                lease,
                reason=reason,
                kv=self._kv_after,
                durable_timeout_ms=self._durable_timeout_ms,
                durability=self._durability,
            )
        )

    def _suspend_apart(self, suspension: Call[Suspended]) -> None:
        def suspend(client: BlockingSender) -> None:
            self.suspended = client._send(suspension)

        apart(self.session_id, self._connected._apart(), suspend)

    def _withdraw_apart(self, resumption: Call[Resumed]) -> None:
        """Give back the lease that a resume may have taken after all."""
        # If it took no lease so far, it must not wait for one.
        again = routes.once(resumption, Prefer="wait=0")

        def withdraw(client: BlockingSender) -> None:
            try:
                resumed = client._send(again)
            except AgentStateError:
                return
            client._send(self._suspension(resumed.lease, "user_wait"))

        apart(self.session_id, self._connected._apart(), withdraw)

    def _not_suspended(self, failure: AgentStateError, error: BaseException | None) -> None:
        if error is None:
            raise failure
        error.add_note(f"and session {self.session_id} could not be suspended: {failure}")

    def _claim(self, call_id: str, name: str, arguments: Any, expected_s: float | None) -> Call[ToolCall]:
        return routes.claim_tool_call(
            self.session_id, call_id, name, arguments, expected_s=expected_s, lease=self.lease
        )

    def _finish(self, call_id: str, **result: Any) -> Call[ToolCall]:
        return routes.finish_tool_call(self.session_id, call_id, lease=self.lease, **result)

    def _outcome(self) -> Suspended:
        if self.suspended is None:
            raise RuntimeError(f"the turn of session {self.session_id} has not ended by a suspend")
        return self.suspended


def _settled(suspended: Suspended, operation: Operation) -> StoredKv:
    """The stored KV as an ended flush reports it; ``unknown`` if the flush failed."""
    try:
        return StoredKv.model_validate({**(operation.result or {}), "reason": suspended.kv.reason})
    except ValidationError:
        return suspended.kv.model_copy(update={"state": KvState.UNKNOWN})


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _with_output(call: ToolCall, output: Any) -> ToolCall:
    """A call that was just reported: the service does not repeat its output."""
    return call.model_copy(update={"result": {"output": documents.finite(output)}})


class Turn(_Turn):
    """A block in which this process runs a session::

        with client.turn(session.id) as turn:
            reply = llm.chat.completions.create(..., extra_body=turn.extra_body)
            turn.append(message({"role": "assistant", "content": reply.choices[0].message.content}))

    Entering it raises what `Client.resume` does. Its end suspends the session with ``reason``, even if the block
    raises; an error of that suspend is raised, or noted on the block's own exception. A turn that is ``done`` while a
    tool call has no result is suspended as ``tool_wait``, and raises ToolInFlight. If this process vanishes, the lease
    lapses after ``lease_ttl_s``.
    """

    def __init__(self, client: Sender, session_id: str, **options: Unpack[TurnOptions]):
        super().__init__(client, session_id, **options)
        self._client = client

    def __enter__(self) -> Self:
        resumption = routes.once(self._resumption)
        try:
            self._begin(self._client._send(resumption))
        except AgentStateError:
            raise
        except BaseException:
            self._withdraw_apart(resumption)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        suspension = self._ending(error)
        try:
            try:
                self.suspended = self._client._send(suspension)
            except ToolInFlight:
                suspension = self._suspension(self.lease, "tool_wait")
                self.suspended = self._client._send(suspension)
                raise
        except AgentStateError as failure:
            self._not_suspended(failure, error)
        except BaseException:
            self._suspend_apart(suspension)
            raise

    def append(self, *entries: dict[str, Any]) -> AppendedEntries:
        """Append entries, all or none; they are stored once this returns. Raises LeaseLost, InvalidEntry."""
        return self._client._send(routes.append(self.session_id, self.lease, entries))

    def tool(
        self,
        call_id: str,
        name: str,
        arguments: Any = None,
        *,
        run: Callable[[], Any],
        expected_s: float | None = None,
    ) -> ToolCall:
        """Run a tool once: claim the call, ``run`` it, and report its output. Its ``result`` has the output.

        ``expected_s`` is how long it is expected to take. If the call has a result already, nothing is run. What
        ``run`` raises is reported as the call's error, and raised. Raises ToolCallClaimed, ToolCallUnknown,
        ToolCallReused, LeaseLost.
        """
        call = self._client._send(self._claim(call_id, name, arguments, expected_s))
        if call.state is not ToolCallState.CLAIMED:
            return call
        try:
            output = run()
        except Exception as error:
            try:
                self._client._send(self._finish(call_id, error=_shown(error)))
            except AgentStateError as failure:
                error.add_note(f"and that could not be reported: {failure}")
            raise
        return _with_output(self._client._send(self._finish(call_id, output=output)), output)

    def wait_durable(self, *, timeout_s: float = 60.0) -> StoredKv:
        """After the block: wait for the flush, and return what is stored of the session. Raises TimeoutError."""
        suspended = self._outcome()
        if suspended.operation is None or suspended.kv.state is not KvState.PENDING:
            return suspended.kv
        return _settled(suspended, self._client.wait_operation(suspended.operation, timeout_s=timeout_s))


class AsyncTurn(_Turn):
    """`Turn`, with ``async with`` and awaited methods.

    A tool may block the event loop: a thread renews the lease. If the task is cancelled while the turn begins or ends,
    the cancellation proceeds at once, and a thread suspends the session soon after; the process waits for that thread
    at exit.
    """

    def __init__(self, client: AsyncSender, session_id: str, **options: Unpack[TurnOptions]):
        super().__init__(client, session_id, **options)
        self._client = client

    async def __aenter__(self) -> Self:
        resumption = routes.once(self._resumption)
        try:
            self._begin(await self._client._send(resumption))
        except AgentStateError:
            raise
        except BaseException:
            self._withdraw_apart(resumption)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        suspension = self._ending(error)
        if isinstance(error, GeneratorExit):  # nothing runs this coroutine any more, so it cannot await
            self._suspend_apart(suspension)
            return
        try:
            try:
                self.suspended = await self._client._send(suspension)
            except ToolInFlight:
                suspension = self._suspension(self.lease, "tool_wait")
                self.suspended = await self._client._send(suspension)
                raise
        except AgentStateError as failure:
            self._not_suspended(failure, error)
        except BaseException:
            self._suspend_apart(suspension)
            raise

    async def append(self, *entries: dict[str, Any]) -> AppendedEntries:
        """Append entries, all or none; they are stored once this returns. Raises LeaseLost, InvalidEntry."""
        return await self._client._send(routes.append(self.session_id, self.lease, entries))

    async def tool(
        self,
        call_id: str,
        name: str,
        arguments: Any = None,
        *,
        run: Callable[[], Any],
        expected_s: float | None = None,
    ) -> ToolCall:
        """Run a tool once, as `Turn.tool` does; what ``run`` returns is awaited if it can be."""
        call = await self._client._send(self._claim(call_id, name, arguments, expected_s))
        if call.state is not ToolCallState.CLAIMED:
            return call
        try:
            output = run()
            if inspect.isawaitable(output):
                output = await output
        except Exception as error:
            try:
                await self._client._send(self._finish(call_id, error=_shown(error)))
            except AgentStateError as failure:
                error.add_note(f"and that could not be reported: {failure}")
            raise
        return _with_output(await self._client._send(self._finish(call_id, output=output)), output)

    async def wait_durable(self, *, timeout_s: float = 60.0) -> StoredKv:
        """After the block: wait for the flush, and return what is stored of the session. Raises TimeoutError."""
        suspended = self._outcome()
        if suspended.operation is None or suspended.kv.state is not KvState.PENDING:
            return suspended.kv
        return _settled(suspended, await self._client.wait_operation(suspended.operation, timeout_s=timeout_s))
