from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sent import statements

from agentstate.errors import (
    EntryNotFound,
    InvalidEntry,
    ModelMismatch,
    SessionError,
    SessionExists,
    SessionExpired,
    SessionNotFound,
)
from agentstate.fleet import engines, manifests, pins, turns
from agentstate.fleet.engines import Engine
from agentstate.fleet.manifests import KvState, Manifest
from agentstate.fleet.pins import PinTier
from agentstate.sessions import transcript
from agentstate.sessions.collection import collect
from agentstate.sessions.leases import LeaseKey
from agentstate.sessions.outcomes import Order, Resumed, SuspendReason
from agentstate.sessions.transcript import BLOB_BYTES, NewEntry
from agentstate.sessions.verbs import Sessions
from agentstate.sql import secret
from agentstate.sql.database import Database
from agentstate.sql.models import EntryKind, SessionStatus

ENGINE = Engine("eng_1", "n1", 0, "tcp://127.0.0.1:5000", "http://127.0.0.1:30000/v1", "m", "f1", "/pages")


def message(text: str = "hello") -> NewEntry:
    return NewEntry(EntryKind.MESSAGE, {"role": "user", "content": text})


def call(call_id: str) -> NewEntry:
    return NewEntry(EntryKind.TOOL_CALL, {"name": "search"}, call_id)


def output(call_id: str) -> NewEntry:
    return NewEntry(EntryKind.TOOL_RESULT, {"output": "found"}, call_id)


def resume(sessions: Sessions, session_id: str, tail: int = 50) -> Resumed:
    return sessions.resume(session_id, lease_ttl_s=60, tail=tail)


def expire(database: Database, session_id: str) -> None:
    with database.write() as connection:
        connection.execute(sa.text("UPDATE sessions SET expires_us = 1 WHERE id = :id"), {"id": session_id})


# --- create and read


def test_a_new_session_reads_as_it_was_created(sessions: Sessions) -> None:
    created = sessions.create("m", metadata={"user": {"name": "Ada ☕"}}, cache_salt="salt", extra_key="key")
    assert sessions.read(created.id) == created
    assert created.id.startswith("ses_")
    assert (created.status, created.revision, created.head_id) == (SessionStatus.IDLE, 1, None)
    assert (created.metadata, created.cache_salt, created.extra_key) == ({"user": {"name": "Ada ☕"}}, "salt", "key")
    assert created.created_us <= created.updated_us
    assert created.expires_us is None


def test_an_id_of_the_callers_own_is_given_once(sessions: Sessions) -> None:
    assert sessions.create("m", session_id="my-agent").id == "my-agent"
    with pytest.raises(SessionExists, match="my-agent"):
        sessions.create("other", session_id="my-agent")
    assert sessions.read("my-agent").model == "m"


