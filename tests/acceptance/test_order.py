"""Which of several queued requests an engine serves first."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from prompts import PAGE, TINY, Generated, Generator, Stream, prompt
from stacks import MakeStack

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


class Asked(threading.Thread):
    """A request, and which answers there were when it had been served."""

    def __init__(self, stack: LocalStack, name: str, text: list[int], served: list[str]):
        super().__init__()
        self._generate, self._label, self._text, self._served = Generator(stack.engine_url), name, text, served
        self.answer: Generated | None = None

    def run(self) -> None:
        self.answer = self._generate(self._text, 64)
        self._served.append(self._label)


def test_what_lacks_least_on_the_device_is_served_first(one_at_a_time: LocalStack) -> None:
    stack = one_at_a_time
    generate = Generator(stack.engine_url)
    texts = {name: prompt(800 + pages, pages * PAGE + 9) for name, pages in (("much", 16), ("little", 2), ("there", 8))}
    right = {name: generate(text, 64) for name, text in texts.items()}
    stack.settle()
    stack.flush_device()
    generate(texts["there"], 1)
    served: list[str] = []
    asked = []
    with closing(Stream(stack.engine_url, prompt(830, 30), 4000)) as running:
        running.wait(1)
        for waiting, (name, text) in enumerate(texts.items(), 1):
            asked.append(Asked(stack, name, text, served))
            asked[-1].start()
            while stack.stat()["kept"]["ordered_requests"] < waiting:
                time.sleep(0.02)
    for request in asked:
        request.join()
    assert served == ["there", "little", "much"]
    answers = [request.answer for request in asked]
    assert [answer.tokens for answer in answers if answer] == [answer.tokens for answer in right.values()]
    assert [answer.restored for answer in answers if answer] == [16 * PAGE, 2 * PAGE, 0]
    assert stack.stat()["order"] == {"delayed": 2, "aged": 0}
