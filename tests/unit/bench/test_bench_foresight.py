"""What a simulated engine that looks ahead does: worked out by hand, and in the study."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
from by_hand import COST, GB

from agentstate.benchmarks import agents, foresight, foresight_tables, report, results
from agentstate.benchmarks.fleet import Fleet, Foresight, Outcome, Policy, Served
from agentstate.benchmarks.simulator import Simulation
from agentstate.benchmarks.traces import ROOT, Announcements, Gap, Turn, Workload
from agentstate.lookahead.policies import lru, planner, ttl

FLEET = Fleet(engines=1, device_tokens=250, staging_bytes=100 * GB, host_bytes=0, quota_bytes=1000 * GB)
HELD = Policy("held", store=True, overlap=True, read_at_arrival=True, hold=True, ordering=lru)
SIMPLE = replace(HELD, order=True, exclusive=True)


class Agents:
    """Sessions by hand: each begins with a prompt of so many tokens and comes back once, with ten more."""

    def __init__(self) -> None:
        self.workload = Workload("by hand")

    def add(self, tokens: int, start_s: float, gap_s: float | None = None, gap: Gap = Gap.TOOL) -> None:
        prompt = self.workload.add(ROOT, tokens)
        turns = [Turn(Gap.FIRST, 0.0, start_s, prompt, self.workload.add(prompt, 1))]
        if gap_s is not None:
            again = self.workload.add(turns[0].answer, 10)
            turns.append(Turn(gap, gap_s, 0.0, again, self.workload.add(again, 1)))
        self.workload.sessions.append(turns)

    def run(self, policy: Policy, fleet: Fleet = FLEET, **window: object) -> Outcome:
        return Simulation(self.workload, COST, fleet, policy, **window).run()  # type: ignore[arg-type]


def returned(outcome: Outcome, session: int = 0) -> Served:
    (served,) = [request for request in outcome.served if (request.session, request.turn) == (session, 1)]
    return served


def pushed_out() -> Agents:
    """One session of 200 tokens that is away from 20 s to 120 s, while another one needs the whole device."""
    found = Agents()
    found.add(200, 0.0, 100.0)
    found.add(230, 40.0)
    return found


def test_a_request_is_admitted_when_its_forward_will_not_wait() -> None:
    served = returned(pushed_out().run(HELD))
    # Two seconds of reading, and the last of four layers of a forward of 1.1 s.
    assert served.ttft_s == pytest.approx(2.0 + 1.1 / 4)
    assert served.nvme_tokens == 200
    assert served.read_wait_s == pytest.approx(2.0 + 1.1 / 4 - 1.1)


def test_what_the_device_drops_is_kept_in_host_memory_and_leaves_it_for_the_device() -> None:
    found = pushed_out()
    outcome = found.run(SIMPLE, replace(FLEET, host_bytes=25 * COST.page_bytes))
    served = returned(outcome)
    assert (served.device_tokens, served.host_tokens, served.nvme_tokens) == (0, 200, 0)
    assert outcome.bytes_read == 0
    assert served.ttft_s == pytest.approx(1.1 + 0.2 / 4)
    # Three of 100 tokens: what came back to the device makes room in host memory for what that displaces.
    found = Agents()
    for start_s in (0.0, 30.0, 60.0):
        found.add(100, start_s, 100.0)
    outcome = found.run(SIMPLE, replace(FLEET, device_tokens=240, host_bytes=10 * COST.page_bytes))
    assert outcome.bytes_read == 0
    assert [returned(outcome, session).host_tokens for session in range(3)] == [100, 100, 100]


def test_host_memory_keeps_what_is_worth_more() -> None:
    """The device drops one that comes back, and later one that never does. Only the oracle knows."""
    found = Agents()
    found.add(100, 0.0, 100.0)
    found.add(230, 12.0)
    found.add(230, 40.0)
    fleet = replace(FLEET, host_bytes=10 * COST.page_bytes)
    exact = replace(SIMPLE, ordering=planner, foresight=Foresight.EXACT)
    assert returned(found.run(exact, fleet)).host_tokens == 100
    assert returned(found.run(SIMPLE, fleet)).host_tokens == 0


def test_queued_requests_that_miss_the_fewest_pages_come_first() -> None:
    """Two wait while a third is computed, the larger one first; there is room for one of them."""
    found = Agents()
    found.add(50, 0.0)
    found.add(100, 1.0)
    found.add(20, 2.0)
    room = replace(FLEET, device_tokens=120)

    def ended_s(policy: Policy) -> dict[int, float]:
        return {request.session: request.arrived_s + request.ttft_s for request in found.run(policy, room).served}

    assert ended_s(HELD) == pytest.approx({0: 5.0, 1: 15.0, 2: 17.0}, abs=0.1)
    assert ended_s(replace(SIMPLE, exclusive=False)) == pytest.approx({0: 5.0, 1: 17.0, 2: 7.0}, abs=0.1)


def test_who_has_waited_for_long_is_not_passed_any_more() -> None:
    """Small requests keep coming; a large one waits for ten seconds at most."""
    found = Agents()
    found.add(200, 0.0)
    found.add(230, 1.0)
    for number in range(20):
        found.add(100, 2.0 + number)
    outcome = found.run(replace(SIMPLE, exclusive=False))
    large = next(request for request in outcome.served if request.session == 1)
    others = sorted(request.arrived_s + request.ttft_s for request in outcome.served if request.session > 1)
    assert large.ttft_s + 1.0 < others[5]


def test_a_plan_brings_back_what_is_due_and_an_empty_one_does_nothing() -> None:
    exact = replace(SIMPLE, ordering=planner, foresight=Foresight.EXACT, plan=True)
    outcome = pushed_out().run(exact)
    assert returned(outcome).fetched_tokens == 200
    assert outcome.planned_bytes == outcome.bytes_read == 20 * COST.page_bytes
    blind = pushed_out().run(replace(SIMPLE, ordering=planner, plan=True))
    assert blind.planned_bytes == 0
    assert blind.served == pushed_out().run(SIMPLE).served


def test_a_person_who_types_is_expected() -> None:
    found = Agents()
    found.add(200, 0.0, 100.0, Gap.PERSON)
    found.add(230, 40.0)
    assert returned(found.run(SIMPLE)).device_tokens == 0
    typed = found.run(replace(SIMPLE, typing_s=3.0))
    assert returned(typed).fetched_tokens == 200
    late = returned(found.run(replace(SIMPLE, typing_s=1.0)))
    assert late.ttft_s == pytest.approx(1.0 + 1.1 / 4)


def test_a_pinned_session_stays_and_others_wait_for_its_room() -> None:
    outcome = pushed_out().run(replace(SIMPLE, ordering=ttl(60.0)))
    (other,) = [request for request in outcome.served if request.session == 1]
    # From 40 s on, until 60 s after 20 s, when the pin ends; tried once a second.
    assert 40.0 <= other.ttft_s - 23.0 <= 41.5
    assert other.memory_wait_s == pytest.approx(other.ttft_s - 23.0)


def test_with_a_window_only_what_arrives_in_it_counts() -> None:
    found = Agents()
    for start_s in (0.0, 100.0, 300.0):
        found.add(50, start_s)
    outcome = found.run(SIMPLE, window=(50.0, 200.0))
    assert [request.session for request in outcome.served] == [1]
    assert outcome.duration_s < 300.0
    counted = found.run(SIMPLE, window=(50.0, 200.0), counted={(1, 0), (2, 0)})
    assert [request.session for request in counted.served] == [1, 2]
    assert counted.unserved == 0


def test_what_is_not_served_in_time_counts_with_its_wait() -> None:
    found = Agents()
    found.add(230, 10.0)
    found.add(230, 11.0)
    outcome = found.run(SIMPLE, window=(0.0, 15.0), counted={(0, 0), (1, 0), (1, 1)})
    assert outcome.unserved == 3
    assert max(request.ttft_s for request in outcome.served) < 30.0


def test_generated_agents_have_the_published_times_whatever_tools_say() -> None:
    for predictable in (0.0, 0.63, 0.98):
        workload = agents.generated(24, 2000.0, 3, predictable=predictable)
        gaps = sorted(turn.gap_s for turn in workload.turns() if turn.gap is Gap.TOOL)
        assert median(gaps) == pytest.approx(0.3, rel=0.5)
        assert 13.6 / 2 < gaps[int(0.9 * len(gaps))] < 13.6 * 2
    assert agents.generated(4, 500.0, 1) == agents.generated(4, 500.0, 1) != agents.generated(4, 500.0, 2)


def test_tools_say_how_long_a_wait_is_if_they_are_predictable() -> None:
    def spread(predictable: float) -> float:
        """The mean deviation of logarithms from the mean of their own tool."""
        by_tool: dict[tuple[str, str], list[float]] = {}
        for turn in agents.generated(32, 2000.0, 3, predictable=predictable).turns():
            if turn.gap is Gap.TOOL:
                by_tool.setdefault((turn.tool, turn.head), []).append(math.log(turn.gap_s))
        deviations = [abs(x - sum(own) / len(own)) for own in by_tool.values() for x in own]
        return sum(deviations) / len(deviations)

    assert spread(0.98) < 0.5 * spread(0.63) < 0.5 * spread(0.0)


def test_recorded_agents_go_on_with_what_they_share() -> None:
    workload = agents.weka(6, 1500.0, 1)
    assert all(workload.sessions)
    goes_on = [
        turn.prompt == before.answer or workload.parents[turn.prompt] == before.answer
        for turns in workload.sessions
        for before, turn in zip(turns, turns[1:], strict=False)
        if not turn.fresh
    ]
    assert sum(goes_on) > 0.8 * len(goes_on)
    assert set(workload.stored) >= {workload.path(turns[0].prompt)[0] for turns in workload.sessions}


def test_drift_waves_and_announcements_are_what_they_say() -> None:
    plain = agents.generated(8, 1000.0, 5)
    slow = agents.generated(8, 1000.0, 5, drift=agents.Drift(0.0, 10.0))
    tool = [turn for turn in plain.sessions[0] if turn.gap is Gap.TOOL][0]
    slower = [turn for turn in slow.sessions[0] if turn.gap is Gap.TOOL][0]
    assert slower.gap_s == pytest.approx(10 * tool.gap_s)
    assert Announcements().say(10.0, 0.0) == pytest.approx(10.0)
    assert Announcements(factor=0.1).say(10.0, 0.0) == pytest.approx(1.0)
    noise = Announcements(noise=True)
    assert noise.say(1.0, 0.5) == noise.say(100.0, 0.5) != noise.say(1.0, -0.5)
    telling = agents.telling(agents.generated, noise=True)(2, 100.0, 1)
    assert telling.announced.noise
    wave = agents.generated(4, 600.0, 5, wave_s=30.0)
    assert min(turn.gap_s for turn in wave.turns() if turn.gap is not Gap.FIRST) > 0.0


@pytest.fixture(scope="module")
def rows() -> list[dict[str, object]]:
    """A little study: a few agents, a short time, one pool."""
    saved = foresight.AGENTS, foresight.HORIZON_S, foresight.WARM_S
    foresight.AGENTS, foresight.HORIZON_S, foresight.WARM_S = 10, 700.0, 300.0
    try:
        found: list[dict[str, object]] = []
        for seed in (1, 2):
            hard = dict(agents=10, pool=4.0, drive_gb_per_s=14, seed=seed, sized_for=10)
            chosen = [policy for policy in foresight.POLICIES if not policy.name.startswith("TTL")]
            found += foresight.Case("pools", "generated", policies=tuple(chosen), **hard).rows()  # type: ignore[arg-type]
            found += foresight.Case("orders", "generated", policies=foresight.ORDERS, **hard).rows()  # type: ignore[arg-type]
            few = tuple(policy for policy in chosen if policy.name in ("simple", "learned", "signals"))
            found += foresight.Case("adversaries", "announced noise", policies=few, **hard).rows()  # type: ignore[arg-type]
        return found
    finally:
        foresight.AGENTS, foresight.HORIZON_S, foresight.WARM_S = saved
        foresight._reference.cache_clear()
        foresight._working_set.cache_clear()


def test_every_policy_serves_the_same_requests(rows: list[dict[str, object]]) -> None:
    counts: dict[object, set[object]] = {}
    for row in rows:
        counts.setdefault((row["section"], row["workload"], row["seed"]), set()).add(row["requests"])
        assert row["unserved"] == 0
    assert all(len(found) == 1 for found in counts.values())


def test_the_oracle_reads_ahead_and_hits_more_than_lru(rows: list[dict[str, object]]) -> None:
    for seed in (1, 2):
        of = {row["variant"]: row for row in rows if row["section"] == "pools" and row["seed"] == seed}
        assert of["oracle"]["hit_device"] > of["simple"]["hit_device"]  # type: ignore[operator]
        assert of["infinite pool"]["hit_device"] >= of["oracle"]["hit_device"]  # type: ignore[operator]
        assert of["LRU"]["planned_bytes"] == of["simple"]["planned_bytes"] == 0
        assert of["oracle"]["planned_bytes"] > 0  # type: ignore[operator]
        assert of["learned"]["forecasts"] > 0  # type: ignore[operator]


def orders(*times: float) -> list[dict[str, object]]:
    """Orders of which LRU reads so many times as much as Bélády's, of each seed, besides what has to be read."""
    found: list[dict[str, object]] = []
    for seed, of in enumerate(times):
        case = dict(section="orders", workload="generated", agents=10, pool=4.0, drive_gb_per_s=14, seed=seed)
        least = 1000 * (seed + 1)
        for variant, more in (("infinite pool", 0.0), ("LRU", of), ("Bélády", 1.0)):
            found.append(case | dict(variant=variant, bytes_read=least + int(100 * more)))
    return found


