"""What an engine that prefills hands over to one that decodes: SGLang's own processing of results, on stand-ins, with
an adversary that fails restores. Nothing of a request is sent before its load is over and good, and the engine that
decodes does not hear of a request that is recomputed."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import random
from array import array
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock
from weakref import WeakKeyDictionary

import pytest
import torch
from sglang.srt.disaggregation import prefill
from sglang.srt.disaggregation.common import conn
from sglang.srt.disaggregation.decode import DecodePreallocQueue, DecodeRequest, DecodeTransferQueue
from sglang.srt.disaggregation.prefill import SchedulerDisaggregationPrefillMixin
from sglang.srt.disaggregation.utils import MetadataBuffers
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.common import checkpoint_kv_cache
from sglang.srt.server_args import ServerArgs

from engine_patch import plugin, provenance, radix_cache, resolution
from engine_patch.provenance import Received, ReceivedStats
from engine_patch.radix_cache import AgentStateRadixCache

PAGE, CHUNK = 64, 256
OURS, OTHER = (hashlib.sha256(name).digest() for name in (b"ours", b"other"))


class Sender:
    """SGLang's, as far as it is told anything."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, int, bool]] = []
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True


class Request(SimpleNamespace):
    """What of SGLang's `Req` is touched. ``bad`` is how many of its restores are yet to fail."""

    def __init__(self, rid: str, length: int, bad: int, **fields: Any):
        super().__init__(
            rid=rid,
            bad=bad,
            kv=SimpleNamespace(holds_kv=True, holds_mamba=False),
            disagg_kv_sender=Sender(),
            **{
                **dict.fromkeys(["start_send_idx", "disagg_decode_prefix_len", "inflight_middle_chunks"], 0),
                **dict.fromkeys(["retraction_count", "cached_tokens", "cached_tokens_device", "cached_tokens_host"], 0),
                **dict.fromkeys(["cached_tokens_storage", "metadata_buffer_index"], 0),
                **dict.fromkeys(["multimodal_inputs", "session", "to_finish", "grammar", "beam_group"]),
                **dict.fromkeys(["finished_reason", "finished_len", "finished_output", "discard_output_reason"]),
                **dict.fromkeys(["extend_end", "cache_request_handle", "early_send_prefix_end"]),
                **dict.fromkeys(["skip_radix_cache_insert", "retracted_stain", "is_retracted"], False),
                **dict.fromkeys(["pending_bootstrap", "return_logprob", "return_sampling_mask"], False),
                "origin_input_ids": array("q", range(length)),
                "output_ids": array("q"),
                "tmp_end_idx": -1,
                "_cache_breakdown_computed": True,
                **dict.fromkeys(["lora_id", "extra_key", "hidden_states_tensor"]),
                "bootstrap_room": 7,
                "time_stats": MagicMock(),
                **fields,
            },
        )

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def get_mm_token_counts(self) -> tuple[int, int, int]:
        return 0, 0, 0

    def finished(self) -> bool:
        return self.finished_reason is not None

    def reset_for_retract(self) -> None:
        assert not self.kv.holds_kv
        self.is_retracted = self.retracted_stain = True
        self.retraction_count += 1
        self.inflight_middle_chunks, self.extend_end = 0, None


def metadata() -> MetadataBuffers:
    return MetadataBuffers(2, 4, torch.float32, 4)


