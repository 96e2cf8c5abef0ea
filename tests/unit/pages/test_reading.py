from __future__ import annotations

import errno
import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contents import MARK, MHA, MLA, WIDE, content, expected, key, keys, read, reader_for, write
from hypothesis import given, settings
from hypothesis import strategies as st

from agentstate.pages import (
    DEMAND,
    PLANNED,
    Chunk,
    Destination,
    Geometry,
    LayerwiseReader,
    Need,
    PageStore,
    Pin,
    PosixBackend,
    Stream,
    Urgency,
    handles,
    staging_memory,
)
from agentstate.pages.backends import OpenFile
from agentstate.pages.codec import Codec
from agentstate.pages.files import read_header

pytestmark = pytest.mark.usefixtures("read_by")

GEOMETRIES = {"MHA": MHA, "MLA": MLA, "WIDE": WIDE, "WIDE, coded": WIDE}


@pytest.fixture(params=GEOMETRIES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PageStore]:
    """Twelve pages in four extents, in no order that a request has."""
    codec: Codec = "lossless" if "coded" in request.param else "raw"
    store = PageStore(tmp_path, MARK, GEOMETRIES[request.param], codec=codec)
    for extent in ([5, 0, 1], [2], [11, 10, 9, 8, 3], [4, 6, 7]):
        write(store, keys(*extent))
    yield store
    store.close()


def descriptors() -> list[str]:
    return [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_extent(fd)]