def test_of_many_that_create_one_id_at_once_one_does(sessions: Sessions) -> None:
    start = threading.Barrier(6)
    outcomes: list[str] = []

    def create() -> None:
        start.wait()
        try:
            sessions.create("m", session_id="my-agent")
            outcomes.append("created")
        except SessionExists:
            outcomes.append("exists")

    threads = [threading.Thread(target=create) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["created"] + ["exists"] * 5


def test_every_verb_says_that_a_session_is_not_there_or_has_expired(sessions: Sessions, database: Database) -> None:
    session = sessions.create("m", expires_in_s=3600)
    assert session.expires_us == pytest.approx(session.created_us + 3_600_000_000, abs=10_000_000)
    key = resume(sessions, session.id).lease.key
    expire(database, session.id)
    for session_id, kind in (("ses_none", SessionNotFound), (session.id, SessionExpired)):
        for attempt in (
            lambda id: sessions.read(id),
            lambda id: sessions.entries(id),
            lambda id: resume(sessions, id),
            lambda id: sessions.append(id, key, [message()]),
            lambda id: sessions.suspend(id, key, SuspendReason.DONE),
            lambda id: sessions.renew(id, key, lease_ttl_s=60),
        ):
            with pytest.raises(kind, match=session_id) as error:
                attempt(session_id)
            assert isinstance(error.value, SessionError)


# --- append


def test_entries_follow_each_other_from_one(sessions: Sessions) -> None:
    session = sessions.create("m")
    key = resume(sessions, session.id).lease.key
    first = sessions.append(session.id, key, [message("a"), message("b")])
    second = sessions.append(session.id, key, [NewEntry(EntryKind.NOTE, {"n": 1})])
    found = sessions.entries(session.id).entries
    assert found == first.entries + second.entries
    assert [entry.seq for entry in found] == [1, 2, 3]
    assert [entry.parent_id for entry in found] == [None, found[0].id, found[1].id]
    assert sessions.read(session.id).head_id == found[2].id
    assert second.session.revision == first.session.revision + 1


def test_concurrent_appends_leave_no_gap(database_url: str) -> None:
    own = [Sessions(Database(database_url), 10) for _ in range(4)]
    session = own[0].create("m")
    key = resume(own[0], session.id).lease.key
    start = threading.Barrier(len(own))
    failures: list[BaseException] = []

    def append(sessions: Sessions) -> None:
        start.wait()
        try:
            for _ in range(8):
                sessions.append(session.id, key, [message(), message()])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=append, args=(sessions,)) for sessions in own]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    found = own[0].entries(session.id, limit=1000).entries
    assert [entry.seq for entry in found] == list(range(1, 65))
    assert [entry.parent_id for entry in found] == [None] + [entry.id for entry in found[:-1]]
    assert own[0].read(session.id).head_id == found[-1].id


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ([], "nothing to append"),
        ([NewEntry(EntryKind.MESSAGE, {}, "c1")], "has no call_id"),
        ([NewEntry(EntryKind.TOOL_CALL, {"name": "t"})], "needs a call_id"),
        ([NewEntry(EntryKind.TOOL_CALL, {}, "c1")], "name"),
        ([NewEntry(EntryKind.TOOL_CALL, {"name": ""}, "c1")], "name"),
        ([NewEntry(EntryKind.TOOL_CALL, {"name": "t", "expected_s": -1}, "c1")], "expected_s"),
        ([NewEntry(EntryKind.TOOL_CALL, {"name": "t", "expected_s": True}, "c1")], "expected_s"),
        ([NewEntry(EntryKind.TOOL_RESULT, {"output": 1})], "needs a call_id"),
        ([output("c1")], "append the call first"),
        ([call("c1"), NewEntry(EntryKind.TOOL_RESULT, {}, "c1")], "output or error"),
        ([call("c1"), NewEntry(EntryKind.TOOL_RESULT, {"output": 1, "error": 1}, "c1")], "output or error"),
        ([call("c1"), call("c1")], "exists already"),
        ([call("c1"), output("c1"), output("c1")], "has a result already"),
        ([output("c1"), call("c1")], "append the call first"),
        ([NewEntry(EntryKind.NOTE, {"x": float("nan")})], "not JSON"),
        ([NewEntry(EntryKind.TOOL_CALL, {"name": "t\ud800"}, "c1")], "name"),
        ([NewEntry(EntryKind.TOOL_CALL, {"name": "t"}, "c1\udcff")], "call_id"),
        ([NewEntry(EntryKind.TOOL_CALL, {"name": "t"}, "c1\0")], "call_id"),
        ([NewEntry(EntryKind.NOTE, {"x": {1, 2}})], "not JSON"),
    ],
)
def test_an_entry_that_does_not_fit_is_refused_with_all_others(
    sessions: Sessions, bad: list[NewEntry], reason: str
) -> None:
    session = sessions.create("m")
    resumed = resume(sessions, session.id)
    with pytest.raises(InvalidEntry, match=reason):
        sessions.append(session.id, resumed.lease.key, [message(), *bad] if bad else [])
    assert sessions.entries(session.id).entries == []
    assert sessions.read(session.id) == resumed.session


def test_json_that_is_nested_too_deep_is_refused(sessions: Sessions) -> None:
    deep: dict[str, Any] = {}
    for _ in range(100):
        deep = {"x": deep}
    with pytest.raises(InvalidEntry, match="nested deeper"):
        sessions.create("m", metadata=deep)


