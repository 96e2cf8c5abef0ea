"""Ids: a prefix that says what they name, then 26 base32 characters that sort by the time of their making.

The 130 bits are those of a ULID: 48 bits of Unix milliseconds, then 80 random ones. Ids that one process makes within
one millisecond sort in the order of their making; across processes the order is only as good as their clocks, which
is why nothing is ever ordered by id: entries have ``seq``.
"""

from __future__ import annotations

import secrets
import threading
import time

ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base32: digits sort before letters, no i, l, o, u
LENGTH = 26

_lock = threading.Lock()
_last = 0


def new(prefix: str) -> str:
    """A new id, for instance ``ses_01k8…`` for ``new("ses")``. Thread-safe."""
    global _last
    value = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    with _lock:
        if value >> 80 <= _last >> 80:
            # Same millisecond, or the clock went back: stay above the last one, by a random step so that an id
            # does not give its neighbour away.
            value = _last + 1 + secrets.randbits(40)
        _last = value
    digits = "".join(ALPHABET[value >> shift & 31] for shift in range(5 * (LENGTH - 1), -1, -5))
    return f"{prefix}_{digits}"
