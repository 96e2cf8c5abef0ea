"""Responses and conversations on a real engine, which is killed between two of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import Response
from prompts import EXACT, PAGE
from stacks import MakeStack

from agentstate.cli.local import LocalStack

TEXT = " ".join(f"The {number}th line of the report says that all is well." for number in range(40))
SERVED = (*EXACT, "--chunked-prefill-size", "512", "--enable-cache-report")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, make_stack: MakeStack, smollm2: Path) -> Iterator[LocalStack]:
    with closing(make_stack(tmp_path_factory.mktemp("responses") / "stack", smollm2)) as stack:
        # A turn ends in the background, and the next one is sent at once.
        stack.environment = {**stack.environment, "AGENTSTATE_GATEWAY_WAIT_S": "600"}
        stack.start_service()
        stack.start_engine(*SERVED)
        yield stack


def cached(response: Response) -> int:
    assert response.usage is not None
    return response.usage.input_tokens_details.cached_tokens


def test_a_conversation_goes_on_after_its_engine_was_killed(stack: LocalStack) -> None:
    with openai.OpenAI(
        base_url=f"{stack.service_url}/v1", api_key="none", timeout=600, _strict_response_validation=True
    ) as client:
        ask: dict[str, Any] = {"model": stack.model, "temperature": 0, "max_output_tokens": 12}
        conversation = client.conversations.create(items=[{"role": "user", "content": TEXT}]).id
        one = client.responses.create(**ask, conversation=conversation, input="What does it say?")
        *_, last = client.responses.create(**ask, conversation=conversation, input="And the 7th line?", stream=True)
        assert last.type == "response.completed" or last.type == "response.incomplete"
        two = last.response
        assert one.usage is not None and two.usage is not None
        # The second request began with the first one and its answer.
        assert cached(two) >= (one.usage.input_tokens - 1) // PAGE * PAGE
        right = client.responses.create(**ask, previous_response_id=two.id, input="Thank you.")
        stack.settle()
        stack.kill_engine()
        stack.start_engine(*SERVED)
        again = client.responses.create(**ask, previous_response_id=two.id, input="Thank you.")
        assert again.id != right.id
        assert again.output_text == right.output_text
        assert again.usage is not None and right.usage is not None
        assert again.usage.input_tokens == right.usage.input_tokens
        # From disk: nothing else has them.
        assert cached(again) >= (two.usage.input_tokens - 1) // PAGE * PAGE > 6 * PAGE
        items = list(client.conversations.items.list(conversation, order="asc"))
        assert [item.role for item in items] == ["user", "user", "assistant", "user", "assistant", "user", "assistant"]  # type: ignore[union-attr]
