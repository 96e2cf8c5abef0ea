"""What every tier promises: `Tier`, the names in it, and the futures that it gives."""

from __future__ import annotations

import hashlib
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, BinaryIO, NamedTuple

import numpy as np

SUFFIX = ".ext"
# The name of a store's mark, beside its extents.
MARK = ".agentstate"
# No character of a part sorts before the slash, so that names sort as their parts do.
_NAME = re.compile(
    r"(?P<fingerprint>[0-9a-f]{64})/(?P<shard>[A-Za-z0-9_]{1,64})/(?P<hh>[0-9a-f]{2})/(?P<digest>[0-9a-f]{64})\.ext"
)


class ExtentName(NamedTuple):
    """``FINGERPRINT/SHARD/hh/DIGEST.ext``: the pages' fingerprint (64 hex digits), the part of a model that they are of
    (`rank0` and its like), and the SHA-256 of the extent's header. ``hh`` are the digest's first two digits."""

    fingerprint: str
    shard: str
    digest: str

    def __str__(self) -> str:
        return f"{self.fingerprint}/{self.shard}/{self.digest[:2]}/{self.digest}{SUFFIX}"

    @classmethod
    def of(cls, fingerprint: bytes, shard: str, header: bytes | memoryview) -> ExtentName:
        """The name of the extent that begins with ``header``: its prefix and its map, without the zeros behind them.
        Raises ValueError for a shard that cannot be part of a name."""
        return cls.parse(str(cls(fingerprint.hex(), shard, hashlib.sha256(header).hexdigest())))

    @classmethod
    def parse(cls, name: str) -> ExtentName:
        """Raises ValueError for a name that no extent has."""
        found = _NAME.fullmatch(name)
        if found is None or not found["digest"].startswith(found["hh"]):
            raise ValueError(f"{name!r} is no name of an extent")
        return cls(found["fingerprint"], found["shard"], found["digest"])


def is_name(name: str) -> bool:
    """Whether an extent can have this name."""
    found = _NAME.fullmatch(name)
    return found is not None and found["digest"].startswith(found["hh"])


class Range(NamedTuple):
    """Bytes of an object from ``offset`` on, and where they go: ``into`` is writable and one-dimensional, of bytes, and
    says how many there are."""

    offset: int
    into: memoryview


class Entry(NamedTuple):
    """An object of a listing. ``age_s`` is the time since it was published, by this machine's clock and the store's."""

    name: str
    n_bytes: int
    age_s: float


class Page(NamedTuple):
    """Part of a listing, in the order of names. ``after`` continues it; None at its end."""

    entries: list[Entry]
    after: str | None


class Reading(Future[None]):
    """The future of a read: once it is done, cancelled included, nothing writes to its buffers any more.

    `cancel` succeeds unless it is done, and waits for a copy that is under way, a few milliseconds at the most. So what
    becomes of the request itself, which may hang in a dead server, does not matter to whoever owns the buffers.
    """

    def __init__(self) -> None:
        super().__init__()
        self._copying = threading.Lock()
        self._over = False

    def cancel(self) -> bool:
        self.end_copies()
        return super().cancel()

    def deliver(self, into: memoryview, data: memoryview) -> None:
        """Copy ``data``, of the same length. For tiers. Raises CancelledError if nobody waits any more."""
        with self._copying:
            if self._over:
                raise CancelledError
            # NumPy releases the interpreter's lock for it; assigning to a slice does not.
            np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(data, np.uint8))

    def end_copies(self) -> None:
        """From now on nothing is delivered. For tiers; `settle` does it."""
        with self._copying:
            self._over = True


def settle(future: Future[Any], result: Any, error: BaseException | None = None) -> bool:
    """End a future unless it has ended, by its cancellation for example: whether this did."""
    if isinstance(future, Reading):
        future.end_copies()
    try:
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)
    except Exception:  # InvalidStateError: somebody was faster
        return False
    return True


class Tier(ABC):
    """A place that several engines share, with whole extents in it. Thread-safe.

    - **All or nothing**: an extent is visible as soon as its `publish` has ended, whole, and never in part, whatever
      crashes. One that is visible does not change; what replaces it is the same extent.
    - **Futures**: every call returns at once. Requests wait for the store without a thread each. Callbacks run on a
      thread of the tier's: they must be short. Every future may be cancelled, which gives up waiting; of a read,
      `Reading` says more.
    - **Nothing is verified here.** Whoever reads checks an extent's header and pages (`SharedExtents`, `ExtentHeader`):
      a store may return anything.

    Futures raise, besides what a method names: TierUnavailable, if the store did not answer or may answer later, and
    TierRefused, if an operator has to do something first (credentials, a read-only or a full store), with one sentence
    that says what. A call raises ValueError at once for a name that no extent has.
    """

    @abstractmethod
    def mark(self, proposed: str | None = None) -> Future[str | None]:
        """What the store's mark says: a name that the store keeps for good. A store that has none gets the ``proposed``
        one; without that, None. Of several that propose one at once, all get the same answer."""

    @abstractmethod
    def publish(self, name: str, file: BinaryIO, trailer: bytes = b"") -> Future[bool]:
        """Make all of ``file``, from its beginning, and ``trailer`` behind it the object ``name``, durably. ``file`` is
        open for reading and may be closed when this returns: the tier has a descriptor of its own, of the same open
        file, with the locks that it has. Its bytes do not change while it is open.

        Whether it was new: publishing again what is there does nothing. An object of that name that is not this one,
        being of another size or beginning or ending otherwise, is replaced. Raises OSError if ``file`` cannot be read.
        """

    @abstractmethod
    def read(self, name: str, ranges: Sequence[Range]) -> Reading:
        """Fill the ranges. They may be in any order and may overlap in the object, not in memory.

        Raises TierMissing if there is no such object, and TierShort if it ends before a range does; then some of the
        buffers may have been written to.
        """

    @abstractmethod
    def drop(self, name: str) -> Future[None]:
        """Delete the object; nothing happens if there is none. Reads that are under way may fail."""

    @abstractmethod
    def list(self, prefix: str = "", after: str | None = None, limit: int = 1000) -> Future[Page]:
        """At most ``limit`` extents whose names begin with ``prefix``, a whole number of a name's parts
        (``FINGERPRINT/SHARD``), or with none; only those after ``after``. What has no name of an extent is left out:
        it is not ours. An extent that is published or dropped meanwhile is listed or not.
        """

    @abstractmethod
    def sweep(self, older_than_s: float) -> Future[int]:
        """Delete what writers that died have left half-written, if nobody has written to it for that long. How many
        there were. A writer that still runs, after all, begins again."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back. What is under way ends, with TierUnavailable if need be. May be called again."""

    def __enter__(self) -> Tier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
