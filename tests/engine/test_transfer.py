from __future__ import annotations

import numpy as np
import pytest
import torch
from device import HEADS, LAYERS, PAGE_SIZE, PAGES, SIZE, as_bytes, fill, kv_tensors, page_of

from agentstate.pages import Geometry
from engine_patch.transfer import DevicePages, _words

DTYPES = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float32]
RUNS = {"one": [5], "consecutive": [3, 4, 5, 6], "scattered": [9, 2, 17], "backwards": [3, 2, 1], "gap": [4, 5, 7]}


def host(pages: DevicePages, count: int) -> list[np.ndarray]:
    return [np.zeros((count, n_bytes), dtype=np.uint8) for n_bytes in pages.geometry.component_bytes]


@pytest.mark.parametrize("components", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_geometry_is_what_the_tensors_hold(dtype: torch.dtype, components: int) -> None:
    pages = DevicePages(kv_tensors(dtype, components), PAGE_SIZE)
    n_bytes = PAGE_SIZE * HEADS * SIZE * dtype.itemsize
    assert pages.geometry == Geometry(LAYERS, PAGE_SIZE, (n_bytes,) * components)
    assert pages.device.type == "cpu"


@pytest.mark.parametrize("numbers", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages_travel_to_other_slots_bit_for_bit(dtype: torch.dtype, numbers: list[int]) -> None:
    source, target = kv_tensors(dtype), kv_tensors(dtype)
    fill(source)
    elsewhere = [PAGES - 1 - number for number in reversed(numbers)]
    reading, writing = DevicePages(source, PAGE_SIZE), DevicePages(target, PAGE_SIZE)
    for layer in range(LAYERS):
        slab = host(reading, len(numbers))
        reading.gather(layer, torch.tensor(numbers), slab)
        for component, array in enumerate(slab):
            assert [row.tobytes() for row in array] == [page_of(source, n)[layer][component] for n in numbers]
        writing.scatter(layer, torch.tensor(elsewhere), slab)
    assert [page_of(target, n) for n in elsewhere] == [page_of(source, n) for n in numbers]
    untouched = torch.ones(len(target[0][0]), dtype=torch.bool)
    for number in elsewhere:
        untouched[number * PAGE_SIZE : (number + 1) * PAGE_SIZE] = False
    assert all(not as_bytes(tensor)[untouched].any() for layer in target for tensor in layer)


@pytest.mark.parametrize("numbers", [*RUNS.values(), []], ids=[*RUNS, "none"])
def test_a_place_is_good_for_every_layer(numbers: list[int]) -> None:
    source, target = kv_tensors(), kv_tensors()
    fill(source)
    reading, writing = DevicePages(source, PAGE_SIZE), DevicePages(target, PAGE_SIZE)
    there = reading.place(torch.tensor(numbers, dtype=torch.int64), reading.outbound)
    here = writing.place(torch.tensor(numbers, dtype=torch.int64), writing.inbound)
    for layer in range(LAYERS):
        slab = host(reading, len(numbers))
        reading.gather(layer, there, slab)
        writing.scatter(layer, here, slab)
    assert [page_of(target, n) for n in numbers] == [page_of(source, n) for n in numbers]


@pytest.mark.parametrize("numbers", [[-1], [PAGES], [0, PAGES], [3, 2, -7]], ids=str)
def test_a_place_that_the_device_has_not_is_refused(numbers: list[int]) -> None:
    pages = DevicePages(kv_tensors(), PAGE_SIZE)
    with pytest.raises(ValueError, match=f"not all on a device of {PAGES} pages"):
        pages.place(torch.tensor(numbers), pages.inbound)


@pytest.mark.parametrize(
    ("first", "n_bytes", "words"), [(0, 64, True), (8, 16, True), (1, 16, False), (4, 8, False), (0, 12, False)]
)
def test_rows_are_moved_by_words_where_all_of_them_can_be(first: int, n_bytes: int, words: bool) -> None:
    memory = torch.arange(256, dtype=torch.uint8)
    part = memory[first : first + 3 * n_bytes].view(3, n_bytes)
    whole = torch.zeros(5, n_bytes, dtype=torch.uint8)
    rows, source = _words(whole, part)
    assert (rows.dtype is torch.int64, source.dtype is torch.int64) == (words, words)
    rows.index_copy_(0, torch.tensor([4, 0, 2]), source)
    assert torch.equal(whole[[4, 0, 2]], part)


def test_the_one_component_of_mla_travels_too() -> None:
    source, target = kv_tensors(torch.bfloat16, components=1), kv_tensors(torch.bfloat16, components=1)
    fill(source)
    slab = host(DevicePages(source, PAGE_SIZE), 2)
    DevicePages(source, PAGE_SIZE).gather(1, torch.tensor([7, 3]), slab)
    DevicePages(target, PAGE_SIZE).scatter(1, torch.tensor([0, 1]), slab)
    assert [page_of(target, n)[1] for n in (0, 1)] == [page_of(source, n)[1] for n in (7, 3)]


def test_components_may_differ_in_size() -> None:
    tensors = [(torch.randn(8, 2, 6), torch.randn(8, 2, 3)) for _ in range(2)]
    pages = DevicePages(tensors, 4)
    assert pages.geometry.component_bytes == (4 * 2 * 6 * 4, 4 * 2 * 3 * 4)
    slab = host(pages, 2)
    pages.gather(1, torch.tensor([1, 0]), slab)
    assert slab[1][0].tobytes() == tensors[1][1][4:].numpy().tobytes()


def test_a_slab_that_is_a_view_of_a_larger_buffer_is_filled_in_place() -> None:
    tensors = kv_tensors()
    fill(tensors)
    pages = DevicePages(tensors, PAGE_SIZE)
    n_bytes = pages.geometry.component_bytes[0]
    for numbers in ([1, 2], [2, 1]):
        buffer = np.zeros(100 + 4 * n_bytes, dtype=np.uint8)
        slab = [buffer[100 + c * 2 * n_bytes : 100 + (c + 1) * 2 * n_bytes].reshape(2, n_bytes) for c in range(2)]
        pages.gather(0, torch.tensor(numbers), slab)
        wanted = b"".join(page_of(tensors, n)[0][c] for c in range(2) for n in numbers)
        assert buffer.tobytes() == bytes(100) + wanted


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_slots_of_whole_pages_have_page_numbers(dtype: torch.dtype) -> None:
    pages = DevicePages(kv_tensors(), PAGE_SIZE)
    slots = torch.cat([torch.arange(n * PAGE_SIZE, (n + 1) * PAGE_SIZE) for n in (4, 2, 3)]).to(dtype)
    numbers = pages.page_numbers(slots)
    assert numbers.tolist() == [4, 2, 3]
    assert numbers.dtype == torch.int64


@pytest.mark.parametrize(
    "slots",
    [
        [1, 2, 3, 4],
        [0, 1, 2, 4],
        [3, 2, 1, 0],
        [0, 0, 0, 0],
        [4, 5, 6, 7, 9, 10, 11, 12],
        pytest.param(
            [0, 1, 2],
        ),
        pytest.param(
            [0, 1, 2, 3, 4],
        ),
    ],
    ids=str,
)
def test_slots_that_are_no_whole_aligned_pages_are_refused(slots: list[int]) -> None:
    pages = DevicePages(kv_tensors(), PAGE_SIZE)
    with pytest.raises(ValueError, match="not whole, aligned pages"):
        pages.page_numbers(torch.tensor(slots))


def test_of_the_pages_of_a_window_those_that_are_held_are_found() -> None:
    pages = DevicePages(kv_tensors(), PAGE_SIZE)
    own = [list(range(n * PAGE_SIZE, (n + 1) * PAGE_SIZE)) for n in (4, 2)]
    gone = [[0] * PAGE_SIZE, list(range(PAGE_SIZE)), [-1] * PAGE_SIZE, own[0][::-1], [*own[0][:-1], 0]]
    slots = torch.tensor([gone[0], own[0], *gone[1:], own[1]]).flatten()
    assert pages.held_pages(slots) == [(1, 4), (6, 2)]
    assert pages.held_pages(torch.empty(0, dtype=torch.int64)) == []
    with pytest.raises(ValueError, match="not all on a device"):
        pages.held_pages(torch.arange(PAGES * PAGE_SIZE, (PAGES + 1) * PAGE_SIZE))


@pytest.mark.parametrize("numbers", [[0, PAGES], [PAGES, PAGES + 1], [PAGES + 5, 1]], ids=str)
def test_pages_that_do_not_exist_are_not_written(numbers: list[int]) -> None:
    tensors = kv_tensors()
    pages = DevicePages(tensors, PAGE_SIZE)
    with pytest.raises((IndexError, ValueError)):
        pages.scatter(0, torch.tensor(numbers), [array + 1 for array in host(pages, 2)])


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param(
            [1, PAGES + 3],
        ),
        [PAGES, PAGES + 1],
    ],
    ids=str,
)
def test_pages_that_do_not_exist_are_not_read(numbers: list[int]) -> None:
    tensors = kv_tensors()
    fill(tensors)
    pages = DevicePages(tensors, PAGE_SIZE)
    with pytest.raises((IndexError, ValueError)):
        pages.gather(0, torch.tensor(numbers), host(pages, 2))


def test_tensors_of_another_layout_are_refused() -> None:
    good = torch.zeros(8, 2, 4)
    with pytest.raises(ValueError, match="must be contiguous"):
        DevicePages([(good, torch.zeros(2, 8, 4).transpose(0, 1))], 4)
    with pytest.raises(ValueError, match="layers of different page sizes"):
        DevicePages([(good, good), (good, torch.zeros(8, 2, 5))], 4)
    with pytest.raises(ValueError, match="layers of different page sizes"):
        DevicePages([(good, good), (good,)], 4)


def test_page_numbers_are_looked_for_when_they_are_asked_for() -> None:
    """By then the memory that they were given in may be another's."""
    device = DevicePages(kv_tensors(), PAGE_SIZE)
    slots = torch.arange(3 * PAGE_SIZE, 5 * PAGE_SIZE)
    numbers, wrong = (device.numbers_in(given, device.inbound) for given in (slots, slots[1:]))
    slots.fill_(0)
    assert numbers[:].tolist() == [3, 4] and numbers[1:].tolist() == [4]
    with pytest.raises(ValueError, match="whole, aligned pages"):
        wrong[:]