def test_odd_but_valid_json_comes_back_unchanged(sessions: Sessions) -> None:
    session = sessions.create("m")
    payload = {"nul": "a\0b", "emoji": "☕🦆", "big": 2**80, "small": 1e-300, "list": [None, True, {}], "": 0}
    sessions.append(session.id, resume(sessions, session.id).lease.key, [NewEntry(EntryKind.NOTE, payload)])
    assert sessions.entries(session.id).entries[0].payload == payload


def test_texts_that_are_not_unicode_are_kept_in_entries_and_refused_in_metadata(sessions: Sessions) -> None:
    session = sessions.create("m")
    payloads = [{"name": "\udcff.txt", "\ud800": 1}, {"text": "\udcff" * BLOB_BYTES}]
    sessions.append(
        session.id,
        resume(sessions, session.id).lease.key,
        [NewEntry(EntryKind.NOTE, payload) for payload in payloads],
    )
    assert [entry.payload for entry in sessions.entries(session.id).entries] == payloads
    with pytest.raises(InvalidEntry, match="not Unicode"):
        sessions.create("m", metadata=payloads[0])
    with pytest.raises(InvalidEntry, match="not JSON"):
        sessions.update(session.id, None, metadata={"x": float("nan")})


# --- paging


def test_entries_are_paged_in_both_orders(sessions: Sessions) -> None:
    session = sessions.create("m")
    key = resume(sessions, session.id).lease.key
    sessions.append(session.id, key, [message() for _ in range(7)])
    for order, expected in ((Order.ASCENDING, [1, 2, 3, 4, 5, 6, 7]), (Order.DESCENDING, [7, 6, 5, 4, 3, 2, 1])):
        seqs: list[int] = []
        after = None
        while True:
            page = sessions.entries(session.id, after=after, limit=3, order=order)
            seqs += [entry.seq for entry in page.entries]
            if not page.has_more:
                break
            after = page.entries[-1].id
        assert seqs == expected


def test_a_cursor_must_be_an_entry_of_the_session(sessions: Sessions) -> None:
    one, two = sessions.create("m"), sessions.create("m")
    (entry,) = sessions.append(one.id, resume(sessions, one.id).lease.key, [message()]).entries
    with pytest.raises(EntryNotFound, match=entry.id):
        sessions.entries(two.id, after=entry.id)


# --- resume


def test_resume_gives_the_newest_entries(sessions: Sessions) -> None:
    session = sessions.create("m")
    first = resume(sessions, session.id)
    assert (first.tail.entries, first.tail.has_more) == ([], False)
    sessions.append(session.id, first.lease.key, [message(str(number)) for number in range(1, 11)])
    for tail, expected, more in ((3, [8, 9, 10], True), (10, list(range(1, 11)), False), (0, [], True)):
        key = LeaseKey(first.lease.key.token, first.lease.key.epoch)
        sessions.suspend(session.id, key, SuspendReason.USER_WAIT)
        first = resume(sessions, session.id, tail)
        assert [entry.seq for entry in first.tail.entries] == expected
        assert first.tail.has_more is more
    assert first.session.status is SessionStatus.RUNNING


def test_a_model_that_is_not_the_expected_one_leaves_the_session_alone(sessions: Sessions) -> None:
    session = sessions.create("m")
    with pytest.raises(ModelMismatch, match="'m'.*'other'"):
        sessions.resume(session.id, lease_ttl_s=60, tail=1, expect_model="other")
    assert sessions.read(session.id) == session
    assert sessions.resume(session.id, lease_ttl_s=60, tail=1, expect_model="m").lease.key.epoch == 1


def test_resume_and_suspend_know_the_engine_and_the_pages(sessions: Sessions, database: Database) -> None:
    session = sessions.create("m")
    resumed = resume(sessions, session.id)
    assert resumed.engine is None
    assert (resumed.kv.state, resumed.kv.valid) == (KvState.UNKNOWN, False)
    assert sessions.suspend(session.id, resumed.lease.key, SuspendReason.USER_WAIT).ranks == []
    other_server = Engine("eng_9", "n1", 0, "tcp://127.0.0.1:7000", "http://127.0.0.1:31000/v1", "m", "f9", "/pages")
    with database.write() as connection:
        engines.register(connection, ENGINE)
        engines.register(connection, Engine(**{**vars(ENGINE), "id": "eng_2", "rank": 1}))
        engines.register(connection, other_server)
        manifests.save(connection, Manifest(session.id, "f1", 0, "n1", "eng_1", 64, 128, b"k" * 64, 1000))
    resumed = resume(sessions, session.id)
    assert resumed.engine is not None
    assert resumed.engine.base_url == ENGINE.base_url
    assert (resumed.kv.state, resumed.kv.tokens, resumed.kv.valid) == (KvState.DURABLE, 128, True)
    suspended = sessions.suspend(session.id, resumed.lease.key, SuspendReason.USER_WAIT)
    assert {rank.id for rank in suspended.ranks} == {"eng_1", "eng_2"}
    assert suspended.session.status is SessionStatus.SUSPENDED


