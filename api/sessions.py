"""``/v1/sessions``: create, list, read, change, delete."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Header, Query, Response, status

from agentstate import answers
from agentstate.api.problems import COMMON, responses
from agentstate.api.schemas import MAX_LIST, CreateSession, Id, PathId, UpdateSession
from agentstate.api.service import SeenDep, SessionsDep, etag
from agentstate.api.writes import Answer, WriteDep
from agentstate.sessions.outcomes import Keep, Order, Session
from agentstate.sql.database import instant

router = APIRouter(prefix="/v1/sessions", tags=["sessions"], responses=COMMON)

GONE = responses(_404="No such session", _410="Expired")
CONDITIONAL = responses(_412="The session has changed since: reload it", _428="If-Match is needed")
_ETAG = {"headers": {"ETag": {"schema": {"type": "string"}}}}

# Requests that can follow once a session exists, for readers of the document and for tests that walk it.
LINKS: dict[str, Any] = {
    name: {"operationId": name, "parameters": {"session_id": "$response.body#/id"}}
    for name in ("read_session", "resume_session", "list_entries", "prefetch_pages", "signal_activity", "pin_kv")
} | {
    name: {
        "operationId": name,
        "parameters": {"path.session_id": "$response.body#/id", "header.if-match": "$response.body#/revision"},
    }
    for name in ("fork_session", "update_session", "delete_session")
}


@router.post(
    "",
    status_code=status.HTTP_201_CREATED,
    response_model=answers.Session,
    operation_id="create_session",
    responses={
        201: {"headers": {**_ETAG["headers"], "Location": {"schema": {"type": "string"}}}, "links": LINKS},
        **responses(_409="The id is taken, or the Idempotency-Key in use"),
    },
)
def create(body: CreateSession, write: WriteDep, sessions: SessionsDep) -> Response:
    """Create a session; it is idle until it is resumed."""
    return write.run(
        lambda _: created(
            sessions.create(
                body.model,
                session_id=body.id,
                metadata=body.metadata,
                cache_salt=body.cache_salt,
                extra_key=body.extra_key,
                expires_in_s=body.expires_in_s,
            )
        )
    ).response()


@router.get("", operation_id="list_sessions")
def list_sessions(
    sessions: SessionsDep,
    after: Annotated[Id | None, Query(description="Continue after this id, whether or not it still exists.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LIST)] = 100,
    order: Annotated[Order, Query(description="By id; ids that the service makes sort by time.")] = Order.ASCENDING,
) -> answers.SessionList:
    """List the sessions that have not expired."""
    page = sessions.list(after=after, limit=limit, order=order)
    data = [view(session) for session in page.sessions]
    return answers.SessionList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=page.has_more,
    )


@router.get(
    "/{session_id}",
    response_model=answers.Session,
    operation_id="read_session",
    responses={200: _ETAG, 304: {"description": "Still the one of If-None-Match"}, **GONE},
)
def read(
    session_id: PathId,
    sessions: SessionsDep,
    if_none_match: Annotated[str | None, Header(description="Answer 304 while this is the session's ETag.")] = None,
) -> Response:
    """Read a session, without its entries."""
    session = sessions.read(session_id)
    answer = changed(session)
    tags = [tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")]
    if answer.headers["ETag"] in tags or "*" in tags:
        return Answer(None, 304, answer.headers).response()
    return answer.response()


@router.patch(
    "/{session_id}",
    response_model=answers.Session,
    operation_id="update_session",
    responses={200: _ETAG, **GONE, **CONDITIONAL},
)
def update(session_id: PathId, body: UpdateSession, revision: SeenDep, sessions: SessionsDep) -> Response:
    """Change metadata key by key (null removes a key) and the expiry (null: never)."""
    expires_in_s = body.expires_in_s if "expires_in_s" in body.model_fields_set else Keep.KEEP
    return changed(sessions.update(session_id, revision, metadata=body.metadata, expires_in_s=expires_in_s)).response()


@router.delete(
    "/{session_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    operation_id="delete_session",
    responses={**GONE, **CONDITIONAL, **responses(_409="The session is being run")},
)
def delete(session_id: PathId, revision: SeenDep, sessions: SessionsDep) -> Response:
    """Delete a session. Its forks keep what they share with it."""
    sessions.delete(session_id, revision)
    return Response(status_code=status.HTTP_204_NO_CONTENT)


def created(session: Session) -> Answer:
    """201, with the session's location."""
    headers = {"Location": f"/v1/sessions/{quote(session.id, safe='')}", "ETag": etag(session.revision, session.status)}
    return Answer(view(session), status.HTTP_201_CREATED, headers)


def changed(session: Session) -> Answer:
    return Answer(view(session), headers={"ETag": etag(session.revision, session.status)})


def view(session: Session) -> answers.Session:
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
