"""The guard decides by its clock, which these tests move, and by what a scripted tier answers."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest

from agentstate.errors import TierMissing, TierRefused, TierUnavailable
from agentstate.tiers import Guard, Page, Policy, Range, Reading, Tier
from agentstate.tiers import clock as clocks
from agentstate.tiers.breaker import Breaker
from agentstate.tiers.clock import SystemClock
from agentstate.tiers.interface import settle
from agentstate.tiers.measured import Measured
from agentstate.tiers.testing.clock import ManualClock
from agentstate.tiers.testing.conformance import content, file_of, name_of

NAME = name_of(b"x")
DOWN, FULL, GONE = TierUnavailable("down"), TierRefused("it is full"), TierMissing("gone")


@dataclass
class Sent:
    """A call that reached the tier, and what a test does with it."""

    what: str
    future: Future[Any]
    ranges: Sequence[Range] = field(default_factory=list)

    def answer(self, byte: int = 7) -> None:
        """As a read that fills its buffers, or as any other call."""
        if isinstance(self.future, Reading):
            for _, into in self.ranges:
                self.future.deliver(into, memoryview(bytes([byte]) * len(into)))
            settle(self.future, None)
        else:
            self.future.set_result(Page([], None) if self.what == "list" else True)

    def fail(self, error: Exception = DOWN) -> None:
        settle(self.future, None, error)


class ScriptedTier(Tier):
    def __init__(self) -> None:
        self.sent: list[Sent] = []
        self.react: Callable[[Sent], None] = lambda sent: None
        self.closed = False

    def _sent(self, what: str, future: Future[Any], ranges: Sequence[Range] = ()) -> Any:
        self.sent.append(Sent(what, future, ranges))
        self.react(self.sent[-1])
        return future

    def mark(self, proposed: str | None = None) -> Future[str | None]:
        return self._sent("mark", Future())  # type: ignore[no-any-return]

    def publish(self, name: str, file: BinaryIO, trailer: bytes = b"") -> Future[bool]:
        os.fstat(file.fileno())  # as one that reads it
        return self._sent("publish", Future())  # type: ignore[no-any-return]

    def read(self, name: str, ranges: Sequence[Range]) -> Reading:
        return self._sent("read", Reading(), ranges)  # type: ignore[no-any-return]

    def drop(self, name: str) -> Future[None]:
        return self._sent("drop", Future())  # type: ignore[no-any-return]

    def list(self, prefix: str = "", after: str | None = None, limit: int = 1000) -> Future[Page]:
        return self._sent("list", Future())  # type: ignore[no-any-return]

    def sweep(self, older_than_s: float) -> Future[int]:
        return self._sent("sweep", Future())  # type: ignore[no-any-return]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def tier() -> ScriptedTier:
    return ScriptedTier()


@pytest.fixture
def guard(tier: ScriptedTier, clock: ManualClock, caplog: pytest.LogCaptureFixture) -> Iterator[Guard]:
    guard = Guard(tier, "the share", Policy(timeout_s=10, slowest_bytes_per_s=1000), clock, chance=lambda: 1.0)
    yield guard
    guard.close()
    # What a callback raises is logged, and nothing else is.
    assert [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR] == []


def read(guard: Guard, n_bytes: int = 100) -> tuple[Reading, bytearray]:
    into = bytearray(n_bytes)
    return guard.read(NAME, [Range(0, memoryview(into))]), into


def fail_open(guard: Guard, tier: ScriptedTier, clock: ManualClock) -> None:
    """Five failures in a row: the breaker opens."""
    tier.react = lambda sent: sent.fail()
    reading, _ = read(guard)
    clock.advance(0.1)
    clock.advance(0.2)
    assert isinstance(reading.exception(0), TierUnavailable)
    reading, _ = read(guard)
    clock.advance(0.1)
    assert isinstance(reading.exception(0), TierUnavailable)
    tier.react = lambda sent: None
    tier.sent.clear()
    assert not guard.available


# Time-outs and second attempts


def test_a_deletion_is_sent_once(guard: Guard, tier: ScriptedTier, clock: ManualClock) -> None:
    """A second one that succeeded would say nothing of the first, which may still arrive."""
    dropped = guard.drop(NAME)
    clock.advance(10)
    assert isinstance(dropped.exception(0), TierUnavailable)
    clock.advance(10)
    assert len(tier.sent) == 1 and clock.waiting() == 0


def test_what_was_answered_is_handed_on_and_no_timer_is_left(
    guard: Guard, tier: ScriptedTier, clock: ManualClock
) -> None:
    reading, into = read(guard)
    assert not reading.done()
    tier.sent[0].answer()
    assert reading.exception(0) is None and into == bytes([7]) * 100
    assert clock.waiting() == 0
    assert guard.counts() == {
        "read": 1, "attempts": 1, "bytes_read": 100, "unavailable": 0, "refused": 0, "missing": 0,
    }  # fmt: skip


def test_a_request_has_a_time_out_that_grows_with_its_bytes(
    guard: Guard, tier: ScriptedTier, clock: ManualClock
) -> None:
    read(guard, 5000)
    clock.advance(14.9)
    assert not tier.sent[0].future.done()
    clock.advance(0.2)
    assert tier.sent[0].future.cancelled()
    assert guard.counts()["timeouts"] == 1


def test_what_is_late_is_sent_again_after_pauses_that_grow_and_three_times_at_most(
    guard: Guard, tier: ScriptedTier, clock: ManualClock
) -> None:
    reading, _ = read(guard, 0)
    for moment_s, sent in ((10.09, 1), (10.11, 2), (20.29, 2), (20.31, 3), (30.29, 3)):
        clock.advance(moment_s - clock.now())
        assert len(tier.sent) == sent and not reading.done()
    clock.advance(0.02)
    with pytest.raises(TierUnavailable, match=r"within 10\.0 s"):
        reading.result(0)
    assert len(tier.sent) == 3 and clock.waiting() <= 1


def test_a_failure_that_another_attempt_cures_is_seen_by_nobody(
    guard: Guard, tier: ScriptedTier, clock: ManualClock
) -> None:
    reading, into = read(guard)
    tier.sent[0].fail()
    clock.advance(0.1)
    tier.sent[1].answer()
    assert reading.exception(0) is None and into == bytes([7]) * 100
    assert (guard.counts()["retries"], guard.available) == (1, True)


@pytest.mark.parametrize("error", [GONE, FULL, OSError(5, "the extent")])
def test_what_another_attempt_does_not_cure_is_told_at_once(
    guard: Guard, tier: ScriptedTier, clock: ManualClock, error: Exception
) -> None:
    reading, _ = read(guard)
    tier.sent[0].fail(error)
    assert reading.exception(0) is error
    assert len(tier.sent) == 1 and clock.waiting() == 0


def test_a_second_attempt_publishes_although_the_caller_has_closed_the_file(
    guard: Guard, tier: ScriptedTier, clock: ManualClock
) -> None:
    with file_of(content(1)) as file:
        publishing = guard.publish(NAME, file)
    tier.sent[0].fail()
    clock.advance(0.1)
    tier.sent[1].answer()
    assert publishing.result(0) is True
    assert guard.counts()["bytes_published"] == 50_000


def test_a_wrong_name_is_refused_at_once_and_counts_against_nobody(
    guard: Guard, tier: ScriptedTier, clock: ManualClock
) -> None:
    def refuse(_: Sent) -> None:
        raise ValueError("no name")

    tier.react = refuse
    for _ in range(9):
        with pytest.raises(ValueError, match="no name"):
            read(guard)
    assert guard.available and clock.waiting() == 0


def test_a_sweep_takes_as_long_as_it_takes(guard: Guard, tier: ScriptedTier, clock: ManualClock) -> None:
    sweeping = guard.sweep(60)
    clock.advance(86_400)
    tier.sent[0].answer()
    assert sweeping.result(0)


# Nothing writes to buffers that somebody has back


def test_cancelling_cancels_what_was_sent_before_it_returns(
    guard: Guard, tier: ScriptedTier, clock: ManualClock
) -> None:
    reading, into = read(guard)
    assert reading.cancel()
    assert tier.sent[0].future.cancelled() and clock.waiting() == 0
    with pytest.raises(CancelledError):
        tier.sent[0].answer()
    assert into == bytes(100)


def test_cancelling_another_call_gives_it_up_too(guard: Guard, tier: ScriptedTier, clock: ManualClock) -> None:
    with file_of(b"x") as file:
        calls = [guard.publish(NAME, file), guard.list(), guard.drop(NAME)]
    assert all(call.cancel() for call in calls)
    assert all(sent.future.cancelled() for sent in tier.sent) and clock.waiting() == 0
    clock.advance(60)
    assert len(tier.sent) == 3 and guard.available


def test_cancelling_in_a_pause_sends_nothing_more(guard: Guard, tier: ScriptedTier, clock: ManualClock) -> None:
    reading, _ = read(guard)
    tier.sent[0].fail()
    reading.cancel()
    clock.advance(60)
    assert len(tier.sent) == 1


def test_an_answer_that_comes_after_the_time_out_writes_nothing(
    guard: Guard, tier: ScriptedTier, clock: ManualClock
) -> None:
    reading, into = read(guard, 0)
    reading, into = read(guard)
    clock.advance(10.1)
    with pytest.raises(CancelledError):
        tier.sent[1].answer(1)
    assert into == bytes(100)


def test_a_copy_that_is_under_way_ends_before_cancelling_does() -> None:
    reading, order = Reading(), []
    began, go_on = threading.Event(), threading.Event()

    class Slow:
        """What a copy takes its lock for."""

        def __enter__(self) -> None:
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            if threading.current_thread() is copying:
                began.set()
                assert go_on.wait(60)
                order.append("copied")
            lock.release()

    lock = threading.Lock()
    reading._copying = Slow()  # type: ignore[assignment]
    into = bytearray(10)
    copying = threading.Thread(target=lambda: reading.deliver(memoryview(into), memoryview(b"x" * 10)))
    cancelling = threading.Thread(target=lambda: (reading.cancel(), order.append("cancelled")))
    copying.start()
    assert began.wait(60)
    cancelling.start()
    go_on.set()
    copying.join()
    cancelling.join()
    assert order == ["copied", "cancelled"]


# Hedges


def measured(guard: Guard, tier: ScriptedTier, clock: ManualClock, times: int = 40) -> None:
    """Reads of 100 bytes that take between 0.9 and 1 s."""
    for number in range(times):
        reading, _ = read(guard)
        clock.advance(1.0 - 0.1 * number / times)
        tier.sent[-1].answer()
        assert reading.done()
    tier.sent.clear()


def test_a_read_that_takes_longer_than_nearly_all_is_sent_twice_and_the_first_answer_counts(
    guard: Guard, tier: ScriptedTier, clock: ManualClock
) -> None:
    measured(guard, tier, clock)
    hedges = guard.counts().get("hedges", 0)
    reading, into = read(guard)
    clock.advance(0.98)
    assert len(tier.sent) == 1
    clock.advance(0.02)
    assert len(tier.sent) == 2
    tier.sent[1].answer(2)
    assert reading.exception(0) is None and into == bytes([2]) * 100
    assert tier.sent[0].future.cancelled()
    assert guard.counts()["hedges"] == hedges + 1 and guard.counts()["hedges_won"] >= 1


def test_the_first_may_still_win_and_a_failed_one_waits_for_the_other(
    guard: Guard, tier: ScriptedTier, clock: ManualClock
) -> None:
    measured(guard, tier, clock)
    reading, into = read(guard)
    clock.advance(1.1)
    tier.sent[1].fail()
    clock.advance(1)
    assert not reading.done() and len(tier.sent) == 2
    tier.sent[0].answer(3)
    assert reading.exception(0) is None and into == bytes([3]) * 100


def test_few_reads_are_sent_twice_however_slow_the_store_becomes(
    guard: Guard, tier: ScriptedTier, clock: ManualClock
) -> None:
    measured(guard, tier, clock)
    before = guard.counts().get("hedges", 0)
    for _ in range(100):
        read(guard)
    clock.advance(5)
    # Five reads in a hundred, and a few that were saved up.
    assert guard.counts()["hedges"] - before <= 9


def test_without_measurements_nothing_is_sent_twice(guard: Guard, tier: ScriptedTier, clock: ManualClock) -> None:
    read(guard, 0)
    clock.advance(9)
    assert len(tier.sent) == 1


# The breaker


def test_after_failures_in_a_row_every_call_ends_at_once_until_a_probe_succeeds(
    guard: Guard, tier: ScriptedTier, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        fail_open(guard, tier, clock)
        with file_of(b"x") as file:
            calls = [read(guard)[0], guard.publish(NAME, file), guard.drop(NAME), guard.list(), guard.sweep(1)]
        assert all(isinstance(call.exception(0), TierUnavailable) for call in calls)
        assert tier.sent == [] and guard.counts()["rejected"] >= 5
        clock.advance(1)
        (probe,) = tier.sent
        assert probe.what == "list" and not guard.available
        # While it is under way, nobody waits for it.
        assert isinstance(read(guard)[0].exception(0), TierUnavailable)
        probe.answer()
        assert guard.available
        reading, into = read(guard)
        tier.sent[-1].answer()
        assert reading.exception(0) is None and into == bytes([7]) * 100
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "the share is not used until that is over",
        "the share is used again",
    ]


def test_probes_come_after_1_2_4_and_at_most_30_seconds_without_any_call(
    guard: Guard, tier: ScriptedTier, clock: ManualClock
) -> None:
    fail_open(guard, tier, clock)
    for wait_s in (1, 2, 4, 8, 16, 30, 30, 30):
        clock.advance(wait_s - 0.01)
        assert tier.sent == []
        clock.advance(0.02)
        (probe,) = tier.sent
        tier.sent.clear()
        probe.fail()
    clock.advance(30)
    tier.sent[-1].answer()
    assert guard.available


def test_it_is_said_once_that_a_store_is_not_used_however_often_it_is_tried(
    guard: Guard, tier: ScriptedTier, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        fail_open(guard, tier, clock)
        tier.react = lambda sent: sent.fail()
        clock.advance(300)
        tier.react = lambda sent: sent.answer()
        clock.advance(30)
    assert guard.available and guard.counts()["probes"] > 5 and guard.counts()["opened"] == 1
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "the share is not used until that is over",
        "the share is used again",
    ]


def test_a_probe_that_hangs_is_a_failure(guard: Guard, tier: ScriptedTier, clock: ManualClock) -> None:
    fail_open(guard, tier, clock)
    clock.advance(1)
    clock.advance(10)
    assert tier.sent[0].future.cancelled() and not guard.available
    clock.advance(2)
    tier.sent[1].answer()
    assert guard.available


def test_a_store_that_answers_probes_alone_is_left_alone_longer_each_time(
    guard: Guard, tier: ScriptedTier, clock: ManualClock
) -> None:
    fail_open(guard, tier, clock)
    for wait_s in (1, 2, 4):
        clock.advance(wait_s)
        tier.sent[-1].answer()
        assert guard.available
        read(guard)
        tier.sent[-1].fail()
        assert not guard.available


def test_a_share_of_failures_opens_it_too(guard: Guard, tier: ScriptedTier, clock: ManualClock) -> None:
    for number in range(20):
        assert guard.available
        tier.react = (lambda sent: sent.fail()) if number % 2 else (lambda sent: sent.answer())
        reading, _ = read(guard)
        reading.cancel()  # no second attempt
    assert not guard.available


def test_what_is_missing_and_what_a_caller_cancelled_are_no_failures(
    guard: Guard, tier: ScriptedTier, clock: ManualClock
) -> None:
    for _ in range(30):
        reading, _ = read(guard)
        tier.sent[-1].fail(GONE)
        reading, _ = read(guard)
        reading.cancel()
    assert guard.available and guard.counts()["missing"] == 30


def test_a_full_store_is_still_read_and_tried_again_after_a_while(
    guard: Guard, tier: ScriptedTier, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    def publish() -> Future[bool]:
        with file_of(b"x") as file:
            return guard.publish(NAME, file)

    with caplog.at_level(logging.WARNING):
        tier.react = lambda sent: sent.fail(FULL)
        for _ in range(10):
            assert str(publish().exception(0)) == "it is full"
        assert len(tier.sent) == 3 and guard.available
        tier.react = lambda sent: sent.answer()
        assert read(guard)[0].exception(0) is None
        assert isinstance(publish().exception(0), TierRefused)
        clock.advance(1)
        assert publish().result(0) is True
        assert publish().result(0) is True
    assert [record.message for record in caplog.records] == [
        "the share is not used for writes until that is over: it is full",
        "the share is used again for writes",
    ]


def test_lost_credentials_stop_reads_and_one_of_the_guards_own_finds_them_again(
    guard: Guard, tier: ScriptedTier, clock: ManualClock
) -> None:
    tier.react = lambda sent: sent.fail(TierRefused("no credentials"))
    for _ in range(5):
        assert str(read(guard)[0].exception(0)) == "no credentials"
    assert len(tier.sent) == 3 and not guard.available
    # Nobody looks for anything there meanwhile, and who may list may not be allowed to read.
    clock.advance(1)
    clock.advance(2)
    assert [sent.what for sent in tier.sent[3:]] == ["read", "read"] and not guard.available
    tier.react = lambda sent: sent.answer()
    clock.advance(4)
    assert guard.available and len(tier.sent) == 6
    assert guard.counts()["probes"] == 3 and clock.waiting() == 0
    assert read(guard)[0].exception(0) is None


def test_what_is_missing_by_now_may_be_read(guard: Guard, tier: ScriptedTier, clock: ManualClock) -> None:
    tier.react = lambda sent: sent.fail(TierRefused("no credentials"))
    for _ in range(3):
        read(guard)
    tier.react = lambda sent: sent.fail(GONE)
    clock.advance(1)
    assert guard.available


def test_refused_listings_alone_are_found_out_about_by_a_listing(
    guard: Guard, tier: ScriptedTier, clock: ManualClock
) -> None:
    tier.react = lambda sent: sent.fail(TierRefused("no credentials"))
    for _ in range(3):
        guard.list()
    assert not guard.available
    tier.react = lambda sent: sent.answer()
    clock.advance(1)
    assert tier.sent[-1].what == "list" and guard.available


# What is measured because nobody reads


def slow_reads(guard: Guard, tier: ScriptedTier, clock: ManualClock, seconds: float) -> None:
    for _ in range(10):
        read(guard, 2_000_000)
        clock.advance(seconds)
        tier.sent[0].answer()
        tier.sent.clear()


def test_a_store_that_was_slow_is_read_again_for_who_wants_to_know(
    guard: Guard, tier: ScriptedTier, clock: ManualClock
) -> None:
    guard.measure()  # nothing is known that could be read
    slow_reads(guard, tier, clock, 1)
    slow = guard.figures().bytes_per_s
    assert slow == pytest.approx(2e6, rel=0.1)
    guard.measure()
    assert tier.sent == []  # somebody has just read
    for _ in range(2):
        clock.advance(10)
        guard.measure()
        guard.measure()
        (sent,) = tier.sent
        assert sent.what == "read" and [len(into) for _, into in sent.ranges] == [2_000_000]
        clock.advance(0.01)
        tier.sent.pop().answer()
    fast = guard.figures().bytes_per_s
    assert fast is not None and fast > 20 * 2e6
    assert guard.counts()["measures"] == 2


def test_nothing_is_measured_while_nothing_is_sent(guard: Guard, tier: ScriptedTier, clock: ManualClock) -> None:
    slow_reads(guard, tier, clock, 1)
    fail_open(guard, tier, clock)
    clock._now_s += 100
    guard.measure()
    assert tier.sent == []


def test_what_was_measured_before_the_store_was_out_of_use_says_nothing_after_it(
    guard: Guard, tier: ScriptedTier, clock: ManualClock
) -> None:
    slow_reads(guard, tier, clock, 1)
    fail_open(guard, tier, clock)
    assert guard.figures().bytes_per_s is not None
    clock.advance(1)
    tier.sent[-1].answer()
    assert guard.available and guard.figures() == (None, None)


def test_a_cancelled_probe_says_nothing_and_another_one_comes(
    guard: Guard, tier: ScriptedTier, clock: ManualClock
) -> None:
    fail_open(guard, tier, clock)
    clock._now_s += 1  # due, before its own probe
    reading, _ = read(guard)
    assert len(tier.sent) == 1
    reading.cancel()
    assert not guard.available
    clock.advance(1)
    assert [sent.what for sent in tier.sent] == ["read", "list"]
    tier.sent[1].answer()
    assert guard.available


def test_close_ends_what_has_not_ended_and_nothing_is_sent_again(
    guard: Guard, tier: ScriptedTier, clock: ManualClock
) -> None:
    reading, into = read(guard)
    others = [guard.drop(NAME), guard.list(), guard.sweep(60)]
    fails = read(guard)[0]
    tier.sent[-1].fail()
    sent = len(tier.sent)
    guard.close()
    for future in (reading, *others, fails):
        assert isinstance(future.exception(0), TierUnavailable)
    assert isinstance(guard.drop(NAME).exception(0), TierUnavailable)
    clock.advance(100)
    assert len(tier.sent) == sent and clock.waiting() == 0
    # Nobody writes to the buffers of who was told that it is over.
    with pytest.raises(CancelledError):
        tier.sent[0].answer()
    assert into == bytes(100)


def test_a_guard_that_is_closed_sends_nothing_more(guard: Guard, tier: ScriptedTier, clock: ManualClock) -> None:
    reading, _ = read(guard)
    guard.close()
    tier.sent[0].fail()
    clock.advance(100)
    assert isinstance(reading.exception(0), TierUnavailable) and len(tier.sent) == 1 and tier.closed


class TestBreaker:
    def test_an_answer_of_an_earlier_time_changes_nothing(self) -> None:
        now = [0.0]
        breaker = Breaker(lambda: now[0], in_row=2)
        old = breaker.admit()
        assert old is not None
        for _ in range(2):
            ticket = breaker.admit()
            assert ticket is not None
            breaker.ended(ticket, False)
        assert breaker.admit() is None and breaker.wait_s == 1
        assert breaker.ended(old, True) is None and not breaker.closed
        now[0] = 1
        probe = breaker.admit()
        assert probe is not None and breaker.admit() is None
        assert breaker.ended(old, False) is None
        assert breaker.ended(probe, True) == "closed"

    def test_a_success_ends_a_row(self) -> None:
        breaker = Breaker(lambda: 0.0, in_row=2)
        for ok in (False, True, False, True):
            ticket = breaker.admit()
            assert ticket is not None
            assert breaker.ended(ticket, ok) is None
        assert breaker.closed


class TestMeasured:
    def test_latency_is_that_of_small_requests_and_the_rate_that_of_all_in_flight(self) -> None:
        measured, now = Measured(), 0.0
        assert measured.figures() == (None, None)
        for _ in range(20):
            # One small, and two large ones at once.
            measured.began(now, 100)
            measured.ended(now, now + 0.01, 100)
            now += 0.01
            for _ in range(2):
                measured.began(now, 1_000_000)
            for _ in range(2):
                measured.ended(now, now + 1, 1_000_000)
            now += 1
            now += 5  # nothing in flight
        latency_s, bytes_per_s = measured.figures()
        assert latency_s == pytest.approx(0.01)
        assert bytes_per_s == pytest.approx(2_000_000, rel=0.02)

    def test_a_store_that_becomes_slow_is_soon_known_to_be(self) -> None:
        measured, now = Measured(), 0.0
        for seconds in [0.1] * 50 + [10.0] * 6:
            measured.began(now, 1_000_000)
            measured.ended(now, now + seconds, 1_000_000)
            now += seconds
        rate = measured.figures().bytes_per_s
        assert rate is not None and rate < 200_000

    def test_a_store_that_was_slow_and_is_not_any_more_is_soon_known_to_be_fast(self) -> None:
        measured, now = Measured(), 0.0
        # 16 MB in 8 s again and again, and then, after a minute, in 0.02 s.
        for seconds in [8.0] * 20 + [0.02] * 2:
            for n_bytes, part in ((1000, seconds / 100), (16_000_000, seconds)):
                measured.began(now, n_bytes)
                measured.ended(now, now + part, n_bytes)
                now += part
            now += 60
        latency_s, bytes_per_s = measured.figures()
        assert bytes_per_s is not None and bytes_per_s > 400e6

    def test_small_requests_tell_nothing_of_the_rate(self) -> None:
        measured, now = Measured(), 0.0
        for n_bytes, seconds, times in ((8_000_000, 0.01, 20), (64_000, 0.01, 1000)):
            for _ in range(times):
                measured.began(now, n_bytes)
                now += seconds
                measured.ended(now - seconds, now, n_bytes)
        assert measured.figures().bytes_per_s == pytest.approx(800e6, rel=0.01)

    def test_latency_is_that_of_the_last_minute(self) -> None:
        measured, now = Measured(), 0.0
        for seconds, times in ((1.0, 200), (0.01, 12)):
            for _ in range(times):
                measured.began(now, 100)
                measured.ended(now, now + seconds, 100)
                now += 4 + seconds
        assert measured.figures().latency_s == pytest.approx(0.01)

    def test_a_read_straggles_by_what_reads_of_its_size_take(self) -> None:
        measured = Measured()
        assert measured.straggles_after_s(1000, 0.95) is None
        for number in range(100):
            for size, seconds in ((1_000, 0.01), (1_000_000, 1.0)):
                measured.began(0, size)
                measured.ended(0, seconds * (1 + number / 100), size)
        assert measured.straggles_after_s(1_000, 0.5) == pytest.approx(0.015, rel=0.2)
        assert measured.straggles_after_s(1_000_000, 0.95) == pytest.approx(1.95, rel=0.05)


def test_timers_of_the_system_clock_are_done_in_their_order_and_cancelled_ones_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, done, over = [0.0], list[int](), threading.Event()
    monkeypatch.setattr(clocks, "time", SimpleNamespace(monotonic=lambda: now[0]))
    clock = SystemClock()
    clock.after(20, lambda: (done.append(2), over.set()))
    clock.after(10, lambda: done.append(1))
    clock.after(15, lambda: done.append(3)).cancel()
    clock.after(5, lambda: 1 / 0)
    now[0] = 100
    # The first of all: it wakes the thread.
    clock.after(-99, lambda: done.append(0))
    assert over.wait(60)
    assert done == [0, 1, 2]
    clock.after(3600, lambda: done.append(4))
    clock.close()
    assert done == [0, 1, 2]
