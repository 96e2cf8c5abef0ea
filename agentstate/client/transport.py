"""How requests are sent: what is retried, when, and which error an answer means.

`exchange` decides all of it and does no I/O, so the two clients differ only in how they send and sleep.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, TypeVar

import httpx

from agentstate import documents
from agentstate.client.routes import Call, Repeat, once
from agentstate.errors import (
    AgentStateError,
    InvalidEntry,
    NotAgentState,
    RequestRefused,
    ServiceUnreachable,
    SessionBusy,
)
from agentstate.loopback import is_loopback

A = TypeVar("A")

CONNECT_TIMEOUT_S = 5.0
FIRST_WAIT_S = 0.1
# Keep idle connections for a shorter time than the service does.
LIMITS = httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=30.0)
# If the service asks for a longer wait, retrying is up to the caller.
LONGEST_WAIT_S = 5.0
# After these errors the request has not reached the service.
_UNSENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
# What a service says of these is a problem.
_NO_SUCH_ROUTE = (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED)
GATEWAY = (HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT)


@dataclass(frozen=True)
class Attempt:
    """Send the request, after ``wait_s``."""

    request: dict[str, Any] = field(repr=False)
    wait_s: float


def exchange(
    call: Call[A], *, where: str, timeout_s: float, retries: int
) -> Generator[Attempt, httpx.Response | httpx.TransportError, A]:
    """Yields attempts, receives their outcomes, and returns the answer or raises its error.

    A request is retried, at most ``retries`` times, if the service did not receive it, if the service says that it may
    succeed later, or if its answer was lost and ``call.repeat`` allows it. Waiting for a busy session is up to the
    caller. Raises InvalidEntry, and sends nothing, if the body cannot be JSON; NotAgentState for an answer that no
    service gives.
    """
    if call.repeat is Repeat.KEYED:
        call = once(call)
    request = {
        "method": call.method,
        "url": call.path,
        "params": call.params,
        "content": _body(call),
        "headers": {**call.headers, **({} if call.body is None else {"Content-Type": "application/json"})},
        "timeout": httpx.Timeout(timeout_s + call.wait_s, connect=min(timeout_s, CONNECT_TIMEOUT_S)),
    }
    wait_s = 0.0
    for left in range(retries, -1, -1):
        outcome = yield Attempt(request, wait_s)
        wait_s = FIRST_WAIT_S * 2 ** (retries - left) * random.uniform(0.5, 1)
        cause: Exception | None = None
        if isinstance(outcome, httpx.TransportError):
            reason = str(outcome) or type(outcome).__name__
            error: AgentStateError = ServiceUnreachable(
                f"the AgentState service at {where} did not answer {call.method} {call.path}: {reason}"
            )
            cause = outcome
            again = isinstance(outcome, _UNSENT) or call.repeat is not Repeat.NEVER
        elif outcome.is_success:
            try:
                return call.parse(outcome)
            except ValueError as error_of_it:
                raise _not_agentstate(where, call, outcome) from error_of_it
        elif _is_of_another(outcome):
            raise _not_agentstate(where, call, outcome)
        else:
            error = problem(outcome)
            wait_s = max(wait_s, _retry_after_s(outcome))
            again = _may_succeed_later(error, outcome.status_code, call.repeat) and wait_s <= LONGEST_WAIT_S
        if not again or left == 0:
            raise error from cause
    raise AssertionError("the last attempt returns or raises")


def settings_of(base_url: str, limits: httpx.Limits = LIMITS) -> dict[str, Any]:
    """Both clients' httpx settings for a service at ``base_url``. Requests to this machine bypass the environment's
    proxy."""
    return {"base_url": base_url, "limits": limits, "trust_env": not is_loopback(base_url)}


def _body(call: Call[Any]) -> bytes | None:
    try:
        return None if call.body is None else documents.encode(call.body)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidEntry(f"what {call.method} {call.path} was to send is not JSON: {error}") from error


def problem(response: httpx.Response) -> AgentStateError:
    """The error that a problem+json answer means, by its type; RequestRefused for any other answer."""
    told = _told(response)
    if told is None:
        said = " ".join(response.text.split())[:200]
        return RequestRefused(f"HTTP {response.status_code}: {said}", status=response.status_code)
    slug, detail = told["type"].rpartition("/")[2], told["detail"]
    kind = next((kind for kind in _tree(AgentStateError) if kind.slug() == slug), RequestRefused)
    if kind is RequestRefused:
        return RequestRefused(f"{slug}: {detail}", status=response.status_code)
    known: dict[str, Any] = {}
    parameters = inspect.signature(kind).parameters
    if "revision" in parameters and told.get("revision") is not None:
        known["revision"] = int(told["revision"])
    if "retry_after_s" in parameters:
        known["retry_after_s"] = float(told.get("retry_after_s", 1))
    return kind(detail, **known)


def _told(response: httpx.Response) -> dict[str, Any] | None:
    """The problem that a service tells of; None for any other answer."""
    try:
        told = response.json()
    except ValueError:
        return None
    is_problem = isinstance(told, dict) and isinstance(told.get("type"), str) and "detail" in told
    return told if is_problem else None


def _is_of_another(response: httpx.Response) -> bool:
    """Whether no service refuses a request like this. A proxy before one may, with other statuses."""
    return response.is_redirect or (response.status_code in _NO_SUCH_ROUTE and _told(response) is None)


def _not_agentstate(where: str, call: Call[Any], response: httpx.Response) -> NotAgentState:
    media_type = response.headers.get("Content-Type", "").partition(";")[0]
    said = f"to {response.headers['Location']}" if response.has_redirect_location else media_type
    return NotAgentState(
        f"{where} is no AgentState service, or one of another release: it answers {call.method} {call.path} with "
        f"{response.status_code} {said}".rstrip()
    )


def _may_succeed_later(error: AgentStateError, status: int, repeat: Repeat) -> bool:
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return True  # refused before the service did anything
    if repeat is Repeat.NEVER or isinstance(error, SessionBusy):
        return False
    return error.retryable or status in GATEWAY


def _retry_after_s(response: httpx.Response) -> float:
    try:
        return float(response.headers.get("Retry-After", 0))
    except ValueError:  # a date
        return 0.0


def _tree(root: type[AgentStateError]) -> Iterator[type[AgentStateError]]:
    yield root
    for kind in root.__subclasses__():
        yield from _tree(kind)
