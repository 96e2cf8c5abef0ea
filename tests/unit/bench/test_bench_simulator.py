"""Scenarios whose times can be worked out by hand: 1 s a page of ten tokens computed, 1 s of decoding a token."""

from __future__ import annotations

from dataclasses import replace

import pytest
from by_hand import COST, GB

from agentstate.benchmarks.calibration import Calibration
from agentstate.benchmarks.fleet import Fleet, Outcome, Policy, Prefetch
from agentstate.benchmarks.simulator import Simulation
from agentstate.benchmarks.study import POLICIES, hits
from agentstate.benchmarks.traces import ROOT, Gap, Turn, Workload, generated
from agentstate.errors import SettingsError

FLEET = Fleet(engines=1, device_tokens=250, staging_bytes=100 * GB, host_bytes=100 * GB, quota_bytes=1000 * GB)
STORE = Policy("store", store=True)
DEVICE_ONLY = Policy("device")


def two_agents(gap_s: float = 100.0, gap: Gap = Gap.TOOL) -> Workload:
    """One session of two turns, 200 tokens and then 10 new ones, and another one whose turn comes between and needs
    the whole device. Answers have one token, so that nothing is decoded."""
    workload = Workload("by hand")
    first = workload.add(ROOT, 200)
    answer = workload.add(first, 1)
    again = workload.add(answer, 10)
    other = workload.add(ROOT, 230)
    workload.sessions = [
        [
            Turn(Gap.FIRST, 0.0, 0.0, first, answer),
            Turn(gap, gap_s, 0.0, again, workload.add(again, 1)),
        ],
        [Turn(Gap.FIRST, 0.0, 40.0, other, workload.add(other, 1))],
    ]
    return workload


def run(workload: Workload, policy: Policy, fleet: Fleet = FLEET, cost: Calibration = COST) -> Outcome:
    return Simulation(workload, cost, fleet, policy).run()


def last(outcome: Outcome) -> tuple[float, int, int, int]:
    """The returning turn's time to first token, and its hit tokens: device, host, drive."""
    (served,) = [request for request in outcome.served if request.turn == 1]
    device_tokens = served.device_tokens + served.fetched_tokens
    return pytest.approx(served.ttft_s), device_tokens, served.host_tokens, served.nvme_tokens


def test_without_a_store_what_was_evicted_is_computed_again() -> None:
    assert last(run(two_agents(), DEVICE_ONLY)) == (21.1, 0, 0, 0)


def test_what_stayed_on_the_device_is_not_computed_again() -> None:
    alone = two_agents()
    del alone.sessions[1]
    # 200 of 211 tokens; the answer's one token and the ten new ones share a page with nothing.
    assert last(run(alone, DEVICE_ONLY)) == (1.1, 200, 0, 0)


def test_a_restore_without_overlap_takes_reading_and_then_computing() -> None:
    outcome = run(two_agents(), STORE)
    assert last(outcome) == (2.0 + 1.1, 0, 0, 200)
    assert outcome.bytes_read == 200 * GB // 10
    served = next(request for request in outcome.served if request.turn == 1)
    assert served.prefill_s == pytest.approx(1.1)
    assert served.saved_s == pytest.approx(20.0)


def test_with_overlap_only_a_layer_of_the_forward_is_left_after_reading() -> None:
    assert last(run(two_agents(), replace(STORE, overlap=True))) == (2.0 + 1.1 / 4, 0, 0, 200)


def test_with_overlap_a_long_forward_waits_for_the_first_layer_only() -> None:
    slow = replace(COST, token_s=1.0)
    outcome = run(two_agents(1000.0), replace(STORE, overlap=True), cost=slow)
    assert last(outcome) == (2.0 / 4 + 11.0, 0, 0, 200)


def test_reading_at_arrival_is_done_before_a_busy_engine_admits() -> None:
    workload = two_agents()
    # The second turn arrives at 120; this one is computed from 119.5 to 122.5.
    busy = workload.add(ROOT, 30)
    workload.sessions.append([Turn(Gap.FIRST, 0.0, 119.5, busy, workload.add(busy, 1))])
    room = replace(FLEET, device_tokens=270)
    assert last(run(workload, STORE, room)) == (2.5 + 2.0 + 1.1, 0, 0, 200)
    assert last(run(workload, replace(STORE, read_at_arrival=True), room)) == (2.5 + 1.1, 0, 0, 200)


