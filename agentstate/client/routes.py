"""The routes of the HTTP API, described once for both clients.

Each function here defines a method of `Client` and `AsyncClient`. The method has its parameters and its docstring; its
result says what to send, how to parse the answer and when a retry is harmless.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from http import HTTPStatus
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel

from agentstate import documents
from agentstate.answers import (
    AppendedEntries,
    DecisionList,
    EngineList,
    EntryList,
    Lease,
    Operation,
    Overview,
    Pinned,
    Placement,
    Resumed,
    Session,
    SessionList,
    SessionOverviewList,
    Signalled,
    Suspended,
    ToolCall,
)

A = TypeVar("A")
M = TypeVar("M", bound=BaseModel)


class Repeat(Enum):
    """Whether a request may be retried after its answer was lost."""

    READ = "it changes nothing"
    KEYED = "it carries an Idempotency-Key: the service carries it out once"
    NEVER = "it could be carried out twice, or fail because it was carried out"


@dataclass(frozen=True)
class Call(Generic[A]):
    """One request and how to parse its answer: ``parse`` raises ValueError for what is none. The service may take
    ``wait_s`` longer than usual."""

    parse: Callable[[httpx.Response], A]
    method: str
    path: str
    repeat: Repeat
    params: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    wait_s: float = 0.0


def once(call: Call[A], **headers: str) -> Call[A]:
    """``call`` with its own Idempotency-Key: however often it is sent, the service carries it out once."""
    return replace(call, headers={"Idempotency-Key": uuid.uuid4().hex, **call.headers, **headers})


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


def list_sessions(*, after: str | None = None, limit: int = 100, order: str = "asc") -> Call[SessionList]:
    """One page of the sessions that have not expired, by id; continue with ``after=page.last_id``."""
    return _get(SessionList, "/v1/sessions", _page(after, limit, order))


def read(session_id: str) -> Call[Session]:
    """A session without its entries. Raises SessionNotFound, SessionExpired."""
    return _get(Session, _session(session_id))


def update(
    session_id: str,
    *,
    revision: str,
    metadata: dict[str, Any] | None = None,
    expires_in_s: float | Literal["keep", "never"] = "keep",
) -> Call[Session]:
    """Change keys of the metadata (None removes a key), and the expiry, in seconds from now.

    ``revision`` is the last one that the caller has seen, or ``*`` for any. Raises RevisionStale.
    """
    body: dict[str, Any] = {} if metadata is None else {"metadata": metadata}
    if expires_in_s != "keep":
        body["expires_in_s"] = None if expires_in_s == "never" else expires_in_s
    return Call(_model(Session), "PATCH", _session(session_id), Repeat.NEVER, body=body, headers=_seen(revision))


def delete(session_id: str, *, revision: str) -> Call[None]:
    """Delete a session; its forks keep what they share with it. Raises RevisionStale, SessionBusy."""
    return Call(_nothing, "DELETE", _session(session_id), Repeat.NEVER, headers=_seen(revision))


def entries(session_id: str, *, after: str | None = None, limit: int = 100, order: str = "asc") -> Call[EntryList]:
    """One page of the transcript; continue with ``after=page.last_id`` while it ``has_more``. Raises EntryNotFound."""
    return _get(EntryList, _session(session_id, "entries"), _page(after, limit, order))


def append(session_id: str, lease: Lease, entries: Sequence[dict[str, Any]]) -> Call[AppendedEntries]:
    """Append entries, all or none. Make them with `message`, `tool_call`, `tool_output`, `tool_error`, `note`, or by
    hand.

    Raises LeaseLost, InvalidEntry.
    """
    return _post(AppendedEntries, _session(session_id, "entries"), {"lease": _proof(lease), "entries": list(entries)})


def resume(
    session_id: str,
    *,
    lease_ttl_s: float | None = None,
    tail: int = 50,
    expect_model: str | None = None,
    revision: str | None = None,
    busy_timeout_s: float = 0.0,
    prefetch: str = "none",
) -> Call[Resumed]:
    """Take the session's lease. Returns what its next turn needs.

    The service waits up to ``busy_timeout_s`` while another process runs the session. ``prefetch`` brings the KV back
    to the engine's ``host`` memory or to the ``device``; the answer does not wait for it. Raises SessionBusy,
    ModelMismatch, and RevisionStale if ``revision`` is not the newest.
    """
    body: dict[str, Any] = {"tail": tail, "lease_ttl_s": lease_ttl_s}
    if expect_model is not None:
        body["expect"] = {"model": expect_model}
    if busy_timeout_s:
        body |= {"on_busy": "wait", "busy_timeout_ms": round(busy_timeout_s * 1000)}
    if prefetch != "none":
        body["prefetch"] = prefetch
    headers = {} if revision is None else _seen(revision)
    return _post(Resumed, _session(session_id, "resume"), body, headers=headers, wait_s=busy_timeout_s)


def renew(session_id: str, lease: Lease, *, lease_ttl_s: float | None = None) -> Call[Lease]:
    """Renew the lease: it now lapses ``lease_ttl_s`` from now. Raises LeaseLost."""
    body = {"lease": _proof(lease), "lease_ttl_s": lease_ttl_s}
    return _post(Lease, _session(session_id, "lease", "renew"), body)


def suspend(
    session_id: str,
    lease: Lease,
    *,
    reason: str = "user_wait",
    kv: str = "retain",
    durable_timeout_ms: int = 500,
    expires_in_s: float | None = None,
    durability: str = "node",
) -> Call[Suspended]:
    """End the turn. Waits up to ``durable_timeout_ms`` for the KV to be durable: on the drive of its ``node``, or with
    the durability ``shared`` all of it in the shared store, from where other nodes restore it.

    ``kv`` decides about the device's copy: ``retain`` it while there is room, ``demote`` it once the KV is durable, or
    ``release`` it and what is stored. Raises LeaseLost, ToolInFlight.
    """
    body = {
        "lease": _proof(lease),
        "reason": reason,
        "kv": kv,
        "durable_timeout_ms": durable_timeout_ms,
        "expires_in_s": expires_in_s,
        # A service of an earlier release knows no other durability, and would refuse the field.
        **({} if durability == "node" else {"durability": durability}),
    }
    return _post(Suspended, _session(session_id, "suspend"), body, wait_s=durable_timeout_ms / 1000)


def fork(
    session_id: str,
    *,
    revision: str,
    at: str | None = None,
    id: str | None = None,
    metadata: dict[str, Any] | None = None,
    expires_in_s: float | None = None,
) -> Call[Session]:
    """Create a session that shares this one's history, and KV, up to the entry ``at`` (default: all of it).

    It inherits the parent's metadata unless some is given. Raises RevisionStale, EntryNotFound, NotABranchPoint,
    SessionExists.
    """
    body = {"at": at, "id": id, "metadata": metadata, "expires_in_s": expires_in_s}
    return _post(Session, _session(session_id, "forks"), body, headers=_seen(revision))


def rewind(session_id: str, at: str | None, *, revision: str, lease: Lease | None = None) -> Call[Session]:
    """Make the entry ``at`` the head again, and take back the entries after it (None: all entries).

    Needs the ``lease`` while a turn is running. Raises RevisionStale, EntryNotFound, NotABranchPoint, SessionBusy,
    ToolInFlight.
    """
    body: dict[str, Any] = {"at": at, **_held(lease)}
    return _post(Session, _session(session_id, "rewind"), body, headers=_seen(revision))


def prefetch(
    session_id: str, *, tier: str = "host", due_s: float | None = None, deadline_s: float | None = None
) -> Call[Operation]:
    """Bring the session's KV back to the engine's ``host`` memory or to the ``device``, before a request needs it.

    It is needed ``due_s`` from now, by default at once: what is needed sooner is read before it. It fails after
    ``deadline_s``, when it is no longer useful. The operation is already done if the KV is there.
    """
    times = {"due_ms": due_s, "deadline_ms": deadline_s}
    body = {"tier": tier, **{name: round(s * 1000) for name, s in times.items() if s is not None}}
    return _post(Operation, _session(session_id, "prefetch"), body)


def demote(session_id: str) -> Call[Operation]:
    """Make the session's KV the first to leave the device. It stays where it is stored."""
    return _post(Operation, _session(session_id, "kv", "demote"), {})


