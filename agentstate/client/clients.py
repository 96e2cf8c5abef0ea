"""The two clients. Their methods are the functions of ``routes``, called directly or awaited."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypedDict, TypeVar, Unpack

import httpx

from agentstate.answers import Operation, Session
from agentstate.client import routes
from agentstate.client.events import Event, Following
from agentstate.client.routes import Call
from agentstate.client.transport import Attempt, exchange, settings_of
from agentstate.client.turn import AsyncTurn, Turn, TurnOptions
from agentstate.errors import AgentStateError, NotAgentState, SessionExists
from agentstate.sql.models import OperationState

A = TypeVar("A")
P = ParamSpec("P")

POLL_S = 0.1
UNBOUNDED = httpx.Limits(max_connections=None, max_keepalive_connections=20, keepalive_expiry=30.0)


class SessionOptions(TypedDict, total=False):
    """Options of `create_session` besides the model and the id."""

    metadata: dict[str, Any] | None
    cache_salt: str | None
    extra_key: str | None
    expires_in_s: float | None


class _Connection:
    """Connection settings that both clients share."""

    def __init__(self, base_url: str, *, api_key: str | None = None, timeout_s: float = 10.0, retries: int = 2):
        self._base_url = base_url
        self._api_key = api_key
        self._timeout_s = timeout_s
        self._retries = retries
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}

    def _exchange(self, call: Call[A]) -> Generator[Attempt, httpx.Response | httpx.TransportError, A]:
        return exchange(call, where=self._base_url, timeout_s=self._timeout_s, retries=self._retries)

    def _apart(self) -> Client:
        return Client(self._base_url, api_key=self._api_key, timeout_s=self._timeout_s, retries=self._retries)


def _now(route: Callable[P, Call[A]]) -> Callable[Concatenate[Client, P], A]:
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> A:
        return self._send(route(*args, **kwargs))

    _present(method, route)
    return method


def _awaited(route: Callable[P, Call[A]]) -> Callable[Concatenate[AsyncClient, P], Awaitable[A]]:
    async def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> A:
        return await self._send(route(*args, **kwargs))

    _present(method, route)
    return method


def _present(method: Any, route: Callable[..., Call[Any]]) -> None:
    """Make a method look like its route in `help` and in editors."""
    method.__name__, method.__qualname__, method.__doc__ = route.__name__, route.__name__, route.__doc__
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    method.__signature__ = inspect.Signature([own, *inspect.signature(route).parameters.values()])


class Client(_Connection):
    """A connection to one service, thread-safe; use it as a context manager or `close` it.

    ``api_key`` is sent as a bearer token. Every method may raise ServiceUnreachable (no answer within ``timeout_s``;
    the service may still have carried out the request), NotAgentState (something else answers at ``base_url``),
    RequestRefused (the request itself is malformed), DatabaseError, and the errors that it names. The client retries a
    request that failed in transit up to ``retries`` times if that cannot carry it out twice: all but `update` and
    `delete`, which carry no Idempotency-Key.
    """

    def __init__(self, base_url: str, *, api_key: str | None = None, timeout_s: float = 10.0, retries: int = 2):
        super().__init__(base_url, api_key=api_key, timeout_s=timeout_s, retries=retries)
        self._http = httpx.Client(headers=self._headers, **settings_of(base_url))
        self._lock = threading.Lock()
        self._following: httpx.Client | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            if self._following is not None:
                self._following.close()
        self._http.close()

    @property
    def _streams(self) -> httpx.Client:
        # A separate, unbounded pool: a follower holds a connection for as long as the session lives.
        with self._lock:
            if self._following is None:
                self._following = httpx.Client(headers=self._headers, **settings_of(self._base_url, UNBOUNDED))
            return self._following

    def _blocking(self) -> Client:
        return self

    create_session = _now(routes.create_session)
    list_sessions = _now(routes.list_sessions)
    read = _now(routes.read)
    update = _now(routes.update)
    delete = _now(routes.delete)
    entries = _now(routes.entries)
    append = _now(routes.append)
    resume = _now(routes.resume)
    renew = _now(routes.renew)
    suspend = _now(routes.suspend)
    fork = _now(routes.fork)
    rewind = _now(routes.rewind)
    prefetch = _now(routes.prefetch)
    demote = _now(routes.demote)
    kv = _now(routes.kv)
    pin = _now(routes.pin)
    unpin = _now(routes.unpin)
    activity = _now(routes.activity)
    claim_tool_call = _now(routes.claim_tool_call)
    finish_tool_call = _now(routes.finish_tool_call)
    operation = _now(routes.operation)
    engines = _now(routes.engines)
    overview = _now(routes.overview)
    session_overviews = _now(routes.session_overviews)
    decisions = _now(routes.decisions)

    def ensure_session(self, session_id: str, model: str, **options: Unpack[SessionOptions]) -> Session:
        """The session of that id, created with ``model`` and `create_session`'s options if there is none."""
        try:
            return self.create_session(model, id=session_id, **options)
        except SessionExists:
            return self.read(session_id)

    def turn(self, session_id: str, **options: Unpack[TurnOptions]) -> Turn:
        """A block in which this process runs the session: see `Turn`."""
        return Turn(self, session_id, **options)

    def events(self, session_id: str, *, after: int = 0) -> Iterator[Event]:
        """Follow a session: every entry after the seq ``after``, once and in order; the session's state after a change;
        and `Rewound` when delivered entries were taken back. Ends when the session does.

        Reconnects after a failure, however long the service or its database is away. Every follower has its own
        connection. Raises SessionNotFound, SessionExpired, and EventsTrimmed if the session never had an entry
        ``after``.
        """
        following = Following(after)
        while not following.ended:
            try:
                response = self._send(routes.events(session_id, following.seq), stream=True)
            except AgentStateError as error:
                time.sleep(following.pause_s(error))
                continue
            following.begin()
            try:
                for chunk in response.iter_bytes():
                    yield from following.take(chunk)
            except httpx.TransportError:
                pass
            finally:
                response.close()
            if not following.ended:
                time.sleep(POLL_S)

    def wait_operation(self, operation_id: str, *, timeout_s: float) -> Operation:
        """Poll until the operation is ``done`` or ``failed``. Raises TimeoutError; the operation then continues."""
        deadline = time.monotonic() + timeout_s
        while not _ended(operation := self.operation(operation_id)):
            _check(operation, timeout_s, deadline)
            time.sleep(POLL_S)
        return operation

    def _send(self, call: Call[A], *, stream: bool = False) -> A:
        steps = self._exchange(call)
        attempt = next(steps)
        while True:
            if attempt.wait_s:
                time.sleep(attempt.wait_s)
            outcome: httpx.Response | httpx.TransportError
            try:
                http = self._streams if stream else self._http
                outcome = http.send(http.build_request(**attempt.request), stream=stream)
                if not outcome.is_success:
                    outcome.read()
            except httpx.TransportError as error:
                outcome = error
            try:
                attempt = steps.send(outcome)
            except StopIteration as end:
                answer: A = end.value
                return answer
            except NotAgentState:
                assert isinstance(outcome, httpx.Response)
                outcome.close()  # it may be a stream
                raise


