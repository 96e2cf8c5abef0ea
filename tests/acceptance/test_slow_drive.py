"""An engine whose drive does not answer, or not yet."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prompts import PAGE, TINY, Generator, Stream, prompt
from stacks import MakeStack, suspend

from agentstate.benchmarks.slow_drive import Drive
from agentstate.cli.local import LocalStack

READS = "extents"

patient = pytest.mark.parametrize("stack", [3600], indirect=True, ids=["patient"])
impatient = pytest.mark.parametrize("stack", [5], indirect=True, ids=["impatient"])


@pytest.fixture(scope="module")
def stack(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    make_stack: MakeStack,
    checkpoints: Path,
    slow_drive: dict[str, str],
) -> Iterator[LocalStack]:
    """An engine that waits for its drive so many seconds."""
    with closing(make_stack(tmp_path_factory.mktemp("slow_stack"), checkpoints / "llama")) as stack:
        own = {"AGENTSTATE_DRIVE_TIMEOUT_S": str(request.param), "AGENTSTATE_PRELOAD_BYTES": "1"}
        stack.environment = {**stack.environment, **slow_drive, **own}
        stack.create_database()
        stack.start_engine(*TINY)
        yield stack


def prefetching(stack: LocalStack, drive: Drive, session: str) -> tuple[threading.Thread, list[dict[str, Any]]]:
    """A prefetch to the device that waits for the drive, and where its answer will be."""
    control, answers = stack.control(), []

    def prefetch() -> None:
        answers.append(control.call("prefetch", 1200, session=session, tier="device", timeout_ms=1_200_000))

    drive.hang(READS)
    asking = threading.Thread(target=prefetch)
    asking.start()
    drive.await_caller()
    return asking, answers


@patient
def test_a_request_joins_what_is_on_its_way_to_the_device(stack: LocalStack, drive: Drive) -> None:
    generate = Generator(stack.engine_url)
    text, other = prompt(300, 10 * PAGE + 9), prompt(301, 2 * PAGE)
    turn = stack.begin_turn()
    right = generate(text, session_id=turn.engine_session)
    suspend(stack)
    before = stack.stat()["restore"]["restores"]
    asking, answers = prefetching(stack, drive, turn.session.uid)
    found: list[Any] = []
    joining = threading.Thread(target=lambda: found.append(generate(text, session_id=turn.engine_session)))
    joining.start()
    # Meanwhile others are served.
    generate(other, max_new_tokens=1)
    assert not answers and not found
    drive.answer()
    for thread in (asking, joining):
        thread.join()
    assert (answers[0]["state"], answers[0]["tier"]) == ("warm", "device")
    assert (found[0].tokens, found[0].cached, found[0].restored) == (right.tokens, 10 * PAGE, 0)
    assert stack.stat()["restore"]["restores"] == before + 1


@patient
def test_what_comes_while_its_pages_are_restored_does_not_restore_them_again(stack: LocalStack, drive: Drive) -> None:
    generate = Generator(stack.engine_url)
    text = prompt(307, 10 * PAGE)
    forks = [text + prompt(308 + number, 30) for number in range(2)]
    right = [generate(fork).tokens for fork in forks]
    suspend(stack)
    before = stack.stat()["restore"]["pages_restored"]
    drive.hang(READS)
    found: list[Any] = []
    asked = [threading.Thread(target=lambda fork=fork: found.append(generate(fork))) for fork in forks]
    asked[0].start()
    # The engine waits for the drive, and hears of the other one after that.
    drive.await_caller()
    asked[1].start()
    # The later it hears of it, the less there is to see; what is asserted holds in any case.
    time.sleep(1)
    drive.answer()
    for request in asked:
        request.join()
    assert sorted(answer.tokens for answer in found) == sorted(right)
    assert [answer.cached for answer in found] == [10 * PAGE] * 2
    assert stack.stat()["restore"]["pages_restored"] == before + 10


@patient
def test_the_device_is_cleared_while_pages_are_on_their_way(stack: LocalStack, drive: Drive) -> None:
    generate = Generator(stack.engine_url)
    text = prompt(304, 10 * PAGE + 9)
    turn = stack.begin_turn()
    right = generate(text, session_id=turn.engine_session)
    suspend(stack)
    pause_s = 0.2
    while True:
        asking, answers = prefetching(stack, drive, turn.session.uid)
        # It waits for the drive: nothing may write to memory that is given out again.
        clearing = threading.Thread(target=stack.flush_device)
        clearing.start()
        time.sleep(pause_s)
        drive.answer()
        clearing.join()
        asking.join()
        if answers[0]["state"] == "cold":
            break
        # The drive has answered before the engine heard of the flush: once more, and later.
        assert answers[0]["state"] == "warm" and pause_s < 100
        pause_s *= 2
    restored = generate(text)
    assert (restored.tokens, restored.restored) == (right.tokens, 10 * PAGE)
    time.sleep(0.5)  # an idle engine counts its memory
    assert generate(text).cached == 10 * PAGE


@impatient
def test_a_request_whose_pages_do_not_come_is_recomputed(stack: LocalStack, drive: Drive) -> None:
    generate = Generator(stack.engine_url)
    text, later = prompt(302, 10 * PAGE + 9), prompt(303, 6 * PAGE + 9)
    right, right_later = generate(text), generate(later)
    suspend(stack)
    before = stack.stat()["restore"]
    drive.hang(READS)
    recomputed = generate(text)
    assert (recomputed.tokens, recomputed.cached) == (right.tokens, 0)
    after = stack.stat()["restore"]
    assert after["timed_out"] == before["timed_out"] + 1
    assert after["requests_failed"] == before["requests_failed"] + 1
    assert "the drive has not answered in time; 1 request(s) are recomputed" in (stack.home / "engine.log").read_text()
    # While it does not answer nobody waits for it again.
    answer = generate(later)
    assert (answer.tokens, answer.restored) == (right_later.tokens, 0)
    assert stack.stat()["restore"]["timed_out"] == after["timed_out"]
    drive.answer()
    restores_again(stack, text, right.tokens)
    assert generate(later).tokens == right_later.tokens


def restores_again(stack: LocalStack, text: list[int], tokens: tuple[int, ...]) -> None:
    """When the drive answers, pages are restored as ever, and an idle engine finds that none of its memory is
    missing."""
    generate = Generator(stack.engine_url)
    while True:
        stack.flush_device()
        answer = generate(text)
        assert answer.tokens == tokens
        if answer.restored:
            break
        time.sleep(0.1)
    assert answer.restored == 10 * PAGE
    time.sleep(0.5)
    assert generate(text).tokens == tokens


@impatient
def test_nobody_waits_for_a_long_restore_whose_pages_do_not_come(stack: LocalStack, drive: Drive) -> None:
    generate = Generator(stack.engine_url)
    text = prompt(305, 10 * PAGE + 9)
    right = generate(text)
    suspend(stack)
    before = stack.stat()
    # It decodes while the drive is waited for, and its forwards never wait.
    with closing(Stream(stack.engine_url, prompt(306, 30), 6000)) as other:
        other.wait(1)
        drive.hang(READS)
        recomputed = generate(text)
        assert (recomputed.tokens, recomputed.cached) == (right.tokens, 0)
        after = stack.stat()
        assert after["preload"]["failed"] == before["preload"]["failed"] + 1
        assert after["restore"]["timed_out"] == before["restore"]["timed_out"] + 1
        assert after["restore"]["forward_wait_s"] == before["restore"]["forward_wait_s"]
        drive.answer()
    restores_again(stack, text, right.tokens)


READER = """
import os, sys, threading, time
fd = os.open(sys.argv[1], os.O_RDONLY)
readers = [threading.Thread(target=os.preadv, args=(fd, [bytearray(250_000)], 0)) for _ in range(4)]
start = time.monotonic()
for reader in readers: reader.start()
for reader in readers: reader.join()
print(time.monotonic() - start)
"""


def test_a_slow_drive_is_as_slow_for_all_threads_together(
    tmp_path: Path, slow_drive: dict[str, str], drive: Drive
) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(250_000))
    drive.set(1e6, "file")
    command = [sys.executable, "-c", READER, str(file)]
    took_s = float(subprocess.run(command, env=slow_drive, capture_output=True, text=True, check=True).stdout)
    assert took_s >= 1.0