class Scheduler(SchedulerDisaggregationPrefillMixin):
    """SGLang's processing of prefills, with the plug-in's hooks around it, and nothing else of a scheduler."""

    def __init__(self, cache: AgentStateRadixCache, *, overlap: bool) -> None:
        self.tree_cache, self.enable_overlap = cache, overlap
        self.chunked_req: Any = None
        self.running_batch = self.last_batch = None
        self.result_queue: list[Any] = []
        self.waiting_queue: list[Any] = []
        self.disagg_prefill_inflight_queue: list[Any] = []
        self.disagg_prefill_pending_chunk_rids: set[str] = set()
        self.disagg_prefill_bootstrap_queue = SimpleNamespace(queue=[])
        self.disagg_metadata_buffers = metadata()
        self.req_to_metadata_buffer_idx_allocator = MagicMock()
        self.batch_result_processor = self.output_streamer = self.metrics_reporter = MagicMock()
        self.maybe_send_health_check_signal = MagicMock()
        self.spec_algorithm = SimpleNamespace(is_eagle=lambda: False)
        self.prefetched: list[Any] = []

    def checkpoint_disagg_prefill(self, req: Any) -> None: ...

    def _prefetch_kvcache(self, req: Any) -> None:
        self.prefetched.append(req)

    def _add_request_to_queue(self, req: Any, is_retracted: bool) -> None:
        raise AssertionError("it would look for an engine that decodes once more")

    def send_kv_chunk(self, req: Any, last_chunk: bool = False, end_idx: int | None = None) -> None:
        def send(_: Any, req: Any, last_chunk: bool, end_idx: int | None = None) -> None:
            end = len(req.origin_input_ids) if last_chunk else end_idx
            req.disagg_kv_sender.sent.append((req.start_send_idx, end, last_chunk))
            req.start_send_idx = end
            if last_chunk:
                self.disagg_metadata_buffers.set_buf(req)

        plugin._around_kv_send(send, self, req, last_chunk, end_idx=end_idx)

    def _retire_aborted_prefill_result(self, req: Any) -> Any:
        stock = SchedulerDisaggregationPrefillMixin._retire_aborted_prefill_result
        return plugin._around_retired_prefill(stock, self, req)

    def run(self, reqs: list[Any]) -> None:
        """A batch of the next chunk of each: its forward, what SGLang does after one, and the processing of its
        result."""
        self.tree_cache.requeue_failed(self)
        self.tree_cache.linker.loading = {req.rid for req in reqs if not req.extend_end}
        for req in reqs:
            # A prefix that is on the device goes out before the forward, unless the request loads.
            self.send_kv_chunk(req, end_idx=req.start_send_idx)
            req.extend_end = min((req.extend_end or 0) + CHUNK, len(req.origin_input_ids))
            if req.extend_end < len(req.origin_input_ids):
                req.inflight_middle_chunks += 1
                self.chunked_req = req
                req.tmp_end_idx = req.extend_end
            elif self.chunked_req is req:
                self.chunked_req = None
        refused = self.tree_cache.finish_external_linker_loads(reqs)
        assert not refused
        batch = SimpleNamespace(reqs=reqs, spec_info=None, prefill_stats=None, dp_cooperation_info=None)
        result = SimpleNamespace(
            logits_output=None,
            next_token_ids=SimpleNamespace(tolist=lambda: [7] * len(reqs)),
            extend_input_len_per_req=None,
            extend_logprob_start_len_per_req=None,
            copy_done=None,
            auxiliary_host_output=None,
            routed_experts_output=None,
            indexer_topk_output=None,
            next_draft_input=None,
            can_run_cuda_graph=False,
        )
        if self.enable_overlap:
            # The next batch is made before this one's result is processed.
            self.result_queue.append((batch, result))
            self.tree_cache.requeue_failed(self)
            self.result_queue.pop()
        self.process_batch_result_disagg_prefill(batch, result)
        if not self.enable_overlap and self.chunked_req in reqs:
            # As SGLang does before the next batch, after the plug-in has looked for what failed.
            self.tree_cache.requeue_failed(self)
            if self.chunked_req is not None:
                self.send_kv_chunk(self.chunked_req, end_idx=self.chunked_req.extend_end)


class Linker:
    """Fails the loads of requests that are ``bad``."""

    def __init__(self, reqs: list[Any]):
        self._reqs = {req.rid: req for req in reqs}
        self.loading: set[str] = set()

    def loads(self, rid: str) -> bool:
        return rid in self.loading

    def finish_loads(self) -> list[str]:
        loaded, self.loading = self.loading, set()
        failed = [self._reqs[rid] for rid in loaded if self._reqs[rid].bad]
        for req in failed:
            req.bad -= 1
        return [req.rid for req in failed]


def cache_of(reqs: list[Any]) -> AgentStateRadixCache:
    cache = AgentStateRadixCache.__new__(AgentStateRadixCache)
    cache._recomputing, cache._generates, cache._beams, cache._hands_over = [], True, None, True
    cache.linker = Linker(reqs)
    cache.agentstate, cache._sent_as = SimpleNamespace(fingerprint=OURS), WeakKeyDictionary()
    return cache


