"""Requests that are more than tokens in and tokens out: if their restore fails, they are recomputed like any other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from models import with_words
from prompts import EXACT, TINY
from stacks import MakeStack, stats_at_rest
from test_models import PAGE, QUESTION, Start, damage, start, suspend, tokens  # noqa: F401

from agentstate.benchmarks.slow_drive import Drive
from agentstate.cli.local import LocalStack

GREEDY = {"temperature": 0, "ignore_eos": True}
# What of a prompt's pages the chain goes on from, in the extent of a request.
DAMAGED = 2


def ask(stack: LocalStack, path: str, **body: Any) -> Any:
    return httpx.post(f"{stack.engine_url}/{path}", json=body, timeout=300).raise_for_status().json()


def recomputed(stack: LocalStack) -> int:
    """How many restores have failed, all of which were recomputed."""
    assert len(stats_at_rest(stack)) == 1
    log = (stack.home / "engine.log").read_text()
    failed = stack.stat()["restore"]["requests_failed"]
    assert log.count("is recomputed from its last good page") == failed
    return int(failed)


@pytest.mark.parametrize("flags", [(), ("--disable-overlap-schedule",)], ids=["overlap", "plain"])
def test_embeddings(start: Start, flags: tuple[str, ...]) -> None:  # noqa: F811
    stack = start("llama", "--is-embedding", *flags)

    def embedding(prompt: list[int]) -> list[float]:
        (found,) = ask(stack, "encode", input_ids=[prompt])
        return list(found["embedding"])

    # The longer one is computed in chunks; another one is computed in the batch of a failed restore.
    for length in (QUESTION, 2000):
        prompt, other = tokens(1, length), tokens(2, QUESTION)
        wanted, of_other = embedding(prompt), embedding(other)
        suspend(stack)
        damage(stack, "rank0", 4, DAMAGED)
        both = ask(stack, "encode", input_ids=[prompt, other])
        for found, right in zip(both, (wanted, of_other), strict=True):
            assert math.dist(found["embedding"], right) < 1e-4 < math.dist(wanted, of_other)
    assert recomputed(stack) == 2


def test_an_embedding_waits_for_what_is_restored(start: Start, drive: Drive) -> None:  # noqa: F811
    """SGLang lets only forwards that generate tokens wait."""
    stack = start("llama", "--is-embedding")
    prompt = tokens(7, QUESTION)
    (wanted,) = ask(stack, "encode", input_ids=[prompt])
    suspend(stack)
    drive.hang(".ext")
    with ThreadPoolExecutor() as asking:
        found = asking.submit(ask, stack, "encode", input_ids=[prompt])
        drive.await_caller()
        drive.answer()
        assert math.dist(found.result()[0]["embedding"], wanted["embedding"]) < 1e-4
    suspend(stack)
    # Nor is anything stored that was computed before they were there.
    (again,) = ask(stack, "encode", input_ids=[prompt])
    assert math.dist(again["embedding"], wanted["embedding"]) < 1e-4
    assert stack.stat()["restore"]["pages_restored"] == 2 * (QUESTION // PAGE)


def test_a_session_of_sglang(start: Start) -> None:  # noqa: F811
    stack = start("llama")

    def turns(salt: str, between: Any = None) -> list[Any]:
        """Two turns, the second of which names the first."""
        session = ask(stack, "open_session", capacity_of_str_len=100_000)
        sampling = {**GREEDY, "max_new_tokens": PAGE}
        said, answers = tokens(3, QUESTION), []
        for _ in range(2):
            before = {"rid": answers[-1]["meta_info"]["id"]} if answers else {}
            if answers and between is not None:
                between()
            answers.append(
                ask(
                    stack,
                    "generate",
                    input_ids=said,
                    sampling_params=sampling,
                    session_params={"id": session, **before},
                    cache_salt=salt,
                )
            )
            said = tokens(4, 30)
        return answers

    def lose() -> None:
        suspend(stack)
        damage(stack, "rank0", 4, DAMAGED)

    wanted, found = turns("never suspended"), turns("damaged", lose)
    assert [one["output_ids"] for one in found] == [one["output_ids"] for one in wanted]
    assert [one["meta_info"]["prompt_tokens"] for one in found] == [QUESTION, QUESTION + PAGE + 30]
    assert found[1]["meta_info"]["cached_tokens"] == DAMAGED * PAGE
    assert recomputed(stack) == 1


@pytest.mark.parametrize("flags", [(), ("--disable-overlap-schedule",)], ids=["overlap", "plain"])
def test_beam_search(start: Start, flags: tuple[str, ...]) -> None:  # noqa: F811
    stack = start("llama", "--page-size", "1", *flags)
    sampling = {"beam_width": 3, "n": 2, "max_new_tokens": 24, "ignore_eos": True}

    def beams(salt: str) -> list[list[int]]:
        prompt = {"input_ids": tokens(5, QUESTION), "sampling_params": sampling, "cache_salt": salt}
        return [beam["output_ids"] for beam in ask(stack, "generate", **prompt)["meta_info"]["beam_results"]]

    # Beams are not stored themselves: a request of the same prompt stores that.
    ask(
        stack,
        "generate",
        input_ids=tokens(5, QUESTION),
        sampling_params={**GREEDY, "max_new_tokens": 1},
        cache_salt="x",
    )
    suspend(stack)
    wanted = beams("never suspended")
    damage(stack, "rank0", 4, 100)
    assert [len(beam) for beam in wanted] == [24, 24] and wanted[0] != wanted[1]
    assert beams("x") == wanted
    assert recomputed(stack) == 1


@pytest.fixture
def words(tmp_path: Path, checkpoints: Path, make_stack: MakeStack) -> Iterator[LocalStack]:
    """One that drafts, and whose tokens are words: a grammar is of text."""
    target = with_words(checkpoints / "target", tmp_path / "target")
    with closing(make_stack(tmp_path / "stack", target)) as stack:
        stack.create_database()
        memory = TINY[TINY.index("--max-total-tokens") :]
        drafts = ("--speculative-algorithm", "EAGLE", "--speculative-draft-model-path", str(checkpoints / "eagle"))
        chain = ("--speculative-num-steps", "3", "--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4")
        stack.start_engine(*EXACT, *memory, *drafts, *chain)
        yield stack


def test_a_grammar_beside_a_draft_model(words: LocalStack) -> None:
    """It is advanced before anyone looks at the load. Every token is of another kind than the one before."""
    kinds = 6
    grammar = "(" + "".join(f"w{kind}[0-9]*" for kind in range(1, 1 + kinds)) + ")*"
    sampling = {**GREEDY, "max_new_tokens": 8 * kinds, "regex": grammar}

    def answer(salt: str) -> list[int]:
        prompt = tokens(6, QUESTION)
        return list(ask(words, "generate", input_ids=prompt, sampling_params=sampling, cache_salt=salt)["output_ids"])

    wanted = answer("never suspended")
    assert [int(str(token)[0]) for token in wanted] == [1 + number % kinds for number in range(8 * kinds)]
    assert answer("damaged") == wanted
    suspend(words)
    damage(words, "rank0", 4, DAMAGED)
    assert answer("damaged") == wanted
    assert recomputed(words) == 1
