"""`agentstate pages`: inspect a page directory, check it, and free space in it.

All commands except `gc` and `check --repair` work beside a running engine. Figures go to standard output, as tables or
as JSON; progress goes to standard error.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Column, Table

from agentstate.errors import PageStoreLocked, SettingsError
from agentstate.settings import Settings

if TYPE_CHECKING:
    from agentstate.pages import inventory
    from agentstate.sql.database import Database

pages = typer.Typer(help="The page directory.", no_args_is_help=True)

PagesDir = Annotated[Path | None, typer.Option("--dir", help="Page directory. [AGENTSTATE_PAGES_DIR]")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@pages.command("ls")
def list_stores(directory: PagesDir = None, as_json: AsJson = False) -> None:
    """List the stores of a page directory, one per fingerprint and rank, and whose their bytes are."""
    from agentstate.pages import inventory
    from agentstate.pages.space import largest

    rows = []
    with _progress("reading headers", _stores(directory)) as advance:
        for store in _stores(directory):
            reports = []
            for report in inventory.extents(store):
                reports.append(report)
                advance(report.n_bytes)
            headers = [report.header for report in reports if report.header is not None]
            held = Counter[str]()
            for report in reports:
                if report.header is not None:
                    held[report.header.owner] += report.n_bytes
            rows.append(
                {
                    "fingerprint": store.parent.name,
                    "rank": store.name,
                    "extents": len(reports),
                    "unreadable": len(reports) - len(headers),
                    "pages": sum(len(header.keys) for header in headers),
                    "tokens": sum(len(header.keys) * header.geometry.page_size for header in headers),
                    "bytes": sum(report.n_bytes for report in reports),
                    **vars(largest(held)),
                }
            )
    if not as_json:
        for row in rows:
            others = {f"{row['others']} others": row["others_bytes"]} if row["others"] else {}
            row["owners"] |= others
            del row["others"], row["others_bytes"]
    _show_rows(rows, as_json)


@pages.command()
def show(
    name: Annotated[str, typer.Argument(help="An extent's path or number, or the first 8 digits of a page's key.")],
    directory: PagesDir = None,
    as_json: AsJson = False,
) -> None:
    """Show an extent's header, or where a page lies. The last extent with a page serves it. Exits with status 1 if
    nothing is found."""
    from agentstate.pages import inventory

    root = directory or Settings().pages_path
    found = [_description(report, slot) for report, slot in inventory.holding(root, name.lower())]
    if as_json:
        print(json.dumps(found))
    elif not found:
        print(f"no extent and no page in {root} is named {name}; a key needs {inventory.KEY_DIGITS} digits or more")
    for description in [] if as_json else found:
        table = Table(show_header=False)
        for field, value in description.items():
            table.add_row(field, _shown(value))
        Console().print(table)
    raise typer.Exit(0 if found else 1)


def _description(report: inventory.ExtentReport, slot: int | None) -> dict[str, Any]:
    header = report.header
    about: dict[str, Any] = {"extent": str(report.path), "bytes": report.n_bytes}
    if header is None:
        return {**about, "damage": report.damage}
    from agentstate.pages.space import NOBODY

    geometry = header.geometry
    about |= {
        "fingerprint": header.fingerprint.hex(),
        "owner": header.owner or NOBODY,
        "pages": len(header.keys),
        "page_size": geometry.page_size,
        "layers": geometry.layers,
        "component_bytes": list(geometry.component_bytes),
        "page_bytes": geometry.page_bytes,
        "slab_bytes": header.layout.slab_bytes,
        "data_offset": header.layout.data_offset,
    }
    if slot is None:
        return {**about, "keys": [key.hex() for key in header.keys]}
    offset, _ = header.layout.component_range(0, 0, slot, 1)
    return {**about, "key": header.keys[slot].hex(), "slot": slot, "offset_in_layer_0": offset}


@pages.command()
def du(directory: PagesDir = None, as_json: AsJson = False) -> None:
    """Show what uses the bytes of every store: live pages, pages that a later extent also has, unreadable extents, and
    files of interrupted writes."""
    from agentstate.pages import inventory

    root = directory or Settings().pages_path
    rows = []
    for store in inventory.store_directories(root):
        usage = inventory.usage(store)
        rows.append({"fingerprint": store.parent.name, "rank": store.name, **vars(usage), "total": usage.total})
    free_fraction = None
    if root.exists():
        disk = os.statvfs(root)
        free_fraction = round(disk.f_bavail / disk.f_blocks, 4)
    if as_json:
        print(json.dumps({"stores": rows, "disk_free_fraction": free_fraction}))
        return
    _show_rows(rows, as_json=False)
    if free_fraction is not None:
        print(f"{free_fraction:.1%} of the disk is free")


@pages.command()
def check(
    directory: PagesDir = None,
    repair: Annotated[bool, typer.Option("--repair", help="Drop broken pages and extents, nothing else.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read and verify every stored page. Exits with status 1 if something is broken and was not repaired."""
    from agentstate.pages import inventory

    found: list[dict[str, Any]] = []
    extents = dropped = 0
    stores = _stores(directory)
    with _progress("verifying", stores) as advance:
        for store in stores:
            bad = []
            for report in inventory.check(store):
                extents += 1
                advance(report.n_bytes)
                if not report.good:
                    bad.append(report)
                    keys = [report.header.keys[slot].hex() for slot in report.broken] if report.header else None
                    found.append({"extent": str(report.path), "damage": report.damage, "broken_pages": keys})
            if repair and bad:
                dropped += inventory.repair(store, bad)
    if as_json:
        print(json.dumps({"extents": extents, "broken": found, "repaired": repair, "pages_dropped": dropped}))
    else:
        for item in found:
            print(f"{item['extent']}: {item['damage'] or 'broken pages: ' + ', '.join(item['broken_pages'])}")
        print(f"{extents} extents, {len(found)} broken" + (f", {dropped} pages dropped" if repair else ""))
    raise typer.Exit(1 if found and not repair else 0)


