"""Extents open for reading: few at a time, however many the streams of a reader need."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from agentstate.errors import BadExtent
from agentstate.pages import native
from agentstate.pages.backends import Buffer, OpenFile, ReadBackend, staging_memory
from agentstate.pages.extent import ALIGNMENT, PREFIX, ExtentHeader, ExtentLayout, align
from agentstate.pages.files import hold, open_direct
from agentstate.pages.pins import Segment, StoredExtent

# How many arrays one call reads into, at most.
_MOST_ARRAYS = os.sysconf("SC_IOV_MAX")
# Bound of the headers that are kept while their extents' files are closed or open.
_HEADER_BYTES = 512 << 20
# The process has run out of something, which the next moment may give back.
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR, errno.ENOBUFS)
_PAUSES_S = (0.0, 0.01, 0.1)

T = TypeVar("T")
# Opens an extent to be read, given its header if that has been read before; raises like `FileHandle`.
OpenExtent = Callable[[StoredExtent, ExtentHeader | None], "Handle"]


def most_open() -> int:
    """How many files a reader may keep open: a sixteenth of what the process may, but between 8 and 1,024. A backend
    may open each of them three times."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1024 if soft == resource.RLIM_INFINITY else max(8, min(1024, soft // 16))


class Handles:
    """Open extents, which all streams of a reader share. Thread-safe.

    A stream says which extents it needs (`enter`), and in the end that it no longer needs them (`leave`), which closes
    those that no other stream needs: a file that stays open keeps its space on the disk. In between, an extent is
    opened when it is read, and closed when ``most`` others that were read later are open; only extents that are being
    read come on top. Headers stay in memory, all of them within ``header_bytes``, estimated.
    """

    def __init__(self, open_extent: OpenExtent, most: int, header_bytes: int = _HEADER_BYTES):
        self._open_extent = open_extent
        self._most = most
        self._header_bytes = header_bytes
        self._mutex = threading.Lock()
        self._entries: dict[Path, _Entry] = {}
        # Those that are open, and those whose header is in memory; the least recently read first.
        self._open: OrderedDict[Path, _Entry] = OrderedDict()
        self._headers: OrderedDict[Path, _Entry] = OrderedDict()
        self._kept_bytes = 0

    def enter(self, extents: Iterable[StoredExtent]) -> None:
        """A stream is going to read ``extents``, each of which is named once."""
        with self._mutex:
            for extent in extents:
                entry = self._entries.get(extent.path)
                if entry is None:
                    entry = self._entries[extent.path] = _Entry(self, extent)
                entry.streams += 1

    @property
    def kept(self) -> int:
        """How many extents streams need, open or not."""
        return len(self._entries)

    def leave(self, extents: Iterable[StoredExtent]) -> None:
        """The stream no longer reads ``extents``."""
        closing = []
        with self._mutex:
            for extent in extents:
                entry = self._entries[extent.path]
                entry.streams -= 1
                if not entry.streams:
                    del self._entries[extent.path]
                    closing += self._forget(entry)
        for handle in closing:
            handle.close()

    def reading(self, extent: StoredExtent) -> AbstractContextManager[Handle]:
        """A context in which the extent is open. Raises BadExtent if it is gone or its header is damaged or of another
        layout, and OSError if it could not be opened this time."""
        return self._entries[extent.path]

    def _open_now(self, entry: _Entry) -> Handle:
        """The handle of an entry that has a reader, opened if need be."""
        with entry.opening:
            if entry.handle is None:
                self._enter_open(entry, patiently(lambda: self._opened(entry), self._close_idle))
            handle = entry.handle
        assert handle is not None
        return handle

    def _opened(self, entry: _Entry) -> Handle:
        with self._mutex:
            closing = self._idle(len(self._open) - self._most + 1)
        for handle in closing:
            handle.close()
        return self._open_extent(entry.extent, entry.header)

    def _enter_open(self, entry: _Entry, handle: Handle) -> None:
        closing = []
        with self._mutex:
            self._open[entry.path] = entry
            entry.handle = handle
            if entry.header is None:
                entry.header = handle.header
                self._headers[entry.path] = entry
                self._kept_bytes += _bytes_of(handle.header)
            if self._kept_bytes > self._header_bytes:
                for kept in [entry for entry in self._headers.values() if not entry.readers]:
                    closing += self._forget(kept)
                    if self._kept_bytes <= self._header_bytes:
                        break
        for closed in closing:
            closed.close()

    def _close_idle(self) -> None:
        with self._mutex:
            closing = self._idle(len(self._open))
        for handle in closing:
            handle.close()

    def _idle(self, count: int) -> list[Handle]:
        """Take out up to ``count`` of those that are open and not being read."""
        idle = [entry for entry in self._open.values() if not entry.readers] if count > 0 else []
        return [self._taken_out(entry) for entry in idle[:count]]

    def _taken_out(self, entry: _Entry) -> Handle:
        del self._open[entry.path]
        handle, entry.handle = entry.handle, None
        assert handle is not None
        return handle

    def _forget(self, entry: _Entry) -> list[Handle]:
        """Keep neither the header nor the file. Returns the handle to close, if there is one."""
        if entry.header is not None:
            del self._headers[entry.path]
            self._kept_bytes -= _bytes_of(entry.header)
            entry.header = None
        return [self._taken_out(entry)] if entry.handle is not None else []


