"""What only an object store can do: a real server, and one that fails as a test tells it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import places
import pytest
from stand_in import Handler, StandIn, stand_in

from agentstate.errors import TierMissing, TierRefused, TierShort, TierUnavailable
from agentstate.tiers import Guard, Range, Tier, objects, source
from agentstate.tiers.testing.clock import ManualClock
from agentstate.tiers.testing.conformance import PATIENCE_S, content, file_of, name_of, names, publish, read
from agentstate.tiers.testing.seaweedfs import Server

ROOT = Path(__file__).parents[3]
DATA = content(1)
NAME = name_of(DATA)


@pytest.fixture
def server() -> Iterator[StandIn]:
    with stand_in() as server:
        yield server


@pytest.fixture
def tier(server: StandIn) -> Iterator[Tier]:
    with places.on(server, "s3://bucket/prefix").open() as tier:  # type: ignore[arg-type]
        yield tier


def answering(status: int, code: str) -> Callable[[Handler], bool]:
    def fault(handler: Handler) -> bool:
        handler.drain()
        handler.error(status, code)
        return True

    return fault


def test_the_stand_in_is_like_a_store(server: StandIn, tier: Tier) -> None:
    assert publish(tier, DATA) == (NAME, True)
    assert publish(tier, DATA) == (NAME, False)
    assert read(tier, NAME, 5, 100) == DATA[5:105]
    assert names(tier) == [NAME]
    assert [command for command, _ in server.requests[:2]] == ["HEAD", "PUT"]


@pytest.mark.parametrize(
    "status, code, kind, words",
    [
        (503, "SlowDown", TierUnavailable, "SlowDown"),
        (500, "InternalError", TierUnavailable, "InternalError"),
        (429, "TooManyRequests", TierUnavailable, "429"),
        (409, "OperationAborted", TierUnavailable, "409"),
        (403, "AccessDenied", TierRefused, "refuses these credentials"),
        (401, "Unauthorized", TierRefused, "refuses these credentials"),
        (507, "InsufficientStorage", TierRefused, "is full"),
        (403, "QuotaExceeded", TierRefused, "is full"),
        (405, "MethodNotAllowed", TierRefused, "is read-only"),
        (404, "NoSuchBucket", TierRefused, "no such bucket"),
    ],
)
def test_an_error_of_the_store_is_told_by_its_kind_in_one_line_without_secrets(
    server: StandIn, tier: Tier, status: int, code: str, kind: type[Exception], words: str
) -> None:
    publish(tier, DATA)
    server.fault = answering(status, code)
    with pytest.raises(kind, match=words) as error:
        read(tier, NAME, 0, 10)
    assert "\n" not in str(error.value) and "Debug source" not in str(error.value)
    if kind is TierRefused:
        assert "the store" in str(error.value) and len(str(error.value)) < 160
    with file_of(content(2)) as file:
        failed = tier.publish(name_of(content(2)), file).exception(PATIENCE_S)
    # A HEAD has no body, which would say that it is the bucket that is missing: the put tells.
    assert isinstance(failed, kind)
    server.fault = lambda handler: False
    assert read(tier, NAME, 0, 10) == DATA[:10]
    assert publish(tier, content(2))[1]


def test_an_answer_that_ends_in_the_middle_is_no_answer(server: StandIn, tier: Tier) -> None:
    publish(tier, DATA)

    def half(handler: Handler) -> bool:
        if handler.command != "GET":
            return False
        handler.answer(
            206,
            DATA[:1000],
            claim=50_000,
            ETag='"x"',
            **{"Content-Range": "bytes 0-49999/50000", "Last-Modified": "Mon, 30 Nov 2026 00:00:00 GMT"},
        )
        return True

    server.fault = half
    with pytest.raises(TierUnavailable):
        read(tier, NAME, 0, 50_000)


def test_a_store_that_ignores_ranges_is_not_believed(server: StandIn, tier: Tier) -> None:
    publish(tier, DATA)

    def whole(handler: Handler) -> bool:
        if handler.command != "GET":
            return False
        handler.answer(200, DATA, ETag='"x"', **{"Last-Modified": "Mon, 30 Nov 2026 00:00:00 GMT"})
        return True

    server.fault = whole
    with pytest.raises(TierUnavailable):
        read(tier, NAME, 100, 200)


def test_a_store_that_hangs_up_and_one_that_is_gone_are_unavailable(server: StandIn, tier: Tier) -> None:
    publish(tier, DATA)

    def hang_up(handler: Handler) -> bool:
        handler.hang_up()
        return True

    server.fault = hang_up
    with pytest.raises(TierUnavailable):
        read(tier, NAME, 0, 10)
    server.fault = lambda handler: False
    assert read(tier, NAME, 0, 10) == DATA[:10]
    with places.on(dead(), "s3://bucket/prefix").open() as gone, pytest.raises(TierUnavailable):  # type: ignore[arg-type]
        read(gone, NAME, 0, 10)


def dead() -> StandIn:
    server = StandIn()
    server.close()
    return server


def test_a_read_that_a_store_does_not_answer_is_given_up_and_asks_nothing_more(server: StandIn) -> None:
    """Through the guard, whose clock stands still but for the test."""
    clock, hanging, release = ManualClock(), threading.Semaphore(0), threading.Event()
    with Guard(places.on(server, "s3://bucket/prefix").open(), clock=clock) as tier:  # type: ignore[arg-type]
        publish(tier, DATA)

        def hang(handler: Handler) -> bool:
            server.fault = lambda handler: False
            hanging.release()
            assert release.wait(PATIENCE_S)
            return False

        server.fault = hang
        into = bytearray(100)
        reading = tier.read(NAME, [Range(0, memoryview(into))])
        assert hanging.acquire(timeout=PATIENCE_S)
        clock.advance(9)
        assert not reading.done()
        clock.advance(3)
        reading.result(PATIENCE_S)
        assert into == DATA[:100] and tier.counts()["timeouts"] == 1
        release.set()


def test_a_read_that_is_cancelled_leaves_its_place_to_others(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "_IN_FLIGHT", 1)
    hanging, release = threading.Event(), threading.Event()
    with places.on(server, "s3://bucket/prefix").open() as tier:  # type: ignore[arg-type]
        publish(tier, DATA)

        def hang(handler: Handler) -> bool:
            server.fault = lambda handler: False
            hanging.set()
            assert release.wait(PATIENCE_S)
            return False

        server.fault = hang
        reading = tier.read(NAME, [Range(0, memoryview(bytearray(100)))])
        assert hanging.wait(PATIENCE_S)
        assert reading.cancel()
        assert read(tier, NAME, 0, 100) == DATA[:100]
        release.set()


def test_503s_are_cured_by_another_attempt(server: StandIn) -> None:
    left = [2]

    def busy(handler: Handler) -> bool:
        left[0] -= 1
        return left[0] >= 0 and answering(503, "SlowDown")(handler)

    with Guard(places.on(server, "s3://bucket/prefix").open(), chance=lambda: 0.0) as tier:  # type: ignore[arg-type]
        publish(tier, DATA)
        server.fault = busy
        assert read(tier, NAME, 0, 10) == DATA[:10]
        assert tier.counts()["retries"] == 2


def test_ranges_that_lie_near_each_other_are_one_request(server: StandIn, tier: Tier) -> None:
    publish(tier, content(3, 3_000_000))
    server.requests.clear()
    memory = [memoryview(bytearray(1000)) for _ in range(10)]
    near = [Range(number * 2000, into) for number, into in enumerate(memory[:9])]
    tier.read(name_of(content(3, 3_000_000)), [*near, Range(2_900_000, memory[9])]).result(PATIENCE_S)
    assert sorted(server.requests) == [("GET", "bytes=0-16999"), ("GET", "bytes=2900000-2900999")]
    assert [bytes(into) for into in memory[:9]] == [
        content(3, 3_000_000)[number * 2000 : number * 2000 + 1000] for number in range(9)
    ]


def test_what_counts_as_near_follows_from_what_was_measured(server: StandIn) -> None:
    """The bytes that come in the time of a small request."""
    now = [0.0]
    tier = objects.ObjectTier(places.on(server, "s3://b/p").store, "the store", now=lambda: now[0])  # type: ignore[arg-type]

    def gap(latency_s: float, bytes_per_s: float) -> int:
        tier._measured = objects.Measured()
        for n_bytes in [1] * 10 + [1_000_000] * 20:
            tier._measured.began(now[0], n_bytes)
            began, seconds = now[0], latency_s if n_bytes == 1 else n_bytes / bytes_per_s
            now[0] += seconds
            tier._measured.ended(began, now[0], n_bytes)
            now[0] += 1  # nothing in flight
        return tier._gap_bytes()

    assert tier._gap_bytes() == objects._GAP_BYTES
    assert gap(0.01, 1e8) == pytest.approx(0.01 * 1e8, rel=0.1)
    assert gap(0.0001, 1e8) == objects._LEAST_GAP_BYTES
    assert gap(0.5, 1e9) == objects._MOST_GAP_BYTES
    tier.close()


def test_a_writer_that_another_one_outruns_has_published_too(server: StandIn, tier: Tier) -> None:
    """Between its look and its put."""

    def outrun(handler: Handler) -> bool:
        if handler.command == "PUT":
            server.objects[handler.key] = DATA
        return False

    server.fault = outrun
    assert publish(tier, DATA) == (NAME, False)


def test_an_object_of_another_that_came_first_is_replaced(server: StandIn, tier: Tier) -> None:
    begun: list[str] = []

    def outrun(handler: Handler) -> bool:
        if handler.command == "PUT" and not begun:
            begun.append(handler.key)
            server.objects[handler.key] = b"something else"
        return False

    server.fault = outrun
    assert publish(tier, DATA) == (NAME, True)
    assert read(tier, NAME, 0, len(DATA)) == DATA


def test_a_store_without_conditions_is_written_to_without_them(server: StandIn, tier: Tier) -> None:
    def refuse(handler: Handler) -> bool:
        if "If-None-Match" not in handler.headers:
            return False
        return answering(501, "NotImplemented")(handler)

    server.fault = refuse
    assert publish(tier, DATA) == (NAME, True)
    assert publish(tier, DATA) == (NAME, False)
    assert read(tier, NAME, 0, len(DATA)) == DATA


# On a real server


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extents of more than 1 MB go in parts of 5 MiB, the smallest that S3 has."""
    monkeypatch.setattr(objects, "_WHOLE_BYTES", 1 << 20)
    monkeypatch.setattr(objects, "_PART_BYTES", 5 << 20)


