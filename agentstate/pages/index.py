"""Which extent holds a page: an LMDB environment beside the extents, which are the truth.

The index is memory-mapped, so a look-up costs about a microsecond and its memory is the page cache's. It holds what
the extents say and a little that they cannot (which pages were dropped, and when an extent was last used), and it may
be lost at any time: `PageStore` compares it with the files at open and reads the headers of those it does not know.

It also lists the keys of each extent in one piece. So a chain is compared with an extent at a time, not looked up page
by page: one look-up an extent. Extents that an earlier release entered have no such list, and are looked up by page.

Whose an extent is, is noted with the time of the file that this is said of: a release that does not know of owners
leaves the note of an extent that it deletes, and may give its number to another one.

LMDB trusts its file. An index that is shorter than it says, cannot be walked from end to end, was made by another
version or for other pages, or outlived the last process that opened it or the last two that changed it, is deleted and
rebuilt.
"""

from __future__ import annotations

import logging
import os
import shutil
import struct
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import numpy as np

from agentstate.errors import FingerprintMismatch
from agentstate.pages.extent import FORMAT_VERSION, Geometry
from agentstate.pages.keys import KEY_BYTES, PageKeys
from agentstate.private import FILE_MODE, make_directory, private

logger = logging.getLogger(__name__)

_VERSION = 1
_NAMES = (b"meta", b"pages", b"extents", b"lists")
# Threads that read at the same time, of all processes.
_MOST_READERS = 1022
# Address space, not memory or disk: room for about a hundred million pages.
_MAP_BYTES = 1 << 34
_PLACE = struct.Struct("<QI")
_NUMBER = struct.Struct(">Q")
_RECORD = struct.Struct("<IIQQQ")
_MTIME = struct.Struct("<Q")
# Of an extent's line in ``meta`` that says whose it is; its number follows.
_OWNER = b"owner"
# What LMDB raises for a file that is not as it left it, as opposed to what the file system refuses.
DAMAGE = (
    lmdb.BadTxnError,
    lmdb.BadDbiError,
    lmdb.BadValsizeError,
    lmdb.CorruptedError,
    lmdb.IncompatibleError,
    lmdb.InvalidError,
    lmdb.NotFoundError,
    lmdb.PageNotFoundError,
    lmdb.PanicError,
    lmdb.VersionMismatchError,
)


class ExtentRecord(NamedTuple):
    """What the index knows of an extent: how many pages it holds and how many of them are found through the index
    (``live``), the size and modification time of its file, and when it was last used, by a clock that counts uses."""

    pages: int
    live: int
    file_bytes: int
    mtime_ns: int
    used: int


class Run(NamedTuple):
    """``pages`` keys of a chain, from its key ``first`` on, that lie side by side in extent ``number`` from ``slot``
    on."""

    number: int
    slot: int
    pages: int
    first: int


class IndexChange:
    """A write transaction: everything in it is seen at once or never."""

    def __init__(self, txn: Any, pages: Any, extents: Any, lists: Any, meta: Any):
        self._txn, self._pages, self._extents, self._lists, self._meta = txn, pages, extents, lists, meta

    def place(self, key: bytes) -> tuple[int, int] | None:
        """The extent's number and the slot of a page."""
        raw = self._txn.get(key, db=self._pages)
        return None if raw is None else _PLACE.unpack(raw)

    def places(self, keys: Iterable[bytes]) -> dict[bytes, tuple[int, int]]:
        """The extent's number and the slot of each of ``keys`` that is found."""
        cursor = self._txn.cursor(db=self._pages)
        return {key: _PLACE.unpack(raw) for key, raw in cursor.getmulti(keys)}

    def put(self, number: int, slots: Mapping[bytes, int]) -> None:
        """Let pages be found in the slots of an extent."""
        cursor = self._txn.cursor(db=self._pages)
        cursor.putmulti([(key, _PLACE.pack(number, slot)) for key, slot in slots.items()])

    def list_keys(self, number: int, keys: PageKeys) -> None:
        """Enter which keys an extent has, in slot order, even if they are found elsewhere."""
        self._txn.put(_NUMBER.pack(number), keys.packed, db=self._lists)

    def own(self, number: int, mtime_ns: int, owner: str) -> None:
        """Enter whose an extent is, if it is anybody's; ``mtime_ns`` is its file's."""
        if owner:
            self._txn.put(_OWNER + _NUMBER.pack(number), _MTIME.pack(mtime_ns) + owner.encode(), db=self._meta)

    def delete(self, key: bytes) -> None:
        self._txn.delete(key, db=self._pages)

    def delete_pages_of(self, numbers: set[int]) -> None:
        """Delete every page of some extents whose keys are not known: walks the whole index."""
        cursor = self._txn.cursor(db=self._pages)
        for key in [bytes(key) for key, raw in cursor if _PLACE.unpack(raw)[0] in numbers]:
            self.delete(key)

    def record(self, number: int, record: ExtentRecord) -> None:
        self._txn.put(_NUMBER.pack(number), _RECORD.pack(*record), db=self._extents)

    def forget(self, number: int) -> None:
        for database in (self._extents, self._lists):
            self._txn.delete(_NUMBER.pack(number), db=database)
        self._txn.delete(_OWNER + _NUMBER.pack(number), db=self._meta)


