"""What stands between a tier that may fail and everybody who uses it: `Guard`.

A store that hangs, fails, or is slow must cost a request little and another one nothing. So every request has a
time-out; what may be tried again is, after a pause of random length; a read that takes longer than nearly all do is
asked for a second time; and after several failures nothing is asked for until the store answers again.
"""

from __future__ import annotations

import logging
import math
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, Literal, TypeVar

from agentstate.errors import TierError, TierMissing, TierRefused, TierUnavailable
from agentstate.tiers.breaker import Breaker, Change
from agentstate.tiers.clock import Clock, SystemClock, Timer
from agentstate.tiers.interface import Page, Range, Reading, Tier, settle
from agentstate.tiers.measured import Figures, Measured

_log = logging.getLogger(__name__)

Side = Literal["read", "write"]
Outer = TypeVar("Outer", "_Outer", "_OuterReading")


@dataclass(frozen=True)
class Policy:
    """Times are seconds. A request may take ``timeout_s``, and longer for its bytes at ``slowest_bytes_per_s``. It is
    sent ``attempts`` times at most. The pause before the next is random, up to ``backoff_s``, then twice that, and so
    on up to ``most_backoff_s``. A read is sent a second time when it has taken longer than ``hedge_quantile`` of the
    recent ones like it, and than ``least_hedge_s``; of all reads, at most the share ``hedge_share`` is. The rest is the
    breaker's."""

    timeout_s: float = 10.0
    slowest_bytes_per_s: float = 10e6
    attempts: int = 3
    backoff_s: float = 0.1
    most_backoff_s: float = 2.0
    hedge_quantile: float = 0.95
    hedge_share: float = 0.05
    least_hedge_s: float = 0.02
    failures_in_row: int = 5
    failure_share: float = 0.5
    failures_of: int = 20
    refusals_in_row: int = 3
    first_wait_s: float = 1.0
    most_wait_s: float = 30.0


# Second reads that may be sent at once, after a time without any.
_HEDGES = 4.0
_READS = ("read", "measures")
# How often a store is read only to measure it, and how much of it: at most, and if possible.
_MEASURE_S = 10.0
_MEASURE_BYTES, _LARGE_BYTES = 8 << 20, 1 << 20


