"""What is told of a fault: the rounds that count, their quantiles, and the faults themselves on a store of its own."""

from __future__ import annotations

import json
import math

import pytest

from agentstate.benchmarks import results
from agentstate.benchmarks.outage import Fault, Phase, Plan, Round, quantile, quantile_ratio


def rounds(*availables: bool, with_s: float = 2.0, without_s: float = 1.0) -> list[Round]:
    """The last request of every round takes ten times as long on either side."""
    return [
        Round(10.0 * (number + 1), available, [with_s, 10 * with_s], [without_s, 10 * without_s])
        for number, available in enumerate(availables)
    ]


@pytest.mark.parametrize(
    "values, share, expected",
    [([3, 1, 2], 0.5, 2), ([1, 2], 0.5, 1), ([1, 2, 3], 0.99, 3), ([5], 0.5, 5), (list(range(1, 101)), 0.99, 99)],
)
def test_a_quantile_is_a_value_that_was_measured(values: list[float], share: float, expected: float) -> None:
    assert quantile(values, share) == expected


def test_nothing_has_no_quantile() -> None:
    assert math.isnan(quantile([], 0.5))


def test_a_ratio_of_quantiles_is_that_of_all_requests_and_not_of_pairs() -> None:
    # One slow request in the second round of either side: the ratio of the longest is 1, whatever came beside it.
    measured = [Round(1, True, [1.0, 1.0], [1.0, 8.0]), Round(2, True, [1.0, 8.0], [1.0, 1.0])]
    ratio, low, high = quantile_ratio(measured, 0.99)
    assert ratio == 1.0
    assert (low, high) == (1 / 8, 8.0)
    assert quantile_ratio(measured, 0.99) == (ratio, low, high)


def test_rounds_count_from_the_one_after_that_in_which_the_store_went_out_of_use() -> None:
    before, after = rounds(True, False, with_s=9.0), rounds(False, False, True)
    row = Phase(Fault.STOPPED, 5, before + after).row()
    assert (row["opened_s"], row["counted_rounds"], row["rounds"], row["requests"]) == (20.0, 3, 5, 10)
    assert (row["p50_to_without"], row["p99_to_without"], row["p99_s"]) == (2.0, 2.0, 20.0)


def test_all_rounds_count_where_the_store_stays_in_use_or_goes_out_of_it_in_the_last() -> None:
    for availables, opened_s in (((True, True), None), ((True, False), 20.0)):
        row = Phase(Fault.SLOW, 5, rounds(*availables)).row()
        assert (row["opened_s"], row["counted_rounds"]) == (opened_s, 2)


def test_a_row_is_kept_as_json_with_what_never_came_back() -> None:
    row = Phase(Fault.WRONG, 5, rounds(True), wrong=1, failed=2, pages_shared=3).row()
    kept = json.loads(json.dumps(row))
    assert (kept["fault"], kept["back_s"], kept["wrong"], kept["failed"]) == ("wrong bytes", None, 1, 2)
    assert results.record("outage", {}, [row])["kind"] in results.KINDS


def test_the_store_is_well_at_first_and_no_longer_than_a_fault_lasts() -> None:
    assert [fault for fault, _ in Plan().phases] == list(Fault)
    assert Plan(minutes=0.5, faults=(Fault.SLOW,)).phases == ((Fault.NONE, 0.5), (Fault.SLOW, 0.5))
    assert Plan().phases[0][1] < Plan().phases[1][1]
