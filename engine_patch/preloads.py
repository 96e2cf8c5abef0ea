"""Preloads: while forwards run, stored pages are loaded into device slots of their own, and from there enter the radix
tree, where requests match them like pages that never left."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from agentstate.pages import DEMAND, Need
from engine_patch.linker import AgentStateLinker
from engine_patch.private_slots import KEPT, PrivateSlots, Slots
from engine_patch.restore import Finished, Restored
from engine_patch.sessions import Progress
from engine_patch.sglang_api import RadixKey, UnifiedRadixCache

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.base_prefix_cache import MatchResult

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Preload:
    """The pages ``keys``, the last ones of ``key``, on their way to ``slots``, which belong to them until the tree
    takes them. ``prefix`` are the slots of what precedes them in the tree; ``node``, the end of that, is locked until
    then. ``batch`` is None if this rank could not begin to load. ``layers`` have arrived, the last one at
    ``progress_s`` by the monotonic clock. It ``restores`` for a request, or is a prefetch, and is called ``name``.
    Once it is over, ``restored`` tells what has come, of which so many ``host_pages`` from the host tier."""

    key: RadixKey
    keys: Sequence[bytes]
    batch: int | None
    prefix: torch.Tensor
    slots: Slots
    node: Any
    lock: Any
    progress_s: float
    restores: bool
    name: str = ""
    layers: int = 0
    host_pages: int = 0
    restored: Restored | None = None
    progress: Progress = Progress.RUNNING
    _brought: dict[str, bool] = field(default_factory=dict)

    def brings(self, req: Req) -> bool:
        """Whether the request begins with everything that is on its way."""
        if req.rid not in self._brought:
            wanted, tokens = self.key.raw_token_ids(), req.origin_input_ids
            if len(tokens) < len(wanted):
                tokens = tokens + req.output_ids
            own = RadixKey(tokens[: len(wanted)], req.extra_key, cache_salt=req.cache_salt)
            self._brought[req.rid] = (own.extra_key, own.cache_salt, own.token_ids) == (
                self.key.extra_key,
                self.key.cache_salt,
                wanted,
            )
        return self._brought[req.rid]

    def common(self, keys: Sequence[bytes], first: int, page_size: int) -> int:
        """How many of ``keys``, a chain's pages from number ``first`` on, are on their way."""
        return common_pages(keys, first, self.keys, len(self.key) // page_size - len(self.keys))


def common_pages(some: Sequence[bytes], first: int, others: Sequence[bytes], others_first: int) -> int:
    """How many pages two parts of chains have in common; ``first`` is the number of each one's first page."""
    start = max(first, others_first)
    pages = 0
    for key, other in zip(some[max(0, start - first) :], others[start - others_first :], strict=False):
        if key != other:
            break
        pages += 1
    return pages


class Preloads:
    """Every method is for the scheduler's thread, between two batches, at the same step on every rank, so that all
    ranks allocate, evict, insert and free slots alike. Drives and clocks differ between ranks, which therefore agree on
    what follows from them: ``agree`` tells which of some answers is yes on all ranks.

    If no layer of a preload arrives for ``drive_timeout_s`` on some rank, all ranks abandon it. ``unlocked`` is called
    whenever device pages have become free or evictable.
    """

    def __init__(
        self,
        cache: UnifiedRadixCache,
        linker: AgentStateLinker,
        agree: Callable[[Sequence[bool]], list[bool]],
        unlocked: Callable[[], None],
    ):
        self._cache = cache
        self._linker = linker
        self._agree = agree
        self._unlocked = unlocked
        self._slots = PrivateSlots(cache, linker.window_pages)
        self._stats = linker.preload_stats
        self._under_way: list[Preload] = []

    def __iter__(self) -> Iterator[Preload]:
        return iter(self._under_way)

    @property
    def possible(self) -> bool:
        """Whether everything that the model keeps can be preloaded."""
        return KEPT.issuperset(self._cache.components)

    def __len__(self) -> int:
        """How many are on their way, and have slots that are neither free nor in the tree."""
        return len(self._under_way)

    def fits(self, pages: int, reserved: int) -> bool:
        """Whether so many pages fit into memory that is free or evictable, besides ``reserved`` tokens."""
        return self._slots.fits(pages * self._cache.page_size, reserved)

    def start(
        self,
        name: str,
        key: RadixKey,
        found: MatchResult,
        keys: Sequence[bytes],
        reserved: int,
        need: Need = DEMAND,
        *,
        restores: bool = False,
    ) -> Preload | None:
        """Begin to load ``keys``, the part of ``key`` after the match ``found``. Returns None, and changes nothing, if
        too little memory is free or evictable besides the ``reserved`` tokens. The log calls the preload ``name``."""
        cache = self._cache
        lock = cache.inc_lock_ref(found.last_device_node).to_dec_params()
        slots = preload = None
        try:
            if self.fits(len(keys), reserved):
                slots = self._slots.take(len(keys) * cache.page_size)
            if slots is not None:
                root = cache.root_node_handle(key.extra_key)
                indices = cache.tree_core.collect_full_device_indices(found.last_device_node, root)
                prefix = indices[: found.device_prefix_len]
                batch, node = self._load(name, keys, slots, need), found.last_device_node
                preload = Preload(key, keys, batch, prefix, slots, node, lock, time.monotonic(), restores, name)
                self._keep([*self._under_way, preload])
        finally:
            if preload is None:
                if slots is not None:
                    self._slots.give(slots)
                cache.dec_lock_ref(found.last_device_node, lock)
        return preload

    def hasten(self, preload: Preload, need: Need) -> None:
        """Let a preload be as urgent as ``need``, if it is less so."""
        if preload.batch is not None:
            self._linker.hasten(preload.batch, need)

    def _load(self, name: str, keys: Sequence[bytes], slots: Slots, need: Need) -> int | None:
        try:
            return self._linker.preload(name, keys, slots.of_pools, need)
        except Exception:
            # The other ranks may have begun: this one reports its failure when they agree on the outcome.
            logger.exception("agentstate: pages could not be loaded ahead for %s", name)
            return None

    def land(self) -> None:
        """Insert what has arrived on all ranks, and free the slots of what failed or stalled on one of them."""
        if not self._under_way:
            return
        asked = [*map(self._landed, self._under_way), *map(self._goes_on, self._under_way)]
        agreed = self._agree(asked)
        count = len(self._under_way)
        over = [
            (preload, landed)
            for preload, landed, goes_on in zip(self._under_way, agreed[:count], agreed[count:], strict=True)
            if landed or not goes_on
        ]
        if not over:
            return
        finished = [self._finish(preload, landed) for preload, landed in over]
        good = [not found.failed and not self._linker.retired for found in finished]
        agreed = self._agree([*good, *(not found.writing for found in finished)])
        for (preload, _), good_on_all, over_on_all in zip(over, agreed[: len(over)], agreed[len(over) :], strict=True):
            self._keep([other for other in self._under_way if other is not preload])
            if not over_on_all:
                self._linker.quarantine_slots(preload.slots.of_pools)
            self._settle(preload, good_on_all)

    def _landed(self, preload: Preload) -> bool:
        return preload.batch is None or self._linker.landed(preload.batch)

    def _goes_on(self, preload: Preload) -> bool:
        """Whether this rank has nothing to wait for, or a layer has arrived lately, or others come before it."""
        if preload.batch is None or self._landed(preload):
            return True
        layers, now = self._linker.layers_landed(preload.batch), time.monotonic()
        if layers > preload.layers or self._linker.is_queued(preload.batch):
            preload.layers, preload.progress_s = layers, now
        return now < preload.progress_s + self._linker.drive_timeout_s

    def _finish(self, preload: Preload, landed: bool) -> Finished:
        if preload.batch is None:
            return Finished({""})
        if not landed:
            self._linker.abandon(preload.batch)
        found = self._linker.finish(preload.batch)
        if found.restored is not None:
            preload.restored = found.restored
            preload.host_pages = sum(of_request.host_pages for of_request in found.restored.requests.values())
        return found

    def _settle(self, preload: Preload, good: bool) -> None:
        if good:
            self._slots.insert(preload.key, preload.prefix, preload.slots)
        else:
            self._slots.give(preload.slots)
        self._cache.dec_lock_ref(preload.node, preload.lock)
        self._unlocked()
        self._end(preload, good)

    def drop(self) -> None:
        """Forget all of them, before the device memory is cleared: their slots and locks go with it."""
        dropped = self._under_way
        self._keep([])
        for preload in dropped:
            if preload.batch is not None:
                self._linker.finish(preload.batch)
            self._end(preload, False)

    def _keep(self, under_way: list[Preload]) -> None:
        self._under_way = under_way
        self._stats.under_way = len(under_way)

    def _end(self, preload: Preload, good: bool) -> None:
        preload.progress = Progress.DONE if good else Progress.FAILED
        if good:
            self._stats.preloads += 1
            self._stats.pages += len(preload.keys)
        else:
            self._stats.failed += 1
