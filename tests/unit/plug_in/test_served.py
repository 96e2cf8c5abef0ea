"""From which tier requests' tokens are counted, and what they are said to have waited for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from engine_patch.served import Served

PAGE = 4


def restored(waited_s: float = 0.0, **host_pages: int) -> Any:
    requests = {
        rid: SimpleNamespace(pages=pages, host_pages=pages, shared_pages=0, n_bytes=pages)
        for rid, pages in host_pages.items()
    }
    return SimpleNamespace(requests=requests, seconds=waited_s, waited_s=waited_s)


class Stage:
    def __init__(self) -> None:
        self.now_s = 100.0
        self.served = Served(lambda: self.now_s)
        self.observed: list[tuple[str, float]] = []
        self.served.observed = lambda cause, seconds: self.observed.append((cause, seconds))

    def after(self, seconds: float) -> Stage:
        self.now_s += seconds
        return self

    def admit(self, rid: str = "r", short: bool = False) -> None:
        self.served.tried(rid, admitted=True, short=short)
        self.served.step(short)

    def refuse(self, rid: str = "r") -> None:
        self.served.tried(rid, admitted=False, short=True)
        self.served.step(True)

    def run(self, rid: str = "r", prompt: int = 40, *, found: Any = None, **cached: Any) -> None:
        """A forward with the request: all of its prompt that is not cached, or ``new`` tokens of it."""
        fields = {f"cached_tokens_{tier}": cached.get(tier, 0) for tier in ("device", "host", "storage")}
        before = cached.get("before", sum(fields.values()))
        part = before, cached.get("new", prompt - before)
        failed = cached.get("failed")
        req: Any = SimpleNamespace(rid=rid, origin_input_ids=[0] * prompt, discard_output_reason=failed, **fields)
        self.served.stepped([req], [part], [found] if found is not None else [], PAGE)

    def tokens(self, gap: str = "tool") -> dict[str, int]:
        return {tier: of["tokens"] for tier, of in self.served.stats.hits[gap].items() if of["tokens"]}

    @property
    def penalty(self) -> dict[str, tuple[float, float]]:
        return {cause: (of["seconds"], of["requests"]) for cause, of in self.served.stats.penalty.items()}


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_each_token_of_a_prompt_has_one_tier(stage: Stage) -> None:
    stage.served.fetched("s", 4, 12)
    stage.served.queued("r", "tool", "s")
    stage.admit()
    stage.run(found=restored(r=2), device=16, host=8, storage=8)
    assert stage.tokens() == {"device": 8, "fetched": 8, "host": 8, "nvme": 8, "recomputed": 8}
    assert {of["requests"] for of in stage.served.stats.hits["tool"].values()} == {1}
    assert (stage.served.kept, stage.penalty) == (0, {"reads": (0.0, 0), "memory": (0.0, 0)})
    # What was fetched is the next request's alone.
    stage.served.queued("again", "tool", "s")
    stage.run("again", device=16)
    assert stage.tokens()["fetched"] == 8


@pytest.mark.parametrize(("device", "fetched"), [(0, 0), (6, 2), (40, 8)])
def test_what_was_fetched_and_has_left_was_not_found(stage: Stage, device: int, fetched: int) -> None:
    stage.served.fetched("s", 4, 12)
    stage.served.queued("r", "person", "s")
    stage.run(device=device, prompt=41)
    assert stage.tokens("person").get("fetched", 0) == fetched


def test_a_fetch_that_came_too_late_is_a_read_that_its_request_waited_for(stage: Stage) -> None:
    stage.served.queued("r", "tool", "s")
    stage.served.deferred("r")
    stage.served.fetched("s", 0, 12)
    stage.after(1.0).served.back("r", host_tokens=4, late_tokens=12)
    stage.run(device=16)
    assert stage.tokens() == {"device": 4, "host": 4, "nvme": 8, "recomputed": 24}
    assert stage.observed == [("reads", pytest.approx(1.0))]
    stage.served.queued("next", "tool", "s")
    stage.run("next", device=16)
    assert "fetched" not in stage.tokens()


def test_what_a_preload_brought_from_the_host_tier_is_from_there(stage: Stage) -> None:
    stage.served.queued("r", "first", None)
    stage.served.deferred("r")
    stage.after(2.0).served.back("r", host_tokens=12)
    stage.admit()
    stage.run(device=4, storage=20)
    assert stage.tokens("first") == {"device": 4, "host": 12, "nvme": 8, "recomputed": 16}
    assert stage.penalty == {"reads": (pytest.approx(2.0), 1), "memory": (0.0, 0)}


def test_a_prompt_in_parts_counts_once_and_waits_for_the_reads_of_all_its_forwards(stage: Stage) -> None:
    stage.served.queued("r", "none", None)
    stage.run(found=restored(0.25), device=8, before=8, new=16)
    assert stage.served.kept == 1
    stage.run(found=restored(0.5), device=8, before=24, new=16)
    assert stage.tokens("none") == {"device": 8, "recomputed": 32}
    assert stage.penalty["reads"] == (0.75, 1)
    # One that decodes beside a forward that waits is not looked at any more.
    stage.run(found=restored(0.5), before=40, new=1)
    assert (stage.penalty["reads"], stage.observed) == ((0.75, 1), [("reads", 0.75)])


def test_a_request_whose_restore_failed_counts_as_it_is_served_in_the_end(stage: Stage) -> None:
    stage.served.queued("r", "tool", "s")
    stage.run(found=restored(1.0), storage=32, failed="KV restore failed")
    assert (stage.tokens(), stage.served.kept) == ({}, 1)
    stage.served.queued("r", "other", "s")
    stage.run(device=4)
    assert stage.tokens() == {"device": 4, "recomputed": 36}


def test_waiting_for_memory_begins_when_there_is_too_little_and_ends_with_admission(stage: Stage) -> None:
    stage.served.queued("first", "tool", None)
    stage.after(1.0).refuse("first")
    # The scheduler tries nobody while it is full: whoever comes waits for the same.
    stage.after(1.0).served.queued("late", "tool", None)
    stage.served.step(True)
    stage.after(1.0).served.step(True)
    stage.served.tried("first", admitted=True, short=False)
    stage.served.tried("late", admitted=False, short=True)
    stage.served.step(True)
    stage.after(4.0).admit("late")
    for rid in ("first", "late"):
        stage.run(rid)
    assert stage.observed == [("memory", pytest.approx(2.0)), ("memory", pytest.approx(5.0))]
    # That is over.
    stage.after(1.0).served.queued("next", "tool", None)
    stage.after(1.0).admit("next")
    stage.run("next")
    assert stage.penalty["memory"] == (pytest.approx(7.0), 2)


def test_who_finds_room_while_nobody_lacks_it_waits_for_nothing(stage: Stage) -> None:
    stage.served.queued("r", "tool", None)
    stage.after(3.0).admit()
    stage.run()
    assert (stage.penalty, stage.observed) == ({"reads": (0.0, 0), "memory": (0.0, 0)}, [])
    # Room was lacked by one that has been aborted.
    stage.served.queued("gone", "tool", None)
    stage.refuse("gone")
    stage.served.step(False)
    stage.after(5.0).served.queued("r", "tool", None)
    stage.after(1.0).admit()
    stage.run()
    assert stage.observed == []


def test_a_wait_is_for_reads_or_for_memory_and_never_for_both(stage: Stage) -> None:
    stage.served.queued("short", "tool", None)
    stage.served.queued("r", "tool", None)
    stage.refuse("short")
    stage.after(1.0).served.deferred("r")
    stage.served.deferred("r")
    stage.after(4.0).served.back("r")
    stage.after(2.0)
    # It is admitted seven seconds after it came.
    stage.admit("r")
    stage.run(found=restored(0.5))
    assert dict(stage.observed) == {"reads": pytest.approx(4.5), "memory": pytest.approx(3.0)}


def test_a_request_that_is_admitted_although_it_was_deferred_has_waited_for_reads(stage: Stage) -> None:
    """The device memory was cleared."""
    stage.served.queued("r", "tool", None)
    stage.served.deferred("r")
    stage.after(3.0).admit()
    stage.run()
    assert stage.observed == [("reads", pytest.approx(3.0))]


def test_nothing_is_kept_of_who_is_gone(stage: Stage) -> None:
    for rid in ("here", "gone"):
        stage.served.queued(rid, "tool", None)
    for alive, kept in (({"here", "another"}, 1), (set(), 0)):
        for _ in range(32):
            stage.served.tidy(lambda alive=alive: alive)  # type: ignore[misc]
        assert stage.served.kept == kept


def test_what_is_unknown_is_passed_over(stage: Stage) -> None:
    stage.served.deferred("r")
    stage.served.back("r", host_tokens=4)
    stage.admit()
    stage.run()
    assert not any(map(stage.tokens, stage.served.stats.hits))