def _is_extent(fd: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").endswith(".ext")
    except FileNotFoundError:
        return False


def batch(store: PageStore) -> list[Pin]:
    return [
        store.pin(keys(*range(12))),
        store.pin(keys(0)),
        store.pin(keys(*range(11, -1, -1))),
        store.pin(keys(3, 3, 9, 0)),
    ]


@pytest.mark.parametrize("chunk_bytes", [1, 20_000, 1 << 20])
def test_a_batch_of_fragmented_requests_comes_back(store: PageStore, chunk_bytes: int) -> None:
    reader = reader_for(store.geometry, chunk_bytes)
    requests = batch(store)
    for _ in range(2):  # the buffers are reused
        assert read(reader, requests) == expected(store.geometry, requests)
    reader.close()


def test_pages_of_several_extents_take_as_few_chunks_as_those_of_one(tmp_path: Path) -> None:
    geometry = Geometry(layers=2, page_size=64, component_bytes=(1 << 16, 1 << 16))
    store = PageStore(tmp_path, MARK, geometry)
    for first in range(0, 16, 4):
        write(store, keys(*range(first, first + 4)))
    reader = reader_for(geometry, chunk_bytes=8 * geometry.layer_bytes)
    with reader.open(store.pin(keys(*range(16)))) as stream:
        chunks = [(chunk.layer, chunk.first, chunk.count) for chunk in stream]
    reader.close()
    store.close()
    assert chunks == [(0, 0, 8), (0, 8, 8), (1, 0, 8), (1, 8, 8)]


@pytest.mark.parametrize("chunk_bytes", [1, 20_000, 1 << 20])
def test_chunks_come_in_the_order_of_their_layers_and_cover_every_page_once(store: PageStore, chunk_bytes: int) -> None:
    reader = reader_for(store.geometry, chunk_bytes)
    for pin in batch(store):
        with reader.open(pin) as stream:
            chunks = [(chunk.layer, chunk.first, chunk.count) for chunk in stream]
        assert chunks == sorted(chunks)
        covered = [(layer, page) for layer, first, count in chunks for page in range(first, first + count)]
        assert covered == [(layer, page) for layer in range(store.geometry.layers) for page in range(len(pin.keys))]
    reader.close()


def test_a_request_for_nothing_changes_nothing_for_the_others(store: PageStore) -> None:
    reader = reader_for(store.geometry)
    requests = [store.pin([]), store.pin(keys(1, 2)), store.pin([])]
    assert read(reader, requests) == expected(store.geometry, requests)
    with reader.open(store.pin([])) as stream:
        assert list(stream) == []
    reader.close()


def test_layers_are_asked_for_in_order(store: PageStore) -> None:
    reader = reader_for(store.geometry)
    with reader.open(store.pin(keys(1))) as stream:
        stream.hurry()
        with pytest.raises(ValueError, match="layer 1 was asked for and 0 is the next"):
            next(stream.layer(1))
    with pytest.raises(ValueError, match="closed"):
        next(stream.layer(0))
    reader.close()


def test_streams_that_wait_leave_room_for_the_one_that_is_consumed(store: PageStore) -> None:
    """However many streams wait with all the memory they can get, one more is read to its end, and then they are."""
    reader = reader_for(store.geometry, chunk_bytes=1)
    waiting = [reader.open(store.pin(keys(*range(12)))) for _ in range(3)]
    while any(stream.staged is None for stream in waiting):
        time.sleep(0.001)
    with reader._lock:
        assert reader._free, "a buffer is left to what is more urgent"
    with reader.open(store.pin(keys(3, 2, 1))) as stream:
        assert len(
            {(chunk.layer, page) for chunk in stream for page in range(chunk.first, chunk.first + chunk.count)}
        ) == (3 * store.geometry.layers)
    assert [sum(chunk.count for chunk in stream) for stream in waiting] == [12 * store.geometry.layers] * 3
    for stream in waiting:
        stream.close()
    assert reader.staged_bytes == 0
    reader.close()


def test_what_is_read_ahead_is_there_when_the_stream_is_consumed(
    store: PageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = LayerwiseReader(store.geometry, staging_bytes=64 << 20, threads=1)
    stream = reader.open(store.pin(keys(0, 1)))
    while stream.staged is None:
        time.sleep(0.001)
    assert reader.staged_bytes == len(stream.ahead) * reader.chunk_bytes > 0
    monkeypatch.setattr(os, "preadv", None)
    assert sum(chunk.count for chunk in stream) == 2 * store.geometry.layers
    stream.close()
    reader.close()


@pytest.mark.parametrize("staging_bytes", [1, 60_000, 300_000])
def test_the_staging_memory_is_bounded_also_when_a_layer_is_larger(store: PageStore, staging_bytes: int) -> None:
    reader = LayerwiseReader(store.geometry, staging_bytes=staging_bytes, threads=2)
    least = store.geometry.layer_bytes + 2 * 4096 * len(store.geometry.component_bytes)
    # Two buffers that hold a page each, when the bound is smaller than that.
    assert len(reader.staging) <= max(staging_bytes + 2 * 4096, 2 * (least + 4096))
    requests = [store.pin(keys(*[page % 12 for page in range(48)]))]
    assert read(reader, requests) == expected(store.geometry, requests)
    with reader.open(store.pin(keys(*[page % 12 for page in range(48)]))) as stream:
        assert max(chunk.n_bytes for chunk in stream) <= reader.chunk_bytes
    reader.close()


def test_bytes_read_are_counted_and_are_little_more_than_what_was_asked_for(store: PageStore) -> None:
    reader = reader_for(store.geometry)
    with reader.open(store.pin(keys(*range(12)))) as stream:
        counted = sum(chunk.n_bytes for chunk in stream)
    reader.close()
    asked = 12 * store.geometry.page_bytes
    per_layer = len(stream.pin.segments) * len(store.geometry.component_bytes)
    if any(read_header(segment.extent.path).coding for segment in stream.pin.segments):
        assert 0.75 * asked <= counted < 0.77 * asked
        return
    assert asked <= counted <= asked + store.geometry.layers * per_layer * 2 * 4096


def landing(pages: int, runs: list[range], own: range) -> tuple[np.ndarray, Destination]:
    """Memory for ``pages`` pages of `WIDE`, of shape (layers, components, pages, bytes), in which a stream's pages
    ``own`` are to lie where ``runs`` say, one after the other."""
    memory = staging_memory(WIDE.layers * 2 * pages * 8192).reshape(WIDE.layers, 2, pages, 8192)

    def rows(layer: int, wanted: range) -> list[list[np.ndarray]]:
        numbers = [number for run in runs for number in run][wanted.start - own.start : wanted.stop - own.start]
        return [[memory[layer, component, number : number + 1] for number in numbers] for component in range(2)]

    return memory, Destination(own, rows)


def landed(memory: np.ndarray, numbers: Sequence[int], names: Sequence[int]) -> bool:
    return all(
        memory[layer, component, number].tobytes() == content(WIDE, key(name), layer, component)
        for layer in range(WIDE.layers)
        for component in range(2)
        for number, name in zip(numbers, names, strict=True)
    )


@pytest.mark.parametrize("store", ["WIDE"], indirect=True)
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 40_000, 1 << 20])
@pytest.mark.parametrize("own", [range(12), range(3, 10)])
def test_what_has_a_destination_is_read_there(store: PageStore, own: range, chunk_bytes: int, ahead: bool) -> None:
    reader = reader_for(store.geometry, chunk_bytes)
    memory, destination = landing(20, [range(5, 9), range(2), range(14, 20)], own)
    numbers = [5, 6, 7, 8, 0, 1, 14, 15, 16, 17, 18, 19][: len(own)]
    with reader.open(store.pin(keys(*range(12)))) as stream:
        while ahead and stream.staged is None:
            time.sleep(0.001)
        stream.hurry([destination])
        staged = 0
        for layer in range(WIDE.layers):
            for chunk in stream.layer(layer):
                assert chunk.unusable() == set()
                for segment, arrays in chunk.parts:
                    staged += segment.pages
                    for i, page in enumerate(range(segment.first, segment.first + segment.pages)):
                        for component in range(2):
                            if page in own:
                                memory[layer, component, numbers[page - own.start]] = arrays[component][i]
    assert landed(memory, numbers, list(own))
    assert not memory[:, :, sorted(set(range(20)) - set(numbers))].any()
    assert staged < 12 * WIDE.layers or ahead
    assert reader.staged_bytes == 0
    reader.close()


