"""Flags that change how requests are scheduled and what the device evicts: `engine_patch.flags` calls those tested that
an engine is started with here."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from prompts import Generator, Stream
from stacks import suspend
from test_models import (  # noqa: F401
    Agent,
    Start,
    recomputes_what_was_damaged,
    resumes_like_never_suspended,
    start,
    tokens,
)

MIXED = ("--enable-mixed-chunk", "--schedule-policy", "lpm", "--radix-eviction-policy", "lfu")
PLAIN = ("--disable-overlap-schedule", "--num-continuous-decode-steps", "2", "--enable-priority-scheduling")

TLRU = ("tlru", "--radix-eviction-policy-config", '{"threshold": 4096, "next_prompt_estimate": 64}')
# SGLang's default page, and others, each with another order of eviction.
PAGES = {
    size: ("--page-size", size, "--radix-eviction-policy", *policy)
    for size, policy in {"1": ("slru",), "16": ("priority",), "32": TLRU, "128": ("lru",)}.items()
}


@pytest.mark.parametrize("flags", [MIXED, PLAIN, *PAGES.values()], ids=["mixed", "plain", *PAGES])
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


def test_a_request_that_preempts_another_one_is_restored(start: Start) -> None:  # noqa: F811
    """There is room for one at a time, and the one that ran goes on afterwards as if nothing had happened."""
    urgent = ("--enable-priority-scheduling", "--priority-scheduling-preemption-threshold", "5")
    stack = start("llama", *urgent, "--max-running-requests", "1")
    wanted = Agent(stack, 5, cache_salt="never suspended").second_turn()
    agent = Agent(stack, 5, priority=10)
    suspend(stack)
    with closing(Stream(stack.engine_url, tokens(80, 100), 6000, priority=0)) as other:
        other.wait(1)
        resumed = agent.second_turn()
        before = len(other.tokens)
        assert before < 6000
        assert (resumed.tokens, resumed.restored) == (wanted.tokens, wanted.cached)
        other.wait(before + 20)
        found = other.tokens[: before + 20]
    alone = Generator(stack.engine_url)(tokens(80, 100), max_new_tokens=len(found), cache_salt="never preempted")
    assert alone.tokens == found
