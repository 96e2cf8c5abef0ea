"""OpenAI's Conversations: sessions that a client of OpenAI's makes, reads and goes on with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import openai
import pytest
from engines import Asked, called, responds, response, said
from gateways import Gateway
from openai.types.conversations import Conversation
from stage import MODEL, PATIENCE_S, register

from agentstate.sessions import tenants
from agentstate.sql.models import EntryKind

REASONING = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
CALL = {"type": "function_call", "call_id": "call_1", "name": "run", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "42"}
CUSTOM = {"type": "custom_tool_call", "call_id": "call_2", "name": "patch", "input": "*** Begin"}
CUSTOM_OUTPUT = {"type": "custom_tool_call_output", "call_id": "call_2", "output": "ok"}


def user(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "message", "role": "user", "content": text, **more}


@pytest.fixture
def connect(make_gateway: Callable[..., Gateway]) -> Iterator[Callable[..., tuple[Gateway, openai.OpenAI]]]:
    with ExitStack() as ending:

        def make(*outputs: list[dict[str, Any]], **settings: Any) -> tuple[Gateway, openai.OpenAI]:
            gateway = make_gateway(responds(*outputs), **settings)
            return gateway, ending.enter_context(client_of(gateway))

        yield make


def client_of(gateway: Gateway, key: str = "none") -> openai.OpenAI:
    url = f"{gateway.service.base_url}/v1"
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, _strict_response_validation=True)


def texts(api: openai.OpenAI, conversation: str, **query: Any) -> list[str]:
    """What all messages of a conversation say, read page by page."""
    found = api.conversations.items.list(conversation, **{"order": "asc", **query})
    return [item.content[0].text for item in found if item.type == "message"]  # type: ignore[union-attr]


def given(gateway: Gateway) -> list[Any]:
    """What the engine got last, in short."""
    return [
        item.get("content") or item.get("output") or item["type"] for item in gateway.engine.asked[-1].document["input"]
    ]


# --- conversations


def test_a_conversation_is_made_read_changed_and_deleted(connect: Callable[..., tuple[Gateway, openai.OpenAI]]) -> None:
    gateway, api = connect()
    made = api.conversations.create(metadata={"topic": "a", "user": "u1"}, items=[{"role": "user", "content": "hello"}])
    assert made.id.startswith("conv_")
    assert made.metadata == {"topic": "a", "user": "u1"}
    assert api.conversations.retrieve(made.id) == made
    changed = api.conversations.update(made.id, metadata={"topic": "b"})
    assert changed.metadata == {"topic": "b"}
    assert api.conversations.retrieve(made.id) == changed
    session = gateway.service.client.read(made.id)
    assert (session.model, session.metadata, session.expires_at) == ("", {"topic": "b"}, None)
    gone = api.conversations.delete(made.id)
    assert (gone.id, gone.deleted) == (made.id, True)
    assert gateway.sessions() == []
    for ask in (api.conversations.retrieve, api.conversations.delete, api.conversations.items.list):
        with pytest.raises(openai.NotFoundError) as error:
            ask(made.id)
        assert error.value.code == "conversation_not_found"


def test_a_conversation_without_anything(connect: Callable[..., tuple[Gateway, openai.OpenAI]]) -> None:
    gateway, api = connect()
    made = api.conversations.create()
    page = api.conversations.items.list(made.id)
    assert (page.data, page.has_more) == ([], False)
    answer = gateway.service.http.get(f"/v1/conversations/{made.id}/items").json()
    assert answer == {"object": "list", "data": [], "first_id": "", "last_id": "", "has_more": False}
    bare = gateway.service.http.post("/v1/conversations").json()
    assert Conversation.model_validate(bare).metadata == {}


def test_a_conversation_of_another_tenant_is_not_there(connect: Callable[..., tuple[Gateway, openai.OpenAI]]) -> None:
    gateway, _ = connect()
    with gateway.service.database.write() as connection:
        keys = [tenants.create_key(connection, tenant).secret for tenant in ("one", "two")]
    theirs = client_of(gateway, keys[0]).conversations.create(items=[{"role": "user", "content": "secret"}])
    api = client_of(gateway, keys[1])
    for ask in (
        lambda: api.conversations.retrieve(theirs.id),
        lambda: api.conversations.update(theirs.id, metadata={}),
        lambda: api.conversations.delete(theirs.id),
        lambda: api.conversations.items.list(theirs.id),
        lambda: api.conversations.items.create(theirs.id, items=[{"role": "user", "content": "x"}]),
        lambda: api.responses.create(model=MODEL, input="x", conversation=theirs.id),
    ):
        with pytest.raises(openai.NotFoundError):
            ask()
    assert gateway.engine.asked == []


def test_only_a_conversation_is_one(connect: Callable[..., tuple[Gateway, openai.OpenAI]]) -> None:
    gateway, api = connect()
    gateway.service.client.create_session(MODEL, id="mine")
    for name in ("mine", "conv_none", "conv_\0"):
        with pytest.raises(openai.NotFoundError):
            api.conversations.delete(name)
    assert len(gateway.sessions()) == 1


@pytest.mark.parametrize(
    "body",
    [
        {"metadata": {str(number): "" for number in range(17)}},
        {"metadata": {"a": 1}},
        {"metadata": {"a" * 65: ""}},
        {"metadata": {"a": "b" * 513}},
        {"metadata": []},
        {"items": "hello"},
        {"items": ""},
        {"items": [3]},
        {"items": [{"type": "message", "content": "nobody's"}]},
        {"items": [{"role": "user", "content": "x"}] * 21},
        [],
    ],
)
def test_bodies_that_are_refused(connect: Callable[..., tuple[Gateway, openai.OpenAI]], body: Any) -> None:
    gateway, _ = connect()
    answer = gateway.post("/v1/conversations", body)
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert gateway.sessions() == []


# --- items


def test_items_keep_their_ids_or_get_one(connect: Callable[..., tuple[Gateway, openai.OpenAI]]) -> None:
    gateway, api = connect()
    made = api.conversations.create()
    items: list[Any] = [user("a", id="msg_mine"), user("b"), REASONING, CALL, OUTPUT, CUSTOM, CUSTOM_OUTPUT]
    added = api.conversations.items.create(made.id, items=items, include=["reasoning.encrypted_content"])
    kept = added.data
    assert [item.type for item in kept] == ["message", "message", *(item["type"] for item in items[2:])]
    assert (kept[0].id, kept[2].id) == ("msg_mine", "rs_1")
    assert [str(item.id).split("_")[0] for item in kept] == ["msg", "msg", "rs", "fc", "fco", "ctc", "ctco"]
    assert (added.first_id, added.last_id, added.has_more) == (kept[0].id, kept[-1].id, False)
    assert [api.conversations.items.retrieve(str(item.id), conversation_id=made.id) for item in kept] == kept
    # An id that is there already is another item's.
    again = api.conversations.items.create(made.id, items=[user("c", id="msg_mine"), user("d", id="x" * 300)])  # type: ignore[list-item]
    assert not {"msg_mine", "x" * 300} & {item.id for item in again.data}
    assert api.conversations.items.retrieve("msg_mine", conversation_id=made.id).content[0].text == "a"  # type: ignore[union-attr]
    session = gateway.service.client.read(made.id)
    assert gateway.tool_calls(session.id) in ([], [("run", "done"), ("patch", "done")])
    kinds = [entry.kind for entry in gateway.service.client.entries(made.id).data]
    assert kinds == [
        *(EntryKind.MESSAGE, EntryKind.MESSAGE, EntryKind.NOTE),
        *(EntryKind.TOOL_CALL, EntryKind.TOOL_RESULT) * 2,
        *(EntryKind.MESSAGE, EntryKind.MESSAGE),
    ]


def test_what_does_not_fit_the_tool_calls_is_kept_all_the_same(
    connect: Callable[..., tuple[Gateway, openai.OpenAI]],
) -> None:
    _, api = connect()
    made = api.conversations.create()
    odd: list[Any] = [OUTPUT, CALL, CALL, OUTPUT, OUTPUT, {**CALL, "call_id": ""}, {**CALL, "call_id": "\0"}]
    odd += [{**CALL, "call_id": "call_3", "name": "\0"}, {**OUTPUT, "output": "a\0b"}]
    api.conversations.items.create(made.id, items=odd)
    found = list(api.conversations.items.list(made.id, order="asc"))
    assert [(item.type, item.call_id) for item in found] == [(item["type"], item["call_id"]) for item in odd]  # type: ignore[union-attr]


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("limit", [None, 1, 7, 45, 100])
def test_items_are_listed_page_by_page(
    connect: Callable[..., tuple[Gateway, openai.OpenAI]], order: str, limit: int | None
) -> None:
    gateway, api = connect()
    made = api.conversations.create()
    names = [str(number) for number in range(45)]
    for start in range(0, 45, 15):
        api.conversations.items.create(made.id, items=[user(name) for name in names[start : start + 15]])  # type: ignore[misc]
    query = {"order": order} | ({} if limit is None else {"limit": limit})
    found, after, more, pages = [], None, True, 0
    while more:
        page = gateway.service.http.get(
            f"/v1/conversations/{made.id}/items", params={**query, **({"after": after} if after else {})}
        ).json()
        found += [item["content"][0]["text"] for item in page["data"]]
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        after, more, pages = page["last_id"], page["has_more"], pages + 1
    assert found == (names if order == "asc" else names[::-1])
    assert pages == -(-45 // (limit or 20))
    assert texts(api, made.id, **query) == found


def test_the_newest_come_first_unless_asked_otherwise(connect: Callable[..., tuple[Gateway, openai.OpenAI]]) -> None:
    _, api = connect()
    made = api.conversations.create(items=[{"role": "user", "content": text} for text in "abc"])
    newest = api.conversations.items.list(made.id, limit=1)
    assert newest.data[0].content[0].text == "c"  # type: ignore[union-attr]
    assert newest.has_more is True


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "order=up", "after=msg_none", "after=%00"])
def test_queries_that_are_refused(connect: Callable[..., tuple[Gateway, openai.OpenAI]], query: str) -> None:
    gateway, api = connect()
    made = api.conversations.create()
    assert gateway.service.http.get(f"/v1/conversations/{made.id}/items?{query}").status_code == 400


def test_any_item_can_be_deleted(connect: Callable[..., tuple[Gateway, openai.OpenAI]]) -> None:
    gateway, api = connect([said("hi")])
    made = api.conversations.create(items=[user(text) for text in "abcdef"])  # type: ignore[misc]
    ids = [item.id for item in api.conversations.items.list(made.id, order="asc")]
    for gone in (ids[5], ids[0], ids[2]):
        left = api.conversations.items.delete(str(gone), conversation_id=made.id)
        assert (left.id, left.object) == (made.id, "conversation")
        with pytest.raises(openai.NotFoundError):
            api.conversations.items.retrieve(str(gone), conversation_id=made.id)
        with pytest.raises(openai.NotFoundError):
            api.conversations.items.delete(str(gone), conversation_id=made.id)
    assert texts(api, made.id, limit=1) == texts(api, made.id) == list("bde")
    assert texts(api, made.id, limit=1, order="desc") == list("edb")
    # A page goes on from an item that was deleted in the meantime.
    assert texts(api, made.id, after=ids[2]) == list("de")
    api.responses.create(model=MODEL, input="go", conversation=made.id)
    assert given(gateway) == ["b", "d", "e", "go"]
    # Its id is free again.
    (again,) = api.conversations.items.create(made.id, items=[user("f", id=ids[5])]).data  # type: ignore[list-item]
    assert again.id == ids[5]
    assert api.conversations.items.retrieve(str(ids[5]), conversation_id=made.id) == again


# --- responses in conversations


def test_responses_go_on_with_a_conversation(connect: Callable[..., tuple[Gateway, openai.OpenAI]]) -> None:
    gateway, api = connect([called("run", "{}")], [said("42")], [said("bye", "msg_2")])
    made = api.conversations.create(items=[user("hello")])  # type: ignore[list-item]
    one = api.responses.create(model=MODEL, input="go", conversation=made.id)
    assert one.conversation is not None and one.conversation.id == made.id
    asked = gateway.engine.asked[-1].document
    assert set(asked) == {"model", "input", "store", "request_id"}
    assert given(gateway) == ["hello", "go"]
    answer = api.responses.with_raw_response.create(
        model=MODEL,
        input=[OUTPUT],
        conversation={"id": made.id},  # type: ignore[list-item]
    )
    assert answer.headers["x-agentstate-session"] == made.id
    assert given(gateway) == ["hello", "go", "function_call", "42"]
    *_, last = api.responses.create(model=MODEL, input="thanks", conversation=made.id, stream=True)
    assert last.type == "response.completed"
    assert last.response.conversation is not None and last.response.conversation.id == made.id
    kinds = [item.type for item in api.conversations.items.list(made.id, order="asc")]
    assert kinds == ["message", "message", "function_call", "function_call_output", "message", "message", "message"]
    session = gateway.service.client.read(made.id)
    assert (session.model, session.status, session.expires_at) == (MODEL, "suspended", None)
    assert len(gateway.sessions()) == 1
    # A response of a conversation can be gone on from by itself.
    kept = api.responses.retrieve(one.id)
    assert kept == one


def test_another_model_may_answer_in_a_conversation(connect: Callable[..., tuple[Gateway, openai.OpenAI]]) -> None:
    gateway, api = connect([said("hi")], [said("ho")])
    beside = gateway.engine.base_url.replace("127.0.0.1", "localhost")
    register(gateway.service.database, gateway.peer.address, base_url=beside, model="other", rank=1)
    made = api.conversations.create()
    for model in (MODEL, "other"):
        gateway.service.app.state.gateway.fleet.forget()
        answer = api.responses.create(model=model, input="hello", conversation=made.id)
        assert answer.model == model
        gateway.ended()
        assert gateway.service.client.read(made.id).model == model
    assert given(gateway) == ["hello", said("hi")["content"], "hello"]


def test_a_conversation_in_which_a_response_is_made_is_locked(make_gateway: Callable[..., Gateway]) -> None:
    """As OpenAI answers it: SDKs would retry 409 on their own."""
    going, go_on = threading.Event(), threading.Event()

    def script(asked: Asked) -> None:
        going.set()
        go_on.wait()
        asked.whole(response(asked, [said("hi")]))

    gateway = make_gateway(script)
    api = client_of(gateway)
    made = api.conversations.create()
    ask = {"model": MODEL, "input": "hello", "conversation": made.id}
    with client_of(gateway) as other:
        running = threading.Thread(target=lambda: other.responses.create(**ask))
        running.start()
        try:
            going.wait()
            for refused in (
                lambda: api.responses.create(**ask),  # type: ignore[call-overload]
                lambda: api.conversations.items.create(made.id, items=[{"role": "user", "content": "x"}]),
                lambda: api.conversations.delete(made.id),
            ):
                with pytest.raises(openai.BadRequestError) as error:
                    refused()
                assert (error.value.code, error.value.param) == ("conversation_locked", "conversation")
                assert error.value.response.headers["x-should-retry"] == "false"
            assert texts(api, made.id) == []
        finally:
            go_on.set()
            running.join()
    gateway.ended()
    assert texts(api, made.id) == ["hello", "hi"]


def test_a_locked_conversation_can_be_waited_for(make_gateway: Callable[..., Gateway]) -> None:
    going, go_on = threading.Event(), threading.Event()

    def script(asked: Asked) -> None:
        if len(gateway.engine.asked) == 1:
            going.set()
            go_on.wait()
        asked.whole(response(asked, [said("hi")]))

    gateway = make_gateway(script, gateway_wait_s=PATIENCE_S)
    api = client_of(gateway)
    made = api.conversations.create()
    answers: list[Any] = []
    ask = lambda: answers.append(api.responses.create(model=MODEL, input="hello", conversation=made.id))  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(2)]
    threads[0].start()
    going.wait()
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join()
    assert [answer.status for answer in answers] == ["completed", "completed"]
    assert len(gateway.engine.asked[-1].document["input"]) == 3


@pytest.mark.parametrize("deleted", [False, True])
def test_a_conversation_that_is_not_there(connect: Callable[..., tuple[Gateway, openai.OpenAI]], deleted: bool) -> None:
    gateway, api = connect()
    name = "conv_none"
    if deleted:
        name = api.conversations.create().id
        api.conversations.delete(name)
    with pytest.raises(openai.NotFoundError) as error:
        api.responses.create(model=MODEL, input="hello", conversation=name)
    assert (error.value.code, error.value.param) == ("conversation_not_found", "conversation")
    assert gateway.engine.asked == []
    assert gateway.sessions() == []


def test_a_response_of_a_conversation_that_goes_on_elsewhere_is_a_fork(
    connect: Callable[..., tuple[Gateway, openai.OpenAI]],
) -> None:
    gateway, api = connect([said("one")], [said("two")], [said("else")])
    made = api.conversations.create()
    one = api.responses.create(model=MODEL, input="1", conversation=made.id)
    api.responses.create(model=MODEL, input="2", conversation=made.id)
    api.responses.create(model=MODEL, input="3", previous_response_id=one.id)
    assert len(given(gateway)) == 3
    assert texts(api, made.id) == ["1", "one", "2", "two"]


def test_without_store_a_conversation_stays_as_it_is(connect: Callable[..., tuple[Gateway, openai.OpenAI]]) -> None:
    gateway, api = connect([called("run", "{}")], [said("hi")])
    made = api.conversations.create(items=[user("hello")])  # type: ignore[list-item]
    api.responses.create(model=MODEL, input="x", conversation=made.id, store=False)
    gateway.ended()
    assert texts(api, made.id) == ["hello"]
    api.responses.create(model=MODEL, input="y", conversation=made.id)
    assert given(gateway) == ["hello", "y"]


def test_a_conversation_and_a_session_are_two(connect: Callable[..., tuple[Gateway, openai.OpenAI]]) -> None:
    gateway, api = connect([said("hi")])
    made = api.conversations.create()
    ask = {"model": MODEL, "input": "hello", "conversation": made.id}
    with pytest.raises(openai.BadRequestError, match="not two"):
        api.responses.create(**ask, extra_headers={"X-AgentState-Session": "mine"})  # type: ignore[call-overload]
    api.responses.create(**ask, extra_headers={"X-AgentState-Session": made.id})  # type: ignore[call-overload]
    assert len(gateway.sessions()) == 1


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/v1/conversations", "POST"),
        ("PUT", "/v1/conversations/conv_1", "GET, POST, DELETE"),
        ("DELETE", "/v1/conversations/conv_1/items", "GET, POST"),
        ("POST", "/v1/conversations/conv_1/items/msg_1", "GET, DELETE"),
    ],
)
def test_methods_that_are_none(
    connect: Callable[..., tuple[Gateway, openai.OpenAI]], method: str, path: str, allow: str
) -> None:
    gateway, _ = connect()
    answer = gateway.service.http.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allow)
    assert gateway.service.http.get("/v1/conversations/conv_1/what").status_code == 404
