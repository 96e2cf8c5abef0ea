"""Responses through the gateway: what is kept of them, and what a request goes on from."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import openai
import pytest
import sqlalchemy as sa
from engines import Asked, called, responds, response, response_events, said
from gateways import Gateway
from openai.types.responses import Response, ResponseStreamEvent
from stage import MODEL, register

from agentstate.errors import DatabaseUnreachable
from agentstate.sessions import responses as kept_responses
from agentstate.sessions import tenants
from agentstate.sessions.verbs import Sessions
from agentstate.sql.models import EntryKind, sessions

OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "42"}
THOUGHT: dict[str, Any] = {
    "id": "rs_1",
    "type": "reasoning",
    "summary": [],
    "content": [{"type": "reasoning_text", "text": "hm"}],
    "encrypted_content": None,
    "status": None,
}
TERMINAL = {"response.completed", "response.incomplete", "response.failed"}


def user(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "user", "content": text}


def plain(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items as the engine got them, without the ids that the gateway made."""
    made = ("msg_0", "fco_0")
    return [
        {key: value for key, value in item.items() if key != "id" or not str(value).startswith(made)} for item in items
    ]


class Client:
    """OpenAI's, which checks every answer and event against its types."""

    def __init__(self, gateway: Gateway, api: openai.OpenAI):
        self.gateway = gateway
        self.api = api
        self.session = ""

    def create(self, **fields: Any) -> Response:
        answer = self.api.responses.with_raw_response.create(model=MODEL, **fields)
        self.session = answer.headers.get("x-agentstate-session", "")
        self.gateway.ended()
        found: Response = answer.parse()
        return found

    def stream(self, **fields: Any) -> list[ResponseStreamEvent]:
        events = list(self.api.responses.create(model=MODEL, stream=True, **fields))
        self.gateway.ended()
        return events

    def given(self) -> list[dict[str, Any]]:
        """The input that the engine got last."""
        return plain(self.gateway.engine.asked[-1].document["input"])

    def entries(self, session: str) -> list[tuple[EntryKind, Any]]:
        found = self.gateway.service.client.entries(session).data
        return [(entry.kind, (entry.payload.get("item") or entry.payload).get("type")) for entry in found]


@pytest.fixture
def connect(make_gateway: Callable[..., Gateway]) -> Iterator[Callable[..., Client]]:
    with ExitStack() as ending:

        def make(script: Callable[[Asked], None], **settings: Any) -> Client:
            gateway = make_gateway(script, **settings)
            return Client(gateway, ending.enter_context(client_of(gateway)))

        yield make


def client_of(gateway: Gateway, key: str = "none") -> openai.OpenAI:
    url = f"{gateway.service.base_url}/v1"
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, _strict_response_validation=True)


def code_of(error: pytest.ExceptionInfo[openai.APIStatusError]) -> tuple[int, Any, Any]:
    return error.value.status_code, error.value.code, error.value.param


# --- what is kept, and the stateless request that an engine gets


def test_a_response_is_kept_and_the_next_goes_on_from_it(connect: Callable[..., Client]) -> None:
    client = connect(responds([said("hi")], [said("fine", "msg_2")]))
    one = client.create(input="hello", instructions="be brief")
    session = client.session
    assert (one.store, one.previous_response_id, one.output_text) == (True, None, "hi")
    (asked,) = client.gateway.engine.asked
    assert asked.document == {
        "model": MODEL,
        "input": "hello",
        "instructions": "be brief",
        "store": False,
        "request_id": one.id,
    }
    assert len(one.id) == len("resp_") + 32
    assert asked.headers["x-agentstate-request"] == one.id
    two = client.create(input=[user("how are you")], previous_response_id=one.id)
    assert (two.previous_response_id, two.store) == (one.id, True)
    assert client.session == session
    # Instructions are not carried over, and nothing of what is kept reaches the engine but the items.
    asked = client.gateway.engine.asked[-1]
    assert set(asked.document) == {"model", "input", "store", "request_id"}
    assert client.given() == [user("hello"), said("hi"), user("how are you")]
    assert client.entries(session) == [(EntryKind.MESSAGE, "message")] * 4
    assert client.gateway.service.client.read(session).status == "suspended"
    for made in (one, two):
        assert client.api.responses.retrieve(made.id) == made


