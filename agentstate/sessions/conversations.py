"""Which session a conversation belongs to, where its client does not say: its messages tell.

A request of a conversation carries all of its messages. After each turn its session remembers a *tip*: a digest of all
messages up to and with the answer. A request that begins with the messages of a tip goes on from there. A client that
compacts its conversation keeps the last messages as they are, so a tip also has a digest of its last two. Finding a
session takes one query of a bounded size, however long the conversation.

An older tip of a session is a way that the conversation has left: who returns to it begins a branch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate.sql.database import now_us
from agentstate.sql.models import conversation_tips as table
from agentstate.sql.models import sessions
from agentstate.sql.prepared import Prepared

DIGEST_BYTES = 16
LOOKED_UP = 16  # answers of a request, the newest
CANDIDATES = 32
KEPT = 64  # tips of a session
# Two messages with fewer characters say nothing of where they come from: "hi" and its answer.
TELLING_CHARACTERS = 200


@dataclass(frozen=True)
class Said:
    """One message: the digest of its content, of ``DIGEST_BYTES``, and how many characters it has."""

    role: str
    digest: bytes
    size: int


class Conversation:
    """The messages of one request, or of a request and its answer. Roles are ``system``, ``user``, ``assistant`` and
    ``tool``."""

    def __init__(self, messages: Sequence[Said]):
        self._messages = messages

    def __len__(self) -> int:
        return len(self._messages)

    def with_answer(self, answer: Sequence[Said]) -> Conversation:
        return Conversation([*self._messages, *answer])

    @property
    def system(self) -> bytes:
        """A digest of the system messages that it begins with."""
        digest = _hash()
        for message in self._messages:
            if message.role != "system":
                break
            digest.update(message.digest)
        return digest.digest()

    def whole(self) -> bytes:
        """The digest of all its messages."""
        digest = _hash()
        for message in self._messages:
            digest.update(message.digest)
        return digest.digest()

    def prefixes(self) -> dict[bytes, int]:
        """Digests of what it has up to each of its last answers, with the number of messages that is."""
        ends = set(self._ends()[-LOOKED_UP:])
        digest, found = _hash(), {}
        for number, message in enumerate(self._messages, 1):
            digest.update(message.digest)
            if number in ends:
                found[digest.copy().digest()] = number
        return found

    def pairs(self) -> dict[bytes, int]:
        """Digests of each of its last answers with the message before, where these are long enough to tell anything."""
        return {pair: end for end in self._ends()[-LOOKED_UP:] if (pair := self._pair(end)) is not None}

    def last_pair(self) -> bytes | None:
        return self._pair(len(self._messages))

    def _pair(self, end: int) -> bytes | None:
        pair = self._messages[max(0, end - 2) : end]
        if len(pair) < 2 or sum(message.size for message in pair) < TELLING_CHARACTERS:
            return None
        digest = _hash()
        for message in pair:
            digest.update(message.digest)
        return digest.digest()

    def _ends(self) -> list[int]:
        """After how many messages each answer ends; one answer may be several messages."""
        roles = [message.role for message in self._messages]
        return [
            number
            for number, (role, following) in enumerate(zip(roles, [*roles[1:], ""], strict=False), 1)
            if role == "assistant" != following
        ]


@dataclass(frozen=True)
class Tip:
    """Where a request goes on from: after ``messages`` of its messages, in the session called ``session``, whose head
    was ``head_entry`` then. ``newest`` if that session has not gone on since, as of its ``revision``; ``compacted`` if
    only the last messages are the same."""

    id: int
    session: str
    model: str
    messages: int
    head_entry: str | None
    newest: bool
    compacted: bool
    revision: int


def find(
    connection: Connection, tenant: str, conversation: Conversation, *, of_session: str | None = None
) -> Iterator[Tip]:
    """The tips that a request may go on from, the best first: the longest beginning, and of the same a session that has
    not gone on since. Only those of the session with the uid ``of_session``, if that is given."""
    prefixes = conversation.prefixes()
    if not prefixes:
        return
    # Nearly all requests go on from their last answer.
    longest = max(prefixes, key=prefixes.__getitem__)
    of = {"of_tenant": tenant, "of_session": of_session}
    at_last = _tips(
        (_AT if of_session is None else _AT_OF_SESSION).all(connection, {**of, "at": longest}), prefixes, {}
    )
    yield from at_last
    pairs = conversation.pairs()
    values: dict[str, Any] = dict(of)
    values |= zip(_PREFIXES, islice(cycle(prefixes), LOOKED_UP), strict=True)
    values |= zip(_PAIRS, [*pairs, *[None] * (LOOKED_UP - len(pairs))], strict=True)
    known = {tip.id for tip in at_last}
    rows = (_FIND if of_session is None else _FIND_OF_SESSION).all(connection, values)
    yield from (tip for tip in _tips(rows, prefixes, pairs) if tip.id not in known)


def _tips(rows: Sequence[Any], prefixes: Mapping[bytes, int], pairs: Mapping[bytes, int]) -> list[Tip]:
    """The tips that rows are, the best first."""
    found = []
    for row in rows:
        compacted = row.digest not in prefixes
        messages = pairs[row.pair] if compacted else prefixes[row.digest]
        # Who keeps the last messages only, and not those of the session's end, has not compacted it.
        if not compacted or row.newest:
            newest = bool(row.newest)
            found.append(Tip(row.id, row.name, row.model, messages, row.head_entry, newest, compacted, row.revision))
    return sorted(found, key=lambda tip: (tip.compacted, -tip.messages, not tip.newest))


def still_newest(connection: Connection, session: Any, tip: Tip) -> bool:
    """Whether a session, whose row is locked by now, still stands at the tip that was its newest when it was found."""
    # Whatever ends a turn changes the session.
    if session.revision == tip.revision:
        return True
    newest: int | None = _NEWEST.scalar(connection, {"of_session": session.id})
    return newest == tip.id


def known_system(connection: Connection, session_uid: str) -> bytes | None:
    """The digest of the system messages of a session's last turn; None if it had none."""
    system: bytes | None = _SYSTEM.scalar(connection, {"of_session": session_uid})
    return system


