"""``/v1/sessions/{id}/tool-calls``: claim a tool call before executing it, and report its result.

Of several claimants of one call, one gets 201 and executes it. Later claimants get its result (200), or learn that it
has none yet, or that nobody knows whether it ran (409). An id names one call of a session: with another tool or other
arguments it is refused (409).
"""

from __future__ import annotations

from fastapi import APIRouter, Response, status
from sqlalchemy.engine import Connection

from agentstate import answers
from agentstate.api.entries import proof
from agentstate.api.problems import COMMON, responses
from agentstate.api.schemas import ClaimToolCall, FinishToolCall, PathId
from agentstate.api.service import SessionsDep
from agentstate.api.sessions import GONE
from agentstate.api.writes import Answer, WriteDep
from agentstate.sessions.outcomes import ToolCall
from agentstate.sql.database import instant

# The model makes up the id, which may contain slashes.
router = APIRouter(
    prefix="/v1/sessions/{session_id}/tool-calls/{call_id:path}", tags=["tool calls"], responses={**COMMON, **GONE}
)


# Declared before `claim`, whose path also matches.
@router.put(
    "/result",
    response_model=answers.ToolCall,
    operation_id="finish_tool_call",
    responses=responses(_404="No such session or tool call", _409="It has a result; or someone else runs the session"),
)
def finish(
    session_id: PathId, call_id: PathId, body: FinishToolCall, write: WriteDep, sessions: SessionsDep
) -> Response:
    """Append the result of a tool call. Needs the lease while a turn is running, and none otherwise."""

    def act(_: Connection) -> Answer:
        call = sessions.finish(
            session_id,
            call_id,
            body.model_dump(include={"output", "error"}, exclude_unset=True),
            key=None if body.lease is None else proof(body.lease),
        )
        shown = _view(session_id, call)
        shown.result = None  # the caller has it; the stored answer need not repeat it
        return Answer(shown)

    return write.run(act).response()


@router.put(
    "",
    status_code=status.HTTP_201_CREATED,
    response_model=answers.ToolCall,
    operation_id="claim_tool_call",
    responses={
        200: {"model": answers.ToolCall, "description": "It has a result already: do not execute it"},
        201: {
            "links": {
                "finish_tool_call": {
                    "operationId": "finish_tool_call",
                    "parameters": {
                        "session_id": "$response.body#/session_id",
                        "call_id": "$response.body#/id",
                    },
                    "requestBody": {"output": "found"},
                }
            }
        },
        **responses(_409="It is claimed, unknown or another call; or someone else runs the session"),
    },
)
def claim(session_id: PathId, call_id: PathId, body: ClaimToolCall, write: WriteDep, sessions: SessionsDep) -> Response:
    """Append a tool call, before executing it. Needs the lease while a turn is running."""

    def act(_: Connection) -> Answer:
        claimed = sessions.claim(
            session_id,
            call_id,
            body.name,
            body.arguments,
            expected_s=body.expected_s,
            key=None if body.lease is None else proof(body.lease),
        )
        return Answer(_view(session_id, claimed.call), status.HTTP_201_CREATED if claimed.fresh else status.HTTP_200_OK)

    return write.run(act).response()


def _view(session_id: str, call: ToolCall) -> answers.ToolCall:
    return answers.ToolCall(
        id=call.id,
        session_id=session_id,
        name=call.name,
        state=call.state,
        expected_s=call.expected_s,
        typical_s=call.typical_s,
        claimed_at=instant(call.claimed_us),
        finished_at=None if call.finished_us is None else instant(call.finished_us),
        result=call.result,
        revision=str(call.revision),
    )
