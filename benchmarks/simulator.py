"""A discrete-event simulator of engines that serve agents, with and without a page store.

Each engine is a scheduler like SGLang's: waiting requests first, in order, in forwards of a bounded number of new
tokens; else a decoding step of everything that runs. A forward's time comes from a `Calibration`. Around it are three
tiers: the device's radix cache, host memory for pages that were fetched ahead, and a drive with a quota.

If results are late (`Calibration.late_results`), a forward's results are seen, cached and freed at the end of the
forward after it, if there is one. The last token of an answer takes no step beyond it.

A request that finds no room while others run is not tried again, nor is any other before it, until one of those has
ended, whatever becomes free meanwhile. Device pages are held until they are written.

The simulator asks for room as SGLang does: for a request's tokens and a page, besides the whole pages of what runs and
every token that is still to come of it.

It leaves out the following. No page is ever wrong. Reads and writes slow neither each other nor the forwards that run
beside them. A request reserves room for its whole answer. A session stays on one engine.
"""

from __future__ import annotations

import enum
import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from agentstate.errors import SettingsError
from benchmarks.caches import ROOT, SegmentCache
from benchmarks.calibration import Calibration
from benchmarks.traces import Gap, Turn, Workload


class Prefetch(enum.Enum):
    """Where pages are brought before a tool is expected to end."""

    NOT = "not"
    HOST = "host"
    DEVICE = "device"


@dataclass(frozen=True)
class Policy:
    """The features that are on. Without ``store`` nothing is written and the others mean nothing.

    - ``overlap``: layer *n* runs while *n + 1 …* are read.
    - ``read_at_arrival``: reading begins when a request arrives, not when it is admitted.
    - ``hold``: a request is admitted when what is being read for it has arrived, and others go first until then.
      Without it, everything that the engine runs waits with the request.
    - ``demote``: pages of a session that is expected to stay away are the first to leave the device.
    - ``break_even``: pages that are sooner computed than read are computed.
    """

    name: str
    store: bool = False
    overlap: bool = False
    read_at_arrival: bool = False
    hold: bool = False
    prefetch: Prefetch = Prefetch.NOT
    demote: bool = False
    break_even: bool = False


@dataclass(frozen=True)
class Fleet:
    """What each of ``engines`` has. ``device_tokens`` is its KV pool; ``staging_bytes`` bounds what is read before
    admission; ``host_bytes`` what is prefetched to host memory; ``quota_bytes`` what is kept on its drive.

    Guesses of a tool's duration are wrong by a log-normal factor of ``guess_sigma``. A session is expected to stay
    away when a person is asked, or when the guess is ``demote_gap_s`` or more. A prefetch begins so early that it
    would be done ``prefetch_slack`` times the time it takes before the guessed end."""

    engines: int
    device_tokens: int
    staging_bytes: float
    host_bytes: float
    quota_bytes: float
    guess_sigma: float = 0.5
    demote_gap_s: float = 30.0
    prefetch_slack: float = 1.0


@dataclass(frozen=True, slots=True)
class Served:
    """One request as it was served. Of its ``input_tokens``, ``device_tokens`` were on the device when it was
    admitted, ``host_tokens`` in host memory and ``drive_tokens`` on the drive; the others were computed. ``prefill_s``
    is what they took the engine, ``saved_s`` how much more the whole prompt would have taken."""

    session: int
    turn: int
    gap: Gap
    arrived_s: float
    ttft_s: float
    input_tokens: int
    output_tokens: int
    device_tokens: int
    host_tokens: int
    drive_tokens: int
    prefill_s: float
    saved_s: float


