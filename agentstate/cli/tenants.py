"""`agentstate tenants`: who owns sessions, with which limits. These commands need the database."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from agentstate.cli import loading
from agentstate.cli.database import opened
from agentstate.cli.output import AsJson, confirm, say, show_json, show_line, show_table
from agentstate.errors import SettingsError

app = loading.group()

DEFAULT_TENANT = "default"
KvGroup = Annotated[
    str | None,
    typer.Option(help="Tenants of this group share KV, and can guess each other's prompts by timing. *: all."),
]
_TIER = "The most bytes {} of an engine, all ranks together: 20GiB, or none for no limit."


@app.command("set")
def set_tenant(
    name: Annotated[str, typer.Argument(help="The tenant; created if it does not exist.")],
    expires_in_s: Annotated[
        float | None, typer.Option(min=0.001, help="Expiry of sessions that set none. None: never.")
    ] = None,
    requests_per_s: Annotated[
        float | None, typer.Option(min=0, help="Its rate limit. None: AGENTSTATE_REQUESTS_PER_S.")
    ] = None,
    kv_group: KvGroup = None,
) -> None:
    """Set all limits of a tenant, and whom its new sessions share KV with; options not given are reset."""
    from agentstate.sessions import tenants as tenancy

    with opened(loading.settings()) as database, database.write() as connection:
        tenancy.put(connection, tenancy.Tenant(name, expires_in_s, requests_per_s, kv_group or None))
        of_tenant = tenancy.find(connection, name)
    say(tenancy.sharing(of_tenant))


@app.command("quota")
def set_quota(
    name: Annotated[str | None, typer.Argument(help="The tenant; it need not exist yet.")] = None,
    group: Annotated[str | None, typer.Option(help="Instead: what the tenants of this KV group have together.")] = None,
    nobody: Annotated[bool, typer.Option("--none", help="Instead: what requests without a session have.")] = False,
    device: Annotated[str | None, typer.Option(help=_TIER.format("on the device"))] = None,
    host: Annotated[str | None, typer.Option(help=_TIER.format("in the host tier"))] = None,
    nvme: Annotated[str | None, typer.Option(help=_TIER.format("on the drive"))] = None,
    shared: Annotated[str | None, typer.Option(help=_TIER.format("in the shared store, of all engines"))] = None,
    sessions: Annotated[
        int | None, typer.Option(min=0, help="The most sessions of the tenant: one more is refused.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove all limits that are not given.")] = False,
) -> None:
    """Set and show the quota of a tenant, a KV group, or of requests without a session. What is above it leaves first,
    as soon as others need the room. Limits that are not given stay. Engines take note within seconds."""
    from agentstate.fleet import quotas
    from agentstate.sessions import salts
    from agentstate.sessions import tenants as tenancy

    if [name is not None, group is not None, nobody].count(True) != 1:
        raise SettingsError("say whose quota it is: a tenant's, a group's with --group, or --none")
    if name is not None:
        tenancy.check_name(name)
        account = salts.scope_of_tenant(name)
    else:
        account = quotas.NOBODY if group is None else salts.scope_of_group(group)
    if sessions is not None and name is None:
        raise SettingsError("a number of sessions is a tenant's")
    sizes = {"device": device, "host": host, "nvme": nvme, "shared": shared}
    given = {f"{tier}_bytes": _size(text) for tier, text in sizes.items() if text}
    with opened(loading.settings()) as database, database.write() as connection:
        before = quotas.UNLIMITED if clear else quotas.find(connection, account)
        quota = replace(before, **given, **({} if sessions is None else {"sessions": sessions}))
        quotas.put(connection, account, quota)
    limits = [f"{limit}: {_shown(limit, value)}" for limit, value in vars(quota).items() if value is not None]
    show_line(f"{quotas.shown(account)}: {', '.join(limits) or 'no limits'}")


@app.command("ls")
def list_tenants(as_json: AsJson = False) -> None:
    """List the tenants and whatever else has a quota, with their limits."""
    from agentstate.fleet import quotas
    from agentstate.sessions import salts
    from agentstate.sessions import tenants as tenancy

    with opened(loading.settings()) as database, database.read() as connection:
        of_accounts = quotas.read(connection)
        known = {salts.scope_of_tenant(tenant.id): tenant for tenant in tenancy.every(connection)}
    rows = []
    for account in sorted({*known, *of_accounts}):
        tenant = known.get(account)
        own = {} if tenant is None else {name: value for name, value in vars(tenant).items() if name != "id"}
        rows.append({"account": quotas.shown(account), **own, **vars(of_accounts.get(account, quotas.UNLIMITED))})
    if as_json:
        show_json(rows)
        return
    names = (
        "expires_in_s",
        "requests_per_s",
        "kv_group",
        "device_bytes",
        "host_bytes",
        "nvme_bytes",
        "shared_bytes",
        "sessions",
    )
    header = ["account", *(name.removesuffix("_bytes").replace("_", " ") for name in names)]
    show_table(header, [[row["account"], *(_shown(name, row.get(name)) for name in names)] for row in rows])


def _size(text: str) -> int | None:
    """The bytes of ``20GiB``; None of ``none``. Raises SettingsError."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    if text == "none":
        return None
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        size = -1
    if not 0 <= size < 2**63:
        raise SettingsError(f"{text!r} is no size: 20GiB, 500MB, or none")
    return size


def _shown(limit: str, value: object) -> str:
    from pydantic import ByteSize

    if value is None:
        return ""
    return ByteSize(str(value)).human_readable() if limit.endswith("_bytes") else str(value)


@app.command("rotate-kv-secret")
def rotate_kv_secret() -> None:
    """Replace the secret of all tenants' KV: pages stored before are never found again, and are erased."""
    from agentstate.sessions import salts

    with opened(loading.settings()) as database, database.write() as connection:
        dropped = salts.rotate(connection)
    print(f"{dropped:,} manifests dropped: those sessions are recomputed when they are resumed")


@app.command("delete")
def delete_tenant(
    name: Annotated[str, typer.Argument(help="The tenant.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete all sessions of a tenant, with their KV, and revoke its keys."""
    from agentstate.sessions import collection

    confirm(f"Delete every session of tenant {name}, also those that run?", yes=yes)
    with opened(loading.settings()) as database:
        deleted = collection.remove_tenant(database, name)
    print(f"{deleted:,} sessions deleted: engines erase their KV")