def test_ids_are_ours_and_stable(connect: Callable[..., Client]) -> None:
    """`retrieve(id).id == id`, also if an engine answers with another."""
    client = connect(lambda asked: asked.whole(response(asked, [said("hi")], id="resp_theirs")))
    made = client.create(input="hello")
    assert client.gateway.engine.asked[0].document["request_id"] == made.id
    assert client.api.responses.retrieve(made.id).id == made.id


@pytest.mark.parametrize("gone", ["unknown", "malformed", "deleted", "of another tenant", "session deleted", "expired"])
def test_an_unknown_previous_response(connect: Callable[..., Client], gone: str) -> None:
    client = connect(responds(*[[said("hi")]] * 3))
    api, database = client.api, client.gateway.service.database
    asked = 1
    if gone == "of another tenant":
        keys = []
        with database.write() as connection:
            for tenant in ("one", "two"):
                keys.append(tenants.create_key(connection, tenant).secret)
        api = client_of(client.gateway, keys[0])
        made = api.responses.create(model=MODEL, input="hello").id
        api = client_of(client.gateway, keys[1])
    else:
        made = client.create(input="hello").id
    if gone == "deleted":
        api.responses.delete(made)
    elif gone == "session deleted":
        client.gateway.service.client.delete(client.session, revision="*")
    elif gone == "expired":
        with database.write() as connection:
            connection.execute(sa.update(sessions).values(expires_us=1))
    previous = {"unknown": "resp_" + "0" * 32, "malformed": "resp_\0'"}.get(gone, made)
    with pytest.raises(openai.BadRequestError) as error:
        api.responses.create(model=MODEL, input="go on", previous_response_id=previous)
    assert code_of(error) == (400, "previous_response_not_found", "previous_response_id")
    if gone != "malformed":
        for ask in (api.responses.retrieve, api.responses.delete, api.responses.input_items.list):
            with pytest.raises(openai.NotFoundError):
                ask(previous)
    assert len(client.gateway.engine.asked) == asked


def test_nothing_is_kept_where_the_client_does_not_want_it(connect: Callable[..., Client]) -> None:
    client = connect(responds([called("run", '{"command": "ls -l /tmp", "secret": 1}')], [said("done")]))
    made = client.create(input="list", store=False)
    assert made.store is False
    with pytest.raises(openai.NotFoundError):
        client.api.responses.retrieve(made.id)
    session = client.session
    output = made.output[0].to_dict()
    client.create(input=[user("list"), output, OUTPUT], store=False)
    assert client.session == session
    entries = client.gateway.service.client.entries(session).data
    assert [(entry.kind, entry.payload) for entry in entries] == [
        (EntryKind.TOOL_CALL, {"name": "run", "arguments": {"command": "ls -l /tmp"}}),
        (EntryKind.TOOL_RESULT, {"output": None}),
    ]


def test_tool_calls_are_those_of_the_session(connect: Callable[..., Client]) -> None:
    custom = {
        "id": "ctc_1",
        "type": "custom_tool_call",
        "call_id": "call_2",
        "name": "patch",
        "input": "*** Begin",
    }
    client = connect(responds([said("let me see"), called("run", '{"a": 1}'), custom], [said("done", "msg_2")]))
    one = client.create(input="go")
    session = client.session
    assert client.gateway.tool_calls(session) == [("run", "claimed"), ("patch", "claimed")]
    results = [OUTPUT, {"type": "custom_tool_call_output", "call_id": "call_2", "output": "ok"}]
    two = client.create(input=results, previous_response_id=one.id)
    assert client.session == session
    assert client.gateway.tool_calls(session) == [("run", "done"), ("patch", "done")]
    assert [entry for entry in client.entries(session)] == [
        (EntryKind.MESSAGE, "message"),
        (EntryKind.MESSAGE, "message"),
        (EntryKind.TOOL_CALL, "function_call"),
        (EntryKind.TOOL_CALL, "custom_tool_call"),
        (EntryKind.TOOL_RESULT, "function_call_output"),
        (EntryKind.TOOL_RESULT, "custom_tool_call_output"),
        (EntryKind.MESSAGE, "message"),
    ]
    call = client.gateway.service.client.entries(session).data[2]
    assert (call.payload["name"], call.payload["arguments"], call.call_id) == ("run", '{"a": 1}', "call_1")
    given = client.gateway.engine.asked[-1].document["input"]
    assert [item["type"] for item in given] == [kind for _, kind in client.entries(session)][:-1]
    assert two.output_text == "done"


