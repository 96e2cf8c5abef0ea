"""SGLang's `kv_hints`, read as what to expect of a session."""

from __future__ import annotations

from typing import Any

import pytest

from agentstate.fleet import hints
from agentstate.lookahead.forecast import Forecast


def action(kind: str, payload: Any = None, id: str = "a", version: str = "1.0") -> dict[str, Any]:
    return {"action_id": id, "action_type": kind, "action_version": version, "payload": payload or {}}


def envelope(*actions: Any) -> dict[str, Any]:
    return {"protocol_version": "0.1", "message_id": "m", "actions": list(actions)}


@pytest.mark.parametrize(
    ("given", "answer", "median_s"),
    [
        (action("kv.retain", {"duration": 60}), "accepted", 30),
        (action("kv.retain", {"directives": [{"start": 0, "duration": 5}, {"duration": 60.0}]}), "accepted", 30),
        (action("kv.retain", {"duration": 1e9}), "clipped", 43_200),
        (action("kv.pin", {"duration": 60}), "accepted", 30),
        (action("kv.pin", {"duration": 1e9}), "clipped", 43_200),
        (action("kv.prefetch", {"due_ms": 1500}), "accepted", 1.5),
        (action("kv.prefetch", {"due_ms": 0}), "accepted", 0),
        (action("kv.demote"), "accepted", 3600),
        (action("kv.demote", {"duration": 120}), "accepted", 120),
        (action("kv.demote", version="0.3"), "accepted", 3600),
    ],
    ids=str,
)
def test_what_a_hint_expects(given: Any, answer: str, median_s: float) -> None:
    found = hints.read(envelope(given))
    assert found.answers == {"a": answer}
    assert found.forecast is not None and not found.release
    assert found.forecast.rest(0, 0.5) == pytest.approx(median_s, rel=0.1, abs=0.001)


@pytest.mark.parametrize(
    "given",
    [
        action("kv.fetch", {"keys": [1]}),
        action("sing"),
        action("kv.retain"),
        action("kv.retain", {"duration": 0}),
        action("kv.retain", {"duration": "long"}),
        action("kv.retain", {"duration": True}),
        action("kv.retain", {"duration": -1}),
        action("kv.retain", {"duration": float("nan")}),
        action("kv.retain", {"duration": float("inf")}),
        action("kv.retain", {"directives": "all"}),
        action("kv.retain", {"directives": [1, None]}),
        action("kv.prefetch", {"due_ms": None}),
        action("kv.demote", {"duration": "long"}),
        action("kv.retain", {"duration": 60}, version="2.0"),
        action("kv.retain", {"duration": 60}, version=""),
    ],
    ids=str,
)
def test_what_cannot_be_carried_out_is_ignored(given: Any) -> None:
    assert hints.read(envelope(given)) == hints.Hints({"a": "ignored"})


def test_a_pin_lasts_as_long_as_it_may() -> None:
    short, long = envelope(action("kv.pin", {"duration": 60})), envelope(action("kv.pin", {"duration": 600}))
    assert hints.read(short, 100.0).pin_s == 60
    found = hints.read(long, 100.0)
    assert (found.pin_s, found.answers) == (100, {"a": "clipped"})
    assert hints.read(envelope(action("kv.pin", {"duration": 60}), action("kv.deref", id="b"))).pin_s is None
    assert hints.read(envelope(action("kv.retain", {"duration": 60}))).pin_s is None
    assert hints.read(envelope(action("kv.pin"))).pin_s is None
    of_nobody = hints.read(envelope(action("kv.sing", id="b"), action("kv.pin", {"duration": 60}))).unpinned()
    assert (of_nobody.pin_s, of_nobody.answers) == (None, {"b": "ignored", "a": "clipped"})
    assert of_nobody.forecast is not None


def test_a_release_expects_nobody() -> None:
    assert hints.read(envelope(action("kv.deref"))) == hints.Hints({"a": "accepted"}, None, release=True)


def test_the_last_that_can_be_carried_out_is() -> None:
    found = hints.read(
        envelope(
            action("kv.deref", id="1"),
            action("kv.retain", {"duration": 60}, id="2"),
            action("kv.prefetch", {"due_ms": 5000}, id="3"),
            action("sing", id="4"),
        )
    )
    assert found.answers == {"1": "ignored", "2": "ignored", "3": "accepted", "4": "ignored"}
    assert found.forecast == Forecast.exactly(5)
    assert found.ignored() == hints.Hints(dict.fromkeys("1234", "ignored"))


def test_no_envelope_says_nothing() -> None:
    for given in (None, {}, {"protocol_version": "", "message_id": ""}, {**envelope(), "else": 1}):
        assert hints.read(given) == hints.Hints()


@pytest.mark.parametrize(
    "given",
    [
        [],
        "retain",
        {"protocol_version": 1, "message_id": "m"},
        {**envelope(), "actions": {}},
        envelope("retain"),
        envelope(*[action("kv.deref")] * (hints.MAX_ACTIONS + 1)),
        envelope({"action_id": 1, "action_type": "kv.retain", "action_version": "1.0"}),
        envelope({**action("kv.retain"), "payload": [60]}),
    ],
    ids=str,
)
def test_what_is_no_envelope_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="kv_hints"):
        hints.read(given)
