"""A fleet study: one workload under every policy, each adding one feature to the one before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from agentstate.benchmarks.calibration import Calibration
from agentstate.benchmarks.fleet import Fleet, Outcome, Policy, Prefetch, Served
from agentstate.benchmarks.simulator import Simulation
from agentstate.benchmarks.traces import Workload
from agentstate.fleet.control import TIERS

_READING = Policy("+ read at arrival", store=True, overlap=True, read_at_arrival=True)
_HOLDING = replace(_READING, name="+ hold", hold=True)
_DEMOTING = replace(_HOLDING, name="+ demote", demote=True)

POLICIES = (
    Policy("device cache only"),
    Policy("+ store", store=True),
    Policy("+ overlap", store=True, overlap=True),
    _READING,
    _HOLDING,
    _DEMOTING,
    replace(_DEMOTING, name="+ host prefetch", prefetch=Prefetch.HOST),
    replace(_DEMOTING, name="+ device prefetch", prefetch=Prefetch.DEVICE),
    replace(_DEMOTING, name="+ break-even", prefetch=Prefetch.HOST, break_even=True),
)
"""Each has all that those above it have, except that the device prefetch replaces the one to host memory, and the
break-even rule is added to the latter."""

SHARES = tuple(share / 100 for share in range(0, 101))


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value that ``share`` of ``ordered`` lie at or below, by nearest rank."""
    if not ordered:
        raise ValueError("no values")
    return ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)]


def hits(served: Sequence[Served]) -> dict[str, dict[str, int]]:
    """The tokens of prompts by what was waited for before, and by tier, as `stat` of an engine counts them."""
    found: dict[str, dict[str, int]] = {}
    for request in served:
        of_gap = found.setdefault(request.gap.value, dict.fromkeys(TIERS, 0))
        for tier in TIERS[:-1]:
            of_gap[tier] += getattr(request, f"{tier}_tokens")
        of_gap[TIERS[-1]] += request.input_tokens - request.cached_tokens
    return found


def summary(name: str, outcome: Outcome, fleet: Fleet | None) -> dict[str, Any]:
    """The figures of an outcome. Hit rates are shares of all prompt tokens; a peak is the most at one sample; drive
    writes a day are those while sessions still start, over the quota; ``ttft_quantiles_s`` are at every percent.

    Without a ``fleet`` the outcome was measured from outside, and figures that only a simulation has are None.
    """
    served = outcome.served
    ttfts = sorted(request.ttft_s for request in served)
    tokens = sum(request.input_tokens for request in served)
    device = sum(request.device_tokens + request.fetched_tokens for request in served)
    host = sum(request.host_tokens for request in served)
    nvme = sum(request.nvme_tokens for request in served)
    row: dict[str, Any] = {
        "variant": name,
        "requests": len(served),
        "sessions": len({request.session for request in served}),
        "duration_s": round(outcome.duration_s, 3),
        "ttft_p50_s": round(quantile(ttfts, 0.5), 4),
        "ttft_p90_s": round(quantile(ttfts, 0.9), 4),
        "ttft_p99_s": round(quantile(ttfts, 0.99), 4),
        "input_tokens": tokens,
        "hit_device": round(device / tokens, 4),
        "hit_host": round(host / tokens, 4),
        "hit_nvme": round(nvme / tokens, 4),
        "hits": hits(served),
        **dict.fromkeys(_INSIDE),
        "ttft_quantiles_s": [round(quantile(ttfts, share), 4) for share in SHARES],
    }
    if fleet is not None:
        window_s = outcome.window_s or math.inf  # if all sessions start at once, there is no rate to tell
        inside = (
            round(sum(request.prefill_s for request in served), 1),
            round(sum(request.saved_s for request in served), 1),
            outcome.bytes_read,
            outcome.bytes_written,
            round(outcome.window_bytes_written / fleet.quota_bytes / fleet.engines / window_s * 86400, 3),
            round(outcome.window_busy_s / fleet.engines / window_s, 3),
            max(outcome.alive, default=0),
            max(outcome.on_device, default=0),
            max(outcome.restorable, default=0),
        )
        row.update(zip(_INSIDE, inside, strict=True))
    return row


_INSIDE = (
    "prefill_s",
    "prefill_saved_s",
    "bytes_read",
    "bytes_written",
    "drive_writes_per_day",
    "engine_busy",
    "sessions_alive_peak",
    "sessions_on_device_peak",
    "sessions_restorable_peak",
)
"""The figures that only a simulation has."""


def study(
    workload: Workload,
    calibration: Calibration,
    fleet: Fleet,
    *,
    seed: int = 0,
    advance: Callable[[Policy, int], None] = lambda policy, served: None,
) -> list[dict[str, Any]]:
    """A row a policy of `POLICIES`. ``advance`` is told the policy and how many requests it has served so far."""
    rows = []
    for policy in POLICIES:
        simulation = Simulation(workload, calibration, fleet, policy, seed=seed, progress=partial(advance, policy))
        rows.append(summary(policy.name, simulation.run(), fleet))
    return rows
