"""What the conformance suite does not ask: real graphs, what is written and read, and two writers at once."""

from __future__ import annotations

import asyncio
import operator
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command, interrupt
from typing_extensions import TypedDict

from agentstate.adapters import langgraph as adapter
from agentstate.adapters.langgraph import AgentStateSaver
from agentstate.adapters.tables import checkpoint_blobs, checkpoint_channels, checkpoint_writes, checkpoints
from agentstate.errors import InvalidId, SchemaOutdated, SessionExpired, SessionNotFound
from agentstate.sessions import tenants
from agentstate.sessions.collection import collect
from agentstate.sessions.outcomes import SuspendReason
from agentstate.sessions.tenants import Tenant
from agentstate.sessions.transcript import NewEntry
from agentstate.sessions.verbs import Sessions
from agentstate.sql.database import Database
from agentstate.sql.models import EntryKind
from agentstate.sql.models import sessions as sessions_table

TABLES = (checkpoints, checkpoint_channels, checkpoint_blobs, checkpoint_writes)
LONG = "x" * 500


@pytest.fixture
def saver(database: Database) -> AgentStateSaver:
    return AgentStateSaver(database, model="m")


def thread(thread_id: str, checkpoint_id: str | None = None) -> Any:
    at = {} if checkpoint_id is None else {"checkpoint_id": checkpoint_id}
    return {"configurable": {"thread_id": thread_id, "checkpoint_ns": "", **at}}


def put(saver: AgentStateSaver, config: Any, version: str | None = None, **values: Any) -> Any:
    """Put a checkpoint in which every value is new."""
    version = saver.get_next_version(version, None)
    checkpoint = {**empty_checkpoint(), "channel_values": values, "channel_versions": dict.fromkeys(values, version)}
    return saver.put(config, checkpoint, {"source": "loop", "step": 0, "parents": {}}, dict.fromkeys(values, version))


def values(saver: AgentStateSaver, config: Any) -> dict[str, Any]:
    found = saver.get_tuple(config)
    assert found is not None
    return found.checkpoint["channel_values"]


def count(database: Database, table: sa.Table, thread_id: str = "t") -> int:
    with database.read() as connection:
        query = (
            sa.select(sa.func.count()).select_from(table.join(sessions_table)).where(sessions_table.c.name == thread_id)
        )
        return connection.execute(query).scalar_one()


