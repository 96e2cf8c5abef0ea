"""What SGLang loads: registers the radix-cache backend behind `--radix-cache-backend agentstate`.

SGLang starts, finishes and reaps a linker's loads only when its external-linker flag is set; a backend that is only
registered would be asked to load, never be started, and the forward would read pages that were not filled. So the
one flag that a user sets is completed here, when SGLang resolves its arguments, and the cache asserts the result.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
import os
import sys
import textwrap
import time
from typing import Any

from agentstate.errors import AgentStateError
from agentstate.settings import Settings
from engine_patch import contract, hints, responses, turns, versions, weights
from engine_patch.flags import BACKEND, CPU_ATTENTION

logger = logging.getLogger(__name__)

_POLL_S = 0.001


class CannotStart(RuntimeError):
    """Why an engine cannot start, in a sentence that says what to do."""


def register() -> None:
    """Entry point `sglang.srt.plugins`: run early in every SGLang process, whether or not the flag is given.
    Registers and decides nothing; the linker and its store are made by the scheduler processes alone."""
    try:
        _register()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        # SGLang would log a traceback, and go on without what it was asked for.
        lacks = [textwrap.shorten(str(error), 120)]
        if f"--radix-cache-backend={BACKEND}" in "=".join(sys.argv):
            lacks = contract.missing(contract.ENGINE) or lacks
            raise SystemExit(versions.refusal(versions.installed(), lacks)) from None
        logger.warning("agentstate: %s", versions.refusal(versions.installed(), lacks))


def _register() -> None:
    from engine_patch import resolution, warm_up
    from engine_patch import sglang_api as sgl

    # In the order in which SGLang takes these steps.
    sgl.register_resolution_hook("handle_deprecated_dp_attention")(resolution.judge_flags)
    sgl.register_resolution_hook("handle_pd_disaggregation")(resolution.prepare_disaggregation)
    sgl.register_resolution_hook("handle_mxfp8_kv_cache_compatibility")(resolution.choose_page_size)
    sgl.register_resolution_hook("handle_hicache")(resolution.complete)
    sgl.register_resolution_hook("validate_deepep_v2_dispatch_token_budget")(resolution.conclude)
    sgl.register_radix_cache_backend(BACKEND, _create_cache)
    sgl.warmup(warm_up.NAME)(warm_up.warm_up)
    sgl.add_attention_backend_choices([CPU_ATTENTION])
    sgl.HookRegistry.register(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request", _as_requested, sgl.HookType.AROUND
    )
    sgl.HookRegistry.register(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
        _as_tokenized,
        sgl.HookType.AROUND,
    )
    sgl.HookRegistry.register(
        "sglang.srt.entrypoints.anthropic.serving.AnthropicServing.handle_messages",
        _as_message_requested,
        sgl.HookType.AROUND,
    )
    sgl.HookRegistry.register(
        "sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses.create_responses",
        _as_response_requested,
        sgl.HookType.AROUND,
    )
    sgl.HookRegistry.register(
        "sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses.responses_stream_generator_non_harmony",
        _around_response_stream,
        sgl.HookType.AROUND,
    )
    sgl.HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler.handle_generate_request", _as_scheduled, sgl.HookType.AROUND
    )
    sgl.HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler.get_next_batch_to_run", _around_next_batch, sgl.HookType.AROUND
    )
    sgl.HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler.get_next_disagg_prefill_batch_to_run",
        _around_next_prefill_batch,
        sgl.HookType.AROUND,
    )
    sgl.HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler.get_next_disagg_decode_batch_to_run",
        _around_next_decode_batch,
        sgl.HookType.AROUND,
    )
    sgl.HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler.send_kv_chunk", _around_kv_send, sgl.HookType.AROUND
    )
    sgl.HookRegistry.register(
        "sglang.srt.disaggregation.decode.DecodeTransferQueue._commit_transfer_to_req",
        _before_kv_received,
        sgl.HookType.AROUND,
    )
    sgl.HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler._retire_aborted_prefill_result",
        _around_retired_prefill,
        sgl.HookType.AROUND,
    )
    sgl.HookRegistry.register(
        "sglang.srt.managers.schedule_policy.SchedulePolicy.calc_priority", _around_priorities, sgl.HookType.AROUND
    )
    sgl.HookRegistry.register(
        "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req", _around_admission, sgl.HookType.AROUND
    )
    sgl.HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.on_idle", _while_idle, sgl.HookType.AROUND)
    sgl.HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler._prefetch_kvcache", _while_queueing, sgl.HookType.AROUND
    )
    sgl.HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler._record_step_counters", _around_step_counters, sgl.HookType.AROUND
    )
    sgl.HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler.abort_request", _before_abort, sgl.HookType.AROUND
    )
    sgl.HookRegistry.register(
        "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
        ".process_batch_result_decode",
        _before_decode_result,
        sgl.HookType.AROUND,
    )
    sgl.HookRegistry.register(
        "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager._observe_weight_load",
        _before_weight_load,
        sgl.HookType.AROUND,
    )
    sgl.HookRegistry.register(
        "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager.begin_weight_update",
        _before_weight_session,
        sgl.HookType.AROUND,
    )
    sgl.HookRegistry.register(
        "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
        ".update_weights_from_disk",
        _around_update_from_disk,
        sgl.HookType.AROUND,
    )
    sgl.HookRegistry.register(
        "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
        ".release_memory_occupation",
        _before_memory_release,
        sgl.HookType.AROUND,
    )
    sgl.HookRegistry.register(
        "sglang.srt.model_executor.model_runner.ModelRunner.load_model", _around_model_load, sgl.HookType.AROUND
    )
    sgl.HookRegistry.register(
        "sglang.srt.managers.scheduler.get_exception_traceback", _around_traceback, sgl.HookType.AROUND
    )
    sgl.HookRegistry.register(
        "sglang.srt.managers.tp_worker.BaseTpWorker.forward_batch_embedding", _around_embedding, sgl.HookType.AROUND
    )
    sgl.HookRegistry.register(
        "sglang.srt.lora.lora.LoRAAdapter._normalize_weights", _around_adapter, sgl.HookType.AROUND
    )
    sgl.HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler.load_lora_adapter", _around_adapter_load, sgl.HookType.AROUND
    )
    sgl.HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler.load_lora_adapter_from_tensors",
        _around_adapter_load_of_tensors,
        sgl.HookType.AROUND,
    )
    sgl.HookRegistry.register(
        "sglang.srt.managers.schedule_batch.Req.__init__", _around_new_request, sgl.HookType.AROUND
    )


def platform() -> str | None:
    """Entry point `sglang.srt.platforms`: our CPU platform, only where there is no accelerator to prefer."""
    import torch

    if torch.cuda.is_available() or torch.xpu.is_available():
        return None
    try:
        importlib.import_module("engine_patch.cpu.platform")
    except ImportError as error:
        # SGLang would not even start without AgentState.
        logger.warning("agentstate: no CPU platform for SGLang %s: %s", versions.installed(), error)
        return None
    # Torch aligns large tensors then, so that direct I/O can read into the KV pool. The processes that have one are
    # started from this one.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    return "engine_patch.cpu.platform.CpuPlatform"


def _create_cache(ctx: Any) -> Any:
    from engine_patch import adapters
    from engine_patch import sglang_api as sgl
    from engine_patch.linker import AgentStateLinker

    if not sgl.get_memory().enable_unified_cache_external_linker:
        raise RuntimeError(f"--radix-cache-backend {BACKEND} was not resolved: SGLang would never start its loads")
    try:
        cache = sgl.create_cache(ctx, _cache_class(), AgentStateLinker)
    except AgentStateError as error:
        raise CannotStart(f"AgentState: {error}") from None
    cache.disaggregate(sgl.get_disagg().disaggregation_mode)
    manager = getattr(ctx.tp_worker.model_runner, "lora_manager", None)
    adapters.LOADED.agree(manager, [] if manager is None else list(manager.lora_refs), cache)
    return cache


def _around_model_load(original: Any, runner: Any) -> None:
    original(runner)
    if runner.server_args.radix_cache_backend == BACKEND and not runner.is_draft_worker:
        from engine_patch import pools, replicas
        from engine_patch.sglang_api import get_parallel

        replicas.look_at(runner.model, get_parallel().attn_tp_size)
        pools.look_at(runner.model)


def _around_adapter(original: Any, adapter: Any) -> None:
    """The last step of loading one, from files or from tensors."""
    from engine_patch import sglang_api as sgl

    original(adapter)
    if sgl.get_memory().radix_cache_backend == BACKEND:
        from engine_patch import adapters

        adapters.LOADED.take(adapter.uid, adapter)


def _around_adapter_load(original: Any, scheduler: Any, request: Any) -> Any:
    output = original(scheduler, request)
    _agree_on_adapters(scheduler, [request.lora_id])
    return output


def _around_adapter_load_of_tensors(original: Any, scheduler: Any, request: Any) -> Any:
    output = original(scheduler, request)
    _agree_on_adapters(scheduler, [request.lora_id])
    return output


def _agree_on_adapters(scheduler: Any, lora_ids: list[str]) -> None:
    if (cache := _ours(scheduler)) is not None:
        from engine_patch import adapters

        manager = scheduler.tp_worker.model_runner.lora_manager
        adapters.LOADED.agree(manager, lora_ids, cache)


def _around_new_request(original: Any, req: Any, *args: Any, **kwargs: Any) -> None:
    from engine_patch import adapters

    original(req, *args, **kwargs)
    adapters.LOADED.name(req)


def _around_embedding(original: Any, worker: Any, batch: Any) -> Any:
    """SGLang lets a forward wait for pages that are loaded only where tokens are generated: this one would run on pages
    that are not there yet."""
    from engine_patch import sglang_api as sgl

    if sgl.get_memory().radix_cache_backend == BACKEND:
        worker.set_hicache_consumer(batch.hicache_consumer_index)
    return original(worker, batch)


def _around_traceback(original: Any) -> Any:
    """SGLang logs what ended a scheduler with where it was raised. Of a page directory that another engine has, or that
    cannot be used, that is of no use: the sentence alone is logged."""
    error = sys.exc_info()[1]
    return str(error) if isinstance(error, CannotStart) else original()


def _cache_class() -> type:
    # Late: SGLang loads this module before most of its own.
    from engine_patch.radix_cache import AgentStateRadixCache

    return AgentStateRadixCache


def _ours(scheduler: Any) -> Any:
    """The scheduler's radix cache, or None when it is another one's."""
    cache = getattr(scheduler, "tree_cache", None)
    return cache if isinstance(cache, _cache_class()) else None


def _as_requested(original: Any, manager: Any, obj: Any, request: Any = None) -> Any:
    """SGLang's names: ``obj`` is what to compute, ``request`` the HTTP request that asks for it, if one does."""
    turns.take_over(obj, request)
    turns.separate(obj)
    turns.route(obj, _dp_ranks)
    # Before SGLang normalizes it.
    settings = _settings()
    told = hints.answers(obj, settings.foresight, settings.pin_max_s)
    outputs = original(manager, obj, request)
    return hints.answering(outputs, told) if told and _is_ours(manager) else outputs


