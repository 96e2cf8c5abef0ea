from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from agentstate import ids


def test_an_id_is_its_prefix_and_26_base32_characters() -> None:
    assert re.fullmatch(r"ses_[0-9a-hjkmnp-tv-z]{26}", ids.new("ses"))


def test_ids_sort_by_the_order_of_their_making() -> None:
    made = [ids.new("ent") for _ in range(5000)]
    assert made == sorted(made)


def test_ids_of_many_threads_are_unique() -> None:
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: ids.new("ent"), range(8000)))
    assert len(set(made)) == len(made)


def test_a_clock_that_goes_back_does_not_disturb_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    first = ids.new("ent")
    monkeypatch.setattr("time.time_ns", lambda: 0)
    assert ids.new("ent") > first
