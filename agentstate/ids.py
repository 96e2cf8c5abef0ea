"""Ids: those that are made here, and the rule for those that others choose, of sessions and of tool calls (`check`).

One that is made here is a prefix that says what it names, then 26 base32 characters that sort by the time of their
making. The 130 bits are those of a ULID: 48 bits of Unix milliseconds, then 80 random ones. Ids that one process makes
within one millisecond sort in the order of their making; across processes the order is only as good as their clocks,
which is why nothing is ever ordered by id: entries have ``seq``.
"""

from __future__ import annotations

import re
import secrets
import threading
import time

from agentstate.errors import InvalidId

ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base32: digits sort before letters, no i, l, o, u
LENGTH = 26
MAX_BYTES = 1024  # both databases index them
# No control characters, no ends of lines, no halves of characters. The name of a deleted session begins with a tilde.
PATTERN = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029~][^\x00-\x1f\x7f-\x9f\u2028\u2029]*$"
_RULE = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff~][^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]*")

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


def check(chosen: str) -> str:
    """An id that somebody chose, as it is. Raises InvalidId unless every database, path and log can hold it: 1 to
    ``MAX_BYTES`` bytes of UTF-8 without control characters, that do not begin with ``~``, other than ``.`` and ``..``.
    """
    if not _RULE.fullmatch(chosen) or chosen in (".", ".."):
        raise InvalidId(
            f"{chosen[:80]!r} cannot be an id: one has no control characters, does not begin with '~', and is not "
            "empty, '.' or '..'"
        )
    size_bytes = len(chosen.encode())
    if size_bytes > MAX_BYTES:
        raise InvalidId(f"an id may have {MAX_BYTES} bytes of UTF-8, {chosen[:80]!r}… has {size_bytes}")
    return chosen
