"""A prompt that an engine computes before it is ready, so that no agent that resumes pays for being the first.

The first prompt of some length takes longer than the same one later: kernels are loaded or made, and Python imports
what a streamed answer needs. SGLang warms up too, with a prompt of a few tokens, which is not enough for that.
"""

from __future__ import annotations

from typing import Any

import anyio

from engine_patch import sglang_api as sgl

NAME = "agentstate"
_TOKENS = 512


async def warm_up(disaggregation_mode: str, tokenizer_manager: Any) -> None:
    """Compute a prompt on every DP rank and decode from it. Nothing of it is kept, neither on the device nor in a
    store."""
    if not tokenizer_manager.is_generation:
        return
    tokens = min(_TOKENS, tokenizer_manager.max_req_input_len // 2)
    ids = _ids(tokens, tokenizer_manager.model_config.vocab_size)
    dp_ranks = sgl.get_parallel().num_dp_ranks
    async with anyio.create_task_group() as together:
        for dp_rank in range(dp_ranks) if dp_ranks > 1 else [None]:
            together.start_soon(_compute, tokenizer_manager, ids, dp_rank, _room(disaggregation_mode, dp_rank or 0))


def _room(disaggregation_mode: str, dp_rank: int) -> int | None:
    """What SGLang asks for of every request of an engine that only prefills, or only decodes."""
    return None if disaggregation_mode == "null" else dp_rank


async def _compute(tokenizer_manager: Any, ids: list[int], dp_rank: int | None, room: int | None) -> None:
    request = sgl.GenerateReqInput(
        input_ids=ids,
        sampling_params={"max_new_tokens": 2, "temperature": 0, "ignore_eos": True},
        # Marks a request that SGLang keeps out of its radix tree, and means nothing else here.
        bootstrap_host=sgl.FAKE_BOOTSTRAP_HOST,
        bootstrap_room=room,
        routed_dp_rank=dp_rank,
    )
    async for _ in tokenizer_manager.generate_request(request, None):
        pass


def _ids(count: int, vocabulary: int) -> list[int]:
    """Ids that differ as far as possible, so that they reach many experts. None is from the vocabulary's beginning or
    end, where special tokens stand for images or the like."""
    return [vocabulary // 4 + number % (vocabulary // 2) for number in range(count)]
