"""``/tenants``: which tenants and keys there are, for administrators. Not what tenants' sessions say."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from agentstate.api.console import commands, reading
from agentstate.api.console.access import AdministratorDep, form_of
from agentstate.api.console.render import ConsoleRoute, page, see
from agentstate.api.schemas import Name
from agentstate.api.service import ServiceDep
from agentstate.errors import NotAllowed, SettingsError
from agentstate.fleet import quotas
from agentstate.sessions import salts, tenants
from agentstate.sessions.tenants import NewKey, Role

router = APIRouter(prefix="/tenants", include_in_schema=False, route_class=ConsoleRoute)

_MAX_NOTE = 200
DONE = {"revoked": "The key was revoked. Services notice within seconds."}


@router.get("")
def read(
    request: Request,
    viewer: AdministratorDep,
    service: ServiceDep,
    after: Annotated[str | None, Query(max_length=64)] = None,
    older: Annotated[str | None, Query(max_length=64)] = None,
    done: Annotated[str, Query(max_length=20)] = "",
) -> Response:
    with service.database.read() as connection:
        found, following = reading.all_tenants(connection, after)
        keys, older_keys = reading.some_keys(connection, older)
        of_accounts = quotas.read(connection)
        guarded = tenants.any_key(connection)
    limits = {one.id: of_accounts.get(salts.scope_of_tenant(one.id), quotas.UNLIMITED) for one in found}
    return page(
        request,
        viewer,
        "tenants.html",
        tenants=found,
        following=following,
        keys=keys,
        older_keys=older_keys,
        limits=limits,
        guarded=guarded,
        cap=reading.COUNTED_LAPSED,
        roles=list(Role),
        done=DONE.get(done),
    )


@router.post("/keys")
async def create(request: Request, viewer: AdministratorDep, service: ServiceDep) -> Response:
    """Make a key. Its secret is on this page and nowhere else."""
    form = await form_of(request)
    tenant, note = form.get("tenant", "").strip(), form.get("note", "").strip()[:_MAX_NOTE]
    role = form.get("role", "")
    if viewer.key_id is None:
        # With the first key, everything that asks without one is refused, this console included.
        raise NotAllowed(
            "make the first key with `agentstate keys create --role admin`: from then on all calls need one"
        )
    if role not in set(Role):
        raise NotAllowed(f"a role is {', '.join(Role)}")
    if "\0" in tenant + note:
        raise NotAllowed("a name and a note are text")

    def made() -> NewKey:
        with service.database.write() as connection:
            return tenants.create_key(connection, tenant, note, Role(role))

    try:
        new = await run_in_threadpool(made)
    except SettingsError as error:
        raise NotAllowed(str(error)) from error
    command = commands.create_key(new.key.tenant, new.key.role)
    return await run_in_threadpool(page, request, viewer, "key.html", new=new, command=command)


@router.get("/keys/{key_id}/revoke")
def confirm(request: Request, key_id: Name, viewer: AdministratorDep, service: ServiceDep) -> Response:
    with service.database.read() as connection:
        key = tenants.find_key(connection, key_id)
    command = commands.revoke_key(key_id)
    return page(request, viewer, "revoke.html", key=key, own=key_id == viewer.key_id, command=command)


@router.post("/keys/{key_id}/revoke")
async def revoke(key_id: Name, viewer: AdministratorDep, service: ServiceDep) -> Response:
    def act() -> None:
        with service.database.write() as connection:
            tenants.revoke_key(connection, key_id)

    await run_in_threadpool(act)
    return see("/tenants?done=revoked")
