"""Whether the linker restores: with real stores and loads, and with times that are told instead of taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from contents import key, keys, write
from device import PAGE_SIZE, fill, kv_tensors

from agentstate.pages import PageStore, fingerprint
from agentstate.settings import Settings
from engine_patch.break_even import BreakEven
from engine_patch.linker import AgentStateLinker
from engine_patch.pools import DevicePool
from engine_patch.sglang_api import PoolName, PoolTransfer
from engine_patch.stored_pools import StoredPools

STEP_S, TOKEN_S = 0.01, 0.0001
LONG = 15


@pytest.fixture
def linker(tmp_path: Path) -> Iterator[AgentStateLinker]:
    """Of a rank that has the pages of a chain of 15."""
    tensors = kv_tensors()
    fill(tensors)
    pool = DevicePool(PoolName.KV, tensors, PAGE_SIZE, (0, 1, 2), ("float32",))
    settings = Settings(staging_bytes=1 << 20, spill_staging_bytes=1 << 20, read_threads=1)
    linker = AgentStateLinker.__new__(AgentStateLinker)
    linker._pools = StoredPools(
        [pool], lambda pool: PageStore(tmp_path, fingerprint(pool=pool.name), pool.device_pages.geometry), settings
    )
    rank: Any = SimpleNamespace(off=None, break_even=BreakEven(), metrics=None, settings=settings)
    linker._rank, linker._cached, linker.page_size = rank, 0, PAGE_SIZE
    write(linker._pools._pools[0].store, keys(*range(LONG)))
    yield linker
    linker._pools.finish_spilling(60)
    linker._pools.close()


def transfer(pages: int, first_slot: int = 0) -> PoolTransfer:
    slots = torch.arange(first_slot * PAGE_SIZE, (first_slot + pages) * PAGE_SIZE)
    return PoolTransfer(name=PoolName.KV, keys=[key(page).hex() for page in range(pages)], device_indices=slots)


def lookup(linker: AgentStateLinker, rid: str, pages: int) -> list[int]:
    """What one rank, alone, restores."""
    linker.matching(0)
    lengths = linker.lookup(rid, [transfer(pages)])
    return [] if lengths and linker.computes(rid, lengths[-1], linker.word) else lengths


def teach(linker: AgentStateLinker, fixed_s: float) -> None:
    """Forty prefills, and forty restores that their forwards wait ``fixed_s`` for."""
    for number in range(40):
        new = 10 + 37 * number
        linker.stepped([(64 * (number % 5), new)], STEP_S + TOKEN_S * new, None)
    for number in range(40):
        assert linker.load(f"r{number}", [transfer(1 + number % LONG, first_slot=1)])
        failed, restored, *_ = linker.finish(linker.start_layer_wise_loading())
        assert not failed and restored is not None
        waited_s = fixed_s * (1 + 1e-6 * restored.n_bytes)
        plain_s = STEP_S + TOKEN_S * 8
        linker.stepped([(256, 8)], plain_s + waited_s, dataclasses.replace(restored, waited_s=waited_s))


def test_what_is_faster_to_compute_is_not_found(linker: AgentStateLinker) -> None:
    assert lookup(linker, "a", 1) == [1]
    teach(linker, fixed_s=0.003)
    # A page is 4 tokens, 0.4 ms; fifteen are 6 ms.
    assert lookup(linker, "b", 1) == []
    assert lookup(linker, "c", LONG) == list(range(1, LONG + 1))
    assert linker._rank.break_even.stats.computed == 1
    # It is remembered while the request waits.
    assert lookup(linker, "b", 1) == []
    assert (linker._rank.break_even.stats.computed, linker._rank.break_even.kept) == (1, 3)
    linker.tidy(lambda: {"c"})
    assert linker._rank.break_even.kept == 1
    linker.tidy(set)
    assert linker._rank.break_even.kept == 0


def test_what_is_faster_to_restore_is_restored(linker: AgentStateLinker) -> None:
    teach(linker, fixed_s=0.0002)
    assert lookup(linker, "a", 1) == [1]
    assert linker._rank.break_even.stats.computed == 0


def test_what_is_in_host_memory_already_is_restored(linker: AgentStateLinker) -> None:
    teach(linker, fixed_s=0.003)
    linker.read_ahead("b", [key(0)])
    assert lookup(linker, "b", 1) == [1]


def test_it_can_be_turned_off(linker: AgentStateLinker) -> None:
    teach(linker, fixed_s=0.003)
    linker._rank.settings = Settings(break_even=False)
    assert lookup(linker, "a", 1) == [1]


def test_a_prefetch_to_the_device_and_a_load_from_host_memory_teach_nothing(linker: AgentStateLinker) -> None:
    teach(linker, fixed_s=0.0002)
    for number in range(100):
        linker.read_ahead(f"h{number}", [key(0)])
        assert linker.load(f"h{number}", [transfer(1, first_slot=1)])
        restored = linker.finish(linker.start_layer_wise_loading()).restored
        assert restored is not None
        linker.stepped([(256, 8)], 9.0, dataclasses.replace(restored, waited_s=9.0))
    assert lookup(linker, "a", 1) == [1]
