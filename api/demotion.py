"""``/v1/sessions/{id}/kv/demote``: let a session's KV leave the device before others do."""

from __future__ import annotations

from fastapi import APIRouter, Response, status
from sqlalchemy.engine import Connection
from starlette.concurrency import run_in_threadpool

from agentstate import answers
from agentstate.api.operations import view
from agentstate.api.problems import COMMON
from agentstate.api.schemas import PathId
from agentstate.api.service import CallerDep, Service, ServiceDep, SessionsDep
from agentstate.api.sessions import GONE
from agentstate.api.writes import Answer, WriteDep
from agentstate.fleet import operations
from agentstate.fleet.operations import Kind, Question
from agentstate.sessions.outcomes import PagesOfSession

router = APIRouter(prefix="/v1/sessions/{session_id}/kv", tags=["sessions"], responses={**COMMON, **GONE})


@router.post(
    "/demote", status_code=status.HTTP_202_ACCEPTED, response_model=answers.Operation, operation_id="demote_kv"
)
async def demote(
    session_id: PathId, service: ServiceDep, caller: CallerDep, sessions: SessionsDep, write: WriteDep
) -> Response:
    """Make the session's KV the first to leave the device. It stays where it is stored, and its next request restores
    it. The operation reports the outcome."""
    service.gate.take_hint(caller)
    pages = await run_in_threadpool(sessions.whereabouts, session_id)
    ids: list[str] = []

    def act(connection: Connection) -> Answer:
        ids.append(service.operations.announce(connection, caller.id, Kind.DEMOTE, session_id))
        return Answer(view(operations.load(connection, ids[0], caller.id)), status.HTTP_202_ACCEPTED)

    answer = await run_in_threadpool(write.run, act)
    if not answer.replayed:
        await start(service, pages, ids[0])
    return answer.response()


async def start(service: Service, pages: PagesOfSession, operation_id: str) -> None:
    """Start an announced demotion."""
    if pages.ranks:
        service.operations.follow(operation_id, [Question(Kind.DEMOTE, pages.session.uid, pages.ranks)])
    else:
        await run_in_threadpool(service.operations.fail, operation_id, "no live engine serves the session")
