"""What differs between the versions of SGLang: which ones are tested, what an older one lacks and is supplied here, and
which of them lay KV out alike.

Nothing here asks for a version's number to find out what it can do. `contract` looks for what the plug-in needs, and
this module supplies what can be supplied. The number decides whether the start warns, and whose pages an engine shares.
Nothing here imports SGLang: what needs it is given its symbols.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from agentstate.errors import EngineError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

TESTED = ("0.5.22", "0.5.23")
"""The versions with which the tests are run, the newest last."""

PINNED = TESTED[-1]
"""The version in `locks/engine.txt`."""

FIRST_LAYOUT = "0.5.23"
"""The name of the only layout so far. It is a version of SGLang because that is what fingerprints had before there were
layouts: what was stored then is found."""

LAYOUTS: Mapping[str, Mapping[str, frozenset[str] | None]] = {
    "0.5.22": {FIRST_LAYOUT: frozenset({"DeepseekV2ForCausalLM", "LlamaForCausalLM"})},
    "0.5.23": {FIRST_LAYOUT: None},
}
"""Of each tested version: the layouts it has, each with the architectures whose KV was compared with what the layout's
own version computes; None is every architecture. `tests/engine/test_layout.py` proves how the pools are laid out, and
`make canary` that pages are restored across versions with equal tokens."""

FORMS: Mapping[str, tuple[str, ...]] = {
    "UnifiedCacheLinker.offload": ("self transfers",),
    "UnifiedRadixCache._evict": ("self params available_size_targets",),
    "UnifiedRadixCache.evict_for_alloc": ("self params",),
    "OpenAIServingResponses._response_tools_to_chat_tools": ("request",),
    "OpenAIServingResponses.responses_stream_generator_non_harmony": ("{} * require_reasoning",),
    "OpenAIServingResponses._responses_stream_generator_non_harmony": ("{} * require_reasoning",),
}
"""The parameters that an older version's symbols have, where the plug-in takes them as well as those in `contract`.
"{}" stands for those that both begin with."""

SUPPLIED = frozenset(
    {
        "UnifiedCacheLinker.record_offload_ready",
        "UnifiedCacheLinker.forward_stream",
        "UnifiedCacheLinker.pools",
        "ModelRunner.load_model",
        "TreePathNodeInfo.num_children",
        "CacheInitParams.swa_gates_prefix_match",
        "CacheInitParams.swa_retain_window",
        "CacheInitParams.sidecar_draft_device_pools",
        "SWATokenToKVPoolAllocator.full_available_size",
        "SWATokenToKVPoolAllocator.swa_available_size",
        "SWATokenToKVPoolAllocator.set_full_to_swa_mapping",
        "UnifiedRadixCache.full_evictable_size",
        "UnifiedRadixCache.swa_evictable_size",
        "UnifiedRadixCache.claim_kv_row",
        "InsertParams.set_evicted_seqlen",
        "ServerArgs.unified_cache_external_linker_config",
    }
)
"""What may be missing, because `link` and `linker_base` do without it or supply it, or because what it is for does
without: ranks that hold the same pages, draft models that are not of the checkpoint, and sliding windows, which are not
stored where SGLang does not say how much of them it keeps."""


def installed() -> str:
    """The version of SGLang. Raises EngineError where there is none."""
    try:
        return version("sglang")
    except PackageNotFoundError:
        raise EngineError("SGLang is not installed here: pip install 'agentstate[engine]'") from None


def layout(of: str, architecture: str | None) -> str:
    """The layout of the pages that the version ``of`` computes for a model of this architecture, None if unknown:
    what the fingerprint has. A version, or a model, that nobody has compared has a layout of its own."""
    for name, architectures in LAYOUTS.get(of, {}).items():
        if architectures is None or architecture in architectures:
            return name
    return of


def refusal(found: str, missing: Sequence[str]) -> str:
    """The sentence that an engine ends with, given what its version lacks."""
    named = "; ".join(missing[:3]) + (f"; and {len(missing) - 3} more" if len(missing) > 3 else "")
    return (
        f"AgentState does not run with SGLang {found}, which lacks: {named}. "
        f"It is tested with {' and '.join(TESTED)}: pip install sglang=={PINNED}"
    )


def warning(found: str) -> str | None:
    """What the start logs of a version that has all that is needed; None of one that is tested."""
    if found in TESTED:
        return None
    return (
        f"SGLang {found} is not tested with AgentState, which is tested with {' and '.join(TESTED)}. It has all that "
        "AgentState looks for. Its pages are kept apart from those of other versions"
    )


# What 0.5.22 lacks. Since 0.5.23 SGLang constructs a linker of any class and tells it whose pages it is offered.


def linker_base(stock: type) -> type:
    """SGLang's base class of linkers, with the events that offloads wait for."""
    if hasattr(stock, "record_offload_ready"):
        return stock

    class Linker(stock):  # type: ignore[misc,valid-type]
        forward_stream: Any = None

        def record_offload_ready(self) -> list[torch.Event]:
            """Events after which the current stream and the forward's have written their device pages."""
            import torch

            device = torch.get_device_module()
            streams = [device.current_stream(), *([] if self.forward_stream is None else [self.forward_stream])]
            events = [device.Event() for _ in streams]
            for event, stream in zip(events, streams, strict=True):
                event.record(stream)
            return events

    return Linker


