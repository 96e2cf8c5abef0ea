"""`agentstate engines`: what an operator, who has the database, can ask of engines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentstate.cli import loading
from agentstate.cli.output import UNREACHABLE, AsJson, say, show_fields, show_json, show_table
from agentstate.errors import EngineNotFound

if TYPE_CHECKING:
    from agentstate.fleet.decisions import Decision
    from agentstate.fleet.engines import Engine
    from agentstate.settings import Settings
    from agentstate.sql.database import Database

app = loading.group()

_TIMEOUT_S = 5.0


@app.command("ls")
def list_engines(
    live: Annotated[bool, typer.Option("--live", help="Only those that send heartbeats.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the ranks of engines that have registered, and whether they are live."""
    rows = [row for row in _rows() if row["live"] or not live]
    if as_json:
        show_json(rows)
        return
    columns = ("id", "model", "rank", "phase", "live", "silent_s", "node")
    cells = [[_short(_in_words(row)[name]) for name in columns] for row in rows]
    show_table(columns, cells, right=("rank", "silent_s"))


@app.command("show")
def show_engine(
    engine_id: Annotated[str, typer.Argument(help="As `ls` shows it.")],
    as_json: AsJson = False,
) -> None:
    """Show an engine: how it is registered, and, if it answers, SGLang's flags that it was started with, its counters,
    and why it stores nothing."""
    from agentstate.errors import EngineError
    from agentstate.fleet.control import ControlClient
    from agentstate.sql.database import Database

    settings = loading.settings()
    database = Database(settings.sqlalchemy_url)
    try:
        (rank, *_) = _ranks(database, settings, engine_id)
    finally:
        database.close()
    about = next(row for row in _rows() if row["id"] == rank.id)
    try:
        stat, silent = ControlClient(rank.control_address, rank.control_secret).call("stat", _TIMEOUT_S), None
    except EngineError as error:
        stat, silent = None, str(error)
    if as_json:
        show_json({**about, "stat": stat, "silent": silent})
        return
    show_fields(_in_words(about))
    if stat is None:
        say(f"engine {engine_id} does not answer: {silent}")
        raise typer.Exit(UNREACHABLE)
    # An engine of an earlier release does not say them.
    if given := stat.pop("flags", None):
        show_table(("flag", "class", "why"), [[one["flag"], one["class"], one["why"]] for one in given])
    show_fields({name: value for name, value in _flat("", stat) if value not in (None, "", [])})


def _in_words(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "phase": row["phase"] or "both"}


def _rows() -> list[dict[str, Any]]:
    import sqlalchemy as sa

    from agentstate.fleet import engines as fleet
    from agentstate.sql.database import Database, instant, now_us

    settings = loading.settings()
    database = Database(settings.sqlalchemy_url)
    try:
        with database.read() as connection:
            known = fleet.registered(connection)
            live = {rank.id for rank in fleet.live(connection, settings.engine_timeout_s)}
            now = connection.execute(sa.select(now_us())).scalar() or 0
    finally:
        database.close()
    return [
        {
            "id": rank.id,
            "model": rank.model,
            "rank": rank.rank,
            "phase": rank.phase.value,
            "live": rank.id in live,
            "silent_s": round((now - rank.heartbeat_us) / 1e6, 1),
            "node": rank.node,
            "base_url": rank.base_url,
            "control_address": rank.control_address,
            "pages_dir": rank.pages_dir,
            "shared_store": rank.shared_store,
            "reads": sorted(rank.reads),
            "fingerprint": rank.fingerprint,
            "started_at": instant(rank.started_us).isoformat(timespec="seconds"),
        }
        for rank in known
    ]


def _flat(prefix: str, of: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The counters of a `stat` by dotted names."""
    for name, value in of.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", value


@app.command("decisions")
def show_decisions(
    engine_id: Annotated[str | None, typer.Argument(help="As `ls` shows it. By default all.")] = None,
    session: Annotated[str | None, typer.Option(help="Only those about this session.")] = None,
    last: Annotated[int, typer.Option(min=1, help="How many of the newest to show.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Show what engines have decided lately about all tenants' sessions, and what became of it."""
    from agentstate.fleet import decisions
    from agentstate.sql.database import Database, instant

    settings = loading.settings()
    database = Database(settings.sqlalchemy_url)
    try:
        found = [(rank, one) for rank in _ranks(database, settings, engine_id) for one in _decided(rank)]
        with database.read() as connection:
            names = decisions.named(connection, (one.session for _, one in found))
    finally:
        database.close()
    rows = [
        {"engine": rank.id, **asdict(one), "at": instant(one.id).isoformat(), **names.get(one.session, _GONE)}
        for rank, one in sorted(found, key=lambda of: of[1].id)
    ]
    rows = [row for row in rows if session in (None, row["name"], row["session"])][-last:]
    if as_json:
        show_json(rows)
        return
    numbers = ("tokens", "index", "displaced")
    header = ("at", "engine", "tenant", "session", "decision", "outcome", *numbers)
    named = {"session": "name"}
    cells = [[_short(row[named.get(column, column)]) for column in header] for row in rows]
    show_table(header, cells, right=numbers)


def _short(value: Any) -> Any:
    return f"{value:.3g}" if isinstance(value, float) else value


_GONE = {"tenant": "", "name": ""}


def _ranks(database: Database, settings: Settings, engine_id: str | None) -> list[Engine]:
    from agentstate.fleet import engines as fleet

    with database.read() as connection:
        if engine_id is None:
            return [rank for rank in fleet.live(connection, settings.engine_timeout_s) if rank.rank == 0]
        ranks = [rank for rank in fleet.registered(connection) if rank.id == engine_id]
    if not ranks:
        raise EngineNotFound(f"there is no engine {engine_id}")
    return ranks


def _decided(rank: Engine) -> list[Decision]:
    from agentstate.fleet.control import ControlClient
    from agentstate.fleet.decisions import Decisions

    client = ControlClient(rank.control_address, rank.control_secret)
    found, silent = Decisions(lambda _, after: client.call("decisions", _TIMEOUT_S, after=after)).of(rank)
    if silent is not None:
        say(f"engine {rank.id} does not say: {silent}")
    return found
