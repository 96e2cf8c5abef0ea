"""What holding, ordering, a host tier, signals and forecasts are worth on one engine, simulated.

Every policy serves the same requests: those that an engine with an infinite pool gets within the window. A pool is a
fraction of the working set, which is the sum of all agents' contexts, on average. Each seed is another workload, and a
figure is compared with those of the same seed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

from agentstate.benchmarks import agents
from agentstate.benchmarks.agents import Drift, Make
from agentstate.benchmarks.calibration import Calibration
from agentstate.benchmarks.fleet import Fleet, Foresight, Outcome, Policy
from agentstate.benchmarks.simulator import Simulation
from agentstate.benchmarks.study import SHARES, hits, quantile
from agentstate.lookahead.planner import MARGIN
from agentstate.lookahead.policies import lru, planner, ttl

AGENTS = 64
RECORDED_AGENTS = 24  # their contexts are longer, and they wait less
HORIZON_S, WARM_S = 2700.0, 500.0
HOST_BYTES, STAGING_BYTES = 40e9, 16e9
DRIVES = (14, 3)
POOLS = (4.0, 6.6)
INFINITE_TOKENS = 10**9
SLO = 1.5
HIT = 1.5
"""A turn counts as one at the speed of a memory hit if it takes at most so many times its prefill alone."""

_LRU = Policy("LRU", store=True, overlap=True, read_at_arrival=True, ordering=lru)
_HOLD = replace(_LRU, name="LRU + hold", hold=True)
_SIMPLE = replace(_HOLD, name="simple", order=True, exclusive=True)
_TYPING = replace(_SIMPLE, name="simple + typing", typing_s=3.0)
_LEARNED = replace(_SIMPLE, name="learned", ordering=planner, foresight=Foresight.LEARNED, plan=True, margin=MARGIN)
_SIGNALS = replace(_LEARNED, name="signals", foresight=Foresight.ANNOUNCED, typing_s=3.0)
_ANNOUNCED = replace(_SIGNALS, name="announced", typing_s=0.0)
_TOOLS = replace(_LEARNED, name="tools known", foresight=Foresight.TOOLS)
_ORACLE = replace(_SIMPLE, name="oracle", ordering=planner, foresight=Foresight.EXACT, plan=True)
INFINITE = replace(_SIMPLE, name="infinite pool")

POLICIES = (
    _LRU,
    _HOLD,
    replace(_SIMPLE, name="TTL 60 s", ordering=ttl(60)),
    replace(_SIMPLE, name="TTL 300 s", ordering=ttl(300)),
    _SIMPLE,
    _TYPING,
    _LEARNED,
    _SIGNALS,
    _ORACLE,
)
ORDERS = (
    replace(_SIMPLE, name="LRU"),
    replace(_LEARNED, name="learned", plan=False),
    replace(_ANNOUNCED, name="announced", plan=False),
    replace(_ORACLE, name="Bélády", plan=False),
)
"""How what stays is chosen, and nothing is fetched before it is needed."""


def eight_billion(drive_gb_per_s: float) -> Calibration:
    """The costs of a model of the 8B class: 128 KiB of KV a token; a prefill of 15,000 tokens a second; decoding at
    7.2 TB/s, of 16 GB of weights and the contexts, and 1.3 ms more a step. Writes take half of the drive's rate."""
    token_bytes = 128 * 1024
    return Calibration(
        name="8b-class",
        source="chosen",
        page_tokens=64,
        token_bytes=token_bytes,
        layers=32,
        chunk_tokens=8192,
        max_running=256,
        request_s=0.01,
        forward_s=0.01,
        token_s=1 / 15_000,
        pair_s=0.0,
        step_s=0.0035,
        sequence_s=0.0,
        context_s=token_bytes / 7.2e12,
        restore_gb_per_s=drive_gb_per_s,
        host_gb_per_s=50.0,
        write_gb_per_s=drive_gb_per_s / 2,
    )


