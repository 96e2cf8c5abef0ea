"""What the plug-in was written against: a failing test names the SGLang symbol that an upgrade has changed."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.layers.attention.mamba import causal_conv1d
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.managers import schedule_policy
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.schedule_policy import SchedulePolicy
from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod
from sglang.srt.sampling.sampling_params import SamplingParams

from engine_patch import contract, versions
from engine_patch import sglang_api as sgl
from engine_patch.cpu import convolution, speculation
from engine_patch.linker import AgentStateLinker

ROOT = Path(__file__).parents[2]

CONTRACTS = {"engine": contract.ENGINE, "cpu": contract.CPU}
CALLED = [(symbol, known) for part in CONTRACTS.values() for symbol, known in part.called.items()]
OVERRIDDEN = [
    (ours, stock, name, known)
    for part in CONTRACTS.values()
    for (ours, stock), methods in part.overridden.items()
    for name, known in methods.items()
]
ATTRIBUTES = [
    (symbol, name) for part in CONTRACTS.values() for symbol, names in part.attributes.items() for name in names.split()
]


def short(symbol: str) -> str:
    return symbol.partition(":")[2]


@pytest.mark.parametrize(("symbol", "known"), CALLED, ids=lambda part: part.replace(":", "."))
def test_what_is_called_takes_what_it_is_given(symbol: str, known: str) -> None:
    try:
        found = contract.parameters(contract.resolve(symbol))
    except AttributeError:
        assert short(symbol) in versions.SUPPLIED, f"there is no {symbol} any more"
        return
    accepted = contract.forms(short(symbol), known)
    assert any(contract.takes(found, form) for form in accepted), f"{symbol} has the parameters ({', '.join(found)})"


@pytest.mark.parametrize(("ours", "stock", "name", "known"), OVERRIDDEN)
def test_what_is_overridden_has_the_parameters_it_had(ours: str, stock: str, name: str, known: str) -> None:
    found = contract.parameters(contract.resolve(f"{stock}.{name}"))
    accepted = contract.forms(f"{short(stock)}.{name}", known)
    assert list(found) in [form.split() for form in accepted], f"{stock}.{name} has ({', '.join(found)})"
    module, _, cls = ours.partition(":")
    overriding = contract.parameters(getattr(getattr(importlib.import_module(f"engine_patch.{module}"), cls), name))
    further = [one for one, parameter in overriding.items() if parameter.kind is parameter.VAR_KEYWORD]
    for parameter in found:
        if parameter in overriding:
            assert overriding[parameter].kind == found[parameter].kind
        else:
            assert further and found[parameter].kind is inspect.Parameter.KEYWORD_ONLY, parameter
    required = {one for one, parameter in overriding.items() if parameter.default is parameter.empty} - {*further}
    assert required <= set(found)


@pytest.mark.parametrize(("ours", "stock"), sorted({(ours, stock) for ours, stock, _, _ in OVERRIDDEN}))
def test_an_engine_looks_for_all_that_is_overridden(ours: str, stock: str) -> None:
    module, _, cls = ours.partition(":")
    members = vars(getattr(importlib.import_module(f"engine_patch.{module}"), cls))
    stocks = {name for name in dir(contract.resolve(stock)) if name not in dir(object)}
    overriding = {name for name, member in members.items() if inspect.isfunction(member)} & stocks
    assert overriding == {name for one, _, name, _ in OVERRIDDEN if one == ours} - {"__init__"}


@pytest.mark.parametrize(("owner", "name"), ATTRIBUTES)
def test_the_attributes_that_are_used_exist(owner: str, name: str) -> None:
    there = contract.has(contract.resolve(owner), name)
    assert there or f"{short(owner)}.{name}" in versions.SUPPLIED, f"{owner} has no {name} any more"


def test_an_engine_finds_all_that_it_looks_for() -> None:
    assert contract.missing(contract.ENGINE) == contract.missing(contract.CPU) == []


def test_the_linker_implements_all_of_the_contract() -> None:
    abstract = set(sgl.UnifiedCacheLinker.__abstractmethods__)
    assert abstract == {name for ours, _, name, _ in OVERRIDDEN if ours == "linker:AgentStateLinker"}
    missing = {name for name in abstract if getattr(AgentStateLinker, name) is getattr(sgl.UnifiedCacheLinker, name)}
    assert not missing
    assert not AgentStateLinker.__abstractmethods__


def test_the_linker_takes_what_sglang_constructs_linkers_with() -> None:
    if sgl.constructs_linkers():
        known = "Linker(server_args, params, components=..., extra_config=..., forward_stream=...)"
        assert known in (sgl.UnifiedCacheLinker.__doc__ or "")
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
    assert sgl.PoolName.DRAFT.value == "draft"
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


@pytest.mark.parametrize("module", speculation.KERNELS)
def test_the_kernels_around_drafts_are_called_with_what_ours_take(module: str) -> None:
    # Some of them are imported only where a kernel of another build is replaced.
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).read_text()
    assert re.search(r"^_is_cpu = is_cpu\(\)", source, re.MULTILINE)
    for kernel, ours in speculation.KERNELS[module].items():
        calls = [
            node
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == kernel
        ]
        assert calls, f"{module} calls no {kernel} any more"
        for call in calls:
            given = [object()] * len(call.args)
            inspect.signature(ours).bind(*given, **{keyword.arg: None for keyword in call.keywords if keyword.arg})


def test_a_draft_is_given_our_attention() -> None:
    factory = importlib.import_module("sglang.srt.speculative.draft_utils").DraftBackendFactory
    assert {"draft_model_runner", "speculative_num_steps", "stamps_children", "_create_backend"} <= set(
        re.findall(r"\w+", inspect.getsource(factory))
    )


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


def test_an_engine_looks_for_what_is_hooked_into() -> None:
    """SGLang only logs that a hook's target is missing, and goes on without it."""
    targets = set(hooked())
    assert len(targets) >= 2
    assert targets <= {f"sglang.srt.{symbol.replace(':', '.')}" for symbol, _ in CALLED}


