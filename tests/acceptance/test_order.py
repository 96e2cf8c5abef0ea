"""Which of several queued requests an engine serves first."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from prompts import PAGE, TINY, Generated, Generator, Stream, prompt
from stacks import MakeStack, suspend, until

from agentstate.cli.local import LocalStack


@pytest.fixture(scope="module")
def one_at_a_time(
    tmp_path_factory: pytest.TempPathFactory, make_stack: MakeStack, checkpoints: Path
) -> Iterator[LocalStack]:
    with closing(make_stack(tmp_path_factory.mktemp("order"), checkpoints / "llama")) as stack:
        stack.environment = {**stack.environment, "AGENTSTATE_QUEUE_AGING_S": "3600"}
        stack.create_database()
        stack.start_engine(*TINY, "--max-running-requests", "1")
        yield stack


def test_what_lacks_least_on_the_device_is_served_first(one_at_a_time: LocalStack) -> None:
    stack = one_at_a_time
    generate = Generator(stack.engine_url)
    texts = {name: prompt(800 + pages, pages * PAGE + 9) for name, pages in (("much", 16), ("little", 2), ("there", 8))}
    right = {name: generate(text, 64) for name, text in texts.items()}
    suspend(stack)
    generate(texts["there"], 1)
    asked: dict[str, Future[Generated]] = {}
    with ThreadPoolExecutor() as asking:
        with closing(Stream(stack.engine_url, prompt(830, 30), 4000)) as running:
            running.wait(1)
            for waiting, (name, text) in enumerate(texts.items(), 1):
                asked[name] = asking.submit(generate, text, 64)
                until(lambda waiting=waiting: stack.stat()["kept"]["ordered_requests"] == waiting)
        answers = {name: request.result() for name, request in asked.items()}
    # By the engine's clock: two answers that arrive while this process does not run may be seen in any order.
    assert sorted(answers, key=lambda name: answers[name].ready_s) == ["there", "little", "much"]
    assert [answers[name].tokens for name in texts] == [right[name].tokens for name in texts]
    assert [answers[name].restored for name in texts] == [16 * PAGE, 2 * PAGE, 0]
    assert stack.stat()["order"] == {"delayed": 2, "aged": 0}