@dataclass
class Outcome:
    """What a simulation found. The window is the time in which sessions still started; its ``busy_s`` and
    ``written_bytes`` are sums over all engines. Of the sessions that were ``alive`` at a sample, taken evenly over the
    window, ``on_device`` had their whole context on the device, and ``restorable`` there or on the drive."""

    served: list[Served] = field(default_factory=list)
    duration_s: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    window_s: float = 0.0
    window_busy_s: float = 0.0
    window_bytes_written: int = 0
    alive: list[int] = field(default_factory=list)
    on_device: list[int] = field(default_factory=list)
    restorable: list[int] = field(default_factory=list)


class _Source(enum.Enum):
    """Where a segment that is not on the device comes from."""

    EARLY = "early"  # from the drive, and on its way already
    HOST = "host"
    DRIVE = "drive"


@dataclass(slots=True, eq=False)
class _Read:
    """Segments on their way from the drive, when their read begins and when the last byte arrives. ``staged`` bytes of
    staging and ``reserved`` device pages (after ``base``, which is locked) are its own until a request takes it over.
    """

    segments: set[int]
    start_s: float
    done_s: float
    staged: int = 0
    reserved: int = 0
    base: int = ROOT


@dataclass(slots=True, eq=False)
class _Request:
    session: int
    number: int
    turn: Turn
    arrived_s: float
    input_tokens: int
    output_tokens: int
    early: _Read | None = None
    base: int = ROOT
    loads: tuple[float, float] | None = None  # begin and end of a restore that its next forward waits for
    tokens: tuple[int, int, int] = (0, 0, 0)
    done: int = 0  # tokens whose KV is there
    prefill_s: float = 0.0
    left: int = 0  # of the answer