@contextmanager
def statements(database: Database) -> Iterator[list[str]]:
    seen: list[str] = []
    # PostgreSQL's reader is its writer with other options, and tells of the same statements.
    engines = {database._reader, database._writer} if database.is_sqlite else {database._writer}

    def record(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        seen.append(statement)

    for engine in engines:
        sa.event.listen(engine, "before_cursor_execute", record)
    yield seen
    for engine in engines:
        sa.event.remove(engine, "before_cursor_execute", record)


# --- graphs


def chat(saver: AgentStateSaver) -> Any:
    def answer(state: MessagesState) -> Any:
        return {"messages": [AIMessage(f"{len(state['messages'])} {LONG}")]}

    builder = StateGraph(MessagesState)
    builder.add_node("answer", answer)
    builder.add_edge(START, "answer")
    builder.add_edge("answer", END)
    return builder.compile(checkpointer=saver)


def test_a_conversation_goes_on_in_another_process(database: Database, saver: AgentStateSaver) -> None:
    for turn in range(10):
        chat(AgentStateSaver(database, model="m")).invoke({"messages": [HumanMessage(f"{turn} {LONG}")]}, thread("t"))
    texts = [message.content.partition(" ")[0] for message in values(saver, thread("t"))["messages"]]
    assert texts == [text for turn in range(10) for text in (str(turn), str(2 * turn + 1))]


def test_async_graphs(saver: AgentStateSaver) -> None:
    async def converse() -> Any:
        graph = chat(saver)
        for turn in range(3):
            await graph.ainvoke({"messages": [HumanMessage(str(turn))]}, thread("t"))
        history = [state async for state in graph.aget_state_history(thread("t"))]
        return (await graph.aget_state(thread("t"))).values["messages"], history

    messages, history = asyncio.run(converse())
    assert len(messages) == 6
    assert [len(state.values.get("messages", ())) for state in history] == [6, 5, 4, 4, 3, 2, 2, 1, 0]


def test_an_interrupted_step_is_resumed_where_it_stopped(database: Database, saver: AgentStateSaver) -> None:
    class State(TypedDict):
        done: Annotated[list[str], operator.add]

    def first(state: State) -> Any:
        return {"done": ["first"]}

    def second(state: State) -> Any:
        return {"done": [f"second, {interrupt('may I?')}"]}

    def graph(saver: AgentStateSaver) -> Any:
        builder = StateGraph(State)
        builder.add_node("first", first)
        builder.add_node("second", second)
        builder.add_edge(START, "first")
        builder.add_edge("first", "second")
        return builder.compile(checkpointer=saver)

    stopped = graph(saver).invoke({"done": []}, thread("t"))
    assert stopped["__interrupt__"][0].value == "may I?"
    other = AgentStateSaver(database, model="m")
    assert graph(other).invoke(Command(resume="yes"), thread("t"))["done"] == ["first", "second, yes"]


def extend(state: list[str], writes: Any) -> list[str]:
    return [*state, *(item for write in writes for item in write)]


class Log(TypedDict):
    log: Annotated[list[str], DeltaChannel(extend, snapshot_frequency=7)]


def test_delta_channels_are_rebuilt_also_after_pruning(database: Database, saver: AgentStateSaver) -> None:
    builder = StateGraph(Log)
    builder.add_node("step", lambda state: {"log": [f"saw {len(state['log'])}"]})
    builder.add_edge(START, "step")
    graph = builder.compile(checkpointer=saver)
    expected: list[str] = []
    for turn in range(12):
        graph.invoke({"log": [str(turn)]}, thread("t"))
        expected += [str(turn), f"saw {len(expected) + 1}"]
        assert graph.get_state(thread("t")).values["log"] == expected
        if turn in (3, 8):
            before = count(database, checkpoints)
            saver.prune(["t"])
            assert count(database, checkpoints) < before
            assert graph.get_state(thread("t")).values["log"] == expected
            assert asyncio.run(graph.aget_state(thread("t"))).values["log"] == expected


def test_delta_history_longer_than_a_page(saver: AgentStateSaver, monkeypatch: pytest.MonkeyPatch) -> None:
    config = put(saver, thread("t"), log=["seed"])
    for step in range(150):
        saver.put_writes(config, [("log", [step])], f"task{step}")
        config = put(saver, config, other=step)
    history = saver.get_delta_channel_history(config=config, channels=["log", "never"])
    assert history["log"]["seed"] == ["seed"]
    assert [value for _, _, [value] in history["log"]["writes"]] == list(range(150))
    assert history["never"] == {"writes": []}
    assert history == super(AgentStateSaver, saver).get_delta_channel_history(config=config, channels=["log", "never"])


# --- what is written and read


def test_a_step_writes_what_it_adds_to_a_conversation(database: Database, saver: AgentStateSaver) -> None:
    config, messages = thread("t"), []
    for step in range(200):
        messages.append(f"{step} {LONG}")
        config = put(saver, config, messages=list(messages))
    assert values(saver, config)["messages"] == messages
    with database.read() as connection:
        written = {
            table.name: connection.execute(sa.select(sa.func.sum(sa.func.length(table.c.body)))).scalar_one()
            for table in (checkpoint_channels, checkpoint_blobs)
        }
    conversation = sum(map(len, messages))
    # Every item alone and once more in its run; whole values would be 100 times the conversation.
    assert written["checkpoint_blobs"] < 2.2 * conversation
    assert written["checkpoint_channels"] < 5 * conversation


def test_reading_asks_the_same_number_of_times_at_any_length(database: Database, saver: AgentStateSaver) -> None:
    counts = set()
    for length in (1, 20, 300):
        config = put(saver, thread(f"t{length}"), messages=[f"{n} {LONG}" for n in range(length)], other=1)
        for step in range(length):
            config = put(saver, config, other=step)
        saver.put_writes(config, [("other", 1)], "task")
        with statements(database) as seen:
            saver.get_tuple(thread(f"t{length}"))
        counts.add(len([statement for statement in seen if "SET TRANSACTION" not in statement]))
    assert max(counts) <= 4


items = st.one_of(st.none(), st.booleans(), st.integers(-(2**31), 2**31), st.text(max_size=40), st.binary(max_size=40))
items = st.one_of(items, st.lists(items, max_size=3), st.dictionaries(st.text(max_size=5), items, max_size=3))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.integers(0, 200), st.lists(items, max_size=90)), min_size=1, max_size=4))
def test_any_list_comes_back_as_it_was(
    database: Database, monkeypatch: pytest.MonkeyPatch, steps: list[tuple[int, list[Any]]]
) -> None:
    """Lists that grow, shrink and change: each value is kept's beginning of the one before, and something new."""
    monkeypatch.setattr(adapter, "SPLIT_BYTES", 0)
    saver = AgentStateSaver(database, model="m")
    config, value, expected = thread(str(uuid6())), [], []
    for kept, added in steps:
        value = [*value[:kept], *added]
        config = put(saver, config, log=value)
        expected.append((config, value))
    for config, value in expected:
        assert values(saver, config)["log"] == value