@pytest.mark.parametrize("store", ["WIDE"], indirect=True)
def test_what_the_consumer_does_not_want_is_not_read(store: PageStore) -> None:
    """But for what had been read before it said so."""
    reader = LayerwiseReader(WIDE, staging_bytes=1, threads=2)
    with reader.open(store.pin(keys(*range(12)))) as stream:
        while stream.staged is None:
            time.sleep(0.001)
        stream.hurry(wanted=[range(5, 8), range(2, 3), range(6, 10)])
        found = [
            (chunk.layer, page, arrays[1][page - segment.first].tobytes())
            for layer in range(WIDE.layers)
            for chunk in stream.layer(layer)
            for segment, arrays in chunk.parts
            for page in range(segment.first, segment.first + segment.pages)
        ]
    # One page was there before, in the only buffer that is not kept back.
    assert [place[:2] for place in found] == [
        (layer, page) for layer in range(WIDE.layers) for page in ([] if layer else [0]) + [2, 5, 6, 7, 8, 9]
    ]
    assert all(data == content(WIDE, key(page), layer, 1) for layer, page, data in found)
    reader.close()


@pytest.mark.parametrize("store", ["WIDE"], indirect=True)
def test_pages_of_several_destinations_are_read_to_each(store: PageStore) -> None:
    reader = reader_for(WIDE, 40_000)
    memories = [landing(20, [range(3, 8)], range(5)), landing(20, [range(9, 12)], range(8, 11))]
    with reader.open(store.pin(keys(*range(12)))) as stream:
        while stream.staged is None:
            time.sleep(0.001)
        staged = stream._taken
        stream.hurry([destination for _, destination in memories])
        chunks = [chunk for layer in range(WIDE.layers) for chunk in stream.layer(layer)]
        assert [chunk.straight for chunk in chunks] == [number >= staged for number in range(len(chunks))]
    assert not any(chunk.unusable() for chunk in chunks)
    last = WIDE.layers - 1
    for (memory, destination), first in zip(memories, (3, 9), strict=True):
        for number, page in enumerate(destination.pages, first):
            assert memory[last, 0, number].tobytes() == content(WIDE, key(page), last, 0)
        others = set(range(20)) - set(range(first, first + len(destination.pages)))
        assert not memory[:, :, sorted(others)].any()
    reader.close()


