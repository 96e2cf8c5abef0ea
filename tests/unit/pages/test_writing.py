from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from contents import MARK, MHA, content, expected, keys, read, reader_for

from agentstate.errors import PageStoreFull
from agentstate.pages import ExtentDraft, PageStore, Quota, Writer, staging_memory


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PageStore]:
    store = PageStore(tmp_path, MARK, MHA)
    yield store
    store.close()


@pytest.fixture
def writer(store: PageStore) -> Iterator[Writer]:
    writer = Writer(store, 2 * store.draft_bytes(3))
    yield writer
    writer.close()


def fill(names: list[bytes], draft: ExtentDraft) -> None:
    for layer in range(MHA.layers):
        for component in range(len(MHA.component_bytes)):
            for row, name in enumerate(names):
                draft.component(layer, component)[row] = np.frombuffer(
                    content(MHA, name, layer, component), dtype=np.uint8
                )


def write(writer: Writer, *pages: int) -> None:
    writer.write(keys(*pages), partial(fill, keys(*pages))).result()


def holds(store: PageStore, *pages: int) -> bool:
    reader, pin = reader_for(MHA), store.pin(keys(*pages))
    found = read(reader, [pin])
    reader.close()
    return found == expected(MHA, [pin])


def test_what_is_written_is_stored_bit_for_bit(store: PageStore, writer: Writer) -> None:
    assert writer.pages_an_extent == store.pages_within(store.draft_bytes(3)) >= 3
    for first in range(0, 9, 3):
        write(writer, first, first + 1, first + 2)
    assert holds(store, *range(9))


def test_a_full_extent_has_room_for_its_owners_name(store: PageStore) -> None:
    owner = "tenant " + "a" * 1000
    writer = Writer(store, 2 * store.draft_bytes(55))
    assert store.draft_bytes(writer.pages_an_extent, owner) > store.draft_bytes(writer.pages_an_extent)
    names = list(range(writer.pages_an_extent))
    for _ in range(2):
        writer.write(keys(*names), partial(fill, keys(*names)), owner).result()
    writer.close()
    assert holds(store, *names)


def test_at_the_quota_an_extent_is_written_over_the_blocks_of_the_one_that_goes(
    store: PageStore, writer: Writer
) -> None:
    store.quota = Quota(2 * store.draft_bytes(3))
    write(writer, 0, 1, 2)
    write(writer, 3, 4, 5)
    with ExitStack() as stack:
        # A file that is open keeps its number from being given to another one.
        before = [stack.enter_context(path.open("rb")) for path in store.directory.glob("extents/*.ext")]
        write(writer, 6, 7, 8)
        assert [os.fstat(file.fileno()).st_nlink for file in before] == [1, 1]
    assert holds(store, 3, 4, 5, 6, 7, 8)
    assert store.prefix_length(keys(0, 1, 2)) == 0


def test_one_extent_is_filled_while_the_one_before_it_is_published(
    store: PageStore, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_publish, publish = threading.Event(), store.publish

    def waiting(draft: ExtentDraft) -> None:
        assert may_publish.wait(60)
        publish(draft)

    monkeypatch.setattr(store, "publish", waiting)
    first = writer.write(keys(0), partial(fill, keys(0)))
    second = writer.write(keys(1), partial(fill, keys(1)))  # filled by the time this returns
    assert not first.done()
    order: list[str] = []
    after = writer.after(lambda: order.extend(str(future.done()) for future in (first, second)))
    may_publish.set()
    after.result(60)
    assert order == ["True", "True"]
    assert holds(store, 0, 1)


def test_memory_comes_back_whatever_fails(store: PageStore, writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(draft: ExtentDraft) -> None:
        raise ValueError("the device is gone")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for _ in range(3):
        with pytest.raises(ValueError, match="gone"):
            writer.write(keys(0), fails)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        for _ in range(3):
            assert isinstance(writer.write(keys(0), partial(fill, keys(0))).exception(), PageStoreFull)
    store.quota = Quota(max_bytes=1)
    for _ in range(3):
        with pytest.raises(PageStoreFull):
            writer.write(keys(0), fails)
    store.quota = Quota()
    with writer.memory(), writer.memory():
        pass
    write(writer, 0)
    assert holds(store, 0)


@pytest.mark.parametrize("n_bytes", [1, 4096, (2 << 20) - 1, 2 << 20, (5 << 20) + 4096])
def test_staging_memory_is_aligned_zero_and_as_long_as_asked(n_bytes: int) -> None:
    memory = staging_memory(n_bytes)
    assert (len(memory), memory.ctypes.data % 4096, int(memory.max())) == (n_bytes, 0, 0)
    memory[:] = 1