def test_branches_of_a_thread_keep_their_own_values(saver: AgentStateSaver) -> None:
    root = put(saver, thread("t"), log=["root"])
    version = saver.get_tuple(root).checkpoint["channel_versions"]["log"]
    left, right = (put(saver, root, version, log=["root", side]) for side in ("left", "right"))
    assert values(saver, left)["log"] == ["root", "left"]
    assert values(saver, right)["log"] == ["root", "right"]
    assert [saver.get_tuple(side).parent_config for side in (left, right)] == [root, root]


def test_no_pickle(database: Database, saver: AgentStateSaver) -> None:
    with pytest.raises(ValueError, match="no pickles"):
        AgentStateSaver(database, model="m", serde=JsonPlusSerializer(pickle_fallback=True))
    with pytest.raises(TypeError):
        put(saver, thread("t"), log=object())
    assert saver.get_tuple(thread("t")) is None


def test_listing_goes_on_page_after_page(saver: AgentStateSaver) -> None:
    for name in ("a", "b"):
        config = thread(name)
        for step in range(70):
            config = put(saver, config, n=step)
    listed = [
        (each.config["configurable"]["thread_id"], each.checkpoint["channel_values"]["n"]) for each in saver.list(None)
    ]
    assert listed == [("b", n) for n in range(69, -1, -1)] + [("a", n) for n in range(69, -1, -1)]
    assert len(list(saver.list(thread("a"), limit=66))) == 66
    assert list(saver.list(thread("a"), limit=0)) == []


def test_a_filter_compares_values_and_not_their_texts(saver: AgentStateSaver) -> None:
    for value in (1, "1", True, None, {"a": 1}):
        checkpoint = {**empty_checkpoint(), "channel_values": {}}
        saver.put(thread("t"), checkpoint, {"source": "loop", "step": 0, "parents": {}, "mark": value}, {})
    for value in ("1", None, {"a": 1}):
        assert [each.metadata["mark"] for each in saver.list(thread("t"), filter={"mark": value})] == [value]
    assert list(saver.list(thread("t"), filter={'odd "key".': "x"})) == []


def test_a_row_that_is_odd_does_not_fail_the_lists(saver: AgentStateSaver, database: Database) -> None:
    def put_with(mark: Any) -> None:
        checkpoint = {**empty_checkpoint(), "channel_values": {}}
        saver.put(thread("t"), checkpoint, {"source": "loop", "step": 0, "parents": {}, "mark": mark}, {})

    for mark in ("plain", float("nan"), "\ud800", "a\0b", ["\udcff", float("inf")]):
        put_with(mark)
    if database.is_sqlite:  # as earlier versions stored it
        with database.write() as connection:
            connection.exec_driver_sql(
                "UPDATE checkpoints SET metadata = replace(metadata, '\"NaN\"', 'NaN') WHERE metadata LIKE '%NaN%'"
            )
    assert len(list(saver.list(thread("t"), filter={"source": "loop"}))) == 5
    for mark in ("plain", "\ud800"):
        assert [each.metadata["mark"] for each in saver.list(None, filter={"mark": mark, "step": 0})] == [mark]


