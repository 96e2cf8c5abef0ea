"""``/v1/operations``: work that continues after its request was answered."""

from __future__ import annotations

from fastapi import APIRouter

from agentstate import answers
from agentstate.api.problems import COMMON, responses
from agentstate.api.schemas import Name
from agentstate.api.service import CallerDep, ServiceDep
from agentstate.fleet import operations
from agentstate.fleet.operations import Operation
from agentstate.sql.database import instant

router = APIRouter(prefix="/v1/operations", tags=["operations"], responses=COMMON)


@router.get("/{operation_id}", operation_id="read_operation", responses=responses(_404="No such operation"))
def read(operation_id: Name, service: ServiceDep, caller: CallerDep) -> answers.Operation:
    """Read an operation's state and, once it is done or has failed, its result."""
    with service.database.read() as connection:
        return view(operations.load(connection, operation_id, caller.id))


def view(operation: Operation) -> answers.Operation:
    finished_us = operation.finished_us
    return answers.Operation(
        id=operation.id,
        kind=operation.kind,
        session_id=operation.session_id,
        state=operation.state,
        result=operation.result,
        created_at=instant(operation.created_us),
        finished_at=None if finished_us is None else instant(finished_us),
        seconds=None if finished_us is None else (finished_us - operation.created_us) / 1_000_000,
    )
