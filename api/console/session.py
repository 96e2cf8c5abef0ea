"""``/sessions/{id}``: one session: what was said and done, where its KV is and why, and its relatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse

from agentstate import answers, documents
from agentstate.api.console import commands, reading
from agentstate.api.console.access import Viewer, ViewerDep
from agentstate.api.console.reading import Told
from agentstate.api.console.render import HEADERS, ConsoleRoute, page
from agentstate.api.console.room import ConsoleDep
from agentstate.api.operations import view as operation_view
from agentstate.api.schemas import PathId
from agentstate.api.service import Service, ServiceDep
from agentstate.api.writes import entry as entry_view
from agentstate.errors import OperationNotFound
from agentstate.fleet import operations
from agentstate.sessions.outcomes import Order
from agentstate.sessions.verbs import Sessions

router = APIRouter(prefix="/sessions/{session_id}", include_in_schema=False, route_class=ConsoleRoute)

WIDTH, ROW, MARGIN = 1000, 18, 4
_MOST_BARS = 40
DONE = {
    "forked": "The fork was made. This is it.",
    "rewound": "The session was rewound.",
    "pinned": "The engine was told to keep the KV.",
    "unpinned": "The pin was ended.",
    "prefetch": "The engine was asked to bring the KV back.",
    "demote": "The engine was asked to let the KV leave the device first.",
}

RESTORED_FROM = {"host": "the host tier", "nvme": "the drive", "shared": "the shared store"}

Before = Annotated[int | None, Query(ge=1, lt=2**63, description="Show the entries before this one.")]


@router.get("")
async def read(
    request: Request,
    session_id: PathId,
    viewer: ViewerDep,
    console: ConsoleDep,
    service: ServiceDep,
    before: Before = None,
    done: Annotated[str, Query(max_length=20)] = "",
    operation: Annotated[str, Query(max_length=64)] = "",
) -> Response:
    sessions = service.sessions.of(viewer.tenant.id)
    placed = await console.placement(sessions, viewer.tenant.id, session_id)

    def made() -> Response:
        with service.database.read() as connection:
            told = reading.told(connection, viewer.tenant.id, session_id, before)
        return page(
            request,
            viewer,
            "session.html",
            session_id=session_id,
            told=told,
            placed=placed,
            timeline=timeline(told),
            restores=restores(placed),
            drawn=page_map(placed),
            cut=reading.PREVIEW,
            most=reading.ENTRIES,
            done=DONE.get(done),
            operation=_operation(service, viewer, operation),
            before=before,
            export=commands.export(session_id),
        )

    return await run_in_threadpool(made)


def _operation(service: Service, viewer: Viewer, operation_id: str) -> answers.Operation | None:
    if not operation_id:
        return None
    try:
        with service.database.read() as connection:
            return operation_view(operations.load(connection, operation_id, viewer.tenant.id))
    except OperationNotFound:
        return None


@router.get("/entries/{seq}")
def read_entry(session_id: PathId, seq: int, viewer: ViewerDep, service: ServiceDep) -> Response:
    """One entry, whole, as a file."""
    with service.database.read() as connection:
        found = reading.raw(connection, viewer.tenant.id, session_id, seq) if 0 < seq < 2**63 else None
    if found is None:
        raise HTTPException(404, "the session has no such entry")
    headers = _attached(f"entry-{seq}.json")
    return Response(documents.dump(entry_view(found)), media_type="application/json", headers=headers)


@router.get("/transcript.jsonl")
def read_transcript(session_id: PathId, viewer: ViewerDep, service: ServiceDep) -> Response:
    """All entries, one a line, as the API has them."""
    sessions = service.sessions.of(viewer.tenant.id)
    sessions.read(session_id)
    lines = _lines(sessions, session_id)
    return StreamingResponse(lines, media_type="application/jsonl", headers=_attached("transcript.jsonl"))


def _lines(sessions: Sessions, session_id: str) -> Iterator[str]:
    after: str | None = None
    while True:
        found = sessions.entries(session_id, after=after, limit=1000, order=Order.ASCENDING)
        for one in found.entries:
            yield documents.dump(entry_view(one)) + "\n"
        if not found.has_more or not found.entries:
            return
        after = found.entries[-1].id


def _attached(name: str) -> dict[str, str]:
    return {**HEADERS, "Content-Disposition": f'attachment; filename="{quote(name)}"'}


# --- the timeline, drawn here so that a browser needs no script for it


@dataclass(frozen=True)
class Bar:
    """A tool call on the timeline, in the drawing's units: how long it took, or takes, and how long was expected."""

    x: float
    y: int
    width: float
    expected: float | None
    state: str
    label: str


