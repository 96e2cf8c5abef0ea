"""A long restore beside requests that decode: they go on while its pages are read, however long that takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from prompts import PAGE, TINY, Generator, Stream, prompt
from stacks import MakeStack, suspend, until

from agentstate.benchmarks.beside import Beside, Variant
from agentstate.benchmarks.slow_drive import Drive
from agentstate.cli.local import LocalStack

READS = "extents"
_EIGHT = [prompt(500 + number, 30) for number in range(8)]
_TOKENS = 12


@pytest.fixture(scope="module")
def beside(
    tmp_path_factory: pytest.TempPathFactory, make_stack: MakeStack, checkpoints: Path, slow_drive: dict[str, str]
) -> Iterator[LocalStack]:
    """An engine that preloads every restore beside requests that run, and waits for its drive for an hour."""
    with closing(make_stack(tmp_path_factory.mktemp("beside"), checkpoints / "llama")) as stack:
        own = {"AGENTSTATE_PRELOAD_BYTES": "1", "AGENTSTATE_DRIVE_TIMEOUT_S": "3600"}
        stack.environment = {**stack.environment, **slow_drive, **own}
        stack.create_database()
        stack.start_engine(*TINY, "--max-total-tokens", "32768")
        yield stack


@contextmanager
def eight_decoding(stack: LocalStack) -> Iterator[list[Stream]]:
    """Eight requests that have begun to decode, and would for longer than any test takes."""
    with ExitStack() as ending:
        streams = [ending.enter_context(closing(Stream(stack.engine_url, text, 2500))) for text in _EIGHT]
        for stream in streams:
            stream.wait(1)
        yield streams


def preload_stat(stack: LocalStack) -> dict[str, Any]:
    return dict(stack.stat()["preload"])


def go_on(streams: list[Stream], tokens: int = _TOKENS) -> None:
    """Each of them produces so many more tokens from now on."""
    for stream, more in [(stream, len(stream.tokens) + tokens) for stream in streams]:
        stream.wait(more)


def test_eight_requests_decode_while_a_ninth_is_restored(beside: LocalStack, drive: Drive) -> None:
    generate = Generator(beside.engine_url)
    text = prompt(600, 16 * PAGE + 9)
    right = generate(text)
    right_eight = [answer.tokens for answer in generate.batch(_EIGHT, _TOKENS)]
    suspend(beside)
    before = beside.stat()
    drive.hang(READS)
    with eight_decoding(beside) as streams:
        with closing(Stream(beside.engine_url, text, 8)) as ninth:
            until(lambda: preload_stat(beside)["under_way"] == 1)
            go_on(streams)
            # Nothing of it has come, and it runs as soon as its pages have.
            assert preload_stat(beside)["under_way"] == 1
            assert not ninth.tokens
            drive.answer()
            restored = ninth.join()
        go_on(streams)
        assert [stream.tokens[:_TOKENS] for stream in streams] == right_eight
    assert (restored.tokens, restored.cached, restored.preloaded) == (right.tokens, 16 * PAGE, 16 * PAGE)
    after = beside.stat()
    assert after["preload"]["requests"] == before["preload"]["requests"] + 1
    assert after["preload"]["pages"] == before["preload"]["pages"] + 16
    assert after["restore"]["restores"] == before["restore"]["restores"] + 1
    assert after["restore"]["forward_wait_s"] == before["restore"]["forward_wait_s"]
    beside.flush_device()  # it is refused while anything runs
    time.sleep(0.5)  # an idle engine counts its memory
    # With nothing beside it, it is restored layer by layer.
    again = generate(text)
    assert (again.tokens, again.restored, again.preloaded) == (right.tokens, 16 * PAGE, 0)
    log = (beside.home / "engine.log").read_text()
    assert f"agentstate: restored {16 * PAGE} tokens for" in log
    assert "source device" in log


def test_requests_that_begin_alike_are_read_for_once(beside: LocalStack, drive: Drive) -> None:
    generate = Generator(beside.engine_url)
    text = prompt(601, 12 * PAGE)
    forks = [text + prompt(610 + number, 30) for number in range(3)]
    right = [generate(fork).tokens for fork in forks]
    suspend(beside)
    before = beside.stat()
    drive.hang(READS)
    with eight_decoding(beside) as streams, ExitStack() as ending:
        found = [ending.enter_context(closing(Stream(beside.engine_url, fork, 8))) for fork in forks]
        until(lambda: preload_stat(beside)["deferred"] == len(forks))
        assert preload_stat(beside)["under_way"] == 1
        go_on(streams)
        assert not any(stream.tokens for stream in found)
        drive.answer()
        answers = [stream.join() for stream in found]
    assert [answer.tokens for answer in answers] == right
    assert [answer.preloaded for answer in answers] == [12 * PAGE] * 3
    after = beside.stat()
    assert after["preload"]["preloads"] == before["preload"]["preloads"] + 1
    assert after["restore"]["pages_restored"] == before["restore"]["pages_restored"] + 12


def test_a_client_that_leaves_while_its_pages_are_read(beside: LocalStack, drive: Drive) -> None:
    generate = Generator(beside.engine_url)
    text = prompt(602, 12 * PAGE + 9)
    right = generate(text)
    suspend(beside)
    drive.hang(READS)
    with eight_decoding(beside) as streams:
        with closing(Stream(beside.engine_url, text, 8)):
            until(lambda: preload_stat(beside)["under_way"] == 1)
        go_on(streams)
        drive.answer()
        until(lambda: preload_stat(beside)["under_way"] == 0)
    # What was read for it is on the device, for whoever comes next.
    hit = generate(text)
    assert (hit.tokens, hit.cached, hit.restored) == (right.tokens, 12 * PAGE, 0)
    beside.flush_device()
    time.sleep(0.5)  # an idle engine counts its memory
    assert generate(text).restored == 12 * PAGE


def test_its_cost_is_measured(beside: LocalStack, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = count(700)
    monkeypatch.setattr("agentstate.benchmarks.beside.unseen", lambda tokens: prompt(next(seeds), tokens))
    variants = (Variant.NONE, Variant.HIT, Variant.PRELOADED)
    told: list[str] = []
    step = partial(told.append, "step")
    measure = Beside(dict.fromkeys(variants, beside), 8 * PAGE, 2, 100, told.append, step, most=6000)
    row = asyncio.run(measure.run(rounds=2))
    assert told == ["computing the context", "round 1", "step", "round 2", "step"]
    assert [len(row[f"{variant}_p99_all_s"]) for variant in variants] == [2, 2, 2]
    assert [row[f"{variant}_ninth_ttft_s"] is None for variant in variants] == [True, False, False]
    assert row["preloaded_to_hit"] > 0
