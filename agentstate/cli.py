"""The command line: `agentstate serve | engine | demo | db | pages | settings | version`."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from agentstate import __version__, launcher
from agentstate.commands.pages import pages
from agentstate.errors import AgentStateError, EngineError
from agentstate.settings import Settings

app = typer.Typer(
    help="Suspendable LLM agents on SGLang. Settings are AGENTSTATE_* variables; `agentstate settings` lists them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
db = typer.Typer(help="The database.", no_args_is_help=True)
app.add_typer(db, name="db")
app.add_typer(pages, name="pages")

_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


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


@pages.command(context_settings={**_PASSED_ON, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Measure this store against the disk and against other ways to keep pages."""
    settings = Settings()
    # What it is compared with lives where SGLang does. Without that, they are left out.
    try:
        python = launcher.engine_python(settings)
    except EngineError:
        if settings.engine_python is not None:
            raise
        python = sys.executable
    os.execve(python, [python, "-m", "benchmarks.pages", *context.args], dict(os.environ))


@app.command(
    context_settings=_PASSED_ON,
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
