"""Pages from one set of CUDA tensors through real files into another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from contents import MARK, key, keys
from gpu import BACKENDS, DEVICE, DTYPES, GEOMETRIES, kv_tensors, needs_kvikio, page_of, torch

from agentstate.pages import LayerwiseReader, PageStore, ReadBackend
from agentstate.pages.backends import Buffer
from agentstate.pages.testing.backends import ReadBackendTests
from engine_patch.restore import Restorer
from engine_patch.spill import Spiller
from engine_patch.staging import read_backend
from engine_patch.transfer import DevicePages

PAGES = 24
CHUNKS = {"a page": 1, "some": 256 << 10, "all": 4 << 20}


class Stage:
    """Pages 0 to 15 of ``source`` are stored, in four extents, under their numbers' keys; ``restorer`` writes to
    ``target``."""

    def __init__(self, directory: Path, backend: str, geometry: str, dtype: torch.dtype, chunk_bytes: int):
        self.size = GEOMETRIES[geometry][1]
        self.source, self.target = kv_tensors(geometry, dtype, PAGES, seed=2), kv_tensors(geometry, dtype, PAGES)
        source, target = DevicePages(self.source, self.size), DevicePages(self.target, self.size)
        self.store = PageStore(directory, MARK, source.geometry)
        spiller = Spiller(self.store, source, 4 << 20)
        written = torch.cuda.Event()
        written.record()
        for offer in ([0, 1, 2, 3, 4], [9, 7, 5], [6, 8], [10, 11, 12, 13, 14, 15]):
            spiller.offer(keys(*offer), torch.tensor(offer), [written])
        spiller.close()
        assert list(spiller.results) == [True] * 4
        reader = LayerwiseReader(
            source.geometry,
            staging_bytes=4 * chunk_bytes,
            threads=3,
            chunk_bytes=chunk_bytes,
            backend=read_backend(backend, DEVICE),
        )
        self.restorer = Restorer(self.store, target, reader)

    def restore(self, **requests: tuple[list[int], list[int]]) -> set[str]:
        for rid, (names, numbers) in requests.items():
            self.restorer.queue(rid, keys(*names), torch.tensor(numbers))
        before = torch.cuda.Event()
        before.record()
        failed = self.restorer.finish(self.restorer.start([before])).failed
        # What is wrong is dropped after the batch.
        self.restorer.drain()
        return failed

    def is_restored(self, name: int, number: int) -> bool:
        return page_of(self.target, self.size, number) == page_of(self.source, self.size, name)

    def close(self) -> None:
        self.restorer.close()
        self.store.close()


@pytest.fixture
def staged(tmp_path: Path) -> Iterator[Callable[..., Stage]]:
    stages: list[Stage] = []

    def make(backend: str, geometry: str, dtype: torch.dtype, chunk_bytes: int = 1 << 20) -> Stage:
        stages.append(Stage(tmp_path, backend, geometry, dtype, chunk_bytes))
        return stages[-1]

    yield make
    for stage in stages:
        stage.close()


@pytest.mark.parametrize("chunk_bytes", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_was_spilled_is_restored_bit_for_bit(
    staged: Callable[..., Stage], backend: str, dtype: torch.dtype, geometry: str, chunk_bytes: int
) -> None:
    stage = staged(backend, geometry, dtype, chunk_bytes)
    for _ in range(2):  # staging is used again
        a, b = ([0, 1, 2, 3, 4, 5, 6], [20, 21, 22, 23, 1, 0, 2]), ([10, 3, 15], [8, 9, 10])
        assert stage.restore(a=a, b=b) == set()
        for request in (a, b):
            assert all(stage.is_restored(name, number) for name, number in zip(*request, strict=True))


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_flipped_bit_is_found(staged: Callable[..., Stage], backend: str, layer: int) -> None:
    stage = staged(backend, "gqa", torch.bfloat16)
    (segment,) = stage.store.pin(keys(2)).segments
    with segment.extent.path.open("r+b") as file:
        file.seek(segment.extent.layout.component_range(layer, 1, segment.slot, 1)[0] + 77)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0x04]))
    assert stage.restore(bad=([0, 1, 2, 3], [10, 11, 12, 13]), good=([4, 5], [4, 5])) == {"bad"}
    assert stage.is_restored(4, 4) and stage.is_restored(5, 5)
    assert key(2) not in stage.store
    assert all(key(page) in stage.store for page in (0, 1, 3, 4))
    assert stage.restore(again=([0, 1], [10, 11])) == set()
    assert stage.is_restored(0, 10) and stage.is_restored(1, 11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_truncated_extent_fails_its_own_requests(staged: Callable[..., Stage], backend: str) -> None:
    stage = staged(backend, "mla", torch.bfloat16)
    extent = stage.store.pin(keys(9)).segments[0].extent
    with extent.path.open("r+b") as file:
        file.truncate(extent.layout.data_offset + extent.layout.slab_bytes)
    assert stage.restore(bad=([9, 7], [10, 11]), good=([0, 1], [4, 5])) == {"bad"}
    assert stage.is_restored(0, 4) and stage.is_restored(1, 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forward_sees_a_layer_as_soon_as_it_has_arrived(staged: Callable[..., Stage], backend: str) -> None:
    stage = staged(backend, "gqa", torch.float16)
    names = list(range(16))
    stage.restorer.queue("a", keys(*names), torch.tensor(names))
    index = stage.restorer.start()
    stage.restorer.arrivals.set_consumer(index)
    for layer, (k, v) in enumerate(stage.target):
        stage.restorer.arrivals.wait_until(layer)
        rows = slice(0, 16 * stage.size)
        for mine, right in zip((k, v), stage.source[layer], strict=True):
            assert torch.equal(mine[rows].view(torch.uint8), right[rows].view(torch.uint8))
    assert stage.restorer.finish(index).failed == set()


@needs_kvikio
class TestKvikioIntoDeviceMemory(ReadBackendTests):
    @pytest.fixture
    def backend(self) -> ReadBackend:
        return read_backend("kvikio", DEVICE)

    def to_host(self, buffer: Buffer) -> bytes:
        return bytes(buffer.cpu().numpy().tobytes())

    def address(self, buffer: Buffer) -> int:
        return int(buffer.data_ptr())
