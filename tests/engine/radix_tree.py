"""SGLang's radix cache on memory of its own, without an engine: its trees and its allocator are real, the linker and
the requests are stand-ins."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.cache_init_params import CacheInitParams

from agentstate.fleet.turns import Turn
from agentstate.lookahead import policies
from agentstate.pages import Need
from engine_patch.accounts import Accounts
from engine_patch.break_even import Word
from engine_patch.decisions import Decisions
from engine_patch.foresight import ForesightStats
from engine_patch.order import OrderStats
from engine_patch.radix_cache import AgentStateRadixCache
from engine_patch.restore import Finished, PreloadStats
from engine_patch.served import Served
from engine_patch.sglang_api import (
    ComponentType,
    InsertParams,
    MatchPrefixParams,
    PagedTokenToKVPoolAllocator,
    PoolName,
    PoolTransfer,
    RadixKey,
    SWAKVPool,
)
from engine_patch.turns import RequestSession
from engine_patch.waits import Waits

PAGE_SIZE = 4
PAGES = 64
TREES = ("python", "rust")


class Linker:
    """What of a linker the tree asks: ``stores`` are the keys that its rank has, ``offers`` those that it was offered
    and has not answered, ``demoted`` what it was to copy to host memory, of which so many are ``copied``."""

    pools: Mapping[PoolName, Any] = {PoolName.KV: None}
    word = Word.RESTORE
    restores = reads_ahead = True
    preload_bytes = window_pages = 0
    by_choice = False
    retired = False
    drive_timeout_s = 3600.0
    quarantines_pages = stuck = demotes = False
    queue_aging_s = 10.0

    def __init__(self, clock: Callable[[], float]) -> None:
        self.waits = Waits(policies.planner, clock)
        self.accounts = Accounts()
        self.foresight_stats = ForesightStats()
        self.served = Served(clock)
        self.decisions = Decisions()
        self.order_stats = OrderStats()
        self.preload_stats = PreloadStats()
        self.stores: set[str] = set()
        self.offers: list[list[str]] = []
        self.lost = 0
        self.refuses = False
        self.finished: list[str] = []
        self.demoted: list[tuple[list[str], list[int], str | None]] = []
        self.copied = 0
        self.pinned: list[tuple[str, float]] = []
        # What is being loaded ahead, of which so many have ``landed_batches``, and of these some ``failed_batches``.
        self.loads: list[tuple[list[bytes], Mapping[PoolName, torch.Tensor]]] = []
        self.landed_batches = 0
        self.failed_batches: set[int] = set()
        self._answers: list[bool] = []

    bring = None

    def pin(self, session_id: str, for_s: float) -> None:
        self.pinned.append((session_id, for_s))

    def n_bytes(self, pages: int) -> int:
        """A page is a byte."""
        return pages

    def attach(self, device: Any, explain: Any, kept: Callable[[], dict[str, int]], held: Any) -> None:
        self.kept_by_tree = kept

    def lose(self, *keys: str) -> None:
        self.stores -= set(keys)
        self.lost += len(keys)

    def answer(self, stored: bool) -> None:
        """Everything that was offered is stored, or nothing."""
        for keys in self.offers:
            self.stores.update(keys if stored else ())
            self._answers.append(stored)
        self.offers.clear()

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        if not self.refuses:
            self.offers.append(transfers[0].keys)
        return not self.refuses

    def demote(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        full, *_ = transfers
        self.demoted.append((full.keys, full.device_indices.tolist(), session_id))
        return not self.refuses

    def can_restore(self, keys: Sequence[bytes]) -> bool:
        return self.stores.issuperset(key.hex() for key in keys)

    def preload(self, rid: str, keys: list[bytes], slots: Mapping[PoolName, torch.Tensor], need: Need) -> int:
        self.loads.append((keys, slots))
        return len(self.loads) - 1

    def hasten(self, batch: int, need: Need) -> None: ...

    def landed(self, batch: int) -> bool:
        return batch < self.landed_batches

    def layers_landed(self, batch: int) -> int:
        return 0

    def is_queued(self, batch: int) -> bool:
        return False

    def finish(self, batch: int) -> Finished:
        return Finished({"a prefetch"} if batch in self.failed_batches else set())

    def num_demoted(self) -> int:
        return self.copied

    def pop_demoted(self) -> bool:
        self.copied -= 1
        return True

    def stored(self, transfers: Sequence[PoolTransfer]) -> bool:
        return self.stores.issuperset(transfers[0].keys)

    def num_completed_offloads(self) -> int:
        return len(self._answers)

    def pop_completed_offload(self) -> bool:
        return self._answers.pop(0)

    def matching(self, cached: int) -> None: ...

    def inserting(self, rid: str) -> None: ...

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        keys = transfers[0].keys
        return [pages for pages in range(1, len(keys) + 1) if self.stores.issuperset(keys[:pages])]

    def computes(self, rid: str, pages: int, word: int) -> bool:
        return False

    def tidy(self, queued: Any) -> None: ...

    def turn(self, session: RequestSession) -> Turn | None:
        return Turn(str(session), 1, "")

    def request_finished(self, turn: Turn, key: RadixKey) -> None:
        self.finished.append(turn.session_id)

    def reset(self) -> None:
        self.offers.clear()
        self._answers.clear()


class Tree(AgentStateRadixCache):
    """``agree`` is called for what ranks agree on, with what this one says. ``linker`` makes the linker, and
    ``parameters`` are more of SGLang's for a cache."""

    def __init__(
        self,
        backend: str,
        agree: Callable[[torch.Tensor], None] = lambda said: None,
        linker: Callable[[Callable[[], float]], Any] = Linker,
        **parameters: Any,
    ):
        kv: Any = SimpleNamespace()
        of_full_attention = {
            "token_to_kv_pool_allocator": PagedTokenToKVPoolAllocator(
                PAGES * PAGE_SIZE, PAGE_SIZE, torch.float32, "cpu", kv, need_sort=False
            ),
            "tree_components": (ComponentType.FULL,),
        }
        params: Any = CacheInitParams(
            disable=False,
            req_to_token_pool=None,
            page_size=PAGE_SIZE,
            tree_core_backend=backend,
            **{**of_full_attention, **parameters},
        )
        super().__init__(params)
        self.agree = agree
        self.now_s = 0.0
        self.store = linker(lambda: self.now_s)
        self.init_cache_linker(self.store)

    def _all_reduce_attn_groups(self, tensor: torch.Tensor, op: Any) -> None:
        assert op == torch.distributed.ReduceOp.MIN
        self.agree(tensor)

    def compute(self, key: RadixKey, session_id: str = "s", epoch: int = 0, *, proven: bool = True) -> None:
        """A request of a session, in a turn of that number which is ``proven`` to this rank, computes what of ``key``
        is not there, and ends."""
        there = self.match_prefix(MatchPrefixParams(key=key))
        slots = self.take(len(key) - there.device_prefix_len)
        root = self.root_node_handle(key.extra_key)
        prefix = self.tree_core.collect_full_device_indices(there.last_device_node, root)
        value, known = torch.cat([prefix, slots]), there.device_prefix_len
        session = RequestSession(session_id)
        self.insert(InsertParams(key=key, value=value, prev_prefix_len=known, session_id=session))
        self.linker.lost_pages.finished(session, key)
        owner = (session_id or None) if proven else None
        self.eviction.ended(owner, self.tree_core.match_full_device_prefix(key)[1], epoch)

    def take(self, tokens: int) -> torch.Tensor:
        """Slots for a request."""
        return self.token_to_kv_pool_allocator.alloc(tokens)

    def settle(self, stored: bool = True) -> None:
        """Everything that was offered is stored, or nothing, and the tree knows."""
        self.store.answer(stored)
        self.check_hicache_events()


