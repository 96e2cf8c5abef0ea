"""What the plug-in needs of SGLang: every symbol that it calls, overrides, reads or sets, with the parameters it knows.

SGLang has no stable plug-in interface below its entry points. An engine looks for all of this when it starts, and
`tests/engine/test_sglang_api.py` names what changed. `python -m engine_patch.contract` prints what the installed
version lacks. What older versions may lack is in `versions`.
"""

from __future__ import annotations

import dis
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import CodeType
from typing import Any

from engine_patch import versions

_RESULTS = "managers.scheduler_components.batch_result_processor:SchedulerBatchResultProcessor"
_STREAM = "self request sampling_params result_generator model_name tokenizer request_metadata created_time"


@dataclass(frozen=True)
class Contract:
    """Symbols below `sglang.srt`, each as ``module:name``.

    ``called`` has their parameters as the plug-in knows them; those after "*" are passed by name. ``overridden`` has,
    for a class of `engine_patch` and the class that it derives from, methods with all of their parameters.
    ``attributes`` has those that are read or set.
    """

    called: Mapping[str, str]
    overridden: Mapping[tuple[str, str], Mapping[str, str]]
    attributes: Mapping[str, str] = field(default_factory=dict)


ENGINE = Contract(
    called={
        "managers.schedule_batch:FINISH_ABORT": "message status_code",
        "disaggregation.kv_events:BlockRemoved": "* block_hashes medium",
        "disaggregation.kv_events:BlockStored": (
            "* block_hashes parent_block_hash token_ids block_size lora_id medium cache_salt lora_name"
        ),
        "mem_cache.events:KVCacheEventRecorder": "* enabled page_size dynamo_format lora_names",
        "mem_cache.events:KVCacheEventRecorder.record_store": "self node",
        "mem_cache.events:KVCacheEventRecorder.enqueue": "self event",
        "mem_cache.events:KVCacheEventRecorder.take": "self",
        "managers.io_struct:AbortReq": "* rid finished_reason",
        "managers.io_struct:GenerateReqInput": (
            "* input_ids sampling_params bootstrap_host bootstrap_room routed_dp_rank"
        ),
        "managers.io_struct:UpdateWeightFromDiskReqOutput": "* success message num_paused_requests",
        "plugins.hook_registry:HookRegistry.register": "target hook hook_type",
        "mem_cache.memory_pool:HybridReqToTokenPool.register_layer_transfer_counter": "self layer_transfer_counter",
        "mem_cache.unified_cache.unified_cache_linker:_PendingOffload": "lock_node_id lock_params publish_node_ids",
        "mem_cache.hicache_storage:PoolTransfer": "* name device_indices keys",
        "mem_cache.radix_cache:RadixKey": "token_ids extra_key * is_bigram cache_salt",
        "mem_cache.radix_cache:RadixKey.raw_token_ids": "self",
        "mem_cache.unified_cache.unified_cache_linker:UnifiedCacheLinkerWrapper": "cache cache_linker",
        "mem_cache.unified_cache.unified_cache_linker:UnifiedCacheLinker.record_offload_ready": "self",
        "mem_cache.unified_radix_cache:UnifiedRadixCache": "params",
        "mem_cache.unified_radix_cache:UnifiedRadixCache._all_reduce_attn_groups": "self tensor op",
        "mem_cache.registry:create_unified_radix_cache": "ctx * cache_class",
        "arg_groups.overrides:declare_resolution": "server_args source * fields",
        "runtime_context:get_disagg": "",
        "runtime_context:get_lora": "",
        "runtime_context:get_memory": "",
        "runtime_context:get_model": "",
        "runtime_context:get_observability": "",
        "runtime_context:get_parallel": "",
        "runtime_context:get_platform": "",
        "runtime_context:get_serving": "",
        "runtime_context:get_spec": "",
        "mem_cache.utils:get_storage_hash_str": "key * page_size",
        "mem_cache.registry:register_radix_cache_backend": "name factory",
        "arg_groups.resolution_hooks:register_resolution_hook": "name",
        "mem_cache.common:release_kv_cache": "req tree_cache * checkpoint",
        "arg_groups.overrides:resolving_view": "server_args",
        "entrypoints.warmup:warmup": "name",
        "mem_cache.swa_memory_pool:SWAKVPool.translate_loc_from_full_to_swa": "self kv_indices",
        "mem_cache.base_prefix_cache:EvictParams": "num_tokens swa_num_tokens mamba_num",
        "mem_cache.base_prefix_cache:InsertParams": "key value * prev_prefix_len",
        "mem_cache.base_prefix_cache:MatchPrefixParams": "key",
        "mem_cache.unified_radix_cache:UnifiedRadixCache.match_prefix": "self params",
        "mem_cache.unified_radix_cache:UnifiedRadixCache.insert": "self params",
        "mem_cache.unified_radix_cache:UnifiedRadixCache.evict": "self params",
        "mem_cache.unified_radix_cache:UnifiedRadixCache.inc_lock_ref": "self node_id",
        "mem_cache.unified_radix_cache:UnifiedRadixCache.dec_lock_ref": "self node_id params",
        "mem_cache.unified_radix_cache:UnifiedRadixCache.root_node_handle": "self extra_key",
        "mem_cache.unified_cache.unified_tree_core:UnifiedTreeCore.collect_full_device_indices": (
            "self from_node_id until_node_id"
        ),
        "mem_cache.unified_cache.unified_tree_core:UnifiedTreeCore.collect_path_info": "self end_node_ids",
        "mem_cache.unified_cache.unified_tree_core:UnifiedTreeCore.get_component_device_value": (
            "self node_id component_type"
        ),
        "mem_cache.unified_cache.unified_tree_core:UnifiedTreeCore.get_hash_values": "self node_id",
        "mem_cache.unified_cache.unified_tree_core:UnifiedTreeCore.get_last_hash_value": "self node_id",
        "mem_cache.unified_cache.unified_tree_core:UnifiedTreeCore.match_full_device_prefix": "self key",
        "mem_cache.unified_cache.unified_tree_core:UnifiedTreeCore.snapshot_buffer_backup": (
            "self node_id pass_prefix_keys"
        ),
        "mem_cache.unified_radix_cache:UnifiedRadixCache.evict_for_alloc": "self params allocation_reclaim_satisfied",
        "mem_cache.unified_radix_cache:UnifiedRadixCache.protected_size": "self",
        "managers.schedule_batch:Req.init_next_round_input": "self tree_cache * cow_mamba",
        "managers.scheduler:Scheduler._prefetch_kvcache": "self req",
        "managers.scheduler:Scheduler.abort_request": "self recv_req",
        "managers.scheduler:Scheduler.on_idle": "self",
        "managers.scheduler:Scheduler.maybe_send_health_check_signal": "self",
        "mem_cache.allocator.paged:PagedTokenToKVPoolAllocator.alloc": "self need_size",
        "mem_cache.allocator.paged:PagedTokenToKVPoolAllocator.available_size": "self",
        "mem_cache.allocator.paged:PagedTokenToKVPoolAllocator.free": "self free_index",
        "mem_cache.allocator.paged:PagedTokenToKVPoolAllocator._release_page_ids": "self page_ids",
        "mem_cache.allocator.token:TokenToKVPoolAllocator.free": "self free_index",
        "mem_cache.unified_radix_cache:UnifiedRadixCache.evictable_size": "self",
        "mem_cache.unified_radix_cache:UnifiedRadixCache.full_evictable_size": "self",
        "mem_cache.unified_radix_cache:UnifiedRadixCache.swa_evictable_size": "self",
        "mem_cache.allocator.swa:SWATokenToKVPoolAllocator.full_available_size": "self",
        "mem_cache.allocator.swa:SWATokenToKVPoolAllocator.swa_available_size": "self",
        "mem_cache.allocator.swa:SWATokenToKVPoolAllocator.set_full_to_swa_mapping": "self full_indices swa_indices",
        "mem_cache.base_prefix_cache:InsertParams.set_evicted_seqlen": "self component_type length",
        "managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager.release_memory_occupation": (
            "self recv_req"
        ),
        "managers.scheduler:Scheduler._record_step_counters": "self batch result",
        "managers.scheduler:Scheduler.handle_generate_request": "self recv_req",
        "managers.scheduler:get_exception_traceback": "",
        "managers.scheduler:Scheduler.load_lora_adapter": "self recv_req",
        "managers.scheduler:Scheduler.load_lora_adapter_from_tensors": "self recv_req",
        "lora.lora:LoRAAdapter._normalize_weights": "self",
        "mem_cache.events:LoRANameTable.register": "self * lora_id lora_name",
        "model_executor.model_runner:ModelRunner.load_model": "self",
        f"{_RESULTS}.process_batch_result_decode": "self batch result",
        "arg_groups.arg_utils:record_fields": "cls",
        "managers.schedule_batch:Req.__init__": (
            "self rid origin_input_text origin_input_ids sampling_params * lora_id extra_key"
        ),
        "managers.tp_worker:BaseTpWorker.forward_batch_embedding": "self batch",
        "managers.tp_worker:TpModelWorker.set_hicache_consumer": "self consumer_index",
        "configs.model_config:is_generation_model": "model_architectures is_embedding",
        "managers.schedule_batch:Req.finished": "self",
        "beam_search.coordinator:BeamCoordinator._free_member_rows": "self group",
        "beam_search.coordinator:BeamCoordinator._retire_group": "self group",
        "beam_search.beam_group:BeamGroup": (
            "* beam_width length_penalty stop_token_ids max_new_tokens num_return device"
        ),
        "managers.schedule_batch:Req.reset_for_retract": "self",
        "managers.scheduler:Scheduler._add_request_to_queue": "self req is_retracted",
        "managers.scheduler:Scheduler.get_next_batch_to_run": "self running_batch last_batch",
        "managers.scheduler:Scheduler.get_next_disagg_prefill_batch_to_run": "self running_batch last_batch",
        "managers.scheduler:Scheduler.get_next_disagg_decode_batch_to_run": "self running_batch",
        "managers.scheduler:Scheduler.send_kv_chunk": "self req last_chunk end_idx",
        "managers.scheduler:Scheduler._retire_aborted_prefill_result": "self req",
        "disaggregation.decode:DecodeTransferQueue._commit_transfer_to_req": "self decode_req",
        "managers.scheduler:Scheduler._process_hicache_events": "self",
        "managers.schedule_policy:SchedulePolicy.calc_priority": "self waiting_queue",
        "managers.schedule_policy:PrefillAdder.add_one_req": "self req has_chunked_req truncation_align_size",
        "managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager._observe_weight_load": (
            "self source"
        ),
        "managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager.begin_weight_update": (
            "self recv_req"
        ),
        "managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager.update_weights_from_disk": (
            "self recv_req"
        ),
        "managers.tokenizer_manager:TokenizerManager.generate_request": "self obj request",
        "managers.tokenizer_manager:TokenizerManager._create_tokenized_object": "self obj input_text input_ids",
        "entrypoints.anthropic.serving:AnthropicServing.handle_messages": "self request raw_request",
        "entrypoints.anthropic.serving:AnthropicServing._error_response": "self status_code error_type message",
        "entrypoints.openai.serving_responses:OpenAIServingResponses.create_responses": "self request raw_request",
        "entrypoints.openai.serving_responses:OpenAIServingResponses.create_error_response": "self message",
        "entrypoints.openai.serving_responses:OpenAIServingResponses.responses_stream_generator_non_harmony": (
            f"{_STREAM} * require_reasoning tool_adapter"
        ),
        "entrypoints.openai.serving_responses:OpenAIServingResponses._responses_stream_generator_non_harmony": (
            f"{_STREAM} * require_reasoning tool_adapter"
        ),
        "entrypoints.openai.serving_responses:OpenAIServingResponses._response_tools_to_chat_tools": "self request",
        "entrypoints.openai.protocol:ResponsesRequest.effective_tool_choice": "self",
    },
    overridden={
        ("radix_cache:AgentStateRadixCache", "mem_cache.unified_radix_cache:UnifiedRadixCache"): {
            "__init__": "self params",
            "reset": "self",
            "init_cache_linker": "self cache_linker",
            "take_events": "self",
            "checkpoint_into_tree": "self req up_to kwargs",
            "claim_kv_row": "self req",
            "finish_external_linker_loads": "self reqs",
            "_evict": "self params available_size_targets allocation_reclaim_satisfied",
            "_evict_device_next_node": "self component_type tracker",
            "_evict_device_leaf": "self node_id tracker",
        },
        ("radix_cache:_LinkerWrapper", "mem_cache.unified_cache.unified_cache_linker:UnifiedCacheLinkerWrapper"): {
            "__init__": "self cache cache_linker",
            "_sync_restorable_prefix": "self restorable num_pages device_hit_pages",
            "commit_completed_offloads": "self successes",
            "_offload_node": "self node_id transfers",
            "reset": "self",
            "replace_pending_offload_node": "self ack_id old_node_id new_node_ids",
            "take_completed_offloads": "self finish_count",
            "finish_loads": "self",
            "match": "self key req result",
            "load_back": "self req",
        },
        ("linker:AgentStateLinker", "mem_cache.unified_cache.unified_cache_linker:UnifiedCacheLinker"): {
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
        },
    },
    attributes={
        "managers.schedule_batch:Req": (
            "rid session_id extra_key cache_salt kv full_untruncated_fill_ids skip_radix_cache_insert "
            "discard_output_reason finished_output finished_reason finished_len to_finish is_retracted "
            "retracted_stain retraction_count cached_tokens cached_tokens_device cached_tokens_host "
            "cached_tokens_storage _cache_breakdown_computed origin_input_ids output_ids sampling_params "
            "multimodal_inputs session storage_hit_start storage_hit_length priority prefix_len last_node "
            "kv_hints extend_len grammar extra_key lora_id beam_group start_send_idx disagg_decode_prefix_len "
            "metadata_buffer_index"
        ),
        "managers.schedule_batch:ReqKvInfo": "holds_kv cache_inserted_len kv_allocated_len",
        "managers.scheduler:Scheduler": (
            "running_batch last_batch chunked_req tree_cache waiting_queue total_prefill_busy_us result_queue "
            "is_generation page_size server_args policy beam_coordinator "
            "disagg_prefill_bootstrap_queue disagg_metadata_buffers"
        ),
        "disaggregation.decode:DecodeTransferQueue": "scheduler metadata_buffers",
        "disaggregation.decode:DecodeRequest": "req metadata_buffer_index",
        "disaggregation.utils:MetadataBuffers": "bootstrap_room",
        "managers.io_struct:AbortReq": "rid abort_all",
        "session.session_controller:Session": "streaming",
        "beam_search.coordinator:BeamCoordinator": "_num_live_groups",
        "beam_search.beam_group:BeamGroup": (
            "beam_width length_penalty stop_token_ids max_new_tokens num_return leader"
        ),
        "lora.lora:LoRAAdapter": "uid config layers embedding_layers added_tokens_embeddings",
        "lora.lora:LoRALayer": "weights",
        "lora.lora_config:LoRAConfig": "hf_config",
        "lora.lora_manager:LoRAManager": "loras lora_refs target_modules experts_shared_outer_loras",
        "lora.lora_registry:LoRARef": "lora_name",
        "mem_cache.allocator.paged:PagedTokenToKVPoolAllocator": "device page_size",
        "mem_cache.allocator.token:TokenToKVPoolAllocator": "device page_size",
        "mem_cache.allocator.swa:SWATokenToKVPoolAllocator": "full_attn_allocator swa_attn_allocator page_size",
        "sampling.sampling_params:SamplingParams": "max_new_tokens",
        "managers.schedule_policy:PrefillAdder": "tree_cache can_run_list",
        "managers.schedule_batch:NextBatchPlan": "running_batch",
        "managers.schedule_batch:ScheduleBatch": "reqs prefix_lens extend_lens batch_is_full hicache_consumer_index",
        "mem_cache.base_prefix_cache:EvictResult": "num_tokens_evicted swa_num_tokens_evicted mamba_num_evicted",
        "mem_cache.unified_cache.unified_tree_core:UnifiedTreeCore": "is_eagle",
        "mem_cache.unified_cache.unified_tree_core_interface:TreePathNodeInfo": "node_id path_end num_children",
        "mem_cache.base_prefix_cache:MatchResult": "device_prefix_len last_device_node",
        "disaggregation.kv_events:BlockStored": (
            "block_hashes parent_block_hash token_ids session_id cache_salt lora_name"
        ),
        "disaggregation.kv_events:StorageMedium": "DISK EXTERNAL",
        "mem_cache.unified_cache.unified_tree_core_interface:BufferBackupSnapshot": (
            "parent_node_id parent_is_root parent_last_hash hash_values key"
        ),
        "mem_cache.unified_cache.unified_cache_linker:UnifiedCacheLinkerWrapper": (
            "cache cache_linker hit_markers inflight_load_rids inflight_load_index private_load_indices "
            "pending_offloads"
        ),
        "managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager": "scheduler",
        _RESULTS: "tree_cache",
        "mem_cache.unified_cache.unified_cache_linker:UnifiedCacheLinker": "layer_done_counter pools forward_stream",
        "mem_cache.cache_init_params:CacheInitParams": (
            "enable_kv_cache_events dynamo_kv_event_format kv_event_lora_names page_size "
            "token_to_kv_pool_allocator req_to_token_pool swa_gates_prefix_match swa_retain_window "
            "mtp_draft_device_pools mtp_draft_mamba_pools sidecar_draft_device_pools"
        ),
        "mem_cache.memory_pool:MHATokenToKVPool": (
            "k_buffer v_buffer k_scale_buffer v_scale_buffer native_k_scale_buffer native_v_scale_buffer quant_method "
            "kv_cache_layout dtype size page_size"
        ),
        "mem_cache.memory_pool:MHATokenToKVPoolMXFP8": "k_scale_buffer v_scale_buffer",
        "mem_cache.memory_pool:MLATokenToKVPool": "kv_buffer dtype size page_size",
        "mem_cache.swa_memory_pool:SWAKVPool": "layers_mapping full_kv_pool swa_kv_pool",
        "mem_cache.memory_pool:HybridLinearKVPool": "full_attention_layer_id_mapping full_kv_pool",
        "mem_cache.memory_pool:HybridReqToTokenPool": "mamba_pool mamba_ckpt_pool short_conv_pool ngram_pool",
        "mem_cache.memory_pool:MambaPool": "mamba_layer_ids mamba_cache size _slot_siblings",
        "models.deepseek_v2:DeepseekV2AttentionMLA": "layer_id use_dsa indexer",
        "mem_cache.memory_pool:DSATokenToKVPool": (
            "kv_buffer index_k_with_scale_buffer index_kpool dtype size page_size"
        ),
        "server_args:ServerArgs": (
            "enable_memory_saver enable_weights_cpu_backup host port attention_backend "
            "prefill_attention_backend decode_attention_backend page_size dtype disable_cuda_graph "
            "radix_cache_backend enable_unified_cache_external_linker device chunked_prefill_size "
            "unified_cache_external_linker_backend unified_cache_external_linker_config "
            "uses_mamba_radix_cache mamba_radix_cache_strategy mamba_track_interval model_path "
            "served_model_name load_format json_model_override_args quantization warmups skip_server_warmup "
            "speculative_algorithm speculative_num_steps speculative_eagle_topk speculative_num_draft_tokens "
            "speculative_ngram_max_bfs_breadth speculative_draft_model_path speculative_draft_model_revision "
            "speculative_draft_load_format speculative_draft_model_quantization disable_overlap_schedule"
        ),
        "managers.tokenizer_manager:TokenizerManager": "is_generation max_req_input_len model_config server_args",
        "entrypoints.openai.serving_responses:OpenAIServingResponses": "tokenizer_manager",
        "entrypoints.openai.protocol:ResponsesRequest": "request_id",
        "managers.io_struct:GenerateReqInput": "session_id cache_salt extra_key rid",
    },
)

