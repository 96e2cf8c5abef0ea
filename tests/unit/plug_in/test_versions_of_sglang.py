"""What differs between versions of SGLang, on stand-ins that have the shape of each."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from agentstate.errors import EngineError
from engine_patch import contract, versions
from engine_patch.contract import Contract

ROOT = Path(__file__).parents[3]

NEEDED = Contract(
    called={"links:UnifiedRadixCache.evict_for_alloc": "self params allocation_reclaim_satisfied"},
    overridden={("linker:AgentStateLinker", "links:UnifiedCacheLinker"): {"offload": "self transfers session_id"}},
    attributes={
        "links:UnifiedCacheLinkerWrapper": "private_load_indices cache_linker",
        "links:TreePathNodeInfo": "node_id num_children",
    },
)


class Fakes:
    """Modules below `sglang.srt`."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self._patch = patch
        for name in ("sglang", "sglang.srt"):
            patch.setitem(sys.modules, name, ModuleType(name))

    def add(self, name: str, *symbols: type) -> None:
        module = ModuleType(f"sglang.srt.{name}")
        vars(module).update({symbol.__name__: symbol for symbol in symbols})
        self._patch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return Fakes(monkeypatch)


def of_0_5_21() -> list[type]:
    class UnifiedRadixCache:
        def evict_for_alloc(self, params: Any) -> None: ...

    class UnifiedCacheLinker:
        def offload(self, transfers: Any) -> None: ...

    class UnifiedCacheLinkerWrapper:
        def __init__(self, cache_linker: Any):
            self.cache_linker = cache_linker

    class TreePathNodeInfo:
        node_id: int

    return [UnifiedRadixCache, UnifiedCacheLinker, UnifiedCacheLinkerWrapper, TreePathNodeInfo]


def of_0_5_22() -> list[type]:
    class UnifiedCacheLinkerWrapper:
        def __init__(self, cache_linker: Any):
            self.cache_linker = cache_linker
            self.private_load_indices: dict[str, Any] = {}

    cache, linker, _, path = of_0_5_21()
    return [cache, linker, UnifiedCacheLinkerWrapper, path]


def of_0_5_23() -> list[type]:
    class UnifiedRadixCache:
        def evict_for_alloc(self, params: Any, *, allocation_reclaim_satisfied: Any = None) -> None: ...

    class UnifiedCacheLinker:
        def offload(self, transfers: Any, session_id: str | None = None) -> None: ...

        def record_offload_ready(self) -> list[Any]:
            return []

    class TreePathNodeInfo:
        node_id: int
        num_children: int

    return [UnifiedRadixCache, UnifiedCacheLinker, of_0_5_22()[2], TreePathNodeInfo]


@pytest.mark.parametrize("shape", [of_0_5_22, of_0_5_23], ids=lambda shape: shape.__name__)
def test_a_version_that_has_what_is_needed_lacks_nothing(fakes: Fakes, shape: Any) -> None:
    fakes.add("links", *shape())
    assert contract.missing(NEEDED) == []


def test_what_an_older_version_lacks_is_told_in_words(fakes: Fakes) -> None:
    fakes.add("links", *of_0_5_21())
    (lacks,) = contract.missing(NEEDED)
    assert lacks == (
        "pages that stay out of the radix tree until they are loaded (UnifiedCacheLinkerWrapper.private_load_indices)"
    )
    sentence = versions.refusal("0.5.21", [lacks])
    assert sentence.startswith(f"AgentState does not run with SGLang 0.5.21, which lacks: {lacks}. ")
    assert "\n" not in sentence


def test_what_a_newer_version_has_changed_is_named(fakes: Fakes) -> None:
    class UnifiedCacheLinker:
        def offload(self, pages: Any) -> None: ...

    class UnifiedRadixCache:
        def evict_for_alloc(self, params: Any, budget: int) -> None: ...

    fakes.add("links", UnifiedCacheLinker, UnifiedRadixCache, *of_0_5_23()[2:])
    assert contract.missing(NEEDED) == [
        "UnifiedRadixCache.evict_for_alloc as it was, now with the parameters self params budget",
        "UnifiedCacheLinker.offload as it was, now with the parameters self pages",
    ]


