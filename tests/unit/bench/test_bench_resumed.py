"""What is told of agents that have gone on: whether they did as if they had never been suspended."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from agentstate.benchmarks import gpu_matrix, speculation, stacks, turn2
from agentstate.benchmarks.engine import Answer
from agentstate.benchmarks.resumed import Event, Pair, resume
from agentstate.benchmarks.soak import MODES
from agentstate.benchmarks.speculation import ALGORITHMS, row_of
from agentstate.errors import EngineError, EngineUnreachable, SettingsError
from agentstate.settings import Settings

PAGE = 64


def answer(tokens: int = 65, steps: int | None = 16, device: int = 0, restored: int = 0) -> Answer:
    return Answer(tuple(range(tokens)), device, restored, 0.1, 0.2, steps=steps)


KEPT = answer(device=320)


def test_an_accept_length_is_that_of_an_agent_that_was_never_suspended() -> None:
    row = row_of([Pair(KEPT, answer(restored=320)), Pair(KEPT, answer(restored=384))])
    assert (row["never_evicted"], row["accept_length"], row["ratio"]) == (4.0, 4.0, 1.0)
    assert (row["restored_tokens"], row["whole_tokens"]) == (704, 640)
    assert row["identical"] and row["whole"]


def test_a_draft_without_its_kv_shows_in_the_accept_length_alone() -> None:
    row = row_of([Pair(KEPT, answer(steps=64, restored=320))])
    assert (row["accept_length"], row["ratio"]) == (1.0, 0.25)
    assert row["identical"] and not row["whole"]


def test_what_was_recomputed_is_no_restore() -> None:
    row = row_of([Pair(KEPT, answer(restored=256))])
    assert row["ratio"] == 1 and not row["whole"]


def test_an_engine_that_does_not_draft_has_no_accept_length() -> None:
    with pytest.raises(EngineError, match="verified drafts"):
        row_of([Pair(answer(steps=None), answer(steps=None))])


@pytest.mark.parametrize("other", [answer(tokens=64), answer(steps=17), answer(steps=None)])
def test_other_tokens_or_steps_are_not_the_same(other: Answer) -> None:
    assert Pair(KEPT, answer()).same
    assert not Pair(KEPT, other).same


class Scripted:
    """An engine that caches and stores whole pages, and drafts well. ``keeps`` is what comes back of them: "all";
    "target" alone, so that no draft is right after a restore; "nothing"; all, and an "other" token follows."""

    name = "scripted"

    def __init__(self, keeps: str = "all"):
        self._keeps = keeps
        self._device: set[tuple[Any, ...]] = set()
        self._stored: set[tuple[Any, ...]] = set()
        self.asked: list[dict[str, Any]] = []
        self.running = False
        self.did: list[str] = []
        engine = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                said = f"data: {json.dumps(engine.answer(body))}\n\ndata: [DONE]\n\n".encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        assert self.running
        self.asked.append(body)
        prompt, count = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        tokens = [sum(prompt[-8:]) * 31 % 800 + 100 + number % 50 for number in range(count)]

        def pages(tokens: list[int]) -> list[tuple[Any, ...]]:
            ends = range(PAGE, len(tokens) + 1, PAGE)
            return [(body["cache_salt"], *tokens[:end]) for end in ends]

        of_prompt = pages(prompt[:-1])
        device = sum(page in self._device for page in of_prompt)
        restored = 0 if self._keeps == "nothing" else sum(page in self._stored - self._device for page in of_prompt)
        self._device.update(pages([*prompt, *tokens[:-1]]))
        self._stored.update(pages([*prompt, *tokens[:-1]]))
        if restored and self._keeps == "other":
            tokens[-1] += 1
        drafted = not (restored and self._keeps == "target")
        return {
            "output_ids": tokens,
            "meta_info": {
                "cached_tokens": (device + restored) * PAGE,
                "cached_tokens_details": {"device": device * PAGE, "host": restored * PAGE},
                "spec_verify_ct": (count - 1) // (3 if drafted else 1),
            },
        }

    def start(self) -> None:
        self.did.append("start")
        self.running = True

    def settle(self) -> None:
        self.did.append("settle")

    def flush(self) -> None:
        self.did.append("flush")
        self._device.clear()

    def stop(self) -> None:
        self.did.append("stop")
        self._device.clear()
        self.running = False

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def scripted() -> Iterator[Callable[[str], Scripted]]:
    made: list[Scripted] = []

    def make(keeps: str) -> Scripted:
        made.append(Scripted(keeps))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("event", Event)
@pytest.mark.parametrize(
    ("keeps", "same", "whole"),
    [("all", True, True), ("target", False, True), ("nothing", True, False), ("other", False, True)],
)
def test_agents_go_on_after_an_event_beside_those_that_were_never_suspended(
    scripted: Callable[[str], Scripted], event: Event, keeps: str, same: bool, whole: bool
) -> None:
    engine = scripted(keeps)
    engine.start()
    pairs = asyncio.run(resume(engine, event, 2, fields={"lora_path": "one"}))
    assert [(pair.same, pair.whole) for pair in pairs] == [(same, whole)] * 2
    assert all(pair.never_evicted.device_tokens == 5 * PAGE for pair in pairs)
    assert engine.did == ["start", "settle", *(["flush"] if event is Event.FLUSH else ["stop", "start"])]
    assert all(body["lora_path"] == "one" for body in engine.asked)
    # Each agent says something else, and has a salt of its own.
    assert len({body["cache_salt"] for body in engine.asked}) == 4
    assert len({tuple(body["input_ids"]) for body in engine.asked}) == 4


def test_an_engine_that_drafts_from_what_it_said_has_said_the_same(scripted: Callable[[str], Scripted]) -> None:
    engine = scripted("all")
    engine.start()
    asyncio.run(resume(engine, Event.FLUSH, 1, warm=True))
    first, *asked = (tuple(body["input_ids"]) for body in engine.asked)
    assert asked == [first, asked[1], first, asked[1], asked[1]]


def test_a_row_an_event_and_none_but_a_reason_of_a_peer_that_fails(scripted: Callable[[str], Scripted]) -> None:
    engine = scripted("target")
    rows = speculation._rows("eagle", engine, 1)
    assert [(row["event"], row["ratio"], row["identical"]) for row in rows] == [
        ("flush", 0.3333, True),
        ("kill -9", 0.3333, True),
    ]
    assert not engine.running

    def broken() -> None:
        raise EngineUnreachable("it does not start; the end of its log:\nand so on")

    engine.start = broken  # type: ignore[method-assign]
    (row,) = speculation._rows("eagle", engine, 1)
    assert (row["engine"], row["reason"], row["ratio"]) == ("scripted", "it does not start", None)
    speculation._print([*rows, row])

    def silent() -> None:
        raise httpx.ReadTimeout("")

    engine.start = silent  # type: ignore[method-assign]
    (row,) = speculation._rows("eagle", engine, 1)
    assert row["reason"] == "ReadTimeout('')"


class Nothing:
    """In the place of a stack, none."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.environment: dict[str, str] = {}

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


