"""The command line: its commands, and what becomes of their errors.

A group of commands is imported when it is used (`loading`), and so is what a command here does. An exit status says
what happened: 0 done; 1 it failed, or a check found something; 2 wrong usage; 3 what it needs cannot be reached; 4 it
may not do that.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from agentstate import __version__
from agentstate.cli import loading
from agentstate.cli.output import DENIED, ApiKey, AsJson, Url, show_error, show_json, show_table, status_of
from agentstate.errors import AgentStateError

_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

app = loading.group(
    help="Suspendable LLM agents on SGLang. Settings are AGENTSTATE_* variables; `agentstate settings` lists them."
)
GROUPS = {
    "sessions": ("agentstate.cli.sessions", "Sessions, as a running service knows them."),
    "engines": ("agentstate.cli.engines", "Engines, for operators: these commands need the database."),
    "pages": ("agentstate.cli.pages", "The page directory, and the shared store."),
    "db": ("agentstate.cli.database", "The database."),
    "keys": ("agentstate.cli.keys", "API keys. Once there is one, every call needs one."),
    "tenants": (
        "agentstate.cli.tenants",
        "Tenants: the owners of sessions, each with its own keys and limits.",
    ),
    "bench": ("agentstate.cli.bench", "Reproduce the documentation's figures on this machine."),
}
for _name, (_module, _help) in GROUPS.items():
    loading.add_group(app, _name, _module, _help)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


@app.command()
def settings(as_json: AsJson = False) -> None:
    """List every setting: its variable, its current value and its meaning."""
    now = loading.settings()
    rows = []
    for name, field in type(now).model_fields.items():
        value = getattr(now, name)
        hidden = name == "database_url" and "@" in str(value)
        shown = "…" if hidden else str(value)
        rows.append({"variable": f"AGENTSTATE_{name.upper()}", "value": shown, "meaning": field.description})
    if as_json:
        show_json(rows)
    else:
        show_table(("variable", "value", "meaning"), [list(row.values()) for row in rows])


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on. [AGENTSTATE_HOST]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. [AGENTSTATE_PORT]")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that answer requests. [AGENTSTATE_WORKERS]")] = None,
) -> None:
    """Run the session service."""
    asked = {"host": host, "port": port, "workers": workers}
    given = {name: value for name, value in asked.items() if value is not None}
    loading.room("agentstate.api.server").run(loading.settings(**given))


class _Engine(TyperCommand):
    """Its help ends with the settings that an engine reads."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from agentstate.settings import ENGINE_LIMITS, ENGINE_PLACES, Settings

        lines = ["Example: agentstate engine --model-path Qwen/Qwen2.5-7B-Instruct --port 30000"]
        lines.append("Settings, with their values in `agentstate settings`:")
        lines += (
            f"AGENTSTATE_{name.upper()}: {Settings.model_fields[name].description}"
            for name in ENGINE_PLACES + ENGINE_LIMITS
        )
        self.epilog = "\n\n".join(lines)
        super().format_epilog(ctx, formatter)


@app.command(cls=_Engine, context_settings=_PASSED_ON)
def engine(
    context: typer.Context,
    check: Annotated[
        bool, typer.Option("--check", help="Start nothing: print which flags are tested with AgentState, or refused.")
    ] = False,
) -> None:
    """Start SGLang with AgentState. Every other argument is passed through to SGLang. The page directory, the staging
    memory and the database are settings, in environment variables."""
    from agentstate.cli import launcher

    if check:
        command = launcher.check_command(loading.settings(), context.args)
        os.execve(command[0], command, dict(os.environ))
    command, environment = launcher.engine_command(loading.settings(), context.args, os.environ)
    os.execve(command[0], command, environment)


@app.command(context_settings=_PASSED_ON)
def up(context: typer.Context) -> None:
    """Run the service and an engine on this machine, with one log. All arguments are SGLang's (`agentstate up
    --model-path MODEL`); the service has its settings from the environment. Ctrl-C ends both in order, a second one at
    once."""
    raise typer.Exit(loading.room("agentstate.cli.up").run(loading.settings(), context.args))


@app.command(context_settings={"allow_extra_args": True})
def doctor(
    context: typer.Context,
    only: Annotated[str, typer.Option(help="These checks alone: names with commas between them.")] = "",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also what is as it should be.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 also for what is only to know.")] = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that each check may take.")] = 30.0,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Find what is wrong on this machine and in this installation, and say what to do. Changes nothing: of the drive it
    measures, in a file without a name. Behind `--`, SGLang's flags are checked as well. Exit status: 0 nothing is to be
    fixed, 1 something is, 3 something cannot be reached, 4 something may not be used."""
    raise typer.Exit(
        loading.room("agentstate.cli.doctor").run(
            loading.settings(),
            context.args,
            url,
            api_key,
            only=only,
            timeout_s=timeout,
            strict=strict,
            verbose=verbose,
            as_json=as_json,
        )
    )


@app.command()
def top(
    once: Annotated[bool, typer.Option("--once", help="Print it once, as tables. Needs no Textual.")] = False,
    state: Annotated[
        str | None, typer.Option(help="Only sessions that are running, lapsed, suspended or idle.")
    ] = None,
    sort: Annotated[str, typer.Option(help="Order of sessions: newest or oldest turn first, id, or -id.")] = "newest",
    search: Annotated[str, typer.Option(help="Only sessions whose ids begin with this.")] = "",
    every: Annotated[float, typer.Option(min=2.0, help="Seconds between two looks.")] = 2.0,
    read_only: Annotated[bool, typer.Option("--read-only", help="Offer nothing that changes something.")] = False,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show sessions, engines, tiers and, to administrators, tenants, live in this terminal. Keys are at its foot.
    `--once`, and `--json`, print it once, with 50 sessions."""
    from agentstate.cli import top as shown
    from agentstate.cli.top_rows import Choice

    here = loading.settings()
    choice = Choice(state, sort, search)
    where = url or f"http://{here.host}:{here.port}"
    shown.run(where, api_key, choice, once=once or as_json, as_json=as_json, every_s=every, read_only=read_only)


@app.command()
def demo(
    nodes: Annotated[
        int, typer.Option(min=1, max=2, help="2: the agent's node dies with its drive, and it resumes on another.")
    ] = 1,
    report: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Suspend an agent, kill its engine, and resume the agent from NVMe, or on another node from a shared store: for
    real, on this machine."""
    run = loading.room(f"agentstate.cli.{'demo' if nodes == 1 else 'demo_nodes'}").run
    raise typer.Exit(0 if run(loading.settings(), report) else 1)


def main() -> None:
    try:
        app(prog_name="agentstate")
    except PermissionError as error:
        show_error(error, "permission-error", retryable=False)
        sys.exit(DENIED)
    except AgentStateError as error:
        show_error(error, error.slug(), retryable=error.retryable)
        sys.exit(status_of(error))
