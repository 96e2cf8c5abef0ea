"""Restoring pages, extent → staging → device, layer by layer under the forward that needs them."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch

from agentstate.pages import AWAITED, DEMAND, Chunk, LayerwiseReader, Need, PageStore, Urgency
from agentstate.pages.handles import is_of_drive
from engine_patch.arrivals import Arrivals
from engine_patch.failures import NO_STORED_PAGE, Unusable
from engine_patch.feeds import Feed, Load, Portion, Reading, Source, pieces, refined
from engine_patch.host_tier import HostPool
from engine_patch.prefetch import Prefetches
from engine_patch.shared_pool import SharedPool
from engine_patch.staging import PinnedMemory
from engine_patch.transfer import CopyLane, DevicePages, PageNumbers

logger = logging.getLogger(__name__)

# How many copies of pages that could not be read are remembered.
_REMEMBERED_UNREAD = 100_000


@dataclass
class RestoreStats:
    """Counters since the engine started. ``restores`` are the batches that brought a request its pages. Of
    ``bytes_read``, ``bytes_straight`` were read to where they are needed, past staging; ``bytes_host`` came from the
    host tier instead, with ``pages_host`` of the ``pages_restored``; ``pages_shared`` came from the shared store.
    ``pages_failed`` were
    damaged, or could not be read in two restores, and were dropped; ``pages_unread`` could not be read this time and
    were kept; ``timed_out`` are the batches that had not arrived yet when they were abandoned, because a drive did not
    answer.
    Where rows come as attention chooses them, ``bytes_chosen`` were needed for those that forwards waited for, and
    ``bytes_before_token`` had been read when the first forward of a batch was over.
    ``first_layer_s`` is the time until the first layer of such a batch had arrived, of ``seconds`` in all, and
    ``forward_wait_s`` the time that forwards waited for layers."""

    restores: int = 0
    pages_restored: int = 0
    bytes_read: int = 0
    bytes_straight: int = 0
    pages_host: int = 0
    bytes_host: int = 0
    pages_shared: int = 0
    bytes_chosen: int = 0
    bytes_before_token: int = 0
    seconds: float = 0.0
    first_layer_s: float = 0.0
    forward_wait_s: float = 0.0
    pages_failed: int = 0
    pages_unread: int = 0
    requests_failed: int = 0
    timed_out: int = 0


@dataclass
class PreloadStats:
    """Counters since the engine started: ``preloads`` whose ``pages`` are in the tree, whether a request or a prefetch
    asked for them; those that ``failed``, and those that are ``under_way`` now. ``requests`` were deferred until a
    preload that a request asked for had arrived; ``deferred`` are now. ``followed`` are requests that waited a step for
    pages that another one had just restored."""

    preloads: int = 0
    pages: int = 0
    failed: int = 0
    under_way: int = 0
    requests: int = 0
    deferred: int = 0
    followed: int = 0


class RestoredRequest(NamedTuple):
    """What one request got back. ``n_bytes`` are bytes as they were read; those that several requests needed count for
    one of them. Of the ``pages``, ``host_pages`` came from the host tier, ``shared_pages`` from the shared store."""

    pages: int
    n_bytes: int
    sources: frozenset[Source]
    host_pages: int = 0
    shared_pages: int = 0


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
    """The rids whose pages must not be used, and what was restored; None when that is nothing. ``numbers`` find the
    batch's device pages, a tensor a pool, for a quarantine; ``writing`` is whether the drive may still write to them:
    when they are `addressable` and the batch was abandoned. ``unusable`` are the pages that made requests fail, by rid:
    none for those that failed for another reason."""

    failed: set[str]
    restored: Restored | None = None
    numbers: tuple[Callable[[], torch.Tensor], ...] = ()
    writing: bool = False
    unusable: Unusable = {}


@dataclass
class Batch:
    loads: list[Load]
    feeds: list[Feed]
    need: Need
    lane: CopyLane
    ready: Sequence[torch.Event]
    failed: set[str] = field(default_factory=set)
    # Why they failed, by rid: the pages at fault, or None if no page is.
    unusable: dict[str, set[bytes] | None] = field(default_factory=dict)
    # Copies of pages, as `PageStore.drop` takes them: those that are wrong, and those that the drive failed to read.
    wrong: set[tuple[bytes, int]] = field(default_factory=set)
    unread: set[tuple[bytes, int]] = field(default_factory=set)
    restored: Restored | None = None
    n_bytes: int = 0
    straight: int = 0
    in_memory: int = 0
    # Held while pages are copied to the device. Once the batch is abandoned, whoever has held this lock since knows
    # that no more are copied.
    landing: threading.Lock = field(default_factory=threading.Lock)

    @property
    def background(self) -> bool:
        """Whether no forward waits for it."""
        return self.need.urgency is not Urgency.AWAITED

    def numbers(self) -> torch.Tensor:
        """The device pages of all loads."""
        return torch.cat([load.numbers[:] for load in self.loads])


class _Batches:
    """Batches that wait for the thread of their urgency, which takes the one that is due first, then the oldest: none
    waits for a less urgent one."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: dict[int, Batch] = {}
        self._running = 0
        self._closed = False

    def put(self, index: int, batch: Batch) -> None:
        with self._changed:
            self._waiting[index] = batch
            self._changed.notify_all()

    def hasten(self, batch: Batch, need: Need) -> None:
        """Let a batch be as urgent as ``need``, if it is less so, also while it runs."""
        with self._changed:
            batch.need = min(batch.need, need)
            self._changed.notify_all()

    def take(self, urgency: Urgency) -> tuple[int, Batch] | None:
        """Wait for a batch, whose end is to be told by `over`. None once it is closed and none is left."""
        with self._changed:
            while True:
                mine = [(batch.need, index) for index, batch in self._waiting.items() if batch.need.urgency == urgency]
                if mine:
                    _, index = min(mine)
                    self._running += 1
                    return index, self._waiting.pop(index)
                if self._closed:
                    return None
                self._changed.wait()

    def over(self) -> None:
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    def is_queued(self, index: int) -> bool:
        """Whether its thread has not taken a batch yet."""
        return index in self._waiting

    @property
    def unfinished(self) -> int:
        return len(self._waiting) + self._running

    def join(self) -> None:
        """Wait until none is left."""
        with self._changed:
            self._changed.wait_for(lambda: not self.unfinished)

    def close(self) -> None:
        """No more follow."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Abandoned(Exception):
    """Nobody waits for the batch any more."""


class Restorer:
    """Loads for the scheduler: queued a request at a time, started a batch at a time, finished after its forward.

    Every page is verified before its layer is released. A request whose page cannot be used fails alone; its
    remaining pages are left out, the other requests of its batch are served, and every layer is released all the
    same, since the forward waits for the batch. Wrong pages are dropped once nobody waits for the batch any more. A
    page that could not be read is kept, and dropped when the drive fails to read it in a second restore: a page that
    is never read would cost a recomputation each time. Any other failure is no page's fault, and drops none.

    Pages that several requests of a batch need are read once and copied to all of them. An unusable page fails all
    requests that need it.

    What only the ``shared`` store has comes from there, and what the ``host`` tier has from there. If a page in host
    memory is wrong, it is gone, and the requests that need it are restored again, from the drive.

    If the device's memory is the host's and aligned (`DevicePages.addressable`), pages that have not been read when a
    batch starts are read straight into their place: a bad page's bytes then lie where those of a recomputed request
    will.

    On a GPU a chunk's copies are queued while the next chunks are read, and are waited for once a layer, at its end.
    A chunk's memory is reused when its own copies are over.
    """

    def __init__(
        self,
        store: PageStore,
        pages: DevicePages,
        reader: LayerwiseReader,
        timeout_s: float | None = None,
        host: HostPool | None = None,
        shared: SharedPool | None = None,
    ):
        self.stats = RestoreStats()
        self.arrivals = Arrivals(pages.geometry.layers, timeout_s)
        self.prefetches = Prefetches(store, reader, host=host, shared=shared)
        self._store = store
        self._host = host
        self._shared = shared
        self._pages = pages
        self._reader = reader
        self._pinned = PinnedMemory(reader.staging, pages.device)
        self._counting = threading.Lock()
        # Copies of pages that the drive failed to read in one restore; the latest last.
        self._unread: dict[tuple[bytes, int], None] = {}
        self._pending: dict[str, Load] = {}
        # The feeds of the pending loads.
        self._feeds: list[Feed] = []
        self._batches: dict[int, Batch] = {}
        self._begun = _Batches()
        self._threads = [
            threading.Thread(target=self._run, args=(urgency,), name="agentstate-restore", daemon=True)
            for urgency in Urgency
        ]
        for thread in self._threads:
            thread.start()

    def queue(self, rid: str, keys: Sequence[bytes], numbers: torch.Tensor | PageNumbers) -> None:
        """Queue ``keys`` for the device pages ``numbers``. Pages that are not being read already are read from now
        on."""
        self._pending[rid] = self._load(rid, keys, numbers, self._feeds, Source.COLD, DEMAND)

    def preload(
        self,
        rid: str,
        keys: Sequence[bytes],
        numbers: torch.Tensor | PageNumbers,
        ready: Sequence[torch.Event] = (),
        need: Need = DEMAND,
    ) -> int:
        """Load ``keys`` into the device pages ``numbers`` for no request that runs, as a batch of its own, and return
        its index. No forward and no more urgent batch waits for it. What cannot even begin fails as a batch, since
        other pools may have begun."""
        feeds: list[Feed] = []
        try:
            load = self._load(rid, keys, numbers, feeds, Source.DEVICE, need)
        except Exception:
            logger.exception("agentstate: pages could not be loaded ahead for %s", rid)
            for feed in feeds:
                feed.stream.discard()
            feeds, load = [], Load(rid, keys, numbers)
            load.missing = tuple(keys)
        return self._begin([load], feeds, ready, need)

    def hasten(self, index: int, need: Need) -> None:
        """Let a preload be as urgent as ``need``, if it is less so."""
        if (batch := self._batches.get(index)) is not None:
            for feed in batch.feeds:
                feed.stream.need(need)
            self._begun.hasten(batch, need)

    def _load(
        self,
        rid: str,
        keys: Sequence[bytes],
        numbers: torch.Tensor | PageNumbers,
        feeds: list[Feed],
        source: Source,
        need: Need,
    ) -> Load:
        """A load that is fed by ``feeds``, by what was read ahead, by the host tier, and by streams of its own; all but
        the first are added to ``feeds``."""
        load = Load(rid, keys, numbers)
        before = {id(feed.reading): feed for feed in feeds}
        split = refined(keys, pieces(keys, [feed.reading for feed in feeds]), self.prefetches.take)
        if self._host is not None:
            self._host.overtaken(keys)
            split = refined(keys, split, self._host.pieces)
        if self._shared is not None:
            further = partial(self._shared.pieces, need=need, background=source is Source.DEVICE)
            split = refined(keys, split, further)
        for piece in split:
            if (reading := piece.reading) is None:
                try:
                    pin = self._store.pin(keys[piece.pages.start : piece.pages.stop])
                except KeyError as missing:
                    load.missing += missing.args
                    continue
                reading = Reading(self._reader.open(pin, need, background=source is Source.DEVICE), source)
            elif id(reading) not in before:
                reading.stream.need(need)
            if (feed := before.get(id(reading))) is None:
                feed = before[id(reading)] = Feed(reading)
                feeds.append(feed)
            feed.join(load, piece)
        if load.missing:
            self._leave(load, feeds)
        return load

    def _leave(self, load: Load, feeds: list[Feed]) -> None:
        """Stop reading for a load."""
        for feed in list(feeds):
            if not feed.leave(load):
                feeds.remove(feed)
                feed.stream.discard()

    def read_ahead(self, rid: str, keys: Sequence[bytes]) -> None:
        """Begin to read what a waiting request will load."""
        self.prefetches.for_request(rid, keys)

    def arrived(self, index: int) -> bool:
        """Wait until a batch has arrived or is abandoned, and tell whether all of it is good. `finish` is still to
        come."""
        layers = range(self._pages.geometry.layers)
        complete = all([self.arrivals.wait(index, layer) for layer in layers])
        batch = self._batches.get(index)
        return complete and (batch is None or not batch.failed)

    def cancel(self, rid: str) -> bool:
        load = self._pending.pop(rid, None)
        if load is not None:
            self._leave(load, self._feeds)
        return load is not None

    def start(self, ready: Sequence[torch.Event] = ()) -> int:
        """Start writing everything queued to the device as one batch. Returns its index in ``arrivals``, or -1 if
        nothing was queued.

        ``ready`` are the events after which the device pages may be written: a forward that was launched before may
        still write a last token into a page that has been freed and given to this batch.
        """
        if not self._pending:
            return -1
        loads, self._pending = list(self._pending.values()), {}
        feeds, self._feeds = self._feeds, []
        return self._begin(loads, feeds, ready, AWAITED)

    def _begin(self, loads: list[Load], feeds: list[Feed], ready: Sequence[torch.Event], need: Need) -> int:
        index = self.arrivals.begin()
        lane = self._pages.inbound if need is AWAITED else self._pages.background
        batch = self._batches[index] = Batch(loads, feeds, need, lane, ready)
        self._begun.put(index, batch)
        return index

    def is_queued(self, index: int) -> bool:
        """Whether a batch has not begun, because others before it have not ended."""
        return self._begun.is_queued(index)

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
                batch.lane.finish()
        unusable = {rid: frozenset(keys or ()) for rid, keys in batch.unusable.items()} if complete else {}
        writing = late and self._pages.addressable
        return Finished(failed, batch.restored if complete else None, (batch.numbers,), writing, unusable)

    def kept(self) -> dict[str, int]:
        return {
            "queued_loads": len(self._pending),
            "queued_feeds": len(self._feeds),
            "batches": len(self._batches),
            "running_batches": self._begun.unfinished,
            "awaited_batches": self.arrivals.kept,
            **self.prefetches.kept(),
            **self._kept_by_readers(),
        }

    def _kept_by_readers(self) -> Counter[str]:
        kept = Counter(self._reader.kept())
        if self._shared is not None:
            kept.update(self._shared.reader.kept())
        return kept

    def drain(self) -> None:
        """Wait for what runs."""
        self._begun.join()

    def reset(self) -> None:
        """Forget what is queued and wait for what runs."""
        for rid in list(self._pending):
            self.cancel(rid)
        self.prefetches.clear()
        self.drain()
        self._batches.clear()
        self.arrivals.reset()

    def move(self, store: PageStore) -> None:
        """`reset`, and restore from another store from now on."""
        self.reset()
        self.prefetches.move(store)
        self._unread.clear()
        self._store = store

    def close(self) -> None:
        for rid in list(self._pending):
            self.cancel(rid)
        self.prefetches.clear()
        self._begun.close()
        for thread in self._threads:
            thread.join()
        self._reader.close()
        self._pinned.close()

    def _run(self, urgency: Urgency) -> None:
        while (item := self._begun.take(urgency)) is not None:
            index, batch = item
            try:
                with ExitStack() as closing:
                    for feed in batch.feeds:
                        closing.callback(feed.stream.close)
                    # Runs first: once the streams are closed, the staging memory is another stream's.
                    closing.callback(batch.lane.finish)
                    self._restore(index, batch)
            except Exception as error:
                if not isinstance(error, Abandoned):
                    logger.exception("agentstate: a restore failed; its requests are recomputed")
                # Not before everything is closed: after this the device pages are someone else's.
                self.arrivals.fail(index, error)
            # Not before: whoever waits for the batch must not wait for the index too.
            self._drop_bad(batch)
            self._begun.over()

    def _drop_bad(self, batch: Batch) -> None:
        """Drop the pages that a batch found wrong, and those that a drive failed to read for the second time."""
        try:
            again = set[tuple[bytes, int]]()
            with self._counting:
                if self._unread or batch.unread:
                    again = self._remember(batch)
            if again:
                logger.error("agentstate: %d page(s) could not be read in two restores and are dropped", len(again))
            dropped = self._store.drop(batch.wrong | again)
            if self._shared is not None and batch.wrong:
                self._shared.drop(batch.wrong)
            with self._counting:
                self.stats.pages_failed += dropped
                self.stats.pages_unread += len(batch.unread - again)
        except Exception:
            logger.exception("agentstate: pages that are wrong could not be dropped")

    def _remember(self, batch: Batch) -> set[tuple[bytes, int]]:
        """Remember the pages that a drive failed to read, and forget those that it read. Returns the pages that it had
        failed to read before. The caller holds ``_counting``."""
        again = batch.unread & self._unread.keys()
        good = {key for load in batch.loads if load.rid not in batch.failed for key in load.keys}
        kept = {copy: None for copy in self._unread if copy[0] not in good and copy not in again}
        kept.update(dict.fromkeys(batch.unread - again))
        self._unread = dict(list(kept.items())[-_REMEMBERED_UNREAD:])
        return again

    def _restore(self, index: int, batch: Batch) -> None:
        started, first_layer_s = time.perf_counter(), 0.0
        for load in batch.loads:
            if load.missing:
                batch.failed.add(load.rid)
                batch.unusable[load.rid] = set(load.missing)
        batch.lane.after(batch.ready)
        for feed in batch.feeds:
            feed.hurry(self._pages, background=batch.background)
        for layer in range(self._pages.geometry.layers):
            for feed in batch.feeds:
                for chunk in feed.stream.layer(layer):
                    self._require_wanted(index)
                    self._land(index, batch, feed, chunk)
                    batch.n_bytes += chunk.n_bytes
                    batch.straight += chunk.n_bytes if chunk.straight else 0
                    batch.in_memory += chunk.n_bytes_in_memory
                    if (fed := feed.fed_by(chunk)) is not None:
                        fed.n_bytes += chunk.n_bytes + chunk.n_bytes_in_memory
            batch.lane.finish()
            if layer == 0:
                first_layer_s = time.perf_counter() - started
            if layer == self._pages.geometry.layers - 1:
                # Before whoever waits for the batch goes on.
                seconds = time.perf_counter() - started
                batch.restored = self._record(batch, first_layer_s, seconds)
            self.arrivals.complete(index, layer)

    def _require_wanted(self, index: int) -> None:
        if self.arrivals.abandoned(index):
            raise Abandoned

    def _land(self, index: int, batch: Batch, feed: Feed, chunk: Chunk) -> None:
        """Write a chunk's pages of each request to the device, unless one of them is unusable."""
        if unusable := chunk.unusable():
            for portion in feed.portions:
                # Also for a request that has failed already: it comes back, and must not find its other bad pages then.
                if bad := sorted(page for page in unusable if page in portion.pages):
                    self._reject(batch, feed, portion, bad, chunk)
        with batch.landing:
            self._require_wanted(index)
            for portion in feed.portions:
                if portion.load.rid not in batch.failed:
                    for pages, rows in feed.rows(portion, chunk):
                        place = portion.place(self._pages, batch.lane, pages)
                        self._pages.scatter(chunk.layer, place, rows, batch.lane)
            chunk.keep_until = batch.lane.fence()

    def _reject(self, batch: Batch, feed: Feed, portion: Portion, bad: list[int], chunk: Chunk) -> None:
        """A request has failed because of the pages ``bad`` of a feed."""
        load, pin = portion.load, feed.stream.pin
        batch.failed.add(load.rid)
        batch.wrong.update(pin.copies(page for page in bad if page in chunk.wrong))
        keys = batch.unusable.setdefault(load.rid, set())
        if keys is not None:
            in_memory = feed.source is Source.HOST
            keys.update([NO_STORED_PAGE] if in_memory else (pin.keys[page] for page in bad))
        reason = chunk.wrong.get(bad[0], "")
        for segment, error in chunk.unread:
            pages = range(segment.first, segment.first + segment.pages)
            unread = [page for page in bad if page in pages]
            if bad[0] in pages:
                reason = str(error)
            if unread and is_of_drive(error):
                batch.unread.update(pin.copies(unread))
            elif unread:
                batch.unusable[load.rid] = None
        logger.error(
            "agentstate: %d page(s) of request %s, the first one number %d, are unusable in layer %d (%s); "
            "the request is recomputed",
            len(bad),
            load.rid,
            bad[0] - portion.pages.start + portion.first,
            chunk.layer,
            reason,
        )

    def _record(self, batch: Batch, first_layer_s: float, seconds: float) -> Restored | None:
        pages_of: Counter[tuple[str, Source]] = Counter()
        for feed in batch.feeds:
            for portion in feed.portions:
                pages_of[portion.load.rid, feed.source] += len(portion.pages)
        requests = {
            load.rid: RestoredRequest(
                len(load.keys),
                load.n_bytes,
                frozenset(load.sources),
                pages_of[load.rid, Source.HOST],
                pages_of[load.rid, Source.SHARED],
            )
            for load in batch.loads
            if load.rid not in batch.failed
        }
        with self._counting:
            self.stats.bytes_read += batch.n_bytes
            self.stats.bytes_straight += batch.straight
            self.stats.bytes_host += batch.in_memory
            if not requests:
                return None
            self.stats.restores += 1
            self.stats.pages_restored += sum(of_request.pages for of_request in requests.values())
            self.stats.pages_host += sum(of_request.host_pages for of_request in requests.values())
            self.stats.pages_shared += sum(of_request.shared_pages for of_request in requests.values())
            self.stats.first_layer_s += first_layer_s
            self.stats.seconds += seconds
        return Restored(requests, seconds)
