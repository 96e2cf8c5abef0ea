from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine_patch import plugin
from engine_patch import sglang_api as sgl
from engine_patch.radix_cache import AgentStateRadixCache

GIVEN = {
    "radix_cache_backend": "agentstate",
    "disable_radix_cache": False,
    "enable_hierarchical_cache": False,
    "enable_lmcache": False,
    "enable_unified_cache_external_linker": False,
    "speculative_algorithm": None,
    "disaggregation_mode": "null",
    "enable_streaming_session": False,
    "pp_size": 1,
    "dp_size": 1,
    "dcp_size": 1,
    "attn_cp_size": 1,
    "enable_lora": False,
    "lora_paths": None,
    "warmups": None,
    "skip_server_warmup": False,
}


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What SGLang's arguments become, and whether its own step was taken, when these ones are given."""

    def resolve(**given: Any) -> tuple[dict[str, Any], bool]:
        declared: dict[str, Any] = {}
        stock: list[Any] = []
        monkeypatch.setattr(sgl, "resolving_view", lambda arguments: arguments)
        monkeypatch.setattr(sgl, "declare_resolution", lambda arguments, source, **fields: declared.update(fields))
        plugin._resolve_arguments(SimpleNamespace(**{**GIVEN, **given}), stock.append)
        return declared, bool(stock)

    return resolve


def test_one_flag_turns_everything_on(resolved: Any) -> None:
    declared, stock = resolved()
    assert stock
    assert declared["enable_unified_cache_external_linker"] is True
    assert declared["unified_cache_external_linker_config"]["linker"] == "AgentStateLinker"
    assert declared["warmups"] == "agentstate"
    assert resolved(warmups="their_own")[0]["warmups"] == "their_own,agentstate"
    assert resolved(skip_server_warmup=True)[0]["warmups"] is None


def test_without_the_flag_nothing_changes(resolved: Any) -> None:
    assert resolved(radix_cache_backend="default", enable_hierarchical_cache=True) == ({}, True)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"disable_radix_cache": True}, "--disable-radix-cache"),
        ({"enable_hierarchical_cache": True}, "--enable-hierarchical-cache"),
        ({"enable_lmcache": True}, "--enable-lmcache"),
        ({"enable_unified_cache_external_linker": True}, "--enable-unified-cache-external-linker"),
        ({"speculative_algorithm": "EAGLE"}, "--speculative-algorithm"),
        ({"disaggregation_mode": "prefill"}, "--disaggregation-mode"),
        ({"enable_streaming_session": True}, "--enable-streaming-session"),
        ({"pp_size": 2}, "--pp-size"),
        ({"dp_size": 2}, "--dp-size"),
        ({"dcp_size": 2}, "--dcp-size"),
        ({"attn_cp_size": 2}, "--attn-cp-size"),
        ({"enable_lora": True}, "--enable-lora"),
        ({"lora_paths": ["a"]}, "--enable-lora"),
        ({"pp_size": 2, "enable_lmcache": True}, "--enable-lmcache, --pp-size"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused_in_one_sentence(resolved: Any, given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"^--radix-cache-backend agentstate cannot be combined with {named}$"):
        resolved(**given)


def scheduler(**cache: Any) -> Any:
    tree = AgentStateRadixCache.__new__(AgentStateRadixCache)
    for name, value in cache.items():
        setattr(tree, name, value)
    return SimpleNamespace(tree_cache=tree)


@pytest.mark.parametrize(("busy", "quarantines"), [(True, False), (False, True), (False, False)])
def test_an_engine_does_not_count_its_memory_while_a_drive_writes_to_some_of_it(busy: bool, quarantines: bool) -> None:
    idle: list[Any] = []
    linker = SimpleNamespace(quarantines_pages=quarantines)
    engine = scheduler(device_tier=SimpleNamespace(busy=busy), agentstate=linker)
    healthy: list[str] = []
    engine.maybe_send_health_check_signal = lambda: healthy.append("it lives")
    plugin._while_idle(idle.append, engine)
    assert (idle, healthy) == (([], ["it lives"]) if busy or quarantines else ([engine], []))
    other = SimpleNamespace(tree_cache=object())
    plugin._while_idle(idle.append, other)
    assert idle[-1:] == [other]


def test_the_kv_pool_is_at_rest_before_its_memory_is_taken_away() -> None:
    log: list[str] = []
    engine = scheduler(agentstate=SimpleNamespace(drain=lambda: log.append("at rest")))
    plugin._before_memory_release(lambda updater, request: log.append(request), SimpleNamespace(scheduler=engine), "go")
    assert log == ["at rest", "go"]


def test_weights_that_are_updated_in_place_end_the_storing() -> None:
    reasons: list[str] = []
    engine = scheduler(agentstate=SimpleNamespace(retire=reasons.append))
    updater = SimpleNamespace(scheduler=engine)
    assert plugin._before_weight_update(lambda *given: given, updater, "disk") == (updater, "disk")
    assert len(reasons) == 1
    assert "weights were updated" in reasons[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the platform is the GPU's")
def test_the_cpu_platform_has_torch_align_the_kv_pool_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    assert plugin.platform() == "engine_patch.cpu.platform.CpuPlatform"
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    plugin.platform()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
