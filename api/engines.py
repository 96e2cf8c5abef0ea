"""``/v1/engines``: the registered engine ranks, and the page stores that they own."""

from __future__ import annotations

from fastapi import APIRouter

from agentstate import answers
from agentstate.fleet import engines
from agentstate.sql.database import instant
from api.problems import COMMON
from api.service import CallerDep, ServiceDep

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
            live=engine.id in live,
            started_at=instant(engine.started_us),
            heartbeat_at=instant(engine.heartbeat_us),
        )
        for engine in registered
    ]
    return answers.EngineList(data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None)
