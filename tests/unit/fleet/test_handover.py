"""The headers in which a gateway hands over what belongs to a turn."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from agentstate.fleet.handover import NAMES, Handover


def received(handover: Handover) -> dict[str, str]:
    return {name.decode(): value.decode("ascii") for name, value in handover.headers()}


TEXTS = ["acme", "a b", "\u00e9\u4e16\U0001f600", "100%41", 'tab\t, cr\r\n "quoted"; \x00', "+/=&?#", "."]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_any_text_arrives_as_it_was(text: str) -> None:
    for handover in (Handover(text, text, text, text), Handover(salt=text), Handover(extra_key=text)):
        assert Handover.read(received(handover)) == handover


def test_what_is_not_there_has_no_header() -> None:
    handover = Handover(session="ses_1.AQ-_", request_id="chatcmpl-0a")
    assert handover.headers() == [(b"x-agentstate-turn", b"ses_1.AQ-_"), (b"x-agentstate-request", b"chatcmpl-0a")]
    assert {name for name, _ in Handover("s", "s", "s", "s").headers()} == NAMES


def test_a_request_without_these_headers_hands_nothing_over() -> None:
    assert Handover.read({}) is None
    assert Handover.read({"x-agentstate-session": "mine", "cookie": "x-agentstate-salt=a"}) is None


def test_an_engine_would_not_see_a_handover_of_nothing() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Handover()
    for part in ("session", "salt", "extra_key", "request_id"):
        with pytest.raises(ValueError, match="empty"):
            Handover(**{"request_id": "r", part: ""})


@pytest.mark.parametrize("value", ["", "%", "%4", "%zz", "50%", "\xe9", "a b", "one, two", "%ff", "%ED%A0%80", "a\n"])
@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_value_that_nobody_encoded_is_refused(name: bytes, value: str) -> None:
    headers: Mapping[str, str] = {"x-agentstate-request": "r", name.decode(): value}
    with pytest.raises(ValueError, match=f"^the header {name.decode()} is not percent-encoded UTF-8$"):
        Handover.read(headers)


def test_text_that_has_no_encoding_is_not_handed_over() -> None:
    with pytest.raises(ValueError):
        Handover(extra_key="\ud800").headers()


def test_no_log_shows_what_proves_a_turn_or_keeps_its_pages_apart() -> None:
    shown = repr(Handover("ses_1.token", "salt of acme", "key", "r"))
    assert "token" not in shown
    assert "acme" not in shown
