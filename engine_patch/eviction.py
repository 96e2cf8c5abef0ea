"""Which pages leave the device first.

SGLang evicts the leaves of its tree from the least recently used on. An eviction here is made of several such walks:
each passes over the leaves of whoever's context is worth more than others', and less and less of them, until enough is
evicted. A last walk passes over nothing. So both of SGLang's trees order evictions by what is foreseen, without
showing their nodes; and where nothing is foreseen, the order is SGLang's own.

Trees of several ranks must evict alike, and clocks and messages differ between ranks. So the first rank decides for
all, in each eviction anew.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch

from engine_patch.sglang_api import get_parallel
from engine_patch.waits import Waits

# Of the contexts on the device, so many that were used least recently are compared. What is newer goes after them.
_COMPARED = 512
# How many nodes several ranks pass over in a walk at most; those of who is worth most.
_AGREED = 1024
_MOST = torch.iinfo(torch.int64).max


class _End(NamedTuple):
    """Where a context ends on the device: its deepest node, how many tokens there are up to the end of that, and what
    all ranks call the node."""

    node: int
    tokens: int
    name: int


class EvictionOrder:
    """The contexts of ``waits`` that are on the device, in the tree ``core``. For the scheduler's thread.

    ``least`` makes of a tensor the least that any rank has.
    """

    def __init__(self, core: Any, waits: Waits, least: Callable[[torch.Tensor], None]):
        self._core = core
        self._waits = waits
        self._least = least
        self._alone, self._rank = get_parallel().tp_size == 1, get_parallel().tp_rank
        self._decides: bool | None = None
        # By their owners, from the least recently used on; and the owners by the node.
        self._ends: OrderedDict[Hashable, _End] = OrderedDict()
        self._at: dict[int, set[Hashable]] = {}
        self._named: dict[int, int] = {}

    def __len__(self) -> int:
        """How many contexts are on the device."""
        return len(self._ends)

    def ended(self, owner: Hashable | None, node: int) -> Hashable:
        """A request of ``owner`` has ended at ``node``; one that has no owner owns itself. Returns the owner."""
        owner = node if owner is None else owner
        if self.brought(owner, node):
            self._waits.began(owner)
        return owner

    def brought(self, owner: Hashable, node: int) -> bool:
        """The owner's context is on the device, up to the end of ``node``; False if that is the root."""
        (path,) = self._core.collect_path_info([node])
        if path:
            self._move(owner, path)
            self._ends.move_to_end(owner)
        return bool(path)

    def evicting(self, node: int) -> None:
        """A leaf is about to be evicted: contexts that end with it end before it from now on."""
        if owners := self._at.get(node):
            (path,) = self._core.collect_path_info([node])
            for owner in tuple(owners):
                if len(path) > 1:
                    self._move(owner, path[:-1])
                else:
                    self._leave(owner)
                    del self._ends[owner]

    def forget(self) -> None:
        """The tree is emptied."""
        self._ends.clear()
        self._at.clear()
        self._named.clear()

    def tokens(self, owner: Hashable) -> int:
        """How many tokens of the owner's context are on the device."""
        return self._ends[owner].tokens if owner in self._ends else 0

    def standing(self) -> list[tuple[Hashable, float, int]]:
        """Every context on the device: its owner, what a byte of it is worth, and its tokens. From any thread."""
        return [(owner, self._waits.index(owner), end.tokens) for owner, end in self._ends.copy().items()]

    def displaced(self, tokens: int) -> float:
        """The largest index of what an eviction of ``tokens`` takes: 0 where nothing has to go, infinite where more has
        to go than there is."""
        if tokens <= 0:
            return 0.0
        for owner in sorted(islice(self._ends, _COMPARED), key=self._waits.index):
            tokens -= self._own(owner)
            if tokens <= 0:
                return self._waits.index(owner)
        return math.inf

    def rounds(self, tokens: int) -> Iterator[set[int]]:
        """The nodes that an eviction of ``tokens`` passes over, walk by walk, each time fewer. No walk where nothing is
        known that the order in which contexts were used does not tell. The same on all ranks."""
        own = self._rounds(tokens)
        if self._alone:
            yield from ({end.node for end in passed} for passed in own)
            return
        while names := self._agreed([end.name for end in next(own, ())]):
            yield {self._named[name] for name in names if name in self._named}

    def _rounds(self, tokens: int) -> Iterator[list[_End]]:
        """What this rank alone would pass over, who is worth most first."""
        if not (tokens and self._ends and self._waits.foreseen):
            return
        compared = sorted(islice(self._ends, _COMPARED), key=self._waits.index)
        ascending = [*compared, *islice(self._ends, _COMPARED, None)]
        # Nothing of the first so many is passed over. Of what only they share, no one's own tokens tell.
        spared = covered = 0
        step = goal = tokens
        while spared < len(ascending):
            while spared < len(ascending) and covered < goal:
                covered += self._own(ascending[spared])
                spared += 1
            step, goal = 2 * step, covered + step
            ends = (self._ends.get(owner) for owner in reversed(ascending[spared:]))
            if passed := [end for end in ends if end is not None]:
                yield passed

    def _own(self, owner: Hashable) -> int:
        """How many tokens on the device are the owner's alone."""
        if (end := self._ends.get(owner)) is None:
            return 0
        (path,) = self._core.collect_path_info([end.node])
        shared = max((node.path_end for node in path[:-1] if node.num_children > 1), default=0)
        return end.tokens - shared

    def _agreed(self, own: list[int]) -> list[int]:
        """What the first rank passes over."""
        if self._decides is None:
            first = torch.tensor([self._rank])
            self._least(first)
            self._decides = int(first[0]) == self._rank
        names = own[:_AGREED] if self._decides else []
        many = torch.tensor([len(names) if self._decides else _MOST])
        self._least(many)
        agreed = torch.full((int(many[0]),), _MOST, dtype=torch.int64)
        if len(agreed):
            if self._decides:
                agreed[:] = torch.tensor(names)
            self._least(agreed)
        found: list[int] = agreed.tolist()
        return found

    def _move(self, owner: Hashable, path: Sequence[Any]) -> None:
        """The owner's context ends with the last node of ``path``."""
        if owner in self._ends:
            self._leave(owner)
        last = path[-1]
        name = 0 if self._alone else int(self._core.get_last_hash_value(last.node_id)[:15], 16)
        self._ends[owner] = _End(last.node_id, last.path_end, name)
        self._at.setdefault(last.node_id, set()).add(owner)
        if not self._alone:
            self._named[name] = last.node_id

    def _leave(self, owner: Hashable) -> None:
        end = self._ends[owner]
        there = self._at[end.node]
        there.discard(owner)
        if not there:
            del self._at[end.node]
            self._named.pop(end.name, None)
