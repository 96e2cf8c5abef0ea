"""What an engine keeps for requests, and SGLang for it, is gone when they are, whatever becomes of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from prompts import EXACT, PAGE, Generator, tokens
from stacks import MakeStack, stat_at_rest

from agentstate.cli.local import LocalStack
from agentstate.pages.files import read_header

POOL_PAGES = 64
QUOTA_PAGES = 40
SAMPLING = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, make_stack: MakeStack, checkpoints: Path) -> Iterator[LocalStack]:
    """With SGLang's default tree, and little memory on the device and on disk."""
    with closing(make_stack(tmp_path_factory.mktemp("left"), checkpoints / "llama")) as stack:
        stack.environment = {
            **stack.environment,
            "AGENTSTATE_PAGES_QUOTA": str(QUOTA_PAGES * PAGE * 4 * 2 * 2 * 32 * 4),
            "AGENTSTATE_PREFETCH_TTL_S": "1",
        }
        stack.start_service()
        memory = ("--max-total-tokens", str(POOL_PAGES * PAGE), "--chunked-prefill-size", "512")
        # Requests are admitted that there is no room for in the end.
        stack.start_engine("--skip-tokenizer-init", *EXACT, *memory, "--schedule-conservativeness", "0.1")
        yield stack


def open_extents(stack: LocalStack) -> list[str]:
    """The stack's extents that any process has open."""
    links = []
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            links.append(os.readlink(descriptor))
    return [link for link in links if link.startswith(str(stack.home)) and ".ext" in link]


class Storm:
    """Requests on threads of their own, and what can happen to them."""

    def __init__(self, stack: LocalStack):
        self._stack = stack
        self._running: list[threading.Thread] = []
        self._begun: dict[str, threading.Event] = {}

    def ask(self, rid: str, prompt: list[int], new: int = 8, *, leaves: bool = False) -> None:
        """Begin a request, whose client ``leaves`` when the first token is there."""
        self._begun[rid] = threading.Event()
        self._running.append(threading.Thread(target=self._ask, args=(rid, prompt, new, leaves)))
        self._running[-1].start()

    def _ask(self, rid: str, prompt: list[int], new: int, leaves: bool) -> None:
        body = {"rid": rid, "input_ids": prompt, "sampling_params": {**SAMPLING, "max_new_tokens": new}}
        body |= {"stream": True, "session_id": self._stack.begin_turn().engine_session}
        try:
            with httpx.stream("POST", f"{self._stack.engine_url}/generate", json=body, timeout=300) as answer:
                for _ in answer.iter_lines():
                    self._begun[rid].set()
                    if leaves:
                        return
        finally:
            self._begun[rid].set()

    def await_first_token(self, rid: str) -> None:
        """Wait until a request computes, or has ended."""
        assert self._begun[rid].wait(300)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self._stack.engine_url}/{path}", json=body, timeout=300)

    def end(self) -> None:
        """Wait for every request."""
        for running in self._running:
            running.join(300)
            assert not running.is_alive()
        self._running.clear()


def flip_everything(stack: LocalStack) -> None:
    """One bit in the first page of every extent."""
    for path in stack.home.glob("pages/*/rank0/extents/*.ext"):
        offset, _ = read_header(path).layout.component_range(2, 1, 0, 1)
        with path.open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1]))


