"""Every SGLang symbol that the plug-in uses, and the version it was read from.

SGLang has no stable plug-in interface below its entry points: an upgrade is this file to read again, and
`tests/engine/test_sglang_api.py` names what changed.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from agentstate.errors import EngineError

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

from sglang.srt.arg_groups.choices import add_attention_backend_choices  # noqa: E402
from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view  # noqa: E402
from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook  # noqa: E402
from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST  # noqa: E402
from sglang.srt.entrypoints.warmup import warmup  # noqa: E402
from sglang.srt.managers.io_struct import GenerateReqInput  # noqa: E402
from sglang.srt.managers.schedule_batch import FINISH_ABORT  # noqa: E402
from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS  # noqa: E402
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator  # noqa: E402
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator  # noqa: E402
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams  # noqa: E402
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
from sglang.srt.mem_cache.unified_cache.unified_tree_core import UnifiedTreeCore  # noqa: E402
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache  # noqa: E402
from sglang.srt.mem_cache.utils import get_storage_hash_str  # noqa: E402
from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # noqa: E402
from sglang.srt.runtime_context import get_memory, get_model, get_observability, get_parallel, get_serving  # noqa: E402

__all__ = [
    "CLIP_MAX_NEW_TOKENS",
    "FAKE_BOOTSTRAP_HOST",
    "FINISH_ABORT",
    "SUPPORTED",
    "ComponentType",
    "EvictParams",
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
    "PoolName",
    "PoolTransfer",
    "RadixKey",
    "SWAKVPool",
    "TokenToKVPoolAllocator",
    "UnifiedCacheLinker",
    "UnifiedCacheLinkerWrapper",
    "UnifiedRadixCache",
    "UnifiedTreeCore",
    "add_attention_backend_choices",
    "check_version",
    "create_unified_radix_cache",
    "declare_resolution",
    "get_memory",
    "get_model",
    "get_observability",
    "get_parallel",
    "get_serving",
    "get_storage_hash_str",
    "register_radix_cache_backend",
    "register_resolution_hook",
    "release_kv_cache",
    "resolving_view",
    "warmup",
]
