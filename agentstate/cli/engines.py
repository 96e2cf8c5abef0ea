"""`agentstate engines`: what an operator, who has the database, can ask of engines."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from agentstate.errors import EngineNotFound
from agentstate.settings import Settings

if TYPE_CHECKING:
    from agentstate.fleet.decisions import Decision
    from agentstate.fleet.engines import Engine
    from agentstate.sql.database import Database

engines = typer.Typer(help="Engines, for operators: these commands need the database.", no_args_is_help=True)

_TIMEOUT_S = 5.0


@engines.callback()
def _commands() -> None:
    # Without this, typer takes a single command for the whole of `engines`.
    pass


@engines.command("decisions")
def show_decisions(
    engine_id: Annotated[str | None, typer.Argument(help="As `GET /v1/engines` shows it. By default all.")] = None,
    session: Annotated[str | None, typer.Option(help="Only those about this session.")] = None,
    last: Annotated[int, typer.Option(min=1, help="How many of the newest to show.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what engines have decided lately about all tenants' sessions, and what became of it."""
    from agentstate.fleet import decisions
    from agentstate.sql.database import Database, instant

    settings = Settings()
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
        print(json.dumps(rows))
        return
    right = [Column(name, justify="right") for name in ("tokens", "index", "displaced")]
    table = Table("at", "engine", "tenant", "session", "decision", "outcome", *right)
    for row in rows:
        worth = ("" if row[name] is None else f"{row[name]:.3g}" for name in ("index", "displaced"))
        shown = (row[name] for name in ("at", "engine", "tenant", "name", "decision", "outcome"))
        table.add_row(*map(str, shown), f"{row['tokens']:,}", *worth)
    Console().print(table)


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
        typer.echo(f"engine {rank.id} does not say: {silent}", err=True)
    return found