@functools.cache
def _settings() -> Settings:
    return Settings()


def _dp_ranks() -> int:
    from engine_patch.sglang_api import get_parallel

    return int(get_parallel().num_dp_ranks)


def _as_tokenized(original: Any, manager: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    tokenized = original(manager, request, *args, **kwargs)
    turns.join(tokenized)
    return tokenized


async def _as_message_requested(original: Any, serving: Any, request: Any, raw_request: Any) -> Any:
    """Refuses headers that cannot be read here, like the next one: once SGLang streams, it answers errors with 200."""
    try:
        turns.handed_over(raw_request)
    except ValueError as error:
        return serving._error_response(status_code=400, error_type="invalid_request_error", message=str(error))
    return await original(serving, request, raw_request)


async def _as_response_requested(original: Any, serving: Any, request: Any, raw_request: Any = None) -> Any:
    try:
        turns.take_over_id(request, raw_request)
    except ValueError as error:
        return serving.create_error_response(str(error))
    if not _answers_for_us(serving):
        return await original(serving, request, raw_request)
    responses.say_sampling(serving, request)
    return responses.without_null_logprobs(await original(serving, request, raw_request))


def _around_response_stream(original: Any, serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    if _answers_for_us(serving) and responses.may_call_tools(serving, request):
        return responses.as_generated(serving._responses_stream_generator_non_harmony(request, *args, **kwargs))
    return original(serving, request, *args, **kwargs)


def _answers_for_us(serving: Any) -> bool:
    return _is_ours(serving.tokenizer_manager)


def _is_ours(manager: Any) -> bool:
    return bool(manager.server_args.radix_cache_backend == BACKEND)


def _as_scheduled(original: Any, scheduler: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    if _ours(scheduler) is not None:
        turns.separate(request)
    return original(scheduler, request, *args, **kwargs)


def _before_weight_load(original: Any, updater: Any, source: str) -> Any:
    """Weights that come from elsewhere than files leave the engine's checkpoint, and so its fingerprint, behind."""
    if source != "disk":
        _retire_updated(updater)
    return original(updater, source)


def _before_weight_session(original: Any, updater: Any, request: Any) -> Any:
    """Until a session of weight updates ends, weights may be written from outside without another word."""
    _retire_updated(updater)
    return original(updater, request)


def _retire_updated(updater: Any) -> None:
    if (cache := _ours(updater.scheduler)) is not None:
        cache.agentstate.retire(f"its weights were updated in place; {weights.RESTART}")


def _around_update_from_disk(original: Any, updater: Any, request: Any) -> Any:
    if (cache := _ours(updater.scheduler)) is None:
        return original(updater, request)
    damage = weights.damage(request)
    if not all(cache.linker.on_whole_model([damage is None])):
        message = f"Nothing was loaded: {damage or 'another rank cannot read the files'}"
        logger.error("agentstate: weights are not updated. %s", message)
        return _failed_update(message)
    cache.agentstate.suspend("its weights are being updated")
    try:
        output = original(updater, request)
    except BaseException:
        _retire_updated(updater)
        raise
    cache.linker.weights_updated(weights.after_update(request, output))
    return output


def _failed_update(message: str) -> Any:
    from engine_patch import sglang_api as sgl

    return sgl.UpdateWeightFromDiskReqOutput(success=False, message=message, num_paused_requests=0)


def _before_memory_release(original: Any, updater: Any, request: Any) -> Any:
    """SGLang takes the memory of the KV pool away and then empties the cache: nothing may use it any more by then."""
    if (cache := _ours(updater.scheduler)) is not None:
        if weights.are_lost(request.tags, updater.scheduler.server_args):
            cache.agentstate.retire(f"the memory of its weights was released; {weights.RESTART}")
        cache.agentstate.drain()
    return original(updater, request)


def _before_abort(original: Any, scheduler: Any, abort: Any) -> Any:
    if (cache := _ours(scheduler)) is not None:
        cache.note_abort(abort)
    return original(scheduler, abort)


def _before_decode_result(original: Any, processor: Any, batch: Any, result: Any) -> Any:
    """SGLang passes over an output that is to be discarded in the results of prefills only: here it would be sent. What
    is found out after a prefill is marked as finished and retracted, which SGLang passes over here if schedules
    overlap: then it expects that. An engine in which something else is marked ends instead."""
    if isinstance(cache := processor.tree_cache, _cache_class()):
        for req in batch.reqs:
            if req.discard_output_reason is not None and not req.finished() and not req.is_retracted:
                raise RuntimeError(f"request {req.rid} would be sent an output of KV that was not restored")
        if any(cache.passes_over(req) for req in batch.reqs) and not processor.enable_overlap:
            processor = dataclasses.replace(processor, enable_overlap=True)
    return original(processor, batch, result)


def _around_step_counters(original: Any, scheduler: Any, batch: Any, result: Any) -> None:
    """SGLang counts the time of its prefills, without pauses and without counting twice what overlaps."""
    before_us = scheduler.total_prefill_busy_us
    original(scheduler, batch, result)
    if (cache := _ours(scheduler)) is not None:
        # Without a time what was not counted as a prefill.
        cache.stepped(batch, (scheduler.total_prefill_busy_us - before_us) / 1e6)


def _while_queueing(original: Any, scheduler: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    if (cache := _ours(scheduler)) is not None:
        cache.end_wait(req)
        cache.read_ahead(scheduler, req)
    return original(scheduler, req, *args, **kwargs)


def _around_next_batch(original: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    if (cache := _ours(scheduler)) is None:
        return original(scheduler, *args, **kwargs)
    cache.before_next_batch(scheduler)
    with cache.deferrals.deferring(scheduler):
        plan = original(scheduler, *args, **kwargs)
    cache.served.step(plan.running_batch.batch_is_full)
    return plan


def _around_next_prefill_batch(original: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """Of an engine that prefills for another one, which decodes."""
    return _around_next_batch(original, scheduler, *args, **kwargs)


def _around_next_decode_batch(original: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """Of an engine that decodes what others have prefilled."""
    if (cache := _ours(scheduler)) is not None:
        # SGLang does this between the batches of every other scheduler: without it, what is stored stays locked.
        scheduler._process_hicache_events()
        cache.before_next_decode_batch(scheduler)
    return original(scheduler, *args, **kwargs)


def _around_kv_send(
    original: Any, scheduler: Any, req: Any, last_chunk: bool = False, *args: Any, **kwargs: Any
) -> Any:
    """The one place from which KV goes to an engine that decodes."""
    if (cache := _ours(scheduler)) is not None and not cache.may_send(req):
        if last_chunk:
            raise RuntimeError(f"KV of request {req.rid} would be sent that was not restored")
        # The next send begins where the last one ended.
        return None
    if cache is not None:
        cache.vouch(req, scheduler.disagg_metadata_buffers if last_chunk else None)
    return original(scheduler, req, last_chunk, *args, **kwargs)


def _before_kv_received(original: Any, queue: Any, decode_req: Any) -> Any:
    """The one place in which a request goes on with KV that has arrived, in the same order on every rank."""
    if (cache := _ours(queue.scheduler)) is not None:
        cache.received(decode_req.req, queue.metadata_buffers, decode_req.metadata_buffer_index)
    return original(queue, decode_req)


def _around_retired_prefill(original: Any, scheduler: Any, req: Any) -> Any:
    """SGLang tells the engine that decodes to give a request up whose result is passed over. One that is recomputed
    goes on: nothing of it was sent."""
    if (cache := _ours(scheduler)) is not None and cache.recomputes(req):
        return False
    return original(scheduler, req)


def _around_admission(original: Any, adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(cache := adder.tree_cache, _cache_class()):
        return original(adder, req, *args, **kwargs)
    from engine_patch.sglang_api import AddReqResult

    if cache.holds_up(req, adder.can_run_list):
        cache.served.tried(req.rid, admitted=False, short=True)
        return AddReqResult.OTHER
    found = original(adder, req, *args, **kwargs)
    admitted = bool(adder.can_run_list) and adder.can_run_list[-1] is req
    cache.served.tried(req.rid, admitted=admitted, short=found is AddReqResult.NO_TOKEN)
    return found


def _around_priorities(original: Any, policy: Any, waiting_queue: Any, *args: Any, **kwargs: Any) -> None:
    original(policy, waiting_queue, *args, **kwargs)
    if isinstance(policy.tree_cache, _cache_class()):
        policy.tree_cache.order.sort(waiting_queue, policy)


def _while_idle(original: Any, scheduler: Any) -> None:
    """An idle SGLang counts its memory, and ends when some is missing."""
    if (cache := _ours(scheduler)) is not None and cache.misses_memory:
        scheduler.maybe_send_health_check_signal()
        time.sleep(_POLL_S)
    else:
        original(scheduler)
