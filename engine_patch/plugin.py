"""What SGLang loads: registers the radix-cache backend behind `--radix-cache-backend agentstate`.

SGLang starts, finishes and reaps a linker's loads only when its external-linker flag is set; a backend that is only
registered would be asked to load, never be started, and the forward would read pages that were not filled. So the
one flag that a user sets is completed here, when SGLang resolves its arguments, and the cache asserts the result.
"""

from __future__ import annotations

import os
import time
from typing import Any

BACKEND = "agentstate"
_POLL_S = 0.001


def register() -> None:
    """Entry point `sglang.srt.plugins`: run early in every SGLang process, whether or not the flag is given.
    Registers and decides nothing; the linker and its store are made by the scheduler processes alone."""
    from engine_patch import sglang_api as sgl
    from engine_patch import warm_up

    sgl.register_resolution_hook("handle_hicache")(_resolve_arguments)
    sgl.register_radix_cache_backend(BACKEND, _create_cache)
    sgl.warmup(warm_up.NAME)(warm_up.warm_up)
    sgl.add_attention_backend_choices(["agentstate_cpu"])
    sgl.HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler.get_next_batch_to_run", _around_next_batch, sgl.HookType.AROUND
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
        "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager._observe_weight_load",
        _before_weight_update,
        sgl.HookType.AROUND,
    )
    sgl.HookRegistry.register(
        "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
        ".release_memory_occupation",
        _before_memory_release,
        sgl.HookType.AROUND,
    )


def platform() -> str | None:
    """Entry point `sglang.srt.platforms`: our CPU platform, only where there is no accelerator to prefer."""
    import torch

    if torch.cuda.is_available() or torch.xpu.is_available():
        return None
    # Torch aligns large tensors then, so that direct I/O can read into the KV pool. The processes that have one are
    # started from this one.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    return "engine_patch.cpu.platform.CpuPlatform"


def _resolve_arguments(server_args: Any, previous: Any) -> None:
    from engine_patch import sglang_api as sgl
    from engine_patch import warm_up

    cfg = sgl.resolving_view(server_args)
    if cfg.radix_cache_backend != BACKEND:
        previous(server_args)
        return
    refused = [
        flag
        for flag, given in {
            "--disable-radix-cache": cfg.disable_radix_cache,
            "--enable-hierarchical-cache": cfg.enable_hierarchical_cache,
            "--enable-lmcache": cfg.enable_lmcache,
            "--enable-unified-cache-external-linker": cfg.enable_unified_cache_external_linker,
            "--speculative-algorithm": cfg.speculative_algorithm,
            "--disaggregation-mode": cfg.disaggregation_mode not in (None, "null"),
            "--enable-streaming-session": cfg.enable_streaming_session,
            "--pp-size": cfg.pp_size > 1,
            "--dp-size": cfg.dp_size > 1,
            "--dcp-size": cfg.dcp_size > 1,
            "--attn-cp-size": cfg.attn_cp_size > 1,
            # An adapter's KV is keyed by its name and path, which do not change when it is trained again.
            "--enable-lora": cfg.enable_lora or cfg.lora_paths,
        }.items()
        if given
    ]
    if refused:
        raise ValueError(f"--radix-cache-backend {BACKEND} cannot be combined with {', '.join(refused)}")
    previous(server_args)
    warm_ups = [*filter(None, (cfg.warmups or "").split(",")), *([] if cfg.skip_server_warmup else [warm_up.NAME])]
    sgl.declare_resolution(
        server_args,
        "agentstate",
        warmups=",".join(warm_ups) or None,
        enable_unified_cache_external_linker=True,
        unified_cache_external_linker_backend="dynamic",
        unified_cache_external_linker_config={
            "linker": "AgentStateLinker",
            "linker_module_path": "engine_patch.linker",
        },
    )


def _create_cache(ctx: Any) -> Any:
    from engine_patch import sglang_api as sgl

    if not sgl.get_memory().enable_unified_cache_external_linker:
        raise RuntimeError(f"--radix-cache-backend {BACKEND} was not resolved: SGLang would never start its loads")
    return sgl.create_unified_radix_cache(ctx, cache_class=_cache_class())


def _cache_class() -> type:
    # Late: SGLang loads this module before most of its own.
    from engine_patch.radix_cache import AgentStateRadixCache

    return AgentStateRadixCache


def _ours(scheduler: Any) -> Any:
    """The scheduler's radix cache, or None when it is another one's."""
    cache = getattr(scheduler, "tree_cache", None)
    return cache if isinstance(cache, _cache_class()) else None


def _before_weight_update(original: Any, updater: Any, *args: Any, **kwargs: Any) -> Any:
    """Weights loaded into a running engine leave its checkpoint, and so its fingerprint, behind."""
    if (cache := _ours(updater.scheduler)) is not None:
        cache.agentstate.retire("its weights were updated in place; restart it to store pages again")
    return original(updater, *args, **kwargs)


def _before_memory_release(original: Any, updater: Any, *args: Any, **kwargs: Any) -> Any:
    """SGLang takes the memory of the KV pool away and then empties the cache: nothing may use it any more by then."""
    if (cache := _ours(updater.scheduler)) is not None:
        cache.agentstate.drain()
    return original(updater, *args, **kwargs)


def _before_abort(original: Any, scheduler: Any, abort: Any) -> Any:
    if (cache := _ours(scheduler)) is not None:
        cache.note_abort(abort)
    return original(scheduler, abort)


def _around_step_counters(original: Any, scheduler: Any, batch: Any, result: Any) -> None:
    """SGLang counts the time of its prefills, without pauses and without counting twice what overlaps."""
    before_us = scheduler.total_prefill_busy_us
    original(scheduler, batch, result)
    if (busy_us := scheduler.total_prefill_busy_us - before_us) and (cache := _ours(scheduler)) is not None:
        cache.prefilled(batch, busy_us / 1e6)


def _while_queueing(original: Any, scheduler: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    if (cache := _ours(scheduler)) is not None:
        cache.read_ahead(scheduler, req)
    return original(scheduler, req, *args, **kwargs)


def _around_next_batch(original: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    if (cache := _ours(scheduler)) is None:
        return original(scheduler, *args, **kwargs)
    cache.before_next_batch(scheduler)
    with cache.device_tier.deferring(scheduler):
        return original(scheduler, *args, **kwargs)


def _while_idle(original: Any, scheduler: Any) -> None:
    """An idle SGLang counts its memory, and ends when some is missing."""
    if (cache := _ours(scheduler)) is not None and cache.misses_memory:
        scheduler.maybe_send_health_check_signal()
        time.sleep(_POLL_S)
    else:
        original(scheduler)
