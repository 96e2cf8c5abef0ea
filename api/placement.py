"""``/v1/sessions/{id}/kv``: where a session's KV is, and why."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool

from agentstate import answers
from agentstate.api.engines import TIMEOUT_S, view
from agentstate.api.problems import COMMON
from agentstate.api.schemas import PathId
from agentstate.api.service import Service, ServiceDep, SessionsDep
from agentstate.api.sessions import GONE
from agentstate.errors import EngineError
from agentstate.fleet.decisions import decision
from agentstate.sessions.verbs import Sessions
from agentstate.sql.database import instant

router = APIRouter(prefix="/v1/sessions/{session_id}", tags=["sessions"], responses={**COMMON, **GONE})

_TIERS = ("device", "host", "disk")


@router.get("/kv", operation_id="read_kv")
async def read_kv(session_id: PathId, service: ServiceDep, sessions: SessionsDep) -> answers.Placement:
    """Where the session's KV is, what the session waits for, and what would move it, as its engine knows that now."""
    return await placement(service, sessions, session_id)


async def placement(service: Service, sessions: Sessions, session_id: str) -> answers.Placement:
    """What SQL and the engine know of a session's KV. An engine that does not answer is waited for `TIMEOUT_S`."""
    pages = await run_in_threadpool(sessions.whereabouts, session_id)
    uid = pages.session.uid
    known: dict[str, Any] = {"session_id": session_id, "durable_on": pages.durable_on}
    if not pages.ranks:
        return answers.Placement(**known, engine=None, tiers={}, next="no live engine has served it")
    known["engine"] = pages.ranks[0].id
    try:
        said = await asyncio.wrap_future(service.operations.explain(uid, pages.ranks, TIMEOUT_S))
        return _placement(known, said)
    except (EngineError, LookupError, TypeError, ValueError) as error:
        reason = f"the engine does not say: {error}"
        return answers.Placement(**known, tiers={}, next=reason)


def _placement(known: dict[str, Any], said: Sequence[dict[str, Any]]) -> answers.Placement:
    """What is known without the engine, and what its ranks say together: the first of them decides what leaves the
    device."""
    first = said[0]
    tiers = {
        name: answers.KvTier(
            tokens=min(int(of_rank["tiers"][name]["tokens"]) for of_rank in said),
            bytes=sum(int(of_rank["tiers"][name]["bytes"]) for of_rank in said),
        )
        for name in _TIERS
    }
    return answers.Placement.model_validate(
        {
            **known,
            "tiers": tiers,
            **{name: first.get(name) for name in ("wait", "index", "place", "fetch", "pin", "account")},
            "left_tokens": first.get("left_tokens", 0),
            "decisions": [view(decision(one), known["session_id"]) for one in first.get("decisions") or ()],
            "restores": [_restore(one) for one in first.get("restores") or ()],
            "page_map": first.get("page_map") or (),
            "more_tokens": first.get("more_tokens", 0),
            "next": _next(first),
        }
    )


def _restore(said: dict[str, Any]) -> dict[str, Any]:
    named = ("why", "tokens", "bytes", "seconds", "waited_s")
    return {"at": instant(int(said["id"])), **{name: said[name] for name in named}}


def _next(said: dict[str, Any]) -> str:
    wait, index = said.get("wait"), said.get("index")
    if wait is None or index is None:
        return "its next request brings it to the device"
    if wait["state"] == "served":
        return "it stays on the device until its request has ended"
    if (pin := said.get("pin")) is not None and pin["tier"] == "device" and "leaves_after_tokens" in said:
        return f"it stays on the device for {pin['rest_s']:,.0f} s, unless a request needs all of the room"
    if (ahead := said.get("leaves_after_tokens")) is not None:
        return f"it leaves the device after {ahead:,} tokens of others"
    if (least := said.get("fetched_from_index")) is not None and wait["state"] != "released":
        return f"it is fetched once its index reaches {least:.3g}, or with its next request"
    return "its next request brings it to the device"
