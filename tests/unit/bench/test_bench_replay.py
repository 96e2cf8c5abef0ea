"""The replay against a small server that speaks the engine's `/generate`, with a cache of its own."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from agentstate.benchmarks.calibration import Calibration
from agentstate.benchmarks.engine import Answer, Engine
from agentstate.benchmarks.fleet import Outcome, Served
from agentstate.benchmarks.probe import merged, probe
from agentstate.benchmarks.replay import replay, validation
from agentstate.benchmarks.traces import ROOT, Gap, Turn, Workload, tracelab
from agentstate.errors import EngineRefused, EngineUnreachable

PAGE = 4


class FakeEngine(ThreadingHTTPServer):
    """Answers with tokens that depend on the prompt; pages that it has seen are cached, and after a flush restored."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[dict[str, Any]] = []
        self.device: set[tuple[int, ...]] = set()
        self.stored: set[tuple[int, ...]] = set()
        self.context_length = 100_000
        self.restored_tokens = self.restores = self.spilled_tokens = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt, count = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        count = min(count, self.context_length - len(prompt))
        output = [sum(prompt) % 1000 + index for index in range(count)]
        with self.lock:
            self.requests.append(body)
            pages = [tuple(prompt[:end]) for end in range(PAGE, len(prompt), PAGE)]
            device = sum(1 for page in pages if page in self.device)
            stored = sum(1 for page in pages if page in self.stored)
            whole = prompt + output[:-1]
            seen = {tuple(whole[:end]) for end in range(PAGE, len(whole) + 1, PAGE)}
            self.spilled_tokens += len(seen - self.stored) * PAGE
            self.device |= seen
            self.stored |= seen
            restored = (stored - device) * PAGE
            self.restored_tokens += restored
            self.restores += restored > 0
        meta = {"cached_tokens": device * PAGE + restored, "cached_tokens_details": {"device": 0, "host": restored}}
        return {"output_ids": output, "meta_info": {**meta, "finish_reason": {"type": "length"}}}

    def stat(self) -> dict[str, Any]:
        """What its control endpoint would say: a restore takes 0.5 s and 1 s for each 1,000 tokens of 100 bytes."""
        seconds = self.restores * 0.5 + self.restored_tokens / 1000
        return {
            "spill": {"waiting": 0, "bytes_spilled": self.spilled_tokens * 100},
            "restore": {"bytes_read": self.restored_tokens * 100, "seconds": seconds},
        }


