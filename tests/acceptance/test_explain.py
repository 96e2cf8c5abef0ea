"""What a real engine says of its requests: where their prompts came from, and what they waited for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prompts import PAGE, TINY, Generator, Stream, prompt
from stacks import MakeStack, until

from agentstate.benchmarks.slow_drive import Drive
from agentstate.cli.local import LocalStack
from agentstate.lookahead.forecast import Forecast

READS = "extents"


@pytest.fixture(scope="module")
def engine(
    tmp_path_factory: pytest.TempPathFactory, make_stack: MakeStack, checkpoints: Path, slow_drive: dict[str, str]
) -> Iterator[LocalStack]:
    """An engine that preloads every restore beside requests that run."""
    with closing(make_stack(tmp_path_factory.mktemp("explain"), checkpoints / "llama")) as stack:
        own = {"AGENTSTATE_PRELOAD_BYTES": "1", "AGENTSTATE_DRIVE_TIMEOUT_S": "3600", "AGENTSTATE_HOST_BYTES": "0"}
        stack.environment = {**stack.environment, **slow_drive, **own, "AGENTSTATE_FORESIGHT": "on"}
        stack.create_database()
        stack.start_engine(*TINY)
        yield stack


def served(stack: LocalStack) -> dict[str, Any]:
    """What is counted, once nothing runs any more."""
    until(lambda: stack.stat()["kept"]["served_requests"] == 0)
    return dict(stack.stat()["served"])


def grown(before: dict[str, Any], after: dict[str, Any]) -> dict[str, dict[str, int]]:
    """By what was waited for before, and by tier: the tokens that have been counted since."""
    tokens = {
        gap: {tier: of["tokens"] - before["hits"][gap][tier]["tokens"] for tier, of in tiers.items()}
        for gap, tiers in after["hits"].items()
    }
    return {
        gap: {tier: count for tier, count in tiers.items() if count}
        for gap, tiers in tokens.items()
        if any(tiers.values())
    }


def test_each_request_tells_where_its_prompt_came_from_and_what_its_session_had_waited_for(engine: LocalStack) -> None:
    generate, rank = Generator(engine.engine_url), engine.control()
    text = prompt(900, 10 * PAGE + 9)
    turn = engine.begin_turn()
    session = turn.session.uid

    def ask() -> dict[str, dict[str, int]]:
        before = served(engine)
        generate(text, session_id=turn.engine_session)
        return grown(before, served(engine))

    def wait(kind: str, forecast: Forecast) -> None:
        said = rank.call("foresee", 60, session=session, forecast=forecast.pack(), waited_ms=0, kind=kind)
        assert said["state"] == "accepted"

    assert ask() == {"first": {"recomputed": len(text)}}
    assert ask() == {"other": {"device": 10 * PAGE, "recomputed": 9}}
    engine.settle()
    wait("person", Forecast.exactly(3600.0))
    # Who empties the device wants it empty: nothing is fetched.
    engine.flush_device()
    assert ask() == {"person": {"nvme": 10 * PAGE, "recomputed": 9}}
    engine.settle()
    engine.flush_device()
    fetched = engine.stat()["foresight"]["fetched"]
    wait("tool", Forecast.exactly(3600.0))
    until(lambda: engine.stat()["foresight"]["fetched"] > fetched)
    assert ask() == {"tool": {"fetched": 10 * PAGE, "recomputed": 9}}
    made = [one for one in rank.call("decisions", 60, after=0)["decisions"] if one["session"] == session]
    assert [(one["decision"], one["outcome"], one["tokens"]) for one in made] == [
        ("fetch", outcome, 10 * PAGE) for outcome in ("begun", "there", "used")
    ]
    explained = rank.call("explain", 60, session=session)
    assert explained["decisions"] == made
    restores = explained["restores"]
    assert [(one["why"], one["tokens"]) for one in restores] == [
        ("request", {"nvme": 10 * PAGE}),
        ("prefetch", {"nvme": 10 * PAGE}),
    ]
    assert all(one["session"] == session and one["bytes"] > 0 and one["seconds"] > 0 for one in restores)
    assert explained["page_map"][0]["device"] and explained["more_tokens"] == 0
    stored = [part for part in explained["page_map"] if part["extent"] is not None]
    assert sum(part["tokens"] for part in stored) >= 10 * PAGE, "the prompt is stored"
    stat = engine.stat()["foresight"]
    assert stat["fetched_bytes"] == stat["used_bytes"] > 0
    # A request that proves no session.
    before = served(engine)
    generate(text)
    assert grown(before, served(engine)) == {"none": {"device": 10 * PAGE, "recomputed": 9}}


def test_a_hint_pins_the_session_whose_turn_its_request_proves(engine: LocalStack) -> None:
    generate, rank = Generator(engine.engine_url), engine.control()
    pin = {"action_id": "a", "action_type": "kv.pin", "action_version": "1.0", "payload": {"duration": 600}}
    hints = {"protocol_version": "0.1", "message_id": "m", "actions": [pin]}
    turn, other = engine.begin_turn(), engine.begin_turn()
    text = prompt(910, 3 * PAGE + 9)
    generate(text, session_id=other.session.uid, kv_hints=hints)
    generate(text, session_id=turn.engine_session, kv_hints=hints)
    until(lambda: "pin" in rank.call("explain", 60, session=turn.session.uid))
    found = rank.call("explain", 60, session=turn.session.uid)["pin"]
    assert found["tier"] == "device" and 0 < found["rest_s"] <= 600
    assert "pin" not in rank.call("explain", 60, session=other.session.uid)
    assert engine.stat()["pins"] == 1
    rank.call("pin", 60, session=turn.session.uid, tier="device", ttl_ms=0)
    assert engine.stat()["pins"] == 0


def test_a_request_that_is_deferred_has_waited_for_reads(engine: LocalStack, drive: Drive) -> None:
    generate = Generator(engine.engine_url)
    text = prompt(901, 12 * PAGE + 9)
    generate(text)
    engine.settle()
    engine.flush_device()
    before = served(engine)
    drive.hang(READS)
    with closing(Stream(engine.engine_url, prompt(902, 30), 2500)) as running:
        running.wait(1)
        with closing(Stream(engine.engine_url, text, 4)) as deferred:
            until(lambda: engine.stat()["preload"]["under_way"] == 1)
            running.wait(len(running.tokens) + 4)
            drive.answer()
            deferred.join()
    after = served(engine)
    assert grown(before, after)["none"]["nvme"] == 12 * PAGE
    assert after["penalty"]["reads"]["requests"] == before["penalty"]["reads"]["requests"] + 1
    assert after["penalty"]["reads"]["seconds"] > before["penalty"]["reads"]["seconds"]
    assert after["penalty"]["memory"] == before["penalty"]["memory"]


def test_a_request_that_finds_no_room_has_waited_for_memory(engine: LocalStack) -> None:
    engine.flush_device()
    before = served(engine)
    with closing(Stream(engine.engine_url, prompt(903, 80 * PAGE), 2500)) as running:
        running.wait(1)
        with closing(Stream(engine.engine_url, prompt(904, 80 * PAGE), 4)) as waiting:
            until(lambda: engine.stat()["kept"]["ordered_requests"] == 1)
            running.wait(len(running.tokens) + 4)
            running.close()
            waiting.join()
    after = served(engine)
    assert grown(before, after) == {"none": {"recomputed": 160 * PAGE}}
    assert after["penalty"]["memory"]["requests"] == before["penalty"]["memory"]["requests"] + 1
    assert after["penalty"]["reads"] == before["penalty"]["reads"]
