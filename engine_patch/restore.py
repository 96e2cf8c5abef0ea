"""Restoring pages, extent → staging → device, layer by layer under the forward that needs them."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from agentstate.pages import Chunk, Destination, LayerwiseReader, PageStore, Stream
from engine_patch.arrivals import Arrivals
from engine_patch.prefetch import Prefetches
from engine_patch.staging import PinnedMemory
from engine_patch.transfer import DevicePages, Place

logger = logging.getLogger(__name__)


@dataclass
class RestoreStats:
    """Counters since the engine started. Of ``bytes_read``, ``bytes_straight`` were read to where they are needed and
    passed no staging. ``pages_failed`` were read and not used: damaged, or not readable; ``timed_out`` are the batches
    that had not arrived yet when they were abandoned, because a drive did not answer.
    ``first_layer_s`` is how long it took until the first layer of a batch was there, of ``seconds`` in all, and
    ``forward_wait_s`` how long forwards waited for a layer."""

    restores: int = 0
    pages_restored: int = 0
    bytes_read: int = 0
    bytes_straight: int = 0
    seconds: float = 0.0
    first_layer_s: float = 0.0
    forward_wait_s: float = 0.0
    pages_failed: int = 0
    requests_failed: int = 0
    timed_out: int = 0


class Source(StrEnum):
    """Where pages are restored from: ``cold`` is the disk; ``host`` is staging, which they are in or on their way to
    because they were read ahead or prefetched; ``device`` is the disk too, for no request yet but for a prefetch to
    the device."""

    COLD = "cold"
    HOST = "host"
    DEVICE = "device"


class RestoredRequest(NamedTuple):
    """What one request got back: ``n_bytes`` as they were read, from one source a pool."""

    pages: int
    n_bytes: int
    sources: frozenset[Source]


@dataclass(frozen=True)
class Restored:
    """What one batch brought back to each of its requests that did not fail, by rid, in ``seconds``, of which the
    forward waited ``waited_s``, and for each layer ``layer_waits_s``."""

    requests: Mapping[str, RestoredRequest]
    seconds: float
    waited_s: float = 0.0
    layer_waits_s: tuple[float, ...] = ()

    @property
    def n_bytes(self) -> int:
        return sum(of_request.n_bytes for of_request in self.requests.values())

    @property
    def sources(self) -> frozenset[Source]:
        return frozenset().union(*(of_request.sources for of_request in self.requests.values()))


class Finished(NamedTuple):
    """The rids whose pages must not be used, and what was restored; None when that is nothing. ``numbers`` are the
    batch's device pages, a tensor a pool; ``writing`` is whether the drive may still write to them: when they are
    `addressable` and the batch was abandoned."""

    failed: set[str]
    restored: Restored | None = None
    numbers: tuple[torch.Tensor, ...] = ()
    writing: bool = False


@dataclass
class _Load:
    """One request's restore: its pages are those of ``stream`` from ``offset`` on. ``stream`` is None when a page went
    missing between the match and now. Of the ``n_bytes`` that have been read, ``straight`` passed no staging."""

    rid: str
    keys: Sequence[bytes]
    numbers: torch.Tensor
    stream: Stream | None
    source: Source
    offset: int = 0
    n_bytes: int = 0
    straight: int = 0
    # Of its pages from one to another: every layer asks for the same.
    places: dict[tuple[int, int], Place] = field(default_factory=dict)

    def place(self, device: DevicePages, first: int, last: int) -> Place:
        """Where its pages from ``first`` to before ``last`` are on the device."""
        if (place := self.places.get((first, last))) is None:
            place = self.places[first, last] = device.place(self.numbers[first:last], device.inbound)
        return place

    def own(self, first: int, count: int) -> slice:
        """Which of ``count`` pages of the stream, from ``first`` on, are the request's."""
        return slice(max(0, self.offset - first), max(0, min(count, self.offset + len(self.keys) - first)))

    def destination(self, device: DevicePages) -> Destination | None:
        """Where its pages go when they can be read there."""
        if not device.addressable:
            return None
        own = range(self.offset, self.offset + len(self.keys))

        @cache
        def runs(pages: range) -> list[slice]:
            return device.runs(self.numbers[pages.start - own.start : pages.stop - own.start])

        def rows(layer: int, pages: range) -> list[list[np.ndarray]]:
            return device.memory(layer, runs(pages))

        return Destination(own, rows)

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()


@dataclass
class _Batch:
    loads: list[_Load]
    ready: Sequence[torch.Event]
    failed: set[str] = field(default_factory=set)
    restored: Restored | None = None
    # Held while pages are copied to the device: none are any more once the batch is abandoned and this was free.
    landing: threading.Lock = field(default_factory=threading.Lock)


