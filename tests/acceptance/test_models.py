"""Every kind of KV pool, on tiny random models: what left the device comes back, or the request is recomputed, and the
tokens are those of an agent that was never suspended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from prompts import TINY, Generated, Generator, Stream, tokens
from stacks import MakeStack, ask_ranks, stat_at_rest, stats_at_rest, suspend, until

from agentstate.benchmarks.slow_drive import Drive
from agentstate.cli.local import LocalStack
from agentstate.pages.extent import ExtentHeader
from agentstate.pages.files import read_header
from agentstate.pages.inventory import store_directories

PAGE = 64
QUESTION = 7 * PAGE + 20
IMPATIENT = {"AGENTSTATE_DRIVE_TIMEOUT_S": "5"}
Start = Callable[..., LocalStack]


@pytest.fixture
def start(
    tmp_path: Path,
    checkpoints: Path,
    make_stack: MakeStack,
    slow_drive: dict[str, str],
    drive: Drive,
) -> Iterator[Start]:
    """Starts an engine with a model of a kind, on a database without a service; it ends with the test."""
    with ExitStack() as running:

        def start(kind: str, *flags: str, **environment: str) -> LocalStack:
            stack = running.enter_context(closing(make_stack(tmp_path / "stack", checkpoints / kind)))
            stack.environment = {**stack.environment, **slow_drive, **environment}
            stack.create_database()
            stack.start_engine(*TINY, *flags)
            return stack

        yield start


class Agent:
    """Two turns, the second of which has all of the first before it."""

    def __init__(self, stack: LocalStack, seed: int, **fields: Any):
        self._generate = Generator(stack.engine_url)
        self._fields = fields
        self._question, self._next = tokens(seed, QUESTION), tokens(seed + 1, 30)
        self._answer = self._generate(self._question, max_new_tokens=PAGE, **fields)

    def second_turn(self) -> Generated:
        return self._generate([*self._question, *self._answer.tokens, *self._next], 24, **self._fields)


def resumes_like_never_suspended(stack: LocalStack) -> None:
    wanted = Agent(stack, 1, cache_salt="never suspended").second_turn()
    assert wanted.cached and not wanted.restored
    assert Agent(stack, 2).second_turn().tokens != wanted.tokens  # a model that answers everything alike tests nothing
    turn = stack.begin_turn()
    agent = Agent(stack, 1, session_id=turn.engine_session)
    for rank in ask_ranks(stack, "flush", session=turn.session.uid, timeout_ms=30_000):
        assert (rank["state"], rank["tokens"]) == ("durable", wanted.cached)
    suspend(stack)
    resumed = agent.second_turn()
    assert (resumed.tokens, resumed.cached, resumed.restored) == (wanted.tokens, wanted.cached, wanted.cached)
    # The extents of the session are merged: what is stored from now on is newer.
    stats_at_rest(stack)


def extents(stack: LocalStack, store: str) -> dict[Path, ExtentHeader]:
    """Those of the stores whose directory has that name, the newest first."""
    paths = (stack.home / "pages").glob(f"*/{store}/extents/*.ext")
    return {path: read_header(path) for path in sorted(paths, key=lambda path: path.name, reverse=True)}


def damage(stack: LocalStack, store: str, layers: int, slot: int) -> None:
    """Flip a bit in the page at ``slot`` of the newest extent that is so long, in the store of so many layers whose
    directory has that name."""
    found = extents(stack, store).items()
    path, header = next((p, h) for p, h in found if h.geometry.layers == layers and len(h.keys) > slot)
    offset, length = header.layout.component_range(layers - 1, 0, slot, 1)
    with path.open("r+b") as file:
        file.seek(offset + length // 2)
        byte = file.read(1)[0]
        file.seek(offset + length // 2)
        file.write(bytes([byte ^ 1]))


def recomputes_what_was_damaged(stack: LocalStack, store: str, layers: int, slot: int, **fields: Any) -> Generated:
    """With a damaged page. What the resumed turn found."""
    wanted = Agent(stack, 3, cache_salt="never damaged", **fields).second_turn()
    agent = Agent(stack, 3, **fields)
    suspend(stack)
    damage(stack, store, layers, slot)
    resumed = agent.second_turn()
    assert resumed.tokens == wanted.tokens
    assert resumed.cached < wanted.cached
    return resumed


def recomputes_what_does_not_come(stack: LocalStack, drive: Drive, store: str, layers: int) -> None:
    """With a drive that does not answer when it is asked for pages of the store of so many layers whose directory has
    that name."""
    wanted, another = (Agent(stack, seed, cache_salt="never suspended").second_turn() for seed in (5, 7))
    agent, other = Agent(stack, 5), Agent(stack, 7)
    suspend(stack)
    (hanging,) = {path.parents[1] for path, header in extents(stack, store).items() if header.geometry.layers == layers}
    drive.hang(str(hanging))
    recomputed = agent.second_turn()
    assert (recomputed.tokens, recomputed.cached) == (wanted.tokens, 0)
    # Nobody waits for it again, and what is in memory is of use as ever.
    computed = other.second_turn()
    assert (computed.tokens, computed.cached) == (another.tokens, 0)
    assert agent.second_turn().tokens == wanted.tokens
    stats = ask_ranks(stack, "stat")
    abandoned = sum(pool["restore"]["timed_out"] for stat in stats for pool in (stat, *stat["pools"].values()))
    assert abandoned == 1
    assert {stat["restore"]["requests_failed"] for stat in stats} <= {0, 1}
    drive.answer()
    suspend(stack)
    restored = agent.second_turn()
    assert (restored.tokens, restored.restored) == (wanted.tokens, wanted.cached)
    assert all(stat["restore"]["pages_failed"] == 0 for stat in ask_ranks(stack, "stat"))
    # An idle engine counts its memory, and ends when some is missing.
    time.sleep(1)
    assert other.second_turn().tokens == another.tokens


def test_fp8(start: Start) -> None:
    resumes_like_never_suspended(start("llama", "--kv-cache-dtype", "fp8_e4m3"))


def test_mla(start: Start) -> None:
    resumes_like_never_suspended(start("mla"))


def test_sparse_attention(start: Start) -> None:
    """The keys by which it chooses are stored beside the KV: those of three layers, since one has no choice of its
    own."""
    stack = start("sparse")
    resumes_like_never_suspended(stack)
    assert recomputes_what_was_damaged(stack, "rank0", layers=3, slot=2).cached == 2 * PAGE
    stat = stack.stat()
    assert stat["restore"]["pages_failed"] == 0
    assert stat["pools"]["indexer"]["restore"]["pages_failed"] == 1
    wanted = Agent(stack, 9, cache_salt="never suspended").second_turn()
    agent = Agent(stack, 9)
    suspend(stack)
    stack.kill_engine()
    stack.start_engine(*TINY)
    resumed = agent.second_turn()
    assert (resumed.tokens, resumed.restored) == (wanted.tokens, wanted.cached)


def test_a_sliding_window(start: Start) -> None:
    stack = start("sliding")
    resumes_like_never_suspended(stack)
    # Without the last page of the window, a page less can be gone on from: its window is there.
    assert recomputes_what_was_damaged(stack, "rank0", layers=3, slot=0).cached == 7 * PAGE
    stat = stat_at_rest(stack)
    assert stat["restore"]["pages_failed"] == 0
    assert stat["pools"]["swa"]["restore"]["pages_failed"] == 1


def test_a_sliding_window_that_does_not_come(start: Start, drive: Drive) -> None:
    recomputes_what_does_not_come(start("sliding", **IMPATIENT), drive, "rank0", layers=3)


def test_recurrent_state_that_does_not_come(start: Start, drive: Drive) -> None:
    recomputes_what_does_not_come(start("conv", "--page-size", "1", **IMPATIENT), drive, "rank0", layers=3)


@pytest.mark.parametrize("kind", ["llama", "conv"])
def test_a_drive_that_takes_nothing(start: Start, drive: Drive, kind: str) -> None:
    """The engine serves more than its memory holds, though it can store nothing; SGLang ends when the recurrent states
    that are not locked run out."""
    few = ("--max-running-requests", "2", "--max-mamba-cache-size", "16", "--page-size", "1")
    stack = start(kind, *(few if kind == "conv" else ()), **IMPATIENT)
    wanted = Agent(stack, 5, cache_salt="never suspended").second_turn()
    suspend(stack)
    drive.hang("partial")
    for seed in range(20, 40):
        Agent(stack, seed).second_turn()
    assert Agent(stack, 5).second_turn().tokens == wanted.tokens
    # What had waited is answered then, and nothing is locked.
    told = "the drive has taken nothing for 5 s"
    while told not in (stack.home / "engine.log").read_text():
        time.sleep(0.1)
    for seed in range(40, 60):
        Agent(stack, seed).second_turn()
    spill = stack.stat()["spill"]
    assert spill["waiting"] and spill["pages_refused"] + spill["pages_skipped"]
    drive.answer()
    stack.settle()
    # What was not stored is in memory, and is offered again with the next request of its chain.
    agent = Agent(stack, 59)
    wanted = agent.second_turn()
    assert wanted.cached and not wanted.restored
    suspend(stack)
    resumed = agent.second_turn()
    assert (resumed.tokens, resumed.restored) == (wanted.tokens, wanted.cached)
    resumes_like_never_suspended(stack)


def test_a_rank_whose_pages_do_not_come(start: Start, drive: Drive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_CPU_OMP_THREADS_BIND", raising=False)  # the launcher shares out the cores
    recomputes_what_does_not_come(start("llama", "--tp", "2", **IMPATIENT), drive, "rank1", layers=4)


def test_recurrent_state(start: Start) -> None:
    stack = start("conv", "--page-size", "1")
    resumes_like_never_suspended(stack)
    # Without the state at the turn's end, the one at the question's end is the last that can be gone on from.
    assert recomputes_what_was_damaged(stack, "rank0", layers=3, slot=0).cached == QUESTION
    stat = stat_at_rest(stack)
    assert stat["restore"]["pages_failed"] == 0
    assert stat["pools"]["mamba"]["restore"]["pages_failed"] == 1


def test_ranks_agree_on_what_is_restored(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_CPU_OMP_THREADS_BIND", raising=False)  # the launcher shares out the cores
    stack = start("llama", "--tp", "2")
    resumes_like_never_suspended(stack)
    # One rank's restore fails and is discarded on both; then its store has fewer pages than the other one's.
    resumed = recomputes_what_was_damaged(stack, "rank1", layers=4, slot=4)
    assert (resumed.cached, resumed.restored) == (4 * PAGE, 4 * PAGE)
    first, second = stats_at_rest(stack)
    assert (first["rank"], second["rank"]) == (0, 1)
    assert (first["restore"]["pages_failed"], second["restore"]["pages_failed"]) == (0, 1)
    assert first["spill"]["pages_spilled"] + 1 == second["spill"]["pages_spilled"]


def test_ranks_that_hold_the_same_pages_write_them_once(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The latent of MLA is the same on all ranks."""
    monkeypatch.delenv("SGLANG_CPU_OMP_THREADS_BIND", raising=False)  # the launcher shares out the cores
    flags = ("--tp", "2")
    stack = start("mla", *flags)
    resumes_like_never_suspended(stack)
    (store,) = store_directories(stack.home / "pages")
    assert store.name == "rank0"
    first, second = stats_at_rest(stack)
    assert first["spill"]["pages_spilled"] == first["store"]["pages"] > 0
    assert (second["spill"]["bytes_spilled"], second["store"]["bytes"]) == (0, 0)
    assert second["spill"]["pages_known"] == first["spill"]["pages_spilled"] + first["spill"]["pages_known"]
    assert first["restore"]["pages_restored"] == second["restore"]["pages_restored"] > 0
    # A page that is wrong is wrong on both, and is written again by the one.
    assert recomputes_what_was_damaged(stack, "rank0", layers=3, slot=4).cached == 4 * PAGE
    assert [stat["restore"]["pages_failed"] for stat in stats_at_rest(stack)] == [1, 1]
    wanted = Agent(stack, 11, cache_salt="never suspended").second_turn()
    agent = Agent(stack, 11)
    suspend(stack)
    stack.kill_engine()
    stack.start_engine(*TINY, *flags)
    resumed = agent.second_turn()
    assert (resumed.tokens, resumed.cached, resumed.restored) == (wanted.tokens, wanted.cached, wanted.cached)
    assert store_directories(stack.home / "pages") == [store]
    stats_at_rest(stack)


