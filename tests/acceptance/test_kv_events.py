"""What SGLang's own subscriber hears of an engine's drive and of the store that it shares, in another process."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from prompts import PAGE, TINY, Generator, prompt
from stacks import MakeStack

from agentstate import Client
from agentstate.cli.local import LocalStack, free_port

MEDIA = ("GPU", "DISK", "EXTERNAL")
WAIT_S = 600


class Router:
    """An index of blocks by their hashes, as a router keeps one: of each medium, what is there, and what was told of
    it. ``lines`` are events as the subscriber prints them."""

    def __init__(self, lines: Iterator[str]):
        self.blocks: dict[str, dict[int, Any]] = {medium: {} for medium in MEDIA}
        self.sessions: set[str | None] = set()
        self._seeds = count()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._follow, args=(lines,), daemon=True)
        self._thread.start()

    def _follow(self, lines: Iterator[str]) -> None:
        for line in lines:
            event = json.loads(line)
            with self._changed:
                self._take(event)
                self._changed.notify_all()

    def _take(self, event: dict[str, Any]) -> None:
        if event["type"] == "AllBlocksCleared":
            for blocks in self.blocks.values():
                blocks.clear()
            return
        blocks = self.blocks[event["medium"]]
        if event["type"] == "BlockRemoved":
            for block in event["block_hashes"]:
                blocks.pop(block, None)
            return
        self.sessions.add(event["session_id"])
        parent, size = event["parent_block_hash"], event["block_size"]
        for at, block in enumerate(event["block_hashes"]):
            blocks[block] = parent, tuple(event["token_ids"][at * size : (at + 1) * size]), event["cache_salt"]
            parent = block

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait until what was heard makes it so."""
        with self._changed:
            assert self._changed.wait_for(condition, WAIT_S), self.blocks

    def connected(self, stack: LocalStack) -> None:
        """Wait until it hears an engine that has just started: nobody is told what was told before they were there."""
        with self._changed:
            for blocks in self.blocks.values():
                blocks.clear()
        generate = Generator(stack.engine_url)
        heard = False
        while not heard:
            # Another one each time: what is heard may be of the engine before.
            text = prompt(7000 + next(self._seeds), PAGE + 1)
            generate(text, max_new_tokens=1)
            page = tuple(text[:PAGE])
            with self._changed:
                heard = self._changed.wait_for(lambda page=page: page in self._told("GPU"), 1)

    def _told(self, medium: str) -> set[tuple[int, ...]]:
        return {told[1] for told in self.blocks[medium].values()}

    def of(self, text: list[int], salt: str, medium: str) -> dict[int, Any]:
        """What was told of the pages of a prompt."""
        pages = {tuple(text[at : at + PAGE]) for at in range(0, len(text) - PAGE + 1, PAGE)}
        return {block: told for block, told in self.blocks[medium].items() if told[1] in pages and told[2] == salt}


@pytest.fixture(scope="module", params=["python", "rust"])
def heard(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    make_stack: MakeStack,
    checkpoints: Path,
    engine_python: Path,
) -> Iterator[tuple[LocalStack, Router]]:
    home, endpoint = tmp_path_factory.mktemp("kv_events"), f"tcp://127.0.0.1:{free_port()}"
    (home / "share").mkdir()
    with ExitStack() as started:
        program = Path(__file__).with_name("kv_subscriber.py")
        subscriber = subprocess.Popen([engine_python, program, endpoint], stdout=subprocess.PIPE, text=True)
        started.callback(subscriber.wait)
        started.callback(subscriber.kill)
        assert subscriber.stdout is not None
        router = Router(iter(subscriber.stdout))
        stack = started.enter_context(closing(make_stack(home, checkpoints / "llama")))
        stack.environment = {
            **stack.environment,
            "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": request.param,
            "AGENTSTATE_SHARED_STORE": f"file://{home / 'share'}",
            "AGENTSTATE_SHARE": "suspend",
            "AGENTSTATE_DRIVE_TIMEOUT_S": "3600",
        }
        stack.start_service()
        config = json.dumps({"publisher": "zmq", "endpoint": endpoint, "bind": True})
        stack.start_engine(*TINY, "--kv-events-config", config)
        router.connected(stack)
        yield stack, router


def test_a_router_hears_where_a_sessions_blocks_are(heard: tuple[LocalStack, Router]) -> None:
    stack, router = heard
    text = prompt(801, 6 * PAGE + 5)
    with Client(stack.service_url, timeout_s=300) as client:
        session = client.create_session(stack.model, cache_salt="agent")
        turn = client.resume(session.id)
        assert turn.engine is not None
        fields = turn.engine.extra_body
        generate = Generator(stack.engine_url)
        right = generate(text, **fields)
        salt = fields["cache_salt"]
        # The same hash, parent, tokens and salt on the drive as on the device.
        router.until(lambda: len(router.of(text, salt, "DISK")) == 6)
        blocks = router.of(text, salt, "GPU")
        assert router.of(text, salt, "DISK") == blocks
        assert router.of(text, salt, "EXTERNAL") == {}
        # The id alone, without what proves the turn.
        assert router.sessions <= {None, fields["session_id"].partition(".")[0]}

        client.suspend(session.id, turn.lease, durability="shared", durable_timeout_ms=60_000)
        router.until(lambda: router.of(text, salt, "EXTERNAL") == blocks)

        # What is stored outlives the device's cache, also to whoever is told that all of that is gone.
        stack.flush_device()
        router.until(lambda: not router.blocks["GPU"])
        router.until(lambda: router.of(text, salt, "DISK") == router.of(text, salt, "EXTERNAL") == blocks)
        assert generate(text, **fields).tokens == right.tokens
        router.until(lambda: router.of(text, salt, "GPU") == blocks)

        client.delete(session.id, revision=client.read(session.id).revision)
        router.until(lambda: not router.of(text, salt, "DISK") and not router.of(text, salt, "EXTERNAL"))


def test_a_request_without_a_session_is_told_of_too(heard: tuple[LocalStack, Router]) -> None:
    stack, router = heard
    text = prompt(802, 3 * PAGE + 5)
    Generator(stack.engine_url)(text, cache_salt="nobody")
    router.until(lambda: len(router.of(text, "nobody", "DISK")) == 3)
    assert router.of(text, "nobody", "DISK") == router.of(text, "nobody", "GPU")


def test_an_engine_that_starts_again_tells_what_is_used(heard: tuple[LocalStack, Router]) -> None:
    stack, router = heard
    text, unused = prompt(803, 4 * PAGE + 5), prompt(804, 4 * PAGE + 5)
    generate = Generator(stack.engine_url)
    right = generate(text, cache_salt="again")
    generate(unused, cache_salt="again")
    router.until(lambda: len(router.of(text, "again", "DISK")) == len(router.of(unused, "again", "DISK")) == 4)
    told = router.of(text, "again", "DISK")
    stack.stop_engine()
    stack.start_engine(*stack.engine_arguments)
    router.connected(stack)
    answer = generate(text, cache_salt="again")
    assert (answer.tokens, answer.restored) == (right.tokens, 4 * PAGE)
    router.until(lambda: router.of(text, "again", "DISK") == router.of(text, "again", "GPU") == told)
    assert router.of(unused, "again", "DISK") == {}
