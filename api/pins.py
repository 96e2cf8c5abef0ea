"""``/v1/sessions/{id}/kv/pin``: let a session's KV stay where it is for a time."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi import APIRouter, Response, status
from starlette.concurrency import run_in_threadpool

from agentstate import answers
from agentstate.api.engines import TIMEOUT_S
from agentstate.api.problems import COMMON
from agentstate.api.schemas import PathId, PinKv
from agentstate.api.service import CallerDep, Service, ServiceDep, SessionsDep
from agentstate.api.sessions import GONE
from agentstate.errors import EngineError, EngineRefused
from agentstate.fleet.pins import PinTier
from agentstate.sessions.verbs import Sessions
from agentstate.sql.database import instant

logger = logging.getLogger(__name__)

router = APIRouter(prefix="/v1/sessions/{session_id}/kv", tags=["sessions"], responses={**COMMON, **GONE})

# Of several ranks, the least that one of them says counts.
_LEAST_FIRST = ("ignored", "clipped", "accepted")
_LOWEST_FIRST = (PinTier.NVME, PinTier.HOST, PinTier.DEVICE)


@router.post("/pin", operation_id="pin_kv")
async def pin(
    session_id: PathId, body: PinKv, service: ServiceDep, caller: CallerDep, sessions: SessionsDep
) -> answers.Pinned:
    """Let the session's KV stay on a tier until the pin expires. A pin takes the place of the one before. It refuses
    nothing: what is pinned leaves last, and leaves where a request that runs needs all of the room."""
    service.gate.take_hint(caller)
    return await pin_for(service, sessions, session_id, body.tier, body.ttl_s)


async def pin_for(
    service: Service, sessions: Sessions, session_id: str, wanted: PinTier, wanted_s: float
) -> answers.Pinned:
    """Pin a session, for as long as the service lets it."""
    for_s = min(wanted_s, service.settings.pin_max_s)
    pinned = await run_in_threadpool(sessions.pin, session_id, wanted, for_s)
    said: list[dict[str, Any]] = []
    state, tier = "pending", wanted
    try:
        if pinned.ranks:
            asked = service.operations.pin(pinned.uid, pinned.ranks, wanted, for_s, TIMEOUT_S)
            said = await asyncio.wrap_future(asked)
            tier = min((PinTier(of_rank["tier"]) for of_rank in said), key=_LOWEST_FIRST.index)
            state = min((str(of_rank["state"]) for of_rank in said), key=_LEAST_FIRST.index)
    except EngineRefused as error:
        # It is of a release that pins nothing.
        logger.warning("session %s is not pinned: %s", session_id, error)
        said, state = [], "ignored"
    except (EngineError, LookupError, ValueError) as error:
        logger.warning("session %s is pinned once its engine has read of it: %s", session_id, error)
        said, state = [], "pending"
    assert pinned.until_us is not None
    return answers.Pinned.model_validate(
        {
            "session_id": session_id,
            "state": "clipped" if state == "accepted" and for_s < wanted_s else state,
            "tier": tier,
            "expires_at": instant(pinned.until_us),
            "tokens": min((int(of_rank["tokens"]) for of_rank in said), default=0),
            "bytes": sum(int(of_rank["bytes"]) for of_rank in said),
        }
    )


@router.delete("/pin", status_code=status.HTTP_204_NO_CONTENT, operation_id="unpin_kv")
async def unpin(session_id: PathId, service: ServiceDep, caller: CallerDep, sessions: SessionsDep) -> Response:
    """End the session's pin, if it has one."""
    service.gate.take_hint(caller)
    await end_pin(service, sessions, session_id)
    return Response(status_code=status.HTTP_204_NO_CONTENT)


async def end_pin(service: Service, sessions: Sessions, session_id: str) -> None:
    unpinned = await run_in_threadpool(sessions.unpin, session_id)
    try:
        await asyncio.wrap_future(service.operations.pin(unpinned.uid, unpinned.ranks, PinTier.DEVICE, 0.0, TIMEOUT_S))
    except EngineError as error:
        logger.warning("session %s is pinned until its engine reads that it is not: %s", session_id, error)