def test_the_engine_that_a_resume_named_is_asked_for_its_barrier(sessions: Sessions, database: Database) -> None:
    """Two live engines of one model, and nothing stored yet that would tell which of them served the turn."""
    other = Engine("eng_2", "n2", 0, "tcp://127.0.0.1:6000", "http://127.0.0.1:31000/v1", "m", "f1", "/more")
    with database.write() as connection:
        engines.register(connection, ENGINE)
        engines.register(connection, other)
    for _ in range(2):
        session = sessions.create("m")
        resumed = resume(sessions, session.id)
        assert resumed.engine is not None
        (named,) = resumed.engine.ranks
        (unnamed,) = {ENGINE.id, other.id} - {named.id}
        # Of equals, the engine with the youngest heartbeat would be chosen.
        with database.write() as connection:
            connection.execute(
                sa.text("UPDATE engines SET heartbeat_us = heartbeat_us + 1000000 WHERE id = :id"), {"id": unnamed}
            )
        assert [rank.id for rank in sessions.pages(session.id).ranks] == [named.id]
        suspended = sessions.suspend(session.id, resumed.lease.key, SuspendReason.USER_WAIT)
        assert [rank.id for rank in suspended.ranks] == [named.id]


def test_turns_that_run_at_once_are_shared_out_among_dp_ranks(sessions: Sessions, database: Database) -> None:
    with database.write() as connection:
        for dp_rank in (0, 1):
            own = replace(ENGINE, id=f"eng_{dp_rank}", node=f"n{dp_rank}", control_secret="of this rank")
            engines.register(connection, replace(own, dp_rank=dp_rank, dp_size=2))
        secret_key = turns.signing_key(secret.read(connection))
    running = [resume(sessions, sessions.create("m").id) for _ in range(20)]
    named = [resumed.engine.dp_rank for resumed in running if resumed.engine is not None]
    assert all({*named[at : at + 2]} == {0, 1} for at in range(0, 20, 2))
    for resumed, dp_rank in zip(running, named, strict=True):
        session = resumed.session
        session_id, token = turns.split(resumed.engine_session)
        proven = turns.verify(secret_key, session_id, token or "")
        assert proven is not None
        assert proven.dp_rank == dp_rank
        # It is asked where it is, and no other rank is told of its pin.
        assert [rank.dp_rank for rank in sessions.pages(session.id).ranks] == [dp_rank]
        assert [rank.dp_rank for rank in sessions.pin(session.id, PinTier.HOST, 60).ranks] == [dp_rank]
        with database.read() as connection:
            pinned = [session.uid in pins.of_engine(connection, ENGINE.base_url, other) for other in (0, 1)]
        assert pinned == [dp_rank == 0, dp_rank == 1]
        suspended = sessions.suspend(session.id, resumed.lease.key, SuspendReason.USER_WAIT)
        assert [rank.dp_rank for rank in suspended.ranks] == [dp_rank]
        assert [[rank.dp_rank for rank in ranks] for ranks in suspended.beside] == [[1 - dp_rank]]
        assert suspended.epoch == resumed.lease.key.epoch
    # None of them runs any more, and the pages say where one goes on.
    session = running[0].session
    with database.write() as connection:
        manifests.save(connection, Manifest(session.uid, "f1", 0, "n1", "eng_1", 64, 128, b"k" * 64, 1000))
    resumed = resume(sessions, session.id)
    assert resumed.engine is not None
    assert (resumed.engine.dp_rank, resumed.kv.state) == (1, KvState.DURABLE)