CPU = Contract(
    called={
        "models.deepseek_common.attention_backend_handler:AttentionBackendRegistry.register": (
            "backend_name handler_func"
        ),
        "layers.attention.attention_registry:register_attention_backend": "name",
        "layers.dp_attention:memcpy_cpu": "dst src dim offset sz offset_src",
        "layers.rotary_embedding.base:RotaryEmbedding.forward_native": "self positions query key",
        "mem_cache.memory_pool:KVWriteLoc": "loc swa_loc",
        "mem_cache.memory_pool:MHATokenToKVPool.get_key_buffer": "self layer_id",
        "mem_cache.memory_pool:MHATokenToKVPool.get_value_buffer": "self layer_id",
        "mem_cache.memory_pool:MHATokenToKVPool.set_kv_buffer": "self layer loc_info cache_k cache_v",
        "layers.attention.torch_native_backend:TorchNativeAttnBackend": "model_runner",
        "layers.attention.dsa.dsa_indexer:Indexer.forward_xpu": (
            "self x q_lora positions forward_batch layer_id return_indices"
        ),
        "layers.attention.dsa.dsa_indexer:get_attn_backend": "",
        "layers.attention.dsa.dsa_indexer:get_token_to_kv_pool": "",
        "mem_cache.memory_pool:DSATokenToKVPool.get_index_k_with_scale_buffer": "self layer_id",
    },
    overridden={
        ("cpu.attention:CpuAttention", "layers.attention.torch_native_backend:TorchNativeAttnBackend"): {
            "__init__": "self model_runner",
            "init_forward_metadata": "self forward_batch",
            "forward_extend": "self q k v layer forward_batch save_kv_cache",
            "forward_decode": "self q k v layer forward_batch save_kv_cache",
        },
        ("cpu.platform:CpuPlatform", "platforms.interface:SRTPlatform"): {
            "apply_server_args_defaults": "self server_args",
            "get_default_attention_backend": "self",
            "get_dispatch_key_name": "self",
            "is_pin_memory_available": "self device",
            "init_backend": "self",
            "supports_speculative_algorithm": "self algorithm",
        },
    },
    attributes={
        "platforms.interface:PlatformCapabilities": "",
        "layers.attention.torch_native_backend:TorchNativeAttnBackend": (
            "req_to_token_pool token_to_kv_pool use_sliding_window_kv_pool swa_out_cache_loc"
        ),
        "layers.radix_attention:RadixAttention": (
            "layer_id tp_q_head_num qk_head_dim v_head_dim scaling sliding_window_size is_cross_attention attn_type"
        ),
        "model_executor.forward_batch_info:ForwardBatch": (
            "seq_lens extend_prefix_lens req_pool_indices out_cache_loc forward_mode spec_info"
        ),
        "layers.attention.dsa.dsa_indexer:Indexer": (
            "wq_b wk k_norm weights_proj rotary_emb n_heads head_dim rope_head_dim index_topk softmax_scale scale_fmt"
        ),
        "speculative.eagle_info:EagleVerifyInput": "draft_token_num custom_mask tree_topk",
        "speculative.ngram_info:NgramVerifyInput": "draft_token_num custom_mask tree_topk",
    },
)