def test_a_request_that_is_held_lets_others_go_first() -> None:
    workload = two_agents()
    # One session decodes when the second turn arrives at 120: a step a second, from 118 + 1 on.
    decoding = workload.add(ROOT, 10)
    workload.sessions.append([Turn(Gap.FIRST, 0.0, 118.0, decoding, workload.add(decoding, 6))])
    reading = replace(STORE, read_at_arrival=True)

    def ended_s(policy: Policy) -> tuple[float, float]:
        outcome = run(workload, policy)
        return last(outcome)[0], outcome.duration_s

    # All wait for the two seconds of reading, then five steps are left, of which one was taken before.
    assert ended_s(reading) == (pytest.approx(2.0 + 1.1), pytest.approx(120 + 3.1 + 4))
    # Two steps are taken meanwhile.
    assert ended_s(replace(reading, hold=True)) == (pytest.approx(2.0 + 1.1), pytest.approx(120 + 3.1 + 2))


def test_staging_bounds_what_is_read_before_admission() -> None:
    workload = two_agents()
    busy = workload.add(ROOT, 30)
    workload.sessions.append([Turn(Gap.FIRST, 0.0, 119.5, busy, workload.add(busy, 1))])
    none = replace(FLEET, staging_bytes=0, device_tokens=270)
    assert last(run(workload, replace(STORE, read_at_arrival=True), none)) == (2.5 + 2.0 + 1.1, 0, 0, 200)


def test_what_a_device_prefetch_brought_back_is_a_hit() -> None:
    fleet = replace(FLEET, guess_sigma=0.0)
    outcome = run(two_agents(), replace(STORE, prefetch=Prefetch.DEVICE), fleet)
    assert last(outcome) == (1.1, 200, 0, 0)
    assert outcome.bytes_read == 200 * GB // 10
    tokens = {"device": 0, "fetched": 200, "host": 0, "nvme": 0}
    assert hits(outcome.served)["tool"] == {**tokens, "recomputed": outcome.served[-1].input_tokens - 200}


def test_a_prefetch_that_is_late_is_waited_for_and_not_read_twice() -> None:
    # Begun half of the reading time after it had to be: that is what a negative slack says.
    fleet = replace(FLEET, guess_sigma=0.0, prefetch_slack=-0.5)
    outcome = run(two_agents(), replace(STORE, prefetch=Prefetch.DEVICE), fleet)
    seconds, *hits = last(outcome)
    assert seconds == 2.01 - 1.005 + 1.1 - 0.01
    assert hits == [0, 0, 200]
    assert outcome.bytes_read == 200 * GB // 10


def test_what_a_host_prefetch_brought_is_copied_at_the_speed_of_memory() -> None:
    fleet = replace(FLEET, guess_sigma=0.0)
    assert last(run(two_agents(), replace(STORE, prefetch=Prefetch.HOST), fleet)) == (0.2 + 1.1, 0, 200, 0)


def test_a_person_is_not_guessed_at() -> None:
    outcome = run(two_agents(gap=Gap.PERSON), replace(STORE, prefetch=Prefetch.DEVICE))
    assert last(outcome) == (2.0 + 1.1, 0, 0, 200)


def test_what_is_sooner_computed_is_not_read() -> None:
    slow = replace(COST, restore_gb_per_s=0.5)
    policy = replace(STORE, break_even=True)
    outcome = run(two_agents(), policy, cost=slow)
    assert last(outcome) == (21.1, 0, 0, 0)
    assert outcome.bytes_read == 0
    assert last(run(two_agents(), policy)) == (2.0 + 1.1, 0, 0, 200)


def test_nothing_is_written_twice() -> None:
    outcome = run(two_agents(), STORE)
    # 20 pages of the first prompt, one of its continuation, 23 of the other session.
    assert outcome.bytes_written == (20 + 1 + 23) * COST.page_bytes
    assert run(two_agents(), DEVICE_ONLY).bytes_written == 0


def test_a_quota_drops_what_was_used_least_recently() -> None:
    outcome = run(two_agents(), STORE, replace(FLEET, quota_bytes=23 * COST.page_bytes))
    assert last(outcome) == (21.1, 0, 0, 0)


def test_what_is_not_yet_written_stays_on_the_device() -> None:
    slow = replace(COST, write_gb_per_s=0.2)
    outcome = run(two_agents(30.0), STORE, cost=slow)
    # 20 GB are computed at 20 s and written at 120 s. The other agent needs their place at 40 s, and is computed from
    # then on; the returning one comes at 50 s, after it, and its own pages are evicted.
    assert [served.ttft_s for served in outcome.served if served.session == 1] == [pytest.approx(120 - 40 + 23)]
    assert last(outcome) == (143 - 50 + 115 + 3.1, 0, 0, 200)


