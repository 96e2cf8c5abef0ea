"""An engine whose drive is slow, or does not answer at all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prompts import EXACT, PAGE, Generator, prompt

from agentstate.local import LocalStack

_FAST, _SLOW, _STUCK = 1e12, 5e6, 0
_TIMEOUT_S = 8


@pytest.fixture(scope="module")
def slow_stack(
    tmp_path_factory: pytest.TempPathFactory,
    make_stack: Callable[[Path, Path], LocalStack],
    smollm2: Path,
    slow_drive: dict[str, str],
) -> Iterator[LocalStack]:
    Path(slow_drive["SPEED"]).write_text(str(_FAST))
    with closing(make_stack(tmp_path_factory.mktemp("slow_stack"), smollm2)) as stack:
        own = {"AGENTSTATE_DRIVE_TIMEOUT_S": str(_TIMEOUT_S), "AGENTSTATE_BREAK_EVEN": "off"}
        stack.environment = {**stack.environment, **slow_drive, **own}
        stack.start_service()
        stack.start_engine(*EXACT)
        yield stack


@pytest.fixture
def speed(drive: Path) -> Callable[[float], object]:
    return lambda bytes_a_second: drive.write_text(f"{bytes_a_second} extents")


def prefetching(stack: LocalStack, session: str) -> tuple[threading.Thread, list[dict[str, Any]]]:
    """A prefetch to the device that is under way, and where its answer will be."""
    control, answers = stack.control(), []

    def prefetch() -> None:
        answers.append(control.call("prefetch", 60, session=session, tier="device", timeout_ms=60_000))

    asking = threading.Thread(target=prefetch)
    asking.start()
    time.sleep(0.3)
    assert not answers, "it is over already"
    return asking, answers


def test_a_request_joins_what_is_on_its_way_to_the_device(
    slow_stack: LocalStack, speed: Callable[[float], object]
) -> None:
    generate = Generator(slow_stack.engine_url)
    text, other = prompt(300, 10 * PAGE + 9), prompt(301, 2 * PAGE)
    right = generate(text, session_id="ses_joined")
    slow_stack.settle()
    slow_stack.flush_device()
    before = slow_stack.stat()["restore"]["restores"]
    speed(_SLOW)
    asking, answers = prefetching(slow_stack, "ses_joined")
    found: list[Any] = []
    joining = threading.Thread(target=lambda: found.append(generate(text, session_id="ses_joined")))
    joining.start()
    # Meanwhile others are served.
    started = time.monotonic()
    generate(other, max_new_tokens=1)
    assert not answers, f"another request was kept waiting for {time.monotonic() - started} s"
    for thread in (asking, joining):
        thread.join()
    assert (answers[0]["state"], answers[0]["tier"]) == ("warm", "device")
    assert (found[0].tokens, found[0].cached, found[0].restored) == (right.tokens, 10 * PAGE, 0)
    assert slow_stack.stat()["restore"]["restores"] == before + 1


def test_the_device_is_cleared_while_pages_are_on_their_way(
    slow_stack: LocalStack, speed: Callable[[float], object]
) -> None:
    generate = Generator(slow_stack.engine_url)
    text = prompt(304, 10 * PAGE + 9)
    right = generate(text, session_id="ses_cleared")
    slow_stack.settle()
    slow_stack.flush_device()
    speed(_SLOW)
    asking, answers = prefetching(slow_stack, "ses_cleared")
    slow_stack.flush_device()
    asking.join()
    assert answers[0]["state"] == "cold"
    speed(_FAST)
    restored = generate(text)
    assert (restored.tokens, restored.restored) == (right.tokens, 10 * PAGE)
    time.sleep(0.5)  # an idle engine counts its memory
    assert generate(text).cached == 10 * PAGE


def test_a_request_whose_pages_do_not_come_is_recomputed(
    slow_stack: LocalStack, speed: Callable[[float], object]
) -> None:
    generate = Generator(slow_stack.engine_url)
    text, later = prompt(302, 10 * PAGE + 9), prompt(303, 6 * PAGE + 9)
    right, right_later = generate(text), generate(later)
    slow_stack.settle()
    slow_stack.flush_device()
    before = slow_stack.stat()["restore"]
    speed(_STUCK)
    recomputed = generate(text)
    assert (recomputed.tokens, recomputed.cached) == (right.tokens, 0)
    after = slow_stack.stat()["restore"]
    assert after["timed_out"] == before["timed_out"] + 1
    assert after["requests_failed"] == before["requests_failed"] + 1
    assert (
        "the drive has not answered in time; 1 request(s) are recomputed"
        in (slow_stack.home / "engine.log").read_text()
    )
    # While it does not answer nobody waits for it again.
    answer = generate(later)
    assert (answer.tokens, answer.restored) == (right_later.tokens, 0)
    assert slow_stack.stat()["restore"]["timed_out"] == after["timed_out"]
    # When it does, pages are restored as ever, and an idle engine finds that none of its memory is missing.
    speed(_FAST)
    deadline = time.monotonic() + 120
    while True:
        slow_stack.flush_device()
        answer = generate(text)
        assert answer.tokens == right.tokens
        if answer.restored:
            break
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert answer.restored == 10 * PAGE
    time.sleep(0.5)
    assert generate(later).tokens == right_later.tokens
