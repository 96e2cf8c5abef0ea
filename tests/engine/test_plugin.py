from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine_patch import plugin
from engine_patch.radix_cache import AgentStateRadixCache


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="the platform is the GPU's")
def test_the_cpu_platform_has_torch_align_the_kv_pool_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    assert plugin.platform() == "engine_patch.cpu.platform.CpuPlatform"
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    plugin.platform()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
