"""What SGLang can be started with, in three classes: tested with AgentState, refused, unknown.

The table names fields of SGLang's `ServerArgs`; whatever it does not name is unknown, so that a flag which an upgrade
of SGLang brings is unknown by default. `agentstate engine --check`, the start itself and docs/flags.md read it here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from agentstate.sql.address import mask

BACKEND = "agentstate"
# Our attention on a CPU, which SGLang lets be chosen once the plug-in has told it so.
CPU_ATTENTION = "agentstate_cpu"
# Of a file that an unknown flag names, no more than this goes into the fingerprint.
_MOST_BYTES = 64 << 20


class Standing(Enum):
    """What is known of a flag together with AgentState."""

    TESTED = "tested"
    REFUSED = "refused"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Flag:
    """A flag that was given: ``field`` of `ServerArgs`, its value, and why it stands where it does."""

    field: str
    value: Any
    standing: Standing
    why: str


@dataclass(frozen=True)
class Refusal:
    """``values`` are the refused ones; None refuses all but the default and what is false."""

    reason: str
    instead: str
    values: frozenset[Any] | None = None


@dataclass(frozen=True)
class Tested:
    """``values`` are those that tests start engines with; None is any."""

    note: str
    values: frozenset[Any] | None = None


NO_EFFECT = {
    "how clients reach the engine": """
        host port fastapi_root_path api_key admin_api_key served_model_name ssl_keyfile ssl_certfile ssl_ca_certs
        ssl_keyfile_password enable_ssl_refresh enable_http2 http2_max_concurrent_streams
        http2_initial_connection_window_size enable_http_worker_reuseport stream_interval batch_notify_size
        stream_response_default_include_usage incremental_streaming_output enable_response_store file_storage_path
        enable_cache_report return_input_ids return_output_ids skip_server_warmup warmups""",
    "how text becomes tokens, and tokens text": """
        tokenizer_path tokenizer_mode tokenizer_backend tokenizer_worker_num detokenizer_worker_num skip_tokenizer_init
        enable_dynamic_batch_tokenizer dynamic_batch_tokenizer_batch_size dynamic_batch_tokenizer_batch_timeout
        enable_tokenizer_batch_encode disable_tokenizer_batch_decode chat_template trust_request_chat_template
        hf_chat_template_name default_chat_template_kwargs completion_template reasoning_parser tool_call_parser
        tool_server allow_auto_truncate asr_max_buffer_seconds asr_max_concurrent_sessions""",
    "how tokens are chosen once logits are computed": """
        sampling_defaults preferred_sampling_params sampling_backend sampling_mask_max_tokens grammar_backend
        constrained_json_whitespace_pattern constrained_json_disable_any_whitespace constrained_json_max_whitespace_cnt
        disable_outlines_disk_cache enable_custom_logit_processor enable_strict_thinking enable_fp32_lm_head random_seed
        enable_watermark watermark_config watermark_key watermark_key_b watermark_context_window
        watermark_mixing_probability watermark_max_probability watermark_default_enabled watermark_enforce_all""",
    "what is logged, measured and traced": """
        log_level log_level_http log_requests log_requests_level log_requests_format log_requests_target
        uvicorn_access_log_exclude_prefixes crash_dump_folder show_time_cost enable_metrics enable_mfu_metrics
        enable_metrics_for_all_schedulers load_snapshot_publish_interval tokenizer_metrics_custom_labels_header
        tokenizer_metrics_allowed_custom_labels extra_metric_labels bucket_time_to_first_token
        bucket_inter_token_latency bucket_e2e_request_latency prompt_tokens_buckets generation_tokens_buckets
        gc_warning_threshold_secs decode_log_interval enable_request_time_stats_logging load_publish_endpoint
        enable_forward_pass_metrics forward_pass_metrics_worker_id forward_pass_metrics_ipc_name enable_trace
        trace_modules otlp_traces_endpoint otlp_service_name export_metrics_to_file export_metrics_to_file_dir
        stat_loggers weight_version""",
    "time limits, processes and devices": """
        watchdog_timeout soft_watchdog_timeout base_gpu_id gpu_id_step numa_node gc_threshold custom_sigquit_handler
        nccl_port dist_timeout dist_init_addr enable_p2p_check pre_warm_nccl load_balance_method
        disaggregation_bootstrap_port""",
    "how much runs and how much memory it has": """
        mem_fraction_static max_running_requests max_queued_requests max_total_tokens max_prefill_tokens
        prefill_max_requests schedule_conservativeness scheduler_recv_interval context_length max_mamba_cache_size
        mamba_full_memory_ratio num_reserved_decode_tokens disaggregation_decode_extra_slots
        disaggregation_decode_polling_interval""",
    "how the checkpoint's files are read": """
        download_dir model_checksum weight_loader_disable_mmap weight_loader_prefetch_checkpoints
        weight_loader_prefetch_num_threads weight_loader_drop_cache_after_load""",
    "which graphs are captured": """
        disable_cuda_graph disable_prefill_cuda_graph disable_decode_cuda_graph disable_cuda_graph_padding
        cuda_graph_max_bs_decode cuda_graph_max_bs_prefill cuda_graph_bs_decode cuda_graph_bs_prefill
        cuda_graph_max_seq_len_prefill enable_profile_cuda_graph enable_cudagraph_gc""",
    "limits of multimodal requests": """
        limit_mm_data_per_request allowed_media_domains media_url_max_file_size_mb mm_io_worker_num
        mm_processor_worker_num mm_preprocess_cache_size_mb""",
}
"""By reading SGLang: they reach neither a byte of KV nor the radix cache."""

IDENTITY = """
    model_path revision trust_remote_code dtype quantization quantization_param_path rl_quant_profile
    json_model_override_args model_loader_extra_config speculative_draft_model_path speculative_draft_model_revision
    speculative_draft_load_format speculative_draft_model_quantization"""
"""Part of what a page is valid for: another value is another store."""

TESTED = {
    "radix_cache_backend": Tested("this is AgentState", frozenset({BACKEND})),
    "page_size": Tested("64 where none is given; 1 costs time; tested with 1, 16, 32, 64 and 128"),
    "chunked_prefill_size": Tested("a chunk restores and stores like a whole prompt"),
    "tp_size": Tested("a store a rank, or one for ranks that hold the same pages; ranks agree; tested with 2"),
    "dp_size": Tested("a page directory a DP rank; a session stays with one of them; tested with 2"),
    "attn_dp_size": Tested("like --dp-size; ranks of one DP rank agree; tested with 2, and MLA"),
    "enable_dp_attention": Tested("SGLang's older word for --attn-dp-size"),
    "kv_cache_dtype": Tested("KV is stored as it is", frozenset({"bf16", "bfloat16", "fp8_e4m3"})),
    "load_format": Tested("weights come from the checkpoint's files", frozenset({"safetensors", "dummy"})),
    "device": Tested("restored and stored alike", frozenset({"cpu", "cuda"})),
    "schedule_policy": Tested("requests are admitted in another order", frozenset({"lpm"})),
    "enable_priority_scheduling": Tested("requests are admitted in another order, and preempted"),
    "priority_scheduling_preemption_threshold": Tested("one that is preempted goes on from where it was"),
    "enable_mixed_chunk": Tested("others decode in the batch of a restore"),
    "num_continuous_decode_steps": Tested("a restore waits for them"),
    "disable_overlap_schedule": Tested("a failed restore is noticed at once"),
    "radix_eviction_policy": Tested(
        "what the device evicts is stored before", frozenset({"lfu", "priority", "slru", "tlru"})
    ),
    "radix_eviction_policy_config": Tested("what the device evicts is stored before"),
    "kv_events_config": Tested("what is stored is told as well"),
    "attention_backend": Tested("tested on a CPU", frozenset({CPU_ATTENTION, "torch_native"})),
    "is_embedding": Tested("pages are kept apart from those of an engine that generates"),
    "enable_lora": Tested("an adapter's pages are named by its weights; without an adapter KV is the same"),
    "lora_paths": Tested("an adapter's pages are named by its weights"),
    "lora_target_modules": Tested("an adapter's pages are named by what is applied of it"),
    "lora_backend": Tested("tested on a CPU", frozenset({"torch_native"})),
    "max_lora_rank": Tested("KV is the same"),
    "max_loaded_loras": Tested("an adapter that is loaded again finds its pages, unless it has changed"),
    "max_loras_per_batch": Tested("KV is the same"),
    "lora_eviction_policy": Tested("KV is the same"),
    "lora_strict_loading": Tested("KV is the same"),
    "lora_drain_wait_threshold": Tested("requests are admitted in another order"),
    "disaggregation_mode": Tested(
        "one engine prefills and restores, another one decodes; both store; tested on a CPU",
        frozenset({"prefill", "decode"}),
    ),
    "disaggregation_transfer_backend": Tested("KV is sent once it is verified", frozenset({"mooncake_tcp"})),
    "disaggregation_decode_enable_radix_cache": Tested("AgentState sets it where KV is decoded"),
    "disaggregation_decode_retraction_backup": Tested("KV is the same", frozenset({"cpu_tensor"})),
    "speculative_algorithm": Tested(
        "the draft model's KV is stored and restored with the target's",
        frozenset({"EAGLE", "EAGLE3", "NEXTN", "NGRAM", "STANDALONE"}),
    ),
    "speculative_num_steps": Tested("KV is the same"),
    "speculative_num_draft_tokens": Tested("KV is the same"),
    "speculative_eagle_topk": Tested("on a CPU drafts are chains", frozenset({1})),
    "speculative_ngram_max_bfs_breadth": Tested("KV is the same"),
}

_LEAVE_OUT = "leave it out"
_WITHOUT = "start without --radix-cache-backend agentstate"
_TP = "use --tp-size instead"
_PARTIAL = "a rank would hold a part of each page's tokens, and a page is stored whole"
_OTHER_CACHE = "two caches would own the same device pages"
_OWN_WEIGHTS = "the weights would not be those of the checkpoint's files, which say what a page is valid for"

REFUSED = {
    "disable_radix_cache": Refusal("stored pages come back through the radix cache", _LEAVE_OUT),
    "prefill_only_disable_kv_cache": Refusal("without a KV cache there is nothing to store", _WITHOUT),
    "encoder_only": Refusal("an encoder has no KV to store", _WITHOUT),
    "enable_hierarchical_cache": Refusal(_OTHER_CACHE, "leave it out: AgentState keeps pages on disk itself"),
    "hicache_storage_backend": Refusal(_OTHER_CACHE, "leave it out: AgentState keeps pages on disk itself"),
    "enable_lmcache": Refusal(_OTHER_CACHE, "choose one of the two"),
    "enable_flexkv": Refusal(_OTHER_CACHE, "choose one of the two"),
    "enable_unified_cache_external_linker": Refusal("AgentState is the external linker, and sets this", _LEAVE_OUT),
    "unified_cache_external_linker_backend": Refusal("AgentState is the external linker, and sets this", _LEAVE_OUT),
    "unified_cache_external_linker_config": Refusal("AgentState is the external linker, and sets this", _LEAVE_OUT),
    "speculative_algorithm": Refusal(
        "what its draft model keeps is not stored, so that hardly any draft would be accepted after a restore",
        "use EAGLE, EAGLE3, STANDALONE or NGRAM",
        frozenset({"DFLASH", "DSPARK", "FROZEN_KV_MTP", "UNO"}),
    ),
    "enable_multi_layer_eagle": Refusal(
        "several draft layers keep state of requests, which is not stored", "leave it out: one layer drafts all steps"
    ),
    "decoupled_spec_role": Refusal("the draft model's KV is on another engine, which does not store it", _LEAVE_OUT),
    "disaggregation_decode_enable_offload_kvcache": Refusal(
        _OTHER_CACHE, "leave it out: AgentState stores what is decoded"
    ),
    "disaggregation_decode_retraction_backup": Refusal(
        "a host pool takes the place of the external linker", "use cpu_tensor", frozenset({"host_pool"})
    ),
    "disaggregation_decode_host_receive_threshold": Refusal(
        "a host pool takes the place of the external linker", _LEAVE_OUT
    ),
    "disaggregation_decode_allocation_policy": Refusal(
        "prefill_complete goes without a radix cache where KV is decoded", _LEAVE_OUT
    ),
    "enable_pd_role_switch": Refusal("the service would not know which engine prefills", _LEAVE_OUT),
    "enable_pdmux": Refusal("two streams would use pages that a restore still fills", _LEAVE_OUT),
    "enable_streaming_session": Refusal(
        "its KV belongs to requests and not to the radix cache", "send the top-level session_id with requests instead"
    ),
    "pp_size": Refusal("ranks of different stages do not agree on what can be restored", _TP),
    "enable_dp_attention_local_control_broadcast": Refusal(
        "DP ranks that share the weights would not agree on what an update has left in them", _LEAVE_OUT
    ),
    "dcp_size": Refusal(_PARTIAL, _TP),
    "attn_cp_size": Refusal(_PARTIAL, _TP),
    "enable_prefill_cp": Refusal(_PARTIAL, _TP),
    "enable_kv_cache_sharding": Refusal(_PARTIAL, _LEAVE_OUT),
    "enable_dsa_cache_layer_split": Refusal("a rank would hold a part of each page's layers", _LEAVE_OUT),
    "dllm_algorithm": Refusal("diffusion computes the KV of a token more than once", _WITHOUT),
    "enable_hisparse": Refusal("only a part of a page is on the device", _LEAVE_OUT),
    "enable_int8_mamba_checkpoint": Refusal("states in INT8 have scales, which are not stored", _LEAVE_OUT),
    "enable_page_major_kv_layout": Refusal("all layers of a page in one row is no layout that is stored", _LEAVE_OUT),
    "enable_unified_memory": Refusal("pages move in a unified pool while they are stored", _LEAVE_OUT),
    "load_format": Refusal(
        _OWN_WEIGHTS, "load a checkpoint's files", frozenset({"remote", "remote_instance", "private", "flash_rl"})
    ),
    "weight_cache_mode": Refusal(_OWN_WEIGHTS, _LEAVE_OUT),
    "checkpoint_engine_wait_weights_before_ready": Refusal(_OWN_WEIGHTS, _LEAVE_OUT),
    "modelopt_quant": Refusal(_OWN_WEIGHTS, "export the quantized model once, and serve what was exported"),
    "quantize_and_serve": Refusal(_OWN_WEIGHTS, "export the quantized model once, and serve what was exported"),
    "modelopt_checkpoint_restore_path": Refusal(_OWN_WEIGHTS, "export the quantized model once, and serve that"),
    "kt_weight_path": Refusal(_OWN_WEIGHTS, _WITHOUT),
    "delete_ckpt_after_loading": Refusal("the checkpoint's files say what a page is valid for", _LEAVE_OUT),
}

INERT = {
    "enable_hierarchical_cache": """
        hicache_host_memory_mode hicache_ratio hicache_size hicache_write_policy hicache_io_backend hicache_mem_layout
        hicache_storage_prefetch_policy hicache_storage_backend_extra_config
        hicache_storage_prefetch_retry_poll_interval hicache_storage_prefetch_retry_max_attempts
        hicache_host_memory_fraction""",
    "enable_lmcache": "lmcache_config_file",
    "enable_flexkv": "flexkv_config_file",
    "enable_hisparse": "hisparse_config",
    "enable_pdmux": "pdmux_config_path sm_group_num",
    "dllm_algorithm": "dllm_algorithm_config dllm_fdfo",
    "enable_int8_mamba_checkpoint": "int8_mamba_ckpt_size",
    "pp_size": "pp_max_micro_batch_size pp_async_batch_depth enable_dynamic_chunking",
    "dcp_size": "dcp_comm_backend dcp_replicate_q_proj",
    "enable_prefill_cp": "cp_strategy",
    "modelopt_quant": "modelopt_checkpoint_save_path modelopt_export_path",
    "kt_weight_path": """
        kt_method kt_cpuinfer kt_threadpool_count kt_num_gpu_experts kt_max_deferred_experts_per_token""",
    "weight_cache_mode": "weight_cache_socket weight_cache_timeout",
    "decoupled_spec_role": "decoupled_spec_bind_endpoint decoupled_spec_connect_endpoints decoupled_spec_rank",
}
"""They do nothing unless a flag is given that is refused."""

SAME_KV = """
    attention_backend decode_attention_backend prefill_attention_backend mm_attention_backend enable_lean_attention
    fp8_gemm_runner_backend fp4_gemm_runner_backend bf16_gemm_backend dsa_prefill_backend dsa_decode_backend
    dsa_paged_mqa_logits_backend dsa_topk_backend disable_flashinfer_autotune flashinfer_autotune_skip_ops
    triton_attention_reduce_in_fp32 triton_attention_num_kv_splits triton_attention_split_tile_size
    flashinfer_mla_disable_ragged enable_fused_qk_norm_rope disable_chunked_prefix_cache mamba_backend
    linear_attn_backend linear_attn_decode_backend linear_attn_prefill_backend mamba_radix_cache_strategy
    mamba_track_interval mamba_max_states_per_path enable_amd_monokernel enable_nvidia_megakernel
    cuda_graph_config cuda_graph_backend_decode cuda_graph_backend_prefill cuda_graph_prefill_max_context
    debug_cuda_graph enable_torch_compile enable_torch_compile_debug_mode torch_compile_max_bs
    enable_nccl_nvls enable_symm_mem disable_custom_all_reduce enable_mscclpp enable_torch_symm_mem boundary_reduction
    enable_flashinfer_allreduce_fusion enforce_disable_flashinfer_allreduce_fusion flashinfer_allreduce_fusion_backend
    enable_aiter_allreduce_fusion disable_aiter_allreduce_fusion_in_prefill disable_aiter_allreduce_fusion_in_decode
    enable_layerwise_nvtx_marker enable_two_batch_overlap enable_single_batch_overlap tbo_token_distribution_threshold
    cpu_offload_gb offload_group_size offload_num_in_group offload_prefetch_step offload_mode ple_offload_embedding
    ple_offload_backend ple_offload_dir enable_paged_experts paged_experts_num_resident startup_weight_load_mode
    schedule_policy disable_priority_preemption default_priority_value
    abort_on_priority_when_disabled schedule_low_priority_values_first
    retraction_policy prefill_decode_interval prefill_decode_interval_min_bs 
    min_free_slots_delay enable_prefill_delayer
    prefill_delayer_max_delay_passes prefill_delayer_token_usage_low_watermark prefill_delayer_forward_passes_buckets
    prefill_delayer_wait_seconds_buckets prefill_delayer_queue_min_ratio prefill_delayer_max_delay_ms
    radix_eviction_policy enable_session_radix_cache strip_thinking_cache
    swa_full_tokens_ratio disable_hybrid_swa_memory swa_prefix_tails sleep_on_idle
    enable_memory_saver enable_weights_cpu_backup enable_return_hidden_states return_hidden_states_mode
    enable_return_routed_experts enable_return_indexer_topk device nnodes node_rank use_ray gated_launch_port
    smg_grpc_mode grpc_mode grpc_port grpc_worker_threads grpc_response_timeout_secs smg_http_sidecar_port sidecar
    sidecar_args kv_canary kv_canary_real_data kv_canary_sweep_interval debug_tensor_dump_output_folder
    debug_tensor_dump_layers debug_tensor_dump_input_file moe_dp_size moe_dense_tp_size ep_size moe_a2a_backend
    deepep_v2_mode deepep_mode fuseep_mode deepep_config mooncake_ib_device enable_eplb eplb_algorithm
    eplb_rebalance_num_iterations eplb_rebalance_layers_per_chunk eplb_min_rebalancing_utilization_threshold
    ep_num_redundant_experts ep_dispatch_algorithm init_expert_location expert_distribution_recorder_mode
    expert_distribution_recorder_buffer_size expert_balancedness_report_mode elastic_ep_backend
    enable_elastic_expert_backup enable_waterfill ep_join_mode ep_join_rank_offset elastic_ep_initial_size max_ep_size
    elastic_ep_scale_timeout enable_dp_lm_head enable_tp_lm_head_all_to_all enable_attn_tp_input_scattered
    enable_shared_experts_attn_tp shared_experts_tp_size enable_dense_mlp_attn_tp disable_attn_tp_gather
    disable_shared_experts_fusion enforce_shared_experts_fusion enable_fused_moe_sum_all_reduce
    enable_broadcast_mm_inputs_process mm_enable_dp_encoder mm_feature_transport enable_mm_global_cache
    mm_global_cache_backend enable_prefix_mm_cache language_only language_model_only encoder_transfer_backend
    encoder_urls encoder_bootstrap_port encoder_register_urls enable_adaptive_dispatch_to_encoder
    engine_info_bootstrap_port kv_cache_dtype load_format disaggregation_transfer_backend disaggregation_ib_device
    disaggregation_decode_retraction_backup optimistic_prefill_attempts disaggregation_enable_kv_checksum
    speculative_eagle_topk speculative_accept_threshold_single speculative_accept_threshold_acc
    speculative_use_rejection_sampling speculative_use_block_verification speculative_token_map
    speculative_attention_mode speculative_draft_attention_backend speculative_dsa_topk_backend
    speculative_draft_kv_cache_dtype speculative_moe_runner_backend speculative_moe_a2a_backend speculative_adaptive
    speculative_adaptive_config spec_trace_dir speculative_ngram_min_bfs_breadth speculative_ngram_match_type
    speculative_ngram_max_trie_depth speculative_ngram_capacity speculative_ngram_external_corpus_path
    speculative_ngram_external_sam_budget speculative_ngram_external_corpus_max_tokens speculative_boundary_reduction
    enable_draft_weights_cpu_backup linear_attn_verify_backend
    lora_backend enable_lora_overlap_loading max_lora_chunk_size experts_shared_outer_loras lora_use_virtual_experts"""
"""Kernels, graphs, communication, placement and scheduling: the KV of a token is the same but for rounding, or what
differs is in the fingerprint anyway. Unknown all the same; they do not keep pages apart."""

_GROUPS = {field: f"no effect on KV: {group}" for group, fields in NO_EFFECT.items() for field in fields.split()}
_IDENTITY = frozenset(IDENTITY.split())
_INERT = {field: owner for owner, fields in INERT.items() for field in fields.split()}
_SAME_KV = frozenset(SAME_KV.split())


def judge(field: str, value: Any) -> Flag:
    """Where a flag stands that was given ``value``, which is not SGLang's default."""
    hashable = value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
    refusal = REFUSED.get(field)
    if refusal is not None and (bool(value) if refusal.values is None else hashable in refusal.values):
        return Flag(field, value, Standing.REFUSED, f"{refusal.reason}; {refusal.instead}")
    tested = TESTED.get(field)
    if tested is not None and (tested.values is None or hashable in tested.values):
        return Flag(field, value, Standing.TESTED, tested.note)
    if field in _GROUPS:
        return Flag(field, value, Standing.TESTED, _GROUPS[field])
    if field in _IDENTITY:
        return Flag(field, value, Standing.TESTED, "pages are kept apart by it")
    if field in _INERT:
        return Flag(field, value, Standing.TESTED, f"no effect on KV without {spelling(_INERT[field])}")
    if refusal is not None and tested is None and not value:
        return Flag(field, value, Standing.TESTED, "no effect on KV: it is off")
    if field in _SAME_KV:
        return Flag(field, value, Standing.UNKNOWN, "not run with AgentState")
    return Flag(field, value, Standing.UNKNOWN, "not run with AgentState; pages are kept apart by it")


