"""Tool calls: claimed when their call is appended, finished when their result is.

Their times are kept, by the database's clock: how long a tool takes is what decides when pages are brought back.
A call whose claimant vanished becomes ``unknown``; it may have run or not, and nothing here ever runs it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate.database import now_us
from agentstate.errors import InvalidEntry
from agentstate.models import ToolCallState, tool_calls

OPEN = (ToolCallState.CLAIMED, ToolCallState.UNKNOWN)


@dataclass(frozen=True)
class Claim:
    """A tool call that is about to run. ``expected_s`` is the caller's estimate of its duration, if it has one."""

    call_id: str
    name: str
    expected_s: float | None
    seq: int


@dataclass(frozen=True)
class Finish:
    """The result of a tool call, at ``seq``."""

    call_id: str
    failed: bool
    seq: int


def record(connection: Connection, session_id: str, steps: Sequence[Claim | Finish]) -> None:
    """Write claims and results, in the order in which they were appended; a result may follow its own claim.

    Raises InvalidEntry for a call id that is claimed twice, and for a result whose call is not known or has one. The
    caller holds the session's lock. The number of statements does not depend on that of the steps.
    """
    if not steps:
        return
    known = {
        row.call_id: ToolCallState(row.state)
        for row in connection.execute(
            sa.select(tool_calls.c.call_id, tool_calls.c.state).where(
                tool_calls.c.session_id == session_id,
                tool_calls.c.call_id.in_({step.call_id for step in steps}),
            )
        )
    }
    for step in steps:
        state = known.get(step.call_id)
        if isinstance(step, Claim):
            if state is not None:
                raise InvalidEntry(f"tool call {step.call_id!r} exists already in session {session_id}")
            known[step.call_id] = ToolCallState.CLAIMED
        else:
            if state is None:
                raise InvalidEntry(
                    f"there is no tool call {step.call_id!r} in session {session_id} that this result could be of: "
                    "append the call first"
                )
            if state not in OPEN:
                raise InvalidEntry(f"tool call {step.call_id!r} of session {session_id} has a result already")
            known[step.call_id] = ToolCallState.FAILED if step.failed else ToolCallState.DONE
    claims = [step for step in steps if isinstance(step, Claim)]
    if claims:
        connection.execute(
            sa.insert(tool_calls).values(session_id=session_id, state=ToolCallState.CLAIMED, claimed_us=now_us()),
            [
                {"call_id": step.call_id, "name": step.name, "expected_s": step.expected_s, "call_seq": step.seq}
                for step in claims
            ],
        )
    finishes = [step for step in steps if isinstance(step, Finish)]
    if finishes:
        connection.execute(
            sa.update(tool_calls)
            .where(tool_calls.c.session_id == session_id, tool_calls.c.call_id == sa.bindparam("of"))
            .values(state=sa.bindparam("final"), result_seq=sa.bindparam("at"), finished_us=now_us()),
            [
                {
                    "of": step.call_id,
                    "final": ToolCallState.FAILED if step.failed else ToolCallState.DONE,
                    "at": step.seq,
                }
                for step in finishes
            ],
        )


def pending(connection: Connection, session_id: str) -> list[str]:
    """Ids of the calls without a result, in the order of their claims: still running, or ``unknown``."""
    return list(
        connection.execute(
            sa.select(tool_calls.c.call_id)
            .where(tool_calls.c.session_id == session_id, tool_calls.c.state.in_(OPEN))
            .order_by(tool_calls.c.call_seq)
        ).scalars()
    )


def in_flight(connection: Connection, session_id: str) -> list[str]:
    """Ids of the calls that are claimed and being executed, as far as anyone knows."""
    return list(
        connection.execute(
            sa.select(tool_calls.c.call_id)
            .where(tool_calls.c.session_id == session_id, tool_calls.c.state == ToolCallState.CLAIMED)
            .order_by(tool_calls.c.call_seq)
        ).scalars()
    )


def abandon(connection: Connection, session_id: str) -> None:
    """The runner of the session vanished: nobody knows any more what became of its claimed calls."""
    connection.execute(
        sa.update(tool_calls)
        .where(tool_calls.c.session_id == session_id, tool_calls.c.state == ToolCallState.CLAIMED)
        .values(state=ToolCallState.UNKNOWN)
    )


def whole_from(session_id: str, seq: int) -> sa.ScalarSelect[int]:
    """SQL expression: the last sequence number, ``seq`` or before, from which no result is cut off from its call.

    Where a call before ``seq`` has its result at or after it, the cut moves to that call, and on, until it separates
    none: the stretch is as long as the calls that overlap there, however long the history before it is.
    """
    cut = sa.select(sa.literal(seq, sa.BigInteger()).label("seq")).cte("cut", recursive=True)
    earlier = sa.select(tool_calls.c.call_seq).where(
        tool_calls.c.session_id == session_id,
        tool_calls.c.call_seq < cut.c.seq,
        tool_calls.c.result_seq >= cut.c.seq,
    )
    cut = cut.union(earlier)
    return sa.select(sa.func.min(cut.c.seq)).scalar_subquery()
