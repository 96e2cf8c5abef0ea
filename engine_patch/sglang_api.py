"""Every SGLang symbol that the plug-in uses.

`contract` says what is needed of them, and `versions` supplies what older versions lack.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.arg_groups.arg_utils import record_fields
from sglang.srt.arg_groups.choices import add_attention_backend_choices
from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
from sglang.srt.disaggregation.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    StorageMedium,
)
from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST
from sglang.srt.entrypoints.warmup import warmup
from sglang.srt.managers.io_struct import AbortReq, GenerateReqInput, UpdateWeightFromDiskReqOutput
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS, AddReqResult, CacheAgnosticPolicy
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, EvictResult, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.srt.mem_cache.events import KVCacheEventRecorder
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.memory_pool import (
    DSATokenToKVPool,
    HybridLinearKVPool,
    HybridReqToTokenPool,
    MambaPool,
    MHATokenToKVPool,
    MHATokenToKVPoolMXFP8,
    MLATokenToKVPool,
)
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.registry import (
    create_unified_radix_cache,
    register_radix_cache_backend,
)
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker as _UnifiedCacheLinker
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinkerWrapper
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import _PendingOffload as PendingOffload
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import (
    get_disagg,
    get_lora,
    get_memory,
    get_model,
    get_observability,
    get_parallel,
    get_platform,
    get_serving,
    get_spec,
)

from engine_patch import versions
from engine_patch.flags import Flag, judge

UnifiedCacheLinker = versions.linker_base(_UnifiedCacheLinker)


def constructs_linkers() -> bool:
    """Whether SGLang constructs a linker by its class's name; otherwise `create_cache` does."""
    return versions.constructs_linkers(flag_defaults(server_args_class()))


def create_cache(ctx: Any, cache_class: type, linker_class: type) -> Any:
    """A radix cache of that class, made of what SGLang makes caches of, with a linker of that class. Raises EngineError
    if this version of SGLang cannot link what the model keeps."""
    if constructs_linkers():
        return create_unified_radix_cache(ctx, cache_class=cache_class)
    return versions.link(create_unified_radix_cache, ctx, cache_class, linker_class)


def flag_defaults(server_args: Any) -> dict[str, Any]:
    """Every field of `ServerArgs`, or of an instance's type, that a flag sets, with SGLang's default. A required
    one has msgspec's marker."""
    fields = record_fields(server_args if isinstance(server_args, type) else type(server_args))
    return {
        field.name: field.default_factory() if callable(field.default_factory) else field.default
        for field in fields
        if not field.name.startswith("_")
    }


def given_flags(server_args: Any) -> list[Flag]:
    """What differs from SGLang's defaults in arguments as they were given, in SGLang's order."""
    defaults = flag_defaults(server_args)
    values = {field: getattr(server_args, field) for field in defaults}
    return [judge(field, value) for field, value in values.items() if value != defaults[field]]


def attention_backends() -> set[str | None]:
    """The names of those that attend while prefilling and while decoding; empty where SGLang does not say."""
    from sglang.srt import runtime_context

    found = getattr(runtime_context, "attention_backends", tuple)()
    return set(found)


def platform_is_hip() -> bool:
    return bool(get_platform().is_hip)


def index_keys_in_tiles() -> bool:
    """Whether the keys of sparse attention's index lie in tiles within a page, as some of ROCm's kernels want them."""
    from sglang.srt.layers.attention.dsa.utils import aiter_can_use_preshuffle_paged_mqa

    return bool(aiter_can_use_preshuffle_paged_mqa())


def is_our_platform() -> bool:
    """Whether SGLang runs on `engine_patch.cpu`."""
    from sglang.srt.platforms import current_platform

    return type(current_platform).__module__.startswith("engine_patch.")


def server_args_class() -> type:
    """`ServerArgs`, imported when it is asked for: this module is loaded before most of SGLang."""
    from sglang.srt.server_args import ServerArgs

    return ServerArgs


def attention_modules() -> tuple[type, type]:
    """SGLang's projection of queries, keys and values, and its attention, imported when they are asked for."""
    from sglang.srt.layers.linear import QKVParallelLinear
    from sglang.srt.layers.radix_attention import RadixAttention

    return QKVParallelLinear, RadixAttention


def model_group() -> Any:
    """The process group of all ranks that compute with one copy of the weights, where several DP ranks do: with data
    parallel attention. Otherwise None."""
    parallel = get_parallel()
    return parallel.tp_group.cpu_group if parallel.attn_dp_size > 1 else None


def generates(architectures: list[str], is_embedding: bool) -> bool:
    """Whether a model of these architectures generates tokens, rather than embeddings, rewards or the like."""
    from sglang.srt.configs.model_config import is_generation_model

    return bool(is_generation_model(architectures, is_embedding))


def parse_arguments(arguments: list[str]) -> Any:
    """A command line as SGLang reads it, config file and all: `ServerArgs` before anything is resolved. Exits like
    argparse."""
    from sglang.srt.server_args import prepare_server_args

    return prepare_server_args(arguments)


__all__ = [
    "CLIP_MAX_NEW_TOKENS",
    "FAKE_BOOTSTRAP_HOST",
    "FINISH_ABORT",
    "AbortReq",
    "AddReqResult",
    "AllBlocksCleared",
    "BlockRemoved",
    "BlockStored",
    "CacheAgnosticPolicy",
    "ComponentType",
    "DSATokenToKVPool",
    "EvictParams",
    "EvictResult",
    "GenerateReqInput",
    "HookRegistry",
    "HookType",
    "HybridLinearKVPool",
    "HybridReqToTokenPool",
    "InsertParams",
    "KVCacheEventRecorder",
    "MHATokenToKVPool",
    "MHATokenToKVPoolMXFP8",
    "MLATokenToKVPool",
    "MambaPool",
    "MatchPrefixParams",
    "PagedTokenToKVPoolAllocator",
    "PendingOffload",
    "PoolName",
    "PoolTransfer",
    "RadixKey",
    "SWAKVPool",
    "StorageMedium",
    "TokenToKVPoolAllocator",
    "UnifiedCacheLinker",
    "UnifiedCacheLinkerWrapper",
    "UnifiedRadixCache",
    "UpdateWeightFromDiskReqOutput",
    "add_attention_backend_choices",
    "attention_backends",
    "attention_modules",
    "constructs_linkers",
    "create_cache",
    "create_unified_radix_cache",
    "declare_resolution",
    "flag_defaults",
    "generates",
    "get_disagg",
    "get_lora",
    "get_memory",
    "get_model",
    "get_observability",
    "get_parallel",
    "get_platform",
    "get_serving",
    "get_spec",
    "get_storage_hash_str",
    "given_flags",
    "index_keys_in_tiles",
    "is_our_platform",
    "model_group",
    "parse_arguments",
    "platform_is_hip",
    "record_fields",
    "register_radix_cache_backend",
    "register_resolution_hook",
    "release_kv_cache",
    "resolving_view",
    "server_args_class",
    "warmup",
]
