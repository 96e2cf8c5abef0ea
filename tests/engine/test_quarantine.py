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
    quarantine = Quarantine(allocator)
    quarantine.add(pages[1:])
    allocator.free(torch.cat([slots, others]))
    assert allocator.available_size() == (PAGES - 2) * PAGE_SIZE
    assert not set(everything(allocator)) & set(pages[1:].tolist())
    assert quarantine
    quarantine.release()
    assert not quarantine
    assert everything(allocator) == list(range(1, PAGES + 1))


def test_every_way_back_is_guarded(allocator: PagedTokenToKVPoolAllocator) -> None:
    quarantine = Quarantine(allocator)

    def in_a_group(slots: torch.Tensor, pages: torch.Tensor) -> None:
        allocator.free_group_begin()
        allocator.free(slots)
        allocator.free_group_end()

    for give_back in (
        lambda slots, pages: allocator.free_segment(slots, start_pos=0),
        lambda slots, pages: allocator.free_page_ids(pages),
        in_a_group,
    ):
        slots, pages = taken(allocator, 2)
        quarantine.add(pages)
        give_back(slots, pages)
        assert allocator.available_size() == (PAGES - 2) * PAGE_SIZE
        quarantine.release()
        assert allocator.available_size() == PAGES * PAGE_SIZE


def test_what_is_held_at_different_times_is_let_go_together(allocator: PagedTokenToKVPoolAllocator) -> None:
    (first, first_pages), (second, second_pages) = taken(allocator, 1), taken(allocator, 2)
    quarantine = Quarantine(allocator)
    quarantine.add(first_pages)
    allocator.free(first)
    quarantine.add(second_pages)
    allocator.free(second)
    assert allocator.available_size() == (PAGES - 3) * PAGE_SIZE
    quarantine.release()
    assert everything(allocator) == list(range(1, PAGES + 1))


def test_pages_that_have_not_come_back_yet_come_back_as_ever(allocator: PagedTokenToKVPoolAllocator) -> None:
    slots, pages = taken(allocator, 2)
    quarantine = Quarantine(allocator)
    quarantine.add(pages)
    quarantine.release()
    assert allocator.available_size() == (PAGES - 2) * PAGE_SIZE
    allocator.free(slots)
    assert everything(allocator) == list(range(1, PAGES + 1))


def test_it_works_where_all_pages_come_back_by_one_way(allocator: PagedTokenToKVPoolAllocator) -> None:
    class Another(PagedTokenToKVPoolAllocator):
        """Whose ways are not known."""

    assert Quarantine.works(allocator)
    assert not Quarantine.works(Another(8, 4, torch.float32, "cpu", None, False))
    assert not Quarantine.works(None)


@pytest.mark.parametrize("need_sort", [False, True])
def test_pages_may_be_of_one_token(need_sort: bool) -> None:
    allocator = TokenToKVPoolAllocator(8, torch.float32, "cpu", None, need_sort)
    quarantine = Quarantine(allocator)
    assert Quarantine.works(allocator)
    slots = allocator.alloc(5)
    quarantine.add(slots[:3])
    allocator.free_group_begin()
    allocator.free(slots[:2])
    allocator.free_group_end()
    allocator.free_segment(slots[2:], start_pos=0)
    assert allocator.available_size() == 8 - 3
    quarantine.release()
    assert sorted(allocator.alloc(8).tolist()) == list(range(1, 9))
