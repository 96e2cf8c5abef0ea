"""What one simulated engine has: its tiers, what it runs, and what waits."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from agentstate.benchmarks.caches import ROOT, SegmentCache
from agentstate.benchmarks.clock import Clock
from agentstate.benchmarks.fleet import Fleet, Policy
from agentstate.benchmarks.reads import Read, ReadQueue
from agentstate.benchmarks.traces import Turn
from agentstate.benchmarks.waits import Waits


class Source(enum.Enum):
    """Where a segment that is not on the device comes from."""

    EARLY = "early"  # from the drive, and on its way already
    HOST = "host"
    DRIVE = "drive"


@dataclass(slots=True, eq=False)
class Fetch:
    """Segments on their way, from the drive by a ``read`` and from host memory until ``copied_s``. ``staged`` bytes of
    staging and ``reserved`` device pages (after ``base``, which is locked) are its own until a request takes it over.
    """

    segments: set[int]
    read: Read | None = None
    copied_s: float = 0.0
    staged: int = 0
    reserved: int = 0
    base: int = ROOT


@dataclass(slots=True, eq=False)
class Request:
    session: int
    number: int
    turn: Turn
    arrived_s: float
    input_tokens: int
    output_tokens: int
    early: Fetch | None = None
    base: int = ROOT
    loads: tuple[float, float] | None = None  # begin and end of a restore that its next forward waits for
    tokens: tuple[int, int, int, int] = (0, 0, 0, 0)  # device, fetched, host, drive
    done: int = 0  # tokens whose KV is there
    prefill_s: float = 0.0
    left: int = 0  # of the answer
    held_s: float = 0.0  # until when it was held
    blocked_s: float | None = None  # since when nothing but memory was missing
    read_wait_s: float = 0.0
    memory_wait_s: float = 0.0


class Engine:
    def __init__(
        self,
        clock: Clock,
        fleet: Fleet,
        policy: Policy,
        waits: Waits | None,
        page_bytes: int,
        parents: list[int],
        pages: list[int],
        page_tokens: int,
    ):
        value = waits.value if waits is not None else None
        dropped = self._demote if policy.exclusive else lambda segment: None
        self._clock, self._waits, self._pages = clock, waits, pages
        self.device = SegmentCache(parents, pages, fleet.device_tokens // page_tokens, value, dropped)
        self.host = SegmentCache(parents, pages, int(fleet.host_bytes // page_bytes), value)
        self.drive = SegmentCache(parents, pages, int(fleet.quota_bytes // page_bytes))
        self.host_ready_s: dict[int, float] = {}
        self.drive_ready_s: dict[int, float] = {}
        self.reads = ReadQueue(clock)
        self.write_free_s = 0.0
        self.staged_bytes = 0
        self.queue: deque[Request] = deque()
        self.running: list[Request] = []
        self.chunked: Request | None = None
        self.batch: list[tuple[Request, int]] = []
        self.full = False  # a request found no room, and none that runs has ended since
        self.results: list[Callable[[], None]] = []  # of the forward before, not seen yet
        self.steps = 0  # of decoding that end at the next event; 0 while a prefill runs or nothing does
        self.step_s = self.started_s = self.ended_s = 0.0
        self.busy = self.retries = False
        self.epoch = 0  # events of earlier epochs are void
        self.sessions = 0

    def leave_host(self, segments: Iterable[int]) -> list[int]:
        """Take from host memory those of the segments that are there, and return them."""
        there = [segment for segment in segments if segment in self.host]
        for segment in there:
            self.host.take(segment)
        return there

    def back_in_host(self, segments: Iterable[int]) -> None:
        """Undo `leave_host`, as far as there is room."""
        for segment in segments:
            self._demote(segment)

    def _demote(self, segment: int) -> None:
        """Keep in host memory what the device drops, if it is worth more than what is there."""
        assert self._waits is not None
        if segment not in self.host and self.host.make_room(self._pages[segment], self._waits.value(segment)):
            self.host.insert([segment], self._clock.now_s)
            self.host_ready_s[segment] = self._clock.now_s
