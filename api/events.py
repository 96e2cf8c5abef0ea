"""``/v1/sessions/{id}/events``: what happens to a session, as server-sent events.

``entry`` events come once each, in order, with their ``seq`` as id: a disconnected client continues with
``Last-Event-ID``. ``session`` events, without an id, carry the session's state after a change; changes in quick
succession share one event. ``rewind`` says that the entries after its ``seq``, which is also its id, were taken back,
even while the client was away.

The stream ends with the session, with an ``end`` event, and with the service. If the database does not answer, the
stream waits for it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Query
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from agentstate import answers, documents
from agentstate.api.problems import COMMON, responses
from agentstate.api.schemas import MAX_NUMBER, PathId
from agentstate.api.service import Service, ServiceDep, SessionsDep
from agentstate.api.sessions import view
from agentstate.api.writes import entry
from agentstate.errors import AgentStateError, DatabaseError
from agentstate.sessions.verbs import Sessions

KEEP_ALIVE_S = 15.0
RETRY_S = 1.0
PAGE = 100

logger = logging.getLogger(__name__)

router = APIRouter(
    prefix="/v1/sessions/{session_id}",
    tags=["events"],
    responses={**COMMON, **responses(_404="No such session", _410="Expired, or Last-Event-ID is none of its entries")},
)

Seq = Annotated[int, Header(ge=0, lt=MAX_NUMBER, description="The last entry that the client has seen.")]


@router.get(
    "/events",
    operation_id="watch_session",
    response_class=StreamingResponse,
    responses={200: {"description": "Events, until either side ends it", "content": {"text/event-stream": {}}}},
)
async def events(
    session_id: PathId,
    service: ServiceDep,
    sessions: SessionsDep,
    last_event_id: Seq = 0,
    after: Annotated[
        int, Query(ge=0, lt=MAX_NUMBER, description="Like Last-Event-ID, for a client's first request.")
    ] = 0,
) -> StreamingResponse:
    """Follow a session from its beginning, or from an entry on."""
    seq = last_event_id or after
    session = await run_in_threadpool(sessions.seen, session_id, seq)
    return StreamingResponse(
        _stream(service, sessions, session_id, session.uid, seq),
        media_type="text/event-stream",
        # A proxy would gather events.
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _stream(service: Service, sessions: Sessions, session_id: str, uid: str, seq: int) -> AsyncIterator[str]:
    revision = None
    with service.changes.watch(uid) as watch:
        while not watch.closing:
            try:
                since = await run_in_threadpool(sessions.since, session_id, seq, PAGE)
            except DatabaseError as error:
                logger.warning("what happens to session %s is not seen for now: %s", session_id, error)
                yield ": the database does not answer\n\n"
                await watch.wait(RETRY_S)
                continue
            except AgentStateError as error:
                yield _event("end", f'{{"reason": "{error.slug()}"}}')
                return
            session, page = since.session, since.page
            if session.uid != uid:
                yield _event("end", '{"reason": "session-not-found"}')
                return
            if since.kept < seq:
                seq = since.kept
                yield _event("rewind", answers.Rewound(session_id=session_id, seq=seq).model_dump_json(), seq)
            for item in page.entries:
                seq = item.seq
                yield _event("entry", documents.dump(entry(item)), item.seq)
            if page.has_more:
                continue
            if session.revision != revision:
                revision = session.revision
                yield _event("session", view(session).model_dump_json())
            if not await watch.wait(KEEP_ALIVE_S):
                yield ": still here\n\n"


def _event(kind: str, data: str, event_id: int | None = None) -> str:
    number = "" if event_id is None else f"id: {event_id}\n"
    return f"event: {kind}\n{number}data: {data}\n\n"
