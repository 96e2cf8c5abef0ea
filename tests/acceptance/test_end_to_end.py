"""What a user is promised: a context that left the device comes back from disk, unchanged, or is computed again."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from prompts import PAGE, Generator, prompt
from stacks import stat_at_rest, until

from agentstate.cli.local import LocalStack, Process, spawn
from agentstate.client import Client, message
from agentstate.pages.extent import KEY_BYTES
from agentstate.pages.files import read_header


def spilled(stack: LocalStack) -> dict[str, Any]:
    """The spill's counters once everything that was offered is stored."""
    return dict(stack.settle()["spill"])


def extents(stack: LocalStack) -> list[Path]:
    """Once no more come or go: those of sessions are merged."""
    stat_at_rest(stack)
    return sorted(stack.home.glob("pages/*/rank0/extents/*.ext"))


def flip(path: Path, key: bytes | None = None, layer: int = 3) -> None:
    """Flip one bit in the slab of a layer: in the page ``key``, or in the extent's first page."""
    header = read_header(path)
    slot = header.keys.index(key) if key is not None else 0
    offset, _ = header.layout.component_range(layer, 1, slot, 1)
    with path.open("r+b") as file:
        file.seek(offset + 100)
        byte = file.read(1)[0]
        file.seek(offset + 100)
        file.write(bytes([byte ^ 1]))