NEEDS = {
    "UnifiedCacheLinker.finish_layer_wise_loading": "a load's outcome, before what was computed with it is used",
    "UnifiedCacheLinkerWrapper.private_load_indices": "pages that stay out of the radix tree until they are loaded",
    "UnifiedRadixCache.finish_external_linker_loads": "requests whose load failed, one by one",
}
"""What some of these are for, in words."""


# What stands for a symbol that is not there, or is no function of Python's any more.
_NONE = (ImportError, AttributeError, TypeError, ValueError)


def missing(contract: Contract) -> list[str]:
    """What the installed SGLang lacks or has changed, each in words, those that are explained first."""
    found = [*_called(contract), *_overridden(contract), *_attributes(contract)]
    return sorted(found, key=lambda words: "(" not in words)


def resolve(symbol: str) -> Any:
    """The object that ``module:name`` names. Raises ImportError or AttributeError if there is none."""
    module, _, name = symbol.partition(":")
    found = importlib.import_module(f"sglang.srt.{module}")
    for part in name.split("."):
        found = getattr(found, part)
    return found


def parameters(symbol: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(symbol).parameters)


def forms(name: str, known: str) -> list[str]:
    """The parameters with which a symbol is known: today's, and those of older versions."""
    return [known, *(form.format(_STREAM) for form in versions.FORMS.get(name, ()))]