def constructs_linkers(fields: Mapping[str, Any]) -> bool:
    """Whether SGLang, whose `ServerArgs` has these ``fields``, constructs a linker by its class's name."""
    return "unified_cache_external_linker_config" in fields


def link(create: Callable[..., Any], ctx: Any, cache_class: type, linker_class: type) -> Any:
    """What ``create``, SGLang's `create_unified_radix_cache`, makes of ``ctx`` where it does not construct linkers by
    their name: a radix cache with ours. Raises EngineError for a model whose pages such a version cannot link."""
    if ctx.is_hybrid_ssm:
        raise EngineError(
            f"SGLang {installed()} links no recurrent state: pip install sglang=={PINNED}, or start without "
            "--radix-cache-backend agentstate"
        )
    logger.info(
        "agentstate: SGLang %s: the radix tree is the one in Python; sliding windows are not stored", installed()
    )
    params = ctx.params
    # It does not say how much of a window the tree keeps: such a model is served, and nothing of it is stored.
    params.swa_gates_prefix_match, params.swa_retain_window = False, None
    # The tree in Rust does not tell how many children a node has.
    params.tree_core_backend = "python"
    with _no_linker_of_its_own(create):
        cache = create(ctx, cache_class=cache_class)
    _count_children(cache.tree_core)
    linker = linker_class(
        ctx.server_args,
        params,
        components=set(cache.components),
        extra_config={},
        forward_stream=ctx.tp_worker.model_runner.forward_stream,
    )
    _tell_sessions(cache, linker)
    cache.init_cache_linker(linker)
    counter = linker.layer_done_counter
    params.token_to_kv_pool_allocator.get_kvcache().register_layer_transfer_counter(counter)
    ctx.tp_worker.register_hicache_layer_transfer_counter(counter)
    return cache


@contextlib.contextmanager
def _no_linker_of_its_own(create: Callable[..., Any]) -> Iterator[None]:
    """``create`` asks its module's `get_memory` whether to construct a linker, and knows no other than its own."""
    names = create.__globals__
    get_memory = names["get_memory"]
    names["get_memory"] = lambda: _With(get_memory(), enable_unified_cache_external_linker=False)
    try:
        yield
    finally:
        names["get_memory"] = get_memory


class _With(SimpleNamespace):
    """An object with some of its attributes replaced."""

    def __init__(self, of: Any, **replaced: Any):
        super().__init__(**replaced)
        self._of = of

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)


def _count_children(core: Any) -> None:
    """Let ``core`` tell of every node on a path how many children it has."""
    collect = core.collect_path_info

    def counted(end_node_ids: Sequence[int]) -> tuple[tuple[Any, ...], ...]:
        return tuple(
            tuple(_With(node, num_children=len(core.node_by_id(node.node_id).children)) for node in path)
            for path in collect(end_node_ids)
        )

    core.collect_path_info = counted


def _tell_sessions(cache: Any, linker: Any) -> None:
    """Let ``linker`` be told whose insert offers pages."""
    insert, offload = cache.insert, linker.offload
    cache.insert_session_id = None

    def inserting(params: Any) -> Any:
        cache.insert_session_id = params.session_id
        try:
            return insert(params)
        finally:
            cache.insert_session_id = None

    def offered(transfers: Any, session_id: str | None = None) -> Any:
        return offload(transfers, session_id or cache.insert_session_id)

    cache.insert, linker.offload = inserting, offered
