"""Which messages are alike."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentstate.api.gateway.heard import call, hear

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def digest(content: Any, role: str = "user", **said: Any) -> bytes:
    return hear(role, content, None, **said).digest


ALIKE = [
    (None, ""),
    ("", []),
    ("a\r\nb", "a\nb"),
    (" a\n", "a"),
    ("ab", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
    ("a", [{"type": "input_text", "text": "a"}]),
    ("a", [{"type": "output_text", "text": "a", "annotations": [], "logprobs": None}]),
    ("a", [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]),
    ("a", [{"type": "thinking", "thinking": "b", "signature": "c"}, {"type": "text", "text": "a"}]),
    ("a", [{"type": "text", "text": "a"}, {"type": "text", "text": None}]),
    ([IMAGE], [{"image_url": IMAGE["image_url"], "type": "image_url", "cache_control": {}, "detail": None}]),
    ("🌦", "\ud83c\udf26"),
]
DIFFERENT = [
    ("a", "b"),
    ("a b", "ab"),
    ("a", [{"type": "text", "text": "a"}, IMAGE]),
    ([IMAGE], [{**IMAGE, "image_url": {"url": "data:image/png;base64,AAAB"}}]),
    ([IMAGE], [IMAGE, IMAGE]),
    ("\ud83c", "\ud83d"),
]


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_contents_that_say_the_same_are_alike(one: Any, other: Any) -> None:
    assert digest(one) == digest(other)
    assert len(digest(one)) == 16


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_contents_that_say_something_else_differ(one: Any, other: Any) -> None:
    assert digest(one) != digest(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ('{"a": 1, "b": [2, {"c": null}]}', '{"b":[2,{"c":null}],"a":1}'),
        ('{"a": 1.0, "b": -0.0}', '{"a":1,"b":0}'),
        ('{"a": 12345678901234567890}', '{"a":12345678901234567000}'),
        ('{"city": "Z\\u00fcrich"}', '{"city":"Zürich"}'),
        ("", "{}"),
        ('{"cut', '"{\\"cut"'),
    ],
    ids=["order", "doubles", "large", "escapes", "none", "no-json"],
)
def test_arguments_are_alike_however_they_are_written(one: str, other: str) -> None:
    said = [digest(None, "assistant", calls=[call("c", "f", arguments)]) for arguments in (one, other)]
    assert said[0] == said[1]


@pytest.mark.parametrize(
    "arguments",
    ['{"a":1', '{"a": 1.5}', '{"a": NaN}', '{"a": "\\ud800"}', '{"a": 1e999}', "[" * 50_000, "9" * 400],
    ids=["half", "fraction", "nan", "surrogate", "infinite", "deep", "long"],
)
def test_arguments_of_any_kind_have_a_digest_of_their_own(arguments: str) -> None:
    said = digest(None, "assistant", calls=[call("c", "f", arguments)])
    assert said == digest(None, "assistant", calls=[call("c", "f", arguments)])
    assert said != digest(None, "assistant", calls=[call("c", "f", '{"a": 1}')])


def test_everything_that_counts_is_in_the_digest() -> None:
    said = [
        digest("a"),
        digest("a", "tool"),
        digest("a", "tool", result_of="c"),
        digest("a", "tool", result_of="d"),
        digest("a", "assistant"),
        digest("a", "assistant", calls=[call("c", "f", "{}")]),
        digest("a", "assistant", calls=[call("d", "f", "{}")]),
        digest("a", "assistant", calls=[call("c", "g", "{}")]),
        digest("a", "assistant", calls=[call("c", "f", '{"a":1}')]),
        digest("a", "assistant", calls=[call("c", "f", "{}"), call("c", "f", "{}")]),
    ]
    assert len(set(said)) == len(said)


def test_no_name_runs_into_the_id_before_it() -> None:
    calls = [[call("a", "nameb", "{}")], [call("aname", "b", "{}")]]
    assert digest("a", "assistant", calls=calls[0]) != digest("a", "assistant", calls=calls[1])


texts = st.text(max_size=8)


@given(st.tuples(texts, texts, texts), st.tuples(texts, texts, texts))
def test_no_field_runs_into_the_next(one: tuple[str, str, str], other: tuple[str, str, str]) -> None:
    said = [digest(None, role, calls=[call(call_id, name, "{}")]) for role, call_id, name in (one, other)]
    assert (said[0] == said[1]) == (one == other)


@pytest.mark.parametrize("content", [1, ["a"], [{"type": "text", "text": 1}], [{"type": 1}], [[]]])
def test_what_is_no_content_is_refused(content: Any) -> None:
    with pytest.raises(ValueError, match="must be"):
        digest(content)


def test_a_message_knows_the_size_of_its_text() -> None:
    assert hear("user", [{"type": "text", "text": " Zürich\r\n🌦 "}, IMAGE], None).size == len("Zürich\n🌦")
