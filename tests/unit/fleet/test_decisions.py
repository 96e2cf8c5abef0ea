"""What a service has read of engines' decisions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from agentstate.errors import EngineUnreachable
from agentstate.fleet.decisions import MAX_ENGINES, MOST, Decisions
from agentstate.fleet.engines import Engine


def rank(engine_id: str = "e") -> Engine:
    return Engine(engine_id, "n", 0, "tcp://h:1", "http://h", "m", "f", "/p")


def said(*ids: int, more: bool = False, **fields: Any) -> dict[str, Any]:
    made = {"session": "s", "decision": "fetch", "outcome": "begun", "tokens": 64, "index": 0.5, "displaced": None}
    return {"decisions": [{"id": number, **made, **fields} for number in ids], "more": more, "missed": False}


class Asked:
    def __init__(self, *answers: dict[str, Any] | Exception):
        self.answers = list(answers)
        self.after: list[int] = []
        self.now_s = 0.0
        self.decisions = Decisions(self.ask, lambda: self.now_s)

    def ask(self, rank: Engine, after: int) -> dict[str, Any]:
        self.after.append(after)
        answer = self.answers.pop(0) if self.answers else said()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def ids(self) -> list[int]:
        known, self.silent = self.decisions.of(rank())
        return [one.id for one in known]


def test_only_what_is_new_is_asked_for_and_not_at_every_question() -> None:
    asked = Asked(said(1, 2, more=True), said(3), said(4))
    assert asked.ids() == [1, 2, 3]
    assert asked.after == [0, 2]
    asked.now_s = 0.4
    assert asked.ids() == [1, 2, 3]
    asked.now_s = 0.6
    assert asked.ids() == [1, 2, 3, 4]
    assert asked.after == [0, 2, 3]


def test_an_engine_that_does_not_answer_is_not_asked_again_at_once() -> None:
    asked = Asked(said(1), EngineUnreachable("of this test"), said(2))
    assert asked.ids() == [1]
    asked.now_s = 1.0
    for _ in range(2):
        assert (asked.ids(), asked.silent, len(asked.after)) == ([1], "of this test", 2)
    asked.now_s = 2.0
    assert (asked.ids(), asked.silent) == ([1, 2], None)


def test_an_engine_that_says_the_same_for_ever_is_not_asked_for_ever() -> None:
    asked = Asked(*[said(1, more=True)] * 9)
    assert asked.ids() == [1]
    assert len(asked.after) == 2


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"decisions": "none"},
        {"decisions": [7]},
        {"decisions": [{"id": 1}]},
        said(-1),
        said(2**60),
        said(1, tokens="many"),
        said(1, index="high"),
    ],
    ids=str,
)
def test_what_is_no_decision_is_refused(answer: dict[str, Any]) -> None:
    asked = Asked(answer)
    assert (asked.ids(), "the engine" in str(asked.silent)) == ([], True)


def test_what_is_kept_is_bounded() -> None:
    asked = Asked(said(*range(1, MOST + 10)))
    assert asked.ids() == list(range(10, MOST + 10))
    told: Callable[[Engine, int], dict[str, Any]] = lambda rank, after: said(1)  # noqa: E731
    decisions = Decisions(told)
    for number in range(MAX_ENGINES + 5):
        decisions.of(rank(f"e{number}"))
    assert len(decisions._engines) == MAX_ENGINES
