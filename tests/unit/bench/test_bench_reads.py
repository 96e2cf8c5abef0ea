"""The drive of a simulated engine."""

from __future__ import annotations

import pytest

from agentstate.benchmarks.clock import Clock
from agentstate.benchmarks.reads import Read, ReadQueue, Urgency


class Drive:
    """Reads by name, and when each was over."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.queue = ReadQueue(self.clock)
        self.reads: dict[str, Read] = {}
        self.over: list[tuple[str, float]] = []

    def at(self, at_s: float, name: str, seconds: float, urgency: Urgency, rank: float = 0.0) -> None:
        def submit() -> None:
            done = lambda: self.over.append((name, self.clock.now_s))  # noqa: E731
            self.reads[name] = Read(seconds, urgency, done, lambda now_s: rank)
            self.queue.submit(self.reads[name])

        self.clock.at(at_s, submit)

    def run(self) -> list[tuple[str, float]]:
        while self.clock.next_s is not None:
            self.clock.step()
        return self.over


def test_equal_reads_come_one_after_the_other() -> None:
    drive = Drive()
    drive.at(0.0, "first", 2.0, Urgency.REQUEST)
    drive.at(1.0, "second", 3.0, Urgency.REQUEST)
    assert drive.run() == [("first", 2.0), ("second", 5.0)]


def test_a_less_urgent_read_yields_and_goes_on_where_it_was() -> None:
    drive = Drive()
    drive.at(0.0, "planned", 4.0, Urgency.PLANNED)
    drive.at(1.0, "due", 2.0, Urgency.DUE)
    drive.at(2.0, "request", 1.0, Urgency.REQUEST)
    drive.at(2.5, "forward", 1.0, Urgency.FORWARD)
    assert drive.run() == [("forward", 3.5), ("request", 4.0), ("due", 5.0), ("planned", 8.0)]


def test_a_read_does_not_yield_to_one_that_is_as_urgent() -> None:
    drive = Drive()
    drive.at(0.0, "long", 9.0, Urgency.REQUEST, rank=9.0)
    drive.at(1.0, "late", 2.0, Urgency.REQUEST, rank=2.0)
    drive.at(2.0, "short", 1.0, Urgency.REQUEST, rank=1.0)
    assert drive.run() == [("long", 9.0), ("short", 10.0), ("late", 12.0)]


def test_a_promoted_read_goes_before_others() -> None:
    drive = Drive()
    drive.at(0.0, "request", 3.0, Urgency.REQUEST)
    drive.at(0.0, "planned", 2.0, Urgency.PLANNED)
    drive.clock.at(1.0, lambda: drive.queue.promote(drive.reads["planned"], Urgency.FORWARD))
    assert drive.run() == [("planned", 3.0), ("request", 5.0)]


def test_when_a_read_ends_is_known_before() -> None:
    drive = Drive()
    drive.at(0.0, "first", 2.0, Urgency.REQUEST)
    drive.at(0.0, "planned", 5.0, Urgency.PLANNED)
    drive.at(0.0, "second", 3.0, Urgency.REQUEST)
    foreseen: dict[str, tuple[float, float]] = {}

    def look() -> None:
        foreseen.update((name, drive.queue.span_s(read)) for name, read in drive.reads.items())
        assert drive.queue.backlog_s() == pytest.approx(4.0)
        assert drive.queue.running(drive.reads["first"]) and not drive.queue.running(drive.reads["second"])

    drive.clock.at(1.0, look)
    over = dict(drive.run())
    assert foreseen == {"first": (0.0, 2.0), "second": (2.0, 5.0), "planned": (5.0, 10.0)}
    assert {name: end for name, (_, end) in foreseen.items()} == over
    assert drive.queue.span_s(drive.reads["second"]) == (2.0, 5.0)
