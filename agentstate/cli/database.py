"""`agentstate db`: the database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agentstate.cli import loading
from agentstate.cli.output import confirm, say, show_line

if TYPE_CHECKING:
    from agentstate.settings import Settings
    from agentstate.sql.database import Database

app = loading.group()


@contextmanager
def opened(settings: Settings) -> Iterator[Database]:
    """The database, with this version's schema; a missing SQLite database is created."""
    from agentstate.sql.database import Database

    loading.room("agentstate.api.server").prepare(settings)
    database = Database(settings.sqlalchemy_url)
    try:
        yield database
    finally:
        database.close()


@app.command()
def upgrade() -> None:
    """Bring the database to this version's schema."""
    loading.room("agentstate.api.server").migrate(loading.settings())


@app.command("gc")
def collect_garbage() -> None:
    """Delete rows that no session reaches, as a running service does periodically."""
    from agentstate.sessions.collection import collect

    now = loading.settings()
    with opened(now) as database:
        collected = collect(database, expired_after_s=now.expired_retention_s)
    show_line(", ".join(f"{count:,} {name}" for name, count in vars(collected).items()))


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="A new file. It has the secrets of the installation in it.")],
) -> None:
    """Copy the database to a file, as it is at one moment, while services and engines use it. PostgreSQL: with
    pg_dump."""
    from agentstate.cli import copies

    copies.backup(loading.settings().sqlalchemy_url, file)
    say(f"{file} is written and checked")


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="What `backup` has written.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Put a backup in the place of the database, while no service and no engine uses it. What is there now is lost; of
    SQLite a backup of it is written beside it first. PostgreSQL: with pg_restore."""
    from agentstate.cli import copies, launcher

    settings = loading.settings()
    url = settings.sqlalchemy_url
    copies.refuse_while_served(url, f"http://{launcher.reached(settings.host)}:{settings.port}")
    about = copies.before_restore(url, file, settings.engine_timeout_s)
    if about is not None:
        confirm(f"{about}: replace them by {file}?", yes=yes)
    kept = copies.restore(url, file)
    say("the database is restored" + (f"; {kept} has what was there before" if kept else ""))