def test_nobody_is_asked_for_what_an_engine_served_that_is_gone(sessions: Sessions, database: Database) -> None:
    with database.write() as connection:
        engines.register(connection, ENGINE)
    session = sessions.create("m")
    resumed = resume(sessions, session.id)
    other = Engine("eng_2", "n2", 0, "tcp://127.0.0.1:6000", "http://127.0.0.1:31000/v1", "m", "f1", "/more")
    with database.write() as connection:
        engines.unregister(connection, ENGINE.id)
        engines.register(connection, other)
    assert sessions.suspend(session.id, resumed.lease.key, SuspendReason.USER_WAIT).ranks == []
    assert resume(sessions, session.id).engine is not None


def test_suspending_may_move_the_expiry(sessions: Sessions) -> None:
    session = sessions.create("m", expires_in_s=10)
    key = resume(sessions, session.id).lease.key
    kept = sessions.suspend(session.id, key, SuspendReason.USER_WAIT).session
    assert kept.expires_us == session.expires_us
    key = resume(sessions, session.id).lease.key
    moved = sessions.suspend(session.id, key, SuspendReason.USER_WAIT, expires_in_s=3600).session
    assert moved.expires_us == pytest.approx(moved.updated_us + 3_600_000_000, abs=10_000_000)


def test_a_long_history_costs_no_more_statements(sessions: Sessions) -> None:
    counts = []
    for length in (3, 300):
        session = sessions.create("m")
        key = resume(sessions, session.id).lease.key
        for start in range(0, length, 3):
            sessions.append(session.id, key, [message(), call(f"c{start}"), output(f"c{start}")])
        with statements() as appending:
            sessions.append(session.id, key, [message(), call("x"), call("y"), output("x")])
        with statements() as suspending:
            sessions.suspend(session.id, key, SuspendReason.TOOL_WAIT)
        with statements() as resuming:
            resume(sessions, session.id, tail=3)
        with statements() as forking:
            fork = sessions.fork(session.id, None)
        fork_key = resume(sessions, fork.id).lease.key
        first = sessions.append(fork.id, fork_key, [output("y"), message(), message()]).entries[0].id
        with statements() as rewinding:
            sessions.rewind(fork.id, None, at=first, key=fork_key)
        sessions.append(fork.id, fork_key, [message()])
        sessions.suspend(fork.id, fork_key, SuspendReason.DONE)
        with statements() as branched:
            resume(sessions, fork.id, tail=3)
        counts.append([len(one) for one in (appending, suspending, resuming, forking, rewinding, branched)])
    assert counts[0] == counts[1]
    assert max(counts[0]) <= 12


def test_every_verb_finds_its_rows_by_index(tmp_path: Any) -> None:
    """As SQLite plans it: no verb walks through all entries, tool calls, leases, manifests or sessions."""
    database = Database(f"sqlite:///{tmp_path / 'a.db'}")
    database.upgrade()
    sessions = Sessions(database, 10)
    with statements() as seen:
        session = sessions.create("m")
        key = resume(sessions, session.id).lease.key
        appended = sessions.append(session.id, key, [message(), call("x"), output("x")])
        sessions.entries(session.id, after=appended.entries[0].id)
        sessions.read(session.id)
        sessions.renew(session.id, key, lease_ttl_s=5)
        claimed = sessions.claim(session.id, "y", "search", key=key)
        sessions.finish(session.id, claimed.call.id, {"output": 1}, key=key)
        sessions.suspend(session.id, key, SuspendReason.DONE)
        fork = sessions.fork(session.id, None, at=appended.entries[0].id)
        key = resume(sessions, fork.id, tail=1).lease.key
        sessions.append(fork.id, key, [call("z"), output("z")])
        sessions.suspend(fork.id, key, SuspendReason.DONE)
        sessions.rewind(fork.id, None, at=appended.entries[0].id)
        resume(sessions, fork.id)
        sessions.since(fork.id, 1)
        sessions.seen(fork.id, 1)
        sessions.pages(fork.id)
        sessions.list(after="ses_")
        sessions.update(session.id, None, metadata={"a": 1})
        sessions.delete(session.id, None)
        collect(database, expired_after_s=0)
    plans = []
    with database.read() as connection:
        for statement, parameters in seen:
            # A session that is collected takes what is its own with it, all of it.
            if statement.startswith(("SELECT", "UPDATE", "DELETE", "WITH")) and "DELETE FROM sessions" not in statement:
                one = parameters[0] if isinstance(parameters, list) else parameters
                plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", one)
                plans += [row.detail for row in plan]
    assert any("SEARCH entries" in line for line in plans)
    # The few engines are read whole, of the keys one; a recursive query steps through what it has found itself.
    allowed = ("SCAN engines", "SCAN api_keys", "SCAN cut", "SCAN CONSTANT", "SCAN blobs")
    walked = {line for line in plans if line.startswith("SCAN") and not line.startswith(allowed)}
    assert walked == set()
    # Nor does one walk through all calls of a session: what comes after the session's id is in the index too.
    assert [line for line in plans if line.startswith("SEARCH tool_calls") and line.endswith("(session_id=?)")] == []