class AsyncClient(_Connection):
    """`Client`, awaited; for one event loop."""

    def __init__(self, base_url: str, *, api_key: str | None = None, timeout_s: float = 10.0, retries: int = 2):
        super().__init__(base_url, api_key=api_key, timeout_s=timeout_s, retries=retries)
        self._http = httpx.AsyncClient(headers=self._headers, **settings_of(base_url))
        self._lock = threading.Lock()
        self._following: httpx.AsyncClient | None = None
        self._renewing: Client | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        with self._lock:
            following, renewing = self._following, self._renewing
        if renewing is not None:
            renewing.close()
        if following is not None:
            await following.aclose()
        await self._http.aclose()

    @property
    def _streams(self) -> httpx.AsyncClient:
        with self._lock:
            if self._following is None:
                self._following = httpx.AsyncClient(headers=self._headers, **settings_of(self._base_url, UNBOUNDED))
            return self._following

    def _blocking(self) -> Client:
        with self._lock:
            if self._renewing is None:
                self._renewing = self._apart()
            return self._renewing

    create_session = _awaited(routes.create_session)
    list_sessions = _awaited(routes.list_sessions)
    read = _awaited(routes.read)
    update = _awaited(routes.update)
    delete = _awaited(routes.delete)
    entries = _awaited(routes.entries)
    append = _awaited(routes.append)
    resume = _awaited(routes.resume)
    renew = _awaited(routes.renew)
    suspend = _awaited(routes.suspend)
    fork = _awaited(routes.fork)
    rewind = _awaited(routes.rewind)
    prefetch = _awaited(routes.prefetch)
    demote = _awaited(routes.demote)
    kv = _awaited(routes.kv)
    pin = _awaited(routes.pin)
    unpin = _awaited(routes.unpin)
    activity = _awaited(routes.activity)
    claim_tool_call = _awaited(routes.claim_tool_call)
    finish_tool_call = _awaited(routes.finish_tool_call)
    operation = _awaited(routes.operation)
    engines = _awaited(routes.engines)
    overview = _awaited(routes.overview)
    session_overviews = _awaited(routes.session_overviews)
    decisions = _awaited(routes.decisions)

    async def ensure_session(self, session_id: str, model: str, **options: Unpack[SessionOptions]) -> Session:
        """The session of that id, created with ``model`` and `create_session`'s options if there is none."""
        try:
            return await self.create_session(model, id=session_id, **options)
        except SessionExists:
            return await self.read(session_id)

    def turn(self, session_id: str, **options: Unpack[TurnOptions]) -> AsyncTurn:
        """A block in which this process runs the session: see `AsyncTurn`."""
        return AsyncTurn(self, session_id, **options)

    async def events(self, session_id: str, *, after: int = 0) -> AsyncIterator[Event]:
        """Follow a session: every entry after the seq ``after``, once and in order; the session's state after a change;
        and `Rewound` when delivered entries were taken back. Ends when the session does.

        Reconnects after a failure, however long the service or its database is away. Every follower has its own
        connection. Raises SessionNotFound, SessionExpired, and EventsTrimmed if the session never had an entry
        ``after``.
        """
        following = Following(after)
        while not following.ended:
            try:
                response = await self._send(routes.events(session_id, following.seq), stream=True)
            except AgentStateError as error:
                await asyncio.sleep(following.pause_s(error))
                continue
            following.begin()
            try:
                async for chunk in response.aiter_bytes():
                    for event in following.take(chunk):
                        yield event
            except httpx.TransportError:
                pass
            finally:
                await response.aclose()
            if not following.ended:
                await asyncio.sleep(POLL_S)

    async def wait_operation(self, operation_id: str, *, timeout_s: float) -> Operation:
        """Poll until the operation is ``done`` or ``failed``. Raises TimeoutError; the operation then continues."""
        deadline = time.monotonic() + timeout_s
        while not _ended(operation := await self.operation(operation_id)):
            _check(operation, timeout_s, deadline)
            await asyncio.sleep(POLL_S)
        return operation

    async def _send(self, call: Call[A], *, stream: bool = False) -> A:
        steps = self._exchange(call)
        attempt = next(steps)
        while True:
            if attempt.wait_s:
                await asyncio.sleep(attempt.wait_s)
            outcome: httpx.Response | httpx.TransportError
            try:
                http = self._streams if stream else self._http
                outcome = await http.send(http.build_request(**attempt.request), stream=stream)
                if not outcome.is_success:
                    await outcome.aread()
            except httpx.TransportError as error:
                outcome = error
            try:
                attempt = steps.send(outcome)
            except StopIteration as end:
                answer: A = end.value
                return answer
            except NotAgentState:
                assert isinstance(outcome, httpx.Response)
                await outcome.aclose()  # it may be a stream
                raise


def _ended(operation: Operation) -> bool:
    return operation.state in (OperationState.DONE, OperationState.FAILED)


def _check(operation: Operation, timeout_s: float, deadline: float) -> None:
    if time.monotonic() >= deadline:
        raise TimeoutError(f"operation {operation.id} is still {operation.state} after {timeout_s:g} s")
