"""The benchmark's file linker is used as SGLang uses it: the same bytes come back, also in another process."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from agentstate.benchmarks.peers import file_linker
from agentstate.benchmarks.peers.file_linker import FileLinker
from agentstate.benchmarks.peers.hicache_on_cpu import transfer_kv_direct

LAYERS, PAGE_SIZE, PAGES = 3, 4, 6


def pool() -> MHATokenToKVPool:
    """A pool's tensors, of random numbers."""
    made = object.__new__(MHATokenToKVPool)
    made.k_buffer, made.v_buffer = (
        [torch.randn(PAGES * PAGE_SIZE, 2, 8, dtype=torch.bfloat16) for _ in range(LAYERS)] for _ in range(2)
    )
    return made


def linker(directory: Path, kv: Any, monkeypatch: pytest.MonkeyPatch) -> FileLinker:
    monkeypatch.setattr(file_linker, "get_parallel", lambda: SimpleNamespace(tp_rank=0))
    params = SimpleNamespace(page_size=PAGE_SIZE, token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: kv))
    return FileLinker(None, params, components=set(), extra_config={"directory": str(directory)})


def transfer(keys: list[str], pages: list[int]) -> list[PoolTransfer]:
    slots = torch.tensor([page * PAGE_SIZE + offset for page in pages for offset in range(PAGE_SIZE)])
    return [PoolTransfer(name=PoolName.KV, keys=keys, device_indices=slots)]


def stored(on: FileLinker, transfers: list[PoolTransfer]) -> bool:
    assert on.offload(transfers)
    deadline = time.monotonic() + 10
    while not on.num_completed_offloads():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return on.pop_completed_offload()


def loaded(on: FileLinker, transfers: list[PoolTransfer]) -> bool:
    assert on.load("r", transfers)
    return on.finish_layer_wise_loading(on.start_layer_wise_loading())


def test_pages_come_back_to_other_slots_of_another_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = pool(), pool()
    first = linker(tmp_path, source, monkeypatch)
    assert stored(first, transfer(["a", "b"], [1, 4]))
    assert first.lookup("r", transfer(["a", "b", "c"], [0, 0, 0])) == [1, 2]
    first.close()
    second = linker(tmp_path, target, monkeypatch)
    assert second.lookup("r", transfer(["a", "x", "b"], [0, 0, 0])) == [1]
    assert loaded(second, transfer(["b", "a"], [0, 5]))
    for mine, theirs in zip(target.k_buffer + target.v_buffer, source.k_buffer + source.v_buffer, strict=True):
        assert torch.equal(mine[:PAGE_SIZE], theirs[4 * PAGE_SIZE : 5 * PAGE_SIZE])
        assert torch.equal(mine[5 * PAGE_SIZE :], theirs[PAGE_SIZE : 2 * PAGE_SIZE])
    second.close()


def test_a_page_that_cannot_be_read_fails_its_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on = linker(tmp_path, pool(), monkeypatch)
    assert stored(on, transfer(["a"], [0]))
    next(tmp_path.rglob("a.pt")).write_bytes(b"torn")
    assert not loaded(on, transfer(["a"], [1]))
    on.close()


def test_a_cancelled_load_is_not_started_and_what_is_stored_survives_a_reset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = linker(tmp_path, pool(), monkeypatch)
    assert stored(on, transfer(["a"], [0]))
    assert on.load("r", transfer(["a"], [1]))
    assert on.cancel_queued_load("r")
    assert on.start_layer_wise_loading() == -1
    on.reset()
    assert on.lookup("r", transfer(["a"], [0])) == [1]
    on.close()


def test_another_pool_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="SimpleNamespace"):
        linker(tmp_path, SimpleNamespace(), monkeypatch)


def test_pages_are_copied_between_a_host_pool_and_a_device_of_a_cpu() -> None:
    source, target = torch.randn(16, 2, 8), torch.zeros(13, 2, 8)
    slots = [torch.tensor([page * 4 + offset for page in pages for offset in range(4)]) for pages in ((3, 0), (1, 2))]
    transfer_kv_direct([source], [target], *slots, page_size=4)
    assert torch.equal(target[4:8], source[12:16])
    assert torch.equal(target[8:12], source[0:4])
    assert not target[:4].any() and not target[12:].any()