def test_what_a_newer_version_has_moved_is_named(fakes: Fakes) -> None:
    fakes.add("links", *of_0_5_23()[1:])
    fakes.add("elsewhere", of_0_5_23()[0])
    assert contract.missing(NEEDED) == ["UnifiedRadixCache.evict_for_alloc"]


def test_what_is_lacking_is_told_briefly() -> None:
    sentence = versions.refusal("9.9", [f"symbol {number}" for number in range(20)])
    assert "symbol 0; symbol 1; symbol 2; and 17 more. " in sentence


def test_attributes_are_found_wherever_a_class_says_that_it_has_them() -> None:
    class Parent:
        def __init__(self) -> None:
            def later() -> None:
                self.in_a_function = 1

            self.of_the_parent, self.read = 1, self.only_read  # type: ignore[attr-defined]
            later()

    class Child(Parent):
        annotated: int
        of_the_class = 1

        @property
        def computed(self) -> int:
            self.set_by_a_property = 1
            return 1

        @classmethod
        def make(cls) -> None:
            made = cls()
            made.set_by_a_class_method = 1  # type: ignore[attr-defined]

    there = "of_the_parent annotated of_the_class computed set_by_a_property set_by_a_class_method in_a_function read"
    assert [name for name in there.split() if not contract.has(Child, name)] == []
    assert not contract.has(Child, "only_read")


def test_versions_share_pages_only_where_their_kv_was_compared() -> None:
    assert {versions.layout(version, "LlamaForCausalLM") for version in versions.TESTED} == {versions.FIRST_LAYOUT}
    assert versions.layout(versions.PINNED, None) == versions.FIRST_LAYOUT
    assert versions.layout("0.5.22", "OtherForCausalLM") == versions.layout("0.5.22", None) == "0.5.22"
    assert versions.layout("0.5.24", "LlamaForCausalLM") == "0.5.24"


def test_versions_that_lay_kv_out_in_different_ways_have_different_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        versions, "LAYOUTS", {"1": {"a": None}, "2": {"a": frozenset({"Same"}), "b": None}, "3": {"b": None}}
    )
    assert [versions.layout(version, "Same") for version in "123"] == ["a", "a", "b"]
    assert [versions.layout(version, "Other") for version in "123"] == ["a", "b", "b"]


def test_only_an_untested_version_is_warned_of() -> None:
    assert [versions.warning(version) for version in versions.TESTED] == [None, None]
    warning = versions.warning("0.6.0")
    assert warning is not None
    assert "SGLang 0.6.0 is not tested" in warning
    assert "kept apart" in warning


def test_a_linker_has_the_events_that_its_base_class_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def record(self, stream: str) -> None:
            self.stream = stream

    device = SimpleNamespace(current_stream=lambda: "current", Event=Event)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(get_device_module=lambda: device))
    new = of_0_5_23()[1]
    assert versions.linker_base(new) is new
    linker = versions.linker_base(of_0_5_22()[1])()
    assert [event.stream for event in linker.record_offload_ready()] == ["current"]
    linker.forward_stream = "forward"
    assert [event.stream for event in linker.record_offload_ready()] == ["current", "forward"]


# What 0.5.22's function does that makes radix caches: it has no linker but its own.


def get_memory() -> Any:
    return SimpleNamespace(enable_unified_cache_external_linker=True, radix_cache_backend="agentstate")


def create(ctx: Any, *, cache_class: type) -> Any:
    memory = get_memory()
    assert memory.radix_cache_backend == "agentstate"
    if ctx.fails:
        raise RuntimeError("no room")
    cache = cache_class(ctx.params)
    if memory.enable_unified_cache_external_linker:
        raise ValueError("Unknown unified cache external linker backend")
    return cache


