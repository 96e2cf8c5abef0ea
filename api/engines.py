"""``/v1/engines``: the registered engine ranks, the page stores that they own, and what they decide."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from agentstate import answers
from agentstate.api.problems import COMMON, responses
from agentstate.api.schemas import MAX_LIST, MAX_NUMBER, Name
from agentstate.api.service import CallerDep, ServiceDep
from agentstate.errors import EngineNotFound
from agentstate.fleet import decisions, engines
from agentstate.fleet.decisions import Decision
from agentstate.sql.database import instant

# An engine answers between two messages; one that is overloaded is not waited for.
TIMEOUT_S = 2.0

router = APIRouter(prefix="/v1/engines", tags=["engines"], responses=COMMON)


@router.get("", operation_id="list_engines")
def read(service: ServiceDep, caller: CallerDep) -> answers.EngineList:
    """List all engine ranks, the oldest first; ``live`` says which still send heartbeats."""
    with service.database.read() as connection:
        registered = engines.registered(connection)
        live = {engine.id for engine in engines.live(connection, service.settings.engine_timeout_s)}
    data = [
        answers.Engine(
            id=engine.id,
            node=engine.node,
            rank=engine.rank,
            base_url=engine.base_url,
            model=engine.model,
            fingerprint=engine.fingerprint,
            pages_dir=engine.pages_dir,
            shared_store=engine.shared_store,
            reads=sorted(engine.reads),
            dp_rank=engine.dp_rank,
            dp_size=engine.dp_size,
            phase=engine.phase,
            live=engine.id in live,
            started_at=instant(engine.started_us),
            heartbeat_at=instant(engine.heartbeat_us),
        )
        for engine in registered
    ]
    return answers.EngineList(data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None)


@router.get("/{engine_id}/decisions", operation_id="list_decisions", responses=responses(_404="No such engine"))
def read_decisions(
    engine_id: Name,
    service: ServiceDep,
    caller: CallerDep,
    after: Annotated[int, Query(ge=0, lt=MAX_NUMBER, description="Continue after this id.")] = 0,
    limit: Annotated[int, Query(ge=1, le=MAX_LIST)] = 100,
) -> answers.DecisionList:
    """List what an engine has decided lately about the caller's sessions, the oldest first. The first rank decides."""
    with service.database.read() as connection:
        rank = next((engine for engine in engines.registered(connection) if engine.id == engine_id), None)
    if rank is None:
        raise EngineNotFound(f"there is no engine {engine_id}")
    known, reason = service.decisions.of(rank)
    found = [one for one in known if one.id > after]
    with service.database.read() as connection:
        own = decisions.names(connection, caller.id, (one.session for one in found))
    data = [view(one, own[one.session]) for one in found if one.session in own]
    page = data[:limit]
    return answers.DecisionList(
        data=page,
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=len(data) > limit,
        silent=None if reason is None else f"the engine does not say: {reason}",
    )


def view(one: Decision, session_id: str) -> answers.Decision:
    """A decision about a session, by the caller's id of it."""
    return answers.Decision(
        id=str(one.id),
        at=instant(one.id),
        session_id=session_id,
        decision=one.decision,
        outcome=one.outcome,
        tokens=one.tokens,
        index=one.index,
        displaced=one.displaced,
    )
