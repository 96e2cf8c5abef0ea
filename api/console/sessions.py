"""``/sessions``: the tenant's sessions, searched, filtered and ordered; also as CSV and as JSON lines."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import fields
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from agentstate.api.console import reading
from agentstate.api.console.access import Viewer, ViewerDep
from agentstate.api.console.reading import Listed, ListPage, Sort, State
from agentstate.api.console.render import HEADERS, ConsoleRoute, page
from agentstate.api.console.room import ConsoleDep
from agentstate.api.service import Service, ServiceDep
from agentstate.sql.database import instant

router = APIRouter(include_in_schema=False, route_class=ConsoleRoute)

# Of one file.
MOST_ROWS = 10_000
_FORMULA = ("=", "+", "-", "@", "\t", "\r")

StateQuery = Annotated[State | None, Query()]
SortQuery = Annotated[Sort, Query()]
SearchQuery = Annotated[str, Query(max_length=1024, pattern=r"^[^\x00]*$")]
CursorQuery = Annotated[str | None, Query(max_length=3000)]


@router.get("/sessions")
async def read(
    request: Request,
    viewer: ViewerDep,
    console: ConsoleDep,
    service: ServiceDep,
    state: Annotated[str, Query(max_length=20)] = "",
    sort: SortQuery = Sort.NEWEST,
    search: SearchQuery = "",
    cursor: CursorQuery = None,
    done: Annotated[str, Query(max_length=20)] = "",
) -> Response:
    """``state`` is empty for all: a form sends it so."""
    counts = await console.snapshots.counts(viewer.tenant.id)
    wanted = State(state) if state in set(State) else None

    def made() -> Response:
        found = _listed(service, viewer, wanted, sort, search, cursor)
        return page(
            request,
            viewer,
            "sessions.html",
            found=found,
            counts=counts,
            caps=(reading.COUNTED, reading.COUNTED_LAPSED),
            state=wanted,
            sort=sort,
            search=search,
            cursor=cursor,
            states=list(State),
            most_rows=MOST_ROWS,
            done="The session was deleted." if done == "deleted" else None,
        )

    return await run_in_threadpool(made)


def _listed(
    service: Service, viewer: Viewer, state: State | None, sort: Sort, search: str, cursor: str | None
) -> ListPage:
    with service.database.read() as connection:
        return reading.listed(
            connection, viewer.tenant.id, state=state, sort=sort, search=search.strip(), cursor=cursor
        )


@router.get("/sessions.{kind}")
def file(
    kind: Literal["csv", "jsonl"],
    viewer: ViewerDep,
    service: ServiceDep,
    state: Annotated[str, Query(max_length=20)] = "",
    sort: SortQuery = Sort.NEWEST,
    search: SearchQuery = "",
) -> Response:
    """The list as a file, up to ``MOST_ROWS`` sessions: ``csv`` for spreadsheets, ``jsonl`` exactly."""
    wanted = State(state) if state in set(State) else None
    rows: list[dict[str, Any]] = []
    cursor: str | None = None
    while len(rows) < MOST_ROWS:
        found = _listed(service, viewer, wanted, sort, search, cursor)
        rows += map(_row, found.sessions)
        if (cursor := found.next) is None:
            break
    if kind == "jsonl":
        text, media_type = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "application/jsonl"
    else:
        text, media_type = _csv(rows), "text/csv"
    headers = {**HEADERS, "Content-Disposition": f'attachment; filename="sessions.{kind}"'}
    return Response(text, media_type=media_type, headers=headers)


def _row(one: Listed) -> dict[str, Any]:
    row = dict(vars(one))
    for name in ("turned_us", "lease_us", "expires_us"):
        at_us = row.pop(name)
        row[name.removesuffix("_us") + "_at"] = None if not at_us else instant(at_us).isoformat()
    return {**row, "state": str(one.state)}


def _csv(rows: list[dict[str, Any]]) -> str:
    """Texts that a spreadsheet would take for formulas begin with a quote; numbers are as they are."""
    names = list(rows[0]) if rows else [field.name for field in fields(Listed)]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(names)
    for row in rows:
        writer.writerow([safe(value) for value in row.values()])
    return text.getvalue()


def safe(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
