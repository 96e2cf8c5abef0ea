"""The routes of the HTTP API, described once for both clients.

A function here is what a method of `Client` and `AsyncClient` is made of: its parameters and its docstring are the
method's, and what it returns says what to send, what comes back and when sending it again is harmless.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel

from agentstate.answers import AppendedEntries, EngineList, EntryList, Lease, Operation, Resumed, Session, Suspended

A = TypeVar("A")
M = TypeVar("M", bound=BaseModel)


class Repeat(Enum):
    """Whether a request whose answer was lost may be sent again."""

    READ = "it changes nothing"
    KEYED = "it carries an Idempotency-Key: the service carries it out once"
    NEVER = "it could be carried out twice, or fail because it was carried out"


@dataclass(frozen=True)
class Call(Generic[A]):
    """One request and how to read its answer. The service may take ``wait_s`` longer than usual."""

    parse: Callable[[httpx.Response], A]
    method: str
    path: str
    repeat: Repeat
    params: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    wait_s: float = 0.0


def create_session(
    model: str,
    *,
    id: str | None = None,
    metadata: dict[str, Any] | None = None,
    cache_salt: str | None = None,
    extra_key: str | None = None,
    expires_in_s: float | None = None,
) -> Call[Session]:
    """Create a session. Raises SessionExists when the caller's own ``id`` is taken."""
    body = {
        "model": model,
        "id": id,
        "metadata": metadata or {},
        "cache_salt": cache_salt,
        "extra_key": extra_key,
        "expires_in_s": expires_in_s,
    }
    return _post(Session, "/v1/sessions", body)


def read(session_id: str) -> Call[Session]:
    """A session without its entries. Raises SessionNotFound, SessionExpired."""
    return _get(Session, _session(session_id))


def entries(session_id: str, *, after: str | None = None, limit: int = 100, order: str = "asc") -> Call[EntryList]:
    """One page; go on with ``after=page.last_id`` while it ``has_more``. Raises EntryNotFound."""
    return _get(EntryList, _session(session_id, "entries"), _page(after, limit, order))


def append(session_id: str, lease: Lease, entries: Sequence[dict[str, Any]]) -> Call[AppendedEntries]:
    """Append all of them or none: made by `message`, `tool_call`, `tool_output`, `tool_error`, `note`, or by hand.

    Raises LeaseLost, InvalidEntry.
    """
    return _post(AppendedEntries, _session(session_id, "entries"), {"lease": _proof(lease), "entries": list(entries)})


def resume(
    session_id: str, *, lease_ttl_s: float | None = None, tail: int = 50, expect_model: str | None = None
) -> Call[Resumed]:
    """Take the session's lease, and get back what its next turn needs. Raises SessionBusy, ModelMismatch."""
    body: dict[str, Any] = {"tail": tail, "lease_ttl_s": lease_ttl_s}
    if expect_model is not None:
        body["expect"] = {"model": expect_model}
    return _post(Resumed, _session(session_id, "resume"), body)


def renew(session_id: str, lease: Lease, *, lease_ttl_s: float | None = None) -> Call[Lease]:
    """Let the lease lapse ``lease_ttl_s`` from now instead of when it would have. Raises LeaseLost."""
    body = {"lease": _proof(lease), "lease_ttl_s": lease_ttl_s}
    return _post(Lease, _session(session_id, "lease", "renew"), body)


def suspend(
    session_id: str,
    lease: Lease,
    *,
    reason: str = "user_wait",
    durable_timeout_ms: int = 500,
    expires_in_s: float | None = None,
) -> Call[Suspended]:
    """End the turn. Waits up to ``durable_timeout_ms`` for the KV to be durable. Raises LeaseLost, ToolInFlight."""
    body = {
        "lease": _proof(lease),
        "reason": reason,
        "durable_timeout_ms": durable_timeout_ms,
        "expires_in_s": expires_in_s,
    }
    return _post(Suspended, _session(session_id, "suspend"), body, wait_s=durable_timeout_ms / 1000)


def rewind(session_id: str, at: str, *, revision: str, lease: Lease | None = None) -> Call[Session]:
    """Make the entry ``at`` the head again: what came after it is taken back.

    ``revision`` is the one that the caller has seen; the ``lease`` is needed while the session is being run. Raises
    EntryNotFound, RequestRefused.
    """
    body = {"at": at, "lease": None if lease is None else _proof(lease)}
    headers = {"If-Match": f'"{revision}"'}
    return Call(_model(Session), "POST", _session(session_id, "rewind"), Repeat.KEYED, body=body, headers=headers)


def operation(operation_id: str) -> Call[Operation]:
    """How an operation stands. Raises OperationNotFound."""
    return _get(Operation, f"/v1/operations/{_part(operation_id)}")


def engines() -> Call[EngineList]:
    """The engine ranks that have registered, and which of them are live."""
    return _get(EngineList, "/v1/engines")


def _get(answer: type[M], path: str, params: dict[str, str] | None = None) -> Call[M]:
    return Call(_model(answer), "GET", path, Repeat.READ, params=params or {})


def _post(answer: type[M], path: str, body: dict[str, Any], *, wait_s: float = 0.0) -> Call[M]:
    return Call(_model(answer), "POST", path, Repeat.KEYED, body=body, wait_s=wait_s)


def _model(answer: type[M]) -> Callable[[httpx.Response], M]:
    return lambda response: answer.model_validate_json(response.content)


def _session(session_id: str, *parts: str) -> str:
    return "/".join(("/v1/sessions", _part(session_id), *parts))


def _part(name: str) -> str:
    return quote(name, safe="")


def _page(after: str | None, limit: int, order: str) -> dict[str, str]:
    return {"limit": str(limit), "order": order, **({} if after is None else {"after": after})}


def _proof(lease: Lease) -> dict[str, Any]:
    return {"token": lease.token, "epoch": lease.epoch}
