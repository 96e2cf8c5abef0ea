"""``/v1/sessions``: create, read, append, suspend, resume, and the lease."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response, status

from agentstate import answers
from agentstate.database import instant
from agentstate.leases import Lease, LeaseKey
from agentstate.sessions import Entry, EntryPage, NewEntry, Order, Session
from api.problems import Problem
from api.schemas import (
    MAX_ENTRIES,
    AppendEntries,
    CreateSession,
    LeaseProof,
    Name,
    RenewLease,
    ResumeSession,
    SessionId,
    SuspendSession,
)
from api.service import ServiceDep

router = APIRouter(
    prefix="/v1/sessions",
    tags=["sessions"],
    responses={
        code: {"model": Problem, "content": {"application/problem+json": {}}, "description": text}
        for code, text in {
            404: "No such session",
            409: "Someone else holds it, or it is done: wait or stop",
            410: "Expired",
            422: "Malformed, or not fitting the transcript",
        }.items()
    },
)


@router.post("", status_code=status.HTTP_201_CREATED)
def create(body: CreateSession, response: Response, service: ServiceDep) -> answers.Session:
    """Create a session; it is idle until it is resumed."""
    session = service.sessions.create(
        body.model,
        session_id=body.id,
        metadata=body.metadata,
        cache_salt=body.cache_salt,
        extra_key=body.extra_key,
        expires_in_s=body.expires_in_s,
    )
    response.headers["Location"] = f"/v1/sessions/{session.id}"
    return _session(session)


@router.get("/{session_id}")
def read(session_id: SessionId, service: ServiceDep) -> answers.Session:
    """Read a session, without its entries."""
    return _session(service.sessions.read(session_id))


@router.get("/{session_id}/entries")
def entries(
    session_id: SessionId,
    service: ServiceDep,
    after: Annotated[Name | None, Query(description="Go on after this entry.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_ENTRIES)] = 100,
    order: Annotated[Order, Query(description="By seq.")] = Order.ASCENDING,
) -> answers.EntryList:
    """Page through the transcript."""
    return _list(service.sessions.entries(session_id, after=after, limit=limit, order=order))


@router.post("/{session_id}/entries", status_code=status.HTTP_201_CREATED)
def append(session_id: SessionId, body: AppendEntries, service: ServiceDep) -> answers.AppendedEntries:
    """Append one or many entries, all or none, under the lease."""
    appended = service.sessions.append(
        session_id,
        _key(body.lease),
        [NewEntry(entry.kind, entry.payload, entry.call_id) for entry in body.entries],
    )
    page = _list(EntryPage(appended.entries, has_more=False))
    return answers.AppendedEntries(**vars(page), revision=str(appended.session.revision))


@router.post("/{session_id}/suspend")
def suspend(session_id: SessionId, body: SuspendSession, service: ServiceDep) -> answers.Suspended:
    """End the turn and make the KV durable.

    The session is suspended once its transaction has committed; the engine is asked after that, and what it answers
    within ``durable_timeout_ms`` is ``kv``.
    """
    suspended = service.sessions.suspend(session_id, _key(body.lease), body.reason, expires_in_s=body.expires_in_s)
    stored, operation_id = service.flushes.barrier(suspended.ranks, session_id, body.durable_timeout_ms)
    return answers.Suspended(
        id=session_id,
        status=suspended.session.status,
        revision=str(suspended.session.revision),
        head_id=suspended.session.head_id,
        pending_tool_calls=suspended.pending_tool_calls,
        operation=operation_id,
        kv=answers.StoredKv(state=stored.state, tokens=stored.tokens, pages=stored.pages, bytes=stored.nbytes),
    )


@router.post(
    "/{session_id}/resume",
    responses={409: {"headers": {"Retry-After": {"schema": {"type": "integer"}}}}, 412: {"model": Problem}},
)
def resume(session_id: SessionId, service: ServiceDep, body: ResumeSession | None = None) -> answers.Resumed:
    """Take the lease and get back all that the next turn needs. No engine is asked."""
    body = body or ResumeSession()
    resumed = service.sessions.resume(
        session_id,
        lease_ttl_s=body.lease_ttl_s or service.settings.lease_ttl_s,
        tail=body.tail,
        expect_model=body.expect.model if body.expect else None,
    )
    session = resumed.session
    namespace = {"cache_salt": session.cache_salt, "extra_key": session.extra_key}
    link = None
    if resumed.engine is not None:
        link = answers.EngineLink(
            base_url=resumed.engine.base_url,
            extra_body={
                "session_id": session.id,
                **{name: value for name, value in namespace.items() if value is not None},
            },
        )
    return answers.Resumed(
        session=_session(session),
        lease=_lease(resumed.lease),
        entries=_list(resumed.tail),
        pending_tool_calls=resumed.pending_tool_calls,
        engine=link,
        kv=answers.Outlook(**vars(resumed.kv)),
    )


@router.post("/{session_id}/lease/renew")
def renew(session_id: SessionId, body: RenewLease, service: ServiceDep) -> answers.Lease:
    """Keep the lease."""
    ttl_s = body.lease_ttl_s or service.settings.lease_ttl_s
    return _lease(service.sessions.renew(session_id, _key(body.lease), lease_ttl_s=ttl_s))


def _key(proof: LeaseProof) -> LeaseKey:
    return LeaseKey(proof.token, proof.epoch)


def _session(session: Session) -> answers.Session:
    return answers.Session(
        id=session.id,
        model=session.model,
        metadata=session.metadata,
        cache_salt=session.cache_salt,
        extra_key=session.extra_key,
        status=session.status,
        head_id=session.head_id,
        revision=str(session.revision),
        created_at=instant(session.created_us),
        updated_at=instant(session.updated_us),
        expires_at=None if session.expires_us is None else instant(session.expires_us),
    )


def _entry(entry: Entry) -> answers.Entry:
    return answers.Entry(
        id=entry.id,
        session_id=entry.session_id,
        parent_id=entry.parent_id,
        seq=entry.seq,
        kind=entry.kind,
        payload=entry.payload,
        call_id=entry.call_id,
        created_at=instant(entry.created_us),
    )


def _list(page: EntryPage) -> answers.EntryList:
    data = [_entry(entry) for entry in page.entries]
    return answers.EntryList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=page.has_more,
    )


def _lease(lease: Lease) -> answers.Lease:
    return answers.Lease(token=lease.key.token, epoch=lease.key.epoch, expires_at=instant(lease.expires_us))
