"""The Python client of the HTTP API: one method a route, answers as typed objects, errors as this package's own.

::

    with Client("http://127.0.0.1:8700") as client:
        session = client.create_session("smollm2")
        turn = client.resume(session.id)
        client.append(session.id, turn.lease, [message({"role": "user", "content": "Hello"})])
        ...                                        # call the engine at turn.engine.base_url
        client.suspend(session.id, turn.lease)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel

from agentstate.answers import AppendedEntries, EntryList, Lease, Operation, Resumed, Session, Suspended
from agentstate.errors import (
    AgentStateError,
    RequestRefused,
    ServiceUnreachable,
    SessionBusy,
    SessionError,
)
from agentstate.models import EntryKind, OperationState

Answer = TypeVar("Answer", bound=BaseModel)

POLL_S = 0.1


def message(payload: dict[str, Any]) -> dict[str, Any]:
    """An entry to append: a message of the conversation, in whatever form the caller keeps them."""
    return {"kind": EntryKind.MESSAGE, "payload": payload}


def tool_call(call_id: str, name: str, arguments: Any = None, *, expected_s: float | None = None) -> dict[str, Any]:
    """An entry to append **before** the tool runs: the claim that it is about to."""
    payload = {"name": name, "arguments": arguments}
    if expected_s is not None:
        payload["expected_s"] = expected_s
    return {"kind": EntryKind.TOOL_CALL, "call_id": call_id, "payload": payload}


def tool_output(call_id: str, output: Any) -> dict[str, Any]:
    """An entry to append: what a tool call gave."""
    return {"kind": EntryKind.TOOL_RESULT, "call_id": call_id, "payload": {"output": output}}


def tool_error(call_id: str, error: Any) -> dict[str, Any]:
    """An entry to append: why a tool call failed."""
    return {"kind": EntryKind.TOOL_RESULT, "call_id": call_id, "payload": {"error": error}}


class Client:
    """A connection to one service, thread-safe; use it as a context manager or `close` it.

    Every method may raise ServiceUnreachable (no answer within ``timeout_s``: the request may have been carried out
    all the same), RequestRefused (the request itself is malformed), DatabaseError, and what it names below. Nothing
    is retried.
    """

    def __init__(self, base_url: str, *, timeout_s: float = 10.0):
        self._timeout_s = timeout_s
        self._http = httpx.Client(base_url=base_url, timeout=timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def create_session(
        self,
        model: str,
        *,
        id: str | None = None,
        metadata: dict[str, Any] | None = None,
        cache_salt: str | None = None,
        extra_key: str | None = None,
        expires_in_s: float | None = None,
    ) -> Session:
        """Raises SessionExists when the caller's own ``id`` is taken."""
        body = {
            "model": model,
            "id": id,
            "metadata": metadata or {},
            "cache_salt": cache_salt,
            "extra_key": extra_key,
            "expires_in_s": expires_in_s,
        }
        return self._call(Session, "POST", "/v1/sessions", json=body)

    def read(self, session_id: str) -> Session:
        """Raises SessionNotFound, SessionExpired."""
        return self._call(Session, "GET", _path(session_id))

    def entries(self, session_id: str, *, after: str | None = None, limit: int = 100, order: str = "asc") -> EntryList:
        """One page; go on with ``after=page.last_id`` while it ``has_more``. Raises EntryNotFound."""
        params = {"limit": str(limit), "order": order, **({} if after is None else {"after": after})}
        return self._call(EntryList, "GET", _path(session_id, "entries"), params=params)

    def append(self, session_id: str, lease: Lease, entries: Sequence[dict[str, Any]]) -> AppendedEntries:
        """Append all of them or none: made by `message`, `tool_call`, `tool_output`, `tool_error`, or by hand.

        Raises LeaseLost, InvalidEntry.
        """
        body = {"lease": _key(lease), "entries": list(entries)}
        return self._call(AppendedEntries, "POST", _path(session_id, "entries"), json=body)

    def resume(
        self,
        session_id: str,
        *,
        lease_ttl_s: float | None = None,
        tail: int = 50,
        expect_model: str | None = None,
    ) -> Resumed:
        """Take the session's lease. Raises SessionBusy, ModelMismatch."""
        body: dict[str, Any] = {"tail": tail, "lease_ttl_s": lease_ttl_s}
        if expect_model is not None:
            body["expect"] = {"model": expect_model}
        return self._call(Resumed, "POST", _path(session_id, "resume"), json=body)

    def renew(self, session_id: str, lease: Lease, *, lease_ttl_s: float | None = None) -> Lease:
        """Raises LeaseLost."""
        body = {"lease": _key(lease), "lease_ttl_s": lease_ttl_s}
        return self._call(Lease, "POST", _path(session_id, "lease", "renew"), json=body)

    def suspend(
        self,
        session_id: str,
        lease: Lease,
        *,
        reason: str = "user_wait",
        durable_timeout_ms: int = 500,
        expires_in_s: float | None = None,
    ) -> Suspended:
        """End the turn. Raises LeaseLost, ToolInFlight."""
        body = {
            "lease": _key(lease),
            "reason": reason,
            "durable_timeout_ms": durable_timeout_ms,
            "expires_in_s": expires_in_s,
        }
        timeout_s = self._timeout_s + durable_timeout_ms / 1000
        return self._call(Suspended, "POST", _path(session_id, "suspend"), json=body, timeout=timeout_s)

    def operation(self, operation_id: str) -> Operation:
        """Raises OperationNotFound."""
        return self._call(Operation, "GET", f"/v1/operations/{quote(operation_id, safe='')}")

    def wait_operation(self, operation_id: str, *, timeout_s: float) -> Operation:
        """Poll until the operation is ``done`` or ``failed``. Raises TimeoutError; the operation then goes on."""
        deadline = time.monotonic() + timeout_s
        while True:
            operation = self.operation(operation_id)
            if operation.state in (OperationState.DONE, OperationState.FAILED):
                return operation
            if time.monotonic() >= deadline:
                raise TimeoutError(f"operation {operation_id} is still {operation.state} after {timeout_s:g} s")
            time.sleep(POLL_S)

    def _call(self, answer: type[Answer], method: str, path: str, **request: Any) -> Answer:
        try:
            response = self._http.request(method, path, **request)
        except httpx.TransportError as error:
            raise ServiceUnreachable(
                f"the AgentState service at {self._http.base_url} did not answer {method} {path}: {error}"
            ) from error
        if response.is_success:
            return answer.model_validate_json(response.content)
        raise _error(response)


