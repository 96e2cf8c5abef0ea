"""Agents under each policy: that they are the same for all, and how they are compared."""

from __future__ import annotations

import pytest

from agentstate.benchmarks.engine import Answer
from agentstate.benchmarks.policies import Agents, Plan, Variant, _compare, _engines, _figures, _rows, _served
from agentstate.errors import EngineError


def answer(ttft_s: float, device: int = 10, restored: int = 0, tokens: tuple[int, ...] = (1, 2)) -> Answer:
    return Answer(tokens, device, restored, ttft_s, ttft_s + 1)


def test_equal_numbers_are_equal_agents_and_others_have_other_contexts() -> None:
    plan = Plan(agents=3, turns=4)
    first, again, other = Agents(plan, 1), Agents(plan, 1), Agents(plan, 2)
    assert first._contexts == again._contexts != other._contexts
    assert first._steps == again._steps
    assert [len(steps) for steps in first._steps] == [4, 4, 4]
    steps = [step for agent in first._steps for step in agent]
    assert all(0 < step.gap_s <= plan.longest_s for step in steps)
    assert any(step.announced_s != step.gap_s for step in steps)


def test_every_pool_holds_the_longest_context_and_only_one_holds_all() -> None:
    plan = Plan(turns=9, context=640, append=16, output=4)
    pools = {variant: int(share * plan.working_set) for variant, (share, _) in _engines(plan, 3.0).items()}
    assert plan.longest == 640 + 9 * 20
    assert pools[Variant.FULL] > plan.working_set
    assert [environment["AGENTSTATE_QUEUE_AGING_S"] for _, environment in _engines(plan, 3.0).values()] == [
        "0",
        "0",
        "3.0",
        "3.0",
    ]
    assert pools[Variant.LRU] == pools[Variant.SIMPLE] == pools[Variant.SIGNALS] == plan.working_set // 4


def test_the_first_turn_of_an_agent_does_not_count() -> None:
    figures = _figures([[answer(9.0), answer(0.3), answer(0.1, 4, 6)], [answer(9.0), answer(0.2)]])
    assert figures == {"requests": 3, "ttft_s": [0.1, 0.2, 0.3], "device_tokens": 24, "restored_tokens": 6}


def test_a_round_has_what_the_engine_has_counted_meanwhile() -> None:
    def counted(device: int, nvme: int, seconds: float) -> dict[str, object]:
        hits = {"device": {"tokens": device, "requests": 1}, "nvme": {"tokens": nvme, "requests": 1}}
        return {"hits": {"tool": hits, "person": hits}, "penalty": {"reads": {"seconds": seconds, "requests": 1}}}

    served = _served(counted(10, 20, 1.5), counted(13, 29, 4.0))
    assert served == {"tokens_from": {"device": 6, "nvme": 18}, "waited_s": {"reads": 2.5}}
    rounds = [_figures([[answer(1.0), answer(0.5)]]) | served for _ in range(2)]
    row = _rows({Variant.FULL: rounds, Variant.LRU: rounds})[0]
    assert (row["tokens_from"], row["waited_s"]) == ({"device": 12, "nvme": 36}, {"reads": 5.0})


def test_rows_compare_rounds_in_pairs() -> None:
    def rounds(*ttfts: float) -> list[dict[str, object]]:
        return [_figures([[answer(1.0), *(answer(ttft) for _ in range(4))]]) for ttft in ttfts]

    rows = _rows({Variant.FULL: rounds(0.1, 0.2), Variant.LRU: rounds(0.4, 0.8), Variant.SIMPLE: rounds(0.2, 0.4)})
    of = {row["variant"]: row for row in rows}
    assert of[Variant.SIMPLE]["p90_to_lru"] == [0.5, 0.5, 0.5]
    assert of[Variant.SIMPLE]["p50_to_full"] == [2.0, 2.0, 2.0]
    assert (of[Variant.LRU]["ttft_p50_s"], of[Variant.LRU]["ttft_p99_s"], of[Variant.LRU]["requests"]) == (0.4, 0.8, 8)
    assert of[Variant.FULL]["device_share"] == 1.0


def test_answers_that_differ_are_an_error() -> None:
    same = [[answer(0.1), answer(0.2)]]
    _compare({Variant.FULL: same, Variant.LRU: [[answer(0.5), answer(0.6)]]})
    with pytest.raises(EngineError, match="agent 0 got other tokens in turn 1 from LRU than pool for all"):
        _compare({Variant.FULL: same, Variant.LRU: [[answer(0.5), answer(0.6, tokens=(1, 3))]]})
