"""Pages that the store has lost, evicted or found damaged, while they are still on the device.

The radix tree marks what is stored, and does not offer it again. So lost pages are offered past the tree, when a
request of their session has ended: under the lock that the tree takes for an offer of its own, and with nothing to mark
when the result is in. All ranks offer alike: all offer what one has lost, and the others find that they have it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, Protocol

from engine_patch.demotions import device_pages_of
from engine_patch.linker import AgentStateLinker
from engine_patch.sglang_api import (
    MatchPrefixParams,
    PendingOffload,
    PoolTransfer,
    RadixKey,
    UnifiedRadixCache,
    get_parallel,
)
from engine_patch.turns import RequestSession

# How many session ids are remembered. The pages of a forgotten one are looked at once more.
_MOST_SESSIONS = 100_000


class Offers(Protocol):
    """The tree's side of what is offered."""

    pending_offloads: list[Any]

    def note_offered(self, node_id: int) -> None:
        """A node was queued, last of all."""


class LostPages:
    """Is told when pages were lost, on any rank (`look`, `lost_on`), and when a request of a session has ended. Offers
    through ``wrapper``; ``on_all_ranks`` tells which answers are yes on every rank."""

    def __init__(
        self,
        cache: UnifiedRadixCache,
        wrapper: Offers,
        linker: AgentStateLinker,
        on_all_ranks: Callable[[Sequence[bool]], list[bool]],
    ):
        self._cache = cache
        self._wrapper = wrapper
        self._linker = linker
        self._on_all_ranks = on_all_ranks
        self._alone = get_parallel().attn_tp_size == 1
        self._counted = 0
        self._ever = False
        # The sessions, with their turn tokens, whose pages were looked at since pages were last lost. With the token,
        # nobody else's request counts for a session, and all ranks agree without knowing whether a token is valid.
        self._looked_at: set[bytes] = set()

    def look(self) -> bool:
        """Whether this rank has lost pages since it was last asked."""
        before, self._counted = self._counted, self._linker.lost
        return self._counted != before

    def lost_on(self, some_rank: bool) -> None:
        """``some_rank``: whether any rank has lost pages, or has not stored what was offered here. All ranks say the
        same."""
        if some_rank:
            self._ever = True
            self._looked_at.clear()

    def finished(self, session: RequestSession, key: RadixKey, proven: bool = True) -> None:
        """A request of the session has ended with ``key`` in the tree: offer again its pages that are not stored. They
        count as needed by the session if the request has ``proven`` its turn."""
        looked_at = hashlib.blake2b(session.sent.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if self._alone:
            self.lost_on(self.look())
        if not self._ever or looked_at in self._looked_at:
            return
        if len(self._looked_at) >= _MOST_SESSIONS:
            self._looked_at.clear()
        self._looked_at.add(looked_at)
        nodes = list(self._path(key))
        if not nodes:
            return
        stored = self._on_all_ranks([self._linker.stored(transfers) for _, transfers in nodes])
        for (node, transfers), is_stored in zip(nodes, stored, strict=True):
            if not is_stored and not self._offer(node, transfers, session if proven else None):
                # Leave no holes in the chain. The next request tries again.
                self._looked_at.discard(looked_at)
                break

    def _path(self, key: RadixKey) -> Iterator[tuple[int, list[PoolTransfer]]]:
        """The nodes along ``key`` that are on the device, from the root on, with what the tree would offer of them;
        without those that have been offered and not answered."""
        cache, core = self._cache, self._cache.tree_core
        found = cache.match_prefix(MatchPrefixParams(key=key.page_aligned(cache.page_size)))
        pending = self._wrapper.pending_offloads
        offered = set(chain.from_iterable(offer.publish_node_ids or [offer.lock_node_id] for offer in pending))
        (path,) = core.collect_path_info([found.last_device_node])
        for node in path:
            if node.node_id not in offered and (keys := core.get_hash_values(node.node_id)):
                yield node.node_id, device_pages_of(cache, node.node_id, keys, node.parent_id)

    def _offer(self, node: int, transfers: list[PoolTransfer], session: RequestSession | None) -> bool:
        lock = self._cache.inc_lock_ref(node).to_dec_params()
        queued = False
        try:
            queued = self._linker.offload(transfers, session_id=session)
        finally:
            if not queued:
                self._cache.dec_lock_ref(node, lock)
        if queued:
            self._wrapper.pending_offloads.append(PendingOffload(node, lock, []))
            self._wrapper.note_offered(node)
        return queued
