"""``/v1/sessions/{id}/prefetch``: bring a session's pages back before its next request needs them."""

from __future__ import annotations

import logging
import time

from fastapi import APIRouter, Response, status
from sqlalchemy.engine import Connection
from starlette.concurrency import run_in_threadpool

from agentstate import answers
from agentstate.api.operations import view
from agentstate.api.problems import COMMON
from agentstate.api.schemas import PathId, PrefetchPages
from agentstate.api.service import CallerDep, Service, ServiceDep, SessionsDep
from agentstate.api.sessions import GONE
from agentstate.api.writes import Answer, WriteDep
from agentstate.errors import AgentStateError, EngineError, EngineUnreachable
from agentstate.fleet import operations
from agentstate.fleet.operations import Kind, Outcome, PrefetchState, Question, Tier
from agentstate.lookahead.forecast import Forecast
from agentstate.sessions.outcomes import PagesOfSession
from agentstate.sessions.verbs import Sessions
from agentstate.sql.models import SessionStatus

logger = logging.getLogger(__name__)

router = APIRouter(prefix="/v1/sessions/{session_id}", tags=["turns"], responses={**COMMON, **GONE})


@router.post(
    "/prefetch",
    status_code=status.HTTP_202_ACCEPTED,
    response_model=answers.Operation,
    operation_id="prefetch_pages",
    responses={
        200: {"model": answers.Operation, "description": "They are there already"},
        202: {
            "links": {
                "read_operation": {
                    "operationId": "read_operation",
                    "parameters": {"operation_id": "$response.body#/id"},
                }
            }
        },
    },
)
async def prefetch(
    session_id: PathId,
    body: PrefetchPages,
    service: ServiceDep,
    caller: CallerDep,
    sessions: SessionsDep,
    write: WriteDep,
) -> Response:
    """Have the engine bring the pages back. The operation reports the outcome."""
    service.gate.take_hint(caller)
    pages = await run_in_threadpool(sessions.pages, session_id)
    ids: list[str] = []

    def act(connection: Connection) -> Answer:
        ids.append(service.operations.announce(connection, caller.id, Kind.PREFETCH, session_id))
        return Answer(view(operations.load(connection, ids[0], caller.id)), status.HTTP_202_ACCEPTED)

    answer = await run_in_threadpool(write.run, act)
    if answer.replayed:
        return answer.response()
    due_s = None if body.due_ms is None else body.due_ms / 1000
    limit_s = (due_s or 0) + operations.FLUSH_LIMIT_S if body.deadline_ms is None else body.deadline_ms / 1000
    warm = await start(service, pages, ids[0], body.tier, limit_s, due_s)
    idle = pages.session.status is not SessionStatus.RUNNING
    if due_s is not None and idle and pages.ranks and service.waits is not None:
        service.waits.expected(caller.id, pages.session.uid, Forecast.exactly(due_s), "other", pages.ranks[0])

    def load() -> answers.Operation:
        with service.database.read() as connection:
            return view(operations.load(connection, ids[0], caller.id))

    answer = Answer(await run_in_threadpool(load), status.HTTP_200_OK if warm is not None else status.HTTP_202_ACCEPTED)
    await write.finish(answer)
    return answer.response()


async def start_later(service: Service, sessions: Sessions, session_id: str, operation_id: str, tier: Tier) -> None:
    """Start the prefetch of a resumed session, once the resume is answered."""
    try:
        pages = await run_in_threadpool(sessions.pages, session_id)
        await start(service, pages, operation_id, tier)
    except AgentStateError as error:
        logger.error("the prefetch of session %s did not start: %s", session_id, error)


async def start(
    service: Service,
    pages: PagesOfSession,
    operation_id: str,
    tier: Tier,
    limit_s: float | None = None,
    due_s: float | None = None,
) -> Outcome | None:
    """Start an announced prefetch of pages that are needed ``due_s`` from now, or at once. Returns the outcome if they
    are in the tier already, else None."""
    due_at_s = None if due_s is None else time.monotonic() + due_s
    question = Question(Kind.PREFETCH, pages.session.uid, pages.ranks, tier, pages.keys, due_at_s)
    try:
        if not pages.ranks:
            raise EngineError("no live engine serves the session")
        if not all(pages.keys):
            raise EngineError("the engine has stored no pages of the session")
        outcome = await service.operations.ask(question, 0)
    except EngineUnreachable:
        # A busy engine may miss a question: `follow` asks again.
        outcome = Outcome(PrefetchState.PENDING)
    except EngineError as error:
        await run_in_threadpool(service.operations.fail, operation_id, str(error))
        return None
    if not outcome.settled:
        service.operations.follow(operation_id, [question], limit_s)
        return None
    await run_in_threadpool(service.operations.finish, operation_id, outcome)
    return outcome if outcome.state is PrefetchState.WARM else None