class _Reads:
    """What is asked of an index that is mapped: ``_env`` is LMDB's environment, and `_name` has named its databases."""

    _env: Any = None

    def _name(self) -> None:
        self._meta, self._pages, self._extents, self._lists = (self._env.open_db(name) for name in _NAMES)

    def _is_for(self, identity: bytes) -> bool:
        with self._env.begin(db=self._meta) as txn:
            return bool(txn.get(b"identity") == identity)

    def runs(
        self,
        keys: PageKeys,
        *,
        whole: Callable[[int], bool] = lambda number: False,
        hidden: Container[bytes] = (),
        gaps: bool = False,
    ) -> list[Run]:
        """Where ``keys`` lie, in order and as of one moment: up to the first that is not stored, or with ``gaps`` all
        that are stored. ``hidden`` keys count as not stored. ``whole`` tells, by an extent's number, whether each of
        its pages is found in it and none is hidden: then the keys are compared with its list."""
        found: list[Run] = []
        lists: dict[int, bytes] = {}
        packed, count, at = keys.packed, len(keys), 0
        number, slot, pages, first = 0, 0, 0, 0
        # No buffers: they would outlive a `close` by another thread, which unmaps what they show.
        with self._env.begin(db=self._pages) as txn:
            while at < count:
                key = packed[at * KEY_BYTES : (at + 1) * KEY_BYTES]
                raw = None if key in hidden else txn.get(key)
                if raw is None:
                    if not gaps:
                        break
                    at += 1
                    continue
                in_extent, in_slot = _PLACE.unpack(raw)
                length = 1
                if whole(in_extent):
                    if in_extent not in lists:
                        lists[in_extent] = txn.get(_NUMBER.pack(in_extent), b"", db=self._lists)
                    length = _alike(packed, at, lists[in_extent], in_slot)
                    if length == 0:
                        lists[in_extent], length = b"", 1
                if pages and (number, slot + pages, first + pages) == (in_extent, in_slot, at):
                    pages += length
                else:
                    if pages:
                        found.append(Run(number, slot, pages, first))
                    number, slot, pages, first = in_extent, in_slot, length, at
                at += length
        if pages:
            found.append(Run(number, slot, pages, first))
        return found

    def places(self, keys: Iterable[bytes]) -> list[tuple[int, int] | None]:
        """The extent number and the slot of each of ``keys``, None for one that is not stored. As of one moment."""
        with self._env.begin(db=self._pages) as txn:
            found = (txn.get(key) for key in keys)
            return [None if raw is None else _PLACE.unpack(raw) for raw in found]

    def numbers(self, keys: Iterable[bytes]) -> set[int]:
        """The extents that hold those of ``keys`` that are stored."""
        return {place[0] for place in self.places(keys) if place is not None}

    def listed(self, numbers: Iterable[int]) -> dict[int, PageKeys]:
        """The keys of those of some extents that are listed, in slot order, wherever they are found. As of one
        moment."""
        with self._env.begin(db=self._lists) as txn:
            found = ((number, txn.get(_NUMBER.pack(number))) for number in numbers)
            return {number: PageKeys(raw) for number, raw in found if raw and len(raw) % KEY_BYTES == 0}

    def records(self) -> dict[int, ExtentRecord]:
        """Every extent by its number."""
        with self._env.begin(db=self._extents) as txn:
            return {
                _NUMBER.unpack(number)[0]: ExtentRecord(*_RECORD.unpack(raw))
                for number, raw in txn.cursor()
                if (len(number), len(raw)) == (_NUMBER.size, _RECORD.size)
            }

    def described(self, numbers: Iterable[int]) -> dict[int, tuple[ExtentRecord, str]]:
        """The records of those of some extents that are known, and whose they are. As of one moment."""
        found = {}
        with self._env.begin() as txn:
            for number in numbers:
                raw = txn.get(_NUMBER.pack(number), db=self._extents)
                if raw is None or len(raw) != _RECORD.size:
                    continue
                record, owner = (
                    ExtentRecord(*_RECORD.unpack(raw)),
                    txn.get(_OWNER + _NUMBER.pack(number), db=self._meta),
                )
                found[number] = record, _owner_in(owner, record) if owner is not None else ""
        return found

    def owners(self, records: Mapping[int, ExtentRecord]) -> dict[int, str]:
        """Whose those of some extents are that are somebody's, by their numbers."""
        found = {}
        with self._env.begin(db=self._meta) as txn, txn.cursor() as cursor:
            cursor.set_range(_OWNER)
            for key, raw in cursor:
                if not key.startswith(_OWNER):
                    break
                number = int.from_bytes(key[len(_OWNER) :], "big")
                record = records.get(number)
                if record is not None and (owner := _owner_in(raw, record)):
                    found[number] = owner
        return found


