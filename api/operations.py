"""``/v1/operations``: work that goes on after its request was answered."""

from __future__ import annotations

from fastapi import APIRouter

from agentstate import answers, operations
from agentstate.database import instant
from api.problems import Problem
from api.schemas import Name
from api.service import ServiceDep

router = APIRouter(prefix="/v1/operations", tags=["operations"])


@router.get("/{operation_id}", responses={404: {"model": Problem, "description": "No such operation"}})
def read(operation_id: Name, service: ServiceDep) -> answers.Operation:
    """See how an operation stands and, once it is done or has failed, its result."""
    with service.database.read() as connection:
        operation = operations.load(connection, operation_id)
    return answers.Operation(
        id=operation.id,
        kind=operation.kind,
        session_id=operation.session_id,
        state=operation.state,
        result=operation.result,
        created_at=instant(operation.created_us),
        finished_at=None if operation.finished_us is None else instant(operation.finished_us),
    )