# --- threads are sessions


def test_a_new_thread_is_a_session_of_the_savers_model(saver: AgentStateSaver, sessions: Sessions) -> None:
    put(saver, thread("t"), n=1)
    assert (sessions.read("t").model, sessions.read("t").revision) == ("m", 1)


def test_a_thread_of_an_existing_session_keeps_it(saver: AgentStateSaver, sessions: Sessions) -> None:
    before = sessions.create("other", session_id="t", cache_salt="salt")
    put(saver, thread("t"), n=1)
    assert sessions.read("t") == before
    saver.delete_thread("t")
    assert sessions.read("t") == before


def test_checkpoints_go_with_their_session(database: Database, saver: AgentStateSaver) -> None:
    config = put(saver, thread("t"), log=[LONG] * 20)
    saver.put_writes(config, [("log", 1)], "task")
    assert all(count(database, table) for table in TABLES)
    with database.write() as connection:
        connection.execute(sa.delete(sessions_table))
    assert not any(count(database, table) for table in TABLES)


def test_a_copy_has_the_sources_kv_namespace_and_its_own_life(
    database: Database, saver: AgentStateSaver, sessions: Sessions
) -> None:
    sessions.create("other", session_id="t", cache_salt="salt")
    config = put(saver, thread("t"), log=[LONG] * 20)
    saver.put_writes(config, [("log", 1)], "task")
    saver.copy_thread("t", "copy")
    saver.copy_thread("t", "copy")
    saver.copy_thread("t", "t")
    assert (sessions.read("copy").model, sessions.read("copy").cache_salt) == ("other", "salt")
    saver.delete_thread("t")
    assert not any(count(database, table) for table in TABLES)
    copied = saver.get_tuple(thread("copy"))
    assert copied.checkpoint["channel_values"]["log"] == [LONG] * 20
    assert copied.pending_writes == [("task", "log", 1)]


def test_an_id_may_be_a_uuid(database: Database, saver: AgentStateSaver) -> None:
    for delete in (saver.delete_thread, lambda thread_id: saver.prune([thread_id], strategy="delete")):
        thread_id, run_id = uuid.uuid4(), uuid.uuid4()
        config = put(saver, thread(thread_id), n=1)
        put(saver, {**config, "metadata": {"run_id": str(run_id)}}, n=2)
        saver.copy_thread(thread_id, uuid.uuid4())
        saver.delete_for_runs([run_id])
        saver.prune([thread_id])
        assert [each.checkpoint["channel_values"] for each in saver.list(thread(thread_id))] == [{"n": 1}]
        delete(thread_id)
        assert saver.get_tuple(thread(thread_id)) is None
        assert count(database, checkpoints, str(thread_id)) == 0


@pytest.mark.parametrize("odd", ["user@example.com", "a/b", "ü", "x" * 129])
def test_a_thread_may_be_called_what_a_session_may(saver: AgentStateSaver, sessions: Sessions, odd: str) -> None:
    put(saver, thread(odd), n=1)
    assert sessions.read(odd).id == odd
    assert [each.config["configurable"]["thread_id"] for each in saver.list(thread(odd))] == [odd]


@pytest.mark.parametrize("odd", ["", "a\0b", "\ud800", "~a", "x" * 1025])
def test_a_thread_may_not_be_called_what_a_session_may_not(
    saver: AgentStateSaver, sessions: Sessions, odd: str
) -> None:
    for attempt in (
        lambda: put(saver, thread(odd), n=1),
        lambda: saver.put_writes(thread(odd, "1"), [("n", 1)], "task"),
        lambda: saver.get_tuple(thread(odd)),
        lambda: list(saver.list(thread(odd))),
        lambda: saver.delete_thread(odd),
        lambda: saver.copy_thread("t", odd),
        lambda: sessions.create("m", session_id=odd),
    ):
        with pytest.raises(InvalidId):
            attempt()