class PageIndex(_Reads):
    """Places by key, records by extent number. One process opens it at a time; any thread reads, one at a time writes.

    Raises lmdb.Error if LMDB cannot work.
    """

    def __init__(self, directory: Path, fingerprint: bytes, geometry: Geometry):
        self._identity = _identity_of(fingerprint, geometry)
        self._data, self._unfinished = directory / "data.mdb", directory / "unfinished"
        self._env: Any = None
        try:
            self._open(directory)
        except BaseException:
            self.close()
            raise

    def _open(self, directory: Path) -> None:
        ended = self._unfinished.stat().st_size if self._unfinished.exists() else 0
        damage = "the last processes that worked on it ended in the middle of that" if ended > 1 else None
        if damage is None and self._data.exists():
            self._begin(b"..")
            damage = self._damage()
        if damage is not None:
            logger.warning("page store: the index %s is made anew: %s", directory, damage)
            self.close()
            shutil.rmtree(directory)
        make_directory(directory)
        if damage is not None or not self._data.exists():
            self._begin(b"..")
            self._map()
            self._name()
            with self._env.begin(write=True) as txn:
                txn.put(b"identity", self._identity, db=self._meta)
            ended = 0
        self._finish(ended)

    def _begin(self, weight: bytes = b".") -> None:
        """Mark that work has begun. A damaged index may end the process that works on it, and must not do so for ever:
        the marks of unfinished work are counted. A change is often under way when a process is killed, so one
        mark of a change does not condemn the index."""
        with suppress(OSError), open(self._unfinished, "ab", opener=private) as file:
            file.write(weight)

    def _finish(self, ended: int = 0) -> None:
        with suppress(OSError):
            if ended:
                os.truncate(self._unfinished, ended)
            else:
                self._unfinished.unlink()

    def _map(self, *, readonly: bool = False) -> None:
        # The last transactions before a power failure may be lost, which does no harm; a torn index would.
        self._env = lmdb.open(
            str(self._data.parent),
            map_size=_MAP_BYTES,
            max_dbs=len(_NAMES),
            max_readers=_MOST_READERS,
            metasync=False,
            readonly=readonly,
            create=False,
            lock=not readonly,
            mode=FILE_MODE,
        )

    def _damage(self) -> str | None:
        """Map the index that is there. Returns why it cannot be used; None if it can."""
        try:
            self._map()
            # Before anything else is touched: mapped memory beyond the file's end must not be.
            end = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
            if (size := self._data.stat().st_size) < end:
                return f"it is {size} bytes long and should be {end}"
            self._name()
            if not self._is_for(self._identity):
                return "it is of another version, model or layout"
            with self._env.begin() as txn:
                # Touches every leaf, so that the look-ups to come find them in memory.
                for database in (self._pages, self._extents, self._lists):
                    for _ in txn.cursor(db=database).iternext(keys=True, values=False):
                        pass
        except DAMAGE as error:
            return str(error)
        return None

    @contextmanager
    def change(self) -> Iterator[IndexChange]:
        """A write transaction, committed at the end and aborted after an exception."""
        self._revive()
        self._begin()
        try:
            with self._env.begin(write=True) as txn:
                yield IndexChange(txn, self._pages, self._extents, self._lists, self._meta)
        except lmdb.Error as error:
            if not isinstance(error, DAMAGE):
                self._finish()
            self._revive()
            raise
        except BaseException:
            self._finish()
            raise
        self._finish()

    def _revive(self) -> None:
        """An environment that could not write its last page refuses everything from then on: map it anew, read-only
        while the disk allows no more. Look-ups that are under way fail."""
        try:
            with self._env.begin():
                pass
            if not self._env.flags()["readonly"]:
                return
        except lmdb.Error:
            pass
        self._env.close()
        try:
            self._map()
        except lmdb.Error:
            self._map(readonly=True)
        self._name()

    def condemn(self) -> None:
        """Have it rebuilt when it is opened next."""
        self._begin(b"..")

    def close(self) -> None:
        if self._env is not None:
            self._env.close()