class Guard(Tier):
    """``tier``, called ``where`` in messages, with `Policy`. Its promises hold, those of a read's buffers too.

    While the store does not answer, every call ends at once with TierUnavailable, and the guard itself asks for the
    beginning of a listing after each wait, so that the store is back in use without anybody's request as a probe. While
    it refuses reads, or writes, those end at once with TierRefused, and one call after each wait finds out whether it
    still does: of reads, which nobody may want meanwhile, one of the guard's own. Either is logged when it begins and
    when it ends.
    """

    def __init__(
        self,
        tier: Tier,
        where: str = "the shared store",
        policy: Policy | None = None,
        clock: Clock | None = None,
        chance: Callable[[], float] = random.random,
    ):
        self._tier = tier
        self._where = where
        self._policy = policy or Policy()
        self._clock = clock or SystemClock()
        self._chance = chance
        self._mutex = threading.Lock()
        breaker = partial(
            Breaker, self._clock.now, first_wait_s=self._policy.first_wait_s, most_wait_s=self._policy.most_wait_s
        )
        self._reach = breaker(
            in_row=self._policy.failures_in_row, share=self._policy.failure_share, of=self._policy.failures_of
        )
        refusals = self._policy.refusals_in_row
        self._sides: Mapping[Side, Breaker] = {"read": breaker(in_row=refusals), "write": breaker(in_row=refusals)}
        self._refusals: dict[Side, str] = {}
        self._measured = Measured()
        self._counts: Counter[str] = Counter()
        self._hedges = _HEDGES
        self._next_probe: Timer | None = None
        # What is read to find out something: the extent that was read last, and where in it.
        self._known: tuple[str, Sequence[tuple[int, int]]] | None = None
        self._read_s = -math.inf
        self._under_way: set[_Call] = set()
        self._closed = False

    def mark(self, proposed: str | None = None) -> Future[str | None]:
        side: Side = "read" if proposed is None else "write"
        return self._call("mark", side, lambda: self._tier.mark(proposed), _Outer())

    def publish(self, name: str, file: BinaryIO, trailer: bytes = b"") -> Future[bool]:
        n_bytes = os.fstat(file.fileno()).st_size + len(trailer)
        # Of its own: a second attempt may come after the caller has closed the file.
        own = os.fdopen(os.dup(file.fileno()), "rb")
        outer = _Outer()
        outer.add_done_callback(lambda _: own.close())
        return self._call("publish", "write", lambda: self._tier.publish(name, own, trailer), outer, n_bytes)

    def read(self, name: str, ranges: Sequence[Range]) -> Reading:
        outer = _OuterReading()
        n_bytes = sum(len(into) for _, into in ranges)
        self._call("read", "read", lambda: self._tier.read(name, ranges), outer, n_bytes)
        if n_bytes >= _LARGE_BYTES or (n_bytes and self._known is None):
            self._known = name, [(offset, len(into)) for offset, into in ranges]
        return outer

    def drop(self, name: str) -> Future[None]:
        """It is sent once: were it sent again, the second answer would say nothing of the first request, which may
        arrive when the name has been published again."""
        return self._call("drop", "write", lambda: self._tier.drop(name), _Outer(), attempts=1)

    def list(self, prefix: str = "", after: str | None = None, limit: int = 1000) -> Future[Page]:
        return self._call("list", "read", lambda: self._tier.list(prefix, after, limit), _Outer())

    def sweep(self, older_than_s: float) -> Future[int]:
        """It has no time-out: it looks at everything that is there."""
        return self._call("sweep", "write", lambda: self._tier.sweep(older_than_s), _Outer(), timed=False)

    def close(self) -> None:
        """Calls that have not ended do so at once, with TierUnavailable: nobody waits for a store that hangs."""
        with self._mutex:
            self._closed = True
            under_way = list(self._under_way)
        for call in under_way:
            call.break_off(TierUnavailable(f"{self._where} is not used any more"))
        self._clock.close()
        self._tier.close()

    @property
    def available(self) -> bool:
        """Whether reads are sent at all: look-ups leave out what lies here while they are not."""
        with self._mutex:
            return self._reach.closed and self._sides["read"].closed

    def figures(self) -> Figures:
        """What recent reads took: for break-even. After the store was out of use, nothing is known of it."""
        return self._measured.figures()

    def measure(self) -> None:
        """Have `figures` be of now, although nobody reads because of them: unless somebody has just read, read again
        what was read last, 8 MiB at most. Does not wait."""
        with self._mutex:
            known, now_s = self._known, self._clock.now()
            if known is None or now_s - self._read_s < _MEASURE_S or self._shut() is not None:
                return
            self._read_s = now_s
        left, ranges = _MEASURE_BYTES, []
        for offset, length in known[1]:
            ranges.append(Range(offset, memoryview(bytearray(min(length, left)))))
            left -= len(ranges[-1].into)
        self._call(
            "measures", "read", lambda: self._tier.read(known[0], ranges), _OuterReading(), _MEASURE_BYTES - left,
            attempts=1,
        )  # fmt: skip

    def counts(self) -> dict[str, int]:
        """Since it was opened: calls of each kind, and its own, ``probes`` and ``measures``; ``attempts``, ``retries``,
        ``timeouts``, ``hedges``, ``hedges_won``; ``unavailable``, ``refused`` and ``missing`` answers; ``rejected``
        calls, which were not sent; how often it ``opened``; ``bytes_read`` and ``bytes_published``."""
        with self._mutex:
            return dict(self._counts)

    def _call(
        self,
        what: str,
        side: Side,
        send: Callable[[], Future[Any]],
        outer: Outer,
        n_bytes: int = 0,
        *,
        attempts: int | None = None,
        timed: bool = True,
    ) -> Outer:
        with self._mutex:
            self._counts[what] += 1
        call = _Call(self, what, side, send, outer, n_bytes, attempts or self._policy.attempts, timed)
        outer.call = call
        with self._mutex:
            self._under_way.add(call)
        outer.add_done_callback(lambda _: self._over(call))
        call.send()
        return outer

    def _over(self, call: _Call) -> None:
        with self._mutex:
            self._under_way.discard(call)

    # What calls ask and tell

    def _admit(self, side: Side) -> tuple[int, int]:
        """Tickets of both breakers. Raises TierError."""
        with self._mutex:
            if self._closed:
                raise TierUnavailable(f"{self._where} is not used any more")
            reach = self._reach.admit()
            if reach is None:
                self._counts["rejected"] += 1
                raise TierUnavailable(f"{self._where} did not answer: it is tried again in {self._reach.wait_s:.0f} s")
            of_side = self._sides[side].admit()
            if of_side is None:
                self._reach.ended(reach, None)
                self._counts["rejected"] += 1
                raise TierRefused(self._refusals[side])
            self._counts["attempts"] += 1
            return reach, of_side

    def _ended(self, side: Side, tickets: tuple[int, int], error: BaseException | None, *, cancelled: bool) -> None:
        reach: bool | None = not isinstance(error, TierUnavailable)
        of_side = None if isinstance(error, TierUnavailable) else not isinstance(error, TierRefused)
        if cancelled or (error is not None and not isinstance(error, TierError)):
            reach = of_side = None
        with self._mutex:
            for kind, word in ((TierUnavailable, "unavailable"), (TierRefused, "refused"), (TierMissing, "missing")):
                self._counts[word] += isinstance(error, kind)
            if isinstance(error, TierRefused):
                self._refusals[side] = str(error)
            if (change := self._reach.ended(tickets[0], reach)) == "closed":
                self._measured.forget()
            self._changed(change, error, "")
            self._changed(self._sides[side].ended(tickets[1], of_side), error, f" for {side}s")
            self._probe_later()

    def _changed(self, change: Change, error: BaseException | None, what: str) -> None:
        if change == "opened":
            self._counts["opened"] += 1
            _log.warning("%s is not used%s until that is over: %s", self._where, what, error)
        elif change == "closed":
            _log.warning("%s is used again%s", self._where, what)

    def _shut(self) -> Breaker | None:
        """The breaker that keeps everybody from reading."""
        return next((one for one in (self._reach, self._sides["read"]) if not one.closed), None)

    def _probe_later(self) -> None:
        if self._next_probe is None and (shut := self._shut()) is not None and not self._closed:
            self._next_probe = self._clock.after(shut.wait_s or self._policy.first_wait_s, self._probe)

    def _probe(self) -> None:
        with self._mutex:
            self._next_probe = None
            if self._closed or (shut := self._shut()) is None:
                return
            if shut.wait_s:
                self._probe_later()
                return
            known = None if shut is self._reach else self._known
        if known is None:
            self._call("probes", "read", lambda: self._tier.list("", None, 1), _Outer(), attempts=1)
            return
        # Who may list may not be allowed to read.
        ranges = [Range(known[1][0][0], memoryview(bytearray(1)))]
        self._call("probes", "read", lambda: self._tier.read(known[0], ranges), _OuterReading(), attempts=1)

    def _began(self, what: str, n_bytes: int) -> float:
        now_s = self._clock.now()
        if what in _READS:
            self._read_s = now_s
            self._measured.began(now_s, n_bytes)
        return now_s

    def _took(self, what: str, began_s: float, n_bytes: int, ok: bool) -> None:
        now_s = self._clock.now()
        if what in _READS:
            if ok:
                self._measured.ended(began_s, now_s, n_bytes)
            else:
                self._measured.failed(now_s, n_bytes)
        if ok and what in ("read", "publish"):
            self._count("bytes_read" if what == "read" else "bytes_published", n_bytes)

    def _hedge_after_s(self, n_bytes: int) -> float | None:
        with self._mutex:
            self._hedges = min(_HEDGES, self._hedges + self._policy.hedge_share)
        late_s = self._measured.straggles_after_s(n_bytes, self._policy.hedge_quantile)
        return None if late_s is None else max(late_s, self._policy.least_hedge_s)

    def _may_hedge(self) -> bool:
        with self._mutex:
            if self._hedges < 1 or not self._reach.closed:
                return False
            self._hedges -= 1
            self._counts["hedges"] += 1
            return True

    def _may_retry(self) -> bool:
        """No pause helps while nothing is sent."""
        with self._mutex:
            return self._reach.closed and not self._closed

    def _count(self, word: str, n: int = 1) -> None:
        with self._mutex:
            self._counts[word] += n


