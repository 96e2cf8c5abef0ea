from __future__ import annotations

import random

import pytest

from agentstate.pages.eviction import EvictionOrder, Extent


def extents(count: int) -> list[Extent]:
    return [Extent(number, 1, 1, 100, 0, used=number) for number in range(count)]


def chosen(order: EvictionOrder, n_bytes: int, staying: frozenset[int] = frozenset()) -> list[int]:
    return [extent.number for _, extent in order.choose(n_bytes, lambda _, extent: extent.number not in staying)]


def test_what_nothing_needs_goes_first_then_what_was_used_longest_ago() -> None:
    order = EvictionOrder()
    some = extents(6)
    for extent in some:
        order.add("store", extent)
    some[0].needed_by = {"ses_a": 1}
    some[1].used = 10
    assert chosen(order, 250, staying=frozenset({3})) == [2, 4, 5]
    assert chosen(order, 1000) == [3, 1, 0]
    assert len(order) == 0


def test_what_is_needed_no_more_goes_in_its_old_turn() -> None:
    order = EvictionOrder()
    some = extents(4)
    for extent in some:
        extent.needed_by = {"ses_a": 1}
        order.add("store", extent)
    del some[2].needed_by["ses_a"]
    order.hasten(some[2])
    assert chosen(order, 200) == [2, 0]


def test_what_was_removed_is_not_chosen_and_may_come_back() -> None:
    order = EvictionOrder()
    some = extents(3)
    for extent in some:
        order.add("store", extent)
    order.remove(some[0])
    order.remove(some[0])
    assert len(order) == 2
    taken = order.choose(100, lambda *_: True)
    order.put_back(taken)
    order.add("store", some[0])
    assert chosen(order, 1000) == [0, 1, 2]


def test_any_history_gives_the_order_that_sorting_gives() -> None:
    chance = random.Random(7)
    for _ in range(200):
        order, model = EvictionOrder(), dict[int, Extent]()
        for number in range(60):
            clock = number + 1
            match chance.randrange(6):
                case 0 | 1:
                    model[number] = Extent(number, 1, 1, 100, 0, used=clock)
                    order.add("store", model[number])
                case 2 if model:
                    chance.choice(list(model.values())).used = clock
                case 3 if model:
                    chance.choice(list(model.values())).needed_by = {"ses_a": clock}
                case 4 if model:
                    extent = chance.choice(list(model.values()))
                    extent.needed_by = {}
                    order.hasten(extent)
                case 5 if model:
                    staying = frozenset(chance.sample(list(model), chance.randint(0, len(model) // 2)))
                    right = sorted(model.keys() - staying, key=lambda number: model[number].turn())[:2]
                    assert chosen(order, 200, staying) == right
                    for gone in right:
                        del model[gone]
            assert len(order) == len(model)


@pytest.mark.parametrize("count", [1_000, 16_000])
def test_a_choice_looks_at_few_extents_however_many_there_are(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    order = EvictionOrder()
    some = extents(count)
    for extent in some:
        order.add("store", extent)
    looked_at = 0
    turn = Extent.turn

    def counted(extent: Extent) -> tuple[bool, int]:
        nonlocal looked_at
        looked_at += 1
        return turn(extent)

    monkeypatch.setattr(Extent, "turn", counted)
    for number in range(500):
        # One is used and one is written for each that goes.
        some[(7 * number) % count].used = count + 2 * number
        order.choose(100, lambda *_: True)
        order.add("store", Extent(count + number, 1, 1, 100, 0, used=count + 2 * number + 1))
    assert looked_at < 500 * 5
    assert len(order._heap) <= 2 * len(order) + 64


def test_the_order_takes_no_more_memory_than_there_are_extents() -> None:
    order = EvictionOrder()
    for number in range(5_000):
        extent = Extent(number, 1, 1, 100, 0, used=number)
        order.add("store", extent)
        order.remove(extent)
    assert len(order) == 0
    assert len(order._heap) <= 65
