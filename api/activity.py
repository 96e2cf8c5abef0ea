"""``/v1/sessions/{id}/activity``: a person is about to go on with a session."""

from __future__ import annotations

from fastapi import APIRouter, status
from starlette.concurrency import run_in_threadpool

from agentstate import answers
from agentstate.api.problems import COMMON
from agentstate.api.schemas import PathId, Signal
from agentstate.api.service import CallerDep, ServiceDep, SessionsDep
from agentstate.api.sessions import GONE
from agentstate.fleet.waits import FORECASTS

router = APIRouter(prefix="/v1/sessions/{session_id}", tags=["turns"], responses={**COMMON, **GONE})


@router.post("/activity", status_code=status.HTTP_202_ACCEPTED, operation_id="signal_activity")
async def signal(
    session_id: PathId, body: Signal, service: ServiceDep, caller: CallerDep, sessions: SessionsDep
) -> answers.Signalled:
    """Have the engine expect the session's next request soon. Changes nothing of the session, and waits for nothing."""
    service.gate.take_hint(caller)
    told = await run_in_threadpool(sessions.signal, session_id, FORECASTS[body.kind])
    return answers.Signalled(session_id=session_id, state="accepted" if told else "ignored")