def test_reasoning_is_kept_and_given_back(connect: Callable[..., Client]) -> None:
    client = connect(responds([THOUGHT, said("hi")], [said("fine", "msg_2")]))
    one = client.create(input="hello")
    client.create(input="and", previous_response_id=one.id)
    assert client.given() == [user("hello"), THOUGHT, said("hi"), user("and")]


# --- ways to go on


def test_two_ways_on_from_one_response(connect: Callable[..., Client]) -> None:
    client = connect(responds(*[[said(text, f"msg_{text}")] for text in ("one", "two", "else", "end")]))
    one = client.create(input="hello")
    session = client.session
    client.create(input="go on", previous_response_id=one.id)
    other = client.create(input="no", previous_response_id=one.id)
    fork = client.session
    assert fork != session
    assert client.given() == [user("hello"), said("one", "msg_one"), user("no")]
    client.create(input="bye", previous_response_id=other.id)
    assert client.session == fork
    assert client.given() == [
        *(user("hello"), said("one", "msg_one"), user("no")),
        *(said("else", "msg_else"), user("bye")),
    ]


def test_a_way_on_from_an_open_tool_call_that_was_gone_on_from(connect: Callable[..., Client]) -> None:
    """A client that lost an answer asks again, with the same result of its tool."""
    client = connect(responds([called("run", "{}")], [said("done")], [said("done")], [said("end")]))
    one = client.create(input="go")
    client.create(input=[OUTPUT], previous_response_id=one.id)
    expected = client.given()
    again = client.create(input=[OUTPUT], previous_response_id=one.id)
    assert client.given() == expected == [user("go"), called("run", "{}"), OUTPUT]
    assert client.gateway.tool_calls(client.session) == [("run", "done")]
    client.create(input="and", previous_response_id=again.id)
    assert client.given() == [*expected, said("done"), user("and")]
    listed = client.api.responses.input_items.list(again.id, order="asc")
    assert [item.type for item in listed] == ["message", "function_call", "function_call_output"]


def test_a_response_whose_session_is_run_is_gone_on_from_beside_it(connect: Callable[..., Client]) -> None:
    going, go_on = threading.Event(), threading.Event()

    def script(asked: Asked) -> None:
        if asked.document["input"][-1]["content"] == "wait":
            going.set()
            go_on.wait()
        asked.whole(response(asked, [said("hi")]))

    client = connect(script)
    one = client.api.responses.create(model=MODEL, input=[user("hello")])
    client.gateway.ended()
    with client_of(client.gateway) as other:
        ask = {"model": MODEL, "input": [user("wait")], "previous_response_id": one.id}
        running = threading.Thread(target=lambda: other.responses.create(**ask))
        running.start()
        try:
            going.wait()
            beside = client.api.responses.create(model=MODEL, input=[user("go")], previous_response_id=one.id)
            assert client.given() == [user("hello"), said("hi"), user("go")]
        finally:
            go_on.set()
            running.join()
    assert beside.status == "completed"
    client.gateway.ended()
    assert len(client.gateway.sessions()) == 2


def test_another_model_may_go_on(connect: Callable[..., Client]) -> None:
    client = connect(responds([said("hi")], [said("ho")]))
    gateway = client.gateway
    beside = gateway.engine.base_url.replace("127.0.0.1", "localhost")
    register(gateway.service.database, gateway.peer.address, base_url=beside, model="other", rank=1)
    gateway.service.app.state.gateway.fleet.forget()
    one = client.create(input="hello")
    two = client.api.responses.create(model="other", input="and", previous_response_id=one.id)
    assert two.model == "other"
    assert client.given() == [user("hello"), said("hi"), user("and")]


