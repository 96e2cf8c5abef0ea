from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agentstate.benchmarks.caches import ROOT, SegmentCache


def chain(length: int, capacity: int) -> SegmentCache:
    return SegmentCache([index - 1 for index in range(length)], [1] * length, capacity)


def test_the_end_of_a_path_leaves_first() -> None:
    cache = chain(4, 4)
    cache.insert([0, 1, 2, 3], 1.0)
    assert cache.make_room(2)
    assert cache.covered(3) == 1
    assert cache.resident_pages == 2


def test_the_least_recently_used_path_leaves_first() -> None:
    cache = SegmentCache([ROOT, 0, 0], [1, 1, 1], 3)
    cache.insert([0, 1], 1.0)
    cache.insert([2], 2.0)
    cache.use(1, 3.0)
    assert cache.make_room(1)
    assert 1 in cache
    assert 2 not in cache


def test_a_lock_holds_everything_before_it() -> None:
    cache = chain(3, 3)
    cache.insert([0, 1, 2], 1.0)
    cache.lock(1)
    assert not cache.make_room(2)
    assert cache.covered(2) == 1
    cache.unlock(1)
    assert cache.make_room(3)
    assert cache.covered(2) == ROOT


def test_reserved_pages_are_room_that_is_taken() -> None:
    cache = chain(2, 3)
    cache.insert([0, 1], 1.0)
    cache.reserved = 1
    assert cache.make_room(1)
    assert cache.covered(1) == 0


def test_what_is_demoted_leaves_first_and_what_others_share_stays() -> None:
    #  0 ─ 1 ─ 2
    #    └ 3
    cache = SegmentCache([ROOT, 0, 1, 0], [1] * 4, 4)
    cache.insert([0, 3], 1.0)
    cache.insert([1, 2], 2.0)
    cache.demote(2)
    assert cache.make_room(2)
    assert cache.covered(2) == 0
    assert cache.covered(3) == 3


class Plain:
    """The same rules in the plainest way: every use marks the whole path, every eviction looks at everything."""

    def __init__(self, parents: list[int], pages: list[int], capacity: int):
        self.parents, self.pages, self.capacity = parents, pages, capacity
        self.used: dict[int, float] = {}
        self.locks: list[int] = []

    def path(self, segment: int) -> list[int]:
        return [] if segment == ROOT else [*self.path(self.parents[segment]), segment]

    def use(self, segment: int, now_s: float) -> None:
        self.used.update((part, now_s) for part in self.path(segment))

    def make_room(self, pages: int) -> bool:
        while sum(self.pages[part] for part in self.used) + pages > self.capacity:
            held = {part for lock in self.locks for part in self.path(lock)} | {
                self.parents[part] for part in self.used
            }
            free = [part for part in self.used if part not in held]
            if not free:
                return False
            del self.used[min(free, key=lambda part: self.used[part])]
        return True


class CacheMachine(RuleBasedStateMachine):
    """Random requests: what a path lacks is put in, as an engine does it. Marks are unique, so that there are no ties
    between two paths."""

    @initialize(data=st.data())
    def start(self, data: Any) -> None:
        parents = [ROOT]
        for index in range(1, 14):
            parents.append(data.draw(st.integers(ROOT, index - 1)))
        pages = data.draw(st.lists(st.integers(0, 3), min_size=14, max_size=14))
        self.cache = SegmentCache(parents, pages, 12)
        self.plain = Plain(parents, pages, 12)
        self.now_s = 0.0

    @rule(segment=st.integers(0, 13))
    def request(self, segment: int) -> None:
        self.now_s += 1
        base = self.cache.covered(segment)
        self.cache.lock(base)
        self.plain.locks.append(base)
        self.cache.use(base, self.now_s)
        self.plain.use(base, self.now_s)
        rest = [part for part in self.plain.path(segment) if part not in self.cache]
        pages = sum(self.plain.pages[part] for part in rest)
        room = self.cache.make_room(pages)
        assert room == self.plain.make_room(pages)
        self.cache.unlock(base)
        self.plain.locks.remove(base)
        if room:
            self.cache.insert(rest, self.now_s)
            self.plain.used.update((part, self.now_s) for part in rest)

    @rule(segment=st.integers(0, 13))
    def lock(self, segment: int) -> None:
        base = self.cache.covered(segment)
        if base != ROOT:
            self.cache.lock(base)
            self.plain.locks.append(base)

    @precondition(lambda self: self.plain.locks)
    @rule(data=st.data())
    def unlock(self, data: Any) -> None:
        segment = data.draw(st.sampled_from(self.plain.locks))
        self.cache.unlock(segment)
        self.plain.locks.remove(segment)

    @invariant()
    def both_hold_as_many_pages_and_whole_paths(self) -> None:
        if not hasattr(self, "cache"):
            return
        assert self.cache.resident_pages == sum(self.plain.pages[part] for part in range(14) if part in self.cache)
        assert {part for part in range(14) if part in self.cache} == set(self.plain.used)
        for segment in range(14):
            if segment in self.cache:
                assert all(part in self.cache for part in self.plain.path(segment))


TestCacheMachine = CacheMachine.TestCase


def test_with_values_the_least_valuable_path_leaves_first_and_is_told_of() -> None:
    #  0 ─ 1 ─ 2      3 ─ 4
    worth = {0: 5.0, 1: 5.0, 2: 5.0, 3: 2.0, 4: 2.0}
    dropped: list[int] = []
    cache = SegmentCache([ROOT, 0, 1, ROOT, 3], [1] * 5, 5, worth.__getitem__, dropped.append)
    cache.insert([3, 4], 9.0)
    cache.insert([0, 1, 2], 1.0)
    assert cache.make_room(1)
    assert dropped == [4]
    assert cache.could_make_room(2, below=3.0) is True
    assert cache.could_make_room(3, below=3.0) is False
    assert not cache.make_room(3, below=3.0)
    assert dropped == [4, 3]
    assert cache.make_room(3)
    assert dropped == [4, 3, 2]


def test_what_is_locked_or_of_infinite_value_stays() -> None:
    worth = {0: float("inf"), 1: 1.0}
    cache = SegmentCache([ROOT, ROOT], [1, 1], 2, worth.__getitem__)
    cache.insert([0], 1.0)
    cache.insert([1], 1.0)
    cache.lock(1)
    assert not cache.make_room(1)
    cache.unlock(1)
    assert cache.make_room(1)
    assert not cache.make_room(2)
    assert 0 in cache and 1 not in cache


def test_what_several_share_leaves_after_what_they_do_not() -> None:
    #  0 ─ 1      each worth less than what they share
    #    └ 2
    worth = {0: 9.0, 1: 1.0, 2: 2.0}
    cache = SegmentCache([ROOT, 0, 0], [1] * 3, 3, worth.__getitem__)
    cache.insert([0, 1], 1.0)
    cache.insert([2], 1.0)
    assert cache.make_room(2)
    assert 0 in cache and cache.resident_pages == 1


def test_a_segment_can_be_taken_from_amid_a_path() -> None:
    worth = {0: 1.0, 1: 1.0, 2: 1.0}
    cache = SegmentCache([ROOT, 0, 1], [1] * 3, 3, worth.__getitem__)
    cache.insert([0, 1, 2], 1.0)
    cache.take(1)
    assert 0 in cache and 2 in cache
    assert cache.resident_pages == 2
    assert cache.make_room(3)
    assert cache.resident_pages == 0
