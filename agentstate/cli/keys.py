"""`agentstate keys`: keys of the API. These commands need the database."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from agentstate.cli import loading
from agentstate.cli.database import opened
from agentstate.cli.output import AsJson, say, show_rows
from agentstate.cli.tenants import DEFAULT_TENANT, KvGroup
from agentstate.errors import SettingsError

if TYPE_CHECKING:
    from agentstate.sessions.tenants import Role

app = loading.group()
_ROLES = "viewer reads; operator also changes and runs sessions; admin also manages keys in the console."


@app.command("create")
def create_key(
    tenant: Annotated[str, typer.Option(help="The tenant whose sessions the key gives access to.")] = DEFAULT_TENANT,
    note: Annotated[str, typer.Option(help="A note on the key's purpose.")] = "",
    role: Annotated[str, typer.Option(help=_ROLES)] = "operator",
    kv_group: KvGroup = None,
) -> None:
    """Create an API key. It is printed once."""
    from agentstate.sessions import tenants as tenancy

    with opened(loading.settings()) as database, database.write() as connection:
        if kv_group is not None:
            tenancy.put(connection, replace(tenancy.find(connection, tenant), kv_group=kv_group or None))
        made = tenancy.create_key(connection, tenant, note, _role(role))
        of_tenant = tenancy.find(connection, tenant)
    say(f"key {made.key.id} of tenant {tenant}, {made.key.role}; send it as Authorization: Bearer")
    say(tenancy.sharing(of_tenant))
    print(made.secret)


@app.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """List the keys, without their secrets."""
    from agentstate.sessions import tenants as tenancy
    from agentstate.sql.database import instant

    with opened(loading.settings()) as database, database.read() as connection:
        found = tenancy.list_keys(connection)
    rows = [
        {
            "id": key.id,
            "tenant": key.tenant,
            "role": str(key.role),
            "note": key.note,
            "created": instant(key.created_us).isoformat(timespec="seconds"),
            "revoked": "" if key.revoked_us is None else instant(key.revoked_us).isoformat(timespec="seconds"),
        }
        for key in found
    ]
    show_rows(rows, as_json, none="there are no keys")


@app.command("revoke")
def revoke_key(key_id: Annotated[str, typer.Argument(help="As `agentstate keys list` shows it.")]) -> None:
    """Revoke a key. Running services notice within seconds. The tenant's sessions stay."""
    from agentstate.sessions import tenants as tenancy

    with opened(loading.settings()) as database, database.write() as connection:
        tenancy.revoke_key(connection, key_id)


@app.command("role")
def set_role(
    key_id: Annotated[str, typer.Argument(help="As `agentstate keys list` shows it.")],
    role: Annotated[str, typer.Argument(help=_ROLES)],
) -> None:
    """Change what a key may do. Running services notice within seconds."""
    from agentstate.sessions import tenants as tenancy

    with opened(loading.settings()) as database, database.write() as connection:
        tenancy.set_role(connection, key_id, _role(role))


def _role(name: str) -> Role:
    """Raises SettingsError."""
    from agentstate.sessions.tenants import Role

    if name not in set(Role):
        raise SettingsError(f"{name!r} is no role: {', '.join(Role)}")
    return Role(name)
