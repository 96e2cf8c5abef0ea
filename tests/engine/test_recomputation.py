"""How a request whose restore failed gets back into the queue: the bookkeeping, with stand-ins for the scheduler and
its requests. That the answer is right in the end is for the acceptance tests, which break real pages."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.beam_search.beam_group import BeamGroup
from sglang.srt.beam_search.coordinator import BeamCoordinator

from engine_patch import radix_cache
from engine_patch.radix_cache import AgentStateRadixCache


class Request(SimpleNamespace):
    """What of SGLang's `Req` is touched."""

    def __init__(self, rid: str, **fields: Any):
        defaults = {
            "rid": rid,
            "kv": SimpleNamespace(holds_kv=True),
            "multimodal_inputs": None,
            "session": None,
            "skip_radix_cache_insert": False,
            "to_finish": None,
            "grammar": None,
            "beam_group": None,
            "output_ids": array("q"),
            "finished_reason": None,
            "finished_len": None,
            "finished_output": None,
            "discard_output_reason": None,
            "retracted_stain": False,
            "retraction_count": 0,
            "is_retracted": False,
            "cached_tokens": 128,
            "cached_tokens_device": 64,
            "cached_tokens_host": 64,
            "cached_tokens_storage": 0,
            "_cache_breakdown_computed": True,
            "start_send_idx": 0,
            "disagg_decode_prefix_len": 0,
        }
        super().__init__(**{**defaults, **fields})

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def reset_for_retract(self) -> None:
        assert not self.kv.holds_kv
        self.is_retracted = self.retracted_stain = True
        self.retraction_count += 1


class Scheduler(SimpleNamespace):
    def __init__(self) -> None:
        super().__init__(
            chunked_req=None, running_batch=None, last_batch=None, result_queue=[], waiting_queue=[], aborted=[]
        )

    def _add_request_to_queue(self, req: Request, is_retracted: bool) -> None:
        assert is_retracted
        self.waiting_queue.append(req)

    def abort_request(self, abort: Any) -> None:
        self.aborted.append(abort)


def beams() -> BeamCoordinator:
    """SGLang's, of which the bookkeeping alone is used."""
    fields = (field for field in BeamCoordinator.__struct_fields__ if not field.startswith("_"))
    return BeamCoordinator(**dict.fromkeys(fields))


def group_of(req: Request, coordinator: BeamCoordinator) -> BeamGroup:
    """That of a request for beams, once its prompt was computed."""
    req.beam_group = group = BeamGroup(beam_width=3, stop_token_ids=[7, 2], max_new_tokens=5, num_return=2)
    group.leader, group.prompt_len, group.num_generated = req, 128, 1
    req.output_ids.append(0)
    coordinator._num_live_groups += 1
    return group


@pytest.fixture
def cache() -> AgentStateRadixCache:
    cache = AgentStateRadixCache.__new__(AgentStateRadixCache)
    cache._recomputing, cache._generates, cache._beams = [], True, beams()
    return cache


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler()


def fail(cache: AgentStateRadixCache, *requests: Request) -> list[Any]:
    """A batch in which the restores of all ``requests`` failed: those that the scheduler is told to abort."""
    cache.linker = SimpleNamespace(finish_loads=lambda: [req.rid for req in requests])
    return cache.finish_external_linker_loads([*requests, Request("a neighbour")])


def finish(req: Request) -> None:
    """What SGLang does with a request whose output is discarded."""
    req.finished_reason = req.to_finish = req.discard_output_reason
    req.finished_len = 0
    req.kv.holds_kv = False


def test_a_failed_request_is_queued_again_as_if_it_had_never_run(
    cache: AgentStateRadixCache, scheduler: Scheduler
) -> None:
    req = Request("r")
    assert fail(cache, req) == []
    assert req.discard_output_reason is not None
    assert req.finished_output is True  # nobody is told
    finish(req)
    cache.requeue_failed(scheduler)
    assert scheduler.waiting_queue == [req]
    assert (req.finished_reason, req.to_finish, req.finished_output, req.discard_output_reason) == (None,) * 4
    assert (req.skip_radix_cache_insert, req.retracted_stain, req.retraction_count) == (False, False, 0)
    assert (req.cached_tokens, req._cache_breakdown_computed) == (0, False)
    cache.requeue_failed(scheduler)
    assert scheduler.waiting_queue == [req]


