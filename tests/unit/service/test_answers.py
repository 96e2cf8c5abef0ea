"""Entries in answers: passed on as they are stored, and the same as their model says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agentstate import answers, documents
from agentstate.api.entries import page
from agentstate.api.writes import Answer, entry
from agentstate.sessions.transcript import Entry, EntryPage, NewEntry
from agentstate.sql.models import EntryKind

PAYLOADS: list[dict[str, Any]] = [
    {},
    {"role": "user", "content": "What is in the report?"},
    {"text": "naïve – 你好 \U0001f600"},
    {"name": "half a character: \udcff"},
    {"zero": "\0", "big": 10**40, "small": -0.0, "nested": [{"a": [None, True, 1e300]}]},
]


def made(payload: dict[str, Any], created_us: int = 1_767_605_472_512_000) -> Entry:
    content = NewEntry(EntryKind.MESSAGE, payload).content
    return Entry("ent_1", "é/ü", None, 7, EntryKind.MESSAGE, content, "call é", created_us)


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda payload: ascii(payload)[:30])
@pytest.mark.parametrize("created_us", [0, 1_767_605_472_000_000, 1_767_605_472_512_345])
def test_an_entry_is_shown_as_its_model_says(payload: dict[str, Any], created_us: int) -> None:
    one = made(payload, created_us)
    found = EntryPage([one], has_more=True)
    shown = json.loads(bytes(Answer(page(found), entries=found.entries).response().body))
    assert shown["data"] == [json.loads(documents.dump(entry(one)))]
    assert shown["data"][0]["payload"] == payload == one.payload
    assert answers.EntryList.model_validate(shown).first_id == "ent_1"


def test_what_orjson_cannot_write_is_written_all_the_same() -> None:
    session = answers.Session.model_validate(
        {**answers.Session.model_config["json_schema_extra"]["examples"][0], "metadata": {"big": 10**40, "e": "é"}}  # type: ignore[index,call-overload]
    )
    found = EntryPage([made(PAYLOADS[1])], has_more=False)
    resumed = answers.Resumed(
        session=session,
        lease=answers.Lease(token="t", epoch=1, expires_at=session.created_at),
        entries=page(found),
        pending_tool_calls=[],
        engine=None,
        kv=answers.Outlook(state="unknown", tokens=0, valid=False, invalid_reason=None, prefetch=None),  # type: ignore[arg-type]
    )
    shown = json.loads(bytes(Answer(resumed, entries=found.entries).response().body))
    assert shown["session"]["metadata"] == {"big": 10**40, "e": "é"}
    assert shown["entries"]["data"] == [json.loads(documents.dump(entry(found.entries[0])))]
    assert shown["entries"]["has_more"] is False


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda payload: ascii(payload)[:30])
def test_what_is_stored_has_as_many_bytes_as_characters(payload: dict[str, Any]) -> None:
    content = NewEntry(EntryKind.NOTE, payload).content
    assert content.isascii() and json.loads(content) == payload
