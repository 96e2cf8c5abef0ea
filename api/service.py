"""What the endpoints work with, one instance an application, and what they know of a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Request

from agentstate.fleet.operations import Operations
from agentstate.sessions.tenants import Tenant
from agentstate.sessions.verbs import Sessions
from agentstate.settings import Settings
from agentstate.sql.database import Database
from api.changes import Changes
from api.gate import Gate
from api.metrics import Metrics
from api.problems import PreconditionRequired


@dataclass(frozen=True)
class Service:
    settings: Settings
    database: Database
    sessions: Sessions
    operations: Operations
    changes: Changes
    gate: Gate
    metrics: Metrics


# Asynchronous, although nothing is awaited: FastAPI would send it to a thread otherwise. And each of these takes what
# it can from the request, because what depends on another is resolved anew wherever it is named.
async def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(service_of)]


async def _caller(
    request: Request, authorization: Annotated[str | None, Header(include_in_schema=False)] = None
) -> Tenant:
    return await (await service_of(request)).gate.admit(authorization)


CallerDep = Annotated[Tenant, Depends(_caller)]


async def _sessions(request: Request, caller: CallerDep) -> Sessions:
    return (await service_of(request)).sessions.of(caller.id)


SessionsDep = Annotated[Sessions, Depends(_sessions)]


def etag(revision: int, status: str) -> str:
    """A session's ETag. Its status is part of it because a lease lapses without a change of the session."""
    return f'"{revision}-{status}"'


async def _seen(
    if_match: Annotated[
        str | None, Header(description="The ETag or revision that the caller has seen, or * for any.", examples=["*"])
    ] = None,
) -> int | None:
    """The revision that the caller has seen; None for any. One that is none of ours matches nothing."""
    if if_match is None:
        raise PreconditionRequired
    return _revision(if_match)


async def _maybe_seen(
    if_match: Annotated[str | None, Header(description="Refuse (412) unless this is the session's ETag.")] = None,
) -> int | None:
    return None if if_match is None else _revision(if_match)


def _revision(tag: str) -> int | None:
    tag = tag.strip()
    if tag == "*":
        return None
    number = tag.removeprefix("W/").strip('"').partition("-")[0]
    return int(number) if number.isascii() and number.isdecimal() and len(number) < 19 else 0


SeenDep = Annotated[int | None, Depends(_seen)]
MaybeSeenDep = Annotated[int | None, Depends(_maybe_seen)]