@pages.command()
def gc(
    directory: PagesDir = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be deleted; delete nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete the extents that no manifest in the database needs, and the manifests of stores that are gone. If an
    engine has a store open, skip that store, collect the others, and exit with status 1."""
    from agentstate.pages import inventory
    from agentstate.sql.database import Database

    settings = Settings()
    database = Database(settings.sqlalchemy_url)
    rows, refused = [], []
    try:
        database.check_schema()
        stores = {store: inventory.identity(store) for store in inventory.store_directories(_root(directory))}
        known = {store: of for store, of in stores.items() if of is not None}
        if known and not any(next(_chains(database, *of), None) for of in known.values()):
            raise SettingsError(
                f"{database.url} has no manifest for any store in {_root(directory)}, so all pages would be deleted: "
                "is AGENTSTATE_DATABASE_URL the engines' database? To delete all pages, delete the directory"
            )
        for store, (fingerprint, rank) in known.items():
            try:
                needed = partial(_chains, database, fingerprint, rank)
                done = inventory.collectable(store, needed()) if dry_run else inventory.collect(store, needed)
            except PageStoreLocked:
                refused.append(str(store))
                continue
            rows.append({"fingerprint": store.parent.name, "rank": store.name, **vars(done)})
        dead = _dead_manifests(database, _root(directory), dry_run)
    finally:
        database.close()
    if as_json:
        print(json.dumps({"dry_run": dry_run, "stores": rows, "in_use": refused, "dead_manifests": dead}))
    else:
        _show_rows(rows, as_json=False)
        if dead:
            print(f"{dead} manifests of stores that are gone" + ("" if dry_run else " deleted"))
    if refused:
        raise PageStoreLocked(f"an engine has {', '.join(refused)} open: stop it to collect there")


def _root(directory: Path | None) -> Path:
    return directory or Settings().pages_path


def _dead_manifests(database: Database, root: Path, dry_run: bool) -> int:
    """Delete the manifests of this directory's stores that no longer exist. Returns how many there are."""
    from agentstate.fleet import manifests
    from agentstate.pages.node import kept_id

    if (node := kept_id(root)) is None:
        return 0
    dead = 0
    with database.write() as connection:
        for (fingerprint, rank), count in manifests.stores(connection, node).items():
            if not (root / fingerprint[:32] / f"rank{rank}").exists():
                dead += count
                if not dry_run:
                    manifests.forget_store(connection, fingerprint, rank, node)
    return dead


def _chains(database: Database, fingerprint: str, rank: int) -> Iterator[list[bytes]]:
    from agentstate.fleet import manifests

    with database.read() as connection:
        yield from (keys for _, keys in manifests.chains(connection, fingerprint, rank))


def _stores(directory: Path | None) -> list[Path]:
    from agentstate.pages import inventory

    return inventory.store_directories(_root(directory))


@contextmanager
def _progress(what: str, stores: Sequence[Path]) -> Iterator[Any]:
    """A progress bar over the bytes of ``stores``. Yields a function that advances it."""
    from agentstate.pages import inventory

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=inventory.total_bytes(stores))
        yield lambda n_bytes: progress.advance(task, n_bytes)


def _show_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows))
    elif not rows:
        print("no pages are stored there")
    else:
        table = Table("fingerprint", *(Column(name, justify="right") for name in list(rows[0])[1:]))
        for row in rows:
            table.add_row(*(_shown(value) for value in row.values()))
        Console().print(table)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(_shown(item) for item in value)
    if isinstance(value, dict):
        return "\n".join(f"{name} {_shown(item)}" for name, item in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
