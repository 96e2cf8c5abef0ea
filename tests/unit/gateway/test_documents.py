from __future__ import annotations

import json

import pytest

from agentstate.api.gateway import documents


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        '{"a": -Infinity}',
        '"\\ud83d"',
        '["\\uDFFF"]',
        "[" * 200_000 + "]" * 200_000,
        "",
        "{",
        b'"\xff"',
        "9" * 5000,
    ],
    ids=["nan", "infinity", "surrogate", "surrogate-in-capitals", "depth", "nothing", "half", "no-utf-8", "digits"],
)
def test_what_is_no_json_that_everybody_reads_is_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        documents.loads(text)
    if isinstance(text, str):
        with pytest.raises(ValueError):
            documents.loads(text.encode())


@pytest.mark.parametrize("value", ["\ud83d", {1: object()}], ids=["surrogate", "object"])
def test_what_json_cannot_say_is_refused(value: object) -> None:
    with pytest.raises(ValueError):
        documents.dumps(value)


def test_a_document_that_is_too_deep_is_refused() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError):
        documents.dumps(deep)
    while deep:  # Else its end would recurse.
        deep = deep.pop()  # type: ignore[assignment]


def test_an_escaped_pair_is_its_character() -> None:
    assert documents.loads(b'"\\ud83c\\udf26 \\\\ud800"') == "🌦 \\ud800"


def test_documents_are_compact_and_in_utf_8() -> None:
    value = {"b": ["Zürich", 1.5, None], "a": True}
    assert documents.dumps(value) == '{"b":["Zürich",1.5,null],"a":true}'.encode()
    assert documents.dumps(value, sort_keys=True) == '{"a":true,"b":["Zürich",1.5,null]}'.encode()
    assert json.loads(documents.dumps(value)) == documents.loads(documents.dumps(value)) == value