class IndexView(_Reads):
    """The index of a store that another process has open, as of its newest change. Any thread reads.

    Raises lmdb.Error or OSError where it cannot be mapped, and FingerprintMismatch where it is of another version,
    model or layout. Nothing in it is looked over: whoever has the store open has done so.
    """

    def __init__(self, directory: Path, fingerprint: bytes, geometry: Geometry):
        # Readers are entered in a table beside the index, which keeps the writer from using what they look at.
        self._env = lmdb.open(
            str(directory), max_dbs=len(_NAMES), max_readers=_MOST_READERS, readonly=True, create=False, mode=FILE_MODE
        )
        try:
            # Of readers that were killed.
            self._env.reader_check()
            self._name()
            if not self._is_for(_identity_of(fingerprint, geometry)):
                raise FingerprintMismatch(f"the index {directory} is of another version, model or layout")
        except BaseException:
            self._env.close()
            raise

    def close(self) -> None:
        self._env.close()


def _identity_of(fingerprint: bytes, geometry: Geometry) -> bytes:
    return repr((_VERSION, FORMAT_VERSION, fingerprint.hex(), geometry)).encode()


def _owner_in(raw: bytes, record: ExtentRecord) -> str:
    """Whose an extent is, as a line in ``meta`` says; "" if that is of another file than its record."""
    if len(raw) <= _MTIME.size or _MTIME.unpack_from(raw)[0] != record.mtime_ns:
        return ""
    return bytes(raw[_MTIME.size :]).decode(errors="replace")


def _alike(packed: bytes, at: int, listed: bytes, slot: int) -> int:
    """How many keys of ``packed``, from ``at`` on, are those of ``listed`` from ``slot`` on."""
    keys = min(len(packed) // KEY_BYTES - at, len(listed) // KEY_BYTES - slot)
    if keys <= 0:
        return 0
    ours = packed[at * KEY_BYTES : (at + keys) * KEY_BYTES]
    theirs = listed[slot * KEY_BYTES : (slot + keys) * KEY_BYTES]
    if ours == theirs:
        return keys
    differing = (np.frombuffer(ours, "<u8") != np.frombuffer(theirs, "<u8")).reshape(keys, -1).any(axis=1)
    return int(differing.argmax())