class WindowTree(Tree):
    """Of a model with sliding windows of so many pages, whose pool has room for ``window_room`` pages."""

    def __init__(
        self,
        backend: str,
        window_pages: int = 2,
        window_room: int = PAGES,
        kind: type[Linker] = Linker,
        **parameters: Any,
    ):
        def linker(clock: Callable[[], float]) -> Linker:
            made = kind(clock)
            made.pools = {PoolName.KV: None, PoolName.SWA: None}
            made.window_pages = window_pages
            return made

        sizes = {"size": PAGES * PAGE_SIZE, "size_swa": window_room * PAGE_SIZE, "page_size": PAGE_SIZE}
        kv = SWAKVPool(
            **sizes,
            dtype=torch.float32,
            device="cpu",
            head_num=1,
            head_dim=1,
            enable_memory_saver=False,
            swa_attention_layer_ids=[0],
            full_attention_layer_ids=[1],
        )
        allocator = SWATokenToKVPoolAllocator(**sizes, dtype=torch.float32, device="cpu", kvcache=kv, need_sort=False)
        super().__init__(
            backend,
            linker=linker,
            token_to_kv_pool_allocator=allocator,
            tree_components=(ComponentType.FULL, ComponentType.SWA),
            sliding_window_size=window_pages * PAGE_SIZE,
            **parameters,
        )

    def take(self, tokens: int) -> torch.Tensor:
        allocator = self.token_to_kv_pool_allocator
        full, window = allocator.full_attn_allocator.alloc(tokens), allocator.swa_attn_allocator.alloc(tokens)
        allocator.set_full_to_swa_mapping(full, window)
        return full

    @property
    def missing(self) -> tuple[int, int]:
        """How many tokens of both pools are neither free nor the tree's."""
        allocator = self.token_to_kv_pool_allocator
        full = allocator.full_available_size() + self.full_evictable_size() + self.full_protected_size()
        window = allocator.swa_available_size() + self.swa_evictable_size() + self.swa_protected_size()
        return allocator.size_full - full, allocator.size_swa - window


def key_of(pages: int, seed: int = 0, shared: int = 0) -> RadixKey:
    """A key of so many pages, ``shared`` of them everybody's."""
    own = [1000 + seed * 1000 + i for i in range((pages - shared) * PAGE_SIZE)]
    return RadixKey(array("q", [*range(shared * PAGE_SIZE), *own]))
