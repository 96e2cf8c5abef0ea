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

import math
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial

from agentstate.benchmarks.calibration import Calibration
from agentstate.benchmarks.clock import Clock
from agentstate.benchmarks.fleet import AGING_S, Fleet, Foresight, Outcome, Policy, Prefetch, Served
from agentstate.benchmarks.reads import Read, Urgency
from agentstate.benchmarks.simulated import Engine, Fetch, Request, Source
from agentstate.benchmarks.traces import ROOT, Gap, Turn, Workload
from agentstate.benchmarks.waits import Waits
from agentstate.errors import SettingsError

PLAN_EVERY_S = 1.0
PLANNED_AT_ONCE = 2


class Simulation:
    """One run of a workload on a fleet under a policy. Equal arguments give equal outcomes.

    With a ``window``, only requests that arrive in it count; with ``counted`` ones, a session and a turn each, only
    those do. The run ends when they have been served, or after twice the window. Those that have not been served
    by then are ``unserved``; those of them that wait count with the time that they have waited.

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
        window: tuple[float, float] | None = None,
        counted: Collection[tuple[int, int]] = (),
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
        self.outcome = Outcome(
            window_s=max((turns[0].not_before_s for turns in workload.sessions if turns), default=0.0)
            if window is None
            else window[1]
        )
        self._window = window
        self._counted = frozenset(counted)
        self._clock = Clock()
        self._waits = Waits(workload, self._clock, policy, self.outcome, seed) if policy.ordering is not None else None
        self._engines = [
            Engine(self._clock, fleet, policy, self._waits, calibration.page_bytes, self._parents, self._pages, page)
            for _ in range(fleet.engines)
        ]
        for engine in self._engines if policy.store else []:
            engine.drive.insert(workload.stored, 0.0)
            engine.drive_ready_s.update((segment, 0.0) for segment in workload.stored)
        self._queued: dict[int, Request] = {}  # what counts, has arrived, and has no first token yet
        source = random.Random(seed)
        # Drawn beforehand, so that each policy is judged with the same guesses.
        self._guesses = [
            [math.exp(fleet.guess_sigma * source.gauss(0, 1)) for _ in turns] for turns in workload.sessions
        ]
        self._engine_of: dict[int, Engine] = {}
        self._prefetched: dict[int, Fetch] = {}
        self._brought: dict[int, set[int]] = {}  # to the device before the session's next request
        self._head: dict[int, int] = {}  # a living session -> the last segment of its context
        self._samples = samples

    def run(self) -> Outcome:
        for session, turns in enumerate(self._workload.sessions):
            if turns:
                self._at(turns[0].not_before_s, partial(self._arrive, session, 0))
        if self._policy.plan:
            self._at(PLAN_EVERY_S, self._plan)
        window_s, sampled = self.outcome.window_s, 0
        begin_s, end_s = self._window or (0.0, math.inf)
        while (at_s := self._clock.next_s) is not None:
            while sampled < self._samples and at_s > begin_s + (window_s - begin_s) * (sampled + 1) / self._samples:
                self._sample()
                sampled += 1
            if at_s > end_s and (at_s > 2 * end_s - begin_s or self._all_served()):
                break
            self._clock.step()
        for request in self._queued.values():
            self._serve(request)
        self.outcome.unserved = len(self._queued)
        if self._counted:
            self.outcome.unserved += len(self._counted) - len(self.outcome.served)
        self.outcome.duration_s = self._now_s
        return self.outcome

    def _all_served(self) -> bool:
        return not self._queued and len(self.outcome.served) >= len(self._counted)

    def _counts(self, session: int, number: int) -> bool:
        if self._window is None:
            return True
        if self._counted:
            return (session, number) in self._counted
        return self._window[0] <= self._now_s <= self._window[1]

    @property
    def _now_s(self) -> float:
        return self._clock.now_s

    def _at(self, at_s: float, act: Callable[[], None]) -> None:
        self._clock.at(at_s, act)

    def _arrive(self, session: int, number: int) -> None:
        turn = self._workload.sessions[session][number]
        engine = self._engine_of.get(session)
        if engine is None:
            engine = self._engine_of[session] = min(self._engines, key=lambda e: e.sessions)
            engine.sessions += 1
        request = Request(
            session,
            number,
            turn,
            self._now_s,
            self._workload.input_tokens(turn),
            self._workload.output_tokens(turn),
            early=self._prefetched.pop(session, None),
        )
        if self._counts(session, number):
            self._queued[session] = request
        if self._waits is not None:
            self._waits.came(session, turn)
        if request.early is not None and request.early.read is not None:
            request.early.read.rank = self._rank(request, request.early.read.left_s)
            engine.reads.promote(request.early.read, Urgency.REQUEST)
        engine.queue.append(request)
        self._read_early(engine)
        self._wake(engine)

    def _read_early(self, engine: Engine) -> None:
        """Start reading what queued requests will need into staging, as far as there is room."""
        if not self._policy.store or not self._policy.read_at_arrival:
            return
        for request in self._ordered(engine):
            if request.early is None and engine.staged_bytes < self._fleet.staging_bytes:
                self._stage(engine, request)

    def _stage(self, engine: Engine, request: Request) -> None:
        base = engine.device.covered(request.turn.prompt)
        room, segments, n_bytes = self._fleet.staging_bytes - engine.staged_bytes, set(), 0
        for segment in self._beyond(base, request.turn.prompt):
            size = self._pages[segment] * self._cost.page_bytes
            if segment in engine.host and self._policy.exclusive:
                continue
            if segment in engine.host or not self._stored(engine, segment) or n_bytes + size > room:
                break
            segments.add(segment)
            n_bytes += size
        if segments and self._worth_reading(engine, base, request, n_bytes):
            seconds = self._cost.read_all_s(n_bytes)
            woken = partial(self._wake, engine) if self._policy.hold else lambda: None
            read = Read(seconds, Urgency.REQUEST, woken, self._rank(request, seconds))
            self.outcome.bytes_read += n_bytes
            engine.staged_bytes += n_bytes
            request.early = Fetch(segments, read, staged=n_bytes)
            engine.reads.submit(read)

    def _rank(self, request: Request, seconds: float) -> Callable[[float], float]:
        """The place of a request among those that wait, given how long the read takes that it waits for."""
        if not self._policy.order:
            return lambda now_s: 0.0
        aged_s = request.arrived_s + AGING_S
        return lambda now_s: seconds if now_s < aged_s else aged_s - 1e9

    def _ordered(self, engine: Engine) -> Iterable[Request]:
        if not self._policy.order or len(engine.queue) < 2:
            return list(engine.queue)

        def place(request: Request) -> tuple[bool, float]:
            if self._now_s - request.arrived_s >= AGING_S:
                return False, request.arrived_s
            prompt = request.turn.prompt
            return True, self._workload.end(prompt) - self._workload.end(engine.device.covered(prompt))

        return sorted(engine.queue, key=place)

    def _wake(self, engine: Engine) -> None:
        """Let the scheduler see what has arrived: now, or when the running decoding step has ended."""
        if not engine.busy:
            self._schedule(engine)
        elif engine.steps > 1:
            done = math.ceil(max(self._now_s - engine.started_s, 1e-12) / engine.step_s)
            if done < engine.steps:
                engine.steps = done
                self._end_of(engine, max(self._now_s, engine.started_s + done * engine.step_s))

    def _end_of(self, engine: Engine, at_s: float) -> None:
        engine.epoch += 1
        epoch = engine.epoch
        self._at(at_s, lambda: self._ended(engine) if engine.epoch == epoch else None)

    def _schedule(self, engine: Engine) -> None:
        engine.batch = self._admit(engine)
        if engine.results and not engine.batch and not engine.running:
            self._see_results(engine)  # there is no forward to wait for, and what they free may be what is waited for
            engine.batch = self._admit(engine)
        engine.steps = 0
        engine.busy = bool(engine.batch or engine.running)
        if engine.queue and not engine.busy and self._waits is not None and not engine.retries:
            engine.retries = True  # a pin may end before anything else happens
            self._at(self._now_s + 1.0, partial(self._retry, engine))
        engine.started_s = self._now_s
        if engine.batch:
            alone = [self._cost.chunk_s(request.done, take) for request, take in engine.batch]
            for (request, _), own_s in zip(engine.batch, alone, strict=True):
                request.prefill_s += own_s + self._cost.forward_s / len(alone)
            loads = [request.loads for request, _ in engine.batch if request.loads is not None]
            forward_s = self._cost.forward_s + sum(alone) + len(loads) * self._cost.restore_s
            forward_s += self._cost.cold_s(self._now_s - engine.ended_s)
            end_s = self._forward_end_s(forward_s, loads)
            for request, _ in engine.batch:
                request.read_wait_s += end_s - self._now_s - forward_s
            self._end_of(engine, end_s)
        elif engine.running:
            context = sum(r.input_tokens + r.output_tokens - r.left for r in engine.running)
            engine.steps = 1 if engine.results else min(r.left for r in engine.running)
            count = len(engine.running)
            engine.step_s = self._cost.decode_s(count, context + count * engine.steps / 2)
            self._end_of(engine, self._now_s + engine.steps * engine.step_s)

    def _retry(self, engine: Engine) -> None:
        engine.retries = False
        self._wake(engine)

    def _admit(self, engine: Engine) -> list[tuple[Request, int]]:
        """The next forward's requests, and how many new tokens of each it computes."""
        budget = self._cost.chunk_tokens
        batch: list[tuple[Request, int]] = []
        request = engine.chunked
        if engine.full and engine.running and request is None:
            return batch
        while budget > 0:
            if request is None:
                if len(engine.running) + len(batch) >= self._cost.max_running:
                    break
                request = next((r for r in self._ordered(engine) if not self._held(engine, r)), None)
                if request is None:
                    break
                if not self._place(engine, request, batch):
                    engine.full = True
                    for other in engine.queue:
                        if other.blocked_s is None and not self._held(engine, other):
                            other.blocked_s = self._now_s
                    break
                engine.queue.remove(request)
                self._read_early(engine)
            take = min(budget, request.input_tokens - request.done)
            batch.append((request, take))
            budget -= take
            engine.chunked = request if request.done + take < request.input_tokens else None
            request = None
        return batch

    def _held(self, engine: Engine, request: Request) -> bool:
        """Whether a forward with this request would wait for what is still being read for it."""
        early = request.early
        if not self._policy.hold or early is None or early.read is None:
            return False
        left_s = early.read.done_s - self._now_s
        if left_s <= 0:
            return False
        if engine.reads.running(early.read):
            # What is read meanwhile is there when its layer is.
            left_s = engine.reads.span_s(early.read)[1] - self._now_s
            known = sum(self._pages[s] for s in early.segments) * self._cost.page_tokens
            new = max(1, request.input_tokens - self._workload.end(engine.device.covered(request.turn.prompt)) - known)
            spare_s = (self._cost.forward_s + self._cost.chunk_s(0, new)) * (1 - 1 / self._cost.layers)
            if self._waits is not None and left_s <= spare_s + 1e-9:
                return False
            if self._waits is not None and request.held_s != self._now_s + left_s:
                request.held_s = self._now_s + left_s
                self._at(self._now_s + left_s - spare_s, partial(self._wake, engine))
        return True

    def _place(self, engine: Engine, request: Request, batch: list[tuple[Request, int]]) -> bool:
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
        # What comes from host memory leaves it first, so that there is room for what it displaces.
        copied = engine.leave_host(rest) if self._policy.exclusive else []
        # A prefetch that is still under way has a place, which the request takes over.
        if not engine.device.make_room(asked - (early.reserved if early else 0)):
            engine.device.unlock(base)
            engine.back_in_host(copied)
            return False
        waited_s = self._now_s - request.arrived_s
        if request.blocked_s is not None:
            request.memory_wait_s = self._now_s - request.blocked_s
        if early is not None and early.read is not None and self._policy.hold:
            there_s = min(self._now_s, early.read.done_s)
            request.read_wait_s = min(waited_s - request.memory_wait_s, max(0.0, there_s - request.arrived_s))
        if early is not None and early.reserved:
            engine.device.reserved -= early.reserved
            engine.device.unlock(early.base)
            early.reserved = 0
        engine.device.reserved += need
        engine.device.use(base, self._now_s)
        request.base = base
        self._find(engine, request, rest, copied)
        if early is not None:
            engine.staged_bytes -= early.staged
            request.early = None
        return True

    def _slack(self, request: Request) -> int:
        """How many tokens beyond its pages SGLang sets aside for a request: whole pages for existing tokens, and one
        for each token to come."""
        page = self._cost.page_tokens
        there = request.input_tokens + (request.output_tokens - request.left if request.left else 0)
        left = request.output_tokens - (there - request.input_tokens)
        end = request.input_tokens + request.output_tokens
        return -(-there // page) * page + left - -(-end // page) * page

    def _find(self, engine: Engine, request: Request, rest: list[int], copied: list[int]) -> None:
        """Which of ``rest``, the segments after what is on the device, are restored, and when they arrive. ``copied``
        ones have left host memory just now."""
        found: list[tuple[int, Source]] = []
        for segment in rest if self._policy.store else []:
            if request.early is not None and segment in request.early.segments:
                found.append((segment, Source.EARLY))
            elif segment in copied or segment in engine.host:
                found.append((segment, Source.HOST))
            elif self._stored(engine, segment):
                found.append((segment, Source.DRIVE))
            else:
                break
        n_bytes = self._bytes(segment for segment, source in found if source is Source.DRIVE)
        if n_bytes and not self._worth_reading(engine, request.base, request, n_bytes):
            del found[next(i for i, (_, source) in enumerate(found) if source is Source.DRIVE) :]
            n_bytes = 0
        page = self._cost.page_tokens
        host = [segment for segment, source in found if source is Source.HOST]
        last = found[-1][0] if found else request.base
        # The last token of a prompt is always computed, and what is cached are whole pages.
        most = (request.input_tokens - 1) // page * page
        request.done = min(most, self._workload.end(last) // page * page)
        device_tokens = min(most, self._workload.end(request.base) // page * page)
        host_tokens = min(request.done - device_tokens, self._bytes(host) // self._cost.token_bytes)
        brought = self._brought.pop(request.session, set()).intersection(self._beyond(ROOT, request.base))
        fetched_tokens = min(device_tokens, self._bytes(brought) // self._cost.token_bytes)
        nvme_tokens = request.done - device_tokens - host_tokens
        request.tokens = device_tokens - fetched_tokens, fetched_tokens, host_tokens, nvme_tokens
        engine.drive.use(engine.drive.covered(request.turn.prompt), self._now_s)
        if not found:
            return
        arrivals = [(self._now_s, self._now_s)]
        early = request.early
        if early is not None and any(source is Source.EARLY for _, source in found):
            if early.read is not None:
                engine.reads.promote(early.read, Urgency.FORWARD)
                arrivals.append(engine.reads.span_s(early.read))
            arrivals.append((self._now_s, early.copied_s))
        if host:
            copied_s = self._now_s + self._bytes(host) / self._cost.host_gb_per_s / 1e9
            arrivals.append((self._now_s, max(copied_s, *(engine.host_ready_s[segment] for segment in host))))
            engine.host.use(engine.host.covered(host[-1]), self._now_s)
        if n_bytes:
            read = Read(self._cost.read_all_s(n_bytes), Urgency.FORWARD, lambda: None)
            self.outcome.bytes_read += n_bytes
            engine.reads.submit(read)
            arrivals.append(engine.reads.span_s(read))
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

    def _ended(self, engine: Engine) -> None:
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

    def _see_results(self, engine: Engine) -> None:
        results, engine.results = engine.results, []
        for see in results:
            see()

    def _serve(self, request: Request) -> None:
        device, fetched, host, nvme = request.tokens
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
                nvme_tokens=nvme,
                prefill_s=request.prefill_s,
                saved_s=self._cost.prefill_s(0, request.input_tokens) - request.prefill_s,
                read_wait_s=request.read_wait_s,
                memory_wait_s=request.memory_wait_s,
                fetched_tokens=fetched,
            )
        )

    def _prefilled(self, engine: Engine, request: Request) -> None:
        if self._queued.pop(request.session, None) is not None:
            self._serve(request)
        self._progress(len(self.outcome.served))
        prompt = request.turn.prompt
        self._put_in(engine, self._beyond(request.base, prompt))
        engine.device.use(prompt, self._now_s)
        engine.device.lock(prompt)
        engine.device.unlock(request.base)
        self._spill(engine, prompt)

    def _finish(self, engine: Engine, request: Request) -> None:
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
            if self._waits is not None:
                self._waits.over(request.session)
            return
        self._head[request.session] = turn.answer
        following = turns[number]
        arrival_s = max(following.not_before_s, self._now_s + following.gap_s)
        self._at(arrival_s, partial(self._arrive, request.session, number))
        if self._waits is not None:
            self._waits.left(request.session, number, following, arrival_s)
            if self._policy.typing_s and following.gap is Gap.PERSON:
                typed_s = max(self._now_s, arrival_s - self._policy.typing_s)
                self._at(typed_s, partial(self._typed, engine, request.session, number, arrival_s))
        elif self._policy.store:
            self._look_ahead(engine, request.session, following, arrival_s, self._guesses[request.session][number])

    def _look_ahead(self, engine: Engine, session: int, turn: Turn, arrival_s: float, error: float) -> None:
        """Demote a session that is expected to stay away, and plan when to bring its pages back."""
        guess_s = (arrival_s - self._now_s) * error if turn.gap is Gap.TOOL else math.inf
        head = self._head[session]
        if self._policy.demote and guess_s >= self._fleet.demote_gap_s and turn.gap is not Gap.OTHER:
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

    def _demote(self, engine: Engine, head: int) -> None:
        if head in engine.device:
            engine.device.demote(head)

    def _fetch_ahead(self, engine: Engine, session: int, head: int) -> None:
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
        seconds, n_bytes = self._cost.read_all_s(pages * self._cost.page_bytes), pages * self._cost.page_bytes
        if self._policy.prefetch is Prefetch.HOST:
            if not engine.host.make_room(pages):
                return
            read = Read(seconds, Urgency.DUE, partial(self._in_host, engine, segments))
            engine.host.insert(segments, self._now_s)
            engine.host_ready_s.update(
                (segment, self._now_s + engine.reads.backlog_s() + seconds) for segment in segments
            )
            self.outcome.bytes_read += n_bytes
            engine.reads.submit(read)
            return
        engine.device.lock(base)
        if not engine.device.make_room(pages):
            engine.device.unlock(base)
            return
        self._to_device(engine, session, base, segments, Urgency.DUE)

    def _in_host(self, engine: Engine, segments: list[int]) -> None:
        engine.host_ready_s.update((segment, self._now_s) for segment in segments)

    def _to_device(
        self,
        engine: Engine,
        session: int,
        base: int,
        segments: list[int],
        urgency: Urgency,
        copied: Sequence[int] = (),
    ) -> None:
        """Bring segments to the device, which has room for them after ``base``, which is locked; ``copied`` ones from
        host memory, which they have left."""
        pages = sum(self._pages[segment] for segment in segments)
        n_bytes = pages * self._cost.page_bytes - self._bytes(copied)
        engine.device.reserved += pages
        fetch = Fetch(set(segments), reserved=pages, base=base)
        fetch.copied_s = self._now_s + self._bytes(copied) / self._cost.host_gb_per_s / 1e9
        self._prefetched[session] = fetch
        fetched = partial(self._fetched, engine, session, fetch, segments)
        if not n_bytes:
            self._at(fetch.copied_s, fetched)
            return
        self.outcome.bytes_read += n_bytes
        self.outcome.planned_bytes += n_bytes
        fetch.read = Read(self._cost.read_all_s(n_bytes), urgency, fetched)
        engine.reads.submit(fetch.read)

    def _fetched(self, engine: Engine, session: int, fetch: Fetch, segments: list[int]) -> None:
        """A prefetch to the device has arrived. If its request has been admitted, that has taken the pages over."""
        if fetch.reserved:
            fetch.reserved = 0
            self._put_in(engine, segments)
            engine.device.unlock(fetch.base)
            if self._prefetched.get(session) is fetch:
                del self._prefetched[session]
                self._brought[session] = set(segments)
        self._wake(engine)  # a request may wait for this, or for room that was reserved here

    def _typed(self, engine: Engine, session: int, number: int, arrival_s: float) -> None:
        """A person has begun to type what a session's next request will bring."""
        assert self._waits is not None
        if not self._waits.is_waiting(session):
            return
        if self._policy.foresight is not Foresight.EXACT:
            self._waits.expected(session, max(0.05, arrival_s - self._now_s))
        self._bring(engine, session, Urgency.DUE, math.inf)

    def _plan(self) -> None:
        """Bring to the device what is worth more there than what it displaces."""
        assert self._waits is not None
        if self._clock.next_s is not None:
            self._at(self._now_s + PLAN_EVERY_S, self._plan)
        away = [session for session, head in self._head.items() if head not in self._engine_of[session].device]
        for worth, session in self._waits.ranked(away):
            engine = self._engine_of[session]
            if len(self._prefetched) >= PLANNED_AT_ONCE:
                break
            if self._bring(engine, session, Urgency.PLANNED, worth / self._policy.margin) is False:
                break

    def _bring(self, engine: Engine, session: int, urgency: Urgency, below: float) -> bool | None:
        """Begin to bring a session to the device in place of what is worth less than ``below``. Returns whether there
        was room, None if there is nothing to bring."""
        head = self._head[session]
        if session in self._prefetched or head in engine.device:
            return None
        base = engine.device.covered(head)
        segments = []
        for segment in self._beyond(base, head):
            if segment not in engine.host and not self._stored(engine, segment):
                break
            segments.append(segment)
        pages = sum(self._pages[segment] for segment in segments)
        if not pages:
            return None
        engine.device.lock(base)
        if engine.device.could_make_room(pages, below):
            copied = engine.leave_host(segments) if self._policy.exclusive else []
            if engine.device.make_room(pages, below):
                self._to_device(engine, session, base, segments, urgency, copied)
                return True
            engine.back_in_host(copied)
        engine.device.unlock(base)
        return False

    def _put_in(self, engine: Engine, segments: list[int]) -> None:
        """Turn reserved pages into cached ones. Another request may have inserted some of the segments since."""
        engine.device.reserved -= sum(self._pages[segment] for segment in segments)
        engine.device.insert([segment for segment in segments if segment not in engine.device], self._now_s)

    def _spill(self, engine: Engine, segment: int) -> None:
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

    def _written(self, engine: Engine, segment: int) -> None:
        engine.device.unlock(segment)
        if engine.queue and not engine.busy:  # for room, perhaps
            self._schedule(engine)

    def _stored(self, engine: Engine, segment: int) -> bool:
        return segment in engine.drive and engine.drive_ready_s[segment] <= self._now_s

    def _bytes(self, segments: Iterable[int]) -> int:
        return sum(self._pages[segment] for segment in segments) * self._cost.page_bytes

    def _worth_reading(self, engine: Engine, base: int, request: Request, n_bytes: int) -> bool:
        """Whether reading ``n_bytes`` more after ``base`` is faster than computing them."""
        if not self._policy.break_even:
            return True
        wait_s = engine.reads.backlog_s()
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
        self.outcome.context_tokens.append(sum(self._workload.end(head) for head in self._head.values()))
        self.outcome.alive.append(alive)
        self.outcome.on_device.append(on_device)
        self.outcome.restorable.append(restorable)