class _Engine:
    def __init__(self, fleet: Fleet, page_bytes: int, parents: list[int], pages: list[int], page_tokens: int):
        self.device = SegmentCache(parents, pages, fleet.device_tokens // page_tokens)
        self.host = SegmentCache(parents, pages, int(fleet.host_bytes // page_bytes))
        self.drive = SegmentCache(parents, pages, int(fleet.quota_bytes // page_bytes))
        self.host_ready_s: dict[int, float] = {}
        self.drive_ready_s: dict[int, float] = {}
        self.read_free_s = self.write_free_s = 0.0
        self.staged_bytes = 0
        self.queue: deque[_Request] = deque()
        self.running: list[_Request] = []
        self.chunked: _Request | None = None
        self.batch: list[tuple[_Request, int]] = []
        self.full = False  # a request found no room, and none that runs has ended since
        self.results: list[Callable[[], None]] = []  # of the forward before, not seen yet
        self.steps = 0  # of decoding that end at the next event; 0 while a prefill runs or nothing does
        self.step_s = self.started_s = self.ended_s = 0.0
        self.busy = False
        self.epoch = 0  # events of earlier epochs are void
        self.sessions = 0


class Simulation:
    """One run of a workload on a fleet under a policy. Equal arguments give equal outcomes.

    Raises SettingsError if a request of the workload is larger than the device's KV pool.
    """

    def __init__(
        self,
        workload: Workload,
        calibration: Calibration,
        fleet: Fleet,
        policy: Policy,
        *,
        seed: int = 0,
        samples: int = 50,
        progress: Callable[[int], None] = lambda served: None,
    ):
        self._workload, self._cost, self._fleet, self._policy = workload, calibration, fleet, policy
        self._progress = progress
        page = calibration.page_tokens
        self._parents = workload.parents
        self._pages = [
            end // page - workload.end(parent) // page
            for parent, end in zip(workload.parents, workload.ends, strict=True)
        ]
        largest = max(workload.ends[turn.answer] for turn in workload.turns())
        if (largest + page) // page + 1 > fleet.device_tokens // page:
            raise SettingsError(
                f"a request of {largest:,} tokens does not fit a KV pool of {fleet.device_tokens:,}: "
                "scale the workload down or give the engines more"
            )
        self._engines = [
            _Engine(fleet, calibration.page_bytes, self._parents, self._pages, page) for _ in range(fleet.engines)
        ]
        source = random.Random(seed)
        # Drawn beforehand, so that each policy is judged with the same guesses.
        self._guesses = [
            [math.exp(fleet.guess_sigma * source.gauss(0, 1)) for _ in turns] for turns in workload.sessions
        ]
        self._engine_of: dict[int, _Engine] = {}
        self._prefetched: dict[int, _Read] = {}
        self._head: dict[int, int] = {}  # a living session -> the last segment of its context
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self._now_s = 0.0
        self._samples = samples
        self.outcome = Outcome(
            window_s=max((turns[0].not_before_s for turns in workload.sessions if turns), default=0.0)
        )

    def run(self) -> Outcome:
        for session, turns in enumerate(self._workload.sessions):
            if turns:
                self._at(turns[0].not_before_s, partial(self._arrive, session, 0))
        window_s, sampled = self.outcome.window_s, 0
        while self._events:
            at_s, _, act = heapq.heappop(self._events)
            while sampled < self._samples and at_s > window_s * (sampled + 1) / self._samples:
                self._sample()
                sampled += 1
            self._now_s = at_s
            act()
        self.outcome.duration_s = self._now_s
        return self.outcome

    def _at(self, at_s: float, act: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._events, (at_s, self._sequence, act))

    def _arrive(self, session: int, number: int) -> None:
        turn = self._workload.sessions[session][number]
        engine = self._engine_of.get(session)
        if engine is None:
            engine = self._engine_of[session] = min(self._engines, key=lambda e: e.sessions)
            engine.sessions += 1
        request = _Request(
            session,
            number,
            turn,
            self._now_s,
            self._workload.input_tokens(turn),
            self._workload.output_tokens(turn),
            early=self._prefetched.pop(session, None),
        )
        if request.early is None and self._policy.store and self._policy.read_at_arrival:
            self._read_early(engine, request)
        engine.queue.append(request)
        self._wake(engine)

    def _read_early(self, engine: _Engine, request: _Request) -> None:
        """Start reading what the request will need into staging, as far as there is room."""
        base = engine.device.covered(request.turn.prompt)
        room, segments, n_bytes = self._fleet.staging_bytes - engine.staged_bytes, set(), 0
        for segment in self._beyond(base, request.turn.prompt):
            size = self._pages[segment] * self._cost.page_bytes
            if segment in engine.host or not self._stored(engine, segment) or n_bytes + size > room:
                break
            segments.add(segment)
            n_bytes += size
        if segments and self._worth_reading(engine, base, request, n_bytes):
            start_s, done_s = self._read(engine, n_bytes)
            engine.staged_bytes += n_bytes
            request.early = _Read(segments, start_s, done_s, staged=n_bytes)
            if self._policy.hold:
                self._at(done_s, partial(self._wake, engine))

    def _wake(self, engine: _Engine) -> None:
        """Let the scheduler see what has arrived: now, or when the running decoding step has ended."""
        if not engine.busy:
            self._schedule(engine)
        elif engine.steps > 1:
            done = math.ceil(max(self._now_s - engine.started_s, 1e-12) / engine.step_s)
            if done < engine.steps:
                engine.steps = done
                self._end_of(engine, max(self._now_s, engine.started_s + done * engine.step_s))

    def _end_of(self, engine: _Engine, at_s: float) -> None:
        engine.epoch += 1
        epoch = engine.epoch
        self._at(at_s, lambda: self._ended(engine) if engine.epoch == epoch else None)

    def _schedule(self, engine: _Engine) -> None:
        engine.batch = self._admit(engine)
        if engine.results and not engine.batch and not engine.running:
            self._see_results(engine)  # there is no forward to wait for, and what they free may be what is waited for
            engine.batch = self._admit(engine)
        engine.steps = 0
        engine.busy = bool(engine.batch or engine.running)
        engine.started_s = self._now_s
        if engine.batch:
            alone = [self._cost.chunk_s(request.done, take) for request, take in engine.batch]
            for (request, _), own_s in zip(engine.batch, alone, strict=True):
                request.prefill_s += own_s + self._cost.forward_s / len(alone)
            loads = [request.loads for request, _ in engine.batch if request.loads is not None]
            forward_s = self._cost.forward_s + sum(alone) + len(loads) * self._cost.restore_s
            forward_s += self._cost.cold_s(self._now_s - engine.ended_s)
            self._end_of(engine, self._forward_end_s(forward_s, loads))
        elif engine.running:
            context = sum(r.input_tokens + r.output_tokens - r.left for r in engine.running)
            engine.steps = 1 if engine.results else min(r.left for r in engine.running)
            count = len(engine.running)
            engine.step_s = self._cost.decode_s(count, context + count * engine.steps / 2)
            self._end_of(engine, self._now_s + engine.steps * engine.step_s)

    def _admit(self, engine: _Engine) -> list[tuple[_Request, int]]:
        """The next forward's requests, and how many new tokens of each it computes."""
        budget = self._cost.chunk_tokens
        batch: list[tuple[_Request, int]] = []
        request = engine.chunked
        if engine.full and engine.running and request is None:
            return batch
        while budget > 0:
            if request is None:
                if len(engine.running) + len(batch) >= self._cost.max_running:
                    break
                request = next((r for r in engine.queue if not self._held(r)), None)
                if request is None:
                    break
                if not self._place(engine, request, batch):
                    engine.full = True
                    break
                engine.queue.remove(request)
            take = min(budget, request.input_tokens - request.done)
            batch.append((request, take))
            budget -= take
            engine.chunked = request if request.done + take < request.input_tokens else None
            request = None
        return batch

    def _held(self, request: _Request) -> bool:
        return self._policy.hold and request.early is not None and request.early.done_s > self._now_s

    def _place(self, engine: _Engine, request: _Request, batch: list[tuple[_Request, int]]) -> bool:
        """Find what is cached of a request, and reserve device pages for the rest. Returns whether there are any,
        besides those for what runs and for the ``batch`` that it would be in."""
        prompt = request.turn.prompt
        early = request.early
        base = engine.device.covered(prompt)
        rest = self._beyond(base, prompt)
        engine.device.lock(base)
        page = self._cost.page_tokens
        answer = -(-(request.input_tokens + request.output_tokens) // page) - request.input_tokens // page
        need = sum(self._pages[segment] for segment in rest) + answer
        spare = sum(self._slack(r) for r in engine.running) + sum(self._slack(r) + page for r, _ in batch)
        # A page more than the tokens take, and one token more than that.
        tokens = request.input_tokens + request.output_tokens - self._workload.end(base) // page * page
        asked = max(need, (tokens + page + spare) // page + 1)
        # A prefetch that is still under way has a place, which the request takes over.
        if not engine.device.make_room(asked - (early.reserved if early else 0)):
            engine.device.unlock(base)
            return False
        if early is not None and early.reserved:
            engine.device.reserved -= early.reserved
            engine.device.unlock(early.base)
            early.reserved = 0
        engine.device.reserved += need
        engine.device.use(base, self._now_s)
        request.base = base
        self._find(engine, request, rest)
        if early is not None:
            engine.staged_bytes -= early.staged
            request.early = None
        return True

    def _slack(self, request: _Request) -> int:
        """How many tokens beyond its pages SGLang sets aside for a request: whole pages for existing tokens, and one
        for each token to come."""
        page = self._cost.page_tokens
        there = request.input_tokens + (request.output_tokens - request.left if request.left else 0)
        left = request.output_tokens - (there - request.input_tokens)
        end = request.input_tokens + request.output_tokens
        return -(-there // page) * page + left - -(-end // page) * page

    def _find(self, engine: _Engine, request: _Request, rest: list[int]) -> None:
        """Which of ``rest``, the segments after what is on the device, are restored, and when they arrive."""
        found: list[tuple[int, _Source]] = []
        for segment in rest if self._policy.store else []:
            if request.early is not None and segment in request.early.segments:
                found.append((segment, _Source.EARLY))
            elif segment in engine.host:
                found.append((segment, _Source.HOST))
            elif self._stored(engine, segment):
                found.append((segment, _Source.DRIVE))
            else:
                break
        n_bytes = self._bytes(segment for segment, source in found if source is _Source.DRIVE)
        if n_bytes and not self._worth_reading(engine, request.base, request, n_bytes):
            del found[next(i for i, (_, source) in enumerate(found) if source is _Source.DRIVE) :]
            n_bytes = 0
        page = self._cost.page_tokens
        host = [segment for segment, source in found if source is _Source.HOST]
        last = found[-1][0] if found else request.base
        # The last token of a prompt is always computed, and what is cached are whole pages.
        most = (request.input_tokens - 1) // page * page
        request.done = min(most, self._workload.end(last) // page * page)
        device_tokens = min(most, self._workload.end(request.base) // page * page)
        host_tokens = min(request.done - device_tokens, self._bytes(host) // self._cost.token_bytes)
        request.tokens = device_tokens, host_tokens, request.done - device_tokens - host_tokens
        engine.drive.use(engine.drive.covered(request.turn.prompt), self._now_s)
        if not found:
            return
        arrivals = [(self._now_s, self._now_s)]
        if request.early is not None and any(source is _Source.EARLY for _, source in found):
            arrivals.append((request.early.start_s, request.early.done_s))
        if host:
            copied_s = self._now_s + self._bytes(host) / self._cost.host_gb_per_s / 1e9
            arrivals.append((self._now_s, max(copied_s, *(engine.host_ready_s[segment] for segment in host))))
            engine.host.use(host[-1], self._now_s)
        if n_bytes:
            arrivals.append(self._read(engine, n_bytes))
        request.loads = min(first for first, _ in arrivals), max(last for _, last in arrivals)

    def _forward_end_s(self, forward_s: float, loads: list[tuple[float, float]]) -> float:
        """When a forward that starts now has ended, with the restores that it waits for."""
        end_s = self._now_s + forward_s
        if not loads:
            return end_s
        first_s, last_s = min(load[0] for load in loads), max(load[1] for load in loads)
        if not self._policy.overlap:
            return max(self._now_s, last_s) + forward_s
        layers = self._cost.layers
        # Layers arrive evenly between the two. The forward is held up by the first or by the last of them.
        first_layer_s = first_s + (last_s - first_s) / layers
        return max(end_s, first_layer_s + forward_s, last_s + forward_s / layers)

    def _ended(self, engine: _Engine) -> None:
        if self._now_s <= self.outcome.window_s:
            self.outcome.window_busy_s += self._now_s - engine.started_s
        engine.ended_s = self._now_s
        self._see_results(engine)
        if engine.batch:
            for request, take in engine.batch:
                request.done += take
                request.loads = None
                if request.done == request.input_tokens:
                    request.left = request.output_tokens - 1
                    engine.results.append(partial(self._prefilled, engine, request))
                    engine.running.append(request)
        else:
            for request in engine.running:
                request.left -= engine.steps
        engine.results += [partial(self._finish, engine, r) for r in engine.running if not r.left]
        engine.running = [r for r in engine.running if r.left]
        if not self._cost.late_results:
            self._see_results(engine)
        self._schedule(engine)

    def _see_results(self, engine: _Engine) -> None:
        results, engine.results = engine.results, []
        for see in results:
            see()

    def _prefilled(self, engine: _Engine, request: _Request) -> None:
        device, host, drive = request.tokens
        self.outcome.served.append(
            Served(
                session=request.session,
                turn=request.number,
                gap=request.turn.gap,
                arrived_s=request.arrived_s,
                ttft_s=self._now_s - request.arrived_s + self._cost.request_s,
                input_tokens=request.input_tokens,
                output_tokens=request.output_tokens,
                device_tokens=device,
                host_tokens=host,
                drive_tokens=drive,
                prefill_s=request.prefill_s,
                saved_s=self._cost.prefill_s(0, request.input_tokens) - request.prefill_s,
            )
        )
        self._progress(len(self.outcome.served))
        prompt = request.turn.prompt
        self._put_in(engine, self._beyond(request.base, prompt))
        engine.device.use(prompt, self._now_s)
        engine.device.lock(prompt)
        engine.device.unlock(request.base)
        self._spill(engine, prompt)

    def _finish(self, engine: _Engine, request: _Request) -> None:
        engine.full = False
        page = self._cost.page_tokens
        turn, end = request.turn, request.input_tokens + request.output_tokens
        engine.device.reserved -= -(-end // page) - request.input_tokens // page
        engine.device.insert([turn.answer], self._now_s)
        engine.device.unlock(turn.prompt)
        self._spill(engine, turn.answer)
        turns = self._workload.sessions[request.session]
        number = request.number + 1
        if number == len(turns):
            self._head.pop(request.session, None)
            engine.sessions -= 1
            return
        self._head[request.session] = turn.answer
        following = turns[number]
        arrival_s = max(following.not_before_s, self._now_s + following.gap_s)
        self._at(arrival_s, partial(self._arrive, request.session, number))
        if self._policy.store:
            self._look_ahead(engine, request.session, following, arrival_s, self._guesses[request.session][number])

    def _look_ahead(self, engine: _Engine, session: int, turn: Turn, arrival_s: float, error: float) -> None:
        """Demote a session that is expected to stay away, and plan when to bring its pages back."""
        guess_s = (arrival_s - self._now_s) * error if turn.gap is Gap.TOOL else math.inf
        head = self._head[session]
        if self._policy.demote and guess_s >= self._fleet.demote_gap_s and turn.gap is not Gap.UNKNOWN:
            # Not before it is written, nor when the session is back by then.
            demoted_s = max(self._now_s, engine.write_free_s)
            if demoted_s < arrival_s:
                self._at(demoted_s, partial(self._demote, engine, head))
        if self._policy.prefetch is not Prefetch.NOT and turn.gap is Gap.TOOL:
            context = self._workload.end(head) * self._cost.token_bytes
            lead_s = (1 + self._fleet.prefetch_slack) * self._cost.read_all_s(context)
            at_s = self._now_s + max(0.0, guess_s - lead_s)
            if at_s < arrival_s:
                self._at(at_s, partial(self._fetch_ahead, engine, session, head))

    def _demote(self, engine: _Engine, head: int) -> None:
        if head in engine.device:
            engine.device.demote(head)

    def _fetch_ahead(self, engine: _Engine, session: int, head: int) -> None:
        base = engine.device.covered(head)
        engine.host.use(engine.host.covered(head), self._now_s)
        segments = []
        for segment in self._beyond(base, head):
            if segment in engine.host:
                continue
            if not self._stored(engine, segment):
                break
            segments.append(segment)
        pages = sum(self._pages[segment] for segment in segments)
        if not pages:
            return
        if self._policy.prefetch is Prefetch.HOST:
            if not engine.host.make_room(pages):
                return
            _, done_s = self._read(engine, pages * self._cost.page_bytes)
            engine.host.insert(segments, self._now_s)
            engine.host_ready_s.update((segment, done_s) for segment in segments)
            return
        engine.device.lock(base)
        if not engine.device.make_room(pages):
            engine.device.unlock(base)
            return
        engine.device.reserved += pages
        start_s, done_s = self._read(engine, pages * self._cost.page_bytes)
        read = _Read(set(segments), start_s, done_s, reserved=pages, base=base)
        self._prefetched[session] = read
        self._at(done_s, partial(self._fetched, engine, session, read, segments))

    def _fetched(self, engine: _Engine, session: int, read: _Read, segments: list[int]) -> None:
        """A prefetch to the device has arrived. If its request has been admitted, that has taken the pages over."""
        if not read.reserved:
            return
        read.reserved = 0
        self._put_in(engine, segments)
        engine.device.unlock(read.base)
        if self._prefetched.get(session) is read:
            del self._prefetched[session]
        self._wake(engine)  # a request may wait for room that was reserved here

    def _put_in(self, engine: _Engine, segments: list[int]) -> None:
        """Turn reserved pages into cached ones. Another request may have inserted some of the segments since."""
        engine.device.reserved -= sum(self._pages[segment] for segment in segments)
        engine.device.insert([segment for segment in segments if segment not in engine.device], self._now_s)

    def _spill(self, engine: _Engine, segment: int) -> None:
        """Write, in order, the segments on the path to ``segment`` that are not on the drive. Those without room are
        not stored."""
        if not self._policy.store:
            return
        base = engine.drive.covered(segment)
        for new in self._beyond(base, segment):
            engine.drive.lock(base)
            room = engine.drive.make_room(self._pages[new])
            engine.drive.unlock(base)
            if not room:
                return
            n_bytes = self._pages[new] * self._cost.page_bytes
            self.outcome.bytes_written += n_bytes
            if self._now_s <= self.outcome.window_s:
                self.outcome.window_bytes_written += n_bytes
            start_s = max(self._now_s, engine.write_free_s)
            engine.write_free_s = start_s + self._cost.write_s + n_bytes / self._cost.write_gb_per_s / 1e9
            engine.drive.insert([new], self._now_s)
            engine.drive_ready_s[new] = engine.write_free_s
            engine.device.lock(new)
            self._at(engine.write_free_s, partial(self._written, engine, new))
            base = new

    def _written(self, engine: _Engine, segment: int) -> None:
        engine.device.unlock(segment)
        if engine.queue and not engine.busy:  # for room, perhaps
            self._schedule(engine)

    def _stored(self, engine: _Engine, segment: int) -> bool:
        return segment in engine.drive and engine.drive_ready_s[segment] <= self._now_s

    def _read(self, engine: _Engine, n_bytes: int) -> tuple[float, float]:
        """Queue a read behind earlier ones. Returns when it begins, and when the last byte arrives."""
        start_s = max(self._now_s, engine.read_free_s)
        engine.read_free_s = start_s + self._cost.read_all_s(n_bytes)
        self.outcome.bytes_read += n_bytes
        return start_s, engine.read_free_s

    def _bytes(self, segments: Iterable[int]) -> int:
        return sum(self._pages[segment] for segment in segments) * self._cost.page_bytes

    def _worth_reading(self, engine: _Engine, base: int, request: _Request, n_bytes: int) -> bool:
        """Whether reading ``n_bytes`` more after ``base`` is faster than computing them."""
        if not self._policy.break_even:
            return True
        wait_s = max(0.0, engine.read_free_s - self._now_s)
        cached = self._workload.end(base)
        new = min(n_bytes // self._cost.token_bytes, request.input_tokens - cached)
        return wait_s + self._cost.read_all_s(n_bytes) + self._cost.restore_s < self._cost.chunk_s(cached, new)

    def _beyond(self, base: int, segment: int) -> list[int]:
        """The segments after ``base`` on the path to ``segment``, in order."""
        found = []
        while segment != base:
            found.append(segment)
            segment = self._parents[segment]
        return found[::-1]

    def _sample(self) -> None:
        alive = on_device = restorable = 0
        for session, head in self._head.items():
            engine = self._engine_of[session]
            alive += 1
            here = engine.device.covered(head) == head
            on_device += here
            restorable += here or engine.drive.covered(head) == head
        self.outcome.alive.append(alive)
        self.outcome.on_device.append(on_device)
        self.outcome.restorable.append(restorable)
