"""Prefill and decode on different engines: what either has stored is restored where the next turn is prefilled, nothing
is sent that was not verified, and tokens are those of one engine that never evicts."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
from prompts import PAGE, TINY, Generated, Generator, _generated
from stacks import MakeStack, stat_at_rest, suspend, until
from test_models import QUESTION, damage, tokens
from test_weights import retrained, update
from tools import missing

from agentstate import Client
from agentstate.cli.local import LocalStack, free_port
from agentstate.fleet import manifests, turns
from agentstate.fleet.engines import Phase
from agentstate.sql.database import Database

CHUNK = 256
FLAGS = (*TINY, "--chunked-prefill-size", str(CHUNK), "--disaggregation-transfer-backend", "mooncake_tcp")
# Of a question and two pages of answer: whole pages, without the last token, whose KV nobody has computed.
STORED = (QUESTION + 2 * PAGE - 1) // PAGE * PAGE


@dataclass
class Pair:
    """An engine that prefills, with the service, another one that decodes, and one that does both and never evicts."""

    prefill: LocalStack
    decode: LocalStack
    one: LocalStack
    port: int
    rooms: Iterator[int] = field(default_factory=lambda: count(1))

    def start(self, *flags: str) -> None:
        port = ("--disaggregation-bootstrap-port", str(self.port))
        self.prefill.begin_engine(*FLAGS, *port, "--disaggregation-mode", "prefill", *flags)
        self.decode.begin_engine(*FLAGS, *port, "--disaggregation-mode", "decode", *flags)
        self.prefill.await_engine()
        self.decode.await_engine()

    def ask(self, prompt: list[int], max_new_tokens: int = 24, **fields: Any) -> tuple[Generated, Generated]:
        """What the engine that prefills answers, and the one that decodes, to one request that both are sent: as a
        router does it."""
        sampling = {"max_new_tokens": max_new_tokens, "temperature": 0, "ignore_eos": True}
        room = {"bootstrap_host": "127.0.0.1", "bootstrap_port": self.port, "bootstrap_room": next(self.rooms)}
        body = {"input_ids": prompt, "sampling_params": sampling, **room, **fields}

        def post(stack: LocalStack) -> Generated:
            found = httpx.post(f"{stack.engine_url}/generate", json=body, timeout=300)
            assert found.is_success, found.text
            return _generated(found.json())

        with ThreadPoolExecutor(2) as both:
            prefilled, decoded = both.map(post, (self.prefill, self.decode))
        return prefilled, decoded

    def wanted(self, prompt: list[int], max_new_tokens: int = 24) -> tuple[int, ...]:
        return Generator(self.one.engine_url)(prompt, max_new_tokens).tokens

    def evict(self) -> None:
        """Wait until both have stored everything, and empty their devices."""
        suspend(self.prefill)
        suspend(self.decode)


@pytest.fixture(scope="module")
def mooncake(engine_python: Path) -> None:
    """The library that KV is sent with."""
    found = subprocess.run([engine_python, "-c", "import mooncake.engine"], capture_output=True, text=True)
    if found.returncode:
        missing(f"Mooncake cannot be imported: {found.stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: Path, make_stack: MakeStack, mooncake: None
) -> Iterator[Pair]:
    home, checkpoint = tmp_path_factory.mktemp("pair"), checkpoints / "llama"
    with ExitStack() as running:
        prefill = running.enter_context(closing(make_stack(home / "prefill", checkpoint)))
        prefill.start_service()
        decode = running.enter_context(closing(make_stack(home / "decode", checkpoint, prefill)))
        one = running.enter_context(closing(make_stack(home / "one", checkpoint)))
        one.create_database()
        for stack, other in ((prefill, decode), (decode, prefill)):
            stack.environment = {**stack.environment, "AGENTSTATE_PAGES_SIBLINGS": str(other.home / "pages")}
        pair = Pair(prefill, decode, one, free_port())
        one.begin_engine(*TINY)
        pair.start()
        one.await_engine()
        for stack in (prefill, decode):
            until(lambda stack=stack: "is read from there" in (stack.home / "engine.log").read_text())
        yield pair


def test_a_next_turn_restores_what_was_prefilled_and_what_was_decoded(pair: Pair) -> None:
    question = tokens(1, QUESTION)
    _, first = pair.ask(question, 2 * PAGE)
    assert first.tokens == pair.wanted(question, 2 * PAGE)
    pair.evict()
    context = [*question, *first.tokens, *tokens(2, 30)]
    prefilled, second = pair.ask(context)
    assert second.tokens == pair.wanted(context)
    assert prefilled.restored == STORED
    received = pair.decode.stat()["received"]
    assert received["requests"] >= 2
    assert (received["silent"], received["unlike"]) == (0, 0)


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_page_is_recomputed_before_anything_of_it_is_sent(pair: Pair, seed: int) -> None:
    """Among requests at once, of one chunk and of several."""
    numbers = random.Random(seed)
    prompts = [tokens(numbers.randrange(10**6), numbers.randrange(3, 14) * PAGE + 20) for _ in range(3)]
    wanted = [pair.wanted(prompt) for prompt in prompts]
    assert [pair.ask(prompt)[1].tokens for prompt in prompts] == wanted
    pair.evict()
    damage(pair.prefill, "rank0", 4, numbers.randrange(3))
    before = pair.prefill.stat()["restore"]["requests_failed"]
    with ThreadPoolExecutor(3) as together:
        again = list(together.map(pair.ask, prompts))
    assert [decoded.tokens for _, decoded in again] == wanted
    # Twice where the engine that decodes has linked the file: its copy is found next, and is the same.
    assert stat_at_rest(pair.prefill)["restore"]["requests_failed"] - before in (1, 2)
    stat_at_rest(pair.decode)


def test_a_session_is_stored_on_both_sides_and_resumed_where_prompts_are_computed(pair: Pair) -> None:
    question = tokens(7, QUESTION)
    with Client(pair.prefill.service_url, timeout_s=300) as service:
        listed = {engine.base_url: engine.phase for engine in service.engines().data}
        assert listed == {f"{pair.prefill.engine_url}/v1": "prefill", f"{pair.decode.engine_url}/v1": "decode"}
        session = service.ensure_session("agent", pair.prefill.model)
        with service.turn(session.id, durable_timeout_ms=60_000) as turn:
            assert turn.base_url == f"{pair.prefill.engine_url}/v1"
            _, first = pair.ask(question, 2 * PAGE, **turn.extra_body)
        assert turn.suspended is not None
        assert (turn.suspended.kv.state, turn.suspended.kv.tokens) == ("durable", STORED)
        pair.evict()
        context = [*question, *first.tokens, *tokens(8, 30)]
        with service.turn(session.id, durable_timeout_ms=60_000) as turn:
            assert turn.base_url == f"{pair.prefill.engine_url}/v1"
            prefilled, second = pair.ask(context, **turn.extra_body)
        assert (prefilled.restored, second.tokens) == (STORED, pair.wanted(context))
    with closing(Database(pair.prefill.database_url)) as database, database.read() as connection:
        uid, _ = turns.split(turn.extra_body["session_id"])
        stored = {found.node: found.tokens for found in manifests.coverage(connection, [uid])}
    nodes = {engine.phase: engine.node for engine in (*pair.prefill.ranks(), *pair.decode.ranks())}
    assert stored[nodes[Phase.DECODE]] > stored[nodes[Phase.PREFILL]] >= STORED


def test_what_other_weights_have_prefilled_is_not_stored(pair: Pair, checkpoints: Path, tmp_path: Path) -> None:
    """Those of the engine that prefills are updated, and then its first ones again."""

    def prefill(seed: int) -> tuple[int, int]:
        """How many pages the engine that decodes has stored since, and how many requests it has refused to."""
        before = stat_at_rest(pair.decode)
        pair.ask(tokens(seed, QUESTION), 2 * PAGE)
        pair.evict()
        after = stat_at_rest(pair.decode)
        stored = [sum(stat["spill"][name] for name in ("pages_spilled", "pages_linked")) for stat in (before, after)]
        return stored[1] - stored[0], after["received"]["unlike"] - before["received"]["unlike"]

    pair.evict()
    assert update(pair.prefill.engine_url, retrained(checkpoints / "llama", tmp_path / "retrained"))[0] == 200
    assert prefill(11) == (0, 1)
    pair.evict()
    assert update(pair.prefill.engine_url, checkpoints / "llama")[0] == 200
    stored, refused = prefill(12)
    assert stored > 0
    assert refused == 0
