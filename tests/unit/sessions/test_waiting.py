"""What the verbs tell of sessions that wait, and what that costs: no statement, but where several calls are open."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
import sqlalchemy as sa
from sent import statements

from agentstate.errors import LeaseLost
from agentstate.fleet import engines, passing
from agentstate.fleet.engines import Engine
from agentstate.fleet.passing import Passing
from agentstate.fleet.waits import Awaited
from agentstate.lookahead.durations import OTHER, PERSON
from agentstate.sessions.belonging import Wanted
from agentstate.sessions.conversations import Conversation, Said
from agentstate.sessions.leases import LeaseKey
from agentstate.sessions.outcomes import SuspendReason
from agentstate.sessions.transcript import NewEntry
from agentstate.sessions.verbs import Sessions
from agentstate.sql.database import Database
from agentstate.sql.models import EntryKind

ENGINE = Engine("eng_1", "n1", 0, "tcp://1", "http://127.0.0.1:30000/v1", "m", "f1", "/pages", control_secret="s")


class Told:
    """Stands in for `Waits`: the names of what it was told, and with what."""

    def __init__(self) -> None:
        self.all: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *given: self.all.append((name, *given))

    def take(self) -> list[tuple[Any, ...]]:
        found, self.all = self.all, []
        return found


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def sessions(database: Database, told: Told) -> Sessions:
    with database.write() as connection:
        engines.register(connection, ENGINE)
    return Sessions(database, 3600, waits=told)  # type: ignore[arg-type]


def call(call_id: str) -> NewEntry:
    return NewEntry(EntryKind.TOOL_CALL, {"name": "run", "arguments": {"command": "git diff"}}, call_id)


def output(call_id: str) -> NewEntry:
    return NewEntry(EntryKind.TOOL_RESULT, {"output": None}, call_id)


def day(sessions: Sessions, name: str) -> None:
    """A turn by the API, and two through the gateway."""
    sessions.create("m", session_id=name)
    key = sessions.resume(name, lease_ttl_s=60, tail=0).lease.key
    sessions.append(name, key, [NewEntry(EntryKind.MESSAGE, {"text": "hello"})])
    sessions.claim(name, "a", "search", key=key)
    sessions.finish(name, "a", {"output": 1}, key=key)
    sessions.suspend(name, key, SuspendReason.USER_WAIT)
    for number, results in enumerate(([], [output("b0")])):
        wanted = Wanted("m", session=name, results=results)
        begun = sessions.begin(wanted, lease_ttl_s=60, expires_in_s=None).resumed
        assert begun is not None
        said = Conversation([Said("user", bytes([number]) * 16, 5)])
        sessions.end(name, begun.lease.key, said, [call(f"b{number}")], expires_in_s=None)


def test_telling_costs_no_statement(database: Database, sessions: Sessions) -> None:
    silent = Sessions(database, 3600)
    for name, verbs in (("first", silent), ("first too", sessions)):
        day(verbs, name)  # what is read once is read
    with statements() as without:
        day(silent, "s")
    with statements() as with_waits:
        day(sessions, "s2")
    assert [text for text, _ in with_waits] == [text for text, _ in without]


def test_what_is_appended_can_be_passed_on_to_another_worker(database: Database) -> None:
    """Nothing that a client may write keeps an append that is done from being answered."""
    into, out = passing.pair()
    told = Told()
    with closing(into), closing(out):
        sessions = Sessions(database, 3600, waits=Passing(into))
        sessions.create("m", session_id="s")
        key = sessions.resume("s", lease_ttl_s=60, tail=0).lease.key
        out.recv(passing.MAX_BYTES)
        long = {"name": "run", "arguments": {"command": "sleep"}, "expected_s": 10**30}
        sessions.append("s", key, [NewEntry(EntryKind.TOOL_CALL, long, "a")])
        passing.hear(out.recv(passing.MAX_BYTES), told)  # type: ignore[arg-type]
    (note,) = told.take()
    assert note[0] == "begun" and [one.announced_s for one in note[3]] == [1e30]


def test_what_is_told_of_a_turn(sessions: Sessions, told: Told) -> None:
    uid = sessions.create("m", session_id="s").uid
    key = sessions.resume("s", lease_ttl_s=60, tail=0).lease.key
    ((what, session, rank),) = told.take()
    assert (what, session, rank.id) == ("over", uid, "eng_1")
    sessions.append("s", key, [NewEntry(EntryKind.MESSAGE, {"text": "hello"})])
    assert told.take() == []
    sessions.append("s", key, [call("a"), call("b")])
    assert told.take() == [("begun", "default", uid, [Awaited("run", "git diff")] * 2)]
    sessions.append("s", key, [output("a")])
    (learned, (_, _, _, (left,))) = told.take()
    assert (learned[0], learned[1], learned[2][0].tool, learned[2][0].head) == ("took", "default", "run", "git diff")
    assert (left.tool, left.head, left.age_s >= 0) == ("run", "git diff", True)
    sessions.suspend("s", key, SuspendReason.TOOL_WAIT)
    ((what, _, _, (left,), rank),) = told.take()
    assert (what, left.tool, rank.id) == ("begun", "run", "eng_1")
    sessions.finish("s", "b", {"output": 1})
    assert [one[0] for one in told.take()] == ["took", "begun"]


@pytest.mark.parametrize(
    ("reason", "tool"), [(SuspendReason.USER_WAIT, PERSON), (SuspendReason.OTHER, OTHER), (SuspendReason.DONE, None)]
)
def test_how_long_it_waited_is_told_by_what_it_waited_for(
    sessions: Sessions, told: Told, reason: SuspendReason, tool: str | None
) -> None:
    sessions.create("m", session_id="s")
    sessions.suspend("s", sessions.resume("s", lease_ttl_s=60, tail=0).lease.key, reason)
    told.take()
    sessions.resume("s", lease_ttl_s=60, tail=0)
    learned = [one[2][0].tool for one in told.take() if one[0] == "took"]
    assert learned == ([] if tool is None else [tool])


def test_a_turn_that_lapsed_was_no_wait(sessions: Sessions, database: Database, told: Told) -> None:
    sessions.create("m", session_id="s")
    sessions.suspend("s", sessions.resume("s", lease_ttl_s=60, tail=0).lease.key, SuspendReason.USER_WAIT)
    sessions.resume("s", lease_ttl_s=60, tail=0)
    told.take()
    with database.write() as connection:
        connection.execute(sa.text("UPDATE leases SET expires_us = 1"))
    sessions.resume("s", lease_ttl_s=60, tail=0)
    assert [one[0] for one in told.take()] == ["over"]


def test_what_was_not_committed_is_not_told(sessions: Sessions, database: Database, told: Told) -> None:
    sessions.create("m", session_id="s")
    key = sessions.resume("s", lease_ttl_s=60, tail=0).lease.key
    told.take()
    with pytest.raises(LeaseLost):
        sessions.append("s", LeaseKey("another", 1), [call("a")])
    with pytest.raises(RuntimeError, match="broken"), database.write():
        sessions.append("s", key, [call("a")])
        raise RuntimeError("broken")
    assert told.take() == []


def test_calls_that_a_fork_took_along_have_their_heads(sessions: Sessions, told: Told) -> None:
    sessions.create("m", session_id="s")
    key = sessions.resume("s", lease_ttl_s=60, tail=0).lease.key
    sessions.append("s", key, [call("a")])
    sessions.suspend("s", key, SuspendReason.TOOL_WAIT)
    sessions.fork("s", None, fork_id="fork")
    fork = sessions.resume("fork", lease_ttl_s=60, tail=0).lease.key
    told.take()
    sessions.suspend("fork", fork, SuspendReason.TOOL_WAIT)
    ((_, _, _, (left,), _),) = told.take()
    assert (left.tool, left.head) == ("run", "git diff")
