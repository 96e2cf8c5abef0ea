"""Speculative decoding with every tier at once: a preload, a prefetch, host memory and the shared store bring the draft
model's KV too."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prompts import PAGE, Stream
from stacks import MakeStack, all_shared, ask_ranks, suspend
from test_models import tokens
from test_speculation import KINDS, Agent, Engine, is_restored, made, never_suspended

from agentstate.cli.local import LocalStack, free_port


@pytest.fixture(scope="module")
def tiers(tmp_path_factory: pytest.TempPathFactory, checkpoints: Path, make_stack: MakeStack) -> Iterator[Engine]:
    """One that preloads whatever it restores beside others, copies pages to host memory, publishes what it stores, and
    tells routers of it."""
    engine = made(tmp_path_factory.mktemp("tiers"), KINDS["eagle"], checkpoints, make_stack)
    share = tmp_path_factory.mktemp("share")
    own = {
        "AGENTSTATE_PRELOAD_BYTES": "1",
        "AGENTSTATE_HOST_BYTES": "64MiB",
        "AGENTSTATE_SHARED_STORE": share.as_uri(),
        "AGENTSTATE_STORE_KEY": "k" * 32,
        "AGENTSTATE_SHARE": "through",
        "AGENTSTATE_DRIVE_TIMEOUT_S": "3600",
    }
    engine.stack.environment = {**engine.stack.environment, **own}
    events = json.dumps({"publisher": "zmq", "endpoint": f"tcp://127.0.0.1:{free_port()}", "bind": True})
    engine.arguments = (*engine.arguments, "--kv-events-config", events)
    with closing(engine.stack):
        engine.start()
        yield engine


def test_a_preload_beside_a_request_that_runs_brings_the_draft_models_kv(tiers: Engine) -> None:
    agent = Agent(tiers, 41)
    suspend(tiers.stack)
    wanted = never_suspended(tiers, 41)
    with closing(Stream(tiers.stack.engine_url, tokens(43, 20), 4000)) as other:
        other.wait(1)
        found = agent.second_turn()
    is_restored(found, wanted)
    assert found.preloaded == wanted.cached


def test_a_session_that_is_prefetched_to_the_device_has_its_draft_models_kv(tiers: Engine) -> None:
    turn = tiers.stack.begin_turn()
    agent = Agent(tiers, 51, session_id=turn.engine_session)
    ask_ranks(tiers.stack, "flush", session=turn.session.uid, timeout_ms=30_000)
    suspend(tiers.stack)
    wanted = never_suspended(tiers, 51)
    (said,) = ask_ranks(tiers.stack, "prefetch", session=turn.session.uid, tier="device", timeout_ms=60_000)
    assert (said["state"], said["tier"]) == ("warm", "device")
    found = agent.second_turn()
    assert (found.tokens, found.steps) == (wanted.tokens, wanted.steps)
    assert (found.cached, found.restored) == (wanted.cached, 0)


def test_the_draft_models_kv_comes_back_from_host_memory(tiers: Engine) -> None:
    turn = tiers.stack.begin_turn()
    agent = Agent(tiers, 61, session_id=turn.engine_session)
    # The device has 128 pages: what was used before these leaves it.
    for seed in range(70, 78):
        Agent(tiers, seed, session_id=tiers.stack.begin_turn().engine_session)
        while (stat := tiers.stack.settle())["kept"]["locked_demotions"]:
            time.sleep(0.02)
    for seed in range(80, 84):
        tiers.generate(tokens(seed, 28 * PAGE), 1)
    before = tiers.stack.settle()
    found = agent.second_turn()
    after = tiers.stack.settle()
    for earlier, later in ((before, after), (before["pools"]["draft"], after["pools"]["draft"])):
        assert later["restore"]["bytes_read"] == earlier["restore"]["bytes_read"]
        assert later["restore"]["pages_host"] > earlier["restore"]["pages_host"]
    assert stat["host"]["pages_wrong"] == 0
    wanted = never_suspended(tiers, 61)
    is_restored(found, wanted)


def test_a_page_of_the_shared_store_is_whole_too(tiers: Engine) -> None:
    agent = Agent(tiers, 91)
    all_shared(tiers.stack)
    tiers.stack.kill_engine()
    shutil.rmtree(tiers.stack.home / "pages")
    tiers.start()
    all_shared(tiers.stack)
    wanted = never_suspended(tiers, 91)
    found = agent.second_turn()
    is_restored(found, wanted)
    assert all(pool["restore"]["pages_shared"] > 0 for pool in pools(tiers.stack))


def pools(stack: LocalStack) -> list[dict[str, Any]]:
    stat = stack.stat()
    return [stat, *stat["pools"].values()]
