"""What is done to the tree for sessions, with stand-ins for the tree and its memory. That it is right with SGLang's own
is for the acceptance tests."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from tree import PAGE_SIZE, Stage, key_of, meeting_ranks, pages_of, running_request, scheduler

from agentstate.pages import PLANNED, Need, Urgency
from engine_patch import device_tier
from engine_patch.sessions import Progress
from engine_patch.sglang_api import CLIP_MAX_NEW_TOKENS, ComponentType, RadixKey


def test_a_session_is_brought_back_into_the_tree() -> None:
    stage, key = Stage(free=32), key_of(16)
    stage.tier.remember("s", key)
    progress = stage.tier.prefetch("s", pages_of(key))
    assert progress is not None
    stage.step(scheduler())
    assert (progress(), len(stage.preloads), stage.cache.locks) == (Progress.RUNNING, 1, 1)
    stage.linker.has_landed = True
    stage.step(scheduler())
    assert (progress(), stage.left) == (Progress.DONE, (0, 0, 0))
    assert stage.brought == [("s", 0)], "in the step in which it has landed"
    assert not any(stage.tier.kept().values())
    # Requests that found no room are tried again.
    assert stage.cache.unlocked
    (inserted,) = stage.cache.inserted
    assert inserted.key.token_ids == key.token_ids
    assert (stage.linker.preload_stats.preloads, stage.linker.preload_stats.pages) == (1, 4)


def test_what_two_sessions_share_is_brought_once() -> None:
    stage, key, longer = Stage(free=64), key_of(16), key_of(24)
    need = Need(Urgency.DUE, 5.0)
    for session, of_session in (("s", key), ("fork", longer)):
        stage.tier.remember(session, of_session)
    first = stage.tier.prefetch("s", pages_of(key))
    stage.step(scheduler())
    second = stage.tier.prefetch("fork", pages_of(longer), need)
    for _ in range(2):
        stage.step(scheduler())
    assert stage.linker.loads == [pages_of(key)]
    # It is as urgent as whatever waits for it.
    assert stage.linker.needs == [need]
    assert first is not None and second is not None
    assert (first(), second()) == (Progress.RUNNING, Progress.RUNNING)
    stage.linker.landed_batches = {1}
    for _ in range(2):
        stage.step(scheduler())
    assert stage.linker.loads == [pages_of(key), pages_of(longer)[4:]]
    assert (first(), second()) == (Progress.DONE, Progress.RUNNING)
    stage.linker.landed_batches = {1, 2}
    stage.step(scheduler())
    assert (second(), stage.left) == (Progress.DONE, (0, 0, 0))
    assert not any(stage.tier.kept().values())


def test_a_prefetch_that_is_asked_for_again_is_as_urgent_as_that() -> None:
    stage, key = Stage(free=64), key_of(16)
    sooner, later = Need(Urgency.DUE, 5.0), Need(Urgency.DUE, 9.0)
    stage.tier.remember("s", key)
    stage.tier.prefetch("s", pages_of(key), later)
    stage.step(scheduler())
    for need in (sooner, PLANNED):
        stage.tier.prefetch("s", pages_of(key), need)
        stage.step(scheduler())
    assert stage.linker.needs == [sooner]


@pytest.mark.parametrize(
    "newest",
    [key_of(16, seed=1), key_of(12), key_of(16, extra_key="another"), None],
    ids=["other tokens", "fewer", "another name", "none"],
)
def test_pages_are_not_brought_under_tokens_that_are_not_theirs(newest: RadixKey | None) -> None:
    """The pages are those of a manifest; the session's newest request may have gone another way since."""
    stage = Stage(free=64)
    if newest is not None:
        stage.tier.remember("s", newest)
    assert stage.tier.prefetch("s", pages_of(key_of(16))) is None
    stage.step(scheduler())
    assert stage.linker.loads == []


def test_pages_of_a_session_that_has_gone_on_are_brought() -> None:
    stage = Stage(free=64)
    stage.tier.remember("s", key_of(30))
    assert stage.tier.prefetch("s", pages_of(key_of(16))) is not None
    stage.step(scheduler())
    assert stage.linker.loads == [pages_of(key_of(16))]


