"""The command line: `agentstate serve | engine | demo | db | keys | tenants | pages | version`."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

from agentstate import __version__, launcher
from agentstate import tenants as tenancy
from agentstate.collection import collect
from agentstate.database import Database, instant
from agentstate.errors import AgentStateError
from agentstate.pages import inventory
from agentstate.sessions import DEFAULT_TENANT
from agentstate.settings import Settings

app = typer.Typer(
    help="Suspendable LLM agents on SGLang. Settings are AGENTSTATE_* variables; `agentstate settings` lists them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
db = typer.Typer(help="The database.", no_args_is_help=True)
app.add_typer(db, name="db")
keys = typer.Typer(help="API keys. Once there is one, every call needs one.", no_args_is_help=True)
app.add_typer(keys, name="keys")
tenants = typer.Typer(help="Tenants: whose sessions a key gives access to.", no_args_is_help=True)
app.add_typer(tenants, name="tenants")
pages = typer.Typer(help="The page directory.", no_args_is_help=True)
app.add_typer(pages, name="pages")

PagesDir = Annotated[Path | None, typer.Option("--dir", help="Page directory. [AGENTSTATE_PAGES_DIR]")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


@app.command()
def settings() -> None:
    """List every setting: its variable, its value now, and what it is for."""
    now = Settings()
    table = Table("variable", "value", "meaning")
    for name, field in Settings.model_fields.items():
        value = getattr(now, name)
        shown = "…" if name == "database_url" and "@" in str(value) else str(value)
        table.add_row(f"AGENTSTATE_{name.upper()}", shown, field.description)
    Console().print(table)


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on. [AGENTSTATE_HOST]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. [AGENTSTATE_PORT]")] = None,
) -> None:
    """Run the session service."""
    given = {"host": host, "port": port}
    _room("api.server").run(Settings(**{name: value for name, value in given.items() if value is not None}))


@db.command()
def upgrade() -> None:
    """Bring the database to this version's schema."""
    _room("api.server").migrate(Settings())


@db.command("gc")
def collect_garbage() -> None:
    """Delete what no session reaches any more, as a running service does by itself from time to time."""
    now = Settings()
    with _database(now) as database:
        collected = collect(database, expired_after_s=now.expired_retention_s)
    print(", ".join(f"{count:,} {name}" for name, count in vars(collected).items()))


@keys.command("create")
def create_key(
    tenant: Annotated[str, typer.Option(help="Whose sessions it gives access to.")] = DEFAULT_TENANT,
    note: Annotated[str, typer.Option(help="What it is for.")] = "",
) -> None:
    """Make an API key. It is printed now and never again."""
    with _database(Settings()) as database, database.write() as connection:
        made = tenancy.create_key(connection, tenant, note)
    _errors.print(f"key {made.key.id} of tenant {tenant}; send it as Authorization: Bearer", highlight=False)
    print(made.secret)


@keys.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """List the keys, without their secrets."""
    with _database(Settings()) as database, database.read() as connection:
        found = tenancy.list_keys(connection)
    rows = [
        {
            "id": key.id,
            "tenant": key.tenant,
            "note": key.note,
            "created": instant(key.created_us).isoformat(timespec="seconds"),
            "revoked": "" if key.revoked_us is None else instant(key.revoked_us).isoformat(timespec="seconds"),
        }
        for key in found
    ]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("id", "tenant", "note", "created", "revoked")
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)


@keys.command("revoke")
def revoke_key(key_id: Annotated[str, typer.Argument(help="As `agentstate keys list` shows it.")]) -> None:
    """Let a key be valid no more. Running services notice within seconds."""
    with _database(Settings()) as database, database.write() as connection:
        tenancy.revoke_key(connection, key_id)