def test_a_deleted_session_leaves_no_checkpoint_however_long_its_forks_live(
    database: Database, saver: AgentStateSaver, sessions: Sessions
) -> None:
    sessions.create("m", session_id="t")
    lease = sessions.resume("t", lease_ttl_s=60, tail=0).lease.key
    sessions.append("t", lease, [NewEntry(EntryKind.NOTE, {"text": "shared"})])
    sessions.suspend("t", lease, SuspendReason.USER_WAIT)
    fork = sessions.fork("t", None)
    config = put(saver, {**thread("t"), "metadata": {"run_id": "r"}}, log=[LONG] * 20)
    saver.put_writes(config, [("log", 1)], "task")
    sessions.delete("t", None)
    assert list(saver.list(None)) == list(saver.list(thread("t"))) == []
    saver.delete_for_runs(["r"])
    collect(database, expired_after_s=0)
    with database.read() as connection:
        left = [connection.execute(sa.select(sa.func.count()).select_from(table)).scalar() for table in TABLES]
    assert left == [0] * len(TABLES)
    assert [entry.payload for entry in sessions.entries(fork.id).entries] == [{"text": "shared"}]


def test_an_expired_thread_is_neither_read_nor_written_to(
    database: Database, saver: AgentStateSaver, sessions: Sessions
) -> None:
    config = put(saver, thread("t"), n=1)
    put(saver, thread("other"), n=1)
    with database.write() as connection:
        connection.execute(sa.update(sessions_table).where(sessions_table.c.name == "t").values(expires_us=1))
    another = AgentStateSaver(database, model="m")
    for attempt in (
        lambda: put(saver, config, n=2),
        lambda: put(another, thread("t"), n=2),
        lambda: saver.put_writes(config, [("n", 1)], "task"),
        lambda: another.put_writes(config, [("n", 1)], "task"),
        lambda: saver.get_tuple(thread("t")),
        lambda: list(saver.list(thread("t"))),
        lambda: saver.prune(["t"]),
        lambda: saver.copy_thread("t", "copy"),
        lambda: saver.copy_thread("other", "t"),
    ):
        with pytest.raises(SessionExpired, match="t"):
            attempt()
    assert [each.config["configurable"]["thread_id"] for each in saver.list(None)] == ["other"]
    saver.delete_thread("t")
    assert [count(database, table) for table in TABLES] == [0] * len(TABLES)


@pytest.mark.parametrize("first_step", [True, False])
def test_a_session_that_is_deleted_during_a_run_stays_deleted(
    saver: AgentStateSaver, sessions: Sessions, first_step: bool
) -> None:
    sessions.create("m", session_id="t", cache_salt="salt")
    if not first_step:
        put(saver, thread("t"), n=1)
    found = saver.get_tuple(thread("t"))  # as a run begins
    config = found.config if found else thread("t")
    sessions.delete("t", None)
    for _ in range(2):
        with pytest.raises(SessionNotFound, match="deleted"):
            put(saver, config, n=2)
        with pytest.raises(SessionNotFound):
            saver.put_writes(thread("t", "1"), [("n", 1)], "task")
    assert sessions.list().sessions == []
    assert saver.get_tuple(thread("t")) is None  # the next run
    put(saver, thread("t"), n=1)
    assert sessions.read("t").cache_salt is None


def test_a_session_that_was_made_anew_during_a_run_is_not_that_runs(saver: AgentStateSaver, sessions: Sessions) -> None:
    config = put(saver, thread("t"), n=1)
    sessions.delete("t", None)
    sessions.create("m", session_id="t")
    with pytest.raises(SessionNotFound):
        put(saver, config, n=2)
    assert list(saver.list(thread("t"))) == []


