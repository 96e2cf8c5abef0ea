"""SGLang's radix cache with AgentState's linker: manifests at a request's end, recomputation where a restore failed.

How a failed restore is recomputed. The forward has run on slots that were not filled, so its output must never be
seen. The request is marked as finished with that output discarded, which is the one state in which all of SGLang's
result processing (logprobs, hidden states, overlap scheduling) drops an output without touching its neighbours in the
batch; and as already streamed, so that no client hears of it. Once no batch holds it any more, it is made new and
queued again, and its next match ends before the page that failed, or finds nothing if no page did (`Failures`).
Embeddings are sent of every request that is finished: such a request is marked as retracted instead, which drops its
result as well, and finished when that is over. What SGLang would spoil of a request that is finished, or has spoiled by
then, is taken from it first (`_Recomputation`). Only a request that is being aborted, or whose KV a streaming session
owns, is aborted with 503, as stock SGLang aborts every request whose load failed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from agentstate.pages import PageKeys
from engine_patch import hints, provenance
from engine_patch.break_even import Word
from engine_patch.deferrals import Deferrals, StoredHit, running
from engine_patch.demotions import Demotions, chain_of
from engine_patch.device_tier import DeviceTier
from engine_patch.eviction import EvictionOrder
from engine_patch.foresight import Foresight
from engine_patch.kv_events import KvEvents
from engine_patch.linker import AgentStateLinker
from engine_patch.lost_pages import LostPages
from engine_patch.order import Order
from engine_patch.preloads import Preloads
from engine_patch.ranks import Ranks
from engine_patch.restore import Restored
from engine_patch.sglang_api import (
    FINISH_ABORT,
    AbortReq,
    EvictParams,
    EvictResult,
    PoolTransfer,
    RadixKey,
    UnifiedCacheLinkerWrapper,
    UnifiedRadixCache,
    model_group,
    release_kv_cache,
)
from engine_patch.trailing import Trailing
from engine_patch.turns import RequestSession
from engine_patch.weights import RESTART, Weights

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.mem_cache.base_prefix_cache import EvictResult, MatchResult

logger = logging.getLogger(__name__)

# How many of a session's newest restores are told.
_RESTORES = 20


class _LinkerWrapper(UnifiedCacheLinkerWrapper):
    """Stock, but that a load's verdict is one a request instead of one a batch, that ranks agree on what is worth
    restoring, that nodes are offered which the tree does not offer, and that nothing stays of a match that another one
    of the same request has replaced."""

    cache_linker: AgentStateLinker
    # Whether the engine is sent what it lacks, and loads nothing.
    receives = False
    # Tells routers what is stored, if they are to be told anything.
    kv_events: KvEvents | None = None

    def __init__(self, cache: UnifiedRadixCache, cache_linker: AgentStateLinker):
        super().__init__(cache, cache_linker)
        # What was restored for requests whose step has not been timed yet.
        self.landed: dict[str, Restored] = {}
        # What requests of the last batch have restored and the tree does not have yet.
        self.entering: dict[str, StoredHit] = {}
        # Whether device pages have become evictable, because they are stored now, or free, since someone last looked.
        self.unlocked = False
        self.lost_pages = LostPages(cache, self, cache_linker, self.on_all_ranks)
        self._rid = ""
        # Whether what the last match found needs the shared store.
        self.shared = False

    def take_completed_offloads(self, finish_count: int) -> list[bool]:
        results = super().take_completed_offloads(finish_count)
        # Ranks agree on these next: so they do on whether one of them has lost pages, without asking for that alone.
        return [*results, not self.lost_pages.look()] if results else results

    def commit_completed_offloads(self, successes: Sequence[bool]) -> None:
        *results, none_lost = successes
        # Nothing in the tree says that these are not stored.
        answered = zip(self.pending_offloads[: len(results)], results, strict=True)
        failed = any(not stored and not offer.publish_node_ids for offer, stored in answered)
        super().commit_completed_offloads(results)
        if self.kv_events is not None:
            self.kv_events.answered(len(results))
        self.lost_pages.lost_on(failed or not none_lost)
        self.unlocked = True

    def _offload_node(self, node_id: int, transfers: list[PoolTransfer]) -> None:
        before = len(self.pending_offloads)
        super()._offload_node(node_id, transfers)
        if len(self.pending_offloads) > before:
            self.note_offered(node_id)

    def note_offered(self, node_id: int) -> None:
        if self.kv_events is not None:
            self.kv_events.offered(node_id)

    def reset(self) -> None:
        super().reset()
        if self.kv_events is not None:
            self.kv_events.reset()

    def replace_pending_offload_node(self, ack_id: int, old_node_id: int, new_node_ids: list[int]) -> None:
        """Stock takes the first offload that locks the node. That may be one of ours, which has none to mark."""
        for index, pending in enumerate(self.pending_offloads):
            if pending.lock_node_id == ack_id and (marked := pending.publish_node_ids):
                parts = [new_node_ids if node == old_node_id else [node] for node in marked]
                self.pending_offloads[index] = pending._replace(publish_node_ids=sum(parts, []))

    def note_unlocked(self) -> None:
        self.unlocked = True

    def match(self, key: RadixKey, req: Req, result: MatchResult) -> MatchResult:
        if self.receives:
            return result
        # An earlier match may have found what is on the device by now: nothing would take its marker then.
        self.hit_markers.pop(req.rid, None)
        self._rid, self.shared = req.rid, False
        self.cache_linker.matching(result.device_prefix_len)
        return super().match(key, req, result)

    def load_back(self, req: Req) -> tuple[int, Any]:
        hit = self.hit_markers.get(req.rid)
        loaded, node = super().load_back(req)
        if hit is not None and loaded:
            self.entering[req.rid] = stored_hit(req, hit, self.cache)
        return loaded, node

    def _sync_restorable_prefix(self, restorable: Sequence[int], *, num_pages: int, device_hit_pages: int) -> int:
        """The longest length that every rank can restore, as stock; 0 where all of them together find that computing it
        is faster. Lengths are entered at once: one at a time, a million of them took seconds."""
        lengths = torch.from_numpy(np.array(restorable, dtype=np.int64))
        mask = torch.zeros(num_pages + 2, dtype=torch.int)
        mask[lengths[(lengths > device_hit_pages) & (lengths <= num_pages)]] = 1
        mask[-1] = self.cache_linker.word
        self.cache._all_reduce_attn_groups(mask, torch.distributed.ReduceOp.MIN)
        common = mask[:-1].nonzero()
        if not len(common):
            return 0
        pages, word = int(common[-1]), int(mask[-1])
        self.shared = word == Word.SHARED
        return 0 if self.cache_linker.computes(self._rid, pages, word) else pages

    def finish_loads(self, trail: Callable[[int, list[str]], bool] = lambda index, rids: False) -> list[str]:
        """Wait for the loads of the batch that just ran: the rids that failed, identical on every rank. Loads start
        with a batch of prefills and are over with it, so that a batch that only decodes has none; unless the requests
        ``trail`` them, as it tells of the number of the batch of loads and their rids: then nothing is known of them
        yet, and `conclude` is still to come."""
        if self.inflight_load_index < 0:
            # What is queued belongs to a batch that has not run.
            return []
        rids, self.inflight_load_rids = self.inflight_load_rids, []
        if not rids:
            return []
        index, self.inflight_load_index = self.inflight_load_index, -1
        if trail(index, rids):
            for rid in rids:
                self.private_load_indices.pop(rid, None)
            return []
        failed, restored = self.conclude(index, rids)
        if restored is not None:
            self.landed.update(dict.fromkeys(rids, restored))
        for rid in rids:
            self.private_load_indices.pop(rid, None)
        for rid in failed:
            self.entering.pop(rid, None)
        return failed

    def conclude(self, index: int, rids: Sequence[str]) -> tuple[list[str], Restored | None]:
        """Wait for a batch of loads: the rids that failed, identical on every rank, and what was restored if none
        has."""
        found = self.cache_linker.finish(index)
        over, *landed = self.on_all_ranks([not found.writing, *(rid not in found.failed for rid in rids)])
        if not over:
            # Ranks give out pages alike.
            self.cache_linker.quarantine(found)
        failed = [rid for rid, good in zip(rids, landed, strict=True) if not good]
        return failed, None if failed else found.restored

    def loads(self, rid: str) -> bool:
        """Whether a request's load has not been concluded by `finish_loads`."""
        return rid in self.private_load_indices or rid in self.inflight_load_rids

    def tidy(self, queued: Callable[[], Collection[str]]) -> None:
        """Let go of what was read for requests that are not ``queued`` any more, and of the device pages to which no
        rank's drive writes any more. At the same step on every rank."""
        linker = self.cache_linker
        linker.tidy(queued)
        if linker.quarantines_pages and all(self.on_all_ranks([not linker.stuck])):
            linker.release_quarantine()
            self.unlocked = True

    def weights_updated(self, weights: Weights) -> None:
        """Weights were updated while it was suspended. On every rank of the model: what one of them doubts, all do."""
        linker = self.cache_linker
        same, of_files = self.on_whole_model([weights is Weights.SAME, weights is Weights.OF_FILES])
        reason = linker.reload() if of_files else None
        if of_files and not all(self.on_whole_model([reason is None])):
            reason = reason or "the weights of another rank were updated in a way that cannot be told"
            linker.retire(f"{reason}; {RESTART}")
        elif same or of_files:
            linker.resume()
        else:
            linker.retire(f"its weights were updated in place, and what they are cannot be told; {RESTART}")
        if self.kv_events is not None:
            self.kv_events.look_again()

    def on_all_ranks(self, local: Sequence[bool]) -> list[bool]:
        """Which of these is so on every rank, all of which ask."""
        both = torch.tensor(local, dtype=torch.int)
        self.cache._all_reduce_attn_groups(both, torch.distributed.ReduceOp.MIN)
        return [bool(one) for one in both.tolist()]

    def on_whole_model(self, local: Sequence[bool]) -> list[bool]:
        """The same of every rank that computes with the same copy of the weights, of whatever DP rank. SGLang has them
        do at once what operators ask for."""
        found = self.on_all_ranks(local)
        if (group := model_group()) is not None:
            both = torch.tensor(found, dtype=torch.int)
            torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MIN, group=group)
            found = [bool(one) for one in both.tolist()]
        return found

    def kept(self) -> dict[str, int]:
        """What is kept for requests and offers at the moment, by SGLang and for it."""
        return {
            "hit_markers": len(self.hit_markers),
            "private_loads": len(self.private_load_indices),
            "loads_in_flight": len(self.inflight_load_rids),
            "locked_offers": len(self.pending_offloads),
            "untimed_restores": len(self.landed),
            "entering_restores": len(self.entering),
        }


