"""A turn: ``resume`` takes the lease, ``lease/renew`` keeps it, ``suspend`` ends it.

No transaction waits for an engine. Waits for a lease or for the engine's barrier run on the event loop and hold no
thread.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Header, Request, Response
from sqlalchemy.engine import Connection
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool

from agentstate import answers
from agentstate.api.direct import DirectRoute
from agentstate.api.entries import page, proof
from agentstate.api.prefetch import start_later
from agentstate.api.problems import COMMON, responses
from agentstate.api.schemas import PathId, RenewLease, ResumeSession, SuspendSession
from agentstate.api.service import CallerDep, MaybeSeenDep, ServiceDep, SessionsDep
from agentstate.api.sessions import GONE, view
from agentstate.api.writes import Answer, WriteDep
from agentstate.errors import DatabaseError, EngineError, EngineRefused, SessionBusy, TooManyOperations
from agentstate.fleet.engines import Engine
from agentstate.fleet.manifests import Durability, KvState
from agentstate.fleet.operations import Kind, Outcome, Question, Tier
from agentstate.sessions.leases import Lease
from agentstate.sessions.outcomes import Resumed, Suspended
from agentstate.sql.database import instant

logger = logging.getLogger(__name__)

router = APIRouter(
    prefix="/v1/sessions/{session_id}", tags=["turns"], responses={**COMMON, **GONE}, route_class=DirectRoute
)

_WAIT = re.compile(r"(?:^|[,;])\s*wait=(\d{1,9})", re.ASCII)  # RFC 7240
_LEASE = {"token": "$response.body#/lease/token", "epoch": "$response.body#/lease/epoch"}
_LEASED = {"session_id": "$response.body#/session/id"}
LINKS = {
    "append_entries": {
        "operationId": "append_entries",
        "parameters": _LEASED,
        "requestBody": {"lease": _LEASE, "entries": [{"kind": "note", "payload": {"text": "linked"}}]},
    },
    "suspend_session": {
        "operationId": "suspend_session",
        "parameters": _LEASED,
        "requestBody": {"lease": _LEASE, "reason": "user_wait", "durable_timeout_ms": 0},
    },
    "renew_lease": {"operationId": "renew_lease", "parameters": _LEASED, "requestBody": {"lease": _LEASE}},
    "claim_tool_call": {
        "operationId": "claim_tool_call",
        "parameters": {**_LEASED, "call_id": "call_1"},
        "requestBody": {"lease": _LEASE, "name": "search", "arguments": {}},
    },
}


@router.post(
    "/resume",
    response_model=answers.Resumed,
    operation_id="resume_session",
    responses={
        200: {"links": LINKS},
        409: {
            **responses(_409="Someone else runs it")[409],
            "headers": {"Retry-After": {"schema": {"type": "integer"}}},
        },
        **responses(_412="The session has changed, or is of another model than expected"),
    },
)
async def resume(
    session_id: PathId,
    service: ServiceDep,
    caller: CallerDep,
    sessions: SessionsDep,
    write: WriteDep,
    revision: MaybeSeenDep,
    request: Request,
    prefer: Annotated[str | None, Header(description="wait=N: wait N seconds at most for the lease.")] = None,
    body: ResumeSession | None = None,
) -> Response:
    """Take the lease; returns all that the next turn needs. Asks no engine.

    A client that disconnects while it waits does not get the lease.
    """
    wanted = body or ResumeSession()

    def act(connection: Connection) -> Answer:
        resumed = sessions.resume(
            session_id,
            lease_ttl_s=wanted.lease_ttl_s or service.settings.lease_ttl_s,
            tail=wanted.tail,
            expect_model=wanted.expect.model if wanted.expect else None,
            revision=revision,
            token=write.lease_secret(),
        )
        operation_id = None
        if wanted.prefetch != "none" and resumed.engine is not None and resumed.kv.valid:
            try:
                operation_id = service.operations.announce(connection, caller.id, Kind.PREFETCH, session_id)
            except TooManyOperations as error:
                logger.warning("session %s is resumed without a prefetch: %s", session_id, error)
        service.metrics.resumes.labels(resumed.kv.state, str(resumed.kv.valid).lower()).inc()
        then = None
        if operation_id is not None:
            then = BackgroundTask(start_later, service, sessions, session_id, operation_id, Tier(wanted.prefetch))
        return Answer(_resumed(resumed, operation_id), then=then, entries=resumed.tail.entries)

    if wanted.on_busy == "reject":
        return (await write.carry_out(act)).response()
    preferred = _WAIT.search(prefer or "")
    deadline = time.monotonic() + min(wanted.busy_timeout_ms / 1000, int(preferred[1]) if preferred else math.inf)
    uid = (await run_in_threadpool(sessions.read, session_id)).uid
    with service.changes.watch(uid) as watch:
        while True:
            try:
                return (await write.carry_out(act)).response()
            except SessionBusy as busy:
                left_s = deadline - time.monotonic()
                if left_s <= 0 or watch.closing:
                    raise
                await watch.wait(min(left_s, busy.retry_after_s + 0.01))
                if await request.is_disconnected():
                    raise


@router.post(
    "/suspend",
    response_model=answers.Suspended,
    operation_id="suspend_session",
    responses=responses(_409="The lease is lost, or a tool call has no result"),
)
async def suspend(
    session_id: PathId,
    body: SuspendSession,
    service: ServiceDep,
    caller: CallerDep,
    sessions: SessionsDep,
    write: WriteDep,
) -> Response:
    """End the turn and make the KV durable.

    The session is suspended once its transaction has committed. The service asks the engine after that; ``kv`` is the
    engine's answer within ``durable_timeout_ms``. If the engine has no shared store, the durability ``shared`` ends on
    the node, and ``kv.reason`` says why.
    """
    done: list[tuple[Suspended, str | None]] = []
    # The outcome until an engine is asked.
    outcome = Outcome(KvState.LOST if body.kv == "release" else KvState.UNKNOWN)

    def announce(connection: Connection, kind: Kind) -> str | None:
        try:
            return service.operations.announce(connection, caller.id, kind, session_id)
        except TooManyOperations as error:
            logger.warning("the %s of session %s is not followed: %s", kind, session_id, error)
            return None

    def act(connection: Connection) -> Answer:
        suspended = sessions.suspend(
            session_id,
            proof(body.lease),
            body.reason,
            expires_in_s=body.expires_in_s,
            release_kv=body.kv == "release",
        )
        demoting = body.kv != "retain" and suspended.ranks
        done.append((suspended, announce(connection, Kind.DEMOTE) if demoting else None))
        return Answer(_suspended(*done[-1], outcome), final=body.kv == "release" or not suspended.ranks)

    answer = await write.carry_out(act)
    if answer.replayed:
        return answer.response()
    suspended, operation_id = done[-1]
    uid, ranks = suspended.session.uid, suspended.ranks
    flush = Question(
        Kind.FLUSH,
        uid,
        ranks,
        durability=Durability(body.durability),
        beside=suspended.beside,
        decoding=suspended.decoding,
        epoch=suspended.epoch,
    )
    demote = Question(Kind.DEMOTE, uid, ranks)
    reason: str | None = None
    timing: dict[str, str] = {}
    if answer.final:
        if operation_id is not None:
            service.operations.follow(operation_id, [demote])
    else:
        asked_s = time.perf_counter()
        if flush.durability is Durability.SHARED:
            reason = _unshared(ranks)
        try:
            if reason is None:
                try:
                    outcome = await service.operations.ask(flush, body.durable_timeout_ms)
                except EngineRefused as error:
                    if flush.durability is not Durability.SHARED:
                        raise
                    reason = str(error)
            if reason is not None:
                # It is to be durable on the node at least.
                flush = replace(flush, durability=Durability.NODE)
                left_ms = body.durable_timeout_ms - (time.perf_counter() - asked_s) * 1000
                outcome = await service.operations.ask(flush, max(0, round(left_ms)))
        except EngineError as error:
            logger.warning("the KV of session %s: %s", session_id, error)
        timing = {"Server-Timing": f"engine;dur={(time.perf_counter() - asked_s) * 1000:.3f}"}
        if operation_id is not None:
            service.operations.follow(operation_id, [flush, demote])
        elif not outcome.settled:

            def write_down() -> str | None:
                with service.database.write() as connection:
                    return announce(connection, Kind.FLUSH)

            try:
                operation_id = await asyncio.wrap_future(service.database.submit(write_down))
            except DatabaseError as error:
                # The suspend itself is committed: the answer must not be an error.
                logger.error("the flush of session %s cannot be followed: %s", session_id, error)
            if operation_id is not None:
                service.operations.follow(operation_id, [flush])
        answer = Answer(_suspended(suspended, operation_id, outcome, reason))
        try:
            await write.finish(answer)
        except DatabaseError as error:
            logger.error("the answer to the suspend of session %s is not stored whole: %s", session_id, error)
    service.metrics.suspends.labels(outcome.state).inc()
    response = answer.response()
    response.headers.update(timing)
    return response


@router.post(
    "/lease/renew",
    response_model=answers.Lease,
    operation_id="renew_lease",
    responses=responses(_409="The lease is lost"),
)
def renew(session_id: PathId, body: RenewLease, service: ServiceDep, sessions: SessionsDep) -> answers.Lease:
    """Renew the lease. Needs no Idempotency-Key: repeating it just renews again."""
    ttl_s = body.lease_ttl_s or service.settings.lease_ttl_s
    return _lease(sessions.renew(session_id, proof(body.lease), lease_ttl_s=ttl_s))


def _resumed(resumed: Resumed, operation_id: str | None) -> answers.Resumed:
    session = resumed.session
    namespace = {"cache_salt": resumed.cache_salt, "extra_key": session.extra_key}
    link = None
    if resumed.engine is not None:
        link = answers.EngineLink(
            base_url=resumed.engine.base_url,
            extra_body={
                "session_id": resumed.engine_session,
                **{name: value for name, value in namespace.items() if value is not None},
            },
            dp_rank=resumed.engine.dp_rank,
        )
    return answers.Resumed(
        session=view(session),
        lease=_lease(resumed.lease),
        entries=page(resumed.tail),
        pending_tool_calls=resumed.pending_tool_calls,
        engine=link,
        kv=answers.Outlook(**vars(resumed.kv), prefetch=operation_id),
    )


def _unshared(ranks: Sequence[Engine]) -> str | None:
    """Why an engine cannot make KV durable in a shared store, as far as SQL tells."""
    without = next((rank for rank in ranks if not rank.shared_store), None)
    if without is None:
        return None
    return f"the engine at {without.base_url} has no shared store: set AGENTSTATE_SHARED_STORE"


def _suspended(
    suspended: Suspended, operation_id: str | None, outcome: Outcome, reason: str | None = None
) -> answers.Suspended:
    return answers.Suspended(
        id=suspended.session.id,
        status=suspended.session.status,
        revision=str(suspended.session.revision),
        head_id=suspended.session.head_id,
        pending_tool_calls=suspended.pending_tool_calls,
        operation=operation_id,
        kv=answers.StoredKv(
            state=KvState(outcome.state),
            tokens=outcome.tokens,
            pages=outcome.pages,
            bytes=outcome.nbytes,
            durable_on=outcome.durable_on,
            reason=reason,
        ),
    )


def _lease(lease: Lease) -> answers.Lease:
    return answers.Lease(token=lease.key.token, epoch=lease.key.epoch, expires_at=instant(lease.expires_us))