def test_a_failed_request_leaves_all_as_it_was(connect: Callable[..., Client]) -> None:
    failing = [True]

    def script(asked: Asked) -> None:
        if isinstance(asked.document["input"], str):
            asked.whole(response(asked, [called("run", "{}")]))
        elif failing:
            asked.whole({"object": "error", "message": failing.pop() and "busy", "code": 500}, 500)
        else:
            asked.whole(response(asked, [said("done")]))

    client = connect(script)
    one = client.create(input="go")
    with pytest.raises(openai.InternalServerError):
        client.create(input=[OUTPUT], previous_response_id=one.id)
    client.gateway.ended()
    session = client.session
    assert client.gateway.tool_calls(session) == [("run", "claimed")]
    client.create(input=[OUTPUT], previous_response_id=one.id)
    assert client.session == session
    assert client.given() == [user("go"), called("run", "{}"), OUTPUT]
    assert client.gateway.tool_calls(session) == [("run", "done")]


def test_what_the_engine_refuses_stays_its_400(connect: Callable[..., Client]) -> None:
    message = "Unsupported Responses API input item type: 'web_search_call'"
    client = connect(lambda asked: asked.whole({"object": "error", "message": message, "code": 400}, 400))
    with pytest.raises(openai.BadRequestError, match="Unsupported Responses API"):
        client.create(input=[{"type": "web_search_call", "id": "ws_1", "status": "completed"}])


def test_a_named_session_and_a_previous_response(connect: Callable[..., Client]) -> None:
    client = connect(responds(*[[said("hi")]] * 5))

    def ask(name: str, **fields: Any) -> Response:
        return client.create(extra_headers={"X-AgentState-Session": name}, **fields)

    one = ask("mine", input="hello")
    assert client.session == "mine"
    two = ask("mine", input="and", previous_response_id=one.id)
    assert client.session == "mine"
    with pytest.raises(openai.ConflictError) as error:
        ask("mine", input="else", previous_response_id=one.id)
    assert error.value.code == "session_exists"
    ask("fork", input="else", previous_response_id=one.id)
    assert client.session == "fork"
    assert client.given() == [user("hello"), said("hi"), user("else")]
    with pytest.raises(openai.ConflictError):
        ask("fork", input="x", previous_response_id=two.id)
    client.gateway.ended()
    assert {session.expires_at for session in client.gateway.sessions()} == {None}


# --- a whole history with every request


@pytest.mark.parametrize("thoughts", [[], [THOUGHT]])
def test_a_history_that_is_sent_whole_is_kept_once(
    connect: Callable[..., Client], thoughts: list[dict[str, Any]]
) -> None:
    """Clients echo answers with other keys: they are compared by what they say."""
    client = connect(responds(*[[*thoughts, said(f"answer {number}", f"msg_{number}")] for number in range(4)]))
    history: list[dict[str, Any]] = []
    session = ""
    for number in range(4):
        history.append({"role": "user", "content": f"question {number}"})
        made = client.create(input=history, instructions="be brief")
        session = session or client.session
        assert client.session == session
        echo = {"role": "assistant", "content": [{"type": "output_text", "text": made.output_text}], "refusal": None}
        history += [*thoughts, echo]
    assert [kind for _, kind in client.entries(session)] == [item.get("type", "message") for item in history]
    listed = list(client.api.responses.input_items.list(made.id, order="asc"))
    assert (
        [item.content[0].text for item in listed if item.type == "message"]
        == [  # type: ignore[union-attr]
            text for number in range(4) for text in (f"question {number}", f"answer {number}")
        ][:-1]
    )


def test_a_history_of_which_not_all_was_kept_is_kept_anew(connect: Callable[..., Client]) -> None:
    client = connect(responds(*[[said(text, f"msg_{text}")] for text in ("a", "b", "c", "d")]))
    history = [user("1")]
    for text, store in (("a", True), ("b", False)):
        client.create(input=history, store=store)
        history += [{"role": "assistant", "content": text}, user("more")]
    session = client.session
    made = client.create(input=history)
    assert client.session == session
    client.create(input="bye", previous_response_id=made.id)
    said_before = [item.get("content") for item in client.given()[:-2]]
    assert said_before == [item["content"] for item in history]
    assert client.given()[-2:] == [said("c", "msg_c"), user("bye")]


def test_a_compacted_history_is_another_context(connect: Callable[..., Client]) -> None:
    client = connect(responds(*[[said(text * 300, f"msg_{text}")] for text in ("a", "b", "c")]))
    first = [user("1"), *client.create(input=[user("1")]).to_dict()["output"]]  # type: ignore[misc]
    client.create(input=[*first, user("2")])
    session = client.session
    compacted = [user("a summary"), user("2"), said("b" * 300, "msg_b"), user("3")]
    made = client.create(input=compacted)
    assert client.session == session
    listed = client.api.responses.input_items.list(made.id, order="asc", limit=100)
    assert len(list(listed)) == len(compacted)


