"""Requests to the engine, greedy, as token ids, so that a test knows exactly which pages they have."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import httpx

PAGE = 64
EXACT = ("--dtype", "float32")
"""In bfloat16, which CPUs with AMX compute in, a token in another batch or chunk may round to another answer."""
TINY = (*EXACT, "--skip-tokenizer-init", "--max-total-tokens", "8192", "--chunked-prefill-size", "1024")
"""What the tiny models (see models.py) are served with."""


@dataclass(frozen=True)
class Generated:
    """``tokens`` are the output's ids; ``cached`` the prompt tokens that were not computed, ``restored`` of them
    from disk."""

    tokens: tuple[int, ...]
    cached: int
    restored: int


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
        return [
            Generated(
                tuple(answer["output_ids"]),
                answer["meta_info"]["cached_tokens"],
                (answer["meta_info"].get("cached_tokens_details") or {}).get("host", 0),
            )
            for answer in answers.json()
        ]


def prompt(seed: int, tokens: int) -> list[int]:
    """Token ids, of the tiny models' vocabulary and of larger ones, that no other seed's prompt shares a page with."""
    return [random.Random(seed * 1_000_003 + i).randrange(100, 1000) for i in range(tokens)]