@pytest.fixture
def place(s3: Server) -> places.Objects:
    return places.on(s3)


def test_a_large_extent_goes_in_parts_and_comes_back_whole(place: places.Objects, parts: None) -> None:
    data = content(5, 12_000_001)
    with place.open() as tier:
        assert publish(tier, data, trailer=b"behind") == (name_of(data), True)
        assert publish(tier, data, trailer=b"behind") == (name_of(data), False)
        assert read(tier, name_of(data), 0, len(data) + 6) == data + b"behind"


def test_a_file_that_fails_in_the_middle_leaves_no_object(
    place: places.Objects, parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = content(6, 12_000_000)
    real = objects.Source.piece

    def piece(self: objects.Source, offset: int, n_bytes: int) -> memoryview:
        if offset >= 10 << 20:
            raise source._of_source(OSError(5, "the drive"))
        return real(self, offset, n_bytes)

    with place.open() as tier:
        with monkeypatch.context() as failing, file_of(data) as file:
            failing.setattr(objects.Source, "piece", piece)
            assert isinstance(tier.publish(name_of(data), file).exception(PATIENCE_S), OSError)
        assert names(tier) == []
        with pytest.raises(TierMissing):
            read(tier, name_of(data), 0, 1)
        assert publish(tier, data)[1]


KILLED = """
import os, signal, sys
from agentstate.tiers import objects, tier
from agentstate.tiers.testing.conformance import content, publish
objects._WHOLE_BYTES, objects._PART_BYTES = 1 << 20, 5 << 20
left, real = int(sys.argv[2]), objects.Source.piece
def piece(self, offset, n_bytes):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, offset, n_bytes)
objects.Source.piece = piece
publish(tier(sys.argv[1]), content(7, 12_000_000))
"""


@pytest.mark.parametrize("pieces", [0, 2])
def test_a_writer_that_is_killed_between_parts_leaves_no_object(
    s3: Server, place: places.Objects, parts: None, pieces: int
) -> None:
    url = f"s3://tests/{place.store.prefix}"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, url, str(pieces)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **s3.environment},
        timeout=PATIENCE_S,
    )
    assert done.returncode == -signal.SIGKILL
    data = content(7, 12_000_000)
    with place.open() as tier:
        assert names(tier) == []
        with pytest.raises(TierMissing):
            read(tier, name_of(data), 0, 1)
        assert publish(tier, data)[1]
        assert read(tier, name_of(data), 0, len(data)) == data


