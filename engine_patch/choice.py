"""Choice-first restores: of models whose attention chooses the tokens that it reads by small index keys.

The keys of the index are restored whole and first. Of the KV itself, a forward waits for the rows that its attention
has chosen and for no others; all others follow behind the first token. Every row is verified before a forward that
reads it goes on: what is chosen is exact, and so is every token.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from agentstate.pages import AWAITED, LayerwiseReader, PageStore, Pin
from agentstate.pages.handles import is_of_drive
from agentstate.pages.rows import ARRIVED, RowMemory, RowReader, RowsRead, RowStream
from engine_patch import flags, versions
from engine_patch.feeds import Load, Source
from engine_patch.host_tier import HostPool
from engine_patch.quarantine import Quarantine
from engine_patch.restore import Abandoned, Batch, Finished, Restorer
from engine_patch.sglang_api import PoolName, attention_backends
from engine_patch.shared_pool import SharedPool
from engine_patch.transfer import DevicePages, PageNumbers

logger = logging.getLogger(__name__)


def hindrance(server_args: Any, pools: Sequence[Any]) -> str | None:
    """Why an engine with these `DevicePool`s cannot be restored by choice, or None if it can. What is not named here as
    possible is not: a forward that reads a row which nobody waited for would compute with what lay there before."""
    if [pool.name for pool in pools] != [PoolName.KV, PoolName.INDEXER]:
        return "its attention does not choose by an index, or keeps more than an index beside its KV"
    if pools[0].model_layers != tuple(range(len(pools[0].model_layers))):
        return "not every layer has KV in one pool"
    if pools[0].device_pages.device.type != "cpu" or attention_backends() != {flags.CPU_ATTENTION}:
        return f"only --attention-backend {flags.CPU_ATTENTION} tells which rows it reads"
    if not Quarantine.works(pools[0].allocator):
        return f"pages of a {type(pools[0].allocator).__name__} cannot be quarantined"
    if versions.installed() != versions.PINNED:
        return f"it has not been run with SGLang {versions.installed()}"
    if any(getattr(server_args, name, 1) != 1 for name in ("tp_size", "dp_size", "pp_size", "nnodes")):
        return "it has several ranks"
    if getattr(server_args, "disaggregation_mode", "null") != "null":
        return "prefill and decode are apart"
    if given := [name for name in _UNLIKE if getattr(server_args, name, None)]:
        return f"it has not been run with {', '.join(map(flags.spelling, given))}"
    return None


# Fields of `ServerArgs` that let something else than this attention read KV, or make one graph of a forward.
_UNLIKE = (
    "speculative_algorithm",
    "enable_torch_compile",
    "enable_two_batch_overlap",
    "enable_single_batch_overlap",
    "enable_hisparse",
    "enable_lora",
)


@dataclass(eq=False)
class _Named:
    """A load whose rows are read as they are named. ``first`` is, of each of its pages, the device row of the page's
    first row, int64; ``whole`` are the layers of which every row is there."""

    load: Load
    pin: Pin
    stream: RowStream
    index: int = -1
    first: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    whole: set[int] = field(default_factory=set)


@dataclass
class _ChosenBatch(Batch):
    named: list[_Named] = field(default_factory=list)
    started_s: float = 0.0
    # The thread that reads what nobody has named yet, once it may; and what had been read until then.
    behind: threading.Thread | None = None
    before_bytes: int = 0
    chosen_bytes: int = 0


class ChoiceRestorer(Restorer):
    """A `Restorer` of a pool whose readers name rows. Of a load that a forward waits for, rows are read from ``rows``
    when they are asked for (`require`), and the others after `go_on`, in order of layers, yielding to those. A layer
    counts as arrived when all of it has; a batch that nobody asks `trails` of is restored whole.

    Whole and as before go: preloads, loads of which something is in memory already or on its way there, or is not on
    this machine's drive, and those of a batch that has such a load.

    Rows are read to their places. So a batch that is abandoned may still be written to, and its pages must be
    quarantined, until its drive has answered.

    `require`, `go_on` and `finish` are for the thread that forwards run on.
    """

    def __init__(
        self,
        store: PageStore,
        pages: DevicePages,
        reader: LayerwiseReader,
        rows: RowReader,
        timeout_s: float | None = None,
        host: HostPool | None = None,
        shared: SharedPool | None = None,
    ):
        super().__init__(store, pages, reader, timeout_s, host, shared)
        self._rows = rows
        self._timeout_s = timeout_s
        self._queued: dict[str, _Named] = {}
        self._chosen: dict[int, _ChosenBatch] = {}
        self._threads_behind: set[threading.Thread] = set()
        # Guards what batches note: a forward and the thread behind it read for the same one.
        self._noting = threading.Lock()
        # Of each device page, the number of the load that fills it, -1 for none, and which of its pages it is.
        self._load_at = np.full(len(pages), -1, dtype=np.int64)
        self._page_at = np.zeros(len(pages), dtype=np.int64)
        self._loads: dict[int, _Named] = {}
        self._next_load = 0

    @property
    def open(self) -> bool:
        """Whether rows of any batch may be missing on the device."""
        return bool(self._chosen)

    def chooses(self, index: int) -> bool:
        """Whether rows of a batch are read as they are named, and it is not restored whole."""
        return index in self._chosen

    def trails(self, index: int) -> bool:
        """Whether rows of a batch may come behind its forward: none that it has asked for was bad or late."""
        return index in self._chosen and not self.failing(index)

    def failing(self, index: int) -> bool:
        """Whether a batch has met a row that must not be used, or is abandoned."""
        batch = self._chosen.get(index)
        return batch is not None and bool(batch.failed or self.arrivals.abandoned(index))

    def queue(self, rid: str, keys: Sequence[bytes], numbers: torch.Tensor | PageNumbers) -> None:
        if (named := self._open_rows(rid, keys, numbers)) is None:
            super().queue(rid, keys, numbers)
        else:
            self._queued[rid] = named

    def _open_rows(self, rid: str, keys: Sequence[bytes], numbers: torch.Tensor | PageNumbers) -> _Named | None:
        """None for a load that is to be restored whole."""
        if self.prefetches.covers(keys) or (self._host is not None and any(self._host.has(keys))):
            return None
        try:
            pin = self._store.pin(keys)
        except KeyError:
            return None
        stream = self._rows.open(pin)
        if not stream.by_rows:
            stream.discard()
            return None
        return _Named(Load(rid, keys, numbers, sources={Source.COLD}), pin, stream)

    def cancel(self, rid: str) -> bool:
        if (named := self._queued.pop(rid, None)) is None:
            return super().cancel(rid)
        named.stream.discard()
        return True

    def start(self, ready: Sequence[torch.Event] = ()) -> int:
        queued, self._queued = list(self._queued.values()), {}
        if not self._pending and queued:
            return self._begin_chosen(queued, ready)
        for named in queued:
            load = named.load
            super().queue(load.rid, load.keys, load.numbers)
            # Only now: its pages are pinned twice for a moment, and not at no time.
            named.stream.discard()
        return super().start(ready)

    def _begin_chosen(self, queued: list[_Named], ready: Sequence[torch.Event]) -> int:
        # In host memory, where alone rows are chosen, nothing is later than it seems.
        lane = self._pages.inbound
        index = self.arrivals.begin()
        loads = [named.load for named in queued]
        batch = _ChosenBatch(loads, [], AWAITED, lane, ready, named=queued, started_s=time.perf_counter())
        for named in queued:
            numbers = named.load.numbers[:].numpy()
            named.index, named.first = index, numbers * self._pages.geometry.page_size
            number, self._next_load = self._next_load, self._next_load + 1
            self._loads[number] = named
            self._load_at[numbers] = number
            self._page_at[numbers] = np.arange(len(numbers))
        self._chosen[index] = self._batches[index] = batch
        return index

    def require(self, layer: int, slots: torch.Tensor) -> None:
        """Return once the rows ``slots`` of a layer, device rows as integers on the host, have arrived, as far as they
        are missing; or at once for those of a load that has failed or was abandoned."""
        rows, size = slots.numpy(), self._pages.geometry.page_size
        pages = rows // size
        numbers = self._load_at[pages]
        asked = []
        for number in np.unique(numbers[numbers >= 0]).tolist():
            named = self._loads[number]
            batch = self._chosen[named.index]
            gone = named.load.rid in batch.failed or self.arrivals.abandoned(named.index)
            if gone or layer in named.whole:
                continue
            own = numbers == number
            wanted = self._page_at[pages[own]] * size + rows[own] % size
            try:
                asked.append((batch, named, wanted, named.stream.read(layer, wanted, self._memory(named, layer))))
            except Exception as error:
                self._not_read(batch, named, layer, error)
        for batch, named, wanted, reading in asked:
            try:
                self._note(batch, named, layer, wanted, reading.result(self._timeout_s), chosen=True)
            except TimeoutError:
                self.arrivals.abandon(named.index)
            except Exception as error:
                self._not_read(batch, named, layer, error)

    def _not_read(self, batch: _ChosenBatch, named: _Named, layer: int, error: Exception) -> None:
        """Rows could not even be asked for. Where the stream was closed, all were there, or something has failed. No
        page is at fault, and the forward must not fail."""
        if layer not in named.whole:
            if not isinstance(error, ValueError):
                logger.error("agentstate: rows could not be read; %s is recomputed", named.load.rid, exc_info=error)
            with self._noting:
                batch.failed.add(named.load.rid)
                batch.unusable.setdefault(named.load.rid, None)

    def wait_whole(self, layers: Iterable[int]) -> None:
        """Return once all rows of these layers, of every batch, have arrived or failed."""
        wanted = list(layers)
        for index in list(self._chosen):
            self.go_on(index)
            for layer in wanted:
                self.arrivals.wait(index, layer)

    def go_on(self, index: int) -> None:
        """From now on read also those rows of a batch that nobody has asked for."""
        batch = self._chosen[index]
        if batch.behind is None:
            batch.before_bytes = batch.n_bytes
            batch.behind = threading.Thread(
                target=self._read_behind, args=(index, batch), name="agentstate-behind", daemon=True
            )
            self._threads_behind.add(batch.behind)
            batch.behind.start()

    def _read_behind(self, index: int, batch: _ChosenBatch) -> None:
        last = self._pages.geometry.layers - 1
        try:
            with ExitStack() as closing:
                for named in batch.named:
                    closing.callback(named.stream.close)
                for layer in range(last + 1):
                    for named in batch.named:
                        self._read_rest(index, batch, named, layer)
                    if layer < last:
                        self.arrivals.complete(index, layer)
                seconds = time.perf_counter() - batch.started_s
                batch.restored = self._record(batch, 0.0, seconds)
            # Once everything is closed: nothing is written to the device any more.
            self.arrivals.complete(index, last)
        except Exception as error:
            if not isinstance(error, Abandoned):
                logger.exception("agentstate: a restore failed; its requests are recomputed")
            self.arrivals.fail(index, error)
        self._drop_bad(batch)
        self._threads_behind.discard(threading.current_thread())

    def _read_rest(self, index: int, batch: _ChosenBatch, named: _Named, layer: int) -> None:
        if named.load.rid in batch.failed:
            return
        self._require_wanted(index)
        read = named.stream.rest(layer, self._memory(named, layer)).result()
        self._require_wanted(index)
        every = np.arange(len(named.first) * self._pages.geometry.page_size)
        self._note(batch, named, layer, every, read, chosen=False)
        if named.load.rid not in batch.failed:
            named.whole.add(layer)

    def _memory(self, named: _Named, layer: int) -> RowMemory:
        return RowMemory(self._pages.rows(layer), named.first)

    def _note(
        self, batch: _ChosenBatch, named: _Named, layer: int, rows: np.ndarray, read: RowsRead, *, chosen: bool
    ) -> None:
        """Enter what was read for a load, for which ``rows`` were asked for, and that it has failed if one of them must
        not be used."""
        load = named.load
        with self._noting:
            batch.n_bytes += read.read_bytes
            load.n_bytes += read.read_bytes
            batch.chosen_bytes += read.named_bytes if chosen else 0
            # Also what another call has met.
            bad = {
                *read.wrong,
                *read.unread,
                *(rows[read.states != ARRIVED] // self._pages.geometry.page_size).tolist(),
            }
            if not bad:
                return
            batch.failed.add(load.rid)
            batch.wrong.update(named.pin.copies(read.wrong))
            batch.unread.update(named.pin.copies(page for page, why in read.unread.items() if is_of_drive(why)))
            keys = batch.unusable.setdefault(load.rid, set())
            if not all(map(is_of_drive, read.unread.values())):
                batch.unusable[load.rid] = None
            elif keys is not None:
                keys.update(load.keys[page] for page in bad)
        first = min(bad)
        logger.error(
            "agentstate: %d page(s) of request %s, the first one number %d, are unusable in layer %d (%s); "
            "the request is recomputed",
            len(bad),
            load.rid,
            first,
            layer,
            read.wrong.get(first) or read.unread.get(first) or "as was found before",
        )

    def finish(self, index: int) -> Finished:
        if index not in self._chosen:
            return super().finish(index)
        self.go_on(index)
        found = super().finish(index)
        batch = self._chosen.pop(index)
        for number in [number for number, named in self._loads.items() if named.index == index]:
            del self._loads[number]
            self._load_at[self._load_at == number] = -1
        with self._counting:
            self.stats.bytes_chosen += batch.chosen_bytes
            self.stats.bytes_before_token += batch.before_bytes
        logger.info(
            "agentstate: by choice: %.1f MB chosen, %.1f MB read before the first token, %.1f MB in all",
            batch.chosen_bytes / 1e6,
            batch.before_bytes / 1e6,
            batch.n_bytes / 1e6,
        )
        return found._replace(writing=not self.arrivals.landed(index))

    def kept(self) -> dict[str, int]:
        kept = {**super().kept(), "chosen_loads": len(self._queued) + len(self._loads)}
        return {**kept, **{f"row_{name}": count for name, count in self._rows.kept().items()}}

    def read_ahead(self, rid: str, keys: Sequence[bytes]) -> None:
        """Nothing: which rows come first is not known yet."""

    def drain(self) -> None:
        super().drain()
        self._read_all_behind()

    def _read_all_behind(self) -> None:
        """Return once nobody reads rows of any batch any more."""
        for index in list(self._chosen):
            self.go_on(index)
        for thread in list(self._threads_behind):
            thread.join()

    def reset(self) -> None:
        for rid in list(self._queued):
            self.cancel(rid)
        super().reset()
        self._chosen.clear()
        self._loads.clear()
        self._load_at[:] = -1

    def close(self) -> None:
        for rid in list(self._queued):
            self.cancel(rid)
        self._read_all_behind()
        super().close()
        self._rows.close()
