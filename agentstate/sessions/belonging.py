"""Which session a gateway's request belongs to: what its client named, what the client's program names, or else the one
whose conversation it goes on with.

What a client names is an order: it gets that session, or an error. What a program names, or messages tell, is a guess
that must not cost the client anything: where it does not fit, the request gets a session of its own, or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from sqlalchemy.engine import Connection

from agentstate import ids
from agentstate.errors import (
    EntryNotFound,
    InvalidId,
    ModelMismatch,
    ResponseNotFound,
    SessionExists,
    SessionExpired,
    SessionNotFound,
)
from agentstate.sessions import conversations, responses, transcript
from agentstate.sessions.conversations import Conversation, Tip
from agentstate.sessions.history import History
from agentstate.sessions.outcomes import Resumed
from agentstate.sessions.rows import Rows
from agentstate.sessions.transcript import NewEntry


class Origin(StrEnum):
    """How a request came to its session."""

    NAMED = "named"  # by its client
    HARNESS = "harness"  # by the program that its client is
    CONTINUED = "continued"  # it goes on from where the session stands
    COMPACTED = "compacted"  # it does so, with less before
    BRANCH = "branch"  # it left the session's way, or somebody else ran the session
    NEW = "new"
    NONE = "none"  # it has none


@dataclass(frozen=True)
class State:
    """What is kept here that a request goes on from: all of the ``conversation`` with this id, or what there was after
    the ``response`` with this id, or nothing. A request with a state has a session, even if it has to be made."""

    conversation: str | None = None
    response: str | None = None


@dataclass(frozen=True)
class Wanted:
    """What a request says of its session: the id that its client names, or its ``harness``, if any; and its
    ``conversation``, if that may tell. ``results`` are the results of tool calls that it brings. ``metadata`` is for a
    session that has to be made. ``engine`` is the base URL of the engine to take if no other can restore more.
    ``state`` is what the request goes on from, if it has not all of its messages itself or is to be kept."""

    model: str
    session: str | None = None
    harness: str | None = None
    conversation: Conversation | None = None
    results: Sequence[NewEntry] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    engine: str | None = None
    state: State | None = None

    @property
    def named(self) -> str | None:
        """The session that nothing else will do for."""
        return self.session or (self.state.conversation if self.state else None)


@dataclass(frozen=True)
class Context:
    """The entries of the session called ``session`` after ``base``, or from its first one on, up to and with ``head``,
    or none of them."""

    session: str
    base: str | None
    head: str | None


@dataclass(frozen=True)
class Begun:
    """The turn of a request; ``resumed`` is None if it has no session, which knows the first ``messages`` messages of
    the request already.

    What a kept request was given begins after the entry ``base`` of its session, or with it. ``whole``: the session has
    nothing of it that could be gone on from. ``context`` is what the request goes on from. ``time_us`` is when it came.
    ``ending`` is, where nothing has begun, the session that is worth waiting for: `answers_ahead`.
    """

    resumed: Resumed | None
    origin: Origin
    messages: int = 0
    base: str | None = None
    whole: bool = True
    context: Context | None = None
    time_us: int = 0
    ending: str | None = None


@dataclass(frozen=True)
class Found:
    """``row`` is the locked row of the session, None if it has to be made, as ``name`` if that is given. ``tip`` is
    where the request goes on from, if its messages are known; ``context``, if what it goes on from is kept."""

    origin: Origin
    row: Any = None
    name: str | None = None
    tip: Tip | None = None
    context: Context | None = None

    @property
    def messages(self) -> int:
        return 0 if self.tip is None else self.tip.messages

    def answers_ahead(self, wanted: Wanted) -> bool:
        """Whether the request has an answer that its session does not know yet. If the session is being run, that
        answer is most likely its turn's, which is about to end. A request beside the turn has none: a retry, one of
        several samples, a title."""
        if self.tip is None or self.tip.compacted or not self.tip.newest or wanted.conversation is None:
            return False
        return max(wanted.conversation.prefixes().values(), default=0) > self.tip.messages

    @property
    def head(self) -> str | None:
        """The entry that the request goes on from, if that is known."""
        if self.context is not None:
            return self.context.head
        return None if self.tip is None else self.tip.head_entry


def find(connection: Connection, rows: Rows, wanted: Wanted) -> Found:
    """Raises, of a session that the client names, ModelMismatch, SessionExpired and InvalidId; of a conversation
    SessionNotFound and SessionExpired; of a response ResponseNotFound, and SessionExists if the session that the client
    names beside it stands elsewhere."""
    state = wanted.state
    if state is not None and state.conversation is not None:
        return _conversation(rows.lock(connection, conversation(state.conversation)))
    if state is not None and state.response is not None:
        return _after_response(connection, rows, wanted, state.response)
    found = _without_state(connection, rows, wanted)
    return Found(Origin.NEW) if state is not None and found.origin is Origin.NONE else found


def conversation(name: str) -> str:
    """The id of a conversation, as it is. Raises SessionNotFound if no conversation can have it."""
    try:
        if name.startswith("conv_"):
            return ids.check(name)
    except InvalidId:
        pass
    raise SessionNotFound(f"there is no conversation {name[:80]!r}")


def _conversation(row: Any) -> Found:
    return Found(Origin.NAMED, row, context=Context(row.name, None, row.head_entry))


def _after_response(connection: Connection, rows: Rows, wanted: Wanted, response: str) -> Found:
    """Where a response left its session: there if that has not gone on since, else on a branch."""
    kept = responses.find(connection, rows.tenant, response)
    try:
        row = rows.lock(connection, kept.session)
        if kept.head is not None:
            transcript.find(connection, row.name, History.of(connection, row), kept.head)
    except (EntryNotFound, SessionNotFound, SessionExpired):
        # It was rewound to before the response, or has gone since.
        raise ResponseNotFound(f"what response {response} was said after is not there any more") from None
    context = Context(row.name, kept.base, kept.head)
    stands = row.head_entry == kept.head and row.model == wanted.model
    if wanted.session is not None and ids.check(wanted.session) != row.name:
        _require_free_name(connection, rows, wanted.session)
        return Found(Origin.BRANCH, row, wanted.session, context=context)
    if stands:
        return Found(Origin.NAMED if wanted.session else Origin.CONTINUED, row, context=context)
    if wanted.session is not None:
        raise SessionExists(f"session {wanted.session} does not stand at response {response}: name another, or none")
    return Found(Origin.BRANCH, row, context=context)


def _require_free_name(connection: Connection, rows: Rows, name: str) -> None:
    try:
        rows.lock(connection, name)
    except (SessionNotFound, SessionExpired):
        return
    raise SessionExists(f"session {name} is another than the response's: name one that is not there yet, or none")


def _without_state(connection: Connection, rows: Rows, wanted: Wanted) -> Found:
    if wanted.session is not None:
        return _named(connection, rows, wanted, ids.check(wanted.session))
    if wanted.harness is not None:
        return _of_harness(connection, rows, wanted, wanted.harness)
    return _of_messages(connection, rows, wanted)


def _named(connection: Connection, rows: Rows, wanted: Wanted, name: str) -> Found:
    try:
        row = rows.lock(connection, name)
    except SessionNotFound:
        return Found(Origin.NAMED, name=name)
    if row.model not in ("", wanted.model):
        raise ModelMismatch(
            f"session {name} runs {row.model!r}, the request is for {wanted.model!r}", revision=row.revision
        )
    return Found(Origin.NAMED, row, tip=_tip_of(connection, rows, wanted, row))


def _of_harness(connection: Connection, rows: Rows, wanted: Wanted, name: str) -> Found:
    """A program uses one id for an agent's turns and for what it asks beside them: a title, a summary. Those have
    another system prompt, and do not go on with what was said."""
    found = _at(connection, rows, wanted, name)
    if found.row is None or found.tip is not None or wanted.conversation is None:
        return found
    system = conversations.known_system(connection, found.row.id)
    if system is None or system == wanted.conversation.system:
        return found
    if not wanted.conversation.prefixes():
        return Found(Origin.NONE)
    # It has answers, so it is a conversation, and what came first was not: OpenCode asks for a title before its turns.
    return _at(connection, rows, wanted, f"{name}:{wanted.conversation.system.hex()[:8]}")


def _at(connection: Connection, rows: Rows, wanted: Wanted, name: str) -> Found:
    """The session of a harness that has this name, which may have to be made."""
    try:
        row = rows.lock(connection, name)
    except SessionNotFound:
        return Found(Origin.HARNESS, name=name)
    except SessionExpired:
        return Found(Origin.NONE)
    if row.model != wanted.model:
        return Found(Origin.NONE)
    return Found(Origin.HARNESS, row, tip=_tip_of(connection, rows, wanted, row))


def _of_messages(connection: Connection, rows: Rows, wanted: Wanted) -> Found:
    if wanted.conversation is None:
        return Found(Origin.NONE)
    for tip in conversations.find(connection, rows.tenant, wanted.conversation):
        if tip.model != wanted.model:
            continue
        try:
            row = rows.lock(connection, tip.session)
        except (SessionNotFound, SessionExpired):
            continue
        if tip.newest and conversations.still_newest(connection, row, tip):
            return Found(Origin.COMPACTED if tip.compacted else Origin.CONTINUED, row, tip=tip)
        if not tip.compacted:
            return Found(Origin.BRANCH, row, tip=tip)
    return Found(Origin.NEW)


def _tip_of(connection: Connection, rows: Rows, wanted: Wanted, row: Any) -> Tip | None:
    if wanted.conversation is None:
        return None
    return next(conversations.find(connection, rows.tenant, wanted.conversation, of_session=row.id), None)