WORKLOADS: dict[str, Make] = {
    "generated": agents.generated,
    "predictable tools": partial(agents.generated, predictable=0.98),
    "recorded": agents.weka,
    "tools ten times slower": partial(agents.generated, drift=Drift(HORIZON_S / 2, 10.0)),
    "tools ten times faster": partial(agents.generated, drift=Drift(HORIZON_S / 2, 0.1)),
    "waves": partial(agents.generated, wave_s=30.0),
    "announced a tenth": agents.telling(agents.generated, factor=0.1),
    "announced ten times": agents.telling(agents.generated, factor=10.0),
    "announced noise": agents.telling(agents.generated, noise=True),
}
ADVERSARIES = tuple(WORKLOADS)[3:]


@dataclass(frozen=True)
class Case:
    """One workload on one engine, under every policy. The pool is ``1 / pool`` of the working set of ``sized_for``
    agents."""

    section: str
    workload: str
    agents: int
    pool: float
    drive_gb_per_s: float
    seed: int
    policies: tuple[Policy, ...]
    sized_for: int = AGENTS

    def rows(self) -> list[dict[str, Any]]:
        """A row a policy, that of the infinite pool first."""
        reference, counted = _reference(self.workload, self.agents, self.drive_gb_per_s, self.seed)
        pool_tokens = int(_working_set(self.workload, self.sized_for, self.drive_gb_per_s, self.seed) / self.pool)
        shown = {"section": self.section, "workload": self.workload, "agents": self.agents, "pool": self.pool}
        shown |= {"pool_tokens": pool_tokens, "drive_gb_per_s": self.drive_gb_per_s, "seed": self.seed}
        rows = [shown | {"variant": INFINITE.name} | reference]
        for policy in self.policies:
            outcome = _run(self.workload, self.agents, self.seed, self.drive_gb_per_s, pool_tokens, policy, counted)
            rows.append(shown | {"variant": policy.name} | figures(outcome))
        if self.section != "pools":
            for row in rows:
                del row["ttft_quantiles_s"]
        return rows


def cases(seeds: Sequence[int], *, full: bool = False) -> list[Case]:
    """All that is simulated, but for capacities."""
    by_name = {policy.name: policy for policy in POLICIES}
    few = tuple(by_name[name] for name in ("LRU", "simple", "learned", "signals", "oracle"))
    found = []
    for seed in seeds:
        case = partial(Case, seed=seed)
        for drive in (*DRIVES, 50) if full else DRIVES:
            for pool in (2.0, *POOLS) if full else POOLS:
                found.append(case("pools", "generated", AGENTS, pool, drive, policies=POLICIES))
        hard = partial(case, pool=POOLS[-1], drive_gb_per_s=DRIVES[0])
        found.append(hard("orders", "generated", AGENTS, policies=ORDERS))
        found.append(hard("workloads", "predictable tools", AGENTS, policies=(*few[:-1], _TOOLS, few[-1])))
        for pool in (2.0, 4.0):
            recorded = hard("workloads", "recorded", RECORDED_AGENTS, policies=few)
            found.append(replace(recorded, pool=pool, sized_for=RECORDED_AGENTS))
        for name in ADVERSARIES:
            found.append(hard("adversaries", name, AGENTS, policies=few[1:4]))
        for count in (16, 32, 48):
            found.append(hard("loads", "generated", count, policies=few))
    return found


def figures(outcome: Outcome) -> dict[str, Any]:
    """The figures of an outcome. ``at_hit`` is the share of turns at the speed of a memory hit; waits are means."""
    served = outcome.served
    ttfts = sorted(request.ttft_s for request in served)
    tokens = sum(request.input_tokens for request in served)
    count = len(served)
    cost = eight_billion(1)
    at_hit = 0
    for request in served:
        known = request.cached_tokens
        alone_s = cost.request_s + cost.prefill_s(known, max(1, request.input_tokens - known))
        at_hit += request.ttft_s <= HIT * alone_s
    return {
        "requests": count,
        "unserved": outcome.unserved,
        "ttft_mean_s": round(sum(ttfts) / count, 4),
        **{f"ttft_p{share}_s": round(quantile(ttfts, share / 100), 4) for share in (50, 90, 99)},
        "at_hit": round(at_hit / count, 4),
        "hit_device": round(sum(request.device_tokens + request.fetched_tokens for request in served) / tokens, 4),
        "hit_host": round(sum(request.host_tokens for request in served) / tokens, 4),
        "hits": hits(served),
        "read_wait_s": round(sum(request.read_wait_s for request in served) / count, 4),
        "memory_wait_s": round(sum(request.memory_wait_s for request in served) / count, 4),
        "bytes_read": outcome.bytes_read,
        "planned_bytes": outcome.planned_bytes,
        "forecasts": outcome.forecasts,
        "within": outcome.within,
        "ttft_quantiles_s": [round(quantile(ttfts, share), 4) for share in SHARES],
    }