def test_ranks_preload_alike_beside_a_request_that_runs(
    start: Start, drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
    stack = start("llama", "--tp", "2", AGENTSTATE_DRIVE_TIMEOUT_S="3600", AGENTSTATE_PRELOAD_BYTES="1")
    wanted = Agent(stack, 7, cache_salt="never suspended").second_turn()
    agent = Agent(stack, 7)
    suspend(stack)
    with closing(Stream(stack.engine_url, tokens(9, 20), 6000)) as other:
        other.wait(1)
        # One rank's pages are there long before the other's.
        drive.hang("rank1")
        found: list[Generated] = []
        asking = threading.Thread(target=lambda: found.append(agent.second_turn()))
        asking.start()
        until(lambda: ask_ranks(stack, "stat")[0]["restore"]["restores"])
        other.wait(len(other.tokens) + 10)
        assert [stat["preload"]["under_way"] for stat in ask_ranks(stack, "stat")] == [1, 1]
        assert not found
        drive.answer()
        asking.join()
    assert (found[0].tokens, found[0].cached, found[0].preloaded) == (wanted.tokens, wanted.cached, wanted.cached)
    assert [stat["preload"]["requests"] for stat in ask_ranks(stack, "stat")] == [1, 1]
    # What fails on one rank is used on none: it is deferred again for what is left, and the rest of it is computed.
    wanted = Agent(stack, 3, cache_salt="never damaged").second_turn()
    agent = Agent(stack, 3)
    suspend(stack)
    damage(stack, "rank1", layers=4, slot=4)
    with closing(Stream(stack.engine_url, tokens(11, 20), 6000)) as other:
        other.wait(1)
        resumed = agent.second_turn()
    assert (resumed.tokens, resumed.cached, resumed.preloaded) == (wanted.tokens, 4 * PAGE, 4 * PAGE)
    assert [stat["preload"]["failed"] for stat in ask_ranks(stack, "stat")] == [1, 1]
    stack.flush_device()
    time.sleep(0.5)  # an idle engine counts its memory
    assert agent.second_turn().tokens == wanted.tokens


def test_a_model_that_cannot_be_stored_is_served(start: Start) -> None:
    stack = start("all_sliding", "--page-size", "1")
    reason = stack.stat()["off"]
    assert "cannot store what this model keeps" in reason
    log = (stack.home / "engine.log").read_text()
    assert log.count("neither stores nor restores pages") == log.count(reason) == 1
    computed = Agent(stack, 1)
    hit = computed.second_turn()
    assert hit.cached and not hit.restored
    suspend(stack)
    assert computed.second_turn().restored == 0
    assert stack.stat()["spill"]["pages_spilled"] == 0
    assert not store_directories(stack.home / "pages")
