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

    xxh3_64(data, seed=0) -> int
        The XXH3 checksum of 64 bits.
"""

from __future__ import annotations

import os
from typing import Any

_INTERFACE = 3
# Not of Settings: there is nobody to pass them to an import.
_OFF = os.environ.get("AGENTSTATE_NATIVE", "").lower() in ("off", "0", "false", "no", "n", "f")
_preadv = os.preadv


def _load() -> Any:
    if _OFF:
        return None
    try:
        from agentstate.pages.native import _native  # type: ignore[attr-defined]
    except ImportError:
        return None
    # A checkout may have been updated without being built again.
    return _native if _native.INTERFACE == _INTERFACE else None


library: Any = _load()
"""The extension; None where Python takes its place."""


def replaced_preadv() -> Any:
    """What has taken the place of `os.preadv`, which is how tests make a drive fail: it is called in place of the
    system's. None as a rule."""
    return None if os.preadv is _preadv else os.preadv
