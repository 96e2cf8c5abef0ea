from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from contents import MARK, content, keys, write
from device import PAGE_SIZE, kv_tensors, page_of

from agentstate.errors import SettingsError
from agentstate.pages import LayerwiseReader, PageStore, PosixBackend
from agentstate.pages.backends import OpenFile
from engine_patch.staging import HostCopies, PinnedMemory, device_memory, read_backend
from engine_patch.transfer import DevicePages

CPU = torch.device("cpu")


def test_the_default_reads_into_host_memory() -> None:
    assert isinstance(read_backend("posix", CPU), PosixBackend)


def test_kvikio_is_refused_where_the_kv_is_not_on_a_gpu() -> None:
    with pytest.raises(SettingsError, match="AGENTSTATE_READ_BACKEND=kvikio reads into GPU memory.*posix"):
        read_backend("kvikio", CPU)


class TensorBackend(PosixBackend):
    """Reads into torch tensors, as into device memory."""

    def __init__(self) -> None:
        self.copies = HostCopies(CPU)
        self.on_host = self.copies.of

    def allocate(self, n_bytes: int) -> torch.Tensor:
        return device_memory(n_bytes, CPU)

    def open(self, fd: int, path: Path) -> ArrayFile:
        return ArrayFile(super().open(fd, path))


class ArrayFile(OpenFile):
    def __init__(self, file) -> None:
        self._file = file

    def read(self, into: torch.Tensor, offset: int) -> int:
        return self._file.read(into.numpy(), offset)

    def close(self) -> None:
        self._file.close()


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_what_is_not_is_copied_there_and_put_in_its_slots_from_where_it_is(tmp_path: Path, chunk_bytes: int) -> None:
    tensors = kv_tensors()
    pages = DevicePages(tensors, PAGE_SIZE)
    store = PageStore(tmp_path, MARK, pages.geometry)
    for extent in ([0, 1, 2], [3]):
        write(store, keys(*extent))
    damaged = store.pin(keys(1)).segments[0]
    with damaged.extent.path.open("r+b") as file:
        file.seek(damaged.extent.layout.component_range(2, 0, damaged.slot, 1)[0])
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    reader = LayerwiseReader(
        pages.geometry, staging_bytes=4 * chunk_bytes, threads=2, chunk_bytes=chunk_bytes, backend=TensorBackend()
    )
    wrong = set()
    with reader.open(store.pin(keys(0, 1, 2, 3))) as stream:
        for chunk in stream:
            assert all(isinstance(array, torch.Tensor) for part in chunk.parts for array in part.arrays)
            wrong |= {(chunk.layer, page) for page in chunk.wrong}
            for segment, arrays in chunk.parts:
                pages.scatter(chunk.layer, torch.arange(segment.first, segment.first + segment.pages), arrays)
    assert wrong == {(2, 1)}
    restored = [page_of(tensors, number) for number in range(4)]
    written = [
        [
            [content(pages.geometry, key, layer, component) for component in range(2)]
            for layer in range(pages.geometry.layers)
        ]
        for key in keys(0, 1, 2, 3)
    ]
    written[1][2] = restored[1][2]
    assert restored == written
    reader.close()
    store.close()


def test_nothing_is_retained_a_cpu() -> None:
    pinned = PinnedMemory(mmap.mmap(-1, 4096), CPU)
    pinned.close()
    pinned.close()


def test_device_memory_begins_at_a_page() -> None:
    for n_bytes in (1, 4096, 1 << 20):
        memory = device_memory(n_bytes, CPU)
        assert (len(memory), memory.data_ptr() % 4096) == (n_bytes, 0)
