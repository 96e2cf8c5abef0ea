"""Forks, rewinds, deletion and collection, against a model that copies."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentstate.errors import (
    EntryNotFound,
    EventsTrimmed,
    InvalidEntry,
    NotABranchPoint,
    RevisionStale,
    SessionBusy,
    SessionExists,
    SessionNotFound,
    ToolInFlight,
)
from agentstate.fleet import engines, manifests
from agentstate.fleet.engines import Engine
from agentstate.fleet.manifests import KvState, Manifest
from agentstate.sessions import branches
from agentstate.sessions.collection import collect
from agentstate.sessions.history import MAX_SEGMENTS, History, Segment
from agentstate.sessions.leases import LeaseKey
from agentstate.sessions.outcomes import Order, SuspendReason
from agentstate.sessions.transcript import BLOB_BYTES, NewEntry
from agentstate.sessions.verbs import Sessions
from agentstate.sql.database import Database
from agentstate.sql.models import EntryKind

ENGINE = Engine("eng_1", "n1", 0, "tcp://127.0.0.1:5000", "http://127.0.0.1:30000/v1", "m", "f1", "/pages")


def note(text: str = "n") -> NewEntry:
    return NewEntry(EntryKind.NOTE, {"text": text})


def call(call_id: str) -> NewEntry:
    return NewEntry(EntryKind.TOOL_CALL, {"name": "search"}, call_id)


def output(call_id: str) -> NewEntry:
    return NewEntry(EntryKind.TOOL_RESULT, {"output": "found"}, call_id)


def take(sessions: Sessions, session_id: str) -> LeaseKey:
    return sessions.resume(session_id, lease_ttl_s=60, tail=0).lease.key


def grow(sessions: Sessions, session_id: str, *new: NewEntry) -> list[str]:
    """Append in a turn of its own; gives back the ids of the entries."""
    key = take(sessions, session_id)
    appended = sessions.append(session_id, key, new).entries
    sessions.suspend(session_id, key, SuspendReason.TOOL_WAIT)
    return [entry.id for entry in appended]


def texts(sessions: Sessions, session_id: str) -> list[Any]:
    return [entry.payload.get("text", entry.call_id) for entry in sessions.entries(session_id, limit=1000).entries]


def rows(database: Database, table: str) -> int:
    with database.read() as connection:
        return connection.execute(sa.text(f"SELECT count(*) FROM {table}")).scalar_one()


# --- forks


def test_a_fork_shares_what_came_before_and_goes_on_by_itself(sessions: Sessions) -> None:
    parent = sessions.create("m", metadata={"a": 1}, cache_salt="salt", extra_key="key")
    ids = grow(sessions, parent.id, note("a"), note("b"), note("c"))
    fork = sessions.fork(parent.id, None, at=ids[1], fork_id="branch", metadata={"b": 2})
    assert (fork.id, fork.head_id, fork.metadata) == ("branch", ids[1], {"b": 2})
    assert (fork.cache_salt, fork.extra_key, fork.model) == ("salt", "key", "m")
    grow(sessions, fork.id, note("x"), note("y"))
    grow(sessions, parent.id, note("d"))
    assert texts(sessions, fork.id) == ["a", "b", "x", "y"]
    assert texts(sessions, parent.id) == ["a", "b", "c", "d"]
    found = sessions.entries(fork.id).entries
    assert [entry.seq for entry in found] == [1, 2, 3, 4], "a fork continues its parent's seq"
    assert [entry.parent_id for entry in found] == [None] + [entry.id for entry in found[:-1]]
    assert {entry.session_id for entry in found} == {fork.id}
    with pytest.raises(SessionExists):
        sessions.fork(parent.id, None, fork_id="branch")
    with pytest.raises(EntryNotFound):
        sessions.fork(parent.id, None, at=found[-1].id)


def test_a_fork_of_nothing_is_empty(sessions: Sessions) -> None:
    fork = sessions.fork(sessions.create("m").id, None)
    assert sessions.entries(fork.id).entries == []
    grow(sessions, fork.id, note("a"))
    assert texts(sessions, fork.id) == ["a"]


def test_a_history_is_not_branched_between_a_tool_call_and_its_result(sessions: Sessions) -> None:
    parent = sessions.create("m")
    ids = grow(sessions, parent.id, note(), call("c"), note("while"), output("c"), call("d"))
    for at in (ids[1], ids[2]):
        for attempt in (
            lambda at=at: sessions.fork(parent.id, None, at=at),
            lambda at=at: sessions.rewind(parent.id, None, at=at),
        ):
            with pytest.raises(NotABranchPoint, match=at):
                attempt()
    assert sessions.resume(sessions.fork(parent.id, None, at=ids[3]).id, lease_ttl_s=1, tail=1).pending_tool_calls == []


def test_a_fork_at_the_head_has_the_calls_that_wait_as_unknown_and_can_answer_them(sessions: Sessions) -> None:
    parent = sessions.create("m")
    grow(sessions, parent.id, call("done"), output("done"), call("c"))
    fork = sessions.fork(parent.id, None)
    key = take(sessions, fork.id)
    with pytest.raises(InvalidEntry, match="exists already"):
        sessions.append(fork.id, key, [call("done")])
    with pytest.raises(InvalidEntry, match="has a result already"):
        sessions.append(fork.id, key, [output("done")])
    sessions.append(fork.id, key, [output("c"), note("x")])
    sessions.suspend(fork.id, key, SuspendReason.DONE)
    assert sessions.resume(fork.id, lease_ttl_s=60, tail=1).pending_tool_calls == []
    resumed = sessions.resume(parent.id, lease_ttl_s=60, tail=1)
    assert resumed.pending_tool_calls == ["c"], "the parent's call is still its own"
    deeper = sessions.fork(fork.id, None)
    tail = sessions.resume(deeper.id, lease_ttl_s=60, tail=2).tail.entries
    assert [entry.seq for entry in tail] == [3, 4, 5], "the result is not cut off from a call that was copied"


def test_a_conditional_write_of_an_old_view_is_refused(sessions: Sessions) -> None:
    session = sessions.create("m")
    ids = grow(sessions, session.id, note())
    now = sessions.read(session.id).revision
    for attempt in (
        lambda revision: sessions.fork(session.id, revision),
        lambda revision: sessions.rewind(session.id, revision, at=ids[0]),
        lambda revision: sessions.update(session.id, revision, metadata={}),
        lambda revision: sessions.resume(session.id, lease_ttl_s=1, tail=1, revision=revision),
        lambda revision: sessions.delete(session.id, revision),
    ):
        with pytest.raises(RevisionStale) as error:
            attempt(now - 1)
        assert error.value.revision == now
    sessions.delete(session.id, now)


# --- rewinds


def test_a_rewind_takes_entries_back_and_their_numbers_stay_unused(sessions: Sessions) -> None:
    session = sessions.create("m")
    ids = grow(sessions, session.id, note("a"), note("b"), call("c"), output("c"))
    rewound = sessions.rewind(session.id, None, at=ids[0])
    assert (rewound.head_id, texts(sessions, session.id)) == (ids[0], ["a"])
    grow(sessions, session.id, call("c"), output("c"))
    found = sessions.entries(session.id).entries
    assert [entry.seq for entry in found] == [1, 5, 6], "a call id may come again, a seq may not"
    assert found[1].parent_id == ids[0]
    assert [entry.seq for entry in sessions.entries(session.id, order=Order.DESCENDING).entries] == [6, 5, 1]
    assert sessions.rewind(session.id, None, at=found[-1].id) == sessions.read(session.id)
    with pytest.raises(EntryNotFound):
        sessions.rewind(session.id, None, at=ids[1])
    with pytest.raises(EventsTrimmed):
        sessions.seen(session.id, 7)
    for seq, kept in ((0, 0), (1, 1), (3, 1), (4, 1), (5, 5), (6, 6)):
        assert sessions.seen(session.id, seq).id == session.id
        since = sessions.since(session.id, seq)
        assert (since.kept, [entry.seq for entry in since.page.entries]) == (kept, [n for n in (1, 5, 6) if n > seq])


def test_a_rewind_to_the_start_leaves_nothing(sessions: Sessions) -> None:
    session = sessions.create("m")
    assert sessions.rewind(session.id, None, at=None) == session
    grow(sessions, session.id, note("a"), call("c"), output("c"))
    fork = sessions.fork(session.id, None)
    rewound = sessions.rewind(session.id, None, at=None)
    assert (rewound.head_id, texts(sessions, session.id)) == (None, [])
    resumed = sessions.resume(session.id, lease_ttl_s=60, tail=5)
    assert (resumed.tail.entries, resumed.tail.has_more, resumed.pending_tool_calls) == ([], False, [])
    (appended,) = sessions.append(session.id, resumed.lease.key, [note("b")]).entries
    assert (appended.seq, appended.parent_id) == (4, None)
    assert texts(sessions, session.id) == texts(sessions, sessions.fork(session.id, None).id) == ["b"]
    assert [entry.seq for entry in sessions.entries(fork.id).entries] == [1, 2, 3]


def test_who_rewinds_a_session_that_is_run_needs_its_lease(sessions: Sessions) -> None:
    session = sessions.create("m")
    key = take(sessions, session.id)
    first = sessions.append(session.id, key, [note("a"), note("b")]).entries[0].id
    with pytest.raises(SessionBusy):
        sessions.rewind(session.id, None, at=first)
    sessions.rewind(session.id, None, at=first, key=key)
    sessions.append(session.id, key, [call("c")])
    with pytest.raises(ToolInFlight, match="c"):
        sessions.rewind(session.id, None, at=first, key=key)


def test_branches_are_bounded(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentstate.sessions.branches.MAX_SEGMENTS", 3)
    session_id = sessions.create("m").id
    for _ in range(2):
        grow(sessions, session_id, note())
        session_id = sessions.fork(session_id, None).id
    grow(sessions, session_id, note())
    with pytest.raises(NotABranchPoint, match="forked 3 times"):
        sessions.fork(session_id, None)
    assert MAX_SEGMENTS >= 100


def test_a_session_may_be_rewound_for_ever(sessions: Sessions, database: Database) -> None:
    """As `pop_item` does; its forks keep what they share, its tool calls their results, its followers their place."""
    session_id = sessions.create("m").id
    kept = grow(sessions, session_id, note("first"), call("c"), output("c"))
    expected, forks = ["first", "c", "c"], {}
    for number in range(MAX_SEGMENTS + 30):
        kept += grow(sessions, session_id, note(f"kept {number}"), call(f"c{number}"), output(f"c{number}"))
        expected += [f"kept {number}", f"c{number}", f"c{number}"]
        grow(sessions, session_id, note("popped"))
        sessions.rewind(session_id, None, at=kept[-1])
        if number == 100:
            forks[sessions.fork(session_id, None).id] = list(expected)
    fork_id = sessions.fork(session_id, None).id
    collect(database, expired_after_s=0)
    for of, wanted in {session_id: expected, fork_id: expected, **forks}.items():
        found: list[Any] = []
        page = sessions.entries(of, limit=1000)
        while page.entries:
            found += page.entries
            page = sessions.entries(of, after=found[-1].id, limit=1000)
        assert [entry.payload.get("text", entry.call_id) for entry in found] == wanted
        assert [entry.id for entry in found] == kept[: len(wanted)]
        assert [entry.parent_id for entry in found] == [None, *kept[: len(wanted) - 1]]
        for call_id in ("c", "c0", "c90", f"c{len(wanted) // 3 - 2}"):
            claimed = sessions.claim(of, call_id, "search")
            assert (claimed.fresh, claimed.call.result) == (False, {"output": "found"})
    assert sessions.resume(session_id, lease_ttl_s=60, tail=7).tail.entries[0].id == kept[-8], "no call is cut off"
    assert rows(database, "entries") == len(kept)


def test_who_follows_a_session_is_told_of_new_numbers_as_of_a_rewind(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(branches, "COMPACT_AT", 4)
    session_id = sessions.create("m").id
    kept: list[str] = []
    told: list[tuple[int, str]] = []
    for number in range(20):
        kept += grow(sessions, session_id, note(str(number)))
        grow(sessions, session_id, note("popped"))
        sessions.rewind(session_id, None, at=kept[-1])
        since = sessions.since(session_id, told[-1][0] if told else 0)
        told = [item for item in told if item[0] <= since.kept]
        told += [(entry.seq, entry.id) for entry in since.page.entries]
        assert [entry_id for _, entry_id in told] == kept


# --- what is known of the KV


def test_a_branch_has_its_parents_pages_at_most_until_it_has_its_own(sessions: Sessions, database: Database) -> None:
    def store(uid: str, tokens: int) -> None:
        with database.write() as connection:
            # Later than the branch, whose time has a resolution of a millisecond on SQLite.
            manifests.save(connection, Manifest(uid, "f1", 0, "n1", "eng_1", 64, tokens, b"k" * 32 * (tokens // 64), 1))
            connection.execute(
                sa.text("UPDATE manifests SET updated_us = updated_us + 5000 WHERE session_id = :id"), {"id": uid}
            )

    with database.write() as connection:
        engines.register(connection, ENGINE)
    parent = sessions.create("m")
    ids = grow(sessions, parent.id, note(), note())
    store(parent.uid, 640)
    fork = sessions.fork(parent.id, None, at=ids[0])
    kv = sessions.resume(fork.id, lease_ttl_s=60, tail=0).kv
    assert (kv.state, kv.tokens, kv.valid, kv.upper_bound) == (KvState.PARTIAL, 640, True, True)
    assert sessions.pages(fork.id).keys == [b"k" * 320]
    store(fork.uid, 128)
    pages = sessions.pages(fork.id)
    assert (pages.keys, [rank.id for rank in pages.ranks]) == ([b"k" * 64], ["eng_1"])
    with database.write() as connection:
        connection.execute(sa.text("UPDATE manifests SET updated_us = updated_us - 10000"))
    sessions.rewind(parent.id, None, at=ids[0])
    kv = sessions.resume(parent.id, lease_ttl_s=60, tail=0).kv
    assert (kv.state, kv.tokens, kv.upper_bound) == (KvState.PARTIAL, 640, True)


# --- deletion


def test_a_deleted_session_is_gone_and_its_id_is_free(sessions: Sessions) -> None:
    session = sessions.create("m", session_id="mine")
    key = take(sessions, "mine")
    with pytest.raises(SessionBusy):
        sessions.delete("mine", None)
    sessions.suspend("mine", key, SuspendReason.DONE)
    sessions.delete("mine", None)
    for attempt in (sessions.read, lambda id: sessions.delete(id, None), sessions.entries):
        with pytest.raises(SessionNotFound):
            attempt("mine")
    assert sessions.list().sessions == []
    assert sessions.create("m", session_id="mine").uid != session.uid
    generated = sessions.create("m")
    sessions.delete(generated.id, None)
    with pytest.raises(SessionNotFound):
        sessions.read(generated.id)


def test_an_id_whose_session_has_expired_is_free(sessions: Sessions, database: Database) -> None:
    sessions.create("m", session_id="mine", expires_in_s=3600)
    with database.write() as connection:
        connection.execute(sa.text("UPDATE sessions SET expires_us = 1"))
    assert sessions.list().sessions == []
    assert sessions.create("other", session_id="mine").model == "other"
    assert sessions.read("mine").model == "other"


def test_collection_leaves_what_forks_share_and_takes_the_rest(sessions: Sessions, database: Database) -> None:
    large = "x" * BLOB_BYTES
    parent = sessions.create("m")
    ids = grow(sessions, parent.id, note("a"), note(large), note("b"), call("c"), output("c"))
    fork = sessions.fork(parent.id, None, at=ids[1])
    grow(sessions, fork.id, note("x"))
    sessions.delete(parent.id, None)
    collected = collect(database, expired_after_s=0, blob_grace_s=0)
    assert (collected.sessions, collected.entries, collected.blobs) == (0, 3, 0)
    assert rows(database, "tool_calls") == 0
    assert texts(sessions, fork.id) == ["a", large, "x"]
    assert collect(database, expired_after_s=0, blob_grace_s=0).entries == 0
    sessions.delete(fork.id, None)
    collected = collect(database, expired_after_s=0, blob_grace_s=0)
    assert (collected.sessions, collected.entries, collected.blobs) == (2, 3, 1)
    for table in ("sessions", "entries", "segments", "blobs", "leases", "manifests", "tool_calls"):
        assert rows(database, table) == 0, table


def test_collection_takes_expired_sessions_when_their_time_has_come(sessions: Sessions, database: Database) -> None:
    session = sessions.create("m", expires_in_s=3600)
    grow(sessions, session.id, note())
    with database.write() as connection:
        connection.execute(sa.text("UPDATE sessions SET expires_us = expires_us - 7200000000"))
    assert collect(database, expired_after_s=2 * 3600).sessions == 0
    assert collect(database, expired_after_s=1800).sessions == 1
    with pytest.raises(SessionNotFound):
        sessions.read(session.id)


def test_large_payloads_are_stored_once(sessions: Sessions, database: Database) -> None:
    large, small = {"text": "☕" * BLOB_BYTES}, {"text": "small"}
    for _ in range(2):
        session = sessions.create("m")
        grow(sessions, session.id, NewEntry(EntryKind.MESSAGE, large), NewEntry(EntryKind.MESSAGE, small))
        grow(sessions, session.id, NewEntry(EntryKind.MESSAGE, large))
        assert [entry.payload for entry in sessions.entries(session.id).entries] == [large, small, large]
    assert rows(database, "blobs") == 1
    other = sessions.of("other")
    grow(other, other.create("m").id, NewEntry(EntryKind.MESSAGE, large))
    assert rows(database, "blobs") == 2, "tenants do not learn of each other's"


# --- everything together


@dataclass
class Copy:
    """What a session should be: a list of its own."""

    entries: list[tuple[str, str]] = field(default_factory=list)  # id, text


@pytest.mark.parametrize("compact_at", [2, branches.COMPACT_AT])
@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_branches_are_as_if_they_had_been_copied(
    migrated_file: Path, monkeypatch: pytest.MonkeyPatch, compact_at: int, data: st.DataObject
) -> None:
    monkeypatch.setattr(branches, "COMPACT_AT", compact_at)
    with tempfile.TemporaryDirectory() as directory:
        shutil.copy(migrated_file, Path(directory) / "a.db")
        database = Database(f"sqlite:///{directory}/a.db")
        try:
            play(database, data)
        finally:
            database.close()


def play(shared: Database, data: st.DataObject) -> None:
    sessions = Sessions(shared, 10)
    alive: dict[str, Copy] = {sessions.create("m").id: Copy()}
    for number in range(data.draw(st.integers(1, 14), label="steps")):
        session_id = data.draw(st.sampled_from(sorted(alive)))
        copy = alive[session_id]
        step = data.draw(st.sampled_from(["append", "append", "fork", "rewind", "delete", "collect"]))
        if step == "append":
            new = [f"{number}.{i}" for i in range(data.draw(st.integers(1, 3)))]
            ids = grow(sessions, session_id, *(note(text) for text in new))
            copy.entries += zip(ids, new, strict=True)
        elif step == "fork":
            kept = copy.entries[: data.draw(st.integers(1, len(copy.entries)))] if copy.entries else []
            fork = sessions.fork(session_id, None, at=kept[-1][0] if kept else None)
            alive[fork.id] = Copy(list(kept))
        elif step == "rewind":
            del copy.entries[data.draw(st.integers(0, len(copy.entries))) :]
            sessions.rewind(session_id, None, at=copy.entries[-1][0] if copy.entries else None)
        elif step == "delete" and len(alive) > 1:
            sessions.delete(session_id, None)
            del alive[session_id]
        else:
            collect(shared, expired_after_s=0, blob_grace_s=0)
        for session_id, copy in alive.items():
            page = sessions.entries(session_id, limit=1000)
            assert [(entry.id, entry.payload["text"]) for entry in page.entries] == copy.entries
            seqs = [entry.seq for entry in page.entries]
            assert seqs == sorted(set(seqs))
    reachable = {entry for copy in alive.values() for entry, _ in copy.entries}
    for session_id, copy in alive.items():
        tail = data.draw(st.integers(1, 5))
        resumed = sessions.resume(session_id, lease_ttl_s=60, tail=tail)
        assert [entry.id for entry in resumed.tail.entries] == [entry for entry, _ in copy.entries[-tail:]]
        assert resumed.tail.has_more is (len(copy.entries) > tail)
        sessions.suspend(session_id, resumed.lease.key, SuspendReason.DONE)
        backwards: list[str] = []
        after = None
        while True:
            page = sessions.entries(session_id, after=after, limit=2, order=Order.DESCENDING)
            backwards += [entry.id for entry in page.entries]
            if not page.has_more:
                break
            after = page.entries[-1].id
        assert backwards == [entry for entry, _ in reversed(copy.entries)]
    collect(shared, expired_after_s=0, blob_grace_s=0)
    with shared.read() as connection:
        stored = set(connection.execute(sa.text("SELECT id FROM entries")).scalars())
    assert stored == reachable
    for session_id in alive:
        sessions.delete(session_id, None)
    collect(shared, expired_after_s=0, blob_grace_s=0)
    assert rows(shared, "sessions") == rows(shared, "entries") == 0


@given(
    lengths=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.sampled_from("abc")), max_size=6),
    count=st.integers(1, 12),
)
def test_slices_of_a_history_are_those_of_its_list(lengths: list[tuple[int, int, str]], count: int) -> None:
    parts, seq, expected = [], 1, []
    for length, gap, owner in lengths:
        parts.append(Segment(owner, seq, seq + length - 1))
        expected += [(owner, seq + i) for i in range(length)]
        seq += length + gap
    history = History.joined(parts)

    def listed(history: History) -> list[tuple[str, int]]:
        return [(part.owner_id, seq) for part in history.segments for seq in range(part.first, part.last + 1)]

    assert listed(history) == expected
    assert history.length == len(expected)
    assert listed(history.newest(count)) == expected[-count:]
    assert listed(history.oldest(count)) == expected[:count]
    assert listed(history.between(count, count + 3)) == [item for item in expected if count <= item[1] <= count + 3]
    assert all(history.owner_of(seq) == owner for owner, seq in expected)
