"""The benchmarks of a running engine, as small as they can be: that they measure what they say."""

from __future__ import annotations

import asyncio

from agentstate.benchmarks.burst import Burst
from agentstate.benchmarks.policies import Comparison, Plan
from agentstate.benchmarks.policies import Variant as Policy
from agentstate.benchmarks.slow_drive import Drive
from agentstate.benchmarks.throughput import Load, Throughput, Variant
from agentstate.benchmarks.ttft import VARIANTS, Prompts, Turn2
from agentstate.cli.local import LocalStack


def test_throughput_is_measured_while_pages_are_written(stack: LocalStack) -> None:
    told: list[str] = []
    # One engine in all places: nothing is compared here.
    measure = Throughput(stack, stack, told.append, lambda: told.append("step"))
    load = Load("small", requests=2, prompt_tokens=128, output_tokens=4)
    before = stack.settle()["spill"]["pages_skipped"]
    (row,) = asyncio.run(measure.run([load], rounds=2))
    assert told == ["small", "step", "step"]
    assert [len(row[f"{variant}_all_tokens_per_s"]) for variant in Variant] == [2, 2, 2]
    # Two prompts of two pages, twice in each round.
    assert row["bytes_spilled"] == 2 * 2 * 4 * page_bytes(stack)
    # And as often while spilling was off.
    assert stack.settle()["spill"]["pages_skipped"] - before >= 2 * 2 * 4


def test_a_burst_restores_every_session_and_hits_it_then(stack: LocalStack) -> None:
    told: list[str] = []
    row = asyncio.run(Burst(stack, 3, 192, told.append, lambda: told.append("step")).run(rounds=2))
    assert told.count("step") == 3 + 2
    assert row["sessions"] == 3
    assert row["bytes_read"] >= 3 * 3 * page_bytes(stack)
    assert len(row["last_ttft_all_s"]) == len(row["bound_all_s"]) == 2


def test_turn_2_has_every_variant_in_every_round_and_recomputations_in_those_asked_for(stack: LocalStack) -> None:
    done: list[int] = []
    turn = Turn2(stack, "smollm2", Prompts.of(512), lambda: done.append(1), recomputes=1)

    async def measure() -> None:
        await turn.ingest()
        for number in range(2):
            await turn.round(number)

    asyncio.run(measure())
    rows = {row["variant"]: row for row in turn.rows()}
    assert {variant: len(row["ttft_all_s"]) for variant, row in rows.items()} == {
        "recompute": 1,
        **dict.fromkeys(VARIANTS, 2),
    }
    assert len(done) == 1 + 2 * len(VARIANTS)
    assert {variant: row["restored_tokens"] for variant, row in rows.items()} == {
        "recompute": 0,
        "memory_hit": 0,
        "restore_cold": 512,
        "restore_host_prefetch": 512,
        "restore_device_prefetch": 0,
        "api_resume": 512,
    }
    assert all(row["identical"] for row in rows.values())


def page_bytes(stack: LocalStack) -> int:
    spill = stack.settle()["spill"]
    return int(spill["bytes_spilled"] // spill["pages_spilled"])


def test_agents_are_served_alike_by_every_policy(stack: LocalStack, one_drive: Drive) -> None:
    told: list[str] = []
    # One engine in all places, whose drive stays as it is.
    measure = Comparison(
        dict.fromkeys(Policy, stack),
        one_drive,
        Plan(agents=2, turns=2, context=192, append=16, output=4, longest_s=0.1),
        told.append,
        lambda: told.append("step"),
    )
    found = asyncio.run(measure.run(rounds=1, forwards=0))
    assert told == [text for policy in reversed(Policy) for text in (f"round 1: {policy}", "step")]
    assert {name: [of_round["requests"] for of_round in rounds] for name, rounds in found["rounds"].items()} == {
        policy.value: [2] for policy in Policy
    }