@pytest.fixture(autouse=True)
def releases(monkeypatch: pytest.MonkeyPatch) -> None:
    def release(req: Any, tree: Any, checkpoint: bool) -> None:
        assert not checkpoint
        req.kv.holds_kv = False

    monkeypatch.setattr(radix_cache, "release_kv_cache", release)
    monkeypatch.setattr(prefill, "get_disagg", lambda: SimpleNamespace(disaggregation_decode_allocation_policy="x"))


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "plain"])
@pytest.mark.parametrize("seed", range(40))
def test_nothing_is_sent_that_was_not_restored(seed: int, overlap: bool) -> None:
    numbers = random.Random(seed)
    reqs = [
        Request(f"r{number}", numbers.randrange(1, 5) * CHUNK - numbers.randrange(CHUNK), numbers.choice([0, 0, 1, 2]))
        for number in range(8)
    ]
    failures = {req.rid: req.bad for req in reqs}
    scheduler = Scheduler(cache_of(reqs), overlap=overlap)
    scheduler.waiting_queue = list(reqs)
    for _ in range(200):
        scheduler.tree_cache.requeue_failed(scheduler)
        batch = [scheduler.chunked_req] if scheduler.chunked_req else []
        while scheduler.waiting_queue and len(batch) < numbers.randrange(1, 5):
            req = scheduler.waiting_queue.pop(0)
            req.kv.holds_kv, req.is_retracted = True, False
            batch.append(req)
            if len(req.origin_input_ids) > CHUNK and scheduler.chunked_req is None:
                break
        long = [req for req in batch if (req.extend_end or 0) + CHUNK < len(req.origin_input_ids)]
        # SGLang has one request at a time in chunks.
        for req in long[1:]:
            batch.remove(req)
            scheduler.waiting_queue.insert(0, req)
        if batch:
            for req in batch:
                if req.bad and not req.extend_end:
                    assert req.disagg_kv_sender.sent in ([], [(0, 0, False)])
            scheduler.run(batch)
    assert set(scheduler.disagg_prefill_inflight_queue) == set(reqs)
    for req in reqs:
        sent = [part for part in req.disagg_kv_sender.sent if part[0] < part[1] or part[2]]
        assert [start for start, _, _ in sent] == [0, *(end for _, end, _ in sent[:-1])]
        assert [last for _, _, last in sent] == [False] * (len(sent) - 1) + [True]
        assert sent[-1][1] == len(req.origin_input_ids)
        assert not req.disagg_kv_sender.aborted
        assert (req.bad, req.to_finish, req.finished_reason, list(req.output_ids)) == (0, None, None, [7])
        assert scheduler.prefetched.count(req) == failures[req.rid]


def test_what_loads_is_not_sent() -> None:
    req = Request("r", CHUNK, 1)
    scheduler = Scheduler(cache_of([req]), overlap=True)
    scheduler.tree_cache.linker.loading = {"r"}
    scheduler.send_kv_chunk(req, end_idx=PAGE)
    assert req.disagg_kv_sender.sent == []
    with pytest.raises(RuntimeError, match="KV of request r would be sent that was not restored"):
        scheduler.send_kv_chunk(req, last_chunk=True)
    assert req.disagg_kv_sender.sent == []


def test_what_is_sent_before_a_forward_is_what_is_on_the_device_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """With staging, SGLang remembers how much that was at the first try. Of a request that is recomputed, some of it
    may have been evicted since."""
    monkeypatch.setenv("SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX", "1")
    req = Request("r", 4 * PAGE, 1, prefix_len=3 * PAGE, host_hit_length=PAGE)
    scheduler = Scheduler(cache_of([req]), overlap=False)
    scheduler.enable_staging = True
    scheduler.token_to_kv_pool_allocator = SimpleNamespace(page_size=PAGE)
    scheduler.tree_cache.linker.loading = {"r"}
    scheduler.maybe_send_cached_prefix_chunk(req)
    assert req.disagg_kv_sender.sent == []
    scheduler.tree_cache.finish_external_linker_loads([req])
    scheduler.tree_cache.requeue_failed(scheduler)
    assert scheduler.waiting_queue == [req]
    req.prefix_len, req.host_hit_length = PAGE, 0
    scheduler.maybe_send_cached_prefix_chunk(req)
    assert req.disagg_kv_sender.sent == [(0, PAGE, False)]


def test_what_was_sent_in_part_is_given_up_with_the_engine_that_decodes() -> None:
    """The transfer may still read the slots that a recomputation would release."""
    req = Request("r", CHUNK, 1, start_send_idx=2 * PAGE, disagg_decode_prefix_len=PAGE)
    cache = cache_of([req])
    cache.linker.loading = {"r"}
    assert cache.finish_external_linker_loads([req]) == [req]
    scheduler = Scheduler(cache, overlap=True)
    with pytest.raises(RuntimeError, match="not restored"):
        scheduler.send_kv_chunk(req, last_chunk=True)
    assert isinstance(req.discard_output_reason, FINISH_ABORT)
    assert not cache.recomputes(req)


