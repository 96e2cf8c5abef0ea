from __future__ import annotations

import mmap
from threading import Thread

import numpy as np
import pytest
from gpu import BUSY, DEVICE, DTYPES, GEOMETRIES, kv_tensors, page_of, torch

from engine_patch.staging import PinnedMemory, device_memory
from engine_patch.transfer import DevicePages

PAGES = 24
RUNS = {"one": [5], "consecutive": [3, 4, 5, 6], "scattered": [9, 2, 17], "backwards": [3, 2, 1], "gap": [4, 5, 7]}


def slab(pages: DevicePages, count: int, buffer: mmap.mmap) -> list[np.ndarray]:
    memory, position, arrays = np.frombuffer(buffer, dtype=np.uint8), 0, []
    for n_bytes in pages.geometry.component_bytes:
        arrays.append(memory[position : position + count * n_bytes].reshape(count, n_bytes))
        position += count * n_bytes
    return arrays


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "pageable"])
@pytest.mark.parametrize("numbers", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages_travel_to_other_slots_bit_for_bit(
    dtype: torch.dtype, geometry: str, numbers: list[int], pinned: bool
) -> None:
    source, target = kv_tensors(geometry, dtype, PAGES, seed=1), kv_tensors(geometry, dtype, PAGES)
    size = GEOMETRIES[geometry][1]
    reading, writing = DevicePages(source, size), DevicePages(target, size)
    elsewhere = [PAGES - 1 - number for number in reversed(numbers)]
    buffer = mmap.mmap(-1, len(numbers) * reading.geometry.layer_bytes)
    memory = PinnedMemory(buffer, DEVICE) if pinned else None
    arrays = slab(reading, len(numbers), buffer)
    for layer in range(reading.geometry.layers):
        reading.gather(layer, torch.tensor(numbers), arrays)
        reading.outbound.finish()
        for component, array in enumerate(arrays):
            assert [row.tobytes() for row in array] == [page_of(source, size, n)[layer][component] for n in numbers]
        writing.scatter(layer, torch.tensor(elsewhere), arrays)
        writing.inbound.finish()
    if memory is not None:
        memory.close()
    assert [page_of(target, size, n) for n in elsewhere] == [page_of(source, size, n) for n in numbers]
    untouched = torch.ones(len(target[0][0]), dtype=torch.bool)
    for number in elsewhere:
        untouched[number * size : (number + 1) * size] = False
    assert all(not tensor.view(torch.uint8).cpu()[untouched].any() for layer in target for tensor in layer)


@pytest.mark.parametrize("numbers", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_pages_in_device_staging_are_put_in_their_slots(geometry: str, numbers: list[int]) -> None:
    target = kv_tensors(geometry, torch.bfloat16, PAGES)
    pages = DevicePages(target, GEOMETRIES[geometry][1])
    sizes = pages.geometry.component_bytes
    staging = [torch.randint(0, 256, (len(numbers), n), dtype=torch.uint8).to(DEVICE) for n in sizes]
    pages.scatter(1, torch.tensor(numbers), staging)
    pages.inbound.finish()
    for i, number in enumerate(numbers):
        found = page_of(target, pages.geometry.page_size, number)
        assert found[1] == [part[i].cpu().numpy().tobytes() for part in staging]
        assert not any(any(part) for part in found[0])


def test_memory_is_pinned_until_it_is_closed() -> None:
    buffer = mmap.mmap(-1, 1 << 20)
    array = np.frombuffer(buffer, dtype=np.uint8)
    pinned = PinnedMemory(buffer, DEVICE)
    assert torch.from_numpy(array).is_pinned()
    pinned.close()
    pinned.close()
    assert not torch.from_numpy(array).is_pinned()


def test_a_copy_begins_after_the_events_that_it_was_told_of() -> None:
    """What a forward still writes when its page is offered."""
    tensors = kv_tensors("gqa", torch.float32, PAGES)
    pages = DevicePages(tensors, 64)
    busy = torch.randn(BUSY, BUSY, device=DEVICE)
    for _ in range(50):
        busy = torch.tanh(busy @ busy)
    tensors[0][0].fill_(1.0)
    written = torch.cuda.Event()
    written.record()
    out = slab(pages, 2, mmap.mmap(-1, 2 * pages.geometry.layer_bytes))
    pages.outbound.after([written])
    pages.gather(0, torch.tensor([3, 4]), out)
    pages.outbound.finish()
    assert (out[0].view(np.float32) == 1.0).all()


def test_a_fence_is_waited_for_by_any_thread() -> None:
    tensors = kv_tensors("gqa", torch.float32, PAGES)
    pages = DevicePages(tensors, 64)
    source = slab(pages, 2, mmap.mmap(-1, 2 * pages.geometry.layer_bytes))
    source[0][:] = 7
    # The tensors are made on torch's own stream.
    made = torch.cuda.Event()
    made.record()
    pages.inbound.after([made])
    pages.scatter(0, torch.tensor([1, 0]), source)
    fence = pages.inbound.fence()
    assert fence is not None
    thread = Thread(target=fence)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert (tensors[0][0][:128].view(torch.uint8).cpu() == 7).all()


def test_device_memory_begins_at_a_page() -> None:
    for n_bytes in (1, 4096, 1 << 20):
        memory = device_memory(n_bytes, DEVICE)
        assert (len(memory), memory.data_ptr() % 4096, memory.device) == (n_bytes, 0, DEVICE)
