"""SGLang's ``kv_hints``, which ``/generate`` alone carries: answered where a request comes in, carried out where it has
ended. What they mean is in `agentstate.fleet.hints`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import msgspec

from agentstate.fleet import hints
from agentstate.fleet.hints import Hints
from agentstate.lookahead.forecast import LONGEST_S


def of(envelope: Any, longest_pin_s: float = LONGEST_S) -> Hints:
    """The hints of an envelope as SGLang has it, or as a client has sent it, with pins of so many seconds at most. None
    of one that is not as it should be: SGLang refuses those that it cannot read."""
    try:
        return hints.read(msgspec.to_builtins(envelope), longest_pin_s)
    except (TypeError, ValueError):
        return Hints()


def answers(request: Any, carried_out: bool, longest_pin_s: float = LONGEST_S) -> list[Mapping[str, str]]:
    """What becomes of a request's hints, by their ids: one answer for all of its prompts, or one a prompt. Empty where
    it has no hints. What comes without a turn's token is not pinned."""
    given = getattr(request, "kv_hints", None)
    found = [of(envelope, longest_pin_s) for envelope in (given if isinstance(given, list) else [given])]
    if getattr(getattr(request, "session_id", None), "token", None) is None:
        found = [one.unpinned() for one in found]
    if not any(one.answers for one in found):
        return []
    return [(one if carried_out else one.ignored()).answers for one in found]


async def answering(outputs: AsyncIterator[Any], told: Sequence[Mapping[str, str]]) -> AsyncIterator[Any]:
    """A request's outputs, with what becomes of its hints as ``kv_hints`` in ``meta_info``."""
    async for output in outputs:
        for place, one in enumerate(output if isinstance(output, list) else [output]):
            number = one.get("index", place)
            if len(told) == 1 or number < len(told):
                one["meta_info"]["kv_hints"] = dict(told[0 if len(told) == 1 else number])
        yield output