@tenants.command("set")
def set_tenant(
    name: Annotated[str, typer.Argument(help="The tenant; it is made if it is not there.")],
    expires_in_s: Annotated[
        float | None, typer.Option(min=0.001, help="When its sessions expire that do not say. None: never.")
    ] = None,
    requests_per_s: Annotated[
        float | None, typer.Option(min=0, help="How many it may send. None: AGENTSTATE_REQUESTS_PER_S.")
    ] = None,
) -> None:
    """Set the limits of a tenant, both of them."""
    with _database(Settings()) as database, database.write() as connection:
        tenancy.put(connection, tenancy.Tenant(name, expires_in_s, requests_per_s))


@pages.command("ls")
def list_pages(directory: PagesDir = None, as_json: AsJson = False) -> None:
    """List the stores of a page directory: one a fingerprint and rank."""
    rows = []
    for store in inventory.store_directories(directory or Settings().pages_path):
        reports = list(inventory.extents(store))
        headers = [report.header for report in reports if report.header is not None]
        rows.append(
            {
                "fingerprint": store.parent.name,
                "rank": store.name,
                "extents": len(reports),
                "unreadable": len(reports) - len(headers),
                "pages": sum(header.pages for header in headers),
                "tokens": sum(header.pages * header.geometry.page_size for header in headers),
                "bytes": sum(report.n_bytes for report in reports),
            }
        )
    if as_json:
        print(json.dumps(rows))
        return
    if not rows:
        print("no pages are stored there")
        return
    table = Table("fingerprint", *(Column(name, justify="right") for name in list(rows[0])[1:]))
    for row in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()))
    Console().print(table)


@pages.command()
def check(
    directory: PagesDir = None,
    repair: Annotated[bool, typer.Option("--repair", help="Drop what is broken, and nothing else.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read and verify every stored page. Ends with status 1 when something is broken and was not repaired."""
    found: list[dict[str, Any]] = []
    dropped = 0
    stores = inventory.store_directories(directory or Settings().pages_path)
    total = sum(len(list((store / "extents").glob("*.ext"))) for store in stores)
    with Progress(*Progress.get_default_columns(), "{task.completed} of {task.total}", console=_errors) as progress:
        task = progress.add_task("verifying extents", total=total)
        for store in stores:
            bad = []
            for report in inventory.check(store):
                progress.advance(task)
                if not report.good:
                    bad.append(report)
                    keys = [report.header.keys[slot].hex() for slot in report.broken] if report.header else None
                    found.append({"extent": str(report.path), "damage": report.damage, "broken_pages": keys})
            if repair and bad:
                dropped += inventory.repair(store, bad)
    if as_json:
        print(json.dumps({"extents": total, "broken": found, "repaired": repair, "pages_dropped": dropped}))
    else:
        for item in found:
            print(f"{item['extent']}: {item['damage'] or 'broken pages: ' + ', '.join(item['broken_pages'])}")
        print(f"{total} extents, {len(found)} broken" + (f", {dropped} pages dropped" if repair else ""))
    raise typer.Exit(1 if found and not repair else 0)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: agentstate engine --model-path Qwen/Qwen2.5-7B-Instruct --port 30000",
)
def engine(context: typer.Context) -> None:
    """Start SGLang with AgentState. Every argument is SGLang's and is passed through; where to keep pages, how much
    memory to stage them in and which database to tell are settings (`agentstate settings`)."""
    command, environment = launcher.engine_command(Settings(), context.args, os.environ)
    os.execve(command[0], command, environment)


@app.command()
def demo(
    report: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """An agent works, is suspended, its engine is killed, and it goes on from NVMe: on this machine, for real."""
    from agentstate.demo import run

    raise typer.Exit(0 if run(Settings(), report) else 1)


_errors = Console(stderr=True)


@contextmanager
def _database(settings: Settings) -> Iterator[Database]:
    """The database, its schema this version's: a SQLite that is not there yet is made."""
    _room("api.server").prepare(settings)
    database = Database(settings.sqlalchemy_url)
    try:
        yield database
    finally:
        database.close()


def _room(name: str) -> ModuleType:
    """A module of another room, which this one never imports otherwise."""
    return importlib.import_module(name)


def main() -> None:
    try:
        app()
    except AgentStateError as error:
        print(f"agentstate: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
