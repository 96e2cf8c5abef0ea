"""``kv_hints``: SGLang's envelope of what a request says about its KV, read as a forecast of the session's wait, and as
how long it is pinned.

::

    {"protocol_version": "0.1", "message_id": "…", "actions": [
        {"action_id": "a1", "action_type": "kv.retain", "action_version": "1.0", "payload": {"duration": 60}}]}

=============== ===================== ===============================================================================
action          payload               means, once the request's turn has ended
=============== ===================== ===============================================================================
``kv.retain``   ``duration``: seconds the next request comes within that time
``kv.pin``      ``duration``: seconds the same, and until then it leaves the device last: it is pinned
``kv.prefetch`` ``due_ms``            the next request comes after that time
``kv.demote``   ``duration``: seconds no request comes for that time, by default an hour
``kv.deref``                          nobody comes back
=============== ===================== ===============================================================================

SGLang defines the envelope and no action; these are named as its proposals name them. A retention may also be the
longest ``duration`` in a list of ``directives``. Hints are about the request's own session, whatever a payload says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from agentstate.lookahead.forecast import BINS, EDGES, LONGEST_S, Forecast

MAX_ACTIONS = 32
# How long a demoted session is taken to stay away if nothing is said.
DEMOTED_S = 3600.0

ACCEPTED, CLIPPED, IGNORED = "accepted", "clipped", "ignored"


@dataclass(frozen=True)
class Hints:
    """What to expect of the session: a ``forecast``, or that nobody comes back (``release``), or nothing. ``answers``
    say by the actions' ids what became of them; of several that could be carried out, the last one is. If that is a
    pin, it is for ``pin_s`` seconds."""

    answers: Mapping[str, str] = field(default_factory=dict)
    forecast: Forecast | None = None
    release: bool = False
    pin_s: float | None = None

    def unpinned(self) -> Hints:
        """The same of a request that has no session to pin: a pin is a retention then."""
        if self.pin_s is None:
            return self
        answers = {name: IGNORED if answer == IGNORED else CLIPPED for name, answer in self.answers.items()}
        return replace(self, answers=answers, pin_s=None)

    def ignored(self) -> Hints:
        """The same where nothing can be carried out."""
        return Hints(dict.fromkeys(self.answers, IGNORED))


def read(envelope: Any, longest_pin_s: float = LONGEST_S) -> Hints:
    """The hints of an envelope, whose pins are cut to so many seconds; none of an empty one, as in SGLang. Raises
    ValueError if it is malformed. An action is ignored that is not known, or whose payload says nothing."""
    if envelope in (None, {}):
        return Hints()
    _check(envelope, "kv_hints", {"protocol_version": str, "message_id": str})
    actions = envelope.get("actions", [])
    if not isinstance(actions, list):
        raise ValueError("the actions of kv_hints are no list")
    if len(actions) > MAX_ACTIONS:
        raise ValueError(f"kv_hints has {len(actions)} actions, {MAX_ACTIONS} are allowed")
    answers: dict[str, str] = {}
    carried_out: str | None = None
    forecast: Forecast | None = None
    pin_s: float | None = None
    for action in actions:
        _check(action, "an action of kv_hints", {"action_id": str, "action_type": str, "action_version": str})
        payload = action.get("payload", {})
        if not isinstance(payload, dict):
            raise ValueError("the payload of an action of kv_hints is no object")
        action_id = action["action_id"]
        answers[action_id] = IGNORED
        found = _read(action, payload)
        if found is not None:
            if carried_out is not None:
                answers[carried_out] = IGNORED
            carried_out = action_id
            answers[action_id], forecast = found
            pin_s = None
            if action["action_type"] == "kv.pin":
                asked_s = _longest(payload) or 0.0
                pin_s = min(asked_s, longest_pin_s)
                answers[action_id] = CLIPPED if pin_s < asked_s else ACCEPTED
    return Hints(answers, forecast, release=carried_out is not None and forecast is None, pin_s=pin_s)


def within(seconds: float) -> Forecast:
    """A wait that ends within so many seconds, at any of them alike."""
    spans = [max(0.0, min(seconds, end) - start) for start, end in zip(EDGES, EDGES[1:], strict=False)]
    return Forecast.from_mass([*spans, *[0.0] * (BINS - len(spans))])


def _read(action: dict[str, Any], payload: dict[str, Any]) -> tuple[str, Forecast | None] | None:
    """The answer to an action and the forecast that it is, None for a release; or None if it cannot be carried out."""
    if action["action_version"].partition(".")[0] not in ("0", "1"):
        return None
    match action["action_type"]:
        case "kv.retain" | "kv.pin":
            seconds = _longest(payload)
            if seconds is None or seconds <= 0:
                return None
            return CLIPPED if seconds > LONGEST_S else ACCEPTED, within(min(seconds, LONGEST_S))
        case "kv.demote":
            seconds = _seconds(payload.get("duration", DEMOTED_S))
            return None if seconds is None else (ACCEPTED, Forecast.exactly(seconds))
        case "kv.prefetch":
            due_ms = _seconds(payload.get("due_ms"))
            return None if due_ms is None else (ACCEPTED, Forecast.exactly(due_ms / 1000))
        case "kv.deref":
            return ACCEPTED, None
    return None


def _longest(payload: dict[str, Any]) -> float | None:
    directives = payload.get("directives")
    given = [payload.get("duration")]
    if isinstance(directives, list):
        given += [directive.get("duration") for directive in directives[:MAX_ACTIONS] if isinstance(directive, dict)]
    return max((seconds for one in given if (seconds := _seconds(one)) is not None), default=None)


def _seconds(value: Any) -> float | None:
    """A number of seconds from 0 on; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        return None
    return float(min(value, 1e12))


def _check(value: Any, what: str, fields: Mapping[str, type]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is no object")
    for name, kind in fields.items():
        if not isinstance(value.get(name), kind):
            raise ValueError(f"{what} has no {name}")