def kv(session_id: str) -> Call[Placement]:
    """Where the session's KV is, what it waits for, and what would move it."""
    return Call(_model(Placement), "GET", _session(session_id, "kv"), Repeat.READ)


def pin(session_id: str, *, ttl_s: float, tier: str = "device") -> Call[Pinned]:
    """Let the session's KV stay on a tier, ``device``, ``host`` or ``nvme``, for so many seconds, in place of its pin
    before. It refuses nothing: what is pinned leaves last. Raises RateLimited."""
    body = {"tier": tier, "ttl_s": ttl_s}
    return Call(_model(Pinned), "POST", _session(session_id, "kv", "pin"), Repeat.READ, body=body)


def unpin(session_id: str) -> Call[None]:
    """End the session's pin, if it has one. Raises RateLimited."""
    return Call(_nothing, "DELETE", _session(session_id, "kv", "pin"), Repeat.READ)


def activity(session_id: str, kind: str) -> Call[Signalled]:
    """Say what a person does who is going to go on with the session: ``typing``, or ``opened``. Its KV is brought back
    meanwhile, where the engine has room. Raises RateLimited.
    """
    path = _session(session_id, "activity")
    return Call(_model(Signalled), "POST", path, Repeat.READ, body={"kind": kind})


def claim_tool_call(
    session_id: str,
    call_id: str,
    name: str,
    arguments: Any = None,
    *,
    expected_s: float | None = None,
    lease: Lease | None = None,
) -> Call[ToolCall]:
    """Claim a tool call, before executing it. Execute it only if its ``state`` is claimed.

    ``expected_s`` is how long it is expected to take: the session's KV is wanted again then. If the call already has a
    result, the answer contains it. Needs the ``lease`` while a turn is running. Raises ToolCallClaimed, ToolCallUnknown
    (its claimant vanished: it may or may not have run), ToolCallReused (the id belongs to a call of another tool or
    with other arguments), SessionBusy, LeaseLost.
    """
    body = {"name": name, "arguments": arguments, "expected_s": expected_s, **_held(lease)}
    path = _session(session_id, "tool-calls", _part(call_id))
    return Call(_model(ToolCall), "PUT", path, Repeat.KEYED, body=body)


