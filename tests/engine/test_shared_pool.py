"""Restores of pages that a shared store has."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from contents import MARK, content, key, keys, reader_for
from device import Rank, page_of
from shares import PATIENCE_S, Share

from agentstate.errors import TierRefused, TierUnavailable
from agentstate.pages import PosixBackend
from agentstate.pages.codec import Codec
from agentstate.settings import Settings
from agentstate.tiers.pages import Listed, SharedPages
from engine_patch.feeds import Source
from engine_patch.host_tier import HostPool, HostTier
from engine_patch.restore import Finished, Restorer
from engine_patch.shared_pool import SharedPool


class Stage:
    """A rank whose drive has pages 0 to 3, and a share with 4 to 9 in three extents: 4 5, 6 7 8 and 9."""

    def __init__(self, directory: Path, *, addressable: bool, host: bool = False, codec: Codec = "raw"):
        self.rank = Rank(directory / "rank0", addressable)
        self.rank.write(keys(0, 1, 2, 3))
        geometry = self.rank.pages.geometry
        self.share = Share(directory / "share", codec=codec)
        self.pages = SharedPages(directory / "shared", self.share.extents, MARK, geometry)
        settings = Settings(staging_bytes=1 << 20, shared_reads=2)
        device = self.rank.pages.device
        self.pool = SharedPool(
            self.pages, self.rank.store, self.share.guard, geometry, device, settings, settings.staging_bytes
        )
        self.reader = reader_for(geometry)
        self.tier = HostTier(24 * geometry.page_bytes * 2, device, verify_threads=1) if host else None
        self.host = (
            HostPool(self.tier, self.rank.store, self.rank.pages, self.reader, PosixBackend().on_host)
            if self.tier is not None
            else None
        )
        self.restorer = Restorer(self.rank.store, self.rank.pages, self.reader, None, self.host, self.pool)
        self.listed = self.share.publish(self.pages, keys(4, 5), keys(6, 7, 8), keys(9))

    def queue(self, rid: str, pages: dict[int, object]) -> None:
        """``pages`` are the names of what is restored, by device page."""
        self.restorer.queue(rid, keys(*pages.values()), torch.tensor(list(pages)))

    def restore(self, **requests: dict[int, object]) -> Finished:
        for rid, pages in requests.items():
            self.queue(rid, pages)
        found = self.restorer.finish(self.restorer.start())
        self.restorer.drain()
        for rid, pages in requests.items():
            if rid not in found.failed:
                assert all(self.is_right(number, name) for number, name in pages.items())
        return found

    def is_right(self, number: int, name: object) -> bool:
        components = range(len(self.rank.pages.geometry.component_bytes))
        return page_of(self.rank.tensors, number) == [
            [content(self.rank.pages.geometry, key(name), layer, component) for component in components]
            for layer in range(self.rank.pages.geometry.layers)
        ]

    def kept(self) -> dict[str, int]:
        return {name: count for name, count in self.restorer.kept().items() if count}

    def close(self) -> None:
        if self.tier is not None:
            self.tier.end()
        self.restorer.close()
        self.pool.close()
        if self.tier is not None:
            self.tier.close()
        self.share.close()
        self.rank.close()


WAYS: list[tuple[bool, Codec]] = [(False, "raw"), (True, "raw"), (False, "lossless"), (True, "lossless")]


@pytest.fixture(params=WAYS, ids=["through staging", "straight", "coded, through staging", "coded, straight"])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    addressable, codec = request.param
    stage = Stage(tmp_path, addressable=addressable, codec=codec)
    yield stage
    stage.close()


@pytest.fixture
def with_host(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path, addressable=False, host=True)
    yield stage
    stage.close()


def test_a_load_comes_from_host_memory_the_drive_and_the_share(with_host: Stage) -> None:
    stage, host, tier = with_host, with_host.host, with_host.tier
    assert host is not None and tier is not None
    stage.restore(before={20: 2, 21: 3})
    host.demote(keys(2, 3), torch.tensor([20, 21]), ())
    tier.drain()
    assert host.results.popleft()
    pages: dict[int, object] = {3 + n: n for n in range(10)}
    found = stage.restore(a=pages)
    assert found.failed == set() and found.restored is not None
    assert found.restored.sources == {Source.HOST, Source.COLD, Source.SHARED}
    of_request = found.restored.requests["a"]
    assert (of_request.pages, of_request.host_pages, of_request.shared_pages) == (10, 2, 6)
    assert stage.restorer.stats.pages_shared == 6
    assert stage.kept() == {}


def test_pages_of_both_alternate(stage: Stage) -> None:
    """The drive has some pages that the share has too, and is asked for them."""
    stage.rank.write(keys(5, 7))
    before = len(stage.share.tier.read_from)
    found = stage.restore(a={3 + n: n for n in range(10)}, b={14: 4, 15: 5}, c={16: 9, 17: 0})
    assert found.failed == set() and found.restored is not None
    assert found.restored.requests["a"].shared_pages == 4
    assert found.restored.requests["c"].sources == {Source.SHARED, Source.COLD}
    assert len(stage.share.tier.read_from) > before
    assert stage.kept() == {}


def test_nothing_is_asked_of_the_share_that_the_drive_has(stage: Stage) -> None:
    stage.share.publish(stage.pages, keys(0, 1))
    found = stage.restore(a={3: 0, 4: 1, 5: 2})
    assert found.restored is not None and found.restored.sources == {Source.COLD}
    assert stage.share.tier.read_from == []


def test_what_was_read_ahead_of_the_share_is_not_read_again(stage: Stage) -> None:
    ahead = stage.restorer.prefetches
    ahead.for_request("a", keys(*range(6)))
    ahead.for_session("s", keys(*range(10)), 60)
    assert ahead.covers(keys(*range(10)))
    found = stage.restore(a={3 + n: n for n in range(10)})
    assert found.restored is not None and found.restored.sources == {Source.STAGING, Source.SHARED}
    assert found.restored.requests["a"].shared_pages == 6
    of_pages = len(stage.share.tier.read_from)
    assert ahead.stats.wasted == 0 and stage.kept() == {}
    stage.restore(b={3 + n: n for n in range(10)})
    assert stage.share.tier.read_from[of_pages:] and stage.kept() == {}


def test_what_is_given_up_of_the_share_leaves_nothing(stage: Stage) -> None:
    ahead = stage.restorer.prefetches
    ahead.for_request("a", keys(*range(6)))
    ahead.for_session("s", keys(*range(10)), 60)
    ahead.for_session("nowhere", keys(4, 5, 77), 60)
    stage.queue("b", {3 + n: n for n in range(10)})
    assert stage.restorer.cancel("b")
    stage.queue("c", {3: 4, 4: 77})
    assert stage.restorer.finish(stage.restorer.start()).failed == {"c"}
    ahead.clear()
    stage.restorer.reset()
    until(lambda: stage.kept() == {})


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def flipped(stage: Stage, listed: Listed) -> None:
    """A byte of the last component of the last layer of its first page."""
    header = stage.share.extents.header(listed.name, listed.n_bytes).result(PATIENCE_S)
    offset, _ = header.component_range(2, 1, 0, 1)
    data = bytearray(stage.share.path(listed).read_bytes())
    data[offset] ^= 4
    stage.share.path(listed).write_bytes(data)


def headless(stage: Stage, listed: Listed) -> None:
    data = bytearray(stage.share.path(listed).read_bytes())
    data[9] ^= 4
    stage.share.path(listed).write_bytes(data)


def unsigned(stage: Stage, listed: Listed) -> None:
    stage.share.path(listed).write_bytes(stage.share.path(listed).read_bytes()[:-1] + b"?")


def swapped(stage: Stage, listed: Listed) -> None:
    """Another extent of as many pages."""
    (other,) = stage.share.publish(stage.pages, keys("x", "y", "z"))
    stage.share.path(listed).write_bytes(stage.share.path(other).read_bytes())


def cut(stage: Stage, listed: Listed) -> None:
    stage.share.path(listed).write_bytes(stage.share.path(listed).read_bytes()[: listed.n_bytes // 2])


def deleted(stage: Stage, listed: Listed) -> None:
    stage.share.path(listed).unlink()


@pytest.mark.parametrize("damage", [flipped, headless, unsigned, swapped, cut, deleted])
def test_wrong_pages_fail_their_requests_alone_and_are_not_asked_for_again(
    stage: Stage, damage: Callable[[Stage, Listed], None]
) -> None:
    damage(stage, stage.listed[1])
    requests: dict[str, dict[int, object]] = {
        "a": {3: 4, 4: 5, 5: 6, 6: 7},
        "b": {7: 4, 8: 5},
        "c": {9: 0, 10: 9},
        "d": {11: 6},
    }
    found = stage.restore(**requests)
    assert found.failed == {"a", "d"}
    assert all(found.unusable[rid] for rid in found.failed), "they come back, and must end before it"
    assert all(keys_ <= frozenset(keys(6, 7)) for keys_ in found.unusable.values())
    assert stage.pages.stored(keys(4, 5, 6, 7, 8, 9)) == [True, True, False, False, False, True]
    named = [name is not None for name in stage.pages.extent_names(keys(4, 5, 6, 7, 8, 9))]
    assert named == [True, True, False, False, False, True]
    assert stage.pool.stat().extents_rejected == 1
    stage.share.tier.read_from.clear()
    again = stage.restore(a={3: 4, 4: 5}, d={11: 6})
    assert again.failed == {"d"} and stage.listed[1].name not in stage.share.tier.read_from
    assert stage.rank.store.prefix_length(keys(0, 1, 2, 3)) == 4 and stage.kept() == {}


def test_a_good_copy_elsewhere_takes_the_place_of_a_wrong_one(stage: Stage) -> None:
    stage.share.publish(stage.pages, keys(6, 7))
    flipped(stage, stage.listed[1])
    assert stage.restore(a={3: 6, 4: 7, 5: 8}).failed == {"a"}
    assert stage.pages.stored(keys(6, 7, 8)) == [True, True, False]
    assert stage.restore(a={3: 6, 4: 7}).failed == set()


@pytest.mark.parametrize("error", [TierUnavailable("down"), TierRefused("no credentials")])
def test_a_share_that_does_not_answer_drops_nothing(stage: Stage, error: Exception) -> None:
    """However often: it is no fault of the pages."""
    stage.share.tier.error = error
    for _ in range(3):
        found = stage.restore(a={3: 0, 4: 4}, b={7: 1, 8: 2})
        assert found.failed == {"a"} and not found.unusable["a"]
    stats = stage.restorer.stats
    assert (stats.pages_failed, stats.pages_unread) == (0, 0)
    assert stage.pool.stat().extents_rejected == 0 and stage.pages.take_missing() == []
    stage.share.tier.error = None
    assert stage.restore(a={3: 0, 4: 4}).failed == set()
    assert stage.kept() == {}


def test_nothing_is_found_while_the_share_is_not_in_use(tmp_path: Path) -> None:
    stage = Stage(tmp_path, addressable=False)
    stage.share.close()
    stage.share = Share(tmp_path / "share", failures_in_row=1)
    stage.pool._tier = stage.share.guard
    assert stage.pool.prefix_length(keys(4, 5, 6), answering=True) == 3 and all(
        stage.pool.stored(keys(4, 9), answering=True)
    )
    stage.share.tier.error = TierUnavailable("down")
    stage.share.guard.read(stage.listed[0].name, []).exception(PATIENCE_S)
    assert stage.pool.prefix_length(keys(4, 5, 6), answering=True) == 0
    assert not any(stage.pool.stored(keys(4, 9), answering=True))
    # What is there is stored all the same.
    assert stage.pool.prefix_length(keys(4, 5, 6), answering=False) == 3
    assert all(stage.pool.stored(keys(4, 9), answering=False))
    found = stage.restore(a={3: 0, 4: 4}, b={5: 1})
    assert found.failed == {"a"} and found.unusable["a"] == frozenset(keys(4))
    stage.close()


def test_a_prefix_may_go_back_and_forth(stage: Stage) -> None:
    stage.rank.write(keys(6, 7, 8))
    stage.pages.leave([stage.listed[1].id])
    assert stage.pool.prefix_length(keys(*range(12)), answering=True) == 0, "it begins on the drive"
    assert stage.pool.prefix_length(keys(*range(4, 12)), answering=True) == 6
    assert stage.pool.prefix_length(keys(9, 0, 1, 4, 77), answering=True) == 4


def test_after_a_move_pages_are_those_of_the_other_weights(stage: Stage, tmp_path: Path) -> None:
    other = Rank(tmp_path / "other", stage.rank.pages.addressable)
    pages = SharedPages(tmp_path / "shared of others", stage.share.extents, b"o" * 32, other.pages.geometry)
    stage.share.publish(pages, keys(4), version=0)
    stage.restorer.move(other.store)
    stage.pool.move(pages, other.store)
    assert stage.pages.stored(keys(4)) == [False]
    assert stage.pool.prefix_length(keys(4, 5), answering=True) == 1
    assert stage.restore(a={3: 4}, b={5: 5}).failed == {"b"}
    assert stage.share.tier.read_from[-1].startswith((b"o" * 32).hex())
    other.close()


def test_an_extent_that_is_about_to_be_deleted_fails_what_has_not_begun(stage: Stage) -> None:
    stage.queue("a", {3: 4, 4: 5})
    stage.pages.leave([stage.listed[0].id])
    found = stage.restorer.finish(stage.restorer.start())
    # Its header may have been read by then.
    assert found.failed in (set(), {"a"})
    if not found.failed:
        assert stage.is_right(3, 4) and stage.is_right(4, 5)
    assert stage.restore(a={3: 4}).failed == {"a"}