class _Entry:
    """An extent that ``streams`` streams need and ``readers`` threads are reading, each of them within it as a context
    manager."""

    def __init__(self, handles: Handles, extent: StoredExtent):
        self.extent = extent
        self.path = extent.path
        self.streams = 0
        self.readers = 0
        self.opening = threading.Lock()
        self.handle: Handle | None = None
        self.header: ExtentHeader | None = None
        self._handles = handles

    def __enter__(self) -> Handle:
        handles = self._handles
        with handles._mutex:
            self.readers += 1
            handle = self.handle
            if handle is not None:
                handles._open.move_to_end(self.path)
                return handle
        try:
            return handles._open_now(self)
        except BaseException:
            self._leave()
            raise

    def __exit__(self, *_: object) -> None:
        self._leave()

    def _leave(self) -> None:
        with self._handles._mutex:
            self.readers -= 1


class Fill(NamedTuple):
    """Consecutive bytes of an extent, from ``offset`` on, that are read to ``arrays``: ``wanted`` are needed."""

    arrays: Sequence[Buffer]
    offset: int
    wanted: int


class Extract(NamedTuple):
    """What of an extent is read: pages of ``layer``, from ``slot`` on, by ``fills``. Their ``components`` are then
    consecutive arrays each, which lie in those of the fills."""

    layer: int
    slot: int
    fills: Sequence[Fill]
    components: Sequence[Sequence[Buffer]]


class Found(NamedTuple):
    """Pages as they were read: ``n_bytes`` bytes of their extent, and for each of their ``components`` consecutive
    arrays of shape (pages, component bytes). ``wrong`` are the slots whose bytes are not those that were written; None
    if nobody has looked."""

    components: Sequence[Sequence[Buffer]]
    n_bytes: int
    wrong: list[int] | None