# --- streams


def test_a_stream_comes_as_it_is_but_for_what_the_engine_does_not_know(connect: Callable[..., Client]) -> None:
    output = [said("北京"), called("run", '{"a": 1}')]
    sent: list[bytes] = []

    def script(asked: Asked) -> None:
        sent[:] = response_events(asked, output)
        asked.start()
        asked.send(*sent)
        asked.end()

    client = connect(script)
    events = client.stream(input="hello")
    first = client.gateway.engine.asked[0].document["request_id"]
    with client.gateway.service.http.stream(
        "POST", "/v1/responses", json={"model": MODEL, "input": "go", "stream": True, "previous_response_id": first}
    ) as answer:
        received = [event + b"\n\n" for event in b"".join(answer.iter_raw()).split(b"\n\n")[:-1]]
    assert len(events) == len(received) == len(sent)
    for theirs, ours in zip(sent, received, strict=True):
        told, known = (json.loads(event.partition(b"data: ")[2]) for event in (ours, theirs))
        if "response" not in known:
            assert ours == theirs
            continue
        assert told["type"] in {"response.created", "response.in_progress", "response.completed"}
        assert (told["response"]["previous_response_id"], told["response"]["store"]) == (first, True)
        assert known["response"]["previous_response_id"] is None
        changed = {"previous_response_id", "conversation", "store"}
        assert all(told["response"][key] == value for key, value in known["response"].items() if key not in changed)
        assert told["sequence_number"] == known["sequence_number"]


def test_events_are_numbered_and_those_of_an_item_have_its_id(connect: Callable[..., Client]) -> None:
    client = connect(responds([said("hi"), called("run", "{}")], [said("well", "msg_2")]))
    events = client.stream(input="hello")
    later = client.stream(input=[OUTPUT], previous_response_id=events[-1].response.id)  # type: ignore[union-attr]
    for stream, ids in ((events, {"msg_1": 0, "fc_1": 1}), (later, {"msg_2": 0})):
        assert [event.sequence_number for event in stream] == list(range(len(stream)))
        at = {(event.item_id, event.output_index) for event in stream if hasattr(event, "item_id")}
        assert at == set(ids.items())
        assert {event.content_index for event in stream if hasattr(event, "content_index")} == {0}
        assert [event.type for event in stream if event.type in TERMINAL] == ["response.completed"]


def test_the_end_of_a_stream_waits_until_the_response_is_kept(connect: Callable[..., Client]) -> None:
    client = connect(responds([said("hi")]))
    with client.api.responses.create(model=MODEL, input="hello", stream=True) as stream:
        for event in stream:
            if event.type == "response.completed":
                assert client.api.responses.retrieve(event.response.id) == event.response
                (session,) = client.gateway.sessions()
                assert session.status == "suspended"


def test_items_that_are_kept_may_be_referred_to(connect: Callable[..., Client]) -> None:
    """With the type and without, in the session that they were said in, and in others."""
    answer, call = said("hi", "msg_1"), called("look", "{}", "call_1", "fc_1")
    client = connect(responds([answer, call], [said("ho", "msg_2")], [said("hu", "msg_3")]))
    client.create(input="hello")
    one = client.session
    client.create(input=[user("hello"), {"id": "msg_1"}, {"type": "item_reference", "id": "fc_1"}, OUTPUT])
    assert client.given() == [user("hello"), answer, call, OUTPUT]
    assert client.session == one
    client.create(input=[user("else"), {"type": "item_reference", "id": "msg_2"}, user("on")])
    assert client.given() == [user("else"), said("ho", "msg_2"), user("on")]
    assert client.session != one