def test_two_processes_share_a_bucket(s3: Server, place: places.Objects) -> None:
    from test_tier_directory import run_two

    assert sum(run_two(f"s3://tests/{place.store.prefix}", s3.environment)) == 30
    with place.open() as tier:
        assert names(tier) == sorted(name_of(content(number)) for number in range(30))
        for number in (0, 10, 19, 29):
            assert read(tier, name_of(content(number)), 0, 50_000) == content(number)


def test_credentials_that_may_only_read_read(s3: Server, place: places.Objects) -> None:
    with place.open() as tier:
        publish(tier, DATA)
    reader = places.on(s3, f"s3://tests/{place.store.prefix}", AWS_ACCESS_KEY_ID=s3.reading_key)
    with reader.open() as tier:
        assert read(tier, NAME, 0, len(DATA)) == DATA and names(tier) == [NAME]
        assert publish(tier, DATA) == (NAME, False)
        for attempt in (lambda: publish(tier, content(8)), lambda: tier.drop(NAME).result(PATIENCE_S)):
            with pytest.raises(TierRefused, match="credentials"):
                attempt()
    stranger = places.on(s3, f"s3://tests/{place.store.prefix}", AWS_ACCESS_KEY_ID="nobody")
    with stranger.open() as tier, pytest.raises(TierRefused, match="credentials"):
        read(tier, NAME, 0, 1)


def test_a_bucket_that_is_not_there_is_not_an_extent_that_is_missing(s3: Server) -> None:
    with places.on(s3, "s3://nobodys-bucket/prefix").open() as tier:
        for attempt in (lambda: read(tier, NAME, 0, 1), lambda: names(tier)):
            with pytest.raises(TierRefused, match="bucket"):
                attempt()


def test_short_objects_of_a_real_server_are_short(place: places.Objects) -> None:
    place.put(NAME, DATA[:100])
    with place.open() as tier:
        for offset in (50, 100, 5000):
            with pytest.raises(TierShort):
                read(tier, NAME, offset, 100)
