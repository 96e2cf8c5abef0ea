"""An agent that says for how long its tool runs, on a device that has no room for it and another one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from prompts import PAGE, TINY, Generated, Generator, prompt
from stacks import MakeStack, until

from agentstate import Client
from agentstate.cli.local import LocalStack

# The device has 128 pages.
CONTEXT = 70 * PAGE


@pytest.fixture
def stack(tmp_path: Path, checkpoints: Path, make_stack: MakeStack) -> Iterator[LocalStack]:
    with closing(make_stack(tmp_path, checkpoints / "llama")) as stack:
        stack.environment = {**stack.environment, "AGENTSTATE_FORESIGHT": "on"}
        stack.start_service()
        stack.start_engine(*TINY)
        yield stack


def test_its_pages_leave_for_another_agent_and_are_back_before_it_is(stack: LocalStack) -> None:
    generate = Generator(stack.engine_url)
    texts = [prompt(870 + number, CONTEXT + 9) for number in range(2)]
    with Client(stack.service_url, timeout_s=120) as client:
        away, other = (client.create_session(stack.model).id for _ in texts)

        def on_device(session: str) -> int:
            return client.kv(session).tiers["device"].tokens

        def kind(session: str) -> str | None:
            wait = client.kv(session).wait
            return None if wait is None else wait.kind

        def turn(session: str, text: list[int], expected_s: float | None = None) -> Generated:
            with client.turn(session, durable_timeout_ms=60_000) as turn:
                answer = generate(text, **turn.extra_body)
                if expected_s is not None:
                    client.claim_tool_call(session, "call", "build", expected_s=expected_s, lease=turn.lease)
            assert turn.suspended is not None and turn.suspended.kv.state == "durable"
            return answer

        first = turn(away, texts[0], 3600)
        assert on_device(away) == CONTEXT
        turn(other, texts[1])
        assert on_device(away) < CONTEXT
        # It will be back soon, and nobody has said so of the other one.
        client.activity(away, "typing")
        until(lambda: stack.stat()["foresight"]["fetched"] == 1)
        assert on_device(away) == CONTEXT
        again = turn(away, texts[0])
        assert (again.tokens, again.cached, again.restored) == (first.tokens, CONTEXT, 0)
        assert stack.stat()["foresight"]["used"] == 1

        # Whoever empties the device wants it empty.
        client.activity(away, "typing")
        until(lambda: kind(away) == "person")
        stack.flush_device()
        last = turn(away, texts[0])
        assert (last.tokens, last.restored) == (first.tokens, CONTEXT)
        assert stack.stat()["foresight"]["fetched"] == 1
