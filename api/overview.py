"""``/v1/overview``: what there is and what is wrong, for programs that show it: what the console's pages show."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.concurrency import run_in_threadpool

from agentstate import answers
from agentstate.api.console import overview, reading
from agentstate.api.console.reading import Counts, Listed, Sort, State
from agentstate.api.console.room import ConsoleDep
from agentstate.api.console.snapshot import Server, Snapshot
from agentstate.api.problems import COMMON
from agentstate.api.service import CallerDep, RoleDep, Service, ServiceDep
from agentstate.fleet import quotas
from agentstate.fleet.quotas import UNLIMITED, Quota
from agentstate.sessions import salts
from agentstate.sessions.tenants import Role, Tenant
from agentstate.sql.database import instant

router = APIRouter(prefix="/v1/overview", tags=["overview"], responses=COMMON)


@router.get("", operation_id="read_overview")
async def read(caller: CallerDep, role: RoleDep, console: ConsoleDep, service: ServiceDep) -> answers.Overview:
    """Count the caller's sessions, and say where its KV is, what runs and what is wrong. Administrators also see what
    engines count of all tenants, and which tenants there are."""
    snapshot = await console.snapshots.newest()
    counts = await console.snapshots.counts(caller.id)
    administers = role is Role.ADMIN
    if not administers:
        snapshot = snapshot.seen_by(overview.account_of(caller))
    return await run_in_threadpool(_overview, service, caller, administers, snapshot, counts)


def _overview(
    service: Service, caller: Tenant, administers: bool, snapshot: Snapshot, counts: Counts
) -> answers.Overview:
    account = overview.account_of(caller)
    with service.database.read() as connection:
        limits = quotas.read(connection) if administers else {account: quotas.find(connection, account)}
        found, following = reading.all_tenants(connection, None) if administers else ([], None)
    tenants = []
    for one in found:
        own = limits.get(charged := overview.account_of(one), UNLIMITED)
        of_tenant = limits.get(salts.scope_of_tenant(one.id), UNLIMITED)
        tenants.append(
            answers.TenantOverview(
                id=one.id,
                kv_group=one.kv_group,
                sessions=one.sessions,
                session_limit=of_tenant.sessions,
                tiers=_tiers(snapshot, charged, own),
            )
        )
    return answers.Overview(
        taken_at=snapshot.taken,
        tenant=caller.id,
        sessions=answers.SessionCounts(**vars(counts)),
        tiers=_tiers(snapshot, account, limits.get(account, UNLIMITED)),
        engines=[_engine(server, administers) for server in snapshot.servers],
        prompt_tokens=snapshot.hits() if administers else None,
        alarms=overview.alarms(snapshot, counts),
        tenants=tenants if administers else None,
        more_tenants=following is not None,
    )


def _tiers(snapshot: Snapshot, account: str, quota: Quota) -> dict[Any, answers.Held]:
    held = overview.held(snapshot, account, quota)
    return {one.tier: answers.Held(bytes=one.nbytes, limit=one.limit) for one in held}


def _engine(server: Server, administers: bool) -> answers.EngineOverview:
    engine = server.first.engine
    return answers.EngineOverview(
        id=engine.id,
        base_url=engine.base_url,
        model=engine.model,
        ranks=len(server.ranks),
        live=server.live,
        off=server.off,
        silent=server.silent,
        stored_bytes=int(server.total("store", "bytes")) if administers else None,
        restores_per_s=server.restores_per_s if administers else None,
        restored_bytes_per_s=server.bytes_per_s if administers else None,
    )


@router.get("/sessions", operation_id="list_session_overviews")
def read_sessions(
    caller: CallerDep,
    service: ServiceDep,
    state: Annotated[State | None, Query(description="Only those: a list may have few of them, and go on.")] = None,
    sort: Annotated[Sort, Query(description="By when the newest turn ended, or by id.")] = Sort.NEWEST,
    search: Annotated[
        str, Query(max_length=1024, pattern=r"^[^\x00]*$", description="What ids begin with; they are in order then.")
    ] = "",
    after: Annotated[str | None, Query(max_length=3000, description="`next` of the list before.")] = None,
) -> answers.SessionOverviewList:
    """List at most 50 sessions, with what they do and what is stored of them."""
    with service.database.read() as connection:
        found = reading.listed(connection, caller.id, state=state, sort=sort, search=search.strip(), cursor=after)
    return answers.SessionOverviewList(data=[_session(one) for one in found.sessions], next=found.next)


def _session(one: Listed) -> answers.SessionOverview:
    return answers.SessionOverview.model_validate(
        {
            "id": one.id,
            "model": one.model,
            "state": one.state.value,
            "turned_at": instant(one.turned_us),
            "waits_for": one.waits_for,
            "open_calls": one.open_calls,
            "tokens": one.tokens,
            "bytes": one.nbytes,
            "expires_at": None if one.expires_us is None else instant(one.expires_us),
        }
    )
