"""Reading, verifying, summing up and coding pages in C: each of these is one call for all pages of a run in one layer,
without Python's interpreter lock.

The extension `_native` is optional. It is built with the package where there is a C compiler; where it is missing, or
`AGENTSTATE_NATIVE=off` says so, Python does the same, call by call. It knows no policy: what is read, in which order,
and what becomes of an error is decided by its callers, in Python, and both ways are held to the same tests.

::

    Verifier(fingerprint, keys, component_bytes, block_pages, page_sums, block_sums)
        What an extent's header says of its pages, kept for as long as the object lives. ``fingerprint`` has 32 bytes
        and ``keys`` 32 a page. ``component_bytes`` are the bytes of a page's components in one layer. ``page_sums`` and
        ``block_sums`` are contiguous uint64 of shapes (layers, pages) and (layers, blocks). Raises ValueError if they
        do not fit each other.

    Verifier.wrong_slots(layer, slot, components) -> list[int]
        What `ExtentHeader.wrong_slots` returns.

    Verifier.read(fd, ranges, layer, slot, components, preadv=None) -> (counts, wrong)
        Carry out ``ranges``, each (arrays, offset, wanted): read consecutive bytes of the file ``fd`` from ``offset``
        on to ``arrays``, at least ``wanted`` of them. Then look for wrong slots in ``components``, which lie in those
        arrays. ``counts`` are the bytes of each range; it ends with the first range that has fewer than ``wanted``, and
        ``wrong`` is None then. Raises OSError like `os.preadv`. ``preadv`` is called for each range in place of the
        system's, holding the lock.

    Verifier.sum_up(layer, components, page_sums, block_sums)
        What `ExtentHeader.sum_up` does, of all pages: ``page_sums`` and ``block_sums``, contiguous uint64 of shapes
        (pages,) and (blocks,), are filled. ``components`` are as for `wrong_slots`.

    encode(pages, page_bytes, into, lengths) -> table
    decode(table, page_bytes, coded, lengths, arrays)
        What `codec.encode` and `codec.decode` do, of contiguous bytes: ``lengths`` are uint32 of shape (pages,), and
        ``arrays`` whole pages each. Raises ValueError for what does not fit each other.

    Queue(depth)
        Reads of which at most ``depth`` are under way at a time, for one call of `read_rows` after the other. Raises
        OSError where the kernel has none.

    read_rows(queue, reads, got, scratch, sums, seeds, from, to, row_bytes, into, outcome)
        Carry out ``reads``, int64 of shape (reads, 4): of a file descriptor, from an offset on, so many bytes, to
        the ``scratch`` from a sector of 4 KiB on. They fill it without a gap. ``got``, int64 of shape (reads,), is
        filled: bytes, or an error's number, negative. Where ``queue`` is None, they have been carried out, and ``got``
        says so. Each sector of ``scratch`` has its sum in ``sums`` with its seed from ``seeds``, both uint64; without
        ``sums``, nothing is verified. ``from`` and ``to``, int64 of shape (components, rows), say for each row where
        in the scratch it begins, ascending, and which row of ``into`` it goes to: for each component one array of shape
        (any, row bytes). ``outcome``, uint8 of shape (rows,), is filled: 1 where all sectors of a row were right and it
        has been copied; 2 where one was not; 3 where one has not been read. Of such rows some components may have been
        copied. Raises ValueError if something does not lie where it may.

    sector_sums(data, seed, sums)
        Fill ``sums`` with the checksums of the sectors of ``data``, the first with ``seed``, each next with one more.

    replaced_preadv() -> bool
        Whether something else than the C library has taken the place of its `preadv`, which is how tests slow a drive
        down or make it fail: then no `Queue` is to go around it.

    xxh3_64(data, seed=0) -> int
        The XXH3 checksum of 64 bits.
"""

from __future__ import annotations

import os
from typing import Any

_INTERFACE = 4
# Not of Settings: there is nobody to pass them to an import.
_OFF = os.environ.get("AGENTSTATE_NATIVE", "").lower() in ("off", "0", "false", "no", "n", "f")
_preadv = os.preadv


def _load() -> tuple[Any, str]:
    """The extension, or None and why."""
    if _OFF:
        return None, "off (AGENTSTATE_NATIVE)"
    try:
        from agentstate.pages.native import _native  # type: ignore[attr-defined]
    except ImportError as error:
        return None, f"not built ({error})"
    # A checkout may have been updated without being built again.
    return (_native, "") if _native.INTERFACE == _INTERFACE else (None, "built from other sources than these")


library: Any
"""The extension; None where Python takes its place."""
why_not: str
"""Why that is, in a few words; empty where the extension is used."""
library, why_not = _load()


def new_queue(depth: int) -> Any:
    """A `Queue`; None where there is none, or what has taken the place of `preadv` is to see every read."""
    if library is None or os.preadv is not _preadv or library.replaced_preadv():
        return None
    try:
        return library.Queue(depth)
    except OSError:
        return None


def replaced_preadv() -> Any:
    """What has taken the place of `os.preadv`, which is how tests make a drive fail: it is called in place of the
    system's. None as a rule."""
    return None if os.preadv is _preadv else os.preadv