# --- the tail never separates a result from its call


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Sessions:
    database = Database(f"sqlite:///{tmp_path_factory.mktemp('tail') / 'a.db'}")
    database.upgrade()
    return Sessions(database, 10)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_tail_is_whole_and_no_longer_than_it_must_be(shared: Sessions, data: st.DataObject) -> None:
    transcript: list[NewEntry] = []
    spans: dict[str, list[int]] = {}  # call id -> seq of the call, and of its result
    for seq in range(1, data.draw(st.integers(1, 25), label="length") + 1):
        pending = [call_id for call_id, span in spans.items() if len(span) == 1]
        kind = data.draw(st.sampled_from(["message", "call"] + ["result"] * 2 * bool(pending)))
        if kind == "message":
            transcript.append(message())
        elif kind == "call":
            spans[f"c{seq}"] = [seq]
            transcript.append(call(f"c{seq}"))
        else:
            call_id = data.draw(st.sampled_from(pending))
            spans[call_id].append(seq)
            transcript.append(output(call_id))
    tail = data.draw(st.integers(1, 30), label="tail")

    session = shared.create("m")
    key = resume(shared, session.id).lease.key
    shared.append(session.id, key, transcript)
    shared.suspend(session.id, key, SuspendReason.TOOL_WAIT)
    resumed = resume(shared, session.id, tail)

    cut = max(1, len(transcript) - tail + 1)
    while any(len(span) == 2 and span[0] < cut <= span[1] for span in spans.values()):
        cut -= 1
    assert [entry.seq for entry in resumed.tail.entries] == list(range(cut, len(transcript) + 1))
    assert resumed.tail.has_more is (cut > 1)
    assert resumed.pending_tool_calls == [call_id for call_id, span in spans.items() if len(span) == 1]


# --- what is read while others write