def test_nothing_is_left_of_storms(stack: LocalStack) -> None:
    generate, storm = Generator(stack.engine_url), Storm(stack)
    assert stat_at_rest(stack)["kept"]
    common = tokens(1, 8 * PAGE)
    right = generate(common, max_new_tokens=4).tokens

    # Forks of one prefix that is on disk: all of them at once.
    for round in range(2):
        stack.settle()
        stack.flush_device()
        for fork in range(6):
            storm.ask(f"fork-{round}-{fork}", common + tokens(10 + fork, 30))
        storm.end()
    stat_at_rest(stack)
    assert stack.stat()["restore"]["pages_restored"] >= 8

    # More than there is memory for: some are retracted. Others are aborted, or their clients leave.
    for number in range(4):
        storm.ask(f"long-{number}", tokens(30 + number, 3 * PAGE), new=4 * PAGE, leaves=number > 1)
    storm.await_first_token("long-0")
    storm.post("abort_request", rid="long-0")
    # Whose end is not known in advance: SGLang reckons with less for them.
    lengthy = [tokens(80 + number, 3 * PAGE) for number in range(12)]
    storm.post("generate", input_ids=lengthy, sampling_params={"temperature": 0, "max_new_tokens": 8 * PAGE})
    storm.end()
    assert "Retract requests" in (stack.home / "engine.log").read_text()
    stat_at_rest(stack)

    # Pauses of each kind, with a flush of the device in the one that allows for it, and an abort of all.
    for mode in ("in_place", "retract", "abort"):
        for number in range(4):
            storm.ask(f"{mode}-{number}", common + tokens(40 + number, 2 * PAGE), new=64)
        storm.await_first_token(f"{mode}-0")
        storm.post("pause_generation", mode=mode).raise_for_status()
        if mode == "retract":
            storm.post("flush_cache")
        storm.post("abort_request", rid=f"{mode}-2")
        storm.post("continue_generation").raise_for_status()
        if mode == "in_place":
            storm.post("abort_request", abort_all=True)
        storm.end()
    stat_at_rest(stack)

    # Pages that are damaged, sessions that are brought back, and requests that are aborted meanwhile.
    turn = stack.begin_turn()
    generate(common, max_new_tokens=4, session_id=turn.engine_session)
    stat_at_rest(stack)
    stack.flush_device()
    flip_everything(stack)
    failed = stack.stat()["restore"]["requests_failed"]
    for number in range(4):
        storm.ask(f"damaged-{number}", common + tokens(50 + number, PAGE))
    for tier in ("device", "host"):
        stack.control().call("prefetch", 60, session=turn.session.uid, tier=tier, timeout_ms=0)
    storm.post("abort_request", rid="damaged-1")
    storm.end()
    assert stack.stat()["restore"]["requests_failed"] > failed
    stat_at_rest(stack)

    assert open_extents(stack) == []
    assert generate(common, max_new_tokens=4).tokens == right


def test_what_was_evicted_from_disk_while_it_is_on_the_device_is_stored_again(stack: LocalStack) -> None:
    generate, rank = Generator(stack.engine_url), stack.control()

    def flush(session: str) -> tuple[str, int]:
        answer = rank.call("flush", 60, session=session, timeout_ms=60_000)
        return answer["state"], answer["pages"]

    stack.flush_device()
    text, other = tokens(60, 16 * PAGE + 1), tokens(61, 36 * PAGE)
    lost, taker = stack.begin_turn(), stack.begin_turn()
    right = generate(text, session_id=lost.engine_session)
    assert flush(lost.session.uid) == ("durable", 16)
    # An extent that is being merged cannot be evicted: what finds no room for that is stored with the next request.
    for _ in range(20):
        generate(other, max_new_tokens=1, session_id=taker.engine_session)
        if flush(taker.session.uid) == ("durable", 36):
            break
    assert flush(taker.session.uid) == ("durable", 36)
    assert flush(lost.session.uid) == ("lost", 0)
    hit = generate(text, session_id=lost.engine_session)
    assert (hit.cached, hit.restored) == (16 * PAGE, 0)
    assert flush(lost.session.uid) == ("durable", 16)
    stack.flush_device()
    restored = generate(text, session_id=lost.engine_session)
    assert restored.restored == 16 * PAGE
    assert restored.tokens == hit.tokens == right.tokens


def test_nothing_is_left_of_a_weight_update_that_fails(stack: LocalStack) -> None:
    """The last one: an engine may store nothing after it."""
    storm = Storm(stack)
    for number in range(4):
        storm.ask(f"update-{number}", tokens(70 + number, 4 * PAGE), new=64)
    storm.await_first_token("update-0")
    assert storm.post("update_weights_from_disk", model_path=str(stack.home / "nowhere")).is_error
    storm.end()
    stat_at_rest(stack)
    assert open_extents(stack) == []
