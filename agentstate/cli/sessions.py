"""`agentstate sessions`: what a running service says of sessions."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from agentstate.errors import SettingsError
from agentstate.settings import Settings

if TYPE_CHECKING:
    from agentstate.answers import Placement
    from agentstate.client import Client

# How many of the newest decisions are shown.
_DECISIONS = 5

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
    with _client(url, api_key) as client:
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


@sessions.command("pin")
def pin_kv(
    session_id: Annotated[str, typer.Argument(help="The session's id.")],
    lasting: Annotated[str, typer.Option("--for", help="For how long: 90s, 30m, 2h, 1d.")],
    tier: Annotated[str, typer.Option(help="Where it stays: device, host or nvme.")] = "device",
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Let a session's KV stay where it is for a time, in place of its pin before."""
    with _client(url, api_key) as client:
        found = client.pin(session_id, ttl_s=_seconds(lasting), tier=tier)
    until = found.expires_at.isoformat(timespec="seconds")
    print(f"{found.state}: {found.tokens:,} tokens, {found.bytes / 1e6:,.1f} MB on {found.tier} until {until}")


@sessions.command("unpin")
def unpin_kv(
    session_id: Annotated[str, typer.Argument(help="The session's id.")], url: Url = None, api_key: ApiKey = None
) -> None:
    """End a session's pin, if it has one."""
    with _client(url, api_key) as client:
        client.unpin(session_id)


def _client(url: str | None, api_key: str | None) -> Client:
    from agentstate.client import Client

    settings = Settings()
    return Client(url or f"http://{settings.host}:{settings.port}", api_key=api_key)


def _seconds(text: str) -> float:
    """The seconds of ``90``, ``90s``, ``30m``, ``2h`` or ``1d``. Raises SettingsError."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd]?)", text, re.ASCII)
    if found is None or not float(found[1]):
        raise SettingsError(f"{text!r} is no time: 90s, 30m, 2h, 1d")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


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
        because = f", {fetch.reason}" if fetch.reason else ""
        lines.append(f"fetched {fetch.ago_s:,.1f} s ago, {fetch.tokens:,} tokens: {fetch.outcome}{because}")
    if found.pin is not None:
        lines.append(f"pinned to {found.pin.tier} for {found.pin.rest_s:,.0f} s more")
    if found.left_tokens:
        lines.append(f"{found.left_tokens:,} tokens on the device that it has left: they leave first")
    if found.account is not None:
        held = []
        for tier, of_tier in found.account.tiers.items():
            limit = "" if of_tier.limit is None else f" of {of_tier.limit / 1e6:,.1f}"
            if of_tier.bytes is not None:
                held.append(f"{of_tier.bytes / 1e6:,.1f}{limit} MB on {tier}")
        lines.append(f"charged to {found.account.name}: {', '.join(held)}")
    for made in found.decisions[-_DECISIONS:]:
        lines.append(f"{made.at:%H:%M:%S} {made.decision}, {made.tokens:,} tokens: {made.outcome}")
    return [*lines, found.next] if found.next else lines
