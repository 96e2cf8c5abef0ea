"""How a request whose restore failed gets back into the queue: the bookkeeping, with stand-ins for the scheduler and
its requests. That the answer is right in the end is for the acceptance tests, which break real pages."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.beam_search.beam_group import BeamGroup
from sglang.srt.beam_search.coordinator import BeamCoordinator

from engine_patch import radix_cache
from engine_patch.radix_cache import AgentStateRadixCache
from engine_patch.sglang_api import FINISH_ABORT, UnifiedRadixCache
from engine_patch.trailing import Trailing


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
            "inflight_middle_chunks": 0,
            "input_embeds": None,
            "return_logprob": False,
            "return_hidden_states": False,
            "return_sampling_mask": False,
        }
        super().__init__(**{**defaults, **fields})

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def finished(self) -> bool:
        return self.finished_reason is not None

    def update_finish_state(self, new_accepted_len: int) -> None:
        assert new_accepted_len == 0
        self.finished_reason, self.to_finish = self.to_finish, None

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


class Loads:
    """What a linker and a tree say of batches of loads by their numbers: whether they may trail, are over, and who has
    failed. ``released`` are the requests whose pages were taken away, with whether they entered the tree."""

    def __init__(self, cache: AgentStateRadixCache, monkeypatch: pytest.MonkeyPatch):
        self.may_trail = True
        self.over: set[int] = set()
        self.failed: set[str] = set()
        self.concluded: list[int] = []
        self.released: list[tuple[str, bool]] = []
        self._cache = cache
        cache.trailing = Trailing(lambda index: index in self.over, self.conclude)
        cache.agentstate = SimpleNamespace(trail=lambda index: self.may_trail)
        monkeypatch.setattr(radix_cache, "release_kv_cache", self.release)
        monkeypatch.setattr(UnifiedRadixCache, "claim_kv_row", lambda cache, req: False)

    def conclude(self, index: int, rids: Sequence[str]) -> list[str]:
        self.concluded.append(index)
        return [rid for rid in rids if rid in self.failed]

    def release(self, req: Any, tree: Any, checkpoint: bool) -> None:
        """As SGLang's: it asks the tree first."""
        assert not tree.claim_kv_row(req)
        checkpoint = checkpoint and not req.skip_radix_cache_insert
        assert not (checkpoint and tree.trailing.postpones(req, 192))
        self.released.append((req.rid, checkpoint))
        req.kv.holds_kv = False

    def forward(self, *requests: Request, loads: int | None = None) -> list[Any]:
        """A batch has run, which had a batch of loads of that number."""

        def finish_loads(trail: Callable[[int, list[str]], bool]) -> list[str]:
            rids = [req.rid for req in requests]
            if loads is None or trail(loads, rids):
                return []
            return self.conclude(loads, rids)

        self._cache.linker = SimpleNamespace(finish_loads=finish_loads)
        return self._cache.finish_external_linker_loads(list(requests))


@pytest.fixture
def loads(cache: AgentStateRadixCache, monkeypatch: pytest.MonkeyPatch) -> Loads:
    return Loads(cache, monkeypatch)


def test_a_request_goes_on_before_all_is_there_and_enters_the_tree_after(
    cache: AgentStateRadixCache, loads: Loads
) -> None:
    req, other = Request("r"), Request("o")
    assert loads.forward(req, other, loads=3) == []
    trailing = cache.trailing
    assert trailing is not None and trailing.kept == 2 and loads.concluded == []
    assert trailing.postpones(req, 128) and trailing.postpones(other, 64) and not trailing.postpones(Request("x"), 64)
    loads.forward(req, other)
    assert trailing.take_whole() == []
    loads.over = {3}
    loads.forward(req, other)
    assert loads.concluded == [3] and not trailing.postpones(req, 128)
    assert trailing.take_whole() == [(req, 128), (other, 64)]
    assert trailing.take_untimed([req, other, Request("x")]) and not trailing.take_untimed([req])
    assert trailing.take_whole() == [] and trailing.kept == 0


def test_sglang_asks_the_tree_before_it_gives_pages_back() -> None:
    asked: list[str] = []

    class Asked:
        """A tree that keeps what it is asked for."""

        def claim_kv_row(self, req: Any) -> bool:
            asked.append("claim_kv_row")
            req.kv.holds_kv = False
            return True

        def __getattr__(self, name: str) -> Any:
            asked.append(name)
            raise AttributeError(name)

    kv = SimpleNamespace(holds_kv=True, is_kv_released=False)
    radix_cache.release_kv_cache(Request("r", kv=kv), Asked(), checkpoint=True)
    assert asked == ["claim_kv_row"]


def test_one_that_ends_early_waits_for_the_rest(cache: AgentStateRadixCache, loads: Loads) -> None:
    """Whatever takes its pages away: an end, an abort, a retraction."""
    req, other = Request("r"), Request("o")
    loads.forward(req, other, loads=3)
    loads.release(req, cache, checkpoint=True)
    assert (loads.concluded, loads.released) == ([3], [("r", True)])
    assert cache.trailing is not None and cache.trailing.take_whole() == []
    loads.release(other, cache, checkpoint=False)
    assert loads.released[1:] == [("o", False)] and cache.trailing.kept == 0


