"""A session is deleted, and the real bytes of its KV are gone from the disk of a real engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from prompts import PAGE, TINY, Generated, Generator, prompt
from stacks import MakeStack, stats_at_rest, until

from agentstate import Client
from agentstate.cli.local import LocalStack
from agentstate.fleet import manifests
from agentstate.pages import inventory
from agentstate.settings import Settings
from agentstate.sql.database import Database

# What is looked for of each component of each layer of a page. In the first layer, a token's V is the same wherever it
# stands; so many bytes are of several tokens.
SAMPLE_BYTES = 2048

Samples = dict[bytes, list[bytes]]


@pytest.fixture(params=["llama", "sliding"])
def kind(request: pytest.FixtureRequest) -> str:
    """A model with one store, and one with two."""
    name: str = request.param
    return name


@pytest.fixture
def stack(tmp_path: Path, make_stack: MakeStack, checkpoints: Path, kind: str) -> Iterator[LocalStack]:
    with closing(make_stack(tmp_path, checkpoints / kind)) as stack:
        stack.start_service()
        stack.start_engine(*TINY)
        yield stack


def pages_dir(stack: LocalStack) -> Path:
    return Settings(home=stack.home).pages_path


def stored(stack: LocalStack) -> Samples:
    """Of every stored page, by its key, bytes from all its parts. The engine's extents are to be at rest."""
    found: Samples = {}
    for store in inventory.store_directories(pages_dir(stack)):
        for report in inventory.extents(store):
            assert report.header is not None
            data, layout = report.path.read_bytes(), report.header.layout
            for slot, key in enumerate(report.header.keys):
                for layer in range(layout.geometry.layers):
                    for component in range(len(layout.geometry.component_bytes)):
                        at, length = layout.component_range(layer, component, slot, 1)
                        for start in (at, at + max(0, length - SAMPLE_BYTES)):
                            end = min(start + SAMPLE_BYTES, at + length)
                            found.setdefault(key, []).append(data[start:end])
    return found


def on_disk(stack: LocalStack, samples: Samples) -> set[bytes]:
    """Those of the pages of which any file of the page directory has something."""
    files = [path.read_bytes() for path in pages_dir(stack).rglob("*") if path.is_file()]
    return {key for key, of_page in samples.items() if any(sample in data for sample in of_page for data in files)}


def until_gone(stack: LocalStack, samples: Samples) -> None:
    """And until SQL knows it, and the rest is at rest."""

    def gone() -> bool:
        try:
            return not on_disk(stack, samples)
        except FileNotFoundError:
            return False  # one that was just being deleted

    until(gone)
    until(lambda: stack.stat()["erasures"]["waiting"] == 0)
    stats_at_rest(stack)


def keys_of(stack: LocalStack, session_id: str) -> list[bytes]:
    database = Database(Settings(home=stack.home).sqlalchemy_url)
    try:
        with database.read() as connection:
            (found,) = manifests.coverage(connection, [session_id])
            manifest = manifests.load(connection, session_id, found.fingerprint, found.rank, found.node)
    finally:
        database.close()
    assert manifest is not None
    return manifest.page_keys()


def turn(client: Client, stack: LocalStack, session_id: str, text: list[int]) -> Generated:
    with client.turn(session_id, durable_timeout_ms=60_000) as turn:
        answer = Generator(stack.engine_url)(text, **turn.extra_body)
    assert turn.suspended is not None and turn.suspended.kv.state == "durable"
    return answer


def test_no_byte_of_a_deleted_sessions_pages_is_left_and_another_one_is_restored(stack: LocalStack, kind: str) -> None:
    common = prompt(9500, 2 * PAGE)
    texts = [common + prompt(9501 + number, 5 * PAGE + 10) for number in range(3)]
    with Client(stack.service_url, timeout_s=120) as client:
        gone, kept, later = (client.create_session(stack.model) for _ in texts)
        answers = [turn(client, stack, one.id, text) for one, text in zip((gone, kept, later), texts, strict=True)]
        chains = [keys_of(stack, one.id) for one in (gone, kept, later)]
        assert [len(chain) for chain in chains] == [7, 7, 7]
        stats_at_rest(stack)
        samples = stored(stack)
        own = [{key: samples[key] for key in chain[2:]} for chain in chains]
        assert on_disk(stack, samples) == set(samples)

        client.delete(gone.id, revision=client.read(gone.id).revision)
        until_gone(stack, own[0])
        rest = {key: samples[key] for chain in chains[1:] for key in chain}
        assert on_disk(stack, rest) == set(rest)
        # The device has forgotten them too.
        stack.settle()
        stack.flush_device()
        again = turn(client, stack, kept.id, texts[1])
        assert (again.tokens, again.restored) == (answers[1].tokens, 7 * PAGE)
        recomputed = Generator(stack.engine_url)(texts[0])
        assert (recomputed.tokens, recomputed.restored) == (answers[0].tokens, 0)
        assert recomputed.cached == 2 * PAGE or kind == "sliding"

        # An engine that does not run does it when it runs again.
        stats_at_rest(stack)
        stack.stop_engine()
        client.delete(later.id, revision=client.read(later.id).revision)
        assert on_disk(stack, own[2]) == set(own[2])
        stack.start_engine(*TINY)
        until_gone(stack, own[2])
        restored = turn(client, stack, kept.id, texts[1])
        assert (restored.tokens, restored.restored) == (answers[1].tokens, 7 * PAGE)