class Cache:
    """A tree of a node, 7, which has two children."""

    def __init__(self, params: Any):
        self.params = params
        self.components = ["full"]
        self.linker: Any = None
        nodes = {7: SimpleNamespace(children={"a": 1, "b": 2})}
        path = ((SimpleNamespace(node_id=7, path_end=64),),)
        self.tree_core = SimpleNamespace(collect_path_info=lambda ends: path, node_by_id=nodes.__getitem__)

    def init_cache_linker(self, linker: Any) -> None:
        self.linker = linker

    def insert(self, params: Any) -> Any:
        if params.fails:
            raise RuntimeError("no room")
        return self.linker.offload(params.transfers)


class Linker:
    layer_done_counter = "counter"

    def __init__(self, server_args: Any, params: Any, *, components: Any, extra_config: Any, forward_stream: Any):
        self.made_of = (server_args, params, components, extra_config, forward_stream)

    def offload(self, transfers: Any, session_id: str | None = None) -> Any:
        return transfers, session_id


@pytest.fixture
def registered() -> list[str]:
    return []


@pytest.fixture
def ctx(registered: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(versions, "installed", lambda: "0.5.22")
    kvcache = SimpleNamespace(register_layer_transfer_counter=lambda counter: registered.append(f"pool {counter}"))
    worker = SimpleNamespace(
        model_runner=SimpleNamespace(forward_stream="forward"),
        register_hicache_layer_transfer_counter=lambda counter: registered.append(f"worker {counter}"),
    )
    params = SimpleNamespace(token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: kvcache))
    yield SimpleNamespace(server_args="arguments", params=params, tp_worker=worker, is_hybrid_ssm=False, fails=False)
    assert get_memory().enable_unified_cache_external_linker


def test_a_linker_is_attached_where_sglang_constructs_none(ctx: Any, registered: list[str]) -> None:
    cache = versions.link(create, ctx, Cache, Linker)
    assert cache.linker.made_of == ("arguments", ctx.params, {"full"}, {}, "forward")
    assert registered == ["pool counter", "worker counter"]
    # The one of SGLang's two trees that tells how many children a node has.
    assert cache.params.tree_core_backend == "python"
    ((node,),) = cache.tree_core.collect_path_info([7])
    assert (node.node_id, node.path_end, node.num_children) == (7, 64, 2)
    # How much of a window the tree keeps is not known.
    assert not cache.params.swa_gates_prefix_match


def test_offers_have_the_session_of_their_insert(ctx: Any) -> None:
    cache = versions.link(create, ctx, Cache, Linker)
    insert = SimpleNamespace(session_id="s", transfers="pages", fails=False)
    assert cache.insert(insert) == ("pages", "s")
    assert cache.linker.offload("pages") == ("pages", None)
    assert cache.linker.offload("pages", session_id="t") == ("pages", "t")
    insert.fails = True
    with pytest.raises(RuntimeError, match="no room"):
        cache.insert(insert)
    assert cache.linker.offload("pages") == ("pages", None)


def test_sglang_has_its_own_settings_again_when_no_cache_could_be_made(ctx: Any) -> None:
    ctx.fails = True
    with pytest.raises(RuntimeError, match="no room"):
        versions.link(create, ctx, Cache, Linker)


def test_a_model_that_an_older_version_cannot_link_is_refused(ctx: Any) -> None:
    ctx.is_hybrid_ssm = True
    with pytest.raises(EngineError, match=r"SGLang 0\.5\.22 links no recurrent state: .* --radix-cache-backend"):
        versions.link(create, ctx, Cache, Linker)


def test_what_is_installed_with_agentstate_is_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    engine = project["project"]["optional-dependencies"]["engine"]
    assert f"sglang>={versions.TESTED[0]},<={versions.PINNED}" in engine
    assert f"sglang=={versions.PINNED}" in (ROOT / "locks" / "engine.txt").read_text().splitlines()
