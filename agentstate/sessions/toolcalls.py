"""Tool calls: claimed when their call is appended, finished when their result is.

Their times are kept, by the database's clock: how long a tool takes decides when pages are brought back.
A call whose claimant vanished becomes ``unknown``; it may have run or not, and nothing here ever runs it again.

A fork has its parent's calls as it has its entries, without rows of its own; only those that were open at its branch
point are copied, as ``unknown``, because whoever claimed them works for the parent.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate.errors import InvalidEntry
from agentstate.fleet.waits import Took
from agentstate.lookahead import commands
from agentstate.sessions.history import History
from agentstate.sql.models import ToolCallState, tool_calls, tool_timings

OPEN = (ToolCallState.CLAIMED, ToolCallState.UNKNOWN)
TIMINGS = 100  # how many of a tool's last durations an estimate is made of
# A command is not looked for in longer arguments: they are the contents of files.
COMMAND_BYTES = 16 << 10
COMMAND_WORDS = 100
# The beginning of a command, kept where the arguments are not.
COMMAND_CHARACTERS = 80


@dataclass(frozen=True)
class Claim:
    """A tool call that is about to run. ``head`` is what the command that it runs is known by, empty if it runs none;
    ``expected_s`` is the caller's estimate of its duration, if it has one."""

    call_id: str
    name: str
    head: str
    expected_s: float | None
    seq: int


@dataclass(frozen=True)
class Finish:
    """The result of a tool call, at ``seq``."""

    call_id: str
    failed: bool
    seq: int


@dataclass(frozen=True)
class KnownCall:
    """A tool call of a history. ``result_seq`` is None while it has no result."""

    call_id: str
    name: str
    head: str | None
    state: ToolCallState
    expected_s: float | None
    call_seq: int
    result_seq: int | None
    claimed_us: int
    finished_us: int | None


@dataclass(frozen=True)
class OpenCall:
    """A tool call without a result."""

    call_id: str
    name: str
    head: str | None
    expected_s: float | None
    claimed_us: int


def command(arguments: Any) -> str | None:
    """The command line in a tool's arguments, an object or the text of one; None if they have none."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if len(arguments) <= COMMAND_BYTES else None
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, Mapping):
        return None
    found = arguments.get("command", arguments.get("cmd"))
    if isinstance(found, list):
        found = " ".join(map(str, found[:COMMAND_WORDS]))
    return found if isinstance(found, str) else None


def beginning(arguments: Any) -> dict[str, str] | None:
    """Arguments that have nothing but the beginning of the command, for calls whose arguments are kept elsewhere or not
    at all."""
    found = command(arguments)
    return None if found is None else {"command": found[:COMMAND_CHARACTERS]}


def head(arguments: Any) -> str:
    """What the command in a tool's arguments is known by (`commands.head`); empty if they have none."""
    found = command(arguments)
    return "" if found is None else commands.head(found)


def known(connection: Connection, session_id: str, history: History, call_ids: Collection[str]) -> dict[str, KnownCall]:
    """The calls with these ids that are part of ``history``, the session's whole history."""
    rows = connection.execute(
        sa.select(tool_calls).where(
            tool_calls.c.session_id.in_({session_id, *history.owners()}), tool_calls.c.call_id.in_(call_ids)
        )
    )
    found = {}
    for row in rows:
        if row.session_id == session_id:
            # Also one that was copied when the session was forked, whose call is another's entry.
            part = history.owner_of(row.call_seq) is not None
        else:
            part = row.result_seq is not None and history.owner_of(row.result_seq) == row.session_id
        if part:
            fields = {name: row._mapping[name] for name in KnownCall.__dataclass_fields__}
            found[row.call_id] = KnownCall(**{**fields, "state": ToolCallState(row.state)})
    return found


def record(
    connection: Connection,
    tenant: str,
    session_id: str,
    history: History,
    steps: Sequence[Claim | Finish],
    time_us: int,
) -> list[Took]:
    """Write claims and results, in the order in which they were appended; a result may follow its own claim. Returns
    how long the calls took whose results these are.

    Raises InvalidEntry for a call id that is claimed twice, and for a result whose call is not known or has one. The
    caller holds the session's lock. The number of statements does not depend on that of the steps.
    """
    if not steps:
        return []
    before = known(connection, session_id, history, {step.call_id for step in steps})
    states = {call.call_id: call.state for call in before.values()}
    for step in steps:
        state = states.get(step.call_id)
        if isinstance(step, Claim):
            if state is not None:
                raise InvalidEntry(f"tool call {step.call_id!r} exists already in this session")
            states[step.call_id] = ToolCallState.CLAIMED
        else:
            if state is None:
                raise InvalidEntry(
                    f"there is no tool call {step.call_id!r} in this session that this result could be of: "
                    "append the call first"
                )
            if state not in OPEN:
                raise InvalidEntry(f"tool call {step.call_id!r} of this session has a result already")
            states[step.call_id] = ToolCallState.FAILED if step.failed else ToolCallState.DONE
    claims = {step.call_id: step for step in steps if isinstance(step, Claim)}
    if claims:
        connection.execute(
            sa.insert(tool_calls).values(session_id=session_id, state=ToolCallState.CLAIMED, claimed_us=time_us),
            [
                {
                    "call_id": step.call_id,
                    "name": step.name,
                    "head": step.head,
                    "expected_s": step.expected_s,
                    "call_seq": step.seq,
                }
                for step in claims.values()
            ],
        )
    finishes = [step for step in steps if isinstance(step, Finish)]
    if finishes:
        connection.execute(
            sa.update(tool_calls)
            .where(tool_calls.c.session_id == session_id, tool_calls.c.call_seq == sa.bindparam("called_at"))
            .values(state=sa.bindparam("final"), result_seq=sa.bindparam("at"), finished_us=time_us),
            [
                {
                    "called_at": claims[step.call_id].seq if step.call_id in claims else before[step.call_id].call_seq,
                    "final": ToolCallState.FAILED if step.failed else ToolCallState.DONE,
                    "at": step.seq,
                }
                for step in finishes
            ],
        )
    # If a call was appended with its result, or its claimant vanished, its times say nothing about the tool.
    timed = [call for step in finishes if (call := before.get(step.call_id)) and call.state is ToolCallState.CLAIMED]
    if timed:
        connection.execute(
            sa.insert(tool_timings).values(tenant=tenant, finished_us=time_us),
            [{"name": call.name, "seconds": max(0, time_us - call.claimed_us) / 1_000_000} for call in timed],
        )
    return [
        Took(call.name, call.head or "", (time_us - call.claimed_us) / 1_000_000, call.expected_s) for call in timed
    ]


