"""The state that endpoints share, one instance per application, and their per-request dependencies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Request

from agentstate.api.changes import Changes
from agentstate.api.gate import Gate
from agentstate.api.limits import Limits
from agentstate.api.metrics import Metrics
from agentstate.api.problems import PreconditionRequired
from agentstate.fleet.decisions import Decisions
from agentstate.fleet.operations import Operations
from agentstate.fleet.waits import Hearing
from agentstate.sessions.rows import Seen
from agentstate.sessions.tenants import Role, Tenant
from agentstate.sessions.verbs import Sessions
from agentstate.settings import Settings
from agentstate.sql.database import Database


@dataclass(frozen=True)
class Service:
    settings: Settings
    database: Database
    sessions: Sessions
    operations: Operations
    changes: Changes
    gate: Gate
    limits: Limits
    metrics: Metrics
    waits: Hearing | None
    decisions: Decisions


# Asynchronous although nothing is awaited: FastAPI would otherwise run it in a thread. Each takes what it can from the
# request, because FastAPI resolves a dependency anew wherever it is named.
async def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(service_of)]


async def _caller(request: Request) -> Tenant:
    tenant: Tenant = request.state.tenant  # set by `Guard`
    return tenant


CallerDep = Annotated[Tenant, Depends(_caller)]


async def _role(request: Request) -> Role:
    role: Role = request.state.role  # set by `Guard`
    return role


RoleDep = Annotated[Role, Depends(_role)]


async def _sessions(request: Request, caller: CallerDep) -> Sessions:
    return (await service_of(request)).sessions.of(caller.id)


SessionsDep = Annotated[Sessions, Depends(_sessions)]


def etag(revision: int, status: str) -> str:
    """A session's ETag. Its status is part of it because a lease lapses without a change of the session."""
    return f'"{revision}-{status}"'


async def _seen(
    if_match: Annotated[
        str | None,
        Header(description="The ETags or revisions that the caller has seen, or * for any.", examples=["*"]),
    ] = None,
) -> Seen:
    """The revisions that the caller has seen; None for any. A malformed tag matches nothing."""
    if if_match is None:
        raise PreconditionRequired
    return _revisions(if_match)


async def _maybe_seen(
    if_match: Annotated[str | None, Header(description="Refuse (412) unless this has the session's ETag.")] = None,
) -> Seen:
    return None if if_match is None else _revisions(if_match)


def _revisions(tags: str) -> Seen:
    return None if tags.strip() == "*" else frozenset(map(_revision, tags.split(",")))


def _revision(tag: str) -> int:
    number = tag.strip().removeprefix("W/").strip('"').partition("-")[0]
    return int(number) if number.isascii() and number.isdecimal() and len(number) < 19 else 0


SeenDep = Annotated[Seen, Depends(_seen)]
MaybeSeenDep = Annotated[Seen, Depends(_maybe_seen)]