def test_a_request_without_room_is_tried_again_when_another_one_has_ended() -> None:
    """100 tokens are written until 110 s; an agent that needs their place comes at 20 s."""

    def ttft_s(*, decoded: bool) -> float:
        workload = Workload("by hand")
        first, late, other = (workload.add(ROOT, tokens) for tokens in (100, 200, 10))
        workload.sessions = [
            [Turn(Gap.FIRST, 0.0, 0.0, first, workload.add(first, 1))],
            [Turn(Gap.FIRST, 0.0, 20.0, late, workload.add(late, 1))],
        ]
        if decoded:
            workload.sessions.append([Turn(Gap.FIRST, 0.0, 12.0, other, workload.add(other, 20))])
        outcome = run(workload, STORE, cost=replace(COST, write_gb_per_s=0.1, step_s=10.0))
        (served,) = [request for request in outcome.served if request.session == 1]
        return served.ttft_s

    assert ttft_s(decoded=False) == pytest.approx(110 - 20 + 20)
    # The other one has its first token at 13 s, and 19 steps to go.
    assert ttft_s(decoded=True) == pytest.approx(13 + 190 - 20 + 20)


def test_late_results_are_seen_a_forward_later() -> None:
    """A prompt of 1 s, two more tokens: the first one is seen after the step for the second."""
    workload = Workload("by hand")
    prompt = workload.add(ROOT, 10)
    workload.sessions = [[Turn(Gap.FIRST, 0.0, 0.0, prompt, workload.add(prompt, 3))]]
    late = replace(COST, late_results=True, step_s=0.1)
    outcome = run(workload, DEVICE_ONLY, cost=late)
    assert outcome.served[0].ttft_s == pytest.approx(1.0 + 0.1)
    # The last one is seen at once: no step follows it.
    assert outcome.duration_s == pytest.approx(1.0 + 0.1 + 0.1)
    alone = workload.add(ROOT, 10)
    workload.sessions = [[Turn(Gap.FIRST, 0.0, 0.0, alone, workload.add(alone, 1))]]
    assert run(workload, DEVICE_ONLY, cost=late).served[0].ttft_s == pytest.approx(1.0)


def test_late_results_wait_for_the_prompt_that_is_computed_next() -> None:
    workload = Workload("by hand")
    prompts = [workload.add(ROOT, 10), workload.add(ROOT, 20)]
    workload.sessions = [
        [Turn(Gap.FIRST, 0.0, at_s, prompt, workload.add(prompt, 1))]
        for at_s, prompt in zip((0.0, 0.5), prompts, strict=True)
    ]
    first, second = run(workload, DEVICE_ONLY, cost=replace(COST, late_results=True)).served
    assert (first.ttft_s, second.ttft_s) == (pytest.approx(1.0 + 2.0), pytest.approx(0.5 + 2.0))


def test_room_is_asked_for_a_page_more_than_is_needed() -> None:
    """An agent of 13 pages runs; another one needs 11 of the 25, has to have 12, and waits. On 26 it does not."""

    def ttft_s(device_tokens: int) -> float:
        workload = Workload("by hand")
        runs, comes = workload.add(ROOT, 100), workload.add(ROOT, 105)
        workload.sessions = [
            [Turn(Gap.FIRST, 0.0, 0.0, runs, workload.add(runs, 30))],
            [Turn(Gap.FIRST, 0.0, 15.0, comes, workload.add(comes, 5))],
        ]
        return run(workload, DEVICE_ONLY, replace(FLEET, device_tokens=device_tokens)).served[1].ttft_s

    assert ttft_s(260) == pytest.approx(10.5)
    assert ttft_s(250) == pytest.approx(10 + 29 - 15 + 10.5)


def test_a_forward_after_a_pause_takes_longer() -> None:
    workload = Workload("by hand")
    prompts = [workload.add(ROOT, 10) for _ in range(3)]
    workload.sessions = [
        [Turn(Gap.FIRST, 0.0, at_s, prompt, workload.add(prompt, 1))]
        for at_s, prompt in zip((0.0, 3.0, 99.0), prompts, strict=True)
    ]
    served = run(workload, DEVICE_ONLY, cost=replace(COST, idle=((1.0, 0.1), (3.0, 0.5)))).served
    # The engine has had nothing to do for 2 s, and then for longer than was measured.
    assert [request.ttft_s for request in served] == [pytest.approx(seconds) for seconds in (1.0, 1.3, 1.5)]


def test_a_restore_takes_its_fixed_times_too() -> None:
    # Reading takes 0.4 s beside the 2 s of its bytes; the forward of 1.1 s becomes 0.3 s longer.
    cost = replace(COST, read_s=0.4, restore_s=0.3)
    assert last(run(two_agents(), STORE, cost=cost)) == (2.4 + 1.4, 0, 0, 200)
    assert last(run(two_agents(), replace(STORE, overlap=True), cost=cost)) == (2.4 + 1.4 / 4, 0, 0, 200)


