"""Demotions: copies to the host tier of what is about to leave the device, agreed on by all ranks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from engine_patch.linker import AgentStateLinker
from engine_patch.ranks import Ranks
from engine_patch.sglang_api import (
    ComponentType,
    PoolName,
    PoolTransfer,
    RadixKey,
    UnifiedRadixCache,
)
from engine_patch.turns import RequestSession

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

# How many token ids of chains that could be demoted are remembered, 8 bytes each.
_REMEMBERED_TOKENS = 16_000_000
# What is copied ahead of its eviction: this part of the device's pages. A request that needs more at once drives out
# what has not been copied.
_AHEAD = 4
# Of the chains that were used longest ago, so many are compared.
_COMPARED = 512


# A session as a request names it, in the namespace of the request: nobody else's request is taken for its own.
Chain = tuple[str, str | None, str | None]


def chain_of(req: Req) -> Chain:
    return str(RequestSession(req.session_id)), req.extra_key, req.cache_salt


class _UnderWay(NamedTuple):
    """A chain that is being copied. Its last ``node`` is locked, and with it what precedes it. It has no ``name`` any
    more when a request has needed it since."""

    name: Chain | None
    node: Any
    lock: Any
    tokens: int
    session_id: str | None


class Demotions:
    """Every method is for the scheduler's thread, between two batches, at the same step on every rank: locks decide
    what is evicted, and ranks evict alike. ``unlocked`` is called when device pages have become evictable.

    `keep_ahead` follows a simple rule: of the device's pages, a quarter are free, or have been copied and are evicted
    next; more of them if a request that is held up needs more (`holds_up`). What is evicted next is what is ``giving``,
    then what is worth least: the first rank decides for all.
    """

    def __init__(
        self,
        cache: UnifiedRadixCache,
        linker: AgentStateLinker,
        ranks: Ranks,
        unlocked: Callable[[], None],
        giving: Callable[[], Sequence[Hashable]] = tuple,
    ):
        self._cache = cache
        self._linker = linker
        self._ranks = ranks
        self._unlocked = unlocked
        self._giving = giving
        self._under_way: list[_UnderWay] = []
        # What requests ended with, and the session that they proved, the one that was used longest ago first.
        self._ended: OrderedDict[Chain, tuple[RadixKey, str | None]] = OrderedDict()
        self._tokens = 0
        # Of what was copied, how many tokens are supposed to be still on the device.
        self._ahead: OrderedDict[Chain, int] = OrderedDict()
        # What requests that are held up need, and whether some of what has ended may be copied.
        self._wanted = 0
        self._ready = False

    def __len__(self) -> int:
        """How many chains are being copied, and are locked."""
        return len(self._under_way)

    def demote(self, name: Chain, key: RadixKey, session_id: str | None = None) -> int:
        """Begin to copy what of ``key`` is on the device and no other chain goes on from. It is locked until that is
        over. Returns the number of tokens: 0, and nothing is begun, where there is nothing, or no host tier."""
        if not self._linker.demotes:
            return 0
        core = self._cache.tree_core
        _, last, _ = core.match_full_device_prefix(key.page_aligned(self._cache.page_size))
        (path,) = core.collect_path_info([last])
        own: list[Any] = []
        for node in reversed(path):
            if node.num_children > (1 if own else 0):
                break
            own.insert(0, node)
        held = [(node.node_id, core.get_hash_values(node.node_id), node.parent_id) for node in own]
        held = [(node, keys, parent) for node, keys, parent in held if keys]
        if not held:
            return 0
        lock = self._cache.inc_lock_ref(last).to_dec_params()
        begun = False
        try:
            transfers = together(device_pages_of(self._cache, *node) for node in held)
            begun = self._linker.demote(transfers, session_id)
        finally:
            if not begun:
                self._cache.dec_lock_ref(last, lock)
        if not begun:
            return 0
        tokens = sum(len(keys) for _, keys, _ in held) * self._cache.page_size
        self._under_way.append(_UnderWay(name, last, lock, tokens, session_id))
        self._linker.decisions.add(session_id, "demote", "begun", tokens)
        return tokens

    def land(self) -> None:
        """Unlock what all ranks have copied."""
        if not self._under_way:
            return
        done = self._linker.num_demoted()
        over = self._ranks.on_all([number < done for number in range(len(self._under_way))]).count(True)
        for name, node, lock, tokens, session_id in self._under_way[:over]:
            copied = self._linker.pop_demoted()
            self._linker.decisions.add(session_id, "demote", "copied" if copied else "failed", tokens)
            self._cache.dec_lock_ref(node, lock)
            if name is not None:
                self._ahead[name] = tokens
        if over:
            del self._under_way[:over]
            self._unlocked()

    def ended(self, name: Chain, key: RadixKey, session_id: str | None = None) -> None:
        """A request of the chain ``name`` has ended with ``key`` in the tree, and proved that it is of a session."""
        self.goes_on(name)
        self._ended[name] = key, session_id
        self._ready = True
        self._tokens += len(key)
        while self._tokens > _REMEMBERED_TOKENS and len(self._ended) > 1:
            self._take(next(iter(self._ended)))

    def _least(self) -> Chain:
        """The chain that is to leave first of those that were used longest ago."""
        # Ranks have the same chains in the same order, but a turn may be proven to one of them only.
        (place,) = self._ranks.of_first([self._place_of_least() if self._ranks.decides else 0], 1)
        return next(islice(self._ended, place, None))

    def _place_of_least(self) -> int:
        waits, giving = self._linker.waits, set(self._giving())
        some = list(islice(self._ended.values(), _COMPARED if giving or waits.foreseen else 1))

        def order(place: int) -> tuple[bool, float]:
            _, session_id = some[place]
            return session_id not in giving, waits.index(session_id)

        return min(range(len(some)), key=order)

    def _take(self, name: Chain) -> tuple[Chain, RadixKey, str | None]:
        key, session_id = self._ended.pop(name)
        self._tokens -= len(key)
        return name, key, session_id

    def goes_on(self, name: Chain) -> None:
        """A request needs the chain: what was copied of it is not evicted next."""
        if (before := self._ended.pop(name, None)) is not None:
            self._tokens -= len(before[0])
        self._ahead.pop(name, None)
        self._under_way = [item._replace(name=None) if item.name == name else item for item in self._under_way]

    def evicted(self, tokens: int) -> None:
        """The tree has evicted so many tokens: those first that were used longest ago."""
        while tokens > 0 and self._ahead:
            name, ahead = next(iter(self._ahead.items()))
            if ahead > tokens:
                self._ahead[name] = ahead - tokens
            else:
                del self._ahead[name]
            tokens -= ahead

    def holds_up(self, tokens: int) -> bool:
        """Whether who takes so many tokens of the device now is to wait for `keep_ahead`, because they would drive out
        what is not copied yet: a copy takes milliseconds, and reading it again from the drive much longer."""
        if not self._linker.demotes or self._room() >= tokens:
            return False
        if not self._under_way and not (self._ended and (self._ready or self._cache.linker.unlocked)):
            return False
        self._wanted = max(self._wanted, tokens)
        return True

    def _room(self) -> int:
        """How many tokens are free, or have been copied and are evicted next."""
        free: int = self._cache.token_to_kv_pool_allocator.available_size()
        return free + sum(self._ahead.values())

    def keep_ahead(self) -> None:
        """Copy the chain that is evicted next, if too little of the device is free or copied."""
        wanted, self._wanted = self._wanted, 0
        if not self._linker.demotes or self._under_way:
            return
        wanted = max(wanted, self._cache.token_to_kv_pool_allocator.size // _AHEAD)
        offered = self._offered()
        later = []
        while self._ended and self._room() < wanted:
            name, key, session_id = self._take(self._least())
            if offered and not offered.isdisjoint(self._nodes(key)):
                # It cannot be evicted, and what is not stored would not be copied.
                later.append((name, key, session_id))
            elif self.demote(name, key, session_id):
                break
        # Until more has ended, or is stored, there is nothing to wait for.
        self._ready = bool(self._ended)
        for name, key, session_id in reversed(later):
            self._ended[name] = key, session_id
            self._ended.move_to_end(name, last=False)
            self._tokens += len(key)

    def _offered(self) -> set[int]:
        """The nodes of the tree that a drive has not stored yet."""
        pending = self._cache.linker.pending_offloads
        return {node for offer in pending for node in (offer.lock_node_id, *offer.publish_node_ids)}

    def _nodes(self, key: RadixKey) -> Iterator[int]:
        core = self._cache.tree_core
        _, last, _ = core.match_full_device_prefix(key.page_aligned(self._cache.page_size))
        (path,) = core.collect_path_info([last])
        return (node.node_id for node in path)

    def drop(self) -> None:
        """Forget everything, before the device memory is cleared: the locks go with it."""
        self._under_way.clear()
        self._ended.clear()
        self._ahead.clear()
        self._tokens = self._wanted = 0


def device_pages_of(cache: UnifiedRadixCache, node: Any, keys: Sequence[str], parent: Any) -> list[PoolTransfer]:
    """What a node of the tree, whose pages are ``keys``, has on the device, in each pool."""
    full = cache.tree_core.collect_full_device_indices(node, parent)
    found = [PoolTransfer(name=PoolName.KV, device_indices=full, keys=list(keys))]
    if ComponentType.SWA in cache.components:
        slots = cache.tree_core.get_component_device_value(node, ComponentType.SWA)
        if slots is not None and (pages := len(slots) // cache.page_size):
            slots = slots[-pages * cache.page_size :]
            found.append(PoolTransfer(name=PoolName.SWA, device_indices=slots, keys=list(keys[-pages:])))
    if ComponentType.MAMBA in cache.components:
        state = cache.tree_core.get_component_device_value(node, ComponentType.MAMBA)
        if state is not None:
            found.append(PoolTransfer(name=PoolName.MAMBA, device_indices=state, keys=[keys[-1]]))
    return found


def together(of_nodes: Iterable[Sequence[PoolTransfer]]) -> list[PoolTransfer]:
    """The pages of several nodes as one transfer a pool."""
    pools: dict[PoolName, list[PoolTransfer]] = {}
    for transfers in of_nodes:
        for transfer in transfers:
            pools.setdefault(transfer.name, []).append(transfer)
    return [
        PoolTransfer(
            name=name,
            keys=[key for transfer in transfers for key in transfer.keys],
            device_indices=torch.cat([transfer.device_indices for transfer in transfers]),
        )
        for name, transfers in pools.items()
    ]