@pytest.mark.parametrize(
    ("free", "evictable", "restores"),
    # Too little memory; a drive that does not answer, or weights that have been replaced since it was asked.
    [(4, 8, True), (0, 32, False)],
)
def test_nothing_is_evicted_for_what_cannot_be_brought(free: int, evictable: int, restores: bool) -> None:
    stage, key = Stage(free, evictable), key_of(16)
    stage.linker.restores = restores
    stage.tier.remember("s", key)
    progress = stage.tier.prefetch("s", pages_of(key))
    stage.step(scheduler())
    assert progress is not None
    assert progress() is Progress.FAILED
    assert (stage.cache.evictable, stage.left) == (evictable, (0, 0, 0))


@pytest.mark.parametrize(
    ("most", "may_need"),
    # Of an answer without end as much is reserved as SGLang reckons with.
    [(15, 10), (1 << 30, CLIP_MAX_NEW_TOKENS)],
)
@pytest.mark.parametrize(("short", "progress"), [(0, Progress.RUNNING), (1, Progress.FAILED)])
def test_what_running_requests_may_need_is_left_to_them(
    most: int, may_need: int, short: int, progress: Progress
) -> None:
    stage, key = Stage(free=16 + may_need + PAGE_SIZE - short - 8, evictable=8), key_of(16)
    stage.tier.remember("s", key)
    told = stage.tier.prefetch("s", pages_of(key))
    stage.step(scheduler(running_request(prompt=20, answered=5, most=most)))
    assert told is not None
    assert told() is progress
    assert stage.cache.locks == (progress is Progress.RUNNING)


def test_a_prefetch_that_breaks_down_gives_everything_back() -> None:
    stage, key = Stage(free=32), key_of(16)
    stage.linker.breaks = True
    stage.tier.remember("s", key)
    progress = stage.tier.prefetch("s", pages_of(key))
    stage.step(scheduler())
    assert progress is not None
    assert progress() is Progress.FAILED
    assert (stage.cache.token_to_kv_pool_allocator.free_slots, stage.left) == (32, (0, 0, 0))


def test_what_cannot_be_preloaded_is_not_moved() -> None:
    stage, key = Stage(free=64, beside=ComponentType.MAMBA), key_of(16)
    stage.tier.remember("s", key)
    assert not stage.tier.moves and stage.tier.prefetch("s", pages_of(key)) is None
    assert not any(stage.tier.kept().values())


class Together:
    """Two ranks of an engine, which have both served the sessions ``a`` and ``b``."""

    def __init__(self) -> None:
        self.ranks = [Stage(free=64, ranks=ranks) for ranks in meeting_ranks(2)]
        self.first, self.other = self.ranks
        self.keys = {"a": key_of(16), "b": key_of(12, seed=1)}
        for rank in self.ranks:
            for session, key in self.keys.items():
                rank.tier.remember(session, key)

    def ask(self, rank: Stage, session: str) -> Callable[[], Progress]:
        progress = rank.tier.prefetch(session, pages_of(self.keys[session]))
        assert progress is not None
        return progress

    def step(self, agreements: int = 1) -> None:
        def of_rank(rank: Stage) -> None:
            for _ in range(agreements * device_tier._STEPS):
                rank.step(scheduler())

        with ThreadPoolExecutor(2) as threads:
            list(threads.map(of_rank, self.ranks))
        assert self.loads[0] == self.loads[1], "trees change alike"

    @property
    def loads(self) -> list[list[list[bytes]]]:
        return [rank.linker.loads for rank in self.ranks]

    def land(self) -> None:
        for rank in self.ranks:
            rank.linker.has_landed = True
        self.step()
        assert [rank.left for rank in self.ranks] == [(0, 0, 0)] * 2


def test_ranks_bring_a_session_that_the_first_of_them_is_asked_for() -> None:
    together = Together()
    progress = together.ask(together.first, "a")
    together.step()
    assert together.loads == [[pages_of(together.keys["a"])]] * 2
    # Who is asked for it now goes on with it.
    late = together.ask(together.other, "a")
    together.land()
    assert (progress(), late()) == (Progress.DONE, Progress.DONE)
    assert [rank.brought for rank in together.ranks] == [[("a", 0)]] * 2
    # And who is asked for it when it is there has nothing to do.
    later = together.ask(together.other, "a")
    together.step()
    assert later() is Progress.DONE and len(together.loads[0]) == 1
    assert not any(any(rank.tier.kept().values()) for rank in together.ranks)


