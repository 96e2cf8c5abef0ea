"""A session's history: which runs of entries, in which order, are its transcript.

An entry belongs to the session that it was appended to, and a fork shares its parent's. So a history is a list of
segments, each a run of consecutive ``seq`` of one owner; the last one is the session's own and grows, the others are
closed and stored in the table ``segments``. ``seq`` grows along a history and is never given twice in one: after a
rewind the numbers of the entries that were taken back stay unused.

The list is bounded by ``MAX_SEGMENTS``, so that a read stays a constant number of statements. Segments that
rewinds leave are joined now and then, by giving their entries new ``seq`` (`agentstate.sessions.branches.compact`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate.sql.models import entries, segments
from agentstate.sql.prepared import Prepared

MAX_SEGMENTS = 256


@dataclass(frozen=True)
class Segment:
    """The entries ``first`` to ``last``, both included, of the session ``owner_id``."""

    owner_id: str
    first: int
    last: int

    @property
    def length(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True)
class History:
    """Segments in the order of their ``seq``, none of them empty. Slicing one gives another."""

    segments: tuple[Segment, ...] = ()

    @classmethod
    def of(cls, connection: Connection, row: Any) -> Self:
        """The history of a session's row, as far as it was read."""
        closed: list[Segment] = []
        if row.own_seq > 1:
            closed = [Segment(*found) for found in _CLOSED.all(connection, {"session": row.id})]
        return cls.joined([*closed, Segment(row.id, row.own_seq, row.next_seq - 1)])

    @classmethod
    def joined(cls, parts: Iterable[Segment]) -> Self:
        """The history of ``parts``, without empty ones and with neighbours of one owner joined."""
        joined: list[Segment] = []
        for part in parts:
            if part.length <= 0:
                continue
            if joined and joined[-1].owner_id == part.owner_id and joined[-1].last + 1 == part.first:
                part = Segment(part.owner_id, joined.pop().first, part.last)
            joined.append(part)
        return cls(tuple(joined))

    @property
    def length(self) -> int:
        return sum(segment.length for segment in self.segments)

    @property
    def first(self) -> int:
        """The ``seq`` of the oldest entry; 1 if there is none."""
        return self.segments[0].first if self.segments else 1

    def owner_of(self, seq: int) -> str | None:
        """The owner of entry ``seq`` of this history; None if there is no such entry."""
        return next((part.owner_id for part in self.segments if part.first <= seq <= part.last), None)

    def newest_to(self, seq: int) -> int:
        """The ``seq`` of the newest entry up to ``seq``; 0 if there is none."""
        return max((min(part.last, seq) for part in self.segments if part.first <= seq), default=0)

    def owners(self) -> list[str]:
        """The sessions whose entries these are, the newest entries' first."""
        return list(dict.fromkeys(part.owner_id for part in reversed(self.segments)))

    def between(self, first: int, last: int) -> Self:
        """The part of it from ``first`` to ``last``, both included."""
        return self.joined(
            Segment(part.owner_id, max(part.first, first), min(part.last, last)) for part in self.segments
        )

    def oldest(self, count: int) -> Self:
        """The first ``count`` entries, or all."""
        taken: list[Segment] = []
        for part in self.segments:
            taken.append(Segment(part.owner_id, part.first, min(part.last, part.first + count - 1)))
            count -= taken[-1].length
            if count <= 0:
                break
        return self.joined(taken)

    def newest(self, count: int) -> Self:
        """The last ``count`` entries, or all."""
        taken: list[Segment] = []
        for part in reversed(self.segments):
            taken.append(Segment(part.owner_id, max(part.first, part.last - count + 1), part.last))
            count -= taken[-1].length
            if count <= 0:
                break
        return self.joined(reversed(taken))

    @staticmethod
    def entries(parts: int) -> sa.ColumnElement[bool]:
        """SQL: whether a row of ``entries`` is one of a history of so many segments, given `as_parameters`."""
        return sa.or_(
            sa.false(),
            *(
                sa.and_(
                    entries.c.session_id == sa.bindparam(f"owner_{part}"),
                    entries.c.seq.between(sa.bindparam(f"first_{part}"), sa.bindparam(f"last_{part}")),
                )
                for part in range(parts)
            ),
        )

    def as_parameters(self) -> dict[str, Any]:
        """The values of `entries`."""
        values: dict[str, Any] = {}
        for number, part in enumerate(self.segments):
            values |= {f"owner_{number}": part.owner_id, f"first_{number}": part.first, f"last_{number}": part.last}
        return values

    def close(self, connection: Connection, session_id: str) -> None:
        """Make this the closed part of a session's history; what it appends from now on comes after it."""
        connection.execute(sa.delete(segments).where(segments.c.session_id == session_id))
        self.store(connection, session_id)

    def store(self, connection: Connection, session_id: str) -> None:
        """Like `close`, for a new session."""
        _STORE.send_each(
            connection,
            [
                {
                    "session_id": session_id,
                    "owner_id": part.owner_id,
                    "first_seq": part.first,
                    "last_seq": part.last,
                }
                for part in self.segments
            ],
        )


_CLOSED = Prepared(
    sa.select(segments.c.owner_id, segments.c.first_seq, segments.c.last_seq)
    .where(segments.c.session_id == sa.bindparam("session"))
    .order_by(segments.c.first_seq)
)
_STORE = Prepared(sa.insert(segments))