def pending(connection: Connection, session_id: str) -> list[OpenCall]:
    """The calls without a result, in the order of their claims: still running, or ``unknown``."""
    return _open(connection, session_id, OPEN)


def in_flight(connection: Connection, session_id: str) -> list[str]:
    """Ids of the calls that are claimed and being executed, as far as anyone knows."""
    return [call.call_id for call in _open(connection, session_id, (ToolCallState.CLAIMED,))]


def abandon(connection: Connection, session_id: str) -> None:
    """The runner of the session vanished: its claimed calls become ``unknown``."""
    connection.execute(
        sa.update(tool_calls)
        .where(tool_calls.c.session_id == session_id, tool_calls.c.state == ToolCallState.CLAIMED)
        .values(state=ToolCallState.UNKNOWN)
    )


def copy_open(connection: Connection, session_id: str, fork_id: str) -> None:
    """Give a fork the calls that are open in its parent, as ``unknown``."""
    columns = ("call_seq", "call_id", "name", "head", "expected_s", "claimed_us")
    connection.execute(
        sa.insert(tool_calls).from_select(
            ["session_id", "state", *columns],
            sa.select(
                sa.literal(fork_id), sa.literal(ToolCallState.UNKNOWN.value), *(tool_calls.c[name] for name in columns)
            ).where(tool_calls.c.session_id == session_id, tool_calls.c.state.in_(OPEN)),
        )
    )


def take_back(connection: Connection, session_id: str) -> None:
    """Forget the open calls of a session that is rewound to before them."""
    connection.execute(sa.delete(tool_calls).where(tool_calls.c.session_id == session_id, tool_calls.c.state.in_(OPEN)))


def typical_s(connection: Connection, tenant: str, name: str) -> float | None:
    """The median duration of a tool's last calls in this tenant's sessions, in seconds; None if it has none."""
    last = connection.execute(
        sa.select(tool_timings.c.seconds)
        .where(tool_timings.c.tenant == tenant, tool_timings.c.name == name)
        .order_by(tool_timings.c.finished_us.desc())
        .limit(TIMINGS)
    )
    return statistics.median(found) if (found := last.scalars().all()) else None


def whole_from(connection: Connection, history: History, seq: int) -> int:
    """The last sequence number, ``seq`` or before, from which no result is cut off from its call.

    If a call before ``seq`` has its result at or after it, the cut moves to that call, and on, until it separates none.
    The stretch is as long as the calls that overlap there, however long the history before it is.
    """
    cut = sa.select(sa.literal(seq, sa.BigInteger()).label("seq")).cte("cut", recursive=True)
    # One lower bound, so that the index on (session_id, result_seq) is entered there and nowhere before.
    parts = [
        sa.and_(
            tool_calls.c.session_id == part.owner_id,
            tool_calls.c.result_seq >= sa.case((cut.c.seq > part.first, cut.c.seq), else_=part.first),
            tool_calls.c.result_seq <= part.last,
        )
        for part in history.segments
    ]
    earlier = sa.select(tool_calls.c.call_seq).where(tool_calls.c.call_seq < cut.c.seq, sa.or_(sa.false(), *parts))
    cut = cut.union(earlier)
    found: int = connection.execute(sa.select(sa.func.min(cut.c.seq))).scalar_one()
    return found


# Sorted after it: for an ORDER BY, SQLite would walk through all calls of the session in the order of the primary key.
_OPEN = sa.select(*(tool_calls.c[name] for name in OpenCall.__dataclass_fields__), tool_calls.c.call_seq).where(
    tool_calls.c.session_id == sa.bindparam("session"),
    tool_calls.c.state.in_(sa.bindparam("states", expanding=True)),
)


def _open(connection: Connection, session_id: str, states: Sequence[ToolCallState]) -> list[OpenCall]:
    found = connection.execute(_OPEN, {"session": session_id, "states": states})
    return [OpenCall(*row[:-1]) for row in sorted(found, key=lambda row: row.call_seq)]