def restores(placed: answers.Placement) -> list[tuple[answers.Restore, str, float | None]]:
    """What was restored, the newest first: with the tiers in words, and bytes per second."""
    return [
        (
            one,
            ", ".join(f"{tokens:,} from {RESTORED_FROM.get(tier, tier)}" for tier, tokens in one.tokens.items()),
            one.bytes / one.seconds if one.seconds > 0 else None,
        )
        for one in reversed(placed.restores)
    ]


@dataclass(frozen=True)
class Lane:
    """A tier in the drawing of the page map: its name, its place from above, and the parts that it has: place, width,
    and the extent."""

    tier: str
    y: int
    parts: Sequence[tuple[float, float, str]]


def page_map(placed: answers.Placement) -> tuple[int, int, Sequence[Lane]] | None:
    """The tokens, the height and the lanes of the page map; None where there is none. Tokens are to scale."""
    length = sum(part.tokens for part in placed.page_map)
    if not length:
        return None
    scale = WIDTH / length
    lanes = []
    for number, (tier, of) in enumerate(_LANES):
        has = [(part, of(part)) for part in placed.page_map]
        parts = [
            (round(part.first * scale, 1), max(1.0, round(part.tokens * scale, 1)), extent)
            for part, extent in has
            if extent is not None
        ]
        lanes.append(Lane(tier, number * ROW, parts))
    return length, len(lanes) * ROW, lanes


_LANES: Sequence[tuple[str, Callable[[answers.PagesPart], str | None]]] = (
    ("device", lambda part: "" if part.device else None),
    ("host", lambda part: "" if part.host else None),
    ("drive", lambda part: part.extent),
    ("shared store", lambda part: part.shared_extent),
)


@dataclass(frozen=True)
class Timeline:
    """``marks`` are entries: their places, kinds and labels. ``gaps`` are pauses."""

    began_us: int
    ended_us: int
    height: int
    marks: Sequence[tuple[float, str, str]]
    bars: Sequence[Bar]
    gaps: Sequence[tuple[float, float]]


def timeline(told: Told) -> Timeline | None:
    """Of what is shown; None if that is nothing. Time is to scale."""
    if not told.previews:
        return None
    calls = told.calls[-_MOST_BARS:]
    began_us = min([told.previews[0].created_us, *(call.claimed_us for call in calls)])
    open_now = any(call.finished_us is None for call in calls) and not told.later
    ends = [told.previews[-1].created_us, *(call.finished_us or call.claimed_us for call in calls)]
    ended_us = max([*ends, told.time_us] if open_now else ends)
    scale = (WIDTH - 2 * MARGIN) / max(1, ended_us - began_us)

    def at(time_us: int) -> float:
        return round(MARGIN + (time_us - began_us) * scale, 1)

    bars = []
    for number, call in enumerate(calls):
        end_us = call.finished_us or (ended_us if open_now else call.claimed_us)
        expected = None if call.expected_s is None else round(min(WIDTH, call.expected_s * 1_000_000 * scale), 1)
        width = max(2.0, round(at(end_us) - at(call.claimed_us), 1))
        bars.append(Bar(at(call.claimed_us), 2 * ROW + number * ROW, width, expected, call.state, call.name))
    marks = [(at(one.created_us), one.kind, f"{one.seq} {one.kind}") for one in told.previews]
    by_seq = {one.seq: one.created_us for one in told.previews}
    gaps = [(at(pause.began_us), at(by_seq[pause.seq]) - at(pause.began_us)) for pause in told.pauses]
    return Timeline(began_us, ended_us, 2 * ROW + len(bars) * ROW + MARGIN, marks, bars, gaps)