def known(field: str) -> bool:
    """Whether the table says of any value that it is tested or refused."""
    return field in _GROUPS or field in _IDENTITY or field in _INERT or field in TESTED or field in REFUSED


def keeps_kv(field: str) -> bool:
    return field in _SAME_KV


def spelling(field: str) -> str:
    """A field of `ServerArgs` as a flag."""
    return "--" + _SPELLINGS.get(field, field.replace("_", "-"))


_SPELLINGS = {
    "fp8_gemm_runner_backend": "fp8-gemm-backend",
    "fp4_gemm_runner_backend": "fp4-gemm-backend",
    "ep_join_mode": "elastic-ep-join-mode",
    "ep_join_rank_offset": "elastic-ep-join-rank-offset",
}


_SECRETS = {"api_key", "admin_api_key", "ssl_keyfile_password", "watermark_config", "watermark_key", "watermark_key_b"}


def shown(flag: Flag) -> str:
    """As it is given on a command line, but for secrets."""
    if flag.field in _SECRETS:
        return f"{spelling(flag.field)} …"
    # A URL, such as that of weights or of a collector of traces, may have a password.
    return spelling(flag.field) if flag.value is True else f"{spelling(flag.field)} {mask(str(flag.value))}"


def told(flags: Iterable[Flag]) -> list[dict[str, str]]:
    """For those who ask what an engine was started with: each ``flag`` as it is `shown`, its ``class``, and ``why``."""
    return [{"flag": shown(flag), "class": flag.standing.value, "why": flag.why} for flag in flags]