@contextmanager
def before_statement(number: int, act: Callable[[], None]) -> Iterator[None]:
    """``act`` before the thread's statement of this number, counted from 1; its own statements do not count."""
    seen = 0
    thread = threading.get_ident()

    def count(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        nonlocal seen
        if threading.get_ident() == thread and not statement.startswith("BEGIN"):
            seen += 1
            if seen == number:
                worker = threading.Thread(target=act)
                worker.start()
                worker.join()

    sa.event.listen(sa.Engine, "before_cursor_execute", count)
    try:
        yield
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", count)
    assert seen >= number


READS: list[Callable[[Sessions, str], list[str]]] = [
    lambda sessions, name: [entry.payload["content"] for entry in sessions.entries(name).entries],
    lambda sessions, name: [entry.payload["content"] for entry in sessions.since(name, 0).page.entries],
]


@pytest.mark.parametrize("read", READS, ids=["entries", "since"])
@pytest.mark.parametrize("number", [2, 3])
def test_a_read_sees_one_transcript_while_another_rewinds_and_goes_on(
    database: Database, sessions: Sessions, read: Callable[[Sessions, str], list[str]], number: int
) -> None:
    """Between the statements of the read the session is rewound, twice, so that its history has several owners."""
    name = sessions.create("m").id
    key = resume(sessions, name).lease.key
    old = sessions.append(name, key, [message("a"), message("b"), message("c")])
    sessions.rewind(name, None, at=old.entries[1].id, key=key)
    sessions.append(name, key, [message("d"), message("e")])
    before = ["a", "b", "d", "e"]

    def rewind() -> None:
        sessions.rewind(name, None, at=old.entries[0].id, key=key)
        sessions.append(name, key, [message("f")])

    with before_statement(number, rewind):
        assert read(sessions, name) == before
    assert read(sessions, name) == ["a", "f"]


# --- large entries


def sized(name: str, kib: int) -> NewEntry:
    return NewEntry(EntryKind.MESSAGE, {"role": "user", "content": name, "filling": "x" * (kib * 1024)})


def contents(entries: list[Any]) -> list[str]:
    return [entry.payload["content"] for entry in entries]


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of 1,000 KiB; of entries below 256 KiB, the sizes of more than three are added up."""
    monkeypatch.setattr(transcript, "MAX_PAGE_BYTES", 1000 * 1024)
    monkeypatch.setattr(transcript, "MAX_UNMEASURED", 3)


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("kib", [240, 450], ids=["rows", "blobs"])
def test_a_page_is_bounded_by_bytes_and_nothing_is_skipped(sessions: Sessions, kib: int) -> None:
    session = sessions.create("m")
    key = resume(sessions, session.id).lease.key
    names = [f"entry {number}" for number in range(9)]
    for name in names:
        sessions.append(session.id, key, [sized(name, kib)])
    most = 1000 // kib
    for order, right in ((Order.ASCENDING, names), (Order.DESCENDING, names[::-1])):
        found: list[str] = []
        after, has_more = None, True
        while has_more:
            page = sessions.entries(session.id, after=after, limit=8, order=order)
            assert 0 < len(page.entries) <= most
            found += contents(page.entries)
            after, has_more = page.entries[-1].id, page.has_more
        assert found == right
    seen: list[str] = []
    while len(seen) < len(names):
        page = sessions.since(session.id, len(seen)).page
        assert 0 < len(page.entries) <= most
        seen += contents(page.entries)
        assert page.has_more == (len(seen) < len(names))
    assert seen == names
    sessions.suspend(session.id, key, SuspendReason.USER_WAIT)
    tail = resume(sessions, session.id, tail=8).tail
    assert contents(tail.entries) == names[-most:] and tail.has_more


@pytest.mark.usefixtures("small_pages")
def test_an_entry_that_is_larger_than_a_page_comes_alone(sessions: Sessions) -> None:
    session = sessions.create("m")
    key = resume(sessions, session.id).lease.key
    sessions.append(session.id, key, [sized("a", 1), sized("b", 1500), sized("c", 1)])
    pages = []
    after, has_more = None, True
    while has_more:
        page = sessions.entries(session.id, after=after)
        pages.append(contents(page.entries))
        after, has_more = page.entries[-1].id, page.has_more
    assert pages == [["a"], ["b"], ["c"]]


@pytest.mark.usefixtures("small_pages")
def test_a_tail_that_is_bounded_by_bytes_has_no_result_without_its_call(sessions: Sessions) -> None:
    session = sessions.create("m")
    key = resume(sessions, session.id).lease.key
    large = NewEntry(EntryKind.TOOL_RESULT, {"output": "x" * 700 * 1024}, "far")
    steps = [call("far"), sized("a", 400), call("near"), large, output("near"), sized("b", 100), sized("c", 100)]
    for step in steps:
        sessions.append(session.id, key, [step])
    sessions.suspend(session.id, key, SuspendReason.USER_WAIT)
    tail = resume(sessions, session.id).tail
    # The call "far" does not fit beside its result; so the tail begins after that one, and after "near", whose call
    # is before it.
    assert contents(tail.entries) == ["b", "c"] and tail.has_more


@pytest.mark.usefixtures("small_pages")
def test_a_tail_goes_back_to_a_call_that_fits(sessions: Sessions) -> None:
    session = sessions.create("m")
    key = resume(sessions, session.id).lease.key
    for step in (sized("a", 500), call("near"), sized("b", 400), output("near"), sized("c", 100)):
        sessions.append(session.id, key, [step])
    sessions.suspend(session.id, key, SuspendReason.USER_WAIT)
    tail = resume(sessions, session.id, tail=2).tail
    assert [entry.seq for entry in tail.entries] == [2, 3, 4, 5] and tail.has_more