class Receiver:
    """An engine that decodes: SGLang's own commit of what has arrived, with the plug-in's hook around it."""

    def __init__(self, fingerprint: bytes | None = OURS, *, others: bool = True) -> None:
        self.cache = AgentStateRadixCache.__new__(AgentStateRadixCache)
        self.cache.agentstate = SimpleNamespace(
            fingerprint=fingerprint, retired=fingerprint is None, received=Received()
        )
        self.cache.linker = SimpleNamespace(on_all_ranks=lambda local: [one and others for one in local])
        self.buffers = metadata()
        scheduler = MagicMock(tree_cache=self.cache, kv_checksum_computer=None)
        self._queue = MagicMock(scheduler=scheduler, metadata_buffers=self.buffers)
        self._queue.spec_algorithm.is_none.return_value = True

    def receive(self, sent: MetadataBuffers, **fields: Any) -> Request:
        """A request whose KV and metadata have arrived: SGLang copies the row of each buffer."""
        req = Request("r", CHUNK, 0, bootstrap_host="prefill", **{"output_ids": [], **fields})
        for (source, target, item), (local, *_) in zip(
            zip(*sent.get_buf_infos(), strict=True), zip(*self.buffers.get_buf_infos(), strict=True), strict=True
        ):
            assert target == 2 * item
            ctypes.memmove(local + item, source, item)
        stock = DecodeTransferQueue._commit_transfer_to_req
        plugin._before_kv_received(stock, self._queue, DecodeRequest(req, MagicMock(), metadata_buffer_index=1))
        self.buffers.clear_slot(1)
        assert req.output_ids[-1] == 7
        return req

    @property
    def stats(self) -> ReceivedStats:
        return self.cache.agentstate.received.stats


def send(fingerprint: bytes | None, *, then: bytes | None = None, **fields: Any) -> MetadataBuffers:
    """What an engine that prefills sends with a request. Its fingerprint is another one ``then``, if any, when half of
    the KV has been sent."""
    req = Request("r", CHUNK, 0, **{"output_ids": [7], **fields})
    scheduler = Scheduler(cache_of([req]), overlap=False)
    scheduler.tree_cache.agentstate.fingerprint = fingerprint
    scheduler.send_kv_chunk(req, end_idx=PAGE)
    if then is not None:
        scheduler.tree_cache.agentstate.fingerprint = then
    scheduler.send_kv_chunk(req, last_chunk=True)
    return scheduler.disagg_metadata_buffers


def enters_tree(req: Request) -> bool:
    """Whether SGLang offers a request's KV to the tree, out of which pages are stored."""
    tree = MagicMock()
    req.extend_end = CHUNK
    checkpoint_kv_cache(req, tree)
    return bool(tree.checkpoint.called)


def adapter(digit: str, client: str = "") -> dict[str, str]:
    return {"lora_id": f"id of this engine {digit}", "extra_key": f"{client}|adapter:{digit * 64}"}


def test_what_is_received_is_stored_if_this_engine_would_have_computed_the_same() -> None:
    receiver = Receiver()
    assert enters_tree(receiver.receive(send(OURS)))
    assert enters_tree(receiver.receive(send(OURS, **adapter("a")), **adapter("a")))
    assert receiver.stats == ReceivedStats(requests=2)


@pytest.mark.parametrize(
    ("sent", "fields"),
    [
        (dict(fingerprint=OTHER), {}),
        (dict(fingerprint=OURS, then=OTHER), {}),
        (dict(fingerprint=OTHER, then=OURS), {}),
        (dict(fingerprint=None, then=OURS), {}),
        (dict(fingerprint=None), {}),
        (dict(fingerprint=OURS, **adapter("a")), adapter("b")),
        (dict(fingerprint=OURS, **adapter("a")), {}),
        (dict(fingerprint=OURS), adapter("a")),
        (dict(fingerprint=OURS, lora_id="x", extra_key="x"), {"lora_id": "x", "extra_key": "x"}),
        (dict(fingerprint=OURS, origin_input_ids=array("q", range(1, CHUNK + 1))), {}),
        (dict(fingerprint=OURS), {"origin_input_ids": array("q", range(CHUNK - 1))}),
    ],
    ids=[
        "other weights",
        "updated half-way",
        "updated half-way to the same",
        "stores nothing at first",
        "stores nothing",
        "another adapter",
        "an adapter there only",
        "an adapter here only",
        "an unknown adapter",
        "other tokens",
        "fewer tokens",
    ],
)
def test_what_is_received_is_not_stored_where_anything_else_was_computed(
    sent: dict[str, Any], fields: dict[str, Any]
) -> None:
    """And the request goes on; so do those after it, of an engine that computes the same."""
    receiver = Receiver()
    assert not enters_tree(receiver.receive(send(**sent), **fields))
    stats = receiver.stats
    assert (stats.requests, stats.silent + stats.unlike) == (1, 1)
    assert enters_tree(receiver.receive(send(OURS)))