def _path(session_id: str, *parts: str) -> str:
    return "/".join(("/v1/sessions", quote(session_id, safe=""), *parts))


def _key(lease: Lease) -> dict[str, Any]:
    return {"token": lease.token, "epoch": lease.epoch}


def _error(response: httpx.Response) -> AgentStateError:
    """The error that a problem+json answer stands for, by its type; RequestRefused for any other answer."""
    try:
        problem = response.json()
        slug = problem["type"].rpartition("/")[2]
        detail = problem["detail"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return RequestRefused(f"HTTP {response.status_code}: {response.text[:200]}", status=response.status_code)
    kind = next((kind for kind in _tree(AgentStateError) if kind.slug() == slug), None)
    revision = problem.get("revision")
    if kind is None or kind is RequestRefused:
        return RequestRefused(f"{slug}: {detail}", status=response.status_code)
    if issubclass(kind, SessionError):
        known = {"revision": None if revision is None else int(revision)}
        if issubclass(kind, SessionBusy):
            return kind(detail, retry_after_s=float(problem.get("retry_after_s", 1)), **known)
        return kind(detail, **known)
    return kind(detail)


def _tree(root: type[AgentStateError]) -> Iterator[type[AgentStateError]]:
    yield root
    for kind in root.__subclasses__():
        yield from _tree(kind)