def finish_tool_call(
    session_id: str, call_id: str, *, output: Any = None, error: Any = None, lease: Lease | None = None
) -> Call[ToolCall]:
    """Report a tool call's result: its ``error`` if there is one, else its ``output``; see `tool_output`.

    Needs the ``lease`` while a turn is running, and none otherwise: a tool may end while its session is suspended.
    Raises ToolCallNotFound, ToolCallFinal, SessionBusy, LeaseLost.
    """
    result = {"output": documents.finite(output)} if error is None else {"error": documents.finite(error)}
    path = _session(session_id, "tool-calls", _part(call_id), "result")
    return Call(_model(ToolCall), "PUT", path, Repeat.KEYED, body={**result, **_held(lease)})


def operation(operation_id: str) -> Call[Operation]:
    """Read an operation's state. Raises OperationNotFound."""
    return _get(Operation, f"/v1/operations/{_part(operation_id)}")


def engines() -> Call[EngineList]:
    """The registered engine ranks, and which of them are live."""
    return _get(EngineList, "/v1/engines")


def overview() -> Call[Overview]:
    """What there is and what is wrong: how many sessions, the account's KV by tier, the engines; the tenants, for
    administrators."""
    return _get(Overview, "/v1/overview")


def session_overviews(
    *, state: str | None = None, sort: str = "newest", search: str = "", after: str | None = None
) -> Call[SessionOverviewList]:
    """At most 50 sessions with what they do and what is stored of them; continue with ``after=page.next``.

    ``sort`` is by when the newest turn ended, ``newest`` or ``oldest`` first, or by ``id`` or ``-id``. Those of a
    ``search`` have ids that begin with it, and are ordered by id. A ``state`` leaves the others out: a page may have
    few, or none, and still continue.
    """
    params = {"state": state, "sort": sort, "search": search, "after": after}
    return _get(SessionOverviewList, "/v1/overview/sessions", {name: value for name, value in params.items() if value})


def decisions(engine_id: str, *, after: str | None = None, limit: int = 100) -> Call[DecisionList]:
    """One page of what an engine has decided lately about the caller's sessions, the oldest first; continue with
    ``after=page.last_id``. Raises EngineNotFound."""
    params = {"limit": str(limit), **({} if after is None else {"after": after})}
    return _get(DecisionList, f"/v1/engines/{_part(engine_id)}/decisions", params)


def events(session_id: str, seq: int) -> Call[httpx.Response]:
    # Not a method by itself: the answer is a stream. The service sends a keep-alive every 15 s.
    params = {"after": str(seq)}
    return Call(_stream, "GET", _session(session_id, "events"), Repeat.READ, params=params, wait_s=30)


def _get(answer: type[M], path: str, params: dict[str, str] | None = None) -> Call[M]:
    return Call(_model(answer), "GET", path, Repeat.READ, params=params or {})


def _post(
    answer: type[M], path: str, body: dict[str, Any], *, headers: dict[str, str] | None = None, wait_s: float = 0.0
) -> Call[M]:
    return Call(_model(answer), "POST", path, Repeat.KEYED, body=body, headers=headers or {}, wait_s=wait_s)


def _model(answer: type[M]) -> Callable[[httpx.Response], M]:
    return lambda response: documents.parse(answer, response.content)


def _nothing(response: httpx.Response) -> None:
    if response.status_code != HTTPStatus.NO_CONTENT:
        raise ValueError("the answer was to be empty")


def _stream(response: httpx.Response) -> httpx.Response:
    if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
        raise ValueError("the answer is no stream of events")
    return response


def _session(session_id: str, *parts: str) -> str:
    return "/".join(("/v1/sessions", _part(session_id), *parts))


def _part(name: str) -> str:
    return quote(name, safe="")


def _page(after: str | None, limit: int, order: str) -> dict[str, str]:
    return {"limit": str(limit), "order": order, **({} if after is None else {"after": after})}


def _proof(lease: Lease) -> dict[str, Any]:
    return {"token": lease.token, "epoch": lease.epoch}


def _held(lease: Lease | None) -> dict[str, Any]:
    return {} if lease is None else {"lease": _proof(lease)}


def _seen(revision: str) -> dict[str, str]:
    return {"If-Match": revision if revision == "*" else f'"{revision}"'}