class Handle(ABC):
    """An extent that can be read, wherever it lies, and its ``header``, which has been checked. One that is a file has
    its descriptor, ``fd``.

    What reads it raises BadExtent where it is gone or too short, and OSError where nothing is known of it this time.
    """

    header: ExtentHeader
    fd: int | None = None

    def read(self, segment: Segment, layer: int, buffer: Buffer, position: int) -> tuple[Found, int]:
        """Read one layer of a segment into ``buffer`` from ``position`` on, which is block-aligned. Returns it, with
        one array a component, and the next free position."""
        extent, slot, pages, _ = segment
        if self.header.coding is not None:
            if not isinstance(buffer, np.ndarray):
                raise OSError(errno.EOPNOTSUPP, "coded pages are not read to device memory", extent.path.name)
            into: list[list[Buffer]] = []
            for n_bytes in self.header.geometry.component_bytes:
                end = position + pages * n_bytes
                into.append([buffer[position:end].reshape(pages, n_bytes)])
                position = end
            return self._decoded(layer, slot, into), align(position)
        arrays, fills = [], []
        offset = extent.layout.layer_offset(layer)
        for start, end, members in extent.layout.ranges(slot, pages):
            skew = start % ALIGNMENT
            room = align(skew + end - start)
            fills.append(Fill([buffer[position : position + room]], offset + start - skew, skew + end - start))
            for begin, length in members:
                first = position + skew + begin - start
                arrays.append([buffer[first : first + length].reshape(pages, length // pages)])
            position += room
        return self._read(Extract(layer, slot, fills, arrays), whole_blocks=True), position

    def read_to(self, components: Sequence[Sequence[Buffer]], segment: Segment, layer: int) -> Found:
        """Read one layer of a segment to where its ``components`` belong, each of them consecutive arrays. Raises
        ValueError for arrays of another size."""
        if self.header.coding is not None:
            pages = {sum(len(array) for array in arrays) for arrays in components}
            if pages != {segment.pages} or len(components) != len(self.header.geometry.component_bytes):
                raise ValueError(f"no memory for {segment.pages} pages of {segment.extent.path.name}")
            return self._decoded(layer, segment.slot, components)
        fills, arrays_of = [], iter(components)
        offset = segment.extent.layout.layer_offset(layer)
        for begin, end, members in segment.extent.layout.ranges(segment.slot, segment.pages):
            start, end = offset + begin, offset + end
            into = [array for _ in members for array in next(arrays_of)]
            for i in range(0, len(into), _MOST_ARRAYS):
                some = into[i : i + _MOST_ARRAYS]
                fills.append(Fill(some, start, sum(array.nbytes for array in some)))
                start += fills[-1].wanted
            if start != end:
                raise ValueError(f"{start - end:+,} bytes of memory for pages of {segment.extent.path.name}")
        return self._read(Extract(layer, segment.slot, fills, components), whole_blocks=False)

    def _decoded(self, layer: int, slot: int, components: Sequence[Sequence[Buffer]]) -> Found:
        """Decode coded pages from ``slot`` on to ``components``, as `read_to` has them. They come by way of memory of
        the calling thread's."""
        coding, sizes = self.header.coding, self.header.geometry.component_bytes
        assert coding is not None
        pages = sum(len(array) for array in components[0])
        if slot + pages > len(self.header.keys):
            raise BadExtent("the extent has fewer pages")
        ranges = [self.header.component_range(layer, component, slot, pages) for component in range(len(sizes))]
        if all(offset + n_bytes == after for (offset, n_bytes), (after, _) in pairwise(ranges)):
            whole = self._load([(ranges[0][0], sum(n_bytes for _, n_bytes in ranges))])[0]
            ends = list(accumulate(n_bytes for _, n_bytes in ranges))
            coded = [whole[end - n_bytes : end] for end, (_, n_bytes) in zip(ends, ranges, strict=True)]
        else:
            coded = self._load(ranges)
        for component, (arrays, size) in enumerate(zip(components, sizes, strict=True)):
            coding.decode(layer, component, slot, size, coded[component], arrays)
        return Found(components, sum(n_bytes for _, n_bytes in ranges), None)

    @abstractmethod
    def _load(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """The bytes of some ranges of the extent, each an offset and a length: in memory that is the calling thread's
        until it loads others."""

    @abstractmethod
    def _read(self, extract: Extract, *, whole_blocks: bool) -> Found:
        """Read it. With ``whole_blocks`` each fill has one array of whole blocks, from a block's beginning on, which
        the file's end may cut short; without, the arrays have as many bytes as are wanted."""

    @abstractmethod
    def close(self) -> None: ...


class FileHandle(Handle):
    """An extent that is a file, open for reading by ``backend``, and its header: the one read before, or else the
    file's. Where the store is another process's, ``held``, that does not overwrite its space meanwhile.

    Raises BadExtent for a file that is gone and for a header that is damaged or of another layout, and OSError.
    """

    def __init__(
        self, backend: ReadBackend, extent: StoredExtent, header: ExtentHeader | None = None, *, held: bool = False
    ):
        self._name = extent.path.name
        try:
            self._fd = open_direct(extent.path, os.O_RDONLY)
        except FileNotFoundError:
            raise BadExtent(f"{self._name} is gone") from None
        try:
            if held:
                hold(self._fd, extent.path)
            self.header = header or self._read_header(extent.layout)
            self._file: OpenFile = backend.open(self._fd, extent.path)
            self.fd = self._fd
        except FileNotFoundError:
            os.close(self._fd)
            raise BadExtent(f"{self._name} is gone") from None
        except BaseException:
            os.close(self._fd)
            raise

    def _read_header(self, layout: ExtentLayout) -> ExtentHeader:
        raw = mmap.mmap(-1, layout.data_offset)
        self._require(os.preadv(self._fd, [raw], 0), len(raw), len(raw))
        # That of coded pages is longer.
        length = PREFIX.size + PREFIX.unpack_from(raw)[2]
        if len(raw) < length <= os.fstat(self._fd).st_size:
            raw = mmap.mmap(-1, align(length))
            self._require(os.preadv(self._fd, [raw], 0), length, length)
        header = ExtentHeader.decode(memoryview(raw), self._name)
        # An earlier release may have entered the extent into the index, without its owner.
        if not header.layout.agrees(layout):
            raise BadExtent(f"{self._name}: the header is of another extent")
        return header

    def _read(self, extract: Extract, *, whole_blocks: bool) -> Found:
        # Whole blocks are the backend's to read.
        fd = self._file.fd if whole_blocks else self._fd
        wrong: list[int] | None = None
        if native.library is not None and fd is not None:
            counts, wrong = self.header.verifier.read(
                fd, extract.fills, extract.layer, extract.slot, extract.components, native.replaced_preadv()
            )
            n_bytes = sum(map(self._whole, counts, extract.fills))
        elif whole_blocks:
            n_bytes = sum(self._whole(self._file.read(fill.arrays[0], fill.offset), fill) for fill in extract.fills)
        else:
            n_bytes = sum(self._whole(os.preadv(self._fd, fill.arrays, fill.offset), fill) for fill in extract.fills)
        return Found(extract.components, n_bytes, wrong)

    def _load(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        # Direct I/O reads whole blocks.
        spans = [(offset - offset % ALIGNMENT, align(offset + n_bytes)) for offset, n_bytes in ranges]
        memory, at, found = _scratch(sum(end - start for start, end in spans)), 0, []
        for (offset, n_bytes), (start, end) in zip(ranges, spans, strict=True):
            room = memory[at : at + end - start]
            skew = offset - start
            self._require(self._file.read(room, start), skew + n_bytes, offset + n_bytes)
            found.append(room[skew : skew + n_bytes])
            at += len(room)
        return found

    def _whole(self, got: int, fill: Fill) -> int:
        """``got``, if that is as much as was wanted."""
        self._require(got, fill.wanted, fill.offset + fill.wanted)
        return got

    def _require(self, got: int, wanted: int, end: int) -> None:
        """Tell a file that ends before ``end`` from a read that was cut short."""
        if got >= wanted:
            return
        if os.fstat(self._fd).st_size < end:
            raise BadExtent(f"{self._name} ends in the middle of a page")
        raise OSError(errno.EIO, f"{got:,} of {wanted:,} bytes were read", self._name)

    def close(self) -> None:
        self._file.close()
        os.close(self._fd)


def patiently(work: Callable[[], T], relieve: Callable[[], None] = lambda: None) -> T:
    """What ``work`` returns. It is retried if the process has run out of something, up to three times, each after
    ``relieve`` and at most a tenth of a second, and once after an error of the drive."""
    drive_failed = False
    for pause_s in _PAUSES_S:
        try:
            return work()
        except OSError as error:
            if error.errno in _EXHAUSTED:
                relieve()
                time.sleep(pause_s)
            elif drive_failed or not is_of_drive(error):
                raise
            else:
                drive_failed = True
    return work()


_of_thread = threading.local()


def _scratch(n_bytes: int) -> np.ndarray:
    """Memory of the calling thread, page-aligned, for coded bytes: the same one each time."""
    memory: np.ndarray | None = getattr(_of_thread, "memory", None)
    if memory is None or len(memory) < n_bytes:
        memory = _of_thread.memory = staging_memory(align(n_bytes))
    return memory[:n_bytes]


def scratch(lengths: Sequence[int]) -> list[np.ndarray]:
    """Memory of the calling thread for so many bytes each: valid until it asks again."""
    memory, ends = _scratch(sum(lengths)), list(accumulate(lengths))
    return [memory[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def is_of_drive(error: OSError) -> bool:
    """Whether the drive failed to read; a backend other than POSIX gives no error number."""
    return error.errno in (errno.EIO, None)


def _bytes_of(header: ExtentHeader) -> int:
    # Besides its bytes in the file, an object a key and a number a seed.
    return header.data_offset + 150 * len(header.keys)
