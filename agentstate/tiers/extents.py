"""Extents in a tier: named by their headers, signed if there is a key, and believed only after both were checked."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from agentstate.errors import BadExtent
from agentstate.pages.codec import Codec
from agentstate.pages.extent import PREFIX, ExtentHeader
from agentstate.pages.files import header_of, opened
from agentstate.pages.recoding import coded_copy
from agentstate.tiers.interface import ExtentName, Range, Tier, settle
from agentstate.tiers.mac import TRAILER_BYTES, StoreKeys

# Read at once of an extent: the whole header, unless it has thousands of pages.
_FIRST_BYTES = 64 << 10


class Published(NamedTuple):
    """``new`` is False if an equal extent was there. ``n_bytes`` are the object's: the extent's and what is behind."""

    name: str
    n_bytes: int
    new: bool


class SharedExtents:
    """``tier`` with ``keys``, or with none: then what has a MAC is read as well, and nothing is signed. What is
    published is coded by ``codec``; what was by another is read all the same."""

    def __init__(self, tier: Tier, keys: StoreKeys | None = None, codec: Codec = "raw"):
        self.tier = tier
        self._keys = keys
        self._codec = codec

    def publish(self, path: Path, shard: str) -> Future[Published]:
        """Publish the extent of a local store at ``path``, which may be evicted meanwhile: its space is not written to
        before that has ended. With the codec ``lossless`` its pages are coded first, on the calling thread, unless that
        would not make it smaller; the copy is in memory until it is published.

        Raises at once BadExtent, if it is none, FileNotFoundError, if it is stored no longer, and OSError; the future
        raises what `Tier.publish` says. The pages are not verified: whoever reads them does.
        """
        with opened(path) as file:
            header = header_of(file, path.name)
            with ExitStack() as closing:
                if self._codec == "lossless" and (coded := coded_copy(file, header)) is not None:
                    file = closing.enter_context(coded)
                length = PREFIX.size + PREFIX.unpack(os.pread(file.fileno(), PREFIX.size, 0))[2]
                raw = os.pread(file.fileno(), length, 0)
                name = str(ExtentName.of(header.fingerprint, shard, raw))
                trailer = self._keys.trailer(raw) if self._keys is not None else b""
                n_bytes = os.fstat(file.fileno()).st_size + len(trailer)
                done = self.tier.publish(name, file, trailer)
        return _then(done, Future(), lambda new: Published(name, n_bytes, new))

    def header(self, name: str, n_bytes: int) -> Future[ExtentHeader]:
        """The header of the object ``name``, which has ``n_bytes``, as its row or its listing says.

        Raises MacMismatch, with keys, unless the header has a MAC of one of them; and BadExtent if it is damaged, of
        another fingerprint or digest than its name says, or of an extent of another length. UnknownFormat and what
        `Tier.read` raises mean what they say there.
        """
        extent = ExtentName.parse(name)
        future: Future[ExtentHeader] = Future()
        if n_bytes < PREFIX.size + TRAILER_BYTES:
            settle(future, None, BadExtent(f"{name}: {n_bytes} bytes are no extent"))
            return future
        head, tail = bytearray(min(_FIRST_BYTES, n_bytes)), bytearray(TRAILER_BYTES)
        ranges = [Range(0, memoryview(head)), Range(n_bytes - TRAILER_BYTES, memoryview(tail))]

        def first(_: None) -> ExtentHeader | None:
            length = PREFIX.size + PREFIX.unpack_from(head)[2]
            if length > n_bytes:
                raise BadExtent(f"{name}: the header is damaged")
            if length <= len(head):
                return self._checked(extent, memoryview(head)[:length], tail, n_bytes)
            rest = bytearray(length - len(head))
            more = self.tier.read(name, [Range(len(head), memoryview(rest))])
            _then(more, future, lambda _: self._checked(extent, memoryview(head + rest), tail, n_bytes))
            return None

        return _then(self.tier.read(name, ranges), future, first)

    def _checked(self, name: ExtentName, raw: memoryview, tail: bytearray, n_bytes: int) -> ExtentHeader:
        if self._keys is not None:
            self._keys.require(raw, memoryview(tail), str(name))
        if hashlib.sha256(raw).hexdigest() != name.digest:
            raise BadExtent(f"{name}: this is another extent, or its header is damaged")
        header = ExtentHeader.decode(raw, str(name))
        if header.fingerprint.hex() != name.fingerprint:
            raise BadExtent(f"{name}: this is another extent, of {header.fingerprint.hex()}")
        behind = n_bytes - header.file_bytes
        if behind != TRAILER_BYTES and (behind or self._keys is not None):
            raise BadExtent(f"{name}: {n_bytes:,} bytes; its header says {header.file_bytes:,}")
        return header


def _then(future: Future[Any], then: Future[Any], what: Callable[[Any], Any]) -> Future[Any]:
    """``then``, which gets ``what`` of the future's result, unless that is None: then it gets it elsewhere. Cancelling
    it cancels ``future``."""

    def ended(done: Future[Any]) -> None:
        if done.cancelled():
            settle(then, None, CancelledError())
            return
        try:
            result = what(done.result())
        except BaseException as error:
            settle(then, None, error)
            return
        if result is not None:
            settle(then, result)

    def given_up(then: Future[Any]) -> None:
        if then.cancelled():
            future.cancel()

    then.add_done_callback(given_up)
    future.add_done_callback(ended)
    return then