def test_the_resolution_steps_may_be_overridden() -> None:
    hooks = importlib.import_module("sglang.srt.arg_groups.resolution_hooks")
    steps = re.findall(r'register_resolution_hook\("(\w+)"\)', (ROOT / "engine_patch" / "plugin.py").read_text())
    assert len(steps) == 5
    assert set(steps) <= set(hooks._OVERRIDABLE_HOOKS)


def test_every_symbol_of_the_api_module_is_there_and_listed() -> None:
    tree = ast.parse(inspect.getsource(sgl))
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang")
        for alias in node.names
    }
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    # The base class of linkers has what an older SGLang lacks of it.
    assert {name.lstrip("_") for name in imported} | defined == set(sgl.__all__)
    assert all(hasattr(sgl, name) for name in sgl.__all__)


def test_every_symbol_of_the_api_module_is_known_by_how_it_is_used() -> None:
    symbols = (
        [symbol for symbol, _ in CALLED] + [stock for _, stock, _, _ in OVERRIDDEN] + [one for one, _ in ATTRIBUTES]
    )
    known = {short(symbol).split(".")[0].lstrip("_") for symbol in symbols}
    ours = {name for name in sgl.__all__ if getattr(getattr(sgl, name), "__module__", "") == sgl.__name__}
    tested_apart = ours | {"ComponentType", "HookType", "PoolName", "add_attention_backend_choices"}
    tested_apart |= {"FAKE_BOOTSTRAP_HOST", "CLIP_MAX_NEW_TOKENS", "AddReqResult", "CacheAgnosticPolicy"}
    # In test_kv_events, beside SGLang's own events of the same pages.
    tested_apart |= {"AllBlocksCleared", "BlockRemoved", "BlockStored", "KVCacheEventRecorder", "StorageMedium"}
    unknown = set(sgl.__all__) - known - tested_apart
    assert not unknown, f"nothing here fails when these change: {sorted(unknown)}"
