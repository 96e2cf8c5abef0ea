"""What `agentstate top` shows, as rows for the screen and for tables that are printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import typer

from agentstate.errors import AgentStateError, NotAgentState, RequestRefused, ServiceUnreachable, Unauthenticated

if TYPE_CHECKING:
    from agentstate.answers import Held, Overview, SessionOverview

SORTS = {
    "newest": "the newest turn first",
    "oldest": "the longest wait first",
    "id": "by id",
    "-id": "by id, downwards",
}
STATES = ("running", "lapsed", "suspended", "idle")
_COUNTED, _COUNTED_LAPSED = 10_000, 1_000
SESSION_COLUMNS = ("state", "last turn", "waits for", "calls", "tokens", "bytes", "id", "model")
ENGINE_COLUMNS = ("state", "ranks", "restores/s", "restored/s", "stored", "engine", "model", "id")
TIER_COLUMNS = ("tier", "bytes", "limit")
TENANT_COLUMNS = ("tenant", "sessions", "at most", "device", "host", "nvme", "KV group")
NUMBERS = {
    "calls",
    "tokens",
    "bytes",
    "ranks",
    "restores/s",
    "restored/s",
    "stored",
    "limit",
    "sessions",
    "at most",
    "device",
    "host",
    "nvme",
}


@dataclass(frozen=True)
class Choice:
    """Which sessions are shown, and in which order."""

    state: str | None = None
    sort: str = "newest"
    search: str = ""

    def __post_init__(self) -> None:
        if self.state not in (None, *STATES):
            raise typer.BadParameter(f"{self.state}: {', '.join(STATES)}", param_hint="--state")
        if self.sort not in SORTS:
            raise typer.BadParameter(f"{self.sort}: {', '.join(SORTS)}", param_hint="--sort")


def remedy(error: AgentStateError) -> str:
    """What to do about an error, in a sentence; empty if there is nothing to say."""
    if isinstance(error, NotAgentState):
        return "Say where the service is: --url, or AGENTSTATE_URL."
    if isinstance(error, ServiceUnreachable):
        return "Start the service with `agentstate serve`, or say where it is: --url, or AGENTSTATE_URL."
    if isinstance(error, Unauthenticated):
        return "Give a key with --api-key, or in AGENTSTATE_API_KEY."
    if isinstance(error, RequestRefused) and error.status == 404:
        return "The service is of an earlier release, which has no overview: upgrade it."
    return ""


def counts(overview: Overview) -> str:
    """How many sessions there are, and what they do."""
    of = overview.sessions
    return (
        f"{_capped(of.all, _COUNTED)} sessions, {_capped(of.running, _COUNTED)} running, "
        f"{_capped(of.lapsed, _COUNTED_LAPSED)} lapsed"
    )


def _capped(count: int, cap: int) -> str:
    return f"{cap:,}+" if count > cap else f"{count:,}"


def session_row(one: SessionOverview, now: datetime) -> list[Any]:
    waited_s = max(0.0, (now - one.turned_at).total_seconds())
    return [one.state, waited_s, one.waits_for, one.open_calls, one.tokens, one.bytes, one.id, one.model]


def engine_rows(overview: Overview) -> list[list[Any]]:
    rows = []
    for one in overview.engines:
        state = "lost" if not one.live else "off" if one.off else "silent" if one.silent else "live"
        rates = (one.restores_per_s, one.restored_bytes_per_s)
        rows.append([state, one.ranks, *rates, one.stored_bytes, one.base_url, one.model, one.id])
    return rows


def tier_rows(tiers: Mapping[Any, Held]) -> list[list[Any]]:
    return [[name, held.bytes, held.limit] for name, held in tiers.items()]


def tenant_rows(overview: Overview) -> list[list[Any]]:
    return [
        [one.id, one.sessions, one.session_limit, *(held.bytes for held in one.tiers.values()), one.kv_group]
        for one in overview.tenants or ()
    ]


_SIZES = {"bytes", "limit", "restored/s", "stored", "device", "host", "nvme"}


def cell(name: str, value: Any) -> str:
    """A value of a column, for people."""
    if value is None:
        return "–"
    if name == "last turn":
        return ago(value)
    if name in _SIZES:
        return size(value)
    return f"{value:,.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def size(n_bytes: float) -> str:
    """``1.5 GB``, with decimal units."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:,.1f} {unit}"
    return f"{n_bytes:,.0f} B"


def ago(seconds: float) -> str:
    """``41 s``, ``3 min``, ``2 h``, ``3 d``."""
    for unit, of_unit in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= of_unit:
            return f"{int(seconds // of_unit)} {unit}"
    return f"{int(seconds)} s"