def test_what_sglang_would_spoil_of_it_is_put_away(cache: AgentStateRadixCache, scheduler: Scheduler) -> None:
    """It frees the media of a request that is finished, and a grammar may have taken an output before anyone knows of
    the failure."""
    media, grammar = object(), object()
    req = Request("r", multimodal_inputs=media, grammar=grammar, skip_radix_cache_insert=True)
    assert fail(cache, req) == []
    assert (req.multimodal_inputs, req.grammar) == (None, None)
    finish(req)
    cache.requeue_failed(scheduler)
    assert (req.multimodal_inputs, req.grammar, req.skip_radix_cache_insert) == (media, grammar, True)


def test_beams_begin_anew(cache: AgentStateRadixCache, scheduler: Scheduler) -> None:
    req = Request("r", skip_radix_cache_insert=True)
    before = group_of(req, cache._beams)
    assert fail(cache, req) == []
    # Its next forward is that of any request, whose output is discarded.
    assert (req.beam_group, list(req.output_ids), before.retired, cache._beams._num_live_groups) == (None, [], True, 0)
    finish(req)
    cache.requeue_failed(scheduler)
    group = req.beam_group
    assert (group.leader, group.prompt_len, group.num_generated, group.retired) == (req, 128, 0, False)
    assert (group.beam_width, group.max_new_tokens, group.num_return) == (3, 5, 2)
    assert group.stop_token_ids.tolist() == [2, 7]
    assert (cache._beams._num_live_groups, req.skip_radix_cache_insert) == (1, True)


@pytest.mark.parametrize("holder", ["running_batch", "last_batch", "result_queue"])
def test_it_waits_until_no_batch_holds_it(cache: AgentStateRadixCache, scheduler: Scheduler, holder: str) -> None:
    req = Request("r")
    fail(cache, req)
    finish(req)
    batch = SimpleNamespace(reqs=[req])
    setattr(scheduler, holder, [(batch, None)] if holder == "result_queue" else batch)
    cache.requeue_failed(scheduler)
    assert scheduler.waiting_queue == []
    batch.reqs.clear()
    cache.requeue_failed(scheduler)
    assert scheduler.waiting_queue == [req]


def test_one_that_is_on_its_way_back_counts_as_queued(cache: AgentStateRadixCache, scheduler: Scheduler) -> None:
    """What failed it is remembered until it has been matched again."""
    req = Request("r")
    fail(cache, req)
    scheduler.waiting_queue.append(Request("another"))
    assert cache._queued(scheduler) == {"r", "another"}
    finish(req)
    cache.requeue_failed(scheduler)
    assert cache._queued(scheduler) == {"r", "another"}
    scheduler.waiting_queue.remove(req)
    assert cache._queued(scheduler) == {"another"}


def test_it_waits_until_its_kv_is_released(cache: AgentStateRadixCache, scheduler: Scheduler) -> None:
    req = Request("r")
    fail(cache, req)
    cache.requeue_failed(scheduler)
    assert scheduler.waiting_queue == []