def capacity(policy: Policy, drive_gb_per_s: float, seed: int) -> dict[str, Any]:
    """How many agents an engine serves whose p90 is at most `SLO` times that of an infinite pool with as many. Its pool
    is what `AGENTS` need, over 6.6."""
    pool_tokens = int(_working_set("generated", AGENTS, drive_gb_per_s, seed) / POOLS[-1])

    def serves(count: int) -> bool:
        reference, counted = _reference("generated", count, drive_gb_per_s, seed)
        outcome = _run("generated", count, seed, drive_gb_per_s, pool_tokens, policy, counted)
        p90_s = quantile(sorted(request.ttft_s for request in outcome.served), 0.9)
        return not outcome.unserved and p90_s <= SLO * float(reference["ttft_p90_s"])

    good, bad = 0, 192
    while bad - good > 2:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if serves(middle) else (good, middle)
    row = {"section": "capacity", "workload": "generated", "drive_gb_per_s": drive_gb_per_s, "seed": seed}
    return row | {"variant": policy.name, "agents": good, "pool_tokens": pool_tokens}


def study(
    seeds: Sequence[int], *, full: bool = False, advance: Callable[[str, int, int], None] = lambda name, done, of: None
) -> list[dict[str, Any]]:
    """All rows, in order, simulated on all cores that this process may use."""
    tasks: list[tuple[str, Callable[[], list[dict[str, Any]]]]] = [
        (case.section, case.rows) for case in cases(seeds, full=full)
    ]
    if full:
        tasks += [("capacity", task) for task in _capacities(seeds)]
    total = {name: sum(section == name for section, _ in tasks) for name, _ in tasks}
    done = dict.fromkeys(total, 0)
    found: dict[int, list[dict[str, Any]]] = {}
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as workers:
        running = {workers.submit(task): number for number, (_, task) in enumerate(tasks)}
        for future in as_completed(running):
            number = running[future]
            found[number] = future.result()
            name = tasks[number][0]
            done[name] += 1
            advance(name, done[name], total[name])
    return [row for number in sorted(found) for row in found[number]]


def _capacities(seeds: Sequence[int]) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    for seed in seeds:
        for drive in (*DRIVES, 50):
            for policy in (_LRU, _SIMPLE, _LEARNED, _SIGNALS, _ORACLE):
                yield partial(_capacity_rows, policy, drive, seed)


def _capacity_rows(policy: Policy, drive_gb_per_s: float, seed: int) -> list[dict[str, Any]]:
    return [capacity(policy, drive_gb_per_s, seed)]


@lru_cache(maxsize=2)
def _working_set(workload: str, count: int, drive_gb_per_s: float, seed: int) -> float:
    """The tokens of all contexts of so many agents that wait or run, on average."""
    outcome = _run(workload, count, seed, drive_gb_per_s, INFINITE_TOKENS, INFINITE, ())
    return sum(outcome.context_tokens) / len(outcome.context_tokens)


@lru_cache(maxsize=4)
def _reference(
    workload: str, count: int, drive_gb_per_s: float, seed: int
) -> tuple[dict[str, Any], frozenset[tuple[int, int]]]:
    """The figures of an infinite pool, and the requests that it served."""
    outcome = _run(workload, count, seed, drive_gb_per_s, INFINITE_TOKENS, INFINITE, ())
    return figures(outcome), frozenset((request.session, request.turn) for request in outcome.served)


def _run(
    workload: str,
    count: int,
    seed: int,
    drive_gb_per_s: float,
    pool_tokens: int,
    policy: Policy,
    counted: frozenset[tuple[int, int]] | tuple[()],
) -> Outcome:
    fleet = Fleet(1, pool_tokens, STAGING_BYTES, HOST_BYTES, 1e15)
    made = WORKLOADS[workload](count, HORIZON_S, seed)
    simulation = Simulation(
        made, eight_billion(drive_gb_per_s), fleet, policy, seed=seed, window=(WARM_S, HORIZON_S), counted=counted
    )
    return simulation.run()
