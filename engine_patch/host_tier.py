"""The host tier: bounded host memory with pages that have left the device, or are about to, and with prefetched ones.

Every page in it is stored, so that nothing is lost with a copy: a look-up asks the stores, and a restore takes what is
here from here. A page comes in by a *demotion*, a copy from the device, or by a *fetch*, a read from the drive. In both
cases its checksums are computed from the bytes that lie here once nothing writes to them any more, and it is served
only after that. They cover fingerprint, key, layer and bytes, and are verified at every restore. So a page of other
weights, a page in the wrong place, and one that has changed since, are not served; memory in which one was found is not
used again.

What keeps a copy from being torn is the caller's: the tree locks a node that is demoted until its result is in, and
names the events after which its pages may be read.

The tier is exclusive: of what it keeps, those runs leave first whose pages are all back on the device. They are not
deleted at once, since a page that has not changed need not be copied again when it leaves the device the next time.
Then the run leaves that is worth least; without ``value``, the one that was used longest ago. Before all of these, an
account gives that has more than its quota, until it has no more than that; and what comes in for it displaces nothing
but its own.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from agentstate.pages import PLANNED, LayerwiseReader, Need, PageKeys, PageStore
from engine_patch.accounts import Accounts
from engine_patch.feeds import Piece, Reading, Source
from engine_patch.host_memory import HostMemory
from engine_patch.host_reading import HostRun, HostSegment, HostStream
from engine_patch.transfer import CopyLane, DevicePages, PageNumbers

logger = logging.getLogger(__name__)

# A run is as long as a drive and a bus like their copies, and a small part of the tier: it leaves as a whole.
_RUN_BYTES = 32 << 20
_RUNS_AT_LEAST = 16

# What the pages of a session are worth here, of all sessions alike; higher stays longer.
Value = Callable[[str | None, PageKeys], float]


@dataclass
class HostStats:
    """Counters since the engine started, of one pool: ``pages_demoted`` were copied from the device, ``pages_fetched``
    read from the drive, ``pages_known`` demoted or fetched again while they were here. For ``pages_refused`` there was
    no room that others should leave. ``pages_evicted`` left for others, ``pages_wrong`` were not what had been copied,
    and ``pages_used`` went to the device. ``pages`` are here now, and ``bytes`` is what their memory takes."""

    pages_demoted: int = 0
    pages_fetched: int = 0
    pages_known: int = 0
    pages_refused: int = 0
    pages_evicted: int = 0
    pages_wrong: int = 0
    pages_used: int = 0
    pages: int = 0
    bytes: int = 0


class HostTier:
    """The host tier of one rank: the memory, its order and its threads, for all pools (`pool`).

    ``n_bytes`` bounds the memory of the pages; what is known of them is about a thousandth of that. ``verify_threads``
    verify what is restored. ``accounts`` tells whose pages are, and what those may have. Thread-safe.
    """

    def __init__(self, n_bytes: int, device: torch.device, verify_threads: int = 2, accounts: Accounts | None = None):
        self._accounts = accounts or Accounts()
        # The bytes that are charged to each account. Under the mutex.
        self.held: Counter[str] = Counter()
        # Asked at every eviction, for every run: it must be fast, and may be called from any thread.
        self.value: Value | None = None
        self.memory = HostMemory(n_bytes, device)
        self.verifier = ThreadPoolExecutor(verify_threads, thread_name_prefix="agentstate-verify")
        # Held for short: the scheduler takes it.
        self.mutex = threading.Lock()
        self._runs: dict[int, tuple[HostRun, HostPool]] = {}
        self._ticks = 0
        # Copies must not wait for a drive: device pages are locked until they are made.
        self._copies, self._fetches = _Worker("agentstate-demote"), _Worker("agentstate-fetch")

    @property
    def n_bytes(self) -> int:
        return self.memory.n_bytes

    def copy(self, work: Callable[[], None]) -> None:
        self._copies.add(work)

    def fetch(self, work: Callable[[], None]) -> None:
        self._fetches.add(work)

    def drain_copies(self) -> None:
        """Wait until nothing reads device memory."""
        self._copies.drain()

    def drain(self) -> None:
        """Wait for everything that has been asked for."""
        self._copies.drain()
        self._fetches.drain()

    def tick(self) -> int:
        """The next moment, in an order of their own. Under the mutex."""
        self._ticks += 1
        return self._ticks

    def begin(self, pool: HostPool, keys: PageKeys, session_id: str | None, since: int) -> HostRun | None:
        """A run of ``keys`` to be filled, in memory that is free or that others leave: those that were used before
        ``since`` and are worth less than the pages. None if that is too little. If it is not entered, its memory is the
        caller's to give back."""
        geometry = pool.geometry
        n_bytes = len(keys) * geometry.page_bytes
        account = self._accounts.of(session_id)
        worth = None if self.value is None else self.value(session_id, keys)
        while (piece := self.memory.take(n_bytes)) is None:
            if n_bytes > self.memory.n_bytes:
                return None
            with self.mutex:
                victim = self._least(worth, since, account, n_bytes)
                if victim is None:
                    return None
                run, of_pool = victim
                of_pool.stats.pages_evicted += of_pool.take_out(run)
        return HostRun(pool.fingerprint, geometry, keys, piece, session_id, account)

    def _least(self, worth: float | None, since: int, account: str, n_bytes: int) -> tuple[HostRun, HostPool] | None:
        """What is to leave next, for so many bytes of an account, of that worth. Under the mutex."""
        value = self.value
        limits = self._accounts.limits("host")
        above = {name for name, limit in limits.items() if self.held[name] > limit}
        its_own_only = account in limits and self.held[account] + n_bytes > limits[account]
        best: tuple[tuple[bool, bool, float, int], HostRun, HostPool] | None = None
        for run, pool in self._runs.values():
            stays = len(run.returned) < run.served
            if run.readers or run.tick >= since:
                continue
            its_own = run.account == account
            if its_own_only and not its_own:
                continue
            gives = run.account in above
            released = len(run.released) >= run.served
            own = 0.0 if value is None or released else value(run.session_id, run.keys)
            if stays and worth is not None and own > worth and (its_own or not gives):
                continue
            order = not gives, stays and not released, own, run.tick
            if best is None or order < best[0]:
                best = order, run, pool
        return None if best is None else best[1:]

    def enter(self, run: HostRun, pool: HostPool) -> None:
        """Keep a run until it is to `leave`. Under the mutex."""
        self._runs[id(run)] = run, pool
        self.held[run.account] += len(run.piece.memory)

    def leave(self, run: HostRun) -> None:
        """Keep a run no longer. Under the mutex."""
        del self._runs[id(run)]
        self.held[run.account] -= len(run.piece.memory)
        run.gone = True
        self.give_back(run)

    def give_back(self, run: HostRun) -> None:
        """Take the memory of a run if it is gone and nobody reads it. Under the mutex."""
        if run.gone and not run.readers and not run.spoilt:
            self.memory.give(run.piece)

    def end(self) -> None:
        """Copy and read what was asked for, and nothing after that."""
        self._copies.close()
        self._fetches.close()

    def close(self) -> None:
        """After `end`, when no stream is open any more."""
        self.verifier.shutdown()
        self.memory.close()


