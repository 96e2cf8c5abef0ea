"""``/v1/sessions/{id}/entries``: page through the transcript, and append to it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response, status
from sqlalchemy.engine import Connection

from agentstate import answers
from agentstate.api.direct import DirectRoute
from agentstate.api.problems import COMMON, responses
from agentstate.api.schemas import MAX_ENTRIES, AppendEntries, LeaseProof, Name, PathId
from agentstate.api.service import SessionsDep
from agentstate.api.sessions import GONE
from agentstate.api.writes import Answer, WriteDep
from agentstate.sessions.leases import LeaseKey
from agentstate.sessions.outcomes import Order
from agentstate.sessions.transcript import EntryPage, NewEntry

router = APIRouter(
    prefix="/v1/sessions/{session_id}/entries",
    tags=["entries"],
    responses={**COMMON, **GONE},
    route_class=DirectRoute,
)


@router.get("", response_model=answers.EntryList, operation_id="list_entries")
def read(
    session_id: PathId,
    sessions: SessionsDep,
    after: Annotated[Name | None, Query(description="Continue after this entry.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_ENTRIES)] = 100,
    order: Annotated[Order, Query(description="By seq.")] = Order.ASCENDING,
) -> Response:
    """Page through the transcript."""
    found = sessions.entries(session_id, after=after, limit=limit, order=order)
    return Answer(page(found), entries=found.entries).response()


@router.post(
    "",
    status_code=status.HTTP_201_CREATED,
    response_model=answers.AppendedEntries,
    operation_id="append_entries",
    responses=responses(_409="The lease is lost, or the Idempotency-Key in use"),
)
async def append(session_id: PathId, body: AppendEntries, write: WriteDep, sessions: SessionsDep) -> Response:
    """Append one or many entries, all or none, under the lease."""

    def act(_: Connection) -> Answer:
        new = [NewEntry(item.kind, item.payload, item.call_id) for item in body.entries]
        appended = sessions.append(session_id, proof(body.lease), new)
        shown = page(EntryPage(appended.entries, has_more=False))
        answer = answers.AppendedEntries(**vars(shown), revision=str(appended.session.revision))
        return Answer(answer, status.HTTP_201_CREATED, entries=appended.entries)

    return (await write.carry_out(act)).response()


def page(page: EntryPage) -> answers.EntryList:
    """The list, without the entries (`Answer`)."""
    found = page.entries
    return answers.EntryList(
        data=[],
        first_id=found[0].id if found else None,
        last_id=found[-1].id if found else None,
        has_more=page.has_more,
    )


def proof(lease: LeaseProof) -> LeaseKey:
    return LeaseKey(lease.token, lease.epoch)
