"""`agentstate pages … --shared`, `push` and `pull`: what concerns the store that engines share."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentstate.cli import loading
from agentstate.cli.output import progress, show_json, show_line, show_rows
from agentstate.errors import SettingsError

if TYPE_CHECKING:
    from agentstate.fleet.shared import SharedStore
    from agentstate.settings import Settings
    from agentstate.sql.database import Database
    from agentstate.tiers import SharedExtents

_MANY = 1 << 30


@contextmanager
def _opened(settings: Settings, *, sql_only: bool = False) -> Iterator[SharedStore]:
    """``sql_only``: the store need not answer, if the database knows it."""
    from agentstate.fleet import stores
    from agentstate.fleet.shared import SharedStore
    from agentstate.fleet.shared_rows import SharedRows

    with _connected(settings) as (extents, database):
        id = None
        if sql_only:
            with database.read() as connection:
                id = stores.known(connection, settings.shared_store)
        id = id or stores.identify(database, extents.tier, settings.shared_store)
        yield SharedStore(SharedRows(extents, id, database))


@contextmanager
def _connected(settings: Settings) -> Iterator[tuple[SharedExtents, Database]]:
    from agentstate.sql.database import Database
    from agentstate.tiers import shared_extents

    extents = shared_extents(settings)
    if extents is None:
        raise SettingsError("there is no shared store: set AGENTSTATE_SHARED_STORE")
    with extents.tier:
        database = Database(settings.sqlalchemy_url)
        try:
            database.check_schema()
            yield extents, database
        finally:
            database.close()


def claim() -> None:
    from agentstate.fleet import stores

    settings = loading.settings()
    with _connected(settings) as (extents, database):
        stores.claim(database, extents.tier, settings.shared_store)
        show_line(
            f"{settings.shared_store} is the store of {database.url}: what this does not list there will be deleted"
        )


def list_stores(as_json: bool) -> None:
    from agentstate.fleet import extents as catalogue
    from agentstate.pages.space import largest

    rows: dict[tuple[str, str], dict[str, Any]] = {}
    held: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    with _opened(loading.settings(), sql_only=True) as store, store.database.read() as connection:
        for usage in catalogue.usage(connection, store.id):
            at = usage.fingerprint, usage.shard
            row = rows.setdefault(at, {"fingerprint": at[0][:32], "rank": at[1], "extents": 0, "pages": 0, "bytes": 0})
            row["extents"] += usage.extents
            row["pages"] += usage.pages
            row["bytes"] += usage.nbytes
            held[at][usage.owner] += usage.nbytes
    for at, row in rows.items():
        row |= vars(largest(held[at]))
        if not as_json and row["others"]:
            row["owners"] |= {f"{row['others']} others": row["others_bytes"]}
        if not as_json:
            del row["others"], row["others_bytes"]
    show_rows(list(rows.values()), as_json)


def du(as_json: bool) -> None:
    from agentstate.fleet import extents as catalogue

    rows: dict[tuple[str, str], dict[str, Any]] = {}
    with _opened(loading.settings(), sql_only=True) as store, store.database.read() as connection:
        for usage in catalogue.usage(connection, store.id):
            at = usage.fingerprint, usage.shard
            names = {"fingerprint": at[0][:32], "rank": at[1]}
            row = rows.setdefault(at, {**names, "needed": 0, "unneeded": 0, "doomed": 0, "total": 0})
            row["needed"] += usage.nbytes
            row["doomed"] += usage.doomed_nbytes
            row["total"] += usage.nbytes + usage.doomed_nbytes
        for extent in catalogue.unneeded(connection, store.id, 0.0, _MANY):
            row = rows[extent.fingerprint, extent.shard]
            row["needed"] -= extent.nbytes
            row["unneeded"] += extent.nbytes
    show_rows(list(rows.values()), as_json)


def check(repair: bool, as_json: bool) -> bool:
    """Whether nothing is wrong, or it was repaired."""
    from agentstate.fleet import extents as catalogue

    found: list[dict[str, Any]] = []
    bad: list[int] = []
    extents = 0
    with _opened(loading.settings()) as store:
        with store.database.read() as connection:
            total = sum(usage.nbytes for usage in catalogue.usage(connection, store.id))
        with progress("verifying", total) as advance:
            for checked in store.check():
                extents += 1
                advance(checked.extent.nbytes)
                if not checked.good:
                    damage = "is missing" if checked.missing else checked.damage
                    keys = None if damage else [key.hex() for key in checked.broken]
                    found.append({"extent": checked.extent.name, "damage": damage, "broken_pages": keys})
                    bad.append(checked.extent.id)
        if repair and bad:
            with store.database.write() as connection:
                catalogue.doom(connection, bad)
        unlisted = [name for names in store.rows.unlisted() for name in names]
    if as_json:
        show_json({"extents": extents, "broken": found, "repaired": repair, "unlisted": unlisted})
    else:
        for item in found:
            show_line(f"{item['extent']}: {item['damage'] or 'broken pages: ' + ', '.join(item['broken_pages'])}")
        for name in unlisted:
            show_line(f"{name}: the catalogue does not list it")
        doomed = " and doomed" if repair and found else ""
        show_line(f"{extents} extents, {len(found)} broken{doomed}, {len(unlisted)} unlisted")
    return repair or not found


def gc(dry_run: bool, as_json: bool) -> None:
    from agentstate.fleet import extents as catalogue

    settings = loading.settings()
    done = {"doomed": 0, "doomed_bytes": 0, "unlisted": 0, "unlisted_bytes": 0, "deleted": 0, "leftovers": 0}
    with _opened(settings) as store:
        with store.database.read() as connection:
            unknown = not catalogue.usage(connection, store.id)
        if unknown and next(store.rows.unlisted(older_than_s=0.0), None) is not None:
            raise SettingsError(
                f"{store.database.url} lists nothing of {settings.shared_store}, so all that is there would be "
                "deleted: is AGENTSTATE_DATABASE_URL the engines' database? To delete all of it, use the store's own "
                "tools"
            )
        if dry_run:
            with store.database.read() as connection:
                unneeded = iter([catalogue.unneeded(connection, store.id, settings.shared_keep_s, _MANY)])
        else:
            unneeded = iter(partial(store.rows.doom_unneeded, settings.shared_keep_s), [])
        for extents in unneeded:
            done["doomed"] += len(extents)
            done["doomed_bytes"] += sum(one.nbytes for one in extents)
        if not dry_run:
            done["deleted"] = sum(1 for _ in store.rows.delete_doomed())
        for objects in store.rows.unlisted() if dry_run else store.rows.doom_unlisted():
            done["unlisted"] += len(objects)
            done["unlisted_bytes"] += sum(objects.values())
        if not dry_run:
            done["leftovers"] = store.rows.sweep()
    if as_json:
        show_json({"dry_run": dry_run, **done})
        return
    would = "would be doomed" if dry_run else "are doomed"
    show_line(f"{done['doomed']} extents of {done['doomed_bytes']:,} bytes that nobody needs {would}")
    show_line(f"{done['unlisted']} objects of {done['unlisted_bytes']:,} bytes that the catalogue did not list {would}")
    if not dry_run:
        show_line(f"{done['deleted']} extents that had been doomed for an hour, {done['leftovers']} leftovers deleted")


def push(root: Path, session: str | None, model: str | None, as_json: bool) -> None:
    from agentstate.fleet.shared import Copied
    from agentstate.pages import inventory
    from agentstate.pages.node import kept_id

    total, told, stores = Copied(), 0, inventory.store_directories(root)
    with _opened(loading.settings()) as store:
        wanted = _wanted(store, session, model)
        with progress("publishing", inventory.total_bytes(stores)) as advance:
            for directory in stores:
                node = kept_id(directory.parents[1])
                copied = store.push(directory, node or "", wanted, advance)
                for name, count in vars(copied).items():
                    setattr(total, name, getattr(total, name) + count)
                told += store.tell_manifests(directory, node) if node is not None else 0
    if as_json:
        show_json({**vars(total), "manifests": told})
        return
    show_line(
        f"{total.extents} extents are in the shared store, {total.new} of them new ({total.bytes:,} bytes); "
        f"{told} manifests say so" + (f"; {total.unreadable} cannot be read" if total.unreadable else "")
    )


def pull(root: Path, session: str | None, model: str | None, as_json: bool) -> bool:
    """Whether all that was asked for can be used."""
    from agentstate.fleet import extents as catalogue

    settings = loading.settings()
    with _opened(settings) as store:
        wanted = _wanted(store, session, model)
        with store.database.read() as connection:
            total = sum(usage.nbytes for usage in catalogue.usage(connection, store.id))
        with progress("copying", total) as advance:
            copied = store.pull(root, wanted, settings.pages_free_fraction, advance)
    if as_json:
        show_json(vars(copied))
    else:
        show_line(
            f"{copied.extents} extents are in {root}, {copied.new} of them new ({copied.bytes:,} bytes)"
            + (f"; {copied.unreadable} have pages that cannot be used" if copied.unreadable else "")
        )
    return not copied.unreadable


def _wanted(store: SharedStore, session: str | None, model: str | None) -> set[bytes] | None:
    """The pages that were asked for; None for all."""
    from agentstate.fleet import manifests

    if session is None and model is None:
        return None
    with store.database.read() as connection:
        keys = manifests.keys_of_sessions(connection, session=session, model=model)
    if not keys:
        of = " and ".join(f"{what} {name}" for what, name in (("session", session), ("model", model)) if name)
        raise SettingsError(f"{store.database.url} lists no page of {of}")
    return keys
