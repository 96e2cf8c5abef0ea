"""What clients of OpenAI's API keep here: conversations, their items, and responses.

A conversation is a session whose name begins with ``conv_``. Like the verbs of sessions, every method is one short
transaction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from sqlalchemy.engine import Connection

from agentstate import ids
from agentstate.errors import InvalidId, ResponseNotFound, SessionExpired, SessionNotFound
from agentstate.sessions import belonging, items, leases, responses, rows, transcript
from agentstate.sessions.belonging import Context
from agentstate.sessions.history import History
from agentstate.sessions.items import Item, ItemPage
from agentstate.sessions.outcomes import Order, Session
from agentstate.sessions.rows import Rows
from agentstate.sql.database import Database


class Stored:
    """One tenant's. Every method raises DatabaseError; those that name a conversation raise SessionNotFound and
    SessionExpired, those that change one SessionBusy while a response is being made in it, and those that name a
    response ResponseNotFound."""

    def __init__(self, database: Database, tenant: str):
        self._database = database
        self._rows = Rows(tenant)

    def create(self, metadata: dict[str, Any], given: Sequence[Item]) -> Session:
        """A new conversation. It has no model before its first response. Raises InvalidEntry, TooManySessions."""
        transcript.check_metadata(metadata)
        name = ids.new("conv")
        with self._database.write() as connection:
            session = self._rows.make(
                connection,
                id=ids.new("ses"),
                name=name,
                model="",
                metadata=metadata,
                cache_salt=None,
                extra_key=None,
                next_seq=1,
                expires_in_s=None,
            )
            if given:
                before = self._rows.lock(connection, name)
                items.append(connection, self._rows, before, given, before.time_us)
            return session

    def read(self, conversation: str) -> Session:
        with self._database.read() as connection:
            return rows.session_of(self._row(connection, conversation))

    def update(self, conversation: str, metadata: dict[str, Any]) -> Session:
        """Replace its metadata. Raises InvalidEntry."""
        transcript.check_metadata(metadata)
        with self._database.write() as connection:
            return rows.change(connection, self._lock(connection, conversation).id, metadata=metadata)

    def add(self, conversation: str, given: Sequence[Item]) -> list[Item]:
        """Append items, all or none; gives them back with their ids. Raises InvalidEntry."""
        with self._database.write() as connection:
            before = self._lock_free(connection, conversation)
            return items.append(connection, self._rows, before, given, before.time_us)[0]

    def item(self, conversation: str, item_id: str) -> Item:
        """Raises EntryNotFound."""
        with self._database.read() as connection:
            row = self._row(connection, conversation)
            return items.find(connection, row.name, History.of(connection, row), item_id)

    def items(self, conversation: str, *, after: str | None, limit: int, order: Order) -> ItemPage:
        """Raises EntryNotFound when ``after`` is no item of it."""
        with self._database.read() as connection:
            row = self._row(connection, conversation)
            history = History.of(connection, row)
            return items.page(connection, row.name, history, after=after, limit=limit, order=order)

    def remove(self, conversation: str, item_id: str) -> Session:
        """Delete an item: what is said from now on is said without it. Raises EntryNotFound."""
        with self._database.write() as connection:
            before = self._lock_free(connection, conversation)
            items.delete(connection, self._rows, before, item_id)
            return rows.session_of(self._rows.lock(connection, before.name))

    def recall(self, context: Context, most_bytes: int) -> list[Item] | None:
        """The items that a request goes on from; None if their entries have more than ``most_bytes``. Raises
        EntryNotFound, SessionNotFound or SessionExpired if they have gone in the meantime."""
        with self._database.read() as connection:
            part = self._part(connection, context)
            if not transcript.fits(connection, part, most_bytes):
                return None
            return items.read(connection, context.session, part)

    def referred(
        self, wanted: Mapping[str, int], most_bytes: int, *, session: str | None, response: str | None
    ) -> dict[str, Item] | None:
        """Items by their ids: those of ``session``, or of the one that ``response`` is of, or else the newest, wherever
        they were said. Those that are not kept are missing. None if their entries, each as often as ``wanted``, have
        more than ``most_bytes``."""
        with self._database.read() as connection:
            history = History()
            with suppress(InvalidId, ResponseNotFound, SessionNotFound, SessionExpired):  # who begins the turn says so
                if response is not None:
                    session = responses.find(connection, self._rows.tenant, response).session
                if session is not None:
                    history = History.of(connection, self._rows.find(connection, ids.check(session)))
            return items.referred(connection, self._rows.tenant, history, wanted, most_bytes)

    def response(self, response_id: str) -> dict[str, Any]:
        """The response as it was answered."""
        with self._database.read() as connection:
            return responses.find(connection, self._rows.tenant, response_id).document

    def forget(self, response_id: str) -> None:
        """Delete a response. What was said stays in its session."""
        with self._database.write() as connection:
            responses.forget(connection, self._rows.tenant, response_id)

    def given(self, response_id: str, *, after: str | None, limit: int, order: Order) -> ItemPage:
        """The items that a response was given. Raises EntryNotFound when ``after`` is none of them, or if they were
        taken back."""
        with self._database.read() as connection:
            kept = responses.find(connection, self._rows.tenant, response_id)
            part = self._part(connection, Context(kept.session, kept.base, kept.input))
            return items.page(connection, kept.session, part, after=after, limit=limit, order=order)

    def _part(self, connection: Connection, context: Context) -> History:
        row = self._rows.find(connection, context.session)
        history = History.of(connection, row)
        if context.head is None:
            return History()
        last = transcript.find(connection, row.name, history, context.head).seq
        first = 1 if context.base is None else transcript.find(connection, row.name, history, context.base).seq + 1
        return history.between(first, last)

    def _row(self, connection: Connection, conversation: str) -> Any:
        return self._rows.find(connection, belonging.conversation(conversation))

    def _lock(self, connection: Connection, conversation: str) -> Any:
        return self._rows.lock(connection, belonging.conversation(conversation))

    def _lock_free(self, connection: Connection, conversation: str) -> Any:
        row = self._lock(connection, conversation)
        leases.require_free(connection, row.id, row.revision)
        return row
