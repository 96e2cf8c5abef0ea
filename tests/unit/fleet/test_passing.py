"""Notes about waits on their way to the worker that keeps them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from agentstate.fleet import passing
from agentstate.fleet.engines import Engine, Phase
from agentstate.fleet.passing import Passed, Passing
from agentstate.fleet.waits import Awaited, Took
from agentstate.lookahead.forecast import Forecast

RANK = Engine(
    *("eng_1", "n1", 0, "tcp://1", "http://127.0.0.1:30000/v1", "m", "f1", "/pages"),
    control_secret="s",
    reads=frozenset({"n2", "n3"}),
    phase=Phase.PREFILL,
)
SOON = Forecast.exactly(5.0)
NOTES: list[tuple[Any, ...]] = [
    ("begun", "t", "s", [Awaited("search", "cd", 2.0, 0.5), Awaited("")], RANK),
    ("expected", "t", "s", Forecast.unpack(SOON.pack()), "person", None),
    ("released", "t", "s", RANK),
    ("over", "s", None),
    ("took", "t", [Took("search", "cd", 3.0, None)]),
    ("begun", "t", "s", [Awaited("search", "cd", 2.0, 0.5)] * 1000, RANK),  # all that one request may append
]


class Heard:
    """Whatever is told of sessions."""

    def __init__(self, wanted: int):
        self.notes: list[tuple[Any, ...]] = []
        self._wanted = wanted
        self.all = threading.Event()

    def __getattr__(self, name: str) -> Any:
        def note(*about: Any) -> None:
            self.notes.append((name, *about))
            if len(self.notes) == self._wanted:
                self.all.set()

        return note


@pytest.fixture
def ends() -> Iterator[tuple[Any, Any]]:
    into, out = passing.pair()
    with closing(into), closing(out):
        yield into, out


def tell(into: Any, notes: list[tuple[Any, ...]]) -> None:
    sender = Passing(into)
    for name, *about in notes:
        getattr(sender, name)(*about)


def test_what_is_told_arrives_as_it_was_and_in_order(ends: tuple[Any, Any]) -> None:
    into, out = ends
    heard = Heard(len(NOTES))
    with closing(Passed(out, heard)):
        tell(into, NOTES)
        assert heard.all.wait(60)
    assert heard.notes == NOTES


def test_what_is_told_while_nobody_hears_waits_for_the_next_one(ends: tuple[Any, Any]) -> None:
    into, out = ends
    Passed(out, Heard(1)).close()
    tell(into, NOTES)
    heard = Heard(len(NOTES))
    with closing(Passed(out, heard)):
        assert heard.all.wait(60)
    assert heard.notes == NOTES


def test_what_is_no_note_or_too_much_is_left_out(ends: tuple[Any, Any]) -> None:
    into, out = ends
    for sent in (b"", b"\xc1", b"\x91\xa4grow", b"\x92\xa4over\xa1s"):
        into.send(sent)
    tell(into, [("released", "t", "x" * (1 << 22), None), ("over", "s", None)])
    heard = Heard(1)
    with closing(Passed(out, heard)):
        assert heard.all.wait(60)
    assert heard.notes == [("over", "s", None)]


def test_nobody_who_tells_waits_for_who_hears(ends: tuple[Any, Any]) -> None:
    into, _ = ends
    tell(into, [("over", "s" * 1000, None)] * 20_000)  # more than the pair holds
    with pytest.raises(BlockingIOError):
        into.send(b"x" * 1000)