def test_ranks_bring_sessions_in_the_order_of_the_first_of_them() -> None:
    together = Together()
    told = [together.ask(together.other, session) for session in "ab"]
    together.step()
    assert together.loads == [[], []]
    told += [together.ask(together.first, session) for session in "ba"]
    together.step(2)
    assert together.loads == [[pages_of(together.keys[session]) for session in "ba"]] * 2
    together.land()
    assert [one() for one in told] == [Progress.DONE] * 4


@pytest.mark.parametrize("lacks", ["its pages", "its tokens", "the same tokens"])
def test_what_one_rank_cannot_bring_is_brought_by_none(lacks: str) -> None:
    together = Together()
    other, key = together.other, together.keys["a"]
    if lacks == "its pages":
        other.linker.missing.update(pages_of(key)[-1:])
    elif lacks == "its tokens":
        del other.tier._sessions["a"]
    else:
        other.tier.remember("a", key_of(16, seed=9))
    progress = together.ask(together.first, "a")
    together.step()
    assert progress() is Progress.RUNNING and together.loads == [[], []]
    # Others do not wait for it.
    bringing = together.ask(together.first, "b")
    together.step(2)
    assert bringing() is Progress.RUNNING and together.loads == [[pages_of(together.keys["b"])]] * 2
    together.step(device_tier._TRIES)
    assert progress() is Progress.FAILED
    together.land()
    assert bringing() is Progress.DONE
    assert not any(any(rank.tier.kept().values()) for rank in together.ranks)


def test_a_rank_that_stores_a_page_later_is_waited_for() -> None:
    together = Together()
    together.other.linker.missing.update(pages_of(together.keys["a"]))
    progress = together.ask(together.first, "a")
    together.step(2)
    together.other.linker.missing.clear()
    together.step()
    assert together.loads == [[pages_of(together.keys["a"])]] * 2
    together.land()
    assert progress() is Progress.DONE


def test_ranks_begin_what_they_have_agreed_on_though_a_drive_does_not_answer_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    together = Together()
    linker = together.other.linker

    def can_restore(keys: list[bytes]) -> bool:
        linker.restores = False
        return True

    monkeypatch.setattr(linker, "can_restore", can_restore)
    progress = together.ask(together.first, "a")
    together.step()
    assert together.loads == [[pages_of(together.keys["a"])]] * 2
    together.land()
    assert progress() is Progress.DONE


def test_what_fails_on_all_ranks_ends_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    together = Together()

    def breaks(*_: object) -> None:
        raise RuntimeError("of this test")

    for rank in together.ranks:
        monkeypatch.setattr(rank.cache, "match_prefix", breaks)
    progress = together.ask(together.first, "a")
    together.step()
    assert progress() is Progress.FAILED and together.loads == [[], []]
    assert not any(any(rank.tier.kept().values()) for rank in together.ranks)


def test_a_rank_gives_up_what_the_first_one_was_not_asked_for() -> None:
    together = Together()
    progress = together.ask(together.other, "a")
    together.step()
    assert progress() is Progress.RUNNING
    together.other.now_s += device_tier._PATIENCE_S
    together.step()
    assert progress() is Progress.FAILED and together.loads == [[], []]
    assert not any(together.other.tier.kept().values())


def test_ranks_wait_for_a_preload_that_brings_part_of_a_session() -> None:
    together = Together()
    longer = key_of(24)
    for rank in together.ranks:
        rank.tier.remember("longer", longer)
    together.keys["longer"] = longer
    told = [together.ask(together.first, session) for session in ("a", "longer")]
    together.step(3)
    assert together.loads == [[pages_of(together.keys["a"])]] * 2
    for rank in together.ranks:
        rank.linker.landed_batches = {1}
    together.step(2)
    assert together.loads == [[pages_of(together.keys["a"]), pages_of(longer)[4:]]] * 2
    together.land()
    assert [one() for one in told] == [Progress.DONE] * 2