class _Outer(Future[Any]):
    """What a caller waits for. Cancelling it cancels what was sent, before anybody learns of it."""

    call: _Call | None = None

    def cancel(self) -> bool:
        if self.call is not None:
            self.call.give_up()
        return super().cancel()


class _OuterReading(Reading):
    call: _Call | None = None

    def cancel(self) -> bool:
        if self.call is not None:
            self.call.give_up()
        return super().cancel()


class _Attempt:
    """A request that was sent: its future, and when it is too late."""

    __slots__ = ("began_s", "future", "hedge", "over", "tickets", "timer")

    def __init__(self, tickets: tuple[int, int], began_s: float, *, hedge: bool):
        self.tickets = tickets
        self.began_s = began_s
        self.hedge = hedge
        self.future: Future[Any] | None = None
        self.timer: Timer | None = None
        self.over = False


class _Call:
    """One call of a guard's: what was sent for it, and what is sent next.

    Its lock is held for a moment only, and never while a future or a timer is told something: those call back.
    """

    def __init__(
        self,
        guard: Guard,
        what: str,
        side: Side,
        send: Callable[[], Future[Any]],
        outer: Future[Any],
        n_bytes: int,
        attempts: int,
        timed: bool,
    ):
        policy = guard._policy
        self._guard, self._what, self._side, self._send, self._outer = guard, what, side, send, outer
        self._n_bytes = n_bytes
        self._timeout_s = policy.timeout_s + n_bytes / policy.slowest_bytes_per_s if timed else None
        self._left = attempts
        self._pause_s = policy.backoff_s
        self._mutex = threading.Lock()
        self._running: list[_Attempt] = []
        self._timers: list[Timer] = []
        self._over = False

    def send(self) -> None:
        """The first time, or again."""
        self._left -= 1
        after_s = self._guard._hedge_after_s(self._n_bytes) if self._what == "read" else None
        if self._attempt(hedge=False) and after_s is not None:
            self._later(after_s, self._hedge)

    def _hedge(self) -> None:
        with self._mutex:
            if self._over or len(self._running) != 1:
                return
        if self._guard._may_hedge():
            self._attempt(hedge=True)

    def _attempt(self, *, hedge: bool) -> bool:
        guard = self._guard
        try:
            tickets = guard._admit(self._side)
        except TierError as refused:
            if not hedge:
                self._end(None, refused)
            return False
        attempt = _Attempt(tickets, guard._began(self._what, self._n_bytes), hedge=hedge)
        error: BaseException | None = None
        with self._mutex:
            over = self._over
            if not over:
                # Within the lock: whoever gives up must find what has been sent.
                try:
                    attempt.future = self._send()
                    self._running.append(attempt)
                except BaseException as raised:
                    error = raised
        if over or error is not None:
            attempt.over = True
            self._tell(attempt, error, cancelled=over)
            if error is not None:
                self._end(None, error)
                raise error
            return False
        assert attempt.future is not None
        if self._timeout_s is not None:
            attempt.timer = guard._clock.after(self._timeout_s, partial(self._late, attempt))
            if attempt.over:
                attempt.timer.cancel()
        attempt.future.add_done_callback(partial(self._answered, attempt))
        return True

    def _answered(self, attempt: _Attempt, future: Future[Any]) -> None:
        if not self._take(attempt):
            return
        if attempt.timer is not None:
            attempt.timer.cancel()
        if future.cancelled():
            self._tell(attempt, None, cancelled=True)
            self._failed(TierUnavailable(f"{self._guard._where} gave the request up"))
            return
        error = future.exception()
        self._tell(attempt, error)
        if error is None:
            if attempt.hedge:
                self._guard._count("hedges_won")
            self._end(future.result(), None)
        else:
            self._failed(error)

    def _late(self, attempt: _Attempt) -> None:
        if not self._take(attempt):
            return
        assert attempt.future is not None
        attempt.future.cancel()
        error = TierUnavailable(f"{self._guard._where} did not answer within {self._timeout_s:.1f} s")
        self._guard._count("timeouts")
        self._tell(attempt, error)
        self._failed(error)

    def _failed(self, error: BaseException) -> None:
        with self._mutex:
            if self._over or self._running:
                return  # the other one may still succeed
        if self._left <= 0 or not isinstance(error, TierUnavailable) or not self._guard._may_retry():
            self._end(None, error)
            return
        policy, pause_s = self._guard._policy, self._pause_s * self._guard._chance()
        self._pause_s = min(policy.most_backoff_s, 2 * self._pause_s)
        self._guard._count("retries")
        self._later(pause_s, self.send)

    def _later(self, seconds: float, do: Callable[[], None]) -> None:
        timer = self._guard._clock.after(seconds, do)
        with self._mutex:
            if not self._over:
                self._timers.append(timer)
                return
        timer.cancel()

    def give_up(self) -> None:
        """Cancel what is under way. Nothing is sent any more, and nothing writes to a read's buffers when this
        returns."""
        with self._mutex:
            self._over = True
            running, self._running = self._running, []
            timers, self._timers = self._timers, []
            for attempt in running:
                attempt.over = True
        for timer in timers:
            timer.cancel()
        for attempt in running:
            if attempt.timer is not None:
                attempt.timer.cancel()
            if attempt.future is not None:
                attempt.future.cancel()
            self._tell(attempt, None, cancelled=True)

    def break_off(self, error: TierUnavailable) -> None:
        """`give_up`, and tell who waits."""
        self._end(None, error)

    def _end(self, result: Any, error: BaseException | None) -> None:
        self.give_up()
        settle(self._outer, result, error)

    def _take(self, attempt: _Attempt) -> bool:
        """Whether the attempt was still running: whoever gets it deals with its end."""
        with self._mutex:
            if attempt.over:
                return False
            attempt.over = True
            self._running.remove(attempt)
            return True

    def _tell(self, attempt: _Attempt, error: BaseException | None, *, cancelled: bool = False) -> None:
        guard = self._guard
        guard._took(self._what, attempt.began_s, self._n_bytes, error is None and not cancelled)
        guard._ended(self._side, attempt.tickets, error, cancelled=cancelled)
