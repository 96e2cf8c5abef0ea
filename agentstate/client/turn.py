"""A turn: the stretch in which one process runs a session.

It begins with a resume and ends with a suspend, whatever happens in between; meanwhile the lease is renewed in the
background, so that a model call or a tool may take as long as it takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from types import TracebackType
from typing import Any, Protocol, Self, TypedDict, TypeVar, Unpack

from pydantic import ValidationError

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
)
from agentstate.client import routes
from agentstate.client.routes import Call
from agentstate.errors import AgentStateError, EngineUnreachable, LeaseLost
from agentstate.fleet.manifests import KvState

RENEWALS_PER_TTL = 3

A = TypeVar("A")


class Sender(Protocol):
    """What a turn needs of a client."""

    def _send(self, call: Call[A]) -> A: ...

    def wait_operation(self, operation_id: str, *, timeout_s: float) -> Operation: ...


class AsyncSender(Protocol):
    """What an asynchronous turn needs of a client."""

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


class _Turn:
    """What a turn is, however its requests are sent."""

    def __init__(
        self,
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
    ):
        self.session_id = session_id
        #: Why the turn ends: ``user_wait``, ``tool_wait`` or ``done``. May be set in the block.
        self.reason = reason
        #: What the suspend at the end of the block answered; None before.
        self.suspended: Suspended | None = None
        #: Whether the lease is known to be lost: another one may run the session, and nothing can be appended.
        self.lease_lost = False
        self._lease_ttl_s = lease_ttl_s
        self._kv_after = kv
        self._durable_timeout_ms = durable_timeout_ms
        self._resumption = routes.resume(
            session_id,
            lease_ttl_s=lease_ttl_s,
            tail=tail,
            expect_model=expect_model,
            busy_timeout_s=busy_timeout_s,
            prefetch=prefetch,
        )
        self._resumed: Resumed | None = None

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
        """Calls without a result as of the resume: another process claimed them, and they may have run or not."""
        return self.resumed.pending_tool_calls

    @property
    def kv(self) -> Outlook:
        """What of the session's KV can be restored, as of the resume."""
        return self.resumed.kv

    @property
    def base_url(self) -> str:
        """Where the engine's OpenAI API is. Raises EngineUnreachable when no live engine serves the model."""
        return self._engine.base_url

    @property
    def extra_body(self) -> dict[str, str]:
        """For every model call of the turn: an OpenAI client's ``extra_body``. Raises EngineUnreachable."""
        return self._engine.extra_body

    @property
    def _engine(self) -> EngineLink:
        if self.resumed.engine is None:
            raise EngineUnreachable(
                f"no live engine serves {self.session.model!r}, the model of session {self.session_id}: "
                "start one with `agentstate engine`, and resume the session again"
            )
        return self.resumed.engine

    def _renewal(self) -> Call[Lease]:
        return routes.renew(self.session_id, self.lease, lease_ttl_s=self._lease_ttl_s)

    def _suspension(self, error: BaseException | None) -> Call[Suspended]:
        # A turn that broke off is not done, whatever it meant to be.
        reason = self.reason if error is None else "user_wait"
        return routes.suspend(
            self.session_id, self.lease, reason=reason, kv=self._kv_after, durable_timeout_ms=self._durable_timeout_ms
        )

    def _not_suspended(self, failure: AgentStateError, error: BaseException | None) -> None:
        if error is None:
            raise failure
        error.add_note(f"and session {self.session_id} could not be suspended: {failure}")

    def _outcome(self) -> Suspended:
        if self.suspended is None:
            raise RuntimeError(f"the turn of session {self.session_id} has not ended by a suspend")
        return self.suspended


def _settled(suspended: Suspended, operation: Operation) -> StoredKv:
    """What an ended flush says is stored; ``unknown`` where it failed."""
    try:
        return StoredKv.model_validate(operation.result)
    except ValidationError:
        return suspended.kv.model_copy(update={"state": KvState.UNKNOWN})


class Turn(_Turn):
    """A block in which this process runs a session::

        with client.turn(session.id) as turn:
            reply = llm.chat.completions.create(..., extra_body=turn.extra_body)
            turn.append(message({"role": "assistant", "content": reply.choices[0].message.content}))

    Entering it raises what `Client.resume` does. At its end the session is suspended, with ``reason``, also when the
    block raises; an error of that suspend is raised, or noted on the block's own exception. The lease lapses
    ``lease_ttl_s`` after this process has vanished.
    """

    def __init__(self, client: Sender, session_id: str, **options: Unpack[TurnOptions]):
        super().__init__(session_id, **options)
        self._client = client
        self._ending = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name=f"agentstate-lease-{session_id}", daemon=True)

    def __enter__(self) -> Self:
        self._resumed = self._client._send(self._resumption)
        self._keeper.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._keeper.join()
        try:
            self.suspended = self._client._send(self._suspension(error))
        except AgentStateError as failure:
            self._not_suspended(failure, error)

    def append(self, *entries: dict[str, Any]) -> AppendedEntries:
        """Append all of them or none; they are kept once this returns. Raises LeaseLost, InvalidEntry."""
        return self._client._send(routes.append(self.session_id, self.lease, entries))

    def wait_durable(self, *, timeout_s: float = 60.0) -> StoredKv:
        """After the block: what the engine has stored of the session, once that is settled. Raises TimeoutError."""
        suspended = self._outcome()
        if suspended.operation is None or suspended.kv.state is not KvState.PENDING:
            return suspended.kv
        return _settled(suspended, self._client.wait_operation(suspended.operation, timeout_s=timeout_s))

    def _keep(self) -> None:
        while not self._ending.wait(self._lease_ttl_s / RENEWALS_PER_TTL):
            try:
                self._client._send(self._renewal())
            except LeaseLost:
                self.lease_lost = True
                return
            except AgentStateError:
                continue  # the service may be back before the lease lapses


class AsyncTurn(_Turn):
    """`Turn`, with ``async with`` and awaited methods."""

    def __init__(self, client: AsyncSender, session_id: str, **options: Unpack[TurnOptions]):
        super().__init__(session_id, **options)
        self._client = client
        self._keeper: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._resumed = await self._client._send(self._resumption)
        self._keeper = asyncio.create_task(self._keep(), name=f"agentstate-lease-{self.session_id}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        try:
            self.suspended = await self._client._send(self._suspension(error))
        except AgentStateError as failure:
            self._not_suspended(failure, error)

    async def append(self, *entries: dict[str, Any]) -> AppendedEntries:
        """Append all of them or none; they are kept once this returns. Raises LeaseLost, InvalidEntry."""
        return await self._client._send(routes.append(self.session_id, self.lease, entries))

    async def wait_durable(self, *, timeout_s: float = 60.0) -> StoredKv:
        """After the block: what the engine has stored of the session, once that is settled. Raises TimeoutError."""
        suspended = self._outcome()
        if suspended.operation is None or suspended.kv.state is not KvState.PENDING:
            return suspended.kv
        return _settled(suspended, await self._client.wait_operation(suspended.operation, timeout_s=timeout_s))

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(self._lease_ttl_s / RENEWALS_PER_TTL)
            try:
                await self._client._send(self._renewal())
            except LeaseLost:
                self.lease_lost = True
                return
            except AgentStateError:
                continue  # the service may be back before the lease lapses
