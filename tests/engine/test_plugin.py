from __future__ import annotations

import dataclasses
import inspect
import os
import re
import sys
import traceback
from array import array
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from sglang.srt.arg_groups import pipeline
from sglang.srt.managers.scheduler_components import batch_result_processor
from sglang.srt.managers.scheduler_components.batch_result_processor import SchedulerBatchResultProcessor

from agentstate.errors import PageStoreLocked
from engine_patch import contract, plugin, resolution, versions
from engine_patch import sglang_api as sgl
from engine_patch.radix_cache import AgentStateRadixCache


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the plug-in gives SGLang: its ``steps`` of the resolution, and what it puts around ``methods``."""
    found = SimpleNamespace(steps={}, methods={})

    def register(target: str, hook: Callable[..., Any], kind: Any) -> None:
        assert kind is sgl.HookType.AROUND
        assert target not in found.methods
        found.methods[target] = hook

    monkeypatch.setattr(sgl, "HookRegistry", SimpleNamespace(register=register))
    monkeypatch.setattr(sgl, "register_resolution_hook", lambda name: lambda hook: found.steps.setdefault(name, hook))
    monkeypatch.setattr(sgl, "register_radix_cache_backend", lambda name, create: None)
    monkeypatch.setattr(sgl, "warmup", lambda name: lambda function: function)
    monkeypatch.setattr(sgl, "add_attention_backend_choices", lambda names: None)
    plugin.register()
    return found


def functions(module: ModuleType, *first: str) -> list[Any]:
    """Those of a module whose first parameters have these names."""
    return [
        function
        for function in vars(module).values()
        if inspect.isfunction(function)
        and function.__module__ == module.__name__
        and tuple(inspect.signature(function).parameters)[: len(first)] == first
    ]


def test_everything_that_is_written_around_sglang_is_registered_once(registered: Any) -> None:
    """Without one of these an engine starts all the same."""
    assert sorted(registered.methods.values(), key=repr) == sorted(functions(plugin, "original"), key=repr)
    steps = functions(resolution, "server_args", "previous")
    assert sorted(registered.steps.values(), key=repr) == sorted(steps, key=repr)


def test_flags_are_judged_before_and_after_sglang_has_resolved_them(registered: Any) -> None:
    source = inspect.getsource(pipeline.run_resolution_pipeline)
    steps = re.findall(r"run_hook\((\w+), server_args\)", source)
    named = {hook.__name__: name for name, hook in registered.steps.items()}
    assert steps[0] == named["judge_flags"]
    assert steps[-1] == named["conclude"]
    assert steps.index(named["choose_page_size"]) < steps.index(named["complete"])
    default = rf"run_hook\({named['choose_page_size']}, server_args\)\s+\w+\(server_args, _page_size_default\)"
    assert re.search(default, source), "SGLang's own default must come right after it"


@pytest.mark.parametrize("given", [["--radix-cache-backend", "agentstate"], ["--radix-cache-backend=agentstate"], []])
def test_an_sglang_that_it_cannot_be_registered_with_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, given: list[str]
) -> None:
    def register(name: str) -> None:
        raise ValueError(f"{name!r} is not an overridable resolution hook: " + 99 * "there is another one\n")

    monkeypatch.setattr(sgl, "register_resolution_hook", register)
    monkeypatch.setattr(versions, "installed", lambda: "9.9.9")
    monkeypatch.setattr(sys, "argv", ["launch_server", *given])
    if given:
        with pytest.raises(SystemExit) as ended:
            plugin.register()
        said = str(ended.value)
    else:
        # SGLang was not asked to use it.
        plugin.register()
        (said,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "does not run with SGLang 9.9.9, which lacks: 'handle_deprecated_dp_attention' is not" in said
    assert "\n" not in said
    assert len(said) < 400
    if given:
        monkeypatch.setattr(contract, "missing", lambda part: ["something"])
        with pytest.raises(SystemExit, match="which lacks: something. "):
            plugin.register()


def test_an_engine_that_cannot_start_says_why_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[Exception] = [RuntimeError("of this test"), PageStoreLocked("another engine writes there")]

    def create(ctx: Any, cache_class: type) -> None:
        raise raised.pop()

    def logged() -> str:
        try:
            plugin._create_cache(None)
        except Exception:
            return str(plugin._around_traceback(traceback.format_exc))
        raise AssertionError

    monkeypatch.setattr(sgl, "get_memory", lambda: SimpleNamespace(enable_unified_cache_external_linker=True))
    monkeypatch.setattr(sgl, "create_unified_radix_cache", create)
    assert logged() == "AgentState: another engine writes there"
    assert logged().startswith("Traceback")


def scheduler(**cache: Any) -> Any:
    tree = AgentStateRadixCache.__new__(AgentStateRadixCache)
    for name, value in cache.items():
        setattr(tree, name, value)
    return SimpleNamespace(tree_cache=tree)


@pytest.mark.parametrize(("busy", "quarantines"), [(True, False), (False, True), (False, False)])
def test_an_engine_does_not_count_its_memory_while_a_drive_writes_to_some_of_it(busy: bool, quarantines: bool) -> None:
    idle: list[Any] = []
    linker = SimpleNamespace(quarantines_pages=quarantines)
    engine = scheduler(preloads=["one"] if busy else [], agentstate=linker)
    healthy: list[str] = []
    engine.maybe_send_health_check_signal = lambda: healthy.append("it lives")
    plugin._while_idle(idle.append, engine)
    assert (idle, healthy) == (([], ["it lives"]) if busy or quarantines else ([engine], []))
    other = SimpleNamespace(tree_cache=object())
    plugin._while_idle(idle.append, other)
    assert idle[-1:] == [other]


def marked(**fields: Any) -> Any:
    state = {"rid": "r", "discard_output_reason": None, "is_retracted": False, "over": False, **fields}
    return SimpleNamespace(**state, finished=lambda: state["over"])


@pytest.mark.parametrize("passed_over", [{}, {"is_retracted": True}, {"over": True}], ids=str)
def test_an_engine_ends_before_it_sends_what_is_to_be_discarded_while_decoding(passed_over: dict[str, Any]) -> None:
    processor = scheduler()
    done: list[Any] = []
    batch = SimpleNamespace(reqs=[marked(), marked(rid="bad", discard_output_reason="not restored", **passed_over)])
    if passed_over:
        plugin._before_decode_result(lambda *given: done.append(given), processor, batch, "tokens")
        assert done == [(processor, batch, "tokens")]
    else:
        with pytest.raises(RuntimeError, match="request bad would be sent"):
            plugin._before_decode_result(lambda *given: done.append(given), processor, batch, "tokens")
        assert done == []
    other = SimpleNamespace(tree_cache=object())
    plugin._before_decode_result(lambda *given: done.append(given), other, batch, "theirs")
    assert done[-1] == (other, batch, "theirs")


@dataclasses.dataclass(frozen=True)
class Processor:
    tree_cache: Any
    enable_overlap: bool


@pytest.mark.parametrize("overlaps", [False, True])
def test_what_is_recomputed_while_it_decodes_is_passed_over(overlaps: bool) -> None:
    """SGLang does so only if it believes that schedules overlap."""
    withheld = marked(rid="late", discard_output_reason="not restored", over=True, is_retracted=True)
    cache = scheduler(trailing=SimpleNamespace(ended=[withheld]), _recomputing=[]).tree_cache
    processor, done = Processor(cache, overlaps), []
    for reqs in ([marked(), withheld], [marked()]):
        batch = SimpleNamespace(reqs=reqs)
        plugin._before_decode_result(lambda given, *_: done.append(given), processor, batch, "tokens")
    assert [given.enable_overlap for given in done] == [True, overlaps]
    assert all(given.tree_cache is cache for given in done) and done[1] is processor


@pytest.mark.parametrize("overlaps", [False, True])
def test_sglang_passes_over_such_a_result_and_takes_the_others(overlaps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_result_processor, "get_observability", lambda: SimpleNamespace(enable_metrics=False))
    for after in ("_handle_finish_state_updated_req", "_maybe_update_reasoning_tokens"):
        monkeypatch.setattr(SchedulerBatchResultProcessor, after, lambda *_: None)
    withheld = marked(rid="late", discard_output_reason="not restored", over=True, is_retracted=True)
    cache = scheduler(trailing=SimpleNamespace(ended=[withheld]), _recomputing=[]).tree_cache
    fields = {field.name: MagicMock() for field in dataclasses.fields(SchedulerBatchResultProcessor)}
    fields |= {"tree_cache": cache, "enable_overlap": overlaps, "enable_overlap_mlx": False}
    processor = SchedulerBatchResultProcessor(**fields)
    other = MagicMock(output_ids=array("q", [5]), discard_output_reason=None, beam_group=None, grammar=None)
    other.finished.return_value = other.is_retracted = other.return_sampling_mask = False
    other.return_logprob = other.return_hidden_states = False
    withheld.output_ids, withheld.beam_group = array("q", [3, 4]), None
    batch, result = MagicMock(reqs=[withheld, other], return_logprob=False), MagicMock(next_token_ids=[7, 8])
    batch.spec_algorithm.is_none.return_value = True
    result.logits_output.sampling_mask_output = None
    result.copy_done = result.auxiliary_host_output = result.routed_experts_output = result.indexer_topk_output = None
    plugin._before_decode_result(SchedulerBatchResultProcessor.process_batch_result_decode, processor, batch, result)
    assert (list(withheld.output_ids), list(other.output_ids)) == ([3, 4], [5, 8])
    assert other.update_finish_state.called and processor.output_streamer.stream_output.called


@pytest.mark.skipif(torch.cuda.is_available(), reason="the platform is the GPU's")
def test_the_cpu_platform_has_torch_align_the_kv_pool_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    assert plugin.platform() == "engine_patch.cpu.platform.CpuPlatform"
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    plugin.platform()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the platform is the GPU's")
def test_sglang_keeps_its_own_platform_where_ours_does_not_go_with_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "engine_patch.cpu.platform", None)
    assert plugin.platform() is None
    assert "no CPU platform for SGLang" in caplog.text


@pytest.mark.parametrize("backend", ["agentstate", None])
def test_an_embedding_waits_for_the_pages_of_its_batch(monkeypatch: pytest.MonkeyPatch, backend: str | None) -> None:
    said: list[Any] = []
    monkeypatch.setattr(sgl, "get_memory", lambda: SimpleNamespace(radix_cache_backend=backend))
    worker, batch = SimpleNamespace(set_hicache_consumer=said.append), SimpleNamespace(hicache_consumer_index=3)

    def forward(worker: Any, batch: Any) -> str:
        said.append("forward")
        return "embeddings"

    assert plugin._around_embedding(forward, worker, batch) == "embeddings"
    assert said == ([3, "forward"] if backend else ["forward"])