def test_a_new_thread_expires_as_its_tenants_sessions_do(
    database: Database, saver: AgentStateSaver, sessions: Sessions
) -> None:
    with database.write() as connection:
        tenants.put(connection, Tenant("default", expires_in_s=3600, requests_per_s=None))
    put(saver, thread("t"), n=1)
    session = sessions.read("t")
    assert session.expires_us is not None
    assert session.expires_us >= session.created_us + 3_600_000_000


# --- what is deleted


def test_pruning_and_deleting_runs_leave_no_value_that_nobody_has(database: Database, saver: AgentStateSaver) -> None:
    config, messages = thread("t"), []
    for step in range(100):
        messages.append(f"{step} {LONG}")
        config = put(saver, config, log=list(messages))
        saver.put_writes(config, [("log", step)], "task")
    saver.prune(["t"])
    assert [count(database, table) for table in TABLES] == [1, 1, 1 + 36, 1]
    assert values(saver, config)["log"] == messages
    run = put(saver, {**config, "metadata": {"run_id": "r"}}, log=[*messages, "of the run"])
    assert saver.get_tuple(run).metadata["run_id"] == "r"
    saver.delete_for_runs(["r"])
    assert [count(database, table) for table in TABLES] == [1, 1, 1 + 36, 1]
    with pytest.raises(ValueError, match="'keep_all'"):
        saver.prune(["t"], strategy="keep_all")


# --- more than one at a time


def test_two_writers_and_a_pruner_at_once(database: Database, saver: AgentStateSaver) -> None:
    """Nobody fails, and every newest checkpoint is whole: no blob is swept that a writer relies on."""
    failures: list[BaseException] = []
    shared = [f"{n} {LONG}" for n in range(70)]
    done = threading.Event()

    def write(name: str) -> None:
        try:
            config = thread("t")
            for step in range(40):
                config = put(saver, config, log=[*shared, f"{name} {step}"])
        except BaseException as error:
            failures.append(error)

    def prune() -> None:
        try:
            while not done.is_set():
                saver.prune(["t"])
                found = saver.get_tuple(thread("t"))
                assert found is None or found.checkpoint["channel_values"]["log"][:70] == shared
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(name,)) for name in ("a", "b")]
    pruner = threading.Thread(target=prune)
    for each in (*writers, pruner):
        each.start()
    for each in writers:
        each.join()
    done.set()
    pruner.join()
    assert failures == []
    saver.prune(["t"])
    assert values(saver, thread("t"))["log"][70] in ("a 39", "b 39")


def test_from_url(database_url: str) -> None:
    with AgentStateSaver.from_url(database_url.replace("+psycopg", ""), model="m") as saver:
        put(saver, thread("t"), n=1)
    with AgentStateSaver.from_url(database_url, model="m") as saver:
        assert values(saver, thread("t")) == {"n": 1}


def test_from_url_refuses_a_database_without_the_schema(empty_url: str) -> None:
    with pytest.raises(SchemaOutdated, match="agentstate db upgrade"), AgentStateSaver.from_url(empty_url, model="m"):
        pass


def test_a_tenants_threads_are_its_own(database: Database) -> None:
    savers = {tenant: AgentStateSaver(database, model="m", tenant=tenant) for tenant in ("a", "b")}
    config = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}, "metadata": {"run_id": "r"}}
    for tenant, saver in savers.items():
        put(saver, config, said=tenant)
    (of_a,) = savers["a"].list(None)
    assert of_a.checkpoint["channel_values"] == {"said": "a"}
    savers["a"].copy_thread("t", "copy")
    savers["a"].prune(["t"])
    savers["a"].delete_for_runs(["r"])
    savers["a"].delete_thread("t")
    assert savers["a"].get_tuple(config) is None
    assert [found.checkpoint["channel_values"] for found in savers["b"].list(None)] == [{"said": "b"}]
    assert AgentStateSaver(database, model="m").get_tuple(config) is None
    assert {Sessions(database, 30, tenant).read("t").model for tenant in savers} == {"m"}
