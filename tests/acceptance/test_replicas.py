"""Two engines of one model on one machine, each with a page directory of its own: each restores what the other has
written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest
from prompts import PAGE, TINY, Generator, prompt
from stacks import MakeStack, give_up, until

from agentstate.cli.local import LocalStack
from agentstate.client import Client
from agentstate.pages.files import read_header

Engines = tuple[LocalStack, LocalStack]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory, make_stack: MakeStack, checkpoints: Path) -> Iterator[Engines]:
    """In one database, whose service is the first one's."""
    root = tmp_path_factory.mktemp("replicas")
    with ExitStack() as started:
        first = started.enter_context(closing(make_stack(root / "a", checkpoints / "llama")))
        second = started.enter_context(closing(make_stack(root / "b", checkpoints / "llama", beside=first)))
        own = {"AGENTSTATE_PAGES_SIBLINGS": f"{root}/*/pages", "AGENTSTATE_DRIVE_TIMEOUT_S": "3600"}
        first.environment = {**first.environment, **own}
        second.environment = {**second.environment, **own}
        first.start_service()
        first.start_engine(*TINY)
        second.start_engine(*TINY)
        for stack in (first, second):
            until(lambda stack=stack: "is read from there" in (stack.home / "engine.log").read_text())
        yield first, second


def extents(stack: LocalStack) -> dict[int, Path]:
    """By their inodes."""
    return {path.stat().st_ino: path for path in stack.home.glob("pages/*/rank0/extents/*.ext")}


def keys(stack: LocalStack) -> set[bytes]:
    return {key for path in extents(stack).values() for key in read_header(path).keys}


def samples(stack: LocalStack, pages: set[bytes]) -> list[bytes]:
    """Bytes of the last layer of each of ``pages``."""
    found = {}
    for path in extents(stack).values():
        header = read_header(path)
        for slot, key in enumerate(header.keys):
            if key in pages:
                at, length = header.layout.component_range(header.geometry.layers - 1, 0, slot, 1)
                found[key] = path.read_bytes()[at : at + min(length, 2048)]
    assert found.keys() == pages
    return list(found.values())


def written(stack: LocalStack) -> tuple[int, int, int, int]:
    stat = stack.settle()
    store, spill = stat["store"], stat["spill"]
    return store["bytes_written"], store["pages_written"], spill["bytes_spilled"], spill["pages_spilled"]


@pytest.mark.parametrize("writer", [0, 1])
def test_each_restores_all_that_the_other_wrote_and_writes_none_of_it(engines: Engines, writer: int) -> None:
    one, other = engines[writer], engines[1 - writer]
    text = prompt(950 + writer, 12 * PAGE + 5)
    right = Generator(one.engine_url)(text)
    assert right.cached == 0
    one.settle()
    new, before = extents(one), written(other)
    linked = other.stat()["spill"]["pages_linked"]
    answer = Generator(other.engine_url)(text)
    assert (answer.tokens, answer.restored) == (right.tokens, 12 * PAGE)
    assert written(other) == before
    assert other.stat()["spill"]["pages_linked"] == linked + 12
    assert extents(other).keys() <= new.keys(), "the files are the same"
    # From then on it is the other one's as well.
    other.flush_device()
    assert Generator(other.engine_url)(text).restored == 12 * PAGE
    assert written(other) == before


def test_what_goes_on_there_is_written_there_alone(engines: Engines) -> None:
    first, second = engines
    text = prompt(960, 8 * PAGE + 5)
    Generator(first.engine_url)(text)
    first.settle()
    longer = text + prompt(961, 4 * PAGE)
    before = written(second)
    right = Generator(second.engine_url)(longer)
    assert right.restored == 8 * PAGE
    assert written(second)[3] == before[3] + 4
    before = written(first)
    answer = Generator(first.engine_url)(longer)
    assert (answer.tokens, answer.cached) == (right.tokens, 12 * PAGE)
    assert written(first) == before


