"""Answers to writes, and their replay when a write is repeated with the same ``Idempotency-Key``.

A stored answer omits what is stored elsewhere (entries, kept by their ids) or must not be stored (the secret of a
lease, which is derived from the client's key).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Header, Request, Response
from pydantic import BaseModel
from sqlalchemy.engine import Connection
from starlette.background import BackgroundTask

from agentstate import answers, documents
from agentstate.api.service import CallerDep, service_of
from agentstate.sessions import idempotency, transcript
from agentstate.sessions.idempotency import Once
from agentstate.sessions.transcript import Entry
from agentstate.sql.database import Database, instant


@dataclass
class Answer:
    """The answer to a write, before serialization. It is not ``final`` while it waits for an engine. A ``body`` that is
    a list of entries, or has one, is without them: they are ``entries``, whose payloads are passed on as they are
    stored."""

    body: BaseModel | None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    final: bool = True
    replayed: bool = False
    then: BackgroundTask | None = None
    entries: Sequence[Entry] | None = None

    def response(self) -> Response:
        headers = {**self.headers, **({"Idempotency-Replayed": "true"} if self.replayed else {})}
        if self.body is None:
            return Response(status_code=self.status, headers=headers, background=self.then)
        return Response(
            documents.dump(self.body) if self.entries is None else _with_entries(self.body, self.entries),
            status_code=self.status,
            headers=headers,
            media_type="application/json",
            background=self.then,
        )


class Stored(BaseModel):
    """A stored body, made complete again."""

    model_config = {"extra": "allow"}


@dataclass(frozen=True)
class Write:
    """One request that writes. ``once`` is None if it has no key."""

    database: Database
    tenant: str
    once: Once | None

    def run(self, act: Callable[[Connection], Answer]) -> Answer:
        """Carry out a write and store its answer in one transaction, or replay the stored answer.

        `finish` completes an answer that is not ``final``; until then the same key is refused. Raises
        IdempotencyKeyReused, IdempotencyKeyInUse, and what ``act`` raises; nothing is then written.
        """
        with self.database.write() as connection:
            if self.once is None:
                return act(connection)
            stored = idempotency.begin(connection, self.once)
            if stored is not None:
                return self._replay(connection, stored)
            answer = act(connection)
            idempotency.store(connection, self.once, _without_entries(answer), final=answer.final)
            return answer

    async def carry_out(self, act: Callable[[Connection], Answer]) -> Answer:
        """`run`, on a thread for writing."""
        return await asyncio.wrap_future(self.database.submit(lambda: self.run(act)))

    async def finish(self, answer: Answer) -> None:
        """Store the answer of a write that was not final. Raises DatabaseError."""
        once = self.once
        if once is None:
            return

        def store() -> None:
            with self.database.write() as connection:
                idempotency.store(connection, once, _without_entries(answer))

        await asyncio.wrap_future(self.database.submit(store))

    def lease_secret(self) -> str | None:
        """The secret for a lease that this request takes; None: any."""
        return None if self.once is None else self.once.derived_secret("lease")

    def _replay(self, connection: Connection, stored: dict[str, Any]) -> Answer:
        body, entries = stored["body"], None
        if body is not None:
            of = _entries_of(body)
            if "entry_ids" in of:
                wanted, name = of.pop("entry_ids"), of.pop("of")
                found = transcript.by_id(connection, name, wanted) if wanted else {}
                entries = [found[item] for item in wanted if item in found]
            if "lease" in body:
                body["lease"]["token"] = self.lease_secret()
        body = None if body is None else Stored(**body)
        return Answer(body, stored["status"], stored["headers"], replayed=True, entries=entries)


def _without_entries(answer: Answer) -> dict[str, Any]:
    body = None
    if answer.body is not None:
        body = answer.body.model_dump(mode="json", exclude={"lease": {"token"}})
        if answer.entries is not None:
            ids = [item.id for item in answer.entries]
            name = answer.entries[0].session_id if answer.entries else None
            _entries_of(body).update(data=[], entry_ids=ids, of=name)
    return {"body": body, "status": answer.status, "headers": answer.headers}


def _with_entries(body: BaseModel, entries: Sequence[Entry]) -> bytes:
    shown = body.model_dump(mode="json")
    _entries_of(shown)["data"] = [_shown(item) for item in entries]
    return documents.join(shown)


def _entries_of(body: dict[str, Any]) -> dict[str, Any]:
    """Of an answer's body, the list of entries."""
    found: dict[str, Any] = body.get("entries", body)
    return found


def _shown(entry: Entry) -> dict[str, Any]:
    """What `entry` is as JSON."""
    return {
        "id": entry.id,
        "session_id": entry.session_id,
        "parent_id": entry.parent_id,
        "seq": entry.seq,
        "kind": entry.kind.value,
        "payload": documents.Raw(entry.content),
        "call_id": entry.call_id,
        "created_at": instant(entry.created_us),
    }


def entry(entry: Entry) -> answers.Entry:
    """An entry as the API shows it."""
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


async def _write(
    request: Request,
    caller: CallerDep,
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=255,
            pattern=r"^[\x21-\x7e]+$",
            description="Repeating the request with the same key repeats its answer, for a day. Best a random UUID.",
        ),
    ] = None,
) -> Write:
    database = (await service_of(request)).database
    if idempotency_key is None:
        return Write(database, caller.id, None)
    digest = hashlib.sha256(f"{request.method} {request.url.path}?{request.url.query}\0".encode())
    digest.update(await request.body())
    return Write(database, caller.id, Once(caller.id, idempotency_key, digest.digest()))


WriteDep = Annotated[Write, Depends(_write)]