def refusal(flags: Iterable[Flag]) -> str | None:
    """One sentence for each refused one of ``flags``, or None."""
    refused = [flag for flag in flags if flag.standing is Standing.REFUSED]
    lines = [f"{shown(flag)} does not go with --radix-cache-backend {BACKEND}: {flag.why}." for flag in refused]
    return "\n".join(lines) or None


def untested(flags: Iterable[Flag]) -> str | None:
    """One sentence that names the unknown ones of ``flags``, or None."""
    named = ", ".join(shown(flag) for flag in flags if flag.standing is Standing.UNKNOWN)
    return f"not tested with AgentState: {named}; see docs/flags.md" if named else None


def marks(flags: Iterable[Flag]) -> Mapping[str, str]:
    """What unknown flags add to a fingerprint: of such a flag nobody knows that KV is the same with it and without.
    A file that one names counts with its content."""
    return {
        flag.field: _content(flag.value)
        for flag in flags
        if flag.standing is Standing.UNKNOWN and not keeps_kv(flag.field)
    }


def _content(value: Any) -> str:
    if isinstance(value, str) and 0 < len(value) < 4096 and "\0" not in value and Path(value).is_file():
        with Path(value).open("rb") as file:
            return f"{value} {hashlib.sha256(file.read(_MOST_BYTES)).hexdigest()}"
    return str(value)
