"""How far the simulator can be trusted: one workload on a real engine, and simulated with that engine's costs."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path

from rich.table import Column, Table

from agentstate.benchmarks import results, traces
from agentstate.benchmarks.calibration import Calibration
from agentstate.benchmarks.engine import Engine
from agentstate.benchmarks.fleet import Fleet
from agentstate.benchmarks.probe import merged, probe
from agentstate.benchmarks.replay import replay, unseen, validation
from agentstate.benchmarks.simulator import Simulation
from agentstate.benchmarks.stacks import SMOLLM2, running, steps
from agentstate.benchmarks.study import POLICIES, summary
from agentstate.benchmarks.terminal import console
from agentstate.cli.local import LocalStack
from agentstate.errors import EngineError
from agentstate.pages import Geometry, inventory
from agentstate.settings import Settings

_EVERY_S = 8.0
"""The time between two sessions' starts, before times are scaled. The device then cannot hold all sessions that are
away, but seldom lacks room for those that are served. A request without room waits for seconds, and whether there is
room depends on milliseconds."""

# What an engine does by itself: nobody tells it to demote or to prefetch.
_POLICY = next(policy for policy in POLICIES if policy.read_at_arrival and not policy.hold)


def validate(
    settings: Settings, sessions: int, tokens: float, time: float, device_tokens: int, seed: int, report: Path | None
) -> None:
    """Print and keep simulated ÷ measured, for the tokens found and for the time to the first token."""
    chosen = traces.tracelab(copies=-(-sessions // 2), every_s=_EVERY_S).first(sessions).scaled(tokens, time)
    requests = sum(1 for _ in chosen.turns())
    longest = max(chosen.input_tokens(turn) for turn in chosen.turns())
    # The simulated engine decides nothing by measuring, so neither does this one.
    arguments = ["--max-total-tokens", str(device_tokens)]
    with running(settings, SMOLLM2, arguments, AGENTSTATE_BREAK_EVEN="off") as stack, steps(requests) as (say, step):
        say("measuring what the engine takes")
        before = asyncio.run(_record(stack, longest))
        say("the engine")
        stack.settle()
        stack.flush_device()
        measured = asyncio.run(replay(chosen, stack.engine_url, progress=lambda served: step()))
        # A machine does not stay equally fast for minutes.
        say("measuring again what the engine takes")
        calibration = Calibration.fit(merged([before, asyncio.run(_record(stack, longest))]))
    fleet = Fleet(
        engines=1,
        device_tokens=device_tokens,
        staging_bytes=float(settings.staging_bytes),
        host_bytes=0,
        quota_bytes=1e12,
    )
    simulated = Simulation(chosen, calibration, fleet, _POLICY, seed=seed).run()
    compared = validation(simulated, measured)
    table = Table("", *(Column(name, justify="right") for name in ("simulated", "measured", "ratio")))
    for name, of in compared.items():
        table.add_row(name, f"{of['simulated']:,}", f"{of['measured']:,}", f"{of['ratio']:.3f}")
    console.print(f"[bold]{chosen.source}[/]: {requests:,} requests", highlight=False)
    console.print(table)
    if report is not None:
        asked = {"workload": chosen.source, "requests": requests, "seed": seed, "fleet": asdict(fleet)}
        rows = [summary("measured", measured, None), summary("simulated", simulated, fleet)]
        results.write(
            report,
            results.record("replay", {**asked, "calibration": asdict(calibration), "validation": compared}, rows),
        )
        console.print(f"raw result written to {report}")


async def _record(stack: LocalStack, longest: int) -> dict[str, object]:
    async with Engine(stack.engine_url) as engine:
        await engine.ask(unseen(256), 1)
    await asyncio.to_thread(stack.settle)
    geometry = _geometry(stack)
    return await probe(
        stack.engine_url,
        stack.stat,
        name="this engine",
        source="measured by `agentstate bench validate`",
        layers=geometry.layers,
        token_bytes=geometry.page_bytes // geometry.page_size,
        lengths=[longest * part // 5 for part in (1, 2, 4)],
        new_tokens=(16, 64, longest // 5),
        repeats=2,
    )


def _geometry(stack: LocalStack) -> Geometry:
    """The geometry of the KV that the engine has stored."""
    for store in inventory.store_directories(stack.home / "pages"):
        for extent in inventory.extents(store):
            if extent.header is not None:
                return extent.header.geometry
    raise EngineError("the engine has stored nothing")