def test_an_item_that_is_not_kept_cannot_be_referred_to(connect: Callable[..., Client]) -> None:
    """Because nobody kept it, because it is gone, or because it is another tenant's."""
    client = connect(responds(*([said("hi", f"msg_{number}")] for number in range(9))))
    client.create(input="hello", store=False)
    conversation = client.api.conversations.create().id
    client.create(input="hello", conversation=conversation)
    client.api.conversations.items.delete("msg_1", conversation_id=conversation)
    keys = {tenant: client.gateway.key(tenant) for tenant in ("acme", "other")}
    client_of(client.gateway, keys["acme"]).responses.create(model=MODEL, input="hello")
    client.gateway.ended()
    other = client_of(client.gateway, keys["other"])
    for item in ("msg_0", "msg_1", "msg_2", "?"):
        with pytest.raises(openai.BadRequestError) as refused:
            other.responses.create(model=MODEL, input=[user("on"), {"type": "item_reference", "id": item}])
        assert code_of(refused) == (400, "item_not_found", "input")
    assert len(client.gateway.engine.asked) == 3


def test_a_response_that_is_not_kept_fails(connect: Callable[..., Client], monkeypatch: pytest.MonkeyPatch) -> None:
    client = connect(responds([said("hi")], [said("hi")], [said("hi")]))

    def keep(*args: Any) -> None:
        raise DatabaseUnreachable("the cable is out")

    with monkeypatch.context() as patched:
        patched.setattr(kept_responses, "keep", keep)
        *_, last = events = client.stream(input="hello")
        with pytest.raises(openai.InternalServerError, match="cable"):
            client.create(input="hello")
    assert [event.type for event in events if event.type in TERMINAL] == ["response.failed"]
    assert last.type == "response.failed"
    assert last.response.error is not None and "cable" in last.response.error.message
    assert [event.sequence_number for event in events] == list(range(len(events)))
    with pytest.raises(openai.NotFoundError):
        client.api.responses.retrieve(last.response.id)
    client.gateway.ended()
    # Nobody holds the session, and it has nothing of what failed.
    for session in client.gateway.sessions():
        assert session.status == "suspended"
        assert client.entries(session.id) == []


@pytest.mark.parametrize("how", ["cut", "end", "cut in an event"])
def test_a_stream_that_breaks_has_one_end_and_it_is_a_failure(connect: Callable[..., Client], how: str) -> None:
    def script(asked: Asked) -> None:
        *events, last = response_events(asked, [said("hi")])
        asked.start()
        asked.send(*events)
        if how == "end":
            asked.end()
            return
        if how == "cut in an event":
            asked.send(last[:-20])
        asked.cut()

    client = connect(script)
    *before, last = client.stream(input="hello")
    assert last.type == "response.failed"
    assert not [event for event in before if event.type in TERMINAL]
    assert [event.sequence_number for event in (*before, last)] == list(range(len(before) + 1))
    assert (last.response.status, last.response.store) == ("failed", True)
    assert last.response.id == client.gateway.engine.asked[0].document["request_id"]
    client.gateway.ended()
    (session,) = client.gateway.sessions()
    assert session.status == "suspended"
    assert client.entries(session.id) == []


@pytest.mark.parametrize("store", [True, False])
def test_what_breaks_behind_the_end_is_no_second_end(connect: Callable[..., Client], store: bool) -> None:
    def script(asked: Asked) -> None:
        asked.start()
        asked.send(*response_events(asked, [said("hi")]))
        asked.cut()

    client = connect(script)
    events = client.stream(input="hello", store=store)
    assert [event.type for event in events if event.type in TERMINAL] == ["response.completed"]


def test_an_engine_that_fails_ends_the_stream_once(connect: Callable[..., Client]) -> None:
    error = {"code": "server_error", "message": "out of memory"}

    def script(asked: Asked) -> None:
        asked.start()
        asked.send(*response_events(asked, [], status="failed", error=error))
        asked.end()

    client = connect(script)
    *_, last = events = client.stream(input="hello")
    assert [event.type for event in events if event.type in TERMINAL] == ["response.failed"]
    assert last.type == "response.failed" and last.response.error is not None
    assert last.response.error.message == "out of memory"


@pytest.mark.parametrize("missing", [("output",), ("usage",), ("output", "usage")])
def test_a_terminal_event_without_output_or_usage_is_completed(
    connect: Callable[..., Client], missing: tuple[str, ...]
) -> None:
    def script(asked: Asked) -> None:
        *events, last = response_events(asked, [said("hi")])
        document = json.loads(last.partition(b"data: ")[2])
        document["response"] = {key: value for key, value in document["response"].items() if key not in missing}
        asked.start()
        asked.send(*events, b"data: " + json.dumps(document).encode() + b"\n\n")
        asked.end()

    client = connect(script)
    *_, last = client.stream(input="hello")
    assert last.type == "response.completed"
    assert last.response.output_text == "hi"
    assert "usage" in last.response.to_dict()
    assert client.api.responses.retrieve(last.response.id).output_text == "hi"


