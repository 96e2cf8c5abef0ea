from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from contents import keys

from engine_patch.feeds import Piece, Reading, _without, intersection, pieces


def reading(*names: object) -> Reading:
    stream: Any = SimpleNamespace(pin=SimpleNamespace(keys=keys(*names)))
    return Reading(stream)


def test_chains_are_joined_where_they_are_alike() -> None:
    common, other = reading(0, 1, 2, 3, "a"), reading("b", "c")
    assert pieces(keys(0, 1, 2, 3, "a"), [common, other]) == [Piece(range(5), common)]
    assert pieces(keys(2, 3), [other, common]) == [Piece(range(2), common, 2)]
    assert pieces(keys(0, 1, 2, "x"), [common]) == [Piece(range(3), common), Piece(range(3, 4))]
    assert pieces(keys("x", 0, 1), [common]) == [Piece(range(1)), Piece(range(1, 3), common)]
    assert pieces(keys(1, "x", "b", "c", "y"), [common, other]) == [
        Piece(range(1), common, 1),
        Piece(range(1, 2)),
        Piece(range(2, 4), other),
        Piece(range(4, 5)),
    ]
    assert pieces(keys(1, 2), []) == [Piece(range(2))]
    assert pieces([], [common]) == []


def test_of_several_that_read_the_same_the_longest_is_joined() -> None:
    short, long = reading(0, 1), reading(0, 1, 2)
    assert pieces(keys(0, 1, 2, 3), [short, long]) == [Piece(range(3), long), Piece(range(3, 4))]


@pytest.mark.parametrize("seed", range(20))
def test_a_piece_is_never_of_another_page(seed: int) -> None:
    """Also of keys that are no chains."""
    chance = random.Random(seed)
    readings = [reading(*chance.choices(range(6), k=chance.randint(1, 8))) for _ in range(3)]
    wanted = keys(*chance.choices(range(8), k=12))
    found = pieces(wanted, readings)
    assert [page for piece in found for page in piece.pages] == list(range(12))
    for piece in found:
        if piece.reading is not None:
            read = piece.reading.keys[piece.at : piece.at + len(piece.pages)]
            assert read == wanted[piece.pages.start : piece.pages.stop]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_left_of_pages_is_each_of_the_others_once(seed: int) -> None:
    chance = random.Random(seed)

    def pages() -> range:
        first = chance.randint(0, 9)
        return range(first, chance.randint(first, 12))

    whole, taken = pages(), [pages() for _ in range(3)]
    left = [page for part in _without(whole, taken) for page in part]
    assert left == [page for page in whole if not any(page in other for other in taken)]
    assert list(intersection(whole, taken[0])) == [page for page in whole if page in taken[0]]
