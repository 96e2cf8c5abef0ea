"""``/console/stream``: one stream a browser, which says that there is something new, and not what.

Each event means that a page is worth fetching again; what comes after a break is fetched the same way. Before each
event the viewer is looked up again: when the key is revoked, its role changes or the viewer signs out, the stream says
so and ends. It also ends with the service.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import suppress

from fastapi import APIRouter, Request
from starlette.responses import StreamingResponse

from agentstate.api.console.access import NotSignedIn, Viewer, ViewerDep, viewer_of
from agentstate.api.console.assets import BUILD
from agentstate.api.console.render import ConsoleRoute
from agentstate.errors import AgentStateError, DatabaseError

# Silence that a browser takes for a broken stream is longer.
HEARTBEAT_S = 5.0

logger = logging.getLogger(__name__)

router = APIRouter(include_in_schema=False, route_class=ConsoleRoute)


@router.get("/console/stream")
async def read(request: Request, viewer: ViewerDep) -> StreamingResponse:
    # A proxy that gathers events, or compresses them, would hold them back.
    headers = {"Cache-Control": "no-store, no-transform", "X-Accel-Buffering": "no"}
    return StreamingResponse(_events(request, viewer), media_type="text/event-stream", headers=headers)


async def _events(request: Request, viewer: Viewer) -> AsyncIterator[str]:
    snapshots = request.app.state.console.snapshots
    yield _event("hello", {"build": BUILD})
    with snapshots.watch() as changed:
        while not snapshots.closing:
            news = True
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await changed.wait()
            except TimeoutError:
                news = False
            changed.clear()
            if snapshots.closing:
                break
            try:
                now = await viewer_of(request)
            except DatabaseError as error:
                # Nothing new is shown, and nobody is asked to sign in: the page tells how old it is.
                logger.warning("a viewer of the console is not looked up for now: %s", error)
                yield ": the database does not answer\n\n"
                continue
            except (NotSignedIn, AgentStateError):
                now = None
            if now is None or (now.tenant.id, now.role, now.key_id) != (viewer.tenant.id, viewer.role, viewer.key_id):
                yield _event("signed-out", {})
                return
            with suppress(DatabaseError):
                if news:
                    newest = await snapshots.newest()
                    yield _event("news", {"number": newest.number, "build": BUILD})
                    continue
            yield ": still here\n\n"
    yield _event("ending", {})


def _event(kind: str, data: dict[str, object]) -> str:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"