class HostPool:
    """What the host tier has of one pool: pages of ``store``, with ``pages`` on the device, and on the drive, which
    ``reader`` reads. ``on_host`` gives what it has read where the processor can copy it (`ReadBackend.on_host`).

    ``lane`` is what demotions are queued on. ``results`` has one entry a demotion, in order: whether all of its pages
    are here. Thread-safe.
    """

    def __init__(
        self,
        tier: HostTier,
        store: PageStore,
        pages: DevicePages,
        reader: LayerwiseReader,
        on_host: Callable[[Sequence[np.ndarray | torch.Tensor]], Sequence[np.ndarray]],
    ):
        self.stats = HostStats()
        self.results: deque[bool] = deque()
        self.geometry = pages.geometry
        self.lane = CopyLane(pages.device)
        self._tier = tier
        self._store = store
        self._device = pages
        self._reader = reader
        self._on_host = on_host
        self._pages: dict[bytes, tuple[HostRun, int]] = {}
        self._fetches: dict[str, _Fetch] = {}
        # How many demotions were asked for and done; each is one thread's.
        self._asked = self._done = 0
        self._streams = 0
        a_run = min(_RUN_BYTES, tier.n_bytes // _RUNS_AT_LEAST) // self.geometry.page_bytes
        block = self.geometry.block_pages
        # Whole blocks are verified by one checksum.
        self._pages_a_run = max(1, a_run - a_run % block if a_run > block else a_run)

    @property
    def fingerprint(self) -> bytes:
        return self._store.fingerprint

    def has(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of ``keys`` are here."""
        with self._tier.mutex:
            return [key in self._pages for key in keys]

    def demote(
        self,
        keys: Sequence[bytes],
        numbers: torch.Tensor | PageNumbers,
        ready: Sequence[torch.Event] = (),
        session_id: str | None = None,
    ) -> None:
        """Copy pages that are about to leave the device, those of them that are stored and not here. ``numbers`` are
        their page numbers there, which the caller keeps unchanged until the result is in; ``ready`` are the events
        after which they may be read."""
        self._asked += 1
        self._tier.copy(partial(self._demote, keys, numbers, ready, session_id))

    def _demote(
        self,
        keys: Sequence[bytes],
        numbers: torch.Tensor | PageNumbers,
        ready: Sequence[torch.Event],
        session_id: str | None,
    ) -> None:
        here = False
        try:
            self._copy(keys, numbers, ready, session_id)
            here = all(self.has(keys))
        except Exception:
            logger.exception("agentstate: pages could not be copied to host memory; they are on the drive")
        finally:
            self._done += 1
            self.results.append(here)

    def _copy(
        self,
        keys: Sequence[bytes],
        numbers: torch.Tensor | PageNumbers,
        ready: Sequence[torch.Event],
        session_id: str | None,
    ) -> None:
        new, since = self._missing(keys, session_id)
        if new:
            self.lane.after(ready)
        for some in self._runs(new):
            with self._filling(PageKeys.of(keys[page] for page in some), session_id, since) as run:
                if run is None:
                    break
                run.spoilt = True
                try:
                    place = self._device.place(numbers[some], self.lane)
                    for layer in range(self.geometry.layers):
                        self._device.gather(layer, place, run.rows(layer), self.lane)
                finally:
                    # Nothing may arrive in the memory any more when it is summed up, or is another run's.
                    self.lane.finish()
                    run.spoilt = False
                self.stats.pages_demoted += self._enter(run)
        self._touch(keys, session_id)

    def _missing(self, keys: Sequence[bytes], session_id: str | None) -> tuple[list[int], int]:
        """Which of ``keys`` are stored and not here. The others are used from the moment on that is given back: what
        comes in for these must not drive them out."""
        stored = self._store.stored(keys)
        with self._tier.mutex:
            since = self._tier.tick()
            here = [key in self._pages for key in keys]
        self._touch(keys, session_id)
        self.stats.pages_known += sum(here)
        return [page for page, known in enumerate(here) if stored[page] and not known], since

    def _touch(self, keys: Sequence[bytes], session_id: str | None) -> None:
        """``keys`` are about to leave the device, or to be needed. The end of a chain is the first that others
        replace."""
        with self._tier.mutex:
            for key in reversed(list(keys)):
                if (found := self._pages.get(key)) is not None:
                    run, slot = found
                    run.returned.discard(slot)
                    run.released.discard(slot)
                    run.tick, run.session_id = self._tier.tick(), session_id or run.session_id

    def _runs(self, pages: Sequence[int]) -> Iterator[list[int]]:
        for first in range(0, len(pages), self._pages_a_run):
            yield list(pages[first : first + self._pages_a_run])

    @contextmanager
    def _filling(self, keys: PageKeys, session_id: str | None, since: int) -> Iterator[HostRun | None]:
        """A run to fill within it, and to `_enter`; None when there is no room."""
        run = self._tier.begin(self, keys, session_id, since)
        try:
            yield run
        finally:
            if run is None:
                self.stats.pages_refused += len(keys)
            elif not run.served and not run.spoilt:
                self._tier.memory.give(run.piece)

    def _enter(self, run: HostRun) -> int:
        """Sum up a run that is filled, and serve those of its pages that are still stored, for these weights. Returns
        their number."""
        run.sum_up()
        with self._tier.mutex:
            if run.header.fingerprint != self._store.fingerprint:
                return 0
            # Not before: what is erased leaves the store first, and then what is here.
            stored = self._store.stored(run.keys)
            own = [slot for slot, key in enumerate(run.keys) if stored[slot] and key not in self._pages]
            if own:
                run.tick, run.served = self._tier.tick(), len(own)
                self._tier.enter(run, self)
                self._pages.update((run.keys[slot], (run, slot)) for slot in own)
                self.stats.pages = len(self._pages)
                self.stats.bytes += len(run.piece.memory)
            return len(own)

    def fetch(self, session_id: str, keys: Sequence[bytes], need: Need = PLANNED) -> Callable[[], float | None]:
        """Begin to read those of a session's stored ``keys`` that are not here, or go on with that: what tells which
        fraction of them is here once there will not be more, None until then."""
        with self._tier.mutex:
            before = self._fetches.get(session_id)
            if before is not None and not before.stopped and before.keys == keys:
                before.need = min(before.need, need)
                return before.fraction
            fetch = self._fetches[session_id] = _Fetch(self, keys, need)
        if before is not None:
            before.stop()
        self._tier.fetch(partial(self._fetch, session_id, fetch))
        return fetch.fraction

    def _fetch(self, session_id: str, fetch: _Fetch) -> None:
        try:
            missing, since = self._missing(fetch.keys, session_id)
            for some in self._runs(missing):
                keys = PageKeys.of(fetch.keys[page] for page in some)
                if fetch.stopped or not self._read(fetch, keys, session_id, since):
                    break
            self._touch(fetch.keys, session_id)
        except Exception:
            logger.exception("agentstate: pages could not be read to host memory")
        finally:
            fetch.over = True
            with self._tier.mutex:
                if self._fetches.get(session_id) is fetch:
                    del self._fetches[session_id]

    def _read(self, fetch: _Fetch, keys: PageKeys, session_id: str, since: int) -> bool:
        """Read a run; False when no more is to be read."""
        with self._filling(keys, session_id, since) as run:
            if run is None:
                return False
            try:
                pin = self._store.pin(keys)
            except KeyError:
                return True
            with self._reader.open(pin, fetch.need, background=True) as stream:
                for chunk in stream:
                    if fetch.stopped or chunk.unusable():
                        # The restore that needs a page which is wrong says so.
                        return not fetch.stopped
                    for segment, arrays in chunk.parts:
                        rows = run.rows(chunk.layer, segment.first, segment.pages)
                        for target, source in zip(rows, self._on_host(arrays), strict=True):
                            np.copyto(target, source)
            self.stats.pages_fetched += self._enter(run)
        return True

    def overtaken(self, keys: Sequence[bytes]) -> None:
        """A request restores ``keys``: what is fetched of the same chain would be read twice."""
        with self._tier.mutex:
            fetches = list(self._fetches.values())
        for fetch in fetches:
            if keys and fetch.concerns(keys):
                fetch.stop()

    def pieces(self, keys: Sequence[bytes]) -> list[Piece]:
        """Split the chain ``keys``, in order, into pieces that are here, each with a stream that keeps them here, and
        pieces that are not."""
        pieces: list[tuple[int, list[HostSegment]]] = []
        with self._tier.mutex:
            for page, key in enumerate(keys):
                here = self._pages.get(key)
                if not pieces or bool(pieces[-1][1]) is (here is None):
                    pieces.append((page, []))
                if here is None:
                    continue
                run, slot = here
                segments = pieces[-1][1]
                last = segments[-1] if segments else None
                if last is not None and last.run is run and last.slot + last.pages == slot:
                    segments[-1] = last._replace(pages=last.pages + 1)
                else:
                    segments.append(HostSegment(run, slot, 1, page - pieces[-1][0]))
            found = [segments for _, segments in pieces if segments]
            for segments in reversed(found):
                for segment in reversed(segments):
                    segment.run.readers += 1
                    segment.run.released.difference_update(range(segment.slot, segment.slot + segment.pages))
                    segment.run.tick = self._tier.tick()
            self._streams += len(found)
        ends = [first for first, _ in pieces[1:]] + [len(keys)]
        return [
            Piece(range(first, end), Reading(self._stream(keys[first:end], segments), Source.HOST))
            if segments
            else Piece(range(first, end))
            for (first, segments), end in zip(pieces, ends, strict=True)
        ]

    def _stream(self, keys: Sequence[bytes], segments: list[HostSegment]) -> HostStream:
        return HostStream(
            self._store.fingerprint,
            PageKeys.of(keys),
            segments,
            verify=self._tier.verifier,
            wrong=self._found_wrong,
            leave=self._left,
            later=self._tier.copy,
        )

    def _left(self, segments: Sequence[HostSegment], consumed: Sequence[HostSegment]) -> None:
        """A stream of ``segments`` is over, and those ``consumed`` are on the device."""
        with self._tier.mutex:
            self._streams -= 1
            for segment in consumed:
                segment.run.returned.update(range(segment.slot, segment.slot + segment.pages))
                self.stats.pages_used += segment.pages
            for segment in segments:
                segment.run.readers -= 1
                self._tier.give_back(segment.run)

    def _found_wrong(self, run: HostRun, keys: Sequence[bytes]) -> None:
        logger.error(
            "agentstate: %d page(s) in host memory are not what was copied there; they are read from the drive, and "
            "their memory is not used any more",
            len(keys),
        )
        with self._tier.mutex:
            self.stats.pages_wrong += len(keys)
            run.spoilt = True
            self.take_out(run)

    def take_out(self, run: HostRun) -> int:
        """Serve none of a run's pages any more: how many that were. Under the tier's mutex."""
        if run.gone:
            return 0
        own = [key for slot, key in enumerate(run.keys) if self._pages.get(key) == (run, slot)]
        for key in own:
            del self._pages[key]
        self.stats.pages = len(self._pages)
        self.stats.bytes -= len(run.piece.memory)
        self._tier.leave(run)
        return len(own)

    def forget(self, keys: Collection[bytes]) -> None:
        """Serve none of ``keys`` any more, which the store has removed, nor what lies in a run with them."""
        with self._tier.mutex:
            for key in keys:
                if (found := self._pages.get(key)) is not None:
                    self.take_out(found[0])

    def forget_unstored(self) -> None:
        """`forget` what is not stored any more."""
        with self._tier.mutex:
            keys = list(self._pages)
        self.forget([key for key, stored in zip(keys, self._store.stored(keys), strict=True) if not stored])

    def release(self, keys: Collection[bytes], session_id: str) -> None:
        """A session has left ``keys``: a run of such pages leaves before those that are worth something, unless another
        session asked for it last. One that is used again is as before."""
        with self._tier.mutex:
            for key in keys:
                if (found := self._pages.get(key)) is not None and found[0].session_id == session_id:
                    found[0].released.add(found[1])

    def move(self, store: PageStore) -> None:
        """Forget everything, and keep pages of another store from now on."""
        self.stop()
        self._tier.drain()
        with self._tier.mutex:
            for run, _ in list(self._pages.values()):
                self.take_out(run)
            self._store = store

    def stop(self) -> None:
        """Read nothing from the drive that has not begun."""
        with self._tier.mutex:
            fetches = list(self._fetches.values())
        for fetch in fetches:
            fetch.stop()

    def kept(self) -> dict[str, int]:
        return {
            "demotions": self._asked - self._done,
            "untaken_demotions": len(self.results),
            "fetches": len(self._fetches),
            "host_streams": self._streams,
        }

    def stat(self) -> dict[str, int]:
        return dataclasses.asdict(self.stats)


class _Fetch:
    """The pages ``keys`` on their way to host memory, and how urgent that is."""

    def __init__(self, pool: HostPool, keys: Sequence[bytes], need: Need):
        self.keys = keys
        self.need = need
        self.stopped = False
        self.over = False
        self._pool = pool
        self._set = frozenset(keys)

    def fraction(self) -> float | None:
        if not self.over and not self.stopped:
            return None
        return sum(self._pool.has(self.keys)) / len(self.keys) if self.keys else 0.0

    def concerns(self, keys: Sequence[bytes]) -> bool:
        """Whether it is of the chain whose pages ``keys`` are: one goes on from the other, or ends within it."""
        return keys[-1] in self._set or self.keys[-1] in keys

    def stop(self) -> None:
        self.stopped = True


class _Worker:
    """A thread that does one thing after another."""

    def __init__(self, name: str):
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def add(self, work: Callable[[], None]) -> None:
        self._queue.put(work)

    def drain(self) -> None:
        self._queue.join()

    def close(self) -> None:
        """Do what was asked for, and end."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                work()
            except Exception:
                logger.exception("agentstate: work on host memory failed")
            finally:
                self._queue.task_done()
        self._queue.task_done()
