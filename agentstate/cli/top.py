"""`agentstate top`: what there is and what is wrong, live in a terminal (`top_app`), or once for scripts."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from agentstate.cli import top_rows
from agentstate.cli.output import say, show_json, show_line, show_table
from agentstate.cli.top_rows import Choice
from agentstate.errors import RequestRefused, ServiceUnreachable, SettingsError, Unauthenticated

if TYPE_CHECKING:
    from agentstate.answers import Overview
    from agentstate.client import Client


def run(
    url: str, api_key: str | None, choice: Choice, *, once: bool, as_json: bool, every_s: float, read_only: bool
) -> None:
    """Show it until the user has seen enough, or ``once``. Raises SettingsError, and what the client raises."""
    if not once and not (sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"):
        raise typer.BadParameter("there is no terminal to draw on: say --once or --json", param_hint="--once")
    if not once:
        try:
            from agentstate.cli.top_app import Top
        except ImportError as error:
            if not (error.name or "").startswith("textual"):
                raise
            raise SettingsError(
                "agentstate top needs Textual: pip install 'agentstate[top]'. `agentstate top --once` does without"
            ) from None
        from agentstate.client import AsyncClient

        # What is wrong from the beginning is an error like any other.
        _first(url, api_key)
        Top(lambda: AsyncClient(url, api_key=api_key, retries=0), url, choice, every_s, read_only=read_only).run(
            mouse=False
        )
        return
    from agentstate.client import Client

    with Client(url, api_key=api_key) as client:
        _show_once(client, choice, as_json)


def _first(url: str, api_key: str | None) -> None:
    from agentstate.client import Client

    with Client(url, api_key=api_key) as client:
        _asked(client)


def _asked(client: Client) -> Overview:
    try:
        return client.overview()
    except (ServiceUnreachable, Unauthenticated) as error:
        raise type(error)(f"{error}. {top_rows.remedy(error)}") from error
    except RequestRefused as error:
        raise RequestRefused(f"{error}. {top_rows.remedy(error)}", status=error.status) from error


def _show_once(client: Client, choice: Choice, as_json: bool) -> None:
    overview = _asked(client)
    listed = client.session_overviews(state=choice.state, sort=choice.sort, search=choice.search).data
    if as_json:
        sessions = [one.model_dump(mode="json") for one in listed]
        show_json({"overview": overview.model_dump(mode="json"), "sessions": sessions})
        return
    show_line(f"{overview.taken_at:%Y-%m-%d %H:%M:%SZ}  tenant {overview.tenant}  {top_rows.counts(overview)}")
    for alarm in overview.alarms:
        show_line(f"! {alarm}")
    tables: list[tuple[Sequence[str], Sequence[Sequence[Any]]]] = [
        (top_rows.TIER_COLUMNS, top_rows.tier_rows(overview.tiers)),
        (top_rows.ENGINE_COLUMNS, top_rows.engine_rows(overview)),
        (top_rows.TENANT_COLUMNS, top_rows.tenant_rows(overview)),
        (top_rows.SESSION_COLUMNS, [top_rows.session_row(one, overview.taken_at) for one in listed]),
    ]
    for header, rows in tables:
        if rows:
            print()
            cells = [[top_rows.cell(name, value) for name, value in zip(header, row, strict=True)] for row in rows]
            show_table(header, cells, right=top_rows.NUMBERS)
    if not listed:
        say("no session is as asked")
