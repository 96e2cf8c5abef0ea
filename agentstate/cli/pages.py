"""`agentstate pages`: inspect a page directory or a shared store, check it, free space in it, and copy between the two.

All commands except `gc`, `check --repair` and `pull` on a page directory work beside a running engine. Figures go to
standard output, as tables or as JSON; progress goes to standard error.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentstate.cli import loading, shared_pages
from agentstate.cli.output import AsJson, progress, show_fields, show_json, show_line, show_rows
from agentstate.errors import EngineError, PageStoreLocked, SettingsError

if TYPE_CHECKING:
    from agentstate.pages import inventory
    from agentstate.sql.database import Database

app = loading.group()

PagesDir = Annotated[Path | None, typer.Option("--dir", help="Page directory. [AGENTSTATE_PAGES_DIR]")]
Shared = Annotated[bool, typer.Option("--shared", help="Of the shared store instead. [AGENTSTATE_SHARED_STORE]")]
Session = Annotated[str | None, typer.Option(help="Only what a session needs: its name or id.")]
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": list[str]()}
Model = Annotated[
    str | None, typer.Option(help="Only what sessions of this model need, by the name that engines serve.")
]


@app.command("ls")
def list_stores(directory: PagesDir = None, shared: Shared = False, as_json: AsJson = False) -> None:
    """List the stores of a page directory, one per fingerprint and rank, and whose their bytes are."""
    if shared:
        shared_pages.list_stores(as_json)
        return
    from agentstate.pages import inventory
    from agentstate.pages.space import largest

    rows = []
    with progress("reading headers", inventory.total_bytes(_stores(directory))) as advance:
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
                    "rank": inventory.rank_of(store),
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
    show_rows(rows, as_json)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="An extent's path or number, or the first 8 digits of a page's key.")],
    directory: PagesDir = None,
    as_json: AsJson = False,
) -> None:
    """Show an extent's header, or where a page lies. The last extent with a page serves it. Exits with status 1 if
    nothing is found."""
    from agentstate.pages import inventory

    root = directory or loading.settings().pages_path
    found = [_description(report, slot) for report, slot in inventory.holding(root, name.lower())]
    if as_json:
        show_json(found)
    elif not found:
        show_line(f"no extent and no page in {root} is named {name}; a key needs {inventory.KEY_DIGITS} digits or more")
    for description in [] if as_json else found:
        show_fields(description)
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
        "codec": "raw" if header.coding is None else "lossless",
        **({"slab_bytes": header.layout.slab_bytes} if header.coding is None else {}),
        "data_offset": header.data_offset,
    }
    if slot is None:
        return {**about, "keys": [key.hex() for key in header.keys]}
    offset, _ = header.component_range(0, 0, slot, 1)
    return {**about, "key": header.keys[slot].hex(), "slot": slot, "offset_in_layer_0": offset}


@app.command()
def du(directory: PagesDir = None, shared: Shared = False, as_json: AsJson = False) -> None:
    """Show what uses the bytes of every store: live pages, pages that a later extent also has, unreadable extents, and
    files of interrupted writes. Of a shared store: what sessions need, what nobody needs, and what is to be deleted."""
    if shared:
        shared_pages.du(as_json)
        return
    from agentstate.pages import inventory

    root = directory or loading.settings().pages_path
    rows = []
    for store in inventory.store_directories(root):
        usage = inventory.usage(store)
        rows.append(
            {"fingerprint": store.parent.name, "rank": inventory.rank_of(store), **vars(usage), "total": usage.total}
        )
    free_fraction = None
    if root.exists():
        disk = os.statvfs(root)
        free_fraction = round(disk.f_bavail / disk.f_blocks, 4)
    if as_json:
        show_json({"stores": rows, "disk_free_fraction": free_fraction, "written_bytes_day": _written(root)})
        return
    show_rows(rows, as_json=False)
    if free_fraction is not None:
        show_line(f"{free_fraction:.1%} of the disk is free; {_written(root):,} bytes were written to it in 24 hours")


def _written(root: Path) -> int:
    """The bytes that engines wrote below ``root`` in 24 hours, but for the last minute of those that run."""
    from agentstate.pages import wear
    from agentstate.pages.node import dp_roots

    files = (file for of_dp_rank in dp_roots(root).values() for file in wear.files_of(of_dp_rank))
    return sum(wear.Wear(file).bytes_written for file in files)


@app.command()
def check(
    directory: PagesDir = None,
    repair: Annotated[bool, typer.Option("--repair", help="Drop broken pages and extents, nothing else.")] = False,
    shared: Shared = False,
    as_json: AsJson = False,
) -> None:
    """Read and verify every stored page. Exits with status 1 if something is broken and was not repaired."""
    if shared:
        raise typer.Exit(0 if shared_pages.check(repair, as_json) else 1)
    from agentstate.pages import inventory

    found: list[dict[str, Any]] = []
    extents = dropped = 0
    stores = _stores(directory)
    with progress("verifying", inventory.total_bytes(stores)) as advance:
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
        show_json({"extents": extents, "broken": found, "repaired": repair, "pages_dropped": dropped})
    else:
        for item in found:
            show_line(f"{item['extent']}: {item['damage'] or 'broken pages: ' + ', '.join(item['broken_pages'])}")
        show_line(f"{extents} extents, {len(found)} broken" + (f", {dropped} pages dropped" if repair else ""))
    raise typer.Exit(1 if found and not repair else 0)


@app.command()
def gc(
    directory: PagesDir = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be deleted; delete nothing.")] = False,
    shared: Shared = False,
    as_json: AsJson = False,
) -> None:
    """Delete the extents that no manifest in the database needs, and the manifests of stores that are gone. If an
    engine has a store open, skip that store, collect the others, and exit with status 1. In a shared store, delete as
    its engines do: an hour after it was seen that nobody needs an extent."""
    if shared:
        shared_pages.gc(dry_run, as_json)
        return
    from agentstate.pages import inventory
    from agentstate.sql.database import Database

    settings = loading.settings()
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
            rows.append({"fingerprint": store.parent.name, "rank": inventory.rank_of(store), **vars(done)})
        dead = _dead_manifests(database, _root(directory), dry_run)
    finally:
        database.close()
    if as_json:
        show_json({"dry_run": dry_run, "stores": rows, "in_use": refused, "dead_manifests": dead})
    else:
        show_rows(rows, as_json=False)
        if dead:
            show_line(f"{dead} manifests of stores that are gone" + ("" if dry_run else " deleted"))
    if refused:
        raise PageStoreLocked(f"an engine has {', '.join(refused)} open: stop it to collect there")


@app.command("bench", context_settings=_PASSED_ON)
def bench_pages(context: typer.Context) -> None:
    """Measure this store against the disk and against other ways to keep pages."""
    from agentstate.cli import launcher

    settings = loading.settings()
    # The alternatives need SGLang's environment. Without one, they are left out.
    try:
        python = launcher.engine_python(settings)
    except EngineError:
        if settings.engine_python is not None:
            raise
        python = sys.executable
    os.execve(python, [python, "-m", "agentstate.benchmarks.pages", *context.args], dict(os.environ))


@app.command()
def push(directory: PagesDir = None, session: Session = None, model: Model = None, as_json: AsJson = False) -> None:
    """Publish what is stored in a page directory in the shared store. What is there already is not sent again."""
    shared_pages.push(_root(directory), session, model, as_json)


@app.command()
def pull(directory: PagesDir = None, session: Session = None, model: Model = None, as_json: AsJson = False) -> None:
    """Copy pages from the shared store to a page directory that no engine has open, and verify them. Exits with status
    1 if some cannot be used."""
    raise typer.Exit(0 if shared_pages.pull(_root(directory), session, model, as_json) else 1)


@app.command()
def claim() -> None:
    """Let this installation have the shared store, though its database does not know it, or knows another one there:
    after a database was lost, or a store was replaced. What the database does not list there is deleted within hours:
    first make sure that no other installation uses it."""
    shared_pages.claim()


def _root(directory: Path | None) -> Path:
    return directory or loading.settings().pages_path


def _dead_manifests(database: Database, root: Path, dry_run: bool) -> int:
    """Delete the manifests of this directory's stores that no longer exist. Returns how many there are."""
    from agentstate.fleet import manifests
    from agentstate.pages.node import dp_roots, kept_id

    dead = 0
    for of_dp_rank in dp_roots(root).values():
        if (node := kept_id(of_dp_rank)) is None:
            continue
        with database.write() as connection:
            for (fingerprint, rank), count in manifests.stores(connection, node).items():
                if not (of_dp_rank / fingerprint[:32] / f"rank{rank}").exists():
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
