"""The token of a turn on its way through SGLang: its processes carry it on, and nothing else sees it."""

from __future__ import annotations

import asyncio
import copy
import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.io_struct import GenerateReqInput
from turns import turn

from agentstate.fleet import turns
from engine_patch import plugin, sglang_api
from engine_patch.turns import RequestSession

KEY = turns.signing_key(b"k" * 32)
SENT = turns.sign(KEY, turn("ses_1"))
TOKEN = SENT.removeprefix("ses_1.")


def test_to_sglang_it_is_the_id() -> None:
    session = RequestSession(SENT)
    assert session == "ses_1"
    assert f"{session} {session!r}" == "ses_1 'ses_1'"
    assert hash(session) == hash("ses_1")
    assert session.token == TOKEN
    assert session.sent == SENT
    assert RequestSession(session) is session
    assert RequestSession("an.agent").token is None
    assert RequestSession("an.agent").sent == "an.agent"


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_has_its_token(again: Any) -> None:
    assert again(RequestSession(SENT)).sent == SENT
    twice = f"ses_1.{TOKEN}.{TOKEN}"
    assert again(RequestSession(twice)).sent == twice


def test_what_arrives_is_taken_apart_before_the_request_is_logged() -> None:
    seen: list[str] = []

    async def original(manager: Any, request: GenerateReqInput, http: Any) -> Any:
        seen.append(repr(request))
        yield request.session_id

    async def ask() -> str:
        request = GenerateReqInput(text="x", session_id=SENT)
        return await anext(plugin._as_requested(original, None, request, None))

    assert asyncio.run(ask()) == "ses_1"
    (shown,) = seen
    assert "session_id='ses_1'" in shown
    assert TOKEN not in shown


def test_every_prompt_of_a_batch_is_of_the_turn() -> None:
    request = GenerateReqInput(text=["x", "y"], session_id=SENT)
    plugin._as_requested(lambda manager, request, http: None, None, request)
    request.normalize_batch_and_arguments()
    for part in (request[0], request[1]):
        tokenized = plugin._as_tokenized(lambda manager, part: SimpleNamespace(session_id=part.session_id), None, part)
        assert type(tokenized.session_id) is str
        assert tokenized.session_id == SENT


@pytest.mark.parametrize("session_id", [None, "ses_1", "an.agent"])
def test_a_request_without_a_token_stays_as_it_is(session_id: str | None) -> None:
    request = GenerateReqInput(text="x", session_id=session_id)
    plugin._as_requested(lambda manager, request, http: None, None, request)
    assert request.session_id == session_id
    tokenized = plugin._as_tokenized(lambda manager, one: SimpleNamespace(session_id=one.session_id), None, request)
    assert tokenized.session_id == session_id


@pytest.mark.parametrize("ours", [True, False])
def test_a_scheduler_of_ours_takes_the_token_out(monkeypatch: pytest.MonkeyPatch, ours: bool) -> None:
    monkeypatch.setattr(plugin, "_ours", lambda scheduler: object() if ours else None)
    request = SimpleNamespace(session_id=SENT)
    found = plugin._as_scheduled(lambda scheduler, request: request.session_id, None, request)
    assert found == ("ses_1" if ours else SENT)
    assert RequestSession(found).sent == SENT


@pytest.mark.parametrize(
    ("named", "chosen", "ranks", "right"),
    [(None, None, 2, None), (1, None, 2, 1), (0, None, 2, 0), (1, 0, 2, 0), (1, None, 1, None)],
)
def test_a_request_goes_to_the_dp_rank_that_its_token_names(
    monkeypatch: pytest.MonkeyPatch, named: int | None, chosen: int | None, ranks: int, right: int | None
) -> None:
    monkeypatch.setattr(sglang_api, "get_parallel", lambda: SimpleNamespace(num_dp_ranks=ranks))
    sent = turns.sign(KEY, replace(turn("ses_1"), dp_rank=named))
    request = GenerateReqInput(text=["x", "y"], session_id=sent, routed_dp_rank=chosen)
    plugin._as_requested(lambda manager, request, http: None, None, request)
    assert request.routed_dp_rank == right
    request.normalize_batch_and_arguments()
    assert [request[0].routed_dp_rank, request[1].routed_dp_rank] == [right, right]
