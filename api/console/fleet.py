"""``/engines``, ``/engines/{id}`` and ``/stores``: what runs, what it says of itself, and where pages lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from agentstate.api.console import reading
from agentstate.api.console.access import Viewer, ViewerDep
from agentstate.api.console.overview import account_of, seen
from agentstate.api.console.render import ConsoleRoute, page
from agentstate.api.console.room import ConsoleDep
from agentstate.api.console.snapshot import Server
from agentstate.api.schemas import Name
from agentstate.api.service import Service, ServiceDep
from agentstate.errors import EngineNotFound
from agentstate.fleet import decisions
from agentstate.fleet.decisions import Decision

router = APIRouter(include_in_schema=False, route_class=ConsoleRoute)

_DECISIONS = 100
# What an engine says of accounts is of all tenants, and what is kept for each is for operators.
_OF_OTHERS = ("accounts", "owners", "others", "others_bytes")
_SECTIONS = {
    "store": "Stored on the drive",
    "spill": "Storing",
    "restore": "Restoring",
    "prefetch": "Prefetches",
    "reads": "Bytes read",
    "host": "Host tier",
    "shared": "Shared store",
    "sharing": "Publishing",
    "preload": "Preloads",
    "order": "Order of requests",
    "foresight": "Foresight",
    "break_even": "Break-even",
    "erasures": "Erasures",
    "wear": "Wear",
    "kept": "Kept for what runs",
}


@router.get("/engines")
async def read(request: Request, viewer: ViewerDep, console: ConsoleDep) -> Response:
    snapshot = await seen(console, viewer)
    given = {server.first.engine.id: flags(server) for server in snapshot.servers}
    return await run_in_threadpool(page, request, viewer, "engines.html", snapshot=snapshot, flags=given)


@router.get("/engines/{engine_id}")
async def read_engine(
    request: Request, engine_id: Name, viewer: ViewerDep, console: ConsoleDep, service: ServiceDep
) -> Response:
    """One engine, by the id of any of its ranks."""
    snapshot = await seen(console, viewer)
    server = snapshot.server_of(engine_id)
    if server is None:
        raise EngineNotFound(f"there is no engine {engine_id}")

    def made() -> Response:
        made_decisions, names, silent = _decided(service, viewer, server)
        return page(
            request,
            viewer,
            "engine.html",
            snapshot=snapshot,
            server=server,
            sections=list(sections(server)),
            flags=flags(server),
            hits=server.first.get("served", "hits"),
            penalty=server.first.get("served", "penalty"),
            accounts=accounts(viewer, server),
            decisions=made_decisions,
            names=names,
            silent=silent,
        )

    return await run_in_threadpool(made)


def _decided(service: Service, viewer: Viewer, server: Server) -> tuple[list[Decision], dict[str, str], str | None]:
    """What the first rank has decided lately about the viewer's own sessions, the newest first."""
    if not server.first.live:
        return [], {}, "it sends no heartbeat"
    known, silent = service.decisions.of(server.first.engine)
    with service.database.read() as connection:
        names = decisions.names(connection, viewer.tenant.id, (one.session for one in known))
    own = [one for one in reversed(known) if one.session in names]
    return own[:_DECISIONS], names, silent


@dataclass(frozen=True)
class Flag:
    """One of SGLang's that an engine was started with. ``standing`` says whether it is tested with AgentState."""

    shown: str
    standing: str
    why: str


def flags(server: Server) -> list[Flag] | None:
    """As the first rank says them; None where it says none, as one of an earlier release does."""
    said = server.first.get("flags")
    if not isinstance(said, list):
        return None
    return [
        Flag(str(one.get("flag")), str(one.get("class")), str(one.get("why")))
        for one in said
        if isinstance(one, Mapping)
    ]


def sections(server: Server) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """The counters of the first rank, by what they are about; those of device pools beside full attention come last."""
    stat = server.first.stat
    for name, title in _SECTIONS.items():
        if (counters := _counters(stat.get(name))) is not None:
            yield title, counters
    pools = stat.get("pools")
    for pool, of_pool in pools.items() if isinstance(pools, Mapping) else ():
        for name, title in _SECTIONS.items():
            if isinstance(of_pool, Mapping) and (counters := _counters(of_pool.get(name))) is not None:
                yield f"{title} · pool {pool}", counters


def _counters(found: Any) -> list[tuple[str, Any]] | None:
    if not isinstance(found, Mapping):
        return None
    return [
        (str(name), value)
        for name, value in found.items()
        if not isinstance(value, Mapping | list) and name not in _OF_OTHERS
    ]


def accounts(viewer: Viewer, server: Server) -> dict[str, Any]:
    """What accounts have on the first rank: a tenant's own, and all for an administrator."""
    found = server.first.get("accounts")
    if not isinstance(found, Mapping):
        return {}
    own = account_of(viewer.tenant)
    return {str(name): of for name, of in found.items() if viewer.administers or name == own}


@router.get("/stores")
async def read_stores(request: Request, viewer: ViewerDep, console: ConsoleDep, service: ServiceDep) -> Response:
    snapshot = await seen(console, viewer)

    def made() -> Response:
        own = account_of(viewer.tenant)
        with service.database.read() as connection:
            shared = reading.shared_of(connection, own)
        return page(request, viewer, "stores.html", snapshot=snapshot, shared=shared, own=own, cap=reading.COUNTED)

    return await run_in_threadpool(made)
