"""SGLang's `kv_hints`: what `/generate` answers to them, and what the engine does when the request has ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from radix_tree import TREES, Tree, key_of
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.kv_hints import decode_kv_hints_envelope

from agentstate.fleet.turns import Turn, sign
from agentstate.lookahead.forecast import Forecast
from engine_patch import hints, plugin
from engine_patch.flags import BACKEND
from engine_patch.turns import RequestSession


def envelope(*actions: dict[str, Any]) -> dict[str, Any]:
    return {"protocol_version": "0.1", "message_id": "m", "actions": list(actions)}


def action(kind: str, action_id: str = "a", **payload: Any) -> dict[str, Any]:
    return {"action_id": action_id, "action_type": kind, "action_version": "1.0", "payload": payload}


DUE = envelope(action("kv.prefetch", due_ms=5000), action("kv.sing", "b"))


def turn_of(session_id: str) -> RequestSession:
    return RequestSession(sign(b"key", Turn(session_id, 1, "tenant t")))


async def outputs(*given: Any) -> AsyncIterator[Any]:
    for one in given:
        yield one


def answered(kv_hints: Any, *given: Any, carried_out: bool = True) -> list[Any]:
    async def collect() -> list[Any]:
        told = hints.answers(SimpleNamespace(kv_hints=kv_hints), carried_out)
        return [output async for output in hints.answering(outputs(*given), told)]

    return asyncio.run(collect())


def output(**fields: Any) -> dict[str, Any]:
    return {"meta_info": {}, **fields}


def test_every_piece_of_an_answer_says_what_becomes_of_the_hints() -> None:
    found = answered(DUE, output(text="a"), output(text="b"))
    assert [one["meta_info"]["kv_hints"] for one in found] == [{"a": "accepted", "b": "ignored"}] * 2
    assert [one["text"] for one in found] == ["a", "b"]


def test_prompts_that_are_sent_together_have_answers_of_their_own() -> None:
    later = envelope(action("kv.pin", "c", duration=60))
    (whole,) = answered([DUE, later], [output(), output()])
    assert [one["meta_info"]["kv_hints"] for one in whole] == [{"a": "accepted", "b": "ignored"}, {"c": "clipped"}]
    (piece,) = answered([DUE, later], output(index=1))
    assert piece["meta_info"]["kv_hints"] == {"c": "clipped"}
    (both,) = answered(DUE, [output(), output()])
    assert [one["meta_info"]["kv_hints"]["a"] for one in both] == ["accepted", "accepted"]


def test_without_foresight_all_are_ignored() -> None:
    (found,) = answered(DUE, output(), carried_out=False)
    assert found["meta_info"]["kv_hints"] == {"a": "ignored", "b": "ignored"}


@pytest.mark.parametrize("kv_hints", [None, {}, [None], envelope()], ids=["none", "empty", "of a batch", "no action"])
def test_where_there_are_no_hints_nothing_is_said(kv_hints: Any) -> None:
    assert hints.answers(SimpleNamespace(kv_hints=kv_hints), True) == []
    assert hints.answers(SimpleNamespace(), True) == []


def test_what_sglang_has_decoded_is_read_alike() -> None:
    assert hints.of(decode_kv_hints_envelope(DUE)) == hints.of(DUE)
    assert hints.of(DUE).forecast == Forecast.exactly(5.0)
    assert hints.of(object()) == hints.of("nonsense") == hints.of(None)


@pytest.mark.parametrize(("backend", "told"), [(BACKEND, True), (None, False)])
def test_only_our_engines_answer(backend: str | None, told: bool) -> None:
    manager = SimpleNamespace(server_args=SimpleNamespace(radix_cache_backend=backend))
    request = GenerateReqInput(text="x", kv_hints=DUE)

    async def first() -> Any:
        return await anext(plugin._as_requested(lambda *given: outputs(output()), manager, request))

    assert ("kv_hints" in asyncio.run(first())["meta_info"]) is told


def test_who_proves_no_turn_pins_nothing() -> None:
    pin = envelope(action("kv.pin", duration=60))
    session = turn_of("s")
    for sent, answer in ((session, "accepted"), (RequestSession("s"), "clipped"), (None, "clipped")):
        (told,) = hints.answers(SimpleNamespace(kv_hints=pin, session_id=sent), True)
        assert told == {"a": answer}
    (told,) = hints.answers(SimpleNamespace(kv_hints=pin, session_id=session), True, 30.0)
    assert told == {"a": "clipped"}


pytestmark = pytest.mark.usefixtures("parallel")


@pytest.mark.parametrize("session", ["s", ""], ids=["of a session", "of nobody"])
def test_a_pin_is_of_the_session_that_it_came_with(session: str) -> None:
    tree = Tree("python")
    tree.compute(key_of(8), session)
    owner = tree.eviction.ended(session or None, tree.tree_core.match_full_device_prefix(key_of(8))[1])
    tree.foresight.hinted(owner, hints.of(envelope(action("kv.pin", duration=60)), 30.0))
    tree.foresight._fetching.shutdown()
    assert tree.store.pinned == ([("s", 30.0)] if session else [])


@pytest.mark.parametrize("backend", TREES)
@pytest.mark.parametrize("session", ["s", ""], ids=["of a session", "of nobody"])
def test_hints_are_about_the_context_that_they_came_with(backend: str, session: str) -> None:
    tree = Tree(backend)
    tree.compute(key_of(8), session)
    node = tree.tree_core.match_full_device_prefix(key_of(8))[1]
    owner = tree.eviction.ended(session or None, node)
    tree.foresight.hinted(owner, hints.of(DUE))
    known = tree.store.waits.get(owner)
    assert known is not None and (known.forecast, known.kind) == (Forecast.exactly(5.0), "other")
    tree.foresight.hinted(owner, hints.of(envelope()))
    assert tree.store.waits.get(owner) == known
    tree.foresight.hinted(owner, hints.of(envelope(action("kv.deref"))))
    assert tree.store.waits.index(owner) == 0.0
