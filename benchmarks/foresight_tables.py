"""The figures of `benchmarks/foresight.py` over seeds: tables for a page and for a terminal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

Row = dict[str, Any]
Key = tuple[str, str, int, float, float]
INFINITE, ORACLE, LRU, SIMPLE, LEARNED, SIGNALS = "infinite pool", "oracle", "LRU", "simple", "learned", "signals"


@dataclass(frozen=True)
class Table:
    """``left`` columns are names, the others figures."""

    title: str
    header: list[str]
    rows: list[list[str]]
    left: int = 1


class Rows:
    """Rows by what they are about; figures of several seeds as their median and, in brackets, their least and most."""

    def __init__(self, rows: Sequence[Row]):
        self._of: dict[Key, dict[str, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
        for row in rows:
            if row["section"] != "capacity":
                key = row["section"], row["workload"], row["agents"], row["pool"], row["drive_gb_per_s"]
                self._of[key][row["variant"]][row["seed"]] = row
        self.capacity = [row for row in rows if row["section"] == "capacity"]

    def keys(self, section: str) -> list[Key]:
        return [key for key in self._of if key[0] == section]

    def variants(self, key: Key) -> list[str]:
        return list(self._of[key])

    def at(self, key: Key, variant: str, seed: int) -> Row:
        return self._of[key][variant][seed]

    def values(self, key: Key, variant: str, figure: Callable[[Row], float]) -> list[float]:
        return [figure(row) for row in self._of[key].get(variant, {}).values()]

    def ratios(self, key: Key, variant: str, other: str, figure: Callable[[Row], float]) -> list[float]:
        """The figure of a variant over that of another one, seed by seed."""
        of, found = self._of[key], []
        for seed, row in of.get(variant, {}).items():
            if seed in of[other] and figure(of[other][seed]):
                found.append(figure(row) / figure(of[other][seed]))
        return found

    def ways(self, key: Key, variant: str, figure: Callable[[Row], float], start: str = LRU) -> list[float]:
        """How much of the distance from ``start`` to the oracle is gone, seed by seed."""
        of, found = self._of[key], []
        for seed, row in of.get(variant, {}).items():
            whole = figure(of[start][seed]) - figure(of[ORACLE][seed])
            if abs(whole) > 1e-9:
                found.append((figure(of[start][seed]) - figure(row)) / whole)
        return found


def figure(name: str) -> Callable[[Row], float]:
    return lambda row: float(row[name])


MEAN, P50, P90, P99 = (figure(f"ttft_{share}_s") for share in ("mean", "p50", "p90", "p99"))
AT_HIT = figure("at_hit")


def ranged(values: Sequence[float], form: str) -> str:
    """The median, and the range if there is one."""
    if not values:
        return ""
    low, middle, high = (form.format(value) for value in (min(values), median(values), max(values)))
    return middle if low == high else f"{middle} ({low}–{high})"


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """Every table that the rows are enough for."""
    all_rows = Rows(rows)
    if goals := _goals(all_rows):
        yield Table("Goals", ["goal", "aim", "reached", ""], goals, left=2)
    for key in all_rows.keys("pools"):
        _, _, agents, pool, drive = key
        title = f"{agents} agents, pool W/{pool:g}, drive {drive:g} GB/s"
        yield Table(title, _HEADER, [_policy(all_rows, key, variant) for variant in all_rows.variants(key)])
    for key in all_rows.keys("orders"):
        misses = partial(_misses, all_rows, key)
        shown = [
            [
                variant,
                ranged(all_rows.ratios(key, variant, "Bélády", misses), "{:.2f}"),
            ]
            for variant in all_rows.variants(key)
            if variant != INFINITE
        ]
        yield Table("Misses by order", ["order", "bytes read ÷ Bélády's"], shown)
    for section, title in (
        ("workloads", "Other workloads"),
        ("adversaries", "Adversaries"),
        ("loads", "Fewer agents, the same pool"),
    ):
        if keys := all_rows.keys(section):
            yield Table(title, _OTHERS, list(_others(all_rows, keys)), left=3)
    if all_rows.capacity:
        yield _capacity(all_rows.capacity)


_HEADER = ["policy", "TTFT mean, s", "p50", "p90", "p99", "at a hit", "way: mean", "p90", "at a hit"]
_HEADER += ["read wait, s", "memory wait", "on device", "in host memory", "ahead, TB", "unserved"]
_OTHERS = ["workload", "agents, pool", "policy", "TTFT mean, s", "p50", "p90", "p99", "mean ÷ simple", "p90 ÷ simple"]


def _policy(rows: Rows, key: Key, variant: str) -> list[str]:
    def shown(figure_of: Callable[[Row], float], form: str) -> str:
        return ranged(rows.values(key, variant, figure_of), form)

    ways = ["", "", ""]
    if variant not in (INFINITE, LRU):
        ways = [ranged(rows.ways(key, variant, of), "{:.0%}") for of in (MEAN, P90, AT_HIT)]
    return [
        variant,
        *(shown(of, "{:,.3f}") for of in (MEAN, P50, P90)),
        shown(P99, "{:,.2f}"),
        shown(AT_HIT, "{:.0%}"),
        *ways,
        shown(figure("read_wait_s"), "{:,.3f}"),
        shown(figure("memory_wait_s"), "{:,.3f}"),
        shown(figure("hit_device"), "{:.0%}"),
        shown(figure("hit_host"), "{:.0%}"),
        shown(lambda row: row["planned_bytes"] / 1e12, "{:.2f}"),
        shown(figure("unserved"), "{:,.0f}"),
    ]


def _misses(rows: Rows, key: Key, row: Row) -> float:
    """What was read besides what an infinite pool reads, which has to be read at least once."""
    return float(row["bytes_read"] - rows.at(key, INFINITE, row["seed"])["bytes_read"])


def _others(rows: Rows, keys: Sequence[Key]) -> Iterator[list[str]]:
    for key in keys:
        _, workload, agents, pool, _ = key
        for variant in rows.variants(key):
            compared = ["", ""]
            if variant not in (INFINITE, SIMPLE):
                compared = [ranged(rows.ratios(key, variant, SIMPLE, of), "{:.2f}") for of in (MEAN, P90)]
            timed = [ranged(rows.values(key, variant, of), "{:,.3f}") for of in (MEAN, P50, P90, P99)]
            yield [workload, f"{agents}, W/{pool:g}", variant, *timed, *compared]


def _capacity(rows: Sequence[Row]) -> Table:
    by: dict[tuple[str, float], list[float]] = defaultdict(list)
    for row in rows:
        by[row["variant"], row["drive_gb_per_s"]].append(row["agents"])
    drives = sorted({drive for _, drive in by})
    shown = [
        [variant, *(ranged(by[variant, drive], "{:.0f}") for drive in drives)]
        for variant in dict.fromkeys(variant for variant, _ in by)
    ]
    return Table("Agents that an engine serves", ["policy", *(f"{drive:g} GB/s" for drive in drives)], shown)


def _goals(rows: Rows) -> list[list[str]]:
    """What was aimed at, for the figures that are there."""
    found: list[list[str]] = []

    def goal(name: str, aim: str, values: Sequence[float], reached: Callable[[float], bool], form: str) -> None:
        if values:
            found.append([name, aim, ranged(values, form), "yes" if reached(median(values)) else "**no**"])

    def most(name: str, limit: float, values: Sequence[float], form: str = "{:.2f}") -> None:
        goal(name, f"≤ {form.format(limit)}", values, lambda value: float(form.format(value)) <= limit, form)

    def least(name: str, limit: float, values: Sequence[float], form: str = "{:.0%}") -> None:
        goal(name, f"≥ {form.format(limit)}", values, lambda value: round(value, 2) >= limit, form)

    for key in rows.keys("pools"):
        _, _, _, pool, drive = key
        where = f"W/{pool:g}, {drive:g} GB/s"
        if pool == 4 and drive in (14, 3):
            most(
                f"simple, {where}: p90 ÷ infinite pool",
                1.1 if drive == 14 else 1.3,
                rows.ratios(key, SIMPLE, INFINITE, P90),
            )
            most(f"signals, {where}: p90 ÷ infinite pool", 1.03, rows.ratios(key, SIGNALS, INFINITE, P90))
        if pool == 6.6 and drive == 14:
            for name, of in (("mean", MEAN), ("p90", P90)):
                least(f"simple, {where}: way in the {name}", 0.75, rows.ways(key, SIMPLE, of))
            for name, of, limit in (("mean", MEAN, 0.95), ("p90", P90, 0.95), ("share at a hit", AT_HIT, 0.9)):
                least(f"signals, {where}: way in the {name}", limit, rows.ways(key, SIGNALS, of))
            share = rows.values(key, LEARNED, lambda row: row["within"] / max(1, row["forecasts"]))
            goal("learned: waits within their 80 % interval", "75–90%", share, lambda v: 0.75 <= v <= 0.9, "{:.0%}")
        if pool == 6.6 and drive == 3:
            most(f"simple, {where}: p99, s", 5.0, rows.values(key, SIMPLE, P99))
    everywhere = [key for section in ("pools", "workloads", "loads") for key in rows.keys(section)]
    for name, of in (("mean", MEAN), ("p90", P90)):
        worst = [
            median(rows.ratios(key, LEARNED, SIMPLE, of)) for key in everywhere if rows.ratios(key, LEARNED, SIMPLE, of)
        ]
        if worst:
            most(f"learned ÷ simple, {name}, the worst of {len(worst)} settings", 1.05, [max(worst)])
    for key in rows.keys("workloads"):
        if key[1] == "predictable tools":
            least("learned, predictable tools: way from simple in the p90", 0.4, rows.ways(key, LEARNED, P90, SIMPLE))
    for key in rows.keys("orders"):
        for variant, limit in (("learned", 1.25), ("announced", 1.05)):
            ratios = rows.ratios(key, variant, "Bélády", partial(_misses, rows, key))
            most(f"{variant}: misses ÷ Bélády's", limit, ratios)
    for name, of in (("mean", MEAN), ("p90", P90)):
        for variant in (LEARNED, SIGNALS):
            ratios = {key[1]: median(rows.ratios(key, variant, SIMPLE, of)) for key in rows.keys("adversaries")}
            if ratios:
                worst_of = max(ratios, key=lambda workload: ratios[workload])
                most(f"adversaries: {variant} ÷ simple, {name}, the worst ({worst_of})", 1.1, [ratios[worst_of]])
    by_drive: dict[float, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows.capacity:
        by_drive[row["drive_gb_per_s"]][row["variant"]][row["seed"]] = row["agents"]
    for drive, limit in ((14, 1.2), (3, 1.5), (50, 0.98)):
        if of_drive := by_drive.get(drive):
            for variant in (SIMPLE, SIGNALS):
                ratios_of = [count / max(1, of_drive[LRU][seed]) for seed, count in of_drive[variant].items()]
                least(f"agents served, {drive} GB/s: {variant} ÷ LRU", limit, ratios_of, "{:.2f}")
    return found