def test_tables_have_a_median_and_a_range_over_seeds(rows: list[dict[str, object]]) -> None:
    capacity = [
        dict(section="capacity", workload="generated", drive_gb_per_s=14, seed=seed, variant=variant, agents=count)
        for seed, variant, count in ((1, "LRU", 50), (2, "LRU", 40), (1, "simple", 60), (2, "simple", 60))
    ]
    tables = {table.title: table for table in foresight_tables.tables([*rows, *capacity])}
    pools = tables["10 agents, pool W/4, drive 14 GB/s"]
    assert [cells[0] for cells in pools.rows][:2] == ["infinite pool", "LRU"]
    for table in tables.values():
        assert {len(cells) for cells in table.rows} == {len(table.header)}, table.title
    oracle = next(cells for cells in pools.rows if cells[0] == "oracle")
    assert oracle[6] == "100%"
    assert tables["Agents that an engine serves"].rows == [["LRU", "45 (40–50)"], ["simple", "60"]]
    goals = {cells[0]: cells for cells in tables["Goals"].rows}
    misses = {table.title: table.rows for table in foresight_tables.tables(orders(2.0, 3.0))}["Misses by order"]
    assert misses == [["LRU", "2.50 (2.00–3.00)"], ["Bélády", "1.00"]]
    assert goals["agents served, 14 GB/s: simple ÷ LRU"][1:] == ["≥ 1.20", "1.35 (1.20–1.50)", "yes"]
    assert [cells[0] for cells in tables["Misses by order"].rows] == ["LRU", "learned", "announced", "Bélády"]


def test_the_page_has_the_tables_and_a_picture_a_pool(rows: list[dict[str, object]], tmp_path: Path) -> None:
    asked = {"command": "agentstate bench replay --simulate", "seeds": [1, 2]}
    results.write(tmp_path / "raw" / "foresight.json", results.record("foresight", asked, rows))
    report.write(tmp_path / "raw", tmp_path / "performance.md")
    page = (tmp_path / "performance.md").read_text()
    assert "`agentstate bench replay --simulate`, seeds 1, 2." in page
    assert "### 10 agents, pool W/4, drive 14 GB/s" in page
    assert "| oracle |" in page
    assert (tmp_path / "performance" / "foresight-1-dark.svg").exists()


def test_the_default_study_has_every_section_for_every_seed_and_full_adds_to_it() -> None:
    few, all_of = foresight.cases([1, 2]), foresight.cases([1, 2], full=True)
    assert {case.section for case in few} == {"pools", "orders", "workloads", "adversaries", "loads"}
    for case in few:
        assert case in all_of
        assert replace(case, seed=3 - case.seed) in few
    assert {case.workload for case in few} == set(foresight.WORKLOADS)
    assert {case.drive_gb_per_s for case in all_of} == {3, 14, 50}