def test_other_tokens_are_told_also_if_the_engine_does_not_start_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def resumed(engine: object, event: Event, *_: Any, **__: Any) -> list[Pair]:
        if event is Event.KILL:
            raise EngineUnreachable("it ended [/with/a/path]")
        return [Pair(KEPT, answer(tokens=64, restored=320))]

    monkeypatch.setattr(gpu_matrix, "LocalStack", Nothing)
    monkeypatch.setattr(gpu_matrix, "resume", resumed)
    case = gpu_matrix.Case("llama", events=(Event.FLUSH, Event.KILL), rare="what is rare")
    row = {"case": "one", **gpu_matrix.run(case, tmp_path, tmp_path, on_gpu=False)}
    assert (row["found"], row["reason"]) == ("OTHER TOKENS", "after flush; then it ended [/with/a/path]")
    assert gpu_matrix.failed([row], {"one": case}) == ["one"]
    gpu_matrix._print([row], {"one": case})


def test_an_engine_that_has_ended_is_not_waited_for_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "_PATIENCE_S", 0.0)
    stack: Any = SimpleNamespace(ranks=list)
    with pytest.raises(EngineError, match="0 of the engine's 1 rank"):
        stacks.controls(stack, 1)


def test_every_algorithm_is_soaked_and_in_the_matrix_of_a_gpu() -> None:
    assert ALGORITHMS.keys() <= MODES.keys()
    assert {name for name, case in gpu_matrix.CASES.items() if case.algorithm} == ALGORITHMS.keys()


def test_a_case_fails_unless_it_needs_what_most_gpus_lack() -> None:
    found = {
        "GQA": "same",
        "MLA": "recomputed",
        "LoRA": "did not run",
        "fp4": "did not run",
        "sparse attention": "OTHER TOKENS",
        "tests/gpu": "FAILED",
    }
    rows = [{"case": name, "found": each} for name, each in found.items()]
    assert gpu_matrix.failed(rows, gpu_matrix.CASES) == ["MLA", "LoRA", "sparse attention", "tests/gpu"]
    assert gpu_matrix.failed([{"case": "tests/gpu", "found": "passed"}], gpu_matrix.CASES) == []


def test_what_there_is_not_is_refused_before_an_engine_is_started(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SettingsError, match="no mode faster: choose plain, eagle"):
        turn2.soak(Settings(), ["eagle", "faster"], 4, 0, 0, None)
    with pytest.raises(SettingsError, match="2 turns are too few for 3 modes"):
        turn2.soak(Settings(), ["plain", "eagle", "dp"], 2, 0, 0, None)
    with pytest.raises(SettingsError, match="no medusa: choose eagle"):
        speculation.speculation(Settings(), ["medusa"], [], 1, None)
    with pytest.raises(SettingsError, match="no lmcache: choose file-linker, hicache"):
        speculation.speculation(Settings(), ["eagle"], ["lmcache"], 1, None)
    with pytest.raises(SystemExit):
        gpu_matrix.main(["/nowhere", "--only", "GQA,fp2"])
    assert "there is no case 'fp2': choose as it comes, GQA" in capsys.readouterr().err


def test_turns_are_shared_out_among_modes() -> None:
    assert [turn2._share(200, 3, number) for number in range(3)] == [67, 67, 66]
    assert [turn2._share(2, 3, number) for number in range(3)] == [1, 1, 0]
