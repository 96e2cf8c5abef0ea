"""``/v1/sessions/{id}/forks`` and ``…/rewind``: branch a history, or return to an earlier entry. Nothing is copied."""

from __future__ import annotations

from fastapi import APIRouter, Response, status

from agentstate import answers
from agentstate.api.direct import DirectRoute
from agentstate.api.entries import proof
from agentstate.api.problems import COMMON, responses
from agentstate.api.schemas import ForkSession, PathId, RewindSession
from agentstate.api.service import SeenDep, SessionsDep
from agentstate.api.sessions import CONDITIONAL, GONE, LINKS, changed, created
from agentstate.api.writes import WriteDep

router = APIRouter(
    prefix="/v1/sessions/{session_id}",
    tags=["branches"],
    responses={**COMMON, **GONE, **CONDITIONAL},
    route_class=DirectRoute,
)


@router.post(
    "/forks",
    status_code=status.HTTP_201_CREATED,
    response_model=answers.Session,
    operation_id="fork_session",
    responses={
        201: {"links": {name: LINKS[name] for name in ("read_session", "resume_session", "delete_session")}},
        **responses(_409="The id is taken, or the Idempotency-Key in use"),
    },
)
async def fork(
    session_id: PathId, body: ForkSession, revision: SeenDep, write: WriteDep, sessions: SessionsDep
) -> Response:
    """Create a session that shares this one's history up to an entry. It has no lease, and has pending tool calls only
    if it branches at the head."""
    answer = await write.carry_out(
        lambda _: created(
            sessions.fork(
                session_id,
                revision,
                at=body.at,
                fork_id=body.id,
                metadata=body.metadata,
                expires_in_s=body.expires_in_s,
            )
        )
    )
    return answer.response()


@router.post(
    "/rewind",
    response_model=answers.Session,
    operation_id="rewind_session",
    responses=responses(_409="Someone runs it, or a tool call is being executed"),
)
def rewind(
    session_id: PathId, body: RewindSession, revision: SeenDep, write: WriteDep, sessions: SessionsDep
) -> Response:
    """Make an entry the head again. Needs the lease while a turn is running."""
    key = None if body.lease is None else proof(body.lease)
    return write.run(lambda _: changed(sessions.rewind(session_id, revision, at=body.at, key=key))).response()