_Queue = queue.Queue[tuple[int, _Batch] | None]


class _Abandoned(Exception):
    """Nobody waits for the batch any more."""


class Restorer:
    """Loads for the scheduler: queued a request at a time, started a batch at a time, finished after its forward.

    Every page is verified before its layer is released. A request whose page cannot be used fails alone; its
    remaining pages are left out, the other requests of its batch are served, and every layer is released all the
    same, since the forward waits for the batch.

    Where the device's memory is the host's and aligned (`DevicePages.addressable`), what has not been read when a batch
    starts is read straight into its pages: a bad page's bytes then lie where those of a recomputed request will.

    On a GPU a chunk's copies are queued while the next ones are read, and are waited for once a layer, at its end.
    The memory of a chunk is read into again when its own copies are over.
    """

    def __init__(self, store: PageStore, pages: DevicePages, reader: LayerwiseReader, timeout_s: float | None = None):
        self.stats = RestoreStats()
        self.arrivals = Arrivals(pages.geometry.layers, timeout_s)
        self.prefetches = Prefetches(store, reader)
        self._store = store
        self._pages = pages
        self._reader = reader
        self._pinned = PinnedMemory(reader.staging, pages.device)
        self._counting = threading.Lock()
        self._pending: dict[str, _Load] = {}
        self._batches: dict[int, _Batch] = {}
        # What is loaded ahead has a thread of its own: a forward must not wait for it.
        self._queues: dict[bool, _Queue] = {ahead: queue.Queue() for ahead in (False, True)}
        self._threads = [
            threading.Thread(target=self._run, args=(batches,), name="agentstate-restore", daemon=True)
            for batches in self._queues.values()
        ]
        for thread in self._threads:
            thread.start()

    def queue(self, rid: str, keys: Sequence[bytes], numbers: torch.Tensor, source: Source = Source.COLD) -> None:
        """Queue ``keys`` for the device pages ``numbers``. Reading begins now, if it has not begun before: then
        ``source`` is host memory."""
        if (ahead := self.prefetches.take(keys)) is not None:
            stream, offset = ahead
            self._pending[rid] = _Load(rid, keys, numbers, stream, Source.HOST, offset)
            return
        try:
            stream = self._reader.open(self._store.pin(keys))
        except KeyError:
            stream = None
        self._pending[rid] = _Load(rid, keys, numbers, stream, source)

    def cancel(self, rid: str) -> bool:
        load = self._pending.pop(rid, None)
        if load is not None and load.stream is not None:
            load.stream.discard()
        return load is not None

    def start(self, ready: Sequence[torch.Event] = (), *, ahead: bool = False) -> int:
        """Start writing everything queued to the device as one batch: its index in ``arrivals``, or -1 when nothing
        was queued. What is ``ahead`` of any request is in no other batch's way.

        ``ready`` are the events after which the device pages may be written: a forward that was launched before may
        still write a last token into a page that has been freed and given to this batch.
        """
        if not self._pending:
            return -1
        batch = _Batch(list(self._pending.values()), ready)
        self._pending = {}
        index = self.arrivals.begin()
        self._batches[index] = batch
        self._queues[ahead].put((index, batch))
        return index

    def landed(self, index: int) -> bool:
        """Whether `finish` would not wait."""
        return self.arrivals.landed(index)

    def finish(self, index: int) -> Finished:
        """Wait until batch ``index`` stops writing to the device, or is abandoned, and tell what became of it."""
        complete = self.arrivals.finish(index)
        batch = self._batches.pop(index, None)
        if batch is None:
            return Finished(set())
        failed = batch.failed if complete else {load.rid for load in batch.loads}
        self.stats.requests_failed += len(failed)
        if late := not self.arrivals.landed(index):
            self.stats.timed_out += 1
            logger.error(
                "agentstate: the drive has not answered in time; %d request(s) are recomputed, and nothing is restored "
                "until it does (AGENTSTATE_DRIVE_TIMEOUT_S)",
                len(failed),
            )
            with batch.landing:
                self._pages.inbound.finish()
        numbers = torch.cat([load.numbers for load in batch.loads])
        return Finished(failed, batch.restored if complete else None, (numbers,), late and self._pages.addressable)

    def drain(self) -> None:
        """Wait for what runs."""
        for batches in self._queues.values():
            batches.join()

    def reset(self) -> None:
        """Forget what is queued and wait for what runs."""
        for rid in list(self._pending):
            self.cancel(rid)
        self.prefetches.clear()
        self.drain()
        self._batches.clear()
        self.arrivals.reset()

    def close(self) -> None:
        for rid in list(self._pending):
            self.cancel(rid)
        self.prefetches.clear()
        for batches in self._queues.values():
            batches.put(None)
        for thread in self._threads:
            thread.join()
        self._reader.close()
        self._pinned.close()

    def _run(self, batches: _Queue) -> None:
        while (item := batches.get()) is not None:
            index, batch = item
            try:
                with ExitStack() as closing:
                    for load in batch.loads:
                        closing.callback(load.close)
                    # First, since the staging memory is another stream's after the others.
                    closing.callback(self._pages.inbound.finish)
                    self._restore(index, batch)
            except Exception as error:
                if not isinstance(error, _Abandoned):
                    logger.exception("agentstate: a restore failed; its requests are recomputed")
                    self._drop_all(batch)
                # Not before everything is closed: after this the device pages are someone else's.
                self.arrivals.fail(index, error)
            finally:
                batches.task_done()
        batches.task_done()

    def _drop_all(self, batch: _Batch) -> None:
        """Let the requests of a batch not match the same pages again, or they would fail for ever."""
        try:
            for load in batch.loads:
                self._drop(load, range(len(load.keys)))
        except Exception:
            logger.exception("agentstate: pages that could not be restored could not be dropped")

    def _restore(self, index: int, batch: _Batch) -> None:
        started, first_layer_s = time.perf_counter(), 0.0
        batch.failed.update(load.rid for load in batch.loads if load.stream is None)
        loads = [(load, load.stream) for load in batch.loads if load.stream is not None]
        self._pages.inbound.after(batch.ready)
        for load, stream in loads:
            stream.hurry(load.destination(self._pages))
        for layer in range(self._pages.geometry.layers):
            for load, stream in loads:
                for chunk in stream.layer(layer):
                    self._require_wanted(index)
                    self._land(index, batch, load, chunk)
                    load.n_bytes += chunk.n_bytes
                    load.straight += 0 if chunk.parts else chunk.n_bytes
            self._pages.inbound.finish()
            if layer == 0:
                first_layer_s = time.perf_counter() - started
            if layer == self._pages.geometry.layers - 1:
                # Before whoever waits for the batch goes on.
                seconds = time.perf_counter() - started
                batch.restored = self._record(batch, first_layer_s, seconds)
            self.arrivals.complete(index, layer)

    def _require_wanted(self, index: int) -> None:
        if self.arrivals.abandoned(index):
            raise _Abandoned

    def _land(self, index: int, batch: _Batch, load: _Load, chunk: Chunk) -> None:
        """Write what a chunk has of the request's pages to the device, unless one must not be used."""
        # Also of a request that has failed already: it comes back, and must not find its other bad pages then.
        own = range(len(load.keys))
        if wrong := [page for at in chunk.wrong if (page := at - load.offset) in own]:
            self._reject(batch, load, wrong, chunk)
        if load.rid in batch.failed:
            return
        with batch.landing:
            self._require_wanted(index)
            for segment, _, arrays in chunk.parts:
                rows = load.own(segment.first, segment.pages)
                if rows.start < rows.stop:
                    first = segment.first - load.offset
                    place = load.place(self._pages, first + rows.start, first + rows.stop)
                    self._pages.scatter(chunk.layer, place, [array[rows] for array in arrays])
            chunk.keep_until = self._pages.inbound.fence()

    def _reject(self, batch: _Batch, load: _Load, wrong: list[int], chunk: Chunk) -> None:
        batch.failed.add(load.rid)
        self._drop(load, wrong)
        reason = str(chunk.unread[0][1]) if chunk.unread else "their bytes are not those that were written"
        logger.error(
            "agentstate: %d page(s) of request %s, the first one number %d, are unusable in layer %d (%s); "
            "the request is recomputed",
            len(wrong),
            load.rid,
            wrong[0],
            chunk.layer,
            reason,
        )

    def _drop(self, load: _Load, pages: Iterable[int]) -> None:
        if load.stream is not None:
            dropped = self._store.drop(load.stream.pin.copies(load.offset + page for page in pages))
            with self._counting:
                self.stats.pages_failed += dropped

    def _record(self, batch: _Batch, first_layer_s: float, seconds: float) -> Restored | None:
        requests = {
            load.rid: RestoredRequest(len(load.keys), load.n_bytes, frozenset({load.source}))
            for load in batch.loads
            if load.rid not in batch.failed
        }
        with self._counting:
            self.stats.restores += 1
            self.stats.pages_restored += sum(of_request.pages for of_request in requests.values())
            self.stats.bytes_read += sum(load.n_bytes for load in batch.loads)
            self.stats.bytes_straight += sum(load.straight for load in batch.loads)
            self.stats.first_layer_s += first_layer_s
            self.stats.seconds += seconds
        return Restored(requests, seconds) if requests else None