def remember(
    connection: Connection, tenant: str, session_uid: str, conversation: Conversation, head_entry: str | None
) -> None:
    """Note that a turn of the session has ended with ``conversation``."""
    _REMEMBER.send(
        connection,
        {
            "tenant": tenant,
            "session_id": session_uid,
            "digest": conversation.whole(),
            "pair": conversation.last_pair(),
            "system": conversation.system,
            "messages": len(conversation),
            "head_entry": head_entry,
        },
    )
    _FORGET.send(connection, {"of_session": session_uid, "before_oldest": KEPT - 1})


# Built once: every request runs some of them, and building one takes longer than running it. So a request has always as
# many digests; those that it has not are one that it has, or none.
_PREFIXES = [f"prefix_{number}" for number in range(LOOKED_UP)]
_PAIRS = [f"pair_{number}" for number in range(LOOKED_UP)]
_of_session = table.c.session_id == sa.bindparam("of_session")
_later = table.alias("later")
_last = sa.select(sa.func.max(_later.c.id)).where(_later.c.session_id == table.c.session_id).scalar_subquery()
_found = (
    sa.select(table, sessions.c.name, sessions.c.model, sessions.c.revision, (table.c.id == _last).label("newest"))
    .join(sessions, sessions.c.id == table.c.session_id)
    .where(
        table.c.tenant == sa.bindparam("of_tenant"),
        sessions.c.deleted_us.is_(None),
        sa.or_(sessions.c.expires_us.is_(None), sessions.c.expires_us > now_us()),
    )
    .order_by(table.c.id.desc())
    .limit(CANDIDATES)
)
_at = _found.where(table.c.digest == sa.bindparam("at", type_=table.c.digest.type))
_any = _found.where(
    table.c.digest.in_([sa.bindparam(name, type_=table.c.digest.type) for name in _PREFIXES])
    | table.c.pair.in_([sa.bindparam(name, type_=table.c.pair.type) for name in _PAIRS])
)
_AT, _AT_OF_SESSION = Prepared(_at), Prepared(_at.where(_of_session))
_FIND, _FIND_OF_SESSION = Prepared(_any), Prepared(_any.where(_of_session))
_NEWEST = Prepared(sa.select(sa.func.max(table.c.id).label("newest")).where(_of_session))
_SYSTEM = Prepared(sa.select(table.c.system).where(_of_session).order_by(table.c.id.desc()).limit(1))
_REMEMBER = Prepared(sa.insert(table).values(created_us=now_us()))
_oldest = (
    sa.select(table.c.id)
    .where(_of_session)
    .order_by(table.c.id.desc())
    .offset(sa.bindparam("before_oldest", type_=sa.Integer()))
    .limit(1)
    .scalar_subquery()
)
_FORGET = Prepared(sa.delete(table).where(_of_session, table.c.id < _oldest))


def _hash() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=DIGEST_BYTES)