@pytest.mark.parametrize("store", ["WIDE"], indirect=True)
def test_a_destination_takes_no_staging_and_its_wrong_pages_are_told(store: PageStore) -> None:
    reader = LayerwiseReader(WIDE, staging_bytes=1, threads=3)
    waiting = reader.open(store.pin(keys(*range(12))))
    damaged, cut = store.pin(keys(2)).segments[0].extent, store.pin(keys(4)).segments[0].extent
    with damaged.path.open("r+b") as file:
        file.seek(damaged.layout.component_range(1, 1, 0, 1)[0])
        file.write(b"other")
    os.truncate(cut.path, cut.layout.component_range(1, 0, 0, 1)[0])
    memory, destination = landing(12, [range(12)], range(12))
    with reader.open(store.pin(keys(*range(12)))) as stream:
        stream.hurry([destination])
        chunks = list(chunk for layer in range(2) for chunk in stream.layer(layer))
    assert sorted((chunk.layer, page) for chunk in chunks for page in chunk.wrong) == [(1, 2), (1, 4), (1, 6), (1, 7)]
    assert [chunk.unread for chunk in chunks] == [[]] * len(chunks)
    good = [page for page in range(12) if page not in (2, 4, 6, 7)]
    assert landed(memory, good, good)
    waiting.close()
    reader.close()


@pytest.mark.parametrize("store", ["WIDE"], indirect=True)
def test_one_call_reads_to_no_more_places_than_the_system_allows(
    store: PageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handles, "_MOST_ARRAYS", 3)
    reader = reader_for(WIDE)
    memory, destination = landing(24, [range(0, 24, 2)], range(12))
    with reader.open(store.pin(keys(*range(12)))) as stream:
        stream.hurry([destination])
        chunks = [chunk for layer in range(2) for chunk in stream.layer(layer)]
    assert sum(chunk.n_bytes for chunk in chunks if not chunk.parts) > 0
    assert all(not chunk.unusable() for chunk in chunks)
    assert landed(memory, range(0, 24, 2), range(12))
    reader.close()


@pytest.mark.parametrize("staging_bytes", [1, 300_000])
def test_streams_are_consumed_together_in_the_order_in_which_they_were_hurried(
    store: PageStore, staging_bytes: int
) -> None:
    """Whichever was opened first, with what little memory there is taken by streams that wait."""
    reader = LayerwiseReader(store.geometry, staging_bytes=staging_bytes, threads=4)
    waiting = reader.open(store.pin(keys(*range(12))))
    streams = [reader.open(store.pin(keys(*range(12)))) for _ in range(3)][::-1]
    time.sleep(0.02)  # until they have what there is
    for stream in streams:
        stream.hurry()
    for layer in range(store.geometry.layers):
        for stream in streams:
            assert sum(chunk.count for chunk in stream.layer(layer)) == 12
    for stream in [waiting, *streams]:
        stream.close()
    reader.close()