def test_an_answer_that_ends_too_early_is_kept_as_it_is(connect: Callable[..., Client]) -> None:
    client = connect(
        lambda asked: asked.whole(response(asked, [], "incomplete", incomplete_details={"reason": "max_output_tokens"}))
    )
    one = client.create(input="hello")
    assert client.api.responses.retrieve(one.id).status == "incomplete"
    client.create(input="go on", previous_response_id=one.id)
    assert client.given() == [user("hello"), user("go on")]


# --- what the specification asks of a response, and the engine leaves out


ASKED: dict[str, Any] = {
    "frequency_penalty": 0.5,
    "instructions": "be brief",
    "max_output_tokens": 9,
    "max_tool_calls": 2,
    "metadata": {"a": "b"},
    "parallel_tool_calls": False,
    "presence_penalty": 0.25,
    "prompt_cache_key": "a prefix",
    "reasoning": {"effort": "low"},
    "safety_identifier": "somebody",
    "service_tier": "flex",
    "temperature": 0.0,
    "text": {"format": {"type": "json_object"}},
    "tool_choice": "none",
    "tools": [{"type": "function", "name": "run", "parameters": {"type": "object"}, "strict": False}],
    "top_logprobs": 1,
    "top_p": 0.5,
    "truncation": "auto",
}
UNASKED: dict[str, Any] = {
    **dict.fromkeys(ASKED),
    "frequency_penalty": 0.0,
    "metadata": {},
    "parallel_tool_calls": True,
    "presence_penalty": 0.0,
    "service_tier": "default",
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "truncation": "disabled",
}


def silent(asked: Asked) -> None:
    """An engine that answers null for all that a response echoes, or leaves it out."""
    unsaid = dict.fromkeys(ASKED)
    if not asked.document.get("stream"):
        asked.whole(response(asked, [said("hi")], **unsaid))
        return
    asked.start()
    for event in response_events(asked, [said("hi")], **unsaid):
        document = json.loads(event.partition(b"data: ")[2])
        if "response" in document:
            kept = {name: value for name, value in document["response"].items() if name not in ASKED}
            event = b"data: " + json.dumps({**document, "response": kept}).encode() + b"\n\n"
        asked.send(event)
    asked.end()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("fields", "echoed"),
    [(ASKED, ASKED), ({}, UNASKED), ({"service_tier": "auto"}, UNASKED)],
    ids=["all", "nothing", "any tier"],
)
def test_a_response_says_what_it_was_asked(
    connect: Callable[..., Client], fields: dict[str, Any], echoed: dict[str, Any], stream: bool
) -> None:
    client = connect(silent)
    http = client.gateway.service.http
    answer = http.post("/v1/responses", json={"model": MODEL, "input": "hello", "stream": stream, **fields})
    client.gateway.ended()
    if stream:
        events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n") if "data:" in line]
        told = [event["response"] for event in events if "response" in event]
        assert [one["status"] for one in told] == ["in_progress", "in_progress", "completed"]
    else:
        told = [answer.json()]
    for one in told:
        assert {name: one[name] for name in echoed} == echoed
        assert one["background"] is False
        assert (one["completed_at"] is not None) == (one["status"] == "completed")
    assert told[-1]["completed_at"] >= told[-1]["created_at"]
    assert http.get(f"/v1/responses/{told[-1]['id']}").json() == told[-1]


def test_what_the_engine_says_of_itself_is_what_a_response_says(connect: Callable[..., Client]) -> None:
    verbose = {"format": {"type": "text"}, "verbosity": "low"}
    theirs = {"temperature": 0.6, "top_p": 0.9, "tool_choice": "required", "service_tier": "priority"}
    client = connect(lambda asked: asked.whole(response(asked, [said("hi")], text={"verbosity": "low"}, **theirs)))
    told = client.create(input="hello").to_dict()
    assert {**told, **theirs, "text": verbose} == told


