"""`agentstate sessions`: what a running service says of sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from agentstate.settings import Settings

if TYPE_CHECKING:
    from agentstate.answers import Placement

sessions = typer.Typer(help="Sessions, as a running service knows them.", no_args_is_help=True)

Url = Annotated[
    str | None, typer.Option(envvar="AGENTSTATE_URL", help="The service. By default the one that `serve` starts here.")
]
ApiKey = Annotated[str | None, typer.Option(envvar="AGENTSTATE_API_KEY", help="A key of the session's tenant.")]


@sessions.command("kv")
def show_kv(
    session_id: Annotated[str, typer.Argument(help="The session's id.")],
    url: Url = None,
    api_key: ApiKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show where a session's KV is, what the session waits for, and what would move its KV."""
    from agentstate.client import Client

    settings = Settings()
    with Client(url or f"http://{settings.host}:{settings.port}", api_key=api_key) as client:
        found = client.kv(session_id)
    if as_json:
        print(found.model_dump_json(indent=2))
        return
    table = Table("tier", Column("tokens", justify="right"), Column("MB", justify="right"))
    for name, tier in found.tiers.items():
        table.add_row(name, f"{tier.tokens:,}", f"{tier.bytes / 1e6:,.1f}")
    console = Console(highlight=False)
    if found.tiers:
        console.print(table)
    for line in _lines(found):
        console.print(line, markup=False)


def _lines(found: Placement) -> list[str]:
    lines = [f"engine: {found.engine or 'none'}"]
    if (wait := found.wait) is not None:
        kind = f" for a {wait.kind}" if wait.kind in ("tool", "person") else ""
        said = {"served": "a request of it is served", "released": "nobody is expected back"}
        line = said.get(wait.state, f"waits{kind}") + f" since {wait.waited_s:,.1f} s"
        if wait.rest_p50_s is not None:
            late = "later" if wait.rest_p90_s is None else f"in {wait.rest_p90_s:,.1f} s"
            line += f"; is back in {wait.rest_p50_s:,.1f} s (one in two), {late} (nine in ten)"
        lines.append(line)
    if found.index is not None and found.place is not None:
        lines.append(f"worth {found.index:.3g} a byte and second on the device: place {found.place}")
    if (fetch := found.fetch) is not None:
        lines.append(f"fetched {fetch.ago_s:,.1f} s ago, {fetch.tokens:,} tokens: {fetch.outcome}")
    return [*lines, found.next] if found.next else lines