def test_an_engine_computes_a_prompt_before_it_is_ready_and_keeps_nothing_of_it(
    stack: LocalStack, generate: Generator
) -> None:
    # It answers a moment before it says so.
    until(lambda: "The server is fired up" in (stack.home / "engine.log").read_text())
    before, _, _ = (stack.home / "engine.log").read_text().partition("The server is fired up")
    assert "#new-token: 512, #cached-token: 0" in before
    # The same prompt: a quarter into SmolLM2's vocabulary, one after the other.
    again = generate(list(range(49_152 // 4, 49_152 // 4 + 512)), max_new_tokens=1)
    assert (again.cached, again.restored) == (0, 0)


def test_restores_after_a_flush_with_identical_tokens(stack: LocalStack, generate: Generator) -> None:
    text = prompt(1, 20 * PAGE + 30)
    computed = generate(text)
    hit = generate(text)
    assert (hit.cached, hit.restored) == (20 * PAGE, 0)
    spilled(stack)
    stack.flush_device()
    before = stack.stat()["restore"]["bytes_straight"]
    restored = generate(text)
    assert (restored.cached, restored.restored) == (20 * PAGE, 20 * PAGE)
    assert restored.tokens == hit.tokens == computed.tokens
    assert stack.stat()["restore"]["bytes_straight"] > before, "the KV pool is not aligned, or is not read into"


def test_restores_what_a_longer_prompt_shares(stack: LocalStack, generate: Generator) -> None:
    # More new tokens than a chunk holds: the restored prefix is the first chunk's.
    text = prompt(2, 10 * PAGE)
    longer = text + prompt(3, 1200)
    # With the same turns: in bfloat16 the borders of the chunks decide about the last bits.
    generate(text, cache_salt="reference")
    never_suspended = generate(longer, cache_salt="reference")
    assert (never_suspended.cached, never_suspended.restored) == (10 * PAGE, 0)
    generate(text)
    spilled(stack)
    stack.flush_device()
    restored = generate(longer)
    assert restored.restored == 10 * PAGE
    assert restored.tokens == never_suspended.tokens


def test_nothing_is_written_twice(stack: LocalStack, generate: Generator) -> None:
    text = prompt(4, 8 * PAGE + 1)
    generate(text, max_new_tokens=1)
    before = spilled(stack)
    for _ in range(3):
        stack.flush_device()
        assert generate(text, max_new_tokens=1).restored == 8 * PAGE
    after = spilled(stack)
    assert after["pages_spilled"] == before["pages_spilled"]
    assert after["pages_known"] > before["pages_known"]


def test_sessions_share_the_pages_of_a_common_system_prompt(stack: LocalStack, generate: Generator) -> None:
    system = prompt(5, 12 * PAGE)
    generate(system + prompt(6, 4 * PAGE + 1), max_new_tokens=1, session_id=stack.begin_turn().engine_session)
    before = spilled(stack)["pages_spilled"]
    generate(system + prompt(7, 4 * PAGE + 1), max_new_tokens=1, session_id=stack.begin_turn().engine_session)
    assert spilled(stack)["pages_spilled"] == before + 4
    keys = [key for path in extents(stack) for key in read_header(path).keys]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("namespace", [{"cache_salt": "other"}, {"extra_key": "other"}])
def test_another_namespace_restores_nothing(stack: LocalStack, generate: Generator, namespace: dict[str, str]) -> None:
    text = prompt(8, 6 * PAGE + 1)
    own = generate(text, cache_salt="own")
    spilled(stack)
    stack.flush_device()
    stranger = generate(text, **namespace)
    assert stranger.cached == 0
    assert generate(text, cache_salt="own").restored == 6 * PAGE
    assert stranger.tokens == own.tokens


def test_a_flipped_bit_is_recomputed_and_counted(stack: LocalStack, generate: Generator) -> None:
    text = prompt(9, 9 * PAGE + 5)
    known = set(extents(stack))
    right = generate(text)
    spilled(stack)
    before = stack.stat()["restore"]
    flip(min(set(extents(stack)) - known))
    stack.flush_device()
    answer = generate(text)
    after = stat_at_rest(stack)["restore"]
    assert answer.tokens == right.tokens
    assert answer.cached < 9 * PAGE
    assert after["pages_failed"] > before["pages_failed"]
    assert after["requests_failed"] > before["requests_failed"]
    # What was computed again is stored again, and good.
    spilled(stack)
    stack.flush_device()
    healed = generate(text)
    assert (healed.restored, healed.tokens) == (9 * PAGE, right.tokens)


def test_a_flipped_bit_costs_only_what_follows_it(stack: LocalStack, generate: Generator) -> None:
    text = prompt(10, 8 * PAGE + 1)
    known = set(extents(stack))
    right = generate(text)
    spilled(stack)
    # The page in the middle of the prompt.
    (path,) = (p for p in set(extents(stack)) - known if len(read_header(p).keys) >= 5)
    flip(path, read_header(path).keys[4])
    stack.flush_device()
    answer = generate(text)
    assert (answer.cached, answer.tokens) == (4 * PAGE, right.tokens)


def test_a_flipped_bit_does_not_touch_its_neighbours(stack: LocalStack, generate: Generator) -> None:
    texts = [prompt(seed, 5 * PAGE + 1) for seed in (11, 12, 13)]
    right = []
    broken: list[Path] = []
    for text in texts:
        known = set(extents(stack))
        right.append(generate(text).tokens)
        spilled(stack)
        broken = broken or sorted(set(extents(stack)) - known)
    flip(broken[0])
    stack.flush_device()
    answers = generate.batch(texts)
    assert [answer.tokens for answer in answers] == right
    assert [answer.restored for answer in answers] == [0, 5 * PAGE, 5 * PAGE]


def test_a_flipped_bit_under_a_chunked_prefill(stack: LocalStack, generate: Generator) -> None:
    text, tail = prompt(14, 6 * PAGE), prompt(15, 1500)
    right = generate(text + tail, cache_salt="reference")
    known = set(extents(stack))
    generate(text, max_new_tokens=1)
    spilled(stack)
    for path in set(extents(stack)) - known:
        flip(path)
    stack.flush_device()
    answer = generate(text + tail)
    assert answer.tokens == right.tokens
    assert answer.cached == 0


def by_command_line(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Process:
    """Start an engine as an operator does."""
    _, _, _, *arguments = command
    python = {"AGENTSTATE_ENGINE_PYTHON": command[0]}
    return spawn([sys.executable, "-m", "agentstate.cli", "engine", *arguments], {**environment, **python}, log)


def test_an_agent_goes_on_after_its_engine_was_killed(
    stack: LocalStack, generate: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = prompt(16, 16 * PAGE + 20)
    with Client(stack.service_url, timeout_s=300) as service:
        session = service.create_session(stack.model)
        turn = service.resume(session.id)
        assert turn.engine is not None
        service.append(session.id, turn.lease, [message({"role": "user", "content": "…"})])
        right = generate(text, **turn.engine.extra_body)
        suspended = service.suspend(session.id, turn.lease, durable_timeout_ms=0)
        if suspended.operation is not None:
            outcome = service.wait_operation(suspended.operation, timeout_s=600).result
        else:
            outcome = suspended.kv.model_dump(mode="json")
        assert outcome is not None
        assert (outcome["state"], outcome["tokens"]) == ("durable", 16 * PAGE)
        stack.kill_engine()
        with monkeypatch.context() as patch:
            patch.setattr(stack, "spawn_engine", by_command_line)
            stack.start_engine(*stack.engine_arguments)
        turn = service.resume(session.id)
        assert turn.kv.valid and turn.kv.tokens == 16 * PAGE
        assert turn.engine is not None
        answer = generate(text, **turn.engine.extra_body)
        assert (answer.restored, answer.tokens) == (16 * PAGE, right.tokens)
        # A session of the engine that died is still answered for, from its manifest.
        kept = service.suspend(session.id, turn.lease, durable_timeout_ms=60_000).kv
        assert (kept.state, kept.tokens, kept.bytes) == ("durable", 16 * PAGE, outcome["bytes"])


def test_storing_goes_on_after_the_page_directory_was_deleted(stack: LocalStack, generate: Generator) -> None:
    text = prompt(19, 9 * PAGE + 20)
    right = generate(text)
    stat_at_rest(stack)
    node = (stack.home / "pages" / "node").read_text()
    log = (stack.home / "engine.log").read_text()
    shutil.rmtree(stack.home / "pages")
    stack.flush_device()
    # What was there is lost, not wrong; and is stored anew when it has been computed.
    again = generate(text)
    assert (again.restored, again.tokens) == (0, right.tokens)
    spilled(stack)
    stack.flush_device()
    answer = generate(text)
    assert (answer.restored, answer.tokens) == (9 * PAGE, right.tokens)
    assert (stack.home / "pages" / "node").read_text() == node
    said = (stack.home / "engine.log").read_text().removeprefix(log)
    assert said.count("was deleted or replaced while it was in use") == 1
    assert "Traceback" not in said


def test_an_engine_that_is_told_to_end_stores_what_it_has_first(stack: LocalStack, generate: Generator) -> None:
    text = prompt(17, 24 * PAGE + 20)
    with Client(stack.service_url, timeout_s=300) as service:
        session = service.create_session(stack.model)
        turn = service.resume(session.id)
        assert turn.engine is not None
        right = generate(text, **turn.engine.extra_body)
        stack.stop_engine()
        stack.start_engine(*stack.engine_arguments)
        # Its manifest was written too.
        kept = service.suspend(session.id, turn.lease, durable_timeout_ms=60_000).kv
        assert (kept.state, kept.tokens) == ("durable", 24 * PAGE)
    answer = generate(text)
    assert (answer.restored, answer.tokens) == (24 * PAGE, right.tokens)


def test_what_an_engine_does_is_in_its_metrics_and_its_log(stack: LocalStack, generate: Generator) -> None:
    def told() -> dict[str, float]:
        """Every sample, once all restores are in all of them: a scrape may fall between two."""
        restored = stack.stat()["restore"]
        expected = {
            "agentstate:restores_total": restored["restores"],
            "agentstate:restored_pages_total": restored["pages_restored"],
            "agentstate:restore_duration_seconds_count": restored["restores"],
            "agentstate:restore_duration_seconds_sum": pytest.approx(restored["seconds"]),
            "agentstate:restore_bytes_per_second_count": restored["restores"],
        }
        deadline = time.monotonic() + 60
        while True:
            lines = httpx.get(f"{stack.engine_url}/metrics").text.splitlines()
            found = (line.rpartition(" ") for line in lines if line.startswith("agentstate:"))
            samples = {name.partition("{")[0]: float(value) for name, _, value in found}
            of_restores = {name: samples.get(name, 0.0) for name in expected}
            if of_restores == expected or time.monotonic() > deadline:
                assert of_restores == expected
                return samples
            time.sleep(0.1)

    before = told()
    text = prompt(18, 7 * PAGE + 20)
    generate(text)
    spilled(stack)
    stack.flush_device()
    assert generate(text).restored == 7 * PAGE
    samples = told()
    assert samples["agentstate:restores_total"] == before.get("agentstate:restores_total", 0) + 1
    waited = before.get("agentstate:layer_wait_seconds_count", 0)
    assert samples["agentstate:layer_wait_seconds_count"] == waited + 30
    assert samples["agentstate:spilled_bytes_total"] > 0
    log = (stack.home / "engine.log").read_text()
    line = rf"restored {7 * PAGE} tokens for \w+, [\d.]+ MB in [\d.]+ ms \([\d.]+ GB/s\), source cold\n"
    assert re.search(line, log)
    assert re.search(r"rank 0, pages of 64 tokens in .*staging_bytes \d+.*drive_timeout_s 30.0", log)


def test_every_extent_on_disk_is_whole(stack: LocalStack) -> None:
    headers = [read_header(path) for path in extents(stack)]
    assert headers
    assert all(len(key) == KEY_BYTES for header in headers for key in header.keys)
    assert not list(stack.home.glob("pages/*/rank0/partial/*"))
