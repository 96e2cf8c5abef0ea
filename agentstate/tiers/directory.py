"""A tier that is a directory: a mount that several machines share, or one that several engines of a machine share.

An extent is written under a name that nobody reads, synced, and linked to its own, which fails if there is one; then
the directories above it are synced. So whatever ends the writer leaves all of the extent or nothing but a file for
`sweep`. A file system without links gets a rename, which replaces an equal extent by itself.

The mark, a file in the root, tells the share from the empty directory that is left when it is not mounted: there, no
extent is missing, and none is written. A root without a mark is known by its device.
"""

from __future__ import annotations

import errno
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from agentstate.errors import AgentStateError, TierMissing, TierRefused, TierShort, TierUnavailable
from agentstate.pages.files import is_full, sync_directory
from agentstate.private import DIRECTORY_MODE, FILE_MODE, private
from agentstate.tiers.interface import MARK, Entry, ExtentName, Page, Range, Reading, Tier, is_name, settle
from agentstate.tiers.ranges import Span, spans
from agentstate.tiers.source import Source, is_of_source

_PARTIAL = re.compile(r"\..*\.part")
_THREADS = 8
# What is read at once, and by one thread. The first stays in the processor's cache until it is copied.
_BOUNCE_BYTES = 1 << 20
_SPAN_BYTES = 8 << 20
# A gap that is read faster than another call is made.
_GAP_BYTES = 64 << 10
_WRITE_BYTES = 4 << 20
# The kernel does not copy between two files, or fails at one of them.
_BY_HAND = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.EIO)
# Half-written files that are swept, and directories that vanish, under a writer that is slow.
_ATTEMPTS = 3
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class DirectoryTier(Tier):
    """Extents in files below ``root``, which exists. ``threads`` are how many calls to the file system may be under
    way: further ones queue. Each has 1 MiB of memory of its own, which bytes pass through: a read that hangs in a dead
    mount may come back at any time, and must not find the memory of somebody who gave up."""

    def __init__(self, root: Path, *, threads: int = _THREADS):
        self._root = root
        self._workers = _Workers(threads)
        self._opening = threading.Lock()
        self._identity: str | int | None = None
        self._synced: set[Path] = set()

    def mark(self, proposed: str | None = None) -> Future[str | None]:
        future: Future[str | None] = Future()
        self._do(future, lambda: self._marked(proposed))
        return future

    def publish(self, name: str, file: BinaryIO, trailer: bytes = b"") -> Future[bool]:
        extent = ExtentName.parse(name)
        future: Future[bool] = Future()
        source = Source(file, trailer)
        self._do(future, lambda: self._publish(extent, source, future))
        return future

    def read(self, name: str, ranges: Sequence[Range]) -> Reading:
        path = self._path(name)
        reading = Reading()
        work = spans(ranges, _GAP_BYTES, _SPAN_BYTES)
        if not work:
            settle(reading, None)
            return reading
        shared = _SharedFile(self, path, len(work))

        def closed() -> None:
            shared.leave()
            self._closed(reading)

        for span in work:
            self._workers.add(partial(shared.read, span, reading), closed)
        return reading

    def drop(self, name: str) -> Future[None]:
        path = self._path(name)
        future: Future[None] = Future()
        self._do(future, lambda: self._drop(path))
        return future

    def list(self, prefix: str = "", after: str | None = None, limit: int = 1000) -> Future[Page]:
        future: Future[Page] = Future()
        self._do(future, lambda: self._list(prefix, after, limit))
        return future

    def sweep(self, older_than_s: float) -> Future[int]:
        future: Future[int] = Future()
        self._do(future, lambda: self._sweep(older_than_s))
        return future

    def close(self) -> None:
        """Threads that hang in a dead mount are left to it."""
        self._workers.close()

    def _path(self, name: str) -> Path:
        return self._root / str(ExtentName.parse(name))

    def _do(self, future: Future[Any], work: Callable[[], Any]) -> None:
        def run() -> None:
            if future.done():
                return
            try:
                self._open()
                result = work()
            except CancelledError:
                return
            except Exception as error:
                settle(future, None, self._meaning(error))
            else:
                settle(future, result)

        self._workers.add(run, lambda: self._closed(future))

    @staticmethod
    def _closed(future: Future[Any]) -> None:
        settle(future, None, TierUnavailable("the tier is closed"))

    def _meaning(self, error: Exception) -> Exception:
        if isinstance(error, AgentStateError) or not isinstance(error, OSError):
            return error
        if is_of_source(error):
            return error
        if is_full(error):
            return TierRefused(f"{self._root} is full: free space on it, or give the share more")
        if error.errno == errno.EROFS:
            return TierRefused(f"{self._root} is read-only: mount it writable, or let another engine write")
        if error.errno in (errno.EACCES, errno.EPERM):
            return TierRefused(f"{self._root}: {error.strerror}: give this user access to {error.filename or 'it'}")
        return TierUnavailable(f"{self._root}: {error.strerror or error}")

    # What the root is

    def _open(self) -> None:
        """See what the root is, the first time."""
        with self._opening:
            if self._identity is None:
                if not self._root.is_dir():
                    raise TierUnavailable(f"{self._root} is not there: is it mounted?")
                self._identity = self._seen()

    def _require_root(self) -> None:
        """Raises TierUnavailable if the root is not what it was."""
        seen, known = self._seen(), self._identity
        if isinstance(seen, str) and known == self._device():
            self._identity = known = seen  # marked since
        if seen != known:
            raise TierUnavailable(f"{self._root} is not what it was when it was opened: is it mounted?")

    def _seen(self) -> str | int:
        """The mark, which outlasts a new mount; the device of a root that has none."""
        mark = self._mark()
        return self._device() if mark is None else mark

    def _device(self) -> int:
        return os.stat(self._root).st_dev

    def _marked(self, proposed: str | None) -> str | None:
        self._require_root()
        if proposed is not None and self._mark() is None:
            self._make_mark(proposed)
            self._require_root()
        return self._mark()

    def _mark(self) -> str | None:
        try:
            return (self._root / MARK).read_text()
        except FileNotFoundError:
            return None

    def _make_mark(self, mark: str) -> None:
        temporary = self._temporary(self._root / MARK)
        try:
            with open(temporary, "x", opener=private) as file:
                file.write(mark)
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):
                _link(temporary, self._root / MARK)
        finally:
            with suppress(OSError):
                os.unlink(temporary)
        sync_directory(self._root)

    @staticmethod
    def _temporary(final: Path) -> Path:
        return final.with_name(f".{final.name}.{uuid.uuid4().hex}.part")

    # Publishing

    def _publish(self, extent: ExtentName, source: Source, future: Future[bool]) -> bool:
        # Before, so that nothing is written elsewhere, and after, for what happened meanwhile.
        self._require_root()
        final = self._root / str(extent)
        for attempt in range(_ATTEMPTS):
            try:
                new = self._publish_once(final, source, future)
                break
            except FileNotFoundError:
                self._require_root()
                self._synced.clear()
                if attempt == _ATTEMPTS - 1:
                    raise
        source.close()
        self._require_root()
        return new

    def _publish_once(self, final: Path, source: Source, future: Future[bool]) -> bool:
        self._make_directories(final.parent)
        new = False
        if not self._same(final, source):
            new = self._write(final, source, future)
        # Also if another writer made it, who may not have come this far.
        sync_directory(final.parent)
        return new

    def _write(self, final: Path, source: Source, future: Future[bool]) -> bool:
        temporary = self._temporary(final)
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
            try:
                done = 0
                while done < source.n_bytes:
                    if future.done():
                        raise CancelledError
                    done += self._append(fd, source, done)
                os.fsync(fd)
            finally:
                os.close(fd)
            if future.done():
                raise CancelledError
            try:
                _link(temporary, final)
            except FileExistsError:
                if self._same(final, source):
                    return False
                os.rename(temporary, final)
            return True
        finally:
            with suppress(OSError):
                os.unlink(temporary)

    @staticmethod
    def _append(fd: int, source: Source, offset: int) -> int:
        """Append a part of the source, from ``offset`` on: how many bytes. By the kernel where it can: a file system
        that shares blocks between files then writes none, and a file server copies by itself."""
        of_file = min(_WRITE_BYTES, source.file_bytes - offset)
        if of_file > 0:
            try:
                if copied := os.copy_file_range(source.fd, fd, of_file, offset):
                    return copied
            except OSError as error:
                # Whose fault an error of both files is, is told by reading one and writing the other.
                if error.errno not in _BY_HAND:
                    raise
        return os.write(fd, source.piece(offset, min(_WRITE_BYTES, source.n_bytes - offset)))

    def _make_directories(self, directory: Path) -> None:
        """Make what is missing between the root and ``directory``, and what made it last, durably."""
        above = self._root
        for part in directory.relative_to(self._root).parts:
            below = above / part
            try:
                os.mkdir(below, DIRECTORY_MODE)
                self._synced.discard(below)
            except FileExistsError:
                pass
            if below not in self._synced:
                sync_directory(above)
                self._synced.add(below)
            above = below

    def _same(self, final: Path, source: Source) -> bool:
        """Whether the file is there, and is this one by its size, its beginning and its end."""
        try:
            fd = os.open(final, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            if os.fstat(fd).st_size != source.n_bytes:
                return False
            return all(os.pread(fd, len(data), offset) == data for offset, data in source.ends())
        finally:
            os.close(fd)

    # The rest

    def _drop(self, path: Path) -> None:
        try:
            os.unlink(path)
        except FileNotFoundError:
            self._require_root()
            return
        sync_directory(path.parent)

    def _list(self, prefix: str, after: str | None, limit: int) -> Page:
        parts = [part for part in prefix.split("/") if part]
        if any(part in (".", "..") for part in parts):
            raise ValueError(f"{prefix!r} is no part of a name")
        self._require_root()
        entries: list[Entry] = []
        now_s = time.time()
        for name, path in self._names(parts, after):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            entries.append(Entry(name, status.st_size, max(0.0, now_s - status.st_mtime)))
            if len(entries) == limit:
                return Page(entries, name)
        self._require_root()
        return Page(entries, None)

    def _names(self, prefix: Sequence[str], after: str | None) -> Iterator[tuple[str, Path]]:
        start = after.split("/") if after else []

        def below(directory: Path, above: list[str]) -> Iterator[tuple[str, Path]]:
            depth = len(above)
            if depth == 4:
                name = "/".join(above)
                if is_name(name) and (after is None or name > after):
                    yield name, directory
                return
            if depth < len(prefix):
                found = [prefix[depth]]
            else:
                try:
                    found = sorted(os.listdir(directory))
                except (FileNotFoundError, NotADirectoryError):
                    return
            bound = start[depth] if depth < len(start) and start[:depth] == above else ""
            for part in found:
                if part >= bound and not part.startswith("."):
                    yield from below(directory / part, [*above, part])

        return below(self._root, [])

    def _sweep(self, older_than_s: float) -> int:
        now_s = self._now_there()
        swept = 0
        for directory, _, files in os.walk(self._root):
            for name in files:
                path = Path(directory, name)
                if not _PARTIAL.fullmatch(name):
                    continue
                with suppress(FileNotFoundError):
                    if now_s - path.stat().st_mtime > older_than_s:
                        path.unlink()
                        swept += 1
        return swept

    def _now_there(self) -> float:
        """The time by the clock that files' ages come from: the file server's."""
        temporary = self._temporary(self._root / "clock")
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
            try:
                return os.fstat(fd).st_mtime
            finally:
                os.close(fd)
        finally:
            os.unlink(temporary)


class _SharedFile:
    """A file that ``users`` pieces of one read share, opened by the first and closed by the last."""

    def __init__(self, tier: DirectoryTier, path: Path, users: int):
        self._tier = tier
        self._path = path
        self._mutex = threading.Lock()
        self._users = users
        self._fd: int | None = None

    def read(self, span: Span, reading: Reading) -> None:
        try:
            if not reading.done():
                self._tier._open()
                self._read(span, reading)
        except CancelledError:
            pass
        except Exception as error:
            settle(reading, None, self._tier._meaning(error))
        finally:
            if self.leave():
                settle(reading, None)

    def leave(self) -> bool:
        """Whether this was the last."""
        with self._mutex:
            self._users -= 1
            if self._users <= 0 and self._fd is not None:
                os.close(self._fd)
                self._fd = None
            return self._users <= 0

    def _read(self, span: Span, reading: Reading) -> None:
        at, first, again = span.start, 0, True
        bounce = _bounce()
        while at < span.end:
            wanted = min(_BOUNCE_BYTES, span.end - at)
            try:
                got = os.preadv(self._opened(), [bounce[:wanted]], at)
            except OSError as error:
                # The file was deleted or replaced on another machine: look at what is there now.
                if error.errno != errno.ESTALE or not again:
                    raise
                again = False
                self._reopen()
                continue
            if not got:
                raise TierShort(f"{self._path.name} ends at {at:,} bytes, before {span.end:,}")
            end = at + got
            while first < len(span.parts) and span.parts[first].offset + len(span.parts[first].into) <= at:
                first += 1
            for offset, into in span.parts[first:]:
                if offset >= end:
                    break
                begin, stop = max(offset, at), min(offset + len(into), end)
                if begin < stop:
                    reading.deliver(into[begin - offset : stop - offset], bounce[begin - at : stop - at])
            at = end

    def _opened(self) -> int:
        with self._mutex:
            if self._fd is None:
                self._fd = self._open()
            return self._fd

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self._tier._require_root()
            raise TierMissing(f"{self._path.name} is not there") from None

    def _reopen(self) -> None:
        with self._mutex:
            if self._fd is None:
                return  # it was opening that failed
            fd = self._open()
            # Others may be reading through it just now.
            os.dup2(fd, self._fd, inheritable=False)
            os.close(fd)


class _Workers:
    """Daemon threads, begun when there is work: a process ends although one of them hangs in a dead mount."""

    def __init__(self, most: int):
        self._mutex = threading.Lock()
        self._queue: queue.SimpleQueue[tuple[Callable[[], None], Callable[[], None]] | None] = queue.SimpleQueue()
        self._most = most
        self._idle = 0
        self._threads: list[threading.Thread] = []
        self._is_closed = False

    def add(self, work: Callable[[], None], refused: Callable[[], None]) -> None:
        """Do ``work``, or ``refused`` if this is closed before that."""
        with self._mutex:
            closed = self._is_closed
            if not closed:
                self._queue.put((work, refused))
                if self._idle < self._queue.qsize() and len(self._threads) < self._most:
                    thread = threading.Thread(target=self._run, name="agentstate-tier-files", daemon=True)
                    self._threads.append(thread)
                    thread.start()
        if closed:
            refused()

    def _run(self) -> None:
        while True:
            with self._mutex:
                self._idle += 1
            item = self._queue.get()
            with self._mutex:
                self._idle -= 1
            if item is None:
                return
            item[0]()
            del item

    def close(self) -> None:
        with self._mutex:
            if self._is_closed:
                return
            self._is_closed = True
        left = []
        while True:
            try:
                left.append(self._queue.get_nowait())
            except queue.Empty:
                break
        for _ in self._threads:
            self._queue.put(None)
        for item in left:
            if item is not None:
                item[1]()


_own = threading.local()


def _bounce() -> memoryview:
    found: memoryview | None = getattr(_own, "bounce", None)
    if found is None:
        found = _own.bounce = memoryview(bytearray(_BOUNCE_BYTES))
    return found


def _link(temporary: Path, final: Path) -> None:
    """Give the file its name, if nothing has it. Raises FileExistsError."""
    try:
        os.link(temporary, final)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.exists(final):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final)) from None
        os.rename(temporary, final)
