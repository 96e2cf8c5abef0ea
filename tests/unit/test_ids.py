from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from agentstate import ids
from agentstate.errors import InvalidId


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


GOOD = [
    "a",
    "user@example.com",
    "a/b",
    "/",
    "ü",
    "漢字",
    "a b",
    "x" * 1024,
    "é" * 512,
    "50%",
    "%2F",
    "a?b#c",
    ".a",
    "-",
]
BAD = ["", "\0", "a\nb", "a\x85", "\x7f", "a\u2028", "a\u2029b", "\ud800", "~a", ".", "..", "x" * 1025, "é" * 513]


@pytest.mark.parametrize("chosen", GOOD)
def test_an_id_may_be_what_frameworks_make_of_it(chosen: str) -> None:
    assert ids.check(chosen) == chosen
    assert re.search(ids.PATTERN, chosen)


@pytest.mark.parametrize("chosen", BAD)
def test_an_id_that_no_database_path_or_log_could_hold_is_refused(chosen: str) -> None:
    with pytest.raises(InvalidId):
        ids.check(chosen)