@pytest.mark.parametrize(
    "fields",
    [
        {"session": SimpleNamespace(streaming=True)},
        {"to_finish": object()},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_cannot_be_made_new_is_left_to_the_scheduler_to_abort(
    cache: AgentStateRadixCache, scheduler: Scheduler, fields: dict[str, Any]
) -> None:
    hopeless, other = Request("h", **fields), Request("o")
    assert fail(cache, hopeless, other) == [hopeless]
    assert hopeless.finished_output is None  # its client is told
    assert hopeless.skip_radix_cache_insert
    finish(hopeless)
    finish(other)
    cache.requeue_failed(scheduler)
    assert scheduler.waiting_queue == [other]


def test_an_abort_on_the_way_is_carried_out_once_the_request_is_in_the_queue(
    cache: AgentStateRadixCache, scheduler: Scheduler
) -> None:
    gone, other = Request("gone-1"), Request("other")
    fail(cache, gone, other)
    cache.note_abort(SimpleNamespace(abort_all=False, rid="gone", abort_message="of this test"))
    finish(gone)
    finish(other)
    cache.requeue_failed(scheduler)
    assert scheduler.waiting_queue == [gone, other]
    assert scheduler.aborted == [SimpleNamespace(abort_all=False, rid="gone-1", abort_message="of this test")]


def test_an_abort_of_all_does_not_abort_those_that_came_later(
    cache: AgentStateRadixCache, scheduler: Scheduler
) -> None:
    first, second = Request("a"), Request("b")
    fail(cache, first, second)
    cache.note_abort(SimpleNamespace(abort_all=True, rid=""))
    scheduler.waiting_queue.append(Request("came later"))
    finish(first)
    finish(second)
    cache.requeue_failed(scheduler)
    assert [(abort.abort_all, abort.rid) for abort in scheduler.aborted] == [(False, "a"), (False, "b")]


def test_an_embedding_is_withheld(
    cache: AgentStateRadixCache, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang passes over the result of a request that is marked as retracted, and sends that of one that is
    finished."""
    released: list[Any] = []

    def release(req: Any, tree: Any, checkpoint: bool) -> None:
        released.append((req, checkpoint))
        req.kv.holds_kv = False

    monkeypatch.setattr(radix_cache, "release_kv_cache", release)
    cache._generates = False
    req = Request("r")
    assert fail(cache, req) == []
    batch = SimpleNamespace(reqs=[req])
    scheduler.last_batch, scheduler.result_queue = batch, [(batch, None)]
    cache.requeue_failed(scheduler)
    assert (req.is_retracted, req.finished_reason, released) == (True, None, [])
    # It is finished when its result was passed over, so that batches let it go.
    scheduler.result_queue = []
    cache.requeue_failed(scheduler)
    assert (req.finished_reason, released) == (req.discard_output_reason, [(req, False)])
    assert req.finished_reason is not None and scheduler.waiting_queue == []
    batch.reqs = []
    cache.requeue_failed(scheduler)
    assert (req.finished_reason, scheduler.waiting_queue, len(released)) == (None, [req], 1)


def test_the_next_chunk_of_an_embedding_does_not_run(
    cache: AgentStateRadixCache, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(radix_cache, "release_kv_cache", lambda req, *_, **__: setattr(req.kv, "holds_kv", False))
    cache._generates = False
    req = Request("r")
    fail(cache, req)
    batch = SimpleNamespace(reqs=[req])
    scheduler.chunked_req, scheduler.result_queue = req, [(batch, None)]
    cache.requeue_failed(scheduler)
    assert (scheduler.chunked_req, req.finished_reason, req.kv.holds_kv) == (None, None, True)
    scheduler.result_queue = []
    cache.requeue_failed(scheduler)
    assert scheduler.waiting_queue == [req]


def test_what_a_pause_has_queued_already_is_not_queued_twice(cache: AgentStateRadixCache, scheduler: Scheduler) -> None:
    req = Request("r")
    fail(cache, req)
    req.kv.holds_kv = False
    req.reset_for_retract()
    scheduler.waiting_queue.append(req)
    cache.requeue_failed(scheduler)
    assert scheduler.waiting_queue == [req]
    assert (req.finished_output, req.discard_output_reason, req.skip_radix_cache_insert) == (None, None, False)


def test_one_that_was_retracted_before_keeps_what_it_reported(
    cache: AgentStateRadixCache, scheduler: Scheduler
) -> None:
    req = Request("r", retracted_stain=True, cached_tokens=192)
    fail(cache, req)
    finish(req)
    cache.requeue_failed(scheduler)
    assert (req.retracted_stain, req.cached_tokens) == (True, 192)
