"""An engine whose drive is slower than computing finds that out, and computes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from prompts import EXACT, PAGE, Generator, prompt

from agentstate.local import LocalStack

# A page of this model has 2.9 MB in float32, and is computed in a tenth of a second or less.
_BYTES_A_SECOND = 6_000_000


def test_what_is_computed_sooner_than_read_is_computed(
    tmp_path: Path, make_stack: Callable[[Path, Path], LocalStack], smollm2: Path, slow_drive: dict[str, str]
) -> None:
    Path(slow_drive["SPEED"]).write_text(f"{_BYTES_A_SECOND} extents")
    texts = [prompt(7000 + i, (1 + i % 5) * PAGE + 3 + 7 * i) for i in range(16)]
    with closing(make_stack(tmp_path / "stack", smollm2)) as stack:
        stack.environment = {**stack.environment, **slow_drive}
        stack.start_service()
        stack.start_engine(*EXACT)
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
    assert second.count(False) > len(texts) // 2
    assert told["computed"] >= second.count(False)