def test_the_first_layer_is_read_before_any_other(store: PageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """By all threads, and the others when it is there."""
    reader = LayerwiseReader(store.geometry, staging_bytes=4 << 20, threads=3)
    begun: list[int] = []
    pin = threading.Event()
    real = Stream._read

    def slow(stream: Stream, buffer: object, free_after: object, chunk: Chunk, run: object) -> Chunk:
        begun.append(chunk.layer)
        assert chunk.layer or pin.wait(60)
        return real(stream, buffer, free_after, chunk, run)  # type: ignore[arg-type]

    monkeypatch.setattr(Stream, "_read", slow)
    with reader.open(store.pin(keys(*range(12)))) as stream:
        while not begun:
            time.sleep(0.001)
        time.sleep(0.05)
        assert set(begun) == {0}
        pin.set()
        assert sum(chunk.count for chunk in stream) == 12 * store.geometry.layers
    assert begun.index(1) == begun.count(0)
    reader.close()


@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_consumer_that_stops_early_leaks_nothing(store: PageStore, after: int) -> None:
    reader = reader_for(store.geometry, chunk_bytes=1)
    stream = reader.open(store.pin(keys(*range(12))))
    chunks = iter(stream)
    for _ in range(after):
        next(chunks)
    stream.close()
    stream.close()
    assert descriptors() == []
    assert reader.staged_bytes == 0
    assert read(reader, batch(store)) == expected(store.geometry, batch(store))
    reader.close()


def test_streams_of_several_threads_run_at_once(store: PageStore) -> None:
    reader = reader_for(store.geometry, chunk_bytes=1)
    right = expected(store.geometry, batch(store))
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(read(reader, batch(store)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reader.close()
    assert found == [right] * 3
    assert descriptors() == []


def test_an_extent_that_is_gone_costs_its_own_pages_only_and_leaks_nothing(store: PageStore) -> None:
    reader = reader_for(store.geometry)
    requests = batch(store)
    gone = requests[0].segments[-1].extent.path
    gone.unlink()
    lost = {
        (number, page)
        for number, request in enumerate(requests)
        for segment in request.segments
        if segment.extent.path == gone
        for page in range(segment.first, segment.first + segment.pages)
    }
    right = {
        place: None if (place[0], place[2]) in lost else data
        for place, data in expected(store.geometry, requests).items()
    }
    assert lost
    assert read(reader, requests) == right
    assert descriptors() == []
    reader.close()


def test_a_file_that_is_truncated_after_it_was_opened_fails_its_own_chunks_only(store: PageStore) -> None:
    """Layer 0 of the extent is still there; all the later ones are not."""
    reader = reader_for(store.geometry, chunk_bytes=1)
    requests = [store.pin(keys(2)), store.pin(keys(0, 1, 2, 3))]
    extent = requests[0].segments[0].extent
    os.truncate(extent.path, extent.layout.data_offset + extent.layout.slab_bytes)
    found = {}
    for number, pin in enumerate(requests):
        with reader.open(pin) as stream:
            for chunk in stream:
                for page in range(chunk.first, chunk.first + chunk.count):
                    found[number, chunk.layer, page] = chunk
    right = expected(store.geometry, requests)
    assert found.keys() == right.keys()
    failed = {place for place, chunk in found.items() if place[2] in chunk.wrong}
    assert failed == {
        (number, layer, page) for number, layer, page in right if layer and (number, page) in ((0, 0), (1, 2))
    }
    for place in failed:
        assert found[place].wrong[place[2]].endswith("ends in the middle of a page")
        assert found[place].unread == []
    damaged = read(reader, requests)
    assert all(damaged[place] == right[place] for place in right if place not in failed)
    reader.close()


def test_a_failing_read_is_reported_in_its_chunk_only(store: PageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = reader_for(store.geometry, chunk_bytes=1)
    requests = [store.pin(keys(8, 2)), store.pin(keys(4, 6, 7))]
    bad = requests[0].segments[1].extent.path
    real = os.preadv

    def preadv(fd: int, buffers: list[Any], offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{fd}") == str(bad):
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    for number, pin in enumerate(requests):
        layers = set()
        with reader.open(pin) as stream:
            for chunk in stream:
                needs_bad = number == 0 and chunk.first <= 1 < chunk.first + chunk.count
                assert [error.errno for _, error in chunk.unread] == [errno.EIO] * needs_bad
                assert (chunk.wrong, chunk.unusable()) == ({}, {1} if needs_bad else set())
                layers.add(chunk.layer)
        assert layers == set(range(store.geometry.layers))
    assert descriptors() == []
    reader.close()


def test_the_wrong_pages_of_a_chunk_are_named(store: PageStore) -> None:
    reader = reader_for(store.geometry)
    request = store.pin(keys(11, 10, 9, 8, 3))
    (segment,) = request.segments
    last = len(store.geometry.component_bytes) - 1
    with segment.extent.path.open("r+b") as file:
        for slot in (3, 2):
            file.seek(read_header(segment.extent.path).component_range(1, last, slot, 1)[0])
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 0x10]))
    wrong: dict[int, list[int]] = {}
    with reader.open(request) as stream:
        for chunk in stream:
            wrong.setdefault(chunk.layer, []).extend(chunk.wrong)
    reader.close()
    assert wrong.pop(1) == [2, 3]
    assert all(found == [] for found in wrong.values())


def test_pages_of_another_fingerprint_or_key_are_wrong(store: PageStore) -> None:
    reader = reader_for(store.geometry)
    request = store.pin(keys(4, 6))
    request.fingerprint = key("another model")
    assert set(read(reader, [request]).values()) == {None}
    misplaced = store.pin(keys(4, 6))
    misplaced.keys = keys(4, 7)
    found = read(reader, [misplaced])
    reader.close()
    assert found[0, 0, 1] is None
    right = expected(store.geometry, [misplaced])
    assert found[0, 0, 0] == right[0, 0, 0]


@settings(max_examples=25, deadline=None)
@given(
    layers=st.integers(1, 4),
    sizes=st.lists(st.one_of(st.integers(1, 9000), st.just(4096)), min_size=1, max_size=3),
    extents=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    chunk_bytes=st.integers(1, 60_000),
    staging_bytes=st.integers(1, 200_000),
    threads=st.integers(1, 3),
    order=st.randoms(use_true_random=False),
)
def test_any_segments_of_any_geometry_come_back(
    layers: int,
    sizes: list[int],
    extents: list[int],
    chunk_bytes: int,
    staging_bytes: int,
    threads: int,
    order: random.Random,
) -> None:
    geometry = Geometry(layers, 16, tuple(sizes))
    names = keys(*range(sum(extents)))
    order.shuffle(names)
    with tempfile.TemporaryDirectory() as directory:
        store = PageStore(Path(directory), MARK, geometry)
        rest = list(names)
        for pages in extents:
            write(store, rest[:pages])
            del rest[:pages]
        requests = [
            store.pin(order.choices(names, k=order.randint(1, 12))),
            store.pin(names),
            store.pin(order.sample(names, k=order.randint(1, len(names)))),
        ]
        reader = LayerwiseReader(geometry, staging_bytes=staging_bytes, threads=threads, chunk_bytes=chunk_bytes)
        assert read(reader, requests) == expected(geometry, requests)
        reader.close()
        store.close()


class Gated(PosixBackend):
    """Reads one range after the other, the first when the gate opens, and tells the names of the extents that were
    read, in that order."""

    def __init__(self) -> None:
        self.begun, self.gate = threading.Event(), threading.Event()
        self.order: list[str] = []

    def open(self, fd: int, path: Path) -> OpenFile:
        backend, file = self, super().open(fd, path)

        class File(OpenFile):
            def read(self, into: Any, offset: int) -> int:
                backend.order.append(path.name)
                backend.begun.set()
                assert backend.gate.wait(60)
                return file.read(into, offset)

            def close(self) -> None:
                file.close()

        return File()


class Queue:
    """Streams of one page each at a reader of one thread, whose drive answers when the gate opens."""

    def __init__(self, directory: Path, geometry: Geometry = MLA):
        self.backend = Gated()
        self.store = PageStore(directory, MARK, geometry)
        self.reader = LayerwiseReader(geometry, staging_bytes=16 << 20, threads=1, chunk_bytes=1, backend=self.backend)
        self.streams: list[Stream] = []
        self._names: dict[str, str] = {}
        self.open("first", PLANNED)
        assert self.backend.begun.wait(60)

    def open(self, name: str, need: Need = DEMAND, *, background: bool = False) -> Stream:
        write(self.store, keys(name))
        pin = self.store.pin(keys(name))
        self._names[pin.segments[0].extent.path.name] = name
        self.streams.append(self.reader.open(pin, need, background=background))
        return self.streams[-1]

    def read(self) -> list[str]:
        """Open the gate: the names of the streams in the order in which their chunks were read."""
        self.backend.gate.set()
        while any(stream.staged != 1 for stream in self.streams):
            time.sleep(0.001)
        return [self._names[name] for name in self.backend.order]

    def close(self) -> None:
        self.backend.gate.set()
        for stream in self.streams:
            stream.close()
        self.reader.close()
        self.store.close()


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    queue = Queue(tmp_path)
    yield queue
    queue.close()


def test_what_is_more_urgent_is_read_first(queue: Queue) -> None:
    """Whatever was asked for before: what a forward waits for, what queued requests need, what is due, by its time,
    and what is read in case; of these first what is loaded already."""
    queue.open("planned", PLANNED)
    queue.open("loaded in case", PLANNED, background=True).hurry(background=True)
    queue.open("due later", Need(Urgency.DUE, 20.0))
    queue.open("due sooner", Need(Urgency.DUE, 10.0), background=True)
    queue.open("promoted", PLANNED).need()
    queue.open("loaded", DEMAND, background=True).hurry(background=True)
    queue.open("queued", DEMAND)
    queue.open("awaited", PLANNED).hurry()
    expected = ["awaited", "loaded", "promoted", "queued", "due sooner", "due later", "loaded in case"]
    order = [name for name in expected for _ in range(MLA.layers)]
    # One chunk of it was under way when the others came.
    rest = ["first"] * (MLA.layers - 1) + ["planned"] * MLA.layers
    assert queue.read() == ["first", *order, *rest]
    read = queue.reader.read_bytes()
    assert [read[urgency] // read["awaited"] for urgency in ("awaited", "demand", "due", "planned")] == [1, 3, 2, 3]


def test_what_is_needed_is_never_read_later_than_it_was_to_be(queue: Queue) -> None:
    soon = queue.open("soon", Need(Urgency.DUE, 10.0))
    queue.open("later", Need(Urgency.DUE, 20.0))
    soon.need(Need(Urgency.DUE, 30.0))
    soon.need(PLANNED)
    assert queue.read()[1 : 1 + MLA.layers] == ["soon"] * MLA.layers


def test_what_has_device_memory_gets_on_whatever_comes_before_it(tmp_path: Path) -> None:
    """Or the memory would be its for as long as others come."""
    queue = Queue(tmp_path, Geometry(layers=100, page_size=4, component_bytes=(64,)))
    queue.open("waits", PLANNED)
    queue.open("loaded", PLANNED, background=True).hurry(background=True)
    queue.open("awaited").hurry()
    order = queue.read()[1:]
    assert order[:100].count("loaded") == 3
    assert set(order[:103]) == {"awaited", "loaded"}
    queue.close()


def test_a_drive_that_hangs_in_the_background_leaves_a_thread_to_what_is_awaited(store: PageStore) -> None:
    backend = Gated()
    reader = LayerwiseReader(store.geometry, staging_bytes=8 << 20, threads=2, chunk_bytes=1, backend=backend)
    idle = reader.open(store.pin(keys(*range(12))), PLANNED)
    assert backend.begun.wait(60)
    with reader._lock:
        assert reader._in_background == 1
        assert reader._job() is None, "the other thread has nothing to do"
    stream = reader.open(store.pin(keys(3)))
    stream.hurry()
    while len(backend.order) < 2:
        time.sleep(0.001)
    backend.gate.set()
    assert sum(chunk.count for chunk in stream) == store.geometry.layers
    for one in (stream, idle):
        one.close()
    reader.close()


@pytest.mark.parametrize("staging_bytes", [1, 1 << 20])
def test_what_is_loaded_in_the_background_advances_beside_what_waits(store: PageStore, staging_bytes: int) -> None:
    """Or device memory that it has would be its for ever."""
    reader = LayerwiseReader(store.geometry, staging_bytes=staging_bytes, threads=2, chunk_bytes=1)
    waiting = [reader.open(store.pin(keys(*range(12)))) for _ in range(3)]
    idle = reader.open(store.pin(keys(*range(12))), PLANNED)
    with reader.open(store.pin(keys(3, 2, 1)), PLANNED, background=True) as stream:
        assert sum(chunk.count for chunk in stream) == 3 * store.geometry.layers
    for one in (*waiting, idle):
        one.close()
    assert reader.staged_bytes == 0
    reader.close()
