from __future__ import annotations

import errno
import os
import resource
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from contents import MARK, MHA, expected, keys, read, reader_for, write

from agentstate.errors import BadExtent
from agentstate.pages import LayerwiseReader, PageStore, PosixBackend, handles, reading
from agentstate.pages.handles import FileHandle, Handles, most_open

pytestmark = pytest.mark.usefixtures("read_by")

EXTENTS = 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PageStore]:
    """Twenty extents of a page each."""
    store = PageStore(tmp_path, MARK, MHA)
    for page in range(EXTENTS):
        write(store, keys(page))
    yield store
    store.close()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many times each extent was opened, and under ``most`` how many were open at once."""
    counted: Counter[str] = Counter()
    mutex = threading.Lock()
    real = handles.open_direct

    def counting(path: Path, flags: int) -> int:
        fd = real(path, flags)
        with mutex:
            counted[path.name] += 1
            counted["most"] = max(counted["most"], descriptors())
        return fd

    monkeypatch.setattr(handles, "open_direct", counting)
    return counted


def descriptors() -> int:
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{fd}").endswith(".ext")
        except FileNotFoundError:
            continue
    return found


def headers_read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    counted: Counter[str] = Counter()
    real = os.preadv

    def preadv(fd: int, buffers: list[Any], offset: int) -> int:
        if offset == 0:
            counted[os.readlink(f"/proc/self/fd/{fd}")] += 1
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    return counted


def test_few_extents_are_open_however_many_are_needed(
    store: PageStore, opened: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "most_open", lambda: 4)
    read_of = headers_read(monkeypatch)
    reader = reader_for(MHA)
    requests = [store.pin(keys(*range(EXTENTS))), store.pin(keys(*range(EXTENTS - 1, -1, -1)))]
    assert read(reader, requests) == expected(MHA, requests)
    assert opened["most"] <= 4 + 2, "and one that each thread is opening"
    assert max(read_of.values()) <= 2, "a header stays in memory when its file is closed"
    assert descriptors() == 0
    reader.close()


def test_an_extent_is_opened_when_it_is_read(store: PageStore, opened: Counter[str]) -> None:
    """A stream that waits for memory holds no descriptors."""
    reader = LayerwiseReader(MHA, staging_bytes=1, threads=2)
    waiting = [reader.open(store.pin(keys(*range(EXTENTS)))) for _ in range(3)]
    with reader.open(store.pin(keys(3))) as stream:
        assert sum(chunk.count for chunk in stream) == MHA.layers
    # Two buffers of a page each, of which one is kept back.
    assert len(opened.keys() - {"most"}) <= 3
    for stream in waiting:
        stream.close()
    reader.close()


def test_streams_share_what_is_open_and_the_last_one_closes_it(store: PageStore, opened: Counter[str]) -> None:
    reader = reader_for(MHA)
    streams = [reader.open(store.pin(keys(*range(8)))) for _ in range(3)]
    for number, stream in enumerate(streams):
        for chunk in stream:
            assert not chunk.unusable()
        assert descriptors() == 8
        stream.close()
        assert descriptors() == (8 if number < 2 else 0)
    assert max(opened[name] for name in opened.keys() - {"most"}) == 1
    reader.close()


def test_headers_are_read_again_where_memory_for_them_is_short(
    store: PageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = store.pin(keys(*range(8)))
    extents = [segment.extent for segment in pin.segments]
    read_of = headers_read(monkeypatch)
    kept = Handles(partial(FileHandle, PosixBackend()), 2, header_bytes=0)
    kept.enter(extents)
    for _ in range(2):
        for extent in extents:
            with kept.reading(extent) as handle:
                assert len(handle.header.keys) == 1
    assert sorted(read_of.values()) == [2] * 8
    kept.leave(extents)
    assert descriptors() == 0


def test_what_is_pinned_is_reopened_after_it_was_superseded(store: PageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "most_open", lambda: 1)
    requests = [store.pin(keys(*range(8)))]
    reader = reader_for(MHA, chunk_bytes=1)
    with reader.open(store.pin(keys(*range(8)))) as stream:
        stream.hurry()
        for layer in range(MHA.layers):
            assert not any(chunk.unusable() for chunk in stream.layer(layer))
            if layer == 0:
                write(store, keys(*range(8)), version=1)
    assert read(reader, requests) == expected(MHA, requests)
    requests[0].close()
    reader.close()


@pytest.mark.parametrize("number", ["EMFILE", "ENFILE", "ENOMEM", "EAGAIN"])
def test_what_the_process_has_run_out_of_is_waited_for(
    store: PageStore, number: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = handles.open_direct, Counter[str]()

    def refusing(path: Path, flags: int) -> int:
        refused[path.name] += 1
        if refused[path.name] <= 2:
            raise OSError(getattr(errno, number), "of this test")
        return real(path, flags)

    monkeypatch.setattr(handles, "open_direct", refusing)
    reader = reader_for(MHA)
    requests = [store.pin(keys(1, 2))]
    assert read(reader, requests) == expected(MHA, requests)
    reader.close()


def test_a_read_that_fails_once_is_made_again(store: PageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real, failed = os.preadv, set[int]()

    def failing(fd: int, buffers: list[Any], offset: int) -> int:
        if offset not in failed:
            failed.add(offset)
            raise OSError(errno.EIO, "of this test")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    reader = reader_for(MHA)
    requests = [store.pin(keys(1))]
    assert read(reader, requests) == expected(MHA, requests)
    assert len(failed) > 1
    reader.close()


@pytest.mark.parametrize("number", ["EMFILE", "ENOMEM", "EIO", "EACCES", "ESTALE"])
def test_what_cannot_be_opened_is_unread_and_not_wrong(
    store: PageStore, number: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = store.pin(keys(1, 2, 3))
    bad, real = pin.segments[1].extent.path, handles.open_direct

    def refusing(path: Path, flags: int) -> int:
        if path == bad:
            raise OSError(getattr(errno, number), "of this test")
        return real(path, flags)

    monkeypatch.setattr(handles, "open_direct", refusing)
    reader = reader_for(MHA)
    with reader.open(pin) as stream:
        chunks = list(stream)
    assert [chunk.wrong for chunk in chunks] == [{}] * len(chunks)
    assert {page for chunk in chunks for page in chunk.unusable()} == {1}
    assert {error.errno for chunk in chunks for _, error in chunk.unread} == {getattr(errno, number)}
    reader.close()


def test_a_read_that_is_cut_short_is_unread_and_a_file_that_is_cut_off_is_wrong(
    store: PageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, buffers, offset) // 2)
    (segment,) = store.pin(keys(1)).segments
    kept = Handles(partial(FileHandle, PosixBackend()), 2)
    kept.enter([segment.extent])
    with pytest.raises(OSError, match="bytes were read") as error, kept.reading(segment.extent):
        pass
    assert error.value.errno == errno.EIO
    monkeypatch.undo()
    os.truncate(segment.extent.path, segment.extent.layout.data_offset - 1)
    with pytest.raises(BadExtent, match="in the middle"), kept.reading(segment.extent):
        pass
    segment.extent.path.unlink()
    with pytest.raises(BadExtent, match="is gone"), kept.reading(segment.extent):
        pass
    kept.leave([segment.extent])
    assert descriptors() == 0


def test_a_low_limit_of_descriptors_costs_no_page(store: PageStore) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    reader = reader_for(MHA)
    requests = [store.pin(keys(*range(EXTENTS))), store.pin(keys(*range(EXTENTS)))]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 4, limits[1]))
    try:
        found = read(reader, requests)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert found == expected(MHA, requests)
    reader.close()


def test_the_limit_follows_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, most in [(64, 8), (1024, 64), (65535, 1024), (resource.RLIM_INFINITY, 1024)]:
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert most_open() == most
