"""What the verbs of sessions return, and the values that they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from agentstate.fleet.engines import Engine
from agentstate.fleet.manifests import Durability
from agentstate.fleet.placement import KvOutlook, Server
from agentstate.sessions.leases import Lease
from agentstate.sessions.transcript import Entry, EntryPage
from agentstate.sql.models import SessionStatus, ToolCallState


class SuspendReason(StrEnum):
    TOOL_WAIT = "tool_wait"
    USER_WAIT = "user_wait"
    OTHER = "other"
    DONE = "done"  # nothing is expected any more: refused while a tool call is claimed


class Order(StrEnum):
    ASCENDING = "asc"
    DESCENDING = "desc"


class Keep(StrEnum):
    """Leaves a value as it is, where None means something else."""

    KEEP = "keep"


@dataclass(frozen=True)
class Session:
    """A session as of one moment. ``revision`` grows with every change; times are microseconds, UTC.

    ``id`` is what clients call it; ``uid`` is what engines know it by, and what no other session ever has.
    """

    id: str
    uid: str
    model: str
    metadata: dict[str, Any]
    cache_salt: str | None
    extra_key: str | None
    status: SessionStatus
    head_id: str | None
    revision: int
    created_us: int
    updated_us: int
    expires_us: int | None


@dataclass(frozen=True)
class SessionPage:
    sessions: list[Session]
    has_more: bool


@dataclass(frozen=True)
class Since:
    """The session, and the oldest of the entries that come after some ``seq``.

    ``kept`` is that ``seq``, or the newest before it if a rewind took that entry back.
    """

    session: Session
    kept: int
    page: EntryPage


@dataclass(frozen=True)
class Appended:
    """``open_calls`` tool calls have no result now."""

    session: Session
    entries: list[Entry]
    open_calls: int


@dataclass(frozen=True)
class Suspended:
    """``ranks`` are the live ranks of the engine that has the session's KV: who to ask whether it is durable.
    ``beside`` are those of its other DP ranks, where a request of the turn, which was of that ``epoch``, may have gone
    all the same, ``decoding`` those of the engines that may have decoded what it has prefilled."""

    session: Session
    pending_tool_calls: list[str]
    ranks: list[Engine]
    beside: Sequence[Sequence[Engine]] = ()
    decoding: Sequence[Sequence[Engine]] = ()
    epoch: int = 0


@dataclass(frozen=True)
class Resumed:
    """All that the next turn needs; ``engine`` is None when no live engine serves the session's model. ``cache_salt``
    tells the session's KV apart from others'; it is more than what its client chose (`salts`). ``engine_session`` is
    what goes to the engine as ``session_id``: the session's uid and the token of this turn (`fleet.turns`)."""

    session: Session
    lease: Lease
    tail: EntryPage
    pending_tool_calls: list[str]
    engine: Server | None
    kv: KvOutlook
    cache_salt: str | None
    engine_session: str


@dataclass(frozen=True)
class ToolCall:
    """A tool call; ``result`` is the payload of its result, once it is done or has failed.

    ``typical_s`` is the median of what the tool took before, in this tenant's sessions; None if nothing is known.
    """

    id: str
    name: str
    state: ToolCallState
    expected_s: float | None
    typical_s: float | None
    claimed_us: int
    finished_us: int | None
    result: dict[str, Any] | None
    revision: int


@dataclass(frozen=True)
class Claimed:
    """``fresh`` if the caller is to execute the call now; otherwise it has a result already."""

    call: ToolCall
    fresh: bool


@dataclass(frozen=True)
class PagesOfSession:
    """Where the pages of a session can be brought back: the ranks, and the ordered keys of what each can restore.
    ``durable_on`` is where all of that is; without ranks, all that is stored."""

    session: Session
    ranks: Sequence[Engine]
    keys: Sequence[bytes]  # packed, one string a rank
    durable_on: Durability | None


@dataclass(frozen=True)
class Pinned:
    """The session that engines know as ``uid`` is pinned until then, microseconds, or not (None)."""

    uid: str
    until_us: int | None
    ranks: Sequence[Engine]
