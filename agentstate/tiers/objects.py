"""A tier in an object store: S3 and its like, GCS, Azure, through obstore, whose name appears nowhere else.

One thread runs all requests of a tier, as coroutines; obstore's own threads carry the bytes. A put is conditional on
the name being free (``If-None-Match: *``), if it goes in one request. A larger extent goes in parts, which become an
object at once when the last one is there; it replaces one that another writer made meanwhile, which is equal.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, BinaryIO

from agentstate.errors import (
    AgentStateError,
    SettingsError,
    TierMissing,
    TierRefused,
    TierShort,
    TierUnavailable,
)
from agentstate.tiers.interface import MARK, Entry, ExtentName, Page, Range, Reading, Tier, is_name, settle
from agentstate.tiers.measured import Measured
from agentstate.tiers.ranges import Span, spans
from agentstate.tiers.source import Source, is_of_source

# Of a store: obstore's ObjectStore, which is imported where one is opened.
Store = Any

# What one request reads at most: large ones are faster, but a core copies one at a time.
SPAN_BYTES = 8 << 20
_IN_FLIGHT = 32
# Extents up to this size are put by one request, from memory: so many at once.
_WHOLE_BYTES = 64 << 20
_PUTS = 2
_PART_BYTES = 8 << 20
_MOST_PARTS = 9_000
# Until latency and rate have been measured, and the bounds of what follows from them.
_GAP_BYTES, _LEAST_GAP_BYTES, _MOST_GAP_BYTES = 256 << 10, 64 << 10, 2 << 20

_TOO_SHORT = re.compile(r"416 Range|InvalidRange|Invalid range|Requested range was invalid")
_FULL = re.compile(r"507 Insufficient|InsufficientStorage|QuotaExceeded|StorageFull|No space left|quota exceeded", re.I)
_READ_ONLY = re.compile(r"Read-only file system|MethodNotAllowed|405 Method")
_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|specified bucket does not exist", re.I)
_DENIED = re.compile(r"AccessDenied|SignatureDoesNotMatch|InvalidAccessKeyId|ExpiredToken|InvalidToken")
_NO_CREDENTIALS = re.compile(r"169\.254\.169\.254|metadata\.google|MissingCredential", re.I)
_NO_CONDITIONS = re.compile(r"NotImplemented|not supported|501 Not", re.I)


def open_store(url: str) -> Store:
    """The store of an ``s3://``, ``gs://``, ``az://`` or ``memory://`` URL. Endpoint, region and credentials come from
    the environment (``AWS_*``, ``GOOGLE_*``, ``AZURE_*``). Raises SettingsError."""
    try:
        import obstore.store
    except ImportError as error:
        raise SettingsError(f"{url} needs obstore ({error}): pip install 'agentstate[shared]'") from None
    try:
        # Time-outs and retries are the guard's, which knows when somebody has given up.
        options = {"allow_http": True, "connect_timeout": "5s", "timeout": "1day", "pool_idle_timeout": "60s"}
        given = {} if url.startswith("memory:") else {"client_options": options, "retry_config": {"max_retries": 0}}
        from_url: Any = obstore.store.from_url
        return from_url(url, **given)
    except Exception as error:
        raise SettingsError(f"{url} cannot be opened: {_first_line(error)}") from None


class ObjectTier(Tier):
    """Extents below the prefix of an obstore ``store``, called ``where`` in messages. ``ordered`` says that it lists
    names in their order; otherwise every page of a listing takes a whole one."""

    def __init__(self, store: Store, where: str, *, ordered: bool = True, now: Callable[[], float] = time.monotonic):
        import obstore

        self._obstore: Any = obstore
        self._store = store
        self._where = where
        self._ordered = ordered
        self._now = now
        self._measured = Measured()
        self._mutex = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._slots = asyncio.Semaphore(_IN_FLIGHT)
        self._puts = asyncio.Semaphore(_PUTS)

    def mark(self, proposed: str | None = None) -> Future[str | None]:
        """Two that propose one at once may both get theirs in a store that has no conditional put."""
        return self._run(Future(), self._marked, proposed)

    def publish(self, name: str, file: BinaryIO, trailer: bytes = b"") -> Future[bool]:
        ExtentName.parse(name)
        return self._run(Future(), self._publish, name, Source(file, trailer))

    def read(self, name: str, ranges: Sequence[Range]) -> Reading:
        ExtentName.parse(name)
        reading = Reading()
        self._run(reading, self._read, name, ranges, reading)
        return reading

    def drop(self, name: str) -> Future[None]:
        ExtentName.parse(name)
        return self._run(Future(), self._drop, name)

    def list(self, prefix: str = "", after: str | None = None, limit: int = 1000) -> Future[Page]:
        return self._run(Future(), self._list, prefix, after, limit)

    def sweep(self, older_than_s: float) -> Future[int]:
        """Nothing: half of an object is not in the bucket. Parts of an upload that died are the store's, which deletes
        them by a rule of its own (docs/shared-store.md)."""
        future: Future[int] = Future()
        future.set_result(0)
        return future

    def close(self) -> None:
        with self._mutex:
            if self._closed:
                return
            self._closed = True
            loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return
        loop.call_soon_threadsafe(loop.stop)
        if thread is not threading.current_thread():
            thread.join()

    # Running

    def _run(self, future: Future[Any], work: Callable[..., Coroutine[Any, Any, Any]], *arguments: Any) -> Future[Any]:
        """Run a coroutine on the tier's thread, for ``future``, whose cancellation cancels it."""
        with self._mutex:
            if self._closed:
                settle(future, None, TierUnavailable("the tier is closed"))
                return future
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._serve, args=[self._loop], name="agentstate-tier-objects", daemon=True
                )
                self._thread.start()
            loop = self._loop
            loop.call_soon_threadsafe(self._begin, future, work, arguments)
        return future

    def _begin(
        self, future: Future[Any], work: Callable[..., Coroutine[Any, Any, Any]], arguments: Sequence[Any]
    ) -> None:
        if future.done():
            return
        assert self._loop is not None
        loop, task = self._loop, self._loop.create_task(work(*arguments))

        def ended(task: asyncio.Task[Any]) -> None:
            if task.cancelled():
                settle(future, None, TierUnavailable("the tier is closed"))
            elif error := task.exception():
                settle(future, None, self._meaning(error))
            else:
                settle(future, task.result())

        def given_up(future: Future[Any]) -> None:
            if future.cancelled():
                with suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(task.cancel)

        task.add_done_callback(ended)
        future.add_done_callback(given_up)

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        # It stops after everything that was asked for before it was closed has begun.
        loop.run_forever()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()

    def _meaning(self, error: BaseException) -> BaseException:
        """A tier's error for what obstore raised, with one line of what it said."""
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, AgentStateError) or is_of_source(error):
            return error
        said, kind = _first_line(error), type(error).__name__
        if _NO_BUCKET.search(said):
            return TierRefused(f"{self._where}: there is no such bucket: create it, or correct its name")
        if isinstance(error, FileNotFoundError):
            return TierMissing(f"{self._where} has no such extent")
        if _FULL.search(said):
            return TierRefused(f"{self._where} is full: free space in it, or raise its quota ({_code(said)})")
        if kind in ("PermissionDeniedError", "UnauthenticatedError") or _DENIED.search(said):
            return TierRefused(
                f"{self._where} refuses these credentials: check them, and what they may do ({_code(said)})"
            )
        if _NO_CREDENTIALS.search(said):
            return TierRefused(
                f"{self._where}: no credentials were found: set those of the store (AWS_ACCESS_KEY_ID, …)"
            )
        if _TOO_SHORT.search(said):
            return TierShort(f"{self._where}: the extent ends too early")
        if _READ_ONLY.search(said):
            return TierRefused(f"{self._where} is read-only: let another engine write ({_code(said)})")
        return TierUnavailable(f"{self._where}: {said}")

    # What is run

    async def _marked(self, proposed: str | None) -> str | None:
        mark = await self._mark()
        if mark is None and proposed is not None:
            await self._put(MARK, proposed.encode())
            mark = await self._mark()
        return mark

    async def _mark(self) -> str | None:
        try:
            found = await self._obstore.get_async(self._store, MARK)
            return bytes(await found.bytes_async()).decode(errors="replace")
        except Exception as error:
            # Some servers make a bucket when it is first written to: of others, the write says that there is none.
            if isinstance(self._meaning(error), TierMissing) or _NO_BUCKET.search(_first_line(error)):
                return None
            raise

    async def _put(self, name: str, data: bytes | memoryview) -> bool:
        """Put an object by one request. False if there is one of that name already, where the store can tell."""
        try:
            await self._obstore.put_async(self._store, name, data, mode="create", use_multipart=False)
            return True
        except Exception as error:
            if type(error).__name__ in ("AlreadyExistsError", "PreconditionError"):
                return False
            if not _NO_CONDITIONS.search(_first_line(error)):
                raise
        await self._obstore.put_async(self._store, name, data, use_multipart=False)
        return True

    async def _publish(self, name: str, source: Source) -> bool:
        if await self._same(name, source):
            return False
        async with self._puts:
            if source.n_bytes > _WHOLE_BYTES:
                await self._put_parts(name, source)
                return True
            data = await asyncio.to_thread(source.piece, 0, source.n_bytes)
            if await self._put(name, data):
                return True
            if await self._same(name, source):
                return False
            await self._obstore.put_async(self._store, name, data, use_multipart=False)
            return True

    async def _put_parts(self, name: str, source: Source) -> None:
        part_bytes = max(_PART_BYTES, -(-source.n_bytes // _MOST_PARTS))

        async def parts() -> AsyncIterator[memoryview]:
            for at in range(0, source.n_bytes, part_bytes):
                yield await asyncio.to_thread(source.piece, at, min(part_bytes, source.n_bytes - at))

        await self._obstore.put_async(
            self._store, name, parts(), use_multipart=True, chunk_size=part_bytes, max_concurrency=4
        )

    async def _same(self, name: str, source: Source) -> bool:
        """Whether the object is there, and is this one by its size, its beginning and its end."""
        try:
            meta = await self._obstore.head_async(self._store, name)
            if meta["size"] != source.n_bytes:
                return False
            for offset, data in source.ends():
                found = await self._obstore.get_range_async(self._store, name, start=offset, length=len(data))
                if memoryview(found) != data:
                    return False
        except Exception as error:
            if isinstance(self._meaning(error), TierMissing):
                return False
            raise
        return True

    async def _read(self, name: str, ranges: Sequence[Range], reading: Reading) -> None:
        work = spans(ranges, self._gap_bytes(), SPAN_BYTES)
        if len(work) == 1:
            await self._get(name, work[0], reading)
            return
        async with asyncio.TaskGroup() as group:
            for span in work:
                group.create_task(self._get(name, span, reading))

    async def _get(self, name: str, span: Span, reading: Reading) -> None:
        async with self._slots:
            began_s = self._now()
            self._measured.began(began_s, span.end - span.start)
            try:
                data = memoryview(
                    await self._obstore.get_range_async(self._store, name, start=span.start, end=span.end)
                )
            except BaseException:
                self._measured.failed(self._now(), span.end - span.start)
                raise
            self._measured.ended(began_s, self._now(), span.end - span.start)
        if len(data) < span.end - span.start:
            raise TierShort(f"{name} ends at {span.start + len(data):,} bytes, before {span.end:,}")
        for offset, into in span.parts:
            at = offset - span.start
            reading.deliver(into, data[at : at + len(into)])

    def _gap_bytes(self) -> int:
        """What is carried in the time that another request takes, by one of those that are in flight."""
        latency_s, bytes_per_s = self._measured.figures()
        if latency_s is None or bytes_per_s is None:
            return _GAP_BYTES
        return int(max(_LEAST_GAP_BYTES, min(_MOST_GAP_BYTES, latency_s * bytes_per_s)))

    async def _drop(self, name: str) -> None:
        try:
            await self._obstore.delete_async(self._store, name)
        except Exception as error:
            if not isinstance(self._meaning(error), TierMissing):
                raise

    async def _list(self, prefix: str, after: str | None, limit: int) -> Page:
        entries: list[Entry] = []
        now_s = time.time()
        below = prefix.strip("/") or None
        stream = self._obstore.list(
            self._store, below, offset=after if self._ordered else None, chunk_size=min(limit, 1000)
        )
        async for chunk in stream:
            for meta in chunk:
                name = str(meta["path"])
                if is_name(name) and (after is None or name > after):
                    entries.append(Entry(name, meta["size"], max(0.0, now_s - meta["last_modified"].timestamp())))
            if self._ordered and len(entries) >= limit:
                break
        entries.sort()
        more = len(entries) >= limit
        return Page(entries[:limit], entries[limit - 1].name if more else None)


def _first_line(error: BaseException) -> str:
    """What an error says, without obstore's own representation of it, in one line."""
    return " ".join(str(error).partition("Debug source")[0].split())[:600]


def _code(said: str) -> str:
    """The store's own word for what is wrong."""
    found = re.search(r"<Code>(\w+)</Code>|code: (\w+)", said) or re.search(r"status code: (\d+ [A-Za-z ]+)", said)
    return next(filter(None, found.groups())) if found else said[:80]
