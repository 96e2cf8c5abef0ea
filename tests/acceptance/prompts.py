"""Requests to the engine, greedy, as token ids, so that a test knows exactly which pages they have."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
from models import VOCABULARY

PAGE = 64
EXACT = ("--dtype", "float32")
"""In bfloat16, which CPUs with AMX compute in, a token in another batch or chunk may round to another answer."""
TINY = (*EXACT, "--skip-tokenizer-init", "--max-total-tokens", "8192", "--chunked-prefill-size", "1024")
"""What the tiny models (see models.py) are served with."""


@dataclass(frozen=True)
class Generated:
    """``tokens`` are the output's ids; ``cached`` the prompt tokens that were not computed, ``restored`` of them
    from disk: ``preloaded`` of those before the request ran. Drafts were verified in so many ``steps``. The engine had
    it ready at ``ready_s``, by its own clock."""

    tokens: tuple[int, ...]
    cached: int
    restored: int
    preloaded: int = 0
    steps: int | None = None
    ready_s: float = field(default=0.0, compare=False)


class Generator:
    def __init__(self, engine_url: str):
        self._url = f"{engine_url}/generate"

    def __call__(self, prompt: list[int], max_new_tokens: int = 8, **fields: Any) -> Generated:
        (answer,) = self.batch([prompt], max_new_tokens, **fields)
        return answer

    def batch(self, prompts: list[list[int]], max_new_tokens: int = 8, **fields: Any) -> list[Generated]:
        """All prompts in one request, which the scheduler admits together."""
        sampling = {"max_new_tokens": max_new_tokens, "temperature": 0, "ignore_eos": True}
        answers = httpx.post(
            self._url, json={"input_ids": prompts, "sampling_params": sampling, **fields}, timeout=300
        ).raise_for_status()
        return [_generated(answer) for answer in answers.json()]


class Stream:
    """One request whose ``tokens`` are to be seen as they come. Closed before its end, it leaves like a client whose
    connection breaks."""

    def __init__(self, engine_url: str, prompt: list[int], max_new_tokens: int, **fields: Any):
        sampling = {"max_new_tokens": max_new_tokens, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": sampling, "stream": True, **fields}
        self.tokens: tuple[int, ...] = ()
        self.answer: Generated | None = None
        self._loop = asyncio.new_event_loop()
        self._following = self._loop.create_task(self._follow(f"{engine_url}/generate", body))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._following)
        self._loop.close()

    async def _follow(self, url: str, body: dict[str, Any]) -> None:
        last = None
        async with httpx.AsyncClient(timeout=600) as client, client.stream("POST", url, json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    last = json.loads(line[6:])
                    self.tokens = tuple(last["output_ids"])
        assert last is not None
        self.answer = _generated(last)

    def wait(self, tokens: int) -> None:
        """Until so many tokens have come."""
        while len(self.tokens) < tokens:
            assert self._thread.is_alive(), f"it ended after {len(self.tokens)} of {tokens} tokens"
            time.sleep(0.02)

    def join(self) -> Generated:
        """Its answer, once it has ended."""
        self._thread.join()
        assert self.answer is not None
        return self.answer

    def close(self) -> None:
        with suppress(RuntimeError):  # it may have ended by itself
            self._loop.call_soon_threadsafe(self._following.cancel)
        self._thread.join()


def _generated(answer: dict[str, Any]) -> Generated:
    details = answer["meta_info"].get("cached_tokens_details") or {}
    preloaded = details.get("storage", 0)
    return Generated(
        tuple(answer["output_ids"]),
        answer["meta_info"]["cached_tokens"],
        details.get("host", 0) + preloaded,
        preloaded,
        answer["meta_info"].get("spec_verify_ct"),
        answer["meta_info"].get("response_sent_to_client_ts", 0.0),
    )


def prompt(seed: int, tokens: int) -> list[int]:
    """Token ids, of the tiny models' vocabulary and of larger ones, that no other seed's prompt shares a page with."""
    return [random.Random(seed * 1_000_003 + i).randrange(100, 1000) for i in range(tokens)]


def tokens(seed: int, count: int) -> list[int]:
    """Token ids of the tiny models' vocabulary, which no other seed's prompt shares a page with."""
    numbers = random.Random(seed)
    return [numbers.randrange(2, VOCABULARY) for _ in range(count)]