class AgentStateRadixCache(UnifiedRadixCache):
    """`UnifiedRadixCache` of one rank, its pages linked to the rank's page store.

    ``linker`` is SGLang's name for the flow on the tree's side; the linker itself is ``agentstate``.
    """

    linker: _LinkerWrapper
    agentstate: AgentStateLinker
    # Whether it prefills for another engine, which decodes.
    _hands_over = False
    # The requests that run before all that they restore is there, where prefixes are restored by choice.
    trailing: Trailing | None = None

    def __init__(self, params: Any):
        super().__init__(params)
        # Requests whose restore failed, until they are queued again.
        self._recomputing: list[_Recomputation] = []
        # What this rank's pages were valid for when the first KV of a request was sent.
        self._sent_as: WeakKeyDictionary[Req, bytes | None] = WeakKeyDictionary()
        self._params = params
        # SGLang sends embeddings also of a request that is marked as sent.
        self._generates = True
        self._beams: Any = None
        self._locked_tokens = 0
        # The nodes that the walk which is under way passes over.
        self._passed_over: set[int] = set()

    def init_cache_linker(self, cache_linker: AgentStateLinker) -> None:
        self.agentstate = cache_linker
        self.linker = _LinkerWrapper(self, cache_linker)
        if cache_linker.by_choice:
            self.trailing = Trailing(cache_linker.trailed, lambda index, rids: self.linker.conclude(index, rids)[0])
        if self._params.enable_kv_cache_events:
            self.linker.kv_events = KvEvents(self.tree_core, cache_linker, self._params)
        self.preloads = Preloads(self, cache_linker, self.linker.on_all_ranks, self.linker.note_unlocked)
        self.order = Order(
            cache_linker.queue_aging_s, cache_linker.order_stats, self._stored_hit, self.linker.on_all_ranks
        )
        self.served = cache_linker.served

        def n_bytes(tokens: int) -> int:
            return cache_linker.n_bytes(tokens // self.page_size)

        ranks = Ranks(self.least_on_ranks)
        self.eviction = EvictionOrder(
            self.tree_core,
            cache_linker.waits,
            ranks,
            cache_linker.accounts,
            n_bytes,
            cache_linker.window_pages * self.page_size,
        )
        self.demotions = Demotions(self, cache_linker, ranks, self.linker.note_unlocked, self.eviction.giving)
        self.deferrals = Deferrals(
            self, cache_linker, self.preloads, self._stored_hit, self.order, self.served, self.demotions.holds_up
        )
        self.device_tier = DeviceTier(self, cache_linker, self.preloads, ranks, self._brought, self.served.restores)
        self.foresight = Foresight(
            cache_linker.waits,
            self.eviction,
            cache_linker.foresight_stats,
            cache_linker.decisions,
            length=self.device_tier.tokens,
            room=self.token_to_kv_pool_allocator.available_size,
            bring=cache_linker.bring if self.device_tier.moves and ranks.decides else None,
            n_bytes=n_bytes,
            pin=cache_linker.pin,
        )
        cache_linker.attach(self.device_tier, self._explain, self.kept, self.eviction.held_by)

    def disaggregate(self, mode: str) -> None:
        """Take a part where prefill and decode are apart: ``mode`` is SGLang's, ``prefill``, ``decode`` or ``null``."""
        self._hands_over = mode == "prefill"
        self.linker.receives = mode == "decode"

    def _explain(self, session_id: str) -> dict[str, Any]:
        """Where a session is, what it waits for, what of it was left, and what was restored of it lately. From any
        thread."""
        return {
            **self.foresight.explain(session_id),
            "left_tokens": self.eviction.superseded(session_id),
            "restores": self.served.restores.of(session_id, _RESTORES),
        }

    def _brought(self, session_id: str, key: RadixKey, start: int = 0) -> None:
        self.eviction.brought(session_id, self.tree_core.match_full_device_prefix(key)[1])
        self.served.fetched(session_id, start, len(key))

    def kept(self) -> dict[str, int]:
        """What the tree keeps for requests and offers. From any thread; ``locked_tokens`` are those that no eviction
        may take, before the newest batch."""
        return {
            **self.linker.kept(),
            **self.device_tier.kept(),
            "preloads": len(self.preloads),
            "fetches": self.foresight.kept,
            "locked_demotions": len(self.demotions),
            "deferrals": self.deferrals.kept,
            "ordered_requests": self.order.kept,
            "recomputations": len(self._recomputing),
            "trailing_requests": 0 if self.trailing is None else self.trailing.kept,
            "served_requests": self.served.kept,
            "locked_tokens": self._locked_tokens,
        }

    def take_events(self) -> list[Any]:
        events = super().take_events()
        return events if self.linker.kv_events is None else self.linker.kv_events.take(events)

    def reset(self) -> None:
        if self.linker is not None:
            self.preloads.drop()
            self.deferrals.forget()
            self.order.clear()
            self.demotions.drop()
            self.linker.landed.clear()
            self.eviction.forget()
            self.foresight.cleared()
            self.linker.entering.clear()
            if self.trailing is not None:
                self.trailing.clear()
        super().reset()

    def claim_kv_row(self, req: Req) -> bool:
        """The first thing that SGLang does when it takes a request's pages away, whyever it does."""
        if self.trailing is not None and not self.trailing.settle(req):
            req.skip_radix_cache_insert = True
        return bool(super().claim_kv_row(req))

    def checkpoint_into_tree(self, req: Req, *, up_to: int, **kwargs: Any) -> None:
        if self.trailing is not None and self.trailing.postpones(req, up_to):
            return
        self.agentstate.inserting(req.rid)
        super().checkpoint_into_tree(req, up_to=up_to, **kwargs)
        self.linker.entering.pop(req.rid, None)
        if not req.finished() or self.disable:
            return
        turn = None
        if req.session_id:
            # The insert may have kept less than it was offered; what it kept is what the manifest may list.
            key = _key_of(req, req.kv.cache_inserted_len, self.tree_core.is_eagle)
            session = RequestSession(req.session_id)
            # Who only knows the id is served, and changes nothing that is known of the session.
            turn = self.agentstate.turn(session)
            self.linker.lost_pages.finished(session, key, turn is not None)
            # Proven or not: all ranks must do the same, and a turn may be proven to one of them only.
            self.demotions.ended(chain_of(req), key, str(session) if turn is not None else None)
            if turn is not None:
                self.device_tier.remember(turn.session_id, key)
                self.agentstate.request_finished(turn, key)
        session_id, epoch = (None, 0) if turn is None else (turn.session_id, turn.epoch)
        owner = self.eviction.ended(session_id, req.last_node, epoch)
        if req.kv_hints is not None and self.agentstate.foresees:
            self.foresight.hinted(owner, hints.of(req.kv_hints, self.agentstate.pin_max_s))

    def _evict(
        self,
        params: EvictParams,
        available_size_targets: Any = None,
        **further: Any,
    ) -> EvictResult:
        """As stock, but that what is worth least goes first (`EvictionOrder`)."""
        walk = partial(super()._evict, available_size_targets=available_size_targets, **further)
        total = EvictResult()
        for spared in self.eviction.rounds(max(params.num_tokens, params.swa_num_tokens)):
            missing = replace(_missing(params, total), mamba_num=0)
            with self._sparing(spared, windows=missing.swa_num_tokens > 0):
                _add(total, walk(missing))
            rest = _missing(params, total)
            if not (rest.num_tokens or rest.swa_num_tokens):
                break
        if (rest := _missing(params, total)) != EvictParams():
            _add(total, walk(rest))
        self.demotions.evicted(total.num_tokens_evicted)
        self.foresight.evicted(self.eviction.taken())
        return total

    @contextmanager
    def _sparing(self, nodes: Collection[int], *, windows: bool) -> Iterator[None]:
        """Walks within it take nothing from the contexts that end with these nodes, which are leaves. Of ``windows``
        they also take those of inner nodes, without showing them: they are locked."""
        self._passed_over = set(nodes)
        locks = [(node, self.inc_lock_ref(node).to_dec_params()) for node in nodes] if windows else []
        try:
            yield
        finally:
            self._passed_over = set()
            for node, lock in locks:
                self.dec_lock_ref(node, lock)

    @property
    def lora_names(self) -> Any:
        """SGLang's table of the names of adapters that its KV events tell."""
        return self._params.kv_event_lora_names

    def least_on_ranks(self, tensor: torch.Tensor) -> None:
        """Reduce a tensor to the minimum over all ranks, all of which call this."""
        self._all_reduce_attn_groups(tensor, torch.distributed.ReduceOp.MIN)

    def _evict_device_next_node(self, component_type: Any, tracker: Any) -> tuple[int | None, bool]:
        while True:
            node, progressed = super()._evict_device_next_node(component_type, tracker)
            if node not in self._passed_over:
                return node, progressed

    def _evict_device_leaf(self, node_id: int, tracker: Any) -> Any:
        self.eviction.evicting(node_id)
        return super()._evict_device_leaf(node_id, tracker)

    def end_wait(self, req: Req) -> None:
        """A request is being queued: whoever's it is does not wait any more."""
        gap, session_id = "none", None
        if req.session_id:
            self.demotions.goes_on(chain_of(req))
            if (turn := self.agentstate.turn(RequestSession(req.session_id))) is not None:
                session_id = turn.session_id
                gap = self.agentstate.waits.gap(session_id)
                self.foresight.back(session_id)
        if not req.retracted_stain:
            self.served.queued(req.rid, gap, session_id)

    def read_ahead(self, scheduler: Scheduler, req: Req) -> None:
        """Begin to read what a request will load, now that it is being queued behind others; unless it is to be
        preloaded, which begins before the next batch."""
        self.deferrals.queueing(req)
        self.order.queueing(req)
        runs = scheduler.chunked_req or not scheduler.running_batch.is_empty()
        looked_at = self.agentstate.reads_ahead or self.deferrals.on or self.order.on
        if not (runs or scheduler.waiting_queue or self.deferrals.shares) or not looked_at:
            return
        if not self.deferrals.brings(req):
            hit = self._stored_hit(req)
            preloaded = self.deferrals.matched(req, hit) and (runs or (hit is not None and hit.shared))
            if hit is not None and self.agentstate.reads_ahead and not preloaded:
                self.agentstate.read_ahead(req.rid, hit.keys)

    def _stored_hit(self, req: Req) -> StoredHit | None:
        """What a queued request can restore. When it is admitted it is matched again, and need not hit that then."""
        req.init_next_round_input(self, cow_mamba=False)
        found = self.linker.hit_markers.pop(req.rid, None)
        self.order.matched(req, req.prefix_len, len(found.tail_hashes) if found is not None else 0)
        if found is None:
            return None
        return replace(stored_hit(req, found, self), shared=self.linker.shared)

    def holds_up(self, req: Req, admitted: Sequence[Req]) -> bool:
        """Whether a request is not to be admitted in this step, after those that were: what it would drive out is
        copied to the host tier first."""
        tokens = len(req.full_untruncated_fill_ids) - req.prefix_len + sum(one.extend_len for one in admitted)
        return self.demotions.holds_up(tokens + self.page_size * (len(admitted) + 1))

    def before_next_batch(self, scheduler: Scheduler) -> None:
        """Everything that is done between two batches."""
        self._generates = scheduler.is_generation
        self._beams = scheduler.beam_coordinator
        self.foresight.step()
        self.device_tier.run(scheduler)
        self.preloads.land()
        self.device_tier.land()
        self.demotions.land()
        if self.linker.unlocked:
            # A request that found no room is not tried again before one that runs has ended, and the room that it
            # lacked may have been locked until it was stored.
            self.linker.unlocked = False
            scheduler.running_batch.batch_is_full = False
        if self.trailing is not None:
            for req, up_to in self.trailing.take_whole():
                self.checkpoint(req, up_to=up_to)
        self.requeue_failed(scheduler)
        self.order.step(scheduler.waiting_queue, scheduler.policy)
        # Whatever became of it, nobody waits for it longer than this step.
        entering, self.linker.entering = self.linker.entering, {}
        self.deferrals.begin(scheduler, entering.values())
        self.demotions.keep_ahead()
        self.linker.tidy(lambda: self._queued(scheduler))
        self.served.tidy(lambda: self._queued(scheduler) | {req.rid for req in running(scheduler)})
        self._locked_tokens = self.protected_size()

    def before_next_decode_batch(self, scheduler: Scheduler) -> None:
        """The same of an engine that decodes what others have prefilled: no request of its queues restores anything."""
        self.foresight.step()
        self.device_tier.run(scheduler)
        self.preloads.land()
        self.device_tier.land()
        self.demotions.land()
        self.linker.unlocked = False
        self.demotions.keep_ahead()
        self.linker.tidy(set)
        self._locked_tokens = self.protected_size()

    def _queued(self, scheduler: Scheduler) -> set[str]:
        """The requests that are queued, or about to be queued again."""
        handshakes = scheduler.disagg_prefill_bootstrap_queue.queue if self._hands_over else ()
        failed = () if self.trailing is None else self.trailing.failed
        waiting = (*scheduler.waiting_queue, *handshakes, *failed, *(item.req for item in self._recomputing))
        return {req.rid for req in waiting}

    @property
    def misses_memory(self) -> bool:
        """Whether device memory is neither free nor in the tree, because a drive writes to it."""
        return bool(self.preloads) or self.agentstate.quarantines_pages

    def finish_external_linker_loads(self, reqs: list[Req]) -> list[Req]:
        """Mark the requests whose restore failed (see the module's docstring), and return those that the caller must
        abort, as stock SGLang does with all of them: what cannot be made new once it is marked as finished."""
        rids = set(self.linker.finish_loads() if self.trailing is None else self._finish_loads(self.trailing, reqs))
        failed = [req for req in reqs if req.rid in rids]
        renewed = [req for req in failed if _can_be_renewed(req)]
        withheld = not self._generates or self._hands_over
        self._recomputing += [_Recomputation.of(req, self._beams, withheld=withheld) for req in renewed]
        for req in failed:
            req.skip_radix_cache_insert = True
            req.discard_output_reason = FINISH_ABORT("KV restore failed", HTTPStatus.SERVICE_UNAVAILABLE)
            if self._hands_over:
                # In the middle of a prompt, nothing else says that its KV is not to be sent.
                req.to_finish = req.discard_output_reason
        return [req for req in failed if req not in renewed]

    def _finish_loads(self, trailing: Trailing, reqs: Sequence[Req]) -> list[str]:
        """Where prefixes are restored by choice: the rids that failed in the batch that has just run. Requests that
        turn out to have failed since an earlier one are taken out of all batches."""

        def trail(index: int, rids: Collection[str]) -> bool:
            loading = [req for req in reqs if req.rid in rids]
            if self._hands_over or not self._generates or not all(_can_trail(req) for req in loading):
                return False
            if trails := self.agentstate.trail(index):
                trailing.begin(index, loading)
            return trails

        failed = self.linker.finish_loads(trail)
        trailing.look()
        trailing.ended = trailing.failed
        for req in trailing.ended:
            self._recompute_late(req)
        return failed

    def _recompute_late(self, req: Req) -> None:
        """A request that has trailed turns out to have bad pages, after it may have been sent tokens. These were
        computed from good ones. The result of the forward that just ran may not have been, and an earlier one may not
        have been looked at: both are passed over, and computed again."""
        item = _Recomputation.of(req, self._beams, withheld=True)
        if (reason := req.to_finish) is not None:
            # It is being aborted: in the queue, since no batch with it may come that would tell its client.
            item.abort = AbortReq(rid=req.rid, finished_reason=reason.to_json())
        # What it has reported as cached stays so.
        item.was_retracted = True
        self._recomputing.append(item)
        req.skip_radix_cache_insert = True
        req.discard_output_reason = FINISH_ABORT("KV restore failed", HTTPStatus.SERVICE_UNAVAILABLE)
        # Batches pass over what has finished, and nobody hears of what counts as sent.
        req.finished_output = True
        release_kv_cache(req, self, checkpoint=False)
        req.finished_reason = req.discard_output_reason

    def may_send(self, req: Req) -> bool:
        """Whether all of a request's KV is verified or computed from what is, so that it may go to the engine that
        decodes: its load, if it had one, is over, and every rank has found all of it good."""
        return req.discard_output_reason is None and not self.linker.loads(req.rid)

    def vouch(self, req: Req, buffers: Any) -> None:
        """KV of a request is about to be sent. With its last part, ``buffers``, SGLang's `MetadataBuffers`, take what
        all of it was computed with."""
        fingerprint = self.agentstate.fingerprint
        if req.start_send_idx <= req.disagg_decode_prefix_len:
            self._sent_as[req] = fingerprint
        if buffers is not None:
            same = self._sent_as.get(req) == fingerprint
            # The first token, which is on its way, has no KV.
            mark = provenance.mark(fingerprint if same else None, req, req.origin_input_ids)
            provenance.write(buffers, req.metadata_buffer_index, mark)

    def received(self, req: Req, buffers: Any, index: int) -> None:
        """All KV of a request has arrived, and its metadata in the row ``index`` of SGLang's ``buffers``. If it is not
        what this engine would have computed itself, keep it out of the tree, and so out of every store. At the same
        step on every rank."""
        if req.skip_radix_cache_insert:
            return
        mark = provenance.read(buffers, index)
        retired = self.agentstate.retired
        known = mark != provenance.NONE
        # With what had been decoded, if the request was prefilled anew.
        own = provenance.mark(self.agentstate.fingerprint, req, req.origin_input_ids, req.output_ids)
        like = known and mark == own
        # Ranks have the same tree. One that stores nothing need not know.
        like, known = self.linker.on_all_ranks([retired or like, retired or known])
        req.skip_radix_cache_insert = not like
        if not retired:
            self.agentstate.received.add(like=like, silent=not known)

    def recomputes(self, req: Req) -> bool:
        """Whether a request is on its way back to the queue."""
        return any(item.req is req for item in self._recomputing)

    def passes_over(self, req: Req) -> bool:
        """Whether what the forward that has just run gave for a request must not be looked at, though that decodes."""
        return self.trailing is not None and (req in self.trailing.ended or self.recomputes(req))

    def stepped(self, batch: ScheduleBatch, seconds: float) -> None:
        """A batch is over. It took ``seconds`` if it was one of prompts, or of parts of them; 0 when that is not
        known."""
        waiting = self.linker.landed
        landed = [waiting.pop(req.rid) for req in batch.reqs if req.rid in waiting] if waiting else []
        untimed = self.trailing is not None and self.trailing.take_untimed(batch.reqs)
        if seconds:
            parts = list(zip(batch.prefix_lens, batch.extend_lens, strict=False))
            self.served.stepped(batch.reqs, parts, landed, self.page_size)
            if not untimed:
                self.agentstate.stepped(parts, seconds, landed[0] if landed else None)

    def requeue_failed(self, scheduler: Scheduler) -> None:
        """Queue again what no batch holds any more."""
        for item in list(self._recomputing):
            req = item.req
            if req is scheduler.chunked_req:
                # Its next chunk must not run. This one's result may still be under way, and passes over a request
                # that is marked as retracted; batches pass over one that is finished.
                scheduler.chunked_req = None
                item.withheld = req.is_retracted = True
            if item.withheld and (req.finished_output or not _has_result(scheduler, req)):
                if req.kv.holds_kv:
                    release_kv_cache(req, self, checkpoint=False)
                req.finished_reason = req.discard_output_reason
            if req.kv.holds_kv or any(req in batch.reqs for batch in _batches(scheduler)):
                continue
            self._recomputing.remove(item)
            # A pause of the engine may have retracted it, and queued it again, in the meantime.
            queued = req in scheduler.waiting_queue
            if not queued:
                req.reset_for_retract()
                req.retraction_count -= 1
            item.renew(self._beams)
            if not queued:
                logger.warning("agentstate: request %s is recomputed from its last good page", req.rid)
                if self._hands_over:
                    # Not to the queue of those that look for an engine that decodes: it waits for this one already.
                    scheduler._prefetch_kvcache(req)
                    scheduler.waiting_queue.append(req)
                else:
                    scheduler._add_request_to_queue(req, is_retracted=True)
            if item.abort is not None:
                scheduler.abort_request(item.abort)

    def note_abort(self, abort: AbortReq) -> None:
        """Remember an abort of a request that is in no queue just now: it is carried out when it is back in one."""
        for item in self._recomputing:
            if abort.abort_all or item.req.rid.startswith(abort.rid):
                # Of this request alone: others that come until then are not meant.
                item.abort = copy(abort)
                item.abort.rid, item.abort.abort_all = item.req.rid, False


def _missing(params: EvictParams, total: EvictResult) -> EvictParams:
    """What is to be evicted besides what has been."""
    return EvictParams(
        max(0, params.num_tokens - total.num_tokens_evicted),
        max(0, params.swa_num_tokens - total.swa_num_tokens_evicted),
        max(0, params.mamba_num - total.mamba_num_evicted),
    )


def _add(total: EvictResult, found: EvictResult) -> None:
    total.num_tokens_evicted += found.num_tokens_evicted
    total.swa_num_tokens_evicted += found.swa_num_tokens_evicted
    total.mamba_num_evicted += found.mamba_num_evicted


def stored_hit(req: Req, found: Any, cache: UnifiedRadixCache) -> StoredHit:
    """What the marker ``found`` says that a request can restore."""
    end = found.device_hit_len + len(found.tail_hashes) * cache.page_size
    key = _key_of(req, end, cache.tree_core.is_eagle)
    return StoredHit(key, found.device_hit_len, PageKeys.from_hex(found.tail_hashes))


def _key_of(req: Req, length: int, bigrams: bool) -> RadixKey:
    """The tree's key of a request's first ``length`` tokens. Where it is made of ``bigrams``, because the KV of a draft
    depends on the token that follows, it has that token as well."""
    tokens = req.full_untruncated_fill_ids[: length + bigrams]
    return RadixKey(tokens, req.extra_key, is_bigram=bigrams, cache_salt=req.cache_salt)


@dataclass
class _Recomputation:
    """A request on its way back to the queue, and what SGLang is not to see of it until then.

    ``was_retracted`` is whether SGLang had retracted it before, which fixes the cached tokens that it reports, and
    ``barred`` whether it may not enter the tree. SGLang frees the ``media`` of a request that finishes, advances its
    ``grammar`` by a token that is discarded (with a draft model before anyone has looked at the load), and has chosen
    the first tokens of its ``beams``. ``withheld`` is a request whose result is passed over because it is marked as
    retracted, and which nobody else finishes.
    """

    req: Req
    was_retracted: bool
    barred: bool
    media: Any
    grammar: Any
    beams: Any
    withheld: bool
    abort: AbortReq | None = None

    @classmethod
    def of(cls, req: Req, coordinator: Any, *, withheld: bool) -> _Recomputation:
        """A request that has just run on pages that were not restored. ``coordinator`` is SGLang's, of beams."""
        group = req.beam_group
        item = cls(
            req, req.retracted_stain, req.skip_radix_cache_insert, req.multimodal_inputs, req.grammar, group, withheld
        )
        req.multimodal_inputs = req.grammar = req.beam_group = None
        if group is not None:
            coordinator._free_member_rows(group)
            coordinator._retire_group(group)
            # Beams put a placeholder there.
            del req.output_ids[:]
        if withheld:
            req.is_retracted = True
        else:
            req.finished_output = True
        return item

    def renew(self, coordinator: Any) -> None:
        """Make the request, whose KV is released, as it was before the forward that is discarded."""
        req = self.req
        req.finished_reason = req.to_finish = req.finished_len = req.finished_output = None
        req.discard_output_reason = None
        # What was on the device before that forward, and could be sent at once, may have been evicted since.
        req.early_send_prefix_end = None
        req.skip_radix_cache_insert = self.barred
        req.multimodal_inputs, req.grammar = self.media, self.grammar
        if (group := self.beams) is not None:
            req.beam_group = type(group)(
                beam_width=group.beam_width,
                length_penalty=group.length_penalty,
                stop_token_ids=group.stop_token_ids.tolist(),
                max_new_tokens=group.max_new_tokens,
                num_return=group.num_return,
                device=group.stop_token_ids.device,
            )
            req.beam_group.leader, req.beam_group.prompt_len = req, group.prompt_len
            coordinator._num_live_groups += 1
        if not self.was_retracted:
            # It never ran as far as anyone can tell: what it reports as cached is what its next match finds.
            req.retracted_stain = False
            req.cached_tokens = req.cached_tokens_device = req.cached_tokens_host = req.cached_tokens_storage = 0
            req._cache_breakdown_computed = False


def _can_be_renewed(req: Req) -> bool:
    """A streaming session keeps its requests' KV; an abort that is already under way is let happen. So is one of what
    has been sent in part: a transfer that is under way may still read the slots that would be released."""
    unsent = req.start_send_idx <= req.disagg_decode_prefix_len
    return unsent and req.to_finish is None and (req.session is None or not req.session.streaming)


def _can_trail(req: Req) -> bool:
    """Whether a request could be recomputed once it has been sent tokens, from these and nothing else. One whose prompt
    has further chunks chooses most of its prefix anyway."""
    return (
        _can_be_renewed(req)
        and not req.inflight_middle_chunks
        and not req.finished()
        and req.grammar is None
        and req.beam_group is None
        and req.input_embeds is None
        and req.multimodal_inputs is None
        and not (req.return_logprob or req.return_hidden_states or req.return_sampling_mask)
    )


def _has_result(scheduler: Scheduler, req: Req) -> bool:
    """Whether the result of a batch that holds it has not been processed."""
    return any(req in batch.reqs for batch, _result in getattr(scheduler, "result_queue", ()))


def _batches(scheduler: Scheduler) -> Iterable[Any]:
    """Every batch that may still touch its requests."""
    for batch in (scheduler.running_batch, scheduler.last_batch):
        if batch is not None:
            yield batch
    for batch, _result in getattr(scheduler, "result_queue", ()):
        yield batch
