"""What `agentstate bench console` makes of what it measured."""

from __future__ import annotations

from io import StringIO
from typing import Any

from rich.console import Console

from agentstate.benchmarks import console
from agentstate.benchmarks.console import Plan, Requests

PLAN = Plan(sessions=1000, entries_per_s=1000, rounds=3, seconds=1, repeats=3)


def requests() -> Requests:
    without = [[1.0] * 98 + [10.0, 10.0]] * 3
    beside = [[2.0] * 98 + [slow, slow] for slow in (15.0, 15.0, 30.0)]
    return Requests(without, beside, {False: [1000.0] * 3, True: [1000.0, 900.0, 800.0]}, fetched=7)


def test_requests_are_compared_over_all_rounds() -> None:
    without, beside = requests().rows("sqlite", "client")
    assert (without["viewer"], without["requests"], without["p50_ms"], without["p99_ms"]) == (None, 300, 1.0, 10.0)
    assert "p99_ratio" not in without
    assert (beside["viewer"], beside["p50_ratio"], beside["p99_ratio"]) == ("client", 2.0, 1.5)
    assert beside["p50_ratio_95"] == [2.0, 2.0]
    low, high = beside["p99_ratio_95"]
    assert low == 1.5 and high == 3.0, "one round of three was slower"
    assert (beside["entries_per_s"], beside["fetched"]) == (900.0, 7)


def test_one_round_has_no_interval_but_itself() -> None:
    assert console.ratio([[1.0]], [[3.0]], 0.99) == (3.0, [3.0, 3.0])


def rows() -> list[dict[str, Any]]:
    found = {"overview": [("SELECT  1\nFROM a", ()), ("SELECT 2", ())], console.STREAM: [("SELECT 3", ())]}
    ms = {"overview": [[1.0, 2.0, 9.0], [30.0, 25.0, 26.0]], console.STREAM: [[0.5, 0.5, 0.5]]}
    return [
        *requests().rows("sqlite", "client"),
        *console.page_rows("sqlite", found, ms, {"overview": 12.0}, {"overview": [310.0, 290.0, 400.0]}),
    ]


def test_a_page_has_its_statements_their_times_and_its_paints() -> None:
    overview, stream = rows()[2:]
    assert overview["statements"] == [
        {"sql": "SELECT 1 FROM a", "best_ms": 1.0, "p50_ms": 2.0, "worst_ms": 9.0},
        {"sql": "SELECT 2", "best_ms": 25.0, "p50_ms": 26.0, "worst_ms": 30.0},
    ]
    assert (overview["answered_ms"], overview["paint_p50_ms"], overview["paint_worst_ms"]) == (12.0, 310.0, 400.0)
    assert "answered_ms" not in stream and "paint_p50_ms" not in stream


def test_tables_show_what_was_measured_and_remarks_what_misses_a_goal() -> None:
    output = StringIO()
    terminal = Console(file=output, width=200)
    for table in console.tables(rows()):
        terminal.print(table)
    shown = output.getvalue()
    for expected in (
        "not open",
        "seen by client",
        "1.50 (1.50–3.00)",
        "25.0 / 26.0 / 30.0",
        "310 / 400",
        "12.0",
        "0.5 / 0.5",
    ):
        assert expected in shown, expected
    told = list(console.remarks(rows(), PLAN))
    assert [line.partition(": ")[2].split()[0] for line in told] == ["900", "with", "26.0", "painted"]
