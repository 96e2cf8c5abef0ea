"""Conversations, items and responses on rows: what stays of them when histories fork, go back, and end."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentstate.errors import EntryNotFound, ResponseNotFound, SessionBusy, SessionExpired, SessionNotFound
from agentstate.sessions import branches, items
from agentstate.sessions.belonging import Begun, Origin, State, Wanted
from agentstate.sessions.collection import collect
from agentstate.sessions.conversations import Conversation, Said
from agentstate.sessions.history import MAX_SEGMENTS
from agentstate.sessions.items import Item, shown
from agentstate.sessions.outcomes import Order
from agentstate.sessions.responses import NewResponse
from agentstate.sessions.stored import Stored
from agentstate.sessions.transcript import BLOB_BYTES, MAX_PAGE_BYTES, NewEntry
from agentstate.sessions.verbs import Sessions
from agentstate.sql.database import Database
from agentstate.sql.models import EntryKind
from agentstate.sql.models import items as table
from agentstate.sql.models import responses as responses_table
from agentstate.sql.models import sessions as sessions_table

numbers = iter(range(1 << 30))


def message(text: str, **more: Any) -> Item:
    return {"type": "message", "role": "user", "content": text, **more}


class Turns:
    """The turns of a gateway, without one."""

    def __init__(self, database: Database):
        self.database = database
        self.sessions = Sessions(database, 10)
        self.stored = Stored(database, "default")

    def begin(self, state: State | None = None, **wanted: Any) -> Begun:
        state = State() if state is None else state
        return self.sessions.begin(Wanted("m", state=state, **wanted), lease_ttl_s=60, expires_in_s=60)

    def end(self, begun: Begun, received: list[Item], output: list[Item]) -> str:
        """Keep a response; gives back its id."""
        assert begun.resumed is not None
        made = f"resp_{next(numbers):032x}"
        if begun.context is not None and begun.whole:
            received = [*self.stored.recall(begun.context, 1 << 20), *received]
        new = NewResponse(made, {"id": made}, received, output, begun.time_us, begun.base, begun.whole)
        said = Conversation([Said("assistant", bytes(16), 1)])
        self.sessions.end(begun.resumed.session.id, begun.resumed.lease.key, said, [], response=new, expires_in_s=60)
        return made

    def turn(self, text: str, previous: str | None = None, **wanted: Any) -> str:
        begun = self.begin(State(response=previous), **wanted)
        return self.end(begun, [message(text)], [message(f"re {text}", role="assistant")])

    def context(self, previous: str) -> list[str]:
        """What a request after this response would be given."""
        begun = self.begin(State(response=previous))
        assert begun.context is not None and begun.resumed is not None
        found = [item["content"] for item in self.stored.recall(begun.context, 1 << 20)]
        self.sessions.end(begun.resumed.session.id, begun.resumed.lease.key, None, [], expires_in_s=60)
        return found


@pytest.fixture
def turns(database: Database) -> Turns:
    return Turns(database)


def texts(found: list[Item]) -> list[str]:
    return [item["content"] for item in found]


def test_a_chain_of_responses_is_one_session(turns: Turns) -> None:
    last: str | None = None
    for text in "abc":
        last = turns.turn(text, last)
    assert last is not None
    assert turns.context(last) == ["a", "re a", "b", "re b", "c", "re c"]
    assert len(turns.sessions.list().sessions) == 1


def test_what_came_has_the_time_when_it_came(turns: Turns) -> None:
    """A tool has ended when its result comes, not when the model has answered to it."""
    call = {"type": "function_call", "call_id": "c", "name": "run", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c", "output": ""}
    one = turns.end(turns.begin(session="s"), [message("a")], [call])
    begun = turns.begin(State(response=one), session="s")
    turns.end(begun, [output], [message("done")])
    entry = turns.sessions.entries("s").entries[2]
    assert (entry.kind, entry.created_us) == (EntryKind.TOOL_RESULT, begun.time_us)


def test_forks_go_their_own_ways(turns: Turns) -> None:
    root = turns.turn("root")
    ends = {}
    for way in "abc":
        middle = turns.turn(way, root)
        ends[way] = turns.turn("more", middle)
    for way, end in ends.items():
        assert turns.context(end) == ["root", "re root", way, f"re {way}", "more", "re more"]
    assert len(turns.sessions.list().sessions) == 3


def test_a_history_that_cannot_be_forked_again_is_copied(turns: Turns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches, "MAX_SEGMENTS", 3)
    assert MAX_SEGMENTS > 3
    last, expected = turns.turn("root"), ["root", "re root"]
    for number in range(6):
        turns.turn("aside", last)
        last = turns.turn(str(number), last)  # its session has gone on: a fork
        expected += [str(number), f"re {number}"]
    assert turns.context(last) == expected


def test_what_was_sent_whole_again_begins_a_context_of_its_own(turns: Turns) -> None:
    made = turns.end(turns.begin(session="s"), [message("a")], [message("b")])
    again = turns.end(turns.begin(session="s"), [message("c")], [message("d")])
    assert (turns.context(made), turns.context(again)) == (["a", "b"], ["c", "d"])
    goes_on = turns.turn("e", again, session="s")
    assert turns.context(goes_on) == ["c", "d", "e", "re e"]
    listed = turns.stored.given(goes_on, after=None, limit=10, order=Order.ASCENDING)
    assert texts(listed.items) == ["c", "d", "e"]


def test_a_response_goes_with_its_session(turns: Turns) -> None:
    made = turns.turn("a")
    made_too = turns.turn("b", made)
    forks = [fork := turns.turn("d", made)]
    (session, _) = turns.sessions.list().sessions
    turns.sessions.delete(session.id, None)
    with turns.database.read() as connection:
        kept = connection.execute(sa.select(responses_table.c.id)).scalars().all()
    assert sorted(kept) == sorted(forks)
    for ask in (turns.stored.response, turns.stored.forget, turns.context):
        with pytest.raises(ResponseNotFound):
            ask(made)
    with pytest.raises(ResponseNotFound):
        turns.stored.response(made_too)
    collect(turns.database, expired_after_s=0, blob_grace_s=0)
    assert turns.context(fork) == ["a", "re a", "d", "re d"]
    (left,) = turns.sessions.list().sessions
    turns.sessions.delete(left.id, None)
    collect(turns.database, expired_after_s=0, blob_grace_s=0)
    with turns.database.read() as connection:
        for gone in (table, responses_table):
            assert connection.execute(sa.select(sa.func.count()).select_from(gone)).scalar() == 0


def test_a_session_that_nobody_named_expires_and_one_that_was_does_not(turns: Turns) -> None:
    made = turns.turn("a")
    (session,) = turns.sessions.list().sessions
    assert session.expires_us is not None
    named = turns.turn("a", session="mine")
    named = turns.turn("b", named)
    assert turns.sessions.read("mine").expires_us is None
    with turns.database.write() as connection:
        connection.execute(sa.update(sessions_table).where(sessions_table.c.name == session.id).values(expires_us=1))
    with pytest.raises(ResponseNotFound):
        turns.stored.response(made)


def test_nothing_goes_on_from_what_was_taken_back(turns: Turns) -> None:
    one = turns.turn("a", session="s")
    head = turns.sessions.read("s").head_id
    two = turns.turn("b", one, session="s")
    turns.sessions.rewind("s", None, at=head)
    with pytest.raises(ResponseNotFound):
        turns.context(two)
    with pytest.raises(EntryNotFound):
        turns.stored.given(two, after=None, limit=9, order=Order.ASCENDING)
    assert turns.stored.response(two) == {"id": two}
    assert turns.context(one) == ["a", "re a"]
    collect(turns.database, expired_after_s=0, blob_grace_s=0)
    assert turns.context(one) == ["a", "re a"]


def test_items_stay_in_their_places_when_a_history_is_compacted(turns: Turns) -> None:
    conversation = turns.stored.create({}, []).id
    kept = [turns.stored.add(conversation, [message("0", id="id_0")])[0]]
    for number in range(1, 2 * branches.COMPACT_AT):
        kept += turns.stored.add(conversation, [message(str(number), id=f"id_{number}")])
        head = turns.sessions.read(conversation).head_id
        turns.stored.add(conversation, [message("taken back")])
        turns.sessions.rewind(conversation, None, at=head)
    found = turns.stored.items(conversation, after="id_99", limit=100, order=Order.ASCENDING)
    assert found.items == kept[100:]
    assert turns.stored.item(conversation, "id_3") == kept[3]


def test_a_reference_means_the_item_of_its_own_session_and_else_the_newest(turns: Turns) -> None:
    """Clients may give items ids of their own, so several conversations have the same ones."""
    old, new = (turns.stored.create({}, [message(text, id="msg_1")]).id for text in ("old", "new"))
    answered = turns.end(turns.begin(State(conversation=old)), [], [message("re old", id="msg_2")])

    def referred(item: str = "msg_1", session: str | None = None, response: str | None = None) -> list[Any]:
        found = turns.stored.referred({item: 1}, 1 << 20, session=session, response=response)
        assert found is not None
        return texts(list(found.values()))

    for name in (None, "nobody", "\0"):
        assert referred(session=name) == ["new"]
    assert [referred(session=name) for name in (old, new)] == [["old"], ["new"]]
    assert referred(response=answered) == ["old"]
    assert referred("msg_2", session=new) == ["re old"]  # it is said elsewhere
    turns.stored.remove(new, "msg_1")
    assert referred() == ["old"]
    assert referred(session=new) == []
    turns.sessions.delete(old, None)
    assert (referred(), referred("msg_2")) == ([], [])


def test_an_item_can_be_referred_to_as_long_as_a_session_has_it(turns: Turns) -> None:
    """Not when it was taken back, nor when its session goes, unless a fork shares it."""
    one = turns.end(turns.begin(session="s"), [message("a", id="a")], [message("re a", id="re_a")])
    head = turns.sessions.read("s").head_id
    turns.end(turns.begin(session="s"), [message("b", id="b")], [message("re b", id="re_b")])
    turns.end(turns.begin(State(response=one), session="fork"), [message("c", id="c")], [message("re c", id="re_c")])
    everything = dict.fromkeys(("a", "re_a", "b", "re_b", "c", "re_c"), 1)

    def found() -> set[str]:
        return set(turns.stored.referred(everything, 1 << 20, session=None, response=None) or ())

    assert found() == everything.keys()
    turns.sessions.rewind("s", None, at=head)
    assert found() == {"a", "re_a", "c", "re_c"}
    turns.end(turns.begin(session="s"), [message("d", id="b")], [message("re d", id="re_d")])
    assert found() == {"a", "re_a", "b", "c", "re_c"}
    turns.sessions.delete("s", None)
    assert found() == {"a", "re_a", "c", "re_c"}
    with turns.database.write() as connection:
        connection.execute(sa.update(sessions_table).where(sessions_table.c.name == "fork").values(expires_us=1))
    assert found() == set()


def test_what_is_referred_to_is_bounded(turns: Turns) -> None:
    """Once for each time, in a row or in a blob."""
    conversation = turns.stored.create({}, [message("x" * 1000, id="row"), message("x" * BLOB_BYTES, id="blob")]).id
    for item, size in (("row", 1000), ("blob", BLOB_BYTES)):
        for times, most, fits in ((1, size + 500, True), (1, size - 1, False), (3, 2 * size + 500, False)):
            found = turns.stored.referred({item: times}, most, session=conversation, response=None)
            assert (found is not None) == fits


def test_a_conversation_must_be_there(turns: Turns) -> None:
    for name in ("conv_none", "ses_none", "", "conv_\0", "conv_" + "x" * 2000):
        with pytest.raises(SessionNotFound):
            turns.begin(State(conversation=name))
    assert turns.sessions.list().sessions == []


def test_a_conversation_is_run_by_one_request(turns: Turns) -> None:
    conversation = turns.stored.create({}, [message("a")]).id
    begun = turns.begin(State(conversation=conversation))
    assert begun.origin is Origin.NAMED
    for ask in (
        lambda: turns.begin(State(conversation=conversation)),
        lambda: turns.stored.add(conversation, [message("b")]),
        lambda: turns.stored.remove(conversation, "msg_none"),
    ):
        with pytest.raises(SessionBusy):
            ask()
    assert turns.sessions.read(conversation).model == "m"
    turns.end(begun, [message("b")], [message("c")])
    found = turns.stored.items(conversation, after=None, limit=9, order=Order.ASCENDING)
    assert texts(found.items) == ["a", "b", "c"]


def test_what_is_kept_has_a_session_of_its_own_where_a_guess_does_not_fit(turns: Turns) -> None:
    running = turns.begin(harness="codex:1")
    beside = turns.begin(harness="codex:1")
    assert (running.origin, beside.origin) == (Origin.HARNESS, Origin.NEW)
    kept = [turns.end(begun, [message(text)], [message("b")]) for begun, text in ((running, "a"), (beside, "c"))]
    assert [turns.context(each) for each in kept] == [["a", "b"], ["c", "b"]]
    assert sorted(session.id.partition("_")[0] for session in turns.sessions.list().sessions) == ["codex:1", "ses"]


def test_an_expired_conversation(turns: Turns) -> None:
    conversation = turns.stored.create({}, [message("a")]).id
    with turns.database.write() as connection:
        connection.execute(sa.update(sessions_table).values(expires_us=1))
    with pytest.raises(SessionExpired):
        turns.begin(State(conversation=conversation))
    with pytest.raises(SessionExpired):
        turns.stored.read(conversation)


def test_pages_are_bounded_by_their_bytes(turns: Turns) -> None:
    conversation = turns.stored.create({}, []).id
    size = MAX_PAGE_BYTES // 3
    for number in range(5):
        turns.stored.add(conversation, [message(str(number) * size)])
    found: list[str] = []
    after, pages = None, 0
    while True:
        page = turns.stored.items(conversation, after=after, limit=100, order=Order.DESCENDING)
        found += [item["content"][0] for item in page.items]
        after, pages = page.items[-1]["id"], pages + 1
        if not page.has_more:
            break
    assert found == list("43210")
    assert pages > 1


def test_entries_that_are_no_items_are_not_shown(turns: Turns) -> None:
    conversation = turns.stored.create({}, [message("a")]).id
    key = turns.sessions.resume(conversation, lease_ttl_s=60, tail=0).lease.key
    other = [
        NewEntry(EntryKind.MESSAGE, {"role": "user", "content": "chat's"}),
        NewEntry(EntryKind.NOTE, {"item": "none"}),
        *(NewEntry(EntryKind.NOTE, {"text": str(number)}) for number in range(300)),
    ]
    turns.sessions.append(conversation, key, other)
    found = turns.stored.items(conversation, after=None, limit=1, order=Order.ASCENDING)
    assert (texts(found.items), found.has_more) == (["a"], False)
    found = turns.stored.items(conversation, after=None, limit=1, order=Order.DESCENDING)
    assert (texts(found.items), found.has_more) == (["a"], False)


NAMES = [f"id_{number}" for number in range(4)]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(st.sampled_from([*NAMES, None]), min_size=1, max_size=4)),
        st.tuples(st.just("delete"), st.sampled_from(NAMES)),
        st.tuples(st.just("list"), st.tuples(st.integers(1, 4), st.booleans())),
    ),
    max_size=25,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_items_against_a_list(turns: Turns, steps: list[tuple[str, Any]]) -> None:
    conversation = turns.stored.create({}, []).id
    model: list[Item] = []
    for number, (step, what) in enumerate(steps):
        there = {item["id"] for item in model}
        if step == "add":
            added = turns.stored.add(conversation, [message(str(number), id=name) for name in what])
            for name, item in zip(what, added, strict=True):
                free = name is not None and name not in there
                assert (item["id"] == name) == free
                there.add(item["id"])
            model += added
        elif step == "delete" and what in there:
            turns.stored.remove(conversation, what)
            model = [item for item in model if item["id"] != what]
        elif step == "delete":
            with pytest.raises(EntryNotFound):
                turns.stored.remove(conversation, what)
        else:
            limit, newest = what
            found: list[Item] = []
            more = bool(model)
            while more:
                page = turns.stored.items(
                    conversation,
                    after=found[-1]["id"] if found else None,
                    limit=limit,
                    order=Order.DESCENDING if newest else Order.ASCENDING,
                )
                found, more = [*found, *page.items], page.has_more
            assert found == (model[::-1] if newest else model)
    context = turns.begin(State(conversation=conversation)).context
    assert context is not None
    assert turns.stored.recall(context, 1 << 20) == model


@pytest.mark.parametrize(
    ("item", "content"),
    [
        ({"role": "user", "content": "a"}, [{"type": "input_text", "text": "a"}]),
        ({"role": "assistant", "content": "a"}, [{"type": "output_text", "text": "a", "annotations": []}]),
        ({"role": "assistant", "content": None}, [{"type": "output_text", "text": "", "annotations": []}]),
        ({"role": "user", "content": [{"type": "input_image"}]}, [{"type": "input_image"}]),
    ],
)
def test_a_message_is_shown_in_parts(item: Item, content: Any) -> None:
    assert shown(item) == {**item, "content": content, "status": "completed"}


def test_what_is_shown_keeps_what_it_has() -> None:
    call = {"type": "function_call", "id": "fc_1", "status": "incomplete"}
    assert shown(call) == call
    assert shown({**call, "status": None})["status"] == "completed"
    assert shown({"type": "reasoning", "id": "rs_1"})["summary"] == []
    assert shown({"type": "web_search_call", "id": "ws_1"}) == {"type": "web_search_call", "id": "ws_1"}
    assert items.kind_of({"role": "user"}) == "message"