def test_demoted_pages_make_room_before_others() -> None:
    """Three sessions of 100 tokens on a device for 25 pages: the third one's arrival drives out the oldest, or the one
    that is away for long."""
    workload = Workload("by hand")

    def session(start_s: float, gap: Gap, gap_s: float) -> list[Turn]:
        prompt = workload.add(ROOT, 100)
        answer = workload.add(prompt, 1)
        again = workload.add(answer, 10)
        return [Turn(Gap.FIRST, 0.0, start_s, prompt, answer), Turn(gap, gap_s, 0.0, again, workload.add(again, 1))]

    workload.sessions = [session(0.0, Gap.TOOL, 25.0), session(12.0, Gap.PERSON, 500.0)]
    third = workload.add(ROOT, 100)
    workload.sessions.append([Turn(Gap.FIRST, 0.0, 23.0, third, workload.add(third, 1))])
    returned = [request for request in run(workload, STORE).served if (request.session, request.turn) == (0, 1)]
    assert returned[0].device_tokens == 0
    outcome = run(workload, replace(STORE, demote=True))
    returned = [request for request in outcome.served if (request.session, request.turn) == (0, 1)]
    assert returned[0].device_tokens == 100


def test_a_shared_prefix_is_computed_once() -> None:
    workload = Workload("by hand")
    shared = workload.add(ROOT, 100)
    for start_s in (0.0, 50.0):
        own = workload.add(shared, 10)
        workload.sessions.append([Turn(Gap.FIRST, 0.0, start_s, own, workload.add(own, 1))])
    first, second = run(workload, DEVICE_ONLY).served
    assert (first.device_tokens, second.device_tokens) == (0, 100)
    assert second.ttft_s == pytest.approx(1.0)


def test_a_prompt_that_is_all_cached_computes_its_last_page() -> None:
    workload = Workload("by hand")
    prompt = workload.add(ROOT, 100)
    workload.sessions = [[Turn(Gap.FIRST, 0.0, at_s, prompt, workload.add(prompt, 1))] for at_s in (0.0, 50.0)]
    assert run(workload, DEVICE_ONLY).served[1].device_tokens == 90


def test_decoding_waits_while_a_prompt_is_computed() -> None:
    workload = Workload("by hand")
    long, short = workload.add(ROOT, 10), workload.add(ROOT, 20)
    workload.sessions = [
        [Turn(Gap.FIRST, 0.0, 0.0, long, workload.add(long, 5))],
        [Turn(Gap.FIRST, 0.0, 2.5, short, workload.add(short, 1))],
    ]
    outcome = run(workload, DEVICE_ONLY)
    # The first: 1 s of prefill, then steps until 3, when the other one is computed until 5, then the last two steps.
    assert [request.ttft_s for request in outcome.served] == [pytest.approx(1.0), pytest.approx(2.5)]
    assert outcome.duration_s == pytest.approx(7.0)


def test_a_long_prompt_is_computed_in_chunks() -> None:
    workload = Workload("by hand")
    prompt = workload.add(ROOT, 250)
    workload.sessions = [[Turn(Gap.FIRST, 0.0, 0.0, prompt, workload.add(prompt, 1))]]
    cost = replace(COST, chunk_tokens=100, forward_s=1.0)
    fleet = replace(FLEET, device_tokens=300)
    assert run(workload, DEVICE_ONLY, fleet, cost).served[0].ttft_s == pytest.approx(25.0 + 3.0)


def test_a_request_that_never_fits_is_refused() -> None:
    with pytest.raises(SettingsError, match="231 tokens"):
        run(two_agents(), DEVICE_ONLY, replace(FLEET, device_tokens=200))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_every_turn_is_served_once_and_runs_are_equal(policy: Policy) -> None:
    workload = generated(12, 60.0, seed=4, max_gap_s=60).scaled(tokens=0.02)
    fleet = replace(FLEET, device_tokens=8_000, quota_bytes=50_000 * COST.page_bytes)
    cost = replace(COST, token_s=0.001, step_s=0.01, restore_gb_per_s=100.0)
    first, second = (run(workload, policy, fleet, cost) for _ in range(2))
    assert first == second
    expected = {(number, turn) for number, turns in enumerate(workload.sessions) for turn in range(len(turns))}
    assert sorted((request.session, request.turn) for request in first.served) == sorted(expected)
    for request in first.served:
        assert request.ttft_s > 0
        assert request.device_tokens + request.host_tokens + request.nvme_tokens < request.input_tokens
    # The more is stored, the more is found: the fewest hits are those of the device alone.
    if policy.store:
        alone = run(workload, POLICIES[0], fleet, cost)
        assert hit_tokens(first) > hit_tokens(alone)


def hit_tokens(outcome: Outcome) -> int:
    return sum(request.cached_tokens for request in outcome.served)