class _Handler(BaseHTTPRequestHandler):
    server: FakeEngine

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/flush_cache":
            self.server.device = set()
            self._answer(b"flushed")
            return
        answer = self.server.generate(json.loads(body))
        if not answer["output_ids"]:
            self.send_error(400, "the prompt is too long")
            return
        # Cumulative, as SGLang streams by default.
        first = {**answer, "output_ids": answer["output_ids"][:1]}
        parts = [f"data: {json.dumps(part)}\n\n".encode() for part in (first, answer)]
        self._begin(sum(map(len, parts)))
        for part in parts:
            self.wfile.write(part)
            self.wfile.flush()

    def do_GET(self) -> None:
        arguments = {"page_size": PAGE, "chunked_prefill_size": 512, "max_running_requests": None}
        self._answer(json.dumps(arguments).encode())

    def _answer(self, content: bytes) -> None:
        self._begin(len(content))
        self.wfile.write(content)

    def _begin(self, length: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def fake() -> Iterator[FakeEngine]:
    server = FakeEngine()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def small() -> Workload:
    """Two sessions that share 40 tokens; the first one comes back with its answer and 10 more."""
    workload = Workload("by hand")
    shared = workload.add(ROOT, 40)
    first = workload.add(shared, 10)
    answer = workload.add(first, 6)
    again = workload.add(answer, 10)
    other = workload.add(shared, 10)
    workload.sessions = [
        [Turn(Gap.FIRST, 0.0, 0.0, first, answer), Turn(Gap.TOOL, 0.01, 0.0, again, workload.add(again, 3))],
        [Turn(Gap.FIRST, 0.0, 0.3, other, workload.add(other, 2))],
    ]
    return workload


def test_prompts_share_what_the_workload_shares(fake: FakeEngine) -> None:
    outcome = asyncio.run(replay(small(), fake.url))
    first, again, other = (request["input_ids"] for request in fake.requests)
    assert [len(prompt) for prompt in (first, again, other)] == [50, 66, 50]
    # The second turn holds the first one's prompt and the engine's own answer to it.
    assert again[:50] == first
    assert again[50:56] == [sum(first) % 1000 + index for index in range(6)]
    assert other[:40] == first[:40]
    assert other[40:] != first[40:]
    assert [(r.session, r.turn, r.device_tokens) for r in outcome.served] == [(0, 0, 0), (0, 1, 52), (1, 0, 40)]
    assert [request.output_tokens for request in outcome.served] == [6, 3, 2]
    sessions = [request["session_id"] for request in fake.requests]
    assert sessions[0] == sessions[1] != sessions[2]


def test_a_second_run_finds_nothing_of_the_first(fake: FakeEngine) -> None:
    asyncio.run(replay(small(), fake.url))
    outcome = asyncio.run(replay(small(), fake.url))
    assert outcome.served[0].device_tokens == 0


def test_turns_keep_their_order_and_gaps(fake: FakeEngine) -> None:
    outcome = asyncio.run(replay(tracelab().scaled(tokens=0.01, time=0.002), fake.url))
    assert len(outcome.served) == 19
    for session in (0, 1):
        turns = [request for request in outcome.served if request.session == session]
        assert [request.turn for request in turns] == list(range(len(turns)))
        assert all(a.arrived_s + a.ttft_s <= b.arrived_s for a, b in zip(turns, turns[1:], strict=False))


def test_an_engine_that_is_not_there_is_named() -> None:
    with pytest.raises(EngineUnreachable, match="127.0.0.1:9"):
        asyncio.run(replay(small(), "http://127.0.0.1:9"))


def test_a_prompt_that_the_engine_refuses_ends_the_replay(fake: FakeEngine) -> None:
    fake.context_length = 60
    with pytest.raises(EngineRefused, match="400"):
        asyncio.run(replay(small(), fake.url))


def test_an_answer_that_is_cut_short_is_no_answer(fake: FakeEngine) -> None:
    fake.context_length = 68
    with pytest.raises(EngineRefused, match="2 of 3 tokens"):
        asyncio.run(replay(small(), fake.url))


def test_what_was_restored_is_told_from_what_was_on_the_device(fake: FakeEngine) -> None:
    async def ask() -> tuple[tuple[int, int], ...]:
        async with Engine(fake.url) as engine:
            found = []
            for flush in (False, False, True):
                if flush:
                    await engine.flush()
                answer = await engine.ask(list(range(50)), 2)
                found.append((answer.device_tokens, answer.restored_tokens))
            return tuple(found)

    assert asyncio.run(ask()) == ((0, 0), (48, 0), (0, 48))


def probed(
    fake: FakeEngine, lengths: tuple[int, ...], say: Callable[[str], None] = lambda step: None
) -> dict[str, Any]:
    return asyncio.run(
        probe(
            fake.url,
            fake.stat,
            name="fake",
            source="a test",
            layers=2,
            token_bytes=100,
            lengths=lengths,
            new_tokens=(8, 12),
            repeats=1,
            pauses_s=(0.01, 0.02),
            say=say,
        )
    )


def test_a_probed_engine_gives_a_calibration(fake: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """With times that are told: what a machine takes, which is busy with something else, fits no costs."""
    real = Engine.ask

    async def told(engine: Engine, prompt: list[int], output_tokens: int) -> Answer:
        answer = await real(engine, prompt, output_tokens)
        ttft_s = 0.02 + 0.001 * (len(prompt) - answer.device_tokens - answer.restored_tokens)
        return replace(answer, ttft_s=ttft_s, total_s=ttft_s + 0.01 * (output_tokens - 1))

    monkeypatch.setattr(Engine, "ask", told)
    steps: list[str] = []
    record = probed(fake, (64, 128), steps.append)
    assert [(point["cached"], point["new"]) for point in record["prefill"]] == [
        (0, 64), (64, 8), (64, 12), (0, 128), (128, 8), (128, 12),
    ]  # fmt: skip
    # One alone after each prompt, then two and four at once of half of the shortest one.
    decoded = [(point["sequences"], point["context_tokens"]) for point in record["decode"]]
    assert decoded == [(1, 64 + 8 + 8), (1, 128 + 8 + 8), (2, 2 * (32 + 8 + 8)), (4, 4 * (32 + 8 + 8))]
    assert len(steps) == 4
    calibration = Calibration.fit(record)
    assert (calibration.page_tokens, calibration.chunk_tokens, calibration.max_running) == (PAGE, 512, 256)
    # What the engine counts: half a second a restore, and 100 kB a second.
    assert (calibration.read_s, calibration.restore_gb_per_s) == (0.5, 0.0001)
    assert calibration.write_gb_per_s > 0
    slower = {**record, "read_s": 0.7, "idle": [[pause_s, longer_s + 1.0] for pause_s, longer_s in record["idle"]]}
    both = Calibration.fit(merged([record, slower]))
    assert both.read_s == pytest.approx(0.6)
    assert [longer_s for _, longer_s in both.idle] == pytest.approx([more + 0.5 for _, more in calibration.idle])
    assert both.forward_s == pytest.approx(calibration.forward_s)


@pytest.mark.parametrize("late", [False, True])
def test_a_probe_sees_whether_results_are_late(fake: FakeEngine, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With times that are told: where results are late, the first token is seen when the second one is computed."""
    real, forward_s = Engine.ask, 0.04

    async def told(engine: Engine, prompt: list[int], output_tokens: int) -> Answer:
        answer = await real(engine, prompt, output_tokens)
        ttft_s = forward_s * (2 if late and output_tokens > 1 else 1)
        return replace(answer, ttft_s=ttft_s, total_s=ttft_s + forward_s * (output_tokens - 1))

    monkeypatch.setattr(Engine, "ask", told)
    assert probed(fake, (64, 128, 192))["late_results"] is late


def test_validation_compares_hits_and_times() -> None:
    def outcome(device: int, drive: int, ttft_s: float) -> Outcome:
        served = Served(0, 0, Gap.FIRST, 0.0, ttft_s, 100, 1, device, 0, drive, 0.0, 0.0)
        return Outcome(served=[served] * 10)

    figures = validation(outcome(40, 20, 1.1), outcome(60, 0, 1.0))
    assert figures["hit_tokens"]["ratio"] == 1.0
    assert figures["ttft_p50_s"] == {"simulated": 1.1, "measured": 1.0, "ratio": 1.1}
    assert validation(outcome(0, 0, 1.0), outcome(0, 0, 1.0))["hit_tokens"]["ratio"] is None
