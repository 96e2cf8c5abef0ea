"""An engine that knows what computing and restoring cost does what costs less."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import told_costs
from prompts import PAGE, TINY, Generator, prompt
from stacks import MakeStack

TOKEN_BYTES = 2048


@pytest.mark.parametrize("dearer", [True, False], ids=["restoring is dearer", "computing is dearer"])
def test_what_is_computed_sooner_than_read_is_computed(
    tmp_path: Path, make_stack: MakeStack, checkpoints: Path, dearer: bool
) -> None:
    wait_s = told_costs.TOKEN_S / TOKEN_BYTES * (5 if dearer else 0.2)
    texts = [prompt(7000 + i, (1 + i % 5) * PAGE + 3 + 7 * i) for i in range(16)]
    with closing(make_stack(tmp_path / "stack", checkpoints / "llama")) as stack:
        stack.environment = {**stack.environment, **told_costs.environment(tmp_path / "plugin", wait_s)}
        stack.create_database()
        stack.start_engine(*TINY)
        generate = Generator(stack.engine_url)
        right = [generate(text).tokens for text in texts]
        passes = []
        for _ in range(2):
            stack.settle()
            stack.flush_device()
            passes.append([generate(text) for text in texts])
        told = stack.stat()["break_even"]
    assert [[answer.tokens for answer in answers] for answers in passes] == [right, right]
    first, second = ([answer.restored > 0 for answer in answers] for answers in passes)
    # Nothing was known at the beginning, and in the end what reading costs, of one page and of five.
    assert all(first[:8])
    if dearer:
        assert second.count(False) > len(texts) // 2
        assert told["computed"] >= second.count(False)
    else:
        assert all(first) and all(second)
        assert told["computed"] == 0
