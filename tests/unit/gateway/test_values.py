"""How many values JSON has, without reading it."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from agentstate.api.gateway import documents

TEXTS = ["", "a", 'say "[1, 2]"', "\\", '\\"', "\\\\", 'a\\"[{,', "é{", '"', "\n,"]


def made(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(6 if depth < 4 else 3)
    if kind < 2:
        return draw.choice(TEXTS)
    if kind == 2:
        return draw.choice([1, -2.5e10, None, True])
    if kind == 3:
        return {draw.choice(TEXTS) + str(number): made(draw, depth + 1) for number in range(draw.randrange(4))}
    return [made(draw, depth + 1) for _ in range(draw.randrange(4))]


def count(value: Any) -> int:
    """An empty list or object counts as if it had one value."""
    if isinstance(value, dict | list):
        within = value.values() if isinstance(value, dict) else value
        return 1 + (sum(map(count, within)) if within else 1)
    return 1


@pytest.mark.parametrize("ensure_ascii", [False, True])
def test_the_values_of_json_are_counted(ensure_ascii: bool) -> None:
    draw = random.Random(3)
    for _ in range(2000):
        value = made(draw)
        raw = json.dumps(value, ensure_ascii=ensure_ascii, indent=draw.choice([None, 1])).encode()
        there = count(value)
        assert documents.has_most(raw, there), raw
        if len(raw) >= 2 * (there - 1):
            assert not documents.has_most(raw, there - 1), raw


def test_texts_without_anything_between_them_are_too_many() -> None:
    """What is no JSON is not taken for little of it."""
    assert not documents.has_most(b'"["' * 5000, 1000)