def test_a_session_that_both_have_served_is_erased_by_both(engines: Engines) -> None:
    first, second = engines
    known = keys(first) | keys(second)
    text = prompt(970, 6 * PAGE + 5)
    with Client(first.service_url, timeout_s=300) as client:
        session = client.create_session(first.model)
        turn = client.resume(session.id)
        assert turn.engine is not None
        for stack in engines:
            Generator(stack.engine_url)(text, **turn.engine.extra_body)
            stack.settle()
        own = (keys(first) | keys(second)) - known
        assert len(own) == 6 and own <= keys(first) and own <= keys(second)
        client.suspend(session.id, turn.lease, durable_timeout_ms=60_000)
        bytes_of_pages = samples(first, own)
        done = [stack.stat()["erasures"]["done"] for stack in engines]
        client.delete(session.id, revision=client.read(session.id).revision)
        for stack, before in zip(engines, done, strict=True):
            until(lambda stack=stack, before=before: stack.stat()["erasures"]["done"] > before)
    assert own.isdisjoint(keys(first) | keys(second))
    files = [path.read_bytes() for stack in engines for path in (stack.home / "pages").rglob("*") if path.is_file()]
    assert not any(some in data for some in bytes_of_pages for data in files)


def test_one_goes_on_when_the_other_was_killed_and_its_directory_deleted(engines: Engines) -> None:
    text = prompt(980, 12 * PAGE + 9)
    with Client(engines[0].service_url, timeout_s=300) as client:
        session = client.create_session(engines[0].model)
        turn = client.resume(session.id)
        assert turn.engine is not None
        first, second = engines if turn.engine.base_url == f"{engines[0].engine_url}/v1" else engines[::-1]
        right = Generator(first.engine_url)(text, **turn.engine.extra_body)
        first.settle()
        before = written(second)
        assert Generator(second.engine_url)(text, **turn.engine.extra_body).restored == 12 * PAGE
        assert written(second) == before
        client.suspend(session.id, turn.lease, durable_timeout_ms=60_000)
        # It is read no more when it has gone, and nothing is lost that has been used.
        unused = prompt(981, 5 * PAGE + 9)
        recomputed = Generator(first.engine_url)(unused)
        first.settle()

        alone = prompt(982, 7 * PAGE + 9)
        served_there = client.create_session(first.model)
        turn = client.resume(served_there.id)
        assert turn.engine is not None
        of_first = Generator(first.engine_url)(alone, **turn.engine.extra_body)
        kv = f"{engines[0].service_url}/v1/sessions/{served_there.id}/kv"
        until(lambda: httpx.get(kv, timeout=300, trust_env=False).raise_for_status().json()["durable_on"])
        client.suspend(served_there.id, turn.lease)

        first.kill_engine()
        give_up(first)
        # What it alone has served is there as long as its directory is.
        turn = client.resume(served_there.id)
        assert turn.engine is not None and turn.engine.base_url == f"{second.engine_url}/v1"
        assert (turn.kv.valid, turn.kv.tokens) == (True, 7 * PAGE)
        client.suspend(served_there.id, turn.lease)
        brought = client.wait_operation(client.prefetch(served_there.id, tier="host").id, timeout_s=300)
        assert brought.result is not None
        assert (brought.result["state"], brought.result["tokens"]) == ("warm", 7 * PAGE)
        turn = client.resume(served_there.id)
        assert turn.engine is not None
        answer = Generator(second.engine_url)(alone, **turn.engine.extra_body)
        assert (answer.tokens, answer.restored) == (of_first.tokens, 7 * PAGE)
        client.suspend(served_there.id, turn.lease, durable_timeout_ms=60_000)

        shutil.rmtree(first.home / "pages")
        until(lambda: not any(rank.reads for rank in second.ranks()))
        second.flush_device()
        turn = client.resume(session.id)
        assert turn.engine is not None and turn.engine.base_url == f"{second.engine_url}/v1"
        assert (turn.kv.valid, turn.kv.tokens) == (True, 12 * PAGE)
        answer = Generator(second.engine_url)(text, **turn.engine.extra_body)
        assert (answer.tokens, answer.restored) == (right.tokens, 12 * PAGE)
        again = Generator(second.engine_url)(unused)
        assert (again.tokens, again.cached) == (recomputed.tokens, 0)
        client.suspend(session.id, turn.lease, durable_timeout_ms=60_000)
    until(lambda: not any(second.stat()["kept"].values()))
