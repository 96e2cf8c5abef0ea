"""Flags that change how requests are scheduled and what the device evicts: `engine_patch.flags` calls those tested that
an engine is started with here."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from prompts import Generator
from test_models import (  # noqa: F401
    Agent,
    Start,
    recomputes_what_was_damaged,
    resumes_like_never_suspended,
    start,
    suspend,
    tokens,
)

MIXED = ("--enable-mixed-chunk", "--schedule-policy", "lpm", "--radix-eviction-policy", "lfu")
PLAIN = ("--disable-overlap-schedule", "--num-continuous-decode-steps", "2", "--enable-priority-scheduling")


@pytest.mark.parametrize("flags", [MIXED, PLAIN], ids=["mixed", "plain"])
def test_turns_are_those_of_an_engine_that_never_evicted(start: Start, flags: tuple[str, ...]) -> None:  # noqa: F811
    stack = start("llama", *flags)
    resumes_like_never_suspended(stack)
    # Restored, and recomputed, in batches in which others decode.
    generate = Generator(stack.engine_url)
    alone = generate(tokens(70, 100), max_new_tokens=400)
    wanted = Agent(stack, 5, cache_salt="never suspended").second_turn()
    agent = Agent(stack, 5)
    suspend(stack)
    with ThreadPoolExecutor() as others:
        decoding = others.submit(generate, tokens(70, 100), max_new_tokens=400)
        resumed = agent.second_turn()
        assert (resumed.tokens, resumed.restored) == (wanted.tokens, wanted.cached)
        recomputed = recomputes_what_was_damaged(stack, "rank0", 4, 2)
        assert recomputed.cached
        assert decoding.result().tokens == alone.tokens