@pytest.mark.parametrize("sent", [0, 5], ids=["before its first token", "after some"])
def test_a_bad_page_found_late_takes_the_request_out_of_all_batches(
    cache: AgentStateRadixCache, scheduler: Scheduler, loads: Loads, sent: int
) -> None:
    req, other = Request("r", output_ids=array("q", range(sent))), Request("o")
    loads.forward(req, other, loads=3)
    loads.over, loads.failed = {3}, {"r"}
    assert loads.forward(req, other) == []
    # Batches pass over it, and its client hears nothing; nothing of it enters the tree.
    assert req.is_retracted and req.finished() and req.finished_output is True
    assert loads.released == [("r", False)]
    assert cache.passes_over(req) and not cache.passes_over(other) and not other.finished()
    batch = SimpleNamespace(reqs=[req, other])
    scheduler.running_batch, scheduler.result_queue = batch, [(batch, None)]
    cache.requeue_failed(scheduler)
    assert scheduler.waiting_queue == []
    batch.reqs.remove(req)
    cache.requeue_failed(scheduler)
    assert scheduler.waiting_queue == [req]
    assert (req.finished_reason, req.finished_output, req.discard_output_reason) == (None, None, None)
    # It goes on after what was sent, and has reported what it reported.
    assert (len(req.output_ids), req.cached_tokens, req.skip_radix_cache_insert) == (sent, 128, False)
    assert loads.forward(other) == [] and not cache.passes_over(req)


def test_one_that_was_being_aborted_is_aborted_in_the_queue(
    cache: AgentStateRadixCache, scheduler: Scheduler, loads: Loads
) -> None:
    """Its client is told, also when no batch with it follows: others may be prefilled, and it runs no more."""
    req, other = Request("r"), Request("o")
    loads.forward(req, loads=3)
    req.to_finish, loads.over, loads.failed = FINISH_ABORT("of this test"), {3}, {"r"}
    assert loads.forward(other) == []
    assert req.finished() and cache.passes_over(req) and loads.released == [("r", False)]
    cache.requeue_failed(scheduler)
    assert scheduler.waiting_queue == [req] and req.to_finish is None
    (abort,) = scheduler.aborted
    assert (abort.rid, abort.abort_all, abort.finished_reason["message"]) == ("r", False, "of this test")


def test_a_bad_page_found_when_it_ends_keeps_its_kv_from_the_tree(
    cache: AgentStateRadixCache, scheduler: Scheduler, loads: Loads
) -> None:
    """Its answer is right: every row that was read was good. So is that of its neighbour, which goes on for a step."""
    req, other = Request("r"), Request("o")
    loads.forward(req, other, loads=3)
    loads.failed = {"r", "o"}
    loads.release(req, cache, checkpoint=True)
    assert loads.released == [("r", False)] and not other.finished()
    assert cache.trailing is not None and cache.trailing.postpones(other, 64)
    # What of it failed is not forgotten until it looks for its prefix again.
    assert cache._queued(scheduler) == {"o"}
    loads.forward(other)
    assert other.finished() and cache.recomputes(other) and loads.released[1:] == [("o", False)]


@pytest.mark.parametrize(
    "fields",
    [
        {"inflight_middle_chunks": 1},
        {"grammar": object()},
        {"beam_group": object()},
        {"input_embeds": object()},
        {"multimodal_inputs": object()},
        {"return_logprob": True},
        {"return_hidden_states": "last"},
        {"return_sampling_mask": True},
        {"session": SimpleNamespace(streaming=True)},
        {"to_finish": object()},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_could_not_be_computed_again_from_its_tokens_waits_for_all(
    cache: AgentStateRadixCache, loads: Loads, fields: dict[str, Any]
) -> None:
    loads.forward(Request("r", **fields), Request("o"), loads=3)
    assert loads.concluded == [3] and cache.trailing is not None and cache.trailing.kept == 0


def test_the_time_of_its_first_forward_says_nothing(cache: AgentStateRadixCache, loads: Loads) -> None:
    req, other, told = Request("r"), Request("o"), []
    loads.forward(req, loads=3)
    cache.agentstate.stepped = lambda parts, seconds, restored: told.append(parts)
    cache.linker.landed, cache.served = {}, SimpleNamespace(stepped=lambda *_: None)
    cache.tree_core = SimpleNamespace(page_size=64)
    for reqs in ([other], [req, other], [req]):
        lengths = [10 * len(reqs)] * len(reqs)
        cache.stepped(SimpleNamespace(reqs=reqs, prefix_lens=lengths, extend_lens=lengths), 0.5)
    assert told == [[(10, 10)], [(10, 10)]]


def test_what_has_read_something_bad_does_not_go_on(cache: AgentStateRadixCache, loads: Loads) -> None:
    loads.may_trail, loads.failed = False, {"r"}
    req, other = Request("r"), Request("o")
    assert loads.forward(req, other, loads=3) == []
    assert req.discard_output_reason is not None and not req.is_retracted
    assert other.discard_output_reason is None and cache.recomputes(req)


def test_a_flush_forgets_them(cache: AgentStateRadixCache, loads: Loads) -> None:
    loads.forward(Request("r"), loads=3)
    assert cache.trailing is not None
    cache.trailing.clear()
    assert cache.trailing.kept == 0
