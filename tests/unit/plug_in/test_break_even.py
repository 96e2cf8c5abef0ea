from __future__ import annotations

import math
import random

import pytest

from engine_patch.break_even import BreakEven, Line

PAGE, PAGE_BYTES = 64, 1_000_000


def prefill_s(parts: list[tuple[int, int]], token_s: float) -> float:
    return 0.010 + sum(new * token_s + new * (had + new / 2) * 1e-9 for had, new in parts)


def taught(
    *, token_s: float, fixed_s: float, bytes_per_s: float = 2e9, noise: float = 0.02, steps: int = 60
) -> BreakEven:
    """One that has seen prefills of ``token_s`` a token, and restores that make a step so much longer."""
    chance = random.Random(0)
    known = BreakEven()
    for _ in range(steps):
        parts = [(chance.randrange(8000), chance.randrange(1, 2000)) for _ in range(chance.randrange(1, 4))]
        known.stepped(parts, prefill_s(parts, token_s) * chance.gauss(1, noise))
    for _ in range(steps):
        parts, pages = [(chance.randrange(64, 8000), 24)], chance.randrange(1, 60)
        wait_s = fixed_s + pages * PAGE_BYTES / bytes_per_s
        plain_s = prefill_s(parts, token_s)
        known.restored(parts, (plain_s + wait_s) * chance.gauss(1, noise), pages * PAGE_BYTES, wait_s)
    return known


def computes(known: BreakEven, pages: int, cached: int = 0, rid: str = "") -> bool:
    rid = rid or f"{pages}-{cached}-{random.random()}"
    return known.computes(rid, pages, known.word(cached, pages * PAGE, pages * PAGE_BYTES))


def test_a_line_is_found_in_noise_and_is_less_sure_away_from_what_it_saw() -> None:
    chance, line = random.Random(1), Line(2)
    for _ in range(200):
        x = chance.uniform(1, 10)
        line.observe((1, x), (3 + 2 * x) * chance.gauss(1, 0.01))
    low, high = line.bounds((1, 5))
    assert low < 13 < high < 1.02 * low
    far_low, far_high = line.bounds((1, 1000))
    assert far_low < 2003 < far_high
    assert far_high - far_low > 100 * (high - low)


def test_a_line_follows_what_changes() -> None:
    line = Line(2)
    for speed in (1.0, 3.0):
        for x in [1, 2, 5, 9] * 200:
            line.observe((1, x), speed * x)
    low, high = line.bounds((0, 1))
    assert low == pytest.approx(3, rel=0.05) and high == pytest.approx(3, rel=0.05)


def test_a_line_says_nothing_of_too_few_observations_or_of_what_never_varied() -> None:
    line = Line(2)
    for x in range(9):
        line.observe((1, x), 1 + x)
    assert line.bounds((1, 4)) == (0, math.inf)
    for _ in range(100):
        line.observe((1, 4), 5)
    assert line.bounds((1, 4))[1] < math.inf
    line = Line(2)
    for _ in range(100):
        line.observe((1, 4), 5)
    assert line.bounds((1, 4)) == (0, math.inf)


def test_a_short_prefix_is_computed_and_a_long_one_restored_where_that_is_faster() -> None:
    # 64 tokens: 3.2 ms to compute, 8.5 ms to restore. Even at 16 pages: 51 ms against 16 ms.
    known = taught(token_s=50e-6, fixed_s=0.008)
    assert computes(known, 1)
    assert not computes(known, 16)
    assert not computes(known, 100)


def test_nothing_is_computed_by_a_hair() -> None:
    # 3.2 ms against 3.5 ms.
    assert not computes(taught(token_s=50e-6, fixed_s=0.003), 1)


def test_everything_is_restored_until_enough_is_known() -> None:
    assert not computes(BreakEven(), 1)
    assert not computes(taught(token_s=50e-6, fixed_s=0.008, steps=5), 1)


def test_what_contradicts_itself_is_not_relied_on() -> None:
    assert not computes(taught(token_s=50e-6, fixed_s=0.008, noise=0.5), 1)


def test_what_the_forward_does_not_wait_for_costs_nothing() -> None:
    chance, known = random.Random(2), taught(token_s=50e-6, fixed_s=0.008)
    for _ in range(400):
        parts = [(4000, 24)]
        known.restored(parts, prefill_s(parts, 50e-6), chance.randrange(1, 60) * PAGE_BYTES, waited_s=0.05)
    assert not computes(known, 1)


def test_an_answer_stays_the_same_and_counts_once() -> None:
    known = taught(token_s=50e-6, fixed_s=0.008)
    assert all(computes(known, 1, rid="r") for _ in range(100))
    assert (known.stats.computed, known.stats.explored) == (1, 0)
    # What has left the device in the meantime is another question.
    assert not computes(known, 100, rid="r")


def test_one_of_many_is_restored_all_the_same() -> None:
    known = taught(token_s=50e-6, fixed_s=0.008)
    assert sum(not computes(known, 1, rid=str(number)) for number in range(320)) == 10
    assert (known.stats.computed, known.stats.explored) == (310, 10)
