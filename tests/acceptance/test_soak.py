"""A short run of `agentstate bench soak`, without restarts: every token as if nothing had happened."""

from __future__ import annotations

import asyncio

from agentstate.cli.local import LocalStack
from benchmarks.soak import Event, Soak


def test_suspended_agents_say_what_they_would_have_said(stack: LocalStack) -> None:
    soak = Soak(stack, turns=20, restarts=0, seed=11, longest=1500, step=lambda: None)
    outcome = asyncio.run(soak.run())
    assert outcome.different == []
    assert sum(outcome.points.values()) == 20
    assert set(outcome.points) >= {Event.FLUSH, Event.HOST, Event.DEVICE, Event.CANCEL}
    assert outcome.restored_tokens > 0