def test_a_response_that_was_not_completed_has_no_time_of_that(connect: Callable[..., Client]) -> None:
    def script(asked: Asked) -> None:
        *events, _ = response_events(asked, [said("hi")])
        asked.start()
        if asked.document["input"] == "cut":
            asked.send(*events)
        asked.cut()

    client = connect(script)
    for words in ("cut", "cut before the first event"):
        *_, last = client.stream(input=words)
        assert last.type == "response.failed"
        failed = last.response.to_dict()
        assert {**UNASKED, "completed_at": None, "incomplete_details": None}.items() <= failed.items()


# --- what is there of a response


def test_the_items_that_a_response_was_given(connect: Callable[..., Client]) -> None:
    client = connect(responds([said("hi")], [said("fine", "msg_2")]))
    one = client.create(input=[user(str(number)) for number in range(30)])
    two = client.create(input="more", previous_response_id=one.id)
    page = client.api.responses.input_items.list(one.id)
    assert (len(page.data), page.has_more) == (20, True)
    texts = [item.content[0].text for item in page]  # type: ignore[union-attr]
    assert texts == [str(number) for number in reversed(range(30))]
    page = client.api.responses.input_items.list(two.id, order="asc", limit=100)
    assert [item.content[0].text for item in page][-3:] == ["29", "hi", "more"]  # type: ignore[union-attr]
    assert page.has_more is False
    for wrong in ({"limit": 0}, {"limit": 101}, {"order": "up"}, {"after": "msg_none"}):
        with pytest.raises(openai.BadRequestError):
            client.api.responses.input_items.list(two.id, **wrong)  # type: ignore[arg-type]


def test_a_deleted_response_is_gone_and_its_session_is_not(connect: Callable[..., Client]) -> None:
    client = connect(responds([said("hi")], [said("fine", "msg_2")]))
    one = client.create(input="hello")
    two = client.create(input="and", previous_response_id=one.id)
    answer = client.gateway.service.http.delete(f"/v1/responses/{one.id}").json()
    assert answer == {"id": one.id, "object": "response", "deleted": True}
    with pytest.raises(openai.NotFoundError):
        client.api.responses.retrieve(one.id)
    assert len(list(client.api.responses.input_items.list(two.id))) == 3


# --- what is refused


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "background"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"conversation": "conv_1", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": 3}, "conversation"),
        ({"conversation": {}}, "conversation"),
        ({"previous_response_id": 3}, "previous_response_id"),
        ({"store": "yes"}, "store"),
        ({"input": 3}, None),
    ],
)
def test_what_cannot_be_is_refused_and_says_why(
    connect: Callable[..., Client], fields: dict[str, Any], param: str | None
) -> None:
    client = connect(responds())
    answer = client.gateway.post("/v1/responses", {"model": MODEL, "input": "hello", **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert len(error["message"]) > 20
    assert client.gateway.engine.asked == []


def test_routes_that_are_not_supported_say_so(connect: Callable[..., Client]) -> None:
    client = connect(responds([said("hi")]))
    made = client.create(input="hello").id
    api = client.api.responses
    for ask in (
        lambda: list(api.retrieve(made, stream=True)),
        lambda: api.cancel(made),
        lambda: api.compact(model=MODEL, input="hello"),
        lambda: api.input_tokens.count(model=MODEL, input="hello"),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            ask()
        assert error.value.code == "unsupported"
    http = client.gateway.service.http
    assert http.get("/v1/responses").status_code == 405
    assert http.put(f"/v1/responses/{made}").headers["allow"] == "GET, DELETE"
    assert http.get(f"/v1/responses/{made}/what").json()["error"]["code"] == "not_found"


def test_without_a_database_a_response_is_made_and_not_kept(
    connect: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(responds([said("hi")], [said("hi")]))
    one = client.create(input="hello")

    def begin(*args: Any, **named: Any) -> None:
        raise DatabaseUnreachable("the cable is out")

    monkeypatch.setattr(Sessions, "begin", begin)
    made = client.create(input="hello")
    assert (client.session, made.store, made.output_text) == ("", False, "hi")
    with pytest.raises(openai.InternalServerError) as error:
        client.create(input="and", previous_response_id=one.id)
    assert code_of(error) == (503, "database_unreachable", None)