def test_an_engine_without_agentstate_says_nothing_whoever_was_at_its_address_before() -> None:
    receiver = Receiver()
    assert enters_tree(receiver.receive(send(OURS)))
    stock = metadata()
    stock.set_buf(Request("r", CHUNK, 0, output_ids=[7]))
    assert not enters_tree(receiver.receive(stock))
    assert receiver.stats == ReceivedStats(requests=2, silent=1)


def test_a_row_is_not_taken_for_that_of_the_request_before() -> None:
    """On the side that prefills, SGLang leaves in it what it does not write."""
    buffers = send(OURS)
    scheduler = Scheduler(cache_of([]), overlap=False)
    scheduler.disagg_metadata_buffers, scheduler.tree_cache.agentstate.fingerprint = buffers, None
    scheduler.send_kv_chunk(Request("s", CHUNK, 0, output_ids=[7]), last_chunk=True)
    assert provenance.read(buffers, 0) == provenance.NONE


def test_what_one_rank_must_not_store_none_does() -> None:
    receiver = Receiver(others=False)
    assert not enters_tree(receiver.receive(send(OURS)))


def test_what_is_prefilled_anew_is_compared_with_what_had_been_decoded() -> None:
    receiver = Receiver()
    sent = send(OURS, origin_input_ids=array("q", [*range(CHUNK), 7, 8]))
    prompt = array("q", range(CHUNK))
    assert not enters_tree(receiver.receive(sent, origin_input_ids=prompt))
    assert enters_tree(receiver.receive(sent, origin_input_ids=array("q", [*prompt, 7]), output_ids=[8]))


def test_who_stores_nothing_keeps_what_it_receives_on_the_device() -> None:
    receiver = Receiver(None)
    assert enters_tree(receiver.receive(send(OTHER)))
    assert receiver.stats == ReceivedStats()


def test_either_reason_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    receiver = Receiver()
    with caplog.at_level(logging.WARNING, "engine_patch.provenance"):
        for fingerprint in (OURS, OTHER, None, OTHER, None):
            receiver.receive(send(fingerprint))
    unlike, silent = [record.getMessage() for record in caplog.records]
    assert "start both with the same" in unlike
    assert "--radix-cache-backend agentstate" in silent
    assert receiver.stats == ReceivedStats(requests=5, silent=2, unlike=2)


def test_requests_that_look_for_an_engine_count_as_queued() -> None:
    """What is read ahead for them is kept."""
    req = Request("r", CHUNK, 0)
    scheduler = Scheduler(cache_of([req]), overlap=True)
    scheduler.disagg_prefill_bootstrap_queue.queue = [req]
    assert scheduler.tree_cache._queued(scheduler) == {"r"}


@pytest.mark.parametrize("ours", [True, False])
def test_a_request_is_prefilled_by_the_dp_rank_that_its_token_names_whatever_its_room(
    ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the second one, of a room that SGLang takes for the first one's."""
    name = "SGLANG_DISAGGREGATION_FORCE_QUERY_PREFILL_DP_RANK"
    monkeypatch.setenv(name, "0")
    monkeypatch.delenv(name)
    backend = "agentstate" if ours else None
    resolution.prepare_disaggregation(
        ServerArgs(model_path="m", radix_cache_backend=backend, disaggregation_mode="prefill"), lambda arguments: None
    )
    parallel = SimpleNamespace(num_dp_ranks=2, load_balance_method="follow_bootstrap_room")
    monkeypatch.setattr(conn, "get_parallel", lambda: parallel)
    manager = MagicMock(attn_dp_rank=1, deferred_bootstrap=None, is_dummy_cp_rank=False, sender_trace_module=None)
    sender = MagicMock()
    conn.CommonKVSender.__init__(sender, manager, "127.0.0.1:8998", 2)
    assert (sender._register_prefill_dp_rank.called, manager.record_failure.called) == (ours, not ours)
    prefills = {"127.0.0.1:8998": SimpleNamespace(dp_size=2, follow_bootstrap_room=True)}
    queue = SimpleNamespace(kv_manager=SimpleNamespace(prefill_info_table=prefills))
    where = {"bootstrap_host": "127.0.0.1", "bootstrap_port": 8998, "bootstrap_room": 2}
    req = SimpleNamespace(**where, disagg_prefill_dp_rank=None)
    assert DecodePreallocQueue._resolve_prefill_dp_rank(queue, req) == (None if ours else 0)
