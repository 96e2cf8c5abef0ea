"""Pages from one set of CUDA tensors through pinned host memory into another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from contents import MARK, keys
from gpu import BACKENDS, DEVICE, DTYPES, GEOMETRIES, kv_tensors, page_of, torch

from agentstate.pages import LayerwiseReader, PageStore
from engine_patch.feeds import Source
from engine_patch.host_tier import HostPool, HostTier
from engine_patch.restore import Restorer
from engine_patch.spill import Spiller
from engine_patch.staging import read_backend
from engine_patch.transfer import DevicePages

PAGES = 24


class Stage:
    """Pages 0 to 15 of ``source`` are stored under their numbers' keys; they are demoted from there, and restored to
    ``target``."""

    def __init__(self, directory: Path, backend: str, geometry: str, dtype: torch.dtype):
        self.size = GEOMETRIES[geometry][1]
        self.source, self.target = kv_tensors(geometry, dtype, PAGES, seed=2), kv_tensors(geometry, dtype, PAGES)
        source, target = DevicePages(self.source, self.size), DevicePages(self.target, self.size)
        self.store = PageStore(directory, MARK, source.geometry)
        spiller = Spiller(self.store, source, 4 << 20)
        self.written = torch.cuda.Event()
        self.written.record()
        spiller.offer(keys(*range(16)), torch.arange(16), [self.written])
        spiller.close()
        reads = read_backend(backend, DEVICE)
        reader = LayerwiseReader(
            source.geometry, staging_bytes=4 << 20, threads=3, chunk_bytes=256 << 10, backend=reads
        )
        self.tier = HostTier(64 << 20, DEVICE)
        self.host = HostPool(self.tier, self.store, source, reader, reads.on_host)
        self.restorer = Restorer(self.store, target, reader, host=self.host)

    def restore(self, names: list[int], numbers: list[int]) -> set[Source]:
        self.restorer.queue("r", keys(*names), torch.tensor(numbers))
        before = torch.cuda.Event()
        before.record()
        found = self.restorer.finish(self.restorer.start([before]))
        assert found.failed == set() and found.restored is not None
        for name, number in zip(names, numbers, strict=True):
            assert page_of(self.target, self.size, number) == page_of(self.source, self.size, name)
        return set(found.restored.sources)

    def close(self) -> None:
        self.tier.end()
        self.restorer.close()
        self.tier.close()
        self.store.close()


@pytest.fixture
def open_stage(tmp_path: Path) -> Iterator[Callable[..., Stage]]:
    stages: list[Stage] = []

    def make(backend: str, geometry: str, dtype: torch.dtype) -> Stage:
        stages.append(Stage(tmp_path, backend, geometry, dtype))
        return stages[-1]

    yield make
    for stage in stages:
        stage.close()


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_was_demoted_is_restored_bit_for_bit(
    open_stage: Callable[..., Stage], dtype: torch.dtype, geometry: str
) -> None:
    stage = open_stage("posix", geometry, dtype)
    for names in ([0, 1, 2, 3, 4], [9, 7, 5], [6, 8]):
        stage.host.demote(keys(*names), torch.tensor(names), [stage.written])
    stage.tier.drain()
    assert list(stage.host.results) == [True] * 3
    assert stage.restore([*range(10)], [20, 21, 22, 23, 1, 0, 2, 8, 9, 10]) == {Source.HOST}
    assert stage.restore([8, 9, 10, 11], [4, 5, 6, 7]) == {Source.HOST, Source.COLD}


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_was_fetched_is_restored_bit_for_bit(open_stage: Callable[..., Stage], backend: str) -> None:
    stage = open_stage(backend, "gqa", torch.bfloat16)
    progress = stage.host.fetch("s", keys(*range(12)))
    stage.tier.drain()
    assert progress() == 1
    assert stage.restore([*range(12)], [*range(8, 20)]) == {Source.HOST}


def test_a_flipped_bit_is_found(open_stage: Callable[..., Stage]) -> None:
    stage = open_stage("posix", "gqa", torch.bfloat16)
    stage.host.demote(keys(0, 1, 2), torch.arange(3), [stage.written])
    stage.tier.drain()
    (piece,) = stage.host.pieces(keys(2))
    assert piece.reading is not None
    stream = piece.reading.stream
    stream.hurry()
    ((_, arrays),) = next(iter(stream.layer(0))).parts
    arrays[1][0, 77] ^= 4
    stream.close()
    stage.restorer.queue("r", keys(0, 1, 2), torch.tensor([10, 11, 12]))
    assert stage.restorer.finish(stage.restorer.start()).failed == {"r"}
    assert stage.restore([0, 1, 2], [10, 11, 12]) == {Source.COLD}
