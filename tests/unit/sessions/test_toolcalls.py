from __future__ import annotations

import pytest
import sqlalchemy as sa

from agentstate.errors import InvalidEntry, ToolCallClaimed, ToolCallReused, ToolCallUnknown, ToolInFlight
from agentstate.sessions import toolcalls
from agentstate.sessions.collection import collect
from agentstate.sessions.outcomes import SuspendReason
from agentstate.sessions.transcript import BLOB_BYTES, NewEntry
from agentstate.sessions.verbs import Sessions
from agentstate.sql.database import Database
from agentstate.sql.models import EntryKind, SessionStatus


def call(call_id: str, expected_s: float | None = None) -> NewEntry:
    return NewEntry(EntryKind.TOOL_CALL, {"name": "search", "expected_s": expected_s}, call_id)


def output(call_id: str) -> NewEntry:
    return NewEntry(EntryKind.TOOL_RESULT, {"output": "found"}, call_id)


def failure(call_id: str) -> NewEntry:
    return NewEntry(EntryKind.TOOL_RESULT, {"error": "timed out"}, call_id)


@pytest.mark.parametrize(
    ("arguments", "command", "head"),
    [
        ({"command": "cd /tmp && pytest -q tests"}, "cd /tmp && pytest -q tests", "pytest"),
        ('{"command": "git diff secret"}', "git diff secret", "git diff"),
        ({"cmd": ["timeout", "60", "make", "lint"]}, "timeout 60 make lint", "make lint"),
        ({"command": ["x"] * 1000}, " ".join(["x"] * 100), "x"),
        ({"command": "\udcff"}, "\udcff", ""),
        ({"command": 7}, None, ""),
        ({"query": "ls"}, None, ""),
        ("ls -l", None, ""),
        ("{" * 1000, None, ""),
        ('{"command": "ls' + " " * 20_000 + '"}', None, ""),
        (["ls"], None, ""),
        (None, None, ""),
    ],
    ids=str,
)
def test_what_a_command_is_known_by(arguments: object, command: str | None, head: str) -> None:
    assert toolcalls.command(arguments) == command
    assert toolcalls.head(arguments) == head
    assert toolcalls.beginning(arguments) == (None if command is None else {"command": command[:80]})


def stored(database: Database) -> dict[str, sa.Row[tuple[object, ...]]]:
    with database.read() as connection:
        return {row.call_id: row for row in connection.execute(sa.text("SELECT * FROM tool_calls"))}


def test_a_call_is_claimed_then_done_or_failed_with_its_times(sessions: Sessions, database: Database) -> None:
    session = sessions.create("m")
    resumed = sessions.resume(session.id, lease_ttl_s=60, tail=1)
    sessions.append(session.id, resumed.lease.key, [call("a", expected_s=2.5), call("b"), call("c")])
    claimed = stored(database)
    assert {row.state for row in claimed.values()} == {"claimed"}
    assert (claimed["a"].name, claimed["a"].expected_s, claimed["b"].expected_s) == ("search", 2.5, None)
    sessions.append(session.id, resumed.lease.key, [output("a"), failure("b")])
    finished = stored(database)
    assert {call_id: row.state for call_id, row in finished.items()} == {"a": "done", "b": "failed", "c": "claimed"}
    assert (finished["a"].call_seq, finished["a"].result_seq) == (1, 4)
    assert finished["a"].finished_us >= finished["a"].claimed_us == claimed["a"].claimed_us
    assert finished["c"].finished_us is None


def test_a_turn_cannot_be_done_while_a_tool_runs(sessions: Sessions) -> None:
    session = sessions.create("m")
    key = sessions.resume(session.id, lease_ttl_s=60, tail=1).lease.key
    sessions.append(session.id, key, [call("a"), call("b"), output("a")])
    with pytest.raises(ToolInFlight, match="tool calls b"):
        sessions.suspend(session.id, key, SuspendReason.DONE)
    assert sessions.read(session.id).status is SessionStatus.RUNNING
    assert sessions.suspend(session.id, key, SuspendReason.TOOL_WAIT).pending_tool_calls == ["b"]


def test_a_tool_may_run_on_while_the_session_is_suspended(sessions: Sessions) -> None:
    session = sessions.create("m")
    key = sessions.resume(session.id, lease_ttl_s=60, tail=1).lease.key
    sessions.append(session.id, key, [call("a")])
    sessions.suspend(session.id, key, SuspendReason.TOOL_WAIT)
    resumed = sessions.resume(session.id, lease_ttl_s=60, tail=1)
    assert resumed.pending_tool_calls == ["a"]
    sessions.append(session.id, resumed.lease.key, [output("a")])
    assert sessions.suspend(session.id, resumed.lease.key, SuspendReason.DONE).pending_tool_calls == []


