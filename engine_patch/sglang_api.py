"""Every SGLang symbol that the plug-in uses, and the version it was read from.

SGLang has no stable plug-in interface below its entry points. For an upgrade, read this file again;
`tests/engine/test_sglang_api.py` names what changed.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from agentstate.errors import EngineError
from engine_patch.flags import Flag, judge

SUPPORTED = "0.5.23"


def check_version() -> None:
    """Raise EngineError, in one sentence, unless the installed SGLang is the one this plug-in was written for."""
    try:
        found = version("sglang")
    except PackageNotFoundError:
        raise EngineError("SGLang is not installed here: pip install 'agentstate[engine]'") from None
    if found != SUPPORTED:
        raise EngineError(f"AgentState supports SGLang {SUPPORTED} and found {found}: pip install sglang=={SUPPORTED}")


check_version()

from sglang.srt.arg_groups.arg_utils import record_fields  # noqa: E402
from sglang.srt.arg_groups.choices import add_attention_backend_choices  # noqa: E402
from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view  # noqa: E402
from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook  # noqa: E402
from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST  # noqa: E402
from sglang.srt.entrypoints.warmup import warmup  # noqa: E402
from sglang.srt.managers.io_struct import GenerateReqInput, UpdateWeightFromDiskReqOutput  # noqa: E402
from sglang.srt.managers.schedule_batch import FINISH_ABORT  # noqa: E402
from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS, AddReqResult, CacheAgnosticPolicy  # noqa: E402
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator  # noqa: E402
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator  # noqa: E402
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, EvictResult, InsertParams, MatchPrefixParams  # noqa: E402
from sglang.srt.mem_cache.common import release_kv_cache  # noqa: E402
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer  # noqa: E402
from sglang.srt.mem_cache.memory_pool import (  # noqa: E402
    HybridLinearKVPool,
    HybridReqToTokenPool,
    MambaPool,
    MHATokenToKVPool,
    MLATokenToKVPool,
)
from sglang.srt.mem_cache.radix_cache import RadixKey  # noqa: E402
from sglang.srt.mem_cache.registry import (  # noqa: E402
    create_unified_radix_cache,
    register_radix_cache_backend,
)
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool  # noqa: E402
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType  # noqa: E402
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import (  # noqa: E402
    UnifiedCacheLinker,
    UnifiedCacheLinkerWrapper,
)
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import _PendingOffload as PendingOffload  # noqa: E402
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache  # noqa: E402
from sglang.srt.mem_cache.utils import get_storage_hash_str  # noqa: E402
from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # noqa: E402
from sglang.srt.runtime_context import get_memory, get_model, get_observability, get_parallel, get_platform, get_serving  # noqa: E402


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


def platform_is_hip() -> bool:
    return bool(get_platform().is_hip)


def is_our_platform() -> bool:
    """Whether SGLang runs on `engine_patch.cpu`."""
    from sglang.srt.platforms import current_platform

    return type(current_platform).__module__.startswith("engine_patch.")


def server_args_class() -> type:
    """`ServerArgs`, imported when it is asked for: this module is loaded before most of SGLang."""
    from sglang.srt.server_args import ServerArgs

    return ServerArgs


def parse_arguments(arguments: list[str]) -> Any:
    """A command line as SGLang reads it, config file and all: `ServerArgs` before anything is resolved. Exits like
    argparse."""
    from sglang.srt.server_args import prepare_server_args

    return prepare_server_args(arguments)


__all__ = [
    "CLIP_MAX_NEW_TOKENS",
    "FAKE_BOOTSTRAP_HOST",
    "FINISH_ABORT",
    "SUPPORTED",
    "AddReqResult",
    "CacheAgnosticPolicy",
    "ComponentType",
    "EvictParams",
    "EvictResult",
    "GenerateReqInput",
    "HookRegistry",
    "HookType",
    "HybridLinearKVPool",
    "HybridReqToTokenPool",
    "InsertParams",
    "MHATokenToKVPool",
    "MLATokenToKVPool",
    "MambaPool",
    "MatchPrefixParams",
    "PagedTokenToKVPoolAllocator",
    "PendingOffload",
    "PoolName",
    "PoolTransfer",
    "RadixKey",
    "SWAKVPool",
    "TokenToKVPoolAllocator",
    "UnifiedCacheLinker",
    "UnifiedCacheLinkerWrapper",
    "UnifiedRadixCache",
    "UpdateWeightFromDiskReqOutput",
    "add_attention_backend_choices",
    "check_version",
    "create_unified_radix_cache",
    "declare_resolution",
    "flag_defaults",
    "get_memory",
    "get_model",
    "get_observability",
    "get_parallel",
    "get_platform",
    "get_serving",
    "get_storage_hash_str",
    "given_flags",
    "is_our_platform",
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
