"""Which pages leave the device first.

SGLang evicts the leaves of its tree from the least recently used on. An eviction here is made of several such walks:
each passes over the leaves of whoever's context is worth more than others', and less and less of them, until enough is
evicted. A last walk passes over nothing. So both of SGLang's trees order evictions by what is foreseen, without
showing their nodes; and where nothing is foreseen, the order is SGLang's own.

Where a session's next turn does not go on from the end of the last one, what it has left leaves before all others,
unless another context goes on from there.

An account that has more on the device than its quota gives first: its contexts that wait, who is worth least before the
others, until it has no more than that. Without quotas nothing of this is asked.

Trees of several ranks must evict alike, and clocks and messages differ between ranks. So the first rank decides for
all, in each eviction anew.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import chain, count, islice
from operator import itemgetter
from typing import Any, NamedTuple

from engine_patch.accounts import Accounts
from engine_patch.ranks import Ranks
from engine_patch.sglang_api import ComponentType
from engine_patch.waits import Waits

# Of the contexts on the device, so many that were used least recently are compared. What is newer goes after them.
_COMPARED = 512
# How many nodes several ranks pass over in a walk at most; those of who is worth most.
_AGREED = 1024


class _End(NamedTuple):
    """Where a context ends on the device: its deepest node, how many tokens there are up to the end of that, and what
    all ranks call the node. Of the tokens, ``charged`` are charged to the ``account``: those that no other context had
    when they came, so that what is shared is charged once. ``epoch`` is that of the turn which ended there."""

    node: int
    tokens: int
    name: int
    charged: int
    account: str
    epoch: int = 0


class Superseded(NamedTuple):
    """Owns what a session had after its first ``shared`` tokens, and has left: its next turn did not go on from
    there. ``number`` tells such ends apart."""

    session_id: Hashable
    shared: int
    number: int


class EvictionOrder:
    """The contexts of ``waits`` that are on the device, in the tree ``core``. For the scheduler's thread.

    ``accounts`` tells whose they are and what those may have, ``n_bytes`` what so many tokens take. To go on from the
    end of one needs sliding windows of ``window_tokens`` before it.
    """

    def __init__(
        self,
        core: Any,
        waits: Waits,
        ranks: Ranks,
        accounts: Accounts | None = None,
        n_bytes: Callable[[int], int] = int,
        window_tokens: int = 0,
    ):
        self._core = core
        self._window_tokens = window_tokens
        self._waits = waits
        self._accounts = accounts or Accounts()
        self._n_bytes = n_bytes
        # The tokens that are charged to each account.
        self._held: Counter[str] = Counter()
        self._ranks = ranks
        # By their owners, from the least recently used on; and the owners by the node.
        self._ends: OrderedDict[Hashable, _End] = OrderedDict()
        self._at: dict[int, set[Hashable]] = {}
        self._named: dict[int, int] = {}
        self._numbers = count()
        # From whom an eviction has taken, and how many tokens each had before.
        self._taken: dict[Hashable, int] = {}

    def __len__(self) -> int:
        """How many contexts are on the device."""
        return len(self._ends)

    def ended(self, owner: Hashable | None, node: int, epoch: int = 0) -> Hashable:
        """A request of ``owner``, in a turn of that number, has ended at ``node``; one that has no owner owns itself.
        Returns the owner."""
        owner = node if owner is None else owner
        before = self._ends.get(owner)
        (path,) = self._core.collect_path_info([node])
        nodes = {part.node_id for part in path}
        for left in [one for part in nodes for one in self._at.get(part, ()) if isinstance(one, Superseded)]:
            # It is gone on from after all.
            self._drop(left)
        if path and before is not None and before.epoch < epoch and before.node not in nodes:
            self._supersede(owner, before, path)
        if self.brought(owner, node, epoch):
            self._waits.began(owner)
        return owner

    def _supersede(self, owner: Hashable, before: _End, path: Sequence[Any]) -> None:
        """The owner's context ends with ``path`` from now on, which does not go on from its end ``before``."""
        (old,) = self._core.collect_path_info([before.node])
        nodes = {part.node_id for part in path}
        shared = max((part.path_end for part in old if part.node_id in nodes), default=0)
        if old[-1].num_children or len(self._at[before.node]) > 1:
            return  # others go on from there
        left = Superseded(owner, shared, next(self._numbers))
        charged = min(before.charged, before.tokens - shared)
        # What it shares with where it is now stays charged to it.
        own = before.charged - charged + self._charged(owner, path)
        self._move(owner, path, own)
        self._move(left, old, charged)
        self._waits.began(left)
        self._waits.release(left)

    def brought(self, owner: Hashable, node: int, epoch: int | None = None) -> bool:
        """The owner's context is on the device, up to the end of ``node``; False if that is the root."""
        (path,) = self._core.collect_path_info([node])
        if path:
            self._move(owner, path, epoch=epoch)
            self._ends.move_to_end(owner)
        return bool(path)

    def evicting(self, node: int) -> None:
        """A leaf is about to be evicted: contexts that end with it end before it from now on."""
        if owners := self._at.get(node):
            (path,) = self._core.collect_path_info([node])
            for owner in tuple(owners):
                self._taken.setdefault(owner, self._ends[owner].tokens)
                shared = owner.shared if isinstance(owner, Superseded) else 0
                if len(path) > 1 and path[-2].path_end > shared:
                    end, left = self._ends[owner], path[-2].path_end
                    self._move(owner, path[:-1], max(0, end.charged + left - end.tokens))
                else:
                    self._drop(owner)

    def _drop(self, owner: Hashable) -> None:
        """Nothing of the owner's context is on the device any more, or it is nobody's."""
        self._leave(owner)
        del self._ends[owner]
        if isinstance(owner, Superseded):
            self._waits.forget(owner)

    def held(self, account: str) -> int:
        """How many bytes of the device are charged to an account."""
        return self._n_bytes(self._held[account])

    def held_by(self) -> dict[str, int]:
        """How many bytes of the device are charged to each account. From any thread."""
        return {account: self._n_bytes(tokens) for account, tokens in self._held.copy().items() if tokens}

    def room_of(self, owner: Hashable, tokens: int) -> bool:
        """Whether the account of the owner may have so many tokens more."""
        account = self._accounts.of(owner)
        limit = self._accounts.limit(account, "device")
        return limit is None or self._n_bytes(self._held[account] + tokens) <= limit

    def giving(self) -> list[Hashable]:
        """The contexts that give first, in order: those that wait of accounts that have more than they may, as far as
        each of these has more. Empty where no account has a limit."""
        giving: list[Hashable] = []
        for account, limit in self._accounts.limits("device").items():
            left = self._held[account]
            if self._n_bytes(left) <= limit:
                continue
            own = {owner: end.charged for owner, end in self._ends.items() if end.account == account and end.charged}
            for index, owner in sorted(((self._waits.index(owner), owner) for owner in own), key=itemgetter(0)):
                if index == math.inf or self._n_bytes(left) <= limit:
                    break
                giving.append(owner)
                left -= own[owner]
        return giving

    def superseded(self, session_id: Hashable) -> int:
        """How many tokens on the device the session has left. From any thread."""
        ends = self._ends.copy()
        left = ((owner, end) for owner, end in ends.items() if isinstance(owner, Superseded))
        return sum(end.tokens - owner.shared for owner, end in left if owner.session_id == session_id)

    def taken(self) -> dict[Hashable, int]:
        """From whom evictions have taken since this was last asked, and how many tokens each had before."""
        taken, self._taken = self._taken, {}
        return taken

    def forget(self) -> None:
        """The tree is emptied."""
        for owner in self._ends:
            if isinstance(owner, Superseded):
                self._waits.forget(owner)
        self._taken.clear()
        self._ends.clear()
        self._at.clear()
        self._named.clear()
        self._held.clear()

    def tokens(self, owner: Hashable) -> int:
        """How many tokens of the owner's context are on the device."""
        return self._ends[owner].tokens if owner in self._ends else 0

    def has_window(self, owner: Hashable) -> bool:
        """Whether the owner's context can be gone on from: of the windows before its end, all is on the device. Without
        sliding windows it can."""
        if not self._window_tokens or owner not in self._ends:
            return True
        (path,) = self._core.collect_path_info([self._ends[owner].node])
        first = path[-1].path_end - self._window_tokens
        in_window = (node for node in path if node.path_end > first)
        values = (self._core.get_component_device_value(node.node_id, ComponentType.SWA) for node in in_window)
        return all(value is not None for value in values)

    def standing(self) -> list[tuple[Hashable, float, int]]:
        """Every context on the device: its owner, what a byte of it is worth, and its tokens. From any thread."""
        return [(owner, self._waits.index(owner), end.tokens) for owner, end in self._ends.copy().items()]

    def displaced(self, tokens: int) -> float:
        """The largest index of what an eviction of ``tokens`` takes: 0 where nothing has to go, or only what gives
        first, infinite where more has to go than there is."""
        if tokens <= 0:
            return 0.0
        giving = self.giving()
        for number, owner in enumerate(self._ascending(giving, compared_only=True)):
            tokens -= self._own(owner)
            if tokens <= 0:
                return 0.0 if number < len(giving) else self._waits.index(owner)
        return math.inf

    def rounds(self, tokens: int) -> Iterator[set[int]]:
        """The nodes that an eviction of ``tokens`` passes over, walk by walk, each time fewer. No walk where nothing is
        known that the order in which contexts were used does not tell. The same on all ranks."""
        own = self._rounds(tokens)
        if self._ranks.alone:
            yield from ({end.node for end in passed} for passed in own)
            return
        while names := self._ranks.list_of_first(self._passed_over(own)):
            # A turn may be proven to some ranks only: to these, its session's last end is another one.
            known = self._ranks.on_all([name in self._named for name in names])
            yield {self._named[name] for name, on_all in zip(names, known, strict=True) if on_all}

    def _passed_over(self, own: Iterator[list[_End]]) -> list[int]:
        """What this rank would pass over next, if it decides."""
        return [end.name for end in next(own, ())][:_AGREED] if self._ranks.decides else []

    def _rounds(self, tokens: int) -> Iterator[list[_End]]:
        """What this rank alone would pass over, who is worth most first."""
        if not (tokens and self._ends):
            return
        giving = self.giving()
        if not (giving or self._waits.foreseen):
            return
        ascending = self._ascending(giving)
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

    def _ascending(self, giving: Sequence[Hashable], *, compared_only: bool = False) -> list[Hashable]:
        """The contexts in the order in which they are to leave, those that give first before all others."""
        newer = () if compared_only else islice(self._ends, _COMPARED, None)
        others = [*sorted(islice(self._ends, _COMPARED), key=self._waits.index), *newer]
        if not giving:
            return others
        first = set(giving)
        return [*giving, *(owner for owner in others if owner not in first)]

    def _own(self, owner: Hashable) -> int:
        """How many tokens on the device are the owner's alone."""
        if (end := self._ends.get(owner)) is None:
            return 0
        (path,) = self._core.collect_path_info([end.node])
        shared = max((node.path_end for node in path[:-1] if node.num_children > 1), default=0)
        return end.tokens - shared

    def _move(self, owner: Hashable, path: Sequence[Any], charged: int | None = None, epoch: int | None = None) -> None:
        """The owner's context ends with the last node of ``path``, of which ``charged`` tokens are charged to it."""
        charged = self._charged(owner, path) if charged is None else charged
        if epoch is None:
            epoch = self._ends[owner].epoch if owner in self._ends else 0
        if owner in self._ends:
            self._leave(owner)
        last = path[-1]
        name = 0 if self._ranks.alone else int(self._core.get_last_hash_value(last.node_id)[:15], 16)
        account = self._accounts.of(owner.session_id if isinstance(owner, Superseded) else owner)
        self._ends[owner] = _End(last.node_id, last.path_end, name, charged, account, epoch)
        self._held[account] += charged
        self._at.setdefault(last.node_id, set()).add(owner)
        if not self._ranks.alone:
            self._named[name] = last.node_id

    def _charged(self, owner: Hashable, path: Sequence[Any]) -> int:
        """How many tokens of ``path`` are charged to the owner, whose context ends with it from now on."""
        before, end = self._ends.get(owner), path[-1].path_end
        goes_on = before is not None and any(node.node_id == before.node for node in path)
        tokens, charged = (before.tokens, before.charged) if goes_on else (0, 0)
        shared = (node.path_end for node in path[:-1] if node.num_children > 1)
        others = (node.path_end for node in path if self._at.get(node.node_id, set()) - {owner})
        return charged + end - min(end, max(chain((tokens,), shared, others)))

    def _leave(self, owner: Hashable) -> None:
        end = self._ends[owner]
        self._held[end.account] -= end.charged
        there = self._at[end.node]
        there.discard(owner)
        if not there:
            del self._at[end.node]
            self._named.pop(end.name, None)