def test_calls_of_a_runner_that_vanished_are_unknown_and_can_still_get_a_result(
    sessions: Sessions, database: Database
) -> None:
    session = sessions.create("m")
    key = sessions.resume(session.id, lease_ttl_s=60, tail=1).lease.key
    sessions.append(session.id, key, [call("a"), call("b"), output("b")])
    with database.write() as connection:
        connection.execute(sa.text("UPDATE leases SET expires_us = 1"))
    resumed = sessions.resume(session.id, lease_ttl_s=60, tail=1)
    assert resumed.pending_tool_calls == ["a"]
    assert {call_id: row.state for call_id, row in stored(database).items()} == {"a": "unknown", "b": "done"}
    with pytest.raises(InvalidEntry, match="exists already"):
        sessions.append(session.id, resumed.lease.key, [call("a")])
    sessions.append(session.id, resumed.lease.key, [failure("a")])
    assert stored(database)["a"].state == "failed"


def test_sessions_have_call_ids_of_their_own(sessions: Sessions) -> None:
    for _ in range(2):
        session = sessions.create("m")
        key = sessions.resume(session.id, lease_ttl_s=60, tail=1).lease.key
        sessions.append(session.id, key, [call("a"), output("a")])


def test_how_long_a_tool_takes_outlives_its_sessions(sessions: Sessions, database: Database) -> None:
    def timings() -> list[tuple[str, str, float]]:
        with database.read() as connection:
            found = connection.execute(sa.text("SELECT tenant, name, seconds FROM tool_timings ORDER BY id"))
            return [tuple(row) for row in found]

    session = sessions.create("m")
    key = sessions.resume(session.id, lease_ttl_s=60, tail=1).lease.key
    sessions.append(session.id, key, [call("a"), output("a")])
    assert timings() == [], "appended together, they say nothing"
    sessions.append(session.id, key, [call("b"), call("c"), call("d")])
    with database.write() as connection:
        connection.execute(sa.text("UPDATE tool_calls SET claimed_us = claimed_us - 2000000 WHERE call_id <> 'c'"))
        connection.execute(sa.text("UPDATE tool_calls SET claimed_us = claimed_us - 4000000 WHERE call_id = 'c'"))
        connection.execute(sa.text("UPDATE tool_calls SET state = 'unknown' WHERE call_id = 'd'"))
    sessions.append(session.id, key, [output("b"), failure("c"), output("d")])
    assert [(tenant, name) for tenant, name, _ in timings()] == [("default", "search")] * 2
    assert [seconds for _, _, seconds in timings()] == [pytest.approx(2, abs=1), pytest.approx(4, abs=1)]
    sessions.suspend(session.id, key, SuspendReason.DONE)
    sessions.delete(session.id, None)
    collect(database, expired_after_s=0)
    claimed = sessions.claim(sessions.create("m").id, "a", "search")
    assert claimed.fresh
    assert claimed.call.typical_s == pytest.approx(3, abs=1)
    assert sessions.of("other").claim(sessions.of("other").create("m").id, "a", "search").call.typical_s is None


def test_an_id_stands_for_one_call(sessions: Sessions, database: Database) -> None:
    """Whatever became of the call, in a later turn too, and where its arguments are large."""
    session = sessions.create("m")
    key = sessions.resume(session.id, lease_ttl_s=60, tail=1).lease.key
    arguments = {"q": "weather", "n": 1, "deep": [{"a": 1.5}], "text": "x" * BLOB_BYTES}
    others = [
        ("search", None),
        ("search", {**arguments, "n": True}),
        ("search", {**arguments, "more": None}),
        ("delete", arguments),
    ]

    def refused() -> None:
        for name, given in others:
            with pytest.raises(ToolCallReused, match="'call_0'"):
                sessions.claim(session.id, "call_0", name, given, key=key)

    assert sessions.claim(session.id, "call_0", "search", arguments, key=key).fresh
    refused()
    with pytest.raises(ToolCallClaimed):
        sessions.claim(session.id, "call_0", "search", arguments, key=key)
    fork = sessions.fork(session.id, None)
    with pytest.raises(ToolCallUnknown):
        sessions.claim(fork.id, "call_0", "search", arguments)
    with pytest.raises(ToolCallReused):
        sessions.claim(fork.id, "call_0", "delete", arguments)
    sessions.finish(session.id, "call_0", {"output": "rain"}, key=key)
    sessions.suspend(session.id, key, SuspendReason.DONE)
    key = sessions.resume(session.id, lease_ttl_s=60, tail=1).lease.key
    refused()
    same = sessions.claim(session.id, "call_0", "search", dict(reversed(arguments.items())), expected_s=3, key=key)
    assert (same.fresh, same.call.result) == (False, {"output": "rain"})
    assert len(sessions.entries(session.id).entries) == 2
