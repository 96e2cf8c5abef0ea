from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentstate.benchmarks import traces
from agentstate.benchmarks.traces import ROOT, Gap, Quantiles, Turn, Workload


def check(workload: Workload) -> None:
    """What every workload keeps: a tree whose segments have tokens, and answers that follow their prompts."""
    for segment, (parent, end) in enumerate(zip(workload.parents, workload.ends, strict=True)):
        assert ROOT <= parent < segment
        assert end > workload.end(parent)
    for turn in workload.turns():
        assert workload.parents[turn.answer] == turn.prompt
        assert workload.output_tokens(turn) >= 1
        assert turn.gap_s >= 0


@pytest.fixture(scope="module")
def mooncake() -> Workload:
    return traces.mooncake()


def test_mooncake_shares_what_its_hash_ids_say(mooncake: Workload) -> None:
    check(mooncake)
    turns = list(mooncake.turns())
    assert len(turns) == 6015
    assert mooncake.input_tokens(mooncake.sessions[0][0]) == 6758
    # 52,871 of 153,002 blocks are in the prefix of an earlier request, counted straight from the hash ids.
    seen: set[int] = set()
    shared = total = 0
    for turn in sorted(turns, key=lambda turn: turn.prompt if turn.prompt > turn.answer else turn.answer):
        path = mooncake.path(turn.prompt)
        shared += sum(segment in seen for segment in path)
        total += len(path)
        seen.update(path)
    assert (shared, total) == (52_871, 153_002)


def test_mooncake_turns_continue_their_session(mooncake: Workload) -> None:
    assert max(len(session) for session in mooncake.sessions) > 10
    for session in mooncake.sessions:
        for before, after in zip(session, session[1:], strict=False):
            whole = [s for s in mooncake.path(before.prompt) if mooncake.ends[s] % traces.BLOCK_TOKENS == 0]
            assert set(whole) <= set(mooncake.path(after.prompt))
            assert after.not_before_s >= before.not_before_s


def test_tracelab_is_the_two_conversations() -> None:
    workload = traces.tracelab()
    check(workload)
    first, second = workload.sessions
    assert [len(first), len(second)] == [10, 9]
    assert [workload.input_tokens(turn) for turn in first[:2]] == [32272, 35740]
    # The second prompt holds the first one and its answer; its slower tool took 19.3 s.
    assert first[0].answer in workload.path(first[1].prompt)
    assert first[1].gap is Gap.TOOL
    assert first[1].gap_s == pytest.approx(19.291)
    assert [turn.gap for turn in first].count(Gap.PERSON) == 1
    # The sixth prompt of the other one is shorter than what came before it: it shares the first segment for certain.
    assert workload.path(second[5].prompt)[0] == workload.path(second[0].prompt)[0]
    assert second[4].answer not in workload.path(second[5].prompt)


def test_copies_of_tracelab_share_the_first_segment_only() -> None:
    workload = traces.tracelab(copies=2)
    one, other = (set(workload.path(workload.sessions[number][-1].prompt)) for number in (0, 2))
    assert len(one & other) == 1


@pytest.mark.parametrize("distribution", [traces.TOOL_S, traces.HUMAN_S, traces.TOOL_STEPS])
def test_a_distribution_goes_through_its_points(distribution: Quantiles) -> None:
    published = {
        id(traces.TOOL_S): (0.3, 13.6, 216.0),
        id(traces.HUMAN_S): (86.0, 1260.0, 50_400.0),
        id(traces.TOOL_STEPS): (15.0, 135.0, 1107.0),
    }[id(distribution)]
    assert [distribution.at(share) for share in (0.5, 0.9, 0.99)] == pytest.approx(published)


@given(st.lists(st.floats(0.001, 0.999), min_size=2, max_size=20))
def test_a_distribution_grows_and_keeps_its_bounds(shares: list[float]) -> None:
    values = [traces.TOOL_S.at(share) for share in sorted(shares)]
    assert values == sorted(values)
    assert 0.005 <= values[0] <= values[-1] <= 3600


def test_generated_agents_have_the_published_medians() -> None:
    workload = traces.generated(1000, 3600.0, seed=1)
    check(workload)
    steps = [turn for turn in workload.turns() if turn.gap is not Gap.FIRST]
    prefix = statistics.median(workload.end(workload.parents[turn.prompt]) for turn in steps)
    append = statistics.median(workload.input_tokens(t) - workload.end(workload.parents[t.prompt]) for t in steps)
    assert prefix == pytest.approx(119_000, rel=0.1)
    assert append == pytest.approx(875, rel=0.05)
    assert statistics.median(workload.output_tokens(turn) for turn in steps) == pytest.approx(214, rel=0.05)
    assert statistics.median(turn.gap_s for turn in steps if turn.gap is Gap.TOOL) == pytest.approx(0.3, rel=0.1)
    assert statistics.median(turn.gap_s for turn in steps if turn.gap is Gap.PERSON) == pytest.approx(86, rel=0.1)
    assert statistics.median(len(session) for session in workload.sessions) == pytest.approx(15, rel=0.15)


def test_generated_agents_are_the_same_for_the_same_seed() -> None:
    assert traces.generated(5, 10.0, seed=2) == traces.generated(5, 10.0, seed=2)
    assert traces.generated(5, 10.0, seed=2) != traces.generated(5, 10.0, seed=3)


@given(st.integers(0, 2**32), st.floats(0.0001, 3.0), st.floats(0.01, 10.0))
def test_a_scaled_workload_has_the_same_tree(seed: int, tokens: float, time: float) -> None:
    source = random.Random(seed)
    workload = Workload("by hand")
    segment, turns = ROOT, []
    for _ in range(5):
        segment = workload.add(segment, source.randint(1, 2000))
        answer = workload.add(segment, source.randint(1, 200))
        turns.append(Turn(Gap.TOOL, source.random(), 1.0, segment, answer))
    workload.sessions = [turns]
    scaled = workload.scaled(tokens, time)
    check(scaled)
    assert scaled.parents == workload.parents
    assert [turn.gap_s for turn in scaled.turns()] == pytest.approx([turn.gap_s * time for turn in turns])
    # Rounding never adds up: an end is off by half a token, or by what the segments before need to keep one each.
    assert all(
        abs(end - old * tokens) <= 0.5 + len(turns) * 2 for old, end in zip(workload.ends, scaled.ends, strict=True)
    )
