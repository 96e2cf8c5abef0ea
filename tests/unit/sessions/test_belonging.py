"""Which session a gateway's request belongs to, and what is kept of its turn."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from agentstate.errors import InvalidId, LeaseLost, ModelMismatch, SessionBusy, SessionExpired
from agentstate.sessions import conversations
from agentstate.sessions.belonging import Begun, Origin, Wanted
from agentstate.sessions.conversations import TELLING_CHARACTERS, Conversation, Said
from agentstate.sessions.rows import Rows
from agentstate.sessions.transcript import NewEntry
from agentstate.sessions.verbs import Sessions
from agentstate.sql.database import Database
from agentstate.sql.models import EntryKind, conversation_tips
from agentstate.sql.models import sessions as table

LONG = "x" * TELLING_CHARACTERS


def said(text: str) -> Said:
    """``S:`` a system message, ``U:`` a user's, ``A:`` an answer, ``T:`` a tool's result."""
    roles = {"S": "system", "U": "user", "A": "assistant", "T": "tool"}
    return Said(roles[text[0]], blake2b(text.encode(), digest_size=16).digest(), len(text))


def talk(*texts: str) -> Conversation:
    return Conversation([said(text) for text in texts])


@pytest.fixture
def sessions(database: Database) -> Sessions:
    return Sessions(database, 60)


def begin(sessions: Sessions, *texts: str, **wanted: Any) -> Begun:
    asked = Wanted("m", conversation=talk(*texts), **wanted)
    return sessions.begin(asked, lease_ttl_s=60, expires_in_s=3600)


def end(sessions: Sessions, begun: Begun, texts: Sequence[str], *new: NewEntry) -> None:
    assert begun.resumed is not None
    key = begun.resumed.lease.key
    expires_in_s = None if begun.origin is Origin.NAMED else 3600
    sessions.end(begun.resumed.session.id, key, talk(*texts) if texts else None, new, expires_in_s=expires_in_s)


def turn(sessions: Sessions, *texts: str, new: Sequence[NewEntry] = (), **wanted: Any) -> tuple[str | None, Origin]:
    """A whole turn; the last of ``texts`` is its answer."""
    begun = begin(sessions, *texts[:-1], **wanted)
    if begun.resumed is None:
        return None, begun.origin
    end(sessions, begun, texts, *new)
    return begun.resumed.session.id, begun.origin


@given(st.lists(st.sampled_from("SUAT"), max_size=40), st.integers(0, 40))
def test_a_beginning_is_told_by_its_digest_alone(roles: list[str], cut: int) -> None:
    texts = [f"{role}:{number}" for number, role in enumerate(roles)]
    cut = min(cut, len(texts))
    ends = [
        number for number, after in enumerate([*roles[1:], ""][: len(roles)], 1) if roles[number - 1] == "A" != after
    ]
    looked_up = ends[-conversations.LOOKED_UP :]
    assert talk(*texts).prefixes().get(talk(*texts[:cut]).whole()) == (cut if cut in looked_up else None)


def test_a_conversation_goes_on_in_its_session(sessions: Sessions) -> None:
    one, origin = turn(sessions, "S:s", "U:1", "A:1")
    assert origin is Origin.NEW
    assert turn(sessions, "S:s", "U:1", "A:1", "U:2", "A:2") == (one, Origin.CONTINUED)
    # Tool calls and their results in between.
    assert turn(sessions, "S:s", "U:1", "A:1", "U:2", "A:2", "T:1", "T:2", "A:3") == (one, Origin.CONTINUED)
    begun = begin(sessions, "S:s", "U:1", "A:1", "U:2", "A:2", "T:1", "T:2", "A:3", "U:3")
    assert begun.messages == 8


def test_the_same_request_again_is_the_same_turn_until_it_was_answered(sessions: Sessions) -> None:
    one, _ = turn(sessions, "U:1", "A:1")
    begun = begin(sessions, "U:1", "A:1", "U:2")
    end(sessions, begun, [])  # the engine failed
    assert turn(sessions, "U:1", "A:1", "U:2", "A:2") == (one, Origin.CONTINUED)
    # Answered, it is a way that the session has left.
    again, origin = turn(sessions, "U:1", "A:1", "U:2", "A:other")
    assert (again != one, origin) == (True, Origin.BRANCH)
    assert turn(sessions, "U:1", "A:1", "U:2", "A:other", "U:3", "A:3") == (again, Origin.CONTINUED)
    assert turn(sessions, "U:1", "A:1", "U:2", "A:2", "U:3", "A:3") == (one, Origin.CONTINUED)


def test_first_messages_tell_nothing(sessions: Sessions) -> None:
    found = {turn(sessions, "S:s", "U:1", "A:1")[0] for _ in range(3)}
    assert len(found) == 3
    # Examples in a prompt are answers that nobody gave.
    assert turn(sessions, "S:s", "U:example", "A:example", "U:1", "A:1")[1] is Origin.NEW


def test_of_conversations_that_are_alike_one_goes_on(sessions: Sessions) -> None:
    alike = {turn(sessions, "U:1", "A:1")[0] for _ in range(3)}
    found, origin = turn(sessions, "U:1", "A:1", "U:2", "A:2")
    assert (found in alike, origin) == (True, Origin.CONTINUED)
    other, origin = turn(sessions, "U:1", "A:1", "U:3", "A:3")
    assert (other in alike - {found}, origin) == (True, Origin.CONTINUED)


def test_a_compacted_conversation_goes_on(sessions: Sessions) -> None:
    one, _ = turn(sessions, "S:s", "U:1", "A:1", "U:" + LONG, "A:2")
    compacted = ["S:s", "U:a summary", "U:" + LONG, "A:2", "U:3", "A:3"]
    assert turn(sessions, *compacted) == (one, Origin.COMPACTED)
    assert turn(sessions, *compacted, "U:4", "A:4") == (one, Origin.CONTINUED)
    # The last messages of where it was before say nothing any more.
    assert turn(sessions, "S:t", "U:" + LONG, "A:2", "U:3", "A:3")[1] is Origin.NEW


def test_short_last_messages_are_no_proof_of_anything(sessions: Sessions) -> None:
    turn(sessions, "S:s", "U:hi", "A:hello")
    assert turn(sessions, "S:other", "U:hi", "A:hello", "U:1", "A:1")[1] is Origin.NEW


def test_a_conversation_that_is_running_is_branched_and_not_waited_for(sessions: Sessions) -> None:
    one, _ = turn(sessions, "U:1", "A:1")
    running = begin(sessions, "U:1", "A:1", "U:2")
    other, origin = turn(sessions, "U:1", "A:1", "U:3", "A:3")
    assert (other != one, origin) == (True, Origin.BRANCH)
    end(sessions, running, ["U:1", "A:1", "U:2", "A:2"])


def test_another_model_goes_its_own_way(sessions: Sessions) -> None:
    turn(sessions, "U:1", "A:1")
    begun = sessions.begin(Wanted("other", conversation=talk("U:1", "A:1", "U:2")), lease_ttl_s=60, expires_in_s=3600)
    assert begun.origin is Origin.NEW


def test_a_deleted_or_expired_session_is_not_gone_on_with(sessions: Sessions, database: Database) -> None:
    one, _ = turn(sessions, "U:1", "A:1")
    assert one is not None
    sessions.delete(one, None)
    with database.read() as connection:
        assert connection.execute(sa.select(conversation_tips)).all() == []  # nothing tells what was said
    two, origin = turn(sessions, "U:1", "A:1", "U:2", "A:2")
    assert origin is Origin.NEW
    with database.write() as connection:
        connection.execute(sa.update(table).where(table.c.name == two).values(expires_us=1))
    assert turn(sessions, "U:1", "A:1", "U:2", "A:2", "U:3", "A:3")[1] is Origin.NEW


def test_tenants_do_not_find_each_others_conversations(sessions: Sessions) -> None:
    turn(sessions, "U:1", "A:1")
    assert turn(sessions.of("other"), "U:1", "A:1", "U:2", "A:2")[1] is Origin.NEW


def test_a_named_session_is_made_and_obeyed(sessions: Sessions) -> None:
    assert turn(sessions, "U:1", "A:1", session="mine") == ("mine", Origin.NAMED)
    assert sessions.read("mine").expires_us is None
    # Whatever its messages are.
    assert turn(sessions, "U:else", "A:else", session="mine") == ("mine", Origin.NAMED)
    begin(sessions, "U:1", session="mine")
    with pytest.raises(SessionBusy):
        begin(sessions, "U:1", session="mine")
    with pytest.raises(ModelMismatch):
        sessions.begin(Wanted("other", session="mine"), lease_ttl_s=60, expires_in_s=60)
    with pytest.raises(InvalidId):
        begin(sessions, "U:1", session="~")


def test_a_named_session_that_has_expired_is_gone(sessions: Sessions, database: Database) -> None:
    sessions.create("m", session_id="mine")
    with database.write() as connection:
        connection.execute(sa.update(table).values(expires_us=1))
    with pytest.raises(SessionExpired):
        begin(sessions, "U:1", session="mine")
    assert begin(sessions, "U:1", harness="mine").origin is Origin.NONE


def test_what_a_harness_asks_beside_its_turns_has_no_session(sessions: Sessions) -> None:
    assert turn(sessions, "S:agent", "U:1", "A:1", harness="h:1") == ("h:1", Origin.HARNESS)
    assert turn(sessions, "S:title", "U:1", "A:a title", harness="h:1") == (None, Origin.NONE)
    # With the system prompt of its turns it is one of them, whatever became of the messages.
    assert turn(sessions, "S:agent", "U:pruned", "A:2", harness="h:1") == ("h:1", Origin.HARNESS)
    # And so is one that goes on, whatever became of the system prompt.
    compacted = ["S:agent, today", "U:a summary", "U:" + LONG, "A:3"]
    assert turn(sessions, "S:agent", "U:" + LONG, "A:3", harness="h:1") == ("h:1", Origin.HARNESS)
    assert turn(sessions, *compacted, "U:4", "A:4", harness="h:1") == ("h:1", Origin.HARNESS)
    other_model = Wanted("other", harness="h:1", conversation=talk("S:agent", "U:1"))
    assert sessions.begin(other_model, lease_ttl_s=60, expires_in_s=60).origin is Origin.NONE


def test_a_conversation_that_is_not_the_first_that_a_harness_asks_has_a_session(sessions: Sessions) -> None:
    assert turn(sessions, "S:title", "U:1", "A:a title", harness="h:1") == ("h:1", Origin.HARNESS)
    assert turn(sessions, "S:agent", "U:1", "A:1", harness="h:1") == (None, Origin.NONE)
    own, origin = turn(sessions, "S:agent", "U:1", "A:1", "U:2", "A:2", harness="h:1")
    assert (own is not None and own.startswith("h:1:"), origin) == (True, Origin.HARNESS)
    # Later turns are the same session's, whatever became of their messages.
    for said in (["U:1", "A:1", "U:2", "A:2", "U:3"], ["U:a summary", "A:2", "U:4"]):
        assert turn(sessions, "S:agent", *said, "A:4", harness="h:1") == (own, Origin.HARNESS)
    assert turn(sessions, "S:title", "U:1", "A:a title", harness="h:1") == ("h:1", Origin.HARNESS)
    # Another harness's id, or another prompt of this one's, is another session.
    assert turn(sessions, "S:plan", "U:1", "A:1", "U:2", "A:2", harness="h:1")[0] not in (own, "h:1", None)


def test_a_harness_whose_session_is_running_is_never_refused(sessions: Sessions) -> None:
    one, _ = turn(sessions, "S:s", "U:1", "A:1", harness="h:1")
    running = begin(sessions, "S:s", "U:1", "A:1", "U:2", harness="h:1")
    assert turn(sessions, "S:s", "U:unknown", "A:1", harness="h:1") == (None, Origin.NONE)
    branch, origin = turn(sessions, "S:s", "U:1", "A:1", "U:3", "A:3", harness="h:1")
    assert (branch not in (one, None), origin) == (True, Origin.BRANCH)
    end(sessions, running, [])


def test_a_request_that_says_nothing_has_no_session(sessions: Sessions) -> None:
    assert sessions.begin(Wanted("m"), lease_ttl_s=60, expires_in_s=60) == Begun(None, Origin.NONE)


def test_guessed_sessions_expire_after_their_last_turn(sessions: Sessions) -> None:
    one, _ = turn(sessions, "U:1", "A:1")
    assert one is not None
    session = sessions.read(one)
    assert session.expires_us is not None
    assert session.expires_us > session.updated_us + 3_000_000_000


def call(call_id: str) -> NewEntry:
    return NewEntry(EntryKind.TOOL_CALL, {"name": "run", "arguments": None}, call_id)


def result(call_id: str) -> NewEntry:
    return NewEntry(EntryKind.TOOL_RESULT, {"output": None}, call_id)


def kinds(sessions: Sessions, session_id: str) -> list[tuple[str, str | None]]:
    return [(str(entry.kind), entry.call_id) for entry in sessions.entries(session_id).entries]


def test_results_are_kept_for_calls_that_wait_for_them_and_once(sessions: Sessions) -> None:
    one, _ = turn(sessions, "U:1", "A:1", new=[call("a"), call("b")], session="s")
    brings = [result("a"), result("unknown")]
    begun = begin(sessions, "U:1", "A:1", "T:a", session="s", results=brings)
    assert kinds(sessions, "s") == [("tool_call", "a"), ("tool_call", "b"), ("tool_result", "a")]
    end(sessions, begun, [])  # the engine failed: the client sends them again
    begun = begin(sessions, "U:1", "A:1", "T:a", "T:b", session="s", results=[*brings, result("b")])
    assert kinds(sessions, "s")[3:] == [("tool_result", "b")]
    # A model may give a call an id that it gave before.
    end(sessions, begun, [], call("a"), call("c"))
    assert kinds(sessions, "s")[4:] == [("tool_call", "c")]


def test_a_branch_has_the_history_up_to_where_it_left(sessions: Sessions) -> None:
    note = NewEntry(EntryKind.NOTE, {})
    one, _ = turn(sessions, "U:1", "A:1", new=[note])
    turn(sessions, "U:1", "A:1", "U:2", "A:2", new=[note, note])
    branch, origin = turn(sessions, "U:1", "A:1", "U:3", "A:3", new=[note])
    assert origin is Origin.BRANCH
    assert one is not None
    assert branch is not None
    ids = [[entry.id for entry in sessions.entries(each).entries] for each in (one, branch)]
    assert ids[1][:1] == ids[0][:1]
    assert (len(ids[0]), len(ids[1])) == (3, 2)


def test_a_branch_between_a_call_and_its_result_begins_anew(sessions: Sessions) -> None:
    turn(sessions, "U:1", "A:1", new=[call("a")])
    turn(sessions, "U:1", "A:1", "T:a", "A:2", results=[result("a")])
    branch, origin = turn(sessions, "U:1", "A:1", "T:other", "A:3", results=[result("a")])
    assert origin is Origin.BRANCH
    assert branch is not None
    assert kinds(sessions, branch) == []


def test_nothing_is_kept_of_a_turn_that_was_taken_over(sessions: Sessions, database: Database) -> None:
    begun = begin(sessions, "U:1", session="s")
    with database.write() as connection:
        connection.execute(sa.text("UPDATE leases SET expires_us = 1"))
    taken = begin(sessions, "U:1", session="s")
    with pytest.raises(LeaseLost):
        end(sessions, begun, ["U:1", "A:1"], NewEntry(EntryKind.NOTE, {}))
    assert kinds(sessions, "s") == []
    with database.read() as connection:
        assert connection.execute(sa.select(conversation_tips)).all() == []
    end(sessions, taken, ["U:1", "A:1"])


def test_few_tips_are_kept(sessions: Sessions, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "KEPT", 3)
    texts: list[str] = []
    for number in range(6):
        texts += [f"U:{number}", f"A:{number}"]
        turn(sessions, *texts, session="s")
    with database.read() as connection:
        kept = connection.execute(sa.select(conversation_tips.c.messages).order_by(conversation_tips.c.id)).scalars()
        assert list(kept) == [8, 10, 12]


def test_a_tip_is_the_newest_until_another_turn_has_ended(sessions: Sessions, database: Database) -> None:
    """Whoever has found a tip locks its session later, and others may have gone on with it by then."""

    def found() -> conversations.Tip:
        with database.read() as connection:
            return next(conversations.find(connection, "default", talk("U:1", "A:1", "U:2")))

    def is_newest(tip: conversations.Tip) -> bool:
        with database.write() as connection:
            return conversations.still_newest(connection, Rows("default").lock(connection, tip.session), tip)

    name, _ = turn(sessions, "U:1", "A:1")
    tip = found()
    assert tip.session == name
    assert tip.newest
    assert is_newest(tip)
    assert name is not None
    sessions.update(name, None, metadata={"a": 1})  # no turn
    assert is_newest(tip)
    turn(sessions, "U:1", "A:1", "U:2", "A:2")
    assert not is_newest(tip)
    assert not found().newest


def test_the_last_answers_tip_is_found_first_and_others_after_it(sessions: Sessions, database: Database) -> None:
    first, _ = turn(sessions, "U:1", "A:1")
    turn(sessions, "U:1", "A:1", "U:2", "A:2")
    branch, _ = turn(sessions, "U:1", "A:1", "U:3", "A:3")
    assert branch != first
    with database.read() as connection:
        tips = list(conversations.find(connection, "default", talk("U:1", "A:1", "U:2", "A:2", "U:4")))
    assert [(tip.session, tip.messages, tip.newest) for tip in tips] == [(first, 4, True), (first, 2, False)]
    assert len({tip.id for tip in tips}) == 2
