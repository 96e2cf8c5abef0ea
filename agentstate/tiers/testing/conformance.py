"""Tests that any tier passes.

Derive from `TierTests` in a module that pytest collects, and say where it lies with the fixture `place`.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import BinaryIO

import pytest

from agentstate.errors import TierMissing, TierShort, TierUnavailable
from agentstate.tiers.interface import ExtentName, Range, Tier

PATIENCE_S = 120
FINGERPRINTS = (bytes(32), bytes([255]) * 32)


class Place(ABC):
    """Where a tier lies, with a way in behind its back."""

    @abstractmethod
    def open(self) -> Tier:
        """One more tier on the same store, as another process has it."""

    @abstractmethod
    def put(self, path: str, data: bytes) -> None:
        """Put anything there, under any name."""

    @abstractmethod
    def remove(self, path: str) -> None: ...


def content(number: int, n_bytes: int = 50_000) -> bytes:
    """Bytes that only this number has."""
    return random.Random(number).randbytes(n_bytes)


def name_of(data: bytes, fingerprint: bytes = FINGERPRINTS[0], shard: str = "rank0") -> str:
    return str(ExtentName.of(fingerprint, shard, data))


def file_of(data: bytes) -> BinaryIO:
    file = tempfile.TemporaryFile()  # noqa: SIM115
    file.write(data)
    file.flush()
    return file


def publish(tier: Tier, data: bytes, name: str | None = None, trailer: bytes = b"") -> tuple[str, bool]:
    """The name, and whether it was new."""
    name = name or name_of(data)
    with file_of(data) as file:
        return name, tier.publish(name, file, trailer).result(PATIENCE_S)


def read(tier: Tier, name: str, offset: int, n_bytes: int) -> bytes:
    into = bytearray(n_bytes)
    tier.read(name, [Range(offset, memoryview(into))]).result(PATIENCE_S)
    return bytes(into)


def names(tier: Tier, prefix: str = "", limit: int = 1000) -> list[str]:
    """All of a listing, a page after the other."""
    found: list[str] = []
    after = None
    while True:
        page = tier.list(prefix, after, limit).result(PATIENCE_S)
        found += [entry.name for entry in page.entries]
        assert len(page.entries) <= limit
        if page.after is None:
            return found
        after = page.after


class TierTests:
    """The fixture `place` gives a store that is empty."""

    @pytest.fixture
    def place(self) -> Place:
        raise NotImplementedError

    @pytest.fixture
    def tier(self, place: Place) -> Iterator[Tier]:
        with place.open() as tier:
            yield tier

    @pytest.fixture
    def other(self, place: Place) -> Iterator[Tier]:
        with place.open() as tier:
            yield tier

    def test_a_store_keeps_the_first_mark_that_is_proposed(self, tier: Tier, other: Tier, place: Place) -> None:
        assert tier.mark().result(PATIENCE_S) is None
        publish(other, content(1))
        assert tier.mark("first").result(PATIENCE_S) == "first"
        assert other.mark("second").result(PATIENCE_S) == "first"
        # Nor is it an extent.
        assert names(other) == names(tier) == [name_of(content(1))]
        with place.open() as later:
            assert later.mark().result(PATIENCE_S) == "first"

    def test_marks_that_are_proposed_at_once_are_one(self, place: Place) -> None:
        tiers = [place.open() for _ in range(8)]
        try:
            answers = [one.mark(f"mark {number}") for number, one in enumerate(tiers)]
            assert len({answer.result(PATIENCE_S) for answer in answers}) == 1
        finally:
            for one in tiers:
                one.close()

    def test_what_is_published_is_read_from_anywhere(self, tier: Tier, other: Tier) -> None:
        data = content(1)
        name, new = publish(tier, data, trailer=b"behind")
        assert new
        for one in (tier, other):
            assert read(one, name, 0, len(data) + 6) == data + b"behind"

    def test_ranges_come_in_any_order_and_overlap_and_nothing_around_them_changes(self, tier: Tier) -> None:
        data = content(2, 3_000_000)
        name, _ = publish(tier, data)
        wanted = [(2_999_999, 1), (5, 70_000), (0, 10), (1_000, 2_500_000), (4_096, 4_096), (70_005, 0), (2_000_000, 9)]
        memory = bytearray(b"\xa5" * (sum(n_bytes + 3 for _, n_bytes in wanted)))
        ranges, at = [], 0
        for offset, n_bytes in wanted:
            ranges.append(Range(offset, memoryview(memory)[at : at + n_bytes]))
            at += n_bytes + 3
        tier.read(name, ranges).result(PATIENCE_S)
        assert bytes(memory) == b"".join(data[offset : offset + n] + b"\xa5" * 3 for offset, n in wanted)

    def test_publishing_again_does_nothing(self, tier: Tier, other: Tier) -> None:
        data = content(3)
        assert [publish(one, data)[1] for one in (tier, tier, other)] == [True, False, False]
        assert names(other) == [name_of(data)]

    def test_the_file_may_be_closed_when_publishing_has_begun(self, tier: Tier) -> None:
        data, others = content(4, 2_000_000), []
        with file_of(data) as file:
            publishing = tier.publish(name_of(data), file)
        # What is opened next gets its number.
        others = [file_of(b"another file") for _ in range(4)]
        assert publishing.result(PATIENCE_S)
        assert read(tier, name_of(data), 0, len(data)) == data
        for file in others:
            file.close()

    def test_a_file_that_cannot_be_read_is_not_published_and_is_no_fault_of_the_tiers(
        self, tier: Tier, tmp_path: Path
    ) -> None:
        path = tmp_path / "unreadable"
        path.write_bytes(content(5))
        fd = os.open(path, os.O_WRONLY)
        with io.FileIO(fd, "w") as file, pytest.raises(OSError) as error:
            tier.publish(name_of(content(5)), file).result(PATIENCE_S)
        assert error.value.errno is not None
        assert names(tier) == []

    def test_what_is_not_there_is_missing(self, tier: Tier) -> None:
        with pytest.raises(TierMissing) as error:
            read(tier, name_of(content(6)), 0, 10)
        assert not isinstance(error.value, TierShort)
        assert names(tier) == []

    @pytest.mark.parametrize("offset", [100, 49_999, 50_000, 50_001, 5_000_000])
    def test_what_ends_too_early_is_short(self, tier: Tier, offset: int) -> None:
        name, _ = publish(tier, content(7))
        with pytest.raises(TierShort):
            read(tier, name, offset, 50_000)

    def test_what_is_dropped_is_gone_until_it_is_published_again(self, tier: Tier, other: Tier) -> None:
        data = content(8)
        name, _ = publish(tier, data)
        for _ in range(2):
            other.drop(name).result(PATIENCE_S)
        with pytest.raises(TierMissing):
            read(tier, name, 0, 10)
        assert names(tier) == []
        assert publish(tier, data) == (name, True)
        assert read(other, name, 0, len(data)) == data

    @pytest.mark.parametrize(
        "name",
        ["", "x", "../" + name_of(b"x"), name_of(b"x") + "/", name_of(b"x").upper(), name_of(b"x").replace("/", "//")]
        + [name_of(b"x")[:-70] + "zz" + name_of(b"x")[-68:], "/" + name_of(b"x"), name_of(b"x") + "\n"],
    )
    def test_a_name_that_no_extent_has_is_refused_at_once(self, tier: Tier, name: str) -> None:
        with file_of(b"x") as file, pytest.raises(ValueError):
            tier.publish(name, file)
        with pytest.raises(ValueError):
            tier.read(name, [])
        with pytest.raises(ValueError):
            tier.drop(name)

    def test_a_listing_has_pages_in_the_order_of_names_and_prefixes(self, tier: Tier, other: Tier) -> None:
        published = []
        for number in range(12):
            data = content(number, 1_000 + number)
            name = name_of(data, FINGERPRINTS[number % 2], f"rank{number % 3}" if number % 5 else "rank_10")
            published.append(publish(tier, data, name)[0])
        assert names(other) == sorted(published)
        for limit in (1, 4, 6, 12):
            assert names(other, limit=limit) == sorted(published)
        for prefix in {"/".join(name.split("/")[:parts]) for name in published for parts in (1, 2)}:
            below = sorted(name for name in published if name.startswith(f"{prefix}/"))
            assert names(other, prefix) == names(other, prefix, limit=1) == below
        assert names(other, "0" * 63) == names(other, "ab" * 32) == []
        entry = tier.list(limit=1).result(PATIENCE_S).entries[0]
        assert entry.n_bytes in range(1_000, 1_012) and 0 <= entry.age_s < 3600

    def test_a_listing_leaves_out_what_is_not_ours(self, tier: Tier, place: Place) -> None:
        name, _ = publish(tier, content(9))
        folder = name.rpartition("/")[0]
        for path in ("readme.txt", f"{folder}/notes", f"{folder}/{'0' * 64}.tmp", f"{name[:-70]}00/{'f' * 64}.ext"):
            place.put(path, b"somebody else's")
        assert names(tier) == [name]

    @pytest.mark.parametrize("n_bytes", [20_000, 1_000_000])
    def test_another_object_of_that_name_is_replaced(self, tier: Tier, place: Place, n_bytes: int) -> None:
        data = content(10, n_bytes)
        name = name_of(data)
        for wrong in (data[:-1], data + b"x", b"", b"x" + data[1:], data[:-1] + bytes([data[-1] ^ 1])):
            place.put(name, wrong)
            assert publish(tier, data) == (name, True)
            assert read(tier, name, 0, n_bytes) == data
        assert publish(tier, data) == (name, False)

    def test_what_was_truncated_or_swapped_is_read_as_it_is_or_fails(self, tier: Tier, place: Place) -> None:
        first, second = content(11), content(12)
        name, _ = publish(tier, first)
        place.put(name, second)
        assert read(tier, name, 0, len(second)) == second
        place.put(name, first[:100])
        assert read(tier, name, 0, 100) == first[:100]
        with pytest.raises(TierShort):
            read(tier, name, 0, 101)
        place.remove(name)
        with pytest.raises(TierMissing):
            read(tier, name, 0, 100)

    def test_of_writers_that_race_one_makes_it_and_all_have_published_it(self, tier: Tier, other: Tier) -> None:
        data = content(13, 300_000)
        files = [file_of(data) for _ in range(8)]
        begin = threading.Barrier(len(files))
        news: list[bool] = []

        def write(number: int, file: BinaryIO) -> None:
            begin.wait()
            news.append((tier, other)[number % 2].publish(name_of(data), file).result(PATIENCE_S))

        threads = [threading.Thread(target=write, args=each) for each in enumerate(files)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(news) == [False] * 7 + [True]
        assert read(other, name_of(data), 0, len(data)) == data
        for file in files:
            file.close()

    def test_many_reads_are_in_flight_without_a_thread_each(self, tier: Tier) -> None:
        data = content(14, 400_000)
        name, _ = publish(tier, data)
        read(tier, name, 0, 1)
        memory = [bytearray(1_000) for _ in range(300)]
        readings = [tier.read(name, [Range(number * 1_000, memoryview(memory[number]))]) for number in range(300)]
        most = len([thread for thread in threading.enumerate() if thread.name.startswith("agentstate-tier")])
        wait(readings, PATIENCE_S)
        assert b"".join(memory) == data[:300_000]
        assert most <= 16

    def test_nothing_writes_to_the_buffers_of_a_read_that_was_cancelled(self, tier: Tier) -> None:
        data = content(15, 4_000_000)
        name, _ = publish(tier, data)
        seen = []
        for number in range(20):
            memory = bytearray(len(data))
            reading = tier.read(name, [Range(0, memoryview(memory))])
            if number % 2:
                read(tier, name, 0, 1)  # gives it the time to begin
            reading.cancel()
            seen.append((memory, hashlib.sha256(memory).digest()))
        for _ in range(3):
            read(tier, name, 0, len(data))
        assert [hashlib.sha256(memory).digest() for memory, _ in seen] == [digest for _, digest in seen]

    def test_a_tier_that_is_closed_answers_nothing_and_nothing_waits_for_it(self, place: Place) -> None:
        tier = place.open()
        name, _ = publish(tier, content(16))
        readings = [tier.read(name, [Range(0, memoryview(bytearray(50_000)))]) for _ in range(50)]
        tier.close()
        tier.close()
        for reading in readings:
            assert isinstance(reading.exception(PATIENCE_S), TierUnavailable | None)
        with pytest.raises(TierUnavailable):
            read(tier, name, 0, 10)
        with pytest.raises(TierUnavailable):
            publish(tier, content(17))

    def test_a_sweep_leaves_what_is_published(self, tier: Tier) -> None:
        name, _ = publish(tier, content(18))
        assert tier.sweep(0).result(PATIENCE_S) == 0
        assert names(tier) == [name]
