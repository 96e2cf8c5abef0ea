from __future__ import annotations

import pytest
import torch

from engine_patch.quarantine import Quarantine
from engine_patch.sglang_api import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator

PAGE_SIZE, PAGES = 4, 8


@pytest.fixture(params=[False, True], ids=["as they come", "sorted"])
def allocator(request: pytest.FixtureRequest) -> PagedTokenToKVPoolAllocator:
    return PagedTokenToKVPoolAllocator(PAGES * PAGE_SIZE, PAGE_SIZE, torch.float32, "cpu", None, request.param)


def taken(allocator: PagedTokenToKVPoolAllocator, pages: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots of so many pages, and their page numbers."""
    slots = allocator.alloc(pages * PAGE_SIZE)
    return slots, slots[::PAGE_SIZE] // PAGE_SIZE


def everything(allocator: PagedTokenToKVPoolAllocator) -> list[int]:
    """All pages that can be had, by number."""
    slots = allocator.alloc(allocator.available_size())
    pages = sorted((slots[::PAGE_SIZE] // PAGE_SIZE).tolist())
    allocator.free(slots)
    return pages


def test_what_is_held_is_not_given_out_before_its_time(allocator: PagedTokenToKVPoolAllocator) -> None:
    (slots, pages), (others, _) = taken(allocator, 3), taken(allocator, 2)
    over = False
    quarantine = Quarantine(allocator)
    quarantine.hold(pages[1:], lambda: over)
    allocator.free(torch.cat([slots, others]))
    assert allocator.available_size() == (PAGES - 2) * PAGE_SIZE
    assert not set(everything(allocator)) & set(pages[1:].tolist())
    assert not quarantine.tidy()
    assert quarantine
    over = True
    assert quarantine.tidy()
    assert not quarantine
    assert everything(allocator) == list(range(1, PAGES + 1))


def test_every_way_back_is_guarded(allocator: PagedTokenToKVPoolAllocator) -> None:
    for give_back in (
        lambda slots, pages: allocator.free_segment(slots, start_pos=0),
        lambda slots, pages: allocator.free_page_ids(pages),
    ):
        quarantine = Quarantine(allocator)
        slots, pages = taken(allocator, 2)
        quarantine.hold(pages, lambda: False)
        give_back(slots, pages)
        assert allocator.available_size() == (PAGES - 2) * PAGE_SIZE
        quarantine._held = [(pages, lambda: True)]
        quarantine.tidy()
        assert allocator.available_size() == PAGES * PAGE_SIZE
    slots, pages = taken(allocator, 2)
    quarantine.hold(pages, lambda: False)
    allocator.free_group_begin()
    allocator.free(slots)
    allocator.free_group_end()
    assert allocator.available_size() == (PAGES - 2) * PAGE_SIZE


def test_each_is_held_for_its_own_time(allocator: PagedTokenToKVPoolAllocator) -> None:
    (first, first_pages), (second, second_pages) = taken(allocator, 1), taken(allocator, 2)
    over = {"first"}
    quarantine = Quarantine(allocator)
    quarantine.hold(first_pages, lambda: "first" in over)
    quarantine.hold(second_pages, lambda: "second" in over)
    allocator.free(first)
    allocator.free(second)
    quarantine.tidy()
    assert allocator.available_size() == (PAGES - 2) * PAGE_SIZE
    over.add("second")
    quarantine.tidy()
    assert everything(allocator) == list(range(1, PAGES + 1))


def test_pages_that_have_not_come_back_yet_come_back_as_ever(allocator: PagedTokenToKVPoolAllocator) -> None:
    slots, pages = taken(allocator, 2)
    quarantine = Quarantine(allocator)
    quarantine.hold(pages, lambda: True)
    quarantine.tidy()
    assert allocator.available_size() == (PAGES - 2) * PAGE_SIZE
    allocator.free(slots)
    assert everything(allocator) == list(range(1, PAGES + 1))


def test_it_works_where_all_pages_come_back_by_one_way(allocator: PagedTokenToKVPoolAllocator) -> None:
    class Another(PagedTokenToKVPoolAllocator):
        """Whose ways are not known."""

    assert Quarantine.works(allocator)
    assert not Quarantine.works(Another(8, 4, torch.float32, "cpu", None, False))


@pytest.mark.parametrize("need_sort", [False, True])
def test_pages_may_be_of_one_token(need_sort: bool) -> None:
    allocator = TokenToKVPoolAllocator(8, torch.float32, "cpu", None, need_sort)
    quarantine, over = Quarantine(allocator), False
    assert Quarantine.works(allocator)
    slots = allocator.alloc(5)
    quarantine.hold(slots[:3], lambda: over)
    allocator.free_group_begin()
    allocator.free(slots[:2])
    allocator.free_group_end()
    allocator.free_segment(slots[2:], start_pos=0)
    assert allocator.available_size() == 8 - 3
    over = True
    assert quarantine.tidy()
    assert sorted(allocator.alloc(8).tolist()) == list(range(1, 9))
