"""``/``: how many agents there are and what they do, where their KV is, and what is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from agentstate.api.console import reading
from agentstate.api.console.access import Viewer, ViewerDep
from agentstate.api.console.reading import Counts, Sort, State, TenantRow
from agentstate.api.console.render import ConsoleRoute, page
from agentstate.api.console.room import Console, ConsoleDep
from agentstate.api.console.snapshot import Snapshot
from agentstate.api.service import Service, ServiceDep
from agentstate.fleet import quotas
from agentstate.fleet.quotas import Quota
from agentstate.sessions import salts
from agentstate.sessions.tenants import Tenant

router = APIRouter(include_in_schema=False, route_class=ConsoleRoute)

# Where tokens of prompts come from, the nearest first, in words.
SOURCES = (
    ("device", "on the device"),
    ("fetched", "fetched to the device in advance"),
    ("host", "host memory"),
    ("nvme", "the drive or the shared store"),
    ("recomputed", "recomputed"),
)
_TIERS = ("device", "host", "nvme")
_NEWEST = 10


@dataclass(frozen=True)
class Held:
    """What an account has on a tier of all engines, and its limit on one."""

    tier: str
    nbytes: int | None
    limit: int | None


@router.get("/")
async def read(request: Request, viewer: ViewerDep, console: ConsoleDep, service: ServiceDep) -> Response:
    snapshot = await seen(console, viewer)
    counts = await console.snapshots.counts(viewer.tenant.id)
    return await run_in_threadpool(_page, request, viewer, service, snapshot, counts)


def _page(request: Request, viewer: Any, service: Service, snapshot: Snapshot, counts: Counts) -> Response:
    account = account_of(viewer.tenant)
    with service.database.read() as connection:
        quota = quotas.find(connection, account)
        newest = reading.listed(
            connection, viewer.tenant.id, state=None, sort=Sort.NEWEST, search="", cursor=None
        ).sessions[:_NEWEST]
        running = reading.listed(
            connection, viewer.tenant.id, state=State.RUNNING, sort=Sort.NEWEST, search="", cursor=None
        ).sessions[:_NEWEST]
    hits = snapshot.hits()
    total = sum(hits.values())
    sources = [(words, hits.get(name, 0), hits.get(name, 0) / total if total else 0.0) for name, words in SOURCES]
    return page(
        request,
        viewer,
        "overview.html",
        snapshot=snapshot,
        counts=counts,
        caps=(reading.COUNTED, reading.COUNTED_LAPSED),
        held=held(snapshot, account, quota),
        quota=quota,
        sources=sources,
        prompt_tokens=total,
        newest=newest,
        running=running,
        alarms=alarms(snapshot, counts),
    )


async def seen(console: Console, viewer: Viewer) -> Snapshot:
    """The newest snapshot, as far as a viewer may see it. Raises DatabaseError."""
    newest = await console.snapshots.newest()
    return newest if viewer.administers else newest.seen_by(account_of(viewer.tenant))


def account_of(tenant: Tenant | TenantRow) -> str:
    """Whom a tenant's KV is charged to."""
    if tenant.kv_group in (None, "*"):
        return salts.scope_of_tenant(tenant.id)
    return salts.scope_of_group(str(tenant.kv_group))


def held(snapshot: Snapshot, account: str, quota: Quota) -> list[Held]:
    """What an account has on each tier, as the engines say. Ranks share an account's bytes evenly."""
    found = []
    for tier in _TIERS:
        said = [
            n_bytes
            for server in snapshot.servers
            for rank in server.ranks
            if isinstance(n_bytes := rank.get("accounts", account, tier, "bytes"), int)
        ]
        found.append(Held(tier, sum(said) if said else None, getattr(quota, f"{tier}_bytes")))
    return found


def alarms(snapshot: Snapshot, counts: Counts) -> list[str]:
    """What is wrong, in sentences that say what to do."""
    found = []
    if not any(server.live for server in snapshot.servers):
        found.append("No engine is live: agents find nobody to call. Start one with `agentstate engine`.")
    for server in snapshot.servers:
        name = f"{server.first.engine.model} at {server.first.engine.base_url}"
        if not server.live:
            missing = [str(rank.engine.rank) for rank in server.ranks if not rank.live]
            found.append(f"{name} sends no heartbeat (rank {', '.join(missing)}): look whether it runs, and its log.")
        elif server.off:
            found.append(f"{name} stores nothing: {server.off}")
        elif server.silent:
            found.append(f"{name} does not answer: {server.silent}")
        if (failed := server.total("spill", "pages_failed")) > 0:
            found.append(f"{name} could not store {failed:,.0f} pages since it started: look at its drive.")
        if (bad := server.total("restore", "pages_failed")) > 0:
            found.append(f"{name} found {bad:,.0f} damaged pages since it started, and had them recomputed.")
    if counts.lapsed:
        found.append(
            f"{counts.lapsed:,} session(s) were being run when their lease lapsed: their clients vanished, and nobody "
            "has resumed them since."
        )
    return found