def takes(found: Mapping[str, inspect.Parameter], known: str) -> bool:
    """Whether a function with these parameters can be called with those that are ``known``."""
    positional, _, by_name = (known if "*" in known else f"{known} *").partition("*")
    required = {
        name
        for name, parameter in found.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    names = positional.split()
    return list(found)[: len(names)] == names and set(by_name.split()) <= set(found) and required <= set(known.split())


def has(owner: type, name: str) -> bool:
    """Whether objects of a class have an attribute, by what its methods and its parents' set."""
    if hasattr(owner, name) or any(name in vars(cls).get("__annotations__", ()) for cls in owner.__mro__):
        return True
    return any(
        name in code.co_names and name in _set_by(code)
        for cls in owner.__mro__
        for member in vars(cls).values()
        for code in _codes(member)
    )


@cache
def _set_by(code: CodeType) -> frozenset[str]:
    """The attributes that code sets."""
    return frozenset(step.argval for step in dis.Bytecode(code) if step.opname == "STORE_ATTR")


def _codes(member: Any) -> Iterator[CodeType]:
    """The code of a method, a property or a class method, and of what it defines."""
    function = inspect.unwrap(getattr(member, "fget", None) or getattr(member, "__func__", None) or member)
    waiting = [code] if isinstance(code := getattr(function, "__code__", None), CodeType) else []
    while waiting:
        yield (code := waiting.pop())
        waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _called(contract: Contract) -> Iterator[str]:
    for symbol, known in contract.called.items():
        name = symbol.partition(":")[2]
        try:
            found = parameters(resolve(symbol))
        except _NONE:
            if name not in versions.SUPPLIED:
                yield _words(name)
            continue
        if not any(takes(found, form) for form in forms(name, known)):
            yield _changed(name, found)


def _overridden(contract: Contract) -> Iterator[str]:
    for (_, stock), methods in contract.overridden.items():
        for method, known in methods.items():
            name = f"{stock.partition(':')[2]}.{method}"
            try:
                found = parameters(resolve(f"{stock}.{method}"))
            except _NONE:
                yield _words(name)
                continue
            if all(list(found) != form.split() for form in forms(name, known)):
                yield _changed(name, found)


def _attributes(contract: Contract) -> Iterator[str]:
    for symbol, names in contract.attributes.items():
        owner = symbol.partition(":")[2]
        try:
            found = resolve(symbol)
        except (ImportError, AttributeError):
            yield owner
            continue
        for name in names.split():
            if f"{owner}.{name}" not in versions.SUPPLIED and not has(found, name):
                yield _words(f"{owner}.{name}")


def _words(name: str) -> str:
    return f"{NEEDS[name]} ({name})" if name in NEEDS else name


def _changed(name: str, found: Mapping[str, inspect.Parameter]) -> str:
    return f"{name} as it was, now with the parameters {' '.join(found) or 'none'}"


def main() -> int:
    found = versions.installed()
    lacking = {"an engine": missing(ENGINE), "an engine on our CPU platform": missing(CPU)}
    for what, lacks in lacking.items():
        print(f"SGLang {found} {'lacks' if lacks else 'has'} what {what} needs{':' if lacks else ''}")
        print("".join(f"  {one}\n" for one in lacks), end="")
    return 1 if any(lacking.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
