from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agentstate.tiers import Range
from agentstate.tiers.ranges import spans

DATA = bytes(range(256)) * 40


def ranges_of(wanted: list[tuple[int, int]]) -> tuple[list[Range], list[bytearray]]:
    memory = [bytearray(n_bytes) for _, n_bytes in wanted]
    return [Range(offset, memoryview(into)) for (offset, _), into in zip(wanted, memory, strict=True)], memory


@given(
    st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 1200)), max_size=12),
    st.integers(0, 2000),
    st.integers(1, 3000),
)
def test_every_byte_of_every_range_is_in_one_part_and_no_request_is_longer_than_it_may_be(
    wanted: list[tuple[int, int]], gap: int, most: int
) -> None:
    ranges, memory = ranges_of(wanted)
    found = spans(ranges, gap, most)
    written = 0
    for start, end, parts in found:
        assert 0 < end - start <= most
        for offset, into in parts:
            assert start <= offset and offset + len(into) <= end
            into[:] = DATA[offset : offset + len(into)]
            written += len(into)
    assert written == sum(n_bytes for _, n_bytes in wanted)
    assert [bytes(into) for into in memory] == [DATA[offset : offset + n_bytes] for offset, n_bytes in wanted]


def test_ranges_near_each_other_are_one_request_and_those_apart_are_not() -> None:
    ranges, _ = ranges_of([(5000, 100), (0, 100), (150, 100), (5100, 10)])
    assert [(start, end) for start, end, _ in spans(ranges, 50, 10_000)] == [(0, 250), (5000, 5110)]
    assert [(start, end) for start, end, _ in spans(ranges, 49, 10_000)] == [(0, 100), (150, 250), (5000, 5110)]
    assert [(start, end) for start, end, _ in spans(ranges, 5000, 10_000)] == [(0, 5110)]
