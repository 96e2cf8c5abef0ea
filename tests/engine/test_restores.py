"""What was restored for sessions, as it is remembered and told."""

from __future__ import annotations

from itertools import count

from tree import PAGE_SIZE, Stage, key_of, pages_of, request, running_request, scheduler

from engine_patch.feeds import Source
from engine_patch.restore import Restored, RestoredRequest
from engine_patch.restores import Restores


def restored(*rids: str, pages: int = 4, host: int = 0, shared: int = 0) -> Restored:
    one = RestoredRequest(pages, 1000 * pages, frozenset({Source.COLD}), host, shared)
    return Restored(dict.fromkeys(rids, one), 0.5, 0.125)


def test_a_restore_has_its_tokens_by_tier() -> None:
    restores = Restores(clock=lambda: 7)
    restores.add("s", "request", restored("r", "q", pages=9, host=2, shared=3), "r", 64)
    restores.add("s", "queued", restored("r"), "r", 64)
    first, second = restores.of("s", 10)
    assert first == {
        "id": 7,
        "session": "s",
        "why": "request",
        "tokens": {"host": 128, "nvme": 256, "shared": 192},
        "bytes": 9000,
        "seconds": 0.5,
        "waited_s": 0.125,
    }
    assert (second["why"], second["tokens"]) == ("queued", {"nvme": 256})


def test_who_proves_no_session_and_what_failed_are_not_kept() -> None:
    restores = Restores()
    restores.add(None, "request", restored("r"), "r", 64)
    restores.add("s", "request", restored("other"), "r", 64)
    assert restores.of("s", 10) == []


def test_the_newest_are_kept_and_told() -> None:
    ticks = count(1)
    restores = Restores(clock=lambda: next(ticks), most=4)
    for number in range(6):
        restores.add("s" if number % 2 else "t", "request", restored("r"), "r", 64)
    assert [one["id"] for one in restores.of("s", 10)] == [4, 6]
    assert [one["id"] for one in restores.of("t", 1)] == [5]


def test_what_a_queued_request_has_waited_for_is_kept() -> None:
    stage = Stage(preload_bytes=4)
    stage.store(key_of(40))
    stage.served.queued("long", "tool", "s")
    stage.linker.restored = restored("long", pages=10)
    engine = scheduler(running_request(), waiting=[request(key_of(43), "long")])
    stage.step(engine)
    assert stage.served.restores.of("s", 10) == []
    stage.linker.has_landed = True
    stage.step(engine)
    (made,) = stage.served.restores.of("s", 10)
    assert (made["why"], made["tokens"]) == ("queued", {"nvme": 10 * PAGE_SIZE})


def test_what_a_prefetch_has_brought_is_kept() -> None:
    stage, key = Stage(free=32), key_of(16)
    stage.linker.restored = restored("a prefetch")
    stage.tier.remember("s", key)
    stage.tier.prefetch("s", pages_of(key))
    stage.step(scheduler())
    stage.linker.has_landed = True
    stage.step(scheduler())
    (made,) = stage.served.restores.of("s", 10)
    assert (made["why"], made["tokens"]) == ("prefetch", {"nvme": 4 * PAGE_SIZE})
