"""What the plug-in was written against: a failing test names the SGLang symbol that an upgrade has changed."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.entrypoints.anthropic.serving import AnthropicServing
from sglang.srt.entrypoints.openai.protocol import ResponsesRequest
from sglang.srt.entrypoints.openai.serving_responses import OpenAIServingResponses
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.mamba import causal_conv1d
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.managers import schedule_policy
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import NextBatchPlan, Req, ReqKvInfo, ScheduleBatch
from sglang.srt.managers.schedule_policy import PrefillAdder, SchedulePolicy
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.batch_result_processor import SchedulerBatchResultProcessor
from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.mem_cache import memory_pool
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import MatchResult
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from sglang.srt.mem_cache.unified_cache import unified_tree_core
from sglang.srt.mem_cache.unified_cache.unified_tree_core_interface import TreePathNodeInfo
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod
from sglang.srt.platforms.interface import SRTPlatform
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs

from agentstate.errors import EngineError
from engine_patch import sglang_api as sgl
from engine_patch.cpu import convolution
from engine_patch.cpu.attention import CpuAttention
from engine_patch.cpu.platform import CpuPlatform
from engine_patch.linker import AgentStateLinker
from engine_patch.radix_cache import AgentStateRadixCache, _LinkerWrapper

ROOT = Path(__file__).parents[2]

_RESPONSE_STREAM = (
    "self request sampling_params result_generator model_name tokenizer request_metadata created_time"
    " * require_reasoning tool_adapter"
)

# Symbol, its parameters as the plug-in knows them; those after "*" are passed by name.
CALLED: list[tuple[Callable[..., Any], str]] = [
    (sgl.FINISH_ABORT, "message status_code"),
    (sgl.GenerateReqInput, "* input_ids sampling_params bootstrap_host"),
    (sgl.UpdateWeightFromDiskReqOutput, "* success message num_paused_requests"),
    (sgl.HookRegistry.register, "target hook hook_type"),
    (sgl.HybridReqToTokenPool.register_layer_transfer_counter, "self layer_transfer_counter"),
    (sgl.PendingOffload, "lock_node_id lock_params publish_node_ids"),
    (sgl.PoolTransfer, "* name device_indices keys"),
    (sgl.RadixKey, "token_ids extra_key * cache_salt"),
    (sgl.UnifiedCacheLinkerWrapper, "cache cache_linker"),
    (sgl.UnifiedCacheLinker.record_offload_ready, "self"),
    (sgl.UnifiedRadixCache, "params"),
    (sgl.UnifiedRadixCache._all_reduce_attn_groups, "self tensor op"),
    (sgl.check_version, ""),
    (sgl.create_unified_radix_cache, "ctx * cache_class"),
    (sgl.declare_resolution, "server_args source * fields"),
    (sgl.get_memory, ""),
    (sgl.get_model, ""),
    (sgl.get_observability, ""),
    (sgl.get_parallel, ""),
    (sgl.get_platform, ""),
    (sgl.get_serving, ""),
    (sgl.get_storage_hash_str, "key * page_size"),
    (sgl.register_radix_cache_backend, "name factory"),
    (sgl.register_resolution_hook, "name"),
    (sgl.release_kv_cache, "req tree_cache * checkpoint"),
    (sgl.resolving_view, "server_args"),
    (sgl.warmup, "name"),
    (sgl.SWAKVPool.translate_loc_from_full_to_swa, "self kv_indices"),
    (sgl.EvictParams, "num_tokens swa_num_tokens mamba_num"),
    (sgl.InsertParams, "key value * prev_prefix_len"),
    (sgl.MatchPrefixParams, "key"),
    (sgl.UnifiedRadixCache.match_prefix, "self params"),
    (sgl.UnifiedRadixCache.insert, "self params"),
    (sgl.UnifiedRadixCache.evict, "self params"),
    (sgl.UnifiedRadixCache.inc_lock_ref, "self node_id"),
    (sgl.UnifiedRadixCache.dec_lock_ref, "self node_id params"),
    (sgl.UnifiedRadixCache.root_node_handle, "self extra_key"),
    (unified_tree_core.UnifiedTreeCore.collect_full_device_indices, "self from_node_id until_node_id"),
    (unified_tree_core.UnifiedTreeCore.collect_path_info, "self end_node_ids"),
    (unified_tree_core.UnifiedTreeCore.get_component_device_value, "self node_id component_type"),
    (unified_tree_core.UnifiedTreeCore.get_hash_values, "self node_id"),
    (unified_tree_core.UnifiedTreeCore.get_last_hash_value, "self node_id"),
    (unified_tree_core.UnifiedTreeCore.match_full_device_prefix, "self key"),
    (sgl.UnifiedRadixCache.evict_for_alloc, "self params allocation_reclaim_satisfied"),
    (sgl.UnifiedRadixCache.protected_size, "self"),
    (Req.init_next_round_input, "self tree_cache * cow_mamba"),
    (Scheduler._prefetch_kvcache, "self req"),
    (Scheduler.abort_request, "self recv_req"),
    (Scheduler.on_idle, "self"),
    (Scheduler.maybe_send_health_check_signal, "self"),
    (sgl.PagedTokenToKVPoolAllocator.alloc, "self need_size"),
    (sgl.PagedTokenToKVPoolAllocator.available_size, "self"),
    (sgl.PagedTokenToKVPoolAllocator.free, "self free_index"),
    (sgl.PagedTokenToKVPoolAllocator._release_page_ids, "self page_ids"),
    (sgl.TokenToKVPoolAllocator.free, "self free_index"),
    (sgl.UnifiedRadixCache.evictable_size, "self"),
    (SchedulerWeightUpdaterManager.release_memory_occupation, "self recv_req"),
    (Scheduler._record_step_counters, "self batch result"),
    (SchedulerBatchResultProcessor.process_batch_result_decode, "self batch result"),
    (sgl.record_fields, "cls"),
    (AttentionBackendRegistry.register, "backend_name handler_func"),
    (register_attention_backend, "name"),
    (KVWriteLoc, "loc swa_loc"),
    (MHATokenToKVPool.get_key_buffer, "self layer_id"),
    (MHATokenToKVPool.get_value_buffer, "self layer_id"),
    (MHATokenToKVPool.set_kv_buffer, "self layer loc_info cache_k cache_v"),
    (Req.finished, "self"),
    (Req.reset_for_retract, "self"),
    (Scheduler._add_request_to_queue, "self req is_retracted"),
    (Scheduler.get_next_batch_to_run, "self running_batch last_batch"),
    (SchedulePolicy.calc_priority, "self waiting_queue"),
    (PrefillAdder.add_one_req, "self req has_chunked_req truncation_align_size"),
    (SchedulerWeightUpdaterManager._observe_weight_load, "self source"),
    (SchedulerWeightUpdaterManager.begin_weight_update, "self recv_req"),
    (SchedulerWeightUpdaterManager.update_weights_from_disk, "self recv_req"),
    (TokenizerManager.generate_request, "self obj request"),
    (AnthropicServing.handle_messages, "self request raw_request"),
    (AnthropicServing._error_response, "self status_code error_type message"),
    (OpenAIServingResponses.create_responses, "self request raw_request"),
    (OpenAIServingResponses.create_error_response, "self message"),
    (OpenAIServingResponses.responses_stream_generator_non_harmony, _RESPONSE_STREAM),
    (OpenAIServingResponses._responses_stream_generator_non_harmony, _RESPONSE_STREAM),
    (OpenAIServingResponses._response_tools_to_chat_tools, "self request"),
    (ResponsesRequest.effective_tool_choice, "self"),
    (TorchNativeAttnBackend, "model_runner"),
]

OVERRIDDEN: list[tuple[type, type, str, str]] = [
    (AgentStateRadixCache, sgl.UnifiedRadixCache, "__init__", "self params"),
    (AgentStateRadixCache, sgl.UnifiedRadixCache, "reset", "self"),
    (AgentStateRadixCache, sgl.UnifiedRadixCache, "init_cache_linker", "self cache_linker"),
    (AgentStateRadixCache, sgl.UnifiedRadixCache, "checkpoint_into_tree", "self req up_to kwargs"),
    (AgentStateRadixCache, sgl.UnifiedRadixCache, "finish_external_linker_loads", "self reqs"),
    (
        AgentStateRadixCache,
        sgl.UnifiedRadixCache,
        "_evict",
        "self params available_size_targets allocation_reclaim_satisfied",
    ),
    (AgentStateRadixCache, sgl.UnifiedRadixCache, "_evict_device_next_node", "self component_type tracker"),
    (AgentStateRadixCache, sgl.UnifiedRadixCache, "_evict_device_leaf", "self node_id tracker"),
    (_LinkerWrapper, sgl.UnifiedCacheLinkerWrapper, "__init__", "self cache cache_linker"),
    (
        _LinkerWrapper,
        sgl.UnifiedCacheLinkerWrapper,
        "_sync_restorable_prefix",
        "self restorable num_pages device_hit_pages",
    ),
    (_LinkerWrapper, sgl.UnifiedCacheLinkerWrapper, "commit_completed_offloads", "self successes"),
    (
        _LinkerWrapper,
        sgl.UnifiedCacheLinkerWrapper,
        "replace_pending_offload_node",
        "self ack_id old_node_id new_node_ids",
    ),
    (_LinkerWrapper, sgl.UnifiedCacheLinkerWrapper, "take_completed_offloads", "self finish_count"),
    (_LinkerWrapper, sgl.UnifiedCacheLinkerWrapper, "finish_loads", "self"),
    (_LinkerWrapper, sgl.UnifiedCacheLinkerWrapper, "match", "self key req result"),
    (CpuAttention, TorchNativeAttnBackend, "__init__", "self model_runner"),
    (CpuAttention, TorchNativeAttnBackend, "init_forward_metadata", "self forward_batch"),
    (CpuAttention, TorchNativeAttnBackend, "forward_extend", "self q k v layer forward_batch save_kv_cache"),
    (CpuAttention, TorchNativeAttnBackend, "forward_decode", "self q k v layer forward_batch save_kv_cache"),
    (CpuPlatform, SRTPlatform, "apply_server_args_defaults", "self server_args"),
    (CpuPlatform, SRTPlatform, "get_default_attention_backend", "self"),
    (CpuPlatform, SRTPlatform, "get_dispatch_key_name", "self"),
    (CpuPlatform, SRTPlatform, "is_pin_memory_available", "self device"),
    (CpuPlatform, SRTPlatform, "init_backend", "self"),
    *(
        (AgentStateLinker, sgl.UnifiedCacheLinker, name, parameters)
        for name, parameters in {
            "lookup": "self rid transfers",
            "load": "self rid transfers",
            "start_layer_wise_loading": "self",
            "finish_layer_wise_loading": "self counter_index",
            "cancel_queued_load": "self rid",
            "offload": "self transfers session_id",
            "num_completed_offloads": "self",
            "pop_completed_offload": "self",
            "reset": "self",
            "close": "self",
        }.items()
    ),
]

# Attributes that the plug-in reads or sets.
ATTRIBUTES: dict[type, str] = {
    Req: "rid session_id extra_key cache_salt kv full_untruncated_fill_ids skip_radix_cache_insert "
    "discard_output_reason finished_output finished_reason finished_len to_finish is_retracted retracted_stain "
    "retraction_count cached_tokens cached_tokens_device cached_tokens_host cached_tokens_storage "
    "_cache_breakdown_computed origin_input_ids output_ids sampling_params multimodal_inputs session "
    "storage_hit_start storage_hit_length priority prefix_len last_node kv_hints",
    ReqKvInfo: "holds_kv cache_inserted_len kv_allocated_len",
    Scheduler: "running_batch last_batch chunked_req tree_cache waiting_queue total_prefill_busy_us result_queue "
    "is_generation page_size server_args policy",
    AbortReq: "rid abort_all",
    sgl.PagedTokenToKVPoolAllocator: "device page_size",
    sgl.TokenToKVPoolAllocator: "device page_size",
    SWATokenToKVPoolAllocator: "full_attn_allocator swa_attn_allocator page_size",
    SamplingParams: "max_new_tokens",
    PrefillAdder: "tree_cache can_run_list",
    NextBatchPlan: "running_batch",
    ScheduleBatch: "reqs prefix_lens extend_lens batch_is_full",
    sgl.EvictResult: "num_tokens_evicted swa_num_tokens_evicted mamba_num_evicted",
    TreePathNodeInfo: "node_id path_end num_children",
    MatchResult: "device_prefix_len last_device_node",
    sgl.UnifiedCacheLinkerWrapper: "cache cache_linker hit_markers inflight_load_rids inflight_load_index "
    "private_load_indices",
    SchedulerWeightUpdaterManager: "scheduler",
    SchedulerBatchResultProcessor: "tree_cache",
    sgl.UnifiedCacheLinker: "layer_done_counter pools forward_stream",
    TorchNativeAttnBackend: "req_to_token_pool token_to_kv_pool use_sliding_window_kv_pool swa_out_cache_loc",
    RadixAttention: "layer_id tp_q_head_num qk_head_dim v_head_dim scaling sliding_window_size is_cross_attention "
    "attn_type",
    ForwardBatch: "seq_lens extend_prefix_lens req_pool_indices out_cache_loc forward_mode",
    CacheInitParams: "page_size token_to_kv_pool_allocator req_to_token_pool swa_gates_prefix_match swa_retain_window",
    MHATokenToKVPool: "k_buffer v_buffer k_scale_buffer native_k_scale_buffer kv_cache_layout dtype size page_size",
    sgl.MLATokenToKVPool: "kv_buffer dtype size page_size",
    sgl.SWAKVPool: "layers_mapping full_kv_pool swa_kv_pool",
    sgl.HybridLinearKVPool: "full_attention_layer_id_mapping full_kv_pool",
    sgl.HybridReqToTokenPool: "mamba_pool mamba_ckpt_pool short_conv_pool ngram_pool",
    sgl.MambaPool: "mamba_layer_ids mamba_cache size _slot_siblings",
    memory_pool.DSATokenToKVPool: "index_k_with_scale_buffer",
    ServerArgs: "enable_memory_saver enable_weights_cpu_backup "
    "host port attention_backend prefill_attention_backend decode_attention_backend page_size dtype "
    "disable_cuda_graph radix_cache_backend enable_unified_cache_external_linker device chunked_prefill_size "
    "unified_cache_external_linker_backend unified_cache_external_linker_config uses_mamba_radix_cache "
    "mamba_radix_cache_strategy mamba_track_interval model_path served_model_name load_format "
    "json_model_override_args quantization warmups skip_server_warmup",
    TokenizerManager: "is_generation max_req_input_len model_config server_args",
    OpenAIServingResponses: "tokenizer_manager",
    ResponsesRequest: "request_id",
    sgl.GenerateReqInput: "session_id cache_salt extra_key rid",
}


def named(symbol: Any) -> str:
    return f"{symbol.__module__}.{symbol.__qualname__}"


def parameters(symbol: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(symbol).parameters)


@pytest.mark.parametrize(("symbol", "known"), CALLED, ids=[named(symbol) for symbol, _ in CALLED])
def test_what_is_called_takes_what_it_is_given(symbol: Callable[..., Any], known: str) -> None:
    positional, _, by_name = (f"{known} *" if "*" not in known else known).partition("*")
    found = parameters(symbol)
    where = f"{named(symbol)} has changed: its parameters are ({', '.join(found)}), known as ({known})"
    assert list(found)[: len(positional.split())] == positional.split(), where
    assert set(by_name.split()) <= set(found), where
    required = {
        name
        for name, parameter in found.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    assert required <= set(known.split()), where


@pytest.mark.parametrize(
    ("ours", "stock", "name", "known"), OVERRIDDEN, ids=[f"{named(stock)}.{name}" for _, stock, name, _ in OVERRIDDEN]
)
def test_what_is_overridden_has_the_parameters_it_had(ours: type, stock: type, name: str, known: str) -> None:
    found = parameters(getattr(stock, name))
    assert list(found) == known.split(), f"{named(stock)}.{name} has changed: its parameters are ({', '.join(found)})"
    overriding = parameters(getattr(ours, name))
    assert [n for n in overriding if n not in ("kwargs",)] == [n for n in found if n != "kwargs"]
    for parameter in found:
        assert overriding[parameter].kind == found[parameter].kind


@pytest.mark.parametrize(
    ("owner", "name"),
    [(owner, name) for owner, names in ATTRIBUTES.items() for name in names.split()],
    ids=lambda part: part if isinstance(part, str) else named(part),
)
def test_the_attributes_that_are_used_exist(owner: type, name: str) -> None:
    source = "".join(inspect.getsource(cls) for cls in owner.__mro__ if cls.__module__.startswith("sglang"))
    declared = re.search(rf"^\s+(self\.)?{name}\s*[:=]|^\s+def {name}\(|self\.{name}\b.*=", source, re.MULTILINE)
    assert hasattr(owner, name) or declared, f"{named(owner)} has no {name} any more"


def test_the_linker_implements_all_of_the_contract() -> None:
    contract = set(sgl.UnifiedCacheLinker.__abstractmethods__)
    assert contract == {name for ours, _, name, _ in OVERRIDDEN if ours is AgentStateLinker}
    missing = {name for name in contract if getattr(AgentStateLinker, name) is getattr(sgl.UnifiedCacheLinker, name)}
    assert not missing
    assert not AgentStateLinker.__abstractmethods__


def test_the_linker_takes_what_sglang_constructs_linkers_with() -> None:
    assert "Linker(server_args, params, components=..., extra_config=..., forward_stream=...)" in (
        sgl.UnifiedCacheLinker.__doc__ or ""
    )
    inspect.signature(AgentStateLinker).bind(None, None, components=None, extra_config=None, forward_stream=None)


def test_an_answer_without_end_is_reckoned_with_as_so_many_tokens() -> None:
    assert 0 < sgl.CLIP_MAX_NEW_TOKENS < 1 << 20


def test_what_comes_first_is_not_sorted_but_by_priority() -> None:
    """What is said of the order of a queue that SGLang serves in order of arrival: `engine_patch.order`."""
    cache: Any = SimpleNamespace(supports_fast_match_prefix=lambda: True, disable=False)
    waiting: list[Any] = [
        SimpleNamespace(priority=priority, time_stats=SimpleNamespace(wait_queue_entry_time=place))
        for place, priority in enumerate([1, 2, 1, 2])
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule_policy, "match_kv_cache", lambda req, tree: None)
        patch.setattr(SchedulePolicy, "_touch_waiting_prefixes", lambda *of: None)
        patch.setattr(schedule_policy, "get_disagg", lambda: SimpleNamespace(disaggregation_mode="null"))
        for by_priority, low_first, order in [(False, False, "0123"), (True, False, "1302"), (True, True, "0213")]:
            policy = SchedulePolicy("fcfs", cache, False, by_priority, low_first)
            assert (policy.policy, policy.tree_cache) == (sgl.CacheAgnosticPolicy.FCFS, cache)
            assert (policy.enable_priority_scheduling, policy.priority_sign) == (by_priority, 1 if low_first else -1)
            queue = list(waiting)
            policy.calc_priority(queue)
            assert queue == [waiting[int(place)] for place in order]


def test_the_members_of_enumerations_exist() -> None:
    assert (sgl.PoolName.KV.value, sgl.PoolName.SWA.value, sgl.PoolName.MAMBA.value) == ("kv", "swa", "mamba")
    assert {sgl.ComponentType.FULL, sgl.ComponentType.SWA, sgl.ComponentType.MAMBA} <= set(sgl.ComponentType)
    assert AttnForwardMethod.MLA
    assert sgl.HookType.AROUND.value
    assert AttentionType.ENCODER_ONLY.value
    assert sgl.AddReqResult.NO_TOKEN.value


@pytest.mark.parametrize(
    ("called", "kernel", "ours"),
    [
        (causal_conv1d.causal_conv1d_fn, "_causal_conv1d_fn_triton", convolution.convolve),
        (causal_conv1d.causal_conv1d_update, "_causal_conv1d_update_triton", convolution.convolve_next),
    ],
    ids=["causal_conv1d_fn", "causal_conv1d_update"],
)
def test_the_kernels_that_are_replaced_are_called_with_what_ours_take(
    called: Callable[..., Any], kernel: str, ours: Callable[..., Any]
) -> None:
    assert hasattr(causal_conv1d, kernel), f"{causal_conv1d.__name__} has no {kernel} any more"
    (call,) = (
        node
        for node in ast.walk(ast.parse(inspect.getsource(called)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == kernel
    )
    given = [object()] * len(call.args)
    inspect.signature(ours).bind(*given, **{keyword.arg: None for keyword in call.keywords if keyword.arg})


def test_a_choice_of_attention_backends_can_be_added() -> None:
    choices = importlib.import_module("sglang.srt.arg_groups.choices").ATTENTION_BACKEND_CHOICES
    before = list(choices)
    sgl.add_attention_backend_choices(["of this test"])
    try:
        assert choices == [*before, "of this test"]
    finally:
        choices.remove("of this test")


def test_a_request_can_be_kept_out_of_the_radix_tree() -> None:
    def request(**given: Any) -> Req:
        return Req("a", "", array("q", [1]), SamplingParams(max_new_tokens=1), **given)

    assert not request().skip_radix_cache_insert
    assert request(bootstrap_host=sgl.FAKE_BOOTSTRAP_HOST).skip_radix_cache_insert


def hooked() -> Iterator[str]:
    tree = ast.parse((ROOT / "engine_patch" / "plugin.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("sglang.srt."):
            yield node.value


def test_what_is_hooked_into_exists() -> None:
    targets = list(hooked())
    assert len(targets) >= 2
    for target in targets:
        module, cls, method = target.rsplit(".", 2)
        assert callable(getattr(getattr(importlib.import_module(module), cls), method, None)), target


def test_the_resolution_step_may_be_overridden() -> None:
    hooks = importlib.import_module("sglang.srt.arg_groups.resolution_hooks")
    assert "handle_hicache" in hooks._OVERRIDABLE_HOOKS


def test_every_symbol_of_the_api_module_is_there_and_listed() -> None:
    tree = ast.parse(inspect.getsource(sgl))
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang")
        for alias in node.names
    }
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert imported | defined | {"SUPPORTED"} == set(sgl.__all__)
    assert all(hasattr(sgl, name) for name in sgl.__all__)


def test_every_symbol_of_the_api_module_is_known_by_how_it_is_used() -> None:
    known = {symbol.__qualname__.split(".")[0].lstrip("_") for symbol, _ in CALLED}
    known |= {stock.__name__ for _, stock, _, _ in OVERRIDDEN} | {owner.__name__ for owner in ATTRIBUTES}
    ours = {name for name in sgl.__all__ if getattr(getattr(sgl, name), "__module__", "") == sgl.__name__}
    tested_apart = ours | {"SUPPORTED", "ComponentType", "HookType", "PoolName", "add_attention_backend_choices"}
    tested_apart |= {"FAKE_BOOTSTRAP_HOST", "CLIP_MAX_NEW_TOKENS", "AddReqResult", "CacheAgnosticPolicy"}
    unknown = set(sgl.__all__) - known - tested_apart
    assert not unknown, f"nothing here fails when these change: {sorted(unknown)}"


def test_another_version_of_sglang_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    sgl.check_version()
    monkeypatch.setattr(sgl, "version", lambda name: "9.9.9")
    with pytest.raises(EngineError, match=rf"supports SGLang {re.escape(sgl.SUPPORTED)} and found 9\.9\.9") as error:
        sgl.check_version()
    assert "\n" not in str(error.value)
